"""The step of a multistep solver. The peers take their noise from ``torch.randn``, as a loop written by hand does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.ops import dispatch
from ncsn_fast.ops.tolerances import NORMAL

from .. import plain_torch
from ..measure import Timed
from ..peers import LAYOUTS, Compiled, check_backend, check_eager, check_layout, modes_for, placed
from ..suite import Case, Outputs, Peer, Prepared, Settings
from .langevin_step import noise

SEED = 1
ROW = (0.7, 0.4, 0.3, 1.3, -0.2)  # a, b, c, d, e of ``ops.solver_step_``


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The state, the score, the memory of the last step."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))


def expected(shape: tuple[int, ...], z: Tensor) -> Outputs:
    x, score, previous = (t.double() for t in inputs(shape))
    return plain_torch.solver_step(x, score, previous, ROW, z)


def by_hand(x: Tensor, score: Tensor, previous: Tensor) -> Outputs:
    return plain_torch.solver_step(x, score, previous, ROW, torch.randn_like(x))


def peers(shape: tuple[int, ...], settings: Settings) -> Iterator[Peer]:
    device = settings.device

    def place(layout: str) -> tuple[Tensor, ...]:
        tensors = placed(inputs(shape), device, torch.float32, layout)
        check_layout(tensors, layout)
        return tensors

    def eager(layout: str) -> Prepared:
        tensors, z = place(layout), noise(shape).to(device)
        return Prepared(
            timed=Timed(lambda: by_hand(*tensors)),
            outputs=lambda: plain_torch.solver_step(*place(layout), ROW, z),
            backend=check_eager(lambda: by_hand(*tensors)),
            out_layout=dispatch.layout_of(by_hand(*tensors)[0]),
        )

    def compiled(layout: str, mode: str) -> Prepared:
        tensors, z = place(layout), noise(shape).to(device)
        check = Compiled(lambda x, s, p, z: plain_torch.solver_step(x, s, p, ROW, z), mode)
        made = Compiled(by_hand, mode)
        made.warm_up(lambda: made.call(*tensors))
        return Prepared(
            timed=Timed(lambda: made.call(*tensors)),
            outputs=lambda: tuple(t.clone() for t in check.call(*place(layout), z)),
            backend="inductor",
            out_layout=dispatch.layout_of(made.call(*tensors)[0]),
            graphs=made.graphs,
        )

    def ours(layout: str, backend: str) -> Prepared:
        tensors, table = place(layout), torch.tensor([ROW], device=device)

        def step(x: Tensor, score: Tensor, previous: Tensor) -> Outputs:
            given = {"previous": previous, "seed": SEED, "backend": backend}
            return ops.solver_step_(x, score, table, 0, **given), previous

        call: Callable[[], Outputs] = partial(step, *tensors)
        return Prepared(
            timed=Timed(call),
            outputs=lambda: step(*place(layout)),
            backend=check_backend(call, backend, ("solver_step_",)),
            out_layout=dispatch.layout_of(call()[0]),
        )

    for layout in LAYOUTS:
        yield Peer("eager", layout, partial(eager, layout))
        for mode in modes_for(settings, has_matmul=False):
            name = "compile" if mode == "default" else f"compile {mode}"
            yield Peer(name, layout, partial(compiled, layout, mode))
        for backend in dispatch.AUTO[device.type]:
            if dispatch.why_not(backend, "solver_step_", device.type) is None:
                yield Peer(backend, layout, partial(ours, layout, backend))


def cases(settings: Settings) -> Iterator[Case]:
    for n in settings.batch_sizes(full=(1, 256), quick=(1, 64)):
        shape = (n, 3, 32, 32)
        yield Case(
            suite="ops",
            group="solver_step_",
            name="step",
            shape=shape,
            dtype=torch.float32,  # of the state; networks in half precision keep it
            peers=tuple(peers(shape, settings)),
            expected=lambda shape=shape: expected(shape, noise(shape, torch.float64)),
            tolerance=NORMAL,
            bytes=5
            * 4
            * n
            * 3
            * 32
            * 32,  # state and memory are read and written, the score is read
        )
