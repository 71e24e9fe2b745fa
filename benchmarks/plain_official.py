"""The authors' four networks as one writes them in plain PyTorch, with their state dicts.

Belongs here: what the networks of the papers are compared with. Does not belong here: anything of ncsn_fast, none of
which runs here; the documented NCSN (``plain_torch.py``).

``classes`` says which form is built: a number of noise levels, that of 2019; None, that of 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5

# --- blocks ---------------------------------------------------------------------------------------


class Norm(nn.Module):
    """InstanceNorm++."""

    def __init__(self, channels: int, classes: int | None) -> None:
        super().__init__()
        if classes is None:
            self.alpha, self.gamma, self.beta = (nn.Parameter(torch.ones(channels)) for _ in "agb")
        else:
            self.embed = nn.Embedding(classes, 3 * channels)
        self.conditional = classes is not None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.conditional:
            gamma, alpha, beta = self.embed(y).chunk(3, dim=1)
        else:
            gamma, alpha, beta = self.gamma[None], self.alpha[None], self.beta[None]
        means = x.mean((2, 3))
        mean, variance = means.mean(1, keepdim=True), means.var(1, keepdim=True)
        means = (means - mean) / torch.sqrt(variance + EPS)
        h = F.instance_norm(x, eps=EPS) + (alpha * means)[:, :, None, None]
        return gamma[:, :, None, None] * h + beta[:, :, None, None]


def conv(a: int, b: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=dilation, dilation=dilation, bias=bias)


class PooledConv(nn.Module):
    """A convolution, then the mean of 2x2 pixels."""

    def __init__(self, a: int, b: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(a, b, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), 2)


class Residual(nn.Module):
    """Norm, ELU, convolution, twice, and a shortcut."""

    def __init__(self, a: int, b: int, classes: int | None, dilation: int, down: bool) -> None:
        super().__init__()
        pooled = down and dilation == 1
        self.normalize1, self.normalize2 = Norm(a, classes), Norm(a, classes)
        self.conv1 = conv(a, a, dilation)
        self.conv2 = PooledConv(a, b, 3) if pooled else conv(a, b, dilation)
        self.shortcut = nn.Identity()
        if down:
            self.shortcut = PooledConv(a, b, 1) if pooled else conv(a, b, dilation)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.conv1(F.elu(self.normalize1(x, y)))
        return self.shortcut(x) + self.conv2(F.elu(self.normalize2(h, y)))


class Units(nn.Module):
    """Residual convolution units."""

    def __init__(self, channels: int, count: int, classes: int | None) -> None:
        super().__init__()
        self.count, self.normed = count, classes is not None
        for name in self.names():
            self.add_module(f"{name}_conv", conv(channels, channels, bias=False))
            if self.normed:
                self.add_module(f"{name}_norm", Norm(channels, classes))

    def names(self) -> list[str]:
        return [f"{unit}_{layer}" for unit in range(1, self.count + 1) for layer in (1, 2)]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x
        for i, name in enumerate(self.names()):
            if self.normed:
                h = getattr(self, f"{name}_norm")(h, y)
            h = getattr(self, f"{name}_conv")(F.elu(h))
            if i % 2:
                h = x = x + h
        return x


class Branches(nn.Module):
    """Convolutions, and norms in the form of 2019; what is done with them is the refine block's."""

    def __init__(self, a: Sequence[int], b: int, classes: int | None, bias: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(n, b, bias=bias) for n in a)
        if classes is not None:
            self.norms = nn.ModuleList(Norm(n, classes) for n in a)


class Refine(nn.Module):
    """Units, fusion, chained pooling, units."""

    def __init__(self, a: Sequence[int], b: int, classes: int | None, end: bool = False) -> None:
        super().__init__()
        self.normed = classes is not None
        self.adapt_convs = nn.ModuleList(Units(n, 2, classes) for n in a)
        self.output_convs = Units(b, 3 if end else 1, classes)
        if len(a) > 1:
            self.msf = Branches(a, b, classes, bias=True)
        self.crp = Branches((b, b), b, classes, bias=False)

    def forward(self, xs: Sequence[Tensor], y: Tensor) -> Tensor:
        hs = [units(x, y) for units, x in zip(self.adapt_convs, xs, strict=True)]
        h = hs[0] if len(hs) == 1 else self._fused(hs, y)
        h = total = F.elu(h)
        for i, layer in enumerate(self.crp.convs):
            if self.normed:
                h = F.avg_pool2d(self.crp.norms[i](h, y), 5, stride=1, padding=2)
            else:
                h = F.max_pool2d(h, 5, stride=1, padding=2)
            h = layer(h)
            total = total + h
        return self.output_convs(total, y)

    def _fused(self, hs: Sequence[Tensor], y: Tensor) -> Tensor:
        size, total = hs[0].shape[2:], 0
        for i, h in enumerate(hs):
            h = self.msf.convs[i](self.msf.norms[i](h, y) if self.normed else h)
            if h.shape[2:] != size:
                h = F.interpolate(h, size, mode="bilinear", align_corners=True)
            total = total + h
        return total


