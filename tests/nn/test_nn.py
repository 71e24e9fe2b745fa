"""Layers of the operators give what PyTorch's give, gradients too, and say which operator ran."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ncsn_fast import nn as ours
from ncsn_fast import ops, use_backend
from ncsn_fast.benchmarks.cases import style_transfer
from ncsn_fast.ops.record import record_backends
from ncsn_fast.ops.tolerances import relative_error

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def images(n=2, channels=16, size=(12, 9), layout=torch.contiguous_format, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, *size, generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=layout)


def with_gradients(module, *inputs):
    """The output, and the gradients of the image and of every parameter by its name."""
    x = inputs[0].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x, *inputs[1:])
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y, [x, *(p for _, p in named)], upstream)
    return {"y": y.detach()} | dict(zip(["x", *(n for n, _ in named)], gradients, strict=True))


def assert_same(got, expected, least=1e-6, **unlike):
    """Each value within float32's rounding, compared in float64."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(got[name].double(), value.double()) < unlike.get(name, least), name


def drawn(module):
    """With weights that are none of the initial ones."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(layout, affine):
    plain = drawn(nn.InstanceNorm2d(16, affine=affine))
    layer = ours.InstanceNorm2d(16, affine=affine)
    layer.load_state_dict(plain.state_dict())
    x = images(layout=layout)
    with record_backends() as ran:
        got = with_gradients(layer, x)
    assert ("cond_instance_norm_elu", "native") in ran
    assert_same(got, with_gradients(copy.deepcopy(plain).double(), x.double()), least=3e-6)
    assert got["y"].is_contiguous(memory_format=layout)


def test_instance_norm_leaves_to_pytorch_what_is_its_own():
    tracking = ours.InstanceNorm2d(4, track_running_stats=True)
    tracking(images(channels=4))
    assert tracking.running_mean.abs().sum() > 0
    layer = ours.InstanceNorm2d(4)
    assert layer(torch.ones(4, 3, 3)).shape == (4, 3, 3)  # one image without a batch
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        layer(torch.ones(2, 4, 1, 1))


CONVOLUTIONS = {
    "same": dict(padding=1),
    "dilated": dict(padding=2, dilation=2),
    "named": dict(padding="same", dilation=2, bias=False),
    "none": dict(padding=0),
    "valid": dict(padding="valid"),
    "reflected": dict(padding=1, padding_mode="reflect"),
    "uneven": dict(padding=(2, 1), padding_mode="replicate"),
    "circular": dict(padding="same", padding_mode="circular", dilation=2),
    "wide": dict(padding=3, bias=False),
    "strided": dict(padding=1, stride=2),
    "grouped": dict(padding=1, groups=2),
    "one way": dict(padding=1, dilation=(1, 2)),
}
OF_PYTORCH = ("strided", "grouped", "one way")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_conv3x3(layout, kind):
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 24, 3, **CONVOLUTIONS[kind])
    layer = ours.Conv3x3(16, 24, 3, **CONVOLUTIONS[kind])
    layer.load_state_dict(plain.state_dict())
    x = images(size=(20, 23), layout=layout)
    with record_backends() as ran:
        got = with_gradients(layer, x)
    assert (("conv3x3", "native") in ran) == (kind not in OF_PYTORCH)
    assert_same(got, with_gradients(copy.deepcopy(plain).double(), x.double()), least=4e-6)
    assert got["y"].is_contiguous(memory_format=layout)


def test_conv3x3_of_other_shapes_and_dtypes():
    plain, layer = nn.Conv2d(16, 16, 3), ours.Conv3x3(16, 16, 3)
    layer.load_state_dict(plain.state_dict())
    one = images()[0]
    assert torch.allclose(layer(one), plain(one), atol=1e-5)
    assert torch.equal(layer.double()(images().double()), plain.double()(images().double()))
    for wrong in (images(channels=3).double(), images(size=(2, 2)).double()):
        with pytest.raises(RuntimeError) as theirs:
            plain(wrong)
        with pytest.raises(RuntimeError) as mine:
            layer(wrong)
        assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("elu", [True, False])
@pytest.mark.parametrize("alpha", [True, False])
def test_conditional_instance_norm_elu(elu, alpha):
    layer = drawn(ours.ConditionalInstanceNormELU(16, 5, elu=elu, alpha=alpha))
    assert layer.embed.weight.shape == (5, 48 if alpha else 32)
    x, y = images(), torch.tensor([3, 0])
    with record_backends() as ran:
        got = with_gradients(layer, x, y)
    assert ("cond_instance_norm_elu", "native") in ran

    def plain(h):
        columns = layer.embed.weight.double()[y].chunk(3 if alpha else 2, 1)
        gamma, beta = (column[:, :, None, None] for column in (columns[0], columns[-1]))
        mean = h.mean((2, 3), keepdim=True)
        u = (h - mean) / (h.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        if alpha:
            between = (mean - mean.mean(1, keepdim=True)) / (
                mean.var(1, keepdim=True) + 1e-5
            ).sqrt()
            u = u + columns[1][:, :, None, None] * between
        return F.elu(gamma * u + beta) if elu else gamma * u + beta

    # The formula of InstanceNorm++: gamma multiplies the means as well.
    if alpha:
        with torch.no_grad():
            layer.embed.weight[:, :16] = 1
        got = with_gradients(layer, x, y)
    assert relative_error(got["y"], plain(x.double())) < 3e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("elu", [True, False])
def test_norm_elu_conv3x3(layout, classes, elu):
    unit = drawn(ours.NormELUConv3x3(16, 16, classes, dilation=2, elu=elu))
    x = images(size=(16, 16), layout=layout)
    labels = () if classes is None else (torch.tensor([1, 3]),)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = (
                copy.deepcopy(unit.norm).double(),
                copy.deepcopy(unit.conv).double(),
            )

        def forward(self, x, *y):
            if y:
                gamma, beta = self.norm.embed(y[0])[:, :, None, None].chunk(2, 1)
                h = gamma * F.instance_norm(x) + beta
            else:
                h = self.norm(x)
            return self.conv(F.elu(h) if elu else h)

    with record_backends() as ran:
        got = with_gradients(unit, x, *labels)
    assert ("norm_elu_conv3x3", "native") in ran
    assert_same(got, with_gradients(Plain(), x.double(), *labels), least=2e-5)
    with torch.no_grad():
        assert torch.allclose(unit(x, *labels, residual=x), unit(x, *labels) + x, atol=1e-5)
    if classes:
        with pytest.raises(TypeError, match="needs the classes y"):
            unit(x)


def test_a_unit_of_layers_that_are_there():
    norm, conv = drawn(nn.InstanceNorm2d(8)), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    unit = ours.NormELUConv3x3.of(norm, conv, elu=False)
    assert unit.norm is norm and unit.conv is conv
    x = images(channels=8)
    assert torch.allclose(unit(x), conv(norm(x)), atol=1e-5)
    conv.register_forward_hook(lambda m, i, o: 2 * o)
    assert torch.allclose(unit(x), conv(norm(x)), atol=1e-5)
    with pytest.raises(ValueError, match="norm: it tracks running statistics"):
        ours.NormELUConv3x3.of(
            nn.InstanceNorm2d(8, track_running_stats=True), nn.Conv2d(8, 8, 3, padding=1)
        )
    with pytest.raises(ValueError, match="conv: its stride is"):
        ours.NormELUConv3x3.of(norm, nn.Conv2d(8, 8, 3, 2, padding=1))
    with pytest.raises(ValueError, match="norm: its class is not InstanceNorm2d"):
        ours.NormELUConv3x3.of(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1))
    with pytest.raises(ValueError, match="norm: it has an ELU of its own"):
        ours.NormELUConv3x3.of(ours.ConditionalInstanceNormELU(8, 2), nn.Conv2d(8, 8, 3, padding=1))


def test_max_pool():
    x = images()
    assert torch.equal(ours.MaxPool5()(x), nn.MaxPool2d(5, 1, 2)(x))
    assert torch.equal(ours.MaxPool5("zero")(-x.abs())[..., 0, 0], torch.zeros(2, 16))


# --- layers of an existing model ------------------------------------------------------------------


class Tracking(nn.InstanceNorm2d):
    """A subclass, which may compute something of its own."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.ReflectionPad2d(3),
        nn.Conv2d(3, 16, 7),
        nn.InstanceNorm2d(16, affine=True),
        nn.ELU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.InstanceNorm2d(16),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.InstanceNorm2d(16, affine=True),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(5, 1, 2),
        nn.InstanceNorm2d(16, track_running_stats=True),
        nn.ELU(alpha=0.5),
        Tracking(16),
        nn.Conv2d(16, 3, 3, padding=1),
    )


