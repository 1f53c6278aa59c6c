"""DeepSpeed's JSON: read, what would couple stages or clients refused, our numbers filled in.

The file stays pure DeepSpeed. Batch sizes, optimizer and learning-rate schedule belong to the YAML:
one owner per number.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from fedpipe.config.evaluation import Precision
from fedpipe.config.half_files import check_fetched
from fedpipe.config.schema import PipelineConfig, RunConfig
from fedpipe.errors import ConfigError

_USED = (
    "activation_checkpointing", "checkpoint", "comms_logger", "communication_data_type", "compile",
    "csv_monitor", "comet", "data_types", "disable_allgather", "disable_python_gc", "dump_state",
    "flops_profiler", "gradient_allreduce_op", "gradient_predivide_factor", "log_level",
    "memory_breakdown", "prescale_gradients", "steps_per_print", "tensorboard", "timers",
    "torch_autocast", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_optimization",
)  # fmt: skip
"""Top-level keys that take effect in a stage's engine."""

_FILLED = (
    "gradient_accumulation_steps", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu",
)  # fmt: skip
"""Top-level keys that fedpipe writes."""

_PRECISION = (
    "FedAvg written into {0} parameters is undone by their fp32 masters. Use torch_autocast:"
    ' {{"enabled": true, "dtype": "bfloat16"}}, or fp32'
)
_REFUSED = {
    "optimizer": "the optimizer is the YAML's. Remove it and set optimizer.name, lr, betas",
    "scheduler": "the learning rate is the YAML's. Remove it and set optimizer.decay, warmup_ratio",
    "pipeline": "stages are the YAML's. Remove it and set pipeline.cut",
    "amp": "DeepSpeed no longer has it. Use torch_autocast",
    "autotuning": "it restarts the run with other batch sizes. Remove it",
    "elasticity": "batch sizes are the YAML's. Remove it and set pipeline.micro_batch_size",
    "data_efficiency": "data is the YAML's. Remove it",
    "curriculum_learning": "data is the YAML's. Remove it",
    "tensor_parallel": "it splits layers over ranks of other stages. Remove it",
    "expert_parallel": "the encoder has no experts. Remove it",
    "compression_training": "it replaces layers that FedAvg must find. Remove it",
    "weight_quantization": "it replaces layers that FedAvg must find. Remove it",
    "sparse_attention": "the layers are transformers' own. Remove it",
    "hybrid_engine": "it is for inference. Remove it",
}
"""Top-level keys that DeepSpeed knows and that have no place here: the reason and a way out."""

_SWITCHED = {
    "fp16": _PRECISION.format("fp16"),
    "bf16": _PRECISION.format("bf16"),
    "bfloat16": _PRECISION.format("bf16"),
}
"""Sections that are refused where they are enabled."""

_AUTOCAST = ("enabled", "dtype", "lower_precision_safe_modules")
_AUTOCAST_DTYPES = ("bfloat16", "torch.bfloat16", "bf16")
_NO_OFFLOAD = (
    "offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params",
    "cpu_offload_use_pin_memory",
)  # fmt: skip


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """Return what every stage's engine is given in pre-training; see ``engine_config``."""
    return engine_config(
        config.deepspeed.config,
        config.pipeline,
        data_parallel_degree=config.federation.data_parallel_degree,
    )


def engine_config(
    file: str, pipeline: PipelineConfig, *, data_parallel_degree: int = 1
) -> dict[str, Any]:
    """Return what every stage's DeepSpeed engine is given.

    Args:
        file: The JSON, ``deepspeed.config``; "" means plain fp32.
        pipeline: Batch sizes.
        data_parallel_degree: Ranks that share a client's batch.

    Returns:
        The file's content with batch sizes, ``gradient_clipping`` 0 and quiet logging filled in,
        and any optimizer allowed under ZeRO.

    Raises:
        ConfigError: The file is missing or invalid, or a key couples stages or clients, belongs to
            the YAML or is unknown.
    """
    given = _read(file) if file else {}
    _check_keys(given, file=file)
    _check_clipping(given, file=file)
    _check_zero(given, file=file)
    _check_precision(given, file=file)
    batch = _batch_keys(pipeline, data_parallel_degree)
    for key, value in batch.items():
        if key in given and given[key] != value:
            raise ConfigError(
                f"{file}: {key}: expected {value} (from pipeline.micro_batch_size,"
                f" pipeline.num_micro_batches and federation.data_parallel_degree), got"
                f" {given[key]!r}. Remove it: batch sizes are the YAML's and are filled in."
            )
    quiet = {"steps_per_print": None, "wall_clock_breakdown": False}
    # DeepSpeed has a list of optimizers to use with ZeRO, which SGD is not on. All of the YAML's
    # update a parameter from its own gradient alone, which is what ZeRO needs.
    sharded = given.get("zero_optimization", {}).get("stage", 0) > 0
    zero = {"zero_allow_untested_optimizer": True} if sharded else {}
    if "torch_autocast" in given and "dtype" in given["torch_autocast"]:
        # One spelling, torch's, of the several that DeepSpeed reads.
        given["torch_autocast"]["dtype"] = "bfloat16"
    # 0.0 is no default: DeepSpeed's own is 1.0, and its norm sums over stages and clients.
    return {**quiet, **given, **zero, **batch, "gradient_clipping": 0.0}


