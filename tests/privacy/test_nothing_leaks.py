"""Two data sets that differ in one annotator: whoever reads the public side cannot tell them apart.

Each job trains inside ``%%audit_train`` in a process of its own (`support.leaks`, which also says what is held still),
and everything that it leaves is compared byte for byte: what was printed, logged at level DEBUG and displayed, the
panel's states, what the trainer saved, the trail, its published form, reports, cards, and what the commands say. The
canary's contribution is taken away where the mechanism adds it up, so that even the weights must agree.

Each leak of a list of planted ones is caught by the same comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.leaks import CANARY, LINE, LeakLab, differences
from support.tiny import synthetic_pairs

OWNER = f"person-{CANARY}"
RARE = "XYZZYZEBRA"

Rows = list[dict[str, Any]]

PLAIN: Rows = [{"prompt": "Question?", "chosen": " yes", "rejected": " no", "annotator_id": OWNER}]
CANARIES: dict[str, Rows] = {
    "with rare words and many rows": [
        {"prompt": f"{RARE}?", "chosen": " qoph" * n, "rejected": " \u2603" * (3 * n), "annotator_id": OWNER}
        for n in range(1, 12)
    ],
    "with the opposite labels": [{"prompt": "Question?", "chosen": " no", "rejected": " yes", "annotator_id": OWNER}],
    "with very long answers": [{"prompt": "Q", "chosen": "w" * 5000, "rejected": "zz " * 900, "annotator_id": OWNER}],
    "all of whose rows the trainer drops": [
        {"prompt": "p " * 900, "chosen": "p " * 900, "rejected": "p " * 900, "annotator_id": OWNER}
    ],
    "with empty answers": [{"prompt": "Question?", "chosen": "", "rejected": "", "annotator_id": OWNER}],
}
FEW = ("with rare words and many rows", "all of whose rows the trainer drops")
OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in CANARIES if kind not in FEW]
LEAKS = (
    "a loss in the log",
    "a batch size in an entry",
    "a count on the progress bar",
    "a number in a folder's name",
    "a debug message",
    "a warning",
    "a series on the panel",
    "exact times",
)


def with_canary(rows: Rows) -> Rows:
    """Eight annotators, of whom the canary has ``rows``."""
    everybody = [{**row, "margin": 0.0} for row in synthetic_pairs(8, 2)]
    first = next(place for place, row in enumerate(everybody) if row["annotator_id"] == OWNER)
    hers = [{"margin": 0.0, **row} for row in rows]
    return [*everybody[:first], *hers, *(row for row in everybody[first:] if row["annotator_id"] != OWNER)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LeakLab]:
    with LeakLab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def without(lab: LeakLab) -> Any:
    """What a job with a canary like everybody leaves; made once for each setting."""
    made: dict[str, dict[str, bytes]] = {}

    def seen(**job: Any) -> dict[str, bytes]:
        key = repr(sorted(job.items()))
        if key not in made:
            made[key] = lab.seen(with_canary(PLAIN), **job)
        return made[key]

    return seen


def same(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    found = differences(first, second)
    assert not found, "\n".join(found)
    assert not [path for path, content in second.items() if RARE.encode() in content]


@pytest.mark.parametrize(
    "kind", [*FEW, *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(CANARIES.keys() - set(FEW)))]
)
def test_nobody_can_tell_a_canary_in_dpo(lab: LeakLab, without: Any, kind: str) -> None:
    same(without(trainer="dpo"), lab.seen(with_canary(CANARIES[kind]), trainer="dpo", speed=1.7))


@pytest.mark.parametrize("trainer", ["reward", pytest.param("dpo", marks=pytest.mark.slow)])
def test_nor_with_canaries_of_the_mechanism_in_the_training(lab: LeakLab, without: Any, trainer: str) -> None:
    """What they show is told in the open: an entry, the panel; it follows from what was released."""
    kind = "with rare words and many rows"
    job = {"trainer": trainer, "line": f"{LINE} --canaries 200"}
    first = without(**job)
    same(first, lab.seen(with_canary(CANARIES[kind]), speed=1.7, **job))
    assert [path for path, content in first.items() if b"privacy.audited" in content]
    assert b"200 canaries show" in first["seen/displays.json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CANARIES)
@pytest.mark.parametrize("trainer", ["reward", "sft", "kto"])
def test_nor_in_other_trainers(lab: LeakLab, without: Any, trainer: str, kind: str) -> None:
    same(without(trainer=trainer), lab.seen(with_canary(CANARIES[kind]), trainer=trainer, speed=1.7))


@pytest.mark.slow
def test_nor_in_reports_cards_and_published_tiles(lab: LeakLab, without: Any) -> None:
    kind = "with rare words and many rows"
    first, second = (
        without(trainer="dpo", full=True),
        lab.seen(with_canary(CANARIES[kind]), trainer="dpo", full=True, speed=1.7),
    )
    same(first, second)
    assert {"told/report.html", "told/report.pdf", "told/report.json", "told/huggingface.md"} <= first.keys()
    assert any(path.startswith("told/tiles/tile/") for path in first)


@pytest.mark.slow
def test_nor_with_pairs_for_units(lab: LeakLab, without: Any) -> None:
    """Here the canary is one pair among fifteen."""
    kind = "all of whose rows the trainer drops"
    job = {"trainer": "reward", "line": f"{LINE} --unit pair", "canary": 6}
    same(without(**job), lab.seen(with_canary(CANARIES[kind]), speed=1.7, **job))


@pytest.mark.slow
def test_a_canary_whose_loss_is_no_number_is_not_noticed(lab: LeakLab, without: Any) -> None:
    spoilt = with_canary([{**PLAIN[0], "margin": float("nan")}])
    same(without(trainer="reward"), lab.seen(spoilt, trainer="reward", speed=1.7))


@pytest.mark.parametrize("trainer", ["dpo", pytest.param("reward", marks=pytest.mark.slow)])
def test_a_canary_whose_rows_cannot_be_computed_with_is_not_noticed(lab: LeakLab, without: Any, trainer: str) -> None:
    same(without(trainer=trainer), lab.seen(with_canary(PLAIN), trainer=trainer, breaks=True, speed=1.7))


def test_rows_that_a_trainer_cannot_be_built_with_are_not_quoted(lab: LeakLab) -> None:
    """Both jobs fail, which can be seen; by whose text, or with what in it, cannot."""
    texts = ("maybe", f"{RARE} " * 7)
    first, second = (
        lab.seen(with_canary([{**PLAIN[0], "margin": text}]), trainer="reward", fails=True, speed=speed)
        for text, speed in zip(texts, (1.0, 1.7), strict=True)
    )
    same(first, second)
    assert b"A library could not handle the data (Arrow" in first["seen/stdout.txt"]


@pytest.mark.parametrize("leak", [LEAKS[0], *(pytest.param(leak, marks=pytest.mark.slow) for leak in LEAKS[1:])])
def test_the_comparison_notices(lab: LeakLab, leak: str) -> None:
    rows = with_canary(CANARIES["with rare words and many rows"])
    first = lab.seen(with_canary(PLAIN), trainer="dpo", plant=leak)
    assert differences(first, lab.seen(rows, trainer="dpo", plant=leak, speed=1.7))


def test_without_the_cut_only_what_follows_from_the_mechanism_differs(lab: LeakLab) -> None:
    """And it does differ: the canary takes part in what is compared above."""
    rows = with_canary(CANARIES["with rare words and many rows"])
    first, second = (lab.seen(data, trainer="dpo", cut=False) for data in (with_canary(PLAIN), rows))
    assert first["out/checkpoint-4/adapter_model.safetensors"] != second["out/checkpoint-4/adapter_model.safetensors"]
    # A list of tensors is named by the weights' digest, which differs as the weights do.
    names = [sorted("tensors" if path.endswith(".tensors") else path for path in seen) for seen in (first, second)]
    assert names[0] == names[1]
    for path in (
        "out/checkpoint-4/scheduler.pt",
        "out/checkpoint-4/rng_state.pth",
        "out/checkpoint-4/training_args.bin",
    ):
        assert first[path] == second[path], path
    assert not [path for path, content in second.items() if RARE.encode() in content]
