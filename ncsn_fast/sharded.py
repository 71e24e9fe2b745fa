"""Many samples into a folder, by one process or by those of torchrun: shared out, written whole, resumed.

Belongs here: which process draws what, files and their names, the manifest, progress, what happens when a process dies.
Does not belong here: how samples are drawn (``sampling.py``), options and their help (``cli.py``).

Sample i depends on the seed and on i, and the batches are cut at the same places whatever the number of processes. So
the folder holds the same files however often the work was stopped and with however many processes it went on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoints import differences, write_atomically
from .data import to_uint8

MANIFEST = "manifest.json"
FORMATS = ("png", "npz")
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
) -> None:
    """Draw samples 0 .. n-1 in batches, those of this process, and wait for the other processes.

    A batch that is in the folder already is not drawn again; so a run that was killed loses the batches it was at.
    Every file appears whole, under its name, or not at all.

    Args:
        draw: ``draw(begin, size)`` gives the samples from number ``begin`` on, ``(size, C, H, W)`` in [-1, 1].
        folder: is made if need be; all processes must see the same.
        n: how many samples.
        batch: how many are drawn at once; batch b is drawn by process ``b % world``.
        settings: everything else that the samples depend on, as plain JSON values. Kept in the manifest; a folder made
            with others is refused.
        file_format: ``"png"``, a picture each, ``0000.png`` and so on; or ``"npz"``, an array ``images``, float32, for
            each batch, ``0000-0255.npz``.
        rank, world: this process and how many there are, from :func:`processes`.
        verbose: show in process 0 how many samples of all processes are there.

    Raises:
        ValueError: the folder holds samples made with other settings, or of unknown ones.
        ShardError: another process has died.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    digits = max(4, math.ceil(math.log10(n + 1)))
    settings = {"n": n, "batch": batch, "format": file_format, **settings}
    _agree(lambda: _prepare(folder, settings), rank, world)

    batches = [(begin, min(begin + batch, n)) for begin in range(0, n, batch)]

    def names(begin: int, end: int) -> list[str]:
        if file_format == "npz":
            return [f"{begin:0{digits}d}-{end - 1:0{digits}d}.npz"]
        return [f"{i:0{digits}d}.png" for i in range(begin, end)]

    def count() -> int:
        there = _listing(folder)
        return sum(end - begin for begin, end in batches if there.issuperset(names(begin, end)))

    there = _listing(folder)
    with tqdm(total=n, desc="samples", unit="", disable=not verbose or rank > 0) as bar:

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
        # As it would be read back: a tuple becomes a list.
        different = differences(held, json.loads(json.dumps(settings)))
        if different:
            raise ValueError(
                f"{folder} holds samples with other settings: {different}; choose another folder, or delete this one"
            )
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
