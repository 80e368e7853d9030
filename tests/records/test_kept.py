"""A sealed record is kept beside its trail, whatever becomes of the file that was asked for."""

from __future__ import annotations

import logging
import os

import nbformat
import pytest
from records_support import policy_of

from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import ConfigError, StoreError
from rlhf_audit_nb.records import kept_record, kept_records, open_record
from rlhf_audit_nb.records.kept import keep_record
from rlhf_audit_nb.records.session import Outcome, RecordSession
from rlhf_audit_nb.trail import Level, Trail


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "audit"):
        pass
    return tmp_path / "audit"


def sealed(folder, *, keep=True):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("é", id="a")])
    session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, folder, keep=keep)
    try:
        session.seal(nb, Outcome("completed"))
    finally:
        session.close()
    return session.record, nb


def test_the_copy_of_an_executed_record_is_what_papermill_wrote_and_verifies_by_itself(made):
    path = kept_record(made.result.trail, made.result.record)
    assert path in kept_records(made.result.trail)
    assert path.read_bytes() == made.data
    assert path.stat().st_mode & 0o777 == 0o600
    found = open_record(path, policy=made.policy, home=made.home)
    assert (found.verdict.level, found.metadata["record"]) == (Level.UNANCHORED, made.result.record)


def test_each_record_of_a_trail_is_kept_and_nothing_else_is_taken_for_one(folder):
    names = [sealed(folder)[0] for _ in range(3)]
    for other in ("x.ipynb", f".{names[0]}.ipynb.123456", f"{names[0]}.txt", f"{names[0].upper()}.ipynb"):
        (folder / "records" / other).write_text("{}")
    (folder / "records" / f"{'0' * 32}.ipynb").mkdir()
    assert [path.stem for path in kept_records(folder)] == sorted(names)
    assert [path.stem for path in kept_records(folder / "trail.sqlite")] == sorted(names)
    for path in kept_records(folder):
        assert open_record(path, policy=policy_of(folder)).verdict.level is Level.UNANCHORED


@pytest.mark.parametrize("name", ["0" * 32, "../trail", "", "x", f"../records/{'a' * 32}"])
def test_a_record_that_was_not_kept_is_none(folder, name):
    sealed(folder)
    assert kept_record(folder, name) is None


def test_a_trail_without_records_has_no_copies(folder, tmp_path):
    assert list(kept_records(folder)) == []
    assert list(kept_records(tmp_path / "nowhere")) == []


def test_where_no_copies_are_wanted_none_is_made(folder):
    record, nb = sealed(folder, keep=False)
    assert "rlhf_audit" in nb["metadata"]
    assert kept_record(folder, record) is None
    assert not (folder / "records").exists()


def test_a_copy_that_cannot_be_written_loses_no_record_and_is_told(folder, caplog):
    (folder / "records").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        record, nb = sealed(folder)
    assert kept_record(folder, record) is None
    assert nb["metadata"]["rlhf_audit"]["record"] == record
    (told,) = [item.message for item in caplog.records if item.name.startswith("rlhf_audit_nb")]
    assert "copy of the record cannot be kept" in told
    assert str(folder / "records") in told


def test_a_full_disk_leaves_no_half_copy(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        keep_record(folder, "a" * 32, b"{}")
    assert list((folder / "records").iterdir()) == []


def test_the_setting_is_true_or_false():
    assert AuditConfig().keep_records is True
    assert AuditConfig(keep_records=False).to_dict()["keep_records"] is False
    with pytest.raises(ConfigError, match="keep_records is 'no'"):
        AuditConfig(keep_records="no")
