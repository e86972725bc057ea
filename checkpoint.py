"""
Checkpoints: what they hold, how they are read, how a run starts from one.

A checkpoint is a dict of tensors and built-in Python types, so it loads with weights_only=True:
version, options, vocab_size, tokenizer (ranks, pattern, ids), fingerprint of the data, model (a
state dict without frozen pretrained weights), source_hashes (of those weights), flickr_ids (hashes
of the training images' ids), search (beam search's defaults). last.pt adds teacher, optimizer and
state, to resume from. best.pt holds the weights, of student or teacher, with the best CIDEr so far,
in half precision; it adds which of the two, the step and the scores.
"""
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import tiktoken
import torch

from model import Captioner, ModelOptions
from nanocaption.cli import BUNDLED, UserError, atomic_write, is_out_of_memory, one_line
from nanocaption.dataset import flickr_hash
from nanocaption.download import check_no_pointer
from nanocaption.precision import cast_weights, pick_dtype
from nanocaption.tokenizer import make_tokenizer, text_to_ranks
from nanocaption.weights import SkipInit, absolute_source

VERSION = 2
# version 1 had these options; they are constants now
CONSTANTS = dict(stem="patch", cross_every=1, beta1=0.9, beta2=0.98, min_lr=0.0, lora_alpha=16.0,
                 lora_dropout=0.0)
RENAMED = {  # since version 1, by prefix
    "encoder.neighbours.": "encoder.local_convs.",
    "encoder.class_tokens": "encoder.stem.class_tokens",
    "encoder.positions": "encoder.stem.positions",
    "encoder.norm_first.": "encoder.stem.norm.",
}
PRETRAINED = dict(encoder="", decoder="", freeze_encoder=False, tune_blocks=0, lora_rank=0,
                  lora_targets="qkv|proj|fc")  # train.py's defaults
# options that a checkpoint's weights fix; dropout may change
ARCHITECTURE = {field.name for field in fields(ModelOptions)} - {"dropout", "word_dropout"}
ARCHITECTURE |= set(PRETRAINED)


def pick_device(name="auto"):
    """auto: CUDA if available, else MPS, else CPU. Raises UserError if a device is unavailable."""
    if name in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = f" ({str(error).splitlines()[0]})" if str(name).startswith("cuda") else ""
        raise UserError(f"device {name!r} is not available{reason}; use cpu, cuda, cuda:1 or mps"
                        ) from None


# -----------------------------------------------------------------------------
# reading

