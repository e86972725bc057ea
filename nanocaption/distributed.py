"""Training with torchrun: this process's rank and device, and communication between ranks."""
import os
import sys
import warnings

import torch
import torch.distributed as dist

from nanocaption.cli import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_ranks():
    """
    Rank and world size from the environment variables that torchrun or another launcher sets; 0 and
    1 without them. Raises UserError if they are incomplete or make no sense.
    """
    environment = {name: os.environ.get(name, "") for name in VARIABLES}
    rank = environment["RANK"] or "0"
    world = environment["WORLD_SIZE"] or "1"
    if not rank.isdecimal() or not world.isdecimal() or int(rank) >= int(world):
        raise UserError(f"RANK is {rank!r} and WORLD_SIZE is {world!r} in the environment; start "
                        "train.py with torchrun, or unset them")
    missing = [name for name, value in environment.items() if not value]
    if int(world) > 1 and missing:
        raise UserError(f"WORLD_SIZE is {world}, but the environment lacks {', '.join(missing)}; "
                        "start train.py with torchrun, or set what is missing for each rank")
    return int(rank), int(world)


def init_distributed(device, options):
    """
    Returns rank, world size and the device of this rank: 0, 1 and device without torchrun. Raises
    UserError if options.batch_size cannot be split evenly or the ranks don't find each other.
    """
    rank, world = read_ranks()
    if options.batch_size % (world * options.grad_accum):
        raise UserError(f"batch_size {options.batch_size} is not a multiple of ranks x grad_accum "
                        f"({world} x {options.grad_accum}); change batch_size or grad_accum")
    if world == 1:
        return rank, world, device
    if device.type == "cuda":
        n_gpu = torch.cuda.device_count()
        # launchers other than torchrun usually number ranks machine by machine
        local_rank = int(os.environ.get("LOCAL_RANK", rank % n_gpu))
        if local_rank >= n_gpu:
            raise UserError(f"each process needs a GPU of its own, but this machine has {n_gpu}; "
                            f"use --nproc_per_node={n_gpu}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # DDP warns about 1 x 1 and depthwise convolutions, whose strides are ambiguous; it is harmless
    warnings.filterwarnings("ignore", "Grad strides do not match")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (ValueError, dist.DistError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"rank {rank} cannot reach the others at {where} (MASTER_ADDR and "
                        f"MASTER_PORT): {error}") from None
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
