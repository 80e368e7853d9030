"""Read: ``trail show``, ``trail tail`` and ``trail query``. Floor 6."""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.shared import (
    PROGRAM,
    WIDTH,
    Command,
    Parser,
    add_json,
    add_trail,
    as_json,
    finish,
    note,
    output,
    say,
    trail_folder,
)
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Entry
    from rlhf_audit_nb.trail.query import Filter, Item, Look

__all__ = ["COMMANDS"]

DAMAGED = 40
LAST = 10
MOST_TYPE = 24
LEAST_WHAT = 12
NO_RUN = "—"


def _look(args: argparse.Namespace) -> Look:
    from rlhf_audit_nb.trail.query import Look

    return Look(trail_folder(args))


def _filter(args: argparse.Namespace, look: Look) -> Filter:
    from rlhf_audit_nb.errors import FormatError
    from rlhf_audit_nb.trail.query import Filter, parse_time

    times = {}
    for name in ("since", "until"):
        given = getattr(args, name, None)
        try:
            times[name] = None if given is None else parse_time(given)
        except FormatError as error:
            raise ConfigError(f"--{name}: {error.message}", next_step=error.next_step, code="time") from error
    run = None if args.run is None else look.run_named(args.run)
    return Filter(run, args.type, getattr(args, "experiment", None), times["since"], times["until"])


# What stands in a line.


def _time(microseconds: int, unit: str = "seconds") -> str:
    try:
        when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    except OverflowError:
        return f"{microseconds} µs"
    return when.replace(tzinfo=None).isoformat(" ", unit)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "{" + _fields(value) + "}"
    if isinstance(value, list):
        return "[" + " ".join(map(_value, value)) + "]"
    return json.dumps(value)


