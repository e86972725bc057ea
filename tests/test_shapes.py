"""The drawn dataset: captions identify scenes, images show what their captions say."""
import importlib.util
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from random import Random

import numpy as np
import pytest

from helpers import HERE
from nanocaption.dataset import Dataset

SCRIPTS = HERE / "data" / "shapes"


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"shapes_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shapes = load_script("prepare")
Group = shapes.Group


def prepare(*arguments):
    command = [sys.executable, SCRIPTS / "prepare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("data") / "shapes"
    done = prepare("--out_dir", out_dir, "--num_train", 500)
    assert done.returncode == 0, done.stderr
    return out_dir


def find_objects(image):
    """The connected colored areas of an image: a list of (xs, ys, color)."""
    is_colored = np.ptp(image.astype(int), axis=2) > 60  # the background is gray
    left = set(map(tuple, np.argwhere(is_colored)))
    found = []
    while left:
        area = []
        todo = [left.pop()]
        while todo:
            y, x = todo.pop()
            area.append((y, x))
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            todo += near
        ys, xs = np.array(area).T
        found.append((xs, ys, nearest_color(np.median(image[ys, xs], axis=0))))
    return found


def nearest_color(rgb):
    distances = {name: np.abs(rgb - color).sum() for name, color in shapes.COLORS.items()}
    return min(distances, key=distances.get)


def value_pairs(scenes):
    """All pairs of values that occur together in a scene."""
    pairs = set()
    for a, relation, b in scenes:
        values = [relation]
        values += [("a", value) for value in a]
        values += [("b", value) for value in b or ()]
        pairs.update(combinations(values, 2))
    return pairs


# -----------------------------------------------------------------------------
# scenes and captions

def test_five_captions_identify_every_scene():
    alone, pairs = shapes.list_scenes()
    scenes = alone + pairs
    assert len(alone) == 3 * 2 * 4 * 4
    assert len(pairs) == 3456
    assert len(set(scenes)) == len(scenes)
    captions = [caption for scene in scenes for caption in shapes.scene_captions(scene)]
    assert len(set(captions)) == len(captions) == 5 * len(scenes)
    assert max(len(caption.split()) for caption in captions) <= 14
    crosses = Group(2, "small", "red", "cross")
    square = Group(1, "large", "blue", "square")
    assert shapes.scene_captions((crosses, "above", square)) == [
        "two small red crosses above a large blue square",
        "a large blue square below two small red crosses",
        "two small red crosses with a large blue square underneath",
        "above a large blue square there are two small red crosses",
        "at the top two small red crosses, at the bottom a large blue square",
    ]


@pytest.mark.parametrize("seed", range(5))
def test_held_out_scenes_are_made_of_known_parts(seed):
    splits = {}
    for split, (alone, pairs) in shapes.split_scenes(seed).items():
        splits[split] = alone + pairs
    alone, pairs = shapes.list_scenes()
    # each scene is in one split
    assert sorted(map(repr, sum(splits.values(), []))) == sorted(map(repr, alone + pairs))
    assert len(splits["val"]) >= 100
    assert len(splits["test"]) >= 200
    assert value_pairs(splits["train"]) == value_pairs(alone + pairs)


def test_splits_share_no_caption(data_dir):
    data = Dataset(data_dir)
    captions = {}
    for split in ("train", "val", "test"):
        captions[split] = set(sum(data.split(split).captions, []))
    assert not any(captions[a] & captions[b] for a, b in combinations(captions, 2))
    n_images = {split: n["images"] for split, n in data.splits.items()}
    assert n_images == {"train": 500, "val": 296, "test": 592}
    assert data.split("train").names[12] == "train_00012.png"
    assert all(len(texts) == 5 for texts in data.split("test").captions)


# -----------------------------------------------------------------------------
# the command

def test_same_arguments_same_bytes(data_dir, tmp_path):
    again = tmp_path / "again"
    assert prepare("--out_dir", again, "--num_train", 500).returncode == 0
    expected = {path.name: path.read_bytes() for path in data_dir.iterdir()}
    assert {path.name: path.read_bytes() for path in again.iterdir()} == expected
    before = {path.name: path.stat().st_mtime_ns for path in again.iterdir()}
    done = prepare("--out_dir", again, "--num_train", 500)
    assert done.returncode == 0
    assert "is up to date" in done.stdout
    refused = prepare("--out_dir", again, "--num_train", 500, "--seed", 1)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--out_dir" in refused.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in again.iterdir()}


@pytest.mark.parametrize("name, value", [("image_size", 16), ("num_train", 0), ("num_trian", 10)])
def test_wrong_arguments_are_one_line(name, value, tmp_path):
    done = prepare("--out_dir", tmp_path / "x", f"--{name}", value)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
    assert not (tmp_path / "x").exists()


# -----------------------------------------------------------------------------
# images

def test_images_show_their_captions(data_dir):
    """From the pixels alone: number, color and size of the objects, and the relation of all."""
    scenes = {}
    for kind in shapes.list_scenes():
        for scene in kind:
            scenes[shapes.scene_captions(scene)[0]] = scene
    test = Dataset(data_dir).split("test")
    for image, captions in zip(test.read_images(range(len(test))), test.captions):
        a, relation, b = scenes[captions[0]]
        groups = {group.color: group for group in (a, b) if group}
        found = find_objects(image)
        counts = {color: group.n for color, group in groups.items()}
        assert Counter(color for _, _, color in found) == counts, captions
        for xs, _, color in found:
            width = np.ptp(xs) + 1
            assert (width <= 15) == (groups[color].size == "small"), captions
            assert (width >= 18) == (groups[color].size == "large"), captions
        if b:
            axis = ("left of", "above").index(relation)
            end_of_a = max(places[axis].max() for places in found if places[2] == a.color)
            start_of_b = min(places[axis].min() for places in found if places[2] == b.color)
            assert end_of_a < start_of_b, captions


def test_shapes_differ_in_middle_and_corners():
    # (is the middle filled?, filled corners at the top, at the bottom)
    kinds = {
        (False, 0, 0): "ring",
        (True, 2, 2): "square",
        (True, 0, 2): "triangle",
        (True, 0, 0): "cross",
    }
    for size, color, shape, n in product(shapes.SIZES, shapes.COLORS, shapes.SHAPES, range(5)):
        scene = (Group(1, size, color, shape), "alone", None)
        [(xs, ys, _)] = find_objects(shapes.draw_scene(scene, 128, Random(n)))
        filled = np.zeros((128, 128), bool)
        filled[ys, xs] = True
        box = filled[ys.min():ys.max() + 1, xs.min():xs.max() + 1]
        middle = box[box.shape[0] // 2, box.shape[1] // 2]
        # corners of 2 x 2 pixels, for edges are smooth
        top = int(box[:2, :2].any()) + int(box[:2, -2:].any())
        bottom = int(box[-2:, :2].any()) + int(box[-2:, -2:].any())
        assert kinds[bool(middle), top, bottom] == shape, (size, color, shape, n)


def test_images_of_a_scene_differ():
    scene = (Group(1, "small", "red", "cross"), "alone", None)
    images = {shapes.draw_scene(scene, 64, Random(n)).tobytes() for n in range(20)}
    assert len(images) == 20


def test_derangement():
    derange = load_script("exact_match").derange
    scenes = [[f"scene {i // 3}"] for i in range(31)]
    other = derange(scenes, 0)
    assert sorted(other) == list(range(31))
    assert all(scenes[i] != scenes[j] for i, j in enumerate(other))
    assert list(derange(scenes, 0)) == list(other)
    assert list(derange(scenes, 1)) != list(other)
    with pytest.raises(ValueError, match="cannot be shuffled"):
        derange([["same"]] * 4, 0)
