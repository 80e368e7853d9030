"""What policies write while they train: figures in the open, texts by commitment, each part opened alone."""

from __future__ import annotations

import math

import pytest
from support.tiny import grpo_trainer
from support.trails import events
from support.trainers import counts_letters

from rlhf_audit_nb.capture.completions import MOST_GROUPS, Draw, figures, parts_of, read_samples
from rlhf_audit_nb.capture.run import AuditWarning, Run
from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.events import SamplesDrawn, SamplesPrivate, Step, decode_private
from rlhf_audit_nb.trail import Trail, verify_trail
from rlhf_audit_nb.trail.disclosure import disclose, verify_disclosure


def quarrels(completions, **_):
    """A reward that is the same for everybody, except that it has none for the first answer."""
    return [None, *(0.5 for _ in completions[1:])]


@pytest.fixture
def trail(tmp_path):
    with Trail.open(tmp_path / "audit") as opened:
        yield opened


def opened(trail):
    trail.flush()
    with trail.reading_vault() as vault:
        return list(read_samples(trail.reader(), vault))


# --- pure ------------------------------------------------------------------------------------------------------------


def made_up(**changes):
    known = {
        "prompts": ["a", "a", "b", "b"],
        "completions": ["1", "2", "3", "4"],
        "rewards": {"x": [1.0, 3.0, math.nan, 5.0], "y": [2.0, 2.0, math.nan, math.nan]},
        "weights": [1.0, 0.5],
        "groups": [[0, 1], [2, 3]],
        "advantages": [-1.0, 1.0, 0.0, 0.0],
        "lengths": [1, 2, 3, 4],
        "truncated": [False, False, False, True],
    }
    return Draw(**{**known, **changes})


def test_figures_are_those_of_the_weighted_rewards_and_leave_out_what_was_not_rewarded():
    draw = made_up()
    totals = draw.totals()
    assert totals[:2] == [2.0, 4.0]
    assert math.isnan(totals[2])
    assert totals[3] == 5.0
    found, means, deviations = figures(draw)
    assert (found["samples"], found["prompts"], found["unrewarded"]) == (4, 2, 1)
    assert found["reward/mean"] == pytest.approx(11 / 3)
    assert found["rewards/y/mean"] == 2.0
    assert found["groups_without_spread"] == 0.0
    assert found["truncated"] == 0.25
    assert (means, deviations) == ([3.0, 5.0], [pytest.approx(math.sqrt(2)), None])
    flat, _, _ = figures(made_up(rewards={"x": [1.0, 1.0, 2.0, 5.0]}, weights=[1.0]))
    assert flat["groups_without_spread"] == 0.5


def test_rewards_that_are_no_numbers_are_written_by_their_names():
    found, means, deviations = figures(made_up(rewards={"x": [math.inf, 1.0, math.nan, math.nan]}, weights=[1.0]))
    assert (found["reward/max"], found["reward/deviation"]) == ("Infinity", "NaN")
    assert (means, deviations) == (["Infinity", None], ["NaN", None])


@pytest.mark.parametrize("most", [1, 200, 400, 1 << 20])
def test_parts_hold_every_sample_once_in_order(most):
    draw = made_up(prompts=["a" * 50, "a" * 50, "b" * 50, "b" * 50])
    parts = list(parts_of(draw, most))
    assert [text for part in parts for text in part.completions] == draw.completions
    assert [part.prompts[at] for part in parts for at in part.prompt_of] == draw.prompts
    assert [value for part in parts for value in part.rewards["x"]] == [1.0, 3.0, None, 5.0]
    assert [value for part in parts for value in part.advantages] == draw.advantages
    assert len(parts) == {1: 4, 200: 4, 400: 2, 1 << 20: 1}[most]
    assert all(len(part.prompts) == len(set(part.prompts)) for part in parts)


# --- a trainer -------------------------------------------------------------------------------------------------------


