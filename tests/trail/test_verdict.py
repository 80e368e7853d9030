"""A level follows from codes alone, and every code is told of in docs/trail/verdicts.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rlhf_audit_nb.trail.verdict import ADVISORY, DIVERGING, Level, Reason, Verdict, level_of

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIL = REPOSITORY / "rlhf_audit_nb" / "trail"
# What says something of a history: every code that is written out there stands in the table.
SAYING = {"Reason", "fault", "_fault", "say"}
SAYING_MODULES = tuple(sorted(path.stem for path in TRAIL.glob("*.py")))
# What a history's own bytes are read with: the codes of their refusals become reasons.
READING_MODULES = ("checkpoint", "disclosure", "encoding", "entry", "frame", "note", "succession", "vkey")
# Refusals of what a caller hands in (a key, a policy, a file beside the trail), which is no history.
OF_ARGUMENTS = {"revocation"}


def reason(code: str) -> Reason:
    return Reason(code, "entry 1", "It is.")


@pytest.mark.parametrize(
    ("codes", "level"),
    [
        ([], None),
        (["run-open", "quorum"], None),
        (["fork", "run-open"], Level.DIVERGED),
        (["fork", "rollback", "anchor-fork"], Level.DIVERGED),
        (["fork", "root"], Level.INVALID),
        (["index"], Level.INVALID),
        (["of-a-later-version"], Level.INVALID),
    ],
)
def test_the_worst_code_decides_and_one_that_is_not_known_is_the_worst(codes, level):
    assert level_of(reason(code) for code in codes) is level


def test_a_quorum_that_is_missing_fails_only_where_no_level_is_required():
    verdict = Verdict(Level.UNANCHORED, "o", 1, "", reasons=(reason("quorum"),))
    assert verdict.exit_code() == 10
    assert verdict.exit_code(Level.UNANCHORED) == 0
    stamped = Verdict(Level.TIMESTAMPED, "o", 1, "", reasons=(reason("quorum"),))
    assert stamped.exit_code() == 5
    assert stamped.exit_code(Level.TIMESTAMPED) == 0


def test_a_verdict_can_be_a_member_of_a_set():
    assert len({Verdict(Level.UNANCHORED, "o", 1, "", openings={"checked": True})}) == 1


def page() -> list[str]:
    """What stands on the page of reasons: of all, and of records."""
    text = (REPOSITORY / "docs" / "trail" / "verdicts.md").read_text(encoding="utf-8")
    return text.split("## Reasons")[1].split("### In a record")


def table() -> dict[str, str]:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| ([A-Za-z ]+) \| [^|]+ \| [^|]+ \|$", page()[0], re.MULTILINE)
    assert len(rows) == len(dict(rows))
    return dict(rows)


def words(node: ast.AST | None) -> set[str]:
    """The strings that an expression can be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.IfExp):
        return words(node.body) | words(node.orelse)
    return set()


def tree_of(module: str, folder: Path = TRAIL) -> ast.Module:
    return ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))


def said(module: str) -> set[str]:
    """The codes that a module's reasons have where they are written out."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in SAYING
            and node.args
        ):
            found |= words(node.args[0])
        if isinstance(node, ast.Assign):
            targets, values = node.targets[0], node.value
            if isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple):
                pairs = list(zip(targets.elts, values.elts, strict=False))
            else:
                pairs = [(targets, values)]
            for target, value in pairs:
                found |= words(value) if getattr(target, "id", "") == "code" else set()
    return found


def refused(module: str) -> set[str]:
    """The codes of a module's `FormatError`."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "FormatError":
            found |= {code for item in node.keywords if item.arg == "code" for code in words(item.value)}
    return found


def known() -> set[str]:
    found = set().union(*map(said, SAYING_MODULES))
    found |= set().union(*map(refused, READING_MODULES))
    policy = next(n for n in ast.walk(tree_of("policy")) if isinstance(n, ast.FunctionDef) and n.name == "check")
    for node in ast.walk(policy):
        if isinstance(node, ast.keyword) and node.arg == "code":
            found |= words(node.value)
    return (found | {"bundle"}) - OF_ARGUMENTS


def test_every_code_of_the_code_stands_in_the_table_and_the_reverse():
    assert known() == set(table())


def test_the_table_gives_each_code_the_level_that_it_leads_to():
    names = {None: "as it is", Level.DIVERGED: "DIVERGED", Level.INVALID: "INVALID"}
    assert table() == {code: names[level_of([reason(code)])] for code in table()}
    assert set(table()) >= ADVISORY | DIVERGING


def test_the_scan_finds_a_code_that_is_new(monkeypatch):
    plain = tree_of

    def with_a_new_one(module, folder=TRAIL):
        tree = plain(module, folder)
        tree.body += ast.parse("Reason('brand-new', where, message)\nraise FormatError('x', code='never-seen')").body
        return tree

    monkeypatch.setitem(globals(), "tree_of", with_a_new_one)
    assert {"brand-new", "never-seen"} <= known()


def of_records() -> set[str]:
    """The codes of records: of reasons and differences, and of the refusals of a notebook or a seal."""
    found: set[str] = set()
    folder = REPOSITORY / "rlhf_audit_nb" / "records"
    for module in sorted(path.stem for path in folder.glob("*.py")):
        for node in ast.walk(tree_of(module, folder)):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", "")
                if name in ("Reason", "Difference") and node.args:
                    found |= words(node.args[0])
                if name == "_compare_keys":
                    found |= words(node.args[3])
                if name in ("NormalFormError", "SealError") or (name, module) == ("RecordError", "statement"):
                    found |= {code for item in node.keywords if item.arg == "code" for code in words(item.value)}
            if isinstance(node, ast.ClassDef) and node.name in ("NormalFormError", "SealError"):
                found |= {code for item in node.body if isinstance(item, ast.Assign) for code in words(item.value)}
    return found


def test_every_code_of_records_stands_in_their_table_or_in_the_one_of_all():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| [^|]+ \|$", page()[1], re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert of_records() - set(table()) == set(rows)
