"""Captions for images in memory, files or URLs, with a captioner from checkpoint.load."""
import re

import numpy as np
import torch

from nanocaption.attention_maps import PUNCTUATION, check_attention, word_attention
from nanocaption.images import load_image
from nanocaption.precision import autocast

# images encoded at a time, even if batch_size is larger: kernels for larger batches round
# differently, which in bfloat16 changes one caption in 25
ENCODE_BATCH = 8
# some datasets, such as Flickr8k, have a space before punctuation
SPACED_PUNCTUATION = re.compile(rf" ([{''.join(PUNCTUATION)}])(?= |$)")


def caption_images(captioner, images, beam=None, num_samples=1, batch_size=64, seed=0,
                   temperature=1.0, top_k=0, top_p=1.0, length_penalty=None, attention=False,
                   **limits):
    """
    Captions of uint8 images (N, S, S, 3) with any S, or of encode_images' tensor: for each image a
    list of {"text": str, "logprob": float, in nats}. One caption by beam search (beam=1 is greedy),
    or num_samples > 1 sampled ones. limits: min_tokens, max_tokens, no_repeat_ngram, and for beam
    search n_best; see nanocaption/search.py. By default, beam and length_penalty are the
    checkpoint's.

    With attention (beam search only), the best one also has "attention": a list of (word, its map:
    float32 (g, g) over the g x g patches, which sums to 1). See attention_maps.py.
    """
    if beam is None:
        beam = captioner.beam
    if length_penalty is None:
        length_penalty = captioner.length_penalty
    model = captioner.model
    if attention:
        check_attention(model, num_samples)
    device = model.mean.device
    results = []
    for start in range(0, len(images), batch_size):
        encoded = images[start:start + batch_size]
        if not torch.is_tensor(encoded):
            encoded = encode_images(captioner, encoded)
        with torch.no_grad(), autocast(device, captioner.dtype):
            if num_samples > 1:
                found = model.sample(encoded, num_samples, temperature, top_k, top_p,
                                     seed=seed + start, **limits)
            else:
                found = model.beam_search(encoded, beam, length_penalty, **limits)
            if attention:
                best = [captions[0][0] for captions in found]
                words = word_attention(model, captioner.tokenizer, encoded, best)
        for i, captions in enumerate(found):
            described = [describe_caption(captioner, *caption) for caption in captions]
            if attention:
                described[0]["attention"] = words[i]
            results.append(described)
    return results


def encode_images(captioner, images):
    """uint8 images (N, S, S, 3) with any S -> the encoder's output, a tensor (N, n, C)."""
    device = captioner.model.mean.device
    images = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    with torch.no_grad(), autocast(device, captioner.dtype):
        encoded = [captioner.model.encode(batch) for batch in images.split(ENCODE_BATCH)]
    return torch.cat(encoded)


def caption_record(name, captions, references=()):
    """
    What sample.py --json prints and serve.py returns for an image, as a dict for json.dumps.
    captions: of one image, from caption_images. Their attention maps become nested lists (g, g).
    """
    described = []
    for found in captions:
        found = dict(found)
        if "attention" in found:
            words = []
            for word, weights in found["attention"]:
                weights = weights.astype(np.float64).round(5)
                words.append({"word": word, "weights": weights.tolist()})
            found["attention"] = words
        described.append(found)
    return {"image": name, "captions": described, "references": list(references)}


def describe_caption(captioner, ids, logprob):
    """Token ids and their log-probability -> {"text", "logprob"}."""
    text = captioner.tokenizer.decode(ids).strip()
    return {"text": SPACED_PUNCTUATION.sub(r"\1", text), "logprob": logprob}


def caption(captioner, image, attention=False, **options):
    """
    The caption, a str, of an image: a path, an http(s) URL, bytes, a binary file, a PIL.Image or an
    array (H, W, 3), uint8 or float in 0..1; for a list of images or an array (N, H, W, 3), a list.
    With num_samples or n_best > 1, a list of captions instead of each one. With attention, a tuple
    (caption, [(word, its attention map), ...]) instead. options: see caption_images.

    Raises UserError, a ValueError, for anything that is not an image.
    """
    several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
    sources = image if several else [image]
    if not len(sources):
        return []
    images = np.stack([load_image(source, captioner.image_size) for source in sources])
    results = []
    for captions in caption_images(captioner, images, attention=attention, **options):
        best = captions[0]
        if attention:
            results.append((best["text"], best["attention"]))
        elif options.get("num_samples", 1) > 1 or options.get("n_best", 1) > 1:
            results.append([c["text"] for c in captions])
        else:
            results.append(best["text"])
    return results if several else results[0]
