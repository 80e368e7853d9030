"""Say: ``budget plan``, ``show``, ``left`` and ``set``. Floor 6."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.shared import PROGRAM, Command, Parser, add_json, add_trail, finish, trail_folder
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.accountant import Mechanism
    from rlhf_audit_nb.privacy.ledger import Ledger

__all__ = ["COMMANDS"]

# What a plan is worked out for: beyond it the accountant takes minutes or gigabytes, for figures of no use.
PLAN_STEPS = 10_000_000
PLAN_NOISE = 10_000
LEFT_STEPS = 1_000_000


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
    pairs = _pairs(args)
    if noise is None:
        noise = calibrate(args.epsilon, args.delta, args.sampling_rate, args.steps, pairs=pairs)
    mechanism = Mechanism(noise, args.sampling_rate, args.steps, pairs)
    total = compose([mechanism], args.delta)
    answer = {
        "epsilon": _finite(total.epsilon),
        "delta": args.delta,
        "noise_multiplier": noise,
        "sampling_rate": args.sampling_rate,
        "steps": args.steps,
        "sampled": args.sampled,
        "pairs_per_unit": pairs if args.sampled == "pairs" else None,
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
    if args.sampled == "pairs":
        words.insert(2, f"pairs sampled one by one: all {pairs} pairs of a unit that are kept are counted together")
    if args.tuning is not None:
        answer["tuning"], said = _tuning(args, mechanism)
        words += said
    return finish(args, answer, words)


def _pairs(args: argparse.Namespace) -> int:
    """How many separately sampled pairs one unit has."""
    return args.pairs_per_unit if args.sampled == "pairs" else 1


def _tuning(args: argparse.Namespace, mechanism: Mechanism) -> tuple[dict[str, Any], list[str]]:
    """What it costs to choose among several such runs, both ways."""
    from rlhf_audit_nb.compliance.words import epsilon_text
    from rlhf_audit_nb.privacy.tuning import plan_tuning

    found = plan_tuning(mechanism, args.delta, args.runs, args.tuning)
    answer = {
        "runs": found.runs,
        "once": _finite(found.once),
        "composed": _finite(found.composed),
        "distribution": found.distribution,
        "selected": _finite(found.selected),
    }
    composed, selected = epsilon_text(found.composed, 4), epsilon_text(found.selected, 4)
    random = f"a random number of runs ({found.distribution}, {found.runs} on the average)"
    return answer, [
        f"{found.runs} such runs, all composed: ε {composed} (what the ledger counts; all of them may be looked at)",
        f"only the best of {random} released: ε {selected} by RDP (a what-if: no run here hides its weights and steps)",
    ]


def _check_plan(args: argparse.Namespace) -> None:
    """The same bounds, and the same words, as a run's own configuration."""
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.privacy.loss_distributions import MAX_LOSS, expected_loss
    from rlhf_audit_nb.privacy.mechanisms import Mechanism

    PrivacyConfig(
        epsilon=1.0 if args.epsilon is None else args.epsilon,
        delta=args.delta,
        noise_multiplier=args.noise_multiplier,
        sampling_rate=args.sampling_rate,
        sampled=args.sampled,
        max_pairs_per_unit=args.pairs_per_unit,
    )
    if args.tuning is None and args.runs is not None:
        raise ConfigError(
            "--runs says how many runs to choose from, and not how.",
            next_step="Add --tuning geometric (or logarithmic, poisson).",
            code="tuning",
        )
    if args.tuning is not None and args.runs is None:
        raise ConfigError("--tuning needs the number of runs to choose from.", next_step="Add --runs 5.", code="tuning")
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
    _check_noise(noise)
    if expected_loss((Mechanism(noise, rate, args.steps, _pairs(args)),)) > MAX_LOSS:
        raise ConfigError(
            f"{args.steps:,} steps with noise multiplier {noise:g} and sampling rate {rate:g} would cost an ε of many "
            "thousands, which protects nobody and takes the accountant minutes.",
            next_step="Write a larger --noise-multiplier, a smaller --sampling-rate or fewer --steps.",
            code="noise_multiplier",
        )


def _check_noise(noise: float) -> None:
    if noise > PLAN_NOISE:
        raise ConfigError(
            f"noise_multiplier is {noise:g}; a plan is worked out for at most {PLAN_NOISE:,}.",
            next_step="Write a smaller --noise-multiplier: nothing can be learned under so much noise.",
            code="noise_multiplier",
        )


def _finite(value: float | str) -> float | str:
    """A number as JSON can hold it: infinity by its name."""
    return value if isinstance(value, str) or value not in (float("inf"), float("-inf")) else str(value)


def _figure(value: float | str) -> str:
    """A figure; where there is none, that there is none (why stands in the notes)."""
    return value.split(":")[0] if isinstance(value, str) else f"{value:.4f}"


