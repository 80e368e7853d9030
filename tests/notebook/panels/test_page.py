"""The panel's script in a browser, without JupyterLab: how it takes updates, and what it does with what it is told."""

from __future__ import annotations

from importlib.resources import files

import pytest
from support.lab import browser, picture
from support.runs import advance, made_up_run, made_up_status, made_up_verdict

from rlhf_audit_nb.notebook.panels.model import PanelModel
from rlhf_audit_nb.notebook.panels.view import Check
from rlhf_audit_nb.trail import Level, Reason

__all__ = ["browser"]

pytestmark = pytest.mark.browser

PANELS = files("rlhf_audit_nb.notebook.panels")
HOST = """
const handlers = {{}};
window.whole = null;
window.tell = (update) => handlers["msg:custom"]({{ kind: "update", ...update }});
window.restore = (state) => {{ window.whole = state; handlers["change:state"](); }};
const model = {{ get: () => window.whole, on: (name, done) => (handlers[name] = done), off: () => {{}} }};
window.close_panel = render({{ model, el: document.body }});
"""


class Panel:
    """A page that holds the panel, and the model that feeds it."""

    def __init__(self, browser, *, private=True, dark=False, width=1000):
        script = (PANELS / "run_panel.js").read_text(encoding="utf-8").replace("export default { render };", "")
        style = (PANELS / "run_panel.css").read_text(encoding="utf-8")
        theme, back = ("false", "#111") if dark else ("true", "#fff")
        self.errors = []
        self.page = browser.new_page(viewport={"width": width, "height": 460})
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_content(
            f'<!doctype html><meta charset="utf-8"><style>body{{margin:8px;background:{back}}}{style}</style>'
            f'<body data-jp-theme-light="{theme}"><script>{script}{HOST.format()}</script>'
        )
        self.state = made_up_run(private=private)
        self.model = PanelModel(self.state)
        self.now = 1000.0

    def step(self, to, check=None, *, lose=False, **keywords):
        advance(self.state, to)
        self.now += 0.5
        update = self.model.observe(self.now, made_up_status(to), check, **keywords)
        if not lose:
            self.page.evaluate("update => tell(update)", update)
            self.page.wait_for_function(
                "seq => document.querySelector('.rap').dataset.seq === String(seq)", arg=update["seq"]
            )
        return update

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def points(self):
        return self.page.locator("[data-card=training] .rap-line").get_attribute("d").count("L") + 1


@pytest.fixture
def panel(browser):
    panel = Panel(browser)
    yield panel
    panel.page.close()
    assert panel.errors == []


def test_each_update_moves_number_bar_and_point(panel):
    panel.step(10)
    first = panel.page.locator("[data-card=privacy] .rap-point").get_attribute("cx")
    panel.step(150)
    assert panel.text("[data-card=privacy] .rap-big b") == "ε 4.15"
    assert float(panel.page.locator("[data-card=privacy] .rap-point").get_attribute("cx")) > float(first) + 50
    assert "steps/s" in panel.text(".rap-pace")
    assert panel.text("[data-card=integrity] .rap-big b") == "150"


def test_a_single_point_has_a_single_mark_below_it(panel):
    panel.step(1)
    marks = panel.page.locator("[data-card=training] .rap-chart g text").all_text_contents()
    assert len(marks) == 2
    assert marks[1] == "step 1"


def test_a_lost_update_is_healed_by_the_next_whole_state(panel):
    panel.step(10)
    panel.step(20, lose=True)
    panel.step(30)
    assert panel.points() == 20
    panel.page.evaluate("state => restore(state)", panel.model.full())
    panel.page.wait_for_function(
        "() => document.querySelector('[data-card=training] .rap-line').getAttribute('d').split('L').length === 30"
    )


def test_an_old_update_and_an_old_state_change_nothing(panel):
    old = panel.step(10)
    state = panel.model.full()
    panel.step(20)
    panel.page.evaluate("([update, state]) => { tell(update); restore(state); }", [old, state])
    panel.page.wait_for_timeout(100)
    assert panel.text("[data-card=training] .rap-big b") == "20"
    assert panel.points() == 20


