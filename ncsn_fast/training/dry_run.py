"""What a training would take: parameters, memory and time, measured on a copy of the network; nothing is written.

Belongs here: the measurement. Does not belong here: how it is shown (``cli/train.py``), the trainer.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..data import ImageDataset
from ..distributed import world_size
from ..models.base import ScoreModel
from .log import TrainingError
from .order import check_data
from .settings import TrainingSettings
from .trainer import prepared


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a training would take.

    Attributes:
        parameters: numbers in the network that are trained.
        state_bytes: weights, their gradients, their moving average, and what the optimiser keeps of them.
        batch_bytes: what a step keeps of a batch from the forward to the backward pass.
        data_bytes: the data, where they are.
        seconds_per_step: of the second step; the first one, which may compile and allocate, is not timed.
        steps_done, steps: of the run; ``steps_done`` is 0 for a new one.
    """

    parameters: int
    state_bytes: int
    batch_bytes: int
    data_bytes: int
    seconds_per_step: float
    steps_done: int
    steps: int

    @property
    def seconds(self) -> float:
        """Of the steps that are left."""
        return self.seconds_per_step * max(0, self.steps - self.steps_done)


def estimate(
    model: ScoreModel,
    images: Tensor | ImageDataset,
    settings: TrainingSettings,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Two steps of a copy of the network, as :func:`~ncsn_fast.training.train` would do them.

    Args and errors are those of ``train``, which would refuse the same. The network, the folder and torch's default
    generator are left as they are.
    """
    if world_size() > 1:
        raise TrainingError(f"a dry run takes one process, got {world_size()} (WORLD_SIZE)")
    generator = torch.get_rng_state()
    try:
        trainer = prepared(
            copy.deepcopy(model),
            check_data(images, getattr(model, "data_range", None)),
            settings,
            Path(out).expanduser(),
            resume=resume,
            overwrite=overwrite,
            device=device,
        )
        done = trainer.step
        own = (*trainer.objective.parameters(), *trainer.objective.buffers())
        batch_bytes = _bytes_kept(trainer.train_step, own)
        begin = time.perf_counter()
        loss, _ = trainer.train_step()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - begin
    finally:
        torch.set_rng_state(generator)
    optimiser = (v for state in trainer.optimizer.state.values() for v in state.values())
    state = (
        *own,
        *(p.grad for p in trainer.parameters if p.grad is not None),
        *(
            value
            for average in (trainer.average, *trainer.averages.values())
            for value in average.module.state_dict().values()
        ),
        *(value for value in optimiser if isinstance(value, Tensor)),
    )
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        state_bytes=_bytes_of(state),
        batch_bytes=batch_bytes,
        data_bytes=images.nbytes,
        seconds_per_step=seconds,
        steps_done=done,
        steps=settings.iterations,
    )


def _bytes_kept(step: object, own: Iterable[Tensor]) -> int:
    """The bytes that autograd keeps during a step for the backward pass, but for the network's own tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
