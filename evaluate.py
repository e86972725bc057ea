"""
Score a captioner on a split of a prepared folder or on your own images: CIDEr-D, BLEU, ROUGE-L.

    python evaluate.py --out_dir out/nano --data_dir data/flickr30k --split test
    python evaluate.py --out_dir out/nano --images photos/ --captions captions.jsonl --sheet s.png

Scores match pycocoevalcap's, except for a few rare tokens, and need no Java. From Python, use
nanocaption/metrics.py.
"""
import json
import math
import os
import sys
import time

import numpy as np
import torch

from checkpoint import load
from model import pack
from nanocaption.captions import match_names, read_captions
from nanocaption.cli import (BUNDLED, Parser, UserError, atomic_write, check_output, check_ranges,
                             run, show_progress)
from nanocaption.dataset import Dataset, dataset_files, flickr_hash
from nanocaption.generate import describe_caption
from nanocaption.images import is_compressed, list_images, load_image, read_entry
from nanocaption.metrics import baselines, cider, cider_references, score_all, tokenize
from nanocaption.precision import autocast
from nanocaption.sheet import draw_sheet, sheet_format

COLUMNS = {
    "CIDEr": "cider", "BLEU-1": "bleu1", "BLEU-2": "bleu2", "BLEU-3": "bleu3", "BLEU-4": "bleu4",
    "ROUGE-L": "rouge_l", "distinct": "distinct", "words": "mean_words",
}
N_SHEET = 4  # images in each row of --sheet: as wide as a page on GitHub


