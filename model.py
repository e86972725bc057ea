"""
An image captioner: a ViT encoder, a GPT decoder, and the training loss around them.

    Encoder     a ViT (arXiv 2010.11929): image -> patch vectors
    Captioner   an Encoder and a GPT-2 style decoder that cross-attends to the patch vectors; has
                the training loss, and one step of generation with a KV cache

Letters in shapes: B images of S x S pixels, N patches, T tokens in a row, P prefix tokens, C width
(n_embd, or the encoder's), H heads, D = C / H, L keys, V vocabulary size, k beams or samples of an
image. "images" are pixels; "encoded" is the encoder's output for them, (B, N, C).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanocaption.dropout import Dropout
from nanocaption.head_loss import head_loss
from nanocaption.search import beam_search, sample


@dataclass
class ModelOptions:
    """
    The architecture: a checkpoint loads only into a model with the same options (dropout and
    word_dropout may differ). train.py takes each field as --name=value.
    """
    image_size: int = 128       # input resolution; images of any other size are resized to it
    patch_size: int = 16        # side of a patch, in pixels
    n_layer_encoder: int = 4    # encoder blocks
    n_layer_decoder: int = 3    # decoder blocks
    n_head: int = 4             # attention heads of the encoder and the decoder
    n_embd: int = 256           # width of the encoder and the decoder
    n_embd_encoder: int = 0     # encoder width, if different (0: n_embd)
    n_head_encoder: int = 0     # encoder heads, if different (0: n_head)
    block_size: int = 64        # context length: prefix tokens (if any), one caption and EOT
    bridge: str = "cross"       # how the image enters: cross (attention), prefix (tokens) or both
    n_query: int = 0            # pool the patches with this many learned queries (0: no pooling)
    local_conv: bool = False    # a depthwise 3x3 convolution before each encoder block
    unigram: float = 0.0        # weight of a loss that predicts tokens from the mean patch
    dropout: float = 0.0        # rate, on embeddings and on the output of each sub-layer
    word_dropout: float = 0.0   # probability of hiding an input token in training
    encoder_family: str = "own"  # set by --encoder
    decoder_family: str = "own"  # set by --decoder

    @property
    def encoder_width(self):
        return self.n_embd_encoder or self.n_embd

    @property
    def encoder_heads(self):
        return self.n_head_encoder or self.n_head

    def check(self):
        """Raises ValueError, with a one-line message, if no model has these options."""
        if self.bridge not in ("cross", "prefix", "both"):
            raise ValueError(f"bridge must be cross, prefix or both, not {self.bridge!r}")
        sizes = "image_size patch_size n_layer_encoder n_layer_decoder n_head n_embd block_size"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("n_embd_encoder", "n_head_encoder", "n_query", "unigram"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("dropout", "word_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.local_conv and self.encoder_family != "own":
            raise ValueError("local_conv works only with the built-in encoder, not "
                             f"{self.encoder_family}; use --local_conv=False")
        for n_embd, n_head in (
            (self.n_embd, self.n_head),
            (self.encoder_width, self.encoder_heads),
        ):
            if n_embd % n_head or n_embd % 4:
                raise ValueError(f"the width, {n_embd}, must be a multiple of 4 and of the number "
                                 f"of heads, {n_head}")


# -----------------------------------------------------------------------------
# attention and blocks, shared by the encoder and the decoder

def split_heads(x, n_head):
    """(B, T, C) -> (B, H, T, D)"""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, H, T, D) -> (B, T, C)"""
    return x.transpose(1, 2).flatten(2)


def attention(q, k, v, mask=None):
    """
    Scaled dot-product attention (arXiv 1706.03762): q (B, H, T, D), k and v (B, H, L, D) ->
    (B, H, T, D). mask: bool (B, 1, T, L), True where a query may attend.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # on CPUs, torch's fused kernel is slower in bfloat16 than two matrix products
    scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5  # (B, H, T, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    # softmax computes in float32 whatever the dtype of the scores
    return scores.softmax(-1) @ v


class SelfAttention(nn.Module):
    """Self-attention, causal only if the mask is. With a KV cache, x holds only new tokens."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, mask=None, cache=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = split_heads(q, self.n_head)
        k = split_heads(k, self.n_head)
        v = split_heads(v, self.n_head)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attention(q, k, v, mask)
        return self.proj(merge_heads(y))


