"""The noise stream in the backends of this machine's CPU: known answers, equal words, normals within their bound."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import philox_oracle as oracle
from support.tolerances import NORMAL

from ncsn_fast import ops
from ncsn_fast.ops import extension, reference, schema

BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"])
SHAPES = ((3, 3, 8, 8), (2, 5, 7, 9), (1, 1), (5, 1001), (2, 3, 1, 1), (2, 3, 2, 5, 3), (4,))
COUNTER = {"seed": 2**63 + 12345, "step": 999, "sample_offset": 2**20 + 3, "stream": 2}


@pytest.mark.parametrize(("counter", "key", "expected"), oracle.KNOWN_WORDS)
def test_reference_words_known_answers(counter, key, expected):
    words = reference.philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(w.item() for w in words) == expected


@BACKENDS
@pytest.mark.parametrize(
    ("seed", "first", "sample", "step", "stream", "four"), oracle.KNOWN_NORMALS
)
def test_normals_known_answers(backend, seed, first, sample, step, stream, four):
    counter = {"seed": seed, "sample_offset": sample, "step": step, "stream": stream}
    z = ops.philox_normal((1, first + 4), **counter, backend=backend)[0, first:]
    assert (z - torch.tensor(four)).abs().max() < NORMAL


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_against_the_oracle(backend, shape, record_backends):
    with record_backends() as ran:
        bits = ops.philox_bits(shape, **COUNTER, backend=backend)
        uniform = ops.philox_uniform(shape, **COUNTER, backend=backend)
        normal = ops.philox_normal(shape, **COUNTER, backend=backend)
    assert ran == ([("philox_", "native")] * 3 if backend == "native" else [])
    assert np.array_equal(bits.numpy().view(np.uint32), oracle.bits(shape, **COUNTER))
    assert np.array_equal(uniform.numpy(), oracle.uniform(shape, **COUNTER))
    assert np.abs(normal.numpy() - oracle.normal(shape, **COUNTER)).max() < NORMAL


@BACKENDS
def test_layout_batch_and_offset_do_not_change_an_element(backend):
    shape = (5, 3, 7, 6)
    for draw in (ops.philox_bits, ops.philox_normal):
        whole = draw(shape, seed=7, step=3, backend=backend)
        strided = draw(shape, seed=7, step=3, memory_format=torch.channels_last, backend=backend)
        assert strided.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(whole, strided)
        for i in range(5):
            one = draw((1, *shape[1:]), seed=7, step=3, sample_offset=i, backend=backend)
            assert torch.equal(one[0], whole[i])


def test_every_counter_word_matters():
    base = {"seed": 5, "step": 1, "sample_offset": 1, "stream": 1}
    first = ops.philox_bits((2, 8), **base)
    for change in ({"seed": 6}, {"seed": 5 + 2**32}, {"step": 2}, {"stream": 3}):
        assert not torch.equal(first, ops.philox_bits((2, 8), **base | change))


@BACKENDS
def test_dtypes(backend):
    z = ops.philox_normal((4, 100), seed=3, backend=backend)
    for dtype in (torch.bfloat16, torch.float16):
        half = ops.philox_normal((4, 100), seed=3, dtype=dtype, backend=backend)
        assert half.dtype == dtype and torch.equal(half, z.to(dtype))
    exact = ops.philox_normal((4, 100), seed=3, dtype=torch.float64, backend=backend)
    expected = oracle.normal((4, 100), seed=3, step=0, sample_offset=0, stream=3)
    np.testing.assert_allclose(exact.numpy(), expected, rtol=0, atol=1e-13)


def test_statistics_of_a_million():
    z = ops.philox_normal((1000, 1000), seed=11).double()
    u = ops.philox_uniform((1000, 1000), seed=11)
    assert abs(z.mean()) < 4e-3 and abs(z.var() - 1) < 6e-3 and abs(z.pow(4).mean() - 3) < 0.05
    assert z.abs().max() <= 5.77
    assert 0 < u.min() and u.max() < 1 and abs(u.double().mean() - 0.5) < 1.2e-3
    assert abs(torch.corrcoef(z[:, :8].T)[0, 1:]).max() < 0.15


_LEVEL = """
import sys, numpy as np
from support import philox_oracle as oracle
from ncsn_fast import ops
from ncsn_fast.ops import extension
counter = dict(seed=99, step=4, sample_offset=2, stream=1)
normal = ops.philox_normal((3, 1001), **counter, backend="native").numpy()
assert np.abs(normal - oracle.normal((3, 1001), **counter)).max() < 2e-6
x = ops.philox_normal((3, 1001), seed=1)
ops.langevin_step_(x, x.clone(), 0.3, seed=8, clip=2.0, backend="native")
sys.stdout.write(extension.build_config()["simd_level"] + " ")
sys.stdout.write(normal.tobytes().hex() + x.numpy().tobytes().hex())
"""


def test_simd_levels_agree_to_the_bit():
    """Every level that this CPU has, each in a process of its own: the level is chosen once."""
    results = {}
    build = extension.build_config()
    levels = build["simd_levels"][: build["simd_levels"].index(build["simd_level"]) + 1]
    for wanted in levels:
        environment = os.environ | {"NCSN_FAST_SIMD": wanted}
        environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(__file__))
        command = [sys.executable, "-c", _LEVEL]
        output = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert output.returncode == 0, output.stderr
        level, _, bits = output.stdout.partition(" ")
        results[level] = bits
    assert "baseline" in results
    assert extension.build_config()["simd_level"] in results
    assert len(set(results.values())) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed must be in 0 .. 2\*\*64 - 1, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5 of type float"),
        ({"step": 2**32}, ValueError, r"step must be in 0 .. 2\*\*32 - 1"),
        ({"sample_offset": 2**32 - 1}, ValueError, r"at most 2\*\*32, got 4294967295 \+ 2"),
        ({"stream": -1}, ValueError, "stream must be in"),
        ({"shape": ()}, ValueError, "at least one axis"),
        ({"dtype": torch.int64}, TypeError, "float32, bfloat16, float16, float64"),
        ({"backend": "triton"}, RuntimeError, "cannot serve philox_: triton has no CPU kernels"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.philox_normal(**{"shape": (2, 8), "seed": 0} | change)


def test_no_operator_takes_a_string():
    """The stable ABI leaks a string argument at every call."""
    for name, text in schema.SCHEMAS.items():
        assert "str " not in text, name
