"""Which networks there are: from a configuration to a network, and from a saved name back to both.

Belongs here: the table of the networks, filled by :func:`register`, and configurations as plain values. Does not belong
here: the networks themselves, files (``pretrained.py``, ``training/checkpoints.py``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .config import article, config_from_fields, field_names

if TYPE_CHECKING:
    from .base import ScoreModel

NETWORKS: dict[str, type[ScoreModel]] = {}  # by class name, as saved configurations say it
# What a configuration that does not say may be of: the first, or the first that has its fields.
UNNAMED = ("NCSN", "ScoreMLP", "ScoreCNN")
NAME_FIELD = "network"

Network = TypeVar("Network", bound="type[ScoreModel]")


def register(network: Network) -> Network:
    """Make a network known by its class name, so that what is saved of it can be loaded; a class decorator.

    Its ``Config`` must be a dataclass of its own with a field ``sigmas``, and ``network(config)`` must make one.

    Raises:
        TypeError: ``Config`` is missing, no dataclass, without ``sigmas``, or another network's.
        ValueError: another network has this name.
    """
    name, config = network.__name__, getattr(network, "Config", None)
    if not dataclasses.is_dataclass(config) or "sigmas" not in field_names(config):
        raise TypeError(
            f"{name}.Config must be a dataclass with a field sigmas, got {config!r}: it says what is saved of a network"
        )
    same = _same_class(NETWORKS.get(name), network)
    if name in NETWORKS and not same:
        raise ValueError(f"there is a network {name} already, {NETWORKS[name]}")
    for other in NETWORKS.values():
        if other.Config is config and not _same_class(other, network):
            raise TypeError(f"{name} needs a Config of its own, {config.__name__} is {other}'s")
    NETWORKS[name] = network
    return network


def network_named(name: str) -> type[ScoreModel]:
    """The network of that name. ValueError: none is registered; the message says which are."""
    if name not in NETWORKS:
        raise ValueError(
            f"there is no network {name!r}, only {', '.join(sorted(NETWORKS))}; one of your own is known "
            "once the module that registers it has been imported (ncsn_fast.models.registry.register)"
        )
    return NETWORKS[name]


def network_of(kind: type) -> type[ScoreModel]:
    """The network that is made from configurations of a class. TypeError: none that is registered."""
    for base in kind.__mro__:
        for network in NETWORKS.values():
            if network.Config is base:
                return network
    raise TypeError(
        f"{kind.__name__} is the configuration of no registered network: decorate the network with "
        "ncsn_fast.models.registry.register"
    )


def new_network(config: Any) -> ScoreModel:
    """A network of a configuration, with new weights."""
    return network_of(type(config))(config)


def config_fields(config: Any) -> dict[str, Any]:
    """The configuration as plain values, with the network's name unless it is an NCSN's."""
    fields = dataclasses.asdict(config)
    name = network_of(type(config)).__name__
    return fields if name == UNNAMED[0] else {**fields, NAME_FIELD: name}


def config_to_dict(config: Any) -> dict[str, Any]:
    """:func:`config_fields` with its sigmas rounded to float32, which is what a model keeps of them."""
    fields = config_fields(config)
    if config.sigmas is not None:
        rounded = torch.tensor(config.sigmas, dtype=torch.float32, device="cpu")
        fields["sigmas"] = tuple(rounded.tolist())
    return fields


def config_from_dict(fields: Mapping[str, Any], unnamed: str = UNNAMED[0]) -> Any:
    """The configuration again; fields that are absent take their defaults.

    Args:
        fields: as of :func:`config_fields`.
        unnamed: whose they are if they have no name.

    Raises:
        TypeError: no mapping, or a field of another type.
        ValueError: an unknown network, a field that it does not have, or a value out of its range.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"a configuration must be a mapping, got {type(fields).__name__}")
    fields = dict(fields)
    network = network_named(fields.pop(NAME_FIELD, unnamed))
    return config_from_fields(network.Config, fields, network.__name__)


def read_config(path: Path, unnamed: str | None = None) -> Any:
    """The configuration in a ``config.json`` of ``save_pretrained``.

    Args:
        path: of the file.
        unnamed: the network it is of if it does not say; ``None``: told from its fields.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no configuration of a network; the message names the file.
    """
    name = unnamed or UNNAMED[0]
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(fields, dict):
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            if unnamed is None:
                fitting = (n for n in UNNAMED if {*fields} <= {*field_names(NETWORKS[n].Config)})
                name = next(fitting, name)
            name = fields.get(NAME_FIELD, name)
        return config_from_dict(fields, name)
    except (ValueError, TypeError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{path} is not the configuration of {article(name)}: {error}") from error


def _same_class(one: type | None, other: type) -> bool:
    """Whether they are one class, made anew perhaps, as when a notebook runs a cell again."""
    return one is not None and (one.__module__, one.__qualname__) == (
        other.__module__,
        other.__qualname__,
    )
