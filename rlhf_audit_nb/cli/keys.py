"""Keep: ``keys``. Floor 6.

A passphrase comes from ``RLHF_AUDIT_PASSPHRASE`` (that of the keys as they are; of a person's key:
``RLHF_AUDIT_PERSON_PASSPHRASE``) or ``RLHF_AUDIT_NEW_PASSPHRASE`` (the one that they are to have), or is asked for on
the terminal; never from the command line, where other users see it.
"""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.shared import (
    PROGRAM,
    Command,
    Parser,
    add_json,
    add_policy,
    add_trail,
    finish,
    output,
    read_policy,
    trail_folder,
)
from rlhf_audit_nb.config import ENV_PASSPHRASE, ENV_PERSON_PASSPHRASE
from rlhf_audit_nb.errors import ConfigError, FormatError, KeyFileError

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Trail
    from rlhf_audit_nb.trail.key_care import KeyInfo
    from rlhf_audit_nb.trail.people import ChosenKey, PersonKey
    from rlhf_audit_nb.trail.rotation import Rotation
    from rlhf_audit_nb.trail.signers import HeldKey

__all__ = ["COMMANDS", "held_key", "opened_trail", "person_passphrase", "read_file"]

ENV_NEW_PASSPHRASE = "RLHF_AUDIT_NEW_PASSPHRASE"
BACK_UP = f"The backup of these keys is out of date: make a new one ({PROGRAM} keys backup FILE)."
ROLES = ("log", "record", "model", "mldsa")


# -- what is asked for ----------------------------------------------------------------------------------------------


def _asks() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _ask(what: str, variable: str) -> str:
    if not _asks():
        raise KeyFileError(
            f"The {what} is needed, and there is no terminal to ask on.",
            next_step=f"Set {variable}.",
            code="passphrase",
        )
    return getpass.getpass(f"{what[:1].upper()}{what[1:]}: ")


def _new_passphrase(what: str) -> str:
    """The passphrase that something is to have; asked for twice where it is asked for."""
    given = os.environ.get(ENV_NEW_PASSPHRASE)
    if given:
        return given
    first = _ask(what, ENV_NEW_PASSPHRASE)
    if _ask(f"{what}, once more", ENV_NEW_PASSPHRASE) != first:
        raise KeyFileError("The two were not the same.", next_step="Try again; nothing was changed.", code="passphrase")
    return first


def _passphrase(home: Path, origin: str) -> str | None:
    """The passphrase of a ring; ``None`` where it needs none."""
    from rlhf_audit_nb.trail.key_care import list_keys

    given = os.environ.get(ENV_PASSPHRASE)
    if given or not any(info.encrypted for info in list_keys(home, origin)):
        return given
    return _ask(f"passphrase of the keys of {origin}", ENV_PASSPHRASE)


def _origin(args: argparse.Namespace, home: Path) -> str:
    """The origin that was named, the trail's, or the only one that there are keys for."""
    from rlhf_audit_nb.trail import TrailReader
    from rlhf_audit_nb.trail.keys import ring_origins

    if args.origin:
        return str(args.origin)
    folder = trail_folder(args)
    if args.trail or (folder / "trail.sqlite").exists():
        return TrailReader.open(folder).origin
    known = ring_origins(home)
    if len(known) == 1:
        return known[0]
    listed = f"There are keys for {', '.join(known)}." if known else f"There are no keys in {home / 'keys'}."
    raise ConfigError(
        f"It is not said whose keys are meant. {listed}",
        next_step="Name it: --origin NAME, or --trail DIR.",
        code="usage",
    )


def _home() -> Path:
    from rlhf_audit_nb.trail.keys import home_folder

    return home_folder()


@contextmanager
def opened_trail(folder: Path) -> Iterator[Trail]:
    """A trail to append to; passphrase and PIN are asked for where they are needed."""
    from rlhf_audit_nb.trail import Trail, TrailReader
    from rlhf_audit_nb.trail.key_care import list_keys

    origin = TrailReader.open(folder).origin
    _ask_for_pin(*(info.where for info in list_keys(_home(), origin)))
    with Trail.open(folder, create=False, passphrase=_passphrase(_home(), origin)) as trail:
        yield trail


