"""The network as sums handed to their norms, beside its layers one after the other."""

from __future__ import annotations

import pytest
import torch

from ncsn_fast import NCSN, ops
from ncsn_fast.models import sums
from ncsn_fast.models.layers import MultiResFusion


def network(norm: str = "instance") -> NCSN:
    torch.manual_seed(0)
    model = NCSN(in_channels=2, nf=3, num_classes=3, dilations=(1, 2, 1, 2), norm=norm)
    model.set_sigmas(torch.tensor([1.0, 0.5, 0.1]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def both_ways(model, monkeypatch):
    """Results and gradients, the layers' first."""
    x, y = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    for joined in (False, True):
        monkeypatch.setattr(ops, "joins_sums", lambda x, joined=joined: joined)
        model.zero_grad()
        result = model(x, y)
        result.square().sum().backward()
        yield result.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("norm", ["instance", "instance++"])
def test_the_same_score_and_gradients(norm, monkeypatch):
    model = network(norm)
    (expected, gradients), (got, others) = both_ways(model, monkeypatch)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(others, gradients, rtol=1e-6, atol=1e-6)


def test_biases_that_cancel_are_not_added(monkeypatch):
    """30 of them; each sum comes with the norm that follows, but for those that two blocks read."""
    seen = []
    call = ops.conv3x3_norm_elu

    def watched(x, weight, bias, *rest, keep, **options):
        seen.append((keep, options["residual"] is not None))
        return call(x, weight, bias, *rest, keep=keep, **options)

    monkeypatch.setattr(ops, "joins_sums", lambda x: True)
    monkeypatch.setattr(ops, "conv3x3_norm_elu", watched)
    network()(torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.tensor([1]))
    assert seen.count((False, False)) == 30
    # Besides, the first convolution, 30 units, 3 fusions and the links of 4 chains.
    assert len(seen) == 30 + 1 + 30 + 3 + 4 * 4


def test_layers_that_are_no_longer_plain_are_called(monkeypatch):
    model = network()
    model.eval()
    called = []
    blocks = (model.stage2, model.refine3, model.refine2.crp, model.stage1.units[1])
    layers = (model.stage3.units[0].norm2, model.refine1.crp.convs[1], model.refine2.msf.norms[0])
    for block in (*blocks, *layers):
        block.register_forward_hook(lambda module, args, out: called.append((module, type(out))))
    (expected, _), (got, _) = both_ways(model, monkeypatch)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert all(called.count((block, torch.Tensor)) == 2 for block in (*blocks, *layers))
    assert len(called) == 2 * 7


def test_fusion_of_two_sizes():
    torch.manual_seed(0)
    fusion = MultiResFusion([3, 3], 3, 2).double()
    xs = [torch.randn(1, 3, size, size, dtype=torch.float64) for size in (4, 8)]
    y = torch.tensor([1])
    got = sums.carry(fusion, [sums.Sum(x) for x in xs], y).tensor()
    torch.testing.assert_close(got, fusion(xs, y))


def test_a_cpu_keeps_its_engine():
    assert not ops.joins_sums(torch.zeros(1, 2, 4, 4))
    with ops.use_backend("native"):
        assert not ops.joins_sums(torch.zeros(1, 2, 4, 4))
