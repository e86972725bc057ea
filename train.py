"""
Train a captioner.

    python train.py config/nano.py --max_minutes=30
    python train.py config/nano.py --init_from=resume          # continue a run
    python train.py config/nano.py --init_from=out/nano --out_dir=out/mine --data_dir=data/mine
    torchrun --standalone --nproc_per_node=4 train.py config/base.py    # 4 GPUs

The options are the fields of ModelOptions in model.py and of Options in train.py. A config file
overrides some of the defaults; the command line overrides both.
"""
import copy
import math
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (about_run, check_sources, find_start, make_model, pick_device, rank_facts,
                        restore, resume_run, save_best, save_last)
from model import ModelOptions, pack
from nanocaption.augment import augment, names_a_side
from nanocaption.cli import UserError, check_ranges, lock_folder, run
from nanocaption.dataset import Dataset
from nanocaption.distributed import all_reduce, check_ranks_agree, gather, init_distributed
from nanocaption.memory import keep_freed_memory
from nanocaption.metrics import cider, cider_references, tokenize
from nanocaption.optimizer import make_optimizer, parse_lr_scale
from nanocaption.options import parse_options
from nanocaption.precision import DTYPES, make_autocast
from nanocaption.scst import sample_captions, sharpen, token_advantages, train_frequencies
from nanocaption.signals import StopSignal
from nanocaption.tokenizer import DECODER_PATTERNS
from nanocaption.training_log import (log_evaluation, log_start, log_step, open_out_dir,
                                      report_skipped)
from nanocaption.views import FrozenViews, check_views, fill_views, pick_views
from nanocaption.weights import absolute_source

SAVE_SECONDS = 300  # save a checkpoint at least this often, in seconds of training


