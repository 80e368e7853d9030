"""The whole trail against a naive model: lists of entries, kept by hand.

Appending in every way, a process that is killed, opening anew, other keys, erasing, publishing, a witness, and older
copies put in the trail's place, in any order; after each the trail must be what the lists say. The seed stands in the
output of a failure; ``RLHF_AUDIT_MODEL_SEED=N`` plays it again.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy, verify_trail
from rlhf_audit_nb.trail.anchoring import add_anchor, request_cosignature
from rlhf_audit_nb.trail.erasure import erase
from rlhf_audit_nb.trail.merkle import check_consistency, check_inclusion, leaf_hash
from rlhf_audit_nb.trail.published import verify_published
from rlhf_audit_nb.trail.query import Filter, Look
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.tiles import publish_tiles
from rlhf_audit_nb.trail.witness import Witness
from rlhf_audit_nb.trail.writer import Draft

SEED = int(os.environ.get("RLHF_AUDIT_MODEL_SEED") or random.SystemRandom().randrange(1 << 32))
KIND = "a.b"
RUNS = st.sampled_from(["r1", "r2", None])
OWNERS = st.sampled_from([None, "ann", "bob"])


class Refused(Exception):
    pass


@dataclass
class Item:
    """An entry as the model has it; ``private`` where it has a private half, ``erased`` where that is gone."""

    run: str | None
    body: bytes
    private: bool = False
    owner: str | None = None
    erased: bool = False


@dataclass
class Copy:
    """An older copy of the trail's folder."""

    folder: Path
    size: int
    changes: tuple[int, int]


class TrailMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="trail-model-"))
        self.folder, self.home = self.place / "audit", self.place / "home"
        self.trail = self.opened()
        self.witness = Witness.create(self.place / "witness", "witness.example/one")
        self.witness.add_log(self.trail.log_vkey)
        line = f"log {self.trail.log_vkey}\nwitness one {self.witness.vkeys[0]}\nquorum one\n"
        self.policy = TrustPolicy.parse(line)
        self.model: list[Item] = []
        self.number = 0
        self.heads: list[tuple[int, bytes]] = []
        self.others = {"trail.created": 1, "key.rotated": 0, "vault.erased": 0, "run.started": 0, "run.interrupted": 0}
        self.left_open = 0
        self.cosigned = 0
        self.copy: Copy | None = None

    def opened(self) -> Trail:
        return Trail.open(self.folder, home=self.home)

    def body(self) -> bytes:
        self.number += 1
        return b'{"n":%d}' % self.number

    def size(self) -> int:
        return len(self.model) + sum(self.others.values())

    # Appending.

    @rule(run=RUNS, owner=OWNERS, count=st.integers(1, 40), private=st.booleans())
    def append(self, run, owner, count, private):
        for _ in range(count):
            body = self.body()
            self.trail.append(KIND, body, run=run, private=body if private else None, owner=owner)
            self.model.append(Item(run, body, private, owner))

    @rule(run=RUNS, owner=OWNERS, count=st.integers(0, 600), private=st.booleans())
    def append_many(self, run, owner, count, private):
        bodies = [self.body() for _ in range(count)]
        drafts = [Draft(KIND, body, run, body if private else None, owner) for body in bodies]
        indexes = list(self.trail.append_many(drafts))
        assert len(indexes) == count
        self.model += [Item(run, body, private, owner) for body in bodies]
        if count:
            assert indexes[-1] == self.size() - 1

    @rule(run=RUNS, refuse=st.booleans())
    def guarded(self, run, refuse):
        def body(reader) -> bytes:
            assert reader.size == self.size()
            if refuse:
                raise Refused
            return made

        made = self.body()
        try:
            entry = self.trail.append_guarded(KIND, body, run=run)
        except Refused:
            assert refuse
            return
        self.model.append(Item(run, made))
        assert entry.index == self.size() - 1

    # A process that is killed in the middle of its work, and what opening says of it.

    @rule(run=RUNS, count=st.integers(1, 30), durable=st.integers(0, 30), starts=st.booleans(), private=st.booleans())
    def crash(self, run, count, durable, starts, private):
        self.trail.flush()
        durable = min(count, durable)
        bodies = [self.body() for _ in range(count)]
        name = f"crashed-{self.number}"
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                if starts:
                    self.trail.append("run.started", b"{}", run=name).wait()
                for done, body in enumerate(bodies, 1):
                    pending = self.trail.append(KIND, body, run=run, private=body if private else None)
                    if done == durable:
                        pending.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        found = [entry.body for entry in TrailReader.open(self.folder).entries(type=KIND)][len(self.model) :]
        assert len(found) >= durable
        assert found == bodies[: len(found)]
        self.model += [Item(run, body, private) for body in found]
        self.others["run.started"] += starts
        self.left_open += starts

    @rule()
    def reopen(self):
        self.trail.close()
        self.trail = self.opened()
        assert len(self.trail.recovery.interrupted) == self.left_open
        self.others["run.interrupted"] += self.left_open
        self.left_open = 0

    # Keys, private halves.

    @rule(role=st.sampled_from(["log", "record", "mldsa"]))
    def rotate(self, role):
        rotate_key(self.trail, role, reason="planned")
        self.others["key.rotated"] += 1
        if role == "log":
            self.witness.add_log(self.trail.log_vkey)

    def owners(self) -> list[str]:
        """Whom the vault holds something of."""
        return sorted({item.owner for item in self.model if item.private and item.owner and not item.erased})

    @precondition(lambda self: self.owners())
    @rule(data=st.data())
    def forget(self, data):
        owner = data.draw(st.sampled_from(self.owners()))
        theirs = [item for item in self.model if item.private and item.owner == owner and not item.erased]
        self.trail.flush()
        erase(self.trail, owner, reason="withdrawn")
        self.others["vault.erased"] += 1
        for item in theirs:
            item.erased = True

    # Others.

    @rule()
    def cosign(self):
        self.trail.flush()
        reply = self.witness.add_checkpoint(request_cosignature(self.folder, self.witness.size(self.trail.origin)))
        assert reply.status == 200, reply.said
        note = TrailReader.open(self.folder).checkpoint() + reply.body.decode()
        add_anchor(self.folder, note.encode(), policy=self.policy, home=self.home)
        self.cosigned = self.size()

    @rule()
    def publish(self):
        self.trail.flush()
        publish_tiles(self.folder, self.place / "www")
        verdict = verify_published(self.place / "www", policy=self.policy, home=self.home)
        self.agrees(verdict, self.level(), open_runs=self.left_open)

    @rule()
    def keep_a_copy(self):
        self.trail.close()
        target = self.place / "older"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.folder, target)
        self.copy = Copy(target, self.size(), (self.others["key.rotated"], self.others["vault.erased"]))
        self.trail = self.opened()
        self.others["run.interrupted"] += self.left_open
        self.left_open = 0

    @precondition(lambda self: self.copy is not None)
    @rule(goes_on=st.booleans())
    def put_the_copy_in_its_place(self, goes_on):
        copy = self.copy
        assert copy is not None
        self.trail.close()
        # What a killed process appended is not in the memory until somebody looks: writers remember every two seconds.
        verify_trail(self.folder, policy=self.policy, home=self.home)
        away = self.place / "away"
        self.folder.rename(away)
        shutil.copytree(copy.folder, self.folder)
        try:
            if copy.size < self.size():
                self.an_older_copy(copy, goes_on=goes_on)
        finally:
            shutil.rmtree(self.folder)
            away.rename(self.folder)
        self.trail = self.opened()
        self.others["run.interrupted"] += self.left_open
        self.left_open = 0

    def an_older_copy(self, copy, *, goes_on):
        found = verify_trail(self.folder, policy=self.policy, home=self.home)
        assert (found.level, found.size) == (Level.DIVERGED, copy.size)
        assert "rollback" in {reason.code for reason in found.reasons}
        changes = (self.others["key.rotated"], self.others["vault.erased"])
        if copy.changes == changes:
            with pytest.raises(StoreError) as caught:
                self.opened()
            assert caught.value.reason == "diverged"
        if not goes_on or copy.changes != changes:
            return
        forgetful = self.place / "forgetful"
        shutil.copytree(self.home, forgetful)
        shutil.rmtree(forgetful / "heads")
        try:
            with Trail.open(self.folder, home=forgetful) as trail:
                trail.append_many(Draft(KIND, b'{"forged":%d}' % n) for n in range(self.size() - copy.size + 2))
            forked = verify_trail(self.folder, policy=self.policy, home=self.home)
            assert forked.level is Level.DIVERGED
            assert "fork" in {reason.code for reason in forked.reasons}
            if self.cosigned > copy.size:
                origin = self.trail.origin
                reply = self.witness.add_checkpoint(request_cosignature(self.folder, self.witness.size(origin)))
                assert reply.status != 200
        finally:
            shutil.rmtree(forgetful)

    # Looking.

    def level(self) -> Level:
        return Level.COSIGNED if self.cosigned == self.size() else Level.UNANCHORED

    def agrees(self, verdict, level, *, open_runs):
        expected = {"quorum"} if level is Level.UNANCHORED else set()
        expected |= {"run-open"} if open_runs else set()
        assert ({reason.code for reason in verdict.reasons}, verdict.level) == (expected, level), str(verdict)
        assert verdict.size == self.size()

    @rule(opening=st.booleans())
    def verify(self, opening):
        self.trail.flush()
        verdict = verify_trail(self.folder, policy=self.policy, home=self.home, openings=opening)
        self.agrees(verdict, self.level(), open_runs=self.left_open)
        private = [item for item in self.model if item.private]
        gone = sum(item.erased for item in private)
        found = verdict.openings or {"commitments": 0, "openings": 0, "erased": 0, "missing": 0}
        counts = [found[name] for name in ("commitments", "openings", "erased", "missing")]
        assert counts == [len(private), len(private) - gone, gone, 0]

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
        self.trail.flush()
        expected = [item.body for item in self.model if run is None or item.run == run]
        assert [entry.body for entry in TrailReader.open(self.folder).entries(type=KIND, run=run)] == expected
        assert [entry.body for entry in Look(self.folder).query(Filter(type=KIND, run=run))] == expected

    @invariant()
    def the_window_is_bounded(self):
        assert 0 <= self.trail.status().unsynced <= 1000

    def teardown(self):
        try:
            self.verify(opening=True)
            self.query(None)
            self.trail.close()
            kinds: dict[str, int] = {}
            for entry in TrailReader.open(self.folder).entries():
                kinds[entry.type] = kinds.get(entry.type, 0) + 1
            expected = {**self.others, KIND: len(self.model)}
            assert kinds == {kind: count for kind, count in expected.items() if count}
        finally:
            with contextlib.suppress(Exception):
                self.trail.close()
            shutil.rmtree(self.place)


