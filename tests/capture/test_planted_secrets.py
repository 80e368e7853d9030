"""Secrets are planted wherever a run meets text, and looked for in every byte that a run leaves in the open.

One notebook trains a policy with GRPO and then fails; the kernel's environment, the trainer's arguments, the model's
configuration, the data set's description and columns, a reward function's name, the experiment's name, the git remote,
what is printed and what is raised each carry a secret of their own. Beside them stands a marker that is no secret: it
must be found where the secrets must not, or the search finds nothing at all.
"""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest
from support.trails import events

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.capture.run import Run
from rlhf_audit_nb.capture.secrets import Scrubber
from rlhf_audit_nb.errors import AuditError, RecordError
from rlhf_audit_nb.events import RecordStarted, RunFinished, RunStarted
from rlhf_audit_nb.records import run_notebook
from rlhf_audit_nb.trail import Trail

MARKER = "innocent-marker-of-this-test"
SECRETS = {
    "environment": "hf_" + "EnVaB" * 7,
    "environment, named": "0123456789abcdef0123456789abcdef01234567",
    "environment, odd": "Tr0ub4dor&3 (and more)",
    "environment, recorded variable": "ghp_" + "EnV9x" * 8,
    "argument": "hf_" + "ArGuM" * 7,
    "argument, map": "sk-proj-" + "ArG7u" * 6,
    "model": "github_pat_" + "MoDeL0" * 6,
    "data": "glpat-" + "DaTa1" * 5,
    "column": "AKIA" + "C0LUMN7EXAMPLE99",
    "reward": "hf_" + "ReWaR" * 7,
    "experiment": "ghp_" + "ExPeR1" * 7,
    "remote": "r3m0te-user:pa55-of-the-remote",
    "printed": "xoxb-" + "123456789012-PrInTeD",
    "raised": "sk-ant-" + "RaIs3" * 6,
    "warned": "npm_" + "WaRnEd" * 6,
}
TRAINING = """
%load_ext rlhf_audit_nb
import os, sys, base64, warnings
sys.path.insert(0, {tests!r})
from support.tiny import causal_model, grpo_trainer
def hidden(name):  # as it would come out of a file or a service
    return base64.b64decode(os.environ["PLANTED_" + name]).decode()
from IPython import get_ipython
experiment = "{marker}-" + hidden("EXPERIMENT")
cell = '''
def reward(completions, **_):
    return [float(len(text)) for text in completions]
reward.__name__ = "{marker}-" + hidden("REWARD")
model = causal_model()
model.config.note = hidden("MODEL")
model.config._name_or_path = "https://" + hidden("REMOTE") + "@example.com/x"
column = "{marker}-" + hidden("COLUMN")
rows = [{{"prompt": f"A question {{n}}?", column: "x"}} for n in range(4)]
trainer = grpo_trainer(reward, "out", model=model, prompts=rows, max_steps=1, run_name=hidden("ARGUMENT"),
                       hub_token=hidden("ARGUMENT"), optim_args="{marker}=" + hidden("ARGUMENT_MAP"))
trainer.train_dataset.info.description = hidden("DATA")
trainer.train_dataset.info.dataset_name = "{marker}-" + hidden("DATA")
from rlhf_audit_nb.capture.run import current_run
current_run().warn("{marker} " + hidden("WARNED"))
trainer.train()
print("{marker}", hidden("PRINTED"), os.environ["HF_TOKEN"], os.environ["STORE_PASSWORD"])
raise RuntimeError("{marker} " + hidden("RAISED"))
'''
get_ipython().run_cell_magic("audit_train", "--experiment " + experiment, cell)
""".strip()