def parse_args():
    """The command line, checked."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out_dir", default=BUNDLED,
        help="a checkpoint, or the folder that holds it (default: the bundled checkpoint)")
    add("--data_dir", default="data/flickr30k", help="a prepared folder (default: %(default)s)")
    add("--split", help="split to score: of --data_dir (default: val), or of --captions if that "
                        "file has splits (default: all)")
    add("--images", help="instead of data_dir: a folder, .zip or .tar of images")
    add("--captions", help="caption file with references for --images, in any format that "
                           "prepare_flickr.py reads")
    add("--limit", type=int, help="maximum number of images")
    add("--beam", type=int, help="beam size; 1 is greedy (default: the checkpoint's)")
    add("--max_tokens", type=int,
        help="maximum caption length, in tokens (default: as in training)")
    add("--length_penalty", type=float,
        help="beams are ranked by log-probability / length ** length_penalty (default: the "
             "checkpoint's)")
    add("--batch_size", type=int, default=64, help="images per batch (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 or mps (default: the best available)")
    add("--dtype", default="auto", help="bfloat16 or float32 (default: the faster one)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--save", metavar="JSONL", help="write a line per image: image, caption, references")
    add("--sheet", metavar="PNG", help="draw the best, median and worst captions by CIDEr")
    args = parser.parse_args()
    check_ranges(args, limit=(1, 1e12), beam=(1, 1e4), max_tokens=(1, 1e9),
                 length_penalty=(0, 100), batch_size=(1, 1e6))
    if bool(args.images) != bool(args.captions):
        raise UserError("use both --images and --captions, or neither for a split of --data_dir")
    if args.save:
        folder = os.path.dirname(args.save) or "."
        if not os.path.isdir(folder):
            raise UserError(f"--save {args.save}: no folder {folder}; create it first")
    if args.sheet:
        sheet_format("--sheet", args.sheet)
    return args


def warn(text):
    """Prints a warning."""
    print(f"evaluate.py: {text}", file=sys.stderr)


# -----------------------------------------------------------------------------
# what to score: an object with names, references (a list of texts for each image) and
# read_images(index, size), which returns uint8 (n, S, S, 3)

class PreparedImages:
    """A split of a prepared folder."""

    def __init__(self, data_dir, split, limit):
        self.split = Dataset(data_dir).split(split)
        self.names = self.split.names[:limit]
        self.references = self.split.captions[:limit]

    def read_images(self, index, size):
        return self.split.read_images(index)


class ImageFiles:
    """Images in a folder or archive, with a caption file."""

    def __init__(self, images, captions, split, limit):
        self.images = images
        self.entries = list_images(images)
        if is_compressed(self.entries):
            raise UserError(f"--images {images} is a compressed tar, which does not allow "
                            "random access; unpack it first")
        texts = read_references(captions, split)
        self.paths = match_names(texts, self.entries, images)
        for name in texts:
            if name not in self.paths:
                raise UserError(f"{name}, named in {captions}, is not in {images}")
        self.names = list(texts)[:limit]
        self.references = [texts[name] for name in self.names]

    def read_images(self, index, size):
        images = []
        for i in index:
            name = self.names[i]
            source = read_entry(self.images, self.entries[self.paths[name]], name)
            images.append(load_image(source, size))
        return np.stack(images)


def read_references(path, split):
    """{image name: [texts]} of a caption file, without empty captions; split: None for all."""
    texts = {}
    splits = set()
    n_empty = 0
    for name, text, its_split in read_captions(path):
        if its_split:
            splits.add(its_split)
        if split in (None, its_split):
            captions = texts.setdefault(name, [])
            if text.strip():
                captions.append(text)
            else:
                n_empty += 1
    if not texts:
        if split is None:
            raise UserError(f"{path} has no captions")
        found = ", ".join(sorted(splits)) or "no splits"
        raise UserError(f"{path} has no captions of split {split!r}; it has {found}")
    for name, captions in texts.items():
        if not captions:
            raise UserError(f"{name} has only empty captions in {path}")
    if n_empty:
        warn(f"ignored {n_empty} empty captions in {path}")
    return texts


# -----------------------------------------------------------------------------
# captions and losses

@torch.no_grad()
def caption_and_loss(captioner, source, args):
    """
    Returns a caption of each image, and five sums over all references: cross-entropy in nats; the
    same with each image replaced by the next one; tokens, including EOT; characters; references
    that were cut.
    """
    model = captioner.model
    device = model.mean.device
    n = len(source.names)
    texts = []
    sums = np.zeros(5)
    start_time = time.monotonic()
    for start in range(0, n, args.batch_size):
        index = list(range(start, min(start + args.batch_size, n)))
        # one extra image, for the shuffled loss
        images = source.read_images([*index, (index[-1] + 1) % n], captioner.image_size)
        with autocast(device, captioner.dtype):
            encoded = model.encode(torch.from_numpy(images).to(device))
            found = model.beam_search(encoded[:-1], args.beam, max_tokens=args.max_tokens,
                                      length_penalty=args.length_penalty)
            sums += sum_losses(captioner, encoded, [source.references[i] for i in index])
        texts += [describe_caption(captioner, *captions[0])["text"] for captions in found]
        show_progress("images", len(texts), n, start_time)
    return texts, sums


def sum_losses(captioner, encoded, references):
    """caption_and_loss's five sums for a batch. encoded: its images, then the next image."""
    model = captioner.model
    tokens = []
    n_characters = 0
    for captions in references:
        captions = [" ".join(text.split()) for text in captions]
        n_characters += sum(map(len, captions))
        tokens.append([captioner.tokenizer.encode_ordinary(text) for text in captions])
    packed = pack(tokens, model.eot_token, model.max_tokens)
    packed = {name: t.to(encoded.device) for name, t in packed.items()}
    ce = model.cross_entropy(encoded[:-1], packed).item()
    shuffled_ce = model.cross_entropy(encoded[1:], packed).item()
    n_tokens = (packed["targets"] >= 0).sum().item()
    n_cut = sum(len(ids) >= model.max_tokens for captions in tokens for ids in captions)
    return np.array([ce, shuffled_ce, n_tokens, n_characters, n_cut])


# -----------------------------------------------------------------------------
# reporting

