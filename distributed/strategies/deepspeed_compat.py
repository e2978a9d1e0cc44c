"""The touches of DeepSpeed's inside, all of them here. Read and tried in 0.19.8; each says why no public way serves.

`attach` must come before anything else of DeepSpeed is used.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from ...recipes.errors import UserError
from ..world import World

TESTED = "0.19.8"
SERIES = TESTED.rpartition(".")[0]

log = logging.getLogger(__name__)

INSTALL = f"pip install 'ftlaunch[deepspeed]' (deepspeed~={TESTED}, on Linux)"


def attach(world: World) -> Any:
    """The package, told about this rank and about the process groups that are there already.

    Raises UserError when it is not installed, or is another series than the one whose inside is known here.
    """
    # Read when deepspeed.zero.Init and the engine are made, and in ZeRO-3's first step, for nothing but the device's
    # index. There is no argument for it: the engine compares `args.local_rank` with this very variable.
    os.environ["LOCAL_RANK"] = world.device.partition(":")[2] or str(world.local_rank)
    deepspeed = _imported()
    _choose_accelerator(world)
    _forget_earlier_run()
    # Asking which operators this machine could compile runs a compiler, and the CPU's communication would then compile
    # one (`build_shm_op`). No operator of DeepSpeed's is used: the optimizer is torch's, communication gloo or NCCL.
    deepspeed.ops.__compatible_ops__ = {}
    # Takes the process group that exists; without this `initialize` would look for MPI.
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextmanager
def quiet() -> Iterator[None]:
    """What DeepSpeed prints when it is imported and set up (memory in use, that there is no GPU) goes to our log."""
    said = io.StringIO()
    with redirect_stdout(said):
        yield
    log.debug("%s", said.getvalue())


def _imported() -> Any:
    try:
        with quiet():
            import deepspeed
    except ImportError as error:
        raise UserError(
            f"strategy: deepspeed cannot be imported ({error}): {INSTALL}. {{type: fsdp}} needs nothing."
        ) from error
    if not deepspeed.__version__.startswith(f"{SERIES}."):
        raise UserError(
            f"strategy: deepspeed {deepspeed.__version__} is installed, and only {SERIES} is known here: {INSTALL}."
        )
    _log_as_others_do()
    return deepspeed


def _log_as_others_do() -> None:
    """Warnings go where the process's other ones go; its own handler writes all to stdout."""
    theirs = logging.getLogger("DeepSpeed")
    theirs.handlers.clear()
    theirs.setLevel(logging.WARNING)
    theirs.propagate = True
    # It calls torch.distributed by a name that torch 2.13 gave up, once for every gather.
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning
    )


