"""Pretrained parts: the same outputs as transformers with the same random weights; files; LoRA."""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import pretrained
from checkpoint import load, make_model, read_checkpoint
from helpers import HERE, one_line_error, random_images, run
from model import pack
from nanocaption import download
from nanocaption.cli import UserError
from nanocaption.dataset import Dataset
from nanocaption.options import read_config_file
from nanocaption.tokenizer import keep_used, make_tokenizer, read_hub_tokenizer, read_tokenizer
from nanocaption.weights import read_index, read_pickle, read_safetensors
from pretrained import (DECODERS, LORA_ALPHA, LoRA, add_lora, assemble, build_captioner, merge_lora,
                        part_options)
from test_download import mirror  # noqa: F401: a fixture
from train import Options

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
OURS = dict(image_size=32, patch_size=8, n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32,
            block_size=24, max_iters=1)
CLOSE = dict(rtol=1e-4, atol=1e-4)


def scramble(model):
    """Changes every parameter, so that none can be left out unnoticed."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def small_encoder(family):
    """A model of transformers with 16 patches, and scrambled weights."""
    sizes = dict(SMALL, image_size=32, patch_size=8)
    if family == "vit":
        config = transformers.ViTConfig(**sizes)
        return scramble(transformers.ViTForImageClassification(config))
    if family == "deit":
        return scramble(transformers.DeiTModel(transformers.DeiTConfig(**sizes)))
    if family == "dinov2":
        del sizes["intermediate_size"]
        return scramble(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)))
    text = dict(SMALL, vocab_size=100, bos_token_id=0, eos_token_id=1)
    config = transformers.CLIPConfig(vision_config=sizes, text_config=text)
    return scramble(transformers.CLIPModel(config))


def small_decoder(family, vocab_size=300):
    """A model of transformers with 2 layers, and scrambled weights."""
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab_size, n_positions=96, n_embd=32, n_layer=2, n_head=2,
            bos_token_id=1, eos_token_id=1)
        return scramble(transformers.GPT2LMHeadModel(config))
    config = transformers.FalconConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        multi_query=True, parallel_attn=True, new_decoder_architecture=False, bias=False,
        alibi=False)
    return scramble(transformers.FalconForCausalLM(config))


def small_options(encoder="", decoder="", **changes):
    """train.py's options for a small captioner with these parts."""
    fixed, _, _ = part_options(str(encoder), str(decoder))
    values = {**OURS, "encoder": str(encoder), "decoder": str(decoder), **fixed, **changes}
    return Options(**values)


def captioner(encoder="", decoder="", ids=None, vocab_size=300, **changes):
    torch.manual_seed(1)
    options = small_options(encoder, decoder, **changes)
    return assemble(options, vocab_size, ids=ids).eval()


@torch.no_grad()
def next_logits(model, images, captions):
    """(n, V): what the model predicts for each real token of the captions."""
    batch = pack(captions, model.eot_token, model.max_tokens)
    hidden = model.decode(model.encode(images), batch)
    return hidden[batch["targets"] >= 0] @ model.wte.weight.T


# -----------------------------------------------------------------------------
# architectures

