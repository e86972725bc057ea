"""Which dtype matrix products use: bfloat16 where it is faster, else float32."""
import time
from contextlib import nullcontext

import torch
import torch.nn as nn

from nanocaption.cli import UserError
from nanocaption.distributed import gather

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FASTER = 1.5  # use bfloat16 on a CPU if its products are at least this many times as fast


def pick_dtype(name, device, n_row=512):
    """
    name: "auto", "bfloat16" or "float32". Returns the torch.dtype and the reason in a few words.

    auto is bfloat16 on GPUs that have it and float32 on MPS. On CPUs, a few products with matrices
    of at most n_row rows are timed to decide, which takes about 20 ms.
    """
    if name not in ("auto", *DTYPES):
        raise UserError(f"dtype must be auto, bfloat16 or float32, not {name!r}")
    if name != "auto":
        return DTYPES[name], "as requested"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "tensor cores"
        return torch.float32, "this GPU has no bfloat16"
    if device.type != "cpu":
        return torch.float32, f"the default on {device.type}"
    speedup = bfloat16_speedup(n_row)
    dtype = torch.bfloat16 if speedup >= FASTER else torch.float32
    return dtype, f"bfloat16 matmuls are {speedup:.2g}x as fast as float32"


def bfloat16_speedup(n_row=512):
    """How many times as fast as float32 products this CPU's bfloat16 products are."""
    for size in (128, 512):
        shape = (min(n_row, size), size)
        speedup = product_seconds(torch.float32, shape) / product_seconds(torch.bfloat16, shape)
        if speedup < 0.5:
            break  # where bfloat16 is emulated, larger products could take a second
    return speedup


def product_seconds(dtype, shape):
    """The shortest time of three products (n, size) x (size, size) on the CPU; shape: (n, size)."""
    a = torch.ones(shape, dtype=dtype)
    b = torch.ones(shape[1], shape[1], dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return best


def make_autocast(options, device, source, world):
    """
    Decides options.dtype if it is auto, the same on every rank. Returns the context manager for
    forward passes and the reason for the dtype. source: see parse_options; "checkpoint" if a
    checkpoint decided.
    """
    dtype, reason = gather(pick_dtype(options.dtype, device), world)[0]
    options.dtype = str(dtype).removeprefix("torch.")
    if source.get("dtype") == "checkpoint":
        reason = "as before"
    return autocast(device, dtype), reason


def autocast(device, dtype):
    """The context manager in which matrix products use dtype."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def cast_weights(model, dtype):
    """
    Casts the weights of matrix products and embeddings, in place, for generation under autocast,
    which would otherwise cast them again for every batch or even every token. Norms keep float32.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.to(dtype)
    return model