def test_a_page_that_comes_late_draws_the_whole_state(panel):
    advance(panel.state, 200)
    panel.model.observe(1.0, made_up_status(200), frozen=True)
    panel.page.evaluate("state => restore(state)", panel.model.full())
    panel.page.wait_for_selector("[data-frozen=true]")
    assert panel.text("[data-card=privacy] .rap-big b") == "ε 4.62"
    assert "UTC" in panel.text("[data-card=integrity]")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_an_invalid_trail_raises_a_red_alarm_with_the_place(browser, dark):
    panel = Panel(browser, dark=dark)
    panel.step(60)
    assert not panel.page.locator(".rap-alert").is_visible()
    reason = Reason("leaf", "entry 412", "The leaf does not hash to the signed root; entries 0 to 411 hold.")
    panel.step(61, Check(at=1000.0, verdict=made_up_verdict(Level.INVALID, reason)))
    alert = panel.page.locator("[role=alert]")
    assert "entry 412" in alert.inner_text()
    assert "rlhf-audit verify" in alert.inner_text()
    assert panel.text(".rap-level") == "INVALID"
    picture(panel.page, f"panel_invalid_{'dark' if dark else 'light'}", full_page=True)
    panel.page.close()


def test_markup_in_names_and_reasons_stays_text(browser):
    panel = Panel(browser, private=False)
    panel.state.experiment = "<img src=x onerror=alert(1)>"
    panel.state.warnings.append("<b>bold</b>")
    panel.state.add("<i>loss</i>", 1, 0.5)
    reason = Reason("leaf", "<u>entry</u>", "<s>gone</s>")
    panel.step(3, Check(at=1.0, verdict=made_up_verdict(Level.INVALID, reason)))
    assert panel.page.locator(".rap img, .rap-foot b, .rap u, .rap s, .rap-metric i").count() == 0
    assert panel.text(".rap-title") == "<img src=x onerror=alert(1)>"
    panel.page.close()


def test_where_copying_is_not_allowed_the_whole_root_is_shown(panel):
    panel.step(5)
    button = panel.page.locator(".rap-rows button").first
    whole = button.get_attribute("data-copy")
    button.click()
    panel.page.wait_for_selector(".rap-whole")
    assert button.inner_text() == whole
    assert len(whole) == 44


@pytest.mark.parametrize("width", [1280, 900, 700, 520, 360])
def test_nothing_is_cut_off_at_any_width(browser, width):
    panel = Panel(browser, width=width)
    panel.step(150, Check(at=1000.0, verdict=made_up_verdict()))
    wide = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1 && n.clientWidth).map(n => n.className)"
    assert panel.page.locator(".rap, .rap-card, .rap-head, .rap-row").evaluate_all(wide) == []
    picture(panel.page, f"panel_{width}", full_page=True)
    panel.page.close()


def test_the_clock_goes_on_between_updates(browser):
    panel = Panel(browser, private=False)
    panel.step(5, Check(at=panel.now, verdict=made_up_verdict()))
    panel.page.wait_for_function("() => /[12] s ago/.test(document.querySelector('[data-card=integrity]').innerText)")
    panel.page.close()


def test_what_is_told_to_the_minute_only_is_not_counted_in_seconds(panel):
    panel.step(5, Check(at=panel.now, verdict=made_up_verdict()))
    shown = panel.text("[data-card=integrity]")
    assert shown.count("less than a minute ago") == 2
    assert " s ago" not in shown


def test_a_closed_panel_leaves_no_clock_behind(panel):
    panel.step(5)
    panel.page.evaluate("() => { window.ticks = 0; close_panel(); }")
    before = panel.page.locator(".rap").inner_html()
    panel.page.wait_for_timeout(1200)
    assert panel.page.locator(".rap").inner_html() == before
