"""Every kind of source, from its name to the same images; what cannot be read; and what its error says."""

from __future__ import annotations

import gzip
import shutil
import struct
import sys
import zipfile
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import load_digits, load_images, open_images
from ncsn_fast.data.images import from_uint8
from ncsn_fast.data.ranges import DataRangeWarning

GREY = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
VALUES = from_uint8(GREY[:, None])


def idx(pixels, kind=8):
    shape = struct.pack(f">{pixels.ndim}I", *pixels.shape)
    return bytes([0, 0, kind, pixels.ndim]) + shape + pixels.tobytes()


def save_folder(folder, pixels=GREY):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:04}.png")
    return folder


def pack(folder, path, more=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir(), reverse=True):  # the order in it is not that of names
            archive.write(file, f"inside/{file.name}")
        for name in more:
            archive.writestr(name, "text")
    return path


def make(kind, tmp_path):
    """The images as a source of a kind, and its name."""
    path = tmp_path / kind
    if kind == "folder":
        save_folder(path)
    elif kind == "images.zip":
        pack(save_folder(tmp_path / "packed"), path)
    elif kind.startswith("train-images"):
        path.write_bytes(gzip.compress(idx(GREY)) if kind.endswith("gz") else idx(GREY))
    elif kind == "a.npy":
        np.save(path, GREY)
    else:
        np.savez(path, GREY)
    return path


KINDS = (
    "folder",
    "images.zip",
    "train-images-idx3-ubyte",
    "train-images.idx3-ubyte.gz",
    "a.npy",
    "a.npz",
)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_images(tmp_path, kind, cached):
    said = []
    options = {"cache": tmp_path / "cache" if cached else None, "report": said.append}
    data = open_images(make(kind, tmp_path), 8, 1, **options)
    torch.testing.assert_close(data[:], VALUES, rtol=0, atol=0)
    assert not said


@pytest.mark.parametrize("kind", KINDS[:4])
def test_images_are_resized_and_made_of_a_mode_alike(tmp_path, kind):
    expected = load_images(save_folder(tmp_path / "files"), 5, 3)
    data = open_images(make(kind, tmp_path), 5, 3)
    assert data.shape == (6, 3, 5, 5)
    torch.testing.assert_close(data[:], expected, rtol=0, atol=0)
    assert len({data.fingerprint, open_images(tmp_path / "files", 5, 3).fingerprint}) == 1


