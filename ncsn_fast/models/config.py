"""Configurations of networks: what all of them share, and that of an NCSN.

Belongs here: the shape of a network as data, and its form in JSON. Does not belong here: settings of training or of
sampling, which network a configuration is of (``registry.py``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..checks import boolean, one_of, positive_int
from ..schedules import check_sigmas

POOL_PADDINGS = ("neg_inf", "zero")
NORMS = ("instance", "instance++")
NUM_STAGES = 4

Config = TypeVar("Config")


def config_from_fields(kind: type[Config], fields: Mapping[str, Any], network: str) -> Config:
    """A configuration of plain values by name, as of JSON; fields that are absent take their defaults.

    Args:
        kind: the dataclass.
        fields: the values.
        network: whose it is, for messages.

    Raises:
        TypeError: ``fields`` is no mapping, or a field has the wrong type.
        ValueError: an unknown field, or a value out of its range.
    """
    known = field_names(kind)
    if not isinstance(fields, Mapping):
        raise TypeError(
            f"{article(network)} config must be a mapping of {', '.join(known)}, got {type(fields).__name__}"
        )
    unknown = [str(name) for name in fields if name not in known]
    if unknown:
        raise ValueError(
            f"{article(network)} config has the fields {', '.join(known)}, got also {', '.join(unknown)}"
        )
    return kind(**fields)


def choose_config(
    kind: type[Config], config: Config | None, first: Any, *others: Any, **fields: Any
) -> Config:
    """The configuration that a network was given, by keyword or as its first argument, or one made of its arguments.

    Raises:
        TypeError: another network's configuration.
    """
    if config is None and dataclasses.is_dataclass(first):
        config = first
    if config is None:
        return kind(first, *others, **fields)
    if not isinstance(config, kind):
        raise TypeError(f"config must be {article(kind.__name__)}, got {type(config).__name__}")
    return config


def fixed_ladder(sigmas: Sequence[float] | Tensor | None, levels: int) -> tuple[float, ...] | None:
    """A ladder of so many levels, checked, as a configuration keeps it: Python floats as they were given."""
    if sigmas is None:
        return None
    check_sigmas(sigmas, levels)
    # Not the float32 values of the check.
    values = sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas
    return tuple(float(sigma) for sigma in values)


def free_ladder(sigmas: Sequence[float] | Tensor | None) -> tuple[float, ...] | None:
    """A ladder of any length, checked, as a configuration keeps it: rounded to float32."""
    if sigmas is None:
        return None
    return tuple(float(sigma) for sigma in check_sigmas(sigmas, len(sigmas)).tolist())


def field_names(kind: type) -> list[str]:
    """Names of the fields of a configuration."""
    return [field.name for field in dataclasses.fields(kind)]


def article(name: str) -> str:
    """The name with "a" or "an" before it, as it is spoken: an NCSN, a ScoreMLP."""
    return f"{'an' if name[:1] in 'AEINO' else 'a'} {name}"


@dataclasses.dataclass(frozen=True)
class NCSNConfig:
    """What an :class:`~ncsn_fast.NCSN` is built from; immutable, and the same again after JSON.

    Args:
        in_channels: channels of the images, 1 for grey and 3 for RGB.
        nf: width of the network; every hidden layer has this many channels.
        num_classes: number of noise levels K.
        dilations: dilation of the convolutions in each of the four stages; any sequence, stored as
            a tuple.
        scale_by_sigma: divide the network's output by the level's sigma.
        sigmas: the ladder, strictly descending, of length ``num_classes``; a tensor, an array or a
            sequence, stored as a tuple of floats. ``None``: set later with
            :meth:`~ncsn_fast.NCSN.set_sigmas`.
        pool_padding: what surrounds the image in the pools of chained residual pooling:
            ``"neg_inf"`` as in PyTorch's pools, or ``"zero"`` as in lucid's, which weights trained
            there need.
        norm: ``"instance"``, or ``"instance++"`` for the paper's InstanceNorm++, which has a third
            column of parameters and keeps the differences between the channels' means, and with
            them an image's brightness and colour.

    Raises:
        TypeError: a field of the wrong type. The message names the field.
        ValueError: a field out of its range; ``dilations`` that are not four positive ints.

    Example::

        >>> NCSNConfig(in_channels=1, nf=64, sigmas=make_sigmas(50.0, 0.01, 10)).num_classes
        10
    """

    in_channels: int = 3
    nf: int = 128
    num_classes: int = 10
    dilations: Sequence[int] = (1, 2, 4, 8)
    scale_by_sigma: bool = True
    sigmas: Sequence[float] | Tensor | None = None
    pool_padding: str = "neg_inf"
    norm: str = "instance"

    def __post_init__(self) -> None:
        for name in ("in_channels", "nf", "num_classes"):
            self._store(name, positive_int(name, getattr(self, name)))
        self._store("dilations", _check_dilations(self.dilations))
        self._store("scale_by_sigma", boolean("scale_by_sigma", self.scale_by_sigma))
        self._store("sigmas", fixed_ladder(self.sigmas, self.num_classes))
        for name, known in (("pool_padding", POOL_PADDINGS), ("norm", NORMS)):
            self._store(name, one_of(name, getattr(self, name), known))
        if self.norm == "instance++" and self.nf == 1:
            raise ValueError("norm 'instance++' compares channels and needs nf >= 2, got nf 1")

    def _store(self, name: str, value: object) -> None:
        """Set a field of this frozen object; for normalising during construction only."""
        object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> NCSNConfig:
        """A config from the contents of a ``config.json``; absent fields take their defaults.

        Raises:
            TypeError: ``fields`` is not a dict, or a field has the wrong type.
            ValueError: an unknown field, or a value out of its range.
        """
        return config_from_fields(cls, fields, "NCSN")

    @classmethod
    def from_json_file(cls, path: str | Path) -> NCSNConfig:
        """Read the ``config.json`` that ``save_pretrained`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not the JSON of an NCSN config; the message names the file.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:  # JSON and Unicode errors are ValueErrors
            raise ValueError(f"{path} is not the configuration of an NCSN: {error}") from error


def _check_dilations(dilations: Sequence[int]) -> tuple[int, ...]:
    try:
        checked = tuple(positive_int("dilations", dilation) for dilation in dilations)
    except (TypeError, ValueError):
        checked = ()
    if len(checked) != NUM_STAGES:
        raise ValueError(
            f"dilations must be exactly {NUM_STAGES} positive ints, one for each stage, "
            f"got {dilations!r}"
        )
    return checked
