"""A release of transformers or TRL that changes a hook is noticed before anything is spent, and not trained through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny import dpo_trainer, kto_trainer, reward_trainer, sft_trainer, synthetic_pairs
from support.trails import without_cross_checks
from transformers import Trainer

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import PrivacyError, UnsupportedTrainerError
from rlhf_audit_nb.privacy import SealedRandom, engine, plan_training, private_training
from rlhf_audit_nb.privacy.hooks import HOOKS, check_hooks
from rlhf_audit_nb.privacy.supported import check_supported

CONFIG = PrivacyConfig(epsilon=200, noise_multiplier=1.0)


@pytest.fixture(scope="module", autouse=True)
def quick_accounting() -> Iterator[None]:
    with without_cross_checks():
        yield


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dpo_trainer(synthetic_pairs(4), tmp_path_factory.mktemp("trainer"))


@pytest.mark.parametrize("make", [dpo_trainer, reward_trainer, sft_trainer, kto_trainer])
def test_the_installed_trainers_have_the_hooks_as_they_were_verified(tmp_path: Path, make: Any) -> None:
    check_hooks(make(synthetic_pairs(3), tmp_path))


def test_every_method_that_a_private_training_overrides_is_among_the_hooks() -> None:
    overridden = {
        name for name in vars(engine.PrivateTrainerMixin) if callable(getattr(engine.PrivateTrainerMixin, name))
    }
    assert {name for name in overridden if hasattr(Trainer, name) and not name.startswith("__")} <= HOOKS.keys()


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_a_hook_that_is_gone_is_named_with_the_versions(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for kind in type(trainer).__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)
    with pytest.raises(UnsupportedTrainerError, match=f"{name} does not exist") as caught:
        check_hooks(trainer)
    assert f"transformers {transformers.__version__}" in str(caught.value)
    assert caught.value.reason == "hook"


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_a_hook_that_takes_something_else_is_named(trainer: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def changed(self: Any, model: Any, *, something_new: Any = None) -> None:
        """Stands for the method of another release."""

    monkeypatch.setattr(Trainer, name, changed)
    with pytest.raises(UnsupportedTrainerError, match=rf"Trainer\.{name} takes \(model, something_new\)"):
        check_hooks(trainer)


def test_measurements_that_are_kept_elsewhere_are_named(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_metrics", {"training": {}})
    with pytest.raises(UnsupportedTrainerError, match='no "train"'):
        check_supported(trainer)
    monkeypatch.delattr(trainer, "_metrics")
    with pytest.raises(UnsupportedTrainerError, match="_metrics does not exist"):
        check_supported(trainer)


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def runs_into(trainer: Any, kind: type[Exception], match: str) -> None:
    before = weights(trainer)
    plan = plan_training(trainer, CONFIG)
    with private_training(trainer, plan, SealedRandom(bytes(32))), pytest.raises(kind, match=match):
        trainer.train()
    assert torch.equal(before, weights(trainer))


def test_a_release_that_no_longer_calls_where_noise_is_added_takes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_get_grad_norm", "_clip_grad_norm"):
        monkeypatch.delattr(engine.PrivateTrainerMixin, name)
    runs_into(dpo_trainer(synthetic_pairs(4), tmp_path), PrivacyError, "without its noise")


def test_a_release_that_makes_its_optimizer_elsewhere_takes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(engine.PrivateTrainerMixin, "create_optimizer")
    runs_into(dpo_trainer(synthetic_pairs(4), tmp_path), PrivacyError, "not guarded")


def test_a_release_that_computes_its_steps_elsewhere_takes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(engine.PrivateTrainerMixin, "training_step")
    monkeypatch.delattr(engine.PrivateTrainerMixin, "get_train_dataloader")
    runs_into(dpo_trainer(synthetic_pairs(4), tmp_path), PrivacyError, "without its noise")
