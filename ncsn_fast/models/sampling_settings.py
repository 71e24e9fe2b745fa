"""How the samples of a saved network are drawn unless something else is asked for: a small file beside its weights.

Belongs here: that file. Does not belong here: what each option means (``sampling``), published settings (``presets/``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import CheckpointError, write_atomically
from .shipped import find_saved

SAMPLING_NAME = "sampling.json"
# Options of a network's ``sample`` that the file may hold, with the kind of each.
KINDS: Mapping[str, type] = {
    "sampler": str,
    "n_steps_each": int,
    "step_lr": float,
    "denoise": bool,
    "init_dist": str,
    "clip": bool,
}


def save_sampling(folder: str | Path, options: Mapping[str, Any]) -> None:
    """Write options of ``sample`` into a folder, beside a model or a checkpoint; none take the file away.

    Raises:
        TypeError: an option that the file does not hold, or of another type.
        OSError: it could not be written.
    """
    path = Path(folder) / SAMPLING_NAME
    if not options:
        path.unlink(missing_ok=True)
        return
    write_atomically(path, (json.dumps(check_sampling(options), indent=1) + "\n").encode())


def load_sampling(source: str | Path) -> dict[str, Any]:
    """The options of ``sample`` of a model's or run's folder, or of a file in it; empty if none were saved.

    The name of a network that comes with the package stands for its folder.

    Raises:
        CheckpointError: the file is damaged.

    Example::

        >>> model.sample(16, 32, **load_sampling("model"))  # doctest: +SKIP
    """
    source = find_saved(source)
    path = (source.parent if source.is_file() else source) / SAMPLING_NAME
    if not path.is_file():
        return {}
    try:
        return check_sampling(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold options of sampling: {error}") from error


def check_sampling(options: Any) -> dict[str, Any]:
    """The options as a dict. TypeError: one that the file does not hold, or of another type."""
    if not isinstance(options, Mapping):
        raise TypeError(f"sampling must be a mapping, got {type(options).__name__}")
    for name, value in options.items():
        if name not in KINDS:
            raise TypeError(f"sampling has {name!r}, which is none of {', '.join(KINDS)}")
        if type(value) is not KINDS[name]:
            raise TypeError(f"sampling: {name} must be {KINDS[name].__name__}, got {value!r}")
    return dict(options)
