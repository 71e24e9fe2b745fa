"""The file beside a model's weights that says how its samples are drawn."""

from __future__ import annotations

import json

import pytest

from ncsn_fast import NCSN
from ncsn_fast.files import CheckpointError
from ncsn_fast.models.base import load_pretrained
from ncsn_fast.models.sampling_settings import (
    SAMPLING_NAME,
    load_sampling,
    load_tuned,
    save_sampling,
    save_tuned,
)

PAPER = {"n_steps_each": 5, "step_lr": 6.2e-6, "denoise": True}
CHOICE = {"sampler": "ancestral", "passes": 10, "corrector_steps": 1, "snr": 0.2}


def test_the_two_parts_leave_each_other_alone(tmp_path):
    assert load_sampling(tmp_path) == load_tuned(tmp_path) == {}
    save_tuned(tmp_path, CHOICE)
    assert (load_sampling(tmp_path), load_tuned(tmp_path)) == ({}, CHOICE)
    save_sampling(tmp_path, PAPER)
    assert (load_sampling(tmp_path), load_tuned(tmp_path)) == (PAPER, CHOICE)
    save_tuned(tmp_path, CHOICE | {"passes": 20})
    assert (load_sampling(tmp_path), load_tuned(tmp_path)["passes"]) == (PAPER, 20)
    save_sampling(tmp_path, {})
    assert (load_sampling(tmp_path), load_tuned(tmp_path)["passes"]) == ({}, 20)


def test_a_loaded_network_knows_its_choice(tmp_path):
    NCSN(in_channels=1, nf=4, num_classes=3, sigmas=[1.0, 0.5, 0.2]).save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).tuned == {}
    save_tuned(tmp_path, CHOICE)
    assert load_pretrained(tmp_path).tuned == NCSN.from_pretrained(tmp_path).tuned == CHOICE


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([], "it holds list"),
        ({"few_passes": []}, "few_passes must be a mapping, got list"),
        (
            {"few_passes": {"sampler": "ald", "passes": 3}},
            "sampler must be one of euler.*got 'ald'",
        ),
        ({"few_passes": {"sampler": "euler"}}, "passes must be an int"),
        ({"few_passes": {"sampler": "euler", "passes": 3, "snr": 1}}, "'euler' takes no snr"),
        ({"few_passes": {"sampler": "euler", "passes": 3, "colour": 1}}, "no sampler takes"),
    ],
)
def test_a_damaged_choice(held, message, tmp_path):
    (tmp_path / SAMPLING_NAME).write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match=message):
        load_tuned(tmp_path)


def test_no_choice_of_another_kind_is_written(tmp_path):
    with pytest.raises(ValueError, match="sampler must be one of"):
        save_tuned(tmp_path, PAPER)
    assert not (tmp_path / SAMPLING_NAME).exists()
