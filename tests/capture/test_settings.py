"""Which settings of a trainer are recorded: each field of each config class is, or is left out for a reason."""

# ruff: noqa: NPY002 - numpy's legacy generator is the one that libraries seed

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from support.trl_classes import config_classes

from rlhf_audit_nb.capture.settings import (
    HYPERPARAMETERS,
    LEFT_OUT,
    LONGEST,
    RECORDED,
    generators,
    hyperparameters,
    unchanged,
)


def fields() -> dict[str, set[str]]:
    """Every field of every config class, with the classes that have it."""
    found: dict[str, set[str]] = {}
    for path, kind in config_classes().items():
        for field in dataclasses.fields(kind):
            found.setdefault(field.name, set()).add(path)
    return found


def arguments(**settings):
    from trl import GRPOConfig

    return GRPOConfig(output_dir="/tmp/somewhere", use_cpu=True, bf16=False, report_to=[], **settings)


def test_every_field_of_every_config_class_is_recorded_or_left_out_for_a_reason():
    known = {*RECORDED, *LEFT_OUT}
    assert {name: paths for name, paths in fields().items() if name not in known} == {}
    assert len(config_classes()) > 20
    assert all(LEFT_OUT.values())


def test_no_field_is_both():
    assert not set(RECORDED) & set(LEFT_OUT)
    assert len(RECORDED) == len(set(RECORDED))


def test_nothing_is_listed_that_no_config_has():
    older = {"warmup_ratio", "reference_free", "rpo_alpha", "gradient_checkpointing"}
    assert ({*RECORDED, *LEFT_OUT} - fields().keys()) - older == set()


def test_what_was_changed_stands_apart_from_what_was_left_at_its_default():
    args = arguments(delta=1.5, temperature=0.7, generation_kwargs={"length_penalty": 2.0})
    shown, rest = hyperparameters(args), unchanged(args)
    assert (shown["delta"], shown["temperature"], shown["generation_kwargs"]) == (1.5, 0.7, {"length_penalty": 2.0})
    assert "vllm_mode" in rest
    assert "accelerator_config" in rest
    assert not shown.keys() & rest.keys()
    named = {name for name in RECORDED if getattr(args, name, None) is not None}
    assert shown.keys() | rest.keys() == named
    assert {"learning_rate", "top_p", "use_vllm"} <= set(HYPERPARAMETERS) & shown.keys()  # at their defaults


def test_neither_paths_nor_secrets_nor_addresses_are_recorded():
    planted = {
        "token": "hf_planted0000",
        "cache_dir": "/tmp/planted1",
        "proxies": {"https": "http://planted2.example"},
        "code_file": "planted3",
        "attn": "/tmp/planted4",
        "dtype": torch.bfloat16,
    }
    args = arguments(
        model_init_kwargs=planted,
        hub_token="hf_planted5",
        run_name="planted6",
        vllm_server_host="planted7.example",
        generation_kwargs={"stop": "~/planted8"},
    )
    said = json.dumps({**hyperparameters(args), **unchanged(args)})
    assert "planted" not in said
    assert "somewhere" not in said
    assert hyperparameters(args)["model_init_kwargs"] == {
        "attn": "left out: it names a place",
        "dtype": "torch.bfloat16",
    }


def test_a_field_that_nobody_knows_is_named_without_its_value():
    from trl import GRPOConfig

    @dataclasses.dataclass
    class Mine(GRPOConfig):
        my_new_weight: float = 0.25

    said = hyperparameters(Mine(output_dir="x", use_cpu=True, bf16=False, report_to=[]))
    assert said["my_new_weight"] == "not known"


def test_a_long_setting_is_recorded_by_its_digest():
    words = [[number, number + 1] for number in range(LONGEST)]
    said = hyperparameters(arguments(generation_kwargs={"bad_words_ids": words}))["generation_kwargs"]
    assert len(said["sha256"]) == 64
    assert said["bytes"] > LONGEST
    other = hyperparameters(arguments(generation_kwargs={"bad_words_ids": words[1:]}))["generation_kwargs"]
    assert other["sha256"] != said["sha256"]


def test_a_number_that_json_lacks_is_written_by_its_name():
    assert hyperparameters(arguments(max_grad_norm=float("inf")))["max_grad_norm"] == "Infinity"


@pytest.fixture
def same_generators():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def test_seeds_are_told_where_they_are_known(same_generators):
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    fresh = generators(7)
    assert {name: one["seed"] for name, one in fresh.items()} == {"python": 7, "numpy": 7, "torch": 7}
    assert generators(7) == fresh  # looking changes nothing
    random.random()
    np.random.random()
    torch.rand(1)
    drawn = generators(7)
    assert "seed" not in drawn["python"]
    assert "seed" not in drawn["numpy"]
    assert drawn["torch"]["seed"] == 7  # what it was given last, whatever was drawn
    assert all(drawn[name]["state"] != fresh[name]["state"] for name in fresh)
    assert "seed" not in generators(8)["python"]
