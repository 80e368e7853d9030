"""Train and record: ``demo`` and ``run``. Floor 6."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlhf_audit_nb.cli.checking import verdict_of, verdict_words
from rlhf_audit_nb.cli.shared import Command, Parser, add_trail, beside, finish, note, output
from rlhf_audit_nb.errors import ConfigError

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
    from rlhf_audit_nb.records import read_parameters, run_notebook

    pairs = dict(args.parameter)
    if len(pairs) < len(args.parameter):
        raise ConfigError("A parameter is given twice.", next_step="Give each -p once.", code="usage")
    path = output(args, beside(args.notebook, ".record.ipynb"))
    values = read_parameters(args.notebook, pairs)
    result = run_notebook(
        args.notebook, path, values, trail=args.trail, kernel_name=args.kernel, progress=_cell_progress
    )
    verdict, notes = verdict_of(str(path), None)
    answer = {
        "record": str(result.path),
        "id": result.record,
        "status": result.status,
        "trail": str(result.trail),
        "verdict": verdict.to_dict(),
    }
    words = [f"record   {result.path}", f"trail    {result.trail}", *verdict_words(verdict, notes)]
    return finish(args, answer, words, verdict.exit_code(None))


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
    parser.add_argument("notebook", metavar="NOTEBOOK")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="repeatable"
    )
    parser.add_argument("-o", "--out", metavar="RECORD.ipynb", help="the record (NOTEBOOK.record.ipynb)")
    add_trail(parser)
    parser.add_argument("--kernel", metavar="NAME", help="another kernel than the notebook names")


COMMANDS = (
    Command(
        "train and record", "demo", "the main job on a small data set, or on yours: model, record, reports", _add_demo
    ),
    Command("train and record", "run", "execute a notebook into a signed record", _add_run),
)
