"""Where images come from one by one: a folder, a zip archive, an IDX file, a data set of the Hugging Face Hub.

Belongs here: which images a source holds, in which order, and what tells one state of it from another. Does not belong
here: decoding (``images.py``), keeping what was decoded (``cache.py``), arrays, which need no decoding
(``folders.py``).
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from .folders import find_images, image_suffixes, left_behind, other_kind, tell_skipped

HUB = "hf:"
GZIP_MAGIC = b"\x1f\x8b"
IDX_UINT8 = 0x08
COUNT = 4  # bytes of one size in the header of an IDX file

Report = Callable[[str], object]
# A file by its name, the bytes of one, or pixels, uint8 (H, W); or why this one image cannot be had.
Item = Path | bytes | np.ndarray | ValueError


@dataclasses.dataclass(frozen=True)
class Source:
    """Images that are decoded one by one.

    Attributes:
        name: for messages, and as what a cache is kept under.
        state: changes whenever the images may have changed; plain values.
        items: iterates over names and images, always in the same order.
        total: how many images there are; ``None`` if only the end will tell.
    """

    name: str
    state: dict[str, Any]
    items: Callable[[], Iterator[tuple[str, Item]]]
    total: int | None = None


def open_source(data: str | Path, report: Report) -> Source:
    """The images of a folder, a file or a data set of the Hub, not yet read.

    Args:
        data: as of :func:`~ncsn_fast.data.open_images`, but for arrays and the digits.
        report: is given the line on what was skipped in a folder or an archive, if anything was.

    Raises:
        FileNotFoundError: nothing is there.
        PermissionError: a folder or a file that may not be read.
        ValueError: no image in it, or another kind of file.
        ImportError: pillow, or ``datasets`` for the Hub, is not installed.
    """
    if str(data).startswith(HUB):
        return _of_hub(str(data))
    path = Path(data).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"the data path {path} does not exist")
    if path.is_dir():
        return _of_folder(path, report)
    if path.suffix.lower() == ".zip":
        return _of_zip(path, report)
    if path.suffix.lower() not in image_suffixes():
        return _of_idx(path)
    return Source(
        str(path.resolve()), _state([path], path.parent), lambda: iter([(str(path), path)]), 1
    )


def _of_folder(folder: Path, report: Report) -> Source:
    files, skipped = find_images(folder)
    tell_skipped("folder", folder, files, skipped, report)
    return Source(
        str(folder.resolve()),
        _state(files, folder),
        lambda: ((str(file), file) for file in files),
        len(files),
    )


def _state(files: list[Path], base: Path) -> dict[str, Any]:
    """Names below a folder, sizes and times of files, in short."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        line = f"{file.relative_to(base)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogatepass"))
    return {"files": len(files), "digest": digest.hexdigest()[:32]}


def _of_zip(path: Path, report: Report) -> Source:
    suffixes = image_suffixes()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [info.filename for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"cannot read {path} as a zip archive: {error}") from error
    names: list[str] = []
    skipped: Counter[str] = Counter()
    for entry in sorted(set(entries)):
        parts = PurePosixPath(entry).parts
        kinds = [kind for part in parts if (kind := left_behind(part))]
        kind = kinds[0] if kinds else other_kind(parts[-1], suffixes)
        if kind:
            skipped[kind] += 1
        else:
            names.append(entry)
    tell_skipped("archive", path, names, skipped, report)

    def items() -> Iterator[tuple[str, Item]]:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                try:
                    contents: Item = archive.read(name)
                except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                    contents = ValueError(f"cannot read {name} in {path}: {error}")
                yield f"{path}/{name}", contents

    return Source(str(path.resolve()), _state([path], path.parent), items, len(names))


def _of_idx(path: Path) -> Source:
    with _open_idx(path) as file:
        count, *_ = _idx_sizes(file, path)

    def items() -> Iterator[tuple[str, Item]]:
        with _open_idx(path) as file:
            _, height, width = _idx_sizes(file, path)
            for number in range(count):
                try:
                    pixels = file.read(height * width)
                except (EOFError, OSError, zlib.error) as error:
                    raise ValueError(f"cannot read {path} as an IDX file: {error}") from error
                if len(pixels) < height * width:
                    raise ValueError(
                        f"{path} is truncated: it ends in image {number} of the {count} that it names"
                    )
                yield f"{path}[{number}]", np.frombuffer(pixels, np.uint8).reshape(height, width)

    return Source(str(path.resolve()), _state([path], path.parent), items, count)


def _open_idx(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return gzip.open(path, "rb") if packed else open(path, "rb")


def _idx_sizes(file: BinaryIO, path: Path) -> list[int]:
    """The sizes that the header of an IDX file states: images, height and width.

    The format: two bytes of zero, the type of the values, the number of dimensions, and each as 32 bits, big-endian
    (Y. LeCun et al., "The MNIST database of handwritten digits").
    """
    try:
        start = file.read(4)
        known = len(start) == 4 and start[:2] == b"\0\0"
        sizes = file.read(COUNT * start[3]) if known else b""
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"cannot read {path} as an IDX file: {error}") from error
    if not known or len(sizes) < COUNT * start[3]:
        raise ValueError(
            f"{path} is of no known kind: expected a folder or a .zip of images, an image, .npy, .npz, or an IDX file "
            "such as train-images-idx3-ubyte.gz"
        )
    shape = list(struct.unpack(f">{start[3]}I", sizes))
    if len(shape) != 3 or start[2] != IDX_UINT8 or not math.prod(shape):
        hint = "; the labels of images are not needed" if len(shape) == 1 else ""
        raise ValueError(
            f"{path} must hold grey images of uint8, (N, H, W) with N >= 1: its {len(shape)} dimensions are "
            f"{tuple(shape)}, of type 0x{start[2]:02x}{hint}"
        )
    return shape


def _of_hub(data: str) -> Source:
    """``hf:NAME``, ``hf:NAME:COLUMN`` or ``hf:NAME:COLUMN:SPLIT``; or a folder that ``datasets`` can load by itself."""
    name, _, rest = data.removeprefix(HUB).partition(":")
    column, _, split = rest.partition(":")
    split = split or "train"
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'data sets of the Hugging Face Hub take datasets: pip install "ncsn_fast[hf]"'
        ) from error
    if Path(name).is_dir():
        files = sorted(file for file in Path(name).rglob("*") if file.is_file())
        state, pinned = _state(files, Path(name)), {}
    else:
        from huggingface_hub import HfApi

        revision = HfApi().dataset_info(name).sha
        state, pinned = {"revision": revision}, {"revision": revision}
    stream = datasets.load_dataset(name, split=split, streaming=True, **pinned)
    features = stream.features or {}
    pictures = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    column = column or (pictures[0] if len(pictures) == 1 else "")
    if column not in pictures:
        raise ValueError(
            f"{data}: name the column of images as {HUB}{name}:COLUMN; columns of images: "
            f"{pictures or 'none'}, all columns: {list(features) or 'unknown'}"
        )
    # Not decoded by datasets: one broken image would end its stream.
    stream = stream.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def items() -> Iterator[tuple[str, Item]]:
        for number, row in enumerate(stream):
            image = row[column] or {}
            contents = image.get("bytes")
            if contents is None and image.get("path"):
                contents = Path(image["path"])
            yield f"{data}[{number}]", b"" if contents is None else contents

    info = (stream.info.splits or {}).get(split)
    total = info.num_examples if info is not None and info.num_examples else None
    return Source(f"{HUB}{name}", state | {"column": column, "split": split}, items, total)