# --- networks -------------------------------------------------------------------------------------

# Of each stage, in the order in which they run: name, widths in n, dilation; a second stage ends in the same width.
# Of each refine block, likewise: name, what it merges besides the block before, widths in n.
FOUR = (
    (("res1", 1, 1, 1), ("res2", 1, 2, 1), ("res3", 2, 2, 2), ("res4", 2, 2, 4)),
    (
        ("refine1", "res4", (2,), 2),
        ("refine2", "res3", (2, 2), 2),
        ("refine3", "res2", (2, 2), 1),
        ("refine4", "res1", (1, 1), 1),
    ),
)
DEEPER = (
    (*FOUR[0][:2], ("res3", 2, 2, 1), ("res4", 2, 4, 2), ("res5", 4, 4, 4)),
    (
        ("refine1", "res5", (4,), 4),
        ("refine2", "res4", (4, 4), 2),
        ("refine3", "res3", (2, 2), 2),
        ("refine4", "res2", (2, 2), 1),
        ("refine5", "res1", (1, 1), 1),
    ),
)
DEEPEST = (
    (*DEEPER[0][:3], ("res31", 2, 2, 1), *DEEPER[0][3:]),
    (*DEEPER[1][:2], ("refine31", "res31", (2, 2), 2), *DEEPER[1][2:]),
)
TABLES = {"OfficialNCSN": FOUR, "NCSNv2": FOUR, "NCSNv2Deeper": DEEPER, "NCSNv2Deepest": DEEPEST}


class Network(nn.Module):
    """One of the four, for data in [0, 1]; ``labels`` ``(N,)``."""

    def __init__(self, name: str, in_channels: int, nf: int, levels: int) -> None:
        super().__init__()
        of_2019 = name == "OfficialNCSN"
        classes = levels if of_2019 else None
        self.register_buffer("sigmas", None if of_2019 else torch.ones(levels))
        self.begin_conv, self.end_conv = conv(in_channels, nf), conv(nf, in_channels)
        self.normalizer = Norm(nf, classes)
        self.stages, self.refines = TABLES[name]
        for i, (stage, a, b, dilation) in enumerate(self.stages):
            first = Residual(a * nf, b * nf, classes, dilation, down=i > 0)
            second = Residual(b * nf, b * nf, classes, dilation, down=False)
            self.add_module(stage, nn.ModuleList([first, second]))
        for refine, _, a, b in self.refines:
            end = refine == self.refines[-1][0]
            self.add_module(refine, Refine([n * nf for n in a], b * nf, classes, end))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h, outputs = self.begin_conv(2 * x - 1), {}
        for stage, *_ in self.stages:
            for block in getattr(self, stage):
                h = block(h, labels)
            outputs[stage] = h
        merged = None
        for refine, beside, *_ in self.refines:
            inputs = [outputs[beside]] if merged is None else [outputs[beside], merged]
            merged = getattr(self, refine)(inputs, labels)
        score = self.end_conv(F.elu(self.normalizer(merged, labels)))
        return score if self.sigmas is None else score / self.sigmas[labels][:, None, None, None]


def network_like(model: nn.Module) -> Network:
    """The network with the weights of one of ours."""
    config = model.config
    with torch.device("meta"):
        network = Network(type(model).__name__, config.in_channels, config.nf, config.num_classes)
    network.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return network.train(model.training)


@torch.no_grad()
def sample(
    network: Callable,
    x: Tensor,
    sigmas: Tensor,
    steps: int,
    step_lr: float,
    noise_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Annealed Langevin dynamics from ``x`` as the authors' programs walk it: never clamped."""
    for level in range(len(sigmas)):
        labels = torch.full((len(x),), level, device=x.device)
        step_size = step_lr * (sigmas[level] / sigmas[-1]) ** 2
        for _ in range(steps):
            x = x + step_size * network(x, labels) + torch.sqrt(2 * step_size) * noise_like(x)
    return x
