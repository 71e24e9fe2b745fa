"""``ncsn-fast sample``: every form of network, file and picture, and every mistake before any work."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast import NCSN, NCSNv2, ScoreCNN, ScoreMLP
from ncsn_fast.cli import sample
from ncsn_fast.data import load_images


def test_sample_from_every_form_into_every_form(ncsn_fast, trained, tmp_path):
    draw = ["--n", 5, "--steps", 1, "--seed", 7]
    forms = {
        "a.npy": [trained],
        "b.npz": [trained / "checkpoint.pt", "--batch", 2],
        "c": [trained / "model"],
        "d.png": [trained],
    }
    for name, arguments in forms.items():
        assert ncsn_fast("sample", *arguments, *draw, "--out", tmp_path / "new" / name)[0] == 0
    images = np.load(tmp_path / "new" / "a.npy")
    assert images.shape == (5, 1, 8, 8) and images.dtype == np.float32
    assert np.abs(images).max() <= 1
    # Image i is image i, whatever the batch.
    np.testing.assert_allclose(np.load(tmp_path / "new" / "b.npz")["images"], images, atol=1e-4)
    files = sorted(p.name for p in (tmp_path / "new" / "c").iterdir())
    assert files == [f"000{i}.png" for i in range(5)] + ["manifest.json"]
    read = load_images(tmp_path / "new" / "c", 8, 1).numpy()
    np.testing.assert_allclose(read, images, atol=1 / 127)
    with Image.open(tmp_path / "new" / "d.png") as picture:
        assert min(picture.size) > 2 * 64
    model = NCSN.from_pretrained(trained / "model")
    lr = 0.2 * float(model.sigmas[-1]) ** 2
    expected = model.sample(5, 8, None, 1, lr, clip=False, denoise=True, seed=7, verbose=False)
    np.testing.assert_allclose(images, expected.clamp(-1, 1).numpy(), atol=1e-4)


def test_sample_options_reach_the_sampler(ncsn_fast, trained, tmp_path, monkeypatch):
    asked = []

    def sample(self, n, size, **options):
        asked.append((n, size, options))
        return torch.zeros(n, 1, 2, 2)

    monkeypatch.setattr(NCSN, "sample", sample)
    options = ["--clip", "--no-denoise", "--steps", 3, "--step-lr", 0.5, "--image-size", 9]
    out = ["--n", 5, "--batch", 3, "--out", tmp_path / "x.npy"]
    assert ncsn_fast("sample", trained, *options, *out)[0] == 0
    common = {"n_steps_each": 3, "step_lr": 0.5, "clip": True, "denoise": False, "seed": 0}
    common |= {"sampler": "ald"}
    assert asked == [(3, 9, common | {"sample_offset": 0}), (2, 9, common | {"sample_offset": 3})]


def test_sample_mistakes(refused, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (trained / "checkpoint.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.pt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for source, message in {
        "nowhere": "nowhere does not exist",
        "cut.pt": "cut.pt is truncated",
        "other.pt": "other.pt is not a checkpoint of ncsn_fast",
        "empty": "the folder empty holds neither checkpoint.pt nor a model",
        "model": "model.safetensors does not exist",
    }.items():
        assert message in refused("sample", source)
    NCSN.from_pretrained(trained / "model").save_pretrained(tmp_path / "published")
    assert "give --image-size" in refused("sample", "published")
    assert "must end in .png, .npy or .npz" in refused("sample", trained, "--out", "a.jpg")
    assert "cannot make the folder cut.pt" in refused("sample", trained, "--out", "cut.pt/a.png")
    assert "n_steps_each must be" in refused("sample", trained, "--steps", 0)
    assert "step_lr must be" in refused("sample", trained, "--step-lr", -1)
    assert "--n" in refused("sample", trained, "--n", 0)
    assert not list(tmp_path.glob("*.png"))


def test_sample_into_a_folder_goes_on_where_it_was(ncsn_fast, refused, trained, tmp_path):
    command = ["sample", trained, "--n", 7, "--batch", 3, "--steps", 1, "--out", tmp_path / "x"]
    assert ncsn_fast(*command)[0] == 0
    files = {f: f.read_bytes() for f in (tmp_path / "x").glob("*.png")}
    assert len(files) == 7
    times = {f: f.stat().st_mtime_ns for f in files}
    lost = tmp_path / "x" / "0004.png"
    lost.unlink()
    (tmp_path / "x" / ".0004.png.1.tmp").write_text("half a picture")
    assert ncsn_fast(*command)[0] == 0
    assert {f: f.read_bytes() for f in (tmp_path / "x").glob("*.png")} == files
    assert [f.name for f in files if f.stat().st_mtime_ns == times[f] and f != lost] != []
    again = sorted(f.name for f in files if f.stat().st_mtime_ns != times[f])
    assert again == ["0003.png", "0004.png", "0005.png"]
    assert not list((tmp_path / "x").glob(".*"))
    assert "other settings: seed is 0 there and 1 here" in refused(*command, "--seed", 1)
    assert "other settings: batch is 3 there and 4 here" in refused(*command, "--batch", 4)
    assert "is one of 7 samples, and 5 were asked for" in refused(*command, "--n", 5)
    (tmp_path / "x" / "manifest.json").unlink()
    assert "holds 0000.png but no manifest.json" in refused(*command)


def test_sample_shards_pictures_and_samplers(ncsn_fast, trained, tmp_path):
    out = tmp_path / "x"
    pictures = []
    for kind in ("grid.png", "strip.png", "gif.gif"):
        pictures += [f"--{kind[:-4]}", tmp_path / kind]
    command = ["sample", trained, "--n", 5, "--batch", 2, "--steps", 1, "--clip", "--bf16"]
    assert ncsn_fast(*command, "--out", out, "--format", "npz", *pictures)[0] == 0
    shards = sorted(out.glob("*.npz"))
    assert [f.name for f in shards] == ["0000-0001.npz", "0002-0003.npz", "0004-0004.npz"]
    images = np.concatenate([np.load(f)["images"] for f in shards])
    assert ncsn_fast(*command, "--out", tmp_path / "y.npy", *pictures)[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), images)
    for name, frames in {"grid.png": 1, "strip.png": 1, "gif.gif": 4}.items():
        with Image.open(tmp_path / name) as picture:
            assert getattr(picture, "n_frames", 1) == frames
    pc = ["sample", trained, "--n", 1, "--steps", 1, "--sampler", "pc", "--predictor", "ancestral"]
    assert ncsn_fast(*pc, "--snr", 0.2, "--out", tmp_path / "pc.npy")[0] == 0
    model = NCSN.from_pretrained(trained / "model")
    options = {"sampler": "pc", "snr": 0.2, "predictor": "ancestral", "n_steps_each": 1}
    expected = model.sample(1, 8, clip=False, denoise=True, seed=0, verbose=False, **options)
    got = np.load(tmp_path / "pc.npy")
    np.testing.assert_allclose(got, expected.clamp(-1, 1).numpy(), atol=1e-4)


def test_sample_with_few_passes(ncsn_fast, refused, trained, tmp_path):
    command = ["sample", trained, "--n", 2, "--sampler", "ancestral", "--passes", 4]
    command += ["--corrector-steps", 1, "--out", tmp_path / "x.npy"]
    pictures = ["--strip", tmp_path / "strip.png", "--gif", tmp_path / "levels.gif"]
    assert ncsn_fast(*command, *pictures)[0] == 0
    model = NCSN.from_pretrained(trained / "model")
    options = {"sampler": "ancestral", "passes": 4, "corrector_steps": 1}
    expected = model.sample(2, 8, clip=False, seed=0, verbose=False, **options)
    got = np.load(tmp_path / "x.npy")
    np.testing.assert_allclose(got, expected.clamp(-1, 1).numpy(), atol=1e-4)
    with Image.open(tmp_path / "levels.gif") as film:
        assert film.n_frames == 2  # the second level, and the end
    assert "takes passes, and no n_steps_each" in refused(*command, "--steps", 3)
    assert "takes no denoise=False" in refused(*command, "--no-denoise")
    assert "'ald' takes no passes" in refused("sample", trained, "--sampler", "ald", "--passes", 4)


def test_a_broken_network_is_one_line(refused, trained, tmp_path):
    model = NCSN.from_pretrained(trained / "model")
    torch.nn.init.constant_(model.end_conv.bias, float("nan"))
    model.save_pretrained(tmp_path / "broken")
    line = refused("sample", tmp_path / "broken", "--image-size", 8, "--out", tmp_path / "x.png")
    assert "the score was NaN or infinite, first at level 0" in line
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler", "pc", "--step-lr", 0.1], "sampler 'pc' takes no step_lr"),
        (["--snr", 0.1], "sampler 'ald' takes no snr"),
        (["--sampler", "cas", "--predictor", "ancestral"], "sampler 'cas' takes no predictor"),
        (["--sampler", "pc", "--clip"], "sampler 'pc' clamps at the end only"),
        (["--grid", "file/grid.png"], "cannot make the folder file"),
        (["--strip", "folder.png"], "folder.png: is a folder"),
        (["--gif", "file/a.gif"], "cannot make the folder file"),
        (["--grid", "grid.jpg"], "--grid makes a .png file, got grid.jpg"),
        (["--gif", "x.png"], "--gif makes a .gif file, got x.png"),
        (["--grid", "a.png", "--strip", "./a.png"], "--grid and --strip name the same file"),
        (["--out", "a.png", "--grid", "a.png"], "--out and --grid name the same file"),
        (["--out", "a.jpg"], "must end in .png, .npy or .npz"),
    ],
)
def test_sample_refuses_before_any_work(refused, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(sample, "load_image_network", lambda *_: pytest.fail("work was begun"))
    assert message in refused("sample", "run", *options)


def test_a_missing_pillow_is_told_before_any_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_image_network", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    out = ["--out", tmp_path / "x.npy", "--grid", tmp_path / "x.png"]
    assert "pictures take pillow" in refused("sample", "run", *out)


def test_a_folders_name_may_hold_a_dot(ncsn_fast, trained, tmp_path):
    (tmp_path / "x.jpg").mkdir()  # a folder that is there is one, whatever its name
    for name in ("samples_lr0.01", "v1.2/set", ".hidden", "x.jpg"):
        assert ncsn_fast("sample", trained, "-n", 2, "--steps", 1, "--out", tmp_path / name)[0] == 0
        assert len(list((tmp_path / name).glob("*.png"))) == 2


def test_a_folder_is_extended_and_damage_is_told(ncsn_fast, trained, tmp_path):
    command = ["sample", trained, "--batch", 4, "--steps", 1, "--out", tmp_path / "x"]
    assert ncsn_fast(*command, "-n", 6)[0] == 0
    assert ncsn_fast(*command, "-n", 9)[0] == 0
    (tmp_path / "x" / "0002.png").write_bytes(b"")
    status, _, err = ncsn_fast(*command, "-n", 9)
    assert status == 0 and "1 damaged files are drawn again: 0002.png" in err
    command[-1] = tmp_path / "y"
    assert ncsn_fast(*command, "-n", 9)[0] == 0
    x, y = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "xy")
    assert x == y and len(x) == 10


def test_cas_has_a_default_step(ncsn_fast, trained, tmp_path):
    options = ["-n", 1, "--steps", 1, "--sampler", "cas", "--out", tmp_path / "x.npy"]
    assert ncsn_fast("sample", trained, *options)[0] == 0


def test_a_model_without_a_ladder_is_one_line(refused, tmp_path):
    NCSN(in_channels=1, nf=4, num_classes=3).save_pretrained(tmp_path)
    line = refused("sample", tmp_path, "--image-size", 8, "--out", tmp_path / "x.png")
    assert "has no noise levels" in line


@pytest.mark.parametrize("kind", ["cnn", "official"])
def test_sample_from_any_network_of_images(ncsn_fast, tmp_path, kind):
    sigmas = [1.0, 0.5]
    model = ScoreCNN(1, 8, 8, sigmas=sigmas) if kind == "cnn" else NCSNv2(1, 2, 2, sigmas=sigmas)
    model.save_pretrained(tmp_path)
    out = tmp_path / "x.npy"
    more = ["--sampler", "ode"] if kind == "cnn" else ["--clip", "--strip", tmp_path / "strip.png"]
    command = ["sample", tmp_path, "-n", 3, "--steps", 1, "--image-size", 8, "--out", out, *more]
    assert ncsn_fast(*command)[0] == 0
    images, steps = np.load(out), {"n_steps_each": 1, "denoise": True, "seed": 0}
    if kind == "cnn":
        expected = model.sample(3, sampler="ode", **steps).clamp(-1, 1)
    else:  # their data are in [0, 1], and files in [-1, 1]
        expected = 2 * model.sample(3, 8, clip=True, **steps) - 1
        assert (tmp_path / "strip.png").is_file()
    np.testing.assert_allclose(images, expected.numpy(), atol=1e-5)
    assert images.min() < -0.5 and images.max() > 0.5


def test_sample_of_points_is_one_line(refused, tmp_path):
    ScoreMLP(2, sigmas=[1.0, 0.5]).save_pretrained(tmp_path)
    line = refused("sample", tmp_path, "--out", tmp_path / "x.png")
    assert "is of a ScoreMLP of points, and this command is for images" in line