def _ask_for_pin(*uris: str) -> None:
    """The PIN of a token, asked for where it is needed and there is somebody to ask."""
    from rlhf_audit_nb.trail.signers import ENV_SIGNER_PIN

    if any(uri.startswith("hsm:") for uri in uris) and not os.environ.get(ENV_SIGNER_PIN) and _asks():
        os.environ[ENV_SIGNER_PIN] = getpass.getpass("PIN of the token: ")


def read_file(path: str) -> bytes:
    """A file that the user has named; raises `ConfigError`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", next_step="Check the path.") from error


def held_key(uri: str, public: str | None) -> HeldKey:
    """The key that a URI names; ``public`` is the file of its public half, where its holder does not tell it."""
    from rlhf_audit_nb.trail.signers import HeldKey, public_of, read_public

    _ask_for_pin(uri)
    if ":" not in uri:
        raise ConfigError(
            f"{uri!r} is not the URI of a key.",
            next_step="Write it as hsm:2?label=TOKEN, awskms:ID, gcpkms:NAME, azurekms://…, hv:NAME/1 or file2:PATH.",
            code="usage",
        )
    try:
        return HeldKey(uri, read_public(read_file(public)) if public else public_of(uri))
    except FormatError as error:
        raise ConfigError(f"{public or uri}: {error.message}", next_step=error.next_step, code=error.reason) from error


# -- words ----------------------------------------------------------------------------------------------------------


def _where(info: KeyInfo) -> str:
    if info.status == "retired" or not info.where:
        return "no private half here"
    return info.where if info.where != "file" else f"file, {'encrypted' if info.encrypted else 'NOT encrypted'}"


def _status(info: KeyInfo) -> str:
    return info.status if info.until is None else f"{info.status}, counts to {info.until}"


def _table(infos: tuple[KeyInfo, ...]) -> list[str]:
    rows = [("role", "id", "kind", "status", "since", "where")]
    rows += [(i.role, i.id, i.kind or "-", _status(i), i.since or "-", _where(i)) for i in infos]
    widths = [max(len(row[at]) for row in rows) for at in range(5)]
    return ["  ".join([*(row[at].ljust(widths[at]) for at in range(5)), row[5]]).rstrip() for row in rows]


def _info_dict(info: KeyInfo) -> dict[str, Any]:
    return {**asdict(info), "id": info.id}


def _rotated_words(trail: Trail, done: Rotation) -> list[str]:
    from rlhf_audit_nb.trail.key_care import key_id

    old = "none" if done.old is None else key_id(done.role, done.old)
    lines = [f"{done.role} key   {old} -> {key_id(done.role, done.new)}, by entry {done.index} of {trail.origin}"]
    if done.role == "log":
        lines.append("Who trusts the old key follows to the new one by that entry, which the old key signed.")
        lines.append(f"For whoever starts to verify now: {PROGRAM} keys export -o trust.policy")
    return [*lines, BACK_UP]


# -- commands -------------------------------------------------------------------------------------------------------


def _do_create(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.key_care import check_passphrase, list_keys
    from rlhf_audit_nb.trail.keys import create_keys

    home, log = _home(), None
    if args.signer:
        log = held_key(args.signer, args.public)
    passphrase = ""
    if not args.no_passphrase:
        passphrase = os.environ.get(ENV_PASSPHRASE) or _new_passphrase("new passphrase")
        check_passphrase(passphrase)
    ring = create_keys(home, args.name, passphrase, log=log)
    infos = list_keys(home, args.name)
    words = [f"keys of {args.name}   {ring.folder.path}", *_table(infos), ring.log_vkey]
    words.append(f"Keep a backup ({PROGRAM} keys backup FILE): without these keys nobody can add to the trail.")
    answer = {"origin": args.name, "folder": str(ring.folder.path), "keys": [_info_dict(info) for info in infos]}
    return finish(args, answer, words)


def _do_list(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.key_care import list_keys
    from rlhf_audit_nb.trail.keys import ring_origins

    home = _home()
    rings = {origin: list_keys(home, origin) for origin in ring_origins(home)}
    words = []
    for origin, infos in rings.items():
        log = next(info for info in infos if info.role == "log")
        files = [info for info in infos if info.where == "file"]
        sealed = "encrypted" if all(info.encrypted for info in files) else "NOT encrypted"
        words.append(f"{origin}   log key {log.id} ({log.kind}), {len(infos)} keys, {sealed}")
    if not words:
        words = [f"There are no keys in {home / 'keys'}."]
    found = {origin: [_info_dict(info) for info in infos] for origin, infos in rings.items()}
    return finish(args, {"folder": str(home / "keys"), "origins": found}, words)


def _do_show(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.home import keys_folder
    from rlhf_audit_nb.trail.key_care import list_keys

    home = _home()
    origin = _origin(args, home)
    infos = list_keys(home, origin)
    words = [f"keys of {origin}   {keys_folder(home, origin)}", *_table(infos)]
    words += [info.key for info in infos if info.role == "log" and info.status == "in force"]
    answer = {"origin": origin, "folder": str(keys_folder(home, origin)), "keys": [_info_dict(info) for info in infos]}
    return finish(args, answer, words)


def _do_encrypt(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.key_care import encrypt_keys
    from rlhf_audit_nb.trail.keys import load_keys

    home = _home()
    origin = _origin(args, home)
    passphrase = _passphrase(home, origin)
    load_keys(home, origin, passphrase)  # a wrong one is told before a new one is asked for
    encrypt_keys(home, origin, None if args.remove else _new_passphrase("new passphrase"), passphrase)
    said = "are no longer encrypted" if args.remove else "are encrypted with the new passphrase"
    words = [f"The keys of {origin} {said}.", "Backups that were made before open with the passphrase of their time."]
    return finish(args, {"origin": origin, "encrypted": not args.remove}, words)


def _keep_held(trail: Trail, args: argparse.Namespace) -> None:
    """Refuse to put a key in a file into the place of one that is held elsewhere, unless that was said."""
    from rlhf_audit_nb.trail.key_care import list_keys

    for info in list_keys(trail.home, trail.origin):
        if info.role == args.role and info.status == "in force" and info.where != "file" and not args.in_file:
            raise ConfigError(
                f"The {args.role} key is held by {info.where}; a new one would lie in a file.",
                next_step=f"Make a new key there and name it with `{PROGRAM} keys use URI`, or say --in-file.",
                code="held",
            )


def _do_rotate(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.rotation import rotate_key

    with opened_trail(trail_folder(args)) as trail:
        _keep_held(trail, args)
        done = rotate_key(trail, args.role, reason=args.reason)
        return finish(args, asdict(done), _rotated_words(trail, done))


def _do_add_mldsa(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.rotation import rotate_key

    with opened_trail(trail_folder(args)) as trail:
        if trail.keys.mldsa is not None:
            raise KeyFileError(
                "The trail has an ML-DSA-44 key already.",
                next_step=f"To replace it: {PROGRAM} keys rotate mldsa.",
                code="same-key",
            )
        done = rotate_key(trail, "mldsa", reason=args.reason)
        words = [
            *_rotated_words(trail, done),
            "From now on each record carries a second signature, and so do checkpoints that are published or anchored.",
        ]
        return finish(args, asdict(done), words)


def _do_use(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.rotation import rotate_key

    key = held_key(args.uri, args.public)
    with opened_trail(trail_folder(args)) as trail:
        done = rotate_key(trail, args.role, new=key, reason=args.reason)
        words = [*_rotated_words(trail, done), f"What signs now is {key.uri}; the ring holds only its public half."]
        return finish(args, {**asdict(done), "uri": key.uri}, words)


def _named_key(infos: tuple[KeyInfo, ...], role: str, ident: str) -> str:
    found = [info.key for info in infos if info.role == role and (info.id.startswith(ident) or info.key == ident)]
    if len(found) != 1:
        many = "is the beginning of several" if found else "is the id of no"
        raise ConfigError(
            f"{ident!r} {many} {role} key{'s' * bool(found)}.", next_step=f"See {PROGRAM} keys show.", code="no-key"
        )
    return found[0]


def _do_revoke(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.key_care import key_id, list_keys
    from rlhf_audit_nb.trail.rotation import revoke_key

    with opened_trail(trail_folder(args)) as trail:
        path = output(args, Path(f"{args.role}.revoked")) if args.out else None
        infos = list_keys(trail.home, trail.origin)
        key = _named_key(infos, args.role, args.key) if args.key else None
        if key in (None, *(info.key for info in infos if info.role == args.role and info.status == "in force")):
            _keep_held(trail, args)
        statement, rotation = revoke_key(trail, args.role, key=key, since=args.since, reason=args.reason)
        words = [] if rotation is None else _rotated_words(trail, rotation)
        ident = key_id(statement.role, statement.key)
        words.append(f"revoked   {args.role} key {ident}: what it signed counts for {statement.since} entries")
        if path is not None:
            path.write_text(statement.note.format(), encoding="utf-8")
            words.append(f"statement {path}: hand it to whoever verifies ({PROGRAM} keys import {path.name})")
        else:
            words.append("No statement was written (-o FILE): a fork of the trail can leave the revocation out.")
        answer = {
            "role": statement.role,
            "key": statement.key,
            "since": statement.since,
            "successor": statement.successor,
            "rotation": None if rotation is None else asdict(rotation),
            "statement": None if path is None else str(path),
        }
        return finish(args, answer, words)


def _do_import(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.key_care import key_id
    from rlhf_audit_nb.trail.keys import local_policy
    from rlhf_audit_nb.trail.succession import keep_revocation, parse_revocation

    try:
        found = parse_revocation(read_file(args.file))
        policy = read_policy(args)
        if policy is None:
            try:
                policy = local_policy(_home(), found.origin)
            except KeyFileError:
                policy = None  # not the user's own trail: then the key itself must have signed
        signers = found.signed_by(policy.logs if policy is not None else ())
    except FormatError as error:
        raise ConfigError(
            f"{args.file}: {error.message}",
            next_step=error.next_step or "Ask the key-holder for it again.",
            code=error.reason,
        ) from error
    path = keep_revocation(_home(), found)
    ident = key_id(found.role, found.key)
    words = [
        f"imported  {found.role} key {ident} of {found.origin} counts for {found.since} entries",
        f"          kept in {path}",
    ]
    words += [f"          reason: {found.reason}"] if found.reason else []
    answer = {
        "origin": found.origin,
        "role": found.role,
        "key": found.key,
        "since": found.since,
        "signers": list(signers),
        "file": str(path),
    }
    return finish(args, answer, words)


def _do_export(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail import TrustPolicy
    from rlhf_audit_nb.trail.key_care import list_keys
    from rlhf_audit_nb.trail.keys import local_policy
    from rlhf_audit_nb.trail.note import format_vkey

    home = _home()
    origin = _origin(args, home)
    kept = ("in force",) if args.newest else ("in force", "retired")
    wanted = {info.key for info in list_keys(home, origin) if info.status in kept}
    policy = TrustPolicy(tuple(key for key in local_policy(home, origin).logs if format_vkey(key) in wanted))
    if not policy.logs:
        raise ConfigError(
            f"Every log key of {origin} that is here was revoked.",
            next_step=f"Make a new one: {PROGRAM} keys rotate.",
            code="revoked-key",
        )
    text = policy.format()
    if not args.out:
        return finish(args, {"origin": origin, "policy": text}, text.splitlines())
    path = output(args, Path("trust.policy"))
    path.write_text(text, encoding="utf-8")
    words = [
        f"policy   {path}: {len(policy.logs)} keys of {origin}; hand it over by another way than what it is to check"
    ]
    return finish(args, {"origin": origin, "policy": text, "file": str(path)}, words)


def _do_backup(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.durable import write_durably
    from rlhf_audit_nb.trail.key_care import backup_keys, note_backup

    home = _home()
    origin, path = _origin(args, home), Path(args.file)
    if path.exists():
        raise ConfigError(f"{path} exists already.", next_step="Name another file.", code="output")
    passphrase = os.environ.get(ENV_NEW_PASSPHRASE) or os.environ.get(ENV_PASSPHRASE)
    data = backup_keys(home, origin, passphrase or _new_passphrase("passphrase of the backup"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)
    note_backup(home, origin)
    words = [
        f"backup   {path}: all keys of {origin}, encrypted",
        "Keep it and its passphrase apart from this machine. Make a new one after each rotation and each erasure.",
    ]
    return finish(args, {"origin": origin, "file": str(path)}, words)


def _do_restore(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.key_care import list_keys, restore_keys

    home, data = _home(), read_file(args.file)
    passphrase = os.environ.get(ENV_PASSPHRASE) or _ask("passphrase of the backup", ENV_PASSPHRASE)
    origin = restore_keys(home, data, passphrase)
    infos = list_keys(home, origin)
    words = [f"restored   the keys of {origin}", *_table(infos)]
    return finish(args, {"origin": origin, "keys": [_info_dict(info) for info in infos]}, words)


# -- people ---------------------------------------------------------------------------------------------------------


def _do_person(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.people import people_here

    if args.name is None:
        people = people_here(_home())
        words = [line for person in people for line in _person_words(person)]
        words = words or ["There is no person's key here.", f'Make one: {PROGRAM} keys person --name "YOUR NAME".']
        return finish(args, {"people": [_person_dict(person) for person in people]}, words)
    person = next((one for one in people_here(_home()) if one.name == " ".join(args.name.split())), None)
    making = args.signer or args.no_passphrase or args.kind or args.public
    made = person is None or making
    if person is None or making:
        person = _made_person(args)
    words = _person_words(person)
    if made and person.where == "file":
        words += ["Copy that folder to a safe place: without the key you cannot answer what you have signed."]
    if args.out:
        path = output(args, Path("person.pub"))
        path.write_text(person.pem, encoding="utf-8")
        words.append(f"public key {path}: hand it to whoever writes the policy, by another way than the records")
    else:
        words += person.pem.splitlines()
    return finish(args, {**_person_dict(person), "made": bool(made), "file": args.out}, words)


def _made_person(args: argparse.Namespace) -> PersonKey:
    from rlhf_audit_nb.trail.people import create_person_key

    if args.signer:
        if args.kind or args.no_passphrase:
            raise ConfigError(
                "A key that is held elsewhere has its kind and its protection there.",
                next_step="Leave --kind and --no-passphrase out.",
                code="usage",
            )
        return create_person_key(_home(), args.name, None, held=held_key(args.signer, args.public))
    if args.public:
        raise ConfigError("--public goes with --signer.", next_step="Add --signer URI, or leave it out.", code="usage")
    passphrase = None if args.no_passphrase else _new_passphrase(f"new passphrase for the key of {args.name}")
    return create_person_key(_home(), args.name, passphrase, kind=args.kind or "p256")


def person_passphrase(key: ChosenKey) -> str | None:
    """The passphrase of a person's key; ``None`` where it needs none. The PIN of a token is asked for as well."""
    if key.person is not None:
        _ask_for_pin(key.person.where)
    if not key.encrypted:
        return None
    return os.environ.get(ENV_PERSON_PASSPHRASE) or _ask(f"passphrase of the key of {key.name}", ENV_PERSON_PASSPHRASE)


