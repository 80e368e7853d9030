"""The panel's model: what it says, what it leaves out, and its updates."""

from __future__ import annotations

import copy
import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import SECRET, advance, made_up_run, made_up_status, made_up_verdict

from rlhf_audit_nb.capture.state import InheritedView
from rlhf_audit_nb.notebook.panels.model import PanelModel, merge, patch
from rlhf_audit_nb.notebook.panels.series import SERIES_POINTS, Thinned
from rlhf_audit_nb.notebook.panels.view import NO_PRIVACY, SEALED_LOSS, Check, build_view
from rlhf_audit_nb.notebook.panels.words import say_bound, say_delta, say_number, say_root, say_seconds
from rlhf_audit_nb.trail import Level, Reason

HELD = Check(at=1_795_359_740.0, verdict=made_up_verdict())


def test_a_private_run_shows_spent_planned_and_budget_with_delta_unit_and_adjacency():
    privacy = build_view(advance(made_up_run(), 132), made_up_status(), HELD)["privacy"]
    assert privacy["big"] == "ε 3.96"
    assert privacy["of"] == "of 8.00, δ 10⁻⁵"
    assert [key["text"] for key in privacy["keys"]] == ["before 1.10", "now 3.96", "planned 5.40"]
    assert "annotator" in privacy["note"]
    assert "124" in privacy["note"]
    assert "Zero-out adjacency" in privacy["note"]
    assert privacy["bar"] == {"before": 0.1375, "now": 0.494, "planned": 0.675, "budget": 1.0}


def test_a_run_without_privacy_says_so_where_epsilon_would_stand():
    view = build_view(advance(made_up_run(private=False), 10), made_up_status(), HELD)
    assert view["privacy"]["big"] == NO_PRIVACY
    assert "ε" not in json.dumps(view, ensure_ascii=False)
    assert "plain" in view["training"]["note"]
    assert view["training"]["metrics"][0]["label"] == "loss"


def test_a_run_that_inherits_says_so_with_delta_and_unit_and_shows_its_metrics():
    state = advance(made_up_run(private=False), 10)
    state.inherited = InheritedView(unit="annotator", epsilon=3.999, delta=1e-5, runs=["8f3a" * 8])
    view = build_view(state, made_up_status(), HELD)
    assert view["privacy"]["big"] == "ε 4.00"
    assert view["privacy"]["of"] == "at δ 10⁻⁵, for each annotator"
    assert "8f3a8f3a" in view["privacy"]["note"]
    assert "Nothing is charged" in view["privacy"]["note"]
    assert NO_PRIVACY not in json.dumps(view)
    assert view["training"]["metrics"][0]["label"] == "loss"
    assert "public" in view["training"]["note"]


def test_a_private_run_says_that_the_loss_is_sealed_and_names_the_gradient_norm_as_privatised():
    training = build_view(advance(made_up_run(), 10), made_up_status())["training"]
    assert SEALED_LOSS in training["note"]
    assert [item["label"] for item in training["metrics"]] == [
        "privatised gradient norm",
        "update norm",
        "learning rate",
    ]


def test_no_series_but_the_public_ones_of_a_private_run_reaches_view_updates_or_state():
    state = advance(made_up_run(), 5)
    for name in ("loss", "train_loss", "rewards/margins", "clip_fraction", "batch_size", "num_tokens", "grad_norm"):
        state.add(name, 5, SECRET)
    model = PanelModel(state)
    update = model.observe(10.0, made_up_status(), HELD)
    said = json.dumps([update, model.full()], ensure_ascii=False)
    assert "0.693" not in said
    for name in ('loss"', "margins", "clip_fraction", "batch_size", "num_tokens"):
        assert name not in said


def test_the_same_series_is_shown_of_a_run_without_privacy():
    state = advance(made_up_run(private=False), 5)
    state.add("loss", 5, SECRET)
    model = PanelModel(state)
    assert "0.693" in json.dumps([model.observe(10.0, made_up_status(), HELD), model.full()])


