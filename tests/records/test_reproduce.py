"""Reproducing a record: identical where it is, where it differs if not, and the result kept without private values."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from records_support import HAND, Trained, hand_files, policy_of, write_notebook

from rlhf_audit_nb import AuditableRLHF, cli
from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import RecordReproduced, RecordSealed, decode_body
from rlhf_audit_nb.records import open_record, run_notebook
from rlhf_audit_nb.records.additions import REPRODUCTION
from rlhf_audit_nb.records.reproduce import (
    Reproduction,
    ReproductionRefusedError,
    read_tolerance,
    reproduce_record,
)
from rlhf_audit_nb.records.reproduce_keeping import keep_reproduction, place_of_trail
from rlhf_audit_nb.records.reproduce_runs import Tolerance
from rlhf_audit_nb.records.reproductions import reproductions_of
from rlhf_audit_nb.records.rerun import ReplayFailedError, ReplayRefusedError
from rlhf_audit_nb.records.run import NotebookFailedError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy, verify_trail

PARAMETERS = ("rate = 0.5", {"tags": ["parameters"]})


@dataclass(frozen=True)
class Recorded:
    folder: Path
    record: Path
    policy: TrustPolicy

    def again(self, files: list[Path], **settings: Any) -> Reproduction:
        return reproduce_record(self.record, policy=self.policy, files=files, **settings)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A record of a public run, made elsewhere."""
    folder = tmp_path_factory.mktemp("public")
    hand_files(folder)
    source = write_notebook(folder / "train.ipynb", [PARAMETERS, HAND, "len(rows)"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        run_notebook(source, folder / "record.ipynb", {"rate": 0.25}, trail=folder / "audit", cwd=folder)
    return Recorded(folder, folder / "record.ipynb", policy_of(folder / "audit"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reproduces has none of the keys, another home, and a working folder without the data."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(tmp_path / "own"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


# --- public records --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def identical(public: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    return public.again(hand_files(tmp_path_factory.mktemp("same")))


def test_a_public_record_comes_out_identical_and_says_what_was_compared(identical: Reproduction) -> None:
    assert identical.verdict == "identical", str(identical)
    assert identical.exit_code == 0
    assert identical.compared == {"data": 1, "settings": 1, "metrics": 3, "weights": 3, "outputs": 4, "outcome": 2}
    assert (identical.first, identical.different, identical.tolerated) == (None, {}, {})
    assert identical.times == 3
    assert identical.environment.word == "same"
    applied = {rule.rule: rule.applied for rule in identical.rules if rule.applied}
    assert applied == {"memory addresses": 2}
    said = identical.words()
    assert said[0] == "identical  14 things compared"
    assert "measured times among metrics 3 (left out)" in "\n".join(said)


@pytest.fixture(scope="module")
def differing(public: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    """Run again with another file, and with a package that computes a little otherwise and says so."""
    files = hand_files(tmp_path_factory.mktemp("other"), rows="a\nB\n", scale=1.0 + 1e-9, packages={"stub": "1.1"})
    return public.again(files)


def test_other_data_and_another_package_are_found_place_before_value(differing: Reproduction) -> None:
    assert differing.verdict == "different"
    assert differing.exit_code == 1
    assert differing.first is not None
    assert differing.first.startswith("run 1 (ffffffff): data.bound: digest (entry ")
    assert differing.different == {"data": 1, "metrics": 3, "weights": 3, "outputs": 1}
    first = differing.found[0]
    assert len(first.expected) == len(first.found) == 64
    assert first.expected != first.found
    metric = next(item for item in differing.found if item.part == "metrics")
    assert metric.place.startswith("run 1 (ffffffff): step 0: metrics.loss (entry ")
    assert (metric.expected, metric.found) == (0.25, 0.25 * (1.0 + 1e-9))
    assert differing.environment.word == "other"
    assert "Packages differ: stub 1.0 -> 1.1." in differing.environment.differs
    words = "\n".join(differing.words())
    assert "cells[2].outputs[0].text: stdout of cell 3 (id cell-1) is not as it was" in words
    assert "-last loss 0.08333333333333333 <object object at 0x…>" in words


def test_nothing_is_tolerated_that_was_not_stated(differing: Reproduction) -> None:
    assert differing.tolerated == {}
    assert differing.tolerance.to_dict() == {}


def test_a_tolerance_is_stated_in_its_form_or_refused() -> None:
    assert read_tolerance(["metrics=1e-6", "weights=any"]) == Tolerance(metrics=1e-6, weights=True)
    assert read_tolerance([]) == Tolerance()
    for wrong in ("metrics", "metrics=x", "metrics=0", "metrics=nan", "metrics=2", "weights=1e-6", "loss=1e-6"):
        with pytest.raises(ConfigError, match="states no tolerance"):
            read_tolerance([wrong])
    with pytest.raises(ConfigError, match="states no tolerance"):
        read_tolerance(["metrics=1e-6", "metrics=1e-3"])


def test_what_a_notebook_misses_is_told_and_nothing_is_called_different(public: Recorded, tmp_path: Path) -> None:
    with pytest.raises(ReplayFailedError, match="Cell 3 of 4 raised ModuleNotFoundError when it ran again") as failed:
        public.again(hand_files(tmp_path)[:1])
    assert "--files" in failed.value.next_step
    assert failed.value.exit_code == 1


# --- keeping ---------------------------------------------------------------------------------------------------------


def copied(public: Recorded, folder: Path) -> Path:
    return Path(shutil.copy(public.record, folder / "record.ipynb"))


def test_the_result_is_an_entry_of_ones_own_trail_and_an_addition_by_its_key(
    public: Recorded, identical: Reproduction, differing: Reproduction, tmp_path: Path
) -> None:
    record = copied(public, tmp_path)
    before = json.loads(record.read_text())
    with Trail.open(tmp_path / "own") as trail:
        kept = [keep_reproduction(result, record, trail, policy=public.policy) for result in (identical, differing)]
        entries = list(trail.reader().entries(type=RecordReproduced.TYPE))
    assert [item.entry for item in kept] == [entry.index for entry in entries]
    event = decode_body(entries[0].type, entries[0].body)
    assert isinstance(event, RecordReproduced)
    opened = open_record(record, policy=public.policy)
    assert opened.sealed is not None
    assert (event.record, event.digest) == (opened.sealed.record, opened.sealed.digest)
    assert event.verdict == "identical"
    assert verify_trail(tmp_path / "own").level >= Level.UNANCHORED
    assert opened.verdict.level is Level.UNANCHORED
    said = reproductions_of(opened)
    assert [item.verdict for item in said] == ["identical", "different"]
    assert not any(item.own for item in said)
    assert [item.predicate_type for item in opened.additions] == [REPRODUCTION] * 2
    assert opened.additions[0].predicate["entry"]["origin"] == kept[0].origin
    assert opened.additions[0].key_id == kept[0].key_id
    subject = json.loads(opened.additions[0].payload)["subject"]
    assert [item["digest"]["sha256"] for item in subject] == [event.digest, event.statement]
    notes = [note.message for note in opened.notes if note.code == "reproduced"]
    assert notes[0].startswith(f"reproduced: identical, by key {kept[0].key_id[:16] if kept[0].key_id else ''}, 20")
    assert "different, first in run 1 (ffffffff): data.bound: digest" in notes[1]
    after = json.loads(record.read_text())
    seal = after["metadata"]["rlhf_audit"]
    assert len(seal.pop("additions")) == 2
    assert seal == before["metadata"]["rlhf_audit"]
    assert after["cells"] == before["cells"]


def test_a_record_that_was_changed_meanwhile_gets_no_addition_and_the_entry_stands(
    public: Recorded, identical: Reproduction, tmp_path: Path
) -> None:
    from rlhf_audit_nb.errors import RecordError

    record = copied(public, tmp_path)
    record.write_text(record.read_text().replace("rate * stub", "rate + stub"))
    before = record.read_bytes()
    with Trail.open(tmp_path / "own") as trail:
        with pytest.raises(RecordError, match="Nothing is added"):
            keep_reproduction(identical, record, trail, policy=public.policy)
        assert len(list(trail.reader().entries(type=RecordReproduced.TYPE))) == 1
    assert record.read_bytes() == before


def test_the_command_keeps_its_result_where_it_is_told_to(
    public: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = copied(public, tmp_path)
    hand_files(tmp_path / "cwd")
    policy = tmp_path / "trust.policy"
    policy.write_text(public.policy.format())
    asked = ["reproduce", str(record), "--policy", str(policy), "--files", "rows.txt", "--files", "stub.py"]
    assert cli.main([*asked, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "identical"
    assert answer["kept"]["addition"] == 0
    assert TrailReader.open(tmp_path / "own").size == 2
    assert cli.main(["verify", str(record), "--policy", str(policy)]) == 0
    assert "reproduced: identical, by key" in " ".join(capsys.readouterr().out.split())
    with_record = record.read_bytes()
    (tmp_path / "rules.cfg").write_text("[all]\nregex: last.*\nreplace: X\n")
    assert cli.main([*asked, "--no-entry", "--normalise", str(tmp_path / "rules.cfg")]) == 0
    out = capsys.readouterr().out
    assert "all 2 (file)" in out
    assert "nowhere" in out
    assert record.read_bytes() == with_record
    assert TrailReader.open(tmp_path / "own").size == 2


def test_a_result_goes_to_the_named_trail_the_usual_one_or_the_records_own(public: Recorded, tmp_path: Path) -> None:
    origin = TrailReader.open(public.folder / "audit").origin
    assert place_of_trail(public.record, tmp_path / "named", origin) == tmp_path / "named"
    assert place_of_trail(public.record, None, origin) == public.folder / "audit"
    assert place_of_trail(public.record, None, "another/origin") == tmp_path / "own"
    (tmp_path / "own").mkdir()
    assert place_of_trail(public.record, None, origin) == tmp_path / "own"


def test_an_auditor_object_does_the_same_on_its_own_trail(public: Recorded, tmp_path: Path) -> None:
    record = copied(public, tmp_path)
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "auditors")))
    files = hand_files(tmp_path, scale=1.0 + 1e-9)
    stated = {"metrics": 1e-6, "outputs": 1e-6, "weights": "any"}
    result = auditor.reproduce(record, policy=public.policy, files=files, tolerance=stated)
    assert result.verdict == "equal within tolerance"
    assert result.tolerated == {"metrics": 3, "weights": 3, "outputs": 1}
    assert result.different == {}
    assert "metrics=1e-06, outputs=1e-06, weights=any" in str(result)
    assert result.event().tolerance == stated
    (said,) = reproductions_of(open_record(record, policy=public.policy))
    assert str(said).startswith(
        "reproduced: equal within tolerance (metrics=1e-06, outputs=1e-06, weights=any), by key"
    )
    auditor.trail.close()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_somebody_elses_notebook_gets_no_passphrase_and_no_budget_of_whoever_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RLHF_AUDIT_PASSPHRASE", "RLHF_AUDIT_PERSON_PASSPHRASE", "RLHF_AUDIT_NEW_PASSPHRASE", "RLHF_AUDIT_SLOT")
    look = (
        "import os\nfrom rlhf_audit_nb.trail import Trail\n"
        "Trail.open(os.environ['RLHF_AUDIT_TRAIL']).close()\n"
        f"[name for name in {names!r} if name in os.environ]"
    )
    source = write_notebook(tmp_path / "look.ipynb", [look])
    run_notebook(source, tmp_path / "record.ipynb", trail=tmp_path / "audit")
    for name in names:
        monkeypatch.setenv(name, "five random words")
    policy = policy_of(tmp_path / "audit")
    again = reproduce_record(tmp_path / "record.ipynb", policy=policy, output=tmp_path / "again.ipynb")
    assert again.verdict == "identical"
    (cell,) = json.loads((tmp_path / "again.ipynb").read_text())["cells"]
    assert cell["outputs"][0]["data"]["text/plain"] == ["[]"]


@pytest.fixture
def never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        pytest.fail("the notebook was run")

    monkeypatch.setattr("rlhf_audit_nb.records.rerun.execute", run)


@pytest.mark.usefixtures("never_runs")
def test_a_record_that_does_not_hold_is_not_run_and_makes_no_trail(
    public: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = copied(public, tmp_path)
    record.write_text(record.read_text().replace("rate * stub", "rate + stub"))
    policy = tmp_path / "trust.policy"
    policy.write_text(public.policy.format())
    assert cli.main(["reproduce", str(record), "--policy", str(policy)]) == 40
    assert "does not verify, so it is not run" in capsys.readouterr().err
    assert not (tmp_path / "own").exists()
    with pytest.raises(ConfigError, match="states no tolerance"):
        read_tolerance(["weights"])
    assert cli.main(["reproduce", str(public.record), "--files", "a", "--cwd", "b"]) == 2


@pytest.mark.usefixtures("never_runs")
def test_an_aborted_record_is_refused(public: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    import msgspec

    opened = open_record(public.record, policy=public.policy)
    assert isinstance(opened.sealed, RecordSealed)
    cut = replace(opened, sealed=msgspec.structs.replace(opened.sealed, status="aborted"))
    monkeypatch.setattr("rlhf_audit_nb.records.reproduce.open_sound_record", lambda *_, **__: cut)
    with pytest.raises(ReproductionRefusedError, match="cut short"):
        public.again([])


def test_a_failed_record_is_reproduced_by_failing_again_and_by_nothing_else(tmp_path: Path) -> None:
    source = write_notebook(
        tmp_path / "failing.ipynb",
        ["from pathlib import Path", "assert Path('gone').exists(), 'it is not there'", "print('never')"],
    )
    record = tmp_path / "failing.record.ipynb"
    with pytest.raises(NotebookFailedError):
        run_notebook(source, record, trail=tmp_path / "audit")
    assert reproduce_record(record).verdict == "identical"
    (tmp_path / "cwd" / "gone").touch()
    result = reproduce_record(record, files=[tmp_path / "cwd" / "gone"])
    assert result.verdict == "different"
    assert result.first == "record.sealed: status (cell cell-1)"
    assert result.environment.word == "unknown", "no run has recorded one"


# --- private records -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_public_and_two_private_trainings_come_out_bit_for_bit(trained: Trained) -> None:
    before = {path: path.read_bytes() for path in trained.folder.rglob("*") if path.is_file()}
    result = reproduce_record(trained.record, trained.openings, policy=trained.policy, files=[trained.votes])
    assert result.verdict == "identical", str(result)
    assert result.private
    assert result.compared["weights"] >= 3
    assert result.compared["metrics"] >= 2
    assert result.compared["private"] >= 20
    assert result.compared["outputs"] >= 5
    assert result.environment.word == "same", str(result)
    assert len(result.seeds) == 2
    assert {path: path.read_bytes() for path in trained.folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_other_data_and_threads_are_named_and_nothing_of_private_data_is_kept(trained: Trained, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in trained.votes.read_text().splitlines()]
    changed = [*rows[:-1], {**rows[-1], "chosen": rows[-1]["chosen"] + "?"}]
    (tmp_path / "votes.jsonl").write_text("\n".join(json.dumps(row) for row in changed) + "\n")
    result = reproduce_record(
        trained.record, trained.openings, policy=trained.policy, files=[tmp_path / "votes.jsonl"], threads=2
    )
    assert result.verdict == "different"
    assert result.environment.word == "other"
    assert "Torch's threads differs: 1 then, 2 now." in result.environment.differs
    inside = [item for item in result.found if item.part == "private"]
    assert inside
    assert all((item.expected, item.found) == (None, None) for item in inside if ": step " in item.place)
    assert all(item.expected is None for item in result.outputs)
    event = result.event()
    assert event.verdict == "different"
    assert event.first in event.different
    assert set(event.different.values()) == {1}


@pytest.mark.usefixtures("never_runs")
def test_without_the_seeds_a_private_training_is_not_run_with_fresh_noise(trained: Trained) -> None:
    with pytest.raises(ReplayRefusedError, match="with fresh noise it would be a new training, which spends budget"):
        reproduce_record(trained.record, policy=trained.policy)
