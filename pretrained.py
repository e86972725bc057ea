"""
Other people's weights in our own code: encoders (ViT, DeiT, DINOv2, CLIP's vision tower) and decoders (GPT-2, Falcon) by the
name that they have on the Hugging Face hub, or from a folder of the same layout; and LoRA.

A family's architecture is a row of FAMILIES in model.py. Here, one function for each tells its sizes from config.json and maps
the names of its tensors to ours.
"""
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import common
from common import UserError, download
from model import FAMILIES, Captioner

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALISATION = {"vit": ((0.5,) * 3, (0.5,) * 3), "deit": IMAGENET, "dinov2": IMAGENET,
                 "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}  # where no file says it


# ---- files

def fetch(source):
    """A folder, or a name on the hub, whose files are downloaded into data/weights/NAME once -> the folder's Path."""
    if os.path.isdir(source):
        return Path(source)
    folder = Path(common.WEIGHTS, source)
    if not common.on_hub(source):
        raise UserError(f"{source}: neither a folder nor a name on the hub, such as gpt2 or facebook/dinov2-small")
    folder.mkdir(parents=True, exist_ok=True)

    def get(name):
        try:
            download(f"{common.HUB}/{source}/resolve/main/{name}", str(folder / name), token=os.environ.get("HF_TOKEN"))
            return True
        except OSError as error:
            if getattr(error, "status", None) == 404:
                return False
            raise

    if weight_files(folder):
        return folder
    if not get("config.json"):
        raise UserError(f"{source}: no such model on the hub (no config.json there)")
    get("preprocessor_config.json")  # which decoders don't have
    for name in "model.safetensors", "pytorch_model.bin":
        if not get(name) and get(f"{name}.index.json"):
            for shard in sorted(set(read_index(folder / f"{name}.index.json").values())):
                get(shard)
        if weight_files(folder):
            return folder
    raise UserError(f"{source}: holds neither a whole model.safetensors nor a whole pytorch_model.bin")


def weight_files(folder):
    """The files that hold a model's tensors, in whichever of the hub's layouts, if they are all there; else an empty list."""
    for name in "model.safetensors", "pytorch_model.bin":
        files, index = [folder / name], folder / f"{name}.index.json"
        if not files[0].exists() and index.exists():
            files = [folder / shard for shard in sorted(set(read_index(index).values()))]
        if all(file.exists() for file in files):
            return files
    return []


def read_index(path):
    """model.safetensors.index.json -> {tensor's name: the file beside it that holds it}"""
    try:
        files = json.loads(path.read_text())["weight_map"]
        if not all(re.fullmatch(r"[\w.-]+", file) for file in files.values()):
            raise ValueError("a shard's name is not a plain file name")
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index of shards: {error}") from None


def read_config(folder):
    """config.json's dict; CLIP's is that of its vision tower."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return {**config["vision_config"], "model_type": "clip_vision_model"} if config["model_type"] == "clip" else config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no config.json of a model ({type(error).__name__}: {error})") from None


def read_safetensors(path):
    """
    A .safetensors file (8 bytes: the header's length; JSON: name -> dtype, shape, data_offsets; the data) -> {name: tensor},
    memory-mapped: nothing is read before it is used. UserError where anything about it doesn't fit.
    """
    def check(ok, what):
        if not ok:
            raise UserError(f"{path} is damaged: {what}")

    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            check(size >= 8 and length <= min(size - 8, 100_000_000), f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header is no JSON ({error})") from None
    check(isinstance(header, dict), "its header is no JSON object")
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "c", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)  # private, never written
    tensors, at = {}, 0
    for name, entry in header.items():
        check(isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys(), f"{name} lacks dtype, shape or offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        check(isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES, f"{name} has the unknown dtype {entry['dtype']!r}")
        check(all(isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2 ** 62 for n in numbers) for numbers in (shape, offsets))
              and len(offsets) == 2, f"{name} has the shape {shape} and the offsets {offsets}")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
        check(begin == at, f"{name} begins at {begin:,}, where the tensor before it ends at {at:,}")
        check(end - begin == math.prod(shape) * dtype.itemsize, f"{name}: {end - begin:,} bytes for {shape} of {entry['dtype']}")
        check(end <= len(data), f"{name} ends at {end:,}, the data at {len(data):,}: the file is cut")
        part = torch.from_numpy(data[begin:end])
        tensors[name] = part.view(dtype).view(shape) if begin % dtype.itemsize == 0 else part.clone().view(dtype).view(shape)
        at = end
    check(at == len(data), f"{len(data) - at:,} bytes after the last tensor")
    return tensors


def read_weights(folder):
    """All tensors of a model's folder: {name: tensor}."""
    tensors = {}
    for file in weight_files(folder):
        tensors |= read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    if not tensors:
        raise UserError(f"{folder}: holds neither a whole model.safetensors nor a whole pytorch_model.bin")
    return tensors


def read_pickle(path):
    """pytorch_model.bin -> {name: tensor}; only tensors are unpickled, never code."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # files older than torch 1.6 can't be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
            raise ValueError("no dict of tensors")
        return tensors
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path} can't be read as weights ({type(error).__name__}: {str(error).splitlines()[0]})") from None


class Tensors:
    """A model's tensors, with the prefixes off that depend on which head it was saved with; knows which were not asked for."""

    def __init__(self, tensors, prefixes):
        strip = re.compile(f"^({'|'.join(prefixes)})")
        self.tensors = {strip.sub("", name): tensor for name, tensor in tensors.items()}
        self.left = set(self.tensors)

    def __call__(self, name):
        if name not in self.tensors:
            raise UserError(f"the weights lack {name}: they have {', '.join(sorted(self.tensors)[:3])} and others")
        self.left.discard(name)
        return self.tensors[name]


# ---- families: config.json -> our options; their tensors -> ours

GELU_TANH = "gelu_new", "gelu_pytorch_tanh"  # the same under two names


def expect(config, **wanted):
    """UserError where config.json says otherwise than the wanted value (or one of a tuple); what it doesn't say is as wanted."""
    for name, value in wanted.items():
        if name in config and config[name] not in (value if isinstance(value, tuple) else (value,)):
            raise UserError(f"a {config['model_type']} whose {name} is {config[name]!r}: only {value!r} is supported")


def vit_options(config):
    """ViT, DeiT, DINOv2 and CLIP's vision tower."""
    family = {"clip_vision_model": "clip"}.get(config["model_type"], config["model_type"])
    expect(config, use_swiglu_ffn=False, mlp_ratio=4, intermediate_size=4 * config["hidden_size"], qkv_bias=True,
           hidden_act="quick_gelu" if family == "clip" else "gelu", layer_norm_eps=FAMILIES[family]["eps"])
    return dict(encoder_family=family, stem="patch", patch_size=config["patch_size"], n_layer_encoder=config["num_hidden_layers"],
                n_head_encoder=config["num_attention_heads"], n_embd_encoder=config["hidden_size"])


def vit_weights(tensors, options):
    """{our name within the encoder: tensor}"""
    family = options.encoder_family
    T = Tensors(tensors, ("vit\\.", "deit\\.", "dinov2\\.", "vision_model\\."))
    clip, dino = family == "clip", family == "dinov2"
    embeddings = "embeddings.patch_embedding" if clip else "embeddings.patch_embeddings.projection"
    tokens = [T("embeddings.class_embedding" if clip else "embeddings.cls_token").flatten()]
    if family == "deit":
        tokens.append(T("embeddings.distillation_token").flatten())
    positions = T("embeddings.position_embedding.weight" if clip else "embeddings.position_embeddings").squeeze(0)
    ours = {"class_tokens": torch.stack(tokens), "positions": resize_positions(positions, len(tokens), options),
            "stem.weight": T(f"{embeddings}.weight").permute(0, 2, 3, 1).flatten(1)}  # a patch's pixels, channels last
    names = {"stem.bias": None if clip else f"{embeddings}.bias"}
    if clip:
        names |= {f"norm_first.{part}": f"pre_layrnorm.{part}" for part in ("weight", "bias")}
    else:
        names |= {f"norm.{part}": f"layernorm.{part}" for part in ("weight", "bias")}
    for i in range(options.n_layer_encoder):
        theirs = f"encoder.layers.{i}" if clip else f"encoder.layer.{i}"
        attention = f"{theirs}.self_attn" if clip else f"{theirs}.attention.attention"
        q, k, v = ("q_proj", "k_proj", "v_proj") if clip else ("query", "key", "value")
        layers = {"norm1": f"{theirs}.layer_norm1" if clip else f"{theirs}.norm1" if dino else f"{theirs}.layernorm_before",
                  "norm2": f"{theirs}.layer_norm2" if clip else f"{theirs}.norm2" if dino else f"{theirs}.layernorm_after",
                  "attention.proj": f"{attention}.out_proj" if clip else f"{theirs}.attention.output.dense",
                  "mlp.fc": f"{theirs}.mlp.fc1" if clip or dino else f"{theirs}.intermediate.dense",
                  "mlp.proj": f"{theirs}.mlp.fc2" if clip or dino else f"{theirs}.output.dense"}
        for part in ("weight", "bias"):
            names |= {f"blocks.{i}.{name}.{part}": f"{other}.{part}" for name, other in layers.items()}
            ours[f"blocks.{i}.attention.qkv.{part}"] = torch.cat([T(f"{attention}.{x}.{part}") for x in (q, k, v)])
        if dino:
            names |= {f"blocks.{i}.scale{n}": f"{theirs}.layer_scale{n}.lambda1" for n in (1, 2)}
    ours |= {name: T(other) for name, other in names.items() if other}
    return ours, T, r"pooler|classifier|mask_token|post_layernorm|text_|visual_projection|logit_scale|position_ids"


def resize_positions(positions, n_class, options):
    """Learned positions (n_class + g², C) of a g × g grid -> (n_class + n_patch, C) of ours, bicubic as transformers does."""
    grid = math.isqrt(max(len(positions) - n_class, 1))
    new = options.image_size // options.patch_size
    if grid == new:
        return positions
    square = positions[n_class:].float().T.reshape(1, -1, grid, grid)
    square = F.interpolate(square, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:n_class].float(), square[0].flatten(1).T])


