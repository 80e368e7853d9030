"""The compute ledger: columns, sums along the lineage, bounds under privacy, and the one-third rule."""

from __future__ import annotations

import pytest
from numpy.random import default_rng

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.compliance.compute import (
    Band,
    compute_ledger,
    flop_text,
    most_rows,
    one_third,
    percent,
)
from rlhf_audit_nb.compliance.evidence import Evidence
from rlhf_audit_nb.compliance.facts import Spend
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import encode_body, encode_private
from rlhf_audit_nb.reports import build_compliance_report
from rlhf_audit_nb.reports.compute import compute_lines
from rlhf_audit_nb.trail import Trail

SHAPE = ev.ModelShape(
    parameters=7_000_000_000,
    trainable=7_000_000_000,
    dense=6_500_000_000,
    backward=6_500_000_000,
    learning=6_500_000_000,
    layers=32,
    width=4096,
)


def passes(low, high):
    return ev.Passes(passes=3, positions=100, scores=1000, tokens=80, low=low, high=high)


def model(role, digest):
    return ev.ModelBound(
        role=role, architecture="Llama", parameters=1, trainable=1, weights_digest=digest * 32, config_digest="00"
    )


def training(trainer, base, final, columns, **more):
    """The entries of one training."""
    return (
        ev.TrainerAttached(trainer=trainer, loss=None, max_steps=3, seed=1, hyperparameters={}),
        model("base", base),
        model("final", final),
        ev.ComputeRecorded(trainer=trainer, shape=SHAPE, device="cuda", columns=columns, seconds=3600.0, **more),
    )


def written(place, *runs):
    with Trail.open(place) as trail:
        for number, (name, events) in enumerate(runs):
            run = f"{number:032x}"
            for event in (
                ev.RunStarted(experiment=name, entry_point="cell", tool="t"),
                *events,
                ev.RunFinished(status="completed", steps=3, trained=True),
            ):
                trail.append(event.TYPE, encode_body(event), run=run).wait()
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """SFT, then a reward model from the same base, then a policy from the SFT model."""
    sft = training("SFTTrainer", "01", "02", {"update": passes(1e19, 2e19)}, processes=2, devices=2)
    reward = training("RewardTrainer", "01", "03", {"update": passes(5e22, 5e22)})
    columns = {
        "update": passes(3e19, 4e19),
        "generation": passes(1e20, 2e20),
        "scoring": passes(1e18, 2e18),
        "reward": passes(6e21, 6e21),
        "evaluation": passes(1e21, 1e21),
    }
    policy = training("GRPOTrainer", "02", "04", columns, energy={"nvml": 7.2e6})
    return written(tmp_path_factory.mktemp("trail") / "audit", ("sft", sft), ("reward", reward), ("policy", policy))


@pytest.fixture(scope="module")
def ledger(place):
    return compute_ledger(Evidence.from_trail(place))


def test_each_training_has_its_columns(ledger):
    sft, reward, policy = ledger.trainings
    assert sft.update == Band(2e19, 4e19)  # two processes
    assert sft.device_hours == pytest.approx(2.0)
    assert reward.update == Band(5e22, 5e22)
    assert policy.generation == Band(1e20, 2e20)
    assert policy.excluded == Band(7e21, 7e21)
    assert policy.kilowatt_hours == {"nvml": pytest.approx(2.0)}
    assert sft.kilowatt_hours == {}
    assert {one.basis for one in ledger.trainings} == {"measured"}


def test_a_lineage_adds_what_it_goes_back_to_and_no_reward_model(ledger):
    sft, reward, policy = ledger.trainings
    assert [one.entry for one in ledger.lineage(policy.entry)] == [sft.entry, policy.entry]
    assert [one.entry for one in ledger.lineage(sft.entry)] == [sft.entry]
    assert [one.entry for one in ledger.leaves()] == [reward.entry, policy.entry]
    general, systemic = ledger.verdicts[policy.entry]
    assert general.counted == Band(2e19 + 3e19, pytest.approx(4e19 + 4e19 + 2e20 + 2e18))
    assert systemic.counted.low == pytest.approx(2e19 + 3e19 + 1e20)
    assert general.threshold == pytest.approx(1e23 / 3)
    assert systemic.threshold == pytest.approx(1e25 / 3)


