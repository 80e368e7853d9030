"""One training in several processes: one writes, the others' evidence is gathered, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny import shared_folder

from rlhf_audit_nb.capture import rank_exchange
from rlhf_audit_nb.capture.rank_evidence import Evidence, compare, hear_rows
from rlhf_audit_nb.capture.rank_exchange import Exchange, Identity
from rlhf_audit_nb.capture.ranks import Birth, Place, Ranks, find_place, training_in_ranks
from rlhf_audit_nb.capture.silent import SilentTrail
from rlhf_audit_nb.errors import RunError
from rlhf_audit_nb.events import (
    DataBound,
    ModelBound,
    RankReported,
    RanksFormed,
    RunFinished,
    Step,
    decode_body,
)
from rlhf_audit_nb.trail import Level, TrailReader, verify_trail

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "ranks.py"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")


# --- who am I --------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_that_nobody_launched_is_alone(alone):
    assert find_place() is None


def test_a_launcher_says_in_the_environment_which_process_this_is(alone):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        alone.setenv(name, value)
    assert find_place() == Place(3, 4, 1)


def test_mpi_says_so_as_well(alone):
    alone.setenv("OMPI_COMM_WORLD_RANK", "0")
    alone.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert find_place() == Place(0, 2, None)


@pytest.mark.parametrize(("rank", "size"), [("0", "1"), ("2", "2"), ("-1", "2"), ("", "2"), ("one", "two"), ("0", "")])
def test_an_environment_of_one_process_or_of_none_counts_as_alone(alone, rank, size):
    alone.setenv("RANK", rank)
    alone.setenv("WORLD_SIZE", size)
    assert find_place() is None


def test_finding_out_imports_no_torch_and_initialises_nothing():
    code = (
        "import sys; from rlhf_audit_nb.capture.ranks import find_place; "
        "print(find_place(), 'torch' in sys.modules, 'accelerate' in sys.modules)"
    )
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "Place(rank=1, world_size=2, local_rank=1) False False"


# --- a trail that keeps nothing --------------------------------------------------------------------------------------


def test_a_silent_trail_takes_everything_keeps_nothing_and_refuses_the_rest_in_a_sentence():
    trail = SilentTrail(1, 2)
    assert trail.append("train.step", b"{}", run="a" * 32).wait() == -1
    assert trail.taken == {"train.step": 1}
    assert list(trail.reader().entries(type="train.step")) == []
    assert trail.status().size == 0
    with pytest.raises(RunError, match="Process 1 of 2 keeps no trail, so it has no keys") as refused:
        _ = trail.keys
    assert refused.value.reason == "silent-rank"


# --- evidence --------------------------------------------------------------------------------------------------------


def bound(rows=3):
    return DataBound(role="train", columns=["prompt"], provenance="unknown", rows=rows, digest="a" * 64)


def model(role, digest):
    return ModelBound(
        role=role, architecture="A", parameters=1, trainable=1, weights_digest=digest, config_digest="c" * 64
    )


def evidence(*events, strategy="replicated"):
    found = Evidence()
    found.strategy = strategy
    with found.training():
        for event in events:
            found.saw(event)
    return found


def step(number, digest, loss=1.0):
    return Step(step=number, metrics={"loss": loss}, weights_digest=digest)


def test_equal_digests_at_every_common_point_are_equal_weights():
    events = [bound(), model("base", "0" * 64), step(1, "1" * 64), model("final", "2" * 64)]
    mine, other = (evidence(*events).word(rank, rank, 1, final=True) for rank in (0, 1))
    found = compare(mine, other)
    assert (found.weights, found.compared, found.diverged_at, found.differs) == ("equal", 3, None, [])


def test_the_first_point_at_which_weights_differ_is_named():
    mine = evidence(model("base", "0" * 64), step(1, "1" * 64), step(2, "2" * 64), model("final", "3" * 64))
    other = evidence(model("base", "0" * 64), step(1, "1" * 64), step(2, "9" * 64), model("final", "8" * 64))
    found = compare(mine.word(0, 0, 2, final=True), other.word(1, 1, 2, final=True))
    assert (found.weights, found.compared, found.diverged_at) == ("diverged", 4, "step 2")


def test_weights_that_no_process_holds_whole_are_not_compared():
    mine, other = (evidence(step(1, digit * 64), strategy="fsdp").word(0, 0, 1, final=True) for digit in "12")
    assert compare(mine, other).weights == "not compared"


def test_no_common_point_is_not_called_equal():
    mine, other = evidence(step(1, None)), evidence(step(1, None))
    assert compare(mine.word(0, 0, 1, final=True), other.word(1, 1, 1, final=True)).weights == "not compared"


def test_another_data_set_and_another_version_are_named():
    mine = evidence(bound(3)).word(0, 0, 0, final=True)
    other = evidence(bound(4)).word(1, 1, 0, final=True)
    mine.environment, other.environment = {"packages.torch": "2.13"}, {"packages.torch": "2.12", "threads": "1"}
    assert compare(mine, other).differs == ["data.bound", "packages.torch", "threads"]


def test_the_loss_is_the_rank_s_own_and_one_that_is_no_number_stays_visible():
    word = evidence(step(1, None, 3.0), step(2, None, 1.0)).word(1, 1, 2, final=True)
    assert word.loss == {"first": 3.0, "last": 1.0, "mean": 2.0}
    assert evidence(step(1, None, "NaN")).word(1, 1, 1).loss == {"first": "NaN", "last": "NaN", "mean": "NaN"}


class _Trainer:
    """As much of a trainer as draws batches, four rows ahead, and trains on them."""

    def __init__(self, batches):
        class Given:
            def __iter__(self):
                yield from batches

        self.sampler = Given()

    def get_train_dataloader(self):
        return SimpleNamespace(batch_sampler=self.sampler)

    def training_step(self, batch):
        return batch


def epoch(trainer, take=None):
    drawn = list(trainer.get_train_dataloader().batch_sampler)  # fetched ahead
    for batch in drawn[:take]:
        trainer.training_step(batch)


def heard(batches, *takes, resumed=False):
    trainer, found = _Trainer(batches), Evidence()
    with hear_rows(trainer, found, resumed=resumed):
        for take in takes:
            epoch(trainer, take)
    assert vars(trainer) == {"sampler": trainer.sampler}  # the methods are put back
    return found.word(1, 1, 0, final=True)


def test_rows_count_when_they_are_trained_on_and_not_when_they_are_fetched():
    import hashlib

    word = heard([[0, 2], [4, 6], [8]], None, 1)
    assert (word.batches, word.rows) == (4, 7)
    assert word.rows_digest == hashlib.sha256(b"0,2\n4,6\n8\n0,2\n").hexdigest()


def test_the_rows_of_a_resumed_training_are_not_guessed():
    word = heard([[0, 2], [4, 6]], None, resumed=True)
    assert (word.batches, word.rows, word.rows_digest) == (2, None, None)


# --- the exchange ----------------------------------------------------------------------------------------------------


class _Store(dict):
    """A store as torch's, in memory."""

    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key]


