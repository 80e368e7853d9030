"""What a doctor found: one finding for each check, and all of them together. Floor 4."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal, get_args

__all__ = ["STATUSES", "Examination", "Finding", "Findings", "Status"]

Status = Literal["ok", "warn", "fail"]
STATUSES: tuple[Status, ...] = get_args(Status)
"""The statuses, the least first."""

FAILED = 3
_WIDTH = 100
_COLORS = {"ok": "#1a7f37", "warn": "#9a6700", "fail": "#cf222e"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        check: the check's name, which does not change from version to version.
        status: ``ok``, ``warn`` (it works, and something deserves a look) or ``fail``.
        message: what was found.
        next_step: what to do; empty where there is nothing to do.
        facts: the numbers behind it, as plain values.
    """

    check: str
    status: Status
    message: str
    next_step: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the name."""
        return {
            "status": self.status,
            "message": self.message,
            "next_step": self.next_step,
            "facts": self.facts,
        }


class Findings:
    """What a check finds as it goes: of several things the worst counts, and all of that rank are told."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._said: list[tuple[Status, str, str]] = []

    def warn(self, sentence: str, next_step: str = "") -> None:
        """Something deserves a look."""
        self._said.append(("warn", sentence, next_step))

    def fail(self, sentence: str, next_step: str = "") -> None:
        """Something does not work."""
        self._said.append(("fail", sentence, next_step))

    def finding(self, check: str, otherwise: str) -> Finding:
        """All of it as one finding; ``otherwise`` is said where nothing is wrong."""
        worst: Status = max((status for status, _, _ in self._said), key=STATUSES.index, default="ok")
        told = [(sentence, step) for status, sentence, step in self._said if status == worst]
        message = " ".join(sentence for sentence, _ in told) if told else otherwise
        steps = " ".join(dict.fromkeys(step for _, step in told if step))
        return Finding(check=check, status=worst, message=message, next_step=steps, facts=self.facts)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All that was found of one trail.

    Attributes:
        origin: the trail's name; empty where it could not be read.
        time: POSIX seconds.
        findings: one for each check, always the same checks in the same order.
    """

    origin: str
    time: float
    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        """The worst of all."""
        return max((finding.status for finding in self.findings), key=STATUSES.index, default="ok")

    @property
    def exit_code(self) -> int:
        """The process status: 0 where nothing fails, else 3."""
        return FAILED if self.status == "fail" else 0

    def __getitem__(self, check: str) -> Finding:
        return next(finding for finding in self.findings if finding.check == check)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for monitoring: ``status``, ``origin``, ``time`` and ``checks`` by name."""
        return {
            "status": self.status,
            "origin": self.origin,
            "time": self.time,
            "checks": {finding.check: finding.to_dict() for finding in self.findings},
        }

    def export_metrics(self, provider: Any = None) -> dict[str, float]:
        """Report it as OpenTelemetry metrics; arguments and errors as `rlhf_audit_nb.health.metrics.export_metrics`."""
        from rlhf_audit_nb.health.metrics import export_metrics

        return export_metrics(self, provider)

    def lines(self) -> list[str]:
        """For a terminal."""
        found = []
        for finding in self.findings:
            found += textwrap.wrap(
                f"{finding.status:<5} {finding.check:<10} {finding.message}", _WIDTH, subsequent_indent=" " * 17
            )
            if finding.next_step and finding.status != "ok":
                found += textwrap.wrap(
                    f"Next step: {finding.next_step}", _WIDTH, initial_indent=" " * 17, subsequent_indent=" " * 19
                )
        return [*found, self.summary()]

    def summary(self) -> str:
        """How many of which status, in one line."""
        counts = [(status, sum(item.status == status for item in self.findings)) for status in reversed(STATUSES)]
        return ", ".join(f"{count} {status}" for status, count in counts if count)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td style="text-align:left;font-weight:600;color:{_COLORS[item.status]}">{item.status}</td>'
            f'<td style="text-align:left">{escape(item.check)}</td>'
            f'<td style="text-align:left">{escape(item.message)}'
            + (f"<br><i>{escape(item.next_step)}</i>" if item.next_step and item.status != "ok" else "")
            + "</td></tr>"
            for item in self.findings
        )
        return f"<table><caption>{escape(self.summary())}</caption>{rows}</table>"
