"""Evaluations against thresholds, from entries told by hand: which came first, and what that makes of a figure."""

from __future__ import annotations

import math

import pytest
from report_story import Teller, created, digest, told

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.cards import build_card
from rlhf_audit_nb.compliance.assess import State, assess
from rlhf_audit_nb.compliance.framework import load_framework
from rlhf_audit_nb.compliance.queries import QUERIES
from rlhf_audit_nb.compliance.thresholds import evaluations
from rlhf_audit_nb.reports import build_compliance_report
from rlhf_audit_nb.reports.evaluations import EvaluationsView, evaluation_words

RUN = "a" * 32
DATA, OTHER = digest("held out"), digest("other rows")


class Story(Teller):
    """A trail that is told entry by entry; each method gives the entry's index."""

    def __init__(self) -> None:
        super().__init__()
        created(self)

    def train(self, run: str = RUN, experiment: str = "reward", left: str = "final", steps: int = 3) -> int:
        self.tell(ev.RunStarted(experiment=experiment, entry_point="cell", tool="t"), run)
        begun = self.tell(
            ev.TrainerAttached(trainer="RewardTrainer", loss=None, max_steps=3, seed=1, hyperparameters={}), run
        )
        self.tell(model("base", "start"), run)
        for step in range(1, steps + 1):
            self.tell(ev.Step(step=step), run)
        self.tell(model("final", left), run)
        self.tell(ev.RunFinished(status="completed", steps=steps, trained=True), run)
        return begun

    def threshold(self, condition: str = ">= 0.7", metric: str = "accuracy", **more: object) -> int:
        relation, bound = condition.split()
        return self.tell(ev.ThresholdSealed(metric=metric, relation=relation, bound=float(bound), **more))

    def result(self, value: float = 0.8, weights: str = "final", data: str | None = DATA, **more: object) -> int:
        given = {"identified": "live", "weights_digest": digest(weights), **more}
        return self.tell(ev.EvaluationRecorded(metrics={"accuracy": ev.number(value)}, data=data, **given))

    def read(self):
        return evaluations(told(self))

    def only(self):
        (done,) = self.read().done
        return done


def model(role: str, name: str) -> ev.ModelBound:
    return ev.ModelBound(
        role=role,
        architecture="Llama",
        parameters=1,
        trainable=1,
        weights_digest=digest(name),
        config_digest=digest("c"),
    )


def test_a_threshold_from_before_the_training_is_met_or_not_by_what_the_training_left():
    for value, outcome in ((0.8, "met"), (0.7, "met"), (0.69, "not met")):
        story = Story()
        at = story.threshold()
        story.train()
        story.result(value)
        done = story.only()
        (judged,) = done.judgements
        assert (judged.outcome, judged.order, judged.threshold.entry) == (outcome, "before training", at)
        assert done.model.as_ == "final"
        assert done.passed is (outcome == "met")
        assert not done.problems


def test_a_threshold_from_after_the_first_step_is_only_before_the_result():
    story = Story()
    story.train()
    story.threshold()
    story.result()
    (judged,) = story.only().judgements
    assert (judged.order, judged.outcome) == ("before result", "met")


def test_a_threshold_from_after_the_result_judges_nothing_and_is_told():
    story = Story()
    story.train()
    story.result()
    late = story.threshold()
    done = story.only()
    (judged,) = done.judgements
    assert (judged.order, judged.outcome, judged.threshold.entry) == ("after result", "not judged", late)
    assert not done.passed
    assert "after the result was known" in judged.words


def test_testing_again_after_a_threshold_does_not_make_a_known_figure_unknown():
    story = Story()
    story.train()
    first = story.result(0.75)
    story.threshold()
    story.result(0.75)
    _, again = story.read().done
    (judged,) = again.judgements
    assert (judged.order, judged.outcome, judged.known_since) == ("after result", "not judged", first)
    assert not again.passed


def test_the_same_model_by_its_folder_is_known_to_be_the_same():
    story = Story()
    story.train()
    story.tell(ev.WeightsSaved(step=3, name="m", digest=digest("folder"), files=1, bytes=1), RUN)
    story.result(0.75)
    story.threshold()
    story.result(0.75, weights="other names", identified="folder", folder_digest=digest("folder"))
    _, again = story.read().done
    assert again.model.as_ == "final"
    assert again.judgements[0].order == "after result"


def test_weights_that_a_training_had_left_before_are_not_new_when_they_are_trained_again():
    story = Story()
    early = story.threshold(metric="accuracy", experiment="reward")
    story.train()
    story.threshold(metric="accuracy")
    story.train(run="b" * 32)
    story.result()
    orders = {one.threshold.entry == early: one.order for one in story.only().judgements}
    assert orders == {True: "before training", False: "before result"}


