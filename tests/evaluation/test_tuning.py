"""Tuning: the candidates, what is chosen by and what is reported, and the order of the result."""

from __future__ import annotations

import pytest
import torch

from ncsn_fast import NCSN, ScoreCNN
from ncsn_fast.evaluation import tuning
from ncsn_fast.sampling import auto
from ncsn_fast.sampling.samplers import FEW_PASSES, check_options

LADDER = [3.0 * 0.8**i for i in range(12)]


def images(n, seed=0, level=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (level + 0.3 * torch.randn(n, 1, 4, 4, generator=generator)).clamp(-1, 1)


def network():
    torch.manual_seed(0)
    return NCSN(in_channels=1, nf=4, num_classes=12, sigmas=LADDER).eval()


@pytest.mark.parametrize("n_levels", [3, 10, 40, None])
@pytest.mark.parametrize("passes", [1, 2, 10, 25])
def test_candidates_differ_and_keep_to_the_passes(passes, n_levels):
    found = tuning.candidates(passes, n_levels)
    assert found[0] == auto.choose(passes, n_levels)
    assert all(options not in found[:i] for i, options in enumerate(found))
    for options in found:
        assert 1 <= options["passes"] <= passes and options["sampler"] in FEW_PASSES
        check_options(options["sampler"], {k: v for k, v in options.items() if k != "sampler"})
    if passes >= 10:
        assert {options["sampler"] for options in found} == set(FEW_PASSES)


@pytest.mark.parametrize("passes", [4, 30])
@pytest.mark.parametrize("make", [network, lambda: ScoreCNN(1, 8, 4, sigmas=LADDER).eval()])
def test_every_candidate_can_be_drawn(make, passes):
    model, calls = make(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    n_levels = None if "sigma" in model.scores() else len(LADDER)
    for options in tuning.candidates(passes, n_levels):
        calls.clear()
        samples = tuning.draw(model, options, (4, 4), 3, seed=0)
        assert samples.shape == (3, 1, 4, 4) and samples.abs().max() <= 1
        assert 1 <= len(calls) <= passes


def test_distances():
    near, far = images(300), images(300, seed=1, level=0.5)
    distances = tuning.Distances(near, far)
    to_near, to_far = distances(images(300, seed=2))
    assert to_near < 0.2 and to_far == pytest.approx(distances.real, rel=0.2)
    assert distances.real > 2 and distances.noise > distances.real
    with pytest.raises(ValueError, match=r"two reported images at least.*got \(1, 1, 4, 4\)"):
        tuning.Distances(near, far[:1])
    with pytest.raises(ValueError, match="of one shape"):
        tuning.Distances(near, far[..., :3])


def test_the_choice_is_nearest_to_the_tuning_images(monkeypatch):
    """By the mean over the seeds; the reported images have no say."""
    tried = [{"sampler": name, "passes": 3} for name in FEW_PASSES]
    monkeypatch.setattr(tuning, "candidates", lambda *_: tried)
    drawn = []

    def draw(model, options, size, n, *, seed, batch):
        drawn.append((options["sampler"], seed))
        return FEW_PASSES.index(options["sampler"]), seed

    def distances(samples):
        which, seed = samples
        return abs(which - 2) + seed * (which == 2), -which

    monkeypatch.setattr(tuning, "draw", draw)
    found = tuning.tune(network(), distances, (4, 4), 3, seeds=(0, 3))
    assert len(drawn) == len(FEW_PASSES) + tuning.KEPT
    # Of the nearest with the first seed, number 2, the second seed is bad: 1.5 in the mean.
    places = [FEW_PASSES.index(one.options["sampler"]) for one in found]
    assert places[:2] == [1, 3] and places[2] == 2
    assert [len(one.tuning) for one in found] == [2] * 4 + [1]
    assert found[2].mean == 1.5 and found[2].reported == (-2, -2)
