"""Annotations before they are written: every row checked and encoded, or one sentence that names the row. Floor 2.

Everything is checked before anything is written. A complaint names the row and the field and never quotes a row: the
output of a notebook is passed on, and what stands in a row is not for everybody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from rlhf_audit_nb.capture.tables import Source, Table, close_to, file_digest, read_table
from rlhf_audit_nb.errors import DataError
from rlhf_audit_nb.events import Annotation, AnnotationsImported, AnnotationSource, encode_private

__all__ = ["CHOICES", "COLUMNS", "Prepared", "prepare_rows", "prepare_values"]

COLUMNS = (
    "prompt",
    "response",
    "responses",
    "first",
    "second",
    "chosen",
    "rejected",
    "choice",
    "reward",
    "shown",
    "annotator_id",
    "guideline",
    "made_at",
)
"""The fields that a row may have: what ``columns`` can rename."""

CHOICES = ("first", "second", "tie", "undecided")
"""The words for a choice between two; ``first`` and ``second`` also say where the first response was shown."""

_WAYS: tuple[tuple[str, ...], ...] = (("chosen", "rejected"), ("first", "second"), ("responses",), ("response",))
_PLACES = {"first": 0, "second": 1}
_PAIR = 2
_GAPS = ("missing", "empty")
_SINGLE = ("prompts", "chosen", "rejected", "responses", "annotator_ids", "choices", "made_at")
_ABSENT = object()

Words = Mapping[Any, str]
Column = list[Any]


# --- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Annotations that were checked and encoded; nothing of them is written yet.

    Attributes:
        header: the import's event, its ``import_id`` still empty.
        private: the header's private half.
        payloads: the private halves' bytes, in order.
        owners: whose each is; ``None`` where no annotator is known: then the import's.
    """

    header: AnnotationsImported
    private: AnnotationSource | None
    payloads: list[bytes]
    owners: list[str] | None


@dataclass
class _Fields:
    """One column a field, each of the same length; ``None`` where the source does not have it."""

    rows: int
    where: str = "Row"
    prompts: Column | None = None
    responses: Column | None = None
    choices: Column | None = None
    rewards: Column | None = None
    shown: Column | None = None
    annotators: Column | None = None
    guidelines: Column | None = None
    made_at: Column | None = None
    extra: dict[str, Column] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    text_only: bool = False
    preferred: bool = False  # the first response is the chosen one

    def refuse(self, row: int, what: str, step: str, code: str = "annotation") -> NoReturn:
        """Say what is wrong with row ``row`` (from 0)."""
        raise DataError(f"{self.where} {row + 1}: {what}.", next_step=step, code=code)


def prepare_rows(
    data: object,
    *,
    columns: Mapping[str, str | None] | None = None,
    words: Words | None = None,
    shown: str | None = None,
    guideline: str | None = None,
    guideline_file: Path | str | None = None,
    extra: str | Sequence[str] = (),
    drawn_from: Path | str | Sequence[Path | str] | None = None,
    public_digest: bool = False,
) -> Prepared:
    """Annotations from a file, a `datasets.Dataset` or an iterable of dicts; see `AuditableRLHF.log_annotations`.

    Raises:
        DataError: the source cannot be read, lacks a column, or a row cannot stand; the message names the row.
    """
    _check_mappings(columns=columns, words=words)
    extra = (extra,) if isinstance(extra, str) else tuple(extra)
    table = read_table(data)
    names = _resolve(table, columns or {}, extra)
    taken = {ours: table.columns[theirs] for ours, theirs in names.items()}
    fields = _Fields(rows=table.rows, where=f"{table.name}, row" if table.name else "Row")
    fields.text_only = table.form == "csv"
    fields.prompts, fields.annotators = taken.get("prompt"), taken.get("annotator_id")
    fields.rewards, fields.made_at = taken.get("reward"), taken.get("made_at")
    fields.responses, fields.preferred = _responses_of(taken, table)
    fields.choices = taken.get("choice")
    _state(fields, "shown", shown, taken.get("shown"))
    _state(fields, "guideline", guideline, taken.get("guideline"))
    fields.extra = {name: table.columns[name] for name in extra}
    renamed = {ours: theirs for ours, theirs in names.items() if theirs != ours}
    sources = table.sources + _digested(drawn_from)
    counted = table.rows if sources else None
    return _prepare(
        fields,
        words,
        AnnotationsImported(
            import_id="", form=table.form, kind="", provenance={}, rows=counted, columns=renamed, extra=list(extra)
        ),
        sources,
        guideline_file,
        public_digest=public_digest,
    )


