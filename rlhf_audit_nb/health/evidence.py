"""The trail itself: does it hold, does its vault open, is it the one seen before, who still writes, is the clock right.
Floor 4.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from rlhf_audit_nb import events
from rlhf_audit_nb.errors import AuditError, FormatError, StoreError
from rlhf_audit_nb.health.finding import Finding, Findings
from rlhf_audit_nb.health.place import Place, UnknownError
from rlhf_audit_nb.health.words import ago, plural
from rlhf_audit_nb.trail import Level, Vault, verify_trail
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.home import keys_folder
from rlhf_audit_nb.trail.liveness import is_alive
from rlhf_audit_nb.trail.merkle import check_inclusion, leaf_hash, prove_inclusion, tree_root
from rlhf_audit_nb.trail.sqlite import reading, store_errors

__all__ = ["check_clock", "check_runs", "check_seen", "check_trail", "check_vault", "check_writers"]

TAIL = 256
"""How many of the newest entries a quick look hashes again."""

FRONT = 1024
"""How many of the oldest are looked at for private halves, where there is no vault."""

CLOCK_SLACK = 60.0
LOG_BYTES = 64 << 20
QUIET_SECONDS = 3600.0
TOKEN_SKEW = 300.0

_LOST = "Restore vault.sqlite from a backup; what it held can be read by nobody until then."
_DOUBT = "Run `rlhf-audit verify` for every reason; do not rely on this trail."


def check_trail(place: Place) -> Finding:
    """It opens, and its newest entries (or all of them) lie under its signed head."""
    found = Findings()
    if not place.store.exists():
        raise StoreError(
            f"There is no trail in {place.folder.name}.",
            next_step="Name its folder with --trail or RLHF_AUDIT_TRAIL; the first audited run makes one.",
            code="no-trail",
        )
    with place.store.reading() as transaction:
        head = transaction.head()
    found.facts |= {"entries": head.size, "last_commit": head.time / 1e6, "full": place.full}
    if place.full:
        return _verified_whole(place, found)
    try:
        signed = _signed_root(place)
    except FormatError as error:
        found.fail(f"The newest checkpoint does not count: {error.message}", _DOUBT)
        return found.finding("trail", "")
    looked = _tail_holds(place, signed)
    found.facts["checked"] = looked
    said = f"{plural(head.size, 'entry')}; the signature holds, and the newest {looked} lie under it"
    return found.finding("trail", f"{said} (--full verifies all).")


def _signed_root(place: Place) -> bytes:
    """The root in the newest checkpoint, whose signature counts; of whom nobody says, as it stands there."""
    try:
        return place.succession.check_newest(place.trust, place.head.note).checkpoint.root
    except UnknownError:
        return checkpoint_of(place.head.note).root


def _tail_holds(place: Place, root: bytes) -> int:
    """How many of the newest entries were hashed from their bytes and found under ``root``."""
    size = place.head.size
    entries = list(place.reader.entries(max(0, size - TAIL)))
    broken = _broken("The store holds fewer entries than its head says.") if size and not entries else None
    with place.store.reading() as transaction:
        if tree_root(size, transaction.hashes) != root:
            broken = _broken("The root of the stored tree is not that of the signed checkpoint.")
        for entry in entries if broken is None else ():
            proof = prove_inclusion(entry.index, size, transaction.hashes)
            if not check_inclusion(leaf_hash(entry.data), entry.index, size, proof, root):
                broken = _broken(f"Entry {entry.index} does not lie under the signed checkpoint.")
                break
    if broken is not None:
        raise broken
    return len(entries)


def _broken(sentence: str) -> StoreError:
    return StoreError(sentence, next_step=_DOUBT, code="malformed")


def _verified_whole(place: Place, found: Findings) -> Finding:
    with _borrowed_home(place) as home:
        verdict = verify_trail(place.folder, policy=place.trust if place.policy else None, home=home)
    found.facts |= {"level": verdict.level.name, "checked": verdict.size}
    if verdict.level in (Level.INVALID, Level.DIVERGED):
        first = verdict.reasons[0]
        why = first.message.partition(" Both signed heads")[0]
        found.fail(
            f"It is {verdict.level.name}: {first.where}: {why}",
            _DOUBT,
        )
    return found.finding("trail", f"{plural(verdict.size, 'entry')}, all verified: {verdict.level.name}.")


@contextmanager
def _borrowed_home(place: Place) -> Iterator[Path]:
    """A copy of what verification reads of the home folder: it remembers what it has seen, and a doctor does not."""
    with tempfile.TemporaryDirectory(prefix="rlhf-audit-doctor-") as name:
        home = Path(name)
        seen = Heads(place.home).path(place.origin)
        if seen.is_file():
            Heads(home).path(place.origin).parent.mkdir()
            shutil.copyfile(seen, Heads(home).path(place.origin))
        for folder in ("tsa", "revoked"):
            if (place.home / folder).is_dir():
                shutil.copytree(place.home / folder, home / folder)
        ring, copy = place.ring.path, keys_folder(home, place.origin)
        copy.mkdir(parents=True)
        for path in ring.glob("*.vkey"):
            shutil.copyfile(path, copy / path.name)
        if (ring / "retired").is_dir():
            shutil.copytree(ring / "retired", copy / "retired")
        yield home


def check_vault(place: Place) -> Finding:
    """The file is of this layout, no erasure is half-way, and it opens with the key at hand."""
    found = Findings()
    path = place.folder / "vault.sqlite"
    if not path.is_file():
        if _seals(place):
            found.fail("The trail seals private halves, and the vault that holds them is gone.", _LOST)
        return found.finding("vault", "Nothing private was sealed yet.")
    with store_errors(path), reading(path) as session:
        generation = session.raw.execute("SELECT generation FROM state").fetchone()
        openings = session.raw.execute("SELECT count(*) FROM openings WHERE sealed IS NOT NULL").fetchone()[0]
        rows = session.raw.execute("SELECT count(*) FROM openings").fetchone()[0]
    log = path.with_name(path.name + "-wal")
    waiting = log.stat().st_size if log.exists() else 0
    found.facts |= {"openings": openings, "generation": generation[0] if generation else 0, "log_bytes": waiting}
    if waiting > LOG_BYTES:
        found.warn(f"Its write-ahead log has grown to {waiting >> 20} MiB.", "End whoever keeps reading the vault.")
    if not rows and _seals(place):
        found.fail("The trail seals private halves, and the vault holds none.", _LOST)
    opened = _opened(place, path, found)
    return found.finding("vault", f"{plural(openings, 'private half', 'private halves')}; {opened}.")


def _seals(place: Place) -> bool:
    """Whether an entry has a private half: among the first and the newest, and those of kinds that may have one."""
    kinds = [kind.TYPE for kind in vars(events).values() if getattr(kind, "PRIVATE", None) is not None]
    try:
        size, reader = place.head.size, place.reader
    except UnknownError:
        return False  # the check of the trail says why
    looked = [reader.entries(0, min(size, FRONT)), reader.entries(max(0, size - TAIL))]
    looked += [reader.entries(type=kind) for kind in kinds if kind != events.Step.TYPE]  # its run seals its data first
    return any(entry.envelope.sealed is not None for entry in chain.from_iterable(looked))


def _opened(place: Place, path: Path, found: Findings) -> str:
    try:
        keys = place.keys
    except (AuditError, UnknownError):
        found.warn("Whether it opens is not known: its key cannot be read.")
        return ""
    if keys is None:
        return "whether it opens is not known without the passphrase"
    vault = Vault(path, keys.master)
    vault.check_key()
    if not vault.settled():
        found.warn(
            "An erasure was begun and is not finished.",
            "Open the trail once (any run does), which brings it to its end.",
        )
    return "it opens with its key"


def check_seen(place: Place) -> Finding:
    """This is (a continuation of) the history that was seen before."""
    found = Findings()
    heads = Heads(place.home)
    note = heads.note(place.origin)
    if note is None:
        found.warn("No head of this trail was ever seen here.", "Run `rlhf-audit verify` once: it remembers the head.")
        return found.finding("seen", "")
    seen, when = checkpoint_of(note), heads.path(place.origin).stat().st_mtime
    found.facts |= {"entries": seen.size, "time": when}
    step = "Restore the newer copy of the trail; `rlhf-audit verify` tells more."
    if seen.size > place.head.size:
        found.fail(f"{seen.size} entries were seen before, and there are {place.head.size}.", step)
    else:
        with place.store.reading() as transaction:
            root = tree_root(seen.size, transaction.hashes)
        if root != seen.root:
            found.fail(f"At size {seen.size} the history is not the one seen before.", step)
    later = place.head.size - seen.size
    said = f"The head of {plural(seen.size, 'entry')} was seen {ago(place.now - when)} ago"
    return found.finding("seen", f"{said}; {later} came after it." if later else f"{said}; it is the newest.")


def check_runs(place: Place) -> Finding:
    """Runs that have no end, and whether somebody still writes them."""
    found = Findings()
    alive: list[str] = []
    dead: list[str] = []
    for run, writer in sorted(place.open_runs.items()):
        (alive if is_alive(place.folder, writer) else dead).append(run)
    found.facts |= {"open": len(alive), "dead": len(dead), "runs": alive[:10], "dead_runs": dead[:10]}
    if dead:
        some = ", ".join(run[:8] for run in dead[:3]) + (", …" if dead[3:] else "")
        found.warn(
            f"{plural(len(dead), 'run')} without an end ({some}), whose process is gone.",
            "Open the trail once (any run does): it records them as interrupted. A private one may be resumed.",
        )
    goes_on = ", ".join(run[:8] for run in alive[:3])
    return found.finding("runs", f"{plural(len(alive), 'run')} going on: {goes_on}." if alive else "No run is open.")


def check_writers(place: Place) -> Finding:
    """Who may still write, when they last did, and what of this process is not on the disk yet."""
    found = Findings()
    locks = sorted((place.folder / "writers").glob("*.lock"))
    alive = [path.stem for path in locks if is_alive(place.folder, path.stem)]
    idle = place.now - place.head.time / 1e6
    found.facts |= {"alive": len(alive), "unsynced": 0, "last_commit_seconds": round(idle, 3)}
    mine = place.trail
    if mine is not None:
        found.facts["unsynced"] = mine.status().unsynced
        refusal = mine.failure
        if refusal is not None:
            found.fail(
                f"This process can write no more: {refusal.message}",
                refusal.next_step or "Restart it, and open the trail.",
            )
    writing = [run for run, writer in place.open_runs.items() if writer in alive]
    if writing and idle > QUIET_SECONDS:
        found.warn(
            f"A run is open, and nothing was committed for {ago(idle)}.", "Look whether its process still trains."
        )
    here = f", {found.facts['unsynced']} entries of this process not on the disk yet" if mine is not None else ""
    return found.finding(
        "writers", f"{plural(len(alive), 'process', 'processes')} may write; last commit {ago(idle)} ago{here}."
    )


def check_clock(place: Place) -> Finding:
    """This machine's clock against the newest entry's time, and entries against timestamps of others."""
    found = Findings()
    last = max(place.head.time, *(entry.time for entry in place.reader.entries(max(0, place.head.size - 1))), 0) / 1e6
    behind = last - place.now
    found.facts |= {"behind_seconds": round(max(behind, 0.0), 3)}
    if behind > CLOCK_SLACK:
        found.fail(
            f"This machine's clock is {ago(behind)} behind the newest entry.",
            "Set the clock (NTP); entries must not run back in time.",
        )
    for stamp in _stamps(place):
        if stamp > place.now + TOKEN_SKEW:
            found.fail(
                f"This machine's clock is {ago(stamp - place.now)} behind a timestamp of the trail.",
                "Set the clock (NTP).",
            )
    for size, stamp in _stamped_entries(place):
        (entry,) = place.reader.entries(size - 1, size)
        if entry.time / 1e6 > stamp + TOKEN_SKEW:
            found.warn(
                f"Entry {size - 1} is dated {ago(entry.time / 1e6 - stamp)} after the timestamp over it.",
                "Set the clock (NTP).",
            )
    return found.finding("clock", "It is not behind the newest entry or any timestamp.")


def _stamps(place: Place) -> list[float]:
    from rlhf_audit_nb.health.custody import read_all_anchors

    anchors, reasons = read_all_anchors(place, now=float("inf"))
    del reasons
    return [anchor.time for anchor in anchors if anchor.kind == "timestamp"]


def _stamped_entries(place: Place) -> list[tuple[int, float]]:
    from rlhf_audit_nb.health.custody import read_all_anchors

    anchors, _ = read_all_anchors(place, now=float("inf"))
    return [(item.size, item.time) for item in anchors if item.kind == "timestamp" and 0 < item.size <= place.head.size]
