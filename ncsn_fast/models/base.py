"""What every score network offers, and what those conditioned on sigma itself share.

Belongs here: :class:`ScoreModel`, the interface that the trainer, the plots and users rely on;
:class:`SigmaConditioned`, its implementation but for the network proper. Does not belong here: networks
(``model.py``, ``networks.py``), objectives (``losses.py``), samplers (``sampling.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..checks import height_and_width, positive_int
from ..data.ranges import Range, byte_hint, hint_range
from ..distributed import warn_of_unshared_gradients
from ..losses import Weighting, score_matching_loss
from ..ops.dispatch import values_are_at_hand
from ..sampling.run import draw
from ..sampling.start import draw_seed
from ..schedules import check_sigmas
from .pretrained import strip_wrapper_names


class ScoreModel(Protocol):
    """What the trainer, the plots and a user need of a score network; NCSN, ScoreMLP and ScoreCNN all have it.

    They differ in what ``forward`` is conditioned on: ``NCSN(x, labels)``, numbers of levels of its ladder, and
    ``ScoreMLP(x, sigma)``, ``ScoreCNN(x, sigma)``, any sigma. ``score(x, level)`` is the same for all.

    Attributes:
        config: a frozen dataclass of what the network was made from, with a field ``sigmas``.
        sigmas: the ladder, ``(K,)``, float32, strictly descending.

    A network may also have ``data_range``, what the values of its data must lie in; see ``ranges.py``.
    """

    config: Any
    sigmas: Tensor

    def set_sigmas(self, sigmas: Sequence[float] | Tensor) -> None:
        """Set the ladder."""

    def score(self, x: Tensor, level: int) -> Tensor:
        """The score of the data with noise ``sigmas[level]``, at ``x``; shape of ``x``."""

    def get_loss(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        seed: int | None = None,
        weighting: Weighting = "sigma2",
    ) -> tuple[Tensor, Tensor]:
        """The denoising score matching loss of clean data, and the levels that were drawn."""

    def sample(self, n_samples: int, *args: Any, **options: Any) -> Tensor:
        """Samples, by any of :data:`~ncsn_fast.sampling.samplers.SAMPLERS`."""


class SigmaConditioned(nn.Module, PyTorchModelHubMixin, library_name="ncsn-fast"):
    """What the networks conditioned on sigma share. ``forward(x, sigma)`` is their own.

    Args:
        config: of the network.

    Attributes:
        data_range: what the values of data must lie in; ``None``: any.
        config: the same.
        sigmas: buffer ``(K,)``, float32; empty until set. A ladder to draw levels from in training, and to
            anneal along; ``forward`` takes any sigma.
    """

    data_range: Range | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._hub_mixin_config = config  # what save_pretrained writes into config.json
        self.register_buffer("sigmas", torch.zeros(0, dtype=torch.float32))
        self.register_load_state_dict_pre_hook(strip_wrapper_names)
        self.register_load_state_dict_pre_hook(_make_room_for_sigmas)
        if config.sigmas is not None:
            self.set_sigmas(config.sigmas)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, without the batch."""
        raise NotImplementedError

    def set_sigmas(self, sigmas: Sequence[float] | Tensor) -> None:
        """Set the ladder of noise levels, of any length; it is saved with the weights.

        Raises:
            ValueError: not one-dimensional, empty, a value not positive and finite, or not strictly descending.
            TypeError: not made of real numbers.
        """
        checked = check_sigmas(sigmas, len(sigmas))
        if not len(checked):
            raise ValueError("sigmas must hold at least one level, got none")
        self.sigmas = checked.to(self.sigmas.device)

    def score(self, x: Tensor, level: int) -> Tensor:
        """The score of the data with noise ``sigmas[level]``, at ``x``; shape of ``x``."""
        self._require_sigmas()
        return self(x, self.sigmas[level])

    def get_loss(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        sigma: Tensor | None = None,
        seed: int | None = None,
        weighting: Weighting = "sigma2",
    ) -> tuple[Tensor, Tensor]:
        """The denoising score matching loss of a batch, :func:`~ncsn_fast.losses.denoising_score_matching_loss`.

        Args:
            x: clean data, ``(N, *sample_shape)``, floating point.
            labels: levels of the ladder, int64 ``(N,)``; ``None``: uniform on ``0..K-1``, drawn from torch's default
                generator of ``x``'s device.
            sigma: noise levels themselves, ``(N,)``, positive, in place of labels: such as
                :func:`log_uniform_sigmas`, for training over a continuous range.
            seed: of the noise, ``0 <= seed < 2**64``; ``None``: drawn from torch's default CPU generator.
            weighting: ``"sigma2"``, ``"one"`` or a :class:`~ncsn_fast.losses.LearnedWeighting`.

        Returns:
            The loss, 0-d, and the labels; or the sigmas, if those were given.

        Raises:
            RuntimeError: neither sigma nor a ladder.
            ValueError: both labels and sigma; data or levels of another shape; an unknown weighting.
            TypeError: data of another dtype.

        Warns:
            DataRangeWarning: the first batch looks as if it had another range than ``data_range``.
        """
        warn_of_unshared_gradients(self)
        if labels is not None and sigma is not None:
            raise ValueError("labels and sigma were given, which both say the noise levels")
        if not x.is_floating_point():
            raise TypeError(
                f"x must be floating point, got {x.dtype}{byte_hint(x.dtype, self.data_range)}"
            )
        hint_range(self, x)
        drawn = sigma
        if sigma is None:
            self._require_sigmas()
            if labels is None:
                labels = torch.randint(
                    len(self.sigmas), (len(x),), dtype=torch.int64, device=x.device
                )
            drawn, sigma = labels, self.sigmas.index_select(0, labels)
        if sigma.shape != (len(x),):
            raise ValueError(
                f"there must be one noise level for each of the {len(x)} samples, got "
                f"shape {tuple(sigma.shape)}"
            )
        seed = draw_seed() if seed is None else seed

        def score(noisy: Tensor) -> Tensor:
            return self(noisy, sigma) if labels is None else self.at_labels(noisy, labels)

        return score_matching_loss(score, x, sigma, seed=seed, weighting=weighting), drawn

    def sample(
        self,
        n_samples: int,
        image_size: int | tuple[int, int] | None = None,
        *,
        sampler: str = "ald",
        n_steps_each: int | None = None,
        step_lr: float | None = None,
        clip: float | None = None,
        denoise: bool | None = None,
        init: Tensor | None = None,
        init_dist: str | None = None,
        seed: int | None = None,
        sample_offset: int = 0,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""Draw samples along the ladder.

        The model is in evaluation mode meanwhile; every module has its own mode back afterwards. What of the network
        depends on sigma alone is computed once for each level, not at each step.

        Args:
            n_samples: how many.
            image_size: of images, height and width or one int for both; ``None``: that of the config.
            sampler: ``"ald"``, :func:`~ncsn_fast.sampling.annealed_langevin`; ``"cas"``,
                :func:`~ncsn_fast.sampling.consistent_annealed`; ``"pc"``,
                :func:`~ncsn_fast.sampling.predictor_corrector`; ``"ode"``,
                :func:`~ncsn_fast.sampling.ode.probability_flow`; for few ``passes``, ``"euler"``, ``"heun"``,
                ``"dpmpp_2m"``, ``"dpmpp_2m_sde"`` or ``"ancestral"``, see ``ncsn_fast.sampling.solvers``.
            n_steps_each: steps at each level, ``None``: 100; of ``"ode"``, from each level to the next. Those for few
                passes take none.
            step_lr: step size at the last level; ``None``: 0.2 of its variance for ``"ald"``, all of it for ``"cas"``.
                The other samplers take none.
            clip: clamp to ``[-clip, clip]``: with ``"ald"`` after every step, otherwise at the end.
            denoise: end with one step to the expected clean sample. Samplers for few passes always do.
            init: where to start, ``(n_samples, *sample_shape)``; not modified.
            init_dist: without ``init``, start from ``"prior"`` :math:`N(0, \sigma_1^2 I)` (``None``); with
                ``"ald"`` also from ``"normal"`` N(0, I) or ``"uniform"`` U(-1, 1).
            seed, sample_offset: as in :meth:`NCSN.sample`; sample i of a seed is the same whatever the batch.
            options: further arguments of the sampler, such as ``snr``, ``callback`` or ``verbose``.
                On a GPU the steps are replayed from CUDA graphs unless ``cuda_graph`` is False.

        Returns:
            float32 ``(n_samples, *sample_shape)`` on the network's device, without gradient; with
            ``return_intermediates`` as the sampler says.

        Raises:
            RuntimeError: the sigmas are not set.
            ScoreError: the network gave NaN or infinity.
            ValueError, TypeError: an argument out of its range, unknown, or of another type.
        """
        self._require_sigmas()
        shape = (positive_int("n_samples", n_samples), *self._sample_shape(image_size))
        weight = next(self.parameters())
        return draw(
            self,
            sampler,
            {
                "level": self._ladder_score(),
                "sigma": lambda x, sigma: self(x.to(weight.dtype), sigma),
            },
            shape,
            self.sigmas.tolist(),
            device=weight.device,
            n_steps_each=n_steps_each,
            denoise=denoise,
            clip=clip,
            init=init,
            init_dist=init_dist,
            seed=seed,
            sample_offset=sample_offset,
            step_lr=step_lr,
            **options,
        )

    def at(self, sigma: Tensor) -> Callable[[Tensor], Tensor]:
        """The score at one noise level, for use without gradients, with what depends on sigma alone computed once."""
        return lambda x: self(x, sigma)

    def at_labels(self, x: Tensor, labels: Tensor) -> Tensor:
        """The score, each sample at a level of the ladder: labels int64 ``(N,)``."""
        return self(x, self.sigmas.index_select(0, labels))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Load what ``save_pretrained`` wrote, strictly, in evaluation mode; options as in ``huggingface_hub``."""
        return super().from_pretrained(pretrained_model_name_or_path, **{"strict": True, **options})

    def extra_repr(self) -> str:
        """The configuration, shown by ``print(model)``."""
        return repr(self.config)

    def _sample_shape(self, image_size: int | tuple[int, int] | None) -> tuple[int, ...]:
        if image_size is None:
            return self.sample_shape
        if len(self.sample_shape) != 3:
            raise ValueError("image_size was given, and samples are no images")
        return (self.sample_shape[0], *height_and_width(image_size))

    def _ladder_score(self) -> Callable[[Tensor, int | Tensor], Tensor]:
        """``score(x, level)`` as samplers take it; levels as tensors come from captured graphs."""
        dtype, prepared = next(self.parameters()).dtype, {}

        def score(x: Tensor, level: int | Tensor) -> Tensor:
            if isinstance(level, Tensor):
                return self(x.to(dtype), self.sigmas.index_select(0, level))
            if level not in prepared:
                prepared.clear()
                prepared[level] = self.at(self.sigmas[level])
            return prepared[level](x.to(dtype))

        return score

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmaConditioned:
        """Convert all but the sigmas, which set step sizes, to another dtype."""
        sigmas = self.sigmas
        super()._apply(fn, recurse)
        if self.sigmas.dtype != torch.float32:
            self.sigmas = sigmas.to(self.sigmas.device)
        return self

    def _require_sigmas(self) -> None:
        if not len(self.sigmas):
            raise RuntimeError(
                "the noise levels are not set: call model.set_sigmas(make_sigmas(...)) first"
            )

    def _check(self, x: Tensor, sigma: Tensor | float, shape: tuple[int | str, ...]) -> Tensor:
        """Check the arguments of forward; sigma as ``(N,)`` or ``(1,)`` in the dtype of x."""
        weight = next(self.parameters())
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}")
        if x.dim() != 1 + len(shape) or any(
            wanted != got for wanted, got in zip(shape, x.shape[1:], strict=True) if wanted != "any"
        ):
            names = ", ".join(str(side) for side in ("N", *shape))
            raise ValueError(f"x must have shape ({names}), got {tuple(x.shape)}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"x must have the dtype of the network's parameters, {weight.dtype}, got {x.dtype}"
            )
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        if sigma.dim() > 1 or (sigma.dim() == 1 and sigma.shape[0] not in (1, x.shape[0])):
            raise ValueError(
                f"sigma must be a number or have shape ({len(x)},) or (1,), got {tuple(sigma.shape)}"
            )
        # On a GPU looking would mean waiting; there a sigma that is not positive gives NaN.
        if values_are_at_hand(sigma) and not bool((sigma > 0).all()):
            raise ValueError("sigma must be positive")
        return sigma.reshape(-1)


def log_uniform_sigmas(u: Tensor, smallest: float, largest: float) -> Tensor:
    """Noise levels spread evenly in log sigma, for training over a continuous range.

    Args:
        u: uniform numbers in [0, 1], any shape.
        smallest, largest: the range.

    Returns:
        The sigmas, float32, the shape of ``u``.
    """
    low, high = math.log(smallest), math.log(largest)
    return (low + (high - low) * u.double()).exp().float()


def plain_ladder(sigmas: Sequence[float] | Tensor | None) -> tuple[float, ...] | None:
    """A ladder as a config keeps it."""
    if sigmas is None:
        return None
    return tuple(float(sigma) for sigma in check_sigmas(sigmas, len(sigmas)).tolist())


def _make_room_for_sigmas(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """A ladder in a state dict may be longer or shorter than the one that is set."""
    saved = state_dict.get(f"{prefix}sigmas")
    if saved is not None and saved.shape != model.sigmas.shape:
        model.sigmas = torch.zeros_like(saved, device=model.sigmas.device)
