"""Set-up of DeepSpeed: process group and config; imported before any other use of DeepSpeed.

Clipping is always set, because DeepSpeed's default is 1.0. bf16 is autocast over fp32 weights with
fp32 gradients, because DeepSpeed's own bf16 counts one optimizer step too many at stage 0. Its own
keys come only from `zero.deepspeed`, which checks their spelling.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed import utils
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from xray import dist
from xray.config import RunConfig
from xray.errors import ConfigError

utils.logger.setLevel(logging.ERROR)
# DeepSpeed 0.19 calls these by the names they had before torch 2.14.
warnings.filterwarnings(
    "ignore",
    message=r"`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    category=FutureWarning,
)


def init_distributed(device: torch.device) -> None:
    """Join the process group: nccl on CUDA, gloo on CPU."""
    dist.setup_environment()
    if device.type == "cpu" and dist.local_world_size() > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.local_world_size()))
    with contextlib.suppress(AttributeError):
        # Compiled at its first use, and only needed for inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if dist.world_size() == 1:  # without a port, which another process may hold
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        with dist.joining(), contextlib.redirect_stdout(None):
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=dist.COLLECTIVE)
        dist.join()


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """Translate the config to DeepSpeed's; raises ConfigError for keys that DeepSpeed refuses."""
    config.zero.validate()
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.overlap and config.zero.stage == 2:
        zero["overlap_comm"] = True
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        # Blocks differ in micro-batch. DeepSpeed only computes the batch size from it.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # see Engine.begin
        "gradient_clipping": float(config.optim.clip_grad),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": config.train.precision == "bf16",
            "dtype": "bfloat16",
            # ZeRO would round these layers' gradients to bf16 before it sums them over ranks.
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**9,
        # Its throughput timer waits for the device twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    for key, value in config.zero.deepspeed.items():
        ours[key] = ours[key] | value if isinstance(ours.get(key), dict) else value
    if config.zero.stage == 1 and ours["zero_optimization"].get("overlap_comm"):
        raise ConfigError(
            "zero.deepspeed.zero_optimization.overlap_comm=true with zero.stage=1 does not average "
            "the gradients of parameters that a step's last micro-batch does not use: remove it, "
            "or set zero.stage=2"
        )
    try:
        DeepSpeedZeroConfig(**ours["zero_optimization"])
    except ValidationError as error:
        where = {f"{'.'.join(map(str, e['loc']))} ({e['msg'].lower()})" for e in error.errors()}
        raise ConfigError(
            f"zero.deepspeed: DeepSpeed refuses zero_optimization.{', '.join(sorted(where))}"
        ) from None
    return ours


def check_compiler() -> None:
    """Raise ConfigError if torch.compile would fail at the first step."""
    wanted = (os.environ.get("CXX"), "g++", "clang++")
    if not torch.cuda.is_available() and not any(map(shutil.which, filter(None, wanted))):
        raise ConfigError(
            "train.compile=true needs a C++ compiler on a CPU: install g++, or set it to false"
        )