def prepare_values(
    *,
    annotator_ids: Any,
    prompts: Any = None,
    responses: Any = None,
    chosen: Any = None,
    rejected: Any = None,
    choices: Any = None,
    rewards: Any = None,
    shown: Any = None,
    made_at: Any = None,
    guideline: Any = None,
    guideline_file: Path | str | None = None,
    extra: Mapping[str, Any] | None = None,
    words: Words | None = None,
    drawn_from: Path | str | Sequence[Path | str] | None = None,
    public_digest: bool = False,
) -> Prepared:
    """Annotations from a program's own lists, or one alone; see `AuditableRLHF.log_annotations`.

    Raises:
        DataError: as `prepare_rows`.
    """
    _check_mappings(words=words, extra=extra)
    given = {
        "prompts": prompts,
        "responses": responses,
        "chosen": chosen,
        "rejected": rejected,
        "choices": choices,
        "rewards": rewards,
        "made_at": made_at,
        "annotator_ids": annotator_ids,
        **{f"extra[{name!r}]": column for name, column in (extra or {}).items()},
    }
    stated = {"shown": shown, "guideline": guideline}
    lists, rows = _as_lists(given, stated)
    fields = _Fields(rows=rows, prompts=lists.get("prompts"), annotators=lists.get("annotator_ids"))
    fields.rewards, fields.made_at, fields.choices = (lists.get(name) for name in ("rewards", "made_at", "choices"))
    pairs = {"responses": "responses", "chosen": "chosen", "rejected": "rejected"}
    taken = {ours: lists[theirs] for ours, theirs in pairs.items() if theirs in lists}
    fields.responses, fields.preferred = _responses_of(taken, None)
    for name, value in stated.items():
        _state(fields, name, value if isinstance(value, str) else None, lists.get(name))
    fields.extra = {name: lists[f"extra[{name!r}]"] for name in extra or {}}
    sources = _digested(drawn_from)
    return _prepare(
        fields,
        words,
        AnnotationsImported(
            import_id="", form="values", kind="", provenance={}, rows=rows if sources else None, extra=list(extra or {})
        ),
        sources,
        guideline_file,
        public_digest=public_digest,
    )


def _check_mappings(**given: object) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, Mapping):
            raise DataError(
                f"{name} is a {type(value).__name__}, not a dict.",
                next_step={"columns": 'Write {"prompt": "question"}.', "words": 'Write {"A": "first"}.'}.get(
                    name, 'Write {"reason": [...]}, one value for each row.'
                ),
                code="wrong-type",
            )


def _digested(files: Path | str | Sequence[Path | str] | None) -> tuple[Source, ...]:
    return tuple(file_digest(path) for path in ([files] if isinstance(files, str | Path) else files or ()))


def _resolve(table: Table, columns: Mapping[str, str | None], extra: tuple[str, ...]) -> dict[str, str]:
    """Which column of the source each of our fields is: as said, else the one of the same name where there is one."""
    there = list(table.columns)
    what = table.name or "The source"
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise DataError(
                f"columns renames {ours!r}, which is none of {', '.join(COLUMNS)}.{close_to(ours, COLUMNS)}",
                next_step='Write what each is called in your data, such as {"annotator_id": "worker"}.',
                code="columns",
            )
        if theirs is not None and theirs not in there:
            raise _no_column(what, theirs, there)
    for name in extra:
        if name not in there:
            raise _no_column(what, name, there)
    names = {ours: columns.get(ours, ours) for ours in COLUMNS}
    found = {ours: theirs for ours, theirs in names.items() if theirs is not None and theirs in there}
    if "annotator_id" not in found and "annotator_id" not in columns:
        raise DataError(
            f"{what} has no column 'annotator_id'; it has {', '.join(there)}.{close_to('annotator_id', there)}",
            next_step="Say what it is called (columns annotator_id=…), or that nobody knows: annotator_id= (None).",
            code="missing-annotator",
        )
    return found


