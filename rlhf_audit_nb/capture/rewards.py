"""What a trainer calls and compares with: reward functions and models, references, teachers, tools. Floor 2.

A function is known by the digest of its source text and by that of its compiled code, side by side: the text is what a
person reads, but it is read from the file as it is now, and two lambdas of one line share it; the code is what runs,
but holds for one version of Python. What neither shows is said in words (`FunctionBound`). The source digest has the
form by which a function is declared public. A model is known by its weights.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from rlhf_audit_nb.capture.weights import base_tensors, describe_model, digest_tensors
from rlhf_audit_nb.events import Event, FunctionBound, ModelBound, ReferenceUsed, number

__all__ = ["code_digest", "describe_company", "describe_function", "source_digest"]

_PLAIN = (str, int, float, bool, bytes, type(None))
_MOST_NAMES = 64


WithOrigin = Callable[[ModelBound, Any, Any], ModelBound]


def describe_company(trainer: Any, base: ModelBound, with_origin: WithOrigin) -> Iterator[Event]:
    """The entries for all that ``trainer`` brings beside its data and its policy.

    Digesting the weights of a reference, a teacher or a reward model takes as long as those of a policy of that size.

    Args:
        trainer: the trainer.
        base: what is recorded of its policy.
        with_origin: adds to the entry of a model where it comes from: entry, the model, its tokenizer or ``None``.
    """
    yield from _reference(trainer, base, with_origin)
    yield from _teacher(trainer, base, with_origin)
    yield from _rewards(trainer, with_origin)
    yield from _functions(trainer)


# --- functions -------------------------------------------------------------------------------------------------------


def describe_function(function: Any, role: str, position: int = 0, **more: Any) -> FunctionBound:
    """The entry for ``function`` in its ``role``; what cannot be known of it is said, never guessed.

    Args:
        function: anything that can be called.
        role: what the trainer does with it.
        position: its place among those of that role.
        more: further fields of the entry; ``name`` instead of the function's own.
    """
    missing: list[str] = []
    kind = None
    while isinstance(function, functools.partial):
        kind = kind or "partial"
        fixed = [f"{len(function.args)} by position"] * bool(function.args) + sorted(function.keywords)
        missing.append(f"what the partial function fixes: {', '.join(fixed) or 'nothing'}")
        function = function.func
    found = function
    if inspect.ismethod(function):
        kind = kind or "method"
        missing.append(f"the state of its object ({_type_name(function.__self__)})")
        function = function.__func__
    elif not inspect.isroutine(function) and not inspect.isclass(function):
        kind = kind or "object"
        missing.append(f"the state of the object ({_type_name(function)})")
        function = type(function)
    text = function
    if inspect.isclass(function):
        kind = kind or "class"
        function = inspect.getattr_static(function, "__init__" if found is function else "__call__", None)
    if hasattr(function, "__wrapped__"):
        missing.append("the text of its decorator: the source is that of what is decorated")
    code = getattr(function, "__code__", None)
    if code is None:
        missing.append("its code: it is not written in Python")
    source = source_digest(text)
    if source is None:
        missing.append("its source text: there is none to be read")
    missing += _unseen(function)
    name = more.pop("name", None) or _name(found)
    return FunctionBound(
        role=role,
        position=position,
        name=str(name),
        kind=kind or _kind(function),
        source_digest=source,
        code_digest=code_digest(code) if code is not None else None,
        reaches=_reaches(function),
        not_covered=missing,
        **more,
    )


def source_digest(function: Any) -> str | None:
    """Hex SHA-256 over the qualified name, a line feed and the dedented source text; ``None`` where it has none."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(f"{function.__qualname__}\n{source}".encode()).hexdigest()


def code_digest(code: CodeType) -> str:
    """Hex SHA-256 over what a compiled function is made of, without file names and line numbers."""
    return hashlib.sha256(f"{sys.implementation.cache_tag}\n{_code_text(code)}".encode()).hexdigest()


