"""Labels through randomised response: the channel, the charge, and what ties a noisy row to its release."""

from __future__ import annotations

import gzip
import json
import math
import multiprocessing
import random
from decimal import Decimal, getcontext
from typing import Any
from unittest.mock import patch

import pytest
from support.processes import startable
from support.tiny import synthetic_pairs
from support.trails import events

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, DataError, PrivacyError
from rlhf_audit_nb.events import (
    BudgetSet,
    LabelsReleased,
    PrivacyReserved,
    decode_private,
    encode_body,
)
from rlhf_audit_nb.privacy import label_release as module
from rlhf_audit_nb.privacy.label_release import Opened, heaviest_label, open_releases, release_labels, release_owner
from rlhf_audit_nb.privacy.labels import (
    CHECK_COLUMN,
    MAX_LABEL_EPSILON,
    RELEASE_COLUMN,
    LabelRows,
    check_value,
    draw,
    flip_chance,
    read_labels,
    row_tags,
)
from rlhf_audit_nb.privacy.replay import ReplaySeeds, start_replay
from rlhf_audit_nb.privacy.reservation import read_ledger, set_budget
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.erasure import erase

KEY = bytes(range(32))
SEED = bytes(range(1, 33))


def rows_of(records: list[dict[str, Any]], **more: Any) -> LabelRows:
    return read_labels({name: [one[name] for one in records] for name in records[0]}, **more)


def pairs(first: int, last: int) -> LabelRows:
    """Rows ``first`` to ``last`` of an endless table, each with texts of its own."""
    return rows_of([
        {"prompt": f"q{at}", "chosen": f"good {at}", "rejected": f"bad {at}"} for at in range(first, last)
    ])  # fmt: skip


def flipped(rows: LabelRows) -> LabelRows:
    return LabelRows(chosen=rows.rejected, rejected=rows.chosen, prompts=rows.prompts, annotators=rows.annotators)


@pytest.fixture
def trail(tmp_path):
    with Trail.open(tmp_path / "audit") as opened:
        yield opened


# --- the channel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-9, 0.01, 0.1, 0.5, 1.0, math.log(3), 2.0, 4.0, 8.0, 12.3456, MAX_LABEL_EPSILON])
def test_what_is_drawn_is_never_less_private_than_epsilon_says(epsilon):
    getcontext().prec = 60
    chance = flip_chance(epsilon)
    assert (chance * 2**53).is_integer()  # a multiple of what uniforms are drawn on, so it is the true chance
    drawn = ((1 - Decimal(chance)) / Decimal(chance)).ln()
    assert drawn <= Decimal(epsilon)
    assert drawn >= Decimal(epsilon) - Decimal("1e-8")
    assert 0 < chance < 0.5


