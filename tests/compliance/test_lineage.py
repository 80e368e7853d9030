"""The lineage of a trail, folded from real trainings of tiny models, and from entries told by hand."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from itertools import combinations, pairwise
from xml.etree import ElementTree as ET

import pytest
from report_story import Teller, created, digest, verdict
from support.tiny import dpo_trainer, grpo_trainer, reward_trainer, sft_trainer, synthetic_pairs
from support.trails import events, without_cross_checks

from rlhf_audit_nb import AuditableRLHF, PrivacyConfig
from rlhf_audit_nb import events as ev
from rlhf_audit_nb.compliance import Evidence
from rlhf_audit_nb.compliance.facts import run_facts
from rlhf_audit_nb.compliance.lineage import Edge, lineage
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.reports.lineage import MOST_EVER, LineageView, condensed, draw, drawable, lineage_figure
from rlhf_audit_nb.reports.privacy import inherited_words, privacy_part

PAIRS = synthetic_pairs(8)
QUESTIONS = [{"prompt": f"A public question {number} for tests?"} for number in range(4)]
SHOWN = {"trainer.attached", "data.bound", "model.bound", "evaluation.recorded"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """SFT on public data → private reward model → policy, and a model that goes on without privacy."""
    here = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch, without_cross_checks(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(here)
        plain = AuditableRLHF()
        held = AuditableRLHF(
            privacy_config=PrivacyConfig(epsilon=8.0, sampling_rate=0.5, noise_multiplier=2.0, public_prompts=True)
        )
        with plain.track_training("sft"):
            sft = sft_trainer(PAIRS[:4], here / "sft", peft=None)
            sft.train()
        plain.declare_public_data(sft.train_dataset, reason="written by us", by="A. Keeper")
        plain.declare_public_data(QUESTIONS, reason="written by us", by="A. Keeper")
        plain.seal_threshold("accuracy", ">= 0.5", data=QUESTIONS)
        with held.track_training("reward"):
            reward = reward_trainer(PAIRS, here / "reward")
            reward.train()
        with held.track_training("policy"):
            policy = grpo_trainer([reward.model], here / "policy", model=sft.model, peft=None)
            policy.train()
            policy.save_model(str(here / "model"))
        held.log_evaluation({"accuracy": 0.75}, model=here / "model", data=QUESTIONS, evaluator="pairwise 1.0")
        with plain.track_training("further"):
            dpo_trainer(PAIRS[:6], here / "further", model=policy.model, peft=None).train()
        with plain.track_training("again"):
            sft_trainer(PAIRS[:4], here / "again").train()
        graph = held.lineage()
        joined = held.lineage(join=True)
        budget = held.budget().total
        inherited = events(held.trail, ev.PrivacyInherited)
        report = held.generate_compliance_report()
        card = held.generate_model_card()
        evidence = Evidence.from_trail(held.trail.location)
    return graph, joined, budget, inherited, report, card, evidence


def training(graph, experiment):
    return next(node for node in graph.of("training") if node.detail == experiment)


def roles(graph, node):
    return {edge.role: graph.node(edge.source) for edge in graph.into(node.id)}


def test_the_chain_from_sft_to_the_policy_is_one_graph(chain):
    graph = chain[0].graph
    sft, reward, policy = (training(graph, name) for name in ("sft", "reward", "policy"))
    into = roles(graph, policy)
    assert set(into) == {"train", "base", "reward"}
    (left_by_sft,) = [graph.node(edge.target) for edge in graph.edges if edge.source == sft.id]
    (left_by_reward,) = [graph.node(edge.target) for edge in graph.edges if edge.source == reward.id]
    assert into["base"].id == left_by_sft.id
    assert into["reward"].id == left_by_reward.id
    names = {node.detail for node in graph.ancestors(policy.id).of("training")}
    assert names == {"sft", "reward", "policy"}


def test_each_node_carries_its_bound_and_the_entries_that_show_it(chain):
    graph, budget, (inherited,) = chain[0].graph, chain[2], chain[3]
    sft, reward, policy = (training(graph, name) for name in ("sft", "reward", "policy"))
    assert sft.bound.how == "public"
    assert (reward.bound.how, reward.bound.epsilon) == ("own", pytest.approx(budget))
    assert (policy.bound.how, policy.bound.epsilon) == ("inherited", inherited.epsilon)
    assert policy.bound.words.startswith("inherits ε ")
    assert roles(graph, reward)["train"].bound.words == "protected, per annotator"
    assert roles(graph, policy)["train"].bound.how == "public"
    kinds = {item.index: item.kind for item in chain[6].items}
    assert [kinds[index] for index in reward.bound.entries] == ["privacy.reserved", "privacy.settled"]
    assert [kinds[index] for index in policy.bound.entries] == ["privacy.inherited"]
    for node in graph.nodes:
        assert node.entries
        assert {kinds[index] for index in node.entries} <= SHOWN


def test_a_model_trained_further_without_privacy_inherits_and_has_no_bound_for_its_own_data(chain):
    graph = chain[0].graph
    further, policy = training(graph, "further"), training(graph, "policy")
    assert roles(graph, further)["base"].bound == policy.bound
    assert further.bound.how == "inherited"
    assert further.bound.epsilon == policy.bound.epsilon
    assert further.bound.unbounded == (further.entries[0],)
    assert "no bound" in further.bound.words
    (left,) = [graph.node(edge.target) for edge in graph.edges if edge.source == further.id]
    assert left.bound == further.bound


def test_open_data_sets_that_are_the_same_are_one_node_and_sealed_ones_only_where_the_vault_tells(chain):
    graph, joined = chain[0].graph, chain[1].graph
    again, sft = training(graph, "again"), training(graph, "sft")
    assert roles(graph, again)["train"].id == roles(graph, sft)["train"].id
    sealed = roles(graph, training(graph, "reward"))["train"]
    assert sealed.digest is None
    assert sealed.id == f"data-entry-{sealed.entries[0]}"
    known = roles(joined, training(joined, "reward"))["train"]
    assert known.id.startswith("data-")
    assert known.id != sealed.id
    assert joined.joined
    assert not graph.joined
    secret = known.id.removeprefix("data-")
    assert secret not in str(chain[0].to_dict())


def test_the_graph_is_valid_prov_json_in_what_it_names(chain):
    graph = chain[0].graph
    prov = graph.to_prov()
    assert set(prov) == {"prefix", "entity", "activity", "used", "wasGeneratedBy"}
    assert len(prov["activity"]) == 6  # the evaluation is one
    assert len(graph.of("training")) == 5
    assert len(prov["entity"]) + len(prov["activity"]) == len(graph.nodes)
    assert len(prov["used"]) + len(prov["wasGeneratedBy"]) == len(graph.edges)
    for relation in ("used", "wasGeneratedBy"):
        for name, about in prov[relation].items():
            assert name.startswith("_:")
            assert about["prov:activity"] in prov["activity"]
            assert about["prov:entity"] in prov["entity"]
    prefixes = set(prov["prefix"])
    for place in ("entity", "activity"):
        for name, attributes in prov[place].items():
            assert {part.split(":")[0] for part in (name, *attributes)} <= prefixes


def test_prov_json_is_read_back_by_the_library_of_its_standard(chain):
    from prov.model import ProvActivity, ProvDocument, ProvEntity, ProvGeneration, ProvUsage

    graph = chain[0].graph
    read = ProvDocument.deserialize(content=chain[0].prov, format="json")
    activities, entities = list(read.get_records(ProvActivity)), list(read.get_records(ProvEntity))
    names = {record.identifier.uri.removeprefix("urn:rlhf-audit:trail:") for record in (*activities, *entities)}
    assert names == {node.id for node in graph.nodes}
    joined = {
        tuple(str(value).removeprefix("trail:") for _, value in record.formal_attributes[:2])
        for kind in (ProvUsage, ProvGeneration)
        for record in read.get_records(kind)
    }
    assert joined == {(edge.target, edge.source) for edge in graph.edges}
    figures = [value for record in activities for name, value in record.attributes if name.localpart == "figure"]
    assert figures == ["accuracy 0.75, ≥ 0.5 met"]
    signed = [value for record in entities for name, value in record.attributes if name.localpart == "signature"]
    assert signed[0].startswith("model OpenSSF model signature sha256 ")


def test_a_model_carries_the_signed_folder_that_its_training_left_and_the_evaluation_that_it_stood(chain):
    graph = chain[0].graph
    (left,) = [edge.target for edge in graph.edges if edge.source == training(graph, "policy").id]
    (folder,) = graph.node(left).folders
    assert folder.name == "model"
    assert len(folder.signature) == 64
    (evaluation,) = graph.of("evaluation")
    into = roles(graph, evaluation)
    assert into["model"].id == left
    assert into["data"].bound.how == "public"
    assert evaluation.bound == into["model"].bound
    assert (evaluation.state, evaluation.lines) == ("met", ("accuracy 0.75, ≥ 0.5 met",))
    assert f"model: signed {folder.signature[:4]}…{folder.signature[-4:]} #{folder.entry}" in chain[0].svg
    assert "tested model" in str(chain[0])


def test_the_picture_holds_every_node_and_stands_alone(chain):
    view = chain[0]
    root = ET.fromstring(view.svg)
    boxes = root.findall(f".//{SVG}rect")
    assert len(boxes) == len(view.graph.nodes)
    spans = sorted((float(box.get("y")), float(box.get("x")), float(box.get("width"))) for box in boxes)
    for one, two in pairwise(spans):
        assert one[0] != two[0] or one[1] + one[2] < two[1]  # no two boxes of a layer overlap
    assert "href" not in view.svg
    description = root.find(f"{SVG}desc").text
    assert all(node.label in description for node in view.graph.of("training"))


def test_the_labels_at_a_box_with_four_inputs_are_apart(chain):
    graph = chain[0].graph
    policy = training(graph, "policy")
    more = Edge(roles(graph, policy)["base"].id, policy.id, "reference", 0)
    root = ET.fromstring(draw(replace(graph, edges=(*graph.edges, more))))
    spans = []
    for text in root.findall(f"{SVG}text"):
        x, wide = float(text.get("x")), 4.6 * len(text.text)
        left = x if text.get("text-anchor") == "start" else x - wide
        spans.append((float(text.get("y")), left, left + wide, text.text))
    assert "reference" in {span[3] for span in spans}
    for one, two in pairwise(sorted(spans)):
        assert one[0] != two[0] or one[2] < two[1], (one, two)


def test_the_picture_draws_every_edge_downwards(chain):
    root = ET.fromstring(chain[0].svg)
    paths = [path.get("d") for path in root.findall(f"{SVG}path")]
    assert len(paths) == len(chain[0].graph.edges)
    for path in paths:
        start = float(re.split("[CV]", path[1:])[0].split(",")[1])
        end = float(path.replace("V", " ").replace(",", " ").split()[-1])
        assert end > start


def test_a_lineage_saves_itself_and_names_what_it_cannot_write(chain, tmp_path):
    view = chain[0]
    assert view.save(tmp_path / "a.svg").read_text(encoding="utf-8") == view.svg
    assert '"wasGeneratedBy"' in view.save(tmp_path / "a.json").read_text(encoding="utf-8")
    for name, reason in (("a.pdf", "unknown-format"), ("a", "unknown-format"), ("missing/a.svg", "unwritable")):
        with pytest.raises(ReportError) as refused:
            view.save(tmp_path / name)
        assert refused.value.reason == reason
    assert "<svg" in view._repr_html_()
    assert "5 trainings" in repr(view)
    assert "1 evaluation" in repr(view)


def test_report_and_card_say_what_a_policy_inherits_and_that_nothing_was_charged(chain):
    report, card = chain[4], chain[5]
    part = next(part for part in report.model.privacy if part.title == "policy")
    assert part.headline.startswith("inherits ε")
    assert "nothing was charged" in part.words
    assert part.state == "ok"
    assert [figure.key for figure in report.model.figures].count("lineage") == 1
    assert "1 private run composed" in report.model.privacy_words
    assert 'stroke="#0f5e7a"' in report.html
    assert card.to_dict() is not None


def told(*models):
    """A trail of trainings without privacy, each from the last one's weights."""
    teller = Teller()
    created(teller)
    for number in range(1, len(models)):
        run = f"{number:032x}"
        teller.tell(ev.RunStarted(experiment=f"run {number}", entry_point="cell", tool="t"), run)
        teller.tell(ev.TrainerAttached(trainer="SFTTrainer", loss=None, max_steps=1, seed=1, hyperparameters={}), run)
        teller.tell(ev.DataBound(role="train", columns=["text"], rows=3, digest=digest(f"data{number}")), run)
        for role, name in (("base", models[number - 1]), ("final", models[number])):
            teller.tell(
                ev.ModelBound(
                    role=role,
                    architecture="Llama",
                    parameters=1,
                    trainable=1,
                    weights_digest=digest(name),
                    config_digest=digest("c"),
                ),
                run,
            )
    return Evidence(verdict(teller.entries), tuple(teller.entries))


