"""All that a run is made from, under one set of names: the data, the network, its ladder and how it is trained.

Belongs here: :class:`RunConfig`, and :func:`merge_config`, the one merge of presets, files, arguments and a run that
goes on, for Python and the command line alike. Does not belong here: what a value may be, which the configurations of
the networks (``models/``) and :class:`~ncsn_fast.training.settings.TrainingSettings` check; reading data.

The names are flat: ``data``, ``image_size``, ``channels``; ``network`` and the fields of its configuration, such as
``nf``; ``num_classes``, ``sigma_begin``, ``sigma_end`` or a whole ladder ``sigmas``; the fields of the settings, such
as ``lr``, and of what is watched, such as ``samples_every``. As an option of the command line a name has dashes:
``--sigma-begin``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import boolean, one_of, positive_int, positive_number
from ..data import ImageDataset
from ..data.opening import usual_size
from ..data.ranges import Range
from ..files import CheckpointError, write_atomically
from ..models import ncsn, official, small  # noqa: F401 -- each registers its networks
from ..models.base import ScoreModel
from ..models.config import free_ladder
from ..models.registry import NETWORKS, new_network
from ..models.sampling_settings import check_sampling, load_sampling, save_sampling
from ..schedules import make_sigmas, suggest_sigma_begin
from .checkpoints import CHECKPOINT_NAME, load_checkpoint
from .presets import read_preset, read_toml
from .settings import TrainingSettings
from .watch_settings import WATCH_NAMES, WatchSettings

CONFIG_NAME = "config.toml"
LADDER_NAMES = ("num_classes", "sigma_begin", "sigma_end")
FROM_DATA = ("in_channels", "image_size", "dim")  # fields of a network that follow from the data
SETTINGS_NAMES = tuple(field.name for field in dataclasses.fields(TrainingSettings))
GROUPS = ("options", "settings", "watching")  # fields of a RunConfig that hold several names
NUM_CLASSES = 10  # where the network has no number of its own


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run is made from. :func:`merge_config` makes one of flat names and values.

    Args:
        data: what the data are read from: a path, or ``"digits"``.
        image_size: height and width of the images; ``None``: 32, of the digits 8.
        channels: 1 for grey, 3 for RGB; ``None``: 3, of the digits 1.
        flips, dequantise: augmentation, see :class:`~ncsn_fast.data.ImageDataset`.
        network: one of :func:`network_names`.
        options: fields of the network's configuration, but for those that follow from the data and the ladder.
        num_classes: levels of the ladder; ``None``: the network's own number, or 10.
        sigma_begin: its largest level; ``None``: the largest distance between two samples, see
            :func:`~ncsn_fast.schedules.suggest_sigma_begin`.
        sigma_end: its smallest level.
        sigmas: the whole ladder, in place of those three.
        settings: how to train.
        sampling: options of ``sample`` with which the run's network is sampled unless something else is asked for, as
            the published presets have them; a table in TOML.
        watching: what is looked at on the way.

    Raises:
        TypeError, ValueError: a value of another type or out of its range; the message begins with the name.
    """

    data: str = "digits"
    image_size: int | None = None
    channels: int | None = None
    flips: bool = False
    dequantise: bool = False
    network: str = "ncsn"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_classes: int | None = None
    sigma_begin: float | None = None
    sigma_end: float = 0.01
    sigmas: tuple[float, ...] | None = None
    settings: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    watching: WatchSettings = dataclasses.field(default_factory=WatchSettings)

    def __post_init__(self) -> None:
        if not isinstance(self.data, (str, Path)):
            raise TypeError(f"data must be a path or a name, got {self.data!r}")
        usual = dict(zip(("image_size", "channels"), usual_size(self.data), strict=True))
        for name, size in usual.items():
            value = size if getattr(self, name) is None else getattr(self, name)
            object.__setattr__(self, name, positive_int(name, value))
        for name in ("flips", "dequantise"):
            object.__setattr__(self, name, boolean(name, getattr(self, name)))
        one_of("network", self.network, network_names())
        # What is wrong is told before any data are read.
        config_class(self.network)(**self.options)
        object.__setattr__(self, "sampling", check_sampling(self.sampling))
        if self.num_classes is not None:
            positive_int("num_classes", self.num_classes)
        for name in ("sigma_begin", "sigma_end"):
            if getattr(self, name) is not None:
                positive_number(name, getattr(self, name))
        if self.sigmas is not None:
            if not isinstance(self.sigmas, (Sequence, Tensor)) or isinstance(self.sigmas, str):
                raise TypeError(f"sigmas must be a list of numbers, got {self.sigmas!r}")
            object.__setattr__(self, "sigmas", free_ladder(self.sigmas))

    def values(self) -> dict[str, Any]:
        """All of it but ``sampling`` as flat names and values; what is ``None`` is left out."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own.pop("sampling")
        options, settings, watching = (own.pop(name) for name in GROUPS)
        if self.sigmas is not None:
            own = {name: value for name, value in own.items() if name not in LADDER_NAMES}
        flat = {**own, **options, **dataclasses.asdict(settings), **dataclasses.asdict(watching)}
        return {name: value for name, value in flat.items() if value is not None}

    def resolved(
        self, data: Tensor | ImageDataset, device: torch.device | str = "cpu"
    ) -> RunConfig:
        """With what follows from the data: their size, and the ladder's largest level if it is not given.

        Args:
            data: images ``(N, C, H, W)`` or points ``(N, D)``.
            device: where distances between samples are taken.
        """
        changes: dict[str, Any] = {}
        if data.ndim == 4:
            changes = {"channels": data.shape[1], "image_size": data.shape[2]}
        if self.sigmas is None:
            changes["num_classes"] = self.num_classes or _default_num_classes(self.network)
            if self.sigma_begin is None:
                changes["sigma_begin"] = suggest_sigma_begin(data, device)
        return dataclasses.replace(self, **changes)

    def made(self, model: ScoreModel, data: ImageDataset) -> RunConfig:
        """With what a network and its data say: their size, what is augmented, and the ladder."""
        changes: dict[str, Any] = {"flips": data.flips, "dequantise": data.dequantise}
        if data.ndim == 4:
            changes |= {"channels": data.shape[1], "image_size": data.shape[2]}
        if self.sigmas is None:
            changes |= _ladder_values(tuple(model.sigmas.tolist()))
        return dataclasses.replace(self, **changes)

    @property
    def data_range(self) -> Range:
        """What the values of the network's data must lie in.

        Raises:
            ValueError: the network takes values of any range, such as logits.
        """
        with torch.device("meta"):  # the range may depend on the options
            expected = new_network(config_class(self.network)(**self.options)).data_range
        if expected is None:
            raise ValueError(
                f"network {self.network!r} with these options takes values of any range, such as logits: give it such "
                "data by ncsn_fast.training.train in Python"
            )
        return expected

    def network_config(self, data: Tensor | ImageDataset) -> Any:
        """The configuration of the network for the data.

        Raises:
            ValueError: a network for points and images as data, or the other way round; one of its fields has a value
                that it cannot have.
        """
        shape = tuple(data.shape[1:])
        kind = config_class(self.network)
        names = {field.name for field in dataclasses.fields(kind)}
        takes = 1 if "dim" in names else 3
        if len(shape) != takes:
            kinds = {1: "points (N, D)", 3: "images (N, C, H, W)"}
            raise ValueError(
                f"network {self.network!r} takes {kinds[takes]}, and the data have the shape {tuple(data.shape)}"
            )
        if "image_size" in names and shape[1] != shape[2]:
            raise ValueError(
                f"network {self.network!r} takes square images, and these are {shape[1]} x {shape[2]}"
            )
        whole = self.resolved(data)
        sigmas = whole.sigmas
        if sigmas is None:
            ladder = make_sigmas(whole.sigma_begin, whole.sigma_end, whole.num_classes)
            sigmas = tuple(ladder.tolist())
        follows = dict(
            zip(("dim",) if takes == 1 else ("in_channels", "image_size"), shape, strict=False)
        )
        follows |= {"num_classes": len(sigmas), "sigmas": sigmas}
        given = {name: value for name, value in follows.items() if name in names}
        return kind(**self.options, **given)

    def new_network(self, data: Tensor | ImageDataset) -> ScoreModel:
        """The network for the data, channels_last; its weights are of the seed. Torch's generators stay as they are."""
        config = self.network_config(data)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.settings.seed)
            return new_network(config).to(memory_format=torch.channels_last)


