"""Checkpoints of a training run: what one holds, and how it reaches the disk and comes back.

Belongs here: the checkpoint format, loading a model for sampling. Does not belong here: the training loop
(``loop.py``); the published form of a model (``models/pretrained.py``).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checks import differences, one_of
from ..files import CheckpointError, check_archive, write_atomically
from ..models.base import ScoreModel, load_pretrained
from ..models.registry import config_from_dict, config_to_dict, new_network
from ..models.sampling_settings import load_tuned
from ..models.shipped import find_saved, shipped_names

FORMAT = "ncsn_fast.checkpoint"
VERSION = 1
CHECKPOINT_NAME = "checkpoint.pt"
MODEL_NAME = "model"
WEIGHTS = ("ema", "last")  # that a checkpoint holds
OTHER = "ema:"  # before the decay of a further average
IMAGE_SIZE_NAME = (
    "image_size.json"  # beside a model's weights: height and width of its training images
)


@dataclasses.dataclass
class Checkpoint:
    """Everything a run needs to go on as if it had not stopped.

    Attributes:
        config: of the network, with its sigmas.
        model, ema: state dicts of the network and of its moving average, without prefix.
        optimizer: state dict of the optimiser.
        step: optimiser steps done.
        settings: fields of :class:`~ncsn_fast.training.TrainingSettings`.
        data: ``shape`` (N, C, H, W) or (N, D) and ``fingerprint`` of the training data.
        torch_rng: state of torch's default CPU generator.
        weighting: state dict of the learned weighting of the noise levels; empty without.
        averages: state dicts of further averages, by :func:`average_name` of their decays.
        best: ``step`` and ``loss`` of the best checkpoint of the run so far; empty without a held-out loss.
    """

    config: Any
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int
    settings: dict[str, Any]
    data: dict[str, Any]
    torch_rng: Tensor
    weighting: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    averages: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    best: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def image_size(self) -> tuple[int, ...]:
        """Height and width of the training images; empty for points."""
        return tuple(self.data["shape"][2:])

    def ema_model(self, device: torch.device | str = "cpu") -> ScoreModel:
        """The averaged network, in evaluation mode: the one to sample from."""
        return self._network(self.ema, device)

    def last_model(self, device: torch.device | str = "cpu") -> ScoreModel:
        """The network with the weights of the last step, in evaluation mode."""
        return self._network(self.model, device)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The weights of a name, ``"ema"``, ``"last"`` or ``"ema:DECAY"``.

        Raises:
            ValueError: no such name, or no average of that decay.
        """
        if not name.startswith(OTHER):
            return self.ema if one_of("weights", name, WEIGHTS) == "ema" else self.model
        known = {average_name(self.settings["ema_decay"]): self.ema, **self.averages}
        try:
            return known[average_name(float(name.removeprefix(OTHER)))]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"the checkpoint holds the averages {', '.join(OTHER + one for one in known)}, got {name!r}"
            ) from error

    def _network(self, weights: dict[str, Tensor], device: torch.device | str) -> ScoreModel:
        model = new_network(self.config)
        model.load_state_dict(weights)
        return model.to(device).eval()


def average_name(decay: float) -> str:
    """How a checkpoint calls the average of a decay: ``"0.99"``."""
    return f"{decay:.10g}"


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint so that, whatever happens meanwhile, ``path`` holds the old one or the new one, whole.

    Raises:
        CheckpointError: it could not be written (no space, no permission); what was at ``path`` is still there.
    """
    # Not dataclasses.asdict, which would copy every tensor.
    contents = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(Checkpoint)}
    contents["config"] = config_to_dict(checkpoint.config)
    # Into memory first: an exception inside torch.save's writer would be reported as a broken archive, not as what
    # went wrong with the disk.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **contents}, buffer)
    path = Path(path)
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        kept = "; the one written before it is kept" if path.exists() else ""
        raise CheckpointError(
            f"could not write the checkpoint {path}: {error.strerror or error}{kept}"
        ) from error


def load_checkpoint(path: str | Path, config: Any = None) -> Checkpoint:
    """Read what :func:`save_checkpoint` wrote, onto the CPU. Only tensors and plain values are unpickled.

    Args:
        path: the file.
        config: what the checkpoint's configuration must be, if given.

    Raises:
        FileNotFoundError: no file at ``path``.
        CheckpointError: a truncated file, a file of another kind, a checkpoint of a newer version or of another
            configuration; the message says which, and names the fields that differ.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    check_archive(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of ncsn_fast") from error
    if not isinstance(contents, dict) or contents.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{path} was saved by torch.save, but is not a checkpoint of ncsn_fast"
        )
    version = contents.pop("version", None)
    if version != VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {version!r}; this ncsn_fast reads version {VERSION}"
        )
    try:
        checkpoint = Checkpoint(**contents)
        checkpoint.config = config_from_dict(checkpoint.config)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} lacks or has other parts than a checkpoint: {error}"
        ) from error
    if config is not None:
        different = differences(config_to_dict(checkpoint.config), config_to_dict(config))
        if different:
            raise CheckpointError(f"{path} is a checkpoint of another configuration: {different}")
    return checkpoint


