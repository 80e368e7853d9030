"""Release labels privately, and list what was released: ``labels release`` and ``labels show``. Floor 6."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.shared import PROGRAM, Command, Parser, add_json, add_trail, finish, note, trail_folder

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.ledger import LabelSpend

__all__ = ["COMMANDS"]


def _do_release(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.compliance.words import epsilon_text, plural
    from rlhf_audit_nb.demo.preferences import parse_columns
    from rlhf_audit_nb.labelling import prepare_release
    from rlhf_audit_nb.trail import Trail

    note(f"reading {args.file}")
    prepared = prepare_release(
        args.file,
        epsilon=args.epsilon,
        columns=parse_columns(args.columns) if args.columns else None,
        keep=[name.strip() for name in args.keep.split(",") if name.strip()] if args.keep else (),
        words={theirs: ours or "" for theirs, ours in parse_columns(args.words).items()} if args.words else None,
        out=args.out,
        destroy_original=args.destroy_original,
    )
    with Trail.open(trail_folder(args)) as trail:
        done = prepared.release(trail)
        origin = trail.origin
    for sentence in done.warnings:
        note(f"warning: {sentence}")
    cost = f"{epsilon_text(done.epsilon_total)} of {done.budget:g}"
    said = [
        f"release   {done.release}",
        f"trail     {trail_folder(args)} ({origin}): entry {done.entry}",
        f"written   {done.path}: {plural(done.labels, 'label')}, each flipped with chance {done.flip_probability:.4g}",
        f"ε         {epsilon_text(done.epsilon)} for each label; a label has cost at most {cost}",
    ]
    if done.most_labels is not None and done.annotator_epsilon is not None:
        most = plural(done.most_labels, "label")
        said.append(f"annotator ε {epsilon_text(done.annotator_epsilon)} at δ {done.delta:g} for one who gave {most}")
    said += [f"original  {done.originals}", "The texts and who annotated are not protected."]
    return finish(args, {**done.to_dict(), "origin": origin}, said)


def _do_show(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.compliance.words import epsilon_text, plural
    from rlhf_audit_nb.privacy.reservation import read_ledger
    from rlhf_audit_nb.trail import TrailReader

    reader = TrailReader.open(trail_folder(args))
    ledger = read_ledger(reader)
    said = [
        f"{one.release}  entry {one.index}: {plural(one.labels, 'label')}, ε {epsilon_text(one.epsilon)} each"
        for one in ledger.releases
    ]
    if ledger.releases and ledger.limit is not None:
        said.append(
            f"A label has cost at most ε {epsilon_text(ledger.label_total)} of {ledger.limit.epsilon:g} altogether."
        )
    result = {
        "origin": reader.origin,
        "releases": [_plain(one) for one in ledger.releases],
        "epsilon_total": ledger.label_total,
        "budget": ledger.limit.epsilon if ledger.limit is not None else None,
    }
    return finish(args, result, said or ["No labels were released on this trail."])


def _plain(one: LabelSpend) -> dict[str, Any]:
    return {
        "release": one.release,
        "entry": one.index,
        "labels": one.labels,
        "epsilon": one.epsilon,
        "flip_probability": one.flip_probability,
        "epsilon_total": one.total,
    }


def _add_labels(parser: Parser) -> None:
    parts = parser.add_subparsers(
        dest="part", prog=f"{PROGRAM} labels", required=True, metavar="release|show", parser_class=Parser
    )
    release = parts.add_parser("release", help="flip labels at random and write them once", allow_abbrev=False)
    release.set_defaults(do=_do_release)
    release.add_argument("file", metavar="FILE", help="CSV, JSON lines, JSON (these also with .gz) or parquet")
    release.add_argument("--epsilon", type=float, required=True, metavar="E", help="what it costs each label")
    release.add_argument("-o", "--out", required=True, metavar="NOISY.jsonl", help="the noisy rows; a new file")
    release.add_argument(
        "--columns",
        metavar="OURS=THEIRS,…",
        help="what our fields are called there: prompt, chosen, rejected, or first, second, choice; annotator_id",
    )
    release.add_argument("--words", metavar="THEIRS=OURS,…", help="what the words for choices mean: first or second")
    release.add_argument("--keep", metavar="COLUMN,…", help="what else to carry over as it is; the rest is left behind")
    release.add_argument(
        "--destroy-original",
        action="store_true",
        help="overwrite and delete FILE once NOISY.jsonl is safe; the seed is not kept either",
    )
    add_trail(release)
    show = parts.add_parser("show", help="what was released on a trail", allow_abbrev=False)
    show.set_defaults(do=_do_show)
    add_trail(show)
    for part in (release, show):
        add_json(part)


COMMANDS = (
    Command(
        "train and record", "labels", "release preference labels privately (release), list them (show)", _add_labels
    ),
)
