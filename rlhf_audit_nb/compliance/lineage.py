"""The lineage of a trail: which data and models went into which training, what came out, and with what ε. Floor 3.

`lineage` folds verified evidence into a graph. Its nodes are data sets (by the digest of their rows; under differential
privacy that is sealed, so such a data set is known by its entry alone), models (by the digest of their weights),
trainings and evaluations; each carries the entries that show it. A model's bound is what the trail recorded for the
training that left it: its own composed total, or what it inherits. Where it also descends from a training without a
bound, that is said beside it, for then no figure covers all that it learnt. Nothing is computed here that the trail
does not hold.

`Lineage.to_prov` writes W3C PROV-JSON: data sets, models and folders are entities, trainings and
evaluations are activities.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rlhf_audit_nb.compliance.facts import run_facts, training_steps
from rlhf_audit_nb.compliance.thresholds import evaluations
from rlhf_audit_nb.compliance.words import NO_BOUND, delta_text, epsilon_text, short
from rlhf_audit_nb.events import FunctionBound, ModelBound, PrivacyReserved, PublicDeclared
from rlhf_audit_nb.privacy.descent import DATA, MODEL, Descent, Training

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.compliance.facts import Spend
    from rlhf_audit_nb.compliance.thresholds import Evaluated
    from rlhf_audit_nb.events import DataBound, Number

__all__ = ["Bound", "Edge", "Folder", "Lineage", "Node", "lineage"]

Kind = Literal["data", "model", "training", "evaluation"]
_ACTIVITIES = ("training", "evaluation")
_DIGEST = 12
_PROV = "http://www.w3.org/ns/prov#"
_OWN = "urn:rlhf-audit:trail:"


@dataclass(frozen=True)
class Bound:
    """What bounds the influence of one protected unit on a node.

    Attributes:
        how: ``own`` (a mechanism ran here), ``inherited`` (it came with a model), ``public`` (a person declared that
            nothing protected is in it), ``protected`` (the data that a bound is about), ``none``, or ``unknown`` to
            this trail, which saw it first as an input.
        epsilon: the recorded figure, composed over all that it covers; ``None`` where there is none.
        delta: of that figure.
        unit: whose influence is bounded.
        unbounded: entries of trainings without a bound that it descends from, which no figure covers.
        entries: the entries that show all this.
    """

    how: str
    epsilon: Number | None = None
    delta: float | None = None
    unit: str | None = None
    unbounded: tuple[int, ...] = ()
    entries: tuple[int, ...] = ()

    @property
    def words(self) -> str:
        """The bound in a few words; an ε never stands without its δ and unit."""
        if self.epsilon is not None:
            figure = f"ε {epsilon_text(self.epsilon)}, δ {delta_text(self.delta or 0)}, per {self.unit}"
            said = f"inherits {figure}" if self.how == "inherited" else figure
            if self.unbounded:
                return f"{said}; and {NO_BOUND} in {', '.join(f'#{index}' for index in self.unbounded)}"
            return said
        return {
            "none": "no bound",
            "public": "declared public",
            "protected": f"protected, per {self.unit}",
        }.get(self.how, "not known to this trail")


@dataclass(frozen=True)
class Folder:
    """A folder that a model was saved in, and the digest of its OpenSSF model signature; what the entry says of it."""

    name: str
    digest: str
    signature: str | None
    entry: int


@dataclass(frozen=True)
class Node:
    """A data set, a model, a training or an evaluation.

    Attributes:
        id: unique in its graph.
        kind: which of them.
        label: what it is called.
        bound: what bounds it; of an evaluation, that of the model that was evaluated.
        entries: the entries that show it.
        digest: of rows, weights or a folder.
        run: the run that it belongs to.
        detail: the experiment, or how much data it is.
        folders: of a model, where it was saved after its training's last step.
        lines: what else is to be told: figures and how they stand, or what a condensed picture left out.
        state: of an evaluation, ``met`` (every threshold was set before and reached), ``not met``, or nothing.
    """

    id: str
    kind: Kind
    label: str
    bound: Bound
    entries: tuple[int, ...]
    digest: str | None = None
    run: str | None = None
    detail: str = ""
    folders: tuple[Folder, ...] = ()
    lines: tuple[str, ...] = ()
    state: str = ""


@dataclass(frozen=True)
class Edge:
    """From what went in to a training or evaluation, or from a training to what came out; ``role`` says as what."""

    source: str
    target: str
    role: str
    entry: int


@dataclass(frozen=True)
class Lineage:
    """The graph: nodes in the order in which the trail first shows them, edges in that of their entries."""

    origin: str
    size: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    joined: bool = False

    def node(self, name: str) -> Node:
        """The node with that id."""
        return next(node for node in self.nodes if node.id == name)

    def of(self, kind: Kind) -> tuple[Node, ...]:
        """The nodes of one kind."""
        return tuple(node for node in self.nodes if node.kind == kind)

    def into(self, name: str) -> tuple[Edge, ...]:
        """The edges that end at a node."""
        return tuple(edge for edge in self.edges if edge.target == name)

    def ancestors(self, name: str) -> Lineage:
        """The part of the graph that a node descends from, itself included."""
        kept, waiting = set[str](), [name]
        while waiting:
            here = waiting.pop()
            if here not in kept:
                kept.add(here)
                waiting += [edge.source for edge in self.into(here)]
        return replace(
            self,
            nodes=tuple(node for node in self.nodes if node.id in kept),
            edges=tuple(edge for edge in self.edges if edge.source in kept and edge.target in kept),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: ``nodes`` and ``edges``."""
        nodes = [{**asdict(node), "bound": {**asdict(node.bound), "words": node.bound.words}} for node in self.nodes]
        return {
            "origin": self.origin,
            "size": self.size,
            "nodes": nodes,
            "edges": [asdict(edge) for edge in self.edges],
            "joined": self.joined,
        }

    def to_prov(self) -> dict[str, Any]:
        """The graph as W3C PROV-JSON: ``used`` and ``wasGeneratedBy`` are its edges."""
        kinds = {node.id: node.kind for node in self.nodes}
        found: dict[str, Any] = {
            "prefix": {"prov": _PROV, "trail": _OWN},
            "entity": {},
            "activity": {},
            "used": {},
            "wasGeneratedBy": {},
        }
        for node in self.nodes:
            place = "activity" if node.kind in _ACTIVITIES else "entity"
            found[place][_prov_name(node.id)] = dict(_prov_attributes(node))
        for number, edge in enumerate(self.edges, 1):
            about = {"prov:role": edge.role, "trail:entry": edge.entry}
            if kinds[edge.target] in _ACTIVITIES:
                ends = {"prov:activity": _prov_name(edge.target), "prov:entity": _prov_name(edge.source)}
                found["used"][f"_:u{number}"] = {**ends, **about}
            else:
                ends = {"prov:entity": _prov_name(edge.target), "prov:activity": _prov_name(edge.source)}
                found["wasGeneratedBy"][f"_:g{number}"] = {**ends, **about}
        return {name: content for name, content in found.items() if content}


