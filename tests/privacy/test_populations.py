"""Populations: rosters are compared by keyed tags, and what is not proven disjoint is composed."""

from __future__ import annotations

import itertools
import os
import uuid
from base64 import b64decode
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from support.racing import DELTA, ONE

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, PrivacyError
from rlhf_audit_nb.events import (
    PopulationKey,
    PopulationRoster,
    PrivacyPopulation,
    PrivacyReserved,
    decode_body,
    encode_body,
    encode_private,
)
from rlhf_audit_nb.privacy import populations as module
from rlhf_audit_nb.privacy.accountant import composed_epsilon
from rlhf_audit_nb.privacy.plan import Plan, plan_units
from rlhf_audit_nb.privacy.populations import (
    Population,
    Registry,
    Roster,
    VaultAt,
    canonical,
    check_relations,
    compare_rosters,
    disclosed_population,
    read_registry,
    record_population,
    tags_of,
)
from rlhf_audit_nb.privacy.reservation import read_ledger, reserve
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.units import build_units
from rlhf_audit_nb.trail import Trail, TrailReader, Vault
from rlhf_audit_nb.trail.disclosure import disclose
from rlhf_audit_nb.trail.erasure import erase

ONCE = composed_epsilon([ONE], DELTA)
TWICE = composed_epsilon([ONE, ONE], DELTA)


def people(*names: str) -> Roster:
    return Roster.of(names, len(names))


def crowd(prefix: str, count: int = 20) -> Roster:
    return people(*(f"{prefix}{number}" for number in range(count)))


def shown(trail: Trail) -> Registry:
    return read_registry(trail.reader(), VaultAt.of(trail))


def planned(trail: Trail, roster: Roster, epsilon: float = ONCE * 1.0001) -> Plan:
    config = PrivacyConfig(
        epsilon=epsilon,
        delta=DELTA,
        noise_multiplier=ONE.noise_multiplier,
        sampling_rate=ONE.sampling_rate,
        loss_noise=None,
    )
    names = sorted(roster.names)
    prior = read_ledger(trail.reader(), trail).mechanisms("annotator", "annotator_id", roster)
    units = build_units(names, len(names), "annotator")
    plan = plan_units(config, units, ONE.sampling_rate, ONE.steps, 5, prior)
    return replace(plan, roster=roster)


def taken(trail: Trail, plan: Plan) -> Plan:
    return reserve(trail, plan, SealedRandom(bytes(range(32))), reservation=uuid.uuid4().hex, run=uuid.uuid4().hex)


def totals(trail: Trail, opened: Trail | None) -> list[float]:
    return [group.spent(DELTA)[1] for group in read_ledger(trail.reader(), opened).groups]


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "same",
    [
        (1, "1", 1.0, " 1 ", "01", "1.0", "+1", "１"),
        (1000, 1000.0, "1e3", "1E+03", "1.0e3", "1000.00", "10000e-1"),
        ("w1", "W1", "w-1", "W_1", " w 1", "w01", "w.1", "ｗ１"),
        ("Müller", "müller", "Mu\u0308ller", "MÜLLER"),
        ("straße", "STRASSE"),
        ("j.doe@x.org", "JDoe@x.org"),
    ],
)
def test_ids_that_may_be_one_persons_come_out_the_same(same: tuple[str | float, ...]) -> None:
    assert len({canonical(one) for one in same}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("1", "2"), ("w1", "w11"), ("w1", "v1"), ("10", "1"), (1, 10), ("100", "1"), ("-", "*"), (0, 1), ("1e3", "1e4")],
)
def test_ids_of_two_people_come_out_different(one: str | float, other: str | float) -> None:
    assert canonical(one) != canonical(other)
    assert canonical(one)


def test_a_roster_does_not_show_its_names() -> None:
    roster = people("Ada", "Grace")
    assert roster.units == 2
    assert "ada" not in repr(roster).lower()


def test_tags_are_of_one_key_and_tell_nothing_without_it() -> None:
    one, other = (tags_of(bytes([at]) * 32, {"ada", "grace"}) for at in (1, 2))
    assert one.isdisjoint(other)
    assert {len(tag) for tag in one | other} == {16}
    assert one == tags_of(b"\1" * 32, {"grace", "ada"})
    import hashlib
    import hmac

    expected = hmac.new(b"\1" * 32, b"rlhf-audit/population-tag/v1\0ada", hashlib.sha256).digest()[:16]
    assert expected in one


# --- what is composed with what --------------------------------------------------------------------------------------