class CrossAttention(nn.Module):
    """Cross-attention from caption tokens, or from pooling queries, to the patch vectors."""

    def __init__(self, n_embd, n_head, image_width):
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(n_embd, n_embd)
        self.kv = nn.Linear(image_width, 2 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)

    def keys_values(self, encoded):
        """(B, N, image_width) -> keys and values, (B, H, N, D) each, computed once per image"""
        k, v = self.kv(encoded).chunk(2, dim=-1)
        return split_heads(k, self.n_head), split_heads(v, self.n_head)

    def forward(self, x, image_kv):
        """x: (B, T, C), or (B * k, 1, C): k beams of an image share its keys and values"""
        k, v = image_kv
        q = self.q(x).view(len(k), -1, x.size(-1))
        y = attention(split_heads(q, self.n_head), k, v)
        return self.proj(merge_heads(y)).view(x.shape)


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, n_embd):
        super().__init__()
        self.fc = nn.Linear(n_embd, 4 * n_embd)
        self.activation = nn.GELU()
        self.proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        x = self.fc(x)
        x = self.activation(x)
        return self.proj(x)


class Block(nn.Module):
    """A pre-norm transformer block. With cross_width, it cross-attends to vectors of that width."""

    def __init__(self, n_embd, n_head, dropout, cross_width=0):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embd)
        self.attention = SelfAttention(n_embd, n_head)
        if cross_width:
            self.norm_cross = nn.LayerNorm(n_embd)
            self.cross = CrossAttention(n_embd, n_head, cross_width)
        self.norm2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd)
        self.dropout = Dropout(dropout)

    def forward(self, x, image_kv=None, mask=None, cache=None):
        x = x + self.dropout(self.attention(self.norm1(x), mask, cache))
        if image_kv is not None:
            x = x + self.dropout(self.cross(self.norm_cross(x), image_kv))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


class KVCache:
    """The keys and values of the tokens so far, in one layer: (rows, H, L, D) each."""

    def __init__(self):
        self.k = None
        self.v = None

    def append(self, k, v):
        if self.k is not None:
            k = torch.cat([self.k, k], dim=2)
            v = torch.cat([self.v, v], dim=2)
        self.k = k
        self.v = v
        return k, v

    def select(self, rows):
        self.k = self.k.index_select(0, rows)
        self.v = self.v.index_select(0, rows)


# -----------------------------------------------------------------------------
# the encoder

def patch_grid(image_size, patch_size):
    """The number of patches on each side of an image. Raises ValueError if they do not fit."""
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    return image_size // patch_size


def patchify(images, patch_size):
    """(B, 3, S, S) -> (B, N, patch_size * patch_size * 3), row by row, channels last"""
    B, _, S, _ = images.shape
    p = patch_size
    g = S // p
    x = images.view(B, 3, g, p, g, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, g, g, p, p, 3)
    return x.reshape(B, g * g, p * p * 3)