def test_a_store_that_does_not_answer_is_given_up_once_and_for_all(monkeypatch):
    monkeypatch.setattr(rank_exchange, "PATIENCE_S", 0.2)
    hanging = threading.Event()
    store = SimpleNamespace(check=lambda _keys: hanging.wait(20))
    exchange = Exchange(store, "r")
    began = time.monotonic()
    assert [exchange.get("1") for _ in range(50)] == [None] * 50
    assert time.monotonic() - began < 5
    assert exchange.failure == "no answer"
    hanging.set()


def test_a_store_whose_host_is_gone_fails_quietly_and_says_how():
    def broken(*_):
        raise ConnectionResetError

    exchange = Exchange(SimpleNamespace(set=broken, check=broken), "r")
    assert exchange.put("1", b"x") is False
    assert exchange.failure == "ConnectionResetError"


def test_a_process_that_ended_is_known_to_be_gone_and_one_that_lives_is_not():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = Identity.mine()
    theirs = Identity(child.pid, rank_exchange.started(child.pid) or "", mine.machine, mine.namespace)
    assert not theirs.is_gone()
    assert not mine.is_gone()
    child.kill()
    deadline = time.monotonic() + 10
    while not theirs.is_gone() and time.monotonic() < deadline:  # also while nobody has waited for it
        time.sleep(0.01)
    assert theirs.is_gone()
    child.communicate()
    elsewhere = Identity(theirs.pid, theirs.started, "another machine", theirs.namespace)
    assert not elsewhere.is_gone()


