"""Which layers may be computed without calling them, by a fused operator.

Belongs here: the question, and the log of its answers. Does not belong here: the units that ask it (``layers.py``,
``refinenet.py``).

A layer that is no longer what it was built as is called, so that hooks, wrappers and replaced layers act as in plain
PyTorch. The logger ``ncsn_fast`` tells which and why, at level DEBUG.
"""

from __future__ import annotations

import logging
from types import NoneType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

_logger = logging.getLogger("ncsn_fast")
_told: set[str] = set()  # what has been logged

_WEIGHTS = (nn.Parameter, Tensor, NoneType)  # subclasses have a way of their own to compute


def why_not_plain(layer: nn.Module, built: type[nn.Module]) -> str | None:
    """Why calling ``layer`` may do something else than the forward of ``built``; None if it cannot.

    Another class (a subclass, a wrapper, a quantised layer), hooks of any sort, global ones too, a
    forward of its own, a weight that is a tensor subclass. Not a parametrization
    (``torch.nn.utils.parametrize``): it acts where the weight is read.
    """
    kind = type(layer)
    facts = layer.__dict__
    if kind is not built and not (
        kind.__base__ is built and "parametrizations" in facts["_modules"]
    ):
        return f"its class is not {built.__name__}"
    if facts["_forward_hooks"] or facts["_forward_pre_hooks"]:
        return "it has forward hooks"
    if facts["_backward_hooks"] or facts["_backward_pre_hooks"]:
        return "it has backward hooks"
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return "there are global hooks on modules"
    if "forward" in facts or "_conv_forward" in facts or "_call_impl" in facts:
        return "its forward was replaced"
    if facts.get("_compiled_call_impl") is not None:  # None: it was, for a while
        return "it was compiled by itself"
    if type(facts["_parameters"].get("weight")) not in _WEIGHTS:
        return "its weight is of a tensor subclass"
    return None


# What else a convolution must have for the operators; padding and dilation are equal besides.
_CONV3X3 = (("kernel_size", (3, 3)), ("stride", (1, 1)), ("groups", 1), ("padding_mode", "zeros"))
# Without these an embedding is the rows of its table, and its gradient theirs.
_LOOKUP = ("max_norm", "padding_idx", "scale_grad_by_freq", "sparse")


def why_not_conv3x3(layer: nn.Module, built: type[nn.Module] = nn.Conv2d) -> str | None:
    """:func:`why_not_plain` for a 3x3 convolution of the same size."""
    reason = why_not_plain(layer, built)
    if reason is not None:
        return reason
    facts = layer.__dict__
    for name, built in _CONV3X3:
        if facts[name] != built:
            return f"its {name} is {facts[name]}"
    if facts["padding"] != facts["dilation"] or facts["padding"][0] != facts["padding"][1]:
        return f"its padding is {facts['padding']} at dilation {facts['dilation']}"
    return None


def why_not_lookup(embed: nn.Module) -> str | None:
    """:func:`why_not_plain` for an embedding that is a table and nothing else."""
    reason = why_not_plain(embed, nn.Embedding)
    if reason is not None:
        return reason
    for name in _LOOKUP:
        value = embed.__dict__[name]
        if value is not None and value is not False:
            return f"its {name} is {value}"
    return None


def tell_called(layer: nn.Module, reason: str) -> None:
    """Log, once, that layers of this class are called rather than computed by the operators."""
    if torch.compiler.is_compiling() or not _logger.isEnabledFor(logging.DEBUG):
        return
    message = f"{type(layer).__name__} is called, not computed by a fused operator: {reason}"
    if message not in _told:
        _told.add(message)
        _logger.debug(message)
