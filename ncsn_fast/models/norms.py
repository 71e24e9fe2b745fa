"""InstanceNorm++ in the two forms of the authors' networks.

Belongs here: norms with parameters as the authors' state dicts have them. Does not belong here: the norm of the NCSN
(``layers.py``), the arithmetic (``ops``).

``x`` is ``(N, C, H, W)``; ``y`` holds the noise levels, ``(N,)`` or ``(1,)`` integers; the form of 2020 ignores it.
The order in which parameters are drawn is that of the authors, and must not change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .plain import tell_called, why_not_lookup

NORM_STD = 0.02  # gamma and alpha start from N(1, 0.02^2)


class CondInstanceNormPlus(nn.Module):
    r"""InstanceNorm++ with a gain, an offset and a weight of the channel means for each noise level.

    .. math:: \mathrm{out} = \gamma_y (\hat x + \alpha_y \hat m) + \beta_y

    :math:`\hat x`: the plane less its mean, over its deviation (biased); :math:`\hat m`: the planes' means, normalised
    over the channels (unbiased). There are no running statistics.

    Args:
        num_features: channels C, at least 2.
        num_classes: noise levels K.

    ``embed.weight`` is ``(K, 3C)``, columns gamma | alpha | beta.
    """

    eps = 1e-5

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        # The table's own initial values are drawn as well: the numbers that follow a seed are the authors'.
        self.embed = nn.Embedding(num_classes, 3 * num_features)
        with torch.no_grad():
            self.embed.weight[:, : 2 * num_features].normal_(1, NORM_STD)
            self.embed.weight[:, 2 * num_features :].zero_()

    def table(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows, and which of them each sample takes, as the operators want them."""
        if y is None:
            raise TypeError("a conditional norm needs the noise levels y, got None")
        reason = why_not_lookup(self.embed)
        if reason is None:
            return y, self.embed.weight
        tell_called(self.embed, reason)
        rows = self.embed(y)
        return torch.arange(rows.shape[0], dtype=torch.int64, device=rows.device), rows

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Normalise ``x``; shape, dtype and layout of ``x``."""
        return ops.cond_instance_norm_elu(x, *self.table(x, y), self.eps, elu=False)


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ that is the same for all noise levels; formula as of :class:`CondInstanceNormPlus`.

    ``alpha``, ``gamma`` and ``beta`` are ``(C,)``, in this order.
    """

    eps = 1e-5

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(num_features).normal_(1, NORM_STD))
        self.gamma = nn.Parameter(torch.empty(num_features).normal_(1, NORM_STD))
        self.beta = nn.Parameter(torch.zeros(num_features))

    def table(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """A table of one row, which every sample takes."""
        row = torch.cat([self.gamma, self.alpha, self.beta]).unsqueeze(0)
        return torch.zeros(1, dtype=torch.int64, device=x.device), row

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Normalise ``x``; shape, dtype and layout of ``x``."""
        return ops.cond_instance_norm_elu(x, *self.table(x, y), self.eps, elu=False)


Norm = CondInstanceNormPlus | InstanceNormPlus


def make_norm(num_features: int, num_classes: int | None) -> Norm:
    """The norm of the 2019 form, or with ``num_classes=None`` that of the 2020 form."""
    if num_classes is None:
        return InstanceNormPlus(num_features)
    return CondInstanceNormPlus(num_features, num_classes)
