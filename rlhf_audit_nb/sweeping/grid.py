"""The grid: which runs a sweep has, as a YAML file that is checked before anything runs. Floor 5.

::

    parameters:               # every combination; the last name changes fastest
      learning_rate: [1e-4, 3e-4]
      steps: [10, 20]
    exclude:                  # leave out the combinations that have all of these values
      - {learning_rate: 3e-4, steps: 20}
    include:                  # and these besides
      - {learning_rate: 1e-3, steps: 5}
    runs:                     # or, in the place of the three above, the runs one by one
      - {learning_rate: 1e-4}
    privacy:                  # where the runs train under differential privacy
      epsilon: 8              # the population's budget and unit, as in the notebook's PrivacyConfig
      delta: 1e-5
      unit: annotator
      column: annotator_id
      each:                   # what the one private training of each run may cost, either
        epsilon: 0.5          # so much,
        delta: 1e-6
        noise_multiplier: 2   # or no more than this
        sampling_rate: 0.1
        steps: 20

Under ``each`` a value may be ``{parameter: NAME}``: that of the run. A point's id is the first 16 hex digits of the
SHA-256 of its parameters in their canonical form: it does not depend on the order, or on the rest of the grid.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import AuditError, ConfigError, PrivacyError
from rlhf_audit_nb.privacy.accountant import Composable, Guarantee, Mechanism
from rlhf_audit_nb.privacy.live_loss import effective_noise
from rlhf_audit_nb.records.normal_form import NormalFormError, canonical_json
from rlhf_audit_nb.records.parameters import check_values
from rlhf_audit_nb.records.run import notebook_parameters

if TYPE_CHECKING:
    from rlhf_audit_nb.records.parameters import Parameter

__all__ = ["MOST_RUNS", "Grid", "GridPrivacy", "Point", "point_id", "read_grid"]

MOST_RUNS = 1000
"""What one sweep may have: the entry that ends it names the record of each."""

_KEYS = ("parameters", "include", "exclude", "runs", "privacy")
_PRIVACY = ("epsilon", "delta", "unit", "column", "each")
_PROMISE = ("epsilon", "delta")
_MECHANISM = ("noise_multiplier", "sampling_rate", "steps", "loss_noise", "pairs")
_UNITS = ("annotator", "pair")
_ENDLESS = 10**300


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        id: 16 hex digits that follow from its parameters.
        parameters: by name; those that are left out keep the notebook's defaults.
    """

    id: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class GridPrivacy:
    """What the runs may spend.

    Attributes:
        config: the population's budget and its unit.
        each: by point, what its one private training may cost at most.
    """

    config: PrivacyConfig
    each: dict[str, Composable]


@dataclass(frozen=True)
class Grid:
    """What a grid file says, checked against a notebook.

    Attributes:
        points: the runs, in their order; no two are the same.
        digest: SHA-256 over the points and what they may spend, in canonical form.
        privacy: what they may spend; ``None`` where nothing is held for them.
    """

    points: tuple[Point, ...]
    digest: str
    privacy: GridPrivacy | None = None


