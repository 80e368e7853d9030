"""Before a deployment: the record is found by the model's digest, and ways round the gate are closed."""

from __future__ import annotations

import base64
import json
import os
import shutil

import numpy as np
import pytest
from gate_support import RUN, WHOLE, Story, audited, make_record, tell, write_model, write_policy
from safetensors.numpy import save_file

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.capture.folders import sign_folder
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import encode_body
from rlhf_audit_nb.gate import gate, search
from rlhf_audit_nb.gate.search import find_records
from rlhf_audit_nb.trail import Trail

PRIVACY = "privacy: {epsilon: 2.0, delta: 1e-5, units: [annotator]}"


@pytest.fixture
def made(place, tmp_path):
    """A copy of the model, its record and its policy, to be changed; the trail stays where it is."""
    for name in ("model", "record.ipynb", "policy.yaml", "trust.policy"):
        source = place.folder / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    return tmp_path


def ids(decision):
    return [one.id for one in decision.unmet]


# --- the folder ------------------------------------------------------------------------------------------------------


def add_file(model):
    (model / "pytorch_model.bin").write_bytes(b"other weights")


def change_file(model):
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)


def remove_file(model):
    (model / "config.json").unlink()


def rename_file(model):
    (model / "config.json").rename(model / "configuration.json")


def link_file(model):
    (model / "model.safetensors").rename(model.parent / "elsewhere")
    (model / "model.safetensors").symlink_to(model.parent / "elsewhere")


def link_folder(model):
    (model.parent / "code").mkdir()
    (model / "code").symlink_to(model.parent / "code", target_is_directory=True)


def change_signature(model):
    data = json.loads((model / "model.sig").read_text())
    payload = json.loads(base64.b64decode(data["dsseEnvelope"]["payload"]))
    payload["predicate"]["serialization"]["ignore_paths"].append("pytorch_model.bin")
    data["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (model / "model.sig").write_text(json.dumps(data))
    add_file(model)


@pytest.mark.parametrize(
    "change", [add_file, change_file, remove_file, rename_file, link_file, link_folder, change_signature]
)
def test_a_folder_that_was_changed_is_refused_as_changed(made, change):
    change(made / "model")
    decision = gate(made / "model", made / "policy.yaml")
    assert decision.exit_code == 40, str(decision)
    assert set(ids(decision)) >= {"model.files"}


@pytest.mark.parametrize("name", [".git/hooks/post-checkout", ".gitattributes", "pipe"])
def test_nothing_may_lie_in_the_folder_that_the_signature_leaves_out(made, name):
    path = made / "model" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path) if name == "pipe" else path.write_bytes(b"x")
    decision = gate(made / "model", made / "policy.yaml")
    assert decision.exit_code == 3, str(decision)
    assert ids(decision) == ["model.uncovered"]
    assert name in decision.unmet[0].reason


def test_a_checkpoint_below_is_not_covered_either(tmp_path):
    write_model(tmp_path / "model" / "checkpoint-2", 5.0)
    made = make_record(write_model(tmp_path / "model").parent)
    policy = write_policy(tmp_path, "git: clean")
    decision = gate(made.model, policy)
    assert (decision.exit_code, ids(decision)) == (3, ["model.uncovered"])
    shutil.rmtree(made.model / "checkpoint-2")
    assert gate(made.model, policy).passed


def test_a_folder_that_somebody_else_signed_has_the_records_files_and_is_refused(made, tmp_path_factory):
    with Trail.open(tmp_path_factory.mktemp("other") / "audit") as trail:
        keep = (made / "model" / "model.pub").read_bytes()
        sign_folder(made / "model", trail.keys.model)
        (made / "model" / "model.pub").write_bytes(keep)
    assert gate(made / "model", made / "policy.yaml").exit_code == 40
    (made / "model" / "model.sig").write_text("{}")
    decision = gate(made / "model", made / "policy.yaml")
    assert (decision.exit_code, ids(decision)) == (3, ["model.signature"])


