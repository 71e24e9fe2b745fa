"""The CUDA kernels of cond_instance_norm_elu without a GPU: every thread of every launch, run on the CPU.

The bodies that the GPU runs are compiled for the host and run as fibres (cuda_fibres.h), with the tilings of the
operator, for devices with and without clusters, with much and with little shared memory. Results on a real GPU are
in test_cuda_network.py.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.cuda_host import DTYPES, Canary, compile_for_host
from support.tolerances import assert_forward, assert_gradient

from ncsn_fast.ops import reference

BLOCK, CLUSTER, SPLIT = range(3)
K = 4
# Multiprocessors, bytes of shared memory for a block, clusters. The last one has little memory, so that small planes
# take the ways of large ones.
H200, A100, SMALL, SMALL_CLUSTERS = (
    (132, 232448, 1),
    (108, 166912, 0),
    (2, 26 * 1024, 0),
    (2, 26 * 1024, 1),
)


class Call(ctypes.Structure):
    """As in cuda_norm.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "channels", "spatial")),
        *((name, ctypes.c_int64) for name in ("contiguous", "dtype", "aligned")),
        *((name, ctypes.c_void_p) for name in ("x", "grad_y", "out", "labels")),
        ("label_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("weight_dtype", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("mean", "rstd", "grad_weight")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("elu", "multiprocessors", "shared_memory")),
        *((name, ctypes.c_int64) for name in ("clusters", "order", "max_blocks_y")),
        *((name, ctypes.c_void_p) for name in ("bias", "residual", "z")),
        ("bias_dtype", ctypes.c_int64),
        ("tiling", ctypes.c_int64 * 6),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    library = compile_for_host(
        Path(__file__).parent / "cuda_norm.cpp", tmp_path_factory.mktemp("cuda")
    )
    library.norm.restype = library.tile.restype = ctypes.c_char_p
    return library


def inputs(shape, dtype=torch.float32, last=False, columns=2, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    grad_y = torch.randn(shape, generator=generator)
    weight = torch.randn(K, columns * shape[1], generator=generator) + 1
    labels = torch.randint(K, shape[:1], generator=generator)
    form = torch.channels_last if last else torch.contiguous_format
    x, grad_y = (t.to(dtype).contiguous(memory_format=form) for t in (x, grad_y))
    return x, labels, weight.to(weight_dtype or dtype), grad_y


class Run:
    """The results of the emulated launches for some inputs, forward and backward, and how they were tiled."""

    def __init__(
        self,
        library,
        x,
        labels,
        weight,
        grad_y=None,
        *,
        device=H200,
        elu=True,
        aligned=True,
        order=0,
        max_blocks_y=65535,
        bias=None,
        residual=None,
    ) -> None:
        n, channels = x.shape[:2]
        wide = reference.statistics_dtype(x.dtype)
        self.y, self.grad_x, self.z = Canary(x), Canary(x), Canary(x)
        adds = bias is not None or residual is not None
        self.mean, self.rstd = (Canary(torch.empty(n, channels, dtype=wide)) for _ in range(2))
        self.grad_weight = Canary(weight)
        held_x = Canary(x, aligned).holding(x)
        held_grad = None if grad_y is None else Canary(x).holding(grad_y)

        def launch(gradient: bool) -> list[int]:
            call = Call(
                n,
                channels,
                x.shape[2:].numel(),
                x.is_contiguous(),
                DTYPES.index(x.dtype),
                aligned,
                held_x.data_ptr(),
                held_grad.data_ptr() if gradient else None,
                (self.grad_x if gradient else self.y).tensor.data_ptr(),
                labels.data_ptr(),
                labels.stride(0) if len(labels) > 1 else 0,
                weight.data_ptr(),
                DTYPES.index(weight.dtype),
                *weight.shape,
                self.mean.tensor.data_ptr(),
                self.rstd.tensor.data_ptr(),
                self.grad_weight.tensor.data_ptr(),
                1e-5,
                elu,
                *device,
                order,
                max_blocks_y,
                None if bias is None else bias.data_ptr(),
                None if residual is None else residual.data_ptr(),
                self.z.tensor.data_ptr() if adds else None,
                0 if bias is None else DTYPES.index(bias.dtype),
            )
            problem = library.norm(ctypes.byref(call)).decode()
            assert not problem, (problem, list(call.tiling))
            return list(call.tiling)

        self.forward_tiling = launch(False)
        self.backward_tiling = None if grad_y is None else launch(True)
        outputs = [self.y, self.z, self.mean, self.rstd]
        for canary in outputs + ([] if grad_y is None else [self.grad_x, self.grad_weight]):
            canary.check()


def assert_right(library, x, labels, weight, grad_y, *, elu=True, **options) -> Run:
    run = Run(library, x, labels, weight, grad_y, elu=elu, **options)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = reference.cond_instance_norm_elu(
        wide[0], labels.expand(x.shape[0]), wide[1], 1e-5, elu
    )
    assert_forward(run.y.tensor, expected, x.dtype)
    grads = torch.autograd.grad(expected, wide, grad_y.double())
    coarser = max((x.dtype, weight.dtype), key=lambda d: torch.finfo(d).eps)
    assert_gradient(run.grad_weight.tensor, grads[1], coarser)
    if x.shape[2:].numel() > 1:  # of one pixel the plane's own part is 0, but for rounding / eps
        assert_gradient(run.grad_x.tensor, grads[0], x.dtype)
    return run


# shape, channels_last, device, the ways forward and backward.
CASES = [
    ((2, 3, 5, 7), False, H200, BLOCK, BLOCK),
    ((2, 3, 5, 7), True, H200, BLOCK, BLOCK),
    ((3, 40, 1, 1), False, H200, BLOCK, BLOCK),
    ((1, 1, 33, 31), False, H200, BLOCK, BLOCK),
    ((5, 24, 4, 4), False, H200, BLOCK, BLOCK),
    ((5, 24, 4, 4), True, H200, BLOCK, BLOCK),
    ((2, 5, 16, 16), False, A100, BLOCK, BLOCK),
    ((2, 40, 16, 16), True, A100, BLOCK, BLOCK),
    ((1, 64, 32, 32), True, H200, CLUSTER, CLUSTER),
    ((1, 1, 64, 128), False, H200, CLUSTER, CLUSTER),
    ((1, 2, 48, 64), False, SMALL, SPLIT, SPLIT),
    ((1, 8, 24, 24), True, SMALL, SPLIT, SPLIT),
    ((1, 3, 48, 64), False, SMALL_CLUSTERS, CLUSTER, None),
    ((1, 24, 16, 15), True, SMALL_CLUSTERS, CLUSTER, None),
    ((1, 3, 47, 43), False, SMALL_CLUSTERS, SPLIT, SPLIT),
    ((1, 5, 21, 23), True, SMALL_CLUSTERS, SPLIT, SPLIT),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "last", "device", "forward", "backward"), CASES)
def test_against_float64(library, shape, last, device, forward, backward, dtype):
    x, labels, weight, grad_y = inputs(shape, dtype, last)
    run = assert_right(library, x, labels, weight, grad_y, device=device)
    assert run.forward_tiling[0] == forward
    assert backward is None or run.backward_tiling[0] == backward


# One of each way: whole planes in a block, in a cluster, split; both layouts; vectors and single elements.
WAYS = [
    ((3, 9, 8, 8), False, H200),
    ((3, 24, 5, 5), True, H200),
    ((2, 2, 48, 64), False, SMALL_CLUSTERS),
    ((2, 16, 20, 20), True, SMALL_CLUSTERS),
    ((2, 3, 48, 48), False, SMALL),
    ((2, 5, 17, 19), True, SMALL),
]
ways = pytest.mark.parametrize(("shape", "last", "device"), WAYS)


@ways
def test_plusplus(library, shape, last, device):
    """The channel means join all planes of a sample: always split."""
    x, labels, weight, grad_y = inputs(shape, last=last, columns=3)
    run = assert_right(library, x, labels, weight, grad_y, device=device)
    assert run.forward_tiling[0] == run.backward_tiling[0] == SPLIT


@ways
def test_neither_turns_nor_blocks_change_a_bit(library, shape, last, device):
    """Threads in any order; fewer blocks than samples, so that a block goes on to the next sample."""
    arguments = inputs(shape, torch.bfloat16, last)
    results = []
    for order, max_blocks_y in ((0, 65535), (1, 65535), (7, 65535), (8, 1)):
        run = Run(library, *arguments, device=device, order=order, max_blocks_y=max_blocks_y)
        results.append([run.y, run.mean, run.rstd, run.grad_x, run.grad_weight])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got.tensor, expected.tensor)


