"""The algorithms of the 3x3 convolution: the one table of where each can run and when it pays.

``dispatch.py`` chooses by it, ``ncsn_fast.info`` shows it and docs/adding_an_operator.md prints it. Facts about
algorithms belong here; which libraries are loaded, and what a caller asked for, is the dispatch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .extension import constant
from .measured import gemm_has_won

# The backend of an operator that no kernel does all of: it is composed of parts, each of which has the backend that
# serves it; the convolution among them is PyTorch's.
COMPOSED = "composed"

# Where Winograd's F(4x4, 3x3) beats a direct convolution on a CPU, by measurement. For one sample, so that a sample's
# result does not depend on its batch.
WINOGRAD_TILE = 4
WINOGRAD_LEAST_FILL = 0.3  # of the tiles by outputs; dilation d makes d x d small images of one
WINOGRAD_LEAST_CHANNELS = 16  # with fewer there is little to save ...
WINOGRAD_FEW_PIXELS = 144  # ... but in a small image all that counts is one call instead of some


def winograd_pays(x: Tensor, dilation: int) -> bool:
    """Whether Winograd's algorithm is the faster one for ``x (N, C, H, W)``."""
    if not float32_pays(x):
        return False
    tiles = 1
    for size in x.shape[2:]:
        long, images = size // dilation + 1, size % dilation
        short = dilation - images
        per_image = [-(-length // WINOGRAD_TILE) for length in (long, long - 1)]
        tiles *= images * per_image[0] + short * per_image[1]
    pixels = x.shape[2] * x.shape[3]
    if pixels < WINOGRAD_LEAST_FILL * WINOGRAD_TILE**2 * tiles:
        return False
    return x.shape[1] >= WINOGRAD_LEAST_CHANNELS or pixels <= WINOGRAD_FEW_PIXELS


# Converted to float32 and back around a convolution on a CPU: without matrix units it has no faster way.
HALF = (torch.bfloat16, torch.float16)
_MATRIX_UNIT = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}  # the flags of Linux


@cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it; nothing elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = (line.split(":", 1)[1] for line in file if line.startswith("flags"))
            return frozenset(next(lines, "").split())
    except OSError:
        return frozenset()


@constant
def has_matrix_unit(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix units (AMX) for a dtype of 16 bits: then PyTorch's convolution is the faster one."""
    return _MATRIX_UNIT.get(dtype) in processor_flags()


def dtype_of_call(x: Tensor) -> torch.dtype:
    """What a convolution is to compute in: the dtype of ``x``, or that of autocast, which leaves float64 alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def float32_pays(x: Tensor) -> bool:
    """Whether a CPU is to compute the convolution of ``x`` in float32."""
    return not has_matrix_unit(dtype_of_call(x))


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """Such as ``"float32, bfloat16"``."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@dataclass(frozen=True)
class Algorithm:
    """One way to compute the 3x3 convolution.

    Attributes:
        name: what ``conv_algo`` calls it.
        backend: the backend whose kernel it is, or ``COMPOSED``.
        devices: the device types that it runs on; empty for every one.
        dtypes: the dtypes that it takes; empty for every floating one. On a CPU those of 16 bits are computed in
            float32.
        pays: whether ``conv_algo="auto"`` takes it for an ``x (N, C, H, W)`` and a dilation, where it can run.
        when: the same in words.
    """

    name: str
    backend: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    pays: Callable[[Tensor, int], bool]
    when: str

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve tensors of a dtype on a device, in words; None if it can."""
        if self.devices and device_type not in self.devices:
            return f"{self.name} runs on {', '.join(self.devices)}, not on {device_type}"
        if self.dtypes and dtype not in self.dtypes:
            return f"{self.name} takes {names_of(self.dtypes)}, got {names_of([dtype])}"
        return None

    def facts(self) -> dict[str, str]:
        """The row as text, for tables."""
        return {
            "conv_algo": self.name,
            "backend": self.backend,
            "device": ", ".join(self.devices) or "every",
            "dtype": names_of(self.dtypes) or "every floating",
            "auto takes it": self.when,
        }


WINOGRAD = Algorithm(
    name="winograd",
    backend="native",
    devices=("cpu",),
    dtypes=(torch.float32, *HALF),
    pays=winograd_pays,
    when=(
        f"where its {WINOGRAD_TILE}x{WINOGRAD_TILE} tiles are filled to {WINOGRAD_LEAST_FILL:.0%}, from "
        f"{WINOGRAD_LEAST_CHANNELS} channels on or up to {WINOGRAD_FEW_PIXELS} pixels; "
        "16 bits, by way of float32, where the processor has no AMX for them"
    ),
)
DIRECT = Algorithm(
    name="direct",
    backend="native",
    devices=("cpu",),
    dtypes=(torch.float32, *HALF),
    pays=lambda x, dilation: float32_pays(x),
    when="where winograd does not pay; 16 bits as there",
)
GEMM = Algorithm(
    name="gemm",
    backend="triton",
    devices=("cuda",),
    dtypes=(torch.float16, torch.bfloat16),
    pays=lambda x, dilation: gemm_has_won(x.shape[1], x.shape[2:].numel(), dilation, x.dtype),
    when="where `python -m ncsn_fast.kernels.tune` has measured it faster on this GPU",
)
# The same by PyTorch.
COMPOSED_DIRECT = Algorithm(
    name="direct",
    backend=COMPOSED,
    devices=(),
    dtypes=(),
    pays=lambda x, dilation: True,
    when="everywhere else",
)

# In the order in which `auto` tries them.
CONV_ALGORITHMS = (WINOGRAD, DIRECT, GEMM, COMPOSED_DIRECT)
