"""Last-seen heads: they only grow, they are never made up, and what contradicts them is kept."""

from __future__ import annotations

import multiprocessing

import pytest
from support.witnesses import Log

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail.heads import MAX_EVIDENCE, Heads

LOG = Log("example.com/log").grow(300)


@pytest.fixture
def heads(tmp_path):
    return Heads(tmp_path / "home")


def test_nothing_seen_is_no_head(heads):
    assert heads.note(LOG.origin) is None
    assert heads.head(LOG.origin) is None


def test_a_head_goes_forward_and_never_back(heads):
    for size in (5, 9, 7, 9, 300, 1):
        heads.advance(LOG.origin, LOG.head(size))
    assert heads.note(LOG.origin) == LOG.head(300)
    assert heads.head(LOG.origin).size == 300
    assert heads.path(LOG.origin).stat().st_mode & 0o077 == 0


def test_a_head_of_the_same_size_stays_the_first(heads):
    heads.advance(LOG.origin, LOG.head(9))
    heads.advance(LOG.origin, LOG.forked(3).head(9))
    assert heads.note(LOG.origin) == LOG.head(9)


def test_origins_have_heads_of_their_own(heads):
    other = Log("example.com/log/2").grow(4)
    heads.advance(LOG.origin, LOG.head(5))
    heads.advance(other.origin, other.head())
    assert heads.head(LOG.origin).size == 5
    assert heads.head(other.origin).size == 4


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xff", Log("example.com/other").grow(3).head().encode()])
def test_a_head_that_was_tampered_with_is_refused_and_not_replaced(heads, data):
    heads.advance(LOG.origin, LOG.head(5))
    heads.path(LOG.origin).write_bytes(data)
    for call in (lambda: heads.note(LOG.origin), lambda: heads.advance(LOG.origin, LOG.head(9))):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.reason == "last-seen"
    assert heads.path(LOG.origin).read_bytes() == data


def _advance(home, sizes):
    for size in sizes:
        Heads(home).advance(LOG.origin, LOG.head(size))


def test_processes_that_see_at_once_leave_the_largest(tmp_path):
    context = multiprocessing.get_context("fork")
    sizes = [range(start, 60, 3) for start in (1, 2, 3)]
    workers = [context.Process(target=_advance, args=(tmp_path, part)) for part in sizes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert Heads(tmp_path).head(LOG.origin).size == 59


def test_evidence_is_kept_once_and_never_overwritten(heads):
    fork = LOG.forked(3)
    folder = heads.keep_evidence(LOG.origin, LOG.head(9), fork.head(9))
    assert heads.keep_evidence(LOG.origin, LOG.head(9), fork.head(9)) == folder
    assert sorted(path.read_text() for path in folder.iterdir()) == sorted([LOG.head(9), fork.head(9)])
    heads.keep_evidence(LOG.origin, LOG.head(9), fork.head(10))
    assert len(list(folder.iterdir())) == 3


def test_evidence_has_a_bound_and_the_first_stays(heads):
    for number in range(MAX_EVIDENCE + 5):
        folder = heads.keep_evidence(LOG.origin, LOG.head(9), Log(LOG.origin, [b"%d" % number], LOG.key).head())
    kept = {path.read_text() for path in folder.iterdir()}
    assert len(kept) == MAX_EVIDENCE
    assert {LOG.head(9), Log(LOG.origin, [b"0"], LOG.key).head()} <= kept


def test_evidence_that_cannot_be_written_is_said(heads, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "heads").write_text("")
    with pytest.raises(StoreError, match="evidence"):
        heads.keep_evidence(LOG.origin, LOG.head(9), LOG.forked(3).head(9))
    with pytest.raises(StoreError, match="last-seen"):
        heads.advance(LOG.origin, LOG.head(9))


def test_a_lock_that_is_a_link_is_not_followed(heads, tmp_path):
    heads.advance(LOG.origin, LOG.head(5))
    (lock,) = heads.path(LOG.origin).parent.glob(".*.lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError):
        heads.advance(LOG.origin, LOG.head(9))
    assert not (tmp_path / "elsewhere").exists()
