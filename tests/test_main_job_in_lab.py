"""The main job where its users do it: the example notebook in a real JupyterLab, on real votes, seen in a browser."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import nbformat
import pytest
from support.lab import browser, lab, picture

from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.trail import Level, TrailReader, TrustPolicy, verify_trail

__all__ = ["browser", "lab"]

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STEPS = 40
LIVE_EPSILON = "() => document.querySelector('.rap [data-card=privacy] .rap-big b')?.textContent ?? null"
# A save is asked for only where something is to be saved.
TOUCH = "() => { jupyterapp.shell.currentWidget.content.model.dirty = true; }"


def with_parameters(notebook, **values):
    """The notebook as a person changes it: other values in its parameters cell."""
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    return notebook


@pytest.fixture(scope="module")
def story(lab, browser, llmfao, repository):
    """The notebook run from its first to its last cell; what was on the page meanwhile and at the end."""
    book = nbformat.read(repository / "example_notebooks" / "01_dpo_private.ipynb", as_version=4)
    data = os.path.relpath(llmfao / "train.jsonl.gz", lab.root)
    nbformat.write(with_parameters(book, data=data, steps=STEPS, output_dir="model"), lab.root / "main_job.ipynb")
    opened = lab.open(browser, "main_job.ipynb", height=1100)
    page, seen = opened.page, {"epsilons": []}
    opened.start_all()
    page.wait_for_selector(".rap .rap-point", timeout=240_000)
    pictured, end = False, time.monotonic() + 400
    while page.locator(".raps").count() == 0:
        # In one look: between two, the panel may have been frozen and be gone.
        text = page.evaluate(LIVE_EPSILON)
        if text:  # empty until the first figures are drawn
            seen["epsilons"].append(text)
        if not pictured and len(set(seen["epsilons"])) >= STEPS // 4:
            pictured = True
            picture(page.locator(".jp-OutputArea-output .rap"), "main_job_live")
        page.wait_for_timeout(300)
        assert time.monotonic() < end, "the run did not end"
    opened.wait_idle(120)
    seen["end"] = page.locator(".raps").inner_text()
    page.locator(".raps").scroll_into_view_if_needed()
    picture(page, "main_job_frozen")
    opened.save()
    page.close()
    seen["saved"] = nbformat.read(lab.root / "main_job.ipynb", as_version=4)
    return seen


def test_the_panel_follows_epsilon_while_the_notebook_trains_on_real_votes(story):
    shown = itertools.dropwhile(lambda text: text == "ε planned later", story["epsilons"])
    values = [float(text.removeprefix("ε ")) for text in shown]
    assert len(set(values)) >= 3
    assert values == sorted(values)


def test_the_frozen_panel_says_what_was_reached(story):
    for words in ("124", "annotator", f"step {STEPS} of {STEPS}", "UNANCHORED"):
        assert words in story["end"], story["end"]


def test_no_cell_failed_and_no_output_holds_a_private_metric(story):
    text = json.dumps([cell.get("outputs", []) for cell in story["saved"].cells])
    assert '"output_type": "error"' not in text
    for private in ("rewards/", "train_loss", "train_runtime", "logps", "num_tokens", "4029"):
        assert private not in text, private


def test_the_trail_that_the_notebook_left_holds_and_has_every_step(lab, story):
    trail = lab.root / "audit"
    (created,) = TrailReader.open(trail).entries(0, 1)
    verdict = verify_trail(trail, policy=TrustPolicy.of(json.loads(created.body)["log_key"]))
    assert verdict.level is Level.UNANCHORED
    assert [run.status for run in verdict.runs] == ["completed"]
    steps = [json.loads(entry.body)["step"] for entry in TrailReader.open(trail).entries(type="train.step")]
    assert steps == list(range(1, STEPS + 1))


def test_a_record_that_jupyterlab_saves_again_unchanged_still_verifies(lab, browser, demo):
    shown = Path(demo) / "out" / "demo"
    policy = TrustPolicy.parse((shown / "trust.policy").read_text())
    file = lab.root / "demo_record.ipynb"
    file.write_bytes((shown / "record.ipynb").read_bytes())
    before = file.read_bytes()
    opened = lab.open(browser, "demo_record.ipynb")
    opened.page.evaluate(TOUCH)
    opened.save()
    picture(opened.page, "record_in_lab")
    opened.page.close()
    assert file.read_bytes() != before, "JupyterLab did not write the file"
    assert open_record(file, policy=policy).verdict.level is Level.UNANCHORED
    changed = json.loads(file.read_text())
    changed["cells"][1]["source"] = "".join(changed["cells"][1]["source"]).replace("8.0", "9.0")
    file.write_text(json.dumps(changed))
    verdict = open_record(file, policy=policy).verdict
    assert verdict.level is Level.INVALID
