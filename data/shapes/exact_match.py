"""
Captions the scenes that were held out of training, and counts the captions that are exactly right.

    python data/shapes/exact_match.py --out_dir out/shapes

A caption is right if it is, word for word, one of its image's five. The second number gives each
image the caption of another scene: a captioner that ignores its images does equally well on both.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from checkpoint import load, read_checkpoint
from nanocaption.cli import Parser, UserError, check_ranges, run
from nanocaption.dataset import Dataset
from nanocaption.generate import caption_images
from nanocaption.sheet import draw_sheet


def derange(scenes, seed):
    """
    A random permutation, int64 (N,), that maps each image to one of a different scene.
    scenes: N sortable values.
    """
    order = np.random.default_rng(seed).permutation(len(scenes))
    order = sorted(order, key=scenes.__getitem__)
    other = np.empty(len(scenes), np.int64)
    # halfway around the sorted scenes there is another one
    other[order] = np.roll(order, len(scenes) // 2)
    if any(scenes[i] == scenes[j] for i, j in enumerate(other)):
        raise UserError("more than half of the test images show the same scene, so they cannot be "
                        "shuffled")
    return other


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out_dir", default="out/shapes",
                        help="a checkpoint or its folder (default: out/shapes)")
    parser.add_argument("--data_dir", default="data/shapes",
                        help="written by prepare.py (default: data/shapes)")
    parser.add_argument("--num_shown", type=int, default=8, help="images to show (default: 8)")
    parser.add_argument("--sheet", default="out/shapes/sheet.png",
                        help="where to write the contact sheet (default: out/shapes/sheet.png)")
    args = parser.parse_args()
    check_ranges(args, num_shown=(1, 1e6))

    data = Dataset(args.data_dir)
    if read_checkpoint(args.out_dir).get("fingerprint") != data.fingerprint:
        raise UserError(f"{args.out_dir} was not trained on {args.data_dir}, so it may have seen "
                        f"the test scenes; train it with --data_dir={args.data_dir}")
    test = data.split("test")
    references = test.captions
    images = test.read_images(range(len(test)))
    results = caption_images(load(args.out_dir, n_row=64), images, beam=1)
    texts = [captions[0]["text"] for captions in results]
    right = [text in own for text, own in zip(texts, references)]

    shown = np.linspace(0, len(texts) - 1, min(args.num_shown, len(texts))).astype(int)
    blocks = []
    for i in shown:
        verdict = "right" if right[i] else "wrong"
        blocks.append(f"{verdict}: {texts[i]}\nreference: {references[i][0]}")
    print("\n".join(blocks))
    draw_sheet(args.sheet, images[shown], blocks)
    print(f"with images: {args.sheet}")

    other = derange(references, seed=0)
    shuffled = [texts[j] in own for j, own in zip(other, references)]
    print(f"exact match on held-out scenes: {np.mean(right):.2f} ({len(test)} images)")
    print(f"exact match with shuffled images: {np.mean(shuffled):.2f}")


if __name__ == "__main__":
    run(main)
