"""The panel in a real JupyterLab: it moves while the cell runs, and a picture stays when it has ended."""

from __future__ import annotations

import base64
from pathlib import Path

import nbformat
import pytest
from support.lab import browser, lab, picture

__all__ = ["browser", "lab"]

pytestmark = pytest.mark.browser

TESTS = Path(__file__).resolve().parents[2]

# A run without a trainer: the real state object, a real trail to which each step is appended, the real verification.
# It pauses before its last steps until the test has seen enough (`let_end`), so that no test depends on its own speed.
RUN = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.runs import advance, made_up_run
from rlhf_audit_nb.notebook.panels import RunPanel
from rlhf_audit_nb.trail import Trail, verify_trail

state = made_up_run(private={private}, steps={steps}, status="open")
with Trail.open({trail!r}) as trail:
    panel = RunPanel(state, trail.status, lambda: verify_trail({trail!r})).start()
    state.status = "training"
    for step in range(1, {steps} + 1):
        advance(state, step)
        body = json.dumps({{"step": step}}).encode()
        trail.append("train.step", body, run=state.run_id)
        time.sleep({pause})
        while step == {steps} - 20 and not Path({go!r}).exists():
            time.sleep(0.05)
    trail.flush()
    state.status = "completed"
    panel.finish()
"""


def notebook(lab, name, *, private=True, steps=120, pause=0.04, output=None):
    source = RUN.format(
        tests=str(TESTS), private=private, steps=steps, pause=pause, trail=f"{name}.audit", go=f"{name}.go"
    )
    cell = nbformat.v4.new_code_cell(source.strip())
    cell.metadata["jupyter"] = {"source_hidden": True}
    if output is not None:
        cell.outputs, cell.execution_count = [output], 1
    book = nbformat.v4.new_notebook(cells=[cell])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, lab.root / f"{name}.ipynb")
    return f"{name}.ipynb"


def let_end(lab, name):
    (lab.root / f"{Path(name).stem}.go").touch()


def big(page):
    return page.locator(".rap [data-card=privacy] .rap-big b").text_content()


@pytest.fixture(scope="module")
def story(lab, browser):
    """One private run from its start to the saved notebook; what was seen on the way."""
    seen = {"epsilons": [], "errors": [], "requests": []}
    name = notebook(lab, "private", steps=150)
    book = lab.open(browser, name)
    page = book.page
    page.on("pageerror", lambda error: seen["errors"].append(str(error)))
    page.on("request", lambda request: seen["requests"].append(request.url))
    book.start_all()
    page.wait_for_selector(".rap .rap-point", timeout=30_000)
    for _ in range(8):
        page.wait_for_timeout(350)
        seen["epsilons"].append(big(page))
    seen["root"] = page.locator(".rap").get_attribute("aria-label")
    seen["labels"] = page.locator(".rap [role=img], .rap [role=progressbar]").evaluate_all(
        "nodes => nodes.map(node => node.getAttribute('aria-label'))"
    )
    page.locator(".rap button.rap-metric").nth(1).focus()
    page.keyboard.press("Enter")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".rap-rows button").nth(1).click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.rap-rows button')].some(n => n.textContent === 'copied')"
    )
    seen["copied"] = page.evaluate("() => navigator.clipboard.readText()")
    seen["pressed"] = page.locator(".rap button.rap-metric[aria-pressed=true]").text_content()
    picture(page.locator(".jp-OutputArea-output .rap"), "panel_live_light_wide")
    book.dark()
    picture(page.locator(".jp-OutputArea-output .rap"), "panel_live_dark_wide")
    book.light()
    let_end(lab, name)
    page.wait_for_selector(".raps", timeout=30_000)
    book.wait_idle()
    seen["end"] = page.locator(".raps").inner_text()
    seen["widgets"] = page.locator(".rap").count()
    picture(page, "panel_frozen_light_wide")
    book.dark()
    picture(page, "panel_frozen_dark_wide")
    book.light()
    book.save()
    book.reload()
    page.wait_for_selector(".raps")
    seen["reloaded"] = page.locator(".raps").inner_text()
    seen["images"] = page.locator(".raps img:visible").evaluate_all("nodes => nodes.map(node => node.naturalWidth)")
    picture(page, "panel_reloaded_light_wide")
    page.close()
    seen["saved"] = nbformat.read(lab.root / name, as_version=4)
    return seen


def test_epsilon_changes_while_the_cell_runs(story):
    values = [float(text.removeprefix("ε ")) for text in story["epsilons"]]
    assert len(set(values)) >= 4
    assert values == sorted(values)
    assert values[0] < 5.4


def test_the_page_had_no_error_and_asked_nobody_outside(story):
    assert story["errors"] == []
    assert [url for url in story["requests"] if "127.0.0.1" not in url and not url.startswith(("data:", "blob:"))] == []


def test_panel_and_figures_have_sentences_for_those_who_do_not_see_them(story):
    assert story["root"].startswith("Audit of run safety_alignment: training")
    assert len(story["labels"]) == 4
    assert all(label for label in story["labels"])
    assert any("ε over the steps of this run" in label for label in story["labels"])


def test_another_series_can_be_chosen_by_keyboard(story):
    assert story["pressed"].startswith("update norm")


def test_what_is_shortened_is_copied_whole_on_click(story):
    name, key_hash, key = story["copied"].split("+", 2)
    assert name.startswith("rlhf-audit.local/")
    assert len(key_hash) == 8
    assert len(base64.b64decode(key)) == 33


def test_the_end_of_the_run_replaces_the_widget_by_the_static_page(story):
    assert story["widgets"] == 0
    for words in ("ε 5.40", "completed · step 150 of 150", "151 entries", "UNANCHORED"):
        assert words in story["end"], story["end"]


def test_the_picture_is_there_after_saving_and_loading_again(story):
    assert story["reloaded"] == story["end"]
    assert len(story["images"]) == 2
    assert all(story["images"])


def test_the_saved_output_is_page_picture_and_text_and_no_widget(story):
    (output,) = (cell.outputs[0] for cell in story["saved"].cells)
    assert set(output.data) == {"text/html", "image/png", "text/plain"}
    assert base64.b64decode(output.data["image/png"]).startswith(b"\x89PNG")
    assert output.metadata["image/png"]["alt"].startswith("Audit of run safety_alignment: completed")


def test_an_untrusted_notebook_shows_the_same_numbers_and_charts(lab, browser, story):
    output = story["saved"].cells[0].outputs[0]
    book = lab.open(browser, notebook(lab, "untrusted", output=output))
    page = book.page
    page.wait_for_selector(".jp-RenderedHTML")
    text = page.locator(".jp-RenderedHTML").inner_text()
    assert page.locator(".jp-RenderedHTML style").count() == 0  # it was sanitised
    assert "ε 5.40" in text
    assert "of 8.00, δ 10⁻⁵" in text
    widths = page.locator(".jp-RenderedHTML img:visible").evaluate_all("nodes => nodes.map(node => node.naturalWidth)")
    assert len(widths) == 2
    assert all(widths)
    picture(page, "panel_untrusted_light_wide")
    book.dark()
    picture(page, "panel_untrusted_dark_wide")
    book.light()
    page.close()


def test_a_narrow_page_without_privacy_shows_no_bound_and_the_plain_loss(lab, browser):
    name = notebook(lab, "plain", private=False, steps=60)
    book = lab.open(browser, name, width=520, height=1100)
    page = book.page
    book.start_all()
    page.wait_for_selector(".rap .rap-metric", timeout=30_000)
    page.wait_for_timeout(500)
    assert big(page) == "No differential privacy: this run gives no bound"
    panel = page.locator(".rap")
    columns = panel.locator(".rap-card").evaluate_all("nodes => new Set(nodes.map(n => n.offsetLeft)).size")
    assert columns == 1
    assert panel.evaluate("node => node.scrollWidth <= node.clientWidth")
    picture(page, "panel_live_light_narrow")
    book.dark()
    picture(page, "panel_live_dark_narrow")
    book.light()
    let_end(lab, name)
    page.wait_for_selector(".raps", timeout=30_000)
    assert "No differential privacy" in page.locator(".raps").inner_text()
    assert "loss" in page.locator(".raps").inner_text()
    assert page.locator(".raps").evaluate("node => node.scrollWidth <= node.clientWidth")
    picture(page, "panel_frozen_light_narrow", full_page=True)
    page.close()
