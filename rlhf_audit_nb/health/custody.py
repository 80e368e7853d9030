"""What others rely on: keys and their backup, the trust policy, anchors, the published copy, the budget. Floor 4."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from rlhf_audit_nb.errors import FormatError, KeyFileError
from rlhf_audit_nb.health.finding import Finding, Findings
from rlhf_audit_nb.health.place import Place, UnknownError
from rlhf_audit_nb.health.words import ago, plural
from rlhf_audit_nb.trail import Anchor, Reason, TrustPolicy
from rlhf_audit_nb.trail.anchors import AnchorFolder, read_anchors
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.key_care import changed_since_backup, last_backup, list_keys
from rlhf_audit_nb.trail.targets import open_target
from rlhf_audit_nb.trail.tiles import CHECKPOINT, MAX_CHECKPOINT_BYTES
from rlhf_audit_nb.trail.timestamp import trusted_authorities

__all__ = [
    "POLICY_FILE",
    "check_anchors",
    "check_backup",
    "check_budget",
    "check_keys",
    "check_policy",
    "check_published",
    "read_all_anchors",
]

POLICY_FILE = "trust.policy"
ANCHOR_DAYS = 7
NEARLY_SPENT = 0.9

_DAY = 86_400.0
_PRIVATE = (".pem", ".key", ".signer")
_SECRET = stat.S_IRWXG | stat.S_IRWXO


def check_keys(place: Place) -> Finding:
    """They are there, nobody else can read them, they are encrypted, and they are the trail's own."""
    found = Findings()
    ring = place.ring
    if not ring.exists:
        raise KeyFileError(
            f"There are no keys of {place.origin} here: nothing can be appended.",
            next_step="Set RLHF_AUDIT_HOME to the folder that holds them, or `rlhf-audit keys restore` a backup.",
            code="no-key",
        )
    _permissions(ring.path, found)
    infos = [info for info in list_keys(place.home, place.origin) if info.status == "in force"]
    plain = [info.role for info in infos if info.where == "file" and not info.encrypted]
    found.facts |= {"encrypted": not plain, "keys": {info.role: info.id for info in infos}}
    if ring.is_changing:
        found.warn("A change of the keys was cut short.", "Open the trail once (any run does), which finishes it.")
    if plain:
        found.warn(
            f"Whoever reads the files can sign: {', '.join(plain)} not encrypted.", "Run `rlhf-audit keys encrypt`."
        )
    opened = "; not opened, since no passphrase is at hand" if place.keys is None else ""
    _match(place, found)
    return found.finding("keys", f"{plural(len(infos), 'key')} in force, the trail's own{opened}.")


def _permissions(folder: Path, found: Findings) -> None:
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & _SECRET:
        found.warn(f"The folder of the keys is open to others (mode {mode:04o}).", "Run `chmod 700` on it.")
    for path in sorted(folder.iterdir()):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.suffix in _PRIVATE and mode & _SECRET:
            found.fail(f"Others can read {path.name} (mode {mode:04o}).", f"Run `chmod 600` on {path.name}.")


def _match(place: Place, found: Findings) -> None:
    vkey = place.ring.read("log.vkey").decode().strip()
    try:
        TrustPolicy.of(vkey).check(place.head.note, place.origin)
    except FormatError:
        found.fail(
            "The log key here is not the one that signed the newest checkpoint.",
            "Restore the newest backup of the keys; `rlhf-audit keys show` lists them.",
        )


def check_backup(place: Place) -> Finding:
    """There is a backup, and it holds the keys as they are now."""
    found = Findings()
    if not place.ring.exists:
        raise UnknownError("there are no keys here")
    step = "Run `rlhf-audit keys backup FILE`, and keep the file apart from this machine."
    when = last_backup(place.home, place.origin)
    if when is None:
        found.warn("No backup of the keys was made with this home folder.", step)
        return found.finding("backup", "")
    changed = changed_since_backup(place.home, place.origin)
    found.facts |= {"time": when, "changed": list(changed)}
    if changed:
        found.warn(f"Since the last backup, {ago(place.now - when)} ago, {', '.join(changed)} changed.", step)
    return found.finding("backup", f"The keys were backed up {ago(place.now - when)} ago, as they are now.")


def check_policy(place: Place) -> Finding:
    """There is a trust policy for others to check with, and by it the newest checkpoint counts."""
    found = Findings()
    path = place.policy or next(
        (item for item in (place.folder / POLICY_FILE, place.folder.parent / POLICY_FILE) if item.is_file()), None
    )
    step = f"Run `rlhf-audit keys export -o {POLICY_FILE}` and give the file to whoever checks, by another way."
    if path is None:
        found.warn("There is no trust policy beside the trail, so nobody else knows whose signature to trust.", step)
        return found.finding("policy", "")
    try:
        policy = TrustPolicy.parse(path.read_bytes())
        place.succession.check_newest(policy, place.head.note)
    except (FormatError, OSError) as error:
        why = error.message if isinstance(error, FormatError) else error.strerror or error
        found.fail(f"By {path.name} the newest checkpoint does not count: {why}", step)
        return found.finding("policy", "")
    found.facts |= {"witnesses": len(policy.witnesses), "quorum": policy.quorum}
    if place.ring.exists and place.ring.read("log.vkey").decode().strip() not in policy.log_keys:
        found.warn(f"{path.name} does not list the log key in force.", step)
    return found.finding(
        "policy",
        f"{path.name} lists the log key in force, and {plural(len(policy.witnesses), 'witness', 'witnesses')}.",
    )


