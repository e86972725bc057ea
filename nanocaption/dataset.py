"""
A prepared folder, data/NAME: images and captions in binary files that training memory-maps.

SPLIT_images.bin     uint8 (N, S, S, 3)   images, resized to S x S
SPLIT_tokens.bin     uint16 (T,)          the tokens of all captions, each caption followed by EOT
SPLIT_captions.bin   int64 (C + 1,)       where each caption begins in the tokens
SPLIT_index.bin      int64 (N + 1,)       where each image's captions begin among the captions
SPLIT.jsonl          text                 {"image": file name, "captions": [...]} for each image
tokenizer.tiktoken   text                 the tokens, in tiktoken's format
token_ids.bin        int64                for a pretrained decoder: each token's id there
meta.json            text                 sizes, counts, mean and std; written last
skipped.txt          text                 the images and captions that could not be used, if any
"""
import array
import contextlib
import functools
import hashlib
import json
import os
import re

import numpy as np

from nanocaption.cli import UserError, atomic_write
from nanocaption.tokenizer import (
    GPT2_PATTERN, keep_used, make_tokenizer, ranks_to_text, read_tokenizer, text_to_ranks, train_bpe
)

SPLITS = ("train", "val", "test")
VERSION = 1


# ------------------------------------------------------------------------------------------------
# reading


