"""Many images as one tensor: of a folder, or of an array file.

Belongs here: which files are read, in which order, and what is said of the others; arrays. Does not belong here: what
the values of one image file mean (``images.py``), the order in which a training takes them (``training/order.py``).
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checks import positive_int
from .images import WHITE, Background, check_background, from_uint8, read_image
from .ranges import IMAGE_RANGE, check_range

_log = logging.getLogger(__name__)

ARRAY_SUFFIXES = (".npy", ".npz")
# What systems and programs leave in folders, besides names with a dot in front.
SYSTEM_NAMES = {
    "$recycle.bin",
    "#recycle",
    "#snapshot",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "__macosx",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
NOT_PIXELS = ("EPS", "MPEG")  # pillow draws the one by another program, and only tells the other
SHOWN_SUFFIXES = 6  # in the line on what was skipped


def load_images(
    path: str | Path,
    image_size: int,
    channels: int,
    *,
    background: Background = WHITE,
    report: Callable[[str], object] = _log.warning,
) -> Tensor:
    """Images of a folder, or of a NumPy file, as one tensor.

    A folder is read recursively, in the order of the sorted paths; links are followed, and a folder that can be
    reached in several ways is read once. Files are images by their suffix, any that pillow opens. Each is turned
    upright (EXIF), cut to the central square, resized (Lanczos) and converted to grey or RGB; see
    :func:`~ncsn_fast.data.images.read_image` for depths, transparency, frames and colours. Passed over are hidden names
    and those that systems leave behind (``__MACOSX``, ``Thumbs.db``, ...), other suffixes, and links that lead nowhere;
    one line says so. An array file is taken as it is, without resizing.

    Args:
        path: a folder of PNG, JPEG, ... files, one such file, a ``.npy``, or a ``.npz`` with one array (or one named
            ``images``). Arrays are ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``; uint8 in 0..255, or floating
            point already in [-1, 1].
        image_size: height and width H = W of the result.
        channels: 1 for grey, 3 for RGB.
        background: what stands behind transparent pixels: a colour by name or ``"#rrggbb"``, a grey level 0..255 or
            red, green and blue.
        report: is given the line on what was skipped, if anything was; by default it is logged as a warning.

    Returns:
        float32 tensor ``(N, channels, image_size, image_size)`` in [-1, 1], contiguous.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        PermissionError: a folder that may not be read.
        ValueError: no image in the folder; a file that cannot be read as what its name says, or whose values have no
            known range (the message names it); an array of another shape, dtype or range.
        ImportError: pillow is not installed and ``path`` holds image files.

    Warns:
        DataRangeWarning: all the values together look as if they had another range: a floating point array in [0, 1],
            or images that are all almost black, such as masks of 0 and 1.
    """
    path = Path(path).expanduser()
    image_size = positive_int("image_size", image_size)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    if not path.exists():
        raise FileNotFoundError(f"the data path {path} does not exist")
    scaled = True
    if path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES:
        array = read_array(path, image_size, channels)
        scaled = array.dtype == np.uint8
        images = from_uint8(array) if scaled else _floats(array)
    elif path.is_file():
        images = read_image(path, image_size, channels, background=background).unsqueeze(0)
    else:
        check_background(background)
        files, skipped = find_images(path)
        tell_skipped("folder", path, files, skipped, report)
        images = torch.empty(
            (len(files), channels, image_size, image_size), dtype=torch.float32, device="cpu"
        )
        for i, file in enumerate(files):
            images[i] = read_image(file, image_size, channels, background=background)
    check_range(images, IMAGE_RANGE, f"the values of {path}", scaled=scaled)
    return images


def find_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The image files below a folder, sorted by path, and what else is there, counted by kind.

    Raises:
        PermissionError: a folder that may not be read.
    """
    suffixes = image_suffixes()
    files: list[Path] = []
    skipped: Counter[str] = Counter()
    # A link to a folder above would take in what lies beside this one.
    seen = {_identity(above) for above in folder.resolve().parents}
    waiting, links = [folder], []
    while waiting or links:
        # Links come last, so that a folder which is there in its own right is read under its own name.
        below = waiting.pop() if waiting else links.pop(0)
        identity = _identity(below)
        if identity in seen:
            skipped["link to a folder that is read, or above"] += 1
            continue
        seen.add(identity)
        found: list[Path] = []
        for entry in sorted(os.scandir(below), key=lambda entry: entry.name):
            name = entry.name
            if kind := left_behind(name):
                skipped[kind] += 1
            elif os.path.isdir(entry.path):
                (links if entry.is_symlink() else found).append(below / name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                skipped["broken link"] += 1
            elif not os.path.isfile(entry.path):
                skipped["neither file nor folder"] += 1
            elif kind := other_kind(name, suffixes):
                skipped[kind] += 1
            else:
                files.append(below / name)
        waiting += reversed(found)
    return sorted(files), skipped


def left_behind(name: str) -> str:
    """How a file or folder is counted that is hidden or of a system, by its name; empty for any other."""
    if name.lower() in SYSTEM_NAMES:
        return name if name.isprintable() else ascii(name)
    return "hidden" if name.startswith(".") else ""


def other_kind(name: str, suffixes: set[str]) -> str:
    """How a file is counted that is no image by its suffix; empty for an image."""
    suffix = Path(name).suffix.lower()
    if suffix in suffixes:
        return ""
    return (suffix if suffix.isprintable() else ascii(suffix)) or "without suffix"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def image_suffixes() -> set[str]:
    """Suffixes of the formats whose pixels pillow can read, in small letters."""
    try:
        from PIL import Image, ImageFile
    except ImportError as error:
        raise ImportError(
            'reading image files takes pillow: pip install "ncsn_fast[cli]"'
        ) from error
    suffixes = Image.registered_extensions()
    return {
        suffix
        for suffix, name in suffixes.items()
        if name in Image.OPEN
        and name not in NOT_PIXELS
        # A stub knows its files but cannot read them.
        and not (
            isinstance(kind := Image.OPEN[name][0], type)
            and issubclass(kind, ImageFile.StubImageFile)
        )
    }


def tell_skipped(
    kind: str,
    path: Path,
    found: Sequence[object],
    skipped: Counter[str],
    report: Callable[[str], object],
) -> None:
    """One line on what was skipped, if anything was; ValueError if no image was found."""
    summary = _skipped_line(skipped, path) if skipped else ""
    if not found:
        raise ValueError(
            f"the {kind} {path} holds no image that pillow can open (.png, .jpg, ...), also in subfolders"
            + (f"; {summary}" if summary else "")
        )
    if summary:
        report(summary)


def _skipped_line(skipped: Counter[str], folder: Path) -> str:
    kinds = skipped.most_common()
    parts = [f"{count} {kind}" for kind, count in kinds[:SHOWN_SUFFIXES]]
    rest = sum(count for _, count in kinds[SHOWN_SUFFIXES:])
    parts += [f"{rest} others"] if rest else []
    total = skipped.total()
    return f"skipped {total} name{'s' if total > 1 else ''} in {str(folder)!r}: {', '.join(parts)}"


def read_array(file: Path, image_size: int, channels: int, *, mapped: bool = False) -> np.ndarray:
    """The images of a NumPy file, uint8 or floating point, ``(N, channels, image_size, image_size)``.

    Args:
        mapped: leave the values of a ``.npy`` in the file; those of a ``.npz`` are read.

    Raises:
        ValueError: no such file, or an array of another shape or dtype.
    """
    try:
        array = np.load(file, allow_pickle=False, mmap_mode="r" if mapped else None)
        if not isinstance(array, np.ndarray):
            with array as archive:
                names = archive.files
                if len(names) != 1 and "images" not in names:
                    raise ValueError(
                        f'expected one array, or one named "images"; it holds {names or "none"}'
                    )
                array = archive["images" if "images" in names else names[0]]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {file} as a NumPy file: {error}") from error
    return _as_images(array, file, image_size, channels)


def _as_images(array: np.ndarray, file: Path, image_size: int, channels: int) -> np.ndarray:
    wanted = (channels, image_size, image_size)
    got = f"{array.dtype} of shape {array.shape}"
    if array.ndim == 3 and channels == 1:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1:] != wanted and array.shape[-1] == channels:
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1:] != wanted or len(array) == 0:
        n, (c, h, w) = "N", wanted
        layouts = f"({n}, {c}, {h}, {w}) or ({n}, {h}, {w}, {c})" + (
            f" or ({n}, {h}, {w})" if c == 1 else ""
        )
        raise ValueError(
            f"{file} must hold images {layouts} with N >= 1, got {got}; arrays are not resized"
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(
            f"{file} must hold uint8 (0..255) or floating point ([-1, 1]) values, got {got}; integers 0..255 "
            "become such by array.astype(np.uint8)"
        )
    return array


def _floats(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32, order="C"))