def _code_text(code: CodeType) -> str:
    consts = [_constant(item) for item in code.co_consts]
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return repr((code.co_name, counts, names, code.co_code.hex(), code.co_exceptiontable.hex(), consts))


def _constant(item: Any) -> str:
    if isinstance(item, CodeType):
        return _code_text(item)
    if isinstance(item, frozenset):  # its order is another one in every process
        return f"frozenset({sorted(map(_constant, item))})"
    if isinstance(item, tuple):
        return f"({','.join(map(_constant, item))},)"
    return repr(item)


def _kind(function: Any) -> str:
    if inspect.iscoroutinefunction(function):
        return "coroutine function"
    if getattr(function, "__name__", "") == "<lambda>":
        return "lambda"
    return "function" if inspect.isfunction(function) else "built-in"


def _unseen(function: Any) -> list[str]:
    missing = []
    if getattr(function, "__closure__", None):
        code: Any = function.__code__
        missing.append(f"the values of its closure: {', '.join(code.co_freevars)}")
    given = {**(getattr(function, "__kwdefaults__", None) or {})}
    plain = [*(getattr(function, "__defaults__", None) or ()), *given.values()]
    if not all(isinstance(value, _PLAIN) for value in plain):
        missing.append("its default arguments")
    return missing


def _reaches(function: Any) -> list[str]:
    """The global names that its code, and the code inside it, uses, without Python's own."""
    space = getattr(function, "__globals__", None)
    code = getattr(function, "__code__", None)
    if space is None or code is None:
        return []
    used: set[str] = set()
    waiting = [code]
    while waiting:
        one = waiting.pop()
        used.update(one.co_names)
        waiting += [item for item in one.co_consts if isinstance(item, CodeType)]
    return sorted(name for name in used if name in space)[:_MOST_NAMES]


def _name(function: Any) -> str:
    for attribute in ("__qualname__", "__name__"):
        if isinstance(name := getattr(function, attribute, None), str):
            return name
    return _type_name(function)


def _type_name(value: Any) -> str:
    return (value if inspect.isclass(value) else type(value)).__qualname__


# --- rewards, tools and the rest -------------------------------------------------------------------------------------


def _rewards(trainer: Any, with_origin: WithOrigin) -> Iterator[Event]:
    rewards = _listed(getattr(trainer, "reward_funcs", None))
    names = _listed(getattr(trainer, "reward_func_names", None))
    weighted: Any = getattr(trainer, "reward_weights", None)
    weights = weighted.tolist() if hasattr(weighted, "tolist") else _listed(weighted)
    tokenizers = _listed(getattr(trainer, "reward_processing_classes", None))
    for place, reward in enumerate(rewards):
        more: dict[str, Any] = {"weight": number(weights[place]) if place < len(weights) else None}
        name = names[place] if place < len(names) else None
        if hasattr(reward, "state_dict"):
            model = trainer.accelerator.unwrap_model(reward)
            tokenizer = tokenizers[place] if place < len(tokenizers) else None
            bound = describe_model(model, "reward", tokenizer)
            yield with_origin(bound, model, tokenizer)
            yield FunctionBound(
                role="reward",
                position=place,
                name=str(name or bound.name or bound.architecture),
                kind="model",
                weights_digest=bound.weights_digest,
                base_digest=digest_tensors(base_tensors(model)) if bound.adapter is not None else None,
                **more,
            )
        else:
            yield describe_function(reward, "reward", place, name=name, **more)


def _functions(trainer: Any) -> Iterator[Event]:
    environments = getattr(trainer, "environment_factories", None)
    roles: dict[str, list[Any]] = {
        "rollout": _listed(getattr(trainer, "rollout_func", None)),
        "tool": _listed(getattr(trainer, "_standalone_tools", None) or getattr(trainer, "tools", None)),
        "environment": list(environments.values()) if isinstance(environments, dict) else _listed(environments),
        "loss": [one for one in _listed(getattr(trainer, "compute_loss_func", None)) if callable(one)],
        "metrics": _listed(getattr(trainer, "compute_metrics", None)),
    }
    for role, functions in roles.items():
        for place, function in enumerate(functions):
            yield describe_function(function, role, place)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


