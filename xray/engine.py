"""DeepSpeed behind a small facade: the only importer of deepspeed.

What DeepSpeed gets silently wrong is settled here: clipping is always written out (its default is
1.0), bf16 is autocast over fp32 weights (its own bf16 counts one optimizer step too many at stage
0), and values are clamped through the fp32 master, which a write to the parameter does not reach.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from pathlib import Path
from typing import Any

# Read when torch.load runs: DeepSpeed asks for full unpickling, this refuses it.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from stages.base import StageModule
from xray import dist
from xray.config import RunConfig
from xray.errors import ArtifactError, ConfigError
from xray.optim import make_optimizer, parameter_groups, set_lr

deepspeed_logger.setLevel(logging.ERROR)
torch.serialization.add_safe_globals([ZeroStageEnum, LossScaler, fragment_address])


def init_distributed(device: torch.device) -> None:
    """Join the process group: nccl on CUDA, gloo on CPU."""
    dist.setup_environment()
    if device.type == "cpu" and dist.local_world_size() > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.local_world_size()))
    with contextlib.suppress(AttributeError):
        # Built by a compiler at first use and needed for inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if dist.world_size() == 1:  # no port to find, none to collide on
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        with contextlib.redirect_stdout(None):
            deepspeed.init_distributed(dist_backend=backend, verbose=False)


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The typed config in DeepSpeed's terms."""
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload:
        if config.zero.stage == 0:
            raise ConfigError("zero.offload=true needs zero.stage of 1 to 3")
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        # Blocks differ in micro-batch; DeepSpeed only multiplies this out, it cuts nothing.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # see Engine.begin
        "gradient_clipping": float(config.optim.clip_grad),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": config.train.precision == "bf16",
            "dtype": "bfloat16",
        },
        "steps_per_print": 10**9,
    }


class Engine:
    """One stage's module under DeepSpeed."""

    def __init__(self, module: StageModule, config: RunConfig) -> None:
        groups = parameter_groups(module, config.optim)
        if not groups:
            raise ConfigError(f"stage {config.stage} has nothing to train: all of it is frozen")
        self.stage = config.zero.stage
        self._norm: float | None = None  # of the last step's gradient
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(groups, config.optim),
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        if dist.world_size() == 1:
            # Stage 0 would copy all gradients into one buffer and back, for no other rank.
            self._engine.allreduce_no_retain = lambda *_, **__: None

    @property
    def module(self) -> Any:
        return self._engine.module

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def begin(self, number: int, total: int) -> None:
        """Announce micro-batch `number` of the step's `total`, which may differ between steps.

        The end of a step is said outright: DeepSpeed would find it by counting all micro-batches so
        far, which is wrong once their number per step has changed.
        """
        engine = self._engine
        if engine.gradient_accumulation_steps() != total:
            engine.set_train_batch_size(total * dist.world_size())
            if hasattr(engine.optimizer, "gradient_accumulation_steps"):  # a copy that ZeRO keeps
                engine.optimizer.gradient_accumulation_steps = total
        engine.set_gradient_accumulation_boundary(number + 1 == total)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; DeepSpeed divides by the number of micro-batches."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Count a micro-batch; the step's last one updates the parameters.

        A gradient that is not finite updates nothing, in any ZeRO stage; `grad_norm` tells.
        """
        ends = self._engine.is_gradient_accumulation_boundary()
        if ends and self.stage == 0:  # DeepSpeed keeps no norm here, and checks nothing
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(self._norm):
                return
        self._engine.step()
        if ends and self.stage > 0:
            self._norm = float(self._engine.get_global_grad_norm())

    def set_lr(self, lr: float, progress: float) -> None:
        """The lr of a step at a progress, by group."""
        set_lr(self._engine.optimizer.param_groups, lr, progress)

    @property
    def grad_norm(self) -> float:
        """The last step's global gradient norm, before clipping."""
        assert self._norm is not None, "no step was made"
        return self._norm

    @torch.no_grad()
    def clamp(self, parameter: Tensor, low: float, high: float) -> None:
        """Clamp a parameter and its fp32 master."""
        if self.stage == 3:  # by partition: the full setter fails on fewer elements than ranks
            local = safe_get_local_fp32_param(parameter)
            safe_set_local_fp32_param(parameter, local.clamp(low, high))
        elif self.stage > 0:
            master = safe_get_full_fp32_param(parameter)
            safe_set_full_fp32_param(parameter, master.clamp(low, high))
        with self._gathered([parameter]):
            parameter.clamp_(low, high)

    def full_parameter(self, parameter: Tensor) -> Tensor:
        """The fp32 value of a parameter, from its master where there is one."""
        master = safe_get_full_fp32_param(parameter)
        return (parameter.detach() if master is None else master).float().clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The full fp32 weights on CPU, in every ZeRO stage; collective in stage 3."""
        with self._gathered(list(self.module.parameters()), write=False):
            return {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}

    def _gathered(self, parameters: list[Any], write: bool = True) -> Any:
        if self.stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's files below folder; collective."""
        self._engine.save_checkpoint(
            str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; the files are refused if they hold more than tensors."""
        try:
            path, _ = self._engine.load_checkpoint(
                str(folder), tag="engine", load_module_strict=False
            )
        except Exception as error:
            raise ArtifactError(f"checkpoint {folder} cannot be loaded: {error}") from error
        if path is None:
            raise ArtifactError(f"checkpoint {folder} holds no engine state")

    def destroy(self) -> None:
        self._engine.destroy()
