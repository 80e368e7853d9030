"""What an ipywidgets ``Output`` captured, as outputs of the cell that shows it. Floor 3.

What is printed inside ``with output:`` goes into the state of a widget and into no cell, and a record keeps no widget
state (`normal_form`): without this, a part of what the notebook showed would be missing from its record. An error that
was captured did not fail its cell, so it becomes text: papermill takes an error output for a failed cell.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_audit_nb.records.normal_form import WIDGET_VIEW

__all__ = ["with_captured"]

_REFERENCE = "IPY_MODEL_"


def with_captured(
    outputs: Sequence[Any], states: Mapping[str, Any], captured: Mapping[str, Sequence[Any]]
) -> list[Any]:
    """A cell's outputs, after each widget view what the ``Output`` widgets in it have captured.

    Args:
        outputs: of the cell; they stay as they are.
        states: of every widget, by model id.
        captured: the outputs that each ``Output`` widget holds, by model id.
    """
    shown: list[Any] = []
    for output in outputs:
        shown.append(output)
        view = output.get("data", {}).get(WIDGET_VIEW)
        if isinstance(view, Mapping):
            found = _models(str(view.get("model_id")), states, set())
            shown += [_plain(one) for model in found for one in captured.get(model, ())]
    return shown


def _models(model: str, states: Mapping[str, Any], seen: set[str]) -> Iterator[str]:
    """The model and those in it, as deep as they go, in their order."""
    if model in seen:
        return
    seen.add(model)
    yield model
    for found in _references(states.get(model, {})):
        yield from _models(found, states, seen)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.startswith(_REFERENCE):
        yield value.removeprefix(_REFERENCE)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _plain(output: Any) -> Any:
    made = copy.deepcopy(output)
    if made.get("output_type") != "error":
        return made
    lines = made.get("traceback") or [f"{made.get('ename')}: {made.get('evalue')}"]
    return type(made)({"output_type": "stream", "name": "stderr", "text": "\n".join(lines) + "\n"})
