"""A data set as training takes it: samples by their numbers, in the range of the network.

Belongs here: batches of whatever holds the values, their augmentation, the fingerprint. Does not belong here: where the
values come from (``opening.py``), in which order they are taken (``training``).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..checks import boolean
from ..streams import STREAM_DEQUANTISATION, STREAM_FLIPS
from .images import from_uint8
from .ranges import IMAGE_RANGE, Range

LOOK = 1024  # samples at a time, where all are looked at
LEVELS = 256


class ImageDataset:
    """Images, or points, by number: bytes or floating point, in memory, on a device or in a file mapped into memory.

    It stands where a tensor of all the samples would: ``len(data)``, ``data.shape``, ``data.ndim``, ``data.dtype`` and
    ``data.device`` are that tensor's, and ``data[indices]`` is a floating point tensor ``(n, ...)`` in the network's
    range, for ``indices`` an int64 tensor ``(n,)`` or a slice; an integer gives one sample. Indexing is plain: always
    the same values, without augmentation. Only what is asked for is read and scaled.

    :meth:`batch` is what training takes: the same samples with the augmentations, which are functions of the seed, the
    step and the place in the batch, so that a run that goes on sees what it would have seen.

    Args:
        values: ``(N, ...)`` with N >= 1: uint8 in 0..255, or floating point, which is given out as it is. An array of
            NumPy may be a memory map. Not copied.
        data_range: what the bytes 0 and 255 become; for floating point, what its values are in.
        flips: mirror each image of a batch left to right with probability 1/2.
        dequantise: add uniform noise of one step to the bytes of a batch, ``(byte + u) / 256`` of the range, so that
            the data have a density (Theis et al., 2016, `arXiv:1511.01844 <https://arxiv.org/abs/1511.01844>`_).
        fingerprint: if it is known; see :attr:`fingerprint`.
        byte_ends: the lowest and the highest byte, if they are known.

    Raises:
        TypeError: neither uint8 nor floating point.
        ValueError: no sample; flips of what are no images; ``dequantise`` of floating point.
    """

    def __init__(
        self,
        values: Tensor | np.ndarray,
        *,
        data_range: Range = IMAGE_RANGE,
        flips: bool = False,
        dequantise: bool = False,
        fingerprint: str | None = None,
        byte_ends: tuple[int, int] | None = None,
    ) -> None:
        if isinstance(values, np.ndarray):
            with warnings.catch_warnings():
                # A map is read-only, which tensors cannot be; nothing here writes.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                values = torch.from_numpy(values)
        if not (values.dtype == torch.uint8 or values.is_floating_point()):
            raise TypeError(f"data must be uint8 or floating point, got {values.dtype}")
        if values.ndim < 2 or values.numel() == 0:
            raise ValueError(
                f"data must be (N, C, H, W) or (N, D), not empty, got {tuple(values.shape)}"
            )
        self.flips, self.dequantise = boolean("flips", flips), boolean("dequantise", dequantise)
        if self.flips and values.ndim != 4:
            raise ValueError(f"flips take images (N, C, H, W), got {tuple(values.shape)}")
        self._bytes = values.dtype == torch.uint8
        if self.dequantise and not self._bytes:
            raise ValueError(f"dequantise takes images of bytes, got {values.dtype}")
        self._values = values
        self._rows: Tensor | None = None  # of the values, those that count; None: all
        self.data_range = tuple(map(float, data_range))
        # A table: dividing on a GPU would round otherwise than here.
        table = from_uint8(np.arange(LEVELS))
        if self.data_range != IMAGE_RANGE:
            low, high = self.data_range
            table = torch.arange(LEVELS, dtype=torch.float32, device="cpu") / (LEVELS - 1)
            table = low + (high - low) * table
        self._tables = {table.device: table}
        self._byte_ends = byte_ends
        if fingerprint is not None:
            self.fingerprint = fingerprint

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W), or (N, D) of points."""
        n = len(self._values if self._rows is None else self._rows)
        return torch.Size((n, *self._values.shape[1:]))

    @property
    def ndim(self) -> int:
        return self._values.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of what is given out: float32 for bytes, otherwise that of the values."""
        return torch.float32 if self._bytes else self._values.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are held and batches come from."""
        return self._values.device

    @property
    def nbytes(self) -> int:
        """What the values take where they are held: what :meth:`to` would need on another device."""
        return self._values[:1].nbytes * len(self)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor | slice | int) -> Tensor:
        values = self._pick(indices)
        return self._scale(values) if self._bytes else values

    def batch(
        self,
        indices: Tensor,
        *,
        seed: int,
        step: int,
        sample_offset: int = 0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A batch of the training, augmented.

        Args:
            indices: which samples, int64 ``(n,)``.
            seed, step: of the training: they fix what is drawn.
            sample_offset: place of the first sample in the whole batch of the step, of which a process may take a part.
            device: where to; bytes travel as bytes and become floating point there. By default :attr:`device`.

        Returns:
            ``(n, ...)`` in :attr:`data_range`; a new tensor, the same values on every device.
        """
        values = self._pick(indices)
        device = values.device if device is None else torch.device(device)
        if device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()  # or the copy would wait for the device
        values = values.to(device, non_blocking=True)
        place = {"seed": seed, "step": step, "sample_offset": sample_offset}
        place |= {"device": device, "backend": "auto"}  # whatever backend is chosen for a network
        if self.dequantise:
            noise = ops.philox_uniform(values.shape, stream=STREAM_DEQUANTISATION, **place)
            low, high = self.data_range
            values = (values + noise) * ((high - low) / LEVELS) + low
        elif self._bytes:
            values = self._scale(values)
        if self.flips:
            coins = ops.philox_uniform((len(values), 1), stream=STREAM_FLIPS, **place) < 0.5
            values = torch.where(coins[:, :, None, None], values.flip(3), values)
        return values

    def to(self, device: torch.device | str) -> ImageDataset:
        """All of it on a device, bytes as bytes."""
        values = self._values if self._rows is None else self._values[self._rows]
        return ImageDataset(
            values.to(device),
            data_range=self.data_range,
            flips=self.flips,
            dequantise=self.dequantise,
            fingerprint=vars(self).get("fingerprint"),
            byte_ends=self._byte_ends,
        )

    def part(self, rows: slice | Tensor) -> ImageDataset:
        """Some of the samples, such as every other one; a view, that copies nothing.

        Args:
            rows: which: a slice, int64 numbers ``(n,)``, or bool ``(N,)``.

        Raises:
            ValueError: none.
        """
        own = torch.arange(len(self), device=self.device) if self._rows is None else self._rows
        chosen = own[rows.to(self.device) if isinstance(rows, Tensor) else rows]
        if len(chosen) == 0:
            raise ValueError("rows must hold at least one sample, got none")
        part = copy.copy(self)
        part._rows, part._byte_ends = chosen, None
        for name in ("fingerprint", "ends"):  # of the whole
            vars(part).pop(name, None)
        return part

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of SHA-256 over all values as float32, bytes as values in [-1, 1].

        That of a tensor of the same values, however they are held. Found once; for a cache it is kept beside it.
        """
        digest = hashlib.sha256()
        for some in self._all():
            some = from_uint8(some.numpy()) if self._bytes else some.to(torch.float32)
            digest.update(some.contiguous().numpy())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def ends(self) -> Range:
        """The lowest and the highest value; NaN if there is one. Looks at all of them, a part at a time."""
        if self._byte_ends is None:
            parts = torch.stack([torch.stack(some.aminmax()) for some in self._all()])
            low, high = parts[:, 0].amin(), parts[:, 1].amax()
        else:
            low, high = torch.tensor(self._byte_ends, device="cpu")
        if self._bytes:
            low, high = self._scale(low), self._scale(high)
        return float(low), float(high)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps: two data sets train alike if these are equal. Plain values."""
        about: dict[str, Any] = {"shape": tuple(self.shape), "fingerprint": self.fingerprint}
        about |= {name: True for name in ("flips", "dequantise") if getattr(self, name)}
        if self._bytes and self.data_range != IMAGE_RANGE:
            about["data_range"] = self.data_range
        return about

    def _pick(self, indices: Tensor | slice | int) -> Tensor:
        if isinstance(indices, Tensor):
            indices = indices.to(self.device)
        if self._rows is not None:
            indices = self._rows[indices]
        if isinstance(indices, Tensor):
            return self._values[indices].contiguous()
        # Of the caller's own: a view of a read-only map would end the process where it is written to.
        return self._values[indices].clone(memory_format=torch.contiguous_format)

    def _scale(self, values: Tensor) -> Tensor:
        if values.device.type == "cpu" and self.data_range == IMAGE_RANGE:  # several times as fast
            return values.to(torch.float32).div_(127.5).sub_(1)
        if values.device not in self._tables:
            self._tables[values.device] = self._tables[torch.device("cpu")].to(values.device)
        return self._tables[values.device][values.int()]

    def _all(self) -> Iterator[Tensor]:
        for begin in range(0, len(self), LOOK):
            yield self._pick(slice(begin, begin + LOOK)).cpu()


def as_dataset(data: Tensor | ImageDataset) -> ImageDataset:
    """A tensor as a data set, of plain values; a data set as it is."""
    return data if isinstance(data, ImageDataset) else ImageDataset(data)
