"""One image: from any file that pillow opens to values in [-1, 1], and back to bytes.

Belongs here: what the values of a file mean, whatever its mode. Does not belong here: folders and arrays of images
(``folders.py``), pictures made of several (``plots/pictures.py``). Pillow comes with an extra and is imported where it
is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

WHITE = "white"
Background = str | int | Sequence[int]
# Of a broken file: which one depends on the format, such as RuntimeError for AVIF, DDS and BLP.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError)

DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # grey, more than 8 bits
# Formats whose greys of more than 8 bits span 0..65535, by the format itself or because pillow scales them.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM", "JPEG2000")
UNSIGNED, WHITE_IS_ZERO = 1, 0  # of TIFF's tags
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339


def read_image(
    file: str | Path, image_size: int, channels: int, *, background: Background = WHITE
) -> Tensor:
    """An image file as values in [-1, 1].

    The first frame of a file of several is read. It is turned upright (EXIF), put on ``background`` where it is
    transparent, cut to the central square, resized (Lanczos) and converted to grey or RGB. Colour profiles (ICC) are
    ignored: values are taken as sRGB. CMYK is converted without a profile; of a JPEG it is taken as Adobe writes
    it, inverted.

    Black becomes -1 and white 1, whatever the depth: 1 to 8 bits; 16-bit RGB, of which pillow keeps 8 bits; grey of
    9 to 16 bits, by the depth that the file states, without loss; floating point grey in [0, 1].

    Args:
        file: its name.
        image_size: height and width of the result.
        channels: 1 for grey, 3 for RGB.
        background: what stands behind transparent pixels: a colour by name or ``"#rrggbb"``, a grey level 0..255 or
            red, green and blue.

    Returns:
        float32 ``(channels, image_size, image_size)`` in [-1, 1].

    Raises:
        ValueError: the file cannot be read, or it does not say which of its values is white: grey with sign or of
            more than 16 bits, floating point outside [0, 1] or not finite. The message names file, mode and values.
        ImportError: pillow is not installed.
    """
    return from_uint8(read_pixels(file, image_size, channels, background=background))


def read_pixels(
    file: str | Path | BinaryIO,
    image_size: int,
    channels: int,
    *,
    background: Background = WHITE,
    name: str | Path | None = None,
) -> np.ndarray:
    """An image file as values 0..255, ``(channels, image_size, image_size)``; see :func:`read_image`.

    Args:
        file: its name, or the file itself, open in binary mode.
        name: for the message of an error; that of the file by default.

    Returns:
        uint8, or float32 of grey with more than 8 bits.
    """
    Image, ImageOps = _pillow("Image"), _pillow("ImageOps")
    behind = check_background(background)
    name = file if name is None else name
    try:
        with Image.open(file) as opened:
            sixteen_bit_rgb = any(tile[3] == "RGB;16B" for tile in opened.tile or ())
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode in DEEP_MODES:
                image = _deep_grey(opened, image)
            elif opened.format == "TIFF" and UNSIGNED not in _tag(opened, TIFF_SAMPLE_FORMAT):
                raise _unclear(
                    image, "its values have a sign, so that none of them is said to be black"
                )
            elif sixteen_bit_rgb and "transparency" in image.info:
                # The transparent colour has 16 bits; of the pixels pillow has kept the upper 8.
                image.info["transparency"] = tuple(v >> 8 for v in image.info["transparency"])
            if image.has_transparency_data:
                image = _on_background(image, behind)
            if image.mode == "LAB":
                image = _from_lab(image)
            if image.mode != "F":
                image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {name} as an image: {error}") from error
    # The filter overshoots beside edges; of bytes pillow has cut that off already.
    pixels = np.asarray(image).clip(0, 255)
    if pixels.ndim == 2:
        return np.repeat(pixels[None], channels, axis=0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resize_pixels(pixels: np.ndarray, image_size: int, channels: int) -> np.ndarray:
    """Bytes ``(H, W)`` or ``(H, W, 3)`` as :func:`read_pixels` makes those of a file; uint8."""
    Image, ImageOps = _pillow("Image"), _pillow("ImageOps")
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def check_background(background: Background) -> tuple[int, int, int]:
    """The colour of ``background`` as red, green and blue; ValueError if it is none."""
    if isinstance(background, str):
        return _pillow("ImageColor").getrgb(background)[:3]
    levels = (background,) * 3 if isinstance(background, int) else tuple(background)
    if len(levels) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in levels):
        raise ValueError(
            "background must be the name of a colour, a grey level 0..255 or three of them, "
            f"got {background!r}"
        )
    return levels


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 0..255: clamped, scaled and rounded. The inverse of what loading does to uint8.

    Raises:
        TypeError: not floating point, so not in [-1, 1].
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, in [-1, 1], got {images.dtype}")
    return (
        images.detach()
        .float()
        .add(1)
        .mul(127.5)
        .round()
        .clamp(0, 255)
        .to(device="cpu", dtype=torch.uint8)
    )


def from_uint8(images: np.ndarray) -> Tensor:
    """Values 0..255, of any dtype and shape, as float32 in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32, order="C")) / 127.5 - 1


