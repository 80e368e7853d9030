"""What a report says of one run: inputs by digest, machine and code, notes of its steps."""

from __future__ import annotations

import msgspec
import pytest
import report_story as story

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.cards import build_card
from rlhf_audit_nb.compliance.facts import run_facts
from rlhf_audit_nb.reports import build_compliance_report
from rlhf_audit_nb.reports.runs import lineage_group, run_part

RUN = "a" * 32
WEIGHTS = story.digest("weights")
FILES = ev.InputFiles(
    count=2, bytes=2_000, digest=story.digest("list"), tensors=WEIGHTS,
    files=[ev.InputFile(name=name, bytes=1_000, digest=story.digest(name))
           for name in ("config.json", "model.safetensors")],
)  # fmt: skip
BASE = ev.ModelBound(
    role="base", architecture="Llama", parameters=9, trainable=9, weights_digest=WEIGHTS, name="org/base",
    config_digest=story.digest("config"), tokenizer_digest=story.digest("tokenizer"), revision="c0ffee", files=FILES,
    chat_template_digest=story.digest("template"),
)  # fmt: skip
MACHINE = ev.EnvironmentCaptured(
    python="3.12.4", implementation="CPython", platform="Linux", packages={"torch": "2.13.0"}, hardware={"cores": 2},
    threads=1, git_commit="0a1b", git_dirty=True, git_diff=story.digest("diff"), tool_digest=story.digest("tool"),
    packages_digest=story.digest("packages"), drivers={"cuda": "13.0"}, variables={"OMP_NUM_THREADS": "1"},
    code=ev.CodeFiles(project="git", count=1, digest=story.digest("code"), files={"lib/rewards.py": story.digest("r")}),
)  # fmt: skip
STARTED = ev.RunStarted(experiment="one", entry_point="cell", tool="t", cell_digest=story.digest("cell"))


def evidence(*events, teller=None, run=RUN, started=STARTED):
    teller = teller or story.Teller()
    if not teller.entries:
        story.created(teller)
    for event in (started, *events):
        teller.tell(event, run)
    return story.told(teller)


def by_label(facts):
    return {fact.label: fact for fact in facts}


def group(*events):
    (run,) = run_facts(evidence(*events))
    return by_label(lineage_group(run).facts)


def part(*events):
    (run,) = run_facts(evidence(*events))
    return run_part(run, trusted=True)


def test_a_model_shows_its_commit_its_files_and_the_digests_of_what_belongs_to_it():
    found = group(BASE)
    assert "commit c0ffee on the hub" in found["Model, base"].note
    loaded = found["Model, base: loaded from"]
    assert loaded.value == "2 files, 2.0 kB: config.json, model.safetensors"
    assert FILES.digest in loaded.note
    assert "the weights in memory are those of the files" in loaded.note
    settings = found["Model, base: tokenizer and settings"]
    for name in ("config", "tokenizer", "template"):
        assert story.digest(name) in settings.value
    assert "generation" not in settings.value
    assert {cite.first for fact in found.values() for cite in fact.cites} == {2}


def test_weights_that_are_not_the_files_own_are_told_and_a_pickle_says_neither():
    other = msgspec.structs.replace(FILES, tensors=story.digest("else"))
    said = group(msgspec.structs.replace(BASE, files=other))["Model, base: loaded from"].note
    assert f"others than those of the files, sha256 {story.digest('else')}" in said
    pickle = msgspec.structs.replace(FILES, tensors=None)
    said = group(msgspec.structs.replace(BASE, files=pickle))["Model, base: loaded from"].note
    assert "in memory" not in said


def test_the_settings_of_a_second_model_are_told_only_where_they_differ():
    final = msgspec.structs.replace(BASE, role="final", files=None, tokenizer_digest=story.digest("another"))
    found = group(BASE, final)
    assert found["Model, final: tokenizer and settings"].value == f"tokenizer sha256 {story.digest('another')}"
    assert "Model, final: tokenizer and settings" not in group(BASE, msgspec.structs.replace(BASE, role="final"))


def test_long_lists_of_files_name_some_and_say_where_the_others_stand():
    names = [ev.InputFile(name=f"{n}.bin", bytes=1, digest=story.digest(str(n))) for n in range(9)]
    many = ev.InputFiles(count=9, bytes=9, digest=story.digest("many"), files=names)
    aside = ev.InputFiles(count=900, bytes=9, digest=story.digest("aside"))
    data = ev.DataBound(role="train", columns=["text"], rows=3, digest=story.digest("rows"), fingerprint="f00d")
    found = group(msgspec.structs.replace(data, files=many))
    assert found["Data, train: read from"].value.endswith("5.bin and 3 more")
    assert "fingerprint f00d" in found["Data, train"].note
    said = group(msgspec.structs.replace(data, files=aside))["Data, train: read from"]
    assert said.value == "900 files, 9 bytes"
    assert f"artifacts/{story.digest('aside')}.json" in said.note


