"""DeepSpeed behind a small facade: the only importer of deepspeed.

What DeepSpeed gets silently wrong is settled here: clipping is always written out (its default is
1.0), bf16 is autocast over fp32 weights (its own bf16 counts one optimizer step too many at stage
0) with gradients in fp32, and values are clamped through the fp32 master, which a write to the
parameter does not reach. Its own keys come in by `zero.deepspeed` alone, which knows misspellings.
Its checkpoints are not used: they fit one number of ranks, and are pickles (see portable.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from pydantic import ValidationError
from torch import Tensor

from stages.base import StageModule
from xray import dist
from xray.config import RunConfig
from xray.errors import ConfigError
from xray.optim import (
    SLOTS,
    freeze_towers,
    make_optimizer,
    parameter_groups,
    reduce_bucket,
    set_lr,
)

AVERAGE = "ema"  # the slot of the weights' moving average

deepspeed_logger.setLevel(logging.ERROR)
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
        # Built by a compiler at first use and needed for inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if dist.world_size() == 1:  # no port to find, none to collide on
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        with contextlib.redirect_stdout(None):
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=dist.COLLECTIVE)


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The typed config in DeepSpeed's terms; raises ConfigError for what it does not take."""
    config.zero.validate()
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    ours: dict[str, Any] = {
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
            # Of these layers ZeRO would round gradients to bf16 before it sums them over ranks.
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**9,
    }
    for key, value in config.zero.deepspeed.items():
        ours[key] = ours[key] | value if isinstance(ours.get(key), dict) else value
    try:
        DeepSpeedZeroConfig(**ours["zero_optimization"])
    except ValidationError as error:
        where = {f"{'.'.join(map(str, e['loc']))} ({e['msg'].lower()})" for e in error.errors()}
        raise ConfigError(
            f"zero.deepspeed: DeepSpeed does not take zero_optimization.{', '.join(sorted(where))}"
        ) from None
    return ours


def _check_compiler() -> None:
    """Raises ConfigError where torch.compile would fail at the first step."""
    wanted = (os.environ.get("CXX"), "g++", "clang++")
    if not torch.cuda.is_available() and not any(map(shutil.which, filter(None, wanted))):
        raise ConfigError(
            "train.compile=true needs a C++ compiler on a CPU: install g++, or leave it at false"
        )


@dataclass(frozen=True)
class Piece:
    """The part of a parameter of which this rank keeps the fp32 master and the moments.

    flat: what the optimizer steps. start: in flat; own: in the flattened parameter.
    """

    flat: Tensor
    start: int
    own: int
    size: int

    def of(self, flat: Tensor) -> Tensor:
        """Its values in a tensor like `flat`."""
        return flat.view(-1)[self.start : self.start + self.size]