def sincos_2d(grid, n_embd):
    """Fixed 2-D sine-cosine position embeddings, (grid * grid, n_embd)"""
    # on the CPU even while a model is being built on the meta device
    exponent = torch.arange(n_embd // 4, device="cpu") / (n_embd // 4)
    place = torch.arange(grid, device="cpu")
    angle = place[:, None] * 10000 ** -exponent  # (grid, C / 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, C / 2)
    rows = wave[:, None].expand(grid, grid, -1)
    columns = wave[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


class PatchEmbedding(nn.Linear):
    """The stem: one linear layer on each patch, plus fixed position embeddings."""

    def __init__(self, image_size, patch_size, n_embd):
        grid = patch_grid(image_size, patch_size)
        super().__init__(3 * patch_size ** 2, n_embd)
        self.patch_size = patch_size
        self.n_patch = grid * grid
        self.register_buffer("positions", sincos_2d(grid, n_embd), persistent=False)

    def forward(self, images):
        x = patchify(images, self.patch_size)
        return super().forward(x) + self.positions  # (B, N, C)


class LocalConv(nn.Conv2d):
    """Adds a depthwise 3x3 convolution over neighboring patches (arXiv 2102.10882)."""

    def __init__(self, n_embd):
        super().__init__(n_embd, n_embd, 3, padding=1, groups=n_embd)

    def forward(self, x):
        grid = math.isqrt(x.size(1))
        y = x.transpose(1, 2).unflatten(2, (grid, grid))  # (B, C, grid, grid)
        y = super().forward(y)
        return x + y.flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """
    Normalized images (B, 3, S, S) -> (B, N, C), or (B, n_query, C) with pooling.

    It has two parts: with freeze_encoder, which is for pretrained encoders (see pretrained.py),
    features() is frozen, and what is trained is in head().
    """

    def __init__(self, options, stem=None):
        super().__init__()
        C = options.encoder_width
        n_head = options.encoder_heads
        n_layer = options.n_layer_encoder
        self.stem = stem or PatchEmbedding(options.image_size, options.patch_size, C)
        self.dropout = Dropout(options.dropout)
        self.blocks = nn.ModuleList(Block(C, n_head, options.dropout) for _ in range(n_layer))
        if options.local_conv:
            self.local_convs = nn.ModuleList(LocalConv(C) for _ in range(n_layer))
        self.norm = nn.LayerNorm(C)
        if options.n_query:
            self.queries = nn.Parameter(torch.empty(options.n_query, C))
            self.pool = CrossAttention(C, n_head, C)
            self.norm_pool = nn.LayerNorm(C)
        self.options = options

    def forward(self, images):
        return self.head(self.features(images))

    def features(self, images):
        x = self.dropout(self.stem(images))
        for i, block in enumerate(self.blocks):
            if self.options.local_conv:
                x = self.local_convs[i](x)
            x = block(x)
        return self.norm(x)

    def head(self, x):
        if self.options.n_query:
            queries = self.queries.expand(len(x), -1, -1)
            pooled = self.pool(queries, self.pool.keys_values(x))
            x = self.norm_pool(queries + pooled)
        return x


# -----------------------------------------------------------------------------
# captions as tensors: one row holds all captions of one image, back to back

def pack(captions, eot_token, max_tokens):
    """
    captions: for each image a list of captions, each a list of token ids without EOT.

    For a caption w1 ... wn, the input is EOT w1 ... wn and the target w1 ... wn EOT, both cut to
    max_tokens.
    Returns a dict of int64 tensors (B, T): tokens; targets, -1 where padded; position within the
    caption; segment, the number of the caption in its row (1, 2, ...), 0 where padded.
    """
    rows = []
    for image_captions in captions:
        row = []
        for segment, ids in enumerate(image_captions, 1):
            targets = [*ids, eot_token][:max_tokens]
            tokens = [eot_token, *targets[:-1]]
            for position, (token, target) in enumerate(zip(tokens, targets)):
                row.append((token, target, position, segment))
        rows.append(row)
    T = max(len(row) for row in rows)
    padding = (eot_token, -1, 0, 0)
    padded = [row + [padding] * (T - len(row)) for row in rows]
    packed = torch.tensor(padded)  # (B, T, 4)
    names = ("tokens", "targets", "position", "segment")
    return dict(zip(names, packed.unbind(-1)))


def caption_mask(segment, n_prefix=0):
    """
    segment (B, T) -> bool (B, 1, P + T, P + T), True where a token may attend: to its own caption,
    up to itself, and to the whole prefix.
    """
    segment = F.pad(segment, (n_prefix, 0))
    same_caption = segment[:, :, None] == segment[:, None, :]
    causal = torch.ones_like(same_caption[0]).tril()
    mask = same_caption & causal
    mask[:, :, :n_prefix] = True
    return mask[:, None]


# -----------------------------------------------------------------------------
# the captioner

class Captioner(nn.Module):
    """
    The encoder, and the decoder: wte, wpe, blocks and norm. vocab_size includes EOT, the last
    token. mean and std, per channel, normalize pixels in 0..1; they are saved with the weights.
    For published architectures, pretrained.py passes its encoder and the decoder's Block class.
    """

    def __init__(self, options, vocab_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
                 encoder=None, block=Block):
        super().__init__()
        options.check()
        self.options = options
        self.eot_token = vocab_size - 1
        self.recompute = False  # activation checkpointing of the decoder's blocks
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32, device="cpu"))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32, device="cpu"))

        self.encoder = encoder or Encoder(options)
        self.n_prefix = 0
        if options.bridge != "cross":
            self.n_prefix = options.n_query or self.encoder.stem.n_patch
        self.max_tokens = options.block_size - self.n_prefix  # longest caption, including EOT
        if self.max_tokens < 2:
            raise ValueError(f"block_size {options.block_size} leaves no room for a caption after "
                             f"{self.n_prefix} prefix tokens")

        C = options.n_embd
        image_width = options.encoder_width
        cross_width = 0 if options.bridge == "prefix" else image_width
        self.wte = nn.Embedding(vocab_size, C)  # also the output head
        self.wpe = nn.Embedding(options.block_size, C)
        if self.n_prefix:
            self.prefix = nn.Linear(image_width, C)
        if options.unigram:
            self.unigram = nn.Linear(image_width, C)
        self.dropout = Dropout(options.dropout)
        self.blocks = nn.ModuleList(block(C, options.n_head, options.dropout, cross_width)
                                    for _ in range(options.n_layer_decoder))
        self.norm = nn.LayerNorm(C)
        self.init_weights(self.named_parameters())

    def init_weights(self, named_parameters):
        """GPT-2's initialization: residual projections are scaled down with depth."""
        for name, p in named_parameters:
            n_layer = self.options.n_layer_decoder
            if name.startswith("encoder"):
                n_layer = self.options.n_layer_encoder
            if p.ndim == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            elif "local_convs" in name:
                nn.init.zeros_(p)
            elif name.endswith("proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer))
            else:
                nn.init.normal_(p, std=0.02)

    def normalize(self, images):
        """Resizes and normalizes square images in 0..255: (B, any, any, 3) -> float (B, 3, S, S)"""
        x = images.permute(0, 3, 1, 2).float()
        size = self.options.image_size
        if x.size(-1) != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        mean = 255 * self.mean.view(3, 1, 1)
        std = 255 * self.std.view(3, 1, 1)
        return (x - mean) / std

    def encode(self, images):
        """Images (4-D, see normalize), or their Encoder.features (3-D) -> encoded (B, N, C)"""
        if images.ndim == 3:
            return self.encoder.head(images)
        return self.encoder(self.normalize(images))

    def image_keys_values(self, encoded):
        """Encoded images (B, N, C) -> for each block the keys and values of its cross-attention."""
        if self.options.bridge == "prefix":
            return [None] * len(self.blocks)
        return [block.cross.keys_values(encoded) for block in self.blocks]

    def embed_prefix(self, encoded):
        """Encoded images (B, N, C) -> the prefix tokens' embeddings (B, P, n_embd)."""
        return self.prefix(encoded) + self.wpe.weight[:self.n_prefix]

    def decode(self, encoded, captions):
        """Encoded images (B, N, C) and packed captions -> hidden states (B, T, n_embd)"""
        x = self.wte(captions["tokens"])
        if self.training and self.options.word_dropout:
            # hide whole tokens, so that the decoder has to look at the image (arXiv 1511.06349)
            seen = torch.rand_like(x[..., :1]) >= self.options.word_dropout
            x = x * seen
        x = x + self.wpe(captions["position"] + self.n_prefix)
        if self.n_prefix:
            x = torch.cat([self.embed_prefix(encoded), x], dim=1)
        x = self.dropout(x)
        mask = caption_mask(captions["segment"], self.n_prefix)
        for block, image_kv in zip(self.blocks, self.image_keys_values(encoded)):
            if self.recompute and self.training:
                x = checkpoint(block, x, image_kv, mask, use_reentrant=False)
            else:
                x = block(x, image_kv, mask)
        return self.norm(x[:, self.n_prefix:])

    def forward(self, images, captions, teacher=None, alpha=0.0, smoothing=0.0):
        """
        Returns the training loss and the plain cross-entropy in nats, both summed over tokens. With
        a teacher, alpha is the weight of its soft targets (arXiv 2107.07651). captions: see pack;
        in self-critical training also "advantage", float (B, T), the weight of each token's loss.
        """
        # the loss skips padding
        valid = (captions["targets"].flatten() >= 0).nonzero()[:, 0]  # (n,)
        targets = captions["targets"].flatten()[valid]
        advantage = captions.get("advantage")
        if advantage is not None:
            advantage = advantage.flatten()[valid]
        soft = None
        if teacher is not None and alpha:
            with torch.no_grad():
                hidden = teacher.decode(teacher.encode(images), captions)
            soft = hidden.flatten(0, 1)[valid], teacher.wte.weight
        encoded = self.encode(images)
        hidden = self.decode(encoded, captions).flatten(0, 1)[valid]  # (n, C)
        loss, ce = head_loss(hidden, self.wte.weight, targets, soft, alpha, smoothing, advantage)
        if self.options.unigram and self.training:
            row = valid // captions["targets"].size(1)
            unigram_loss = self.unigram_loss(encoded, row, targets)
            # unused in self-critical training, but DDP needs every parameter in the graph
            weight = self.options.unigram if advantage is None else 0.0
            loss = loss + weight * unigram_loss
        return loss, ce

    def unigram_loss(self, encoded, row, targets):
        """
        Summed cross-entropy of tokens given only their image's mean vector (arXiv 1511.02251). It
        trains the encoder directly. encoded (B, N, C); row (each token's image) and targets (n,).
        """
        logits = F.linear(self.unigram(encoded.mean(1)), self.wte.weight)  # (B, V)
        logp = logits.float().log_softmax(-1)
        return -logp[row, targets].sum()

    @torch.no_grad()
    def cross_entropy(self, encoded, captions):
        """Encoded images and packed captions -> cross-entropy in nats, summed over tokens."""
        valid = (captions["targets"].flatten() >= 0).nonzero()[:, 0]
        hidden = self.decode(encoded, captions).flatten(0, 1)[valid]
        targets = captions["targets"].flatten()[valid]
        _, ce = head_loss(hidden, self.wte.weight.detach(), targets)
        return ce

    # -------------------------------------------------------------------------
    # generation

    # functions of search.py, as methods; they call prefill, step and reorder_cache
    beam_search = beam_search
    sample = sample

    def prefill(self, images, k):
        """
        Prepares to write k captions for each of these images, (B, S, S, 3) or encoded (B, N, C).
        Returns each block's KV cache and the keys and values of its cross-attention.
        """
        encoded = self.encode(images) if images.ndim == 4 else images
        caches = [KVCache() for _ in self.blocks]
        image_kv = self.image_keys_values(encoded)
        if self.n_prefix:
            x = self.embed_prefix(encoded)
            for block, kv, cache in zip(self.blocks, image_kv, caches):
                x = block(x, kv, cache=cache)
            rows = torch.arange(len(encoded), device=x.device)
            self.reorder_cache(caches, rows.repeat_interleave(k))
        return caches, image_kv

    def step(self, caches, image_kv, tokens, t):
        """Reads token t of each row, int64 (B * k,); returns logits (B * k, V) for token t + 1."""
        x = self.wte(tokens) + self.wpe.weight[self.n_prefix + t]
        x = x[:, None]  # (B * k, 1, C)
        for block, kv, cache in zip(self.blocks, image_kv, caches):
            x = block(x, kv, cache=cache)
        return F.linear(self.norm(x[:, 0]), self.wte.weight).float()

    @staticmethod
    def reorder_cache(caches, rows):
        """Keeps these rows, int64 (n,), of every block's cache, in this order."""
        for cache in caches:
            cache.select(rows)
