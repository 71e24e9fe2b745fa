"""What a run does just now: the line behind its bar, its memory, the machine that it is on.

Belongs here: facts of the moment, as plain values. Does not belong here: records of them (``watching.py``), the bar
itself (``progress.py`` of the package above).
"""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__, info

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_EVERY = 10  # steps between two looks at the losses, which wait for the device


def machine(device: torch.device) -> dict[str, Any]:
    """Where a run runs; plain values, those of the GPU if there is one."""
    found = {"processor": info.processor(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {
        "device": str(device),
        **found,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ncsn_fast": __version__,
    }


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use so far: of tensors on a GPU, otherwise of the process; ``None`` where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def live_line(
    bar: tqdm, loss: float, rate: float, batch_size: int, device: torch.device
) -> dict[str, str]:
    """What stands behind the bar, which itself says the step and how long it will take."""
    shown = {"loss": f"{loss:.3f}", "lr": f"{rate:.1e}"}
    speed = bar.format_dict["rate"]  # steps a second, smoothed; None at first
    if speed:
        shown["images/s"] = f"{speed * batch_size:,.0f}"
    memory = peak_memory(device)
    if memory:
        shown["memory"] = f"{memory / 1e9:.2f}GB"
    return shown