class _Run:
    """As much of a run as its processes need."""

    def __init__(self, rank, size=3):
        self.id = "0" * 31 + str(rank)
        self.experiment, self.steps, self.private = "e", 2, False
        self.trail = SilentTrail(rank, size)
        self.state = SimpleNamespace(run_id=self.id)
        self.recorded, self.warned = [], []

    def record(self, event):
        self.recorded.append(event)

    def warn(self, sentence):
        self.warned.append(sentence)


@pytest.fixture
def three(monkeypatch):
    """Three processes of one run in this one, with a store between them."""
    store = _Store()
    monkeypatch.setattr("rlhf_audit_nb.capture.ranks.default_store", lambda: store)
    monkeypatch.setenv("RLHF_AUDIT_RANKS_WAIT", "0.3")
    monkeypatch.setattr("rlhf_audit_nb.capture.ranks._opened", {})
    runs = [_Run(rank) for rank in range(3)]
    ranks = []
    for rank, run in enumerate(runs):
        monkeypatch.setattr("rlhf_audit_nb.capture.ranks._opened", {})
        ranks.append(Ranks(Place(rank, 3, rank), "e", run.trail))
        ranks[-1].opened(run)
    return SimpleNamespace(store=store, runs=runs, ranks=ranks)


def reports(run):
    return {event.rank: event for event in run.recorded if isinstance(event, RankReported)}


def test_all_processes_of_a_run_take_the_id_of_the_one_that_writes(three):
    assert {run.id for run in three.runs} == {"0" * 32}


def test_one_that_reports_one_that_only_began_and_how_long_is_waited(three):
    three.ranks[1].ended(three.runs[1], "failed", ZeroDivisionError("a secret"))
    began = time.monotonic()
    three.ranks[0].ended(three.runs[0], "completed", None)
    assert 0.3 <= time.monotonic() - began < 5
    found = reports(three.runs[0])
    assert [(found[rank].heard, found[rank].status, found[rank].reason) for rank in range(3)] == [
        ("reported", "completed", None),
        ("reported", "failed", "ZeroDivisionError"),
        ("late", None, None),
    ]
    assert reports(three.runs[1]) == {}


def test_where_the_process_is_told_to_end_what_was_heard_until_then_stands(three):
    three.ranks[1].ended(three.runs[1], "completed", None)
    three.ranks[0].process_ends(three.runs[0], "SIGTERM")
    three.ranks[0].ended(three.runs[0], "completed", None)  # what the main thread was about to say comes too late
    found = [event for event in three.runs[0].recorded if isinstance(event, RankReported)]
    assert [(event.heard, event.status, event.reason) for event in found] == [
        ("reported", "interrupted", "SIGTERM"),
        ("reported", "completed", None),
        ("late", None, None),
    ]


def test_a_difference_that_was_seen_on_the_way_stays_though_its_digest_is_not_kept(three, monkeypatch):
    monkeypatch.setattr("rlhf_audit_nb.capture.rank_evidence.MAX_POINTS", 2)
    for rank in (1, 0):
        three.ranks[rank].evidence.strategy = "replicated"
        three.ranks[rank].saw(three.runs[rank], step(1, str(rank) * 64))
    assert len(three.runs[0].warned) == 1
    for rank in (1, 0):
        for number in range(2, 5):
            three.ranks[rank].evidence.saw(step(number, "7" * 64))
    three.ranks[1].ended(three.runs[1], "completed", None)
    three.ranks[0].ended(three.runs[0], "completed", None)
    found = reports(three.runs[0])[1]
    assert (found.weights, found.compared, found.diverged_at) == ("diverged", 2, "step 1")


def test_one_that_never_came_and_one_whose_word_cannot_be_read_are_shown_as_such(three):
    three.store.clear()
    three.store["rlhf-audit/" + three.ranks[0]._key + "/2"] = b"{not ours"
    three.ranks[0].ended(three.runs[0], "completed", None)
    assert [event.heard for event in reports(three.runs[0]).values()] == ["reported", "never", "never"]


def test_without_a_process_group_nothing_is_waited_for(monkeypatch):
    monkeypatch.setattr("rlhf_audit_nb.capture.ranks.default_store", lambda: None)
    run, other = _Run(0), _Run(1)
    began = time.monotonic()
    Ranks(Place(0, 3, 0), "e", run.trail).ended(run, "completed", None)
    Ranks(Place(1, 3, 1), "e", other.trail).ended(other, "completed", None)
    assert time.monotonic() - began < 5
    assert [event.heard for event in reports(run).values()] == ["reported", "never", "never"]
    assert "there is no process group" in other.warned[0]