def read_checkpoint(path):
    """
    path: a checkpoint or a folder that holds best.pt or last.pt -> the checkpoint's dict, with
    tensors on the CPU. Raises UserError if there is none, or if it is not a nanoCaption checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        best = path / "best.pt"
        last = path / "last.pt"
        path = last if last.exists() and not best.exists() else best
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train one (python train.py config/nano.py) or "
                        "pass the path of an existing one")
    check_no_pointer(path)
    try:
        # not memory-mapped: Windows cannot replace a mapped file, and a run saves over its own
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is not a checkpoint or is damaged ({type(error).__name__})"
                        ) from None
    found = set(checkpoint) if isinstance(checkpoint, dict) else set()
    missing = sorted({"model", "options", "tokenizer", "version"} - found)
    if missing:
        raise UserError(f"{path} is not a nanoCaption checkpoint: it lacks {', '.join(missing)}")
    if checkpoint["version"] == 1:
        try:
            checkpoint = upgrade(checkpoint, path)
        except UserError:
            raise
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if checkpoint["version"] != VERSION:
        raise UserError(f"{path} has format version {checkpoint['version']}; this code reads "
                        f"up to {VERSION}: use the code that wrote it")
    return checkpoint


def upgrade(checkpoint, path):
    """Version 1 -> 2, without the optimizer. Raises UserError if a removed option was in use."""
    options = dict(checkpoint["options"])
    for name, constant in CONSTANTS.items():
        value = options.pop(name, constant)
        if value != constant:
            raise UserError(f"{path} was trained with {name}={value!r}, which is no longer an "
                            f"option (it is always {constant!r}); retrain it")
    options["local_conv"] = options.pop("local", False)
    weights = upgrade_weights(checkpoint["model"], options)
    upgraded = dict(checkpoint, version=2, options=options, model=weights)
    # a version 1 run cannot be resumed
    upgraded.pop("optimizer", None)
    return upgraded


def upgrade_weights(weights, options):
    """
    A state dict of version 1 -> one of version 2. Zeros stand in for biases and positions that some
    pretrained parts used to lack; DINOv2's LayerScale is folded into the layer before it.
    """
    renamed = dict(RENAMED)
    if options.get("encoder_family", "own") != "own":
        renamed["encoder.stem."] = "encoder.stem.patches."
    upgraded = {}
    for name, tensor in weights.items():
        for old, new in renamed.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        upgraded[name] = tensor
    for name in list(upgraded):
        layer = name.removesuffix(".weight")
        if re.search(r"\.(attention|mlp|stem)\.\w+\.weight$", name):
            upgraded.setdefault(f"{layer}.bias", torch.zeros(len(upgraded[name])))
    for old, new in (("scale1", "attention.proj"), ("scale2", "mlp.proj")):
        for name in [name for name in upgraded if name.endswith(old)]:
            layer = name.replace(old, new)
            scale = upgraded.pop(name).float()
            upgraded[f"{layer}.weight"] = upgraded[f"{layer}.weight"] * scale[:, None]
            upgraded[f"{layer}.bias"] = upgraded[f"{layer}.bias"] * scale
    if options.get("decoder_family") == "falcon":
        upgraded["wpe.weight"] = torch.zeros(options["block_size"], options["n_embd"])
    return upgraded


def make_model(options, vocab_size, mean=(0.5,) * 3, std=(0.25,) * 3, ids=None,
               frozen_dtype=torch.float32):
    """
    The Captioner that train.py's options ask for, on the CPU. ids and frozen_dtype: see
    pretrained.assemble. Raises UserError if it cannot be built.
    """
    own = options.encoder_family == options.decoder_family == "own"
    try:
        if own and not options.encoder and not options.decoder:
            return Captioner(options, vocab_size, mean, std)
        # imported here so that sample.py starts faster
        from pretrained import assemble
        return assemble(options, vocab_size, mean, std, ids, frozen_dtype)
    except ValueError as error:
        raise UserError(str(error)) from None


def frozen_names(model):
    """
    The names of the frozen parameters that checkpoints leave out, because they can be loaded again
    from options.encoder or options.decoder.
    """
    names = set()
    for name, p in model.named_parameters():
        part = "encoder" if name.startswith("encoder.") else "decoder"
        if not p.requires_grad and getattr(model.options, part, ""):
            names.add(name)
    return names


def restore(model, weights, frozen=None):
    """
    Loads a checkpoint's weights into a model. frozen: names of those that the checkpoint lacks and
    the model already has (None: frozen_names(model)). Raises UserError if the weights do not fit.
    """
    if frozen is None:
        frozen = frozen_names(model)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        wrong = unexpected + [name for name in missing if name not in frozen]
        if wrong:
            raise RuntimeError(", ".join(wrong[:3]))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's weights do not fit its options: {reason}") from None


def check_sources(model, checkpoint):
    """Raises UserError if a frozen part's weights changed since the checkpoint was trained."""
    for part, expected in checkpoint.get("source_hashes", {}).items():
        if model.source_hashes[part] != expected:
            raise UserError(f"the {part}'s weights in {getattr(model.options, part)} are not the "
                            "ones the checkpoint was trained with; restore the original ones")