def test_a_policy_may_let_gits_own_files_be(made):
    for name in (".gitattributes", ".gitignore"):
        (made / "model" / name).write_text("x")
    policy = made / "policy.yaml"
    policy.write_text(policy.read_text() + "uncovered: [.gitattributes]\n")
    assert ids(gate(made / "model", policy)) == ["model.uncovered"]
    (made / "model" / ".gitignore").unlink()
    assert gate(made / "model", policy).passed


def test_without_its_signature_a_folder_is_known_by_its_files_and_their_names(made):
    (made / "model" / "model.sig").unlink()
    assert gate(made / "model", made / "policy.yaml").passed
    rename_file(made / "model")
    assert gate(made / "model", made / "policy.yaml").exit_code == 40


def test_files_whose_names_the_entry_does_not_hold_may_have_been_exchanged(tmp_path):
    made = make_record(tmp_path, Story(listed=False))
    policy = write_policy(tmp_path, "git: clean")
    assert gate(made.model, policy).passed
    (made.model / "model.sig").unlink()
    decision = gate(made.model, policy)
    assert (decision.exit_code, ids(decision)) == (3, ["model.names"])


def test_a_folder_with_other_weights_than_the_training_left_is_refused(tmp_path):
    """The run saved a folder of its own making after it had trained: only the tensors tell."""
    made = make_record(tmp_path, Story(final="77" * 32))
    assert gate(made.model, write_policy(tmp_path, "git: clean")).passed
    decision = gate(made.model, write_policy(tmp_path, "weights: final", name="b.yaml"))
    assert (decision.exit_code, ids(decision)) == (3, ["weights"])


def test_a_folder_without_weights_is_no_model(tmp_path, place):
    for name in ("nowhere", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match="is not a folder with weights"):
            gate(tmp_path / name, place.folder / "policy.yaml")


# --- the record ------------------------------------------------------------------------------------------------------


def test_a_record_that_was_changed_is_named_where(made):
    path = made / "record.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["source"] = "another"
    path.write_text(json.dumps(notebook))
    decision = gate(made / "model", made / "policy.yaml")
    assert decision.exit_code == 40
    assert {one.where for one in decision.unmet} >= {"cells[0].source"}
    assert {one.id for one in decision.unmet} == {"record"}


def test_a_record_of_a_log_that_is_not_trusted_does_not_count(made, tmp_path_factory):
    other = make_record(tmp_path_factory.mktemp("other"))
    shutil.copy(other.folder / "trust.policy", made / "trust.policy")
    decision = gate(made / "model", made / "policy.yaml")
    assert decision.exit_code == 40
    assert "untrusted-log" in decision.unmet[0].reason


def test_no_record_of_a_model_is_a_refusal_that_says_what_was_looked_through(made):
    (made / "record.ipynb").unlink()
    (made / "records" / "deep").mkdir(parents=True)
    (made / "records" / "deep" / "other.ipynb").write_text("{}")
    decision = gate(made / "model", made / "policy.yaml", records=[made / "records"])
    assert (decision.exit_code, ids(decision)) == (3, ["record"])
    assert decision.looked.files == 1
    assert any(str(made / "records") in line for line in decision.words)
    with pytest.raises(ConfigError, match="There are no records at"):
        gate(made / "model", made / "policy.yaml", records=[made / "gone"])


def test_the_nearest_is_told_where_the_trail_knows_it(place, made):
    (made / "record.ipynb").unlink()
    decision = gate(made / "model", made / "policy.yaml", trail=place.trail)
    entry = next(index for index, event in saved_in(place.trail))
    assert decision.looked.near == (
        f"Entry {entry} of the trail saved these files; its record was not found: name its folder.",
    )
    (made / "model" / "model.sig").unlink()
    tensors = {f"layer.{i}.weight": np.full((2, 3), 1.0 + i, dtype=np.float32) for i in range(3)}
    lists = place.trail / "artifacts"
    lists.mkdir(exist_ok=True)
    from rlhf_audit_nb.gate.model import open_model

    text = "".join(f"{name}\0{told}\n" for name, told in sorted(open_model(made / "model").tensors().items()))
    (lists / f"{'ab' * 32}.tensors").write_text(text)
    save_file({**tensors, "layer.0.weight": np.zeros((2, 3), np.float32)}, made / "model" / "model.safetensors")
    decision = gate(made / "model", made / "policy.yaml", trail=place.trail)
    shutil.rmtree(lists)
    assert decision.exit_code == 3
    assert "2 of 3 are those of the model ababab" in decision.looked.near[0]