def _person_words(person: PersonKey) -> list[str]:
    state = "" if person.where != "file" else ", encrypted" if person.encrypted else ", NOT encrypted"
    return [
        f"{person.name}   {person.kind}, {person.where}{state}",
        f"  key id  {person.id}",
        f"  folder  {person.folder}",
    ]


def _person_dict(person: PersonKey) -> dict[str, Any]:
    return {
        "name": person.name,
        "kind": person.kind,
        "id": person.id,
        "where": person.where,
        "encrypted": person.encrypted,
        "folder": str(person.folder),
        "public": person.pem,
    }


# -- grammar --------------------------------------------------------------------------------------------------------


def _add_keys(parser: Parser) -> None:
    parts = parser.add_subparsers(
        dest="part",
        prog=f"{PROGRAM} keys",
        required=True,
        metavar="create|list|show|encrypt|rotate|revoke|import|export|add-mldsa|use|backup|restore|person",
        parser_class=Parser,
    )

    def part(name: str, do: Callable[[argparse.Namespace], int], words: str, needs: str = "") -> Parser:
        made = parts.add_parser(name, help=words, description=f"{words[:1].upper()}{words[1:]}.", allow_abbrev=False)
        made.set_defaults(do=do)
        if needs == "ring":
            made.add_argument("--origin", metavar="NAME", help="whose keys (default: the trail's, or the only ones)")
        if needs:
            add_trail(made)
        if needs == "trail":
            made.add_argument("--reason", metavar="TEXT", default="", help="one line, for whoever reads the trail")
        add_json(made)
        return made

    _add_rings(part)
    _add_changes(part)
    backup = part("backup", _do_backup, "write all keys of a trail into one encrypted file", "ring")
    backup.add_argument("file", metavar="FILE")
    restore = part("restore", _do_restore, "put keys back from a backup; nothing that is there is replaced")
    restore.add_argument("file", metavar="FILE")
    _add_person(part("person", _do_person, "a person's own key, to sign records with: make it, show its public half"))


