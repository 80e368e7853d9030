"""What is recorded of a data set, in the open and in the vault."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetInfo
from support.tiny import synthetic_pairs

from rlhf_audit_nb.capture.data import bind_data, digest_rows, recorded_columns


@pytest.fixture
def rows():
    return synthetic_pairs(4)


def test_the_digest_follows_every_cell_and_the_order(rows):
    digest = digest_rows(Dataset.from_list(rows))
    assert digest == digest_rows(Dataset.from_list(rows))
    assert digest != digest_rows(Dataset.from_list(rows[::-1]))
    changed = [dict(row) for row in rows]
    changed[2]["rejected"] += " "
    assert digest != digest_rows(Dataset.from_list(changed))


def test_the_digest_is_of_the_rows_not_of_how_they_are_stored(rows):
    dataset = Dataset.from_list(rows)
    reordered = dataset.select(range(len(rows) - 1, -1, -1)).select(range(len(rows) - 1, -1, -1))
    assert digest_rows(reordered) == digest_rows(dataset)
    assert digest_rows(dataset.with_format("torch")) == digest_rows(dataset)


def test_token_ids_beside_text_do_not_count(rows):
    dataset = Dataset.from_list(rows)
    tokenised = dataset.add_column("prompt_ids", [[1, 2, number] for number in range(len(rows))])
    assert recorded_columns(tokenised) == dataset.column_names
    assert digest_rows(tokenised) == digest_rows(dataset)


def test_token_ids_alone_do_count():
    one = Dataset.from_list([{"input_ids": [1, 2]}])
    other = Dataset.from_list([{"input_ids": [1, 3]}])
    assert digest_rows(one) != digest_rows(other)


def test_without_privacy_rows_and_digest_stand_in_the_open(rows):
    dataset = Dataset.from_list(rows)
    event, private = bind_data(dataset, "train")
    assert private is None
    assert event.rows == len(rows)
    assert event.digest == digest_rows(dataset)


def test_under_privacy_only_columns_and_units_stand_in_the_open(rows):
    dataset = Dataset.from_list(rows)
    event, private = bind_data(
        dataset, "train", private=True, unit="annotator", units=4, annotator_column="annotator_id"
    )
    assert (event.unit, event.units) == ("annotator", 4)
    assert event.rows is None
    assert event.digest is None
    assert private is not None
    assert (private.rows, private.annotators, private.digest) == (len(rows), 4, digest_rows(dataset))


def test_simulated_data_says_so(rows):
    info = DatasetInfo(description="Simulated preferences of 40 annotators.")
    event, _ = bind_data(Dataset.from_list(rows, info=info), "train")
    assert event.provenance == "simulated"
    assert bind_data(Dataset.from_list(rows), "train")[0].provenance == "unknown"


def test_a_stream_has_neither_size_nor_digest(rows):
    event, _ = bind_data(Dataset.from_list(rows).to_iterable_dataset(), "train")
    assert event.rows is None
    assert event.digest is None
    assert event.columns == list(rows[0])


def test_a_plain_list_of_items_is_digested():
    import torch

    event, _ = bind_data([{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, 4.0])}], "train")
    assert event.rows == 2
    assert event.digest is not None
    assert event.digest != bind_data([{"x": [1.0, 2.5]}, {"x": [3.0, 4.0]}], "train")[0].digest


def test_the_digest_of_prompts_knows_them_in_any_order_and_number_and_stays_private(rows):
    from rlhf_audit_nb.capture.data import digest_prompts

    known = digest_prompts(Dataset.from_list(rows))
    again = Dataset.from_list([{"prompt": row["prompt"]} for row in [*reversed(rows), rows[0]]])
    assert known is not None
    assert digest_prompts(again) == known
    assert digest_prompts(Dataset.from_list([{**row, "prompt": row["prompt"] + "?"} for row in rows])) != known
    assert digest_prompts(Dataset.from_list([{"text": "x"}])) is None
    event, private = bind_data(Dataset.from_list(rows), "train", private=True, unit="annotator", units=4)
    assert private is not None
    assert private.prompts == known
    assert known not in repr(event)


def test_shards_tell_where_two_data_sets_differ(rows, monkeypatch):
    from rlhf_audit_nb.capture import data as module

    monkeypatch.setattr(module, "SHARD_ROWS", 2)
    dataset = Dataset.from_list(rows)
    event, _ = bind_data(dataset, "train")
    assert event.shard_rows == 2
    assert event.shards is not None
    assert len(event.shards) == len(rows) // 2
    assert event.shards[1] == digest_rows(dataset.select([2, 3]))
    changed = [dict(row) for row in rows]
    changed[2]["rejected"] += " "
    other, _ = bind_data(Dataset.from_list(changed), "train")
    assert [a == b for a, b in zip(event.shards, other.shards or [], strict=True)] == [True, False, True, True]
    monkeypatch.setattr(module, "MAX_SHARDS", 2)
    assert bind_data(dataset, "train")[0].shard_rows == 4
    monkeypatch.setattr(module, "SHARD_ROWS", 65_536)
    assert bind_data(dataset, "train")[0].shards is None


def test_the_files_of_a_data_set_have_names_and_digests_and_no_path(rows, tmp_path):
    import hashlib

    folder = tmp_path / "somebody" / "data"
    Dataset.from_list(rows).save_to_disk(folder)
    event, _ = bind_data(Dataset.load_from_disk(folder), "train")
    assert event.files is not None
    (file,) = event.files.files
    (path,) = folder.glob("*.arrow")
    assert (file.name, file.digest) == (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    assert "somebody" not in repr(event)
    assert event.fingerprint == Dataset.load_from_disk(folder)._fingerprint
    assert event.features == {name: str(kind) for name, kind in Dataset.from_list(rows).features.items()}
    assert bind_data(Dataset.from_list(rows), "train")[0].files is None


def test_every_transformation_changes_the_fingerprint(rows):
    dataset = Dataset.from_list(rows)
    prints = [
        bind_data(one, "train")[0].fingerprint
        for one in (dataset, dataset.select([0, 1]), dataset.remove_columns("chosen"), dataset.shuffle(seed=1))
    ]
    assert len(set(prints)) == 4
    assert None not in prints


def test_the_hubs_commit_is_read_off_the_cache_and_off_the_addresses(rows, tmp_path):
    commit = "c0ffee" + "0" * 34
    folder = tmp_path / "someone___things" / "default" / "0.0.0" / commit
    folder.mkdir(parents=True)
    Dataset.from_list(rows).save_to_disk(tmp_path / "made")
    (made,) = (tmp_path / "made").glob("*.arrow")
    made.rename(folder / "things-train.arrow")
    cached = Dataset.from_file(str(folder / "things-train.arrow"))
    assert bind_data(cached, "train")[0].revision == commit
    assert bind_data(Dataset.from_list(rows), "train")[0].revision is None
    address = f"hf://datasets/someone/things@{commit}/data/train.parquet"
    info = DatasetInfo(download_checksums={address: {"num_bytes": 7, "checksum": "0" * 64}})
    event, _ = bind_data(Dataset.from_list(rows, info=info), "train")
    assert event.revision == commit
    assert event.files is not None
    assert [(file.name, file.bytes, file.digest) for file in event.files.files] == [("data/train.parquet", 7, "0" * 64)]


def test_under_privacy_none_of_it_stands_in_the_open(rows, tmp_path):
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    dataset = Dataset.load_from_disk(tmp_path / "data")
    event, half = bind_data(dataset, "train", private=True, unit="annotator", units=4, artifacts=tmp_path)
    assert (event.files, event.fingerprint, event.features, event.revision, event.shards) == (None,) * 5
    assert half is not None
    assert half.files is not None
    assert half.fingerprint == dataset._fingerprint
    assert half.features is not None
    assert not list(tmp_path.glob("*.json"))
