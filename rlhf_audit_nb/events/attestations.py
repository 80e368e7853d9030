"""What people signed. Floor 1."""

from __future__ import annotations

from typing import ClassVar

from rlhf_audit_nb.events.base import Event

__all__ = ["RecordAttested"]


class RecordAttested(Event, frozen=True, kw_only=True):
    """A person signed a record; the signature itself, with the name and the words, stands in the record alone.

    Attributes:
        record: the record's id.
        digest: that of the notebook, as its ``record.sealed`` has it.
        payload: SHA-256 (hex) of the payload that was signed, so that one taken out of the file is missed.
        meaning: ``approved``, ``reviewed``, ``responsible``, ``authored``, ``rejected`` or ``withdrawn``.
        role: in which the person signed.
        key: SHA-256 (hex) of the person's public key (DER SubjectPublicKeyInfo).
    """

    TYPE: ClassVar[str] = "record.attested"

    record: str
    digest: str
    payload: str
    meaning: str
    role: str
    key: str
