"""The compute of trainings: against PyTorch's own counter, by column, and sealed under differential privacy."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support.tiny import (
    causal_model,
    dpo_trainer,
    grpo_trainer,
    lora,
    reward_model,
    sft_trainer,
    synthetic_pairs,
    tokenizer,
)
from torch.utils.flop_counter import FlopCounterMode

from rlhf_audit_nb import AuditableRLHF, AuditConfig, PrivacyConfig
from rlhf_audit_nb.capture.compute import PassMeter, model_shape
from rlhf_audit_nb.capture.energy import Counter, EnergyMeter, rapl_counters
from rlhf_audit_nb.events import ComputeRecorded, ComputeRecordedPrivate, decode_body, decode_private

PAIRS = synthetic_pairs(6)


def batch(rows=3, length=40, padding=0):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[:, length - padding :] = 0
    return {"input_ids": torch.randint(3, 300, (rows, length)), "attention_mask": mask}


def counted(model, work):
    """The operations that PyTorch counts in ``work``, and our columns."""
    meter, flop = PassMeter(), FlopCounterMode(display=False)
    with meter.watching(model, "policy"), flop:
        work()
    return float(flop.get_total_flops()), meter.columns()


def update(model, inputs):
    model.train()

    def step():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()

    return step


def wide(**changes):
    return causal_model(hidden_size=128, intermediate_size=256, num_hidden_layers=4, **changes)


def late():
    return lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[3])


MODELS = {
    "whole": wide,
    "tied": lambda: wide(tie_word_embeddings=True),
    "adapter": lambda: get_peft_model(wide(), lora()),
    "late adapter": lambda: get_peft_model(wide(), late()),
    "head only": lambda: frozen_but_head(wide()),
}


def frozen_but_head(model):
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [0, 25])
def test_an_updates_band_holds_what_pytorch_counts(name, padding):
    model, inputs = MODELS[name](), batch(padding=padding)
    real, columns = counted(model, update(model, inputs))
    (found,) = columns.values()
    assert list(columns) == ["update"]
    assert found.low <= real <= found.high
    assert found.low > 0.1 * real  # a band that holds everything would say nothing
    assert found.high < 4 * real or name in ("late adapter", "head only")
    assert (found.passes, found.positions, found.tokens) == (1, 120, 120 - 3 * padding)


def test_a_second_pass_is_counted_and_the_band_without_it_is_too_low():
    model, inputs = wide(), batch()
    once, _ = counted(model, update(model, inputs))
    twice, columns = counted(model, lambda: [update(model, inputs)() for _ in range(5)])
    assert twice == pytest.approx(5 * once)
    assert columns["update"].passes == 5
    _, single = counted(model, update(model, inputs))
    assert not single["update"].low <= twice <= single["update"].high


def test_sampling_scoring_and_evaluation_have_columns_of_their_own():
    model, inputs = wide(), batch(rows=2, length=12)
    model.train()
    real, columns = counted(
        model, lambda: model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    )
    assert list(columns) == ["generation"]
    assert columns["generation"].positions == 2 * (12 + 5)
    assert columns["generation"].low <= real <= columns["generation"].high
    with torch.no_grad():
        _, columns = counted(model, lambda: model(**inputs))
        assert list(columns) == ["scoring"]
        model.eval()
        _, columns = counted(model, lambda: model(**inputs))
        assert list(columns) == ["evaluation"]


def test_experts_that_a_token_is_not_sent_to_are_left_out_of_the_lower_end():
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    few, all_of_them = (
        model_shape(MixtralForCausalLM(MixtralConfig(**settings, **heads, num_local_experts=4, num_experts_per_tok=k)))
        for k in (1, 4)
    )
    assert few.parameters == all_of_them.parameters
    assert few.dense < all_of_them.dense


class Recorded:
    """The events on compute of one run."""

    def __init__(self, auditor):
        auditor.trail.flush()
        self.entries = list(auditor.trail.reader().entries(type=ComputeRecorded.TYPE))
        self.events = [decode_body(entry.type, entry.body) for entry in self.entries]


def train(place, make, privacy=None):
    auditor = AuditableRLHF(privacy_config=privacy, audit_config=AuditConfig(trail=str(place / "audit")))
    with auditor.track_training(experiment_name="compute"):
        make(place / "out").train()
    return auditor, Recorded(auditor)


def test_a_training_with_a_reference_is_recorded_by_column(tmp_path):
    _, found = train(tmp_path, lambda out: dpo_trainer(PAIRS, out, peft=None, max_steps=2))
    (event,) = found.events
    assert set(event.columns) == {"update", "reference"}
    assert event.columns["update"].passes == 2
    assert event.columns["update"].tokens <= event.columns["update"].positions
    assert event.columns["update"].low > 2 * event.columns["reference"].low
    assert event.seconds > 0
    assert (event.processes, event.devices, event.device) == (1, 1, "cpu")
    assert found.entries[0].envelope.sealed is None


def test_online_training_tells_sampling_from_learning(tmp_path):
    _, found = train(tmp_path, lambda out: grpo_trainer([reward_model()], out, beta=0.1))
    (event,) = found.events
    assert {"update", "generation", "reward"} <= set(event.columns)
    generated = event.columns["generation"]
    assert generated.positions > 0
    assert generated.high > generated.low > 0


def test_tokens_are_those_that_the_trainer_saw(tmp_path):
    rows = PAIRS[:8]
    _, found = train(tmp_path, lambda out: sft_trainer(rows, out, max_steps=1, per_device_train_batch_size=8))
    texts = [tokenizer()(row["prompt"] + row["chosen"])["input_ids"] for row in rows]
    expected = sum(len(text) + 1 for text in texts)  # each with its end
    assert found.events[0].columns["update"].tokens == pytest.approx(expected, abs=len(rows))
    assert found.events[0].columns["update"].positions >= expected - len(rows)


def test_under_privacy_nothing_that_was_measured_stands_in_the_open(tmp_path):
    privacy = PrivacyConfig(epsilon=8.0, delta=1e-3, annotator_column="annotator_id", sampling_rate=0.5)
    auditor, found = train(tmp_path, lambda out: dpo_trainer(PAIRS, out, max_steps=2), privacy)
    (event,), (entry,) = found.events, found.entries
    assert event.columns == {}
    assert event.seconds is None
    assert event.energy == {}
    assert event.transformers_flos is None
    assert entry.envelope.sealed is not None
    half = decode_private(entry.type, auditor.trail.vault.half(entry).payload)
    assert isinstance(half, ComputeRecordedPrivate)
    assert half.seconds > 0
    (ledger,) = auditor.compute().ledger.trainings
    assert ledger.basis == "settings"
    assert ledger.update.low == 0 < ledger.update.high
    assert half.columns["update"].high <= ledger.update.high
    assert ledger.device_hours is None
    assert any("sealed" in note for note in ledger.notes)


def test_a_counter_is_added_up_over_its_restarts():
    values = iter([90.0, 95.0, 10.0, 30.0])
    meter = EnergyMeter([Counter("rapl", lambda: next(values), span=100.0)])
    meter.sample(now=True)
    meter.sample(now=True)
    assert meter.joules() == {"rapl": pytest.approx(40.0)}


def test_a_counter_that_fails_is_left_out_altogether():
    values = iter([1.0])
    assert EnergyMeter([Counter("rapl", lambda: next(values))]).joules() == {}
    assert EnergyMeter([]).joules() == {}


def test_a_source_of_which_one_counter_fails_is_left_out_whole():
    one, failing, board = iter([0.0, 5.0]), iter([0.0]), iter([1.0, 8.0])
    counters = [Counter("rapl", lambda: next(one)), Counter("rapl", lambda: next(failing))]
    assert EnergyMeter([*counters, Counter("nvml", lambda: next(board))]).joules() == {"nvml": 7.0}


def test_packages_are_read_and_parts_and_the_platform_are_not(tmp_path):
    for name, label in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys")):
        domain = tmp_path / name
        domain.mkdir()
        (domain / "name").write_text(f"{label}\n")
        (domain / "max_energy_range_uj").write_text("262143328850\n")
        (domain / "energy_uj").write_text("1000000\n")
    (found,) = rapl_counters(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("4500000\n")
    found.sample()
    assert found.joules == pytest.approx(3.5)
    assert rapl_counters(tmp_path / "nowhere") == []