def saved_in(trail):
    from rlhf_audit_nb.trail import TrailReader

    for entry in TrailReader.open(trail).entries(type="weights.saved"):
        yield entry.index, ev.decode_body(entry.type, entry.body)


def test_a_record_is_found_in_every_place_that_is_looked_through(place, made, tmp_path_factory):
    (made / "record.ipynb").unlink()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(place.record, elsewhere / "r.ipynb")
    inside = made / "records" / "a" / "b"
    inside.mkdir(parents=True)
    for records in ([elsewhere], [elsewhere / "r.ipynb"]):
        assert gate(made / "model", made / "policy.yaml", records=records).passed
    shutil.copy(place.record, inside / "r.ipynb")
    assert gate(made / "model", made / "policy.yaml", records=[made / "records"]).passed


def test_a_record_is_found_among_those_that_the_trail_keeps(tmp_path):
    made = make_record(tmp_path, keep=True)
    policy = write_policy(tmp_path, "git: clean")
    assert len(gate(made.model, policy, trail=made.trail).records) == 1  # a copy is no record of its own
    made.record.unlink()
    assert gate(made.model, policy, trail=made.trail).passed
    assert ids(gate(made.model, policy)) == ["record"]


def test_a_digest_is_found_at_whatever_place_of_the_base64_it_stands(tmp_path):
    digest = "0123456789abcdef" * 4
    for before in range(4):
        for after in range(3):
            text = base64.b64encode(b"x" * before + digest.encode() + b"y" * after)
            (tmp_path / f"{before}-{after}.ipynb").write_bytes(b'{"data": "' + text + b'"}')
    (tmp_path / "other.ipynb").write_bytes(base64.b64encode(digest[::-1].encode()))
    found = find_records([digest], [(tmp_path, False)])
    assert (len(found.found), found.files) == (12, 13)


def test_a_search_is_bounded_and_says_what_it_left_out(tmp_path, monkeypatch):
    deep = tmp_path
    for i in range(search.MOST_DEPTH + 2):
        deep = deep / f"d{i}"
    deep.mkdir(parents=True)
    for i in range(4):
        (tmp_path / f"{i}.ipynb").write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    told = []
    found = find_records(["ab" * 32], [(tmp_path, True), (tmp_path, True)], told.append)
    assert (found.files, told) == (4, [1, 2, 3, 4])
    assert "was not looked through" in found.left[0]
    monkeypatch.setattr(search, "MOST_FILES", 2)
    assert "Only the first 2 notebooks" in find_records(["ab" * 32], [(tmp_path, True)]).left[-1]
    monkeypatch.setattr(search, "MOST_BYTES", 1)
    assert "was not read" in find_records(["ab" * 32], [(tmp_path / "0.ipynb", False)]).left[0]


# --- several records -------------------------------------------------------------------------------------------------


def test_copies_of_a_record_are_judged_once(place, made):
    shutil.copy(made / "record.ipynb", made / "copy.ipynb")
    decision = gate(made / "model", made / "policy.yaml", records=[place.record])
    assert decision.passed
    assert len(decision.records) == 1


def test_another_record_of_the_same_files_without_privacy_speaks_against_the_model(tmp_path):
    make_record(tmp_path, Story(run="e" * 32, threshold=None, accuracy=None, private=False), name="first.ipynb")
    made = make_record(tmp_path, Story())
    policy = write_policy(tmp_path, PRIVACY)
    decision = gate(made.model, policy)
    assert sorted(judged.met for judged in decision.records) == [False, True]
    assert (decision.exit_code, ids(decision)) == (3, ["model.other_record"])
    assert "first.ipynb" in decision.unmet[0].reason
    (tmp_path / "first.ipynb").unlink()
    assert gate(made.model, policy).passed


