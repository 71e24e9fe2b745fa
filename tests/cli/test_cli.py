"""The command ``ncsn-fast``: its other commands, its help, its errors, and the places that it is run in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ncsn_fast import cli, info
from ncsn_fast.cli import errors, options
from ncsn_fast.training import TrainingInterrupted

# --- schedule -------------------------------------------------------------------------------------


def test_schedule(ncsn_fast, refused, tmp_path):
    status, text, _ = ncsn_fast("schedule", "digits", "--plot", tmp_path / "ladder.png")
    assert status == 0
    assert "sigma_begin 9.63" in text and "technique 2: overlap 0.5" in text
    with Image.open(tmp_path / "ladder.png") as picture:
        assert min(picture.size) > 100
    images = np.zeros((2, 32, 32, 3), np.float32)
    images[1, :25, :25] = 1.0  # 1,875 values, a distance of 43.3
    np.save(tmp_path / "x.npy", images)
    arguments = ["schedule", tmp_path / "x.npy", "--num-classes", 232, "--sigma-end", 0.01]
    status, text, _ = ncsn_fast(*arguments)
    assert (
        status == 0
        and "sigma_begin 43.3 " in text
        and "num_classes 232 (given)" in " ".join(text.split())
    )
    assert "step_lr     6" in text and "--steps 5 --step-lr 6" in text
    assert "at least two different" in refused("schedule", _one_image(tmp_path))


def test_schedule_refuses_its_plot_before_any_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "open_images", lambda *_, **__: pytest.fail("work was begun"))
    assert "is a folder" in refused("schedule", "--plot", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot make the folder" in refused("schedule", "--plot", tmp_path / "file" / "x.png")


def _one_image(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros((1, 32, 32, 3), np.uint8))
    return tmp_path / "one.npy"


# --- demo -----------------------------------------------------------------------------------------


def test_demo_options_reach_it_and_fresh_forgets_the_network(ncsn_fast, monkeypatch, tmp_path):
    from ncsn_fast.demos import digits as demo

    asked = []
    monkeypatch.setattr(demo, "run", lambda out, **options: asked.append((out, options)))
    (tmp_path / "checkpoint.pt").write_text("of an earlier demo")
    options = ["--out", tmp_path, "--seed", 3, "--iterations", 5, "--samples", 7]
    assert ncsn_fast("demo", *options)[0] == 0
    assert (tmp_path / "checkpoint.pt").exists()
    assert ncsn_fast("demo", *options, "--fresh")[0] == 0
    assert not (tmp_path / "checkpoint.pt").exists()
    assert asked == [(tmp_path, {"seed": 3, "iterations": 5, "n_samples": 7})] * 2


def test_demo_tells_how_to_go_on(ncsn_fast, monkeypatch, tmp_path):
    from ncsn_fast.demos import digits as demo

    def run(out, **options):
        raise TrainingInterrupted(4, out / "checkpoint.pt")

    monkeypatch.setattr(demo, "run", run)
    status, _, err = ncsn_fast("demo", "--out", tmp_path)
    assert status == 130
    assert err.endswith(
        f"checkpoint written to {tmp_path}/checkpoint.pt; the same command goes on\n"
    )


# --- the rest -------------------------------------------------------------------------------------


def test_info(ncsn_fast):
    status, text, _ = ncsn_fast("info")
    assert status == 0 and "langevin_step_" in text
    status, text, _ = ncsn_fast("info", "--json")
    assert status == 0 and json.loads(text)["operators"]["cpu"]["langevin_step_"]["auto"]


def test_help_names_every_command_and_its_defaults(ncsn_fast):
    status, text, _ = ncsn_fast()
    assert status == 0
    commands = ("train", "sample", "schedule", "demo", "info")
    assert all(name in text for name in commands)
    for command in commands:
        status, text, _ = ncsn_fast(command, "--help")
        assert status == 0 and "Usage: ncsn-fast" in text
    assert "ncsn-fast: No such command 'draw'." in ncsn_fast("draw")[2]
    assert ncsn_fast("--version")[1].startswith("ncsn_fast ")


def test_without_typer_it_says_what_to_install():
    script = (
        "import sys; sys.modules['typer'] = None; from ncsn_fast.cli import main; main(['info'])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 2
    expected = 'ncsn-fast: the command line takes typer: pip install "ncsn_fast[cli]"\n'
    assert (run.stdout, run.stderr) == ("", expected)


def test_a_missing_extra_is_one_line(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    line = refused("train", "--out", tmp_path)
    assert line == 'ncsn-fast: the digits come with scikit-learn: pip install "ncsn_fast[demo]"'


# --- errors of our own, no standard streams, the environment, sources beside an installed one -----


def child(code, *arguments, cwd=None, path=None, **environment):
    """A program of its own: what it printed, and how it ended."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NCSN_FAST_BACKEND")}
    kept |= {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *(["-c", code] if code else []), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "error", [TypeError, AttributeError, KeyError, RuntimeError, AssertionError]
)
def test_an_error_of_our_own_shows_its_traceback(ncsn_fast, monkeypatch, error):
    def broken():
        raise error("a fault")

    monkeypatch.setattr(info, "collect", broken)
    status, out, err = ncsn_fast("info")
    assert status == 1 and not out
    assert "Traceback" in err and "in broken" in err
    assert err.splitlines()[-1].startswith(f"ncsn-fast: unexpected {error.__name__}, a fault of ")


