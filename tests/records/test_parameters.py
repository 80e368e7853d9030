"""Parameters are held against the notebook's cell before anything runs, whichever way they come."""

from __future__ import annotations

import json
import math

import nbformat
import papermill
import pytest
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command
from records_support import write_notebook

from rlhf_audit_nb.cli import main
from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records import check_parameters, open_record, read_parameters, run_notebook
from rlhf_audit_nb.records.parameters import parameters_of, parse_parameters, read_parameters_file
from rlhf_audit_nb.records.run import notebook_parameters

CELL = """
%matplotlib inline
from typing import Literal, Optional
counts: list[int] = [1]
rates: dict[str, float] = {"a": 0.1}
mode: Literal["dpo", "kto", 3] = "dpo"
limit: Optional[int] = None
either: "int | list[str]" = 1
betas: tuple[float, float] = (0.9, 0.99)
many: tuple[int, ...] = ()
where: Path = Path("x")  # only the notebook knows
needed: int
left = right = 2
first, second = 1, "b"
nested: list[dict[str, int | None]] = []
flag = True
seed = 7
rate = 1e-5
budget = float("inf")
files = !ls
""".strip()

FITS = {
    "counts": [[], [1, 2]],
    "rates": [{}, {"a": 1, "b": 0.5}],
    "mode": ["dpo", "kto", 3],
    "limit": [None, 5],
    "either": [3, ["a"], []],
    "betas": [[0.9, 1]],
    "many": [[], [1, 2, 3]],
    "where": ["anything", 3, None],
    "needed": [0, -1],
    "left": [1],
    "right": [1],
    "first": [4],
    "second": ["c"],
    "nested": [[{"a": 1, "b": None}]],
    "flag": [False],
    "seed": [2**53 - 1],
    "rate": [0, 1e-300],
    "budget": ["no literal, so the notebook will say"],
    "files": ["x"],
}

WRONG = {
    "counts": [1, [1.5], ["1"], [True], None],
    "rates": [[], {"a": "x"}, {"a": True}],
    "mode": ["ppo", 3.0, True, [], None],
    "limit": ["5", 1.5, False],
    "either": ["a", [1], 1.0],
    "betas": [[0.9], [0.9, "x"], 0.9],
    "many": [["a"], 1],
    "needed": ["1", None, 2.0],
    "right": ["2"],
    "second": [2],
    "nested": [[{"a": "x"}], {"a": 1}],
    "flag": [1, 0, "true", None],
    "seed": [True, 7.0, "7", [7]],
    "rate": ["1e-5", True, None],
}

