"""Ladders and step sizes suggested from data: the published figures, and what the words of the formulas say."""

from __future__ import annotations

import math

import pytest
import torch

from ncsn_fast.schedules import (
    estimate_sigma_begin,
    make_sigmas,
    suggest_num_scales,
    suggest_step_lr,
)


# Of the paper's table of settings: sigma_begin, levels, steps a level; and the step size, where 6.2e-6 is printed.
@pytest.mark.parametrize(
    ("sigma_begin", "levels", "steps", "expected"),
    [
        (50, 232, 5, 6.18e-6),
        (90, 500, 5, 3.34e-6),
        (190, 1086, 3, 1.77e-6),
        (348, 2311, 3, 8.93e-7),
    ],
)
def test_technique_4(sigma_begin, levels, steps, expected):
    sigmas = make_sigmas(sigma_begin, 0.01, levels)
    assert float(f"{suggest_step_lr(sigmas, steps):.3g}") == expected
    assert suggest_step_lr(sigmas.tolist(), steps) == suggest_step_lr(sigmas, steps)


@pytest.mark.parametrize(
    ("sigma_begin", "levels", "side"),
    [(50, 232, 32), (90, 500, 64), (190, 1086, 128), (348, 2311, 256)],
)
def test_technique_2(sigma_begin, levels, side):
    dim = 3 * side**2
    assert abs(suggest_num_scales(dim, sigma_begin, 0.01, c=0.567) - levels) <= 1
    assert suggest_num_scales(dim, sigma_begin, 0.01) < levels
    assert suggest_num_scales(3072, 50, 0.01) == 219


def test_technique_2_in_few_dimensions():
    assert suggest_num_scales(2, 10, 0.01) >= 2
    assert suggest_num_scales(1, 1.1, 1) == 2
    assert suggest_num_scales(64, 10, 0.01, c=0.9) > suggest_num_scales(64, 10, 0.01, c=0.1)


def test_technique_4_by_simulation():
    """The variance that chains on data at one point end a level with is the formula's, and least at the suggestion."""
    sigmas, steps = make_sigmas(1.0, 0.3, 4).tolist(), 3

    def last_variance(step_lr):
        variance = sigmas[0] ** 2
        for sigma in sigmas:
            eta = step_lr * (sigma / sigmas[-1]) ** 2
            for _ in range(steps):
                variance = (1 - eta / sigma**2) ** 2 * variance + 2 * eta
            scaled = variance / sigma**2
            variance = sigma**2  # each level begins with the noise of the one before
        return scaled

    best = suggest_step_lr(sigmas, steps)
    assert 0 < best < sigmas[-1] ** 2
    assert last_variance(best) < min(last_variance(0.9 * best), last_variance(1.1 * best))


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_technique_1(block):
    data = torch.randn(10, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    data[7] += 5
    expected = max(float((a - b).norm()) for a in data for b in data)
    assert estimate_sigma_begin(data, block=block) == pytest.approx(expected, rel=1e-5)
    assert estimate_sigma_begin(torch.tensor([[0.0], [3.0]], dtype=torch.float64)) == 3


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (estimate_sigma_begin, (torch.zeros(1, 2),), "at least two different images"),
        (estimate_sigma_begin, (torch.ones(5, 2),), "at least two different images"),
        (estimate_sigma_begin, (torch.tensor([[0.0], [math.nan]]),), "not finite"),
        (suggest_num_scales, (0, 10, 1), "dim must be an int >= 1"),
        (suggest_num_scales, (4, 1, 10), "sigma_begin must be greater than sigma_end"),
        (suggest_num_scales, (4, 10, 1, 0.0), "c must be positive"),
        (suggest_num_scales, (4, 10, 1, 1.0), "c must be less than 0.9973"),
        (suggest_step_lr, ([1.0], 5), "at least 2 levels"),
        (suggest_step_lr, ([1.0, 2.0], 5), "strictly descending"),
        (suggest_step_lr, ([2.0, 1.0], 0), "n_steps_each must be an int >= 1"),
    ],
)
def test_mistakes(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
