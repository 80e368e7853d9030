"""Where a user's keys and memory lie, apart from any trail. Floor 0."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import platformdirs

from rlhf_audit_nb.config import ENV_HOME
from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.encoding import check_name

__all__ = ["folder_name", "home_folder", "keys_folder", "retired_folder", "revoked_folder"]

_NAME_BYTES = 180


def home_folder(home: Path | str | None = None) -> Path:
    """The folder of keys and last-seen heads: the argument, ``RLHF_AUDIT_HOME``, or the user's own."""
    chosen = home or os.environ.get(ENV_HOME) or platformdirs.user_config_dir("rlhf-audit", appauthor=False)
    return Path(chosen).expanduser()


def folder_name(origin: str) -> str:
    """The file name that stands for an origin."""
    name = quote(check_name(origin, "origin"), safe="")
    if len(name) > _NAME_BYTES or set(name) == {"."}:
        raise FormatError(f"The origin {origin[:60]!r} is too long or only dots.", code="name")
    return name


def keys_folder(home: Path, origin: str) -> Path:
    """The key ring of ``origin``."""
    return home / "keys" / folder_name(origin)


def retired_folder(home: Path, origin: str) -> Path:
    """The public halves of the keys that were replaced."""
    return keys_folder(home, origin) / "retired"


def revoked_folder(home: Path) -> Path:
    """The revocations that were imported or made here, of any origin."""
    return home / "revoked"
