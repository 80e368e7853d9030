"""The pages of a bundle: ``VERIFY.md``, which is followed, and ``index.html``, which is read. Floor 4.

Both are written for one record. What comes from a record, a trail or a policy is shown in words only: no character of
it can end a table, open a block of commands or stand in one. In the commands stand nothing but names of files that the
bundle chose, numbers and hexadecimal digits.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey

from rlhf_audit_nb.compliance.templates import template_path
from rlhf_audit_nb.compliance.words import level_words, size_text, time_text, visible
from rlhf_audit_nb.records.additions import ATTESTATION, REPRODUCTION
from rlhf_audit_nb.records.normal_form import canonical_json, without_markers
from rlhf_audit_nb.reports.bundle_evidence import digest_option
from rlhf_audit_nb.reports.html import GENERATOR
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.merkle import leaf_hash
from rlhf_audit_nb.trail.signers import spki_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlhf_audit_nb.records import OpenedRecord
    from rlhf_audit_nb.records.additions import Addition
    from rlhf_audit_nb.reports.bundle_evidence import EvidenceFiles, NamedKey

__all__ = ["UNCOVERED", "BundleFacts", "index_page", "plain", "verify_page"]

UNCOVERED = {
    "VERIFY.md": "this page. It tells what to do, and whoever changes it tells you something else.",
    "index.html": "a list of what is here, for reading.",
    "report.html": "drawn from the record, for reading. Whoever has the tool draws it again from `record.ipynb` "
    "and gets the same bytes (`rlhf-audit verify` of this folder compares them).",
    "SHA256SUMS": "finds damage, and says nothing of who wrote the files.",
}
"""The files that no signature covers, and what they are."""

_SCRIPTS = ("proofs", "checkpoint", "turns", "tiles", "notebook", "additions", "anchors")
_UNSAFE = re.compile(r"[`*_<>|\[\]\\~]")
_LONG = 120
_MOST_TOLD = 12


@dataclass(frozen=True)
class BundleFacts:
    """What the pages say beside the evidence itself.

    Attributes:
        opened: the record, verified.
        evidence: its evidence as files.
        tiles: whether the tiles of the trail are in the bundle.
        sizes: bytes of every other file in the bundle, by path.
    """

    opened: OpenedRecord
    evidence: EvidenceFiles
    tiles: bool
    sizes: Mapping[str, int]


def plain(text: str) -> str:
    """Words of somebody else's as they may stand in a page of Markdown: one line, nothing that is markup."""
    line = " ".join(_UNSAFE.sub(" ", visible(text)).split())
    return line if len(line) <= _LONG else line[: _LONG - 1] + "…"


def _code(text: str) -> str:
    """The same between two backticks."""
    return visible(" ".join(text.split())).replace("`", "'").replace("|", "¦")


def _scripts() -> dict[str, Any]:
    folder = template_path("bundle")
    texts: dict[str, Any] = {name: (folder / f"{name}.py.txt").read_text(encoding="utf-8") for name in _SCRIPTS}
    return {**texts, "lines": {name: text.count("\n") for name, text in texts.items()}}


def _lasting(key: str, message: str, signature: str, says: str) -> str:
    """Commands for a signature that only newer versions of openssl can check; it counts where it is wrong."""
    return (
        "if openssl list -signature-algorithms 2> /dev/null | grep -qi ML-DSA-44; then\n"
        f"  openssl pkeyutl -verify -pubin -inkey {key} -rawin -in {message} -sigfile {signature}\n"
        f'  if [ $? -eq 0 ]; then echo "GOOD  {says}"; else bad=$((bad + 1)); echo "BAD   {says}"; fi\n'
        "else\n"
        f'  echo "OPEN  {says}: not checked, $(openssl version) does not know ML-DSA (3.5 and later do)"\n'
        "fi\n"
    )


