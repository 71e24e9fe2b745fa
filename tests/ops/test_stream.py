"""Results of more than 32 MiB are written past the caches: the same bits as in parts that are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ncsn_fast import ops
from ncsn_fast.ops import extension

NO_NATIVE = extension.status("cpu")

pytestmark = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))

STREAMED = 32 << 20  # bytes
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Rows of whole vectors; planes and channels that are no multiple of them; rows that begin anywhere.
SHAPES = [(8, 128, 96, 96), (8, 130, 95, 97), (2, 68, 255, 257)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_the_bits_of_its_parts(shape, layout, dtype):
    header = (Path(__file__).parents[2] / "csrc" / "cpu" / "stream.h").read_text()
    assert (
        "kStreamedBytes = int64_t{32} << 20" in header
    )  # else these are not written past the caches
    halves = 2 if dtype == torch.bfloat16 else 1
    n, channels = shape[0] * halves, shape[1]
    x = torch.randn(n, *shape[1:], generator=torch.Generator().manual_seed(0))
    x = x.to(dtype).contiguous(memory_format=layout)
    assert x.nbytes >= STREAMED > x[:1].nbytes
    labels, table = torch.arange(n) % 2, torch.randn(2, 2 * channels)
    operators = {
        "norm": lambda part, at: ops.cond_instance_norm_elu(
            part, labels[at : at + len(part)], table, backend="native"
        ),
        "pool": lambda part, at: ops.max_pool5(part, padding="zero", backend="native"),
    }
    for name, operator in operators.items():
        whole = operator(x, 0)
        for i in range(n):
            part = operator(x[i : i + 1].contiguous(memory_format=layout), i)
            assert torch.equal(whole[i : i + 1], part), (name, i)
