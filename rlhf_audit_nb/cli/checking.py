"""Check: ``verify``. Floor 6."""

from __future__ import annotations

import argparse
import base64
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.gating import names_gate_policy, verify_by_policy
from rlhf_audit_nb.cli.shared import (
    WIDTH,
    Command,
    Parser,
    add_policy,
    finish,
    is_bundle,
    is_record,
    is_record_address,
    note,
    read_policy,
    skip_address_parsers,
)
from rlhf_audit_nb.cli.weights import is_weights, verify_weights
from rlhf_audit_nb.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from rlhf_audit_nb.records import OpenedRecord
    from rlhf_audit_nb.records.signatures import Attestation
    from rlhf_audit_nb.trail import Reason, TrustPolicy, Verdict
    from rlhf_audit_nb.trail.entry import Entry

__all__ = ["COMMANDS", "add_target", "verdict_of", "verdict_words"]

LEVELS = ("UNANCHORED", "TIMESTAMPED", "COSIGNED")
PROOF_SUFFIX = ".tlog-proof"
MAX_FILE = 64 << 20
MOST_RUNS = 12
MOST_LINES = 40
QUIET_SECONDS = 2.0

Notes = Sequence["Reason"]
Signed = Sequence[tuple["Attestation", str]]


@dataclass(frozen=True)
class _Checked:
    """A verdict, what is worth knowing beside it, and what the target itself holds.

    Args:
        payload: the private half that a disclosure opens.
        record: the record, where it is one.
    """

    verdict: Verdict
    notes: Notes = ()
    payload: bytes | None = None
    record: OpenedRecord | None = None


def verdict_of(target: str, policy: TrustPolicy | None) -> tuple[Verdict, Notes]:
    """The verdict on a record or a trail, and what is worth knowing beside it and is no fault."""
    from rlhf_audit_nb.trail.published import is_published

    if is_record_address(target) or (not is_published(target) and is_record(target)):
        checked = _record(target, policy)
        return checked.verdict, checked.notes
    return _trail(target, policy), ()


def _record(target: str, policy: TrustPolicy | None, roots: Sequence[bytes] | None = None) -> _Checked:
    from rlhf_audit_nb.records import open_record

    return _checked_record(open_record(target, policy=policy, tsa_roots=roots))


def _checked_record(opened: OpenedRecord) -> _Checked:

    canaries = _canary_notes(opened.verdict, opened.entries)
    notes = (*opened.notes, *canaries)
    return _Checked(opened.verdict, notes, record=opened)


def _bundle(target: str, policy: TrustPolicy | None, roots: Sequence[bytes] | None) -> _Checked:
    skip_address_parsers()
    from rlhf_audit_nb.reports.bundle_reading import verify_bundle

    return _checked_record(verify_bundle(target, policy=policy, tsa_roots=roots))


def _trail(
    target: str, policy: TrustPolicy | None, roots: Sequence[bytes] | None = None, *, openings: bool = False
) -> Verdict:
    from rlhf_audit_nb.trail import verify_trail
    from rlhf_audit_nb.trail.published import is_published, verify_published

    progress = _progress()
    if not is_published(target):
        return verify_trail(Path(target), policy=policy, tsa_roots=roots, openings=openings, progress=progress)
    if openings:
        raise ConfigError(
            f"{target} is a published trail, which holds no private halves.",
            next_step="Leave --openings out, or name the trail's own folder.",
            code="usage",
        )
    return verify_published(target, policy=policy, tsa_roots=roots, progress=progress)


def _progress() -> Callable[[int, int], None]:
    """Tells on stderr how far long work is, every two seconds."""
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= QUIET_SECONDS:
            last = now
            note(f"checked {done:,} of {total:,} entries")

    return tell


# What verify can be given.


