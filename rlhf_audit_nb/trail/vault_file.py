"""The vault's file: its tables, and how what stands in them is sealed. Floor 0.

============ ==========================================================================================================
``state``    one row: the generation of the master key (`vault_key`) that wraps the owners' keys
``owners``   each owner's key and name, wrapped by the master key; the row is found by a keyed hash of the name, so that
             this file alone tells neither payloads nor who is in it
``openings`` commitment and sealed opening (AES-256-GCM under the owner's key); of an erased one the commitment stays,
             and names its erasure
``erasures`` each erasure: its name, the salt and the commitment over what it erased, whether the trail has its entry
============ ==========================================================================================================
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec
import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rlhf_audit_nb.errors import FormatError, StoreError, VaultError
from rlhf_audit_nb.trail.commitment import KEY_BYTES, Opening
from rlhf_audit_nb.trail.sqlite import Session, Statement

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf_audit_nb.trail.vault_key import Generation, MasterKey

__all__ = [
    "ADD_ERASURE",
    "ADD_OPENING",
    "ADD_OWNER",
    "ADD_STATE",
    "ALL_OWNERS",
    "BLANK",
    "BURY",
    "CLEAR_OWNERS",
    "ERASED_BY",
    "FIND",
    "FIND_READING",
    "LAYOUT",
    "LOGGED",
    "METADATA",
    "NONCE_BYTES",
    "OPENING",
    "OWNED_BY",
    "OWNER_OF_ID",
    "OWNER_OF_TAG",
    "PUT_OWNER",
    "SET_GENERATION",
    "UNLOGGED",
    "VAULT_ERASED",
    "WALK",
    "WALK_READING",
    "Erased",
    "Erasure",
    "Wrapping",
    "decode_erased",
    "erasure_commitment",
    "erasures_of",
    "generation_of",
    "has_tables",
    "name_of",
    "open_sealed",
    "other_generation",
    "seal_opening",
    "stream_number",
]

VAULT_ERASED = "vault.erased"
LAYOUT = 3
NONCE_BYTES = 12

_NAME_BUCKET = 64
_ANY = "surrogatepass"  # an id is whatever somebody wrote; no letter of it may stop a commit
_u32 = struct.Struct(">I").pack

METADATA = sa.MetaData()
_state = sa.Table(
    "state",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("generation", sa.Integer, nullable=False),
)
_owners = sa.Table(
    "owners",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tag", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
)
# A row is found by its place: 64 bits of its stream's hash, and its number there. Numbers go up, so that new rows go to
# the end of the index; an index over commitments, which look random, would be rewritten all over by each commit.
_openings = sa.Table(
    "openings",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("stream", sa.BigInteger, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("commitment", sa.LargeBinary, nullable=False),
    sa.Column("owner", sa.Integer, index=True),
    sa.Column("erasure", sa.Integer),
    sa.Column("sealed", sa.LargeBinary),
)
sa.Index("ix_openings_place", _openings.c.stream, _openings.c.seq)
sa.Index("ix_openings_erasure", _openings.c.erasure, sqlite_where=_openings.c.erasure.is_not(None))
_erasures = sa.Table(
    "erasures",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("commitment", sa.LargeBinary, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("openings", sa.Integer, nullable=False),
    sa.Column("logged", sa.Boolean, nullable=False),
    sa.Column("seal", sa.LargeBinary, nullable=False),
)


GENERATION = Statement(sa.select(_state.c.generation))
SET_GENERATION = Statement(_state.update(), ["generation"])
ADD_STATE = Statement(_state.insert())
OWNER_OF_TAG = Statement(sa.select(_owners.c.id, _owners.c.wrapped).where(_owners.c.tag == sa.bindparam("of")))
OWNER_OF_ID = Statement(sa.select(_owners.c.tag, _owners.c.wrapped).where(_owners.c.id == sa.bindparam("of")))
ALL_OWNERS = Statement(sa.select(_owners.c.id, _owners.c.tag, _owners.c.wrapped).order_by(_owners.c.id))
ADD_OWNER = Statement(_owners.insert(), ["tag", "wrapped"])
PUT_OWNER = Statement(_owners.insert())
CLEAR_OWNERS = Statement(_owners.delete())
ADD_OPENING = Statement(_openings.insert(), ["stream", "seq", "commitment", "owner", "sealed"])
_there = (_openings.c.stream == sa.bindparam("in_stream")) & (_openings.c.seq == sa.bindparam("at"))
OPENING = Statement(
    sa.select(_openings.c.commitment, _openings.c.owner, _openings.c.erasure, _openings.c.sealed).where(_there)
)
# What a check needs of each row: its place, the commitment, whether there is an opening, which erasure took it; and to
# open it, whose it is and the opening itself.
_look = sa.select(_openings.c.id, _openings.c.commitment, _openings.c.sealed.is_not(None), _openings.c.erasure)
_read = _look.add_columns(_openings.c.owner, _openings.c.sealed)
WALK, WALK_READING = (
    Statement(look.where(_openings.c.id > sa.bindparam("after")).order_by(_openings.c.id)) for look in (_look, _read)
)
FIND, FIND_READING = (Statement(look.where(_there)) for look in (_look, _read))
OWNED_BY = Statement(
    sa.select(_openings.c.commitment).where(_openings.c.owner == sa.bindparam("of")).order_by(_openings.c.commitment)
)
ERASED_BY = Statement(
    sa.select(_openings.c.commitment).where(_openings.c.erasure == sa.bindparam("of")).order_by(_openings.c.commitment)
)
ADD_ERASURE = Statement(
    _erasures.insert(), ["name", "salt", "commitment", "generation", "reason", "openings", "logged", "seal"]
)
ERASURES = Statement(
    sa.select(
        _erasures.c.name,
        _erasures.c.commitment,
        _erasures.c.generation,
        _erasures.c.reason,
        _erasures.c.openings,
        _erasures.c.logged,
        _erasures.c.id,
        _erasures.c.salt,
    ).order_by(_erasures.c.id)
)
UNLOGGED = Statement(
    sa.select(
        _erasures.c.name,
        _erasures.c.commitment,
        _erasures.c.generation,
        _erasures.c.reason,
        _erasures.c.openings,
        _erasures.c.seal,
    ).where(_erasures.c.logged.is_(sa.false()))
)
LOGGED = Statement(_erasures.update().where(_erasures.c.name == sa.bindparam("of")).values(logged=sa.true()))
# Overwritten where it stands, with zeros of the same length, before the row shrinks: no page that is rearranged then
# can keep a copy of what is to go.
BLANK = Statement(
    _openings.update()
    .where(_openings.c.owner == sa.bindparam("of"))
    .values(sealed=sa.func.zeroblob(sa.func.length(_openings.c.sealed)))
)
BURY = Statement(
    _openings.update()
    .where(_openings.c.owner == sa.bindparam("of"))
    .values(sealed=sa.null(), owner=sa.null(), erasure=sa.bindparam("by"))
)


class Erased(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a ``vault.erased`` entry: an erasure without a word on whose it was, or which entries it concerns.

    Attributes:
        erasure: its name in the vault, 32 hex digits.
        commitment: base64 of the HMAC over the commitments that were erased.
        generation: the generation of the vault's master key that it brought.
        reason: why: ``request``, ``retention`` or ``withdrawn``.
    """

    erasure: str
    commitment: str
    generation: int
    reason: str


