"""Sampling into a folder by several processes: the same files as by one, and what happens when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ncsn_fast import NCSN, cli
from ncsn_fast.sampling import to_folder as sharded

ROOT = Path(__file__).parents[2]
WORKER = """
import os, pathlib, sys
pathlib.Path(f"rank{os.environ['RANK']}.pid").write_text(str(os.getpid()))
from ncsn_fast.cli import main
main()
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    NCSN(in_channels=1, nf=4, num_classes=3, sigmas=[1.0, 0.3, 0.1]).save_pretrained(folder)
    return folder


def command(network, out, n, steps):
    options = ["--image-size", 6, "--batch", 2, "--seed", 3, "--step-lr", 1e-3, "--device", "cpu"]
    return [str(a) for a in ("sample", network, "--out", out, "-n", n, "--steps", steps, *options)]


def start(arguments, processes, cwd):
    """The command under torchrun, with the identity of each process in a file of the folder."""
    (cwd / "worker.py").write_text(WORKER)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run += [f"--nproc-per-node={processes}", "worker.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(run, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def alone(arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0


def pictures(folder):
    return {f.name: f.read_bytes() for f in folder.glob("*.png")}


@pytest.mark.slow
def test_a_rank_dies_and_four_others_go_on(network, tmp_path):
    n, steps = 16, 12
    first = start(command(network, tmp_path / "out", n, steps), 2, tmp_path)
    deadline = time.monotonic() + 90
    while len(pictures(tmp_path / "out")) < 2:
        assert first.poll() is None, first.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int((tmp_path / "rank1.pid").read_text()), signal.SIGKILL)
    killed = time.monotonic()
    stderr = first.communicate(timeout=60)[1]
    assert first.returncode != 0
    assert time.monotonic() - killed < 40  # not until something times out
    assert "ncsn-fast: " in stderr and "another rank has died" in stderr
    done = pictures(tmp_path / "out")
    assert 2 <= len(done) < n
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done}

    second = start(command(network, tmp_path / "out", n, steps), 4, tmp_path)
    stderr = second.communicate(timeout=120)[1]
    assert second.returncode == 0, stderr
    assert f"{n}/{n}" in stderr  # progress over all ranks
    again = [name for name in done if (tmp_path / "out" / name).stat().st_mtime_ns != times[name]]
    assert len(again) <= 2  # of two batches that were begun, one picture each

    alone(command(network, tmp_path / "alone", n, steps))
    assert pictures(tmp_path / "out") == pictures(tmp_path / "alone")
    assert len(pictures(tmp_path / "alone")) == n
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_refuse_together(network, tmp_path, monkeypatch, rank):
    """What process 0 finds wrong with the folder reaches the others, and nobody draws."""
    out, told = tmp_path / "out", "the folder is another one's"
    alone(command(network, out, 2, 1))

    def broadcast(failure):
        if rank == 0:
            assert "holds samples with other settings: batch is 2 there and 3 here" in failure[0]
        else:
            failure[0] = told

    monkeypatch.setattr(sharded.dist, "broadcast_object_list", broadcast)
    with pytest.raises(ValueError, match=told if rank else "batch is 2 there and 3 here"):
        sharded.sample_to_folder(pytest.fail, out, 4, 3, {}, rank=rank, world=2)


def test_fingerprint():
    torch.manual_seed(0)
    model = NCSN(in_channels=1, nf=4, num_classes=3, sigmas=[1.0, 0.3, 0.1])
    first = sharded.fingerprint(model)
    assert sharded.fingerprint(model.to(memory_format=torch.channels_last)) == first
    with torch.no_grad():
        model.end_conv.bias[0] += 1e-3
    assert sharded.fingerprint(model) != first


def test_torchrun_draws_into_a_folder_only(network, monkeypatch, capsys):
    import contextlib

    @contextlib.contextmanager
    def two():
        yield 1, 2

    monkeypatch.setattr(sharded, "processes", two)
    with pytest.raises(SystemExit):
        cli.main(["sample", str(network), "--out", "x.png", "--device", "cpu"])
    assert "several processes draw into a folder, but --out is x.png" in capsys.readouterr().err


# --- a folder that is gone on with ----------------------------------------------------------------


def drawn(begin, size):
    """Sample i is the grey level i / 10."""
    values = torch.arange(begin, begin + size, dtype=torch.float32) / 10
    return values.reshape(-1, 1, 1, 1).expand(size, 1, 5, 5)


def fill(folder, n, file_format="png", **options):
    """A folder of n samples in batches of 4; what was drawn, and what was said."""
    calls, told = [], []

    def draw(begin, size):
        calls.append(begin)
        return drawn(begin, size)

    options = {"file_format": file_format, "verbose": False, "say": told.append} | options
    sharded.sample_to_folder(draw, folder, n, 4, {}, **options)
    return calls, told


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("damage", ["emptied", "cut", "last byte", "other kind", "flipped"])
@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_a_damaged_file_is_drawn_again(tmp_path, file_format, damage):
    assert fill(tmp_path, 9, file_format) == ([0, 4, 8], [])
    whole = contents(tmp_path)
    name = sorted(n for n in whole if n.endswith(file_format))[1]
    data = whole[name]
    middle = len(data) // 2
    bad = {
        "emptied": b"",
        "cut": data[:middle],
        "last byte": data[:-1],
        "other kind": b"GIF89a" + data,
        "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
    }[damage]
    (tmp_path / name).write_bytes(bad)
    calls, told = fill(tmp_path, 9, file_format)
    assert calls == [0 if file_format == "png" else 4]
    assert told == [f"1 damaged files are drawn again: {name}"]
    assert contents(tmp_path) == whole
    assert fill(tmp_path, 9, file_format) == ([], [])


def test_each_process_looks_at_its_own_files(tmp_path, monkeypatch):
    fill(tmp_path, 12)
    for name in ("0001.png", "0005.png"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(sharded, "_agree", lambda prepare, rank, world: prepare())
    monkeypatch.setattr(sharded, "_wait_for_all", lambda show: None)
    assert fill(tmp_path, 12, rank=1, world=2) == (
        [4],
        ["1 damaged files are drawn again: 0005.png"],
    )
    assert fill(tmp_path, 12, rank=0, world=2)[0] == [0]


@pytest.mark.parametrize(("few", "many"), [(6, 9), (8, 9), (3, 4), (9998, 10001)])
@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_a_folder_is_extended(tmp_path, monkeypatch, file_format, few, many):
    """It holds then what a folder has that was drawn in one go."""
    if few > 100:  # names grow by a digit; not so many files for it
        real = sharded._names
        monkeypatch.setattr(sharded, "_names", lambda b, e, n, f: real(b, e, n * 1000, f))
        few, many = 8, 11
    fill(tmp_path / "a", few, file_format)
    calls, told = fill(tmp_path / "a", many, file_format)
    assert calls == [b for b in range(0, many, 4) if min(b + 4, many) > few] and not told
    fill(tmp_path / "b", many, file_format)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(ValueError, match=f"is one of {many} samples, and {few} were asked for"):
        fill(tmp_path / "a", few, file_format)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"n": "many"}', "\ufeff{"])
def test_a_damaged_manifest_is_named(tmp_path, text):
    fill(tmp_path, 3)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        fill(tmp_path, 3)
