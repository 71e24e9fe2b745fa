"""The convolutions' weights, transformed once for many calls: :func:`prepack`.

Belongs here: which transformed weights are kept, and when they are made anew. Does not belong here: the transform
itself (``conv3x3_pack`` of the kernels), who keeps them when (``sample``).
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch
from torch import Tensor, nn

from . import extension
from .schema import operator

# Four bytes for each of 4 times as many numbers as the weights have: 193 MB for the default network.
PACKED_BYTES = 2**29


@dataclass
class _Kept:
    """Weights by their ids, which are theirs alone as long as these are held here."""

    weights: dict[int, Tensor]
    limit: int
    packed: dict[int, tuple[object, Tensor]] = field(default_factory=dict)
    bytes: int = 0


_of_thread = threading.local()


@contextmanager
def prepack(model: nn.Module, *, limit: int = PACKED_BYTES) -> Iterator[None]:
    """Keep the transformed weights of a network's 3x3 convolutions for the length of a ``with`` block.

    On a CPU in float32 Winograd's convolution transforms its weights at every call, a fifth of the time of one image of
    32x32. Within the block each is transformed once, at its first call without gradients in this thread; where the
    image is so small that reading what was kept would take longer than transforming it anew, nothing is kept. It is
    made anew where PyTorch can tell that the weight has changed: in-place operations, an optimizer's step,
    ``load_state_dict``, other storage. **Writes through** ``weight.data`` **or a NumPy view cannot be seen: do none
    within the block**, or call :func:`forget_packed` after it. ``sample`` does this by itself.

    Args:
        model: the network; only its own parameters' weights are kept.
        limit: bytes at most; weights beyond it are transformed at every call, as without the block.

    The memory, 4 times that of the weights, is free again after the block.
    """
    weights = (
        layer._parameters.get("weight") for layer in model.modules() if isinstance(layer, nn.Conv2d)
    )
    kept = {
        id(w): w
        for w in weights
        if type(w) is nn.Parameter
        and w.device.type == "cpu"
        and w.dtype == torch.float32
        and not w.is_inference()  # which tells no version
    }
    outer = getattr(_of_thread, "kept", None)
    _of_thread.kept = _Kept(kept, limit)
    try:
        yield
    finally:
        _of_thread.kept = outer


def forget_packed() -> None:
    """Transform the weights anew at their next calls: after writes within :func:`prepack` that PyTorch cannot see."""
    kept = getattr(_of_thread, "kept", None)
    if kept is not None:
        kept.packed.clear()
        kept.bytes = 0


@cache
def _panel() -> int:
    return extension.build_config()["conv_panel"]


@lru_cache(maxsize=4096)
def _packs_late(sizes: tuple[int, ...], threads: int) -> bool:
    """Whether the engine makes no use of kept weights: it reads them faster than those, so few are the tiles."""
    return importlib.import_module("ncsn_fast._C").packs_late(*sizes)


def packed_of(weight: Tensor, x: Tensor, dilation: int) -> Tensor | None:
    """The transformed weight of a call without gradients, if one is kept for it and pays."""
    if torch.compiler.is_compiling():
        return None
    kept = getattr(_of_thread, "kept", None)
    if kept is None or kept.weights.get(id(weight)) is not weight:
        return None
    n, channels, height, width = x.shape
    sizes = (n, channels, weight.shape[0], height, width, dilation)
    if _packs_late(sizes, torch.get_num_threads()):
        return None
    facts = (weight._version, weight.data_ptr(), weight.shape, weight.stride())
    seen, packed = kept.packed.get(id(weight), (None, None))
    if seen == facts:
        return packed
    if packed is not None:
        kept.bytes -= packed.nbytes
        del kept.packed[id(weight)], packed
    if kept.bytes + 4 * weight.nbytes > kept.limit:
        return None
    packed = operator("conv3x3_pack", "native")(weight, _panel())
    kept.packed[id(weight)] = facts, packed
    kept.bytes += packed.nbytes
    return packed
