"""A fresh environment from the recorded packages: what is asked of pip, what is refused, and what really runs in it."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import site
import sysconfig
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from records_support import HAND, hand_files, stub_source, write_notebook

from rlhf_audit_nb import cli
from rlhf_audit_nb.capture.packages import list_packages
from rlhf_audit_nb.events import EnvironmentCaptured, encode_body
from rlhf_audit_nb.records import open_record, run_notebook
from rlhf_audit_nb.records.reproduce_environment import (
    TOOL,
    EnvironmentRefusedError,
    Wanted,
    make_environment,
    requirement_lines,
    wanted_packages,
)

PYTHON = platform.python_version()
KERNEL = Wanted("ipykernel", "0.0.1")
STUB = Wanted("stub", "1.0")


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A wheel as small as it can be."""
    told = f"{name}-{version}.dist-info"
    content = {
        **files,
        f"{told}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{told}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in content.items()}
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},{len(content[path])}"
        for path, digest in digests.items()
    ]
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in {**content, f"{told}/RECORD": "\n".join([*lines, f"{told}/RECORD,,"]) + "\n"}.items():
            file.writestr(path, text)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that pip can find: a stub in two versions, and a kernel that is borrowed from where the tests run."""
    folder = tmp_path / "index"
    packages = {"stub": "1.0", "ipykernel": "0.0.1", TOOL: "0.0.1"}
    wheel(folder, "stub", "1.0", {"stub.py": stub_source(1.0, packages)})
    wheel(folder, "stub", "1.1", {"stub.py": stub_source(1.5, packages)})
    borrowed = "\n".join([sysconfig.get_paths()["purelib"], *site.getsitepackages()])
    wheel(folder, "ipykernel", "0.0.1", {"borrowed.pth": f"{borrowed}\n"})
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    return folder


# --- what is wanted --------------------------------------------------------------------------------------------------


def record_of(*events: EnvironmentCaptured) -> Any:
    """As much of an opened record as is asked."""
    entries = [SimpleNamespace(type=event.TYPE, body=encode_body(event)) for event in events]
    return SimpleNamespace(entries=entries, started=None)


def captured(**changes: Any) -> EnvironmentCaptured:
    settings = {"python": PYTHON, "implementation": "C", "platform": "x", "packages": {"b": "2", "a": "1"}}
    return EnvironmentCaptured(hardware={}, **{**settings, **changes})


def test_the_list_comes_from_the_entry_and_with_the_trails_own_list_says_what_no_index_has(tmp_path: Path) -> None:
    opened = record_of(captured())
    assert wanted_packages(opened) == (PYTHON, (Wanted("a", "1"), Wanted("b", "2")))
    facts = {
        "fine": {"version": "1.0+cpu", "record": "ab"},
        "mine": {"version": "0.1", "editable": True},
        "repo": {"version": "0.2", "commit": "c" * 40},
        "odd": {"version": "unknown"},
        "--index-url": {"version": "1.0"},
        "evil": {"version": "1.0 --index-url x"},
    }
    content = json.dumps(facts).encode()
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / f"{digest}.json").write_bytes(content)
    opened = record_of(captured(packages_digest=digest))
    _, wanted = wanted_packages(opened, tmp_path)
    assert requirement_lines(wanted) == ["fine==1.0+cpu"]
    assert requirement_lines(wanted, {"fine"}) == []
    assert {item.name: item.obstacle for item in wanted if item.obstacle} == {
        "mine": "a working copy (editable)",
        "repo": "from a repository, commit cccccccccccc",
        "odd": "its version is not known",
        "--index-url": "its version is not known",
        "evil": "its version is not known",
    }
    (tmp_path / f"{digest}.json").write_bytes(content + b" ")
    with pytest.raises(EnvironmentRefusedError, match="not the one that the record names"):
        wanted_packages(opened, tmp_path)


def test_a_record_that_names_no_packages_or_not_all_is_refused() -> None:
    with pytest.raises(EnvironmentRefusedError, match="no run in it has recorded its environment"):
        wanted_packages(record_of())
    some = record_of(captured(packages={"a": "1", "*": "900 packages in artifacts/x.json"}))
    with pytest.raises(EnvironmentRefusedError, match="its main packages alone"):
        wanted_packages(some)


# --- what is refused, before anything is installed -------------------------------------------------------------------


def test_what_cannot_be_had_is_named_and_leaves_nothing_behind(index: Path, tmp_path: Path) -> None:
    made = tmp_path / "environment"
    local = Wanted("mine", "0.1", obstacle="a working copy (editable)")
    with pytest.raises(EnvironmentRefusedError, match=r"mine 0\.1 \(a working copy \(editable\)\)") as refused:
        make_environment(made, [KERNEL, STUB, local], python=PYTHON)
    assert "--without mine" in refused.value.next_step
    gone = [Wanted("gone", "3.0"), Wanted("lost", "4.0")]
    with pytest.raises(EnvironmentRefusedError, match=r"cannot be had, so nothing was run: gone 3\.0, lost 4\.0"):
        make_environment(made, [KERNEL, *gone, STUB], python=PYTHON)
    with pytest.raises(EnvironmentRefusedError, match=r"there is no python2\.1 here"):
        make_environment(made, [KERNEL], python="2.1.0")
    with pytest.raises(EnvironmentRefusedError, match="Without ipykernel"):
        make_environment(made, [STUB], python=PYTHON)
    assert not made.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(EnvironmentRefusedError, match="holds something else"):
        make_environment(tmp_path / "full", [KERNEL], python=PYTHON)
    assert (tmp_path / "full" / "file").exists()


# --- what runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_record_runs_in_an_environment_of_its_packages_and_builds_are_compared(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = {"stub": "1.0", "ipykernel": "0.0.1", TOOL: "0.0.1"}
    hand_files(tmp_path, packages=recorded)
    source = write_notebook(tmp_path / "n.ipynb", [("rate = 0.5", {"tags": ["parameters"]}), HAND, "stub.__file__"])
    run_notebook(source, tmp_path / "record.ipynb", {"rate": 0.25}, trail=tmp_path / "audit", cwd=tmp_path)
    _, named = wanted_packages(open_record(tmp_path / "record.ipynb"))
    assert {item.name: item.version for item in named} == recorded
    made = tmp_path / "environment"
    # Another stub lies about here, and must not be the one that is imported.
    (tmp_path / "stub.py").write_text(stub_source(7.0, recorded))
    (tmp_path / "rules.cfg").write_text("[where]\nregex: '/.*/stub.py'\nreplace: STUB\n")
    asked = ["reproduce", str(tmp_path / "record.ipynb"), "--fresh-environment", str(made), "--files", "rows.txt"]
    code = cli.main([*asked, "--normalise", "rules.cfg", "-o", str(tmp_path / "again.ipynb"), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    answer = json.loads(out)
    assert answer["verdict"] == "identical"
    assert answer["fresh"] is True
    notes = answer["environment_notes"]
    assert notes[0].startswith("This tool could not be had in version 0.0.1; the one that runs here")
    assert notes[1].startswith("Builds could not be compared")
    shown = json.loads((tmp_path / "again.ipynb").read_text())["cells"][-1]["outputs"][0]["data"]["text/plain"]
    assert str(made) in "".join(shown)

    packages = next(made.glob("lib/python*/site-packages"))
    assert list_packages(packages)["stub"]["version"] == "1.0"
    records = {name: facts.get("record") for name, facts in list_packages(packages).items()}
    tool = Wanted(TOOL, "0.0.1")
    wanted = [replace(KERNEL, record=records["ipykernel"]), replace(STUB, record=records["stub"]), tool]
    again = make_environment(made, wanted, python=PYTHON)
    assert [note for note in again.notes if "This tool" not in note] == [], "the same folder serves again, as it is"
    other = make_environment(made, [wanted[0], replace(STUB, record="0" * 64), tool], python=PYTHON)
    assert other.notes[-1] == "Other builds of the recorded version (their lists of files differ): stub."
    with pytest.raises(EnvironmentRefusedError, match="holds something else"):
        make_environment(made, [KERNEL, Wanted("stub", "1.1")], python=PYTHON)
