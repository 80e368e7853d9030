"""Whether it holds, and what is left: models, health, overhead, budgets, the mechanism. Floor 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.auditor.base import AuditorBase
from rlhf_audit_nb.auditor.trails import trail_if_open
from rlhf_audit_nb.events import encode_body
from rlhf_audit_nb.trail.home import home_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.capture.overhead import RunOverhead
    from rlhf_audit_nb.compliance.weights import WeightsVerdict
    from rlhf_audit_nb.gate import Decision
    from rlhf_audit_nb.health import Examination
    from rlhf_audit_nb.privacy.self_audit import SelfAudit
    from rlhf_audit_nb.records.reproduce import Reproduction
    from rlhf_audit_nb.records.reproduce_environment import FreshEnvironment
    from rlhf_audit_nb.records.signatures import Attestation
    from rlhf_audit_nb.reports.budget import Budget, BudgetLeft
    from rlhf_audit_nb.reports.diff import DiffView
    from rlhf_audit_nb.trail import TrustPolicy

__all__ = ["Checking"]


class Checking(AuditorBase):
    """Whether it holds, and what is left: models, health, overhead, budgets, the mechanism."""

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

    def gate(
        self,
        folder: Path | str,
        policy: Path | str,
        *,
        records: Sequence[Path | str] = (),
        trail: Path | str | None = None,
        record_decision: bool = False,
    ) -> Decision:
        """Whether a model may be used: its record is found, verified and held to a policy; ``.passed`` is the answer.

        Nothing is raised where it may not; ``.unmet`` says why::

            decision = auditor.gate("out/model", "policy.yaml")
            assert decision.passed, decision

        Args:
            folder: the model that is to be used.
            policy: the policy's file; ``rlhf-audit gate --example`` prints one.
            records: records, and folders that are looked through with all below them.
            trail: the model's trail; ``None`` takes this auditor's own, or the one beside the model, where the policy
                trusts its log.
            record_decision: append what was decided to this auditor's trail.

        Raises:
            ConfigError: the policy is none, or there are no weights in that folder.
            AuditError: the trail cannot be read; with ``record_decision`` also where it cannot be written.
        """
        from rlhf_audit_nb.gate import append_decision, gate, load_policy, trail_beside

        asked = load_policy(policy)
        opened = trail_if_open(self.audit_config)
        if opened is not None:
            opened.flush()
        place = trail or trail_beside(Path(folder), asked, [self.audit_config.trail_location()])
        decision = gate(folder, asked, records=records, trail=place)
        if record_decision:
            append_decision(self.trail, decision)
        return decision

    def attest(
        self,
        record: Path | str,
        *,
        role: str,
        statement: str,
        name: str | None = None,
        reject: bool = False,
        meaning: str | None = None,
        purpose: str | None = None,
        key: Path | str | None = None,
        passphrase: str | None = None,
        policy: TrustPolicy | None = None,
    ) -> Attestation:
        """Sign a record as a person, and enter that into this trail, where the record is this trail's.

        Whoever holds a kernel can read what is typed into it: sign in a process of your own, not where a training runs.

        Args:
            record: an executed notebook that was sealed.
            role: in which you sign, such as ``compliance officer``.
            statement: what you have looked at and what you decide, in words.
            name: your printed name; ``None`` takes that of the key.
            reject: refuse it.
            meaning: ``approved`` (where nothing is said), ``reviewed``, ``responsible``, ``authored`` or ``withdrawn``.
            purpose: the use that you speak of; ``None``: any.
            key: the name of a person whose key lies in the home folder, or a PEM file; ``None`` takes the only one.
            passphrase: of that key; ``None`` takes ``RLHF_AUDIT_PERSON_PASSPHRASE``.
            policy: whom to trust for the record; ``None`` trusts the user's own keys.

        Raises:
            ConfigError: a text cannot stand, or it is not said who signs.
            KeyFileError: the key cannot be used, or is one of a trail's.
            RecordError: the record does not hold, or cannot be written; nothing was signed.
        """
        from rlhf_audit_nb.records import open_record
        from rlhf_audit_nb.records.attesting import (
            attest_record,
            attestations_of,
            carry_to_copy,
            enter_attestations,
            meaning_of,
            trail_of,
        )
        from rlhf_audit_nb.trail.people import choose_person_key

        chosen = choose_person_key(home_folder(), None if key is None else str(key), name)
        item = attest_record(
            record,
            chosen.open(passphrase),
            name=chosen.name,
            role=role,
            statement=statement,
            meaning=meaning_of(meaning, reject=reject),
            purpose=purpose,
            policy=policy,
        )
        opened, mine = open_record(record, policy=policy), self.audit_config.trail_location()
        if trail_of(opened, record, mine) != mine:
            return item
        entered = enter_attestations(self.trail, opened, policy=policy)
        carry_to_copy(mine, opened, policy=policy)
        return next(one for one in attestations_of(opened, entered) if one.index == item.index)

    def diff(
        self,
        left: Path | str,
        right: Path | str,
        *,
        outputs: bool = False,
        claimed: bool = False,
        policy: TrustPolicy | None = None,
    ) -> DiffView:
        """What differs between two records, both verified first; ``save("diff.html")`` writes a page.

        Args:
            left: an executed notebook that was sealed.
            right: another.
            outputs: also what the cells gave out.
            claimed: compare also what does not verify, as what it claims.
            policy: whom to trust; ``None`` trusts the user's own keys.

        Raises:
            RecordError: a file cannot be read, or is no notebook; or it does not verify and ``claimed`` is not set.
        """
        from rlhf_audit_nb.records.diff import diff_records
        from rlhf_audit_nb.reports.diff import DiffView

        return DiffView(diff_records(left, right, policy=policy, outputs=outputs, claimed=claimed))

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
        opened = trail_if_open(self.audit_config)
        return examine(location, full=full, policy=policy, published=published, trail=opened)

    def reproduce(
        self,
        record: Path | str,
        *,
        opening: Path | str | Sequence[Path | str] = (),
        policy: TrustPolicy | None = None,
        files: Sequence[Path | str] = (),
        cwd: Path | str | None = None,
        output: Path | str | None = None,
        tolerance: Mapping[str, float | str] | None = None,
        normalise: Path | str | None = None,
        threads: int | None = None,
        fresh: FreshEnvironment | None = None,
        add: bool = True,
    ) -> Reproduction:
        """Run a record's notebook again, compare it with what the record holds, and keep the result on this trail.

        Nothing is spent: private training is repeated from its opened seeds, or refused. Seeds that no file opens come
        from this auditor's own vault, where the record is of this trail.

        Args:
            record: the record; its code is run.
            opening: the files of its seeds, as ``disclose`` wrote them.
            policy: whom to trust; ``None`` trusts the user's own keys.
            files: files and folders that the notebook reads, copied into its scratch folder.
            cwd: run there instead; what it writes stays there.
            output: where the notebook that ran again is left.
            tolerance: what may differ: ``{"metrics": 1e-6, "outputs": 1e-6, "weights": "any"}``; ``None`` is nothing.
            normalise: a file of regular expressions for outputs.
            threads: for the arithmetic; ``None`` takes as many as there were.
            fresh: an environment (`rlhf_audit_nb.records.reproduce_environment.make_environment`).
            add: whether the record gets the result too, signed by this trail's key.

        Raises:
            RecordError: it cannot be read, does not hold, cannot be run again, or a cell raised that had not.
            ConfigError: a tolerance or a rule that is none.
            StoreError: the result cannot be written.
        """
        from rlhf_audit_nb.records.reproduce import read_tolerance, reproduce_record
        from rlhf_audit_nb.records.reproduce_keeping import keep_reproduction

        result = reproduce_record(
            record,
            [opening] if isinstance(opening, str | Path) else opening,
            policy=policy,
            trail=self.trail,
            files=files,
            cwd=cwd,
            output=output,
            tolerance=read_tolerance([f"{name}={value}" for name, value in (tolerance or {}).items()]),
            rules=normalise,
            threads=threads,
            fresh=fresh,
        )
        keep_reproduction(result, record, self.trail, add=add, policy=policy)
        return result

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
