"""The progress bar of every loop, and what is said beside it.

Belongs here: what all bars have in common. Does not belong here: what is counted.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, *, shown: bool, **options: Any) -> tqdm:
    """A tqdm bar on standard error, if it is to be shown and there is one: a windowed program (pythonw) has none."""
    return tqdm(total=total, disable=not shown or sys.stderr is None, **options)


def say(text: str) -> None:
    """A line on standard error that leaves bars whole; nothing where there is no standard error."""
    if sys.stderr is not None:
        tqdm.write(text, file=sys.stderr)
