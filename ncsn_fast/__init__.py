"""Noise Conditional Score Networks (Song & Ermon 2019) at the speed of the hardware.

Belongs here: the names that users import first. Beside it lies the ground that all rooms stand on (``checks``,
``files``, ``streams``, ``distributed``, ``progress``, ``embeddings``, ``threads``, ``memory``); docs/architecture.md
says what is in each room, and which may import which.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from . import threads

threads.set_defaults()  # before torch is loaded, which all that follows does

from . import ops
from .models.base import ScoreModel, load_pretrained
from .models.config import NCSNConfig
from .models.convert import load_official, save_official
from .models.ncsn import NCSN
from .models.official import (
    NCSNv2,
    NCSNv2Config,
    NCSNv2Deeper,
    NCSNv2DeeperConfig,
    NCSNv2Deepest,
    NCSNv2DeepestConfig,
    OfficialNCSN,
    OfficialNCSNConfig,
)
from .models.registry import register
from .models.small import ScoreCNN, ScoreMLP
from .ops import set_backend, use_backend

if TYPE_CHECKING:
    from .benchmarks.check import Row

__version__ = "0.1.0"

__all__ = [
    "NCSN",
    "NCSNConfig",
    "NCSNv2",
    "NCSNv2Config",
    "NCSNv2Deeper",
    "NCSNv2DeeperConfig",
    "NCSNv2Deepest",
    "NCSNv2DeepestConfig",
    "OfficialNCSN",
    "OfficialNCSNConfig",
    "ScoreCNN",
    "ScoreMLP",
    "ScoreModel",
    "__version__",
    "check",
    "load_official",
    "load_pretrained",
    "ops",
    "register",
    "save_official",
    "set_backend",
    "use_backend",
]


def check(devices: Sequence[str] | None = None) -> list[Row]:
    """Compare every kernel with the reference on this machine: :func:`ncsn_fast.benchmarks.check.check`."""
    from .benchmarks import check as module  # which takes a second to import

    return module.check(devices)


# Modules that have moved into rooms: an import by the old name gives the new module.
_MOVED = {
    "checkpoints": "training.checkpoints",
    "config": "models.config",
    "demo": "demos.digits",
    "engine": "sampling.engine",
    "interface": "models.base",
    "layers": "models.layers",
    "losslog": "training.log",
    "metrics": "evaluation.metrics",
    "model": "models.ncsn",
    "networks": "models.small",
    "pictures": "plots.pictures",
    "pretrained": "models.pretrained",
    "probability_flow": "sampling.ode",
    "ranges": "data.ranges",
    "samplers": "sampling.samplers",
    "settings": "training.settings",
    "sharded": "sampling.to_folder",
    "toy_demos": "demos.points",
    "wrappers": "distributed",
}


class _Moved(MetaPathFinder, Loader):
    """Finds a moved module by its old name; it is the same module, under both names."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        return ModuleSpec(name, self) if package == __name__ and module in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """As usual: an empty one, in whose place comes the real one."""

    def exec_module(self, module: ModuleType) -> None:
        new = _MOVED[module.__name__.rpartition(".")[2]]
        sys.modules[module.__name__] = importlib.import_module(f"{__name__}.{new}")


sys.meta_path.append(_Moved())
