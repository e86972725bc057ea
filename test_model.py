"""The model and its training, each against something independent: naive loops, torch's own losses, uninterrupted runs."""
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import train
from conftest import HERE, ended, launch, tiny_dataset
from evaluate import cider, cider_references, document_frequencies
from model import Captioner, Dropout, ModelOptions, Neighbours, PatchStem, head_loss, pack, patchify
from muon import orthogonalise
from prepare_flickr import read_records
from sample import caption, load

BRIDGES = [dict(bridge="cross"), dict(bridge="prefix"), dict(bridge="both", n_query=3), dict(bridge="prefix", n_query=2),
           dict(bridge="cross", cross_every=2, stem="patch", local=True)]
TINY = dict(image_size=16, patch_size=8, n_layer_encoder=1, n_layer_decoder=2, n_head=2, n_embd=32, block_size=24)


def tiny(vocab_size=50, seed=0, **options):
    torch.manual_seed(seed)
    model = Captioner(ModelOptions(**{**TINY, **options}), vocab_size).eval()
    with torch.no_grad():  # far from the initialisation, so that everything matters to the logits
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def pictures(n, size=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8))


def random_captions(n, vocab_size=50, seed=0, longest=9):
    rng = random.Random(seed)
    return [[[rng.randrange(vocab_size - 1) for _ in range(rng.randint(1, longest))] for _ in range(rng.randint(1, 6))]
            for _ in range(n)]


def run(script, *args, check=True, **kw):
    """A script of ours -> the finished process; with check, it must have succeeded."""
    with tempfile.TemporaryDirectory() as folder:
        done = ended(launch(Path(folder), script, *args, **kw), Path(folder))
    assert not check or done.returncode == 0, done.stderr.decode()[-3000:]
    return done


