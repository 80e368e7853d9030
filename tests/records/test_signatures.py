"""Whose signatures count, by a policy: people, roles, purposes, rejections, times. Pure: nothing is signed here."""

from __future__ import annotations

import itertools
import random

import pytest

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.records.signatures import (
    MEANINGS,
    Attestation,
    Person,
    Requirement,
    TrailAttestation,
    count_attestations,
    missing_attestations,
    seconds_of,
    standing_of,
)

NOON = "2026-03-01T12:00:00Z"
NOW = seconds_of(NOON) + 3600.0
OFFICER = Person("Name of the officer", ("0f" * 32,), ("compliance officer",))
LEAD = Person("Name of the lead", ("1e" * 32, "1f" * 32), ("lead", "compliance officer"))
TRAINS = Person("Name of the trainer", ("7a" * 32,), ("trainer", "compliance officer"))
PEOPLE = (OFFICER, LEAD, TRAINS)
ONE_OFFICER = Requirement(role="compliance officer")


def signed(index=0, person=OFFICER, **changes):
    values = {
        "index": index,
        "name": person.name,
        "role": person.roles[-1],
        "meaning": "approved",
        "statement": "Read.",
        "time": NOON,
        "key": "PEM",
        "key_id": person.keys[0],
        "digest": f"{index:064x}",
    }
    return Attestation(**{**values, **changes})


def found(attestations, *requirements, people=PEOPLE, trainers=(), missing=(), now=NOW):
    return count_attestations(attestations, requirements, people, trainers, missing=missing, now=now)


def holds(attestations, *requirements, **options):
    return [finding.met for finding in found(attestations, *requirements, **options)]


def test_an_officer_whom_the_policy_names_approves():
    asked, rejected = found([signed()], ONE_OFFICER)
    assert (asked.met, rejected.met) == (True, True)
    assert [item.name for item in asked.by] == [OFFICER.name]
    assert asked.requirement is ONE_OFFICER
    assert "approved by Name of the officer (compliance officer)" in asked.why


def test_nothing_signed_meets_nothing():
    asked, rejected = found([], ONE_OFFICER)
    assert (asked.met, asked.by, rejected.met) == (False, (), True)
    assert "none of 1" in asked.why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"key_id": "ab" * 32}, "a key that the policy does not name"),
        ({"name": "Somebody else"}, "gives the name Somebody else"),
        ({"role": "director"}, "does not give Name of the officer the role director"),
        ({"time": "2026-03-01T13:10:01Z"}, "lies in the future"),
        ({"doubts": ("it is dated before the record was sealed",)}, "before the record was sealed"),
        ({"meaning": "reviewed"}, "it says reviewed"),
        ({"purpose": "internal tests"}, "for internal tests alone"),
    ],
)
def test_what_does_not_count_is_named(changes, why):
    asked, _ = found([signed(**changes)], ONE_OFFICER)
    assert not asked.met
    assert why in asked.why


def test_names_and_roles_are_compared_without_case_and_spaces():
    assert holds([signed(name="NAME  of the Officer", role=" Compliance Officer")], ONE_OFFICER) == [True, True]


def test_a_letter_may_be_composed_in_two_ways():
    person = Person("Zoe\u0308 \u00dcnal", ("5c" * 32,), ("compliance officer",))
    item = signed(0, person, name="Zo\u00eb U\u0308nal")
    assert item.name != person.name
    assert holds([item], ONE_OFFICER, people=(person,)) == [True, True]


def test_one_person_counts_once_whatever_roles_and_keys():
    twice = [signed(0, LEAD, role="lead"), signed(1, LEAD, role="compliance officer", key_id=LEAD.keys[1])]
    assert holds(twice, Requirement(count=2))[0] is False
    assert holds([*twice, signed(2)], Requirement(count=2))[0] is True
    both = (Requirement(role="lead"), ONE_OFFICER)
    assert holds(twice, *both)[:2] == [False, True]  # the later word took the earlier one's place