def _note_checks(place: str, keys: tuple[NamedKey, ...]) -> str:
    """Commands for each known signature on a checkpoint, whose messages were written down as ``place``."""
    commands = ""
    for key in keys:
        who = key.file.replace("-", " ") if key.file.startswith("witness-") else "the log's key"
        says = f"{who} signed {'the' if place == 'checkpoint' else 'a later'} checkpoint"
        message, signature = (f'"${{work:?}}/{place}.{key.file}.{part}"' for part in ("msg", "sig"))
        if key.lasting:
            commands += _lasting(f"keys/{key.file}.pem", message, signature, f"{says}, to last (ML-DSA-44)")
        else:
            commands += _verified(f"keys/{key.file}.pem", "", message, signature, says)
    return commands


def _verified(key: str, digest: str, message: str, signature: str, says: str) -> str:
    return (
        f"openssl pkeyutl -verify -pubin -inkey {key} -rawin{digest} -in {message} -sigfile {signature}\n"
        f'result $? "{says}"\n'
    )


_KINDS = {ATTESTATION: "a person's signature", REPRODUCTION: "a reproduction"}
_OWN = frozenset({"key", "time", "previous"})


def _addition(number: int, addition: Addition) -> dict[str, Any]:
    kind = _KINDS.get(addition.predicate_type, f"an addition of type {plain(addition.predicate_type)}")
    told = [
        f"{plain(name)}: {plain(str(value))}"
        for name, value in sorted(addition.predicate.items())
        if name not in _OWN and isinstance(value, str | int | float) and value not in ("", None)
    ]
    says = "; ".join([f"{kind}, {plain(addition.predicate['time'])}", *told[:_MOST_TOLD]])
    spki = spki_of(addition.key)
    return {
        "number": number,
        "says": says,
        "fingerprint": addition.key_id,
        "lasting": isinstance(addition.key, MLDSA44PublicKey),
        "digest": digest_option(spki),
    }


def _anchors(evidence: EvidenceFiles) -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "signers": signers,
            "signed": any(key.file == "log" for key in signers),
            "stamps": list(range(1, len(anchor.timestamps) + 1)),
        }
        for number, (anchor, signers) in enumerate(zip(evidence.seal.anchors, evidence.anchor_signers, strict=True), 1)
    ]


def _markers(content: dict[str, Any]) -> list[str]:
    """Each cell that papermill put around the failed one after sealing: its place, and the digest of its words."""
    covered = {place for place, _ in without_markers(content["cells"])}
    found = []
    for place, cell in enumerate(content["cells"]):
        if place not in covered:
            source = cell["source"]
            words = {**cell, "id": "", "source": "".join(source) if isinstance(source, list) else source}
            found.append(f"{place}:{hashlib.sha256(canonical_json(words)).hexdigest()}")
    return found


def _outcome(opened: OpenedRecord) -> str:
    sealed = opened.sealed
    assert sealed is not None
    where = f" in the cell {plain(sealed.cell)}" if sealed.cell else ""
    why = f", with {plain(sealed.reason)}" if sealed.reason else ""
    return f"the run {plain(sealed.status)}{where}{why}"


def _facts(facts: BundleFacts) -> dict[str, Any]:
    opened, evidence = facts.opened, facts.evidence
    seal, head = evidence.seal, checkpoint_of(evidence.seal.checkpoint)
    assert opened.sealed is not None
    assert opened.content is not None
    sealed_at = opened.statement["predicate"]["runDetails"]["metadata"]["finishedOn"]
    witnesses = {key.file for keys in (evidence.signers, *evidence.anchor_signers) for key in keys}
    return {
        "record": seal.record,
        "version": seal.version,
        "sealed": f"{sealed_at[:10]} {sealed_at[11:19]} UTC",
        "outcome": _outcome(opened),
        "digest": opened.sealed.digest,
        "origin": _code(head.origin),
        "size": head.size,
        "root": head.root_base64,
        "entries": len(seal.entries),
        "signers": evidence.signers,
        "witness_files": sorted(name for name in witnesses if name.startswith("witness-")),
        "statement_keys": [
            {"file": key.file, "lasting": key.lasting, "digest": digest_option(key.spki)}
            for key in evidence.statement_keys
        ],
        "turns": len(evidence.turns),
        "turn_keys": [key.file for key in evidence.turns],
        "tiles": facts.tiles,
        "markers": _markers(opened.content),
        "additions": [_addition(number, addition) for number, addition in enumerate(opened.additions, 1)],
        "anchors": _anchors(evidence),
    }