def test_the_rule_says_below_above_and_open(ledger):
    _, reward, policy = ledger.trainings
    assert [rule.state for rule in ledger.verdicts[policy.entry]] == ["below", "below"]
    assert [rule.state for rule in ledger.verdicts[reward.entry]] == ["above", "below"]
    near = Band(3e22, 3.2e22)
    near_one = one_third([_with(policy, near)])[0]
    assert near_one.state == "open"
    assert "30 % margin" in near_one.words
    assert one_third([_with(policy, Band(1e20, 1e20)), _with(policy, Band(), basis="none")])[0].state == "unknown"


def _with(one, update, basis="measured"):
    from dataclasses import replace

    return replace(one, update=update, generation=Band(), scoring=Band(), basis=basis)


def test_a_stated_base_replaces_both_thresholds(place, ledger):
    policy = ledger.trainings[-1].entry
    (rule,) = compute_ledger(Evidence.from_trail(place), base_flop=3e20).verdicts[policy]
    assert rule.threshold == pytest.approx(1e20)
    assert rule.state == "open"
    (rule,) = compute_ledger(Evidence.from_trail(place), base_flop=3e20, systemic=True).verdicts[policy]
    assert rule.counted.low == pytest.approx(1.5e20)
    assert "with systemic risk" in rule.base


def test_a_declared_base_counts_and_is_cited(tmp_path):
    from rlhf_audit_nb import AuditableRLHF, AuditConfig

    written(tmp_path / "audit", ("sft", training("SFTTrainer", "01", "02", {"update": passes(1e19, 2e19)})))
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    with pytest.raises(ConfigError, match="flop is"):
        auditor.declare_base_compute("base", flop=-1.0, source="model card", by="R. Roe")
    with pytest.raises(ConfigError, match="Nothing is stated"):
        auditor.declare_base_compute("base", source="model card", by="R. Roe")
    entry = auditor.declare_base_compute("example/base", flop=8.4e23, source="model card", by="R. Roe")
    (rules,) = auditor.compute().ledger.verdicts.values()
    assert rules[0].threshold == pytest.approx(2.8e23)
    assert rules[0].entries == (entry,)


def reserved(**changes):
    settings = {
        "reservation": "r", "unit": "annotator", "adjacency": "zero-out", "mechanism": "m", "engine": "e",
        "generator": "g", "units": 200, "clipping_norm": 1.0, "noise_multiplier": 1.0, "sampling_rate": 0.1,
        "steps": 50, "steps_asked": 50, "max_pairs_per_unit": 4, "delta": 1e-5, "epsilon_budget": 8.0,
        "epsilon_before": 0, "epsilon_planned": 1, "accountants": {}, "column": "annotator_id",
    }  # fmt: skip
    return Spend(item=None, reserved=ev.PrivacyReserved(**{**settings, **changes}))


@pytest.mark.parametrize("changes", [{}, {"sampled": "pairs"}, {"column": None}, {"sampling_rate": 1.0}])
def test_no_draw_comes_to_more_rows_than_the_bound(changes):
    spend = reserved(**changes)
    told, trials = spend.reserved, 200 * 50
    pairs = told.max_pairs_per_unit if told.column is not None else 1
    each = 1 if told.sampled == "pairs" else pairs
    trials *= pairs if told.sampled == "pairs" else 1
    drawn = default_rng(0).binomial(trials, told.sampling_rate, size=200_000) * each
    bound = most_rows(spend)
    assert drawn.max() <= bound <= trials * each
    assert bound < 1.35 * trials * told.sampling_rate * each
    # A bound of that kind for one standard deviation alone would not hold.
    assert drawn.max() > trials * told.sampling_rate * each or told.sampling_rate == 1.0