def test_weights_that_come_back_to_where_they_were_make_no_endless_walk():
    graph = lineage(told("a", "b", "a", "b"))
    assert len(graph.of("training")) == 3
    assert len(graph.of("model")) == 2
    figure = lineage_figure(graph)
    assert figure is not None
    assert ET.fromstring(figure.svg) is not None


def chained(stages, *, sets=2):
    """A trail of trainings, each from what the last one left, with ``sets`` data sets and a saved model each."""
    teller = Teller()
    created(teller)
    teller.tell(ev.ThresholdSealed(metric="accuracy", relation=">=", bound=0.6))
    for stage in range(stages):
        run = f"{stage:032x}"
        teller.tell(ev.RunStarted(experiment=f"stage {stage}", entry_point="cell", tool="t"), run)
        teller.tell(ev.TrainerAttached(trainer="SFTTrainer", loss=None, max_steps=1, seed=1, hyperparameters={}), run)
        for number in range(sets):
            name = f"acme/data-{stage}-{number}"
            data = ev.DataBound(role="train", columns=["text"], rows=3, digest=digest(name), source=name)
            teller.tell(data, run)
        for role, name in (("base", f"m{stage}"), ("final", f"m{stage + 1}")):
            shown = {"architecture": "Llama", "parameters": 1, "trainable": 1, "config_digest": digest("c")}
            teller.tell(ev.ModelBound(role=role, weights_digest=digest(name), **shown), run)
            teller.tell(ev.Step(step=1), run)
        folder = {"name": f"model-{stage}", "digest": digest(f"f{stage}"), "files": 1, "bytes": 1}
        teller.tell(ev.WeightsSaved(step=1, signature_digest=digest(f"s{stage}"), **folder), run)
    teller.tell(
        ev.EvaluationRecorded(metrics={"accuracy": 0.5}, identified="live", weights_digest=digest(f"m{stages}"))
    )
    return Evidence(verdict(teller.entries), tuple(teller.entries))


