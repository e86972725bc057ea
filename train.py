"""
Trains a captioner. Options are the fields below; a config file sets some, the command line others:

    python train.py config/nano.py --max_minutes=30
    python train.py config/nano.py --init_from=resume                    # go on where it stopped
    python train.py config/nano.py --init_from=out/nano --out_dir=out/mine --data_dir=data/mine    # fine-tune
    torchrun --standalone --nproc_per_node=4 train.py config/base.py     # four GPUs
"""
# before what is slow to import: from here on Ctrl-C is answered in one line
from common import Parser, UserError, atomic_write, check_ranges, exclusive, run

import copy
import difflib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bpe import DECODER_PATTERNS
from evaluate import cider, cider_references, document_frequencies, tokenize
from model import ModelOptions, pack
from muon import Muon
from prepare_flickr import load_ids, load_meta, load_tokenizer, read_records, read_split
from sample import VERSION, frozen_names, make_model, pick_device, read_checkpoint, restore


@dataclass
class Options(ModelOptions):
    """All that a config or the command line may set."""
    # where
    data_dir: str = "data/flickr8k"   # what prepare wrote
    out_dir: str = "out/nano"         # checkpoints and log.jsonl
    init_from: str = "scratch"        # "scratch", "resume" (out_dir/last.pt, or start if there is none), or a checkpoint to fine-tune
    force: bool = False               # overwrite an out_dir that holds last.pt
    # how much
    batch_size: int = 32              # pictures a step, over all ranks and micro-steps
    grad_accum: int = 1               # micro-steps a step: the same gradient, but for what is drawn at random, in less memory
    max_iters: int = 0                # stop after so many steps ...
    max_minutes: float = 0.0          # ... or so many minutes of training, evaluation not counted; 0: no limit
    # pictures
    crop: float = 1.0                 # random crops keep at least this share of the area; 1: none
    flip: bool = False                # mirror every second picture, but those whose captions say "left" or "right"
    jitter: float = 0.0               # brightness, contrast and saturation change by up to this share
    # loss
    smoothing: float = 0.0            # label smoothing
    alpha: float = 0.0                # weight of the teacher's distribution in the loss, ramped up over the first epoch
    momentum: float = 0.999           # of the teacher, an exponential moving average of the weights
    samples: int = 0                  # 2 or more: self-critical training, so many sampled captions a picture instead of people's
    # optimizer
    optimizer: str = "adamw"          # "adamw", or "muon" for the matrices of the blocks and AdamW for the rest
    learning_rate: float = 1e-3       # AdamW's
    muon_lr: float = 0.02             # Muon's
    weight_decay: float = 0.1         # of matrices
    beta1: float = 0.9                # AdamW's, of the gradient's moving average
    beta2: float = 0.98               # AdamW's, of its square's
    grad_clip: float = 1.0            # largest norm of the gradient; 0: no limit
    warmup_iters: int = 100           # the learning rate rises over these steps, then falls as a cosine
    min_lr: float = 0.0               # ... to this share of itself
    # other people's weights, see pretrained.py
    encoder: str = ""                 # a name on the Hugging Face hub, or a folder: facebook/dinov2-small
    decoder: str = ""                 # likewise: gpt2
    freeze_encoder: bool = False      # the encoder's weights stay as they came
    lora_rank: int = 0                # above 0: the decoder's weights stay too, but for LoRA's of this rank beside them
    lora_alpha: float = 16.0          # LoRA's factor is alpha / rank
    lora_dropout: float = 0.0         # on what goes into LoRA's matrices
    lora_targets: str = "qkv|proj|fc"  # regular expression for the layers of the decoder that get one
    lr_scale: str = ""                # factors of the learning rate by regular expression, the first that fits: "encoder=0.1 wte=0.5"
    # watching
    log_interval: int = 20            # steps between lines of the log
    eval_interval: int = 500          # steps between evaluations, each with a checkpoint; other checkpoints: see SAVE_SECONDS
    eval_images: int = 1000           # pictures of val in an evaluation, at most
    # machine
    device: str = "auto"              # cpu, cuda, mps; auto: the best there is
    dtype: str = "auto"               # of matrix products: bfloat16 or float32; auto: bfloat16 on CUDA
    recompute: bool = False           # keep no activations of the decoder's blocks but compute them again: less memory, more time
    compile: bool = False             # torch.compile: minutes to start, then faster on a GPU
    seed: int = 0                     # of the weights, the order of the pictures and all that is drawn