def _do_verify(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail import Level

    if is_weights(args.target):
        _refuse_for(args, "a folder of weights")
        return verify_weights(args)
    if names_gate_policy(args):
        _refuse_all_but_records(args)
        return verify_by_policy(args)
    policy = read_policy(args)
    checked = _verdict(args, policy)
    if args.trail and checked.record is None:
        raise ConfigError(
            f"--trail goes with a folder of weights or a record, and {args.target} is none.",
            next_step="Leave it out: a trail or a proof is checked by itself.",
            code="usage",
        )
    verdict, notes, payload = checked.verdict, checked.notes, checked.payload
    signed: Signed = ()
    if checked.record is not None:
        more, signed = _signatures(args, checked.record, policy)
        notes = (*notes, *more)
    require = Level[args.require] if args.require else None
    words, result = verdict_words(verdict, notes, _outcome_words(checked.record)), verdict.to_dict()
    if checked.record is not None and checked.record.sealed is not None:
        sealed = checked.record.sealed
        result["record"] = {"id": sealed.record, "status": sealed.status, "cell": sealed.cell, "reason": sealed.reason}
    if checked.record is not None:
        words += _tell_changes(args, checked.record, policy, result)
    if signed:
        words += _signed_words(signed)
        result["attestations"] = [{**asdict(item), "standing": standing} for item, standing in signed]
    if notes:
        result["notes"] = [{"code": one.code, "where": one.where, "message": one.message} for one in notes]
    if args.entry:
        words.append(f"  All this is said of {args.entry} and the checkpoint in {args.target}, of no other entry.")
    if payload:
        words += _payload_words(payload)
        result["payload"] = base64.b64encode(payload).decode()
    code = verdict.exit_code(require)
    if require is not None and code:
        words.append(f"  Required was {require.name}: refused.")
    return finish(args, result, words, code)


def _tell_changes(
    args: argparse.Namespace, record: OpenedRecord, policy: TrustPolicy | None, result: dict[str, Any]
) -> list[str]:
    """What was changed in a record since it was sealed, where that can be told; into the result as well."""
    from rlhf_audit_nb.config import DEFAULT_TRAIL, AuditConfig
    from rlhf_audit_nb.records.original import since_sealed
    from rlhf_audit_nb.reports.original import since_sealed_words

    beside = [Path(args.target).parent / DEFAULT_TRAIL] if Path(args.target).is_file() else []
    trails = [Path(args.trail)] if args.trail else [*beside, AuditConfig().trail_location()]
    found = since_sealed(record, trails, policy=policy)
    if found is None:
        return []
    result["since_sealed"] = found.to_dict()
    return since_sealed_words(found)


def _refuse_all_but_records(args: argparse.Namespace) -> None:
    """A policy for records says nothing of a trail, a proof or a disclosure; a bundle's record is one."""
    from rlhf_audit_nb.trail.disclosure import is_disclosure
    from rlhf_audit_nb.trail.published import is_published

    target = args.target
    # A bundle's folder has a checkpoint and tiles as a published trail has.
    published = not is_bundle(target) and is_published(target) and not is_record_address(target)
    of_record = not published and (
        is_record_address(target)
        or is_bundle(target)
        or (is_record(target) and not _is_proof(target) and not is_disclosure(target))
    )
    if not of_record:
        raise ConfigError(
            f"{args.policy} says what has to hold of a record, and {target} is none.",
            next_step="Name the trust policy (its log and quorum lines) that stands after trust: in it.",
            code="gate-policy",
        )
    if args.entry:
        raise ConfigError(
            f"--entry goes with a proof file, and {target} is none.", next_step="Leave it out.", code="usage"
        )
    _refuse_for(args, "a record", of_record=True)


def _verdict(args: argparse.Namespace, policy: TrustPolicy | None) -> _Checked:
    """What is found of whatever was named."""
    from rlhf_audit_nb.trail.disclosure import is_disclosure, verify_disclosure
    from rlhf_audit_nb.trail.published import is_published

    target = args.target
    published = is_published(target) and not is_record_address(target)
    if not published and Path(target).is_file() and _is_proof(target):
        return _Checked(_proof(args, policy))
    if args.entry:
        raise ConfigError(
            f"--entry goes with a proof file, and {target} is none.",
            next_step=f"`rlhf-audit trail show INDEX --proof FILE{PROOF_SUFFIX} --entry FILE` writes both.",
            code="usage",
        )
    if is_bundle(target):
        _refuse_for(args, "a bundle", of_record=True)
        return _bundle(target, policy, _roots(args))
    if published or Path(target).is_dir():
        verdict = _trail(target, policy, _roots(args), openings=args.openings)
        return _Checked(verdict, () if published else _ledger_notes(verdict, Path(target)))
    if is_disclosure(target):
        _refuse_for(args, "a disclosure")
        verdict, payload = verify_disclosure(target, policy=policy)
        return _Checked(verdict, payload=payload)
    if is_record(target):
        _refuse_for(args, "a record", of_record=True)
    return _record(target, policy, _roots(args))


def _signatures(args: argparse.Namespace, record: OpenedRecord, policy: TrustPolicy | None) -> tuple[Notes, Signed]:
    """People's signatures on a record, and what is worth knowing of them; with its trail, where that is at hand."""
    from rlhf_audit_nb.compliance.words import level_words
    from rlhf_audit_nb.records.attesting import ask_trail, attestation_notes, signed_by

    if not level_words(record.verdict.level.name).trusted:
        return (), ()
    known, notes = ask_trail(record, args.target, trail=args.trail, policy=policy)
    return (*attestation_notes(record, known), *notes), signed_by(record, (), known)


def _signed_words(signed: Signed) -> list[str]:
    lines = ["  signed by people:"]
    for item, standing in signed:
        replaced = "; replaced by a later signature with the same key" if item.replaced_by is not None else ""
        entry = f"; entry {item.entry.index} of the trail" if item.entry is not None else ""
        text = f"{item.in_words}{replaced}{entry}: {_one_line(item.statement)}"
        lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="      ")
        lines += textwrap.wrap(
            f"key {item.key_id[:16]}: {standing}", WIDTH, initial_indent="      ", subsequent_indent="      "
        )
    return lines


