"""Other people's architectures in our code, against transformers with the same random weights; files against safetensors."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
from bpe import keep_used, make_tokenizer, read_hub_tokenizer
from common import UserError
from conftest import HERE
from model import Captioner, pack
from prepare_flickr import load_ids, load_meta, load_tokenizer, read_records, read_tokenizer
from pretrained import LoRA, add_lora, assemble, merge_lora, part_options, read_safetensors
from sample import caption, load
from test_model import run
from test_prepare import mirror as hub  # noqa: F401, a fixture
from train import Options, read_config

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)


def scramble(model):
    """Every parameter moved, so that none may be left out."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def captioner(encoder="", decoder="", ids=None, vocab_size=300, **options):
    torch.manual_seed(1)
    fixed, _, _ = part_options(encoder, decoder)
    options = Options(**{**dict(image_size=32, patch_size=8, n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32, block_size=24,
                                encoder=encoder, decoder=decoder), **fixed, **options})
    return assemble(options, vocab_size, ids=ids).eval()


def vit_like(family):
    t = transformers
    return {"vit": lambda: t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, **SMALL)),
            "deit": lambda: t.DeiTModel(t.DeiTConfig(image_size=32, patch_size=8, **SMALL)),
            "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2,
                                                           num_attention_heads=2)),
            "clip": lambda: t.CLIPModel(t.CLIPConfig(vision_config=dict(image_size=32, patch_size=8, **SMALL),
                                                     text_config=dict(vocab_size=100, bos_token_id=0, eos_token_id=1, **SMALL)))}[family]()


def check_encoder(family, folder):
    theirs = scramble(vit_like(family))
    theirs.save_pretrained(folder)
    tower = {"vit": lambda: theirs.vit, "clip": lambda: theirs.vision_model}.get(family, lambda: theirs)()
    for size in (32, 48):  # its own, and with its positions interpolated
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = tower(images, interpolate_pos_encoding=True) if family != "dinov2" else tower(images)
            got = captioner(str(folder), image_size=size).encoder(images)
        torch.testing.assert_close(got, expected.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_parity_vit(tmp_path):
    check_encoder("vit", tmp_path)


def test_parity_deit(tmp_path):
    check_encoder("deit", tmp_path)


def test_parity_dinov2(tmp_path):
    check_encoder("dinov2", tmp_path)


def test_parity_clip(tmp_path):
    check_encoder("clip", tmp_path)


def check_decoder(theirs, folder):
    scramble(theirs).save_pretrained(folder)
    model = captioner(decoder=str(folder))
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    captions = [[[5, 7, 9, 250], [3, 1]], [[8, 8, 2]]]
    batch = pack(captions, model.eot_token, model.longest)
    with torch.no_grad():
        logits = model.hidden(model.encode(images), batch) @ model.wte.weight.T
        expected = [theirs(torch.tensor([[299, *words]])).logits[0] for row in captions for words in row]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    state = model.start(images, 1)  # and with the cache
    for t, token in enumerate([299, 5, 7, 9, 250]):
        logits = model.step(state, torch.tensor([token, token]))
        torch.testing.assert_close(logits[0], expected[0][t], rtol=1e-4, atol=1e-4)
    ids = [*range(0, 298, 3), 299]  # a third of the vocabulary
    small = captioner(decoder=str(folder), ids=ids, vocab_size=len(ids))
    batch = pack([[[1, 2, 30]]], small.eot_token, small.longest)
    with torch.no_grad():
        logits = small.hidden(small.encode(images[:1]), batch) @ small.wte.weight.T
        expected = theirs(torch.tensor([[299, 3, 6, 90]])).logits[0][:, ids]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_parity_gpt2(tmp_path):
    t = transformers
    check_decoder(t.GPT2LMHeadModel(t.GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=299,
                                                 eos_token_id=299)), tmp_path)


def test_parity_falcon(tmp_path):
    t = transformers
    check_decoder(t.FalconForCausalLM(t.FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                     multi_query=True, parallel_attn=True, new_decoder_architecture=False, bias=False,
                                                     alibi=False)), tmp_path)


# ---- LoRA

