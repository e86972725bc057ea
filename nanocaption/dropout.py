"""Dropout that is fast on CPUs, where drawing the random numbers is what takes the time."""
import torch
import torch.nn as nn


class Dropout(nn.Dropout):
    """nn.Dropout (arXiv 1207.0580). On the CPU, one 64-bit random number serves four elements."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        n_random = (x.numel() + 3) // 4
        random = torch.empty(n_random, dtype=torch.long).random_(-2**63, None)
        # as 16-bit integers, uniform in [-2^15, 2^15)
        random = random.view(torch.int16)[:x.numel()].view(x.shape)
        keep = random >= round(self.p * 2**16) - 2**15
        scale = x.new_tensor(1 / (1 - self.p))
        return x * (keep * scale)
