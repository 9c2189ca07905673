"""Facade of DeepSpeed: with deepspeed_setup.py, the only module that imports it.

It avoids faults of DeepSpeed that raise no error. Clamping goes through the fp32 master, because a
write to the parameter does not reach it. DeepSpeed's checkpoints are not used, because they fit one
world size and are pickles (see portable_state.py).
"""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.base import StageModule
from xray import dist, optim
from xray.config import RunConfig
from xray.errors import ConfigError
from xray.models.compilation import compile_blocks
from xray.training.deepspeed_setup import check_compiler, deepspeed_config
from xray.training.gradient_reduction import GradientReducer, clear_gradients
from xray.training.guarded_step import GuardedStep
from xray.training.row_shards import all_rows, first_value, keep_own_rows, sharded_shapes

import deepspeed  # isort: skip  # after its set-up
from deepspeed import utils  # isort: skip
from deepspeed.runtime.zero.parameter_offload import (  # isort: skip
    FWD_MODULE_STACK,
    PartitionedParameterCoordinator,
)

AVERAGE = "ema"  # slot of the weights' moving average
LINEAR = F.linear  # torch's: ZeRO 3 replaces it for all modules, by one with other rounding


@dataclass(frozen=True)
class Piece:
    """Part of a parameter whose fp32 master and moments are on this rank."""

    flat: Tensor  # tensor that the optimizer updates
    start: int  # offset in flat
    own: int  # offset in the flattened parameter
    size: int  # number of values

    def of(self, flat: Tensor) -> Tensor:
        """Return a view of its values in a tensor that is laid out as `flat`."""
        return flat.view(-1)[self.start : self.start + self.size]


