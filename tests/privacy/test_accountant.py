"""The accountant against dp-accounting called directly, and against figures others have published."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, PrivacyError
from rlhf_audit_nb.privacy import cross_checks, loss_distributions
from rlhf_audit_nb.privacy.accountant import (
    Mechanism,
    calibrate,
    compose,
    composed_epsilon,
    epsilon_curve,
    max_steps,
)
from rlhf_audit_nb.privacy.ledger import Ledger

SETTINGS = [
    (1.3, 250 / 60000, 3600, 1e-5),
    (1.1, 256 / 60000, 14062, 1e-5),
    (0.7, 256 / 60000, 10546, 1e-5),
    (4.0, 0.01, 10000, 1e-5),
    (1.5, 0.04, 2250, 1e-5),
    (0.8, 0.001, 1000, 1e-6),
    (0.8, 0.05, 1000, 1e-6),
    (3.0, 0.001, 100000, 1e-6),
    (5.0, 1.0, 1, 1e-5),
    (1.0, 0.2, 40, 1e-4),
]


def direct(mechanisms: list[Mechanism], delta: float, grid: float = 1e-4) -> float:
    """Epsilon from dp-accounting's own accountant under REPLACE_SPECIAL, not through our code."""
    inner = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, grid)
    for item in mechanisms:
        gaussian = dp_accounting.GaussianDpEvent(item.noise_multiplier)
        inner.compose(dp_accounting.PoissonSampledDpEvent(item.sampling_rate, gaussian), item.steps)
    return float(inner.get_epsilon(delta))


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SETTINGS)
def test_epsilon_equals_dp_accounting_called_directly(sigma: float, rate: float, steps: int, delta: float) -> None:
    mechanism = Mechanism(sigma, rate, steps)
    assert compose([mechanism], delta).epsilon == pytest.approx(direct([mechanism], delta), rel=1e-9)


PUBLISHED = [
    # sigma, q, T, delta; epsilon by PLD, PRV (None: not computed, it takes gigabytes) and RDP, as published or as
    # measured with the reference implementations
    (1.3, 250 / 60000, 3600, 1e-5, 0.8530, 0.8631, 0.9422),
    (1.1, 256 / 60000, 14062, 1e-5, 2.3817, 2.3917, 2.5966),
    (0.7, 256 / 60000, 10546, 1e-5, 5.6394, 5.6498, 6.3195),
    (4.0, 0.01, 10000, 1e-5, 0.9470, 0.9569, 1.0355),
    (1.5, 0.04, 2250, 1e-5, 6.7688, 6.7791, 7.3293),
    (0.8, 0.001, 1000, 1e-6, 0.4677, 0.477771266, 1.4619),
    (0.8, 0.05, 1000, 1e-6, 19.5150, 19.525842805, 21.2239),
    (0.8, 0.05, 20000, 1e-6, 140.6424, None, 173.0644),
    (3.0, 0.001, 100000, 1e-6, 0.4369, 0.443671721, 0.4697),
    (5.0, 1.0, 1, 1e-5, 0.7255, 0.7356, 0.7945),
    (1.0, 1e-5, 100000, 1e-8, 0.01875, 0.0284, 0.6837),
]


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta", "pld_says", "prv_says", "rdp_says"), PUBLISHED)
def test_all_three_accountants_give_the_published_figures(
    sigma: float, rate: float, steps: int, delta: float, pld_says: float, prv_says: float | None, rdp_says: float
) -> None:
    accounted = compose([Mechanism(sigma, rate, steps)], delta)
    assert accounted.epsilon == pytest.approx(pld_says, abs=2e-4, rel=2e-4)
    assert accounted.rdp == pytest.approx(rdp_says, abs=2e-4)
    if prv_says is None:
        assert str(accounted.prv).startswith("not computed: ")
    else:
        assert accounted.prv == pytest.approx(prv_says, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), [row[:4] for row in PUBLISHED if row[2] <= 15000])
