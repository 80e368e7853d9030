"""The lineage of a trail, folded from real trainings of tiny models, and from entries told by hand."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from report_story import Teller, created, digest, verdict
from support.tiny import dpo_trainer, grpo_trainer, reward_trainer, sft_trainer, synthetic_pairs
from support.trails import events, without_cross_checks

from rlhf_audit_nb import AuditableRLHF, PrivacyConfig
from rlhf_audit_nb import events as ev
from rlhf_audit_nb.compliance import Evidence
from rlhf_audit_nb.compliance.facts import run_facts
from rlhf_audit_nb.compliance.lineage import lineage
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.reports.lineage import LineageView, draw, drawable, lineage_figure
from rlhf_audit_nb.reports.privacy import inherited_words, privacy_part

PAIRS = synthetic_pairs(8)
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
        with held.track_training("reward"):
            reward = reward_trainer(PAIRS, here / "reward")
            reward.train()
        with held.track_training("policy"):
            policy = grpo_trainer([reward.model], here / "policy", model=sft.model, peft=None)
            policy.train()
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
        assert {kinds[index] for index in node.entries} <= {"trainer.attached", "data.bound", "model.bound"}


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
    assert len(prov["activity"]) == len(graph.of("training")) == 5
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


def test_the_picture_draws_every_edge_downwards(chain):
    root = ET.fromstring(chain[0].svg)
    paths = [path.get("d") for path in root.findall(f"{SVG}path")]
    assert len(paths) == len(chain[0].graph.edges)
    for path in paths:
        start = float(path[1:].split("C")[0].split(",")[1])
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


def test_a_large_graph_is_drawn_as_far_as_the_newest_model_descends_and_never_without_end():
    assert drawable(lineage(told("a"))) is None
    long = lineage(told(*(f"m{number}" for number in range(12))))
    assert drawable(long) == long.ancestors(long.of("model")[-1].id)
    assert drawable(lineage(told(*(f"m{number}" for number in range(40))))) is None
    with pytest.raises(ReportError, match="no lineage to draw"):
        LineageView(lineage(told(*(f"m{number}" for number in range(40)))), "UNANCHORED").save("x.svg")


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
