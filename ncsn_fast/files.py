"""Files that are whole or not there, and the look at an archive before anything in it is unpickled.

Belongs here: safe writing and safe opening of files, whatever they hold. Does not belong here: what is in them
(``training/checkpoints.py``, ``models/pretrained.py``, ``data/images.py``).
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path

ZIP_MAGIC = b"PK\x03\x04"  # torch.save writes zip archives


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, could not be read, or belongs to something else."""


def write_atomically(path: Path, contents: bytes | memoryview) -> None:
    """Write a file by way of a temporary one beside it: flushed, fsynced, renamed, and the folder fsynced.

    On failure the temporary file is removed and what was at ``path`` stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # not the temporary one, of which nobody knows
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_archive(path: Path) -> None:
    """Tell a file that is no checkpoint from a damaged one, before anything in it is unpickled."""
    with open(path, "rb") as file:
        start = file.read(len(ZIP_MAGIC))
    if not start:
        raise CheckpointError(f"{path} is empty, not a checkpoint")
    if start != ZIP_MAGIC:
        raise CheckpointError(f"{path} is not a checkpoint of ncsn_fast")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is truncated: {path.stat().st_size} bytes, without the end of the archive"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