# --- the merge ------------------------------------------------------------------------------------


def merge_config(
    *,
    preset: str | None = None,
    file: str | Path | None = None,
    run: str | Path | None = None,
    **given: Any,
) -> RunConfig:
    """One configuration of several sources: a preset, a file over it, what is given over both.

    Args:
        preset: one of :func:`preset_names`.
        file: a TOML file of such names, flat.
        run: the folder of a run that is to go on. What no other source says is as there; what one says otherwise is
            for :func:`~ncsn_fast.training.train` to refuse, but for ``iterations`` and ``checkpoint_every``.
        given: values by their names; ``None`` for one that is not given.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in ``run``.
        ValueError: no preset of that name, or one without data and none given; a file that is no TOML; a name that is
            not known; a value of another type or out of its range. The message says where it comes from.
        ImportError: a TOML file, and Python 3.10 without ``tomli``.
        CheckpointError: the checkpoint in ``run`` is damaged.

    Example::

        >>> config = merge_config(preset="digits", lr=1e-3)
        >>> config.settings.lr, config.settings.iterations, config.options["nf"]
        (0.001, 1000, 32)
    """
    layers = []
    if run is not None:
        layers.append((f"the run in {run}", held_values(run)))
    if preset is not None:
        layers.append((f"preset {preset!r}", read_preset(preset)))
    if file is not None:
        layers.append((str(file), read_toml(file)))
    layers.append(("", {name: value for name, value in given.items() if value is not None}))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        if "sigmas" not in layer and any(name in layer for name in LADDER_NAMES):
            values.pop("sigmas", None)
        values |= layer
        sources |= dict.fromkeys(layer, source)
    if preset is not None and "data" not in values:
        raise ValueError(f"preset {preset!r} has no data of its own: give data")
    try:
        return _config_of(values, sources)
    except (TypeError, ValueError) as error:
        # An error of a value begins with the value's name.
        source = sources.get(str(error).split(" ", 1)[0], "")
        raise ValueError(f"{source}: {error}" if source else str(error)) from error


