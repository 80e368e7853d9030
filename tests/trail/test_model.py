"""The trail against a naive model: a list of entries, kept by hand."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rlhf_audit_nb.trail import Level, Trail, verify_trail
from rlhf_audit_nb.trail.merkle import check_consistency, check_inclusion, leaf_hash

RUNS = st.sampled_from(["r1", "r2", None])


class Refused(Exception):
    pass


class TrailMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.trail = self.opened()
        self.model: list[tuple[str | None, bytes]] = []
        self.number = 0
        self.heads: list[tuple[int, bytes]] = []

    def opened(self) -> Trail:
        return Trail.open(self.place / "audit", home=self.place / "home")

    def body(self) -> bytes:
        self.number += 1
        return b'{"n":%d}' % self.number

    @rule(run=RUNS, count=st.integers(1, 300), private=st.booleans())
    def append(self, run, count, private):
        for _ in range(count):
            body = self.body()
            self.trail.append("a.b", body, run=run, private=body if private else None)
            self.model.append((run, body))

    @rule(run=RUNS, refuse=st.booleans())
    def guarded(self, run, refuse):
        def body(reader) -> bytes:
            assert reader.size == len(self.model) + 1
            if refuse:
                raise Refused
            return made

        made = self.body()
        try:
            entry = self.trail.append_guarded("a.b", body, run=run)
        except Refused:
            assert refuse
            return
        self.model.append((run, made))
        assert entry.index == len(self.model)

    @rule()
    def reopen(self):
        self.trail.close()
        self.trail = self.opened()

    @rule(data=st.data())
    def prove(self, data):
        reader = self.trail.reader()
        size = data.draw(st.integers(1, reader.size))
        index = data.draw(st.integers(0, size - 1))
        (entry,) = reader.entries(index, index + 1)
        root = reader.root(size)
        assert check_inclusion(leaf_hash(entry.data), index, size, reader.inclusion_proof(index, size), root)
        for old_size, old_root in self.heads:
            assert check_consistency(old_size, reader.size, reader.consistency_proof(old_size), old_root, reader.root())
        self.heads.append((reader.size, reader.root()))

    @rule(run=RUNS)
    def query(self, run):
        found = [(entry.run, entry.body) for entry in self.trail.reader().entries(type="a.b", run=run)]
        assert found == [item for item in self.model if run is None or item[0] == run]

    @invariant()
    def the_window_is_bounded(self):
        assert 0 <= self.trail.status().unsynced <= 1000

    def teardown(self):
        self.trail.close()
        verdict = verify_trail(self.place / "audit", home=self.place / "home")
        assert (verdict.level, verdict.reasons, verdict.size) == (Level.UNANCHORED, (), len(self.model) + 1)
        shutil.rmtree(self.place)


TrailMachine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTheTrailAgreesWithAListKeptByHand = TrailMachine.TestCase