def forms(secret):
    """A secret as it may stand in bytes: plain, quoted, and in base64 at each of its three places."""
    raw = secret.encode()
    found = {raw, quote(secret, safe="").encode(), quote(secret).encode()}
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + raw)
        whole = coded[(0, 2, 3)[shift] : len(coded.rstrip(b"=")) - 1]  # without what its neighbours decide
        found |= {whole, whole.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def places(seen, secret):
    return sorted(path for path, content in seen.items() if any(form in content for form in forms(secret)))


def read(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("vault")
    }


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Every public byte of the run: store, artifacts, tiles, record, report, cards and the notebook's displays."""
    from rlhf_audit_nb.cli import main

    folder = tmp_path_factory.mktemp("planted")
    work, home = folder / "work", folder / "home"
    work.mkdir()
    git = ["git", "-C", str(work)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "remote", "add", "origin", f"https://{SECRETS['remote']}@example.com/x.git"], check=True)
    cell = TRAINING.format(tests=str(Path(__file__).resolve().parents[1]), marker=MARKER)
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata={"kernelspec": spec})
    nbformat.write(node, work / "in.ipynb")
    planted = {
        f"PLANTED_{name.upper().replace(', ', '_')}": base64.b64encode(secret.encode()).decode()
        for name, secret in SECRETS.items()
    }
    changed = {
        "HF_TOKEN": SECRETS["environment"],
        "WANDB_API_KEY": SECRETS["environment, named"],
        "STORE_PASSWORD": SECRETS["environment, odd"],
        "NCCL_DEBUG": SECRETS["environment, recorded variable"],
        "RLHF_AUDIT_HOME": str(home),
        **planted,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setenv(name, value)
        with pytest.raises(AuditError):
            run_notebook(work / "in.ipynb", work / "record.ipynb", trail=work / "audit", cwd=work)
        public = folder / "public"
        public.mkdir()
        patch.setenv("RLHF_AUDIT_TRAIL", str(work / "audit"))
        auditor = AuditableRLHF()
        for form in ("html", "json"):
            auditor.generate_compliance_report(format=form).save(public / f"report.{form}")
        auditor.generate_model_card(format="huggingface").save(public / "card.md")
        started = events(auditor.trail, RunStarted)
        finished = events(auditor.trail, RunFinished)
        main(["publish", str(public / "tiles"), "--trail", str(work / "audit")])
    seen = {f"audit/{name}": content for name, content in read(work / "audit").items()} | read(public)
    seen["record.ipynb"] = (work / "record.ipynb").read_bytes()
    return seen, started, finished


def test_the_run_happened_and_all_that_is_looked_through_tells_of_it(public):
    seen, started, finished = public
    assert [event.status for event in finished] == ["failed"]
    assert started[0].experiment == f"{MARKER}-[removed: GitHub token]"
    found = places(seen, MARKER)
    assert "record.ipynb" in found
    assert {"report.html", "report.json"} <= set(found)
    assert any(name.startswith("audit/trail.sqlite") for name in found)
    assert any(name.startswith("tiles/") for name in seen)


@pytest.mark.parametrize("kind", SECRETS)
def test_no_planted_secret_is_in_the_open(public, kind):
    assert places(public[0], SECRETS[kind]) == []


def test_the_search_finds_each_secret_in_each_form():
    for secret in SECRETS.values():
        raw = secret.encode()
        for written in (raw, quote(secret).encode(), *(base64.b64encode(b"x" * n + raw + b"yz") for n in range(4))):
            assert places({"a file": b"before " + written + b" after"}, secret) == ["a file"]
        assert places({"a file": b"before " + raw[:-1] + b" after"}, secret) == []


def test_without_the_scrubber_a_planted_secret_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", SECRETS["environment"])
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(Scrubber, "event", lambda _, event: event)
        with Trail.open(tmp_path / name) as trail, Run(trail, "small"):
            pass
    assert places(read(tmp_path / "with"), SECRETS["environment"]) == []
    assert places(read(tmp_path / "without"), SECRETS["environment"]) != []


@pytest.mark.parametrize(
    ("cell", "parameters", "words"),
    [
        ("token = 'x'\nlogin('" + SECRETS["argument"] + "')", {}, "Cell 1 holds a secret (Hugging Face token)"),
        ("token = 'x'", {"token": SECRETS["raised"]}, "The parameter 'token' is a secret"),
    ],
)
def test_a_notebook_that_holds_a_secret_is_not_run_at_all(tmp_path, monkeypatch, cell, parameters, words):
    monkeypatch.chdir(tmp_path)
    tagged = nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[tagged], metadata=kernel), tmp_path / "in.ipynb")
    with pytest.raises(RecordError) as refused:
        run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", parameters)
    assert words in refused.value.message
    assert refused.value.reason == "secret"
    assert not any(secret in str(refused.value) for secret in SECRETS.values())
    assert [path.name for path in tmp_path.iterdir()] == ["in.ipynb"]


def test_a_notebook_that_reads_its_secret_from_the_environment_is_run(tmp_path):
    from rlhf_audit_nb.records.session import RecordSession

    read_there = "import os\napi_key = os.environ['SERVICE_API_KEY']\npassword = getpass.getpass()"
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(read_there)])
    session = RecordSession.begin(node, {"name": "python3"}, tmp_path / "audit")
    session.close()
    with Trail.open(tmp_path / "audit") as trail:
        assert len(events(trail, RecordStarted)) == 1
