"""DeepSpeed keys that `zero.deepspeed` may set, and the xray keys that set the others.

DeepSpeed ignores a misspelled top-level key silently, so the allowed keys are listed here.
"""

from __future__ import annotations

# Allowed top-level keys; inside zero_optimization and torch_autocast, all keys not in OWNED.
OPEN = (
    "comms_logger",
    "communication_data_type",
    "flops_profiler",
    "gradient_predivide_factor",
    "prescale_gradients",
    "torch_autocast",
    "zero_optimization",
)
# DeepSpeed key -> the xray key that sets it, or the reason why it must not be set.
OWNED = {
    "activation_checkpointing": "set model.grad_checkpointing",
    "amp": "set train.precision",
    "bf16": "set train.precision: bf16 is autocast over fp32 weights",
    "bfloat16": "set train.precision: bf16 is autocast over fp32 weights",
    "checkpoint": "xray writes its own checkpoints: set train.save_every",
    "compile": "set train.compile",
    "data_types": "set train.precision",
    "fp16": "set train.precision: bf16 needs no loss scale",
    "gradient_accumulation_steps": "set train.micro_batch: the steps follow from it",
    "gradient_allreduce_op": "gradients are means over processes",
    "gradient_clipping": "set optim.clip_grad",
    "optimizer": "set optim.name",
    "scheduler": "set optim.warmup and optim.min_lr",
    "steps_per_print": "set train.log_every",
    "torch_autocast.dtype": "set train.precision",
    "torch_autocast.enabled": "set train.precision",
    "train_batch_size": "set the samples of data.blocks",
    "train_micro_batch_size_per_gpu": "set train.micro_batch",
    "zero_allow_untested_optimizer": "set optim.name",
    "zero_force_ds_cpu_optimizer": "set optim.name",
    "zero_optimization.compute_grad_norm": "the norm is written to the metrics",
    "zero_optimization.cpu_offload": "set zero.offload",
    "zero_optimization.cpu_offload_param": "set zero.offload",
    "zero_optimization.mics_shard_size": "checkpoints need parts of equal size on all processes",
    "zero_optimization.offload_optimizer": "set zero.offload",
    "zero_optimization.offload_param": "set zero.offload",
    "zero_optimization.stage": "set zero.stage",
    "zero_optimization.zenflow": "checkpoints need the optimizer's own moments",
}