def torchrun(*args):
    """Two ranks of a script."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, args)], cwd=HERE,
                          capture_output=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def one_line_error(done, code, *parts):
    error = done.stderr.decode()
    assert done.returncode == code, error
    assert error.count("\n") == 1 and "Traceback" not in error, error
    for part in parts:
        assert part in error, error


# ---- model.py

def test_patchify_puts_each_pixel_where_it_belongs():
    images = torch.randn(2, 3, 12, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    for b, c, y, x in itertools.product(range(2), range(3), range(12), range(12)):
        assert patches[b, (y // 4) * 3 + x // 4, ((y % 4) * 4 + x % 4) * 3 + c] == images[b, c, y, x]


def test_a_pixel_of_any_channel_touches_its_own_patch_alone():
    stem = PatchStem(4, 8)
    before = stem(torch.zeros(1, 3, 12, 12))
    for channel in range(3):
        images = torch.zeros(1, 3, 12, 12)
        images[0, channel, 5, 9] = 1
        changed = (stem(images) != before).any(-1)[0]
        assert changed.nonzero().flatten().tolist() == [5]


def test_neighbours_are_convolved_on_the_grid():
    torch.manual_seed(0)
    layer, x = Neighbours(5), torch.randn(2, 9, 5)
    for b, row, column in itertools.product(range(2), range(3), range(3)):
        expected = x[b, 3 * row + column] + layer.bias
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            if 0 <= row + dy < 3 and 0 <= column + dx < 3:
                expected = expected + layer.weight[:, 0, dy + 1, dx + 1] * x[b, 3 * (row + dy) + column + dx]
        torch.testing.assert_close(layer(x)[b, 3 * row + column], expected)
    plain, local = (Captioner(ModelOptions(**TINY, local=local), 50).encoder for local in (False, True))
    local.load_state_dict(plain.state_dict(), strict=False)  # at first they do nothing
    torch.testing.assert_close(local(torch.ones(1, 3, 16, 16)), plain(torch.ones(1, 3, 16, 16)))


@pytest.mark.parametrize("factor", [None, 0.5])
def test_unigram_loss_is_that_of_each_word_given_the_mean_patch(factor):
    model, images, captions = tiny(unigram=0.7), pictures(3), random_captions(3)
    batch = pack(captions, 49, model.longest)
    if factor:
        batch["factor"] = torch.full((len(batch["targets"]),), factor)
    plain, _ = model(images, batch)
    loss, _ = model.train()(images, batch)
    logp = (model.unigram(model.encode(images).mean(1)) @ model.wte.weight.T).log_softmax(-1)
    expected = -sum(logp[i, word].item() for i in range(3) for words in captions[i] for word in [*words, 49])
    assert (loss - plain).item() == pytest.approx(0 if factor else 0.7 * expected, rel=1e-4, abs=1e-4)
    loss.backward()
    assert (model.unigram.weight.grad.abs().max() > 0) == (factor is None)


@pytest.mark.parametrize("options", BRIDGES)
def test_packed_rows_equal_separate_rows(options):
    model, images, captions = tiny(**options), pictures(3), random_captions(3)
    _, together = model(images, pack(captions, 49, model.longest))
    apart = sum(model(images[i:i + 1], pack([[words]], 49, model.longest))[1] for i in range(3) for words in captions[i])
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    # and token by token
    hidden = model.hidden(model.encode(images), pack(captions, 49, 99))
    alone = [model.hidden(model.encode(images[i:i + 1]), pack([[words]], 49, 99)) for i in range(3) for words in captions[i]]
    torch.testing.assert_close(hidden, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_pack_cuts_counts_and_restarts():
    batch = pack([[[1, 2, 3, 4], [5]], [[6]]], 9, 3)
    assert batch["tokens"].tolist() == [9, 1, 2, 9, 5, 9, 6]
    assert batch["targets"].tolist() == [1, 2, 3, 5, 9, 6, 9]  # the cut caption predicts no EOT
    assert batch["position"].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert batch["slot"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch["segment"][0].tolist() == [1, 1, 1, 2, 2] and batch["segment"][1, :2].tolist() == [3, 3]
    assert len(set(batch["segment"].flatten().tolist())) == 3 + 3  # padding: a number of its own at each place


@pytest.mark.parametrize("options", BRIDGES)
def test_the_picture_moves_the_logits(options):
    model, captions = tiny(**options), pack(random_captions(2), 49, 20)
    a, b = (model.hidden(model.encode(pictures(2, seed=s)), captions) for s in (1, 2))
    assert (a - b).abs().amax(1).min() > 1e-3  # every token's


@pytest.mark.parametrize("options", BRIDGES + [dict(n_embd=128, n_head=4), dict(stem="patch", n_layer_encoder=6)])
def test_first_loss_is_that_of_guessing(options):
    torch.manual_seed(0)
    model = Captioner(ModelOptions(**{**TINY, **options}), 1000)
    batch = pack(random_captions(20, 1000), 999, 20)
    _, ce = model(pictures(20), batch)
    assert ce.item() / len(batch["targets"]) == pytest.approx(math.log(1000), rel=0.03)


@pytest.mark.parametrize("alpha,smoothing", [(0, 0), (0.4, 0), (0, 0.1), (0.3, 0.2)])
def test_head_loss_is_cross_entropy_with_its_gradients(alpha, smoothing):
    torch.manual_seed(0)
    V, n = 700, 3100  # more than one chunk
    hidden, weight = torch.randn(n, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
    targets, soft_hidden, soft_weight = torch.randint(V, (n,)), torch.randn(n, 16), torch.randn(V, 16)
    loss, ce = head_loss(hidden, weight, targets, None, *((soft_hidden, soft_weight) if alpha else (None, None)), alpha, smoothing)
    gradients = torch.autograd.grad(2 * loss, (hidden, weight))
    logits = hidden @ weight.T
    oracle = (1 - alpha) * F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum") + \
        alpha * F.cross_entropy(logits, (soft_hidden @ soft_weight.T).softmax(1), reduction="sum")
    torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=0)
    torch.testing.assert_close(ce, F.cross_entropy(logits, targets, reduction="sum"), rtol=1e-5, atol=0)
    for ours, true in zip(gradients, torch.autograd.grad(2 * oracle, (hidden, weight))):
        torch.testing.assert_close(ours, true, rtol=1e-3, atol=2e-4)
    factor = torch.randn(n)  # a factor for each token
    loss = head_loss(hidden, weight, targets, factor, None, None, 0.0, 0.0)[0]
    oracle = (factor * F.cross_entropy(hidden @ weight.T, targets, reduction="none")).sum()
    torch.testing.assert_close(loss, oracle, rtol=1e-3, atol=1e-3)
    for ours, true in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(oracle, (hidden, weight))):
        torch.testing.assert_close(ours, true, rtol=1e-3, atol=2e-4)


def test_self_critical_gradient_is_that_of_the_expected_reward():
    """Three words, captions of at most two: all thirteen can be written down, and so can the expectation of CIDEr-D."""
    model, image, names = tiny(vocab_size=4, block_size=3), pictures(1), "dog cat bird".split()
    tokenizer = SimpleNamespace(decode=lambda words: " ".join(names[w] for w in words))
    references, others = ["dog cat", "cat"], [["bird"], ["bird dog"], ["dog"]]
    ended = lambda texts: [text.split() + ["<end>"] for text in texts]
    frequencies = document_frequencies([ended(references), *map(ended, others)])
    every = [list(words) for n in range(3) for words in itertools.product(range(3), repeat=n)]
    rewards = torch.tensor(cider(ended([tokenizer.decode(words) for words in every]),
                                 cider_references([ended(references)] * 13, frequencies))[1])
    logp = []
    for words in every:  # after two words the end is certain
        steps = [next_logp(model, image[0], words[:i])[w] for i, w in enumerate([*words, 3][:2])]
        logp.append(sum(steps))
    p = torch.stack(logp).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5) and rewards.max() > 2 * (p * rewards).sum() > 0
    exact = torch.autograd.grad(-(p * rewards).sum(), list(model.parameters()))
    captions, got = train.sample_captions(model, image, [references], frequencies, tokenizer, 8192, seed=0)
    assert got.mean().item() == pytest.approx((p * rewards).sum().item(), rel=0.05)
    ours = torch.autograd.grad(model(image, captions)[0] / 8192, list(model.parameters()))
    exact, ours = (torch.cat([g.flatten() for g in gradients]) for gradients in (exact, ours))
    assert (ours - exact).norm() < 0.1 * exact.norm()


def next_logp(model, image, words):
    """log-probabilities (V,) of what follows words, by a whole uncached forward pass"""
    batch = pack([[words]], model.eot_token, 99)
    return F.linear(model.hidden(model.encode(image[None]), batch)[-1], model.wte.weight).log_softmax(-1)


def naive_beam(model, image, beam, length_penalty, max_tokens, min_tokens=1, ngram=0):
    """Beam search as its docstring tells it, in plain Python, one picture and one hypothesis at a time."""
    live, finished, eot = [([], 0.0)], [], model.eot_token
    for t in range(max_tokens + 1):
        continuations = []
        for words, score in live:
            logp = next_logp(model, image, words).tolist()
            for token, lp in enumerate(logp):
                if token == eot and t < min_tokens or token != eot and t >= max_tokens:
                    continue
                new = words + [token]
                if ngram and token != eot and tuple(new[-ngram:]) in {tuple(words[i:i + ngram]) for i in range(len(words) - ngram + 1)}:
                    continue
                continuations.append((score + lp, new))
        continuations.sort(key=lambda c: -c[0])
        finished += [(s / (t + 1) ** length_penalty, s, w[:-1]) for s, w in continuations[:beam] if w[-1] == eot]
        finished = sorted(finished, key=lambda f: -f[0])[:beam]
        live = [(w, s) for s, w in continuations if w[-1] != eot][:beam]
        if len(finished) == beam and (not live or finished[-1][0] >= live[0][1] / (t + 1) ** length_penalty):
            break
    return finished[0][2], finished[0][1]


@pytest.mark.parametrize("options", BRIDGES)
@torch.no_grad()
def test_cached_beam_equals_a_naive_one(options):
    model, images = tiny(vocab_size=12, **options), pictures(4)
    for settings in (dict(beam=1), dict(beam=3), dict(beam=4, length_penalty=0.0), dict(beam=3, no_repeat_ngram=2, min_tokens=3)):
        settings = {"length_penalty": 1.0, **settings}
        results = model.beam_search(images, max_tokens=7, **settings)
        for image, [(words, logprob)] in zip(images, results):
            expected, score = naive_beam(model, image, settings["beam"], settings["length_penalty"], 7,
                                         settings.get("min_tokens", 1), settings.get("no_repeat_ngram", 0))
            assert words == expected
            assert logprob == pytest.approx(score, abs=1e-3)


@torch.no_grad()
def test_a_wide_beam_is_an_exhaustive_search():
    model, images = tiny(vocab_size=5), pictures(3, seed=3)
    for image, [(words, logprob)] in zip(images, model.beam_search(images, beam=64, length_penalty=0.0, max_tokens=3)):
        every = [list(w) for n in range(1, 4) for w in itertools.product(range(4), repeat=n)]
        score = lambda w: -model(image[None], pack([[w]], 4, 99))[1].item()
        best = max(every, key=score)
        assert words == best and logprob == pytest.approx(score(best), abs=1e-4)


@pytest.mark.parametrize("options", BRIDGES[:3])
@torch.no_grad()
def test_sampling(options):
    model, images = tiny(vocab_size=12, **options), pictures(5)
    greedy = model.beam_search(images, beam=1, max_tokens=8)
    for [(words, _)], samples in zip(greedy, model.sample(images, 2, top_k=1, max_tokens=8)):
        assert [w for w, _ in samples] == [words, words]  # only the likeliest token
    one, two = (model.sample(images, 4, temperature=1.3, top_p=0.9, seed=s, max_tokens=8, no_repeat_ngram=2) for s in (0, 0))
    assert one == two and one != model.sample(images, 4, temperature=1.3, top_p=0.9, seed=1, max_tokens=8, no_repeat_ngram=2)
    for image, samples in zip(images, one):
        assert len(samples) == 4
        for words, logprob in samples:  # the log-probability is the model's own for the whole caption
            assert logprob == pytest.approx(-model(image[None], pack([[words]], 11, 99))[1].item(), abs=1e-3)
            assert 1 <= len(words) <= 8 and 11 not in words
            assert len({tuple(words[i:i + 2]) for i in range(len(words) - 1)}) == max(len(words) - 1, 0)


@torch.no_grad()
def test_samples_follow_the_distribution():
    model, image = tiny(vocab_size=6), pictures(1)
    p = next_logp(model, image[0], [])
    p[5] = -math.inf  # no empty caption
    first = [words[0] for words, _ in model.sample(image, 4000, max_tokens=1)[0]]
    share = torch.bincount(torch.tensor(first), minlength=6) / 4000
    torch.testing.assert_close(share, p.softmax(0), atol=0.03, rtol=0)


def test_options_that_cannot_be_built_say_why():
    for wrong, word in [(dict(bridge="bridge"), "cross, prefix, both"), (dict(image_size=20), "multiple"), (dict(n_head=5), "n_head"),
                        (dict(patch_size=12, image_size=24), "power of 2"), (dict(bridge="prefix", block_size=4), "no room"),
                        (dict(local=True, encoder_family="vit"), "local is for")]:
        with pytest.raises(ValueError, match=word):
            Captioner(ModelOptions(**{**TINY, **wrong}), 50)


# ---- teacher, optimizer, augmentation

def test_teacher_is_a_copy_without_gradient_in_eval_mode():
    model = tiny(dropout=0.3).train()
    model.wpe.weight.requires_grad_(False)
    teacher = train.make_teacher(model)
    assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    assert teacher.wpe.weight is model.wpe.weight and teacher.wte.weight is not model.wte.weight
    for a, b in zip(model.state_dict().values(), teacher.state_dict().values()):
        assert torch.equal(a, b)
    loss, _ = model(pictures(2), pack(random_captions(2), 49, 20), teacher, alpha=0.5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and model.wte.weight.grad is not None
    model.wpe.weight.requires_grad_(True)
    before = teacher.wte.weight.clone()
    with torch.no_grad():
        model.wte.weight.add_(1)
    train.update_teacher(teacher, model, 0.9)
    torch.testing.assert_close(teacher.wte.weight, before + 0.1)


def test_hidden_words_are_not_read():
    images, captions = pictures(3), pack(random_captions(3), 49, 20)
    others = dict(captions, tokens=captions["tokens"].flip(0))
    model = tiny(word_dropout=1 - 1e-9)
    assert model(images, captions)[0] != model(images, others)[0]
    model.train()
    assert model(images, captions)[0] == model(images, others)[0]


@pytest.mark.parametrize("p", (0.1, 0.2, 0.5))
def test_dropout_drops_each_element_for_itself(p):
    """What torch's own promises: each with probability p, independently, the rest scaled so that the mean stays; gradients likewise."""
    torch.manual_seed(0)
    dropout, x = Dropout(p).train(), torch.ones(999, 1001, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    dropped = (y == 0).float()
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()} and torch.equal(x.grad, y.detach())
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert abs(dropped.mean() - p) < 5 * deviation
    flat = dropped.flatten()
    assert all(abs(flat[i::4].mean() - p) < 10 * deviation for i in range(4))  # the four that share a draw
    for apart in (1, 2, 3, 4, 1001):  # both dropped
        assert abs((flat[apart:] * flat[:-apart]).mean() - p * p) < 5 * p * math.sqrt((1 - p * p) / x.numel()) * 1.5
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y) and not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


