"""Weights transformed in advance: the same bits, and never a stale one."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from support.cpu import assert_threads_give_the_same_bits
from support.tolerances import relative_error
from torch import nn

from ncsn_fast import NCSN, ops
from ncsn_fast.ops import reference
from ncsn_fast.ops.packing import _panel

PACK = torch.ops.ncsn_fast.conv3x3_pack.default
CONV = torch.ops.ncsn_fast.conv3x3.default
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@pytest.fixture(autouse=True)
def two_threads():
    """Which share the one panel of these layers, so that it is packed before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def layer(channels=18, outputs=5):
    torch.manual_seed(0)
    return nn.Conv2d(channels, outputs, 3, padding=1)


def picture(channels=18):
    x = torch.randn(2, channels, 8, 9, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def call(conv, x):
    with torch.no_grad():
        return ops.conv3x3(x, conv.weight, conv.bias)


@LAYOUTS
@pytest.mark.parametrize("shape", [(5, 18), (40, 3), (32, 33), (70, 128)], ids=str)
def test_packed_weights_are_those_of_the_formula(shape, layout):
    weight = torch.randn(*shape, 3, 3).contiguous(memory_format=layout)
    packed = PACK(weight, _panel())
    assert relative_error(packed, reference.conv3x3_pack(weight.double(), _panel())) < 2e-7
    x = picture(shape[1])
    kept = CONV(x, weight, None, None, 1, False, False, packed)
    assert torch.equal(kept, CONV(x, weight, None, None, 1, False, False))


@LAYOUTS
@pytest.mark.parametrize("size", [4, 8, 32], ids=str)
@pytest.mark.parametrize("outputs", [32, 128, 150], ids=str)
def test_whoever_packs_a_panel_the_bits_are_the_same(outputs, size, layout):
    """Few tiles: who multiplies by a panel packs it; more, or panels that do not divide: all are packed before."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, 40, 3, 3).contiguous(memory_format=layout)
    x = torch.randn(5, 40, size, size).contiguous(memory_format=torch.channels_last)
    kept = CONV(x, weight, None, None, 1, False, True, PACK(weight, _panel()))

    def every_batch():
        return [CONV(x[:n], weight, None, None, 1, False, True) for n in (1, 2, 5)]

    for y in assert_threads_give_the_same_bits(every_batch):
        assert torch.equal(y, kept[: len(y)])


def packs_of(record_backends, function):
    with record_backends() as ran:
        y = function()
    return y, ran.count(("conv3x3_pack", "native"))


def test_packed_once(record_backends):
    conv, x = layer(), picture()
    expected = call(conv, x)
    with ops.prepack(conv):
        for count in (1, 0, 0):
            y, packs = packs_of(record_backends, lambda: call(conv, x))
            assert packs == count and torch.equal(y, expected)
        ops.forget_packed()
        assert packs_of(record_backends, lambda: call(conv, x))[1] == 1
    assert packs_of(record_backends, lambda: call(conv, x))[1] == 0


def test_of_few_tiles_nothing_is_kept(record_backends):
    conv, x = layer(16, 64), picture(16)  # two panels or more: each thread packs its own
    expected = call(conv, x)
    with ops.prepack(conv):
        y, packs = packs_of(record_backends, lambda: call(conv, x))
        assert packs == 0 and torch.equal(y, expected)
        many = torch.randn(200, 16, 8, 9)
        assert packs_of(record_backends, lambda: call(conv, many))[1] == 1


def in_place(conv, new):
    with torch.no_grad():
        conv.weight.copy_(new.weight)


def through_a_view(conv, new):
    with torch.no_grad():
        conv.weight.view(-1)[:9].copy_(new.weight.view(-1)[:9])


def through_detach(conv, new):
    conv.weight.detach().copy_(new.weight.detach())


def by_optimizer(conv, new):
    conv.weight.grad = torch.ones_like(conv.weight)
    torch.optim.SGD([conv.weight], lr=0.1).step()


def by_loading(conv, new):
    conv.load_state_dict(new.state_dict())


def by_loading_assigned(conv, new):
    conv.load_state_dict(new.state_dict(), assign=True)


def by_data(conv, new):
    conv.weight.data = new.weight.data


def by_parameter(conv, new):
    conv.weight = new.weight


def by_set(conv, new):
    with torch.no_grad():
        conv.weight.set_(new.weight.detach().clone())


def by_swap(conv, new):
    torch.utils.swap_tensors(conv.weight, new.weight)


def by_layout(conv, new):
    conv.to(memory_format=torch.channels_last)
    with torch.no_grad():
        conv.weight.copy_(new.weight)


def by_forgetting(conv, new):
    conv.weight.data.copy_(new.weight.data)
    ops.forget_packed()


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        through_a_view,
        through_detach,
        by_optimizer,
        by_loading,
        by_loading_assigned,
        by_data,
        by_parameter,
        by_set,
        by_swap,
        by_layout,
        by_forgetting,
    ],
    ids=lambda f: f.__name__,
)
def test_a_changed_weight_is_seen(change):
    conv, x = layer(), picture()
    new = copy.deepcopy(conv)
    with torch.no_grad():
        new.weight.mul_(-2)
    with ops.prepack(conv):
        before = call(conv, x)
        change(conv, new)
        after = call(conv, x)
    assert torch.equal(after, call(conv, x)) and not torch.equal(after, before)


def test_memory_that_another_tensor_took():
    """A weight that is gone leaves its address to others."""
    conv, x = layer(), picture()
    with ops.prepack(conv):
        call(conv, x)
        for seed in range(8):
            torch.manual_seed(seed)
            conv.weight = nn.Parameter(torch.randn_like(conv.weight))
            expected = CONV(x, conv.weight.detach(), conv.bias.detach(), None, 1, False, False)
            assert torch.equal(call(conv, x), expected)


def test_what_is_not_kept(record_backends):
    conv, other, x = layer(), layer(), picture()

    def with_gradients():
        return ops.conv3x3(x, conv.weight, conv.bias)

    with ops.prepack(conv):
        assert packs_of(record_backends, lambda: call(other, x))[1] == 0
        assert packs_of(record_backends, with_gradients)[1] == 0
    with ops.prepack(conv, limit=4 * conv.weight.nbytes - 1):
        assert packs_of(record_backends, lambda: call(conv, x))[1] == 0
    counts = []
    with ops.prepack(conv):
        thread = threading.Thread(
            target=lambda: counts.append(packs_of(record_backends, lambda: call(conv, x))[1])
        )
        thread.start()
        thread.join()
    assert counts == [0]
    with torch.inference_mode():
        conv = layer()
        with ops.prepack(conv):
            assert packs_of(record_backends, lambda: call(conv, x))[1] == 0


def test_blocks_within_blocks_and_errors(record_backends):
    conv, other, x = layer(), layer(), picture()
    with ops.prepack(conv):
        call(conv, x)
        with pytest.raises(KeyError), ops.prepack(other):
            assert packs_of(record_backends, lambda: call(conv, x))[1] == 0
            raise KeyError
        assert packs_of(record_backends, lambda: call(conv, x))[1] == 0  # still kept


def test_bad_packed_weights():
    weight, x = torch.randn(5, 18, 3, 3), picture()
    packed = PACK(weight, _panel())
    for wrong in (packed[:, :35], packed.double(), packed[:, :, 1:], packed.flatten()):
        with pytest.raises(RuntimeError, match="packed must be what conv3x3_pack made"):
            CONV(x, weight, None, None, 1, False, False, wrong)
    with pytest.raises(RuntimeError, match="not those of the gradient"):
        CONV(torch.randn(1, 5, 4, 4).contiguous(memory_format=torch.channels_last), weight, None,
             None, 1, True, False, packed)  # fmt: skip
    with pytest.raises(RuntimeError, match="panel must be"):
        PACK(weight, _panel() + 1)
    torch.library.opcheck(PACK, (weight, _panel()))


def test_a_network_samples_with_kept_weights(record_backends):
    model = NCSN(in_channels=1, nf=16, num_classes=2)
    model.set_sigmas(NCSN.make_sigmas(1.0, 0.1, 2))
    options = {"n_steps_each": 2, "step_lr": 1e-3, "seed": 3, "verbose": False}
    images, packs = packs_of(record_backends, lambda: model.sample(1, 12, **options))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert 40 < packs <= len(layers)  # each once, though there are four passes

    def change(level, x):
        if level == 0:
            for conv in layers:
                conv.weight.data.mul_(1.5)  # which no version tells

    changed = model.sample(1, 12, callback=change, **options)
    for conv in layers:
        conv.weight.data.div_(1.5)
    with ops.use_backend("reference"):
        expected = model.sample(1, 12, callback=change, **options)
    torch.testing.assert_close(changed, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(changed, images, rtol=1e-2, atol=1e-2)
