"""An examination as OpenTelemetry metrics. Floor 4.

The library is an extra (``pip install "rlhf-audit-trail[otel]"``), where the figures go is the user's own set-up, and
without it nothing is sent anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_audit_nb import __version__
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.health.finding import Examination

__all__ = ["GAUGES", "export_metrics"]

GAUGES = {
    "rlhf_audit.entries": ("{entry}", "entries of the trail"),
    "rlhf_audit.unsynced": ("{entry}", "entries that this process handed in and that are not on the disk yet"),
    "rlhf_audit.open_runs": ("{run}", "runs that go on"),
    "rlhf_audit.dead_runs": ("{run}", "runs without an end whose process is gone"),
    "rlhf_audit.epsilon_spent": ("1", "epsilon spent at most by settled trainings"),
    "rlhf_audit.epsilon_budget": ("1", "the budget of epsilon in force"),
    "rlhf_audit.checks_warned": ("{check}", "checks that deserve a look"),
    "rlhf_audit.checks_failed": ("{check}", "checks that failed"),
}
"""Every gauge: its unit and what it counts. What could not be found out is not reported."""

_FACTS = {
    "rlhf_audit.entries": ("trail", "entries"),
    "rlhf_audit.unsynced": ("writers", "unsynced"),
    "rlhf_audit.open_runs": ("runs", "open"),
    "rlhf_audit.dead_runs": ("runs", "dead"),
    "rlhf_audit.epsilon_spent": ("budget", "epsilon_spent"),
    "rlhf_audit.epsilon_budget": ("budget", "epsilon_budget"),
}


def export_metrics(examination: Examination, provider: Any = None) -> dict[str, float]:
    """Set the gauges, each with the attribute ``rlhf_audit.origin``, and flush.

    Args:
        examination: what was found.
        provider: the SDK's ``MeterProvider`` to report to; ``None`` takes the one that the process has set up.

    Returns:
        What was reported, by gauge.

    Raises:
        ConfigError: OpenTelemetry is not installed, or nobody would get the figures.
    """
    try:
        from opentelemetry import metrics
    except ImportError as error:
        raise ConfigError(
            "OpenTelemetry is not installed.", next_step='Run pip install "rlhf-audit-trail[otel]".', code="otel"
        ) from error
    chosen = provider or metrics.get_meter_provider()
    flush = getattr(chosen, "force_flush", None)
    if flush is None:
        raise ConfigError(
            "No OpenTelemetry SDK is set up in this process, so nobody would get the metrics.",
            next_step="Run `opentelemetry-instrument rlhf-audit doctor --otel`, or hand a MeterProvider to "
            "auditor.doctor().export_metrics(provider).",
            code="otel",
        )
    meter = chosen.get_meter("rlhf_audit_nb", __version__)
    values = _values(examination)
    for name, value in values.items():
        unit, description = GAUGES[name]
        gauge = meter.create_gauge(name, unit=unit, description=description)
        gauge.set(value, {"rlhf_audit.origin": examination.origin})
    flush()
    return values


def _values(examination: Examination) -> dict[str, float]:
    found = {name: examination[check].facts.get(fact) for name, (check, fact) in _FACTS.items()}
    for status, name in (("warn", "rlhf_audit.checks_warned"), ("fail", "rlhf_audit.checks_failed")):
        found[name] = sum(finding.status == status for finding in examination.findings)
    return {name: value for name, value in found.items() if value is not None}
