"""Where each word looked: the weights, the words, the strips, and that it is on what words name."""
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from checkpoint import LoadedCaptioner, load
from helpers import HERE, TINY, random_images
from model import ModelOptions
from nanocaption.attention_maps import join_tokens, word_attention
from nanocaption.cli import UserError
from nanocaption.generate import caption_images
from nanocaption.sheet import VIRIDIS, draw_strips, overlay
from nanocaption.tokenizer import BYTES, make_tokenizer
from pretrained import build_captioner
from sample import caption
from test_shapes import find_objects, shapes

WORDS = [b" do", b"gs", b" the", "é".encode(), " h".encode() + "é".encode()[:1]]
TOKENIZER = make_tokenizer(BYTES + WORDS)
N_PATCH = 9


def make_model(**changes):
    """A captioner of random weights, large enough that its attention is uneven."""
    options = ModelOptions(**{**TINY, "image_size": 24, **changes})
    torch.manual_seed(0)
    model = build_captioner(options, TOKENIZER.n_vocab)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def watch_attention(monkeypatch):
    """A list to which each later call of torch's attention adds its weights (H, T, S)."""
    watched = []
    original = F.scaled_dot_product_attention

    def watching(q, k, v, attn_mask=None):
        scores = q @ k.mT / q.size(-1) ** 0.5
        watched.append(scores.softmax(-1)[0].numpy())
        return original(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watching)
    return watched


@torch.no_grad()
def generation_maps(model, image, ids, watched):
    """What a caption's steps attend to while it is written, with a KV cache: (T, 3, 3)."""
    caches, image_kv = model.prefill(image[None], 1)
    n_image = image.size(0)
    maps = []
    for t, token in enumerate([model.eot_token, *ids]):
        watched.clear()
        model.step(caches, image_kv, torch.tensor([token]), t)
        # self-attention sees more keys than the image has: the prefix, then the tokens
        of_prefix = [weights for weights in watched if weights.shape[2] == n_image + t + 1]
        of_cross = [weights for weights in watched if weights.shape[2] == n_image]
        found = of_prefix if model.options.bridge == "prefix" else of_cross
        assert len(found) == 2, "one for each layer"
        mean = np.mean([weights[:, 0, :n_image] for weights in found], axis=(0, 1))
        patches = mean[-N_PATCH:]
        maps.append((patches / patches.sum()).reshape(3, 3))
    return np.array(maps)


@pytest.mark.parametrize("changes", [
    dict(),
    dict(bridge="prefix"),
    dict(bridge="both"),
    dict(local_conv=True, n_embd_encoder=16),
    dict(encoder_family="vit"),
    dict(encoder_family="deit"),  # two class tokens
    dict(encoder_family="clip", bridge="prefix"),
    dict(decoder_family="gpt2"),
    dict(decoder_family="falcon"),
], ids=str)
def test_words_look_where_generation_looked(monkeypatch, changes):
    model = make_model(**changes)
    captions = [[256, 258, 256, 257], [*b"the", 32, 259]]
    # each with its places in the caption
    expected_words = [[("do", [0]), ("the", [1]), ("dogs", [2, 3])],
                      [("the", [0, 1, 2]), ("é", [4])]]
    with torch.no_grad():
        image = model.encode(random_images(2, 24))
        found = word_attention(model, TOKENIZER, image, captions)
    watched = watch_attention(monkeypatch)
    for i in range(2):
        steps = generation_maps(model, image[i], captions[i], watched)
        above = np.maximum(steps - steps.mean(0), 1e-9)
        above /= above.sum((1, 2), keepdims=True)
        assert [word for word, _ in found[i]] == [word for word, _ in expected_words[i]]
        for (_, weights), (_, tokens) in zip(found[i], expected_words[i]):
            assert weights.dtype == np.float32
            np.testing.assert_allclose(weights, above[tokens].mean(0), rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("ids, words", [
    ([], []),
    ([97], [("a", [0])]),
    ([256, 257, 32, 32, 97, 46, 10, 98], [("dogs", [0, 1]), ("a.", [4, 5]), ("b", [7])]),
    # "a , b ."
    ([97, 32, 44, 32, 98, 32, 46], [("a,", [0]), ("b.", [4])]),
    # a token ends in the middle of a character
    ([260, 0xA9, 39, 115, 258], [("hé's", [0, 1, 2, 3]), ("the", [4])]),
    ([0xC3, 32, 97], [("\ufffd", [0]), ("a", [2])]),
])
def test_tokens_are_joined_to_words(ids, words):
    assert join_tokens(TOKENIZER, ids) == words


@pytest.mark.parametrize("changes, options, message", [
    (dict(n_query=4), {}, "n_query=4"),
    (dict(bridge="prefix", decoder_family="falcon"), {}, "Falcon"),
    (dict(), dict(num_samples=2), "samples"),
])
def test_what_cannot_be_shown_is_refused(tmp_path, changes, options, message):
    captioner = LoadedCaptioner(make_model(**changes), TOKENIZER, 24, torch.float32)
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=message):
        caption(captioner, tmp_path / "a.png", attention=True, **options)


