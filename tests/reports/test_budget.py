"""The budget's face: by population, what is left, and the picture."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from rlhf_audit_nb.errors import ConfigError, PrivacyError, ReportError
from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
from rlhf_audit_nb.privacy.ledger import Ledger, Limit, Spend
from rlhf_audit_nb.privacy.populations import Population, Registry
from rlhf_audit_nb.reports.budget import MOST_STEPS, Budget, what_is_left
from rlhf_audit_nb.reports.budget_figure import DARK, MOST_NAMED, budget_figure

DELTA = 1e-5
TEN = Mechanism(2.0, 0.1, 10)
ALONE, BOTH = composed_epsilon([TEN], DELTA), composed_epsilon([TEN, TEN], DELTA)


def spend(name: str, index: int, population: str | None = "p", **changed: object) -> Spend:
    found = Spend(
        name,
        name * 8,
        TEN,
        settled=True,
        steps=10,
        asked=Limit(index, "annotator", 8.0, DELTA),
        population=population,
        units=40,
        reserved_steps=10,
        experiment=f"study {name}",
        planned=ALONE,
        total=ALONE,
    )
    return replace(found, **changed)  # type: ignore[arg-type]


def ledger(*spends: Spend, budgets: tuple[Limit, ...] = ()) -> Ledger:
    """Each population's roster is a person of its own."""
    names = {one.population for one in spends if one.population is not None}
    rosters = {
        name: Population(name, 0, 40, "k", frozenset(), frozenset([name.encode()]), "open") for name in sorted(names)
    }
    return Ledger("annotator", "annotator_id", spends, budgets, registry=Registry(rosters))


def test_each_population_has_the_whole_budget_and_the_trails_figure_is_the_largest() -> None:
    budget = Budget.of(ledger(spend("a", 3), spend("b", 5, "q"), spend("c", 7, settled=False)))
    assert [(one.number, one.trainings, one.unsettled) for one in budget.populations] == [(1, 2, 1), (2, 1, 0)]
    assert [one.total for one in budget.populations] == [pytest.approx(BOTH), pytest.approx(ALONE)]
    assert [one.left for one in budget.populations] == [pytest.approx(8 - BOTH), pytest.approx(8 - ALONE)]
    assert (budget.spent, budget.total) == (pytest.approx(ALONE), pytest.approx(BOTH))
    assert budget.left == pytest.approx(8 - BOTH)
    assert [one.population for one in budget.runs] == [1, 2, 1]
    said = str(budget)
    assert "of the population that spent most" in said
    assert "3 private trainings on 2 populations that share nobody, 1 of them not settled" in said
    assert "Population 1 (40 annotators, 2 trainings)" in said
    assert "Population 2 (40 annotators, 1 training)" in said
    assert "<th>population" not in budget._repr_html_()
    assert budget._repr_html_().count("<tr>") == 4


def test_without_rosters_all_is_one_population_and_says_why() -> None:
    told = replace(ledger(spend("a", 3), spend("b", 5, "q")), registry=Registry())
    budget = Budget.of(told)
    assert len(budget.populations) == 1
    assert budget.total == pytest.approx(BOTH)
    assert budget.unproven == 2
    assert "cannot be shown here" in str(budget)
    pairs = Budget.of(Ledger("pair", None, (spend("a", 3, None), spend("b", 5, None))))
    assert (pairs.unproven, pairs.populations[0].rosters) == (0, ())
    assert "cannot be shown" not in str(pairs)


def test_a_settlement_that_is_not_believed_is_named() -> None:
    budget = Budget.of(ledger(spend("a", 3, settled=False, doubt="Entry 9 settles <b>less</b>.")))
    assert budget.doubts == ("Entry 9 settles <b>less</b>.",)
    assert "Entry 9 settles" in str(budget)
    assert "<b>less" not in budget._repr_html_()


