"""A training run told in real entries, for the tests of compliance, reports and cards."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import msgspec
import nbformat.v4 as nb

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.compliance import Evidence
from rlhf_audit_nb.trail.entry import Entry, Envelope, encode_envelope

START = 1_795_359_000_000_000  # 2026-11-22
PLANTED = "PLANTED-PRIVATE-VALUE-7f3a"
RUN = "3f1a7c5e9b2d4f60a1b2c3d4e5f60718"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Teller:
    """Appends events one by one, as the trail would."""

    entries: list[Entry] = field(default_factory=list)
    sequences: dict[str, int] = field(default_factory=dict)
    now: int = START

    def tell(self, event: ev.Event, run: str | None = None, private: ev.Private | None = None, after: float = 1) -> int:
        self.now += int(after * 1e6)
        stream = run or "writer:w1"
        seq = self.sequences.get(stream, -1) + 1
        self.sequences[stream] = seq
        sealed = None
        if private is not None:  # an opening's key is random in the trail; what matters here is that only it stands
            sealed = base64.b64encode(hashlib.sha256(ev.encode_private(private) + stream.encode()).digest()).decode()
        envelope = Envelope(
            v=1, type=event.TYPE, time=self.now, run=run, seq=seq, writer="w1",
            body=msgspec.Raw(ev.encode_body(event)), sealed=sealed,
        )  # fmt: skip
        data = encode_envelope(envelope)
        self.entries.append(Entry.decode(len(self.entries), data))
        return len(self.entries) - 1


def verdict(entries, level="UNANCHORED", reasons=(), origin="example.com/rlhf-audit"):
    from rlhf_audit_nb.trail.merkle import leaf_hash

    root = base64.b64encode(leaf_hash(b"".join(entry.data for entry in entries))).decode()
    made = SimpleNamespace(
        level=SimpleNamespace(name=level), origin=origin, size=len(entries), root=root,
        signers=(f"{origin}+1c2b3a4d+AQ==",), runs=(), reasons=tuple(reasons), anchors=(),
    )  # fmt: skip
    made.to_dict = lambda: {
        "level": level, "origin": origin, "size": len(entries), "root": root, "signers": list(made.signers),
        "runs": [], "reasons": [vars(reason) for reason in reasons],
    }  # fmt: skip
    return made


def reason(code="root-mismatch", where="entry 12", message="The leaf of entry 12 does not hash to the signed root."):
    return SimpleNamespace(code=code, where=where, message=message)


def created(teller: Teller) -> None:
    teller.tell(
        ev.TrailCreated(
            origin="example.com/rlhf-audit", log_key="example.com/rlhf-audit+1c2b3a4d+AQ==", record_key="cmVjb3Jk",
            model_key="bW9kZWw=", tool="rlhf-audit-trail/0.1.0",
        )
    )  # fmt: skip


PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "unit": "annotator", "anonymize_annotators": True}


def train(
    teller: Teller, run=RUN, experiment="safety_alignment", private=True, steps=40, unit="annotator", leave_out=(),
    settle=True, status="completed", before=0.0, spent=6.2041, record="rec-1", budget=8.0, delta=1e-5,
    population=None, settled_steps=None,
):  # fmt: skip
    """One run, complete but for the event types in ``leave_out``."""

    def tell(event, sealed=None, after=1.0):
        if event.TYPE not in leave_out:
            teller.tell(event, run, sealed, after)

    tell(ev.RunStarted(
        experiment=experiment, entry_point="cell", tool="rlhf-audit-trail/0.1.0", privacy=PRIVACY if private else None,
        compliance_mode="eu_ai_act", record=record,
    ))  # fmt: skip
    tell(ev.EnvironmentCaptured(
        python="3.12.4", implementation="CPython", platform="Linux-6.1-x86_64",
        packages={"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.20.0", "numpy": "2.4.1",
                  **{f"package-{i}": "1.0" for i in range(36)}},
        hardware={"cpu": "x86_64, 2 cores", "memory_gib": 7.8, "accelerators": []}, threads=1,
        determinism={"use_deterministic_algorithms": False}, git_commit="0a1b2c3d4e5f60718293a4b5c6d7e8f901234567",
    ))  # fmt: skip
    hidden = ev.DataPrivate(rows=99_173, digest=digest(PLANTED), annotators=124)
    columns = ["prompt", "chosen", "rejected", "annotator_id"]
    if private:
        units = 124 if unit == "annotator" else 99_173
        tell(ev.DataBound(role="train", columns=columns, source="preferences.jsonl", unit=unit, units=units), hidden)
    else:
        tell(ev.DataBound(role="train", columns=columns, source="preferences.jsonl", rows=5_120, digest=digest("rows")))
    for role in ("base", "final"):
        if role == "final":
            continue
        tell(ev.ModelBound(role=role, architecture="LlamaForCausalLM", parameters=1_235_814, trainable=98_304,
                           weights_digest=digest(f"{run}{role}"), config_digest=digest("config"),
                           adapter={"type": "LORA", "r": 8}))  # fmt: skip
    tell(ev.TrainerAttached(
        trainer="DPOTrainer", loss="sigmoid", max_steps=steps, seed=7,
        hyperparameters={"beta": 0.1, "learning_rate": 0.0005, "per_device_train_batch_size": 16, "max_length": 128},
    ))  # fmt: skip
    if private:
        tell(ev.PrivacyReserved(
            reservation=f"res-{run[:4]}", unit=unit, adjacency="zero-out", mechanism="Poisson-subsampled Gaussian",
            engine="loop over units", generator="AES-256-CTR", units=124, clipping_norm=0.5, noise_multiplier=0.94,
            sampling_rate=0.125, steps=steps, steps_asked=steps, max_pairs_per_unit=8, delta=delta,
            epsilon_budget=budget, epsilon_before=before, epsilon_planned=before + 6.2041,
            accountants={"PLD": before + 6.2041, "PRV": before + 6.2118, "RDP": before + 7.0402},
            column="annotator_id" if unit == "annotator" else None, population=population,
        ), ev.PrivacySealed(seed=PLANTED.encode().hex().ljust(64, "0")))  # fmt: skip
    for step in range(1, steps + 1):
        share = (step / steps) ** 0.5
        if private:
            tell(ev.Step(step=step, learning_rate=5e-4 * (1 - step / (steps + 1)), epsilon=before + spent * share,
                         gradient_norm=0.9 + 0.05 * ((step * 7919) % 11), update_norm=0.02 + 0.001 * ((step * 31) % 7)),
                 ev.StepPrivate(metrics={"loss": 0.6931, PLANTED: 1.5}), after=0.4)  # fmt: skip
        else:
            tell(ev.Step(step=step, learning_rate=5e-4 * (1 - step / (steps + 1)), update_norm=0.02,
                         metrics={"loss": 0.69 - 0.3 * share, "rewards/accuracies": 0.5 + 0.2 * share}),
                 after=0.4)  # fmt: skip
    tell(ev.ModelBound(role="final", architecture="LlamaForCausalLM", parameters=1_235_814, trainable=98_304,
                       weights_digest=digest(f"{run}final"), config_digest=digest("config")))  # fmt: skip
    tell(ev.WeightsSaved(step=steps, name="model", digest=digest("folder"), files=6, bytes=5_012_345,
                         signature_digest=digest("signature")))  # fmt: skip
    if private and settle:
        tell(
            ev.PrivacySettled(
                reservation=f"res-{run[:4]}",
                steps=steps if settled_steps is None else settled_steps,
                epsilon_run=spent,
                epsilon_total=before + spent,
            )
        )
    if status:
        tell(ev.RunFinished(status=status, steps=steps, trained=True))


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def notebook():
    """An executed notebook: markdown, parameters, a training cell with text, a picture and HTML."""
    cells = [
        nb.new_markdown_cell("# Safety alignment\nTrain a small model on real preferences.", id="intro"),
        nb.new_code_cell("epsilon = 8\nsteps = 40", id="params", metadata={"tags": ["parameters"]}, execution_count=1),
        nb.new_code_cell("epsilon = 8.0", id="injected", metadata={"tags": ["injected-parameters"]}, execution_count=2),
        nb.new_code_cell(
            "%%audit_train --experiment safety_alignment --epsilon 8 --delta 1e-5 --unit annotator\n"
            "trainer = DPOTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer)\n"
            "trainer.train()",
            id="train",
            execution_count=3,
            outputs=[
                nb.new_output("stream", name="stdout", text="step 1\rstep 40\n\x1b[32mdone\x1b[0m <b>&\n"),
                nb.new_output("display_data", data={"image/png": PIXEL, "text/plain": "ε 6.21 of 8 after 40 steps"}),
                nb.new_output("display_data", data={"text/html": "<script>x()</script>", "text/plain": "<Widget>"}),
            ],
        ),
        nb.new_code_cell("\n".join(f"print({i})" for i in range(3)), id="tail", execution_count=4,
                         outputs=[nb.new_output("stream", name="stdout", text="\n".join(map(str, range(200))))]),
    ]  # fmt: skip
    return nb.new_notebook(cells=cells)


def evidence(*, level="UNANCHORED", with_notebook=False, reasons=(), **kwargs) -> Evidence:
    """The evidence of one run."""
    teller = Teller()
    created(teller)
    if with_notebook:
        teller.tell(ev.RecordStarted(record="rec-1", notebook_digest=digest("nb"), parameters={"epsilon": 8.0},
                                     tool="rlhf-audit-trail/0.1.0"))  # fmt: skip
    train(teller, **kwargs)
    book = notebook() if with_notebook else None
    if book:
        for position, cell in enumerate(book.cells):
            if cell.cell_type == "code":
                teller.tell(ev.CellExecuted(record="rec-1", cell=cell.id, position=position, status="completed",
                                            source_digest=digest(cell.source),
                                            outputs_digest=digest("out")))  # fmt: skip
        teller.tell(ev.RecordSealed(record="rec-1", digest=digest("sealed"), status="completed", cells=len(book.cells)))
    return told(teller, level=level, reasons=reasons, book=book)


def told(teller: Teller, *, level="UNANCHORED", reasons=(), book=None) -> Evidence:
    """The evidence of everything that was told."""
    return Evidence(
        verdict(teller.entries, level, reasons), tuple(teller.entries), notebook=book,
        origin_kind="record" if book else "trail", checkpoint="example.com/rlhf-audit\n1\nroot=\n\n— sig\n",
    )  # fmt: skip
