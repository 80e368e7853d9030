"""What watches training: the open run, the trainer's callback, what is recorded of data and model. Floor 2.

Nothing here knows how training is made private; that is handed in (`run.Privatiser`).
"""

from __future__ import annotations
