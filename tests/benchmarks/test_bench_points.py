"""The benchmark of sampling points: every way to do it draws the same points from the same noise."""

from __future__ import annotations

import pytest
import torch

from ncsn_fast.benchmarks.cases import toy_sampling
from ncsn_fast.benchmarks.suite import Settings
from ncsn_fast.ops.tolerances import TOLERANCES, relative_error

F32 = torch.float32
SETTINGS = Settings(torch.device("cpu"), (F32,))
LOOP = toy_sampling.Loop(points=5, levels=3, steps=2)


@pytest.mark.parametrize(
    "peer", list(LOOP.peers(SETTINGS, compiled=False)), ids=lambda peer: peer.name
)
def test_peers_draw_the_same_points(peer):
    prepared = peer.prepare()
    assert (prepared.backend == "pytorch") == (peer.name != "ncsn_fast")
    (expected,), (got,) = LOOP.expected(), prepared.outputs()
    assert relative_error(got, expected) <= 10 * TOLERANCES[F32].forward
    assert relative_error(LOOP.start(), expected) > 1e-2  # the points have moved
    prepared.timed.call()


def test_the_case_is_the_documented_one():
    (case,) = toy_sampling.cases(SETTINGS)
    assert case.shape == (500, 2) and case.setting == "levels=10 steps=100"
    assert case.peers[0].name == "eager" and case.peers[-1].name == "ncsn_fast"
    quick = Settings(SETTINGS.device, (F32,), quick=True)
    assert not list(toy_sampling.cases(quick))
