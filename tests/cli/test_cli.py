"""The command line: its grammar, its refusals, and plans that agree with dp-accounting. No training here."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3

import pytest
import report_story as story
from records_support import write_notebook

from rlhf_audit_nb import cli
from rlhf_audit_nb.cli import budget
from rlhf_audit_nb.cli.shared import beside
from rlhf_audit_nb.events import PrivacyReserved, PrivacySettled, encode_body
from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
from rlhf_audit_nb.trail import Trail, TrailReader


def test_help_lists_every_command_under_its_section(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in cli.COMMANDS:
        assert f"{command.section}:" in out
        assert f"{command.name:<13} {command.help}" in out
    assert run()[1] == out


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_each_command_has_help_and_json(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["verfy", "x.ipynb"], "Did you mean 'verify'?"),
        (["run", "x.ipynb", "--kernl", "y"], "Did you mean '--kernel'?"),
        (["verify"], "RECORD.ipynb|BUNDLE|TRAIL"),
        (["compute", "--trail", "audit"], "takes the trail's folder without '--trail'"),
        (["budget"], "plan|show|left|check|set"),
        (["budget", "plan", "--sampling-rate", "0.1"], "--steps"),
        (["budget", "plan", "--sampling-rate", "0.1", "--steps", "5"], "either the noise multiplier or the ε"),
        (["verify", "nowhere"], "There is no record or trail at nowhere"),
        (["verify", "nowhere.ipynb"], "nowhere.ipynb"),
        (["run", "nowhere.ipynb", "-p", "a", "1", "-p", "a", "2"], "given twice"),
        (["report", "nowhere"], "There is no record or trail"),
        (["run", "nowhere.ipynb", "-o", "/proc/x/r.ipynb"], "/proc/x"),
        (["frobnicate"], "There is no command 'frobnicate'"),
        (["budget", "show", "--delta", "0"], "delta is 0.0"),
        (["budget", "show", "--delta", "nan"], "delta is nan"),
        (["verify", "x.ipynb", "--policy", __file__], "is not a trust policy"),
        (["--jsn"], "rlhf-audit COMMAND --jsn"),
        (["--jsn", "verify", "x.ipynb"], "'--jsn' stands before the command"),
        (["budget", "plan", "--sampling-rate", "0.1", "--steps", "5", "--detla", "1"], "Did you mean '--delta'?"),
        (["verify", "--require", "TRUE", "x.ipynb"], "See rlhf-audit verify --help"),
        (["run", "."], "Is a directory"),
        (["report", ""], "There is no trail"),
        (["report", "/"], "/ cannot be written: it is a folder"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(run, argv, said):
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert said in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert err.count("\n") <= 2


def test_json_before_the_command_is_still_answered_with_an_object(run):
    code, out, _ = run("--json", "budget", "show")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "usage"


def test_what_is_worth_knowing_of_a_record_is_told_beside_the_verdict(run, monkeypatch, tmp_path):
    from rlhf_audit_nb import records
    from rlhf_audit_nb.trail import Level, Reason, Verdict

    note = Reason("last-seen", "home/heads", "It cannot be written. A later fork could go unseen.")
    verdict = Verdict(Level.UNANCHORED, "log.example", 5, "root")
    opened = records.OpenedRecord(verdict, notes=(note,))
    monkeypatch.setattr(records, "open_record", lambda path, **_: opened)
    code, out, _ = run("verify", tmp_path / "r.ipynb")
    assert code == 0
    assert "worth knowing: home/heads: It cannot be written. A later fork could go unseen. [last-seen]" in out


def test_a_report_of_the_folder_one_stands_in_goes_beside_it(monkeypatch, tmp_path):
    (tmp_path / "trail").mkdir()
    monkeypatch.chdir(tmp_path / "trail")
    assert beside(".", ".html") == tmp_path / "trail.html"


def test_an_error_is_an_object_under_json(run):
    code, out, _ = run("verify", "nowhere", "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert error["code"] == "no-target"
    assert error["next_step"]


def dp_accounting_epsilon(noise, rate, steps, delta):
    """The same plan by dp-accounting's own accountant, asked directly."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return accountant.compose(event, steps).get_epsilon(delta)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"), [(1.1, 0.1, 100, 1e-5), (4.0, 0.01, 1000, 1e-6), (0.8, 0.3, 20, 1e-4)]
)
def test_a_plan_agrees_with_dp_accounting(run, noise, rate, steps, delta):
    argv = ["--noise-multiplier", noise, "--sampling-rate", rate, "--steps", steps, "--delta", delta]
    code, out, _ = run("budget", "plan", *argv, "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["epsilon"] == pytest.approx(dp_accounting_epsilon(noise, rate, steps, delta), rel=1e-3, abs=2e-3)
    assert answer["accountants"]["pld"] == answer["epsilon"]
    assert answer["accountants"]["rdp"] >= answer["epsilon"]


def test_a_plan_for_an_epsilon_keeps_it_and_wastes_little(run):
    argv = ["budget", "plan", "--epsilon", 3, "--sampling-rate", 0.1, "--steps", 200, "--json"]
    code, out, _ = run(*argv)
    answer = json.loads(out)
    assert code == 0
    assert 2.95 <= dp_accounting_epsilon(answer["noise_multiplier"], 0.1, 200, 1e-5) <= 3.0 + 1e-3


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--epsilon", "0"], "epsilon is 0.0"),
        (["--epsilon", "-1"], "epsilon is -1.0"),
        (["--noise-multiplier", "0"], "noise_multiplier is 0.0"),
        (["--noise-multiplier", "1", "--delta", "1"], "delta is 1.0"),
        (["--noise-multiplier", "1", "--delta", "1e-11"], "delta is 1e-11"),
        (["--noise-multiplier", "nan"], "noise_multiplier is nan"),
        (["--noise-multiplier", "1", "--sampling-rate", "1.5"], "sampling_rate is 1.5"),
        (["--noise-multiplier", "1", "--steps", "0"], "steps is 0"),
        (["--noise-multiplier", "1e9", "--steps", "1000000000"], "steps is 1,000,000,000; a plan is worked out for"),
        (["--epsilon", "1", "--steps", "10000001"], "steps is 10,000,001"),
        (["--noise-multiplier", "1e9"], "noise_multiplier is 1e+09; a plan is worked out for at most 10,000"),
        (["--noise-multiplier", "1e-200"], "protects nobody"),
        (["--noise-multiplier", "0.1", "--sampling-rate", "1", "--steps", "10000000"], "protects nobody"),
        (["--noise-multiplier", "0.1", "--sampled", "pairs", "--pairs-per-unit", "900"], "protects nobody"),
        (["--epsilon", "1", "--sampled", "pairs", "--pairs-per-unit", "1001"], "max_pairs_per_unit is 1001"),
        (["--epsilon", "1", "--sampled", "pairs", "--pairs-per-unit", "0"], "max_pairs_per_unit is 0"),
        (["--epsilon", "1", "--runs", "5"], "--runs says how many"),
        (["--epsilon", "1", "--tuning", "geometric"], "--tuning needs the number of runs"),
    ],
)
def test_a_plan_out_of_range_says_what_to_write(run, argv, said):
    code, out, err = run("budget", "plan", "--sampling-rate", "0.1", "--steps", "10", *argv)
    assert code == 2
    assert out == ""
    assert said in err
    assert "Next step: " in err


