"""The optimizer for the matrices of the blocks."""
import torch


class Muon(torch.optim.Optimizer):
    """
    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the update of a matrix is its momentum, orthogonalised by
    a few matrix products. torch.optim.Muon does that in bfloat16, one matrix at a time, which is slow on most CPUs: here all of one
    shape go together, in float32 but for CUDA. A fused qkv or kv counts as the square matrices that it consists of.
    """
    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                gradients = [p.grad for p in params]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))  # Nesterov
                side = columns if rows in (2 * columns, 3 * columns) else rows
                update = orthogonalise(update.reshape(-1, side, columns)) * max(1, side / columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.view(-1, rows, columns)), alpha=-group["lr"])


POLAR_EXPRESS = ((8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518), (3.3184, -2.4885, 0.5100),
                 (2.3007, -1.6689, 0.4188))


def orthogonalise(G):
    """
    (n, a, b) -> (n, a, b): nearly the nearest matrices whose singular values are all 1, by a quintic iteration with the
    coefficients of Polar Express (arXiv 2505.16932).
    """
    X = G.bfloat16() if G.is_cuda else G.float()
    wide = G.size(1) <= G.size(2)
    X = X if wide else X.mT
    X = X / (1.01 * X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A²) X
    return (X if wide else X.mT).to(G.dtype)
