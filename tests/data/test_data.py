"""Images from scikit-learn, folders and array files: values, order, shapes, and errors that name the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import load_digits, load_images, to_uint8

BYTES = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)  # N, H, W, C


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def as_images(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- digits ---------------------------------------------------------------------------------------


def test_digits_are_all_there_and_split_for_good():
    from sklearn import datasets

    raw = datasets.load_digits()
    train, heldout, everything = (load_digits(split) for split in ("train", "heldout", "all"))
    assert train.shape == (1540, 1, 8, 8) and heldout.shape == (257, 1, 8, 8)
    assert everything.dtype == torch.float32
    expected = torch.from_numpy(raw.images / 8 - 1).float().unsqueeze(1)
    assert torch.equal(everything, expected)
    assert torch.equal(heldout, expected[3::7])
    together = torch.cat([train, heldout]).flatten(1)
    assert torch.equal(together.sum(0), everything.flatten(1).sum(0))
    counts = np.bincount(raw.target[3::7], minlength=10)
    assert counts.min() >= 20  # every class, about 26 times


def test_digits_split_has_a_name():
    with pytest.raises(ValueError, match=r"split must be one of .*, got 'test'"):
        load_digits("test")


# --- folders --------------------------------------------------------------------------------------


def test_folder_is_read_recursively_in_sorted_order(tmp_path):
    for name, pixels in zip(("b.png", "a/z.PNG", "c.bmp"), BYTES, strict=True):
        save(pixels, tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    images = load_images(tmp_path, 5, 3)
    assert images.dtype == torch.float32 and images.is_contiguous()
    torch.testing.assert_close(images, as_images(BYTES[[1, 0, 2]]), rtol=0, atol=1e-6)


def test_images_are_cut_square_resized_and_converted(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255  # the central square
    save(wide, tmp_path / "wide.png")
    grey = load_images(tmp_path, 4, 1)
    assert grey.shape == (1, 1, 4, 4)
    assert grey.min() > 0.8  # the filter takes in a little of the black beside the square
    one = load_images(tmp_path / "wide.png", 4, 3)
    assert one.shape == (1, 3, 4, 4)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 65535], [32896, 257]], dtype=np.uint16)
    save(grey, tmp_path / "deep.png")
    got = to_uint8(load_images(tmp_path, 2, 1))[0, 0]
    assert got.tolist() == [[0, 255], [128, 1]]


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(BYTES[0]).save(tmp_path / "turned.png", exif=exif)
    images = load_images(tmp_path, 5, 3)
    torch.testing.assert_close(images, as_images(BYTES[:1]).flip(2, 3), rtol=0, atol=1e-6)


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing does not exist"):
        load_images(tmp_path / "nothing", 8, 1)
    (tmp_path / "readme.txt").write_text("text")
    with pytest.raises(
        ValueError, match=r"holds no image that pillow can open .*skipped 1 name in .*: 1 \.txt"
    ):
        load_images(tmp_path, 8, 1)


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    save(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8), tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "poor.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"cannot read .*poor\.png as an image"):
        load_images(tmp_path, 8, 1)


@pytest.mark.parametrize(
    ("size", "channels", "message"), [(0, 1, "image_size"), (8, 2, "channels")]
)
def test_sizes_and_channels_are_checked(tmp_path, size, channels, message):
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, size, channels)


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_in_either_layout(tmp_path, layout, suffix):
    array = BYTES if layout == "NHWC" else np.ascontiguousarray(BYTES.transpose(0, 3, 1, 2))
    path = tmp_path / f"data.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, array)
    images = load_images(path, 5, 3)
    assert images.is_contiguous()
    torch.testing.assert_close(images, as_images(BYTES), rtol=0, atol=1e-6)


def test_floats_are_taken_as_they_are(tmp_path):
    values = np.linspace(-1, 1, 2 * 4 * 4).reshape(2, 4, 4)
    np.savez(tmp_path / "data.npz", images=values, labels=np.arange(2))
    images = load_images(tmp_path / "data.npz", 4, 1)
    assert torch.equal(images, torch.from_numpy(values).float().unsqueeze(1))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 6, 6), np.uint8), r"\(N, 1, 8, 8\).*got uint8 of shape \(2, 6, 6\)"),
        (np.zeros((8, 8), np.uint8), r"got uint8 of shape \(8, 8\)"),
        (np.zeros((0, 8, 8), np.uint8), "N >= 1"),
        (np.zeros((2, 8, 8), np.int64), "got int64"),
        (np.full((2, 8, 8), 7.0), r"must be in \[-1, 1\], got 7 to 7"),
        (np.full((2, 8, 8), np.nan), "must be finite, got values from nan to nan"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, array, message):
    np.save(tmp_path / "data.npy", array)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path / "data.npy", 8, 1)
    assert "data.npy" in str(caught.value)


def test_array_files_that_are_none(tmp_path):
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:100])
    for name in ("text.npy", "two.npz", "objects.npy", "cut.npz"):
        with pytest.raises(ValueError, match=rf"cannot read .*{name} as a NumPy file"):
            load_images(tmp_path / name, 8, 1)


# --- numbers --------------------------------------------------------------------------------------


def test_to_uint8_inverts_loading(tmp_path):
    save(BYTES[0], tmp_path / "one.png")
    assert torch.equal(
        to_uint8(load_images(tmp_path, 5, 3))[0], torch.from_numpy(BYTES[0]).permute(2, 0, 1)
    )
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0, 128, 255]
