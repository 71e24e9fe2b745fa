"""What others wrap a network in, as far as training must know: torch.compile, DataParallel, DDP, FSDP and their like.

Belongs here: finding the network inside, and what would go wrong in silence otherwise. Does not belong here: names of
weights in a file (``models/pretrained.py``).
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# How wrappers call what they hold: DataParallel, DDP and AveragedModel; torch.compile; FSDP; activation checkpoints.
INNER_NAMES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def world_size() -> int:
    """How many processes there are, by torch.distributed if it is set up, otherwise by what torchrun says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    said = os.environ.get("WORLD_SIZE", "")
    return int(said) if said.isdecimal() else 1


def process_rank() -> int:
    """The rank of this process, by torch.distributed if it is set up, otherwise by what torchrun says; 0 alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    said = os.environ.get("RANK", "")
    return int(said) if said.isdecimal() and world_size() > 1 else 0


def network_inside(model: nn.Module, network: type[nn.Module]) -> nn.Module:
    """The network to train: ``model`` itself, or what ``torch.compile`` made it of.

    Args:
        network: its class, or a class above it.

    Raises:
        TypeError: another module; the message says where in a known wrapper the network is.
    """
    if _is_compiled(model):
        return network_inside(model._orig_mod, network)
    inner, path = model, "model"
    while not isinstance(inner, network):
        name = next((name for name in INNER_NAMES if name in getattr(inner, "_modules", ())), None)
        if name is None:
            raise TypeError(
                f"model must be a {network.__name__}, such as an NCSN, got a {type(model).__name__}"
            )
        inner, path = inner._modules[name], f"{path}.{name}"
    if inner is not model:
        raise TypeError(
            f"model must be the network itself, got it inside a {type(model).__name__}, which its get_loss and "
            f"save_pretrained would go past: pass {path}"
        )
    return model


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


def warn_of_unshared_gradients(network: nn.Module) -> None:
    """Warn, once for a network, of a loss in one of several processes whose gradients DDP would not average.

    DDP averages gradients only of what ran inside its forward; ``ddp.module.get_loss(x)`` does not, and every process
    would go its own way without a word. A caller may well average them by other means, so it is no error.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or network in _warned:
        return
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() < 2:
        return
    if DistributedDataParallel._get_active_ddp_module() is not None:
        return
    _warned.add(network)
    warnings.warn(
        f"get_loss was called in one of {torch.distributed.get_world_size()} processes outside the forward of a "
        "DistributedDataParallel: it will not average the gradients of this loss over the processes. To have them "
        "averaged, wrap a module whose forward returns the loss, such as\n"
        "    class Loss(torch.nn.Module):\n"
        "        def __init__(self, model): super().__init__(); self.model = model\n"
        "        def forward(self, x): return self.model.get_loss(x)[0]\n"
        "    ddp = DistributedDataParallel(Loss(model)); ddp(x).backward()",
        stacklevel=3,
    )


def _is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made it; by its parts, as importing its class would take a second."""
    return "_orig_mod" in getattr(model, "_modules", {}) and hasattr(model, "dynamo_ctx")
