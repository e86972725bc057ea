"""Checkpoints: older ones, damaged ones, those of other programs."""
import re
import time
from dataclasses import asdict

import pytest
import torch

from checkpoint import VERSION, load, read_checkpoint, upgrade_weights
from helpers import HERE, TINY, one_line_error, random_images, run, start
from nanocaption.cli import UserError
from nanocaption.generate import caption_images
from pretrained import build_captioner
from train import Options


def as_version_1(checkpoint, **options):
    """What version 1 of the format would have saved."""
    weights = {}
    for name, tensor in checkpoint["model"].items():
        weights[name.replace("encoder.local_convs", "encoder.neighbours")] = tensor
    old = dict(checkpoint["options"], stem="patch", cross_every=1, beta1=0.9, beta2=0.98,
               min_lr=0.0, lora_alpha=16.0, lora_dropout=0.0)
    old["local"] = old.pop("local_conv")
    return dict(checkpoint, version=1, model=weights, options={**old, **options})


def test_version_1_gives_the_same_captions(trained, tmp_path):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save(as_version_1(checkpoint), tmp_path / "old.pt")
    images = random_images(4, 20).numpy()
    expected = caption_images(load(trained, "cpu", "float32"), images)
    assert caption_images(load(tmp_path / "old.pt", "cpu", "float32"), images) == expected


# their version 1 had other names, {new: old}, and lacked some weights, which are zeros now
VERSION_1_NAMES = {
    "encoder.stem.patches.": "encoder.stem.",
    "encoder.stem.norm.": "encoder.norm_first.",
    "encoder.stem.class_tokens": "encoder.class_tokens",
    "encoder.stem.positions": "encoder.positions",
}
LACKED = {
    "clip": r"encoder\.stem\.patches\.bias",
    "falcon": r"wpe\.weight|blocks\.\d\.(attention|mlp)\.\w+\.bias",
}


@pytest.mark.parametrize("part", ["vit", "deit", "dinov2", "clip", "gpt2", "falcon"])
def test_version_1_of_a_pretrained_part(part):
    kind = "decoder_family" if part in ("gpt2", "falcon") else "encoder_family"
    options = Options(**TINY, **{kind: part})
    model = build_captioner(options, 50)
    expected = {}
    weights = {}
    for name, tensor in model.state_dict().items():
        expected[name] = torch.randn_like(tensor)
        if re.fullmatch(LACKED.get(part, "none"), name):
            expected[name] = torch.zeros_like(tensor)
            continue
        old_name = name
        for new, old in VERSION_1_NAMES.items():
            old_name = old_name.replace(new, old)
        weights[old_name] = expected[name]
    if part == "dinov2":
        for scale, layer in (("scale1", "attention.proj"), ("scale2", "mlp.proj")):
            weights[f"encoder.blocks.0.{scale}"] = torch.full((32,), 2.0)
            for name in (f"encoder.blocks.0.{layer}.weight", f"encoder.blocks.0.{layer}.bias"):
                weights[name] = expected[name] / 2
    upgraded = upgrade_weights(weights, asdict(options))
    assert upgraded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(upgraded[name], tensor), name


def test_version_1_is_fine_tuned_but_not_resumed(data, trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    torch.save(as_version_1(checkpoint), out / "last.pt")
    done = start(data, out, "--init_from=resume", check=False)
    one_line_error(done, 2, "last.pt cannot be resumed", "--init_from=")
    start(data, tmp_path / "tuned", f"--init_from={out}", "--learning_rate=0", "--max_iters=1")
    tuned = torch.load(tmp_path / "tuned/last.pt", weights_only=True)
    assert tuned["version"] == VERSION
    for name, tensor in checkpoint["model"].items():
        assert torch.equal(tuned["model"][name], tensor), name


@pytest.mark.parametrize("damage", [
    dict(model=["not a dict"]),
    dict(options=["not a dict"]),
])
def test_a_damaged_version_1_is_refused(trained, tmp_path, damage):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save(dict(as_version_1(checkpoint), **damage), tmp_path / "old.pt")
    with pytest.raises(UserError, match="old.pt is damaged"):
        read_checkpoint(tmp_path / "old.pt")


def test_other_files_are_no_checkpoints(trained, tmp_path):
    (tmp_path / "readme.pt").write_text("# nanoCaption")
    (tmp_path / "half.pt").write_bytes((trained / "best.pt").read_bytes()[:5000])
    for name in ("readme.pt", "half.pt"):
        with pytest.raises(UserError, match=f"{name} is not a checkpoint or is damaged .*Error"):
            read_checkpoint(tmp_path / name)


def test_wrong_search_options_are_one_line(trained, tmp_path):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save(dict(checkpoint, search=dict(beams=3)), tmp_path / "best.pt")
    with pytest.raises(UserError, match="best.pt is damaged .*beams"):
        load(tmp_path / "best.pt", "cpu", "float32")


@pytest.mark.parametrize("options", [dict(stem="conv"), dict(beta1=0.8), dict(cross_every=2)])
def test_version_1_with_a_dropped_option_is_refused(trained, tmp_path, options):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save(as_version_1(checkpoint, **options), tmp_path / "old.pt")
    [(name, value)] = options.items()
    with pytest.raises(UserError, match=f"{name}={value!r}, which is no longer an option"):
        load(tmp_path / "old.pt")


def test_a_checkpoint_is_not_mapped(trained, tmp_path):
    """Windows cannot replace a mapped file. Tensors of a mapped one would change with it."""
    path = tmp_path / "last.pt"
    path.write_bytes((trained / "last.pt").read_bytes())
    checkpoint = read_checkpoint(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    expected = torch.load(trained / "last.pt", weights_only=True)
    for name in ("model", "teacher"):
        for key, tensor in expected[name].items():
            assert torch.equal(checkpoint[name][key], tensor), key


def test_the_bundled_checkpoint_loads():
    captioner = load(HERE / "out/flickr8k", "cpu")
    [[found]] = caption_images(captioner, random_images(1, 64).numpy())
    assert len(found["text"].split()) > 3


def test_other_versions_are_refused(trained, tmp_path):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save(dict(checkpoint, version=VERSION + 1), tmp_path / "new.pt")
    with pytest.raises(UserError, match=f"version {VERSION + 1}; this code reads up to {VERSION}"):
        read_checkpoint(tmp_path / "new.pt")


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    del checkpoint["model"]["norm.weight"]
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(UserError, match="do not fit its options: norm.weight"):
        load(tmp_path / "x.pt")


def test_checkpoints_with_code_are_refused(tmp_path):
    torch.save(dict(model=time.sleep), tmp_path / "evil.pt")
    photo = HERE / "assets" / "photos" / "cat.jpg"
    done = run("sample.py", "--image", photo, "--out_dir", tmp_path / "evil.pt", check=False)
    one_line_error(done, 2, "evil.pt")