@pytest.mark.parametrize("known", [True, False])
def test_a_training_that_went_on_from_a_checkpoint_began_where_that_one_was_trained(known):
    story = Story()
    begin(story, RUN)
    story.tell(ev.Step(step=1), RUN)
    saved = story.tell(ev.WeightsSaved(step=1, name="checkpoint-1", digest=digest("c"), files=1, bytes=1), RUN)
    story.threshold()
    begin(story, "b" * 32)
    resumed = ev.RunResumed(step=1, checkpoint=digest("c"), entry=saved if known else None, from_run=RUN)
    story.tell(resumed, "b" * 32)
    story.tell(ev.Step(step=2), "b" * 32)
    story.tell(model("final", "final"), "b" * 32)
    story.result()
    (judged,) = story.only().judgements
    assert (judged.order, judged.outcome) == ("before result", "met")


def begin(story: Story, run: str) -> None:
    story.tell(ev.RunStarted(experiment="reward", entry_point="cell", tool="t"), run)
    story.tell(ev.TrainerAttached(trainer="RewardTrainer", loss=None, max_steps=3, seed=1, hyperparameters={}), run)
    story.tell(model("base", "start"), run)


FOLDER = {"identified": "folder", "folder_digest": digest("F")}
LIVE = {"base_digest": digest("start")}


@pytest.mark.parametrize(("first", "second"), [(FOLDER, LIVE), (LIVE, FOLDER), (LIVE, LIVE), (FOLDER, FOLDER)])
@pytest.mark.parametrize("again", [True, False])
def test_a_known_figure_stays_known_however_the_model_is_handed_in(first, second, again):
    """Trained again with the same result, or evaluated before the training's last entry."""
    story = Story()
    if again:
        story.train()
        told_first = story.result(0.75, **first)
        story.threshold()
        story.train(run="b" * 32)
    else:
        begin(story, RUN)
        told_first = story.result(0.75, **first)
        story.tell(model("final", "final"), RUN)
        story.threshold()
    story.result(0.75, **second)
    (judged,) = story.read().done[-1].judgements
    assert (judged.order, judged.known_since) == ("after result", told_first)


def test_the_same_adapter_on_another_base_is_another_model():
    story = Story()
    story.train()
    story.result(0.75, base_digest=digest("other base"))
    story.threshold()
    story.result(0.75, base_digest=digest("start"))
    (judged,) = story.read().done[-1].judgements
    assert judged.order == "before result"


def test_an_earlier_figure_on_other_data_or_of_another_model_tells_nothing_of_this_one():
    for more in ({"data": OTHER}, {"weights": "start"}):
        story = Story()
        story.train()
        story.result(0.75, **more)
        story.threshold(data=DATA)
        story.result(0.75)
        (judged,) = story.read().done[-1].judgements
        assert (judged.order, judged.outcome) == ("before result", "met")


def test_each_change_of_a_threshold_counts_and_is_shown_with_what_it_would_have_made_of_the_figure():
    story = Story()
    first = story.threshold(">= 0.9")
    story.train()
    second = story.threshold(">= 0.7")
    story.result(0.8)
    third = story.threshold(">= 0.5")
    (judged,) = story.only().judgements
    assert (judged.threshold.entry, judged.order, judged.outcome) == (second, "before result", "met")
    assert [(one.entry, reached) for one, reached in judged.changed] == [(first, False)]
    assert [one.entry for one in judged.later] == [third]
    assert "changed from ≥ 0.9 (#1), which was not reached" in judged.words
    assert "set again after the result: ≥ 0.5" in judged.words


def test_what_is_no_finite_number_reaches_nothing():
    for value in (math.nan, math.inf, -math.inf):
        for condition in (">= 0.7", "<= 0.7", "> -1", "< 1"):
            story = Story()
            story.threshold(condition)
            story.train()
            story.result(value)
            done = story.only()
            assert done.judgements[0].outcome == "not met"
            assert not done.passed
            assert any("not a finite number" in problem for problem in done.problems)


@pytest.mark.parametrize(("condition", "met"), [("> 0.7", False), ("< 0.7", False), (">= 0.7", True), ("<= 0.7", True)])
def test_a_bound_itself_is_met_only_where_the_relation_says_so(condition, met):
    story = Story()
    story.threshold(condition)
    story.train()
    story.result(0.7)
    assert story.only().passed is met


def test_an_evaluation_on_other_data_is_not_held_to_the_threshold_and_is_told():
    for data, words in ((OTHER, "other data"), (None, "not stated")):
        story = Story()
        at = story.threshold(data=DATA)
        story.train()
        story.result(0.8, data=data)
        done = story.only()
        assert done.judgements == ()
        (problem,) = done.problems
        assert words in problem
        assert f"#{at}" in problem
        assert not done.passed


def test_another_model_than_the_run_left_is_told():
    story = Story()
    story.threshold(experiment="reward")
    story.train()
    story.result(0.8, weights="somebody else's", experiment="reward")
    done = story.only()
    assert done.model.as_ == "unknown"
    assert done.problems[0] == "said to be the model of reward, but no training of that experiment left it"
    assert not done.passed