# -----------------------------------------------------------------------------
# the strips

def brightness(rgb):
    return np.asarray(rgb) @ [0.299, 0.587, 0.114]


def test_attention_can_be_read_in_gray():
    assert (np.diff(brightness(VIRIDIS)) > 10).all()
    checkered = np.kron(np.indices((12, 12)).sum(0) % 2, np.ones((5, 5))) * 255
    image = Image.fromarray(np.uint8(checkered)).convert("RGB")
    weights = np.zeros((3, 3))
    weights[0, 2] = 0.2
    drawn = brightness(overlay(image, weights))
    assert drawn.shape == (60, 60)
    # the first patch in full is right of 5/6 of the width and above 1/6 of the height
    assert drawn[:10, 50:].min() > drawn[30:, :30].max() + 20


def test_strips_show_the_image_then_its_words_in_rows(tmp_path):
    red = np.full((30, 30, 3), (200, 0, 0), np.uint8)
    weights = np.eye(2, dtype=np.float32) / 2
    words = [("word", weights)] * 3
    draw_strips(tmp_path / "x" / "where.png", [red, red], ["one", "two"], [words, words[:1]],
                columns=3, size=40)
    drawn = np.asarray(Image.open(tmp_path / "x" / "where.png")).astype(int)
    assert drawn.shape[1] == 3 * 50 + 10
    is_red = (drawn == (200, 0, 0)).all(2)
    ys, xs = np.nonzero(is_red)
    assert set(xs) == set(range(10, 50))
    assert len(ys) == 2 * 40 * 40, "each image is there once, as it is"
    # the second image's strip: the image and one word beside it
    top = max(ys) - 39
    tile = drawn[top:top + 40, 60:100]
    assert brightness(tile[2, 2]) > brightness(tile[2, 37]) + 50
    assert brightness(tile[37, 37]) > brightness(tile[37, 2]) + 50
    assert (drawn[top:top + 40, 110:] == 255).all()


# -----------------------------------------------------------------------------
# do the words look at what they name?

def test_colors_and_shapes_look_at_their_objects():
    """
    On all held-out scenes of the drawn data set, the attention on the objects that a word names,
    divided by their part of the image's pixels. tests/data/attention.md says how the checkpoint was
    made.
    """
    captioner = load(HERE / "tests" / "data" / "attention.pt", "cpu", "float32")
    alone, pairs = shapes.split_scenes(0)["test"]
    scenes = alone + pairs
    names = [f"test_{i:05d}.png" for i in range(len(scenes))]
    images = list(shapes.draw_images(scenes, names, 64, 0))
    found = caption_images(captioner, np.stack(images), beam=1, attention=True)
    [two] = caption_images(captioner, np.stack(images[:1]), beam=2, n_best=2, attention=True)
    assert [("attention" in caption) for caption in two] == [True, False]
    scores = defaultdict(list)
    for image, scene, [described] in zip(images, scenes, found):
        for word, weights in described["attention"]:
            for group in (scene[0], scene[2]):
                if group and word.strip(",") in (group.color, shapes.noun(group)):
                    mask = pixels_of(image, group.color)
                    on_object = np.kron(weights, np.ones((8, 8)) / 64)[mask].sum()
                    scores[group.size, group.n].append(on_object / mask.mean())
    everything = sum(scores.values(), [])
    assert len(everything) > 1100
    assert np.mean(everything) >= 3
    means = {group: np.mean(values) for group, values in scores.items()}
    # the more of the image the objects cover, the less is possible
    least = {("small", 1): 15, ("small", 2): 8,
             ("large", 1): 5, ("large", 2): 2.5, ("large", 3): 1.5}
    assert means.keys() == least.keys()
    for group, value in least.items():
        assert means[group] >= value, (group, means)


def pixels_of(image, color):
    """bool (S, S): where a drawn image has objects of this color."""
    mask = np.zeros(image.shape[:2], bool)
    for xs, ys, found in find_objects(image):
        if found == color:
            mask[ys, xs] = True
    return mask
