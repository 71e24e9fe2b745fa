"""Trainings that are killed, told to stop and left alone, in processes that fork from this one; run by test_kills.py.

Torch is imported once, and everything happens in folders below the first argument; what was seen is printed as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # an optimiser imports it at its first step: once here, not in each process
import torch.distributed as dist

from ncsn_fast import NCSN, NCSNConfig, ScoreMLP, files
from ncsn_fast.data import ImageDataset
from ncsn_fast.training import Observer, TrainingSettings, read_losses, train
from ncsn_fast.training.checkpoints import load_checkpoint

SEED = random.Random(int(os.environ.get("KILL_SEED", "0")))
CONFIG = NCSNConfig(in_channels=1, nf=4, num_classes=3, sigmas=(1.0, 0.3, 0.1))
VALUES = torch.randint(0, 256, (12, 1, 6, 6), generator=torch.Generator().manual_seed(0))
EPOCH = 3  # steps
SETTINGS = {
    "batch_size": 4,
    "checkpoint_every": 4,
    "warmup": 0,
    "keep_last": 2,
    "ema_decays": (0.5,),
}
KILLED, WAIT = -signal.SIGKILL, 60


def training(
    out: Path, steps: int, *observers: Observer, images: bool = False, **more: object
) -> None:
    """With a small network, of images if they are asked for, or goes on with it."""
    torch.manual_seed(0)
    values, options = VALUES.to(torch.uint8), SETTINGS | more
    if images:
        model, data = NCSN(CONFIG), ImageDataset(values, flips=True, dequantise=True)
    else:
        model = ScoreMLP(36, hidden=(8,), embedding=4, sigmas=CONFIG.sigmas)
        torch.nn.init.normal_(model.last.weight, std=0.1)
        data = ImageDataset(values.flatten(1), dequantise=True)
        options |= {"weighting": "learned", "levels": "continuous"}
    settings = TrainingSettings(iterations=steps, lr_schedule="constant", **options)
    resume = (out / "checkpoint.pt").exists()
    train(model, data, settings, out, resume=resume, verbose=False, observers=observers)


# --- moments --------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(name: str, number: int, *, after: bool) -> None:
    """Die at the so-manieth call of ``os.fsync`` or ``os.replace``, before or after it."""
    function, calls = getattr(os, name), [0]

    def counted(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == number and not after:
            die()
        result = function(*arguments)
        if calls[0] == number:
            die()
        return result

    setattr(os, name, counted)


def in_a_file() -> None:
    """Die when half of a checkpoint is written."""

    class Half:
        def __init__(self, path: Path) -> None:
            self.file = open(path, "wb")

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *_: object) -> None:
            raise AssertionError("it lives")

        def write(self, contents: memoryview) -> None:
            self.file.write(contents[: len(contents) // 2])
            self.file.flush()
            die()

    files.open = lambda path, mode: (
        Half(path) if ".checkpoint.pt" in path.name else open(path, mode)
    )


class AtEpoch(Observer):
    """Dies at the end of an epoch: a number of steps from where it goes on."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_start(self, trainer: object) -> None:
        self.last = (trainer.step // EPOCH + self.epochs) * EPOCH

    def on_step(self, trainer: object, loss: torch.Tensor, rate: float) -> None:
        if trainer.step == self.last:
            die()


class Ready(Observer):
    """Says that the loop runs."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step(self, trainer: object, loss: torch.Tensor, rate: float) -> None:
        os.write(self.pipe, b".")


# --- processes ------------------------------------------------------------------------------------


def forked(work: object, log: Path, **environment: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update({name: str(value) for name, value in environment.items()})
        with open(log, "a") as file:
            os.dup2(file.fileno(), 2)
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """The exit status, that of a signal negative; one that does not end is killed, and an error."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} did not end")


