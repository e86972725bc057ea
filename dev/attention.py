"""
Measures which rule turns a captioner's attention into a map for each word, and writes attention.md.

    python dev/attention.py

Draws data/shapes and trains a small captioner on it with two seeds (5 minutes each on one core),
unless out/attention_0 and out/attention_1 exist already. Then it captions the held-out scenes. In
these, the place of every object is known: scenes are drawn again from their seeds.
"""
import subprocess
import sys
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
from prepare import COLORS, COUNTS, SHAPES, SIZES, Group, noun, place_objects, split_scenes

TABLE = ROOT / "dev" / "attention.md"
SEEDS = (0, 1)
SMALL = ["--n_embd=64", "--max_minutes=0", "--max_iters=3000"]
KEPT = "all layers, mean of heads"  # the rule of nanocaption/attention_maps.py, above the mean
BATCH = 100
INTRODUCTION = """# Where each word looked: which rule

Written by `python dev/attention.py`. A map has one weight for each patch. It can be made from the
last layer's cross-attention or from all layers', from the mean or the maximum over heads, or by
rollout (arXiv 2005.00928), which follows attention through the layers; at the step that writes a
word or at the step that reads it. Each of these is measured as it is and as far as it is above its
mean over all steps of the caption, which removes the patches that every word attends to.

A small captioner (config/shapes.py with n_embd=64 and 3,000 steps) is trained with seeds 0 and 1
and captions the {n_images} images of held-out scenes of data/shapes, greedily. A fraction of
{right} of the captions is exactly right. For each word that names a color or shape of the scene
({n_words} words):

* on the object: the fraction of the word's map on the objects that it names, divided by the
  fraction of the image that they cover. 1 is chance. An object is the box around it.
* peak: the fraction of words whose largest weight is on a patch that touches such an object.

| | on the object | by seed | peak | above the mean: on the object | by seed | peak |
|---|---|---|---|---|---|---|"""
SIZES_HEADER = """
"{kept}", above the mean, has the most attention on the object, and the peak is there most often.
`nanocaption/attention_maps.py` uses it. By the size and number of the objects that a word names,
and with all weight on the patch that the objects cover best:

| | words | on the object | by seed | the most possible |
|---|---|---|---|---|"""


def train(seed):
    """Trains a captioner, unless it exists; returns its folder."""
    out_dir = ROOT / "out" / f"attention_{seed}"
    if not (out_dir / "best.pt").exists():
        command = ["train.py", "config/shapes.py", *SMALL, f"--seed={seed}",
                   f"--out_dir={out_dir.relative_to(ROOT)}"]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    return out_dir


def find_scenes(data):
    """The scene of each test image and where its objects are: (scene, place_objects' list)."""
    seed = data.meta["source"]["seed"]
    alone, pairs = split_scenes(seed)["test"]
    found = []
    for name, scene in zip(data.split("test").names, 2 * (alone + pairs), strict=True):
        rng = Random(f"{seed} {name}")
        rng.randint(20, 120)  # the background, as in draw_scene
        found.append((scene, place_objects(scene, rng)))
    return found


def named_group(word, scene):
    """The group of objects whose color or shape a word names, or None."""
    word = word.strip(",")
    for group in (scene[0], scene[2]):
        if group and word in (group.color, noun(group)):
            return group
    return None


