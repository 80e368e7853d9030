"""Which key counts for which checkpoint, and that no other one does."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_audit_nb.errors import FormatError, KeyFileError
from rlhf_audit_nb.events import EVENTS, encode_body
from rlhf_audit_nb.trail.checkpoint import Checkpoint
from rlhf_audit_nb.trail.cosignature import CosignerMLDSA44
from rlhf_audit_nb.trail.entry import Entry, Envelope, encode_envelope
from rlhf_audit_nb.trail.note import (
    COSIGNATURE,
    Note,
    Signature,
    Signer,
    format_vkey,
    parse_note,
    parse_vkey,
    sign_note,
)
from rlhf_audit_nb.trail.policy import TrustPolicy
from rlhf_audit_nb.trail.succession import (
    KEY_REVOKED,
    KEY_ROTATED,
    KeyRevokedBody,
    KeyRotatedBody,
    KeySuccession,
    Limit,
    encode_signature,
    keep_revocation,
    known_limits,
    parse_revocation,
    revocation_text,
    rotation_text,
)

ORIGIN = "example.org/keys"


def key(seed: int) -> Signer:
    return Signer(ORIGIN, Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


A, B, C, THIEF = key(1), key(2), key(3), key(9)
WITNESS = format_vkey(B.verifier(COSIGNATURE))


def vkey(signer: Signer) -> str:
    return format_vkey(signer.verifier())


def signed(signer: Signer, text: str) -> str:
    return encode_signature(parse_note(sign_note(text, [signer])).signatures[0].data)


def entry(index: int, kind: str, body: bytes) -> Entry:
    envelope = Envelope(v=1, type=kind, time=index, run=None, seq=index, writer="w", body=msgspec.Raw(body))
    return Entry.decode(index, encode_envelope(envelope))


def created(signer: Signer, record: str = "cmVj") -> Entry:
    body = {"origin": ORIGIN, "log_key": vkey(signer), "record_key": record, "model_key": "bW9k", "tool": "t/1"}
    return entry(0, "trail.created", msgspec.json.encode(body))


def rotated(index: int, old: Signer, new: Signer, *, by: Signer | None = None) -> Entry:
    text = rotation_text(ORIGIN, "log", index, vkey(old), vkey(new), "a year has passed")
    return rotation(index, "log", vkey(old), vkey(new), signed(by or old, text))


def rotation(index: int, role: str, old: str | None, new: str, signature: str) -> Entry:
    body = KeyRotatedBody(role=role, old=old, new=new, reason="a year has passed", signature=signature)
    return entry(index, KEY_ROTATED, msgspec.json.encode(body))


def revoked(index: int, what: Signer, since: int, by: Signer) -> Entry:
    text = revocation_text(ORIGIN, "log", vkey(what), since, "stolen")
    body = KeyRevokedBody(role="log", key=vkey(what), since=since, reason="stolen", signature=signed(by, text))
    return entry(index, KEY_REVOKED, msgspec.json.encode(body))


def chain(*entries: Entry, limits: dict[str, Limit] | None = None) -> KeySuccession:
    found = KeySuccession(ORIGIN, limits)
    for item in entries:
        found.add(item)
    return found


def counts(found: KeySuccession, trusted: list[Signer], size: int) -> set[str]:
    names = {vkey(signer): name for signer, name in ((A, "A"), (B, "B"), (C, "C"), (THIEF, "T"))}
    keys = found.log_verifiers([signer.verifier() for signer in trusted], size)
    return {names[format_vkey(item)] for item in keys}


def note(size: int, *signers: Signer) -> str:
    return sign_note(Checkpoint(ORIGIN, size, bytes(31) + bytes([size])).format(), signers)


def policy(*signers: Signer) -> TrustPolicy:
    return TrustPolicy(tuple(signer.verifier() for signer in signers))


@given(
    gaps=st.lists(st.integers(1, 4), max_size=4),
    trusted=st.sets(st.integers(0, 5), max_size=3),
    revoked_at=st.none() | st.tuples(st.integers(0, 4), st.integers(0, 25)),
    known=st.none() | st.tuples(st.integers(0, 4), st.integers(0, 25), st.none() | st.integers(0, 5)),
)
@settings(max_examples=200, deadline=None)
def test_every_chain_agrees_with_the_rules_as_they_are_told(gaps, trusted, revoked_at, known):
    keys = [key(seed) for seed in range(10, 16)]
    at, places = 0, []
    for gap in gaps:
        at += gap
        places.append(at)
    entries = [created(keys[0])]
    entries += [rotated(index, keys[n], keys[n + 1]) for n, index in enumerate(places)]
    since = {}
    if revoked_at is not None and revoked_at[0] <= len(gaps):
        since[revoked_at[0]] = revoked_at[1]
        entries.append(revoked(at + 1, keys[revoked_at[0]], revoked_at[1], keys[len(gaps)]))
    limits = {}
    if known is not None:
        heir = None if known[2] is None else vkey(keys[known[2]])
        limits[vkey(keys[known[0]])] = Limit(known[1], heir)
        since[known[0]] = min(known[1], since.get(known[0], 99))
    found = chain(*entries, limits=limits)
    assert found.reasons == []

    def followed(number: int) -> bool:
        """Trusted, or led to."""
        if number in trusted or number == 0:
            return number in trusted
        if not followed(number - 1):
            return False
        if known is None or known[0] != number - 1:
            return True
        return places[number - 1] < known[1] if known[2] is None else known[2] == number

    for size in range(30):
        expected = {number for number in trusted if number > len(gaps)}
        for number in range(len(gaps) + 1):
            first = 0 if number == 0 else places[number - 1] + 1
            # With its successor only where it leads there: whoever knows a later key asks for that one's signature.
            room = followed(number) and not any(later in trusted for later in range(number + 1, len(gaps) + 1))
            last = 99 if number == len(gaps) else places[number] + (1 if room else 0)
            counted = followed(number) or any(followed(later) for later in range(number, len(gaps) + 1))
            if counted and first <= size <= last:
                expected.add(number)
        expected = {number for number in expected if size <= since.get(number, 99)}
        told = found.log_verifiers([keys[number].verifier() for number in sorted(trusted)], size)
        assert {number for number in range(6) if keys[number].verifier() in told} == expected, size


THREE = (created(A), rotated(10, A, B), rotated(20, B, C))


def test_forwards_each_key_counts_between_the_entries_that_name_it_and_its_successor():
    found = chain(*THREE)
    assert found.reasons == []
    told = {size: counts(found, [A], size) for size in (1, 10, 11, 12, 20, 21, 22, 999)}
    assert told == {
        1: {"A"},
        10: {"A"},
        11: {"A", "B"},
        12: {"B"},
        20: {"B"},
        21: {"B", "C"},
        22: {"C"},
        999: {"C"},
    }


def test_backwards_an_older_key_counts_only_below_the_entry_that_replaced_it():
    found = chain(*THREE)
    told = {size: counts(found, [C], size) for size in (1, 10, 11, 20, 21, 22)}
    assert told == {1: {"A"}, 10: {"A"}, 11: {"B"}, 20: {"B"}, 21: {"C"}, 22: {"C"}}


def test_who_trusts_a_key_in_the_middle_follows_both_ways():
    found = chain(*THREE)
    assert [counts(found, [B], size) for size in (5, 11, 15, 21, 30)] == [{"A"}, {"B"}, {"B"}, {"B", "C"}, {"C"}]


def test_who_trusts_none_of_the_keys_accepts_none_of_them():
    assert counts(chain(*THREE), [], 15) == set()
    assert counts(chain(*THREE), [THIEF], 15) == {"T"}
    with pytest.raises(FormatError) as refused:
        chain(*THREE).check(policy(THIEF), note(15, B))
    assert refused.value.reason == "unsigned"


def test_without_entries_the_policys_own_keys_count():
    assert counts(chain(), [A, B], 7) == {"A", "B"}


def test_an_old_key_cannot_end_a_history_of_its_own_with_the_name_of_its_successor():
    """The holder of A names B, whom others trust, and signs the checkpoint that holds this entry by A alone."""
    forged = chain(created(THIEF), rotated(10, THIEF, B))
    assert counts(forged, [B], 11) == {"B"}
    with pytest.raises(FormatError):
        forged.check(policy(B), note(11, THIEF))
    assert forged.check(policy(B), note(11, THIEF, B)).signers == (vkey(B),)


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ((created(A), rotated(10, A, B, by=THIEF)), "key-signature"),
        ((created(A), rotated(10, B, C)), "key-order"),
        ((created(A), rotated(10, A, B), rotated(11, A, C)), "key-order"),
        ((created(A), rotated(10, A, B), rotated(11, B, A)), "key-order"),
        ((created(A), rotated(10, A, A)), "key-order"),
        ((created(A), entry(3, KEY_ROTATED, b"{}")), "key-entry"),
        ((created(A), entry(3, KEY_REVOKED, b'{"role":1}')), "key-entry"),
        ((created(A), rotation(3, "cook", None, "x", "eA==")), "key-entry"),
        ((created(A), rotation(3, "log", vkey(A), "x", "eA==")), "vkey"),
        ((created(A), rotation(3, "log", vkey(A), WITNESS, "eA==")), "key-type"),
        ((created(A), rotation(3, "mldsa", None, vkey(B), "eA==")), "key-type"),
        ((created(A), revoked(5, A, 5, by=THIEF)), "key-signature"),
        ((created(A), revoked(5, B, 5, by=A)), "key-order"),
    ],
)
def test_an_entry_that_does_not_hold_is_a_reason_and_changes_nothing(entries, code):
    found = chain(*entries)
    assert [reason.code for reason in found.reasons] == [code]
    assert found.reasons[0].where == f"entry {entries[-1].index}"
    last = {"B"} if len(entries) == 3 else {"A"}
    assert counts(found, [A], 50) == last


def test_a_signature_over_another_place_in_the_trail_does_not_hold():
    moved = rotated(10, A, B)
    assert chain(created(A), moved).reasons == []
    found = chain(created(A), Entry(11, moved.data, moved.envelope))
    assert [reason.code for reason in found.reasons] == ["key-signature"]


def test_a_key_entry_of_another_trail_does_not_count():
    other = KeySuccession("example.org/other")
    other.add(created(A))
    assert [reason.code for reason in other.reasons] == ["origin"]


def test_what_a_revoked_key_signed_beyond_its_limit_does_not_count():
    found = chain(created(A), rotated(10, A, B), revoked(11, A, 6, by=B))
    assert found.reasons == []
    assert [counts(found, [A], size) for size in (6, 7, 11, 12)] == [{"A"}, set(), {"B"}, {"B"}]
    assert found.check(policy(A), note(6, A)).signers == (vkey(A),)
    with pytest.raises(FormatError, match="revoked beyond size 6") as refused:
        found.check(policy(A), note(7, A))
    assert refused.value.reason == "revoked-key"


def test_what_a_replaced_key_signs_later_does_not_count_even_where_the_policy_lists_it():
    found = chain(*THREE)
    with pytest.raises(FormatError, match="not the key of that size") as refused:
        found.check(policy(A, C), note(30, A))
    assert refused.value.reason == "retired-key"
    assert found.check(policy(A, C), note(30, C)).signers == (vkey(C),)


M_ONE, M_TWO = (CosignerMLDSA44(ORIGIN, MLDSA44PrivateKey.from_seed_bytes(bytes([seed]) * 32)) for seed in (1, 2))


def second(index: int, old: CosignerMLDSA44 | None, new: CosignerMLDSA44, by: Signer) -> Entry:
    """The entry that names an ML-DSA-44 key."""
    names = (None if old is None else format_vkey(old.verifier()), format_vkey(new.verifier()))
    text = rotation_text(ORIGIN, "mldsa", index, *names, "a year has passed")
    return rotation(index, "mldsa", *names, signed(by, text))


def listed(*signers: Signer | CosignerMLDSA44) -> TrustPolicy:
    return TrustPolicy(tuple(signer.verifier() for signer in signers))


def why(found: KeySuccession, trusted: TrustPolicy, text: str) -> str:
    with pytest.raises(FormatError) as caught:
        found.check_newest(trusted, text)
    return caught.value.reason


def test_a_second_signature_alone_does_not_count_for_who_trusts_the_log_key():
    """Whoever has an ML-DSA-44 key, or had one that was replaced, has no part in the log key."""
    forked = chain(created(A), second(3, None, M_ONE, A))  # the thief leaves out what came after
    assert why(forked, listed(A), note(9, M_ONE)) == "retired-key"
    both = forked.check_newest(listed(A), note(9, A, M_ONE))
    assert both.signers == (vkey(A), format_vkey(M_ONE.verifier()))
    assert forked.check_newest(listed(M_ONE), note(9, M_ONE)).checkpoint.size == 9


def test_a_policy_that_lists_the_old_keys_too_takes_no_fork_by_whoever_has_one_of_them():
    policy = listed(A, B, M_ONE, M_TWO)
    whole = chain(created(A), second(3, None, M_ONE, A), second(5, M_ONE, M_TWO, A), rotated(7, A, B))
    assert whole.check_newest(policy, note(9, B)).signers == (vkey(B),)
    assert whole.check_newest(policy, note(9, B, M_TWO)).checkpoint.size == 9
    assert whole.check_newest(policy, note(8, A, B)).checkpoint.size == 8
    # Forks that leave out what came after the key, or end with it.
    assert why(chain(created(A)), policy, note(9, A)) == "retired-key"
    assert why(whole, policy, note(8, A)) == "retired-key"
    assert why(chain(created(A), second(3, None, M_ONE, A)), policy, note(5, M_ONE)) == "retired-key"
    replaced = chain(created(A), second(3, None, M_ONE, A), second(5, M_ONE, M_TWO, A))
    assert why(replaced, policy, note(6, M_ONE)) == "retired-key"


def test_older_checkpoints_and_records_go_on_to_hold_under_a_policy_that_lists_the_old_keys_too():
    policy = listed(A, B)
    assert chain(created(A)).check(policy, note(5, A)).checkpoint.size == 5
    assert chain(created(A), rotated(7, A, B)).check(policy, note(5, A)).checkpoint.size == 5
    # Whoever remembers by himself how long the old key counted needs no such rule.
    own = chain(created(A), limits={vkey(A): Limit(8, vkey(B), revoked=False)})
    assert own.check_newest(policy, note(5, A)).checkpoint.size == 5


def test_a_signature_that_does_not_hold_is_still_named_so():
    lines = parse_note(note(30, C))
    broken = Signature(ORIGIN, lines.signatures[0].key_id, bytes(64))
    with pytest.raises(FormatError) as refused:
        chain(*THREE).check(policy(A), Note(lines.text, (broken,)).format())
    assert refused.value.reason == "signature"


def test_a_fork_without_the_entry_is_refused_by_who_knows_the_revocation():
    fork = (created(A),)
    assert counts(chain(*fork), [A], 50) == {"A"}
    knows = chain(*fork, limits={vkey(A): Limit(20, vkey(B))})
    assert counts(knows, [A], 20) == {"A"}
    with pytest.raises(FormatError) as refused:
        knows.check(policy(A), note(50, A))
    assert refused.value.reason == "revoked-key"


def test_in_a_fork_a_revoked_key_cannot_name_an_heir_of_its_own():
    limits = {vkey(A): Limit(20, vkey(B))}
    fork = chain(created(A), rotated(10, A, THIEF), limits=limits)
    assert counts(fork, [A], 50) == set()
    with pytest.raises(FormatError, match="a revoked key has named") as refused:
        fork.check(policy(A), note(50, THIEF))
    assert refused.value.reason == "revoked-key"
    honest = chain(created(A), rotated(25, A, B), limits=limits)
    assert counts(honest, [A], 50) == {"B"}
    without_heir = chain(created(A), rotated(25, A, B), limits={vkey(A): Limit(20)})
    assert counts(without_heir, [A], 50) == set()


def test_record_keys_follow_one_another_by_the_log_keys_word():
    text = rotation_text(ORIGIN, "record", 5, "cmVj", "bmV3", "a year has passed")
    found = chain(created(A), rotation(5, "record", "cmVj", "bmV3", signed(A, text)))
    assert found.reasons == []
    assert [span.key for span in found.record_keys()] == ["cmVj", "bmV3"]
    assert [found.key_at("record", index).key for index in (0, 4, 5, 6)] == ["cmVj", "cmVj", "cmVj", "bmV3"]
    forged = chain(created(A), rotation(5, "record", "cmVj", "bmV3", signed(THIEF, text)))
    assert forged.key_at("record", 6).key == "cmVj"
    assert [reason.code for reason in forged.reasons] == ["key-signature"]


def test_the_bodies_are_the_events_of_the_vocabulary():
    for kind, body in ((KEY_ROTATED, KeyRotatedBody), (KEY_REVOKED, KeyRevokedBody)):
        assert EVENTS[kind].__struct_fields__ == body.__struct_fields__
    values = {"role": "log", "key": "k", "since": 3, "reason": "r", "signature": "s"}
    assert encode_body(EVENTS[KEY_REVOKED](**values)) == msgspec.json.encode(KeyRevokedBody(**values))


def test_no_signed_text_of_a_key_entry_is_a_checkpoint():
    from rlhf_audit_nb.trail.checkpoint import parse_checkpoint

    for origin in (ORIGIN, "7"):
        texts = (rotation_text(origin, "log", 1, None, "n", ""), revocation_text(origin, "log", "k", 1, ""))
        for text in texts:
            with pytest.raises(FormatError):
                parse_checkpoint(text)


def test_a_reason_of_more_than_one_line_is_refused():
    for reason in ("two\nlines", "x" * 501, "\x00", "a\u2028b"):
        with pytest.raises(FormatError) as refused:
            rotation_text(ORIGIN, "log", 1, None, "n", reason)
        assert refused.value.reason == "key-reason"


def test_the_formats_are_those_of_the_golden_file(vectors):
    """Every text, signature and answer, so that another implementation can be checked against it."""
    golden = vectors("keys")
    old, new = (
        Signer(ORIGIN, Ed25519PrivateKey.from_private_bytes(bytes.fromhex(golden["seeds"][name])))
        for name in ("old", "new")
    )
    assert (vkey(old), vkey(new)) == (golden["old"], golden["new"])
    told = golden["rotated"]
    body = told["body"]
    text = rotation_text(golden["origin"], "log", told["index"], body["old"], body["new"], body["reason"])
    assert (text, signed(old, text)) == (told["text"], body["signature"])
    gone = golden["revoked"]
    text = revocation_text(golden["origin"], "log", gone["body"]["key"], gone["body"]["since"], gone["body"]["reason"])
    assert (text, signed(new, text)) == (gone["text"], gone["body"]["signature"])
    found = chain(
        created(old),
        entry(told["index"], KEY_ROTATED, msgspec.json.encode(body)),
        entry(told["index"] + 1, KEY_REVOKED, msgspec.json.encode(gone["body"])),
    )
    assert found.reasons == []
    for case in golden["counts"]:
        trusted = parse_vkey(golden[case["trusted"]])
        keys = [format_vkey(item) for item in found.log_verifiers([trusted], case["size"])]
        assert keys == [golden[name] for name in case["keys"]], case
    statement = parse_revocation(golden["statement"])
    assert statement.signed_by([new.verifier()]) == (golden["old"], golden["new"])
    assert (statement.key, statement.since, statement.successor) == (golden["old"], 6, golden["new"])


# -- the statement apart from the trail -----------------------------------------------------------------------------


def statement(*signers: Signer, since: int = 20, successor: Signer | None = B) -> str:
    named = vkey(successor) if successor else None
    return sign_note(revocation_text(ORIGIN, "log", vkey(A), since, "stolen", successor=named), signers)


def test_a_statement_comes_back_as_it_was_written_and_is_kept(tmp_path):
    found = parse_revocation(statement(A, B))
    assert (found.key, found.since, found.successor, found.reason) == (vkey(A), 20, vkey(B), "stolen")
    assert found.signed_by([]) == (vkey(A),)
    assert found.signed_by([B.verifier()]) == (vkey(A), vkey(B))
    assert known_limits(tmp_path, ORIGIN) == {}
    path = keep_revocation(tmp_path, found)
    assert path.stat().st_mode & 0o777 == 0o600
    assert known_limits(tmp_path, ORIGIN) == {vkey(A): Limit(20, vkey(B))}
    assert known_limits(tmp_path, "example.org/other") == {}


def test_a_statement_of_a_stranger_does_not_count():
    found = parse_revocation(statement(THIEF))
    with pytest.raises(FormatError) as refused:
        found.signed_by([B.verifier()])
    assert refused.value.reason == "unsigned"
    assert parse_revocation(statement(B)).signed_by([B.verifier()]) == (vkey(B),)


def test_a_changed_statement_does_not_hold():
    with pytest.raises(FormatError) as refused:
        parse_revocation(statement(A).replace("since 20", "since 2000")).signed_by([])
    assert refused.value.reason == "signature"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rlhf-audit/key-revoked/v1", "rlhf-audit/key-revoked/v2"),
        ("since 20", "since 020"),
        ("since 20", "since -1"),
        ("role log", "role cook"),
        ("reason stolen", "reason stolen\nmore x"),
        ("reason stolen\n", ""),
        (f"origin {ORIGIN}", "origin example.org/other"),
    ],
)
def test_a_statement_in_another_form_is_refused(old, new):
    text = statement(A)
    assert old in text
    with pytest.raises(FormatError):
        parse_revocation(text.replace(old, new, 1))


@given(at=st.integers(0, 700), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_statement_that_is_changed_anywhere_is_refused_or_holds_no_longer(at, byte, cut):
    whole = statement(A, B).encode()
    at %= len(whole)
    changed = whole[:at] if cut else whole[:at] + bytes([byte]) + whole[at + 1 :]
    if changed == whole:
        return
    try:
        found = parse_revocation(changed)
    except FormatError:
        return
    assert found.note.format().encode() == changed
    # Of two signatures one may be gone or another's; what is said is still what the other one was made over.
    try:
        signers = found.signed_by([B.verifier()])
    except FormatError:
        return
    assert len(signers) == 1
    assert found.note.text == parse_revocation(whole).note.text


def test_two_statements_of_one_key_are_both_kept_and_follow_no_heir_where_they_contradict(tmp_path):
    keep_revocation(tmp_path, parse_revocation(statement(A, since=30)))
    keep_revocation(tmp_path, parse_revocation(statement(A, since=20, successor=None)))
    assert known_limits(tmp_path, ORIGIN) == {vkey(A): Limit(20, vkey(B))}
    keep_revocation(tmp_path, parse_revocation(statement(A, since=40, successor=THIEF)))
    limits = known_limits(tmp_path, ORIGIN)
    assert counts(chain(created(A), rotated(10, A, THIEF), limits=limits), [A], 15) == set()
    assert counts(chain(created(A), rotated(10, A, B), limits=limits), [A], 15) == set()


def test_a_damaged_statement_is_told_and_never_passed_over(tmp_path):
    path = keep_revocation(tmp_path, parse_revocation(statement(A)))
    path.write_bytes(path.read_bytes()[:-20] + b"\n")
    with pytest.raises(KeyFileError) as refused:
        known_limits(tmp_path, ORIGIN)
    assert refused.value.reason == "revocation"
    assert path.exists()
