"""Check: ``attest``. Floor 6."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.keys import held_key, opened_trail, person_passphrase
from rlhf_audit_nb.cli.shared import PROGRAM, Command, Parser, add_policy, add_trail, finish, read_policy, wrapped
from rlhf_audit_nb.errors import AuditError, ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.records import OpenedRecord
    from rlhf_audit_nb.records.signatures import Attestation, TrailAttestation
    from rlhf_audit_nb.trail import TrustPolicy
    from rlhf_audit_nb.trail.signers import SigningKey

__all__ = ["COMMANDS"]

MEANINGS = ("approved", "reviewed", "responsible", "authored", "withdrawn")
SCHEMES = ("hsm:", "awskms:", "gcpkms:", "azurekms:", "hv:", "file2:")


def _do_attest(args: argparse.Namespace) -> int:
    policy = read_policy(args)
    if args.enter:
        return _do_enter(args, policy)
    for option, given in (("--role", args.role), ("--statement", args.statement)):
        if not given:
            raise ConfigError(
                f"{option} is missing.",
                next_step=f'Write {PROGRAM} attest {args.record} --role "compliance officer" --statement "…".',
                code="usage",
            )
    from rlhf_audit_nb.records import open_record
    from rlhf_audit_nb.records.attesting import attest_record, meaning_of
    from rlhf_audit_nb.trail.verify import store_path

    # Before a passphrase is asked for.
    open_record(args.record, policy=policy)
    if args.trail and not store_path(args.trail).is_file():
        raise ConfigError(
            f"There is no trail in {args.trail}; nothing was signed.",
            next_step="Name the record's trail, or leave --trail out and have its keeper enter the signature.",
            code="trail",
        )
    name, key = _signer(args)
    item = attest_record(
        args.record,
        key,
        name=name,
        role=args.role,
        statement=args.statement,
        meaning=meaning_of(args.meaning, reject=args.reject),
        purpose=args.purpose,
        policy=policy,
    )
    words = [
        f"signed   {args.record}",
        *wrapped(f"         {item.in_words}"),
        f"         key {item.key_id}",
    ]
    entered, why = _entered(args, open_record(args.record, policy=policy), policy)
    words += _entered_words(args, entered, why)
    answer = {"record": args.record, **_plain(item), "entered": [asdict(one) for one in entered], "not_entered": why}
    return finish(args, answer, words)


def _do_enter(args: argparse.Namespace, policy: TrustPolicy | None) -> int:
    """Enter into the trail what was signed where the trail was not at hand; no person's key is asked for."""
    given = (args.role, args.statement, args.name, args.reject, args.meaning, args.purpose, args.key, args.public)
    if any(given):
        raise ConfigError(
            "--enter signs nothing: it enters into the trail what the record's people have signed.",
            next_step="Leave the other options out, but --trail and --policy.",
            code="usage",
        )
    from rlhf_audit_nb.records import open_record

    entered, why = _entered(args, open_record(args.record, policy=policy), policy)
    if why is not None:
        raise ConfigError(
            f"Nothing was entered: {why}", next_step="Name the record's trail: --trail DIR.", code="trail"
        )
    words = _entered_words(args, entered, None) or ["The trail knows all that is signed in this record."]
    return finish(args, {"record": args.record, "entered": [asdict(one) for one in entered]}, words)


def _entered(
    args: argparse.Namespace, opened: OpenedRecord, policy: TrustPolicy | None
) -> tuple[tuple[TrailAttestation, ...], str | None]:
    """What was entered into the record's trail, or why nothing was."""
    from rlhf_audit_nb.records.attesting import carry_to_copy, enter_attestations, trail_of
    from rlhf_audit_nb.trail.keys import have_keys, home_folder

    folder = Path(args.trail) if args.trail else trail_of(opened, args.record)
    if folder is None:
        return (), "the record's trail is not here."
    if not args.trail and not have_keys(home_folder(), opened.verdict.origin):
        return (), "the trail's keys are not here."
    try:
        with opened_trail(folder) as trail:
            entered = enter_attestations(trail, opened, policy=policy)
        carry_to_copy(folder, opened, policy=policy)
    except AuditError as error:
        return (), str(error)
    return entered, None


def _entered_words(args: argparse.Namespace, entered: tuple[TrailAttestation, ...], why: str | None) -> list[str]:
    if why is not None:
        return [
            *wrapped(f"not in the trail: {why}"),
            f"         Whoever keeps the trail enters it: {PROGRAM} attest {args.record} --enter --trail DIR",
            "         Until then nobody would miss this signature if it were taken out of the file.",
        ]
    return [f"entered  into the trail as entry {one.index}: {one.meaning} as {one.role}" for one in entered]


def _plain(item: Attestation) -> dict[str, Any]:
    fields = ("index", "name", "role", "meaning", "purpose", "statement", "time", "key_id", "digest")
    return {name: getattr(item, name) for name in fields}


def _signer(args: argparse.Namespace) -> tuple[str, SigningKey]:
    """The printed name and the key: one in the home folder by its person's name, a PEM file, or the URI of a holder."""
    from rlhf_audit_nb.trail.keys import home_folder
    from rlhf_audit_nb.trail.people import choose_person_key, person_name

    held = args.key is not None and args.key.startswith(SCHEMES)
    if args.public and not held:
        raise ConfigError("--public goes with --key URI.", next_step="Leave it out.", code="usage")
    if held:
        if not args.name:
            message = f"The key {args.key} does not say whose it is."
            raise ConfigError(message, next_step='Add --name "YOUR NAME".', code="usage")
        return person_name(args.name), held_key(args.key, args.public)
    chosen = choose_person_key(home_folder(), args.key, args.name)
    return chosen.name, chosen.open(person_passphrase(chosen))


def _add_attest(parser: Parser) -> None:
    parser.set_defaults(do=_do_attest)
    parser.add_argument("record", metavar="RECORD.ipynb")
    parser.add_argument("--role", metavar="ROLE", help='in which you sign, such as "compliance officer"')
    parser.add_argument("--statement", metavar="TEXT", help="what you have looked at and what you decide, in words")
    parser.add_argument("--name", metavar="NAME", help="your printed name (default: that of the key)")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--meaning", choices=MEANINGS, help="what the signature means (approved)")
    said.add_argument("--reject", action="store_true", help="refuse it")
    parser.add_argument("--for", dest="purpose", metavar="PURPOSE", help="the use that you speak of (default: any)")
    parser.add_argument("--key", metavar="NAME|FILE|URI", help="your key (default: the one person's that is here)")
    parser.add_argument("--public", metavar="FILE", help="its public half (PEM), where the holder does not tell it")
    parser.add_argument("--enter", action="store_true", help="sign nothing; enter into the trail what others signed")
    add_trail(parser)
    add_policy(parser)


COMMANDS = (Command("check", "attest", "sign a record as a person: approve it, or reject it", _add_attest),)
