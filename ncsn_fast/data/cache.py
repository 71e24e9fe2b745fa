"""Images decoded once: into memory, or into a memory-mapped file of bytes that later runs and processes read.

Belongs here: decoding a whole source, what is said of images that cannot be read, the cache file and its lock. Does not
belong here: what a source holds (``sources.py``), one image (``images.py``), batches (``dataset.py``).

A cache is two files: the bytes of all images, ``(N, C, H, W)`` without a header, and a JSON file that says of what
they were made. The JSON comes last, so that a cache is whole or not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from ..files import write_atomically
from ..progress import progress
from .images import Background, check_background, from_uint8, read_pixels, resize_pixels
from .sources import Item, Report, Source

VERSION = 1  # of what a cache holds: a change in decoding makes the old ones void
CHUNK = 256  # images that are decoded before they are written
MOST_CORRUPT = 0.01
SHOWN = 3  # names of corrupt images in a message
THREADS = 8  # at most: pillow decodes without the interpreter's lock


@dataclasses.dataclass(frozen=True)
class Decoded:
    """All images of a source.

    Attributes:
        pixels: uint8 ``(N, C, H, W)``, in memory or mapped read-only.
        fingerprint: of the values in [-1, 1], see :attr:`~ncsn_fast.data.ImageDataset.fingerprint`.
        ends: the lowest and the highest byte.
        remarks: lines on what was skipped or rounded; empty if nothing was.
    """

    pixels: np.ndarray
    fingerprint: str
    ends: tuple[int, int]
    remarks: list[str]


@dataclasses.dataclass(frozen=True)
class How:
    """What decoding makes of an image, whatever it is: ``(channels, image_size, image_size)``."""

    image_size: int
    channels: int
    background: Background

    def as_state(self) -> dict[str, Any]:
        state = dataclasses.asdict(self) | {"background": list(check_background(self.background))}
        return state | {"version": VERSION}


def decode(source: Source, how: How, *, verbose: bool) -> Decoded:
    """All images of a source in memory, a byte a value.

    Raises:
        ValueError: more than one image in a hundred cannot be read; or none is left.
    """
    decoder = _Decoder(source, how)
    chunks = list(decoder.chunks(verbose))
    return decoder.result(np.concatenate(chunks))


def open_cache(source: Source, how: How, folder: Path, *, verbose: bool, report: Report) -> Decoded:
    """The images of a source, mapped from the cache in a folder, which is made or made anew if need be.

    Of several processes that ask at once, one decodes and the others wait.

    Args:
        folder: made if it is not there.
        report: is told when another process is waited for.

    Raises:
        OSError: the folder cannot be written, or the disk is full; no part of a cache is left.
        ValueError: as of :func:`decode`.
    """
    settings = how.as_state()
    name = hashlib.sha256(json.dumps([source.name, settings]).encode()).hexdigest()[:16]
    files = folder / f"{name}.u8", folder / f"{name}.json"
    wanted = {"source": source.name, "state": source.state, "settings": settings}
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f"{name}.lock", report):
        held = _read(*files, wanted)
        return _build(source, how, *files, wanted, verbose) if held is None else held


def _build(
    source: Source, how: How, pixels: Path, about: Path, wanted: dict[str, Any], verbose: bool
) -> Decoded:
    for left in pixels.parent.glob(f".{pixels.name}.*.tmp"):  # of a process that was killed
        left.unlink(missing_ok=True)
    temporary = pixels.with_name(f".{pixels.name}.{os.getpid()}.tmp")
    decoder = _Decoder(source, how)
    try:
        with open(temporary, "wb") as file:
            for chunk in decoder.chunks(verbose):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        about.unlink(missing_ok=True)  # before the bytes it belongs to go
        os.replace(temporary, pixels)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(pixels)
        raise
    shape = decoder.count, *decoder.shape
    made = decoder.result(_map(pixels, shape))
    contents = wanted | {
        "shape": shape,
        "fingerprint": made.fingerprint,
        "ends": made.ends,
        "remarks": made.remarks,
    }
    write_atomically(about, (json.dumps(contents, indent=1) + "\n").encode())
    return made


def _read(pixels: Path, about: Path, wanted: dict[str, Any]) -> Decoded | None:
    """A cache that was made of what is wanted; ``None`` if there is none, or not a whole one."""
    try:
        held = json.loads(about.read_text())
        same = {key: held[key] for key in wanted} == json.loads(json.dumps(wanted))
        shape = tuple(held["shape"])
        if not same or pixels.stat().st_size != np.prod(shape, dtype=np.int64):
            return None
        mapped = _map(pixels, shape)
        return Decoded(mapped, held["fingerprint"], tuple(held["ends"]), held["remarks"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _map(pixels: Path, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(pixels, np.uint8, "r", shape=shape)


@contextlib.contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """One process at a time, where there are locks; it goes with the process, however that ends.

    Without locks several may decode; each puts a whole cache in place.
    """
    if fcntl is None:
        yield
        return
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another process reads these images into {path.parent}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


class _Decoder:
    """The images of a source as bytes, chunk by chunk, and what is to be said of all of them at the end."""

    def __init__(self, source: Source, how: How) -> None:
        self.source, self.how = source, how
        self.shape = how.channels, how.image_size, how.image_size
        self.count = self.seen = self.rounded = 0
        self.ends = 255, 0
        self.corrupt: list[str] = []  # messages, of the first ones only
        self.corrupt_count = 0
        self._digest = hashlib.sha256()

    def chunks(self, verbose: bool) -> Iterator[np.ndarray]:
        """uint8 ``(n, C, H, W)``, one after the other, none empty."""
        items = self.source.items()
        threads = min(THREADS, os.cpu_count() or 1)
        with (
            ThreadPoolExecutor(threads) as pool,
            progress(self.source.total, shown=verbose, desc="reading images", unit="image") as bar,
        ):
            while some := list(itertools.islice(items, CHUNK)):
                # In turns of one thread each: images are small, and handing over a single one costs as much.
                parts = pool.map(self._decode_some, [some[i::threads] for i in range(threads)])
                images: list[np.ndarray | str] = [""] * len(some)
                for i, part in enumerate(parts):
                    images[i::threads] = part
                good = [image for image in images if not isinstance(image, str)]
                self._note_corrupt([image for image in images if isinstance(image, str)])
                self.seen += len(some)
                bar.update(len(some))
                if good:
                    yield self._as_bytes(good)
        self._check_corrupt(self.seen)
        if not self.count:
            raise ValueError(f"{self.source.name} holds no image")

    def result(self, pixels: np.ndarray) -> Decoded:
        remarks = []
        if self.corrupt_count:
            remarks.append(f"skipped {self._corrupt_line(self.seen)}")
        if self.rounded:
            remarks.append(
                f"{self.rounded} images with more than 8 bits a value are kept with 8 bits"
            )
        return Decoded(pixels, self._digest.hexdigest()[:16], self.ends, remarks)

    def _decode_some(self, items: list[tuple[str, Item]]) -> list[np.ndarray | str]:
        """Images, or why one cannot be had."""
        result: list[np.ndarray | str] = []
        for name, item in items:
            try:
                result.append(self._decode(name, item))
            except ValueError as error:
                result.append(str(error))
        return result

    def _decode(self, name: str, item: Item) -> np.ndarray:
        size, channels = self.how.image_size, self.how.channels
        if isinstance(item, ValueError):
            raise item
        if isinstance(item, np.ndarray):
            if item.shape == (size, size):
                return np.broadcast_to(item, self.shape)
            return resize_pixels(item, size, channels)
        file = BytesIO(item) if isinstance(item, bytes) else item
        return read_pixels(file, size, channels, background=self.how.background, name=name)

    def _as_bytes(self, images: list[np.ndarray]) -> np.ndarray:
        chunk = np.empty((len(images), *self.shape), np.uint8)
        for row, image in zip(chunk, images, strict=True):
            if image.dtype != np.uint8:
                self.rounded += 1
                image = image.round()
            row[...] = image
        self.count += len(chunk)
        self.ends = min(self.ends[0], int(chunk.min())), max(self.ends[1], int(chunk.max()))
        self._digest.update(from_uint8(chunk).numpy())
        return chunk

    def _note_corrupt(self, messages: list[str]) -> None:
        self.corrupt_count += len(messages)
        self.corrupt += messages[: SHOWN - len(self.corrupt)]
        if self.source.total is not None:  # no need to read on
            self._check_corrupt(self.source.total)

    def _check_corrupt(self, total: int) -> None:
        if self.corrupt_count > MOST_CORRUPT * total:
            raise ValueError(
                f"too many images cannot be read, more than {MOST_CORRUPT:.0%}: {self._corrupt_line(total)}"
            )

    def _corrupt_line(self, total: int) -> str:
        more = self.corrupt_count - len(self.corrupt)
        names = "; ".join(self.corrupt) + (f"; and {more} more" if more else "")
        return f"{self.corrupt_count} of {total} images that cannot be read: {names}"
