"""Makes the golden files in this folder from the specifications, with the standard library and `cryptography` alone.

    python tests/vectors/trail/make.py [FOLDER]

Nothing of the package is used: what it reads and writes is compared with these files, not with itself. Keys come from
fixed seeds. ML-DSA signatures are random, so those that are already in the folder and hold are kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

HERE = Path(__file__).parent
ORIGIN = "example.com/rlhf-audit"
WHEN = 1_700_000_000

Files = dict[str, bytes]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Key:
    """A key pair of one type, from a seed."""

    def __init__(self, name: str, kind: int, seed: int) -> None:
        self.name, self.kind = name, kind
        if kind == 0x02:
            self.ecdsa = ec.derive_private_key(seed, ec.SECP256R1())
            self.public = self.ecdsa.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        elif kind == 0x06:
            self.mldsa = MLDSA44PrivateKey.from_seed_bytes(bytes([seed]) * 32)
            self.public = self.mldsa.public_key().public_bytes_raw()
        else:
            self.ed25519 = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
            self.public = self.ed25519.public_key().public_bytes_raw()
        named = b"" if kind == 0x02 else name.encode() + b"\n" + bytes([kind])
        self.key_id = hashlib.sha256(named + self.public).digest()[:4]

    @property
    def vkey(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{b64(bytes([self.kind]) + self.public)}"

    def message(self, text: str, when: int = WHEN) -> bytes:
        """The bytes that a key of this type signs of a note."""
        if self.kind == 0x04:
            return f"cosignature/v1\ntime {when}\n{text}".encode()
        if self.kind == 0x06:
            origin, size, root = text.split("\n")[:3]
            message = b"subtree/v1\n\0" + bytes([len(self.name.encode())]) + self.name.encode()
            message += struct.pack(">Q", when) + bytes([len(origin.encode())]) + origin.encode()
            return message + struct.pack(">QQ", 0, int(size)) + base64.b64decode(root)
        return text.encode()

    def sign(self, message: bytes, kept: Kept) -> bytes:
        if self.kind == 0x02:
            return kept(self.key_id, message, self.ecdsa_sign, self.ecdsa_holds)
        if self.kind == 0x06:
            return kept(self.key_id, message, self.mldsa.sign, self.mldsa_holds)
        return self.ed25519.sign(message)

    def ecdsa_sign(self, message: bytes) -> bytes:
        return self.ecdsa.sign(message, ec.ECDSA(SHA256(), deterministic_signing=True))

    def ecdsa_holds(self, signature: bytes, message: bytes) -> bool:
        return signature == self.ecdsa_sign(message)

    def mldsa_holds(self, signature: bytes, message: bytes) -> bool:
        try:
            self.mldsa.public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def line(self, text: str, kept: Kept, when: int = WHEN, message: bytes | None = None) -> str:
        signature = self.sign(self.message(text, when) if message is None else message, kept)
        timed = struct.pack(">Q", when) if self.kind in {0x04, 0x06} else b""
        return f"— {self.name} {b64(self.key_id + timed + signature)}\n"


class Kept:
    """Signatures that were made before: random ones stay as they are."""

    def __init__(self, folder: Path) -> None:
        self.found: dict[bytes, list[bytes]] = {}
        for path in sorted(folder.glob("*/*/*")) if folder.is_dir() else []:
            for line in path.read_bytes().split(b"\n"):
                if line.startswith("— ".encode()) and line.count(b" ") == 2:
                    try:
                        raw = base64.b64decode(line.split(b" ")[2], validate=True)
                    except ValueError:
                        continue
                    self.found.setdefault(raw[:4], []).append(raw[12:])

    def __call__(
        self,
        key_id: bytes,
        message: bytes,
        sign: Callable[[bytes], bytes],
        holds: Callable[[bytes, bytes], bool],
    ) -> bytes:
        for signature in self.found.get(key_id, []):
            if holds(signature, message):
                return signature
        self.found.setdefault(key_id, []).append(sign(message))
        return self.found[key_id][-1]


LOG = Key(ORIGIN, 0x01, 1)
LOG_ECDSA = Key(ORIGIN, 0x02, 2)
LOG_MLDSA = Key(ORIGIN, 0x06, 3)
WITNESSES = [Key(f"witness.example/w{number}", 0x04, 10 + number) for number in range(3)]
WITNESSES.append(Key("witness.example/w3", 0x06, 13))
STRANGER = Key("example.com/stranger", 0x01, 99)


def leaf(entry: bytes) -> bytes:
    return hashlib.sha256(b"\0" + entry).digest()


def root(leaves: list[bytes]) -> bytes:
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256().digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + root(leaves[:half]) + root(leaves[half:])).digest()


def path(index: int, leaves: list[bytes]) -> list[bytes]:
    if len(leaves) == 1:
        return []
    half = 1 << (len(leaves) - 1).bit_length() - 1
    if index < half:
        return [*path(index, leaves[:half]), root(leaves[half:])]
    return [*path(index - half, leaves[half:]), root(leaves[:half])]


LEAVES = [leaf(b"entry-%d" % number) for number in range(257)]


def checkpoint(size: int, origin: str = ORIGIN) -> str:
    return f"{origin}\n{size}\n{b64(root(LEAVES[:size]))}\n"


TEXT = checkpoint(10)


def swap(text: str, old: str, new: str, count: int = -1) -> str:
    assert old in text, old
    return text.replace(old, new, count)


def vkey_cases() -> dict[str, Files]:
    good = {"log-ed25519": LOG, "log-ecdsa": LOG_ECDSA, "log-mldsa44": LOG_MLDSA, "witness-ed25519": WITNESSES[0]}
    cases = {
        name: case(
            f"A key of type {key.kind:#04x}.",
            {"name": key.name, "type": key.kind, "key_id": key.key_id.hex(), "public": key.public.hex()},
            vkey=key.vkey,
        )
        for name, key in good.items()
    }

    def made(kind: int, public: bytes, name: str = ORIGIN) -> str:
        named = b"" if kind == 0x02 else name.encode() + b"\n" + bytes([kind])
        key_id = hashlib.sha256(named + public).hexdigest()[:8]
        return f"{name}+{key_id}+{b64(bytes([kind]) + public)}"

    small = {
        "order-1": (1).to_bytes(32, "little"),
        "order-2": (2**255 - 20).to_bytes(32, "little"),
        "order-4": bytes(32),
        "order-8": bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    }
    point = LOG_ECDSA.public[-65:]
    compressed = bytes([2 + point[-1] % 2]) + point[1:33]
    short = b"\x30\x13" + LOG_ECDSA.public[4:23] + b"\x03\x22\0" + compressed
    bad = {
        **{f"{name}_fail": ("A point of small order: anyone can sign.", made(1, raw)) for name, raw in small.items()},
        "witness-order-8_fail": ("A point of small order, for a witness.", made(4, small["order-8"])),
        "y-over-p_fail": ("Not the one encoding: y is p + 3.", made(1, (2**255 - 16).to_bytes(32, "little"))),
        "off-the-curve_fail": ("No x goes with this y.", made(1, (2).to_bytes(32, "little"))),
        "31-bytes_fail": ("An Ed25519 key has 32 bytes.", made(1, LOG.public[:31])),
        "33-bytes_fail": ("An Ed25519 key has 32 bytes.", made(1, LOG.public + b"\0")),
        "mldsa-1311-bytes_fail": ("An ML-DSA-44 key has 1312 bytes.", made(6, LOG_MLDSA.public[:-1])),
        "ecdsa-compressed_fail": ("A compressed point is not the one encoding.", made(2, b"\x30\x39" + short[2:])),
        "ecdsa-bare-point_fail": ("Not a SubjectPublicKeyInfo.", made(2, point)),
        "ecdsa-trailing-byte_fail": ("A byte after the key.", made(2, LOG_ECDSA.public + b"\0")),
        "unknown-type_fail": ("No key of type 0x05 is known.", made(5, LOG.public)),
        "wrong-hash_fail": ("The hash is another key's.", swap(LOG.vkey, LOG.key_id.hex(), "00000000")),
        "capital-hash_fail": (
            "The hash is written in small letters.",
            swap(STRANGER.vkey, "4309f272", "4309F272"),
        ),
        "no-key_fail": ("Nothing after the hash.", f"{ORIGIN}+{LOG.key_id.hex()}+"),
        "space-in-name_fail": ("A name has no space.", made(1, LOG.public, "a b")),
        "empty-name_fail": ("A name is not empty.", made(1, LOG.public, "")),
        "base64-bits_fail": ("The last bits of the base64 are not zero.", made(2, LOG_ECDSA.public)[:-2] + "B="),
    }
    return cases | {name: case(about, vkey=text) for name, (about, text) in bad.items()}


def note_cases(kept: Kept) -> dict[str, Files]:
    signed = TEXT + "\n" + LOG.line(TEXT, kept)
    line = LOG.line(TEXT, kept)
    grease = f"— grease.example {b64(bytes(range(100)))}\n"
    twin = f"— {ORIGIN} {b64(b'abcd' + bytes(64))}\n"
    blank = "one\n\ntwo\n"

    def good(about: str, note: str, keys: list[Key], verified: list[Key]) -> Files:
        return case(about, {"verified": [signature(key) for key in verified]}, note=note, vkeys=vkeys(keys))

    return {
        "ed25519": good("A note that one key has signed.", signed, [LOG], [LOG]),
        "ecdsa": good("A note signed with P-256.", TEXT + "\n" + LOG_ECDSA.line(TEXT, kept), [LOG_ECDSA], [LOG_ECDSA]),
        "two-keys": good(
            "Two known keys have signed; both count.",
            signed + STRANGER.line(TEXT, kept),
            [LOG, STRANGER],
            [LOG, STRANGER],
        ),
        "unknown-key": good("A line of an unknown key is ignored.", signed + STRANGER.line(TEXT, kept), [LOG], [LOG]),
        "grease": good("Lines of unknown names and kinds are ignored.", TEXT + f"\n{grease}{line}{twin}", [LOG], [LOG]),
        "empty-line-in-the-text": good(
            "The text ends at the last empty line.", blank + "\n" + LOG.line(blank, kept), [LOG], [LOG]
        ),
        "changed-text_fail": bad_note("The text was changed.", swap(signed, "\n10\n", "\n11\n")),
        "changed-signature_fail": bad_note(
            "A known key's signature does not hold.", TEXT + f"\n— {ORIGIN} {b64(LOG.key_id + bytes(64))}\n"
        ),
        "one-of-two-is-bad_fail": bad_note(
            "One known key's signature does not hold, another's does.",
            signed + STRANGER.line("other\n", kept),
            [LOG, STRANGER],
        ),
        "twice_fail": bad_note("A known key's line stands twice.", signed + line),
        "nobody-known_fail": bad_note("No known key has signed.", TEXT + "\n" + STRANGER.line(TEXT, kept)),
        "another-name_fail": bad_note("The key is known under another name.", swap(signed, "— example", "— another")),
        "no-signature_fail": bad_note("No signature line.", TEXT + "\n"),
        "no-empty-line_fail": bad_note("No empty line before the signatures.", TEXT + line),
        "no-last-newline_fail": bad_note("The last line does not end.", signed[:-1]),
        "hyphen_fail": bad_note("A hyphen stands for the dash.", swap(signed, "—", "-")),
        "two-spaces_fail": bad_note("Two spaces after the dash.", swap(signed, "— ", "—  ")),
        "carriage-returns_fail": bad_note("Lines end in CR LF.", swap(signed, "\n", "\r\n")),
        "tab-in-the-text_fail": bad_note("A control character.", "a\tb\n\n" + LOG.line("a\tb\n", kept)),
        "not-utf8_fail": bad_note("Bytes that are not UTF-8.", b"caf\xe9\n\n" + line.encode()),
        "base64-without-padding_fail": bad_note(
            "Base64 without its padding.", swap(signed, "=\n", "\n") if signed.endswith("=\n") else signed[:-2] + "\n"
        ),
        "short_fail": bad_note("A signature of a key id alone.", TEXT + f"\n— {ORIGIN} {b64(LOG.key_id)}\n"),
        "s-plus-l_fail": bad_note("S is raised by the group's order.", TEXT + "\n" + malleable(kept)),
        "ecdsa-long-length_fail": bad_note(
            "The DER length takes two bytes.", TEXT + "\n" + long_length(kept), [LOG_ECDSA]
        ),
    }


def malleable(kept: Kept) -> str:
    signature = LOG.sign(TEXT.encode(), kept)
    s = int.from_bytes(signature[32:], "little") + 2**252 + 27742317777372353535851937790883648493
    return f"— {ORIGIN} {b64(LOG.key_id + signature[:32] + s.to_bytes(32, 'little'))}\n"


def long_length(kept: Kept) -> str:
    signature = LOG_ECDSA.sign(TEXT.encode(), kept)
    return f"— {ORIGIN} {b64(LOG_ECDSA.key_id + bytes([0x30, 0x81]) + signature[1:])}\n"


def cosignature_cases(kept: Kept) -> dict[str, Files]:
    signed = TEXT + "\n" + LOG.line(TEXT, kept)
    extended = TEXT + "an extension line\n"
    cases: dict[str, Files] = {}

    def good(name: str, about: str, key: Key, text: str = TEXT, when: int = WHEN) -> None:
        note = text + "\n" + LOG.line(text, kept) + key.line(text, kept, when)
        verified = [signature(LOG), signature(key, when)]
        says = {"verified": verified, "message": key.message(text, when).hex()}
        cases[name] = case(about, says, note=note, vkeys=vkeys([LOG, key]))

    def bad(name: str, about: str, key: Key, line: str, text: str = TEXT) -> None:
        note = text + "\n" + LOG.line(text, kept) + line
        cases[name + "_fail"] = case(about, note=note, vkeys=vkeys([LOG, key]))

    for name, key in (("ed25519", WITNESSES[0]), ("mldsa44", WITNESSES[3])):
        good(name, "A witness's cosignature.", key)
        good(f"{name}-last-second", "The largest time.", key, when=2**63 - 1)
        good(f"{name}-extension", "A checkpoint with an extension line.", key, extended)
        bad(f"{name}-another-time", "The time was changed.", key, key.line(TEXT, kept, WHEN + 1, key.message(TEXT)))
        bad(f"{name}-time-over-2-63", "A time of 2^63.", key, key.line(TEXT, kept, 2**63))
        bad(
            f"{name}-another-size",
            "Over another checkpoint.",
            key,
            key.line(TEXT, kept, WHEN, key.message(checkpoint(9))),
        )
        raw = base64.b64decode(key.line(TEXT, kept).split(" ")[2])
        bad(f"{name}-cut", "A byte is missing.", key, f"— {key.name} {b64(raw[:-1])}\n")
        bad(f"{name}-longer", "A byte too many.", key, f"— {key.name} {b64(raw + bytes(1))}\n")
        bad(
            f"{name}-no-time",
            "The signature alone, without its time.",
            key,
            f"— {key.name} {b64(raw[:4] + raw[12:])}\n",
        )
    good("mldsa44-time-0", "A cosignature that claims consistency and no time.", WITNESSES[3], when=0)
    good("mldsa44-of-the-log", "The log's own second signature.", LOG_MLDSA)
    bad("ed25519-time-0", "An Ed25519 cosignature says its time.", WITNESSES[0], WITNESSES[0].line(TEXT, kept, 0))
    plain = Key(WITNESSES[0].name, 0x01, 10)
    raw = struct.pack(">Q", WHEN) + plain.sign(TEXT.encode(), kept)
    bad(
        "ed25519-of-the-text",
        "The plain text was signed.",
        WITNESSES[0],
        f"— {plain.name} {b64(WITNESSES[0].key_id + raw)}\n",
    )
    bad(
        "mldsa44-another-name",
        "Signed under another cosigner's name.",
        WITNESSES[3],
        WITNESSES[3].line(TEXT, kept, WHEN, Key("another.example", 0x06, 13).message(TEXT)),
    )
    other = checkpoint(10, "example.com/another")
    bad(
        "mldsa44-another-log",
        "Signed for another log.",
        WITNESSES[3],
        WITNESSES[3].line(TEXT, kept, WHEN, WITNESSES[3].message(other)),
    )
    assert signed
    return cases


def checkpoint_cases() -> dict[str, Files]:
    def good(about: str, text: str, origin: str, size: int, extensions: list[str]) -> Files:
        says = {"origin": origin, "size": size, "root": root(LEAVES[:size]).hex(), "extensions": extensions}
        return case(about, says, checkpoint=text)

    cases = {
        f"size-{size}": good(f"{size} entries.", checkpoint(size), ORIGIN, size, []) for size in (0, 1, 10, 256, 257)
    }
    cases["extensions"] = good("Two extension lines.", TEXT + "one\ntwo words\n", ORIGIN, 10, ["one", "two words"])
    written = b64(root(LEAVES[:10]))
    bad = {
        "sign": f"{ORIGIN}\n+10\n{written}\n",
        "underscore": f"{ORIGIN}\n1_0\n{written}\n",
        "leading-zero": f"{ORIGIN}\n010\n{written}\n",
        "space": f"{ORIGIN}\n 10\n{written}\n",
        "negative": f"{ORIGIN}\n-10\n{written}\n",
        "hexadecimal": f"{ORIGIN}\n0xa\n{written}\n",
        "other-digits": f"{ORIGIN}\n١٠\n{written}\n",
        "size-2-63": f"{ORIGIN}\n{1 << 63}\n{written}\n",
        "no-size": f"{ORIGIN}\n\n{written}\n",
        "root-31-bytes": f"{ORIGIN}\n10\n{b64(bytes(31))}\n",
        "root-33-bytes": f"{ORIGIN}\n10\n{b64(bytes(33))}\n",
        "root-hex": f"{ORIGIN}\n10\n{root(LEAVES[:10]).hex()}\n",
        "root-base64-bits": f"{ORIGIN}\n10\n{b64(bytes(32))[:-2]}B=\n",
        "root-url-base64": f"{ORIGIN}\n10\n{b64(bytes([0xFB, 0xFF] * 16)).replace('+', '-').replace('/', '_')}\n",
        "no-root": f"{ORIGIN}\n10\n",
        "no-origin": f"\n10\n{written}\n",
        "origin-with-space": f"a b\n10\n{written}\n",
        "origin-with-plus": f"a+b\n10\n{written}\n",
        "empty-extension": f"{ORIGIN}\n10\n{written}\n\nx\n",
        "no-last-newline": f"{ORIGIN}\n10\n{written}",
        "empty-tree-with-a-root": f"{ORIGIN}\n0\n{written}\n",
        "nothing": "",
    }
    return cases | {f"{name}_fail": case("Not a checkpoint.", checkpoint=text) for name, text in bad.items()}


def proof_cases(kept: Kept) -> dict[str, Files]:
    policy = f"log {LOG.vkey}\nquorum none\n"

    def evidence(index: int, size: int, extra: bytes | None = None) -> str:
        hashes = "".join(b64(node) + "\n" for node in path(index, LEAVES[:size]))
        more = "" if extra is None else f"extra {b64(extra)}\n"
        text = checkpoint(size)
        return f"c2sp.org/tlog-proof@v1\n{more}index {index}\n{hashes}\n{text}\n{LOG.line(text, kept)}"

    def made(about: str, text: str, entry: bytes, says: dict[str, object] | None = None) -> Files:
        return case(about, says, policy=policy, entry=entry) | {"evidence.tlog-proof": text.encode()}

    cases = {
        f"{index}-of-{size}": made(
            f"Entry {index} of {size}.",
            evidence(index, size),
            b"entry-%d" % index,
            {"origin": ORIGIN, "size": size, "index": index},
        )
        for index, size in ((0, 1), (0, 10), (4, 10), (9, 10), (255, 256), (256, 257), (100, 257))
    }
    cases["extra"] = made(
        "With extra data.", evidence(4, 10, b"extra"), b"entry-4", {"origin": ORIGIN, "size": 10, "index": 4}
    )
    text = evidence(4, 10)
    first = b64(path(4, LEAVES[:10])[0])
    bad = {
        "another-entry": ("The entry is another.", text, b"entry-5"),
        "another-index": ("The index is another.", swap(text, "index 4", "index 5"), b"entry-4"),
        "index-over-size": ("The index is not below the size.", swap(text, "index 4", "index 10"), b"entry-4"),
        "leading-zero": ("The index has a zero before it.", swap(text, "index 4", "index 04"), b"entry-4"),
        "changed-hash": ("A hash of the proof was changed.", swap(text, first, b64(bytes(32))), b"entry-4"),
        "hash-left-out": ("A hash of the proof is missing.", swap(text, first + "\n", ""), b"entry-4"),
        "hash-too-many": ("A hash too many.", swap(text, first + "\n", (first + "\n") * 2), b"entry-4"),
        "changed-root": ("The checkpoint was changed.", swap(text, b64(root(LEAVES[:10])), b64(bytes(32))), b"entry-4"),
        "another-version": ("Not version 1.", swap(text, "@v1", "@v2"), b"entry-4"),
        "no-index": ("No index line.", swap(text, "index 4\n", ""), b"entry-4"),
        "extra-after-index": (
            "The lines are out of order.",
            swap(text, "index 4\n", "index 4\nextra AA==\n"),
            b"entry-4",
        ),
        "no-checkpoint": ("No checkpoint.", text.split("\n\n", maxsplit=1)[0] + "\n\n", b"entry-4"),
        "unsigned": (
            "Signed by a key that the policy does not know.",
            text[: text.rindex("—")] + STRANGER.line(TEXT, kept),
            b"entry-4",
        ),
    }
    return cases | {f"{name}_fail": made(about, broken, entry) for name, (about, broken, entry) in bad.items()}


def policy_cases(kept: Kept) -> dict[str, Files]:
    log = f"log {LOG.vkey} https://example.com/log\n"
    four = [f"witness w{number} {key.vkey}\n" for number, key in enumerate(WITNESSES)]
    nested = f"# who is trusted\n{log}{''.join(four)}group own any w0 w1\n\ngroup both 2 own w2 w3\nquorum both\n"

    def note(*numbers: int) -> str:
        return TEXT + "\n" + LOG.line(TEXT, kept) + "".join(WITNESSES[number].line(TEXT, kept) for number in numbers)

    def good(about: str, text: str | bytes, numbers: tuple[int, ...], cosigned: bool, unsafe: bool) -> Files:
        return case(about, {"cosigned": cosigned, "split_view_unsafe": unsafe}, policy=text, note=note(*numbers))

    cases = {
        "no-quorum": good("A log alone.", f"{log}quorum none\n", (), cosigned=False, unsafe=True),
        "one-witness": good(
            "One witness is the quorum.", f"{log}{four[0]}quorum w0\n", (0,), cosigned=True, unsafe=False
        ),
        "one-witness-missing": good(
            "The other one signed.", f"{log}{four[0]}quorum w0\n", (1,), cosigned=False, unsafe=False
        ),
        "mldsa44-witness": good(
            "An ML-DSA-44 witness.", f"{log}{four[3]}quorum w3\n", (3,), cosigned=True, unsafe=False
        ),
        "nested": good("Groups in groups.", nested, (1, 3), cosigned=True, unsafe=True),
        "nested-short": good("Both of one group count once.", nested, (0, 1), cosigned=False, unsafe=True),
        "two-of-three": good(
            "A strict majority.",
            f"{log}{''.join(four[:3])}group g 2 w0 w1 w2\nquorum g\n",
            (0, 2),
            cosigned=True,
            unsafe=False,
        ),
        "all": good(
            "All of three.",
            f"{log}{''.join(four[:3])}group g all w0 w1 w2\nquorum g\n",
            (0, 2),
            cosigned=False,
            unsafe=False,
        ),
        "tabs-and-spaces": good(
            "White space around and between.",
            f"\t {swap(log, ' ', chr(9) * 2, 1)}  quorum\tnone \n",
            (),
            cosigned=False,
            unsafe=True,
        ),
        "not-utf8": good(
            "Names and comments are bytes.",
            f"{log}# caf".encode() + b"\xe9\nwitness \xff " + WITNESSES[0].vkey.encode() + b"\nquorum \xff\n",
            (0,),
            cosigned=True,
            unsafe=False,
        ),
    }
    bad = {
        "nothing": "",
        "two-quorums": f"{log}quorum none\nquorum none\n",
        "quorum-missing": log,
        "log-twice": f"{log}{log}quorum none\n",
        "witness-key-as-log": f"log {WITNESSES[0].vkey}\nquorum none\n",
        "log-key-as-witness": f"{log}witness w {STRANGER.vkey}\nquorum w\n",
        "one-key-for-both": f"{log}witness w {Key('w', 0x04, 1).vkey}\nquorum w\n",
        "name-twice": f"{log}{four[0]}{swap(four[1], 'w1', 'w0', 1)}quorum w0\n",
        "witness-named-none": f"{log}{swap(four[0], 'w0', 'none', 1)}quorum none\n",
        "used-before-defined": f"{log}group g any w0\n{four[0]}quorum g\n",
        "member-of-two-groups": f"{log}{four[0]}group g any w0\ngroup h any w0\nquorum h\n",
        "member-twice": f"{log}{four[0]}group g any w0 w0\nquorum g\n",
        "threshold-0": f"{log}{four[0]}group g 0 w0\nquorum g\n",
        "threshold-over-n": f"{log}{four[0]}group g 2 w0\nquorum g\n",
        "empty-group": f"{log}{four[0]}group g any\nquorum g\n",
        "carriage-returns": f"{swap(log, chr(10), chr(13) + chr(10))}quorum none\n",
        "word-too-many": f"{log.strip()} more\nquorum none\n",
    }
    refused = {f"{name}_fail": case("Not a policy.", policy=text) for name, text in bad.items()}
    witness_only = TEXT + "\n" + WITNESSES[0].line(TEXT, kept)
    refused["witness-for-log_fail"] = case(
        "A witness does not stand for the log.", policy=f"{log}{four[0]}quorum w0\n", note=witness_only
    )
    broken = note() + WITNESSES[0].line(TEXT, kept, WHEN + 1, WITNESSES[0].message(TEXT))
    refused["bad-cosignature_fail"] = case(
        "A known witness's cosignature does not hold.", policy=f"{log}{four[0]}quorum none\n", note=broken
    )
    second = TEXT + "\n" + LOG_MLDSA.line(TEXT, kept)
    refused["second-key-not-listed_fail"] = case(
        "Only the log's second key has signed, and the policy does not list it.",
        policy=f"{log}quorum none\n",
        note=second,
    )
    listed = f"{log}log {LOG_MLDSA.vkey}\nquorum none\n"
    cases["second-key-listed"] = case(
        "The log's second key is listed.", {"cosigned": False, "split_view_unsafe": True}, policy=listed, note=second
    )
    return cases | refused


def signature(key: Key, when: int = WHEN) -> dict[str, object]:
    timed = key.kind in {0x04, 0x06}
    return {"name": key.name, "type": key.kind, "key_id": key.key_id.hex(), "time": when if timed else 0}


def vkeys(keys: list[Key]) -> str:
    return "".join(key.vkey + "\n" for key in keys)


def bad_note(about: str, note: str | bytes, keys: list[Key] | None = None) -> Files:
    return case(about, note=note, vkeys=vkeys(keys or [LOG]))


def case(about: str, says: dict[str, object] | None = None, **files: str | bytes) -> Files:
    """The files of one case; ``says`` is what a reader must find in them."""
    told = json.dumps({"about": about, **(says or {})}, indent=1).encode() + b"\n"
    return {"case.json": told} | {
        name: data.encode() if isinstance(data, str) else data for name, data in files.items()
    }


def main(folder: Path) -> None:
    kept = Kept(HERE)
    formats = {
        "vkey": vkey_cases(),
        "note": note_cases(kept),
        "cosignature": cosignature_cases(kept),
        "checkpoint": checkpoint_cases(),
        "proof": proof_cases(kept),
        "policy": policy_cases(kept),
    }
    for form, cases in formats.items():
        shutil.rmtree(folder / form, ignore_errors=True)
        for name, files in cases.items():
            (folder / form / name).mkdir(parents=True)
            for file, data in files.items():
                (folder / form / name / file).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
