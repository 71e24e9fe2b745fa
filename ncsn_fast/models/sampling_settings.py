"""How the samples of a saved network are drawn unless something else is asked for: a small file beside its weights.

Belongs here: that file. It holds options of ``sample``, such as those of a paper, and apart from them what was measured
to be best for few passes. Does not belong here: what each option means (``sampling``), published settings
(``presets/``), measuring (``evaluation/tuning.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checks import positive_int
from ..files import CheckpointError, write_atomically
from ..sampling.samplers import FEW_PASSES, check_options
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
TUNED = "few_passes"  # the name of the other part


def save_sampling(folder: str | Path, options: Mapping[str, Any]) -> None:
    """Write options of ``sample`` into a folder, beside a model or a checkpoint; none take them away.

    What :func:`save_tuned` wrote stays.

    Raises:
        TypeError: an option that the file does not hold, or of another type.
        CheckpointError: the file that is there is damaged.
        OSError: it could not be written.
    """
    _write(Path(folder), check_sampling(options), load_tuned(folder))


def load_sampling(source: str | Path) -> dict[str, Any]:
    """The options of ``sample`` of a model's or run's folder, or of a file in it; empty if none were saved.

    The name of a network that comes with the package stands for its folder.

    Raises:
        CheckpointError: the file is damaged.

    Example::

        >>> model.sample(16, 32, **load_sampling("model"))  # doctest: +SKIP
    """
    return _read(source, lambda held: check_sampling({k: held[k] for k in held if k != TUNED}))


def save_tuned(folder: str | Path, choice: Mapping[str, Any]) -> None:
    """Write what ``sampler="auto"`` shall take for a network: options of ``sample``, ``sampler`` and ``passes`` too.

    Raises:
        TypeError, ValueError: no sampler for few passes, or an option that it does not take.
        CheckpointError: the file that is there is damaged.
        OSError: it could not be written.
    """
    _write(Path(folder), load_sampling(folder), check_tuned(choice))


def load_tuned(source: str | Path) -> dict[str, Any]:
    """What :func:`save_tuned` wrote into a folder, or the folder of a file; empty if nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    return _read(source, lambda held: check_tuned(held[TUNED]) if TUNED in held else {})


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


def check_tuned(choice: Any) -> dict[str, Any]:
    """A choice for few passes as a dict. TypeError, ValueError: it is none."""
    if not isinstance(choice, Mapping):
        raise TypeError(f"{TUNED} must be a mapping, got {type(choice).__name__}")
    if choice.get("sampler") not in FEW_PASSES:
        raise ValueError(
            f"{TUNED}: sampler must be one of {', '.join(FEW_PASSES)}, got {choice.get('sampler')!r}"
        )
    positive_int("passes", choice.get("passes"))
    check_options(choice["sampler"], {k: v for k, v in choice.items() if k != "sampler"})
    return dict(choice)


def _path(source: str | Path) -> Path:
    source = find_saved(source)
    return (source.parent if source.is_file() else source) / SAMPLING_NAME


def _read(
    source: str | Path, part: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    path = _path(source)
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise TypeError(f"it holds {type(held).__name__}")
        return part(held)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold options of sampling: {error}") from error


def _write(folder: Path, options: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    path = folder / SAMPLING_NAME
    held = {**options, TUNED: dict(tuned)} if tuned else dict(options)
    if held:
        write_atomically(path, (json.dumps(held, indent=1) + "\n").encode())
    else:
        path.unlink(missing_ok=True)
