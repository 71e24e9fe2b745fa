"""The data options of the authors' configurations: what they do to images, and back."""

from __future__ import annotations

import math

import pytest
import torch

from ncsn_fast.data.official import to_images, to_network

IMAGES = torch.arange(256).float().div(255).view(4, 1, 8, 8)


@pytest.mark.parametrize("options", [{}, {"rescaled": True}, {"logit_transform": True}])
def test_there_and_back(options):
    x = to_network(IMAGES, **options)
    torch.testing.assert_close(to_images(x, **options), IMAGES, rtol=0, atol=2e-6)
    low, high = (
        (-1, 1)
        if options.get("rescaled")
        else (-math.log(1e6), math.log(1e6))
        if options.get("logit_transform")
        else (0, 1)
    )
    assert x.min().item() == pytest.approx(low, rel=1e-2) and x.max().item() == pytest.approx(
        high, rel=1e-2
    )


def test_what_is_drawn_is_clamped():
    x = torch.tensor([-3.0, 0.5, 3.0])
    assert to_images(x).tolist() == [0.0, 0.5, 1.0]
    assert to_images(x, rescaled=True).tolist() == [0.0, 0.75, 1.0]


def test_dequantisation():
    x = to_network(IMAGES, uniform_dequantization=True, seed=3)
    level = IMAGES * (255 / 256)
    assert bool((x >= level).all()) and bool((x < level + 1 / 256).all())
    assert abs(((x - level) * 256).mean().item() - 0.5) < 0.1
    noise = to_network(IMAGES, gaussian_dequantization=True, seed=3) - IMAGES
    assert noise.std().item() == pytest.approx(0.01, rel=0.2)
    assert torch.equal(x, to_network(IMAGES, uniform_dequantization=True, seed=3))
    assert not torch.equal(x, to_network(IMAGES, uniform_dequantization=True, seed=4))


def test_both_is_refused():
    for function in (to_network, to_images):
        with pytest.raises(ValueError, match="either rescaled or logits"):
            function(IMAGES, rescaled=True, logit_transform=True)