def registry(**rosters: set[int] | None) -> Registry:
    def population(name: str, people: set[int] | None, at: int) -> Population:
        tags = None if people is None else frozenset(bytes([one]) for one in people)
        return Population(name, at, len(people or ()), "k", frozenset(), tags, "closed" if tags is None else "open")

    return Registry({name: population(name, who, at) for at, (name, who) in enumerate(rosters.items())})


def test_groups_are_what_a_search_over_all_paths_finds() -> None:
    import random

    draw = random.Random(7)
    for _ in range(300):
        rosters = {
            f"p{at}": {draw.randrange(12) for _ in range(draw.randint(1, 3))} for at in range(draw.randint(1, 6))
        }
        edges = {(a, b) for a in rosters for b in rosters if rosters[a] & rosters[b]}
        near = {a: {b for b in rosters if (a, b) in edges} for a in rosters}
        for _, a in itertools.product(rosters, rosters):
            near[a] = set().union(*(near[b] for b in near[a]))
        expected = {frozenset(found) for found in near.values()}
        groups = registry(**rosters).groups([*rosters, *rosters])  # type: ignore[arg-type]
        assert set(groups) == expected
        assert len(groups) == len(expected)


def test_who_is_not_shown_may_be_anybody() -> None:
    known = registry(a={1}, b={2}, c=None)
    assert known.groups(["a", "b"]) == (frozenset("a"), frozenset("b"))
    assert known.groups(["a", "b", "c"]) == (frozenset("abc"),)
    assert known.groups(["a", None]) == (frozenset({"a", None}),)
    assert known.groups(["a", "never recorded"]) == (frozenset({"a", "never recorded"}),)
    assert known.groups([]) == ()
    assert Registry().groups(["a", "b"]) == (frozenset("ab"),)
    assert not known.can_tell_apart(["a", "b"])  # without the secret nobody can be compared with them


def test_tags_of_two_secrets_prove_nothing() -> None:
    one, other = (
        Population(name, 0, 1, name, frozenset(), frozenset([b"x" if name == "a" else b"y"])) for name in "ab"
    )
    assert compare_rosters(one, other) == "not proven"
    assert Registry({"a": one, "b": other}).groups(["a", "b"]) == (frozenset("ab"),)
    assert compare_rosters(one, replace(other, key_id="a")) == "disjoint"


# --- on a trail ------------------------------------------------------------------------------------------------------


