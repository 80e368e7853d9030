"""Say: ``compute``. Floor 6."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlhf_audit_nb.cli.checking import add_target
from rlhf_audit_nb.cli.shared import Command, Parser, finish, read_policy, wrapped
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.compute import Ledger

__all__ = ["COMMANDS"]


def _do_compute(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.capture.compute_claims import check_flop
    from rlhf_audit_nb.compliance.compute import compute_ledger
    from rlhf_audit_nb.compliance.words import level_words
    from rlhf_audit_nb.reports.sources import evidence_of

    flop = check_flop(args.base_flop) if args.base_flop is not None else None
    evidence = evidence_of(args.target, read_policy(args))
    if not level_words(evidence.level).trusted:
        raise ConfigError(
            f"{args.target} is {evidence.level}: nothing that it says of compute is evidence.",
            next_step=f"`rlhf-audit verify {args.target}` says what does not hold.",
            code="not-verified",
        )
    ledger = compute_ledger(evidence, base_flop=flop, systemic=args.systemic)
    return finish(args, {"level": evidence.level, **ledger.to_dict()}, _words(ledger, evidence.level))


def _words(ledger: Ledger, level: str) -> list[str]:
    from rlhf_audit_nb.reports.compute import compute_lines

    lines = [line for text in compute_lines(ledger) for line in wrapped(text)]
    return [*lines, f"  over a trail that is {level}"]


def _add_compute(parser: Parser) -> None:
    parser.set_defaults(do=_do_compute)
    add_target(parser)
    parser.add_argument("--base-flop", type=float, metavar="FLOP", help="what the base model's training took")
    parser.add_argument("--systemic", action="store_true", help="the base is a model with systemic risk")


COMMANDS = (Command("say", "compute", "FLOP, device hours and energy, and the one-third rule", _add_compute),)
