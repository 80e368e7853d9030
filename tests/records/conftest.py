"""One small notebook, executed once into a record."""

from __future__ import annotations

import nbformat
import pytest
from records_support import TRAINING, Made, policy_of, write_notebook

from rlhf_audit_nb.records import run_notebook


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A record with parameters, markdown, outputs of each kind, a training run and an updated display."""
    folder = tmp_path_factory.mktemp("record")
    source = write_notebook(
        folder / "small.ipynb",
        [
            nbformat.v4.new_markdown_cell("# A small notebook\n\nwith *text*.", id="title"),
            ('epsilon = 8.0\nname = "x"  # what it is called\nsteps: int = 2', {"tags": ["parameters"]}),
            TRAINING,
            "trail = training('f' * 32, steps)\ntrail.close()",
            "from IPython.display import display, HTML\nhandle = display(HTML('<b>running</b>'), display_id=True)",
            "import sys\nprint('one')\nprint('50%\\r100%', file=sys.stderr)\n{'value': epsilon, 'name': name}",
            "handle.update(HTML('<b>done</b>'))",
            nbformat.v4.new_raw_cell("raw", id="raw"),
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        result = run_notebook(
            source, folder / "record.ipynb", {"epsilon": 2.5, "name": 'é "quoted"', "steps": 3}, trail=folder / "audit"
        )
    return Made(folder / "record.ipynb", folder / "home", policy_of(folder / "audit"), result)
