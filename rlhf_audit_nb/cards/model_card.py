"""The model card in its formats: ``eu_standard`` and ``huggingface`` (Markdown), ``json``. Floor 4.

``eu_standard`` is this project's own, openly defined layout: the points of Annex IV 1 to 3 and of Annex XI, Section 1,
of the EU AI Act, each answered from the trail or marked *not stated*. No authority has published a form of that name.
``huggingface`` carries metadata that ``huggingface_hub.ModelCard`` reads, and a ``rlhf_audit`` block of our own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf_audit_nb import __version__
from rlhf_audit_nb.cards.content import NOT_STATED, card_content
from rlhf_audit_nb.compliance.templates import template_path
from rlhf_audit_nb.compliance.words import visible
from rlhf_audit_nb.errors import ReportError

if TYPE_CHECKING:
    from rlhf_audit_nb.cards.content import CardContent, Section
    from rlhf_audit_nb.compliance.evidence import Evidence

__all__ = ["FORMATS", "ModelCard", "build_card"]

FORMATS: tuple[str, ...] = ("eu_standard", "huggingface", "json")
TOOL = f"rlhf-audit-trail {__version__}"


class ModelCard:
    """A model card: its text in one format, and the same content as a dict.

    Args:
        content: what the card says.
        format: one of `FORMATS`.
        include_provenance: with run, digests and root.
    """

    def __init__(self, content: CardContent, format: str, *, include_provenance: bool = True) -> None:  # noqa: A002
        self.format = format
        self.content = content
        self.include_provenance = include_provenance
        self.text = _text(self)

    @property
    def sections(self) -> tuple[Section, ...]:
        """The sections that this card shows."""
        return self.content.sections(include_provenance=self.include_provenance)

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values; what is not stated is ``None``."""
        content = self.content
        said: dict[str, Any] = {
            "format": "rlhf-audit-card/1",
            "tool": TOOL,
            "title": content.title,
            "verdict": {"level": content.level, "shows": content.shows, "not_shown": content.not_shown},
            "law": content.law,
            "framework_digest": content.framework_digest,
            "assessment": content.assessment,
            "sections": [
                {"title": section.title, "fields": [field.to_dict() for field in section.fields]}
                for section in self.sections
            ],
        }
        if self.include_provenance:
            said["audit"] = content.audit
        return said

    def save(self, path: Path | str) -> Path:
        """Writes the card's text.

        Raises:
            ReportError: the file cannot be written.
        """
        target = Path(path)
        try:
            target.write_text(self.text, encoding="utf-8")
        except OSError as error:
            raise ReportError(
                f"The card cannot be written to {target}: {error.strerror or error}.",
                next_step="Name a file in a folder that exists and can be written.",
                code="unwritable",
            ) from error
        return target

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        stated = sum(field.stated for section in self.sections for field in section.fields)
        total = sum(len(section.fields) for section in self.sections)
        return f"<ModelCard {self.format} of {self.content.title}: {stated} of {total} fields stated>"

    def _repr_markdown_(self) -> str:
        if self.format == "json":
            return f"```json\n{self.text}```\n"
        return _without_metadata(self.text)


def build_card(
    evidence: Evidence,
    format: str = "eu_standard",  # noqa: A002
    *,
    include_provenance: bool = True,
) -> ModelCard:
    """The card of the newest run that made a model.

    Args:
        evidence: a verified trail or record.
        format: ``eu_standard``, ``huggingface`` or ``json``.
        include_provenance: with run, digests, root and the entries that show them.

    Raises:
        ReportError: the format is not known; the message lists those there are.
    """
    if format not in FORMATS:
        raise ReportError(
            f"The card format {format!r} is not known.",
            next_step=f"Write one of: {', '.join(FORMATS)}.",
            code="unknown-format",
        )
    return ModelCard(card_content(evidence), format, include_provenance=include_provenance)


def _text(card: ModelCard) -> str:
    if card.format == "json":
        return json.dumps(card.to_dict(), ensure_ascii=False, indent=2) + "\n"
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown, not HTML: the templates pass every value through `escaped`, as ``md``.
    environment = Environment(  # noqa: S701
        loader=FileSystemLoader(template_path("cards")), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["md"] = escaped
    body = environment.get_template(f"{card.format}.md.j2").render(
        c=card.content, sections=card.sections, tool=TOOL, not_stated=NOT_STATED, provenance=card.include_provenance
    )
    return (_metadata(card) if card.format == "huggingface" else "") + body.strip() + "\n"


_SPECIAL = re.compile(r"([\\`*\[\]|~$])")
_EDGE_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_START = re.compile(r"^(\s*)([#+\-=])")
_NUMBERED = re.compile(r"^(\s*\d+)([.)])(?=\s|$)")  # a backslash before a digit would be shown


def escaped(value: str) -> str:
    """Text for one line of Markdown: no markup, no HTML, no new line can come out of a value."""
    text = visible(" ".join(value.split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _EDGE_UNDERSCORE.sub(r"\\_", _SPECIAL.sub(r"\\\1", text))
    return _NUMBERED.sub(r"\1\\\2", _START.sub(r"\1\\\2", text))


def _metadata(card: ModelCard) -> str:
    """The YAML block that the Hub reads; only keys whose value the trail holds."""
    content = card.content
    tags = ["rlhf", "rlhf-audit-trail", *(["differential-privacy"] if content.private else [])]
    if content.trainer.endswith("Trainer") and content.trainer != "Trainer":
        tags.append(content.trainer.removesuffix("Trainer").lower())
    data: dict[str, Any] = {"library_name": "peft" if content.adapter else "transformers", "tags": tags}
    if content.hub_base:
        data["base_model"] = content.hub_base
    if content.hub_datasets:
        data["datasets"] = list(content.hub_datasets)
    data["model_name"] = content.title
    if card.include_provenance:
        data["rlhf_audit"] = content.audit
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n"


def _without_metadata(text: str) -> str:
    if not text.startswith("---\n"):
        return text
    return text.split("\n---\n", 1)[1].lstrip()