# What no record can hold, or papermill or a browser would change on the way, where the notebook would take anything.
UNRECORDABLE = {
    "not a number": math.nan,
    "infinite": -math.inf,
    "beyond what a browser keeps": 2**53,
    "beyond what Python writes out": 10**5000,
    "deep inside": {"a": [1, {"b": 2**64}]},
    "half of a surrogate pair": "\ud800",
    "a key that is no text": {1: 2},
    "a set": {1},
    "bytes": b"x",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def source(folder):
    ran = f"open({str(folder / 'ran')!r}, 'w').close()"
    return write_notebook(folder / "in.ipynb", [(CELL, {"tags": ["parameters"]}), ran])


def test_each_type_takes_what_fits_and_nothing_else(source):
    assert set(notebook_parameters(source)) == set(FITS)
    for name, values in FITS.items():
        for value in values:
            check_parameters(source, {name: value})
    for name, values in WRONG.items():
        for value in values:
            with pytest.raises(RecordError, match=f"Parameter '{name}' is .*; the notebook takes") as refused:
                check_parameters(source, {name: value})
            assert refused.value.next_step, (name, value)


@pytest.mark.parametrize("what", UNRECORDABLE)
def test_a_value_that_a_record_cannot_hold_is_refused_in_one_sentence(source, what):
    with pytest.raises(RecordError, match="a record cannot hold") as refused:
        check_parameters(source, {"where": UNRECORDABLE[what]})
    assert len(refused.value.message) < 400
    assert refused.value.reason == "parameter-type"


def test_words_of_a_type_are_its_own(source):
    for name, words in (("limit", "int or None"), ("mode", "'dpo' or 'kto' or 3"), ("counts", "list[int]")):
        with pytest.raises(RecordError) as refused:
            check_parameters(source, {name: {"no": "fit"}})
        assert f"takes {words} there" in refused.value.message


def test_text_of_a_command_line_becomes_what_the_notebook_takes(source):
    typed = {
        "counts": "[1, 2]",
        "rates": '{"a": 1, "b": 0.5}',
        "mode": "3",
        "limit": "none",
        "either": '["x"]',
        "betas": "(0.5, 1)",
        "flag": "FALSE",
        "rate": "2",
        "second": "3",
    }
    assert read_parameters(source, typed) == {
        "counts": [1, 2],
        "rates": {"a": 1, "b": 0.5},
        "mode": 3,
        "limit": None,
        "either": ["x"],
        "betas": [0.5, 1],
        "flag": False,
        "rate": 2.0,
        "second": "3",
    }
    for name, text in (("seed", "9" * 5000), ("seed", "1e400"), ("rate", "nan"), ("rate", "inf"), ("counts", "[1,")):
        with pytest.raises(RecordError, match=f"'{name}'"):
            read_parameters(source, {name: text})


FILES = {
    "rate: 1e-5\nseed: 3\nflag: yes\n": {"rate": 1e-5, "seed": 3, "flag": True},
    '{"rate": 1e-5, "name": "\\ud83d\\ude00"}': {"rate": 1e-5, "name": "😀"},
    "{seed: 3, day: 2026-01-31}": {"seed": 3, "day": "2026-01-31"},
    "base: &b {a: 1}\nboth: {<<: *b, a: 2}": {"base": {"a": 1}, "both": {"a": 2}},
    "# nothing\n": {},
}


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_a_file_of_parameters_is_yaml_or_json(tmp_path, text):
    (tmp_path / "p.yaml").write_text("\ufeff" + text, encoding="utf-8")
    assert read_parameters_file(tmp_path / "p.yaml") == FILES[text]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed: 1\nseed: 2", "a key stands twice"),
        ('{"seed": 1, "seed": 2}', "a key stands twice"),
        ("a: [", "at line 1"),
        ("- 1", "no mapping"),
        ("1: 2", "no mapping"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
    ids=range(6),
)
def test_a_file_that_holds_no_parameters_is_named(text, why):
    with pytest.raises(RecordError, match=r"p\.yaml holds no parameters") as refused:
        parse_parameters(text, "p.yaml")
    assert why in refused.value.message


def test_a_file_of_parameters_that_is_no_text_or_not_there_is_named(tmp_path):
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="not UTF-8"):
        read_parameters_file(tmp_path / "p.yaml")
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        read_parameters_file(tmp_path / "q.yaml")


OTHER_LANGUAGES = {
    "R": "alpha <- 1\nbeta.rate = 0.5 # why\n# gamma <- 3\nif (x == 2) {}",
    "julia": "alpha = 1\nconst beta = 2",
    "scala": "val alpha: Int = 1\nvar beta = 2;",
    "C#": 'var alpha = 1;\nstring beta = "x";',
    "bash": "alpha=1\nexport beta=2",
    "PowerShell": "$alpha = 1\n$beta = 'x'",
}


