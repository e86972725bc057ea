"""
A captioner: a ViT encoder reads the picture, a GPT decoder writes the caption. Everything from pixels to words is here:

    Encoder     ViT (arXiv 2010.11929): patches -> vectors
    Decoder     GPT with an optional cross-attention in its blocks, tied head
    Captioner   the two and the bridge between them: the loss over packed captions, and generation

Letters in shapes: B pictures, N patches of a picture, C = n_embd, H heads, D = C / H, V vocabulary, P prefix tokens,
T places in a row (all captions of one picture, padded to the longest row), n real tokens of the whole batch.
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


# Other people's architectures, by what they do differently from ours; pretrained.py has weights for them.
OURS = dict(class_tokens=0, norm_first=False, norm_last=True, layer_scale=False, eps=1e-5, activation="gelu", bias=True,
            n_head_kv=0, rotary=False, parallel=False)
FAMILIES = {
    "own": OURS,
    "vit": {**OURS, "class_tokens": 1, "eps": 1e-12},                      # arXiv 2010.11929
    "deit": {**OURS, "class_tokens": 2, "eps": 1e-12},                     # arXiv 2012.12877, with a distillation token
    "dinov2": {**OURS, "class_tokens": 1, "eps": 1e-6, "layer_scale": True},  # arXiv 2304.07193
    "clip": {**OURS, "class_tokens": 1, "norm_first": True, "norm_last": False, "activation": "quick_gelu"},  # arXiv 2103.00020
    "gpt2": {**OURS, "activation": "gelu_tanh"},
    "falcon": {**OURS, "n_head_kv": 1, "rotary": True, "parallel": True, "bias": False},  # arXiv 2311.16867
}


@dataclass
class ModelOptions:
    """What a checkpoint's weights fit: the architecture's sizes and switches."""
    image_size: int = 128       # pixels a side that the encoder sees; pictures of other sizes are resized to it
    patch_size: int = 16        # pixels a side of one patch
    stem: str = "conv"          # how patches become vectors: "conv" (strided convolutions) or "patch" (one linear layer)
    local: bool = False         # before each block of the encoder a depthwise convolution over neighbouring patches
    n_layer_encoder: int = 4    # blocks
    n_layer_decoder: int = 3
    n_head: int = 4             # attention heads of a block
    n_embd: int = 256           # size of the vectors
    n_query: int = 0            # learned queries that pool the patches into so many vectors; 0: the decoder sees all patches
    bridge: str = "cross"       # how the picture reaches the words: "cross" (attention), "prefix" (soft prompt) or "both"
    cross_every: int = 1        # cross-attention in every so many-th decoder block, the last one always
    block_size: int = 64        # longest caption in tokens with its EOT, plus the prefix where there is one
    unigram: float = 0.0        # weight of a second loss: each word predicted from the mean of the encoder's vectors alone; 0: none
    dropout: float = 0.0        # on embeddings and on what each sub-layer adds
    word_dropout: float = 0.0   # share of words that training hides from the decoder: it has to look at the picture (arXiv 1511.06349)
    encoder_family: str = "own"  # whose architecture, see FAMILIES: own, vit, deit, dinov2, clip
    decoder_family: str = "own"  # own, gpt2, falcon
    n_embd_encoder: int = 0     # of the encoder, where it differs from the decoder's; 0: the same
    n_head_encoder: int = 0     # likewise

    def check(self):
        """Raises ValueError with one line for a combination that can't be built."""
        for name, allowed in dict(stem=("conv", "patch"), bridge=("cross", "prefix", "both"), encoder_family=FAMILIES,
                                  decoder_family=FAMILIES).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("image_size", "patch_size", "n_layer_encoder", "n_layer_decoder", "n_head", "n_embd", "cross_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("n_embd_encoder", "n_head_encoder"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.local and self.encoder_family != "own":
            raise ValueError(f"local is for an encoder of our own, not for {self.encoder_family}: give --local=False")
        for name in ("dropout", "word_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"stem 'conv' halves the picture again and again: patch_size must be a power of 2, not "
                             f"{self.patch_size} (or take stem 'patch')")
        for n_embd, n_head in ((self.n_embd, self.n_head), self.encoder_size):
            if n_embd % n_head or n_embd % 4:
                raise ValueError(f"n_embd {n_embd} must be a multiple of n_head {n_head} and of 4")
        if self.n_query < 0:
            raise ValueError(f"n_query must be 0 or more, not {self.n_query}")
        if self.block_size < self.n_prefix + 2:
            raise ValueError(f"block_size {self.block_size} leaves no room for a caption after {self.n_prefix} prefix tokens")

    @property
    def n_patch(self):
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def n_prefix(self):
        """Places in front of the caption that the picture takes: the soft prompt's length, 0 without one."""
        return 0 if self.bridge == "cross" else self.n_query or self.n_patch + FAMILIES[self.encoder_family]["class_tokens"]

    @property
    def encoder_size(self):
        """The encoder's n_embd and n_head."""
        return self.n_embd_encoder or self.n_embd, self.n_head_encoder or self.n_head

    @property
    def longest(self):
        """Tokens of the longest caption that fits, with its EOT."""
        return self.block_size - self.n_prefix


# ---- attention

def split_heads(x, n_head):
    """(B, T, C) -> (B, H, T, D)"""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, H, T, D) -> (B, T, C)"""
    return x.transpose(1, 2).flatten(2)


class Packing:
    """
    Where the tokens of a packed batch lie. A row holds one picture's captions one after the other. Only attention needs
    rows (B, T), padded; all else runs on the real tokens alone (n, C), so that nothing is computed for padding.
    slot: int64 (n,), the token's place in the flattened rows. mask: bool (B, 1, T, T), True where a token may look.
    position: int64 (B, T), a token's place in its caption, after the prefix.
    """
    def __init__(self, slot, segment, position, n_prefix):
        B, T = segment.shape
        if n_prefix:  # P more places in front of each row: segment 0, which everyone may see
            segment = F.pad(segment, (n_prefix, 0))
            T += n_prefix
            slot = slot + n_prefix * (slot // (T - n_prefix) + 1)
            front = torch.arange(B, device=slot.device)[:, None] * T + torch.arange(n_prefix, device=slot.device)
            slot = torch.cat([front.flatten(), slot])
            position = torch.cat([torch.arange(n_prefix, device=slot.device).repeat(B), position + n_prefix])
        own = segment[:, :, None] == segment[:, None, :]  # (B, T, T)
        self.mask = own & torch.ones(T, T, dtype=torch.bool, device=slot.device).tril()
        self.mask[:, :, :n_prefix] = True
        self.mask = self.mask[:, None]
        self.slot, self.B, self.T = slot, B, T
        self.position = position.new_zeros(B * T).index_copy(0, slot, position).view(B, T)

    def rows(self, x):
        """(n, C) -> (B, T, C), zeros at padding"""
        return x.new_zeros(self.B * self.T, x.size(-1)).index_copy(0, self.slot, x).view(self.B, self.T, -1)

    def tokens(self, x):
        """(B, T, C) -> (n, C)"""
        return x.flatten(0, 1).index_select(0, self.slot)


def rotate(x, position):
    """Rotary positions (RoFormer, arXiv 2104.09864): x (B, H, T, D), position (B, T) or (T,) -> x turned by position."""
    frequency = 10000 ** (-torch.arange(0, x.size(-1), 2, device=x.device) / x.size(-1))
    angle = (position[..., None] * frequency).unsqueeze(-3)  # (B or nothing, 1, T, D/2)
    (a, b), cos, sin = x.float().chunk(2, dim=-1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """
    Multi-head self-attention (arXiv 1706.03762) over all that stands in a row, a packed batch or a cache. Some families
    have fewer heads for keys and values than for queries (multi-query, arXiv 1911.02150).
    """
    def __init__(self, n_embd, n_head, family):
        super().__init__()
        self.rotary, D = family.rotary, n_embd // n_head
        self.heads = n_head, family.n_head_kv or n_head, family.n_head_kv or n_head  # of q, k, v
        self.qkv = nn.Linear(n_embd, sum(self.heads) * D, bias=family.bias)
        self.proj = nn.Linear(n_embd, n_embd, bias=family.bias)

    def forward(self, x, packing=None, cache=None, past=0):
        """
        x: (B, T, C), each sees all; or packed tokens (n, C) with their packing; or the next T tokens with cache, a pair
        of (B, H of keys, L, D) that holds keys and values of `past` earlier tokens and takes those of x.
        """
        qkv = self.qkv(x)
        if packing:
            qkv = packing.rows(qkv)
        D = qkv.size(-1) // sum(self.heads)
        q, k, v = (split_heads(part, heads) for part, heads in zip(qkv.split([h * D for h in self.heads], dim=-1), self.heads))
        if self.rotary:
            position = packing.position if packing else torch.arange(past, past + x.size(1), device=x.device)
            q, k = rotate(q, position), rotate(k, position)
        if cache is not None:
            end = past + x.size(1)
            cache[0][:, :, past:end], cache[1][:, :, past:end] = k, v
            k, v = cache[0][:, :, :end], cache[1][:, :, :end]
        k, v = (t.expand(-1, q.size(1), -1, -1) if t.size(1) == 1 else t for t in (k, v))
        y = merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=packing.mask if packing else None))
        return self.proj(packing.tokens(y) if packing else y)


class CrossAttention(nn.Module):
    """Multi-head attention of x over other vectors: words over the picture, or pooling queries over patches."""

    def __init__(self, n_embd, n_head, n_memory):
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(n_embd, n_embd)
        self.kv = nn.Linear(n_memory, 2 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)

    def keys_values(self, memory):
        """memory (B, N, n_memory) -> keys and values (B, H, N, D): computed once a picture, however many rows look at it"""
        return [split_heads(part, self.n_head) for part in self.kv(memory).chunk(2, dim=-1)]

    def forward(self, x, keys_values, packing=None):
        """x: (B, T, C), or packed tokens (n, C)"""
        q = self.q(x)
        y = F.scaled_dot_product_attention(split_heads(packing.rows(q) if packing else q, self.n_head), *keys_values)
        y = merge_heads(y)
        return self.proj(packing.tokens(y) if packing else y)


class MLP(nn.Module):
    """Two linear layers with a GELU between, four times as wide inside: (..., C) -> (..., C)."""

    def __init__(self, n_embd, family):
        super().__init__()
        self.fc = nn.Linear(n_embd, 4 * n_embd, bias=family.bias)
        self.proj = nn.Linear(4 * n_embd, n_embd, bias=family.bias)
        self.activation = family.activation

    def forward(self, x):
        x = self.fc(x)
        if self.activation == "quick_gelu":
            return self.proj(x * torch.sigmoid(1.702 * x))
        return self.proj(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Dropout(nn.Dropout):
    """nn.Dropout (arXiv 1207.0580), faster on CPUs, where random numbers are slow to draw: one of 64 bits serves four elements."""

    def forward(self, x):
        if x.device.type != "cpu" or not self.training or not self.p:
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.long).random_(-2**63, None).view(torch.int16)  # -2^15 to 2^15 - 1
        keep = bits[:x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * (keep * x.new_tensor(1 / (1 - self.p)))


class Block(nn.Module):
    """
    A pre-norm transformer block, with cross-attention to vectors of size n_memory between self-attention and MLP where
    there are any. A parallel block feeds attention and MLP the same norm, and the cross-attention stands before both.
    """
    def __init__(self, n_embd, n_head, family, dropout, n_memory=0):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(n_embd, family.eps), SelfAttention(n_embd, n_head, family)
        if n_memory:
            self.norm_cross, self.cross = nn.LayerNorm(n_embd, family.eps), CrossAttention(n_embd, n_head, n_memory)
        if not family.parallel:
            self.norm2 = nn.LayerNorm(n_embd, family.eps)
        self.mlp = MLP(n_embd, family)
        if family.layer_scale:
            self.scale1, self.scale2 = nn.Parameter(torch.ones(n_embd)), nn.Parameter(torch.ones(n_embd))
        self.has_cross, self.parallel, self.layer_scale = n_memory > 0, family.parallel, family.layer_scale
        self.dropout = Dropout(dropout)

    def forward(self, x, keys_values=None, packing=None, cache=None, past=0):
        """x, packing, cache, past: as in SelfAttention; keys_values: of the picture, from CrossAttention"""
        if self.parallel:
            if self.has_cross:
                x = x + self.dropout(self.cross_attend(self.norm_cross(x), keys_values, packing))
            normed = self.norm1(x)
            return x + self.dropout(self.attention(normed, packing, cache, past) + self.mlp(normed))
        y = self.attention(self.norm1(x), packing, cache, past)
        x = x + self.dropout(y * self.scale1 if self.layer_scale else y)
        if self.has_cross:
            x = x + self.dropout(self.cross_attend(self.norm_cross(x), keys_values, packing))
        y = self.mlp(self.norm2(x))
        return x + self.dropout(y * self.scale2 if self.layer_scale else y)

    def cross_attend(self, x, keys_values, packing):
        if packing or x.size(0) == keys_values[0].size(0):
            return self.cross(x, keys_values, packing)
        # in generation: the k rows of one picture (beams, samples) stand side by side as its k queries  (B·k, 1, C)
        return self.cross(x.view(keys_values[0].size(0), -1, x.size(-1)), keys_values).reshape(x.shape)


# ---- the encoder

def patchify(images, patch_size):
    """(B, 3, S, S) -> (B, N, p·p·3): patches left to right, top to bottom; in each its pixels likewise, channels last"""
    B, channels, S, _ = images.shape
    g, p = S // patch_size, patch_size
    return images.view(B, channels, g, p, g, p).permute(0, 2, 4, 3, 5, 1).reshape(B, g * g, p * p * channels)


def sincos_2d(grid, n_embd):
    """Fixed positions of a grid × grid of patches, (grid·grid, n_embd): sines and cosines of row and column."""
    frequency = 10000 ** (-torch.arange(n_embd // 4, device="cpu") / (n_embd // 4))
    angle = torch.arange(grid, device="cpu")[:, None] * frequency  # (grid, C/4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, C/2)
    rows, columns = wave[:, None].expand(-1, grid, -1), wave[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


class ConvStem(nn.Sequential):
    """
    Patches by 3×3 convolutions of stride 2 (arXiv 2106.14881), without BatchNorm: a step's loss must not depend on how
    the batch is split over ranks and micro-steps.
    """
    def __init__(self, patch_size, n_embd):
        halvings = patch_size.bit_length() - 1
        widths = [3] + [max(n_embd >> (halvings - i), 16) for i in range(1, halvings + 1)]
        layers = []
        for i in range(halvings):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1), nn.GELU()]
        super().__init__(*layers, nn.Conv2d(widths[-1], n_embd, 1))

    def forward(self, images):
        return super().forward(images).flatten(2).transpose(1, 2)  # (B, N, C)


class PatchStem(nn.Linear):
    """Patches by one linear layer on their pixels."""

    def __init__(self, patch_size, n_embd, bias=True):
        super().__init__(3 * patch_size ** 2, n_embd, bias)
        self.patch_size = patch_size

    def forward(self, images):
        return super().forward(patchify(images, self.patch_size))  # (B, N, C)


class Neighbours(nn.Conv2d):
    """Adds to each patch what a 3×3 depthwise convolution finds around it (arXiv 2102.10882): (B, N, C) -> (B, N, C)."""

    def __init__(self, n_embd):
        super().__init__(n_embd, n_embd, 3, padding=1, groups=n_embd)

    def forward(self, x):
        grid = math.isqrt(x.size(1))
        return x + super().forward(x.transpose(1, 2).unflatten(2, (grid, grid))).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Normalised pictures (B, 3, S, S) -> (B, N, C), class tokens first where the family has any; (B, n_query, C) with pooling."""

    def __init__(self, options):
        super().__init__()
        family, (C, n_head) = SimpleNamespace(**FAMILIES[options.encoder_family]), options.encoder_size
        if options.stem == "conv":
            self.stem = ConvStem(options.patch_size, C)
        else:
            self.stem = PatchStem(options.patch_size, C, bias=options.encoder_family != "clip")
        if family.class_tokens:
            self.class_tokens = nn.Parameter(torch.empty(family.class_tokens, C))
            self.positions = nn.Parameter(torch.empty(family.class_tokens + options.n_patch, C))
        else:
            self.register_buffer("positions", sincos_2d(options.image_size // options.patch_size, C), persistent=False)
        self.norm_first = nn.LayerNorm(C, family.eps) if family.norm_first else nn.Identity()
        self.dropout = Dropout(options.dropout)
        self.neighbours = nn.ModuleList(Neighbours(C) if options.local else nn.Identity() for _ in range(options.n_layer_encoder))
        self.blocks = nn.ModuleList(Block(C, n_head, family, options.dropout) for _ in range(options.n_layer_encoder))
        self.norm = nn.LayerNorm(C, family.eps) if family.norm_last else nn.Identity()
        if options.n_query:
            self.queries = nn.Parameter(torch.empty(options.n_query, C))
            self.pool = CrossAttention(C, n_head, C)
            self.norm_pool = nn.LayerNorm(C)

    def forward(self, images):
        x = self.stem(images)
        if hasattr(self, "class_tokens"):
            x = torch.cat([self.class_tokens.expand(x.size(0), -1, -1), x], dim=1)
        x = self.norm_first(self.dropout(x + self.positions))
        for neighbours, block in zip(self.neighbours, self.blocks):
            x = block(neighbours(x))
        x = self.norm(x)
        if hasattr(self, "queries"):
            queries = self.queries.expand(x.size(0), -1, -1)
            x = self.norm_pool(queries + self.pool(queries, self.pool.keys_values(x)))  # (B, n_query, C)
        return x


# ---- captions as tensors

def pack(captions, eot_token, longest):
    """
    captions: a list for each picture of lists of token ids (no EOT). A caption is fed as EOT w1 … wn and predicts
    w1 … wn EOT, cut to `longest` tokens. Returns a dict of tensors on the CPU: tokens, targets, position: int64 (n,);
    slot: int64 (n,), row · T + place in the row; segment: int64 (B, T), the number of the caption, 1, 2, …, that stands at
    a place (padding has a number of its own at each place, so that it sees itself).
    """
    tokens, targets, position, lengths = [], [], [], []
    for row in captions:
        start = len(tokens)
        for words in row:
            target = [*words, eot_token][:longest]
            tokens += [eot_token, *target[:-1]]
            targets += target
            position += range(len(target))
        lengths.append(len(tokens) - start)
    tokens, targets, position, lengths = map(torch.tensor, (tokens, targets, position, lengths))
    B, T = len(lengths), int(lengths.max())
    row = torch.arange(B).repeat_interleave(lengths)
    place = torch.arange(len(tokens)) - (lengths.cumsum(0) - lengths)[row]
    segment = -1 - torch.arange(T).repeat(B, 1)
    segment[row, place] = (position == 0).cumsum(0)
    return dict(tokens=tokens, targets=targets, position=position, slot=row * T + place, segment=segment)


# ---- the loss

class HeadLoss(torch.autograd.Function):
    """
    Head and loss at once, some tokens at a time: the logits (n, V), by far the largest tensor of a step, are never whole
    in memory, and each chunk turns into its gradient in place while it is in the cache. Equal to F.cross_entropy on
    hidden @ weight.T with label smoothing (arXiv 1512.00567), mixed with the teacher's distribution as in ALBEF (arXiv 2107.07651):
    (1 - alpha) · CE(smoothed targets) + alpha · CE(softmax(soft_hidden @ soft_weight.T)), summed over tokens.
    hidden (n, C), weight (V, C), targets int64 (n,) -> the loss, and the plain cross-entropy in nats, which has no gradient.
    factor: None, or float (n,), by which each token's part of the loss (not of the cross-entropy) is multiplied.
    """
    @staticmethod
    def forward(ctx, hidden, weight, targets, factor, soft_hidden, soft_weight, alpha, smoothing):
        V, (needs_gradient, needs_weight) = len(weight), ctx.needs_input_grad[:2]
        alpha = 0.0 if soft_hidden is None else alpha
        chunk = max((2**21 if hidden.device.type == "cpu" else 2**26) // V, 1)
        loss, ce = (hidden.new_zeros((), dtype=torch.float32) for _ in range(2))
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if needs_weight else None
        for i in range(0, len(hidden), chunk):
            h, target = hidden[i:i + chunk], targets[i:i + chunk, None]
            logits = F.linear(h, weight).float()
            p = logits.softmax(1)
            log_total = logits.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()  # logsumexp, from what is there
            at_target = logits.gather(1, target)
            goal = at_target if not smoothing else (1 - smoothing) * at_target + smoothing * logits.mean(1, keepdim=True)
            if soft_hidden is not None:
                soft = F.linear(soft_hidden[i:i + chunk], soft_weight).float().softmax(1)
                goal = (1 - alpha) * goal + alpha * (soft * logits).sum(1, keepdim=True)
            f = 1 if factor is None else factor[i:i + chunk, None]
            loss += ((log_total - goal) * f).sum()
            ce += (log_total - at_target).sum()
            if needs_gradient or needs_weight:  # of a logit: probability - target
                if soft_hidden is not None:
                    p.sub_(soft, alpha=alpha)
                if smoothing:
                    p -= (1 - alpha) * smoothing / V
                p.scatter_add_(1, target, torch.full_like(at_target, -(1 - alpha) * (1 - smoothing)))
                p = (p if factor is None else p.mul_(f)).to(h.dtype)
                d_hidden[i:i + chunk] = p @ weight
                if needs_weight:
                    d_weight.addmm_(p.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(ce)
        return loss, ce

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, None if d_weight is None else d_weight * d_loss, None, None, None, None, None, None


head_loss = HeadLoss.apply


# ---- the captioner

class Captioner(nn.Module):
    """
    vocab_size: tokens with EOT, whose id is the last. mean, std: of the training pictures' channels, scale 0..1; they are
    buffers, so that a checkpoint's weights bring them along.
    """
    def __init__(self, options, vocab_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
        super().__init__()
        options.check()
        self.options, self.eot_token, self.longest = options, vocab_size - 1, options.longest
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32, device="cpu"))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32, device="cpu"))
        self.encoder = Encoder(options)
        self.wte = nn.Embedding(vocab_size, options.n_embd)
        family = SimpleNamespace(**FAMILIES[options.decoder_family])
        if not family.rotary:
            self.wpe = nn.Embedding(options.block_size, options.n_embd)
        if options.n_prefix:
            self.prefix = nn.Linear(options.encoder_size[0], options.n_embd)
        if options.unigram:
            self.unigram = nn.Linear(options.encoder_size[0], options.n_embd)
        self.dropout = Dropout(options.dropout)
        cross = [options.bridge != "prefix" and (options.n_layer_decoder - 1 - i) % options.cross_every == 0
                 for i in range(options.n_layer_decoder)]
        self.blocks = nn.ModuleList(Block(options.n_embd, options.n_head, family, options.dropout, options.encoder_size[0] if c else 0)
                                    for c in cross)
        self.norm = nn.LayerNorm(options.n_embd, family.eps)
        self.recompute = False  # in training, keep no activations of the decoder's blocks: backward computes them again
        self.draw(dict(self.named_parameters()))

    def draw(self, parameters):
        """Initialises {name: parameter} as GPT-2 does: what adds to the residual stream shrinks with depth."""
        for name, p in parameters.items():
            if p.ndim == 1:  # biases; norms' weights and layer scales
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            elif "neighbours" in name:
                nn.init.zeros_(p)
            elif p.ndim == 4:
                nn.init.kaiming_normal_(p, nonlinearity="relu")
            else:
                n_layer = self.options.n_layer_encoder if name.startswith("encoder") else self.options.n_layer_decoder
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if name.endswith("proj.weight") else 0.02)

    def encode(self, images):
        """uint8 (or float of the same scale) (B, S, S, 3) of any size S -> (B, N, C), what the decoder sees of them"""
        x = images.permute(0, 3, 1, 2).float()  # channels last in memory, as convolutions like it
        size = self.options.image_size
        if x.size(-1) != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        mean, std = (255 * t.view(1, 3, 1, 1) for t in (self.mean, self.std))
        return self.encoder((x - mean) / std)

    def add_positions(self, x, position):
        """x (..., C), position int64 (...) -> x with its places' embeddings; rotary models have none"""
        return x + self.wpe(position) if hasattr(self, "wpe") else x

    def hidden(self, memory, captions):
        """Encoded pictures and packed captions (see pack) -> (n, C), from which the head tells each next token."""
        P, position = self.options.n_prefix, captions["position"]
        x = self.wte(captions["tokens"])  # (n, C)
        if self.training and self.options.word_dropout:
            x = x * (torch.rand(len(x), 1, device=x.device) >= self.options.word_dropout)
        x = self.add_positions(x, position + P)
        if P:
            x = torch.cat([self.add_positions(self.prefix(memory), torch.arange(P, device=x.device)).flatten(0, 1), x])  # (B·P + n, C)
        x = self.dropout(x)
        packing = Packing(captions["slot"], captions["segment"], position, P)
        for block in self.blocks:
            keys_values = block.cross.keys_values(memory) if block.has_cross else None
            if self.recompute and self.training:
                x = checkpoint(block, x, keys_values, packing, use_reentrant=False)
            else:
                x = block(x, keys_values, packing)
        return self.norm(x[len(x) - len(position):])

    def forward(self, images, captions, teacher=None, alpha=0.0, smoothing=0.0):
        """
        images (B, S, S, 3), captions from pack -> two sums over the n tokens: the training loss (see HeadLoss) and the
        plain cross-entropy in nats. teacher: a Captioner whose distribution has the weight alpha in the loss. Where captions
        hold a factor, float (n,), each token's loss is multiplied by it. Where they don't, with options.unigram, training adds the
        cross-entropy of each token given the mean of its picture's vectors alone (arXiv 1511.02251), which teaches the encoder directly.
        """
        targets, factor = captions["targets"], captions.get("factor")
        soft, memory = (None, None), self.encode(images)
        if teacher is not None and alpha:
            with torch.no_grad():
                soft = teacher.hidden(teacher.encode(images), captions), teacher.wte.weight
        weight = self.wte.weight if torch.is_grad_enabled() else self.wte.weight.detach()  # which tells HeadLoss that none is wanted
        second = 0.0
        if self.options.unigram and self.training:
            logp = F.linear(self.unigram(memory.mean(1)), self.wte.weight).float().log_softmax(-1)  # (B, V)
            second = -logp[captions["slot"] // captions["segment"].size(1), targets].sum() * self.options.unigram * (factor is None)  # by 0: DDP wants all in the graph
        loss, ce = head_loss(self.hidden(memory, captions), weight, targets, factor, *soft, alpha, smoothing)
        return loss + second, ce

    @torch.no_grad()
    def cross_entropy(self, memory, captions):
        """Encoded pictures and packed captions -> how unlikely these are: nats, summed over the n tokens."""
        return head_loss(self.hidden(memory, captions), self.wte.weight.detach(), captions["targets"], None, None, None, 0.0, 0.0)[1]

    # ---- generation; images may be encoded already

    def start(self, images, k):
        """Encodes the pictures and prepares what `step` needs to write k rows for each: caches, cross-attention keys."""
        P, memory = self.options.n_prefix, self.encode(images) if images.ndim == 4 else images
        heads = FAMILIES[self.options.decoder_family]["n_head_kv"] or self.options.n_head
        shape = (len(images) * k, heads, self.options.block_size, self.options.n_embd // self.options.n_head)
        state = dict(past=P, cache=[memory.new_empty(2, *shape) for _ in self.blocks],
                     cross=[block.cross.keys_values(memory) if block.has_cross else None for block in self.blocks])
        if P:
            x = self.add_positions(self.prefix(memory), torch.arange(P, device=memory.device))
            for i, block in enumerate(self.blocks):
                first = memory.new_empty(2, len(images), *shape[1:])
                x = block(x, state["cross"][i], cache=first)
                state["cache"][i] = first.repeat_interleave(k, dim=1)
        return state

    def step(self, state, tokens):
        """The rows' newest tokens, int64 (B·k,), go in; logits (B·k, V) of the next come out; state moves on."""
        past = state["past"]
        x = self.add_positions(self.wte(tokens), torch.full_like(tokens, past))[:, None]  # (B·k, 1, C)
        for block, cross, cache in zip(self.blocks, state["cross"], state["cache"]):
            x = block(x, cross, cache=cache, past=past)
        state["past"] += 1
        return F.linear(self.norm(x[:, 0]), self.wte.weight).float()

    @staticmethod
    def keep(state, rows, pictures=None):
        """Reorders or drops rows of the caches, and pictures of the cross-attention (int64 indices)."""
        past = state["past"]
        for i, cache in enumerate(state["cache"]):
            kept = cache.new_empty(2, len(rows), *cache.shape[2:])
            kept[..., :past, :] = cache[..., :past, :].index_select(1, rows)
            state["cache"][i] = kept
        if pictures is not None:
            state["cross"] = [c and [t.index_select(0, pictures) for t in c] for c in state["cross"]]

    def constrain(self, logp, words, min_tokens, max_tokens, no_repeat_ngram):
        """
        logp (R, V) of the token after words (R, t): -inf, in place, for what may not follow: EOT before min_tokens, all but
        EOT after max_tokens, whatever would make an n-gram of the row's appear again.
        """
        t, n, end = words.size(1), no_repeat_ngram, logp[:, self.eot_token].clone()
        if n and t >= n:
            grams = words.unfold(1, n, 1)  # (R, t - n + 1, n)
            last = words[:, t - n + 1:]  # the n - 1 words that a next one would complete
            repeats = (grams[..., :-1] == last[:, None]).all(-1)
            logp.scatter_add_(1, grams[..., -1], torch.zeros_like(grams[..., -1], dtype=logp.dtype)
                              .masked_fill_(repeats, -math.inf))
        logp[:, self.eot_token] = end if t >= min(min_tokens, max_tokens) else -math.inf
        if t >= max_tokens:
            logp[:, :self.eot_token] = -math.inf
        return logp

    @torch.no_grad()
    def beam_search(self, images, beam=3, length_penalty=0.5, min_tokens=1, max_tokens=None, no_repeat_ngram=0):
        """
        images uint8 (B, S, S, 3), or encoded -> a list for each picture with its best caption: (token ids without EOT, log-probability
        with EOT). beam=1 is greedy. At each step the `beam` best continuations that don't end stay; a continuation by EOT
        is finished if it is among the `beam` best of all. Finished captions compare by log-probability / length **
        length_penalty, EOT counted. A picture is done, and leaves the batch, when `beam` captions are finished and none in
        progress scores better, at its present length, than the worst of them.
        """
        max_tokens = min(max_tokens or self.longest - 1, self.longest - 1)
        k, device = beam, images.device
        state = self.start(images, k)
        picture = torch.arange(len(images), device=device)  # which of the pictures are still in the batch
        words = torch.empty(len(images), k, 0, dtype=torch.long, device=device)
        score = torch.full((len(images), k), -math.inf, device=device)
        score[:, 0] = 0.0  # k equal rows to begin with: only one counts
        finished = torch.full_like(score, -math.inf)  # scores of the k best finished, and their log-probabilities, words
        logprob, texts = finished.clone(), torch.full((len(images), k, max_tokens), self.eot_token, device=device)
        newest = torch.full((len(images) * k,), self.eot_token, device=device)
        results = [None] * len(images)
        for t in range(max_tokens + 1):
            B = len(picture)
            logp = self.step(state, newest).log_softmax(-1)
            logp = self.constrain(logp, words.flatten(0, 1), min_tokens, max_tokens, no_repeat_ngram)
            total = (score[:, :, None] + logp.view(B, k, -1)).flatten(1)  # (B, k·V)
            best, index = total.topk(2 * k, dim=1)  # at most k of them end, so k that don't are among them
            parent, token = index // logp.size(-1), index % logp.size(-1)
            ends = token == self.eot_token

            # finished ones: merge the new with the kept, keep k
            new = torch.where(ends[:, :k], best[:, :k], -math.inf)
            candidates = torch.cat([finished, new / (t + 1) ** length_penalty], dim=1)
            finished, chosen = candidates.topk(k, dim=1)
            logprob = torch.cat([logprob, new], dim=1).gather(1, chosen)
            own = F.pad(words.gather(1, parent[:, :k, None].expand(-1, -1, t)), (0, max_tokens - t), value=self.eot_token)
            texts = torch.cat([texts, own], dim=1).gather(1, chosen[..., None].expand(-1, -1, max_tokens))

            # those in progress: the k best that don't end
            order = torch.where(ends, -math.inf, best).topk(k, dim=1)
            score, parent, token = order.values, parent.gather(1, order.indices), token.gather(1, order.indices)
            words = torch.cat([words.gather(1, parent[..., None].expand(-1, -1, t)), token[..., None]], dim=2)
            done = finished[:, -1] >= score[:, 0] / (t + 1) ** length_penalty
            if t == max_tokens:
                done[:] = True
            left = (~done).nonzero()[:, 0]
            for i in done.nonzero()[:, 0].tolist():
                text = texts[i, 0].tolist()
                text = text[:text.index(self.eot_token)] if self.eot_token in text else text
                results[picture[i]] = [(text, logprob[i, 0].item())]
            if len(left) == 0:
                break
            rows = (left[:, None] * k + parent[left]).flatten()
            if len(left) < B or k > 1:
                self.keep(state, rows, left if len(left) < B else None)
            picture, words, score, finished, logprob, texts, token = (
                x[left] for x in (picture, words, score, finished, logprob, texts, token))
            newest = token.flatten()
        return results

    @torch.no_grad()
    def sample(self, images, num_samples=1, temperature=1.0, top_k=0, top_p=1.0, min_tokens=1, max_tokens=None,
               no_repeat_ngram=0, seed=0):
        """
        images uint8 (B, S, S, 3), or encoded -> a list for each picture of num_samples captions: (token ids without EOT, log-probability
        with EOT under the model itself, before temperature and truncation). top_k (0: all): only the k likeliest tokens;
        top_p: only the likeliest that together have that probability (arXiv 1904.09751).
        """
        max_tokens = min(max_tokens or self.longest - 1, self.longest - 1)
        k, device = num_samples, images.device
        generator = torch.Generator().manual_seed(seed)  # draws are made on the CPU: MPS' multinomial has been wrong
        state = self.start(images, k)
        picture = torch.arange(len(images), device=device)
        words = torch.empty(len(images) * k, 0, dtype=torch.long, device=device)
        logprob = torch.zeros(len(images) * k, device=device)
        ended = torch.zeros(len(images) * k, dtype=torch.bool, device=device)
        newest = torch.full((len(images) * k,), self.eot_token, device=device)
        results = [None] * len(images)
        for t in range(max_tokens + 1):
            logits = self.step(state, newest)
            own = logits.log_softmax(-1)
            logits = self.constrain(logits / temperature, words, min_tokens, max_tokens, no_repeat_ngram)
            if top_k and top_k < logits.size(-1):
                logits[logits < logits.topk(top_k, dim=-1).values[:, -1:]] = -math.inf
            if top_p < 1:
                ranked, order = logits.sort(dim=-1, descending=True)
                p = ranked.softmax(-1)
                ranked[p.cumsum(-1) - p >= top_p] = -math.inf
                logits = torch.empty_like(logits).scatter_(-1, order, ranked)
            newest = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(device)
            newest[ended] = self.eot_token
            logprob += own.gather(1, newest[:, None])[:, 0].masked_fill(ended, 0.0)
            ended |= newest == self.eot_token
            words = torch.cat([words, newest[:, None]], dim=1)
            done = ended.view(-1, k).all(1)
            if not done.any():
                continue
            for i in done.nonzero()[:, 0].tolist():
                texts = words[i * k:(i + 1) * k].tolist()
                results[picture[i]] = [(text[:text.index(self.eot_token)], logprob[i * k + j].item())
                                       for j, text in enumerate(texts)]
            left = (~done).nonzero()[:, 0]
            if len(left) == 0:
                break
            rows = (left[:, None] * k + torch.arange(k, device=device)).flatten()
            self.keep(state, rows, left)
            picture, words, logprob, ended, newest = picture[left], words[rows], logprob[rows], ended[rows], newest[rows]
        return results