def _add_person(person: Parser) -> None:
    person.add_argument("--name", metavar="NAME", help="the printed name (default: show whose keys are here)")
    person.add_argument("--kind", choices=("p256", "ed25519"), help="of a new key (p256)")
    person.add_argument("--signer", metavar="URI", help="the key is held there (HSM, key service); see `keys use`")
    person.add_argument("--public", metavar="FILE", help="its public half (PEM), where the holder does not tell it")
    person.add_argument("--no-passphrase", action="store_true", help="write the private key unencrypted")
    person.add_argument("-o", "--out", metavar="FILE", help="write the public key there (default: stdout)")


_Part = Callable[..., Parser]


def _add_rings(part: _Part) -> None:
    create = part("create", _do_create, "make the keys of a new trail, before its first run")
    create.add_argument("name", metavar="ORIGIN", help="the trail's name, such as example.org/team/helpfulness")
    create.add_argument("--signer", metavar="URI", help="the log key is held there (HSM, key service); see `keys use`")
    create.add_argument("--public", metavar="FILE", help="its public half (PEM), where the holder does not tell it")
    create.add_argument("--no-passphrase", action="store_true", help="write the private keys unencrypted")
    part("list", _do_list, "whose keys are here")
    part("show", _do_show, "the keys of one trail: kinds, ids, since when, where; the old ones too", "ring")
    encrypt = part("encrypt", _do_encrypt, "set, change or remove the passphrase of all keys of a trail", "ring")
    encrypt.add_argument("--remove", action="store_true", help="no passphrase any more")
    export = part("export", _do_export, "write the public keys as a trust policy (C2SP tlog-policy)", "ring")
    export.add_argument("--newest", action="store_true", help="without the keys that were replaced")
    export.add_argument("-o", "--out", metavar="FILE", help="default: stdout")


