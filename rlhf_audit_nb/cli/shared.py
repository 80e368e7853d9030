"""What every command shares: how it speaks, how it names things, how it is described to the grammar. Floor 6."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import urlsplit

from rlhf_audit_nb.errors import ConfigError, FormatError, KeyFileError

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import TrustPolicy

__all__ = [
    "PROGRAM",
    "WIDTH",
    "Command",
    "Parser",
    "Section",
    "add_json",
    "add_policy",
    "add_trail",
    "as_json",
    "beside",
    "endorse",
    "finish",
    "is_bundle",
    "is_gate_policy",
    "is_record",
    "is_record_address",
    "note",
    "output",
    "read_policy",
    "say",
    "shown",
    "skip_address_parsers",
    "trail_folder",
    "wrapped",
]

PROGRAM = "rlhf-audit"
WIDTH = 100
RECORD_SUFFIX = ".ipynb"

Section = Literal["train and record", "check", "say", "share", "keep"]


@dataclass(frozen=True)
class Command:
    """One command: the section of the overview that it stands in, its name, one line of help, and its options."""

    section: Section
    name: str
    help: str
    build: Callable[[Parser], None]


class Parser(argparse.ArgumentParser):
    """argparse in the words of this package: one sentence, the close match, the next step; exit code 2."""

    def error(self, message: str) -> NoReturn:
        """A mistake in the command line."""
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.", next_step=f"See {self.prog} --help.", code="usage")

    def options(self) -> list[str]:
        """Every option that this command takes."""
        return [text for action in self._actions for text in action.option_strings]

    def all_options(self) -> list[str]:
        """Those, and every one that a part of it takes."""
        groups = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        return self.options() + [text for parts in groups for part in parts.values() for text in part.all_options()]


def as_json(value: Any) -> str:
    """One JSON value in a line; characters that a terminal would obey, or not show, are written as escapes."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:  # 1e999 is a number in JSON and too large for ours
        text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def shown(text: str) -> str:
    """``text`` as a terminal may be told it: whoever wrote a trail must not write our verdicts, or hide them."""
    if text.isprintable():
        return text
    # Here and not above: most of what is said needs no table of all characters.
    from rlhf_audit_nb.compliance.words import visible

    return visible(text)


def say(text: str = "") -> None:
    """A result, for whoever reads stdout."""
    print(shown(text))


def note(text: str) -> None:
    """Progress and complaints, which are no result."""
    print(shown(text), file=sys.stderr, flush=True)


def wrapped(text: str) -> list[str]:
    """A line of words as lines of a terminal's width, those after the first indented further."""
    inner = len(text) - len(text.lstrip())
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * (inner + 2), break_on_hyphens=False)


def finish(args: argparse.Namespace, result: dict[str, Any], words: Sequence[str], code: int = 0) -> int:
    """Ends a command: the words, or with ``--json`` one object on stdout and the words on stderr."""
    for line in words:
        (note if args.json else say)(line)
    if args.json:
        print(as_json(result))
    return code


def read_policy(args: argparse.Namespace) -> TrustPolicy | None:
    """The trust policy that was named, ``None`` where none was.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    if args.policy is None:
        return None
    from rlhf_audit_nb.trail import TrustPolicy

    data = _bytes(args.policy, "trust policy")
    if is_gate_policy(data):
        raise ConfigError(
            f"{args.policy} is a policy for records and gates, and only whom to trust is asked for here.",
            next_step="Name the trust policy (its log and quorum lines) that stands after trust: in it.",
            code="gate-policy",
        )
    try:
        return TrustPolicy.parse(data)
    except FormatError as error:
        raise ConfigError(
            f"{args.policy} is not a trust policy. {error.message}",
            next_step="Name the file with the public keys (a log line and a quorum line) that the key-holder gave you.",
            code=error.reason,
        ) from error


def is_gate_policy(data: bytes) -> bool:
    """Whether a policy's file is one for records and gates (YAML), and not a trust policy (lines of tlog-policy)."""
    from rlhf_audit_nb.gate.reading import is_mapping_text

    return is_mapping_text(data.decode("utf-8-sig", errors="replace"))


