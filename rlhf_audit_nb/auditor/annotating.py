"""What people said: annotations, labels, and whose they are. Floor 5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.auditor.base import AuditorBase
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.annotations import AnnotationImport, ImportSummary, OpenedAnnotation
    from rlhf_audit_nb.labelling import LabelRelease
    from rlhf_audit_nb.privacy.pseudonyms import AnnotatorTable
    from rlhf_audit_nb.trail.erasure import ErasureDone

__all__ = ["Annotating"]

_NOT_SAID: Any = object()


class Annotating(AuditorBase):
    """What people said: annotations, labels, and whose they are."""

    def log_annotations(
        self,
        data: Any = None,
        *,
        annotator_ids: Any = _NOT_SAID,
        prompts: Any = None,
        responses: Any = None,
        chosen: Any = None,
        rejected: Any = None,
        choices: Any = None,
        rewards: Any = None,
        shown: Any = None,
        made_at: Any = None,
        guideline: Any = None,
        guideline_file: Path | str | None = None,
        extra: Any = None,
        columns: Mapping[str, str | None] | None = None,
        words: Mapping[Any, str] | None = None,
        drawn_from: Any = None,
        public_digest: bool = False,
    ) -> AnnotationImport:
        """Record what people said of responses: one annotation, lists of them, or a whole source. Durable on return.

        All of an annotation is private: the trail gets a commitment, the vault the content, under the annotator's own
        key. Inside an open run on this trail the entries are the run's, else the trail's own. Every row is checked
        first; where one is bad, nothing is written. What is not known is recorded as unknown, never guessed::

            auditor.log_annotations(
                prompts=["…"], responses=[("a", "b")], choices=["first"], annotator_ids=["w1"], guideline="v3"
            )
            auditor.log_annotations("votes.csv", columns={"annotator_id": "worker"}, guideline="v3")

        Args:
            data: a file (CSV, JSON lines, a JSON array, also with ``.gz``; parquet), a `datasets.Dataset`, or dicts.
                Its columns are then what `columns` calls them, and none of the lists below may be given.
            annotator_ids: who said so, one id a row; ``None`` says that nobody knows.
            prompts: what the responses answer; text, or conversations as lists of messages.
            responses: the pair of each row as ``(a, b)``, or one response each with its reward.
            chosen: with `rejected`: the pairs where the preferred response is told apart.
            rejected: see `chosen`.
            choices: ``first``, ``second``, ``tie``, ``undecided``, or the response's place from 0.
            rewards: a number for each row, or one for each response of a row.
            shown: the order in which the responses were shown: ``first`` or ``second`` (where the first response, or
                the chosen one, stood), or places such as ``[1, 0]``; one word for all rows, or one a row.
            made_at: when each was made, as the source has it.
            guideline: the guideline's version that annotators were shown; one for all rows, or one a row.
            guideline_file: the guideline itself: its digest stands in the open.
            extra: what else to keep, private as well: lists by name, or with `data` the names of columns.
            columns: what our fields are called in `data`, such as ``{"prompt": "question"}``; ``None`` for a field
                that is not to be taken, ``{"annotator_id": None}`` where nobody knows.
            words: what the source's words for `choices` and `shown` mean, such as ``{"A": "first", "same": "tie"}``.
            drawn_from: the file or files that a program took these from: their digests are recorded, and how many
                annotations they are.
            public_digest: whether the source's digest stands in the open; only for a source that is public anyway.

        Raises:
            DataError: the source cannot be read, or a row cannot stand; it names the row, and nothing was written.
            ConfigError: arguments that do not go together.
            StoreError: a commit failed; what was committed before shows as an import that is not complete.
        """
        from rlhf_audit_nb.capture.annotation_rows import prepare_rows, prepare_values
        from rlhf_audit_nb.capture.annotations import append_annotations
        from rlhf_audit_nb.capture.run import current_run

        if public_digest and self.privacy_config is not None:
            raise ConfigError(
                "public_digest puts a function of private data into the open, and this auditor keeps data private.",
                next_step="Leave public_digest out; the digest is in the vault.",
                code="public_digest",
            )
        lists = {
            "prompts": prompts,
            "responses": responses,
            "chosen": chosen,
            "rejected": rejected,
            "choices": choices,
            "rewards": rewards,
            "made_at": made_at,
        }
        said: dict[str, Any] = {
            "shown": shown,
            "guideline": guideline,
            "guideline_file": guideline_file,
            "words": words,
            "drawn_from": drawn_from,
            "public_digest": public_digest,
        }
        if data is not None:
            _refuse_lists(lists, annotator_ids)
            if annotator_ids is None and isinstance(columns, Mapping | None):
                columns = {"annotator_id": None, **(columns or {})}
            prepared = prepare_rows(data, columns=columns, extra=extra or (), **said)
        else:
            _refuse_columns(columns, annotator_ids)
            prepared = prepare_values(annotator_ids=annotator_ids, extra=extra, **lists, **said)
        run, trail = current_run(), self.trail
        inside = run.id if run is not None and run.trail is trail else None
        return append_annotations(trail, prepared, run=inside, headers=self._headers)

    def annotations(self, import_id: str | None = None, *, run: str | None = None) -> Iterator[OpenedAnnotation]:
        """The recorded annotations, opened, in the trail's order: for whoever holds the vault's key.

        Those of an erased annotator come as ``erased``, those whose opening is lost as ``missing``.

        Args:
            import_id: only those of one import.
            run: only those of one run, by its id.

        Raises:
            VaultError: the vault does not open with this trail's key, or an opening is not its commitment's.
        """
        from rlhf_audit_nb.capture.annotations import read_annotations

        trail = self.trail
        with trail.reading_vault() as vault:
            yield from read_annotations(trail.reader(), vault, import_id=import_id, run=run)

    def annotation_imports(self) -> tuple[ImportSummary, ...]:
        """Every import of annotations with how many it has, from what stands in the open."""
        from rlhf_audit_nb.capture.annotations import summarize_annotations

        return summarize_annotations(self.trail.reader())

    def release_labels(
        self,
        data: Any,
        *,
        epsilon: float,
        columns: Mapping[str, str | None] | None = None,
        keep: Sequence[str] = (),
        words: Mapping[Any, str] | None = None,
        out: Path | str | None = None,
        destroy_original: bool = False,
    ) -> LabelRelease:
        """Release preference labels through randomised response, once; all training on them afterwards is free.

        Each label (which of a row's two responses was preferred) is flipped with chance 1 / (1 + exp(epsilon)), so
        that whatever is made of the noisy rows is epsilon-private for each label. The texts and who annotated are not
        protected. The release is charged to the trail before anything is drawn::

            auditor = AuditableRLHF(privacy_config=PrivacyConfig(epsilon=3.0, unit="label"))
            noisy = auditor.release_labels("votes.csv", epsilon=3.0, columns={"prompt": "question"}, out="noisy.jsonl")
            trainer = DPOTrainer(..., train_dataset=noisy.dataset)

        Args:
            data: a file (CSV, JSON lines, a JSON array, also with ``.gz``; parquet), a `datasets.Dataset`, or dicts:
                with ``chosen`` and ``rejected``, or with ``first``, ``second`` and ``choice``, and maybe ``prompt``.
            epsilon: what the release costs each label, above 0 and at most 15.
            columns: what our fields are called there, such as ``{"prompt": "question"}``; ``annotator_id`` is counted
                and not carried over.
            keep: further columns that the noisy rows carry as they are; all others are left behind, because what stands
                beside a label may tell it.
            words: what the words of ``choice`` mean: ``first`` or ``second``.
            out: a new file for the noisy rows (JSON lines).
            destroy_original: overwrite and delete the file that ``data`` names, once ``out`` is safe. Then neither the
                seed nor the file's digest is kept, so that nobody can undo the flips, and nobody can replay them.

        Raises:
            DataError: the source cannot be read, or a row has no two texts and one choice; nothing was released.
            ConfigError: ``out`` is there already, or the original cannot be destroyed; nothing was released.
            BudgetExceededError: a label would have cost more than the budget; nothing was released.
            PrivacyError: epsilon cannot be used, or the trail counts another unit; nothing was released.
            StoreError: the trail, the noisy file or the original cannot be written; the message says what holds.
        """
        from rlhf_audit_nb.labelling import prepare_release

        prepared = prepare_release(
            data,
            epsilon=epsilon,
            columns=columns,
            keep=keep,
            words=words,
            out=out,
            destroy_original=destroy_original,
            config=self.privacy_config,
        )
        return prepared.release(self.trail)

    def annotator_statistics(self, import_id: str | None = None) -> AnnotatorTable:
        """How each annotator works, under tokens that mean something in this table alone; for the vault's holder.

        ``.rows`` holds one row a person; ``.release(k)`` gives what may be passed on: no figure is about fewer than k
        annotators, and under a privacy budget there is none. That a table was made is written into the trail.

        Args:
            import_id: only annotations of this import.

        Raises:
            ConfigError: there is no such import.
            VaultError: the vault does not open with this trail's key.
            StoreError: the entry could not be appended.
        """
        from rlhf_audit_nb.privacy.pseudonyms import tabulate_annotators

        table = tabulate_annotators(self.trail, import_id=import_id)
        return replace(table, budgeted=table.budgeted or self.privacy_config is not None)

    def reidentify(self, token: str, *, reason: str, by: str) -> str:
        """Whose a token of a table is; the trail says who asked and why before the answer is given.

        Args:
            token: from `annotator_statistics`.
            reason: why, in one line that stands in the open.
            by: who asks, as they are to be named in the open.

        Raises:
            ConfigError: no reason or no name.
            VaultError: ``unknown-token``: no such token, or the annotator was erased.
            StoreError: the entry could not be appended; nothing is told.
        """
        from rlhf_audit_nb.privacy.pseudonyms import reidentify

        return reidentify(self.trail, token, reason=reason, by=by)

    def erase(self, annotator_id: str, *, reason: str) -> ErasureDone:
        """Erase an annotator from the vault, for good; the trail still verifies, and says ``erased``.

        Args:
            annotator_id: the id, as it was handed in with the annotations.
            reason: ``request`` (they asked), ``retention`` (the time to keep it is over) or ``withdrawn`` (consent).

        Raises:
            VaultError: ``unknown-owner`` where the vault holds nothing of theirs; nothing was changed.
            TrailError: vault, key or trail cannot be written.
        """
        from rlhf_audit_nb.trail.erasure import erase

        return erase(self.trail, annotator_id, reason=reason)

    def disclose(self, index: int, path: Path | str) -> Path:
        """Write the private half of one entry, with its proof, into a file for one auditor; it opens nothing else.

        Args:
            index: the entry's place in the trail.
            path: the file, which whoever has it can read.

        Raises:
            VaultError: the entry has no private half, or it was erased, or its opening is missing.
            StoreError: there is no such entry.
            OSError: the file cannot be written.
        """
        from rlhf_audit_nb.trail.disclosure import disclose
        from rlhf_audit_nb.trail.durable import write_durably

        write_durably(Path(path), disclose(self.trail, index).encode())
        return Path(path)


def _refuse_lists(lists: dict[str, Any], annotator_ids: Any) -> None:
    given = [name for name, value in lists.items() if value is not None]
    if annotator_ids is not _NOT_SAID and annotator_ids is not None:
        given.append("annotator_ids")
    if given:
        raise ConfigError(
            f"{given[0]} is given beside a source of rows.",
            next_step="Say with columns= what it is called in the source.",
            code="annotations",
        )


def _refuse_columns(columns: Mapping[str, str | None] | None, annotator_ids: Any) -> None:
    if columns is not None:
        raise ConfigError(
            "columns is given, and no source that has columns.",
            next_step="Hand in the file, the data set or the dicts first.",
            code="annotations",
        )
    if annotator_ids is _NOT_SAID:
        raise ConfigError(
            "annotator_ids is missing.",
            next_step="Give one id for each row, or annotator_ids=None where nobody knows.",
            code="annotations",
        )
