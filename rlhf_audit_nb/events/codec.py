"""Events to bytes and back: every type that this version knows. Floor 1."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from rlhf_audit_nb.errors import EntryError
from rlhf_audit_nb.events import annotations as annotation_events
from rlhf_audit_nb.events import (
    attestations,
    cells,
    compute,
    evaluation,
    gate,
    inputs,
    life,
    loops,
    privacy,
    ranks,
    records,
    reproduction,
    runs,
    sampling,
    sweeps,
    trail,
    training,
)
from rlhf_audit_nb.events.base import Event, Private

__all__ = ["EVENTS", "decode_body", "decode_private", "encode_body", "encode_private"]

_MODULES = (
    annotation_events,
    attestations,
    cells,
    compute,
    evaluation,
    gate,
    inputs,
    life,
    loops,
    privacy,
    ranks,
    records,
    reproduction,
    runs,
    sampling,
    sweeps,
    trail,
    training,
)


def _all_events() -> dict[str, type[Event]]:
    """The events that the modules of this room name, by type."""
    named = (getattr(module, name) for module in _MODULES for name in module.__all__)
    return {kind.TYPE: kind for kind in named if issubclass(kind, Event)}


EVENTS: dict[str, type[Event]] = _all_events()
"""Every known event type by its name."""

_encoder = msgspec.json.Encoder(order="deterministic")
_decoders: dict[str, msgspec.json.Decoder[Any]] = {name: msgspec.json.Decoder(kind) for name, kind in EVENTS.items()}
_private_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    name: msgspec.json.Decoder(kind.PRIVATE) for name, kind in EVENTS.items() if kind.PRIVATE is not None
}

HalfT = TypeVar("HalfT", bound=Event | Private)


def encode_body(event: Event) -> bytes:
    """The event's public body as JSON bytes."""
    return _encoder.encode(event)


def encode_private(private: Private) -> bytes:
    """The private half as the JSON bytes that a commitment covers."""
    return _encoder.encode(private)


def decode_body(kind: str, body: bytes) -> Event:
    """The event of type ``kind`` in ``body``.

    Raises:
        EntryError: the type is unknown, or the body is not of that type.
    """
    decoder: msgspec.json.Decoder[Event] | None = _decoders.get(kind)
    if decoder is None:
        raise EntryError(
            f"Entry type {kind!r} is not known to this version.",
            next_step="Read the trail with the version that wrote it, or a later one.",
            code="unknown-type",
        )
    return _decode(decoder, kind, body)


def decode_private(kind: str, payload: bytes) -> Private:
    """The private half of an event of type ``kind``.

    Raises:
        EntryError: the type has no private half, or the payload is not of that type.
    """
    decoder: msgspec.json.Decoder[Private] | None = _private_decoders.get(kind)
    if decoder is None:
        raise EntryError(f"Entry type {kind!r} has no private half.", code="unknown-type")
    return _decode(decoder, kind, payload)


def _decode(decoder: msgspec.json.Decoder[HalfT], kind: str, data: bytes) -> HalfT:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise EntryError(f"An entry of type {kind!r} is malformed: {error}.", code="malformed-body") from error