def boxes(picture):
    root = ET.fromstring(picture)
    return [tuple(float(box.get(name)) for name in ("x", "y", "width", "height")) for box in root.iter(f"{SVG}rect")]


@pytest.mark.parametrize("stages", [3, 12, 30, 90])
def test_a_picture_stays_readable_however_many_trainings_there_are(stages):
    graph = lineage(chained(stages))
    shown = drawable(graph)
    picture = draw(shown)
    placed = boxes(picture)
    assert len(placed) == len(shown.nodes) <= MOST_EVER
    for one, two in combinations(placed, 2):
        beside = one[0] + one[2] < two[0] or two[0] + two[2] < one[0]
        assert beside or one[1] + one[3] < two[1] or two[1] + two[3] < one[1]
    assert len(shown.of("training")) == min(stages, MOST_EVER)
    last = graph.of("training")[-1]
    assert last.id in {node.id for node in shown.nodes}
    for said in (f"acme/data-{stages - 1}-1", f"model-{stages - 1}: signed", "accuracy 0.5, ≥ 0.6 not met"):
        assert said in picture  # condensed, and nothing of the newest training is lost
    figure = lineage_figure(graph)
    assert figure.title == ("Lineage" if stages <= MOST_EVER else "Lineage of the newest model; 42 trainings not drawn")


