"""Plain-PyTorch references: what each operator computes, written as the formula; a file an operator.

These are the specification. Each is differentiable to any order (the in-place noise operators excepted, which
have no gradient), traceable by ``torch.compile`` and valid on every device. No argument checking, no backend choice:
that is ``ops/functional/`` and ``ops/dispatch.py``.
"""

from __future__ import annotations

from .add_norm_elu import add_norm_elu_with_statistics, added
from .avg_pool5 import avg_pool5
from .cond_instance_norm_elu import (
    cond_instance_norm_elu,
    cond_instance_norm_elu_backward,
    cond_instance_norm_elu_with_statistics,
    statistics_dtype,
)
from .conv3x3 import conv3x3, conv3x3_pack, conv3x3_weight_gradient, conv_direct
from .conv3x3_mean_pool import conv3x3_mean_pool
from .elu_conv3x3 import elu_conv3x3
from .langevin_step import langevin_step_, noise_scale
from .max_pool5 import max_pool5, max_pool5_backward
from .norm_elu_conv3x3 import norm_elu_conv3x3, norm_elu_conv3x3_with_statistics
from .philox import philox4x32, philox_bits, philox_normal, philox_uniform
from .solver_step import solver_step_

__all__ = [
    "add_norm_elu_with_statistics",
    "added",
    "avg_pool5",
    "cond_instance_norm_elu",
    "cond_instance_norm_elu_backward",
    "cond_instance_norm_elu_with_statistics",
    "conv3x3",
    "conv3x3_mean_pool",
    "conv3x3_pack",
    "conv3x3_weight_gradient",
    "conv_direct",
    "elu_conv3x3",
    "langevin_step_",
    "max_pool5",
    "max_pool5_backward",
    "noise_scale",
    "norm_elu_conv3x3",
    "norm_elu_conv3x3_with_statistics",
    "philox4x32",
    "philox_bits",
    "philox_normal",
    "philox_uniform",
    "solver_step_",
    "statistics_dtype",
]
