"""Changes to the whole process that several may need at once. Floor 0."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

__all__ = ["Counted"]


class Counted:
    """A change that the first to enter makes and the last to leave takes back, whichever of them that is.

    Without counting, one that ends while another is still inside would undo the change under it.

    Args:
        change: makes it when it is entered and takes it back when it is left.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._inside = 0
        self._made = ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The change is in force while inside."""
        with self._lock:
            if self._inside == 0:
                self._made.enter_context(self._change())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._made.close()
