"""Training images: from scikit-learn's digits, a folder or an array file to one float32 tensor in [-1, 1].

Belongs here: reading and checking images. Does not belong here: how points in the plane are made (``points.py``;
their names are here too), batching and its order (``training.py``), the noise
added to data (``losses.py``).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .points import (  # here too, so that all training data are found in one place
    Checkerboard,
    GaussianMixture,
    eight_gaussians,
    spirals,
    swiss_roll,
    two_gaussians,
    two_moons,
)

__all__ = [
    "Checkerboard",
    "GaussianMixture",
    "eight_gaussians",
    "load_digits",
    "load_images",
    "spirals",
    "swiss_roll",
    "to_uint8",
    "two_gaussians",
    "two_moons",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
ARRAY_SUFFIXES = (".npy", ".npz")
SPLITS = ("train", "heldout", "all")

# Every seventh digit is held out. The file walks through the classes in the order 0 to 9; seven and ten have no
# common divisor, so the held-out images are spread evenly over the ten classes.
HELDOUT_PERIOD = 7
HELDOUT_PHASE = 3
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
)  # of a broken file: which one depends on the format
DIGITS_MAX = 16  # ink per pixel: how many of the 4x4 subpixels are black


def load_digits(split: str = "train") -> Tensor:
    """The 1,797 handwritten 8x8 digits that come with scikit-learn; nothing is downloaded.

    Grey levels 0..16 become -1..1 (paper -1, ink 1).

    Args:
        split: ``"train"`` (1,540 images), ``"heldout"`` (the other 257) or ``"all"``. The split is fixed.

    Returns:
        float32 tensor ``(N, 1, 8, 8)`` in [-1, 1], contiguous.

    Raises:
        ValueError: an unknown split.
        ImportError: scikit-learn is not installed; the message says which extra brings it.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            'the digits come with scikit-learn: pip install "ncsn_fast[demo]"'
        ) from error
    images = datasets.load_digits().images
    images = torch.from_numpy(images).to(torch.float32).unsqueeze(1) * (2 / DIGITS_MAX) - 1
    heldout = torch.arange(len(images)) % HELDOUT_PERIOD == HELDOUT_PHASE
    if split == "all":
        return images
    return images[heldout if split == "heldout" else ~heldout]


def load_images(path: str | Path, image_size: int, channels: int) -> Tensor:
    """Images of a folder, or of a NumPy file, as one tensor.

    A folder is read recursively, in the order of the sorted paths; files that are no images by their suffix are
    passed over. Each image is turned upright (EXIF), cut to the central square, resized (Lanczos) and converted
    to grey or RGB. An array file is taken as it is, without resizing.

    Args:
        path: a folder of PNG, JPEG, ... files, one such file, a ``.npy``, or a ``.npz`` with one array (or one named
            ``images``). Arrays are ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``; uint8 in 0..255, or floating
            point already in [-1, 1].
        image_size: height and width H = W of the result.
        channels: 1 for grey, 3 for RGB.

    Returns:
        float32 tensor ``(N, channels, image_size, image_size)`` in [-1, 1], contiguous.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        ValueError: no image in the folder; a file that cannot be read as what its name says (the message names it);
            an array of another shape, dtype or range.
        ImportError: pillow is not installed and ``path`` holds image files.
    """
    path = Path(path).expanduser()
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size must be an int >= 1, got {image_size!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    if not path.exists():
        raise FileNotFoundError(f"the data path {path} does not exist")
    if path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES:
        return _array_to_images(_read_array(path), path, image_size, channels)
    if path.is_file():
        return _read_image(path, image_size, channels).unsqueeze(0)
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise ValueError(
            f"the folder {path} holds no image: looked for {', '.join(IMAGE_SUFFIXES)}, also in subfolders"
        )
    images = torch.empty(len(files), channels, image_size, image_size)
    for i, file in enumerate(files):
        images[i] = _read_image(file, image_size, channels)
    return images


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 0..255: clamped, scaled and rounded. The inverse of what loading does to uint8."""
    return (
        images.detach()
        .float()
        .add(1)
        .mul(127.5)
        .round()
        .clamp(0, 255)
        .to(device="cpu", dtype=torch.uint8)
    )


def _from_uint8(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.astype(np.float32, order="C")) / 127.5 - 1


def _read_image(file: Path, image_size: int, channels: int) -> Tensor:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            'reading image files takes pillow: pip install "ncsn_fast[cli]"'
        ) from error
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # convert() would clip its greys, not scale them
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    except (*_PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {file} as an image: {error}") from error
    pixels = np.asarray(image).reshape(image_size, image_size, channels)
    return _from_uint8(pixels).permute(2, 0, 1)


def _read_array(file: Path) -> np.ndarray:
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = loaded.files
            if len(names) != 1 and "images" not in names:
                raise ValueError(
                    f'expected one array, or one named "images"; it holds {names or "none"}'
                )
            return loaded["images" if "images" in names else names[0]]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {file} as a NumPy file: {error}") from error


def _array_to_images(array: np.ndarray, file: Path, image_size: int, channels: int) -> Tensor:
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
    if array.dtype == np.uint8:
        return _from_uint8(array)
    if array.dtype.kind != "f":
        raise ValueError(
            f"{file} must hold uint8 (0..255) or floating point ([-1, 1]) values, got {got}"
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= -1 and high <= 1):  # also true of NaN
        raise ValueError(
            f"{file} holds floating point values, which must be in [-1, 1], got {low:g} to {high:g}"
        )
    return torch.from_numpy(array.astype(np.float32, order="C"))