def _no_column(what: str, name: str, there: list[str]) -> DataError:
    return DataError(
        f"{what} has no column {name!r}; it has {', '.join(there)}.{close_to(name, there)}",
        next_step="Name one that it has.",
        code="missing-column",
    )


def _responses_of(taken: Mapping[str, Column], table: Table | None) -> tuple[Column, bool]:
    """The responses of each row as one list, and whether its first is the chosen one."""
    ways = [way for way in _WAYS if any(name in taken for name in way)]
    if len(ways) != 1:
        either = "; ".join(" and ".join(way) for way in ways)
        raise DataError(
            f"The responses are given in {len(ways)} ways: {either}." if ways else "There are no responses.",
            next_step=("Leave one way out (of a file: columns response=, in Python None). " if ways else "")
            + "Give chosen and rejected, or first and second, or responses (in a file: one column of a list), "
            "or one response each with its reward"
            + (f"; the source has {', '.join(table.columns)}." if table is not None else "."),
            code="responses",
        )
    way = ways[0]
    lacking = [name for name in way if name not in taken]
    if lacking:
        raise DataError(
            f"There is {way[0] if way[0] in taken else way[1]} and no {lacking[0]}.",
            next_step="Give both, so that the pair that was compared is recorded.",
            code="responses",
        )
    if way == ("response",):
        return [[value] for value in taken["response"]], False
    if len(way) == 1:
        return [[value] if _is_text(value) else value for value in taken["responses"]], False
    return [list(pair) for pair in zip(*(taken[name] for name in way), strict=True)], way[0] == "chosen"


def _state(fields: _Fields, name: str, said: str | None, column: Column | None) -> None:
    if said is not None and column is not None:
        raise DataError(
            f"{name} is said once for all rows and is a column as well.",
            next_step=f"Leave {name}= out, or map the column to None.",
            code=name,
        )
    if said is not None:
        if not isinstance(said, str) or not said.strip():
            raise DataError(
                f"{name} is {_called(said)}, not one word for all rows.",
                next_step="Leave it out where it is not known.",
                code=name,
            )
        fields.stated[name] = said
    elif column is not None:
        setattr(fields, "shown" if name == "shown" else "guidelines", column)


def _is_text(value: object) -> bool:
    """Plain text, or a conversation: a list of messages."""
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)
    )


def _as_lists(given: Mapping[str, Any], stated: Mapping[str, Any]) -> tuple[dict[str, Column], int]:
    """Every field that was given as a list, all of one length; a single annotation as lists of one."""
    there = {name: value for name, value in given.items() if value is not None}
    one = any(isinstance(value, str | int | float) for name, value in there.items())
    lists: dict[str, Column] = {}
    for name, value in there.items():
        lists[name] = [value] if one else _listed(name, value)
    for name, value in stated.items():
        if value is not None and not isinstance(value, str):
            lists[name] = [value] if one else _listed(name, value)
    if not lists or not max(map(len, lists.values())):
        raise DataError("No annotations were given.", next_step="Give at least one.", code="empty-data")
    if one:
        _check_single(there, lists)
    longest = max(lists, key=lambda name: len(lists[name]))
    for name, column in lists.items():
        if len(column) != len(lists[longest]):
            raise DataError(
                f"Row {len(column) + 1}: there is no value in {name}, which has {len(column)}, while {longest} has "
                f"{len(lists[longest])}.",
                next_step="Give every list one value for each row.",
                code="length",
            )
    return lists, len(lists[longest])