def _config_of(values: dict[str, Any], sources: dict[str, str]) -> RunConfig:
    network = one_of("network", values.get("network", RunConfig.network), network_names())
    own = [f.name for f in dataclasses.fields(RunConfig) if f.name not in GROUPS]
    options = option_names(network)
    known = (*own, *options, *SETTINGS_NAMES, *WATCH_NAMES)
    for name in values:
        if name not in known:
            where = f"{sources[name]}: " if sources[name] else ""
            raise ValueError(
                f"{where}{name!r} is no name of a run with the network {network!r}; known are "
                f"{', '.join(known)}"
            )

    def those(names: tuple[str, ...] | list[str]) -> dict[str, Any]:
        return {name: values[name] for name in names if name in values}

    settings = TrainingSettings(**those(SETTINGS_NAMES))
    watching = WatchSettings(**those(WATCH_NAMES))
    return RunConfig(**those(own), options=those(options), settings=settings, watching=watching)


def held_values(run: str | Path) -> dict[str, Any]:
    """What the run in a folder was made from, by its checkpoint; where the data are and what is watched, by its
    ``config.toml``, if there is one.
    """
    run = Path(run).expanduser()
    checkpoint = load_checkpoint(run / CHECKPOINT_NAME)
    kind, shape = type(checkpoint.config), tuple(checkpoint.data["shape"])
    network = next(name for name in network_names() if config_class(name) is kind)
    fields = dataclasses.asdict(checkpoint.config)
    values = {"network": network, **{name: fields[name] for name in option_names(network)}}
    values |= _ladder_values(tuple(checkpoint.config.sigmas))
    values |= {name: checkpoint.data.get(name, False) for name in ("flips", "dequantise")}
    if len(shape) == 4:
        values |= {"channels": shape[1], "image_size": shape[2]}
    # A setting that an older run does not know is at its default, which is for the trainer to say.
    values |= {name: value for name, value in checkpoint.settings.items() if value is not None}
    if (run / CONFIG_NAME).is_file():
        held = read_toml(run / CONFIG_NAME)
        values |= {name: held[name] for name in ("data", *WATCH_NAMES) if name in held}
    sampling = load_sampling(run)
    return {**values, "sampling": sampling} if sampling else values


