"""Teacher, optimizer, augmentation and precision: the parts of training."""
import math
import random

import pytest
import torch
from torch.nn import functional as F

from checkpoint import load
from helpers import TINY, random_images
from model import Captioner, pack
from nanocaption import precision
from nanocaption.augment import augment, names_a_side
from nanocaption.cli import UserError
from nanocaption.optimizer import Muon, make_optimizer, orthogonalize
from test_model import random_captions, tiny_model
from train import Options, make_teacher, update_teacher


def test_teacher_is_a_copy_without_gradient_in_eval_mode():
    model = tiny_model(dropout=0.3).train()
    model.wpe.weight.requires_grad_(False)
    teacher = make_teacher(model)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    # only what is frozen is shared
    assert teacher.wpe.weight is model.wpe.weight
    assert teacher.wte.weight is not model.wte.weight
    for a, b in zip(model.state_dict().values(), teacher.state_dict().values()):
        assert torch.equal(a, b)
    packed = pack(random_captions(2), 49, 20)
    loss, _ = model(random_images(2), packed, teacher, alpha=0.5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert model.wte.weight.grad is not None


def test_teacher_is_a_moving_average():
    model = tiny_model()
    teacher = make_teacher(model)
    before = teacher.wte.weight.clone()
    with torch.no_grad():
        model.wte.weight.add_(1)
    update_teacher(teacher, model, 0.9)
    torch.testing.assert_close(teacher.wte.weight, before + 0.1)


@pytest.mark.parametrize("shape", [(2, 40, 24), (2, 24, 40), (1, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_orthogonalizes(shape, dtype):
    torch.manual_seed(0)
    G = torch.randn(shape)
    ours = orthogonalize(G, dtype)
    singular = torch.linalg.svdvals(ours)
    assert 0.3 < singular.min() and singular.max() < 1.3
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert F.cosine_similarity(ours.flatten(), (U @ V).flatten(), dim=0) > 0.95


def test_muon_takes_the_matrices_of_the_blocks():
    model = tiny_model()
    options = Options(optimizer="muon", lr_scale="encoder=0.5 wte=0.1", dtype="float32")
    optimizer = make_optimizer(model, options)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for part in optimizer.optimizers:
        for group in part.param_groups:
            for p in group["params"]:
                seen[names[id(p)]] = isinstance(part, Muon), group["weight_decay"], group["lr"]
    assert seen["blocks.0.mlp.fc.weight"] == (True, 0.1, 0.02)
    assert seen["encoder.blocks.0.mlp.fc.weight"] == (True, 0.1, 0.01)
    assert seen["blocks.0.mlp.fc.bias"] == (False, 0.0, 1e-3)
    assert seen["wte.weight"] == (False, 0.1, 1e-4)
    assert len(seen) == len(names)


def test_muon_equals_a_naive_step():
    """A fused qkv matrix is three square ones; Nesterov momentum; decoupled weight decay."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(24, 8))
    start = p.detach().clone()
    gradients = [torch.randn(24, 8) for _ in range(2)]
    optimizer = Muon([p], lr=0.1, weight_decay=0.2)
    momentum = torch.zeros(24, 8)
    expected = start
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = 0.05 * gradient + 0.95 * momentum
        parts = [orthogonalize(part[None])[0] for part in update.split(8)]
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * torch.cat(parts)
    torch.testing.assert_close(p.detach(), expected)


def augmented(images, seeds, may_flip, **options):
    return augment(images, seeds, may_flip, Options(**options))


def test_flips_are_drawn_and_allowed_by_the_caption():
    images = random_images(8)
    seeds = [(0, 0, i) for i in range(8)]
    same = augmented(images, seeds, [False] * 8, image_size=16, flip=True)
    torch.testing.assert_close(same, images.float(), atol=0.01, rtol=0)
    flipped = augmented(images, seeds, [True] * 8, image_size=16, flip=True)
    mirrored = []
    kept = []
    for ours, image in zip(flipped, images.float()):
        mirrored.append(torch.allclose(ours, image.flip(1), atol=0.01))
        kept.append(torch.allclose(ours, image, atol=0.01))
    assert any(mirrored) and any(kept)
    assert all(a or b for a, b in zip(mirrored, kept))
    assert names_a_side(["A dog", "on the Left side"])
    assert not names_a_side(["He leftover", "bright"])


def test_crops_depend_on_their_own_seed_alone():
    images = random_images(8)
    seeds = [(0, 0, i) for i in range(8)]
    crops = augmented(images, seeds, [True] * 8, image_size=8, crop=0.5, flip=True)
    assert crops.shape == (8, 8, 8, 3)
    assert crops.min() >= 0 and crops.max() <= 255
    alone = augmented(images[3:5], seeds[3:5], [True] * 2, image_size=8, crop=0.5, flip=True)
    torch.testing.assert_close(crops[3:5], alone)


@pytest.mark.parametrize("crop", [0.5, 0.8, 0.95])
def test_crops_keep_at_least_this_fraction_of_the_area(crop):
    image = torch.zeros(1, 64, 64, 3)
    image[..., 0] = torch.arange(64)
    image[..., 1] = torch.arange(64)[:, None]
    seeds = [(0, 0, i) for i in range(400)]
    crops = augmented(image.expand(400, -1, -1, -1), seeds, [False] * 400, image_size=64, crop=crop)
    steps = torch.stack([crops[:, 32, 33, 0] - crops[:, 32, 32, 0],  # widths and heights
                         crops[:, 33, 32, 1] - crops[:, 32, 32, 1]])
    assert steps.max() <= 1.001
    areas = steps.prod(0)
    assert crop - 0.001 <= areas.min() < crop + 0.05 and areas.max() > 0.95


def test_jitter_changes_brightness_contrast_and_saturation():
    images = random_images(8)
    seeds = [(0, 0, i) for i in range(8)]
    jittered = augmented(images, seeds, [False] * 8, image_size=16, jitter=0.4)
    brightnesses = set()
    for ours, image in zip(jittered, images.float()):
        brightness = ours.mean() / image.mean()
        contrast = ours.mean(-1).std() / image.mean(-1).std() / brightness
        # all three factors, the same for all pixels
        ratio = (ours[..., 0] - ours[..., 1]) / (image[..., 0] - image[..., 1] + 1e-3)
        torch.testing.assert_close(ratio.median(), ratio.quantile(0.2), rtol=0.02, atol=0)
        for factor in (brightness, contrast, ratio.median() / brightness / contrast):
            assert 0.6 <= factor <= 1.4 and abs(factor - 1) > 1e-4
        brightnesses.add(round(brightness.item(), 3))
    assert len(brightnesses) == 8


def test_overfits_a_few_dozen_images():
    rng = random.Random(0)
    captions = []
    for _ in range(40):
        captions.append([[rng.randrange(60) for _ in range(rng.randint(4, 7))] for _ in range(5)])
    images = random_images(40)
    torch.manual_seed(0)
    options = Options(**{**TINY, "n_embd": 64, "n_head": 4}, learning_rate=6e-3, weight_decay=0.0,
                      dtype="float32")
    model = Captioner(options, 61)
    optimizer = make_optimizer(model, options)
    packed = pack(captions, 60, 20)
    n_tokens = (packed["targets"] >= 0).sum().item()
    for step in range(400):
        loss, ce = model(images, packed)
        (loss / n_tokens).backward()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, (step + 1) / 20) * (1 - step / 400)
        optimizer.step()
        optimizer.zero_grad()
    # which of the image's five captions comes next is unpredictable; everything else is not
    floor = math.log(5) / (n_tokens / 200)
    assert floor - 1e-3 < ce.item() / n_tokens < floor + 0.05
    results = model.eval().beam_search(images, beam=1)
    right = [words in own for [(words, _)], own in zip(results, captions)]
    assert sum(right) >= 36


# -----------------------------------------------------------------------------
# precision

def timed(monkeypatch, float32, bfloat16):
    """Pretends that products take these seconds. Returns the sizes of those that were timed."""
    seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
    sizes = set()

    def product_seconds(dtype, shape):
        sizes.add(shape[1])
        return seconds[dtype]

    monkeypatch.setattr(precision, "product_seconds", product_seconds)
    return sizes


def test_cpus_use_bfloat16_where_it_is_faster(monkeypatch):
    cpu = torch.device("cpu")
    timed(monkeypatch, 4.0, 1.0)
    dtype, reason = precision.pick_dtype("auto", cpu)
    assert dtype == torch.bfloat16 and "4x" in reason
    timed(monkeypatch, 1.0, 1.0)
    dtype, reason = precision.pick_dtype("auto", cpu)
    assert dtype == torch.float32 and "1x" in reason
    sizes = timed(monkeypatch, 1.0, 40.0)
    dtype, reason = precision.pick_dtype("auto", cpu)
    assert dtype == torch.float32 and "0.025x" in reason
    assert sizes == {128}  # large products would take a second where bfloat16 is emulated
    assert precision.pick_dtype("bfloat16", cpu)[0] == torch.bfloat16
    assert precision.pick_dtype("float32", cpu)[0] == torch.float32
    with pytest.raises(UserError, match="float16"):
        precision.pick_dtype("float16", cpu)


def test_few_captions_may_be_faster_in_float32_than_many(monkeypatch):
    def product_seconds(dtype, shape):
        return max(shape[0], 100) if dtype == torch.bfloat16 else 2 * shape[0]

    monkeypatch.setattr(precision, "product_seconds", product_seconds)
    assert load(device="cpu").dtype == torch.float32
    many = load(device="cpu", n_row=200)
    assert many.dtype == many.model.wte.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("supported", [True, False])
def test_gpus_use_bfloat16_if_they_have_it(monkeypatch, supported):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: supported)
    dtype, _ = precision.pick_dtype("auto", torch.device("cuda"))
    assert dtype == (torch.bfloat16 if supported else torch.float32)
    assert precision.pick_dtype("auto", torch.device("mps"))[0] == torch.float32


@torch.no_grad()
def test_generation_in_bfloat16_stays_near_float32():
    model = tiny_model(vocab_size=30)
    images = random_images(4)
    expected = model.beam_search(images, beam=1, max_tokens=3)
    precision.cast_weights(model, torch.bfloat16)
    assert model.wte.weight.dtype == model.blocks[0].mlp.fc.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = model.beam_search(images, beam=1, max_tokens=3)
    for [(_, ours)], [(_, exact)] in zip(found, expected):
        assert ours == pytest.approx(exact, rel=0.05)
