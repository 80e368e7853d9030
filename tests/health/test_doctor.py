"""The doctor: each question has a good answer and one that is the real failure, and nothing is changed by asking."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.racing import DELTA, ONE
from support.trails import without_cross_checks
from support.tsa import Authority

from rlhf_audit_nb import AuditableRLHF, AuditConfig, cli, health
from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, StoreError, UnsupportedTrainerError
from rlhf_audit_nb.events import PrivacySettled, RunFinished, RunStarted, Step, encode_body
from rlhf_audit_nb.health import CHECKS, Examination, examine, machine
from rlhf_audit_nb.privacy.hooks import check_classes
from rlhf_audit_nb.privacy.plan import plan_units
from rlhf_audit_nb.privacy.reservation import read_ledger, reserve
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.units import Units
from rlhf_audit_nb.trail import Trail, TrailReader
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.key_care import encrypt_keys, note_backup
from rlhf_audit_nb.trail.keys import create_keys, local_policy
from rlhf_audit_nb.trail.tiles import publish_tiles
from rlhf_audit_nb.trail.writer import RUN_STARTED

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRIES = 300


def fill(folder: Path, home: Path, entries: int = ENTRIES) -> None:
    with Trail.open(folder, home=home) as trail:
        for number in range(entries - 1):
            trail.append("example.note", b'{"number":%d}' % number, private=b"secret" if number < 3 else None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed trail of 300 entries, three of them with a private half; never changed."""
    folder = tmp_path_factory.mktemp("template")
    fill(folder / "audit", folder / "home")
    return folder


class Patient:
    """A trail of a test's own, with its keys."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.audit, self.home = folder, folder / "audit", folder / "home"

    def look(self, **asked: Any) -> Examination:
        return examine(self.audit, home=self.home, **asked)

    @property
    def origin(self) -> str:
        return TrailReader.open(self.audit).origin

    @property
    def ring(self) -> Path:
        (ring,) = (self.home / "keys").iterdir()
        return ring

    def change(self, statement: str, *values: Any, file: str = "trail.sqlite") -> None:
        """Change the database behind everybody's back; afterwards it is one file again."""
        with sqlite3.connect(self.audit / file) as raw:
            raw.execute(statement, values)
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        raw.close()

    def change_entry(self, number: int) -> None:
        """Change one byte of the entry that notes this number."""
        with sqlite3.connect(self.audit / "trail.sqlite") as raw:
            rows = raw.execute("SELECT first, data FROM bundles").fetchall()
        raw.close()
        said = b'{"number":%d}' % number
        ((first, data),) = [(first, data) for first, data in rows if said in data]
        self.change(
            "UPDATE bundles SET data = ? WHERE first = ?",
            data.replace(said, said[:-2] + (b"7}" if said[-2:] == b"8}" else b"8}")),
            first,
        )


@pytest.fixture
def patient(template: Path, tmp_path: Path) -> Patient:
    shutil.copytree(template, tmp_path / "it")
    return Patient(tmp_path / "it")


def status(found: Examination, check: str) -> tuple[str, str]:
    return found[check].status, found[check].message


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Every file and folder below: content, mode and time of the last change."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder",
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in (folder, *folder.rglob("*"))
    }


# --- nothing is changed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_nothing_is_changed_on_a_trail_that_is_closed(patient: Patient, full: bool) -> None:
    before = state(patient.folder)
    found = patient.look(full=full)
    assert found["trail"].status == found["vault"].status == "ok"
    assert state(patient.folder) == before


DIES = """
import os, sys
from pathlib import Path
from rlhf_audit_nb.trail import Trail
trail = Trail.open(Path(sys.argv[1]), home=Path(sys.argv[2]))
trail.append("run.started", b'{"experiment":"dead"}', run="0123456789abcdef")
trail.append("example.note", b"{}", private=b"secret").wait()
os._exit(0)
"""


@pytest.fixture
def died(patient: Patient) -> Patient:
    """A process has died in an open run: the write-ahead logs still hold what it wrote."""
    subprocess.run([sys.executable, "-c", DIES, patient.audit, patient.home], check=True)
    assert (patient.audit / "trail.sqlite-wal").stat().st_size > 0
    return patient