def _ladder_values(sigmas: tuple[float, ...]) -> dict[str, Any]:
    """A ladder by its ends and number, as it was made, and as a whole where these would make another one."""
    # Rounded: the ladder is kept in float32, and was made from these numbers before.
    begin, end = (float(f"{sigmas[i]:.6g}") for i in (0, -1))
    ends = {"sigma_begin": begin, "sigma_end": end, "num_classes": len(sigmas)}
    held = torch.tensor(sigmas, dtype=torch.float32, device="cpu")
    geometric = begin > end and torch.equal(make_sigmas(begin, end, len(sigmas)), held)
    return ends if geometric else {**ends, "sigmas": sigmas}


# --- names and files ------------------------------------------------------------------------------


def network_names() -> tuple[str, ...]:
    """The networks by short names: ``"ncsn"``, ``"cnn"``, ``"mlp"``, ..."""
    return tuple(sorted(_short(name) for name in NETWORKS))


def run_names() -> tuple[str, ...]:
    """Every name that a run may have, whatever its network."""
    own = (f.name for f in dataclasses.fields(RunConfig) if f.name not in GROUPS)
    options = (name for network in network_names() for name in option_names(network))
    return tuple(dict.fromkeys((*own, *options, *SETTINGS_NAMES, *WATCH_NAMES)))


def network_class(network: str) -> type[ScoreModel]:
    """The class of a network, by its short name."""
    return next(kind for name, kind in NETWORKS.items() if _short(name) == network)


def config_class(network: str) -> type:
    """The dataclass of a network's configuration, by the network's short name."""
    return network_class(network).Config


def option_names(network: str) -> tuple[str, ...]:
    """The fields of a network's configuration that neither the data nor the ladder decide."""
    decided = {*FROM_DATA, *LADDER_NAMES, "sigmas"}
    fields = dataclasses.fields(config_class(network))
    return tuple(field.name for field in fields if field.name not in decided)


def save_config(config: RunConfig, run: str | Path) -> None:
    """Write ``config.toml`` and, if any are known, the options of sampling into the folder of a run.

    :func:`merge_config` reads them again.

    Raises:
        CheckpointError: it could not be written.
    """
    lines = [f"{name} = {_toml(value)}\n" for name, value in config.values().items()]
    path = Path(run) / CONFIG_NAME
    try:
        write_atomically(path, "".join(lines).encode())
        save_sampling(run, config.sampling)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error.strerror or error}") from error


def _toml(value: Any) -> str:
    # JSON of strings, finite numbers, booleans and lists of them is TOML too.
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _short(name: str) -> str:
    return name.lower().removeprefix("score")


def _default_num_classes(network: str) -> int:
    defaults = {field.name: field.default for field in dataclasses.fields(config_class(network))}
    return defaults.get("num_classes", NUM_CLASSES)