def test_replacing_keeps_outputs_gradients_names_and_parameters():
    plain, model = network(), network()
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    changed = ours.replace_layers(model)
    assert changed == {
        "2": "InstanceNorm2d",
        "4": "Conv3x3",
        "5": "InstanceNorm2d",
        "6": "Conv3x3",
        "7": "InstanceNorm2d",
        "9": "Conv3x3",
        "10": "MaxPool5",
        "14": "Conv3x3",
    }
    assert {name: (id(p), p.shape) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == list(plain.state_dict())
    assert ours.replace_layers(model) == {}
    x = images(channels=3, size=(17, 20))
    with record_backends() as ran:
        got = with_gradients(model, x)
    forward = [pair[0] for pair in ran if not pair[0].endswith("backward")]
    assert forward.count("norm_elu_conv3x3") == 2  # with an ELU, and without
    assert "max_pool5" in forward and ("conv3x3", "native") in ran
    # A bias before a norm has no gradient but rounding.
    rounding = {"1.bias": float("inf"), "4.bias": float("inf"), "9.bias": float("inf")}
    assert_same(got, with_gradients(plain.double(), x.double()), least=1e-4, **rounding)


def test_replaced_layers_obey_hooks_and_compile():
    plain, model = network().eval(), network().eval()
    ours.replace_layers(model)
    x = images(channels=3)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert relative_error(compiled(x), plain(x).double()) < 1e-4
        for each in (plain, model):
            each[3].register_forward_hook(lambda m, i, o: o + 1)
            each[6].register_forward_pre_hook(lambda m, i: (2 * i[0],))
        with record_backends() as ran:
            assert relative_error(model(x), plain(x).double()) < 1e-4
    assert not any(op == "norm_elu_conv3x3" for op, _ in ran)


def test_packed_weights_serve_replaced_layers():
    model = network().eval()
    ours.replace_layers(model)
    x = images(channels=3, size=(16, 16))
    with torch.no_grad():
        expected = model(x)
        with ops.prepack(model):
            assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
            from ncsn_fast.ops import packing

            assert len(packing._of_thread.kept.packed) >= 3


def test_style_transfer_is_the_same_network_with_our_layers():
    plain, model = style_transfer.pair(width=8)
    assert list(plain.state_dict()) == list(model.state_dict())
    x, style = style_transfer.images(2, 32)
    with record_backends() as ran:
        got = with_gradients(model, x, style)
    assert {"conv3x3", "cond_instance_norm_elu"} <= {
        op for op, backend in ran if backend == "native"
    }
    expected = with_gradients(plain.double(), x.double(), style)
    convolutions = {name: float("inf") for name in expected if name.endswith("conv.bias")}
    assert_same(got, expected, least=1e-3, y=1e-5, **convolutions)
    with use_backend("reference"), record_backends() as ran:
        model(x, style)
    assert not ran
