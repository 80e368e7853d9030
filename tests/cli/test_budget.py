"""``budget`` where several populations, a picture, or a settlement that is not believed come in."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace

import pytest
from support.racing import DELTA, ONE

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.events import PrivacyPopulation, PrivacySettled, RunFinished, RunStarted, Step, encode_body
from rlhf_audit_nb.privacy.accountant import composed_epsilon
from rlhf_audit_nb.privacy.plan import plan_units
from rlhf_audit_nb.privacy.populations import Roster
from rlhf_audit_nb.privacy.reservation import read_ledger, reserve
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.units import build_units
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.disclosure import disclose


def train(trail, prefix, *, settle=ONE.steps, experiment="study", budget=8.0):
    """One training over ten annotators of that name, with its steps, settled as is said."""
    run = uuid.uuid4().hex
    names = [f"{prefix}-{number}" for number in range(10)]
    config = PrivacyConfig(
        epsilon=budget, delta=DELTA, noise_multiplier=ONE.noise_multiplier, sampling_rate=0.2, loss_noise=None
    )
    roster = Roster.of(names, len(names))
    prior = read_ledger(trail.reader(), trail).mechanisms("annotator", "annotator_id", roster)
    plan = plan_units(config, build_units(names, len(names), "annotator"), 0.2, ONE.steps, 5, prior)

    def append(event):
        trail.append(event.TYPE, encode_body(event), run=run).wait()

    append(RunStarted(experiment=experiment, entry_point="cell", tool="t"))
    reserve(trail, replace(plan, roster=roster), SealedRandom(bytes(range(32))), reservation=run, run=run)
    for step in range(1, ONE.steps + 1):
        append(Step(step=step, epsilon=1.0))
    total = composed_epsilon([*prior, ONE.with_steps(settle)], DELTA)
    append(PrivacySettled(reservation=run, steps=settle, epsilon_run=total, epsilon_total=total))
    append(RunFinished(status="completed", steps=ONE.steps, trained=True))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A trail with one training each of two populations, and a second one of the first."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "audit") as trail:
        train(trail, "north", experiment="pilot")
        train(trail, "south")
        train(trail, "north")
    return tmp_path / "audit"


def test_populations_are_shown_each_with_its_own_total(run, folder):
    code, out, _ = run("budget", "show", "--trail", folder, "--json")
    answer = json.loads(out)
    one, two = (composed_epsilon([ONE.with_steps(count * ONE.steps)], DELTA) for count in (1, 2))
    assert code == 0
    assert answer["epsilon"] == pytest.approx(two)
    assert [each["spent"] for each in answer["populations"]] == [pytest.approx(two), pytest.approx(one)]
    assert [each["population"] for each in answer["spends"]] == [1, 2, 1]
    assert answer["spends"][0]["experiment"] == "pilot"
    words = run("budget", "show", "--trail", folder)[1]
    assert "2 populations share nobody" in words
    assert "population 2: spent 3 steps" in words
    assert "Population 1 (10 annotators, 2 trainings)" in words


def test_who_has_not_the_keys_sees_everything_composed(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "somebody else"))
    answer = json.loads(run("budget", "show", "--trail", folder, "--json")[1])
    assert answer["epsilon"] == pytest.approx(composed_epsilon([ONE.with_steps(3 * ONE.steps)], DELTA))
    assert (len(answer["populations"]), answer["unproven"]) == (1, 3)
    assert "cannot be shown here" in run("budget", "show", "--trail", folder)[1]
    words = run("budget", "check", "--trail", folder)[1]
    assert "keys of this trail are not here" in words
    assert "rosters 1 and 2: not proven" in words


@pytest.mark.parametrize(("name", "start"), [("b.svg", b"<svg"), ("b.png", b"\x89PNG")])
def test_the_picture_is_written_beside_the_words(run, folder, tmp_path, name, start):
    code, out, _ = run("budget", "show", "--trail", folder, "--figure", tmp_path / name, "--json")
    assert code == 0
    assert json.loads(out)["figure"] == str(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_nothing_that_was_spent_gives_no_picture_and_no_file(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    Trail.open(tmp_path / "audit").close()
    code, _, err = run("budget", "show", "--trail", tmp_path / "audit", "--figure", tmp_path / "b.svg")
    assert code == 2
    assert "no figure to draw" in err
    assert not (tmp_path / "b.svg").exists()


def test_what_is_left_depends_on_the_population(run, folder):
    argv = ("budget", "left", "--noise-multiplier", "2", "--sampling-rate", "0.2", "--trail", folder, "--json")
    steps = [json.loads(run(*argv, *more)[1])["steps"] for more in ((), ("--population", 2), ("--population", 0))]
    assert steps[2] == steps[1] + ONE.steps == steps[0] + 2 * ONE.steps
    tried = json.loads(run(*argv, "--epsilon", "4")[1])
    assert tried["budget"] == 4.0
    assert tried["steps"] < steps[0]
    noise = ("budget", "left", "--steps", steps[0], "--sampling-rate", "0.2", "--trail", folder, "--json")
    assert json.loads(run(*noise)[1])["noise_multiplier"] == pytest.approx(2.0, rel=2e-3)
    code, _, err = run(*argv, "--population", 7)
    assert code == 2
    assert "there is no population 7" in err


def test_rosters_are_checked_from_the_vault_and_from_two_openings(run, folder, tmp_path):
    code, out, _ = run("budget", "check", "--trail", folder, "--json")
    answer = json.loads(out)
    assert code == 0
    assert [(one["units"], one["state"]) for one in answer["populations"]] == [(10, "open")] * 2
    assert [(one["said"], one["found"]) for one in answer["relations"]] == [(True, "disjoint")]
    files = []
    with Trail.open(folder) as trail:
        for entry in trail.reader().entries(type=PrivacyPopulation.TYPE):
            files.append(tmp_path / f"{entry.index}.opening")
            files[-1].write_bytes(disclose(trail, entry.index).encode())
    code, out, _ = run("budget", "check", "--opening", files[0], "--opening", files[1], "--json")
    assert (code, json.loads(out)["found"]) == (0, "disjoint")
    words = run("budget", "check", "--opening", files[0], "--opening", files[1])[1]
    assert "share nobody" in words
    assert "UNANCHORED" in words
    code, out, _ = run("budget", "check", "--opening", files[0], "--opening", files[0])
    assert code == 3
    assert "share somebody" in out
    code, _, err = run("budget", "check", "--opening", files[0])
    assert code == 2
    assert "give --opening twice" in err


def test_a_settlement_that_is_not_believed_is_said_by_budget_and_by_verify(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "audit") as trail:
        train(trail, "north", settle=1)
    answer = json.loads(run("budget", "show", "--trail", tmp_path / "audit", "--json")[1])
    (doubt,) = answer["doubts"]
    assert "settles 1 step and entry" in doubt
    assert answer["reserved"] == pytest.approx(composed_epsilon([ONE], DELTA))
    assert "not believed" in run("budget", "show", "--trail", tmp_path / "audit")[1]
    assert run("budget", "check", "--trail", tmp_path / "audit")[0] == 3
    code, out, _ = run("verify", tmp_path / "audit", "--json")
    told = json.loads(out)
    assert (code, told["level"]) == (0, "UNANCHORED")  # what the key signed is what the trail holds
    assert [(one["code"], one["message"]) for one in told["notes"]] == [("settlement-not-believed", doubt)]
    assert "worth knowing: entry" in run("verify", tmp_path / "audit")[1]


def test_an_honest_trail_has_no_notes(run, folder):
    assert "notes" not in json.loads(run("verify", folder, "--json")[1])
