"""The output head and its loss in one step, without ever materializing all logits."""
import torch
from torch.nn import functional as F


class HeadLoss(torch.autograd.Function):
    """See head_loss. forward computes the gradients, while the logits are in cache on CPUs."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher, alpha, smoothing, advantage):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        V = len(weight)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            # cast once, not once per chunk
            dtype = torch.get_autocast_dtype(device)
            hidden = hidden.to(dtype)
            weight = weight.to(dtype)
            if teacher is not None:
                teacher = [t.to(dtype) for t in teacher]
        loss = torch.zeros((), device=hidden.device)
        ce = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None

        # on CPUs, a chunk of logits should fit in the cache
        chunk = max((2**21 if device == "cpu" else 2**26) // V, 1)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h = hidden[rows]
            target = targets[rows, None]
            logits = h @ weight.T  # (chunk, V)
            logp = logits.float().log_softmax(1)
            target_logp = logp.gather(1, target)
            ce -= target_logp.sum()
            # the loss is minus the expected logp under the targets
            expected = target_logp
            if smoothing:
                expected = (1 - smoothing) * target_logp + smoothing * logp.mean(1, keepdim=True)
            if teacher is not None:
                teacher_p = (teacher[0][rows] @ teacher[1].T).float().softmax(1)
                teacher_logp = (teacher_p * logp).sum(1, keepdim=True)
                expected = (1 - alpha) * expected + alpha * teacher_logp
            if advantage is not None:
                expected = expected * advantage[rows, None]
            loss -= expected.sum()
            if not needs_hidden and not needs_weight:
                continue

            # gradient with respect to the logits, in place: probabilities minus targets
            gradient = logp.exp_()
            one_hot = torch.full_like(target_logp, -(1 - alpha) * (1 - smoothing))
            gradient.scatter_add_(1, target, one_hot)
            if smoothing:
                gradient -= (1 - alpha) * smoothing / V
            if teacher is not None:
                gradient.sub_(teacher_p, alpha=alpha)
            if advantage is not None:
                gradient *= advantage[rows, None]
            gradient = gradient.to(h.dtype)
            d_hidden[rows] = gradient @ weight
            if needs_weight:
                d_weight += gradient.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(ce)
        return loss, ce

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_weight = ctx.saved_tensors
        if d_weight is not None:
            d_weight = d_weight * d_loss
        return d_hidden * d_loss, d_weight, None, None, None, None, None


def head_loss(hidden, weight, targets, teacher=None, alpha=0.0, smoothing=0.0, advantage=None):
    """
    Cross-entropy of logits = hidden @ weight.T, summed over tokens.

    hidden (n, C), weight (V, C), targets int64 (n,). Returns two float32 scalars: the training
    loss, and the plain cross-entropy in nats, which has no gradient. The training loss has label
    smoothing (arXiv 1512.00567) and, with teacher = (hidden, weight) of another model, its soft
    targets at weight alpha (arXiv 2107.07651): (1 - alpha) CE(targets) + alpha CE(teacher's
    probabilities). advantage, float (n,), weights the tokens in the training loss.

    The (n, V) logits are never materialized: each chunk of them is overwritten with its gradient,
    on CPUs while still in cache.
    """
    if teacher is None:
        alpha = 0.0
    return HeadLoss.apply(hidden, weight, targets, teacher, alpha, smoothing, advantage)