def _choose_accelerator(world: World) -> None:
    """By itself DeepSpeed takes the GPU of a machine that has one, also where the recipe's ranks compute on the CPU."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.accelerator.real_accelerator import set_accelerator

    kind = torch.device(world.device).type
    if get_accelerator()._name == kind:
        return
    if kind == "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator as Accelerator
    else:
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator as Accelerator
    set_accelerator(Accelerator())


def _forget_earlier_run() -> None:
    """A process may train one run after another. DeepSpeed keeps groups of the first in module variables, and ZeRO-3's
    replacement of `torch.nn.functional.linear`."""
    from deepspeed import comm
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patched
    from deepspeed.utils import groups

    comm.comm.cdb = None
    groups._release_process_group_references()
    torch.nn.functional.linear = getattr(Patched, "linear_bk", torch.nn.functional.linear)


def follow_mode(engine: Any) -> None:
    """Have the engine's `training` say in which mode its model is. Its own `train` and `eval` pass the mode on and keep
    none, so that whoever looks would always read True, and leave dropout and recomputing off behind an evaluation."""
    pass_on = engine.train

    def train(mode: bool = True) -> Any:
        pass_on(mode)
        engine.training = mode
        return engine

    engine.train, engine.eval = train, lambda: train(False)


def forget_gradients(zero: Any) -> None:
    """After an update that was left out: ZeRO-1 and 2 with the optimizer in the host's memory keep its gradients, and
    would add those of the next step to them."""
    if getattr(zero, "cpu_offload", False):
        zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))


class Partitions:
    """What a rank holds of trained tensors under ZeRO-1 and 2: pieces of one flat fp32 tensor per parameter group.

    The public getters (`safe_get_local_fp32_param` and so on) are for ZeRO-3 only, and setters raise before the first
    step, when the optimizer has no state.
    """

    def __init__(self, zero: Any, adamw: torch.optim.Optimizer) -> None:
        self._zero = zero
        # BF16_Optimizer, which ZeRO-1 in bfloat16 is, calls them otherwise.
        self._flat = _either(zero, "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        if getattr(zero, "round_robin_gradients", False):
            _link_as_dealt(zero)
        _create_state(adamw, self._flat)
        zero._lazy_init_hp_params_optimizer_state()

    def range_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where this rank's elements lie in the flattened tensor."""
        if not parameter.requires_grad:
            return 0, parameter.numel()
        piece = parameter._hp_mapping  # type: ignore[attr-defined]
        if piece is None:
            return 0, 0
        address = piece.lp_fragment_address
        return address.start, address.start + address.numel

    def master(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """Those elements, to read and to write: fp32, or a moment of the optimizer."""
        piece = parameter._hp_mapping  # type: ignore[attr-defined]
        if piece is None:
            return torch.empty(0)
        held: Tensor = piece.get_hp_fragment(moment)
        return held.detach()

    def frozen(self, parameter: nn.Parameter) -> Tensor:
        """A tensor that is not trained: whole, on every rank."""
        return parameter.detach().flatten()

    def publish(self) -> None:
        """Bring what was written to `master` into the weights that are computed with. Collective."""
        if hasattr(self._zero, "update_lp_params"):
            self._zero.update_lp_params()

    frozen_is_whole = True


class Shards:
    """The same under ZeRO-3: each tensor is cut into equal parts of its flattened self, the last ones padded."""

    def __init__(self, zero: Any, adamw: torch.optim.Optimizer) -> None:
        self._zero = zero
        _create_state(adamw, zero.fp32_partitioned_groups_flat)
        # What it divides gradients by; there is no `gradient_allreduce_op: sum` for ZeRO-3.
        zero._gradient_averaging_world_size = lambda _parameters, _size: 1

    def range_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where this rank's elements lie in the flattened tensor."""
        numel, part = parameter.ds_numel, parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = min(numel, part * parameter.ds_zero_partition_rank)  # type: ignore[attr-defined]
        return start, min(numel, start + part)

    def master(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """Those elements, to read and to write: fp32, or a moment of the optimizer. `safe_get_local_fp32_param` returns
        copies of what is offloaded."""
        held, _ = self._zero._get_fp32_opt_state_partition(parameter, False, moment)
        return self._without_padding(parameter, held)

    def frozen(self, parameter: nn.Parameter) -> Tensor:
        """A tensor that is not trained: this rank's part."""
        return self._without_padding(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]

    def _without_padding(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        start, stop = self.range_of(parameter)
        return held.detach()[: stop - start]

    def publish(self) -> None:
        """Bring what was written to `master` into the weights that are computed with."""
        for group in self._zero.fp16_groups:
            for parameter in group:
                held, _ = self._zero._get_fp32_opt_state_partition(parameter, False)
                parameter.ds_tensor.copy_(held.detach())
        # Small parameters stay gathered from step to step: as they were.
        self._zero.empty_partition_cache()

    frozen_is_whole = False


def _link_as_dealt(zero: Any) -> None:
    """Say anew where in the flat tensors each one lies: `_link_all_hp_params` takes those of a group to lie in the
    group's order, also where `round_robin_gradients` has dealt them out in another."""
    groups, zero.bit16_groups = zero.bit16_groups, zero.round_robin_bit16_groups
    zero._link_all_hp_params()
    zero.bit16_groups = groups


def _either(holder: Any, *names: str) -> Sequence[Tensor]:
    return next(getattr(holder, name) for name in names if hasattr(holder, name))


def _create_state(adamw: torch.optim.Optimizer, flats: Sequence[Tensor]) -> None:
    """DeepSpeed leaves it to the first step; here a checkpoint before that looks like every other one."""
    for flat in flats:
        adamw.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            "exp_avg": torch.zeros_like(flat, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
        }


def shard_as_made(deepspeed: Any, config: dict[str, Any], dtype: torch.dtype) -> Callable[[nn.Parameter], None]:
    """What turns one whole parameter into this rank's part of it.

    `zero.Init(module=...)` wants all parameters in memory at first, and as a context it wants modules that are made,
    not ones that are there on the meta device. It also sends each tensor's values from rank 0 to all: here they come
    later, each rank reading just its part.
    """
    init = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)

    def shard(parameter: nn.Parameter) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]

    return shard


def gather_head(deepspeed: Any, loss_model: nn.Module, head: nn.Module) -> Iterator[int]:
    """Have the head's parameters gathered from the forward pass's beginning to its backward pass's end; the ids of the
    hooks that DeepSpeed has put on the head."""
    for parameter in head.parameters():
        deepspeed.zero.register_external_parameter(loss_model, parameter)
    yield from (*head._forward_pre_hooks, *head._forward_hooks)