def test_samples_are_opened_from_the_vault_and_agree_with_the_trainers_own_figures(trail, tmp_path):
    with Run(trail, "samples") as run:
        trainer = grpo_trainer([counts_letters, quarrels], tmp_path / "out", reward_weights=[1.0, 2.0])
        trainer.train()
    parts = opened(trail)
    assert [(part.event.step, part.event.draw, part.state) for part in parts] == [(1, 1, "open"), (2, 2, "open")]
    for part, step in zip(parts, events(trail, Step, run.id), strict=True):
        said, half = part.event.statistics, part.half
        assert said["reward/mean"] == pytest.approx(step.metrics["reward"])
        assert said["reward/deviation"] == pytest.approx(step.metrics["reward_std"], rel=1e-5)
        assert said["rewards/counts_letters/mean"] == pytest.approx(step.metrics["rewards/counts_letters/mean"])
        assert said["length/mean"] == pytest.approx(step.metrics["completions/mean_length"])
        assert said["truncated"] == pytest.approx(step.metrics["completions/clipped_ratio"])
        assert said["groups_without_spread"] == pytest.approx(step.metrics["frac_reward_zero_std"])
        assert half.rewards["counts_letters"] == counts_letters(half.completions)
        assert half.rewards["quarrels"] == [None, 0.5, 0.5, 0.5]
        assert len(half.prompts) == said["groups"] == 2
        assert sum(half.advantages) == pytest.approx(0.0, abs=1e-3)
    last = [text for part in parts for text in part.half.completions][-4:]
    assert last == list(trainer._logs["completion"])
    assert all(prompt.startswith("A public question") for prompt, _ in part.pairs())
    for entry in trail.reader().entries(type=SamplesDrawn.TYPE):
        assert b"A public question" not in entry.data
        assert entry.envelope.sealed is not None
    assert verify_trail(trail.location).level.name == "UNANCHORED"


def test_one_part_is_disclosed_without_the_others(trail, tmp_path):
    with Run(trail, "disclosed"):
        grpo_trainer([counts_letters], tmp_path / "out").train()
    first, second = opened(trail)
    file = tmp_path / "part.opening"
    file.write_bytes(disclose(trail, first.index).encode())
    verdict, payload = verify_disclosure(file)
    assert verdict.level.name == "UNANCHORED"
    assert decode_private(SamplesDrawn.TYPE, payload) == first.half
    assert not any(text and text.encode() in file.read_bytes() for text in second.half.completions if len(text) > 4)
    other = disclose(trail, second.index)
    changed = file.read_bytes().replace(disclose(trail, first.index).payload.encode(), other.payload.encode())
    file.write_bytes(changed)
    assert verify_disclosure(file)[1] == b""


@pytest.mark.parametrize(("every", "drawn"), [(0, []), (2, [1, 3])])
def test_how_often_is_a_setting(trail, tmp_path, every, drawn):
    with Run(trail, "sparse", audit=AuditConfig(samples_every=every)):
        grpo_trainer([counts_letters], tmp_path / "out", max_steps=3).train()
    assert [draw.draw for draw in events(trail, SamplesDrawn)] == drawn
    assert len(events(trail, Step)) == 3


def test_samples_that_serve_several_steps_are_recorded_once(trail, tmp_path):
    with Run(trail, "reused"):
        trainer = grpo_trainer([counts_letters], tmp_path / "out", max_steps=4, num_iterations=2)
        trainer.train()
    assert [draw.step for draw in events(trail, SamplesDrawn)] == [1, 3]


def test_evaluation_inside_the_training_adds_no_samples(trail, tmp_path):
    trainer = grpo_trainer(
        [counts_letters],
        tmp_path / "out",
        eval_prompts=[{"prompt": "Held out?"}] * 2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        max_steps=1,
    )
    with Run(trail, "evaluated"):
        trainer.train()
    (part,) = opened(trail)
    assert "Held out?" not in part.half.prompts
    assert any(step.notes == ["evaluation"] for step in events(trail, Step))


def test_what_cannot_be_read_is_said_and_stops_no_training(trail, tmp_path):
    trainer = grpo_trainer([counts_letters], tmp_path / "out", max_steps=1)

    class Mine(type(trainer)):
        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            made["advantages"] = made["advantages"].clone()
            return Shy(made)

    class Shy(dict):
        def get(self, name, default=None):
            raise AttributeError(name)

    trainer.__class__ = Mine
    with Run(trail, "other"), pytest.warns(AuditWarning, match="could not be read"):
        trainer.train()
    assert events(trail, SamplesDrawn) == []


def test_a_draw_of_many_groups_keeps_them_out_of_the_entry(trail):
    from rlhf_audit_nb.capture.completions import SampleRecorder

    size = 2 * (MOST_GROUPS + 1)
    texts = [f"{number}" * 500 for number in range(size)]
    groups = [[place, place + 1] for place in range(0, size, 2)]
    draw = Draw(texts, texts, {"x": [1.0] * size}, [1.0], groups)
    with Run(trail, "many") as run:
        recorder = SampleRecorder(run, type("T", (), {"state": type("S", (), {"global_step": 0})})())
        recorder._finish(draw)
    found = events(trail, SamplesDrawn)
    assert len(found) > 1
    assert [item.part for item in found] == list(range(1, found[0].parts + 1))
    assert sum(item.samples for item in found) == size
    assert [item.first for item in found][1] == found[0].samples
    assert found[0].group_means == []
    assert found[0].statistics["groups"] == MOST_GROUPS + 1
    assert all(item.statistics == {} for item in found[1:])
    assert isinstance(opened(trail)[0].half, SamplesPrivate)
