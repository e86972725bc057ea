"""Tests of the model, each part against an independent one: naive loops, torch's own losses."""
import itertools
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from helpers import TINY, random_images
from model import (Captioner, LocalConv, ModelOptions, PatchEmbedding, attention, caption_mask,
                   pack, patchify)
from nanocaption.dropout import Dropout
from nanocaption.head_loss import head_loss
from nanocaption.metrics import cider, cider_references, document_frequencies
from nanocaption.scst import sample_captions, token_advantages
from nanocaption.search import draw

BRIDGES = [
    dict(bridge="cross"),
    dict(bridge="prefix"),
    dict(bridge="both", n_query=3),
    dict(bridge="prefix", n_query=2),
    dict(bridge="cross", local_conv=True),
]


def tiny_model(vocab_size=50, seed=0, **options):
    """A captioner far from its initialization, so that every parameter matters."""
    torch.manual_seed(seed)
    model = Captioner(ModelOptions(**{**TINY, **options}), vocab_size).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def random_captions(n, vocab_size=50, seed=0, longest=9):
    """For each of n images, one to six captions, as lists of token ids."""
    rng = random.Random(seed)
    captions = []
    for _ in range(n):
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 6))]
        captions.append([[rng.randrange(vocab_size - 1) for _ in range(m)] for m in lengths])
    return captions


def real_tokens(hidden, packed):
    """Hidden states (B, T, C) without padding, (n, C)."""
    return hidden[packed["targets"] >= 0]


# -----------------------------------------------------------------------------
# encoder

