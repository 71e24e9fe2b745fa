"""The objective as a module: a network, how its noise levels are weighted, and the loss of a batch as the output.

Belongs here: what a step calls and differentiates, and data parallelism wraps. Does not belong here: the formula
(``losses.py`` of the package above), the noise levels of a batch (``order.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses import LearnedWeighting, Weighting
from ..models.base import ScoreModel
from .settings import LEARNED


class Objective(nn.Module):
    """The denoising score matching loss of a network, with a weighting that may be learned.

    ``DistributedDataParallel(Objective(network))`` averages the gradients over the processes, which it would not for a
    loss that is a method of the network. Its parameters are those of the network and of a learned weighting.

    Args:
        network: whose ``get_loss`` gives the loss; see :class:`~ncsn_fast.models.base.ScoreModel`.
        weighting: ``"sigma2"``, ``"one"``, ``"learned"`` (a new
            :class:`~ncsn_fast.losses.LearnedWeighting` on the network's device), or a ``LearnedWeighting``.

    Attributes:
        network: the same.
        weighting: the name, or the learned one.
    """

    def __init__(self, network: ScoreModel, weighting: Weighting = "sigma2") -> None:
        super().__init__()
        self.network = network
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
    ) -> Tensor:
        """The loss of a batch, 0-d.

        Args:
            x: clean data, ``(N, ...)``, as the network takes it.
            labels: levels of the ladder, int64 ``(N,)``; ``None``: drawn by the network.
            sigma: noise levels themselves, ``(N,)``, in place of labels; of networks conditioned on sigma.
            seed: of the noise, ``0 <= seed < 2**64``; ``None``: drawn from torch's default CPU generator.

        Raises:
            Those of the network's ``get_loss``.
        """
        levels = {} if labels is None else {"labels": labels}
        levels |= {} if sigma is None else {"sigma": sigma}
        loss, _ = self.network.get_loss(x, seed=seed, weighting=self.weighting, **levels)
        return loss
