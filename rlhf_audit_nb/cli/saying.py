"""Say: ``report``, ``card``, ``lineage`` and ``evaluations``. Floor 6."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.checking import add_target
from rlhf_audit_nb.cli.gating import names_gate_policy
from rlhf_audit_nb.cli.shared import (
    Command,
    Parser,
    beside,
    finish,
    is_record,
    note,
    output,
    read_policy,
    wrapped,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.trail import TrustPolicy

__all__ = ["COMMANDS"]

REFUSED = 3
ALSO = "or a gate's policy (YAML): whom it trusts, and who its people are"


def _evidence(args: argparse.Namespace) -> Evidence:
    """What is drawn; a policy for records and gates also says whose signatures count."""
    if not names_gate_policy(args):
        return _drawn(args.target, read_policy(args))
    from rlhf_audit_nb.gate import load_policy

    policy = load_policy(args.policy)
    return replace(_drawn(args.target, policy.trust), people=policy.people)


def _drawn(target: str, policy: TrustPolicy | None) -> Evidence:
    from rlhf_audit_nb.compliance.evidence import Evidence

    if is_record(target):
        from rlhf_audit_nb.records import open_record

        return Evidence.from_record(open_record(Path(target), policy=policy))
    return Evidence.from_trail(Path(target), policy=policy)


def _do_report(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.reports import build_compliance_report

    path = output(args, beside(args.target, f".{args.format}"))
    evidence = _evidence(args)
    build_compliance_report(evidence, args.mode).save(path)
    answer = {"report": str(path), "format": args.format, "level": evidence.level}
    return _finish_saying(args, answer, [f"report   {path} ({evidence.level})"], evidence)


def _do_card(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.cards import build_card

    evidence = _evidence(args)
    card = build_card(evidence, args.format)
    if args.out is None:
        return _finish_saying(args, card.to_dict(), card.text.splitlines(), evidence)
    path = output(args, Path(args.out))
    card.save(path)
    answer = {"card": str(path), "format": args.format, "level": evidence.level}
    return _finish_saying(args, answer, [f"card     {path} ({evidence.level})"], evidence)


def _do_lineage(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.compliance.lineage import lineage
    from rlhf_audit_nb.reports.lineage import LineageView

    evidence = _evidence(args)
    view = LineageView(lineage(evidence), evidence.level)
    said = [line for text in str(view).splitlines() for line in wrapped(text)]
    if args.out is not None:
        path = view.save(output(args, Path(args.out)))
        said = [f"lineage  {path} ({evidence.level})"]
    return _finish_saying(args, view.to_dict(), said, evidence)


def _do_evaluations(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.compliance.thresholds import evaluations
    from rlhf_audit_nb.reports.evaluations import EvaluationsView

    evidence = _evidence(args)
    view = EvaluationsView(evaluations(evidence), evidence.level)
    said = [line for text in str(view).splitlines() for line in wrapped(text)]
    if args.out is not None:
        path = view.save(output(args, Path(args.out)))
        said = [f"evaluations  {path} ({evidence.level})"]
    code = _finish_saying(args, view.to_dict(), said, evidence)
    if code == 0 and args.require_passed and not view.passed:
        note("Not every threshold was set before and reached.")
        return REFUSED
    return code


def _finish_saying(args: argparse.Namespace, result: dict[str, Any], words: Sequence[str], evidence: Evidence) -> int:
    """Ends what is said of a trail: written all the same, but INVALID or DIVERGED does not end as a success."""
    from rlhf_audit_nb.trail import Level

    code = finish(args, result, words, evidence.verdict.exit_code(Level.UNANCHORED))
    if not evidence.trusted:
        note(f"The verdict is {evidence.level}: it is written, but nothing in it is evidence.")
    return code


def _add_report(parser: Parser) -> None:
    parser.set_defaults(do=_do_report)
    add_target(parser, also=ALSO)
    parser.add_argument("--format", choices=("html", "pdf", "json"), default="html")
    parser.add_argument("--mode", default="eu_ai_act", metavar="FRAMEWORK", help="what it assesses against (eu_ai_act)")
    parser.add_argument("-o", "--out", metavar="FILE", help="where it goes (beside the target)")


def _add_card(parser: Parser) -> None:
    parser.set_defaults(do=_do_card)
    add_target(parser, also=ALSO)
    parser.add_argument(
        "--format", default="eu_standard", metavar="FORMAT", help="eu_standard, huggingface or json (eu_standard)"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="where it goes (stdout)")


def _add_lineage(parser: Parser) -> None:
    parser.set_defaults(do=_do_lineage)
    add_target(parser, also=ALSO)
    parser.add_argument("-o", "--out", metavar="FILE", help="a picture (.svg) or W3C PROV-JSON (.json); else sentences")


def _add_evaluations(parser: Parser) -> None:
    parser.set_defaults(do=_do_evaluations)
    add_target(parser, also=ALSO)
    parser.add_argument(
        "--require-passed", action="store_true", help="exit with 3 unless each threshold was set before and reached"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="all of it as JSON; else sentences")


COMMANDS = (
    Command("say", "report", "write the compliance report of a record or a trail (HTML, PDF or JSON)", _add_report),
    Command("say", "card", "write the model card", _add_card),
    Command("say", "lineage", "which data and models went into which, and with what ε", _add_lineage),
    Command("say", "evaluations", "what was tested, and against which thresholds set before", _add_evaluations),
)
