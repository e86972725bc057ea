"""
Pretrained encoders (ViT, DeiT, DINOv2, CLIP, EfficientNet-Lite), decoders (GPT-2, Falcon), LoRA.

A source is a model's name on the Hugging Face hub, or a folder with the same files; for the weights
of EfficientNet-Lite, see nanocaption/efficientnet.py. To add an architecture, write a class like
the ones below and list it in ENCODERS or DECODERS. It has

    sizes(config)               the model options that its config.json sets (not for EfficientNet)
    build(options)              encoders: an Encoder that computes what the original does
    block, adapt(model)         decoders: a class to use instead of Block; makes any other changes
    weights(tensors, options)   pops the original tensors from a dict, returns them under our names
    mean, std                   encoders: normalization, if there is no preprocessor_config.json

load_part converts the weights and refuses missing, misshapen and unexpected tensors; assemble puts
everything together.
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import (Block, Captioner, Encoder, attention, merge_heads, patch_grid, patchify,
                   split_heads)
from nanocaption import efficientnet
from nanocaption.cli import UserError
from nanocaption.weights import (SkipInit, fetch_model, hash_tensors, read_json, read_pickle,
                                 read_weights)

LORA_ALPHA = 16
# prefixes of names: a HybridEncoder's pretrained weights, and other encoders' new ones
NETWORK = ("encoder.network.", "encoder.stem.last.")
POOLING = ("encoder.queries", "encoder.pool.", "encoder.norm_pool.")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# removed from tensors' names: they depend on the wrapper that a model was saved in
PREFIXES = re.compile(
    r"^((vit|deit|dinov2|vision_model|transformer|model|base_model|module|_orig_mod)\.)+")
# tensors that a captioner does not need
UNUSED = re.compile(
    r"pooler|classifier|mask_token|post_layernorm|text_|visual_projection|logit_scale"
    r"|position_ids|lm_head|attn\.(masked_)?bias|rotary_emb|^_fc\."
)


def expect(config, **wanted):
    """Raises ValueError if config, a dict, sets a name to another value; a tuple allows several."""
    for name, values in wanted.items():
        if not isinstance(values, tuple):
            values = (values,)
        if name in config and config[name] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise ValueError(f"{name} is {config[name]!r}, but only {expected} is supported")


def move(tensors, theirs, weights, ours):
    """Moves a module's weight and bias from their name to ours."""
    for part in ("weight", "bias"):
        weights[f"{ours}.{part}"] = tensors.pop(f"{theirs}.{part}")


# -----------------------------------------------------------------------------
# encoders: ViT and its relatives

# {our name: theirs}; norm1 and everything after it are inside a block
VIT_NAMES = {
    "stem.class_tokens": ["embeddings.cls_token"],
    "stem.positions": "embeddings.position_embeddings",
    "stem.patches": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "blocks": "encoder.layer",
    "norm1": "layernorm_before",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "attention.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc": "intermediate.dense",
    "mlp.proj": "output.dense",
}
DEIT_NAMES = {
    **VIT_NAMES,
    "stem.class_tokens": ["embeddings.cls_token", "embeddings.distillation_token"],
}
DINOV2_NAMES = {
    **VIT_NAMES,
    "norm1": "norm1",
    "scale1": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
    "scale2": "layer_scale2.lambda1",
}
CLIP_NAMES = {
    "stem.class_tokens": ["embeddings.class_embedding"],
    "stem.positions": "embeddings.position_embedding.weight",
    "stem.patches": "embeddings.patch_embedding",
    "stem.norm": "pre_layrnorm",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attention.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
}
# the defaults of transformers, which leaves them out of CLIP's config.json
CLIP_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                     num_attention_heads=12, patch_size=32)


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ViTStem(nn.Module):
    """Class tokens and patches, with learned positions; CLIP adds a LayerNorm."""

    def __init__(self, options, n_class, norm):
        super().__init__()
        C = options.encoder_width
        self.patch_size = options.patch_size
        grid = patch_grid(options.image_size, options.patch_size)
        self.n_patch = n_class + grid * grid
        self.patches = nn.Linear(3 * options.patch_size ** 2, C)
        self.class_tokens = nn.Parameter(torch.empty(n_class, C))
        self.positions = nn.Parameter(torch.empty(self.n_patch, C))
        self.norm = nn.LayerNorm(C) if norm else nn.Identity()

    def forward(self, images):
        x = self.patches(patchify(images, self.patch_size))
        class_tokens = self.class_tokens.expand(len(x), -1, -1)
        x = torch.cat([class_tokens, x], dim=1)  # (B, n_patch, C)
        return self.norm(x + self.positions)


