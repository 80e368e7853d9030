"""What people read: reports, cards, lineage, compute, evaluations, samples. Floor 5."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.auditor.base import AuditorBase
from rlhf_audit_nb.events import (
    CardCreated,
    ReportCreated,
    encode_body,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.completions import OpenedSamples
    from rlhf_audit_nb.reports.compute import ComputeView
    from rlhf_audit_nb.reports.evaluations import EvaluationsView
    from rlhf_audit_nb.reports.lineage import LineageView
    from rlhf_audit_nb.trail import TrustPolicy, Verdict

__all__ = ["Reading"]


class Reading(AuditorBase):
    """What people read: reports, cards, lineage, compute, evaluations, samples."""

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

    def evaluations(self) -> EvaluationsView:
        """Every evaluation of the verified trail, held to the thresholds that were sealed for it.

        Raises:
            AuditError: there is no trail to verify.
        """
        from rlhf_audit_nb.compliance.thresholds import evaluations
        from rlhf_audit_nb.reports.evaluations import EvaluationsView

        evidence = self._evidence(None)
        return EvaluationsView(evaluations(evidence), evidence.level)

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

    def bundle(
        self,
        record: Path | str,
        path: Path | str,
        *,
        policy: TrustPolicy | None = None,
        trail: Path | str | None = None,
    ) -> Path:
        """Writes a record as one folder or zip for people without this package, with a page that shows how to check it.

        Args:
            record: an executed notebook that was sealed.
            path: a new or empty folder, or a file that ends in ``.zip``.
            policy: whom to trust; ``None`` trusts the user's own keys.
            trail: the record's trail, for its tiles; ``None`` looks beside the record and in the usual place.

        Raises:
            RecordError: the record does not hold, or cannot be read.
            ReportError: the bundle cannot be written.
        """
        from rlhf_audit_nb.reports.record_bundle import bundle_record

        return bundle_record(record, policy=policy, trail=trail).save(path)

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