def test_muon_orthogonalises():
    torch.manual_seed(0)
    for shape in ((2, 40, 24), (2, 24, 40), (1, 32, 32)):
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert 0.3 < singular.min() and singular.max() < 1.3
        G = torch.randn(shape)
        U, _, V = torch.linalg.svd(G, full_matrices=False)
        cosine = F.cosine_similarity(orthogonalise(G).flatten(), (U @ V).flatten(), dim=0)
        assert cosine > 0.95


def test_augmentation():
    options = train.Options(image_size=16, crop=1.0, flip=True)
    images, seeds = pictures(8), [(0, 0, i) for i in range(8)]
    same = train.augment(images, seeds, [False] * 8, options)
    torch.testing.assert_close(same, images.float(), atol=0.01, rtol=0)
    flipped = train.augment(images, seeds, [True] * 8, options)
    mirrored = [torch.allclose(f, i.flip(1).float(), atol=0.01) for f, i in zip(flipped, images)]
    kept = [torch.allclose(f, i.float(), atol=0.01) for f, i in zip(flipped, images)]
    assert any(mirrored) and any(kept) and all(m or k for m, k in zip(mirrored, kept))
    options = train.Options(image_size=8, crop=0.5, flip=True)
    crops = train.augment(images, seeds, [True] * 8, options)
    assert crops.shape == (8, 8, 8, 3) and crops.min() >= 0 and crops.max() <= 255
    torch.testing.assert_close(crops[3:5], train.augment(images[3:5], seeds[3:5], [True] * 2, options))  # alone as in a batch
    lit = train.augment(images, seeds, [False] * 8, train.Options(image_size=16, crop=1.0, jitter=0.4))
    for light, image in zip(lit, images.float()):
        brightness = light.mean() / image.mean()
        contrast = light.mean(-1).std() / image.mean(-1).std() / brightness
        share = (light[..., 0] - light[..., 1]) / (image[..., 0] - image[..., 1] + 1e-3)  # all three, the same for all pixels
        torch.testing.assert_close(share.median(), share.quantile(0.2), rtol=0.02, atol=0)
        for factor in (brightness, contrast, share.median() / brightness / contrast):
            assert 0.6 <= factor <= 1.4 and abs(factor - 1) > 1e-4
    assert len({round(light.mean().item() / image.float().mean().item(), 3) for light, image in zip(lit, images)}) == 8
    assert train.says_side(["A dog", "on the Left side"]) and not train.says_side(["He leftover", "bright"])


