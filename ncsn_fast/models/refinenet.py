"""The blocks of the authors' own networks, NCSN (2019) and NCSNv2 (2020).

Belongs here: modules with parameters, each usable alone, and the units they repeat. Does not belong here: how a network
is connected (``official.py``), the norms (``norms.py``), arithmetic on pixels (``ops``).

One set of blocks serves both years. ``num_classes`` says which form is built: a number, the 2019 form, where every norm
is conditioned on the noise level; ``None``, the 2020 form, where no layer knows the level and the refine blocks have no
norms at all.

Everywhere: ``x`` is ``(N, C, H, W)``, floating point, contiguous or channels_last; ``y`` holds the noise levels,
``(N,)`` or ``(1,)`` integers in ``0..num_classes - 1``, and is ignored by the 2020 form. Attribute names are state-dict
keys, the order in which modules are registered is the state dict's, and the order in which they are created is that of
the random draws: none of the three may change.

Reference: Song & Ermon, 2019, arXiv:1907.05600, appendix A; 2020, arXiv:2006.09011, appendix A; Lin et al., 2017,
"RefineNet", arXiv:1611.06612.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .layers import convolve
from .norms import CondInstanceNormPlus, InstanceNormPlus, make_norm
from .plain import tell_called, why_not_conv3x3, why_not_plain

# --- the units that the networks repeat -------------------------------------------------------------
# Layers that are no longer what they were built as are called, as ``plain.py`` says.


def _why_not_norm(norm: nn.Module) -> str | None:
    conditional = isinstance(norm, CondInstanceNormPlus)
    return why_not_plain(norm, CondInstanceNormPlus if conditional else InstanceNormPlus)


def norm_act(norm: nn.Module, x: Tensor, y: Tensor | None, *, elu: bool = True) -> Tensor:
    """``elu(norm(x, y))``, or without the activation."""
    reason = _why_not_norm(norm)
    if reason is None:
        return ops.cond_instance_norm_elu(x, *norm.table(x, y), norm.eps, elu)
    tell_called(norm, reason)
    h = norm(x, y)
    return F.elu(h) if elu else h


def norm_act_conv(
    norm: nn.Module,
    conv: nn.Module,
    x: Tensor,
    y: Tensor | None,
    *,
    elu: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """``conv(elu(norm(x, y))) + residual``, or without the activation: a 3x3 convolution, as one operator."""
    if _why_not_norm(norm) is None and why_not_conv3x3(conv) is None:
        return ops.norm_elu_conv3x3(
            x,
            *norm.table(x, y),
            conv.weight,
            conv.bias,
            dilation=conv.dilation[0],
            residual=residual,
            eps=norm.eps,
            elu=elu,
        )
    return convolve(conv, norm_act(norm, x, y, elu=elu), residual=residual)


def act_conv(conv: nn.Module, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
    """``conv(elu(x)) + residual``, a 3x3 convolution, as one operator."""
    if why_not_conv3x3(conv) is None:
        return ops.elu_conv3x3(
            x, conv.weight, conv.bias, dilation=conv.dilation[0], residual=residual
        )
    return convolve(conv, F.elu(x), residual=residual)


def upsample_add(x: Tensor, residual: Tensor) -> Tensor:
    """``x`` enlarged to the size of ``residual``, and added to it: bilinear, corners aligned."""
    size = residual.shape[2:]
    return residual + F.interpolate(x, size=size, mode="bilinear", align_corners=True)


# --- residual blocks --------------------------------------------------------------------------------


def conv3x3(in_channels: int, out_channels: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A same-size 3x3 convolution with PyTorch's default initial values."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)


class MeanPoolConv(nn.Module):
    """A same-size convolution, then the mean of each 2x2 pixels.

    Args:
        in_channels, out_channels: of the convolution, which has a bias.
        kernel_size: 1 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, out_channels, H/2, W/2)``. ValueError: an odd height or width."""
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"2x2 pixels are averaged, so H and W must be even, got {tuple(x.shape)}"
            )
        conv = self.conv
        facts = (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == (
            (1, 1),
            (1, 1),
            1,
            "zeros",
        )
        if why_not_plain(conv, nn.Conv2d) is None and facts:
            return ops.conv3x3_mean_pool(x, conv.weight, conv.bias)
        return F.avg_pool2d(conv(x), 2)


class ResidualBlock(nn.Module):
    """``shortcut(x) + conv2(elu(norm2(conv1(elu(norm1(x))))))``.

    Args:
        in_channels, out_channels: of the block; equal unless ``down``.
        num_classes: noise levels K; ``None``: the 2020 form.
        down: halve height and width by :class:`MeanPoolConv`, in the shortcut too; with a dilation the size stays, and
            both are dilated 3x3 convolutions instead.
        dilation: of the 3x3 convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_classes: int | None,
        *,
        down: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if not down and in_channels != out_channels:
            raise ValueError(
                f"only a block with down=True changes the channels, got {in_channels} to {out_channels}"
            )
        self.halves = down and dilation == 1
        self.conv1 = conv3x3(in_channels, in_channels, dilation)
        self.normalize2 = make_norm(in_channels, num_classes)
        if self.halves:
            self.conv2 = MeanPoolConv(in_channels, out_channels, 3)
            self.shortcut = MeanPoolConv(in_channels, out_channels, 1)
        else:
            self.conv2 = conv3x3(in_channels, out_channels, dilation)
            self.shortcut = conv3x3(in_channels, out_channels, dilation) if down else None
        self.normalize1 = make_norm(in_channels, num_classes)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``(N, out_channels, H, W)``, or half of H and W. ValueError: one that cannot be halved."""
        h = norm_act_conv(self.normalize1, self.conv1, x, y)
        if self.halves:
            return self.shortcut(x) + self.conv2(norm_act(self.normalize2, h, y))
        shortcut = x if self.shortcut is None else convolve(self.shortcut, x)
        return norm_act_conv(self.normalize2, self.conv2, h, y, residual=shortcut)


class Stage(nn.ModuleList):
    """Residual blocks one after the other."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The last block's output."""
        for block in self:
            x = block(x, y)
        return x


