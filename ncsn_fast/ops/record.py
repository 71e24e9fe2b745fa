"""Which backend really ran: a record made by the dispatcher, not by what a caller asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import extension
from .schema import NATIVE, TRITON


class _Recorder(TorchDispatchMode):
    def __init__(self, ran: list[tuple[str, str]]) -> None:
        super().__init__()
        self.ran = ran

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == TRITON:
            self.ran.append((name, "triton"))
        elif namespace == NATIVE:
            device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
            compiled = extension.has_kernel(name, "native", device)
            self.ran.append((name, "native" if compiled else "reference"))
        return func(*args, **(kwargs or {}))


@contextmanager
def record_backends() -> Iterator[list[tuple[str, str]]]:
    """``with record_backends() as ran``: the (operator, backend) pairs that the dispatcher ran in the block.

    A backend that only claims to have run is not in the list: an operator counts as native only if compiled code is
    registered for it, and a call of the plain-PyTorch reference leaves no entry at all. Compiled graphs run their
    operators unseen.
    """
    ran: list[tuple[str, str]] = []
    with _Recorder(ran):
        yield ran
