from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import report_story as story

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.reports import build_compliance_report, build_report
from rlhf_audit_nb.reports.html import render_html

HOSTILE = '"><script>alert(1)</script></style><img src=x onerror=alert(2)>{{ 7*7 }}\u202e'


class Page(HTMLParser):
    """What a browser would find: tags, attributes, ids, links, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


def page(**settings) -> Page:
    return Page(build_compliance_report(story.evidence(**settings)).html)


def test_the_page_links_to_nothing_outside_and_runs_nothing():
    text = build_compliance_report(story.evidence(with_notebook=True)).html
    found = Page(text)
    assert "script" not in found.tags
    assert not {"iframe", "object", "embed", "link", "base", "form"} & set(found.tags)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert all(value.startswith("#") for value in found.values("href"))
    assert all(value.startswith("data:image/") for value in found.values("src"))
    assert not found.values("srcset")
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_every_link_inside_the_page_has_its_place():
    found = page(with_notebook=True)
    places = found.values("id")
    assert len(places) == len(set(places))
    assert {value[1:] for value in found.values("href")} <= set(places)


def test_what_a_trail_or_a_notebook_says_is_text_and_never_markup():
    evidence = story.evidence(with_notebook=True, experiment=HOSTILE)
    evidence.notebook.cells[1].source = HOSTILE
    evidence.notebook.cells[3].outputs[0]["text"] = HOSTILE
    evidence.notebook.cells[3].outputs[1]["data"]["text/plain"] = HOSTILE
    text = build_compliance_report(evidence).html
    found = Page(text)
    assert "<script" not in text
    assert "img" in found.tags
    assert "onerror" not in [name for _, name, _ in found.attributes]
    assert "49" not in found.said
    assert "\u202e" not in text
    assert '"><script>alert(1)</script>' in found.text
    assert text.count("</style>") == 1


def test_a_hostile_origin_cannot_leave_the_style_sheet():
    evidence = story.evidence()
    evidence.verdict.origin = HOSTILE
    text = build_compliance_report(evidence).html
    assert text.count("</style>") == 1
    assert "<script" not in text


def test_the_same_evidence_gives_the_same_bytes():
    first, second = (build_compliance_report(story.evidence(with_notebook=True)).html for _ in range(2))
    assert first == second


def test_one_more_entry_gives_other_bytes():
    assert (
        build_compliance_report(story.evidence(steps=40)).html != build_compliance_report(story.evidence(steps=41)).html
    )


def test_a_private_run_shows_epsilon_with_its_unit_adjacency_delta_and_budget():
    said = page().text
    for part in ("ε 6.21", "per annotator (zero-out), δ 10⁻⁵, budget 8", "0.94", "0.125", "AES-256-CTR", "PRV 6.2118"):
        assert part in said


def test_without_privacy_every_place_of_epsilon_says_so():
    evidence = story.evidence(private=False)
    model = build_report(evidence)
    found = Page(render_html(model))
    assert model.tiles[0].label == words.NO_BOUND
    assert words.NO_BOUND in model.privacy_words
    assert all(words.NO_BOUND in part.words for part in model.privacy)
    assert all(words.NO_BOUND in fact.value for fact in model.summary)
    assert [f.value for run in model.runs for f in run.facts if f.label == "Differential privacy"] == [words.NO_BOUND]
    assert found.text.count(words.NO_BOUND) >= 5
    assert "ε" not in found.text
    assert words.NO_BOUND in repr(build_compliance_report(evidence))
    assert words.NO_BOUND in build_compliance_report(evidence)._repr_html_()


def test_a_private_run_beside_one_without_privacy_says_that_the_bound_does_not_reach_it():
    teller = story.Teller()
    story.created(teller)
    story.train(teller)
    story.train(teller, run="plain", experiment="plain_dpo", private=False)
    said = Page(build_compliance_report(story.told(teller)).html).text
    assert "This bound does not reach 1 other run of this trail" in said


@pytest.mark.parametrize("level", ["INVALID", "DIVERGED"])
def test_a_trail_that_does_not_verify_says_so_at_the_top_and_shows_no_bound(level):
    found = page(level=level, reasons=[story.reason()])
    said = found.text
    assert said.index("Nothing in this report is evidence.") < said.index("Summary")
    assert said.index("does not hash to the signed root") < said.index("Summary")
    assert "ε 6.2" not in said
    assert "0 of 197" in said
    assert "✓ evidenced" not in said


def test_a_level_is_told_with_what_it_does_not_show():
    said = page().text
    assert "UNANCHORED" in said
    assert "Nobody but the key-holder has vouched for it" in said


def test_the_law_is_named_by_its_text_and_nothing_is_called_compliant():
    said = page().text
    assert "Regulation (EU) 2026/1744" in said
    assert "CELEX 02024R1689-20260727" in said
    assert not re.search(r"\bcompliant\b", said)


def test_every_claim_points_at_entries_that_the_evidence_lists_with_their_leaf_hash():
    evidence = story.evidence(with_notebook=True)
    model = build_report(evidence)
    listed = {row.index: row.leaf_hash for row in model.evidence}
    assert all(listed[item.index] == item.leaf_hash for item in evidence.items if item.index in listed)
    for line in model.assessment.lines:
        if line.entries:
            assert {line.entries[0]} <= set(listed)


def test_figures_are_drawn_in_place_with_their_sentence():
    text = build_compliance_report(story.evidence()).html
    assert text.count("<svg") == 4
    starts = ("The composed", "Over", "Of 197", "safety_alignment: DPOTrainer")
    labels = [value for value in Page(text).values("aria-label") if value.startswith(starts)]
    assert len(labels) == 4
    assert text.index('<h2 id="lineage">') < text.index('id="lineage-d"') < text.index('<h2 id="environment">')
    assert "rises from 0.99 after step 1 to 6.21 after step 40" in "".join(labels)


def test_cells_show_source_state_and_outputs_and_say_what_was_cut():
    model = build_report(story.evidence(with_notebook=True))
    kinds = [(cell.kind, cell.label, cell.status) for cell in model.cells]
    assert kinds[0] == ("markdown", "", "")
    assert kinds[2] == ("code", "parameters of this execution", "completed")
    text, picture, widget = model.cells[3].outputs
    assert text.text == "step 40\ndone <b>&"
    assert picture.text == "ε 6.21 of 8 after 40 steps"
    assert "text/html" in widget.text
    assert model.cells[4].outputs[0].cut == 80


def test_a_markdown_cell_is_read_in_paragraphs_headings_items_and_code():
    evidence = story.evidence(with_notebook=True)
    evidence.notebook.cells[0].source = "# Title #\none\ntwo\n\n- a\n  b\n1. c\n```python\n# no heading\n```\nend <b>"
    blocks = [(block.kind, block.text) for block in build_report(evidence).cells[0].blocks]
    assert blocks == [
        ("heading", "Title"), ("text", "one two"), ("item", "a b"), ("item", "c"), ("code", "# no heading"),
        ("text", "end <b>"),
    ]  # fmt: skip


def test_a_cell_whose_execution_is_not_in_the_trail_is_not_said_to_be_completed():
    evidence = story.evidence(with_notebook=True)
    evidence.notebook.cells[4]["id"] = "someone-added-me"
    assert build_report(evidence).cells[4].status == "execution not recorded"


def test_a_run_that_failed_tells_its_reason():
    teller = story.Teller()
    story.created(teller)
    story.train(teller, private=False, status=None)
    teller.tell(ev.RunFinished(status="failed", steps=3, trained=True, reason="RuntimeError: <loss> is NaN"), story.RUN)
    said = Page(build_compliance_report(story.told(teller)).html).text
    assert "The run failed." in said
    assert "RuntimeError: <loss> is NaN" in said


def test_a_notebook_that_did_not_run_to_its_end_is_said_in_the_summary():
    teller = story.Teller()
    story.created(teller)
    story.train(teller, private=False, status="failed")
    whole = Page(build_compliance_report(story.told(teller)).html).text
    assert "did not run to its end" not in whole
    teller.tell(ev.RecordSealed(record="rec-1", digest="d", status="failed", cells=3, reason="ValueError"))
    assert "did not run to its end (failed: ValueError)" in Page(build_compliance_report(story.told(teller)).html).text


def test_a_trail_without_runs_still_gives_a_report():
    teller = story.Teller()
    story.created(teller)
    said = Page(build_compliance_report(story.told(teller)).html).text
    assert "No run was opened" in said
    assert "0 of 197" in said


def test_an_empty_trail_of_an_invalid_verdict_gives_a_report_that_says_so():
    from rlhf_audit_nb.compliance import Evidence

    evidence = Evidence(story.verdict((), "INVALID", [story.reason()], origin=""), ())
    assert "Nothing in this report is evidence." in Page(build_compliance_report(evidence).html).text
