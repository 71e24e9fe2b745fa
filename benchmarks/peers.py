"""Makes the peers of a case, and proves that each runs in the mode that its name says.

A peer named "eager" must not touch an operator of ours; one named "compile" must be one graph, in the configuration of
its mode, and must not be compiled again while it is timed; one named after a backend must have that backend's operators
run by the dispatcher; inputs must lie in memory as the row says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ncsn_fast.ops import dispatch, use_backend
from ncsn_fast.ops.record import record_backends

from .measure import Timed
from .suite import Outputs, Peer, Prepared, Settings, WrongMode, graphs_and_breaks

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CPU = torch.device("cpu")
OURS = "ncsn_fast"  # the peer that takes whatever backends `auto` takes

# What each mode must find in the compiler's configuration.
MODES = {
    "default": {"max_autotune": False, "triton.cudagraphs": False},
    "max-autotune": {"max_autotune": True, "triton.cudagraphs": True},
    "reduce-overhead": {"max_autotune": False, "triton.cudagraphs": True},
}


def modes_for(
    settings: Settings, *, has_matmul: bool = True, network: bool = False
) -> tuple[str, ...]:
    """The modes of torch.compile that can differ from one another, and that there is time for.

    On a CPU there are no CUDA graphs, and autotuning chooses among matrix products only. Autotuning a whole network
    takes minutes: a quick run does without.
    """
    on_gpu = settings.device.type == "cuda"
    autotuned = (on_gpu or has_matmul) and not (network and settings.quick)
    applies = {"default": True, "max-autotune": autotuned, "reduce-overhead": on_gpu}
    return tuple(mode for mode in MODES if applies[mode])


# --- proofs ---------------------------------------------------------------------------------------


def check_layout(tensors: Iterable[Tensor], layout: str) -> None:
    """WrongMode unless every image among the tensors lies in memory as ``layout`` says."""
    for tensor in tensors:
        if tensor.dim() == 4 and not tensor.is_contiguous(memory_format=LAYOUTS[layout]):
            raise WrongMode(f"an input is not {layout}: its strides are {tensor.stride()}")


def check_eager(action: Callable[[], object]) -> str:
    """Runs the action; WrongMode if an operator of ours took part."""
    with record_backends() as ran:
        action()
    if ran:
        raise WrongMode(f"eager PyTorch ran operators of ncsn_fast: {sorted(set(ran))}")
    return "pytorch"


def check_backend(action: Callable[[], object], backend: str, operators: Sequence[str]) -> str:
    """Runs the action; WrongMode unless the backend ran each of the operators, and no other backend did."""
    with record_backends() as ran:
        action()
    seen = {pair for pair in ran if pair[0] in operators}
    # The reference is called as it is, not through the dispatcher.
    wanted = set() if backend == "reference" else {(op, backend) for op in operators}
    if seen != wanted:
        raise WrongMode(f"expected {sorted(wanted)} to run, the dispatcher ran {sorted(seen)}")
    return backend


def seen_backends(action: Callable[[], object]) -> str:
    """Runs the action; says which backends ran how many operators."""
    with record_backends() as ran:
        action()
    counts = Counter(f"{op} {backend}" for op, backend in ran)
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "reference"


class Compiled:
    """A function under torch.compile, with the proof that it is: one graph, no break, the mode's configuration.

    Attributes:
        call: the compiled function.
        graphs: how many were made by :meth:`warm_up`.
    """

    def __init__(self, function: Callable[..., object], mode: str) -> None:
        def target(*args: object) -> object:
            return function(*args)

        # torch.compile keeps its graphs, and how many it allows, by code object: each peer has its own.
        target.__code__ = target.__code__.replace(co_name=f"peer_{id(target)}")
        # Not fullgraph=True, which hides the configuration; warm_up counts graphs and breaks.
        self.call = torch.compile(target, mode=None if mode == "default" else mode, dynamic=False)
        self.mode, self.graphs = mode, 0

    def warm_up(self, action: Callable[[], object]) -> None:
        """Runs an action that calls it, until nothing more is compiled or captured.

        Raises:
            WrongMode: there was not one graph, or a break, or another configuration than the mode's.
        """
        config = {key: self.call.get_compiler_config()[key] for key in MODES[self.mode]}
        if config != MODES[self.mode]:
            raise WrongMode(f"mode {self.mode} compiles with {config}")
        skips = counters["inductor"]["cudagraph_skips"]
        before = graphs_and_breaks()
        # CUDA graphs are captured in the second call and replayed from the third.
        for _ in range(3):
            action()
        graphs, breaks = (now - then for now, then in zip(graphs_and_breaks(), before, strict=True))
        if (graphs, breaks) != (1, 0):
            raise WrongMode(f"expected 1 graph and no break, got {graphs} and {breaks}")
        self.graphs = graphs
        if config["triton.cudagraphs"] and counters["inductor"]["cudagraph_skips"] != skips:
            if torch.cuda.is_available():
                raise WrongMode(f"mode {self.mode} captured no CUDA graph: torch skipped it")


# --- peers of a function or a module --------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """A function of tensors: what is measured, in plain PyTorch and here.

    Attributes:
        inputs: makes them, on the CPU, contiguous, float32 where floating: the same whenever called.
        eager: as one writes it in PyTorch.
        ours: takes ``backend=`` too.
        operators: of ours, which a backend must run.
        backward_operators: the same for the gradients; None for each operator's own ``_backward``.
        differentiable: positions of the inputs whose gradients the backward pass computes.
        has_matmul: whether autotuning has anything to choose on a CPU.
    """

    inputs: Callable[[], tuple[Tensor, ...]]
    eager: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    operators: tuple[str, ...]
    differentiable: tuple[int, ...] = (0,)
    has_matmul: bool = False
    backward_operators: tuple[str, ...] | None = None

    def expected(
        self, dtype: torch.dtype, *, backward: bool, device: torch.device = CPU
    ) -> Callable[[], Outputs]:
        """The float64 outputs of the reference, for inputs rounded to the dtype.

        Args:
            dtype: of the peers' inputs.
            backward: the gradients instead.
            device: where they are computed: a GPU needs seconds for what takes a CPU minutes.
        """

        def outputs() -> Outputs:
            inputs = placed(placed(self.inputs(), CPU, dtype), device, torch.float64)
            call = partial(self.ours, backend="reference")
            return Work(call, inputs, self.differentiable, backward).outputs()

        return outputs

    def peers(self, settings: Settings, dtype: torch.dtype, *, backward: bool) -> tuple[Peer, ...]:
        """Eager PyTorch, torch.compile in each mode, and each backend that can serve; each in both layouts."""
        device = settings.device

        def work(call: Callable[..., Tensor], layout: str) -> Work:
            inputs = placed(self.inputs(), device, dtype, layout)
            check_layout(inputs, layout)
            return Work(call, inputs, self.differentiable, backward)

        peers = []
        for layout in LAYOUTS:
            peers.append(eager_peer(layout, partial(work, self.eager, layout)))
            for mode in modes_for(settings, has_matmul=self.has_matmul):
                peers.append(compiled_peer(mode, layout, partial(work, self.eager, layout)))
            for name in self._backends(device):
                call = partial(self.ours, backend=None if name == OURS else name)
                prove = partial(check_backend, backend=name, operators=self._that_run(backward))
                if name == OURS:
                    prove = seen_backends
                peers.append(our_peer(name, layout, partial(work, call, layout), prove))
        return tuple(peers)

    def _that_run(self, backward: bool) -> Sequence[str]:
        if not backward:
            return self.operators
        return self.backward_operators or [f"{op}_backward" for op in self.operators]

    def _backends(self, device: torch.device) -> list[str]:
        """Those that can serve; the reference, which nobody meets where there are kernels, only if none else can."""
        names = [
            name
            for name in dispatch.AUTO[device.type]
            if all(dispatch.why_not(name, op, device.type) is None for op in self.operators)
        ]
        if names != ["reference"]:
            return names[:-1]
        # What no kernel does at once is made of parts, each with the backend that it has.
        return [OURS] if set(self.operators) & set(dispatch.COMPOSED) else names


@dataclass(frozen=True)
class Module:
    """A module of ours and the same in plain PyTorch, with the same state dict.

    Attributes:
        inputs: as of :class:`Function`: images, labels.
        make: makes both, on the CPU, in float32: the plain one and ours.
    """

    inputs: Callable[[], tuple[Tensor, ...]]
    make: Callable[[], tuple[nn.Module, nn.Module]]

    def expected(
        self, dtype: torch.dtype, *, backward: bool, device: torch.device = CPU
    ) -> Callable[[], Outputs]:
        """The float64 outputs of our module on the reference, for inputs and weights rounded to the dtype."""

        def outputs() -> Outputs:
            inputs = placed(placed(self.inputs(), CPU, dtype), device, torch.float64)
            module = self.make()[1].to(dtype).to(device, torch.float64)
            with use_backend("reference"):
                return module_work(module, inputs, backward).outputs()

        return outputs

    def peers(
        self,
        settings: Settings,
        dtype: torch.dtype,
        *,
        backward: bool,
        compiled_layouts: Sequence[str] = tuple(LAYOUTS),
    ) -> tuple[Peer, ...]:
        """Eager PyTorch, torch.compile in each mode, ours, and ours under torch.compile.

        Args:
            settings: of the run.
            dtype: of inputs and weights.
            backward: time the backward pass.
            compiled_layouts: those in which the compiled peers run.
        """
        device = settings.device

        def work(which: int, layout: str) -> Work:
            module = self.make()[which].to(device, dtype, memory_format=LAYOUTS[layout])
            inputs = placed(self.inputs(), device, dtype, layout)
            check_layout([*inputs, *module.parameters()], layout)
            return module_work(module, inputs, backward)

        modes = modes_for(settings, network=True)
        peers = []
        for layout in LAYOUTS:
            plain, ours = partial(work, 0, layout), partial(work, 1, layout)
            peers.append(eager_peer(layout, plain))
            if layout in compiled_layouts:
                peers += [compiled_peer(mode, layout, plain) for mode in modes]
            peers.append(our_peer(OURS, layout, ours, seen_backends))
            if layout in compiled_layouts and not settings.quick:
                peers.append(compiled_peer("default", layout, ours, name=f"{OURS} + compile"))
        return tuple(peers)


def module_work(module: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Work:
    """The work of a module; its gradients are those of the images and, in the order of their names, of the weights."""
    parameters = [p for _, p in sorted(module.named_parameters()) if p.requires_grad]
    return Work(module, inputs, (0,), backward, parameters)


def eager_peer(layout: str, make: Callable[[], Work]) -> Peer:
    """A peer that runs without any operator of ours."""

    def prepare() -> Prepared:
        work = make()
        return work.prepared(check_eager(work.once))

    return Peer("eager", layout, prepare)


def compiled_peer(mode: str, layout: str, make: Callable[[], Work], name: str = "compile") -> Peer:
    """A peer under torch.compile, in one graph."""

    def prepare() -> Prepared:
        work = make()
        compiled = Compiled(work.call, mode)
        work.call = compiled.call
        compiled.warm_up(work.once)
        return work.prepared("inductor", graphs=compiled.graphs)

    return Peer(name if mode == "default" else f"{name} {mode}", layout, prepare)


def our_peer(
    name: str, layout: str, make: Callable[[], Work], prove: Callable[[Callable], str]
) -> Peer:
    """A peer of ours; ``prove`` runs it and says what ran."""

    def prepare() -> Prepared:
        work = make()
        return work.prepared(prove(work.once))

    return Peer(name, layout, prepare)


def placed(
    tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[Tensor, ...]:
    """The tensors on a device; floating ones in the dtype, images in the layout."""

    def place(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return moved.contiguous(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else moved

    return tuple(place(tensor) for tensor in tensors)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of all numbers, in float64."""
    return torch.cat([tensor.flatten().double() for tensor in tensors])


