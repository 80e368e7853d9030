"""Say: ``report``, ``card`` and ``budget``. Floor 6."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.checking import add_target
from rlhf_audit_nb.cli.shared import (
    PROGRAM,
    Command,
    Parser,
    add_json,
    add_trail,
    beside,
    finish,
    is_record,
    note,
    output,
    read_policy,
    trail_folder,
)
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.trail import TrailReader, TrustPolicy

__all__ = ["COMMANDS"]

# What a plan is worked out for: beyond it the accountant takes minutes or gigabytes, for figures of no use.
PLAN_STEPS = 10_000_000
PLAN_NOISE = 10_000
PLAN_LOSS = 1e6


def _evidence(target: str, policy: TrustPolicy | None) -> Evidence:
    from rlhf_audit_nb.compliance.evidence import Evidence

    if is_record(target):
        from rlhf_audit_nb.records import open_record

        return Evidence.from_record(open_record(Path(target), policy=policy))
    return Evidence.from_trail(Path(target), policy=policy)


def _do_report(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.reports import build_compliance_report

    path = output(args, beside(args.target, f".{args.format}"))
    evidence = _evidence(args.target, read_policy(args))
    build_compliance_report(evidence, args.mode).save(path)
    answer = {"report": str(path), "format": args.format, "level": evidence.level}
    return _finish_saying(args, answer, [f"report   {path} ({evidence.level})"], evidence)


def _do_card(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.cards import build_card

    evidence = _evidence(args.target, read_policy(args))
    card = build_card(evidence, args.format)
    if args.out is None:
        return _finish_saying(args, card.to_dict(), card.text.splitlines(), evidence)
    path = output(args, Path(args.out))
    card.save(path)
    answer = {"card": str(path), "format": args.format, "level": evidence.level}
    return _finish_saying(args, answer, [f"card     {path} ({evidence.level})"], evidence)


def _finish_saying(args: argparse.Namespace, result: dict[str, Any], words: Sequence[str], evidence: Evidence) -> int:
    """Ends `report` and `card`: written all the same, but what is INVALID or DIVERGED does not end as a success."""
    from rlhf_audit_nb.trail import Level

    code = finish(args, result, words, evidence.verdict.exit_code(Level.UNANCHORED))
    if not evidence.trusted:
        note(f"The verdict is {evidence.level}: it is written, but nothing in it is evidence.")
    return code


def _do_budget_plan(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.compliance.words import delta_text, epsilon_text
    from rlhf_audit_nb.privacy.accountant import Mechanism, calibrate, compose

    if (args.noise_multiplier is None) == (args.epsilon is None):
        raise ConfigError(
            "A plan needs either the noise multiplier or the ε to reach.",
            next_step="Give --noise-multiplier S to learn ε, or --epsilon E to learn the noise multiplier.",
            code="usage",
        )
    _check_plan(args)
    noise = args.noise_multiplier
    if noise is None:
        noise = calibrate(args.epsilon, args.delta, args.sampling_rate, args.steps)
    total = compose([Mechanism(noise, args.sampling_rate, args.steps)], args.delta)
    answer = {
        "epsilon": _finite(total.epsilon),
        "delta": args.delta,
        "noise_multiplier": noise,
        "sampling_rate": args.sampling_rate,
        "steps": args.steps,
        "adjacency": "zero-out",
        "accountants": {"pld": _finite(total.epsilon), "prv": _finite(total.prv), "rdp": _finite(total.rdp)},
        "notes": list(total.notes),
    }
    words = [
        f"ε {epsilon_text(total.epsilon, 4)} at δ {delta_text(args.delta)} (zero-out adjacency)",
        f"noise multiplier {noise:.10g}, sampling rate {args.sampling_rate:g}, {args.steps} steps",
        f"accountants: PLD {_figure(total.epsilon)} (counts), PRV {_figure(total.prv)}, RDP {_figure(total.rdp)}",
        *total.notes,
    ]
    return finish(args, answer, words)


def _check_plan(args: argparse.Namespace) -> None:
    """The same bounds, and the same words, as a run's own configuration."""
    from rlhf_audit_nb.config import PrivacyConfig

    PrivacyConfig(
        epsilon=1.0 if args.epsilon is None else args.epsilon,
        delta=args.delta,
        noise_multiplier=args.noise_multiplier,
        sampling_rate=args.sampling_rate,
    )
    if args.steps < 1:
        raise ConfigError(
            f"steps is {args.steps}; it must be at least 1.", next_step="Write --steps 100.", code="steps"
        )
    if args.steps > PLAN_STEPS:
        raise ConfigError(
            f"steps is {args.steps:,}; a plan is worked out for at most {PLAN_STEPS:,}.",
            next_step=f"Write --steps {PLAN_STEPS} or fewer.",
            code="steps",
        )
    noise, rate = args.noise_multiplier, args.sampling_rate
    if noise is None:
        return
    if noise > PLAN_NOISE:
        raise ConfigError(
            f"noise_multiplier is {noise:g}; a plan is worked out for at most {PLAN_NOISE:,}.",
            next_step="Write a smaller --noise-multiplier: nothing can be learned under so much noise.",
            code="noise_multiplier",
        )
    # About twice the ε to come; the accountant's memory and time grow with it.
    if (1 + args.steps * (rate if noise < 1 else rate**2)) / noise / noise > PLAN_LOSS:
        raise ConfigError(
            f"{args.steps:,} steps with noise multiplier {noise:g} and sampling rate {rate:g} would cost an ε of many "
            "thousands, which protects nobody and takes the accountant minutes.",
            next_step="Write a larger --noise-multiplier, a smaller --sampling-rate or fewer --steps.",
            code="noise_multiplier",
        )


