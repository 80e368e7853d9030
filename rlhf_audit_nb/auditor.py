"""`AuditableRLHF`: the one object that users hold. Floor 5.

It composes the floors below and has little logic of its own: it opens the trail, opens runs on it with privacy wired
in (`rlhf_audit_nb.privatiser`), and asks for verdicts, reports and cards. Building one is cheap: the trail is opened
when it is first needed, and one trail is opened once in a process, however many auditors share it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.config import ENV_REPLAY, AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import AuditError, ConfigError, RunError, StoreError
from rlhf_audit_nb.events import (
    CardCreated,
    ReportCreated,
    encode_body,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.annotations import AnnotationImport, Headers, ImportSummary, OpenedAnnotation
    from rlhf_audit_nb.capture.cells import CellContext
    from rlhf_audit_nb.capture.completions import OpenedSamples
    from rlhf_audit_nb.capture.evaluation import LoggedEvaluation
    from rlhf_audit_nb.capture.overhead import RunOverhead
    from rlhf_audit_nb.capture.run import Run
    from rlhf_audit_nb.compliance.weights import WeightsVerdict
    from rlhf_audit_nb.events import CheckpointRecorded
    from rlhf_audit_nb.health import Examination
    from rlhf_audit_nb.labelling import LabelRelease
    from rlhf_audit_nb.privacy.pseudonyms import AnnotatorTable
    from rlhf_audit_nb.privacy.self_audit import SelfAudit
    from rlhf_audit_nb.privatiser import TrailPrivatiser
    from rlhf_audit_nb.replaying import Replay
    from rlhf_audit_nb.reports.budget import Budget, BudgetLeft
    from rlhf_audit_nb.reports.compute import ComputeView
    from rlhf_audit_nb.reports.evaluations import EvaluationsView
    from rlhf_audit_nb.reports.lineage import LineageView
    from rlhf_audit_nb.trail import Trail, TrustPolicy, Verdict
    from rlhf_audit_nb.trail.erasure import ErasureDone

__all__ = ["AuditableRLHF", "Status"]

_NOT_SAID: Any = object()


class AuditableRLHF:
    """Audited training, and what can be said about it afterwards.

    Args:
        model_name: the model's name as you declare it; what a trainer shows is recorded anyway.
        privacy_config: train under differential privacy; ``None`` records training as it is and says so.
        compliance_mode: the framework that reports assess against.
        audit_config: where and how the trail is kept.

    Raises:
        ConfigError: an argument cannot be used; the message says what to write instead.
    """

    def __init__(
        self,
        model_name: str | None = None,
        privacy_config: PrivacyConfig | None = None,
        compliance_mode: str = "eu_ai_act",
        audit_config: AuditConfig | None = None,
    ) -> None:
        if model_name is not None and (not isinstance(model_name, str) or not model_name.strip()):
            raise ConfigError(
                f"model_name is {model_name!r}, which is not a name.",
                next_step='Write a name such as "meta-llama/Llama-2-7b-chat-hf", or leave it out.',
                code="model_name",
            )
        if privacy_config is not None and not isinstance(privacy_config, PrivacyConfig):
            raise ConfigError(
                f"privacy_config is a {type(privacy_config).__name__}, not a PrivacyConfig.",
                next_step="Write privacy_config=PrivacyConfig(epsilon=1.0).",
                code="privacy_config",
            )
        self.model_name = model_name
        self.privacy_config = privacy_config
        self.compliance_mode = _known_mode(compliance_mode)
        self.audit_config = audit_config or AuditConfig()
        self._headers: Headers = {}

    # --- training ----------------------------------------------------------------------------------------------------

    def track_training(self, experiment_name: str) -> Run:
        """A run, as a context manager: any transformers or TRL trainer that trains inside it is recorded.

        With a privacy configuration it is also made private for as long as it trains. Nothing else changes::

            with auditor.track_training(experiment_name="safety_alignment"):
                trainer.train()

        Raises:
            ConfigError: the name is no name.
            TrailError: the trail cannot be opened.
        """
        return self.open_run(experiment_name)

    def open_run(
        self,
        experiment: str,
        *,
        entry_point: str = "context",
        cell_digest: str | None = None,
        cell: CellContext | None = None,
        show_progress: bool = True,
    ) -> Run:
        """`track_training`, with what a notebook's cell has to add."""
        from rlhf_audit_nb.capture.ranks import find_place, refuse_private_ranks
        from rlhf_audit_nb.capture.run import Run

        privacy, place = self.privacy_config, find_place()
        if privacy is not None:
            refuse_private_ranks(place)
        return Run(
            self.trail,
            experiment,
            privatiser=_privatiser(privacy, self.trail) if privacy is not None else None,
            privacy=privacy.to_dict() if privacy is not None else None,
            audit=self.audit_config,
            declared_model=self.model_name,
            compliance_mode=self.compliance_mode,
            entry_point=entry_point,
            cell_digest=cell_digest,
            cell=cell,
            show_progress=show_progress,
            place=place,
        )

    def track_policy_update(
        self,
        *,
        model: Any,
        optimizer: Any,
        batch: Any = None,
        metrics: Mapping[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Record one update of a policy in a training loop of your own; call it after ``optimizer.step()``.

        Recorded are the norms of the gradient and of the update, the learning rate, the batch by its digest, and your
        metrics; with the first one also the model as it was before it, the optimizer's settings and the seed::

            with auditor.track_training(experiment_name="my_loop"):
                for batch in loader:
                    loss = objective(policy, batch)
                    loss.backward()
                    optimizer.step()
                    auditor.track_policy_update(
                        model=policy, optimizer=optimizer, batch=batch, metrics={"loss": loss.item()}
                    )
                    optimizer.zero_grad()

        Args:
            model: the policy.
            optimizer: the torch optimizer that has stepped.
            batch: what was trained on; its digest stands in the open, so leave it out where nobody may try guesses.
            metrics: numbers of this step, by name.
            step: its number, where you count yourself.

        Raises:
            RunError: no run of this auditor's trail is open here, or a trainer of it is training.
            ConfigError: an argument cannot be used.
            DataError: the batch holds something that has no digest.
            UnsupportedTrainerError: the run is private: a loop of your own cannot be made so.
        """
        self._open_here("track_policy_update").step(metrics, step=step, model=model, optimizer=optimizer, batch=batch)

    def checkpoint(
        self,
        *,
        model: Any = None,
        folder: Path | str | None = None,
        epoch: float | None = None,
        metrics: Mapping[str, Any] | None = None,
        processing_class: Any = None,
    ) -> CheckpointRecorded:
        """Record a checkpoint of a training loop of your own, and save and sign what is given.

        ::

            auditor.checkpoint(epoch=1, metrics={"reward": 0.7})                 # the loop's model, by digest
            auditor.checkpoint(model=policy, folder="out/epoch-1", epoch=1)      # saved and signed
            auditor.checkpoint(folder="out/mine", epoch=1)                       # you saved it: signed

        Arguments and errors as of `rlhf_audit_nb.capture.run.Run.checkpoint`.
        """
        return self._open_here("checkpoint").checkpoint(
            model=model, folder=folder, epoch=epoch, metrics=metrics, processing_class=processing_class
        )

    def _open_here(self, called: str) -> Run:
        from rlhf_audit_nb.capture.run import current_run

        run = current_run()
        if run is None or run.trail is not self.trail:
            where = "no run is open here" if run is None else "the run that is open here is on another trail"
            raise RunError(
                f"{called} was called and {where}.",
                next_step='Call it inside `with auditor.track_training("name"):`, or in a cell under %%audit_train.',
                code="no-run",
            )
        return run

    def replay(
        self,
        run: str,
        *,
        opening: Path | str | Sequence[Path | str] | None = None,
        policy: TrustPolicy | None = None,
    ) -> AbstractContextManager[Replay]:
        """Repeat the private trainings of a run from their sealed seeds, and say whether they come out the same.

        ::

            with auditor.replay(run_id, opening="entry-7.opening") as replay:
                trainer.train()  # a trainer built as it was then
            print(replay.result)

        The training goes to a scratch trail, which is deleted; this auditor's own is only read. For a record,
        ``rlhf-audit replay`` does the same with its notebook.

        Args:
            run: the run's id.
            opening: the file of each ``privacy.reserved`` entry of the run, as `disclose` writes it; ``None`` opens
                the seeds from this trail's own vault.
            policy: whose signatures count on the openings; ``None`` trusts the user's own key.

        Raises:
            ReplayRefusedError: there is no such private run; an opening does not hold, or one is missing.
            VaultError: the vault has a seed no more (``erased``).
        """
        from rlhf_audit_nb.replaying import replay_run

        files = () if opening is None else (opening,) if isinstance(opening, str | Path) else tuple(opening)
        return replay_run(self.trail, run, files, privacy=self.privacy_config, policy=policy)

    # --- annotations -------------------------------------------------------------------------------------------------

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

    def samples(self, *, run: str | None = None) -> Iterator[OpenedSamples]:
        """What policies wrote while they were trained, opened, in the trail's order: for whoever holds the vault's key.

        Args:
            run: only those of one run, by its id.

        Raises:
            VaultError: the vault does not open with this trail's key, or an opening is not its commitment's.
        """
        from rlhf_audit_nb.capture.completions import read_samples

        trail = self.trail
        trail.flush()
        with trail.reading_vault() as vault:
            yield from read_samples(trail.reader(), vault, run=run)

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

    # --- the vault ---------------------------------------------------------------------------------------------------

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

    # --- the trail ---------------------------------------------------------------------------------------------------

    @property
    def trail(self) -> Trail:
        """The trail, opened (and made, with its keys) when it is first asked for.

        Of several processes that train together only that of rank 0 opens it; the others get one that keeps nothing.

        Raises:
            TrailError: it cannot be opened or made.
        """
        return _shared_trail(self.audit_config)

    def recovered(self) -> list[str]:
        """What opening the trail found of runs that died, as sentences; empty where there was nothing to find."""
        return [
            f"Run {found.run} was open and its process gone: it is now recorded as interrupted, after its entry "
            f"{found.last_sequence}."
            for found in self.trail.recovery.interrupted
        ]

    def verify(self) -> Verdict:
        """Verify the whole trail as it is stored now."""
        from rlhf_audit_nb.trail import verify_trail

        self.trail.flush()
        return verify_trail(self.trail.location)

    def verify_model(
        self, folder: Path | str, *, against: Path | str | None = None, policy: TrustPolicy | None = None
    ) -> WeightsVerdict:
        """Whether a folder of weights is what a run saved: which entry, run and step it is, and what was changed.

        Args:
            folder: a saved model or checkpoint.
            against: a trail's folder, a published trail or a record; ``None`` takes this auditor's own trail.
            policy: whom to trust; ``None`` trusts the user's own keys.

        Raises:
            ConfigError: there are no weights in that folder.
            AuditError: what it should be checked against cannot be read.
        """
        from rlhf_audit_nb.compliance.weights import check_weights
        from rlhf_audit_nb.reports.sources import evidence_of

        if against is None:
            self.trail.flush()
        evidence = evidence_of(against if against is not None else self.trail.location, policy)
        beside = Path(against) / "artifacts" if against is not None else self.trail.artifacts
        return check_weights(folder, evidence, artifacts=beside if beside.is_dir() else None)

    def status(self) -> Status:
        """Where the trail stands: its name, size and last commit."""
        return Status.of(self.trail)

    def doctor(
        self, *, full: bool = False, policy: Path | str | None = None, published: str | None = None
    ) -> Examination:
        """Look whether keys, trail, vault, disk, clock, versions and anchors are as they should be; changes nothing.

        Args:
            full: verify every entry, not only the newest.
            policy: a trust policy's file; ``None`` looks for ``trust.policy`` beside the trail.
            published: the folder or address of a published copy, to tell how far it lags.

        Raises:
            ConfigError: the policy that was named is not there.
        """
        from rlhf_audit_nb.health import examine

        location = self.audit_config.trail_location()
        with _lock:
            trail = _trails.get(location.absolute())
        return examine(location, full=full, policy=policy, published=published, trail=trail)

    def overhead(self, run: str | None = None) -> RunOverhead:
        """What recording cost a run: its share of the training, and each part's p50 and p99 in a step.

        A private run's figures lie in the vault, because times depend on private data.

        Args:
            run: the run's id or its beginning; ``None`` takes the last one that trained.

        Raises:
            DataError: no such run has trained and ended.
            VaultError: a private run's figures cannot be opened.
        """
        from rlhf_audit_nb.capture.overhead import read_overhead

        with self.trail.reading_vault() as vault:
            return read_overhead(self.trail.reader(), vault.half, run)

    def budget(self) -> Budget:
        """What the trail's population has spent and reserved, and what is left, composed from the trail itself."""
        from rlhf_audit_nb.privacy.reservation import read_ledger
        from rlhf_audit_nb.reports.budget import Budget

        return Budget.of(read_ledger(self.trail.reader(), self.trail), self.privacy_config)

    def steps_left(
        self,
        sampling_rate: float,
        noise_multiplier: float | None = None,
        *,
        steps: int | None = None,
        epsilon: float | None = None,
        population: int | None = None,
        pairs: int = 1,
    ) -> BudgetLeft:
        """How many steps still fit into the budget at a noise multiplier, or which one lets ``steps`` fit.

        Arguments and errors as of `rlhf_audit_nb.reports.budget.what_is_left`::

            auditor.steps_left(sampling_rate=0.1, noise_multiplier=2.0)
        """
        from rlhf_audit_nb.reports.budget import what_is_left

        return what_is_left(
            self.budget(),
            sampling_rate=sampling_rate,
            noise_multiplier=noise_multiplier,
            steps=steps,
            epsilon=epsilon,
            population=population,
            pairs=pairs,
        )

    def set_budget(
        self, epsilon: float, *, reason: str, by: str, delta: float | None = None, unit: str | None = None
    ) -> int:
        """Set the budget of this trail's population, in an entry that says why and by whom; reports name it.

        Once a budget was set, a run that asks for more is refused; without one, a run's own configuration counts, and
        a run that names a larger epsilon than the one before raises the budget with a warning. Set it again to raise
        or lower it; what was spent stays spent::

            auditor.set_budget(8.0, reason="second study, approved by the ethics board", by="head of data")

        Args:
            epsilon: what all runs together may cost, those included that have spent already.
            reason: why, in one line that stands in the open.
            by: who decides, as they are to be named in the open.
            delta: of the bound; without it the privacy configuration's, the budget's in force, or 1e-5.
            unit: ``annotator``, ``pair`` or ``label``; without it the privacy configuration's, or the trail's.

        Returns:
            The index of the entry.

        Raises:
            ConfigError: a number out of range; no reason or no name.
            PrivacyError: the trail keeps the budget of another unit.
        """
        from rlhf_audit_nb.privacy.reservation import set_budget

        config = self.privacy_config
        if config is not None:
            delta, unit = config.delta if delta is None else delta, unit or config.unit
        return set_budget(self.trail, epsilon, reason=reason, by=by, delta=delta, unit=unit)

    # --- what is public ----------------------------------------------------------------------------------------------

    def declare_public_reward(self, reward: Any, *, reason: str, by: str) -> int:
        """Declare that a reward function, or a reward model, knows nothing of protected people.

        Under a privacy configuration a GRPOTrainer or RLOOTrainer may then be rewarded by it. It is a claim, recorded
        with a name, and nobody can check it; a function is known by its source text, so a change needs a new one::

            auditor.declare_public_reward(shorter_is_better, reason="counts characters", by="head of data")

        Args:
            reward: a plain function without a closure, or a model without an adapter.
            reason: why, in one line that stands in the open.
            by: who says so, as they are to be named in the open.

        Returns:
            The index of the entry.

        Raises:
            ConfigError: its text does not show all of it; no reason or no name.
        """
        from rlhf_audit_nb.privacy.descent import FUNCTION, MODEL
        from rlhf_audit_nb.privacy.post_processing import declare_public, digest_function

        if hasattr(reward, "state_dict"):
            from rlhf_audit_nb.capture.weights import base_tensors, digest_tensors, final_tensors

            digest = digest_tensors(final_tensors(reward))
            if digest != digest_tensors(base_tensors(reward)):
                raise _cannot_declare("An adapter says nothing of the model under it.", "Merge it into its base first.")
            return declare_public(self.trail, MODEL, type(reward).__name__, digest, reason=reason, by=by)
        known = digest_function(reward)
        if known is None:
            raise _cannot_declare(
                f"{getattr(reward, '__qualname__', type(reward).__name__)} is not a plain function whose source text "
                "shows all of it.",
                "Write it with def, in a cell or a file, without values from an outer function.",
            )
        return declare_public(self.trail, FUNCTION, reward.__qualname__, known, reason=reason, by=by)

    def declare_public_data(self, data: Any, *, reason: str, by: str) -> int:
        """Declare that a data set holds nothing of protected people; recorded as a claim by a named person.

        What a training without privacy learnt from it then stands in the lineage as public, and a private run may
        begin from the weights that it left.

        Args:
            data: the data set as the trainer holds it (``trainer.train_dataset``), or the index of the entry that
                bound it to a run.
            reason: why, in one line that stands in the open.
            by: who says so, as they are to be named in the open.

        Returns:
            The index of the entry.

        Raises:
            ConfigError: there is no such entry, or its data is private; no reason or no name.
        """
        from rlhf_audit_nb.events import DataBound, decode_body
        from rlhf_audit_nb.privacy.descent import DATA
        from rlhf_audit_nb.privacy.post_processing import declare_public

        if not isinstance(data, int):
            from rlhf_audit_nb.capture.data import digest_rows

            name = str(getattr(getattr(data, "info", None), "dataset_name", None) or "data set")
            return declare_public(self.trail, DATA, name, digest_rows(data), reason=reason, by=by)
        self.trail.flush()
        entry = next(self.trail.reader().entries(data, data + 1, type=DataBound.TYPE), None) if data >= 0 else None
        bound = decode_body(entry.type, entry.body) if entry is not None else None
        if not isinstance(bound, DataBound) or bound.digest is None:
            raise _cannot_declare(
                f"Entry {data} binds no data set whose digest stands in the open.",
                "Name the entry of a data set that a run without privacy used: `rlhf-audit lineage` shows it.",
            )
        return declare_public(self.trail, DATA, bound.source or "data set", bound.digest, reason=reason, by=by)

    # --- evaluations -------------------------------------------------------------------------------------------------

    def seal_threshold(
        self,
        metric: str,
        condition: str,
        *,
        data: Any = None,
        experiment: str | None = None,
        reason: str | None = None,
        by: str | None = None,
    ) -> int:
        """Write down what a test must reach, before it; what is evaluated later is held to it. Durable on return.

        ::

            auditor.seal_threshold("accuracy", ">= 0.7", data=held_out, experiment="reward")

        Written down again, the new one counts from then on, and both are shown with what was reached.

        Args:
            metric: what it will be called in `log_evaluation`.
            condition: ``>=``, ``<=``, ``>`` or ``<``, and a number.
            data: what it is for: a data set, a list of rows, or the digest of the rows; ``None`` for any.
            experiment: of the runs whose model it is for; ``None`` for any.
            reason: why this much, in one line that stands in the open.
            by: who says so, as they are to be named in the open.

        Returns:
            The index of the entry.

        Raises:
            ConfigError: the condition is none, the data has no rows; nothing was written.
            StoreError: the append failed.
        """
        from rlhf_audit_nb.capture.evaluation import append_threshold, known_data

        return append_threshold(
            self.trail,
            metric,
            condition,
            data=known_data(data),
            experiment=experiment,
            reason=reason,
            by=by,
            protects=self.privacy_config is not None,
        )

    def log_evaluation(
        self,
        metrics: Mapping[str, Any],
        *,
        model: Any,
        data: Any = None,
        experiment: str | None = None,
        evaluator: str | None = None,
        seeds: Sequence[int] = (),
        samples: int | None = None,
    ) -> LoggedEvaluation:
        """Write down what a test of a model found. Durable on return.

        Which model that was, the trail says by digests; `evaluations` holds the figures to the thresholds that were
        sealed before. On a trail that protects people, figures stand in the open only where the data was declared to
        hold nothing of them (`declare_public_data`); else they go to the vault::

            auditor.log_evaluation({"accuracy": 0.71}, model=trainer.model, data=held_out, evaluator="lm-eval 0.4.9")

        Args:
            metrics: figures by name; NaN is recorded and reaches no threshold.
            model: the model, the folder that it was saved in, or a digest (of its weights, or of that folder).
            data: what it was tested on: a data set, a list of rows, or the digest of the rows; ``None``: not stated.
            experiment: whose model it is said to be; the assessment says whether that is so.
            evaluator: the tool, with its version.
            seeds: those that the test was run with.
            samples: how many were tested; without it the number of rows.

        Raises:
            ConfigError: an argument cannot stand; nothing was written.
            DataError: the data was declared public, and a private run of this trail read it; nothing was written.
            VaultError: what private runs read cannot be looked up; nothing was written.
            StoreError: the append failed.
        """
        from rlhf_audit_nb.capture.evaluation import append_evaluation, known_data
        from rlhf_audit_nb.privatiser import protected_digests

        return append_evaluation(
            self.trail,
            metrics,
            model=model,
            data=known_data(data),
            experiment=experiment,
            evaluator=evaluator,
            seeds=seeds,
            samples=samples,
            protects=self.privacy_config is not None,
            protected=frozenset(protected_digests(self.trail)) if data is not None else frozenset(),
        )

    def evaluations(self) -> EvaluationsView:
        """Every evaluation of the verified trail, held to the thresholds that were sealed for it.

        Raises:
            AuditError: there is no trail to verify.
        """
        from rlhf_audit_nb.compliance.thresholds import evaluations
        from rlhf_audit_nb.reports.evaluations import EvaluationsView

        evidence = self._evidence(None)
        return EvaluationsView(evaluations(evidence), evidence.level)

    def declare_base_compute(
        self, model: str, *, flop: float | None = None, systemic: bool = False, source: str, by: str
    ) -> int:
        """State the training compute of the model that this trail's trainings began with; the entry's index.

        Args:
            model: the model's name.
            flop: its cumulative training compute; ``None`` where only ``systemic`` is stated.
            systemic: whether it is a general-purpose model with systemic risk.
            source: where that is from.
            by: who states it.

        Raises:
            ConfigError: the figure is no number of operations, or a text is empty.
        """
        from rlhf_audit_nb.capture.compute_claims import base_compute

        event = base_compute(model, flop=flop, systemic=systemic, source=source, by=by)
        return self.trail.append(event.TYPE, encode_body(event)).wait()

    def privacy_check(
        self,
        *,
        noise_multiplier: float | None = None,
        sampling_rate: float | None = None,
        steps: int = 24,
        delta: float | None = None,
        record: bool = False,
    ) -> SelfAudit:
        """Test the installed privacy mechanism on phantom annotators: seconds, no data, no model of yours.

        Args:
            noise_multiplier: sigma; without it the privacy configuration's, or 1.
            sampling_rate: q; without it the privacy configuration's, or 0.1.
            steps: of the part that is attacked with canaries.
            delta: of the epsilons; without it the privacy configuration's, or 1e-5.
            record: append what was found to the trail; reports show the last one.

        Raises:
            ConfigError: a number out of range.
            PrivacyError: the phantoms could not be trained on at all.
            StoreError: the append failed.
        """
        from rlhf_audit_nb.capture.telemetry import no_telemetry
        from rlhf_audit_nb.privacy.self_audit import check_mechanism

        given: dict[str, Any] = {
            name: getattr(self.privacy_config, name, None) if value is None else value
            for name, value in (
                ("noise_multiplier", noise_multiplier),
                ("sampling_rate", sampling_rate),
                ("delta", delta),
            )
        }
        given = {name: value for name, value in given.items() if value is not None}
        with no_telemetry():
            audit = check_mechanism(steps=steps, **given)
        if record:
            event = audit.event()
            self.trail.append(event.TYPE, encode_body(event)).wait()
        return audit

    # --- what people read --------------------------------------------------------------------------------------------

    def generate_compliance_report(self, format: str = "html", record: Path | str | None = None) -> Any:  # noqa: A002
        """The compliance report over the verified trail, or over a record.

        Args:
            format: what ``save`` writes where the file's name does not say: ``html``, ``pdf`` or ``json``. Saving is
                recorded in the trail, by the digest of what was written.
            record: an executed notebook that was sealed; ``None`` reports on this trail.

        Raises:
            ReportError: the format is not known, or the report cannot be made.
            RecordError: the record cannot be read.
        """
        from rlhf_audit_nb.reports import build_compliance_report

        evidence = self._evidence(record)
        report = build_compliance_report(evidence, self.compliance_mode, format=format)
        if record is None and evidence.trusted:
            self._record_saves(report, ReportCreated, evidence.verdict)
        return report

    def generate_model_card(
        self,
        include_provenance: bool = True,  # noqa: FBT001, FBT002  the guide's own call
        format: str = "eu_standard",  # noqa: A002
        record: Path | str | None = None,
    ) -> Any:
        """The model card over the verified trail, or over a record.

        Args:
            include_provenance: with the lineage: base model, data, digests, and the entries that show them.
            format: ``eu_standard`` or ``huggingface``.
            record: an executed notebook that was sealed; ``None`` describes this trail's last run.

        Raises:
            ReportError: the format is not known, or the card cannot be made.
        """
        from rlhf_audit_nb.cards import build_card

        evidence = self._evidence(record)
        card = build_card(evidence, format, include_provenance=include_provenance)
        if record is None and evidence.trusted:
            self._record_saves(card, CardCreated, evidence.verdict)
        return card

    def lineage(self, *, join: bool = False) -> LineageView:
        """Which data and models went into which training, what came out, and with what ε: over the verified trail.

        It shows itself in a notebook; ``save("lineage.svg")`` writes the picture, ``save("lineage.json")`` PROV-JSON.

        Args:
            join: also recognise private data sets that are the same, through the vault. That they are is a function of
                private data: keep such a graph to yourself.

        Raises:
            AuditError: there is no trail to verify; with ``join`` also where the vault cannot be opened.
        """
        from rlhf_audit_nb.compliance.lineage import lineage
        from rlhf_audit_nb.privatiser import private_halves
        from rlhf_audit_nb.reports.lineage import LineageView

        evidence = self._evidence(None)
        digests = {index: half.digest for index, _, half in private_halves(self.trail) if half.digest} if join else None
        return LineageView(lineage(evidence, digests), evidence.level)

    def compute(self, *, base_flop: float | None = None, systemic: bool = False) -> ComputeView:
        """What every training on the trail computed, and the one-third rule over its lineage.

        Args:
            base_flop: the training compute of the base, where you state it here; else what the trail declares.
            systemic: whether that base is a model with systemic risk.

        Raises:
            AuditError: there is no trail to verify.
        """
        from rlhf_audit_nb.compliance.compute import compute_ledger
        from rlhf_audit_nb.reports.compute import ComputeView

        evidence = self._evidence(None)
        return ComputeView(compute_ledger(evidence, base_flop=base_flop, systemic=systemic), evidence.level)

    def _record_saves(self, made: Any, kind: type[ReportCreated | CardCreated], verdict: Verdict) -> None:
        """What is saved from here on is recorded in the trail that it was drawn from: its bytes' digest."""
        save = made.save

        def save_and_record(path: Path | str) -> Path:
            target = Path(save(path))
            event = kind(
                format=target.suffix.lstrip(".") if kind is ReportCreated and target.suffix else made.format,
                digest=hashlib.sha256(target.read_bytes()).hexdigest(),
                size=verdict.size,
                root=verdict.root,
            )
            self.trail.append(event.TYPE, encode_body(event)).wait()
            return target

        made.save = functools.wraps(save)(save_and_record)

    def _evidence(self, record: Path | str | None) -> Any:
        from rlhf_audit_nb.compliance import Evidence

        if record is not None:
            from rlhf_audit_nb.records import open_record

            return Evidence.from_record(open_record(record))
        self.trail.flush()
        return Evidence.from_trail(self.trail.location)

    # --- how it shows ------------------------------------------------------------------------------------------------

    def closing_line(self, run: Run, verdict: Verdict | None = None) -> str:
        """One line for the end of a cell: experiment, steps, what privacy cost, entries, level.

        ``verdict`` is one that was made after the run was closed; without it the trail is verified now.
        """
        try:
            verdict = verdict or self.verify()
        except AuditError as error:
            return f"{run.summary()} · not verified: {error}"
        entries = next((item.entries for item in verdict.runs if item.run == run.id), 0)
        return f"{run.summary()} · {entries} entries · {verdict.level.name}"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {
            "model_name": self.model_name,
            "privacy_config": self.privacy_config.to_dict() if self.privacy_config is not None else None,
            "compliance_mode": self.compliance_mode,
            "audit_config": self.audit_config.to_dict(),
        }

    def _privacy_words(self) -> str:
        privacy = self.privacy_config
        if privacy is None:
            return "no differential privacy"
        return f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g}, unit {privacy.unit}, {privacy.adjacency}"

    def __repr__(self) -> str:
        return f"<AuditableRLHF {self._privacy_words()}, trail {self.audit_config.trail_location().name}>"

    def _repr_html_(self) -> str:
        rows = {
            "model": self.model_name or "not declared",
            "privacy": self._privacy_words(),
            "compliance mode": self.compliance_mode,
            "trail": self.audit_config.trail_location().name,  # a notebook is passed on; whose folder it was is not
        }
        return _table("AuditableRLHF", rows)


def _cannot_declare(why: str, instead: str) -> ConfigError:
    return ConfigError(f"This cannot be declared public. {why}", next_step=instead, code="declare-public")


def _privatiser(config: PrivacyConfig, trail: Trail) -> TrailPrivatiser:
    if config.unit == "label":
        from rlhf_audit_nb.labelling import LabelPrivatiser

        return LabelPrivatiser(config, trail)
    from rlhf_audit_nb.privatiser import TrailPrivatiser

    return TrailPrivatiser(config, trail)


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


# --- what is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a trail stands."""

    origin: str
    location: str
    size: int
    root: str
    signer: str
    unsynced: int

    @classmethod
    def of(cls, trail: Trail) -> Status:
        """The status of an open trail."""
        import base64

        status = trail.status()
        return cls(
            origin=trail.origin,
            location=str(trail.location),
            size=status.size,
            root=base64.b64encode(status.root).decode(),
            signer=status.signer,
            unsynced=status.unsynced,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def save(self, path: Path | str) -> Path:
        """Write the fields as JSON."""
        return _save_json(self.to_dict(), path)

    def __str__(self) -> str:
        return f"Trail {self.origin}: {self.size} entries, root {self.root}"

    __repr__ = __str__  # without the folder: a notebook is passed on

    def _repr_html_(self) -> str:
        return _table(
            "Trail", {"origin": self.origin, "entries": self.size, "root": self.root, "signed by": self.signer}
        )


def _save_json(values: dict[str, Any], path: Path | str) -> Path:
    target = Path(path)
    target.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def _table(title: str, rows: dict[str, Any]) -> str:
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"


def _known_mode(mode: object) -> str:
    from rlhf_audit_nb.compliance.framework import MODES

    if mode not in MODES:
        wanted = " or ".join(f'"{name}"' for name in MODES)
        raise ConfigError(
            f"compliance_mode is {mode!r}, which is not known.",
            next_step=f"Write {wanted}.",
            code="compliance_mode",
        )
    return str(mode)


# --- one trail, opened once ------------------------------------------------------------------------------------------

_trails: dict[Path, Trail] = {}
_openers: dict[Path, int] = {}
"""In which process each was opened: a child that was forked later has a copy of it."""
_lock = threading.Lock()


def _shared_trail(config: AuditConfig) -> Trail:
    from rlhf_audit_nb.capture.ranks import find_place, silent_trail
    from rlhf_audit_nb.trail import Trail

    location = config.trail_location().absolute()
    replaying = bool(os.environ.get(ENV_REPLAY))  # then the trail is the replay's own, whatever the code calls it
    origin = None if replaying else config.origin
    place = find_place()
    with _lock:
        trail = _trails.get(location)
        if place is not None and not place.writes and (trail is None or _openers[location] != os.getpid()):
            return silent_trail(place)
        if trail is not None and not location.is_dir():
            # The folder was deleted under us: what is still open there is nobody's trail any more.
            _close(_trails.pop(location))
            trail = None
        if trail is None:
            trail = Trail.open(
                location,
                origin=origin,
                durability=config.durability,
                asynchronous=config.asynchronous,
                create=not replaying,
            )
            _trails[location], _openers[location] = trail, os.getpid()
    if origin not in (None, trail.origin):
        raise StoreError(
            f"The trail {config.trail_location()} is {trail.origin}, not {origin}.",
            next_step="Leave the origin out, or name another folder for a new trail.",
            code="origin",
        )
    return trail


def _close(trail: Trail) -> None:
    with suppress(AuditError):
        trail.close()