def test_a_plan_for_sampled_pairs_counts_all_pairs_of_a_unit(run):
    argv = ["--noise-multiplier", 1, "--sampling-rate", 0.01, "--steps", 400, "--sampled", "pairs"]
    code, out, _ = run("budget", "plan", *argv, "--pairs-per-unit", 4, "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["epsilon"] == pytest.approx(5.613, abs=2e-3)
    assert (answer["sampled"], answer["pairs_per_unit"]) == ("pairs", 4)
    assert answer["accountants"]["prv"].startswith("not computed")
    assert answer["accountants"]["rdp"] > answer["epsilon"]
    _, out, err = run("budget", "plan", *argv, "--pairs-per-unit", 4)
    assert "all 4 pairs of a unit that are kept are counted together" in out + err


def test_a_plan_says_what_choosing_among_runs_costs_both_ways(run):
    argv = ["--noise-multiplier", 1, "--sampling-rate", 0.02, "--steps", 500, "--tuning", "geometric", "--runs", 5]
    code, out, _ = run("budget", "plan", *argv, "--json")
    answer = json.loads(out)["tuning"]
    assert code == 0
    assert answer["selected"] == pytest.approx(5.261, abs=2e-3)
    assert answer["composed"] == pytest.approx(dp_accounting_epsilon(1, 0.02, 2500, 1e-5), rel=1e-3)
    _, out, err = run("budget", "plan", *argv)
    assert "what the ledger counts" in out + err
    assert "a what-if" in out + err


def test_an_interruption_is_no_traceback(run, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(budget, "_do_budget_plan", interrupt)
    code, _, err = run("budget", "plan", "--epsilon", "1", "--sampling-rate", "0.1", "--steps", "10")
    assert code == 130
    assert "interrupted" in err


def test_a_published_trail_is_verified_from_its_files_and_a_changed_one_is_invalid(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "audit") as trail:
        trail.append("a.b", b"{}", run="r").wait()
    code, out, _ = run("publish", tmp_path / "www", "--trail", tmp_path / "audit", "--json")
    assert code == 0
    assert json.loads(out) == {"target": str(tmp_path / "www"), "size": 2, "before": 0, "written": 3, "removed": 0}
    code, out, _ = run("verify", tmp_path / "www", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(run("verify", tmp_path / "audit", "--json")[1])
    bundle = tmp_path / "www" / "tile" / "entries" / "000.p" / "2"
    changed = bundle.read_bytes().replace(b'"a.b"', b'"a.c"')
    bundle.unlink()  # nobody can write to what is there
    bundle.write_bytes(changed)
    code, out, _ = run("verify", tmp_path / "www", "--json")
    assert code == 40
    assert "entry 1" in json.loads(out)["reasons"][0]["message"]


REFUSED = (
    "from rlhf_audit_nb.errors import BudgetExceededError\n"
    "raise BudgetExceededError('Nothing of the budget is left.', next_step='Use another population.')"
)
LONG = "raise OSError('nosuch/model is no local folder \\x1b[2J\\n' + 'and on it goes\\n' * 30)"


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        (REFUSED, 3, ["  BudgetExceededError: Nothing of the budget is left. Use another population."]),
        ("1 / 0", 1, ["  ZeroDivisionError: division by zero"]),
        ("raise StopIteration", 1, ["  StopIteration"]),
        (
            LONG,
            1,
            [
                "  OSError: nosuch/model is no local folder [U+001B][2J",
                *["  and on it goes"] * 8,
                "  … (the rest is in the record)",
            ],
        ),
    ],
)
def test_what_a_cell_raised_is_said_in_its_own_words(run, tmp_path, monkeypatch, source, code, said):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    notebook = write_notebook(tmp_path / "in.ipynb", ["print('fine')", source])
    ended, out, err = run("run", notebook, "--trail", tmp_path / "audit", "--json")
    assert ended == code
    lines = err.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("error: Cell 2 of 2"))
    assert lines[at + 1 :] == [*said, "Next step: Open the record to see the cell's output."]
    assert set(json.loads(out)["error"]) == {"code", "message", "next_step"}