def test_no_figure_is_below_what_another_library_proves_to_be_too_little(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    theirs = PRVAccountant()
    theirs.history = [(sigma, rate, steps)]
    found = theirs._get_dprv(eps_error=0.01, delta_error=delta / 1000)
    lower, _, upper = found.compute_epsilon(delta, delta / 1000, 0.01)
    assert lower <= composed_epsilon([Mechanism(sigma, rate, steps)], delta) <= upper + 0.01


@pytest.mark.parametrize("delta", [1e-10, 1e-12, 0.0, -1e-5, 1.0, math.nan])
def test_no_figure_is_given_for_a_delta_at_which_all_accountants_are_noise(delta: float) -> None:
    mechanism = Mechanism(1.0, 0.01, 1000)
    for ask in (
        lambda: compose([mechanism], delta),
        lambda: compose([], delta),
        lambda: composed_epsilon([mechanism], delta),
        lambda: epsilon_curve(mechanism, delta),
        lambda: calibrate(1.0, delta, 0.01, 1000),
        lambda: max_steps(1.0, delta, 1.0, 0.01),
        lambda: Ledger("annotator", "annotator_id", ()).composed(delta),
    ):
        with pytest.raises(PrivacyError, match="between 1e-10 and 1") as refused:
            ask()
        assert refused.value.reason == "delta"


def test_another_adjacency_is_not_offered() -> None:
    with pytest.raises(ConfigError, match="replace-one"):
        PrivacyConfig(epsilon=1.0, adjacency="replace-one")  # type: ignore[arg-type]


def test_the_page_on_accounting_prints_these_figures() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "privacy" / "accounting.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in cells if len(row) == 8 and row[0][0].isdigit()]
    assert len(rows) == len(PUBLISHED)
    for row, (sigma, rate, steps, delta, *_) in zip(rows, PUBLISHED, strict=True):
        over, _, under = row[1].partition("/")
        printed = (float(row[0]), float(over) / float(under or 1), int(row[2].replace(",", "")), float(row[3]))
        assert printed == pytest.approx((sigma, rate, steps, delta))
        accounted = compose([Mechanism(sigma, rate, steps)], delta)
        found = (accounted.epsilon, accounted.prv, accounted.rdp)
        assert row[4:7] == ["–" if isinstance(value, str) else f"{value:.4f}" for value in found]
    for pairs, *printed in [row for row in cells if len(row) == 4 and row[0].isdigit()]:
        accounted = compose([Mechanism(1.0, 0.01, 400, int(pairs))], 1e-5)
        assert isinstance(accounted.rdp, float)
        assert [float(value) for value in printed[:2]] == pytest.approx([accounted.epsilon, accounted.rdp], abs=6e-4)
        assert int(pairs) == 1 or float(printed[2]) < accounted.epsilon


def test_different_mechanisms_are_composed_and_not_added_up() -> None:
    first, second = Mechanism(2.0, 0.1, 200), Mechanism(1.1, 0.05, 100)
    together = compose([first, second], 1e-5).epsilon
    assert together == pytest.approx(direct([first, second], 1e-5), rel=1e-9)
    assert together < compose([first], 1e-5).epsilon + compose([second], 1e-5).epsilon
    assert together > compose([first], 1e-5).epsilon


def test_the_order_and_the_splitting_of_a_spend_do_not_matter() -> None:
    other = Mechanism(2.0, 0.1, 20)
    whole = compose([Mechanism(1.0, 0.05, 100), other], 1e-5).epsilon
    split = compose([Mechanism(1.0, 0.05, 40), other, Mechanism(1.0, 0.05, 60)], 1e-5).epsilon
    assert whole == split


def test_the_budget_of_many_runs_is_what_dp_accounting_composes_and_is_planned_upon_quickly() -> None:
    runs = [Mechanism(2.0 + 0.1 * number, 0.05, 30 + number) for number in range(6)]
    assert composed_epsilon(runs, 1e-5) == pytest.approx(direct(runs, 1e-5), rel=1e-8)
    changed = [*runs[:3], Mechanism(2.35, 0.05, 100), *runs[4:]]
    assert composed_epsilon(changed, 1e-5) == pytest.approx(direct(changed, 1e-5), rel=1e-8)
    prior = [Mechanism(3 + 0.01 * number, 0.05, 100) for number in range(30)]
    before = composed_epsilon(prior, 1e-5)
    begun = time.process_time()
    sigma = calibrate(before + 1, 1e-5, 0.05, 100, prior)
    assert 0.997 * (before + 1) <= composed_epsilon([*prior, Mechanism(sigma, 0.05, 100)], 1e-5) <= before + 1
    assert time.process_time() - begun < 6


def test_nothing_costs_nothing() -> None:
    assert compose([], 1e-5).epsilon == 0
    assert compose([Mechanism(1.0, 0.1, 0)], 1e-5).epsilon == 0


def test_below_a_tenth_the_fine_grid_is_used() -> None:
    mechanism = Mechanism(30.0, 0.01, 100)
    accounted = compose([mechanism], 1e-6)
    assert accounted.epsilon < 0.1
    assert accounted.grid == 1e-5
    assert accounted.epsilon == pytest.approx(direct([mechanism], 1e-6, 1e-5), rel=1e-9)
    assert accounted.epsilon <= direct([mechanism], 1e-6, 1e-4)


def test_an_accountant_that_cannot_say_is_recorded_in_words() -> None:
    accounted = compose([Mechanism(0.3, 0.2, 1000)], 1e-5)
    assert accounted.epsilon == pytest.approx(1017.6, rel=1e-2)
    assert isinstance(accounted.prv, str)
    assert "not computed" in accounted.prv
    assert any("PRV" in note for note in accounted.notes)


def test_a_failing_cross_check_is_recorded_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> float:
        raise MemoryError("no room")

    monkeypatch.setattr(cross_checks, "_opacus_prv", fails)
    accounted = compose([Mechanism(1.0, 0.1, 10)], 1e-5)
    assert accounted.prv == "failed: MemoryError: no room"
    assert any("MemoryError" in note for note in accounted.notes)
    for error in (OverflowError("x"), ValueError("x"), TypeError("x"), IndexError("x"), RuntimeError("x")):

        def also(*_: object, error: Exception = error) -> float:
            raise error

        monkeypatch.setattr(cross_checks, "_opacus_prv", also)
        assert compose([Mechanism(1.0, 0.1, 10)], 1e-5).prv == f"failed: {type(error).__name__}: x"
    monkeypatch.setattr(cross_checks, "_opacus_prv", lambda *_: math.inf)
    assert compose([Mechanism(1.0, 0.1, 10)], 1e-5).prv == "failed: returned inf"


def test_an_authority_that_understates_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_checks, "_opacus_prv", lambda *_: 99.0)
    with pytest.raises(PrivacyError, match="disagree"):
        compose([Mechanism(1.0, 0.1, 10)], 1e-5)


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.5, 0.05, 150), (2.0, 0.5, 12), (6.0, 0.2, 1000)])
def test_the_curve_rises_and_never_understates(sigma: float, rate: float, steps: int) -> None:
    mechanism = Mechanism(sigma, rate, steps)
    curve = epsilon_curve(mechanism, 1e-5)
    assert len(curve) == steps + 1
    assert curve[0] == 0
    assert all(before <= after for before, after in itertools.pairwise(curve))
    for step in (1, 2, steps // 7, steps // 3, steps // 2, steps - 1, steps):
        truth = direct([mechanism.with_steps(step)], 1e-5)
        assert curve[step] >= truth - 1e-9, step
        assert curve[step] <= truth * 1.06 + 0.05, step
    assert curve[-1] == compose([mechanism], 1e-5).epsilon


def test_the_curve_starts_where_the_ledger_stands() -> None:
    prior = [Mechanism(2.0, 0.1, 200)]
    mechanism = Mechanism(1.1, 0.05, 90)
    curve = epsilon_curve(mechanism, 1e-5, prior)
    assert curve[0] == compose(prior, 1e-5).epsilon
    assert curve[-1] == compose([*prior, mechanism], 1e-5).epsilon
    assert curve[40] >= direct([*prior, mechanism.with_steps(40)], 1e-5) - 1e-9
    assert all(before <= after for before, after in itertools.pairwise(curve))


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [(8.0, 1e-5, 0.05, 200), (1.0, 1e-5, 0.1, 300), (0.05, 1e-6, 0.05, 100)],
)
def test_the_calibrated_noise_is_enough_and_hardly_more(epsilon: float, delta: float, rate: float, steps: int) -> None:
    sigma = calibrate(epsilon, delta, rate, steps)
    spent = compose([Mechanism(sigma, rate, steps)], delta).epsilon
    assert spent <= epsilon
    assert compose([Mechanism(sigma * 0.998, rate, steps)], delta).epsilon > epsilon


