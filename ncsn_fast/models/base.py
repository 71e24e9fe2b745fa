"""What every score network is and offers: :class:`ScoreModel`.

Belongs here: what does not depend on the layers of a network. Does not belong here: networks (``ncsn.py``,
``small.py``, ``official.py``), their ladder (``ladder.py``), checks of inputs (``inputs.py``), files
(``pretrained.py``), how samples are drawn (``drawing.py``), objectives (``losses.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.ranges import Range, hint_range
from ..distributed import warn_of_unshared_gradients
from ..losses import Weighting, score_matching_loss
from ..sampling.start import draw_seed
from ..schedules import make_sigmas
from .drawing import draw_samples, scores_of_labels, scores_of_sigma
from .inputs import check_data, check_labels, check_sigma
from .ladder import WithLadder
from .pretrained import Pretrained

LABEL, SIGMA = "label", "sigma"  # what a network may be conditioned on


class ScoreModel(WithLadder, Pretrained, library_name="ncsn-fast"):
    """A network that estimates the score of data with noise; the base of all of them.

    A network of one's own gives four things, see docs/adding_a_network.md: ``Config``, a frozen dataclass with a field
    ``sigmas``; ``__init__(config)``, which begins with ``super().__init__(config)``; :attr:`sample_shape`; and
    ``forward(x, condition)``, which begins with :meth:`check_input`. :func:`~ncsn_fast.models.registry.register`
    makes it known, so that it is trained, saved, loaded and sampled like those that are here.

    Args:
        config: of the network.

    Attributes:
        Config: the class of its configurations.
        conditioned_on: what ``forward`` takes beside ``x``: ``"sigma"``, any noise level; or ``"label"``, the number of
            a level of the ladder, whose length is then ``config.num_classes``.
        data_range: what the values of data must lie in; ``None``: any, such as those of points.
        tuned: what ``sampler="auto"`` takes for this network, options of :meth:`sample`, as ``ncsn-fast tune`` has
            measured; comes with a saved network. Empty: its own table.
        samples_as_weights: draw samples in the layout of the weights, channels_last if those are; else contiguous.
        config: the configuration.
        sigmas: buffer ``(K,)``, the ladder, float32 whatever the dtype of the parameters. Until it is set, zeros, or
            empty where the network takes any length.
    """

    Config: ClassVar[type]
    conditioned_on: ClassVar[str] = SIGMA
    data_range: Range | None = None
    samples_as_weights: ClassVar[bool] = False
    tuned: Mapping[str, Any] = MappingProxyType({})
    make_sigmas = staticmethod(make_sigmas)

    def __new__(cls, *args: Any, **kwargs: Any) -> ScoreModel:
        """Refuse a config together with other arguments."""
        # __init__ could not tell an argument that was given from one left at the same default. A subclass with an
        # __init__ of its own may take more.
        owner = next((base for base in cls.__mro__ if "Config" in vars(base)), None)
        if owner and cls.__init__ is owner.__init__ and len(args) + len(kwargs) > 1:
            if any(isinstance(value, cls.Config) for value in (*args, *kwargs.values())):
                raise TypeError(f"{owner.__name__} takes a config or separate arguments, got both")
        return super().__new__(cls, *args, **kwargs)

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """The shape of one sample, without the batch: ``(D,)`` of points, ``(C, H, W)`` of images, where ``None`` for H
        and W means that there is no usual size. ``forward`` takes images of any size in either case.
        """
        raise NotImplementedError(f"{type(self).__name__} must say its sample_shape")

    def check_input(self, x: Tensor, condition: Tensor | float) -> Tensor:
        """Check the arguments of ``forward``, without waiting for a GPU.

        Args:
            x: ``(N, *sample_shape)``, in the dtype of the parameters, or any but float64 under autocast.
            condition: labels ``(N,)`` or ``(1,)``, integers in ``0..K-1``; or sigmas, a number, ``(N,)`` or ``(1,)``.

        Returns:
            The condition: labels as int64, or sigmas as ``(N,)`` or ``(1,)`` in the dtype of ``x``.

        Raises:
            TypeError: ``x`` or the condition of another dtype.
            ValueError: one of them of another shape; a sigma that is not positive.
            IndexError: labels out of range, on the CPU.
        """
        self.check_data(x)
        if self.conditioned_on == LABEL:
            # Not len(x), which torch.export would take for a constant.
            return check_labels(self, condition, x.shape[0])
        return check_sigma(x, condition)

    def check_data(self, x: Tensor) -> None:
        """Check a batch, see :meth:`check_input`."""
        check_data(self, x)

    def score(self, x: Tensor, level: int) -> Tensor:
        """The score of the data with noise ``sigmas[level]``, at ``x``; shape of ``x``."""
        if self.conditioned_on == LABEL:
            return self(x, torch.full((1,), level, dtype=torch.int64, device=x.device))
        self._require_sigmas()
        return self(x, self.sigmas[level])

    def get_loss(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        sigma: Tensor | None = None,
        seed: int | None = None,
        sample_offset: int = 0,
        weighting: Weighting = "sigma2",
    ) -> tuple[Tensor, Tensor]:
        r"""The denoising score matching loss of a batch, :func:`~ncsn_fast.losses.denoising_score_matching_loss`.

        .. math:: \frac{1}{N} \sum_n \big\|\sigma_n\, s(x_n + \sigma_n z_n, \sigma_n) + z_n\big\|^2,
                  \qquad z_n \sim N(0, I)

        There is no factor 1/2; the paper's equation (5) has one, so its losses are half of these.

        Args:
            x: clean data ``(N, *sample_shape)``, as for ``forward``, in ``data_range``.
            labels: levels of the ladder, integers ``(N,)`` or ``(1,)``; ``None``: uniform on ``0..K-1``, drawn from
                torch's default generator of ``x``'s device.
            sigma: noise levels themselves, ``(N,)``, positive, in place of labels, for a network conditioned on sigma:
                such as :func:`log_uniform_sigmas`, for training over a continuous range.
            seed: of the noise z, ``0 <= seed < 2**64``; ``None``: drawn from torch's default CPU generator.
            sample_offset: number of the first sample in a larger batch, of which this is a part: its noise is that of
                the part.
            weighting: of the levels, ``"sigma2"``, ``"one"`` or a :class:`~ncsn_fast.losses.LearnedWeighting`.

        Returns:
            The loss, 0-d, float32 (float64 for float64 data), and the labels, int64 ``(N,)``; or the sigmas, if those
            were given.

        Raises:
            RuntimeError: neither sigma nor a ladder.
            ValueError: both labels and sigma, or sigma for a network conditioned on labels; an unknown weighting.
            TypeError, IndexError: those of :meth:`check_input`.

        Warns:
            DataRangeWarning: the first batch looks as if it had another range than ``data_range``.
        """
        warn_of_unshared_gradients(self)
        if labels is not None and sigma is not None:
            raise ValueError("labels and sigma were given, which both say the noise levels")
        if sigma is not None and self.conditioned_on == LABEL:
            raise ValueError(f"{type(self).__name__} is conditioned on labels, not on sigma")
        if sigma is None:
            self._require_sigmas()
        self.check_data(x)
        hint_range(self, x)
        drawn = sigma
        if sigma is None:
            if labels is None:
                labels = torch.randint(
                    len(self.sigmas), (len(x),), dtype=torch.int64, device=x.device
                )
            labels = check_labels(self, labels, len(x)).expand(len(x)).contiguous()
            drawn, sigma = labels, self.sigmas.index_select(0, labels)
        if sigma.shape != (len(x),):
            raise ValueError(
                f"there must be one noise level for each of the {len(x)} samples, got shape {tuple(sigma.shape)}"
            )
        seed = draw_seed() if seed is None else seed

        def score(noisy: Tensor) -> Tensor:
            return self(noisy, sigma) if labels is None else self.at_labels(noisy, labels)

        noise = {"seed": seed, "sample_offset": sample_offset}
        return score_matching_loss(score, x, sigma, weighting=weighting, **noise), drawn

    def sample(
        self,
        n_samples: int,
        image_size: int | tuple[int, int] | None = None,
        *,
        sampler: str = "ald",
        n_steps_each: int | None = None,
        step_lr: float | None = None,
        clip: float | bool | None = None,
        denoise: bool | None = None,
        init: Tensor | None = None,
        init_dist: str | None = None,
        seed: int | None = None,
        sample_offset: int = 0,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""Draw samples along the ladder, by any of :data:`~ncsn_fast.sampling.samplers.SAMPLERS`, or by ``"auto"``.

        The model is in evaluation mode meanwhile; every module has its own mode back afterwards. Under
        ``torch.autocast`` the network computes in half precision, after ``model.compile()`` as compiled; the state is
        float32 all the same.

        Args:
            n_samples: how many.
            image_size: of images, height and width or one int for both; ``None``: that of :attr:`sample_shape`.
            sampler: ``"ald"``, :func:`~ncsn_fast.sampling.annealed_langevin`; ``"cas"``,
                :func:`~ncsn_fast.sampling.consistent_annealed`; ``"pc"``,
                :func:`~ncsn_fast.sampling.predictor_corrector`; ``"ode"``,
                :func:`~ncsn_fast.sampling.ode.probability_flow`, of networks that take any sigma; for few ``passes``,
                ``"euler"``, ``"heun"``, ``"dpmpp_2m"``, ``"dpmpp_2m_sde"`` or ``"ancestral"``, see
                ``ncsn_fast.sampling.solvers``. ``"auto"`` takes ``passes`` (10) and chooses one of these and its
                options: what :attr:`tuned` says for as many passes, else by ``ncsn_fast.sampling.auto``.
            n_steps_each: steps at each level, ``None``: 100; of ``"ode"``, from each level to the next. Those for few
                passes take none.
            step_lr: step size at the last level; ``None``: 0.2 of its variance for ``"ald"``, all of it for ``"cas"``.
                The other samplers take none.
            clip: True: clamp to ``data_range``; a number: to ``[-clip, clip]``. With ``"ald"`` after every step if the
                two ends are opposite, otherwise at the end. False, ``None``: not at all.
            denoise: end with one step to the expected clean sample. Samplers for few passes always do.
            init: where to start, ``(n_samples, *sample_shape)``; not modified.
            init_dist: without ``init``, start from ``"prior"`` :math:`N(0, \sigma_1^2 I)` (``None``); with ``"ald"``
                also from ``"normal"`` N(0, I), or ``"uniform"``, even over ``data_range``, or (-1, 1) of points.
            seed: of all the randomness, ``0 <= seed < 2**64``: sample ``i`` of a seed is the same whatever
                ``n_samples``. ``None``: drawn from torch's default CPU generator.
            sample_offset: number of the first sample: ``sample(1, ..., seed=s, sample_offset=i)`` is sample ``i``.
            options: further arguments of the sampler, such as ``snr``, ``callback`` or ``verbose``. On a GPU the steps
                are replayed from CUDA graphs unless ``cuda_graph`` is False.

        Returns:
            float32 ``(n_samples, *sample_shape)`` on the network's device, without gradient; with
            ``return_intermediates`` also the states on the way, as the sampler says.

        Raises:
            RuntimeError: the sigmas are not set.
            ScoreError: the network gave NaN or infinity; the message names the level and step.
            ValueError, TypeError: an argument out of its range, unknown, or of another type.
        """
        self._require_sigmas()
        return draw_samples(
            self,
            sampler,
            n_samples,
            image_size,
            clip=clip,
            init=init,
            init_dist=init_dist,
            seed=seed,
            sample_offset=sample_offset,
            n_steps_each=n_steps_each,
            denoise=denoise,
            step_lr=step_lr,
            **options,
        )

    def scores(self) -> Mapping[str, Callable[[Tensor, Any], Tensor]]:
        """The score as samplers take it: ``"level"``, a function of x and a level; ``"sigma"``, of x and any sigma."""
        return scores_of_labels(self) if self.conditioned_on == LABEL else scores_of_sigma(self)

    def at(self, sigma: Tensor) -> Callable[[Tensor], Tensor]:
        """The score at one noise level, for use without gradients, with what depends on sigma alone computed once.

        Of networks conditioned on sigma; one that has such parts overrides it.
        """
        return lambda x: self(x, sigma)

    def at_labels(self, x: Tensor, labels: Tensor) -> Tensor:
        """The score, each sample at a level of the ladder: labels int64 ``(N,)``."""
        if self.conditioned_on == LABEL:
            return self(x, labels)
        return self(x, self.sigmas.index_select(0, labels))

    def extra_repr(self) -> str:
        """The configuration, shown by ``print(model)``."""
        return repr(self.config)


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


def load_pretrained(source: str | Path, **options: Any) -> ScoreModel:
    """The network that ``save_pretrained`` wrote, of whatever class; arguments as of ``from_pretrained``."""
    return ScoreModel.from_pretrained(source, **options)