def test_a_small_graph_is_drawn_as_it_is_and_a_large_one_condensed_step_by_step():
    small, large = lineage(chained(3)), lineage(chained(12))
    assert drawable(small) == small
    assert len(condensed(large, 1).nodes) < len(large.nodes)
    assert not condensed(large, 2).of("model")
    assert not condensed(large, 2).of("data")
    first = condensed(large, 2).nodes[0]
    assert "train: acme/data-0-0, 3 rows" in first.lines
    assert "base: Llama" in first.lines


def test_where_nothing_was_trained_there_is_nothing_to_draw():
    assert drawable(lineage(told("a"))) is None
    with pytest.raises(ReportError, match="no lineage to draw"):
        LineageView(lineage(told("a")), "UNANCHORED").save("x.svg")


def test_a_trail_without_privacy_says_so_once_and_a_mixed_one_in_each_box():
    plain = draw(lineage(chained(3)))
    assert plain.count(">no differential privacy: no bound<") == 1
    assert ">no bound<" not in plain
    assert ">trained without differential" not in plain


def test_the_model_of_an_evaluation_that_the_trail_does_not_know_is_a_node_of_its_own():
    teller = Teller()
    created(teller)
    stranger = ev.EvaluationRecorded(metrics={"accuracy": 0.9}, identified="stated", stated_digest=digest("stranger"))
    teller.tell(stranger)
    graph = lineage(Evidence(verdict(teller.entries), tuple(teller.entries)))
    (model,) = graph.of("model")
    assert model.bound.how == "unknown"
    assert graph.of("evaluation")[0].state == "not met"