def build(checkpoint):
    """A checkpoint's dict -> its Captioner, on the CPU, in eval mode, with LoRA merged."""
    options = ModelOptions()
    for name, value in {**PRETRAINED, **checkpoint["options"]}.items():
        setattr(options, name, value)
    # parts that were trained are complete in the checkpoint; do not load their pretrained weights
    if not options.freeze_encoder:
        options.encoder = ""
    if not options.lora_rank:
        options.decoder = ""
    weights = checkpoint["model"]
    vocab_size = checkpoint.get("vocab_size") or len(weights["wte.weight"])
    with SkipInit():
        model = make_model(options, vocab_size, ids=checkpoint["tokenizer"].get("ids"))
    check_sources(model, checkpoint)
    restore(model, weights)
    if options.lora_rank:
        from pretrained import merge_lora
        merge_lora(model)
    return model.eval()


@dataclass
class LoadedCaptioner:
    """A captioner that is ready to use."""
    model: Captioner
    tokenizer: tiktoken.Encoding
    image_size: int  # pixels per side
    dtype: torch.dtype  # of matrix products
    beam: int = 3  # beam search's defaults for this checkpoint
    length_penalty: float = 0.5
    flickr_ids: set = field(default_factory=set)  # of its training images; see flickr_hash


def load(path=BUNDLED, device="auto", dtype="auto", n_row=1):
    """
    Loads the captioner in a checkpoint or its folder; see pick_device and pick_dtype. n_row: how
    many captions (images times beams) it will generate at a time. CPUs may be faster in float32 for
    a few and in bfloat16 for many.
    """
    checkpoint = read_checkpoint(path)
    device = pick_device(device)
    dtype, _ = pick_dtype(dtype, device, n_row)
    try:
        saved = checkpoint["tokenizer"]
        tokenizer = make_tokenizer(text_to_ranks(saved["ranks"]), saved["pattern"])
        model = build(checkpoint).to(device)
        flickr_ids = set(checkpoint["flickr_ids"].tolist()) if "flickr_ids" in checkpoint else set()
        captioner = LoadedCaptioner(model, tokenizer, model.options.image_size, dtype,
                                    flickr_ids=flickr_ids, **checkpoint.get("search", {}))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if dtype != torch.float32:
        cast_weights(model, dtype)
    return captioner


# -----------------------------------------------------------------------------
# training

def find_start(options, source, data, rank=0):
    """
    Reads what options.init_from names. Returns (checkpoint or None, whether to resume it).

    Sets the options that the checkpoint's weights fix. Raises UserError if the command line (or,
    when resuming, the config) contradicts them. source: {option: where it was set}.
    """
    last = Path(options.out_dir, "last.pt")
    best = last.with_name("best.pt")
    resume = options.init_from == "resume"
    existing = [path for path in (last, best) if path.exists()]
    if existing and not resume and not options.force:
        hint = "--init_from=resume to continue, " if last.exists() else ""
        raise UserError(f"{existing[0]} exists; use {hint}--force to start over, or another "
                        "--out_dir")
    if resume and existing == [best] and not last.with_name("log.jsonl").exists():
        raise UserError(f"cannot resume from {best} alone (no last.pt); "
                        f"--init_from={best} with another --out_dir fine-tunes it")
    if options.init_from == "scratch" or (resume and not last.exists()):
        if resume and rank == 0:
            print(f"no run to resume in {options.out_dir}; starting from scratch", flush=True)
        if options.samples and rank == 0:
            print("warning: self-critical training from random weights; --init_from=PATH starts "
                  "from a trained captioner", file=sys.stderr)
        return None, False

    path = last if resume else options.init_from
    checkpoint = read_checkpoint(path)
    if resume and "optimizer" not in checkpoint:
        raise UserError(f"{last} cannot be resumed: it has no optimizer state; "
                        f"--init_from={last} with another --out_dir starts from its weights")
    if checkpoint["tokenizer"]["ranks"] != data.tokenizer_text:
        raise UserError(f"{options.data_dir} was not prepared with the checkpoint's tokenizer; "
                        f"prepare it again with --tokenizer {path}")
    if resume and checkpoint["fingerprint"] != data.fingerprint:
        raise UserError(f"{last} was not trained on {options.data_dir} as it is now; pass the "
                        f"original --data_dir, or fine-tune with --init_from={last} and another "
                        "--out_dir")
    saved = checkpoint["options"]
    for name in sorted(ARCHITECTURE):
        wanted = getattr(options, name)
        value = saved.get(name, getattr(type(options), name))
        if name in ("encoder", "decoder"):
            value = absolute_source(value)
        explicit = source.get(name) == "command line" or (resume and name in source)
        if value != wanted and explicit:
            raise UserError(f"{name} is {wanted} here but {value} in the checkpoint; omit {name}")
        setattr(options, name, value)
    if resume:
        if options.dtype == "auto":
            options.dtype = saved["dtype"]
            source["dtype"] = "checkpoint"
        report_changes(options, saved, rank)
    return checkpoint, resume


