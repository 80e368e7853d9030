"""Starting processes where another test has put a notebook shell's module in the place of ``__main__``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

__all__ = ["startable"]


@contextmanager
def startable() -> Iterator[None]:
    """While inside, ``multiprocessing`` can start processes: it asks ``__main__`` for a ``__spec__``."""
    main = sys.modules["__main__"]
    if hasattr(main, "__spec__"):
        yield
    else:
        with patch.object(main, "__spec__", None, create=True):
            yield
