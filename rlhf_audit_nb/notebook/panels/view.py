"""The view of one moment: every number of the run and its trail put into words. Floor 6.

Pure: the same state, status and verification give the same view, a plain JSON object. Under differential privacy only
the series named in ``PUBLIC_SERIES`` are read at all.
"""

from __future__ import annotations

import base64
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.capture.state import PRIVATE_LOSS, SMOOTHING, smoothed_deviation
from rlhf_audit_nb.notebook.panels.words import (
    say_bound,
    say_count,
    say_delta,
    say_number,
    say_root,
    say_signer,
    say_time,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.notebook.panels.sources import InheritedLike, PrivacyLike, StateLike, StatusLike, VerdictLike

__all__ = ["NO_PRIVACY", "PUBLIC_SERIES", "SEALED_LOSS", "Check", "View", "build_view", "latest"]

PUBLIC_SERIES = (PRIVATE_LOSS, "gradient_norm", "update_norm", "learning_rate")
"""Series that may be shown of a private run: the loss that was released through the mechanism, what follows from the
privatised gradient, and the schedule."""

NO_PRIVACY = "No differential privacy: this run gives no bound"
RELEASED_LOSS = (
    f"The private loss is clipped, noised and charged in ε at every step, and drawn as a mean over about {SMOOTHING} "
    "steps; ± is twice its noise's standard deviation."
)
SEALED_LOSS = "The exact loss is sealed in the vault, because it is a function of private data."

View = dict[str, Any]

COARSE_SECONDS = 60.0
"""Under differential privacy moments are told in whole minutes, as in the entries."""


@dataclass(frozen=True)
class Check:
    """One finished verification: its verdict, or the sentence that says why there is none; ``at`` is Unix time."""

    at: float
    verdict: VerdictLike | None = None
    error: str | None = None


_STATUS: dict[str, tuple[str, str]] = {
    "open": ("waiting for a trainer", "na"),
    "training": ("training", "live"),
    "completed": ("completed", "ok"),
    "failed": ("failed", "bad"),
    "interrupted": ("interrupted", "warn"),
    "stopped-by-budget": ("stopped by the budget", "warn"),
}

_LEVELS: dict[str, tuple[str, str]] = {
    "INVALID": ("bad", "What is stored is not what was signed. Nothing that is read from this trail can be relied on."),
    "DIVERGED": ("bad", "This trail contradicts an earlier state of itself that was seen before."),
    "UNANCHORED": ("warn", "Signed and consistent. Nobody outside has seen it yet."),
    "TIMESTAMPED": ("attest", "Signed, consistent, and its time is attested from outside."),
    "COSIGNED": ("ok", "Signed, consistent, and countersigned by a witness."),
}

_UNITS: dict[str, str] = {"annotator": "all answers of one together", "pair": "one preference", "label": "one bit"}

_LABELS: dict[str, str] = {
    PRIVATE_LOSS: "private loss",
    "gradient_norm": "gradient norm",
    "update_norm": "update norm",
    "learning_rate": "learning rate",
}

# Which series come first, and how many are shown: TRL reports some twenty of a plain run.
_FIRST = ("loss", "eval_loss", "rewards/margins", "rewards/accuracies", *PUBLIC_SERIES)
_MOST_SERIES = 8


def _spent(state: StateLike, privacy: PrivacyLike) -> float:
    """The composed ε after the steps that were taken; the state's own series stands before the planned curve."""
    known = state.series.get("epsilon")
    if known:
        return float(known[-1][1])
    curve = privacy.curve
    if not curve:
        return float(privacy.before)
    return float(curve[min(max(state.step, 0), len(curve) - 1)])


def _share(value: float, whole: float) -> float:
    if not whole > 0 or math.isnan(value):
        return 0.0
    return 1.0 if math.isinf(value) else round(min(1.0, max(0.0, value / whole)), 4)


def _privacy_view(state: StateLike) -> View:
    if not state.private and state.inherited is not None:
        return _inherited_view(state.inherited)
    if not state.private:
        return {
            "heading": "Privacy",
            "bounded": False,
            "big": NO_PRIVACY,
            "of": "",
            "note": "What the trained model gives away about any one annotator is not limited. "
            "A privacy budget (epsilon) for the run would limit it.",
            "label": f"{NO_PRIVACY}.",
        }
    privacy = state.privacy
    if privacy is None:
        return {
            "heading": "Privacy spent",
            "bounded": True,
            "big": "ε planned later",
            "of": "",
            "note": "The plan is made, and reserved in the trail, when a trainer starts to train.",
            "label": "Differential privacy is on; its plan is made when a trainer starts to train.",
        }
    return _plan_view(state, privacy)


def _inherited_view(inherited: InheritedLike) -> View:
    bound = f"ε {say_bound(inherited.epsilon)}"
    runs = ", ".join(run[:8] for run in inherited.runs)
    said = f"It comes with the models that this run learns from{f' (run {runs})' if runs else ''}."
    if inherited.unit == "label" and not runs:
        said = "It comes with the labels, which were flipped at random. Texts and who annotated are not protected."
    return {
        "heading": "Privacy inherited",
        "bounded": True,
        "big": bound,
        "of": f"at δ {say_delta(inherited.delta)}, for each {inherited.unit}",
        "note": f"{said} Nothing is charged here.",
        "label": f"Inherits {bound} at δ {say_delta(inherited.delta)} for each {inherited.unit}; nothing is charged.",
    }


def _plan_view(state: StateLike, privacy: PrivacyLike) -> View:
    spent = _spent(state, privacy)
    now, budget = say_bound(spent), say_bound(privacy.budget)
    before, planned = say_bound(privacy.before), say_bound(privacy.planned)
    whole = max(privacy.budget, privacy.planned)
    unit = _UNITS.get(privacy.unit)
    each = f"each {privacy.unit}" + (f" ({unit})" if unit else "")
    sentence = (
        f"ε composed over all runs: {before} before this run, {now} now, {planned} at the planned end, "
        f"of a budget of {budget}, at δ {say_delta(privacy.delta)}, for each {privacy.unit}."
    )
    return {
        "heading": "Privacy spent",
        "bounded": True,
        "big": f"ε {now}",
        "of": f"of {budget}, δ {say_delta(privacy.delta)}",
        "bar": {
            "before": _share(privacy.before, whole),
            "now": _share(spent, whole),
            "planned": _share(privacy.planned, whole),
            "budget": _share(privacy.budget, whole),
        },
        "keys": [
            {"kind": "before", "text": f"before {before}"},
            {"kind": "now", "text": f"now {now}"},
            {"kind": "planned", "text": f"planned {planned}"},
        ],
        "chart": _chart_view(state, privacy, spent),
        "note": f"Protects {each}, {privacy.units:,} of them. {privacy.adjacency.capitalize()} adjacency. "
        "Composed over all runs, not added." + _audited(privacy),
        "label": sentence,
    }


def _audited(privacy: PrivacyLike) -> str:
    """What the canaries of the training showed, as a sentence; nothing where there were none, or it goes on."""
    found = privacy.audited
    if found is None:
        return ""
    shown, claimed = say_number(found.epsilon_lower), say_bound(found.epsilon_claimed)
    text = (
        f" {say_count(found.canaries, 'canary', 'canaries')} show ε ≥ {shown} of the {claimed} claimed for this "
        f"training ({100 * found.confidence:g} % of confidence; so many can show {say_number(found.ceiling)} at most)."
    )
    return f"{text} That contradicts the claim: do not release the model." if found.failed else text


def _chart_view(state: StateLike, privacy: PrivacyLike, spent: float) -> View:
    """The ε curve's frame: where the run stands on it, how high it reaches, and what its axis says."""
    steps = max(len(privacy.curve) - 1, 0)
    step = _position(state.step, spent, privacy.curve)
    now, planned, budget = say_bound(spent), say_bound(privacy.planned), say_bound(privacy.budget)
    reach = max(value for value in (privacy.planned, spent, privacy.before, 0.0) if math.isfinite(value))
    # A budget far above the plan would press the curve to the floor: then it is named, not drawn.
    drawn = reach >= privacy.budget / 4
    top = 1.04 * max(privacy.budget if drawn else 1.2 * reach, reach) or 1.0
    ticks = [{"at": 0, "text": "0"}]
    for value in (privacy.planned, privacy.before):
        if math.isfinite(value) and all(abs(value - tick["at"]) > top / 6 for tick in ticks):  # type: ignore[operator]
            ticks.append({"at": value, "text": say_bound(value)})
    return {
        "step": step,
        "steps": steps,
        "spent": spent if math.isfinite(spent) else None,
        "top": top,
        "limit": {"at": privacy.budget if drawn else None, "text": f"budget {budget}" + ("" if drawn else " above")},
        "ticks": ticks,
        "label": f"ε over the steps of this run: {now} at step {step:,}, {planned} at step {steps:,}, budget {budget}.",
    }


def _position(step: int, spent: float, curve: Sequence[float]) -> int:
    """The step of the plan at which the run stands; a run of several trainings counts its steps on and on."""
    last = max(len(curve) - 1, 0)
    if 0 <= step <= last and (not curve or math.isclose(curve[step], spent, rel_tol=1e-6, abs_tol=1e-9)):
        return step
    return min(max(bisect_right(curve, spent * (1 + 1e-9)) - 1, 0), last)


def latest(state: StateLike) -> dict[str, float]:
    """The newest value of each series that is shown, the important ones first."""
    names = [name for name in list(state.series) if name != "epsilon"]
    if state.private:
        names = [name for name in PUBLIC_SERIES if name in names]
    ordered = [name for name in _FIRST if name in names] + sorted(set(names) - set(_FIRST))
    return {name: float(state.series[name][-1][1]) for name in ordered[:_MOST_SERIES] if state.series[name]}


def _metric_label(name: str, *, private: bool) -> str:
    if private and name == "gradient_norm":
        return "privatised gradient norm"
    return _LABELS.get(name, name)


def _metric_value(state: StateLike, name: str, value: float) -> str:
    said = say_number(value, full=True)
    if name != PRIVATE_LOSS or state.privacy is None or state.privacy.loss_deviation is None:
        return said
    return f"{said} ± {say_number(2 * smoothed_deviation(state.privacy.loss_deviation, len(state.series[name])))}"


def _training_view(state: StateLike) -> View:
    shown = latest(state)
    most = state.max_steps or 0
    privacy = state.privacy if state.private else None
    if privacy is not None and privacy.curve:
        most = min(most, len(privacy.curve) - 1) if most else len(privacy.curve) - 1
    if state.step > most:  # several trainings in one run: the plan of the last one is no measure for all steps
        most = 0
    metrics = [
        {"name": name, "label": _metric_label(name, private=state.private), "value": _metric_value(state, name, value)}
        for name, value in shown.items()
    ]
    facts = []
    if privacy is not None:
        of_what = " of each pair" if privacy.sampled == "pairs" else ""
        facts = [
            {"term": "noise σ", "text": say_number(privacy.noise_multiplier)},
            {"term": "sampling q", "text": say_number(privacy.sampling_rate) + of_what},
            {"term": "clipping C", "text": say_number(privacy.clipping_norm)},
        ]
    if state.private:
        note = f"{RELEASED_LOSS} {SEALED_LOSS}" if PRIVATE_LOSS in shown else f"{SEALED_LOSS} Shown is what is public."
    elif state.inherited is not None:
        note = "Loss and metrics follow from private models and public prompts, so they are public."
    else:
        note = "Loss and metrics are plain: exact, unprotected, and recorded as such."
        others = len([name for name in list(state.series) if name != "epsilon"]) - len(shown)
        note += f" {say_count(others, 'more series stands', 'more series stand')} in the trail." if others > 0 else ""
    of = f"of {say_count(most, 'step')}" if most else "steps"
    said = ", ".join(f"{item['label']} {item['value']}" for item in metrics)
    return {
        "heading": "Training",
        "big": f"{state.step:,}",
        "of": of,
        "most": most or None,
        "progress": _share(state.step, most) if most else None,
        "metrics": metrics,
        "facts": facts,
        "note": note,
        "label": f"Step {state.step:,}{f' of {most:,}' if most else ''}." + (f" Latest: {said}." if said else ""),
    }


def _integrity_view(status: StatusLike | None, check: Check | None, *, coarse: bool) -> View:
    """``coarse``: moments in whole minutes, since how long a private run takes depends on its data."""
    rows: list[View] = []
    if status is not None:
        whole = base64.b64encode(status.root).decode()
        rows = [
            {"key": "root", "term": "root", "text": say_root(status.root), "copy": whole, "mono": True},
            {
                "key": "signer",
                "term": "signed by",
                "text": say_signer(status.signer),
                "copy": status.signer,
                "mono": True,
            },
        ]
        if status.last_commit_time_us is not None:
            commit = _moment(status.last_commit_time_us / 1e6, coarse=coarse)
            rows.append(
                {"key": "commit", "term": "last commit", "text": say_time(commit), **_when(commit, coarse=coarse)}
            )
        rows.append({"key": "unsynced", "term": "not yet synced", "text": f"{status.unsynced:,}"})
    rows.append(_verified_row(check, coarse=coarse))
    size = status.size if status is not None else 0
    entries = "entry" if size == 1 else "entries"
    return {
        "heading": "Integrity",
        "big": f"{size:,}",
        "of": entries,
        "rows": rows,
        "note": _level(check)["meaning"],
        "label": f"The trail holds {size:,} {entries}. " + _level(check)["sentence"],
    }


def _moment(unix: float, *, coarse: bool) -> float:
    return unix - unix % COARSE_SECONDS if coarse else unix


def _when(unix: float, *, coarse: bool) -> View:
    """For whoever counts how long ago that is; ``within`` so many seconds after it, where it is told coarsely."""
    return {"time": round(unix, 3), **({"within": COARSE_SECONDS} if coarse else {})}


def _verified_row(check: Check | None, *, coarse: bool) -> View:
    row: View = {"key": "verified", "term": "verified", "text": "not yet"}
    if check is None:
        return row
    if check.verdict is None:
        return {**row, "text": "could not be", "detail": check.error or ""}
    held = say_count(check.verdict.size, "entry", "entries")
    at = _moment(check.at, coarse=coarse)
    return {**row, "text": say_time(at), **_when(at, coarse=coarse), "detail": held}


def _level(check: Check | None) -> View:
    if check is None:
        return {
            "word": "not verified yet",
            "tone": "na",
            "meaning": "Nothing was checked yet; no level is claimed.",
            "sentence": "It was not verified yet.",
        }
    if check.verdict is None:
        return {
            "word": "not verified",
            "tone": "na",
            "meaning": f"No level is claimed. {check.error or ''}".rstrip(),
            "sentence": "It could not be verified.",
        }
    word = check.verdict.level.name
    tone, meaning = _LEVELS.get(word, ("na", ""))
    return {"word": word, "tone": tone, "meaning": meaning, "sentence": f"Level {word}. {meaning}"}


def _alert(check: Check | None) -> View | None:
    if check is None or check.verdict is None or check.verdict.level.name not in {"INVALID", "DIVERGED"}:
        return None
    altered = check.verdict.level.name == "INVALID"
    reasons = list(check.verdict.reasons)
    return {
        "title": "The trail does not hold" if altered else "The trail contradicts its past",
        "reasons": [{"where": str(reason.where), "text": reason.message} for reason in reasons[:3]],
        "more": f"and {say_count(len(reasons) - 3, 'more reason')}" if len(reasons) > 3 else "",  # noqa: PLR2004
        "command": "rlhf-audit verify",
    }


def build_view(
    state: StateLike, status: StatusLike | None, check: Check | None = None, *, frozen: bool = False
) -> View:
    """The view of one moment, without its points. The same arguments give the same view.

    Args:
        state: the run; under differential privacy only its public series are read.
        status: where the trail stands; ``None`` where that is not known.
        check: the last finished verification; ``None`` shows "not verified yet", never a level.
        frozen: no further update will come: times stand as times, not as ages.
    """
    word, tone = _STATUS.get(state.status, (state.status, "na"))
    training = _training_view(state)
    level = _level(check)
    where = f"step {training['big']} of {training['most']:,}" if training["most"] else ""
    text = " · ".join(part for part in (word, where) if part)
    return {
        "title": state.experiment,
        "run": state.run_id,
        "private": bool(state.private),
        "frozen": frozen,
        "status": {"word": word, "tone": tone, "text": text},
        "level": {key: level[key] for key in ("word", "tone", "meaning")},
        "alert": _alert(check),
        "privacy": _privacy_view(state),
        "training": training,
        "integrity": _integrity_view(status, check, coarse=bool(state.private)),
        "warnings": [str(item) for item in list(state.warnings)[-3:]],
        "label": f"Audit of run {state.experiment}: {text}. {level['sentence']}",
    }
