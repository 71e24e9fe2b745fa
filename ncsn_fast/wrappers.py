"""What others wrap a network in, as far as training must know: torch.compile, DataParallel, DDP, FSDP and their like.

Belongs here: finding the network inside, and what would go wrong in silence otherwise. Does not belong here: names of
weights in a file (``pretrained.py``).
"""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# How wrappers call what they hold: DataParallel, DDP and AveragedModel; torch.compile; FSDP; activation checkpoints.
INNER_NAMES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_not_in_ddp: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def world_size() -> int:
    """How many processes there are, by torch.distributed if it is set up, otherwise by what torchrun says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    said = os.environ.get("WORLD_SIZE", "")
    return int(said) if said.isdecimal() else 1


def network_inside(model: nn.Module, networks: tuple[type[nn.Module], ...]) -> nn.Module:
    """The network to train: ``model`` itself, or what torch.compile made it of.

    Raises:
        TypeError: another module; the message says where in a known wrapper the network is.
    """
    if _is_compiled(model):
        return network_inside(model._orig_mod, networks)
    if isinstance(model, networks):
        return model
    names = " or ".join(network.__name__ for network in networks)
    hint, inner, path = "", model, "model"
    while isinstance(inner, nn.Module) and not isinstance(inner, networks):
        name = next((name for name in INNER_NAMES if name in inner._modules), None)
        if name is None:
            break
        inner, path = inner._modules[name], f"{path}.{name}"
    else:
        hint = f", which goes past the network's get_loss and save_pretrained: pass {path}"
    raise TypeError(f"model must be a {names}, got a {type(model).__name__}{hint}")


@contextlib.contextmanager
def called_as(model: nn.Module, network: nn.Module) -> Iterator[None]:
    """While the block runs, calls of the network go through what ``torch.compile(network)`` made of it.

    The network's own methods call the network itself, which would pass the compiled form by.
    """
    if not _is_compiled(model):
        yield
        return
    before = network._compiled_call_impl
    network._compiled_call_impl = model.dynamo_ctx(network._call_impl)
    try:
        yield
    finally:
        network._compiled_call_impl = before


def check_gradients_are_shared(network: nn.Module) -> None:
    """Refuse a loss whose gradients DDP would not average: of a network inside DDP, but not called through it.

    DDP averages gradients only of what ran inside its forward; ``ddp.module.get_loss(x)`` does not, and every process
    would go its own way without a word.

    Raises:
        RuntimeError: that is the case.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() < 2 or network in _not_in_ddp:
        return
    if DistributedDataParallel._get_active_ddp_module() is not None:
        return
    # A wrapper leaves no mark on what it holds, so all objects are looked through; once for a network, as that is slow.
    around = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), DistributedDataParallel)
        and any(module is network for module in thing.modules())
    ]
    if not around:
        _not_in_ddp.add(network)
    # Under no_sync() gradients are only gathered, to be averaged with those of a later call.
    if any(ddp.require_backward_grad_sync for ddp in around):
        raise RuntimeError(
            "get_loss of a network inside DistributedDataParallel was called past its forward, so the gradients of the "
            "processes would not be averaged: wrap a module whose forward returns the loss, such as\n"
            "    class Loss(torch.nn.Module):\n"
            "        def __init__(self, model): super().__init__(); self.model = model\n"
            "        def forward(self, x): return self.model.get_loss(x)[0]\n"
            "    ddp = DistributedDataParallel(Loss(model)); ddp(x).backward()\n"
            "(under torch.no_grad(), as for a loss of held-out data, get_loss may be called anywhere)"
        )


def _is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made it; by its parts, as importing its class would take a second."""
    return "_orig_mod" in getattr(model, "_modules", {}) and hasattr(model, "dynamo_ctx")