def is_named(word):
    """Whether a word is a color or a shape."""
    word = word.strip(",")
    nouns = [noun(Group(n, "small", "red", shape)) for n in COUNTS for shape in SHAPES]
    return word in COLORS or word in nouns


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
    {rule: weights (B, T, N)} from what each layer's heads attend to: the words to the patches,
    (layers, B, H, T, N); the words to each other, (layers, B, H, T, T); the patches to each other,
    (layers, B, H, N, N).
    """
    heads = cross.mean(2)
    words = torch.zeros_like(heads[0])  # (B, T, N)
    for own, image in zip(decoder.mean(2), heads):
        words = 0.5 * words + 0.5 * own @ words
        words = 0.5 * words + 0.5 * image
    patches = torch.eye(cross.size(-1))
    for weights in encoder.mean(2):
        patches = 0.5 * patches + 0.5 * weights @ patches
    read = heads.mean(0).roll(-1, dims=1)  # the step that reads a word comes after the one that
    # writes it
    return {
        "last layer, mean of heads": heads[-1],
        "last layer, maximum of heads": cross[-1].amax(1),
        KEPT: heads.mean(0),
        "all layers, maximum": cross.amax((0, 2)),
        "all layers, mean of heads, when the word is read": read,
        "rollout through the decoder": words,
        "rollout through decoder and encoder": words @ patches,
    }


@torch.no_grad()
def measure(out_dir, data, scenes):
    """
    Captions the test images. Returns the words' scores, a list of (rule, above the mean?, group,
    on the object, peak), the scores of the best patch under rule None, the fraction of captions
    that are right, and the number of colors and shapes that are not in the scene.
    """
    captioner = load(out_dir, dtype="float32", device="cpu")
    model = captioner.model
    test = data.split("test")
    scores = []
    n_right = 0
    n_missing = 0
    for start in range(0, len(test), BATCH):
        index = range(start, min(start + BATCH, len(test)))
        images = torch.from_numpy(test.read_images(index))
        with record([block.attention for block in model.encoder.blocks], self_weights) as encoder:
            image = model.encode(images)
        captions = [ids for [(ids, _)] in model.beam_search(image, 1)]
        with record([block.attention for block in model.blocks], self_weights) as decoder:
            cross = decoder_attention(model, image, captions)
        maps = combine(torch.stack(cross), torch.stack(decoder), torch.stack(encoder))
        maps = {rule: over_grid(weights) for rule, weights in maps.items()}
        for i, ids, row in zip(index, captions, range(len(captions))):
            scene, objects = scenes[i]
            n_right += captioner.tokenizer.decode(ids).strip() in test.captions[i]
            for word, tokens in join_tokens(captioner.tokenizer, ids):
                if not is_named(word):
                    continue
                group = named_group(word, scene)
                if group is None:
                    n_missing += 1
                    continue
                grid = maps[KEPT].size(-1)
                cover = covered(objects, group, grid)
                scores.append((None, True, group, cover.max() / cover.mean(), True))
                for rule, found in maps.items():
                    steps = found[row, :len(ids) + 1]
                    for above, tried in ((False, steps), (True, above_mean(steps))):
                        weights = tried[tokens].mean(0).numpy()
                        on_object = (weights * cover).sum() / cover.mean()
                        peak = cover.flat[weights.argmax()] > 0
                        scores.append((rule, above, group, on_object, peak))
    return scores, n_right / len(test), n_missing


def mean_score(runs, column, rule, above, group=None):
    """
    The mean score of a rule in each run, column 3 (on the object) or 4 (peak); group: a
    (size, number) that the objects must have, or None.
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


def write_table(runs, right, n_images, n_words):
    """Writes attention.md from the scores of each seed's run."""
    lines = [INTRODUCTION.format(n_images=n_images, n_words=n_words, right=right)]
    for rule in dict.fromkeys(score[0] for score in runs[0] if score[0]):
        cells = [rule]
        for above in (False, True):
            by_seed = mean_score(runs, 3, rule, above)
            cells += [f"{np.mean(by_seed):.2f}", " ".join(f"{value:.2f}" for value in by_seed),
                      f"{np.mean(mean_score(runs, 4, rule, above)):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(SIZES_HEADER.format(kept=KEPT))
    for size in SIZES:
        for n in COUNTS:
            group = (size, n)
            number = sum(score[0] is None and (score[2].size, score[2].n) == group
                         for scores in runs for score in scores)
            if number == 0:
                continue
            by_seed = mean_score(runs, 3, KEPT, True, group)
            most = np.mean(mean_score(runs, 3, None, True, group))
            lines.append(f"| {n} {size} | {number} | {np.mean(by_seed):.2f} | "
                         f"{' '.join(f'{value:.2f}' for value in by_seed)} | {most:.2f} |")
    with atomic_write(TABLE) as file:
        file.write(("\n".join(lines) + "\n").encode())


def main():
    """See the top of this file."""
    Parser(description=__doc__).parse_args()
    command = [sys.executable, "data/shapes/prepare.py"]
    subprocess.run(command, check=True, cwd=ROOT)
    data = Dataset(ROOT / "data" / "shapes")
    scenes = find_scenes(data)
    runs = []
    rights = []
    for seed in SEEDS:
        scores, right, n_missing = measure(train(seed), data, scenes)
        print(f"seed {seed}: {right:.3f} of the captions are right; {n_missing} colors and shapes "
              "that they name are not in the image")
        runs.append(scores)
        rights.append(right)
    n_words = " and ".join(str(sum(score[0] is None for score in scores)) for scores in runs)
    right = " and ".join(f"{right:.3f}" for right in rights)
    write_table(runs, right, len(scenes), n_words)
    print(TABLE.read_text())


if __name__ == "__main__":
    run(main)
