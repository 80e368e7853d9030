"""What people said of responses, and who asked after them. Floor 1."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_audit_nb.events.base import Event, Private

__all__ = [
    "Annotation",
    "AnnotationRecorded",
    "AnnotationSource",
    "AnnotationsImported",
    "AnnotatorReidentified",
    "AnnotatorsKey",
    "AnnotatorsTabulated",
]


Text = str | list[dict[str, Any]]
"""A prompt or a response: plain text, or a conversation as a list of messages."""


class AnnotationSource(Private, frozen=True, kw_only=True):
    """What is private about an import: the names and digests of the files or rows that it was drawn from."""

    names: list[str] = []
    digests: list[str] = []


class AnnotationsImported(Event, frozen=True, kw_only=True):
    """Annotations begin to come into the trail: from where, and what is known of them.

    ``form`` is ``csv``, ``jsonl``, ``json``, ``parquet``, ``dataset`` or ``values`` (handed in by a program); ``kind``
    is ``comparison`` or ``rating``. ``rows`` is how many annotations follow under this ``import_id``, ``None`` where
    more may come at any time. ``columns`` says what our fields are called in the source. ``provenance`` says of each
    field whether it is ``recorded`` row by row, ``stated`` for all rows by whoever imported them, or ``unknown``.
    ``guideline`` and ``guideline_digest`` name the guideline where one was stated for all. ``digests`` are those of the
    source where it was said to be public; otherwise they are in the private half.
    """

    TYPE: ClassVar[str] = "annotations.imported"
    PRIVATE: ClassVar[type[Private] | None] = AnnotationSource

    import_id: str
    form: str
    kind: str
    provenance: dict[str, str]
    rows: int | None = None
    columns: dict[str, str] = {}
    extra: list[str] = []
    guideline: str | None = None
    guideline_digest: str | None = None
    digests: list[str] = []


class Annotation(Private, frozen=True, kw_only=True, omit_defaults=True):
    """What one person said of one response or of several.

    ``choice`` is the place of the preferred response in ``responses``, ``tie`` or ``undecided``; ``shown`` the places
    of the responses in the order in which they were shown. ``made_at`` is the source's own word for the time. What the
    source did not know is ``None`` and left out of the bytes.
    """

    responses: list[Text]
    prompt: Text | None = None
    choice: int | str | None = None
    reward: float | int | list[float | int] | None = None
    shown: list[int] | None = None
    guideline: str | None = None
    made_at: str | None = None
    annotator: str | None = None
    extra: dict[str, Any] = {}


class AnnotationRecorded(Event, frozen=True, kw_only=True):
    """One annotation; all that it says is in its private half, which belongs to the annotator."""

    TYPE: ClassVar[str] = "annotation.recorded"
    PRIVATE: ClassVar[type[Private] | None] = Annotation

    import_id: str


class AnnotatorsKey(Private, frozen=True, kw_only=True):
    """The secret (hex, 32 bytes) from which the tokens of one table of annotators follow."""

    secret: str


class AnnotatorsTabulated(Event, frozen=True, kw_only=True):
    """A table of annotators was made under tokens that mean something in this table alone.

    Neither the tokens nor anything that the table says stands here; only whoever holds the vault can tell whose a
    token is, and that is recorded (`AnnotatorReidentified`). ``import_id`` is the import that it was about, ``None``
    for all of them; ``size`` how many entries the trail had when it was drawn up.
    """

    TYPE: ClassVar[str] = "annotators.tabulated"
    PRIVATE: ClassVar[type[Private] | None] = AnnotatorsKey

    table: str
    size: int
    import_id: str | None = None


class AnnotatorReidentified(Event, frozen=True, kw_only=True):
    """Somebody asked whose a token is, and why; written before the answer is given. Neither token nor id stands here.

    ``table`` is the table that the token is of; ``by`` and ``reason`` are what was said of it, in the open.
    """

    TYPE: ClassVar[str] = "vault.reidentified"

    table: str
    reason: str
    by: str