def test_overfits_a_hundred_pictures():
    rng = random.Random(0)
    captions = [[[rng.randrange(60) for _ in range(rng.randint(4, 7))] for _ in range(5)] for _ in range(100)]
    images = pictures(100)
    torch.manual_seed(0)
    options = train.Options(**{**TINY, "n_embd": 64, "n_head": 4}, learning_rate=6e-3, weight_decay=0.0)
    model = Captioner(options, 61)
    [optimizer] = train.make_optimizers(model, options)
    batch = pack(captions, 60, 20)
    n = len(batch["targets"])
    floor = math.log(5) / (n / 500)  # which of the five it is can't be known; all else can
    for step in range(400):
        loss, ce = model(images, batch)
        (loss / n).backward()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, (step + 1) / 20) * (1 - step / 400)
        optimizer.step()
        optimizer.zero_grad()
    assert floor - 1e-3 < ce.item() / n < floor + 0.05
    results = model.eval().beam_search(images, beam=1)
    assert sum(words in own for [(words, _)], own in zip(results, captions)) >= 90


# ---- train.py as it is used

CONFIG = dict(TINY, batch_size=8, max_iters=8, log_interval=2, eval_interval=4, eval_images=4, warmup_iters=2, alpha=0.4,
              momentum=0.9, crop=0.6, flip=True, jitter=0.2, local=True, unigram=0.3, device="cpu", learning_rate=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset(folder)
    return folder


def start(data, out_dir, *more, options=None, script="train.py", **kw):
    config = out_dir.with_suffix(".py")
    config.write_text("".join(f"{k} = {v!r}\n" for k, v in {**CONFIG, **(options or {})}.items()))
    return run(script, config, f"--data_dir={data}", f"--out_dir={out_dir}", *more, **kw)


def last(out_dir):
    return torch.load(out_dir / "last.pt", weights_only=True)


def assert_same(a, b, path="", **tolerance):
    """Two nested structures, equal to the bit, or to a tolerance where one is given."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_same(a[k], b[k], f"{path}.{k}", **tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}[{i}]", **tolerance)
    elif torch.is_tensor(a):
        torch.testing.assert_close(a, b, msg=lambda m: f"{path}: {m}", **(tolerance or dict(rtol=0, atol=0)))
    else:
        assert a == b, path


def read_log(out_dir):
    """The log without its times."""
    times = {"seconds", "images_per_s", "captions_per_s"}
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in (out_dir / "log.jsonl").open()]


STATE = ("model", "teacher", "optimizer", "iter", "seen", "best")


@pytest.mark.parametrize("options", [dict(), dict(optimizer="muon", samples=2, alpha=0.0)])
def test_interrupted_and_resumed_equals_uninterrupted(data, tmp_path, options):
    options = dict(options, dropout=0.2, max_iters=12)
    start(data, tmp_path / "whole", options=options)
    config = tmp_path / "parts.py"
    config.write_text("".join(f"{k} = {v!r}\n" for k, v in {**CONFIG, **options}.items()))
    command = [sys.executable, "train.py", str(config), f"--data_dir={data}", f"--out_dir={tmp_path / 'parts'}", "--init_from=resume"]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    while not process.stdout.readline().startswith("step 6"):
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "--init_from=resume" in process.stderr.read()
    assert 6 <= last(tmp_path / "parts")["iter"] < 12
    with open(tmp_path / "parts/log.jsonl", "a") as f:  # what a killed run may have written after its checkpoint
        f.write('{"iter": 11, "loss": 1}\n{"iter": 12, "lo')
    run(*command[1:])
    assert b"nothing is left to do" in run(*command[1:]).stdout
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    for key in STATE:
        assert_same(whole[key], parts[key], key)
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")
    best = [torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("whole", "parts")]
    assert_same(best[0]["model"], best[1]["model"])


def test_killed_between_evaluations_goes_on_from_what_was_saved(data, tmp_path):
    options = dict(max_iters=12, eval_interval=50)
    start(data, tmp_path / "whole", options=options)
    worker = tmp_path / "worker.py"  # train.py, with checkpoints all the time and an end in its fifth step
    worker.write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import train
from common import run
train.SAVE_SECONDS, calls, update_teacher = -1, [], train.update_teacher
def killed(*args):
    update_teacher(*args)
    calls.append(0)
    if len(calls) == 5:
        os._exit(9)
train.update_teacher = killed
run(train.main)
""")
    assert start(data, tmp_path / "killed", "--init_from=resume", options=options, script=worker, check=False).returncode == 9
    assert last(tmp_path / "killed")["iter"] == 4
    start(data, tmp_path / "killed", "--init_from=resume", options=options)
    for key in STATE:
        assert_same(last(tmp_path / "whole")[key], last(tmp_path / "killed")[key], key)


