"""Check: ``gate``, and ``verify`` of a record by a policy. Floor 6."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.cli.shared import Command, Parser, finish, is_bundle, is_gate_policy, note, say, wrapped
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlhf_audit_nb.gate import Decision, GatePolicy
    from rlhf_audit_nb.records import OpenedRecord

__all__ = ["COMMANDS", "names_gate_policy", "verify_by_policy"]

QUIET_SECONDS = 2.0


def names_gate_policy(args: argparse.Namespace) -> bool:
    """Whether ``--policy`` names a policy for records, and not whom to trust alone."""
    if args.policy is None:
        return False
    try:
        return is_gate_policy(Path(args.policy).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"The policy {args.policy} cannot be read: {error.strerror or error}.", next_step="Check the path."
        ) from error


def verify_by_policy(args: argparse.Namespace) -> int:
    """The verdict on a record, and whether it meets the policy."""
    from rlhf_audit_nb.gate import judge_opened, load_policy
    from rlhf_audit_nb.trail import Level

    policy = load_policy(args.policy)
    trail = args.trail or _usual_trail(args.target, policy)
    decision = judge_opened(_opened(args.target, policy, _roots(args)), args.target, policy, trail=trail)
    verdict = decision.records[0].verdict
    require = Level[args.require] if args.require else None
    code = decision.exit_code or verdict.exit_code(require)
    words = [line for text in decision.words for line in wrapped(text)]
    if require is not None and not decision.exit_code and code:
        words.append(f"  Required was {require.name}: refused.")
    return finish(args, {**verdict.to_dict(), "policy": decision.to_dict()}, words, code)


def _opened(target: str, policy: GatePolicy, roots: Sequence[bytes] | None) -> OpenedRecord:
    """The record that was named, or the one in the bundle."""
    if is_bundle(target):
        from rlhf_audit_nb.reports.bundle_reading import verify_bundle

        return verify_bundle(target, policy=policy.trust, tsa_roots=roots)
    from rlhf_audit_nb.records import open_record

    return open_record(target, policy=policy.trust, tsa_roots=roots)


def _do_gate(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.gate import example_policy, gate, load_policy, record_decision

    if args.example:
        say(example_policy().rstrip("\n"))
        return 0
    if args.policy is None:
        raise ConfigError(
            "A gate needs a policy.",
            next_step="Name it with --policy; `rlhf-audit gate --example` prints one to begin with.",
            code="usage",
        )
    policy = load_policy(args.policy)
    if args.model is None:
        return _told(args, policy)
    trail = args.trail or _usual_trail(args.model, policy)
    decision = gate(args.model, policy, records=args.records, trail=trail, tsa_roots=_roots(args), progress=_progress())
    words = [line for text in decision.words for line in wrapped(text)]
    result = decision.to_dict()
    if args.record_decision:
        result["entry"] = _record(trail, decision, record_decision)
        words.append(f"  recorded in entry {result['entry']} of the trail")
    return finish(args, result, words, decision.exit_code)


def _record(trail: str | None, decision: Decision, record: Callable[[Path, Decision], int]) -> int:
    if trail is None:
        raise ConfigError(
            "There is no trail to write the decision into.", next_step="Name it with --trail.", code="no-trail"
        )
    return record(Path(trail), decision)


def _told(args: argparse.Namespace, policy: GatePolicy) -> int:
    """What a policy asks, where no model is named."""
    from rlhf_audit_nb.gate.policy import FIELDS

    asked = [f"  asks {words}" for name, words in FIELDS.items() if name in policy.asked and name != "version"]
    left = [f"  does not ask {words}" for words in policy.not_asked]
    answer = {"asked": sorted(policy.asked), "not_asked": list(policy.not_asked), **policy.to_dict()}
    words = [f"{args.policy} is a policy. Name a model's folder to hold it to it.", *asked, *left]
    return finish(args, {**answer, "policy": policy.digest, "resolved": policy.resolved}, words)


def _roots(args: argparse.Namespace) -> Sequence[bytes] | None:
    """The timestamping authorities that ``--tsa-ca`` names; ``None`` leaves it to the home folder's."""
    if not args.tsa_ca:
        return None
    from rlhf_audit_nb.trail.home import home_folder
    from rlhf_audit_nb.trail.timestamp import trusted_authorities

    return trusted_authorities(home_folder(None), args.tsa_ca)


def _usual_trail(target: str, policy: GatePolicy) -> str | None:
    """The configured trail, or the one beside the model or record, where the policy trusts its log."""
    from rlhf_audit_nb.config import AuditConfig
    from rlhf_audit_nb.gate import trail_beside

    found = trail_beside(Path(target), policy, [AuditConfig().trail_location()])
    return str(found) if found is not None else None


def _progress() -> Callable[[int], None]:
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= QUIET_SECONDS:
            last = now
            note(f"looked at {done:,} notebooks")

    return tell


def _add_gate(parser: Parser) -> None:
    parser.set_defaults(do=_do_gate)
    parser.description = (
        "Whether a model may be used: its record is found by the model's digest, verified, and held to a policy. "
        "Exit code 0 where it may, 3 where the policy refuses, 30 or 40 where something was changed."
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL_DIR", help="the model's folder (without: the policy is told)"
    )
    parser.add_argument("--policy", metavar="FILE", help="what has to hold (YAML)")
    parser.add_argument(
        "--records", action="append", default=[], metavar="DIR|RECORD", help="where its record may be (repeatable)"
    )
    parser.add_argument(
        "--trail",
        metavar="TRAIL|URL",
        help="its trail: its kept records, and what came after (the usual one, where the policy trusts it)",
    )
    parser.add_argument(
        "--tsa-ca", action="append", metavar="FILE", help="trust this timestamping authority (PEM; may be repeated)"
    )
    parser.add_argument("--record-decision", action="store_true", help="write what was decided into the trail")
    parser.add_argument("--example", action="store_true", help="print a policy to begin with, and nothing else")


COMMANDS = (Command("check", "gate", "whether a model may be used, by its record and a policy", _add_gate),)
