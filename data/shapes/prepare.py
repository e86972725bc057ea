"""
Draws a dataset, so that nothing has to be downloaded: scenes of colored shapes with five captions
each.

    python data/shapes/prepare.py

A scene is one group of objects ("two small red rings") or two groups and their relation ("a large
blue square above two small red rings"). Each caption describes the whole scene, and no two scenes
share a caption. The scenes of val and test are held out of training: a captioner that gets them
right has learned what the words mean.
"""
import sys
from itertools import combinations, cycle, product
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanocaption.cli import Parser, UserError, check_ranges, run
from nanocaption.dataset import Dataset, write_dataset

COUNTS = {1: "a", 2: "two", 3: "three"}
# an object's radius, about half its height, as a fraction of the image's height
SIZES = {"small": (0.09, 0.1), "large": (0.16, 0.18)}
COLORS = {
    "red": (215, 35, 40),
    "green": (30, 165, 60),
    "blue": (45, 85, 230),
    "yellow": (240, 205, 40),
}
# corners, for a radius of 1; there is no disk, because it looks too much like a square
SHAPES = {
    "ring": None,
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "cross": [
        (-1, -0.25), (-0.25, -0.25), (-0.25, -1), (0.25, -1), (0.25, -0.25), (1, -0.25),
        (1, 0.25), (0.25, 0.25), (0.25, 1), (-0.25, 1), (-0.25, 0.25), (-1, 0.25),
    ],
}
WORDINGS = {
    "alone": [
        "{a}",
        "there {is_a} {a}",
        "a picture of {a}",
        "{a} and nothing else",
        "{adjectives_last}",
    ],
    "left of": [
        "{a} left of {b}",
        "{b} right of {a}",
        "{a} with {b} to the right",
        "left of {b} there {is_a} {a}",
        "on the left {a}, on the right {b}",
    ],
    "above": [
        "{a} above {b}",
        "{b} below {a}",
        "{a} with {b} underneath",
        "above {b} there {is_a} {a}",
        "at the top {a}, at the bottom {b}",
    ],
}
GAP = 0.04  # minimum distance between objects: 2.5 of 64 pixels


# -----------------------------------------------------------------------------
# scenes

class Group(NamedTuple):
    """Identical objects; size, color and shape are keys of SIZES, COLORS and SHAPES."""
    n: int
    size: str
    color: str
    shape: str


def list_scenes():
    """
    All scenes, (a, relation, b), in two lists: of one group (relation "alone", b None) and of two.
    Two groups differ in color and shape and have at most three objects in total.
    """
    groups = [Group(*values) for values in product(COUNTS, SIZES, COLORS, SHAPES)]
    alone = [(group, "alone", None) for group in groups]
    pairs = []
    for a, relation, b in product(groups, ("left of", "above"), groups):
        if a.n + b.n <= 3 and a.color != b.color and a.shape != b.shape:
            pairs.append((a, relation, b))
    return alone, pairs


def split_scenes(seed):
    """{split: [alone, pairs]}: of each kind of scene, 1/24 go to val and 1/12 to test."""
    splits = {"train": [], "val": [], "test": []}
    for scenes in list_scenes():
        Random(seed).shuffle(scenes)
        n_val = len(scenes) // 24
        n_held_out = len(scenes) // 8
        splits["val"].append(scenes[:n_val])
        splits["test"].append(scenes[n_val:n_held_out])
        splits["train"].append(scenes[n_held_out:])
    return splits


# -----------------------------------------------------------------------------
# captions

def noun(group):
    """The name of a group's shape, in the singular or plural."""
    if group.n == 1:
        return group.shape
    return "crosses" if group.shape == "cross" else f"{group.shape}s"


def noun_phrase(group):
    """A group in words, such as "two small red rings"."""
    return f"{COUNTS[group.n]} {group.size} {group.color} {noun(group)}"


def scene_captions(scene):
    """A scene's five captions."""
    a, relation, b = scene
    words = dict(
        a=noun_phrase(a),
        is_a="is" if a.n == 1 else "are",
        adjectives_last=f"{COUNTS[a.n]} {noun(a)}, {a.size} and {a.color}",
    )
    if b:
        words["b"] = noun_phrase(b)
    return [wording.format(**words) for wording in WORDINGS[relation]]


# -----------------------------------------------------------------------------
# images

def place_objects(scene, rng):
    """Random positions for a scene's objects: a list of (x, y, radius, group), x and y in 0..1."""
    while True:
        objects = try_places(scene, rng)
        if not too_close(objects) and is_relation_clear(scene, objects):
            return objects


