"""Train and record: ``demo`` and ``run``. Floor 6."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlhf_audit_nb.cli.checking import verdict_of, verdict_words
from rlhf_audit_nb.cli.shared import Command, Parser, add_trail, beside, finish, note, output
from rlhf_audit_nb.errors import ConfigError, RecordError

__all__ = ["COMMANDS"]


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
    done = showcase.run_demo(Path(args.out), {k: v for k, v in settings.items() if v is not None}, note)
    return finish(args, done.to_dict(), done.words(), done.verdict.exit_code(None))


def _do_run(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.records import run_notebook
    from rlhf_audit_nb.records.places import STREAM, is_file, shown

    place = _record_place(args)
    values = _values(args)
    result = run_notebook(
        args.notebook,
        place,
        values,
        trail=args.trail,
        kernel_name=args.kernel,
        cwd=args.cwd,
        cell_timeout=args.cell_timeout,
        progress=_cell_progress,
    )
    answer = {
        "record": shown(place),
        "id": result.record,
        "status": result.status,
        "parameters": values,
        "trail": str(result.trail),
    }
    words = [f"record   {shown(place)}", f"trail    {result.trail}"]
    if place == STREAM:  # which holds the record, and nothing else
        for line in words:
            note(line)
        return 0
    try:
        verdict, notes = verdict_of(str(place), None)
    except RecordError as error:
        if is_file(place):
            raise
        note(f"the record was written and could not be read back, so it is not verified: {error.message}")
        return finish(args, {**answer, "verdict": None}, words)
    return finish(
        args,
        {**answer, "verdict": verdict.to_dict()},
        [*words, *verdict_words(verdict, notes)],
        verdict.exit_code(None),
    )


def _record_place(args: argparse.Namespace) -> Path | str:
    """Where the record goes: what ``-o`` names, else beside the notebook.

    Raises:
        ConfigError: that cannot be told, or cannot be written.
    """
    from rlhf_audit_nb.records.places import STREAM, is_file, shown

    if args.out == STREAM and args.json:
        raise ConfigError(
            "-o - writes the record to standard output, where --json writes its object.",
            next_step="Leave one of them out.",
            code="usage",
        )
    if args.out is not None and not is_file(args.out):
        return str(args.out)
    if args.out is None and not is_file(args.notebook):
        raise ConfigError(
            f"{shown(args.notebook)} is no file, so it is not known where the record should go.",
            next_step="Name it with -o: a file, an address, or - for standard output.",
            code="usage",
        )
    return output(args, beside(args.notebook, ".record.ipynb"))


def _values(args: argparse.Namespace) -> dict[str, Any]:
    """Parameters from files, from text, and typed one by one: what is said later counts."""
    from rlhf_audit_nb.records import read_parameters
    from rlhf_audit_nb.records.parameters import parse_parameters, read_parameters_file

    pairs = dict(args.parameter)
    if len(pairs) < len(args.parameter):
        raise ConfigError("A parameter is given twice.", next_step="Give each -p once.", code="usage")
    values: dict[str, Any] = {}
    for path in args.parameters_file:
        values |= read_parameters_file(path)
    for text in args.parameters_yaml:
        values |= parse_parameters(text, "-y")
    return values | read_parameters(args.notebook, pairs)


def _cell_progress(position: int, cells: int, state: str) -> None:
    note(f"cell {position + 1} of {cells}: {state}")


def _add_demo(parser: Parser) -> None:
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


def _add_run(parser: Parser) -> None:
    parser.set_defaults(do=_do_run)
    parser.add_argument("notebook", metavar="NOTEBOOK", help="a file, an address such as s3://…, or - (standard input)")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="repeatable"
    )
    parser.add_argument(
        "-f", "--parameters-file", action="append", default=[], metavar="FILE", help="parameters in YAML or JSON"
    )
    parser.add_argument(
        "-y", "--parameters-yaml", action="append", default=[], metavar="TEXT", help="the same, as text; -p goes before"
    )
    parser.add_argument(
        "-o", "--out", metavar="RECORD.ipynb", help="the record (NOTEBOOK.record.ipynb); - or s3://… too"
    )
    add_trail(parser)
    parser.add_argument("--kernel", metavar="NAME", help="another kernel than the notebook names")
    parser.add_argument("--cwd", metavar="DIR", help="the folder that the notebook runs in (this one)")
    parser.add_argument("--cell-timeout", type=_seconds, metavar="SECONDS", help="bound on one cell (none)")


def _seconds(text: str) -> int:
    seconds = int(text)
    if seconds < 1:
        raise ValueError(text)
    return seconds


COMMANDS = (
    Command(
        "train and record", "demo", "the main job on a small data set, or on yours: model, record, reports", _add_demo
    ),
    Command("train and record", "run", "execute a notebook into a signed record", _add_run),
)
