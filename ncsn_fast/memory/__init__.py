"""What the C library does with memory that was freed: give it back to the system, or keep it for the next result.

Belongs here: glibc's two settings of it. Does not belong here: torch, whose results on a CPU lie in this memory; the
memory of a GPU, which torch keeps by itself.

A block of more than 32 MiB glibc gives back at once, and the system hands out every page of the next one anew, cleared:
for an operator that does little arithmetic, that is most of the time.
"""

from __future__ import annotations

import ctypes
import sys

KEPT = 1 << 30  # bytes
# mallopt(3): the parameters, and glibc's own values.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_state = {"limit": 0}
_GIVE_BACK = {_TRIM_THRESHOLD: 128 << 10, _MMAP_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}


def why_not() -> str | None:
    """Why freed memory cannot be kept here; None where it can."""
    if not sys.platform.startswith("linux"):
        return f"it takes glibc's mallopt, which {sys.platform} does not have"
    if not hasattr(_library(), "gnu_get_libc_version"):
        return "it takes glibc's mallopt, and the C library is another one"
    return None


def keep_freed_memory(limit: int = KEPT) -> None:
    """Let this process keep memory that it frees, for what it allocates next: large results on a CPU cost less then.

    For the whole process, and from now on; blocks of other threads than the main one may still be given back. The
    command ``ncsn-fast`` calls it.

    Args:
        limit: bytes that are kept at most at the end of the heap, below 2**31; 0 for glibc's defaults again.

    Raises:
        TypeError, ValueError: a limit that is no such number.
        RuntimeError: a C library other than glibc.
    """
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit must be an int of bytes, got {type(limit).__name__}")
    if not 0 <= limit < 2**31:
        raise ValueError(f"limit must be in 0 .. 2**31 - 1 bytes, got {limit}")
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"freed memory cannot be kept: {reason}")
    settings = {_TRIM_THRESHOLD: limit, _MMAP_MAX: 0} if limit else _GIVE_BACK
    for parameter, value in settings.items():
        if _library().mallopt(parameter, value) != 1:
            raise RuntimeError(f"freed memory cannot be kept: mallopt({parameter}, {value}) failed")
    _state["limit"] = limit
    if not limit:
        release_memory()


def kept() -> int:
    """The limit in force, in bytes; 0 where :func:`keep_freed_memory` has not set one."""
    return _state["limit"]


def release_memory() -> None:
    """Give what is kept and free back to the system now.

    Raises:
        RuntimeError: a C library other than glibc.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"memory cannot be released: {reason}")
    _library().malloc_trim(0)


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