class Engine:
    """A stage's module and its optimizer under DeepSpeed."""

    def __init__(self, module: StageModule, config: RunConfig) -> None:
        groups = optim.parameter_groups(module, config.optim)
        if not groups:
            raise ConfigError(
                f"stage {config.stage} has nothing to train: all parameters are frozen"
            )
        if config.train.compile:
            check_compiler()
            compile_blocks(module)
        self.module = module
        self.stage = config.zero.stage
        self.slots = optim.SLOTS[config.optim.name] + ((AVERAGE,) if config.train.ema else ())
        self._ema = config.train.ema
        self._norm: Tensor | None = None  # of the last step's gradients
        settings = deepspeed_config(config)
        self._sharded = sharded_shapes(module)  # names and whole shapes
        assert not self._sharded or self.stage == 0, "ZeRO would sum the shards over ranks"
        trained = sum(
            p.numel()
            for name, p in module.named_parameters()
            if p.requires_grad and name not in self._sharded
        )
        bucket = optim.reduce_bucket(config.zero, trained)
        settings["zero_optimization"]["reduce_bucket_size"] = bucket
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optim.make_optimizer(groups, config.optim),
            config=settings,
            dist_init_required=False,
        )
        self._engine.train()  # a pretrained tower comes in eval mode
        self._trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        keep_own_rows(module, self._sharded)  # DeepSpeed has made the ranks' parameters equal
        shards = [self._trained[name] for name in self._sharded]
        reduced = [p for name, p in self._trained.items() if name not in self._sharded]
        self._records: dict[tuple[str, ...], Any] = {}  # ZeRO 3's coordinators by kind of pass
        self._guard: GuardedStep | None = None
        if not config.zero.offload:  # DeepSpeed has the gradients on the host
            parts = self._engine, self.stage, self._optimizer, reduced, shards
            self._guard = GuardedStep(*parts)
        self._reducer: GradientReducer | None = None
        if dist.world_size() > 1 and self.stage == 0 and (config.zero.overlap or shards):
            dtype = self._engine.communication_data_type
            self._reducer = GradientReducer(reduced, bucket, dtype)
        if dist.world_size() == 1 or self._reducer is not None:
            # Without other ranks stage 0 would copy all gradients to a buffer and back.
            self._engine.allreduce_no_retain = lambda *_, **__: None
        # Keys are the tensors that the optimizer updates: each rank averages its own part.
        pieces = [self._piece(name) for name in self._trained] if self._ema else []
        flats = {piece.flat for piece in pieces if piece is not None}
        self._average = {flat: flat.clone() for flat in flats}

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def train(self, mode: bool = True) -> None:
        """Set the module to training or evaluation."""
        if self.module.training != mode:  # setting it visits all submodules
            self._engine.train(mode)

    def begin(self, number: int, total: int) -> None:
        """Announce micro-batch `number` of the step's `total`, which may differ between steps.

        DeepSpeed would count all micro-batches so far. This is wrong after their number changed.
        """
        engine = self._engine
        if engine.gradient_accumulation_steps() != total:
            engine.set_train_batch_size(total * dist.world_size())
            if hasattr(engine.optimizer, "gradient_accumulation_steps"):  # ZeRO keeps a copy
                engine.optimizer.gradient_accumulation_steps = total
        engine.set_gradient_accumulation_boundary(number + 1 == total)
        if number == 0:
            clear_gradients(engine.optimizer, self.stage)
        if self._reducer is not None and number + 1 == total:
            self._reducer.begin()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; DeepSpeed divides by the number of micro-batches."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            return
        if self._reducer is not None:
            self._reducer.finish()
        if self._guard is None and self.stage > 1:  # offload: also of earlier micro-batches only
            self._engine.optimizer.finalize_gradient_accumulation_boundary()

    def prepare_pass(self, *kind: str) -> None:
        """Announce a kind of pass: passes of a kind use the parameters in the same order.

        ZeRO 3 prefetches parameters in a recorded order, and records it again after a pass in
        another order. Here, each kind has a separate record.
        """
        if self.stage < 3:
            return
        offload = self._engine.optimizer.parameter_offload
        if kind not in self._records:
            record = copy.copy(offload.param_coordinator)
            if not record.is_invalid_trace():
                record._invalidate_trace()
            record._clear_trace_structures()
            self._records[kind] = record
        offload.param_coordinator = self._records[kind]

    def step(self, loss: Tensor | None = None) -> None:
        """Count a micro-batch; the last one of a step updates the parameters.

        If the gradients, or the step's loss [0-d, on the device], are not finite, nothing is
        updated in any ZeRO stage; `norm` shows it.
        """
        engine = self._engine
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
        elif self._guard is not None:
            self._norm = self._guard.step(loss)
        elif loss is not None and not math.isfinite(dist.to_host(loss)):
            self._norm = torch.full_like(loss, math.nan)
            self.skip()
        else:
            engine.step()
            self._norm = torch.as_tensor(engine.get_global_grad_norm())

    def skip(self) -> None:
        """End a step without an update of parameters or moments, in any ZeRO stage."""
        if self._guard is not None:
            self._guard.skip()
            return
        # ZeRO skips a step whose gradients overflow, which it detects by their norm.
        engine, value = self._engine, [torch.tensor(math.inf)]
        norm = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        setattr(engine.optimizer, norm, lambda *_: value if self.stage == 3 else value[0])
        engine.step()
        delattr(engine.optimizer, norm)

    @torch.no_grad()
    def update_average(self, steps: int) -> None:
        """Update the moving average of the weights, if train.ema is set.

        The decay grows to train.ema as (1 + steps) / (10 + steps), to forget the initial weights.
        """
        if self._average:
            decay = min(self._ema, (1 + steps) / (10 + steps))
            torch._foreach_lerp_([*self._average.values()], [*self._average], 1 - decay)

    def set_lr(self, lr: float, progress: float) -> None:
        """Set the lr of each parameter group for a step at a progress."""
        optim.set_lr(self._engine.optimizer.param_groups, lr, progress)

    @property
    def norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping [0-d; on the host if offloaded]."""
        assert self._norm is not None, "no step was made"
        return self._norm

    @property
    def grad_norm(self) -> float:
        """The `norm`, read by the host."""
        return float(dist.to_host(self.norm))

    @torch.no_grad()
    def clamp(self, parameter: Tensor, low: float, high: float) -> None:
        """Clamp a parameter and its fp32 master."""
        if self.stage == 3:  # the setter of full values fails for fewer elements than ranks
            local = utils.safe_get_local_fp32_param(parameter)
            utils.safe_set_local_fp32_param(parameter, local.clamp(low, high))
        elif self.stage > 0:
            master = utils.safe_get_full_fp32_param(parameter)
            utils.safe_set_full_fp32_param(parameter, master.clamp(low, high))
        with self._gathered([parameter]):
            parameter.clamp_(low, high)

    def state_dict(self, slot: str | None = None) -> dict[str, Tensor]:
        """Return the full fp32 weights on the CPU in every ZeRO stage; collective.

        slot: read the trained weights from this slot, for example their average.
        """
        with self._gathered(list(self.module.parameters()), write=False):
            weights = {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
        weights |= {name: self.read(name) for name in self._sharded}
        if slot is not None:
            trained = {id(p): self.read(n, slot).cpu() for n, p in self._trained.items()}
            # A shared parameter has several names in the state dict.
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                weights[name] = trained.get(id(parameter), weights[name])
        return weights

    def _gathered(self, parameters: list[Any], write: bool = True) -> Any:
        if self.stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    # training state by parameter -------------------------------------------------------------

    @property
    def trained(self) -> dict[str, int]:
        """Number of values of each trained parameter, by name."""
        return {name: self._shape(name).numel() for name in self._trained}

    @torch.no_grad()
    def read(self, name: str, slot: str | None = None) -> Tensor:
        """Read a parameter's full fp32 master, or a slot of it; collective."""
        parameter, shape, piece = self._trained[name], self._shape(name), self._piece(name)
        if name in self._sharded:
            assert piece is not None
            values = self._values(piece, slot)
            return all_rows(torch.zeros_like(parameter) if values is None else values, shape)
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
        if piece is not None and (values := self._values(piece, slot)) is not None:
            whole[piece.own : piece.own + piece.size] = piece.of(values)
        return (dist.sum_over_ranks(whole) if self.stage > 0 else whole).view(shape)

    @torch.no_grad()
    def write(self, name: str, value: Tensor, slot: str | None = None) -> None:
        """Write a parameter and its master, or a slot of it; collective in stage 3.

        Raises ValueError for another shape.
        """
        parameter, shape, piece = self._trained[name], self._shape(name), self._piece(name)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, not {list(shape)}")
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
        """Number of optimizer steps that the bias correction of the moments uses."""
        counts = (int(s["step"]) for s in self._optimizer.state.values() if "step" in s)
        return max(counts, default=0)

    def set_steps(self, steps: int) -> None:
        """Set the number of `steps`."""
        if isinstance(self._optimizer, torch.optim.AdamW):
            for flat, state in self._optimizer.state.items():
                state["step"] = torch.tensor(float(steps), device=flat.device)

    @property
    def _optimizer(self) -> Any:
        """The torch optimizer, which ZeRO wraps."""
        return self._engine.optimizer.optimizer if self.stage > 0 else self._engine.optimizer

    def _values(self, piece: Piece, slot: str | None) -> Tensor | None:
        """Return the master or slot that holds a piece; None for a moment before the first step."""
        if slot == AVERAGE:
            return self._average[piece.flat]
        return piece.flat if slot is None else self._optimizer.state[piece.flat].get(slot)

    def _shape(self, name: str) -> torch.Size:
        """Return a parameter's shape, of which this rank may have a part."""
        parameter: Any = self._trained[name]
        return self._sharded.get(name, getattr(parameter, "ds_shape", parameter.shape))

    def _piece(self, name: str) -> Piece | None:
        """Return the part of a parameter that this rank keeps; None if it keeps nothing of it."""
        parameter: Any = self._trained[name]
        if self.stage == 0:
            own = first_value(self._sharded[name]) if name in self._sharded else 0
            return Piece(parameter, 0, own, parameter.numel())
        zero = self._engine.optimizer
        if self.stage == 3:
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            own = dist.rank() * size  # the parts of the last ranks are padded
            size = max(0, min(size, parameter.ds_numel - own))
            return Piece(zero.fp32_partitioned_groups_flat[group], start, own, size)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        at, own = mapping.hp_fragment_address, mapping.lp_fragment_address.start
        return Piece(flat, at.start, own, at.numel)

    def destroy(self) -> None:
        """Free DeepSpeed's hooks and buffers."""
        self._engine.destroy()
        _forget_modules()
        F.linear = LINEAR


def _forget_modules() -> None:
    """Clear ZeRO 3's global list and cache of modules, which keep them alive."""
    FWD_MODULE_STACK.clear()
    cached = vars(PartitionedParameterCoordinator)[
        "_PartitionedParameterCoordinator__params_to_release"
    ]
    for cell in cached.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