def test_accumulation_changes_nothing_but_rounding(data, tmp_path):
    for accum in (1, 4):
        start(data, tmp_path / f"a{accum}", f"--grad_accum={accum}", "--max_iters=3")
    one, four = last(tmp_path / "a1"), last(tmp_path / "a4")
    for key in ("model", "teacher"):
        assert_same(one[key], four[key], key, rtol=1e-3, atol=2e-4)
    moved = one["model"]["wte.weight"] - one["teacher"]["wte.weight"]
    assert moved.abs().max() > 0


def test_two_ranks_equal_one_process(data, tmp_path):
    worker = tmp_path / "worker.py"  # train.py, whose ranks also write down their weights at the end
    worker.write_text(f"""
import os, sys, torch
sys.path.insert(0, {str(HERE)!r})
import train
make_teacher = train.make_teacher
def keep(model):
    train.kept = model
    return make_teacher(model)
train.make_teacher = keep
train.main()
torch.save(train.kept.state_dict(), {str(tmp_path)!r} + "/rank" + os.environ.get("RANK", "0") + ".pt")
""")
    options = dict(max_iters=1, beta1=0.0, grad_clip=0.0)  # so that AdamW's first moment is the gradient
    start(data, tmp_path / "one", options=options)
    config = tmp_path / "two.py"
    config.write_text("".join(f"{k} = {v!r}\n" for k, v in {**CONFIG, **options}.items()))
    torchrun(worker, config, f"--data_dir={data}", f"--out_dir={tmp_path / 'two'}")
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    for i, state in one["optimizer"][0]["state"].items():
        torch.testing.assert_close(two["optimizer"][0]["state"][i]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-6)
        assert state["exp_avg"].abs().max() > 0
    assert read_log(tmp_path / "one")[-1]["eval"].keys() == {"student", "teacher"}
    for name in ("student", "teacher"):
        assert read_log(tmp_path / "two")[-1]["eval"][name]["loss"] == pytest.approx(
            read_log(tmp_path / "one")[-1]["eval"][name]["loss"], rel=1e-3)
    torchrun(worker, config, f"--data_dir={data}", f"--out_dir={tmp_path / 'five'}", "--max_iters=5")
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert_same(dict(ranks[0]), dict(ranks[1]))
    assert_same(dict(ranks[0]), last(tmp_path / "five")["model"])


