"""Share: ``anchor`` and ``witness``. Floor 6."""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.cli.shared import (
    PROGRAM,
    WIDTH,
    Command,
    Parser,
    add_json,
    add_policy,
    add_trail,
    endorse,
    finish,
    note,
    output,
    read_policy,
    trail_folder,
)
from rlhf_audit_nb.errors import AnchorError, ConfigError, FormatError

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import TrailReader
    from rlhf_audit_nb.trail.anchoring import Anchoring, Asked
    from rlhf_audit_nb.trail.note import Verifier
    from rlhf_audit_nb.trail.submission import Submission
    from rlhf_audit_nb.trail.tile_reader import PublishedTree
    from rlhf_audit_nb.trail.witness import Reply, Witness

__all__ = ["COMMANDS"]

DEFAULT_PORT = 8742
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_FILE = 1 << 20
PREPARED = "Have it timestamped, and keep the answer: rlhf-audit anchor --add ANSWER.tsr"
LEVEL_WORDS = {
    "COSIGNED": "the quorum of witnesses has cosigned this checkpoint",
    "TIMESTAMPED": "a timestamp bounds when this checkpoint was written",
    "UNANCHORED": "nobody whose statement counts here has vouched for this checkpoint",
    "DIVERGED": "another history of this trail was vouched for; nothing more was asked or kept than is said here",
}
ANCHORED = {"cosignature": "cosigned", "timestamp": "timestamped"}


def _read(path: str, what: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(
            f"The {what} {path} cannot be read: {error.strerror}.", next_step="Check the path.", code="unreadable"
        ) from error
    if len(data) > MAX_FILE:
        raise ConfigError(f"The {what} {path} has over {MAX_FILE} bytes.", next_step="Name the right file.")
    return data


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}.", next_step="Name another file with -o.", code="output"
        ) from error


