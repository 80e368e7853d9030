"""What every test of the command line needs."""

from __future__ import annotations

import pytest

from rlhf_audit_nb import cli


@pytest.fixture
def run(capsys):
    """One command in this process: its exit code, what it wrote to stdout, and to stderr."""

    def call(*argv):
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call
