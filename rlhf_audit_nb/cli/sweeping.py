"""Many runs: ``sweep``. Floor 6."""

from __future__ import annotations

import argparse

from rlhf_audit_nb.cli.shared import Command, Parser, add_trail, finish, note

__all__ = ["COMMANDS"]


def _do_sweep(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.sweeping import run_sweep
    from rlhf_audit_nb.sweeping.sweep import release_sweep

    if args.release:
        folder = args.out if args.out is not None else f"{args.notebook.removesuffix('.ipynb')}.sweep"
        released = release_sweep(folder, args.trail)
        words = f"what was held for {len(released)} run{'s' * (len(released) != 1)} is given back"
        return finish(args, {"released": len(released)}, [words])
    result = run_sweep(
        args.notebook,
        args.grid,
        args.out,
        trail=args.trail,
        workers=args.workers,
        cluster=args.cluster,
        retries=args.retries,
        resume=args.resume,
        kernel_name=args.kernel,
        progress=note,
    )
    return finish(args, result.to_dict(), result.words(), result.exit_code)


def _add_sweep(parser: Parser) -> None:
    parser.set_defaults(do=_do_sweep)
    parser.add_argument("notebook", metavar="NOTEBOOK")
    parser.add_argument("--grid", required=True, metavar="GRID.yaml", help="the runs, and what each may spend")
    parser.add_argument("-o", "--out", metavar="DIR", help="where the records go (NOTEBOOK.sweep)")
    add_trail(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="runs at once (one a core; all of a cluster's)")
    parser.add_argument("--cluster", metavar="ADDRESS", help="the Dask scheduler whose workers run them")
    parser.add_argument(
        "--retries", type=int, default=1, metavar="K", help="how often a run that died starts again (1)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in DIR, and begin no new one")
    parser.add_argument("--release", action="store_true", help="give back what an unfinished sweep in DIR still holds")
    parser.add_argument("--kernel", metavar="NAME", help="another kernel than the notebook names")


COMMANDS = (
    Command("train and record", "sweep", "execute a notebook once for each point of a grid, into records", _add_sweep),
)