def test_a_run_that_was_opened_too_early_to_know_says_so_and_is_still_gathered(three, monkeypatch):
    run = _Run(0)
    run.ranks, run.birth = None, Birth.now()
    trainer = SimpleNamespace(
        args=SimpleNamespace(device=SimpleNamespace(type="cpu")),
        is_deepspeed_enabled=False,
        is_fsdp_enabled=False,
        model=SimpleNamespace(parameters=list),
        get_train_dataloader=None,
        training_step=None,
    )
    monkeypatch.setattr("rlhf_audit_nb.capture.ranks.find_place", lambda: Place(0, 3, 0))
    with training_in_ranks(run, trainer, resumed=False):
        pass
    formed = [event for event in run.recorded if isinstance(event, RanksFormed)]
    assert [(event.world_size, event.late) for event in formed] == [(3, True)]
    assert "before its process could know that it is rank 0 of 3" in run.warned[0]
    run.ranks.ended(run, "completed", None)
    assert len(reports(run)) == 3


def test_what_other_parts_measure_in_a_rank_stands_with_it(three):
    three.ranks[1].add("compute", {"flop": 5})
    for rank in (2, 1, 0):
        three.ranks[rank].ended(three.runs[rank], "completed", None)
    assert reports(three.runs[0])[1].more == {"compute": {"flop": 5}}
    assert [event.heard for event in reports(three.runs[0]).values()] == ["reported"] * 3


# --- real processes --------------------------------------------------------------------------------------------------


