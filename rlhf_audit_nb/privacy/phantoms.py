"""Phantom annotators: a real trainer over made-up units whose gradients are known vectors. Floor 2.

A TRL `RewardTrainer` is given a model that is only a table: each unit has a token of its own, and the model's score of
a token is the inner product of the trainable weights with a fixed vector. With weights at zero and a learning rate of
zero, the gradient of a unit's loss is exactly the vector that was laid down for it. What the optimizer is handed at
each step is kept. Nothing of the engine is copied or replaced: sampling, loss, backward pass, clipping, sum, noise,
division and hooks are the shipped ones, under the installed versions of torch, transformers and TRL.

A unit's loss is that of a reward model at equal rewards, ln 2, or what the margin of its rows makes of it; the vectors
are laid down so that the gradient stays the same.

The weights are three tensors, one of them in float32. In each, the last coordinates belong to the units' directions,
which are orthonormal; in the first ones no unit has anything: what is released there is noise alone.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.privacy.accountant import Mechanism
from rlhf_audit_nb.privacy.engine import private_training
from rlhf_audit_nb.privacy.live_loss import live_loss
from rlhf_audit_nb.privacy.plan import plan_training
from rlhf_audit_nb.privacy.quiet import quiet_preparation

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from rlhf_audit_nb.config import GradientEngineName
    from rlhf_audit_nb.privacy.sampling import SealedRandom

__all__ = ["CLIPPING_NORM", "LOSS_BOUND", "Phantom", "Stage"]

CLIPPING_NORM = 0.75
"""C in every audit: not 1, so that a C that is left out shows."""

LOSS_BOUND = 1.5
"""B wherever the loss is released: not 2 ln 2, so that a bound that is left out shows."""

_NOTHING = 1  # the token whose score is always zero
_FIRST = 2
_ORDINARY = 1.0
_SHARES = (0.5, 0.3, 0.2)  # of the coordinates, in three tensors
_MANY_ROWS = 64
_SPARE = 32  # loud coordinates more than units, so that what comes in beside their directions shows
_PLANNED_NOISE = 8.0  # what the plan is made with before its noise is set: accounting for it takes no time


@dataclass(frozen=True)
class Phantom:
    """One made-up unit.

    Attributes:
        kind: what it is there to show.
        norm: L2 norm of its gradient in units of C, before clipping; NaN for one that cannot be computed.
        rows: how many rows it has, each with this gradient.
        margin: of each of its rows: its loss is log(1 + exp(margin)).
    """

    kind: str
    norm: float
    rows: int = 1
    margin: float = 0.0

    @property
    def expected(self) -> float:
        """What it contributes where it is sampled, in units of C."""
        return min(self.norm, 1.0) if math.isfinite(self.norm) and math.isfinite(self.loss) else 0.0

    @property
    def loss(self) -> float:
        """The loss of each of its rows."""
        return max(self.margin, 0.0) + math.log1p(math.exp(-abs(self.margin)))

    @property
    def loss_expected(self) -> float:
        """What it contributes to the released loss where it is sampled, in units of B/2."""
        return min(self.loss, LOSS_BOUND) / (LOSS_BOUND / 2) - 1 if self.expected else 0.0

    @property
    def slope(self) -> float:
        """The derivative of its loss by the difference of the two scores."""
        return -1 / (1 + math.exp(-self.margin)) if math.isfinite(self.margin) else -1.0


class Stage:
    """Phantom units on a real trainer, ready to be trained on as often as one likes.

    Args:
        phantoms: the roster.
        silent: how many coordinates shall belong to no unit.
        engine: the gradient engine to use, as `PrivacyConfig` calls it.
        seed: of the directions, which are no secret.
    """

    def __init__(
        self, phantoms: Sequence[Phantom], *, silent: int, engine: GradientEngineName = "auto", seed: int = 0
    ) -> None:
        import numpy as np

        self.phantoms = tuple(phantoms)
        self.ran = ""  # the gradient engine of the last training
        self.losses: npt.NDArray[np.float64] = np.zeros(0)  # what it released of the loss
        self.engine = engine
        self._folder = tempfile.TemporaryDirectory(prefix="privacy-check-")
        generator = np.random.default_rng(seed)
        loud = len(phantoms) + _SPARE
        self.directions = np.linalg.qr(generator.normal(size=(loud, len(phantoms))))[0].T
        self._loud, self._silent = _parts(loud), _parts(silent)
        dtypes = [torch.float64, torch.float64, torch.float32]
        self._tokens = _tokens(self.phantoms)
        ordinary = _FIRST + sum(phantom.norm <= _ORDINARY for phantom in self.phantoms)
        self.model = _Table(self._tables(), dtypes, ordinary)
        with _hushed():
            self.trainer = _trainer(self.model, self.phantoms, self._tokens, self._folder.name)

    def close(self) -> None:
        """Remove what was written."""
        self._folder.cleanup()

    @property
    def device(self) -> str:
        """Where it trains."""
        return str(self.trainer.args.device)

    def run(
        self,
        randomness: SealedRandom,
        *,
        noise_multiplier: float,
        sampling_rate: float,
        steps: int,
        torch_seed: int = 0,
        callback: Any = None,
        loss_noise: float | None = None,
    ) -> npt.NDArray[np.float64]:
        """Train privately for ``steps`` steps.

        With ``loss_noise``, as `PrivacyConfig` has it, ``losses`` holds afterwards what was released of the loss,
        (steps,), in units of B/2, about the middle and times the expected number of units.

        Returns:
            What the optimizer was handed, (steps, coordinates): the loud coordinates first, then the silent ones;
            times the expected number of units and divided by C, so that a unit's share is at most 1 in norm.
        """
        import numpy as np

        args = self.trainer.args
        args.max_steps, args.seed = 1, torch_seed  # planned for one step: accounting is no part of this
        config = PrivacyConfig(
            epsilon=1e6,
            noise_multiplier=_PLANNED_NOISE,
            sampling_rate=sampling_rate,
            clipping_norm=CLIPPING_NORM,
            max_pairs_per_unit=_MANY_ROWS,
            loss_noise=loss_noise,
            loss_bound=LOSS_BOUND,
            engine=self.engine,
        )
        keeper, listener = _Keeper(self._arranged), _Listener()
        added = [keeper] if callback is None else [keeper, callback]
        with _hushed(), _with_callbacks(self.trainer, added):
            plan = plan_training(self.trainer, config)
            args.max_steps = steps
            mechanism = Mechanism(noise_multiplier, sampling_rate, steps)
            loss = live_loss(loss_noise, LOSS_BOUND, gradient=noise_multiplier)
            curve = (0.0,) * (steps + 1)
            plan = replace(plan, mechanism=mechanism, steps_asked=steps, curve=curve, live_loss=loss)
            self.ran = plan.engine.engine
            with private_training(self.trainer, plan, randomness, listener, fell_back=self._fell_back):
                self.trainer.train()
        expected = sampling_rate * len(self.phantoms)
        self.losses = (np.array(listener.losses) - LOSS_BOUND / 2) * (expected / (LOSS_BOUND / 2))
        return np.stack(keeper.kept) * (expected / CLIPPING_NORM)

    def _fell_back(self, engine: str, reason: str) -> None:
        self.ran = f"{engine} (fell back: {reason})"

    def _tables(self) -> list[npt.NDArray[np.float64]]:
        """What stands in the place of the embeddings: for each tensor, one vector a token."""
        import numpy as np

        norms = np.array([phantom.norm / phantom.slope for phantom in self.phantoms])
        vectors = CLIPPING_NORM * norms[:, None] * self.directions
        tables, start = [], 0
        for loud, silent in zip(self._loud, self._silent, strict=True):
            table = np.zeros((_FIRST + len(self.phantoms), loud + silent))
            table[self._tokens, silent:] = vectors[:, start : start + loud]
            tables.append(table)
            start += loud
        return tables

    def _arranged(self, gradients: list[torch.Tensor]) -> npt.NDArray[np.float64]:
        import numpy as np

        found = [gradient.detach().flatten().double().cpu().numpy() for gradient in gradients]
        loud = [item[count:] for item, count in zip(found, self._silent, strict=True)]
        silent = [item[:count] for item, count in zip(found, self._silent, strict=True)]
        return np.concatenate([*loud, *silent])

    @property
    def silent(self) -> list[slice]:
        """The silent coordinates of each tensor, in what `run` returns; the last tensor is in float32."""
        stops, start = [], sum(self._loud)
        for count in self._silent:
            stops.append(slice(start, start + count))
            start += count
        return stops


class _Config(PretrainedConfig):
    model_type = "phantom"


class _Table(PreTrainedModel):
    """The score of a token: the weights' inner product with the vector that the tables hold for it."""

    config_class = _Config

    def __init__(
        self, tables: Sequence[npt.NDArray[np.float64]], dtypes: Sequence[torch.dtype], vocabulary: int
    ) -> None:
        super().__init__(_Config(num_labels=1, pad_token_id=0, eos_token_id=0, bos_token_id=0))
        self._tables = [torch.from_numpy(table).to(kind) for table, kind in zip(tables, dtypes, strict=True)]
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(table.shape[1], 1, bias=False, dtype=table.dtype) for table in self._tables
        )
        for head in self.heads:
            torch.nn.init.zeros_(head.weight)  # type: ignore[arg-type]
        self._vocabulary = SimpleNamespace(num_embeddings=vocabulary)

    def get_input_embeddings(self) -> Any:
        """How many ordinary tokens there are: made-up rows are drawn from these."""
        return self._vocabulary

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SequenceClassifierOutput:
        """One score a row, from its first token."""
        tokens = input_ids[:, :1].cpu()  # one position a row: layers see (rows, positions, features), as in a model
        vectors = [table[tokens].to(input_ids.device) for table in self._tables]
        scores = [head(vector)[:, 0] for head, vector in zip(self.heads, vectors, strict=True)]
        return SequenceClassifierOutput(logits=torch.stack([score.double() for score in scores]).sum(0))


