"""Several processes that train as one, as torchrun starts them: each takes its part of every batch.

Belongs here: joining, what they tell each other, and what becomes of them when one has gone. Does not belong here: who
takes which samples (``order.py``), the averaging of gradients, which is PyTorch's ``DistributedDataParallel``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import world_size
from .log import TrainingError

# While the first one looks at held-out data or draws, the others wait; one that has died closes its connection.
PATIENCE = timedelta(days=1)
LOST = ("connection", "gloo", "nccl", "socket")  # in messages of torch.distributed


@dataclasses.dataclass(frozen=True)
class Processes:
    """Those that train together, seen from one of them.

    Attributes:
        rank: of this one; the one of rank 0 writes.
        count: how many there are.
        group: for what the CPUs tell each other, whatever device computes; ``None`` of a single one.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    def wrap(self, objective: nn.Module) -> DistributedDataParallel:
        """The objective with gradients that are averaged over the processes."""
        # Buffers are constants. Some weights of a network may take no part, as in NCSN's first refine block.
        return DistributedDataParallel(
            objective, broadcast_buffers=False, find_unused_parameters=True
        )

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of a number over the processes, on its device, without waiting for it."""
        if self.count == 1:
            return loss
        loss = loss / self.count
        dist.all_reduce(loss)
        return loss

    def highest(self, number: int) -> int:
        """The highest of the numbers that the processes give, the same in all of them."""
        if self.count == 1:
            return number
        numbers = torch.tensor(number, device="cpu")
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return int(numbers)

    def wait(self) -> None:
        """Until all processes have come here."""
        self.highest(0)


ALONE = Processes()


@contextlib.contextmanager
def joined(device: torch.device | str) -> Iterator[tuple[Processes, torch.device]]:
    """The processes of torchrun, or of a group that the caller has set up, and this one's device.

    Without either it is the process alone. A group is set up here if there is none: gloo on CPUs, NCCL on GPUs, each
    process on the GPU of its ``LOCAL_RANK``.

    Raises:
        TrainingError: they could not join, such as where the port is in use; one of them has ended meanwhile.
    """
    if world_size() == 1:
        yield ALONE, torch.device(device)
        return
    device, own = _own_device(device), not dist.is_initialized()
    if own:
        _join(device)
    rank, count = dist.get_rank(), dist.get_world_size()
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Processes(rank, count, group), device
    except RuntimeError as error:
        if type(error).__module__.startswith("ncsn_fast") or not _is_loss_of_others(error):
            raise
        raise TrainingError(
            f"process {rank} of {count} has lost another one, which has ended (its own message says why): the last "
            f"checkpoint is whole, resume goes on from it; {error}"
        ) from error
    finally:
        if own:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _join(device: torch.device) -> None:
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise TrainingError(
            f"this is one of {world_size()} processes (WORLD_SIZE), and could not join the others at {where}: "
            f"{error}; start them with torchrun, on a port that is free (--master-port)"
        ) from error


def _own_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    return device


def _is_loss_of_others(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error).lower() for word in LOST)
