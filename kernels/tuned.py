"""Tile sizes that were measured on this machine: a small table in the user's cache, read when first needed.

Written by ``python -m ncsn_fast.kernels.tune``. Without it, or on another GPU or Triton than it was measured with,
the heuristics of the kernels' files hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton

Table = dict[str, list[int]]

_table: Table | None = None


def path() -> Path:
    """Where the table lies: ``NCSN_FAST_CACHE``, else the user's cache folder."""
    folder = os.environ.get("NCSN_FAST_CACHE")
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "ncsn_fast"
    return Path(folder) / "triton_tiles.json"


def machine() -> str:
    """What measured sizes hold for."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{device}, triton {triton.__version__}"


def key(kernel: str, channels: int, spatial: int, last: bool, dtype: torch.dtype) -> str:
    """The name of an entry: sizes by the next power of two."""
    channels, spatial = triton.next_power_of_2(channels), triton.next_power_of_2(spatial)
    layout = "channels_last" if last else "contiguous"
    return f"{kernel} {channels}x{spatial} {layout} {dtype.itemsize} bytes"


def conv_key(channels: int, spatial: int, dilation: int, dtype: torch.dtype) -> str:
    """The entry that says whether the convolution beats PyTorch's: ``[1]`` or ``[0]``."""
    return key(f"conv wins, dilation {dilation},", channels, spatial, True, dtype)


def read() -> dict[str, Table]:
    """All tables, by machine; none if there is no file, or one that cannot be read."""
    try:
        tables = json.loads(path().read_text())
    except (OSError, ValueError):
        return {}
    return tables if isinstance(tables, dict) else {}


def table() -> Table:
    """That of this machine, read once."""
    global _table
    if _table is None:
        _table = read().get(machine(), {})
    return _table


def tile(entry: str) -> list[int] | None:
    """Planes, positions and warps that were measured best."""
    return table().get(entry)


@contextmanager
def trial(entry: str, tile: list[int]) -> Iterator[None]:
    """Sizes for the length of a ``with`` block."""
    global _table
    before = table()
    _table = before | {entry: tile}
    try:
        yield
    finally:
        _table = before


def save(entries: Table) -> Path:
    """Adds to the table of this machine, and uses it from now on."""
    global _table
    tables = read()
    _table = tables[machine()] = tables.get(machine(), {}) | entries
    path().parent.mkdir(parents=True, exist_ok=True)
    path().write_text(json.dumps(tables, indent=1) + "\n")
    return path()
