"""Where a trail stands, and how small tables of facts look in a notebook. Floor 5."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Trail

__all__ = ["Status", "save_json", "table"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a trail stands."""

    origin: str
    location: str
    size: int
    root: str
    signer: str
    unsynced: int

    @classmethod
    def of(cls, trail: Trail) -> Status:
        """The status of an open trail."""
        import base64

        status = trail.status()
        return cls(
            origin=trail.origin,
            location=str(trail.location),
            size=status.size,
            root=base64.b64encode(status.root).decode(),
            signer=status.signer,
            unsynced=status.unsynced,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def save(self, path: Path | str) -> Path:
        """Write the fields as JSON."""
        return save_json(self.to_dict(), path)

    def __str__(self) -> str:
        return f"Trail {self.origin}: {self.size} entries, root {self.root}"

    __repr__ = __str__  # without the folder: a notebook is passed on

    def _repr_html_(self) -> str:
        return table(
            "Trail", {"origin": self.origin, "entries": self.size, "root": self.root, "signed by": self.signer}
        )


def save_json(values: dict[str, Any], path: Path | str) -> Path:
    """Write plain values as JSON."""
    target = Path(path)
    target.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def table(title: str, rows: dict[str, Any]) -> str:
    """A caption and rows of names and values, as HTML; both are escaped."""
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"
