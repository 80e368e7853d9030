"""The page of trainers says of every trainer, loss and option of TRL what the code does with it.

The tables are rendered here from the code and from TRL itself; where a page and the code part, the failing test prints
the lines that the page lacks.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import trl
from trl.trainer import dpo_trainer, grpo_trainer

from rlhf_audit_nb.privacy.post_processing import POST_PROCESSING
from rlhf_audit_nb.privacy.supported import DPO_LOSSES, REFUSED_DPO_LOSSES, REFUSED_TRAINERS, refused_options

PAGE = Path(__file__).resolve().parents[2] / "docs" / "privacy" / "trainers.md"
PRIVATE = {"DPOTrainer", "RewardTrainer", "SFTTrainer", "KTOTrainer"}


def dpo_losses():
    return set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(dpo_trainer)))


def choices(config, name):
    """The values that a setting's own documentation lists."""
    text = re.search(rf"\n        {name} \(.*?\n(?=        \w+ \(|    \"\"\")", inspect.getsource(config), re.DOTALL)
    return set(re.findall(r'- `"([\w-]+)"`', text.group(0)))


def sft_losses():
    (field,) = [field for field in fields(trl.SFTConfig) if field.name == "loss_type"]
    return set(field.metadata["choices"])


def grpo_losses():
    return choices(trl.GRPOConfig, "loss_type")


def trainers():
    """Every trainer class in TRL, by the folder of its module."""
    root = Path(inspect.getfile(trl)).parent
    found = {}
    for file in sorted([*root.glob("trainer/*_trainer.py"), *root.glob("experimental/*/*_trainer.py")]):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer") and not node.name.startswith("_"):
                found[node.name if file.parent.name == "trainer" else f"{file.parent.name}.{node.name}"] = node.name
    return found


def loss_rows():
    rows = [f"| `DPOTrainer` | `{loss}` | private | |" for loss in sorted(DPO_LOSSES)]
    rows += [f"| `DPOTrainer` | `{loss}` | refused | {why} |" for loss, why in sorted(REFUSED_DPO_LOSSES.items())]
    why = next(why for trainer, why, instead in refused_options() if trainer == "KTOTrainer" and "loss_type" in instead)
    rows += ["| `KTOTrainer` | `apo_zero_unpaired` | private | |", f"| `KTOTrainer` | `kto` | refused | {why} |"]
    rows += [f"| `SFTTrainer` | `{loss}` | private | |" for loss in ("nll", "dft")]
    rows.append("| `SFTTrainer` | `chunked_nll` | private | an old name of `nll` |")
    every = ", ".join(f"`{loss}`" for loss in sorted(grpo_losses()))
    rows.append(f"| `GRPOTrainer` | {every} | post-processing | |")
    return rows


def trainer_rows():
    rows = [f"| `{name}` | post-processing | {REFUSED_TRAINERS[name]} |" for name in sorted(POST_PROCESSING)]
    others = sorted(set(REFUSED_TRAINERS) - set(POST_PROCESSING))
    return rows + [f"| `{name}` | refused | {REFUSED_TRAINERS[name]} |" for name in others]


def option_rows():
    grouped: dict[tuple[str, str], list[str]] = {}
    for trainer, why, instead in refused_options():
        grouped.setdefault((why, instead), []).append("all" if trainer == "all" else f"`{trainer}`")
    return [f"| {', '.join(who)} | {why} | {instead} |" for (why, instead), who in grouped.items()]


@pytest.mark.parametrize("rows", [loss_rows, trainer_rows, option_rows])
def test_the_page_has_every_row_that_the_code_means(rows):
    lines = set(PAGE.read_text(encoding="utf-8").splitlines())
    missing = [row for row in rows() if row not in lines]
    assert not missing, "docs/privacy/trainers.md lacks:\n" + "\n".join(missing)


def test_the_page_has_no_row_that_the_code_does_not_mean():
    known = {*loss_rows(), *trainer_rows(), *option_rows()}
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    by_hand = {
        line for line in shown if line.startswith(("| `RewardTrainer` | its one", "| trainer", "| refused for", "|-"))
    }
    assert [line for line in shown if line not in known | by_hand] == []


def test_every_loss_that_trl_takes_is_on_the_page():
    assert dpo_losses() == DPO_LOSSES | set(REFUSED_DPO_LOSSES)
    assert len(dpo_losses()) == 15
    assert choices(trl.KTOConfig, "loss_type") == {"kto", "apo_zero_unpaired"}
    assert sft_losses() == {"nll", "dft", "chunked_nll"}
    assert {"dapo", "grpo", "dr_grpo", "bnpo"} < grpo_losses()
    assert grpo_losses() >= set(re.findall(r'self\.loss_type == "(\w+)"', inspect.getsource(grpo_trainer)))


def test_every_trainer_of_trl_is_private_or_refused_or_post_processing():
    found = trainers()
    assert {"SFTTrainer", "RewardTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"} < set(found)
    unknown = {name for name, plain in found.items() if plain not in PRIVATE | set(REFUSED_TRAINERS)}
    assert unknown == set()
    # What has a private trainer's name and lies elsewhere is a subclass, and refused as such.
    elsewhere = {name for name, plain in found.items() if plain in PRIVATE and name != plain}
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name.split('.')[0]}`" in page for name in elsewhere), elsewhere


def test_the_reasons_are_the_ones_that_a_refusal_gives(tmp_path):
    from support.tiny import dpo_trainer, synthetic_pairs

    from rlhf_audit_nb.errors import UnsupportedTrainerError
    from rlhf_audit_nb.privacy.supported import check_supported

    trainer = dpo_trainer(synthetic_pairs(2), tmp_path)
    for name in ("CPOTrainer", "DistillationTrainer"):
        trainer.__class__ = type(name, (), {})
        with pytest.raises(UnsupportedTrainerError, match=re.escape(REFUSED_TRAINERS[name])):
            check_supported(trainer)