def try_places(scene, rng):
    """Like place_objects, but objects may touch and their relation may be unclear."""
    a, relation, b = scene
    # no object crosses the border, so all of a is left of, or above, all of b
    border = rng.uniform(0.4, 0.6)
    regions = [(a, 0, border), (b, border, 1)] if b else [(a, 0, 1)]
    objects = []
    for group, low, high in regions:
        for _ in range(group.n):
            radius = rng.uniform(*SIZES[group.size])
            margin = radius + GAP / 2
            along = rng.uniform(low + margin, high - margin)
            across = rng.uniform(margin, 1 - margin)
            if relation == "above":
                objects.append((across, along, radius, group))
            else:
                objects.append((along, across, radius, group))
    return objects


def too_close(objects):
    """Whether any two objects, taken as squares, are at most GAP apart."""
    for (x1, y1, radius1, _), (x2, y2, radius2, _) in combinations(objects, 2):
        if max(abs(x1 - x2), abs(y1 - y2)) <= radius1 + radius2 + GAP:
            return True
    return False


def is_relation_clear(scene, objects):
    """Whether one group is clearly left of or above the other, not diagonal to it."""
    a, relation, b = scene
    if b is None:
        return True
    dx, dy = np.abs(center(objects, a) - center(objects, b))
    return dy > 2 * dx if relation == "above" else dx > 2 * dy


def center(objects, group):
    """The mean position (x, y) of a group's objects."""
    return np.mean([(x, y) for x, y, _, other in objects if other == group], axis=0)


def draw_scene(scene, image_size, rng):
    """An image of a scene, uint8 (image_size, image_size, 3)."""
    # drawn at four times the size and reduced, for smooth edges
    S = 4 * image_size
    gray = rng.randint(20, 120)
    background = (gray, gray, gray)
    image = Image.new("RGB", (S, S), background)
    pen = ImageDraw.Draw(image)
    for x, y, radius, group in place_objects(scene, rng):
        fill = vary(COLORS[group.color], rng)
        corners = SHAPES[group.shape]
        if corners:
            points = [(S * (x + radius * dx), S * (y + radius * dy)) for dx, dy in corners]
            pen.polygon(points, fill)
        else:
            draw_disk(pen, S, x, y, radius, fill)
            draw_disk(pen, S, x, y, 0.55 * radius, background)
    return np.asarray(image.reduce(4))


def vary(color, rng):
    """A slightly different color."""
    return tuple(max(0, min(255, channel + rng.randint(-15, 15))) for channel in color)


def draw_disk(pen, S, x, y, radius, fill):
    """Draws a disk on an image of S pixels a side."""
    box = (x - radius, y - radius, x + radius, y + radius)
    pen.ellipse([S * place for place in box], fill)


# -----------------------------------------------------------------------------
# the dataset

def make_split(split, scenes, num_train, image_size, seed):
    """(names, captions, images) for write_dataset; scenes: the split's [alone, pairs]."""
    alone, pairs = scenes
    if split == "train":
        # few scenes have one group, but a quarter of the images do: they teach the words first
        alone = cycle(alone)
        pairs = cycle(pairs)
        scenes = [next(pairs if i % 4 else alone) for i in range(num_train)]
    else:
        scenes = 2 * (alone + pairs)  # two images of each
    names = [f"{split}_{i:05d}.png" for i in range(len(scenes))]
    captions = [scene_captions(scene) for scene in scenes]
    images = draw_images(scenes, names, image_size, seed)
    return names, captions, images


def draw_images(scenes, names, image_size, seed):
    """Yields the image of each scene; it depends on seed and name."""
    for scene, name in zip(scenes, names):
        yield draw_scene(scene, image_size, Random(f"{seed} {name}"))


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out_dir", default="data/shapes",
                        help="where to write (default: data/shapes)")
    parser.add_argument("--image_size", type=int, default=64, help="side in pixels (default: 64)")
    parser.add_argument("--num_train", type=int, default=8000,
                        help="number of training images (default: 8000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--force", action="store_true",
                        help="replace the folder even if it is up to date")
    args = parser.parse_args()
    # shapes look alike below 32 pixels
    check_ranges(args, image_size=(32, 4096), num_train=(1, 1e7))

    source = dict(name="shapes", image_size=args.image_size, num_train=args.num_train,
                  seed=args.seed)
    if Path(args.out_dir, "meta.json").exists() and not args.force:
        found = Dataset(args.out_dir).meta["source"]
        if found != source:
            raise UserError(f"{args.out_dir} already holds a different dataset ({found}); "
                            "choose another --out_dir or use --force to replace it")
        print(f"{args.out_dir} is up to date")
        return
    splits = {}
    for split, scenes in split_scenes(args.seed).items():
        splits[split] = make_split(split, scenes, args.num_train, args.image_size, args.seed)
    meta = write_dataset(args.out_dir, splits, args.image_size, source=source)
    counts = ", ".join(f"{split} {n['images']}" for split, n in meta["splits"].items())
    print(f"{args.out_dir}: images: {counts}; vocabulary of {meta['vocab_size']}; no scene of val "
          "or test is in train")


if __name__ == "__main__":
    run(main)