@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "clip"])
def test_encoder_parity(family, tmp_path):
    theirs = small_encoder(family)
    theirs.save_pretrained(tmp_path)
    tower = theirs
    if family == "vit":
        tower = theirs.vit
    if family == "clip":
        tower = theirs.vision_model
    interpolate = {} if family == "dinov2" else dict(interpolate_pos_encoding=True)
    # their own size, and interpolated positions
    for size in (32, 48):
        images = torch.randn(2, 3, size, size)
        model = captioner(tmp_path, image_size=size)
        with torch.no_grad():
            expected = tower(images, **interpolate).last_hidden_state
            torch.testing.assert_close(model.encoder(images), expected, **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_decoder_parity(family, tmp_path):
    theirs = small_decoder(family)
    theirs.save_pretrained(tmp_path)
    images = random_images(2, 32)
    captions = [[[5, 7, 9, 250], [3, 1]], [[8, 8, 2]]]
    model = captioner(decoder=tmp_path)
    expected = []
    with torch.no_grad():
        for words in [*captions[0], *captions[1]]:
            expected.append(theirs(torch.tensor([[299, *words]])).logits[0])
    torch.testing.assert_close(next_logits(model, images, captions), torch.cat(expected), **CLOSE)

    # with the KV cache
    caches, image_kv = model.prefill(images, 1)
    for t, token in enumerate([299, 5, 7, 9, 250]):
        with torch.no_grad():
            logits = model.step(caches, image_kv, torch.tensor([token, token]), t)
        torch.testing.assert_close(logits[0], expected[0][t], **CLOSE)

    # with a third of the vocabulary
    ids = [*range(0, 298, 3), 299]
    model = captioner(decoder=tmp_path, ids=ids, vocab_size=len(ids))
    with torch.no_grad():
        expected = theirs(torch.tensor([[299, 3, 6, 90]])).logits[0][:, ids]
    torch.testing.assert_close(next_logits(model, images[:1], [[[1, 2, 30]]]), expected, **CLOSE)


@pytest.mark.parametrize("bridge", ["prefix", "both"])
@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_packed_rows_equal_separate_rows_after_a_prefix(family, bridge, tmp_path):
    small_decoder(family).save_pretrained(tmp_path)
    model = scramble(captioner(decoder=tmp_path, bridge=bridge, n_query=3))
    images = random_images(2, 32)
    first = [[5, 7, 9, 250], [3, 1], [4]]
    second = [[8, 8, 2]]
    packed = next_logits(model, images, [first, second])
    rows = [next_logits(model, images[:1], [[words]]) for words in first]
    rows.append(next_logits(model, images[1:], [second]))
    torch.testing.assert_close(packed, torch.cat(rows), **CLOSE)

    # with the KV cache, two rows an image
    caches, image_kv = model.prefill(images, 2)
    for t, token in enumerate([299, 5, 7, 9, 250]):
        with torch.no_grad():
            logits = model.step(caches, image_kv, torch.tensor([token] * 4), t)
        torch.testing.assert_close(logits[1], packed[t], **CLOSE)


@pytest.mark.parametrize("encoder, decoder", [("clip", "falcon"), ("dinov2", "gpt2"), ("deit", "")])
def test_a_captioner_is_rebuilt_without_its_sources(encoder, decoder, tmp_path):
    small_encoder(encoder).save_pretrained(tmp_path / encoder)
    if decoder:
        small_decoder(decoder).save_pretrained(tmp_path / decoder)
    options = small_options(tmp_path / encoder, decoder and tmp_path / decoder, n_query=3)
    torch.manual_seed(0)
    model = make_model(options, 300).eval()
    options = Options(**{**asdict(options), "encoder": "", "decoder": ""})
    again = make_model(options, 300).eval()
    again.load_state_dict(model.state_dict())
    images = random_images(2, 32)
    captions = [[[5, 7], [3]], [[8]]]
    expected = next_logits(model, images, captions)
    torch.testing.assert_close(next_logits(again, images, captions), expected)
    options.encoder_family = "resnet"
    with pytest.raises(UserError, match="'resnet' is not supported; choose from "):
        make_model(options, 300)


VIT = dict(model_type="vit", hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
           patch_size=16, image_size=224)
SMALL_VIT = dict(VIT, hidden_size=384, num_attention_heads=6, intermediate_size=1536)
DINOV2 = dict(VIT, model_type="dinov2", patch_size=14, image_size=518, mlp_ratio=4)
GPT2 = dict(model_type="gpt2", n_layer=12, n_head=12, n_embd=768, vocab_size=50257)
# the hub's config.json files
CONFIGS = {
    "google/vit-base-patch16-224-in21k": VIT,
    "google/vit-base-patch16-224": VIT,
    "facebook/deit-tiny-patch16-224":
        dict(VIT, hidden_size=192, num_attention_heads=3, intermediate_size=768),
    "facebook/deit-small-patch16-224": SMALL_VIT,
    "facebook/deit-base-patch16-224": VIT,
    "facebook/dinov2-small": dict(DINOV2, hidden_size=384, num_attention_heads=6),
    "facebook/dinov2-base": DINOV2,
    "openai/clip-vit-base-patch32":
        dict(model_type="clip", vision_config=dict(VIT, patch_size=32)),
    "openai/clip-vit-base-patch16": dict(model_type="clip", vision_config=VIT),
    "gpt2": GPT2,
    "gpt2-medium": dict(GPT2, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(GPT2, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(GPT2, n_layer=48, n_head=25, n_embd=1600),
    "distilgpt2": dict(GPT2, n_layer=6),
    "tiiuae/falcon-7b":
        dict(model_type="falcon", num_hidden_layers=32, num_attention_heads=71, hidden_size=4544,
             vocab_size=65024, multi_query=True, parallel_attn=True,
             new_decoder_architecture=False, alibi=False, bias=False),
}


def their_model(config):
    """The model of transformers that a config.json describes."""
    config = dict(config)
    model_type = config.pop("model_type")
    if model_type == "vit":
        config = transformers.ViTConfig(**config)
        return transformers.ViTModel(config, add_pooling_layer=False)
    if model_type == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**config))
    if model_type == "clip":
        config = dict(config["vision_config"])
        del config["model_type"]
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))
    if model_type == "gpt2":
        return transformers.GPT2Model(transformers.GPT2Config(**config))
    return transformers.FalconModel(transformers.FalconConfig(**config))


# parameters without a counterpart: folded or unused ones of theirs, and zeros of ours
THEIRS_ONLY = re.compile(r"mask_token|post_layernorm|layer_scale")
OURS_ONLY = {"clip": r"stem\.patches\.bias", "falcon": r"wpe|(qkv|proj|fc)\.bias"}


def count(model, ignored):
    """The number of a model's parameters, without those whose name matches ignored."""
    return sum(p.numel() for name, p in model.named_parameters() if not re.search(ignored, name))


