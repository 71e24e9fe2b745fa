"""The Noise Conditional Score Network: how its blocks are connected, and what a user calls.

Belongs here: :class:`NCSN`, and what its weights from lucid need. Does not belong here: the blocks (``layers.py``),
what all networks share (``base.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..data.ranges import IMAGE_RANGE
from ..sampling.defaults import STEP_LR
from . import sums
from .base import LABEL, ScoreModel
from .config import NCSNConfig, choose_config
from .layers import CondInstanceNorm, RCUBlock, RefineBlock, conv, convolve, norm_elu_conv
from .registry import register

# What lucid's sample has by default, whatever the ladder.
INIT_DIST = "uniform"


@register
class NCSN(
    ScoreModel,
    pipeline_tag="unconditional-image-generation",
    tags=["ncsn", "score-based-generative-model"],
    paper_url="https://arxiv.org/abs/1907.05600",
):
    """Noise Conditional Score Network: estimates the score of the data at each of K noise levels.

    A RefineNet at full resolution and constant width: four dilated stages and four refine blocks,
    every norm conditioned on the noise level. Either form makes one::

        NCSN(in_channels=3, nf=128, num_classes=10)
        NCSN(NCSNConfig(in_channels=3, nf=128, sigmas=NCSN.make_sigmas(50.0, 0.01, 10)))

    Args:
        in_channels: channels of the images; or an :class:`~ncsn_fast.NCSNConfig`, then nothing else
            may be given.
        nf: width of the network.
        num_classes: number of noise levels K.
        dilations: dilation of each of the four stages.
        scale_by_sigma: divide the output by the level's sigma.
        pool_padding: ``"neg_inf"``, or ``"zero"`` for weights trained in lucid.
        norm: ``"instance"``, or ``"instance++"`` for the paper's InstanceNorm++.
        sigmas: the ladder, see :meth:`set_sigmas`; ``None`` to set it later.
        config: the configuration by keyword, instead of everything else.

    Attributes:
        data_range: what the values of data must lie in.
        config: the :class:`~ncsn_fast.NCSNConfig` that was given, or the one made from the
            arguments.
        sigmas: buffer ``(K,)``, float32 whatever the dtype of the parameters; zeros until set.

    Raises:
        TypeError: a config together with other arguments; an argument of the wrong type.
        ValueError: an argument out of its range.

    Reference: Song & Ermon, 2019, "Generative Modeling by Estimating Gradients of the Data
    Distribution", `arXiv:1907.05600 <https://arxiv.org/abs/1907.05600>`_.
    """

    Config = NCSNConfig
    conditioned_on = LABEL
    data_range = IMAGE_RANGE
    samples_as_weights = True

    def __init__(
        self,
        in_channels: int | NCSNConfig = 3,
        nf: int = 128,
        num_classes: int = 10,
        dilations: Sequence[int] = (1, 2, 4, 8),
        scale_by_sigma: bool = True,
        *,
        pool_padding: str = "neg_inf",
        norm: str = "instance",
        sigmas: Sequence[float] | Tensor | None = None,
        config: NCSNConfig | None = None,
    ) -> None:
        fields = (in_channels, nf, num_classes, dilations, scale_by_sigma)
        fields = (*fields, sigmas, pool_padding, norm)
        config = choose_config(NCSNConfig, config, *fields)
        super().__init__(config)
        nf, k = config.nf, config.num_classes
        self.begin_conv = conv(config.in_channels, nf)
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            RCUBlock(nf, k, dilation=dilation) for dilation in config.dilations
        )
        self.refine4 = RefineBlock([nf], nf, k, config.pool_padding)
        self.refine3 = RefineBlock([nf, nf], nf, k, config.pool_padding)
        self.refine2 = RefineBlock([nf, nf], nf, k, config.pool_padding)
        self.refine1 = RefineBlock([nf, nf], nf, k, config.pool_padding)
        self.end_norm = CondInstanceNorm(nf, k)
        self.end_conv = conv(nf, config.in_channels)
        if config.norm == "instance++":
            for module in self.modules():
                if isinstance(module, CondInstanceNorm):
                    module.add_alpha()
        self.register_load_state_dict_pre_hook(drop_running_statistics)

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """``(in_channels, None, None)``: images of any size."""
        return (self.config.in_channels, None, None)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The score at each image.

        Args:
            x: images ``(N, in_channels, H, W)`` of any height and width, data in [-1, 1] plus
                noise; in the dtype of the parameters, or any but float64 under autocast; contiguous
                or channels_last.
            labels: noise levels ``(N,)``, integers in ``0..K-1``; or ``(1,)``, one level for the
                whole batch.

        Returns:
            The score, shape, dtype and layout of ``x``.

        Raises:
            RuntimeError: the sigmas are not set.
            TypeError: ``x`` or ``labels`` of another dtype.
            ValueError: ``x`` or ``labels`` of another shape.
            IndexError: labels out of range, on the CPU. On CUDA the device asserts, since looking
                would mean waiting.
        """
        self._require_sigmas()
        labels = self.check_input(x, labels)

        convert = ops.wants_channels_last(x)
        if convert:  # here and at the end, for all the layers between
            x = x.contiguous(memory_format=torch.channels_last)
        score = sums.score(self, x, labels) if ops.joins_sums(x) else self._through(x, labels)
        if convert:
            score = score.contiguous()
        if self.config.scale_by_sigma:
            # index_select, not indexing: it has no negative indices, on any device.
            score = score / self.sigmas.index_select(0, labels).view(-1, 1, 1, 1)
        return score.to(x.dtype)

    def _through(self, x: Tensor, labels: Tensor) -> Tensor:
        """All layers, one after the other."""
        h = convolve(self.begin_conv, x)
        h1 = self.stage1(h, labels)
        h2 = self.stage2(h1, labels)
        h3 = self.stage3(h2, labels)
        h4 = self.stage4(h3, labels)
        r = self.refine4([h4], labels)
        r = self.refine3([h3, r], labels)
        r = self.refine2([h2, r], labels)
        r = self.refine1([h1, r], labels)
        return norm_elu_conv(self.end_norm, self.end_conv, r, labels)

    def sample(
        self,
        n_samples: int,
        image_size: int | tuple[int, int],
        in_channels: int | None = None,
        n_steps_each: int | None = None,
        step_lr: float | None = None,
        clip: bool = True,
        denoise: bool | None = None,
        init: Tensor | None = None,
        init_dist: str | None = None,
        verbose: bool = True,
        *,
        seed: int | None = None,
        sample_offset: int = 0,
        callback: Callable[[int, Tensor], object] | None = None,
        sampler: str = "ald",
        snr: float | None = None,
        predictor: str | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        return_intermediates: int | None = None,
        cuda_graph: bool | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw images, by annealed Langevin dynamics unless another sampler is asked for.

        The model is in evaluation mode meanwhile; every module has its own mode back afterwards.
        Under ``torch.autocast`` the network computes in half precision, after ``model.compile()``
        as compiled; the state is float32 all the same, and in the layout of the weights.

        Args:
            n_samples: how many images.
            image_size: height and width, or one int for both.
            in_channels: must be the model's, if given.
            n_steps_each: steps at each noise level, ``None``: 100; of ``"pc"``, corrector steps. Samplers
                for few passes take none.
            step_lr: step size at the last level, in squared units of the data; not of ``"pc"``.
                ``None``: 2e-5 for ``"ald"``; for ``"cas"`` the last level's variance.
            clip: clamp to [-1, 1] after every step; for another sampler than ``"ald"``, whose
                states must be as wide as the noise, at the end.
            denoise: end with one step to the expected clean image. Samplers for few passes always do.
            init: where to start, ``(n_samples, in_channels, H, W)``; not modified.
            init_dist: without ``init``, start from ``"uniform"`` U(-1, 1), ``"normal"`` N(0, 1) or
                ``"prior"`` N(0, sigma_1^2). ``None``: ``"uniform"`` for ``"ald"``; ``"prior"`` for
                other samplers, which require it.
            verbose: show a progress bar with the level's sigma.
            seed: of all the randomness, ``0 <= seed < 2**64``: image ``i`` of a seed is the same
                whatever ``n_samples``. ``None``: drawn from torch's default CPU generator.
            sample_offset: number of the first image; ``sample(1, ..., seed=s, sample_offset=i)`` is
                image ``i`` of a larger batch.
            callback: called as ``callback(level, x)`` after each level, with a copy of the state.
            sampler: ``"ald"``, :func:`~ncsn_fast.sampling.annealed_langevin`; ``"cas"``,
                :func:`~ncsn_fast.sampling.consistent_annealed`; ``"pc"``,
                :func:`~ncsn_fast.sampling.predictor_corrector`; for few passes, ``"euler"``, ``"heun"``,
                ``"dpmpp_2m"``, ``"dpmpp_2m_sde"`` or ``"ancestral"``, see ``ncsn_fast.sampling.solvers``; ``"auto"``
                chooses one of these for ``passes``.
            snr: signal-to-noise ratio of the corrector of ``"pc"`` and ``"ancestral"``; ``None``: 0.16.
            predictor: of ``"pc"``, ``"reverse_diffusion"`` (``None``) or ``"ancestral"``.
            known: images whose known region is kept, for inpainting; of the shape of the result, or
                one that broadcasts to it.
            mask: bool, True where ``known`` is known, likewise; both or neither.
            return_intermediates: also return the state after every so many steps.
            cuda_graph: replay the steps from CUDA graphs; ``None``: on a GPU. Hooks and callbacks
                inside the network must not wait for the device then.
            options: further options of the sampler, such as ``passes=10, levels="karras"``.

        Returns:
            float32 ``(n_samples, in_channels, H, W)`` on the model's device, contiguous. With
            ``return_intermediates``, that and the states, ``(M, n_samples, in_channels, H, W)``.

        Raises:
            RuntimeError: the sigmas are not set.
            ScoreError: the network gave NaN or infinity; the message names the level and step.
            ValueError: a count or size below 1, a step_lr not positive and finite, another number
                of channels, an ``init``, ``known`` or ``mask`` of another shape, an unknown
                ``init_dist``, ``sampler`` or ``predictor``, an option of another sampler.
            TypeError: an argument of another type.
        """
        channels = self.config.in_channels
        if in_channels is not None and in_channels != channels:
            raise ValueError(f"in_channels must be the model's, {channels}, got {in_channels!r}")
        if not isinstance(clip, bool):
            raise TypeError(f"clip must be a bool (images are clamped to [-1, 1]), got {clip!r}")
        if sampler == "ald":
            step_lr = STEP_LR if step_lr is None else step_lr
            init_dist = INIT_DIST if init_dist is None else init_dist
        return super().sample(
            n_samples,
            image_size,
            sampler=sampler,
            n_steps_each=n_steps_each,
            step_lr=step_lr,
            clip=clip,
            denoise=denoise,
            init=init,
            init_dist=init_dist,
            seed=seed,
            sample_offset=sample_offset,
            snr=snr,
            predictor=predictor,
            verbose=verbose,
            callback=callback,
            known=known,
            mask=mask,
            return_intermediates=return_intermediates,
            cuda_graph=cuda_graph,
            **options,
        )


def drop_running_statistics(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """Drop the running statistics that lucid saves under every norm; an NCSN uses none."""
    dropped = 0
    for name, module in model.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(module, CondInstanceNorm):
            for statistic in ("running_mean", "running_var"):
                dropped += state_dict.pop(f"{name}.norm.{statistic}", None) is not None
    if dropped:
        warnings.warn(
            f"dropped {dropped} running_mean and running_var entries of the state dict: "
            "norms use the statistics of each image",
            stacklevel=2,
        )