class Dataset:
    """
    A prepared folder. Raises UserError if data_dir is not one.

    meta: meta.json's dict. splits: {name: {"images": count, "captions": count, "tokens": count,
    "longest": tokens of the longest caption}}. vocab_size includes EOT. mean, std: 3 floats each,
    of training pixels in 0..1. fingerprint: a hash of names, captions, tokenizer, mean and std.
    """

    def __init__(self, data_dir):
        self.data_dir = data_dir
        self.meta = read_meta(data_dir)
        self.image_size = self.meta["image_size"]
        self.vocab_size = self.meta["vocab_size"]
        self.mean = self.meta["mean"]
        self.std = self.meta["std"]
        self.fingerprint = self.meta["fingerprint"]
        self.splits = self.meta["splits"]

    @functools.cached_property
    def tokenizer_text(self):
        """The bytes of tokenizer.tiktoken."""
        try:
            with open(f"{self.data_dir}/tokenizer.tiktoken", "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            raise damaged(f"{self.data_dir}/tokenizer.tiktoken", error) from None

    @property
    def ranks(self):
        """The tokens by rank, list[bytes]."""
        try:
            return text_to_ranks(self.tokenizer_text)
        except UserError as error:
            raise damaged(f"{self.data_dir}/tokenizer.tiktoken", error) from None

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer, a tiktoken.Encoding."""
        return make_tokenizer(self.ranks, self.meta["pattern"])

    @property
    def token_ids(self):
        """The tokens' ids in a pretrained decoder, list[int]; None if there is none."""
        path = f"{self.data_dir}/token_ids.bin"
        if not os.path.exists(path):
            return None
        return np.fromfile(path, np.int64).tolist()

    def split(self, name):
        """The Split with this name. Raises UserError if there is none."""
        return Split(self, name)


class Split:
    """
    A split of a Dataset: N = len(split) images with C captions.

    caption_start: int64 (C + 1,), where each caption begins in the tokens. image_start: int64
    (N + 1,), where each image's captions begin among the captions.
    """

    def __init__(self, dataset, name):
        if name not in dataset.splits:
            names = ", ".join(dataset.splits)
            raise UserError(f"{dataset.data_dir} has no split {name!r}; it has {names}")
        self.name = name
        self.path = f"{dataset.data_dir}/{name}"
        self.image_size = dataset.image_size
        self.count = dataset.splits[name]
        self.caption_start = np.array(self.memmap("captions", np.int64, self.count["captions"] + 1))
        self.image_start = np.array(self.memmap("index", np.int64, self.count["images"] + 1))
        # fail now if a file is missing or too short
        self.map_images()
        self.map_tokens()

    def __len__(self):
        return self.count["images"]

    @property
    def names(self):
        """The images' file names, list[str]."""
        return self.texts[0]

    @property
    def captions(self):
        """Each image's captions, list[list[str]]."""
        return self.texts[1]

    def read_images(self, index):
        """The images with these indices, uint8 (n, S, S, 3). index: a sequence of ints."""
        # a new map for each call, because pages stay in memory until their map is closed
        return self.map_images()[np.asarray(index, np.int64)]

    def read_tokens(self, index):
        """For each image with these indices, its captions, each a list of token ids without EOT."""
        tokens = self.map_tokens()
        result = []
        for i in index:
            captions = []
            for c in range(self.image_start[i], self.image_start[i + 1]):
                start = self.caption_start[c]
                eot = self.caption_start[c + 1] - 1
                captions.append(tokens[start:eot].tolist())
            result.append(captions)
        return result

    @functools.cached_property
    def texts(self):
        """(names, captions) from SPLIT.jsonl."""
        names = []
        captions = []
        try:
            with open(f"{self.path}.jsonl", encoding="utf-8") as file:
                for line in file:
                    record = json.loads(line)
                    names.append(record["image"])
                    captions.append(record["captions"])
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise damaged(f"{self.path}.jsonl", error) from None
        return names, captions

    def map_images(self):
        """A memory map, uint8 (N, S, S, 3)."""
        size = self.image_size
        return self.memmap("images", np.uint8, (len(self), size, size, 3))

    def map_tokens(self):
        """A memory map, uint16 (T,)."""
        return self.memmap("tokens", np.uint16, self.count["tokens"])

    def memmap(self, what, dtype, shape):
        """A memory map of SPLIT_what.bin."""
        path = f"{self.path}_{what}.bin"
        try:
            # asarray: slices of a plain array are much faster than those of an np.memmap
            return np.asarray(np.memmap(path, dtype, "r", shape=shape))
        except (FileNotFoundError, ValueError) as error:
            raise damaged(path, error) from None


def flickr_hash(name):
    """
    A hash, int64, of the Flickr id at the start of an image's name: 1000268201 in
    1000268201_693b08cb0e.jpg or 1000268201.jpg. None if there is none. It shows which photos two
    datasets share. Ids have at least five digits and no leading zero.
    """
    found = re.match(r"([1-9][0-9]{4,})[_.]", os.path.basename(name))
    if not found:
        return None
    digest = hashlib.sha256(found[1].encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def read_meta(data_dir):
    """meta.json's dict. Raises UserError if it is missing, damaged or of another version."""
    path = f"{data_dir}/meta.json"
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        version = meta["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{data_dir}: not a prepared folder (no meta.json); create it with prepare_flickr.py "
            "(data/shapes: data/shapes/prepare.py)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from None
    if version != VERSION:
        raise UserError(
            f"{path} has version {version}, expected {VERSION}; prepare it again with --force"
        )
    return meta


def damaged(path, error):
    """The UserError for a damaged file of a prepared folder."""
    return UserError(f"{path} is damaged ({error}); prepare it again with --force")


# ------------------------------------------------------------------------------------------------
# writing


def dataset_files(out_dir):
    """The paths of all files of a prepared folder, meta.json first."""
    names = ["meta.json"]
    for split in SPLITS:
        for end in ("_images.bin", "_tokens.bin", "_captions.bin", "_index.bin", ".jsonl"):
            names.append(split + end)
    names += ["tokenizer.tiktoken", "token_ids.bin", "skipped.txt"]
    return [f"{out_dir}/{name}" for name in names]


def clear_dataset(out_dir):
    """Creates the folder, or removes an earlier dataset from it."""
    os.makedirs(out_dir, exist_ok=True)
    # meta.json goes first, so that a half-cleared folder does not look complete
    for path in dataset_files(out_dir):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def write_dataset(out_dir, splits, image_size, tokenizer="bpe", vocab_size=8192, source=None):
    """
    Writes a prepared folder from images in memory. Returns meta.json's dict.

    splits: {"train": (names, captions, images), ...} with names list[str], captions
    list[list[str]] and images an iterable of uint8 (image_size, image_size, 3), in the same order.
    tokenizer: "bpe" or anything else that read_tokenizer accepts.
    """
    known = read_tokenizer(tokenizer)
    clear_dataset(out_dir)
    texts = {}
    for split, (names, captions, images) in splits.items():
        n = write_array_images(f"{out_dir}/{split}_images.bin", images, image_size)
        if not len(names) == len(captions) == n:
            raise ValueError(
                f"{split}: {len(names)} names, {len(captions)} lists of captions, {n} images"
            )
        texts[split] = (names, captions)
    return write_texts(out_dir, texts, image_size, tokenizer, known, vocab_size, source)


def write_array_images(path, images, image_size):
    """Writes an iterable of images to a file; returns their number."""
    shape = (image_size, image_size, 3)
    n = 0
    with open(path, "wb") as file:
        for image in images:
            if image.dtype != np.uint8 or image.shape != shape:
                raise ValueError(f"{path}: expected uint8 {shape}, got {image.dtype} {image.shape}")
            file.write(np.ascontiguousarray(image))
            n += 1
    return n


def write_texts(out_dir, splits, image_size, tokenizer, known, vocab_size, source,
                only_used=False):
    """
    Writes everything but SPLIT_images.bin, which must exist already. Returns meta.json's dict.

    splits: {split: (names, captions)}. known: what read_tokenizer(tokenizer) returned. only_used:
    keep only the tokens that the training captions use.
    """
    if "train" not in splits or not splits["train"][0]:
        raise UserError("the train split is empty: no images with captions")
    splits = {split: (names, clean(captions)) for split, (names, captions) in splits.items()}
    train_texts = []
    for captions in splits["train"][1]:
        train_texts += captions

    # tokenizer
    if known is None:
        known = (train_bpe(train_texts, vocab_size), GPT2_PATTERN, None)
    ranks, pattern, ids = known
    if only_used:
        kept = keep_used(ranks, pattern, train_texts)
        ranks = [ranks[n] for n in kept]
        if ids:
            ids = [ids[n] for n in kept] + ids[-1:]  # the last is EOT
    encoding = make_tokenizer(ranks, pattern)
    if encoding.n_vocab > 2**16:
        raise UserError(
            f"the tokenizer has {encoding.n_vocab:,} tokens; at most {2**16:,} fit in uint16"
        )
    write_file(f"{out_dir}/tokenizer.tiktoken", ranks_to_text(ranks))
    if ids:
        write_file(f"{out_dir}/token_ids.bin", np.array(ids, np.int64))

    # captions
    fingerprint = hashlib.sha256(b"%d\n" % image_size + ranks_to_text(ranks))
    counts = {}
    for split, (names, captions) in splits.items():
        jsonl = to_jsonl(names, captions)
        fingerprint.update(split.encode() + jsonl)
        write_file(f"{out_dir}/{split}.jsonl", jsonl)
        counts[split] = write_tokens(f"{out_dir}/{split}", captions, encoding)

    mean, std = pixel_statistics(f"{out_dir}/train_images.bin", len(splits["train"][0]), image_size)
    # so that different images with the same captions get a different fingerprint
    fingerprint.update(json.dumps([mean, std]).encode())
    meta = {
        "version": VERSION,
        "image_size": image_size,
        "vocab_size": encoding.n_vocab,
        "pattern": pattern,
        "tokenizer": tokenizer,
        "splits": counts,
        "mean": mean,
        "std": std,
        "source": source or {},
        "fingerprint": fingerprint.hexdigest(),
    }
    write_file(f"{out_dir}/meta.json", json.dumps(meta, indent=1).encode())
    return meta


def clean(captions):
    """list[list[str]] with white space collapsed."""
    result = []
    for texts in captions:
        result.append([" ".join(text.split()) for text in texts])
    return result


def to_jsonl(names, captions):
    """The contents of SPLIT.jsonl, as bytes."""
    lines = []
    for name, texts in zip(names, captions):
        record = {"image": name, "captions": texts}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    # file names that are not UTF-8 contain surrogates, which JSON can only escape
    return "".join(lines).encode("utf-8", "backslashreplace")


def write_tokens(path, captions, encoding):
    """Writes PATH_tokens.bin, PATH_captions.bin and PATH_index.bin; returns the split's counts."""
    tokens = array.array("H")  # uint16
    caption_start = [0]
    image_start = [0]
    for texts in captions:
        for text in texts:
            tokens.extend(encoding.encode_ordinary(text))
            tokens.append(encoding.eot_token)
            caption_start.append(len(tokens))
        image_start.append(len(caption_start) - 1)
    write_file(f"{path}_tokens.bin", np.array(tokens, np.uint16))
    write_file(f"{path}_captions.bin", np.array(caption_start, np.int64))
    write_file(f"{path}_index.bin", np.array(image_start, np.int64))
    return {
        "images": len(captions),
        "captions": len(caption_start) - 1,
        "tokens": len(tokens),
        "longest": int(np.diff(caption_start).max(initial=0)),
    }


def pixel_statistics(path, n, image_size):
    """Mean and std of the channels (3 floats each, of pixels in 0..1), from up to 256 images."""
    images = np.memmap(path, np.uint8, "r", shape=(n, image_size**2, 3))
    most = min(256, max(1, 2**24 // image_size**2))
    step = -(-n // most)  # rounded up
    pixels = np.array(images[::step])
    # sums of integers: exact, and faster than floats
    n = pixels.size // 3
    mean = pixels.sum((0, 1), dtype=np.int64) / n
    mean_square = (pixels.astype(np.uint16) ** 2).sum((0, 1), dtype=np.int64) / n
    std = np.sqrt(mean_square - mean**2)
    return (mean / 255).tolist(), (std / 255).tolist()


def write_file(path, data):
    """Writes bytes, or an array, atomically."""
    with atomic_write(path) as file:
        file.write(data)
