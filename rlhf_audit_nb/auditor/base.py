"""What all parts of an auditor share: its settings, its trail, a verdict on it, and how it shows. Floor 5."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.auditor.status import Status, table
from rlhf_audit_nb.auditor.trails import shared_trail
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import AuditError, ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.annotations import Headers
    from rlhf_audit_nb.capture.run import Run
    from rlhf_audit_nb.trail import Trail, Verdict

__all__ = ["AuditorBase"]


class AuditorBase:
    """Settings and the trail; see `rlhf_audit_nb.auditor.AuditableRLHF`."""

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

    @property
    def trail(self) -> Trail:
        """The trail, opened (and made, with its keys) when it is first asked for.

        Of several processes that train together only that of rank 0 opens it; the others get one that keeps nothing.

        Raises:
            TrailError: it cannot be opened or made.
        """
        return shared_trail(self.audit_config)

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

    def status(self) -> Status:
        """Where the trail stands: its name, size and last commit."""
        return Status.of(self.trail)

    def _evidence(self, record: Path | str | None) -> Any:
        from rlhf_audit_nb.compliance import Evidence

        if record is not None:
            from rlhf_audit_nb.records import open_record

            return Evidence.from_record(open_record(record))
        self.trail.flush()
        return Evidence.from_trail(self.trail.location)

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
        return table("AuditableRLHF", rows)


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
