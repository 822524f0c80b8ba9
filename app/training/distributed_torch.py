"""A run of several processes, through accelerate: DDP, where each holds the whole model, and FSDP2, where they share it out.

Under FSDP a tensor is whole only while all processes gather it: whoever asks for one here does so in all of them, in the same order.
Checkpoints hold whole tensors in the form of a run in one process, so that a run may go on with another number of processes.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch

from app.core.errors import ErrorKind, WeftError
from app.training.distribution import check_distribution
from app.training.paged_torch import load_state
from app.training.run_config import RunConfig

# How long a process waits for the others: while machines of unlike speed read the model and the first initialises the adapter, and
# at the end, while the first reads the base for its hashes; and in between. It also is how long the loss of a machine goes unseen.
_LONG = datetime.timedelta(hours=2)
_SHORT = datetime.timedelta(minutes=30)


def make_accelerator(config: RunConfig) -> Any:
    """accelerate's Accelerator as the launcher's configuration asks for it. The precision is RUN.toml's business alone.

    Raises:
        WeftError: BAD_INPUT for a configuration that accelerate refuses; UNSUPPORTED for DeepSpeed, FSDP 1 and the like, and
            where several processes were asked for and one was started.
    """
    # Else all but one process would hold nothing while packing is checked and the adapter begins.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

    cpu = config.model.device == "cpu" or not torch.cuda.is_available()
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp:
        check_distribution("FSDP", version=int(os.environ.get("FSDP_VERSION") or 1))
    backend = "cpu:gloo,cuda:nccl" if fsdp and not cpu else None
    group = InitProcessGroupKwargs(backend=backend, timeout=_LONG)
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)  # packed weights are buffers, and never change
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[group, buffers])
    except (ValueError, ImportError, KeyError) as error:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"accelerate does not take this configuration: {' '.join(str(error).split())[:300]}",
            "Correct the file; `accelerate config --config_file FILE` writes one.",
        ) from error
    state = accelerator.state
    if fsdp and state.distributed_type is DistributedType.MULTI_CPU:
        # accelerate keeps FSDP for graphics cards, though all that it does for it runs on processors too.
        from accelerate.utils import FullyShardedDataParallelPlugin

        PartialState().distributed_type = DistributedType.FSDP  # each AcceleratorState reads it from there
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    plugin = getattr(state, "fsdp_plugin", None)
    check_distribution(
        accelerator.distributed_type.value,
        wraps_checkpoints=bool(plugin is not None and plugin.activation_checkpointing),
        alone=accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "LOCAL_RANK" not in os.environ,
    )
    return accelerator


def wait_long(accelerator: Any, long: bool) -> None:
    """Have what is begun from now on wait long for the other processes, or less. Without several processes nothing happens."""
    if accelerator is None or not torch.distributed.is_initialized():
        return
    from torch.distributed.distributed_c10d import _set_pg_timeout  # has no public name

    _set_pg_timeout(_LONG if long else _SHORT)


def is_sharded(accelerator: Any) -> bool:
    """Whether processes share the model's tensors out among them (FSDP)."""
    return accelerator is not None and bool(accelerator.is_fsdp2)


def shared(accelerator: Any, value: Any) -> Any:
    """The first process's value, in all of them."""
    if accelerator is None:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value], from_process=0)[0]


def agreed(accelerator: Any, token: torch.Tensor) -> torch.Tensor:
    """The first process's tensor, in all of them: cards of different make may differ in the last bit."""
    from accelerate.utils import broadcast

    return broadcast(token.contiguous(), from_process=0)


def anywhere(accelerator: Any, happened: bool) -> bool:
    """Whether something happened in any process (all have to ask)."""
    if accelerator is None:
        return happened
    return bool(accelerator.reduce(torch.tensor([float(happened)], device=accelerator.device), "sum").item())


def prepare(accelerator: Any, model: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Model and optimizer as accelerate hands them back."""
    if is_sharded(accelerator):
        # Else a tensor that one process's batch does not reach (experts) is waited for by the others for ever.
        made = accelerator.prepare(model, optimizer)
        made[0].set_reduce_scatter_unused_params(True)
        return made
    return accelerator.prepare(model, optimizer)


def whole_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP may have shared out, gathered (all processes have to ask)."""
    gather = getattr(parameter, "full_tensor", None)
    return (gather() if gather is not None else parameter).detach()


def whole_state(value: Any) -> Any:
    """An optimizer's state with its tensors whole and on the processor (all processes have to ask)."""
    if isinstance(value, torch.Tensor):
        return whole_tensor(value).cpu()
    if isinstance(value, dict):
        return {key: whole_state(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole_state(each) for each in value)
    return value


def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor into a parameter, whole or shared out."""
    with torch.no_grad():
        parameter.copy_(_like(parameter, value))


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """`load_state_dict` of a state with whole tensors."""
    load_state(optimizer, state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter, {})
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    kept[name] = _like(parameter, value)


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor shared out as the parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