def test_one_of_several_records_may_fail_what_says_nothing_against_the_model(tmp_path):
    make_record(tmp_path, Story(run="e" * 32, git=("b" * 40, True), threshold=None, accuracy=None), name="first.ipynb")
    made = make_record(tmp_path, Story())
    decision = gate(made.model, write_policy(tmp_path, PRIVACY, "git: clean"))
    assert decision.passed
    assert sorted(judged.met for judged in decision.records) == [False, True]
    assert any("does not meet the policy" in line for line in decision.words)


def test_a_record_that_only_saved_the_model_again_vouches_for_nothing(tmp_path):
    """Another notebook loads the model and saves it: its record names the same files, and no training of it."""
    first = make_record(tmp_path, Story(private=False))
    make_record(tmp_path, Story(run="e" * 32, saved_step=None), name="laundry.ipynb")
    decision = gate(first.model, write_policy(tmp_path, PRIVACY))
    assert decision.exit_code == 3
    found = {judged.source.rsplit("/")[-1]: {one.id for one in judged.unmet} for judged in decision.records}
    assert "privacy.training" in found["laundry.ipynb"]
    assert "privacy" in found["record.ipynb"]


def test_a_training_without_privacy_in_the_same_record_that_saved_the_same_files_is_seen(tmp_path):
    before = Story(run="e" * 32, private=False, threshold=None, accuracy=None)
    made = make_record(tmp_path, Story(), before=before)
    decision = gate(made.model, write_policy(tmp_path, PRIVACY))
    assert (decision.exit_code, ids(decision)) == (3, ["privacy"])


# --- the trail -------------------------------------------------------------------------------------------------------


def append(place, event, run=None):
    with Trail.open(place.trail) as trail:
        return trail.append(event.TYPE, encode_body(event), run=run).wait()


def test_what_the_trail_tells_after_the_record_counts(tmp_path):
    made = make_record(tmp_path, Story())
    policy = write_policy(tmp_path, PRIVACY, "evaluations: {metrics: [accuracy], thresholds: before training}")
    assert gate(made.model, policy, trail=made.trail).passed
    index = append(made, audited(outcome="failed", epsilon_lower=9.0), RUN)
    append(made, ev.EvaluationRecorded(metrics={"accuracy": 0.2}, identified="folder",
                                       folder_digest=made.weights.digest))  # fmt: skip
    assert gate(made.model, policy).passed
    decision = gate(made.model, policy, trail=made.trail)
    assert decision.exit_code == 3
    assert ids(decision) == ["privacy.canaries", "evaluations.failed"]
    assert index in decision.unmet[0].entries


def test_a_ledger_that_the_trail_contradicts_is_not_believed(tmp_path):
    made = make_record(tmp_path, Story())
    policy = write_policy(tmp_path, PRIVACY)
    index = append(made, ev.Step(step=4), RUN)
    decision = gate(made.model, policy, trail=made.trail)
    assert index
    assert "privacy.ledger" in ids(decision)
    assert gate(made.model, policy).passed


def test_another_training_that_saved_the_same_files_without_a_bound_is_seen_in_the_trail(tmp_path):
    made = make_record(tmp_path, Story())
    policy = write_policy(tmp_path, PRIVACY)
    with Trail.open(made.trail) as trail:
        tell(trail, Story(run="e" * 32, private=False, threshold=None, accuracy=None), made.model, None)
    assert "trail.same_files" in ids(gate(made.model, policy, trail=made.trail))