def test_nothing_is_changed_after_a_crash_and_what_the_log_holds_is_seen(died: Patient) -> None:
    before = state(died.folder)
    found = died.look(full=True)
    assert found["trail"].facts["entries"] == ENTRIES + 2
    assert status(found, "runs") == (
        "warn",
        "1 run without an end (01234567), whose process is gone.",
    )
    assert state(died.folder) == before


def test_a_folder_that_cannot_be_written_is_looked_at_all_the_same(patient: Patient) -> None:
    """Looked at by a process that has no power over files, in folders of mode 0555."""
    shown = Path(shutil.copytree(patient.folder, f"/tmp/rlhf-audit-doctor-{os.getpid()}"))
    try:
        for path in (shown, *shown.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = state(shown)
        said = powerless_look(shown)
        assert said["trail"]["status"] == said["seen"]["status"] == "ok"
        assert said["disk"]["status"] == "fail"
        assert "cannot be written" in said["disk"]["message"]
        assert said["keys"]["status"] == "fail"
        assert state(shown) == before
    finally:
        for path in (shown, *shown.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(shown)


def powerless_look(folder: Path) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            found = examine(folder / "audit", home=folder / "home").to_dict()["checks"]
            os.write(writing, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return dict(json.loads(answer))


def test_neither_a_trail_nor_keys_are_made(tmp_path: Path) -> None:
    found = examine(tmp_path / "audit", home=tmp_path / "home")
    assert status(found, "trail") == ("fail", "There is no trail in audit.")
    assert found["disk"].status != "fail"
    assert found.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_breaks_does_not_keep_the_others_from_being_made(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(health, "CHECKS", {**CHECKS, "seen": breaks})
    found = patient.look()
    assert [finding.check for finding in found.findings] == list(CHECKS)
    assert status(found, "seen") == ("fail", "The check itself failed: RuntimeError: out of order.")
    assert found["vault"].status == "ok"


# --- the trail -------------------------------------------------------------------------------------------------------


def test_a_store_that_is_damaged_fails_alone(patient: Patient) -> None:
    path = patient.audit / "trail.sqlite"
    path.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
    found = patient.look()
    assert found["trail"].status == "fail"
    assert [name for name in CHECKS if found[name].message == "Not known: the trail cannot be read."]
    assert found["disk"].status == found["versions"].status == "ok"
    assert found["vault"].facts["openings"] == 3


def test_a_changed_entry_among_the_newest_is_found(patient: Patient) -> None:
    patient.change_entry(298)
    said = status(patient.look(), "trail")
    assert said == ("fail", "Entry 299 does not lie under the signed checkpoint.")


def test_a_changed_entry_among_the_old_is_found_when_all_are_verified(patient: Patient) -> None:
    patient.change_entry(1)
    assert patient.look()["trail"].status == "ok"
    found = patient.look(full=True)["trail"]
    assert found.status == "fail"
    assert "INVALID: entry 2" in found.message


def test_a_tree_that_is_not_the_signed_one_is_found(patient: Patient) -> None:
    patient.change("UPDATE nodes SET hash = ?", bytes(32))
    assert "not that of the signed checkpoint" in patient.look()["trail"].message


def test_a_trail_that_went_back_and_one_that_was_rewritten_are_found(patient: Patient, tmp_path: Path) -> None:
    older = Patient(Path(shutil.copytree(patient.folder, tmp_path / "older")))
    with Trail.open(patient.audit, home=patient.home) as trail:
        trail.append("example.note", b"{}").wait()
    shutil.rmtree(older.home)
    shutil.copytree(patient.home, older.home)
    assert patient.look()["seen"].status == "ok"
    assert status(older.look(), "seen") == ("fail", "301 entries were seen before, and there are 300.")
    assert older.look(full=True)["trail"].status == "fail"
    shutil.rmtree(older.home / "heads")
    with Trail.open(older.audit, home=older.home) as trail:
        trail.append("example.note", b'{"other":1}').wait()
    shutil.copytree(patient.home / "heads", older.home / "heads", dirs_exist_ok=True)
    assert "not the one seen before" in older.look()["seen"].message


def test_a_trail_that_was_never_seen_is_told(patient: Patient) -> None:
    shutil.rmtree(patient.home / "heads")
    assert status(patient.look(), "seen") == ("warn", "No head of this trail was ever seen here.")


# --- who writes ------------------------------------------------------------------------------------------------------


def test_an_open_run_of_a_living_process_is_no_fault(patient: Patient) -> None:
    with Trail.open(patient.audit, home=patient.home) as trail:
        assert trail.append(RUN_STARTED, b'{"experiment":"one"}', run="fedcba9876543210").wait()
        found = patient.look(trail=trail)
        assert status(found, "runs") == ("ok", "1 run going on: fedcba98.")
        assert found["writers"].facts["alive"] == 1
        assert found["writers"].facts["unsynced"] == 0
        quiet = patient.look(now=time.time() + 3 * 3600)
        assert quiet["writers"].status == "warn"
        assert "nothing was committed for 3 hours" in quiet["writers"].message
        trail.append("run.finished", b'{"status":"completed"}', run="fedcba9876543210").wait()
    assert patient.look()["runs"].message == "No run is open."


def test_entries_that_are_not_on_the_disk_yet_are_counted(patient: Patient) -> None:
    with Trail.open(patient.audit, home=patient.home) as trail:
        with trail._writer._commit_lock:  # nobody can commit
            for _ in range(7):
                trail.append("example.note", b"{}")
            assert patient.look(trail=trail)["writers"].facts["unsynced"] == 7
        trail.flush()
        assert patient.look(trail=trail)["writers"].facts["unsynced"] == 0


def test_a_writer_that_has_failed_is_told(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    trail = Trail.open(patient.audit, home=patient.home)
    with monkeypatch.context() as patch:

        def full(*_: Any) -> Any:
            raise StoreError("The store: the disk is full.", next_step="Free some space.", code="disk-full")

        patch.setattr(trail._writer._store, "transaction", full)
        with pytest.raises(StoreError):
            trail.append("example.note", b"{}").wait()
    found = patient.look(trail=trail)["writers"]
    assert found.status == "fail"
    assert "can write no more" in found.message
    with pytest.raises(StoreError):
        trail.close()


# --- keys, vault -----------------------------------------------------------------------------------------------------


def test_keys_that_others_can_read_fail(patient: Patient) -> None:
    assert patient.look()["keys"].status == "warn"  # not encrypted
    (patient.ring / "log.pem").chmod(0o644)
    found = patient.look()["keys"]
    assert (found.status, found.message) == ("fail", "Others can read log.pem (mode 0644).")
    assert found.next_step == "Run `chmod 600` on log.pem."


def test_keys_that_are_encrypted_and_opened_are_well(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    encrypt_keys(patient.home, patient.origin, "correct horse")
    locked = patient.look()
    assert locked["keys"].status == "ok"
    assert "no passphrase is at hand" in locked["keys"].message
    assert "not known without the passphrase" in locked["vault"].message
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", "correct horse")
    opened = patient.look()
    assert opened["keys"].message == "3 keys in force, the trail's own."
    assert "opens with its key" in opened["vault"].message
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", "battery staple")
    assert patient.look()["keys"].status == "fail"


def test_keys_that_are_missing_fail(patient: Patient) -> None:
    shutil.rmtree(patient.ring)
    found = patient.look()
    assert found["keys"].status == "fail"
    assert "nothing can be appended" in found["keys"].message
    assert found["trail"].status == "ok"


def test_other_keys_under_the_trails_name_fail(patient: Patient, tmp_path: Path) -> None:
    other = create_keys(tmp_path / "home", patient.origin).folder.path
    for path in other.iterdir():
        shutil.copy2(path, patient.ring / path.name)
    found = patient.look()
    assert found["keys"].status == found["vault"].status == "fail"
    assert "not the one that signed the newest checkpoint" in found["keys"].message
    assert "does not open with this key" in found["vault"].message


def test_a_change_of_keys_that_was_cut_short_is_told(patient: Patient) -> None:
    (patient.ring / "next-log.pem").write_bytes(b"")
    (patient.ring / "next-log.pem").chmod(0o600)
    assert "cut short" in patient.look()["keys"].message


def test_a_backup_is_known_of_until_the_keys_change(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(patient.home))
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", "correct horse")
    assert patient.look()["backup"].status == "warn"
    assert cli.main(["keys", "backup", str(patient.folder / "keys.backup"), "--trail", str(patient.audit)]) == 0
    assert patient.look()["backup"].status == "ok"
    encrypt_keys(patient.home, patient.origin, "correct horse")
    found = patient.look()["backup"]
    assert found.status == "warn"
    assert "vault.key changed" in found.message
    note_backup(patient.home, patient.origin)
    assert patient.look()["backup"].status == "ok"


def test_a_vault_that_is_gone_or_emptied_fails_where_the_trail_seals_something(patient: Patient) -> None:
    patient.change("DELETE FROM openings", file="vault.sqlite")
    message = status(patient.look(), "vault")
    assert message[0] == "fail"
    assert "the vault holds none" in message[1]
    for path in patient.audit.glob("vault.sqlite*"):
        path.unlink()
    found = patient.look()["vault"]
    assert found.status == "fail"
    assert "the vault that holds them is gone" in found.message


def test_a_trail_that_never_sealed_anything_needs_no_vault(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit", home=tmp_path / "home") as trail:
        trail.append("example.note", b"{}")
    (tmp_path / "audit" / "vault.sqlite").unlink(missing_ok=True)
    assert examine(tmp_path / "audit", home=tmp_path / "home")["vault"].status == "ok"


def test_a_vault_that_is_damaged_fails(patient: Patient) -> None:
    (patient.audit / "vault.sqlite").write_bytes(b"no database at all" * 100)
    found = patient.look()
    assert found["vault"].status == "fail"
    assert found["trail"].status == "ok"


def test_an_erasure_that_is_half_way_is_told(patient: Patient) -> None:
    key = json.loads((patient.ring / "vault.key").read_bytes())
    later = {**key["generations"][0], "number": key["generations"][0]["number"] + 1}
    key["generations"].append(later)
    (patient.ring / "vault.key").write_text(json.dumps(key))
    found = patient.look()["vault"]
    assert found.status == "warn"
    assert "An erasure was begun" in found.message


# --- the machine -----------------------------------------------------------------------------------------------------


def test_a_clock_that_was_set_back_fails(patient: Patient) -> None:
    assert patient.look()["clock"].status == "ok"
    found = patient.look(now=time.time() - 7300)["clock"]
    assert (found.status, found.message) == ("fail", "This machine's clock is 2 hours behind the newest entry.")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(("free", "expected"), [(2 << 30, "ok"), (500 << 20, "warn"), (1 << 20, "fail")])
def test_a_disk_that_is_nearly_full_is_told(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, free: int, expected: str
) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(4 << 30, 0, free))
    assert patient.look()["disk"].status == expected


def test_a_slow_disk_and_a_network_file_system_are_told(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < patient.look()["disk"].facts["sync_ms"] < 10_000
    monkeypatch.setattr(machine, "sync_seconds", lambda _: 0.2)
    monkeypatch.setattr(machine, "file_system", lambda _: "nfs4")
    said = status(patient.look(), "disk")
    assert said[0] == "warn"
    assert "A sync takes 200 ms" in said[1]
    assert "network file system (nfs4)" in said[1]


def test_the_file_system_of_this_machine_is_named(tmp_path: Path) -> None:
    if not Path("/proc/self/mounts").exists():
        pytest.skip("needs /proc/self/mounts")
    assert machine.file_system(Path("/proc")) == "proc"
    assert machine.file_system(tmp_path)


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert {name: pinned[name] for name in machine.TESTED} == machine.TESTED


def other_version(real: Any, name: str, version: str | None) -> Any:
    def told(asked: str) -> str:
        if asked == name:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(asked)
            return version
        return real(asked)

    return told


def test_a_version_that_was_not_tested_or_does_not_serve_is_named(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", other_version(real, "datasets", "77.0"))
    found = patient.look()["versions"]
    assert found.status == "warn"
    assert "datasets 77.0 (tested: " in found.message
    monkeypatch.setattr(importlib.metadata, "version", other_version(real, "datasets", "1.0"))
    assert "datasets 1.0 is installed and datasets>=" in patient.look()["versions"].message
    monkeypatch.setattr(importlib.metadata, "version", other_version(real, "msgspec", None))
    assert status(patient.look(), "versions") == ("fail", "msgspec is not installed.")


def test_a_release_that_changed_a_hook_fails(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    check_classes()
    assert patient.look()["versions"].facts["hooks_checked"]
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self, model, surprise: None)
    found = patient.look()["versions"]
    assert found.status == "fail"
    assert "Trainer.create_optimizer takes (model, surprise)" in found.message
    with pytest.raises(UnsupportedTrainerError):
        check_classes()


# --- others ----------------------------------------------------------------------------------------------------------


def test_a_trust_policy_must_be_there_and_trust_this_trail(patient: Patient, tmp_path: Path) -> None:
    assert patient.look()["policy"].status == "warn"
    policy = local_policy(patient.home, patient.origin).format()
    (patient.folder / "trust.policy").write_text(policy)
    assert "trust.policy lists the log key in force" in patient.look()["policy"].message
    fill(tmp_path / "other" / "audit", tmp_path / "other" / "home", 2)
    other = Patient(tmp_path / "other")
    (tmp_path / "other.policy").write_text(local_policy(other.home, other.origin).format())
    found = patient.look(policy=tmp_path / "other.policy")
    assert found["policy"].status == found["trail"].status == "fail"
    (patient.folder / "trust.policy").write_text("no policy")
    assert patient.look()["policy"].status == "fail"
    with pytest.raises(ConfigError, match="no trust policy at"):
        patient.look(policy=tmp_path / "none.policy")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.make(tmp_path_factory.mktemp("tsa") / "one")
    made.certify()
    return made


def test_an_anchor_is_counted_and_grows_old(patient: Patient, authority: Authority) -> None:
    assert patient.look()["anchors"].status == "warn"
    (patient.home / "tsa").mkdir()
    (patient.home / "tsa" / "one.pem").write_bytes(authority.pem)
    folder, reader = AnchorFolder(patient.audit), TrailReader.open(patient.audit)
    kept = folder.keep(reader.checkpoint())
    folder.stamp(reader.size, "local", authority.stamp(kept))
    found = patient.look()
    assert found["anchors"].status == "ok"
    assert found["anchors"].message.startswith("The newest timestamp is ")
    assert found["clock"].status == "ok"
    with Trail.open(patient.audit, home=patient.home) as trail:
        trail.append("example.note", b"{}").wait()
    assert patient.look()["anchors"].status == "ok"
    assert patient.look(now=time.time() + 8 * 86_400)["anchors"].message == (
        "The newest timestamp is 8 days old; 1 entry came after it."
    )
    behind = patient.look(now=time.time() - 900)["clock"]
    assert "behind a timestamp of the trail" in behind.message


def test_a_published_copy_lags_or_is_of_another_trail(patient: Patient, tmp_path: Path) -> None:
    copy = tmp_path / "public"
    publish_tiles(patient.audit, copy)
    assert status(patient.look(published=str(copy)), "published") == ("ok", f"{copy} has all 300 entries.")
    with Trail.open(patient.audit, home=patient.home) as trail:
        trail.append("example.note", b"{}").wait()
    assert patient.look(published=str(copy))["published"].facts["lag"] == 1
    fill(tmp_path / "other" / "audit", tmp_path / "other" / "home", 2)
    publish_tiles(tmp_path / "other" / "audit", tmp_path / "others")
    assert patient.look(published=str(tmp_path / "others"))["published"].status == "fail"
    assert patient.look(published=str(tmp_path / "nothing"))["published"].status == "fail"


def spend(trail: Trail, run: str, budget: float) -> None:
    """One private training over twenty pairs, with its steps, settled."""
    units = Units("pair", tuple((row,) for row in range(20)))
    config = PrivacyConfig(
        epsilon=budget,
        delta=DELTA,
        unit="pair",
        noise_multiplier=ONE.noise_multiplier,
        sampling_rate=ONE.sampling_rate,
        loss_noise=None,
    )
    prior = read_ledger(trail.reader(), trail).mechanisms(config.unit, config.unit_column, None)
    plan = plan_units(config, units, ONE.sampling_rate, ONE.steps, 5, prior)

    def append(event: Any) -> None:
        trail.append(event.TYPE, encode_body(event), run=run).wait()

    append(RunStarted(experiment="study", entry_point="cell", tool="t"))
    reserve(trail, plan, SealedRandom(bytes(range(32))), reservation=run, run=run)
    for step in range(1, ONE.steps + 1):
        append(Step(step=step, epsilon=1.0))
    append(PrivacySettled(reservation=run, steps=ONE.steps, epsilon_run=1.0, epsilon_total=1.0))
    append(RunFinished(status="completed", steps=ONE.steps, trained=True))


def test_a_budget_that_is_nearly_spent_is_told(patient: Patient) -> None:
    assert patient.look()["budget"].message == "Nothing was trained under differential privacy."
    with without_cross_checks(), Trail.open(patient.audit, home=patient.home) as trail:
        spend(trail, "one", budget=50.0)
    found = patient.look()["budget"]
    assert found.status == "ok"
    spent = found.facts["epsilon_spent"]
    assert 0 < spent < 45
    with without_cross_checks(), Trail.open(patient.audit, home=patient.home) as trail:
        spend(trail, "two", budget=1.38 * spent)
    assert "little or nothing is left" in patient.look()["budget"].message


# --- faces -----------------------------------------------------------------------------------------------------------


def test_the_command_tells_monitoring_with_stable_keys(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(patient.home))
    assert cli.main(["doctor", "--trail", str(patient.audit), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said) == ["status", "origin", "time", "checks"]
    assert list(said["checks"]) == [
        *("trail", "seen", "keys", "backup", "vault", "runs", "writers", "clock", "disk", "versions", "policy"),
        *("anchors", "published", "budget"),
    ]
    assert all(list(one) == ["status", "message", "next_step", "facts"] for one in said["checks"].values())
    assert said["status"] == "warn"
    assert str(patient.folder) not in json.dumps(said)
    (patient.audit / "trail.sqlite").write_bytes(b"")
    assert cli.main(["doctor", "--trail", str(patient.audit)]) == 3
    assert "fail  trail" in capsys.readouterr().out


def test_the_auditor_knows_what_it_has_open_itself(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(patient.home))
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(patient.audit)))
    assert auditor.doctor()["writers"].message.startswith("0 processes")
    auditor.trail.flush()
    found = auditor.doctor()
    assert "0 entries of this process not on the disk yet" in found["writers"].message
    assert "<table>" in found._repr_html_()
    auditor.trail.close()


def test_what_was_found_is_reported_as_metrics(patient: Patient) -> None:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    found = patient.look()
    found.export_metrics(MeterProvider([reader], shutdown_on_exit=False))
    data = reader.get_metrics_data()
    assert data is not None
    points = {
        metric.name: metric.data.data_points[0]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert points["rlhf_audit.entries"].value == ENTRIES
    assert points["rlhf_audit.checks_failed"].value == 0
    assert points["rlhf_audit.open_runs"].value == 0
    assert "rlhf_audit.epsilon_spent" not in points  # nothing was spent, and nothing is made up
    assert dict(points["rlhf_audit.entries"].attributes) == {"rlhf_audit.origin": found.origin}


def test_metrics_that_nobody_would_get_are_refused(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    found = patient.look()
    with pytest.raises(ConfigError, match="nobody would get the metrics"):
        found.export_metrics()
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match="OpenTelemetry is not installed") as refused:
        found.export_metrics()
    assert "rlhf-audit-trail[otel]" in refused.value.next_step