# --- refine blocks ----------------------------------------------------------------------------------


class RCUBlock(nn.Module):
    """Residual convolution units in sequence, each ``x + conv(elu(conv(elu(x))))`` with norms in the 2019 form.

    Args:
        channels: C.
        num_units: how many.
        num_classes: noise levels K; ``None``: without norms.
    """

    def __init__(self, channels: int, num_units: int, num_classes: int | None) -> None:
        super().__init__()
        self.num_units = num_units
        self.has_norms = num_classes is not None
        for unit in range(1, num_units + 1):
            for layer in (1, 2):
                if self.has_norms:
                    self.add_module(f"{unit}_{layer}_norm", make_norm(channels, num_classes))
                self.add_module(f"{unit}_{layer}_conv", conv3x3(channels, channels, bias=False))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Refine ``x``; shape of ``x``."""
        for unit in range(1, self.num_units + 1):
            h = self._layer(f"{unit}_1", x, y)
            x = self._layer(f"{unit}_2", h, y, residual=x)
        return x

    def _layer(
        self, name: str, x: Tensor, y: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        conv = getattr(self, f"{name}_conv")
        if self.has_norms:
            return norm_act_conv(getattr(self, f"{name}_norm"), conv, x, y, residual=residual)
        return act_conv(conv, x, residual=residual)


class MSFBlock(nn.Module):
    """Multi-resolution fusion: the sum of ``conv(norm(x_i))`` at the size of the first input; no activation.

    Args:
        in_channels: channels of each input.
        out_channels: channels of the sum.
        num_classes: noise levels K; ``None``: without norms.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, num_classes: int | None
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = None if num_classes is None else nn.ModuleList()
        for channels in in_channels:
            self.convs.append(conv3x3(channels, out_channels))
            if self.norms is not None:
                self.norms.append(make_norm(channels, num_classes))

    def forward(self, xs: Sequence[Tensor], y: Tensor | None = None) -> Tensor:
        """``(N, out_channels, H, W)`` of the first of ``xs``. ValueError: a wrong number of inputs."""
        _check_count("MSFBlock", xs, len(self.convs))
        total = None
        for i, (x, conv) in enumerate(zip(xs, self.convs, strict=True)):
            same = total is None or total.shape[2:] == x.shape[2:]
            residual = total if same else None
            if self.norms is None:
                h = convolve(conv, x, residual=residual)
            else:
                h = norm_act_conv(self.norms[i], conv, x, y, elu=False, residual=residual)
            total = h if same else upsample_add(h, total)
        return total


class CRPBlock(nn.Module):
    """Chained residual pooling: ``elu(x)`` plus a chain of ``conv(pool5(norm(h)))``, each link fed by the one before.

    Args:
        channels: C.
        num_classes: noise levels K, and the pool is an average; ``None``: without norms, and the pool is a maximum.
        num_stages: links of the chain.
    """

    def __init__(self, channels: int, num_classes: int | None, num_stages: int = 2) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = None if num_classes is None else nn.ModuleList()
        for _ in range(num_stages):
            if self.norms is not None:
                self.norms.append(make_norm(channels, num_classes))
            self.convs.append(conv3x3(channels, channels, bias=False))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Gather context into ``x``; shape of ``x``."""
        h = total = F.elu(x)
        last = len(self.convs) - 1
        for i, conv in enumerate(self.convs):
            if self.norms is None:
                h = ops.max_pool5(h)
            else:
                h = ops.avg_pool5(norm_act(self.norms[i], h, y, elu=False))
            if i == last:  # needed in the sum only, so that the convolution can add it
                return convolve(conv, h, residual=total)
            h = convolve(conv, h)
            total = total + h
        return total


class RefineBlock(nn.Module):
    """Residual units for each input, fusion (of more than one), chained pooling, residual units.

    Args:
        in_channels: channels of each input.
        out_channels: channels of the output.
        num_classes: noise levels K; ``None``: the 2020 form.
        end: the network's last block, which ends in three residual units, not one.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_classes: int | None,
        *,
        end: bool = False,
    ) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(RCUBlock(c, 2, num_classes) for c in in_channels)
        self.output_convs = RCUBlock(out_channels, 3 if end else 1, num_classes)
        self.msf = (
            MSFBlock(in_channels, out_channels, num_classes) if len(in_channels) > 1 else None
        )
        self.crp = CRPBlock(out_channels, num_classes)

    def forward(self, xs: Sequence[Tensor], y: Tensor | None = None) -> Tensor:
        """Merge ``xs`` into ``(N, out_channels, H, W)`` of the first. ValueError: a wrong number of inputs."""
        _check_count("RefineBlock", xs, len(self.adapt_convs))
        hs = [rcu(x, y) for rcu, x in zip(self.adapt_convs, xs, strict=True)]
        h = hs[0] if self.msf is None else self.msf(hs, y)
        return self.output_convs(self.crp(h, y), y)


def _check_count(name: str, xs: Sequence[Tensor], expected: int) -> None:
    if len(xs) != expected:
        raise ValueError(f"{name} was built for {expected} inputs, got {len(xs)}")