def test_self_critical_training_sharpens_what_was_smoothed_once(data, tmp_path):
    start(data, tmp_path / "smoothed", "--smoothing=0.1", "--max_iters=2")
    weights = [torch.load(tmp_path / "smoothed/best.pt", weights_only=True)["model"]]
    for stage, before in (("first", "smoothed"), ("second", "first")):
        start(data, tmp_path / stage, f"--init_from={tmp_path / before}", "--samples=2", "--alpha=0", "--learning_rate=0", "--max_iters=1")
        weights.append(last(tmp_path / stage)["model"])
    for name, smoothed in weights[0].items():
        factor = 2 if name in ("norm.weight", "norm.bias") else 1
        assert_same(weights[1][name], smoothed.float() * factor, name)
        torch.testing.assert_close(weights[2][name], weights[1][name], rtol=1e-3, atol=1e-3)


def test_steps_whose_gradient_is_not_finite_are_skipped(data, tmp_path):
    worker = tmp_path / "worker.py"  # train.py, with pictures that are NaN from the third step on, or in it alone
    worker.write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import train
from common import run
augment, calls, last = train.augment, [], int(sys.argv.pop(1))
def broken(*args):
    calls.append(0)
    return augment(*args) * (float("nan") if 3 <= len(calls) <= last else 1)
