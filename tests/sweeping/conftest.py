"""A small notebook to sweep, whose runs do what their parameters say."""

from __future__ import annotations

from pathlib import Path

import pytest
from records_support import write_notebook

# `die`: the process that executes the notebook is killed, the first time or always. `wait`: there is something to
# interrupt, the first time.
RUN = """
import os, pathlib, signal, time
if die:
    marker = pathlib.Path(die)
    if die == "always" or not marker.exists():
        if die != "always":
            marker.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
if wait and not pathlib.Path(wait).exists():
    pathlib.Path(wait + ".new").write_text(str(os.getpid()))
    os.rename(wait + ".new", wait)
    time.sleep(120)
if x == 3:
    raise ValueError("three is not taken")
print(x * lr)
""".strip()

# What %%audit_train does with the budget, in little: plan, reserve, settle; no model is trained.
PRIVATE = (
    f"TESTS = {str(Path(__file__).parents[1])!r}\n"
    + """
import os, signal, time, uuid
from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.events import RunFinished, RunStarted, encode_body
from rlhf_audit_nb.privacy import accountant
from rlhf_audit_nb.privacy.plan import plan_units, settle_event
from rlhf_audit_nb.privacy.reservation import read_ledger, reserve
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.slots import given_slot
from rlhf_audit_nb.privacy.units import Units
from rlhf_audit_nb.trail import Trail

# Their libraries take seconds to import, and what they would say is of no matter here.
accountant.prv, accountant.rdp = (lambda *_: "left out"), (lambda *_: ("left out", ()))

def train(settle=True):
    config = PrivacyConfig(epsilon=budget, unit="pair", noise_multiplier=sigma, sampling_rate=0.2, loss_noise=None)
    units = Units("pair", tuple((row,) for row in range(20)))
    with Trail.open(os.environ["RLHF_AUDIT_TRAIL"]) as trail:
        name, run, record = uuid.uuid4().hex, uuid.uuid4().hex, os.environ["RLHF_AUDIT_RECORD"]
        started = RunStarted(experiment="e", entry_point="cell", tool="t/1", privacy=config.to_dict(), record=record)
        trail.append(started.TYPE, encode_body(started), run=run)
        ledger, slot = read_ledger(trail.reader()), given_slot()
        prior = ledger.mechanisms("pair", drawing=slot)
        draw = ledger.draw(slot) if slot else None
        plan = plan_units(config, units, 0.2, 3, 5, prior, draw=draw)
        plan = reserve(trail, plan, SealedRandom.from_system(), reservation=name, run=run)
        if settle:
            event = settle_event(plan, name, 3)
            finished = RunFinished(status="completed", steps=3, trained=True)
            for one in (event, finished):
                trail.append(one.TYPE, encode_body(one), run=run)

if die and not os.path.exists(die):
    train(settle=False)
    open(die, "w").close()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
train()
""".strip()
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The notebook."""
    parameters = 'x = 1\nlr = 0.1\ndie = ""\nwait = ""'
    path = tmp_path_factory.mktemp("notebook") / "in.ipynb"
    return write_notebook(path, [(parameters, {"tags": ["parameters"]}), RUN])


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose runs spend budget."""
    parameters = 'seed = 0\nsigma = 2.0\nbudget = 8.0\ndie = ""'
    path = tmp_path_factory.mktemp("private") / "in.ipynb"
    return write_notebook(path, [(parameters, {"tags": ["parameters"]}), PRIVATE])
