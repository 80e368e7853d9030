"""A log, its witnesses and its checkpoint, made from fixed seeds: what the tests of the formats share."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from rlhf_audit_nb.trail.checkpoint import Checkpoint
from rlhf_audit_nb.trail.cosignature import CosignerEd25519, CosignerMLDSA44
from rlhf_audit_nb.trail.merkle import LeafHashes, leaf_hash, tree_root
from rlhf_audit_nb.trail.note import Signature, Signer, sign_note
from rlhf_audit_nb.trail.vkey import ECDSA, Verifier, format_vkey

ORIGIN = "example.com/rlhf-audit"
WHEN = 1_700_000_000


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def mldsa_key(number: int) -> MLDSA44PrivateKey:
    return MLDSA44PrivateKey.from_seed_bytes(bytes([number]) * 32)


class EcdsaSigner:
    """A P-256 key that signs notes, as a key in a cloud's keeping would."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.key = ec.derive_private_key(number, ec.SECP256R1())

    def verifier(self) -> Verifier:
        spki = self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return Verifier(self.name, ECDSA, spki)

    def sign_line(self, text: str) -> Signature:
        return Signature(self.name, self.verifier().key_id, self.key.sign(text.encode(), ec.ECDSA(SHA256())))


LOG = Signer(ORIGIN, key(1))
LOG_ECDSA = EcdsaSigner(ORIGIN, 12345)
LOG_MLDSA = CosignerMLDSA44(ORIGIN, mldsa_key(2))
LEAVES = [leaf_hash(b"entry-%d" % number) for number in range(10)]
CHECKPOINT = Checkpoint(ORIGIN, 10, tree_root(10, LeafHashes(LEAVES)))
SIGNED = sign_note(CHECKPOINT.format(), [LOG])
VKEY = format_vkey(LOG.verifier())

WITNESSES = [
    *(CosignerEd25519(f"witness.example/{number}", key(10 + number)) for number in range(3)),
    CosignerMLDSA44("witness.example/3", mldsa_key(13)),
]
WITNESS_KEYS = [format_vkey(witness.verifier()) for witness in WITNESSES]
