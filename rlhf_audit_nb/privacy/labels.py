"""Labels and their randomised response: rows in, noisy rows out, and what ties the two to the trail. Floor 2.

A label is one bit: which of a row's two responses was preferred. `read_labels` takes the columns of a source apart,
`draw` exchanges ``chosen`` and ``rejected`` of each row with the chance p = 1 / (1 + exp(epsilon)), which is
(epsilon, 0)-private for each label. Neighbouring data sets differ in one such bit; texts, their number and who
annotated are the same in both, and are not protected.

Only the columns that were named go over to the noisy rows: a rating, a position or a vote count beside the label would
tell it. Each noisy row names its release (`RELEASE_COLUMN`) and carries a check value (`CHECK_COLUMN`), an HMAC under
a key from the vault over the release, the prompt and the two responses in their noisy order, so that a row that did
not come out of the release does not pass for one that did (`label_binding`).

Whether two releases hold the same labels is told by *row tags*: an HMAC under a key of the vault over prompt and
responses, whichever was preferred, without white space and regardless of case. Rows with one tag count as one label in
different releases, whoever gave them, since ids cannot be shown to be the same or different people.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.errors import DataError, PrivacyError
from rlhf_audit_nb.privacy.randomised_response import flip_probability

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.sampling import SealedRandom

__all__ = [
    "CHECK_COLUMN",
    "KEY_BYTES",
    "MAX_LABEL_EPSILON",
    "RELEASE_COLUMN",
    "TAG_BYTES",
    "LabelRows",
    "check_epsilon",
    "check_value",
    "draw",
    "flip_chance",
    "new_key",
    "read_labels",
    "row_tags",
]

RELEASE_COLUMN = "label_release"
CHECK_COLUMN = "label_check"
KEY_BYTES = 32
TAG_BYTES = 12
MAX_LABEL_EPSILON = 15.0
"""Above it hardly one label in three million is flipped: that is no protection, and is refused."""

_FIELDS = ("prompt", "chosen", "rejected", "annotator_id", "first", "second", "choice")
_WORDS: Mapping[Any, int] = {"first": 0, "second": 1, 0: 0, 1: 1, "0": 0, "1": 1}
_CHECK = b"rlhf-audit/label-check/v1\0"
_TAG = b"rlhf-audit/label-tag/v1\0"
_GRID = 2.0**-53  # of the uniform variates that flips are drawn with

_encoder = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True, kw_only=True)
class LabelRows:
    """Rows whose labels are to be released; every list has one value a row.

    Attributes:
        chosen: the preferred responses, as text or as lists of messages.
        rejected: the others.
        prompts: what they answer; ``None`` where the source has no such column.
        annotators: who said so; ``None`` where the source does not know. Counted, and not carried over.
        kept: further columns that were asked for by name, carried over as they are.
        dropped: the columns of the source that are left behind.
    """

    chosen: list[Any]
    rejected: list[Any]
    prompts: list[Any] | None = None
    annotators: list[Any] | None = None
    kept: Mapping[str, list[Any]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    def texts(self) -> Iterable[tuple[Any, Any, Any]]:
        """Prompt, chosen and rejected of each row."""
        return zip(self.prompts or [None] * len(self), self.chosen, self.rejected, strict=True)

    @property
    def columns(self) -> list[str]:
        """The columns of the noisy rows."""
        prompt = ["prompt"] if self.prompts is not None else []
        return [*prompt, "chosen", "rejected", *self.kept, RELEASE_COLUMN, CHECK_COLUMN]

    def most_labels(self) -> int | None:
        """How many labels the annotator with the most of them gave; ``None`` where nobody knows."""
        return max(Counter(map(str, self.annotators)).values()) if self.annotators else None

    def repeated(self) -> tuple[int, int]:
        """How many rows repeat the texts (and the annotator, where known) of an earlier one; and how often at most."""
        people = self.annotators or [None] * len(self)
        counts = Counter((str(who), _unordered(*texts)) for who, texts in zip(people, self.texts(), strict=True))
        return len(self) - len(counts), max(counts.values())


def check_epsilon(epsilon: object) -> float:
    """An epsilon that labels can be released with.

    Raises:
        PrivacyError: it is no number, not above 0, or above `MAX_LABEL_EPSILON`.
    """
    number = isinstance(epsilon, int | float) and not isinstance(epsilon, bool)
    if not (number and math.isfinite(epsilon) and 0 < epsilon <= MAX_LABEL_EPSILON):  # type: ignore[arg-type, operator]
        raise PrivacyError(
            f"epsilon is {epsilon!r}; labels are released with a number above 0 and at most {MAX_LABEL_EPSILON:g}.",
            next_step="Write such as epsilon=1.0 (27 % of the labels are flipped) or epsilon=3.0 (5 %).",
            code="epsilon",
        )
    return float(epsilon)  # type: ignore[arg-type]


def flip_chance(epsilon: float) -> float:
    """The chance with which each label is really flipped: 1 / (1 + exp(epsilon)), rounded up to what can be drawn.

    Rounded up, so that what is drawn is never less private than ``epsilon`` says.
    """
    wanted = math.nextafter(flip_probability(check_epsilon(epsilon)), 1.0)
    return math.ceil(wanted / _GRID) * _GRID


# --- reading ---------------------------------------------------------------------------------------------------------


def read_labels(
    columns: Mapping[str, list[Any]],
    *,
    name: str = "",
    names: Mapping[str, str | None] | None = None,
    keep: Sequence[str] = (),
    words: Mapping[Any, str] | None = None,
) -> LabelRows:
    """The rows of a source that has either ``chosen`` and ``rejected``, or ``first``, ``second`` and ``choice``.

    Args:
        columns: each column's values by its name, all of one length.
        name: how complaints call the source.
        names: what our fields are called there, such as ``{"prompt": "question"}``; ``None`` for one that it lacks.
        keep: further columns to carry over as they are.
        words: what the source's words for ``choice`` mean: ``first`` or ``second``.

    Raises:
        DataError: a column is missing, or a row has no two texts and one choice between them.
    """
    where = name or "The data"
    found = _resolve(columns, names or {}, where)
    if "choice" in found:
        chosen, rejected = _by_choice(columns, found, words or {}, where)
    else:
        chosen, rejected = (list(columns[_need(found, ours, columns, where)]) for ours in ("chosen", "rejected"))
    rows = LabelRows(
        chosen=chosen,
        rejected=rejected,
        prompts=list(columns[found["prompt"]]) if "prompt" in found else None,
        annotators=list(columns[found["annotator_id"]]) if "annotator_id" in found else None,
        kept={one: list(columns[one]) for one in _kept(columns, keep, where)},
        dropped=tuple(
            one
            for one in columns
            if one not in keep and one not in {theirs for ours, theirs in found.items() if ours != "annotator_id"}
        ),
    )
    if not len(rows):
        raise DataError(f"{where} has no rows.", next_step="Name a source with at least one label.", code="empty-data")
    _check_texts(rows, where)
    return rows


def _resolve(columns: Mapping[str, Any], names: Mapping[str, str | None], where: str) -> dict[str, str]:
    for ours, theirs in names.items():
        if ours not in _FIELDS:
            raise DataError(
                f"columns renames {ours!r}, which is none of {', '.join(_FIELDS)}.",
                next_step='Write what each is called in your data, such as {"prompt": "question"}.',
                code="columns",
            )
        if theirs is not None and theirs not in columns:
            raise _missing(theirs, ours, columns, where)
    wanted = {ours: names.get(ours, ours) for ours in _FIELDS}
    found = {ours: theirs for ours, theirs in wanted.items() if theirs is not None and theirs in columns}
    if "choice" in found and not {"chosen", "rejected"} & names.keys() and {"first", "second"} & found.keys():
        return {ours: theirs for ours, theirs in found.items() if ours not in ("chosen", "rejected")}
    return {ours: theirs for ours, theirs in found.items() if ours not in ("first", "second", "choice")}


def _need(found: Mapping[str, str], ours: str, columns: Mapping[str, Any], where: str) -> str:
    if ours not in found:
        raise _missing(ours, ours, columns, where)
    return found[ours]


def _missing(theirs: str, ours: str, columns: Mapping[str, Any], where: str) -> DataError:
    return DataError(
        f"{where} has no column {theirs!r}; it has {', '.join(columns)}.",
        next_step=f'Name it with columns={{"{ours}": "…"}} (--columns {ours}=…). A source has chosen and rejected, or '
        "first, second and choice.",
        code="missing-column",
    )


def _kept(columns: Mapping[str, Any], keep: Sequence[str], where: str) -> list[str]:
    for one in keep:
        if one in ("prompt", "chosen", "rejected", RELEASE_COLUMN, CHECK_COLUMN):
            raise DataError(
                f"The column {one!r} cannot be kept as it is: the noisy rows have one of that name.",
                next_step="Leave it out of keep, or rename it in the source.",
                code="columns",
            )
        if one not in columns:
            raise DataError(
                f"{where} has no column {one!r} to keep; it has {', '.join(columns)}.",
                next_step="Name columns that it has.",
                code="missing-column",
            )
    return list(dict.fromkeys(keep))


def _by_choice(
    columns: Mapping[str, list[Any]], found: Mapping[str, str], words: Mapping[Any, str], where: str
) -> tuple[list[Any], list[Any]]:
    pairs = [columns[_need(found, ours, columns, where)] for ours in ("first", "second")]
    meaning = {**_WORDS, **{theirs: _WORDS.get(ours, -1) for theirs, ours in words.items()}}
    chosen, rejected = [], []
    for number, (first, second, choice) in enumerate(zip(*pairs, columns[found["choice"]], strict=True), start=1):
        place = meaning.get(choice, -1) if isinstance(choice, str | int) else -1
        if place < 0:
            raise DataError(
                f"{where}, row {number}: the choice is neither the first nor the second response.",
                next_step="Say what its words mean (words={'A': 'first', 'B': 'second'}). A tie has no bit to "
                "randomise: decide about ties without looking at them, for instance by leaving out whole pairs.",
                code="choice",
            )
        chosen.append((first, second)[place])
        rejected.append((second, first)[place])
    return chosen, rejected


def _check_texts(rows: LabelRows, where: str) -> None:
    for number, (prompt, chosen, rejected) in enumerate(rows.texts(), start=1):
        for ours, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            if ours == "prompt" and rows.prompts is None:
                continue
            if not (isinstance(value, str) or _is_conversation(value)):
                raise DataError(
                    f"{where}, row {number}: {ours} is a {type(value).__name__}, not text.",
                    next_step="Write plain text, or a conversation as a list of messages with role and content.",
                    code="wrong-type",
                )
        if isinstance(chosen, str) is not isinstance(rejected, str):
            raise DataError(
                f"{where}, row {number}: one response is text and the other one a conversation.",
                next_step="Write both in the same way.",
                code="wrong-type",
            )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


# --- what ties a row to its release ----------------------------------------------------------------------------------


def check_value(key: bytes, release: str, prompt: Any, chosen: Any, rejected: Any) -> str:
    """What a noisy row carries (32 hex digits): changes with its release, its texts, and which of them is chosen."""
    said = _encoder.encode([release, _plain(prompt), _plain(chosen), _plain(rejected)])
    return hmac.new(key, _CHECK + said, hashlib.sha256).digest()[:16].hex()


def row_tags(rows: LabelRows, key: bytes) -> list[bytes]:
    """A tag for each row (`TAG_BYTES`), equal where the texts are, whichever of them was preferred."""
    return [
        hmac.new(key, _TAG + _encoder.encode(_unordered(*texts)), hashlib.sha256).digest()[:TAG_BYTES]
        for texts in rows.texts()
    ]


def _plain(value: Any) -> Any:
    """A message without the fields that a table gave it because other messages have them."""
    if isinstance(value, list):
        return [{str(k): v for k, v in item.items() if v is not None} for item in value]
    return value


def _unordered(prompt: Any, chosen: Any, rejected: Any) -> tuple[str, str]:
    """The two texts, with their prompt, as they are compared: a prompt may stand apart or at the head of both."""
    first, second = sorted(_bare(prompt) + _bare(response) for response in (chosen, rejected))
    return first, second


def _bare(value: Any) -> str:
    if isinstance(value, list):
        return "".join(_bare(str(item.get("content") or "")) for item in value)
    return "".join(unicodedata.normalize("NFKC", value or "").casefold().split())


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(
    rows: LabelRows, epsilon: float, randomness: SealedRandom, *, release: str, check_key: bytes
) -> dict[str, list[Any]]:
    """The noisy rows, as columns; the label of each is flipped with `flip_chance` (``epsilon``).

    The randomness is used up: a second draw from it is refused, since two draws with the same flips would tell which
    labels differ.
    """
    randomness.claim()
    flipped = randomness.flips(flip_chance(epsilon), len(rows))
    pairs = [
        (second, first) if flip else (first, second)
        for first, second, flip in zip(rows.chosen, rows.rejected, flipped.tolist(), strict=True)
    ]
    prompts = rows.prompts or [None] * len(rows)
    noisy: dict[str, list[Any]] = {"prompt": list(prompts)} if rows.prompts is not None else {}
    noisy |= {"chosen": [pair[0] for pair in pairs], "rejected": [pair[1] for pair in pairs], **rows.kept}
    noisy[RELEASE_COLUMN] = [release] * len(rows)
    noisy[CHECK_COLUMN] = [
        check_value(check_key, release, prompt, *pair) for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    return noisy


def new_key() -> bytes:
    """A fresh key for check values or row tags."""
    return secrets.token_bytes(KEY_BYTES)
