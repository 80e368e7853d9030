"""The panel that shows a run while it trains, and what stays of it in the notebook. Floor 6.

``view`` and ``model`` say what is shown (data in, data out), ``run_panel`` shows it live, ``fallback`` freezes it into
a small page, a picture and text.
"""

from __future__ import annotations

from rlhf_audit_nb.notebook.panels.model import PanelModel
from rlhf_audit_nb.notebook.panels.run_panel import RunPanel, detect_mode
from rlhf_audit_nb.notebook.panels.view import build_view

__all__ = ["PanelModel", "RunPanel", "build_view", "detect_mode"]