def _bytes(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"The {what} {path} cannot be read: {reason}.", next_step="Check the path.") from error


def is_record(target: str) -> bool:
    """Whether a target is a record (a notebook) and not a trail's folder.

    Raises:
        ConfigError: there is nothing of that name.
    """
    if is_record_address(target):
        return True
    path = Path(target)
    if path.is_dir():
        return False
    if path.exists() or path.suffix == RECORD_SUFFIX:
        return True
    raise ConfigError(
        f"There is no record or trail at {target}.",
        next_step="Name an executed notebook (.ipynb) or a trail's folder.",
        code="no-target",
    )


def is_record_address(target: str) -> bool:
    """Whether a target is the address of a notebook, and not of a published trail."""
    return "://" in target and urlsplit(target).path.endswith(RECORD_SUFFIX)


def is_bundle(target: str) -> bool:
    """Whether a target is a bundle: a folder with a record and the sums of what lies beside it, or a zip."""
    path = Path(target)
    if path.is_dir():
        return (path / "record.ipynb").is_file() and (path / "SHA256SUMS").is_file()
    return path.suffix.lower() == ".zip" and path.is_file()


def endorse(checkpoint: str) -> str:
    """The checkpoint with the log's own lasting (ML-DSA-44) signature too, where this user has the key for it."""
    from rlhf_audit_nb.trail.checkpoint import checkpoint_of
    from rlhf_audit_nb.trail.home import home_folder, keys_folder
    from rlhf_audit_nb.trail.keys import load_keys

    home, origin = home_folder(), checkpoint_of(checkpoint).origin
    if not (keys_folder(home, origin) / "mldsa.vkey").is_file():
        return checkpoint
    try:
        return load_keys(home, origin).endorse(checkpoint)
    except KeyFileError as error:
        note(f"the checkpoint is left without the log's ML-DSA-44 signature: {error.message}")
        return checkpoint


def skip_address_parsers() -> None:
    """Leave out parsers of international addresses, which jsonschema builds as it is imported, for about a second.

    Drawing a report imports jsonschema; no command, each being a process of its own, asks for them, and jsonschema does
    without where they are not installed.
    """
    modules: Any = sys.modules
    modules.setdefault("rfc3987_syntax", None)  # what a failed import leaves


def trail_folder(args: argparse.Namespace) -> Path:
    """The trail that was named, or the usual one."""
    from rlhf_audit_nb.config import AuditConfig

    return AuditConfig(trail=args.trail).trail_location()


def beside(target: str, suffix: str) -> Path:
    """The result's place where none is named: the target with another ending."""
    path = Path(target)
    if path.name in ("", ".."):
        path = path.resolve()
    return path.with_suffix(suffix) if path.name else path


def output(args: argparse.Namespace, default: Path) -> Path:
    """Where the result goes; the folder is made.

    Raises:
        ConfigError: it cannot be written there.
    """
    path = Path(args.out) if args.out else default
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(13, "no permission to write there")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}.", next_step="Name another file with -o.", code="output"
        ) from error
    return path


def add_policy(parser: argparse.ArgumentParser, *, also: str = "") -> None:
    """The option that says whom to trust; ``also`` is what else a file there may say."""
    more = f"; {also}" if also else ""
    parser.add_argument("--policy", metavar="FILE", help=f"whom to trust (default: the user's own keys){more}")


def add_trail(parser: argparse.ArgumentParser) -> None:
    """The option that names the trail."""
    parser.add_argument("--trail", metavar="DIR", help="the trail's folder ($RLHF_AUDIT_TRAIL, else audit)")


def add_json(part: argparse.ArgumentParser) -> None:
    """``--json`` for a part of a command (a command itself has it already)."""
    # SUPPRESS: an absent flag here must not overwrite one given before the part.
    part.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object on stdout")
