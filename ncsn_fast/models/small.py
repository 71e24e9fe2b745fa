"""Small score networks that are conditioned on sigma itself: a perceptron for points, a convolutional one for images.

Belongs here: :class:`ScoreMLP`, :class:`ScoreCNN` and their configurations. Does not belong here: what all
networks share (``base.py``), other networks, training.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import boolean, positive_int
from ..data.ranges import IMAGE_RANGE
from ..embeddings import SigmaEmbedding
from .base import ScoreModel
from .config import choose_config, free_ladder
from .plain import tell_called, why_not_plain
from .registry import register

# --- points ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ScoreMLPConfig:
    """What a :class:`ScoreMLP` is built from; immutable, and the same again after JSON. Fields as there."""

    dim: int = 2
    hidden: Sequence[int] | None = None
    conditioning: str = "sinusoidal"
    embedding: int = 64
    scale_by_sigma: bool | None = None
    sigmas: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(
                f"conditioning must be one of {tuple(CONDITIONINGS)}, got {self.conditioning!r}"
            )
        hidden, scaled = CONDITIONINGS[self.conditioning]
        hidden = hidden if self.hidden is None else self.hidden
        store = object.__setattr__
        store(self, "dim", positive_int("dim", self.dim))
        store(self, "hidden", tuple(positive_int("hidden", width) for width in hidden))
        if not self.hidden:
            raise ValueError("hidden must hold at least one width, got none")
        store(
            self,
            "scale_by_sigma",
            scaled
            if self.scale_by_sigma is None
            else boolean("scale_by_sigma", self.scale_by_sigma),
        )
        store(self, "sigmas", free_ladder(self.sigmas))


# Hidden widths, and whether the output is divided by sigma, unless told otherwise.
CONDITIONINGS = {"sinusoidal": ((256, 256, 256), True), "concat": ((128, 128, 128), False)}


@register
class ScoreMLP(ScoreModel):
    r"""A perceptron that estimates the score of points in R^d, conditioned on sigma.

    ``"sinusoidal"``: sines and cosines of log sigma (64 wide) go through a projection of two layers with SiLU between
    them, which gives every hidden layer a scale and a shift for its units,
    :math:`h \leftarrow \mathrm{SiLU}((1 + a_\sigma) \odot (W h + b) + c_\sigma)`; the last layer is zero at first, so
    that the network begins with the score 0. ``"concat"``: sigma is one more input coordinate, nothing else.

    When sampling, a level's scale and shift are put into the weights once, so that a step costs what a plain
    perceptron costs.

    Args:
        dim: d; or a :class:`ScoreMLPConfig`, then nothing else may be given.
        hidden: widths; ``None``: (256, 256, 256), or (128, 128, 128) for ``"concat"``.
        conditioning: ``"sinusoidal"`` or ``"concat"``.
        embedding: width of the sines and cosines.
        scale_by_sigma: divide the output by sigma, so that the network proper estimates -z; ``None``: with
            ``"sinusoidal"`` only. Data that fill an area with a bounded score are better off without, thin data with.
        sigmas: the ladder, see :meth:`set_sigmas`; ``None`` to set it later.
        config: the configuration by keyword, instead of everything else.

    Shape:
        x ``(N, d)``, sigma a number, 0-d, ``(1,)`` or ``(N,)`` -> ``(N, d)``.
    """

    Config = ScoreMLPConfig

    def __init__(
        self,
        dim: int | ScoreMLPConfig = 2,
        hidden: Sequence[int] | None = None,
        conditioning: str = "sinusoidal",
        embedding: int = 64,
        scale_by_sigma: bool | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        *,
        config: ScoreMLPConfig | None = None,
    ) -> None:
        fields = (dim, hidden, conditioning, embedding, scale_by_sigma, sigmas)
        config = choose_config(ScoreMLPConfig, config, *fields)
        super().__init__(config)
        self._sinusoidal = config.conditioning == "sinusoidal"
        inputs = config.dim if self._sinusoidal else config.dim + 1
        widths = (inputs, *config.hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.last = nn.Linear(widths[-1], config.dim)
        if self._sinusoidal:
            self.embedding = SigmaEmbedding(config.embedding)
            width = config.hidden[0]
            self.projection = nn.Sequential(
                nn.Linear(config.embedding, width),
                nn.SiLU(),
                nn.Linear(width, 2 * sum(config.hidden)),
            )
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """``(d,)``."""
        return (self.config.dim,)

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The score of the data with noise sigma, at ``x``.

        Raises:
            ValueError: ``x`` or ``sigma`` of another shape; a sigma that is not positive.
            TypeError: ``x`` of another dtype than the parameters.
        """
        sigma = self.check_input(x, sigma)
        return self._score(x, sigma, self._modulation(sigma) if self._sinusoidal else [])

    def at_labels(self, x: Tensor, labels: Tensor) -> Tensor:
        """The score, each row at a level of the ladder; sigma is embedded once for each level, not for each row."""
        if not self._sinusoidal or why_not_plain(self, ScoreMLP) is not None:
            return super().at_labels(x, labels)
        self.check_data(x)
        sigmas = self.sigmas.to(x.dtype)
        modulation = [
            (scale.index_select(0, labels), shift.index_select(0, labels))
            for scale, shift in self._modulation(sigmas)
        ]
        return self._score(x, sigmas.index_select(0, labels), modulation)

    def _score(
        self, x: Tensor, sigma: Tensor, modulation: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        if self._sinusoidal:
            h = x
            for layer, (scale, shift) in zip(self.layers, modulation, strict=True):
                h = F.silu((1 + scale) * layer(h) + shift)
        else:
            h = torch.cat([x, sigma.unsqueeze(1).expand(len(x), 1)], 1)
            for layer in self.layers:
                h = F.silu(layer(h))
        score = self.last(h)
        return score / sigma.unsqueeze(1) if self.config.scale_by_sigma else score

    def at(self, sigma: Tensor) -> Callable[[Tensor], Tensor]:
        """The score at one noise level, for use without gradients: a perceptron with sigma put into its weights.

        Layers with hooks, of another class or with a forward of their own are called instead.
        """
        built = [(layer, nn.Linear) for layer in (*self.layers, self.last)]
        for layer, kind in ((self, ScoreMLP), *built):
            reason = why_not_plain(layer, kind)
            if reason is not None:
                tell_called(layer, reason)
                return super().at(sigma)
        with torch.no_grad():
            sigma = sigma.to(self.last.weight.dtype).reshape(1)
            if self._sinusoidal:
                layers = [
                    (
                        (1 + scale[0]).unsqueeze(1) * layer.weight,
                        (1 + scale[0]) * layer.bias + shift[0],
                    )
                    for layer, (scale, shift) in zip(
                        self.layers, self._modulation(sigma), strict=True
                    )
                ]
            else:
                layers = [(layer.weight, layer.bias) for layer in self.layers]
                weight, bias = layers[0]
                layers[0] = (weight[:, :-1], bias + sigma * weight[:, -1])
            divisor = sigma if self.config.scale_by_sigma else 1
            last_weight, last_bias = self.last.weight / divisor, self.last.bias / divisor

        def score(x: Tensor) -> Tensor:
            for weight, bias in layers:
                x = F.silu(F.linear(x, weight, bias), inplace=True)
            return F.linear(x, last_weight, last_bias)

        return score

    def _modulation(self, sigma: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Scale and shift of each hidden layer, ``(N, width)`` each."""
        both = self.projection(self.embedding(sigma)).split([2 * w for w in self.config.hidden], 1)
        return [part.chunk(2, 1) for part in both]


# --- images ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ScoreCNNConfig:
    """What a :class:`ScoreCNN` is built from; immutable, and the same again after JSON. Fields as there."""

    in_channels: int = 1
    nf: int = 32
    image_size: int = 28
    embedding: int = 64
    scale_by_sigma: bool = True
    sigmas: Sequence[float] | None = None

    def __post_init__(self) -> None:
        store = object.__setattr__
        for name in ("in_channels", "nf", "image_size"):
            store(self, name, positive_int(name, getattr(self, name)))
        store(self, "scale_by_sigma", boolean("scale_by_sigma", self.scale_by_sigma))
        if self.nf % GROUPS:
            raise ValueError(f"nf must be a multiple of {GROUPS}, got {self.nf}")
        store(self, "sigmas", free_ladder(self.sigmas))


GROUPS = 8  # of channels, normalised together


@register
class ScoreCNN(ScoreModel):
    r"""A small convolutional score network for images, 28x28 and grey by default, conditioned on sigma.

    A U-shape of three resolutions (28, 14 and 7 pixels), one residual block at each on the way down and on the way up.
    Each block normalises its channels in groups, then scales and shifts them by learned functions of sigma:
    :math:`h \leftarrow \mathrm{SiLU}((1 + a_\sigma) \odot \mathrm{norm}(h) + c_\sigma)`. With ``nf=32``, 0.39 million
    parameters. Images are divided by :math:`\sqrt{1 + \sigma^2}` on their way in, so that wide noise does not
    overwhelm the first layer.

    Args:
        in_channels: 1 for grey, 3 for RGB; or a :class:`ScoreCNNConfig`, then nothing else may be given.
        nf: width at full resolution, a multiple of 8; twice that below.
        image_size: height and width that :meth:`sample` draws; ``forward`` takes any.
        embedding: width of the sines and cosines of log sigma.
        scale_by_sigma: divide the output by sigma, so that the network proper estimates -z.
        sigmas: the ladder, see :meth:`set_sigmas`; ``None`` to set it later.
        config: the configuration by keyword, instead of everything else.

    Shape:
        x ``(N, in_channels, H, W)``, sigma a number, 0-d, ``(1,)`` or ``(N,)`` -> the shape of x.
    """

    Config = ScoreCNNConfig
    data_range = IMAGE_RANGE

    def __init__(
        self,
        in_channels: int | ScoreCNNConfig = 1,
        nf: int = 32,
        image_size: int = 28,
        embedding: int = 64,
        scale_by_sigma: bool = True,
        sigmas: Sequence[float] | Tensor | None = None,
        *,
        config: ScoreCNNConfig | None = None,
    ) -> None:
        fields = (in_channels, nf, image_size, embedding, scale_by_sigma, sigmas)
        config = choose_config(ScoreCNNConfig, config, *fields)
        super().__init__(config)
        nf, wide = config.nf, 2 * config.nf
        self.embedding = SigmaEmbedding(config.embedding)
        self.projection = nn.Sequential(nn.Linear(config.embedding, wide), nn.SiLU())
        self.first = _conv(config.in_channels, nf)
        self.down1 = _Block(nf, nf, wide)
        self.down2 = _Block(nf, wide, wide)
        self.middle = _Block(wide, wide, wide)
        self.up2 = _Block(2 * wide, wide, wide)
        self.up1 = _Block(wide + nf, nf, wide)
        self.norm = nn.GroupNorm(GROUPS, nf)
        self.last = _conv(nf, config.in_channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """``(in_channels, image_size, image_size)``."""
        return (self.config.in_channels, self.config.image_size, self.config.image_size)

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The score of the data with noise sigma, at ``x``.

        Raises:
            ValueError: ``x`` or ``sigma`` of another shape; a sigma that is not positive.
            TypeError: ``x`` of another dtype than the parameters.
        """
        sigma = self.check_input(x, sigma)
        return self._score(x, sigma, self.projection(self.embedding(sigma)))

    def at(self, sigma: Tensor) -> Callable[[Tensor], Tensor]:
        """The score at one noise level, for use without gradients; sigma is embedded once."""
        if (reason := why_not_plain(self, ScoreCNN)) is not None:
            tell_called(self, reason)
            return super().at(sigma)
        sigma = sigma.to(self.last.weight.dtype).reshape(1)
        with torch.no_grad():
            condition = self.projection(self.embedding(sigma))
        return lambda x: self._score(x, sigma, condition)

    def _score(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        h1 = self.down1(self.first(x / (1 + sigma**2).sqrt()), condition)
        h2 = self.down2(_halved(h1), condition)
        h3 = self.middle(_halved(h2), condition)
        h = self.up2(torch.cat([_enlarged(h3, h2), h2], 1), condition)
        h = self.up1(torch.cat([_enlarged(h, h1), h1], 1), condition)
        out = self.last(F.silu(self.norm(h)))
        return out / sigma if self.config.scale_by_sigma else out


class _Block(nn.Module):
    """Two convolutions, each after a norm that sigma modulates, and a way past them."""

    def __init__(self, channels: int, out: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels), nn.GroupNorm(GROUPS, out)
        self.modulate1, self.modulate2 = (
            nn.Linear(condition, 2 * channels),
            nn.Linear(condition, 2 * out),
        )
        self.conv1, self.conv2 = _conv(channels, out), _conv(out, out)
        self.past = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(_modulated(self.norm1(x), self.modulate1(condition)))
        h = self.conv2(_modulated(self.norm2(h), self.modulate2(condition)))
        return self.past(x) + h


def _modulated(x: Tensor, scale_and_shift: Tensor) -> Tensor:
    scale, shift = scale_and_shift.unsqueeze(2).unsqueeze(3).chunk(2, 1)
    return F.silu((1 + scale) * x + shift)


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def _halved(x: Tensor) -> Tensor:
    """Half as high and wide, rounded up, so that one pixel stays one."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="nearest")
