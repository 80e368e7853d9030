"""The main job from end to end, as ``rlhf-audit demo`` shows it: preferences in, everything else out. Floor 5.

Composes the floors below and owns only the layout of what it leaves behind: ``record.ipynb``, ``report.html``,
``report.pdf``, ``model_card.md``, ``model/`` (with ``model.sig``; the key beside it as ``model.pub``), ``model-base/``
where the model was made here, ``audit/`` (the trail) and ``trust.policy``. Each showing is a trail of its own, so an
earlier one in the same folder is removed first, but nothing else that lies there.
"""

from __future__ import annotations

import base64
import shutil
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import AuditError, ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.trail import Verdict

__all__ = ["NOTEBOOK", "Showing", "notebook_path", "run_demo"]

NOTEBOOK = "01_dpo_private.ipynb"
MADE = (
    "record.ipynb", "report.html", "report.pdf", "model_card.md", "model", "model-base", "model.pub", "audit",
    "trust.policy",
)  # fmt: skip
MARK = ".rlhf-audit-demo"
POLL_SECONDS = 1.0
STEPS_BETWEEN = 5
WIDTH = 100

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Showing:
    """What a demo left behind.

    Args:
        folder: where it all lies.
        verdict: what verification says of the record.
        privacy: the composed ε with all that must stand beside it; ``None`` where there is no bound.
        data: what was trained on.
        seconds: how long it took.
    """

    folder: Path
    verdict: Verdict
    privacy: dict[str, Any] | None
    data: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Paths, verdict and ε as plain values."""
        paths = {name: str(self.folder / name) for name in MADE if (self.folder / name).exists()}
        return {
            "data": self.data,
            "files": paths,
            "privacy": self.privacy,
            "verdict": self.verdict.to_dict(),
            "seconds": round(self.seconds, 1),
        }

    def words(self) -> list[str]:
        """The same for a person."""
        from rlhf_audit_nb.compliance.words import NO_BOUND, delta_text, epsilon_text, level_words

        spent = self.privacy
        privacy = NO_BOUND
        if spent is not None:
            privacy = (
                f"ε {epsilon_text(spent['epsilon'], 3)} of {epsilon_text(spent['budget'], 3)}, "
                f"δ {delta_text(spent['delta'])}; protects each {spent['unit']} ({spent['units']} of them), "
                f"{spent['adjacency']} adjacency"
            )
        words = level_words(self.verdict.level.name)
        place = self.folder
        return [
            "",
            f"  record       {place / 'record.ipynb'}",
            f"  report       {place / 'report.html'}   {place / 'report.pdf'}",
            f"  model        {place / 'model'}/   its key: {place / 'model.pub'}",
            f"  model card   {place / 'model_card.md'}",
            f"  trail        {place / 'audit'}/   whom to trust: {place / 'trust.policy'}",
            "",
            *_wrapped("  verdict      ", f"{self.verdict.level.name}: {words.shows} {words.not_shown}"),
            *_wrapped("  privacy      ", privacy),
            "",
            f"  check it     rlhf-audit verify {place / 'record.ipynb'} --policy {place / 'trust.policy'}",
        ]


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def notebook_path() -> Path:
    """The example notebook: inside an installed package, or beside it in a checkout.

    Raises:
        ConfigError: it is in neither place.
    """
    package = Path(__file__).resolve().parent
    for root in (package, package.parent):
        path = root / "example_notebooks" / NOTEBOOK
        if path.exists():
            return path
    raise ConfigError(
        f"The notebook {NOTEBOOK} is missing from this installation.",
        next_step="Install rlhf-audit-trail again.",
        code="missing-notebook",
    )


def run_demo(folder: Path, parameters: Mapping[str, Any], tell: Tell) -> Showing:
    """Does the main job into ``folder``.

    Args:
        folder: where everything goes; an earlier demo there is replaced.
        parameters: values for the notebook's parameters cell.
        tell: called with each line of progress.

    Raises:
        AuditError: whatever stopped it; what was done until then stays in the folder.
    """
    from rlhf_audit_nb.records import run_notebook

    began = time.monotonic()
    _check_settings(parameters)
    data = _check_data(parameters)
    _start_over(folder, tell)
    tell(f"[1/4] training on {data} with privacy for the annotators, in a notebook that becomes a record")
    record, trail = folder / "record.ipynb", folder / "audit"
    values = {**parameters, "output_dir": str(folder / "model")}
    with _progress_of(trail, tell):
        run_notebook(notebook_path(), record, values, trail=trail)
    tell("[2/4] writing down whom to trust: the trail's public keys")
    _write_keys(folder, trail)
    tell("[3/4] verifying the record with nothing but itself and those keys")
    evidence = _open(folder)
    tell("[4/4] drawing the report (HTML and PDF) and the model card")
    _write_reports(folder, evidence)
    return Showing(folder, evidence.verdict, _privacy(evidence), data, time.monotonic() - began)


def _check_settings(parameters: Mapping[str, Any]) -> None:
    """The bounds that the notebook's cells would find, before anything is removed or trained."""
    from rlhf_audit_nb.config import PrivacyConfig

    asked = {name: parameters[name] for name in ("delta", "unit") if name in parameters}
    PrivacyConfig(epsilon=parameters.get("epsilon", 8.0), **asked)
    for name, least, most in (("steps", 1, 2**31 - 1), ("seed", 0, 2**32 - 1)):
        value = parameters.get(name, least)
        if not least <= value <= most:
            raise ConfigError(
                f"{name} is {value}; it must lie between {least} and {most}.",
                next_step=f"Write a whole number such as {max(least, 1)}, or leave it out.",
                code=name,
            )