# --- references and teachers -----------------------------------------------------------------------------------------


def _reference(trainer: Any, base: ModelBound, with_origin: WithOrigin) -> Iterator[Event]:
    if not hasattr(trainer, "ref_model"):
        return
    args = trainer.args
    shared: dict[str, Any] = {
        "role": "reference",
        "computed_ahead": bool(getattr(args, "precompute_ref_log_probs", False)),
        "moves": bool(getattr(args, "sync_ref_model", False)) or _follows(trainer),
    }
    if trainer.ref_model is not None:
        shown = trainer.accelerator.unwrap_model(trainer.ref_model)
        model = describe_model(shown, "reference")
        yield with_origin(model, shown, None)
        same = model.weights_digest == base.weights_digest
        yield ReferenceUsed(how="model", weights_digest=model.weights_digest, same_as_base=same, **shared)
        return
    yield ReferenceUsed(**{**shared, **_own_reference(trainer, base, ahead=shared["computed_ahead"])})


def _own_reference(trainer: Any, base: ModelBound, *, ahead: bool) -> dict[str, Any]:
    """The reference that is no model of its own."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if getattr(trainer, "beta", None) == 0 and hasattr(trainer, "reward_funcs"):
        return {"how": "none", "moves": False}
    if base.adapter is not None:
        if "ref" not in policy.peft_config:
            return {"how": "adapter-disabled", "weights_digest": base.weights_digest, "same_as_base": True}
        digest = _adapter_digest(policy, "ref")
        own = _adapter_digest(policy, next(iter(policy.peft_config)))
        return {"how": "reference-adapter", "weights_digest": digest, "same_as_base": digest == own}
    if ahead and not trainer.state.global_step:
        return {"how": "policy-before-training", "weights_digest": base.weights_digest, "same_as_base": True}
    return {"how": "policy-before-training" if ahead else "none"}


def _adapter_digest(model: Any, adapter: str) -> str:
    from peft import get_peft_model_state_dict

    return digest_tensors(get_peft_model_state_dict(model, adapter_name=adapter))


def _teacher(trainer: Any, base: ModelBound, with_origin: WithOrigin) -> Iterator[Event]:
    teacher = getattr(trainer, "teacher_model", None)
    args = trainer.args
    if teacher is None:
        if getattr(trainer, "teacher_client", None) is not None or getattr(args, "teacher_server_urls", None):
            yield ReferenceUsed(role="teacher", how="server")
        return
    unwrap: Callable[[Any], Any] = trainer.accelerator.unwrap_model
    kind = getattr(args, "teacher_model_kind", None)
    if unwrap(teacher) is not unwrap(trainer.model):
        tokenizer = getattr(trainer, "teacher_tokenizer", None)
        model = describe_model(unwrap(teacher), "teacher", tokenizer)
        yield with_origin(model, unwrap(teacher), tokenizer)
        same = model.weights_digest == base.weights_digest
        yield ReferenceUsed(
            role="teacher",
            how="model",
            weights_digest=model.weights_digest,
            same_as_base=same,
            moves=kind == "ema",
        )
    elif kind == "base":
        digest = base.weights_digest
        yield ReferenceUsed(role="teacher", how="adapter-disabled", weights_digest=digest, same_as_base=True)
    else:
        how = "teacher-adapter" if kind == "ema" else "policy"
        yield ReferenceUsed(role="teacher", how=how, moves=True)


def _follows(trainer: Any) -> bool:
    """Whether one of TRL's callbacks moves the reference after the policy."""
    return any(
        getattr(item, "update_ref_model", False)
        or any(kind.__name__ == "SyncRefModelCallback" for kind in type(item).__mro__)
        for item in trainer.callback_handler.callbacks
    )
