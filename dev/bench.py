"""
Measures the speed of training, captioning and preparing. Compares it with the machine's matrix
products and, if transformers is installed, with Hugging Face's VisionEncoderDecoderModel of the
same sizes (the "peer"). Prints tables for speed.md.

    python dev/bench.py                           # everything but load, on generated data
    python dev/bench.py train decode --rounds=1   # a part of it, in a few minutes
    python dev/bench.py train --config config/base.py --device cuda
    python dev/bench.py load                      # needs 2 GB of disk

    train     training steps in both precisions, ours and the peer's, and whole runs of train.py
    decode    captions for 1 and 64 images, ours and the peer's
    start     sample.py, from start to caption
    prepare   prepare_flickr.py, and learning the tokenizer
    load      peak memory while a large decoder is read

The things compared take turns for several rounds on the same threads, so a machine that slows down
affects all of them, and results are medians over the rounds. Only whole runs of train.py, the
parts of a step, preparing 10,000 images, the tokenizer and load run by themselves.

Useful FLOPs are those of the matrix products and convolutions that a step needs, 2 per
multiply-add: no padding, and in attention only pairs of tokens that see each other. A backward pass
counts as two forward passes. "of matmul" is the rate of useful FLOPs divided by the rate of a large
matrix product in the same dtype, measured in the same rounds.
"""
import ctypes
import gc
import importlib.util
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train
from checkpoint import pick_device
from model import Captioner
from nanocaption.cli import Parser, UserError, check_ranges, run
from nanocaption.dataset import Dataset, write_dataset
from nanocaption.head_loss import head_loss
from nanocaption.optimizer import make_optimizer
from nanocaption.precision import DTYPES, autocast, bfloat16_speedup, cast_weights
from nanocaption.tokenizer import make_tokenizer, train_bpe
from pretrained import assemble, part_options

VOCAB_SIZE = 8192
GPT2_VOCAB_SIZE = 50257
PAIR_TOKENS = 24  # tokens, with EOT, of each caption in the batch of pairs
N_PRODUCTS = 8  # matrix products that are timed together
MATRIX_SIZE = {"cpu": 1536, "mps": 1536, "cuda": 8192}  # rows and columns of their matrices
METHODS = {"encoder only": 0, "greedy": 1, "beam 3": 3}  # of captioning: beam sizes
CAPTION_TOKENS = 12  # tokens, without EOT, of each caption that is generated
# how many of 1,000 Flickr8k captions have 0, 1, 2, ... words, periods included
LENGTHS = (0, 0, 0, 0, 5, 13, 32, 66, 85, 95, 107, 106, 102, 89, 76, 61, 44, 31, 23, 17, 12, 8, 4,
           4, 2, 1, 1)
# like the peer: plain transformer blocks, AdamW, no augmentation
BARE = dict(local_conv=False, optimizer="adamw", crop=1.0, flip=False, jitter=0.0, unigram=0.0,
            alpha=0.0)
VARIANTS = {"config": {}, "bare": BARE}
PEERS = {  # with our vocabulary, and with GPT-2's, as is usual
    f"peer of {VOCAB_SIZE:,} tokens": VOCAB_SIZE,
    f"peer of {GPT2_VOCAB_SIZE:,} tokens": GPT2_VOCAB_SIZE,
}
RUN_STEPS = 20  # steps between two lines of train.py's log


# -----------------------------------------------------------------------------
# measuring

def synchronize(device):
    """Waits until the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def median_seconds(functions, device, rounds):
    """
    {name: function} -> {name: median seconds}. Each round calls every function once; a warmup round
    is not counted.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def anonymous_memory(pid):
    """
    MB of anonymous memory (Linux's RssAnon: not backed by files) of a process and its children; 0
    if it cannot be read.
    """
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        found = re.search(r"RssAnon:\s+(\d+)", status)
        if found:
            total += int(found[1]) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="utf-8").split():
                total += anonymous_memory(child)
    except OSError:
        pass
    return total


