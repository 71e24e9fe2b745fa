"""Conditional instance normalisation and ELU."""

from __future__ import annotations

from torch import Tensor

from .. import autograd, reference
from ..autograd import needs_gradient
from ..checks import as_int64, check_norm, check_number
from ..dispatch import recall, select
from ..schema import operator


def cond_instance_norm_elu(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    elu: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Conditional instance normalisation, then ELU with alpha 1.

    Every plane is normalised by its own mean and biased variance, in training and in evaluation,
    then scaled and shifted by the row of ``weight`` that its sample's label chooses:
    :math:`u = \gamma_{y} (x - \mu) / \sqrt{\mathrm{var} + eps} + \beta_{y}`. With three columns a
    channel it is InstanceNorm++: :math:`u = \gamma (\hat x + \alpha m) + \beta`, where m is the
    plane's mean, normalised over the channels.

    Args:
        x: ``(N, C, *spatial)``; float32, bfloat16, float16 or float64; contiguous or channels_last,
            which the output keeps.
        labels: ``(N,)`` integers in 0 .. K-1, or of length 1 for the whole batch.
        weight: ``(K, 2C)``, columns gamma | beta, or ``(K, 3C)``, columns gamma | alpha | beta; floating.
        eps: added to the variance.
        elu: False leaves out the activation.
        backend: ``"native"``, ``"triton"``, ``"reference"``, ``"auto"``; None for the policy of :func:`set_backend`.

    Returns:
        A tensor of the shape, dtype and layout of ``x``. Differentiable for ``x`` and ``weight``, to any order.

    Raises:
        TypeError, ValueError: arguments of a wrong dtype or shape.
        RuntimeError: tensors on different devices; a backend asked for that cannot serve the call.
        IndexError: a label out of range, on the CPU (on CUDA: a device-side assertion).

    Source: Song & Ermon 2019 (arXiv:1907.05600), appendix A, after Dumoulin et al. 2017 (arXiv:1610.07629).
    """
    eps = check_number("eps", eps, 0.0)
    memory, key = recall("cond_instance_norm_elu", backend, (x, labels, weight))
    chosen = memory.get(key)
    if chosen is None:
        check_norm(x, labels, weight)
        chosen = memory[key] = select("cond_instance_norm_elu", backend, x, labels, weight)
    labels = as_int64(labels)
    if chosen == "reference":
        return reference.cond_instance_norm_elu(x, labels, weight, eps, elu)
    if needs_gradient(x, weight):
        return autograd.CondInstanceNormELU.apply(x, labels, weight, eps, elu, chosen)
    return operator("cond_instance_norm_elu", chosen)(x, labels, weight, eps, elu)[0]
