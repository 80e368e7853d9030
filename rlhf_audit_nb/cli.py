"""The command ``rlhf-audit``. Floor 6: a face, thin; what a command does is done on the floors below.

What a person reads goes to stdout, progress and complaints to stderr; with ``--json`` stdout holds one JSON object and
nothing else. Exit codes: 0 done, 1 a notebook failed, 2 usage or bad input, 3 refused, 10/30/40 verdicts. A mistake of
the user's gets one sentence and the next step, never a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rlhf_audit_nb import __version__
from rlhf_audit_nb.errors import AuditError, ConfigError, FormatError

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.trail import Reason, TrailReader, TrustPolicy, Verdict

__all__ = ["main"]

PROGRAM = "rlhf-audit"
INTERRUPTED = 130
WIDTH = 100
RAISED_LINES = 10
# What a plan is worked out for: beyond it the accountant takes minutes or gigabytes, for figures of no use.
PLAN_STEPS = 10_000_000
PLAN_NOISE = 10_000
PLAN_LOSS = 1e6
RECORD_SUFFIX = ".ipynb"
LEVELS = ("UNANCHORED", "TIMESTAMPED", "COSIGNED")

Command = Callable[[argparse.Namespace], int]


# -- saying things ----------------------------------------------------------------------------------------------


def _say(text: str = "") -> None:
    """A result, for whoever reads stdout."""
    print(text)


def _note(text: str) -> None:
    """Progress and complaints, which are no result."""
    print(text, file=sys.stderr, flush=True)


def _finish(args: argparse.Namespace, result: dict[str, Any], words: Sequence[str], code: int = 0) -> int:
    """Ends a command: the words, or with ``--json`` one object on stdout and the words on stderr."""
    for line in words:
        (_note if args.json else _say)(line)
    if args.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    return code


# -- shared pieces ----------------------------------------------------------------------------------------------


def _policy(args: argparse.Namespace) -> TrustPolicy | None:
    if args.policy is None:
        return None
    from rlhf_audit_nb.trail import TrustPolicy

    text = _text(args.policy, "trust policy")
    try:
        return TrustPolicy.parse(text)
    except FormatError as error:
        raise ConfigError(
            f"{args.policy} is not a trust policy. {error.message}",
            next_step="Name the file with the public keys (a log line and a quorum line) that the key-holder gave you.",
            code=error.reason,
        ) from error


def _text(path: str, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"The {what} {path} cannot be read: {reason}.", next_step="Check the path.") from error


def _is_record(target: str) -> bool:
    """Whether a target is a record (a notebook) and not a trail's folder.

    Raises:
        ConfigError: there is nothing of that name.
    """
    path = Path(target)
    if path.is_dir():
        return False
    if path.exists() or path.suffix == RECORD_SUFFIX:
        return True
    raise ConfigError(
        f"There is no record or trail at {target}.",
        next_step="Name an executed notebook (.ipynb) or a trail's folder.",
        code="no-target",
    )


def _verdict(target: str, policy: TrustPolicy | None) -> tuple[Verdict, Sequence[Reason]]:
    """The verdict, and what is worth knowing beside it and is no fault."""
    if _is_record(target):
        from rlhf_audit_nb.records import open_record

        opened = open_record(Path(target), policy=policy)
        return opened.verdict, opened.notes
    from rlhf_audit_nb.trail import verify_trail
    from rlhf_audit_nb.trail.published import is_published, verify_published

    verify = verify_published if is_published(target) else verify_trail
    return verify(Path(target), policy=policy), ()


def _evidence(target: str, policy: TrustPolicy | None) -> Evidence:
    from rlhf_audit_nb.compliance.evidence import Evidence

    if _is_record(target):
        from rlhf_audit_nb.records import open_record

        return Evidence.from_record(open_record(Path(target), policy=policy))
    return Evidence.from_trail(Path(target), policy=policy)


def _trail_folder(args: argparse.Namespace) -> Path:
    from rlhf_audit_nb.config import AuditConfig

    return AuditConfig(trail=args.trail).trail_location()


def _beside(target: str, suffix: str) -> Path:
    """The result's place where none is named: the target with another ending."""
    path = Path(target)
    if path.name in ("", ".."):
        path = path.resolve()
    return path.with_suffix(suffix) if path.name else path