def _check_single(there: Mapping[str, Any], lists: Mapping[str, Column]) -> None:
    for name in there:
        value = lists[name][0]
        several = name == "responses" and isinstance(value, list | tuple) and all(map(_is_text, value))
        if name in _SINGLE and isinstance(value, list | tuple) and not several and not _is_text(value):
            single = next(key for key, other in there.items() if isinstance(other, str | int | float))
            raise DataError(
                f"{single} is a single value and {name} is a {type(value).__name__} of many.",
                next_step="Give either one annotation, or a list of every field with one value for each row.",
                code="length",
            )


def _listed(name: str, value: Any) -> Column:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
        raise DataError(
            f"{name} is a {type(value).__name__}, not a list.",
            next_step="Give one value for each row.",
            code="wrong-type",
        )
    return list(value)


# --- one field after the other ---------------------------------------------------------------------------------------


def _prepare(
    fields: _Fields,
    words: Words | None,
    header: AnnotationsImported,
    sources: tuple[Source, ...],
    guideline_file: Path | str | None,
    *,
    public_digest: bool,
) -> Prepared:
    fields.prompts = _texts(fields, fields.prompts, "prompt")
    responses = _responses(fields)
    choices = _choices(fields, words)
    rewards = _rewards(fields)
    if choices is None and rewards is None:
        raise DataError(
            "Neither a choice nor a reward is given: the annotations say nothing.",
            next_step="Give choices (first, second, tie, undecided), rewards, or chosen and rejected.",
            code="choices",
        )
    annotators = _annotators(fields)
    columns = (
        responses,
        _column(fields.prompts),
        _column(choices),
        _column(rewards),
        _shown(fields, words),
        _guidelines(fields),
        _column(_times(fields)),
        _column(annotators),
        _extra(fields),
    )
    payloads = _encoded(fields, columns)
    digests = [source.digest for source in sources]
    header = msgspec.structs.replace(
        header,
        kind="rating" if choices is None else "comparison",
        provenance=_provenance(fields, choices, rewards),
        guideline=fields.stated.get("guideline"),
        guideline_digest=file_digest(guideline_file).digest if guideline_file is not None else None,
        digests=digests if public_digest else [],
    )
    private = AnnotationSource(names=[source.name for source in sources], digests=digests) if sources else None
    return Prepared(header, private, payloads, annotators)


def _column(values: Column | None) -> Iterable[Any]:
    return repeat(None) if values is None else values


def _encoded(fields: _Fields, columns: Sequence[Iterable[Any]]) -> list[bytes]:
    payloads: list[bytes] = []
    add, encode = payloads.append, encode_private
    try:
        for responses, prompt, choice, reward, shown, guideline, made_at, annotator, extra in zip(
            *columns, strict=False
        ):
            add(
                encode(
                    Annotation(
                        responses=responses,
                        prompt=prompt,
                        choice=choice,
                        reward=reward,
                        shown=shown,
                        guideline=guideline,
                        made_at=made_at,
                        annotator=annotator,
                        extra=extra,
                    )
                )
            )
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError) as error:
        why = "a text is no valid Unicode" if isinstance(error, UnicodeEncodeError) else "a value cannot be written"
        fields.refuse(
            len(payloads), f"{why} as JSON ({type(error).__name__})", "Repair the row, or leave it out.", "wrong-type"
        )
    return payloads


def _texts(fields: _Fields, column: Column | None, what: str) -> Column | None:
    if column is None or set(map(type, column)) == {str}:
        return column
    for row, value in enumerate(column):
        if not _is_text(value):
            fields.refuse(
                row,
                f"the {what} is {_called(value)}, not text",
                "Give plain text, or a conversation as a list of messages.",
                "wrong-type",
            )
    return [str(value) if isinstance(value, str) else value for value in column]


def _called(value: object) -> str:
    """What a value is, without saying it."""
    if value is None:
        return "missing"
    if isinstance(value, str) and not value.strip():
        return "empty"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _responses(fields: _Fields) -> Column:
    column = fields.responses
    assert column is not None  # for the type checker: `_responses_of` gave it
    quick = set(map(type, column)) <= {list, tuple} and all(column)
    for row, found in () if quick else enumerate(column):
        if not isinstance(found, list | tuple) or not found:
            fields.refuse(
                row,
                f"the responses are {_called(found)}, not text or a list of texts",
                "Give (first, second), or one text with its reward.",
                "wrong-type",
            )
    if set(map(type, chain.from_iterable(column))) != {str}:
        for row, found in enumerate(column):
            for text in found:
                if not _is_text(text):
                    fields.refuse(
                        row,
                        f"a response is {_called(text)}, not text",
                        "Give plain text, or a conversation as a list of messages.",
                        "wrong-type",
                    )
    return column