class Work:
    """A call of a function, or the backward pass of one."""

    def __init__(
        self,
        call: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        differentiable: tuple[int, ...],
        backward: bool,
        parameters: Sequence[Tensor] = (),
    ) -> None:
        self.call, self.backward, self.inputs = call, backward, list(inputs)
        self._y = self._grad_y = None
        if backward:
            for i in differentiable:
                self.inputs[i] = self.inputs[i].detach().requires_grad_()
            self._wanted = [*(self.inputs[i] for i in differentiable), *parameters]
            self._parameters = len(parameters)

    def forward(self) -> None:
        """What comes before a backward pass, untimed."""
        torch.compiler.cudagraph_mark_step_begin()
        self._y = self.call(*self.inputs)
        if self._grad_y is None:
            grad = torch.randn(self._y.shape, generator=torch.Generator().manual_seed(1))
            # In the layout of the output, as the layer that follows would give it.
            self._grad_y = torch.empty_like(self._y, requires_grad=False).copy_(grad)

    def run(self) -> Outputs:
        """What is timed."""
        if self.backward:
            return torch.autograd.grad(self._y, self._wanted, self._grad_y)
        with torch.no_grad():
            return (self.call(*self.inputs),)

    def once(self) -> Outputs:
        """All of it; nothing is kept."""
        if self.backward:
            self.forward()
        else:
            torch.compiler.cudagraph_mark_step_begin()
        outputs = self.run()
        self._y = None
        return outputs

    def outputs(self) -> Outputs:
        """All of it, kept: a CUDA graph writes its next outputs over these.

        The gradients of a module's weights are one vector: a bias before a norm has no gradient but rounding.
        """
        outputs = [output.clone() for output in self.once()]
        first = len(outputs) - (self._parameters if self.backward else 0)
        weights = outputs[first:]
        return (*outputs[:first], *([flat(weights)] if weights else []))

    def prepared(self, backend: str, **facts: Any) -> Prepared:
        """What :mod:`.suite` times."""
        return Prepared(
            timed=Timed(self.run, self.forward if self.backward else None),
            outputs=self.outputs,
            backend=backend,
            out_layout=dispatch.layout_of(self.once()[0]) or "other",
            **facts,
        )
