"""A frozen encoder encodes each view once: stored features equal computed ones."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from checkpoint import load
from helpers import (one_line_error, random_images, read_log, run, start, tiny_dataset, torchrun,
                     write_config)
from nanocaption import features
from nanocaption.cli import UserError
from nanocaption.features import CHUNK, Features, compute_features
from nanocaption.generate import caption_images
from nanocaption.views import make_view, pick_views
from train import Options

EYE = dict(encoder="efficientnet_lite0", freeze_encoder=True, image_size=64, views=4, flip=True,
           crop=0.6, jitter=0.0, local_conv=False, unigram=0.0, n_layer_encoder=1, dropout=0.1,
           max_iters=6, eval_interval=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset(folder, image_size=64)
    return folder


def features_folders(data):
    return sorted(path for path in data.iterdir() if path.name.startswith("features-"))


def losses(out_dir):
    return [record["loss"] for record in read_log(out_dir) if "loss" in record]


def test_stored_features_train_like_computed_ones(data, tmp_path):
    start(data, tmp_path / "stored", options=EYE)
    assert len(features_folders(data)) == 2  # of train, with its views, and of val
    start(data, tmp_path / "computed", "--cache_features=False", options=EYE)
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "computed"), rel=1e-3)
    evals = [read_log(tmp_path / run)[-1]["eval"]["student"] for run in ("stored", "computed")]
    assert evals[0]["loss"] == pytest.approx(evals[1]["loss"], rel=1e-3)
    # only what is ours is trained and saved; the checkpoint names the rest
    last = torch.load(tmp_path / "stored/last.pt", weights_only=True)
    assert not [name for name in last["model"] if "network" in name or "stem.last" in name]
    captioner = load(tmp_path / "stored", "cpu", "float32")
    assert "encoder.network.stem.weight" in captioner.model.state_dict()


def test_one_step_changes_what_is_ours_and_nothing_else(data, tmp_path):
    options = {**EYE, "max_iters": 1, "n_query": 2, "warmup_iters": 0}
    start(data, tmp_path / "one", "--learning_rate=0", options=options)
    start(data, tmp_path / "two", "--learning_rate=0.01", options=options)
    before = load(tmp_path / "one/last.pt", "cpu", "float32").model
    after = load(tmp_path / "two/last.pt", "cpu", "float32").model
    unchanged = []
    for (name, a), b in zip(before.named_parameters(), after.parameters()):
        if torch.equal(a, b):
            unchanged.append(name)
    assert "encoder.network.stem.weight" in unchanged
    # position embeddings beyond the longest caption and unused words have no gradient, but decay
    ours = [name for name in unchanged if "network" not in name and "stem.last" not in name]
    assert not ours


def test_last_blocks_are_tuned_on_stored_features(data, tmp_path):
    options = {**EYE, "tune_blocks": 2}
    start(data, tmp_path / "stored", options=options)
    start(data, tmp_path / "computed", "--cache_features=False", options=options)
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "computed"), rel=1e-3)
    # what is tuned is saved, and nothing else of the network
    last = torch.load(tmp_path / "stored/last.pt", weights_only=True)["model"]
    tuned = [name for name in last if "network" in name or "stem.last" in name]
    assert len(tuned) == 2 * 4 + 2
    start(data, tmp_path / "frozen", options=EYE)
    frozen = load(tmp_path / "frozen", "cpu", "float32").model.state_dict()
    for name in tuned:
        assert not torch.equal(last[name], frozen[name]), name
    # loaded from the checkpoint and the package, it equals the published one, which holds all
    run("dev/publish.py", tmp_path / "stored", tmp_path / "whole.pt")
    images = random_images(3, 64).numpy()
    texts = []
    for path in (tmp_path / "stored", tmp_path / "whole.pt"):
        texts.append(caption_images(load(path, "cpu", "float32"), images))
    assert [c[0]["text"] for c in texts[0]] == [c[0]["text"] for c in texts[1]]


def test_resume_is_exact_on_features(data, tmp_path):
    start(data, tmp_path / "whole", options=EYE)
    start(data, tmp_path / "parts", "--max_iters=3", options=EYE)
    start(data, tmp_path / "parts", "--init_from=resume", options=EYE)
    # the learning rate's schedule differs, so compare where it does not: data and draws
    epochs = [[r["epoch"] for r in read_log(tmp_path / run) if "epoch" in r]
              for run in ("whole", "parts")]
    assert epochs[0] == epochs[1]


def test_interrupted_damaged_and_stale_features(tmp_path):
    calls = []

    def make_views(index):
        calls.append(len(index))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.stack([np.full((2, 3, 4), i + 1, np.float16) for i in index])

    shape = (2 * CHUNK + 5, 2, 3, 4)
    features = Features(str(tmp_path / "features"), "train", shape)
    with pytest.raises(KeyboardInterrupt):
        compute_features(features, make_views, "test images")
    assert features.missing() == [1, 2]
    compute_features(features, make_views, "test images")
    assert features.missing() == [] and calls == [CHUNK, CHUNK, CHUNK, 5]
    index = [0, 40, 68]
    assert (features.read(index, [0, 1, 0])[:, 0, 0] == np.array(index) + 1).all()
    # flip a bit of the last chunk
    with open(features.path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert features.missing() == [2]
    compute_features(features, make_views, "test images")
    assert features.missing() == [] and calls[-1] == 5
    # a file that was cut is not used
    os.truncate(features.path, 100)
    assert features.missing() == [0, 1, 2]


def test_other_weights_views_or_sizes_are_other_features(data, tmp_path):
    start(data, tmp_path / "out", "--max_iters=1", options=EYE)
    before = len(features_folders(data))
    for change in (dict(image_size=32), dict(views=3), dict(seed=1),
                   dict(encoder="efficientnet_lite1")):
        start(data, tmp_path / "out", "--force", "--max_iters=1", options={**EYE, **change})
        found = len(features_folders(data))
        assert found > before, change
        before = found
    start(data, tmp_path / "out", "--force", "--max_iters=1", "--dropout=0.3", options=EYE)
    assert len(features_folders(data)) == before


def test_two_ranks_share_the_work(tmp_path):
    tiny_dataset(tmp_path / "data", image_size=64)
    tiny_dataset(tmp_path / "other", image_size=64)
    options = {**EYE, "max_iters": 1}
    start(tmp_path / "other", tmp_path / "one", options=options)
    config = write_config(tmp_path / "two.py", {**options, "device": "cpu", "batch_size": 8,
                                                "n_embd": 32, "n_head": 2, "block_size": 24,
                                                "n_layer_decoder": 2, "dtype": "float32"})
    torchrun("train.py", config, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'two'}")
    ours = [folder.name for folder in features_folders(tmp_path / "data")]
    assert ours == [folder.name for folder in features_folders(tmp_path / "other")]
    for folder in ours:
        for path in (tmp_path / "data" / folder).iterdir():
            assert path.read_bytes() == (tmp_path / "other" / folder / path.name).read_bytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_if_the_disk_is_too_small(tmp_path, monkeypatch, rank):
    stored = Features(tmp_path / "features", "train", (10**7, 1, 81, 352))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    monkeypatch.setattr(features, "gather", lambda value, world: [value] * world)
    with pytest.raises(UserError if rank == 0 else SystemExit) as stopped:
        compute_features(stored, None, "these images", rank, world=2)
    if rank == 0:
        assert "need 570.2 GB" in str(stopped.value) and "only 1.0 GB is free" in str(stopped.value)
    else:
        assert stopped.value.code == 2


def test_views():
    options = Options(flip=True, crop=0.5, views=4)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    may_flip = np.array([True, False])
    index = np.array([3, 7])
    assert torch.equal(make_view(images, index, 0, may_flip, options), images)
    mirrored = make_view(images, index, 1, may_flip, options)
    assert torch.equal(mirrored[0], images[0].flip(1)) and torch.equal(mirrored[1], images[1])
    crops = [make_view(images, index, view, may_flip, options) for view in (2, 3, 2)]
    assert torch.equal(crops[0], crops[2]) and not torch.equal(crops[0], crops[1])
    views = np.array([pick_views(range(50), [epoch] * 50, options) for epoch in range(40)])
    assert set(views.flatten()) == {0, 1, 2, 3}
    assert len(set(map(tuple, views))) == 40  # every epoch draws anew
    assert (pick_views([5], [3], options) == pick_views([5], [3], options)).all()


@pytest.mark.parametrize("args, parts", [
    (["--views=1"], ["at least --views=3, not 1"]),
    (["--views=2"], ["at least --views=3, not 2"]),
    (["--crop=1"], ["--views=4", "crop < 1"]),
    (["--encoder=efficientnet_lite9"], ["efficientnet_lite9"]),
    (["--tune_blocks=17"], ["tune_blocks is 17", "16 blocks"]),
    (["--tune_blocks=1", "--freeze_encoder=False"], ["tune_blocks needs --freeze_encoder"]),
])
def test_mistakes_are_one_line(data, tmp_path, args, parts):
    done = start(data, tmp_path / "out", *args, options=EYE, check=False)
    one_line_error(done, 2, *parts)


def test_a_published_checkpoint_needs_nothing_else(data, tmp_path, monkeypatch):
    start(data, tmp_path / "run", options=EYE)
    out = tmp_path / "whole.pt"
    run("dev/publish.py", tmp_path / "run", out, "--beam=2", "--length_penalty=0")
    images = random_images(3, 64).numpy()
    captioner = load(tmp_path / "run", "cpu", "float32")
    expected = caption_images(captioner, images, beam=2, length_penalty=0)
    # the weights of the encoder cannot be found any more
    monkeypatch.setattr("nanocaption.efficientnet.find_weights", None)
    found = caption_images(load(out, "cpu", "float32"), images)
    assert [c[0]["text"] for c in found] == [c[0]["text"] for c in expected]
    # fine-tuned, it stays frozen and whole
    start(data, tmp_path / "tuned", f"--init_from={out}", options=EYE)
    before = torch.load(out, weights_only=True)
    after = torch.load(tmp_path / "tuned/last.pt", weights_only=True)
    assert after["search"] == before["search"] == dict(beam=2, length_penalty=0)
    before = before["model"]
    after = after["model"]
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        frozen = name.startswith(("encoder.network.", "encoder.stem.last."))
        assert torch.equal(after[name], tensor.float()) or not frozen, name
    assert not torch.equal(after["wte.weight"], before["wte.weight"].float())