@dataclass
class Options(ModelOptions):
    """All options. The comment beside a field is its --help text."""
    # I/O
    data_dir: str = "data/flickr30k"  # written by prepare_flickr.py
    out_dir: str = "out/nano"         # checkpoints and log.jsonl
    init_from: str = "scratch"        # scratch, resume (scratch if there is no run) or a checkpoint
    force: bool = False               # overwrite the run in out_dir
    log_interval: int = 20            # steps between log lines
    eval_interval: int = 500          # steps between evaluations; each also saves a checkpoint
    eval_images: int = 1000           # number of validation images to use
    # duration: whichever limit comes first
    max_iters: int = 0                # optimizer steps (0: no limit)
    max_minutes: float = 0.0          # training time, not counting evaluation (0: no limit)
    batch_size: int = 32              # images per step, over all ranks and micro-steps
    grad_accum: int = 1               # micro-steps per step: same gradient, less memory
    # augmentation
    crop: float = 1.0                 # random crops of at least this fraction of the area (1: off)
    flip: bool = False                # mirror half the images, unless a caption says left or right
    jitter: float = 0.0               # strength of brightness, contrast and saturation jitter
    # loss
    smoothing: float = 0.0            # label smoothing
    alpha: float = 0.0                # weight of the teacher's soft targets (ramps up over epoch 1)
    momentum: float = 0.999           # EMA decay of the teacher's weights
    samples: int = 0                  # self-critical training: samples per image (0: off)
    # optimizer
    optimizer: str = "adamw"          # adamw, or muon (blocks' matrices only; AdamW for the rest)
    learning_rate: float = 1e-3       # peak learning rate of AdamW
    muon_lr: float = 0.02             # peak learning rate of Muon
    lr_scale: str = ""                # learning rate factors by name, e.g. "encoder=0.1 wte=0.5"
    weight_decay: float = 0.1         # for tensors with 2 or more dimensions
    grad_clip: float = 1.0            # maximum norm of the gradient (0: no clipping)
    warmup_iters: int = 100           # steps of linear warmup, before cosine decay
    lr_decay: float = 1.0             # part of the decay that the run covers (1: down to 0)
    # pretrained parts, see pretrained.py
    encoder: str = ""                 # efficientnet_lite0, 1 or 2; or a Hugging Face name or folder
    decoder: str = ""                 # a Hugging Face name or folder, e.g. gpt2
    freeze_encoder: bool = False      # freeze its pretrained weights; see views and cache_features
    tune_blocks: int = 0              # train the 1x1 convs of a frozen EfficientNet's last N blocks
    views: int = 1                    # with a frozen encoder: fixed views (augmentations) per image
    cache_features: bool = True       # store a frozen encoder's features instead of recomputing
    lora_rank: int = 0                # LoRA rank; trains adapters instead of the decoder (0: off)
    lora_targets: str = "qkv|proj|fc"  # regular expression for the layers that get an adapter
    # system
    device: str = "auto"              # cpu, cuda, mps, or auto (the best available)
    dtype: str = "auto"               # bfloat16, float32, or auto (CPUs: whichever is faster)
    compile: bool = False             # torch.compile: slow to start, faster on a GPU
    recompute: bool = False           # activation checkpointing in the decoder: slower, less memory
    seed: int = 0                     # for weights, data order, augmentation and dropout

    def check_run(self):
        """Raises ValueError, with a one-line message, for bad values and combinations."""
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, not {self.optimizer!r}")
        check_ranges(
            self, log_interval=(1, 1e12), eval_interval=(1, 1e12), eval_images=(2, 1e9),
            max_iters=(0, 1e12), max_minutes=(0, 1e9), batch_size=(1, 1e9), grad_accum=(1, 1e9),
            crop=(0.01, 1), jitter=(0, 1), smoothing=(0, 0.99), alpha=(0, 1), momentum=(0, 1),
            samples=(0, 1000), unigram=(0, 1e3), views=(1, 1000), learning_rate=(0, 1e3),
            muon_lr=(0, 1e3), weight_decay=(0, 1e3), grad_clip=(0, 1e9), warmup_iters=(0, 1e12),
            lr_decay=(0, 1), tune_blocks=(0, 1e3), lora_rank=(0, 1e6), seed=(0, 2**32 - 1))
        if self.samples == 1 or self.samples and (self.alpha or self.smoothing):
            raise ValueError("self-critical training needs samples >= 2, alpha=0 and smoothing=0")
        if not self.max_iters and not self.max_minutes:
            raise ValueError("set --max_iters or --max_minutes (or use a config that does)")
        if self.freeze_encoder and not self.encoder and self.encoder_family == "own":
            raise ValueError("freeze_encoder needs a pretrained encoder; name one with --encoder")
        if self.tune_blocks and not self.encoder_family.startswith("efficientnet"):
            raise ValueError("tune_blocks works only with an EfficientNet encoder")
        if self.tune_blocks and not self.freeze_encoder:
            raise ValueError("tune_blocks needs --freeze_encoder; without it, the whole encoder "
                             "is trained")
        if self.lora_rank and not self.decoder:
            raise ValueError("lora_rank needs a pretrained decoder; name one with --decoder")
        try:
            re.compile(self.lora_targets)
        except re.error as error:
            raise ValueError(f"lora_targets {self.lora_targets!r} is not a regular expression: "
                             f"{error}") from None
        parse_lr_scale(self.lr_scale)
        check_views(self)


def read_options(argv):
    """The command line -> checked Options, and where each option that was set comes from."""
    options, source = parse_options(Options, argv, __doc__)
    options.encoder = absolute_source(options.encoder)
    options.decoder = absolute_source(options.decoder)
    if options.encoder or options.decoder:
        from pretrained import native_image_size, part_options
        fixed, _, _ = part_options(options.encoder, options.decoder)
        for name, value in fixed.items():
            if source.get(name) == "command line" and getattr(options, name) != value:
                raise UserError(f"{name} cannot be {getattr(options, name)}: --encoder or "
                                f"--decoder fixes it at {value}")
            setattr(options, name, value)
        if "image_size" not in source:
            options.image_size = native_image_size(options.encoder) or options.image_size
    check_options(options)
    return options, source