train.augment = broken
run(train.main)
""")
    config = tmp_path / "config.py"
    config.write_text("".join(f"{k} = {v!r}\n" for k, v in {**CONFIG, "max_iters": 14, "eval_interval": 2}.items()))
    run(worker, 3, config, f"--data_dir={data}", f"--out_dir={tmp_path / 'once'}")
    assert [line["skipped"] for line in read_log(tmp_path / "once") if "skipped" in line] == [1]
    assert last(tmp_path / "once")["iter"] == 14
    done = run(worker, 99, config, f"--data_dir={data}", f"--out_dir={tmp_path / 'always'}", check=False)
    one_line_error(done, 1, "10 steps in a row", "lower the learning rate")
    for out in ("once", "always"):
        checkpoint = last(tmp_path / out)
        assert all(t.isfinite().all() for part in ("model", "teacher") for t in checkpoint[part].values())
    assert all(line.get("loss", 0) is None or line.get("loss", 0) >= 0 for line in read_log(tmp_path / "always"))
    # fine-tuning that ends before its first evaluation has left what to go on from
    run(worker, 99, config, f"--data_dir={data}", f"--out_dir={tmp_path / 'tuned'}", f"--init_from={tmp_path / 'once'}",
        "--eval_interval=50", check=False)
    given = torch.load(tmp_path / "once/best.pt", weights_only=True)["model"]
    assert last(tmp_path / "tuned")["iter"] == 0 and not (tmp_path / "tuned/best.pt").exists()
    assert_same(last(tmp_path / "tuned")["model"], {name: t.float() for name, t in given.items()})


def test_fine_tuning_and_what_init_from_refuses(data, tmp_path):
    out = tmp_path / "out"
    start(data, out)
    one_line_error(start(data, out, check=False), 2, "last.pt exists", "--force")
    again = start(data, out, "--init_from=resume", "--learning_rate=0.5")  # it is through: nothing is done
    assert "other options than before: learning_rate 0.5 (was " in again.stdout.decode()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/best.pt").write_bytes(found := (out / "best.pt").read_bytes())
    one_line_error(start(data, tmp_path / "weights", check=False), 2, "best.pt exists", "--force")
    one_line_error(start(data, tmp_path / "weights", "--init_from=resume", check=False), 2, "nothing to resume from", "fine-tunes")
    assert (tmp_path / "weights/best.pt").read_bytes() == found
    one_line_error(start(data, out, "--init_from=resume", "--n_embd=64", check=False), 2, "n_embd is 64 here but 32")
    one_line_error(start(data, tmp_path / "x", "--init_from=nowhere", check=False), 2, "no checkpoint at nowhere")
    start(data, tmp_path / "tuned", f"--init_from={out}", "--learning_rate=0", options=dict(n_embd=64))  # the checkpoint's 32 holds
    best = torch.load(out / "best.pt", weights_only=True)
    assert all(t.dtype == torch.float16 for t in best["model"].values())
    assert_same(last(tmp_path / "tuned")["model"], {name: t.float() for name, t in best["model"].items()})
    (tmp_path / "junk.pt").write_bytes(b"junk")
    one_line_error(start(data, tmp_path / "x", f"--init_from={tmp_path / 'junk.pt'}", check=False), 2, "junk.pt")
    assert not (tmp_path / "x").exists()


def test_stops_by_minutes_and_reports(data, tmp_path):
    done = start(data, tmp_path / "out", "--max_iters=0", "--max_minutes=0.02", "--log_interval=1")
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").open()]
    steps = [line for line in lines if "loss" in line]
    assert {"iter", "epoch", "seconds", "loss", "lr", "images_per_s", "captions_per_s"} <= steps[0].keys()
    assert 1.2 <= steps[-1]["seconds"] < 10 and steps[-1]["lr"] < steps[len(steps) // 2]["lr"]
    assert set(lines[-1]["eval"]["teacher"]) == {"loss", "loss_shuffled", "cider", "distinct"}
    assert re.match(r"[\d.]+ M parameters .* cpu, float32, a step: 8 pictures, about \d+ tokens", done.stdout.decode())


@pytest.mark.parametrize("args,parts", [
    (["--learning_rte=1"], ["--learning_rte", "--learning_rate"]),
    (["--batch_size=2.5"], ["batch_size", "int", "2.5"]),
    (["--crop=7"], ["crop", "7"]),
    (["--optimizer=sgd"], ["adamw, muon", "sgd"]),
    (["--flip=perhaps"], ["flip", "perhaps"]),
    (["--batch_size=9", "--grad_accum=2"], ["batch_size 9", "2 micro-steps"]),
    (["--image_size=64"], ["image_size 64", "20"]),
    (["--data_dir=/nowhere"], ["/nowhere"]),
    (["--device=tpu"], ["tpu"]),
])
def test_wrong_options(data, tmp_path, args, parts, monkeypatch, capsys):
    config = tmp_path / "c.py"
    config.write_text("".join(f"{k} = {v!r}\n" for k, v in CONFIG.items()))
    refused(monkeypatch, capsys, [config, f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}", *args], parts)
    assert not (tmp_path / "out").exists()


def refused(monkeypatch, capsys, args, parts):
    """train.py, run in this process, ends with exit code 2 and one line that holds all parts."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    with pytest.raises(SystemExit) as left:
        train.run(train.main)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1, error
    for part in parts:
        assert part in error, error


def test_wrong_configs(tmp_path, monkeypatch, capsys):
    config = tmp_path / "c.py"
    for text, parts in [("learnin_rate = 1", ["c.py", "learnin_rate", "learning_rate"]), ("n_embd = 'big'", ["n_embd", "int", "big"]),
                        ("x = (", ["c.py", "SyntaxError"]), ("import math\nmax_iters = 10", ["data/"])]:
        config.write_text(text)
        refused(monkeypatch, capsys, [config, "--data_dir=data/no_such_data"], parts)
    refused(monkeypatch, capsys, [tmp_path / "none.py"], ["none.py"])
    refused(monkeypatch, capsys, [], ["max_iters", "max_minutes"])
    one_line_error(run("train.py", tmp_path / "none.py", check=False), 2, "none.py")  # as a process of its own, too


# ---- sample.py as it is used

@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    start(data, out)
    return out


