"""``ncsn-fast bench``: options, the live table, and which work they ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError:  # the command line says so
    typer = None

if TYPE_CHECKING:
    from .results import Change, Result, Run
    from .suite import Case, Settings

INSTALL = 'pip install "ncsn_fast[bench]"'
# A limit that moved by more between the start and the end of a run: the machine changed its speed.
LIMIT_DRIFT = 0.2
QUALITY = "quality"  # a suite of its own kind
WIDTH = 120  # of tables that go to a file or a pipe
HOW_TO_READ = """\
time      median of interleaved rounds, ± half the distance between the quartiles
vs eager  times as fast as PyTorch without compiling, in the faster of its two memory layouts
rate      bytes that must move, or arithmetic of the direct algorithm, a second
limit     the rate, as a share of a large copy or matrix product measured in this run
          (above 100%: the data stayed in a cache, or the algorithm does less arithmetic)
memory    the most that a call held beyond its inputs
error     relative L2 distance from a float64 evaluation
~         noisy: other work disturbed the machine, or the rounds differ much; do not trust it"""


def bench_command(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Results, of --report and --compare.")
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="ops, model, train or sample; may be repeated. Or quality, alone: distances to data, by --network.",
            show_default="all but quality",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float32, bfloat16 or float16; may be repeated.",
            show_default="float32 on a CPU, bfloat16 and float32 on a GPU",
        ),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes, such as 1,16.", show_default="the case's own")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few representative shapes.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled/--no-compiled", help="With the peers under torch.compile.")
    ] = True,
    peers: Annotated[
        bool, typer.Option("--peers", help="The network also in inference engines (CPU).")
    ] = False,
    match: Annotated[
        str | None, typer.Option(help="Only cases whose label holds this text.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Start no case after this time; say which were left out.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Results: this .json and the .csv beside it; or, of --report, a folder."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write tables and plots from results FILES.")
    ] = False,
    document: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --report: write the marked blocks of this Markdown file anew; may be repeated."
        ),
    ] = None,
    images: Annotated[
        Path, typer.Option(help="With --document: the folder of the pictures that they show.")
    ] = Path("docs/images"),
    check: Annotated[
        bool, typer.Option("--check", help="With --document: only say what is out of date.")
    ] = False,
    network: Annotated[
        list[Path] | None,
        typer.Option(help="Of quality: folder of a trained network; may be repeated."),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Of quality: the training images, as of train, or checkerboard.")
    ] = "digits",
    heldout: Annotated[
        str | None,
        typer.Option(help="Of quality: other images.", show_default="of the digits theirs"),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Of quality: how many a distance.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Of quality: sets of samples a network.")] = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="What changed between two results FILES.")
    ] = False,
) -> None:
    """Measure operators, network, training and sampling beside eager PyTorch and torch.compile."""
    _require()
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    files = files or []
    if compare:
        from .results import compare as changes
        from .results import load

        if len(files) != 2:
            raise ValueError(f"--compare takes two results files, got {len(files)}")
        _print_changes(console, changes(*(load(path).results for path in files)))
    elif report:
        if not files:
            raise ValueError("--report takes results files, got none")
        _report(console, files, document or [], images, out, check=check)
    elif suite == [QUALITY]:
        from ncsn_fast.cli.options import choose_device

        from . import quality_command

        quality_command.run(
            network or [],
            data,
            heldout,
            samples=samples,
            seeds=seeds,
            minutes=minutes,
            out=out or Path(f"quality-{Path(data).stem}.json"),
            picture=images / f"quality-{Path(data).stem}.png" if images.is_dir() else None,
            device=choose_device(device),
            say=lambda line: console.print(line, highlight=False),
        )
    elif files:
        raise ValueError(f"files go with --report or --compare, got {files[0]}")
    else:
        settings = settings_of(device, dtype, batch, quick=quick, compiled=compiled, engines=peers)
        _measure(console, settings, suites_of(suite), match, minutes, out)


def settings_of(
    device: str,
    dtypes: Sequence[str] | None,
    batches: str | None,
    *,
    quick: bool,
    compiled: bool = True,
    engines: bool = False,
) -> Settings:
    """The settings that options ask for.

    Raises:
        ValueError: an unknown device or dtype, batch sizes that are not positive integers, or engines on a GPU.
    """
    from ncsn_fast.cli.options import choose_device, integers

    from .suite import DEFAULT_DTYPES, DTYPES, Settings

    where = choose_device(device)
    if engines and where.type != "cpu":
        raise ValueError(f"--peers are engines for a CPU, got device {str(where)!r}")
    names = dtypes or DEFAULT_DTYPES[where.type]
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    names = tuple(dict.fromkeys(names))
    sizes = None if batches is None else tuple(dict.fromkeys(integers("batch", batches)))
    if sizes is not None and min(sizes) < 1:
        raise ValueError(f"batch sizes must be at least 1, got {batches!r}")
    return Settings(where, tuple(DTYPES[name] for name in names), sizes, quick, compiled, engines)


def suites_of(names: Sequence[str] | None) -> tuple[str, ...]:
    """The suites of an option, all if it was not given; ValueError if there is none of a name."""
    from .suite import SUITES

    for name in names or ():
        if name not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    return tuple(names or SUITES)


def _require() -> None:
    for package in ("rich", "psutil"):
        try:
            __import__(package)
        except ImportError as error:
            raise ImportError(f"the benchmarks take {package}: {INSTALL}") from error


# --- measuring ------------------------------------------------------------------------------------


def _measure(
    console: Any,
    settings: Settings,
    suites: tuple[str, ...],
    match: str | None,
    minutes: float | None,
    out: Path | None,
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import suite
    from .results import Run, machine, save

    cases = [
        case
        for case in suite.find_cases(settings, suites)
        if match is None or match in f"{case.suite} {case.label}"
    ]
    if not cases:
        raise ValueError(f"no case of {', '.join(suites)} holds {match!r} in its label")
    if out is not None:
        if out.suffix not in (".json", ".csv"):
            raise ValueError(f"--out must end in .json or .csv, got {out}")
        out.parent.mkdir(parents=True, exist_ok=True)
    bench = suite.start(settings.device, settings.dtypes, quick=settings.quick)
    facts = bench.facts
    threads = f", {facts['threads']} threads" if settings.device.type == "cpu" else ""
    console.print(f"{facts['device_name']}{threads}; torch {facts['torch']}; {len(cases)} cases")
    console.print(f"limits: {_limits(bench.limits)}")
    console.print(HOW_TO_READ, style="dim", highlight=False)

    run = Run([], machine(), bench.limits)
    columns = (
        TextColumn("{task.fields[what]}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(cases), what="")

            def tell(case: Case, what: str) -> None:
                progress.update(task, what=f"{case.label}: {what}")

            for case, results in suite.run_all(bench, cases, minutes, tell):
                run.results.extend(results)
                progress.console.print(_case_table(case, results))
                progress.advance(task)
                if out is not None:
                    save(run, out)  # after every case: nothing is lost to an interruption
    finally:
        _conclude(console, bench, settings, run, out)


def _conclude(console: Any, bench: Any, settings: Settings, run: Run, out: Path | None) -> None:
    """The limits once more, and what a reader should know before using the figures."""
    from . import suite
    from .results import OK, save

    if not run.results:
        return
    again = suite.measure_limits(bench.clock, settings.dtypes)
    for name, limit in bench.limits.items():
        if abs(again[name] / limit - 1) > LIMIT_DRIFT:
            run.warnings.append(
                f"the machine changed its speed: {name} was {limit:g} at the start, {again[name]:g} at the end"
            )
    untrusted = [r for r in run.results if r.status != OK]
    for status in dict.fromkeys(r.status for r in untrusted):
        rows = [r for r in untrusted if r.status == status]
        console.print(f"{status}: {len(rows)} of {len(run.results)} rows", style="bold")
    for warning in run.warnings:
        console.print(f"warning: {warning}", style="bold", highlight=False)
    if out is not None:
        for path in save(run, out):
            console.print(f"results: {path}", highlight=False)


def _limits(limits: dict[str, float]) -> str:
    return ", ".join(
        f"{name.rsplit(' ', 1)[0]} {value:.4g} {name.rsplit(' ', 1)[1]}"
        for name, value in limits.items()
    )


def _case_table(case: Case, results: list[Result]) -> Any:
    """One case: its peers, the fastest first; below them what is wrong or noisy, and why."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from .comparisons import digits, duration
    from .results import OK

    table = Table(
        title=f"{case.suite}: {case.label}", title_justify="left", title_style="bold", box=None
    )
    table.add_column("peer")
    table.add_column("layout")
    table.add_column("ran")
    for name in ("time", "vs eager", "rate", "limit", "memory", "error"):
        table.add_column(name, justify="right")
    failures = [r for r in results if not r.timed]
    timed = sorted((r for r in results if r.timed), key=lambda r: r.median_us)
    for r in timed:
        mark = "" if r.status == OK else "~"
        rate = f"{digits(r.gflop_per_s)} GFLOP/s" if r.gflop_per_s else f"{digits(r.gb_per_s)} GB/s"
        table.add_row(
            r.peer,
            r.layout,
            shortened(r.backend),
            f"{mark}{duration(r.median_us)} ± {r.spread_us / r.median_us:.0%}",
            "" if r.speedup is None else f"{r.speedup:.2f}x",
            rate,
            f"{r.limit_share:.0%}",
            "" if r.memory_mib is None else f"{r.memory_mib:.1f} MiB",
            "" if r.error is None else f"{r.error:.0e}",
            style="yellow" if mark else None,
        )
    lines: list[Any] = [table]
    lines += [Text(f" {r.peer} {r.layout} {r.status}: {r.note}", style="red") for r in failures]
    loads = {part for r in timed for part in r.note.split("; ") if part.startswith("other")}
    lines += [Text(f" ~ {load}", style="yellow") for load in sorted(loads)]
    return Group(*lines, "")