@pytest.mark.parametrize("language", OTHER_LANGUAGES)
def test_of_another_languages_cell_the_names_are_known(language):
    cell = nbformat.v4.new_code_cell(OTHER_LANGUAGES[language], metadata={"tags": ["parameters"]})
    spec = {"name": "k", "display_name": "K", "language": language}
    known = parameters_of(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": spec}))
    assert sorted(known) == ["alpha", "beta.rate" if language == "R" else "beta"]
    assert [parameter.kind for parameter in known.values()] == [None, None]


def test_a_parameters_cell_that_is_no_python_is_named(folder):
    bad = write_notebook(folder / "bad.ipynb", ["0", ("epsilon = = 1", {"tags": ["parameters"]})])
    with pytest.raises(RecordError, match=r"parameters cell \(cell 2\) is not Python at line 1"):
        notebook_parameters(bad)


# -- papermill's own doors: refused before the first cell, and nothing is there afterwards ---------------------------

REFUSED = {
    "an unknown name": ({"sead": 1}, "no parameter 'sead'", "Did you mean 'seed'?"),
    "a wrong type": ({"seed": "1"}, "takes int", "papermill -r"),
    "not a number": ({"rate": math.nan}, "a record cannot hold", ""),
    "a tuple": ({"where": (1, 2)}, "does not hold the parameters that were given", "as JSON values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_papermill_is_refused_what_the_notebook_does_not_take(folder, source, case):
    parameters, words, step = REFUSED[case]
    with pytest.raises(RecordError) as refused:
        papermill.execute_notebook(source, folder / "out.ipynb", parameters, engine_name="audit", progress_bar=False)
    assert words in refused.value.message
    assert step in refused.value.next_step
    assert sorted(path.name for path in folder.iterdir()) == ["in.ipynb"]


def test_papermills_command_shows_why_and_leaves_nothing(folder, source):
    arguments = ["--engine", "audit", "--no-progress-bar", "in.ipynb", "out.ipynb", "-p", "mode", "ppo"]
    done = CliRunner().invoke(papermill_command, arguments)
    assert done.exit_code == 1
    assert "Parameter 'mode' is 'ppo'; the notebook takes 'dpo' or 'kto' or 3 there." in str(done.exception)
    assert sorted(path.name for path in folder.iterdir()) == ["in.ipynb"]


def test_papermill_is_refused_parameters_of_a_notebook_that_takes_none(folder):
    write_notebook(folder / "plain.ipynb", ["1"])
    with pytest.raises(RecordError, match="no cell tagged 'parameters'"):
        papermill.execute_notebook("plain.ipynb", "out.ipynb", {"a": 1}, engine_name="audit", progress_bar=False)
    assert sorted(path.name for path in folder.iterdir()) == ["plain.ipynb"]


def injected(value):
    """A notebook as an earlier execution with ``seed`` left it."""
    return [
        ("seed = 7", {"tags": ["parameters"]}),
        (f"# Parameters\nseed = {value}\n", {"tags": ["injected-parameters"]}),
        "seed",
    ]


def test_an_injected_cell_that_was_edited_since_is_refused(folder):
    left = {"papermill": {"parameters": {"seed": 3}}}
    write_notebook(folder / "edited.ipynb", injected(4), left)
    with pytest.raises(RecordError, match="cell 2 says 4") as refused:
        run_notebook("edited.ipynb", "out.ipynb")
    assert "Delete that cell" in refused.value.next_step
    assert sorted(path.name for path in folder.iterdir()) == ["edited.ipynb"]


@pytest.mark.slow
def test_parameters_whose_cell_is_gone_are_no_parameters_and_paths_stay_at_home(folder):
    left = {"papermill": {"parameters": {"seed": 3}, "input_path": "/home/somebody/in.ipynb"}}
    write_notebook(folder / "gone.ipynb", injected(3)[::2], left)
    arguments = ["--engine", "audit", "--no-progress-bar", "--inject-paths", str(folder / "gone.ipynb"), "o.ipynb"]
    assert CliRunner().invoke(papermill_command, [*arguments, "-p", "seed", "5"]).exit_code == 0
    opened = open_record("o.ipynb")
    assert opened.verdict.reasons == ()
    assert sorted(opened.started.parameters) == ["PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH", "seed"]
    named = opened.notebook["metadata"]["papermill"]
    assert (named["input_path"], named["output_path"]) == ("gone.ipynb", "o.ipynb")
    run_notebook("gone.ipynb", "p.ipynb")
    opened = open_record("p.ipynb")
    assert (opened.verdict.reasons, opened.started.parameters) == ((), {})
    assert str(folder) not in (folder / "p.ipynb").read_text()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_text_and_pairs_go_together_the_later_before_the_earlier(folder, source, capsys):
    write_notebook(folder / "n.ipynb", [("seed = 7\nrate = 0.1\nname = 'a'", {"tags": ["parameters"]})])
    (folder / "p.json").write_text('{"seed": 1, "rate": 1e-5, "name": "file"}')
    said = ["run", "n.ipynb", "-f", "p.json", "-y", "{seed: 2, name: text}", "-p", "seed", "3", "-o", "o.ipynb"]
    assert main([*said, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"] == {"seed": 3, "rate": 1e-5, "name": "text"}
    assert open_record("o.ipynb").started.parameters == answer["parameters"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (["-f", "missing.yaml"], "missing.yaml cannot be read"),
        (["-y", "seed: true"], "'seed' is True; the notebook takes int"),
        (["-y", "[1]"], "-y holds no parameters"),
        (["-p", "seed", "1", "-p", "seed", "2"], "given twice"),
    ],
)
def test_what_is_wrong_with_the_commands_parameters_is_said_before_anything_runs(folder, source, capsys, said, words):
    assert main(["run", "in.ipynb", *said]) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "ran").exists()
    assert not (folder / "audit").exists()