class PeakMemory(threading.Thread):
    """A context manager. mb is the peak of anonymous_memory(pid), sampled 50 times a second."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid = pid
        self.mb = 0.0
        self.stop = threading.Event()

    def run(self):
        while not self.stop.wait(0.02):
            self.mb = max(self.mb, anonymous_memory(self.pid))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.join()


# -----------------------------------------------------------------------------
# data

def draw_captions(n, seed=0):
    """
    n captions of invented words, with Flickr8k's caption lengths and with natural word frequencies
    (Zipf-Mandelbrot), so that they take about as many tokens.
    """
    rng = np.random.default_rng(0)
    letters = list("etaoinshrdlucmfwygpbvk")
    lexicon = ["".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(12000)]
    frequency = 1 / (np.arange(len(lexicon)) + 3) ** 1.3
    rng = np.random.default_rng((seed, 1))
    lengths = rng.choice(len(LENGTHS), n, p=np.array(LENGTHS) / sum(LENGTHS))
    words = rng.choice(lexicon, lengths.sum(), p=frequency / frequency.sum())
    return [" ".join(part) for part in np.split(words, lengths.cumsum()[:-1])]


def draw_photo(rng, width, height):
    """A PIL image that compresses like a photo: large areas of color with some noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))


def write_batches(folder, options):
    """
    Two datasets whose training images are one batch each: options.batch_size images with five
    captions of real lengths, and 64 images with one caption of PAIR_TOKENS each. Returns
    {name: Dataset}.
    """
    size = options.image_size
    # learn the vocabulary from many captions, as for a real dataset
    texts = draw_captions(30000, seed=1)
    image = np.zeros((1, 8, 8, 3), np.uint8)
    write_dataset(folder / "words", {"train": (["x"], [texts], image)}, 8, vocab_size=VOCAB_SIZE)
    tokenizer = Dataset(folder / "words").tokenizer
    n = options.batch_size
    captions = draw_captions(5 * n)
    pairs = []
    for text in texts:
        if len(tokenizer.encode_ordinary(text)) == PAIR_TOKENS - 1:
            pairs.append([text])
    batches = {
        f"{5 * n} captions": [captions[i:i + 5] for i in range(0, 5 * n, 5)],
        f"64 pairs of {PAIR_TOKENS} tokens": pairs[:64],
    }
    rng = np.random.default_rng(0)
    data = {}
    for number, (name, captions) in enumerate(batches.items()):
        names = [f"{i}.jpg" for i in range(len(captions))]
        images = [np.asarray(draw_photo(rng, size, size)) for _ in captions]
        path = folder / f"batch{number}"
        train_split = (names, captions, images)
        # train.py needs something to evaluate, which is never done here
        val_split = (names[:2], captions[:2], images[:2])
        write_dataset(path, {"train": train_split, "val": val_split}, size,
                      tokenizer=str(folder / "words"))
        data[name] = Dataset(path)
    return data


# -----------------------------------------------------------------------------
# useful FLOPs

def encoder_flops(options, model):
    """The useful FLOPs of encoding one image."""
    N = model.encoder.stem.n_patch
    C = options.encoder_width
    stem = 2 * N * 3 * options.patch_size ** 2 * C
    layer = 24 * N * C * C + 4 * N * N * C
    if options.local_conv:
        layer += 2 * 9 * N * C
    pool = 0
    if options.n_query:
        pool = 4 * N * C * C + options.n_query * (4 * C * C + 4 * N * C)
    return stem + options.n_layer_encoder * layer + pool


def decoder_flops(options, model, captions):
    """The useful FLOPs of decoding a batch of packed captions, with the output head."""
    B = len(captions["tokens"])
    C = options.n_embd
    E = options.encoder_width
    M = options.n_query or model.encoder.stem.n_patch
    P = model.n_prefix
    V = len(model.wte.weight)
    is_token = captions["targets"] >= 0
    n = int(is_token.sum())
    inputs = n + B * P
    # pairs of tokens that see each other
    seen = int((captions["position"] + 1)[is_token].sum()) + n * P + B * P * P
    layer = 24 * inputs * C * C + 4 * seen * C
    if options.bridge != "prefix":
        layer += 4 * inputs * C * C + 4 * B * M * E * C + 4 * inputs * M * C
    prefix = 2 * B * P * E * C
    head = 2 * n * C * V
    unigram = 2 * B * C * (E + V) if options.unigram else 0
    return options.n_layer_decoder * layer + prefix + head + unigram


