"""One model with its record, which meets the whole policy that the tests ask for."""

from __future__ import annotations

import pytest
from gate_support import WHOLE, Place, Story, audited, make_record, write_policy


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """A model and its record; treat them as read-only."""
    folder = tmp_path_factory.mktemp("gate")
    made = make_record(folder, Story(canaries=audited()))
    write_policy(folder, *(f"{name}: {value}" for name, value in WHOLE.items()))
    return made


@pytest.fixture
def policy(place):
    """Writes a policy beside the record: everything, or what is asked for alone."""
    made = []

    def write(**asked: str):
        path = write_policy(place.folder, *(f"{k}: {v}" for k, v in asked.items()), name=f"asked-{len(made)}.yaml")
        made.append(path)
        return path

    yield write
    for path in made:
        path.unlink()
