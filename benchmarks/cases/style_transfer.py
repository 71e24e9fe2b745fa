"""A network of other people: style transfer with conditional instance norm, in plain PyTorch and with our layers.

The network is that of Dumoulin et al. 2017, "A Learned Representation for Artistic Style" (arXiv:1610.07629), table 1,
written from the paper: reflection padding, a conditional instance norm after every convolution, ReLU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ncsn_fast.nn import ConditionalInstanceNormELU, replace_layers

from ..peers import Module
from ..suite import Case, Settings, tolerance_of

STYLES = 32  # as in the paper's figure 1
GROUP = "style transfer"


class ConditionalInstanceNorm(nn.Module):
    """Instance norm with a gain and an offset for each style, as one writes it in PyTorch."""

    def __init__(self, channels: int, styles: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(styles, 2 * channels)
        nn.init.normal_(self.embed.weight, 0, 0.1)
        with torch.no_grad():
            self.embed.weight[:, :channels] += 1

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        gain, offset = self.embed(style)[:, :, None, None].chunk(2, dim=1)
        return gain * F.instance_norm(x) + offset


class Layer(nn.Module):
    """Convolution, norm, activation; enlarged twofold before if asked for."""

    def __init__(
        self,
        channels: tuple[int, int],
        kernel: int,
        styles: int,
        *,
        stride: int = 1,
        upsample: bool = False,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.upsample, self.activation = upsample, activation
        self.conv = nn.Conv2d(
            *channels, kernel, stride, padding=kernel // 2, padding_mode="reflect"
        )
        self.norm = ConditionalInstanceNorm(channels[1], styles)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.activation(self.norm(self.conv(x), style))


class Residual(nn.Module):
    """Two layers of 3x3, the second without an activation, and what came in."""

    def __init__(self, channels: int, styles: int) -> None:
        super().__init__()
        self.first = Layer((channels, channels), 3, styles)
        self.second = Layer((channels, channels), 3, styles, activation=lambda h: h)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return x + self.second(self.first(x, style), style)


class StyleTransfer(nn.Module):
    """Three layers down, five residual blocks, three layers up: images in, images in [0, 1] out."""

    def __init__(self, width: int = 32, styles: int = STYLES) -> None:
        super().__init__()
        w = width
        self.layers = nn.ModuleList(
            [
                Layer((3, w), 9, styles),
                Layer((w, 2 * w), 3, styles, stride=2),
                Layer((2 * w, 4 * w), 3, styles, stride=2),
                *(Residual(4 * w, styles) for _ in range(5)),
                Layer((4 * w, 2 * w), 3, styles, upsample=True),
                Layer((2 * w, w), 3, styles, upsample=True),
                Layer((w, 3), 9, styles, activation=torch.sigmoid),
            ]
        )

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, style)
        return x


def with_our_layers(model: nn.Module) -> nn.Module:
    """A copy with our layers in the place of PyTorch's; the same state dict."""
    model = copy.deepcopy(model)
    for layer in list(model.modules()):
        for name, norm in list(layer.named_children()):
            if isinstance(norm, ConditionalInstanceNorm):
                styles, columns = norm.embed.weight.shape
                new = ConditionalInstanceNormELU(columns // 2, styles, elu=False)
                new.load_state_dict(norm.state_dict())
                setattr(layer, name, new)
    replace_layers(model)
    return model


def pair(width: int = 32) -> tuple[nn.Module, nn.Module]:
    """The network in plain PyTorch and with our layers, the same weights in both."""
    torch.manual_seed(0)
    plain = StyleTransfer(width)
    return plain, with_our_layers(plain)


def images(n: int, size: int) -> tuple[Tensor, Tensor]:
    """Images and styles."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, size, size, generator=generator), torch.arange(n) % STYLES


def flops(n: int, size: int) -> int:
    """Twice the multiplications of a pass, counted by PyTorch on tensors without data."""
    with torch.device("meta"):
        network, image, style = (
            StyleTransfer(),
            torch.empty(1, 3, size, size),
            torch.zeros(1).long(),
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, style)
    return n * counter.get_total_flops()


def cases(settings: Settings) -> Iterator[Case]:
    if settings.quick:
        return
    size = 256
    for dtype, backward, n in product(
        settings.network_dtypes, (False, True), settings.batch_sizes(full=(1,), quick=(1,))
    ):
        work = Module(inputs=lambda n=n: images(n, size), make=pair)
        yield Case(
            suite="model",
            group=GROUP,
            name="backward" if backward else "forward",
            shape=(n, 3, size, size),
            dtype=dtype,
            peers=work.peers(
                settings, dtype, backward=backward, compiled_layouts=("channels_last",)
            ),
            expected=work.expected(dtype, backward=backward, device=settings.device),
            tolerance=tolerance_of(dtype, backward=backward, network=True),
            flops=(2 if backward else 1) * flops(n, size),
        )
