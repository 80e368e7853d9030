"""What the main job is shown with: preference data and a loader for it. Floor 1 (imports `errors` only).

- `preferences`: reads a preference file, or a `datasets` name, into the four columns that training needs.
- `simulate`: makes the SIMULATED preference set that ships here, byte for byte.
- `phrases`: the public texts it is put together from; `tokenizer` learns from them at no cost in privacy.
"""

from __future__ import annotations

from rlhf_audit_nb.demo.phrases import public_texts
from rlhf_audit_nb.demo.preferences import COLUMNS, SIMULATED, SIMULATED_FILE, load_preferences
from rlhf_audit_nb.demo.tokenizer import train_tokenizer

__all__ = ["COLUMNS", "SIMULATED", "SIMULATED_FILE", "load_preferences", "public_texts", "train_tokenizer"]
