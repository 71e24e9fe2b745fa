"""Reports, blocks of documents and figures, from results made up here."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from ncsn_fast.benchmarks import comparisons, documents, figures, report
from ncsn_fast.benchmarks.results import NOISY, Result, Run, save

ROW = Result(
    suite="ops",
    group="cond_instance_norm_elu",
    name="forward",
    shape="8x128x32x32",
    dtype="float32",
    setting="",
    device="cpu",
    peer="eager",
    layout="contiguous",
    backend="",
    status="ok",
    note="",
    median_us=1000.0,
    q1_us=980.0,
    q3_us=1020.0,
    rounds=7,
    speedup=None,
    memory_mib=12.0,
    gb_per_s=None,
    gflop_per_s=None,
    limit_share=None,
    error=1e-7,
    out_layout="contiguous",
    graphs=None,
    threads=2,
    device_name="Some CPU",
    torch="2.13.0",
    triton="",
    ncsn_fast="0.1.0",
    commit="0123456789ab",
    date="2026-01-02",
)
GPU = {"device": "cuda", "device_name": "Some GPU", "dtype": "bfloat16"}
DEMO = {
    "frechet_samples": 1.532,
    "frechet_training": 1.237,
    "frechet_noise": 16.381,
    "nearest_samples": 2.712,
    "nearest_heldout": 2.05,
    "samples": 100,
    "iterations": 1000,
    "training_seconds": 328.7,
    "sampling_seconds": 23.5,
    "resumed": False,
    "device": "Some CPU",
    "threads": 2,
    "torch": "2.13.0",
}
NETWORK = {"suite": "model", "group": "network", "shape": "1x3x32x32", "setting": "nf=128"}
SAMPLING = {"suite": "sample", "group": "sampling", "name": "annealed Langevin"}


def row(peer: str = "eager", us: float | None = 1000.0, **fields: object) -> Result:
    """A result whose quartiles lie 2% about the median; one without a time has none of what follows from it."""
    if us is None:
        times = dict.fromkeys(("median_us", "q1_us", "q3_us", "rounds", "memory_mib"))
    else:
        times = {"median_us": us, "q1_us": 0.98 * us, "q3_us": 1.02 * us}
    return dataclasses.replace(ROW, **{"peer": peer} | times | fields)


def norm(**fields: object) -> list[Result]:
    """A case in which eager is fastest in NCHW, compile in NHWC, and ours in NHWC."""
    nhwc = {"layout": "channels_last"}
    best = {"gb_per_s": 12.5, "limit_share": 0.5, "memory_mib": 4.0}
    return [
        row("eager", 1000, **fields),
        row("compile", 600, **fields),
        row("native", 400, **fields),
        row("eager", 1200, **nhwc | fields),
        row("compile max-autotune", 500, **nhwc | fields),
        row("native", 250, **nhwc | best | fields),
    ]


def growing(axis: str) -> list[Result]:
    """The network at three sizes along an axis: the first step costs half of what is linear, the second is linear."""
    shapes = {
        "batch": [("1x3x16x16", "nf=32"), ("4x3x16x16", "nf=32"), ("16x3x16x16", "nf=32")],
        "resolution": [("1x3x16x16", "nf=32"), ("1x3x32x32", "nf=32"), ("1x3x64x64", "nf=32")],
        "width": [("1x3x16x16", "nf=32"), ("1x3x16x16", "nf=64"), ("1x3x16x16", "nf=128")],
    }
    return [
        row(peer, base * time, **NETWORK | {"shape": shape, "setting": setting})
        for (shape, setting), time in zip(shapes[axis], (1.0, 2.0, 8.0), strict=True)
        for peer, base in (("eager", 8000), ("ncsn_fast", 2000))
    ]


def sampling(*batches: int, setting: str = "nf=32 levels=10 steps=1") -> list[Result]:
    return [
        row(peer, us * n, **SAMPLING, shape=f"{n}x3x16x16", setting=setting)
        for n in batches
        for peer, us in (("eager", 9000), ("compile", 6000), ("ncsn_fast", 3000))
    ]


def run(results: list[Result]) -> Run:
    dtype = results[0].dtype if results else "float32"
    limits = {"copy GB/s": 25.0, f"matmul {dtype} GFLOP/s": 300.0}
    return Run(results, {"python": "3.12.1"}, limits, [])


def sources(*results: Result, **runs: list[Result]) -> documents.Sources:
    """What documents are filled from; ``results`` are those of a file cpu.json."""
    held = {"cpu": list(results)} | runs if results else runs
    pages = {name: f"results/{name}.md" for name in held}
    return documents.Sources({name: run(rows) for name, rows in held.items()}, pages=pages)


def lines(text: str) -> list[str]:
    """The rows of the tables in it, cells parted by single bars."""
    return [
        re.sub(r" \| ?", "|", line.strip("| ")) for line in text.splitlines() if line[:1] == "|"
    ]


# --- tables ---------------------------------------------------------------------------------------


def test_a_case_shows_the_fastest_layout_and_mode_of_each_peer():
    header, _, case = lines(report.case_table(comparisons.comparisons_of(norm())))
    columns = "shape|dtype|eager|compile|native|vs eager|vs compile|rate (of limit)"
    assert header == columns + "|peak memory (eager)"
    times = "1 ms ±0.02 NCHW|500 µs ±10 NHWC max-autotune|250 µs ±5 NHWC"
    assert case == f"forward|8x128x32x32|float32|{times}|4.0x|2.0x|12.5 GB/s (50%)|4 MiB (12)"


def test_by_layout_ours_is_compared_with_the_fastest_of_either_layout():
    _, _, nchw, nhwc = lines(report.case_table(comparisons.comparisons_of(norm()), by_layout=True))
    assert "NCHW|1 ms ±0.02|600 µs ±12|400 µs ±8|2.5x|1.2x" in nchw
    assert "NHWC|1.2 ms ±0.024|500 µs ±10 max-autotune|250 µs ±5|4.0x|2.0x" in nhwc


def test_a_noisy_figure_is_marked_wherever_it_is_used():
    quiet, noisy = row("eager", 1000), row("native", 500, status="noisy", gb_per_s=3.0)
    text = report.case_table(comparisons.comparisons_of([quiet, noisy]))
    assert "|1 ms ±0.02 NCHW|~500 µs ±10 NCHW|~2.0x|~3 GB/s|" in lines(text)[2]


def test_a_loss_is_bold():
    text = report.case_table(comparisons.comparisons_of([row("eager", 100), row("native", 200)]))
    assert "|**0.50x**|" in lines(text)[2]


def test_the_reference_is_ours_only_where_there_is_no_kernel():
    peers = [row("eager", 400), row("reference", 100), row("native", 200)]
    assert comparisons.comparisons_of(peers)[0].ours().peer == "native"
    assert comparisons.comparisons_of(peers[:2])[0].ours().peer == "reference"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"gb_per_s": 4100.0, "limit_share": 0.954}, "4.1 TB/s (95%)"),
        ({"gb_per_s": 60.0, "limit_share": 2.4}, "60 GB/s (240%)"),
        ({"gflop_per_s": 712345.0, "limit_share": 0.004}, "712 TFLOP/s (0.4%)"),
        ({"gb_per_s": 60.0}, "60 GB/s"),
        ({}, report.ABSENT),
    ],
)
def test_rates(fields, text):
    assert report.rate_cell(row(**fields)) == text


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.8642, "0.864 µs"), (999.4, "999 µs"), (999.9, "1 ms"), (12345, "12.3 ms"), (2e6, "2 s")],
)
def test_durations(us, text):
    assert comparisons.duration(us) == text


# --- the report -----------------------------------------------------------------------------------


def test_what_was_not_timed_has_no_time_and_is_listed_with_its_reason():
    results = [
        row("eager", 1000),
        row("compile", None, status="failed", note="RuntimeError: a | b <c>"),
        row("native", None, status="wrong", note="relative error 1.0e-03, tolerance 1e-05"),
        row("triton", None, status="not run", note="the 5 minutes were over"),
    ]
    text = report.render({"cpu": run(results)}, {})
    assert "|NCHW|1 ms ±0.02|failed|wrong|not run|" in lines(text)[-1] + "|"
    what = "cond\\_instance\\_norm\\_elu forward 8x128x32x32 float32"
    assert f"- **failed** {what}: compile NCHW: RuntimeError: a \\| b \\<c>" in text
    assert f"- **wrong** {what}: native NCHW: relative error 1.0e-03, tolerance 1e-05" in text
    assert f"- **not run** {what}: triton NCHW: the 5 minutes were over" in text
    assert "Cases: 1. Rows: 4 (1 ok, 1 failed, 1 wrong, 1 not run)." in text


def test_the_report_tells_of_machine_limits_warnings_and_noise():
    results = [*norm(), row("native", 300, status="noisy", shape="1x128x32x32")]
    busy = dataclasses.replace(run(results), warnings=["the machine was busy"])
    text = report.render({"cpu": busy}, {"cpu": [Path("speedup-cpu.png")]})
    for fact in ("Some CPU", "2.13.0", "0123456789ab", "2026-01-02", "3.12.1", "copy GB/s | 25"):
        assert fact in text
    assert "**Warning:** the machine was busy" in text
    assert "Cases: 2. Rows: 7 (6 ok, 1 noisy)." in text
    assert "faster than the fastest eager peer in 1 of 1 where both were timed" in text
    assert "![Speed-up over eager PyTorch](speedup-cpu.png)" in text
    assert "How to read this" in text and "None: every peer" in text


def test_a_file_without_results_says_so():
    assert "This file holds no results." in report.render({"cpu": Run([])}, {})


# --- blocks ---------------------------------------------------------------------------------------


def block(name: str, text: str = "") -> str:
    return f"<!-- begin {name} -->\n{text}<!-- end {name} -->"


def test_fill_changes_blocks_alone_and_is_idempotent():
    stale = "stale\n"
    text = f"before `<!-- begin x -->`\n\n{block('operators', stale)}\nafter\n"
    once = documents.fill(text, sources(*norm()))
    assert once.startswith("before `<!-- begin x -->`\n\n<!-- begin operators -->\n|  | shape |")
    assert once.endswith("<!-- end operators -->\nafter\n") and "stale" not in once
    assert "(Some CPU, 2 threads, torch 2.13.0, 2026-01-02" in once
    assert "; all cases: [cpu](results/cpu.md))" in once
    assert documents.fill(once, sources(*norm())) == once


def test_an_unknown_block_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="'norms'.*demo, points, summary, headline, operators"):
        documents.fill(block("norms"), documents.Sources())
    with pytest.raises(ValueError, match="'network' does not end"):
        documents.fill("<!-- begin network -->\n", documents.Sources())
    with pytest.raises(ValueError, match="'network' does not end"):
        documents.fill(f"<!-- begin network -->\n{block('network')}", documents.Sources())


@pytest.mark.parametrize("name", documents.BLOCKS)
@pytest.mark.parametrize("results", [None, []])
def test_a_block_without_cases_says_so_in_a_line(name, results):
    held = sources() if results is None else sources(cpu=results)
    text = documents.BLOCKS[name](held)
    assert text.startswith("Not measured yet") and "\n" not in text


def test_the_demo_block():
    text = documents.demo(documents.Sources(demo=DEMO))
    assert lines(text)[2:] == ["samples|1.53|2.71", "real digits|1.24|2.05", "uniform noise|16.4"]
    assert "1000 training steps in 329 s, sampled in 24 s; Some CPU, 2 threads" in text
    with pytest.raises(ValueError, match="resumed"):
        documents.demo(documents.Sources(demo=DEMO | {"resumed": True}))


def test_the_points_block():
    run = {"sigmas": [5.0, 0.02], "relative_error_by_level": [0.025, 0.36], "samples": 2000}
    run |= {"training_seconds": 31.4, "sampling_seconds": 2.04}
    board = {"share_in_dark_squares": 0.951, "share_in_dark_squares_of_data": 1.0}
    modes = {"mode_weights": [0.515, 0.485], "mode_weights_of_data": [0.5, 0.5]}
    held = documents.Sources(points={"demo-b": run | modes, "demo-a": run | board})
    first, second = documents.points(held).split("demo-a.json")
    assert lines(first)[:3:2] == ["sigma|5|0.02", "error of the score|2.5%|36.0%"]
    assert "2000 samples in the dark squares: 95.1%; of the data: 100.0%" in first
    assert "either Gaussian: 51.5%, 48.5%; of the data: 50.0%, 50.0%" in second


def test_the_summary_is_one_table_with_the_ends_of_the_batches_of_each_work_on_each_device():
    cpu = [r for n in (1, 8, 32) for r in norm(shape=f"{n}x128x32x32")]
    cpu += norm(shape="64x32x8x8")  # not a size of the documented network
    more = [*norm(**NETWORK), *norm(suite="model", group="RCUBlock")]
    gpu = [*norm(**GPU), *norm(**GPU | {"dtype": "float32"})]
    text = documents.summary(sources(*cpu, more=more, gpu=gpu))
    gains, none = "4.0x|2.0x", f"|{report.ABSENT}" * 3
    assert lines(text)[2:] == [
        "**Some CPU, 2 threads, float32**",
        f"`network` forward|1|{gains}{none}",
        f"`cond_instance_norm_elu` forward|1|{gains}|32|{gains}",
        "**Some GPU, bfloat16**",
        f"`cond_instance_norm_elu` forward|8|{gains}{none}",
        "**Some GPU, float32**",
        f"`cond_instance_norm_elu` forward|8|{gains}{none}",
    ]
    assert (
        "All cases: [cpu](results/cpu.md), [more](results/more.md), [gpu](results/gpu.md)." in text
    )


def test_other_blocks_show_the_smallest_and_the_largest_batch_of_their_works():
    held = sources(
        *(r for n in (1, 8, 32) for r in norm(shape=f"{n}x128x32x32")),
        *norm(group="norm_elu_conv3x3", setting="dilation=4"),
        *norm(suite="train", group="training", name="step"),
        *norm(suite="model", group="RCUBlock"),
        network=norm(**NETWORK),
        loops=sampling(1, 4, 16),
    )
    found = {name: lines(block(held))[2:] for name, block in documents.BLOCKS.items()}
    works = {n: [tuple(row.split("|")[:2]) for row in rows] for n, rows in found.items()}
    assert works["operators"] == [
        ("`cond_instance_norm_elu` forward", "1x128x32x32"),
        ("`cond_instance_norm_elu` forward", "32x128x32x32"),
        ("`norm_elu_conv3x3` forward", "8x128x32x32"),
    ]
    times = "1 ms|500 µs|250 µs|4.0x|2.0x|12.5 GB/s (50%)|4 MiB (12)"
    assert found["operators"][2].endswith(f"|float32 dilation=4|{times}")
    groups = [work.split("`")[1] for work, _ in works["network"]]
    assert groups == ["RCUBlock", "network", "training"]
    assert [shape for _, shape in works["sampling"]] == ["1x3x16x16", "16x3x16x16"]
    assert "all cases: [loops](results/loops.md))" in documents.BLOCKS["sampling"](held)


def test_the_block_of_engines_has_their_times_over_ours_and_the_errors():
    peers = [
        row("eager", 4000, **NETWORK),
        row("ncsn_fast", 1000, **NETWORK, error=1e-5),
        row("ncsn_fast", 1250, **NETWORK, layout="channels_last"),
        row("openvino", 500, **NETWORK, backend="openvino 2026.4.1"),
        row("ncnn", 1500, **NETWORK, backend="ncnn 1.0", status=NOISY, error=4e-5),
        row("mnn", None, **NETWORK, status="wrong"),
    ]
    others = norm(**NETWORK | {"shape": "16x3x32x32"})  # measured without engines
    text = documents.BLOCKS["engines"](sources(*peers, *others))
    header, _, *rows = lines(text)
    assert header == "shape||ours|eager|openvino|ncnn"
    ratios = "4.0x (1e-07)|**0.50x** (1e-07)|~1.5x (4e-05)"
    assert rows == [f"1x3x32x32|nf=128|1 ms (1e-05)|{ratios}"]
    assert "; ncnn 1.0, openvino 2026.4.1; all rows: [cpu](results/cpu.md))" in text


def test_a_block_tells_of_devices_without_its_cases():
    text = documents.BLOCKS["sampling"](sources(*sampling(1), gpu=norm(**GPU)))
    assert text.endswith("Not measured yet on Some GPU.")


def test_a_short_table_says_why_there_is_no_time():
    peers = [row("eager", 1000), row("compile", None, status="wrong"), row("native", None)]
    text = report.short_table(comparisons.comparisons_of(peers))
    assert lines(text)[2].endswith("|1 ms|wrong")


# --- growth ---------------------------------------------------------------------------------------


def growth(results: list[Result]) -> str:
    return "\n\n".join(report.growth_tables(run(results)))


def test_growth_is_marked_where_it_stops_being_linear():
    text = growth(growing("batch"))
    assert "**network forward, by batch** (float32, 16x16, nf=32)" in text
    assert lines(text)[0] == "batch|eager, per image|of linear|ncsn_fast, per image|of linear"
    assert lines(text)[2:] == [
        "1|8 ms|1.0|2 ms|1.0",
        "4|4 ms|0.50 ↓|1 ms|0.50 ↓",
        "16|4 ms|0.50|1 ms|0.50",
    ]


@pytest.mark.parametrize("axis", ["resolution", "width"])
def test_work_grows_with_the_square_of_resolution_and_width(axis):
    text = growth(growing(axis))
    assert f"by {axis}** (float32, " in text
    assert [line.split("|")[2] for line in lines(text)[2:]] == ["1.0", "0.50 ↓", "0.50"]


def test_sampling_is_per_image_and_step():
    results = [r for n in (5, 10, 20) for r in sampling(2, setting=f"nf=32 levels={n} steps=2")]
    text = growth(results)
    assert "by levels** (float32, 16x16, batch=2, steps=2, nf=32)" in text
    assert lines(text)[0].startswith("levels|eager, per image and step|of linear|compile")
    # The same time at twice the levels: half of what is linear.
    assert lines(text)[3].startswith("10|450 µs|0.50 ↓|")


def test_two_sizes_are_no_growth():
    assert growth(sampling(1, 4)) == ""


# --- files and figures ----------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """A results folder: a CPU, a GPU, the demo, and what is neither."""
    folder = tmp_path / "results"
    folder.mkdir()
    cpu = [*norm(), *growing("batch"), *sampling(1, 4)]
    gpu = [dataclasses.replace(r, **GPU) for r in norm()]
    save(run(gpu), folder / "a-gpu.json")
    save(run(cpu), folder / "cpu.json")
    (folder / "demo-digits.json").write_text(json.dumps(DEMO))
    (folder / "demo-points.json").write_text('{"relative_error_by_level": [0.1]}')
    (folder / "a-gpu-info.json").write_text('{"devices": []}')
    (folder / "a-gpu-check.json").write_text('{"build": {"status": 0}}')
    return folder


def change(path: Path, **fields: object) -> None:
    """Changes the fastest row of ours of the first case in a file."""
    held = json.loads(path.read_text())
    held["results"][5] |= fields
    path.write_text(json.dumps(held))


def test_sources_are_told_by_what_they_hold(results):
    held = documents.Sources.load(sorted(results.iterdir()))
    assert list(held.runs) == ["cpu", "a-gpu"]  # CPUs first
    assert held.demo["samples"] == 100
    assert list(held.points) == ["demo-points"]
    (results / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json"):
        documents.Sources.load(results.glob("*.json"))


def test_a_report_of_two_devices(results, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    written = report.write([results / "a-gpu.json", results / "cpu.json"], out)
    kinds = ("speedup", "roofline", "scaling", "sampling")
    expected = ["report.md", *(f"{kind}-cpu.png" for kind in kinds)]
    expected += ["speedup-a-gpu.png", "roofline-a-gpu.png"]
    assert [path.relative_to(out).as_posix() for path in written] == expected
    text = written[0].read_text(encoding="utf-8")
    assert text.index("## `cpu`: Some CPU, 2 threads") < text.index("## `a-gpu`: Some GPU")
    assert all(f"]({name})" in text for name in expected[1:])
    held = documents.Sources.load(results.glob("*.json")).runs
    for path in written[1:]:
        kind, _, name = path.stem.partition("-")
        assert figures.fingerprint_in(path) == figures.fingerprint(kind, held[name])
    assert len({figures.fingerprint_in(path) for path in written[1:]}) == len(expected) - 1


def test_files_that_hold_no_results_or_share_a_name_are_refused(results, tmp_path):
    with pytest.raises(ValueError, match="demo-digits.json"):
        report.write([results / "demo-digits.json"], tmp_path)
    with pytest.raises(ValueError, match="named cpu"):
        report.write([results / "cpu.json", results / "cpu.csv"], tmp_path)


def test_a_csv_has_no_limits():
    text = report.render({"cpu": Run(norm())}, {})
    assert "limits | not in this file" in text


def test_update_writes_what_is_out_of_date_and_check_only_tells(results, tmp_path):
    pytest.importorskip("matplotlib")
    document, images = tmp_path / "docs" / "page.md", tmp_path / "docs" / "images"
    document.parent.mkdir()
    shown = "![s](images/speedup-cpu.png) ![d](images/digits.png) ![o](https://x.org/speedup-a.png)"
    document.write_text(f"# Speed\n\n{block('operators')}\n\n{shown}\n")
    picture = images / "speedup-cpu.png"

    def update(check: bool) -> list[Path]:
        return documents.update([document], results.glob("*.json"), images, check)

    before = document.read_text()
    page, other = results / "cpu.md", results / "a-gpu.md"
    assert update(check=True) == [document, picture, page, other]
    assert document.read_text() == before and not images.exists() and not page.exists()
    assert update(check=False) == [document, picture, page, other]
    text = document.read_text(encoding="utf-8")
    assert "| 250 µs |" in text and "[cpu](../results/cpu.md)" in text
    assert update(check=True) == update(check=False) == []
    raw = page.read_text(encoding="utf-8")
    assert "network forward, by batch" in raw and "Some GPU" not in raw
    assert "|NHWC|1.2 ms ±0.024|500 µs ±10 max-autotune|250 µs ±5|" in "".join(lines(raw))

    change(results / "cpu.json", memory_mib=5.0)  # in the tables, not in the figure
    assert update(check=True) == [document, page]
    change(results / "cpu.json", median_us=200.0)
    assert update(check=False) == [document, picture, page]
    assert "200 µs" in document.read_text(encoding="utf-8")

    made = picture.stat().st_mtime_ns
    change(results / "cpu.json", commit="ba9876543210")
    assert update(check=False) == []  # the block names the commit of the first row
    assert picture.stat().st_mtime_ns == made
    picture.unlink()
    assert update(check=True) == [picture]
    page.write_text("changed by hand")
    assert update(check=True) == [picture, page]


def test_a_document_may_not_show_what_no_results_give(results, tmp_path):
    document = tmp_path / "README.md"
    document.write_text("![x](docs/images/scaling-a-gpu.png)")
    with pytest.raises(ValueError, match=r"README.md shows scaling-a-gpu.png.*speedup-cpu.png"):
        documents.update(
            [document], results.glob("*.json"), tmp_path / "docs" / "images", check=True
        )


def test_a_fingerprint_is_of_what_is_plotted():
    before = figures.fingerprint("speedup", run(norm()))
    assert figures.fingerprint("speedup", run(norm(commit="another", error=1.0))) == before
    assert figures.fingerprint("speedup", run(norm(status="noisy"))) != before
    assert figures.fingerprint("speedup", run(norm(median_us=77.0))) != before
    assert figures.fingerprint("roofline", run(norm())) != before
    assert figures.fingerprint("scaling", run(norm())) is None


def test_a_figure_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing for the figure 'sampling'"):
        figures.plot("sampling", run(norm()), tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["speedup", "roofline"])
def test_figures_of_many_dtypes_losses_and_noise_are_plotted(kind, tmp_path):
    pytest.importorskip("matplotlib")
    other = norm(dtype="bfloat16", status="noisy", gb_per_s=90.0, limit_share=3.6)
    loss = [row("eager", 100, group="x"), row("a stranger", 300, group="x", setting="odd")]
    path = figures.plot(kind, run([*norm(), *other, *loss]), tmp_path / f"{kind}.png")
    assert path.read_bytes().startswith(b"\x89PNG") and figures.fingerprint_in(path)


def test_a_picture_of_another_origin_carries_no_hash(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("L", (2, 2)).save(tmp_path / "x.png")
    assert figures.fingerprint_in(tmp_path / "x.png") is None
    assert figures.fingerprint_in(tmp_path / "absent.png") is None
