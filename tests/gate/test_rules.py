"""Each rule with a record that meets it and one that does not; what the evidence cannot answer is not met."""

from __future__ import annotations

import re
import threading
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gate_support import EPSILON, WHOLE, Story, audited, changed, make_record, write_policy

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.gate import gate, judge_record
from rlhf_audit_nb.records.anchoring import anchor_record
from rlhf_audit_nb.records.session import Outcome
from rlhf_audit_nb.trail import TrustPolicy
from rlhf_audit_nb.trail.anchoring import anchor_trail
from rlhf_audit_nb.trail.witness import Witness
from rlhf_audit_nb.trail.witness_server import WitnessServer

DAY = 86_400


def unmet(decision):
    (judged,) = decision.records
    return {one.id: one for one in judged.unmet}


def asked(folder, **only):
    return write_policy(folder, *(f"{name}: {value}" for name, value in only.items()), name="asked.yaml")


def test_a_model_that_meets_everything_passes(place):
    for trail in (None, place.trail):
        decision = gate(place.model, place.folder / "policy.yaml", trail=trail)
        assert decision.passed, str(decision)
        assert decision.exit_code == 0
        assert {one.id.split(".")[0] for one in decision.chosen.findings} >= set(WHOLE)
        assert decision.model == place.weights.digest
    assert judge_record(place.record, place.folder / "policy.yaml").passed


CHANGED = {
    "outcome": (
        {"outcome": Outcome("failed", reason="ZeroDivisionError", cell="cell-0", position=0)},
        r"The notebook failed \(ZeroDivisionError\)", "cell cell-0",
    ),
    "failed_cells": ({"cells": ("ok", "error")}, "Cell 2 ended with error", "cells[1]"),
    "changed_outputs": ({"changed_after": True}, "Outputs of cell 1 were updated", "cells[0].outputs"),
    "git": ({"git": ("a" * 40, True)}, "changes that were not committed", ""),
    "weights": ({"saved_step": None}, "are not those that a training", ""),
    "privacy": ({"private": False}, "has no bound", ""),
    "privacy.epsilon": ({"epsilon": 2.5}, "ε is 2.50; at most 2 is", ""),
    "privacy.delta": ({"reserved": {"delta": 1e-4}}, "δ is 10⁻⁴; at most 10⁻⁵", ""),
    "privacy.units": ({"reserved": {"unit": "pair", "column": None}}, "one pair; asked for is annotator", ""),
    "privacy.recomputed": ({"reserved": {"noise_multiplier": 0.5}}, "come to ε .* more than the 2.00", ""),
    "privacy.canaries": ({"canaries": audited(outcome="failed", epsilon_lower=5.0)}, "Canaries of this training", ""),
    "privacy.ledger": ({"settled": {"steps": 2}}, "The ledger is not believed: Entry", ""),
    "evaluations.accuracy": ({"accuracy": None}, "No test of this model tells its accuracy", ""),
    "evaluations.failed": ({"accuracy": 0.6}, "did not reach its threshold", ""),
}  # fmt: skip
"""By the finding that is to be unmet: what is told otherwise, what is said, and where."""


@pytest.mark.parametrize("name", CHANGED)
def test_a_record_that_does_not_meet_a_rule_is_refused_with_its_place(tmp_path, name):
    changes, said, where = CHANGED[name]
    made = make_record(tmp_path, changed(Story(), **changes))
    policy = write_policy(tmp_path, *(f"{key}: {value}" for key, value in WHOLE.items()))
    decision = gate(made.model, policy)
    assert decision.exit_code == 3
    found = [one for one in decision.records[0].unmet if one.id == name]
    assert found, str(decision)
    assert any(re.search(said, one.reason) for one in found), found
    assert found[0].where == where
    without = write_policy(
        tmp_path, *(f"{k}: {v}" for k, v in WHOLE.items() if k != name.split(".")[0]), name="no.yaml"
    )
    assert not [one for one in gate(made.model, without).records[0].unmet if one.id == name]


@pytest.mark.parametrize(
    ("key", "value", "changes", "met"),
    [
        ("git", "clean", {"git": None}, False),
        ("git", "clean", {"git": (None, None)}, False),
        ("git", "clean", {"git": ("a" * 40, None)}, False),
        ("git", "known", {"git": ("a" * 40, True)}, True),
        ("git", "known", {"git": (None, True)}, False),
        ("outcome", "completed", {"ended": "failed"}, False),
        ("outcome", "completed", {"ended": "stopped-by-budget"}, True),
        ("outcome", "completed", {"outcome": Outcome("aborted", reason="KeyboardInterrupt")}, False),
        ("failed_cells", "refuse", {"cells": ()}, False),
        ("weights", "final", {"trained": False, "private": False}, False),
        ("base_models", f"[{'00' * 32}]", {}, False),
        ("base_models", f"[{'cd' * 32}]", {"trained": False, "private": False}, False),
        ("evaluations", "{metrics: [accuracy, toxicity], thresholds: before result}", {}, False),
        ("evaluations", "{metrics: [accuracy], thresholds: before result}", {"late_threshold": True}, False),
        ("evaluations", "{metrics: [accuracy], thresholds: before result}", {"accuracy": "NaN"}, False),
        ("evaluations", "{metrics: [accuracy], thresholds: before result}", {"threshold": None}, False),
        ("evidence", "{framework: eu_ai_act, requirements: [AIA-A4-2a, AIA-15-5a]}", {}, False),
        ("evidence", "{framework: eu_ai_act, requirements: [AIA-A4-2a, AIA-A4-1c]}", {}, True),
    ],
)
def test_what_the_evidence_cannot_answer_is_not_met(tmp_path, key, value, changes, met):
    made = make_record(tmp_path, changed(Story(), **changes))
    decision = gate(made.model, asked(tmp_path, **{key: value}))
    assert decision.passed is met, str(decision)
    assert met or {one.id.split(".")[0] for one in decision.unmet} == {key}


