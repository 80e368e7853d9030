"""``%audit run``: another notebook into a record, from within a notebook. Floor 6."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_audit_nb.errors import ConfigError

__all__ = ["progress_line", "refuse_itself"]

# Where Jupyter's server and VS Code tell a kernel the path of its notebook.
_SERVER, _CODE = "JPY_SESSION_NAME", "__vsc_ipynb_file__"


def refuse_itself(notebook: str, names: dict[str, Any]) -> None:
    """A notebook that runs itself would never end.

    Args:
        notebook: what is to be run.
        names: the variables of the notebook that asks.

    Raises:
        ConfigError: it is the notebook that asks.
    """
    wanted = Path(notebook).resolve()
    for own in (os.environ.get(_SERVER), names.get(_CODE)):
        if not isinstance(own, str) or not own:
            continue
        # A server names the path from its own root.
        same = wanted == Path(own).resolve() if Path(own).is_absolute() else wanted.as_posix().endswith(f"/{own}")
        if same:
            raise ConfigError(
                f"{notebook} is the notebook that this cell is in: it would run itself without end.",
                next_step=f"Run it in a terminal: rlhf-audit run {notebook}",
                code="itself",
            )


def progress_line() -> Callable[[int, int, str], None]:
    """Tells which cell runs, on one line that is replaced."""
    from IPython.display import display

    show: Any = display
    line: Any = None

    def tell(position: int, cells: int, state: str) -> None:
        nonlocal line
        text = {"text/plain": f"cell {position + 1} of {cells}: {state}"}
        if line is None:
            line = show(text, raw=True, display_id=True)
        else:
            line.update(text, raw=True)

    return tell
