"""Records: executed notebooks bound to the trail by signatures and proofs. Floor 3.

`run.run_notebook` executes a notebook into a record through the papermill engine in `engine`; `record.open_record`
and `record.verify_record` read one back with nothing but the file and a public key. What the digest of a notebook
covers is in `normal_form`; the bytes of the seal are in `seal`, `statement` and `dsse`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_audit_nb.records.additions import Addition, add_to_record
    from rlhf_audit_nb.records.anchoring import AnchoredRecord, anchor_record
    from rlhf_audit_nb.records.kept import kept_record, kept_records
    from rlhf_audit_nb.records.record import OpenedRecord, open_record, read_record, verify_record
    from rlhf_audit_nb.records.run import RunResult, check_parameters, read_parameters, run_notebook

__all__ = [
    "Addition",
    "AnchoredRecord",
    "OpenedRecord",
    "RunResult",
    "add_to_record",
    "anchor_record",
    "check_parameters",
    "kept_record",
    "kept_records",
    "open_record",
    "read_parameters",
    "read_record",
    "run_notebook",
    "verify_record",
]

# Verifying needs no kernel client and running no verifier: each half is imported when it is asked for.
_MODULES = dict.fromkeys(["OpenedRecord", "open_record", "read_record", "verify_record"], "record")
_MODULES |= dict.fromkeys(["Addition", "add_to_record"], "additions")
_MODULES |= dict.fromkeys(["AnchoredRecord", "anchor_record"], "anchoring")
_MODULES |= dict.fromkeys(["kept_record", "kept_records"], "kept")
_MODULES |= dict.fromkeys(["RunResult", "check_parameters", "read_parameters", "run_notebook"], "run")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