class _Keeper(TrainerCallback):
    """Keeps what the optimizer is handed."""

    def __init__(self, arranged: Callable[[list[torch.Tensor]], npt.NDArray[np.float64]]) -> None:
        self.kept: list[npt.NDArray[np.float64]] = []
        self._arranged = arranged

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        del args, state, control
        weights = [head.weight for head in model.heads]
        self.kept.append(
            self._arranged(
                [item.grad if item.grad is not None else torch.full_like(item, math.nan) for item in weights]
            )
        )


class _Listener:
    """Keeps the losses that are released."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_private_step(self, step: int, epsilon: float, metrics: dict[str, float | int | str]) -> None:
        """Nothing of it is needed."""

    def on_private_loss(self, step: int, loss: float) -> None:  # noqa: ARG002
        """The next one."""
        self.losses.append(loss)


def _tokens(phantoms: Sequence[Phantom]) -> list[int]:
    """Each unit's token: ordinary gradients first, those that are there to break something last."""
    order = sorted(range(len(phantoms)), key=lambda one: not phantoms[one].norm <= _ORDINARY)
    places = {one: _FIRST + place for place, one in enumerate(order)}
    return [places[one] for one in range(len(phantoms))]


def _parts(count: int) -> list[int]:
    sizes = [int(count * share) for share in _SHARES]
    sizes[0] += count - sum(sizes)
    return sizes


