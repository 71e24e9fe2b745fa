"""The authors' networks at their published sizes: a forward pass, and a step of annealed Langevin dynamics."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ncsn_fast.models.official import NCSNv2, NCSNv2Deeper, NCSNv2Deepest, OfficialNCSN
from ncsn_fast.schedules import make_sigmas
from ncsn_fast.training.presets import read_preset

from .. import plain_official
from ..peers import Module
from ..suite import Case, Settings, tolerance_of
from .forward import CHANNELS, images
from .sampling import TOLERANCE_FACTOR, Loop

# The network of a preset, and batches on a CPU and on a GPU.
PUBLISHED = {
    "ncsn-cifar10": (OfficialNCSN, (1, 16), (1, 64)),
    "ncsnv2-cifar10": (NCSNv2, (1, 16), (1, 64)),
    "ncsnv2-celeba": (NCSNv2, (1,), (1, 16)),
    "ncsnv2-bedroom": (NCSNv2Deeper, (1,), (1, 16)),
    "ncsnv2-ffhq": (NCSNv2Deepest, (1,), (1, 4)),
}
QUICK = ("ncsn-cifar10", "ncsnv2-cifar10")
# Where the weights are as much work as the image, several steps stand for a chain, which transforms them once.
SMALL_STEPS = 5
# On a CPU inductor's graph of this network takes longer to make than all the rest of the run.
NOT_COMPILED_ON_CPU = ("ncsnv2-ffhq",)


def model_of(name: str, levels: int | None = None) -> nn.Module:
    """The network of a preset with its ladder, or with the first levels of that."""
    preset = read_preset(name)
    sigmas = make_sigmas(preset["sigma_begin"], preset["sigma_end"], preset["num_classes"])[:levels]
    torch.manual_seed(0)
    network = PUBLISHED[name][0]
    return network(CHANNELS, preset["nf"], len(sigmas), sigmas=sigmas).eval()


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """The network in plain PyTorch and ours, with the same weights."""
    model = model_of(name)
    return plain_official.network_like(model), model


def images_of_a_level(n: int, name: str) -> tuple[Tensor, Tensor]:
    """Images, and the middle level for all of them: outputs go as 1 / sigma, and none is to hide another's error."""
    preset = read_preset(name)
    return images(n, preset["image_size"])[0], torch.full((n,), preset["num_classes"] // 2)


@functools.cache
def flops_of_an_image(name: str) -> int:
    """Twice the multiplications of a pass, counted by PyTorch on tensors without data."""
    preset = read_preset(name)
    size = preset["image_size"]
    kind = PUBLISHED[name][0].__name__
    with torch.device("meta"):
        network = plain_official.Network(kind, CHANNELS, preset["nf"], preset["num_classes"])
        image, label = torch.empty(1, CHANNELS, size, size), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, label)
    return counter.get_total_flops()


class Steps(Loop):
    """Steps at the first level, with the published size of one there."""

    plain = plain_official

    def __init__(self, n: int, name: str) -> None:
        preset = read_preset(name)
        size = preset["image_size"]
        super().__init__(n, preset["nf"], size, levels=1, steps=SMALL_STEPS if size < 64 else 1)
        ratio = preset["sigma_begin"] / preset["sigma_end"]
        self.preset, self.step_lr = name, preset["sampling"]["step_lr"] * ratio**2

    def model(self) -> nn.Module:
        return model_of(self.preset, levels=1)


def forward(settings: Settings, name: str, n: int, dtype: torch.dtype, compiled: bool) -> Case:
    work = Module(inputs=partial(images_of_a_level, n, name), make=partial(networks, name))
    size = read_preset(name)["image_size"]
    layouts = ("channels_last",) if compiled else ()
    return Case(
        suite="model",
        group=name,
        name="forward",
        shape=(n, CHANNELS, size, size),
        dtype=dtype,
        peers=work.peers(settings, dtype, backward=False, compiled_layouts=layouts),
        expected=work.expected(dtype, backward=False, device=settings.device),
        tolerance=tolerance_of(dtype, network=True),
        flops=n * flops_of_an_image(name),
    )


def steps(settings: Settings, name: str, n: int, dtype: torch.dtype, compiled: bool) -> Case:
    loop = Steps(n, name)
    return Case(
        suite="sample",
        group=name,
        name="Langevin steps",
        shape=(n, CHANNELS, loop.size, loop.size),
        dtype=dtype,
        setting=f"levels=1 steps={loop.steps}",
        peers=tuple(loop.peers(settings, dtype, compiled=compiled)),
        expected=partial(loop.expected, dtype, settings.device),
        tolerance=TOLERANCE_FACTOR * tolerance_of(dtype, network=True),
        flops=loop.steps * n * flops_of_an_image(name),
    )


def cases(settings: Settings) -> Iterator[Case]:
    on_cpu = settings.device.type == "cpu"
    # Compiled once, in the default mode: these networks are large.
    once = dataclasses.replace(settings, quick=True)
    for name, (_, on_a_cpu, on_a_gpu) in PUBLISHED.items():
        if settings.quick and name not in QUICK:
            continue
        compiled = not (on_cpu and name in NOT_COMPILED_ON_CPU)
        for n in settings.batch_sizes(full=on_a_cpu if on_cpu else on_a_gpu, quick=(1,)):
            for dtype in settings.network_dtypes:
                yield forward(once, name, n, dtype, compiled)
                yield steps(once, name, n, dtype, compiled)