def check_options(options):
    """Like options.check and check_run, but raises UserError."""
    try:
        options.check()
        options.check_run()
    except ValueError as error:
        raise UserError(str(error)) from None


# -----------------------------------------------------------------------------
# data

@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """The order of the n training images in this epoch, a permutation of their indices."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def next_batch(n_seen, n_train, options):
    """The next step's images on all ranks: their indices and epochs, (batch_size,) each."""
    epochs, places = np.divmod(np.arange(n_seen, n_seen + options.batch_size), n_train)
    index = [epoch_order(options.seed, int(e), n_train)[i] for e, i in zip(epochs, places)]
    return np.array(index), epochs


def get_batch(split, index, model, features=None):
    """
    Images, uint8 (B, S, S, 3), and their captions (see model.pack), on the model's device. If
    given, a frozen encoder's features are returned in place of the images.
    """
    device = model.mean.device
    images = torch.from_numpy(split.read_images(index)) if features is None else features
    captions = pack(split.read_tokens(index), model.eot_token, model.max_tokens)
    return images.to(device), {name: t.to(device) for name, t in captions.items()}


class TrainSplit:
    """The training images, augmented, and what the loop needs to know about each of them."""

    def __init__(self, data, model, options):
        max_tokens = model.max_tokens
        self.split = data.split("train")
        self.tokenizer = data.tokenizer
        self.options = options
        self.captions = self.split.captions
        self.n_captions = np.diff(self.split.image_start)
        lengths = np.diff(self.split.caption_start)
        self.n_cut = int((lengths > max_tokens).sum())  # captions that get cut
        lengths = np.minimum(lengths, max_tokens)
        self.n_tokens = np.add.reduceat(lengths, self.split.image_start[:-1])  # per image
        self.may_flip = np.array([not names_a_side(texts) for texts in self.captions])
        self.frequencies = train_frequencies(self.captions) if options.samples else None
        self.views = None
        if options.freeze_encoder:
            self.views = FrozenViews(model, self.split, self.may_flip, options, options.views)

    def __len__(self):
        return len(self.split)

    def count_tokens(self, index):
        """The denominator of a batch's loss: its tokens or, in self-critical training, samples."""
        if self.options.samples:
            return self.options.samples * len(index)
        return self.n_tokens[index].sum()

    def get_batch(self, index, epochs, model):
        """Like get_batch, with augmentation that depends only on seed, epoch and index."""
        options = self.options
        if self.views:
            views = pick_views(index, epochs, options)
            return get_batch(self.split, index, model, self.views.read(index, views))
        images, captions = get_batch(self.split, index, model)
        if options.crop < 1 or options.flip or options.jitter:
            seeds = [(options.seed, int(e), int(i)) for e, i in zip(epochs, index)]
            images = augment(images, seeds, self.may_flip[index], options)
        return images, captions

    def sample_batch(self, images, index, model, seed):
        """For self-critical training: sampled captions with advantages, and -(total reward)."""
        references = [self.captions[i] for i in index]
        samples, rewards = sample_captions(model, images, references, self.frequencies,
                                           self.tokenizer, self.options.samples, seed)
        captions = pack(samples, model.eot_token, model.max_tokens)
        captions["advantage"] = token_advantages(rewards, captions, model.max_tokens)
        captions = {name: t.to(images.device) for name, t in captions.items()}
        return captions, -rewards.sum()


# -----------------------------------------------------------------------------
# EMA teacher ("momentum model" in ALBEF, arXiv 2107.07651)

def make_teacher(model):
    """A copy of the model that is never trained, in eval mode. Frozen parameters are shared."""
    # deepcopy shares what is in its memo instead of copying it
    memo = {id(p): p for p in model.parameters() if not p.requires_grad}
    teacher = copy.deepcopy(model, memo)
    return teacher.requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher, model, momentum):
    """teacher = momentum * teacher + (1 - momentum) * model"""
    averages = []
    weights = []
    for t, p in zip(teacher.parameters(), model.parameters()):
        # a frozen parameter is the same object in both
        if t is not p:
            averages.append(t)
            weights.append(p.detach())
    torch._foreach_lerp_(averages, weights, 1 - momentum)


