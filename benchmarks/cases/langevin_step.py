"""The Langevin step. The peers take their noise from ``torch.randn``, as a sampling loop written by hand does."""

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

STEP_SIZE, CLIP, SEED = 1e-3, 1.0, 1


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """That of our step, for the comparison of the outputs."""
    return ops.philox_normal(
        shape, seed=SEED, stream=ops.STREAM_LANGEVIN, dtype=dtype, backend="reference"
    )


def expected(shape: tuple[int, ...]) -> Outputs:
    x, score = (t.double() for t in inputs(shape))
    z = noise(shape, torch.float64)
    return (plain_torch.langevin_step(x, score, STEP_SIZE, z, CLIP),)


def by_hand(x: Tensor, score: Tensor) -> Tensor:
    return plain_torch.langevin_step(x, score, STEP_SIZE, torch.randn_like(x), CLIP)


def peers(shape: tuple[int, ...], settings: Settings) -> Iterator[Peer]:
    device = settings.device

    def place(layout: str) -> tuple[Tensor, ...]:
        x, score = placed(inputs(shape), device, torch.float32, layout)
        check_layout((x, score), layout)
        return x, score

    def eager(layout: str) -> Prepared:
        x, score = place(layout)
        z = noise(shape).to(device)
        step = plain_torch.langevin_step
        return Prepared(
            timed=Timed(lambda: by_hand(x, score)),
            outputs=lambda: (step(*place(layout), STEP_SIZE, z, CLIP),),
            backend=check_eager(lambda: by_hand(x, score)),
            out_layout=dispatch.layout_of(by_hand(x, score)),
        )

    def compiled(layout: str, mode: str) -> Prepared:
        x, score = place(layout)
        z = noise(shape).to(device)
        # What is timed makes its own noise; only the same update with given noise can be compared.
        check = Compiled(lambda x, s, z: plain_torch.langevin_step(x, s, STEP_SIZE, z, CLIP), mode)
        made = Compiled(by_hand, mode)
        made.warm_up(lambda: made.call(x, score))
        return Prepared(
            timed=Timed(lambda: made.call(x, score)),
            outputs=lambda: (check.call(*place(layout), z).clone(),),
            backend="inductor",
            out_layout=dispatch.layout_of(made.call(x, score)),
            graphs=made.graphs,
        )

    def ours(layout: str, backend: str) -> Prepared:
        x, score = place(layout)
        step = partial(ops.langevin_step_, seed=SEED, clip=CLIP, backend=backend)
        call: Callable[[], Tensor] = lambda: step(x, score, STEP_SIZE)  # noqa: E731
        return Prepared(
            timed=Timed(call),
            outputs=lambda: (step(*place(layout), STEP_SIZE),),
            backend=check_backend(call, backend, ("langevin_step_",)),
            out_layout=dispatch.layout_of(call()),
        )

    for layout in LAYOUTS:
        yield Peer("eager", layout, partial(eager, layout))
        for mode in modes_for(settings, has_matmul=False):
            name = "compile" if mode == "default" else f"compile {mode}"
            yield Peer(name, layout, partial(compiled, layout, mode))
        for backend in dispatch.AUTO[device.type]:
            if dispatch.why_not(backend, "langevin_step_", device.type) is None:
                yield Peer(backend, layout, partial(ours, layout, backend))


def cases(settings: Settings) -> Iterator[Case]:
    batches = settings.batch_sizes(full=(1, 16, 64, 256), quick=(1, 64))
    for size in (32,) if settings.quick else (32, 64):
        for n in batches:
            shape = (n, 3, size, size)
            yield Case(
                suite="ops",
                group="langevin_step_",
                name="step",
                shape=shape,
                dtype=torch.float32,  # of the state; networks in half precision keep it
                peers=tuple(peers(shape, settings)),
                expected=partial(expected, shape),
                tolerance=NORMAL,
                bytes=3 * 4 * n * 3 * size * size,  # x and the score are read, x is written
            )
