"""
A frozen encoder's features of each view of each image, stored in data_dir/features-KEY/.

SPLIT.bin       float16 (N, V, n, C)    V views of each image, n vectors each
SPLIT_crc.bin   uint32 (chunks,)        CRC-32 of each chunk of images; 0 until it is computed

KEY is a hash of everything that the features depend on, so stale features are never used. Damaged
ones are computed again.
"""
import hashlib
import json
import os
import shutil
import sys
import time
import zlib

import numpy as np

from nanocaption.cli import UserError, show_progress
from nanocaption.distributed import gather

CHUNK = 32  # images


def feature_key(facts):
    """16 hex digits that depend on everything in facts, a dict."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_hash(module):
    """A hash of the frozen weights of a torch module."""
    result = hashlib.sha256()
    for name, p in module.named_parameters():
        if not p.requires_grad:
            result.update(name.encode())
            result.update(p.detach().cpu().float().numpy().tobytes())
    return result.hexdigest()


class Features:
    """The stored features of one split, (N, V, n, C); some may not be computed yet."""

    def __init__(self, folder, split, shape):
        self.folder = folder
        self.path = f"{folder}/{split}.bin"
        self.crc_path = f"{folder}/{split}_crc.bin"
        self.shape = shape
        self.n_chunk = -(-shape[0] // CHUNK)

    @property
    def n_bytes(self):
        return 2 * int(np.prod(self.shape, dtype=np.int64))

    def chunk(self, c):
        """The indices of the images in a chunk, int (at most CHUNK,)."""
        return np.arange(c * CHUNK, min((c + 1) * CHUNK, self.shape[0]))

    def map(self, mode):
        """A memory map, float16 (N, V, n, C)."""
        return np.memmap(self.path, np.float16, mode, shape=self.shape)

    def read(self, index, views):
        """The features of these images and views, int (B,) each -> float16 (B, n, C)."""
        # a new map for each call, because pages stay in memory until their map is closed
        return self.map("r")[np.asarray(index), np.asarray(views)]

    def missing(self):
        """The chunks that are not computed yet, or damaged."""
        expected = (self.n_bytes, 4 * self.n_chunk)
        found = (file_size(self.path), file_size(self.crc_path))
        if found != expected:
            return list(range(self.n_chunk))
        crcs = np.fromfile(self.crc_path, np.uint32)
        features = self.map("r")
        missing = []
        for c in range(self.n_chunk):
            if crcs[c] == 0 or crcs[c] != checksum(features[self.chunk(c)]):
                missing.append(c)
        return missing

    def allocate(self):
        """Creates the files, full of zeros, unless they exist with the right size."""
        os.makedirs(self.folder, exist_ok=True)
        for path, size in ((self.path, self.n_bytes), (self.crc_path, 4 * self.n_chunk)):
            if not os.path.exists(path) or os.path.getsize(path) != size:
                with open(path, "wb") as file:
                    file.truncate(size)

    def write(self, c, values):
        """Writes a chunk, then its checksum, so that a partly written chunk counts as missing."""
        values = np.ascontiguousarray(values, np.float16)
        with open(self.path, "r+b") as file:
            file.seek(c * CHUNK * values[0].nbytes)
            file.write(values)
            file.flush()
            os.fsync(file.fileno())
        with open(self.crc_path, "r+b") as file:
            file.seek(4 * c)
            file.write(np.uint32(checksum(values)).tobytes())


def file_size(path):
    """The size of a file in bytes; -1 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else -1


def checksum(values):
    """CRC-32, never 0."""
    return zlib.crc32(np.ascontiguousarray(values)) or 1


def compute_features(features, make_views, what, rank=0, world=1):
    """
    Computes the missing chunks, split among the ranks; if interrupted, the next call continues.
    make_views(index) returns float16 (len(index), V, n, C). If there is not enough disk space, rank
    0 raises UserError and the others exit.
    """
    missing = features.missing()
    if not any(gather(len(missing), world)):
        return
    needed = features.n_bytes * len(missing) / features.n_chunk
    parent = os.path.dirname(os.path.abspath(features.folder))
    free = shutil.disk_usage(parent).free
    if gather(needed > free, world)[0]:
        if rank > 0:
            sys.exit(2)
        raise UserError(f"the features of {what} need {needed / 1e9:.1f} GB in {features.folder}, "
                        f"but only {free / 1e9:.1f} GB is free; free up some space or use "
                        "--cache_features=False")
    if rank == 0:
        features.allocate()
    gather(None, world)  # all ranks wait for the files
    start = time.monotonic()
    for done, c in enumerate(missing[rank::world], 1):
        features.write(c, make_views(features.chunk(c)))
        if rank == 0:
            total = sum(len(features.chunk(i)) for i in missing)
            if done == 1:
                minutes = (time.monotonic() - start) * len(missing) / world / 60
                print(f"computing features of {what}: {features.n_bytes / 1e9:.2f} GB in "
                      f"{features.folder}, about {minutes:.1f} minutes", flush=True)
            show_progress("features of images", min(done * world * CHUNK, total), total, start)
    gather(None, world)
    # if each machine has its own data_dir, the other machines' chunks are still missing here
    for c in features.missing():
        features.write(c, make_views(features.chunk(c)))
