"""Bits a dimension against those of a Gaussian, whose density and score are known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ncsn_fast import NCSN, NCSNConfig, ScoreCNN, ScoreModel
from ncsn_fast.data import ImageDataset
from ncsn_fast.evaluation import bits_per_dimension

MEAN, STD, SIGMAS = -0.2, 0.3, (50.0, 0.01)


@dataclasses.dataclass(frozen=True)
class GaussConfig:
    """As every network has one."""

    sigmas: tuple[float, ...] | None = None


class Gauss(ScoreModel):
    """The exact score of pixels N(MEAN, STD^2), all alike, in a range of its own."""

    Config = GaussConfig

    def __init__(self, data_range=(-1.0, 1.0)):
        super().__init__(GaussConfig(SIGMAS))
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.data_range = data_range

    @property
    def sample_shape(self):
        return (1, 4, 4)

    def forward(self, x, sigma):
        sigma = self.check_input(x, sigma).view(-1, 1, 1, 1)
        low, high = self.data_range
        half = (high - low) / 2
        mean, std = low + half * (MEAN + 1), half * STD
        return (mean - x) / (std**2 + sigma**2) * self.weight


@pytest.fixture(scope="module")
def images():
    """Greys of the Gaussian, rounded to bytes."""
    x = MEAN + STD * torch.randn(128, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def test_bits_are_those_of_the_gaussian(images):
    mean, error = bits_per_dimension(Gauss(), ImageDataset(images), points=100)
    # Entropy of the Gaussian, in steps of a grey.
    expected = math.log2(STD * math.sqrt(2 * math.pi * math.e)) - math.log2(2 / 255)
    assert abs(mean - expected) < 4 * error < 0.15
    # The error is that of 128 images of 16 values: of -log2 p a value it is 1 / (ln 2 sqrt 2).
    assert error == pytest.approx(1 / (math.log(2) * math.sqrt(2 * 16 * 128)), rel=0.25)


def test_bits_do_not_depend_on_the_range_of_the_network(images):
    data = ImageDataset(images[:40])
    plain, unit = (bits_per_dimension(Gauss(ends), data)[0] for ends in ((-1.0, 1.0), (0.0, 1.0)))
    assert unit == pytest.approx(plain, abs=0.02)  # the last sigma is another share of the range


def test_worse_images_need_more_bits_and_a_seed_fixes_them(images):
    data = ImageDataset(images[:40])
    found = bits_per_dimension(Gauss(), data)
    assert found == bits_per_dimension(Gauss(), data) != bits_per_dimension(Gauss(), data, seed=1)
    noise = torch.randint(0, 256, (40, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    assert bits_per_dimension(Gauss(), ImageDataset(noise.to(torch.uint8)))[0] > found[0] + 1


def test_what_has_no_likelihood():
    ladder = NCSN(NCSNConfig(in_channels=1, nf=4, num_classes=2, sigmas=(1.0, 0.1)))
    with pytest.raises(ValueError, match="NCSN knows the levels of its ladder only"):
        bits_per_dimension(ladder, torch.zeros(2, 1, 8, 8))
    network = ScoreCNN(1, nf=8, sigmas=(1.0, 0.1))
    with pytest.raises(ValueError, match="8 bits, got values between"):
        bits_per_dimension(network, torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        bits_per_dimension(network, -torch.ones(1, 1, 8, 8))
