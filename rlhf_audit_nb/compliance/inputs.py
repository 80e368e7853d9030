"""In words, what a training started from: the files of data and models, templates and tokenizer, code. Floor 3.

Reports and cards say the same of an input. Lists stay short here; the entry that is cited holds every name and digest,
or names the list beside the trail that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.events import CodeFiles, InputFiles, ModelBound

__all__ = ["code_note", "code_text", "commit_text", "digest_texts", "files_note", "files_text"]

MOST_NAMED = 6
_DIGESTS = (
    ("configuration", "config_digest"),
    ("generation settings", "generation_digest"),
    ("tokenizer", "tokenizer_digest"),
    ("chat template", "chat_template_digest"),
)


def files_text(files: InputFiles) -> str:
    """How many files, how large, and their names."""
    named = _named([file.name for file in files.files], files.count)
    return f"{words.plural(files.count, 'file')}, {words.size_text(files.bytes)}{named}"


def files_note(files: InputFiles, weights: str | None = None) -> str:
    """The digest of their list, where that stands, and whether the files' tensors are ``weights``, those in memory."""
    where = "names and digests in the entry" if files.files else f"names and digests in artifacts/{files.digest}.json"
    said = [f"list sha256 {files.digest}", where]
    if weights is not None and files.tensors is not None:
        same = files.tensors == weights
        said.append(
            "the weights in memory are those of the files"
            if same
            else f"the weights in memory are others than those of the files, sha256 {files.tensors}"
        )
    return "; ".join(said)


def commit_text(revision: str | None) -> str:
    """The commit on the hub, where one is recorded."""
    return f"commit {revision} on the hub" if revision else ""


def digest_texts(model: ModelBound) -> tuple[str, ...]:
    """The digests of a model's configuration, generation settings, tokenizer and chat template, where it has them."""
    found = ((name, getattr(model, field)) for name, field in _DIGESTS)
    return tuple(f"{name} sha256 {digest}" for name, digest in found if digest)


def code_text(code: CodeFiles) -> str:
    """How many local files, and their paths below the project."""
    place = "of the repository" if code.project == "git" else "below the working directory"
    if not code.count:
        return f"no file {place}"
    return f"{words.plural(code.count, 'file')} {place}{_named(sorted(code.files), code.count)}"


def code_note(code: CodeFiles) -> str:
    """The digest of their list, and what limits it."""
    said = [f"list sha256 {code.digest}"] if code.count else []
    if code.count and not code.files:
        said.append(f"paths and digests in artifacts/{code.digest}.json")
    if code.changed:
        said.append(f"another file now than was imported: {_listed(code.changed, len(code.changed))}")
    if code.left_out:
        said.append(f"{words.count(code.left_out)} more left out")
    if code.elsewhere:
        said.append(f"{words.count(code.elsewhere)} elsewhere, not digested")
    return "; ".join(said)


def _named(names: Sequence[str], count: int) -> str:
    return f": {_listed(names, count)}" if names else ""


def _listed(names: Sequence[str], count: int) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return f"{shown} and {words.count(count - MOST_NAMED)} more" if count > MOST_NAMED else shown
