"""What the source documents promise: the worked numbers, and each document's system at work, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig, ScoreCNN, ScoreMLP
from ncsn_fast.data import Checkerboard, two_gaussians
from ncsn_fast.demos.points import score_errors
from ncsn_fast.losses import LearnedWeighting, denoising_score_matching_loss, perturb, target_score
from ncsn_fast.schedules import make_sigmas

# --- worked numbers -------------------------------------------------------------------------------


def test_the_ladder_of_five():
    expected = torch.tensor([10, 1.778, 0.3162, 0.05623, 0.01])
    torch.testing.assert_close(make_sigmas(10, 0.01, 5), expected, rtol=3e-4, atol=0)


def test_a_perturbed_point_and_its_target():
    x, noise, sigma = torch.tensor([[3.0]]), torch.tensor([[0.4]]), torch.tensor([0.5])
    torch.testing.assert_close(perturb(x, sigma, noise), torch.tensor([[3.2]]))
    torch.testing.assert_close(target_score(sigma, noise), torch.tensor([[-0.8]]))


@pytest.mark.parametrize(
    ("sigma", "weighting", "expected"),
    [(0.5, "one", 0.01), (0.5, "sigma2", 0.0025), (5.0, "sigma2", 0.25)],
)
def test_the_loss_of_minus_seven_tenths_where_minus_eight_is_right(sigma, weighting, expected):
    noise = torch.tensor([[0.8 * sigma]])  # so that the target is -0.8
    loss = denoising_score_matching_loss(
        torch.tensor([[-0.7]]), torch.tensor([sigma]), noise, weighting
    )
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_parameters_of_the_default_ncsn():
    assert sum(p.numel() for p in NCSN().parameters()) == 12_471_555


def test_the_objective_by_hand():
    x, z = torch.randn(6, 2), torch.randn(6, 2)
    sigma = torch.rand(6) + 0.1
    by_hand = (sigma[:, None] * x + z).square().sum(1).mean()
    torch.testing.assert_close(denoising_score_matching_loss(x, sigma, z), by_hand)


# --- rows 1 and 2: both generations of the documented NCSN ----------------------------------------


@pytest.mark.parametrize("generation", [1, 2])
def test_the_documented_script(generation):
    sigmas = NCSN.make_sigmas(50.0, 0.01, 10)
    if generation == 1:
        model = NCSN(in_channels=3, nf=8, num_classes=10)
        model.set_sigmas(sigmas)
    else:
        model = NCSN(NCSNConfig(in_channels=3, nf=8, num_classes=10, sigmas=sigmas))
    loss, labels = model.get_loss(torch.randn(4, 3, 8, 8))
    loss.backward()
    assert labels.shape == (4,) and model.begin_conv.weight.grad.isfinite().all()
    images = model.sample(
        n_samples=2, image_size=8, in_channels=3, n_steps_each=1, step_lr=2e-5, clip=True
    )
    assert images.shape == (2, 3, 8, 8) and images.abs().max() <= 1


# --- row 3: vectors -------------------------------------------------------------------------------


def test_the_perceptron_for_vectors():
    torch.manual_seed(0)
    model = ScoreMLP(dim=5)
    assert model.config.hidden == (256, 256, 256) and model.config.embedding == 64
    first, activation, second = model.projection
    assert first.in_features == 64 and isinstance(activation, torch.nn.SiLU)
    assert isinstance(second, torch.nn.Linear)
    assert not model.last.weight.any() and not model.last.bias.any()
    x = torch.randn(7, 5)
    assert not model(x, 0.3).any()
    torch.nn.init.normal_(model.last.weight)
    vector = model(x, torch.full((7,), 0.3))
    for scalar in (0.3, torch.tensor(0.3), torch.tensor([0.3])):
        torch.testing.assert_close(model(x, scalar), vector)
    assert (model(x, 3.0) - vector).abs().max() > 0.01


@pytest.mark.parametrize("learned", [False, True])
def test_weightings_are_sums_by_hand(learned):
    torch.manual_seed(1)
    s, z, sigma = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5) + 0.5
    error = (s + z / sigma[:, None]).square()
    if not learned:
        loss = denoising_score_matching_loss(s, sigma, z, "one")
        torch.testing.assert_close(loss, error.sum(1).mean())
        return
    weighting = LearnedWeighting()
    torch.nn.init.normal_(weighting.linear.weight)
    u = weighting(sigma)
    by_hand = (sigma**2 * error.mean(1) * torch.exp(-u) + u).mean()
    torch.testing.assert_close(denoising_score_matching_loss(s, sigma, z, weighting), by_hand)


def test_langevin_starts_from_the_widest_noise():
    starts = []
    model = ScoreMLP(sigmas=[9.0, 1.0])

    def remember(x, sigma):
        starts.append(x.clone())
        return x * 0

    model.at = lambda sigma: lambda x: remember(x, sigma)
    model.sample(4000, n_steps_each=1, seed=0)
    assert starts[0].std().item() == pytest.approx(9.0, rel=0.05)
    assert abs(starts[0].mean().item()) < 0.5


# --- row 4: small images --------------------------------------------------------------------------


def test_the_convolutional_network_for_28x28_images():
    torch.manual_seed(0)
    model = ScoreCNN(sigmas=torch.linspace(1.0, 0.01, 5))  # a linear ladder
    torch.nn.init.normal_(model.last.weight, std=0.1)
    x = torch.rand(4, 1, 28, 28) * 2 - 1
    continuous = torch.tensor([0.02, 0.1, 0.5, 0.9])
    loss, drawn = model.get_loss(x, sigma=continuous)
    loss.backward()
    assert drawn is continuous
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.down1.modulate1.weight.grad.abs().max() > 0  # the modulation by sigma is learned
    assert model.get_loss(x)[1].dtype == torch.int64
    for options in (
        {"init_dist": "normal"},
        {"init_dist": "uniform"},
        {"sampler": "pc"},
        {"sampler": "ode"},
    ):
        images = model.sample(2, n_steps_each=1, seed=0, **options)
        assert images.shape == (2, 1, 28, 28) and images.isfinite().all()


# --- row 5: two Gaussians -------------------------------------------------------------------------


def test_the_mixture_and_its_perceptron():
    points = two_gaussians()
    assert points.means == ((-3.0, 0.0), (3.0, 0.0)) and points.variance == 0.25
    model = ScoreMLP(conditioning="concat")
    shapes = [tuple(layer.weight.shape) for layer in (*model.layers, model.last)]
    assert shapes == [(128, 3), (128, 128), (128, 128), (2, 128)]
    x, sigma = torch.randn(3, 2), torch.tensor([0.1, 1.0, 10.0])
    h = torch.cat([x, sigma[:, None]], 1)  # sigma is a plain third input, the output is the score
    for layer in model.layers:
        h = torch.nn.functional.silu(layer(h))
    torch.testing.assert_close(model(x, sigma), model.last(h))


def test_a_short_training_learns_the_score_of_the_two_gaussians():
    torch.manual_seed(0)
    points = two_gaussians()
    model = ScoreMLP(conditioning="concat", hidden=(64, 64), sigmas=make_sigmas(10, 0.01, 10))
    x = points.sample(2000)
    before = score_errors(model, x[:500], points.score)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(500):
        loss, _ = model.get_loss(x[torch.randint(2000, (256,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = score_errors(model, x[:500], points.score)
    assert max(after[:3]) < 0.45 and max(after) < 1  # the wide levels come first
    assert math.prod(after) < math.prod(before) / 100


def test_floor_not_truncation_makes_the_checkerboard():
    x = Checkerboard().sample(4000)
    floored = x.floor().long().sum(1) % 2 == 0
    truncated = x.trunc().long().sum(1) % 2 == 0
    assert floored.all() and not truncated.all()
