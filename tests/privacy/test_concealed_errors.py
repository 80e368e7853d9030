"""An exception out of a library that handles private rows leaves a private run without its words, and no other does."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.tiny import dpo_trainer, synthetic_pairs

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, PrivacyError
from rlhf_audit_nb.events import RunFinished, decode_body

ROW = "XYZZYZEBRA"
PAIR = {"prompt": "Q?", "chosen": f" {ROW}", "rejected": " no", "annotator_id": "person-0"}


def quoting(row: dict[str, Any]) -> Any:
    raise ValueError(f"cannot do with {row['chosen']}")


def quoting_after_another(row: dict[str, Any]) -> Any:
    try:
        quoting(row)
    except ValueError as error:
        raise RuntimeError("it went wrong") from error


def chained(folder: Path) -> Any:
    try:
        Dataset.from_list([PAIR]).map(quoting)
    except ValueError as error:
        raise RuntimeError(f"preparing failed: {error}") from error


OVER_ROWS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a value that has not its column's type": (
        "ArrowInvalid",
        lambda _: Dataset.from_list([{"margin": 1.0}, {"margin": ROW}]),
    ),
    "a function of the user's in map": ("ValueError", lambda _: Dataset.from_list([PAIR]).map(quoting)),
    "one that came of another": ("RuntimeError", lambda _: Dataset.from_list([PAIR]).map(quoting_after_another)),
    "one that quotes it again outside": ("RuntimeError", chained),
    "a trainer that is built": ("ValueError", lambda folder: dpo_trainer([{**PAIR, "prompt": None}], folder)),
}


def auditor(folder: Path, **config: Any) -> AuditableRLHF:
    privacy = PrivacyConfig(epsilon=5.0) if config.get("private", True) else None
    return AuditableRLHF(privacy_config=privacy, audit_config=AuditConfig(trail=str(folder / "audit")))


@pytest.mark.parametrize("case", OVER_ROWS)
def test_what_a_library_says_of_rows_does_not_leave_a_private_run(tmp_path: Path, case: str) -> None:
    kind, fails = OVER_ROWS[case]
    held = auditor(tmp_path)
    with pytest.raises(PrivacyError) as shown, held.track_training("fails"):
        fails(tmp_path)
    assert shown.value.reason == "private-rows"
    said = "".join(traceback.format_exception(shown.value)) + "".join(shown.value._render_traceback_())
    assert ROW not in said
    assert f"A library could not handle the data ({kind})." in said
    held.trail.flush()
    entries = list(held.trail.reader().entries())
    assert not [entry.type for entry in entries if ROW.encode() in entry.data]
    (finished,) = (decode_body(one.type, one.body) for one in entries if one.type == RunFinished.TYPE)
    assert (finished.status, finished.reason) == ("failed", kind)


@pytest.mark.parametrize("case", ["a value that has not its column's type", "a function of the user's in map"])
def test_without_privacy_it_is_shown_as_it_is(tmp_path: Path, case: str) -> None:
    with pytest.raises(Exception, match=ROW), auditor(tmp_path, private=False).track_training("fails"):
        OVER_ROWS[case][1](tmp_path)


@pytest.mark.parametrize(
    "raised", [ZeroDivisionError("a mistake of one's own"), ConfigError("of the package's own"), KeyboardInterrupt()]
)
def test_what_has_nothing_to_do_with_rows_is_shown_as_it_is(tmp_path: Path, raised: BaseException) -> None:
    with pytest.raises(type(raised)) as shown, auditor(tmp_path).track_training("fails"):
        Dataset.from_list(synthetic_pairs(1))
        raise raised
    assert shown.value is raised
