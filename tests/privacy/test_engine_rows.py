"""The rows engine: when it is chosen, how it is checked, what happens when it is wrong, and what it must keep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gradients import (
    STILL,
    AllButOnePerStep,
    Keeps,
    Watches,
    clipped_by_engine,
    error,
    norm_of,
)
from support.tiny import (
    causal_model,
    dpo_trainer,
    kto_trainer,
    lora,
    perturb,
    preferences,
    reward_trainer,
    sft_trainer,
    synthetic_pairs,
)
from support.trails import events, without_cross_checks

from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import UnsupportedTrainerError
from rlhf_audit_nb.events import PrivacyEngine, PrivacyReserved
from rlhf_audit_nb.privacy import engine_check, plan_training, private_training, reserve_event, row_gradients
from rlhf_audit_nb.privacy.engine_choice import LOOP, ROWS, Choice, choose_engine, estimate
from rlhf_audit_nb.privacy.row_layers import UnitGradients, covering_layers
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.unit_gradients import LoopEngine, Sampled, Seen, Sums, clip_units_into


@pytest.fixture(scope="module", autouse=True)
def quick_accounting() -> Iterator[None]:
    with without_cross_checks():
        yield


def config(**changes: Any) -> PrivacyConfig:
    return PrivacyConfig(**{"epsilon": 1e6, "noise_multiplier": 1.0, "sampling_rate": 1.0, **changes})


def sums_of(trainer: Any, units: list[tuple[int, ...]], engine: str, bound: float, micro_batch: int = 8) -> Any:
    """The clipped sum that an engine computes for these units, and what it saw."""
    sums = Sums([p for p in trainer.model.parameters() if p.requires_grad], bound)
    data = trainer._remove_unused_columns(trainer.train_dataset)
    seen, tokens = Seen(), None
    if engine == "loop":
        made: Any = LoopEngine(data, tokens, micro_batch)
    else:
        layers = covering_layers(trainer.model)
        made = row_gradients.RowsEngine(data, tokens, micro_batch, layers)
    trainer.model.train()
    made.add(trainer, trainer.model, [Sampled(unit, 0) for unit in units], sums, seen)
    return sums, seen


def apart(first: Sums, second: Sums) -> float:
    names = [str(place) for place in range(len(first.tensors))]
    return error(dict(zip(names, first.tensors, strict=True)), dict(zip(names, second.tensors, strict=True)))


# -- choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dpo_trainer, sft_trainer], ids=["dpo", "sft"])
def test_pairs_with_lora_get_rows_and_annotators_of_several_pairs_the_loop(tmp_path: Path, make: Any) -> None:
    trainer = make(synthetic_pairs(6), tmp_path, max_length=512)
    assert choose_engine(trainer, config(unit="pair")).engine == ROWS
    assert choose_engine(trainer, config(unit="annotator", max_pairs_per_unit=4)).engine == LOOP
    assert choose_engine(trainer, config(unit="pair", engine="loop")) == Choice(LOOP, "it was asked for")
    assert choose_engine(trainer, config(unit="pair", micro_batch=1)).engine == LOOP


def test_the_estimate_follows_the_public_numbers_and_nothing_else() -> None:
    pairs = estimate(rows_a_unit=1, micro_batch=16, trained=10**6, parameters=10**8, length=512)
    four = estimate(rows_a_unit=4, micro_batch=16, trained=10**6, parameters=10**8, length=512)
    full = estimate(rows_a_unit=1, micro_batch=16, trained=10**8, parameters=10**8, length=64)
    assert pairs.rows < pairs.loop
    assert four.loop < four.rows
    assert full.loop < full.rows
    assert pairs.gradient_bytes == 4 * 16 * 10**6


def test_how_many_pairs_the_units_really_have_does_not_change_the_choice(tmp_path: Path) -> None:
    few = dpo_trainer(synthetic_pairs(6, 1), tmp_path)
    many = dpo_trainer(synthetic_pairs(2, 9), tmp_path)
    for unit in ("annotator", "pair"):
        assert choose_engine(few, config(unit=unit)) == choose_engine(many, config(unit=unit))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft": lora(use_dora=True)}, "is not a plain Linear layer's"),
        ({"peft": None}, "is not a plain Linear layer's"),
        ({"peft": lora(lora_dropout=0.2), "disable_dropout": False}, "dropout"),
        ({"peft": lora(target_modules=["embed_tokens", "q_proj"])}, "is not a plain Linear layer's"),
        ({"bf16": True}, "half precision"),
        ({"model": causal_model().to(torch.bfloat16)}, "half precision"),
    ],
    ids=["dora", "full", "dropout", "embedding", "bf16", "bf16-weights"],
)
def test_a_model_that_rows_cannot_serve_gets_the_loop_and_a_refusal_where_it_was_asked_for(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    trainer = dpo_trainer(synthetic_pairs(4), tmp_path, **changes)
    chosen = choose_engine(trainer, config(unit="pair"))
    assert chosen.engine == LOOP
    assert reason in chosen.reason
    with pytest.raises(UnsupportedTrainerError, match=reason):
        plan_training(trainer, config(unit="pair", engine="rows"))


def test_the_users_own_autocast_round_the_training_sends_it_to_the_loop(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(4), tmp_path)
    assert choose_engine(trainer, config(unit="pair")).engine == ROWS
    with torch.autocast("cpu", torch.bfloat16):
        chosen = choose_engine(trainer, config(unit="pair"))
    assert chosen.engine == LOOP
    assert "half precision" in chosen.reason


def test_a_trained_language_head_is_refused_for_rows_since_trl_multiplies_outside_of_it(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(4), tmp_path)
    trainer.model.get_output_embeddings().weight.requires_grad_()
    with pytest.raises(UnsupportedTrainerError, match="language head"):
        choose_engine(trainer, config(engine="rows"))


def test_the_reservation_names_the_engine_that_was_chosen(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path, max_length=512)
    assert reserve_event(plan_training(trainer, config(unit="pair")), "r").engine == ROWS
    assert reserve_event(plan_training(trainer, config()), "r").engine == LOOP


# -- the comparison before the first step ---------------------------------------------------------------------------


def trained(trainer: Any, **changes: Any) -> tuple[list[tuple[str, str]], Watches, Keeps]:
    told: list[tuple[str, str]] = []
    watches, keeps = Watches(), Keeps()
    trainer.add_callback(keeps)
    plan = plan_training(trainer, config(unit="pair", **changes))
    with private_training(
        trainer, plan, AllButOnePerStep(bytes(32)), watches, fell_back=lambda *what: told.append(what)
    ):
        trainer.train()
    return told, watches, keeps


def wrong_rows(gradients: UnitGradients, *_: Any) -> None:
    gradients._groups = gradients._groups.roll(1)
    gradients._blocks = None


@pytest.fixture
def sum_to_the_wrong_units(monkeypatch: pytest.MonkeyPatch) -> None:
    original = UnitGradients.__init__

    def broken(self: UnitGradients, groups: torch.Tensor, units: int) -> None:
        original(self, groups, units)
        wrong_rows(self)

    monkeypatch.setattr(UnitGradients, "__init__", broken)


@pytest.mark.usefixtures("sum_to_the_wrong_units")
def test_an_engine_that_is_wrong_is_noticed_before_the_first_step_and_the_loop_trains(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6, 1), tmp_path, **STILL)
    told, watches, keeps = trained(trainer, engine="rows")
    assert [name for name, _ in told] == [LOOP]
    assert "differs from the loop's" in told[0][1]
    assert not any("engine" in metrics for metrics in watches.metrics)
    sane = dpo_trainer(synthetic_pairs(6, 1), tmp_path, **STILL)
    _, _, loop = trained(sane, engine="loop")
    assert all(error(a, b) <= 1e-6 for a, b in zip(keeps.gradients, loop.gradients, strict=True))


def test_a_good_engine_passes_and_the_weights_stand_where_they_stood(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6, 1), tmp_path, **STILL)
    before = [p.clone() for p in trainer.model.parameters()]
    told, watches, _ = trained(trainer, engine="rows")
    assert told == []
    assert not any("engine" in metrics for metrics in watches.metrics)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_layer_that_is_multiplied_with_elsewhere_is_noticed(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6, 1), tmp_path, **STILL)
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith("lora_A.default"))
    base = trainer.model.get_base_model().model.norm
    base.register_forward_hook(lambda _, __, out: out + layer.weight.sum() * 1e-3)
    told, _, _ = trained(trainer, engine="rows")
    assert "outside of its layer" in told[0][1]


@pytest.mark.parametrize("make", [dpo_trainer, sft_trainer, kto_trainer, reward_trainer])
def test_the_made_up_rows_do_not_depend_on_the_data(tmp_path: Path, make: Any) -> None:
    found = []
    for rows in (synthetic_pairs(3), preferences(6)):
        trainer = make(rows, tmp_path)
        data = trainer._remove_unused_columns(trainer.train_dataset)
        found.append(engine_check.probe_rows(data, trainer, trainer.model))
        trainer.data_collator(found[-1])
    assert found[0] == found[1]


# -- on the data ----------------------------------------------------------------------------------------------------


def test_a_mismatch_on_the_first_batch_hands_over_to_the_loop_in_private_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = engine_check.CheckedRows.prepare

    def breaks_later(self: Any, *args: Any) -> None:
        prepared(self, *args)
        original = UnitGradients.__init__

        def broken(gradients: UnitGradients, groups: torch.Tensor, units: int) -> None:
            original(gradients, groups, units)
            wrong_rows(gradients)

        monkeypatch.setattr(UnitGradients, "__init__", broken)

    monkeypatch.setattr(engine_check.CheckedRows, "prepare", breaks_later)
    trainer = dpo_trainer(synthetic_pairs(6, 1), tmp_path, **STILL)
    told, watches, keeps = trained(trainer, engine="rows")
    assert told == []
    assert watches.metrics[0]["engine"] == LOOP
    assert "differs" in watches.metrics[0]["engine_reason"]
    monkeypatch.undo()
    sane = dpo_trainer(synthetic_pairs(6, 1), tmp_path, **STILL)
    _, _, loop = trained(sane, engine="loop")
    assert all(error(a, b) <= 1e-6 for a, b in zip(keeps.gradients, loop.gradients, strict=True))


@pytest.mark.parametrize("margin", [math.nan, math.inf])
def test_a_pair_whose_loss_is_not_finite_changes_nothing_of_the_others(tmp_path: Path, margin: float) -> None:
    rows = [{**row, "margin": 0.0} for row in synthetic_pairs(6, 1)]
    rows[2]["margin"] = margin
    trainer = reward_trainer(rows, tmp_path, peft="lora", **STILL)
    perturb(trainer.model)
    poisoned, seen = sums_of(trainer, [(n,) for n in range(6)], "rows", 1e-2)
    without, _ = sums_of(trainer, [(n,) for n in range(6) if n != 2], "loop", 1e-2)
    assert seen.summary()["non_finite_units"] == 1
    assert apart(poisoned, without) <= 1e-6


def test_a_row_that_cannot_be_computed_with_costs_nobody_else_their_place(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6, 1), tmp_path, **STILL)
    perturb(trainer.model)
    good, _ = sums_of(trainer, [(n,) for n in range(6) if n != 3], "loop", 1e-2)
    broken = list(trainer.train_dataset["chosen_ids"])
    broken[3] = [99_999]
    trainer.train_dataset = trainer.train_dataset.remove_columns("chosen_ids").add_column("chosen_ids", broken)
    found, seen = sums_of(trainer, [(n,) for n in range(6)], "rows", 1e-2)
    assert seen.failed == 1
    assert apart(found, good) <= 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12, 1e30])
def test_units_of_any_size_are_held_to_the_bound_together(scale: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(50, 40))
    gradients = torch.randn(6, 50, 40, generator=torch.Generator().manual_seed(0)) * scale
    gradients[1] *= 1e6
    gradients[2] = math.nan
    gradients[3] = math.inf
    gradients[4] = gradients[0]
    for kept in range(6):
        sums = Sums([weight], 1e-2)
        norms = clip_units_into({0: gradients}, sums, [unit == kept for unit in range(6)])
        size = float(sums.tensors[0].norm())
        assert size <= 1e-2
        if kept in (2, 3):
            assert size == 0
            assert not math.isfinite(norms[kept])
        else:
            assert size == pytest.approx(min(1e-2, float(gradients[kept].double().norm())), rel=1e-6)


def test_units_are_packed_whole_and_a_large_one_goes_through_in_parts(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(12, 1), tmp_path, **STILL)
    perturb(trainer.model)
    units = [(0,), (1, 2), (3, 4, 5, 6, 7), (8, 9), (10,), (11,)]
    widths: list[int] = []
    collate = trainer.data_collator.torch_call
    trainer.data_collator.torch_call = lambda rows: widths.append(len(rows)) or collate(rows)
    found, seen = sums_of(trainer, units, "rows", 1e-2, micro_batch=4)
    assert max(widths) == 4
    assert sum(widths) == 12
    del trainer.data_collator.torch_call
    truth, _ = sums_of(trainer, units, "loop", 1e-2, micro_batch=4)
    assert apart(found, truth) <= 1e-6
    assert seen.summary()["units"] == len(units)


def test_no_more_rows_go_through_the_loop_at_once_than_the_configuration_says(tmp_path: Path) -> None:
    rows = [{**row, "annotator_id": "one"} for row in synthetic_pairs(7, 1)]
    trainer = dpo_trainer(rows, tmp_path, **{**STILL, "max_steps": 1})
    shapes: list[int] = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(len(args[0])))
    plan = plan_training(trainer, config(micro_batch=3))
    with private_training(trainer, plan, SealedRandom(bytes(32))):
        trainer.train()
    assert max(shapes) == 6  # three pairs, chosen and rejected


def test_default_checkpointing_does_not_change_a_bit_of_what_rows_finds(tmp_path: Path) -> None:
    found = []
    for checkpointing in (True, False):
        trainer = dpo_trainer(
            synthetic_pairs(4, 1), tmp_path, gradient_checkpointing=checkpointing, **{**STILL, "max_steps": 4}
        )
        perturb(trainer.model)
        found.append(clipped_by_engine(trainer, 1e-2, "rows", unit="pair"))
        assert trainer.model.is_gradient_checkpointing == checkpointing
    assert all(error(a, b) <= 1e-6 for a, b in zip(*found, strict=True))


def test_a_model_in_bfloat16_is_summed_in_full_precision_by_rows_too(tmp_path: Path) -> None:
    model = causal_model().to(torch.bfloat16)
    trainer = dpo_trainer(synthetic_pairs(4, 1), tmp_path, model=model, bf16=True, **STILL)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    perturb(trainer.model)
    units = [(n,) for n in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        rows, _ = sums_of(trainer, units, "rows", 1e-3)
        loop, _ = sums_of(trainer, units, "loop", 1e-3)
    assert rows.tensors[0].dtype == torch.float64
    assert apart(rows, loop) <= 3e-2
    size = math.sqrt(sum(float(tensor.square().sum()) for tensor in rows.tensors))
    assert 0 < size <= 4 * 1e-3 * (1 + 1e-6)


def test_an_empty_sample_is_noise_alone_in_either_engine(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6, 1), tmp_path, max_steps=2)
    watches, keeps = Watches(), Keeps()
    trainer.add_callback(keeps)
    plan = plan_training(trainer, config(unit="pair", engine="rows", sampling_rate=1e-9))
    with private_training(trainer, plan, SealedRandom(bytes(32)), watches):
        trainer.train()
    assert [metrics["units"] for metrics in watches.metrics] == [0, 0]
    assert all(norm_of(gradient) > 0 for gradient in keeps.gradients)


@pytest.mark.usefixtures("sum_to_the_wrong_units")
def test_a_run_whose_engine_fell_back_says_so_in_the_trail_and_aloud(tmp_path: Path) -> None:
    private = config(unit="pair", engine="rows", epsilon=1e3)
    auditor = AuditableRLHF(privacy_config=private, audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    trainer = dpo_trainer(synthetic_pairs(6, 1), tmp_path / "out", max_steps=2)
    with (
        pytest.warns(UserWarning, match=f"{ROWS}.*is not used.*uses the {LOOP}"),
        auditor.track_training("fallen back") as run,
    ):
        trainer.train()
    (reserved,), (told,) = events(auditor.trail, PrivacyReserved), events(auditor.trail, PrivacyEngine)
    assert reserved.engine == ROWS
    assert (told.reservation, told.engine) == (reserved.reservation, LOOP)
    assert "differs from the loop's" in told.reason
    assert any(told.reason in sentence for sentence in run.state.warnings)