def step_flops(options, model, captions):
    """The useful FLOPs of one training step: forward, backward and the teacher's forward."""
    n_image = len(captions["tokens"])
    forward = n_image * encoder_flops(options, model) + decoder_flops(options, model, captions)
    return forward * (4 if options.alpha else 3)


# -----------------------------------------------------------------------------
# training

class Ours:
    """Our training, as in train.py, on one batch: all training images of the dataset."""

    def __init__(self, options, data, device):
        torch.manual_seed(0)
        self.options = options
        self.autocast = autocast(device, DTYPES[options.dtype])
        self.model = Captioner(options, data.vocab_size, data.mean, data.std).to(device).train()
        self.model.recompute = options.recompute
        self.teacher = train.make_teacher(self.model)
        self.optimizer = make_optimizer(self.model, options)
        self.split = train.TrainSplit(data, self.model, options)
        self.index = np.arange(len(self.split))
        self.n_tokens = self.split.n_tokens.sum()
        train.compile_parts(options, self.model, self.teacher)

    def get_batch(self):
        """Images and packed captions, see train.TrainSplit."""
        return self.split.get_batch(self.index, np.zeros_like(self.index), self.model)

    def step(self):
        """One optimizer step."""
        for _ in self.step_parts():
            pass

    def step_parts(self):
        """One optimizer step; yields the name of each part when it is done."""
        options = self.options
        images, captions = self.get_batch()
        yield "data"
        with self.autocast:
            loss, _ = self.model(images, captions, self.teacher, options.alpha, options.smoothing)
        yield "forward"
        (loss / self.n_tokens).backward()
        yield "backward"
        max_norm = options.grad_clip or math.inf
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        yield "optimizer"
        train.update_teacher(self.teacher, self.model, 0.999)
        yield "teacher's update"

    def forward_parts(self):
        """One more forward pass, in smaller parts; yields like step_parts."""
        model = self.model
        images, captions = self.get_batch()
        is_token = captions["targets"] >= 0
        targets = captions["targets"][is_token]
        yield "data, once more"
        with self.autocast:
            image = model.encode(images)
            yield "forward: encoder"
            hidden = model.decode(image, captions)[is_token]
            yield "forward: decoder"
            head_loss(hidden, model.wte.weight, targets, smoothing=self.options.smoothing)
            yield "forward: head and loss, with their gradients"
            if self.options.unigram:
                row = is_token.nonzero()[:, 0]
                model.unigram_loss(image, row, targets)
                yield "forward: unigram loss"
            if self.options.alpha:
                with torch.no_grad():
                    self.teacher.decode(self.teacher.encode(images), captions)
                yield "forward: teacher, without its head"


def part_milliseconds(ours, device, rounds):
    """{part: median milliseconds} of a training step, and of one more forward pass."""
    times = {}
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for part in chain(ours.step_parts(), ours.forward_parts()):
            synchronize(device)
            now = time.perf_counter()
            times.setdefault(part, []).append(1000 * (now - start))
            start = now
    return {part: statistics.median(milliseconds[1:]) for part, milliseconds in times.items()}


class Peer:
    """
    A VisionEncoderDecoderModel of the same sizes, trained the usual way: one row per caption, each
    with its own copy of the image.
    """

    def __init__(self, options, vocab_size, device, dtype):
        self.model = make_peer_model(options, vocab_size).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.autocast = autocast(device, DTYPES[dtype])

    def step(self, pixels, labels):
        """One optimizer step: pixels (R, 3, S, S), labels (R, T), padded with -100."""
        with self.autocast:
            loss = self.model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def caption_batch(self, pixels, beam):
        """Generates captions of CAPTION_TOKENS; with beam 0, only runs the encoder."""
        with self.autocast:
            if beam == 0:
                self.model.encoder(pixels)
                return
            self.model.generate(pixels, num_beams=beam, do_sample=False,
                                min_new_tokens=CAPTION_TOKENS, max_new_tokens=CAPTION_TOKENS)


