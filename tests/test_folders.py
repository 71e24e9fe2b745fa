"""Folders as people have them: what is read, in which order, and the one line on what was not."""

from __future__ import annotations

import os

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image

from ncsn_fast.data import load_images
from ncsn_fast.data.folders import find_images


def picture(path, grey=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), grey, np.uint8)).save(path)
    return path


def load(folder):
    """Grey levels of the images, and what was said of the rest."""
    said = []
    images = load_images(folder, 4, 1, report=said.append)
    return [round((float(image.mean()) + 1) * 127.5) for image in images], said


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    picture(tmp_path / "0.png", 200)
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7 a Mac's copy")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "0.png").write_bytes(b"resource fork")
    picture(tmp_path / ".thumbnails" / "0.png", 10)
    picture(tmp_path / "@eaDir" / "0.png", 10)
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert load(tmp_path) == (
        [200],
        [f"skipped 5 names in {str(tmp_path)!r}: 2 hidden, 1 @eaDir, 1 Thumbs.db, 1 __MACOSX"],
    )


def test_nothing_is_said_of_a_clean_folder(tmp_path):
    picture(tmp_path / "b" / "0.PNG", 1)
    picture(tmp_path / "a" / "0.jpeg", 250)
    greys, said = load(tmp_path)
    assert greys[1] == 1 and greys[0] > 240
    assert said == []


def test_links_are_followed(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    picture(elsewhere / "cats" / "0.png", 50)
    picture(elsewhere / "one.png", 60)
    picture(data / "dogs" / "0.png", 70)
    os.symlink(elsewhere / "cats", data / "cats")
    os.symlink(elsewhere / "one.png", data / "one.png")
    assert load(data) == ([50, 70, 60], [])


def test_each_folder_is_read_once(tmp_path):
    picture(tmp_path / "data" / "a" / "0.png", 50)
    os.symlink(tmp_path / "data", tmp_path / "data" / "a" / "again")
    os.symlink(tmp_path / "data" / "a", tmp_path / "data" / "other")
    os.symlink(tmp_path, tmp_path / "data" / "above")
    greys, said = load(tmp_path / "data")
    assert greys == [50]
    assert "3 link to a folder that is read, or above" in said[0]


def test_unknown_files_are_counted(tmp_path):
    picture(tmp_path / "0.png", 50)
    for name in ("a.txt", "b.txt", "c.json", "README"):
        (tmp_path / name).write_text("text")
    os.symlink(tmp_path / "gone.png", tmp_path / "broken.png")
    os.mkfifo(tmp_path / "pipe.png")
    _, said = load(tmp_path)
    assert len(said) == 1 and "skipped 6 names" in said[0]
    for part in ("2 .txt", "1 .json", "1 without suffix", "1 broken link", "1 neither file nor"):
        assert part in said[0]


def test_a_file_that_claims_to_be_an_image_is_an_error(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("text")
    with pytest.raises(ValueError, match=r"cannot read .*1\.png"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".webp", ".tga", ".dds", ".jfif", ".pcx", ".JPG"])
def test_any_suffix_that_pillow_reads(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    files, skipped = find_images(tmp_path)
    assert [file.name for file in files] == [f"a{suffix}"] and not skipped


def test_names_of_any_kind_in_sorted_order(tmp_path):
    names = ["10.png", "2.png", "B.png", "a b.png", "é.png", "日本.png", "new\nline.png"]
    for name in names:
        picture(tmp_path / name)
    files, _ = find_images(tmp_path)
    assert [file.name for file in files] == sorted(names)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path):
    closed = tmp_path / "closed"
    picture(closed / "0.png")
    closed.chmod(0)
    try:
        with pytest.raises(PermissionError, match="closed"):
            load(tmp_path)
    finally:
        closed.chmod(0o700)


def test_a_folder_without_permission_is_not_read_as_empty(tmp_path, monkeypatch):
    """Also where the tests run as root, who may read everything."""
    picture(tmp_path / "closed" / "0.png")
    picture(tmp_path / "0.png")
    scandir = os.scandir

    def refusing(path):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="closed"):
        load(tmp_path)


def test_a_folder_of_nothing_but_skipped_names_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no image.*skipped 1 name.*1 \.txt"):
        load(tmp_path)
