"""The panel's life: start, follow, finish, in a notebook, in a record and in a terminal."""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time

import IPython.display
import pytest
from support.runs import SECRET, advance, made_up_run, made_up_status, made_up_verdict

from rlhf_audit_nb.errors import KeyFileError, StoreError
from rlhf_audit_nb.notebook.panels import run_panel
from rlhf_audit_nb.notebook.panels.model import merge
from rlhf_audit_nb.notebook.panels.run_panel import RunPanel, detect_mode


class FakeWidget:
    """Keeps what it is told, as a page would."""

    def __init__(self):
        self.sent = []
        self.states = []

    def __setattr__(self, name, value):
        if name == "state":
            self.states.append(value)
        else:
            super().__setattr__(name, value)

    def send(self, content):
        json.dumps(content, allow_nan=False)
        self.sent.append((time.monotonic(), content))

    def _repr_mimebundle_(self, **_):
        return {"application/vnd.jupyter.widget-view+json": {"model_id": "m"}, "text/plain": "?"}, {}


class Shown:
    """What was displayed, and what took its place."""

    def __init__(self):
        self.first = []
        self.updates = []

    def display(self, data, *, raw, display_id=None, metadata=None):
        assert raw
        self.first.append(data)
        return self if display_id else None

    def update(self, data, *, raw, metadata):
        assert raw
        self.updates.append((data, metadata))


@pytest.fixture
def shown(monkeypatch):
    shown = Shown()
    monkeypatch.setattr(IPython.display, "display", shown.display)
    return shown


@pytest.fixture
def widget(monkeypatch, shown):
    widget = FakeWidget()
    monkeypatch.setattr(run_panel, "make_widget", lambda: widget)
    return widget


def follow(state, steps, verify=None, status=made_up_status, pause=0.02):
    panel = RunPanel(state, status, verify, mode="live").start()
    for step in range(1, steps + 1):
        advance(state, step)
        time.sleep(pause)
    state.status = "completed"
    return panel


def test_epsilon_moves_while_the_run_goes_on_and_ends_at_its_last_value(widget, shown):
    panel = follow(made_up_run(steps=50), 50)
    panel.finish()
    said = [m["view"]["privacy"]["big"] for _, m in widget.sent if "big" in m["view"].get("privacy", {})]
    assert len(set(said)) >= 3
    assert said[-1] == "ε 5.40"


def test_updates_are_numbered_without_gaps_come_at_most_ten_times_a_second_and_give_the_last_state(widget, shown):
    panel = follow(made_up_run(steps=100), 100, pause=0.01)
    panel.finish()
    times = [at for at, _ in widget.sent[:-1]]
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.1
    view = {}
    for _, message in widget.sent:
        view = merge(view, message["view"])
    assert [message["seq"] for _, message in widget.sent] == list(range(1, len(widget.sent) + 1))
    assert view == widget.states[-1]["view"]
    assert view["frozen"] is True
    assert len(widget.states) <= 3


def test_the_end_takes_the_place_of_the_widget_as_page_picture_and_text(widget, shown):
    follow(made_up_run(steps=5), 5).finish()
    assert "application/vnd.jupyter.widget-view+json" in shown.first[0]
    ((data, metadata),) = shown.updates
    assert set(data) == {"text/html", "image/png", "text/plain"}
    assert "ε 5.40" in data["text/plain"]
    assert metadata["image/png"]["alt"]


def test_the_last_verification_is_made_at_the_end_and_stands_in_the_picture(widget, shown):
    calls = []

    def verify():
        calls.append(threading.current_thread())
        return made_up_verdict()

    panel = follow(made_up_run(steps=3), 3, verify)
    data = panel.finish()
    assert calls[-1] is threading.main_thread()
    assert "UNANCHORED" in data["text/plain"]


def test_the_status_shown_at_the_end_is_read_after_the_last_verification(widget, shown):
    sizes = [10]

    def verify():
        sizes[0] = 12  # a verification makes what was handed in durable first
        return made_up_verdict()

    state = advance(made_up_run(), 3)
    data = RunPanel(state, lambda: made_up_status(sizes[0]), verify, mode="static").finish()
    assert "12 entries" in data["text/plain"]


def test_without_verify_no_level_is_shown_at_the_end(widget, shown):
    data = follow(made_up_run(steps=3), 3).finish()
    assert "not verified yet" in data["text/plain"]
    assert "UNANCHORED" not in data["text/plain"]


@pytest.mark.parametrize("error", [KeyFileError("The key is not the one."), RuntimeError("the disk is gone")])
def test_a_verification_that_cannot_be_made_is_told_and_ends_nothing(widget, shown, error):
    def verify():
        raise error

    data = follow(made_up_run(steps=3), 3, verify).finish()
    assert "not verified" in data["text/plain"]
    assert str(error) in data["text/plain"]


