"""Looking into a trail finds exactly the entries that match, says what is damaged, and opens nothing."""

from __future__ import annotations

import json
import sqlite3
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_audit_nb.errors import FormatError, StoreError
from rlhf_audit_nb.trail import Trail, TrailReader
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.merkle import leaf_hash
from rlhf_audit_nb.trail.proof import format_proof, parse_proof
from rlhf_audit_nb.trail.query import Damaged, Filter, Look, parse_range, parse_time
from rlhf_audit_nb.trail.writer import Draft


def bodies(items) -> list[str]:
    return [item.body.decode() for item in items]


@pytest.fixture
def trail(folder):
    """600 entries: three runs of two experiments, one after the other, and entries of no run between them."""
    with Trail.open(folder) as opened:
        for run, experiment in (("aaaaaaaa1", "one"), ("aaaaaaaa2", "two"), ("bbbbbbbb3", "one")):
            started = json.dumps({"experiment": experiment}).encode()
            opened.append_many(
                [
                    Draft(type="run.started", body=started, run=run),
                    *(Draft(type="train.step", body=b'{"step":%d}' % n, run=run) for n in range(195)),
                    Draft(type="run.finished", body=b'{"status":"completed"}', run=run),
                ]
            )
            opened.append("note.made", b'{"by":"hand"}').wait()
    return folder


def test_a_query_finds_what_reading_everything_finds(trail):
    everything = list(TrailReader.open(trail).entries())
    look = Look(trail)
    experiments = {"one": {"aaaaaaaa1", "bbbbbbbb3"}, "two": {"aaaaaaaa2"}, "three": set()}
    middle = everything[300].time
    for run in (None, "aaaaaaaa2"):
        for kind in (None, "train.step", "run.started", "note.made", "no.such"):
            for experiment in (None, "one", "two", "three"):
                for since, until in ((None, None), (middle, None), (None, middle), (middle, middle + 1)):
                    expected = [
                        entry.index
                        for entry in everything
                        if (run is None or entry.run == run)
                        and (kind is None or entry.type == kind)
                        and (experiment is None or entry.run in experiments[experiment])
                        and (since is None or entry.time >= since)
                        and (until is None or entry.time < until)
                    ]
                    chosen = Filter(run, kind, experiment, since, until)
                    assert [item.index for item in look.query(chosen)] == expected, chosen
    assert len(everything) == 595


def test_a_time_far_into_a_trail_begins_at_a_checkpoint_and_misses_nothing(trail, monkeypatch):
    look = Look(trail)
    entries = list(TrailReader.open(trail).entries())
    monkeypatch.setattr("rlhf_audit_nb.trail.query.CLOCK_SLACK_US", 0)
    starts = [look._before(entry.time) for entry in entries]
    assert all(start <= entry.index for start, entry in zip(starts, entries, strict=True))
    assert starts[0] == 0
    assert starts[-1] > 0


def test_the_tail_is_the_end_whatever_is_asked_of_it(trail):
    look = Look(trail)
    everything = list(TrailReader.open(trail).entries())
    assert look.tail(3) == everything[-3:]
    assert look.tail(0) == []
    assert look.tail(10_000) == everything
    steps = [entry for entry in everything if entry.type == "train.step"]
    assert look.tail(4, Filter(type="train.step")) == steps[-4:]


def test_following_gives_what_comes_and_only_what_matches(trail):
    look, size = Look(trail), Look(trail).size()
    waited = []

    def wait(_seconds: float) -> None:
        waited.append(1)
        if len(waited) > 3:
            raise KeyboardInterrupt
        with Trail.open(trail) as opened:
            opened.append("later", b'{"n":%d}' % len(waited)).wait()
            opened.append("other", b"{}").wait()

    found = []
    with pytest.raises(KeyboardInterrupt):
        for item in look.follow(Filter(type="later"), size, wait):
            found.append(item)  # noqa: PERF402 (what came before the interrupt must be kept)
    assert bodies(found) == ['{"n":1}', '{"n":2}', '{"n":3}']