def _output(args: argparse.Namespace, default: Path) -> Path:
    """Where the result goes; the folder is made.

    Raises:
        ConfigError: it cannot be written there.
    """
    path = Path(args.out) if args.out else default
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(13, "no permission to write there")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}.", next_step="Name another file with -o.", code="output"
        ) from error
    return path


# -- train and record -------------------------------------------------------------------------------------------


def _do_demo(args: argparse.Namespace) -> int:
    from rlhf_audit_nb import showcase

    settings = {
        "data": args.data,
        "columns": args.columns,
        "epsilon": args.epsilon,
        "delta": args.delta,
        "unit": args.unit,
        "steps": args.steps,
        "seed": args.seed,
        "model_name_or_path": args.model,
    }
    done = showcase.run_demo(Path(args.out), {k: v for k, v in settings.items() if v is not None}, _note)
    return _finish(args, done.to_dict(), done.words(), done.verdict.exit_code(None))


def _do_run(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.records import read_parameters, run_notebook

    pairs = dict(args.parameter)
    if len(pairs) < len(args.parameter):
        raise ConfigError("A parameter is given twice.", next_step="Give each -p once.", code="usage")
    output = _output(args, _beside(args.notebook, ".record.ipynb"))
    values = read_parameters(args.notebook, pairs)
    result = run_notebook(
        args.notebook, output, values, trail=args.trail, kernel_name=args.kernel, progress=_cell_progress
    )
    verdict, notes = _verdict(str(output), None)
    answer = {
        "record": str(result.path),
        "id": result.record,
        "status": result.status,
        "trail": str(result.trail),
        "verdict": verdict.to_dict(),
    }
    words = [f"record   {result.path}", f"trail    {result.trail}", *_verdict_words(verdict, notes)]
    return _finish(args, answer, words, verdict.exit_code(None))


def _raised_words(said: str) -> list[str]:
    """The words of an error that a cell raised, indented; what is too long for a terminal stays in the record."""
    from rlhf_audit_nb.compliance.words import visible

    lines = [
        part
        for line in visible(said).splitlines()
        for part in textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="  ")
    ]
    return lines if len(lines) <= RAISED_LINES else [*lines[: RAISED_LINES - 1], "  … (the rest is in the record)"]


def _cell_progress(position: int, cells: int, state: str) -> None:
    _note(f"cell {position + 1} of {cells}: {state}")


# -- check ------------------------------------------------------------------------------------------------------


