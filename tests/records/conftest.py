"""One small notebook, executed once into a record."""

from __future__ import annotations

import json

import nbformat
import pytest
from records_support import PRIVATELY, TRAINING, Made, Trained, policy_of, write_notebook
from support.tiny import synthetic_pairs

from rlhf_audit_nb.events import PrivacyReserved
from rlhf_audit_nb.records import run_notebook
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.disclosure import disclose

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

# Outputs whose JSON a browser spells in its own way: whole floats, large and small numbers, text beside data.
RICH = f"""
import base64
data = {{"v": [1.0, 2.5, 1e22, 1e-7, -0.0, 2**53], "é\\u2028": "</script>", "none": None, "list": ["a", "b"]}}
display({{"application/json": data, "text/plain": "line\\nline\\n", "image/svg+xml": "<svg>\\n</svg>"}}, raw=True)
display({{"image/png": "{DOT}", "text/plain": "dot"}}, raw=True, metadata={{"image/png": {{"width": 10.0}}}})
""".strip()

STREAMS = r"""
import sys, time
for i in range(3):
    print(f"\r{i} of 3", end="", file=sys.stderr, flush=True)
    print("step", i, flush=True)
    time.sleep(0.05)
print("\x1b[31mred\x1b[0m ab\b\bX")
""".strip()


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
            (RICH, {"collapsed": True, "jupyter": {"source_hidden": True}, "tags": ["figure"]}),
            ("1 / 0", {"tags": ["raises-exception"]}),
            STREAMS,
            nbformat.v4.new_markdown_cell(
                "![dot](attachment:dot.png)", id="picture", attachments={"dot.png": {"image/png": DOT}}
            ),
            nbformat.v4.new_code_cell("", id="empty"),
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        result = run_notebook(
            source, folder / "record.ipynb", {"epsilon": 2.5, "name": 'é "quoted"', "steps": 3}, trail=folder / "audit"
        )
    return Made(folder / "record.ipynb", folder / "home", policy_of(folder / "audit"), result)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A record of a public and two private trainings with the openings of its seeds; treat it as read-only."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [json.dumps(row) for row in synthetic_pairs(10)]
    (folder / "votes.jsonl").write_text("\n".join(lines) + "\n")
    source = write_notebook(folder / "train.ipynb", PRIVATELY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        run_notebook(source, folder / "record.ipynb", {"rate": 2e-3}, trail=folder / "audit", cwd=folder)
        with Trail.open(folder / "audit") as trail:
            entries = [entry.index for entry in trail.reader().entries(type=PrivacyReserved.TYPE)]
            for index in entries:
                (folder / f"entry-{index}.opening").write_bytes(disclose(trail, index).encode())
    openings = tuple(folder / f"entry-{index}.opening" for index in entries)
    return Trained(folder, folder / "record.ipynb", policy_of(folder / "audit"), openings)
