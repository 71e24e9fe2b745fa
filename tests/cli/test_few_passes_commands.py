"""``sample --passes`` and ``tune``: few passes on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ncsn_fast import NCSN
from ncsn_fast.models.sampling_settings import (
    load_sampling,
    load_tuned,
    save_sampling,
    save_tuned,
)
from ncsn_fast.sampling import auto

LADDER = [3.0 * 0.8**i for i in range(12)]
TUNED = {"sampler": "dpmpp_2m", "passes": 6, "levels": "karras"}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model"
    NCSN(in_channels=1, nf=4, num_classes=12, sigmas=LADDER).save_pretrained(path)
    return path


@pytest.fixture
def drawn(ncsn_fast, folder, tmp_path):
    """Images of a command, and what it said on stderr."""

    def run(*options):
        out = tmp_path / "x.npy"
        status, _, err = ncsn_fast(
            "sample", folder, "-n", 2, "--image-size", 4, "--out", out, *options
        )
        assert status == 0, err
        return np.load(out), err

    return run


def of_model(folder, **options):
    model = NCSN.from_pretrained(folder)
    return model.sample(2, 4, seed=0, verbose=False, clip=False, **options).clamp(-1, 1).numpy()


def assert_same(images, expected):
    np.testing.assert_allclose(images, expected, atol=1e-4)


def test_passes_alone_are_enough(drawn, folder):
    chosen = auto.choose(5, len(LADDER))
    for options in (["--passes", 5], ["--passes", 5, "--sampler", "auto"]):
        images, err = drawn(*options)
        assert_same(images, of_model(folder, **chosen))
        assert f"sampler auto: {chosen['sampler']}, passes 5" in err


def test_what_was_tuned_is_used(drawn, folder):
    plain, err = drawn("--steps", 1)
    assert "auto" not in err
    save_tuned(folder, TUNED)
    save_sampling(folder, {"n_steps_each": 1, "step_lr": 0.01, "denoise": True})
    for options in ([], ["--sampler", "auto"], ["--passes", 6]):
        images, err = drawn(*options)
        assert_same(images, of_model(folder, **TUNED))
        assert "sampler auto: dpmpp_2m, passes 6, levels karras" in err
    images, _ = drawn("--passes", 4)
    assert_same(images, of_model(folder, **auto.choose(4, len(LADDER))))
    # The documented sampler is still there, with the saved step size.
    saved = of_model(folder, n_steps_each=1, step_lr=0.01, denoise=True)
    for options in (["--sampler", "ald"], ["--steps", 1]):
        assert_same(drawn(*options)[0], saved)
    assert not np.allclose(plain, saved, atol=1e-3)


def test_mistakes(ncsn_fast, folder):
    for options, message in (
        (["--passes", 5, "--levels", "karras"], "'auto' takes passes and chooses the rest"),
        (["--passes", 5, "--steps", 3], "takes passes, and no n_steps_each"),
        (["--passes", 5, "--clip"], "clamps at the end only: it takes no --clip"),
    ):
        status, _, err = ncsn_fast("sample", folder, "--image-size", 4, *options)
        assert status == 2 and message in err.splitlines()[-1]


def test_tune_writes_what_sample_takes(ncsn_fast, folder, drawn, tmp_path):
    (folder / "image_size.json").write_text("[4, 4]\n")
    save_sampling(folder, {"n_steps_each": 1})
    rng = np.random.default_rng(0)
    np.save(tmp_path / "data.npy", rng.uniform(-1, 1, (80, 1, 4, 4)).astype(np.float32))
    command = ["tune", folder, "--data", tmp_path / "data.npy", "--passes", 4, "-n", 8]
    status, out, err = ncsn_fast(*command, "--seeds", 2)
    assert status == 0, err
    report = json.loads((folder / "tuning.json").read_text())
    best = report["candidates"][0]
    assert report["tuned on"].startswith("even images") and len(best["reported"]) == 2
    assert load_tuned(folder) == best["options"] and load_sampling(folder) == {"n_steps_each": 1}
    assert f"sample takes {best['options']['sampler']}, " in out
    images, _ = drawn("--sampler", "auto")
    assert_same(images, of_model(folder, **best["options"]))
    status, _, err = ncsn_fast(*command[:2], "--data", tmp_path / "none.npy")
    assert status == 2 and "none.npy" in err.splitlines()[-1]
