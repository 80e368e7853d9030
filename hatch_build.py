"""Maps what lies beside the package into a built wheel: the templates and the example notebooks.

An editable install gets nothing mapped: it reads both in place.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MAPPED = {"templates": "rlhf_audit_nb/templates", "example_notebooks": "rlhf_audit_nb/example_notebooks"}


class MapBesides(BuildHookInterface):
    """Adds `MAPPED` to a standard wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds."""
        if version == "standard":
            build_data["force_include"].update({f"{self.root}/{name}": to for name, to in MAPPED.items()})