def make_peer_model(options, vocab_size):
    """A VisionEncoderDecoderModel: ViT, and GPT-2 with cross-attention in every layer."""
    from transformers import (GPT2Config, ViTConfig, VisionEncoderDecoderConfig,
                              VisionEncoderDecoderModel)
    encoder = ViTConfig(
        image_size=options.image_size, patch_size=options.patch_size,
        hidden_size=options.encoder_width, intermediate_size=4 * options.encoder_width,
        num_hidden_layers=options.n_layer_encoder, num_attention_heads=options.encoder_heads)
    decoder = GPT2Config(
        vocab_size=vocab_size, n_positions=options.block_size, n_embd=options.n_embd,
        n_layer=options.n_layer_decoder, n_head=options.n_head, add_cross_attention=True,
        bos_token_id=0, eos_token_id=vocab_size - 1)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = vocab_size - 1
    config.eos_token_id = vocab_size - 1
    config.pad_token_id = 0
    return VisionEncoderDecoderModel(config=config)


def peer_labels(captions):
    """Packed captions -> int64 (R, T): one row per caption, padded with -100."""
    rows = []
    for targets, segment in zip(captions["targets"], captions["segment"]):
        for number in range(1, int(segment.max()) + 1):
            rows.append(targets[segment == number])
    return pad_sequence(rows, batch_first=True, padding_value=-100)


@lru_cache
def measured_dtypes(device):
    """The names of the dtypes to measure: not bfloat16 where it is emulated and takes hours."""
    if device.type == "cpu" and bfloat16_speedup() < 0.5:
        print("this CPU emulates bfloat16, so only float32 is measured")
        return ["float32"]
    return list(DTYPES)


def bench_train(options, batches, device, with_peer, rounds):
    """
    {table: {row: {column: number}}}: on each batch, our variants and the peers in both dtypes;
    whole runs of train.py; where the time of a step goes.
    """
    tables = {}
    for name, data in batches.items():
        tables[f"Training steps, {name}"] = bench_batch(options, data, device, with_peer, rounds)
    data = next(iter(batches.values()))
    runs = {}
    parts = {}
    for dtype in measured_dtypes(device):
        changed = replace(options, dtype=dtype)
        runs[f"train.py, {dtype}"] = time_training(changed, data, device, rounds)
        times = part_milliseconds(Ours(changed, data, device), device, rounds)
        for part, milliseconds in times.items():
            parts.setdefault(part, {})[dtype] = milliseconds
    tables["Whole runs of train.py, alpha 0"] = runs
    compare(tables.values(), "captions/s")
    tables["Milliseconds of a training step, and of one more forward pass"] = parts
    return tables


def bench_batch(options, data, device, with_peer, rounds):
    """{row: {column: number}} for one batch: our variants and the peers, in both dtypes."""
    side = MATRIX_SIZE[device.type]
    functions = {}
    flops = {}
    for dtype in measured_dtypes(device):
        for variant, changes in VARIANTS.items():
            changed = replace(options, dtype=dtype, **changes)
            ours = Ours(changed, data, device)
            functions[variant, dtype] = ours.step
            _, captions = ours.get_batch()
            flops[variant, dtype] = step_flops(changed, ours.model, captions)
        if with_peer:
            labels = peer_labels(captions)
            pixels = random_pixels(len(labels), options.image_size, device)
            for name, vocab_size in PEERS.items():
                peer = Peer(options, vocab_size, device, dtype)
                functions[name, dtype] = partial(peer.step, pixels, labels)
        matrix = torch.randn(side, side, device=device, dtype=DTYPES[dtype])
        functions["matmul", dtype] = partial(multiply, matrix)
    seconds = median_seconds(functions, device, rounds)

    count = data.splits["train"]
    rows = {}
    for (name, dtype), s in seconds.items():
        rate = N_PRODUCTS * 2 * side**3 / seconds["matmul", dtype]
        if name == "matmul":
            row = {"GFLOP/s": rate / 1e9}
        else:
            row = {"images/s": count["images"] / s, "captions/s": count["captions"] / s}
        if name in VARIANTS:
            row["GFLOP/s"] = flops[name, dtype] / s / 1e9
            row["of matmul"] = flops[name, dtype] / s / rate
        rows[f"{name}, {dtype}"] = row
    return rows