def read_all_anchors(place: Place, now: float) -> tuple[Sequence[Anchor], Sequence[Reason]]:
    """The anchors beside the trail whose signatures count, and what was found odd in the others."""
    folder = AnchorFolder(place.folder)
    names = folder.names()
    roots = trusted_authorities(place.home) if any(name.endswith(".tsr") for name in names) else ()
    trusted = [key for key in place.trust.logs if key.name == place.origin]
    return read_anchors(
        folder.read,
        names,
        place.trust,
        place.origin,
        roots,
        logs=lambda size: place.succession.log_verifiers(trusted, size),
        now=now,
    )


def check_anchors(place: Place) -> Finding:
    """Somebody else has vouched for this history, not too long ago."""
    found = Findings()
    anchors, reasons = read_all_anchors(place, place.now)
    for reason in reasons:
        found.warn(f"{reason.where}: {reason.message}")
    for anchor in anchors:
        if anchor.size > place.head.size or place.reader.root(anchor.size) != anchor.root:
            found.fail(
                f"{anchor.by.split('+')[0]} has vouched for another history ({anchor.where}).",
                "Keep both; `rlhf-audit verify` tells more.",
            )
    newest = max(anchors, key=lambda item: (item.size, item.time), default=None)
    found.facts["anchors"] = len(anchors)
    step = "Run `rlhf-audit anchor` (cosignatures, RFC 3161 timestamps)."
    if newest is None:
        found.warn("Nobody else has vouched for this trail: its key could sign another history.", step)
        return found.finding("anchors", "")
    age, after = place.now - newest.time, place.head.size - newest.size
    found.facts |= {"newest": newest.time, "entries_after": after}
    said = f"The newest {newest.kind} is {ago(age)} old; {plural(after, 'entry')} came after it."
    if after and age > ANCHOR_DAYS * _DAY:
        found.warn(said, step)
    return found.finding("anchors", said)


def check_published(place: Place) -> Finding:
    """The published copy is of this trail, and how far it lags behind."""
    found = Findings()
    if place.published is None:
        return found.finding("published", "No published copy was named (--published tells how far one lags).")
    target = open_target(place.published)
    data = target.read(CHECKPOINT, MAX_CHECKPOINT_BYTES)
    if data is None:
        found.fail(f"There is no checkpoint at {target.name}.", "Run `rlhf-audit publish` to it.")
        return found.finding("published", "")
    place.succession.check(place.trust, data)
    there = checkpoint_of(data)
    lag = place.head.size - there.size
    found.facts |= {"entries": there.size, "lag": lag}
    if lag < 0 or place.reader.root(there.size) != there.root:
        found.fail(
            f"What is published at {target.name} is not (a beginning of) this trail.",
            "Keep both; `rlhf-audit verify` of each tells more.",
        )
    elif lag:
        found.warn(f"{target.name} lags {plural(lag, 'entry')} behind.", f"Run `rlhf-audit publish {target.name}`.")
    return found.finding("published", f"{target.name} has all {plural(there.size, 'entry')}.")


def check_budget(place: Place) -> Finding:
    """How much of the privacy budget is left."""
    from rlhf_audit_nb.privacy.reservation import read_ledger

    found = Findings()
    ledger = read_ledger(place.reader)
    limit = ledger.limit
    if limit is None or not (ledger.spends or ledger.releases):
        return found.finding("budget", "Nothing was trained under differential privacy.")
    # Without the vault nobody is proven to be somebody else, so everything counts together: at most this was spent.
    spent, total = ledger.spent(limit.delta) if ledger.spends else (ledger.label_total, ledger.label_total)
    found.facts |= {"epsilon_spent": spent, "epsilon_reserved": total - spent, "epsilon_budget": limit.epsilon}
    found.facts["delta"] = limit.delta
    said = f"At most ε {total:.2f} of {limit.epsilon:g} is spent or reserved (δ {limit.delta:g})"
    for doubt in ledger.doubts():
        found.warn(f"A settlement is not believed: {doubt.doubt}", "Run `rlhf-audit budget show`.")
    if total >= NEARLY_SPENT * limit.epsilon:
        found.warn(f"{said}: little or nothing is left.", "`rlhf-audit budget left` says how many steps still fit.")
    return found.finding("budget", said + ".")
