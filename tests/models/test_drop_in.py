"""The scripts written for lucid's NCSN, in small sizes, and the worked numbers of the documents."""

from __future__ import annotations

import torch

from ncsn_fast import NCSN, NCSNConfig
from ncsn_fast.losses import denoising_score_matching_loss, perturb


def test_first_api():
    """Keyword arguments, then set_sigmas."""
    model = NCSN(in_channels=3, nf=4, num_classes=10)
    sigmas = NCSN.make_sigmas(50.0, 0.01, 10)
    model.set_sigmas(sigmas)

    x = torch.randn(4, 3, 8, 8)
    loss, labels = model.get_loss(x)
    assert loss.shape == ()
    assert loss.item() > 0
    assert labels.shape == (4,)
    assert labels.dtype == torch.int64
    loss.backward()
    assert model.begin_conv.weight.grad.abs().max() > 0

    model.eval()
    with torch.no_grad():
        samples = model.sample(
            n_samples=2, image_size=8, in_channels=3, n_steps_each=1, step_lr=2e-5, clip=True
        )
    assert samples.shape == (2, 3, 8, 8)
    assert samples.abs().max() <= 1


def test_second_api():
    """A config that holds the sigmas."""
    config = NCSNConfig(
        in_channels=3,
        nf=4,
        num_classes=10,
        dilations=(1, 2, 4, 8),
        scale_by_sigma=True,
        sigmas=NCSN.make_sigmas(50.0, 0.01, 10),
    )
    model = NCSN(config)
    assert model.config is config
    loss, labels = model.get_loss(torch.randn(4, 3, 8, 8))
    loss.backward()
    assert labels.shape == (4,)
    # Positional, in the documented order, with what the first API leaves at its defaults.
    samples = model.sample(2, 8, 3, 1, 2e-5, True, True, None, "normal", False)
    assert samples.shape == (2, 3, 8, 8)


def test_the_first_steps_of_training_reduce_the_loss():
    torch.manual_seed(0)
    model = NCSN(in_channels=1, nf=4, num_classes=3, sigmas=NCSN.make_sigmas(1.0, 0.1, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    x, labels = torch.zeros(6, 1, 4, 4), torch.arange(6) % 3
    first, _ = model.get_loss(x, labels=labels, seed=0)
    for _ in range(15):
        optimizer.zero_grad()
        loss, _ = model.get_loss(x, labels=labels, seed=0)
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * first


def test_worked_numbers_of_the_perturbation():
    x, sigma, z = torch.tensor([[3.0]]), torch.tensor([0.5]), torch.tensor([[0.4]])
    perturbed = perturb(x, sigma, z)
    torch.testing.assert_close(perturbed, torch.tensor([[3.2]]))
    target = -(perturbed - x) / sigma**2
    torch.testing.assert_close(target, torch.tensor([[-0.8]]), rtol=1e-5, atol=0)
    # The target has no loss; a prediction of -0.7 has an error of 0.1^2, weighted by sigma^2.
    torch.testing.assert_close(
        denoising_score_matching_loss(target, sigma, z), torch.tensor(0.0), rtol=0, atol=1e-10
    )
    loss = denoising_score_matching_loss(torch.tensor([[-0.7]]), sigma, z)
    torch.testing.assert_close(loss / sigma[0] ** 2, torch.tensor(0.01))
    torch.testing.assert_close(loss, torch.tensor(0.0025))


def test_worked_number_at_a_large_sigma():
    # sigma 5, a target of -0.8 (so z = 4) and a prediction of -0.7.
    loss = denoising_score_matching_loss(
        torch.tensor([[-0.7]]), torch.tensor([5.0]), torch.tensor([[4.0]])
    )
    torch.testing.assert_close(loss, torch.tensor(0.25), rtol=1e-5, atol=0)