def test_all_of_it_is_plain_json_also_where_nothing_bounds_a_run(tmp_path: Path) -> None:
    budget = replace(Budget.of(ledger(spend("a", 3))), spent=float("inf"))
    told = json.loads(budget.save(tmp_path / "budget.json").read_text())
    assert told["spent"] == "inf"
    assert "ledger" not in told
    assert told["populations"][0]["trainings"] == 1


# --- what is left ----------------------------------------------------------------------------------------------------


def fits(steps: int, before: int, budget: float) -> bool:
    return composed_epsilon([TEN.with_steps(before + steps)], DELTA) <= budget


def test_what_is_left_is_worked_out_for_the_population_that_is_asked_for() -> None:
    budget = Budget.of(ledger(spend("a", 3), spend("b", 5, "q"), spend("c", 7)))
    asked = {"noise_multiplier": 2.0, "sampling_rate": 0.1, "epsilon": 1.5}
    most, other, new = (what_is_left(budget, population=number, **asked) for number in (None, 2, 0))  # type: ignore[arg-type]
    assert (most.population, other.population, new.population) == (1, 2, 0)
    for found, before in ((most, 20), (other, 10), (new, 0)):
        assert fits(found.steps, before, 1.5)
        assert not fits(found.steps + 1, before, 1.5)
        assert found.epsilon_before == pytest.approx(composed_epsilon([TEN.with_steps(before)], DELTA))
    assert new.steps == other.steps + 10 == most.steps + 20
    assert "of population 2 is spent or reserved" in str(other)
    assert "of a new population" in str(new)
    assert "2 is spent" in other._repr_html_()


def test_the_noise_that_lets_so_many_steps_fit_is_the_least() -> None:
    budget = Budget.of(ledger(spend("a", 3)))
    found = what_is_left(budget, sampling_rate=0.1, steps=50, epsilon=2.0)
    assert (found.asked, found.steps) == ("noise", 50)
    assert found.epsilon_after <= 2.0
    less = Mechanism(found.noise_multiplier * 0.99, 0.1, 50)
    assert composed_epsilon([TEN, less], DELTA) > 2.0
    assert "50 steps fit from noise multiplier" in str(found)
    with pytest.raises(PrivacyError):
        what_is_left(budget, sampling_rate=0.1, steps=50, epsilon=ALONE * 0.9)


def test_where_nothing_fits_the_choices_are_named() -> None:
    found = what_is_left(Budget.of(ledger(spend("a", 3))), sampling_rate=0.9, noise_multiplier=0.3, epsilon=1.0)
    assert found.steps == 0
    assert found.epsilon_after == found.epsilon_before
    assert "more noise" in str(found)
    assert "budget set" in str(found)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sampling_rate": 0.1}, "either a noise multiplier or a number of steps"),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 3}, "either"),
        ({"sampling_rate": 2.0, "noise_multiplier": 1.0}, r"sampling_rate is 2\.0"),
        ({"sampling_rate": 0.1, "noise_multiplier": 0.0}, r"noise_multiplier is 0\.0"),
        ({"sampling_rate": 0.1, "noise_multiplier": 1e9}, "at most 10,000"),
        ({"sampling_rate": 0.1, "steps": 0}, "steps is 0"),
        ({"sampling_rate": 0.1, "steps": MOST_STEPS + 1}, "from 1 to 1,000,000"),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "epsilon": -1.0}, r"epsilon is -1\.0"),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "population": 2}, "there is no population 2"),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "population": -1}, "there is no population -1"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_sentence(asked: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        what_is_left(Budget.of(ledger(spend("a", 3))), **asked)  # type: ignore[arg-type]
    assert refused.value.next_step


def test_what_is_left_of_no_budget_says_how_to_set_one() -> None:
    empty = Budget.of(Ledger(None, None, ()))
    with pytest.raises(ConfigError, match="no budget yet"):
        what_is_left(empty, sampling_rate=0.1, noise_multiplier=2.0)
    assert what_is_left(empty, sampling_rate=0.1, noise_multiplier=2.0, epsilon=1.0).steps > 0


# --- the picture -----------------------------------------------------------------------------------------------------


def texts(svg: str) -> list[str]:
    found = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(one.itertext()) for one in found]