@pytest.fixture
def bad_trail(tmp_path, monkeypatch):
    """A trail with a changed entry: its verdict is INVALID, and what it says can still be written down."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "audit") as trail:
        trail.append("a.b", b"{}", run="r").wait()
    with sqlite3.connect(tmp_path / "audit" / "trail.sqlite") as store:
        store.execute("""UPDATE bundles SET data = CAST(replace(data, '"a.b"', '"a.c"') AS BLOB)""")
    return tmp_path / "audit"


@pytest.mark.parametrize(("command", "suffix"), [("report", "html"), ("card", "md")])
def test_what_is_said_of_an_invalid_target_is_written_and_ends_with_the_verdicts_code(
    run, bad_trail, tmp_path, command, suffix
):
    file = tmp_path / f"said.{suffix}"
    code, out, err = run(command, bad_trail, "-o", file)
    assert code == 40
    assert str(file) in out
    assert "INVALID" in file.read_text(encoding="utf-8")
    assert "INVALID" in err
    assert "nothing in it is evidence" in err
    code, out, err = run(command, bad_trail, "-o", file, "--json")
    assert code == 40
    assert json.loads(out)["level"] == "INVALID"
    assert "nothing in it is evidence" in err


def test_a_card_on_stdout_of_an_invalid_target_keeps_the_complaint_apart(run, bad_trail):
    code, out, err = run("card", bad_trail)
    assert code == 40
    assert "INVALID" in out
    assert "nothing in it is evidence" in err


def test_a_report_of_a_history_that_diverged_ends_with_30_and_of_an_unanchored_one_with_0(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "audit") as trail:
        trail.append("a.b", b"{}", run="r").wait()
    shutil.copytree(tmp_path / "audit", tmp_path / "earlier")
    with Trail.open(tmp_path / "audit") as trail:
        trail.append("a.b", b"{}", run="r").wait()
    code, _, err = run("report", tmp_path / "audit", "--format", "json")
    assert (code, err) == (0, "")
    assert run("verify", tmp_path / "earlier")[0] == 30
    code, _, err = run("report", tmp_path / "earlier", "--format", "json")
    assert code == 30
    assert "DIVERGED" in err


def test_budgets_that_differ_are_listed_over_time(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    teller = story.Teller()
    for number, epsilon in enumerate((4.0, 4.0, 9.0), 1):
        story.train(teller, run=str(number) * 32, budget=epsilon, steps=2)
    ledger = [entry for entry in teller.entries if entry.type.startswith("privacy.")]

    def show(entries):
        with Trail.open(tmp_path / "audit") as trail:
            for entry in entries:
                trail.append(entry.type, entry.body, run=entry.run).wait()
        argv = ("budget", "show", "--trail", tmp_path / "audit")
        return run(*argv)[1], json.loads(run(*argv, "--json")[1])["budgets"]

    words, budgets = show(ledger[:4])
    assert "over time" not in words
    assert budgets == [{"epsilon": 4.0, "entry": 1, "run": "1" * 32}]
    words, budgets = show(ledger[4:])
    assert "budget over time: 4 (#1), 9 (#5)" in words
    assert [one["epsilon"] for one in budgets] == [4.0, 9.0]


@pytest.fixture
def spent_trail(tmp_path, monkeypatch):
    """A trail on which one run of 10 steps is settled and one of 20 is not, under a budget of 4."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    folder = tmp_path / "audit"
    told = {"unit": "pair", "adjacency": "zero-out", "mechanism": "m", "engine": "e", "generator": "g", "units": 50}
    told |= {"clipping_norm": 1.0, "noise_multiplier": 2.0, "sampling_rate": 0.1, "max_pairs_per_unit": 8}
    told |= {"delta": 1e-5, "epsilon_budget": 4.0, "epsilon_before": 0.0, "epsilon_planned": 1.0, "accountants": {}}
    with Trail.open(folder) as trail:
        for name, steps in (("a", 10), ("b", 20)):
            event = PrivacyReserved(reservation=name, steps=steps, steps_asked=steps, **told)
            trail.append(event.TYPE, encode_body(event), run=name * 32).wait()
        event = PrivacySettled(reservation="a", steps=10, epsilon_run=0.0, epsilon_total=0.0)
        trail.append(event.TYPE, encode_body(event), run="a" * 32).wait()
    return folder