def test_a_stream_shows_how_far_it_was_read():
    read = ev.DataRead(role="train", batches=3, rows=24, digest=story.digest("read"), workers=0)
    fact = group(ev.DataBound(role="train", columns=["text"]), read)["Data, train: as trained on"]
    assert fact.value == "3 batches of the stream, 24 rows"
    assert [cite.first for cite in fact.cites] == [3]


def test_the_environment_shows_code_packages_drivers_and_variables_with_their_entries():
    later = ev.CodeBound(code=ev.CodeFiles(project="git", count=1, digest=story.digest("x"), files={"late.py": "0"}))
    found = by_label(part(MACHINE, later).environment)
    assert found["Code version"].value == "0a1b with uncommitted changes"
    assert story.digest("diff") in found["Code version"].note
    assert found["Imported local code"].value == "1 file of the repository: lib/rewards.py"
    assert story.digest("code") in found["Imported local code"].note
    assert found["Imported or changed later"].value == "1 file of the repository: late.py"
    assert story.digest("cell") in found["Code of the cell"].value
    assert story.digest("packages") in found["Packages"].note
    assert story.digest("tool") in found["Packages"].note
    assert (found["Drivers"].value, found["Variables"].value) == ("cuda=13.0", "OMP_NUM_THREADS=1")
    assert found["Hardware"].value.endswith("threads: 1")
    where = {label: [cite.first for cite in fact.cites] for label, fact in found.items()}
    assert (where["Drivers"], where["Imported or changed later"], where["Code of the cell"]) == ([2], [3], [1])


def test_a_machine_that_is_the_same_as_before_is_told_once():
    teller = story.Teller()
    evidence(MACHINE, teller=teller)
    evidence(MACHINE, teller=teller, run="b" * 32, started=msgspec.structs.replace(STARTED, experiment="two"))
    other = msgspec.structs.replace(MACHINE, threads=2)
    third = msgspec.structs.replace(STARTED, experiment="three")
    model = build_compliance_report(evidence(other, teller=teller, run="c" * 32, started=third)).model
    first, second, last = (by_label(run.environment) for run in model.runs)
    assert "Hardware" in first
    assert second["Machine and code"].value == "in every field as recorded for one"
    assert [cite.first for cite in second["Machine and code"].cites] == [2, 4]
    assert "Hardware" not in second
    assert last["Hardware"].value.endswith("threads: 2")


def test_an_evaluation_by_the_trainer_is_no_warning():
    steps = [ev.Step(step=1, notes=["evaluation"]), ev.Step(step=2, notes=["the loss was not finite"])]
    found = by_label(part(*steps).facts)
    assert found["Evaluated in training"].value == "1 time, by the trainer"
    assert found["Warnings"].value == "the loss was not finite"
    assert [cite.first for cite in found["Warnings"].cites] == [3]
    assert "Warnings" not in by_label(part(steps[0]).facts)


def test_the_card_names_base_files_settings_and_code():
    trained = ev.TrainerAttached(trainer="SFTTrainer", loss=None, max_steps=1, seed=1, hyperparameters={})
    fields = {
        field.label: field
        for section in build_card(evidence(MACHINE, BASE, trained)).sections
        for field in section.fields
    }
    assert "commit c0ffee on the hub" in fields["Base model"].value
    assert "model.safetensors" in fields["Files of the base model"].value
    assert story.digest("template") in fields["Tokenizer and settings of the base model"].value
    assert fields["Code"].value.startswith("commit 0a1b with uncommitted changes; imported: 1 file of the repository")
    assert [cite.first for cite in fields["Code"].cites] == [2]


@pytest.mark.parametrize(
    ("after", "said"), [(0, "under 2\u00a0min"), (59, "under 2\u00a0min"), (61, "about 1\u00a0min 1\u00a0s")]
)
def test_the_time_of_a_private_run_is_said_as_coarsely_as_it_is_recorded(after, said):
    teller = story.Teller()
    evidence(teller=teller, started=msgspec.structs.replace(STARTED, privacy={"epsilon": 8.0}))
    teller.tell(ev.RunFinished(status="completed", steps=1, trained=True), RUN, after=after)
    tile = build_compliance_report(story.told(teller)).model.tiles[2]
    assert tile.label == f"optimizer step in 1 run, {said}"
    open_run = story.Teller()
    evidence(teller=open_run)
    assert "min" not in build_compliance_report(story.told(open_run)).model.tiles[2].label


def test_rows_of_several_runs_are_said_to_be_those_of_the_newest():
    teller = story.Teller()
    for run, rows in (("a" * 32, 3), ("b" * 32, 5)):
        data = ev.DataBound(role="train", columns=["text"], rows=rows, digest=story.digest(run))
        found = evidence(data, teller=teller, run=run)
        tile = build_compliance_report(found).model.tiles[1]
    assert (tile.value, tile.label) == ("5", "rows of training data in the newest of 2 runs")