def _deep_grey(opened: Image.Image, image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as mode ``"F"``, 0..255; with transparency as ``"LA"``."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise _unclear(
                image,
                f"floating point must be in [0, 1], and it holds {low:g} to {high:g}; values in [-1, 1] can be read "
                "from a .npy file",
            )
        full = 1
    else:
        full = _white(opened)
        if full is None or low < 0 or high > full:
            raise _unclear(
                image,
                f"it holds {low} to {high}, and does not say which value is white; save it as 8 or 16 bits",
            )
    grey = values.astype(np.float64) * (255 / full)
    # Pillow leaves these as they are, though it inverts greys of 8 bits.
    if opened.format == "TIFF" and WHITE_IS_ZERO in _tag(opened, TIFF_PHOTOMETRIC):
        grey = 255 - grey
    new = _pillow("Image")
    if "transparency" not in image.info:
        return new.fromarray(grey.astype(np.float32))
    opaque = (values != image.info["transparency"]) * np.uint8(255)
    bands = [new.fromarray(band) for band in (grey.round().astype(np.uint8), opaque)]
    return new.merge("LA", bands)


def _white(opened: Image.Image) -> int | None:
    """The value of white in an integer grey of more than 8 bits; ``None`` if the file does not say."""
    if opened.format in SIXTEEN_BIT_FORMATS or (opened.format == "IM" and opened.mode != "I"):
        return 2**16 - 1
    if opened.format == "TIFF" and UNSIGNED in _tag(opened, TIFF_SAMPLE_FORMAT):
        (bits,) = _tag(opened, TIFF_BITS)
        return 2**bits - 1 if bits <= 16 else None
    return None


def _tag(opened: Any, number: int) -> tuple[int, ...]:
    """A tag of a TIFF file; without one, the value that stands for it."""
    value = opened.tag_v2.get(number, 1)
    return value if isinstance(value, tuple) else (value,)


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "La":  # premultiplied, which goes to RGBA in two steps only
        image = image.convert("LA")
    image = image.convert("RGBA")
    new = _pillow("Image")
    behind = new.new("RGBA", image.size, (*background, 255))
    return new.alpha_composite(behind, image).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    cms = _pillow("ImageCms")
    profiles = cms.createProfile("LAB"), cms.createProfile("sRGB")
    return cms.profileToProfile(image, *profiles, outputMode="RGB")


def _unclear(image: Image.Image, why: str) -> ValueError:
    return ValueError(f"of mode {image.mode}, {why}")


def _pillow(module: str) -> Any:
    """A module of pillow."""
    try:
        from PIL import Image, ImageCms, ImageColor, ImageOps
    except ImportError as error:
        raise ImportError(
            'reading image files takes pillow: pip install "ncsn_fast[cli]"'
        ) from error
    known = {"Image": Image, "ImageCms": ImageCms, "ImageColor": ImageColor, "ImageOps": ImageOps}
    return known[module]
