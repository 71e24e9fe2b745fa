"""Annealed Langevin dynamics: the loop in plain PyTorch and ours, with a network and without; how its cost grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ncsn_fast import ops
from ncsn_fast.models.ncsn import NCSN
from ncsn_fast.sampling import annealed_langevin

from .. import plain_torch
from ..measure import Timed
from ..peers import (
    CPU,
    LAYOUTS,
    OURS,
    Compiled,
    check_eager,
    check_layout,
    modes_for,
    placed,
    seen_backends,
)
from ..suite import Case, Outputs, Peer, Prepared, Settings, tolerance_of
from .forward import CHANNELS, forward_flops, images

SEED, STEP_LR = 1, 2e-5
SIGMA_BEGIN, SIGMA_END = 1.0, 0.01  # the paper's
# Rounding grows from step to step of an untrained network: after a hundred, eager PyTorch in float32 is 0.06 off. So
# images are compared after two steps a level at most; a wrong noise, step size or order would be an error near 1.
CHECKED_STEPS, TOLERANCE_FACTOR = 2, 10


class Noise:
    """Our noise, step by step, for the comparison of the images."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.step, self.dtype = 0, dtype

    def __call__(self, x: Tensor) -> Tensor:
        noise = ops.philox_normal(
            x.shape,
            seed=SEED,
            step=self.step,
            stream=ops.STREAM_LANGEVIN,
            dtype=self.dtype,
            backend="reference",
        )
        self.step += 1
        return noise.to(x.device)


