"""The quality suite: what is measured, that it goes on where it was stopped, the table, the plot, plain PyTorch."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from ncsn_fast import NCSN, cli
from ncsn_fast.benchmarks import plain_torch, quality, quality_report
from ncsn_fast.models.sampling_settings import load_tuned
from ncsn_fast.sampling.samplers import FEW_PASSES, check_options

LADDER = [3.0 * 0.8**i for i in range(12)]


def network():
    torch.manual_seed(0)
    return NCSN(
        in_channels=1,
        nf=4,
        num_classes=12,
        sigmas=LADDER,
        norm="instance++",
        dilations=(1, 1, 2, 2),
    ).eval()


@pytest.mark.parametrize("n_levels", [10, 40, None])
def test_jobs_differ_and_begin_with_what_is_compared(n_levels):
    found = list(quality.jobs(n_levels, 0.1))
    assert all(options not in found[:i] for i, options in enumerate(found))
    second = "ancestral" if n_levels == 10 else "dpmpp_2m_sde"
    assert [o["sampler"] for o in found[:3]] == ["dpmpp_2m_sde", "ald", second]
    assert found[0]["passes"] == 10
    assert quality.passes_of(found[1], n_levels or 10) == 201
    assert {o["sampler"] for o in found} == {"ald", *FEW_PASSES}
    for options in found:
        own = {k: v for k, v in options.items() if k in ("passes", "levels", "snr", "step_lr")}
        check_options(options["sampler"], own)


def test_the_networks_plain_twin_is_the_same_with_instance_norm_plus():
    model = network()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    twin = plain_torch.network_like(model)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 7])
    torch.testing.assert_close(twin(x, labels), model(x, labels), rtol=1e-4, atol=1e-4)


@pytest.fixture
def bench(capsys):
    def run(*options):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "--suite", "quality", *map(str, options)])
        return stop.value.code, "".join(capsys.readouterr())

    return run


def test_images(bench, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    network().save_pretrained(folder)
    (folder / "image_size.json").write_text("[8, 8]\n")
    few = [{"sampler": "euler", "passes": 2}, {"sampler": "heun", "passes": 3, "levels": "karras"}]
    monkeypatch.setattr(quality, "jobs", lambda *_: iter(few))
    monkeypatch.setattr(quality, "DOCUMENTED_PASSES", 12)
    command = ["--network", folder, "--samples", 4, "--out", tmp_path / "q.json"]
    command += ["--images", tmp_path]
    status, said = bench(*command, "--seeds", 1)
    assert status == 0, said
    held = json.loads((tmp_path / "q.json").read_text())
    assert [p["passes"] for p in held["points"]] == [2, 3]
    assert 0 < held["references"]["real"] < held["references"]["noise"]
    assert held["speed"]["documented_passes"] == 12 and held["speed"]["times_as_fast"] > 0
    before = held["points"]
    status, said = bench(*command, "--seeds", 2)
    assert status == 0, said
    held = json.loads((tmp_path / "q.json").read_text())
    assert held["points"][:2] == before and [p["seed"] for p in held["points"]] == [0, 0, 1, 1]
    table = (tmp_path / "q.md").read_text()
    assert "| 12 | euler | 2 |" in table and "| 12 | heun | 3 | karras |" in table
    assert "times as fast" in table and (tmp_path / "quality-digits.png").stat().st_size > 10_000
    assert load_tuned(folder) == {}
    for options, message in (
        (["--out", tmp_path / "none.json"], "got no --network"),
        (["--data", "checkerboard", "--network", folder], "give no --network"),
        (["--data", "checkerboard", "--out", tmp_path / "q.json"], "must be of checkerboard"),
    ):
        status, said = bench(*options)
        assert status == 2 and message in said.splitlines()[-1]


def test_checkerboard(bench, tmp_path):
    command = ["--data", "checkerboard", "--samples", 200, "--out", tmp_path / "c.json"]
    status, said = bench(*command, "--images", tmp_path)
    assert status == 0, said
    held = json.loads((tmp_path / "c.json").read_text())
    assert held["references"]["real"] == 0
    assert held["references"]["noise"] == pytest.approx(0.5, abs=0.01)
    assert all(p["heldout"] < 0.1 for p in held["points"] if p["passes"] >= 10)
    assert {p["options"]["sampler"] for p in held["points"]} == {"ald", *FEW_PASSES}


def test_rows_are_means_of_what_differs_in_network_and_seed(tmp_path):
    def point(network, seed, heldout, **options):
        known = {"network": network, "seed": seed, "levels": 10, "passes": 5, "samples": 100}
        return known | {"options": options, "heldout": heldout, "tuning": 1.0, "seconds": 2.0}

    points = [
        point(n, s, h, sampler="euler") for n, s, h in (("a", 0, 1), ("a", 1, 2), ("b", 0, 3))
    ]
    points.append(point("a", 0, 9, sampler="euler", levels="karras"))
    first, second = quality_report.rows({"points": points})
    assert (first["heldout"], first["heldout_spread"], first["sets"], first["networks"]) == (
        2,
        1,
        3,
        2,
    )
    assert first["seconds"] == 20  # for a thousand samples
    assert not first["noisy"]
    assert (second["heldout"], second["heldout_spread"], second["spacing"]) == (9, 0, "karras")
    # Times beside other work count only where there are no others.
    points[0] |= {"seconds": 50.0, "others": 0.5}
    first = quality_report.rows({"points": points[:3]})[0]
    assert first["seconds"] == 20 and not first["noisy"]
    (alone,) = quality_report.rows({"points": points[:1]})
    assert alone["seconds"] == 500 and alone["noisy"]
    held = {"points": points[:1], "data": "digits", "references": {"real": 1.0, "noise": 9.0}}
    quality_report.plot(held, tmp_path / "q.png")
    assert (tmp_path / "q.png").stat().st_size > 10_000
