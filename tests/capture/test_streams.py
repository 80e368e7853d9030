"""What a training read of a stream: exactly what its steps were given, and nothing that was only loaded."""

from __future__ import annotations

import pytest
import torch
from support.tiny import causal_model, lora, synthetic_pairs, tokenizer
from support.trails import events
from transformers import TrainerCallback

from rlhf_audit_nb.capture.run import Run
from rlhf_audit_nb.capture.streams import StreamDigest
from rlhf_audit_nb.events import DataBound, DataRead
from rlhf_audit_nb.trail import Trail

ROWS = [{"text": f"{row['prompt']}{row['chosen']}"} for row in synthetic_pairs(10)]


@pytest.fixture
def trail(tmp_path):
    with Trail.open(tmp_path / "audit") as opened:
        yield opened


class Keeps(TrainerCallback):
    """Stops the training with an error at a step."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.fails_at:
            raise OSError("the disk is full")


def train(trail, folder, rows=ROWS, *, workers=0, steps=3, fails_at=None, streamed=True):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(rows)
    trainer = SFTTrainer(
        model=causal_model(),
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            dataloader_num_workers=workers,
            max_length=64,
        ),
        train_dataset=data.to_iterable_dataset(num_shards=2) if streamed else data,
        processing_class=tokenizer(),
        peft_config=lora(),
        callbacks=[Keeps(fails_at)],
    )
    before = dict(vars(trainer))
    with Run(trail, "stream") as run:
        trainer.train()
    assert "training_step" not in vars(trainer)
    assert "training_step" not in before
    return events(trail, DataRead, run.id)


def test_what_was_read_is_counted_and_digested_in_order(trail, tmp_path):
    (read,) = train(trail, tmp_path / "a")
    assert (read.role, read.batches, read.rows, read.workers) == ("train", 3, 12, 0)
    (again,) = train(trail, tmp_path / "b")
    assert again.digest == read.digest
    (turned,) = train(trail, tmp_path / "c", ROWS[1:2] + ROWS[:1] + ROWS[2:])
    assert turned.digest != read.digest
    bound = events(trail, DataBound)[0]
    assert (bound.rows, bound.digest) == (None, None)


def test_rows_that_were_not_reached_do_not_count(trail, tmp_path):
    (read,) = train(trail, tmp_path / "a", steps=2)
    (other,) = train(trail, tmp_path / "b", [*ROWS[:-1], {"text": "another end"}], steps=2)
    assert read.rows == 8
    assert other.digest == read.digest
    (changed,) = train(trail, tmp_path / "c", [{"text": "another beginning"}, *ROWS[1:]], steps=2)
    assert changed.digest != read.digest


def test_a_training_that_fails_says_how_far_it_came(trail, tmp_path):
    with pytest.raises(OSError, match="disk is full"):
        train(trail, tmp_path / "a", fails_at=2)
    (failed,) = events(trail, DataRead)
    (whole,) = train(trail, tmp_path / "b", steps=2)
    assert (failed.batches, failed.digest) == (2, whole.digest)


def test_what_other_processes_loaded_is_in_it(trail, tmp_path):
    (read,) = train(trail, tmp_path / "a", workers=1)
    (alone,) = train(trail, tmp_path / "b")
    assert read.workers == 1
    assert (read.rows, read.digest) == (alone.rows, alone.digest)


def test_a_data_set_with_a_size_needs_no_such_entry(trail, tmp_path):
    assert train(trail, tmp_path / "a", steps=1, streamed=False) == []


def test_the_digest_covers_every_value_of_a_batch():
    def digest(*batches):
        read = StreamDigest()
        for batch in batches:
            read.add(batch)
        return read.rows, read.hexdigest()

    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "margin": [0.5, 1.0]}
    assert digest(batch)[0] == 2
    different = [
        digest(batch),
        digest({**batch, "margin": [0.5, 2.0]}),
        digest({**batch, "input_ids": torch.tensor([[1, 2], [3, 5]])}),
        digest({**batch, "more": torch.zeros(2)}),
        digest(batch, batch),
        digest([{"prompt": "a"}, {"prompt": "b"}]),
        digest([{"prompt": "a"}, {"prompt": "c"}]),
        digest([{"prompt": torch.tensor([1])}]),
        digest([{"prompt": torch.tensor([2])}]),
    ]
    assert len({value for _, value in different}) == len(different)
    assert digest([{"prompt": "a"}, {"prompt": "b"}])[0] == 2
