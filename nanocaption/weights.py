"""The files of pretrained models: downloads from the Hugging Face hub, safetensors and pickles."""
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from nanocaption import download
from nanocaption.cli import UserError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def absolute_source(source):
    """
    The value of --encoder or --decoder with any local path made absolute, so that it is found from
    any folder. Names of models on the hub and of EfficientNets stay as they are.
    """
    name, colon, path = "", "", source
    if source.startswith("efficientnet"):
        name, colon, path = source.partition(":")
    path = os.path.expanduser(path)
    if colon or os.path.isdir(path):
        path = os.path.abspath(path)
    return name + colon + path


def fetch_model(source):
    """
    A model's folder, as a Path: source itself, or data/weights/NAME, to which the model of that
    name is downloaded from the hub. Raises UserError if there is none.
    """
    if os.path.isdir(source):
        return Path(source)
    if os.path.isabs(source):
        raise UserError(f"no folder {source}; check the path, or put the model back there")
    if not download.is_hub_name(source):
        raise UserError(f"{source} is neither a folder nor a name on the hub, such as gpt2 or "
                        "facebook/dinov2-small")
    folder = Path(download.WEIGHTS, source)
    folder.mkdir(parents=True, exist_ok=True)
    if weight_files(folder):
        return folder
    if not download.fetch_hub_file(source, folder / "config.json"):
        raise UserError(f"no model {source} on the hub (no config.json); check the name")
    for name in ("processor_config.json", "preprocessor_config.json"):  # encoders only
        download.fetch_hub_file(source, folder / name)
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (not download.fetch_hub_file(source, folder / name)
                and download.fetch_hub_file(source, index)):
            for shard in read_index(index):
                download.fetch_hub_file(source, folder / shard)
        if weight_files(folder):
            return folder
    raise no_weights(source)


def weight_files(folder):
    """The files with a model's tensors, list[Path]; an empty list unless all of them exist."""
    for name in WEIGHT_FILES:
        files = [folder / name]
        index = folder / f"{name}.index.json"
        if not files[0].exists() and index.exists():
            files = [folder / shard for shard in read_index(index)]
        if all(file.exists() for file in files):
            return files
    return []


def no_weights(source):
    """The UserError for a model without all of its tensors."""
    return UserError(f"{source} has no complete model.safetensors or pytorch_model.bin")


def read_json(path):
    """The dict in a JSON file. Raises UserError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        return data
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error})") from None


def read_index(path):
    """model.safetensors.index.json -> the names of the files with the tensors, list[str]"""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"{path} has no weight_map")
    for file in files.values():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*", file):
            raise UserError(f"{path}: {file!r} is not a file name")
    return sorted(set(files.values()))


def read_weights(folder):
    """All tensors of a model's folder: {name: tensor}."""
    tensors = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            tensors |= read_safetensors(file)
        else:
            tensors |= read_pickle(file)
    if not tensors:
        raise no_weights(folder)
    return tensors


def hash_tensors(tensors):
    """A hash of {name: tensor}: of names, dtypes, shapes and values."""
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        result.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()


def read_pickle(path):
    """pytorch_model.bin -> {name: tensor}. Code in the file is not run."""
    try:
        download.check_no_pointer(path)
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # files from before torch 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
            raise ValueError("not a dict of tensors")
        return tensors
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {path} as weights ({type(error).__name__}: {reason})"
                        ) from None


def read_safetensors(path):
    """
    A .safetensors file -> {name: tensor}, memory-mapped: nothing is read before it is used. Raises
    UserError if the file is damaged.

    The file consists of the header's length (8 bytes), the header (JSON with the dtype, shape and
    data_offsets of each tensor) and the data.
    """
    download.check_no_pointer(path)
    try:
        header, start = read_header(path)
        return map_tensors(path, header, start)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_header(path):
    """A .safetensors file -> its header, a dict, and the offset of its data in bytes."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, 100_000_000):
            raise ValueError(f"header of {length:,} bytes in a file of {size:,} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("header is not a JSON object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        check_entry(name, entry)
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name} has the unsupported dtype {entry['dtype']!r}; use the "
                            "model in float32, float16 or bfloat16")
    return header, 8 + length


def check_entry(name, entry):
    """Raises ValueError unless an entry of the header has the right keys and types."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        raise ValueError(f"{name} has dtype {dtype!r}")
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not is_size_list(shape) or not is_size_list(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has shape {shape} and data_offsets {offsets}")


def is_size_list(value):
    """Whether value is a list of non-negative integers."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def map_tensors(path, header, start):
    """The tensors of a .safetensors file; header and start are what read_header returned."""
    data = np.zeros(0, np.uint8)
    if os.path.getsize(path) > start:
        # "c" is copy-on-write: the file never changes
        data = np.memmap(path, np.uint8, "c", offset=start)
    tensors = {}
    position = 0
    for name, entry in sorted(header.items(), key=data_offsets):
        begin, end = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        shape = entry["shape"]
        if begin != position:
            raise ValueError(f"{name} begins at {begin:,}, but the data before it ends at "
                             f"{position:,}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {end - begin:,} bytes for shape {shape} of "
                             f"{entry['dtype']}")
        if end > len(data):
            raise ValueError(f"{name} ends at {end:,}, but the data ends at {len(data):,}")
        tensor = torch.from_numpy(data[begin:end])
        if begin % dtype.itemsize:
            # aligned in memory
            tensor = tensor.clone()
        tensors[name] = tensor.view(dtype).view(shape)
        position = end
    if position != len(data):
        raise ValueError(f"{len(data) - position:,} bytes after the last tensor")
    return tensors


def data_offsets(item):
    """A sort key for the header's items."""
    return item[1]["data_offsets"]


class SkipInit(TorchFunctionMode):
    """
    A context manager that skips nn.init: for weights that are about to be loaded. On the meta
    device, initialization would import torch._dynamo, which takes a second.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))
