"""The authors' own networks: NCSN of 2019, and NCSNv2, Deeper and Deepest of 2020.

Belongs here: how their blocks are connected, their configurations. Does not belong here: the blocks (``refinenet.py``),
their checkpoint files (``convert.py``).

State dicts have the authors' keys in the authors' order, and a seed of torch gives the initial values that it gives
there. All take data in [0, 1] and rescale them themselves.

Reference: Song & Ermon, 2019, arXiv:1907.05600; 2020, arXiv:2006.09011.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..checks import boolean, positive_int
from ..data.ranges import IMAGE_RANGE
from .base import LABEL, ScoreModel
from .config import choose_config, fixed_ladder
from .drawing import scores_of_labels
from .layers import convolve
from .refinenet import RefineBlock, ResidualBlock, Stage, conv3x3, make_norm, norm_act_conv
from .registry import register

# --- configurations ---------------------------------------------------------------------------------


def _check_fields(config: Any, flags: Sequence[str]) -> None:
    """What the configurations have in common, checked and normalised while they are made."""
    store = object.__setattr__
    for name in ("in_channels", "nf", "num_classes"):
        store(config, name, positive_int(name, getattr(config, name)))
    if config.nf == 1:
        raise ValueError("InstanceNorm++ compares channels and needs nf >= 2, got nf 1")
    for name in flags:
        store(config, name, boolean(name, getattr(config, name)))
    store(config, "sigmas", fixed_ladder(config.sigmas, config.num_classes))


@dataclasses.dataclass(frozen=True)
class OfficialNCSNConfig:
    """What an :class:`OfficialNCSN` is built from; immutable. Fields as there.

    Raises:
        TypeError: a field of the wrong type. The message names the field.
        ValueError: a field out of its range.
    """

    in_channels: int = 3
    nf: int = 128
    num_classes: int = 10
    logit_transform: bool = False
    sigmas: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        _check_fields(self, ("logit_transform",))


@dataclasses.dataclass(frozen=True)
class _ConfigOf2020:
    in_channels: int = 3
    nf: int = 128
    num_classes: int = 232
    rescaled: bool = False
    logit_transform: bool = False
    sigmas: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        _check_fields(self, ("rescaled", "logit_transform"))


# A type for each, since it says which network it is of.


@dataclasses.dataclass(frozen=True)
class NCSNv2Config(_ConfigOf2020):
    """What an :class:`NCSNv2` is built from; immutable. Fields as there, errors as of :class:`OfficialNCSNConfig`."""


@dataclasses.dataclass(frozen=True)
class NCSNv2DeeperConfig(_ConfigOf2020):
    """What an :class:`NCSNv2Deeper` is built from; as :class:`NCSNv2Config`."""


@dataclasses.dataclass(frozen=True)
class NCSNv2DeepestConfig(_ConfigOf2020):
    """What an :class:`NCSNv2Deepest` is built from; as :class:`NCSNv2Config`."""


# --- what the networks have in common ---------------------------------------------------------------


class _OfficialNetwork(ScoreModel):
    """Inputs and output of the four networks; the body between is their own.

    Args:
        config: of the network.

    Attributes:
        data_range: [0, 1]; [-1, 1] where the config says ``rescaled``, ``None`` where the data are logits.
    """

    conditioned_on = LABEL
    data_range = (0.0, 1.0)
    samples_as_weights = True
    divisor: ClassVar[int]  # of height and width: how often they are halved
    divides_by_sigma: ClassVar[bool]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        rescaled = getattr(config, "rescaled", False)
        self._takes_as_is = config.logit_transform or rescaled
        if self._takes_as_is:
            self.data_range = None if config.logit_transform else IMAGE_RANGE
        self.begin_conv = conv3x3(config.in_channels, config.nf)
        levels = None if self.divides_by_sigma else config.num_classes
        self.normalizer = make_norm(config.nf, levels)
        self.end_conv = conv3x3(config.nf, config.in_channels)
        self._build(
            config.nf,
            partial(ResidualBlock, num_classes=levels),
            partial(RefineBlock, num_classes=levels),
        )

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """``(in_channels, None, None)``: images of any size that :func:`check_size` allows."""
        return (self.config.in_channels, None, None)

    def _build(self, n: int, res: Callable[..., ResidualBlock], refine: Callable[..., RefineBlock]):
        """Make the stages and the refine blocks, in the order of the state dict."""
        raise NotImplementedError

    def _body(self, h: Tensor, y: Tensor) -> Tensor:
        """From ``begin_conv``'s output to what the last norm takes."""
        raise NotImplementedError

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The score at each image.

        Args:
            x: images ``(N, in_channels, H, W)``, data in [0, 1] plus noise; in the dtype of the parameters, or any but
                float64 under autocast; contiguous or channels_last. H and W are multiples of the network's
                ``divisor`` and hold more than one such square.
            labels: noise levels ``(N,)``, integers in ``0..K-1``, 0 the largest; or ``(1,)``, one level for the batch.

        Returns:
            The score, shape, dtype and layout of ``x``.

        Raises:
            RuntimeError: the sigmas are not set, and the network divides by them.
            TypeError: ``x`` or ``labels`` of another dtype.
            ValueError: ``x`` or ``labels`` of another shape, an H or W that does not work.
            IndexError: labels out of range, on the CPU. On CUDA the device asserts.
        """
        if self.divides_by_sigma:
            self._require_sigmas()
        labels = self.check_input(x, labels)

        h = x if self._takes_as_is else 2 * x - 1
        convert = ops.wants_channels_last(x)
        if convert:  # here and at the end, for all the layers between
            h = h.contiguous(memory_format=torch.channels_last)
        h = convolve(self.begin_conv, h)
        h = self._body(h, labels)
        score = norm_act_conv(self.normalizer, self.end_conv, h, labels)
        if convert:
            score = score.contiguous()
        if self.divides_by_sigma:
            score = score / self.sigmas.index_select(0, labels).view(-1, 1, 1, 1)
        return score.to(x.dtype)

    def check_data(self, x: Tensor) -> None:
        """Check a batch, its height and width too."""
        super().check_data(x)
        check_size(type(self), *x.shape[2:])

    def scores(self) -> Mapping[str, Callable[[Tensor, Any], Tensor]]:
        """The score as samplers take it: at any sigma too, where the network divides by it and does nothing else."""
        of_level = scores_of_labels(self)
        if not self.divides_by_sigma:
            return of_level
        first = self.sigmas[0]
        return {**of_level, "sigma": lambda x, sigma: of_level["level"](x, 0) * (first / sigma)}


def check_size(network: type[_OfficialNetwork], height: int, width: int) -> None:
    """Refuse images that the network cannot halve so often, or whose smallest map would be a single pixel.

    The authors' programs fail on most of these and compute nonsense for some, such as 6x6 with NCSNv2Deeper.
    """
    d = network.divisor
    if height % d or width % d or height * width <= d * d:
        raise ValueError(
            f"{network.__name__} takes images whose height and width are multiples of {d}, and more than {d}x{d}, "
            f"got {height}x{width}"
        )


class _FourStages(_OfficialNetwork):
    """The network of 2019, and with the other norms and pools the NCSNv2."""

    divisor = 2

    def _build(self, n: int, res: Callable[..., ResidualBlock], refine: Callable[..., RefineBlock]):
        n2 = 2 * n
        self.res1 = Stage([res(n, n), res(n, n)])
        self.res2 = Stage([res(n, n2, down=True), res(n2, n2)])
        self.res3 = Stage([res(n2, n2, down=True, dilation=2), res(n2, n2, dilation=2)])
        self.res4 = Stage([res(n2, n2, down=True, dilation=4), res(n2, n2, dilation=4)])
        self.refine1 = refine([n2], n2)
        self.refine2 = refine([n2, n2], n2)
        self.refine3 = refine([n2, n2], n)
        self.refine4 = refine([n, n], n, end=True)

    def _body(self, h: Tensor, y: Tensor) -> Tensor:
        h1 = self.res1(h, y)
        h2 = self.res2(h1, y)
        h3 = self.res3(h2, y)
        h4 = self.res4(h3, y)
        r = self.refine1([h4], y)
        r = self.refine2([h3, r], y)
        r = self.refine3([h2, r], y)
        return self.refine4([h1, r], y)


# --- the networks -----------------------------------------------------------------------------------


@register
class OfficialNCSN(_FourStages):
    """The network of the 2019 paper as its authors published it: a RefineNet, every norm conditioned on the level.

    Differs from :class:`~ncsn_fast.NCSN` in widths, residual blocks, pools and norms, in data in [0, 1], and in that
    the score is not divided by sigma.

    Args:
        in_channels: channels of the images; or an :class:`OfficialNCSNConfig`.
        nf: base width n; the deeper stages have 2n channels.
        num_classes: number of noise levels K.
        logit_transform: the data are logits: take them as they are, not as ``2 x - 1``.
        sigmas: the ladder, see :meth:`set_sigmas`; ``None`` to set it later. The network does not need it, training
            and sampling do.
        config: the configuration by keyword, instead of everything else.

    Attributes:
        sigmas: buffer ``(K,)``, float32; not in the state dict, which is the authors', but in ``config``.
    """

    Config = OfficialNCSNConfig
    divides_by_sigma = False

    def __init__(
        self,
        in_channels: int | OfficialNCSNConfig = 3,
        nf: int = 128,
        num_classes: int = 10,
        logit_transform: bool = False,
        *,
        sigmas: Sequence[float] | Tensor | None = None,
        config: OfficialNCSNConfig | None = None,
    ) -> None:
        fields = (in_channels, nf, num_classes, logit_transform)
        super().__init__(choose_config(OfficialNCSNConfig, config, *fields, sigmas=sigmas))
        self.register_buffer("sigmas", self.sigmas, persistent=False)

    def set_sigmas(self, sigmas: Sequence[float] | Tensor) -> None:
        """Set the ladder of noise levels, here and in ``config``, with which it is saved.

        Raises:
            ValueError: another length, a value not positive and finite, or not strictly descending.
            TypeError: not made of real numbers.
        """
        super().set_sigmas(sigmas)
        self.config = dataclasses.replace(self.config, sigmas=sigmas)


@register
class NCSNv2(_FourStages):
    """The network of the 2020 paper for images up to 64x64. It never sees the level: the score is f(x) / sigma.

    Args:
        in_channels: channels of the images; or an :class:`NCSNv2Config`.
        nf: base width n; the deeper stages have 2n channels.
        num_classes: number of noise levels K.
        rescaled: the data are in [-1, 1]: take them as they are, not as ``2 x - 1``.
        logit_transform: the data are logits: take them as they are.
        sigmas: the ladder, see :meth:`set_sigmas`; ``None`` to set it later.
        config: the configuration by keyword, instead of everything else.

    Attributes:
        sigmas: buffer ``(K,)``, float32 whatever the dtype of the parameters; zeros until set; first in the state dict.
    """

    Config = NCSNv2Config
    divides_by_sigma = True

    def __init__(
        self,
        in_channels: int | NCSNv2Config = 3,
        nf: int = 128,
        num_classes: int = 232,
        rescaled: bool = False,
        logit_transform: bool = False,
        *,
        sigmas: Sequence[float] | Tensor | None = None,
        config: NCSNv2Config | None = None,
    ) -> None:
        fields = (in_channels, nf, num_classes, rescaled, logit_transform)
        super().__init__(choose_config(self.Config, config, *fields, sigmas=sigmas))


@register
class NCSNv2Deeper(NCSNv2):
    """The network of the 2020 paper for images up to 128x128: three sizes, 4n channels at the smallest.

    Arguments and attributes as of :class:`NCSNv2`.
    """

    divisor = 4
    Config = NCSNv2DeeperConfig

    def _build(self, n: int, res: Callable[..., ResidualBlock], refine: Callable[..., RefineBlock]):
        n2, n4 = 2 * n, 4 * n
        self.res1 = Stage([res(n, n), res(n, n)])
        self.res2 = Stage([res(n, n2, down=True), res(n2, n2)])
        self.res3 = Stage([res(n2, n2, down=True), res(n2, n2)])
        self.res4 = Stage([res(n2, n4, down=True, dilation=2), res(n4, n4, dilation=2)])
        self.res5 = Stage([res(n4, n4, down=True, dilation=4), res(n4, n4, dilation=4)])
        self.refine1 = refine([n4], n4)
        self.refine2 = refine([n4, n4], n2)
        self.refine3 = refine([n2, n2], n2)
        self.refine4 = refine([n2, n2], n)
        self.refine5 = refine([n, n], n, end=True)

    def _body(self, h: Tensor, y: Tensor) -> Tensor:
        h1 = self.res1(h, y)
        h2 = self.res2(h1, y)
        h3 = self.res3(h2, y)
        h4 = self.res4(h3, y)
        h5 = self.res5(h4, y)
        r = self.refine1([h5], y)
        r = self.refine2([h4, r], y)
        r = self.refine3([h3, r], y)
        r = self.refine4([h2, r], y)
        return self.refine5([h1, r], y)


@register
class NCSNv2Deepest(NCSNv2):
    """The network of the 2020 paper for images of 256x256: four sizes.

    Arguments and attributes as of :class:`NCSNv2`.
    """

    divisor = 8
    Config = NCSNv2DeepestConfig

    def _build(self, n: int, res: Callable[..., ResidualBlock], refine: Callable[..., RefineBlock]):
        n2, n4 = 2 * n, 4 * n
        self.res1 = Stage([res(n, n), res(n, n)])
        self.res2 = Stage([res(n, n2, down=True), res(n2, n2)])
        self.res3 = Stage([res(n2, n2, down=True), res(n2, n2)])
        self.res31 = Stage([res(n2, n2, down=True), res(n2, n2)])
        self.res4 = Stage([res(n2, n4, down=True, dilation=2), res(n4, n4, dilation=2)])
        self.res5 = Stage([res(n4, n4, down=True, dilation=4), res(n4, n4, dilation=4)])
        self.refine1 = refine([n4], n4)
        self.refine2 = refine([n4, n4], n2)
        self.refine3 = refine([n2, n2], n2)
        self.refine31 = refine([n2, n2], n2)  # runs before refine3
        self.refine4 = refine([n2, n2], n)
        self.refine5 = refine([n, n], n, end=True)

    def _body(self, h: Tensor, y: Tensor) -> Tensor:
        h1 = self.res1(h, y)
        h2 = self.res2(h1, y)
        h3 = self.res3(h2, y)
        h31 = self.res31(h3, y)
        h4 = self.res4(h31, y)
        h5 = self.res5(h4, y)
        r = self.refine1([h5], y)
        r = self.refine2([h4, r], y)
        r = self.refine31([h31, r], y)
        r = self.refine3([h3, r], y)
        r = self.refine4([h2, r], y)
        return self.refine5([h1, r], y)
