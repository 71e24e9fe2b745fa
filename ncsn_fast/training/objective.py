"""The objective as a module: a network, how its noise levels are weighted, and the loss of a batch as the output.

Belongs here: what a step calls and differentiates, and data parallelism wraps. Does not belong here: the formulas
(``losses.py`` of the package above), the noise levels of a batch (``order.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..checks import one_of, positive_int
from ..losses import (
    LearnedWeighting,
    Weighting,
    perturb,
    perturbation_noise,
    sliced_score_matching_loss,
)
from ..models.base import ScoreModel
from ..streams import STREAM_SLICES
from .settings import DENOISING, LEARNED, OBJECTIVES


class Objective(nn.Module):
    """The score matching loss of a network, denoising or sliced, with a weighting that may be learned.

    ``DistributedDataParallel(Objective(network))`` averages the gradients over the processes, which it would not for a
    loss that is a method of the network. Its parameters are those of the network and of a learned weighting.

    Args:
        network: whose ``get_loss`` gives the denoising loss; see :class:`~ncsn_fast.models.base.ScoreModel`.
        weighting: ``"sigma2"``, ``"one"``, ``"learned"`` (a new
            :class:`~ncsn_fast.losses.LearnedWeighting` on the network's device), or a ``LearnedWeighting``.
        kind: ``"dsm"``, denoising; ``"ssm"`` or ``"ssm_vr"``, sliced score matching of the noisy data, see
            :func:`~ncsn_fast.losses.sliced_score_matching_loss`; these take no learned weighting.
        directions: of sliced score matching, for each sample.

    Attributes:
        network: the same.
        weighting: the name, or the learned one.
    """

    def __init__(
        self,
        network: ScoreModel,
        weighting: Weighting = "sigma2",
        kind: str = DENOISING,
        *,
        directions: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self.kind = one_of("objective", kind, OBJECTIVES)
        self.directions = positive_int("directions", directions)
        if weighting == LEARNED:
            learned = LearnedWeighting(device="cpu", dtype=torch.float32)
            weighting = learned.to(network.sigmas.device)
        self.weighting = weighting

    @property
    def learned(self) -> LearnedWeighting | None:
        """The learned weighting; ``None`` where it is a fixed one."""
        return self.weighting if isinstance(self.weighting, LearnedWeighting) else None

    def forward(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        sigma: Tensor | None = None,
        seed: int | None = None,
        sample_offset: int = 0,
    ) -> Tensor:
        """The loss of a batch, 0-d.

        Args:
            x: clean data, ``(N, ...)``, as the network takes it.
            labels: levels of the ladder, int64 ``(N,)``; ``None``: drawn by the network. Sliced score matching takes
                these or ``sigma``, and a seed.
            sigma: noise levels themselves, ``(N,)``, in place of labels; of networks conditioned on sigma.
            seed: of the noise, ``0 <= seed < 2**64``; ``None``: drawn from torch's default CPU generator.
            sample_offset: number of the first sample, for a part of a larger batch.

        Raises:
            Those of the network's ``get_loss``.
        """
        levels = {} if labels is None else {"labels": labels}
        levels |= {} if sigma is None else {"sigma": sigma}
        noise = {"seed": seed, "sample_offset": sample_offset}
        if self.kind == DENOISING:
            return self.network.get_loss(x, weighting=self.weighting, **levels, **noise)[0]
        return self._sliced(x, **levels, **noise)

    def _sliced(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        sigma: Tensor | None = None,
        seed: int,
        sample_offset: int,
    ) -> Tensor:
        network = self.network
        each = network.sigmas.index_select(0, labels) if sigma is None else sigma
        noisy = perturb(x, each, perturbation_noise(x, seed, sample_offset))
        place = {"seed": seed, "sample_offset": sample_offset, "device": x.device}
        vectors = [
            ops.philox_normal(x.shape, stream=STREAM_SLICES, step=number, **place)
            for number in range(self.directions)
        ]

        def score(noisy: Tensor) -> Tensor:
            return network.at_labels(noisy, labels) if sigma is None else network(noisy, sigma)

        return sliced_score_matching_loss(
            score,
            noisy,
            each,
            torch.stack(vectors).to(x.dtype),
            weighting=self.weighting,
            variance_reduced=self.kind == "ssm_vr",
        )
