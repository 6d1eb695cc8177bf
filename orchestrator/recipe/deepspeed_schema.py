"""What a recipe may say of DeepSpeed: few options of ours, and `extra`, which is checked by the names that DeepSpeed knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.recipe.choices import Model
from orchestrator.recipe.problems import Path, nearest


def _words(text: str) -> list[str]:
    return text.split()


BATCH = "the batch is that of the recipe: base.batch, base.micro_batch"
FIXED = "the engine sets it"
OURS = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_accumulation_steps": BATCH,
    "managed_gradient_accumulation": BATCH,
    "gradient_clipping": "use the strategy gradient_clipping",
    "optimizer": "use base.optimizer",
    "scheduler": "use base.rate",
    **dict.fromkeys(("amp", "bf16", "bfloat16", "fp16", "torch_autocast", "data_types"), "use precision"),
    "zero_allow_untested_optimizer": FIXED,
    "zero_force_ds_cpu_optimizer": FIXED,
    "zero_optimization.stage": "use engine.deepspeed.stage",
    "zero_optimization.reduce_bucket_size": "use engine.deepspeed.bucket_mib",
    "zero_optimization.memory_efficient_linear": FIXED,
    "zero_optimization.override_module_apply": FIXED,
}
OTHERS = _words("""
    activation_checkpointing aio autotuning checkpoint comet comms_logger communication_data_type compile
    compression_training csv_monitor curriculum_learning data_efficiency dataloader_drop_last datastates_ckpt
    disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel flops_profiler gradient_allreduce_op
    gradient_predivide_factor graph_harvesting hybrid_engine log_level memory_breakdown mics_hierarchical_params_gather
    mics_shard_size monitor_config nebula pipeline prescale_gradients progressive_layer_drop quantize_training
    seq_parallel_communication_data_type sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization zero_optimization
    zeropp_loco_param
""")
ZERO = _words("""
    allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
    cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module legacy_stage1
    load_from_fp32_weights log_trace_cache_warnings offload_optimizer offload_param overlap_comm parameter_alignment
    pipeline_loading_checkpoint reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory
    stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
    stage3_use_all_reduce_for_fetch_params sub_group_size use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
    zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
""")


def mistakes(extra: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """(path in `extra`, what is wrong): DeepSpeed itself takes an unknown name at the top level for none."""
    zero = extra.get("zero_optimization", {})
    yield from _wrong(extra, (), OTHERS)
    if isinstance(zero, dict):
        yield from _wrong(zero, ("zero_optimization",), ZERO)
    else:
        yield ("zero_optimization",), "expected a map"


def _wrong(stated: dict[str, Any], at: Path, known: list[str]) -> Iterator[tuple[Path, str]]:
    for key, value in stated.items():
        path = (*at, key)
        reason = OURS.get(".".join(map(str, path)))
        if reason:
            yield path, f"not for extra: {reason}"
        elif key not in known:
            yield path, f"DeepSpeed has no such key, {nearest(str(key), [*known, *_ours(at)])}"
        elif value == "auto":
            yield path, "DeepSpeed itself knows no auto: leave it out"


def _ours(at: Path) -> list[str]:
    """The keys at a path that are ours to set."""
    split = (name.split(".") for name in OURS)
    return [key for *way, key in split if tuple(way) == at]


def _closed(schema: dict[str, Any]) -> None:
    """The JSON Schema of `extra`: the same names."""
    zero = {"type": "object", "additionalProperties": False, "properties": dict.fromkeys(ZERO, True)}
    properties: dict[str, Any] = dict.fromkeys(OTHERS, True) | {"zero_optimization": zero}
    schema.update({"additionalProperties": False, "properties": properties})


class DeepSpeed(Model):
    """ZeRO: what is spread over workers instead of being held by each."""

    stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="0: nothing is spread; 1: optimizer state; 2: also gradients; 3: also weights"
    )
    bucket_mib: Annotated[float, Field(gt=0, le=65536)] | Literal["auto"] = Field(
        default="auto", description="gradients sent at once, in MiB; auto: all, but 100 at most"
    )
    extra: dict[str, Any] = Field(
        default={},
        json_schema_extra=_closed,
        description="DeepSpeed's own configuration, beside what is set here; untested, part of a trial's name",
    )