@pytest.mark.parametrize(
    ("epsilon", "rate", "published"),
    [(1, 0.05, 2.92), (2, 0.1, 3.15)],
)
def test_calibration_gives_the_known_noise_for_500_annotators(epsilon: float, rate: float, published: float) -> None:
    assert calibrate(epsilon, 1e-4, rate, 300) == pytest.approx(published, abs=0.006)


def test_calibration_counts_what_was_spent_before() -> None:
    prior = [Mechanism(2.0, 0.1, 100)]
    sigma = calibrate(4.0, 1e-5, 0.1, 50, prior)
    assert compose([*prior, Mechanism(sigma, 0.1, 50)], 1e-5).epsilon <= 4.0
    assert sigma > calibrate(4.0, 1e-5, 0.1, 50)


def test_no_noise_fits_into_a_budget_that_is_gone() -> None:
    prior = [Mechanism(1.0, 0.5, 100)]
    with pytest.raises(PrivacyError, match="No noise multiplier"):
        calibrate(compose(prior, 1e-5).epsilon * 0.9, 1e-5, 0.1, 50, prior)


@pytest.mark.parametrize("prior", [(), (Mechanism(2.0, 0.1, 60),)])
def test_as_many_steps_as_fit_and_not_one_more(prior: tuple[Mechanism, ...]) -> None:
    steps = max_steps(5.0, 1e-5, 1.0, 0.1, prior, at_most=60)
    assert compose([*prior, Mechanism(1.0, 0.1, steps)], 1e-5).epsilon <= 5.0
    assert compose([*prior, Mechanism(1.0, 0.1, steps + 1)], 1e-5).epsilon > 5.0


