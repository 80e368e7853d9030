"""What the tests of people's signatures share: a record that is made without a kernel, and keys from the terminal."""

from __future__ import annotations

from pathlib import Path

import nbformat

from rlhf_audit_nb.records.session import Outcome, RecordSession


def seal_text(trail: Path, path: Path, text: str) -> Path:
    """A record of one markdown cell on a trail, written to ``path``."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="a")])
    session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, trail)
    session.seal(nb, Outcome("completed"))
    session.close()
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    return path
