"""Values of a run in TOML: the presets that come with the package, and files of a user's own.

Belongs here: reading them. Does not belong here: what a value may be and what goes over what (``config.py``).
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    try:
        import tomli as tomllib
    except ImportError:
        tomllib = None

from ..checks import one_of

FEW_PASSES = "few_passes"  # a section of a preset that is no value of a run


def preset_names() -> tuple[str, ...]:
    """The presets that come with the package."""
    files = _presets().iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset, without :func:`read_few_passes`. ValueError: there is none of that name."""
    return {k: v for k, v in _read(name).items() if k != FEW_PASSES}


def read_few_passes(name: str) -> dict[str, Any]:
    """Options of ``sample`` for few passes that a preset has beside its values; empty if none.

    Raises:
        ValueError: there is no preset of that name.
    """
    return dict(_read(name).get(FEW_PASSES, {}))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no TOML; the message names the file and the line.
        ImportError: Python 3.10 without ``tomli``.
    """
    path = Path(path).expanduser()
    return _parse(path.read_bytes(), str(path))


def _read(name: str) -> dict[str, Any]:
    one_of("preset", name, preset_names())
    return _parse((_presets() / f"{name}.toml").read_bytes(), f"preset {name!r}")


def _parse(contents: bytes, source: str) -> dict[str, Any]:
    if tomllib is None:
        raise ImportError(
            "TOML files take Python 3.11 or newer, or tomli: pip install tomli, got "
            f"{source} and neither"
        )
    try:
        return tomllib.loads(contents.decode())
    except ValueError as error:  # also of the decoding
        raise ValueError(f"{source} is no TOML file: {error}") from error


def _presets() -> Any:
    return importlib.resources.files("ncsn_fast") / "presets"
