"""
How fast, beside what the machine can do and, with --peer, beside Hugging Face's VisionEncoderDecoderModel of the same sizes:

    python bench.py all --peer            # a few minutes; needs no data set: pictures and captions are drawn
    python bench.py train --config config/base.py --device cuda
    python bench.py load                  # memory while a decoder of a billion parameters is read (2 GB of disk)

What is compared runs in turn, several times over, on the same threads: a machine that slows down slows all of it. Medians.

Useful FLOPs count the products of the matrices and convolutions that a step can't do without, 2 for each multiplication
with addition: of patches, of real tokens (no padding), in attention of the pairs that may look at each other. Backward counts
twice forward. The share is of the rate of a 1,536 × 1,536 (CUDA: 8,192 × 8,192) product in the same dtype, in the same rounds.
"""
# before what is slow to import: from here on Ctrl-C is answered in one line
from common import Parser, UserError, run

import ctypes
import gc
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train
from bpe import make_tokenizer, train_bpe
from model import Captioner, head_loss
from prepare_flickr import load_meta, write_dataset
from pretrained import assemble, part_options
from sample import VERSION, pick_device

HERE = Path(__file__).resolve().parent
# Of 1,000 captions of Flickr8k, how many have 0, 1, 2 … words (full stop counted).
WORDS = (0, 0, 0, 0, 5, 13, 32, 66, 85, 95, 107, 106, 102, 89, 76, 61, 44, 31, 23, 17, 12, 8, 4, 4, 2, 1, 1)
VOCAB, GPT2_VOCAB, CAPTION = 8192, 50257, 12  # the last: tokens of each caption that is generated
PEERS = {"peer, the same vocabulary": VOCAB, "peer, GPT-2's vocabulary": GPT2_VOCAB}  # the second as its users have it
# The peer's architecture and recipe, for comparing like with like: no convolutions, augmentation, second loss, Muon, teacher.
BARE = dict(stem="patch", local=False, optimizer="adamw", alpha=0.0, crop=1.0, flip=False, jitter=0.0, unigram=0.0)
ROUNDS = 5


# ---- tools

def draw_captions(n, seed=0):
    """n captions, str, of invented words: lengths as in Flickr8k, frequencies as in language (Zipf, Mandelbrot)."""
    letters, rng = np.array(list("etaoinshrdlucmfwygpbvk")), np.random.default_rng(0)
    lexicon = ["".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(12000)]
    rng = np.random.default_rng((seed, 1))
    p = 1 / (np.arange(len(lexicon)) + 3) ** 1.3  # so that 8,192 tokens make captions of 13 to 14, as Flickr8k's (13) are
    lengths = rng.choice(len(WORDS), n, p=np.array(WORDS) / sum(WORDS))
    words = rng.choice(len(lexicon), lengths.sum(), p=p / p.sum())
    return [" ".join(lexicon[w] for w in part) for part in np.split(words, lengths.cumsum()[:-1])]


