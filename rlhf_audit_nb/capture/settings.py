"""Which of a trainer's arguments are recorded, in what form, and which are not and why. Floor 2.

Every field of every config class of transformers and TRL stands in `RECORDED` or in `LEFT_OUT`; a test walks over
them all, so that a release that brings a new one is noticed. A field that neither knows (a config class of the user's
own) is named, without its value.

Values become plain ones. Of settings that are maps, keys that may hold a secret or name a machine are left out, and so
is text that is a path or an address; what is longer than `LONGEST` bytes is recorded by the digest of its JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_audit_nb.events import number

__all__ = ["HYPERPARAMETERS", "LEFT_OUT", "RECORDED", "generators", "hyperparameters", "unchanged"]

LONGEST = 1024

HYPERPARAMETERS = (
    # optimisation
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "bf16",
    "fp16",
    "tf32",
    "full_determinism",
    "data_seed",
    "neftune_noise_alpha",
    # preference learning
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "f_divergence_type",
    "reference_free",
    "precompute_ref_log_probs",
    "sync_ref_model",
    "use_weighting",
    "rpo_alpha",
    "ld_alpha",
    "center_rewards_coefficient",
    "max_length",
    "max_prompt_length",
    "max_completion_length",
    "truncation_mode",
    "packing",
    "completion_only_loss",
    "assistant_only_loss",
    # sampling and rewards
    "num_generations",
    "num_iterations",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "use_vllm",
    "reward_weights",
    "scale_rewards",
    "epsilon",
)
"""What stands among the settings that reports show, whether it was changed or not."""

RECORDED = (
    *HYPERPARAMETERS,
    # optimisation
    "optim_args",
    "optim_target_modules",
    "average_tokens_across_devices",
    "label_smoothing_factor",
    "auto_find_batch_size",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "dataloader_in_order",
    "remove_unused_columns",
    "label_names",
    "train_sampling_strategy",
    "length_column_name",
    "ignore_data_skip",
    "sortish_sampler",
    "accelerator_config",
    "parallelism_config",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    # precision, memory and kernels, which change the last digits
    "bf16_full_eval",
    "fp16_full_eval",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_offloading",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_liger_kernel",
    "liger_kernel_config",
    "use_cache",
    "use_cpu",
    "dtype",
    "cast_lm_head_to_fp32",
    "pad_to_multiple_of",
    "padding_free",
    "disable_dropout",
    "router_aux_loss_coef",
    "model_init_kwargs",
    "trust_remote_code",
    "is_encoder_decoder",
    # evaluation, and the choice among checkpoints
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "eval_packing",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "save_strategy",
    "save_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "predict_with_generate",
    "generation_max_length",
    "generation_num_beams",
    "generate_during_eval",
    # data
    "dataset_text_field",
    "dataset_kwargs",
    "packing_strategy",
    "shuffle_dataset",
    "chat_template_kwargs",
    "pad_token",
    "eos_token",
    "padding_value",
    # preference learning
    "discopop_tau",
    "f_alpha_divergence_coef",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "precompute_ref_batch_size",
    "desirable_weight",
    "undesirable_weight",
    "cpo_alpha",
    "simpo_gamma",
    "alpha",
    "tpo_alpha",
    "tpo_l_gamma",
    # sampling
    "max_new_tokens",
    "num_generations_eval",
    "generation_batch_size",
    "steps_per_generation",
    "cache_implementation",
    "use_transformers_continuous_batching",
    "transformers_continuous_batching_config",
    "use_transformers_paged",
    "vllm_mode",
    "vllm_model_impl",
    "vllm_structured_outputs_regex",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap",
    "vllm_sync_frequency",
    "max_tool_calling_iterations",
    "max_staleness",
    "weight_sync_steps",
    "token_budget",
    "max_inflight_tasks",
    "queue_maxsize",
    "fork_threshold_tokens",
    # rewards and policy gradients
    "delta",
    "epsilon_high",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "importance_sampling_level",
    "multi_objective_aggregation",
    "mask_truncated_completions",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "entropy_target",
    "off_policy_mask_threshold",
    "use_bias_correction_kl",
    "normalize_advantages",
    "reward_clip_range",
    "missing_eos_penalty",
    "num_value_samples",
    "beta1",
    "beta2",
    "filter_all_incorrect",
    # distillation
    "teacher_model_revision",
    "teacher_model_init_kwargs",
    "teacher_model_kind",
    "teacher_update_rate",
    "teacher_sync_steps",
    "teacher_temperature",
    "teacher_top_k",
    "teacher_prompt_template",
    "use_teacher_server",
    "add_tail_bucket",
    "lmbda",
    "seq_kd",
    "distillation_objective",
    "distillation_alpha",
    "distillation_mode",
    "distillation_topk",
    "distillation_is_clip",
    "distillation_add_tail",
    "distillation_weight",
    "generate_from_teacher",
    "num_loss_tokens_to_skip",
    "iw_opd_gamma",
    "iw_opd_epsilon",
    "reverse_kl_top_1_mode",
    "loss_top_k",
    "loss_add_tail",
    "use_uld_loss",
    "uld_token_merge_strategy",
    "use_extended_uld",
    "uld_use_hybrid_loss",
    "uld_hybrid_matched_weight",
    "uld_hybrid_unmatched_weight",
    "uld_crossentropy_weight",
    "uld_distillation_weight",
    "uld_student_temperature",
    "uld_teacher_temperature",
    "uld_skip_student_eos",
    "uld_skip_teacher_eos",
    "dont_reprompt_on_self_success",
    "max_reprompt_len",
    "use_successful_as_teacher",
    "success_reward_threshold",
    "reprompt_template",
    "solution_template",
    "feedback_template",
    "include_environment_feedback",
    "environment_feedback_only_without_solution",
    "remove_thinking_from_demonstration",
)

_PATH = "a path or a name; what it leads to is recorded by digest"
_LOGGING = "logging: it changes nothing in the training"
_SAVING = "saving: each saved folder has an entry of its own"
_HUB = "publishing: names accounts and may hold a token"
_MACHINE = "how the work is laid out on the machine or the network"
_EVALUATION = "how evaluation is computed, not what of"
_ELSEWHERE = "a field of its own in the entry"
_UNUSED = "read by scripts, not by the trainer"

LEFT_OUT: dict[str, str] = {
    "seed": _ELSEWHERE,
    **dict.fromkeys(
        (
            "output_dir",
            "resume_from_checkpoint",
            "chat_template_path",
            "reward_model_path",
            "teacher_model_name_or_path",
            "teacher_tokenizer_name_or_path",
            "generation_config",
        ),
        _PATH,
    ),
    **dict.fromkeys(
        (
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "log_on_each_node",
            "logging_nan_inf_filter",
            "include_num_input_tokens_seen",
            "log_level",
            "log_level_replica",
            "disable_tqdm",
            "report_to",
            "run_name",
            "project",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
            "log_completions",
            "num_completions_to_print",
            "log_unique_prompts",
            "log_completions_steps",
            "log_completions_hub_repo",
            "log_multimodal",
            "wandb_log_unique_prompts",
            "diagnostics_warning_interval",
            "diagnostics_flat_tolerance",
            "skip_memory_metrics",
            "debug",
            "callbacks",
        ),
        _LOGGING,
    ),
    **dict.fromkeys(
        (
            "save_only_model",
            "save_on_each_node",
            "save_total_limit",
            "enable_jit_checkpoint",
            "restore_callback_states_from_checkpoint",
        ),
        _SAVING,
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        _HUB,
    ),
    **dict.fromkeys(
        (
            "torch_empty_cache_steps",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataset_num_proc",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
            "ddp_timeout",
            "local_rank",
            "ds3_gather_for_generation",
            "vllm_enable_sleep_mode",
            "vllm_server_base_url",
            "vllm_server_host",
            "vllm_server_port",
            "vllm_server_timeout",
            "vllm_group_port",
            "vllm_gpu_memory_utilization",
            "teacher_server_urls",
            "teacher_model_server_url",
            "request_timeout",
            "weight_sync_timeout",
            "heartbeat_stale_after_s",
        ),
        _MACHINE,
    ),
    **dict.fromkeys(
        (
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _UNUSED),
}
"""Fields that are not recorded, each with the reason."""

_SECRET_KEY = re.compile(
    r"token|secret|passw|key|auth|credential|proxy|proxies|path|dir|folder|file|host|url", re.IGNORECASE
)
_PLACE = re.compile(r"^(?:[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|[a-z][a-z0-9+.-]*://)")
_WITHHELD = "left out: it names a place"
_PLAIN_NUMBER = (bool, int, float)


def hyperparameters(args: Any) -> dict[str, Any]:
    """The settings that say what was done: those of `HYPERPARAMETERS`, and every other that is not its class's default.

    Unset ones are left out. A field that this version does not know is named with the value ``"not known"``.
    """
    defaults = _defaults(args)
    found = {
        name: value
        for name, value in _settings(args)
        if name in _SHOWN or not _same(value, defaults.get(name, _MISSING))
    }
    unknown = [field for field in _fields(args) if field not in _RECORDED and field not in LEFT_OUT]
    return found | dict.fromkeys(unknown, "not known")


def unchanged(args: Any) -> dict[str, Any]:
    """All other settings of the method, at the defaults of the trainer's config class."""
    shown = hyperparameters(args)
    return {name: value for name, value in _settings(args) if name not in shown}