def test_a_budget_is_shown_as_spent_reserved_and_left_by_run(run, spent_trail):
    code, out, _ = run("budget", "show", "--trail", spent_trail, "--json")
    answer = json.loads(out)
    spent, total = (dp_accounting_epsilon(2.0, 0.1, steps, 1e-5) for steps in (10, 30))
    assert code == 0
    assert answer["spent"] == pytest.approx(spent, rel=1e-6)
    assert answer["reserved"] == pytest.approx(total - spent, rel=1e-6)
    assert answer["left"] == pytest.approx(4 - total, rel=1e-6)
    assert [(one["steps"], one["settled"]) for one in answer["spends"]] == [(10, True), (20, False)]
    words = run("budget", "show", "--trail", spent_trail)[1]
    assert f"left      {math.floor((4 - total) * 1e4) / 1e4:.4f} of 4" in words
    assert "reserved 20 steps" in words


def test_the_steps_that_are_left_fit_and_one_more_does_not(run, spent_trail):
    argv = ("budget", "left", "--noise-multiplier", "2", "--sampling-rate", "0.1", "--trail", spent_trail)
    code, out, _ = run(*argv, "--json")
    answer = json.loads(out)
    assert code == 0
    assert dp_accounting_epsilon(2.0, 0.1, 30 + answer["steps"], 1e-5) <= 4.0
    assert dp_accounting_epsilon(2.0, 0.1, 31 + answer["steps"], 1e-5) > 4.0
    assert answer["epsilon_after"] == pytest.approx(dp_accounting_epsilon(2.0, 0.1, 30 + answer["steps"], 1e-5))
    assert f"{answer['steps']} steps fit at noise multiplier 2" in run(*argv)[1]
    words = run("budget", "left", "--noise-multiplier", "0.3", "--sampling-rate", "0.9", "--trail", spent_trail)[1]
    assert words.startswith("0 steps fit")
    assert "budget set" in words


