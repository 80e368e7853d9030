"""What has run in this kernel: the cells in their order, with their ids where the front end tells them. Floor 6.

IPython tells of each cell before and after it runs. What ran before the extension was loaded is taken from IPython's
own history, which knows the sources and nothing else. Nothing is digested before somebody asks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from rlhf_audit_nb.capture.cells import CellContext

__all__ = ["CellHistory", "cell_number"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class _Ran:
    count: int | None
    source: str
    cell: str | None = None
    status: str = "unknown"


def cell_number(shell: Any) -> int:
    """The number of the cell that runs now: its input is the newest one in the history.

    ``shell.execution_count`` is that number in some versions of IPython, and already the next one in others.
    """
    sources = getattr(shell.history_manager, "input_hist_raw", [])
    return len(sources) - 1 if len(sources) > 1 else int(shell.execution_count)


class CellHistory:
    """The cells of one shell.

    Args:
        shell: the shell that runs them.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell: Any = shell
        self._ran: list[_Ran] = []
        self._running: list[Any] = []  # one inside the other, where a cell runs another
        self._earlier = self._from_history()

    def watch(self) -> None:
        """Hear of each cell from here on."""
        self._shell.events.register("pre_run_cell", self._begins)
        self._shell.events.register("post_run_cell", self._ended)

    def forget(self) -> None:
        """Hear of none any more."""
        self._shell.events.unregister("pre_run_cell", self._begins)
        self._shell.events.unregister("post_run_cell", self._ended)

    def context(self, source: str) -> CellContext:
        """The cell that runs now and what ran before it; ``source`` is its text where nobody told of it before."""
        from rlhf_audit_nb.capture.cells import CellContext
        from rlhf_audit_nb.events import ExecutedCell
        from rlhf_audit_nb.records.normal_form import text_digest

        now = self._running[-1] if self._running else None
        stored = now is not None and now.store_history
        return CellContext(
            source_digest=text_digest(now.raw_cell if now is not None and now.raw_cell else source),
            cell=_name(getattr(now, "cell_id", None)),
            execution_count=cell_number(self._shell) if stored else None,
            executed=tuple(
                ExecutedCell(count=one.count, source_digest=text_digest(one.source), cell=one.cell, status=one.status)
                for one in [*self._earlier, *self._ran]
            ),
        )

    def _from_history(self) -> list[_Ran]:
        sources = getattr(self._shell.history_manager, "input_hist_raw", [])
        return [_Ran(count, source) for count, source in enumerate(sources) if count and source]

    def _begins(self, info: Any) -> None:
        self._running.append(info)

    def _ended(self, result: Any) -> None:
        info = result.info
        self._running = [one for one in self._running if one is not info]
        loading = result.execution_count is not None and any(
            one.count == result.execution_count for one in self._earlier
        )
        if loading:  # the cell that loaded the extension: IPython had it in its history already
            self._earlier = [one for one in self._earlier if one.count != result.execution_count]
        self._ran.append(
            _Ran(
                result.execution_count,
                info.raw_cell or "",
                _name(info.cell_id),
                "ok" if result.success else "error",
            )
        )


def _name(cell: object) -> str | None:
    """A cell's id as notebooks have them; what else a front end calls a cell is not told (VS Code sends an address)."""
    return cell if isinstance(cell, str) and _ID.fullmatch(cell) else None
