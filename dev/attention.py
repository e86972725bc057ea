"""
Compares ways to turn a captioner's attention into a map for each word, and writes attention.md.

    python dev/attention.py

Draws data/shapes and trains captioners of two widths on it, with two seeds each (5 minutes each on
one core), unless out/attention_WIDTH_SEED exists already. Then it captions the held-out scenes,
where the place of every object is known, and checks whether the maps find the named objects.
"""
import subprocess
import sys
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "shapes")]
from checkpoint import load
from nanocaption.attention_maps import (above_mean, decoder_attention, join_tokens, over_grid,
                                        record, self_weights)
from nanocaption.cli import Parser, atomic_write, run
from nanocaption.dataset import Dataset
from prepare import COLORS, COUNTS, SIZES, noun, place_objects, split_scenes

TABLE = ROOT / "dev" / "attention.md"
SEEDS = (0, 1)
STEPS = {64: 3000, 128: 2000}  # by width, n_embd
KEPT = "all layers, mean of heads"  # the rule of attention_maps.py, with the mean subtracted
READ = "all layers, mean of heads, at the step that reads the word"
INTRODUCTION = """# Attention maps: which rule finds the object

Written by `python dev/attention.py`. For each word of a caption, `sample.py --attention` and
`serve.py` draw a map of how much the word attends to each patch of the image. This page compares
rules for computing such a map from the attention weights:

* from the cross-attention of the last layer, or of all layers;
* from the mean or the maximum over heads;
* or by attention rollout (arXiv 2005.00928), which follows attention through the layers.

The weights are those of the step that predicts the word, or of the one that reads it as input. Each
rule is measured as it is and with the mean over all steps of the caption subtracted (negative
values become 0), which removes the patches that every word attends to.

Captioners of config/shapes.py with n_embd=64 (3,000 steps) and 128 (2,000 steps), with seeds 0 and
1 each, caption the {n_images} images of the held-out scenes of data/shapes, greedily. The fractions
of captions that are exactly right are {right}.
The scores are over the words that name a color or a shape in the scene ({n_words}):

* on the object: the fraction of the map that is on the objects that the word names, divided by
  the fraction of the image that their bounding boxes cover. Chance is 1. "By run" lists width 64
  with seeds 0 and 1, then width 128.
* peak: the fraction of words whose largest weight is on a patch that touches such an object.

| as it is | on the object | by run | peak |
|---|---|---|---|"""
ABOVE = """
| mean subtracted | on the object | by run | peak |
|---|---|---|---|"""
CONCLUSION = """
nanocaption/attention_maps.py uses the mean over all layers and heads, with the mean over steps
subtracted. On average, it puts the most attention on the object and has the most peaks there. The
maximum puts as much on the object (more at width 64, less at width 128), but its peak misses the
object twice as often. Also, "on the object" rewards any map for being sharper.

The chosen rule, by size and number of the objects that a word names; "at most" is the score of a
map with all its weight on the patch that they cover best:

| | words | on the object | by run | at most |
|---|---|---|---|---|"""


def train(width, seed):
    """Trains a captioner, unless it exists; returns its folder."""
    out_dir = f"out/attention_{width}_{seed}"
    if not (ROOT / out_dir / "best.pt").exists():
        command = ["train.py", "config/shapes.py", f"--n_embd={width}", "--max_minutes=0",
                   f"--max_iters={STEPS[width]}", f"--seed={seed}", f"--out_dir={out_dir}"]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    return ROOT / out_dir


def find_scenes(data):
    """For each test image: its scene and where its objects are, (scene, place_objects' list)."""
    seed = data.meta["source"]["seed"]
    alone, pairs = split_scenes(seed)["test"]
    found = []
    for name, scene in zip(data.split("test").names, 2 * (alone + pairs), strict=True):
        rng = Random(f"{seed} {name}")
        rng.randint(20, 120)  # the background, as in draw_scene
        found.append((scene, place_objects(scene, rng)))
    return found


def named_group(word, scene):
    """The group of objects in a scene whose color or shape a word names, or None."""
    for group in (scene[0], scene[2]):
        if group and word in (group.color, noun(group)):
            return group
    return None


def covered(objects, group, grid):
    """The fraction of each patch that a group's objects cover, (grid, grid)."""
    edges = np.arange(grid + 1) / grid
    total = np.zeros((grid, grid))
    for x, y, radius, other in objects:
        if other == group:
            sides = []
            for center in (y, x):
                low = np.maximum(edges[:-1], center - radius)
                high = np.minimum(edges[1:], center + radius)
                sides.append((high - low).clip(0) * grid)
            total += np.outer(*sides)
    return total


def combine(cross, decoder, encoder):
    """
    {rule: weights (T, N)} from each layer's attention weights: cross-attention, (layers, H, T, N);
    the decoder's self-attention, (layers, H, T, T); the encoder's, (layers, H, N, N).
    """
    heads = cross.mean(1)
    words = torch.zeros_like(heads[0])  # (T, N)
    for own, image in zip(decoder.mean(1), heads):
        words = 0.5 * words + 0.5 * own @ words
        words = 0.5 * words + 0.5 * image
    patches = torch.eye(cross.size(-1))
    for weights in encoder.mean(1):
        patches = 0.5 * patches + 0.5 * weights @ patches
    return {
        "last layer, mean of heads": heads[-1],
        "last layer, maximum of heads": cross[-1].amax(0),
        KEPT: heads.mean(0),
        "maximum of all layers and heads": cross.amax((0, 1)),
        READ: heads.mean(0),
        "rollout through the decoder": words,
        "rollout through decoder and encoder": words @ patches,
    }


