"""Say: ``budget plan``, ``show``, ``left`` and ``set``. Floor 6."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.shared import (
    PROGRAM,
    Command,
    Parser,
    add_json,
    add_policy,
    add_trail,
    finish,
    output,
    read_policy,
    trail_folder,
)
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.accountant import Mechanism
    from rlhf_audit_nb.privacy.ledger import LabelSpend, Ledger

__all__ = ["COMMANDS"]

# What a plan is worked out for: beyond it the accountant takes minutes or gigabytes, for figures of no use.
PLAN_STEPS = 10_000_000
PLAN_NOISE = 10_000
OPENINGS = 2


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
    from rlhf_audit_nb.reports.budget_figure import budget_changes

    ledger = _ledger(args)
    budget = Budget.of(ledger, delta=args.delta)
    answer: dict[str, Any] = {"unit": budget.unit, "epsilon": _finite(budget.total), "delta": budget.delta}
    if ledger.unit is None:
        _refuse_empty_figure(args)
        words = ["Nothing was spent: no run with differential privacy stands on this trail."]
        return finish(args, {**answer, "spends": []}, words)
    budgets = budget_changes(ledger)
    plain = budget.to_dict()
    answer |= {"adjacency": "zero-out", "budgets": budgets, "spends": plain.pop("runs"), **plain}
    reach = f"unit {budget.unit}, zero-out adjacency; all runs composed, not added"
    several = len(budget.populations) > 1
    words = [f"ε {epsilon_text(budget.total, 4)} at δ {delta_text(budget.delta)}, {reach}"]
    if ledger.unit == "label":
        answer |= {"adjacency": "replace one label", "releases": [_release(one) for one in ledger.releases]}
        words = [
            f"ε {epsilon_text(budget.total, 4)} of each label (pure: at any δ); what one label's releases cost adds up"
        ]
    if several:
        words.append(f"  of the population that spent most; {len(budget.populations)} populations share nobody")
    words.append(f"  spent     {epsilon_text(budget.spent, 4)}")
    words.append(f"  reserved  {epsilon_text(budget.reserved, 4)}")
    if budget.budget is not None and budget.left is not None:
        by = f", set by {budget.set_by} (#{budget.set_in})" if budget.set_by is not None else ""
        words.append(f"  left      {_down(budget.left)} of {budget.budget:g}{by}")
    for one in budget.runs:
        state = "spent" if one.settled else "reserved"
        whose = f", population {one.population}" if several else ""
        words.append(
            f"  run {short(one.run or '')}{whose}: {state} {plural(one.steps, 'step')}, noise "
            f"multiplier {one.noise_multiplier:.10g}, sampling rate {one.rate}; alone ε "
            f"{epsilon_text(one.epsilon, 4)}"
        )
    for release in ledger.releases:
        words.append(
            f"  release {short(release.release)} (#{release.index}): {plural(release.labels, 'label')}, ε "
            f"{epsilon_text(release.epsilon, 4)} each"
        )
    if len(budgets) > 1:
        words.append("  budget over time: " + ", ".join(f"{b['epsilon']:g} (#{b['entry']})" for b in budgets))
    words += [f"  #{b['entry']}: {b['by']} set {b['epsilon']:g}: {b['reason']}" for b in budgets if "by" in b]
    words += [f"  {note}" for note in budget.notes()]
    if args.figure is not None:
        path = output(argparse.Namespace(out=args.figure), Path())
        budget.save(path)
        answer["figure"] = str(path)
        words.append(f"figure   {path}")
    return finish(args, answer, words)


def _release(one: LabelSpend) -> dict[str, Any]:
    return {"release": one.release, "entry": one.index, "labels": one.labels, "epsilon": one.epsilon}


def _refuse_empty_figure(args: argparse.Namespace) -> None:
    if args.figure is not None:
        raise ConfigError(
            "Nothing was spent on this trail, so there is no figure to draw.",
            next_step="Leave --figure out.",
            code="nothing-spent",
        )


def _ledger(args: argparse.Namespace) -> Ledger:
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.privacy.populations import VaultAt
    from rlhf_audit_nb.privacy.reservation import read_ledger
    from rlhf_audit_nb.trail import TrailReader

    if args.delta is not None:
        PrivacyConfig(epsilon=1.0, delta=args.delta)
    folder = trail_folder(args)
    reader = TrailReader.open(folder)
    return read_ledger(reader, VaultAt.beside(folder, reader))


def _down(value: float) -> str:
    return f"{math.floor(value * 10_000) / 10_000:.4f}"


def _do_budget_left(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.reports.budget import Budget, what_is_left

    found = what_is_left(
        Budget.of(_ledger(args), delta=args.delta),
        sampling_rate=args.sampling_rate,
        noise_multiplier=args.noise_multiplier,
        steps=args.steps,
        epsilon=args.epsilon,
        population=args.population,
        pairs=_pairs(args),
    )
    return finish(args, found.to_dict(), found.lines())


def _do_budget_check(args: argparse.Namespace) -> int:
    """Which populations share nobody, from the vault, or from two openings that an auditor was given."""
    if args.openings:
        return _check_openings(args)
    from rlhf_audit_nb.privacy.populations import VaultAt, check_relations, read_registry
    from rlhf_audit_nb.trail import TrailReader

    folder = trail_folder(args)
    reader = TrailReader.open(folder)
    vault = VaultAt.beside(folder, reader)
    registry = read_registry(reader, vault)
    ledger = _ledger(args)
    relations = check_relations(registry)
    populations = list(registry.populations.values())
    numbers = {one.id: at for at, one in enumerate(populations, 1)}
    answer = {
        "populations": [
            {"population": one.id, "entry": one.index, "units": one.units, "state": one.state} for one in populations
        ],
        "relations": [
            {"one": each.one, "other": each.other, "said": each.said, "found": each.found} for each in relations
        ],
        "contradicted": sum(each.contradicted for each in relations),
        "doubts": [spend.doubt for spend in ledger.doubts()],
    }
    words = [
        f"{one.units} annotators in entry {one.index} (roster {numbers[one.id]}): {one.state}" for one in populations
    ]
    words += [
        f"  rosters {numbers[each.other]} and {numbers[each.one]}: {each.found}"
        + (", although the entry says that they share nobody" if each.contradicted else "")
        for each in relations
    ]
    words += [str(spend.doubt) for spend in ledger.doubts()]
    if not populations:
        words.append("No roster is recorded on this trail: everything is composed.")
    if vault is None:
        words.append("The keys of this trail are not here, so no roster can be shown: everything is composed.")
    bad = bool(answer["contradicted"] or answer["doubts"])
    return finish(args, answer, words, 3 if bad else 0)


def _check_openings(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.privacy.populations import compare_rosters, disclosed_population

    if len(args.openings) != OPENINGS:
        raise ConfigError(
            "Two rosters are compared: give --opening twice.",
            next_step="rlhf-audit disclose INDEX writes the opening of a privacy.population entry.",
            code="usage",
        )
    policy = read_policy(args)
    (first, one), (second, other) = (disclosed_population(Path(file), policy=policy) for file in args.openings)
    if first.origin != second.origin:
        raise ConfigError(
            f"The openings are of two trails, {first.origin} and {second.origin}; their tags cannot be compared.",
            next_step="Give two openings of one trail.",
            code="usage",
        )
    found = compare_rosters(one, other)
    answer = {
        "found": found,
        "origin": first.origin,
        "levels": [first.level.name, second.level.name],
        "populations": [{"population": each.id, "entry": each.index, "units": each.units} for each in (one, other)],
    }
    said = {"disjoint": "share nobody", "shares": "share somebody"}.get(found, "cannot be compared")
    words = [
        f"The {one.units} annotators of entry {one.index} and the {other.units} of entry {other.index} {said}.",
        f"  trail {first.origin}, verdicts {first.level.name} and {second.level.name}",
    ]
    return finish(args, answer, words, 0 if found == "disjoint" else 3)


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
        dest="part", prog=f"{PROGRAM} budget", required=True, metavar="plan|show|left|check|set", parser_class=Parser
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
    left.add_argument("--noise-multiplier", type=float, metavar="S", help="of these steps: how many fit?")
    left.add_argument("--steps", type=int, metavar="T", help="in its place: which noise lets so many fit?")
    left.add_argument("--sampling-rate", type=float, required=True, metavar="Q", help="chance of each unit per step")
    left.add_argument("--epsilon", type=float, metavar="E", help="another budget than the one in force, to try it")
    left.add_argument(
        "--population", type=int, metavar="N", help="as show numbers them; 0: new annotators (the one that spent most)"
    )
    _add_sampling(left)
    check = parts.add_parser("check", help="which populations share nobody, from the vault", allow_abbrev=False)
    check.set_defaults(do=_do_budget_check, delta=None)
    check.add_argument(
        "--opening", dest="openings", action="append", metavar="FILE", help="compare two disclosed rosters instead"
    )
    add_policy(check)
    chosen = parts.add_parser("set", help="set a trail's budget: no run may ask for more", allow_abbrev=False)
    chosen.set_defaults(do=_do_budget_set)
    chosen.add_argument("--epsilon", type=float, required=True, metavar="E", help="what all runs may cost together")
    chosen.add_argument("--reason", required=True, metavar="TEXT", help="why; it stands in the trail and in reports")
    chosen.add_argument("--by", required=True, metavar="NAME", help="who decides; likewise")
    chosen.add_argument("--unit", choices=("annotator", "pair", "label"), help="(the trail's, else annotator)")
    left.set_defaults(delta=None)
    show.add_argument("--figure", metavar="FILE", help="draw it too: FILE.svg or FILE.png")
    for part in (show, left, check, chosen):
        add_trail(part)
    for part in (show, chosen):
        part.add_argument("--delta", type=float, metavar="D", help="(that of the budget in force, else 1e-5)")
    for part in (plan, show, left, check, chosen):
        add_json(part)


COMMANDS = (Command("say", "budget", "what a plan costs (plan); a trail's: show, left, check, set", _add_budget),)