def test_disjoint_annotators_have_a_budget_each_and_the_same_ones_share_it(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        taken(trail, planned(trail, crowd("a")))
        second = taken(trail, planned(trail, crowd("b")))
        assert (second.before, second.steps) == (0.0, ONE.steps)
        with pytest.raises(BudgetExceededError):
            planned(trail, crowd("a"))
        with pytest.raises(BudgetExceededError):
            planned(trail, crowd("B"))  # spelt in another way
        with pytest.raises(BudgetExceededError):
            planned(trail, people("a0", "somebody new"))
        assert totals(trail, trail) == [pytest.approx(ONCE)] * 2
        names = [event.population for event in reservations(trail)]
        assert len(set(names)) == 2
        assert None not in names


def reservations(trail: Trail) -> list[PrivacyReserved]:
    found = [decode_body(entry.type, entry.body) for entry in trail.reader().entries(type=PrivacyReserved.TYPE)]
    return [event for event in found if isinstance(event, PrivacyReserved)]


def test_without_the_vault_nothing_is_proven_and_all_is_composed(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        for prefix in "ab":
            taken(trail, planned(trail, crowd(prefix)))
        assert totals(trail, trail) == [pytest.approx(ONCE)] * 2
        assert totals(trail, None) == [pytest.approx(TWICE)]
        assert read_ledger(trail.reader(), trail).composed(DELTA).epsilon == pytest.approx(ONCE)
        assert read_ledger(trail.reader()).composed(DELTA).epsilon == pytest.approx(TWICE)


def test_a_roster_that_meets_two_populations_counts_what_both_had_and_makes_them_one(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        for prefix in "ab":
            taken(trail, planned(trail, crowd(prefix), 50.0))
        plan = taken(trail, planned(trail, people("a1", "b1"), 50.0))
        assert plan.before == pytest.approx(TWICE)
        assert len(totals(trail, trail)) == 1
        # Who meets one of them now meets all three; who meets none is still alone.
        assert len(planned(trail, people("a7"), 50.0).prior) == 3
        assert planned(trail, crowd("c"), 50.0).prior == ()


def test_an_exhausted_population_is_left_out_of_anothers_plan_and_not_of_its_own(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        taken(trail, planned(trail, crowd("a")))
        ledger = read_ledger(trail.reader(), trail)
        assert ledger.certain("annotator", "annotator_id") == ()
        assert read_ledger(trail.reader()).certain("annotator", "annotator_id") == (ONE,)
        assert ledger.mechanisms("annotator", "annotator_id") == (ONE,)
        assert ledger.mechanisms("annotator", "annotator_id", crowd("b")) == ()


def test_an_older_reservation_that_names_no_population_counts_for_everybody(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        taken(trail, replace(planned(trail, crowd("a"), 50.0), roster=None))
        plan = planned(trail, crowd("b"), 50.0)
        assert plan.prior == (ONE,)
        taken(trail, plan)
        taken(trail, planned(trail, crowd("c"), 50.0))
        ledger = read_ledger(trail.reader(), trail)
        assert len(ledger.groups) == 1
        assert ledger.certain("annotator", "annotator_id") == (ONE,) * 3


def test_one_roster_is_recorded_once(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        first = record_population(trail, crowd("a"))
        assert record_population(trail, crowd("A")) == first
        other = record_population(trail, crowd("b"))
        third = record_population(trail, people("a1", "b1"))
        said = [decode_body(entry.type, entry.body) for entry in trail.reader().entries(type=PrivacyPopulation.TYPE)]
        assert [event.disjoint_from for event in said] == [[], [first], []]  # type: ignore[attr-defined]
        assert len({first, other, third}) == 3
        assert sum(1 for _ in trail.reader().entries(type=PopulationKey.TYPE)) == 1
        found = {(one.one, one.other): one.found for one in check_relations(shown(trail))}
        assert found == {(other, first): "disjoint", (third, first): "shares", (third, other): "shares"}


def test_no_id_and_no_tag_stands_in_the_open(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        roster = people("Ada Lovelace", "Grace Hopper")
        taken(trail, planned(trail, roster))
        known = shown(trail)
        (population,) = known.populations.values()
        assert population.tags is not None
        assert known.key is not None
        secrets = [known.key, *population.tags]
        public = b"".join(entry.data for entry in trail.reader().entries())
        for name in (b"ovelace", b"opper", *(one.hex().encode() for one in secrets), *secrets):
            assert name not in public
    for folder, _, names in os.walk(tmp_path / "audit"):
        for name in names:
            data = (Path(folder) / name).read_bytes()
            assert not [one for one in secrets if one in data or one.hex().encode() in data]


# --- evidence that is gone, or false ---------------------------------------------------------------------------------


def two(trail: Trail) -> None:
    for prefix in "ab":
        taken(trail, planned(trail, crowd(prefix)))


def test_a_roster_whose_opening_was_erased_counts_as_anybodys(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        two(trail)
        entry = next(iter(trail.reader().entries(type=PrivacyPopulation.TYPE)))
        erase(trail, run=entry.stream, reason="request")
        known = shown(trail)
        assert {one.state for one in known.populations.values()} == {"erased"}
        assert {one.found for one in check_relations(known)} == {"not proven"}
        assert totals(trail, trail) == [pytest.approx(TWICE)]
        with pytest.raises(BudgetExceededError):
            planned(trail, crowd("c"))
        # A roster that comes afterwards is made with a new secret; the old ones stay anybody's.
        record_population(trail, crowd("c"))
        assert sum(1 for _ in trail.reader().entries(type=PopulationKey.TYPE)) == 2
        assert len(totals(trail, trail)) == 1


def test_a_vault_that_is_gone_proves_nothing(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        two(trail)
    for file in (tmp_path / "audit").glob("vault.sqlite*"):
        file.unlink()
    with Trail.open(tmp_path / "audit") as trail:
        assert {one.state for one in shown(trail).populations.values()} == {"missing"}
        assert totals(trail, trail) == [pytest.approx(TWICE)]


def forged(
    trail: Trail, roster: Roster, change: Callable[[str, str], tuple[str, str]], units: int | None = None
) -> None:
    """A population entry that the trail's own key signs, and whose private half somebody made up."""
    known = shown(trail)
    assert known.key is not None
    first = next(iter(known.populations.values()))
    tags = "".join(sorted(tag.hex() for tag in tags_of(known.key, roster.names)))
    key_id, tags = change(first.key_id, tags)
    event = PrivacyPopulation(
        population=uuid.uuid4().hex,
        units=roster.units if units is None else units,
        key_id=first.key_id,
        disjoint_from=[*known.populations],
    )
    half = encode_private(PopulationRoster(key_id=key_id, tags=tags))
    trail.append(event.TYPE, encode_body(event), private=half).wait()


@pytest.mark.parametrize(
    ("change", "units"),
    [
        (lambda key, _: (key, ""), None),
        (lambda key, tags: (key, tags[:-2]), None),
        (lambda key, tags: (key, tags[32:] + tags[:32]), None),
        (lambda key, tags: (key, tags[:32] * 2), None),
        (lambda key, tags: (key, tags.upper().replace("0", "A")), None),
        (lambda _, tags: ("0" * 32, tags), None),
        (lambda key, tags: (key, tags), 1),
    ],
    ids=["empty", "cut", "unsorted", "twice", "not hex", "another secret", "too many"],
)
def test_a_private_half_that_is_no_roster_proves_nothing(
    tmp_path: Path, change: Callable[[str, str], tuple[str, str]], units: int | None
) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        record_population(trail, crowd("a"))
        forged(trail, crowd("b"), lambda key, tags: (key, tags))
        assert {one.found for one in check_relations(shown(trail))} == {"disjoint"}
        forged(trail, crowd("c"), change, units)
        *_, last = shown(trail).populations.values()
        assert (last.tags, last.state) == (None, "wrong")


def test_an_entry_that_says_disjoint_of_rosters_that_are_not_is_contradicted_and_not_followed(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        taken(trail, planned(trail, crowd("a")))
        forged(trail, people("a1", "x"), lambda key, tags: (key, tags))
        known = shown(trail)
        (relation,) = check_relations(known)
        assert relation.contradicted
        assert len(known.groups(known.populations)) == 1


def test_a_population_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        record_population(trail, crowd("a"))
        (entry,) = trail.reader().entries(type=PrivacyPopulation.TYPE)
        trail.append(entry.type, entry.body, private=b"{}").wait()
        with pytest.raises(PrivacyError, match="stands twice"):
            shown(trail)


# --- for an auditor --------------------------------------------------------------------------------------------------


def test_two_openings_let_an_auditor_compare_the_rosters_without_an_id(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        first, second = (crowd(f"annotator-{prefix}-of-this-test-") for prefix in "ab")
        for roster in (first, second, Roster(2, frozenset([min(first.names), min(second.names)]))):
            record_population(trail, roster)
        entries = list(trail.reader().entries(type=PrivacyPopulation.TYPE))
        files = []
        for entry in entries:
            files.append(tmp_path / f"{entry.index}.opening")
            files[-1].write_bytes(disclose(trail, entry.index).encode())
            assert b"ofthistest" not in b64decode(disclose(trail, entry.index).payload)
    opened = [disclosed_population(file) for file in files]
    assert {verdict.level.name for verdict, _ in opened} == {"UNANCHORED"}
    one, other, both = (population for _, population in opened)
    assert compare_rosters(one, other) == "disjoint"
    assert {compare_rosters(one, both), compare_rosters(other, both)} == {"shares"}
    data = bytearray(files[0].read_bytes())
    at = data.index(b'"payload":"') + 40
    data[at] = ord("A") if data[at] != ord("A") else ord("B")
    files[0].write_bytes(bytes(data))
    with pytest.raises(Exception, match="damaged"):
        disclosed_population(files[0])


def test_an_opening_of_something_else_is_no_population(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        record_population(trail, crowd("a"))
        (entry,) = trail.reader().entries(type=PopulationKey.TYPE)
        (tmp_path / "key.opening").write_bytes(disclose(trail, entry.index).encode())
    with pytest.raises(PrivacyError, match="not a population"):
        disclosed_population(tmp_path / "key.opening")


# --- others at the same time -----------------------------------------------------------------------------------------


def test_a_roster_that_others_record_meanwhile_is_compared_with_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        record_population(trail, crowd("a"))
        real, overtaken = module.read_registry, []

        def slow(reader: TrailReader, vault: VaultAt | None = None) -> Registry:
            found = real(reader, vault)
            if not overtaken:
                overtaken.append(1)
                record_population(trail, crowd("b"))
            return found

        monkeypatch.setattr(module, "read_registry", slow)
        third = record_population(trail, crowd("c"))
        *_, last = shown(trail).populations.values()
        assert last.id == third
        assert len(last.said_disjoint) == 2


def test_a_vault_that_does_not_give_the_secret_back_proves_nothing_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_audit_nb.trail import vault

    monkeypatch.setattr(vault, "check_opening", lambda *_: False)
    with Trail.open(tmp_path / "audit") as trail:
        assert record_population(trail, crowd("a")) is None
        assert sum(1 for _ in trail.reader().entries(type=PopulationKey.TYPE)) == 1
        taken(trail, planned(trail, crowd("a"), 50.0))
        assert planned(trail, crowd("b"), 50.0).prior == (ONE,)
        assert [event.population for event in reservations(trail)] == [None]


def test_reading_rosters_leaves_the_writers_vault_alone(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        two(trail)
        with closing(Vault(trail.vault.path, trail.keys.master)) as vault:
            assert vault.exists()
        assert len(totals(trail, trail)) == 2
        taken(trail, planned(trail, crowd("c")))