def _choices(fields: _Fields, words: Words | None) -> Column | None:
    column = fields.choices
    if fields.preferred:
        if column is not None:
            raise DataError(
                "chosen and rejected say what was chosen, and choices as well.",
                next_step="Give the pair as first and second (responses) with choices, or leave choices out (of a "
                "file: columns choice=, in Python None).",
                code="choices",
            )
        return [0] * fields.rows
    if column is None:
        return None
    table = _choice_table(fields, words)
    assert fields.responses is not None  # for the type checker
    if set(map(type, column)) == {str} and min(map(len, fields.responses)) >= _PAIR:
        quick = [table.get(value, _ABSENT) for value in column]
        if _ABSENT not in quick:
            return quick
    found: Column = []
    for row, (value, responses) in enumerate(zip(column, fields.responses, strict=True)):
        if len(responses) < _PAIR:
            fields.refuse(
                row,
                "there is a choice, and one response to choose from",
                "Give both responses; a rating of one response is a reward.",
                "choice",
            )
        choice = _looked_up(table, value)
        if choice is _ABSENT and type(value) is int and words is None:
            choice = value
        if choice is _ABSENT:
            called = _called(value)
            fields.refuse(
                row,
                f"the choice is {called}" if called in _GAPS else "the choice is none of the known words",
                f"Write {', '.join(CHOICES)}, or say what your words mean, such as words={{'A': 'first', 'B': "
                "'second', 'same': 'tie'}.",
                "choice",
            )
        if type(choice) is int and not 0 <= choice < len(responses):
            fields.refuse(
                row,
                f"the choice is of another response than the {len(responses)} there are",
                "Count them from 0.",
                "choice",
            )
        found.append(choice)
    return found


def _choice_table(fields: _Fields, words: Words | None) -> dict[Any, int | str]:
    table: dict[Any, int | str] = {word: _PLACES.get(word, word) for word in CHOICES}
    for theirs, ours in (words or {}).items():
        if ours not in CHOICES:
            raise DataError(
                f"words says that {theirs!r} means {ours!r}, which is none of {', '.join(CHOICES)}."
                f"{close_to(str(ours), CHOICES)}",
                next_step="Write such as words={'A': 'first', 'B': 'second', 'same': 'tie'}.",
                code="words",
            )
        table[theirs] = _PLACES.get(ours, ours)
    if fields.text_only and words is None:
        table |= {"0": 0, "1": 1}
    return table


def _looked_up(table: Mapping[Any, Any], value: object) -> Any:
    """What a word means; a number also by its digits, because a command line has only text."""
    if isinstance(value, str):
        return table.get(value, _ABSENT)
    if isinstance(value, int) and not isinstance(value, bool):
        return table.get(value, table.get(str(value), _ABSENT))
    return _ABSENT


def _rewards(fields: _Fields) -> Column | None:
    column = fields.rewards
    if column is None:
        return None
    assert fields.responses is not None  # for the type checker
    if set(map(type, column)) <= {int} or (set(map(type, column)) <= {int, float} and all(map(math.isfinite, column))):
        return column
    found: Column = []
    for row, (value, responses) in enumerate(zip(column, fields.responses, strict=True)):
        plain = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(plain, list | tuple):
            if len(plain) != len(responses):
                fields.refuse(
                    row,
                    f"there are {len(plain)} rewards for {len(responses)} responses",
                    "Give one number, or one for each response.",
                    "reward",
                )
            found.append([_number(fields, row, part) for part in plain])
        else:
            found.append(_number(fields, row, plain))
    return found


