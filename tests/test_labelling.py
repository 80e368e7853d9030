"""Label privacy from end to end: real votes are released, TRL trains on them, and the trail says what that cost."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from datasets import Dataset
from support.tiny import dpo_trainer, grpo_trainer, preferences, reward_trainer, sft_trainer
from support.trails import events, kinds

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, DataError, PrivacyError, StoreError, UnsupportedTrainerError
from rlhf_audit_nb.events import LabelsReleased, LabelsWritten, PrivacyInherited, Step, TrainerAttached
from rlhf_audit_nb.privacy.label_release import release_owner
from rlhf_audit_nb.privacy.labels import CHECK_COLUMN, RELEASE_COLUMN, flip_chance
from rlhf_audit_nb.trail.erasure import erase

EPSILON = 1.5
ROWS = 40
COLUMNS = {"annotator_id": "annotator_id"}


def holder(folder: Any, epsilon: float = EPSILON, **config: Any) -> AuditableRLHF:
    return AuditableRLHF(
        privacy_config=PrivacyConfig(epsilon=epsilon, unit="label", **config),
        audit_config=AuditConfig(trail=str(folder / "audit")),
    )


@pytest.fixture(scope="module")
def votes() -> list[dict[str, str]]:
    return preferences(ROWS)


@pytest.fixture
def auditor(tmp_path, votes):
    made = holder(tmp_path)
    made.noisy = made.release_labels(votes, epsilon=EPSILON, out=tmp_path / "noisy.jsonl")  # type: ignore[attr-defined]
    return made


def rows_of(noisy: Any) -> list[dict[str, Any]]:
    return list(noisy.dataset)


def train(auditor: AuditableRLHF, trainer: Any) -> Any:
    with auditor.track_training("labels") as run:
        trainer.train()
    return run


def test_dpo_trains_on_released_labels_with_the_debiased_loss_and_charges_nothing(auditor, tmp_path):
    trainer = dpo_trainer(rows_of(auditor.noisy), tmp_path / "out")
    before = trainer.loss_types, trainer.label_smoothing
    run = train(auditor, trainer)
    assert (trainer.loss_types, trainer.label_smoothing) == before == (["sigmoid"], 0.0)
    trail = auditor.trail
    (attached,) = events(trail, TrainerAttached)
    assert attached.loss == "robust"
    assert attached.hyperparameters["loss_type"] == ["robust"]
    assert attached.hyperparameters["label_smoothing"] == flip_chance(EPSILON)
    (inherited,) = events(trail, PrivacyInherited)
    (released,) = events(trail, LabelsReleased)
    (written,) = events(trail, LabelsWritten)
    assert (inherited.kind, inherited.unit, inherited.epsilon, inherited.delta) == (
        "released-labels",
        "label",
        EPSILON,
        0.0,
    )
    assert inherited.sources == [{"entry": auditor.noisy.entry, "run": None, "digest": written.digest, "role": "data"}]
    assert "the texts, who annotated, and several labels of one annotator together are not protected" in inherited.note
    assert not {"privacy.reserved", "privacy.settled"} & set(kinds(trail))
    assert released.epsilon_total == EPSILON
    # What is made of released labels is public: nothing is hidden of the steps.
    steps = events(trail, Step)
    assert [step.step for step in steps] == [1, 2, 3]
    assert all(math.isfinite(step.metrics["loss"]) and "rewards/margins" in step.metrics for step in steps)
    assert "inherits ε 1.50" in run.summary()
    assert "unit label" in run.summary()
    assert auditor.verify().level.name != "INVALID"
    assert "1.50" in str(auditor.budget())
    assert auditor.budget().left == 0.0


def test_a_reward_model_trains_on_the_noisy_file_with_the_debiased_loss(auditor, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "noisy.jsonl").read_text().splitlines()]
    trainer = reward_trainer(rows, tmp_path / "out", center_rewards_coefficient=0.01)
    kind = type(trainer)
    train(auditor, trainer)
    assert type(trainer) is kind
    (attached,) = events(auditor.trail, TrainerAttached)
    assert (attached.trainer, attached.loss) == ("RewardTrainer", "debiased Bradley-Terry")
    assert attached.hyperparameters["label_smoothing"] == flip_chance(EPSILON)
    (inherited,) = events(auditor.trail, PrivacyInherited)
    assert inherited.epsilon == EPSILON


def test_a_policy_rewarded_by_a_model_of_released_labels_inherits_their_epsilon_on_the_same_prompts(tmp_path, votes):
    auditor = holder(tmp_path, public_prompts=True)
    noisy = auditor.release_labels(votes, epsilon=EPSILON, out=tmp_path / "noisy.jsonl")
    reward = reward_trainer(rows_of(noisy), tmp_path / "reward")
    train(auditor, reward)
    before = auditor.budget().to_dict()
    prompts = [{"prompt": row["prompt"]} for row in votes]
    run = train(auditor, grpo_trainer([reward.model], tmp_path / "policy", prompts=prompts))
    _, inherited = events(auditor.trail, PrivacyInherited)
    assert (inherited.kind, inherited.unit, inherited.epsilon) == ("private-model", "label", EPSILON)
    assert auditor.budget().to_dict() == before
    assert "inherits ε 1.50" in run.summary()
    assert "δ 0, per label" in str(auditor.lineage())  # the reward model's own bound is pure


def test_a_part_of_the_rows_in_another_order_and_more_than_once_is_still_the_release(auditor, tmp_path):
    rows = rows_of(auditor.noisy)
    train(auditor, reward_trainer([rows[7], rows[3], rows[3], rows[20]], tmp_path / "out", max_steps=1))
    assert len(events(auditor.trail, PrivacyInherited)) == 1


def test_a_policy_that_is_rewarded_by_a_model_of_released_labels_inherits_their_epsilon(auditor, tmp_path):
    reward = reward_trainer(rows_of(auditor.noisy), tmp_path / "reward", max_steps=1)
    train(auditor, reward)
    held = holder(tmp_path, public_prompts=True)
    run = train(held, grpo_trainer([reward.model], tmp_path / "policy", max_steps=1))
    first, second = events(auditor.trail, PrivacyInherited)
    assert (first.kind, second.kind) == ("released-labels", "private-model")
    assert (second.unit, second.epsilon) == ("label", EPSILON)
    assert second.sources[0]["role"] == "reward"
    assert "inherits ε 1.50" in run.summary()
    refused_policy = grpo_trainer([reward.model], tmp_path / "other", max_steps=1)
    with pytest.raises(UnsupportedTrainerError, match="were not declared public"):
        train(auditor, refused_policy)


def test_a_training_on_labels_is_not_resumed(auditor, tmp_path):
    trainer = reward_trainer(rows_of(auditor.noisy), tmp_path / "out", max_steps=1)
    with (
        auditor.track_training("labels"),
        pytest.raises(UnsupportedTrainerError, match="where a checkpoint's weights come from"),
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def test_the_report_and_the_card_say_what_is_and_what_is_not_protected(auditor, tmp_path):
    train(auditor, dpo_trainer(rows_of(auditor.noisy), tmp_path / "out", max_steps=1))
    report = auditor.generate_compliance_report(format="html").save(tmp_path / "report.html").read_text()
    assert "who annotated, and several labels of one annotator together are not protected" in report
    assert "labels that had been flipped at random" in report
    assert f"{ROWS} preference labels were flipped at random when they were released, 1 release in all" in report
    assert "Nothing was trained here" not in report
    assert "0×10" not in report
    card = str(auditor.generate_model_card().save(tmp_path / "card.md").read_text())
    assert "inherits ε = 1.50" in card
    assert "per label" in card
    assert "are not protected" in card


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(auditor: AuditableRLHF, trainer: Any, complaint: str, kind: type[Exception] = PrivacyError) -> Any:
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(kind, match=complaint) as caught:
        train(auditor, trainer)
    assert all((old == new).all() for old, new in zip(before, trainer.model.parameters(), strict=True))
    assert not events(auditor.trail, PrivacyInherited)
    return caught.value


def test_labels_that_were_never_released_are_refused_with_the_way_to_release_them(auditor, votes, tmp_path):
    error = refused(auditor, dpo_trainer(votes, tmp_path / "out"), f"has no column '{RELEASE_COLUMN}'")
    assert "auditor.release_labels" in error.next_step
    assert error.reason == "unreleased-labels"


@pytest.mark.parametrize("make", [dpo_trainer, reward_trainer])
def test_original_labels_in_the_columns_of_a_release_are_refused(auditor, votes, tmp_path, make):
    noisy = rows_of(auditor.noisy)
    forged = [
        {**vote, RELEASE_COLUMN: row[RELEASE_COLUMN], CHECK_COLUMN: row[CHECK_COLUMN]}
        for vote, row in zip(votes, noisy, strict=True)
    ]
    assert any(vote["chosen"] != row["chosen"] for vote, row in zip(votes, noisy, strict=True))
    refused(auditor, make(forged, tmp_path / "out"), "rows that are not as they were released")


def test_one_row_turned_round_among_many_is_found(auditor, tmp_path):
    rows = rows_of(auditor.noisy)
    rows[17] = {**rows[17], "chosen": rows[17]["rejected"], "rejected": rows[17]["chosen"]}
    refused(auditor, reward_trainer(rows, tmp_path / "out"), "rows that are not as they were released")


def test_tokens_of_other_labels_beside_the_released_texts_are_refused(auditor, tmp_path):
    trainer = dpo_trainer(rows_of(auditor.noisy), tmp_path / "out")

    def exchange(row: dict[str, Any]) -> dict[str, Any]:
        return {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}

    prepared = trainer.train_dataset
    trainer.train_dataset = prepared.map(lambda row, at: exchange(row) if at == 5 else row, with_indices=True)
    refused(auditor, trainer, "tokens in the training data are not those of its released texts")
    trainer.train_dataset = prepared.remove_columns(["chosen"])
    refused(auditor, trainer, "has no column 'chosen'")


def test_columns_that_tell_the_label_are_refused(auditor, tmp_path):
    rows = [{**row, "margin": 1.0} for row in rows_of(auditor.noisy)]
    refused(auditor, reward_trainer(rows, tmp_path / "out"), "a margin follows from the label")


def test_a_release_of_another_trail_is_refused(auditor, votes, tmp_path):
    (tmp_path / "other").mkdir()
    stranger = holder(tmp_path / "other").release_labels(votes, epsilon=EPSILON)
    refused(auditor, dpo_trainer(rows_of(stranger), tmp_path / "out"), "that this trail does not know")


def test_rows_whose_opening_was_erased_cannot_be_recognised(auditor, tmp_path):
    erase(auditor.trail, release_owner(auditor.noisy.release), reason="retention")
    refused(auditor, dpo_trainer(rows_of(auditor.noisy), tmp_path / "out"), "erased or is missing")


def test_labels_of_two_chances_are_not_mixed(auditor, votes, tmp_path):
    more = holder(tmp_path, 3.0)
    other = more.release_labels(votes[:10], epsilon=1.0)
    assert other.epsilon_total == EPSILON + 1.0
    rows = [*rows_of(auditor.noisy)[20:], *rows_of(other)]
    refused(more, reward_trainer(rows, tmp_path / "out"), "flipped with different chances")


def test_a_run_that_asks_for_less_than_was_released_is_refused(auditor, tmp_path):
    strict = holder(tmp_path, 1.0)
    error = refused(strict, dpo_trainer(rows_of(auditor.noisy), tmp_path / "out"), "asks for epsilon 1 for each label")
    assert error.reason == "inherits-too-much"


def test_sft_on_released_labels_is_refused(auditor, votes, tmp_path):
    refused(auditor, sft_trainer(votes, tmp_path / "out"), "chosen responses alone", UnsupportedTrainerError)


def test_a_model_that_learnt_the_original_labels_before_is_refused(auditor, votes, tmp_path):
    open_one = AuditableRLHF(audit_config=auditor.audit_config)
    first = reward_trainer(votes, tmp_path / "first", max_steps=1)
    train(open_one, first)
    second = reward_trainer(rows_of(auditor.noisy), tmp_path / "second", model=first.model)
    refused(auditor, second, "was left by a training without differential privacy", UnsupportedTrainerError)


def test_an_evaluation_inside_the_run_is_refused(auditor, votes, tmp_path):
    trainer = reward_trainer(rows_of(auditor.noisy), tmp_path / "out", max_steps=1)
    with auditor.track_training("labels"), pytest.raises(UnsupportedTrainerError, match="inside a private run"):
        trainer.evaluate(eval_dataset=Dataset.from_list(votes[:4]))


# --- releasing -------------------------------------------------------------------------------------------------------


def test_what_the_releaser_is_told_is_honest_about_annotators(auditor, votes):
    from scipy.stats import binom

    noisy = auditor.noisy
    most = max(sum(vote["annotator_id"] == who for vote in votes) for who in {vote["annotator_id"] for vote in votes})
    assert noisy.most_labels == most
    # The composed channel by the definition: the least epsilon at which the divergence is delta.
    flips = binom(most, 1 / (1 + math.exp(EPSILON)))
    losses = [EPSILON * (most - 2 * count) for count in range(most + 1)]
    delta = sum(
        max(flips.pmf(count) - math.exp(noisy.annotator_epsilon - loss) * flips.pmf(count), 0.0)
        for count, loss in enumerate(losses)
        if loss > noisy.annotator_epsilon
    )
    assert 0.99 * noisy.delta < delta <= noisy.delta
    assert "The texts and who annotated are not protected" in str(noisy)
    assert f"For an annotator with {most} labels" in str(noisy)
    assert "Left behind: annotator_id" in noisy.warnings[0]


def test_the_original_bits_stand_nowhere_in_the_public_side(auditor, votes, tmp_path):
    """Every byte of the trail's own store: no text of a vote, so no order of two of them."""
    train(auditor, reward_trainer(rows_of(auditor.noisy), tmp_path / "out", max_steps=1))
    stored = b"".join(entry.data for entry in auditor.trail.reader().entries())
    assert b"privacy.labels" in stored
    for vote in votes:
        assert vote["chosen"].encode() not in stored
        assert json.dumps(vote["chosen"])[1:-1].encode() not in stored