@dataclass(frozen=True)
class Erasure:
    """One erasure, as the vault remembers it; nothing in it tells whose it was.

    Attributes:
        name: 32 hex digits, made from the owner's name with a secret that is gone.
        commitment: HMAC-SHA256 over the commitments that were erased, with a salt that only the vault has.
        generation: the generation of the master key that it brought.
        reason: why.
        openings: how many openings were erased.
        logged: whether the trail has its entry.
    """

    name: str
    commitment: bytes
    generation: int
    reason: str
    openings: int
    logged: bool = False


_erased = msgspec.json.Decoder(Erased)


def decode_erased(body: bytes) -> Erased:
    """The body of a ``vault.erased`` entry; raises `FormatError` (``body``) where it is none."""
    try:
        return _erased.decode(body)
    except msgspec.MsgspecError as error:
        raise FormatError(f"An erasure is malformed: {error}.", code="body") from error


def erasure_commitment(salt: bytes, name: str, commitments: Iterable[bytes]) -> tuple[bytes, int]:
    """What an erasure commits to: HMAC-SHA256 over its name and the sorted commitments; and how many these are."""
    count, mac = 0, hmac.new(salt, b"rlhf-audit/erasure/v1\0" + name.encode() + b"\0", "sha256")
    for commitment in commitments:
        count += 1
        mac.update(commitment if type(commitment) is bytes else b"")  # a damaged row: then it is another one
    return mac.digest(), count


@lru_cache(maxsize=1024)
def stream_number(stream: str) -> int:
    """What stands for a stream in the openings' rows; two that have the same are told apart by their commitments."""
    return int.from_bytes(sha256(stream.encode()).digest()[:8], "big", signed=True)


def name_of(owner: str | None, stream: str = "") -> str:
    """The name that a key is kept under: an annotator called like a run is not that run."""
    return "s:" + stream if owner is None else "a:" + owner