def report_changes(options, saved, rank):
    """Prints which options of a resumed run differ from those in its checkpoint."""
    changes = []
    for name, old in saved.items():
        new = getattr(options, name, old)
        if new != old and name not in ("init_from", "force", "out_dir"):
            changes.append(f"{name}={new} (was {old})")
    if changes and rank == 0:
        print("changed options:", one_line(", ".join(changes)))


def about_run(options, data, model, parent):
    """The metadata of a run's checkpoints. parent: the checkpoint it starts from, or None."""
    tokenizer = dict(ranks=data.tokenizer_text, pattern=data.meta["pattern"], ids=data.token_ids)
    flickr_ids = {flickr_hash(name) for name in data.split("train").names} - {None}
    if parent and "flickr_ids" in parent:
        flickr_ids.update(parent["flickr_ids"].tolist())
    return dict(version=VERSION, options=asdict(options), vocab_size=data.vocab_size,
                tokenizer=tokenizer, fingerprint=data.fingerprint,
                source_hashes=getattr(model, "source_hashes", {}),
                search=(parent or {}).get("search", {}),
                flickr_ids=torch.tensor(sorted(flickr_ids), dtype=torch.int64))


def rank_facts(about, step):
    """
    What all ranks must agree on. The paths of data and pretrained parts may differ between
    machines; the contents of data and frozen parts may not.
    """
    facts = dict(about["options"], step=step, data=about["fingerprint"])
    return facts | dict(data_dir="", encoder="", decoder="") | about["source_hashes"]


def trained_weights(model, frozen):
    """The state dict without the frozen parameters."""
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def halve(weights):
    """A state dict in half precision, except for the mean and std of images."""
    return {name: t if name in ("mean", "std") else t.half() for name, t in weights.items()}


def save_last(about, model, teacher, optimizer, state):
    """Writes last.pt, from which a run resumes exactly. state: train.py's State."""
    frozen = frozen_names(model)
    checkpoint = dict(
        model=trained_weights(model, frozen),
        teacher=trained_weights(teacher, frozen),
        optimizer=optimizer.state_dict(),
        state=asdict(state),
        **about,
    )
    with atomic_write(Path(about["options"]["out_dir"], "last.pt")) as file:
        torch.save(checkpoint, file)


def save_best(about, candidate, model, **result):
    """
    Writes best.pt, in half precision. candidate: the student, which is model, or the teacher;
    result: which of them it is, the step and the scores.
    """
    weights = halve(trained_weights(candidate, frozen_names(model)))
    with atomic_write(Path(about["options"]["out_dir"], "best.pt")) as file:
        torch.save(dict(model=weights, **result, **about), file)


def resume_run(checkpoint, model, teacher, optimizer, options):
    """
    Restores teacher and optimizer from last.pt; model is restored already. Learning rates and
    weight decay come from options, not the checkpoint. Returns the saved state, a dict.
    """
    restore(teacher, checkpoint["teacher"], frozen_names(model))
    given = []
    for group in optimizer.param_groups:
        given.append({key: value for key, value in group.items() if key != "params"})
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except ValueError:
        raise UserError(f"{options.out_dir}/last.pt was trained with a different optimizer, "
                        "lr_scale or weight_decay; use the original ones") from None
    for group, settings in zip(optimizer.param_groups, given):
        group.update(settings)
    # free them: they have been copied into the models
    del checkpoint["model"], checkpoint["teacher"]
    return checkpoint["state"]
