"""From the name of data to a data set.

Belongs here: which reader serves which name, and the checks of what it read. Does not belong here: the readers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import positive_int
from .cache import How, decode, open_cache
from .dataset import ImageDataset
from .digits import SPLITS, load_digits
from .folders import ARRAY_SUFFIXES, read_array
from .images import WHITE, Background
from .ranges import IMAGE_RANGE, Range, check_range, from_image_range
from .sources import Report, open_source

_log = logging.getLogger(__name__)

DIGITS = "digits"
DIGITS_SIZE = 8
USUAL_SIZE = 32, 3


def usual_size(data: str | Path) -> tuple[int, int]:
    """The size and the channels that images have where nobody says any: 8 and 1 of the digits, else 32 and 3."""
    return (DIGITS_SIZE, 1) if str(data).partition(":")[0] == DIGITS else USUAL_SIZE


def open_images(
    data: str | Path,
    image_size: int,
    channels: int,
    *,
    cache: str | Path | None = None,
    data_range: Range = IMAGE_RANGE,
    flips: bool = False,
    dequantise: bool = False,
    background: Background = WHITE,
    verbose: bool = False,
    report: Report = _log.warning,
) -> ImageDataset:
    """Images by the name of where they are, for training.

    ================================== ==============================================================================
    ``data``                           is
    ================================== ==============================================================================
    a folder                           all images below it, in the order of the sorted paths
    ``.zip``                           all images in the archive, in the order of the sorted names
    an image file                      that one
    an IDX file, gzipped or not        as of MNIST and Fashion-MNIST: ``train-images-idx3-ubyte.gz``
    ``.npy``, ``.npz``                 an array as it is; a ``.npy`` stays in its file
    ``hf:NAME[:COLUMN[:SPLIT]]``       a data set of the Hugging Face Hub, or a folder that ``datasets`` can load;
                                       the only column of images and ``train`` by default
    ``digits``, ``digits:SPLIT``       scikit-learn's (:func:`~ncsn_fast.data.load_digits`), 8x8, grey
    ================================== ==============================================================================

    Images of any size and mode are turned upright, cut to the central square, resized and made grey or RGB, see
    :func:`~ncsn_fast.data.load_images`; those of an array or the digits must have the size. They are kept as bytes,
    greys of more than 8 bits too. With ``cache`` that is a file in which they are decoded once; a later call maps it
    into memory, and reads only what a batch asks for. It is made anew when a name, size or time of a file, or a
    setting, has changed. An image that cannot be read is skipped and named.

    Args:
        image_size: height and width.
        channels: 1 for grey, 3 for RGB.
        cache: a folder for the decoded bytes, made if need be; several processes may share it. ``None``: in memory.
        data_range, flips, dequantise: see :class:`~ncsn_fast.data.ImageDataset`.
        background: what stands behind transparent pixels.
        verbose: show a bar while images are decoded.
        report: is given lines on what was skipped; by default they are logged as warnings.

    Raises:
        FileNotFoundError: nothing is at the path.
        PermissionError: a folder or a file that may not be read.
        ValueError: no image; more than one in a hundred that cannot be read; a file of another kind, or truncated; an
            array of another shape, dtype or range.
        ImportError: pillow, scikit-learn or ``datasets`` is not installed and needed; the message names the extra.
        OSError: the cache cannot be written.

    Warns:
        DataRangeWarning: all the values together look as if they had another range, as of ``load_images``.
    """
    image_size = positive_int("image_size", image_size)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    name, _, split = str(data).partition(":")
    path = Path(data).expanduser()
    known: dict[str, Any] = {}  # of the values, so that a large cache is not read to open it
    if name == DIGITS and split in ("", *SPLITS):
        values = load_digits(split or "train").numpy()
        if (image_size, channels) != (DIGITS_SIZE, 1):
            raise ValueError(
                f"the digits are grey, of {DIGITS_SIZE}x{DIGITS_SIZE} pixels: image_size must be {DIGITS_SIZE} and "
                f"channels 1, got {image_size} and {channels}"
            )
    elif path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES:
        values = read_array(path, image_size, channels, mapped=True)
        if values.dtype not in (np.uint8, np.float32):
            values = values.astype(np.float32)
    else:
        source, how = open_source(data, report), How(image_size, channels, background)
        if cache is None:
            made = decode(source, how, verbose=verbose)
        else:
            made = open_cache(source, how, Path(cache).expanduser(), verbose=verbose, report=report)
        for remark in made.remarks:
            report(remark)
        values, known = made.pixels, {"fingerprint": made.fingerprint, "byte_ends": made.ends}
    if values.dtype != np.uint8 and data_range != IMAGE_RANGE:  # such values are in [-1, 1]
        values = from_image_range(torch.from_numpy(np.array(values)), data_range)
    images = ImageDataset(
        values, data_range=data_range, flips=flips, dequantise=dequantise, **known
    )
    scaled = values.dtype == np.uint8
    ends = torch.tensor(images.ends, dtype=torch.float32, device="cpu")
    check_range(ends, images.data_range, f"the values of {data}", scaled=scaled)
    return images