def generators(seed: int | None) -> dict[str, Any]:
    """What is known of the three generators of random numbers as they are now.

    Each has the hex SHA-256 of its state. Torch's also tells the seed that it was given last; of Python's and numpy's
    a seed is told where the state is the one that ``seed`` makes, nothing having been drawn since.
    """
    found: dict[str, Any] = {"python": _described(repr(random.getstate()).encode())}
    if seed is not None and random.getstate() == random.Random(seed).getstate():
        found["python"]["seed"] = seed
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        found["numpy"] = _described(repr((state[0], state[1].tolist(), *state[2:])).encode())
        if seed is not None and 0 <= seed < 2**32:
            fresh = numpy.random.RandomState(seed).get_state()
            if state[2] == fresh[2] and (state[1] == fresh[1]).all():
                found["numpy"]["seed"] = seed
    if (torch := sys.modules.get("torch")) is not None:
        found["torch"] = _described(torch.get_rng_state().numpy().tobytes())
        found["torch"]["seed"] = int(torch.initial_seed())
    return found


def _described(state: bytes) -> dict[str, Any]:
    return {"state": hashlib.sha256(state).hexdigest()}


_MISSING = object()
_RECORDED = frozenset(RECORDED)
_SHOWN = frozenset(HYPERPARAMETERS)