def test_runs_are_told_apart_by_their_beginnings(trail):
    look = Look(trail)
    assert look.runs() == ["aaaaaaaa1", "aaaaaaaa2", "bbbbbbbb3"]
    assert look.short_runs() == {"aaaaaaaa1": "aaaaaaaa1", "aaaaaaaa2": "aaaaaaaa2", "bbbbbbbb3": "bbbbbbbb"}
    assert look.types() == ["note.made", "run.finished", "run.started", "trail.created", "train.step"]
    assert look.run_named("b") == "bbbbbbbb3"
    for given_name, code in (("aaaa", "begin with"), ("zz", "begins with")):
        with pytest.raises(StoreError) as caught:
            look.run_named(given_name)
        assert (caught.value.reason, code in caught.value.message) == ("run", True)


def test_a_run_whose_id_begins_another_is_found_by_its_whole_id(folder):
    with Trail.open(folder) as opened:
        for run in ("abcdefgh", "abcdefghij"):
            opened.append("a.b", b"{}", run=run).wait()
    look = Look(folder)
    assert look.run_named("abcdefgh") == "abcdefgh"
    assert look.short_runs() == {"abcdefgh": "abcdefgh", "abcdefghij": "abcdefghi"}


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("0", range(1)),
        ("9", range(9, 10)),
        ("-1", range(9, 10)),
        ("-10", range(1)),
        ("2:5", range(2, 5)),
        ("8:", range(8, 10)),
        (":2", range(2)),
        ("-3:", range(7, 10)),
        (":", range(10)),
        ("5:99", range(5, 10)),
    ],
)
def test_a_range_is_read_as_python_reads_it(text, places):
    assert parse_range(text, 10) == places


@pytest.mark.parametrize("text", ["10", "-11", "5:5", "7:2", "99:", "x", "", " ", "1:2:3", "1,2", "٣", "1.5", "0-2"])
def test_what_names_no_entry_is_refused(text):
    with pytest.raises(StoreError) as caught:
        parse_range(text, 10)
    assert caught.value.reason == "range"


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2026-11-22", 1_795_305_600_000_000),
        ("2026-11-22T01:00", 1_795_309_200_000_000),
        ("2026-11-22T01:00:00.000001Z", 1_795_309_200_000_001),
        ("2026-11-22T01:00+01:00", 1_795_305_600_000_000),
        ("30s", 999_970_000_000),
        ("1.5h", 994_600_000_000),
        ("1w", 395_200_000_000),
    ],
)
def test_a_time_is_a_date_or_so_long_ago(text, when):
    assert parse_time(text, now=1_000_000) == when


