"""Record what people said and how they work: ``annotations import|show|statistics|reidentify``. Floor 6."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.shared import (
    PROGRAM,
    WIDTH,
    Command,
    Parser,
    add_json,
    add_trail,
    finish,
    note,
    output,
    trail_folder,
)
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.annotations import ImportSummary, OpenedAnnotation
    from rlhf_audit_nb.privacy.pseudonyms import AnnotatorRow

__all__ = ["COMMANDS"]

SHOWN = 20
LEAST_K = 5
GROUPS = ("recorded", "stated", "unknown")


def _do_import(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.capture.annotation_rows import prepare_rows
    from rlhf_audit_nb.capture.annotations import append_annotations
    from rlhf_audit_nb.compliance.words import plural
    from rlhf_audit_nb.trail import Trail

    note(f"reading {args.file}")
    prepared = prepare_rows(
        args.file,
        columns=_pairs(args.columns, "--columns", "annotator_id=worker"),
        words=_words(args.words),
        shown=args.shown,
        guideline=args.guideline,
        guideline_file=args.guideline_file,
        extra=[name.strip() for name in args.extra.split(",") if name.strip()] if args.extra else (),
        public_digest=args.public_digest,
    )
    note(f"writing {plural(len(prepared.payloads), 'annotation')}")
    with Trail.open(trail_folder(args)) as trail:
        done = append_annotations(trail, prepared)
        origin = trail.origin
    header = prepared.header
    places = f"entry {done.first}" if done.rows == 1 else f"entries {done.first} to {done.last}"
    said = [
        f"import    {done.import_id}",
        f"trail     {trail_folder(args)} ({origin})",
        f"written   {plural(done.rows, header.kind)}: {places}",
        *_provenance_words(header.provenance),
    ]
    result = {**done.to_dict(), "origin": origin, "kind": header.kind, "provenance": header.provenance}
    return finish(args, result, said)


def _pairs(text: str | None, option: str, example: str) -> dict[str, str | None] | None:
    """``a=b,c=`` as a mapping, where nothing after the sign is ``None``."""
    if text is None:
        return None
    pairs: dict[str, str | None] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        left, equals, right = part.partition("=")
        if not equals or not left.strip() or left.strip() in pairs:
            what = "stands there twice" if left.strip() in pairs else "is no pair with an '='"
            raise ConfigError(f"{option}: {part!r} {what}.", next_step=f"Write such as {example}.", code="usage")
        pairs[left.strip()] = right.strip() or None
    return pairs


def _words(text: str | None) -> dict[str, str] | None:
    pairs = _pairs(text, "--words", "A=first,B=second,same=tie")
    return None if pairs is None else {theirs: ours or "" for theirs, ours in pairs.items()}


def _provenance_words(provenance: dict[str, str]) -> Iterator[str]:
    for group in GROUPS:
        names = [name for name, value in provenance.items() if value == group]
        if names:
            yield f"{group:<9} {', '.join(names)}"


def _do_show(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.capture.annotations import read_annotations, summarize_annotations
    from rlhf_audit_nb.trail import Trail, TrailReader

    if args.limit < 0:
        raise ConfigError(
            f"--limit is {args.limit}.", next_step="Give a number of annotations; 0 shows all.", code="usage"
        )
    folder = trail_folder(args)
    reader = TrailReader.open(folder)
    imports = [item for item in summarize_annotations(reader) if args.only in (None, item.import_id)]
    if args.only is not None and not imports:
        raise ConfigError(
            f"No import {args.only} is in this trail.",
            next_step=f"{PROGRAM} annotations show lists them all.",
            code="import",
        )
    result: dict[str, Any] = {"origin": reader.origin, "imports": [item.to_dict() for item in imports]}
    words = [line for item in imports for line in _import_words(item)]
    if not imports:
        words = ["No annotations are recorded in this trail."]
    if args.open:
        with Trail.open(folder, create=False) as trail:
            found = read_annotations(trail.reader(), trail.vault, import_id=args.only)
            opened = list(islice(found, args.limit or None))
        result["annotations"] = [item.to_dict() for item in opened]
        words += ["", *(line for item in opened for line in _opened_words(item))] if opened else []
        left = sum(item.recorded for item in imports) - len(opened)
        if left > 0:
            note(f"{left:,} more: --limit 0 shows all.")
    return finish(args, result, words)


def _import_words(item: ImportSummary) -> Iterator[str]:
    from rlhf_audit_nb.compliance.words import plural, short, time_text, visible

    where = "the trail itself" if item.run is None else f"run {item.run}"
    yield f"import {item.import_id}  entry {item.index}, {time_text(item.time)}, {where}"
    whole = "" if item.complete else f" of the {item.rows:,} that were announced: the import was cut short"
    yield f"  {plural(item.recorded, item.kind)} from {'a program' if item.form == 'values' else item.form}{whole}"
    if item.guideline is not None or item.guideline_digest is not None:
        digest = "" if item.guideline_digest is None else f" (sha256 {short(item.guideline_digest)})"
        yield f"  guideline {visible(item.guideline or 'without a name')}{digest}"
    for line in _provenance_words(item.provenance):
        yield f"  {line}"


def _opened_words(item: OpenedAnnotation) -> Iterator[str]:
    from rlhf_audit_nb.compliance.words import visible

    half = item.annotation
    if half is None:
        yield f"{item.index}  {item.state}"
        return
    # The choice is by place from 0; people count from 1.
    choice = f"response {half.choice + 1} of {len(half.responses)}" if isinstance(half.choice, int) else half.choice
    parts = [visible(half.annotator or "annotator unknown"), choice, _named("reward", half.reward)]
    parts += [_named("guideline", half.guideline), half.made_at]
    yield f"{item.index}  " + ", ".join(visible(part) for part in parts if part)
    texts = [half.prompt, *half.responses]
    names = ["prompt", *(str(place) for place in range(1, len(half.responses) + 1))]
    for name, text in zip(names, texts, strict=True):
        if text is not None:
            line = " ".join((text if isinstance(text, str) else str(text)).split())
            yield f"  {name:<7} {visible(line if len(line) <= WIDTH - 10 else line[: WIDTH - 11] + '…')}"


def _named(name: str, value: object) -> str | None:
    return None if value is None else f"{name} {value}"


def _do_statistics(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.privacy.k_anonymity import check_k
    from rlhf_audit_nb.privacy.pseudonyms import NOT_FOR_RELEASE, tabulate_annotators
    from rlhf_audit_nb.trail import Trail

    check_k(args.k)
    with Trail.open(trail_folder(args), create=False) as trail:
        table = tabulate_annotators(trail, import_id=args.only)
    result: dict[str, Any] = {"table": table.table, "entry": table.entry, "k": args.k}
    words = []
    if args.open:
        note("The rows are about single persons: for whoever holds the vault, and not for release.")
        result["rows"] = [asdict(row) for row in table.rows]
        words += [_row_words(row) for row in table.rows]
    if table.budgeted and args.open and args.out is None:
        note(NOT_FOR_RELEASE)
        return finish(args, result, words)
    released = table.release(args.k)
    result["released"] = released.to_dict()
    words += ["", *released.words()] if words else list(released.words())
    if args.out is not None:
        path = output(args, Path(args.out))
        path.write_text(json.dumps(released.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        words.append(f"written   {path}")
    return finish(args, result, words)


def _row_words(row: AnnotatorRow) -> str:
    figures = {name: getattr(row, name) for name in ("agreement", "first_shown", "ties", "undecided", "rating")}
    known = [f"{name} {value:.2f}" for name, value in figures.items() if value is not None]
    return f"{row.token}  {row.annotations:>6}  {'  '.join(known)}".rstrip()


def _do_reidentify(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.privacy.pseudonyms import reidentify
    from rlhf_audit_nb.trail import Trail

    with Trail.open(trail_folder(args), create=False) as trail:
        found = reidentify(trail, args.token, reason=args.reason, by=args.by)
    note("The trail says that this was asked, by whom and why.")
    return finish(args, {"annotator": found}, [found])


def _add_annotations(parser: Parser) -> None:
    parts = parser.add_subparsers(
        dest="part",
        prog=f"{PROGRAM} annotations",
        required=True,
        metavar="import|show|statistics|reidentify",
        parser_class=Parser,
    )
    bring = parts.add_parser("import", help="record a file of annotations in the trail", allow_abbrev=False)
    bring.set_defaults(do=_do_import)
    bring.add_argument("file", metavar="FILE", help="CSV, JSON lines, JSON (these also with .gz) or parquet")
    bring.add_argument(
        "--columns",
        metavar="OURS=THEIRS,…",
        help="what our fields are called there: prompt, chosen, rejected, or first, second, choice, or response, "
        "reward; shown, annotator_id, guideline, made_at. annotator_id= says that nobody knows",
    )
    bring.add_argument(
        "--words",
        metavar="THEIRS=OURS,…",
        help="what the words for choices and places mean: first, second, tie, undecided",
    )
    bring.add_argument("--shown", choices=("first", "second"), help="where the first (or chosen) response always stood")
    bring.add_argument("--guideline", metavar="VERSION", help="the guideline that all annotators were shown")
    bring.add_argument("--guideline-file", metavar="FILE", help="the guideline itself; its digest stands in the open")
    bring.add_argument("--extra", metavar="COLUMN,…", help="what else to keep, private as well")
    bring.add_argument(
        "--public-digest", action="store_true", help="the file is public anyway: its digest stands in the open"
    )
    add_trail(bring)
    show = parts.add_parser("show", help="what is recorded, by import", allow_abbrev=False)
    show.set_defaults(do=_do_show)
    show.add_argument("--import", dest="only", metavar="ID", help="only this import")
    show.add_argument("--open", action="store_true", help="with what they say, for who holds the vault's key")
    show.add_argument("--limit", type=int, default=SHOWN, metavar="N", help=f"open at most N ({SHOWN}; 0: all)")
    add_trail(show)
    parts_of_people = _add_people(parts)
    for part in (bring, show, *parts_of_people):
        add_json(part)


def _add_people(parts: Any) -> tuple[Parser, Parser]:
    table: Parser = parts.add_parser("statistics", help="how annotators work, under tokens", allow_abbrev=False)
    table.set_defaults(do=_do_statistics)
    table.add_argument("--import", dest="only", metavar="ID", help="only this import")
    table.add_argument("-k", type=int, default=LEAST_K, metavar="K", help=f"fewest people in a figure ({LEAST_K})")
    table.add_argument("--open", action="store_true", help="with a row a person under fresh tokens; not for release")
    table.add_argument("-o", "--out", metavar="FILE", help="write what may be passed on as JSON")
    add_trail(table)
    whose: Parser = parts.add_parser("reidentify", help="tell whose a token is, and record that", allow_abbrev=False)
    whose.set_defaults(do=_do_reidentify)
    whose.add_argument("token", metavar="TOKEN", help="from a table of this trail")
    whose.add_argument("--reason", required=True, metavar="TEXT", help="why; stands in the open")
    whose.add_argument("--by", required=True, metavar="NAME", help="who asks; stands in the open")
    add_trail(whose)
    return table, whose


COMMANDS = (
    Command(
        "train and record",
        "annotations",
        "what people said of responses: import, show, statistics; reidentify",
        _add_annotations,
    ),
)