def _fields(args: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(args)] if dataclasses.is_dataclass(args) else []


def _settings(args: Any) -> Iterator[tuple[str, Any]]:
    for name in RECORDED:
        value = getattr(args, name, None)
        if value is not None:
            yield name, _short(_plain(value))


def _defaults(args: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(args) if dataclasses.is_dataclass(args) else ():
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    plain = {name: _plain(value) for name, value in found.items()}
    for name, value in plain.items():
        now = getattr(args, name, None)
        if value is None and dataclasses.is_dataclass(now) and not isinstance(now, type):
            kept = _plain(now)  # transformers makes a default object of some of them, without all of its fields
            plain[name] = {key: item for key, item in _plain(type(now)()).items() if key in kept}
    return {name: _short(value) for name, value in plain.items()}


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _plain(value: Any) -> Any:
    # An enumeration of strings is a string; its value is what the user wrote.
    value = getattr(value, "value", value)
    if value is None or isinstance(value, _PLAIN_NUMBER):
        return value if value is None else number(value)
    if isinstance(value, str):
        return _WITHHELD if _PLACE.match(value) else value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not _SECRET_KEY.search(str(key))}
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if dataclasses.is_dataclass(value):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    # Of torch's types the text is the value; of anything else it may tell of memory and machines.
    return str(value) if type(value).__module__ == "torch" else type(value).__name__


def _short(value: Any) -> Any:
    data = json.dumps(value, sort_keys=True).encode() if not isinstance(value, _PLAIN_NUMBER) else b""
    if len(data) <= LONGEST:
        return value
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