def test_debug_shows_the_traceback_of_an_expected_error(ncsn_fast, monkeypatch):
    monkeypatch.delenv(errors.DEBUG, raising=False)
    assert "Traceback" not in ncsn_fast("sample", "nowhere")[2]
    monkeypatch.setenv(errors.DEBUG, "1")
    status, _, err = ncsn_fast("sample", "nowhere")
    assert status == 2 and "Traceback" in err
    assert err.splitlines()[-1].startswith("ncsn-fast: ")
    for empty in ("", "0"):
        monkeypatch.setenv(errors.DEBUG, empty)
        assert "Traceback" not in ncsn_fast("sample", "nowhere")[2]
    monkeypatch.setenv(errors.DEBUG, "0")
    assert "Traceback" in ncsn_fast("--debug", "sample", "nowhere")[2]


WINDOWED = """
import sys, torch
sys.stdout = sys.stderr = None
from ncsn_fast import NCSN, cli
from ncsn_fast.training import TrainingSettings, train
def command(*arguments):
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        return stop.code
out = sys.argv[1]
model = NCSN(in_channels=1, nf=4, num_classes=3, sigmas=[1.0, 0.3, 0.1])
model.sample(1, 4, n_steps_each=1)
train(model, torch.zeros(4, 1, 8, 8), TrainingSettings(iterations=1, batch_size=2), out)
draw = ["sample", out, "-n", "2", "--steps", "1", "--out"]
codes = [command(*draw, out + "/x.npy"), command(*draw, out + "/folder"), command("sample", "none")]
codes += [command("--help"), command("info"), command("nosuch")]
assert codes == [0, 0, 2, 0, 0, 2], codes
"""


def test_without_standard_streams(tmp_path):
    """As under pythonw."""
    (tmp_path / "windowed.py").write_text(
        f"try:\n{_indented(WINDOWED)}\nexcept BaseException:\n"
        "    import traceback\n    open(sys.argv[1] + '.log', 'w').write(traceback.format_exc())\n    raise\n"
    )
    run = child(None, tmp_path / "windowed.py", tmp_path / "run")
    log = tmp_path / "run.log"
    assert run.returncode == 0, log.read_text() if log.exists() else run.returncode
    assert (run.stdout, run.stderr) == ("", "")


def _indented(code):
    return "\n".join(f"    {line}" for line in code.splitlines())


@pytest.mark.parametrize(
    "name", ["NCSN_FAST_BACKEND", "NCSN_FAST_SIMD", "NCSN_FAST_DEBUG", "TRITON_INTERPRET"]
)
def test_a_variable_set_to_nothing_is_one_not_set(name):
    code = "import ncsn_fast; print(ncsn_fast.ops.dispatch.policy()); ncsn_fast.ops.philox_normal((1, 4), seed=0)"
    run = child(code, **{name: ""})
    assert (run.returncode, run.stdout) == (0, "{'*': 'auto'}\n"), run.stderr


def test_a_wrong_backend_of_the_environment_is_named():
    run = child("import ncsn_fast", NCSN_FAST_BACKEND="fast")
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert "NCSN_FAST_BACKEND: backend must be one of" in last and "got 'fast'" in last


# As where no editable install is: its finder would lead back to the sources under test.
PLAIN = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "_frozen" in repr(finder)]
"""
INFO = f"{PLAIN}runpy.run_module('ncsn_fast.info', run_name='__main__', alter_sys=True)"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Sources as a clone has them, nothing built, beside an installed package of that name."""
    package, folder = Path(cli.__file__).parents[1], tmp_path_factory.mktemp("clone")
    leave = shutil.ignore_patterns("*.so", "__pycache__", "benchmarks")
    shutil.copytree(package, folder / "clone" / "ncsn_fast", ignore=leave)
    (folder / "installed" / "ncsn_fast").mkdir(parents=True)
    (folder / "installed" / "ncsn_fast" / "__init__.py").write_text("")
    return folder


def test_info_says_what_hides_what(clone):
    path = str(clone / "installed")
    run = child(INFO, cwd=clone / "clone", PYTHONPATH=path)
    assert run.returncode == 0, run.stderr
    here, there = (clone / name / "ncsn_fast" for name in ("clone", "installed"))
    hides = f"imported from {here}, which hides the one installed at {there}"
    assert f"package    {hides}" in run.stdout
    assert f"cpu: the C++ extension is not beside the sources that run: {hides}" in run.stdout
    assert "python -P" in run.stdout and "-e ." in run.stdout
    alone = child(INFO, "--json", cwd=clone / "clone")
    assert json.loads(alone.stdout)["shadows"] is None
    assert "is not built" in json.loads(alone.stdout)["libraries"]["cpu"]


def test_only_bench_needs_the_benchmarks(clone):
    code = f"{PLAIN}from ncsn_fast.cli import main; main(sys.argv[1:])"
    where = clone / "clone"
    for command in ("sample", "train", "schedule", "demo", "info"):
        run = child(code, command, "--help", cwd=where)
        assert run.returncode == 0 and "Usage" in run.stdout, run.stderr
    assert "bench" in child(code, "--help", cwd=where).stdout
    run = child(code, "bench", "--quick", cwd=where)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "benchmarks" in run.stderr.splitlines()[-1]


def test_bench_has_its_own_help(ncsn_fast):
    status, out, _ = ncsn_fast("bench", "--help")
    assert status == 0 and "--report" in out and "ncsn-fast bench" in out
    status, _, err = ncsn_fast("bench", "--nosuch")
    assert status == 2 and "No such option" in err.splitlines()[-1]