def print_table(result):
    """Prints the scores."""
    rows = {
        "model": result,
        "humans*": result["human"],
        "another image's caption": result["chance"],
        "one caption for all": result["constant"],
    }
    header = f"{result['images']:,} images".ljust(26)
    print(header + "".join(f"{column:>9}" for column in COLUMNS))
    for title, scores in rows.items():
        if scores is None:
            print(f"{title:26}  (too few captions)")
            continue
        cells = []
        for key in COLUMNS.values():
            digits = 1 if key == "mean_words" else 3
            cells.append(f"{scores[key]:9.{digits}f}")
        print(f"{title:26}" + "".join(cells))
    print(f"loss {result['loss']:.4f} nats per token ({result['bits_per_char']:.4f} bits per "
          f"character) on the references; {result['loss_shuffled']:.4f} with shuffled images")
    print("* each reference scored against the image's other references")


def draw_extremes(path, source, texts, scores, size):
    """Draws the best, median and worst captions by CIDEr, a row each."""
    order = np.argsort(-np.array(scores), kind="stable").tolist()
    n = min(N_SHEET, len(order))
    middle = (len(order) - n) // 2
    rows = {"best": order[:n], "median": order[middle:middle + n], "worst": order[::-1][:n]}
    images = []
    labels = []
    for row, index in rows.items():
        images += list(source.read_images(index, size))
        for rank, i in enumerate(index, 1):
            labels.append(f"{row} {rank}, CIDEr {scores[i]:.2f}\n{texts[i]}\n"
                          f"reference: {source.references[i][0]}")
    draw_sheet(path, images, labels, columns=n)


def save_captions(path, source, texts):
    """Writes JSON lines: image, caption, references."""
    with atomic_write(path) as file:
        for name, text, captions in zip(source.names, texts, source.references):
            record = {"image": name, "caption": text, "references": captions}
            line = json.dumps(record, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))


def main():
    """See the top of this file."""
    args = parse_args()
    if args.images:
        source = ImageFiles(args.images, args.captions, args.split, args.limit)
        files = [args.images, args.captions]
        if os.path.isdir(args.images):
            files += source.entries.values()
    else:
        source = PreparedImages(args.data_dir, args.split or "val", args.limit)
        files = dataset_files(args.data_dir)
    for name in ("save", "sheet"):
        if getattr(args, name):
            check_output(f"--{name}", getattr(args, name), files)
    captioner = load(args.out_dir, args.device, args.dtype, n_row=args.batch_size)
    if args.beam is None:
        args.beam = captioner.beam
    if args.length_penalty is None:
        args.length_penalty = captioner.length_penalty
    texts, sums = caption_and_loss(captioner, source, args)
    ce, shuffled_ce, n_tokens, n_characters, n_cut = sums.tolist()
    n = len(source.names)
    if n_cut:
        warn(f"{n_cut:.0f} references were cut to {captioner.model.max_tokens} tokens for the "
             "loss, so bits per character are too low")
    n_seen = sum(flickr_hash(name) in captioner.flickr_ids for name in source.names)
    if n_seen:
        warn(f"{n_seen} of these {n} images have the Flickr ids of training images, so scores are "
             "too high")
    if n < 100:
        warn("CIDEr is unreliable with fewer than 100 images: it weights n-grams by their rarity")
    if n > 1 and shuffled_ce - ce < 0.01 * n_tokens:
        warn("the model barely uses its images: the loss is "
             f"{shuffled_ce / n_tokens:.4f} with shuffled images and {ce / n_tokens:.4f} with "
             "the right ones")

    words = [tokenize(text) for text in texts]
    references = [[tokenize(text) for text in captions] for captions in source.references]
    prepared = cider_references(references)
    result = {
        "images": n,
        **score_all(words, references, prepared),
        "loss": ce / n_tokens,
        "loss_shuffled": shuffled_ce / n_tokens,
        "bits_per_char": ce / math.log(2) / n_characters,
        **baselines(references, prepared),
    }
    if args.save:
        save_captions(args.save, source, texts)
    if args.sheet:
        _, scores = cider(words, prepared)
        draw_extremes(args.sheet, source, texts, scores, captioner.image_size)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)


if __name__ == "__main__":
    run(main)
