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