def test_another_trail_or_an_older_state_of_it_is_told_apart_from_a_rewritten_one(place, made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    other = make_record(folder)
    both = f"log {other.trust.log_keys[0]}\n{place.trust.format()}"
    (made / "trust.policy").write_text(both)
    decision = gate(made / "model", made / "policy.yaml", trail=other.trail)
    assert (decision.exit_code, ids(decision)) == (3, ["trail"])
    fork = made / "fork"
    shutil.copytree(place.trail, fork)
    before = ids(gate(made / "model", made / "policy.yaml", trail=fork))
    assert before == []
    shutil.copytree(place.trail, folder / "broken")
    (folder / "broken" / "trail.sqlite").write_bytes((place.trail / "trail.sqlite").read_bytes()[:-5000])
    from rlhf_audit_nb.errors import AuditError

    try:
        code = gate(made / "model", made / "policy.yaml", trail=folder / "broken").exit_code
    except AuditError as error:
        code = error.exit_code
    assert code != 0


def test_a_trail_of_another_history_under_the_same_key_ends_with_the_code_of_diverged(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "one" / "audit"):
        pass
    for name in ("one/audit", "home"):
        shutil.copytree(tmp_path / name, tmp_path / name.replace("one", "two").replace("home", "other-home"))
    made = make_record(tmp_path / "one", Story())
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "other-home"))
    fork = make_record(tmp_path / "two", Story(run="e" * 32))
    append(fork, ev.GateDecided(decision="passed", policy="", resolved=""))
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "nobody"))
    policy = write_policy(made.folder, "git: clean")
    assert gate(made.model, policy, trail=made.trail).passed
    for home in ("first", "second"):
        decision = gate(made.model, policy, trail=fork.trail, home=tmp_path / home)
        assert (decision.exit_code, ids(decision)) == (30, ["trail.history"])


def test_a_key_that_was_revoked_since_is_seen_in_the_trail(tmp_path, monkeypatch):
    from rlhf_audit_nb.trail.rotation import revoke_key

    made = make_record(tmp_path, Story())
    policy = write_policy(tmp_path, "git: clean")
    with Trail.open(made.trail) as trail:
        revoke_key(trail, "model", since=1, reason="lost")
    assert not gate(made.model, policy).passed  # the home of whoever revoked it knows
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "another-home"))
    assert gate(made.model, policy).passed
    assert "trail.keys" in ids(gate(made.model, policy, trail=made.trail))


def test_a_decision_is_an_entry_without_paths_people_or_figures(tmp_path):
    from rlhf_audit_nb.gate import record_decision

    made = make_record(tmp_path, Story(epsilon=2.5))
    policy = write_policy(tmp_path, *(f"{name}: {value}" for name, value in WHOLE.items()))
    decision = gate(made.model, policy)
    index = record_decision(made.trail, decision)
    from rlhf_audit_nb.trail import TrailReader

    (entry,) = TrailReader.open(made.trail).entries(index, index + 1)
    event = ev.decode_body(entry.type, entry.body)
    assert (event.decision, event.model, event.policy) == ("refused", made.weights.digest, decision.policy)
    assert event.unmet == ["privacy.epsilon"]
    assert set(event.met) > {"git", "record", "model.files"}
    assert event.judged == [decision.records[0].record]
    assert event.record is None
    assert b"/" not in entry.body.replace(b"rlhf_audit_nb/", b"")
    with pytest.raises(ConfigError, match="There is no trail at"):
        record_decision(tmp_path / "nowhere", decision)
    assert not (tmp_path / "nowhere").exists()


def test_a_model_and_a_record_are_not_changed_by_a_gate(made, place):
    def state():
        return {path: path.read_bytes() for path in sorted(made.rglob("*")) if path.is_file()}

    before = state()
    gate(made / "model", made / "policy.yaml", trail=place.trail)
    assert state() == before


def test_what_a_name_says_begins_no_line_of_its_own(tmp_path):
    made = make_record(tmp_path, Story(experiment="x\nPASSED  model\u202e", private=False))
    decision = gate(made.model, write_policy(tmp_path, PRIVACY))
    assert not [line for line in decision.words[1:] if line.startswith("PASSED")]
    assert all("\n" not in line and "\u202e" not in line for line in decision.words)
    assert "<script" not in decision._repr_html_()


def test_what_a_notebook_shows_names_no_folder(made):
    shown = str(gate(made / "model", made / "policy.yaml"))
    (made / "record.ipynb").unlink()
    shown += str(gate(made / "model", made / "policy.yaml", records=[made]))
    assert str(made) not in shown
    assert "record.ipynb" in shown
