"""Pictures of images, pixel by pixel: grids, panels, the annealing as a strip or a GIF.

Belongs here: turning images into pictures, by pillow, which comes with an extra and is imported where used. Does not
belong here: figures with axes (``figures.py``).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..data import to_uint8
from ..files import write_atomically
from .style import INSTALL

if TYPE_CHECKING:
    from PIL import Image

BACKGROUND = 255  # white, between and around images
FONT_SIZE = 16  # pixels
MARGIN = 12  # pixels around a panel


def image_grid(
    images: Tensor, columns: int | None = None, scale: int = 1, gap: int = 1
) -> Image.Image:
    """Images side by side, row by row; an incomplete last row is left white at its end.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1] (clamped), C = 1 for grey or 3 for RGB, N >= 1.
        columns: images in a row; ``None``: as many as make the grid about square.
        scale: each pixel becomes ``scale`` x ``scale`` equal ones.
        gap: white pixels, not scaled, between images and around the grid.

    Returns:
        A pillow image, mode ``"L"`` or ``"RGB"``.

    Raises:
        ValueError: a tensor of another shape, ``columns`` or ``scale`` below 1, ``gap`` below 0.
        TypeError: images that are not floating point.
        ImportError: pillow is not installed.
    """
    image = _pillow("Image")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            "images must have shape (N, 1, H, W) or (N, 3, H, W) with N, H, W >= 1, "
            f"got {tuple(images.shape)}"
        )
    n = len(images)
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(
            f"columns and scale must be >= 1 and gap >= 0, got {columns}, {scale} and {gap}"
        )
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    _, height, width, channels = pixels.shape
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    canvas = np.full(shape, BACKGROUND, dtype=np.uint8)
    for i, one in enumerate(pixels):
        top, left = (gap + i // columns * (height + gap), gap + i % columns * (width + gap))
        canvas[top : top + height, left : left + width] = one
    return image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def side_by_side(grids: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures in a row, aligned at the top, each under its title.

    Args:
        grids: title to picture, from left to right; at least one.

    Returns:
        A pillow image, mode ``"RGB"``.

    Raises:
        ValueError: nothing to show.
        ImportError: pillow is not installed.
    """
    image, draw = _pillow("Image"), _pillow("ImageDraw")
    if not grids:
        raise ValueError("grids must hold at least one picture, got none")
    font = _font()
    # A panel is as wide as the wider of its title and its picture.
    widths = [
        max(grid.width, math.ceil(font.getlength(title))) + 2 * MARGIN
        for title, grid in grids.items()
    ]
    top = _line_height(font) + 2 * MARGIN
    height = top + max(grid.height for grid in grids.values()) + MARGIN
    canvas = image.new("RGB", (sum(widths), height), "white")
    pen = draw.Draw(canvas)
    left = 0
    for (title, grid), width in zip(grids.items(), widths, strict=True):
        pen.text((left + width // 2, top // 2), title, fill="black", font=font, anchor="mm")
        canvas.paste(grid, (left + (width - grid.width) // 2, top))
        left += width
    return canvas


def annealing_strip(
    frames: Sequence[Tensor], sigmas: Sequence[float], scale: int = 4
) -> Image.Image:
    """How samples come about: one row per image and one column per noise level, labelled with its sigma.

    Args:
        frames: the state after each level, each ``(n, C, H, W)``; values are clamped to [-1, 1].
        sigmas: one number for each frame.
        scale: each pixel becomes ``scale`` x ``scale`` equal ones.

    Returns:
        A pillow image, mode ``"RGB"``.

    Raises:
        ValueError: no frames, frames of different shapes, or another number of sigmas.
        ImportError: pillow is not installed.
    """
    image, draw = _pillow("Image"), _pillow("ImageDraw")
    if not frames or len(frames) != len(sigmas):
        raise ValueError(
            f"there must be one sigma for each frame, got {len(frames)} frames and "
            f"{len(sigmas)} sigmas"
        )
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ValueError(f"frames must have one shape, got {[tuple(f.shape) for f in frames]}")
    font = _font()
    labels = [f"{sigma:.2g}" for sigma in sigmas]
    # Columns must be wide enough for their labels, however small the images are.
    label_width = math.ceil(max(font.getlength(label) for label in labels)) + MARGIN // 2
    gap = max(4, scale)
    # Every level becomes a grid of one column.
    columns = [image_grid(frame, columns=1, scale=scale, gap=gap) for frame in frames]
    pitch = max(columns[0].width, label_width)
    caption = "sigma"  # the letter is not in every font
    left = math.ceil(font.getlength(caption)) + 2 * MARGIN
    top = _line_height(font) + MARGIN
    canvas = image.new(
        "RGB", (left + pitch * len(columns) + MARGIN, top + columns[0].height + MARGIN), "white"
    )
    pen = draw.Draw(canvas)
    pen.text((left // 2, top // 2), caption, fill="black", font=font, anchor="mm")
    for i, (label, column) in enumerate(zip(labels, columns, strict=True)):
        x = left + i * pitch
        pen.text((x + pitch // 2, top // 2), label, fill="black", font=font, anchor="mm")
        canvas.paste(column, (x + (pitch - column.width) // 2, top))
    return canvas


def save_gif(frames: Sequence[Image.Image], path: str | Path, ms: int = 300) -> None:
    """Write an endless GIF, whole or not at all; the last frame stays four times as long.

    Args:
        frames: pillow images of one size, at least one.
        path: the file.
        ms: milliseconds a frame.

    Raises:
        ValueError: no frames, or frames of different sizes.
        OSError: the file cannot be written.
    """
    if not frames or len({frame.size for frame in frames}) != 1:
        sizes = [frame.size for frame in frames]
        raise ValueError(f"a GIF takes frames of one size, at least one, got {sizes}")
    first, *rest = frames
    durations = [ms] * len(rest) + [4 * ms]
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    write_atomically(Path(path), buffer.getvalue())


def require() -> None:
    """ImportError, which says what to install, if pillow is missing: before work whose end is a picture."""
    _pillow("Image")


def _pillow(module: str) -> Any:
    """A module of pillow, ``Image``, ``ImageDraw`` or ``ImageFont``."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError(f"pictures take pillow: {INSTALL.format(extra='demo')}") from error
    return {"Image": Image, "ImageDraw": ImageDraw, "ImageFont": ImageFont}[module]


def _font() -> Any:
    return _pillow("ImageFont").load_default(size=FONT_SIZE)


def _line_height(font: Any) -> int:
    return math.ceil(font.size * 1.3)