def _trainer(model: Any, phantoms: Sequence[Phantom], tokens: Sequence[int], folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback
    from trl import RewardConfig, RewardTrainer

    pad = "<pad>"
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({pad: 0}, unk_token=pad)),
        pad_token=pad,
        eos_token=pad,
        bos_token=pad,
    )
    owners = [number for number, phantom in enumerate(phantoms) for _ in range(phantom.rows)]
    columns = {
        "chosen_ids": [[tokens[owner]] if phantoms[owner].norm else [_NOTHING] for owner in owners],
        "rejected_ids": [[_NOTHING]] * len(owners),
        "annotator_id": [f"phantom {owner}" for owner in owners],
    }
    if any(phantom.margin for phantom in phantoms):
        columns["margin"] = [phantoms[owner].margin for owner in owners]
    data = Dataset.from_dict(columns)
    settings = RewardConfig(
        output_dir=folder,
        per_device_train_batch_size=8,
        learning_rate=0.0,
        weight_decay=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available() or torch.cuda.device_count() > 1,
    )
    trainer = RewardTrainer(model=model, args=settings, train_dataset=data, processing_class=words)
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextlib.contextmanager
def _with_callbacks(trainer: Any, callbacks: Sequence[Any]) -> Iterator[None]:
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        yield
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without the libraries' remarks on a model that is none."""
    with warnings.catch_warnings(), quiet_preparation():
        warnings.simplefilter("ignore")
        yield
