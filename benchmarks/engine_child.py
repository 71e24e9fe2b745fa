"""The process of one inference engine: it loads a network, and answers each turn with the seconds of its calls.

Belongs here: how an engine is given the network, its threads and its precision, and the clock around its calls. Does
not belong here: torch or anything of ncsn_fast, whose threads would then be in this process too (it is run as a
script), and when it is whose turn (``engines.py``).

It is run with the engine's name, a folder that holds ``network.onnx`` and ``input.npy``, and a number of threads. Both
sides speak in lines of JSON::

    it, first      {"ran": "onnxruntime 1.32.0"}      the first output is in NAME.npy
    asked          {"calls": 3}
    it             {"seconds": 0.017}                 of a call, the mean
    it, else       {"error": "RuntimeError: ..."}     and it ends
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The folder of this file is no place to import from: its modules have names that packages have too.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent]

import numpy as np  # noqa: E402, after the line above

INPUT, OUTPUT = "x", "score"  # of the ONNX graph
Loaded = tuple[Callable[[], Any], str]  # a call, which returns the output, and what runs


def load_onnxruntime(network: Path, x: np.ndarray, threads: int) -> Loaded:
    """ONNX Runtime with its own kernels for a CPU, which compute in the dtype of the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(network), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run([OUTPUT], {INPUT: x})[0], f"onnxruntime {onnxruntime.__version__}"


def load_openvino(network: Path, x: np.ndarray, threads: int) -> Loaded:
    """OpenVINO, told to keep to float32: of itself it takes bfloat16 where the processor has it."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    compiled = openvino.Core().compile_model(str(network), "CPU", settings)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if precision != "f32":
        raise RuntimeError(f"OpenVINO computes in {precision}")
    request = compiled.create_infer_request()
    return lambda: request.infer({INPUT: x})[0], f"openvino {version('openvino')}"


def load_opencv(network: Path, x: np.ndarray, threads: int) -> Loaded:
    """OpenCV's dnn on its default target, which is float32."""
    import cv2

    cv2.setNumThreads(threads)
    net = cv2.dnn.readNetFromONNX(str(network))

    def call() -> np.ndarray:
        net.setInput(x)
        return net.forward()

    return call, f"opencv {cv2.__version__}"


def load_ncnn(network: Path, x: np.ndarray, threads: int) -> Loaded:
    """ncnn, in a graph that its converter pnnx makes; 16 and 8 bits, its default in places, are off."""
    import ncnn

    folder = Path(tempfile.mkdtemp(prefix="ncnn-", dir=network.parent))
    # Its Python package only starts this program, and imports torch.
    (package,) = importlib.util.find_spec("pnnx").submodule_search_locations
    shape = ",".join(map(str, x.shape))
    # It writes beside the network that it reads.
    (folder / "network.onnx").symlink_to(network.resolve())
    command = [f"{package}/pnnx", "network.onnx", "fp16=0", f"inputshape=[{shape}]"]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"pnnx: {answer.stderr[-200:]}")
    net = ncnn.Net()
    net.opt.num_threads = threads
    for name in dir(net.opt):
        if name.startswith(("use_fp16", "use_bf16", "use_int8")):
            setattr(net.opt, name, False)
    if net.load_param(str(folder / "network.ncnn.param")) or net.load_model(
        str(folder / "network.ncnn.bin")
    ):
        raise RuntimeError("ncnn does not read what pnnx made")

    def call() -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(x[0]))
        return np.array(extractor.extract("out0")[1])[None]

    return call, f"ncnn {version('ncnn')}"


def load_mnn(network: Path, x: np.ndarray, threads: int) -> Loaded:
    """MNN at its high precision, which is float32."""
    # The converter itself: the module around it installs a package that reports its use.
    import _tools

    made = network.with_name("network.mnn")
    words = ["mnnconvert", "-f", "ONNX", "--modelFile", str(network), "--MNNModel", str(made)]
    _tools.mnnconvert(words)
    from MNN import expr, nn

    how = {"precision": "high", "backend": "CPU", "numThread": threads}
    manager = nn.create_runtime_manager((how,))
    net = nn.load_module_from_file(str(made), [INPUT], [OUTPUT], runtime_manager=manager)

    def call() -> np.ndarray:
        given = expr.placeholder(x.shape, expr.NCHW)
        given.write(x)
        return expr.convert(net.forward([given])[0], expr.NCHW).read()

    return call, f"MNN {version('MNN')}"


LOADERS = {
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
    "opencv": load_opencv,
    "ncnn": load_ncnn,
    "mnn": load_mnn,
}


def die_with_parent() -> None:
    """A stopped process would wait for ever for a parent that was killed; Linux can end it."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main(name: str, folder: str, threads: str) -> int:
    """Answers until its input ends; returns the exit status."""
    die_with_parent()
    # What engines print would be between the answers: it goes to the errors.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        x = np.load(Path(folder, "input.npy"))
        call, ran = LOADERS[name](Path(folder, "network.onnx"), x, int(threads))
        np.save(Path(folder, f"{name}.npy"), np.asarray(call()))
        answer(ran=ran)
        for line in sys.stdin:
            calls = json.loads(line)["calls"]
            start = time.perf_counter()
            for _ in range(calls):
                call()
            answer(seconds=(time.perf_counter() - start) / calls)
    except Exception as error:  # whatever an engine raises, the other side shows it
        answer(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
