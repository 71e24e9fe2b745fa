"""The Noise Conditional Score Network: how its blocks are connected, and what a user calls.

Belongs here: :class:`NCSN` and the checks of its inputs. Does not belong here: the blocks
(``layers.py``), objectives (``losses.py``), samplers (``sampling.py``) and training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .. import ops
from ..checks import height_and_width, positive_int
from ..data.ranges import IMAGE_RANGE, byte_hint, hint_range
from ..distributed import warn_of_unshared_gradients
from ..losses import Weighting, score_matching_loss
from ..ops.dispatch import values_are_at_hand
from ..sampling.run import draw, sampled_here
from ..sampling.start import draw_seed
from ..schedules import check_sigmas, make_sigmas
from .config import NCSNConfig
from .layers import CondInstanceNorm, RCUBlock, RefineBlock, conv, convolve, norm_elu_conv
from .pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    drop_running_statistics,
    find_file,
    load_weights,
    strip_wrapper_names,
)

CLIP = 1.0  # data lie in [-1, 1]
# What lucid's sample has by default, whatever the ladder.
STEP_LR, INIT_DIST = 2e-5, "uniform"


class NCSN(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ncsn-fast",
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

    data_range = IMAGE_RANGE

    def __new__(cls, *args: Any, **kwargs: Any) -> NCSN:
        """Refuse a config together with other arguments."""
        # __init__ could not tell an argument that was given from one left at the same default.
        if cls.__init__ is NCSN.__init__ and len(args) + len(kwargs) > 1:
            if any(isinstance(value, NCSNConfig) for value in (*args, *kwargs.values())):
                raise TypeError("NCSN takes a config or separate arguments, got both")
        return super().__new__(cls, *args, **kwargs)

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
        super().__init__()
        if config is None and isinstance(in_channels, NCSNConfig):
            config = in_channels
        if config is None:
            config = NCSNConfig(
                in_channels, nf, num_classes, dilations, scale_by_sigma, sigmas, pool_padding, norm
            )
        elif not isinstance(config, NCSNConfig):
            raise TypeError(f"config must be an NCSNConfig, got {type(config).__name__}")
        self.config = config
        self._hub_mixin_config = config  # what save_pretrained writes into config.json

        nf, k = config.nf, config.num_classes
        self.register_buffer("sigmas", torch.zeros(k, dtype=torch.float32))
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

        # Known on the host, so that no forward has to ask the device.
        self._sigmas_are_set = False
        self.register_load_state_dict_pre_hook(strip_wrapper_names)
        self.register_load_state_dict_pre_hook(drop_running_statistics)
        self.register_load_state_dict_post_hook(_notice_loaded_sigmas)
        if config.sigmas is not None:
            self.set_sigmas(config.sigmas)

    make_sigmas = staticmethod(make_sigmas)

    def set_sigmas(self, sigmas: Sequence[float] | Tensor) -> None:
        """Set the ladder of noise levels; it is saved with the weights.

        Args:
            sigmas: K standard deviations in the units of the data, positive, finite and strictly
                descending: a tensor, an array or a sequence. Copied.

        Raises:
            ValueError: another shape or length, a value not positive and finite, or not strictly
                descending.
            TypeError: not made of real numbers.
        """
        with torch.no_grad():
            self.sigmas.copy_(check_sigmas(sigmas, self.config.num_classes))
        self._sigmas_are_set = True

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
        self._check_images(x)
        labels = self._check_labels(labels, x.shape[0])

        convert = ops.wants_channels_last(x)
        if convert:  # here and at the end, for all the layers between
            x = x.contiguous(memory_format=torch.channels_last)
        h = convolve(self.begin_conv, x)
        h1 = self.stage1(h, labels)
        h2 = self.stage2(h1, labels)
        h3 = self.stage3(h2, labels)
        h4 = self.stage4(h3, labels)
        r = self.refine4([h4], labels)
        r = self.refine3([h3, r], labels)
        r = self.refine2([h2, r], labels)
        r = self.refine1([h1, r], labels)
        score = norm_elu_conv(self.end_norm, self.end_conv, r, labels)
        if convert:
            score = score.contiguous()
        if self.config.scale_by_sigma:
            # index_select, not indexing: it has no negative indices, on any device.
            score = score / self.sigmas.index_select(0, labels).view(-1, 1, 1, 1)
        return score.to(x.dtype)

    def get_loss(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        seed: int | None = None,
        weighting: Weighting = "sigma2",
    ) -> tuple[Tensor, Tensor]:
        r"""The denoising score matching loss of a batch.

        .. math:: \frac{1}{N} \sum_n \sum_{CHW}
                  \big(\sigma_n\, s(x_n + \sigma_n z_n, y_n) + z_n\big)^2, \qquad z_n \sim N(0, I)

        There is no factor 1/2; the paper's equation (5) has one, so its losses are half of these.

        Args:
            x: clean images ``(N, in_channels, H, W)``, as for :meth:`forward`, data in [-1, 1].
            labels: noise levels as for :meth:`forward`; ``None``: uniform on ``0..K-1``, drawn from
                torch's default generator of ``x``'s device.
            seed: of the noise z, ``0 <= seed < 2**64``; ``None``: drawn from torch's default CPU
                generator.
            weighting: of the levels, ``"sigma2"``, ``"one"`` or a
                :class:`~ncsn_fast.losses.LearnedWeighting`; see
                :func:`~ncsn_fast.losses.denoising_score_matching_loss`.

        Returns:
            The loss, 0-d, float32 (float64 for float64 images), and the labels, int64 ``(N,)``.

        Raises:
            Those of :meth:`forward`.

        Warns:
            DataRangeWarning: the first batch looks as if it had another range than [-1, 1].
        """
        warn_of_unshared_gradients(self)
        self._require_sigmas()
        self._check_images(x)
        hint_range(self, x)
        if labels is None:
            labels = torch.randint(
                self.config.num_classes, (len(x),), dtype=torch.int64, device=x.device
            )
        labels = self._check_labels(labels, len(x)).expand(len(x)).contiguous()
        seed = draw_seed() if seed is None else seed
        sigma = self.sigmas.index_select(0, labels)
        loss = score_matching_loss(
            lambda noisy: self(noisy, labels), x, sigma, seed=seed, weighting=weighting
        )
        return loss, labels

    def score(self, x: Tensor, level: int) -> Tensor:
        """The score at one noise level, ``0 <= level < K``, for the whole batch: ``forward``."""
        return self(x, torch.full((1,), level, dtype=torch.int64, device=x.device))

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
                ``"dpmpp_2m"``, ``"dpmpp_2m_sde"`` or ``"ancestral"``, see ``ncsn_fast.sampling.solvers``.
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
        self._require_sigmas()
        n_samples = positive_int("n_samples", n_samples)
        height, width = height_and_width(image_size)
        channels = self.config.in_channels
        if in_channels is not None and in_channels != channels:
            raise ValueError(f"in_channels must be the model's, {channels}, got {in_channels!r}")
        if not isinstance(clip, bool):
            raise TypeError(f"clip must be a bool (images are clamped to [-1, 1]), got {clip!r}")
        if sampler == "ald":
            step_lr = STEP_LR if step_lr is None else step_lr
            init_dist = INIT_DIST if init_dist is None else init_dist
        weight = self._kernel()
        last = weight.is_contiguous(memory_format=torch.channels_last)
        levels = torch.arange(self.config.num_classes, dtype=torch.int64, device=weight.device)

        def score(x: Tensor, level: int | Tensor) -> Tensor:
            labels = level if isinstance(level, Tensor) else levels[level : level + 1]
            return self(x.to(weight.dtype), labels)

        return draw(
            self,
            sampler,
            {"level": score},
            (n_samples, channels, height, width),
            self.sigmas.tolist(),
            device=weight.device,
            layout=torch.channels_last if last else torch.contiguous_format,
            n_steps_each=n_steps_each,
            denoise=denoise,
            clip=CLIP if clip else None,
            init=init,
            init_dist=init_dist,
            seed=seed,
            sample_offset=sample_offset,
            step_lr=step_lr,
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

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> NCSN:
        """Load what :meth:`save_pretrained` wrote, in evaluation mode. Loading is strict.

        Args:
            pretrained_model_name_or_path: a folder with ``config.json`` and ``model.safetensors``,
                or the name of a model on the Hugging Face Hub.
            map_location: device of the model.
            revision, token, cache_dir, force_download, local_files_only: as in ``huggingface_hub``.
            overrides: fields of the config to replace, such as ``pool_padding="zero"`` for weights
                from lucid.

        Raises:
            FileNotFoundError: no such folder or model, or one of its two files is missing.
            ValueError: a file that is truncated or of another kind, a config of unknown fields.
            RuntimeError: weights of another configuration.
            TypeError: an override that is no field of the config.
        """
        download = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        source = str(pretrained_model_name_or_path)
        config_file = find_file(source, CONFIG_FILE, download)
        weights_file = find_file(source, WEIGHTS_FILE, download)
        config = NCSNConfig.from_json_file(config_file)
        model = cls(dataclasses.replace(config, **overrides))
        load_weights(model, weights_file)
        return model.to(map_location).eval()

    def extra_repr(self) -> str:
        """The configuration, shown by ``print(model)``."""
        return repr(self.config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NCSN:
        """Convert all but the sigmas, which set step sizes, to another dtype."""
        sigmas = self.sigmas
        super()._apply(fn, recurse)
        if self.sigmas.dtype != torch.float32:
            self.sigmas = sigmas.to(self.sigmas.device)
        return self

    def _require_sigmas(self) -> None:
        if not self._sigmas_are_set and not torch.compiler.is_compiling():
            self._notice_sigmas()  # the buffer may have been filled from outside, as averaging does
        if not self._sigmas_are_set:
            raise RuntimeError(
                "the noise levels are not set: call model.set_sigmas(NCSN.make_sigmas(...)) first"
            )

    def _notice_sigmas(self) -> None:
        self._sigmas_are_set = not self.sigmas.is_meta and bool((self.sigmas > 0).all())

    def _kernel(self) -> Tensor:
        """Of a convolution, for the dtype, device and layout of all; a layer may have been replaced."""
        return next(p for p in self.parameters() if p.ndim == 4 and p.is_floating_point())

    def _check_images(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}{byte_hint(x.dtype)}")
        channels = self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
            raise ValueError(
                f"x must have shape (N, {channels}, H, W) with H and W at least 1, "
                f"got {tuple(x.shape)}"
            )
        dtype = self._kernel().dtype
        if x.dtype != dtype and (
            x.dtype == torch.float64  # which autocast leaves alone
            or not torch.is_autocast_enabled(x.device.type)
        ):
            raise TypeError(
                f"x must have the dtype of the model's parameters, {dtype}, got {x.dtype}; "
                "convert one of them, or use torch.autocast"
            )

    def _check_labels(self, labels: Tensor, n: int) -> Tensor:
        """``labels`` as int64, checked as far as possible without waiting for a device."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels.ndim != 1 or labels.shape[0] not in (1, n):
            raise ValueError(f"labels must have shape ({n},) or (1,), got {tuple(labels.shape)}")
        labels = labels.long()
        # Where the values cannot be seen, the range is the operators' business, as it is on the GPU.
        # While sampling the labels are right by construction, and are not looked at in each step.
        if values_are_at_hand(labels) and labels.numel() and not sampled_here(self):
            low, high = (bound.item() for bound in labels.aminmax())
            if low < 0 or high >= self.config.num_classes:
                raise IndexError(
                    f"labels must be in 0..{self.config.num_classes - 1}, got {low}..{high}"
                )
        return labels


def _notice_loaded_sigmas(model: NCSN, incompatible_keys: Any) -> None:
    model._notice_sigmas()