def test_no_step_may_fit_and_more_are_never_given_than_asked_for() -> None:
    assert max_steps(0.5, 1e-5, 0.5, 1.0, at_most=50) == 0
    assert max_steps(1e3, 1e-5, 2.0, 0.1, at_most=7) == 7


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(0.0, 0.1, 1), (-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1)],
)
def test_a_mechanism_that_cannot_be_is_refused(sigma: float, rate: float, steps: int) -> None:
    with pytest.raises(PrivacyError):
        Mechanism(sigma, rate, steps)


def gaussian(sigma: float, steps: int, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism without sampling, from its privacy profile in closed form."""
    mu = math.sqrt(steps) / sigma

    def over(epsilon: float) -> float:
        above, below = norm.cdf(-epsilon / mu + mu / 2), norm.logcdf(-epsilon / mu - mu / 2)
        return float(above - math.exp(epsilon + below) - delta)

    return float(brentq(over, 1e-9, 500))


@pytest.mark.parametrize("delta", [1e-5, 2e-10])
@pytest.mark.parametrize(
    ("sigma", "steps"), [(5.0, 1), (30.0, 400), (500.0, 200_000), (1000.0, 10**6), (5000.0, 10**6), (16000.0, 10**7)]
)
def test_no_number_of_steps_makes_the_bound_understate(sigma: float, steps: int, delta: float) -> None:
    exact = gaussian(sigma, steps, delta)
    spent = composed_epsilon([Mechanism(sigma, 1.0, steps)], delta)
    assert exact <= spent <= exact * 1.005


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(30.0, 0.01, 200_003), (1.0, 0.001, 300_000)])
def test_two_stages_of_composition_give_what_one_gives(sigma: float, rate: float, steps: int) -> None:
    mechanism = Mechanism(sigma, rate, steps)
    accounted = compose([mechanism], 1e-6)
    assert accounted.epsilon == pytest.approx(direct([mechanism], 1e-6, accounted.grid), rel=1e-6)


def test_very_many_steps_of_next_to_no_loss_are_counted_on_the_fine_grid() -> None:
    mechanism = Mechanism(45.0, 0.01, 10**6)
    accounted = compose([mechanism], 1e-5)
    assert accounted.grid == loss_distributions.FINE_GRID
    assert accounted.epsilon == pytest.approx(direct([mechanism], 1e-5, loss_distributions.FINE_GRID), rel=1e-6)
    assert accounted.epsilon < 0.99 * direct([mechanism], 1e-5, loss_distributions.GRID)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0])
@pytest.mark.parametrize(
    ("rate", "steps"), [(0.001, 1000), (0.01, 100_000), (0.05, 10_000), (0.2, 100), (0.2, 100_000)]
)
def test_calibrated_noise_spends_the_budget_and_not_more_by_dp_accountings_own_count(
    epsilon: float, rate: float, steps: int
) -> None:
    sigma = calibrate(epsilon, 1e-5, rate, steps)
    assert 0.998 * epsilon <= direct([Mechanism(sigma, rate, steps)], 1e-5) <= epsilon


def test_a_million_steps_waste_no_budget() -> None:
    sigma = calibrate(1.0, 1e-5, 0.01, 10**6)
    assert 0.998 <= direct([Mechanism(sigma, 0.01, 10**6)], 1e-5, 1e-5) <= 1.0


def test_a_small_rest_of_a_budget_is_found_and_used() -> None:
    prior = [Mechanism(2.0, 0.1, 200)]
    before = composed_epsilon(prior, 1e-5)
    sigma = calibrate(before * 1.01, 1e-5, 0.1, 50, prior)
    spent = composed_epsilon([*prior, Mechanism(sigma, 0.1, 50)], 1e-5)
    assert before * 1.008 <= spent <= before * 1.01


def test_what_cannot_be_counted_in_reasonable_time_is_refused_in_a_sentence() -> None:
    begun = time.process_time()
    with pytest.raises(PrivacyError, match="protects nobody") as refused:
        compose([Mechanism(0.2, 0.9, 10**6)], 1e-5)
    assert refused.value.reason == "too-dear"
    assert "more noise" in refused.value.next_step
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize(
    ("epsilon", "sigma", "rate", "prior"),
    [
        (8.0, 1.1, 0.01, ()),
        (1.0, 4.0, 0.01, ()),
        (4.0, 2.0, 0.2, (Mechanism(2.0, 0.2, 6),)),
        (2.0, 1.5, 0.1, (Mechanism(3.0, 0.1, 40), Mechanism(2.0, 0.05, 10))),
        (0.3, 30.0, 0.2, ()),
    ],
)
def test_the_steps_that_fit_are_found_from_below(
    epsilon: float, sigma: float, rate: float, prior: tuple[Mechanism, ...]
) -> None:
    steps = max_steps(epsilon, 1e-5, sigma, rate, prior, at_most=10**6)
    assert 1 < steps < 10**6
    assert direct([*prior, Mechanism(sigma, rate, steps)], 1e-5) <= epsilon
    assert direct([*prior, Mechanism(sigma, rate, steps + 1)], 1e-5) > epsilon


def test_steps_that_cost_far_too_much_are_told_quickly() -> None:
    begun = time.process_time()
    assert max_steps(4.0, 1e-5, 0.2, 0.9, at_most=10**6) == 0
    assert max_steps(4.0, 1e-5, 500.0, 0.001, at_most=10**6) == 10**6
    assert time.process_time() - begun < 15


@pytest.mark.parametrize(("rate", "steps"), [(0.001, 100), (0.001, 100_000), (0.2, 100), (0.2, 100_000), (0.01, 10**7)])
def test_planning_takes_seconds_whatever_the_settings(rate: float, steps: int) -> None:
    compose([Mechanism(1.0, 0.1, 2)], 1e-5)  # imports
    begun = time.process_time()
    sigma = calibrate(3.0, 1e-5, rate, steps)
    compose([Mechanism(sigma, rate, steps)], 1e-5)
    if steps <= 100_000:
        epsilon_curve(Mechanism(sigma, rate, steps), 1e-5)
    assert time.process_time() - begun < 6  # twice what it takes on a quiet machine, and more


@pytest.mark.parametrize(("rate", "steps"), [(0.073, 200), (0.001, 100_000)])
def test_planning_a_usual_run_and_a_very_long_one_takes_seconds(rate: float, steps: int) -> None:
    compose([Mechanism(1.0, 0.1, 2)], 1e-5)
    started = time.process_time()
    sigma = calibrate(8.0, 1e-5, rate, steps)
    compose([Mechanism(sigma, rate, steps)], 1e-5)
    epsilon_curve(Mechanism(sigma, rate, steps), 1e-5)
    assert time.process_time() - started < 6
