"""The house stands: no import runs up a floor or across it, no private name is borrowed, each module says its floor."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = "rlhf_audit_nb"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

FLOORS = {
    "errors": 0,
    "config": 0,
    "counted": 0,
    "trail": 0,
    "events": 1,
    "demo": 1,
    "capture": 2,
    "privacy": 2,
    "records": 3,
    "compliance": 3,
    "privatiser": 3,
    "gate": 4,
    "health": 4,
    "replaying": 4,
    "reports": 4,
    "cards": 4,
    "labelling": 4,
    "auditor": 5,
    "showcase": 5,
    "sweeping": 5,
    "cli": 6,
    "notebook": 6,
    "labserver": 6,
    "": 6,  # the package's own __init__: names only
}

# Doors between rooms of one floor: what everybody may raise and read, and what the auditor composes.
DOORS = {("config", "errors"), ("trail", "errors"), ("trail", "config"), ("auditor", "sweeping")}


def room_of(module: str) -> str:
    """The room of a dotted module name inside the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_name(path: Path, root: Path) -> str:
    parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    base = module.split(".")
    base = base[: len(base) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def is_room(name: str) -> bool:
    return room_of(name) in FLOORS and room_of(name) != ""


def imports(tree: ast.AST, module: str, *, is_package: bool) -> list[tuple[int, str, str]]:
    """Every import of the package's own: line, module, imported name ('' for a whole module)."""
    found: list[tuple[int, str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module, is_package=is_package)
            found += [
                (node.lineno, f"{source}.{alias.name}", "")
                if source == PACKAGE and is_room(f"{source}.{alias.name}")
                else (node.lineno, source, alias.name)
                for alias in node.names
            ]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found += [(node.lineno, a.value, "") for a in node.args if isinstance(a, ast.Constant)]
    return [item for item in found if item[1] == PACKAGE or item[1].startswith(PACKAGE + ".")]


def faults(path: Path, root: Path) -> list[str]:
    """What is wrong with one module, each as a sentence."""
    module = module_name(path, root)
    room = room_of(module)
    where = path.relative_to(root.parent)
    if room not in FLOORS:
        return [f"{where}: room {room!r} is on no floor"]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    if f"Floor {FLOORS[room]}" not in re.sub(r"\s+", " ", ast.get_docstring(tree) or ""):
        found.append(f"{where}: its docstring does not say 'Floor {FLOORS[room]}'")
    aliases: set[str] = set()
    for line, target, name in imports(tree, module, is_package=path.name == "__init__.py"):
        other = room_of(target)
        if other not in FLOORS:
            found.append(f"{where}:{line}: imports {target}, which is in no room")
            continue
        if other == room:
            pass
        elif other == "":
            if name != "__version__":
                found.append(f"{where}:{line}: imports {name or target} through the public face")
        elif room == "" and is_type_checking_only(tree, line):
            pass
        elif FLOORS[other] > FLOORS[room]:
            found.append(f"{where}:{line}: imports {target}, up from floor {FLOORS[room]} to {FLOORS[other]}")
        elif FLOORS[other] == FLOORS[room] and (room, other) not in DOORS:
            found.append(f"{where}:{line}: imports {target}, a sibling room of floor {FLOORS[room]}")
        if name.startswith("_") and not name.startswith("__") and target != module:
            found.append(f"{where}:{line}: borrows the private name {name} of {target}")
        if any(part.startswith("_") and not part.startswith("__") for part in target.split(".")) and other != room:
            found.append(f"{where}:{line}: imports the private module {target}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = absolute(node, module, is_package=path.name == "__init__.py")
            if source.startswith(PACKAGE):
                aliases |= {a.asname or a.name for a in node.names if (a.asname or a.name).islower()}
    borrowed = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in aliases
        and re.match(r"_[a-z]", node.attr)
        and is_module_alias(tree, node.value.id)
    ]
    found += [f"{where}:{n.lineno}: borrows {n.value.id}.{n.attr}" for n in borrowed]  # type: ignore[attr-defined]
    return found


def is_module_alias(tree: ast.AST, name: str) -> bool:
    """Whether ``name`` came from ``from package import module`` (a room's module of that name exists)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module and node.module.startswith(PACKAGE):
                    base = ROOT.joinpath(*node.module.split(".")[1:])
                    return (base / f"{alias.name}.py").exists() or (base / alias.name / "__init__.py").exists()
    return False


def is_type_checking_only(tree: ast.AST, line: int) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            last = max((getattr(n, "lineno", 0) for n in ast.walk(node)), default=0)
            if node.lineno <= line <= last:
                return True
    return False


MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT.parent)))
def test_a_module_keeps_to_its_floor(path):
    assert faults(path, ROOT) == []


def test_every_module_was_looked_at():
    assert len(MODULES) >= 5
    assert {room_of(module_name(p, ROOT)) for p in MODULES} >= {"errors", "config", "events"}


@pytest.mark.parametrize(
    ("room", "source", "complaint"),
    [
        ("privacy/x.py", '"""Floor 2."""\nfrom rlhf_audit_nb.reports import html\n', "up from floor 2 to 4"),
        (
            "privacy/x.py",
            '"""Floor 2."""\ndef f():\n    import rlhf_audit_nb.capture.run\n',
            "a sibling room of floor 2",
        ),
        ("trail/x.py", '"""Floor 0."""\nfrom ..events import Step\n', "up from floor 0 to 1"),
        ("trail/x.py", '"""Floor 0."""\nfrom rlhf_audit_nb import events\n', "up from floor 0 to 1"),
        ("records/x.py", '"""Floor 3."""\nfrom rlhf_audit_nb.trail.merkle import _hash\n', "the private name _hash"),
        ("records/x.py", '"""Floor 3."""\nfrom rlhf_audit_nb.trail._sql import rows\n', "the private module"),
        (
            "records/x.py",
            '"""Floor 3."""\nfrom rlhf_audit_nb import events\nevents._all_events()\n',
            "borrows events._all",
        ),
        ("records/x.py", '"""Keeps records."""\n', "does not say 'Floor 3'"),
        ("attic/x.py", '"""Floor 9."""\n', "on no floor"),
        (
            "cli.py",
            '"""Floor 6."""\nfrom importlib import import_module\nimport_module("rlhf_audit_nb.notebook")\n',
            "sibling",
        ),
        ("cards/x.py", '"""Floor 4."""\nfrom rlhf_audit_nb import AuditableRLHF\n', "through the public face"),
    ],
)
def test_a_wrong_import_is_named(tmp_path, room, source, complaint):
    root = tmp_path / PACKAGE
    path = root / room
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = faults(path, root)
    assert len(found) == 1
    assert complaint in found[0]


def test_a_right_import_is_not_complained_of(tmp_path):
    path = tmp_path / PACKAGE / "capture" / "run.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        '"""The run. Floor 2."""\nfrom rlhf_audit_nb.trail import Trail\nfrom rlhf_audit_nb import __version__\n'
    )
    assert faults(path, tmp_path / PACKAGE) == []