def test_a_destroyed_original_and_its_bytes_are_gone(votes, tmp_path):
    source = tmp_path / "votes.jsonl"
    source.write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    keeper = holder(tmp_path)
    keeper.log_annotations(prompts=["q"], chosen=["a"], rejected=["b"], annotator_ids=["w"])
    noisy = keeper.release_labels(source, epsilon=EPSILON, out=tmp_path / "noisy.jsonl", destroy_original=True)
    assert (noisy.originals, source.exists()) == ("destroyed", False)
    assert any("until their annotators are erased" in sentence for sentence in noisy.warnings)
    (written,) = events(keeper.trail, LabelsWritten)
    assert written.originals == "destroyed"
    with pytest.raises(DataError, match="does not exist"):
        keeper.release_labels(source, epsilon=EPSILON, out=tmp_path / "again.jsonl")


def test_an_original_that_resists_is_said_to_be_there_still(votes, tmp_path, monkeypatch):
    source = tmp_path / "votes.jsonl"
    source.write_text("".join(json.dumps(vote) + "\n" for vote in votes))

    def fail(_path: Any) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr("rlhf_audit_nb.trail.durable.destroy_file", fail)
    keeper = holder(tmp_path)
    with pytest.raises(StoreError, match="could not be destroyed") as caught:
        keeper.release_labels(source, epsilon=EPSILON, out=tmp_path / "noisy.jsonl", destroy_original=True)
    assert caught.value.reason == "not-destroyed"
    assert source.exists()
    assert len((tmp_path / "noisy.jsonl").read_text().splitlines()) == ROWS
    (written,) = events(keeper.trail, LabelsWritten)
    assert written.originals == "not destroyed"


def test_a_noisy_file_that_cannot_be_written_is_charged_and_told(votes, tmp_path, monkeypatch):
    def full(_path: Any, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf_audit_nb.trail.durable.write_durably", full)
    keeper = holder(tmp_path)
    with pytest.raises(StoreError, match=r"is charged, but .* cannot be written: No space left"):
        keeper.release_labels(votes, epsilon=EPSILON, out=tmp_path / "noisy.jsonl")
    monkeypatch.undo()
    with pytest.raises(BudgetExceededError):
        keeper.release_labels(votes, epsilon=EPSILON, out=tmp_path / "noisy.jsonl")
