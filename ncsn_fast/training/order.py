"""Which samples a step takes, at which noise levels, and how they reach the device.

Belongs here: the data of a run, as batches that are functions of the seed and the step's number alone, by the
counter-based stream of ``ops.philox_*``; no state of a random generator. Does not belong here: reading files
(``data/``), the noise itself (``losses.py`` of the package above).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math

import torch
from torch import Tensor

from .. import ops
from ..data.ranges import Range, byte_hint
from ..models.base import log_uniform_sigmas
from ..streams import LABEL_SAMPLE, ORDER_SAMPLE, STREAM_BATCHES
from .settings import CONTINUOUS, TrainingSettings

HOST = {"device": "cpu", "backend": "auto"}  # whatever backend was chosen for the network
FINGERPRINT_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step trains on.

    Attributes:
        x: clean data, ``(batch_size, ...)``, on the device.
        levels: ``labels``, int64, or ``sigma``, float32, ``(batch_size,)``, as the objective takes them.
        seed: of the noise.
    """

    x: Tensor
    levels: dict[str, Tensor]
    seed: int


class Batches:
    """The batch of each step. The data stay where they are; only a batch is moved to the device.

    Args:
        data: ``(N, ...)``, floating point, on any device; it may be a view of a memory-mapped file.
        settings: of the run.
        sigmas: the ladder ``(K,)``, on the device of the training.
    """

    def __init__(self, data: Tensor, settings: TrainingSettings, sigmas: Tensor) -> None:
        self.data = data
        self.settings = settings
        self.sigmas = sigmas

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        indices = batch_indices(self.settings, len(self.data), step)
        levels = batch_levels(self.settings, self.sigmas, step)
        return Batch(self._rows(indices), levels, (self.settings.seed << 32) + step)

    def _rows(self, indices: Tensor) -> Tensor:
        device = self.sigmas.device
        rows = self.data[indices.to(self.data.device)]
        if device.type == "cuda" and rows.device.type == "cpu":
            # From pinned memory the copy runs beside the step before it.
            return rows.pin_memory().to(device, non_blocking=True)
        return rows.to(device)


def batch_indices(settings: TrainingSettings, n: int, step: int) -> Tensor:
    """Which of ``n`` samples a step takes, int64 ``(batch_size,)``: a slice of an endless row of permutations."""
    begin = step * settings.batch_size
    end = begin + settings.batch_size
    epochs = range(begin // n, (end - 1) // n + 1)
    row = torch.cat([_permutation(settings.seed, n, epoch) for epoch in epochs])
    return row[begin - epochs[0] * n : end - epochs[0] * n]


@functools.lru_cache(maxsize=2)  # a batch touches the end of one epoch and the start of the next
def _permutation(seed: int, n: int, epoch: int) -> Tensor:
    place = {"step": epoch, "sample_offset": ORDER_SAMPLE, **HOST}
    keys = ops.philox_uniform((1, n), seed=seed, stream=STREAM_BATCHES, **place)
    return keys[0].argsort(stable=True)


def batch_levels(settings: TrainingSettings, sigmas: Tensor, step: int) -> dict[str, Tensor]:
    """The noise levels of a step, ``(batch_size,)``: each uniform, together spread evenly over the ladder.

    Stratified: sample i draws from the i-th of ``batch_size`` equal parts of the ladder. Which sample that is, is
    random, so every sample meets every level; the loss varies less from step to step than with independent draws.

    Returns:
        ``labels``, int64, or ``sigma``, float32, on the device of ``sigmas``.
    """
    size = settings.batch_size
    place = {"step": step, "sample_offset": LABEL_SAMPLE, **HOST}
    u = ops.philox_uniform((1, size), seed=settings.seed, stream=STREAM_BATCHES, **place)[0]
    even = torch.arange(size, dtype=torch.float64, device="cpu") + u.double()
    if settings.levels == CONTINUOUS:
        ends = sigmas[-1].item(), sigmas[0].item()
        return {"sigma": log_uniform_sigmas(even / size, *ends).to(sigmas.device)}
    labels = (even * (len(sigmas) / size)).long().clamp(max=len(sigmas) - 1)
    return {"labels": labels.to(sigmas.device)}


def check_data(data: Tensor, expected: Range | None) -> None:
    """Refuse what cannot be trained on: another shape or dtype, nothing at all, values that are not finite.

    Args:
        data: images ``(N, C, H, W)`` or points ``(N, D)``.
        expected: the range of the network's data, for the message.

    Raises:
        ValueError: the message says where the first value is that is not finite.
    """
    if data.ndim not in (2, 4) or data.numel() < 1 or not data.is_floating_point():
        raise ValueError(
            f"images must be floating point (N, C, H, W), or points (N, D), with N >= 1, got {data.dtype} of shape "
            f"{tuple(data.shape)}{byte_hint(data.dtype, expected)}"
        )
    # The ends first, which take no memory: both are NaN if any value is.
    if all(math.isfinite(end.item()) for end in data.aminmax()):
        return
    broken = ~data.isfinite()
    first = tuple(broken.nonzero()[0].tolist())
    raise ValueError(
        f"images must be finite, got {int(broken.sum())} values that are NaN or infinite, in "
        f"{int(broken.flatten(1).any(1).sum())} of {len(data)} samples: the first is {data[first].item()} at "
        f"images[{', '.join(map(str, first))}]"
    )


def describe_data(data: Tensor) -> dict[str, object]:
    """What a checkpoint keeps of the data, to know them again: ``shape`` and ``fingerprint``.

    Of more than 4096 samples the fingerprint is of 4096, evenly spread, the last one among them, so that a start does
    not read all data; it then begins with ``"4096 rows: "``.
    """
    if len(data) <= FINGERPRINT_ROWS:
        return {"shape": tuple(data.shape), "fingerprint": _hash(data)}
    # float64 is exact here: the numbers of rows are far below 2**53.
    spread = torch.linspace(0, len(data) - 1, FINGERPRINT_ROWS, dtype=torch.float64, device="cpu")
    rows = data[spread.long().to(data.device)]
    return {
        "shape": tuple(data.shape),
        "fingerprint": f"{FINGERPRINT_ROWS} rows: {_hash(rows)}",
    }


def describe_data_as(held: dict[str, object], data: Tensor) -> dict[str, object]:
    """:func:`describe_data` in the form that a checkpoint has: older ones have the fingerprint of all samples."""
    here = describe_data(data)
    of_all = ":" not in str(held.get("fingerprint", ""))
    if of_all and held.get("shape") == here["shape"]:
        here["fingerprint"] = _hash(data)
    return here


def _hash(rows: Tensor) -> str:
    array = rows.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(array).hexdigest()[:16]