@pytest.mark.parametrize("name", CONFIGS)
def test_names_have_the_right_shapes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "WEIGHTS", str(tmp_path))
    config = CONFIGS[name]
    family = config["model_type"]
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")  # so that nothing is downloaded
    if family in DECODERS:
        options = small_options(decoder=name, block_size=1024, n_embd_encoder=64, n_head_encoder=2)
    else:
        image_size = config.get("vision_config", config)["image_size"]
        options = small_options(encoder=name, image_size=image_size)
    ignored = OURS_ONLY.get(family, "nothing")
    with torch.device("meta"):
        model = build_captioner(options, config.get("vocab_size", 300))
        expected = count(their_model(config), THEIRS_ONLY)
    if family in DECODERS:
        assert count(model, f"^encoder|cross|{ignored}") == expected > 5e6
    else:
        assert count(model.encoder, ignored) == expected > 5e6


def rewrite(folder, change):
    """Replaces the tensors of a model's folder by change(tensors)."""
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in safetensors.load_file(path).items()}
    safetensors.save_file(change(tensors), path)


def refused(*args, **kw):
    """The message with which captioner() fails; "" if it does not."""
    try:
        captioner(*args, **kw)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "base_model.model.",
                                    "_orig_mod.module."])
@pytest.mark.parametrize("family", ["clip", "gpt2"])
def test_prefixes_do_not_matter(family, prefix, tmp_path):
    theirs = small_decoder(family) if family == "gpt2" else small_encoder(family)
    theirs.save_pretrained(tmp_path)
    part = {"decoder" if family == "gpt2" else "encoder": tmp_path}
    expected = captioner(**part).state_dict()
    rewrite(tmp_path, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    assert refused(**part) == ""
    found = captioner(**part).state_dict()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("family, embedding", [
    ("gpt2", "transformer.wte.weight"),
    ("falcon", "transformer.word_embeddings.weight"),
])
def test_tied_weights_may_be_saved_as_the_head(family, embedding, tmp_path):
    small_decoder(family).save_pretrained(tmp_path)
    expected = captioner(decoder=tmp_path).state_dict()["wte.weight"]

    def as_head(tensors):
        tensors.setdefault("lm_head.weight", tensors[embedding])
        del tensors[embedding]
        return tensors

    rewrite(tmp_path, as_head)
    assert refused(decoder=tmp_path) == ""
    assert torch.equal(captioner(decoder=tmp_path).state_dict()["wte.weight"], expected)


def test_variants_of_config_json(tmp_path):
    # transformers writes only what differs from CLIP's defaults
    (tmp_path / "config.json").write_text(json.dumps(
        dict(model_type="clip", vision_config=dict(patch_size=[16, 16]))))
    try:
        fixed, _, _ = part_options(str(tmp_path))
    except UserError as error:
        fixed = str(error)
    assert fixed == dict(encoder_family="clip", patch_size=16, n_layer_encoder=12,
                         n_head_encoder=12, n_embd_encoder=768)
    config = dict(SMALL, model_type="vit", patch_size=[8, 16])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json gives \[8, 16\] for patch_size"):
        part_options(str(tmp_path))


CUSTOM = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])


@pytest.mark.parametrize("nested, flat, mean, std", [
    (CUSTOM, None, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
    (CUSTOM, dict(image_mean=[0, 0, 0]), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
    (None, dict(CUSTOM, do_normalize=False), [0, 0, 0], [1, 1, 1]),
    (dict(CUSTOM, do_normalize=False), None, [0, 0, 0], [1, 1, 1]),
    (None, dict(image_mean=None, image_std=None), [0.5] * 3, [0.5] * 3),
    (None, dict(image_mean=0.25, image_std=[0.4, 0.5, 0.6]), [0.25] * 3, [0.4, 0.5, 0.6]),
    # pixels in 0..2 and in 0..255
    (None, dict(CUSTOM, rescale_factor=2 / 255), [0.05, 0.1, 0.15], [0.2, 0.25, 0.3]),
    (None, dict(image_mean=[102] * 3, image_std=[51] * 3, do_rescale=False), [0.4] * 3, [0.2] * 3),
])
def test_normalization_is_theirs(nested, flat, mean, std, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(SMALL, model_type="vit", patch_size=8)))
    if nested:
        text = json.dumps(dict(processor_class="X", image_processor=nested))
        (tmp_path / "processor_config.json").write_text(text)
    if flat:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(flat))
    try:
        _, _, found = part_options(str(tmp_path))
    except UserError as error:
        found = str(error)
    assert found == (pytest.approx(mean), pytest.approx(std))


# -----------------------------------------------------------------------------
# LoRA

def test_lora_is_its_dense_sum():
    torch.manual_seed(0)
    base = nn.Linear(12, 20)
    x = torch.randn(5, 12)
    lora = LoRA(base, rank=3)
    torch.testing.assert_close(lora(x), base(x))  # the identity at first
    nn.init.normal_(lora.B)
    A = lora.A.detach().clone().requires_grad_()
    B = lora.B.detach().clone().requires_grad_()
    dense = F.linear(x, base.weight + LORA_ALPHA / 3 * B @ A, base.bias)
    torch.testing.assert_close(lora(x), dense)
    found = torch.autograd.grad(lora(x).square().sum(), (lora.A, lora.B))
    expected = torch.autograd.grad(dense.square().sum(), (A, B))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not base.weight.requires_grad