# -----------------------------------------------------------------------------
# evaluation

class ValSplit:
    """The first eval_images images of the validation split, and their references."""

    def __init__(self, data, model, options):
        n = data.splits.get("val", {}).get("images", 0)
        if n < 2:
            raise UserError(f"{data.data_dir} has too few val images ({n}; training needs 2): "
                            "prepare it again with --force and --split_files TRAIN VAL")
        self.split = data.split("val")
        self.tokenizer = data.tokenizer
        self.captions = self.split.captions[:options.eval_images]
        self.words = [[tokenize(text) for text in texts] for texts in self.captions]
        self.references = cider_references(self.words)
        self.views = None
        if options.freeze_encoder:
            may_flip = np.zeros(len(self.split), bool)
            self.views = FrozenViews(model, self.split, may_flip, options, n_view=1)

    def __len__(self):
        return len(self.captions)

    def get_batch(self, index, model):
        """See get_batch."""
        if self.views:
            return get_batch(self.split, index, model, self.views.read(index, [0] * len(index)))
        return get_batch(self.split, index, model)


@torch.no_grad()
def evaluate(model, val, rank, world):
    """
    Returns a model's scores and its captions. Scores: the loss in nats per token; the loss with
    shuffled images, which is about the same if the model ignores its images; the CIDEr of greedy
    captions; the fraction of distinct captions.
    """
    model.eval()
    n = len(val)
    sums = np.zeros(3)
    texts = {}
    # each rank takes every world-th batch
    for start in range(rank * 64, n, world * 64):
        index = list(range(start, min(start + 64, n)))
        images, captions = val.get_batch(index, model)
        # one more image: the shuffled loss pairs each caption with the next image
        following, _ = val.get_batch([(index[-1] + 1) % n], model)
        encoded = model.encode(torch.cat([images, following]))
        ce = model.cross_entropy(encoded[:-1], captions).item()
        shuffled_ce = model.cross_entropy(encoded[1:], captions).item()
        n_tokens = (captions["targets"] >= 0).sum().item()
        sums += (ce, shuffled_ce, n_tokens)
        for i, captions_of_one in zip(index, model.beam_search(encoded[:-1], beam=1)):
            ids, _ = captions_of_one[0]
            texts[i] = val.tokenizer.decode(ids).strip()
    ce, shuffled_ce, n_tokens = all_reduce(sums.tolist(), world)
    for others in gather(texts, world):
        texts.update(others)
    texts = [texts[i] for i in range(n)]
    score, _ = cider([tokenize(text) for text in texts], val.references)
    return dict(
        loss=ce / n_tokens,
        loss_shuffled=shuffled_ce / n_tokens,
        cider=float(score),
        distinct=len(set(texts)) / n,
    ), texts


def evaluate_both(model, teacher, val, about, state, rank, world):
    """Evaluates both models; one with a new best CIDEr (ties: lower loss) becomes best.pt."""
    results = {}
    saved = None
    for name, candidate in (("student", model), ("teacher", teacher)):
        scores, texts = evaluate(candidate, val, rank, world)
        results[name] = scores
        score = [scores["cider"], -scores["loss"]]
        if score > state.best:
            state.best = score
            saved = name
            if rank == 0:
                save_best(about, candidate, model, which=name, step=state.step, eval=scores)
    if rank == 0:
        out_dir = about["options"]["out_dir"]
        log_evaluation(out_dir, state.step, results, texts, val.captions, saved)


# -----------------------------------------------------------------------------
# the run