def test_pace_is_told_live_and_never_kept():
    state = made_up_run()
    model = PanelModel(state)
    for second in range(1, 21):
        advance(state, second * 2)
        update = model.observe(1000.0 + second, made_up_status(second))
    assert update["live"]["rate"] == "2 steps/s"
    assert update["live"]["left"] == "2 min 10 s left"
    kept = json.dumps([model.full(), update["view"]], ensure_ascii=False)
    assert "steps/s" not in kept
    assert " left" not in kept


def test_without_a_verification_no_level_is_claimed():
    view = build_view(made_up_run(), made_up_status())
    assert view["level"]["word"] == "not verified yet"
    said = json.dumps(view)
    assert not any(level.name in said for level in Level)


def test_a_verification_that_failed_to_run_claims_no_level_and_tells_why():
    view = build_view(made_up_run(), made_up_status(), Check(at=1.0, error="The key is not the one."))
    assert view["level"]["word"] == "not verified"
    assert "The key is not the one." in view["level"]["meaning"]
    assert not any(level.name in json.dumps(view) for level in Level)


@pytest.mark.parametrize("level", list(Level))
def test_every_level_has_its_own_word_and_only_the_bad_ones_raise_the_alarm(level):
    view = build_view(made_up_run(), made_up_status(), Check(at=1.0, verdict=made_up_verdict(level)))
    assert view["level"]["word"] == level.name
    assert view["level"]["meaning"]
    assert bool(view["alert"]) == (level in {Level.INVALID, Level.DIVERGED})


def test_an_invalid_trail_is_shown_with_the_place():
    reasons = [Reason("leaf", f"entry {i}", "The leaf does not hash to the signed root.") for i in (412, 413, 414, 415)]
    check = Check(at=1.0, verdict=made_up_verdict(Level.INVALID, *reasons))
    alert = build_view(made_up_run(), made_up_status(), check)["alert"]
    assert alert["reasons"][0]["where"] == "entry 412"
    assert "does not hash" in alert["reasons"][0]["text"]
    assert alert["more"] == "and 1 more reason"


def test_updates_applied_in_order_give_the_view_itself():
    state = made_up_run(status="open")
    model = PanelModel(state)
    seen: dict = {}
    numbers = []
    for tick in range(12):
        state.status = "training" if tick < 11 else "completed"
        advance(state, tick * 25)
        if tick == 6:
            state.warnings.append("Something to know.")
        update = model.observe(float(tick), made_up_status(tick), HELD if tick > 3 else None, frozen=tick == 11)
        seen = merge(seen, update["view"])
        numbers.append(update["seq"])
    assert numbers == list(range(1, 13))
    assert seen == model.full()["view"]
    assert seen["frozen"] is True


def test_nothing_is_sent_when_nothing_changed_but_the_clock():
    model = PanelModel(advance(made_up_run(), 5))
    assert model.observe(1.0, made_up_status()) is not None
    assert model.observe(2.0, made_up_status()) is None
    assert model.observe(3.0, made_up_status(1285)) is not None


def test_points_are_sent_once_and_in_order():
    state = made_up_run(private=False)
    model = PanelModel(state)
    sent = []
    for last in (3, 3, 7, 20):
        advance(state, last)
        update = model.observe(float(last), made_up_status())
        sent += (update or {"points": {}})["points"].get("loss", [])
    assert sent == [[float(x), y] for x, y in state.series["loss"]]


def test_a_series_that_appears_later_is_sent_from_its_start():
    state = advance(made_up_run(private=False), 3)
    model = PanelModel(state)
    model.observe(1.0, made_up_status())
    state.add("eval_loss", 3, 0.5)
    assert model.observe(2.0, made_up_status())["points"] == {"eval_loss": [[3.0, 0.5]]}