class Engine:
    """One stage's module under DeepSpeed."""

    def __init__(self, module: StageModule, config: RunConfig) -> None:
        freeze_towers(module, config.optim)
        groups = parameter_groups(module, config.optim)
        if not groups:
            raise ConfigError(f"stage {config.stage} has nothing to train: all of it is frozen")
        if config.train.compile:
            _check_compiler()
            module.compile_blocks()
        self.stage = config.zero.stage
        self.slots = SLOTS[config.optim.name] + ((AVERAGE,) if config.train.ema else ())
        self._ema = config.train.ema
        self._norm: float | None = None  # of the last step's gradient
        settings = deepspeed_config(config)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        settings["zero_optimization"]["reduce_bucket_size"] = reduce_bucket(config.zero, trained)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(groups, config.optim),
            config=settings,
            dist_init_required=False,
        )
        self._engine.train()  # a pretrained tower comes in eval mode
        self._trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if dist.world_size() == 1:
            # Stage 0 would copy all gradients into one buffer and back, for no other rank.
            self._engine.allreduce_no_retain = lambda *_, **__: None
        # by the tensor that the optimizer steps; every rank averages what it keeps
        self._average = {flat: flat.clone() for flat in self._flats} if self._ema else {}

    @property
    def module(self) -> Any:
        return self._engine.module

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def train(self, mode: bool = True) -> None:
        if self.module.training != mode:  # it goes through all submodules
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
            grads = [p.grad for p in self._trained.values() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(self._norm):
                self._engine.zero_grad()
                return
        self._engine.step()
        if ends and self.stage > 0:
            self._norm = float(self._engine.get_global_grad_norm())

    def skip(self) -> None:
        """End a step without it: no parameter and no moment changes, in any ZeRO stage."""
        engine = self._engine
        if self.stage == 0:
            engine.zero_grad()
            return
        # DeepSpeed's own way with a gradient that overflowed; its norm is what tells it so.
        infinite = torch.tensor(math.inf)
        norm, told = (
            ("_get_norm_groups", [infinite])
            if self.stage == 3
            else ("scaled_global_norm", infinite)
        )
        setattr(engine.optimizer, norm, lambda *_: told)
        engine.step()
        delattr(engine.optimizer, norm)

    @torch.no_grad()
    def update_average(self, steps: int) -> None:
        """Move the weights' average, if one is kept, towards the weights after so many steps.

        The decay grows to train.ema as (1 + steps) / (10 + steps), so that it forgets the start.
        """
        if self._average:
            decay = min(self._ema, (1 + steps) / (10 + steps))
            torch._foreach_lerp_([*self._average.values()], [*self._average], 1 - decay)

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

    def state_dict(self, slot: str | None = None) -> dict[str, Tensor]:
        """The full fp32 weights on CPU, in every ZeRO stage, those that are trained from a slot if
        one is named; collective."""
        with self._gathered(list(self.module.parameters()), write=False):
            found = {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
        if slot is not None:
            found |= spread(self.module, {n: self.read(n, slot).cpu() for n in self.trained})
        return found

    def _gathered(self, parameters: list[Any], write: bool = True) -> Any:
        if self.stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    # the state of training, by parameter ------------------------------------------------------

    @property
    def trained(self) -> dict[str, int]:
        """How many values each parameter has that is trained, by name."""
        return {name: getattr(p, "ds_numel", p.numel()) for name, p in self._trained.items()}

    @torch.no_grad()
    def read(self, name: str, slot: str | None = None) -> Tensor:
        """A parameter's full fp32 master, or a moment of it; collective."""
        parameter = self._trained[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
        piece = self._piece(parameter)
        values = self._values(piece, slot) if piece is not None else None
        if piece is not None and values is not None:
            whole[piece.own : piece.own + piece.size] = piece.of(values)
        return (dist.sum_over_ranks(whole) if self.stage > 0 else whole).view(shape)

    @torch.no_grad()
    def write(self, name: str, value: Tensor, slot: str | None = None) -> None:
        """Set a parameter and its master, or a moment of it; collective in stage 3.

        Raises ValueError for another shape.
        """
        parameter = self._trained[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, not {list(shape)}")
        piece = self._piece(parameter)
        if piece is not None:
            values = self._values(piece, slot)
            if values is None:
                values = self._optimizer.state[piece.flat][slot] = torch.zeros_like(piece.flat)
            piece.of(values).copy_(value.reshape(-1)[piece.own : piece.own + piece.size])
        if slot is None and self.stage > 0:
            with self._gathered([parameter]):
                parameter.copy_(value)

    @property
    def steps(self) -> int:
        """Optimizer steps, as its moments' bias correction counts them."""
        return max(
            (int(s["step"]) for s in self._optimizer.state.values() if "step" in s), default=0
        )

    def set_steps(self, steps: int) -> None:
        """Set what `steps` reads."""
        if isinstance(self._optimizer, torch.optim.AdamW):
            for flat, state in self._optimizer.state.items():
                state["step"] = torch.tensor(float(steps), device=flat.device)

    def buffers(self) -> dict[str, Tensor]:
        """What a module keeps that is no parameter."""
        names = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        state = self.module.state_dict()
        return {k: v.detach().cpu().contiguous() for k, v in state.items() if k not in names}

    @torch.no_grad()
    def write_buffers(self, values: dict[str, Tensor]) -> None:
        """Set what `buffers` reads; raises KeyError for another name."""
        state = self.module.state_dict()
        for name, value in values.items():
            state[name].copy_(value)

    @property
    def _flats(self) -> list[Tensor]:
        """The tensors that the optimizer steps on this rank."""
        pieces = (self._piece(parameter) for parameter in self._trained.values())
        return list({id(piece.flat): piece.flat for piece in pieces if piece is not None}.values())

    @property
    def _optimizer(self) -> Any:
        """The optimizer inside ZeRO's."""
        return self._engine.optimizer.optimizer if self.stage > 0 else self._engine.optimizer

    def _values(self, piece: Piece, slot: str | None) -> Tensor | None:
        """The master, or a moment, that holds a piece; None before the first step."""
        if slot == AVERAGE:
            return self._average[piece.flat]
        return piece.flat if slot is None else self._optimizer.state[piece.flat].get(slot)

    def _piece(self, parameter: Any) -> Piece | None:
        """What this rank keeps of a parameter; None for nothing."""
        if self.stage == 0:
            return Piece(parameter, 0, 0, parameter.numel())
        zero = self._engine.optimizer
        if self.stage == 3:
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            own = dist.rank() * size  # the last ranks' parts are padded
            size = max(0, min(size, parameter.ds_numel - own))
            return Piece(zero.fp32_partitioned_groups_flat[group], start, own, size)
        found = parameter._hp_mapping
        if found is None:
            return None
        flat = zero.single_partition_of_fp32_groups[found.param_group_index]
        at, own = found.hp_fragment_address, found.lp_fragment_address.start
        return Piece(flat, at.start, own, at.numel)

    def destroy(self) -> None:
        self._engine.destroy()


def spread(module: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of parameters, by every name that a state dict has for them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        other: values[names[id(parameter)]]
        for other, parameter in module.named_parameters(remove_duplicate=False)
        if names[id(parameter)] in values
    }