def time_training(options, data, device, rounds):
    """
    A real run of train.py, with data loading and alpha 0, timed from the first line of its log
    until `rounds` lines later. Returns {column: number}.
    """
    changed = replace(
        options, data_dir=str(data.data_dir), out_dir=f"{data.data_dir}/{options.dtype}", alpha=0.0,
        device=device.type, max_iters=0, max_minutes=1e6, log_interval=RUN_STEPS,
        eval_interval=10**9)
    config = Path(f"{changed.out_dir}.py")
    lines = [f"{key} = {value!r}\n" for key, value in asdict(changed).items()]
    config.write_text("".join(lines), encoding="utf-8")
    times = []
    command = [sys.executable, ROOT / "train.py", config]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        with PeakMemory(process.pid) as peak:
            for line in process.stdout:
                if line.startswith("step "):
                    times.append(time.perf_counter())
                if len(times) > rounds:
                    break
        process.kill()
    if len(times) <= rounds:
        raise RuntimeError("train.py failed")
    step = (times[-1] - times[0]) / rounds / RUN_STEPS
    count = data.splits["train"]
    return {"images/s": count["images"] / step, "captions/s": count["captions"] / step,
            "memory, MB": peak.mb}


def multiply(matrix):
    """N_PRODUCTS matrix products."""
    for _ in range(N_PRODUCTS):
        matrix @ matrix


def random_pixels(n, size, device):
    """Normalized images for the peer, float (n, 3, size, size)."""
    return torch.randn(n, 3, size, size, device=device)


def compare(tables, unit):
    """
    Adds to each of our rows with this unit how many times as fast as each peer it is. A peer may be
    in several tables; its fastest result counts. tables: each {row: {column: number}}.
    """
    best = {}
    for rows in tables:
        for name, row in rows.items():
            if name.startswith("peer"):
                best[name] = max(row[unit], best.get(name, 0.0))
    for rows in tables:
        for name, row in rows.items():
            if unit in row and not name.startswith("peer"):
                for peer, rate in best.items():
                    row[f"vs. {peer}"] = row[unit] / rate


# -----------------------------------------------------------------------------
# captioning

def bench_decode(options, device, with_peer, rounds):
    """{table: {row: {column: number}}}: images per second, with captions of CAPTION_TOKENS."""
    models = {}
    peers = {}
    for name in measured_dtypes(device):
        torch.manual_seed(0)
        model = Captioner(options, VOCAB_SIZE).to(device).eval()
        models[name] = cast_weights(model, DTYPES[name])
        if with_peer:
            for peer, vocab_size in PEERS.items():
                peers[peer, name] = Peer(options, vocab_size, device, name)
                peers[peer, name].model.eval()
    tables = {}
    for n in (1, 64):
        images = random_images(n, options.image_size, device)
        pixels = random_pixels(n, options.image_size, device)
        table = {}
        for method, beam in METHODS.items():
            functions = {}
            for dtype, model in models.items():
                functions["ours", dtype] = partial(caption_batch, model, images, beam, dtype)
            for key, peer in peers.items():
                functions[key] = partial(peer.caption_batch, pixels, beam)
            seconds = median_seconds(functions, device, rounds)
            rows = {f"{name}, {dtype}": {"milliseconds": 1000 * s, "images/s": n / s}
                    for (name, dtype), s in seconds.items()}
            compare([rows], "images/s")
            table.update({f"{method}, {name}": row for name, row in rows.items()})
        tables[f"Captioning, {n} at a time"] = table
    return tables


def random_images(n, size, device):
    """uint8 (n, size, size, 3)"""
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, device=device)


@torch.no_grad()
def caption_batch(model, images, beam, dtype):
    """Generates captions of CAPTION_TOKENS; with beam 0, only runs the encoder."""
    with autocast(images.device, DTYPES[dtype]):
        if beam == 0:
            model.encode(images)
            return
        model.beam_search(images, beam, min_tokens=CAPTION_TOKENS, max_tokens=CAPTION_TOKENS)