def verify_page(facts: BundleFacts) -> str:
    """``VERIFY.md`` for one record."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template_path("bundle")),
        autoescape=False,  # noqa: S701  Markdown; what is not ours has gone through `plain` or `_code`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"lasting": _lasting, "note_checks": _note_checks}
    template = environment.get_template("VERIFY.md.j2")
    told = {"r": _facts(facts), "scripts": _scripts(), "uncovered": UNCOVERED.items(), "generator": GENERATOR}
    # Every check that must hold is followed by this call; the last block tells how many there are.
    page = template.render(**told, total=0, may_be_open=False)
    return template.render(**told, total=page.count("\nresult $? "), may_be_open='echo "OPEN' in page)


# -- the index ------------------------------------------------------------------------------------------------------

_ABOUT = (
    ("VERIFY.md", "how to check all of it, step by step"),
    ("report.html", "the report of this record, drawn for reading"),
    ("record.ipynb", "the record: the executed notebook with its seal; opens in Jupyter"),
    ("checkpoint", "the signed head of the log that the record stands in"),
    ("statement.json", "what the record claims: from what it was made, and what came of it"),
    ("statement.dsse.json", "the same in its signed envelope"),
    ("statement.", "a signature on the statement"),
    ("entries/", ""),
    ("additions/", "what somebody else has signed of the record"),
    ("anchors/", "a later checkpoint of the log, and who has seen it"),
    ("keys/log-", "a key of the log before it was replaced"),
    ("keys/log.", "the log's public key"),
    ("keys/record.", "the public key that signed the statement"),
    ("keys/lasting.", "the public key of the second signatures, which are meant to last"),
    ("keys/witness-", "the public key of a witness"),
    ("tile/", "hashes of the log's tree"),
    ("SHA256SUMS", "the digests of these files"),
)


def _files(facts: BundleFacts) -> list[dict[str, str]]:
    names = sorted({*facts.sizes, "VERIFY.md", "SHA256SUMS"} - {"index.html"})
    rows = []
    for prefix, about in _ABOUT:
        for name in [name for name in names if name.startswith(prefix)]:
            names.remove(name)
            if about:
                size = size_text(facts.sizes[name]) if name in facts.sizes else ""
                rows.append({"name": name, "about": about, "size": size})
    return rows


def index_page(facts: BundleFacts) -> str:
    """``index.html`` for one record."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(template_path("bundle")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = sorted(name for name in facts.evidence.files if name.startswith("entries/") and name.endswith(".json"))
    entries = [
        {
            "file": name,
            "index": item.entry.index,
            "time": time_text(item.entry.time),
            "type": visible(item.entry.type),
            "run": (item.entry.run or "")[:8],
            "leaf": leaf_hash(item.entry.data).hex(),
        }
        for name, item in zip(names, facts.evidence.seal.entries, strict=True)
    ]
    level = facts.opened.verdict.level.name
    css = (template_path("nbconvert", "audit-html") / "tokens.css").read_text(encoding="utf-8")
    page = environment.get_template("index.html.j2").render(
        r=_facts(facts),
        level=level,
        words=level_words(level),
        files=_files(facts),
        entries=entries,
        css=Markup(css),  # noqa: S704  our own style sheet
        generator=GENERATOR,
    )
    return page + "\n"
