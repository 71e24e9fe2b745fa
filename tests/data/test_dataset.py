"""A data set against the tensor that it stands for, and its augmentation against where each image lies in a batch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ncsn_fast import ops, streams
from ncsn_fast.data import ImageDataset, as_dataset
from ncsn_fast.data.images import from_uint8

BYTES = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 6), np.uint8)
VALUES = from_uint8(BYTES)
SOME = torch.tensor([7, 0, 39, 7])


def mapped(tmp_path):
    np.save(tmp_path / "a.npy", BYTES)
    return np.load(tmp_path / "a.npy", mmap_mode="r")


@pytest.mark.parametrize("hold", ["array", "map", "tensor", "floats", "last axis"])
def test_it_stands_for_a_tensor(tmp_path, hold):
    held = {
        "array": BYTES,
        "map": mapped(tmp_path),
        "tensor": torch.from_numpy(BYTES),
        "floats": VALUES,
        "last axis": np.ascontiguousarray(BYTES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    }
    data = ImageDataset(held[hold])
    assert len(data) == 40 and data.shape == VALUES.shape and data.ndim == 4
    assert data.dtype == torch.float32 and data.device == VALUES.device
    for indices in (SOME, slice(3, 9), slice(None, None, 7), 5):
        torch.testing.assert_close(data[indices], VALUES[indices], rtol=0, atol=0)
        assert data[indices].is_contiguous()
    torch.testing.assert_close(data.batch(SOME, seed=1, step=2), VALUES[SOME], rtol=0, atol=0)
    assert data.ends == (float(VALUES.min()), float(VALUES.max()))
    assert data.fingerprint == hashlib.sha256(VALUES.numpy()).hexdigest()[:16]
    assert data.describe() == {"shape": (40, 3, 4, 6), "fingerprint": data.fingerprint}


def test_what_is_given_out_is_the_callers(tmp_path):
    """Writing into a view of a read-only map would end the process."""
    np.save(tmp_path / "a.npy", VALUES.numpy())
    data = ImageDataset(np.load(tmp_path / "a.npy", mmap_mode="r"))
    data[:4].zero_()
    data[3].zero_()
    torch.testing.assert_close(data[:], VALUES)


def test_every_byte_is_the_same_by_the_table_as_by_arithmetic():
    levels = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    data = ImageDataset(levels)
    # The table is what other devices take.
    unused = torch.device("meta")
    data._scale(levels.to(unused))
    table = data._tables[torch.device("cpu")]
    torch.testing.assert_close(table, data[:][:, 0], rtol=0, atol=0)
    torch.testing.assert_close(table, levels[:, 0].float() / 127.5 - 1, rtol=0, atol=0)
    unit = ImageDataset(levels, data_range=(0.0, 1.0))[:][:, 0]
    torch.testing.assert_close(unit, levels[:, 0].float() / 255, rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"flips": True}, {"flips": True, "dequantise": True}])
def test_the_same_values_on_a_gpu(options):
    data = ImageDataset(BYTES, **options)
    expected = data.batch(SOME, seed=1, step=2)
    for got in (
        data.batch(SOME, seed=1, step=2, device="cuda"),
        data.to("cuda").batch(SOME, seed=1, step=2),
    ):
        assert got.is_cuda
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0)


def test_flips_are_a_function_of_seed_step_and_place():
    data, n = ImageDataset(BYTES, flips=True), 32
    indices = torch.arange(n)
    whole = data.batch(indices, seed=3, step=8)
    coins = ops.philox_uniform((n, 1), seed=3, step=8, stream=streams.STREAM_FLIPS)[:, 0] < 0.5
    assert 4 < coins.sum() < 28
    expected = torch.stack(
        [x.flip(2) if coin else x for x, coin in zip(VALUES[:n], coins, strict=True)]
    )
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)
    # The parts of a batch that processes take are those of the whole.
    parts = [
        data.batch(indices[i : i + 8], seed=3, step=8, sample_offset=i) for i in range(0, n, 8)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    for other in ({"seed": 4, "step": 8}, {"seed": 3, "step": 9}):
        assert not torch.equal(data.batch(indices, **other), whole)
    torch.testing.assert_close(data[indices], VALUES[:n], rtol=0, atol=0)  # plain


def test_dequantised_bytes_have_a_density():
    """Uniform over the step of each byte: the byte is still known, and the mean is its middle."""
    data = ImageDataset(np.full((64, 1, 16, 16), 100, np.uint8), dequantise=True)
    values = data.batch(torch.arange(64), seed=0, step=0)
    levels = (values + 1) * 128
    assert levels.min() >= 100 and levels.max() <= 101
    assert levels.mean() == pytest.approx(100.5, abs=0.01)
    assert levels.std() == pytest.approx(12**-0.5, rel=0.02)
    white = ImageDataset(np.full((64, 1, 16, 16), 255, np.uint8), dequantise=True)
    assert white.batch(torch.arange(64), seed=0, step=0).max() <= 1
    assert data.describe()["dequantise"] is True


def test_what_a_checkpoint_keeps_tells_augmentations_apart():
    plain = ImageDataset(BYTES).describe()
    assert ImageDataset(VALUES).describe() == plain
    assert ImageDataset(BYTES, flips=True).describe() == plain | {"flips": True}
    unit = ImageDataset(BYTES, data_range=(0, 1)).describe()
    assert unit == plain | {"data_range": (0.0, 1.0)}
    other = BYTES.copy()
    other[-1, -1, -1, -1] ^= 1
    assert ImageDataset(other).describe() != plain


def test_tensors_and_loaders_of_pytorch():
    points = torch.randn(5, 2, dtype=torch.float64)
    data = as_dataset(points)
    assert as_dataset(data) is data and data.dtype == torch.float64
    torch.testing.assert_close(data[torch.tensor([4, 1])], points[[4, 1]], rtol=0, atol=0)
    (first, *_) = DataLoader(ImageDataset(BYTES), batch_size=8)
    torch.testing.assert_close(first, VALUES[:8], rtol=0, atol=0)


def test_a_part_is_a_view_with_the_same_settings():
    data = ImageDataset(BYTES, flips=True, fingerprint="of all", byte_ends=(0, 1))
    half = data.part(slice(1, None, 2))
    torch.testing.assert_close(half[:], VALUES[1::2], rtol=0, atol=0)
    assert half.flips and half._values is data._values
    assert half.describe() == ImageDataset(BYTES[1::2].copy(), flips=True).describe()
    assert half.ends == (float(VALUES[1::2].min()), float(VALUES[1::2].max()))


def test_ends_tell_of_values_that_are_not_numbers():
    values = VALUES.clone()
    values[20, 0, 0, 0] = torch.nan
    assert np.isnan(ImageDataset(values).ends).all()


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        (BYTES.astype(np.int64), {}, TypeError, "uint8 or floating point, got torch.int64"),
        (BYTES[:0], {}, ValueError, "not empty"),
        (np.zeros(3, np.uint8), {}, ValueError, r"\(N, C, H, W\)"),
        (np.zeros((3, 2), np.float32), {"flips": True}, ValueError, r"flips take images"),
        (np.zeros((3, 2), np.float32), {"dequantise": True}, ValueError, "bytes, got"),
        (BYTES, {"flips": "no"}, TypeError, "flips must be a bool"),
    ],
)
def test_mistakes_are_named(values, options, error, message):
    with pytest.raises(error, match=message):
        ImageDataset(values, **options)


@pytest.mark.parametrize("kind", ["bytes", "floats", "file"])
def test_chosen_rows_are_a_view(tmp_path, kind):
    """As the same rows copied, but that nothing is copied, and of a part of a part too."""
    values = torch.randint(0, 256, (20, 1, 3, 3), generator=torch.Generator().manual_seed(0))
    values = values.float() / 255 if kind == "floats" else values.to(torch.uint8)
    if kind == "file":
        np.save(tmp_path / "x.npy", values.numpy())
        whole = ImageDataset(np.load(tmp_path / "x.npy", mmap_mode="r"), flips=True)
    else:
        whole = ImageDataset(values, flips=True)
    whole.fingerprint, whole.ends  # noqa: B018 -- found, so that a part could take them over
    rows = torch.tensor([3, 4, 11, 19, 7])
    chosen = torch.zeros(20, dtype=torch.bool)
    chosen[rows] = True
    for part, which in (
        (whole.part(rows), rows),
        (whole.part(chosen), rows.sort().values),
        (whole.part(rows).part(slice(1, None, 2)), rows[1::2]),
        (whole.part(slice(2, 9)).part(torch.tensor([0, 6])), torch.tensor([2, 8])),
    ):
        copied = ImageDataset(values[which], flips=True)
        assert part.shape == copied.shape and len(part) == len(which)
        assert part.nbytes == copied.nbytes
        assert torch.equal(part[:], copied[:]) and torch.equal(part[1], copied[1])
        assert torch.equal(part[1:2], copied[1:2])
        indices = torch.tensor([1, 0, 1])
        assert torch.equal(part[indices], copied[indices])
        place = {"seed": 1, "step": 2}
        assert torch.equal(part.batch(indices, **place), copied.batch(indices, **place))
        assert part.fingerprint == copied.fingerprint and part.ends == copied.ends
        assert torch.equal(part.to("cpu")[:], copied[:])
        if kind != "file":
            assert part._values.data_ptr() == values.data_ptr()
    assert len(whole) == 20
    with pytest.raises(ValueError, match="rows must hold at least one sample"):
        whole.part(slice(0, 0))
