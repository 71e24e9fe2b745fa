"""Points in the plane: where they lie, and exact scores that are the slopes of exact densities."""

from __future__ import annotations

import math

import pytest
import torch

from ncsn_fast import data
from ncsn_fast.data import Checkerboard, GaussianMixture, eight_gaussians, two_gaussians

CURVES = [data.two_moons, data.spirals, data.swiss_roll]


@pytest.mark.parametrize(
    "draw", [Checkerboard().sample, two_gaussians().sample, eight_gaussians().sample, *CURVES]
)
def test_point_i_is_the_same_whatever_the_number(draw):
    x = draw(50, seed=3)
    assert x.shape == (50, 2) and x.dtype == torch.float32 and x.isfinite().all()
    assert torch.equal(draw(20, seed=3), x[:20])
    assert not torch.equal(draw(50, seed=4), x)
    assert x.abs().max() < 6
    with pytest.raises(ValueError, match="n must be an int >= 1, got 0"):
        draw(0)


@pytest.mark.parametrize("mixture", [two_gaussians(), eight_gaussians()])
@pytest.mark.parametrize("sigma", [0.0, 0.3, 4.0])
def test_the_score_of_a_mixture_is_the_slope_of_its_density(mixture, sigma):
    x = (3 * torch.randn(40, 2, dtype=torch.float64)).requires_grad_()
    density = mixture.log_density(x, sigma)
    (slope,) = torch.autograd.grad(density.sum(), x)
    torch.testing.assert_close(mixture.score(x, sigma), slope)
    each = torch.full((40,), sigma, dtype=torch.float64)
    torch.testing.assert_close(mixture.score(x, each), slope)


def test_the_density_of_a_mixture_by_hand():
    mixture, x = two_gaussians(), torch.tensor([[0.5, 1.0]])
    variance = 0.25 + 2.0**2
    squares = (3.5**2 + 1, 2.5**2 + 1)
    each = [math.exp(-square / (2 * variance)) / (2 * math.pi * variance) for square in squares]
    assert mixture.log_density(x, 2.0).item() == pytest.approx(math.log(sum(each) / 2), rel=1e-6)


def test_points_of_a_mixture_are_distributed_as_it():
    mixture = GaussianMixture(means=((-3.0, 0.0), (3.0, 0.0), (0.0, 5.0)), variance=0.25)
    x = mixture.sample(30_000)
    weights = mixture.mode_weights(x)
    assert weights == pytest.approx([1 / 3] * 3, abs=0.01)
    nearest = torch.cdist(x, torch.tensor(mixture.means)).argmin(1)
    for mode, mean in enumerate(mixture.means):
        points = x[nearest == mode]
        torch.testing.assert_close(points.mean(0), torch.tensor(mean), rtol=0, atol=0.03)
        covariance = torch.cov(points.T)
        torch.testing.assert_close(covariance, 0.25 * torch.eye(2), rtol=0, atol=0.015)


@pytest.mark.parametrize("board", [Checkerboard(), Checkerboard(squares=2, width=2.5)])
def test_points_fill_the_dark_squares_evenly(board):
    x = board.sample(20_000)
    assert board.is_dark(x).all()
    half = board.squares // 2
    squares = (x / board.width).floor().long() + half
    counts = torch.bincount(squares[:, 0] * board.squares + squares[:, 1])
    counts = counts[counts > 0]
    assert len(counts) == board.squares**2 // 2
    assert (counts / 20_000 * len(counts) - 1).abs().max() < 0.1
    assert abs((x / board.width % 1).mean() - 0.5) < 0.01


def test_off_the_board_nothing_is_dark():
    x = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [2.5, 0.5], [1.5, -1.5], [1.5, -0.5]])
    expected = [True, False, True, False, False, True]
    assert Checkerboard().is_dark(x).tolist() == expected


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_the_score_of_the_checkerboard_is_that_of_many_squares(sigma):
    """Against the mean over a fine grid of points in the dark squares, each with its Gaussian."""
    line = (torch.arange(400, dtype=torch.float64) + 0.5) / 100 - 2
    centres = torch.cartesian_prod(line, line)
    centres = centres[Checkerboard().is_dark(centres)]
    x = torch.tensor([[0.3, 0.4], [0.01, 0.99], [-1.0, 0.2], [2.05, 0.0]], dtype=torch.float64)
    x = torch.cat([x, x * (1 + sigma)])[:7]
    towards = centres - x.unsqueeze(1)
    weights = (towards.square().sum(2) / (-2 * sigma**2)).softmax(1)
    expected = (weights.unsqueeze(2) * towards).sum(1) / sigma**2
    got = Checkerboard().score(x, sigma)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 / sigma)
    assert Checkerboard().score(x.float(), sigma).dtype == torch.float32


def test_the_curves_are_near_what_they_are_called():
    moons = data.two_moons(1000, noise=0.0)
    on_either = [
        (moons - torch.tensor(centre)).norm(dim=1) for centre in ([-1.0, -0.5], [1.0, 0.5])
    ]
    assert (torch.stack(on_either) - 2).abs().amin(0).max() < 1e-5
    roll = data.swiss_roll(1000, noise=0.0)
    assert roll.norm(dim=1).min() > 1.3 and roll.norm(dim=1).max() <= 4.0001
    arms = data.spirals(1000, noise=0.0)
    assert arms.norm(dim=1).max() <= 4.0001 and abs(arms.mean()) < 0.2
    assert (data.spirals(1000, noise=0.5) - arms).std() == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match="noise must be >= 0"):
        data.spirals(3, noise=-1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Checkerboard(squares=3), "even number, got 3"),
        (lambda: Checkerboard(width=0.0), "width must be positive"),
        (lambda: GaussianMixture((), 1.0), "at least one point"),
        (lambda: GaussianMixture(((0.0,), (0.0, 1.0)), 1.0), "all of one length"),
        (lambda: GaussianMixture(((0.0,),), -1.0), "variance must be positive"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