@dataclass
class ViT:
    """A ViT, or a relative of it: how it differs from our encoder, and the names of its parts."""
    family: str
    names: dict
    eps: float = 1e-12  # of the norms
    activation: str = "gelu"
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD

    def sizes(self, config):
        width = config["hidden_size"]
        expect(config, hidden_act=self.activation, layer_norm_eps=self.eps, mlp_ratio=4,
               intermediate_size=4 * width, qkv_bias=True, use_swiglu_ffn=False)
        return dict(
            encoder_family=self.family,
            patch_size=one_side(config["patch_size"]),
            n_layer_encoder=config["num_hidden_layers"],
            n_head_encoder=config["num_attention_heads"],
            n_embd_encoder=width,
        )

    def build(self, options):
        n_class = len(self.names["stem.class_tokens"])
        stem = ViTStem(options, n_class, norm="stem.norm" in self.names)
        encoder = Encoder(options, stem)
        if "norm" not in self.names:
            # CLIP's last norm applies only to its pooled output, the class token
            encoder.norm = nn.Identity()
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = self.eps
        if self.activation == "quick_gelu":
            for block in encoder.blocks:
                block.mlp.activation = QuickGELU()
        return encoder

    def weights(self, tensors, options):
        names = self.names
        class_tokens = [tensors.pop(name).flatten() for name in names["stem.class_tokens"]]
        positions = tensors.pop(names["stem.positions"]).squeeze(0)
        kernel = tensors.pop(names["stem.patches"] + ".weight")  # (C, 3, p, p)
        # CLIP has no bias here
        bias = tensors.pop(names["stem.patches"] + ".bias", torch.zeros(len(kernel)))
        weights = {
            "stem.class_tokens": torch.stack(class_tokens),
            "stem.positions": resize_positions(positions, len(class_tokens), options),
            "stem.patches.weight": kernel.permute(0, 2, 3, 1).flatten(1),  # as patchify orders them
            "stem.patches.bias": bias,
        }
        for name in ("stem.norm", "norm"):
            if name in names:
                move(tensors, names[name], weights, name)
        for i in range(options.n_layer_encoder):
            theirs = f"{names['blocks']}.{i}."
            ours = f"blocks.{i}."
            for name in ("norm1", "attention.proj", "norm2", "mlp.fc", "mlp.proj"):
                move(tensors, theirs + names[name], weights, ours + name)
            for part in ("weight", "bias"):
                qkv = [tensors.pop(f"{theirs}{names[name]}.{part}") for name in "qkv"]
                weights[f"{ours}attention.qkv.{part}"] = torch.cat(qkv)
            if "scale1" in names:
                fold_scale(weights, ours + "attention.proj", tensors.pop(theirs + names["scale1"]))
                fold_scale(weights, ours + "mlp.proj", tensors.pop(theirs + names["scale2"]))
        return weights


def one_side(size):
    """[8, 8] -> 8; anything else stays as it is."""
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        return size[0]
    return size


def fold_scale(weights, name, scale):
    """Folds LayerScale, scale (C,), into the linear layer before it."""
    scale = scale.float()
    weights[f"{name}.weight"] = weights[f"{name}.weight"] * scale[:, None]
    weights[f"{name}.bias"] = weights[f"{name}.bias"] * scale


def resize_positions(positions, n_class, options):
    """
    Learned positions of class tokens and a square grid, (n_class + g * g, C) -> the same for our
    grid, interpolated as transformers does.
    """
    old = math.isqrt(max(len(positions) - n_class, 1))
    new = options.image_size // options.patch_size
    if old == new:
        return positions
    positions = positions.float()
    grid = positions[n_class:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:n_class], grid[0].flatten(1).T])


# -----------------------------------------------------------------------------
# encoders: our blocks on a convolutional network

