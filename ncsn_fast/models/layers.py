"""The blocks an NCSN is built from: conditional norm, residual units and the RefineNet parts.

Belongs here: modules with parameters whose forward is ``module(x, y)``, each usable alone. Does not
belong here: the network as a whole (``ncsn.py``) and arithmetic on pixels (``ops``).

A unit takes a fused operator only while its layers are what they were built as (``plain.py``); else it calls them.

Everywhere: ``x`` is ``(N, C, H, W)``, floating point, contiguous or channels_last; ``y`` holds the
noise levels, ``(N,)`` or ``(1,)`` integers in ``0..num_classes - 1``. Attribute names are
state-dict keys and must not change.

Reference: Song & Ermon, 2019, arXiv:1907.05600, appendix A; Lin et al., 2017, "RefineNet",
arXiv:1611.06612.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .plain import tell_called, why_not_conv3x3, why_not_lookup, why_not_plain


def conv(in_channels: int, out_channels: int, kernel_size: int = 3, dilation: int = 1) -> nn.Conv2d:
    """A same-size convolution with bias: Xavier uniform weights with gain 1, zero bias."""
    padding = dilation * (kernel_size // 2)
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class CondInstanceNorm(nn.Module):
    r"""Instance norm with a gain and an offset for each noise level.

    .. math:: \mathrm{out} = \gamma_y \hat x + \beta_y, \qquad
              \hat x = (x - \mu) / \sqrt{\mathrm{var} + \mathrm{eps}}

    The mean and the biased variance are each sample's own over H and W, in training and in
    evaluation alike; there are no running statistics. With ``alpha=True`` this is the paper's
    InstanceNorm++ (appendix A.1), which restores the differences between channel means:
    :math:`\gamma_y (\hat x + \alpha_y m) + \beta_y`.

    Args:
        num_features: channels C.
        num_classes: noise levels K.
        eps: added to the variance.
        alpha: InstanceNorm++.

    ``embed.weight`` is ``(K, 2C)``, columns gamma | beta, or ``(K, 3C)``, columns gamma | alpha |
    beta. gamma starts at 1, beta at 0, and alpha from N(1, 0.02), as in the paper's released code.
    """

    def __init__(
        self, num_features: int, num_classes: int, eps: float = 1e-5, alpha: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        # As PyTorch's own layers are made.
        plain = {"dtype": torch.get_default_dtype(), "device": torch.get_default_device()}
        weight = torch.zeros(num_classes, num_features * 2, **plain)
        weight[:, :num_features] = 1
        self.embed = nn.Embedding.from_pretrained(weight, freeze=False)
        if alpha:
            self.add_alpha()

    def add_alpha(self) -> None:
        """Make it InstanceNorm++: new parameters, with alpha between gamma and beta."""
        gamma, beta = self.embed.weight.detach().chunk(2, dim=1)
        alpha = torch.empty_like(gamma).normal_(1, 0.02)
        weight = torch.cat([gamma, alpha, beta], dim=1)
        frozen = not self.embed.weight.requires_grad
        self.embed = nn.Embedding.from_pretrained(weight, freeze=frozen)

    def table(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and a table, as the operators take them; the rows alone if ``embed`` must be called."""
        reason = why_not_lookup(self.embed)
        if reason is None:
            return y, self.embed.weight
        tell_called(self.embed, reason)
        rows = self.embed(y)
        return torch.arange(rows.shape[0], device=rows.device), rows

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Normalise ``x``; shape, dtype and layout of ``x``."""
        return ops.cond_instance_norm_elu(x, *self.table(y), self.eps, elu=False)


def _why_not_conv(layer: nn.Module) -> str | None:
    """:func:`why_not_conv3x3`, of the convolution inside too if it is a DilatedConv."""
    if type(layer) is not DilatedConv:
        return why_not_conv3x3(layer)
    return why_not_plain(layer, DilatedConv) or why_not_conv3x3(layer.conv)


def norm_elu(norm: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``elu(norm(x, y))``, as one operator if the norm is a plain :class:`CondInstanceNorm`."""
    reason = why_not_plain(norm, CondInstanceNorm)
    if reason is None:
        return ops.cond_instance_norm_elu(x, *norm.table(y), norm.eps)
    tell_called(norm, reason)
    return F.elu(norm(x, y))