def _fields(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={_value(value)}" for name, value in values.items())


def _what(entry: Entry, width: int) -> str:
    """The body in a line: its fields until the line is full, and whether there is a private half."""
    sealed = "[sealed] " if entry.envelope.sealed is not None else ""
    text = " ".join(_fields(json.loads(entry.body)).split())
    return _cut(sealed + _visible(text[: 4 * width]), width)


def _visible(text: str) -> str:
    """``text`` with nothing in it that could deceive; what is plain costs no import."""
    if text.isascii() and text.isprintable():
        return text
    from rlhf_audit_nb.compliance.words import visible

    return visible(text)


class _Table:
    """Lines of one width; the columns are as wide as this trail needs, so that lines can come one by one."""

    def __init__(self, look: Look) -> None:
        from rlhf_audit_nb.trail.query import Damaged

        self._damaged = Damaged
        self._look = look
        self._runs: dict[str, str] = {}
        self._learn()
        self._total = shutil.get_terminal_size((WIDTH, 24)).columns
        self._place = len(str(max(10_000, look.size())))
        self._type = min(MOST_TYPE, max(map(len, look.types()), default=4))
        self._run = max(map(len, [*self._runs.values(), "12345678"]))
        self._rest = max(LEAST_WHAT, self._total - self._place - 19 - self._run - self._type - 8)

    def _learn(self) -> None:
        self._runs = self._look.short_runs()

    def head(self) -> str:
        """The names of the columns."""
        return self._line("#", "time (UTC)", "run", "type", "what")

    def line(self, item: Item) -> str:
        """An entry in a line."""
        if isinstance(item, self._damaged):
            return _cut(f"{item.index:>{self._place}}  DAMAGED  {item.why}", self._total)
        run = item.run
        if run is not None and run not in self._runs:
            self._learn()  # it was started after this table was
        name = NO_RUN if run is None else self._runs.get(run, run)
        what = _what(item, self._rest)
        return self._line(str(item.index), _time(item.time), name, _cut(item.type, self._type), what)

    def _line(self, place: str, when: str, run: str, kind: str, what: str) -> str:
        return f"{place:>{self._place}}  {when:<19}  {run:<{self._run}}  {kind:<{self._type}}  {what}".rstrip()


def _plain(item: Item) -> dict[str, Any]:
    """An entry as JSON: its envelope and its place, the body as it was written."""
    from rlhf_audit_nb.trail.merkle import leaf_hash
    from rlhf_audit_nb.trail.query import Damaged

    if isinstance(item, Damaged):
        return {"index": item.index, "damaged": item.why}
    envelope = item.envelope
    return {
        "index": item.index,
        "type": envelope.type,
        "time": envelope.time,
        "run": envelope.run,
        "seq": envelope.seq,
        "writer": envelope.writer,
        "body": json.loads(item.body),
        "sealed": envelope.sealed,
        "leaf": base64.b64encode(leaf_hash(item.data)).decode(),
    }


def _print(args: argparse.Namespace, look: Look, items: Iterable[Item]) -> int:
    """Print entries as they come; the exit code says whether one of them is damaged."""
    from rlhf_audit_nb.trail.query import Damaged

    damaged = 0

    def counted() -> Iterator[Item]:
        nonlocal damaged
        for item in items:
            damaged += isinstance(item, Damaged)
            yield item

    if args.jsonl:
        number = _lines(lambda item: as_json(_plain(item)), counted())
    elif args.json:
        found = [_plain(item) for item in counted()]
        number = len(found)
        finish(args, {"origin": look.origin, "size": look.size(), "entries": found}, [])
    else:
        table = _Table(look)
        number = _lines(table.line, counted(), table.head)
    if not number:
        note(_nothing(args, look))
    if damaged:
        note(f"{damaged} of these {'is' if damaged == 1 else 'are'} damaged: `{PROGRAM} verify` tells what holds.")
    return DAMAGED if damaged else 0


def _lines(form: Callable[[Item], str], items: Iterable[Item], head: Callable[[], str] | None = None) -> int:
    number = 0
    for number, item in enumerate(items, 1):
        if number == 1 and head is not None:
            say(head())
        say(form(item))
    return number


def _nothing(args: argparse.Namespace, look: Look) -> str:
    types = look.types()
    kind = getattr(args, "type", None)
    if kind is not None and kind not in types:
        return f"No entry is of type {kind}. Types on this trail: {', '.join(types)}."
    return "No entry matches."


# The three of them.


def _do_show(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.query import Damaged, parse_range

    look = _look(args)
    size = look.size()
    places = parse_range(args.place, size)
    if (args.proof or args.entry) and len(places) != 1:
        raise ConfigError(
            f"{args.place} names {len(places)} entries.",
            next_step="Name one entry for --proof and --entry.",
            code="usage",
        )
    if args.proof or args.entry:
        return _export(args, look, places)
    if args.json or args.jsonl:
        return _print(args, look, look.entries(places))
    damaged = 0
    for item in look.entries(places):
        damaged += isinstance(item, Damaged)
        for line in _in_full(item, look, size):
            say(line)
    return DAMAGED if damaged else 0


def _export(args: argparse.Namespace, look: Look, places: range) -> int:
    from rlhf_audit_nb.trail.merkle import leaf_hash
    from rlhf_audit_nb.trail.proof import format_proof
    from rlhf_audit_nb.trail.query import Damaged

    (item,) = look.entries(places)
    if isinstance(item, Damaged):
        note(f"error: Entry {item.index} is damaged: {item.why}")
        return DAMAGED
    words, result = [], _plain(item)
    if args.proof:
        proof = look.proof(item.index)
        if not proof.check(leaf_hash(item.data)):
            note(f"error: Entry {item.index} is not under the newest checkpoint: `{PROGRAM} verify` tells what holds.")
            return DAMAGED
        path = _written(args, args.proof, format_proof(proof).encode())
        size = proof.head().size
        words.append(f"{path}: the proof that entry {item.index} stands under the checkpoint of {size} entries")
        result["proof"] = str(path)
    if args.entry:
        path = _written(args, args.entry, item.data)
        words.append(f"{path}: the entry's {len(item.data)} bytes, as they are hashed")
        result["entry"] = str(path)
    if args.proof and args.entry:
        words.append(f"Check them anywhere: {PROGRAM} verify {args.proof} --entry {args.entry} --policy FILE")
    return finish(args, result, words)


def _written(args: argparse.Namespace, name: str, data: bytes) -> Path:
    from rlhf_audit_nb.trail.durable import write_durably

    path = output(argparse.Namespace(**{**vars(args), "out": name}), Path(name))
    write_durably(path, data)
    return path


def _in_full(item: Item, look: Look, size: int) -> Iterator[str]:
    """An entry on as many lines as it needs."""
    import msgspec

    from rlhf_audit_nb.trail.merkle import leaf_hash
    from rlhf_audit_nb.trail.query import Damaged

    if isinstance(item, Damaged):
        yield f"entry {item.index} of {size:,}  DAMAGED"
        yield f"  {item.why}"
        return
    envelope, leaf = item.envelope, leaf_hash(item.data)
    proof = look.proof(item.index)
    head = proof.head()
    holds = "stands under" if proof.check(leaf) else "does NOT stand under"
    sealed = "none" if envelope.sealed is None else f"sealed, by the commitment {envelope.sealed}"
    within = f"number {envelope.seq} of its {'writer' if envelope.run is None else 'run'}"
    yield f"entry {item.index} of {size:,}  {envelope.type}"
    yield f"  time      {_time(envelope.time, 'microseconds')} UTC"
    yield f"  run       {envelope.run or NO_RUN}"
    yield f"  place     {within}, written by {envelope.writer}"
    yield f"  private   {sealed}"
    yield f"  leaf      {base64.b64encode(leaf).decode()}"
    yield f"  proof     {holds} the checkpoint of {head.size} entries, root {head.root_base64}"
    yield f"  body      {len(item.body):,} of {len(item.data):,} bytes"
    yield from (f"    {_visible(line)}" for line in msgspec.json.format(item.body, indent=2).decode().split("\n"))


def _do_tail(args: argparse.Namespace) -> int:
    look = _look(args)
    if args.number < 0:
        raise ConfigError(f"-n {args.number} is below 0.", next_step="Write how many entries to show.", code="usage")
    if args.follow and args.json:
        raise ConfigError(
            "--follow has no end, and --json prints one object at the end.", next_step="Take --jsonl.", code="usage"
        )
    chosen = _filter(args, look)
    size = look.size()
    items = look.tail(args.number, chosen)
    if not args.follow:
        return _print(args, look, items)
    try:
        return _print(args, look, _going_on(look, items, chosen, max(size, items[-1].index + 1 if items else 0)))
    except KeyboardInterrupt:
        return 0


def _going_on(look: Look, items: list[Item], chosen: Filter, start: int) -> Iterator[Item]:
    for item in chain(items, look.follow(chosen, start)):
        yield item
        sys.stdout.flush()


def _do_query(args: argparse.Namespace) -> int:
    look = _look(args)
    if args.limit is not None and args.limit < 1:
        raise ConfigError(
            f"--limit {args.limit} is below 1.", next_step="Write how many entries to show.", code="usage"
        )
    found = look.query(_filter(args, look))
    return _print(args, look, found if args.limit is None else islice(found, args.limit))


def _add_trail_command(parser: Parser) -> None:
    parts = parser.add_subparsers(
        dest="part", prog=f"{PROGRAM} trail", required=True, metavar="show|tail|query", parser_class=Parser
    )
    show = parts.add_parser("show", help="an entry in full, or several", allow_abbrev=False)
    show.set_defaults(do=_do_show)
    show.add_argument("place", metavar="INDEX|RANGE", help="7, -1 for the last, or 5:10 (10 not included)")
    show.add_argument("--proof", metavar="FILE", help="write its inclusion proof (C2SP .tlog-proof)")
    show.add_argument("--entry", metavar="FILE", help="write its bytes, as they are hashed")
    tail = parts.add_parser("tail", help="the last entries", allow_abbrev=False)
    tail.set_defaults(do=_do_tail)
    tail.add_argument("-n", "--number", type=int, default=LAST, metavar="N", help=f"how many ({LAST})")
    tail.add_argument("-f", "--follow", action="store_true", help="go on with those that come, until Ctrl-C")
    query = parts.add_parser("query", help="the entries that match", allow_abbrev=False)
    query.set_defaults(do=_do_query)
    for part in (tail, query):
        part.add_argument("--run", metavar="RUN", help="of this run (the beginning of its id is enough)")
        part.add_argument("--type", metavar="TYPE", help="of this type, such as run.started")
    query.add_argument("--experiment", metavar="NAME", help="of the runs of this experiment")
    query.add_argument("--since", metavar="TIME", help="from this time on: 2026-11-22, 2026-11-22T14:00 (UTC), or 2h")
    query.add_argument("--until", metavar="TIME", help="before this time")
    query.add_argument("--limit", type=int, metavar="N", help="no more than the first N")
    for part in (show, tail, query):
        add_trail(part)
        part.add_argument("--jsonl", action="store_true", help="one JSON object a line, for each entry")
        add_json(part)


COMMANDS = (
    Command(
        "check",
        "trail",
        "look into a trail: an entry (show), the last (tail), those that match (query)",
        _add_trail_command,
    ),
)
