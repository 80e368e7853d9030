"""Event loops of a test's own."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["run_loop"]


def run_loop(work: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns, run in a thread: a browser that another test has started keeps a loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, asyncio.run, work).result()
