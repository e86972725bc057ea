"""Captions for images in memory, files or URLs, with a captioner from checkpoint.load."""
import numpy as np
import torch

from nanocaption.images import load_image
from nanocaption.precision import autocast


def caption_images(captioner, images, beam=3, num_samples=1, batch_size=64, seed=0,
                   temperature=1.0, top_k=0, top_p=1.0, length_penalty=0.5, **limits):
    """
    Captions of uint8 images (N, S, S, 3) with any S: for each image a list of {"text": str,
    "logprob": float, in nats}. One caption by beam search (beam=1 is greedy), or num_samples > 1
    sampled ones. limits: min_tokens, max_tokens, no_repeat_ngram; see nanocaption/search.py.
    """
    model = captioner.model
    device = model.mean.device
    results = []
    for start in range(0, len(images), batch_size):
        batch = np.ascontiguousarray(images[start:start + batch_size])
        batch = torch.from_numpy(batch).to(device)
        with autocast(device, captioner.dtype):
            if num_samples > 1:
                found = model.sample(batch, num_samples, temperature, top_k, top_p,
                                     seed=seed + start, **limits)
            else:
                found = model.beam_search(batch, beam, length_penalty, **limits)
        for captions in found:
            results.append([describe_caption(captioner, *caption) for caption in captions])
    return results


def describe_caption(captioner, ids, logprob):
    """Token ids and their log-probability -> {"text", "logprob"}."""
    return {"text": captioner.tokenizer.decode(ids).strip(), "logprob": logprob}


def caption(captioner, image, **options):
    """
    The caption, a str, of an image: a path, an http(s) URL, bytes, a binary file, a PIL.Image or an
    array (H, W, 3), uint8 or float in 0..1; for a list of images or an array (N, H, W, 3), a list.
    With num_samples=k, k captions of each. options: see caption_images.

    Raises UserError, a ValueError, for anything that is not an image.
    """
    several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
    sources = image if several else [image]
    if not len(sources):
        return []
    images = np.stack([load_image(source, captioner.image_size) for source in sources])
    texts = []
    for captions in caption_images(captioner, images, **options):
        found = [c["text"] for c in captions]
        texts.append(found if options.get("num_samples", 1) > 1 else found[0])
    return texts if several else texts[0]