def shortened(backend: str) -> str:
    return backend if len(backend) < 24 else backend[:21] + "..."


# --- reading --------------------------------------------------------------------------------------


def _report(
    console: Any,
    files: list[Path],
    documents: list[Path],
    images: Path,
    out: Path | None,
    *,
    check: bool,
) -> None:
    from . import documents as project
    from . import report

    if documents:
        stale = project.update(documents, files, images=images, check=check)
        for path in stale:
            console.print(f"{'out of date' if check else 'written'}: {path}", highlight=False)
        if check and stale:
            raise typer.Exit(1)
        return
    for path in report.write(files, out or Path("bench_report")):
        console.print(f"written: {path}", highlight=False)


def _print_changes(console: Any, changes: list[Change]) -> None:
    """A table of what is faster, slower, new or gone; what stayed the same is counted."""
    from collections import Counter

    from rich.table import Table

    from .comparisons import duration

    table = Table(box=None)
    for name in ("case", "peer", "layout"):
        table.add_column(name)
    for name in ("before", "after", "after/before", "beyond the spread", ""):
        table.add_column(name, justify="right")
    verdicts = Counter(change.verdict for change in changes)
    for change in sorted(changes, key=lambda c: -(abs((c.ratio or 1.0) - 1))):
        if change.verdict == "same":
            continue
        row = dataclasses.asdict(change.after or change.before)
        case = " ".join(
            str(row[k]) for k in ("group", "name", "shape", "dtype", "setting") if row[k]
        )
        times = (
            "" if r is None or not r.timed else duration(r.median_us)
            for r in (change.before, change.after)
        )
        beyond = change.beyond_spread
        table.add_row(
            case,
            row["peer"],
            row["layout"],
            *times,
            "" if change.ratio is None else f"{change.ratio:.2f}",
            ""
            if beyond is None
            else f"{'+' if beyond > 0 else '-' if beyond < 0 else ''}{duration(abs(beyond))}",
            change.verdict,
        )
    console.print(table)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