def autocast_dtype(deepspeed: dict[str, Any]) -> str | None:
    """Return the dtype that the stages compute in, by torch's name.

    Args:
        deepspeed: What ``deepspeed_config`` returned.

    Returns:
        ``"bfloat16"``, or None where everything is float32.
    """
    return "bfloat16" if deepspeed.get("torch_autocast", {}).get("enabled") else None


def stage_precision(deepspeed: dict[str, Any]) -> Precision:
    """Return the same as ``fedpipe.distributed.device.autocast`` takes it."""
    return "bf16" if autocast_dtype(deepspeed) else "fp32"


def _batch_keys(pipeline: PipelineConfig, data_parallel_degree: int) -> dict[str, int]:
    size, num = pipeline.micro_batch_size, pipeline.num_micro_batches
    return {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": num,
        "train_batch_size": size * num * data_parallel_degree,
    }


def _read(file: str) -> dict[str, Any]:
    try:
        text = Path(file).read_text(encoding="utf-8")
        check_fetched(file, key="deepspeed.config")
        found = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        raise ConfigError(
            f"deepspeed.config: expected a readable JSON file, got {file!r} ({error.strerror})."
            " Check the path, or leave deepspeed.config empty for plain fp32."
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"deepspeed.config: expected JSON, got {error.msg} in {file}:{error.lineno}. Check"
            " commas and quotes; JSON has no comments."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"deepspeed.config: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} in"
            f" {file}. Save the file as UTF-8."
        ) from error
    except _DuplicateKeyError as error:
        raise ConfigError(
            f"{file}: {error}: expected once, got a second time. Remove one."
        ) from error
    except (ValueError, RecursionError) as error:  # deeper, or with more digits, than Python reads
        raise ConfigError(
            f"deepspeed.config: expected JSON that Python reads, got {error} in {file}. Write only"
            " what DeepSpeed needs."
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"deepspeed.config: expected a JSON object in {file}, got {type(found).__name__}."
            " Write {} for plain fp32."
        )
    return found


class _DuplicateKeyError(Exception):
    """A JSON object has a key twice; json itself keeps the last one without a word."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def _check_keys(given: dict[str, Any], *, file: str) -> None:
    for key, value in given.items():
        if key in _REFUSED:
            raise ConfigError(f"{file}: {key} cannot be used: {_REFUSED[key]}.")
        if key in _SWITCHED:
            if not isinstance(value, dict) or value.get("enabled", True):
                raise ConfigError(f"{file}: {key} cannot be used: {_SWITCHED[key]}.")
        elif key not in _USED and key not in _FILLED:
            close = difflib.get_close_matches(key, [*_USED, *_FILLED], n=1)
            hint = f"Did you mean {close[0]}?" if close else "Remove it."
            raise ConfigError(f"{file}: {key}: unknown DeepSpeed key. {hint}")


def _check_clipping(given: dict[str, Any], *, file: str) -> None:
    if given.get("gradient_clipping", 0) != 0:
        raise ConfigError(
            f"{file}: gradient_clipping couples the stages' losses. Remove it and set"
            " optimizer.max_grad_norm, which clips per stage."
        )


def _check_zero(given: dict[str, Any], *, file: str) -> None:
    zero = _section(given, "zero_optimization", file=file)
    stage = zero.get("stage", 0)
    if stage not in (0, 1) or isinstance(stage, bool):
        raise ConfigError(
            f"{file}: zero_optimization.stage: expected 0 or 1, got {stage!r}. Higher stages shard"
            " the weights that FedAvg and the checkpoints need whole; cut the model into more"
            " stages instead."
        )
    for key in _NO_OFFLOAD:
        if zero.get(key):
            raise ConfigError(
                f"{file}: zero_optimization.{key}: expected no offloading, got {zero[key]!r}."
                " Remove it and cut the model into more stages: its optimizer is not the YAML's."
            )


def _check_precision(given: dict[str, Any], *, file: str) -> None:
    autocast = _section(given, "torch_autocast", file=file)
    for key in autocast:
        if key not in _AUTOCAST:
            raise ConfigError(
                f"{file}: torch_autocast.{key}: unknown DeepSpeed key. Keys are"
                f" {', '.join(_AUTOCAST)}."
            )
    if not isinstance(autocast.get("enabled", False), bool):
        raise ConfigError(
            f"{file}: torch_autocast.enabled: expected true or false, got {autocast['enabled']!r}."
            " Write it without quotes."
        )
    # float16 would need loss scaling, whose overflow checks span ranks of other clients.
    if autocast.get("enabled") and autocast.get("dtype") not in _AUTOCAST_DTYPES:
        raise ConfigError(
            f"{file}: torch_autocast.dtype: expected 'bfloat16', got {autocast.get('dtype')!r}. Set"
            " it, or remove torch_autocast for fp32."
        )
    accumulate = _section(given, "data_types", file=file).get("grad_accum_dtype", "fp32")
    if accumulate not in ("fp32", None):
        raise ConfigError(
            f"{file}: data_types.grad_accum_dtype: expected 'fp32', got {accumulate!r}. Remove it."
        )


def _section(given: dict[str, Any], key: str, *, file: str) -> dict[str, Any]:
    section = given.get(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: {key}: expected an object, got {section!r}. Write {{...}}.")
    return section
