"""That a record was run again, and how what came of it compares. Floor 1."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from rlhf_audit_nb.events.base import Event

__all__ = ["AppliedRule", "RecordReproduced"]


class AppliedRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rule that outputs were brought into one form by before they were compared.

    ``origin`` is ``tool`` (it comes with this tool), ``record`` (the notebook declares it) or ``file`` (whoever
    reproduced named it); ``pattern`` and ``replace`` are its regular expression's, empty for the tool's own.
    ``applied`` counts its matches in both notebooks together.
    """

    rule: str
    origin: str
    applied: int
    pattern: str = ""
    replace: str = ""


class RecordReproduced(Event, frozen=True, kw_only=True):
    """A record's notebook was run again, and compared.

    ``record`` is the record's id, ``origin`` its trail's name, ``digest`` that of its notebook (`RecordSealed`) and
    ``statement`` the SHA-256 of its signed statement. ``verdict`` is ``identical``, ``equal within tolerance`` or
    ``different``.

    ``compared`` counts what was compared by part: entries of ``data``, ``models``, ``settings``, ``metrics``,
    ``evaluations`` and ``private`` runs, digests of ``weights``, ``outputs`` of cells, and the ``outcome``.
    ``different`` counts the same of what differs beyond the tolerance, ``tolerated`` of what differs within it.
    ``first`` is the place of the first difference. Of a record with private training it names the part alone, and
    ``different`` says 1 for any number: which step or output differs would tell of the data that was used.

    ``tolerance`` is what was stated; ``normalisation`` are the rules, also those that never applied. ``times_left_out``
    counts metrics that are measured times. ``not_compared`` says in words what could not be compared. ``environment``
    is ``same``, ``other`` or ``unknown``, ``environment_differs`` says in what. ``fresh`` says whether it ran in an
    environment that was made from the recorded packages. ``seeds`` are the entries of ``origin`` whose seeds were
    opened.
    """

    TYPE: ClassVar[str] = "record.reproduced"

    record: str
    origin: str
    digest: str
    statement: str
    verdict: str
    compared: dict[str, int]
    different: dict[str, int] = {}
    tolerated: dict[str, int] = {}
    first: str | None = None
    tolerance: dict[str, float | str] = {}
    normalisation: list[AppliedRule] = []
    times_left_out: int = 0
    not_compared: list[str] = []
    environment: str = "unknown"
    environment_differs: list[str] = []
    fresh: bool = False
    seeds: list[int] = []
    tool: str = ""
