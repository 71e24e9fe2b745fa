"""Inference engines as peers of the network: each in a process of its own, stopped while it is not its turn.

Belongs here: which engines there are and what each takes, the network as ONNX, the process and its turns. Does not
belong here: how an engine is loaded and called (``engine_child.py``), how peers are checked and timed (``suite.py``).

Thread pools and OpenMP runtimes in one process take each other's processors, and an engine's threads may spin while
they wait. So every engine is a process, which is stopped (SIGSTOP) but in its turn, and which takes its own time:
neither pipe nor signal is in it. Nothing of an engine is imported here.

The graph is exported from the network in plain PyTorch with the batch fixed and the labels folded in as constants: the
engines need not look them up, which our peers do in every call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from ncsn_fast.threads import WAITING

from .measure import Timed, measured_processes
from .peers import Module
from .results import NotRun
from .suite import Outputs, Peer, Prepared, Settings

CHILD = Path(__file__).with_name("engine_child.py")
INPUT, OUTPUT = "x", "score"  # of the graph; the child has the same
OPSET = 20
LIMIT = 600.0  # seconds for an answer; reading a network takes some
REST = 0.01  # before a turn: threads of this process that still spin come to rest
EXPORT = {"onnx": "onnx", "onnxscript": "onnxscript"}  # modules and packages of torch.onnx.export


@dataclass(frozen=True)
class Engine:
    """An engine that ``engine_child.py`` knows.

    Attributes:
        name: there, and in the results.
        needs: the modules that must be there, and the packages that have them.
        one_image: it has no batches.
    """

    name: str
    needs: dict[str, str]
    one_image: bool = False

    def why_not(self, images: int) -> str | None:
        """Why it does not run on so many images; None if it does."""
        if not hasattr(signal, "SIGSTOP"):
            return "this system cannot stop a process"
        wanted = EXPORT | self.needs
        missing = [wanted[name] for name in wanted if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: pip install {' '.join(dict.fromkeys(missing))}"
        if self.one_image and images > 1:
            return "it takes one image at a time"
        return None


ENGINES = (
    Engine("onnxruntime", {"onnxruntime": "onnxruntime"}),
    Engine("openvino", {"openvino": "openvino"}),
    Engine("opencv", {"cv2": "opencv-python-headless"}),
    Engine("ncnn", {"ncnn": "ncnn", "pnnx": "pnnx"}, one_image=True),
    Engine("mnn", {"MNN": "MNN"}),
)


# --- the network ----------------------------------------------------------------------------------


class Folded(nn.Module):
    """A network as a function of the images alone."""

    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, self.labels)


class Exported:
    """A folder with ``network.onnx`` and ``input.npy``, which is removed with it."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ncsn_fast-engines-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        np.save(self.folder / "input.npy", images.numpy())
        with contextlib.redirect_stdout(io.StringIO()), _quiet():
            torch.onnx.export(
                Folded(network, labels).eval(),
                (images,),
                self.folder / "network.onnx",
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,  # one file, which every engine reads
                verbose=False,
            )


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter tells of passes and of what it will do without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@functools.lru_cache(maxsize=1)  # the engines of a case share it; it takes seconds
def exported(work: Module) -> Exported:
    """The plain network of a case, with its inputs."""
    return Exported(work.make()[0], *work.inputs())


# --- the process ----------------------------------------------------------------------------------


class EngineFailed(RuntimeError):
    """An engine said what is wrong, or its process ended."""


class Process:
    """A process that answers turns, and is stopped between them; it ends with this object.

    Attributes:
        ran: what it says that runs.
    """

    def __init__(self, command: Sequence[str | Path], limit: float = LIMIT) -> None:
        self._limit = limit
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(),
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
        measured_processes.add(self._process.pid)
        self.close = weakref.finalize(self, _end, self._process, self._errors)
        self.ran = str(self._answer("ran"))

    def turn(self, calls: int) -> float:
        """The mean seconds of so many calls.

        Raises:
            EngineFailed: the process has ended or ends, says what is wrong, or says nothing for long.
        """
        time.sleep(REST)
        with contextlib.suppress(ProcessLookupError, BrokenPipeError):  # the answer says why
            self._process.send_signal(signal.SIGCONT)
            self._process.stdin.write(json.dumps({"calls": calls}).encode() + b"\n")
            self._process.stdin.flush()
        return float(self._answer("seconds"))

    def _answer(self, name: str) -> object:
        """Its next answer, after which it is stopped."""
        ready, _, _ = select.select([self._process.stdout], [], [], self._limit)
        line = self._process.stdout.readline() if ready else b""
        try:
            said = json.loads(line) if line else {}
        except ValueError:
            said = {"error": f"it said {line[:80]!r}"}
        if name in said:
            self._stop()
            return said[name]
        if ready and not line:
            message = self._how_it_ended()
        else:
            message = said.get("error", f"no answer in {self._limit:g} seconds")
        self.close()
        raise EngineFailed(message)

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        if hasattr(os, "waitid"):  # not on every macOS; until no thread of it runs, or it has ended
            states = os.WSTOPPED | os.WEXITED | os.WNOWAIT
            os.waitid(os.P_PID, self._process.pid, states)

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        self._errors.seek(0)
        last = self._errors.read()[-150:].decode(errors="replace")
        return f"the process ended ({how}): {last}"


def _end(process: subprocess.Popen, errors: IO[bytes]) -> None:
    """Ends a process, stopped or not."""
    measured_processes.discard(process.pid)
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, errors):
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def environment() -> dict[str, str]:
    """That of this process, without the way to wait that the command chose for threads of our own kernels."""
    return {name: value for name, value in os.environ.items() if WAITING.get(name) != value}


# --- the peers ------------------------------------------------------------------------------------


def peers(work: Module, settings: Settings, dtype: torch.dtype) -> tuple[Peer, ...]:
    """The engines, in float32 on a CPU; none if they were not asked for."""
    wanted = settings.engines and settings.device.type == "cpu" and dtype == torch.float32
    return tuple(engine_peer(engine, work) for engine in ENGINES if wanted)


def engine_peer(engine: Engine, work: Module) -> Peer:
    """A peer that says it is not run where the engine cannot be."""

    def prepare() -> Prepared:
        why = engine.why_not(len(work.inputs()[0]))
        if why is not None:
            raise NotRun(why)
        network = exported(work)
        words = [engine.name, network.folder, str(torch.get_num_threads())]
        process = Process([sys.executable, CHILD, *words])
        return prepared(process, network.folder / f"{engine.name}.npy")

    return Peer(engine.name, "contiguous", prepare)


def prepared(process: Process, output: Path) -> Prepared:
    """A process that has written its first output, as :mod:`.suite` times it."""

    def outputs() -> Outputs:
        return (torch.from_numpy(np.load(output)),)

    timed = Timed(lambda: process.turn(1), turn=process.turn)
    return Prepared(timed, outputs, backend=process.ran, out_layout="contiguous")
