"""Tests of nanocaption/dataset.py: writing and reading a prepared folder."""
import numpy as np
import pytest

from nanocaption.cli import UserError
from nanocaption.dataset import Dataset, dataset_files, write_dataset
from nanocaption.images import load_image
from test_images import as_bytes, random_image


def write_small(folder):
    """A prepared folder of three images; returns the images and meta.json's dict."""
    images = [load_image(as_bytes(random_image(n)), 8) for n in range(3)]
    splits = {
        "train": (["a", "b"], [["one dog", "two dogs"], ["three"]], iter(images[:2])),
        "val": (["c"], [["four"]], images[2:]),
    }
    meta = write_dataset(folder, splits, 8, vocab_size=300, source={"made": "here"})
    return images, meta


def test_write_dataset(tmp_path):
    images, meta = write_small(tmp_path)
    dataset = Dataset(tmp_path)
    assert dataset.meta == meta
    assert meta["source"] == {"made": "here"}
    assert dataset.splits["train"]["captions"] == 3
    assert (dataset.image_size, dataset.vocab_size) == (8, dataset.tokenizer.n_vocab)
    assert dataset.token_ids is None
    assert np.array_equal(dataset.split("train").read_images(range(2)), images[:2])
    val = dataset.split("val")
    assert (val.names, val.captions) == (["c"], [["four"]])
    written = {path.name for path in tmp_path.iterdir()}
    assert written < {path.rsplit("/", 1)[-1] for path in dataset_files(tmp_path)}


def test_images_and_tokens_in_any_order(tmp_path):
    images, _ = write_small(tmp_path)
    dataset = Dataset(tmp_path)
    train = dataset.split("train")
    assert len(train) == 2
    found = train.read_images([1, 0, 1])
    assert type(found) is np.ndarray and found.dtype == np.uint8
    assert np.array_equal(found, [images[1], images[0], images[1]])
    assert train.read_images([]).shape == (0, 8, 8, 3)
    captions = []
    for tokens in train.read_tokens([1, 0]):
        captions.append([dataset.tokenizer.decode(ids) for ids in tokens])
    assert captions == [["three"], ["one dog", "two dogs"]]


def test_wrong_images_are_refused(tmp_path):
    write_small(tmp_path)
    wrong = np.zeros((8, 9, 3), np.uint8)
    with pytest.raises(ValueError, match="expected uint8"):
        write_dataset(tmp_path, {"train": (["a"], [["x"]], [wrong])}, 8)
    # the earlier data are gone
    with pytest.raises(UserError, match="no meta.json"):
        Dataset(tmp_path)
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="1 names, 1 lists of captions, 2 images"):
        write_dataset(tmp_path, {"train": (["a"], [["x"]], [image, image])}, 8)
    with pytest.raises(UserError, match="the train split is empty"):
        write_dataset(tmp_path, {"val": (["a"], [["x"]], [image])}, 8)


def test_a_folder_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match="not a prepared folder"):
        Dataset(tmp_path / "none")
    image = np.zeros((8, 8, 3), np.uint8)
    write_dataset(tmp_path, {"train": (["a"], [["x y"]], [image])}, 8)
    dataset = Dataset(tmp_path)
    with pytest.raises(UserError, match="no split 'val'; it has train"):
        dataset.split("val")
    (tmp_path / "train_images.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="train_images.bin is damaged"):
        dataset.split("train")
    (tmp_path / "tokenizer.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match="tokenizer.tiktoken is damaged"):
        dataset.tokenizer
    (tmp_path / "meta.json").write_text('{"version": 0}')
    with pytest.raises(UserError, match="has version 0, expected 1"):
        Dataset(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Dataset(tmp_path)
