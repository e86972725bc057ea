"""torchrun: rank, world size and device of this process, and what all ranks have to agree on."""
import os
import sys

import torch
import torch.distributed as dist

from nanocaption.cli import UserError


def init_distributed(device, options):
    """
    Returns rank, world size and the device of this rank: 0, 1 and device without torchrun. Raises
    UserError if options.batch_size cannot be split evenly.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if options.batch_size % (world * options.grad_accum):
        raise UserError(f"batch_size {options.batch_size} is not divisible by {world} ranks x "
                        f"{options.grad_accum} micro-steps")
    if world == 1:
        return rank, world, device
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        n_gpu = torch.cuda.device_count()
        if local_rank >= n_gpu:
            raise UserError(f"each process needs a GPU of its own, but this machine has {n_gpu}; "
                            f"use --nproc_per_node={n_gpu}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def all_reduce(values, world):
    """A list of numbers -> their sums over all ranks."""
    if world == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather(value, world):
    """Any object -> the list of all ranks' objects, on every rank."""
    if world == 1:
        return [value]
    gathered = [None] * world
    dist.all_gather_object(gathered, value)
    return gathered


def check_ranks_agree(facts, rank, world):
    """
    facts: {name: value}. If a rank has a different value from rank 0, rank 0 raises UserError and
    the others exit.
    """
    everyone = gather(facts, world)
    for other_rank, others in enumerate(everyone):
        for name, value in everyone[0].items():
            if others[name] == value:
                continue
            if rank > 0:
                sys.exit(2)
            raise UserError(f"rank {other_rank} has {name} {others[name]}, but rank 0 has {value}; "
                            "all ranks need the same options, data and out_dir")
