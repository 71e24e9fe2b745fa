"""A training step: loss, gradients, Adam; and a step of a whole loop, with its data and its moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ncsn_fast import ops
from ncsn_fast.data import ImageDataset
from ncsn_fast.training import TrainingSettings
from ncsn_fast.training.trainer import Trainer

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
EMA_DECAY, GRAD_CLIP = 0.999, 10.0
DATA = 1000  # images that a loop trains on

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


class PlainLoop:
    """A training loop as one writes it in plain PyTorch, over images of bytes.

    Args:
        step: the network and its optimiser.
        network: the same network, compiled or not.
        data: uint8 ``(N, C, H, W)``, on the CPU.
        n: images a step.
    """

    def __init__(self, step: Step, network: Callable[..., Tensor], data: Tensor, n: int) -> None:
        self.step, self.network, self.data, self.n = step, network, data, n
        self.average = AveragedModel(step.module, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def run(self) -> None:
        module, sigmas = self.step.module, self.step.module.sigmas
        x = self.data[torch.randint(len(self.data), (self.n,))].to(sigmas.device)
        x = (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(len(sigmas), (self.n,), device=sigmas.device)
        torch.compiler.cudagraph_mark_step_begin()
        loss = plain_torch.loss(self.network, x, labels, sigmas, torch.randn_like(x))
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), GRAD_CLIP)
        self.step.optimizer.step()
        self.step.optimizer.zero_grad()
        self.average.update_parameters(module)


def loop_peers(
    n: int, nf: int, size: int, dtype: torch.dtype, settings: Settings
) -> Iterator[Peer]:
    """The trainer, its data included, against :class:`PlainLoop`; what is compared are the gradients of one batch."""
    device, layout = settings.device, "channels_last"
    generator = torch.Generator("cpu").manual_seed(0)
    data = torch.randint(0, 256, (DATA, 3, size, size), generator=generator).to(torch.uint8)

    def place(which: int) -> tuple[Step, Tensor, Tensor]:
        module = networks(nf)[which].to(device, dtype, memory_format=LAYOUTS[layout])
        return Step(module), *placed(images(n, size), device, dtype, layout)

    def plain(mode: str | None) -> Prepared:
        step, x, labels = place(0)
        compiled = None if mode is None else Compiled(step.module, mode)
        network = step.module if compiled is None else compiled.call
        noise = noise_like(x).to(dtype)

        def gradients() -> Outputs:
            torch.compiler.cudagraph_mark_step_begin()
            sigmas = step.module.sigmas
            return step.gradients(lambda: plain_torch.loss(network, x, labels, sigmas, noise))

        if compiled is not None:
            compiled.warm_up(gradients)
        outputs = gradients()
        call = PlainLoop(step, network, data, n).run
        backend = check_eager(call) if compiled is None else "inductor"
        if compiled is not None:
            call()
        return Prepared(
            Timed(call), lambda: outputs, backend, layout, compiled.graphs if compiled else None
        )

    def ours() -> Prepared:
        step, x, labels = place(1)
        outputs = step.gradients(lambda: step.module.get_loss(x, labels=labels, seed=SEED)[0])
        how = TrainingSettings(
            iterations=10**6,
            batch_size=n,
            lr=LEARNING_RATE,
            ema_decay=EMA_DECAY,
            grad_clip=GRAD_CLIP,
        )
        trainer = Trainer(step.module, ImageDataset(data), how, "nowhere", device)
        return Prepared(
            Timed(trainer.train_step), lambda: outputs, seen_backends(trainer.train_step), layout
        )

    yield Peer("eager", layout, partial(plain, None))
    yield Peer(OURS, layout, ours)
    for mode in modes_for(settings, network=True):
        name = "compile" if mode == "default" else f"compile {mode}"
        yield Peer(name, layout, partial(plain, mode))


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
    for n in batches if torch.float32 in settings.network_dtypes else ():
        yield Case(
            suite="train",
            group="training",
            name="loop",
            shape=(n, 3, size, size),
            dtype=torch.float32,
            setting=f"nf={nf} levels={CLASSES}",
            peers=tuple(loop_peers(n, nf, size, torch.float32, settings)),
            expected=partial(expected, n, nf, size, torch.float32, settings.device),
            tolerance=tolerance_of(torch.float32, backward=True, network=True),
            flops=3 * forward_flops(n, nf, size),
        )