def test_people_are_dealt_out_so_that_all_places_are_filled_where_they_can_be():
    # Whoever is taken first for "any" must not take the only officer away; in either order of asking.
    any_one, items = Requirement(), [signed(0), signed(1, LEAD, role="lead")]
    for asked in itertools.permutations((any_one, ONE_OFFICER)):
        assert holds(items, *asked)[:2] == [True, True]
    assert holds(items[:1], any_one, ONE_OFFICER)[:2].count(True) == 1


def test_dealing_agrees_with_trying_every_assignment():
    people = [Person(f"Person {i}", (f"{i:064x}",), roles) for i, roles in enumerate([("a",), ("b",), ("a",), ("c",)])]
    items = [signed(i, person, role=person.roles[0]) for i, person in enumerate(people)]
    for asked in itertools.product([None, "a", "b", "c"], repeat=3):
        requirements = [Requirement(role=role) for role in asked]
        fits = any(
            all(role in (None, people[who].roles[0]) for role, who in zip(asked, chosen, strict=True))
            for chosen in itertools.permutations(range(4), 3)
        )
        assert all(holds(items, *requirements, people=people)) is fits


def test_the_trainer_is_no_approver():
    trains = signed(0, TRAINS)
    asked, _ = found([trains], ONE_OFFICER)
    assert not asked.met
    assert "the trainer cannot be the approver" in asked.why
    assert holds([signed(0, TRAINS, role="trainer")], Requirement(role="trainer"))[0] is True
    # Neither is somebody one of whose keys is the trail's, with whichever of them the signature was made.
    assert holds([signed(0, LEAD)], ONE_OFFICER, trainers={LEAD.keys[1]})[0] is False
    assert holds([signed(0, LEAD)], ONE_OFFICER)[0] is True
    assert "a key of the trail" in standing_of(signed(), PEOPLE, {OFFICER.keys[0]}, now=NOW).why


def test_a_rejection_stands_until_the_same_person_answers_it():
    refused, later = signed(0, meaning="rejected"), signed(1, LEAD)
    asked, rejected = found([refused, later], ONE_OFFICER)
    assert (asked.met, rejected.met) == (True, False)
    assert rejected.by == (refused,)
    assert holds([refused, later, signed(2)], ONE_OFFICER) == [True, True]
    assert holds([refused, later, signed(2, meaning="withdrawn")], ONE_OFFICER) == [True, True]
    assert holds([signed(0), signed(1, meaning="rejected")], ONE_OFFICER) == [False, False]


def test_a_trainer_can_refuse_and_a_stranger_cannot():
    assert holds([signed(), signed(1, TRAINS, meaning="rejected")], ONE_OFFICER) == [True, False]
    assert holds([signed(), signed(1, LEAD, meaning="rejected", role="janitor")], ONE_OFFICER) == [True, False]
    assert holds([signed(), signed(1, meaning="rejected", key_id="ab" * 32)], ONE_OFFICER) == [True, True]


def test_what_does_not_count_answers_no_rejection():
    refused = signed(0, meaning="rejected")
    for changes in ({"role": "director"}, {"doubts": ("backdated",)}, {"name": "Else"}):
        assert holds([refused, signed(1, **changes)], ONE_OFFICER) == [False, False]


def test_a_purpose_limits_what_is_said():
    asked = Requirement(role="compliance officer", purpose="deployment")
    assert holds([signed(purpose="deployment")], asked) == [True, True]
    assert holds([signed()], asked) == [True, True]
    assert holds([signed(purpose="internal tests")], asked) == [False, True]
    # Approved in general, refused for this use; refused in general, approved for this use.
    assert holds([signed(), signed(1, meaning="rejected", purpose="deployment")], asked) == [False, False]
    assert holds([signed(meaning="rejected"), signed(1, purpose="deployment")], asked) == [True, True]
    # A refusal of another use says nothing of this one, and stands where any use is decided on.
    elsewhere = [signed(), signed(1, meaning="rejected", purpose="internal tests")]
    assert holds(elsewhere, asked) == [True, True]
    assert holds(elsewhere, ONE_OFFICER) == [True, False]


