"""A network whose chains can be compared: what rounds differently at first has not grown when they end."""

from __future__ import annotations

import torch

from ncsn_fast import NCSN

SIGMAS = [2.0, 1.2, 0.8]
SCALE = 0.1
# Of a chain's state, between two ways to compute the same; what the network adds to it is a thousand times as much.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def calm_network() -> NCSN:
    """An untrained network with its last layer scaled down.

    As it is made, its score answers a change of the state with a larger one, so that in a few dozen steps a difference
    in the last digit of one convolution becomes one in the first digit of the sample.
    """
    torch.manual_seed(0)
    model = NCSN(in_channels=2, nf=8, num_classes=3, sigmas=SIGMAS).eval()
    with torch.no_grad():
        model.end_conv.weight.mul_(SCALE)
    return model