def test_patchify_puts_each_pixel_in_its_place():
    images = torch.randn(2, 3, 12, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    for b, c, y, x in itertools.product(range(2), range(3), range(12), range(12)):
        patch = (y // 4) * 3 + x // 4
        place = ((y % 4) * 4 + x % 4) * 3 + c
        assert patches[b, patch, place] == images[b, c, y, x]


def test_a_pixel_changes_only_its_own_patch():
    stem = PatchEmbedding(12, 4, 8)
    before = stem(torch.zeros(1, 3, 12, 12))
    for channel in range(3):
        images = torch.zeros(1, 3, 12, 12)
        images[0, channel, 5, 9] = 1
        changed = (stem(images) != before).any(-1)[0]
        assert changed.nonzero().flatten().tolist() == [5]


def test_local_conv_looks_at_neighbors_on_the_grid():
    torch.manual_seed(0)
    layer = LocalConv(5)
    x = torch.randn(2, 9, 5)
    y = layer(x)
    for b, row, column in itertools.product(range(2), range(3), range(3)):
        expected = x[b, 3 * row + column] + layer.bias
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            if 0 <= row + dy < 3 and 0 <= column + dx < 3:
                neighbor = x[b, 3 * (row + dy) + column + dx]
                expected = expected + layer.weight[:, 0, dy + 1, dx + 1] * neighbor
        torch.testing.assert_close(y[b, 3 * row + column], expected)


def test_local_conv_is_initially_the_identity():
    plain = Captioner(ModelOptions(**TINY), 50).encoder
    local = Captioner(ModelOptions(**TINY, local_conv=True), 50).encoder
    local.load_state_dict(plain.state_dict(), strict=False)
    images = torch.ones(1, 3, 16, 16)
    torch.testing.assert_close(local(images), plain(images))


@pytest.mark.parametrize("options", BRIDGES)
def test_every_hidden_state_depends_on_the_image(options):
    model = tiny_model(**options)
    captions = pack(random_captions(2), 49, 20)
    hidden = [model.decode(model.encode(random_images(2, seed=s)), captions) for s in (1, 2)]
    difference = (hidden[0] - hidden[1]).abs().amax(-1)
    assert difference[captions["targets"] >= 0].min() > 1e-3


# -----------------------------------------------------------------------------
# attention and packing

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_attention_is_a_weighted_mean(dtype, tolerance):
    torch.manual_seed(0)
    q = torch.randn(2, 3, 5, 8)
    k = torch.randn(2, 3, 7, 8)
    v = torch.randn(2, 3, 7, 8)
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[..., 0] = True
    for m in (None, mask):
        y = attention(q.to(dtype), k.to(dtype), v.to(dtype), m)
        assert y.dtype == dtype
        for b, h, t in itertools.product(range(2), range(3), range(5)):
            seen = [s for s in range(7) if m is None or m[b, 0, t, s]]
            p = torch.stack([q[b, h, t] @ k[b, h, s] / math.sqrt(8) for s in seen]).softmax(0)
            expected = sum(weight * v[b, h, s] for weight, s in zip(p, seen))
            torch.testing.assert_close(y[b, h, t].float(), expected, rtol=0, atol=tolerance)


def test_pack_cuts_pads_and_restarts():
    packed = pack([[[1, 2, 3, 4], [5]], [[6]]], 9, 3)
    # the caption that is cut predicts no EOT
    assert packed["tokens"].tolist() == [[9, 1, 2, 9, 5], [9, 6, 9, 9, 9]]
    assert packed["targets"].tolist() == [[1, 2, 3, 5, 9], [6, 9, -1, -1, -1]]
    assert packed["position"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert packed["segment"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("n_prefix", [0, 2])
def test_caption_mask_shows_the_prefix_and_the_caption_so_far(n_prefix):
    segment = torch.tensor([[1, 1, 2, 2, 2, 0]])
    mask = caption_mask(segment, n_prefix)
    assert mask.shape == (1, 1, 6 + n_prefix, 6 + n_prefix)
    for i, j in itertools.product(range(5), range(6)):
        expected = bool(segment[0, i] == segment[0, j]) and j <= i
        assert mask[0, 0, n_prefix + i, n_prefix + j] == expected
    assert mask[..., :n_prefix].all()


@pytest.mark.parametrize("options", BRIDGES)
def test_packed_rows_equal_separate_rows(options):
    model = tiny_model(**options)
    images = random_images(3)
    captions = random_captions(3)
    packed = pack(captions, 49, model.max_tokens)
    together = real_tokens(model.decode(model.encode(images), packed), packed)
    alone = []
    total = 0
    for i in range(3):
        for words in captions[i]:
            row = pack([[words]], 49, model.max_tokens)
            alone.append(model.decode(model.encode(images[i:i + 1]), row)[0])
            total += model(images[i:i + 1], row)[1].item()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert model(images, packed)[1].item() == pytest.approx(total, rel=1e-5)


# -----------------------------------------------------------------------------
# losses

LOSS_OPTIONS = BRIDGES + [dict(n_embd=128, n_head=4), dict(n_layer_encoder=6)]


@pytest.mark.parametrize("options", LOSS_OPTIONS)
def test_the_initial_loss_is_that_of_uniform_guessing(options):
    torch.manual_seed(0)
    model = Captioner(ModelOptions(**{**TINY, **options}), 1000)
    packed = pack(random_captions(20, 1000), 999, 20)
    _, ce = model(random_images(20), packed)
    n_tokens = (packed["targets"] >= 0).sum().item()
    assert ce.item() / n_tokens == pytest.approx(math.log(1000), rel=0.03)


@pytest.mark.parametrize("with_advantage", [False, True])
def test_unigram_loss_predicts_each_word_from_the_mean_patch(with_advantage):
    model = tiny_model(unigram=0.7)
    images = random_images(3)
    captions = random_captions(3)
    packed = pack(captions, 49, model.max_tokens)
    if with_advantage:
        packed["advantage"] = torch.full(packed["targets"].shape, 0.5)
    plain, _ = model(images, packed)
    loss, _ = model.train()(images, packed)
    logits = model.unigram(model.encode(images).mean(1)) @ model.wte.weight.T
    logp = logits.log_softmax(-1)
    expected = 0.0
    if not with_advantage:
        for i in range(3):
            for words in captions[i]:
                expected -= 0.7 * sum(logp[i, word].item() for word in [*words, 49])
    assert (loss - plain).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    loss.backward()
    has_gradient = (model.unigram.weight.grad.abs().max() > 0).item()
    assert has_gradient != with_advantage


@pytest.mark.parametrize("alpha, smoothing", [(0, 0), (0.4, 0), (0, 0.1), (0.3, 0.2)])
def test_head_loss_and_its_gradients_equal_cross_entropys(alpha, smoothing):
    torch.manual_seed(0)
    V = 700
    n = 3100  # more than one chunk
    hidden = torch.randn(n, 16, requires_grad=True)
    weight = torch.randn(V, 16, requires_grad=True)
    targets = torch.randint(V, (n,))
    teacher = (torch.randn(n, 16), torch.randn(V, 16))
    loss, ce = head_loss(hidden, weight, targets, teacher if alpha else None, alpha, smoothing)
    logits = hidden @ weight.T
    hard = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    probabilities = (teacher[0] @ teacher[1].T).softmax(1)
    soft = F.cross_entropy(logits, probabilities, reduction="sum")
    expected = (1 - alpha) * hard + alpha * soft
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    plain = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ce, plain, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(2 * loss, (hidden, weight))
    theirs = torch.autograd.grad(2 * expected, (hidden, weight))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_head_loss_weights_tokens_by_their_advantage(bf16):
    torch.manual_seed(0)
    hidden = torch.randn(300, 16, requires_grad=True)
    weight = torch.randn(700, 16, requires_grad=True)
    targets = torch.randint(700, (300,))
    advantage = torch.randn(300)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = head_loss(hidden, weight, targets, advantage=advantage)
    each = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    expected = (advantage * each).sum()
    tolerance = 0.02 if bf16 else 1e-3
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance * 300)
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.float32
        assert (a - b).norm() < (0.02 if bf16 else 1e-4) * b.norm()


def test_tokens_dropped_by_word_dropout_are_not_read():
    images = random_images(3)
    captions = pack(random_captions(3), 49, 20)
    others = dict(captions, tokens=captions["tokens"].flip(0))
    model = tiny_model(word_dropout=1 - 1e-9)
    assert model(images, captions)[0] != model(images, others)[0]
    model.train()
    assert model(images, captions)[0] == model(images, others)[0]


@pytest.mark.parametrize("p", (0.1, 0.2, 0.5))
def test_dropout_drops_each_element_independently(p):
    torch.manual_seed(0)
    dropout = Dropout(p).train()
    x = torch.ones(999, 1001, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    scale = torch.tensor(1 / (1 - p)).item()
    assert set(y.unique().tolist()) == {0.0, scale}
    assert torch.equal(x.grad, y.detach())
    dropped = (y == 0).float().flatten()
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert abs(dropped.mean() - p) < 5 * deviation
    # four elements share a random number
    for i in range(4):
        assert abs(dropped[i::4].mean() - p) < 10 * deviation
    for distance in (1, 2, 3, 4, 1001):
        both = (dropped[distance:] * dropped[:-distance]).mean()
        assert abs(both - p * p) < 7.5 * p * math.sqrt((1 - p * p) / x.numel())
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


# -----------------------------------------------------------------------------
# generation

def next_logp(model, image, words):
    """Log-probabilities (V,) of the token after words, by a forward pass without cache."""
    packed = pack([[words]], model.eot_token, 99)
    hidden = model.decode(model.encode(image[None]), packed)
    return F.linear(hidden[0, -1], model.wte.weight).log_softmax(-1)


def repeats_ngram(words, new, n):
    """Whether appending new repeats an n-gram of words."""
    seen = {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}
    return n > 0 and tuple([*words, new][-n:]) in seen


def naive_beam(model, image, beam, length_penalty, max_tokens, min_tokens=1, ngram=0):
    """beam_search as its docstring describes it: plain Python, one hypothesis at a time."""
    eot = model.eot_token
    live = [([], 0.0)]
    finished = []
    for t in range(max_tokens + 1):
        continuations = []
        for words, score in live:
            for token, logp in enumerate(next_logp(model, image, words).tolist()):
                if token == eot:
                    allowed = t >= min_tokens
                else:
                    allowed = t < max_tokens and not repeats_ngram(words, token, ngram)
                if allowed:
                    continuations.append((score + logp, [*words, token]))
        continuations.sort(key=lambda c: -c[0])
        for score, words in continuations[:beam]:
            if words[-1] == eot:
                finished.append((score / (t + 1) ** length_penalty, score, words[:-1]))
        finished = sorted(finished, key=lambda f: -f[0])[:beam]
        live = [(words, score) for score, words in continuations if words[-1] != eot][:beam]
        if len(finished) == beam:
            if not live or finished[-1][0] >= live[0][1] / (t + 1) ** length_penalty:
                break
    return finished[0][2], finished[0][1]


BEAMS = [
    dict(beam=1),
    dict(beam=3),
    dict(beam=4, length_penalty=0.0),
    dict(beam=3, no_repeat_ngram=2, min_tokens=3),
]


@pytest.mark.parametrize("options", BRIDGES)
@torch.no_grad()
def test_cached_beam_search_equals_a_naive_one(options):
    model = tiny_model(vocab_size=12, **options)
    images = random_images(4)
    for settings in BEAMS:
        settings = {"length_penalty": 1.0, **settings}
        results = model.beam_search(images, max_tokens=7, **settings)
        for image, [(words, logprob)] in zip(images, results):
            expected, score = naive_beam(
                model, image, settings["beam"], settings["length_penalty"], 7,
                settings.get("min_tokens", 1), settings.get("no_repeat_ngram", 0))
            assert words == expected
            assert logprob == pytest.approx(score, abs=1e-3)


@torch.no_grad()
def test_a_wide_beam_is_an_exhaustive_search():
    model = tiny_model(vocab_size=5)
    images = random_images(3, seed=3)
    every = []
    for n in range(1, 4):
        every += [list(words) for words in itertools.product(range(4), repeat=n)]
    results = model.beam_search(images, beam=64, length_penalty=0.0, max_tokens=3, n_best=5)
    for image, found in zip(images, results):
        scores = [(-model(image[None], pack([[w]], 4, 99))[1].item(), w) for w in every]
        best = sorted(scores, reverse=True)[:5]
        assert [words for words, _ in found] == [words for _, words in best]
        assert [logprob for _, logprob in found] == pytest.approx([p for p, _ in best], abs=1e-4)


@pytest.mark.parametrize("options", BRIDGES[:3])
@torch.no_grad()
def test_sampling(options):
    model = tiny_model(vocab_size=12, **options)
    images = random_images(5)
    greedy = model.beam_search(images, beam=1, max_tokens=8)
    for [(words, _)], samples in zip(greedy, model.sample(images, 2, top_k=1, max_tokens=8)):
        assert [sample for sample, _ in samples] == [words, words]
    settings = dict(temperature=1.3, top_p=0.9, max_tokens=8, no_repeat_ngram=2)
    one = model.sample(images, 4, seed=0, **settings)
    assert one == model.sample(images, 4, seed=0, **settings)
    assert one != model.sample(images, 4, seed=1, **settings)
    for image, samples in zip(images, one):
        assert len(samples) == 4
        for words, logprob in samples:
            # the log-probability is the model's own, of the whole caption
            ce = model(image[None], pack([[words]], 11, 99))[1].item()
            assert logprob == pytest.approx(-ce, abs=1e-3)
            assert 1 <= len(words) <= 8 and 11 not in words
            bigrams = list(zip(words, words[1:]))
            assert len(set(bigrams)) == len(bigrams)


@torch.no_grad()
def test_samples_follow_the_distribution():
    model = tiny_model(vocab_size=6)
    image = random_images(1)
    logp = next_logp(model, image[0], [])
    logp[5] = -math.inf  # no empty caption
    samples = model.sample(image, 4000, max_tokens=1)[0]
    first = torch.tensor([words[0] for words, _ in samples])
    fraction = torch.bincount(first, minlength=6) / 4000
    torch.testing.assert_close(fraction, logp.softmax(0), atol=0.03, rtol=0)


def test_tokens_are_drawn_with_their_probabilities():
    p = torch.tensor([[0.0, 0.5, 0.2, 0.0, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    tokens = draw(p.repeat(50000, 1), torch.Generator().manual_seed(0)).view(-1, 2)
    for row in range(2):
        found = tokens[:, row].bincount(minlength=6) / 50000
        assert (found[p[row] == 0] == 0).all()
        torch.testing.assert_close(found, p[row], rtol=0, atol=0.01)


def test_the_baseline_of_a_reward_is_the_mean_of_the_other_samples():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    captions = [[[1], [2, 3], [1, 2, 3]], [[], [1], [2, 3]]]
    packed = pack(captions, 9, 3)
    advantage = token_advantages(rewards, packed, max_tokens=3)
    assert advantage.shape == packed["targets"].shape
    expected = [[1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2],
                [0 - (0 + 3) / 2, 0 - (0 + 3) / 2, 3 - (0 + 0) / 2]]
    for row, segment in itertools.product(range(2), range(1, 4)):
        tokens = (packed["segment"][row] == segment) & (packed["position"][row] < 2)
        for value in advantage[row][tokens].tolist():
            assert value == pytest.approx(expected[row][segment - 1])
    # the third token is the last possible one: its end was not chosen
    assert (advantage[packed["position"] == 2] == 0).all()


def test_self_critical_gradient_is_that_of_the_expected_reward():
    """With three words and at most two per caption, the expectation sums over 13 captions."""
    model = tiny_model(vocab_size=4, block_size=3)
    image = random_images(1)
    names = "dog cat bird".split()
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(names[i] for i in ids))
    references = ["dog cat", "cat"]

    def with_end(texts):
        return [text.split() + ["<end>"] for text in texts]

    documents = [references, ["bird"], ["bird dog"], ["dog"]]
    frequencies = document_frequencies([with_end(texts) for texts in documents])
    every = []
    for n in range(3):
        every += [list(words) for words in itertools.product(range(3), repeat=n)]
    scored = cider_references([with_end(references)] * 13, frequencies)
    _, rewards = cider(with_end([tokenizer.decode(words) for words in every]), scored)
    rewards = torch.tensor(rewards)
    logp = []
    for words in every:
        # after two words the end is certain
        tokens = [*words, 3][:2]
        steps = [next_logp(model, image[0], words[:i])[token] for i, token in enumerate(tokens)]
        logp.append(sum(steps))
    p = torch.stack(logp).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert rewards.max() > 2 * (p * rewards).sum() > 0
    exact = torch.autograd.grad(-(p * rewards).sum(), list(model.parameters()))

    # 8192 samples, in rows short enough for attention
    images = image.expand(32, -1, -1, -1)
    captions, got = sample_captions(model, images, 32 * [references], frequencies, tokenizer, k=256,
                                    seed=0)
    assert got.mean().item() == pytest.approx((p * rewards).sum().item(), rel=0.05)
    packed = pack(captions, model.eot_token, model.max_tokens)
    packed["advantage"] = token_advantages(got, packed, model.max_tokens)
    ours = torch.autograd.grad(model(images, packed)[0] / 8192, list(model.parameters()))
    exact = torch.cat([g.flatten() for g in exact])
    ours = torch.cat([g.flatten() for g in ours])
    assert (ours - exact).norm() < 0.1 * exact.norm()


# -----------------------------------------------------------------------------
# options

@pytest.mark.parametrize("wrong, message", [
    (dict(bridge="bridge"), "cross, prefix or both"),
    (dict(image_size=20), "multiple"),
    (dict(n_head=5), "number of heads, 5"),
    (dict(bridge="prefix", block_size=4), "no room"),
    (dict(local_conv=True, encoder_family="vit"), "local_conv works only"),
    (dict(dropout=1.0), "dropout"),
])
def test_errors_say_what_is_wrong_with_the_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        Captioner(ModelOptions(**{**TINY, **wrong}), 50)
