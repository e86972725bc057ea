"""
Attention maps: where the model looked for each word of a caption.

A finished caption goes through the decoder once more, all its tokens at once. Hooks compute the
attention weights there, so that neither generation nor training has to keep them.

A word's map is the attention to each patch at the step that writes the word, averaged over layers
and heads, minus its mean over all steps of the caption; negative values are set to 0. This removes
the patches that every word attends to. dev/attention.md compares this with other rules.
"""
import math
import re
from contextlib import contextmanager

import torch

from nanocaption.cli import UserError

PUNCTUATION = (".", ",", ";", "?", "!")  # after a space, it joins the word before it


def check_attention(model, num_samples=1):
    """Raises UserError if attention maps cannot be made with this model or for samples."""
    options = model.options
    reason = None
    if num_samples > 1:
        reason = "they need beam search, not samples"
    elif options.n_query:
        reason = (f"this checkpoint pools the patches into n_query={options.n_query} vectors, "
                  "which have no position in the image")
    elif options.bridge == "prefix" and options.decoder_family == "falcon":
        reason = "Falcon's self-attention is not supported; train with bridge=cross or both"
    if reason:
        raise UserError(f"cannot make attention maps: {reason}")


@torch.no_grad()
def word_attention(model, tokenizer, encoded, captions):
    """
    Encoded images (B, N, C) and a caption of each, list[list[int]] without EOT -> for each image a
    list of (word, its map: float32 (g, g) over the g x g patches, which sums to 1).
    """
    results = []
    # one image at a time, because the weights of all heads need a lot of memory
    for i, ids in enumerate(captions):
        weights = torch.stack(decoder_attention(model, encoded[i:i + 1], ids))
        maps = above_mean(over_grid(weights.mean((0, 1)))).cpu().numpy()  # (T, g, g)
        words = []
        for word, tokens in join_tokens(tokenizer, ids):
            words.append((word, maps[tokens].mean(0)))
        results.append(words)
    return results


def decoder_attention(model, encoded, ids):
    """
    The weights of the decoder's attention to an encoded image (1, N, C) while it writes a caption,
    list[int] without EOT: for each layer float32 (H, T, N). Step t writes token t, the last step
    EOT. With bridge="prefix", these are self-attention's weights on the prefix.
    """
    tokens = torch.tensor([[model.eot_token, *ids]], device=encoded.device)  # (1, T)
    position = torch.arange(tokens.size(1), device=encoded.device)[None]
    packed = dict(tokens=tokens, position=position, segment=torch.ones_like(tokens))
    P = model.n_prefix
    if model.options.bridge == "prefix":
        with record([block.attention for block in model.blocks], self_weights) as weights:
            model.decode(encoded, packed)
        return [w[0, :, P:, :P] for w in weights]
    with record([block.cross for block in model.blocks], cross_weights) as weights:
        model.decode(encoded, packed)
    return [w[0, :, P:] for w in weights]


@contextmanager
def record(modules, compute):
    """Inside this context, each call of one of the modules adds its weights to the list."""
    weights = []

    def hook(module, args):
        weights.append(compute(module, *args))

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def cross_weights(cross, x, image_kv):
    """The weights (B, H, T, N) in model.py's CrossAttention, for the arguments of its forward."""
    q = cross.q(x).unflatten(-1, (cross.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
    return softmax_weights(q, image_kv[0])


def self_weights(attention, x, mask=None, cache=None):
    """The weights (B, H, T, T) in model.py's SelfAttention, for the arguments of its forward."""
    q, k, _ = attention.qkv(x).chunk(3, dim=-1)
    q = q.unflatten(-1, (attention.n_head, -1)).transpose(1, 2)
    k = k.unflatten(-1, (attention.n_head, -1)).transpose(1, 2)
    return softmax_weights(q, k, mask)


def softmax_weights(q, k, mask=None):
    """q (B, H, T, D), k (B, H, L, D) and a mask as in model.py's attention -> (B, H, T, L)"""
    scores = (q @ k.transpose(-2, -1)).float() * q.size(-1) ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1)


def over_grid(weights):
    """
    Weights (..., N) -> (..., g, g) that sum to 1. Class tokens, which come before the patches and
    have no position in the image, are dropped.
    """
    N = weights.size(-1)
    grid = math.isqrt(N)
    weights = weights[..., N - grid * grid:]
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.unflatten(-1, (grid, grid))


def above_mean(steps):
    """
    Maps (T, g, g) of all steps of one caption, including EOT's -> how far each is above their
    mean, scaled to sum to 1.
    """
    # not 0: a map that equals the mean becomes uniform
    above = (steps - steps.mean(0)).clamp_min(1e-9)
    return above / above.sum((1, 2), keepdim=True)


def join_tokens(tokenizer, ids):
    """
    Token ids -> a list of (word, the indices of its tokens in ids). Words are separated by
    whitespace; a word may have several byte-level BPE tokens. Punctuation after a space joins the
    word before it, as in the caption, but its token does not count.
    """
    parts = tokenizer.decode_tokens_bytes(ids)
    owner = []  # for each byte, the index of its token
    for i, part in enumerate(parts):
        owner += [i] * len(part)
    words = []
    for match in re.finditer(rb"\S+", b"".join(parts)):
        word = match[0].decode(errors="replace")
        if words and word in PUNCTUATION:
            previous, tokens = words[-1]
            words[-1] = (previous + word, tokens)
            continue
        words.append((word, sorted(set(owner[match.start():match.end()]))))
    return words
