"""A training step: loss, gradients, Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from ncsn_fast import ops

from .. import plain_torch
from ..measure import Timed
from ..peers import (
    CPU,
    LAYOUTS,
    OURS,
    Compiled,
    check_eager,
    check_layout,
    flat,
    modes_for,
    placed,
    seen_backends,
)
from ..suite import Case, Outputs, Peer, Prepared, Settings, tolerance_of
from .forward import CLASSES, forward_flops, images, networks

LEARNING_RATE, SEED = 1e-4, 1

Loss = Callable[[], Tensor]


def noise_like(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """That of ``get_loss`` with the seed, for the comparison of the gradients."""
    noise = ops.philox_normal(x.shape, seed=SEED, stream=ops.STREAM_TRAINING, dtype=dtype)
    return noise.to(x.device)


class Step:
    """A module, its optimizer, and a step with a loss."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.train()
        self.optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE)

    def run(self, loss: Loss) -> None:
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, loss: Loss) -> Outputs:
        """The loss and all gradients as one vector."""
        value = loss()
        value.backward()
        named = sorted(self.module.named_parameters())
        found = value.detach(), flat(p.grad for _, p in named if p.grad is not None)
        self.optimizer.zero_grad()
        return found


def expected(n: int, nf: int, size: int, dtype: torch.dtype, device: torch.device = CPU) -> Outputs:
    x, labels = placed(placed(images(n, size), CPU, dtype), device, torch.float64)
    network = networks(nf)[0].to(dtype).to(device, torch.float64)
    noise = noise_like(x).to(dtype).double()
    sigmas = network.sigmas
    return Step(network).gradients(lambda: plain_torch.loss(network, x, labels, sigmas, noise))


def peers(n: int, nf: int, size: int, dtype: torch.dtype, settings: Settings) -> Iterator[Peer]:
    device = settings.device

    def place(which: int, layout: str) -> tuple[Step, Tensor, Tensor]:
        module = networks(nf)[which].to(device, dtype, memory_format=LAYOUTS[layout])
        x, labels = placed(images(n, size), device, dtype, layout)
        check_layout([x, *module.parameters()], layout)
        return Step(module), x, labels

    def plain(layout: str, mode: str | None) -> Prepared:
        step, x, labels = place(0, layout)
        compiled = None if mode is None else Compiled(step.module, mode)
        network = step.module if compiled is None else compiled.call
        sigmas, given = step.module.sigmas, noise_like(x).to(dtype)

        def loss(noise: Tensor | None = None) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            z = torch.randn_like(x) if noise is None else noise
            return plain_torch.loss(network, x, labels, sigmas, z)

        call = partial(step.run, loss)
        if compiled is not None:
            compiled.warm_up(lambda: step.gradients(loss))
        outputs = step.gradients(partial(loss, given))  # before a step changes the weights
        if compiled is None:
            backend, graphs = check_eager(call), None
        else:
            call()  # makes Adam's state, which is not the memory of a step
            backend, graphs = "inductor", compiled.graphs
        return Prepared(Timed(call), lambda: outputs, backend, layout, graphs)

    def ours(layout: str) -> Prepared:
        step, x, labels = place(1, layout)

        def loss(seed: int | None = None) -> Tensor:
            return step.module.get_loss(x, labels=labels, seed=seed)[0]

        call = partial(step.run, loss)
        outputs = step.gradients(partial(loss, SEED))
        return Prepared(Timed(call), lambda: outputs, seen_backends(call), layout)

    modes = modes_for(settings, network=True)
    for layout in LAYOUTS:
        yield Peer("eager", layout, partial(plain, layout, None))
        yield Peer(OURS, layout, partial(ours, layout))
    for mode in modes:
        name = "compile" if mode == "default" else f"compile {mode}"
        yield Peer(name, "channels_last", partial(plain, "channels_last", mode))


def cases(settings: Settings) -> Iterator[Case]:
    on_cpu = settings.device.type == "cpu"
    batches = settings.batch_sizes((4, 16) if on_cpu else (16, 128), (4,) if on_cpu else (64,))
    nf, size = 128, 32
    for dtype, n in product(settings.network_dtypes, batches):
        yield Case(
            suite="train",
            group="training",
            name="step",
            shape=(n, 3, size, size),
            dtype=dtype,
            setting=f"nf={nf} levels={CLASSES}",
            peers=tuple(peers(n, nf, size, dtype, settings)),
            expected=partial(expected, n, nf, size, dtype, settings.device),
            tolerance=tolerance_of(dtype, backward=True, network=True),
            flops=3 * forward_flops(n, nf, size),
        )
