from __future__ import annotations

import io
import json
import time

import pikepdf
import pytest
import report_story as story

from rlhf_audit_nb.cards import build_card
from rlhf_audit_nb.compliance import Evidence
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.events import EVENTS, PrivacyPopulation, PrivacyReserved, Step
from rlhf_audit_nb.reports import FORMATS, build_compliance_report
from rlhf_audit_nb.trail import Trail


def test_a_report_saves_itself_in_the_format_of_the_suffix(tmp_path):
    report = build_compliance_report(story.evidence())
    assert report.save(tmp_path / "r.html").read_text(encoding="utf-8") == report.html
    assert report.save(tmp_path / "r.pdf").read_bytes().startswith(b"%PDF-1.7")
    assert json.loads(report.save(tmp_path / "r.json").read_text(encoding="utf-8")) == report.to_dict()
    assert build_compliance_report(story.evidence(), format="json").save(tmp_path / "bare").read_text()[0] == "{"


def test_an_unknown_suffix_format_or_mode_is_refused_with_the_list(tmp_path):
    report = build_compliance_report(story.evidence())
    for call in (
        lambda: report.save(tmp_path / "r.docx"),
        lambda: report.content("docx"),
        lambda: build_compliance_report(story.evidence(), format="docx"),
    ):
        with pytest.raises(ReportError, match="docx") as refused:
            call()
        assert all(name in refused.value.next_step for name in FORMATS)
    with pytest.raises(ReportError, match="gdpr") as refused:
        build_compliance_report(story.evidence(), "gdpr")
    assert "eu_ai_act" in refused.value.next_step


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ReportError, match="nowhere"):
        build_compliance_report(story.evidence()).save(tmp_path / "nowhere" / "r.html")


def test_the_dict_holds_verdict_privacy_assessment_and_evidence():
    said = build_compliance_report(story.evidence()).to_dict()
    assert said["verdict"]["level"] == "UNANCHORED"
    assert said["assessment"]["counts"]["evidenced"] == 8
    facts = {fact["label"]: fact["value"] for fact in said["privacy"][0]["facts"]}
    assert next(iter(facts)) == "Unit"
    assert "by the column annotator_id" in facts["Unit"]
    assert len(said["evidence"][0]["leaf_hash"]) == 64
    json.dumps(said, allow_nan=False)


def test_a_private_report_says_that_dropped_rows_are_not_covered():
    private, plain = (build_compliance_report(story.evidence(private=private)).html for private in (True, False))
    assert "Not covered: rows that the trainer drops" in private
    assert "trainer drops" not in plain


def test_printed_it_says_level_counts_and_privacy_once():
    private, plain = (repr(build_compliance_report(story.evidence(private=private))) for private in (True, False))
    assert private.startswith("<ComplianceReport UNANCHORED: 8 of 197")
    assert "ε" in private
    assert "δ" in private
    assert plain.endswith("; trained without differential privacy: no bound>")


def test_in_a_notebook_it_shows_a_summary_without_style_sheet_or_script_of_its_own():
    shown = build_compliance_report(story.evidence(experiment="<script>x</script>"))._repr_html_()
    assert "<style" not in shown
    assert "<script" not in shown
    assert "class=" not in shown
    assert "UNANCHORED" in shown
    assert "ε 6.21" in shown


def test_a_private_value_is_in_no_report(tmp_path):
    source = story.evidence(with_notebook=True, steps=6)
    with Trail.open(tmp_path / "audit", home=tmp_path / "home") as trail:
        for entry in source.entries[1:]:
            private = json.dumps({"value": story.PLANTED}).encode() if EVENTS[entry.type].PRIVATE else None
            trail.append(entry.type, entry.body, run=entry.run, private=private)
    evidence = Evidence.from_trail(tmp_path / "audit", home=tmp_path / "home")
    assert any(item.sealed for item in evidence.items)
    report = build_compliance_report(evidence)
    planted = story.PLANTED.encode()
    with pikepdf.open(io.BytesIO(report.pdf)) as pdf:
        parts = [
            item.read_bytes() for item in pdf.objects if isinstance(item, pikepdf.Stream) and "/Subtype" not in item
        ]
        parts.append(pdf.attachments["evidence.json"].get_file().read_bytes())
    for part in (report.html.encode(), report.json.encode(), *parts):
        assert planted not in part
        assert story.digest(story.PLANTED).encode() not in part
    assert b"0.6931" not in report.html.encode()