def test_lora_is_its_dense_sum():
    torch.manual_seed(0)
    base, x = nn.Linear(12, 20), torch.randn(5, 12)
    lora = LoRA(base, rank=3, alpha=6)
    torch.testing.assert_close(lora(x), base(x))  # the identity at first
    nn.init.normal_(lora.B)
    A, B = lora.A.detach().clone().requires_grad_(), lora.B.detach().clone().requires_grad_()
    dense = F.linear(x, base.weight + 6 / 3 * B @ A, base.bias)
    torch.testing.assert_close(lora(x), dense)
    for ours, true in zip(torch.autograd.grad(lora(x).square().sum(), (lora.A, lora.B)),
                          torch.autograd.grad(dense.square().sum(), (A, B))):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)
    assert not base.weight.requires_grad


def test_lora_stands_where_it_is_asked_for_and_merges():
    model = captioner()
    images, batch = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8), pack([[[1, 2, 3]]], 299, 23)
    before = model(images, batch)[1].item()
    add_lora(model, "qkv|fc", 4, 8)
    names = {name for name, module in model.named_modules() if isinstance(module, LoRA)}
    assert names == {"blocks.0.attention.qkv", "blocks.0.mlp.fc"}
    for module in model.modules():
        if isinstance(module, LoRA):
            nn.init.normal_(module.B, std=0.2)
    apart = model(images, batch)[1].item()
    merge_lora(model)
    assert abs(apart - before) > 1e-3 and model(images, batch)[1].item() == pytest.approx(apart, rel=1e-5)
    assert not any(isinstance(module, LoRA) for module in model.modules())
    with pytest.raises(UserError, match="matches no linear layer"):
        add_lora(model, "nothing", 4, 8)


# ---- memory