def _ledger_notes(verdict: Verdict, folder: Path) -> Notes:
    """What a trail whose signatures hold says of its privacy budget and is not believed."""
    from rlhf_audit_nb.compliance.words import level_words
    from rlhf_audit_nb.errors import PrivacyError
    from rlhf_audit_nb.privacy.reservation import read_ledger
    from rlhf_audit_nb.trail import Reason, TrailReader

    if not level_words(verdict.level.name).trusted:
        return ()
    reader = TrailReader.open(folder)
    try:
        doubts = read_ledger(reader).doubts()
    except PrivacyError as error:
        return (Reason(error.reason, "privacy ledger", error.message),)
    said = [Reason("settlement-not-believed", f"entry {spend.settled_in}", str(spend.doubt)) for spend in doubts]
    return (*said, *_canary_notes(verdict, reader.entries(type="privacy.audited")))


def _canary_notes(verdict: Verdict, entries: Iterable[Entry]) -> Iterator[Reason]:
    """Trainings whose own canaries contradict the epsilon that they claim."""
    from rlhf_audit_nb.compliance.words import level_words
    from rlhf_audit_nb.events import PrivacyAudited, decode_body
    from rlhf_audit_nb.privacy.canaries import audited_words
    from rlhf_audit_nb.trail import Reason

    if not level_words(verdict.level.name).trusted:
        return
    for entry in entries:
        if entry.type != PrivacyAudited.TYPE:
            continue
        event = decode_body(entry.type, entry.body)
        if isinstance(event, PrivacyAudited) and event.contradicts:
            yield Reason("contradicted-by-canaries", f"entry {entry.index}", audited_words(event))


def _is_proof(target: str) -> bool:
    from rlhf_audit_nb.trail.proof import HEADER

    if target.endswith(PROOF_SUFFIX):
        return True
    with Path(target).open("rb") as file:
        return file.read(len(HEADER) + 1) == HEADER.encode() + b"\n"