def test_one_image(tmp_path):
    folder = save_folder(tmp_path / "a")
    data = open_images(folder / "0003.png", 8, 1)
    torch.testing.assert_close(data[:], VALUES[3:4], rtol=0, atol=0)


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_the_digits_keep_their_own_values(split):
    data = open_images(f"digits:{split}", 8, 1)
    torch.testing.assert_close(data[:], load_digits(split), rtol=0, atol=0)
    assert len(open_images("digits", 8, 1)) == 1540
    with pytest.raises(ValueError, match="image_size must be 8 and channels 1, got 32 and 3"):
        open_images("digits", 32, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_arrays_of_floats_are_taken_as_they_are(tmp_path, dtype):
    np.save(tmp_path / "a.npy", VALUES.numpy().astype(dtype))
    data = open_images(tmp_path / "a.npy", 8, 1)
    assert data.dtype == torch.float32
    torch.testing.assert_close(data[:], load_images(tmp_path / "a.npy", 8, 1), rtol=0, atol=0)


def test_other_ranges(tmp_path):
    folder = save_folder(tmp_path / "a")
    unit = open_images(folder, 8, 1, data_range=(0.0, 1.0))
    torch.testing.assert_close(unit[:], torch.from_numpy(GREY[:, None]) / 255, rtol=0, atol=0)
    np.save(tmp_path / "a.npy", VALUES.numpy() * 2)
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], got -2 to 2"):
        open_images(tmp_path / "a.npy", 8, 1)
    save_folder(tmp_path / "a", GREY // 128)
    with pytest.warns(DataRangeWarning, match="more bits than they have") as record:
        open_images(folder, 8, 1)
    assert record[0].filename == __file__


def test_deep_greys_are_kept_as_bytes_and_it_is_said(tmp_path):
    save_folder(tmp_path / "a")
    deep = (GREY[0].astype(np.uint16) << 8) + 200  # 257 to a byte
    Image.fromarray(deep).save(tmp_path / "a" / "0000.png")
    said = []
    data = open_images(tmp_path / "a", 8, 1, report=said.append)
    torch.testing.assert_close(data[:1], from_uint8((deep / 257).round()[None, None]))
    assert said == ["1 images with more than 8 bits a value are kept with 8 bits"]


# --- what cannot be read --------------------------------------------------------------------------


def many(tmp_path, n, broken):
    folder = save_folder(tmp_path / "many", np.resize(GREY, (n, 4, 4)))
    for i in broken:
        (folder / f"{i:04}.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_corrupt_image_is_named_counted_and_skipped(tmp_path, kind, cached):
    path = many(tmp_path, 300, [17, 290])
    if kind == "zip":
        path = pack(path, tmp_path / "a.zip")
    good = [i for i in range(300) if i not in (17, 290)]
    expected = from_uint8(np.resize(GREY, (300, 4, 4))[good, None])
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):  # the second time from the cache
        said = []
        data = open_images(path, 4, 1, cache=cache, report=said.append)
        torch.testing.assert_close(data[:], expected, rtol=0, atol=0)
        (line,) = said
        assert "skipped 2 of 300 images that cannot be read" in line
        assert "0017.png" in line and "0290.png" in line


@pytest.mark.parametrize("broken", [range(4), range(100), range(296, 300)])
def test_more_than_one_in_a_hundred_is_an_error(tmp_path, broken):
    cache = tmp_path / "cache"
    folder = many(tmp_path, 300, broken)
    with pytest.raises(ValueError, match=r"more than 1%: \d+ of 300 images") as error:
        open_images(folder, 4, 1, cache=cache)
    assert f"{broken[0]:04}.png" in str(error.value) and len(str(error.value)) < 1000
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    with pytest.raises(ValueError, match="1 of 6 images"):
        folder = save_folder(tmp_path / "few")
        (folder / "0002.png").write_bytes(b"")
        open_images(folder, 8, 1)


def test_an_archive_is_read_as_a_folder(tmp_path):
    more = ["notes.txt", "__MACOSX/._0001.png", ".hidden/a.png", "inside/"]
    path = pack(save_folder(tmp_path / "a"), tmp_path / "a.zip", more)
    said = []
    data = open_images(path, 8, 1, report=said.append)
    torch.testing.assert_close(data[:], VALUES, rtol=0, atol=0)
    assert said[0].startswith(f"skipped 3 names in {str(path)!r}: ") and len(said) == 1
    assert all(kind in said[0] for kind in ("1 .txt", "1 __MACOSX", "1 hidden"))


def test_archives_that_are_none(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK\3\4 no archive")
    with pytest.raises(ValueError, match=r"cannot read .*a.zip as a zip archive"):
        open_images(path, 8, 1)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"the archive .*a.zip holds no image.*1 .txt"):
        open_images(path, 8, 1)
    whole = pack(save_folder(tmp_path / "b"), path).read_bytes()
    path.write_bytes(whole.replace(b"IHDR", b"JHDR", 1))  # its checksum in the archive is wrong now
    with pytest.raises(ValueError, match=r"1 of 6 images.*Bad CRC-32"):
        open_images(path, 8, 1)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (idx(GREY)[:-1], "truncated: it ends in image 5 of the 6"),
        (gzip.compress(idx(GREY))[:-20], "cannot read .* as an IDX file"),
        (idx(GREY[:, 0, 0]), r"1 dimensions are \(6,\).*labels of images are not needed"),
        (idx(GREY.astype(np.int32), kind=12), "of type 0x0c"),
        (idx(GREY[:0]), r"\(0, 8, 8\)"),
        (b"hello, I am text", "of no known kind"),
        (b"", "of no known kind"),
        (idx(GREY)[:9], "of no known kind"),
    ],
)
def test_idx_files_that_are_none(tmp_path, contents, message):
    (tmp_path / "images-idx3-ubyte").write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "images-idx3-ubyte", 8, 1, cache=tmp_path / "cache")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such|does not exist"):
        open_images(tmp_path / "none", 8, 1)
    with pytest.raises(ValueError, match=r"the folder .* holds no image"):
        open_images(tmp_path, 8, 1)
    with pytest.raises(ValueError, match="channels must be 1"):
        open_images(tmp_path, 8, 2)


# --- the Hub --------------------------------------------------------------------------------------


def test_a_folder_that_datasets_loads(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = save_folder(tmp_path / "set", np.resize(GREY, (200, 8, 8)))
    (folder / "0007.png").write_bytes(b"no image")
    good = [i for i in range(200) if i != 7]
    expected = from_uint8(np.resize(GREY, (200, 8, 8))[good, None])
    for column in ("", ":image", ":image:train"):
        said = []
        data = open_images(f"hf:{folder}{column}", 8, 1, report=said.append)
        torch.testing.assert_close(data[:], expected, rtol=0, atol=0)
        assert "skipped 1 of 200" in said[0]
    with pytest.raises(ValueError, match=r"columns of images: \['image'\]"):
        open_images(f"hf:{folder}:label", 8, 1)


def test_the_hub_is_asked_for_one_revision(tmp_path, monkeypatch):
    """A cache is of that revision, so that a changed data set is decoded anew."""
    datasets = pytest.importorskip("datasets")
    revisions = ("aa", "aa", "bb")
    real, asked = datasets.load_dataset, []

    def load(name, **options):
        asked.append((name, options.pop("revision"), options))
        return real(str(save_folder(tmp_path / "set", GREY[: 2 + len(asked)])), **options)

    class Api:
        def dataset_info(self, name):
            return SimpleNamespace(sha=revisions[len(asked)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    cache = tmp_path / "cache"
    sizes = [len(open_images("hf:some/name", 8, 1, cache=cache)) for _ in revisions]
    wanted = {"split": "train", "streaming": True}
    assert asked == [("some/name", revision, wanted) for revision in revisions]
    assert sizes == [3, 3, 5]


def test_the_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install \"ncsn_fast\[hf\]\""):
        open_images("hf:mnist", 28, 1)


def test_a_name_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.move(save_folder(tmp_path / "x"), tmp_path / "y")
    assert len(open_images("~/y", 8, 1, cache="~/cache")) == 6
    assert (tmp_path / "cache").is_dir()
