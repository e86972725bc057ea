"""The optimizer: AdamW, or Muon for the blocks' matrices and AdamW for everything else."""
import re

import torch

from nanocaption.cli import UserError
from nanocaption.precision import DTYPES

BETAS = (0.9, 0.98)  # AdamW's
MOMENTUM = 0.95  # Muon's
SAFETY = 1.01  # Polar Express's safety factor
# Coefficients of Polar Express (arXiv 2505.16932), one row per iteration
POLAR_EXPRESS = (
    (8.2872, -23.5959, 17.3004),
    (4.1071, -2.9478, 0.5448),
    (3.9487, -2.9089, 0.5518),
    (3.3184, -2.4885, 0.5100),
    (2.3007, -1.6689, 0.4188),
)


class Muon(torch.optim.Optimizer):
    """
    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): each matrix moves along its
    momentum, orthogonalized by a few matrix products.

    torch.optim.Muon goes through the matrices one at a time; here all matrices of one shape are
    stacked, which is much faster on CPUs.
    """

    def __init__(self, params, lr, weight_decay=0.0, dtype=torch.float32):
        """dtype: of the matrix products."""
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update(params, group["lr"], group["weight_decay"])

    def update(self, params, lr, weight_decay):
        """One update of params, matrices of the same shape."""
        rows, columns = params[0].shape
        momentum = []
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum.append(self.state[p]["momentum"])
        gradients = [p.grad for p in params]
        torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
        # Nesterov: look one step ahead
        direction = torch.stack(torch._foreach_lerp(gradients, momentum, MOMENTUM))
        # assume that this shape is a fused qkv or kv: orthogonalize its square parts separately
        fused = rows in (2 * columns, 3 * columns)
        side = columns if fused else rows
        direction = orthogonalize(direction.view(-1, side, columns), self.dtype)
        direction = direction.view(-1, rows, columns)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        scale = max(1, side / columns) ** 0.5
        torch._foreach_add_(params, list(direction), alpha=-lr * scale)


class Optimizers:
    """Several optimizers that step together."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        groups = []
        for optimizer in self.optimizers:
            groups += optimizer.param_groups
        return groups

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        """Restores what state_dict returned. Raises ValueError if it does not fit."""
        if len(states) != len(self.optimizers):
            raise ValueError("a different number of optimizers")
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)


def orthogonalize(G, dtype=torch.float32):
    """
    float32 (n, a, b) -> (n, a, b): roughly the nearest matrices whose singular values are all 1, by
    Polar Express, a variant of the quintic Newton-Schulz iteration, with products in dtype.
    """
    X = G.to(dtype)
    tall = G.size(1) > G.size(2)
    if tall:
        X = X.mT
    X = X / (SAFETY * X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        # keeps singular values that rounding lifts above 1 from diverging, as in the paper
        a = a / SAFETY
        b = b / SAFETY ** 3
        c = c / SAFETY ** 5
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    if tall:
        X = X.mT
    return X.to(G.dtype)


def parse_lr_scale(text):
    """
    "encoder=0.1 wte=0.5" -> [(compiled regular expression, factor)].

    Raises UserError unless every part is PATTERN=FACTOR.
    """
    factors = []
    for part in text.split():
        pattern, _, factor = part.rpartition("=")
        try:
            regex = re.compile(pattern)
            factor = float(factor)
        except (re.error, ValueError):
            factor = -1.0
        if not pattern or not 0 <= factor <= 1e3:
            raise UserError(
                f"lr_scale takes PATTERN=FACTOR parts, such as 'encoder=0.1 wte=0.5', not {part!r}"
            )
        factors.append((regex, factor))
    return factors


def make_optimizer(model, options):
    """
    The optimizer of a model's trainable parameters. Biases and norms have no weight decay. The
    "initial_lr" of a parameter group is its peak learning rate, scaled by the first matching
    pattern of lr_scale.
    """
    lr_scale = parse_lr_scale(options.lr_scale)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for regex, _ in lr_scale:
        if not any(regex.search(name) for name, _ in named):
            examples = ", ".join(name for name, _ in named[:3])
            raise UserError(
                f"lr_scale: {regex.pattern!r} matches no trainable parameter; "
                f"their names look like {examples}"
            )
    adamw = {}  # (weight decay, learning rate) -> parameters
    muon = {}
    for name, p in named:
        is_muon = options.optimizer == "muon" and p.ndim == 2 and "blocks." in name
        lr = options.muon_lr if is_muon else options.learning_rate
        for regex, factor in lr_scale:
            if regex.search(name):
                lr *= factor
                break
        weight_decay = options.weight_decay if p.ndim >= 2 else 0.0
        groups = muon if is_muon else adamw
        groups.setdefault((weight_decay, lr), []).append(p)
    optimizers = []
    if adamw:
        optimizers.append(torch.optim.AdamW(param_groups(adamw), betas=BETAS, fused=True))
    if muon:
        dtype = DTYPES[options.dtype]
        optimizers.append(Muon(param_groups(muon), lr=options.muon_lr, dtype=dtype))
    return Optimizers(optimizers)


def param_groups(groups):
    """{(weight decay, learning rate): parameters} -> torch.optim's list of dicts."""
    result = []
    for (weight_decay, lr), params in groups.items():
        result.append(dict(params=params, weight_decay=weight_decay, lr=lr, initial_lr=lr))
    return result