def test_the_share_of_flipped_labels_of_real_data_is_the_flip_probability(ukpconvarg1):
    with gzip.open(ukpconvarg1 / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = rows_of([json.loads(line) for line in lines], keep=["pair_id"])
    assert len(rows) > 50_000
    for epsilon in (0.5, 1.0, 3.0):
        noisy = draw(rows, epsilon, SealedRandom(SEED), release="r", check_key=KEY)
        moved = [new != old for new, old in zip(noisy["chosen"], rows.chosen, strict=True)]
        same = sum(a == b for a, b in zip(rows.chosen, rows.rejected, strict=True))
        chance = 1 / (1 + math.exp(epsilon))
        spread = math.sqrt(chance * (1 - chance) * len(rows))
        assert abs(sum(moved) - chance * (len(rows) - same)) < 6 * spread  # with a fixed seed: no chance in it
        assert noisy["pair_id"] == rows.kept["pair_id"]
        assert noisy["prompt"] == rows.prompts
        assert all(
            {new, other} == {old, second}
            for new, other, old, second in zip(
                noisy["chosen"], noisy["rejected"], rows.chosen, rows.rejected, strict=True
            )
        )


def test_flips_follow_from_the_seed_alone_and_undo_themselves():
    rows = pairs(0, 400)
    noisy = draw(rows, 1.0, SealedRandom(SEED), release="r", check_key=KEY)
    opposite = draw(flipped(rows), 1.0, SealedRandom(SEED), release="r", check_key=KEY)
    assert noisy["chosen"] == opposite["rejected"]
    again = LabelRows(chosen=noisy["chosen"], rejected=noisy["rejected"], prompts=rows.prompts)
    assert draw(again, 1.0, SealedRandom(SEED), release="r", check_key=KEY)["chosen"] == rows.chosen
    other = draw(rows, 1.0, SealedRandom(KEY), release="r", check_key=KEY)
    assert noisy["chosen"] != other["chosen"]
    assert noisy["chosen"] != rows.chosen


def test_a_seed_serves_one_release():
    randomness = SealedRandom(SEED)
    draw(pairs(0, 3), 1.0, randomness, release="r", check_key=KEY)
    with pytest.raises(PrivacyError) as refused:
        draw(pairs(0, 3), 1.0, randomness, release="r", check_key=KEY)
    assert refused.value.reason == "seed-reused"


@pytest.mark.parametrize("epsilon", [0, -1.0, math.nan, math.inf, 15.01, True, "1", None])
def test_an_epsilon_that_protects_nobody_is_refused(epsilon):
    with pytest.raises(PrivacyError) as refused:
        flip_chance(epsilon)
    assert refused.value.reason == "epsilon"


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_stands_beside_a_label_is_left_behind_unless_it_is_asked_for():
    records = [{"prompt": "q", "chosen": "a", "rejected": "b", "annotator_id": "w1", "score": 9, "site": "x"}]
    rows = rows_of(records, keep=["site"])
    assert rows.dropped == ("annotator_id", "score")
    assert rows.columns == ["prompt", "chosen", "rejected", "site", RELEASE_COLUMN, CHECK_COLUMN]
    assert (rows.annotators, rows.most_labels()) == (["w1"], 1)
    assert set(draw(rows, 1.0, SealedRandom(SEED), release="r", check_key=KEY)) == set(rows.columns)


def test_a_choice_between_two_places_becomes_a_pair_and_the_places_are_gone():
    records = [
        {"question": "q", "first": "a", "second": "b", "choice": "L"},
        {"question": "q", "first": "c", "second": "d", "choice": "R"},
    ]
    rows = rows_of(records, names={"prompt": "question"}, words={"L": "first", "R": "second"})
    assert (rows.prompts, rows.chosen, rows.rejected) == (["q", "q"], ["a", "d"], ["b", "c"])
    assert rows_of([{"first": "a", "second": "b", "choice": 1}]).chosen == ["b"]


@pytest.mark.parametrize(
    ("record", "more", "complaint"),
    [
        ({"chosen": "a"}, {}, "has no column 'rejected'"),
        ({"chosen": "a", "rejected": 3}, {}, "row 1: rejected is a int, not text"),
        ({"chosen": "a", "rejected": None}, {}, "row 1: rejected is a NoneType"),
        ({"chosen": "a", "rejected": [{"role": "x", "content": "y"}]}, {}, "one response is text and the other one"),
        ({"chosen": "a", "rejected": "b"}, {"names": {"winner": "chosen"}}, "columns renames 'winner'"),
        ({"chosen": "a", "rejected": "b"}, {"names": {"chosen": "best"}}, "has no column 'best'"),
        ({"chosen": "a", "rejected": "b"}, {"keep": ["chosen"]}, "cannot be kept as it is"),
        ({"first": "a", "second": "b", "choice": "tie"}, {}, "neither the first nor the second"),
        ({"first": "a", "second": "b", "choice": 1.0}, {}, "neither the first nor the second"),
    ],
)
def test_a_row_that_has_no_bit_to_flip_is_named(record, more, complaint):
    with pytest.raises(DataError, match=complaint):
        rows_of([record], **more)


def test_rows_that_repeat_another_one_are_counted_whichever_was_preferred():
    votes = [("a", "b", "w1"), ("b", "a", "w1"), ("a", "b", "w2"), ("c", "d", "w1")]
    records = [{"chosen": one, "rejected": other, "annotator_id": who} for one, other, who in votes]
    assert rows_of(records).repeated() == (1, 2)
    assert rows_of(records, names={"annotator_id": None}).repeated() == (2, 3)


# --- what ties a row to its release ----------------------------------------------------------------------------------


def test_a_check_value_changes_with_everything_that_it_is_over():
    given = [KEY, "release", "prompt", "one", "other"]
    changed = [SEED, "another", "prompt ", "one.", ""]
    values = {check_value(*given)} | {
        check_value(*[new if at == place else old for at, old in enumerate(given)]) for place, new in enumerate(changed)
    }
    swapped = check_value(KEY, "release", "prompt", "other", "one")
    assert len(values | {swapped, check_value(KEY, "release", None, "one", "other")}) == 8
    assert all(len(value) == 32 for value in values)


def test_messages_are_checked_without_the_empty_fields_that_a_table_adds():
    said = [{"role": "user", "content": "hi"}]
    padded = [{"content": "hi", "name": None, "role": "user"}]
    assert check_value(KEY, "r", said, said, said) == check_value(KEY, "r", padded, padded, padded)


def test_a_row_tag_knows_the_texts_and_not_the_label():
    rows = pairs(0, 5)
    assert row_tags(rows, KEY) == row_tags(flipped(rows), KEY)
    assert len(set(row_tags(rows, KEY))) == 5
    assert not set(row_tags(rows, KEY)) & set(row_tags(rows, SEED))
    joined = LabelRows(
        chosen=[f"{p} {c.upper()}\n" for p, c in zip(rows.prompts or [], rows.chosen, strict=True)],
        rejected=[f"{p}{r}" for p, r in zip(rows.prompts or [], rows.rejected, strict=True)],
    )
    assert row_tags(joined, KEY) == row_tags(rows, KEY)
    talk = [[{"role": "assistant", "content": "good 0"}]], [[{"role": "assistant", "content": "bad 0"}]]
    spoken = LabelRows(chosen=talk[0], rejected=talk[1], prompts=[[{"role": "user", "content": "q0"}]])
    assert row_tags(spoken, KEY) == row_tags(pairs(0, 1), KEY)


# --- what a label costs ----------------------------------------------------------------------------------------------


def opened(tags: list[int], key: bytes = KEY) -> Opened:
    return Opened(check_key=KEY, tag_key=key, tags=tuple(bytes([tag]) * 12 for tag in tags))


def test_the_heaviest_label_is_the_one_that_brute_force_finds():
    generator = random.Random(7)
    for _ in range(200):
        releases: list[tuple[float, Opened | None]] = []
        for _ in range(generator.randint(1, 6)):
            tags = generator.sample(range(8), generator.randint(1, 5))
            known = generator.choice([opened(tags), opened(tags), opened(tags), None, opened(tags, SEED)])
            releases.append((generator.uniform(0.1, 3), known))
        releases.append((1.0, opened([0, 1, 2])))
        best = 0.0
        for label in range(8):
            total = 0.0
            for epsilon, known in releases:
                if known is None or known.tag_key != KEY or bytes([label]) * 12 in known.tags:
                    total += epsilon
            best = max(best, total)
        assert math.isclose(sum(heaviest_label(releases)), best)


def test_labels_are_not_released_anew_where_a_run_is_repeated(tmp_path):
    config = PrivacyConfig(epsilon=2.0, unit="label")
    with Trail.open(tmp_path / "scratch", home=tmp_path / "home") as scratch:
        start_replay(scratch, ReplaySeeds("o", []))
        with pytest.raises(PrivacyError, match="each label would pay for them anew"):
            release_labels(scratch, pairs(0, 5), 1.0, config=config)
        assert scratch.reader().size == 2


def test_the_same_labels_again_add_up_and_other_ones_do_not(trail):
    config = PrivacyConfig(epsilon=2.0, unit="label")
    first = release_labels(trail, pairs(0, 5), 1.0, config=config)
    assert (first.event.epsilon_before, first.event.epsilon_total, first.event.composition) == (0.0, 1.0, "sum")
    other = release_labels(trail, pairs(5, 9), 1.5, config=config)
    assert (other.event.epsilon_before, other.event.epsilon_total, other.event.composition) == (1.0, 1.5, "row-tags")
    both = release_labels(trail, pairs(4, 5), 1.0, config=config)
    assert (both.event.epsilon_total, both.event.composition) == (2.0, "row-tags")
    assert both.event.accountants["exact"] == 2.0
    assert 1.9 < float(both.event.accountants["pld"]) <= 2.0
    with pytest.raises(BudgetExceededError, match=r"would cost a label 2\.5 altogether") as refused:
        release_labels(trail, flipped(pairs(7, 12)), 1.0, config=config)
    assert "--unit label --epsilon 2.5" in refused.value.next_step
    ledger = read_ledger(trail.reader())
    assert ([one.labels for one in ledger.releases], ledger.label_total) == ([5, 4, 1], 2.0)
    assert (ledger.unit, ledger.mechanisms("label")) == ("label", ())


def test_ten_times_a_tenth_is_a_budget_of_one(trail):
    config = PrivacyConfig(epsilon=1.0, unit="label")
    for _ in range(10):
        release_labels(trail, pairs(0, 2), 0.1, config=config)
    with pytest.raises(BudgetExceededError):
        release_labels(trail, pairs(0, 2), 0.1, config=config)


def test_a_release_whose_tags_are_gone_counts_for_every_label(trail):
    config = PrivacyConfig(epsilon=1.9, unit="label")
    first = release_labels(trail, pairs(0, 5), 1.0, config=config)
    erase(trail, release_owner(first.event.release), reason="retention")
    assert open_releases(trail)[1] == (None,)
    with pytest.raises(BudgetExceededError):
        release_labels(trail, pairs(5, 9), 1.0, config=config)
    assert release_labels(trail, pairs(5, 9), 0.9, config=config).event.composition == "sum"


def test_what_was_proved_before_an_erasure_stays_proved(trail):
    config = PrivacyConfig(epsilon=2.0, unit="label")
    released = [release_labels(trail, pairs(5 * at, 5 * at + 5), 1.0, config=config) for at in range(3)]
    for one in released[1:]:
        erase(trail, release_owner(one.event.release), reason="retention")
    last = release_labels(trail, pairs(50, 51), 1.0, config=config)
    assert (last.event.epsilon_before, last.event.epsilon_total) == (1.0, 2.0)  # and not 3


def test_a_release_is_refused_before_a_row_is_looked_at(trail):
    class Untouchable:
        def __len__(self) -> int:
            raise AssertionError("the data was touched")

        texts = columns = __len__

    config = PrivacyConfig(epsilon=0.5, unit="label")
    with pytest.raises(BudgetExceededError):
        release_labels(trail, Untouchable(), 1.0, config=config)  # type: ignore[arg-type]
    assert trail.reader().size == 1


def test_without_a_budget_a_label_is_released_once(trail):
    release_labels(trail, pairs(0, 2), 1.0)
    with pytest.raises(BudgetExceededError, match="of a budget of 1 for each label"):
        release_labels(trail, pairs(0, 2), 0.5)
    set_budget(trail, 1.5, reason="a second look", by="A. Keeper", unit="label")
    assert release_labels(trail, pairs(0, 2), 0.5).event.epsilon_budget == 1.5
    with pytest.raises(BudgetExceededError, match="asks for a budget of epsilon 3"):
        release_labels(trail, pairs(2, 3), 1.0, config=PrivacyConfig(epsilon=3.0, unit="label"))


def test_a_trail_counts_labels_or_something_else_and_never_both(tmp_path):
    with Trail.open(tmp_path / "annotators") as trail:
        set_budget(trail, 1.0, reason="study", by="A. Keeper", unit="annotator")
        with pytest.raises(PrivacyError, match="keeps the privacy budget of annotators") as refused:
            release_labels(trail, pairs(0, 2), 1.0)
        assert refused.value.reason == "mixed-units"
    with Trail.open(tmp_path / "labels") as trail:
        release_labels(trail, pairs(0, 2), 1.0)
        with pytest.raises(PrivacyError, match="keeps the privacy budget of labels") as refused:
            read_ledger(trail.reader()).mechanisms("annotator", "annotator_id")
        assert refused.value.reason == "mixed-units"
        with pytest.raises(PrivacyError) as refused:
            set_budget(trail, 1.0, reason="study", by="A. Keeper", unit="pair")
        assert refused.value.reason == "mixed-units"
        forged = BudgetSet(unit="annotator", epsilon=1.0, delta=1e-5, reason="r", by="b")
        trail.append(forged.TYPE, encode_body(forged)).wait()
        with pytest.raises(PrivacyError, match="budgets for annotators and for labels"):
            read_ledger(trail.reader())
    with pytest.raises(PrivacyError, match="This configuration counts annotators"):
        release_labels(trail, pairs(0, 2), 1.0, config=PrivacyConfig(epsilon=1.0))


@pytest.mark.parametrize("stated", [0.5, 1.5, 3.5])
def test_a_total_that_cannot_be_is_found_when_the_ledger_is_read(trail, stated):
    import msgspec

    done = release_labels(trail, pairs(0, 2), 2.0)
    forged = msgspec.structs.replace(
        done.event, release="f" * 32, epsilon=1.0, epsilon_before=2.0, epsilon_total=stated
    )
    trail.append(LabelsReleased.TYPE, encode_body(forged)).wait()
    with pytest.raises(PrivacyError, match="does not add up") as refused:
        read_ledger(trail.reader())
    assert refused.value.reason == "ledger"


def test_a_release_that_another_one_overtakes_is_worked_out_anew(trail):
    config = PrivacyConfig(epsilon=2.0, unit="label")
    release_labels(trail, pairs(0, 5), 1.0, config=config)
    look, overtaken = module.open_releases, []

    def slow(trail: Trail) -> Any:
        found = look(trail)
        if not overtaken:
            overtaken.append(True)
            release_labels(trail, pairs(0, 5), 0.5, config=config)
        return found

    with patch.object(module, "open_releases", slow):
        done = release_labels(trail, pairs(0, 5), 0.5, config=config)
    assert (done.event.epsilon_before, done.event.epsilon_total) == (1.5, 2.0)


def test_a_check_outside_of_the_append_is_found_when_the_ledger_is_read(trail):
    """The planted fault: the ledger is looked at, another release is charged, and then the entry is appended."""
    config = PrivacyConfig(epsilon=1.0, unit="label")
    append, overtaken = Trail.append_guarded, []

    def faulty(self: Trail, kind: str, body_fn: Any, **given: Any) -> Any:
        body = body_fn(self.reader())
        if not overtaken:
            overtaken.append(True)
            release_labels(self, pairs(0, 5), 1.0, config=config)
        return append(self, kind, lambda _reader: body, **given)

    with patch.object(Trail, "append_guarded", faulty):
        release_labels(trail, pairs(0, 5), 1.0, config=config)
    assert len(events(trail, LabelsReleased)) == 2
    with pytest.raises(PrivacyError, match="does not add up"):
        read_ledger(trail.reader())


def _race(folder: str, start: Any, answers: Any) -> None:
    start.wait(60)
    with Trail.open(folder) as trail:
        try:
            release_labels(trail, pairs(0, 3), 1.0, config=PrivacyConfig(epsilon=3.0, unit="label"))
        except BudgetExceededError:
            answers.put("refused")
        else:
            answers.put("got it")


@pytest.mark.slow
def test_of_eight_processes_that_race_for_a_budget_of_three_exactly_three_release(tmp_path):
    context = multiprocessing.get_context("forkserver")
    for number in range(3):
        folder = tmp_path / str(number)
        Trail.open(folder).close()
        start, answers = context.Barrier(8), context.Queue()
        processes = [context.Process(target=_race, args=(str(folder), start, answers)) for _ in range(8)]
        for process in processes:
            with startable():
                process.start()
        said = sorted(answers.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(30)
        assert said == ["got it"] * 3 + ["refused"] * 5
        with Trail.open(folder) as trail:
            assert read_ledger(trail.reader()).label_total == 3.0


# --- what the trail holds --------------------------------------------------------------------------------------------


def half_of(trail: Trail) -> Any:
    (entry,) = trail.reader().entries(type=LabelsReleased.TYPE)
    payload = trail.vault.half(entry).payload
    return decode_private(entry.type, payload)


def test_the_charge_is_in_the_trail_before_anything_is_drawn(trail):
    with (
        patch.object(module, "draw", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        release_labels(trail, pairs(0, 3), 1.0)
    (event,) = events(trail, LabelsReleased)
    assert (event.labels, event.epsilon, event.flip_probability) == (3, 1.0, flip_chance(1.0))
    assert event.not_protected[:2] == ["the texts", "who annotated, and how much"]
    assert read_ledger(trail.reader()).label_total == 1.0


def test_with_the_seed_from_the_vault_an_auditor_gets_the_same_rows(trail):
    rows = pairs(0, 60)
    done = release_labels(trail, rows, 1.0, original="ab" * 32)
    half = half_of(trail)
    again = draw(
        rows,
        done.event.epsilon,
        SealedRandom(bytes.fromhex(half.seed)),
        release=done.event.release,
        check_key=bytes.fromhex(half.check_key),
    )
    assert again == done.rows
    assert half.original == "ab" * 32


def test_where_the_original_goes_neither_seed_nor_digest_is_ever_written(trail, tmp_path):
    drawn: list[bytes] = []
    system = SealedRandom.from_system

    def watched() -> SealedRandom:
        made = system()
        drawn.append(made.seed)
        return made

    with patch.object(SealedRandom, "from_system", watched):
        done = release_labels(trail, pairs(0, 3), 1.0, keep_seed=False, original="ab" * 32)
    half = half_of(trail)
    assert (half.seed, half.original, done.event.originals) == (None, None, "to be destroyed")
    trail.close()
    (seed,) = drawn
    for path in sorted((tmp_path / "audit").rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            assert seed not in data
            assert seed.hex().encode() not in data


def test_the_public_side_is_the_same_whatever_the_labels_were(tmp_path):
    """The canary: all labels turned round, all randomness the same; only the noisy rows may differ."""
    public = []
    for number, rows in enumerate((pairs(0, 40), flipped(pairs(0, 40)))):
        with (
            Trail.open(tmp_path / str(number), origin=f"example.com/{number}") as trail,
            patch.object(module, "new_key", return_value=KEY),
            patch.object(module.uuid, "uuid4") as named,
            patch.object(SealedRandom, "from_system", lambda: SealedRandom(SEED)),
        ):
            named.return_value.hex = "0" * 32
            release_labels(trail, rows, 1.0, original=str(number) * 64)
            entries = list(trail.reader().entries(1))
            assert all(
                b"good " not in entry.data and b"bad " not in entry.data for entry in entries
            )  # no id has a space
            public.append([entry.body for entry in entries])
    assert public[0] == public[1]
    assert len(public[0]) == 1


def test_a_reservation_on_a_trail_of_labels_makes_the_ledger_speak_up(trail):
    release_labels(trail, pairs(0, 2), 1.0)
    fields: dict[str, Any] = dict.fromkeys(("mechanism", "engine", "generator", "adjacency"), "x")
    counts = dict.fromkeys(("units", "steps", "steps_asked", "max_pairs_per_unit"), 1)
    numbers = dict.fromkeys(("clipping_norm", "noise_multiplier", "epsilon_budget", "epsilon_before", "epsilon_planned"), 1.0)  # fmt: skip  # noqa: E501
    forged = PrivacyReserved(
        reservation="r", unit="pair", sampling_rate=0.5, delta=1e-5, accountants={}, **fields, **counts, **numbers
    )
    trail.append(forged.TYPE, encode_body(forged)).wait()
    with pytest.raises(PrivacyError, match="budgets for labels and for pairs"):
        read_ledger(trail.reader())


def test_every_release_of_synthetic_people_has_the_rows_it_says():
    records = synthetic_pairs(4, 3)
    rows = rows_of(records)
    assert (len(rows), rows.most_labels(), rows.repeated()) == (12, 3, (0, 1))
    drawn = [draw(rows, 0.1, SealedRandom(bytes([at]) * 32), release="r", check_key=KEY)["chosen"] for at in range(64)]
    # Over many seeds every row is flipped sometimes and kept sometimes: nothing is fixed by place.
    assert all(0 < sum(one[at] != rows.chosen[at] for one in drawn) < 64 for at in range(12))