def _check_data(parameters: Mapping[str, Any]) -> str:
    """Reads the data once before anything is removed or trained, so that a mistake costs nothing."""
    from rlhf_audit_nb.demo.preferences import SIMULATED, load_preferences

    source = parameters.get("data", SIMULATED)
    load_preferences(source, columns=parameters.get("columns"))
    return "the simulated preference set (no person voted in it)" if source == SIMULATED else str(source)


def _start_over(folder: Path, tell: Tell) -> None:
    there = [folder / name for name in MADE if (folder / name).exists()]
    if there and not (folder / MARK).exists():
        raise ConfigError(
            f"{folder} holds {there[0].name}, and no earlier demo put it there.",
            next_step="Name another folder with --out.",
            code="output",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
        if there:
            tell(f"starting over: removing the earlier demo in {folder}")
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be used: {error.strerror or error}.",
            next_step="Name another folder with --out.",
            code="output",
        ) from error


@contextmanager
def _progress_of(trail: Path, tell: Tell) -> Iterator[None]:
    """Tells how far training is, read from the trail that another process is writing."""
    done = threading.Event()

    def follow() -> None:
        told = 0
        while not done.wait(POLL_SECONDS):
            told = _tell_steps(trail, told, tell)
        _tell_steps(trail, told, tell)

    thread = threading.Thread(target=follow, name="demo-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tell_steps(trail: Path, told: int, tell: Tell) -> int:
    from rlhf_audit_nb.events import Step, TrainerAttached, decode_body
    from rlhf_audit_nb.trail import TrailReader

    try:
        reader = TrailReader.open(trail)
        attached = [decode_body(e.type, e.body) for e in reader.entries(type=TrainerAttached.TYPE)]
        steps = [decode_body(e.type, e.body) for e in reader.entries(type=Step.TYPE)]
    except AuditError:
        return told  # the trail is not there yet; the next look will tell
    if not steps or not attached:
        return told
    last, trainer = steps[-1], attached[-1]
    assert isinstance(last, Step)
    assert isinstance(trainer, TrainerAttached)
    if last.step < told + STEPS_BETWEEN and last.step != trainer.max_steps:
        return told
    if last.step == told:
        return told
    spent = "" if last.epsilon is None else f", ε {float(last.epsilon):.3f}"
    tell(f"      step {last.step} of {trainer.max_steps}{spent}")
    return last.step


def _write_keys(folder: Path, trail: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

    from rlhf_audit_nb.events import TrailCreated, decode_body
    from rlhf_audit_nb.trail import TrailReader, TrustPolicy

    first = next(iter(TrailReader.open(trail).entries(0, 1)))
    created = decode_body(first.type, first.body)
    assert isinstance(created, TrailCreated)
    key = load_der_public_key(base64.b64decode(created.model_key))
    (folder / "trust.policy").write_text(TrustPolicy.of(created.log_key).format(), encoding="utf-8")
    (folder / "model.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def _open(folder: Path) -> Evidence:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.records import open_record
    from rlhf_audit_nb.trail import TrustPolicy

    policy = TrustPolicy.parse((folder / "trust.policy").read_text(encoding="utf-8"))
    return Evidence.from_record(open_record(folder / "record.ipynb", policy=policy))


def _write_reports(folder: Path, evidence: Evidence) -> None:
    from rlhf_audit_nb.cards import build_card
    from rlhf_audit_nb.reports import build_compliance_report

    report = build_compliance_report(evidence, "eu_ai_act")
    report.save(folder / "report.html")
    report.save(folder / "report.pdf")
    build_card(evidence, "eu_standard").save(folder / "model_card.md")


def _privacy(evidence: Evidence) -> dict[str, Any] | None:
    """What was spent, or ``None`` without differential privacy."""
    from rlhf_audit_nb.events import PrivacyReserved, PrivacySettled

    reserved, settled = evidence.of(PrivacyReserved), evidence.of(PrivacySettled)
    if not reserved:
        return None
    plan = reserved[-1][1]
    return {
        "epsilon": settled[-1][1].epsilon_total if settled else plan.epsilon_planned,
        "budget": plan.epsilon_budget,
        "delta": plan.delta,
        "unit": plan.unit,
        "units": plan.units,
        "adjacency": plan.adjacency,
    }
