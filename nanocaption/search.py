"""Beam search and sampling, with a model's prefill, step and reorder_cache."""
import math

import torch


@torch.no_grad()
def beam_search(model, images, beam=3, length_penalty=0.5, min_tokens=1, max_tokens=None,
                no_repeat_ngram=0, n_best=1):
    """
    The n_best captions of each image, best first, at most `beam`: for each image a list of (token
    ids without EOT, log-probability).

    images: uint8 (B, S, S, 3), or encoded. beam=1 is greedy. Finished captions are ranked by
    log-probability / length ** length_penalty, with EOT counted in both. An image is done once
    it has `beam` finished captions and no unfinished one scores better than the worst of them.
    """
    max_tokens = token_limit(model, max_tokens)
    B = len(images)
    k = beam
    device = images.device
    caches, image_kv = model.prefill(images, k)
    ids = torch.empty(B, k, 0, dtype=torch.long, device=device)  # the tokens so far
    tokens = torch.full((B, k), model.eot_token, device=device)  # the last of them
    scores = torch.full((B, k), -math.inf, device=device)
    scores[:, 0] = 0.0  # the k beams start out equal: only one counts
    first_row = torch.arange(B, device=device)[:, None] * k
    finished = [[] for _ in range(B)]  # (ranking score, log-probability, token ids)
    done = [False] * B

    for t in range(max_tokens + 1):
        logits = model.step(caches, image_kv, tokens.flatten(), t)
        logp = logits.log_softmax(-1)
        constrain(logp, ids.flatten(0, 1), model.eot_token, min_tokens, max_tokens,
                  no_repeat_ngram)
        V = logp.size(-1)
        totals = scores[..., None] + logp.view(B, k, V)
        # at most k of the best 2k end here, so at least k go on
        top, index = totals.flatten(1).topk(2 * k)  # (B, 2k)
        parent = index // V
        tokens = index % V
        ends = tokens == model.eot_token

        # captions that end here
        length = (t + 1) ** length_penalty
        ending = ends[:, :k] & (top[:, :k] > -math.inf)
        for b, j in ending.nonzero().tolist():
            if not done[b]:
                logprob = top[b, j].item()
                finished[b].append((logprob / length, logprob, ids[b, parent[b, j]].tolist()))

        # the k best that go on
        scores, best = top.masked_fill(ends, -math.inf).topk(k)
        parent = parent.gather(1, best)
        tokens = tokens.gather(1, best)
        ids = ids.gather(1, parent[..., None].expand(-1, -1, t))
        ids = torch.cat([ids, tokens[..., None]], dim=2)

        bound = (scores[:, 0] / length).tolist()
        for b in range(B):
            finished[b] = sorted(finished[b], key=rank, reverse=True)[:k]
            if len(finished[b]) == k and finished[b][-1][0] >= bound[b]:
                done[b] = True
        if all(done):
            break
        model.reorder_cache(caches, (first_row + parent).flatten())

    results = []
    for candidates in finished:
        results.append([(ids, logprob) for _, logprob, ids in candidates[:n_best]])
    return results