def test_lora_is_added_where_asked_and_merges():
    model = captioner()
    images = random_images(1, 32)
    batch = pack([[[1, 2, 3]]], 299, 23)
    _, before = model(images, batch)
    add_lora(model, "qkv|fc", 4)
    names = {name for name, module in model.named_modules() if isinstance(module, LoRA)}
    assert names == {"blocks.0.attention.qkv", "blocks.0.mlp.fc"}
    for name in names:
        nn.init.normal_(model.get_submodule(name).B, std=0.2)
    _, apart = model(images, batch)
    merge_lora(model)
    _, merged = model(images, batch)
    assert abs(apart.item() - before.item()) > 1e-3
    assert merged.item() == pytest.approx(apart.item(), rel=1e-5)
    assert not any(isinstance(module, LoRA) for module in model.modules())
    with pytest.raises(UserError, match="matches no linear layer"):
        add_lora(model, "nothing", 4)


# -----------------------------------------------------------------------------
# memory

def test_recomputed_activations_give_the_same_gradients():
    model = captioner(dropout=0.1).train()
    batch = pack([[[1, 2, 3], [4]]], 299, 23)
    images = random_images(1, 32)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        torch.manual_seed(0)
        loss, _ = model(images, batch)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for kept, recomputed in zip(*gradients):
        torch.testing.assert_close(kept, recomputed)