@dataclass
class State:
    """Everything besides tensors that a run needs to resume exactly."""
    step: int = 0
    images: int = 0       # seen so far
    seconds: float = 0.0  # of training
    skipped: int = 0      # consecutive steps, so far, without a finite gradient
    best: list = field(default_factory=lambda: [-1.0, 0.0])  # CIDEr and -loss of best.pt
    # since the last log_step: cross-entropy, tokens, images, captions, seconds
    sums: list = field(default_factory=lambda: [0.0] * 5)

    def progress(self, options):
        """0 to 1, by steps or by the clock, whichever is further along."""
        by_steps = self.step / options.max_iters if options.max_iters else 0.0
        by_clock = self.seconds / 60 / options.max_minutes if options.max_minutes else 0.0
        return max(by_steps, by_clock)

    def count(self, ce, n_tokens, n_images, n_captions, seconds):
        """Counts one step; ce is None if it was skipped."""
        self.step += 1
        self.images += n_images
        self.seconds += seconds
        self.skipped = self.skipped + 1 if ce is None else 0
        step = (ce or 0.0, n_tokens if ce is not None else 0, n_images, n_captions, seconds)
        self.sums = [a + float(b) for a, b in zip(self.sums, step)]


def lr_multiplier(step, progress, options):
    """Linear warmup times cosine decay: every learning rate is multiplied by this."""
    warmup = min((step + 1) / (options.warmup_iters + 1), 1.0)
    return warmup * 0.5 * (1 + math.cos(math.pi * progress * options.lr_decay))


def compile_parts(options, *models):
    """
    With --compile, compiles encode and decode, but not the loss, a torch.autograd.Function. Raises
    UserError if torch.compile does not work here.
    """
    if not options.compile:
        return
    try:
        torch.compile(lambda x: x + 1)(models[0].mean)
    except Exception as error:  # torch raises many kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise UserError(f"torch.compile does not work here ({reason}); install what it needs, on "
                        "CPUs a C++ compiler (g++, clang or MSVC), or use --compile=False"
                        ) from None
    for model in models:
        model.encode = torch.compile(model.encode)
        model.decode = torch.compile(model.decode)


def build_model(options, data, checkpoint, resume):
    """The model on the CPU, with the checkpoint's weights if there is one."""
    check_options(options)  # again: find_start may have changed options
    if options.image_size > data.image_size:
        raise UserError(f"image_size {options.image_size} exceeds the {data.image_size} that "
                        f"{options.data_dir} was prepared with; prepare it again with a larger "
                        "--image_size, or train from scratch at a smaller one")
    pattern = DECODER_PATTERNS.get(options.decoder_family)
    if options.decoder and data.meta["pattern"] != pattern:
        raise UserError(f"{options.data_dir} was not prepared with the tokenizer of "
                        f"{options.decoder}; prepare it again with --tokenizer {options.decoder}")
    torch.manual_seed(options.seed)
    model = make_model(options, data.vocab_size, data.mean, data.std, data.token_ids,
                       DTYPES[options.dtype])
    model.recompute = options.recompute
    if checkpoint:
        check_sources(model, checkpoint)
        restore(model, checkpoint["model"])
        smoothed = checkpoint["options"].get("smoothing", 0) > 0
        if options.samples and smoothed and not resume:
            sharpen(model)
    return model


def finish(options, state, stopped, stop, rank, world):
    """The end of a run; after a signal, exits with 128 + its number."""
    if world > 1:
        # rank 0 may still be writing
        dist.barrier()
        dist.destroy_process_group()
    if stopped and state.progress(options) < 1:
        if rank == 0:
            print(f"stopped at step {state.step}; rerun with --init_from=resume to continue",
                  file=sys.stderr)
        # stop.number is 0 if only another rank got a signal
        sys.exit(128 + (stop.number or signal.SIGTERM))