def bench_start(device, folder, rounds):
    """Seconds that sample.py takes from start to caption, compared with importing torch."""
    draw_photo(np.random.default_rng(0), 500, 375).save(folder / "photo.jpg")
    sample = (ROOT / "sample.py", "--image", folder / "photo.jpg", "--device", device)
    seconds = median_seconds({
        "sample.py": partial(run_python, *sample),
        "import torch": partial(run_python, "-c", "import torch"),
    }, device, rounds)
    rows = {name: {"seconds": s} for name, s in seconds.items()}
    rows["sample.py"]["vs. import torch"] = seconds["sample.py"] / seconds["import torch"]
    return {"From start to caption, bundled checkpoint": rows}


def run_python(*arguments):
    """Runs Python in its own process."""
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


# -----------------------------------------------------------------------------
# preparing

def bench_prepare(folder, rounds, n_small=1000, n_large=10000, n_captions=150000):
    """
    Images per second of prepare_flickr.py on 500 x 375 JPEGs, compared with a plain PIL loop; its
    memory; and the speed of the tokenizer.
    """
    photos = draw_photos(folder, 100)
    link_photos(folder, photos, n_small)
    link_photos(folder, photos, n_large)
    memory = {}
    seconds = median_seconds({
        "prepare": partial(run_prepare, folder, n_small, memory),
        "naive": partial(load_naively, photos, n_small),
    }, torch.device("cpu"), rounds)
    start = time.perf_counter()
    run_prepare(folder, n_large, memory)
    rate = n_large / (time.perf_counter() - start)
    naive = n_small / seconds["naive"]
    rows = {
        f"images/s, {n_small:,} with start-up and captions": n_small / seconds["prepare"],
        f"images/s, {n_large:,} with start-up and captions": rate,
        "images/s, a plain PIL loop, in one process": naive,
        f"{n_large:,} images, vs. the plain loop, per core": rate / naive / os.cpu_count(),
        f"memory, MB, {n_small:,} images": memory[n_small],
        f"memory, MB, {n_large:,} images": memory[n_large],
        **bench_tokenizer(n_captions),
    }
    return {"Preparing": {name: {"value": number} for name, number in rows.items()}}