@torch.no_grad()
def measure(out_dir, data, scenes):
    """
    Captions the test images. Returns the words' scores, a list of (rule, mean subtracted?, group,
    on the object, peak), where rule None stands for all weight on the best patch; the fraction of
    captions that are right; and how many colors and shapes they name that are not in the scene.
    """
    captioner = load(out_dir, dtype="float32", device="cpu")
    model = captioner.model
    test = data.split("test")
    names = set(COLORS)
    for scene, _ in scenes:
        names.add(noun(scene[0]))
    scores = []
    n_right = 0
    n_missing = 0
    for i, (scene, objects) in enumerate(scenes):
        images = torch.from_numpy(test.read_images([i]))
        with record([block.attention for block in model.encoder.blocks], self_weights) as encoder:
            image = model.encode(images)
        [[(ids, _)]] = model.beam_search(image, 1)
        n_right += captioner.tokenizer.decode(ids).strip() in test.captions[i]
        with record([block.attention for block in model.blocks], self_weights) as decoder:
            cross = decoder_attention(model, image, ids)
        maps = combine(torch.stack(cross), torch.cat(decoder), torch.cat(encoder))
        maps = {rule: over_grid(weights) for rule, weights in maps.items()}
        for word, tokens in join_tokens(captioner.tokenizer, ids):
            word = word.strip(",")
            group = named_group(word, scene)
            if group is None:
                n_missing += word in names
                continue
            grid = maps[KEPT].size(-1)
            cover = covered(objects, group, grid)
            scores.append((None, True, group, cover.max() / cover.mean(), True))
            for rule, steps in maps.items():
                # a word is read one step after it is written
                places = [place + (rule == READ) for place in tokens]
                for above, tried in ((False, steps), (True, above_mean(steps))):
                    weights = tried[places].mean(0).numpy()
                    on_object = (weights * cover).sum() / cover.mean()
                    peak = cover.flat[weights.argmax()] > 0
                    scores.append((rule, above, group, on_object, peak))
    return scores, n_right / len(test), n_missing


def mean_score(runs, column, rule, above, group=None):
    """
    A rule's mean score in each run: column 3 (on the object) or 4 (peak). group: (size, number) of
    the objects that count, or None for all.
    """
    means = []
    for scores in runs:
        values = []
        for score in scores:
            fits = group is None or (score[2].size, score[2].n) == group
            if fits and score[:2] == (rule, above):
                values.append(score[column])
        means.append(np.mean(values))
    return means


def table_row(name, runs, rule, above, *more, group=None):
    """A row of a table: name, mean score on the object, the same by run, and more cells."""
    by_run = mean_score(runs, 3, rule, above, group)
    cells = [name, f"{np.mean(by_run):.2f}", " ".join(f"{value:.2f}" for value in by_run), *more]
    return f"| {' | '.join(cells)} |"


def write_table(runs, rights, n_images):
    """Writes attention.md from each run's scores and fraction of right captions."""
    n_words = [sum(score[0] is None for score in scores) for scores in runs]
    lines = [INTRODUCTION.format(n_images=n_images, n_words=listed(n_words),
                                 right=listed(f"{right:.3f}" for right in rights))]
    for above in (False, True):
        if above:
            lines.append(ABOVE)
        for rule in dict.fromkeys(score[0] for score in runs[0] if score[0]):
            peak = np.mean(mean_score(runs, 4, rule, above))
            lines.append(table_row(rule, runs, rule, above, f"{peak:.3f}"))
    lines.append(CONCLUSION)
    groups = [(score[2].size, score[2].n) for scores in runs for score in scores if not score[0]]
    for group in product(SIZES, COUNTS):
        if group in groups:
            most = np.mean(mean_score(runs, 3, None, True, group))
            name = f"{group[1]} {group[0]} | {groups.count(group)}"
            lines.append(table_row(name, runs, KEPT, True, f"{most:.2f}", group=group))
    with atomic_write(TABLE) as file:
        file.write(("\n".join(lines) + "\n").encode())


def listed(values):
    """Joins values for a sentence: "1, 2 and 3"."""
    values = list(map(str, values))
    return ", ".join(values[:-1]) + " and " + values[-1]


def main():
    """See the top of this file."""
    Parser(description=__doc__).parse_args()
    subprocess.run([sys.executable, "data/shapes/prepare.py"], check=True, cwd=ROOT)
    data = Dataset(ROOT / "data" / "shapes")
    scenes = find_scenes(data)
    runs = []
    rights = []
    for width in STEPS:
        for seed in SEEDS:
            scores, right, n_missing = measure(train(width, seed), data, scenes)
            print(f"width {width}, seed {seed}: {right:.3f} of the captions are right; {n_missing} "
                  "colors and shapes that they name are not in the image")
            runs.append(scores)
            rights.append(right)
    write_table(runs, rights, len(scenes))
    print(TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
