"""A comparison for people: numbers that differ look different, and nothing in a record becomes markup or a command."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.records.cell_diff import Line, compare_text
from rlhf_audit_nb.records.diff import RecordDiff, Row, SeriesPair, Side, diff_records
from rlhf_audit_nb.reports.diff import DiffView, diff_words, line_words, pair_text, render_diff, value_text
from rlhf_audit_nb.trail import TrustPolicy

FIXTURES = Path(__file__).parents[1] / "vectors" / "records" / "seal-1"
HOSTILE = '"><script>alert(1)</script></style><img src=x onerror=alert(2)>{{ 7*7 }}\u202e\x1b[2J\x1b]0;x\x07\r\u2028'
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]")


class Parsed(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def side(name: str = "left.ipynb", **more: Any) -> Side:
    return Side(**{"name": name, "level": "UNANCHORED", "record": "a" * 32, "origin": "o", "finished": 7, **more})


def diff(*rows: Row, series: tuple[SeriesPair, ...] = (), left: Side | None = None) -> RecordDiff:
    return RecordDiff(left=left or side(), right=side("right.ipynb"), rows=rows, series=series)


def row(section: str = "parameters", place: str = "p", kind: Any = "changed", **more: Any) -> Row:
    return Row(section=section, place=place, kind=kind, **more)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RecordDiff:
    policy = TrustPolicy.parse((FIXTURES / "trust.policy").read_bytes())
    home = tmp_path_factory.mktemp("home")
    return diff_records(FIXTURES / "plain.ipynb", FIXTURES / "private.ipynb", policy=policy, home=home, outputs=True)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (0.1 + 0.2, 0.3),
        (7.997996449138772, 7.997996449138773),
        (1, True),
        ("a" * 500 + "x" + "b" * 500, "a" * 500 + "y" + "b" * 500),
        ("0" * 63 + "1", "0" * 31 + "2" + "0" * 31 + "1"),
        (["a"] * 90 + ["x"], ["a"] * 90 + ["y"]),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
        (10**20, 10**20 + 1),
        (None, "no"),
    ],
    ids=["floats", "epsilons", "one and true", "long", "digests", "lists", "maps", "large", "nothing"],
)
def test_what_differs_looks_different_and_is_short(left: Any, right: Any) -> None:
    one, other = pair_text(left, right)
    assert one != other
    assert max(len(one), len(other)) < 200


def test_values_are_words() -> None:
    assert value_text(None) == "none"
    assert value_text([]) == "none"
    assert value_text({"a": [True, "x"]}) == "a true, x"
    assert value_text("ab" * 32) == "ababab…ababab"
    series = {"last": 0.5, "step": 7, "values": 3, "lowest": 0.25, "highest": 1.0}
    assert value_text(series) == "0.5 at step 7 (from 0.25 to 1)"
    assert value_text("two\nlines") == "two lines"


def test_an_epsilon_is_never_rounded() -> None:
    series = {"last": 7.99799644, "step": 2, "values": 2, "lowest": 5.29632269, "highest": 7.99799644}
    text = "\n".join(
        diff_words(diff(row("metrics", "epsilon", "added", right=series), row("metrics", "x", "added", right=series)))
    )
    assert re.search(r"\+ epsilon +7.99799644 at step 2$", text, re.MULTILINE)
    assert "x                                   7.99799644 at step 2 (from 5.2963 to 7.998)" in text


# -- a terminal -------------------------------------------------------------------------------------------------------


def test_differences_are_told_section_by_section_and_equal_things_where_they_are_asked_for() -> None:
    found = diff(
        row(left=1, right=2),
        row(place="same", kind="same", left=3, right=3),
        row("privacy", "population", "sealed"),
        row("compute", "seconds", "expected", left=1.0, right=2.0),
        row("runs", "run", "added", run="new", right="new"),
    )
    lines = diff_words(found)
    text = "\n".join(lines)
    assert re.search(r"^  ~ p +1 → 2$", text, re.MULTILINE)
    assert "? sealed, cannot be compared: population" in text
    assert "same" not in text
    assert "seconds" not in text
    assert lines[-2:] == [
        "2 differences; 1 thing is equal, 1 is sealed and cannot be compared, 1 differs between any two",
        "executions (--all shows them).",
    ]
    everything = "\n".join(diff_words(found, everything=True))
    assert "= same" in everything
    assert "· seconds" in everything


def test_nothing_is_said_to_differ_where_nothing_does() -> None:
    assert (
        diff_words(diff(row(kind="same", left=1, right=1)))[-1] == "No difference; 1 thing is equal (--all shows them)."
    )


def test_a_record_that_does_not_verify_is_said_so_beside_its_level() -> None:
    claimed = side(level="INVALID", claimed=True, reasons=("The source of cell 3 was changed.",))
    text = "\n".join(diff_words(diff(left=claimed)))
    assert "left   left.ipynb  INVALID" in text
    assert "no evidence" in text
    assert "The source of cell 3 was changed." in text
    page = render_diff(diff(left=claimed))
    assert "INVALID" in page
    assert "no evidence" in page
    assert "Both were verified" not in page


def test_lines_are_bounded_and_what_is_left_out_is_counted() -> None:
    lines = compare_text("", "".join(f"{i}\n" for i in range(100)))
    told = [*line_words(lines)]
    assert len(told) == 41
    assert told[-1] == "… 60 more lines"
    assert len([*line_words(lines, most=None)]) == 100


def test_rows_of_several_runs_say_whose_they_are() -> None:
    text = "\n".join(diff_words(diff(row(run="sft", left=1, right=2), row(run="dpo", left=1, right=2))))
    assert "sft: p" in text
    assert "dpo: p" in text


# -- hostile ----------------------------------------------------------------------------------------------------------


def hostile() -> RecordDiff:
    lines = compare_text(f"a\n{HOSTILE}\n", f"a\n{HOSTILE}{HOSTILE}\n")
    pair = SeriesPair(run=HOSTILE, name=HOSTILE, left=((1, 1.0), (2, 2.0)), right=((1, 1.0), (2, 3.0)), parted=2)
    parts = (
        ("parameters", "changed", ()),
        ("code", "changed", lines),
        ("outputs", "added", lines),
        ("metrics", "changed", ()),
        ("privacy", "sealed", ()),
        ("data", "same", ()),
    )
    rows = [
        row(section, HOSTILE, kind, run=HOSTILE, left=HOSTILE, right=HOSTILE + "!", note=HOSTILE, lines=part)
        for section, kind, part in parts
    ]
    return diff(
        *rows, series=(pair,), left=side(HOSTILE, origin=HOSTILE, claimed=True, reasons=(HOSTILE,), level="INVALID")
    )


def test_nothing_in_a_record_is_obeyed_by_a_terminal() -> None:
    for everything in (False, True):
        for line in diff_words(hostile(), everything=everything):
            assert not OBEYED.search(line), line
            assert "\n" not in line


def test_nothing_in_a_record_becomes_markup() -> None:
    page = render_diff(hostile())
    parsed = Parsed(page)
    assert not {"script", "img", "link", "iframe", "object", "a-x"} & {tag for tag, _ in parsed.tags}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert all((attributes.get("href") or "#").startswith("#") for tag, attributes in parsed.tags if tag == "a")
    assert "{{ 7*7 }}" in parsed.text
    assert "<script>alert(1)</script>" in parsed.text
    assert "[U+202E]" in page
    assert "[U+001B]" in page
    assert not OBEYED.search(page)
    assert len([tag for tag, _ in parsed.tags if tag == "style"]) == 1


def test_numbers_that_json_cannot_hold_are_shown_and_not_drawn() -> None:
    pair = SeriesPair(run="x", name="loss", left=((1, "NaN"), (2, "Infinity")), right=((1, 1.0), (2, 2.0)), parted=1)
    rows = row(
        "metrics",
        "loss",
        run="x",
        left={"last": "NaN", "step": 2, "values": 2},
        right={"last": 2.0, "step": 2, "values": 2},
    )
    page = render_diff(diff(rows, series=(pair,)))
    assert "NaN at step 2" in page
    assert "<figure>" not in page


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_every_difference_and_is_the_same_for_the_same_records(real: RecordDiff) -> None:
    page = render_diff(real)
    assert page == render_diff(real)
    parsed = Parsed(page)
    for item in real.differences:
        assert item.place in parsed.text
    assert "noise_multiplier" in parsed.text
    assert "0.8532626423765194" in parsed.text
    assert parsed.text.count("they part at step") >= 2
    ids = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = {attributes["href"].removeprefix("#") for tag, attributes in parsed.tags if tag == "a"}
    assert links <= set(ids)
    assert "://" not in re.sub(r'xmlns(:xlink)?="http[^"]*"', "", page)


def test_replaced_lines_stand_side_by_side() -> None:
    lines = (Line(" ", "a", 1, 1), Line("-", "b", 2, None), Line("-", "c", 3, None), Line("+", "B", None, 2))
    page = render_diff(diff(row("code", "cell 1 (code)", lines=lines)))
    columns = re.findall(
        r'<code class="(del|ins|none)" role="cell">(?:<span class="sg">.*?</span></span>)?(.*?)</code>', page
    )
    assert columns == [("del", "b"), ("ins", "B"), ("del", "c"), ("none", "")]


def test_it_is_saved_as_html_alone(tmp_path: Path, real: RecordDiff) -> None:
    view = DiffView(diff(row(left=1, right=2)))
    path = view.save(tmp_path / "diff.html")
    assert path.read_text(encoding="utf-8") == view.html()
    with pytest.raises(ReportError, match=r"\.pdf is no HTML"):
        view.save(tmp_path / "diff.pdf")
    with pytest.raises(ReportError, match="cannot be written"):
        view.save(tmp_path / "none" / "diff.html")
    assert DiffView(real).differs
    assert repr(view).splitlines()[0].startswith("left   left.ipynb")
