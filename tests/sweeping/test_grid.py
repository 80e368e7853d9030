"""A grid: what it says is what runs, and what it does not say clearly is refused before anything does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rlhf_audit_nb.errors import AuditError, ConfigError
from rlhf_audit_nb.privacy.accountant import Guarantee, Mechanism
from rlhf_audit_nb.sweeping.grid import Grid, read_grid


def read(source: Path, tmp_path: Path, text: str) -> Grid:
    path = tmp_path / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return read_grid(path, source)


def test_a_product_has_every_combination_in_its_order_and_ids_that_follow_from_the_parameters(
    source: Path, tmp_path: Path
) -> None:
    grid = read(
        source,
        tmp_path,
        "parameters:\n  x: [1, 2]\n  lr: [1e-3, 1, 0.5]\nexclude:\n  - {x: 2, lr: 0.5}\ninclude:\n  - {x: 9}\n",
    )
    found = [point.parameters for point in grid.points]
    assert found == [
        {"x": 1, "lr": 1e-3},
        {"x": 1, "lr": 1.0},
        {"x": 1, "lr": 0.5},
        {"x": 2, "lr": 1e-3},
        {"x": 2, "lr": 1.0},
        {"x": 9},
    ]
    assert all(isinstance(values.get("lr", 0.0), float) for values in found), "the notebook's lr is a float"
    # By hand: RFC 8785 of these is what json.dumps writes, sorted and without spaces.
    by_hand = hashlib.sha256(json.dumps({"lr": 0.5, "x": 1}, separators=(",", ":")).encode()).hexdigest()[:16]
    assert grid.points[2].id == by_hand
    other = read(source, tmp_path, "runs:\n  - {x: 9}\n  - {lr: 0.5, x: 1}\n")
    assert [point.id for point in other.points] == [grid.points[5].id, by_hand]
    assert other.digest != grid.digest
    assert grid.privacy is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "its top level is nothing"),
        ("- 1", "its top level is a list"),
        ("parameters:\n  x: [", "is not YAML at line 2: "),
        ("parameters:\n  x: [1]\n  x: [2]", "'x' stands twice"),
        ("parameter:\n  x: [1]", "has a key 'parameter'"),
        ("parameters:\n  x: 1", "has a number in the place of a list"),
        ("parameters:\n  x: []", "has an empty list in the place of a list"),
        ("parameters: {}", "has no run"),
        ("runs: []", "has no run"),
        ("runs: [1]", "'runs' is not a list of parameters"),
        ("runs:\n  - {x: 1}\nparameters:\n  x: [1]", "both 'runs' and 'parameters'"),
        ("runs:\n  - {x: 1}\n  - {lr: 1}\n  - {x: 1}", "Run 3 of 3 is the same"),
        ("runs:\n  - {lr: 1}\n  - {lr: 1.0}", "Run 2 of 2 is the same"),
        ("runs:\n  - {x: 1}\n  - {y: 1}", "Run 2 of 2: The notebook has no parameter 'y'"),
        ("runs:\n  - {x: 1.5}", "Run 1 of 1: Parameter 'x' is 1.5; the notebook takes int"),
        ("runs:\n  - {lr: .inf}", "Run 1 of 1: Parameter 'lr' is inf, which a record cannot hold"),
        ("parameters:\n  x: [1]\nexclude:\n  - {x: 2}", "which no combination has"),
        (f"parameters:\n  x: {list(range(1001))}", "has 1,001 runs; one sweep takes at most 1,000"),
        (f"parameters:\n  x: {list(range(400))}\n  lr: {list(range(400))}", "has 160,000 combinations"),
        ("parameters:\n  0: [1]", "has a number in the place of a name"),
        ("parameters:\n  ? [1]\n  : [1]", "is not YAML"),
        ("parameters:\n  x: [!!timestamp soon]", "is not YAML"),
        ("parameters: " + "[" * 3000, "is not YAML"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: 1, delta: 1" + "0" * 400 + "}", "whole number of over 300 digits"),
        ("runs:\n  - {x: 0x" + "f" * 5000 + "}", "whole number of over 300 digits"),
        ("runs: &a [*a]", "'runs' is not a list of parameters"),
        ("runs:\n  - {x: 1}\nprivacy: 3", "'privacy' is a number"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: 1}", "says no each"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilom: 1}", "a key 'epsilom'"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: 1, unit: label, each: {epsilon: 1}}", "'unit' is 'label'"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: -1, each: {epsilon: 1}}", "epsilon is -1"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: 1, each: {epsilon: 0}}", "cannot be accounted for"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: 1, each: {epsilon: 1, steps: 3}}", "a key 'steps'"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: 1, each: {noise_multiplier: 1}}", "says no sampling_rate"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: 1, each: {epsilon: true}}", "'epsilon' under 'each' is True"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: 1, each: {epsilon: {parameter: y}}}", "names the parameter 'y'"),
        ("runs:\n  - {x: 1}\nprivacy: {epsilon: 1, unit: pair, column: a, each: {epsilon: 1}}", "'column' is given"),
    ],
)  # fmt: skip
def test_what_a_grid_does_not_say_clearly_is_refused(source: Path, tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(AuditError) as refused:
        read(source, tmp_path, text)
    assert said in refused.value.message
    assert refused.value.next_step


def test_a_grid_that_is_not_there_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grid\.yaml cannot be read"):
        read_grid(tmp_path / "grid.yaml", source)


def test_what_each_run_may_spend_follows_from_the_grid_and_its_parameters(source: Path, tmp_path: Path) -> None:
    runs = "runs:\n  - {x: 1, lr: 0.5}\n  - {x: 2}\n"
    promised = read(source, tmp_path, runs + "privacy: {epsilon: 8, delta: 1e-5, each: {epsilon: {parameter: lr}}}")
    assert promised.privacy is not None
    assert list(promised.privacy.each.values()) == [Guarantee(0.5, 2.5e-6), Guarantee(0.1, 2.5e-6)]
    assert (promised.privacy.config.unit_column, promised.privacy.config.delta) == ("annotator_id", 1e-5)

    text = "each: {noise_multiplier: {parameter: x}, sampling_rate: 0.1, steps: 20, loss_noise: null}}"
    known = read(source, tmp_path, runs + f"privacy: {{epsilon: 8, unit: pair, {text}")
    assert known.privacy is not None
    assert list(known.privacy.each.values()) == [Mechanism(1.0, 0.1, 20), Mechanism(2.0, 0.1, 20)]
    usual = read(source, tmp_path, runs + f"privacy: {{epsilon: 8, {text}".replace(", loss_noise: null", ""))
    assert usual.privacy is not None
    first = next(iter(usual.privacy.each.values()))
    # A live loss is released beside the gradient unless the grid says otherwise, as in a PrivacyConfig.
    assert isinstance(first, Mechanism)
    assert first.noise_multiplier == pytest.approx(1 / (1 + 0.01) ** 0.5)
