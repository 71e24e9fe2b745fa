"""Saved models: where their files are, and how weights get from a file into a model.

Belongs here: :class:`Pretrained`, the saving and loading of every network, and what ``load_state_dict`` needs beyond
PyTorch. Does not belong here: which networks there are (``registry.py``), checkpoints of a training run, which hold an
optimiser as well.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from ..distributed import INNER_NAMES
from .config import article
from .registry import config_fields, network_of, read_config
from .sampling_settings import load_tuned
from .shipped import find_saved, shipped_names

if TYPE_CHECKING:
    from .base import ScoreModel

CONFIG_FILE = constants.CONFIG_NAME
WEIGHTS_FILE = constants.SAFETENSORS_SINGLE_FILE
MESSAGE_LIMIT = 1000  # characters


class Pretrained(PyTorchModelHubMixin):
    """Saving to a folder or the Hugging Face Hub, and loading from there, by the network's configuration."""

    def save_pretrained(
        self, save_directory: str | Path, *, config: Any = None, **options: Any
    ) -> str | None:
        """Write ``config.json``, which names the network, ``model.safetensors`` and a model card into a folder.

        Args:
            save_directory: the folder; made if need be.
            config: in place of the network's own.
            options: as in ``huggingface_hub``.

        Raises:
            TypeError: the network is not registered, so that it could not be found again.
        """
        config = config_fields(self.config) if config is None else config
        return super().save_pretrained(save_directory, config=config, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> ScoreModel:
        """Load what :meth:`save_pretrained` wrote, in evaluation mode. Loading is strict.

        Args:
            pretrained_model_name_or_path: a folder with ``config.json`` and ``model.safetensors``; or the name of
                a network that comes with the package, ``"digits"`` or ``"fashion-mnist"``, for which nothing is
                downloaded; or the name of a model on the Hugging Face Hub. What is there first goes before the others.
            map_location: device of the model.
            revision, token, cache_dir, force_download, local_files_only: as in ``huggingface_hub``.
            overrides: fields of the config to replace, such as ``pool_padding="zero"`` for an NCSN's weights from
                lucid.

        Returns:
            A network of this class; of the class that the folder names, if this is :class:`ScoreModel`.

        Raises:
            FileNotFoundError: no such folder or model, or one of its two files is missing.
            ValueError: a file that is truncated or of another kind, a config of unknown fields or of another network.
            RuntimeError: weights of another configuration.
            TypeError: an override that is no field of the config.
        """
        download = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        source = str(pretrained_model_name_or_path)
        config_file = find_file(source, CONFIG_FILE, download)
        weights_file = find_file(source, WEIGHTS_FILE, download)
        own = network_of(cls.Config) if hasattr(cls, "Config") else None
        config = read_config(config_file, own and own.__name__)
        network = network_of(type(config))
        if own is not None and network is not own:
            raise ValueError(
                f"{config_file} is of {article(network.__name__)}, not of {article(cls.__name__)}: "
                f"{network.__name__}.from_pretrained or load_pretrained loads it"
            )
        model = (network if own is None else cls)(dataclasses.replace(config, **overrides))
        load_weights(model, weights_file)
        model.tuned = load_tuned(weights_file)
        return model.to(map_location).eval()


def find_file(source: str, filename: str, download: dict[str, Any]) -> Path:
    """The path of a file of a saved model: in a folder, in the package, or downloaded from the Hub."""
    folder = find_saved(source)
    if folder.exists():
        if not (folder / filename).is_file():
            raise FileNotFoundError(
                f"{source} must be a folder written by save_pretrained, but {folder / filename} "
                "does not exist"
            )
        return folder / filename
    try:
        return Path(hf_hub_download(source, filename, **download))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source} is no folder on this machine and none of the networks that come with the package "
            f"({', '.join(shipped_names())}), and {filename} could not be had from a model of that name on the "
            f"Hugging Face Hub: {error}"
        ) from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load safetensors strictly, with errors that name the file."""
    try:
        state_dict = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({path.stat().st_size} bytes): {error}"
        ) from error
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        what = str(error)
        if len(what) > MESSAGE_LIMIT:  # every tensor may have its line
            what = what[:MESSAGE_LIMIT] + " ..."
        raise RuntimeError(
            f"{path} holds other weights than those of {model.config}: {what}"
        ) from error


def strip_wrapper_names(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """Give the weights of a wrapped network their own names: those of torch.compile, DDP, FSDP and others.

    ``_orig_mod.stage1.conv.weight`` becomes ``stage1.conv.weight``. What the network itself has under such a name, as
    when one of its layers is compiled, stays.
    """
    own = model.state_dict(prefix=prefix)
    stripped = set()
    for name in [name for name in state_dict if name.startswith(prefix) and name not in own]:
        parts = name.removeprefix(prefix).split(".")
        outer = 0
        while outer < len(parts) and parts[outer] in INNER_NAMES:
            outer += 1
        kept = [part for part in parts[outer:] if part not in INNER_NAMES or part == "module"]
        plain = prefix + ".".join(kept)
        if len(kept) < len(parts) and kept and plain not in state_dict:
            state_dict[plain] = state_dict.pop(name)
            stripped |= set(parts) - set(kept)
    if "module" in stripped:
        state_dict.pop(f"{prefix}n_averaged", None)  # of AveragedModel: how often it was updated
    if stripped:
        warnings.warn(
            f"took {' and '.join(f'{name!r}' for name in sorted(stripped))} out of the names of the state dict: it was "
            "saved from a network inside a wrapper",
            stacklevel=2,
        )