def test_what_was_loaded_from_a_known_models_files_and_changed_descends_from_it_and_is_said_to_be_changed():
    teller = Teller()
    teller.entries.extend(chained(1).entries)
    run = "e" * 32
    files = ev.InputFiles(count=1, bytes=1, digest=digest("files"), tensors=digest("m1"))
    shown = {"architecture": "Llama", "parameters": 1, "trainable": 1, "config_digest": digest("c")}
    teller.tell(ev.RunStarted(experiment="cast", entry_point="cell", tool="t"), run)
    teller.tell(ev.TrainerAttached(trainer="GRPOTrainer", loss=None, max_steps=1, seed=1, hyperparameters={}), run)
    short = {"role": "reward", "position": 0, "name": "short", "kind": "function", "source_digest": digest("def short")}
    called = teller.tell(ev.FunctionBound(**short), run)
    teller.tell(ev.FunctionBound(role="reward", position=1, name="", kind="model", weights_digest=digest("m1")), run)
    teller.tell(ev.ModelBound(role="base", weights_digest=digest("m1 in bfloat16"), files=files, **shown), run)
    teller.tell(ev.ModelBound(role="reward", weights_digest=digest("m1"), **shown), run)
    teller.tell(ev.ModelBound(role="reference", weights_digest=digest("stranger"), **shown), run)
    graph = lineage(Evidence(verdict(teller.entries), tuple(teller.entries)))
    first, second = graph.of("training")
    into = roles(graph, second)
    assert set(into) == {"base, loaded and changed", "reward", "reference"}
    (left,) = [edge.target for edge in graph.edges if edge.source == first.id]
    assert into["base, loaded and changed"].id == into["reward"].id == left
    assert into["reference"].bound.how == "unknown"
    known = digest("def short")
    assert second.lines == (f"reward: short, {known[:4]}…{known[-4:]} #{called}",)
    assert second.lines[0] in draw(graph)
    assert second.bound.unbounded == (first.entries[0], second.entries[0])


