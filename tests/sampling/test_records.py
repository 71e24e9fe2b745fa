"""The records of the samplers: what is said of samplers elsewhere comes from them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from ncsn_fast.sampling import samplers
from ncsn_fast.sampling.samplers import OPTIONS, SAMPLERS

ROOT = Path(__file__).parents[2]
SIGMAS = [2.0, 1.2, 0.8]


def test_every_option_is_described_and_taken():
    taken = {option for sampler in SAMPLERS.values() for option in sampler.defaults}
    assert taken == set(OPTIONS)
    for sampler in SAMPLERS.values():
        for option, default in sampler.defaults.items():
            choices = OPTIONS[option].choices
            assert not choices or default in choices


def test_the_documents_table_is_that_of_the_records():
    assert samplers.markdown_table() in (ROOT / "docs" / "sampling.md").read_text()


def test_the_command_line_offers_what_the_records_say(monkeypatch):
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from ncsn_fast.cli.sample import sample_command

    app = typer.Typer(rich_markup_mode=None)
    app.command()(sample_command)
    monkeypatch.setenv("COLUMNS", "3000")
    text = " ".join(CliRunner().invoke(app, ["--help"], terminal_width=3000).output.split())
    assert "|".join(SAMPLERS) in text
    assert samplers.sampler_help() in text
    for option, known in OPTIONS.items():
        assert f"--{option.replace('_', '-')} " in text
        assert samplers.option_help(option) in text
        assert samplers.option_default(option) in text
        assert "|".join(known.choices) in text


def test_defaults_in_words():
    assert samplers.option_default("snr") == "0.16"
    assert samplers.option_default("step_lr") == "ald: 0.2 * sigma_K**2, cas: 1 * sigma_K**2"
    assert samplers.own_options("ald", SIGMAS, {})["step_lr"] == pytest.approx(0.2 * 0.8**2)
    assert samplers.option_help("step_lr").endswith("of ald, cas.")
    assert samplers.option_default("churn_max") == "none"


def test_functions_take_the_options_of_their_records():
    for sampler in SAMPLERS.values():
        parameters = inspect.signature(sampler.function).parameters
        assert set(sampler.defaults) - {"passes", "levels"} <= set(parameters)