def _do_verify(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail import Level

    verdict, notes = _verdict(args.target, _policy(args))
    require = Level[args.require] if args.require else None
    words = _verdict_words(verdict, notes)
    code = verdict.exit_code(require)
    if require is not None and code and not verdict.reasons:
        words.append(f"Required was {require.name}: refused.")
    return _finish(args, verdict.to_dict(), words, code)


def _verdict_words(verdict: Verdict, notes: Sequence[Reason]) -> list[str]:
    from rlhf_audit_nb.compliance.words import level_words, short

    words = level_words(verdict.level.name)
    lines = textwrap.wrap(f"{verdict.level.name}  {words.shows}", WIDTH, subsequent_indent="  ")
    lines += [f"  {reason.where}: {reason.message} [{reason.code}]" for reason in verdict.reasons]
    lines += [f"  worth knowing: {note.where}: {note.message} [{note.code}]" for note in notes]
    if verdict.size:
        signers = ", ".join(verdict.signers) or "nobody that is trusted here"
        lines.append(f"  {verdict.origin}: {verdict.size} entries, root {short(verdict.root)}, signed by {signers}")
    lines += [f"  run {short(run.run)}: {run.status}, {run.entries} entries" for run in verdict.runs]
    return [*lines, *textwrap.wrap(words.not_shown, WIDTH, initial_indent="  ", subsequent_indent="  ")]


# -- say --------------------------------------------------------------------------------------------------------


def _do_report(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.reports import build_compliance_report

    output = _output(args, _beside(args.target, f".{args.format}"))
    evidence = _evidence(args.target, _policy(args))
    build_compliance_report(evidence, args.mode).save(output)
    answer = {"report": str(output), "format": args.format, "level": evidence.level}
    return _finish_saying(args, answer, [f"report   {output} ({evidence.level})"], evidence)


def _do_card(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.cards import build_card

    evidence = _evidence(args.target, _policy(args))
    card = build_card(evidence, args.format)
    if args.out is None:
        return _finish_saying(args, card.to_dict(), card.text.splitlines(), evidence)
    output = _output(args, Path(args.out))
    card.save(output)
    answer = {"card": str(output), "format": args.format, "level": evidence.level}
    return _finish_saying(args, answer, [f"card     {output} ({evidence.level})"], evidence)


def _finish_saying(args: argparse.Namespace, result: dict[str, Any], words: Sequence[str], evidence: Evidence) -> int:
    """Ends `report` and `card`: written all the same, but what is INVALID or DIVERGED does not end as a success."""
    from rlhf_audit_nb.trail import Level

    code = _finish(args, result, words, evidence.verdict.exit_code(Level.UNANCHORED))
    if not evidence.trusted:
        _note(f"The verdict is {evidence.level}: it is written, but nothing in it is evidence.")
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
    return _finish(args, answer, words)


def _do_publish(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.tiles import publish_tiles

    done = publish_tiles(_trail_folder(args), args.target)
    answer = {"target": str(done.folder), "size": done.size, "written": done.written}
    return _finish(args, answer, [f"published   {done.folder}: {done.size} entries, {done.written} files written"])


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
    reader = TrailReader.open(_trail_folder(args))
    ledger = fold(reader.entries())
    if ledger.unit is None:
        answer: dict[str, Any] = {"unit": None, "epsilon": 0.0, "delta": args.delta, "spends": []}
        return _finish(args, answer, ["Nothing was spent: no run with differential privacy stands on this trail."])
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
    return _finish(args, {**answer, "budgets": budgets, "spends": spends}, words)


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


# -- the grammar ------------------------------------------------------------------------------------------------

SECTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "train and record",
        (
            ("demo", "the main job on a small data set, or on yours: model, record, reports"),
            ("run", "execute a notebook into a signed record"),
        ),
    ),
    ("check", (("verify", "check a record or a trail and say how far the check reaches"),)),
    (
        "say",
        (
            ("report", "write the compliance report of a record or a trail (HTML, PDF or JSON)"),
            ("card", "write the model card"),
            ("budget", "what a plan would cost (plan), what a trail has spent (show)"),
        ),
    ),
    ("share", (("publish", "write a trail as static files (C2SP tlog-tiles) that anyone can check"),)),
)
COMMANDS = {name: text for _, commands in SECTIONS for name, text in commands}


class _Parser(argparse.ArgumentParser):
    """argparse in the words of this package: one sentence, the close match, the next step; exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.", next_step=f"See {self.prog} --help.", code="usage")

    def options(self) -> list[str]:
        """Every option that this command takes."""
        return [text for action in self._actions for text in action.option_strings]

    def all_options(self) -> list[str]:
        """Those, and every one that a part of it takes."""
        groups = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        return self.options() + [text for parts in groups for part in parts.values() for text in part.all_options()]


def _overview() -> str:
    lines = ["RLHF training that can be proved.", ""]
    for title, commands in SECTIONS:
        lines += [f"{title}:", *(f"  {name:<8} {text}" for name, text in commands), ""]
    lines += [
        f"{PROGRAM} COMMAND --help tells what a command takes. Exit codes: 0 done, 1 a notebook failed,",
        "2 usage or bad input, 3 refused (budget, policy); verdicts: 10 below what was required, 30 DIVERGED,",
        "40 INVALID.",
    ]
    return "\n".join(lines)


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND …",
        description=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", help=argparse.SUPPRESS, metavar="COMMAND", parser_class=_Parser)
    shared = _Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="one JSON object on stdout, words on stderr")
    made = {}
    for name, build in _BUILDERS.items():
        made[name] = commands.add_parser(
            name, prog=f"{PROGRAM} {name}", description=COMMANDS[name], parents=[shared], allow_abbrev=False
        )
        build(made[name])
    return parser, made


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(do=_do_demo)
    parser.add_argument("--data", metavar="FILE|NAME", help="preferences: JSON lines, CSV, parquet, or a hub name")
    parser.add_argument(
        "--columns", metavar="OURS=THEIRS,…", help="what prompt, chosen, rejected, annotator_id are called"
    )
    parser.add_argument("--epsilon", type=float, metavar="E", help="the annotators' privacy budget (8)")
    parser.add_argument("--delta", type=float, metavar="D", help="probability with which the bound may fail (1e-5)")
    parser.add_argument("--unit", choices=("annotator", "pair"), help="what is protected (annotator)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (30)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the model's first weights (42)")
    parser.add_argument("--model", metavar="NAME|DIR", help="train LoRA adapters on this model, not on a tiny new one")
    parser.add_argument("-o", "--out", default="out/demo", metavar="DIR", help="where everything goes (out/demo)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(do=_do_run)
    parser.add_argument("notebook", metavar="NOTEBOOK")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="repeatable"
    )
    parser.add_argument("-o", "--out", metavar="RECORD.ipynb", help="the record (NOTEBOOK.record.ipynb)")
    parser.add_argument("--trail", metavar="DIR", help="the trail's folder ($RLHF_AUDIT_TRAIL, else audit)")
    parser.add_argument("--kernel", metavar="NAME", help="another kernel than the notebook names")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RECORD.ipynb|TRAIL")
    parser.add_argument("--policy", metavar="FILE", help="whom to trust (default: the user's own keys)")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(do=_do_verify)
    _add_target(parser)
    parser.add_argument("--require", choices=LEVELS, type=str.upper, help="a lower level is a failure")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(do=_do_report)
    _add_target(parser)
    parser.add_argument("--format", choices=("html", "pdf", "json"), default="html")
    parser.add_argument("--mode", default="eu_ai_act", metavar="FRAMEWORK", help="what it assesses against (eu_ai_act)")
    parser.add_argument("-o", "--out", metavar="FILE", help="where it goes (beside the target)")


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(do=_do_card)
    _add_target(parser)
    parser.add_argument(
        "--format", default="eu_standard", metavar="FORMAT", help="eu_standard, huggingface or json (eu_standard)"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="where it goes (stdout)")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(
        dest="part", prog=f"{PROGRAM} budget", required=True, metavar="plan|show", parser_class=_Parser
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
    show.add_argument("--trail", metavar="DIR", help="the trail's folder ($RLHF_AUDIT_TRAIL, else audit)")
    show.add_argument("--delta", type=float, default=1e-5, metavar="D", help="(1e-5)")
    for part in (plan, show):
        # SUPPRESS: an absent flag here must not overwrite one given before the part.
        part.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object on stdout")


def _add_publish(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(do=_do_publish)
    parser.add_argument("target", metavar="FOLDER", help="where the files go; what is there already is not rewritten")
    parser.add_argument("--trail", metavar="DIR", help="the trail's folder ($RLHF_AUDIT_TRAIL, else audit)")


_BUILDERS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "demo": _add_demo,
    "run": _add_run,
    "verify": _add_verify,
    "report": _add_report,
    "card": _add_card,
    "budget": _add_budget,
    "publish": _add_publish,
}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if not argv:
        parser.print_help()
        raise SystemExit(0)
    first = argv[0]
    if first.startswith("-") and first not in parser.options():
        raise ConfigError(
            f"{first!r} stands before the command.", next_step=f"Write {PROGRAM} COMMAND {first}.", code="usage"
        )
    if not first.startswith("-") and first not in commands:
        raise ConfigError(
            f"There is no command {first!r}.{_did_you_mean(first, commands)}",
            next_step=f"See {PROGRAM} --help.",
            code="usage",
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = commands[args.command].all_options()
        raise ConfigError(
            f"{PROGRAM} {args.command} does not take {unknown[0]!r}.{_did_you_mean(unknown[0], known)}",
            next_step=f"See {PROGRAM} {args.command} --help.",
            code="usage",
        )
    if not hasattr(args, "do"):
        parser.error(f"name a command: {', '.join(commands)}")
    return args


def _did_you_mean(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(given)
        do: Command = args.do
        return do(args)
    except AuditError as error:
        _note(f"error: {error.message}")
        for line in _raised_words(getattr(error, "said", "")):
            _note(line)
        if error.next_step:
            _note(f"Next step: {error.next_step}")
        if "--json" in given:
            reason = {"code": error.reason, "message": error.message, "next_step": error.next_step}
            print(json.dumps({"error": reason}, ensure_ascii=False))
        return error.exit_code
    except KeyboardInterrupt:
        _note("interrupted; what was recorded until now is kept")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more may be written, not even by the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _note(f"error: {where}{error.strerror or error}.")
        _note("Next step: check the path, its permissions and the space left on the disk.")
        return 2


if __name__ == "__main__":
    sys.exit(main())
