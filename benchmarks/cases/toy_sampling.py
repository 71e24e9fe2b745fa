"""Sampling points in the plane: the checkerboard's perceptron, 500 points, 10 levels, 100 steps at each.

The loop in plain PyTorch hands the network one sigma for each point, as training does. All that depends on sigma alone
is then computed for each point in each step; ours computes it once a level and puts it into the weights. The peer "one
sigma" hands over a single sigma, which is broadcast: the part of the gain that costs one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ncsn_fast.models.small import ScoreMLP
from ncsn_fast.schedules import make_sigmas

from .. import plain_torch
from ..measure import Timed
from ..peers import OURS, Compiled, check_eager, modes_for, seen_backends
from ..suite import Case, Outputs, Peer, Prepared, Settings, tolerance_of
from .sampling import CHECKED_STEPS, SEED, TOLERANCE_FACTOR, Noise

POINTS, LEVELS, STEPS = 500, 10, 100
SIGMA_BEGIN, SIGMA_END, STEP_LR = 5.0, 0.02, 8e-5  # those of the demo
LAYOUT = "contiguous"


class Loop:
    """Sampling of a size, in plain PyTorch and by ours."""

    def __init__(self, points: int = POINTS, levels: int = LEVELS, steps: int = STEPS) -> None:
        self.points, self.levels, self.steps = points, levels, steps
        self.checked_steps = min(steps, CHECKED_STEPS)

    def model(self) -> ScoreMLP:
        torch.manual_seed(0)
        model = ScoreMLP(sigmas=make_sigmas(SIGMA_BEGIN, SIGMA_END, self.levels))
        torch.nn.init.normal_(model.last.weight, std=0.01)  # it is zero in a new network
        return model.eval().requires_grad_(False)

    def network(self) -> plain_torch.Perceptron:
        model = self.model()
        frequencies = model.embedding.frequencies
        network = plain_torch.Perceptron(2, model.config.hidden, frequencies)
        network.load_state_dict(model.state_dict() | {"frequencies": frequencies}, strict=False)
        return network.requires_grad_(False)

    def flops(self) -> int:
        """Of the perceptron proper; what depends on sigma alone need not be computed in a step."""
        weights = sum(layer.weight.numel() for layer in (*self.model().layers, self.model().last))
        return 2 * weights * self.points * self.levels * self.steps

    def start(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return SIGMA_BEGIN * torch.randn(self.points, 2, generator=generator)

    def expected(self) -> Outputs:
        sigmas, steps = self.model().sigmas.double(), self.checked_steps
        network, start, noise = self.network().double(), self.start().double(), Noise(torch.float64)
        return (plain_torch.sample_points(network, start, sigmas, steps, STEP_LR, noise),)

    def peers(self, settings: Settings, *, compiled: bool = True) -> Iterator[Peer]:
        device = settings.device
        yield Peer("eager", LAYOUT, partial(self.plain, device, None, None))
        yield Peer("one sigma", LAYOUT, partial(self.plain, device, None, 1))
        for mode in modes_for(settings, network=True) if compiled else ():
            name = "compile" if mode == "default" else f"compile {mode}"
            yield Peer(name, LAYOUT, partial(self.plain, device, mode, None))
        yield Peer(OURS, LAYOUT, partial(self.ours, device))

    def plain(self, device: torch.device, mode: str | None, rows: int | None) -> Prepared:
        """The loop in plain PyTorch around the network, which runs eagerly or under torch.compile."""
        network, start = self.network().to(device), self.start().to(device)
        sigmas = self.model().sigmas.to(device)
        compiled = None if mode is None else Compiled(network, mode)

        def score(x: Tensor, sigma: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return network(x, sigma) if compiled is None else compiled.call(x, sigma)

        @torch.no_grad()
        def loop(
            steps: int = self.steps, noise_like: Callable[[Tensor], Tensor] = torch.randn_like
        ) -> Tensor:
            return plain_torch.sample_points(
                score, start, sigmas, steps, STEP_LR, noise_like, rows=rows
            )

        if compiled is None:
            backend = check_eager(loop)
        else:
            compiled.warm_up(loop)
            backend = "inductor"
        outputs = partial(loop, self.checked_steps)
        graphs = None if compiled is None else compiled.graphs
        return Prepared(Timed(loop), lambda: (outputs(Noise()),), backend, LAYOUT, graphs)

    def ours(self, device: torch.device) -> Prepared:
        """``ScoreMLP.sample``."""
        model, start = self.model().to(device), self.start().to(device)

        def loop(steps: int = self.steps) -> Tensor:
            options = {"init": start, "n_steps_each": steps, "step_lr": STEP_LR, "seed": SEED}
            return model.sample(self.points, **options)

        outputs = partial(loop, self.checked_steps)
        return Prepared(Timed(loop), lambda: (outputs(),), seen_backends(loop), LAYOUT)


def cases(settings: Settings) -> Iterator[Case]:
    """One case, float32, whose batch is the documented one."""
    if settings.quick or settings.batches or torch.float32 not in settings.dtypes:
        return
    loop = Loop()
    yield Case(
        suite="sample",
        group="points",
        name="annealed Langevin",
        shape=(loop.points, 2),
        dtype=torch.float32,
        setting=f"levels={loop.levels} steps={loop.steps}",
        peers=tuple(loop.peers(settings)),
        expected=loop.expected,
        tolerance=TOLERANCE_FACTOR * tolerance_of(torch.float32, network=True),
        flops=loop.flops(),
    )