def test_frozen_weights_are_loaded_once_and_in_bfloat16(tmp_path):
    """A quarter of a GB of them: the peak is at most a tenth more."""
    code = (
        "import json, sys, pathlib; from bench import bench_load; "
        "print(json.dumps(bench_load(pathlib.Path(sys.argv[1]), 10, 1024, 300)))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'dev'}"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
                          timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 230 < found["weights_mb"] < 270
    if not Path("/proc/self/status").exists():
        pytest.skip("memory cannot be read without /proc")
    assert 0.5 < found["peak_per_weights"] < 1.1


# -----------------------------------------------------------------------------
# tokenizers

TEXTS = [
    "A dog runs (fast) , isn't it ?",
    "Two men, 12345 of 67 ... --",
    "café naïve 犬",
    "A dog runs , a dog sits .",
    " a  b\n\nc ''",
] * 3


def hub_tokenizer(folder, family):
    """A small tokenizer.json by the tokenizers package, with the parts that the family's has."""
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    if family == "falcon":
        tokenizer.pre_tokenizer = pre.Sequence([
            pre.Punctuation("contiguous"),
            pre.ByteLevel(add_prefix_space=False),
            pre.Digits(individual_digits=False),
            pre.Split(tokenizers.Regex("[0-9][0-9][0-9]"), "isolated"),
        ])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=[">>TITLE<<", "<|endoftext|>"],
        initial_alphabet=pre.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_a_hub_tokenizer_and_its_used_part(tmp_path, family):
    theirs = hub_tokenizer(tmp_path, family)
    ranks, pattern, ids = read_hub_tokenizer(tmp_path / "tokenizer.json")
    ours = make_tokenizer(ranks, pattern)
    assert ids[-1] == theirs.token_to_id("<|endoftext|>")
    assert len(ids) == ours.n_vocab
    unseen = ["unseen: 7 cats & 1234567 dogs!?", "x\t y", "$3.50 (a)b", "don't  stop 's"]
    for text in [*TEXTS, *unseen]:
        found = [ids[n] for n in ours.encode_ordinary(text)]
        assert found == theirs.encode(text, add_special_tokens=False).ids, text

    kept = keep_used(ranks, pattern, TEXTS[:2])
    assert len(kept) < len(ranks)
    small = make_tokenizer([ranks[n] for n in kept], pattern)
    for text in TEXTS[:2]:
        found = [kept[n] for n in small.encode_ordinary(text)]
        assert found == ours.encode_ordinary(text)
    for text in TEXTS:
        assert small.decode(small.encode_ordinary(text)) == text


# -----------------------------------------------------------------------------
# training

@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """
    A folder with a small vit, clip, gpt2 and falcon, the last two with their tokenizers, and data
    prepared with them: data, with the tokens of gpt2 that captions use, and data-falcon.
    """
    folder = tmp_path_factory.mktemp("parts")
    for family in ("vit", "clip"):
        small_encoder(family).save_pretrained(folder / family)
    for family in ("gpt2", "falcon"):
        (folder / family).mkdir()
        vocab_size = hub_tokenizer(folder / family, family).get_vocab_size()
        small_decoder(family, vocab_size).save_pretrained(folder / family)

    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for i in range(12):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        for k in range(3):
            lines.append(f'{i}.png,"{TEXTS[(i + k) % 2]}"')
    (folder / "captions.csv").write_text("\n".join(lines))
    (folder / "train.txt").write_text("\n".join(f"{i}.png" for i in range(8)))
    (folder / "val.txt").write_text("\n".join(f"{i}.png" for i in range(8, 12)))
    command = ["prepare_flickr.py", "--images", folder / "images", "--captions",
               folder / "captions.csv", "--split_files", folder / "train.txt", folder / "val.txt",
               "--image_size", 32]
    run(*command, "--tokenizer", folder / "gpt2", "--keep_used", "--out_dir", folder / "data")
    run(*command, "--tokenizer", folder / "falcon", "--out_dir", folder / "data-falcon")
    n_gpt2 = len(read_hub_tokenizer(folder / "gpt2" / "tokenizer.json")[2])
    assert Dataset(folder / "data").vocab_size < n_gpt2
    return folder


def train_parts(parts, out, *more, **kw):
    """Trains vit and gpt2 together for a few steps."""
    options = dict(
        data_dir=parts / "data", out_dir=out, encoder=parts / "vit", decoder=parts / "gpt2",
        image_size=32, block_size=30, batch_size=4, max_iters=6, eval_interval=3, eval_images=4,
        log_interval=1, warmup_iters=1, device="cpu", dtype="float32")
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return run("train.py", *arguments, *more, **kw)


def write_caption(loaded, parts):
    """The token ids of a caption for one of the images."""
    image = torch.from_numpy(np.array(Image.open(parts / "images" / "0.png")))
    [[(ids, _)]] = loaded.model.beam_search(image[None])
    return ids


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").open()]


def test_lora_and_a_frozen_encoder_train_save_resume_and_caption(parts, tmp_path):
    lora = ["--freeze_encoder", "--lora_rank=2", "--lr_scale=cross=2 [AB]$=0.5",
            "--learning_rate=0.01", "--alpha=0.3"]
    train_parts(parts, tmp_path / "whole", *lora)
    best = tmp_path / "whole" / "best.pt"
    checkpoint = torch.load(best, weights_only=True)
    saved = set(checkpoint["model"])
    assert {"blocks.0.attention.qkv.A", "blocks.0.cross.q.weight"} <= saved
    frozen = ("encoder.blocks", "encoder.stem", "wte", "wpe", "blocks.0.attention.qkv.base")
    assert not any(name.startswith(frozen) for name in saved)
    sizes = [os.path.getsize(parts / part / "model.safetensors") for part in ("gpt2", "vit")]
    assert os.path.getsize(best) < 0.45 * sum(sizes)
    assert checkpoint["model"]["blocks.0.attention.qkv.B"].abs().max() > 0
    assert len(checkpoint["tokenizer"]["ids"]) == Dataset(parts / "data").vocab_size

    loaded = load(tmp_path / "whole", "cpu", dtype="float32")
    assert not any(isinstance(module, LoRA) for module in loaded.model.modules())
    weights = safetensors.load_file(parts / "vit" / "model.safetensors")
    assert torch.equal(loaded.model.encoder.norm.weight, weights["vit.layernorm.weight"])
    # the encoder's own normalization
    torch.testing.assert_close(loaded.model.mean, torch.full((3,), 0.5))
    assert write_caption(loaded, parts)

    # published, it names no encoder any more, but fine-tuning still freezes it
    published = {**checkpoint["options"], "encoder": "", "decoder": "", "lora_rank": 0}
    model = assemble(Options(**{**published, "n_query": 2}), checkpoint["vocab_size"])
    trained = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    pooling = ("queries", "pool.", "norm_pool.")
    new = {name for name, _ in model.encoder.named_parameters() if name.startswith(pooling)}
    assert len(new) == 9 and trained == new

    # frozen weights in bfloat16
    train_parts(parts, tmp_path / "half", *lora, "--dtype=bfloat16", "--recompute", "--max_iters=2")
    # stopped after three steps and resumed
    train_parts(parts, tmp_path / "again", *lora, "--max_iters=3")
    train_parts(parts, tmp_path / "again", *lora, "--init_from=resume")
    done = train_parts(parts, tmp_path / "again", *lora, "--init_from=resume", "--lora_rank=4",
                       check=False)
    assert done.returncode == 2
    assert b"lora_rank is 4 here but 2" in done.stderr


def test_a_local_folder_and_its_weights_are_recognized(parts, tmp_path, monkeypatch):
    """From any folder, by an absolute path; and never with other weights."""
    monkeypatch.setattr(download, "fetch_hub_file", None, raising=False)
    (tmp_path / "hf").mkdir()
    for part in ("vit", "gpt2"):
        shutil.copytree(parts / part, tmp_path / "hf" / part)
    out = tmp_path / "out"
    relative = os.path.relpath(tmp_path / "hf", HERE)
    frozen = ["--freeze_encoder", "--lora_rank=2", "--max_iters=1", "--eval_interval=1",
              f"--encoder={relative}/vit", f"--decoder={relative}/gpt2"]
    train_parts(parts, out, *frozen)
    saved = torch.load(out / "best.pt", weights_only=True)["options"]
    assert saved["encoder"] == str(tmp_path / "hf/vit")
    assert saved["decoder"] == str(tmp_path / "hf/gpt2")
    monkeypatch.chdir(tmp_path)
    write_caption(load(out, "cpu", dtype="float32"), parts)
    monkeypatch.chdir(HERE)
    train_parts(parts, out, *frozen, "--init_from=resume", "--max_iters=2")

    for part, name in (("vit", "vit.layernorm.bias"), ("gpt2", "transformer.ln_f.bias")):
        path = tmp_path / "hf" / part / "model.safetensors"
        before = path.read_bytes()

        def change(tensors):
            tensors[name][3] += 1e-4
            return tensors

        rewrite(path.parent, change)
        kind = "encoder" if part == "vit" else "decoder"
        message = f"the {kind}'s weights in {path.parent} are not the ones"
        done = run("sample.py", "--image", parts / "images/0.png", "--out_dir", out, check=False)
        one_line_error(done, 2, message)
        done = train_parts(parts, out, *frozen, "--init_from=resume", "--max_iters=3", check=False)
        one_line_error(done, 2, message)
        path.write_bytes(before)
    write_caption(load(out, "cpu", dtype="float32"), parts)

    # as before there were hashes
    old = torch.load(out / "best.pt", weights_only=True)
    del old["source_hashes"]
    torch.save(old, tmp_path / "old.pt")
    write_caption(load(tmp_path / "old.pt", "cpu", dtype="float32"), parts)
    shutil.rmtree(tmp_path / "hf/vit")
    done = run("sample.py", "--image", parts / "images/0.png", "--out_dir", out, check=False)
    one_line_error(done, 2, f"no folder {tmp_path / 'hf/vit'}")


@pytest.mark.parametrize("more_rows", [1, 26])
def test_a_decoder_with_spare_rows(parts, tmp_path, more_rows):
    """Of a [PAD] token, or up to a multiple of 64: prepared with its tokenizer, it trains."""
    shutil.copytree(parts / "gpt2", tmp_path / "gpt2")
    tokenizer = json.loads((tmp_path / "gpt2/tokenizer.json").read_text())
    # GPT-2's own order: the special token last
    names = [name for name in tokenizer["model"]["vocab"] if name != "<|endoftext|>"]
    names = [name for name in names if name != ">>TITLE<<"]
    n = len(names)
    tokenizer["model"]["vocab"] = {name: i for i, name in enumerate([*names, "<|endoftext|>"])}
    eot, pad = (dict(tokenizer["added_tokens"][1], id=n + i) for i in range(2))
    tokenizer["added_tokens"] = [eot, dict(pad, content="[PAD]")]
    (tmp_path / "gpt2/tokenizer.json").write_text(json.dumps(tokenizer))
    small_decoder("gpt2", n + 1 + more_rows).save_pretrained(tmp_path / "gpt2")
    data = tmp_path / "data"
    run("prepare_flickr.py", "--images", parts / "images", "--captions", parts / "captions.csv",
        "--split_files", parts / "train.txt", parts / "val.txt", "--image_size", 32,
        "--tokenizer", tmp_path / "gpt2", "--out_dir", data)
    done = train_parts(parts, tmp_path / "out", f"--decoder={tmp_path / 'gpt2'}",
                       f"--data_dir={data}", "--max_iters=1", "--eval_interval=1", check=False)
    assert done.returncode == 0, done.stderr.decode()
    model = load(tmp_path / "out", "cpu", dtype="float32").model
    assert model.wte.weight.shape == (n + 1, 32)
    # a tokenizer of our own is still not the decoder's
    run("prepare_flickr.py", "--images", parts / "images", "--captions", parts / "captions.csv",
        "--split_files", parts / "train.txt", parts / "val.txt", "--image_size", 32,
        "--vocab_size", n + 1, "--out_dir", tmp_path / "bpe")
    done = train_parts(parts, tmp_path / "bpe-out", f"--decoder={tmp_path / 'gpt2'}",
                       f"--data_dir={tmp_path / 'bpe'}", check=False)
    one_line_error(done, 2, "prepare the data with --tokenizer")


@pytest.mark.parametrize("config, encoder, data", [
    ("gpt2_vit", "vit", "data"),
    ("gpt2_clip", "clip", "data"),
    ("falcon_lora", "clip", "data-falcon"),
])
def test_configs_of_pretrained_parts_train(parts, tmp_path, config, encoder, data):
    decoder = config.split("_")[0]
    out = tmp_path / "out"
    config = HERE / "config" / f"{config}.py"
    run("train.py", config, f"--encoder={parts / encoder}", f"--decoder={parts / decoder}",
        f"--out_dir={out}", f"--data_dir={parts / data}", "--image_size=32", "--batch_size=8",
        "--max_iters=3", "--warmup_iters=1", "--log_interval=1", "--eval_interval=3",
        "--eval_images=4", "--device=cpu")
    log = read_log(out)
    steps = [record for record in log if "loss" in record]
    assert len(steps) == 3
    for line in steps:
        assert line["loss"] > 0 and line["grad_norm"] > 0
    assert log[-1]["eval"]["student"]["loss"] < 20
    saved = torch.load(out / "best.pt", weights_only=True)["model"]
    options = Options(**read_config_file(config))
    assert any(name.startswith("encoder.blocks.") for name in saved) != options.freeze_encoder
    assert ("blocks.0.attention.qkv.A" in saved) == (options.lora_rank > 0)
    assert ("blocks.0.attention.qkv.weight" in saved) == (options.lora_rank == 0)
    write_caption(load(out, "cpu", dtype="float32"), parts)


def test_the_first_loss_is_the_language_models_own(parts, tmp_path, monkeypatch):
    """New cross-attention adds nothing at first: without training, the loss is GPT-2's."""
    train_parts(parts, tmp_path / "out", "--learning_rate=0", "--max_iters=1", "--eval_interval=1")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(parts / "gpt2").eval()
    data = Dataset(parts / "data")
    ids = data.token_ids
    total = 0.0
    count = 0
    for captions in data.split("val").captions:
        for text in captions:
            targets = [*data.tokenizer.encode_ordinary(text), data.tokenizer.eot_token]
            tokens = [ids[-1], *(ids[n] for n in targets[:-1])]
            with torch.no_grad():
                logits = theirs(torch.tensor([tokens])).logits[0][:, ids]
            total += F.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
            count += len(targets)
    loss = read_log(tmp_path / "out")[-1]["eval"]["student"]["loss"]
    assert loss == pytest.approx(total / count, rel=1e-4)
    # a checkpoint of tuned parts needs nothing else
    saved = torch.load(tmp_path / "out" / "best.pt", weights_only=True)["model"]
    assert "encoder.blocks.0.mlp.fc.weight" in saved
    monkeypatch.delattr(pretrained, "fetch_model")
    write_caption(load(tmp_path / "out", "cpu", dtype="float32"), parts)


@pytest.mark.parametrize("changed, message", [
    (["--encoder=no/where/at/all"], "neither a folder nor a name on the hub"),
    (["--encoder=dev/none"], "neither a folder"),
    (["--n_embd=64"], "--decoder fixes it at 32"),
    (["--image_size=30"], "image_size 30 is not a multiple of patch_size"),
    (["--lr_scale=encoder"], "PATTERN=FACTOR"),
    (["--decoder=", "--lora_rank=2"], "lora_rank needs a pretrained decoder"),
    (["--lora_rank=2", "--lora_targets=nothing"], "matches no linear layer"),
    (["--lr_scale=encodr=0.1"], "matches no trainable"),
    (["--lora_rank=2", "--lora_targets=("], "is not a regular expression"),
    (["--encoder=", "--freeze_encoder"], "freeze_encoder needs a pretrained encoder"),
])
def test_mistakes_are_one_line(parts, tmp_path, changed, message):
    done = train_parts(parts, tmp_path / "out", *changed, check=False)
    one_line_error(done, 2, message)


# -----------------------------------------------------------------------------
# downloads

def test_download_from_a_hub(parts, mirror, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(download, "HUB", mirror.url)
    monkeypatch.setattr(download, "WEIGHTS", str(tmp_path / "weights"))
    folder = "/someone/small-vit/resolve/main/"
    mirror.files = {folder + file.name: file.read_bytes() for file in (parts / "vit").iterdir()}
    # config.json, preprocessor_config.json, model.safetensors
    mirror.script[:] = ["redirect", "ok", "404", "drop", "redirect"]
    images = torch.randn(1, 3, 32, 32)
    expected = captioner(parts / "vit").encoder(images)
    assert torch.equal(captioner("someone/small-vit").encoder(images), expected)
    n_requests = len(mirror.seen)
    assert torch.equal(captioner("someone/small-vit").encoder(images), expected)
    assert len(mirror.seen) == n_requests  # everything is kept
    with pytest.raises(UserError, match="no model someone/else on the hub"):
        captioner("someone/else")
    mirror.script[:] = ["401"]
    with pytest.raises(OSError, match="401.*HF_TOKEN"):
        captioner("someone/gated")
    path = parts / "gpt2" / "tokenizer.json"
    mirror.files["/someone/gpt/resolve/main/tokenizer.json"] = path.read_bytes()
    assert read_tokenizer("someone/gpt") == read_hub_tokenizer(path)


def older_files(path, folder):
    """Writes vocab.json and merges.txt with what tokenizer.json has."""
    model = json.loads(path.read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def test_vocab_and_merges_are_a_tokenizer(parts, mirror, tmp_path, monkeypatch):  # noqa: F811
    hub_tokenizer(tmp_path, "gpt2")
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"].pop(">>TITLE<<")
    data["added_tokens"] = data["added_tokens"][1:]
    path.write_text(json.dumps(data))
    expected = read_tokenizer(str(tmp_path))
    older_files(path, tmp_path)
    path.unlink()
    try:
        found = read_tokenizer(str(tmp_path))
    except UserError as error:
        found = str(error)
    assert found == expected
    # on a mirror of the hub, which HF_ENDPOINT names
    for name in ("vocab.json", "merges.txt"):
        mirror.files[f"/someone/old-gpt/resolve/main/{name}"] = (tmp_path / name).read_bytes()
    code = ("import sys; from nanocaption import download, tokenizer; "
            "download.WEIGHTS = sys.argv[1]; print(tokenizer.read_tokenizer('someone/old-gpt'))")
    environment = {**os.environ, "HF_ENDPOINT": f"{mirror.url}/", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "weights"], cwd=HERE, text=True,
                          capture_output=True, timeout=120, env=environment)
    assert done.stdout == f"{expected}\n", done.stderr
    # CLIP's words end in </w>
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "dog</w>": 5000}))
    with pytest.raises(UserError, match="words end in </w>"):
        read_tokenizer(str(tmp_path))