def test_not_a_number_is_named_and_not_drawn():
    state = advance(made_up_run(private=False), 3)
    state.add("loss", 4, math.nan)
    state.add("rewards/margins", 4, math.inf)
    model = PanelModel(state)
    update = model.observe(1.0, made_up_status())
    values = {item["name"]: item["value"] for item in update["view"]["training"]["metrics"]}
    assert values["loss"] == "NaN"
    assert values["rewards/margins"] == "∞"
    json.dumps([update, model.full()], allow_nan=False)


def test_an_unbounded_epsilon_is_said_and_can_be_sent():
    state = made_up_run(steps=3)
    object.__setattr__(state.privacy, "planned", math.inf)
    object.__setattr__(state.privacy, "curve", [0.0, 1.0, math.inf, math.inf])
    state.add("epsilon", 3, math.inf)
    state.step = 3
    model = PanelModel(state)
    update = model.observe(1.0, made_up_status())
    assert update["view"]["privacy"]["big"] == "ε ∞"
    json.dumps([update, model.full()], allow_nan=False)


def test_of_many_series_the_first_are_shown_and_the_others_counted():
    state = advance(made_up_run(private=False), 5)
    for i in range(12):
        state.add(f"logps/{i:02}", 5, 1.0)
    training = build_view(state, made_up_status())["training"]
    names = [item["name"] for item in training["metrics"]]
    assert names[:2] == ["loss", "rewards/margins"]
    assert len(names) == 8
    assert training["note"].endswith("9 more series stand in the trail.")


def test_the_signer_is_shown_by_name_and_key_hash_and_copied_whole():
    rows = {row["key"]: row for row in build_view(made_up_run(), made_up_status())["integrity"]["rows"]}
    assert rows["signer"]["text"] == "example.…+8a488eff"
    assert rows["signer"]["copy"] == made_up_status().signer


def test_a_run_that_waits_for_its_plan_claims_no_epsilon():
    state = made_up_run()
    state.privacy = None
    privacy = build_view(state, made_up_status())["privacy"]
    assert privacy["big"] == "ε planned later"
    assert "chart" not in privacy


def test_the_plan_that_comes_later_brings_its_curve_once():
    state = made_up_run()
    plan, state.privacy = state.privacy, None
    model = PanelModel(state)
    assert "curve" not in model.observe(1.0, made_up_status())
    state.privacy = plan
    assert model.observe(2.0, made_up_status())["curve"][0] == [0, 1.1]
    advance(state, 5)
    assert "curve" not in model.observe(3.0, made_up_status())


def test_the_curve_keeps_its_ends_and_few_points_however_long_the_plan():
    model = PanelModel(made_up_run(steps=100_000))
    curve = model.observe(1.0, made_up_status())["curve"]
    assert len(curve) <= 240
    assert curve[0] == [0, 1.1]
    assert curve[-1] == [100_000, 5.4]


def test_a_second_training_in_the_run_is_placed_on_its_own_plan():
    state = advance(made_up_run(steps=300), 300)
    second = copy.copy(state.privacy)
    object.__setattr__(second, "curve", [5.4, 5.6, 5.8, 6.0])
    object.__setattr__(second, "planned", 6.0)
    state.privacy = second
    state.max_steps, state.step = 3, 302
    state.add("epsilon", 302, 5.8)
    view = build_view(state, made_up_status())
    assert view["privacy"]["chart"]["step"] == 2
    assert view["training"]["of"] == "steps"


def test_a_budget_far_above_the_plan_is_named_and_not_drawn():
    state = made_up_run()
    object.__setattr__(state.privacy, "budget", 100.0)
    chart = build_view(state, made_up_status())["privacy"]["chart"]
    assert chart["limit"] == {"at": None, "text": "budget 100.00 above"}
    assert chart["top"] < 10


def test_whole_state_and_updates_do_not_grow_with_the_run():
    sizes = []
    for steps in (1_000, 50_000):
        state = made_up_run(steps=steps)
        model = PanelModel(state)
        advance(state, steps - 10)
        model.observe(1.0, made_up_status())
        advance(state, steps)
        update = model.observe(2.0, made_up_status(1285))
        sizes.append((len(json.dumps(update)), len(json.dumps(model.full()))))
    (short_update, short_full), (long_update, long_full) = sizes
    assert long_update < 1.2 * short_update
    assert long_full < 1.5 * short_full


