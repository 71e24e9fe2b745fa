"""Many samples into a folder, by one process or by those of torchrun: shared out, written whole, resumed.

Belongs here: which process draws what, files and their names, the manifest, progress, what happens when a process dies.
Does not belong here: how samples are drawn (``run.py``), options and their help (``cli``).

Sample i depends on the seed and on i, and the batches are cut at the same places whatever the number of processes. So
the folder holds the same files however often the work was stopped and with however many processes it went on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import differences
from ..data import to_uint8
from ..files import write_atomically
from ..progress import progress

MANIFEST = "manifest.json"
FORMATS = ("png", "npz")
PNG_END = b"IEND\xaeB`\x82"  # the last chunk's name and checksum
POLL_SECONDS = 0.5
# Waiting for the slowest process is no error; one that has died closes its connection, which is noticed at once.
PATIENCE = timedelta(days=30)


class ShardError(RuntimeError):
    """The processes could not finish together; what they have written stays and is not drawn again."""


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Rank and number of the processes that torchrun has started; 0 and 1 without it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    rank, world = dist.get_rank(), dist.get_world_size()

    def stop(*_: object) -> None:
        raise ShardError(
            f"rank {rank} of {world} was told to stop (SIGTERM), as happens when another rank has died"
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield rank, world
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def sample_to_folder(
    draw: Callable[[int, int], Tensor],
    folder: str | Path,
    n: int,
    batch: int,
    settings: dict[str, Any],
    *,
    file_format: str = "png",
    rank: int = 0,
    world: int = 1,
    verbose: bool = True,
    say: Callable[[str], object] = print,
) -> None:
    """Draw samples 0 .. n-1 in batches, those of this process, and wait for the other processes.

    A batch that is in the folder already is not drawn again; so a run that was killed loses the batches it was at.
    Every file appears whole, under its name, or not at all; one that was damaged since, emptied or cut, is drawn again.

    Args:
        draw: ``draw(begin, size)`` gives the samples from number ``begin`` on, ``(size, C, H, W)`` in [-1, 1].
        folder: is made if need be; all processes must see the same.
        n: how many samples; the folder may hold fewer, and is extended.
        batch: how many are drawn at once; batch b is drawn by process ``b % world``.
        settings: everything else that the samples depend on, as plain JSON values. Kept in the manifest; a folder made
            with others is refused.
        file_format: ``"png"``, a picture each, ``0000.png`` and so on; or ``"npz"``, an array ``images``, float32, for
            each batch, ``0000-0255.npz``.
        rank, world: this process and how many there are, from :func:`processes`.
        verbose: show in process 0 how many samples of all processes are there.
        say: is told in a sentence what was damaged.

    Raises:
        ValueError: the folder holds samples made with other settings, of unknown ones, or more than n.
        ShardError: another process has died.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    settings = {"n": n, "batch": batch, "format": file_format, **settings}
    _agree(lambda: _prepare(folder, settings), rank, world)

    batches = [(begin, min(begin + batch, n)) for begin in range(0, n, batch)]

    def names(begin: int, end: int) -> list[str]:
        return _names(begin, end, n, file_format)

    def count() -> int:
        there = _listing(folder)
        return sum(end - begin for begin, end in batches if there.issuperset(names(begin, end)))

    there = _listing(folder)
    damaged = []
    for begin, end in batches[rank::world]:
        size = end - begin if file_format == "npz" else 1
        for name in there.intersection(names(begin, end)):
            if not _is_whole(folder / name, size):
                (folder / name).unlink()
                damaged.append(name)
    if damaged:
        there = _listing(folder)
        first = ", ".join(sorted(damaged)[:3])
        say(f"{len(damaged)} damaged files are drawn again: {first}{', ...' * (len(damaged) > 3)}")
    with progress(n, shown=verbose and rank == 0, desc="samples", unit="") as bar:

        def show() -> None:
            if not bar.disable:
                bar.n = count()
                bar.refresh()

        show()
        for begin, end in batches[rank::world]:
            if not there.issuperset(names(begin, end)):
                _write(draw(begin, end - begin), folder, names(begin, end))
                show()
        if world > 1:
            _wait_for_all(show)
        show()


