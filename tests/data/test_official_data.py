"""The data options of the authors' configurations: what they do to images, and back."""

from __future__ import annotations

import math

import pytest
import torch

from ncsn_fast.data.official import to_images, to_network

IMAGES = torch.arange(256).float().div(255).view(4, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({}, (0, 1)),
        ({"rescaled": True}, (-1, 1)),
        ({"logit_transform": True}, (-math.log(1e6), math.log(1e6))),
    ],
)
def test_there_and_back(options, ends):
    x = to_network(IMAGES, **options)
    torch.testing.assert_close(to_images(x, **options), IMAGES, rtol=0, atol=2e-6)
    assert (x.min().item(), x.max().item()) == pytest.approx(ends, rel=1e-2)


def test_what_is_drawn_is_clamped():
    x = torch.tensor([-3.0, 0.5, 3.0])
    assert to_images(x).tolist() == [0.0, 0.5, 1.0]
    assert to_images(x, rescaled=True).tolist() == [0.0, 0.75, 1.0]


def test_both_is_refused():
    for function in (to_network, to_images):
        with pytest.raises(ValueError, match="either rescaled or logits"):
            function(IMAGES, rescaled=True, logit_transform=True)