PRIVACY = "{epsilon: 2.0, delta: 1e-5, units: [annotator]}"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"epsilon": "Infinity"}, "privacy.epsilon"),
        ({"epsilon": "NaN"}, "privacy.epsilon"),
        ({"epsilon": -1.0}, "privacy.epsilon"),
        ({"saved_step": None}, "privacy.training"),
        ({"trained": False, "private": False}, "privacy.training"),
        ({"settled": None, "reserved": {"epsilon_planned": 3.0}}, "privacy.epsilon"),
        ({"settled": {"steps": 4}}, "privacy.ledger"),
        ({"settled": {"reservation": "9" * 32}}, "privacy.ledger"),
    ],
)
def test_a_private_training_without_a_believable_bound_is_refused(tmp_path, changes, name):
    made = make_record(tmp_path, changed(Story(), **changes))
    assert name in unmet(gate(made.model, asked(tmp_path, privacy=PRIVACY)))


def test_a_reservation_that_was_never_settled_counts_in_full_and_may_be_enough(tmp_path):
    made = make_record(tmp_path, changed(Story(), settled=None))
    assert gate(made.model, asked(tmp_path, privacy=PRIVACY)).passed


def test_a_record_without_runs_has_no_privacy_no_git_and_no_weights(tmp_path):
    made = make_record(tmp_path, Story(saved=False))
    empty = make_record(tmp_path / "empty", changed(Story(saved=False, trained=False, git=None), private=False))
    decision = judge_record(empty.record, asked(empty.folder, git="clean", privacy=PRIVACY, weights="final"))
    assert set(unmet(decision)) == {"git", "privacy.training", "weights"}
    assert judge_record(made.record, asked(tmp_path, privacy=PRIVACY, git="clean", weights="final")).passed


def test_age_goes_by_the_sealing_and_never_by_a_time_to_come(place, policy):
    sealed = next(entry.time for entry in judged_entries(place) if entry.type == "record.sealed") / 1e6
    fresh = policy(fresh="{record: 2 days}")
    for age, met in ((0, True), (2 * DAY - 5, True), (2 * DAY + 5, False), (-200, True), (-400, False)):
        decision = judge_record(place.record, fresh, now=sealed + age)
        assert decision.passed is met, age
    assert "in the future" in unmet(judge_record(place.record, fresh, now=sealed - 400))["fresh.record"].reason


def judged_entries(place):
    from rlhf_audit_nb.records import open_record

    return open_record(place.record, policy=place.trust).entries


def test_nobody_has_witnessed_it(place, policy):
    decision = judge_record(place.record, policy(fresh="{witnessed: 2 days}"))
    assert set(unmet(decision)) == {"fresh.witnessed"}
    assert set(unmet(judge_record(place.record, policy(level="TIMESTAMPED")))) == {"level"}


def test_a_quorum_in_the_trust_policy_is_asked_for_without_a_level(place):
    from rlhf_audit_nb.trail.cosignature import CosignerEd25519
    from rlhf_audit_nb.trail.vkey import format_vkey

    text = place.trust.format().replace("quorum none", "")
    key = format_vkey(CosignerEd25519("example.org/witness", Ed25519PrivateKey.generate()).verifier())
    (place.folder / "quorum.policy").write_text(f"{text.strip()}\nwitness w {key}\nquorum w\n")
    path = place.folder / "quorum.yaml"
    path.write_text("version: 1\ntrust: quorum.policy\ngit: clean\n")
    assert set(unmet(judge_record(place.record, path))) == {"level"}
    path.write_text("version: 1\ntrust: quorum.policy\nlevel: UNANCHORED\n")
    assert judge_record(place.record, path).passed


