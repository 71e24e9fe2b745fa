"""A sample has the same bits whatever its batch, its number in it, the layout and the number of threads.

On one processor. In the most chaotic setting: an untrained network with the documented ladder, whose first steps
amplify the last bit of a rounding to whole digits.
"""

from __future__ import annotations

import pytest
import torch
from support.cpu import assert_threads_give_the_same_bits

from ncsn_fast import NCSN
from ncsn_fast.models.official import NCSNv2, OfficialNCSN
from ncsn_fast.ops import extension
from ncsn_fast.sampling.samplers import SAMPLERS

pytestmark = pytest.mark.skipif(
    extension.status("cpu") is not None, reason="the C++ kernels are not built"
)
LAST = torch.channels_last


def documented(**options) -> NCSN:
    torch.manual_seed(0)
    model = NCSN(num_classes=10, **options)
    model.set_sigmas(NCSN.make_sigmas(50.0, 0.01, 10))
    return model


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"in_channels": 3, "nf": 8}, (12, 9)),
        ({"in_channels": 1, "nf": 16}, (16, 16)),
        ({"in_channels": 3, "nf": 16, "norm": "instance++", "pool_padding": "zero"}, (7, 13)),
        ({"in_channels": 2, "nf": 20, "dilations": (1, 8, 3, 2)}, (5, 4)),
    ],
    ids=str,
)
def test_the_network(options, size):
    model = documented(**options).eval()
    x = torch.randn(5, options["in_channels"], *size)
    labels = torch.tensor([0, 9, 3, 3, 1])
    with torch.no_grad():
        (whole,) = assert_threads_give_the_same_bits(lambda: [model(x, labels)], (1, 2, 3))
        for first, last in ((0, 1), (2, 3), (4, 5), (1, 4)):
            assert torch.equal(model(x[first:last], labels[first:last]), whole[first:last])
        assert torch.equal(model(x.contiguous(memory_format=LAST), labels), whole)
        model.to(memory_format=LAST)
        assert torch.equal(model(x, labels), whole)
        alone = model(x[4:].contiguous(memory_format=LAST), labels[4:])
        assert torch.equal(alone[0], whole[4])
    assert torch.equal(model(x, labels).detach(), whole)  # with gradients


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ode"])
def test_the_samplers(sampler):
    model = documented(in_channels=3, nf=8)
    steps = {} if sampler not in ("ald", "cas", "pc") else {"n_steps_each": 2}
    options = {"sampler": sampler, "seed": 5, "verbose": False, **steps}

    def draw():
        return [model.sample(3, 8, **options)]

    (batch,) = assert_threads_give_the_same_bits(draw, (1, 2))
    assert batch.isfinite().all() and (batch[0] - batch[1]).abs().max() > 0.01
    for i in (0, 2):
        assert torch.equal(model.sample(1, 8, sample_offset=i, **options)[0], batch[i])
    model.to(memory_format=LAST)
    assert torch.equal(model.sample(2, 8, **options), batch[:2])


def test_the_default_network():
    model = documented()
    options = {"n_steps_each": 1, "step_lr": 2e-5, "seed": 5, "verbose": False}
    batch = model.sample(3, 12, **options)
    assert torch.equal(model.sample(1, 12, **options)[0], batch[0])
    assert torch.equal(model.sample(1, 12, sample_offset=2, **options)[0], batch[2])


@pytest.mark.parametrize("kind", [OfficialNCSN, NCSNv2], ids=lambda kind: kind.__name__)
def test_the_networks_of_the_authors(kind):
    torch.manual_seed(0)
    sigmas = NCSN.make_sigmas(50.0, 0.01, 10)
    model = kind(in_channels=3, nf=8, num_classes=10, sigmas=sigmas).eval()
    x, labels = torch.rand(4, 3, 20, 12), torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        (whole,) = assert_threads_give_the_same_bits(lambda: [model(x, labels)], (1, 2, 3))
        for i in (0, 3):
            assert torch.equal(model(x[i : i + 1], labels[i : i + 1])[0], whole[i])