class FeatureEmbedding(nn.Module):
    """
    The stem of a hybrid encoder: features (B, N, n_feature) -> (B, N, C), with learned positions.
    It includes the network's last 1x1 convolution, because stored features are smaller before it.
    """

    def __init__(self, n_feature, n_patch, n_embd):
        super().__init__()
        self.n_patch = n_patch
        self.last = nn.Linear(n_feature, efficientnet.N_LAST)
        self.norm = nn.LayerNorm(efficientnet.N_LAST)
        self.linear = nn.Linear(efficientnet.N_LAST, n_embd)
        self.positions = nn.Parameter(torch.empty(n_patch, n_embd))

    def forward(self, features):
        x = F.relu6(self.last(features))
        return self.linear(self.norm(x)) + self.positions


class HybridEncoder(Encoder):
    """
    Our transformer blocks on the feature map of a convolutional network, which takes the place of
    the patches (arXiv 2010.11929, section 3.1). freeze_encoder freezes the network except for its
    tuned_names: features runs the blocks before the last tune_blocks, and head runs all the rest.
    """

    def __init__(self, options):
        network = efficientnet.EfficientNetLite(options.encoder_family)
        grid = -(-options.image_size // efficientnet.STRIDE)
        stem = FeatureEmbedding(network.n_channel, grid * grid, options.encoder_width)
        super().__init__(options, stem)
        self.network = network
        self.n_frozen = len(network.blocks) - getattr(options, "tune_blocks", 0)
        if self.n_frozen < 0:
            raise ValueError(f"tune_blocks is {options.tune_blocks}, but {options.encoder_family} "
                             f"has {len(network.blocks)} blocks")

    def features(self, images):
        # the first layers' activations are large: on CPUs, two images at a time are as fast, and
        # serve.py's memory does not grow
        n = 2 if images.device.type == "cpu" else len(images)
        # without autocast, as stored features are computed
        with torch.autocast(images.device.type, enabled=False):
            parts = images.float().split(n)
            x = torch.cat([self.network.first(part, self.n_frozen) for part in parts])
        return x.flatten(2).transpose(1, 2)  # (B, places, channels)

    def head(self, features):
        grid = math.isqrt(features.size(1))
        x = features.transpose(1, 2).unflatten(2, (grid, grid))
        x = self.network.rest(x, self.n_frozen)
        x = x.flatten(2).transpose(1, 2)  # (B, N, n_feature)
        # here the feature map goes through Encoder.features: our stem, blocks and norm
        return super().head(super().features(x))

    def tuned_names(self):
        """The names of the network's parameters that are trained with freeze_encoder."""
        names = set()
        for i in range(self.n_frozen, len(self.network.blocks)):
            # not depthwise kernels: on CPUs their gradient takes longer than all the rest
            for part in ("expand", "project"):
                names.add(f"encoder.network.blocks.{i}.{part}.weight")
                names.add(f"encoder.network.blocks.{i}.{part}.bias")
        if names:
            names |= {"encoder.stem.last.weight", "encoder.stem.last.bias"}
        return names


class EfficientNet:
    """EfficientNet-Lite 0, 1 or 2; see nanocaption/efficientnet.py."""
    mean = efficientnet.MEAN
    std = efficientnet.STD

    def build(self, options):
        return HybridEncoder(options)

    def weights(self, tensors, options):
        weights = {}
        for name, tensor in efficientnet.convert(tensors).items():
            if name.startswith("last."):
                weights[f"stem.{name}"] = tensor.flatten(1) if tensor.ndim == 4 else tensor
            else:
                weights[f"network.{name}"] = tensor
        return weights


def is_efficientnet(source):
    """Whether source is an EfficientNet-Lite: efficientnet_lite2 or efficientnet_lite2:FILE."""
    return source.startswith("efficientnet")


# by encoder_family: the model_type in config.json, or the name of an EfficientNet-Lite
ENCODERS = {
    **{name: EfficientNet() for name in efficientnet.IMAGE_SIZES},
    # arXiv 2010.11929
    "vit": ViT("vit", VIT_NAMES, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    # arXiv 2012.12877
    "deit": ViT("deit", DEIT_NAMES),
    # arXiv 2304.07193
    "dinov2": ViT("dinov2", DINOV2_NAMES, eps=1e-6),
    # arXiv 2103.00020
    "clip": ViT("clip", CLIP_NAMES, eps=1e-5, activation="quick_gelu",
                mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711)),
}


# -----------------------------------------------------------------------------
# decoders: GPT-2

def pop_embedding(tensors, name):
    """Pops the token embedding, which may be saved as the output layer that it is tied to."""
    if name not in tensors and "lm_head.weight" in tensors:
        name = "lm_head.weight"
    return tensors.pop(name)


GPT2_NAMES = {
    "norm1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}


class GPT2:
    """GPT-2 and DistilGPT-2: our decoder with the tanh approximation of GELU."""
    block = Block

    def sizes(self, config):
        width = config["n_embd"]
        expect(config, activation_function=("gelu_new", "gelu_pytorch_tanh"),
               layer_norm_epsilon=1e-5, n_inner=(None, 4 * width), tie_word_embeddings=True,
               scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        return dict(
            decoder_family="gpt2",
            n_layer_decoder=config["n_layer"],
            n_head=config["n_head"],
            n_embd=width,
        )

    def adapt(self, model):
        for block in model.blocks:
            block.mlp.activation = nn.GELU(approximate="tanh")

    def weights(self, tensors, options):
        weights = {
            "wte.weight": pop_embedding(tensors, "wte.weight"),
            "wpe.weight": tensors.pop("wpe.weight")[:options.block_size],
        }
        move(tensors, "ln_f", weights, "norm")
        for i in range(options.n_layer_decoder):
            for ours, theirs in GPT2_NAMES.items():
                move(tensors, f"h.{i}.{theirs}", weights, f"blocks.{i}.{ours}")
                if "norm" not in ours:
                    # transformers' Conv1D stores (in, out)
                    name = f"blocks.{i}.{ours}.weight"
                    weights[name] = weights[name].T
        return weights


# -----------------------------------------------------------------------------
# decoders: Falcon

FALCON_NAMES = {
    "attention.qkv": "self_attention.query_key_value",
    "attention.proj": "self_attention.dense",
    "mlp.fc": "mlp.dense_h_to_4h",
    "mlp.proj": "mlp.dense_4h_to_h",
}


def rotate(x, position):
    """
    Rotary position embedding (RoPE, arXiv 2104.09864) of x (B, H, T, D); position: int64 (T,) or
    (B, 1, T).
    """
    D = x.size(-1)
    frequency = 10000 ** (-torch.arange(0, D, 2, device=x.device) / D)
    angle = position[..., None] * frequency  # (T, D / 2) or (B, 1, T, D / 2)
    cos = angle.cos()
    sin = angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class FalconAttention(nn.Module):
    """Multi-query attention (arXiv 1911.02150): all heads share one head of keys and values."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.head_size = n_embd // n_head
        self.qkv = nn.Linear(n_embd, n_embd + 2 * self.head_size)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, mask=None, cache=None):
        D = self.head_size
        q, k, v = self.qkv(x).split([self.n_head * D, D, D], dim=-1)
        q = split_heads(q, self.n_head)
        k = split_heads(k, 1)
        v = split_heads(v, 1)
        if mask is not None:
            # the number of earlier tokens that a token sees: the prefix and its own caption
            position = mask.tril().sum(-1) - 1  # (B, 1, T)
        else:
            past = 0
            if cache is not None and cache.k is not None:
                past = cache.k.size(2)
            position = torch.arange(past, past + x.size(1), device=x.device)
        q = rotate(q, position)
        k = rotate(k, position)
        if cache is not None:
            k, v = cache.append(k, v)
        k = k.expand(-1, self.n_head, -1, -1)
        v = v.expand(-1, self.n_head, -1, -1)
        y = attention(q, k, v, mask)
        return self.proj(merge_heads(y))


class FalconBlock(Block):
    """Attention and MLP in parallel, after the cross-attention that we add."""

    def __init__(self, n_embd, n_head, dropout, cross_width=0):
        super().__init__(n_embd, n_head, dropout, cross_width)
        self.attention = FalconAttention(n_embd, n_head)
        del self.norm2

    def forward(self, x, image_kv=None, mask=None, cache=None):
        if image_kv is not None:
            x = x + self.dropout(self.cross(self.norm_cross(x), image_kv))
        normed = self.norm1(x)
        y = self.attention(normed, mask, cache) + self.mlp(normed)
        return x + self.dropout(y)


class Falcon:
    """
    Falcon-7B's architecture (arXiv 2311.16867). It has no learned positions and no biases in linear
    layers: ours are zeros, and LoRA keeps them frozen.
    """
    block = FalconBlock

    def sizes(self, config):
        width = config["hidden_size"]
        expect(config, activation="gelu", alibi=False, bias=False, multi_query=True,
               parallel_attn=True, new_decoder_architecture=False, layer_norm_epsilon=1e-5,
               ffn_hidden_size=4 * width, tie_word_embeddings=True, rope_theta=10000.0)
        expect(config.get("rope_parameters") or {}, rope_type="default", rope_theta=10000.0)
        return dict(
            decoder_family="falcon",
            n_layer_decoder=config.get("num_hidden_layers", config.get("n_layer")),
            n_head=config.get("num_attention_heads", config.get("n_head")),
            n_embd=width,
        )

    def adapt(self, model):
        pass

    def weights(self, tensors, options):
        weights = {
            "wte.weight": pop_embedding(tensors, "word_embeddings.weight"),
            "wpe.weight": torch.zeros(options.block_size, options.n_embd),
        }
        move(tensors, "ln_f", weights, "norm")
        for i in range(options.n_layer_decoder):
            move(tensors, f"h.{i}.input_layernorm", weights, f"blocks.{i}.norm1")
            for ours, theirs in FALCON_NAMES.items():
                weight = tensors.pop(f"h.{i}.{theirs}.weight")
                weights[f"blocks.{i}.{ours}.weight"] = weight
                weights[f"blocks.{i}.{ours}.bias"] = torch.zeros(len(weight))
        return weights


# by decoder_family, which is the model_type in config.json
DECODERS = {"gpt2": GPT2(), "falcon": Falcon()}


# -----------------------------------------------------------------------------
# putting a captioner together

def part_options(encoder="", decoder=""):
    """
    What a pretrained encoder and decoder determine: (dict of model options, the decoder's
    vocab_size or None, the encoder's (mean, std) or None). Downloads what is missing.
    """
    fixed = {}
    vocab_size = None
    normalization = None
    if is_efficientnet(encoder):
        name = encoder.partition(":")[0]
        find_family(ENCODERS, name)
        fixed["encoder_family"] = name
        normalization = efficientnet.MEAN, efficientnet.STD
    elif encoder:
        config = read_model_config(encoder)
        family = find_family(ENCODERS, config["model_type"])
        fixed |= read_sizes(encoder, family, config)
        normalization = read_normalization(encoder, family)
    if decoder:
        config = read_model_config(decoder)
        family = find_family(DECODERS, config["model_type"])
        fixed |= read_sizes(decoder, family, config)
        vocab_size = config.get("vocab_size", 0)
    return fixed, vocab_size, normalization


def native_image_size(encoder):
    """The image size that an EfficientNet-Lite was trained at; 0 for other encoders."""
    return efficientnet.IMAGE_SIZES.get(encoder.partition(":")[0], 0)


def read_model_config(source):
    """config.json's dict; for CLIP, that of its vision tower."""
    config = read_json(fetch_model(source) / "config.json")
    model_type = config.get("model_type")
    if model_type == "clip":
        config = config.get("vision_config") or {}
    if model_type == "clip_vision_model":
        model_type = "clip"
    if model_type == "clip":
        config = {**CLIP_DEFAULTS, **config}
    return {**config, "model_type": model_type}


def find_family(families, name):
    """An entry of ENCODERS or DECODERS. Raises UserError if there is none of that name."""
    if name not in families:
        raise UserError(f"a model of type {name!r} is not supported; choose from "
                        f"{', '.join(families)}")
    return families[name]


def read_sizes(source, family, config):
    """The model options that config.json sets. Raises UserError if the model is not supported."""
    try:
        sizes = family.sizes(config)
    except KeyError as error:
        raise UserError(f"{source}: config.json lacks {error}") from None
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    for name, value in sizes.items():
        if not name.endswith("family") and type(value) is not int:
            raise UserError(f"{source}: config.json gives {value!r} for {name}, expected an "
                            "integer")
    return sizes


def read_normalization(source, family):
    """
    The mean and std of an encoder's images, 3 floats each, for pixels in 0..1. As in transformers,
    processor_config.json comes first, and null means the default.
    """
    path = fetch_model(source) / "processor_config.json"
    config = read_json(path).get("image_processor") if path.exists() else None
    if not isinstance(config, dict):
        path = path.with_name("preprocessor_config.json")
        config = read_json(path) if path.exists() else {}
    mean = config.get("image_mean") or family.mean
    std = config.get("image_std") or family.std
    if config.get("do_normalize") is False:
        mean = 0.0
        std = 1.0
    # an encoder may take pixels in another range than 0..1
    factor = config.get("rescale_factor") or 1 / 255
    if config.get("do_rescale") is False:
        factor = 1.0
    try:
        # one number is for all channels
        both = torch.stack([torch.tensor(x, dtype=torch.float64).expand(3) for x in (mean, std)])
        mean, std = (both / (255 * factor)).tolist()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{path}: image_mean and image_std must be three numbers each") from None
    return mean, std


def build_captioner(options, vocab_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
    """
    A Captioner of options.encoder_family and decoder_family, with random weights. Raises ValueError
    if it cannot be built.
    """
    options.check()
    encoder = None
    if options.encoder_family != "own":
        encoder = find_family(ENCODERS, options.encoder_family).build(options)
    if options.decoder_family == "own":
        return Captioner(options, vocab_size, mean, std, encoder)
    decoder = find_family(DECODERS, options.decoder_family)
    model = Captioner(options, vocab_size, mean, std, encoder, decoder.block)
    decoder.adapt(model)
    return model


def load_parts(model, encoder="", decoder="", ids=None):
    """
    The pretrained weights of a captioner, {name: tensor}, memory-mapped where possible. The model
    may be on the meta device. ids, list[int]: the decoder's tokens to keep (None: all).
    Sets model.source_hashes, {"encoder": hash of the original tensors, "decoder": ...}, for frozen
    parts, whose weights checkpoints leave out.
    """
    loaded = {}
    model.source_hashes = {}
    if encoder:
        family = ENCODERS[model.options.encoder_family]
        weights, used = load_part(family, model.encoder, encoder, model.options)
        if model.options.freeze_encoder:
            model.source_hashes["encoder"] = hash_tensors(used)
        for name, tensor in weights.items():
            loaded[f"encoder.{name}"] = tensor
    if decoder:
        family = DECODERS[model.options.decoder_family]
        weights, used = load_part(family, model, decoder, model.options, ids)
        loaded |= weights
        if model.options.lora_rank:
            model.source_hashes["decoder"] = hash_tensors(used)
    return loaded


def read_tensors(source):
    """All tensors of a source, by their original names."""
    if not is_efficientnet(source):
        return read_weights(fetch_model(source))
    name, _, path = source.partition(":")
    return read_pickle(path or efficientnet.find_weights(name))


def load_part(family, module, source, options, ids=None):
    """
    The pretrained weights of one part, {name in module: tensor}, and the original tensors that they
    were made of, {original name without prefix: tensor}; see load_parts.
    """
    tensors = {}
    for name, tensor in read_tensors(source).items():
        tensors[PREFIXES.sub("", name, count=1)] = tensor
    used = dict(tensors)
    try:
        weights = family.weights(tensors, options)
        if ids is not None:
            weights["wte.weight"] = weights["wte.weight"][torch.tensor(ids)]
    except KeyError as error:
        raise UserError(f"{source}: the weights lack {error.args[0]}") from None
    except (RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: the weights do not fit config.json ({reason})") from None
    check_fit(module, weights, tensors, source)
    for name in tensors:
        del used[name]
    return weights, used


def check_fit(module, weights, tensors, source):
    """Raises UserError if weights do not fit the module or the tensors left are not all UNUSED."""
    unexpected = sorted(name for name in tensors if not UNUSED.search(name))
    if unexpected:
        raise UserError(f"{source}: the weights have {len(unexpected)} unexpected tensors: "
                        f"{', '.join(unexpected[:5])}")
    parameters = dict(module.named_parameters())
    for name, tensor in weights.items():
        found = tuple(tensor.shape)
        expected = tuple(parameters[name].shape)
        if found != expected:
            raise UserError(f"{source}: {name} has shape {found}, expected {expected}")
        if not tensor.is_floating_point():
            raise UserError(f"{source}: {name} has the unsupported dtype {tensor.dtype}; use the "
                            "model in float32, float16 or bfloat16")


def assemble(options, vocab_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), ids=None,
             frozen_dtype=torch.float32):
    """
    A captioner with the pretrained parts options.encoder and options.decoder; if one is "", the
    weights of that part are random. options: train.py's or a checkpoint's. ids: see load_parts.

    freeze_encoder freezes the encoder's pretrained weights. lora_rank freezes the decoder's and
    keeps them in frozen_dtype. No weight is in memory twice. New cross-attention adds nothing at
    first, so the decoder starts as the language model it was.
    """
    _, decoder_vocab_size, normalization = part_options(options.encoder, options.decoder)
    if options.decoder:
        check_vocabulary(options.decoder, decoder_vocab_size, vocab_size, ids)
    if normalization:
        mean, std = normalization
    # takes no memory until its parameters are replaced below
    with torch.device("meta"), SkipInit():
        model = build_captioner(options, vocab_size, mean, std)
    loaded = load_parts(model, options.encoder, options.decoder, ids)
    tuned = getattr(model.encoder, "tuned_names", set)()
    new = {}
    for name, p in list(model.named_parameters()):
        tensor = loaded.pop(name, None)
        frozen = options.freeze_encoder if name.startswith("encoder.") else options.lora_rank > 0
        frozen = frozen and name not in tuned
        if tensor is None:
            p = nn.Parameter(torch.empty(p.shape))
            # a published checkpoint has encoder="" and holds the encoder's weights, still frozen
            p.requires_grad_(not (frozen and is_pretrained(name, options)))
            new[name] = p
        elif frozen:
            # frozen encoder weights stay float32: exact features are worth the memory
            dtype = torch.float32 if name.startswith("encoder.") else frozen_dtype
            p = nn.Parameter(tensor.to(dtype), requires_grad=False)
        else:
            p = nn.Parameter(tensor.to(torch.float32, copy=True).contiguous())
        replace(model, name, p)
    model.init_weights(new.items())
    if options.decoder and options.bridge != "prefix":
        for block in model.blocks:
            nn.init.zeros_(block.cross.proj.weight)
    if options.lora_rank:
        add_lora(model, options.lora_targets, options.lora_rank)
    return model


def is_pretrained(name, options):
    """Whether a captioner's parameter came with its pretrained encoder."""
    if options.encoder_family.startswith("efficientnet"):
        return name.startswith(NETWORK)
    return name.startswith("encoder.") and not name.startswith(POOLING)


def check_vocabulary(decoder, decoder_vocab_size, vocab_size, ids):
    """
    Raises UserError unless the data has as many tokens as the decoder, or as the ids that are kept.
    A decoder's embedding may have more rows than its tokenizer has tokens.
    """
    expected = decoder_vocab_size
    if ids and max(ids) < decoder_vocab_size:
        expected = len(ids)
    if vocab_size != expected:
        raise UserError(f"{decoder} has {decoder_vocab_size:,} tokens, but the data has "
                        f"{vocab_size:,}; prepare the data with --tokenizer {decoder} --force (add "
                        "--keep_used to keep only the tokens that captions use)")


def replace(model, name, value):
    """Replaces a parameter or submodule, given its full name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, value)


# -----------------------------------------------------------------------------
# LoRA

class LoRA(nn.Module):
    """
    A frozen linear layer plus a trained low-rank update (arXiv 2106.09685):
    y = W x + b + LORA_ALPHA / rank * B A x. B starts at zero.
    """

    def __init__(self, base, rank):
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.scale = LORA_ALPHA / rank
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A), self.B) * self.scale


def add_lora(model, pattern, rank):
    """
    Adds LoRA to the linear layers of the decoder's blocks whose names match a regular expression,
    except in cross-attention. Raises UserError if there are none.
    """
    targets = []
    for name, module in model.named_modules():
        in_decoder = name.startswith("blocks.") and "cross" not in name
        if in_decoder and isinstance(module, nn.Linear) and re.search(pattern, name):
            targets.append(name)
    if not targets:
        raise UserError(f"lora_targets {pattern!r} matches no linear layer of the decoder, such as "
                        "blocks.0.attention.qkv")
    for name in targets:
        replace(model, name, LoRA(model.get_submodule(name), rank))


@torch.no_grad()
def merge_lora(model):
    """Merges each LoRA update into its layer: the same outputs, as fast as without LoRA."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            update = module.B @ module.A * module.scale
            module.base.weight += update.to(module.base.weight.dtype)
            replace(model, name, module.base)