def gpt2_options(config):
    """GPT-2 and DistilGPT-2."""
    expect(config, activation_function=GELU_TANH, layer_norm_epsilon=1e-5, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True,
           n_inner=(None, 4 * config["n_embd"]), tie_word_embeddings=True)
    return dict(decoder_family="gpt2", n_layer_decoder=config["n_layer"], n_head=config["n_head"], n_embd=config["n_embd"]), \
        config["vocab_size"]


def gpt2_weights(tensors, options):
    """{our name: tensor}; its linear layers are stored as (in, out)."""
    T = Tensors(tensors, ("transformer\\.",))
    ours = {"wte.weight": T("wte.weight"), "wpe.weight": T("wpe.weight")[:options.block_size], "norm.weight": T("ln_f.weight"),
            "norm.bias": T("ln_f.bias")}
    for i in range(options.n_layer_decoder):
        for name, other in {"norm1": "ln_1", "norm2": "ln_2", "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj",
                            "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}.items():
            for part in ("weight", "bias"):
                tensor = T(f"h.{i}.{other}.{part}")
                ours[f"blocks.{i}.{name}.{part}"] = tensor.T if tensor.ndim == 2 else tensor
    return ours, T, r"lm_head|attn\.bias|attn\.masked_bias"


def falcon_options(config):
    """falcon-7b and models built like it: rotary, multi-query, parallel."""
    expect(config, new_decoder_architecture=False, alibi=False, bias=False, multi_query=True, parallel_attn=True, activation="gelu",
           layer_norm_epsilon=1e-5, tie_word_embeddings=True, ffn_hidden_size=4 * config["hidden_size"], rope_theta=10000.0)
    expect({"model_type": "falcon", **(config.get("rope_parameters") or {})}, rope_type="default", rope_theta=10000.0)
    n_layer, n_head = (config.get(a, config.get(b)) for a, b in (("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head")))
    return dict(decoder_family="falcon", n_layer_decoder=n_layer, n_head=n_head, n_embd=config["hidden_size"]), \
        config["vocab_size"]


def falcon_weights(tensors, options):
    """{our name: tensor}"""
    T = Tensors(tensors, ("transformer\\.",))
    ours = {"wte.weight": T("word_embeddings.weight"), "norm.weight": T("ln_f.weight"), "norm.bias": T("ln_f.bias")}
    for i in range(options.n_layer_decoder):
        names = {"norm1.weight": "input_layernorm.weight", "norm1.bias": "input_layernorm.bias",
                 "attention.qkv.weight": "self_attention.query_key_value.weight", "attention.proj.weight": "self_attention.dense.weight",
                 "mlp.fc.weight": "mlp.dense_h_to_4h.weight", "mlp.proj.weight": "mlp.dense_4h_to_h.weight"}
        ours |= {f"blocks.{i}.{name}": T(f"h.{i}.{other}") for name, other in names.items()}
    return ours, T, r"lm_head|rotary_emb"


# model_type in config.json: (options, weights)
ENCODERS = {"vit": (vit_options, vit_weights), "deit": (vit_options, vit_weights), "dinov2": (vit_options, vit_weights),
            "clip_vision_model": (vit_options, vit_weights)}
DECODERS = {"gpt2": (gpt2_options, gpt2_weights), "falcon": (falcon_options, falcon_weights)}


def find(config, families, what):
    """The pair of functions for a config.json's model_type; UserError for one that is not known."""
    if config["model_type"] not in families:
        raise UserError(f"a model of type {config['model_type']!r} can't be the {what}: expected {', '.join(families)}")
    return families[config["model_type"]]


def check_fit(module, found, source):
    """-> {our name: tensor}; UserError that lists what is unexpected or of another shape than the module's."""
    ours, T, ignored = found
    if unexpected := sorted(name for name in T.left if not re.search(ignored, name)):
        raise UserError(f"{source} holds {len(unexpected)} tensors that have no place: {', '.join(unexpected[:5])}")
    parameters = dict(module.named_parameters())
    for name, tensor in ours.items():
        if parameters[name].shape != tensor.shape:
            raise UserError(f"{source}: {name} has the shape {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}")
    return ours


def part_options(encoder="", decoder=""):
    """
    What an encoder and a decoder, hub names or folders, fix -> (model options, the vocabulary of the decoder or None, the mean
    and deviation that the encoder's pictures had or None). Downloads them.
    """
    fixed, vocab_size, normalisation = {}, None, None
    try:
        if encoder:
            folder = fetch(encoder)
            config = read_config(folder)
            fixed |= find(config, ENCODERS, "encoder")[0](config)
            pixels = folder / "preprocessor_config.json"
            pixels = json.loads(pixels.read_text()) if pixels.exists() else {}
            default = NORMALISATION.get(fixed["encoder_family"], IMAGENET)
            normalisation = pixels.get("image_mean", default[0]), pixels.get("image_std", default[1])
        if decoder:
            config = read_config(fetch(decoder))
            decoder_options, vocab_size = find(config, DECODERS, "decoder")[0](config)
            fixed |= decoder_options
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{encoder} {decoder}: config.json or preprocessor_config.json lacks something or is damaged "
                        f"({type(error).__name__}: {error})") from None
    return fixed, vocab_size, normalisation


