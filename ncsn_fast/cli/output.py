"""Files that commands write: checked before any work begins, and written whole.

Belongs here: which endings mean which file, pictures of samples. Does not belong here: how a picture is made
(``plots``), a folder of numbered samples (``sampling/to_folder.py``).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .. import plots
from ..files import write_atomically
from ..plots import pictures

if TYPE_CHECKING:
    from PIL import Image

FILES = (".png", ".npy", ".npz")
# Endings of --out that mean a file, but none that is written. Any other name, such as samples_lr0.01, is a folder's.
OTHER_FILES = (
    *(".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pdf", ".svg"),
    *(".pt", ".pth", ".pkl", ".safetensors", ".csv", ".json", ".zip", ".tar", ".gz", ".h5"),
)
PICTURE_SIDE = 64  # pixels an image is enlarged to in a picture, by a whole factor
GRID, STRIP = 64, 8  # images in a grid or GIF, and rows of a strip


def writer(out: Path, file_format: str) -> Callable[[Tensor], None]:
    """How images go to ``out``, by its suffix. Makes the folder, so that a bad path fails before any work."""
    suffix = out.suffix.lower()
    if suffix in FILES:
        _check_file(out)
    elif suffix in OTHER_FILES and not out.is_dir():
        raise ValueError(f"--out must end in .png, .npy or .npz, or be a folder, got {out}")
    else:
        _make_folder(out)
    if suffix == ".png" or (suffix not in FILES and file_format == "png"):
        pictures.require()

    def write(images: Tensor) -> None:
        buffer = io.BytesIO()
        if suffix == ".npy":
            np.save(buffer, images.numpy())
        elif suffix == ".npz":
            np.savez_compressed(buffer, images=images.numpy())
        else:
            scale = max(1, PICTURE_SIDE // max(images.shape[2:]))
            plots.image_grid(images, scale=scale, gap=max(1, scale // 4)).save(buffer, "PNG")
        write_atomically(out, buffer.getvalue())

    return write


def check_pictures(paths: dict[str, Path | None]) -> None:
    """Every path that will be written, before any work: each another one, a picture of its kind, and writable."""
    asked = {option: path for option, path in paths.items() if path is not None}
    seen: dict[Path, str] = {}
    for option, path in asked.items():
        other = seen.setdefault(path.absolute(), option)
        if other != option:
            raise ValueError(f"{other} and {option} name the same file, {path}")
        if option == "--out":
            continue
        kind = ".gif" if option == "--gif" else ".png"
        if path.suffix.lower() != kind and path.suffix.lower() in (*FILES, *OTHER_FILES):
            raise ValueError(f"{option} makes a {kind} file, got {path}")
        _check_file(path)
        pictures.require()


def write_pictures(
    images: Tensor | None,
    frames: list[Tensor],
    sigmas: list[float],
    grid: Path | None,
    strip: Path | None,
    gif: Path | None,
) -> None:
    if images is None:
        return
    shown = images[:GRID]
    scale = max(1, PICTURE_SIDE // max(images.shape[2:]))
    if grid is not None:
        _save(plots.image_grid(shown, scale=scale, gap=max(1, scale // 4)), grid)
    films = [*frames, *([shown[: len(frames[0])]] if frames else [])]
    if strip is not None:
        columns = [frame[:STRIP] for frame in films]
        _save(plots.annealing_strip(columns, sigmas, scale=scale), strip)
    if gif is not None:
        plots.save_gif([plots.image_grid(f, scale=scale) for f in films], gif)


def _save(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def _check_file(path: Path) -> None:
    """Makes the folder of a file, and sees that the file can be written there."""
    _make_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(None, "is a folder", str(path))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(None, "cannot write there", str(folder))