def test_a_base_model_and_a_checkpoint_are_not_what_the_training_left():
    story = Story()
    story.threshold()
    story.tell(ev.RunStarted(experiment="reward", entry_point="cell", tool="t"), RUN)
    story.tell(ev.TrainerAttached(trainer="T", loss=None, max_steps=3, seed=1, hyperparameters={}), RUN)
    story.tell(model("base", "start"), RUN)
    story.tell(ev.Step(step=1), RUN)
    story.tell(ev.WeightsSaved(step=1, name="checkpoint-1", digest=digest("c1"), files=1, bytes=1), RUN)
    story.tell(ev.Step(step=2), RUN)
    story.tell(model("final", "final"), RUN)
    story.result(weights="start")
    story.result(weights="x", identified="folder", folder_digest=digest("c1"))
    story.tell(ev.EvaluationRecorded(metrics={"accuracy": 0.8}, identified="stated", stated_digest=digest("final")))
    base, checkpoint, final = story.read().done
    assert [one.model.as_ for one in (base, checkpoint, final)] == ["base", "checkpoint", "final"]
    assert [one.passed for one in (base, checkpoint, final)] == [False, False, True]
    assert "not what its training left" in checkpoint.problems[0]


def test_an_adapter_is_the_trained_model_only_on_the_weights_that_it_was_trained_on():
    for base, as_ in (("start", "final"), ("other base", "unknown")):
        story = Story()
        story.train()
        story.result(base_digest=digest(base))
        assert story.only().model.as_ == as_


def test_thresholds_are_held_to_the_experiment_that_they_name():
    story = Story()
    story.threshold(">= 0.9", experiment="policy")
    story.threshold(">= 0.5", experiment="reward")
    story.train()
    story.result(0.8)
    found = story.read()
    assert [one.threshold.experiment for one in found.done[0].judgements] == ["reward"]
    assert [one.experiment for one in found.unused] == ["policy"]
    assert "for policy was set, and no evaluation was ever held to it" in evaluation_words(found)[-1]
    assert not EvaluationsView(found, "UNANCHORED").passed


def test_every_series_that_an_evaluation_falls_under_is_judged():
    story = Story()
    story.threshold(">= 0.9", data=DATA)
    story.threshold(">= 0.5")
    story.train()
    story.result(0.8)
    done = story.only()
    assert sorted(one.outcome for one in done.judgements) == ["met", "not met"]
    assert not done.passed


def test_sealed_figures_are_judged_by_nobody():
    story = Story()
    story.threshold()
    story.train()
    half = ev.EvaluationPrivate(metrics={"accuracy": 0.987654}, data=DATA, samples=3)
    story.tell(
        ev.EvaluationRecorded(metrics={"accuracy": None}, identified="live", weights_digest=digest("final")),
        private=half,
    )
    done = story.only()
    assert done.sealed
    assert done.judgements[0].outcome == "not judged"
    assert not done.passed
    assert "accuracy sealed" in evaluation_words(story.read())[0]


def test_the_assessment_knows_tests_against_thresholds_set_before():
    story = Story()
    story.train()
    assert QUERIES["thresholds_before"](told(story)) is None
    story.result()
    late = told(story)
    assert QUERIES["thresholds_before"](late) is None
    assert QUERIES["evaluations"](late) is not None
    at = story.threshold(">= 0.6")
    story.train("b" * 32, "policy", "second")
    then = story.result(0.65, weights="second")
    found = QUERIES["thresholds_before"](told(story))
    assert {at, then} <= set(found.entries)
    assert "1 met, 0 not met" in found.words
    lines = {line.requirement.id: line for line in assess(told(story), load_framework("eu_ai_act")).lines}
    assert lines["AIA-9-8b"].state is State.EVIDENCED
    assert not lines["AIA-9-8b"].whole
    assert lines["AIA-9-8a"].state is State.MISSING
    assert lines["AIA-9-8c"].material


def test_an_unknown_model_evidences_nothing():
    story = Story()
    story.threshold()
    story.result(weights="never trained here")
    assert QUERIES["evaluations"](told(story)) is None
    assert QUERIES["thresholds_before"](told(story)) is None


def test_report_and_card_show_each_figure_with_its_entries():
    story = Story()
    at = story.threshold(by="A. Keeper", reason="as good as last year's", data=DATA)
    story.train()
    then = story.result(0.8125, evaluator="pairwise 1.0", seeds=[1], samples=16)
    evidence = told(story)
    report = build_compliance_report(evidence)
    (group,) = report.model.evaluations
    said = {fact.label: fact for fact in group.facts}
    assert said["accuracy"].value == "0.8125"
    assert {cite.first for cite in said["accuracy, threshold"].cites} == {at}
    assert "A. Keeper" in said["accuracy, threshold"].note
    assert f"for data sha256 {DATA[:6]}…" in said["accuracy, threshold"].note
    assert 'id="evaluations"' in report.html
    (summed,) = [fact for fact in report.model.summary if fact.label == "Evaluations"]
    assert summed.value == "1 evaluation; of 1 threshold set before the result, 1 reached."
    assert {cite.first for cite in summed.cites} == {at, then}
    card = build_card(evidence)
    section = next(one for one in card.sections if one.title == "Evaluation")
    (field,) = section.fields
    assert field.value.startswith("0.8125; ≥ 0.7 met")
    assert then in {index for one in field.cites for index in range(one.first, one.last + 1)}
    without = build_card(told(Story()))
    assert "0.8125" not in without.text
