"""Checkpoints: older ones, damaged ones, those of other programs."""
import time

import pytest
import torch

from checkpoint import VERSION, load, read_checkpoint
from helpers import HERE, one_line_error, random_images, run
from nanocaption.cli import UserError
from nanocaption.generate import caption_images


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


@pytest.mark.parametrize("options", [dict(stem="conv"), dict(beta1=0.8), dict(cross_every=2)])
def test_version_1_with_a_dropped_option_is_refused(trained, tmp_path, options):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save(as_version_1(checkpoint, **options), tmp_path / "old.pt")
    [(name, value)] = options.items()
    with pytest.raises(UserError, match=f"{name}={value!r}, which is no longer an option"):
        load(tmp_path / "old.pt")


def test_the_bundled_checkpoint_loads():
    captioner = load(HERE / "out/flickr8k", "cpu")
    [[found]] = caption_images(captioner, random_images(1, 64).numpy())
    assert len(found["text"].split()) > 3


def test_other_versions_are_refused(trained, tmp_path):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save(dict(checkpoint, version=VERSION + 1), tmp_path / "new.pt")
    with pytest.raises(UserError, match=f"version {VERSION + 1}; this code reads {VERSION}"):
        read_checkpoint(tmp_path / "new.pt")


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    del checkpoint["model"]["norm.weight"]
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(UserError, match="do not fit its options: norm.weight"):
        load(tmp_path / "x.pt")


def test_checkpoints_with_code_are_refused(tmp_path):
    torch.save(dict(model=time.sleep), tmp_path / "evil.pt")
    done = run("sample.py", "--image", "a.jpg", "--out_dir", tmp_path / "evil.pt", check=False)
    one_line_error(done, 2, "evil.pt")