def test_the_captioner_that_comes_along_says_what_readme_says():
    tables = re.findall(r"\| (<img .*) \|\n\|[-|]+\n\| (.*) \|", (HERE / "README.md").read_text())
    told = {name: text for names, texts in tables
            for name, text in zip(re.findall(r'src="docs/photos/(.*?)"', names), texts.split(" | "), strict=True)}
    lines = run("sample.py", "--image", HERE / "docs/photos").stdout.decode().splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert len(told) == 8 and {Path(name).name: text for name, text in found.items()} == told


def test_sample_captions_pictures_and_names_bad_ones(trained, data, tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(pictures(1, 50).numpy()[0]).save(folder / "a.png")
    Image.fromarray(pictures(1, 40, seed=2).numpy()[0]).save(folder / "deep" / "b c.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture")
    done = run("sample.py", "--image", folder, data, "--out_dir", trained, "--json", "--sheet", tmp_path / "s.png", check=False)
    assert done.returncode == 1 and b"broken.jpg" in done.stderr and b"Traceback" not in done.stderr
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    records = {r["image"]: r["captions"] for r in read_records(data, "val")}
    assert [os.path.basename(line["image"]) for line in lines] == ["a.png", "b c.jpg"] + [f"val{i}.jpg" for i in range(6)]
    for line in lines:
        assert len(line["captions"]) == 1 and line["captions"][0]["logprob"] < 0
        assert line["references"] == records.get(line["image"], [])
    assert Image.open(tmp_path / "s.png").size[0] > 400
    empty = run("sample.py", "--image", "-", "--out_dir", trained, input=b"", check=False)
    assert empty.returncode == 1 and b"cannot identify image file" in empty.stderr and b"BytesIO" not in empty.stderr
    stdin = run("sample.py", "--image", "-", "--out_dir", trained, "--json", input=(folder / "a.png").read_bytes())
    assert json.loads(stdin.stdout)["captions"][0]["text"] == lines[0]["captions"][0]["text"]
    several = run("sample.py", "--image", folder / "a.png", "--out_dir", trained, "--num_samples", "3", "--top_p", "0.9", "--json")
    assert len(json.loads(several.stdout)["captions"]) == 3

    if os.path.exists("/dev/full"):  # nothing that was asked for may be missing in silence
        with open("/dev/full", "wb") as full:
            done = subprocess.run([sys.executable, "sample.py", "--image", folder / "a.png", "--out_dir", trained], cwd=HERE, stdout=full,
                                  stderr=subprocess.PIPE)
        one_line_error(done, 1, "No space left", "make room")

    captioner = load(trained, "cpu")
    assert caption(captioner, folder / "a.png") == lines[0]["captions"][0]["text"]
    assert caption(captioner, [folder / "a.png", (folder / "deep" / "b c.jpg").read_bytes()]) == [
        line["captions"][0]["text"] for line in lines[:2]]
    with pytest.raises(ValueError, match="broken.jpg"):
        caption(captioner, folder / "broken.jpg")


def test_fine_tuning_on_photos_of_ones_own(trained, tmp_path):
    """As README does, on new pictures with new words: the captioner learns them and keeps its tokenizer."""
    (tmp_path / "photos").mkdir()
    lines = ["image,caption"]
    for i in range(60):  # enough for the 5 % that become val
        colour = ["red", "blue"][i % 2]
        Image.new("RGB", (30, 20), colour).save(tmp_path / "photos" / f"{i}.png")
        lines.append(f'{i}.png,"my {colour} zeppelin"')
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    run("prepare_flickr.py", "--images", tmp_path / "photos", "--captions", tmp_path / "captions.csv", "--out_dir", tmp_path / "mine",
        "--image_size", 16, "--tokenizer", trained)
    start(tmp_path / "mine", tmp_path / "tuned", f"--init_from={trained}", "--max_iters=60", "--eval_interval=60", "--alpha=0")
    tuned, before = load(tmp_path / "tuned", "cpu"), load(trained, "cpu")
    said = caption(tuned, [tmp_path / "photos" / name for name in ("0.png", "1.png")])
    assert said == ["my red zeppelin", "my blue zeppelin"] != caption(before, [tmp_path / "photos" / name for name in ("0.png", "1.png")])


@pytest.mark.parametrize("args,parts", [
    (["--beam", "2", "--num_samples", "2"], ["--beam", "--num_samples"]), (["--beam", "0"], ["beam", "0"]),
    (["--top_p", "1.5"], ["top_p", "1.5"]), (["--temperature", "0"], ["temperature"]), (["--bean", "3"], ["--bean", "--beam"]),
    (["--out_dir", "/nowhere"], ["/nowhere", "checkpoint"]), (["--sheet", "x.doc"], ["x.doc"]), ([], ["a.jpg", "no picture or folder"]),
])
def test_wrong_sample_options(trained, args, parts):
    one_line_error(run("sample.py", "--image", "a.jpg", "--out_dir", trained, *args, check=False), 2, *parts)


def test_checkpoints_with_code_are_refused(tmp_path):
    torch.save(dict(model=time.sleep), tmp_path / "evil.pt")
    one_line_error(run("sample.py", "--image", "a.jpg", "--out_dir", tmp_path / "evil.pt", check=False), 2, "evil.pt")