def main():
    """See the top of this file."""
    options, source = read_options(sys.argv[1:])
    rank, world, device = init_distributed(pick_device(options.device), options)
    torch.set_float32_matmul_precision("high")  # TF32 where available
    keep_freed_memory()

    # data, model, teacher, optimizer
    data = Dataset(options.data_dir)
    lock = lock_folder(options.out_dir) if rank == 0 and Path(options.out_dir).is_dir() else None
    checkpoint, resume = find_start(options, source, data, rank)
    autocast, dtype_reason = make_autocast(options, device, source, world)
    model = build_model(options, data, checkpoint, resume).to(device)
    teacher = make_teacher(model)
    optimizer = make_optimizer(model, options)
    state = State()
    if resume:
        state = State(**resume_run(checkpoint, model, teacher, optimizer, options))
    train = TrainSplit(data, model, options)
    val = ValSplit(data, model, options)
    compile_parts(options, model, teacher)
    ddp_model = DistributedDataParallel(model) if world > 1 else model

    # no rank changes the log or the checkpoints until all ranks agree
    about = about_run(options, data, model, checkpoint)  # metadata for the run's checkpoints
    check_ranks_agree(rank_facts(about, state.step), rank, world)
    if options.freeze_encoder and options.cache_features:
        fill_views(train.views, val.views, data, rank, world)
    stop = StopSignal(options.out_dir, quiet=rank > 0)
    if rank == 0:
        lock = open_out_dir(options, state, lock, resume)  # held until the process exits
        log_start(options, state, model, train, val, device, world, dtype_reason)
        if checkpoint and not resume:
            # if the run is killed before its first save, it resumes from these weights
            save_last(about, model, teacher, optimizer, state)

    stopped = False
    last_save = state.seconds
    while state.progress(options) < 1 and not stopped:
        start = time.perf_counter()
        index, epochs = next_batch(state.images, len(train), options)

        # learning rate, and the teacher's weight in the loss
        multiplier = lr_multiplier(state.step, state.progress(options), options)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        alpha = options.alpha * min(1, state.images / len(train))

        # forward and backward, with optional gradient accumulation
        n_tokens = train.count_tokens(index)  # of the whole step; in SCST, samples
        ce_sum = 0.0  # cross-entropy, or -reward in self-critical training
        shards = np.split(np.arange(len(index)), options.grad_accum * world)
        for micro_step in range(options.grad_accum):
            shard = shards[micro_step * world + rank]
            seed = hash((options.seed, state.step, micro_step, rank))  # reproducible: all ints
            images, captions = train.get_batch(index[shard], epochs[shard], model)
            with autocast:
                if options.samples:
                    captions, minus_reward = train.sample_batch(images, index[shard], model, seed)
                model.train()  # sampling and evaluation leave it in eval mode
                torch.manual_seed(seed)  # for dropout
                # sync gradients only after the last micro-step (no effect without DDP)
                ddp_model.require_backward_grad_sync = micro_step == options.grad_accum - 1
                loss, ce = ddp_model(images, captions, teacher, alpha, options.smoothing)
            (loss * world / n_tokens).backward()  # * world: DDP averages over ranks
            ce_sum = ce_sum + (minus_reward if options.samples else ce)

        # update
        max_norm = options.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
        finite = math.isfinite(grad_norm)
        if finite:
            optimizer.step()
            momentum = min(options.momentum, (2 + state.step) / (11 + state.step))  # lower early on
            update_teacher(teacher, model, momentum)
        optimizer.zero_grad()

        # sum over ranks: the loss, rank 0's clock, and signals (nonzero: stop)
        seconds = time.perf_counter() - start if rank == 0 else 0.0
        ce = ce_sum.item() if finite else 0.0
        ce, seconds, stopped = all_reduce([ce, seconds, stop.number], world)
        state.count(ce if finite else None, n_tokens, len(index), train.n_captions[index].sum(),
                    seconds)

        # log, evaluate, save
        done = state.progress(options) >= 1
        evaluating = done or state.step % options.eval_interval == 0
        if rank == 0 and state.skipped:
            report_skipped(options, state, multiplier)
        if rank == 0 and state.step % options.log_interval == 0:
            log_step(options, state, len(train), multiplier, grad_norm)
        if evaluating:
            with autocast:
                evaluate_both(model, teacher, val, about, state, rank, world)
        if rank == 0 and (evaluating or stopped or state.seconds - last_save > SAVE_SECONDS):
            save_last(about, model, teacher, optimizer, state)
            last_save = state.seconds

    finish(options, state, stopped, stop, rank, world)


if __name__ == "__main__":
    run(main)
