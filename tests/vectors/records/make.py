"""Makes a set of records with the package as it is installed: what later versions must go on reading.

    python tests/vectors/records/make.py NEW_FOLDER

A set is made once, when the form of what is sealed changes, and kept for good: a later version must find every record
of every set as valid as on its first day. So this never writes into a folder that exists. The records are all of one
trail, which is not kept: a record is to be verified with the file and a policy alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import nbformat

MODEL = """
import warnings

from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer

from local_module import cut
from rlhf_audit_nb.demo import load_preferences, train_tokenizer

warnings.filterwarnings("ignore")
set_seed(7)
votes = cut(load_preferences("simulated"), rows)
tokenizer = train_tokenizer(vocab_size=300)
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **ends))
lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
settings = {"per_device_train_batch_size": 4, "max_length": 32, "bf16": False, "gradient_checkpointing": False}
settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
args = DPOConfig(output_dir="model", max_steps=steps, **settings)
""".strip()

PLAIN = """
from rlhf_audit_nb import AuditableRLHF

auditor = AuditableRLHF()
auditor.seal_threshold("accuracy", ">= 0.5", experiment="plain", reason="what guessing reaches")
with auditor.track_training(experiment_name="plain"):
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=votes.remove_columns("annotator_id"), processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    trainer.save_model("model")
auditor.log_evaluation({"accuracy": 0.625}, model="model", experiment="plain", evaluator="by hand", samples=8)
""".strip()

PRIVATE = """
from rlhf_audit_nb import AuditableRLHF, PrivacyConfig

auditor = AuditableRLHF(privacy_config=PrivacyConfig(epsilon=8.0))
with auditor.track_training(experiment_name="private"):
    trainer = DPOTrainer(model=model, args=args, train_dataset=votes, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model("model")
""".strip()

MODULE = "def cut(data, rows):\n    return data.select(range(rows))\n"


def _notebook(path: Path, title: str, cells: list[tuple[str, list[str]]]) -> Path:
    made = [nbformat.v4.new_markdown_cell(f"# {title}", id="title")]
    made += [
        nbformat.v4.new_code_cell(source, metadata={"tags": tags} if tags else {}, id=f"cell-{number}")
        for number, (source, tags) in enumerate(cells)
    ]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    node = nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": spec})
    path.write_text(nbformat.writes(node), encoding="utf-8")
    return path


def _project(folder: Path) -> None:
    """A clean git work tree with a local module, so that the record names code."""
    (folder / "local_module.py").write_text(MODULE, encoding="utf-8")
    (folder / ".gitignore").write_text("*\n!local_module.py\n!.gitignore\n", encoding="utf-8")
    who = {"NAME": "Name", "EMAIL": "name@example.org", "DATE": "2026-01-01T00:00:00Z"}
    variables = {f"GIT_{role}_{name}": value for role in ("AUTHOR", "COMMITTER") for name, value in who.items()}
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "A local module"]):
        subprocess.run(["git", *command], cwd=folder, check=True, env={**os.environ, **variables})


def _records(folder: Path, out: Path) -> None:
    import papermill

    from rlhf_audit_nb.trail import Trail
    from rlhf_audit_nb.trail.keys import local_policy
    from rlhf_audit_nb.trail.rotation import rotate_key

    with Trail.open(folder / "audit", origin="example.org/fixtures"):
        pass
    home = Path(os.environ["RLHF_AUDIT_HOME"])
    (out / "trust.policy").write_text(local_policy(home, "example.org/fixtures").format(), encoding="utf-8")
    parameters = ("rows = 4\nsteps: int = 1", ["parameters"])
    shown = ("import sys\nprint('\\x1b[31mred\\x1b[0m')\nprint('50%\\r100%', file=sys.stderr)\n{'rows': rows}", [])
    notebooks = {
        "plain": [parameters, shown, (MODEL, []), (PLAIN, [])],
        "private": [parameters, shown, (MODEL, []), (PRIVATE, [])],
        "failed": [parameters, shown, ("1 / 0", []), ("print('never')", [])],
        "two-signatures": [parameters, shown],
    }
    for name, cells in notebooks.items():
        if name == "two-signatures":
            with Trail.open(folder / "audit") as trail:
                for role in ("record", "mldsa"):
                    rotate_key(trail, role, reason="a fixture")
        source = _notebook(folder / f"{name}.in.ipynb", name, cells)
        values = {"rows": 24 if name == "private" else 8, "steps": 2}
        # By relative names, since papermill writes them into the notebook.
        try:
            papermill.execute_notebook(
                source.name, f"{name}.ipynb", values, engine_name="audit", audit_trail="audit", progress_bar=False
            )
        except papermill.PapermillExecutionError:
            if name != "failed":
                raise
        shutil.copy(f"{name}.ipynb", out)
        shutil.rmtree(folder / "model", ignore_errors=True)


def _added(folder: Path, out: Path) -> None:
    """One of the records once more, with an anchor that a witness has cosigned, and two additions."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from rlhf_audit_nb.records import add_to_record, anchor_record
    from rlhf_audit_nb.records.additions import ATTESTATION
    from rlhf_audit_nb.trail import TrustPolicy
    from rlhf_audit_nb.trail.signers import FileKey
    from rlhf_audit_nb.trail.witness import Witness
    from rlhf_audit_nb.trail.witness_server import WitnessServer

    log = (out / "trust.policy").read_text(encoding="utf-8").split()[1]
    witness = Witness.create(folder / "witness", "witness.example.org")
    witness.add_log(log)
    words = f"log {log}\nwitness one {witness.vkeys[0]}"
    (out / "witnessed.policy").write_text(f"{words}\nquorum one\n", encoding="utf-8")
    shutil.copy(out / "two-signatures.ipynb", out / "added.ipynb")
    server = WitnessServer(witness)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        policy = TrustPolicy.parse(f"{words} {server.url}\nquorum one\n")
        anchor_record(out / "added.ipynb", trail=folder / "audit", policy=policy)
    finally:
        server.stop()
        thread.join(20)
    for key in (Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())):
        add_to_record(out / "added.ipynb", ATTESTATION, {"statement": "A fixture."}, FileKey(key), policy=policy)


def main() -> None:
    """Makes the set that is named on the command line."""
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="records-") as made:
        folder = Path(made) / "project"
        folder.mkdir()
        _project(folder)
        os.environ["RLHF_AUDIT_HOME"] = str(Path(made) / "home")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        os.chdir(folder)
        _records(folder, out)
        _added(folder, out)
    for path in sorted(out.glob("*.ipynb")):
        seal = json.loads(path.read_bytes())["metadata"]["rlhf_audit"]
        print(f"{path.name}: {path.stat().st_size:,} bytes, {len(seal['entries'])} entries, version {seal['version']}")


if __name__ == "__main__":
    main()