@ways
def test_misaligned_memory_goes_element_by_element(library, shape, last, device):
    arguments = inputs(shape, last=last)
    run = assert_right(library, *arguments, device=device, aligned=False)
    assert run.forward_tiling[1] == run.backward_tiling[1] == 1


@ways
def test_without_elu_and_with_one_label(library, shape, last, device):
    x, labels, weight, grad_y = inputs(shape, last=last)
    assert_right(library, x, labels[:1], weight, grad_y, device=device, elu=False)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weights_of_another_dtype(library, weight_dtype, columns):
    arguments = inputs((3, 8, 4, 4), torch.bfloat16, columns=columns, weight_dtype=weight_dtype)
    assert_right(library, *arguments)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_float64(library, last, columns):
    run = assert_right(library, *inputs((2, 5, 6, 7), torch.float64, last, columns))
    assert run.forward_tiling[1] == 1


@ways
def test_a_large_mean_keeps_its_digits(library, shape, last, device):
    x, labels, weight, _ = inputs(shape, last=last)
    x = x + 1e4
    run = Run(library, x, labels, weight, device=device, elu=False)
    expected = reference.cond_instance_norm_elu(x.double(), labels, weight.double(), 1e-5, False)
    assert_forward(run.y.tensor, expected, torch.float32)


@ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_plane(library, shape, last, device, bad):
    x, labels, weight, grad_y = inputs(shape, last=last)
    x[1, 1, 0, 0] = bad
    run = Run(library, x, labels, weight, grad_y, device=device)
    for result in (run.y.tensor, run.grad_x.tensor):
        nan = result.isnan().flatten(2)
        assert nan[1, 1].all() and nan.sum() == nan.shape[2]


@ways
@pytest.mark.parametrize("terms", ["both", "bias", "residual"])
def test_sums(library, shape, last, device, terms):
    """add_norm_elu: z is rounded once, and everything else is the norm of what was written, to the bit."""
    for dtype, columns in ((torch.float32, 2), (torch.bfloat16, 2), (torch.bfloat16, 3)):
        x, labels, weight, residual = inputs(shape, dtype, last, columns)
        bias = torch.linspace(-2, 2, shape[1]) if terms != "residual" else None
        residual = residual.clone() if terms != "bias" else None
        run = Run(library, x, labels, weight, device=device, bias=bias, residual=residual)
        expected = reference.added(x.double(), bias, residual).to(dtype)
        assert_forward(run.z.tensor, expected, dtype)
        again = Run(library, run.z.tensor.clone(), labels, weight, device=device)
        for got, same in ((run.y, again.y), (run.mean, again.mean), (run.rstd, again.rstd)):
            assert torch.equal(got.tensor, same.tensor)


def test_large_batches_and_tables(library):
    """More samples than strands, more rows than blocks, a plane in several of the middle kernels' rounds."""
    for columns in (2, 3):
        x, labels, weight, grad_y = inputs((40, 70, 2, 2), columns=columns)
        assert_right(library, x, labels, weight, grad_y, device=SMALL, max_blocks_y=3)


# --- tilings ----------------------------------------------------------------------------------------


def tiling(library, shape, *, dtype=torch.bfloat16, last=True, columns=2, device=H200, tensors=1):
    """Spread, vector, teams, ranks, items, chunks; asserts that every vector has a thread and the launch is legal."""
    n, channels, *spatial = shape
    call = Call(samples=n, channels=channels, spatial=torch.Size(spatial).numel())
    call.contiguous, call.dtype, call.aligned = not last, DTYPES.index(dtype), True
    call.rows, call.columns, call.max_blocks_y = K, columns * channels, 65535
    call.multiprocessors, call.shared_memory, call.clusters = device
    problem = library.tile(ctypes.byref(call), ctypes.c_int64(tensors)).decode()
    assert not problem, (problem, shape, dtype, last, device, list(call.tiling))
    return list(call.tiling)


def test_every_tiling_can_be_launched(library):
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        sizes = (2 ** (torch.rand(4, generator=generator) * torch.tensor([9, 11, 9, 9]))).int()
        kinds = torch.randint(0, 2**31 - 1, (5,), generator=generator).tolist()
        tiling(
            library,
            [
                size * (8 if kinds[0] % 2 and i in (1, 3) else 1)
                for i, size in enumerate(sizes.tolist())
            ],
            dtype=(torch.float32, torch.bfloat16, torch.float64)[kinds[1] % 3],
            last=bool(kinds[2] % 2),
            columns=2 + kinds[3] % 2,
            device=(H200, A100, (128, 101376, 0), SMALL_CLUSTERS)[kinds[4] % 4],
            tensors=1 + kinds[4] // 4 % 2,
        )
    for shape in ((2**33, 3, 1, 1), (1, 2**30, 1, 1), (1, 3, 2**17, 2**17), (2**20, 64, 16, 16)):
        for last in (False, True):
            tiling(library, shape, last=last)


def test_tilings_of_the_network(library):
    """By hand: where a batch fills the device, a block has 64 bytes of channels, and up to 64 KiB."""
    assert tiling(library, (256, 128, 32, 32)) == [BLOCK, 8, 4, 64, 16, 1]
    assert tiling(library, (256, 128, 32, 32), last=False) == [BLOCK, 8, 8, 32, 4, 1]
    assert tiling(library, (256, 128, 32, 32), tensors=2) == [CLUSTER, 8, 4, 64, 8, 2]
    assert tiling(library, (256, 128, 64, 64)) == [CLUSTER, 8, 4, 64, 16, 4]
    assert tiling(library, (256, 128, 64, 64), device=A100)[0] == SPLIT
    # One image: planes are cut, so that more of the device reads.
    assert tiling(library, (1, 128, 32, 32)) == [CLUSTER, 8, 4, 32, 4, 8]
    assert tiling(library, (1, 128, 32, 32), last=False) == [BLOCK, 8, 1, 32, 4, 1]
