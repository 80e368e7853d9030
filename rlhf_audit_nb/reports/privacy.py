"""What a report says of privacy: one run's guarantee, all runs composed, and who could still learn something. Floor 4.

An ε never stands without its budget, δ, unit and adjacency; where there is none, `NO_BOUND` stands in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.evidence import cite
from rlhf_audit_nb.reports.parts import Cites, Fact, PrivacyPart

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlhf_audit_nb.compliance.facts import Composed, RunFacts, Spend
    from rlhf_audit_nb.events import PrivacyInherited

__all__ = [
    "THREATS",
    "THREATS_WITHOUT",
    "composed_state",
    "composed_words",
    "guarantee_fact",
    "inherited_bound",
    "inherited_words",
    "privacy_part",
]

THREATS = (
    (
        "Covered: anyone who sees the published weights, this report, the record and the public trail, and who may "
        "know every other annotator's answers."
    ),
    (
        "Not covered: whoever can open the vault. It holds the private figures and the seed of the noise, and who "
        "knows the seed can take the noise away again."
    ),
    "Not covered: time. How long a training or a step took may depend on the data.",
    (
        "Not covered: rows that the trainer drops while it prepares the data, for instance over-long ones, and units "
        "that lose all their rows by it. The roster is counted after that, so who is on it may depend on the data."
    ),
    (
        "Not covered: choices that people made after looking at the data, such as settings, the selection of data or "
        "which model to keep."
    ),
    (
        "Not covered: the base model's own training data, and other uses of the same annotators' data outside this "
        "trail."
    ),
    (
        "Assumed: the software ran as recorded, and noise drawn in floating point behaves as noise drawn from the real "
        "line."
    ),
)

THREATS_WITHOUT = (
    (
        "Nothing bounds what the model may reveal of the people in its data: whoever sees the weights or asks the "
        "model may learn what stood in single rows."
    ),
    (
        "The trail itself holds settings, metrics and digests. A digest of data that can be guessed shows whether a "
        "guess is right."
    ),
)


def _protects(unit: str) -> str:
    if unit == "annotator":
        return (
            "Whoever sees the model, this report and the public trail can hardly tell what any one annotator answered, "
            "or whether her answers were used at all, counting all her answers together. That she is on the roster "
            "is public"
        )
    return (
        f"Whoever sees the model, this report and the public trail can hardly tell what stood in any one {unit}, or "
        f"whether it was used at all. That it is on the roster is public; several {unit}s of one person are not "
        "protected together"
    )


def composed_state(composed: Composed, *, trusted: bool) -> str:
    """The state of the composed guarantee, for colour and icon."""
    if not trusted:
        return "bad"
    if composed.contradicted:
        return "bad"
    bounded = composed.total is not None or bool(composed.releases or composed.inherited_runs)
    return "ok" if bounded and not composed.unbounded_runs else "warn"


def composed_words(composed: Composed, *, trusted: bool) -> str:
    """The guarantee of all runs composed, in words."""
    if not trusted:
        return "The trail does not verify. The figures below are what it says, and none of them can be relied on."
    if composed.releases:
        return _released_words(composed)
    if composed.total is None:
        said = "Nothing was trained here, so nothing was spent."
        if composed.inherited_runs:
            said = (
                f"Nothing was spent here: {words.plural(composed.inherited_runs, 'run')} learnt of people from models "
                "or labels that had been released before, as each run's own part says."
            )
        if composed.unbounded_runs:
            said = f"Every run here was {words.NO_BOUND} on what the model may reveal of the people in its data."
        return said + _set_budgets(composed)
    settled = "spent" if composed.settled else "spent or reserved (a reservation counts in full until it is settled)"
    said = (
        f"{_protects(composed.unit or 'unit')}. Her influence is bounded by " if composed.unit == "annotator"
        else f"{_protects(composed.unit or 'unit')}. The influence of each is bounded by "
    )  # fmt: skip
    bound = f"ε = {words.epsilon_text(composed.total)}", f"δ = {words.delta_text(composed.delta or 0)}"
    epsilon, delta = (figure.replace(" ", "\u00a0") for figure in bound)
    if composed.contradicted:
        at = ", ".join(f"#{index}" for index in composed.contradicted)
        said = f"Canaries of a training contradict the ε that it claims ({at}): what follows is claimed only. {said}"
    text = (
        f"{said}{epsilon} ({delta}), {settled} of "
        f"a budget of {words.number_text(composed.budget)}, "
        f"{words.plural(composed.private_runs, 'private run')} composed."
    )
    if composed.whose:
        text += f" This is the figure of {composed.whose}; that of every other population is no larger."
    for one in composed.raises:
        before, after = words.number_text(one.before), words.number_text(one.after)
        text += f" The budget was raised from {before} to {after} (#{one.before_index} → #{one.index})."
    text += _set_budgets(composed)
    if composed.unbounded_runs:
        text += (
            f" This bound does not reach {words.plural(composed.unbounded_runs, 'other run')} of this trail, "
            f"{words.NO_BOUND}: where the same people's data were used there, they are not protected by it."
        )
    if composed.other_deltas:
        deltas = ", ".join(map(words.delta_text, composed.other_deltas))
        text += f" Earlier reservations at δ = {deltas} are composed into it; their own figures are not comparable."
    return text


def _released_words(composed: Composed) -> str:
    """What releases of labels cost; trainings on them charge nothing."""
    _, last = composed.releases[-1]
    labels = sum(event.labels for _, event in composed.releases)
    text = (
        f"{words.plural(labels, 'preference label')} were flipped at random when they were released, "
        f"{words.plural(len(composed.releases), 'release')} in all. What can be told of any one label, from the "
        f"released rows and from all that is made of them, is bounded by ε\u00a0=\u00a0"
        f"{words.epsilon_text(last.epsilon_total)} (pure, δ\u00a0=\u00a00), of a budget of "
        f"{words.number_text(last.epsilon_budget)}. Not protected are {'; '.join(last.not_protected)}."
    )
    if composed.unbounded_runs:
        text += (
            f" This bound does not reach {words.plural(composed.unbounded_runs, 'run')} of this trail, "
            f"{words.NO_BOUND}: where the same labels were used there, they are not protected by it."
        )
    return text + _set_budgets(composed)


def _set_budgets(composed: Composed) -> str:
    return "".join(
        f" The trail's budget was set to ε = {words.number_text(event.epsilon)} (δ = {words.delta_text(event.delta)}) "
        f"by {event.by} (#{item.index}): “{event.reason}”."
        for item, event in composed.set_budgets
    )


def privacy_part(run: RunFacts, *, trusted: bool) -> PrivacyPart:
    """The privacy statement of one run."""
    title = run.started.experiment
    if run.guarantee == "untrained":
        return PrivacyPart(title, "na", "nothing trained", "Nothing was trained in this run, so nothing was spent.",
                           cite([run.item.index]))  # fmt: skip
    if run.guarantee == "none":
        at = [run.item.index, *(item.index for item, _ in run.trainers)]
        return PrivacyPart(title, "warn", "no bound", f"This run was {words.NO_BOUND}.", cite(at))
    if run.guarantee == "inherited":
        return _inherited_part(run, trusted=trusted)
    if run.guarantee == "asked" or not run.spends:
        return PrivacyPart(title, "bad", "no bound", "Differential privacy was asked for, but a training stands "
                           "without a recorded spend: no bound can be stated.", cite([run.item.index]))  # fmt: skip
    spend = run.spends[-1]
    facts = tuple(fact for number, one in enumerate(run.spends, 1) for fact in _spend_facts(one, number, run))
    if not trusted:
        return PrivacyPart(title, "bad", "not verified", _spend_words(spend), cite(spend.indices), facts)
    contradicted = [one for one in run.spends if one.contradicted]
    if contradicted:
        said = " ".join(
            [words.canary_words(one.audited[1]) for one in contradicted if one.audited] + [_spend_words(spend)]
        )
        indices = {*spend.indices, *(index for one in contradicted for index in _indices(one))}
        return PrivacyPart(title, "bad", "contradicted by canaries", said, cite(sorted(indices)), facts)
    state = "ok" if spend.settled else "warn"
    said = _spend_words(spend)
    if spend.audited is not None:
        said += f" {words.canary_words(spend.audited[1])}"
    return PrivacyPart(title, state, _bound(spend), said, cite(_indices(spend)), facts)


def _indices(spend: Spend) -> tuple[int, ...]:
    return spend.indices + (() if spend.audited is None else (spend.audited[0].index,))


def _inherited_part(run: RunFacts, *, trusted: bool) -> PrivacyPart:
    """What a run inherits that charged nothing of its own."""
    at = cite(item.index for item, _ in run.inherited)
    said = " ".join(inherited_words(event) for _, event in run.inherited)
    facts = tuple(fact for item, event in run.inherited for fact in _inherited_facts(event, cite([item.index])))
    if not trusted:
        return PrivacyPart(run.started.experiment, "bad", "not verified", said, at, facts)
    _, last = run.inherited[-1]
    return PrivacyPart(run.started.experiment, "ok", inherited_bound(last), said, at, facts)


def inherited_bound(event: PrivacyInherited) -> str:
    """The inherited figure with all that it means nothing without."""
    return (
        f"inherits ε {words.epsilon_text(event.epsilon)}, δ {words.delta_text(event.delta)}, per {event.unit}; "
        "nothing was charged"
    )


def inherited_words(event: PrivacyInherited) -> str:
    """What was inherited from where, as a sentence."""
    runs = sorted({words.short(str(source["run"])) for source in event.sources if source.get("run")})
    if runs:
        source = f"from run {', '.join(runs)}" if len(runs) == 1 else f"from the runs {', '.join(runs)}"
    else:
        source = (
            "from labels that had been flipped at random when they were released"
            if event.kind == "released-labels"
            else "from nothing protected"
        )
    prompts = f" Its prompts were {event.prompts}." if event.prompts else ""
    note = f" {event.note}" if event.note else ""
    return (
        f"This training inherits ε = {words.epsilon_text(event.epsilon)} (δ = {words.delta_text(event.delta)}, per "
        f"{event.unit}) {source}; nothing was charged, because it learnt of protected data through these only."
        f"{prompts}{note}"
    )


def _inherited_facts(event: PrivacyInherited, at: Cites) -> Iterator[Fact]:
    yield Fact("ε inherited, composed", _epsilon(event.epsilon), at, note=f"δ {words.delta_text(event.delta)}")
    yield Fact("Unit", event.unit, at)
    for source in event.sources:
        entry = source.get("entry")
        where = (*at, *cite([entry])) if isinstance(entry, int) else at
        run = f"run {words.short(str(source['run']))}" if source.get("run") else "declared or released"
        yield Fact(f"Through {source.get('role', 'data')}", f"{run}, sha256 {source.get('digest')}", where, mono=True)


def _bound(spend: Spend) -> str:
    """The figure with all that it means nothing without."""
    reserved = spend.reserved
    state = "" if spend.settled else " reserved"
    return (
        f"ε {words.epsilon_text(spend.total)}{state} of {words.number_text(reserved.epsilon_budget)}, "
        f"δ {words.delta_text(reserved.delta)}, per {reserved.unit}, {reserved.adjacency}, composed up to this run"
    )


def _spend_words(spend: Spend) -> str:
    reserved, settled = spend.reserved, spend.settled
    rate = words.number_text(reserved.sampling_rate)
    most, clip = words.plural(reserved.max_pairs_per_unit, "pair"), words.number_text(reserved.clipping_norm)
    if reserved.sampled == "pairs":
        drawn = (
            f"Of every {reserved.unit} at most {most} were kept for the whole training. In each step every kept pair "
            f"was drawn with probability {rate} and its gradient clipped to {clip}; accounted for are all pairs of one "
            f"{reserved.unit} together"
        )
    else:
        drawn = (
            f"In each step every {reserved.unit} was drawn with probability {rate}; of each at most {most} entered, "
            f"their gradient clipped to {clip}"
        )
    text = (
        f"{drawn}, and Gaussian noise of standard deviation "
        f"{words.number_text(reserved.noise_multiplier * reserved.clipping_norm)} was added to the sum. "
    )
    if reserved.loss_bound is not None and reserved.loss_noise_multiplier is not None:
        noise = words.number_text(reserved.loss_noise_multiplier * reserved.loss_bound / 2)
        text += (
            f"The loss of the same draw, clipped to {words.number_text(reserved.loss_bound)}, was released with noise "
            f"of standard deviation {noise} on its sum, and charged. "
        )
    if spend.doubt is not None:
        return text + spend.doubt
    if settled is None:
        return text + "The spend was reserved and never settled, so all of it counts."
    text += f"{words.plural(settled.steps, 'step')} ran"
    if settled.stopped_by_budget:
        return text + "; the run stopped before the step that would have crossed the budget."
    return text + "."


def _spend_facts(spend: Spend, number: int, run: RunFacts) -> tuple[Fact, ...]:
    reserved, settled = spend.reserved, spend.settled
    at = cite([spend.item.index])
    by = f", by the column {reserved.column}" if reserved.column else ""
    unit = f"{reserved.unit}{by} (neighbouring data sets differ in all that one {reserved.unit} gave)"
    adjacency = f"{reserved.adjacency}: the roster is public, what each gave is not" if (
        reserved.adjacency == "zero-out") else reserved.adjacency  # fmt: skip
    accountants = words.accountants_text(reserved.accountants)
    seed = "sealed before the first step" if spend.item.sealed else "not sealed"
    facts = [
        Fact("Unit", unit, at),
        Fact("Adjacency", adjacency, at),
        Fact("Roster", words.plural(reserved.units, reserved.unit), at),
        Fact("Mechanism", f"{reserved.mechanism}; engine {reserved.engine}", at),
        Fact("Noise multiplier σ", words.number_text(reserved.noise_multiplier), at),
        *_loss_facts(reserved, at),
        Fact("Sampling rate q", words.number_text(reserved.sampling_rate), at),
        Fact("Steps T", f"{words.count(reserved.steps)} reserved of {words.count(reserved.steps_asked)} asked for"
             + (f"; {words.count(settled.steps)} ran" if settled else ""), cite(spend.indices)),
        Fact("Clipping norm C", words.number_text(reserved.clipping_norm), at),
        Fact(_pairs_label(reserved.sampled), f"at most {words.count(reserved.max_pairs_per_unit)}", at),
        Fact("δ", words.delta_text(reserved.delta), at),
        Fact("ε budget", words.number_text(reserved.epsilon_budget), at),
        Fact("ε before", _epsilon(reserved.epsilon_before), at),
        Fact("ε planned, composed", _epsilon(reserved.epsilon_planned), at),
    ]  # fmt: skip
    if settled is None or spend.settled_item is None:
        facts.append(Fact("ε spent, composed", f"not settled: {_epsilon(spend.total)} counts in full", at))
    else:
        alone = f"this training alone {_epsilon(settled.epsilon_run)}"
        there = cite([spend.settled_item.index])
        facts.append(Fact("ε spent, composed", _epsilon(settled.epsilon_total), there, note=alone))
    if spend.audited is not None:
        found, where = spend.audited[1], cite([spend.audited[0].index])
        facts.append(
            Fact("ε shown by canaries", f"{found.outcome}: at least {words.number_text(found.epsilon_lower)} of the "
                 f"{_epsilon(found.epsilon_claimed)} claimed, from {words.count(found.right)} right of "
                 f"{words.count(found.guesses)} guesses about {words.count(found.canaries)} canaries", where,
                 note=f"at most {words.number_text(found.ceiling)} can be shown")
        )  # fmt: skip
    elif reserved.canaries:
        facts.append(Fact("ε shown by canaries", f"{words.count(reserved.canaries)} took part; nothing recorded", at))
    facts += [
        Fact("Accountants, planned total", accountants, at),
        Fact("Randomness", f"{reserved.generator}; seed {seed}", at),
    ]
    if len(run.spends) == 1:
        return tuple(facts)
    return tuple(Fact(f"Training {number}: {f.label}", f.value, f.cites, f.mono, f.note) for f in facts)


def _pairs_label(sampled: str) -> str:
    return "Pairs of a unit kept, sampled one by one, k" if sampled == "pairs" else "Pairs of a unit in a step k"


def _loss_facts(reserved: Any, at: Cites) -> list[Fact]:
    """What was released beside the gradient."""
    if reserved.loss_bound is None or reserved.loss_noise_multiplier is None:
        return []
    noise = words.number_text(reserved.loss_noise_multiplier)
    return [
        Fact("Live loss", f"clipped to {words.number_text(reserved.loss_bound)}, noise multiplier {noise}; in ε", at)
    ]


def _epsilon(value: Any) -> str:
    return words.epsilon_text(value, 4)


def guarantee_fact(run: RunFacts, at: Cites, *, trusted: bool) -> list[Fact]:
    """One line on the guarantee of a run."""
    if not trusted:
        return [Fact("Differential privacy", "not verified", at)]
    if run.guarantee == "bound":
        spend = run.spends[-1]
        value = _bound(spend)
        if any(one.contradicted for one in run.spends):
            value = f"contradicted by canaries; claimed is {value}"
        return [Fact("Differential privacy", value, cite(spend.indices))]
    if run.guarantee == "inherited":
        item, event = run.inherited[-1]
        return [Fact("Differential privacy", inherited_bound(event), cite([item.index]))]
    value = {"none": words.NO_BOUND, "asked": "asked for, but no bound can be stated"}.get(
        run.guarantee, "nothing was trained")  # fmt: skip
    return [Fact("Differential privacy", value, at)]