@pytest.mark.parametrize(
    ("settings", "length"),
    [({"hyperparameters": {"max_length": 64}}, 64), ({"defaults": {"max_length": 1024}}, 1024), ({}, None)],
    ids=["set", "left as it is", "none"],
)
def test_a_private_training_stands_with_a_bound_from_its_settings(tmp_path, settings, length):
    spend = reserved(reservation="r" * 32)
    trainer = {"trainer": "DPOTrainer", "loss": None, "max_steps": 50, "seed": None, "hyperparameters": {}}
    measured = ev.ComputeRecordedPrivate(columns={}, seconds=1.0)
    with Trail.open(tmp_path / "audit") as trail:
        for event, half in (
            (ev.RunStarted(experiment="private", entry_point="cell", tool="t"), None),
            (ev.TrainerAttached(**{**trainer, **settings}), None),
            (spend.reserved, None),
            (ev.ComputeRecorded(trainer="DPOTrainer", shape=SHAPE, device="cpu"), encode_private(measured)),
        ):
            trail.append(event.TYPE, encode_body(event), run="a" * 32, private=half).wait()
    (one,) = compute_ledger(Evidence.from_trail(tmp_path / "audit")).trainings
    if length is None:
        assert one.basis == "none"
        assert "bound no length" in " ".join(one.notes)
        return
    answers = 2 * most_rows(spend)
    expected = 3 * (2 * SHAPE.parameters + 4 * SHAPE.width * SHAPE.layers * length) * answers * length
    assert one.basis == "settings"
    assert one.update == Band(0.0, pytest.approx(expected))
    assert one.update.words.startswith("at most")
    assert one.device_hours is None


def test_a_training_without_an_entry_is_named(tmp_path):
    events = training("SFTTrainer", "01", "02", {"update": passes(1e19, 2e19)})[:-1]
    ledger = compute_ledger(Evidence.from_trail(written(tmp_path / "audit", ("sft", events))))
    assert ledger.trainings == ()
    assert len(ledger.missing) == 1
    assert "no entry tells of the compute of 1 training" in compute_lines(ledger)[0]


def test_steps_without_a_counted_update_are_no_figure_of_nothing(tmp_path):
    """The passes of the reward model were seen, those of what was trained were not."""
    for number, update in enumerate(({}, {"update": passes(0.0, 0.0)})):
        told = training("T", "01", "02", {"reward": passes(1e19, 1e19), **update})
        trail = written(tmp_path / f"{number}", ("unseen", (*told[:2], ev.Step(step=1), *told[2:])))
        ledger = compute_ledger(Evidence.from_trail(trail))
        (one,) = ledger.trainings
        assert one.basis == "none"
        assert {rule.state for rule in ledger.verdicts[one.entry]} == {"unknown"}


def test_sampling_that_was_not_seen_leaves_the_rule_open(ledger):
    from dataclasses import replace

    policy = replace(ledger.trainings[-1], uncounted=("generation",))
    assert {rule.state for rule in one_third([policy])} == {"unknown"}
    assert "or not all of it" in one_third([policy])[0].words
    assert one_third([replace(policy, update=Band(1e26, 1e26))])[0].state == "above"


def test_what_goes_back_to_a_training_without_an_entry_is_not_said_to_be_below(tmp_path):
    """Such as one that a loop of one's own made."""
    first = training("PlainLoop", "01", "02", {})[:3]
    second = training("DPOTrainer", "02", "03", {"update": passes(1e19, 2e19)})
    third = training("DPOTrainer", "03", "04", {"update": passes(1e19, 2e19)})
    trail = written(tmp_path / "audit", ("loop", first), ("policy", second), ("again", third))
    ledger = compute_ledger(Evidence.from_trail(trail))
    assert len(ledger.missing) == 1
    assert [one.gaps for one in ledger.trainings] == [ledger.missing, ()]
    assert {rule.state for one in ledger.trainings for rule in ledger.verdicts[one.entry]} == {"unknown"}


def test_the_report_has_a_section_that_cites_the_entries(place, ledger):
    report = build_compliance_report(Evidence.from_trail(place), "eu_ai_act")
    html = report.html if hasattr(report, "html") else str(report)
    policy = ledger.trainings[-1]
    groups = {group.title: group for group in report.model.compute}
    rule = next(fact for fact in groups["policy: GRPOTrainer"].facts if fact.label == "One-third rule")
    assert "with the training before it" in rule.value
    assert any(policy.entry in range(one.first, one.last + 1) for one in rule.cites)
    assert html


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (3.3333e22, "3.3e22"), (1e25, "1.0e25"), (1.5e19, "1.5e19"), (12.0, "1.2e1")]
)
def test_flop_are_written_with_two_figures(value, text):
    assert flop_text(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (0.00045001, "0.046 %"), (0.5, "50 %"), (0.501, "51 %"), (1.234, "130 %")]
)
def test_shares_are_rounded_up(share, text):
    assert percent(share) == text
