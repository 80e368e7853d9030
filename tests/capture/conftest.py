"""What the tests of capturing share."""

from __future__ import annotations

from support.zygote import zygote

__all__ = ["zygote"]
