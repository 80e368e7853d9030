"""A witness against a naive model of tlog-witness: random requests on several histories, with crashes between them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.witnesses import Log, check_cosignature, tree

from rlhf_audit_nb.trail.note import parse_note
from rlhf_audit_nb.trail.witness import Witness

LENGTH = 14
WHOLE = Log("log.example/a").grow(LENGTH)
HISTORIES = [WHOLE, WHOLE.forked(3, "b"), WHOLE.forked(8, "c")]
SIZES = st.integers(0, LENGTH)


class WitnessMachine(RuleBasedStateMachine):
    """The witness, and what tlog-witness says of each request, from one remembered head alone."""

    @initialize()
    def make(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="rlhf-audit-witness-"))
        self.witness = Witness.create(self.place / "w", "witness.example/alice")
        self.witness.add_log(WHOLE.vkey)
        self.size, self.root = 0, tree([])
        self.given: dict[int, set[bytes]] = {}

    def teardown(self) -> None:
        if hasattr(self, "place"):
            shutil.rmtree(self.place)

    def expected(self, old: int, size: int, proof: list[bytes], history: Log) -> int:
        root = tree(history.leaves[:size])
        if old > size:
            return 400
        if old != self.size:
            return 409
        # A proof is right where it is the one and the remembered tree is a prefix of this history.
        prefix = tree(history.leaves[:old]) == self.root
        return 200 if prefix and proof == history.proof(old, size) and (old != size or root == self.root) else 422

    def ask(self, old: int, size: int, proof: list[bytes], history: Log) -> None:
        from support.witnesses import b64

        lines = "".join(b64(node) + "\n" for node in proof)
        body = f"old {old}\n{lines}\n{history.head(size)}".encode()
        expected = self.expected(old, size, proof, history)
        reply = self.witness.add_checkpoint(body)
        assert reply.status == expected, reply.said
        if expected == 409:
            assert reply.body == b"%d\n" % self.size
        if expected == 200:
            self.size, self.root = size, tree(history.leaves[:size])
            self.given.setdefault(size, set()).add(self.root)
            check_cosignature(reply.body.decode().strip(), parse_note(history.head(size)).text, self.witness.vkeys[0])

    @rule(size=SIZES, which=st.sampled_from(HISTORIES))
    def next_checkpoint(self, size: int, which: Log) -> None:
        """What an honest client of that history asks for."""
        old = min(self.size, size)
        self.ask(old, size, which.proof(old, size), which)

    @rule(old=SIZES, size=SIZES, which=st.sampled_from(HISTORIES))
    def any_checkpoint(self, old: int, size: int, which: Log) -> None:
        self.ask(old, size, which.proof(old, size) if old <= size else [], which)

    @rule(size=SIZES, which=st.sampled_from(HISTORIES), other=st.sampled_from(HISTORIES), cut=st.integers(0, 3))
    def another_proof(self, size: int, which: Log, other: Log, cut: int) -> None:
        old = min(self.size, size)
        proof = other.proof(old, size)
        self.ask(old, size, proof[: len(proof) - cut] if cut else proof, which)

    @rule()
    def opened_again(self) -> None:
        self.witness = Witness.open(self.place / "w")

    @rule(key=st.sampled_from([WHOLE.vkey, Log("log.example/other").vkey]))
    def know_a_log(self, key: str) -> None:
        self.witness.add_log(key)

    @invariant()
    def it_never_signs_two_histories(self) -> None:
        if not hasattr(self, "given"):
            return
        assert all(len(roots) == 1 for roots in self.given.values())
        ways = [h for h in HISTORIES if all(roots == {tree(h.leaves[:size])} for size, roots in self.given.items())]
        assert ways
        assert self.witness.size(WHOLE.origin) == self.size == max(self.given, default=0)


WitnessMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_a_witness_does_what_the_protocol_says_whatever_is_asked = WitnessMachine.TestCase
