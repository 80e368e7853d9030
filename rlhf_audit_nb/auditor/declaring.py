"""What a named person declares: budgets, what is public, thresholds, results of tests. Floor 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.auditor.base import AuditorBase
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import encode_body

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.evaluation import LoggedEvaluation

__all__ = ["Declaring"]


class Declaring(AuditorBase):
    """What a named person declares: budgets, what is public, thresholds, results of tests."""

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


def _cannot_declare(why: str, instead: str) -> ConfigError:
    return ConfigError(f"This cannot be declared public. {why}", next_step=instead, code="declare-public")
