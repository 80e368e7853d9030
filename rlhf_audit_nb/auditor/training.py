"""Audited training: runs, loops by hand, replays. Floor 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.auditor.base import AuditorBase
from rlhf_audit_nb.errors import RunError

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.cells import CellContext
    from rlhf_audit_nb.capture.run import Run
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.events import CheckpointRecorded
    from rlhf_audit_nb.privatiser import TrailPrivatiser
    from rlhf_audit_nb.replaying import Replay
    from rlhf_audit_nb.sweeping import SweepResult
    from rlhf_audit_nb.trail import Trail, TrustPolicy

__all__ = ["Training"]


class Training(AuditorBase):
    """Audited training: runs, loops by hand, replays."""

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

    def sweep(
        self,
        notebook: Path | str,
        grid: Path | str,
        out: Path | str | None = None,
        *,
        workers: int | None = None,
        cluster: str | None = None,
        retries: int = 1,
        resume: bool = False,
    ) -> SweepResult:
        """Run a notebook once for each point of a grid, each into a record on this auditor's trail.

        ::

            auditor.sweep("train.ipynb", "grid.yaml", "sweep")

        Arguments and errors as of `rlhf_audit_nb.sweeping.run_sweep`; calling it again does what is missing.
        """
        from rlhf_audit_nb.sweeping import run_sweep

        return run_sweep(
            notebook,
            grid,
            out,
            trail=self.audit_config.trail_location(),
            workers=workers,
            cluster=cluster,
            retries=retries,
            resume=resume,
        )


def _privatiser(config: PrivacyConfig, trail: Trail) -> TrailPrivatiser:
    if config.unit == "label":
        from rlhf_audit_nb.labelling import LabelPrivatiser

        return LabelPrivatiser(config, trail)
    from rlhf_audit_nb.privatiser import TrailPrivatiser

    return TrailPrivatiser(config, trail)
