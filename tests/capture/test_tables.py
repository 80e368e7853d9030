"""Rows as columns: every form of source comes out the same, and what is broken is named by file and row."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json

import pytest
from datasets import Dataset, DatasetDict

from rlhf_audit_nb.capture.tables import file_digest, read_table
from rlhf_audit_nb.errors import DataError

ROWS = [
    {"prompt": "p1", "chosen": "a\nb", "worker": "w1"},
    {"prompt": "p2", "chosen": 'say "x", y', "worker": "w2"},
]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


def as_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def as_lines(path):
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")


def as_array(path):
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def as_parquet(path):
    Dataset.from_list(ROWS).to_parquet(str(path))


FORMS = {
    "votes.csv": ("csv", as_csv),
    "votes.jsonl": ("jsonl", as_lines),
    "votes.ndjson": ("jsonl", as_lines),
    "votes.json": ("json", as_array),
    "votes.parquet": ("parquet", as_parquet),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_same_columns_and_its_own_digest(tmp_path, name):
    form, write = FORMS[name]
    path = tmp_path / name
    write(path)
    table = read_table(path)
    assert (table.form, table.rows, dict(table.columns), table.name) == (form, 2, COLUMNS, name)
    assert [source.digest for source in table.sources] == [hashlib.sha256(path.read_bytes()).hexdigest()]
    assert table.sources == (file_digest(path),)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "votes.parquet"])
def test_a_zipped_file_is_read_as_what_it_holds(tmp_path, name):
    _, write = FORMS[name]
    write(tmp_path / name)
    zipped = tmp_path / f"{name}.gz"
    zipped.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert dict(read_table(str(zipped)).columns) == COLUMNS


def test_a_data_set_and_dicts_give_the_same_columns():
    table = read_table(Dataset.from_list(ROWS))
    assert (table.form, dict(table.columns), table.rows) == ("dataset", COLUMNS, 2)
    assert len(table.sources[0].digest) == 64
    for rows in (ROWS, iter(ROWS), tuple(ROWS)):
        table = read_table(rows)
        assert (table.form, dict(table.columns), table.rows, table.sources) == ("values", COLUMNS, 2, ())


def test_a_field_that_an_object_lacks_is_none(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"a":1}\n{"b":2}\n')
    assert dict(read_table(path).columns) == {"a": [1, None], "b": [None, 2]}


def test_a_line_separator_within_a_text_does_not_end_the_row(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"a":"one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_table(path).columns["a"] == ["one\u2028two\x85three"]


def test_a_field_of_csv_may_be_longer_than_the_csv_modules_own_limit(tmp_path):
    before = csv.field_size_limit()
    path = tmp_path / "v.csv"
    path.write_text("a\n" + "x" * 200_000 + "\n")
    assert len(read_table(path).columns["a"][0]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "data", "said", "code"),
    [
        ("v.csv", b"a,b\n1,2\n1\n", "row 2: it has 1 field, and the header has 2", "malformed"),
        ("v.csv", b"a,b\n1,2,3\n", "row 1: it has 3 fields", "malformed"),
        ("v.csv", b'a,b\n1,"2\n', "v.csv: unexpected end of data", "malformed"),
        ("v.csv", b"a,a\n1,2\n", "names 'a' twice", "malformed"),
        ("v.csv", b"a,b\n", "has no rows", "empty-data"),
        ("v.csv", b"", "has no rows", "empty-data"),
        ("v.csv", b"a\n\xff\n", "not UTF-8 text", "unreadable"),
        ("v.csv.gz", b"not zipped", "cannot be read", "unreadable"),
        ("v.csv.gz", gzip.compress(b"a\n" + b"x\n" * 999, mtime=0)[:-9], "cannot be read", "unreadable"),
        ("v.jsonl", b'{"a":1}\n{"a":\n', "line 2", "malformed"),
        ("v.jsonl", b'{"a":1}\n[1]\n', "row 2 is a list", "malformed"),
        ("v.jsonl", b'{"a":NaN}\n', "line 1", "malformed"),
        ("v.json", b'[{"a":1}', "v.json", "malformed"),
        ("v.parquet", b"PAR1", "no parquet file", "malformed"),
        ("v.txt", b"a", "of no known kind", "unknown-format"),
        ("v.parquet.gz", b"a", "of no known kind", "unknown-format"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, name, data, said, code):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as refused:
        read_table(path)
    assert said in refused.value.message
    assert refused.value.reason == code
    assert refused.value.next_step


def test_a_misspelt_file_is_named_with_the_near_one(tmp_path):
    as_csv(tmp_path / "votes.csv")
    with pytest.raises(DataError, match=r"does not exist\. Did you mean 'votes\.csv'\?"):
        read_table(tmp_path / "vote.csv")
    with pytest.raises(DataError, match="cannot be read"):
        file_digest(tmp_path / "none")


@pytest.mark.parametrize("data", [7, {"prompt": ["a"]}, DatasetDict({"train": Dataset.from_list(ROWS)}), b"bytes"])
def test_what_holds_no_rows_is_refused(data):
    with pytest.raises(DataError, match="holds no rows"):
        read_table(data)
    with pytest.raises(DataError, match="Row 2 is a str"):
        read_table([{"a": 1}, "x"])