def _add_changes(part: _Part) -> None:
    rotate = part("rotate", _do_rotate, "give a role a new key; the old one signs the entry that names it", "trail")
    rotate.add_argument(
        "role", metavar="ROLE", nargs="?", choices=ROLES, default="log", help=f"{'|'.join(ROLES)} (log)"
    )
    rotate.add_argument("--in-file", action="store_true", help="also in the place of a key that is held elsewhere")
    part("add-mldsa", _do_add_mldsa, "second signatures with ML-DSA-44, for what is meant to last", "trail")
    use = part("use", _do_use, "let a key sign that an HSM or a key service holds", "trail")
    use.add_argument(
        "uri", metavar="URI", help="hsm:ID?label=TOKEN, awskms:ID, gcpkms:NAME, azurekms://…, hv:NAME/1, …"
    )
    use.add_argument("--role", choices=("log", "record"), default="log", help="(log)")
    use.add_argument("--public", metavar="FILE", help="the public half (PEM), where the holder does not tell it")
    revoke = part("revoke", _do_revoke, "say that a key no longer counts; one in force is replaced first", "trail")
    revoke.add_argument("--role", choices=ROLES, default="log", help="(log)")
    revoke.add_argument("--key", metavar="ID", help="the key's id (default: the key in force)")
    revoke.add_argument("--since", type=int, metavar="N", help="it counts for the first N entries (default: those now)")
    revoke.add_argument("--in-file", action="store_true", help="also where the new key takes the place of a held one")
    revoke.add_argument("-o", "--out", metavar="FILE", help="write the statement for those who verify")
    bring = part("import", _do_import, "keep a revocation that a key-holder has sent; every verification honours it")
    bring.add_argument("file", metavar="FILE")
    add_policy(bring)


COMMANDS = (
    Command("keep", "keys", "make, encrypt, rotate, revoke and back up the keys of a trail, and of people", _add_keys),
)