def has_tables(session: Session, path: Path) -> bool:
    """Whether the vault was made completely; a file of another layout is refused."""
    layout = session.pragma("user_version")
    if layout == LAYOUT:
        return True
    if layout == 0 and session.is_empty():
        return False
    raise VaultError(
        f"The vault {path} is of layout {layout}; this version reads {LAYOUT}.",
        next_step="Open it with the version that wrote it.",
        code="unknown-layout",
    )


def generation_of(session: Session, path: Path) -> int:
    """The generation that the vault is of."""
    rows = session.execute(GENERATION).fetchall()
    if len(rows) != 1 or type(rows[0][0]) is not int:
        raise _damaged(path)
    return int(rows[0][0])


def erasures_of(session: Session, path: Path) -> list[tuple[int, bytes, Erasure]]:
    """Every erasure in their order, with the number that rows name it by, and its salt."""
    found = []
    for name, over, number, reason, count, logged, row, salt in session.execute(ERASURES).fetchall():
        if tuple(map(type, (name, over, number, reason, count, salt))) != (str, bytes, int, str, int, bytes):
            raise _damaged(path)
        found.append((row, salt, Erasure(name, over, number, reason, count, bool(logged))))
    return found


def _damaged(path: Path) -> StoreError:
    return StoreError(
        f"The vault {path} is damaged: a row does not hold what it should.",
        next_step="Put a copy of the vault back from after the last erasure.",
        code="malformed",
    )


def other_generation(path: Path, number: int, master: MasterKey) -> VaultError:
    """Vault and key do not belong together: why, and what to do."""
    newest = master.newest.number
    if number < newest:
        return VaultError(
            f"The vault {path} is a copy from before an erasure: it is of generation {number}, its key of {newest}, "
            "and nothing in it opens any more.",
            next_step="Put the newest copy of the vault back; one from before an erasure cannot be used again.",
            code="vault-old",
        )
    return VaultError(
        f"The vault {path} is of generation {number}, and the key {master.path} of {newest}: somebody was erased with "
        "another copy of the key.",
        next_step="Put the vault.key back that was there when that was done; an older backup of it does not help.",
        code="key-old",
    )


def seal_opening(cipher: AESGCM, nonce: bytes, commitment: bytes, place: bytes, opening: Opening) -> bytes:
    """An opening as it lies in its row, with the place that it belongs to."""
    plain = b"".join((opening.key, _u32(len(place)), place, opening.payload))
    return nonce + cipher.encrypt(nonce, plain, commitment)


def _decrypt(cipher: AESGCM, sealed: bytes, associated: bytes) -> bytes:
    try:
        return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
    except (TypeError, ValueError) as error:  # a row of a damaged file can hold anything
        raise InvalidTag from error


def open_sealed(cipher: AESGCM, commitment: bytes, sealed: bytes) -> tuple[Opening, bytes]:
    """The opening in a row, and its place; raises `InvalidTag` where the key is not its owner's or it was changed."""
    plain = _decrypt(cipher, sealed, commitment)
    start = KEY_BYTES + 4
    stop = start + int.from_bytes(plain[KEY_BYTES:start], "big")
    return Opening(plain[:KEY_BYTES], plain[stop:]), plain[start:stop]


class Wrapping:
    """What one generation of the master key does: it finds, wraps and unwraps the owners' keys."""

    def __init__(self, generation: Generation) -> None:
        self.number = generation.number
        self._cipher = AESGCM(generation.master)
        self._tag_key = hmac.digest(generation.master, b"rlhf-audit/owner-tag/v2", "sha256")

    def tag(self, name: str) -> bytes:
        """What an owner's row is found by."""
        return hmac.digest(self._tag_key, name.encode(errors=_ANY), "sha256")

    def wrap(self, key: bytes, name: str, tag: bytes) -> bytes:
        """An owner's key and name as they lie in the row."""
        # The name goes with the key, padded: the next generation needs it to find the owner.
        text = name.encode(errors=_ANY)
        plain = key + _u32(len(text)) + text
        plain += bytes(-len(plain) % _NAME_BUCKET)
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, tag)

    def seal(self, erasure: Erasure) -> bytes:
        """Shows, until the trail has its entry, that an erasure was made with the key and not with the file alone."""
        said = msgspec.json.encode(asdict(replace(erasure, logged=False)))
        return hmac.digest(self._tag_key, b"rlhf-audit/erasure-seal/v1\0" + said, "sha256")

    def unwrap(self, wrapped: bytes, tag: bytes) -> tuple[bytes, str]:
        """An owner's key and name; raises `InvalidTag` where they were not wrapped by this generation."""
        plain = _decrypt(self._cipher, wrapped, tag)
        start = KEY_BYTES + 4
        stop = start + int.from_bytes(plain[KEY_BYTES:start], "big")
        return plain[:KEY_BYTES], plain[start:stop].decode(errors=_ANY)