def test_the_steps_that_are_left_for_sampled_pairs_are_fewer(run, tmp_path, monkeypatch, spent_trail):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "other"):
        pass
    set_it = ("--epsilon", 3, "--reason", "agreed", "--by", "A. Keeper", "--unit", "annotator")
    assert run("budget", "set", *set_it, "--trail", tmp_path / "other")[0] == 0
    asked = ("budget", "left", "--noise-multiplier", 4, "--sampling-rate", 0.02, "--json", "--trail")
    one = json.loads(run(*asked, tmp_path / "other")[1])["steps"]
    several = ("--sampled", "pairs", "--pairs-per-unit", 4)
    four = json.loads(run(*asked, tmp_path / "other", *several)[1])["steps"]
    assert 0 < four < one / 10
    assert composed_epsilon([Mechanism(4.0, 0.02, four, 4)], 1e-5) <= 3.0
    assert composed_epsilon([Mechanism(4.0, 0.02, four + 1, 4)], 1e-5) > 3.0
    code, _, err = run(*asked, spent_trail, *several)
    assert code == 2
    assert "of annotators only" in err


def test_a_budget_is_set_and_shown_with_its_reason(run, spent_trail):
    said = ("--reason", "approved by the board", "--by", "A. Keeper", "--trail", spent_trail)
    code, out, _ = run("budget", "set", "--epsilon", "3", *said, "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["epsilon"], answer["before"], answer["unit"], answer["delta"]) == (3.0, 4.0, "pair", 1e-5)
    shown = json.loads(run("budget", "show", "--trail", spent_trail, "--json")[1])
    assert (shown["budget"], shown["set_in"], shown["set_by"]) == (3.0, answer["entry"], "A. Keeper")
    assert shown["budgets"][-1]["reason"] == "approved by the board"
    words = run("budget", "show", "--trail", spent_trail)[1]
    assert "of 3, set by A. Keeper" in words
    assert "A. Keeper set 3: approved by the board" in words


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["set", "--epsilon", "0", "--reason", "r", "--by", "b"], 2, "epsilon is 0.0"),
        (["set", "--epsilon", "1", "--reason", " ", "--by", "b"], 2, "reason is empty"),
        (["set", "--epsilon", "1", "--by", "b"], 2, "--reason"),
        (["set", "--epsilon", "1", "--reason", "r", "--by", "b", "--unit", "annotator"], 3, "budget of pairs"),
        (["left", "--noise-multiplier", "0", "--sampling-rate", "0.1"], 2, "noise_multiplier is 0.0"),
        (["left", "--noise-multiplier", "1", "--sampling-rate", "2"], 2, "sampling_rate is 2.0"),
        (["left", "--noise-multiplier", "1e9", "--sampling-rate", "0.1"], 2, "at most 10,000"),
    ],
)
def test_a_mistake_about_a_budget_is_one_sentence_and_changes_nothing(run, spent_trail, argv, code, said):
    size = TrailReader.open(spent_trail).size
    got, out, err = run("budget", *argv, "--trail", spent_trail)
    assert (got, out) == (code, "")
    assert said in err
    assert TrailReader.open(spent_trail).size == size


@pytest.mark.parametrize(
    "argv",
    [
        ("set", "--epsilon", "1", "--reason", "r", "--by", "b"),
        ("left", "--noise-multiplier", "1", "--sampling-rate", "0.1"),
    ],
)
def test_a_trail_that_is_not_there_is_not_made_for_a_budget(run, tmp_path, argv):
    code, _, err = run("budget", *argv, "--trail", tmp_path / "misspelt")
    assert code == 2
    assert "There is no trail at" in err
    assert not (tmp_path / "misspelt").exists()


def test_what_is_left_of_no_budget_says_how_to_set_one(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    Trail.open(tmp_path / "audit").close()
    argv = ("--noise-multiplier", "1", "--sampling-rate", "0.1", "--trail", tmp_path / "audit")
    code, _, err = run("budget", "left", *argv)
    assert code == 2
    assert "has no budget yet" in err
    assert "budget set" in err


def test_publishing_no_trail_is_one_sentence(run, tmp_path):
    code, out, err = run("publish", tmp_path / "www", "--trail", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "There is no trail" in err
    assert not (tmp_path / "www").exists()
