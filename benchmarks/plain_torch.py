"""What the kernels are compared with: operators, network and loops as one writes them in plain PyTorch.

Nothing of ncsn_fast runs here. The network has the documented state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5

# --- operators ------------------------------------------------------------------------------------


def cond_instance_norm_elu(x: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's instance norm, an embedding lookup, multiply, add, ELU; InstanceNorm++ for weights ``(K, 3C)``."""
    gamma, *alpha, beta = F.embedding(labels, weight).chunk(weight.shape[1] // x.shape[1], dim=1)
    h = F.instance_norm(x, eps=EPS)
    if alpha:
        mean = x.mean((2, 3))
        spread = torch.sqrt(mean.var(1, keepdim=True) + EPS)
        beta = beta + gamma * alpha[0] * (mean - mean.mean(1, keepdim=True)) / spread
    return F.elu(gamma[:, :, None, None] * h + beta[:, :, None, None])


def max_pool5(x: Tensor) -> Tensor:
    """PyTorch's 5x5 pool."""
    return F.max_pool2d(x, 5, stride=1, padding=2)


def avg_pool5(x: Tensor) -> Tensor:
    """PyTorch's 5x5 average pool."""
    return F.avg_pool2d(x, 5, stride=1, padding=2)


def elu_conv3x3(x: Tensor, weight: Tensor, residual: Tensor, dilation: int = 1) -> Tensor:
    """ELU, convolution and addition, one after the other."""
    return F.conv2d(F.elu(x), weight, padding=dilation, dilation=dilation) + residual


def conv3x3_mean_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution and 2x2 average pool, one after the other."""
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)


def norm_elu_conv3x3(
    x: Tensor, labels: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1
) -> Tensor:
    """Norm, ELU and convolution, one after the other."""
    h = cond_instance_norm_elu(x, labels, norm_weight)
    return F.conv2d(h, weight, bias, padding=dilation, dilation=dilation)


def langevin_step(x: Tensor, score: Tensor, step_size: float, noise: Tensor, clip: float) -> Tensor:
    """The update of annealed Langevin dynamics, in place."""
    return x.add_(step_size * score + (2 * step_size) ** 0.5 * noise).clamp_(-clip, clip)


def solver_step(
    x: Tensor, score: Tensor, previous: Tensor, row: Sequence[float], noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The update of a multistep solver, and the memory that it leaves, in place."""
    a, b, c, d, e = row
    memory = x + d * score
    x.copy_(a * x + b * score + e * previous + c * noise)
    return x, previous.copy_(memory)


# --- the network ----------------------------------------------------------------------------------


class Norm(nn.Module):
    """Conditional instance norm and ELU."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, 2 * channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cond_instance_norm_elu(x, y, self.embed.weight)


def conv(channels_in: int, channels_out: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=dilation, dilation=dilation)


class Unit(nn.Module):
    """Residual convolution unit."""

    def __init__(self, channels: int, classes: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(channels, classes), Norm(channels, classes)
        self.conv1 = nn.ModuleDict({"conv": conv(channels, channels, dilation)})
        self.conv2 = nn.ModuleDict({"conv": conv(channels, channels, dilation)})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.conv1["conv"](self.norm1(x, y))
        return x + self.conv2["conv"](self.norm2(h, y))


class Units(nn.Module):
    """Two of them."""

    def __init__(self, channels: int, classes: int, dilation: int = 1) -> None:
        super().__init__()
        self.units = nn.ModuleList(Unit(channels, classes, dilation) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x, y)
        return x


class Stack(nn.Module):
    """Norms and convolutions, as many as there are branches or links."""

    def __init__(self, count: int, channels: int, classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(Norm(channels, classes) for _ in range(count))
        self.convs = nn.ModuleList(conv(channels, channels) for _ in range(count))


class Refine(nn.Module):
    """Refine block: residual units, fusion, chained residual pooling, residual units."""

    def __init__(self, inputs: int, channels: int, classes: int) -> None:
        super().__init__()
        self.rcu_in = nn.ModuleList(Units(channels, classes) for _ in range(inputs))
        self.msf = Stack(inputs, channels, classes)
        self.crp = Stack(4, channels, classes)
        self.rcu_out = Units(channels, classes)

    def forward(self, xs: Sequence[Tensor], y: Tensor) -> Tensor:
        hs = [units(x, y) for units, x in zip(self.rcu_in, xs, strict=True)]
        h = hs[0]
        if len(hs) > 1:
            branches = zip(self.msf.convs, self.msf.norms, hs, strict=True)
            h = sum(conv(norm(h, y)) for conv, norm, h in branches)
        out = h
        for link, norm in zip(self.crp.convs, self.crp.norms, strict=True):
            h = link(max_pool5(norm(h, y)))
            out = out + h
        return self.rcu_out(out, y)


class Network(nn.Module):
    """The documented NCSN."""

    def __init__(
        self, in_channels: int = 3, nf: int = 128, classes: int = 10, dilations=(1, 2, 4, 8)
    ) -> None:
        super().__init__()
        self.register_buffer("sigmas", torch.ones(classes))
        self.begin_conv, self.end_conv = conv(in_channels, nf), conv(nf, in_channels)
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            Units(nf, classes, d) for d in dilations
        )
        self.refine4 = Refine(1, nf, classes)
        self.refine3, self.refine2, self.refine1 = (Refine(2, nf, classes) for _ in range(3))
        self.end_norm = Norm(nf, classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h1 = self.stage1(self.begin_conv(x), y)
        h2 = self.stage2(h1, y)
        h3 = self.stage3(h2, y)
        h4 = self.stage4(h3, y)
        r = self.refine4([h4], y)
        r = self.refine3([h3, r], y)
        r = self.refine2([h2, r], y)
        r = self.refine1([h1, r], y)
        return self.end_conv(self.end_norm(r, y)) / self.sigmas[y][:, None, None, None]


def network_like(model: nn.Module) -> Network:
    """The network with the weights of an :class:`~ncsn_fast.NCSN` of the documented kind, on its device."""
    config = model.config
    with torch.device("meta"):
        network = Network(config.in_channels, config.nf, config.num_classes, config.dilations)
        if config.norm == "instance++":
            for norm in (m for m in network.modules() if isinstance(m, Norm)):
                norm.embed = nn.Embedding(config.num_classes, 3 * config.nf)
    network.load_state_dict(model.state_dict(), assign=True)
    network = network.train(model.training)
    # Copies, not the model's own: one is trained without the other.
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    return network


# --- loops ----------------------------------------------------------------------------------------


def loss(network: Callable, x: Tensor, labels: Tensor, sigmas: Tensor, noise: Tensor) -> Tensor:
    """Denoising score matching, weighted with sigma squared."""
    sigma = sigmas[labels][:, None, None, None]
    score = network(x + sigma * noise, labels)
    return (sigma * score + noise).square().sum((1, 2, 3)).mean()


@torch.no_grad()
def sample(
    network: Callable,
    x: Tensor,
    sigmas: Tensor,
    steps: int,
    step_lr: float,
    noise_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Annealed Langevin dynamics from ``x``, clamped to [-1, 1]."""
    for level in range(len(sigmas)):
        labels = torch.full((len(x),), level, device=x.device)
        step_size = step_lr * (sigmas[level] / sigmas[-1]) ** 2
        for _ in range(steps):
            x = x + step_size * network(x, labels) + torch.sqrt(2 * step_size) * noise_like(x)
            x = x.clamp(-1, 1)
    return x


# --- points in the plane --------------------------------------------------------------------------


class Perceptron(nn.Module):
    """A score perceptron for points; sigma, one for each row, is embedded and modulates every hidden layer."""

    def __init__(self, dim: int, hidden: Sequence[int], frequencies: Tensor) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies)
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip((dim, *hidden), hidden, strict=False)
        )
        self.last = nn.Linear(hidden[-1], dim)
        self.projection = nn.Sequential(
            nn.Linear(2 * len(frequencies), hidden[0]),
            nn.SiLU(),
            nn.Linear(hidden[0], 2 * sum(hidden)),
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        angles = sigma.log()[:, None] * self.frequencies
        condition = self.projection(torch.cat([torch.sin(angles), torch.cos(angles)], 1))
        for layer in self.layers:
            width = 2 * layer.out_features
            scale, shift = condition[:, :width].chunk(2, 1)
            condition = condition[:, width:]
            x = F.silu((1 + scale) * layer(x) + shift)
        return self.last(x) / sigma[:, None]


def sample_points(
    network: Callable,
    x: Tensor,
    sigmas: Tensor,
    steps: int,
    step_lr: float,
    noise_like: Callable[[Tensor], Tensor] = torch.randn_like,
    *,
    rows: int | None = None,
) -> Tensor:
    """Annealed Langevin dynamics from ``x``; the network is given ``rows`` equal sigmas, by default one a point."""
    for sigma in sigmas:
        step_size = step_lr * (sigma / sigmas[-1]) ** 2
        each = sigma.expand(len(x) if rows is None else rows)
        for _ in range(steps):
            x = x + step_size * network(x, each) + torch.sqrt(2 * step_size) * noise_like(x)
    return x
