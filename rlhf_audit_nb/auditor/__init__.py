"""`AuditableRLHF`: the one object that users hold. Floor 5.

It composes the floors below and has little logic of its own: it opens the trail, opens runs on it with privacy wired
in (`rlhf_audit_nb.privatiser`), and asks for verdicts, reports and cards. Building one is cheap: the trail is opened
when it is first needed, and one trail is opened once in a process, however many auditors share it.
"""

from __future__ import annotations

from rlhf_audit_nb.auditor.annotating import Annotating
from rlhf_audit_nb.auditor.checking import Checking
from rlhf_audit_nb.auditor.declaring import Declaring
from rlhf_audit_nb.auditor.reading import Reading
from rlhf_audit_nb.auditor.running import Running
from rlhf_audit_nb.auditor.status import Status
from rlhf_audit_nb.auditor.training import Training

__all__ = ["AuditableRLHF", "Status"]


class AuditableRLHF(Training, Running, Annotating, Declaring, Checking, Reading):
    """Audited training, and what can be said about it afterwards.

    Args:
        model_name: the model's name as you declare it; what a trainer shows is recorded anyway.
        privacy_config: train under differential privacy; ``None`` records training as it is and says so.
        compliance_mode: the framework that reports assess against.
        audit_config: where and how the trail is kept.

    Raises:
        ConfigError: an argument cannot be used; the message says what to write instead.
    """