def test_a_report_from_ten_thousand_entries_is_made_in_time():
    evidence = story.evidence(steps=10_000)
    assert len(evidence.of(Step)) == 10_000
    build_compliance_report(story.evidence()).html  # noqa: B018  the converter's own start is not what is measured
    begun = time.perf_counter()
    report = build_compliance_report(evidence)
    page = report.html
    html_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    pdf = report.pdf
    pdf_seconds = time.perf_counter() - begun + html_seconds
    print(f"10,000 entries: HTML {html_seconds:.2f} s ({len(page)} bytes), PDF {pdf_seconds:.2f} s ({len(pdf)} bytes)")
    assert html_seconds < 5
    assert pdf_seconds < 10
    assert len(page) < 400_000


def test_a_raised_budget_is_named_with_the_entries_that_raised_it():
    teller = story.Teller()
    story.created(teller)
    for number, budget in enumerate((4.0, 9.0, 9.0, 8.0), 1):
        story.train(teller, run=str(number) * 32, budget=budget, steps=2, before=float(number))
    evidence = story.told(teller)
    reserved = [item.index for item, _ in evidence.of(PrivacyReserved)]
    said = build_compliance_report(evidence).to_dict()["privacy_words"]
    assert f"The budget was raised from 4 to 9 (#{reserved[0]} → #{reserved[1]})." in said
    assert said.count("raised") == 1
    assert "The budget was raised from 4 to 9" in build_compliance_report(evidence).html


def populations(*rosters):
    """A trail with one run for each of ``rosters``: its population, whether it is new, and with whom it is disjoint."""
    teller = story.Teller()
    story.created(teller)
    for number, (name, disjoint, before) in enumerate(rosters, 1):
        if disjoint is not None:
            teller.tell(
                PrivacyPopulation(population=name, units=124, key_id="k", disjoint_from=disjoint), None, None, 1.0
            )
        story.train(teller, run=str(number) * 32, steps=2, before=before, population=name)
    return story.told(teller)


def test_where_populations_share_nobody_the_figure_names_whose_it_is():
    evidence = populations(("north", [], 0.0), ("south", ["north"], 0.0), ("north", None, 1.0))
    report = build_compliance_report(evidence).to_dict()
    said = report["privacy_words"]
    assert "ε\u00a0=\u00a07.21" in said
    assert "of the population that spent most (124 annotators, 2 of 3 private trainings" in said
    assert "the 2 populations share nobody" in said
    assert "population" in build_compliance_report(evidence).html
    assert "2 of 3 private trainings" in str(build_card(evidence, "eu_standard").text)


@pytest.mark.parametrize(
    "rosters",
    [
        (("north", [], 0.0), ("south", [], 1.0)),
        ((None, None, 0.0), (None, None, 1.0)),
        (("north", [], 0.0), (None, None, 1.0)),
        (("north", [], 0.0), ("south", ["north"], 0.0), ("both", [], 1.0)),
    ],
)
def test_one_population_is_not_spoken_of(rosters):
    assert "population that spent most" not in build_compliance_report(populations(*rosters)).to_dict()["privacy_words"]


def test_a_settlement_that_is_not_believed_counts_in_full_and_is_said():
    teller = story.Teller()
    story.created(teller)
    story.train(teller, steps=4, settled_steps=1, spent=0.5)
    report = build_compliance_report(story.told(teller))
    said = report.to_dict()["privacy_words"]
    assert "ε\u00a0=\u00a06.21" in said
    assert "spent or reserved" in said
    assert "is not believed, and all 4 steps" in report.html