def test_reading_costs_the_same_at_step_1000_and_at_step_100000():
    def cost(steps):
        state = made_up_run(steps=steps)
        model = PanelModel(state)
        advance(state, steps - 60)
        model.observe(1.0, made_up_status())
        best = math.inf
        for more in range(30):
            advance(state, steps - 59 + more)
            began = time.perf_counter()
            model.observe(2.0 + more, made_up_status(more))
            best = min(best, time.perf_counter() - began)
        return best

    short, long = cost(1_000), cost(100_000)
    assert long < 5 * short + 0.001


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000), st.integers(2, 40))
def test_a_thinned_series_keeps_its_mean_its_order_and_its_size(values, half):
    thinned = Thinned(2 * half)
    for x, y in enumerate(values):
        thinned.add(x, y)
    points = thinned.points()
    assert len(points) <= 2 * half
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[-1][0] >= len(values) - 1 - thinned.stride
    whole = len(values) // thinned.stride * thinned.stride
    if whole:
        kept = points[: whole // thinned.stride]
        mean = sum(y for _, y in kept) / len(kept)
        assert mean == pytest.approx(sum(values[:whole]) / whole, abs=1e-3)


def test_a_short_series_is_kept_as_it_is():
    thinned = Thinned(SERIES_POINTS)
    for x in range(SERIES_POINTS - 1):
        thinned.add(x, float(x))
    assert thinned.stride == 1
    assert thinned.points() == [(x, float(x)) for x in range(SERIES_POINTS - 1)]


tree = st.recursive(
    st.integers() | st.text(max_size=3) | st.booleans() | st.lists(st.integers(), max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=2), tree, max_size=4), st.dictionaries(st.text(max_size=2), tree, max_size=4))
def test_a_patch_turns_the_old_into_the_new_and_is_empty_between_equals(old, new):
    if not _empty_inside(new):
        assert merge(old, patch(old, new)) == new
    assert patch(new, new) == {}


def _empty_inside(value):
    """An empty map in place of another value cannot be told from nothing by a merge patch; views hold none."""
    return isinstance(value, dict) and any(item == {} or _empty_inside(item) for item in value.values())


BOUNDS = {3.42: "3.42", 3.4201: "3.43", 8.0: "8.00", 0.0: "0.00", 0.00123: "0.00123", 0.0991: "0.0991"}
BOUNDS |= {math.inf: "∞", 1.1: "1.10", 12.999: "13.00", 1e-9: "0.000001"}


@pytest.mark.parametrize(("value", "said"), BOUNDS.items())
def test_a_bound_is_rounded_up_and_never_down(value, said):
    assert say_bound(value) == said


@given(st.floats(0, 1e6))
def test_no_bound_is_said_below_its_value(value):
    assert float(say_bound(value)) >= value * (1 - 1e-8)


NUMBERS = {0.6931: "0.693", 5e-5: "5e-5", -0.25: "−0.25", 12400.0: "12,400", 0.0: "0", 1.85: "1.85", 0.5: "0.5"}
NUMBERS |= {3e12: "3.00e12", math.nan: "NaN", -math.inf: "−∞", 100.0: "100", -2e-7: "−2e-7"}


@pytest.mark.parametrize(("value", "said"), NUMBERS.items())
def test_numbers_are_said_with_three_digits(value, said):
    assert say_number(value) == said


def test_small_words():
    assert say_delta(1e-5) == "10⁻⁵"
    assert say_delta(0.0) == "0"
    assert say_delta(2.5e-6) == "2.5·10⁻⁶"
    assert say_seconds(134) == "2 min 14 s"
    assert say_seconds(3 * 3600 + 120) == "3 h 2 min"
    assert say_seconds(120.4) == "2 min"
    assert say_seconds(0.2) == "0 s"
    assert say_root(bytes(range(32))) == "AAECAwQF…wdHh8="
