"""
Where each word looked: how much a caption's words attend to each patch of the image.

A finished caption is read once more, all its tokens at once. Meanwhile, hooks on the decoder's
attention compute the weights, so that neither generation nor training has to keep them.

A word's map is the mean over layers and heads at the step that writes the word, as far as it is
above the mean over all steps of the caption: that leaves out the patches that every word attends
to. dev/attention.md compares this with other rules.
"""
import math
import re
from contextlib import contextmanager

import torch

from nanocaption.cli import UserError


def check_attention(model, num_samples=1):
    """Raises UserError if a captioner's attention cannot be shown."""
    options = model.options
    reason = None
    if num_samples > 1:
        reason = "it works with beam search only, not with samples"
    elif options.n_query:
        reason = (f"this checkpoint pools the patches into n_query={options.n_query} vectors, "
                  "which have no place in the image")
    elif options.bridge == "prefix" and options.decoder_family == "falcon":
        reason = "Falcon's self-attention is not supported; use bridge=cross or both"
    if reason:
        raise UserError(f"cannot show where each word looked: {reason}")


@torch.no_grad()
def word_attention(model, tokenizer, image, captions):
    """
    Encoded images (B, N, C) and a caption of each, list[list[int]] without EOT -> for each image a
    list of (word, its attention over the grid of patches, float32 (g, g) that sums to 1).
    """
    results = []
    # one image at a time, because the weights of all heads take much memory
    for i, ids in enumerate(captions):
        weights = torch.stack(decoder_attention(model, image[i:i + 1], ids))
        maps = above_mean(over_grid(weights.mean((0, 1)))).cpu().numpy()  # (T, g, g)
        words = []
        for word, tokens in join_tokens(tokenizer, ids):
            words.append((word, maps[tokens].mean(0)))
        results.append(words)
    return results


def decoder_attention(model, image, ids):
    """
    The weights of the decoder's attention to an encoded image (1, N, C) while it writes a caption,
    list[int] without EOT: for each layer float32 (H, T, N). Step t writes token t, the last step
    EOT. With bridge="prefix", it is the part of self-attention over the prefix.
    """
    tokens = torch.tensor([[model.eot_token, *ids]], device=image.device)  # (1, T)
    position = torch.arange(tokens.size(1), device=image.device)[None]
    packed = dict(tokens=tokens, position=position, segment=torch.ones_like(tokens))
    P = model.n_prefix
    if model.options.bridge == "prefix":
        with record([block.attention for block in model.blocks], self_weights) as weights:
            model.decode(image, packed)
        return [w[0, :, P:, :P] for w in weights]
    with record([block.cross for block in model.blocks], cross_weights) as weights:
        model.decode(image, packed)
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
    """q (B, H, T, D), k (B, H, S, D) and a mask as in model.py's attention -> (B, H, T, S)"""
    scores = (q @ k.transpose(-2, -1)).float() * q.size(-1) ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1)


def over_grid(weights):
    """
    Weights (..., N) -> (..., g, g) that sum to 1. Class tokens, which come before the patches and
    have no place in the image, are left out.
    """
    N = weights.size(-1)
    grid = math.isqrt(N)
    weights = weights[..., N - grid * grid:]
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.unflatten(-1, (grid, grid))


def above_mean(steps):
    """
    Maps (T, g, g) of all steps of one caption, with EOT's -> how far each is above their mean,
    scaled to sum to 1.
    """
    # a step without any difference gets an even map
    above = (steps - steps.mean(0)).clamp_min(1e-9)
    return above / above.sum((1, 2), keepdim=True)


def join_tokens(tokenizer, ids):
    """
    Token ids -> a list of (word, the places in ids of its tokens). A word is what stands between
    spaces; several tokens of byte-level BPE may make one.
    """
    parts = tokenizer.decode_tokens_bytes(ids)
    owner = []  # for each byte, the place of its token
    for place, part in enumerate(parts):
        owner += [place] * len(part)
    words = []
    for match in re.finditer(rb"\S+", b"".join(parts)):
        word = match[0].decode(errors="replace")
        words.append((word, sorted(set(owner[match.start():match.end()]))))
    return words
