"""Which files of a folder are read, and what is said of the others."""

from __future__ import annotations

import logging
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from ncsn_fast.data import load_images, to_uint8
from ncsn_fast.data.folders import find_images


def save(path, level):
    """An image of one grey level, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2), level, np.uint8)).save(path)


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(target)
    except OSError as error:
        pytest.skip(f"links cannot be made here: {error}")


def load(folder):
    """The grey levels of the images, in their order, and the lines that were said."""
    lines = []
    images = load_images(folder, 2, 1, report=lines.append)
    return to_uint8(images)[:, 0, 0, 0].tolist(), lines


def test_hidden_names_are_passed_over(tmp_path):
    """A Mac's copy of a name, folders of programs, and what systems leave behind."""
    save(tmp_path / "0.png", 100)
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7")
    save(tmp_path / ".thumbnails" / "small.png", 1)
    save(tmp_path / "a" / ".ipynb_checkpoints" / "1.png", 2)
    save(tmp_path / "__MACOSX" / "1.png", 3)
    save(tmp_path / "@eaDir" / "1.png", 4)
    for name in ("Thumbs.db", "desktop.ini", "Icon\r"):
        (tmp_path / name).write_bytes(b"")
    levels, (line,) = load(tmp_path)
    assert levels == [100]
    assert f"skipped 8 names in {str(tmp_path)!r}: 3 hidden, " in line
    for name in ("1 __MACOSX", "1 @eaDir", "1 Thumbs.db", "1 desktop.ini", r"1 'Icon\r'"):
        assert name in line
    assert "\r" not in line and "\n" not in line


def test_a_folder_that_is_hidden_itself_is_read(tmp_path):
    save(tmp_path / ".cache" / "0.png", 100)
    assert load(tmp_path / ".cache") == ([100], [])


def test_nothing_is_said_where_nothing_is_skipped(tmp_path):
    save(tmp_path / "0.png", 100)
    save(tmp_path / "a" / "0.png", 101)
    (tmp_path / "empty.png").mkdir()
    assert load(tmp_path) == ([100, 101], [])


def test_what_is_skipped_is_counted_by_kind(tmp_path):
    save(tmp_path / "0.png", 100)
    for name in (
        "a.txt",
        "b.txt",
        "c.TXT",
        "x.npy",
        "labels",
        "p.pdf",
        "e.eps",
        "f.csv",
        "g.json",
        "h.md",
    ):
        (tmp_path / name).write_text("none")
    levels, (line,) = load(tmp_path)
    assert levels == [100]
    assert "skipped 10 names" in line and ": 3 .txt, " in line and line.count("\n") == 0
    assert line.endswith(", 2 others")


def test_the_line_is_logged_by_default(tmp_path, caplog):
    save(tmp_path / "0.png", 100)
    (tmp_path / "labels").write_text("none")
    with caplog.at_level(logging.WARNING, "ncsn_fast"):
        load_images(tmp_path, 2, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped 1 name in {str(tmp_path)!r}: 1 without suffix"
    ]


@pytest.mark.parametrize(
    "suffix",
    ["jfif", "tga", "jp2", "webp", "apng", "pcx", "sgi", "PnG", "ppm", "dds", "ico", "gif"],
)
def test_suffixes_that_pillow_knows(tmp_path, suffix):
    if f".{suffix.lower()}" not in Image.registered_extensions():
        pytest.skip("this pillow lacks the format")
    try:
        Image.fromarray(np.full((16, 16), 200, np.uint8)).convert("RGB").save(
            tmp_path / f"a.{suffix}"
        )
    except (OSError, KeyError) as error:
        pytest.skip(f"this pillow does not write the format: {error}")
    levels, lines = load(tmp_path)
    assert len(levels) == 1 and abs(levels[0] - 200) <= 3 and lines == []


def test_links_are_followed(tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "0.png", 50)
    save(tmp_path / "single.png", 60)
    save(tmp_path / "data" / "b" / "0.png", 100)
    link(tmp_path / "data" / "a", tmp_path / "elsewhere")
    link(tmp_path / "data" / "c.png", tmp_path / "single.png")
    assert load(tmp_path / "data") == ([50, 100, 60], [])
    link(tmp_path / "all", tmp_path / "data")
    assert load(tmp_path / "all") == ([50, 100, 60], [])


def test_a_folder_is_read_once_and_under_its_own_name(tmp_path):
    save(tmp_path / "m" / "0.png", 100)
    save(tmp_path / "z" / "0.png", 101)
    link(tmp_path / "a", tmp_path / "z")
    link(tmp_path / "b" / "again", tmp_path / "m")
    levels, (line,) = load(tmp_path)
    assert levels == [100, 101]
    assert "2 link to a folder that is read" in line


def test_cycles_end(tmp_path):
    folder = tmp_path / "data"
    save(folder / "a" / "0.png", 100)
    save(tmp_path / "beside.png", 1)
    link(folder / "a" / "self", folder / "a")
    link(folder / "a" / "top", folder)
    link(folder / "above", tmp_path)
    link(tmp_path / "out" / "back", folder)
    link(folder / "out", tmp_path / "out")
    levels, (line,) = load(folder)
    assert levels == [100]
    assert "skipped 4 names" in line and "4 link to a folder that is read, or above" in line


def test_links_that_lead_nowhere(tmp_path):
    save(tmp_path / "0.png", 100)
    link(tmp_path / "gone.png", tmp_path / "nothing.png")
    link(tmp_path / "loop.png", tmp_path / "loop.png")
    levels, (line,) = load(tmp_path)
    assert levels == [100] and ": 2 broken link" in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    save(tmp_path / "0.png", 100)
    os.mkfifo(tmp_path / "pipe.png")
    levels, (line,) = load(tmp_path)
    assert levels == [100] and "1 neither file nor folder" in line


def test_a_folder_without_permission_is_an_error(tmp_path, monkeypatch):
    save(tmp_path / "0.png", 100)
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):  # by hand, since root may read everything
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        load(tmp_path)


def test_a_folder_of_nothing_but_other_files_says_what_it_holds(tmp_path):
    (tmp_path / "a.txt").write_text("none")
    save(tmp_path / ".hidden.png", 1)
    with pytest.raises(ValueError, match=r"holds no image .*skipped 2 names in .*: .*1 hidden"):
        load_images(tmp_path, 2, 1)


def test_names_of_any_kind_in_sorted_order(tmp_path):
    names = ["10.png", "2.png", "B.png", "a b.png", "é.png", "日本.png", "new\nline.png"]
    for name in names:
        save(tmp_path / name, 100)
    files, skipped = find_images(tmp_path)
    assert [file.name for file in files] == sorted(names) and not skipped


def test_the_order_does_not_depend_on_the_folder(tmp_path):
    for i, name in enumerate(["b/0.png", "a.png", "a/1.png", "c.png"]):
        save(tmp_path / "one" / name, 100 + i)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert load(tmp_path / "one") == load(tmp_path / "two")