def _do_budget_show(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.compliance.words import delta_text, epsilon_text, plural, short
    from rlhf_audit_nb.reports.budget import Budget

    ledger = _ledger(args)
    budget = Budget.of(ledger, delta=args.delta)
    answer: dict[str, Any] = {"unit": budget.unit, "epsilon": _finite(budget.total), "delta": budget.delta}
    if ledger.unit is None:
        words = ["Nothing was spent: no run with differential privacy stands on this trail."]
        return finish(args, {**answer, "spends": []}, words)
    budgets = _budgets(ledger)
    answer |= {
        "adjacency": "zero-out",
        "spent": _finite(budget.spent),
        "reserved": _finite(budget.reserved),
        "budget": budget.budget,
        "left": budget.left,
        "set_in": budget.set_in,
        "set_by": budget.set_by,
        "budgets": budgets,
        "spends": [{**asdict(one), "epsilon": _finite(one.epsilon)} for one in budget.runs],
    }
    reach = f"unit {budget.unit}, zero-out adjacency; all runs composed, not added"
    words = [f"ε {epsilon_text(budget.total, 4)} at δ {delta_text(budget.delta)}, {reach}"]
    words.append(f"  spent     {epsilon_text(budget.spent, 4)}")
    words.append(f"  reserved  {epsilon_text(budget.reserved, 4)}")
    if budget.budget is not None and budget.left is not None:
        by = f", set by {budget.set_by} (#{budget.set_in})" if budget.set_by is not None else ""
        words.append(f"  left      {_down(budget.left)} of {budget.budget:g}{by}")
    for one in budget.runs:
        state = "spent" if one.settled else "reserved"
        words.append(
            f"  run {short(one.run or '')}: {state} {plural(one.steps, 'step')}, noise "
            f"multiplier {one.noise_multiplier:.10g}, sampling rate {one.sampling_rate:g}; alone ε "
            f"{epsilon_text(one.epsilon, 4)}"
        )
    if len(budgets) > 1:
        words.append("  budget over time: " + ", ".join(f"{b['epsilon']:g} (#{b['entry']})" for b in budgets))
    words += [f"  #{b['entry']}: {b['by']} set {b['epsilon']:g}: {b['reason']}" for b in budgets if "by" in b]
    return finish(args, answer, words)


def _ledger(args: argparse.Namespace) -> Ledger:
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.privacy.reservation import read_ledger
    from rlhf_audit_nb.trail import TrailReader

    if args.delta is not None:
        PrivacyConfig(epsilon=1.0, delta=args.delta)
    return read_ledger(TrailReader.open(trail_folder(args)))


def _budgets(ledger: Ledger) -> list[dict[str, Any]]:
    """The ε budgets in order: those that were set, and those that runs named where they differ from the one before."""
    asked: list[dict[str, Any]] = [
        {"epsilon": spend.asked.epsilon, "entry": spend.asked.index, "run": spend.run} for spend in ledger.spends
    ]
    chosen: list[dict[str, Any]] = [
        {
            "epsilon": one.epsilon,
            "entry": one.index,
            "run": None,
            "delta": one.delta,
            "by": one.by,
            "reason": one.reason,
        }
        for one in ledger.budgets
    ]
    found: list[dict[str, Any]] = []
    for one in sorted(asked + chosen, key=lambda one: int(one["entry"])):
        if "by" in one or not found or found[-1]["epsilon"] != one["epsilon"]:
            found.append(one)
    return found


def _down(value: float) -> str:
    return f"{math.floor(value * 10_000) / 10_000:.4f}"


def _do_budget_left(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.compliance.words import count, delta_text, epsilon_text, plural
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon, max_steps
    from rlhf_audit_nb.reports.budget import Budget

    noise, rate = args.noise_multiplier, args.sampling_rate
    PrivacyConfig(
        epsilon=1.0,
        noise_multiplier=noise,
        sampling_rate=rate,
        sampled=args.sampled,
        max_pairs_per_unit=args.pairs_per_unit,
    )
    pairs = _pairs(args)
    _check_noise(noise)
    ledger = _ledger(args)
    budget = Budget.of(ledger)
    if budget.budget is None:
        raise ConfigError(
            f"The trail {trail_folder(args)} has no budget yet: no run named one, and none was set.",
            next_step="Set one with rlhf-audit budget set, or plan without a trail: rlhf-audit budget plan.",
            code="no-budget",
        )
    prior = tuple(spend.mechanism for spend in ledger.spends)
    steps = max_steps(budget.budget, budget.delta, noise, rate, prior, at_most=LEFT_STEPS, pairs=pairs)
    after = composed_epsilon([*prior, Mechanism(noise, rate, steps, pairs)], budget.delta)
    answer = {
        "steps": steps,
        "at_most": LEFT_STEPS,
        "noise_multiplier": noise,
        "sampling_rate": rate,
        "budget": budget.budget,
        "delta": budget.delta,
        "unit": budget.unit,
        "epsilon_before": _finite(budget.total),
        "epsilon_after": _finite(after),
    }
    these = "this step" if steps == 1 else "these steps"
    more = f"at least {count(steps)} steps fit" if steps == LEFT_STEPS else f"{plural(steps, 'step')} fit"
    if steps == 1:
        more += "s"
    spent = (
        f"ε {epsilon_text(budget.total, 4)} of {budget.budget:g} is spent or reserved at δ {delta_text(budget.delta)}"
    )
    words = [
        f"{more} at noise multiplier {noise:.10g} and sampling rate {rate:g}",
        f"{spent}; after {these} it would be {epsilon_text(after, 4)}" if steps else spent,
    ]
    if not steps:
        words.append("Choose more noise, a smaller sampling rate, or have the budget raised (rlhf-audit budget set).")
    return finish(args, answer, words)


def _do_budget_set(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.auditor import AuditableRLHF
    from rlhf_audit_nb.config import AuditConfig
    from rlhf_audit_nb.privacy.reservation import read_ledger
    from rlhf_audit_nb.trail import TrailReader

    folder = trail_folder(args)
    before = read_ledger(TrailReader.open(folder)).limit  # a trail that is not there is not made by a misspelt name
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder)))
    entry = auditor.set_budget(args.epsilon, reason=args.reason, by=args.by, delta=args.delta, unit=args.unit)
    now = read_ledger(auditor.trail.reader()).limit
    assert now is not None  # for the type checker; it was set
    answer = {
        "entry": entry,
        "unit": now.unit,
        "epsilon": now.epsilon,
        "delta": now.delta,
        "before": before.epsilon if before is not None else None,
        "by": now.by,
        "reason": now.reason,
    }
    was = f" (it was {before.epsilon:g})" if before is not None else ""
    return finish(
        args,
        answer,
        [
            f"budget   ε {now.epsilon:g} at δ {now.delta:g} for {now.unit}s{was}, set by {now.by} in entry {entry}",
            "A run that asks for more is refused from now on; reports name the budget, its reason and who set it.",
        ],
    )