def play(machine, examples: int, steps: int, number: int = SEED, phases=tuple(Phase)) -> None:
    print(f"RLHF_AUDIT_MODEL_SEED={number}")
    bounds = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=phases,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(machine), settings=bounds)


def test_the_trail_agrees_with_lists_that_are_kept_by_hand():
    play(TrailMachine, examples=25, steps=25)


@pytest.mark.slow
def test_the_trail_agrees_with_lists_that_are_kept_by_hand_for_longer():
    play(TrailMachine, examples=30, steps=40, number=SEED + 1)


# Whether the machine would see it: faults of the kind that it is there for.


def an_entry_is_lost_now_and_then(patch):
    append = Trail.append

    def losing(self, kind, body, **options):
        return append(self, kind, b"{}" if body.endswith(b"37}") else body, **options)

    patch.setattr(Trail, "append", losing)


def an_older_copy_is_not_noticed(patch):
    patch.setattr("rlhf_audit_nb.trail.verify.compare_with_seen", lambda *_: None)


def a_run_of_a_dead_process_is_taken_for_living(patch):
    patch.setattr("rlhf_audit_nb.trail.trail.is_alive", lambda *_: True)


def what_was_erased_counts_as_missing(patch):
    patch.setattr("rlhf_audit_nb.trail.openings.OpeningsCheck._accounted", lambda *_: set())


def the_old_key_goes_on_signing_after_a_rotation(patch):
    patch.setattr(Trail, "use_signers", lambda *_: None)


@pytest.mark.parametrize(
    "plant",
    [
        an_entry_is_lost_now_and_then,
        an_older_copy_is_not_noticed,
        a_run_of_a_dead_process_is_taken_for_living,
        what_was_erased_counts_as_missing,
        the_old_key_goes_on_signing_after_a_rotation,
    ],
)
def test_a_fault_that_is_planted_is_found(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 (whatever the fault breaks first)
        play(TrailMachine, examples=60, steps=30, number=1, phases=(Phase.generate,))
