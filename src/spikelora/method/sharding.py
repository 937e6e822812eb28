"""What FSDP2 makes of an adapter's tensors and names, and sums over processes."""

import torch
from torch import Tensor


def unwrapped(name: str) -> str:
    """A module's name as in state dicts: without the checkpoint wrapper that FSDP puts around layers."""
    return name.replace("_checkpoint_wrapped_module.", "")


def add_up_processes(numbers: Tensor) -> None:
    """Add up numbers in place over the processes of a distributed run; every process has to call this."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(numbers)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 may have sharded; every process has to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_shard(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP2 may have sharded; it may have no element."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