def test_an_evaluated_checkpoint_and_training_data_that_was_tested_on_are_shown_as_what_they_are():
    teller = Teller()
    teller.entries.extend(chained(1).entries)
    run = "f" * 32
    teller.tell(ev.RunStarted(experiment="more", entry_point="cell", tool="t"), run)
    teller.tell(ev.TrainerAttached(trainer="SFTTrainer", loss=None, max_steps=2, seed=1, hyperparameters={}), run)
    teller.tell(ev.Step(step=1), run)
    teller.tell(ev.WeightsSaved(step=1, name="checkpoint-1", digest=digest("c1"), files=1, bytes=1), run)
    teller.tell(ev.Step(step=2), run)
    tested = {"identified": "folder", "folder_digest": digest("c1"), "data": digest("acme/data-0-0")}
    teller.tell(ev.EvaluationRecorded(metrics={"accuracy": 0.9}, **tested))
    graph = lineage(Evidence(verdict(teller.entries), tuple(teller.entries)))
    into = roles(graph, graph.of("evaluation")[-1])
    assert into["model"].label == "checkpoint-1"
    first = {edge.source for edge in graph.into(graph.of("training")[0].id)}
    assert into["data"].id in first
    assert into["data"].label == "acme/data-0-0"


def test_a_name_that_would_deceive_is_made_visible_in_the_picture():
    evidence = told("a", "b")
    graph = lineage(evidence)
    first = graph.of("training")[0]
    spoofed = replace(graph, nodes=tuple(replace(n, label="<x>\u202egnp") if n == first else n for n in graph.nodes))
    picture = draw(spoofed)
    assert "\u202e" not in picture
    assert "[U+202E]" in picture
    assert "<x>" not in picture


def guarantee(*more):
    """What can be said of a run that asked for privacy and trained a policy, with ``more`` entries in it."""
    teller = Teller()
    created(teller)
    run = "b" * 32
    trained = ev.TrainerAttached(trainer="GRPOTrainer", loss=None, max_steps=1, seed=1, hyperparameters={})
    for event in (
        ev.RunStarted(experiment="p", entry_point="cell", tool="t", privacy={"epsilon": 8.0}),
        trained,
        *more,
    ):
        teller.tell(event, run)
    return run_facts(Evidence(verdict(teller.entries), tuple(teller.entries)))[0]


def inherited(**changes):
    given = {"kind": "private-model", "sources": [], "unit": "annotator", "epsilon": 4.0, "delta": 1e-5, **changes}
    return ev.PrivacyInherited(**given)


def test_a_run_inherits_only_where_an_entry_says_so_for_each_of_its_trainings():
    second = ev.TrainerAttached(trainer="GRPOTrainer", loss=None, max_steps=1, seed=1, hyperparameters={})
    assert guarantee().guarantee == "asked"
    assert guarantee(inherited()).guarantee == "inherited"
    assert guarantee(inherited(), second).guarantee == "asked"
    assert guarantee(inherited(), second, inherited()).guarantee == "inherited"


def test_the_words_of_what_is_inherited_name_its_source():
    run = {"entry": 3, "run": "c" * 32, "digest": "d", "role": "reward"}
    assert "from run cccccc" in inherited_words(inherited(sources=[run]))
    assert "from nothing protected" in inherited_words(inherited(epsilon=0.0))
    assert "labels that had been flipped at random" in inherited_words(inherited(kind="released-labels", unit="label"))
    assert "declared public" in inherited_words(inherited(prompts="declared public"))
    part = privacy_part(guarantee(inherited(sources=[run])), trusted=False)
    assert (part.state, part.headline) == ("bad", "not verified")