def draw_photos(folder, n):
    """Writes n photos as JPEG; returns their paths."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(n):
        paths.append(folder / f"original{i}.jpg")
        draw_photo(rng, 500, 375).save(paths[-1], quality=90)
    return paths


def link_photos(folder, photos, n):
    """Makes a folder of n hard links to photos, and a caption file."""
    images = folder / f"images{n}"
    images.mkdir()
    lines = ["image,caption\n"]
    for i, caption in enumerate(draw_captions(n)):
        os.link(photos[i % len(photos)], images / f"{i}.jpg")
        lines.append(f"{i}.jpg,{caption}\n")
    (folder / f"captions{n}.csv").write_text("".join(lines), encoding="utf-8")


def run_prepare(folder, n, memory):
    """Runs prepare_flickr.py on the n photos; sets memory[n] to its peak in MB."""
    command = [sys.executable, ROOT / "prepare_flickr.py", "--images", folder / f"images{n}",
               "--captions", folder / f"captions{n}.csv", "--out_dir", folder / f"prepared{n}",
               "--force", "--vocab_size", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with PeakMemory(process.pid) as peak:
        if process.wait():
            raise RuntimeError("prepare_flickr.py failed")
    memory[n] = peak.mb


def load_naively(photos, n):
    """The plain PIL loop that prepare_flickr.py is compared with."""
    for i in range(n):
        image = Image.open(photos[i % len(photos)])
        np.asarray(image.convert("RGB").resize((160, 160)))


def bench_tokenizer(n):
    """Speed of learning a BPE vocabulary and of encoding, on n captions."""
    texts = draw_captions(n)
    start = time.perf_counter()
    ranks = train_bpe(texts, VOCAB_SIZE)
    learned = time.perf_counter()
    tokenizer = make_tokenizer(ranks)
    for text in texts:
        tokenizer.encode_ordinary(text)
    return {
        f"seconds to learn BPE from {n:,} captions": learned - start,
        "captions encoded per second": n / (time.perf_counter() - learned),
    }


# -----------------------------------------------------------------------------
# memory while reading a decoder

def bench_load(folder, n_layer=18, n_embd=2048, vocab_size=GPT2_VOCAB_SIZE):
    """
    Peak memory while a random GPT-2 (float16 on disk, a billion parameters by default) is read as
    the frozen bfloat16 weights that student and teacher share in LoRA training. Linux only.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(n_positions=32, n_layer=n_layer, n_head=8, n_embd=n_embd,
                        vocab_size=vocab_size)
    GPT2LMHeadModel(config).half().save_pretrained(folder)
    sizes, _, _ = part_options("", str(folder))
    options = train.Options(
        **sizes, decoder=str(folder), lora_rank=2, max_iters=1, block_size=32, bridge="prefix",
        n_query=1, image_size=32, patch_size=8, n_layer_encoder=1, n_embd_encoder=32,
        n_head_encoder=2)
    # makes torch load what it needs for the meta device
    with torch.device("meta"):
        Captioner(options, vocab_size)
    # otherwise reading would reuse memory that writing has freed, and the peak would miss it
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = anonymous_memory(os.getpid())
    with PeakMemory(os.getpid()) as peak:
        model = assemble(options, vocab_size, frozen_dtype=torch.bfloat16)
        teacher = train.make_teacher(model)
    for ours, theirs in zip(model.parameters(), teacher.parameters()):
        if not ours.requires_grad and ours is not theirs:
            raise RuntimeError("student and teacher do not share their frozen weights")
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return dict(
        million_parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        weights_mb=weights,
        peak_mb=peak.mb - before,
        peak_per_weights=(peak.mb - before) / weights,
    )


# -----------------------------------------------------------------------------
# the command

def print_tables(tables):
    """Prints {title: {row: {column: number}}} as Markdown."""
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        for name, row in rows.items():
            cells = ["" if column not in row else f"{row[column]:,.2f}" for column in columns]
            lines.append([name, *cells])
        print(f"\n### {title}\n")
        for cells in lines:
            print(f"| {' | '.join(cells)} |", flush=True)


def main():
    """See the top of this file."""
    sections = ("train", "decode", "start", "prepare", "load")
    parser = Parser(description=__doc__)
    parser.add_argument("what", nargs="*", default=sections[:-1], metavar="|".join(sections),
                        help="what to measure (default: everything but load)")
    parser.add_argument("--config", default=str(ROOT / "config/nano.py"),
                        help="config file with the sizes to measure (default: config/nano.py)")
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda or mps (default: the best available)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: 5)")
    args = parser.parse_args()
    check_ranges(args, rounds=(1, 1000))
    for name in args.what:
        if name not in sections:
            parser.error(f"expected {', '.join(sections)}, found {name!r}")
    device = pick_device(args.device)
    options, _ = train.read_options([args.config])
    if options.encoder or options.decoder:
        raise UserError(f"{args.config} has pretrained parts; choose a config without them")
    torch.set_float32_matmul_precision("high")
    with_peer = importlib.util.find_spec("transformers") is not None

    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{name or device.type} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} "
          f"cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{args.config}, medians of {args.rounds}")
    if not with_peer:
        print("transformers is not installed, so there is no peer; pip install transformers")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if "train" in args.what:
            batches = write_batches(folder, options)
            print_tables(bench_train(options, batches, device, with_peer, args.rounds))
        if "decode" in args.what:
            print_tables(bench_decode(options, device, with_peer, args.rounds))
        if "start" in args.what:
            print_tables(bench_start(device, folder, args.rounds))
        if "prepare" in args.what:
            print_tables(bench_prepare(folder, args.rounds))
        if "load" in args.what:
            rows = {name: {"value": number} for name, number in bench_load(folder).items()}
            print_tables({"Reading a large decoder": rows})


if __name__ == "__main__":
    run(main)
