"""The operators, for use in any network: checked arguments in, the chosen backend's result out.

This file only lists them. The public function of an operator is in ``functional/``, a file of the operator's name; what
it computes in ``reference/``, its schema in ``schema.py``, its gradients in ``autograd.py``; which backend runs in
``dispatch.py``, and the algorithms of the 3x3 convolution in ``algorithms.py``.
"""

from __future__ import annotations

from ..streams import STREAM_INIT, STREAM_LANGEVIN, STREAM_OTHER, STREAM_TRAINING
from .dispatch import set_backend, use_backend
from .functional.add_norm_elu import add_norm_elu
from .functional.avg_pool5 import avg_pool5
from .functional.cond_instance_norm_elu import cond_instance_norm_elu
from .functional.conv3x3 import conv3x3, wants_channels_last
from .functional.conv3x3_mean_pool import conv3x3_mean_pool
from .functional.conv3x3_norm_elu import conv3x3_norm_elu, joins_sums
from .functional.elu_conv3x3 import elu_conv3x3
from .functional.langevin_step import langevin_step_
from .functional.max_pool5 import max_pool5
from .functional.norm_elu_conv3x3 import norm_elu_conv3x3
from .functional.philox import philox_bits, philox_normal, philox_uniform
from .functional.solver_step import solver_step_
from .packing import forget_packed, prepack

__all__ = [
    "STREAM_INIT",
    "STREAM_LANGEVIN",
    "STREAM_OTHER",
    "STREAM_TRAINING",
    "add_norm_elu",
    "avg_pool5",
    "cond_instance_norm_elu",
    "conv3x3",
    "conv3x3_mean_pool",
    "conv3x3_norm_elu",
    "elu_conv3x3",
    "forget_packed",
    "joins_sums",
    "langevin_step_",
    "max_pool5",
    "norm_elu_conv3x3",
    "philox_bits",
    "philox_normal",
    "philox_uniform",
    "prepack",
    "set_backend",
    "solver_step_",
    "use_backend",
    "wants_channels_last",
]
