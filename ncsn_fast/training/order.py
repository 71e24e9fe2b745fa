"""Which samples a step takes, at which noise levels, and how they reach the device.

Belongs here: the data of a run, as batches that are functions of the seed and the step's number alone, by the
counter-based stream of ``ops.philox_*``; no state of a random generator. Does not belong here: reading files
(``data/``), the noise itself (``losses.py`` of the package above).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from .. import ops
from ..data import ImageDataset, as_dataset
from ..data.dataset import LOOK
from ..data.ranges import Range, byte_hint
from ..models.base import log_uniform_sigmas
from ..streams import LABEL_SAMPLE, ORDER_SAMPLE, STREAM_BATCHES
from .settings import CONTINUOUS, TrainingSettings

HOST = {"device": "cpu", "backend": "auto"}  # whatever backend was chosen for the network


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step trains on.

    Attributes:
        x: clean data, ``(n, ...)``, on the device.
        levels: ``labels``, int64, or ``sigma``, float32, ``(n,)``, as the objective takes them.
        seed: of the noise.
        offset: place of the first sample in the whole batch of the step, of which this may be a part.
    """

    x: Tensor
    levels: dict[str, Tensor]
    seed: int
    offset: int = 0


class Batches:
    """The batch of each step. The data stay where they are; only a batch is moved to the device.

    Args:
        data: a data set, or a tensor ``(N, ...)``, floating point, on any device.
        settings: of the run.
        sigmas: the ladder ``(K,)``, on the device of the training.
        rank, processes: this process and how many share each batch.

    Attributes:
        data: the data set.

    Raises:
        ValueError: a batch that cannot be shared out evenly.
    """

    def __init__(
        self,
        data: Tensor | ImageDataset,
        settings: TrainingSettings,
        sigmas: Tensor,
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        parts = processes * settings.accumulate
        if settings.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of {parts}, for {processes} processes with accumulate "
                f"{settings.accumulate}, got {settings.batch_size}"
            )
        self.data = as_dataset(data)
        self.rank = rank
        self.size = settings.batch_size // parts
        self.settings = settings
        self.sigmas = sigmas

    def at(self, step: int, part: int = 0) -> Batch:
        """The batch of a step, counted from 0; of several processes this one's.

        Args:
            part: which of the ``accumulate`` parts.
        """
        begin = (self.rank * self.settings.accumulate + part) * self.size
        own = slice(begin, begin + self.size)
        x = self.data.batch(
            batch_indices(self.settings, len(self.data), step)[own],
            seed=self.settings.seed,
            step=step,
            sample_offset=begin,
            device=self.sigmas.device,
        )
        levels = batch_levels(self.settings, self.sigmas, step)
        own_levels = {name: values[own] for name, values in levels.items()}
        return Batch(x, own_levels, (self.settings.seed << 32) + step, begin)


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


def check_data(data: Tensor | ImageDataset, expected: Range | None) -> ImageDataset:
    """The data as a data set; what cannot be trained on is refused.

    That is another shape or dtype, nothing at all, and values that are not finite.

    Args:
        data: images ``(N, C, H, W)`` or points ``(N, D)``.
        expected: the range of the network's data, for the message.

    Raises:
        ValueError: the message says where the first value is that is not finite.
    """
    if data.ndim not in (2, 4) or data.shape.numel() < 1 or not data.dtype.is_floating_point:
        raise ValueError(
            f"images must be floating point (N, C, H, W), or points (N, D), with N >= 1, got {data.dtype} of shape "
            f"{tuple(data.shape)}{byte_hint(data.dtype, expected)}"
        )
    data = as_dataset(data.detach() if isinstance(data, Tensor) else data)
    # The ends first, which take no memory: both are NaN if any value is.
    if all(map(math.isfinite, data.ends)):
        return data
    values, samples, first = 0, 0, None
    for begin in range(0, len(data), LOOK):
        some = data[begin : begin + LOOK]
        broken = ~some.isfinite()
        if first is None and bool(broken.any()):
            place = broken.nonzero()[0].tolist()
            first = some[tuple(place)].item(), (begin + place[0], *place[1:])
        values += int(broken.sum())
        samples += int(broken.flatten(1).any(1).sum())
    raise ValueError(
        f"images must be finite, got {values} values that are NaN or infinite, in {samples} of {len(data)} samples: "
        f"the first is {first[0]} at images[{', '.join(map(str, first[1]))}]"
    )
