"""``python -m rlhf_audit_nb.cli``: the same command, for where its script is not on the path. Floor 6."""

from __future__ import annotations

import sys

from rlhf_audit_nb.cli import main

sys.exit(main())
