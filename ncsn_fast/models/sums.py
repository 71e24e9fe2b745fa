"""Sums handed on to the norms that read them: how an :class:`NCSN` runs where a kernel joins the two.

Belongs here: the blocks of ``layers.py`` once more, as functions of sums not yet added up. Does not belong here: their
parameters and what they compute (``layers.py``), and the operators (``ops``).

In ``layers.py`` a unit begins with its norm and ends with a sum. Seen from the other end, a convolution's bias, a
residual, the norm that follows and its ELU are one pass over memory, :func:`ops.conv3x3_norm_elu`, but that norm
belongs to the next block: so blocks here take and return a :class:`Sum`. What is no longer as it was built is called,
as ``plain.py`` says, and nothing but tensors go in and out then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .layers import (
    ChainedResPooling,
    CondAdapter,
    CondInstanceNorm,
    DilatedConv,
    MultiResFusion,
    RCUBlock,
    RefineBlock,
    ResidualConvUnit,
    convolve,
    norm_elu,
    norm_elu_conv,
)
from .plain import why_not_conv3x3, why_not_plain


class Sum:
    """``conv(h) + residual``, not computed until somebody wants to know: the sum, or the norm of it.

    Args:
        tensor: the sum itself, if it is known.
        conv, h, residual: a plain 3x3 convolution, what it reads, and what is added, or None.
    """

    def __init__(
        self,
        tensor: Tensor | None = None,
        conv: nn.Conv2d | None = None,
        h: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        self._tensor, self._conv, self._h, self._residual = tensor, conv, h, residual

    def size(self) -> tuple[int, ...]:
        """Height and width."""
        known = self._h if self._tensor is None else self._tensor
        return tuple(known.shape[2:])

    def tensor(self) -> Tensor:
        """The sum, ``(N, C, H, W)``; computed once."""
        if self._tensor is None:
            self._know(convolve(self._conv, self._h, residual=self._residual))
        return self._tensor

    def norm_elu(self, norm: nn.Module, y: Tensor, *, keep: bool = True) -> Tensor:
        """``elu(norm(sum, y))``; ``keep=False``: nobody will ask for the sum."""
        if self._tensor is not None or why_not_plain(norm, CondInstanceNorm) is not None:
            return norm_elu(norm, self.tensor(), y)
        conv, table = self._conv, norm.table(y)
        z, h = ops.conv3x3_norm_elu(
            self._h,
            conv.weight,
            conv.bias,
            *table,
            dilation=conv.dilation[0],
            residual=self._residual,
            keep=keep,
            eps=norm.eps,
        )
        self._know(z)
        return h

    def _know(self, tensor: Tensor | None) -> None:
        self._tensor, self._conv, self._h, self._residual = tensor, None, None, None


def convolved(conv: nn.Module, h: Tensor, *, residual: Tensor | None = None) -> Sum:
    """``conv(h) + residual``, put off if ``conv`` is a plain 3x3 convolution or a :class:`DilatedConv` of one."""
    layer = conv
    if type(conv) is DilatedConv and why_not_plain(conv, DilatedConv) is None:
        layer = conv.conv
    if why_not_conv3x3(layer) is None:
        return Sum(conv=layer, h=h, residual=residual)
    return Sum(convolve(conv, h, residual=residual))


def carry(block: nn.Module, x: Any, y: Tensor) -> Sum:
    """What ``block`` makes of a sum, or of several; the block is called if it is not plain."""
    kind = type(block)
    if kind in _CARRIED and why_not_plain(block, kind) is None:
        return _CARRIED[kind](block, x, y)
    return Sum(block([s.tensor() for s in x] if isinstance(x, Sequence) else x.tensor(), y))


def score(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The layers of an ``NCSN``, from the first convolution to the last."""
    h = convolved(model.begin_conv, x)
    levels = []
    for stage in (model.stage1, model.stage2, model.stage3, model.stage4):
        h = carry(stage, h, y)
        levels.append(h)
    r = carry(model.refine4, [levels[3]], y)
    r = carry(model.refine3, [levels[2], r], y)
    r = carry(model.refine2, [levels[1], r], y)
    r = carry(model.refine1, [levels[0], r], y)
    return convolve(model.end_conv, r.norm_elu(model.end_norm, y, keep=False))


def _unit(unit: ResidualConvUnit, x: Sum, y: Tensor) -> Sum:
    h = x.norm_elu(unit.norm1, y)
    h = convolved(unit.conv1, h).norm_elu(unit.norm2, y, keep=False)
    return convolved(unit.conv2, h, residual=x.tensor())


def _units(block: RCUBlock, x: Sum, y: Tensor) -> Sum:
    for unit in block.units:
        x = carry(unit, x, y)
    return x


def _fusion(block: MultiResFusion, xs: Sequence[Sum], y: Tensor) -> Sum:
    size = tuple(map(max, *(x.size() for x in xs)))
    total: Sum | None = None
    for x, norm, conv in zip(xs, block.norms, block.convs, strict=True):
        known = None if total is None else total.tensor()
        if x.size() == size:
            total = convolved(conv, x.norm_elu(norm, y), residual=known)
        else:
            h = norm_elu_conv(norm, conv, x.tensor(), y)
            h = F.interpolate(h, size=size, mode="nearest")
            total = Sum(h if known is None else known + h)
    return total


def _pooling(block: ChainedResPooling, x: Sum, y: Tensor) -> Sum:
    link, total = x, None
    for i, (norm, conv) in enumerate(zip(block.norms, block.convs, strict=True)):
        h = ops.max_pool5(link.norm_elu(norm, y), padding=block.pool_padding)
        # Of the link before: its sum came with its norm.
        total = link.tensor() if total is None else total + link.tensor()
        last = i == len(block.convs) - 1
        link = convolved(conv, h, residual=total if last else None)
    return link


def _refine(block: RefineBlock, xs: Sequence[Sum], y: Tensor) -> Sum:
    hs = []
    for x, adapter, rcu in zip(xs, block.adapters, block.rcu_in, strict=True):
        if why_not_plain(adapter, CondAdapter) is not None or not adapter.identity:
            x = Sum(adapter(x.tensor(), y))
        hs.append(carry(rcu, x, y))
    h = carry(block.msf, hs, y) if len(hs) > 1 else hs[0]
    return carry(block.rcu_out, carry(block.crp, h, y), y)


_CARRIED: dict[type[nn.Module], Callable[..., Sum]] = {
    ResidualConvUnit: _unit,
    RCUBlock: _units,
    MultiResFusion: _fusion,
    ChainedResPooling: _pooling,
    RefineBlock: _refine,
}