def launch(arguments, folder):
    """Run the script of `support.ranks`, bounded; returns how long it took."""
    shared_folder()
    tests = str(SCRIPT.parents[1])
    path = os.pathsep.join([str(SCRIPT.parents[2]), tests, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "RLHF_AUDIT_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    for name in LAUNCHERS:
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=tests, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def read(folder):
    """The trail's events with their runs, and what each process left."""
    reader = TrailReader.open(folder / "audit")
    events = [(entry.run, decode_body(entry.type, entry.body)) for entry in reader.entries()]
    left = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("RLHF_AUDIT_HOME", str(folder.parent / "home"))
        verdict = verify_trail(folder / "audit")
    return SimpleNamespace(events=events, left=left, verdict=verdict)


def of(found, kind):
    return [event for _, event in found.events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A training under torchrun."""
    folder = tmp_path_factory.mktemp("torchrun") / "healthy"
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launch([*launcher, str(SCRIPT), "train", str(folder), "healthy"], folder.parent)
    return SimpleNamespace(folder=folder, **vars(read(folder)))


@pytest.fixture(scope="module")
def trouble(tmp_path_factory):
    """Trainings in which something goes wrong, and those that notebooks launch, in one go."""
    folder = tmp_path_factory.mktemp("ranks")
    scenarios = ["diverges", "killed", "raises", "notebook", "private"]
    launch([str(SCRIPT), "all", str(folder), *scenarios], folder)
    return folder


def test_two_processes_leave_one_run_with_one_entry_for_each_step(healthy):
    assert {run for run, _ in healthy.events} == {None, healthy.left["0"]["run"]}
    assert healthy.left["1"]["run"] == healthy.left["0"]["run"]
    assert [event.step for event in of(healthy, Step)] == [1, 2, 3, 4]
    assert [event.role for event in of(healthy, ModelBound)] == ["base", "final"]
    assert [event.status for event in of(healthy, RunFinished)] == ["completed"]
    assert healthy.verdict.level is Level.UNANCHORED
    assert not healthy.verdict.reasons


def test_the_run_says_that_it_is_two_processes_and_whose_its_loss_is(healthy):
    assert of(healthy, RanksFormed) == [
        RanksFormed(world_size=2, rank=0, backend="gloo", strategy="replicated", loss="rank 0", launcher="torchrun")
    ]
    mine = of(healthy, RankReported)[0]
    losses = [event.metrics["loss"] for event in of(healthy, Step)]
    assert mine.loss["first"] == losses[0]
    assert mine.loss["mean"] == pytest.approx(sum(losses) / 4)
    assert of(healthy, RankReported)[1].loss["first"] != losses[0]


def test_the_evidence_of_both_processes_is_there_and_their_weights_are_equal(healthy):
    mine, other = of(healthy, RankReported)
    assert [(event.rank, event.heard, event.status, event.steps) for event in (mine, other)] == [
        (0, "reported", "completed", 4),
        (1, "reported", "completed", 4),
    ]
    assert (mine.weights, other.weights, other.compared, other.diverged_at) == ("reference", "equal", 6, None)
    assert other.final_weights == of(healthy, ModelBound)[1].weights_digest
    assert other.differs == []
    assert other.node == 0
    assert min(other.seconds, other.peak_memory_bytes) > 0


def test_each_process_tells_which_rows_it_trained_on_also_where_one_comes_short(healthy):
    import hashlib

    # Batches of two rows in turn: nine of 18 rows, so that rank 1 begins again at the front to end with rank 0.
    # Two epochs: three steps of five batches, then two batches more.
    rows = [[0, 4, 8, 12, 16, 0, 4], [2, 6, 10, 14, 0, 2, 6]]
    for event, firsts in zip(of(healthy, RankReported), rows, strict=True):
        expected = "".join(f"{first},{first + 1}\n" for first in firsts)
        assert (event.batches, event.rows) == (7, 14)
        assert event.rows_digest == hashlib.sha256(expected.encode()).hexdigest()


def test_what_only_one_process_would_have_written_shows_in_its_counts(healthy):
    mine, other = (dict(event.entries) for event in of(healthy, RankReported))
    assert (other.pop("annotation.recorded"), other.pop("annotations.imported")) == (1, 1)
    assert mine.pop("weights.saved") == 1
    assert mine == other


def test_a_process_that_does_not_write_makes_no_trail_and_no_keys(healthy):
    assert not (healthy.folder / "nobody").exists()
    assert [path.name for path in (healthy.folder / "model").glob("*/model.sig")] == ["model.sig"]


def test_privacy_is_refused_by_name_in_every_process_before_there_is_even_a_trail(healthy):
    for rank in "01":
        reason, sentence, trail_existed = healthy.left[rank]["private"]
        assert reason == "several-processes"
        assert f"rank {rank} of 2" in sentence
        assert not trail_existed or rank == "1"  # rank 0 may have gone on already


def test_a_rank_whose_weights_left_those_of_the_others_is_named(trouble):
    found = read(trouble / "diverges")
    other = of(found, RankReported)[1]
    assert (other.weights, other.diverged_at, other.heard) == ("diverged", "step 3", "reported")
    assert "weights of rank 1 are not those of rank 0" in found.left["0"]["warnings"][0]
    assert found.verdict.level is Level.UNANCHORED


def test_a_rank_that_was_killed_is_lost_and_nobody_waits_for_it(trouble):
    found = read(trouble / "killed")
    other = of(found, RankReported)[1]
    assert (other.rank, other.heard, other.status) == (1, "lost", None)
    assert [event.status for event in of(found, RunFinished)] == ["failed"]
    assert found.left["0"]["ended"] - found.left["1"]["ended"] < 20
    assert found.verdict.level is Level.UNANCHORED
    assert not found.verdict.reasons


def test_a_rank_that_raised_says_with_what(trouble):
    other = of(read(trouble / "raises"), RankReported)[1]
    assert (other.heard, other.status, other.reason) == ("reported", "failed", "ZeroDivisionError")


def test_processes_that_a_notebook_forks_inside_a_run_write_it_once(trouble):
    found = read(trouble / "notebook")
    assert {run for run, _ in found.events} == {None, found.left["launcher"]["run"]}
    assert [event.step for event in of(found, Step)] == [1, 2, 3, 4]
    assert [(event.rank, event.heard, event.weights) for event in of(found, RankReported)] == [
        (0, "reported", "reference"),
        (1, "reported", "equal"),
    ]
    assert of(found, RunFinished) == [RunFinished(status="completed", steps=4, trained=True)]
    assert found.left["launcher"]["steps"] == 4
    assert of(found, RankReported)[1].hardware["cores"] > 0
    assert [kind.TYPE for _, kind in found.events].count("weights.saved") == 1
    assert not found.verdict.reasons


def test_a_private_run_that_was_opened_too_early_to_know_is_refused_before_its_data(trouble):
    for rank in range(2):
        left = json.loads((trouble / "private" / f"{rank}.json").read_text())
        reason, sentence = left["refused"]
        assert reason == "several-processes"
        assert f"rank {rank} of 2" in sentence
        reader = TrailReader.open(trouble / "private" / f"audit-{rank}")
        assert not {"privacy.reserved", "train.step", "model.bound"} & {entry.type for entry in reader.entries()}