PARTS = {"encoder", "decoder", "freeze_encoder", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
MODEL = {f.name for f in fields(ModelOptions)} | PARTS  # what a checkpoint's weights fit
SAVE_SECONDS = 300  # of training, after which last.pt is written without an evaluation: no more than that is lost
MOST_SKIPPED = 10  # steps in a row whose gradient is not finite, after which training stops


# ---- options

def read_options(argv):
    """Command line -> (Options, {option: what set it, the command line or the config's name}). UserError for what is wrong."""
    parser = Parser(prog="train.py", description=__doc__, add_help=True)
    parser.add_argument("config", nargs="?", help="a Python file that sets options")
    comments = dict(re.findall(r"(\w+): \w+ = [^#\n]+# (.*)", inspect.getsource(ModelOptions) + inspect.getsource(Options)))
    for f in fields(Options):
        parser.add_argument(f"--{f.name}", **(dict(nargs="?", const="True") if f.type is bool else {}),
                            help=f"{comments.get(f.name, '')} (default: {f.default})".replace("%", "%%").strip())
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    options, explicit = Options(), {}
    config = given.pop("config", None)
    for source, values in ((config, read_config(config) if config else {}), ("command line", given)):
        for name, value in values.items():
            set_option(options, name, value, source)
            explicit[name] = source
    for name, allowed in dict(optimizer=("adamw", "muon"), dtype=("auto", "bfloat16", "float32")).items():
        if getattr(options, name) not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, not {getattr(options, name)!r}")
    check_ranges(
        options, batch_size=(1, 1e9), grad_accum=(1, 1e9), max_iters=(0, 1e12), max_minutes=(0, 1e9), crop=(0.01, 1), jitter=(0, 1),
        smoothing=(0, 0.99), alpha=(0, 1), momentum=(0, 1), samples=(0, 1000), learning_rate=(0, 1e3), muon_lr=(0, 1e3),
        weight_decay=(0, 1e3), beta1=(0, 0.9999), beta2=(0, 0.99999), grad_clip=(0, 1e9), warmup_iters=(0, 1e12), min_lr=(0, 1),
        lora_rank=(0, 1e6), lora_alpha=(0, 1e6), lora_dropout=(0, 0.99),
        unigram=(0, 1e3), log_interval=(1, 1e12), eval_interval=(1, 1e12), eval_images=(2, 1e9), seed=(0, 2**32 - 1))
    if options.samples == 1 or options.samples and (options.alpha or options.smoothing):
        raise UserError("self-critical training compares samples of one picture: samples must be 2 or more, alpha and smoothing 0")
    if not options.max_iters and not options.max_minutes:
        raise UserError("nothing says when to stop: give --max_iters or --max_minutes, or a config that does")
    for name, part in dict(lora_rank="decoder", freeze_encoder="encoder").items():
        if getattr(options, name) and not getattr(options, part):
            raise UserError(f"{name} is for a pretrained {part}: name one with --{part}")
    if options.encoder or options.decoder:
        from pretrained import part_options
        for name, value in part_options(options.encoder, options.decoder)[0].items():
            if name in given and getattr(options, name) != value:
                raise UserError(f"{name} is {value} in {options.encoder} {options.decoder}, not {getattr(options, name)}")
            setattr(options, name, value)
    try:
        options.check()
        lr_factors(options)
    except ValueError as e:
        raise UserError(str(e)) from None
    try:
        re.compile(options.lora_targets)
    except re.error as e:
        raise UserError(f"lora_targets {options.lora_targets!r} is no regular expression: {e}") from None
    return options, explicit


def read_config(path):
    """A Python file -> the names that it sets, but for modules and names that begin with _."""
    scope = {}
    try:
        exec(compile(Path(path).read_text(), path, "exec"), scope)
    except OSError as e:
        raise UserError(f"config file {path} can't be read: {e.strerror}") from None
    except Exception as e:
        raise UserError(f"config file {path} can't be run: {type(e).__name__}: {e}") from None
    return {k: v for k, v in scope.items() if not k.startswith("_") and not inspect.ismodule(v)}


def set_option(options, name, value, source):
    """Sets one option from a value or its text; UserError for an unknown name or a wrong type."""
    kinds = {f.name: f.type for f in fields(Options)}
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1, 0.5)
        raise UserError(f"{source}: unknown option {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    kind, given = kinds[name], value
    if isinstance(value, str) and kind is not str:
        try:
            value = {"true": True, "1": True, "false": False, "0": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            pass
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{source}: {name} takes {kind.__name__}, not {given!r}")
    setattr(options, name, value)


# ---- data

def get_batch(data_dir, split, pictures, longest, eot_token):
    """
    pictures: their numbers in the split. Returns images uint8 (B, S, S, 3) and their captions packed (see model.pack).
    The maps are opened for each batch, so that pages once read don't stay with the process.
    """
    data = read_split(data_dir, split)
    images = torch.from_numpy(np.stack([data["images"][i] for i in pictures]))
    bounds = [data["captions"][data["index"][i]:data["index"][i + 1] + 1] for i in pictures]
    captions = [[data["tokens"][a:b - 1].tolist() for a, b in zip(ends[:-1], ends[1:])] for ends in bounds]  # without EOT
    return images, pack(captions, eot_token, longest)


def augment(images, seeds, may_flip, options):
    """
    A crop and perhaps a mirror image of each picture, by one affine sampling, and a change of its light: uint8 (B, S, S, 3) ->
    float (B, s, s, 3), scale 0..255 (a little beyond, by light), s = options.image_size. What happens to a picture depends on
    its own seed alone.
    """
    theta, light = torch.zeros(len(images), 2, 3), torch.ones(3, len(images))  # factors of brightness, contrast, saturation
    for i, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        area, stretch, x, y, mirror = rng.random(5)
        light[:, i] = torch.from_numpy(1 + options.jitter * (2 * rng.random(3) - 1))
        side = math.sqrt(options.crop + (1 - options.crop) * area)
        stretch = (4 / 3) ** (stretch - 0.5) if options.crop < 1 else 1  # sides of up to 4:3 to each other
        w, h = min(side * stretch, 1), min(side / stretch, 1)
        theta[i, 0, 0] = -w if options.flip and may_flip[i] and mirror < 0.5 else w
        theta[i, 1, 1] = h
        theta[i, 0, 2], theta[i, 1, 2] = (2 * x - 1) * (1 - w), (2 * y - 1) * (1 - h)
    grid = F.affine_grid(theta.to(images.device), (len(images), 3, options.image_size, options.image_size), align_corners=False)
    x = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
    if options.jitter:
        brightness, contrast, saturation = light.to(x.device).view(3, -1, 1, 1, 1)
        grey = x.mean(1, keepdim=True)
        x = grey + saturation * (x - grey)
        middle = grey.mean((2, 3), keepdim=True)
        x = ((x - middle) * contrast + middle) * brightness
    return x.permute(0, 2, 3, 1)


def says_side(captions):
    """Whether a mirror image would make one of these captions untrue."""
    return any(re.search(r"\b(left|right)\b", text, re.IGNORECASE) for text in captions)


# ---- self-critical training

@torch.no_grad()
def sharpen(model):
    """
    Halves the temperature of a model's words before self-critical training where label smoothing has spread a tenth of the
    probability over all words: a sample with such a word in it teaches only to avoid it. A norm that is frozen stays.
    """
    if model.norm.weight.requires_grad:
        model.norm.weight *= 2
        model.norm.bias *= 2


def sample_captions(model, images, references, frequencies, tokenizer, k, seed):
    """
    Self-critical sequence training (SCST, arXiv 1612.00563): k captions sampled for each picture, packed (see model.pack),
    with a factor for each token: how much better the caption's CIDEr-D is than the mean of the picture's other samples
    (arXiv 2003.09971), so that cross-entropy times factor is minus the reward's gradient. references: texts for each picture;
    frequencies: of n-grams in the training captions. The end counts as a word, or captions would stop in "on a". Returns the
    packed captions and the k · B rewards, and leaves the model in eval mode.
    """
    model.eval()
    words = [caption for captions in model.sample(images, k, min_tokens=0, seed=seed) for caption, _ in captions]
    ended = lambda text: tokenize(text) + ["<end>"]
    refs = cider_references([[ended(text) for text in texts] for texts in references], frequencies)[1]
    refs = [ref for ref in refs for _ in range(k)]
    rewards = torch.tensor(cider([ended(tokenizer.decode(w)) for w in words], (frequencies, refs))[1])
    better = (rewards.view(-1, k) - rewards.view(-1, k).mean(1, keepdim=True)).flatten() * k / (k - 1)
    captions = pack([words[i:i + k] for i in range(0, len(words), k)], model.eot_token, model.longest)
    lengths = torch.tensor([len(w) + 1 for w in words])
    captions["factor"] = better.repeat_interleave(lengths)
    captions["factor"][lengths.cumsum(0)[lengths == model.longest] - 1] = 0  # an end at the longest was forced, not chosen
    return captions, rewards


# ---- optimizer

def lr_factors(options):
    """options.lr_scale -> {regular expression: factor of the learning rate}; ValueError where it is not written so."""
    factors = {}
    for part in options.lr_scale.split():
        pattern, _, factor = part.rpartition("=")
        try:
            factors[re.compile(pattern)] = float(factor)
        except (re.error, ValueError):
            factor = -1
        if not pattern or not 0 <= float(factor) <= 1e3:
            raise ValueError(f"lr_scale takes PATTERN=FACTOR parts, such as 'encoder=0.1 wte=0.5', not {part!r}")
    return factors


def make_optimizers(model, options):
    """A list: AdamW, and Muon for the matrices of the blocks where it is asked for. Only matrices decay."""
    factors = lr_factors(options)
    for pattern in factors:
        if not any(p.requires_grad and pattern.search(name) for name, p in model.named_parameters()):
            raise UserError(f"lr_scale: {pattern.pattern!r} is found in no trained parameter's name, such as "
                            f"{', '.join([name for name, p in model.named_parameters() if p.requires_grad][:3])}")
    groups = {}  # (whether Muon's, weight decay, learning rate): parameters
    for name, p in model.named_parameters():
        if p.requires_grad:
            muon = options.optimizer == "muon" and p.ndim == 2 and "blocks." in name
            factor = next((factor for pattern, factor in factors.items() if pattern.search(name)), 1.0)
            lr = (options.muon_lr if muon else options.learning_rate) * factor
            groups.setdefault((muon, options.weight_decay if p.ndim >= 2 else 0.0, lr), []).append(p)
    of = lambda wanted: [dict(params=params, weight_decay=decay, lr=lr) for (muon, decay, lr), params in groups.items() if muon == wanted]
    optimizers = [torch.optim.AdamW(of(False), lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)]
    if of(True):
        optimizers.append(Muon(of(True), lr=options.muon_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def make_teacher(model):
    """A copy of the model, in eval mode for good, that shares its frozen parameters (ALBEF, arXiv 2107.07651)."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher, model, m):
    """teacher = m · teacher + (1 - m) · model, for what is trained."""
    pairs = [(t, p) for t, p in zip(teacher.parameters(), model.parameters()) if t is not p]
    torch._foreach_lerp_([t for t, _ in pairs], [p.detach() for _, p in pairs], 1 - m)


# ---- evaluation

@torch.no_grad()
def validate(model, options, tokenizer, references, cider_refs, rank, world):
    """
    On the first len(references) pictures of val: a dict of loss (nats a token), loss_shuffled (each with its neighbour's picture: as
    low as loss where a captioner ignores its pictures), cider (greedy captions) and distinct (share of captions that are
    unlike all others); and the captions. Ranks share the work and all know the result.
    """
    device, count = model.mean.device, len(references)
    sums, texts = torch.zeros(3), {}
    for start in range(rank * 64, count, world * 64):
        pictures = range(start, min(start + 64, count))
        images, captions = get_batch(options.data_dir, "val", pictures, model.longest, model.eot_token)
        after, _ = get_batch(options.data_dir, "val", [pictures.stop % count], model.longest, model.eot_token)
        captions, memory = {k: v.to(device) for k, v in captions.items()}, model.encode(torch.cat([images, after]).to(device))
        sums += torch.tensor([*(model.cross_entropy(m, captions).item() for m in (memory[:-1], memory[1:])), len(captions["targets"])])
        for i, [(words, _)] in zip(pictures, model.beam_search(memory[:-1], beam=1)):
            texts[i] = tokenizer.decode(words).strip()
    if world > 1:
        dist.all_reduce(sums)
        gathered = [None] * world
        dist.all_gather_object(gathered, texts)
        texts = {i: text for part in gathered for i, text in part.items()}
    texts = [texts[i] for i in range(count)]
    score = cider([tokenize(text) for text in texts], cider_refs)[0]
    loss, shuffled, tokens = sums.tolist()
    return dict(loss=loss / tokens, loss_shuffled=shuffled / tokens, cider=float(score), distinct=len(set(texts)) / count), texts


# ---- the run

def starting_point(options, explicit, tokenizer_text, fingerprint):
    """
    What init_from names -> (checkpoint or None, whether to go on from it). Model options of a checkpoint hold; those that the
    command line (to resume: or the config) gives otherwise are refused. explicit: {option: who gave it}.
    """
    last = Path(options.out_dir, "last.pt")
    resume = options.init_from == "resume"
    there = [path for path in (last, last.with_name("best.pt")) if path.exists()]
    if there and not resume and not options.force:
        raise UserError(f"{there[0]} exists: " + "--init_from=resume goes on from it, " * (there[0] == last)
                        + "--force starts over, --out_dir names another place")
    if resume and there and not last.exists() and not last.with_name("log.jsonl").exists():  # no run of ours began there
        raise UserError(f"{there[0]} is nothing to resume from: --init_from={there[0]} with another --out_dir fine-tunes it")
    first = int(os.environ.get("RANK", 0)) == 0  # of all ranks: the one that prints
    if options.init_from == "scratch" or resume and not last.exists():
        if options.samples and first:
            print("self-critical training of random weights: --init_from=PATH names a trained captioner", file=sys.stderr)
        return None, False
    checkpoint = read_checkpoint(last if resume else options.init_from)
    if resume and "optimizer" not in checkpoint:
        raise UserError(f"{last} holds nothing to resume from: name it with --init_from=PATH to start from its weights")
    if checkpoint["tokenizer"]["ranks"] != tokenizer_text:
        raise UserError(f"{options.data_dir} was prepared with another tokenizer than the checkpoint's: prepare it again with "
                        f"--tokenizer {last if resume else options.init_from}")
    if resume and checkpoint["fingerprint"] != fingerprint:
        raise UserError(f"{last} was trained on other data than {options.data_dir} holds now: give its own --data_dir, or "
                        f"--init_from={last} with another --out_dir to fine-tune")
    for name in sorted(MODEL - {"dropout", "word_dropout"}):
        if (found := checkpoint["options"].get(name, getattr(Options, name))) != getattr(options, name):
            if name in explicit and (resume or explicit[name] == "command line"):
                raise UserError(f"{name} is {getattr(options, name)} here but {found} in the checkpoint to start from")
            setattr(options, name, found)
    if resume:
        changed = [f"{name} {getattr(options, name)} (was {value})" for name, value in checkpoint["options"].items()
                   if name not in ("init_from", "force", "out_dir") and getattr(options, name, value) != value]
        if changed and first:
            print("other options than before: " + ", ".join(changed))
    return checkpoint, resume


def cut_log(path, it):
    """Drops what the log says of steps after `it`, or half of: they will be done again."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if (found := re.match(rb'{"iter": (\d+), .*}\n$', line)) and int(found[1]) <= it]
    if kept != lines:
        with atomic_write(path) as f:
            f.write(b"".join(kept))


def main():
    """The command: see the top of this file."""
    options, explicit = read_options(sys.argv[1:])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if options.batch_size % (world * options.grad_accum):
        raise UserError(f"batch_size {options.batch_size} can't be shared by {world} ranks × {options.grad_accum} micro-steps")
    if world > 1 and (cards := torch.cuda.device_count()) and options.device in ("auto", "cuda"):
        if int(os.environ["LOCAL_WORLD_SIZE"]) > cards:
            raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} ranks want a GPU each, but this machine has {cards}: give --nproc_per_node={cards}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = pick_device(options.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    bf16 = options.dtype == "bfloat16" or options.dtype == "auto" and device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    # data
    meta = load_meta(options.data_dir)
    tokenizer = load_tokenizer(options.data_dir)
    tokenizer_text = Path(options.data_dir, "tokenizer.tiktoken").read_bytes()
    for split in ("train", "val"):
        if split not in meta["splits"]:
            raise UserError(f"{options.data_dir} has no split {split!r}, and training needs train and val: prepare it again with lists of "
                            "names (--split_files TRAIN VAL) or with more pictures")
    if options.decoder and meta["pattern"] != DECODER_PATTERNS[options.decoder_family]:
        raise UserError(f"{options.data_dir} was prepared with another tokenizer than {options.decoder}'s: give prepare_flickr.py "
                        f"--tokenizer {options.decoder}")
    out_dir, log_path = Path(options.out_dir), Path(options.out_dir, "log.jsonl")
    lock = exclusive(out_dir) if rank == 0 and out_dir.is_dir() else None  # held until the process ends
    checkpoint, resumed = starting_point(options, explicit, tokenizer_text, meta["fingerprint"])
    if options.image_size > meta["image_size"]:
        raise UserError(f"image_size {options.image_size} is more than the {meta['image_size']} that {options.data_dir} was prepared "
                        f"with: train smaller, or prepare larger")
    N = meta["splits"]["train"]["images"]
    references = [r["captions"] for r in read_records(options.data_dir, "val")][:options.eval_images]
    cider_refs = cider_references([[tokenize(text) for text in texts] for texts in references])
    train_texts = [r["captions"] for r in read_records(options.data_dir, "train")]
    may_flip = np.array([not says_side(texts) for texts in train_texts])
    frequencies = document_frequencies([[tokenize(text) + ["<end>"] for text in texts] for texts in train_texts]) if options.samples else None

    # model, teacher, optimizers
    torch.manual_seed(options.seed)
    model = make_model(options, meta["vocab_size"], meta["mean"], meta["std"], load_ids(options.data_dir),
                       torch.bfloat16 if bf16 else torch.float32)
    model.recompute = options.recompute
    if checkpoint:
        restore(model, checkpoint["model"])
    if options.samples and checkpoint and not resumed and checkpoint["options"].get("smoothing"):
        sharpen(model)
    model.to(device)
    teacher = make_teacher(model)
    optimizers = make_optimizers(model, options)
    it, seen, seconds, best, running = 0, 0, 0.0, (-1.0, 0.0), [0.0] * 5
    if resumed:
        restore(teacher, checkpoint["teacher"], frozen_names(model))
        if len(optimizers) != len(checkpoint["optimizer"]):
            raise UserError(f"{options.out_dir}/last.pt was trained with another optimizer than {options.optimizer}")
        for optimizer, state in zip(optimizers, checkpoint["optimizer"]):
            given = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            try:
                optimizer.load_state_dict(state)
            except ValueError:
                raise UserError(f"{options.out_dir}/last.pt was trained with another optimizer, lr_scale or weight_decay") from None
            for group, own in zip(optimizer.param_groups, given):  # rates are the command line's, not the checkpoint's
                group.update(own)
        it, seen, seconds, best, running = (checkpoint[k] for k in ("iter", "seen", "seconds", "best", "running"))
    tuning = checkpoint is not None and not resumed
    del checkpoint
    if options.compile:  # all but the head, which computes its own gradients
        for m in (model, teacher):
            m.encode, m.hidden = torch.compile(m.encode), torch.compile(m.hidden)
    trained = DistributedDataParallel(model) if world > 1 else model

    split = read_split(options.data_dir, "train")
    lengths = np.minimum(np.diff(split["captions"]), model.longest)  # (C,) tokens of a caption with its EOT
    cut = int((np.diff(split["captions"]) > model.longest).sum())
    tokens_of = np.add.reduceat(lengths, split["index"][:-1])  # (N,) tokens of a picture's captions
    captions_of = np.diff(split["index"])  # (N,)

    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = lock or exclusive(out_dir)
        cut_log(log_path, it)
        log_path.touch()
        n_params = sum(p.numel() for p in model.parameters())
        print(f"{n_params / 1e6:.2f} M parameters ({sum(p.numel() for p in model.encoder.parameters()) / 1e6:.2f} M in the encoder), "
              f"{device.type}{f' × {world}' if world > 1 else ''}, {'bfloat16' if bf16 else 'float32'}, a step: "
              f"{options.batch_size} pictures, about {options.batch_size * tokens_of.mean():.0f} tokens; {N} pictures to train on"
              + (f"; {cut} captions cut to {model.longest} tokens" if cut else "")
              + (f"; going on from step {it}" if resumed else ""), flush=True)

    def log(text, **record):
        if rank == 0:
            print(text, flush=True)
            with open(log_path, "a") as f:
                f.write(json.dumps(dict(iter=it, **record)) + "\n")

    def save():
        if rank == 0:
            with atomic_write(out_dir / "last.pt") as f:
                torch.save(dict(model=kept(model), teacher=kept(teacher), optimizer=[o.state_dict() for o in optimizers],
                                iter=it, seen=seen, seconds=seconds, best=best, running=running, **about), f)

    about = dict(options=asdict(options), version=VERSION, fingerprint=meta["fingerprint"], vocab_size=meta["vocab_size"],
                 tokenizer=dict(ranks=tokenizer_text, pattern=meta["pattern"], ids=load_ids(options.data_dir)))
    frozen = frozen_names(model)
    kept = lambda m: {name: t for name, t in m.state_dict().items() if name not in frozen}  # what can be read again is not saved
    signals = []

    def on_signal(number, frame):
        if signals:  # asked twice: leave at once, for an exception may come while torch.save can't take one
            for path in out_dir.glob(f"*.tmp{os.getpid()}"):
                with suppress(OSError):
                    path.unlink()
            with suppress(OSError):
                os.write(2, b"train.py: interrupted\n")
            os._exit(128 + number)
        signals.append(number)
        with suppress(OSError):
            os.write(2, b"stopping after this step or evaluation; asked again: at once, without saving\n" * (rank == 0))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    if world > 1:
        dist.barrier()  # nobody writes before all have read
    if rank == 0 and options.force and not resumed:
        for path in (out_dir / "last.pt", out_dir / "best.pt"):  # of the run that is replaced
            path.unlink(missing_ok=True)
    if tuning:
        save()  # or a run stopped before its first evaluation would be resumed from random weights

    def progress():  # of the schedule, 0 to 1
        by_iters = it / options.max_iters if options.max_iters else 0
        return max(by_iters, seconds / 60 / options.max_minutes if options.max_minutes else 0)

    order = lambda epoch: np.random.default_rng((options.seed, epoch)).permutation(N)
    orders = {}  # of the epochs that a batch touches
    done, stop, skipped, saved = progress(), False, 0, seconds
    if done >= 1 and rank == 0:
        reached = "max_iters" if options.max_iters and it >= options.max_iters else "max_minutes"
        print(f"nothing is left to do: --{reached}={getattr(options, reached)} is reached, a larger one goes on")
    while done < 1 and not stop:
        began = time.perf_counter()
        position = np.arange(seen, seen + options.batch_size)
        epochs = position // N
        orders = {epoch: orders[epoch] if epoch in orders else order(epoch) for epoch in set(epochs.tolist())}
        pictures = np.array([orders[e][p] for e, p in zip(epochs.tolist(), position % N)])
        tokens = options.samples * len(pictures) or tokens_of[pictures].sum()  # of the global batch: what the loss is the mean of

        scale = min((it + 1) / (options.warmup_iters + 1), 1)
        scale *= options.min_lr + (1 - options.min_lr) * (1 + math.cos(math.pi * done)) / 2
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * scale
        alpha = options.alpha * min(1, seen / N)

        ce = torch.zeros((), device=device)  # or, in self-critical training, minus the rewards: what is logged
        share = options.batch_size // (world * options.grad_accum)
        for micro in range(options.grad_accum):
            mine = slice((micro * world + rank) * share, (micro * world + rank + 1) * share)
            images, captions = get_batch(options.data_dir, "train", pictures[mine], model.longest, model.eot_token)
            images = images.to(device)
            if options.crop < 1 or options.flip or options.jitter:
                seeds = [(options.seed, int(e), int(i)) for e, i in zip(epochs[mine], pictures[mine])]
                images = augment(images, seeds, may_flip[pictures[mine]], options)
            if options.samples:
                with autocast:
                    captions, rewards = sample_captions(model, images, [train_texts[i] for i in pictures[mine]], frequencies,
                                                        tokenizer, options.samples, hash((options.seed, it, micro, rank)))
            model.train()
            if options.freeze_encoder:
                model.encoder.eval()  # no noise on what can't adapt to it
            captions = {k: v.to(device) for k, v in captions.items()}
            torch.manual_seed(hash((options.seed, it, micro, rank)))  # dropout
            last_micro = micro == options.grad_accum - 1
            with nullcontext() if world == 1 or last_micro else trained.no_sync():
                with autocast:
                    loss, plain = trained(images, captions, teacher=teacher, alpha=alpha, smoothing=options.smoothing)
                (loss * (world / tokens)).backward()  # DDP takes the ranks' mean
            ce += -rewards.sum() if options.samples else plain
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip or math.inf)
        finite = bool(norm.isfinite())  # the same on all ranks, for the gradients are
        it, seen, skipped = it + 1, seen + options.batch_size, 0 if finite else skipped + 1
        for optimizer in optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if finite:
            update_teacher(teacher, model, min(options.momentum, (1 + it) / (10 + it)))
        elif skipped == MOST_SKIPPED:
            raise ArithmeticError(f"step {it}: the gradient was NaN or infinite {skipped} steps in a row: lower the learning rate "
                                  f"(now {optimizers[0].param_groups[0]['lr']:.2e}); the last checkpoint is sound")
        else:
            log(f"step {it}: the gradient is NaN or infinite: this step is skipped", skipped=skipped)

        # what all ranks must agree on: the loss, rank 0's clock, whether anyone was asked to stop
        agreed = torch.tensor([ce.item() if finite else 0, (time.perf_counter() - began) * (rank == 0), len(signals)], dtype=torch.float64)
        if world > 1:
            dist.all_reduce(agreed)
        total_ce, elapsed, stop = agreed.tolist()
        seconds += elapsed
        done = progress()
        running = [a + b for a, b in zip(running, (total_ce, float(tokens) * finite, len(pictures), int(captions_of[pictures].sum()), elapsed))]
        if it % options.log_interval == 0:
            sum_ce, n_tokens, n_images, n_captions, spent = running
            running = [0.0] * 5
            mean_ce = sum_ce / n_tokens if n_tokens else None
            record = dict(epoch=seen / N, seconds=seconds, loss=mean_ce, lr=optimizers[0].param_groups[0]["lr"],
                          grad_norm=norm.item() if finite else None, images_per_s=n_images / spent, captions_per_s=n_captions / spent)
            left = seconds * (1 - done) / done
            log(f"step {it} | epoch {seen / N:.2f} | {'minus the reward' if options.samples else 'loss'} {math.nan if mean_ce is None else mean_ce:.4f} | lr {record['lr']:.2e} | "
                f"{record['images_per_s']:.1f} pictures/s | {int(left // 60)}:{int(left % 60):02d} left", **record)
        if it % options.eval_interval == 0 or done >= 1:
            model.eval()
            results = {}
            for name, candidate in (("student", model), ("teacher", teacher)):
                with autocast:
                    results[name], texts = validate(candidate, options, tokenizer, references, cider_refs, rank, world)
                score = results[name]["cider"], -results[name]["loss"]  # with few pictures CIDEr may be 0 for all
                if score > best:
                    best = score
                    if rank == 0:
                        with atomic_write(out_dir / "best.pt") as f:
                            weights = {k: t.half() for k, t in kept(candidate).items()}  # half the size; a run goes on from last.pt
                            torch.save(dict(model=weights, which=name, iter=it, eval=results[name], **about), f)
            log("\n".join(f"  {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in r.items()) for name, r in results.items())
                + "".join(f"\n    the teacher's: {text}    (a person: {refs[0]})" for text, refs in zip(texts[:3], references)), eval=results)
        if it % options.eval_interval == 0 or done >= 1 or seconds - saved > SAVE_SECONDS:
            save()
            saved = seconds
    if done < 1:
        save()
    if world > 1:
        dist.barrier()  # rank 0 is still writing: nobody leaves before it is done
        dist.destroy_process_group()
    if stop and done < 1:
        if rank == 0:
            print(f"stopped at step {it}: --init_from=resume goes on", file=sys.stderr)
        sys.exit(128 + (signals or [signal.SIGTERM])[0])  # perhaps another rank was told


if __name__ == "__main__":
    run(main)