def test_a_trail_that_cannot_be_read_now_keeps_its_last_status(widget, shown):
    answers = iter([made_up_status(7)])

    def status():
        try:
            return next(answers)
        except StopIteration:
            raise StoreError("The trail is locked.") from None

    data = follow(made_up_run(steps=20), 20, status=status).finish()
    assert "7 entries" in data["text/plain"]


def test_a_slow_verification_is_not_repeated_during_the_run(widget, shown, monkeypatch):
    calls = []
    monkeypatch.setattr(run_panel, "_CHECK_FIRST", 0.0)
    monkeypatch.setattr(run_panel, "_CHECK_EVERY", 0.0)

    def verify():
        calls.append(time.monotonic())
        time.sleep(0.05)
        return made_up_verdict()

    panel = follow(made_up_run(steps=60), 60, verify)
    during = len(calls)
    panel.finish()
    assert during == 1  # it took 0.05 s, so the next may come 5 s later
    assert len(calls) == 2


def test_a_fast_verification_is_repeated_during_the_run(widget, shown, monkeypatch):
    calls = []
    monkeypatch.setattr(run_panel, "_CHECK_FIRST", 0.0)
    monkeypatch.setattr(run_panel, "_CHECK_EVERY", 0.0)
    panel = follow(made_up_run(steps=60), 60, lambda: calls.append(1) or made_up_verdict())
    assert len(calls) > 2
    panel.finish()


def test_the_thread_ends_with_the_run(widget, shown):
    panel = follow(made_up_run(steps=3), 3)
    assert any(thread.name == "rlhf-audit-panel" for thread in threading.enumerate())
    panel.finish()
    assert not any(thread.name == "rlhf-audit-panel" for thread in threading.enumerate())
    assert panel.finish() == {}
    assert len(shown.updates) == 1


def test_in_a_record_there_is_no_widget_only_the_end(shown, monkeypatch):
    monkeypatch.setattr(run_panel, "make_widget", lambda: pytest.fail("a record shows no widget"))
    panel = RunPanel(advance(made_up_run(), 300), made_up_status, made_up_verdict, mode="static").start()
    assert shown.first == []
    panel.finish()
    assert set(shown.first[0]) == {"text/html", "image/png", "text/plain"}


def test_in_a_terminal_the_end_is_text(shown, capsys):
    panel = RunPanel(advance(made_up_run(), 300), made_up_status, made_up_verdict)
    assert panel.mode == "text"
    panel.start().finish()
    said = capsys.readouterr().out
    assert said.startswith("safety_alignment · training")
    assert "ε 5.40 of 8.00" in said
    assert shown.first == []


class _Kernel:
    kernel = object()


@pytest.mark.parametrize(
    ("shell", "record", "mode"),
    [(None, None, "text"), (object(), None, "text"), (_Kernel(), None, "live"), (_Kernel(), "r1", "static")],
)
def test_where_it_shows_is_found_out(monkeypatch, shell, record, mode):
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.delenv("RLHF_AUDIT_RECORD", raising=False)
    if record:
        monkeypatch.setenv("RLHF_AUDIT_RECORD", record)
    assert detect_mode() == mode


def test_a_widget_that_cannot_be_made_does_not_stop_the_training(shown, monkeypatch):
    def broken():
        raise ImportError("no anywidget")

    monkeypatch.setattr(run_panel, "make_widget", broken)
    panel = RunPanel(advance(made_up_run(), 3), made_up_status, mode="live")
    with pytest.warns(RuntimeWarning, match="no anywidget"):
        panel.start()
    assert "ε" in panel.finish()["text/plain"]
    assert "text/html" in shown.first[0]


def test_nothing_private_is_sent_kept_or_shown(widget, shown):
    state = made_up_run(steps=5)
    for name in ("loss", "train_loss", "clip_fraction"):
        state.add(name, 1, SECRET)
    follow(state, 5).finish()
    said = json.dumps([message for _, message in widget.sent] + widget.states + shown.first)
    assert "0.693" not in said
    kept = json.dumps(widget.states + shown.updates)
    assert "steps/s" not in kept
    assert "s a step" not in kept


def test_the_real_widget_brings_its_own_script_and_style_and_no_link():
    widget = run_panel.make_widget()
    script, style = str(widget._esm), str(widget._css)
    assert "export default { render }" in script
    assert ".rap" in style
    for text in (script, style):
        assert "import " not in text.replace("@import", "import ") or "from " not in text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    widget.close()


def test_recording_a_step_costs_the_training_thread_the_same_at_any_length_while_a_panel_follows(widget, shown):
    state = made_up_run(steps=100_000)
    panel = RunPanel(state, made_up_status, made_up_verdict, mode="live").start()

    def cost(first, count):
        took = []
        for step in range(first, first + count):
            began = time.perf_counter()
            advance(state, step)
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    early = cost(1, 1_000)
    advance(state, 99_000)
    late = cost(99_001, 1_000)
    panel.finish()
    assert early < 0.001
    assert late < 0.001
    assert late < 10 * early