def together(works: list[object], log: Path) -> list[int]:
    """The processes of one training, one for each of the works."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": len(works), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        forked(work, log, RANK=rank, LOCAL_RANK=rank, **world) for rank, work in enumerate(works)
    ]


def at_random(start: object) -> list[int]:
    """Start processes, wait for the loop and a random time, kill the first of them; how all ended."""
    read, write = os.pipe()
    pids = start(Ready(write))
    os.close(write)
    os.read(read, 1)
    time.sleep(SEED.uniform(0, 0.06))
    os.kill(pids[0], signal.SIGKILL)
    os.close(read)
    return [ended(pid) for pid in pids]


# --- what is checked ------------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def alike(one: Path, two: Path) -> bool:
    """Whether two runs ended the same, to the bit, with the same files."""
    a, b = (vars(load_checkpoint(out / "checkpoint.pt")) for out in (one, two))
    texts = [(out / "losses.csv").read_bytes() for out in (one, two)]
    names = [sorted(p.name for p in out.iterdir()) for out in (one, two)]
    return same(a, b) and texts[0] == texts[1] and names[0] == names[1]


def one_process(folder: Path) -> dict[str, object]:
    steps, out, log = 200, folder / "killed", folder / "log"
    assert ended(forked(lambda: training(folder / "whole", steps), log)) == 0
    moments = [
        *(lambda n=n, after=after: at_call("fsync", n, after=after) for n, after in FSYNCS),
        *(lambda n=n, after=after: at_call("replace", n, after=after) for n, after in REPLACES),
        in_a_file,
    ]
    kills, reached = [], []

    def killed(moment: object, *observers: Observer) -> None:
        def work() -> None:
            moment()
            training(out, steps, *observers)

        kills.append(ended(forked(work, log)))

    for moment in moments:
        killed(moment)
        reached.append(
            load_checkpoint(out / "checkpoint.pt").step if (out / "checkpoint.pt").exists() else 0
        )
    for epochs in (1, 2):
        killed(lambda: None, AtEpoch(epochs))
    for _ in range(4):
        kills += at_random(lambda ready: [forked(lambda: training(out, steps, ready), log)])
    reached.append(load_checkpoint(out / "checkpoint.pt").step)
    assert ended(forked(lambda: training(out, steps), log)) == 0
    left = [p.name for p in out.iterdir() if p.name.endswith(".tmp")]
    return {"kills": kills, "reached": reached, "alike": alike(folder / "whole", out), "left": left}


# Of a start: the losses begin (2 fsyncs, 1 replace); of a checkpoint: losses, file, folder (1 replace), a link (1).
FSYNCS = [(1, False), (3, False), (4, False), (4, True), (5, True)]
REPLACES = [(2, False), (2, True), (3, False), (3, True)]


def two_processes(folder: Path) -> dict[str, object]:
    steps, out, log = 24, folder / "killed", folder / "log"

    def pair(
        out: Path, *observers: Observer, last: int = steps, moment: object = None
    ) -> list[int]:
        def first() -> None:
            if moment is not None:
                moment()
            training(out, last, *observers)

        return together([first, lambda: training(out, last)], log)

    whole = [ended(pid) for pid in pair(folder / "whole")]
    kills = [
        [ended(pid) for pid in pair(out, moment=lambda: at_call("replace", 2, after=False))],
        [ended(pid) for pid in pair(out, AtEpoch(2))],
        at_random(lambda ready: pair(out, ready)),
    ]
    texts = log.read_text()
    last = [ended(pid) for pid in pair(out)]
    # Stopped, and gone on with by one process alone; and by one process from the start.
    half = [ended(pid) for pid in pair(folder / "half", last=12)]
    alone = [
        ended(forked(lambda name=name: training(folder / name, steps), log))
        for name in ("half", "alone")
    ]

    # A network some of whose weights take no part, and a batch in parts.
    def image(name: str) -> None:
        training(folder / name, 4, images=True, accumulate=2)

    images = [
        ended(pid) for pid in together([lambda: image("images"), lambda: image("images")], log)
    ]
    images.append(ended(forked(lambda: image("image"), log)))
    names = ("whole", "half", "alone", "images", "image")
    losses = {name: read_losses(folder / name / "losses.csv")[1] for name in names}
    return {
        "whole": whole,
        "kills": kills,
        "last": last,
        "half": half,
        "alone": alone,
        "images": images,
        "alike": alike(folder / "whole", out),
        "losses": losses,
        "told": texts.count("has lost another one, which has ended"),
    }


def terminated(folder: Path) -> dict[str, object]:
    """SIGTERM to one process, and to one of two, which tells the other."""
    result: dict[str, object] = {}
    for name, start in (
        (
            "one",
            lambda ready: [forked(lambda: training(folder / "one", 10**6, ready), folder / "log")],
        ),
        (
            "two",
            lambda ready: together(
                [
                    lambda: training(folder / "two", 10**6, ready),
                    lambda: training(folder / "two", 10**6),
                ],
                folder / "log",
            ),
        ),
    ):
        read, write = os.pipe()
        pids = start(Ready(write))
        os.close(write)
        os.read(read, 1)
        os.kill(pids[-1], signal.SIGTERM)
        result[name] = [ended(pid) for pid in pids]
        step = load_checkpoint(folder / name / "checkpoint.pt").step
        result[f"{name}_whole"] = step == len(read_losses(folder / name / "losses.csv")[0]) > 0
        os.close(read)
    return result


def refused(folder: Path) -> dict[str, object]:
    """A port in use, and a batch that three processes cannot share out."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        busy = {
            "RANK": 0,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": server.getsockname()[1],
        }
        port = ended(forked(lambda: training(folder / "port", 4), folder / "port.log", **busy))

    def work() -> None:
        training(folder / "three", 4, batch_size=5)

    odd = [ended(pid) for pid in together([work, work], folder / "odd.log")]
    return {
        "port": [port, (folder / "port.log").read_text()[-2000:]],
        "odd": [odd, (folder / "odd.log").read_text()[-2000:]],
    }


PARTS = {"one": one_process, "two": two_processes, "terminated": terminated, "refused": refused}

if __name__ == "__main__":
    torch.set_num_threads(1)  # and no other threads, with which a fork would not get on
    assert dist.is_available()
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        begin = time.monotonic()
        try:
            found = PARTS[name](folder)
        except BaseException:
            print((folder / "log").read_text()[-6000:], file=sys.stderr)
            raise
        print(json.dumps({"part": name, "seconds": time.monotonic() - begin, **found}), flush=True)
        shutil.rmtree(folder)