def _add_sampling(parser: Parser) -> None:
    parser.add_argument(
        "--sampled", choices=("units", "pairs"), default="units", help="what is drawn and clipped as one (units)"
    )
    parser.add_argument(
        "--pairs-per-unit", type=int, default=8, metavar="K", help="pairs of a unit at most; costs ε with pairs (8)"
    )


def _add_budget(parser: Parser) -> None:
    parts = parser.add_subparsers(
        dest="part", prog=f"{PROGRAM} budget", required=True, metavar="plan|show|left|set", parser_class=Parser
    )
    plan = parts.add_parser("plan", help="ε of a plan, or the noise multiplier that reaches an ε", allow_abbrev=False)
    plan.set_defaults(do=_do_budget_plan)
    plan.add_argument("--noise-multiplier", type=float, metavar="S", help="noise in units of the clipping norm")
    plan.add_argument("--epsilon", type=float, metavar="E", help="the ε to reach, in place of the noise multiplier")
    plan.add_argument("--sampling-rate", type=float, required=True, metavar="Q", help="chance of each unit per step")
    plan.add_argument("--steps", type=int, required=True, metavar="T")
    plan.add_argument("--delta", type=float, default=1e-5, metavar="D", help="(1e-5)")
    _add_sampling(plan)
    plan.add_argument(
        "--tuning",
        choices=("geometric", "logarithmic", "poisson"),
        help="also say what choosing the best of several such runs costs, composed and selected",
    )
    plan.add_argument("--runs", type=int, metavar="N", help="of how many, with --tuning")
    show = parts.add_parser("show", help="what a trail has spent, reserved and left, by run", allow_abbrev=False)
    show.set_defaults(do=_do_budget_show)
    left = parts.add_parser("left", help="how many steps fit into what is left of a trail's budget", allow_abbrev=False)
    left.set_defaults(do=_do_budget_left)
    left.add_argument("--noise-multiplier", type=float, required=True, metavar="S", help="of these steps")
    left.add_argument("--sampling-rate", type=float, required=True, metavar="Q", help="chance of each unit per step")
    _add_sampling(left)
    chosen = parts.add_parser("set", help="set a trail's budget: no run may ask for more", allow_abbrev=False)
    chosen.set_defaults(do=_do_budget_set)
    chosen.add_argument("--epsilon", type=float, required=True, metavar="E", help="what all runs may cost together")
    chosen.add_argument("--reason", required=True, metavar="TEXT", help="why; it stands in the trail and in reports")
    chosen.add_argument("--by", required=True, metavar="NAME", help="who decides; likewise")
    chosen.add_argument("--unit", choices=("annotator", "pair", "label"), help="(the trail's, else annotator)")
    left.set_defaults(delta=None)
    for part in (show, left, chosen):
        add_trail(part)
    for part in (show, chosen):
        part.add_argument("--delta", type=float, metavar="D", help="(that of the budget in force, else 1e-5)")
    for part in (plan, show, left, chosen):
        add_json(part)


COMMANDS = (Command("say", "budget", "what a plan costs (plan), a trail's budget: show, left, set", _add_budget),)