# -----------------------------------------------------------------------------
# files

def test_safetensors_is_read_as_its_own_package_reads_it(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b.c": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(2, 2).half(),
        "scalar": torch.tensor(3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "yes": torch.tensor([True, False]),
    }
    path = tmp_path / "x.safetensors"
    safetensors.save_file(tensors, path, metadata={"format": "pt"})
    ours = read_safetensors(path)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    # a private copy: the file stays as it is
    ours["a"].zero_()
    assert torch.equal(read_safetensors(path)["a"], tensors["a"])


def header(entries, data=b"\0" * 16, length=None):
    """The bytes of a .safetensors file."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


F32 = dict(dtype="F32", shape=[2], data_offsets=[0, 8])


@pytest.mark.parametrize("data, message", [
    (b"abc", "header of"),
    (header({"a": F32}, length=10**12), "header of 1,000,000,000,000 bytes"),
    (header(b"{nope"), "header is not JSON"),
    (header([]), "header is not a JSON object"),
    (header({"a": {**F32, "dtype": "F99"}}), "unsupported dtype 'F99'"),
    (header({"a": {**F32, "data_offsets": [0, 12]}}), "12 bytes for"),
    (header({"a": {**F32, "data_offsets": [-8, 0]}}), "offsets"),
    (header({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}),
     "b begins at 4, but the data before it ends at 8"),
    (header({"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, b"\0" * 12),
     "b ends at 16, but the data ends at 12"),
    (header({"a": F32}), "8 bytes after"),
    (header({"a": {"dtype": "F32", "shape": [2]}}), "lacks"),
    (header({"a": {**F32, "shape": [True, 2]}}), "shape"),
    (header({"a": {**F32, "shape": [2**40, 2**40]}}), "bytes for"),
])
def test_a_damaged_safetensors_is_one_line(tmp_path, data, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_safetensors(path)
    assert "\n" not in str(error.value)
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U32"])
def test_an_unsupported_dtype_is_not_damage(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"a": dict(dtype=dtype, shape=[8], data_offsets=[0, 8])}, b"\0" * 8))
    with pytest.raises(UserError, match=f"x.safetensors: a has the unsupported dtype '{dtype}'"):
        read_safetensors(path)


def test_weights_of_whole_numbers_are_refused(tmp_path):
    small_encoder("vit").save_pretrained(tmp_path)
    name = "vit.layernorm.weight"
    rewrite(tmp_path, lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    assert "norm.weight has the unsupported dtype torch.int8" in refused(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "x.bin"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    for read in (read_safetensors, read_pickle, read_checkpoint, read_hub_tokenizer):
        with pytest.raises(UserError, match="x.bin is only a git-lfs pointer"):
            read(path)


@pytest.mark.parametrize("change, message", [
    ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
    ({"num_hidden_layers": "two"}, "config.json gives 'two' for n_layer_encoder"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu', but only 'gelu' is supported"),
    ({"model_type": "gpt2"}, "a model of type 'gpt2' is not supported"),
    ({"model_type": None}, "a model of type None"),
])
def test_a_config_that_does_not_fit_is_one_line(tmp_path, change, message):
    config = dict(SMALL, model_type="vit", patch_size=8)
    config.update(change)
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        part_options(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*config.json"):
        part_options(str(tmp_path))


def test_shards_and_pickles(tmp_path):
    theirs = small_encoder("vit")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    theirs.save_pretrained(tmp_path / "one")
    images = torch.randn(1, 3, 32, 32)
    expected = captioner(tmp_path / "one").encoder(images)
    torch.testing.assert_close(captioner(tmp_path / "shards").encoder(images), expected)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../one/model.safetensors"}}))
    with pytest.raises(UserError, match="is not a file name"):
        read_index(index)

    folder = tmp_path / "pickle"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    tensors = safetensors.load_file(tmp_path / "one" / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.testing.assert_close(captioner(folder).encoder(images), expected)

    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="as weights"):
        captioner(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no complete model.safetensors or pytorch_model.bin"):
        captioner(folder)


@pytest.mark.parametrize("name, tensor, message", [
    ("vit.layernorm.weight", None, "lack layernorm.weight"),
    ("vit.encoder.layer.9.x", torch.zeros(1), "1 unexpected tensors.*encoder.layer.9.x"),
    ("vit.layernorm.bias", torch.zeros(3), r"norm.bias has shape \(3,\), expected \(32,\)"),
])
def test_weights_that_do_not_fit_are_one_line(tmp_path, name, tensor, message):
    small_encoder("vit").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.load_file(path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    safetensors.save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        captioner(tmp_path)
