"""Saved models: where their files are, and how weights get from a file into a model.

Belongs here: what ``NCSN.from_pretrained`` and ``NCSN.load_state_dict`` need beyond PyTorch. Does
not belong here: checkpoints of a training run, which hold an optimiser as well.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from ..distributed import INNER_NAMES
from .layers import CondInstanceNorm

CONFIG_FILE = constants.CONFIG_NAME
WEIGHTS_FILE = constants.SAFETENSORS_SINGLE_FILE
MESSAGE_LIMIT = 1000  # characters


def find_file(source: str, filename: str, download: dict[str, Any]) -> Path:
    """The path of a file of a saved model, in a folder or downloaded from the Hub."""
    folder = Path(source)
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
            f"{source} is no folder on this machine, and {filename} could not be had from a model "
            f"of that name on the Hugging Face Hub: {error}"
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


def drop_running_statistics(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """Drop the running statistics that lucid saves under every norm; an NCSN uses none."""
    dropped = 0
    for name, module in model.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(module, CondInstanceNorm):
            for statistic in ("running_mean", "running_var"):
                dropped += state_dict.pop(f"{name}.norm.{statistic}", None) is not None
    if dropped:
        warnings.warn(
            f"dropped {dropped} running_mean and running_var entries of the state dict: "
            "norms use the statistics of each image",
            stacklevel=2,
        )