def lineage(evidence: Evidence, private_digests: Mapping[int, str] | None = None) -> Lineage:
    """The lineage of what ``evidence`` covers.

    Args:
        evidence: verified entries.
        private_digests: digests that the vault holds, by the entry of the data set; with them, data sets that are the
            same become one node. That two are the same is a function of private data: keep such a graph to yourself.
    """
    return _Folded(evidence, private_digests or {}, joined=private_digests is not None).graph()


class _Folded:
    """The fold; one use."""

    def __init__(self, evidence: Evidence, digests: Mapping[int, str], *, joined: bool) -> None:
        self._evidence, self._digests, self._joined = evidence, digests, joined
        self._descent = Descent((item.index, item.run, item.event) for item in evidence.items if item.event is not None)
        self._spends: dict[int, Spend] = {
            spend.item.index: spend for run in run_facts(evidence) for spend in run.spends
        }
        self._experiments = {run.run: run.started.experiment for run in run_facts(evidence)}
        self._sealed = {item.index for item in evidence.items if item.sealed is not None}
        self._claims = {(event.kind, event.digest): (item.index, event) for item, event in evidence.of(PublicDeclared)}
        self._steps = training_steps(evidence)
        self._functions = self._called()
        self._nodes: dict[str, Node] = {}
        self._edges: list[Edge] = []

    def graph(self) -> Lineage:
        for training in self._descent.trainings:
            self._add(training)
        for done in evaluations(self._evidence).done:
            self._evaluated(done)
        verdict = self._evidence.verdict
        return Lineage(
            origin=verdict.origin or "",
            size=verdict.size,
            nodes=tuple(self._nodes.values()),
            edges=tuple(self._edges),
            joined=self._joined,
        )

    def _add(self, training: Training) -> None:
        bound = self._bound(training)
        name = f"training-{training.index}"
        for index, data in training.data:
            self._link(self._data(index, data, training), name, data.role, index)
        for source, role, entry in self._inputs(training):
            self._link(source, name, role, entry)
        experiment = self._experiments.get(training.run, "")
        node = Node(name, "training", training.trainer, bound, (training.index,), run=training.run, detail=experiment)
        self._put(replace(node, lines=tuple(self._functions.get(training.index, ()))))
        for index, model in training.of_role("final"):
            left = self._model(index, model, bound)
            self._link(name, left, "final", index)
            self._saved_as(left, training)

    def _link(self, source: str, target: str, role: str, entry: int) -> None:
        self._edges.append(Edge(source, target, role, entry))

    def _put(self, node: Node) -> str:
        known = self._nodes.get(node.id)
        if known is not None:
            entries = tuple(sorted({*known.entries, *node.entries}))
            # What a training left stands before what was said of the same weights as an input.
            keeps = known if known.bound.how != "unknown" else replace(node, label=known.label)
            node = replace(keeps, entries=entries)
        self._nodes[node.id] = node
        return node.id

    def _called(self) -> dict[int, list[str]]:
        """The functions that each training was handed, by the entry of its trainer; models are boxes of their own."""
        found: dict[int, list[str]] = {}
        for item, event in self._evidence.of(FunctionBound):
            before = [one.index for one in self._descent.trainings if one.run == item.run and one.index < item.index]
            if before and event.kind != "model":
                digest = event.source_digest or event.code_digest
                known = short(digest, 4) if digest else "no source"
                found.setdefault(before[-1], []).append(f"{event.role}: {event.name}, {known} #{item.index}")
        return found

    def _saved_as(self, name: str, training: Training) -> None:
        """The folders that were saved after the last step: each by its newest entry."""
        steps = self._steps.get(training.index)
        folders = {one.name: one for one in self._nodes[name].folders}
        for index, saved in training.saved:
            if saved.step is None or steps is None or saved.step >= steps.last:
                folders[saved.name] = Folder(saved.name, saved.digest, saved.signature_digest, index)
        self._nodes[name] = replace(self._nodes[name], folders=tuple(folders.values()))

    # --- evaluations -------------------------------------------------------------------------------------------------

    def _evaluated(self, done: Evaluated) -> None:
        event, name = done.event, f"evaluation-{done.entry}"
        model = self._evaluated_model(done)
        self._link(model, name, "model", done.entry)
        if event.data is not None or done.sealed:
            self._link(self._evaluated_on(done), name, "data", done.entry)
        outcomes = [one.outcome for one in done.judgements]
        state = "met" if done.passed else "not met" if outcomes or done.problems else ""
        self._put(
            Node(
                name,
                "evaluation",
                event.evaluator or "evaluation",
                self._nodes[model].bound,
                (done.entry,),
                detail=done.model.experiment or event.experiment or "",
                lines=tuple(_standing(done)),
                state=state,
            )
        )

    def _evaluated_model(self, done: Evaluated) -> str:
        """The node of the model that was evaluated; where the trail does not know it, one of its own."""
        event = done.event
        entry = done.model.entries[0] if done.model.entries else None
        training = self._descent.at(entry) if entry is not None else None
        if training is not None:
            shown = next((model for index, model in training.models if index == entry), None)
            if shown is not None:
                return _model_id(shown.weights_digest)
            finals = training.of_role("final")
            if done.model.as_ == "final" and finals:
                return _model_id(finals[-1][1].weights_digest)
            return self._checkpoint(entry, training)
        digest = event.weights_digest or event.folder_digest or event.stated_digest or str(done.entry)
        label = event.model_name or "a model by its digest"
        bound = Bound("unknown", entries=(done.entry,))
        return self._put(Node(_model_id(digest), "model", label, bound, (done.entry,), digest))

    def _evaluated_on(self, done: Evaluated) -> str:
        event = done.event
        if event.data is None:
            bound = Bound("unknown", entries=(done.entry,))
            name = f"data-entry-{done.entry}"
            return self._put(Node(name, "data", "data of an evaluation", bound, (done.entry,), detail="sealed"))
        claim = self._claims.get((DATA, event.data))
        bound = Bound("public", entries=(claim[0],)) if claim is not None else Bound("none", entries=(done.entry,))
        amount = f"{event.samples:,} samples" if event.samples is not None else ""
        name, label = f"data-{event.data[:_DIGEST]}", event.data_name or "data of an evaluation"
        return self._put(Node(name, "data", label, bound, (done.entry,), event.data, detail=amount))

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _inputs(self, training: Training) -> Iterator[tuple[str, str, int]]:
        """Models that went in: the node, the role, the entry that says so."""
        linked: set[tuple[str, str]] = set()
        for role, entry, earlier in self._descent.inputs(training):
            if role == "checkpoint" and training.resumed is not None:
                yield self._checkpoint(training.resumed[1], earlier), role, entry
                continue
            for index, model in earlier.of_role("final"):
                if (role, name := _model_id(model.weights_digest)) not in linked:
                    linked.add((role, name))
                    self._model(index, model, self._bound(earlier))
                    yield name, role, entry
        changed = set()
        for role, entry, earlier in self._descent.loaded(training):
            for index, model in earlier.of_role("final")[-1:]:
                changed.add(entry)
                yield self._model(index, model, self._bound(earlier)), f"{role}, loaded and changed", entry
        for role in ("base", "reference", "reward"):
            for index, model in training.of_role(role):
                known = any(found == role and self._leads(name, model) for found, name in linked)
                declared = role == "reward" and (MODEL, model.weights_digest) in self._claims
                if not known and not declared and index not in changed:
                    yield self._model(index, model, Bound("unknown", entries=(index,))), role, index
        yield from self._claimed(training)

    def _checkpoint(self, entry: int | None, earlier: Training) -> str:
        """The folder that a training went on from, or that was evaluated, which an earlier one had saved."""
        index, saved = next((index, event) for index, event in earlier.saved if index == entry)
        name = f"saved-{index}"
        if name not in self._nodes:
            self._link(f"training-{earlier.index}", name, "saved", index)
        detail = self._experiments.get(earlier.run, "")
        return self._put(
            Node(name, "model", saved.name, self._bound(earlier), (index,), saved.digest, earlier.run, detail=detail)
        )

    def _leads(self, name: str, model: ModelBound) -> bool:
        """Whether the linked node stands for all of the model that went in: an adapter's base may be unknown still."""
        return model.adapter is None or name == _model_id(model.weights_digest)

    def _claimed(self, training: Training) -> Iterator[tuple[str, str, int]]:
        """Rewards that somebody declared public."""
        if training.inherited is None:
            return
        index, inherited = training.inherited
        for source in inherited.sources:
            claim = next((one for one in self._claims.values() if one[0] == source.get("entry")), None)
            if claim is not None:
                entry, event = claim
                bound = Bound("public", entries=(entry,))
                node = Node(f"declared-{entry}", "model", event.name, bound, (entry,), event.digest, detail=event.kind)
                yield self._put(node), str(source.get("role", "reward")), index

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _data(self, index: int, data: DataBound, training: Training) -> str:
        digest = data.digest or self._digests.get(index)
        name = f"data-{digest[:_DIGEST]}" if digest else f"data-entry-{index}"
        claim = self._claims.get((DATA, data.digest)) if data.digest else None
        if claim is not None:
            bound = Bound("public", entries=(claim[0],))
        elif training.inherited is not None and training.inherited[1].prompts:
            bound = Bound("public", entries=(training.inherited[0],))
        elif index in self._sealed:
            bound = Bound("protected", unit=data.unit or "unit", entries=(index,))
        else:
            bound = Bound("none", entries=(index,))
        if data.rows is not None:
            amount = f"{data.rows:,} rows"
        else:
            amount = f"{data.units:,} {data.unit}s" if data.units is not None else "rows sealed"
        return self._put(
            Node(
                name,
                "data",
                data.source or f"data of {self._experiments.get(training.run)}",
                bound,
                (index,),
                data.digest,
                training.run,
                detail=amount,
            )
        )

    def _model(self, index: int, model: ModelBound, bound: Bound) -> str:
        adapter = model.adapter is not None and model.role == "final"
        label = (model.name if model.role != "final" else None) or model.architecture
        made = self._descent.at(index) if bound.how != "unknown" else None
        run = made.run if made is not None else None
        return self._put(
            Node(
                _model_id(model.weights_digest),
                "model",
                f"{label}, adapter" if adapter else label,
                bound,
                (index,),
                model.weights_digest,
                run,
                detail=self._experiments.get(run or "", ""),
            )
        )

    # --- bounds ------------------------------------------------------------------------------------------------------

    def _bound(self, training: Training) -> Bound:
        """What bounds what a training learnt: its own figure, or the one it inherits, and what neither covers."""
        unbounded = tuple(sorted(self._descent.exposure(training).unbounded))
        if training.inherited is not None:
            index, event = training.inherited
            return Bound("inherited", event.epsilon, event.delta, event.unit, unbounded, (index,))
        spends = [self._spends[index] for index in training.reserved if index in self._spends]
        if spends:
            last = spends[-1]
            reserved: PrivacyReserved = last.reserved
            return Bound("own", last.total, reserved.delta, reserved.unit, unbounded, last.indices)
        through = self._through_base(training)
        if through is not None:
            return replace(through, how="inherited", unbounded=unbounded)
        if not unbounded:
            return Bound("public", entries=(training.index,))
        return Bound("none", unbounded=unbounded, entries=(training.index,))

    def _through_base(self, training: Training) -> Bound | None:
        """The largest recorded figure of the models that a training without privacy took."""
        taken = (*self._descent.inputs(training), *self._descent.loaded(training))
        found = [self._bound(earlier) for _, _, earlier in taken]
        figures = [bound for bound in found if bound.epsilon is not None]
        return max(figures, key=lambda bound: float(bound.epsilon or 0)) if figures else None


