from __future__ import annotations

import json

import pytest
import report_story as story
from huggingface_hub import ModelCard as HubCard

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.cards import FORMATS, build_card
from rlhf_audit_nb.cards.model_card import escaped
from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.errors import ReportError


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_made_saved_and_the_same_twice(name, tmp_path):
    card = build_card(story.evidence(), name)
    assert card.text == build_card(story.evidence(), name).text
    assert card.save(tmp_path / "card.md").read_text(encoding="utf-8") == card.text
    assert card._repr_markdown_()
    json.dumps(card.to_dict(), allow_nan=False)


def test_an_unknown_format_is_refused_with_the_list():
    with pytest.raises(ReportError, match="cyclonedx") as refused:
        build_card(story.evidence(), "cyclonedx")
    assert "eu_standard, huggingface, json" in refused.value.next_step


def test_every_figure_names_entries_that_hold_it():
    evidence = story.evidence()
    card = build_card(evidence)
    kinds = {item.index: item.kind for item in evidence.items}
    shown = {f.label: f for section in card.sections for f in section.fields}
    assert kinds[shown["Architecture and parameters"].cites[0].first] == "model.bound"
    assert kinds[shown["Method"].cites[0].first] == "trainer.attached"
    assert [kinds[c.first] for c in shown["Differential privacy"].cites] == ["privacy.reserved", "privacy.settled"]
    bare = {"Trail", "Root", "Verdict"}
    assert all(f.cites for f in shown.values() if f.stated and f.label not in bare)


def test_nothing_is_invented_where_the_trail_is_silent():
    said = {f["label"]: f["value"] for s in build_card(story.evidence()).to_dict()["sections"] for f in s["fields"]}
    for label in ("Licence", "Tasks and intended purpose", "Tests, metrics and results", "Compute", "Cybersecurity"):
        assert said[label] is None
    assert "| Licence | *not stated* |" in build_card(story.evidence()).text
    assert "license" not in build_card(story.evidence(), "huggingface").text


def test_the_hub_reads_the_card_and_its_metadata():
    card = HubCard(build_card(story.evidence(), "huggingface").text)
    data = card.data.to_dict()
    assert data["library_name"] == "peft"
    assert data["tags"] == ["rlhf", "rlhf-audit-trail", "differential-privacy", "dpo"]
    assert data["model_name"] == "safety_alignment"
    assert data["rlhf_audit"]["differential_privacy"]["epsilon"] == pytest.approx(6.2041)
    assert "base_model" not in data
    assert "datasets" not in data


def test_names_of_the_hub_go_into_the_metadata_and_paths_do_not():
    teller = story.Teller()
    story.created(teller)
    story.train(teller, private=False, leave_out=("model.bound", "data.bound"))
    for name in ("org/base-model", "/home/me/model"):
        teller.tell(
            ev.ModelBound(
                role="base",
                architecture="A",
                parameters=1,
                trainable=1,
                weights_digest="w",
                config_digest="c",
                name=name,
            ),
            story.RUN,
        )
        teller.tell(ev.DataBound(role="train", columns=["prompt"], source=name.replace("model", "data")), story.RUN)
        data = HubCard(build_card(story.told(teller), "huggingface").text).data.to_dict()
        assert ("base_model" in data) is (name == "org/base-model")
        assert data["datasets"] == ["org/base-data"]


@pytest.mark.parametrize("name", FORMATS)
def test_without_privacy_the_card_says_so_where_epsilon_would_stand(name):
    text = build_card(story.evidence(private=False), name).text
    assert words.NO_BOUND in text
    assert "ε" not in text
    assert "differential-privacy" not in text


def test_a_trail_that_does_not_verify_makes_no_claim_of_privacy():
    card = build_card(story.evidence(level="INVALID"), "huggingface")
    assert "Nothing on this card is evidence" in card.text
    assert "6.2" not in card.text
    assert HubCard(card.text).data.to_dict()["rlhf_audit"]["verdict"] == "INVALID"


def test_without_provenance_the_card_holds_no_digest_of_run_or_root():
    whole, short = (build_card(story.evidence(), "huggingface", include_provenance=p) for p in (True, False))
    assert story.RUN in whole.text
    assert story.RUN not in short.text
    assert "audit" not in short.to_dict()


def test_names_cannot_bring_markup_into_a_card():
    hostile = "a|b\n# c <script>x</script> [l](http://e.org) `c` *d* {{ 7*7 }}\n---\nlicense: mit\u202e"
    for name in ("eu_standard", "huggingface"):
        text = build_card(story.evidence(experiment=hostile), name).text
        assert "<script>" not in text.split("\n---\n")[-1]
        assert "](http" not in text.split("\n---\n")[-1].replace("\\](", "")
        assert "\n# c" not in text
        assert "\u202e" not in text.split("\n---\n")[-1]
    assert "license" not in HubCard(build_card(story.evidence(experiment=hostile), "huggingface").text).data.to_dict()


def test_text_is_escaped_for_one_line_of_markdown():
    assert escaped("a|b*c_d _e_\nf") == r"a\|b\*c_d \_e\_ f"
    assert escaped("# x") == r"\# x"
    assert escaped("1. x") == r"1\. x"
    assert escaped("0.5 of 2") == "0.5 of 2"
    assert escaped("<b>&") == "&lt;b&gt;&amp;"


def test_a_private_value_is_on_no_card():
    assert all(story.PLANTED not in build_card(story.evidence(), name).text for name in FORMATS)


def test_the_card_describes_the_newest_run_that_made_a_model():
    teller = story.Teller()
    story.created(teller)
    story.train(teller, experiment="made")
    story.train(teller, run="later", experiment="tried", leave_out=("weights.saved", "model.bound"))
    assert build_card(story.told(teller)).content.title == "made"


def test_a_trail_without_runs_gives_a_card_that_states_nothing():
    teller = story.Teller()
    story.created(teller)
    card = build_card(story.told(teller))
    assert "No model" in card.text
    assert "nothing was trained" in card.text
