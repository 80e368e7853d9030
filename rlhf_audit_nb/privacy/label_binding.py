"""Whether what a trainer is about to train on came out of a release of this trail, row by row. Floor 2.

Each noisy row names its release and carries a check value over its texts in their noisy order (`labels`). TRL keeps the
text columns beside the tokens it makes of them, and changes them: an end-of-sequence token is appended, a prompt is
split off, or (RewardTrainer) put in front. `bind_labels` undoes that, verifies the check value of every row, makes the
tokens anew from the verified text with the trainer's own preparation, and compares them with those that will be
trained on. So neither other labels in the right columns nor old tokens beside the right text can pass by mistake.
Whoever holds the vault's key can make check values: this guards against accidents and not against its owner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import DataError, PrivacyError
from rlhf_audit_nb.privacy.labels import CHECK_COLUMN, RELEASE_COLUMN, check_value
from rlhf_audit_nb.privacy.quiet import quiet_preparation

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.label_release import Opened
    from rlhf_audit_nb.privacy.ledger import LabelSpend

__all__ = ["BoundLabels", "bind_labels"]

_TEXTS = ("prompt", "chosen", "rejected")
_SAID_BESIDE = ("tools", "chat_template_kwargs")
_TELLING = {
    "margin": "a margin follows from the label, and would tell what the flips hide",
    "ref_chosen_logps": "reference log-probabilities that were computed before may follow the order of other labels",
    "ref_rejected_logps": "reference log-probabilities that were computed before may follow the order of other labels",
}
_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class BoundLabels:
    """What a training set was shown to be: its rows, and the releases that they came out of."""

    rows: int
    releases: tuple[LabelSpend, ...]

    @property
    def flip_probability(self) -> float:
        """The chance with which each label was flipped; the same in all the releases."""
        return self.releases[0].flip_probability


def bind_labels(trainer: Any, releases: Sequence[LabelSpend], opened: Sequence[Opened | None]) -> BoundLabels:
    """Show that every row that ``trainer`` will train on came out of one of ``releases``.

    Args:
        trainer: a DPOTrainer or RewardTrainer of TRL's, built.
        releases: those of the trail.
        opened: what the vault says of each; ``None`` where that is gone.

    Raises:
        DataError: the data is no data set of `datasets`, or lacks the columns of a release.
        PrivacyError: code ``unreleased-labels`` where a row did not come out of a release as it stands there, or the
            releases flipped with different chances.
    """
    dataset = _table(trainer.train_dataset)
    named = sorted(set(dataset[RELEASE_COLUMN]), key=str)
    known = {spend.release: (spend, one) for spend, one in zip(releases, opened, strict=True)}
    used = [_known(name, known) for name in named]
    chances = {spend.flip_probability for spend, _ in used}
    if len(chances) > 1:
        raise _unreleased(
            "The training data mixes labels that were flipped with different chances, and one loss cannot debias both.",
            "Train on releases with one epsilon.",
        )
    keys = {spend.release: one.check_key for spend, one in used}
    texts = list(_verified(dataset, keys, _end(trainer)))
    _check_tokens(trainer, dataset, texts)
    return BoundLabels(rows=len(dataset), releases=tuple(spend for spend, _ in used))


def _table(dataset: Any) -> Any:
    if dataset is None or not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise DataError(
            "The training data is a stream or not a data set of `datasets`; its labels cannot be shown to be released.",
            next_step="Train on what auditor.release_labels(...).dataset gives.",
            code="streaming-data",
        )
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        raise DataError(
            "The training data has a transform of its own, which runs whenever a row is read; what it makes of the "
            "released rows cannot be shown.",
            next_step="Train on what auditor.release_labels(...).dataset gives.",
            code="data-transform",
        )
    lacking = [
        name for name in (RELEASE_COLUMN, CHECK_COLUMN, "chosen", "rejected") if name not in dataset.column_names
    ]
    if lacking or not len(dataset):
        found = "has no rows" if not lacking else f"has no column {lacking[0]!r}"
        raise _unreleased(f"The training data {found}: its labels did not come out of a release.")
    for name, why in _TELLING.items():
        if name in dataset.column_names:
            raise _unreleased(f"The training data has a column {name!r}: {why}.", f"Remove the column {name!r}.")
    return dataset.with_format(None)


def _known(name: Any, known: Mapping[str, tuple[LabelSpend, Opened | None]]) -> tuple[LabelSpend, Opened]:
    spend, opened = known.get(name, (None, None))
    if spend is None:
        raise _unreleased("The training data names a release of labels that this trail does not know.")
    if opened is None:
        raise _unreleased(
            "What the vault held of the release was erased or is missing, so its rows cannot be recognised any more.",
            "Restore the vault that belongs to this trail, or release other labels.",
        )
    return spend, opened


def _end(trainer: Any) -> str:
    tokenizer = getattr(trainer, "_tokenizer", None) or trainer.processing_class
    return str(getattr(tokenizer, "eos_token", None) or "")


def _verified(dataset: Any, keys: Mapping[str, bytes], end: str) -> Iterator[tuple[Any, Any, Any]]:
    """The texts of each row as they were released."""
    names = [name for name in _TEXTS if name in dataset.column_names]
    columns = dataset.select_columns([*names, RELEASE_COLUMN, CHECK_COLUMN])
    for batch in columns.iter(batch_size=_BATCH):
        prompts = batch.get("prompt") or [None] * len(batch["chosen"])
        rows = zip(prompts, batch["chosen"], batch["rejected"], batch[RELEASE_COLUMN], batch[CHECK_COLUMN], strict=True)
        for prompt, chosen, rejected, release, value in rows:
            for texts in _origins(prompt, chosen, rejected, end):
                if check_value(keys[release], release, *texts) == value:
                    yield texts
                    break
            else:
                raise _unreleased(
                    "The training data has rows that are not as they were released: other labels or texts."
                )


def _origins(prompt: Any, chosen: Any, rejected: Any, end: str) -> Iterator[tuple[Any, Any, Any]]:
    """What a row may have been before TRL prepared it, likeliest first."""
    for one in _without_end(chosen, end):
        for other in _without_end(rejected, end):
            yield prompt, one, other
            if prompt is None:
                continue
            size = len(prompt)
            if one[:size] == prompt and other[:size] == prompt:  # RewardTrainer put it in front
                yield prompt, one[size:], other[size:]
            if type(prompt) is type(one) is type(other):  # DPOTrainer split it off
                yield None, prompt + one, prompt + other


def _without_end(text: Any, end: str) -> tuple[Any, ...]:
    if isinstance(text, str) and end and text.endswith(end):
        return text[: -len(end)], text
    return (text,)


def _check_tokens(trainer: Any, dataset: Any, texts: Sequence[tuple[Any, Any, Any]]) -> None:
    """Make the tokens anew, as the trainer does, from what was verified, and compare them with what it has."""
    from datasets import Dataset

    columns: dict[str, list[Any]] = {
        name: [row[place] for row in texts] for place, name in enumerate(_TEXTS) if texts[0][place] is not None
    }
    columns |= {name: dataset[name] for name in _SAID_BESIDE if name in dataset.column_names}
    with quiet_preparation():
        again = trainer._prepare_dataset(  # noqa: SLF001 - the trainer's own preparation, and no other one
            Dataset.from_dict(columns), trainer.processing_class, trainer.args, "train"
        ).with_format(None)
    tokens = [name for name in dataset.column_names if name.endswith("_ids")]
    same = len(again) == len(dataset) and tokens == [name for name in again.column_names if name.endswith("_ids")]
    if not (tokens and same and all(dataset[name][:] == again[name][:] for name in tokens)):
        raise _unreleased(
            "The tokens in the training data are not those of its released texts.",
            "Give the trainer the released rows as they are, without tokens of your own.",
        )


def _unreleased(message: str, instead: str = "") -> PrivacyError:
    return PrivacyError(
        message,
        next_step=(instead or "Release the labels first, noisy = auditor.release_labels(data, epsilon=…), and train on "
                   "noisy.dataset or on the file that it wrote.") + " Nothing was trained.",
        code="unreleased-labels",
    )  # fmt: skip
