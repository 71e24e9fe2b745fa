"""The sampler "auto": what it chooses, says and refuses, and that it draws what its choice draws."""

from __future__ import annotations

import pytest
import torch

from ncsn_fast import NCSN, ScoreMLP
from ncsn_fast.sampling import auto
from ncsn_fast.sampling.samplers import FEW_PASSES, check_options

LADDER = [5.0 * 0.8**i for i in range(20)]
TUNED = {"sampler": "heun", "passes": 7, "levels": "karras"}


def ncsn():
    torch.manual_seed(0)
    return NCSN(in_channels=1, nf=4, num_classes=20, sigmas=LADDER).eval()


def mlp():
    torch.manual_seed(0)
    return ScoreMLP(2, (8,), sigmas=LADDER).eval()


@pytest.mark.parametrize("n_levels", [1, 10, 40, None])
def test_every_choice_can_be_drawn_within_its_passes(n_levels):
    for passes in (1, 2, 5, 10, 19, 20, 25, 39, 100):
        options = auto.choose(passes, n_levels)
        sampler = options.pop("sampler")
        assert sampler in FEW_PASSES
        check_options(sampler, options)
        assert 1 <= options["passes"] <= passes
        if n_levels is not None:
            assert options["passes"] == min(passes, n_levels)


@pytest.mark.parametrize("passes", [1, 10, 20, 25, 45])
@pytest.mark.parametrize("make", [ncsn, mlp])
def test_it_draws_what_it_chose(make, passes, capsys):
    model, calls = make(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    size = (4,) if make is ncsn else ()
    options = auto.choose(passes, 20 if make is ncsn else None)
    expected = model.sample(2, *size, seed=0, verbose=False, **options)
    calls.clear()
    x = model.sample(2, *size, sampler="auto", passes=passes, seed=0, verbose=True)
    assert torch.equal(x, expected)
    assert len(calls) == (min(passes, 20) if make is ncsn else passes)
    said = capsys.readouterr().err
    assert f"sampler auto: {options['sampler']}, " in said
    assert f"passes {options['passes']}" in said


def test_without_a_number_it_takes_ten():
    model, calls = mlp(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.sample(2, sampler="auto", seed=0)
    assert len(calls) == auto.PASSES == 10


def test_what_was_tuned_goes_first(tmp_path):
    model = mlp()
    model.tuned = TUNED
    expected = model.sample(2, seed=0, **TUNED)
    assert torch.equal(model.sample(2, sampler="auto", passes=7, seed=0), expected)
    assert torch.equal(model.sample(2, sampler="auto", seed=0), expected)
    other = model.sample(2, seed=0, **auto.choose(8))
    assert torch.equal(model.sample(2, sampler="auto", passes=8, seed=0), other)
    assert torch.equal(mlp().sample(2, sampler="auto", passes=8, seed=0), other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"passes": 0}, ValueError, "passes must be an int >= 1, got 0"),
        ({"passes": 2.5}, TypeError, "passes must be an int"),
        ({"levels": "karras"}, ValueError, "'auto' takes passes and chooses the rest, got levels"),
        ({"step_lr": 0.1}, ValueError, "'auto' takes passes and chooses the rest, got step_lr"),
        ({"colour": 1}, TypeError, "no sampler takes an option 'colour'"),
        ({"n_steps_each": 3}, ValueError, "'auto' goes once down the levels: it takes passes"),
        ({"denoise": False}, ValueError, "'auto' always ends at the expected clean sample"),
    ],
)
def test_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        mlp().sample(2, sampler="auto", seed=0, **options)
