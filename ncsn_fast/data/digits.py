"""The handwritten digits that come with scikit-learn, and their split for training and testing.

Belongs here: this one data set. Does not belong here: files of a user's own (``folders.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

SPLITS = ("train", "heldout", "all")

# Every seventh digit is held out. The file walks through the classes in the order 0 to 9; seven and ten have no
# common divisor, so the held-out images are spread evenly over the ten classes.
HELDOUT_PERIOD = 7
HELDOUT_PHASE = 3
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
    heldout = (
        torch.arange(len(images), dtype=torch.int64, device="cpu") % HELDOUT_PERIOD == HELDOUT_PHASE
    )
    if split == "all":
        return images
    return images[heldout if split == "heldout" else ~heldout]