def _when(seconds: int | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# anchor


def _tsa_roots(args: argparse.Namespace) -> Sequence[bytes] | None:
    from rlhf_audit_nb.trail.home import home_folder
    from rlhf_audit_nb.trail.timestamp import trusted_authorities

    return trusted_authorities(home_folder(), args.tsa_ca) if args.tsa_ca else None


def _do_anchor(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.anchoring import add_anchor, anchor_trail, keep_checkpoint

    if args.record:
        return _anchor_a_record(args)
    policy, roots, trail = read_policy(args), _tsa_roots(args), trail_folder(args)
    if args.prepare:
        path = keep_checkpoint(trail, policy=policy, endorse=endorse)
        return finish(args, {"file": str(path)}, [f"kept  {path}", f"  {PREPARED}"])
    added = [
        add_anchor(trail, _read(name, "anchor"), policy=policy, tsa_roots=roots, name=name) for name in args.add or ()
    ]
    if added and not (args.tsa or args.witness):
        words = _wrapped(map(_asked_words, added))
        return finish(args, {"added": [vars(item) for item in added]}, words)
    done = anchor_trail(
        trail,
        policy=policy,
        witnesses=args.witness,
        authorities=args.tsa or (),
        tsa_roots=roots,
        endorse=endorse,
        timeout=args.timeout,
    )
    answer = {**done.to_dict(), **({"added": [vars(item) for item in added]} if added else {})}
    words = _wrapped([*map(_asked_words, added), *_anchor_words(done)])
    return finish(args, answer, words, done.exit_code)


def _anchor_a_record(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.records.anchoring import anchor_record

    for option, given in (("--add", args.add), ("--prepare", args.prepare)):
        if given:
            raise ConfigError(
                f"{option} is about the trail itself, and {args.record} was named.",
                next_step="Do it for the trail first, without the record; then anchor the record.",
                code="usage",
            )
    done = anchor_record(
        args.record,
        trail=args.trail,
        policy=read_policy(args),
        witnesses=args.witness,
        authorities=args.tsa or (),
        tsa_roots=_tsa_roots(args),
        endorse=endorse,
        timeout=args.timeout,
    )
    verdict, asked = done.opened.verdict, done.asked
    answer = {
        "record": args.record,
        "level": verdict.level.name,
        "added": done.added,
        "anchors": [anchor.to_dict() for anchor in verdict.anchors],
        "asked": None if asked is None else asked.to_dict(),
    }
    words = [f"{verdict.level.name}  {args.record}: {LEVEL_WORDS[verdict.level.name]}"]
    if asked is not None:
        words += map(_asked_words, asked.asked)
    words += [
        f"  {ANCHORED[anchor.kind]} by {anchor.by.split('+')[0]} at {_when(anchor.time)}, {anchor.size:,} entries"
        for anchor in verdict.anchors
    ]
    if not done.added:
        words.append("  It had all of this before.")
    return finish(args, answer, _wrapped(words), 0 if asked is None else asked.exit_code)


def _wrapped(lines: Iterable[str]) -> list[str]:
    fitting = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 4, break_long_words=False, break_on_hyphens=False)
    return [part for line in lines for part in fitting.wrap(line)]


def _asked_words(item: Asked) -> str:
    mark = "ok    " if item.good else "FAILED"
    time = f"  {_when(item.time)}" if item.time is not None else ""
    return f"  {mark} {item.kind:<11} {item.whom}: {item.message}{time}{'' if item.good else f' [{item.outcome}]'}"


def _anchor_words(done: Anchoring) -> list[str]:
    lines = [f"{done.level.name}  {done.origin}: {done.size} entries; {LEVEL_WORDS[done.level.name]}"]
    lines += map(_asked_words, done.asked)
    if done.quorum is False and done.exit_code == AnchorError.exit_code:
        lines.append("  The quorum of the trust policy was not reached. Run the same command again: what came is kept.")
    shown = [reason for reason in done.reasons if reason.code not in ("anchor-unknown", "tsa-unknown")]
    return [*lines, *(f"  {reason.where}: {reason.message} [{reason.code}]" for reason in shown)]


def _add_anchor(parser: Parser) -> None:
    parser.set_defaults(do=_do_anchor)
    parser.add_argument("record", nargs="?", metavar="RECORD", help="a sealed notebook to put the anchors into")
    parser.description = (
        "Asks witnesses for cosignatures and timestamping authorities for timestamps of a trail's newest checkpoint, "
        "verifies what comes and keeps it in the trail's folder anchors/. With RECORD, what was said of its trail "
        "since it was sealed is put into that record; somebody is asked where they are named, or where what is there "
        "is not enough. Nobody is contacted who is not named here or has no address in the policy. Exit codes: 0 all "
        "that was needed came, 3 something did not, 30 a witness has seen another history."
    )
    add_trail(parser)
    add_policy(parser)
    parser.add_argument(
        "--witness",
        action="append",
        metavar="NAME|URL",
        help="a witness of the policy, by its name there or its address (default: all that have an address)",
    )
    parser.add_argument("--tsa", action="append", metavar="URL", help="a timestamping authority (RFC 3161)")
    parser.add_argument(
        "--tsa-ca",
        action="append",
        metavar="FILE",
        help="the authority's root certificate, PEM (default: those in tsa/ in the keys' home)",
    )
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--add", action="append", metavar="FILE", help="keep an answer that came as a file")
    files.add_argument("--prepare", action="store_true", help="ask nobody; write the file that is to be timestamped")
    parser.add_argument("--timeout", type=_seconds, default=30.0, metavar="S", help="how long to wait for each (30)")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:  # noqa: PLR2004 (an hour)
        raise argparse.ArgumentTypeError("a number of seconds from above 0 to 3600")
    return seconds


# witness


def _witness(args: argparse.Namespace, *, cosign: bool = True) -> Witness:
    from rlhf_audit_nb.trail.witness import Witness

    return Witness.open(args.dir, cosign=cosign)


def _do_init(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.witness import Witness

    made = Witness.create(args.dir, args.name, mldsa=args.ml_dsa)
    sealed = b"ENCRYPTED" in (made.folder / "ed25519.pem").read_bytes()
    label = made.name.rsplit("/", 1)[-1]
    words = [f"witness {made.name} in {made.folder}", "  For the trust policies of those who rely on it:"]
    words += [f"  witness {label}{'-ml-dsa' * number} {vkey}" for number, vkey in enumerate(made.vkeys)]
    if not sealed:
        words.append("  The key is not encrypted; set RLHF_AUDIT_PASSPHRASE before `witness init` to encrypt it.")
    words.append("  Never restore this folder from an older copy: a witness must not forget what it has cosigned.")
    answer = {"name": made.name, "folder": str(made.folder), "vkeys": made.vkeys, "encrypted": sealed}
    return finish(args, answer, words)


def _do_add_log(args: argparse.Namespace) -> int:
    vkeys = _log_keys(args.log)
    witness = _witness(args, cosign=False)
    added = [vkey for vkey in vkeys if witness.add_log(vkey)]
    words = [f"{'knows now' if vkey in added else 'knew'}  {vkey}" for vkey in vkeys]
    return finish(args, {"added": added, "known": [vkey for vkey in vkeys if vkey not in added]}, words)


def _log_keys(text: str) -> tuple[str, ...]:
    """The logs' keys in a policy file, or the one key that was written out."""
    from rlhf_audit_nb.trail import TrustPolicy

    if Path(text).is_file():
        try:
            return TrustPolicy.parse(_read(text, "trust policy")).log_keys
        except FormatError as error:
            raise ConfigError(
                f"{text} is not a trust policy. {error.message}", next_step="Name the policy file, or write the key."
            ) from error
    if text.count("+") < 2:  # noqa: PLR2004 (NAME+HASH+KEY)
        raise ConfigError(
            f"{text!r} is neither a file nor a log's verifier key.",
            next_step="Name the trust policy of the trail, or write the key as NAME+HASH+KEY.",
            code="vkey",
        )
    return (text,)


def _do_cosign(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.submission import format_submission

    witness = _witness(args)
    tree = "://" in args.target or Path(args.target).is_dir()
    body = format_submission(_from_tree(witness, args.target)) if tree else _read(args.target, "request")
    path = output(args, Path(f"{witness.name.rsplit('/', 1)[-1]}.cosigned"))
    reply = witness.add_checkpoint(body)
    if reply.status != 200:  # noqa: PLR2004
        raise _refused(witness, reply)
    given = body.split(b"\n\n", 1)[1] + reply.body
    _write(path, given)
    words = [
        f"cosigned  {reply.origin}: {reply.size} entries",
        f"  {path} holds the checkpoint with the cosignature; its trail's holder keeps it with",
        f"  {PROGRAM} anchor --policy FILE --add {path.name}",
    ]
    return finish(args, {"origin": reply.origin, "size": reply.size, "file": str(path)}, words)


REFUSED = {
    400: ("malformed", "Make the request again with `witness request`."),
    403: ("unsigned", "If the log's key was replaced, add the new one: `witness add-log DIR VKEY`."),
    404: ("unknown-log", "Get the log's key from its holder, by another way, and add it: `witness add-log DIR VKEY`."),
    409: ("stale", "Make the request again: `witness request --old {size}`."),
    422: ("inconsistent", "Sign nothing, and ask the trail's holder. Kept heads: `witness show DIR`."),
}


def _refused(witness: Witness, reply: Reply) -> AnchorError:
    code, step = REFUSED.get(reply.status, ("refused", ""))
    step = step.format(size=witness.size(reply.origin)) if reply.origin else step
    return AnchorError(f"The witness {witness.name} cosigns nothing: {reply.said}.", next_step=step, code=code)


def _from_tree(witness: Witness, target: str) -> Submission:
    """What a trail's folder, or a published one, would send this witness."""
    from rlhf_audit_nb.trail.checkpoint import checkpoint_of
    from rlhf_audit_nb.trail.submission import submission_of

    tree = _tree(target)
    text = tree.checkpoint()
    head = checkpoint_of(text)
    old = witness.size(head.origin)
    if old > head.size:
        raise AnchorError(
            f"The witness {witness.name} has cosigned {old} entries of {head.origin}; {target} has {head.size}.",
            next_step="Sign nothing, and ask the trail's holder where the newer entries are.",
            code="rollback",
        )
    return submission_of(text, old, tree.consistency_proof)


def _tree(target: str) -> TrailReader | PublishedTree:
    """The tree of a trail's folder, or of a published one."""
    from rlhf_audit_nb.trail import TrailReader
    from rlhf_audit_nb.trail.tile_reader import PublishedTree

    return TrailReader.open(target) if (Path(target) / "trail.sqlite").exists() else PublishedTree.open(target)


def _do_show(args: argparse.Namespace) -> int:
    witness = _witness(args, cosign=False)
    logs, evidence = witness.logs(), witness.evidence()
    words = [f"witness {witness.name}", *(f"  key   {vkey}" for vkey in witness.vkeys)]
    for log in logs:
        seen = "nothing cosigned yet" if log.size is None else f"{log.size} entries, cosigned {_when(log.time)}"
        words.append(f"  log   {log.origin}: {seen}")
    words += ["  knows no log yet: `witness add-log DIR VKEY|POLICY`"] if not logs else []
    words += [f"  evidence  {path}" for path in evidence]
    told = [
        {"origin": log.origin, "vkeys": log.vkeys, "size": log.size, "time": log.time}
        | {"root": None if log.root is None else log.root.hex()}
        for log in logs
    ]
    answer = {"name": witness.name, "vkeys": witness.vkeys, "logs": told, "evidence": [str(path) for path in evidence]}
    return finish(args, answer, words)


def _do_serve(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.witness_server import WitnessServer

    server = WitnessServer(_witness(args), args.host, args.port, prefix=args.prefix, say=note)
    handler: Callable[[int, Any], None] = lambda _number, _frame: server.stop()  # noqa: E731
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    words = [f"witness {server.witness.name} listens at {server.url} (stop it with ctrl-c)"]
    try:
        finish(args, {"url": server.url, "name": server.witness.name}, words)
        sys.stdout.flush()
        if args.host not in LOOPBACK:
            note("Others can reach it. Whoever does can ask, which the protocol allows; put TLS before it.")
        server.run()
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    note("stopped")
    return 0


def _do_request(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.anchoring import request_cosignature

    path = output(args, Path("checkpoint.request"))
    data = request_cosignature(trail_folder(args), args.old, witness=args.name)
    _write(path, data)
    old = data.split(b"\n", 1)[0].decode().removeprefix("old ")
    words = [f"request  {path}, for a witness that has cosigned {old} entries; it cosigns with"]
    words.append(f"  {PROGRAM} witness cosign DIR {path.name}")
    return finish(args, {"file": str(path), "old": int(old)}, words)


def _do_evidence(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.evidence import Outcome, compare_heads, signed_head
    from rlhf_audit_nb.trail.note import parse_vkey

    policy = read_policy(args)
    logs = [parse_vkey(vkey) for vkey in args.log or ()] + list(policy.logs if policy else ())
    heads = []
    for name in args.files:
        data = _read(name, "signed note")
        try:
            heads.append(signed_head(data, lambda head: logs or _own_keys(head.origin)))
        except FormatError as error:
            raise AnchorError(
                f"{name} is evidence of nothing: {error.message}",
                next_step="Name the log's key that should have signed it: --policy FILE or --log VKEY.",
                code=error.reason,
            ) from error
    tree = _tree(args.trail) if args.trail else None
    found = compare_heads(heads[0], heads[1], tree)
    words = [f"{found.outcome.name}  {found.message}"]
    pairs = zip(args.files, heads, strict=True)
    words += [f"  {name}: {head.size} entries, root {head.root.hex()}" for name, head in pairs]
    if found.outcome is Outcome.UNDECIDED and tree is None:
        words.append("  With the trail that the larger one is of, it can be: --trail DIR")
    codes = {Outcome.CONSISTENT: 0, Outcome.UNDECIDED: 10, Outcome.CONTRADICTORY: 30}
    sizes = [head.size for head in heads]
    answer = {"outcome": found.outcome.value, "message": found.message, "origin": heads[0].origin, "sizes": sizes}
    return finish(args, answer, _wrapped(words), codes[found.outcome])


def _own_keys(origin: str) -> Sequence[Verifier]:
    from rlhf_audit_nb.trail.home import home_folder
    from rlhf_audit_nb.trail.keys import local_policy

    return local_policy(home_folder(), origin).logs


def _add_witness(parser: Parser) -> None:
    parts = parser.add_subparsers(
        dest="part",
        prog=f"{PROGRAM} witness",
        required=True,
        metavar="init|add-log|cosign|show|serve|request|evidence",
        parser_class=Parser,
    )

    def part(name: str, do: Callable[[argparse.Namespace], int], words: str, *, of_witness: bool = True) -> Parser:
        made = parts.add_parser(name, help=words, description=words, allow_abbrev=False)
        made.set_defaults(do=do)
        if of_witness:
            made.add_argument("dir", metavar="DIR", help="the witness's folder")
        add_json(made)
        return made

    init = part("init", _do_init, "make a witness: its keys and its memory, in a new folder")
    init.add_argument("--name", required=True, metavar="NAME", help="as witness.example/alice")
    init.add_argument("--ml-dsa", action="store_true", help="cosign with ML-DSA-44 too")
    log = part("add-log", _do_add_log, "know a log, by its key or its trust policy")
    log.add_argument("log", metavar="VKEY|POLICY")
    cosign = part("cosign", _do_cosign, "cosign a checkpoint that continues the last one")
    cosign.add_argument("target", metavar="REQUEST|TRAIL|PUBLISHED", help="a request's file, or a folder")
    cosign.add_argument("-o", "--out", metavar="FILE", help="where the cosigned checkpoint goes")
    part("show", _do_show, "tell what it knows, has cosigned and has kept as evidence")
    serve = part("serve", _do_serve, "cosign over HTTP (C2SP tlog-witness)")
    serve.add_argument("--port", type=int, default=DEFAULT_PORT, metavar="N", help=f"({DEFAULT_PORT}; 0: a free one)")
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (this machine alone)")
    serve.add_argument("--prefix", default="", metavar="PATH", help="what stands before the protocol's paths")
    request = part("request", _do_request, "write the request to a witness that no network reaches", of_witness=False)
    add_trail(request)
    request.add_argument("--old", type=int, metavar="N", help="the size that it cosigned last (default: as known here)")
    request.add_argument("--name", metavar="NAME", help="the witness's name")
    request.add_argument("-o", "--out", metavar="FILE", help="(checkpoint.request)")
    evidence = part("evidence", _do_evidence, "tell whether two signed heads contradict each other", of_witness=False)
    evidence.add_argument("files", nargs=2, metavar="FILE")
    add_policy(evidence)
    evidence.add_argument("--log", action="append", metavar="VKEY", help="a key of the log")
    evidence.add_argument("--trail", metavar="TRAIL|PUBLISHED", help="where the heads are of two sizes")


COMMANDS = (
    Command("share", "anchor", "have others vouch for a trail: witnesses' cosignatures, timestamps", _add_anchor),
    Command("share", "witness", "vouch for others' trails; check evidence of a forked one", _add_witness),
)
