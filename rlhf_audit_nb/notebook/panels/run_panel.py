"""The live panel of one run: an anywidget, and the thread that feeds it. Floor 6.

The thread that trains is never asked for anything: a background thread reads the run's state at most ten times a
second and slows itself down so that reading costs at most a two-hundredth of the time, and verification at most a
hundredth. What changed goes to the browser as a numbered update; the whole view goes into the widget's ``state`` trait
rarely, so that a reader who missed an update, or a page that was loaded again, catches up.

When the run ends the panel verifies once more and replaces itself in the notebook by a static picture with text
(`fallback`). Where no browser listens there is no widget: an executed record gets only the static end, a terminal only
text.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.notebook.panels.fallback import freeze, say_text
from rlhf_audit_nb.notebook.panels.model import PanelModel
from rlhf_audit_nb.notebook.panels.view import Check

if TYPE_CHECKING:
    from rlhf_audit_nb.notebook.panels.sources import StateLike, StatusLike, VerdictLike

__all__ = ["ENV_RECORD", "Mode", "RunPanel", "detect_mode"]

Mode = Literal["live", "static", "text"]

ENV_RECORD = "RLHF_AUDIT_RECORD"

_HERE = Path(__file__).parent
_POLL = 0.2  # seconds between two reads, at least
_POLL_SHARE = 200  # reading may take 1/200 of the time
_CHECK_EVERY = 10.0  # seconds between two verifications, at least
_CHECK_SHARE = 100  # verifying may take 1/100 of the time
_CHECK_FIRST = 1.0  # seconds after the start
_STATE_EVERY = 3.0  # seconds between two whole states


class Widget(Protocol):
    """What the panel needs of its widget."""

    state: dict[str, Any]

    def send(self, content: dict[str, Any]) -> None:
        """One message to the browser."""


class _Handle(Protocol):
    def update(self, obj: Any, **kwargs: Any) -> None: ...


def detect_mode() -> Mode:
    """Where this process shows things: in a notebook, in a notebook that is executed into a record, or as text."""
    try:
        from IPython import get_ipython
    except ImportError:
        return "text"
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return "text"
    return "static" if os.environ.get(ENV_RECORD) else "live"


def make_widget() -> Widget:
    """A new widget; imports anywidget, which a terminal never needs."""
    import anywidget
    import traitlets

    class RunPanelWidget(anywidget.AnyWidget):
        _esm = _HERE / "run_panel.js"
        _css = _HERE / "run_panel.css"
        state = traitlets.Dict().tag(sync=True)

    widget: Widget = RunPanelWidget()
    return widget


class RunPanel:
    """Shows one run from its start to its end.

    Args:
        state: the run's state (see `model.StateLike`).
        trail_status: returns where the trail stands; called by the panel's own thread.
        verify: verifies the trail and returns the verdict, or raises an `AuditError`; ``None`` shows no level.
        mode: where to show; ``None`` finds out (`detect_mode`).

    ``start`` and ``finish`` are called by the thread that runs the cell, ``finish`` in any case (``finally``). Neither
    raises because something could not be shown: the training comes first.
    """

    def __init__(
        self,
        state: StateLike,
        trail_status: Callable[[], StatusLike],
        verify: Callable[[], VerdictLike] | None = None,
        *,
        mode: Mode | None = None,
    ) -> None:
        self.mode: Mode = mode or detect_mode()
        self._state = state
        self._read_status = trail_status
        self._verify = verify
        self._model = PanelModel(state)
        self._status: StatusLike | None = None
        self._check: Check | None = None
        self._widget: Widget | None = None
        self._handle: _Handle | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._check_at = 0.0
        self._state_at = 0.0
        self._finished = False

    def start(self) -> RunPanel:
        """Show the panel and begin to follow the run."""
        if self.mode != "live" or self._thread is not None:
            return self
        try:
            self._show()
        except Exception as error:  # the training goes on without a live panel, and its end is shown all the same
            self.mode, self._widget = "static", None
            warnings.warn(f"The live panel cannot be shown: {error}", RuntimeWarning, stacklevel=2)
        return self

    def _show(self) -> None:
        """Display the widget and start the thread that feeds it."""
        from IPython.display import display

        self._widget = make_widget()
        bundle = self._widget._repr_mimebundle_()  # type: ignore[attr-defined]
        data = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        data["text/plain"] = f"Audit panel of run {self._state.experiment}; it shows where widgets are shown."
        self._handle = display(data, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        self._check_at = time.monotonic() + _CHECK_FIRST
        self._thread = threading.Thread(target=self._follow, name="rlhf-audit-panel", daemon=True)
        self._thread.start()

    def finish(self) -> dict[str, str]:
        """Verify once more, show the last state, and leave a static picture with text in the panel's place.

        Returns:
            The static output by MIME type (in a terminal, text alone).
        """
        if self._finished:
            return {}
        self._finished = True
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._run_check()
        self._look()  # after the verification, which may have made the last entries durable
        self._push(frozen=True)
        view = self._model.full()
        if self.mode == "text":
            text = say_text(view["view"])
            print(text)  # noqa: T201 - a terminal is told in words
            return {"text/plain": text}
        data, metadata = freeze(view)
        if self._handle is not None:
            self._handle.update(data, raw=True, metadata=metadata)
        else:
            from IPython.display import display

            display(data, raw=True, metadata=metadata)  # type: ignore[no-untyped-call]
        return data

    # the panel's own thread ------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Read, tell, wait; until ``finish``."""
        pause = 0.0
        while not self._stop.wait(pause):
            began = time.thread_time()
            self._look()
            self._push(frozen=False)
            pause = max(_POLL, (time.thread_time() - began) * _POLL_SHARE)
            if time.monotonic() >= self._check_at:
                took = self._run_check()
                self._check_at = time.monotonic() + max(_CHECK_EVERY, took * _CHECK_SHARE)

    def _look(self) -> None:
        """Ask the trail where it stands; where it cannot say, the panel shows what it said last."""
        # A trail that fails tells the thread that trains, at its next append or flush; here it is no second news.
        with contextlib.suppress(AuditError):
            self._status = self._read_status()

    def _run_check(self) -> float:
        """Verify and keep the outcome; returns the seconds it took."""
        if self._verify is None:
            return 0.0
        began = time.monotonic()
        try:
            self._check = Check(at=time.time(), verdict=self._verify())
        except AuditError as error:
            self._check = Check(at=time.time(), error=str(error))
        except Exception as error:  # the panel says it; the training does not end for it
            self._check = Check(at=time.time(), error=f"{type(error).__name__}: {error}")
        return time.monotonic() - began

    def _push(self, *, frozen: bool) -> None:
        """Send what changed; set the whole state where its time has come."""
        update = self._model.observe(time.time(), self._status, self._check, frozen=frozen)
        if self._widget is None:
            return
        if update is not None:
            self._widget.send({"kind": "update", **update})
        now = time.monotonic()
        if frozen or now - self._state_at >= _STATE_EVERY:
            self._state_at = now
            self._widget.state = self._model.full()
