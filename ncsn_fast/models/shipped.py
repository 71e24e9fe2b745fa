"""The trained networks that come with the package, by their names: ``ncsn_fast/shipped/NAME/``.

Belongs here: which there are, and from a name to its folder. Does not belong here: what is read from a folder
(``pretrained.py``, ``sampling_settings.py``), making one (``demos/ship.py``).
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "shipped"


def shipped_names() -> tuple[str, ...]:
    """The networks that come with the package; nothing is downloaded to load one."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))


def find_saved(source: str | Path) -> Path:
    """Where a saved network is: what is at the path ``source`` if anything is, else the shipped network of that name.

    So a folder ``digits`` in the working directory goes before the network ``digits`` of the package.

    Returns:
        The path, which need not exist.
    """
    path = Path(source).expanduser()
    if not path.exists() and str(source) in shipped_names():
        return SHIPPED / str(source)
    return path