def convolve(conv: nn.Module, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
    """``conv(x) + residual``, as one operator if ``conv`` is a plain 3x3 convolution of the same size."""
    reason = _why_not_conv(conv)
    if reason is None:
        layer = conv.conv if type(conv) is DilatedConv else conv
        dilation = layer.dilation[0]
        return ops.conv3x3(x, layer.weight, layer.bias, dilation=dilation, residual=residual)
    tell_called(conv, reason)
    y = conv(x)
    return y if residual is None else y + residual


def norm_elu_conv(
    norm: nn.Module,
    conv: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    residual: Tensor | None = None,
    pool: str | None = None,
) -> Tensor:
    """``conv(pool(elu(norm(x, y)))) + residual``, the unit the network repeats, as one operator.

    Args:
        norm: a :class:`CondInstanceNorm`, or what a tool has put in its place.
        conv: a 3x3 convolution of the same size or a :class:`DilatedConv`, likewise.
        x, y: see the module's docstring.
        residual: added to the result, in its shape, or None.
        pool: None, or the padding of a 5x5 max pool before the convolution.

    Returns:
        What ``conv`` makes of ``x``. Layers that are not plain are called.
    """
    if why_not_plain(norm, CondInstanceNorm) is None and _why_not_conv(conv) is None:
        layer = conv.conv if type(conv) is DilatedConv else conv
        return ops.norm_elu_conv3x3(
            x,
            *norm.table(y),
            layer.weight,
            layer.bias,
            dilation=layer.dilation[0],
            residual=residual,
            pool=pool,
            eps=norm.eps,
        )
    h = norm_elu(norm, x, y)
    if pool is not None:
        h = ops.max_pool5(h, padding=pool)
    return convolve(conv, h, residual=residual)


class DilatedConv(nn.Module):
    """A 3x3 convolution one level down, because the state dict has ``conv1.conv.weight``."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = conv(channels, channels, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``; shape of ``x``."""
        return convolve(self.conv, x)


class ResidualConvUnit(nn.Module):
    """``x + conv2(elu(norm2(conv1(elu(norm1(x))))))``, both convolutions dilated."""

    def __init__(self, channels: int, num_classes: int, dilation: int = 1) -> None:
        super().__init__()
        self.norm1 = CondInstanceNorm(channels, num_classes)
        self.conv1 = DilatedConv(channels, dilation)
        self.norm2 = CondInstanceNorm(channels, num_classes)
        self.conv2 = DilatedConv(channels, dilation)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Refine ``x``; shape of ``x``."""
        h = norm_elu_conv(self.norm1, self.conv1, x, y)
        return norm_elu_conv(self.norm2, self.conv2, h, y, residual=x)


class RCUBlock(nn.Module):
    """Residual convolution units in sequence."""

    def __init__(
        self, channels: int, num_classes: int, num_units: int = 2, dilation: int = 1
    ) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            ResidualConvUnit(channels, num_classes, dilation) for _ in range(num_units)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Refine ``x``; shape of ``x``."""
        for unit in self.units:
            x = unit(x, y)
        return x


class CondAdapter(nn.Module):
    """``conv1x1(elu(norm(x)))`` to change the number of channels; else the identity."""

    def __init__(self, in_channels: int, out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.identity = in_channels == out_channels
        if not self.identity:
            self.norm = CondInstanceNorm(in_channels, num_classes)
            self.conv = conv(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adapt ``x``; ``(N, out_channels, H, W)``."""
        if self.identity:
            return x
        return self.conv(norm_elu(self.norm, x, y))


class MultiResFusion(nn.Module):
    """The sum of ``conv(elu(norm(x_i)))`` over the inputs, at their largest height and width.

    Args:
        in_channels: channels of each input.
        out_channels: channels of the sum.
        num_classes: noise levels K.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(CondInstanceNorm(c, num_classes) for c in in_channels)
        self.convs = nn.ModuleList(conv(c, out_channels) for c in in_channels)

    def forward(self, xs: Sequence[Tensor], y: Tensor) -> Tensor:
        """Fuse ``xs``, smaller ones enlarged (nearest). ValueError: a wrong number of inputs."""
        _check_count("MultiResFusion", xs, len(self.convs))
        size = tuple(max(x.shape[axis] for x in xs) for axis in (2, 3))
        total = None
        for x, norm, conv in zip(xs, self.norms, self.convs, strict=True):
            if x.shape[2:] == size:
                total = norm_elu_conv(norm, conv, x, y, residual=total)
            else:
                h = F.interpolate(norm_elu_conv(norm, conv, x, y), size=size, mode="nearest")
                total = h if total is None else total + h
        return total


class ChainedResPooling(nn.Module):
    """``x`` plus a chain of ``conv(maxpool5(elu(norm(h))))``, each link fed by the one before.

    Args:
        channels: channels C.
        num_classes: noise levels K.
        num_stages: links of the chain.
        pool_padding: what the pools see beyond the border, ``"neg_inf"`` or ``"zero"``.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_stages: int = 4,
        pool_padding: str = "neg_inf",
    ) -> None:
        super().__init__()
        self.pool_padding = pool_padding
        self.norms = nn.ModuleList(
            CondInstanceNorm(channels, num_classes) for _ in range(num_stages)
        )
        self.convs = nn.ModuleList(conv(channels, channels) for _ in range(num_stages))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gather context into ``x``; shape of ``x``."""
        h = out = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = norm_elu_conv(norm, conv, h, y, pool=self.pool_padding)
            out = out + h
        return out


class RefineBlock(nn.Module):
    """Adapters, residual units for each input, fusion, chained pooling, residual units.

    Args:
        in_channels: channels of each input.
        out_channels: channels of the output.
        num_classes: noise levels K.
        pool_padding: what the pools see beyond the border, ``"neg_inf"`` or ``"zero"``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_classes: int,
        pool_padding: str = "neg_inf",
    ) -> None:
        super().__init__()
        n_inputs = len(in_channels)
        self.adapters = nn.ModuleList(
            CondAdapter(c, out_channels, num_classes) for c in in_channels
        )
        self.rcu_in = nn.ModuleList(RCUBlock(out_channels, num_classes) for _ in in_channels)
        self.msf = MultiResFusion([out_channels] * n_inputs, out_channels, num_classes)
        self.crp = ChainedResPooling(out_channels, num_classes, pool_padding=pool_padding)
        self.rcu_out = RCUBlock(out_channels, num_classes)
        if n_inputs == 1:
            # There is nothing to fuse, so msf never runs, though the state dict has it. Frozen,
            # because DistributedDataParallel fails on parameters that expect a gradient and never
            # get one.
            self.msf.requires_grad_(False)

    def forward(self, xs: Sequence[Tensor], y: Tensor) -> Tensor:
        """Merge ``xs`` into ``(N, out_channels, H, W)``. ValueError: a wrong number of inputs."""
        _check_count("RefineBlock", xs, len(self.rcu_in))
        hs = [
            rcu(adapter(x, y), y)
            for x, adapter, rcu in zip(xs, self.adapters, self.rcu_in, strict=True)
        ]
        h = self.msf(hs, y) if len(hs) > 1 else hs[0]
        return self.rcu_out(self.crp(h, y), y)


def _check_count(name: str, xs: Sequence[Tensor], expected: int) -> None:
    if len(xs) != expected:
        raise ValueError(f"{name} was built for {expected} inputs, got {len(xs)}")