def test_recomputed_activations_give_the_same_gradients():
    model, batch = captioner(dropout=0.1).train(), pack([[[1, 2, 3], [4]]], 299, 23)
    images, gradients = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8), []
    for model.recompute in (False, True):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(model(images, batch)[0], list(model.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_frozen_weights_are_loaded_once_and_in_bfloat16(tmp_path):
    """A quarter of a GB of them: the most that is held on the way is a tenth more."""
    code = f"import bench, json, pathlib; print(json.dumps(bench.bench_load(pathlib.Path({str(tmp_path)!r}), 10, 1024, 300)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=HERE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 230 < found["weights_mb"] < 270
    if not Path("/proc/self/status").exists():
        pytest.skip("memory can't be read without /proc")
    assert 0.5 < found["peak / weights"] < 1.1


# ---- tokenizers

TEXTS = ["A dog runs (fast) , isn't it ?", "Two men, 12345 of 67 ... --", "café naïve 犬", "A dog runs , a dog sits .", " a  b\n\nc ''"] * 3


def hub_tokenizer(folder, falcon):
    """A small tokenizer.json, trained by the tokenizers package, with the parts that GPT-2's or Falcon's has."""
    import tokenizers as t
    p = t.pre_tokenizers
    tokenizer = t.Tokenizer(t.models.BPE())
    level = p.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = p.Sequence([p.Punctuation("contiguous"), level, p.Digits(individual_digits=False),
                                          p.Split(t.Regex("[0-9][0-9][0-9]"), "isolated")]) if falcon else level
    trainer = t.trainers.BpeTrainer(vocab_size=330, special_tokens=[">>TITLE<<", "<|endoftext|>"], initial_alphabet=p.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("falcon", [False, True])
def test_a_hub_tokenizer_and_its_used_part(tmp_path, falcon):
    theirs = hub_tokenizer(tmp_path, falcon)
    ranks, pattern, ids = read_hub_tokenizer(tmp_path / "tokenizer.json")
    ours = make_tokenizer(ranks, pattern)
    assert ids[-1] == theirs.token_to_id("<|endoftext|>") and len(ids) == ours.n_vocab
    for text in [*TEXTS, "unseen: 7 cats & 1234567 dogs!?", "x\t y", "$3.50 (a)b", "don't  stop 's"]:
        assert [ids[n] for n in ours.encode_ordinary(text)] == theirs.encode(text, add_special_tokens=False).ids, text
    kept = keep_used(ranks, pattern, TEXTS[:2])
    assert len(kept) < len(ranks)
    small = make_tokenizer([ranks[n] for n in kept], pattern)
    for text in TEXTS[:2]:
        assert [kept[n] for n in small.encode_ordinary(text)] == ours.encode_ordinary(text)
    assert all(small.decode(small.encode_ordinary(text)) == text for text in TEXTS)


# ---- training

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """
    Folders of a small ViT, CLIP, GPT-2 and Falcon, the last two with their tokenizers, and pictures prepared with Falcon's, and with
    what captions use of GPT-2's.
    """
    folder = tmp_path_factory.mktemp("parts")
    (folder / "pictures").mkdir(), (folder / "gpt2").mkdir(), (folder / "falcon").mkdir()
    for family in ("vit", "clip"):
        scramble(vit_like(family)).save_pretrained(folder / family)
    n_vocab, n_falcon = (hub_tokenizer(folder / name, name == "falcon").get_vocab_size() for name in ("gpt2", "falcon"))
    t = transformers
    scramble(t.GPT2LMHeadModel(t.GPT2Config(vocab_size=n_vocab, n_positions=96, n_embd=32, n_layer=2, n_head=2, bos_token_id=1,
                                            eos_token_id=1))).save_pretrained(folder / "gpt2")
    scramble(t.FalconForCausalLM(t.FalconConfig(vocab_size=n_falcon, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                multi_query=True, parallel_attn=True, new_decoder_architecture=False, bias=False,
                                                alibi=False))).save_pretrained(folder / "falcon")
    rng, lines = np.random.default_rng(0), ["image,caption"]
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "pictures" / f"{i}.png")
        lines += [f'{i}.png,"{TEXTS[(i + k) % 2]}"' for k in range(3)]
    (folder / "captions.csv").write_text("\n".join(lines))
    for split, ids in (("train", range(8)), ("val", range(8, 12))):
        (folder / f"{split}.txt").write_text("\n".join(f"{i}.png" for i in ids))
    for tokenizer in (["gpt2", "--keep_used", "--out_dir", folder / "data"], ["falcon", "--out_dir", folder / "data-falcon"]):
        run("prepare_flickr.py", "--images", folder / "pictures", "--captions", folder / "captions.csv", "--split_files",
            folder / "train.txt", folder / "val.txt", "--image_size", 32, "--tokenizer", folder / tokenizer[0], *tokenizer[1:])
    assert load_meta(folder / "data")["vocab_size"] < n_vocab
    return folder


def begin(folder, out, *more, **kw):
    """train.py for some steps on these parts."""
    options = dict(data_dir=folder / "data", out_dir=out, encoder=folder / "vit", decoder=folder / "gpt2", image_size=32, block_size=30,
                   batch_size=4, max_iters=6, eval_interval=3, eval_images=4, log_interval=1, warmup_iters=1, device="cpu")
    return run("train.py", *(f"--{key}={value}" for key, value in options.items()), *more, **kw)


def test_lora_on_a_frozen_encoder_is_trained_saved_resumed_and_sampled(prepared, tmp_path):
    lora = ["--freeze_encoder", "--lora_rank=2", "--lr_scale=cross=2 [AB]$=0.5", "--learning_rate=0.01", "--alpha=0.3"]
    begin(prepared, tmp_path / "whole", *lora)
    checkpoint = torch.load(tmp_path / "whole" / "best.pt", weights_only=True)
    saved = set(checkpoint["model"])
    assert "blocks.0.attention.qkv.A" in saved and "blocks.0.cross.q.weight" in saved
    assert not {name for name in saved if name.startswith(("encoder.blocks", "wte", "blocks.0.attention.qkv.base"))}
    assert os.path.getsize(tmp_path / "whole" / "best.pt") < 0.45 * sum(
        os.path.getsize(prepared / part / "model.safetensors") for part in ("gpt2", "vit"))
    assert checkpoint["model"]["blocks.0.attention.qkv.B"].abs().max() > 0
    assert len(checkpoint["tokenizer"]["ids"]) == load_meta(prepared / "data")["vocab_size"]
    captioner = load(tmp_path / "whole")
    assert not any(isinstance(module, LoRA) for module in captioner.model.modules())
    frozen = load_file(prepared / "vit" / "model.safetensors")["vit.layernorm.weight"]
    assert torch.equal(captioner.model.encoder.norm.weight, frozen)
    torch.testing.assert_close(captioner.model.mean, torch.full((3,), 0.5))  # the encoder's own normalisation
    assert isinstance(caption(captioner, str(prepared / "pictures" / "0.png")), str)
    begin(prepared, tmp_path / "half", *lora, "--dtype=bfloat16", "--recompute", "--max_iters=2")  # frozen weights in bfloat16
    # stopped after three steps and resumed
    begin(prepared, tmp_path / "again", *lora, "--max_iters=3")
    begin(prepared, tmp_path / "again", *lora, "--init_from=resume")
    done = begin(prepared, tmp_path / "again", *lora, "--init_from=resume", "--lora_rank=4", check=False)
    assert done.returncode == 2 and b"lora_rank is 4 here but 2" in done.stderr


@pytest.mark.parametrize("config, encoder, data", [("gpt2_vit", "vit", "data"), ("gpt2_clip", "clip", "data"),
                                                   ("falcon_lora", "clip", "data-falcon")])
def test_configs_of_pretrained_parts_train(prepared, tmp_path, config, encoder, data):
    decoder, out = prepared / config.split("_")[0], tmp_path / "out"
    run("train.py", HERE / "config" / f"{config}.py", f"--encoder={prepared / encoder}", f"--decoder={decoder}", f"--out_dir={out}",
        f"--data_dir={prepared / data}", "--image_size=32", "--batch_size=8", "--max_iters=3", "--warmup_iters=1", "--log_interval=1",
        "--eval_interval=3", "--eval_images=4", "--device=cpu")
    log = [json.loads(line) for line in (out / "log.jsonl").open()]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in log[:3]) and log[-1]["eval"]["student"]["loss"] < 20
    saved, options = torch.load(out / "best.pt", weights_only=True)["model"], Options(**read_config(HERE / "config" / f"{config}.py"))
    assert any(name.startswith("encoder.blocks.") for name in saved) != options.freeze_encoder
    assert ("blocks.0.attention.qkv.A" in saved) == ("blocks.0.attention.qkv.weight" not in saved) == (options.lora_rank > 0)
    assert isinstance(caption(load(out, "cpu"), str(prepared / "pictures" / "0.png")), str)


def test_the_first_loss_is_the_language_models_own(prepared, tmp_path):
    """Cross-attention starts as the identity: at learning rate 0 the captioner's loss on val is GPT-2's."""
    begin(prepared, tmp_path / "out", "--learning_rate=0", "--max_iters=1", "--eval_interval=1")
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(prepared / "gpt2").eval()
    tokenizer, ids = load_tokenizer(prepared / "data"), load_ids(prepared / "data")
    total = count = 0
    for record in read_records(prepared / "data", "val"):
        for text in record["captions"]:
            words = [*tokenizer.encode_ordinary(text), tokenizer.eot_token]
            with torch.no_grad():
                logits = theirs(torch.tensor([[ids[-1], *(ids[w] for w in words[:-1])]])).logits[0][:, ids]
            total += F.cross_entropy(logits, torch.tensor(words), reduction="sum").item()
            count += len(words)
    assert log[-1]["eval"]["student"]["loss"] == pytest.approx(total / count, rel=1e-4)
    # fully fine-tuned parts make a checkpoint that needs nothing else
    assert "encoder.blocks.0.mlp.fc.weight" in torch.load(tmp_path / "out" / "best.pt", weights_only=True)["model"]


@pytest.mark.parametrize("changed, message", [
    (["--encoder=no/where/at/all"], "neither a folder nor a name on the hub"), (["--encoder=docs/none"], "neither a folder"),
    (["--n_embd=64"], "n_embd is 32 in"),
    (["--lr_scale=encoder"], "PATTERN=FACTOR"), (["--decoder=", "--lora_rank=2"], "lora_rank is for a pretrained decoder"),
    (["--lora_rank=2", "--lora_targets=nothing"], "matches no linear layer"), (["--lr_scale=encodr=0.1"], "found in no trained"),
    (["--lora_rank=2", "--lora_targets=("], "no regular expression"), (["--encoder=", "--freeze_encoder"], "for a pretrained encoder"),
])
def test_mistakes_are_one_line(prepared, tmp_path, changed, message):
    done = begin(prepared, tmp_path / "out", *changed, check=False)
    assert done.returncode == 2 and message in done.stderr.decode() and done.stderr.count(b"\n") == 1, done.stderr


# ---- downloads

def test_download_from_a_hub(prepared, hub, tmp_path, monkeypatch):
    mirror = hub
    monkeypatch.setattr(common, "HUB", mirror.url)
    monkeypatch.setattr(common, "WEIGHTS", str(tmp_path / "weights"))
    path = "/someone/small-vit/resolve/main/"
    mirror.files = {path + file.name: file.read_bytes() for file in (prepared / "vit").iterdir()}
    mirror.script[:] = ["redirect", "ok", "404", "drop", "redirect"]  # config.json, preprocessor_config.json, model.safetensors
    images = torch.randn(1, 3, 32, 32)
    expected = captioner(str(prepared / "vit")).encoder(images)
    assert torch.equal(captioner("someone/small-vit").encoder(images), expected)
    before = len(mirror.seen)
    assert torch.equal(captioner("someone/small-vit").encoder(images), expected)
    assert len(mirror.seen) == before  # all is kept
    with pytest.raises(UserError, match="no such model on the hub"):
        captioner("someone/else")
    mirror.script[:] = ["401"]
    with pytest.raises(OSError, match="401.*HF_TOKEN"):
        captioner("someone/gated")
    vocabulary = (prepared / "gpt2" / "tokenizer.json").read_bytes()
    mirror.files["/someone/gpt/resolve/main/tokenizer.json"] = vocabulary
    assert read_tokenizer("someone/gpt") == read_hub_tokenizer(prepared / "gpt2" / "tokenizer.json")


VIT = dict(model_type="vit", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=16, image_size=224)
GPT2 = dict(model_type="gpt2", n_layer=12, n_head=12, n_embd=768, vocab_size=50257)
NAMES = {  # what the hub's config.json files say
    "google/vit-base-patch16-224-in21k": VIT, "google/vit-base-patch16-224": VIT,
    "facebook/deit-tiny-patch16-224": {**VIT, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "facebook/deit-small-patch16-224": {**VIT, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "facebook/deit-base-patch16-224": VIT,
    "facebook/dinov2-small": {**VIT, "model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "patch_size": 14,
                               "image_size": 518, "mlp_ratio": 4},
    "facebook/dinov2-base": {**VIT, "model_type": "dinov2", "patch_size": 14, "image_size": 518, "mlp_ratio": 4},
    "openai/clip-vit-base-patch32": {"model_type": "clip", "vision_config": {**VIT, "patch_size": 32}},
    "openai/clip-vit-base-patch16": {"model_type": "clip", "vision_config": VIT},
    "gpt2": GPT2, "gpt2-medium": {**GPT2, "n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {**GPT2, "n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {**GPT2, "n_layer": 48, "n_head": 25, "n_embd": 1600}, "distilgpt2": {**GPT2, "n_layer": 6},
    "tiiuae/falcon-7b": dict(model_type="falcon", num_hidden_layers=32, num_attention_heads=71, hidden_size=4544, vocab_size=65024,
                              multi_query=True, parallel_attn=True, new_decoder_architecture=False, alibi=False, bias=False),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_have_the_right_shapes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "WEIGHTS", str(tmp_path))
    config = NAMES[name]
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")  # so that nothing is downloaded
    (folder / "preprocessor_config.json").write_text("{}")
    is_decoder = config["model_type"] in ("gpt2", "falcon")
    fixed, vocab_size, _ = part_options(*(("", name) if is_decoder else (name, "")))
    image_size = config.get("vision_config", config).get("image_size", 32)
    options = Options(**{**dict(image_size=image_size, patch_size=16, stem="patch", n_layer_encoder=1, n_layer_decoder=1, n_head=2,
                                n_embd=64, block_size=1024, n_embd_encoder=64, n_head_encoder=2, cross_every=99), **fixed})
    t, kind = transformers, config["model_type"]
    with torch.device("meta"):
        model = Captioner(options, vocab_size or 300)
        theirs = {"vit": lambda: t.ViTModel(t.ViTConfig(**config), add_pooling_layer=False), "gpt2": lambda: t.GPT2Model(t.GPT2Config(**config)),
                  "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**config)), "falcon": lambda: t.FalconModel(t.FalconConfig(**config)),
                  "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**config["vision_config"]))}[kind]()
    count = sum(p.numel() for name, p in theirs.named_parameters() if not re.search("mask_token|post_layernorm", name))
    ours = sum(p.numel() for name, p in model.named_parameters()
               if (not re.match("encoder|.*cross", name) if is_decoder else name.startswith("encoder")))
    assert ours == count > 5e6


# ---- files

def test_safetensors_is_read_as_its_own_package_reads_it(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 5), "b.c": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 4), "half": torch.randn(2, 2).half(),
               "scalar": torch.tensor(3), "bytes": torch.arange(5, dtype=torch.uint8), "yes": torch.tensor([True, False])}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    ours = read_safetensors(tmp_path / "x.safetensors")
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    ours["a"].zero_()  # a private copy: the file stays as it is
    assert torch.equal(read_safetensors(tmp_path / "x.safetensors")["a"], tensors["a"])


def header(entries, data=b"\0" * 16, length=None):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


F32 = dict(dtype="F32", shape=[2], data_offsets=[0, 8])


@pytest.mark.parametrize("data, message", [
    (b"abc", "a header of"), (header({"a": F32}, length=10 ** 12), "a header of 1,000,000,000,000 bytes"), (header(b"{nope"), "no JSON"),
    (header([]), "no JSON object"), (header({"a": {**F32, "dtype": "F99"}}), "unknown dtype 'F99'"),
    (header({"a": {**F32, "data_offsets": [0, 12]}}), "12 bytes for"), (header({"a": {**F32, "data_offsets": [-8, 0]}}), "offsets"),
    (header({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}), "b begins at 4, where the tensor before it ends at 8"),
    (header({"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, b"\0" * 12), "the file is cut"), (header({"a": F32}), "8 bytes after"),
    (header({"a": {"dtype": "F32", "shape": [2]}}), "lacks"), (header({"a": {**F32, "shape": [True, 2]}}), "shape"),
    (header({"a": {**F32, "shape": [2 ** 40, 2 ** 40]}}), "bytes for"),
])
def test_a_damaged_safetensors_is_one_line(tmp_path, data, message):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_safetensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)


def test_shards_pickles_and_what_does_not_fit(tmp_path):
    theirs = scramble(vit_like("vit"))
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    theirs.save_pretrained(tmp_path / "one")
    images = torch.randn(1, 3, 32, 32)
    expected = captioner(str(tmp_path / "one")).encoder(images)
    torch.testing.assert_close(captioner(str(tmp_path / "shards")).encoder(images), expected)
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    torch.save(load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "pickle" / "pytorch_model.bin")
    torch.testing.assert_close(captioner(str(tmp_path / "pickle")).encoder(images), expected)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    for change, message in ((lambda d: d.pop("vit.layernorm.weight"), "lack layernorm.weight"),
                            (lambda d: d.update({"vit.encoder.layer.9.x": torch.zeros(1)}), "no place: encoder.layer.9.x"),
                            (lambda d: d.update({"vit.layernorm.bias": torch.zeros(3)}), r"norm.bias has the shape \(3,\), expected \(32,\)")):
        changed = dict(tensors)
        change(changed)
        save_file(changed, tmp_path / "one" / "model.safetensors")
        with pytest.raises(UserError, match=message):
            captioner(str(tmp_path / "one"))

    class Evil:
        def __reduce__(self):
            return print, ("code ran",)
    torch.save({"x": Evil()}, tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(UserError, match="can't be read as weights"):
        captioner(str(tmp_path / "pickle"))