class _Loader(yaml.SafeLoader):
    """YAML with numbers such as ``1e-5``, in which no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 yaml's signature
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_grid(path: Path | str, notebook: Path | str) -> Grid:
    """The grid in the file ``path``, checked against the parameters cell of ``notebook``.

    Raises:
        ConfigError: the file cannot be read, or says something that is not understood: code ``grid``.
        RecordError: a name is not in the parameters cell, or a value is of another type; the run is named.
    """
    said = _read(Path(path))
    _check_keys("the grid", said, _KEYS)
    known = notebook_parameters(notebook)
    points = _points(said, notebook, known)
    privacy = _privacy(said["privacy"], points, known or {}) if "privacy" in said else None
    whole = {"points": [point.parameters for point in points], "privacy": said.get("privacy")}
    return Grid(points, hashlib.sha256(_canonical("the grid", whole)).hexdigest(), privacy)


def point_id(parameters: Mapping[str, Any]) -> str:
    """The id of the run with these parameters."""
    return hashlib.sha256(_canonical("a run", dict(parameters))).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        said = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 a SafeLoader
    except OSError as error:
        raise ConfigError(
            f"The grid {path} cannot be read: {error.strerror or error}.",
            next_step="Name a YAML file that exists with --grid.",
            code="grid",
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # What is no date, number or text under a tag that calls it so ends the library in any of these.
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        _wrong(f"{path} is not YAML{place}: {problem}")
    if not isinstance(said, dict):
        _wrong(f"{path} is no grid: its top level is {_kind(said)}")
    _check_plain(path, said)
    return said


def _check_plain(path: Path, said: dict[Any, Any]) -> None:
    """Refuse keys that are no names, and numbers that nothing can be reckoned with."""
    left: list[Any] = [said]
    seen: set[int] = set()
    while left:
        value = left.pop()
        if isinstance(value, int) and abs(value) >= _ENDLESS:
            _wrong(f"{path} holds a whole number of over 300 digits")
        if not isinstance(value, dict | list) or id(value) in seen:
            continue
        seen.add(id(value))
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str):
                _wrong(f"{path} has {_kind(key)} in the place of a name", "Write names as text, in quotes if need be.")
        left.extend(value.values() if isinstance(value, dict) else value)


def _wrong(what: str, next_step: str = "See docs/records/sweeps.md for what a grid looks like.") -> NoReturn:
    raise ConfigError(f"{what}. Nothing was run.", next_step=next_step, code="grid")


def _kind(value: Any) -> str:
    if value == []:
        return "an empty list"
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _check_keys(where: str, said: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in said:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            _wrong(f"{where.capitalize()} has a key {key!r}", f"{hint}It takes: {', '.join(known)}.")


def _canonical(what: str, value: Any) -> bytes:
    try:
        return canonical_json(value)
    except NormalFormError as error:
        _wrong(f"A value in {what} cannot stand in a record: {error.message.rstrip('.')}")


# -- the runs -----------------------------------------------------------------------------------------------------


def _points(said: Mapping[str, Any], notebook: Path | str, known: Mapping[str, Parameter] | None) -> tuple[Point, ...]:
    if "runs" in said:
        others = [key for key in ("parameters", "include", "exclude") if key in said]
        if others:
            _wrong(f"The grid has both 'runs' and {others[0]!r}", "Write the runs one by one, or as combinations.")
        wanted = _mappings("runs", said["runs"])
    else:
        wanted = _product(said) + _mappings("include", said.get("include", []))
    if not wanted:
        _wrong("The grid has no run", "Give it parameters, or runs.")
    if len(wanted) > MOST_RUNS:
        _wrong(f"The grid has {len(wanted):,} runs; one sweep takes at most {MOST_RUNS:,}", "Divide it in several.")
    points: dict[str, Point] = {}
    for number, parameters in enumerate(wanted, 1):
        values = {name: _as_kind(value, (known or {}).get(name)) for name, value in parameters.items()}
        try:
            check_values(notebook, known, values)
        except AuditError as error:
            raise type(error)(
                f"Run {number} of {len(wanted)}: {error.message}", next_step=error.next_step, code=error.reason
            ) from error
        point = Point(point_id(values), values)
        if point.id in points:
            _wrong(f"Run {number} of {len(wanted)} is the same as an earlier one: {values}", "Take one of them out.")
        points[point.id] = point
    return tuple(points.values())


def _mappings(where: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        _wrong(
            f"{where!r} is not a list of parameters by name",
            f"Write {where}: followed by lines such as - {{steps: 5}}.",
        )
    return [dict(item) for item in value]


def _product(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    axes = said.get("parameters", {})
    if not isinstance(axes, dict):
        _wrong(f"'parameters' is {_kind(axes)}", "Write each name with a list of its values.")
    count = 1
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            _wrong(
                f"The parameter {name!r} has {_kind(values)} in the place of a list of values", f"Write {name}: [1, 2]."
            )
        count *= len(values)
    if count > 100 * MOST_RUNS:
        _wrong(
            f"The grid has {count:,} combinations; one sweep takes at most {MOST_RUNS:,} runs", "Divide it in several."
        )
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []
    for item in _mappings("exclude", said.get("exclude", [])):
        kept = [one for one in found if not all(name in one and one[name] == value for name, value in item.items())]
        if len(kept) == len(found):
            _wrong(f"'exclude' names {item}, which no combination has", "Write values that stand under parameters.")
        found = kept
    return found


def _as_kind(value: Any, parameter: Parameter | None) -> Any:
    """A whole number as a float where the notebook has one: the same run must not have two ids."""
    if parameter is None or isinstance(value, bool) or not isinstance(value, int):
        return value
    is_float = parameter.annotation == "float" or (
        not parameter.annotation and parameter.literal and isinstance(parameter.default, float)
    )
    return float(value) if is_float else value


# -- what they may spend ------------------------------------------------------------------------------------------


def _privacy(said: Any, points: tuple[Point, ...], known: Mapping[str, Parameter]) -> GridPrivacy:
    if not isinstance(said, dict):
        _wrong(f"'privacy' is {_kind(said)}")
    _check_keys("privacy", said, _PRIVACY)
    for key in ("epsilon", "each"):
        if key not in said:
            _wrong(f"'privacy' says no {key}", "Write the population's epsilon, and what each run may spend (each).")
    unit = said.get("unit", "annotator")
    if unit not in _UNITS:
        _wrong(f"'unit' is {unit!r}", "Write unit: annotator or unit: pair; labels are released once, and not per run.")
    if unit == "pair" and "column" in said:
        _wrong("'column' is given with unit: pair, where each row is one", "Leave it out.")
    column = {"annotator_column": said["column"]} if "column" in said else {}
    config = PrivacyConfig(
        epsilon=said["epsilon"], delta=said.get("delta", PrivacyConfig.delta), unit=unit, loss_noise=None, **column
    )
    each = said["each"]
    if not isinstance(each, dict):
        _wrong(f"'each' is {_kind(each)}", "Write epsilon, or noise_multiplier, sampling_rate and steps, under it.")
    promised = "epsilon" in each
    _check_keys("each", each, _PROMISE if promised else _MECHANISM)
    usual = config.delta / (2 * len(points))
    return GridPrivacy(
        config, {point.id: _held({"delta": usual, **each} if promised else each, point, known) for point in points}
    )


def _held(each: Mapping[str, Any], point: Point, known: Mapping[str, Parameter]) -> Composable:
    values = {name: _value(name, value, point, known) for name, value in each.items()}
    try:
        if "epsilon" in values:
            return Guarantee(float(values["epsilon"]), float(values["delta"]))
        missing = [name for name in _MECHANISM[:3] if name not in values]
        if missing:
            _wrong(f"'each' says no {missing[0]}", "Write epsilon, or noise_multiplier, sampling_rate and steps.")
        ratio = values.get("loss_noise", PrivacyConfig.loss_noise)
        noise = float(values["noise_multiplier"])
        effective = effective_noise(noise, None if ratio is None else float(ratio) * noise)
        steps, pairs = values["steps"], values.get("pairs", 1)
        if not isinstance(steps, int) or not isinstance(pairs, int):
            _wrong("'steps' and 'pairs' under 'each' are whole numbers")
        return Mechanism(effective, float(values["sampling_rate"]), steps, pairs)
    except (PrivacyError, ArithmeticError, ValueError) as error:
        said = error.message if isinstance(error, PrivacyError) else str(error)
        _wrong(f"What run {point.id} may spend cannot be accounted for: {said.rstrip('.')}")


def _value(name: str, value: Any, point: Point, known: Mapping[str, Parameter]) -> Any:
    if isinstance(value, dict):
        if set(value) != {"parameter"} or not isinstance(value["parameter"], str):
            _wrong(
                f"{name!r} under 'each' is neither a number nor a parameter's name",
                f"Write {name}: {{parameter: NAME}}.",
            )
        asked = value["parameter"]
        default = known.get(asked)
        if asked not in point.parameters and (default is None or not default.literal):
            _wrong(f"{name!r} under 'each' names the parameter {asked!r}, which has no value in run {point.id}")
        value = point.parameters.get(asked, default.default if default is not None else None)
    absent = value is None and name == "loss_noise"
    if not absent and (isinstance(value, bool) or not isinstance(value, int | float)):
        _wrong(f"{name!r} under 'each' is {value!r} for run {point.id}", "Write a number.")
    return value