def drawn(told: Ledger) -> str:
    figure = budget_figure(told, Budget.of(told))
    assert figure is not None
    return figure.svg


def test_the_picture_shows_each_training_the_budget_and_its_raises() -> None:
    told = ledger(
        spend("a", 3, asked=Limit(3, "annotator", 4.0, DELTA)),
        spend("b", 9, settled=False, total=BOTH),
        budgets=(Limit(6, "annotator", 6.0, DELTA, "second study", "A. Keeper"),),
    )
    said = texts(drawn(told))
    for words in ("study a", "study b", "reserved", "budget 4 (#3)", "raised to 6 (#6)"):
        assert any(words in one for one in said), (words, said)
    figure = budget_figure(told, Budget.of(told))
    assert figure is not None
    assert "under a budget of 4 → 6" in figure.alt
    assert "1 training not settled" in figure.alt
    assert figure.png()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_picture_names_populations_where_there_are_several() -> None:
    svg = drawn(ledger(spend("a", 3), spend("b", 5, "q"), spend("c", 7)))
    assert "population 1 · 40 annotators" in svg
    assert "population 2 · 40 annotators" in svg
    assert "population" not in "".join(texts(drawn(ledger(spend("a", 3)))))


def test_the_lines_end_at_what_is_composed_anew_whatever_was_recorded() -> None:
    lied = ledger(spend("a", 3, total=0.0), spend("b", 5, total=0.001))
    figure = budget_figure(lied, Budget.of(lied))
    assert figure is not None
    assert f"it ends at {Budget.of(lied).total:.1f}"[:-1] in figure.alt


def test_a_name_with_markup_and_quotes_stays_text() -> None:
    name = "<b>'x\"\\ \U0001f600"
    svg = drawn(ledger(spend("a", 3, experiment=name)))
    assert "<b>" not in svg
    assert name in "".join(texts(svg))


def test_a_picture_that_stands_alone_can_be_read_in_the_dark_and_without_eyes() -> None:
    svg = drawn(ledger(spend("a", 3)))
    assert "prefers-color-scheme:dark" in svg
    used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{6})"', svg))
    assert used <= set(DARK), used - set(DARK)
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert "composed ε per annotator" in str(root.get("aria-label"))
    assert "transparent" not in svg.split("<style>")[0]


def test_the_same_budget_gives_the_same_bytes() -> None:
    told = ledger(spend("a", 3), spend("b", 5, "q"))
    assert drawn(told) == drawn(told)


def test_many_trainings_are_numbered() -> None:
    spends = [spend(chr(97 + at), 3 + at) for at in range(MOST_NAMED + 1)]
    said = texts(drawn(ledger(*spends)))
    assert "trainings, in the order of their reservations" in said
    assert "study a" not in said


def test_the_picture_is_saved_by_its_name_and_stands_in_the_notebook(tmp_path: Path) -> None:
    budget = Budget.of(ledger(spend("a", 3)))
    assert budget.save(tmp_path / "budget.svg").read_text(encoding="utf-8").startswith("<svg")
    assert budget.save(tmp_path / "budget.PNG").read_bytes().startswith(b"\x89PNG")
    page = budget._repr_html_()
    assert "data:image/png;base64," in page
    assert 'alt="The composed ε per annotator' in page
    empty = Budget.of(Ledger(None, None, ()))
    assert empty.figure() is None
    with pytest.raises(ReportError, match="no figure to draw"):
        empty.save(tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_words_stand_where_the_picture_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_audit_nb.reports import budget as module

    def fails(*_: object) -> None:
        raise RuntimeError("no <fonts>")

    monkeypatch.setattr(module, "budget_figure", fails)
    page = Budget.of(ledger(spend("a", 3)))._repr_html_()
    assert "could not be drawn: no &lt;fonts&gt;" in page
    assert "study a" in page
