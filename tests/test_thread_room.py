"""How many threads the command takes and how they wait: defaults set before torch is loaded, and only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ncsn_fast import memory, threads
from ncsn_fast.ops import extension


def groups(tmp_path, line: str, files: dict[str, str]) -> float | None:
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "cgroup").write_text(line + "\n")
    return threads.cpu_quota(tmp_path / "cgroup", tmp_path / "root")


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 0.5),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "300000 100000"}, 3.0),
        # The path is the host's, and what can be seen is the container's top.
        ("0::/docker/4f", {"cpu.max": "200000 100000"}, 2.0),
        (
            "4:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/", {"cpu.max": "100000 100000"}, None),
        ("0::/", {"cpu.max": "nonsense"}, None),
    ],
)  # fmt: skip
def test_the_quota_of_control_groups(tmp_path, line, files, expected):
    assert groups(tmp_path, line, files) == expected


def test_no_control_groups(tmp_path):
    assert threads.cpu_quota(tmp_path / "none", tmp_path) is None


def test_a_program_keeps_its_threads_and_the_command_sets_its_own(monkeypatch):
    environment = {name: "kept" for name in threads.NAMES}
    for words, given, expected in (
        (["python", "train.py"], {}, {}),
        (["python", "-m", "ncsn_fast.info"], {}, {}),
        (["python", "/usr/bin/ncsn-fast", "demo"], {}, threads.WAITING),
        (["python", "-u", "-m", "ncsn_fast", "sample"], {}, threads.WAITING),
        (["python", "/usr/bin/ncsn-fast", "--debug", "bench", "--quick"], {}, {}),
        (["python", "-m", "ncsn_fast", "bench"], {}, {}),
        (["python", "/usr/bin/ncsn-fast", "sample", "bench"], {}, threads.WAITING),
        (["python", "/usr/bin/ncsn-fast"], {"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        (["python", "/usr/bin/ncsn-fast"], environment, environment),
    ):
        with monkeypatch.context() as patch:
            for name in threads.NAMES:
                patch.delenv(name, raising=False)
            for name, value in given.items():
                patch.setenv(name, value)
            patch.setattr(sys, "orig_argv", words)
            patch.setattr(threads, "cpu_quota", lambda: None)
            patch.delitem(sys.modules, "torch")
            threads.set_defaults()
            assert {k: os.environ[k] for k in threads.NAMES if k in os.environ} == expected


def test_no_more_threads_than_the_quota(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ncsn_fast"])
    monkeypatch.setattr(threads, "processors", lambda: 8)
    monkeypatch.delitem(sys.modules, "torch")
    for quota, expected in ((0.5, "1"), (2.5, "3"), (8.0, None), (None, None)):
        with monkeypatch.context() as patch:
            patch.delenv(threads.COUNT, raising=False)
            patch.setenv("GOMP_SPINCOUNT", "0")
            patch.setattr(threads, "cpu_quota", lambda quota=quota: quota)
            threads.set_defaults()
            assert os.environ.get(threads.COUNT) == expected


def test_nothing_once_torch_is_loaded(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ncsn_fast"])
    for name in threads.NAMES:
        monkeypatch.delenv(name, raising=False)
    threads.set_defaults()
    assert not set(threads.NAMES) & set(os.environ)


@pytest.mark.skipif(extension.status("cpu") is not None, reason="the C++ kernels are not built")
def test_the_command_says_so():
    environment = {k: v for k, v in os.environ.items() if k not in threads.NAMES}

    def facts(*words: str) -> dict:
        command = [sys.executable, "-m", *words]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(run.stdout)

    command, module = facts("ncsn_fast", "info", "--json"), facts("ncsn_fast.info", "--json")
    assert command["threads"]["kernels_by"] == "own"
    assert threads.WAITING.items() <= command["environment"].items()
    assert module["threads"]["kernels_by"] == "torch"
    assert not threads.WAITING.keys() & module["environment"].keys()
    assert command["freed_memory_kept"] == (0 if memory.why_not() else memory.KEPT)
    assert module["freed_memory_kept"] == 0
    assert command["threads"]["count"] >= 1 and command["threads"]["processors"] >= 1


# In one thread, in two at once, and a kernel in a child whose threads the fork has not copied.
WORK = """
import hashlib, os, sys, threading, torch
from ncsn_fast import NCSN, ops
torch.set_num_threads(3)
torch.manual_seed(0)
model = NCSN(in_channels=1, nf=16, num_classes=2)
model.set_sigmas(model.make_sigmas(1.0, 0.1, 2))
weights = [p for p in model.parameters() if p.requires_grad]
x, labels = torch.randn(3, 1, 16, 16), torch.tensor([0, 1, 1])
image, kernel = torch.randn(2, 16, 20, 20), torch.randn(16, 16, 3, 3)
expected = ops.conv3x3(image, kernel, None)

def work():
    loss, _ = model.get_loss(x, labels=labels, seed=1)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    found = [loss, *(g for g in gradients if g is not None)]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in found)).hexdigest()

seen = {work()}
threads = [threading.Thread(target=lambda: seen.add(work())) for _ in range(2)]
[t.start() for t in threads]
[t.join() for t in threads]
child = os.fork() if sys.argv[1] == "fork" else 1
if child == 0:
    os._exit(0 if torch.equal(ops.conv3x3(image, kernel, None), expected) else 1)
if sys.argv[1] == "fork":
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(*seen)
"""


@pytest.mark.skipif(extension.status("cpu") is not None, reason="the C++ kernels are not built")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_own_threads_give_the_bits_of_torch_and_survive_a_fork():
    """A child begins with threads of its own: it cannot wait for those that the fork has not copied."""
    plain = {k: v for k, v in os.environ.items() if k not in threads.NAMES}
    found = []
    for policy, fork in ({"OMP_WAIT_POLICY": "passive"}, "fork"), ({}, "no"):
        run = subprocess.run(
            [sys.executable, "-c", WORK, fork],
            env=plain | policy,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert run.returncode == 0, run.stderr
        found.append(run.stdout.split())
    assert len(found[0]) == 1 and found[0] == found[1]