def _number(fields: _Fields, row: int, value: Any) -> float | int:
    if fields.text_only and isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        what = "not finite" if isinstance(value, float) else f"{_called(value)}, not a number"
        fields.refuse(row, f"the reward is {what}", "Give a number, or leave the row out.", "reward")
    return value


def _parsed(text: str) -> float | int | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _annotators(fields: _Fields) -> list[str] | None:
    column = fields.annotators
    if column is None:
        return None
    if set(map(type, column)) == {str} and all(map(str.strip, column)):
        return column
    for row, value in enumerate(column):
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            fields.refuse(
                row,
                f"the annotator id is {_called(value)}",
                "Give every annotation its annotator, or say for all that nobody knows (annotator_ids=None; in a "
                "file columns annotator_id=).",
                "missing-annotator",
            )
    return [str(value) for value in column]


def _shown(fields: _Fields, words: Words | None) -> Iterable[Any]:
    assert fields.responses is not None  # for the type checker
    table = {ours: ours for ours in _PLACES} | {key: word for key, word in (words or {}).items() if word in _PLACES}
    said = fields.stated.get("shown")
    column = fields.shown if said is None else [said] * fields.rows
    if column is None:
        return repeat(None)
    orders = {"first": [0, 1], "second": [1, 0]}
    found: Column = []
    for row, (value, responses) in enumerate(zip(column, fields.responses, strict=True)):
        place = _looked_up(table, value)
        if value is None or (fields.text_only and value == ""):
            found.append(None)
        elif place is not _ABSENT and len(responses) == _PAIR:
            found.append(orders[place])
        elif _is_order(value, len(responses)):
            found.append(list(value))
        else:
            fields.refuse(
                row,
                "shown says no order of the responses",
                "Write where the first response (chosen, where there is one) was shown: first or second; or the "
                "places of the responses in the order shown, such as [1, 0].",
                "shown",
            )
    return found


def _is_order(value: object, count: int) -> bool:
    if not isinstance(value, list | tuple) or any(type(place) is not int for place in value):
        return False
    return sorted(value) == list(range(count))


def _guidelines(fields: _Fields) -> Iterable[Any]:
    column = fields.guidelines
    if column is None:
        return repeat(fields.stated.get("guideline"))
    for row, value in enumerate(column):
        if value is not None and not isinstance(value, str):
            fields.refuse(row, f"the guideline's version is {_called(value)}, not text", "Write it as text.")
    return [value or None for value in column]


def _times(fields: _Fields) -> Column | None:
    column = fields.made_at
    if column is None or (set(map(type, column)) == {str} and "" not in column):
        return column
    found: Column = []
    for row, value in enumerate(column):
        if value is None or value == "":
            found.append(None)
        elif isinstance(value, datetime | date):
            found.append(value.isoformat())
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            found.append(str(value))
        else:
            fields.refuse(row, f"made_at is {_called(value)}, not a time", "Write it as text (ISO 8601).", "wrong-type")
    return found


def _extra(fields: _Fields) -> Iterable[Any]:
    if not fields.extra:
        return repeat({})
    names = tuple(fields.extra)
    columns = [[_kept(value) for value in column] if {*map(type, column)} - {str, int, type(None)} else column
               for column in fields.extra.values()]  # fmt: skip
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _kept(value: Any) -> Any:
    """A value of the source as JSON holds it: numbers that JSON lacks by their names."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): _kept(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_kept(part) for part in value]
    return value


def _provenance(fields: _Fields, choices: Column | None, rewards: Column | None) -> dict[str, str]:
    def of(column: object, name: str = "") -> str:
        return "recorded" if column is not None else "stated" if name in fields.stated else "unknown"

    found = {"prompt": of(fields.prompts), "responses": "recorded"}
    if choices is not None:
        found["choice"] = "recorded"
    if rewards is not None:
        found["reward"] = "recorded"
    if any(len(responses) > 1 for responses in fields.responses or ()):
        found["shown"] = of(fields.shown, "shown")
    found["guideline"] = of(fields.guidelines, "guideline")
    found["made_at"] = of(fields.made_at)
    found["annotator"] = of(fields.annotators)
    return found
