"""The page about a run, and the options of ``train`` that fill it."""

from __future__ import annotations

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from ncsn_fast import cli
from ncsn_fast.plots import run_page
from ncsn_fast.training import read_log
from ncsn_fast.training.checkpoints import load_checkpoint

SMALL = ["--nf", "4", "--num-classes", "3", "--sigma-begin", "1", "--sigma-end", "0.1"]
SMALL += ["--batch", "4", "--lr-schedule", "constant", "--device", "cpu"]


def command(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 20 steps in two parts, the second with nothing said but its folder."""
    out = tmp_path_factory.mktemp("report") / "a <b> & run"
    watched = ["--held-out", "0.02", "--evaluate-every", "10", "--samples-every", "10"]
    assert not command("train", "--out", out, "--iterations", 10, *watched, *SMALL)
    assert not command("train", "--out", out, "--iterations", 20, "--resume", "--device", "cpu")
    return out


class Page(html.parser.HTMLParser):
    """The tags of a page, each with its attributes, and its text; every tag must be closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def rows(text):
    return dict(re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", text))


def test_the_page_of_a_run(trained):
    assert not command("report", trained)
    text = (trained / "report.html").read_text()
    page = Page(text)
    assert "a <b> & run" in page.text  # escaped
    # Nothing is fetched: every address is within the page.
    addresses = [
        v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href")
    ]
    assert addresses and all(a.startswith(("data:image/", "#")) for a in addresses)
    assert not page.all("script") and not page.all("link") and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    shown = [a for a in page.all("img") if a["alt"].startswith("samples")]
    assert [a["alt"] for a in shown] == ["samples after step 10", "samples after step 20"]
    for step, attributes in zip((10, 20), shown, strict=True):
        png = base64.b64decode(attributes["src"].split(",", 1)[1])
        assert png == (trained / "samples" / f"step_{step:08d}.png").read_bytes()
        assert Image.open(io.BytesIO(png)).size[0] > 8 * 8
    assert [a["aria-label"] for a in page.all("svg")] == [
        "training loss",
        "held-out loss of some levels over the steps",
        "held-out loss by level at some steps",
    ]
    known = rows(text)
    assert known["nf"] == "4" and known["held_out"] == "0.02" and known["samples_every"] == "10"
    machine = read_log(trained / "log.jsonl")[0]["machine"]
    assert known["torch"] == machine["torch"] and known["started after step"] == "0, 10"
    last = read_log(trained / "log.jsonl")[-1]["held_out"]
    assert known["σ = 0.1"] == f"{last['loss_by_level'][-1]:.4g}"


def test_what_is_held_out_is_not_trained_on(trained):
    """0.02 of the digits; the checkpoint knows how many are left, and the held-out loss is measured as asked."""
    whole = trained.parent / "whole"
    assert not command("train", "--out", whole, "--iterations", 10, *SMALL)
    left, all_of_them = (
        load_checkpoint(out / "checkpoint.pt").data["shape"][0] for out in (trained, whole)
    )
    assert left == all_of_them - round(0.02 * all_of_them)
    records = read_log(trained / "log.jsonl")
    assert [r["step"] for r in records if "held_out" in r] == [10, 20]
    assert not [r for r in read_log(whole / "log.jsonl") if "held_out" in r]
    assert not (whole / "samples").exists()
    assert not command("report", whole, "--out", whole.parent / "bare.html")
    text = (whole.parent / "bare.html").read_text()
    assert len(Page(text).all("svg")) == 1
    assert "train with --held-out" in text and "train with --samples-every" in text


def test_held_out_data_of_their_own(trained, capsys):
    out = trained.parent / "others"
    held = ["--held-out", "digits:heldout"]
    assert not command("train", "--out", out, "--iterations", 5, *held, *SMALL)
    found = [r for r in read_log(out / "log.jsonl") if "held_out" in r]
    assert [r["step"] for r in found] == [5] and len(found[0]["held_out"]["loss_by_level"]) == 3
    # A share of the data that are trained on cannot come later.
    how = ["--resume", "--iterations", "6", "--held-out", "0.1", "--device", "cpu"]
    assert command("train", "--out", out, *how) == 2
    assert "another data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--held-out", "1.5"], "held_out must be a share in (0, 1), or a path, got 1.5"),
        (["--held-out", "nosuch"], "nosuch"),
        (["--evaluate-every", "5"], "evaluate_every takes held-out data"),
        (["--samples-every", "0"], "samples_every must be an int >= 1"),
    ],
)
def test_mistakes(tmp_path, capsys, given, message):
    assert command("train", "--out", tmp_path / "run", *given, *SMALL) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert command("report", tmp_path) == 2
    assert "holds no run: there is no" in capsys.readouterr().err
    (tmp_path / "losses.csv").write_text("step,loss,learning_rate\n")
    assert command("report", tmp_path) == 2
    assert "holds no losses yet" in capsys.readouterr().err


def test_a_long_run_makes_no_large_page():
    """Of a hundred thousand steps, 200 levels and 1000 pictures: a few hundred points, some levels and 12 pictures."""
    losses = (1 + np.random.default_rng(0).random(100_000)).tolist()
    sigmas = np.geomspace(50, 0.01, 200).tolist()
    found = {"loss": 0.5, "loss_by_level": [0.5] * 200, "sigmas": sigmas}
    records = [{"step": step, "held_out": found} for step in range(1, 50)]
    pictures = [(step, b"%d" % step) for step in range(1000)]
    text = run_page("long", losses=losses, records=records, pictures=pictures)
    page = Page(text)
    assert len(text) < 400_000
    steps = [int(a["alt"].split()[-1]) for a in page.all("img")]
    assert len(steps) == 12 and (steps[0], steps[-1]) == (0, 999)
    assert "σ = 50" in text and "σ = 0.01" in text


def test_losses_that_are_not_finite_are_gaps():
    found = {"loss": None, "loss_by_level": [None, 0.5], "sigmas": [1.0, 0.1]}
    text = run_page("gaps", losses=[1.0], records=[{"step": 1, "held_out": found}])
    assert "<td>not finite</td>" in text and len(Page(text).all("svg")) == 3
    with pytest.raises(ValueError, match="losses must hold at least one number"):
        run_page("none", losses=[])


def test_colours_are_the_style_sheets():
    """So that both themes can be read: no colour of a figure is fixed, and each variable is in both."""
    text = run_page("colours", losses=[3.0, 2.0, 1.0])
    sheet, figures = text.split("</style>", 1)
    assert not re.search(r"(fill|stroke): ?#", figures)
    light, dark = sheet.split("@media")
    for variable in set(re.findall(r"var\((--[\w-]+)\)", text)):
        assert f"{variable}:" in light and f"{variable}:" in dark
