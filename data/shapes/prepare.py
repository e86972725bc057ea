"""
A data set that is drawn, not downloaded: scenes of coloured shapes, each with five captions. Made in seconds, offline.

    python data/shapes/prepare.py

A scene is one group of objects ("two small red rings") or two groups and their relation ("a large blue square above
two small red rings"). Every caption tells the whole scene, and no two scenes share a caption. Some scenes are kept
out of training and make up val and test: a captioner that gets them right has learnt what the words mean.
"""
import sys
from itertools import combinations, cycle, product
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # prepare_flickr.py lies in the repository's root
from common import Parser, UserError, run  # before what is slow to import: from here on Ctrl-C is answered in one line

import numpy as np
from PIL import Image, ImageDraw

from prepare_flickr import load_meta, write_dataset

COUNTS = {1: "a", 2: "two", 3: "three"}
SIZES = {"small": (0.09, 0.1), "large": (0.16, 0.18)}  # half an object's height, of the picture's
COLOURS = {"red": (215, 35, 40), "green": (30, 165, 60), "blue": (45, 85, 230), "yellow": (240, 205, 40)}
SHAPES = {"ring": None,  # no disc: at this size it looks much like a square. The others' corners lie around (0, 0)
          "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
          "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
          "cross": [(-1, -0.25), (-0.25, -0.25), (-0.25, -1), (0.25, -1), (0.25, -0.25), (1, -0.25),
                    (1, 0.25), (0.25, 0.25), (0.25, 1), (-0.25, 1), (-0.25, 0.25), (-1, 0.25)]}
WORDINGS = {
    "alone": ["{a}", "there {is_a} {a}", "a picture of {a}", "{a} and nothing else", "{turned_a}"],
    "left of": ["{a} left of {b}", "{b} right of {a}", "{a} with {b} to the right", "left of {b} there {is_a} {a}",
                "on the left {a}, on the right {b}"],
    "above": ["{a} above {b}", "{b} below {a}", "{a} with {b} underneath", "above {b} there {is_a} {a}",
              "at the top {a}, at the bottom {b}"]}
GAP = 0.04  # least distance between objects: 2.5 of 64 pixels


def list_scenes():
    """
    All scenes, (a, relation, b): the list of those with one group (relation "alone", b None) and of those with two. A
    group is (count, size, colour, shape). Two groups differ in colour and shape and are three objects together at most.
    """
    groups = list(product(COUNTS, SIZES, COLOURS, SHAPES))
    pairs = [(a, relation, b) for a, relation, b in product(groups, ("left of", "above"), groups)
             if a[0] + b[0] <= 3 and a[2] != b[2] and a[3] != b[3]]
    return [(group, "alone", None) for group in groups], pairs


def split_scenes(seed):
    """{"train": (alone, pairs), "val": …, "test": …}: of either kind 1/24 goes to val and 1/12 to test."""
    splits = {"train": [], "val": [], "test": []}
    for scenes in list_scenes():
        Random(seed).shuffle(scenes)
        val, test = len(scenes) // 24, len(scenes) // 8
        for split, part in zip(splits, (scenes[test:], scenes[:val], scenes[val:test])):
            splits[split].append(part)
    return splits


def word(scene):
    """A scene -> its five captions."""
    a, relation, b = scene

    def noun(group):
        return group[3] if group[0] == 1 else {"cross": "crosses"}.get(group[3], group[3] + "s")

    words = {key: f"{COUNTS[group[0]]} {group[1]} {group[2]} {noun(group)}"
             for key, group in (("a", a), ("b", b)) if group}
    words["is_a"] = "is" if a[0] == 1 else "are"
    words["turned_a"] = f"{COUNTS[a[0]]} {noun(a)}, {a[1]} and {a[2]}"
    return [wording.format(**words) for wording in WORDINGS[relation]]