def load_model(
    path: str | Path, device: torch.device | str = "cpu", *, weights: str = "ema"
) -> tuple[ScoreModel, tuple[int, ...] | None]:
    """A trained network for sampling, of whatever class, whatever form it was kept in.

    Args:
        path: a checkpoint file, the output folder of a training run (its checkpoint is used), a folder written
            by ``save_pretrained``, or, where nothing is at that path, the name of a network that comes with the
            package, such as ``"digits"``.
        device: where to put the network.
        weights: of a checkpoint, ``"ema"``, the moving average; ``"ema:0.99"``, that of another decay, if the run kept
            one (``ema_decays``); or ``"last"``, those of the last step.

    Returns:
        The network in evaluation mode, and the height and width of its training images, empty if it was trained on
        points; ``None`` if they are not known, as of a model that was not saved by a training run.

    Raises:
        FileNotFoundError: nothing there, or a folder that holds neither.
        CheckpointError: a file that is no whole checkpoint, or weights that do not fit their configuration.
        ValueError: other weights than ``"ema"`` of a folder that holds only one set of them; an average that the run
            did not keep.
    """
    if not weights.startswith(OTHER):
        one_of("weights", weights, WEIGHTS)
    path = find_saved(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a checkpoint file, a model folder, or the name of a network that comes "
            f"with the package ({', '.join(shipped_names())})"
        )
    if path.is_dir() and (path / CHECKPOINT_NAME).is_file():
        path = path / CHECKPOINT_NAME
    if path.is_file():
        checkpoint = load_checkpoint(path)
        chosen = checkpoint.weights(weights)
        try:
            model = checkpoint._network(chosen, device)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"{path} holds weights that do not fit its configuration: {error}"
            ) from error
        model.tuned = load_tuned(path)
        return model, checkpoint.image_size
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"the folder {path} holds neither {CHECKPOINT_NAME} nor a model of save_pretrained (config.json)"
        )
    if weights != "ema":
        raise ValueError(
            f"{path} holds one set of weights, the moving average if a run wrote it: give the run's folder or its "
            f"{CHECKPOINT_NAME} for the last ones"
        )
    try:
        model = load_pretrained(path, map_location=device)
        size_file = path / IMAGE_SIZE_NAME
        if not size_file.is_file():
            return model, None
        return model, tuple(int(side) for side in json.loads(size_file.read_text()))
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} does not hold a whole model: {error}") from error


def save_model(model: ScoreModel, folder: str | Path, image_size: tuple[int, ...] | None) -> None:
    """``model.save_pretrained(folder)`` and the size of its images if it is known, each file replaced whole.

    Raises:
        CheckpointError: it could not be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
            model.save_pretrained(temporary)
            if image_size is None:
                (folder / IMAGE_SIZE_NAME).unlink(missing_ok=True)
            else:
                (Path(temporary) / IMAGE_SIZE_NAME).write_text(json.dumps(image_size) + "\n")
            # The weights before the config would be worse: a reader takes the config as the sign of a model.
            for file in sorted(Path(temporary).iterdir(), key=lambda f: f.name == "config.json"):
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write the model to {folder}: {error}") from error
