"""Tools that work through modules act as in plain PyTorch: hooks, wrappers, replaced layers; the rest stays fused."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from ncsn_fast import NCSN, NCSNConfig, ScoreMLP, ops, use_backend
from ncsn_fast.models import layers
from ncsn_fast.models import plain as plain_layers
from ncsn_fast.ops.record import record_backends
from ncsn_fast.ops.tolerances import relative_error
from ncsn_fast.schedules import make_sigmas

ALL = "all"
LABELS = torch.tensor([0, 2])


def network(**config) -> NCSN:
    torch.manual_seed(0)
    sigmas = make_sigmas(1.0, 0.1, 3)
    model = NCSN(NCSNConfig(in_channels=2, nf=8, num_classes=3, sigmas=sigmas, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "embed" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def plain(model: NCSN, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same network with every layer called, one after the other, in plain PyTorch."""

    def norm(module, h):
        if type(module) is not layers.CondInstanceNorm or any(module._forward_hooks):
            return module(h, y)
        gamma, beta = module.embed(y)[:, :, None, None].chunk(2, 1)
        return gamma * F.instance_norm(h, eps=module.eps) + beta

    def unit(of, conv, h, pool=False):
        h = F.elu(norm(of, h))
        return conv(F.max_pool2d(h, 5, 1, 2) if pool else h)

    def rcus(block, h):
        for part in block.units:
            h = h + unit(part.norm2, part.conv2, unit(part.norm1, part.conv1, h))
        return h

    def refine(block, hs):
        hs = [rcus(rcu, h) for rcu, h in zip(block.rcu_in, hs, strict=True)]
        if len(hs) > 1:
            parts = zip(block.msf.norms, block.msf.convs, hs, strict=True)
            hs = [sum(unit(of, conv, h) for of, conv, h in parts)]
        h = out = hs[0]
        for of, conv in zip(block.crp.norms, block.crp.convs, strict=True):
            h = unit(of, conv, h, pool=True)
            out = out + h
        return rcus(block.rcu_out, out)

    h = model.begin_conv(x)
    h1 = rcus(model.stage1, h)
    h2 = rcus(model.stage2, h1)
    h3 = rcus(model.stage3, h2)
    r = refine(model.refine4, [rcus(model.stage4, h3)])
    r = refine(model.refine3, [h3, r])
    r = refine(model.refine2, [h2, r])
    r = refine(model.refine1, [h1, r])
    return unit(model.end_norm, model.end_conv, r) / model.sigmas[y].view(-1, 1, 1, 1)


def called_by(model: NCSN):
    return lambda x, y: plain(model, x, y)