def load_parts(model, encoder="", decoder="", ids=None):
    """
    The weights that an encoder and a decoder have for a Captioner (which may be on the meta device): {parameter's name: tensor},
    mapped from the files where they can be. ids: which rows of the decoder's vocabulary the model's tokens are (None: all).
    """
    loaded = {}
    try:
        if encoder:
            folder = fetch(encoder)
            found = find(read_config(folder), ENCODERS, "encoder")[1](read_weights(folder), model.options)
            loaded |= {f"encoder.{name}": tensor for name, tensor in check_fit(model.encoder, found, encoder).items()}
        if decoder:
            folder = fetch(decoder)
            ours, T, ignored = find(read_config(folder), DECODERS, "decoder")[1](read_weights(folder), model.options)
            if ids is not None:
                ours["wte.weight"] = ours["wte.weight"][torch.tensor(ids)]
            loaded |= check_fit(model, (ours, T, ignored), decoder)
    except (RuntimeError, IndexError) as error:
        raise UserError(f"{folder}: tensors of other shapes than config.json says: {' '.join(str(error).split())[:200]}") from None
    return loaded


def assemble(options, vocab_size, mean=(0.5,) * 3, std=(0.25,) * 3, ids=None, frozen_dtype=torch.float32):
    """
    A Captioner of pretrained parts, as options (train.py's Options or what a checkpoint holds of them) say: encoder, decoder,
    freeze_encoder, lora_rank and its like. With LoRA the decoder's own weights are frozen. Cross-attention that is added to a
    pretrained decoder starts as the identity: before the first step the decoder still is the language model. Nothing is held
    twice: the model is built without memory, then takes each tensor as it comes, a frozen one in frozen_dtype.
    """
    _, decoder_vocab, normalisation = part_options(options.encoder, options.decoder)
    if options.decoder and (len(ids) if ids and max(ids) < decoder_vocab else decoder_vocab) != vocab_size:
        raise UserError(f"{options.decoder} has {decoder_vocab:,} tokens and the data's tokenizer {vocab_size:,}: prepare the data with "
                        f"--tokenizer {options.decoder}, and --keep_used for only those that its captions use")
    with torch.device("meta"):
        model = Captioner(options, vocab_size, *(normalisation or (mean, std)))
    loaded, drawn = load_parts(model, options.encoder, options.decoder, ids), {}
    for name, p in list(model.named_parameters()):
        frozen = name in loaded and bool(options.freeze_encoder if name.startswith("encoder.") else options.lora_rank)
        tensor = loaded.pop(name, None)
        if tensor is None:
            p = drawn[name] = nn.Parameter(torch.empty(p.shape))
        elif frozen:
            p = nn.Parameter(tensor.to(frozen_dtype), requires_grad=False)
        else:
            p = nn.Parameter(tensor.to(torch.float32, copy=True).contiguous())
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, p)
    model.draw(drawn)
    if options.decoder:
        for block in model.blocks:
            if block.has_cross:
                nn.init.zeros_(block.cross.proj.weight)
    if options.lora_rank:
        add_lora(model, options.lora_targets, options.lora_rank, options.lora_alpha, options.lora_dropout)
    return model


# ---- LoRA

class LoRA(nn.Module):
    """A frozen linear layer and what is learned beside it: y = W x + b + alpha / rank · B A x (arXiv 2106.09685); B is 0 at first."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.scale, self.dropout = base.requires_grad_(False), alpha / rank, nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(self.dropout(x), self.A), self.B) * self.scale


def add_lora(model, pattern, rank, alpha, dropout=0.0):
    """Puts a LoRA in the place of each linear layer of the decoder's blocks whose name matches pattern, a regular expression."""
    targets = [name for name, module in model.named_modules()
               if isinstance(module, nn.Linear) and name.startswith("blocks.") and "cross" not in name and re.search(pattern, name)]
    if not targets:
        raise UserError(f"lora_targets {pattern!r} matches no linear layer of the decoder, such as blocks.0.attention.qkv")
    for name in targets:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRA(model.get_submodule(name), rank, alpha, dropout))


@torch.no_grad()
def merge_lora(model):
    """Adds each LoRA to the layer it stands beside: the same function, with nothing more to compute."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            module.base.weight += (module.B @ module.A * module.scale).to(module.base.weight.dtype)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base)