def fingerprint(model: nn.Module) -> str:
    """A short hash of a network's configuration and weights, for the manifest."""
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _names(begin: int, end: int, n: int, file_format: str) -> list[str]:
    """The files of samples begin .. end - 1 of n."""
    digits = max(4, len(str(n)))
    if file_format == "npz":
        return [f"{begin:0{digits}d}-{end - 1:0{digits}d}.npz"]
    return [f"{i:0{digits}d}.png" for i in range(begin, end)]


def _is_whole(path: Path, size: int) -> bool:
    """Whether a file of samples can be read to its end, by its own checksums; OSError if it cannot be opened."""
    data = path.read_bytes()
    contents = io.BytesIO(data)
    try:
        if path.suffix == ".npz":
            with np.load(contents) as arrays:
                return len(arrays["images"]) == size
        from PIL import Image

        with Image.open(contents, formats=("PNG",)) as picture:
            picture.verify()
        return data.endswith(PNG_END)  # whose checksum pillow does not look at
    except (OSError, SyntaxError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def _extend(folder: Path, n: int, batch: int, file_format: str) -> None:
    """Make the files of a folder of fewer samples those of one of n; safe to be stopped and done again."""
    for name in sorted(_listing(folder)):
        found = re.fullmatch(rf"(\d+)(?:-(\d+))?\.{file_format}", name)
        if found is None:
            continue
        begin, last = int(found[1]), int(found[2] or found[1])
        if file_format == "npz" and last + 1 != min(begin + batch, n):
            (folder / name).unlink()  # the last batch was smaller than it is now: drawn anew
            continue
        (wanted,) = _names(begin, last + 1, n, file_format)
        if name != wanted:
            os.replace(folder / name, folder / wanted)


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """The folder and its manifest; ValueError if it belongs to something else."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.tmp"):  # of a process that was killed while writing
        left.unlink()
    manifest = folder / MANIFEST
    if manifest.exists():
        try:
            held = json.loads(manifest.read_text())
        except ValueError as error:
            raise ValueError(f"{manifest} cannot be read: {error}") from error
        if not isinstance(held, dict) or not isinstance(held.get("n"), int):
            raise ValueError(
                f"{manifest} cannot be read: it does not say how many samples there are"
            )
        fewer, n = held["n"], settings["n"]
        # As it would be read back: a tuple becomes a list.
        different = differences(held | {"n": n}, json.loads(json.dumps(settings)))
        if different:
            raise ValueError(
                f"{folder} holds samples with other settings: {different}; choose another folder, or delete this one"
            )
        if n < fewer:
            raise ValueError(
                f"{folder} is one of {fewer} samples, and {n} were asked for: it can be extended, not cut; "
                f"ask for {fewer} or more, or choose another folder"
            )
        if n == fewer:
            return
        _extend(folder, n, settings["batch"], settings["format"])
        write_atomically(manifest, (json.dumps(settings, indent=2) + "\n").encode())
        return
    foreign = sorted(
        f.name for f in folder.iterdir() if f.suffix in {f".{kind}" for kind in FORMATS}
    )
    if foreign:
        raise ValueError(
            f"{folder} holds {foreign[0]} but no {MANIFEST} that says how it was drawn: choose another folder"
        )
    write_atomically(manifest, (json.dumps(settings, indent=2) + "\n").encode())


def _agree(prepare: Callable[[], None], rank: int, world: int) -> None:
    """Process 0 prepares; the others wait, and fail as it does."""
    if world == 1:
        prepare()
        return
    failure: list[str | None] = [None]
    if rank == 0:
        try:
            prepare()
        except (ValueError, OSError) as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise ValueError(failure[0])


def _wait_for_all(show: Callable[[], None]) -> None:
    try:
        waiting = dist.barrier(async_op=True)
        while not waiting.is_completed():
            show()
            time.sleep(POLL_SECONDS)
        waiting.wait()
    except RuntimeError as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError("another rank has died before its samples were drawn") from error


def _listing(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)}


def _write(images: Tensor, folder: Path, names: list[str]) -> None:
    """The samples of a batch, in one file or in one each."""
    if len(names) == 1 and names[0].endswith(".npz"):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images.float().cpu().numpy())
        write_atomically(folder / names[0], buffer.getvalue())
        return
    from PIL import Image

    for name, pixels in zip(names, to_uint8(images).permute(0, 2, 3, 1).numpy(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
        write_atomically(folder / name, buffer.getvalue())
