"""Trust policies: strict parsing, the quorum, and whether it can be met twice."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.notes import (
    CHECKPOINT,
    LOG,
    LOG_ECDSA,
    LOG_MLDSA,
    ORIGIN,
    SIGNED,
    VKEY,
    WHEN,
    WITNESS_KEYS,
    WITNESSES,
    EcdsaSigner,
    key,
    mldsa_key,
)

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.cosignature import CosignerEd25519, CosignerMLDSA44
from rlhf_audit_nb.trail.note import Note, Signature, Signer, format_vkey, parse_note, sign_note
from rlhf_audit_nb.trail.policy import Group, TrustPolicy
from rlhf_audit_nb.trail.statement import format_timestamped, mldsa44_message

POLICY = "\n".join(
    [
        "# who is trusted",
        f"log {VKEY} https://example.com/log",
        f"log\t{format_vkey(LOG_ECDSA.verifier())}",
        *(f"  witness w{number} {vkey}" for number, vkey in enumerate(WITNESS_KEYS)),
        "group own any w0 w1",
        "group both 2 own w2 w3",
        "quorum both",
        "",
    ]
)
MLDSA_VKEY = format_vkey(LOG_MLDSA.verifier())


def reason(policy: TrustPolicy, note: str) -> str:
    with pytest.raises(FormatError) as caught:
        policy.check(note)
    return caught.value.reason


def test_a_policy_survives_parsing_and_formatting():
    policy = TrustPolicy.parse(POLICY)
    assert TrustPolicy.parse(policy.format()) == policy
    assert policy.log_keys == (VKEY, format_vkey(LOG_ECDSA.verifier()))
    assert policy.urls == {VKEY: "https://example.com/log"}
    assert policy.groups["both"] == Group("both", 2, ("own", "w2", "w3"), "2")


@pytest.mark.parametrize("signer", [LOG, LOG_ECDSA, LOG_MLDSA], ids=["0x01", "0x02", "0x06"])
def test_a_log_signs_with_a_key_of_any_of_its_types(signer):
    vkey = format_vkey(signer.verifier())
    note = sign_note(CHECKPOINT.format(), [signer])
    for policy in (TrustPolicy.of(vkey), TrustPolicy.parse(f"log {vkey}\nquorum none\n")):
        assert TrustPolicy.parse(policy.format()) == policy
        checked = policy.check(note, ORIGIN)
        assert checked.checkpoint == CHECKPOINT
        assert (checked.signers, checked.cosigned, checked.cosignatures) == ((vkey,), False, ())


def test_a_witnesss_key_alone_makes_no_policy():
    with pytest.raises(FormatError) as caught:
        TrustPolicy.of(WITNESS_KEYS[0])
    assert caught.value.reason == "key-type"


def cosigned(*numbers: int) -> str:
    note = parse_note(SIGNED)
    for number in numbers:
        note = note.plus(WITNESSES[number].cosign(note, WHEN + number))
    return note.format()


@pytest.mark.parametrize(
    ("numbers", "holds"),
    [((), False), ((0,), False), ((0, 1), False), ((0, 2), True), ((2, 3), True), ((1, 3), True), ((0, 1, 2, 3), True)],
)
def test_the_quorum_is_counted_over_groups(numbers, holds):
    checked = TrustPolicy.parse(POLICY).check(cosigned(*numbers))
    assert checked.cosigned is holds
    assert [(item.verifier.name, item.time) for item in checked.cosignatures] == [
        (WITNESSES[number].name, WHEN + number) for number in numbers
    ]
    assert len(checked.signers) == 1 + len(numbers)


def test_a_witness_alone_is_a_quorum():
    text = f"log {VKEY}\nwitness w3 {WITNESS_KEYS[3]}\nquorum w3\n"
    assert TrustPolicy.parse(text).check(cosigned(3)).cosigned
    assert not TrustPolicy.parse(text).check(cosigned(0)).cosigned


def test_a_cosignature_that_does_not_hold_refuses_the_note():
    note = parse_note(cosigned(2))
    line = note.signatures[-1]
    earlier = Signature(line.name, line.key_id, line.data[:7] + bytes([line.data[7] ^ 1]) + line.data[8:])
    assert reason(TrustPolicy.parse(POLICY), Note(note.text, (*note.signatures[:-1], earlier)).format()) == "signature"


def test_a_cosignature_without_a_time_is_listed_and_counts_for_nothing():
    text = f"log {VKEY}\nwitness w3 {WITNESS_KEYS[3]}\nquorum w3\n"
    witness = WITNESSES[3]
    signed = witness.key.sign(mldsa44_message(witness.name, CHECKPOINT, 0))
    line = Signature(witness.name, witness.verifier().key_id, format_timestamped(0, signed))
    checked = TrustPolicy.parse(text).check(parse_note(SIGNED).plus(line).format())
    assert [item.time for item in checked.cosignatures] == [0]
    assert not checked.cosigned


def test_a_witness_does_not_stand_for_the_log():
    note = parse_note(cosigned(0, 3))
    only = Note(note.text, note.signatures[1:]).format()
    assert reason(TrustPolicy.parse(POLICY), only) == "unsigned"


def test_the_logs_second_key_counts_only_where_the_policy_lists_it_as_a_log():
    second = sign_note(CHECKPOINT.format(), [LOG_MLDSA])
    both = sign_note(CHECKPOINT.format(), [LOG, LOG_MLDSA])
    plain = TrustPolicy.of(VKEY)
    assert reason(plain, second) == "unsigned"
    assert plain.check(both).signers == (VKEY,)
    as_witness = TrustPolicy.parse(f"log {VKEY}\nwitness own {MLDSA_VKEY}\nquorum own\n")
    assert reason(as_witness, second) == "unsigned"
    assert as_witness.check(both).cosigned
    as_log = TrustPolicy.parse(f"log {VKEY}\nlog {MLDSA_VKEY}\nquorum none\n")
    assert as_log.check(second).signers == (MLDSA_VKEY,)
    checked = as_log.check(both)
    assert checked.signers == (VKEY, MLDSA_VKEY)
    assert checked.cosignatures == ()


def test_the_log_keys_that_count_can_be_handed_in():
    """After a rotation others count than the policy names; its witnesses stay."""
    new = Signer(ORIGIN, key(33))
    note = parse_note(sign_note(CHECKPOINT.format(), [new]))
    note = note.plus(WITNESSES[0].cosign(note, WHEN), WITNESSES[2].cosign(note, WHEN))
    policy = TrustPolicy.parse(POLICY)
    assert reason(policy, note.format()) == "unsigned"
    checked = policy.check(note.format(), ORIGIN, logs=[new.verifier()])
    assert checked.cosigned
    assert checked.signers[0] == format_vkey(new.verifier())
    with pytest.raises(FormatError) as caught:
        policy.check(SIGNED, logs=[new.verifier()])
    assert caught.value.reason == "unsigned"
    for keys in ([], [Signer("example.com/else", key(33)).verifier()]):
        with pytest.raises(FormatError) as caught:
            policy.check(SIGNED, logs=keys)
        assert caught.value.reason == "untrusted-log"


def test_a_policy_that_knows_another_log_says_so():
    policy = TrustPolicy.of(format_vkey(Signer("example.com/else", key(3)).verifier()))
    assert reason(policy, SIGNED) == "untrusted-log"
    with pytest.raises(FormatError) as caught:
        TrustPolicy.of(VKEY).check(SIGNED, "example.com/else")
    assert caught.value.reason == "origin"


W = [f"witness w{number} {vkey}\n" for number, vkey in enumerate(WITNESS_KEYS)]
BROKEN_POLICIES = {
    "nothing": "",
    "no quorum": f"log {VKEY}\n",
    "no log": "quorum none\n",
    "two quorums": f"log {VKEY}\nquorum none\nquorum none\n",
    "a log twice": f"log {VKEY}\nlog {VKEY}\nquorum none\n",
    "a witness's key as a log": f"log {WITNESS_KEYS[0]}\nquorum none\n",
    "a log's Ed25519 key as a witness": f"log {VKEY}\nwitness w "
    f"{format_vkey(Signer('a', key(5)).verifier())}\nquorum w\n",
    "an ECDSA key as a witness": f"log {VKEY}\nwitness w {format_vkey(LOG_ECDSA.verifier())}\nquorum w\n",
    "one key as log and witness": f"log {VKEY}\nwitness w "
    f"{format_vkey(CosignerEd25519('w', LOG.key).verifier())}\nquorum w\n",
    "one key under two names": f"log {VKEY}\n{W[0]}witness v "
    f"{format_vkey(CosignerEd25519('v', WITNESSES[0].key).verifier())}\nquorum w0\n",
    "one ML-DSA key as log and witness": f"log {MLDSA_VKEY}\nwitness w {MLDSA_VKEY}\nquorum w\n",
    "a quorum that is not defined": f"log {VKEY}\nquorum w\n",
    "a quorum before its witness": f"log {VKEY}\nquorum w0\n{W[0]}",
    "a group before its witness": f"log {VKEY}\ngroup g any w0\n{W[0]}quorum g\n",
    "a group in itself": f"log {VKEY}\n{W[0]}group g any g w0\nquorum g\n",
    "a name twice": f"log {VKEY}\n{W[0]}{W[1].replace('w1', 'w0')}quorum w0\n",
    "a group with a witness's name": f"log {VKEY}\n{W[0]}group w0 any w0\nquorum w0\n",
    "a witness named none": f"log {VKEY}\n{W[0].replace('w0', 'none', 1)}quorum none\n",
    "a group named none": f"log {VKEY}\n{W[0]}group none any w0\nquorum none\n",
    "none as a member": f"log {VKEY}\n{W[0]}group g any none w0\nquorum g\n",
    "a threshold over the members": f"log {VKEY}\n{W[0]}group g 2 w0\nquorum g\n",
    "a threshold of 0": f"log {VKEY}\n{W[0]}group g 0 w0\nquorum g\n",
    "a threshold with a sign": f"log {VKEY}\n{W[0]}group g +1 w0\nquorum g\n",
    "a threshold with a zero before it": f"log {VKEY}\n{W[0]}group g 01 w0\nquorum g\n",
    "a threshold in another script": f"log {VKEY}\n{W[0]}group g ١ w0\nquorum g\n",
    "a member twice in a group": f"log {VKEY}\n{W[0]}group g any w0 w0\nquorum g\n",
    "a member of two groups": f"log {VKEY}\n{W[0]}group g any w0\ngroup h any w0\nquorum h\n",
    "a group of none": f"log {VKEY}\n{W[0]}group g any\nquorum g\n",
    "a word that means nothing": f"log {VKEY}\nwitnesses w\nquorum none\n",
    "a capital letter": f"Log {VKEY}\nquorum none\n",
    "carriage returns": f"log {VKEY}\r\nquorum none\r\n",
    "a NUL": f"log {VKEY}\nquorum none\n#\0\n",
    "a DEL": f"log {VKEY}\nquorum none\n#\x7f\n",
    "a word too many": f"log {VKEY} url more\nquorum none\n",
    "half a surrogate pair": f"log {VKEY}\nquorum none\n# \ud800\n",
    "over a mebibyte": f"log {VKEY}\nquorum none\n#{'x' * (1 << 20)}\n",
}


@pytest.mark.parametrize("name", BROKEN_POLICIES)
def test_a_broken_policy_is_refused(name):
    with pytest.raises(FormatError) as caught:
        TrustPolicy.parse(BROKEN_POLICIES[name])
    assert caught.value.reason == "policy"


def test_names_urls_and_comments_are_bytes():
    """The format asks for no UTF-8: what is not comes back as it was, and two bytes are not one letter."""
    raw = (
        b"# caf\xe9\nlog %s http://\xff.example\nwitness K %s\nwitness \xe2\x84\xaa %s\nwitness \xe9 %s\nquorum \xe9\n"
        % (
            VKEY.encode(),
            *(key.encode() for key in WITNESS_KEYS[:3]),
        )
    )
    policy = TrustPolicy.parse(raw)
    assert len(policy.witnesses) == 3
    assert TrustPolicy.parse(policy.format()) == policy
    assert b"quorum \xe9\n" in policy.format().encode(errors="surrogateescape")
    assert policy.check(cosigned(2)).cosigned
    assert not policy.check(cosigned(0, 1)).cosigned


def many(count: int) -> str:
    """A policy with this many logs, witnesses (half of each of two types) and groups, each in the next."""
    logs = [format_vkey(Signer(f"log.example/{n}", key(n)).verifier()) for n in range(2, count // 2 + 1)]
    logs += [format_vkey(EcdsaSigner(f"log.example/{n}", n).verifier()) for n in range(count // 2, count)]
    signers = [CosignerEd25519(f"w/{n}", key(100 + n)) for n in range(count // 2)]
    signers += [CosignerMLDSA44(f"w/{n}", mldsa_key(n)) for n in range(count // 2, count)]
    lines = [f"log {vkey}" for vkey in [VKEY, *logs]]
    lines += [f"witness w{n} {format_vkey(signer.verifier())}" for n, signer in enumerate(signers)]
    lines += ["group g0 any w0", *(f"group g{n} all g{n - 1} w{n}" for n in range(1, count))]
    return "\n".join([*lines, f"quorum g{count - 1}", ""])


def test_sixty_logs_witnesses_and_groups_are_held():
    policy = TrustPolicy.parse(many(60))
    assert (len(policy.logs), len(policy.witnesses), len(policy.groups)) == (60, 60, 60)
    assert TrustPolicy.parse(policy.format()) == policy
    assert not policy.check(SIGNED).cosigned
    assert not policy.split_view_unsafe


def test_groups_within_groups_are_counted_however_deep():
    lines = [f"log {VKEY}", f"witness w0 {WITNESS_KEYS[0]}", "group g0 any w0"]
    lines += [f"group g{n} all g{n - 1}" for n in range(1, 5000)]
    policy = TrustPolicy.parse("\n".join([*lines, "quorum g4999", ""]))
    assert policy.check(cosigned(0)).cosigned
    assert not policy.check(SIGNED).cosigned
    assert not policy.split_view_unsafe


def holds(policy: TrustPolicy, name: str, held: frozenset[str]) -> bool:
    """The quorum by its definition, from the top down."""
    group = policy.groups.get(name)
    if group is None:
        return name == "none" or name in held
    return sum(holds(policy, member, held) for member in group.members) >= group.threshold


def met_twice(policy: TrustPolicy) -> bool:
    """Whether any two sets of witnesses that meet the quorum have nobody in common, by trying all of them."""
    names = sorted(policy.witnesses)
    enough = [
        frozenset(chosen)
        for count in range(len(names) + 1)
        for chosen in combinations(names, count)
        if holds(policy, policy.quorum, frozenset(chosen))
    ]
    return any(not one & two for one in enough for two in enough)


@st.composite
def policies(draw: st.DrawFn) -> TrustPolicy:
    """Nested groups over up to seven witnesses, each name a member of one group at most."""
    count = draw(st.integers(1, 7))
    free = [f"w{number}" for number in range(count)]
    witnesses = {name: CosignerEd25519(name, key(60 + at)).verifier() for at, name in enumerate(free)}
    groups: dict[str, Group] = {}
    for number in range(draw(st.integers(0, 4))):
        chosen = draw(st.lists(st.sampled_from(free), min_size=1, unique=True)) if free else []
        if not chosen:
            break
        name = f"g{number}"
        groups[name] = Group(name, (k := draw(st.integers(1, len(chosen)))), tuple(chosen), str(k))
        free = [other for other in free if other not in chosen] + [name]
    quorum = draw(st.sampled_from([*witnesses, *groups, *list(groups)[-1:], "none"]))
    return TrustPolicy((LOG.verifier(),), witnesses, groups, quorum)


@settings(max_examples=300, deadline=None)
@given(policies())
def test_whether_a_quorum_can_be_met_twice_is_what_trying_all_sets_finds(policy):
    assert TrustPolicy.parse(policy.format()) == policy
    assert policy.split_view_unsafe is met_twice(policy)


@pytest.mark.parametrize(
    ("groups", "unsafe"),
    [
        ("quorum none", True),
        ("quorum w0", False),
        ("group g any w0 w1\nquorum g", True),
        ("group g 2 w0 w1 w2\nquorum g", False),
        ("group g 2 w0 w1 w2 w3\nquorum g", True),
        ("group g 3 w0 w1 w2 w3\nquorum g", False),
        ("group a any w0 w1\ngroup b any w2 w3\ngroup g all a b\nquorum g", True),
        ("group a any w0 w1\ngroup g all a w2\nquorum g", False),
        ("group a any w0 w1\ngroup g 2 a w2 w3\nquorum g", True),
    ],
)
def test_a_quorum_of_no_strict_majority_is_said_to_be_unsafe(groups, unsafe):
    policy = TrustPolicy.parse(f"log {VKEY}\n{''.join(W)}{groups}\n")
    assert policy.split_view_unsafe is unsafe


@settings(max_examples=200, deadline=None)
@given(policies(), st.sets(st.integers(0, 6)))
def test_a_quorum_holds_as_it_is_defined(policy, chosen):
    note = parse_note(SIGNED)
    cosigners = [CosignerEd25519(f"w{number}", key(60 + number)) for number in sorted(chosen)]
    note = note.plus(*(cosigner.cosign(note, WHEN) for cosigner in cosigners))
    held = frozenset(cosigner.name for cosigner in cosigners if cosigner.name in policy.witnesses)
    expected = policy.quorum != "none" and holds(policy, policy.quorum, held)
    assert policy.check(note.format()).cosigned is expected
