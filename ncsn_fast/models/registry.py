"""Which networks there are: from a configuration to a network, and from a saved name back to both.

Belongs here: the table of the networks that a checkpoint can hold, and a configuration as plain values. Does not
belong here: the networks themselves, the file format (``training/checkpoints.py``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .base import ScoreModel
from .config import NCSNConfig
from .ncsn import NCSN
from .small import ScoreCNN, ScoreCNNConfig, ScoreMLP, ScoreMLPConfig

# By name, as a checkpoint says which it is of; one that does not say is of the first.
NETWORKS = {
    "NCSN": (NCSNConfig, NCSN),
    "ScoreMLP": (ScoreMLPConfig, ScoreMLP),
    "ScoreCNN": (ScoreCNNConfig, ScoreCNN),
}
Config = NCSNConfig | ScoreMLPConfig | ScoreCNNConfig


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, with the network's name unless it is an NCSN's.

    Its sigmas are rounded to float32, which is what a model keeps of them.
    """
    fields = dataclasses.asdict(config)
    if config.sigmas is not None:
        fields["sigmas"] = tuple(
            torch.tensor(config.sigmas, dtype=torch.float32, device="cpu").tolist()
        )
    if not isinstance(config, NCSNConfig):
        fields["network"] = _network_of(config)
    return fields


def new_network(config: Config) -> ScoreModel:
    """A network of a configuration, with new weights."""
    if isinstance(config, NCSNConfig):
        return NCSN(config)
    return NETWORKS[_network_of(config)][1](**dataclasses.asdict(config))


def _network_of(config: Config) -> str:
    """The name of the network that is made from a configuration."""
    return next(name for name, (made_from, _) in NETWORKS.items() if type(config) is made_from)
