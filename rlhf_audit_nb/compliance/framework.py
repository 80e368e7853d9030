"""Frameworks as data: a law or standard as a list of demands, read from ``frameworks/*.yaml``. Floor 3.

A file names the text of the law that it was read from, so that a report can print it. `Requirement.query` names the
evidence query (see `rlhf_audit_nb.compliance.queries`) that can answer an automatic row in this version.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Literal

import msgspec
import yaml

from rlhf_audit_nb.errors import ReportError

__all__ = ["MODES", "Framework", "Requirement", "load_framework", "parse_framework"]

MODES: tuple[str, ...] = ("eu_ai_act",)
"""The compliance modes that this version has."""

Mode = Literal["automatic", "attest", "n-a"]


class Requirement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One demand: who answers it, from when, how it can be answered, and from which text it was read."""

    id: str
    article: str
    part: str
    requirement: str
    who: str
    applies_from: str
    text: Literal["2026", "2024", "secondary"]
    mode: Mode
    prefill: str | None = None
    query: str | None = None
    material: str | None = None
    reason: str | None = None


class Framework(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A law or standard: its title, the version of its text, what must not be read into a trail, and its demands."""

    id: str
    title: str
    law: str
    text_version: str
    text_date: str
    traps: list[str]
    requirements: list[Requirement]
    digest: str = ""


def parse_framework(text: str) -> Framework:
    """A framework from YAML.

    Raises:
        ReportError: a field is missing, unknown or contradicts another one.
    """
    try:
        framework = msgspec.convert(yaml.safe_load(text), Framework)
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        raise ReportError(f"The framework cannot be read: {error}.", code="framework") from error
    seen: set[str] = set()
    for requirement in framework.requirements:
        _check(requirement, seen)
    return msgspec.structs.replace(framework, digest=hashlib.sha256(text.encode()).hexdigest())


def _check(requirement: Requirement, seen: set[str]) -> None:
    if requirement.id in seen:
        raise ReportError(f"Requirement {requirement.id} stands twice in the framework.", code="framework")
    seen.add(requirement.id)
    wants_reason = requirement.mode != "attest"
    if (requirement.reason is not None) != wants_reason or (requirement.mode != "automatic" and requirement.query):
        raise ReportError(
            f"Requirement {requirement.id} of mode {requirement.mode!r} needs "
            f"{'a reason for where nothing stands' if wants_reason else 'neither a query nor a reason'}"
            f"{' and no query' if requirement.mode == 'n-a' else ''}.",
            code="framework",
        )


@cache
def load_framework(mode: str) -> Framework:
    """The framework of a compliance mode.

    Raises:
        ReportError: there is no such mode; the message lists those there are.
    """
    if mode not in MODES:
        raise ReportError(
            f"The compliance mode {mode!r} is not known.",
            next_step=f"Write one of: {', '.join(MODES)}.",
            code="unknown-mode",
        )
    path = resources.files("rlhf_audit_nb.compliance").joinpath("frameworks", f"{mode}.yaml")
    return parse_framework(path.read_text(encoding="utf-8"))
