"""Check: ``verify`` of a folder of weights. Floor 6."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.cli.shared import WIDTH, finish, read_policy
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.weights import WeightsVerdict

__all__ = ["is_weights", "verify_weights"]

MOST_LINES = 20


def is_weights(target: str) -> bool:
    """Whether a target is a folder of weights and not a trail's."""
    from rlhf_audit_nb.capture.folders import holds_weights
    from rlhf_audit_nb.trail.published import is_published

    path = Path(target)
    if is_published(target) or not path.is_dir() or (path / "trail.sqlite").exists():
        return False
    return holds_weights(path)


def verify_weights(args: argparse.Namespace) -> int:
    """Check the folder that was named against the trail, published trail or record that ``--trail`` names."""
    from rlhf_audit_nb.compliance.weights import check_weights
    from rlhf_audit_nb.reports.sources import evidence_of
    from rlhf_audit_nb.trail import Level

    folder, source = Path(args.target), _source(args)
    artifacts = Path(source) / "artifacts"
    evidence = evidence_of(source, read_policy(args))
    verdict = check_weights(folder, evidence, artifacts=artifacts if artifacts.is_dir() else None)
    require = Level[args.require] if args.require else None
    code = verdict.exit_code(require)
    words = _words(verdict)
    if require is not None and code and not verdict.reasons:
        words.append(f"  Required was {require.name}: refused.")
    return finish(args, verdict.to_dict(), words, code)


def _source(args: argparse.Namespace) -> str:
    """What was named, else the usual trail, else the one that lies beside the folder."""
    from rlhf_audit_nb.config import DEFAULT_TRAIL, AuditConfig

    if args.trail:
        return str(args.trail)
    usual = AuditConfig().trail_location()
    places = [usual, *(parent / DEFAULT_TRAIL for parent in list(Path(args.target).resolve().parents)[:2])]
    found = next((place for place in places if (place / "trail.sqlite").is_file()), None)
    if found is None:
        raise ConfigError(
            f"{args.target} is a folder of weights, and there is no trail at {usual} to check it against.",
            next_step="Name the trail (its folder, a published one or a record) with --trail.",
            code="no-trail",
        )
    return str(found)


def _words(verdict: WeightsVerdict) -> list[str]:
    from rlhf_audit_nb.compliance.words import level_words, short, visible

    said = level_words(verdict.level.name)
    lines = [f"{verdict.level.name}  {visible(verdict.words)}"]
    told = [visible(text) for text in (*verdict.reason_words, *verdict.notes)]
    left = len(told) - MOST_LINES
    lines += [part for text in told[:MOST_LINES] for part in _wrapped(text)]
    if left > 0:
        lines.append(f"  … and {left:,} more (--json gives them all)")
    trail = verdict.trail
    for reason in trail.reasons:
        lines += _wrapped(
            f"{'worth knowing: ' if reason.advisory else ''}{reason.where}: {reason.message} [{reason.code}]"
        )
    if trail.size:
        lines.append(f"  {trail.origin}: {trail.size:,} entries, root {short(trail.root)}, {trail.level.name}")
    if not verdict.reasons:
        lines += textwrap.wrap(said.shows, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return [*lines, *textwrap.wrap(verdict.not_shown, WIDTH, initial_indent="  ", subsequent_indent="  ")]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
