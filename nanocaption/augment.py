"""Random crops, flips and color jitter for a batch of images."""
import math
import re

import numpy as np
import torch
from torch.nn import functional as F


def augment(images, seeds, may_flip, options):
    """
    uint8 (B, S, S, 3) -> float (B, s, s, 3) with s = options.image_size, on the scale 0..255
    (jitter may go beyond).

    One affine transform crops and mirrors an image. It depends only on the image's seed, a tuple of
    ints, not on how a batch is split over GPUs. may_flip: bool (B,).
    """
    B = len(images)
    size = options.image_size
    theta = torch.zeros(B, 2, 3)
    factors = torch.ones(B, 3)  # of brightness, contrast, saturation
    for i, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        area, stretch, x, y, mirror = rng.random(5)
        factors[i] = torch.from_numpy(1 + options.jitter * (2 * rng.random(3) - 1))
        side = math.sqrt(options.crop + (1 - options.crop) * area)
        # w / h is between 3:4 and 4:3, and neither is above 1
        ratio = (4 / 3) ** (stretch - 0.5)
        ratio = min(max(ratio, side), 1 / side)
        w = side * ratio
        h = side / ratio
        flip = options.flip and may_flip[i] and mirror < 0.5
        theta[i, 0, 0] = -w if flip else w
        theta[i, 0, 2] = (2 * x - 1) * (1 - w)
        theta[i, 1, 1] = h
        theta[i, 1, 2] = (2 * y - 1) * (1 - h)
    x = images.permute(0, 3, 1, 2).float()  # (B, 3, S, S)
    grid = F.affine_grid(theta.to(x.device), (B, 3, size, size), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    if options.jitter:
        brightness, contrast, saturation = factors.to(x.device).T.view(3, B, 1, 1, 1)
        gray = x.mean(1, keepdim=True)
        x = gray + saturation * (x - gray)
        mean = gray.mean((2, 3), keepdim=True)
        x = ((x - mean) * contrast + mean) * brightness
    return x.permute(0, 2, 3, 1)


def names_a_side(captions):
    """Whether a caption says left or right, so that its image must not be mirrored."""
    return any(re.search(r"\b(left|right)\b", text, re.IGNORECASE) for text in captions)