def test_old_signatures_and_those_that_no_trail_bears_out():
    fresh = Requirement(role="compliance officer", max_age_days=1)
    assert holds([signed()], fresh)[0] is True
    assert holds([signed()], fresh, now=NOW + 2 * 86_400)[0] is False
    borne_out = Requirement(role="compliance officer", in_trail=True)
    entry = TrailAttestation(7, 0, f"{0:064x}", "approved", "compliance officer", OFFICER.keys[0])
    assert holds([signed()], borne_out)[0] is False
    assert holds([signed(entry=entry)], borne_out)[0] is True


def by_walking(items, asked):
    """The rules again, told as a walk: whose last word on this use approves, and whether anybody's refuses."""
    words = {}
    for item in items:
        person = next((one for one in PEOPLE if item.key_id in one.keys), None)
        if person is None or item.purpose not in (None, asked.purpose):
            continue
        valid = item.role in person.roles and not item.doubts
        if valid or item.meaning == "rejected":
            words[person.name] = (item, valid, person)
    fit = [
        person.name
        for item, valid, person in words.values()
        if valid and item.meaning == "approved" and "trainer" not in person.roles and item.role == asked.role
    ]
    return len(fit) >= asked.count, all(item.meaning != "rejected" for item, _, _ in words.values())


def test_counting_agrees_with_a_walk_over_random_signatures():
    chance = random.Random(7)
    seen = set()
    for _ in range(3000):
        asked = Requirement(role="compliance officer", purpose="deployment", count=chance.choice((1, 2)))
        items = [
            signed(
                i,
                person := chance.choice(PEOPLE),
                key_id=chance.choice((*person.keys, *person.keys, "ab" * 32)),
                role=chance.choice((*person.roles, "compliance officer", "janitor")),
                meaning=chance.choice(("approved", "approved", "rejected", "withdrawn", "reviewed")),
                purpose=chance.choice((None, "deployment", "tests")),
                doubts=chance.choice(((), (), ("backdated",))),
            )
            for i in range(chance.randrange(6))
        ]
        expected = by_walking(items, asked)
        assert tuple(holds(items, asked)) == expected, items
        seen.add(expected)
    assert len(seen) == 4


def test_what_the_trail_knows_and_a_copy_lacks_is_a_finding():
    known = [TrailAttestation(5 + i, 0, f"{i:064x}", "rejected", "lead", "1e" * 32) for i in range(2)]
    missing = missing_attestations([signed(0)], known)
    assert missing == (known[1],)
    last = found([signed(0)], ONE_OFFICER, missing=missing)[-1]
    assert (last.code, last.met) == ("attestation-missing", False)
    assert "entry 6: rejected as lead" in last.why
    assert missing_attestations([signed(0), signed(1)], known) == ()


def test_a_policy_that_names_one_key_twice_is_refused():
    for people in (
        (OFFICER, Person("Other name", OFFICER.keys, ("lead",))),
        (OFFICER, Person("name of the OFFICER", ("aa" * 32,), ("lead",))),
    ):
        with pytest.raises(ConfigError, match="The policy names"):
            found([signed()], ONE_OFFICER, people=people)


@pytest.mark.parametrize(
    "changes",
    [{"count": 0}, {"meanings": ("rejected",)}, {"meanings": ()}, {"meanings": ("nodded",)}, {"max_age_days": -1.0}],
)
def test_a_requirement_that_cannot_be_met_is_refused(changes):
    with pytest.raises(ConfigError, match="cannot be met"):
        found([signed()], Requirement(**changes))


def test_every_meaning_is_explained():
    assert set(MEANINGS) == {"approved", "reviewed", "responsible", "authored", "rejected", "withdrawn"}
    assert all(len(words) > 5 for words in MEANINGS.values())
