"""Replaying a record: its notebook runs again from the opened seeds and comes out the same, or it is said where not."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from records_support import Trained, write_notebook

from rlhf_audit_nb import cli
from rlhf_audit_nb.errors import VaultError
from rlhf_audit_nb.events import PrivacyReserved, RunResumed, decode_body
from rlhf_audit_nb.records import open_record, run_notebook
from rlhf_audit_nb.records.replay import ReplayFailedError, ReplayRefusedError, replay_record
from rlhf_audit_nb.records.unsound import InvalidRecordError
from rlhf_audit_nb.trail import Trail, TrailReader, TrustPolicy
from rlhf_audit_nb.trail.disclosure import disclose
from rlhf_audit_nb.trail.erasure import erase


@dataclass(frozen=True)
class Recorded:
    folder: Path
    record: Path
    policy: TrustPolicy
    openings: tuple[Path, ...]

    @property
    def votes(self) -> Path:
        return self.folder / "votes.jsonl"

    def again(self, **changes: Any) -> Any:
        settings = {"policy": self.policy, "files": [self.votes], **changes}
        openings = settings.pop("openings", self.openings)
        return replay_record(self.record, openings, **settings)


@pytest.fixture(scope="module")
def recorded(trained: Trained) -> Recorded:
    """A record of two private trainings, the second from the checkpoint of the first, made elsewhere."""
    return Recorded(trained.folder, trained.record, trained.policy, trained.openings)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever replays has none of the keys, another home, and a working folder without the data."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(tmp_path / "own"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.slow
def test_a_record_comes_out_the_same_bit_for_bit_and_nothing_is_left_behind(recorded: Recorded, tmp_path: Path) -> None:
    before = contents(recorded.folder)
    told: list[tuple[int, int, str]] = []
    result = recorded.again(
        openings=recorded.openings[::-1],  # in whatever order they are named
        output=tmp_path / "replayed.ipynb",
        progress=lambda *what: told.append(what),
    )
    assert result.equal, str(result)
    assert result.warnings == ()
    assert (result.comparison.trainings, result.comparison.steps, result.comparison.digests) == (2, 4, 6)
    assert contents(recorded.folder) == before
    assert not (tmp_path / "own").exists()
    assert not (tmp_path / "home" / "keys").exists()
    assert list((tmp_path / "tmp").glob("rlhf-audit-*")) == []
    assert list((tmp_path / "cwd").iterdir()) == []
    assert told[-1][:2] == (5, 6)
    seeds = [_seed(path) for path in recorded.openings]
    assert not any(seed in (tmp_path / "replayed.ipynb").read_text() for seed in seeds)


def _seed(opening: Path) -> str:
    import base64

    payload = json.loads(base64.b64decode(json.loads(opening.read_text())["payload"]))
    return str(payload["seed"])


@pytest.mark.slow
def test_one_letter_of_the_data_is_named_by_its_step_and_by_the_exit_code(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in recorded.votes.read_text().splitlines()]
    changed = [{**row, "chosen": row["chosen"][:-1] + "?"} for row in lines]
    (tmp_path / "cwd" / "votes.jsonl").write_text("\n".join(json.dumps(row) for row in changed) + "\n")
    policy = tmp_path / "trust.policy"
    policy.write_text(recorded.policy.format())
    openings = [part for path in recorded.openings for part in ("--opening", str(path))]
    code = cli.main(
        ["replay", str(recorded.record), *openings, "--files", "votes.jsonl", "--policy", str(policy), "--json"]
    )
    out, err = capsys.readouterr()
    assert code == 1, err
    answer = json.loads(out)
    assert answer["equal"] is False
    assert answer["first_step"] == 1
    assert answer["differences"][0]["where"] == "step 1"
    assert answer["differences"][0]["expected"] is None
    assert "differs" in err


@pytest.mark.slow
def test_a_replay_without_the_data_says_which_cell_missed_it(recorded: Recorded) -> None:
    with pytest.raises(ReplayFailedError, match="raised FileNotFoundError") as failed:
        recorded.again(files=[])
    assert "votes.jsonl" in failed.value.said
    assert "--files" in failed.value.next_step
    assert failed.value.exit_code == 1


def test_the_record_names_the_checkpoint_that_its_second_training_came_from(recorded: Recorded) -> None:
    entries = list(TrailReader.open(recorded.folder / "audit").entries(type=RunResumed.TYPE))
    (said,) = (decode_body(entry.type, entry.body) for entry in entries)
    assert isinstance(said, RunResumed)
    assert said.step == 2
    assert said.entry is not None
    claimed = open_record(recorded.record, policy=recorded.policy).statement["predicate"]["buildDefinition"]
    (named,) = [item for item in claimed["resolvedDependencies"] if item["name"] == "checkpoint"]
    assert named["digest"] == {"sha256": said.checkpoint}
    assert named["annotations"]["step"] == 2


# --- refused before anything runs ------------------------------------------------------------------------------------


@pytest.fixture
def never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        pytest.fail("the notebook was run")

    monkeypatch.setattr("rlhf_audit_nb.records.rerun.execute", run)


@pytest.mark.usefixtures("never_runs")
def test_an_opening_that_is_missing_is_named_with_what_to_do(recorded: Recorded) -> None:
    missing = int(recorded.openings[1].stem.removeprefix("entry-"))
    with pytest.raises(ReplayRefusedError, match=f"seed of entry {missing} is not opened") as refused:
        recorded.again(openings=recorded.openings[:1])
    assert f"disclose {missing}" in refused.value.next_step
    assert "erased" in refused.value.next_step
    with pytest.raises(ReplayRefusedError, match="entries "):
        recorded.again(openings=())


@pytest.mark.usefixtures("never_runs")
def test_openings_that_are_forged_or_of_something_else_are_refused(recorded: Recorded, tmp_path: Path) -> None:
    content = json.loads(recorded.openings[0].read_text())
    other = json.loads(recorded.openings[1].read_text())
    forged = tmp_path / "forged.opening"
    for field in ("payload", "key", "proof", "entry"):
        body = {**content, field: other[field]}
        body.pop("sha256")
        raw = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
        from hashlib import sha256

        forged.write_bytes(raw[:-1] + b',"sha256":"%s"}\n' % sha256(raw).hexdigest().encode())
        with pytest.raises(ReplayRefusedError, match="does not verify"):
            recorded.again(openings=(forged, recorded.openings[1]))
    with Trail.open(tmp_path / "foreign", home=tmp_path / "foreign-home") as trail:
        from rlhf_audit_nb.events import DataBound, DataPrivate, encode_body, encode_private

        bound = DataBound(role="train", columns=["prompt"])
        trail.append(bound.TYPE, encode_body(bound), private=encode_private(DataPrivate(rows=1, digest="0"))).wait()
        foreign = tmp_path / "foreign.opening"
        foreign.write_bytes(disclose(trail, 1).encode())
    with pytest.raises(ReplayRefusedError, match=r"does not verify|reserves none"):
        recorded.again(openings=(foreign, *recorded.openings))


@pytest.mark.usefixtures("never_runs")
def test_a_record_that_was_changed_is_not_run(recorded: Recorded, tmp_path: Path) -> None:
    changed = tmp_path / "changed.ipynb"
    text = recorded.record.read_text()
    assert "max_steps=3" in text
    changed.write_text(text.replace("max_steps=3", "max_steps=4"))
    with pytest.raises(InvalidRecordError, match="does not verify, so it is not run"):
        replay_record(changed, recorded.openings, policy=recorded.policy)


@pytest.mark.usefixtures("never_runs")
def test_a_record_without_private_training_has_nothing_to_replay(tmp_path: Path) -> None:
    source = write_notebook(tmp_path / "plain.ipynb", ["1 + 1"])
    run_notebook(source, tmp_path / "plain.record.ipynb", trail=tmp_path / "audit")
    with pytest.raises(ReplayRefusedError, match="nothing to replay"):
        replay_record(tmp_path / "plain.record.ipynb")


@pytest.mark.usefixtures("never_runs")
def test_the_key_holders_own_vault_says_that_a_seed_was_erased(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(recorded.folder / "audit", tmp_path / "audit")
    shutil.copytree(recorded.folder / "home", tmp_path / "copied")
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "copied"))
    with Trail.open(tmp_path / "audit") as trail:
        run = next(entry.run for entry in trail.reader().entries(type=PrivacyReserved.TYPE))
        erase(trail, None, reason="retention", run=run)
        with pytest.raises(VaultError, match="was erased") as refused:
            recorded.again(openings=recorded.openings[1:], trail=trail)
    assert refused.value.reason == "erased"


def test_seeds_stand_in_no_command_line_and_no_environment(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: dict[str, Any] = {}

    def executed(opened: Any, environment: dict[str, str], scratch: Path, work: Path, *more: Any) -> Any:
        path = Path(environment["RLHF_AUDIT_REPLAY"])
        modes = [item.stat().st_mode & 0o777 for item in (path, scratch)]
        handed.update(environment=environment, modes=modes, text=path.read_text(), work=work)
        assert path.parent == scratch
        assert more == (None, None)
        return opened.notebook, False

    monkeypatch.setattr("rlhf_audit_nb.records.rerun.execute", executed)
    result = recorded.again()
    assert not result.equal, "a replay in which nothing was trained is not equal"
    seeds = [_seed(path) for path in recorded.openings]
    assert all(seed in handed["text"] for seed in seeds)
    assert handed["modes"] == [0o600, 0o700]
    assert not handed["work"].exists()
    assert not any(seed in value for value in handed["environment"].values() for seed in seeds)
    assert not any(seed in part for part in sys.argv for seed in seeds)
    assert "RLHF_AUDIT_RECORD" not in handed["environment"]
    assert not Path(handed["environment"]["RLHF_AUDIT_REPLAY"]).exists()
    assert "RLHF_AUDIT_REPLAY" not in os.environ