@pytest.mark.parametrize("text", ["yesterday", "", "5", "5x", "2026-13-01", "-5h", "9" * 400 + "d"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(FormatError) as caught:
        parse_time(text)
    assert caught.value.reason == "time"


def change(folder, statement, *values) -> None:
    connection = sqlite3.connect(folder / "trail.sqlite")
    with connection:
        assert connection.execute(statement, values).rowcount
    connection.close()


def test_a_damaged_entry_is_named_and_the_others_are_shown(trail):
    connection = sqlite3.connect(trail / "trail.sqlite")
    first, data = connection.execute("SELECT first, data FROM bundles WHERE first > 0 ORDER BY first").fetchone()
    connection.close()
    change(trail, "UPDATE bundles SET data=? WHERE first=?", data.replace(b'"step":7}', b'"step":8}'), first)
    place = next(i.index for i in Look(trail).query(Filter()) if isinstance(i, Damaged))
    (before, damaged, after) = Look(trail).entries(range(place - 1, place + 2))
    assert damaged == Damaged(place, "Its bytes are not those that were hashed when it was appended.")
    assert isinstance(before, Entry)
    assert isinstance(after, Entry)
    assert len(list(Look(trail).query(Filter(type="train.step", run="aaaaaaaa1")))) == 195


def test_a_row_that_cannot_be_read_and_one_that_is_gone_are_named_entry_by_entry(trail):
    connection = sqlite3.connect(trail / "trail.sqlite")
    (first, count), *_ = connection.execute(
        "SELECT first, count FROM bundles WHERE count > 9 ORDER BY first"
    ).fetchall()
    connection.close()
    change(trail, "UPDATE bundles SET data=substr(data, 1, 40) WHERE first=?", first)
    found = list(Look(trail).entries(range(first, first + count + 1)))
    assert [item.index for item in found] == list(range(first, first + count + 1))
    assert all("cannot be read" in item.why for item in found[:-1])
    assert isinstance(found[-1], Entry)
    change(trail, "DELETE FROM bundles WHERE first=?", first)
    gone = list(Look(trail).entries(range(first, first + 2)))
    assert gone == [Damaged(first, "It is missing."), Damaged(first + 1, "It is missing.")]


def test_an_entry_of_a_later_version_is_said_not_guessed(trail):
    row = sqlite3.connect(trail / "trail.sqlite").execute("SELECT * FROM bundles WHERE first=0").fetchone()
    later = row[3][2:].replace(b'"v":1', b'"v":9')
    change(
        trail,
        "UPDATE bundles SET data=?, hashes=? WHERE first=0",
        len(later).to_bytes(2, "big") + later,
        leaf_hash(later),
    )
    (item,) = Look(trail).query(Filter(until=1), stop=1)
    assert isinstance(item, Damaged)
    assert "version 9" in item.why


def test_a_name_that_no_run_can_have_is_not_taken_from_a_changed_index(trail):
    change(trail, "INSERT INTO terms VALUES ('r:\x1b[2J', 0), ('t:\x1b[2J', 0), (x'723a00', 0)")
    assert Look(trail).runs() == ["aaaaaaaa1", "aaaaaaaa2", "bbbbbbbb3"]
    assert all(name.isprintable() for name in Look(trail).types())


def test_a_private_half_stays_closed(folder):
    with Trail.open(folder) as opened:
        opened.append("a.b", b'{"open":1}', private=b'{"secret":"kiwi"}').wait()
    (item,) = Look(folder).tail(1)
    assert item.envelope.sealed is not None
    assert b"kiwi" not in item.data


def test_a_proof_holds_for_its_entry_alone(trail):
    look = Look(trail)
    entries = list(TrailReader.open(trail).entries())
    for index in (0, 255, 256, 594):
        proof = parse_proof(format_proof(look.proof(index)))
        assert proof.check(leaf_hash(entries[index].data))
        assert not proof.check(leaf_hash(entries[index - 1].data))
    for index in (-1, 595):
        with pytest.raises(StoreError):
            look.proof(index)


def test_where_there_is_no_trail_it_is_said(tmp_path):
    with pytest.raises(StoreError) as caught:
        Look(tmp_path / "none")
    assert caught.value.reason == "no-trail"


NAMES = st.text("abcdef.-_0123456789", min_size=1, max_size=12).filter(
    lambda name: name[0].isalnum() and name[-1].isalnum()
)


@settings(max_examples=60, deadline=None)
@given(
    kind=NAMES,
    run=st.none() | NAMES,
    when=st.integers(0, 2**53),
    body=st.dictionaries(st.text(max_size=5), st.text(max_size=20)),
)
def test_the_first_bytes_tell_what_decoding_tells(kind, run, when, body):
    from rlhf_audit_nb.trail.query import _FRONT

    fields = {"v": 1, "type": kind, "time": when, "run": run, "seq": 3, "writer": "w", "body": body}
    data = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    try:
        entry = Entry.decode(0, data)
    except FormatError:
        return
    front = _FRONT.match(data)
    assert front is not None
    found = front.groups()
    assert (found[0].decode(), int(found[1]), found[2] and found[2].decode()) == (entry.type, entry.time, entry.run)


def test_a_short_look_at_a_long_trail_reads_little(folder):
    with Trail.open(folder) as opened:
        opened.append_many(Draft(type="train.step", body=b'{"step":%d}' % n, run="r") for n in range(40_000))
        opened.append("rare.one", b"{}").wait()
        opened.append_many(Draft(type="train.step", body=b'{"step":%d}' % n, run="r") for n in range(40_000))
    look = Look(folder)
    began = time.process_time()
    (found,) = look.query(Filter(type="rare.one"))
    assert found.index == 40_001
    assert len(look.tail(10)) == 10
    quick = time.process_time() - began
    began = time.process_time()
    assert sum(1 for _ in look.query(Filter(until=1))) == 0
    assert quick * 4 < time.process_time() - began
