"""Several processes, started by torchrun: their ranks, and who writes the files."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def group():
    """The process group, where torchrun started this process; nothing otherwise."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(days=1))  # the others wait for rank 0
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def first_then_others():
    """Rank 0 runs the body first and makes the files; then the others run it and find them."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def from_first(function):
    """The result of `function()` on rank 0, in every process; it must be picklable."""
    made = [function() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(made, src=0)
    return made[0]


def mean(value: float) -> float:
    """Mean over the processes."""
    if world() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / world()