def test_a_record_that_others_vouch_for_reaches_its_level_and_is_as_fresh_as_their_word(tmp_path):
    made = make_record(tmp_path, Story())
    witness = Witness.create(tmp_path / "witness", "witness.example/alice")
    witness.add_log(made.trust.log_keys[0])
    lines = f"log {made.trust.log_keys[0]}\nwitness alice {witness.vkeys[0]}{{}}\nquorum alice\n"
    (tmp_path / "trust.policy").write_text(lines.format(""))
    policy = asked(tmp_path, level="COSIGNED", fresh="{witnessed: 2 days}")
    assert set(unmet(judge_record(made.record, policy))) == {"level", "fresh.witnessed"}
    server = WitnessServer(witness)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        anchor_trail(made.trail, policy=TrustPolicy.parse(lines.format(f" {server.url}")))
    finally:
        server.stop()
        thread.join(20)
    trust = TrustPolicy.parse(lines.format(""))
    anchor_record(made.record, trail=made.trail, policy=trust)
    assert judge_record(made.record, policy).passed
    later = judge_record(made.record, policy, now=time.time() + 3 * DAY)
    assert set(unmet(later)) == {"fresh.witnessed"}
    assert judge_record(made.record, asked(tmp_path, git="clean")).passed  # the quorum of the trust policy


def test_a_training_that_descends_from_one_without_a_bound_is_refused_where_the_trail_shows_it(tmp_path):
    """The record alone cannot know what its base model had learnt; the trail can."""
    first = make_record(tmp_path, Story(private=False, run="e" * 32, threshold=None, accuracy=None), name="sft.ipynb")
    del first
    from gate_support import write_model

    from rlhf_audit_nb.gate.model import open_model

    base = open_model(tmp_path / "model").weights_digest()
    write_model(tmp_path / "policy-model", 7.0)
    made = make_record(tmp_path, Story(base=base), name="dpo.ipynb", model="policy-model")
    policy = asked(tmp_path, privacy=PRIVACY)
    assert gate(tmp_path / "policy-model", policy, records=[made.record]).passed
    decision = gate(tmp_path / "policy-model", policy, records=[made.record], trail=made.trail)
    assert set(unmet(decision)) == {"privacy.descent"}


def test_an_inherited_bound_counts_with_its_figures(tmp_path):
    inherited = ev.PrivacyInherited(
        kind="released-labels", sources=[{"entry": 1, "run": None, "digest": "a" * 64}], unit="label", epsilon=EPSILON,
        delta=0.0,
    )  # fmt: skip
    made = make_record(tmp_path, Story(private=False, inherited=inherited))
    label = "{epsilon: 2.0, delta: 1e-5, units: [label]}"
    assert gate(made.model, asked(tmp_path, privacy=label)).passed
    assert set(unmet(gate(made.model, asked(tmp_path, privacy=label.replace("2.0", "1.9"))))) == {"privacy.epsilon"}
    assert set(unmet(gate(made.model, asked(tmp_path, privacy=PRIVACY)))) == {"privacy.units"}


STRICTER = {
    "level": ("COSIGNED", "level"),
    "fresh": ("{record: 1 minute}", "fresh.record"),
    "base_models": (f"[{'0' * 64}]", "base_models"),
    "privacy": (
        ("{epsilon: 1.9, delta: 1e-5, units: [annotator]}", "privacy.epsilon"),
        ("{epsilon: 2.0, delta: 9e-6, units: [annotator]}", "privacy.delta"),
        ("{epsilon: 2.0, delta: 1e-5, units: [pair, label]}", "privacy.units"),
    ),
    "evaluations": ("{metrics: [toxicity], thresholds: before training}", "evaluations.toxicity"),
    "evidence": ("{framework: eu_ai_act, requirements: [AIA-A11-1-2e]}", "evidence.AIA-A11-1-2e"),
    "attestations": ("[{role: officer}]", "attestations[0]"),
    "reproduced": ("{verdict: identical, by: [trail]}", "reproduced"),
}


def test_every_value_that_is_made_stricter_refuses_the_same_model(place, policy):
    """The other keys have one value each; `CHANGED` shows what each of those refuses."""
    from gate_support import person

    later = time.time() + 3600
    assert gate(place.model, place.folder / "policy.yaml", now=later).passed
    for key, cases in STRICTER.items():
        for value, name in [cases] if isinstance(cases[0], str) else cases:
            more = {"people": person(place.folder)} if key == "attestations" else {}
            decision = gate(place.model, policy(**{**WHOLE, **more, key: value}), now=later)
            assert (decision.exit_code, [one.id for one in decision.unmet]) == (3, [name]), (key, value)


def test_a_threshold_that_was_set_after_the_training_is_too_late_for_one_that_has_to_come_before(tmp_path):
    made = make_record(tmp_path, Story(threshold_between=True))
    late = "{metrics: [accuracy], thresholds: before training}"
    assert set(unmet(gate(made.model, asked(tmp_path, evaluations=late)))) == {"evaluations.accuracy"}
    assert gate(made.model, asked(tmp_path, evaluations=late.replace("training", "result"))).passed


def test_another_trust_refuses_the_same_model(place, tmp_path):
    other = make_record(tmp_path)
    path = place.folder / "other.yaml"
    path.write_text(f"version: 1\ntrust: {other.folder / 'trust.policy'}\n")
    assert gate(place.model, path).exit_code == 40
    path.unlink()
