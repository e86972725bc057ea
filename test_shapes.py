"""The drawn data set: captions tell scenes apart, held-out scenes are held out, pictures show what captions say."""
import importlib.util
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from random import Random

import numpy as np
import pytest

from prepare_flickr import load_meta, read_records, read_split

SCRIPTS = Path(__file__).resolve().parent / "data" / "shapes"


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"shapes_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shapes = load_script("prepare")


def prepare(*arguments):
    command = [sys.executable, SCRIPTS / "prepare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("data") / "shapes"
    done = prepare("--out_dir", out_dir, "--num_train", 500)
    assert done.returncode == 0, done.stderr
    return out_dir


def objects(image):
    """A picture -> [(xs, ys, colour, pixels)]: its patches of colour by a flood fill; the background is grey."""
    coloured = np.ptp(image.astype(int), axis=2) > 60
    left, found = set(map(tuple, np.argwhere(coloured))), []
    while left:
        patch, todo = [], [left.pop()]
        while todo:
            y, x = todo.pop()
            patch.append((y, x))
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            todo += near
        ys, xs = np.array(patch).T
        mean = np.median(image[ys, xs], axis=0)
        colour = min(shapes.COLOURS, key=lambda name: np.abs(mean - shapes.COLOURS[name]).sum())
        found.append((xs, ys, colour, len(patch)))
    return found


def test_five_wordings_tell_every_scene():
    alone, pairs = shapes.list_scenes()
    assert len(alone) == 3 * 2 * 4 * 4 and len(set(alone + pairs)) == len(alone + pairs) == 96 + 3456
    captions = [caption for scene in alone + pairs for caption in shapes.word(scene)]
    assert len(set(captions)) == len(captions) == 5 * len(alone + pairs)
    assert max(len(caption.split()) for caption in captions) <= 14
    assert shapes.word(((2, "small", "red", "cross"), "above", (1, "large", "blue", "square"))) == [
        "two small red crosses above a large blue square", "a large blue square below two small red crosses",
        "two small red crosses with a large blue square underneath",
        "above a large blue square there are two small red crosses",
        "at the top two small red crosses, at the bottom a large blue square"]


@pytest.mark.parametrize("seed", range(5))
def test_held_out_scenes_are_made_of_known_parts(seed):
    splits = {split: alone + pairs for split, (alone, pairs) in shapes.split_scenes(seed).items()}
    alone, pairs = shapes.list_scenes()
    assert sorted(map(repr, sum(splits.values(), []))) == sorted(map(repr, alone + pairs))  # each in one split only
    assert len(splits["val"]) >= 100 and len(splits["test"]) >= 200

    def parts(scenes):  # every two values that occur together in a scene
        return {pair for a, relation, b in scenes for pair in combinations(
            [relation, *(("a", value) for value in a), *(("b", value) for value in b or ())], 2)}

    assert parts(splits["train"]) == parts(alone + pairs)


def test_prepared_splits_share_no_caption(data_dir):
    captions = {split: {c for record in read_records(data_dir, split) for c in record["captions"]}
                for split in ("train", "val", "test")}
    assert not any(captions[a] & captions[b] for a, b in combinations(captions, 2))
    pictures = {split: n["images"] for split, n in load_meta(data_dir)["splits"].items()}
    assert pictures == {"train": 500, "val": 296, "test": 592}
    assert read_records(data_dir, "train")[12]["image"] == "train_00012.png"
    assert all(len(record["captions"]) == 5 for record in read_records(data_dir, "test"))


def test_same_arguments_same_bytes(data_dir, tmp_path):
    again = tmp_path / "again"
    assert prepare("--out_dir", again, "--num_train", 500).returncode == 0
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in data_dir.iterdir()}
    before = {p.name: p.stat().st_mtime_ns for p in again.iterdir()}
    done = prepare("--out_dir", again, "--num_train", 500)
    assert done.returncode == 0 and "nothing to do" in done.stdout
    refused = prepare("--out_dir", again, "--num_train", 500, "--seed", 1)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--out_dir" in refused.stderr
    assert before == {p.name: p.stat().st_mtime_ns for p in again.iterdir()}


@pytest.mark.parametrize("arguments", [("--image_size", 16), ("--num_train", 0), ("--num_trian", 10)])
def test_wrong_arguments_are_one_line(arguments, tmp_path):
    done = prepare("--out_dir", tmp_path / "x", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and arguments[0] in done.stderr
    assert not (tmp_path / "x").exists()


def test_pictures_show_their_captions(data_dir):
    """From the pixels alone: how many objects of which colour and size, and that the relation holds of all of them."""
    scenes = {shapes.word(scene)[0]: scene for kind in shapes.list_scenes() for scene in kind}
    for image, record in zip(read_split(data_dir, "test")["images"], read_records(data_dir, "test")):
        a, relation, b = scenes[record["captions"][0]]
        found = objects(image)
        groups = [g for g in (a, b) if g]
        assert Counter(o[2] for o in found) == {colour: count for count, _, colour, _ in groups}, record
        for xs, ys, colour, _ in found:
            size = next(g[1] for g in groups if g[2] == colour)
            assert (np.ptp(xs) + 1 <= 15) == (size == "small") and (np.ptp(xs) + 1 >= 18) == (size == "large"), record
        if b:
            axis = ("left of", "above").index(relation)
            assert max(o[axis].max() for o in found if o[2] == a[2]) < min(o[axis].min() for o in found if o[2] == b[2])


def test_shapes_are_told_apart_by_middle_and_corners():
    kinds = {(False, 0, 0): "ring", (True, 2, 2): "square", (True, 0, 2): "triangle", (True, 0, 0): "cross"}
    for size, colour, shape, n in product(shapes.SIZES, shapes.COLOURS, shapes.SHAPES, range(5)):
        image = shapes.draw(((1, size, colour, shape), "alone", None), 128, Random(n))
        (xs, ys, _, _), = objects(image)
        filled = np.zeros((128, 128), bool)
        filled[ys, xs] = True
        box = filled[ys.min():ys.max() + 1, xs.min():xs.max() + 1]
        height, width = box.shape
        top, bottom = box[:2], box[-2:]  # corners: 2 x 2 pixels, as edges are smooth
        corners = [sum(bool(rows[:, part].any()) for part in (slice(0, 2), slice(-2, None))) for rows in (top, bottom)]
        assert kinds[(bool(box[height // 2, width // 2]), *corners)] == shape, (size, colour, shape, n)


def test_pictures_of_a_scene_differ():
    scene = ((1, "small", "red", "cross"), "alone", None)
    assert len({shapes.draw(scene, 64, Random(n)).tobytes() for n in range(20)}) == 20


def test_derangement():
    derange = load_script("exact_match").derange
    scenes = [[f"scene {i // 3}"] for i in range(31)]
    other = derange(scenes, 0)
    assert sorted(other) == list(range(31)) and all(scenes[i] != scenes[j] for i, j in enumerate(other))
    assert list(derange(scenes, 0)) == list(other) and list(derange(scenes, 1)) != list(other)
    with pytest.raises(ValueError, match="can't be shuffled"):
        derange([["same"]] * 4, 0)