def draw_picture(rng, width, height):
    """A picture that compresses as photos do: coarse colours with some noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(coarse) + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8))


def synchronise(device):
    """Waits for what the device still has to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def in_turn(functions, device, rounds=ROUNDS):
    """{name: function} -> {name: median seconds}: each round calls all of them; the first, a warm-up, is not counted."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            synchronise(device)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def anonymous_memory(pid):
    """MB of memory that a process and its children hold and that no file backs (Linux' RssAnon); 0 where it can't be read."""
    total = 0
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        total = int(found[1]) / 1024 if found else 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(anonymous_memory(child) for child in (task / "children").read_text().split())
    except OSError:
        pass
    return total


class PeakMemory(threading.Thread):
    """In `with`: watches a process and its children; .mb is the most that anonymous_memory said, 50 times a second."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.mb, self.over = pid, 0.0, threading.Event()

    def run(self):
        while not self.over.wait(0.02):
            self.mb = max(self.mb, anonymous_memory(self.pid))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


# ---- training

def step_flops(options, captions):
    """Useful FLOPs of one forward pass for captions from model.pack."""
    C, N, n = options.n_embd, options.n_patch, len(captions["tokens"])
    B = len(captions["segment"])
    lengths = (captions["position"] + 1).double()  # of what each token may see in its caption
    P, memory = options.n_prefix, options.n_query or N
    side, channels, stem = options.image_size, 3, 0
    if options.stem == "conv":
        halvings = options.patch_size.bit_length() - 1
        for i in range(1, halvings + 1):
            side, width = side // 2, max(C >> (halvings - i), 16)
            stem += 2 * side ** 2 * 9 * channels * width
            channels = width
        stem += 2 * N * channels * C
    else:
        stem = 2 * N * 3 * options.patch_size ** 2 * C
    encoder = B * (stem + options.n_layer_encoder * (24 * N * C * C + 4 * N * N * C + 18 * options.local * N * C))
    if options.n_query:
        encoder += B * (4 * N * C * C + options.n_query * (4 * C * C + 4 * N * C))
    crosses = sum((options.n_layer_decoder - 1 - i) % options.cross_every == 0
                  for i in range(options.n_layer_decoder)) if options.bridge != "prefix" else 0
    inputs = n + B * P
    decoder = options.n_layer_decoder * (24 * inputs * C * C + 4 * C * (float(lengths.sum()) + n * P + B * P * P))
    decoder += crosses * (4 * inputs * C * C + 4 * B * memory * C * C + 4 * inputs * memory * C) + 2 * B * P * C * C
    return encoder + decoder + 2 * n * C * VOCAB + bool(options.unigram) * 2 * B * C * (C + VOCAB)


def make_step(options, device, dtype):
    """-> (step, captions of its batch, timed_step): what train.py does in a step; timed_step returns {part: seconds}."""
    meta = load_meta(options.data_dir)
    torch.manual_seed(0)
    model = Captioner(options, VOCAB, meta["mean"], meta["std"]).to(device).train()
    teacher, optimizers = train.make_teacher(model), train.make_optimizers(model, options)
    if options.compile:
        for m in (model, teacher):
            m.encode, m.hidden = torch.compile(m.encode), torch.compile(m.hidden)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    pictures = np.random.default_rng(0).permutation(meta["splits"]["train"]["images"])[:options.batch_size]
    captions = train.get_batch(options.data_dir, "train", pictures, model.longest, VOCAB - 1)[1]
    ticks = {}

    def tick(part, began):
        synchronise(device)
        ticks[part] = ticks.get(part, 0) + time.perf_counter() - began
        return time.perf_counter()

    def step(parts=False):
        t = time.perf_counter()
        images, captions = train.get_batch(options.data_dir, "train", pictures, model.longest, VOCAB - 1)
        images, captions = images.to(device), {k: v.to(device) for k, v in captions.items()}
        if options.crop < 1 or options.flip or options.jitter:
            images = train.augment(images, [(0, 0, int(i)) for i in pictures], np.ones(len(pictures), bool), options)
        if parts:
            t = tick("data", t)
            timed_forward(images, captions)
            t = time.perf_counter()
        with autocast:
            loss, _ = model(images, captions, teacher=teacher, alpha=options.alpha, smoothing=options.smoothing)
        t = tick("forward", t) if parts else t
        (loss / len(captions["tokens"])).backward()
        t = tick("backward", t) if parts else t
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        t = tick("optimizer", t) if parts else t
        train.update_teacher(teacher, model, 0.999)
        if parts:
            tick("teacher's update", t)

    def timed_forward(images, captions):  # once more, apart, for what forward consists of
        with autocast:
            t = time.perf_counter()
            memory = model.encode(images)
            t = tick("encoder", t)
            hidden = model.hidden(memory, captions)
            t = tick("decoder", t)
            if options.unigram:
                model.unigram(memory.mean(1)) @ model.wte.weight.T
            head_loss(hidden, model.wte.weight, captions["targets"], None, None, None, 0.0, options.smoothing)
            t = tick("head and loss (with their gradients)", t)
            if options.alpha:
                with torch.no_grad():
                    teacher.hidden(teacher.encode(images), captions)
                tick("teacher's forward, but its head", t)

    def timed_step():
        ticks.clear()
        step(parts=True)
        return dict(ticks)

    return step, captions, timed_step


def make_peer(options, vocab_size, device):
    """-> (model, training step): the same sizes as a VisionEncoderDecoderModel, trained a caption a row as its users do."""
    try:
        from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    except ImportError as error:
        raise UserError(f"--peer needs transformers ({error}): pip install transformers") from None
    C = options.n_embd
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(hidden_size=C, num_hidden_layers=options.n_layer_encoder, num_attention_heads=options.n_head,
                  intermediate_size=4 * C, image_size=options.image_size, patch_size=options.patch_size),
        GPT2Config(vocab_size=vocab_size, n_positions=options.block_size, n_embd=C, n_layer=options.n_layer_decoder, n_head=options.n_head,
                   add_cross_attention=True, bos_token_id=0, eos_token_id=vocab_size - 1))
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = vocab_size - 1, 0, vocab_size - 1
    model = VisionEncoderDecoderModel(config=config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    pictures = torch.randn(10 * options.batch_size, 3, options.image_size, options.image_size, device=device)

    def step(captions):
        ends = (captions["position"] == 0).nonzero()[:, 0].tolist() + [len(captions["tokens"])]
        rows = [captions["targets"][a:b] for a, b in zip(ends[:-1], ends[1:])]
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).to(device)
        with autocast:
            loss = model(pixel_values=pictures[:len(rows)], labels=labels).loss  # a picture for each caption
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def bench_train(options, device, peer):
    """Rates of a training step as config says, with the peer's recipe, with the teacher; the time by part; memory."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    variants = {"as the config says": {}, "bare: as the peer is": BARE, "bare, with the teacher": {**BARE, "alpha": 0.4}}
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device, dtype=dtype)
    with PeakMemory(os.getpid()) as peak:
        steps = {}
        for name, changes in variants.items():
            changed = train.Options(**{**vars(options), **changes})
            steps[name], captions, timed = make_step(changed, device, dtype)
            if not changes:
                config_parts, config_step = timed, steps[name]
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                config_step(), config_step()
                memory = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else peak.mb
    n_captions = int((captions["position"] == 0).sum())
    functions = {"matmul": lambda: [a @ a for _ in range(8)], **steps}
    if peer:
        for name, vocab in PEERS.items():
            _, peer_step = make_peer(options, vocab, device)
            functions[name] = lambda f=peer_step: f(captions)
    seconds = in_turn(functions, device)
    rate = 8 * 2 * side ** 3 / seconds.pop("matmul")
    parts = [config_parts() for _ in range(ROUNDS + 1)][1:]
    results = {name: dict(images_per_s=options.batch_size / s, captions_per_s=n_captions / s) for name, s in seconds.items()}
    for name, changes in variants.items():
        changed = train.Options(**{**vars(options), **changes})
        results[name]["share_of_matmul"] = step_flops(changed, captions) * (4 if changed.alpha else 3) / seconds[name] / rate
        if peer:
            for other in PEERS:
                results[name][f"times {other}"] = seconds[other] / seconds[name]
    return dict(rates=results, matmul_gflops=rate / 1e9, useful_gflop_forward=step_flops(options, captions) / 1e9, memory_mb=memory,
                parts={part: statistics.median(p[part] for p in parts) for part in parts[0]})


# ---- decoding

def bench_decode(options, device, peer, folder):
    """Pictures/s of generation, captions of CAPTION tokens; and from the start of sample.py to its caption."""
    torch.manual_seed(0)
    models = {name: Captioner(train.Options(**{**vars(options), **changes}), VOCAB).to(device).eval()
              for name, changes in (("", {}), ("bare: ", BARE))}
    lengths = dict(min_tokens=CAPTION, max_tokens=CAPTION)
    images = torch.randint(0, 256, (64, options.image_size, options.image_size, 3), dtype=torch.uint8, device=device)
    functions = {}
    for (name, model), batch in itertools.product(models.items(), (1, 64)):
        x = images[:batch]
        functions |= {f"{name}greedy, batch {batch}": lambda model=model, x=x: model.beam_search(x, 1, **lengths),
                      f"{name}beam 3, batch {batch}": lambda model=model, x=x: model.beam_search(x, 3, **lengths),
                      f"{name}8 samples, batch {batch}": lambda model=model, x=x: model.sample(x, 8, **lengths)}
    if peer:
        pixels = torch.randn(64, 3, options.image_size, options.image_size, device=device)

        def generate(other, batch, beams):
            with torch.no_grad():
                other.generate(pixels[:batch], num_beams=beams, do_sample=False, min_new_tokens=CAPTION, max_new_tokens=CAPTION)

        for which, vocab in PEERS.items():
            other = make_peer(options, vocab, device)[0].eval()
            functions |= {f"{which}: {name}": lambda other=other, b=b, k=k: generate(other, b, k) for name, b, k in
                          (("greedy, batch 1", 1, 1), ("beam 3, batch 1", 1, 3), ("greedy, batch 64", 64, 1), ("beam 3, batch 64", 64, 3))}
    seconds = in_turn(functions, device)
    rates = {name: dict(images_per_s=int(name.split()[-1]) / s) for name, s in seconds.items()}
    for name, s in seconds.items():
        rates[name] |= {f"times {which}": peer_s / s for which in PEERS if (peer_s := seconds.get(f"{which}: {name.removeprefix('bare: ')}"))}

    # one photo from the command line
    draw_picture(np.random.default_rng(0), 500, 375).save(folder / "photo.jpg")
    ranks = "".join(f"{token} {n}\n" for n, token in enumerate(Path(options.data_dir, "tokenizer.tiktoken").read_text().split()[::2]))
    small = Captioner(options, load_meta(options.data_dir)["vocab_size"])
    torch.save(dict(model=small.state_dict(), options=vars(options), version=VERSION,
                    tokenizer=dict(ranks=ranks.encode(), pattern=load_meta(options.data_dir)["pattern"])), folder / "best.pt")
    call = lambda *args: subprocess.run([sys.executable, *map(str, args)], check=True, capture_output=True)
    start = in_turn({"sample.py": lambda: call(HERE / "sample.py", "--image", folder / "photo.jpg", "--out_dir", folder,
                                               "--device", device, "--max_tokens", CAPTION),
                     "import torch": lambda: call("-c", "import torch")}, device)
    start["the decoding in it"] = seconds["beam 3, batch 1"]
    start["ratio"] = start["sample.py"] / (start["import torch"] + start["the decoding in it"])
    return dict(rates=rates, start=start)


# ---- preparing

def bench_prepare(folder):
    """Pictures/s of prepare_flickr.py from 500 × 375 JPEGs beside the naive way, memory, and rates of the BPE."""
    rng, originals = np.random.default_rng(0), []
    for i in range(100):
        originals.append(folder / f"original{i}.jpg")
        draw_picture(rng, 500, 375).save(originals[-1], quality=90)

    def prepare(n):
        pictures, out = folder / f"pictures{n}", folder / f"out{n}"
        if not pictures.exists():
            pictures.mkdir()
            for i in range(n):
                os.link(originals[i % 100], pictures / f"{i}.jpg")
            (folder / f"{n}.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,{text}\n" for i, text in enumerate(texts[:n])))
        process = subprocess.Popen([sys.executable, HERE / "prepare_flickr.py", "--images", pictures, "--captions", folder / f"{n}.csv",
                                    "--out_dir", out, "--force", "--vocab_size", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with PeakMemory(process.pid) as peak:
            if process.wait():
                raise RuntimeError("prepare_flickr.py failed")
        return peak.mb

    def naive():
        for i in range(1000):
            np.asarray(Image.open(originals[i % 100]).convert("RGB").resize((160, 160)))

    texts, memory, cpu = draw_captions(10000), {}, torch.device("cpu")
    seconds = in_turn({"prepare": lambda: memory.update({1000: prepare(1000)}), "naive": naive}, cpu, rounds=3)
    began = time.perf_counter()
    memory[10000] = prepare(10000)
    large = time.perf_counter() - began
    texts = draw_captions(150000)
    began = time.perf_counter()
    ranks = train_bpe(texts, VOCAB)
    bpe = time.perf_counter() - began
    encoding, began = make_tokenizer(ranks), time.perf_counter()
    for text in texts:
        encoding.encode_ordinary(text)
    return {"pictures a second: 1,000, with start, captions": 1000 / seconds["prepare"], "pictures a second: 10,000, the same": 10000 / large,
            "pictures a second: naive, one process": 1000 / seconds["naive"], "cores": os.cpu_count(),
            "times naive per core, 10,000 pictures": 10000 / large / (1000 / seconds["naive"]) / os.cpu_count(),
            "memory_mb, 1,000 pictures": memory[1000], "memory_mb, 10,000 pictures": memory[10000],
            "BPE learned from 150,000 captions, seconds": bpe, "captions encoded a second": 150000 / (time.perf_counter() - began)}


# ---- loading

def bench_load(folder, n_layer=18, n_embd=2048, n_vocab=GPT2_VOCAB):
    """
    Linux only. Memory while a random decoder in GPT-2's shape, float16 on the disk, is read as the frozen bfloat16 base of a LoRA, for
    student and teacher: a billion parameters unless said otherwise.
    """
    shapes = {"wte.weight": (n_vocab, n_embd), "wpe.weight": (32, n_embd), "ln_f.weight": (n_embd,), "ln_f.bias": (n_embd,)}
    for i in range(n_layer):
        for name, inside, outside in ("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1):
            shapes |= {f"h.{i}.{name}.weight": (inside * n_embd, outside * n_embd), f"h.{i}.{name}.bias": (outside * n_embd,)}
        shapes |= {f"h.{i}.ln_{n}.{part}": (n_embd,) for n in (1, 2) for part in ("weight", "bias")}
    ends = np.cumsum([2 * math.prod(shape) for shape in shapes.values()]).tolist()
    header = json.dumps({name: dict(dtype="F16", shape=shape, data_offsets=[begin, end])
                         for (name, shape), begin, end in zip(shapes.items(), [0, *ends], ends)}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for shape in shapes.values():
            file.write(np.random.default_rng(0).standard_normal(math.prod(shape), np.float32).astype(np.float16).tobytes())
    (folder / "config.json").write_text(json.dumps(dict(model_type="gpt2", n_layer=n_layer, n_head=8, n_embd=n_embd, vocab_size=n_vocab)))
    fixed = part_options("", str(folder))[0]
    options = train.Options(**fixed, decoder=str(folder), lora_rank=2, block_size=32, bridge="prefix", n_query=1, image_size=32,
                            patch_size=8, n_layer_encoder=1, n_embd_encoder=32, n_head_encoder=2)
    with torch.device("meta"):  # which makes torch load more of itself
        Captioner(options, n_vocab)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what writing has freed would be used again, unseen
    with PeakMemory(os.getpid()) as before:
        time.sleep(0.1)
    with PeakMemory(os.getpid()) as peak:
        model = assemble(options, n_vocab, frozen_dtype=torch.bfloat16)
        teacher = train.make_teacher(model)
    if not all(t is p for t, p in zip(teacher.parameters(), model.parameters()) if not p.requires_grad):
        raise RuntimeError("student and teacher don't share their frozen weights")
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2 ** 20
    return {"parameters, millions": sum(p.numel() for p in model.parameters()) / 1e6, "weights_mb": weights,
            "peak_mb": peak.mb - before.mb, "peak / weights": (peak.mb - before.mb) / weights}


def main():
    """The command: see the top of this file."""
    parser = Parser(description="Speed beside the machine's limit and beside a peer.")
    parser.add_argument("what", nargs="?", default="all", choices=("train", "decode", "prepare", "all", "load"))
    parser.add_argument("--config", default=str(HERE / "config/nano.py"), help="sizes and recipe (default: config/nano.py)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--peer", action="store_true", help="also Hugging Face's VisionEncoderDecoderModel (needs transformers)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")
    results = dict(device=torch.cuda.get_device_name() if device.type == "cuda" else device.type, torch=torch.__version__,
                   threads=torch.get_num_threads(), cores=os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.what == "load":
            results["load"] = bench_load(folder)
            print(json.dumps(results)) if args.json else print_results(results)
            return
        options, _ = train.read_options([args.config, f"--data_dir={folder / 'data'}"])
        if options.encoder or options.decoder:
            raise UserError("the formula for FLOPs is for models of our own: give a config without pretrained parts")
        rng, n = np.random.default_rng(0), max(64, 2 * options.batch_size)
        images = [np.asarray(draw_picture(rng, options.image_size, options.image_size)) for _ in range(n)]
        texts = draw_captions(5 * n)
        many = draw_captions(30000, seed=1)  # what the vocabulary is learned from, as in a real data set
        write_dataset(folder / "words", {"train": (["x"], [many], np.zeros((1, 8, 8, 3), np.uint8))}, 8, vocab_size=VOCAB)
        write_dataset(folder / "data", {"train": ([f"{i}.jpg" for i in range(n)], [texts[5 * i:5 * i + 5] for i in range(n)], images)},
                      options.image_size, tokenizer=str(folder / "words"))
        if args.what in ("train", "all"):
            results["train"] = bench_train(options, device, args.peer)
        if args.what in ("decode", "all"):
            results["decode"] = bench_decode(options, device, args.peer, folder)
        if args.what in ("prepare", "all"):
            results["prepare"] = bench_prepare(folder)
    if args.json:
        print(json.dumps(results))
    else:
        print_results(results)


def print_results(results, indent=0):
    """A nested dict for people, a line a number."""
    for key, value in results.items():
        if isinstance(value, dict):
            print(f"{' ' * indent}{key}")
            print_results(value, indent + 2)
        else:
            print(f"{' ' * indent}{key:{56 - indent}} " + (f"{value:10,.2f}" if isinstance(value, float) else str(value)))


if __name__ == "__main__":
    run(main)
