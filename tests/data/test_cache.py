"""The cache of decoded images: made once, anew when anything changes, whole or not there, and flat in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import cache as caching
from ncsn_fast.data import open_images
from ncsn_fast.data.images import from_uint8


def save(folder, levels):
    folder.mkdir(exist_ok=True)
    for i, level in enumerate(levels):
        Image.fromarray(np.full((4, 4), level, np.uint8)).save(folder / f"{i:05}.png")
    return folder


@pytest.fixture
def reads(monkeypatch):
    """How many images were decoded."""
    seen = []
    real = caching.read_pixels

    def read(file, *arguments, **options):
        seen.append(file)
        return real(file, *arguments, **options)

    monkeypatch.setattr(caching, "read_pixels", read)
    return seen


def levels_of(data):
    return [round((float(image.mean()) + 1) * 127.5) for image in data[:]]


def test_images_are_decoded_once_and_again_when_one_changes(tmp_path, reads):
    folder, cache = save(tmp_path / "a", [210, 220, 230]), tmp_path / "cache"

    def opened(**options):
        reads.clear()
        data = open_images(folder, 4, 1, cache=cache, **options)
        return levels_of(data), len(reads)

    assert opened() == ([210, 220, 230], 3)
    assert opened() == ([210, 220, 230], 0)
    assert opened(flips=True) == ([210, 220, 230], 0)  # of the same bytes
    held = open_images(folder, 4, 1, cache=cache)
    Image.fromarray(np.full((4, 4), 99, np.uint8)).save(folder / "00001.png")
    assert opened() == ([210, 99, 230], 3)
    assert levels_of(held) == [210, 220, 230]  # a run that goes on keeps what it has
    os.utime(folder / "00002.png", ns=(1, 1))
    assert opened() == ([210, 99, 230], 3)
    (folder / "00000.png").rename(folder / "00009.png")
    assert opened() == ([99, 230, 210], 3)
    (folder / "00009.png").unlink()
    assert opened() == ([99, 230], 2)
    assert opened(background="black") == ([99, 230], 2)
    assert opened(background="white") == ([99, 230], 0)  # each setting has its own
    assert len(list(cache.glob("*.u8"))) == 2  # and what is out of date is replaced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "VERSION", caching.VERSION + 1)
        assert opened() == ([99, 230], 2)


@pytest.mark.parametrize("damage", ["shorter", "no text", "no json", "another", "no bytes"])
def test_a_damaged_cache_is_made_anew(tmp_path, reads, damage):
    folder, cache = save(tmp_path / "a", [210, 220]), tmp_path / "cache"
    open_images(folder, 4, 1, cache=cache)
    (pixels,), (about,) = cache.glob("*.u8"), cache.glob("*.json")
    if damage == "shorter":
        os.truncate(pixels, 31)
    elif damage == "no bytes":
        pixels.unlink()
    elif damage == "no json":
        about.unlink()
    elif damage == "no text":
        about.write_text("{")
    else:
        about.write_text(json.dumps({"source": "x"}))
    reads.clear()
    assert levels_of(open_images(folder, 4, 1, cache=cache)) == [210, 220] and len(reads) == 2


def test_the_fingerprint_is_kept_beside_it(tmp_path):
    folder, cache = save(tmp_path / "a", [210, 220]), tmp_path / "cache"
    data = [open_images(folder, 4, 1, cache=cache) for _ in range(2)]
    kept = [vars(one)["fingerprint"] for one in data]
    del data[1].fingerprint
    assert {*kept, data[1].fingerprint} == {open_images(folder, 4, 1).fingerprint}


PROCESS = """
import sys, time
from ncsn_fast.data import cache, open_images
real = cache.read_pixels
def slow(*arguments, **options):
    print("decoded", flush=True)
    time.sleep(0.01)
    return real(*arguments, **options)
cache.read_pixels = slow
data = open_images(sys.argv[1], 4, 1, cache=sys.argv[2], report=print)
print("sum", data[:].double().sum().item())
"""


def start(*arguments):
    command = [sys.executable, "-c", PROCESS, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(caching.fcntl is None, reason="no locks here")
def test_of_several_processes_one_decodes(tmp_path):
    folder = save(tmp_path / "a", range(100))
    processes = [start(folder, tmp_path / "cache") for _ in range(3)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(text.count("decoded") for text in said) == [0, 0, 100]
    assert len({text[text.index("sum") :] for text in said}) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_process_that_is_killed_leaves_nothing_in_the_way(tmp_path, reads):
    folder, cache = save(tmp_path / "a", np.arange(1000) % 256), tmp_path / "cache"
    process = start(folder, cache)
    for _ in range(300):  # in the second of four chunks, so that something is written
        process.stdout.readline()
    process.kill()
    process.communicate()
    assert list(cache.glob(".*.tmp")) and not list(cache.glob("*.json"))
    data = open_images(folder, 4, 1, cache=cache)
    assert levels_of(data) == [i % 256 for i in range(1000)] and len(reads) == 1000
    assert not list(cache.glob(".*.tmp"))


def test_a_full_disk_is_told_and_leaves_no_part(tmp_path):
    """As a limit on the size of files, which writing meets as it would the end of the disk."""
    resource = pytest.importorskip("resource")
    folder, cache = save(tmp_path / "a", range(200)), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"\.u8") as error:
            open_images(folder, 4, 1, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno and [file.suffix for file in cache.iterdir()] == [".lock"]
    assert len(open_images(folder, 4, 1, cache=cache)) == 200


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_images(save(tmp_path / "a", [1]), 4, 1, cache=tmp_path / "file")


# --- memory ---------------------------------------------------------------------------------------


def idx(path, n, size):
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    head = bytes([0, 0, 8, 3]) + b"".join(k.to_bytes(4, "big") for k in (n, size, size))
    path.write_bytes(head + rng.integers(0, 256, (n, size, size), np.uint8).tobytes())
    return path


def test_decoding_takes_memory_for_a_few_chunks_only(tmp_path):
    """6,000 images, of which 256 are held at a time; as floats for the fingerprint, four times that."""
    source = idx(tmp_path / "images-idx3-ubyte", 6000, 32)
    tracemalloc.start()
    try:
        data = open_images(source, 32, 1, cache=tmp_path / "cache")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data) == 6000 and peak < 6000 * 32 * 32 / 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_memory_is_flat_over_an_epoch(tmp_path):
    """Of its own, that is: pages of the cache belong to the system, which takes them back when it needs them."""

    def own_memory():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    def epoch(data):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        for step, indices in enumerate(order.split(50)):
            data.batch(indices, seed=0, step=step)

    def opened(name, n):
        source = idx(tmp_path / name, n, size)
        return open_images(source, size, 1, cache=tmp_path / "cache", flips=True)

    size, n = 64, 8000
    idx(tmp_path / "images-idx3-ubyte", n, size)
    epoch(opened("few-idx3-ubyte", 400))  # what the first use of anything takes
    before = own_memory()
    data = opened("images-idx3-ubyte", n)
    epoch(data)
    grown = own_memory() - before
    assert grown < n * size * size / 3  # of bytes; as floats it would be 12 times that
    expected = from_uint8(np.fromfile(tmp_path / "images-idx3-ubyte", np.uint8)[16:])
    torch.testing.assert_close(data[:].flatten(), expected, rtol=0, atol=0)
