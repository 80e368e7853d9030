"""Share: ``disclose``. Keep: ``erase``. Floor 6."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.cli.shared import Command, Parser, add_trail, finish, note, output, trail_folder
from rlhf_audit_nb.errors import ConfigError, VaultError

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Trail
    from rlhf_audit_nb.trail.erasure import ErasureDone

__all__ = ["COMMANDS"]

# The floor below has them too; a command line is built without importing it.
REASONS = ("request", "retention", "withdrawn")
MAX_ID = 4096


# disclose


def _do_disclose(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail import Trail
    from rlhf_audit_nb.trail.disclosure import SUFFIX, disclose
    from rlhf_audit_nb.trail.durable import write_durably
    from rlhf_audit_nb.trail.proof import parse_proof

    with Trail.open(trail_folder(args), create=False) as trail:
        disclosure = disclose(trail, args.index)
        path = output(args, Path(f"entry-{args.index}{SUFFIX}"))
        write_durably(path, disclosure.encode())
    head = parse_proof(disclosure.proof).head()
    answer = {"file": str(path), "entry": args.index, "origin": head.origin, "size": head.size}
    words = [
        f"disclosed   entry {args.index} in {path}, proved under the checkpoint of {head.size} entries",
        "  Whoever has this file reads the payload of this one entry; it opens nothing else.",
        f"  The auditor checks it with: rlhf-audit verify {path} --policy trust.policy",
    ]
    return finish(args, answer, words)


def _add_disclose(parser: Parser) -> None:
    parser.set_defaults(do=_do_disclose)
    parser.add_argument("index", metavar="INDEX", type=int, help="the entry's number in the trail")
    parser.add_argument("-o", "--out", metavar="FILE", help="the file (default: entry-INDEX.opening)")
    add_trail(parser)


# erase


def _do_erase(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail import Trail
    from rlhf_audit_nb.trail.erasure import erase

    owner = _owner(args)
    with Trail.open(trail_folder(args), create=False) as trail:
        trail.flush()
        try:
            count = trail.vault.count(owner, stream=args.run or "")
        except VaultError as error:
            finished = _finished(trail) if error.reason == "unknown-owner" else None
            if finished is None:
                raise
            return _tell(args, finished)
        if not args.yes:
            _ask(trail, count, "that annotator" if args.run is None else f"the run {args.run}")
        return _tell(args, erase(trail, owner, reason=args.reason, run=args.run))


def _owner(args: argparse.Namespace) -> str | None:
    """The annotator's id, which need not stand on the command line (nor in the shell's history)."""
    if sum(item is not None for item in (args.annotator, args.from_file, args.run)) != 1:
        raise ConfigError(
            "Name one annotator: the id, - to read it from stdin, or --from-file FILE; or one run with --run.",
            next_step="See rlhf-audit erase --help.",
            code="usage",
        )
    if args.run is not None:
        return None
    if args.from_file is None and args.annotator != "-":
        return str(args.annotator)
    try:
        if args.from_file is None:
            lines = [sys.stdin.readline(MAX_ID + 2).rstrip("\r\n")]
        else:
            with Path(args.from_file).open(encoding="utf-8") as file:
                lines = file.read(2 * MAX_ID).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"The id cannot be read: {reason}.", next_step="Check the path.", code="usage") from error
    if len(lines) != 1 or not 0 < len(lines[0]) <= MAX_ID:
        raise ConfigError(
            "There must be exactly one annotator's id, on one line.",
            next_step="Erase several one after the other.",
            code="usage",
        )
    return lines[0]


def _finished(trail: Trail) -> ErasureDone | None:
    """The erasure that opening the trail has just brought to its end."""
    from rlhf_audit_nb.trail.erasure import ErasureDone
    from rlhf_audit_nb.trail.vault import VAULT_ERASED, decode_erased

    entries = list(trail.reader().entries(trail.recovery.size, type=VAULT_ERASED))
    if not entries:
        return None
    said = decode_erased(entries[-1].body)
    count = next(item.openings for item in trail.vault.erasures() if item.name == said.erasure)
    return ErasureDone(said.erasure, entries[-1].index, count, said.generation, said.reason, finished=True)


def _ask(trail: Trail, count: int, whose: str) -> None:
    note(f"This takes {_payloads(count)} of {whose} out of the vault of {trail.location}, for good.")
    note("The trail keeps its entries and still verifies; it will say that something was erased, and not whose.")
    note("Every copy of vault.sqlite and vault.key from before is void afterwards, for all annotators.")
    if not sys.stdin.isatty():
        raise ConfigError(
            "Nobody is there to ask, so nothing was erased.", next_step="Add --yes to go ahead.", code="usage"
        )
    print("Erase? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("Nothing was erased.", next_step="Answer y, or add --yes, to go ahead.", code="declined")


def _payloads(count: int) -> str:
    return f"{count:,} private payload{'s' * (count != 1)}"


def _tell(args: argparse.Namespace, done: ErasureDone) -> int:
    finished = " (that erasure had been stopped half-way and is now finished)" if done.finished else ""
    words = [
        f"erased      {_payloads(done.openings)}{finished}; entry {done.entry} of the trail says so, and not whose",
        "  Copies of vault.sqlite and vault.key from before open nothing here any more: replace your backups.",
        "  Not erased: what was exported (reports, records, disclosures) and what a model has learned from the data.",
    ]
    return finish(args, asdict(done), words)


def _add_erase(parser: Parser) -> None:
    parser.set_defaults(do=_do_erase)
    parser.add_argument("annotator", metavar="ANNOTATOR_ID", nargs="?", help="whom; - reads the id from stdin")
    parser.add_argument("--from-file", metavar="FILE", help="read the id from a file, so that no history keeps it")
    parser.add_argument("--run", metavar="RUN", help="what a run itself holds (measurements, digests, seed) instead")
    parser.add_argument(
        "--reason",
        choices=REASONS,
        required=True,
        help="they asked, the time to keep their data is over, or they withdrew their consent",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_trail(parser)


COMMANDS = (
    Command("share", "disclose", "show one private payload to one auditor, and nothing else", _add_disclose),
    Command("keep", "erase", "take an annotator's private payloads out of the vault for good", _add_erase),
)