def _model_id(digest: str) -> str:
    return f"model-{digest[:_DIGEST]}"


def _standing(done: Evaluated) -> Iterator[str]:
    """Each figure with what was set for it, in a few words."""
    for metric in done.event.metrics:
        judged = [one for one in done.judgements if one.metric == metric]
        for one in judged:
            late = " after the result" if one.order == "after result" else ""
            outcome = one.outcome if one.outcome != "not judged" or not late else "set"
            yield f"{done.figure(metric)}, {one.threshold.condition} {outcome}{late}"
        if not judged:
            yield f"{done.figure(metric)}, no threshold"
    yield from done.problems


def _prov_name(name: str) -> str:
    return f"trail:{name}"


def _prov_attributes(node: Node) -> Iterable[tuple[str, Any]]:
    yield "prov:label", node.label
    yield "prov:type", {"$": f"trail:{node.kind}", "type": "prov:QUALIFIED_NAME"}
    yield "trail:bound", node.bound.words
    yield "trail:entries", ", ".join(map(str, sorted({*node.entries, *node.bound.entries})))
    if node.bound.epsilon is not None:
        yield "trail:epsilon", str(node.bound.epsilon)
        yield "trail:delta", str(node.bound.delta)
        yield "trail:unit", str(node.bound.unit)
    if node.digest is not None:
        yield "trail:sha256", node.digest
    if node.run is not None:
        yield "trail:run", node.run
    if node.detail:
        yield "trail:detail", node.detail
    if node.lines:
        yield "trail:figure", list(node.lines)
    if node.folders:
        yield "trail:folder", [f"{one.name} sha256 {one.digest}" for one in node.folders]
    signed = [f"{one.name} OpenSSF model signature sha256 {one.signature}" for one in node.folders if one.signature]
    if signed:
        yield "trail:signature", signed