def _proof(args: argparse.Namespace, policy: TrustPolicy | None) -> Verdict:
    from rlhf_audit_nb.trail.verify import verify_proof

    _refuse_for(args, "a proof file")
    if args.entry is None:
        raise ConfigError(
            f"{args.target} proves that an entry is in a log; the entry is not in it.",
            next_step="Name the file with the entry's bytes with --entry.",
            code="usage",
        )
    try:
        return verify_proof(_bytes(args.target, "proof"), _bytes(args.entry, "entry"), policy=policy)
    except FormatError as error:
        raise ConfigError(
            f"{args.target} is not a proof file. {error.message}",
            next_step=f"`rlhf-audit trail show INDEX --proof FILE{PROOF_SUFFIX}` writes one.",
            code=error.reason,
        ) from error


def _refuse_for(args: argparse.Namespace, what: str, *, of_record: bool = False) -> None:
    """Refuse the options that say nothing about what was named: a check that was asked for is never left out unsaid."""
    for option, given in (("--openings", args.openings), ("--tsa-ca", args.tsa_ca and not of_record)):
        if given:
            raise ConfigError(
                f"{option} says nothing about {what}.", next_step="Leave it out, or name a trail.", code="usage"
            )


def _bytes(name: str, what: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(
            f"The {what} {name} cannot be read: {error.strerror or error}.", next_step="Check the path."
        ) from error
    if len(data) > MAX_FILE:
        raise ConfigError(f"The {what} {name} is over {MAX_FILE:,} bytes.", next_step="Check the path.")
    return data


def _roots(args: argparse.Namespace) -> Sequence[bytes] | None:
    """The authorities that ``--tsa-ca`` names; ``None`` leaves it to the home folder's."""
    if not args.tsa_ca:
        return None
    from rlhf_audit_nb.trail.keys import home_folder
    from rlhf_audit_nb.trail.timestamp import trusted_authorities

    return trusted_authorities(home_folder(None), args.tsa_ca)


# What a person reads.


def _outcome_words(record: OpenedRecord | None) -> list[str]:
    """How the notebook ended, by the seal: a record of a failure verifies as well as any other."""
    if record is None or record.sealed is None:
        return []
    from rlhf_audit_nb.compliance.words import short, visible

    sealed = record.sealed
    cells = (record.content or {}).get("cells", [])
    found = (number for number, cell in enumerate(cells, 1) if cell.get("id") == sealed.cell)
    where = f" in cell {next(found, '?')} (id {sealed.cell})" if sealed.cell else ""
    why = f": {sealed.reason}" if sealed.reason else ""
    return [f"  record {short(sealed.record)}: the notebook {visible(_one_line(sealed.status + where + why))}"]


def verdict_words(verdict: Verdict, notes: Notes, about: Sequence[str] = ()) -> list[str]:
    """The verdict for a person, with lines about what was verified."""
    from rlhf_audit_nb.compliance.words import level_words, short

    words = level_words(verdict.level.name)
    lines = textwrap.wrap(f"{verdict.level.name}  {words.shows}", WIDTH, subsequent_indent="  ")
    for reason in verdict.reasons:
        lines += _reason_words(reason, worth_knowing=reason.advisory and reason.code != "quorum")
    for found in notes:
        lines += _reason_words(found, worth_knowing=True)
    if verdict.size:
        signers = verdict.signed_by or "nobody that is trusted here"
        lines.append(f"  {verdict.origin}: {verdict.size:,} entries, root {short(verdict.root)}")
        lines.append(f"  signed by {signers}")
    lines += about
    lines += _anchor_words(verdict)
    lines += _opening_words(verdict)
    if len(verdict.runs) > MOST_RUNS:
        lines.append(f"  {len(verdict.runs) - MOST_RUNS:,} earlier runs (--json lists them all), and")
    for run in verdict.runs[-MOST_RUNS:]:
        # A status is whatever the trail says; it must not end this line and begin a verdict of its own.
        lines.append(f"  run {short(run.run)}: {_one_line(run.status)}, {run.entries} entries")
    return [*lines, *textwrap.wrap(words.not_shown, WIDTH, initial_indent="  ", subsequent_indent="  ")]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _reason_words(reason: Reason, *, worth_knowing: bool) -> list[str]:
    text = f"{'worth knowing: ' if worth_knowing else ''}{reason.where}: {reason.message} [{reason.code}]"
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _anchor_words(verdict: Verdict) -> list[str]:
    """Who has vouched for it, each by the newest that they said."""
    from rlhf_audit_nb.compliance.words import time_text

    newest = {(anchor.kind, anchor.by): anchor for anchor in verdict.anchors}
    lines = []
    for anchor in newest.values():
        done = "cosigned" if anchor.kind == "cosignature" else "timestamped"
        left = verdict.size - anchor.size
        reach = f"up to entry {anchor.size - 1}" if anchor.size else "while it was empty"
        after = (
            "" if left <= 0 else "; the one after that is not" if left == 1 else f"; the {left:,} after that are not"
        )
        by = anchor.by.split("+")[0]
        when = f"at {time_text(anchor.time * 1_000_000)}" if anchor.time else "without a time"
        lines.append(f"  {done} by {by} {when}, {reach}{after}")
    return lines


def _opening_words(verdict: Verdict) -> list[str]:
    found = verdict.openings
    if found is None:
        return []
    total = found["commitments"]
    if not found["checked"]:
        return [f"  {total:,} private halves are sealed; there is no vault here, so none was looked for"]
    parts = [f"{found[name]:,} {word}" for name, word in _OPENINGS if found[name]]
    opened = ", each of them opened and compared" if found["decrypted"] and found["openings"] else ""
    return [f"  {total:,} private halves: {', '.join(parts) or 'none'}{opened}"]


def _payload_words(payload: bytes) -> list[str]:
    """The private half that a disclosure opens, as it may be shown on a terminal."""
    import msgspec

    from rlhf_audit_nb.compliance.words import visible

    try:
        text = msgspec.json.format(payload, indent=2).decode()
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return [f"  the private half: {len(payload):,} bytes that are not JSON (--json gives them)"]
    lines = visible(text).splitlines()
    more = (
        [f"    … and {len(lines) - MOST_LINES:,} more lines (--json gives them all)"] if len(lines) > MOST_LINES else []
    )
    return ["  the private half:", *(f"    {line}" for line in lines[:MOST_LINES]), *more]


_OPENINGS = (("openings", "in the vault"), ("erased", "erased"), ("missing", "missing"))


def add_target(parser: Parser, *, also: str = "") -> None:
    """What is checked or told of, and whom to trust; ``also`` as in `add_policy`."""
    parser.add_argument("target", metavar="RECORD.ipynb|TRAIL", help="a record, or a trail's folder")
    add_policy(parser, also=also)


def _add_verify(parser: Parser) -> None:
    parser.set_defaults(do=_do_verify)
    parser.add_argument(
        "target",
        metavar="RECORD.ipynb|BUNDLE|TRAIL|URL|FILE|WEIGHTS",
        help="a record, a bundle of one (folder or zip), a trail's folder, a published trail (folder or address), a "
        "proof, a disclosure, or a folder of weights",
    )
    add_policy(parser, also="or what has to hold of a record, as for gate (YAML)")
    parser.add_argument("--require", choices=LEVELS, type=str.upper, help="a lower level is a failure")
    parser.add_argument("--openings", action="store_true", help="decrypt every private half too, and compare it")
    parser.add_argument(
        "--tsa-ca", action="append", metavar="FILE", help="trust this timestamping authority (PEM; may be repeated)"
    )
    parser.add_argument(
        "--trail",
        metavar="TRAIL|URL|RECORD",
        help="what weights are checked against ($RLHF_AUDIT_TRAIL, else audit); a record's trail (where it lies)",
    )
    parser.add_argument("--entry", metavar="FILE", help=f"the entry's bytes, for a {PROOF_SUFFIX} file")


COMMANDS = (Command("check", "verify", "check a record, a trail or saved weights: how far does it reach", _add_verify),)
