"""Preference data comes in whole, under the names that the user gives, or is refused with the reason."""

from __future__ import annotations

import gzip
import json

import pytest

from rlhf_audit_nb.demo import COLUMNS, load_preferences
from rlhf_audit_nb.demo.preferences import parse_columns
from rlhf_audit_nb.errors import DataError

VOTES = [
    {"prompt": "p1", "chosen": "a\u2028b", "rejected": "c", "annotator_id": "w1", "extra": 1},
    {"prompt": "p2", "chosen": "d", "rejected": "", "annotator_id": "w2", "extra": 2},
]


def lines(votes) -> bytes:
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in votes).encode()


def write(path, data):
    path.write_bytes(data)
    return path


def reason(path, **kwargs):
    with pytest.raises(DataError) as caught:
        load_preferences(path, **kwargs)
    assert caught.value.next_step
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize(
    "name", ["v.jsonl", "v.jsonl.gz", "v.json", "v.ndjson", "array.json", "v.csv", "v.csv.gz", "v.parquet"]
)
def test_each_format_gives_the_same_votes(tmp_path, name):
    import datasets

    path = tmp_path / name
    if name == "array.json":
        path.write_text(json.dumps(VOTES))
    elif ".csv" in name:
        text = "\ufeffprompt,chosen,rejected,annotator_id\np1,a\u2028b,c,w1\np2,d,,w2\n".encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    elif name == "v.parquet":
        datasets.Dataset.from_list(VOTES).to_parquet(str(path))
    else:
        path.write_bytes(gzip.compress(lines(VOTES)) if name.endswith(".gz") else lines(VOTES))
    loaded = load_preferences(path)
    assert loaded.column_names == list(COLUMNS)
    assert loaded.to_list() == [{k: v[k] for k in COLUMNS} for v in VOTES]


def test_a_folder_saved_by_datasets_is_read(tmp_path):
    import datasets

    datasets.DatasetDict(train=datasets.Dataset.from_list(VOTES)).save_to_disk(str(tmp_path / "saved"))
    assert load_preferences(tmp_path / "saved").num_rows == 2


def test_columns_are_renamed_as_told(tmp_path):
    path = write(tmp_path / "v.jsonl", lines([{"q": "p", "good": "a", "bad": "b", "worker": 7}]))
    for columns in (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "annotator_id": "worker"},
        "prompt=q, chosen=good,rejected=bad,annotator_id=worker",
    ):
        assert load_preferences(path, columns=columns).to_list() == [
            {"prompt": "p", "chosen": "a", "rejected": "b", "annotator_id": "7"}
        ]


def test_data_without_annotators_must_say_so(tmp_path):
    path = write(tmp_path / "v.jsonl", lines([{"prompt": "p", "chosen": "a", "rejected": "b"}]))
    code, message = reason(path)
    assert code == "missing-column"
    assert "annotator_id" in message
    assert "--unit pair" in message
    assert load_preferences(path, columns="annotator_id=").column_names == ["prompt", "chosen", "rejected"]


def test_a_misspelt_column_is_met_with_the_close_one_and_those_there_are(tmp_path):
    path = write(tmp_path / "v.jsonl", lines([{"promt": "p", "chosen": "a", "rejected": "b", "annotator_id": "w"}]))
    code, message = reason(path)
    assert code == "missing-column"
    assert "'prompt'" in message
    assert "Did you mean 'promt'?" in message
    assert "promt, chosen, rejected, annotator_id" in message
    assert "--columns prompt=" in message
    code, message = reason(path, columns={"promtp": "promt"})
    assert code == "columns"
    assert "Did you mean 'prompt'?" in message


@pytest.mark.parametrize("value", [None, ""])
def test_a_vote_without_its_annotator_is_named(tmp_path, value):
    votes = [VOTES[0], {**VOTES[1], "annotator_id": value}]
    code, message = reason(write(tmp_path / "v.jsonl", lines(votes)))
    assert code == "missing-annotator"
    assert "row 2" in message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"chosen": None}, "missing-value"),
        ({"chosen": [{"role": "user"}]}, "wrong-type"),
        ({"annotator_id": 1.5}, "wrong-type"),
    ],
)
def test_a_value_that_is_no_text_is_named(tmp_path, change, code):
    found, message = reason(write(tmp_path / "v.jsonl", lines([{**VOTES[0], **change}])))
    assert found == code
    assert "row 1" in message
    assert next(iter(change)) in message


@pytest.mark.parametrize(
    ("name", "data", "code", "said"),
    [
        ("v.jsonl", b"", "empty-data", "no rows"),
        ("v.csv", b"prompt,chosen,rejected,annotator_id\n", "empty-data", "no rows"),
        ("v.jsonl", lines(VOTES)[:-20], "malformed", "line 2"),
        ("v.jsonl", b"\n\n[1]\n", "malformed", "row 1"),
        ("v.jsonl", b"\xff\xfe", "unreadable", "UTF-8"),
        ("v.jsonl.gz", gzip.compress(lines(VOTES), mtime=0)[:-12], "unreadable", "cannot be read"),
        ("v.jsonl.gz", lines(VOTES), "unreadable", "cannot be read"),
        ("v.parquet", b"PAR1 no", "malformed", "no parquet"),
        ("v.csv", b"prompt,chosen,rejected,annotator_id\na,b,c,d,e\n", "malformed", "more fields"),
        ("v.xlsx", b"x", "unknown-format", "no known kind"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path, name, data, code, said):
    found, message = reason(write(tmp_path / name, data))
    assert found == code
    assert said in message


def test_a_file_that_is_not_there_is_met_with_the_close_one(tmp_path):
    write(tmp_path / "votes.jsonl", lines(VOTES))
    code, message = reason(tmp_path / "vote.jsonl")
    assert code == "no-file"
    assert "Did you mean 'votes.jsonl'?" in message


def test_a_hub_name_that_cannot_be_loaded_says_so(monkeypatch):
    code, message = reason("no-such-owner/no-such-set")
    assert code == "no-data-set"
    assert "no-such-owner/no-such-set" in message


def test_a_renaming_without_an_equals_sign_is_refused():
    with pytest.raises(DataError, match="no '='"):
        parse_columns("prompt")


def test_real_human_votes_are_read(llmfao):
    loaded = load_preferences(llmfao / "mini.jsonl.gz")
    assert (loaded.num_rows, len(set(loaded["annotator_id"]))) == (200, 8)


def test_rows_of_a_release_of_labels_keep_what_says_so(tmp_path):
    path = tmp_path / "noisy.jsonl"
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "label_release": "r", "label_check": "c", "other": 1}
    path.write_text(json.dumps(row) + "\n")
    loaded = load_preferences(path)
    assert loaded.column_names == ["prompt", "chosen", "rejected", "label_release", "label_check"]
    assert loaded[0]["label_check"] == "c"
    path.write_text(json.dumps({**row, "annotator_id": "w1"}) + "\n")
    assert load_preferences(path)[0]["annotator_id"] == "w1"
    del row["label_check"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="annotator_id"):
        load_preferences(path)