@torch.no_grad()
def sample(model, images, num_samples=1, temperature=1.0, top_k=0, top_p=1.0, min_tokens=1,
           max_tokens=None, no_repeat_ngram=0, seed=0):
    """
    num_samples captions of each image: for each image a list of (token ids without EOT,
    log-probability). The log-probability is the model's own: without temperature, top_k and top_p.

    images: uint8 (B, S, S, 3), or encoded. top_k keeps only the k most likely tokens (0: all),
    top_p the smallest set with that probability (arXiv 1904.09751).
    """
    max_tokens = token_limit(model, max_tokens)
    B = len(images)
    k = num_samples
    device = images.device
    generator = torch.Generator().manual_seed(seed)
    caches, image_kv = model.prefill(images, k)
    unfinished = torch.arange(B, device=device)  # images whose captions have not all ended
    ids = torch.empty(B * k, 0, dtype=torch.long, device=device)  # the tokens so far
    tokens = torch.full((B * k,), model.eot_token, device=device)  # the last of them
    logprob = torch.zeros(B * k, device=device)
    ended = torch.zeros(B * k, dtype=torch.bool, device=device)
    results = [None] * B

    for t in range(max_tokens + 1):
        logits = model.step(caches, image_kv, tokens, t)
        logp = logits.log_softmax(-1)
        logits = logits / temperature
        constrain(logits, ids, model.eot_token, min_tokens, max_tokens, no_repeat_ngram)
        p = truncate(logits, top_k, top_p).softmax(-1)
        tokens = draw(p, generator)
        tokens[ended] = model.eot_token
        token_logp = logp.gather(1, tokens[:, None])[:, 0]
        logprob += token_logp.masked_fill(ended, 0.0)
        ended |= tokens == model.eot_token
        ids = torch.cat([ids, tokens[:, None]], dim=1)

        # images leave the batch once all their captions have ended
        done = ended.view(-1, k).all(1)
        if not done.any():
            continue
        for i in done.nonzero()[:, 0].tolist():
            rows = range(i * k, (i + 1) * k)
            captions = [until(ids[row].tolist(), model.eot_token) for row in rows]
            results[unfinished[i]] = list(zip(captions, logprob[rows.start:rows.stop].tolist()))
        if done.all():
            break
        keep = (~done).nonzero()[:, 0]
        rows = keep[:, None] * k + torch.arange(k, device=device)
        rows = rows.flatten()
        model.reorder_cache(caches, rows)
        image_kv = [kv and [x[keep] for x in kv] for kv in image_kv]
        unfinished = unfinished[keep]
        ids = ids[rows]
        tokens = tokens[rows]
        logprob = logprob[rows]
        ended = ended[rows]
    return results


def draw(p, generator):
    """
    A token for each row of p (R, V), probabilities -> int64 (R,). It inverts their cumulative sum,
    which takes one random number per row. torch.multinomial needs V of them, which took nearly half
    of SCST's time on CPUs.
    """
    cumulative = p.cumsum(-1)
    # on the CPU, so that a seed gives the same numbers on every device; in (0, 1], because at 0 the
    # first token would be drawn whatever its probability
    random = 1 - torch.rand(len(p), 1, generator=generator)
    threshold = random.to(p.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold)[:, 0].clamp(max=p.size(1) - 1)


def constrain(logits, ids, eot_token, min_tokens, max_tokens, no_repeat_ngram):
    """
    Sets to -inf, in place, the logits (R, V) of tokens that may not follow ids (R, t), the tokens
    so far: EOT before min_tokens, all others at max_tokens, and any that would repeat an n-gram.
    """
    t = ids.size(1)
    n = no_repeat_ngram
    eot = logits[:, eot_token].clone()
    if n and t >= n:
        ngrams = ids.unfold(1, n, 1)  # (R, t - n + 1, n)
        suffix = ids[:, t - n + 1:]
        repeats = (ngrams[..., :-1] == suffix[:, None]).all(-1)
        row, i = repeats.nonzero(as_tuple=True)
        logits[row, ngrams[row, i, -1]] = -math.inf
    if t >= max_tokens:
        logits.fill_(-math.inf)
    too_short = t < min(min_tokens, max_tokens)
    logits[:, eot_token] = -math.inf if too_short else eot
    return logits


def token_limit(model, max_tokens):
    """The maximum number of tokens in a caption, without EOT."""
    return min(max_tokens or math.inf, model.max_tokens - 1)


def rank(candidate):
    """The ranking score of one of beam_search's finished captions."""
    return candidate[0]


def until(ids, end):
    """A list up to the first `end`."""
    return ids[:ids.index(end)]


def truncate(logits, top_k, top_p):
    """Logits (R, V) with all tokens outside of top_k or top_p, see sample, at -inf."""
    if top_k and top_k < logits.size(-1):
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        p = ranked.softmax(-1)
        before = p.cumsum(-1) - p
        ranked = ranked.masked_fill(before >= top_p, -math.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ranked)
    return logits
