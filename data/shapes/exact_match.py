"""
How often a captioner tells a scene that it never saw in training exactly right.

    python data/shapes/exact_match.py --out_dir out/shapes

A caption counts if it is, word for word, one of its picture's own five. The second number gives each picture another
scene's caption: a captioner that ignores its pictures does as well there as on the first.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the other scripts lie in the repository's root
from common import Parser, UserError, run  # before what is slow to import: from here on Ctrl-C is answered in one line

import numpy as np

from prepare_flickr import load_meta, read_records, read_split
from sample import caption_images, draw_sheet, load, read_checkpoint


def derange(scenes, seed):
    """scenes: N sortable keys -> int64 (N,): a permutation that gives each place one of another scene."""
    order = sorted(np.random.default_rng(seed).permutation(len(scenes)), key=lambda i: scenes[i])
    other = np.empty(len(scenes), np.int64)
    other[order] = np.roll(order, len(scenes) // 2)  # half-way round the sorted scenes lies another one
    if any(scenes[i] == scenes[j] for i, j in enumerate(other)):
        raise UserError("more than half of the test pictures show one scene: they can't be shuffled")
    return other


def main():
    """The command: see the top of this file."""
    parser = Parser(description="Exact match of a captioner's captions on the scenes that were held out of training.")
    parser.add_argument("--out_dir", default="out/shapes", help="a checkpoint or its folder (default: out/shapes)")
    parser.add_argument("--data_dir", default="data/shapes", help="what prepare.py wrote (default: data/shapes)")
    parser.add_argument("--num_shown", type=int, default=8, help="pictures to show (default: 8)")
    parser.add_argument("--sheet", default="out/shapes/sheet.png", help="where (default: out/shapes/sheet.png)")
    args = parser.parse_args()
    if args.num_shown < 1:
        parser.error(f"--num_shown must be at least 1, not {args.num_shown}")

    if read_checkpoint(args.out_dir).get("fingerprint") != load_meta(args.data_dir)["fingerprint"]:
        raise UserError(f"{args.out_dir} was not trained on {args.data_dir}, so it may have seen these test scenes: "
                        f"train it there (--data_dir={args.data_dir})")
    images, records = np.array(read_split(args.data_dir, "test")["images"]), read_records(args.data_dir, "test")
    own = [record["captions"] for record in records]
    texts = [captions[0]["text"] for captions in caption_images(load(args.out_dir), images, beam=1)]

    shown = np.linspace(0, len(texts) - 1, min(args.num_shown, len(texts))).astype(int)
    lines = [f"{'right' if texts[i] in own[i] else 'wrong'}: {texts[i]}\ntruth: {own[i][0]}" for i in shown]
    print("\n".join(lines))
    draw_sheet(args.sheet, images[shown], lines)
    print(f"these with their pictures: {args.sheet}")
    other = derange(own, seed=0)
    exact = np.mean([text in captions for text, captions in zip(texts, own)])
    print(f"exact match on held-out combinations: {exact:.2f} ({len(own)} pictures)")
    print(f"with pictures shuffled: {np.mean([texts[j] in own[i] for i, j in enumerate(other)]):.2f}")


if __name__ == "__main__":
    run(main)