class Loop:
    """Sampling of a size, in plain PyTorch and by ours.

    Attributes:
        plain: the module with ``network_like`` and ``sample`` in plain PyTorch.
        step_lr: step size at the last level.
    """

    plain: Any = plain_torch
    step_lr = STEP_LR

    def __init__(self, n: int, nf: int, size: int, levels: int, steps: int) -> None:
        self.n, self.nf, self.size, self.levels, self.steps = n, nf, size, levels, steps
        self.checked_steps = min(steps, CHECKED_STEPS)

    @property
    def setting(self) -> str:
        return f"nf={self.nf} levels={self.levels} steps={self.steps}"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = NCSN(in_channels=CHANNELS, nf=self.nf, num_classes=self.levels)
        model.set_sigmas(NCSN.make_sigmas(SIGMA_BEGIN, SIGMA_END, self.levels))
        return model.eval()

    def start(self) -> Tensor:
        return images(self.n, self.size)[0]

    def expected(self, dtype: torch.dtype, device: torch.device = CPU) -> Outputs:
        network = self.plain.network_like(self.model()).to(dtype).to(device, torch.float64)
        start = self.start().to(device, torch.float64)
        sigmas = self.model().sigmas.to(device, torch.float64)
        noise = Noise(torch.float64)
        steps = self.checked_steps
        return (self.plain.sample(network, start, sigmas, steps, self.step_lr, noise),)

    def peers(self, settings: Settings, dtype: torch.dtype, *, compiled: bool) -> Iterator[Peer]:
        for layout in LAYOUTS:
            yield Peer("eager", layout, partial(self.eager, settings.device, dtype, layout, None))
            yield Peer(OURS, layout, partial(self.ours, settings.device, dtype, layout))
        modes = modes_for(settings, network=True) if compiled else ()
        for mode in modes:
            name = "compile" if mode == "default" else f"compile {mode}"
            prepare = partial(self.eager, settings.device, dtype, "channels_last", mode)
            yield Peer(name, "channels_last", prepare)

    def eager(
        self, device: torch.device, dtype: torch.dtype, layout: str, mode: str | None
    ) -> Prepared:
        """The loop in plain PyTorch around the network, which runs eagerly or under torch.compile."""
        network = self.plain.network_like(self.model())
        network = network.to(device, dtype, memory_format=LAYOUTS[layout]).requires_grad_(False)
        (start,) = placed((self.start(),), device, torch.float32, layout)
        check_layout([start, *network.parameters()], layout)
        sigmas = self.model().sigmas.to(device)
        compiled = None if mode is None else Compiled(network, mode)
        call = network if compiled is None else compiled.call

        def score(x: Tensor, labels: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return call(x.to(dtype), labels).float()

        def loop(
            steps: int = self.steps, noise_like: Callable[[Tensor], Tensor] = torch.randn_like
        ) -> Tensor:
            return self.plain.sample(score, start, sigmas, steps, self.step_lr, noise_like)

        if compiled is None:
            backend = check_eager(loop)
        else:
            compiled.warm_up(loop)
            backend = "inductor"
        return Prepared(
            Timed(loop),
            lambda: (loop(self.checked_steps, Noise()),),
            backend,
            layout,
            None if compiled is None else compiled.graphs,
        )

    def ours(self, device: torch.device, dtype: torch.dtype, layout: str) -> Prepared:
        """``sample`` of the network."""
        model = self.model().to(device, dtype, memory_format=LAYOUTS[layout])
        (start,) = placed((self.start(),), device, torch.float32, layout)
        check_layout([start, *model.parameters()], layout)

        def loop(steps: int = self.steps) -> Tensor:
            return model.sample(
                self.n,
                self.size,
                n_steps_each=steps,
                step_lr=self.step_lr,
                init=start,
                seed=SEED,
                verbose=False,
            )

        outputs = partial(loop, self.checked_steps)
        return Prepared(Timed(loop), lambda: (outputs(),), seen_backends(loop), layout)


class BareLoop(Loop):
    """The same loops around a score that costs nothing: what they add to the network's forward passes."""

    def __init__(self, n: int, size: int, levels: int, steps: int) -> None:
        super().__init__(n, 0, size, levels, steps)
        self.checked_steps = steps  # no network, so no rounding that grows

    @property
    def setting(self) -> str:
        return f"no network, levels={self.levels} steps={self.steps}"

    def sigmas(self) -> Tensor:
        return NCSN.make_sigmas(SIGMA_BEGIN, SIGMA_END, self.levels)

    def expected(self, dtype: torch.dtype, device: torch.device = CPU) -> Outputs:
        start = self.start().to(device, torch.float64)
        noise = Noise(torch.float64)
        sigmas = self.sigmas().to(device, torch.float64)
        arguments = (start, sigmas, self.steps, STEP_LR, noise)
        return (plain_torch.sample(lambda x, labels: -start, *arguments),)

    def peers(self, settings: Settings, dtype: torch.dtype, *, compiled: bool) -> Iterator[Peer]:
        for layout in LAYOUTS:
            place = (settings.device, dtype, layout)
            yield Peer("eager", layout, partial(self.bare_plain, *place))
            yield Peer(OURS, layout, partial(self.bare_ours, *place))

    def bare_plain(self, device: torch.device, dtype: torch.dtype, layout: str) -> Prepared:
        (start,) = placed((self.start(),), device, torch.float32, layout)
        score, sigmas = -start.to(dtype), self.sigmas().to(device)

        def loop(noise_like: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
            arguments = (start, sigmas, self.steps, STEP_LR, noise_like)
            return plain_torch.sample(lambda x, labels: score, *arguments)

        return Prepared(Timed(loop), lambda: (loop(Noise()),), check_eager(loop), layout)

    def bare_ours(self, device: torch.device, dtype: torch.dtype, layout: str) -> Prepared:
        (start,) = placed((self.start(),), device, torch.float32, layout)
        score, sigmas = -start.to(dtype), self.sigmas().tolist()

        def loop() -> Tensor:
            return annealed_langevin(
                lambda x, level: score,
                start,
                sigmas,
                n_steps_each=self.steps,
                step_lr=STEP_LR,
                clip=1.0,
                seed=SEED,
                cuda_graph=device.type == "cuda",
            )

        return Prepared(Timed(loop), lambda: (loop(),), seen_backends(loop), layout)


def case(settings: Settings, loop: Loop, dtype: torch.dtype, *, compiled: bool) -> Case:
    passes = loop.levels * loop.steps
    return Case(
        suite="sample",
        group="sampling",
        name="annealed Langevin",
        shape=(loop.n, CHANNELS, loop.size, loop.size),
        dtype=dtype,
        setting=loop.setting,
        peers=tuple(loop.peers(settings, dtype, compiled=compiled)),
        expected=partial(loop.expected, dtype, settings.device),
        tolerance=TOLERANCE_FACTOR * tolerance_of(dtype, network=True),
        flops=passes * forward_flops(loop.n, loop.nf, loop.size) if loop.nf else 0,
        bytes=0 if loop.nf else passes * loop.start().numel() * (8 + dtype.itemsize),
    )


def cases(settings: Settings) -> Iterator[Case]:
    """A few steps a level stand for the usual hundred: every step is the same work.

    On a GPU they are more, since ours calls the first ones as they are, to warm up, and captures them after that.
    """
    on_cpu = settings.device.type == "cpu"
    steps = 1 if on_cpu else 20
    batches = settings.batch_sizes(full=(1, 4) if on_cpu else (1, 16, 64, 256), quick=(1,))
    for n in batches:
        for dtype in settings.network_dtypes:
            yield case(settings, Loop(n, 128, 32, 10, steps), dtype, compiled=True)
    if not settings.quick:
        nf, dtype = 32, settings.dtypes[0]
        for n in settings.batches or (1, 4, 16, 64):
            yield case(settings, Loop(n, nf, 16, 10, 1), dtype, compiled=False)
            yield case(settings, BareLoop(n, 32, 10, 100), dtype, compiled=False)
        for levels in (5, 20, 40):
            yield case(settings, Loop(1, nf, 16, levels, 1), dtype, compiled=False)
        for steps in (2, 5, 10):
            yield case(settings, Loop(1, nf, 16, 10, steps), dtype, compiled=False)