class Doubled(nn.Module):
    """A wrapper that holds the layer, as adapters and sharding tools have."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def replace_forward(model):
    layer = model.stage2.units[0].conv1.conv
    forward = layer.forward
    layer.forward = lambda x: -forward(x)


def circular(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [p for p in module.padding for _ in "12"]


def grouped(model):
    old = model.refine1.crp.convs[1]
    model.refine1.crp.convs[1] = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    assert old.groups == 1


def of_another_size(model):
    model.refine2.msf.convs[0] = nn.Conv2d(8, 8, 5, padding=2)


def subclass(model):
    layer = Scaled(8, 8, 3, padding=1)
    model.refine3.rcu_out.units[1].conv2.conv = layer


def hook_output(model):
    model.stage1.units[0].conv1.conv.register_forward_hook(lambda m, i, o: o + 1)


def hook_input(model):
    model.begin_conv.register_forward_pre_hook(lambda m, i: (i[0] * 2,))


def hook_the_outer_layer(model):
    model.stage1.units[1].conv2.register_forward_hook(lambda m, i, o: o * 3)


def hook_norm(model):
    model.stage3.units[0].norm1.register_forward_hook(lambda m, i, o: o + 0.5)


def hook_table(model):
    model.stage3.units[0].norm1.embed.register_forward_hook(lambda m, i, o: o * 1.5)


def wrap(model):
    model.end_conv = Doubled(model.end_conv)


def padding_index(model):
    """An embedding that gives no gradient to a row."""
    model.end_norm.embed.padding_idx = 0


CHANGES = {
    "nothing": lambda model: None,
    "old spectral_norm": lambda model: spectral_norm(model.begin_conv),
    "old weight_norm": lambda model: weight_norm(model.stage1.units[0].conv1.conv),
    "new spectral_norm": lambda model: parametrizations.spectral_norm(model.begin_conv),
    "new weight_norm": lambda model: parametrizations.weight_norm(model.end_conv),
    "pruning": lambda model: prune.l1_unstructured(model.stage2.units[1].conv1.conv, "weight", 0.3),
    "parametrization": lambda model: parametrize.register_parametrization(
        model.stage1.units[0].conv2.conv, "weight", Half()
    ),
    "replaced forward": replace_forward,
    "circular padding": circular,
    "groups": grouped,
    "another kernel": of_another_size,
    "subclass": subclass,
    "forward hook": hook_output,
    "forward pre-hook": hook_input,
    "hook of DilatedConv": hook_the_outer_layer,
    "hook of a norm": hook_norm,
    "hook of an embedding": hook_table,
    "wrapper": wrap,
    "padding_idx": padding_index,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layer_acts_as_in_plain_pytorch(name):
    """Value and every gradient, for two steps of training: some tools work anew at each forward."""
    models = []
    for _ in range(2):
        models.append(network())  # the same each time, changed by the same random numbers
        CHANGES[name](models[-1])
        models[-1].eval()  # spectral norm's power iteration would go on in between
    with torch.no_grad():
        got, expected = (call(images(), LABELS) for call in (models[0], called_by(models[1])))
    assert relative_error(got, expected.double()) < 5e-3  # float32, amplified by 82 layers
    x = images().double()
    models = [model.double() for model in models]
    for _ in range(2):
        grads = []
        for model, call in zip(models, (models[0], called_by(models[1])), strict=True):
            model.zero_grad()
            y = call(x, LABELS)
            y.square().mean().backward()
            grads.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            torch.optim.SGD(model.parameters(), lr=1e-4).step()
        assert len(grads[0]) == len(grads[1])
        largest = max(float(grad.norm()) for grad in grads[1])
        for a, b in zip(*grads, strict=True):
            assert (a - b).norm() <= 1e-8 * largest


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("nothing", 0),
        ("parametrization", 0),
        ("new weight_norm", 0),
        ("forward hook", 1),
        ("hook of DilatedConv", 1),
        ("wrapper", 1),
        ("circular padding", ALL),
    ],
)
def test_the_other_units_stay_fused(name, called):
    counts = []
    for change in ("nothing", name):
        model = network()
        CHANGES[change](model)
        with record_backends() as ran, torch.no_grad():
            model(images(), LABELS)
        counts.append(ran.count(("norm_elu_conv3x3", "native")))
    assert counts[0] > 50
    assert counts[1] == counts[0] - (counts[0] if called == ALL else called)


def test_hooks_see_every_call():
    model, seen = network(), []
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for layer in convolutions:
        layer.register_forward_hook(lambda m, i, o: seen.append((id(m), o.shape)))
    with torch.no_grad():
        model(images(), LABELS)
    idle = {id(m) for m in model.refine4.msf.modules()}
    assert {layer for layer, _ in seen} == {id(m) for m in convolutions} - idle


def test_backward_hooks_see_the_gradient():
    model, seen = network(), []
    layer = model.stage2.units[0].conv1.conv
    layer.register_full_backward_hook(lambda m, gi, go: seen.append(("after", go[0].shape)))
    layer.register_full_backward_pre_hook(lambda m, go: seen.append(("before", go[0].shape)))
    model(images(), LABELS).sum().backward()
    assert seen == [("before", (2, 8, 8, 8)), ("after", (2, 8, 8, 8))]


def test_global_hooks_see_every_layer():
    from torch.nn.modules.module import register_module_forward_hook

    model, seen = network(), set()
    handle = register_module_forward_hook(lambda m, i, o: seen.add(type(m).__name__))
    try:
        with torch.no_grad():
            model(images(), LABELS)
    finally:
        handle.remove()
    assert {"Conv2d", "CondInstanceNorm", "DilatedConv", "Embedding"} <= seen


def test_a_hook_taken_away_gives_the_fused_unit_back():
    model = network()
    with torch.no_grad():
        expected = model(images(), LABELS)
        handle = model.begin_conv.register_forward_hook(lambda m, i, o: o * 0)
        assert not torch.equal(model(images(), LABELS), expected)
        handle.remove()
        assert torch.equal(model(images(), LABELS), expected)


def test_a_layer_that_was_compiled_for_a_while_is_plain_again():
    """As after training with ``torch.compile(model)``."""
    layer = nn.Linear(2, 2)
    layer._compiled_call_impl = lambda x: x
    assert plain_layers.why_not_plain(layer, nn.Linear) == "it was compiled by itself"
    layer._compiled_call_impl = None
    assert plain_layers.why_not_plain(layer, nn.Linear) is None


def test_a_debug_log_says_why_once(caplog, monkeypatch):
    monkeypatch.setattr(plain_layers, "_told", set())
    model = network()
    hook_output(model)
    with caplog.at_level(logging.DEBUG, logger="ncsn_fast"), torch.no_grad():
        model(images(), LABELS)
        model(images(), LABELS)
    why = "is called, not computed by a fused operator: it has forward hooks"
    assert [r.getMessage() for r in caplog.records] == [f"DilatedConv {why}", f"Conv2d {why}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward hook", "parametrization"])
def test_one_graph(name):
    model = network().eval()
    CHANGES[name](model)
    with torch.no_grad():
        expected = model(images(), LABELS)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images(), LABELS), expected, rtol=1e-4, atol=1e-4)


def test_lora_by_peft_acts_and_learns():
    peft = pytest.importorskip("peft")
    model = network()
    base = model(images(), LABELS).detach()
    targets = ["stage1.units.0.conv1.conv", "begin_conv", "end_conv"]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    y = adapted(images(), LABELS)
    assert (y - base).abs().max() > 1e-3
    y.square().mean().backward()
    lora = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(lora) == 2 * len(targets)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.values())
    expected = plain(adapted.base_model.model, images(), LABELS)
    assert relative_error(y, expected.double()) < 1e-3
    # Merged into the weights it is the same network, on the fused operators again.
    merged = adapted.merge_and_unload()
    assert relative_error(merged(images(), LABELS), y.double()) < 1e-3


def test_points_call_layers_that_are_not_plain():
    model = ScoreMLP(sigmas=make_sigmas(1.0, 0.1, 3), hidden=(8, 8))
    nn.init.normal_(model.last.weight)
    calls = []
    before = model.sample(3, n_steps_each=1, seed=0)
    model.layers[0].register_forward_hook(lambda m, i, o: calls.append(1))
    torch.testing.assert_close(model.sample(3, n_steps_each=1, seed=0), before)
    assert len(calls) == 3
    model.layers[0].register_forward_hook(lambda m, i, o: o + 1)
    assert not torch.allclose(model.sample(3, n_steps_each=1, seed=0), before)


def test_a_layer_alone_calls_what_it_holds():
    unit = layers.DilatedConv(4)
    x = torch.randn(1, 4, 6, 6)
    expected = F.conv2d(x, unit.conv.weight, unit.conv.bias, padding=1)
    torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-5)
    with use_backend("reference"), record_backends() as ran:
        torch.testing.assert_close(unit(x), expected)
    assert ran == []
    assert ops.conv3x3(x, unit.conv.weight, unit.conv.bias).shape == x.shape