def _finite(value: float | str) -> float | str:
    """A number as JSON can hold it: infinity by its name."""
    return value if isinstance(value, str) or value not in (float("inf"), float("-inf")) else str(value)


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"


def _do_budget_show(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.compliance.words import delta_text, epsilon_text, plural, short
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.privacy.ledger import fold
    from rlhf_audit_nb.trail import TrailReader

    PrivacyConfig(epsilon=1.0, delta=args.delta)
    reader = TrailReader.open(trail_folder(args))
    ledger = fold(reader.entries())
    if ledger.unit is None:
        answer: dict[str, Any] = {"unit": None, "epsilon": 0.0, "delta": args.delta, "spends": []}
        return finish(args, answer, ["Nothing was spent: no run with differential privacy stands on this trail."])
    total = ledger.composed(args.delta)
    spends = [
        {
            "run": spend.run,
            "settled": spend.settled,
            "noise_multiplier": spend.mechanism.noise_multiplier,
            "sampling_rate": spend.mechanism.sampling_rate,
            "steps": spend.steps,
        }
        for spend in ledger.spends
    ]
    budgets = _budgets(reader)
    answer = {"unit": ledger.unit, "epsilon": _finite(total.epsilon), "delta": args.delta, "adjacency": "zero-out"}
    reach = f"unit {ledger.unit}, zero-out adjacency; all runs composed, not added"
    words = [f"ε {epsilon_text(total.epsilon, 4)} at δ {delta_text(args.delta)}, {reach}"]
    for spend in ledger.spends:
        state = "spent" if spend.settled else "reserved"
        mechanism = spend.mechanism
        words.append(
            f"  run {short(spend.run or '')}: {state} {plural(spend.steps, 'step')}, noise multiplier "
            f"{mechanism.noise_multiplier:.10g}, sampling rate {mechanism.sampling_rate:g}"
        )
    if len(budgets) > 1:
        words.append("  budget over time: " + ", ".join(f"{b['epsilon']:g} (#{b['entry']})" for b in budgets))
    return finish(args, {**answer, "budgets": budgets, "spends": spends}, words)


def _budgets(reader: TrailReader) -> list[dict[str, Any]]:
    """The ε budgets that reservations named, in order: the first, and each that differs from the one before it."""
    from rlhf_audit_nb.events import PrivacyReserved, decode_body

    found: list[dict[str, Any]] = []
    for entry in reader.entries(type=PrivacyReserved.TYPE):
        reserved = decode_body(entry.type, entry.body)
        assert isinstance(reserved, PrivacyReserved)  # for the type checker; decode_body checked it
        if not found or found[-1]["epsilon"] != reserved.epsilon_budget:
            found.append({"epsilon": reserved.epsilon_budget, "entry": entry.index, "run": entry.run})
    return found


def _add_report(parser: Parser) -> None:
    parser.set_defaults(do=_do_report)
    add_target(parser)
    parser.add_argument("--format", choices=("html", "pdf", "json"), default="html")
    parser.add_argument("--mode", default="eu_ai_act", metavar="FRAMEWORK", help="what it assesses against (eu_ai_act)")
    parser.add_argument("-o", "--out", metavar="FILE", help="where it goes (beside the target)")


def _add_card(parser: Parser) -> None:
    parser.set_defaults(do=_do_card)
    add_target(parser)
    parser.add_argument(
        "--format", default="eu_standard", metavar="FORMAT", help="eu_standard, huggingface or json (eu_standard)"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="where it goes (stdout)")


def _add_budget(parser: Parser) -> None:
    parts = parser.add_subparsers(
        dest="part", prog=f"{PROGRAM} budget", required=True, metavar="plan|show", parser_class=Parser
    )
    plan = parts.add_parser("plan", help="ε of a plan, or the noise multiplier that reaches an ε", allow_abbrev=False)
    plan.set_defaults(do=_do_budget_plan)
    plan.add_argument("--noise-multiplier", type=float, metavar="S", help="noise in units of the clipping norm")
    plan.add_argument("--epsilon", type=float, metavar="E", help="the ε to reach, in place of the noise multiplier")
    plan.add_argument("--sampling-rate", type=float, required=True, metavar="Q", help="chance of each unit per step")
    plan.add_argument("--steps", type=int, required=True, metavar="T")
    plan.add_argument("--delta", type=float, default=1e-5, metavar="D", help="(1e-5)")
    show = parts.add_parser("show", help="what all runs on a trail have spent together", allow_abbrev=False)
    show.set_defaults(do=_do_budget_show)
    add_trail(show)
    show.add_argument("--delta", type=float, default=1e-5, metavar="D", help="(1e-5)")
    for part in (plan, show):
        add_json(part)


COMMANDS = (
    Command("say", "report", "write the compliance report of a record or a trail (HTML, PDF or JSON)", _add_report),
    Command("say", "card", "write the model card", _add_card),
    Command("say", "budget", "what a plan would cost (plan), what a trail has spent (show)", _add_budget),
)