def place(scene, rng):
    """A scene -> where its objects stand, a list of (x, y, half of the height, group); 1 is the picture's height."""
    a, relation, b = scene
    while True:
        border = rng.uniform(0.4, 0.6)  # no object crosses it, so that all of a is left of (above) all of b
        objects, middle = [], []
        for group, low, high in ((a, 0, border), (b, border, 1)) if b else ((a, 0, 1),):
            for _ in range(group[0]):
                r = rng.uniform(*SIZES[group[1]])
                edge = r + GAP / 2
                along, across = rng.uniform(low + edge, high - edge), rng.uniform(edge, 1 - edge)
                objects.append((across, along, r, group) if relation == "above" else (along, across, r, group))
            middle.append(np.mean([o[:2] for o in objects[-group[0]:]], axis=0))
        apart = all(max(abs(x1 - x2), abs(y1 - y2)) > r1 + r2 + GAP
                    for (x1, y1, r1, _), (x2, y2, r2, _) in combinations(objects, 2))
        dx, dy = np.abs(middle[0] - middle[-1])
        clear = dy > 2 * dx if relation == "above" else dx > 2 * dy  # left or above, never half of both
        if apart and (clear or not b):
            return objects


def draw(scene, image_size, rng):
    """A scene -> a picture of it, uint8 (image_size, image_size, 3)."""
    S = 4 * image_size  # drawn larger, then reduced: smooth edges
    ground = (rng.randint(20, 120),) * 3
    image = Image.new("RGB", (S, S), ground)
    pen = ImageDraw.Draw(image)
    for x, y, r, (_, _, colour, shape) in place(scene, rng):
        fill = tuple(max(0, min(255, channel + rng.randint(-15, 15))) for channel in COLOURS[colour])
        if SHAPES[shape]:
            pen.polygon([(S * (x + r * dx), S * (y + r * dy)) for dx, dy in SHAPES[shape]], fill)
        else:
            for radius, inside in ((r, fill), (0.55 * r, ground)):
                pen.ellipse([S * (x - radius), S * (y - radius), S * (x + radius), S * (y + radius)], inside)
    return np.asarray(image.reduce(4))


def make_split(split, scenes, num_train, image_size, seed):
    """(names, captions, images) as write_dataset takes them; scenes: (alone, pairs) of this split."""
    alone, pairs = scenes
    if split == "train":  # a fourth shows one group, though such scenes are few: they are where words are learnt first
        alone, pairs = cycle(alone), cycle(pairs)
        scenes = [next(pairs if i % 4 else alone) for i in range(num_train)]
    else:
        scenes = 2 * (alone + pairs)
    names = [f"{split}_{i:05d}.png" for i in range(len(scenes))]
    images = (draw(scene, image_size, Random(f"{seed} {name}")) for scene, name in zip(scenes, names))
    return names, [word(scene) for scene in scenes], images


def main():
    """The command: see the top of this file."""
    parser = Parser(description="Draws scenes of coloured shapes, with captions: a data set that needs no download.")
    parser.add_argument("--out_dir", default="data/shapes", help="where to write (default: data/shapes)")
    parser.add_argument("--image_size", type=int, default=64, help="pixels a side (default: 64)")
    parser.add_argument("--num_train", type=int, default=8000, help="pictures to train on (default: 8000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.image_size < 32:
        parser.error(f"--image_size must be at least 32, not {args.image_size}: shapes look alike below that")
    if args.num_train < 1:
        parser.error(f"--num_train must be at least 1, not {args.num_train}")

    source = {"name": "shapes", "image_size": args.image_size, "num_train": args.num_train, "seed": args.seed}
    if (Path(args.out_dir) / "meta.json").exists():
        found = load_meta(args.out_dir)["source"]
        if found == source:
            print(f"{args.out_dir} is prepared already, with the same arguments: nothing to do")
            return
        raise UserError(f"{args.out_dir} holds another data set ({found}): remove its meta.json or name another "
                        "--out_dir")
    splits = {split: make_split(split, scenes, args.num_train, args.image_size, args.seed)
              for split, scenes in split_scenes(args.seed).items()}
    meta = write_dataset(args.out_dir, splits, args.image_size, source=source)
    counts = ", ".join(f"{split} {n['images']}" for split, n in meta["splits"].items())
    print(f"{args.out_dir}: pictures: {counts}; vocabulary {meta['vocab_size']}; no scene of val and test is in train")


if __name__ == "__main__":
    run(main)
