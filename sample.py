"""
Caption images.

    python sample.py --image photo.jpg more_photos/            # with the bundled checkpoint
    python sample.py --image data/flickr30k --split val --limit 10 --sheet sheet.png
    python sample.py --image photo.jpg --out_dir out/nano
    python sample.py --image photo.jpg --attention where.png   # an attention map for each word

From Python:

    from sample import load, caption
    captioner = load()
    print(caption(captioner, "photo.jpg"))
    text, words = caption(captioner, "photo.jpg", attention=True)
    # words: [(word, attention map), ...]; a map is an array over the g x g patches
"""
import itertools
import json
import os
import re
import sys

import numpy as np

from checkpoint import load
from nanocaption.attention_maps import check_attention
from nanocaption.cli import (BUNDLED, Parser, UserError, check_output, check_ranges, one_line,
                             run)
from nanocaption.dataset import Dataset
from nanocaption.download import is_url
from nanocaption.generate import caption, caption_images, caption_record  # noqa: F401
from nanocaption.images import is_image, list_images, load_image
from nanocaption.sheet import draw_sheet, draw_strips, sheet_format


def parse_args():
    """The command line, checked."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--image", nargs="+", required=True, metavar="PATH",
        help="image files, http(s) URLs, folders of images (at any depth), - for stdin, or a "
             "prepared folder (data/NAME)")
    add("--split", default="val", help="split of a prepared folder (default: val)")
    add("--limit", type=int, help="maximum number of images from each folder")
    add("--out_dir", default=BUNDLED,
        help="a checkpoint, or the folder that holds it (default: the bundled checkpoint)")
    add("--beam", type=int, help="beam size; 1 is greedy (default: the checkpoint's)")
    add("--num_samples", type=int, default=1,
        help="if above 1, sample this many captions per image instead of using beam search")
    add("--temperature", type=float, default=1.0, help="sampling temperature (default: 1)")
    add("--top_k", type=int, default=0, help="sample from the k most likely tokens (0: all)")
    add("--top_p", type=float, default=1.0,
        help="sample from the most likely tokens with this total probability (1: all)")
    add("--no_repeat_ngram", type=int, default=0,
        help="do not repeat n-grams of this length (0: off)")
    add("--min_tokens", type=int, default=1, help="minimum caption length, in tokens (default: 1)")
    add("--max_tokens", type=int,
        help="maximum caption length, in tokens (default: as in training)")
    add("--length_penalty", type=float,
        help="beams are ranked by log-probability / length ** length_penalty (default: the "
             "checkpoint's)")
    add("--batch_size", type=int, default=64, help="images per batch (default: 64)")
    add("--seed", type=int, default=0, help="random seed for sampling (default: 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 or mps (default: the best available)")
    add("--dtype", default="auto", help="bfloat16 or float32 (default: the faster one)")
    add("--json", action="store_true",
        help="print a line of JSON per image: image, captions (text, logprob), references")
    add("--sheet", metavar="PNG", help="write a contact sheet of the images and captions")
    add("--attention", metavar="PNG",
        help="for each image and word, draw where the model looked: attention maps over the image "
             "(beam search only)")
    args = parser.parse_args()
    if args.beam and args.num_samples > 1:
        parser.error("--beam and --num_samples cannot be combined")
    if args.attention and args.num_samples > 1:
        parser.error("--attention and --num_samples cannot be combined")
    check_ranges(args, beam=(1, 1e4), num_samples=(1, 1e5), top_k=(0, 1e9),
                 no_repeat_ngram=(0, 1e9), min_tokens=(0, 1e9), max_tokens=(1, 1e9),
                 batch_size=(1, 1e6), limit=(1, 1e12), length_penalty=(0, 100),
                 seed=(0, 2**63 - 1), temperature=(1e-3, 1e3), top_p=(1e-6, 1))
    if args.num_samples == 1 and (args.temperature, args.top_k, args.top_p) != (1, 0, 1):
        parser.error("--temperature, --top_k and --top_p need --num_samples of at least 2")
    if args.max_tokens and args.min_tokens > args.max_tokens:
        parser.error(f"--min_tokens {args.min_tokens} exceeds --max_tokens {args.max_tokens}")
    for name in ("sheet", "attention"):
        if getattr(args, name):
            sheet_format(f"--{name}", getattr(args, name))
    if args.sheet and args.attention:
        if os.path.realpath(args.sheet) == os.path.realpath(args.attention):
            parser.error("--sheet and --attention need different files")
    return args


def find_images(paths, split, limit):
    """
    The images that --image names, as a list of (name, source, references). source is a path, a URL,
    bytes (stdin) or a uint8 array (S, S, 3). Only a prepared folder has arrays and references.
    """
    found = []
    for path in paths:
        if path == "-":
            found.append(("-", sys.stdin.buffer.read(), []))
        elif os.path.isfile(os.path.join(path, "meta.json")):
            found += prepared_images(path, split, limit)
        elif is_url(path):
            found.append((path, path, []))
        elif re.match(r"\w+://", path):
            raise UserError(f"{path}: only http:// and https:// URLs are supported")
        elif os.path.isdir(path):
            inside = images_in(path)
            found += [(file, file, []) for file in inside[:limit]]
        elif os.path.exists(path):
            found.append((path, path, []))
        else:
            raise UserError(f"--image {path}: no such file or folder")
    return found


def images_in(folder):
    """The paths of the images in a folder, at any depth. Reports other files on stderr."""
    images = []
    others = []
    for name, path in list_images(folder).items():
        if is_image(path):
            images.append(path)
        elif not os.path.basename(name).startswith("."):
            others.append(name)
    if not images:
        raise UserError(f"no images in {folder} (looked for JPEG, PNG and so on, at any depth)")
    if others:
        names = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        print(one_line(f"sample.py: skipped non-images in {folder}: {len(others)} ({names})"),
              file=sys.stderr)
    return images


def prepared_images(data_dir, split, limit):
    """find_images for a prepared folder."""
    split = Dataset(data_dir).split(split)
    n = min(limit or len(split), len(split))
    images = split.map_images()
    return [(split.names[i], images[i], split.captions[i]) for i in range(n)]


def make_batches(found, batch_size):
    """Splits find_images' list into batches. Arrays of different sizes go into separate batches."""
    batches = []
    for _, group in itertools.groupby(found, key=source_shape):
        group = list(group)
        batches += [group[i:i + batch_size] for i in range(0, len(group), batch_size)]
    return batches


def source_shape(item):
    """The shape of an array; None for other sources."""
    return getattr(item[1], "shape", None)


def load_batch(batch, image_size):
    """Loads a batch. Returns (name, image, references) of all readable images; reports the rest."""
    loaded = []
    for name, source, references in batch:
        try:
            if not isinstance(source, np.ndarray):
                source = load_image(source, image_size)
            loaded.append((name, source, references))
        except UserError as error:
            print(f"sample.py: error: {one_line(str(error))}", file=sys.stderr)
    return loaded


def print_captions(name, captions, references, as_json):
    """Prints the captions of one image."""
    if as_json:
        print(json.dumps(caption_record(name, captions, references)))
        return
    for found in captions:
        print(one_line(f"{name}: {found['text']}"))
    for reference in references:
        print(f"    reference: {reference}")


def main():
    """See the top of this file."""
    args = parse_args()
    found = find_images(args.image, args.split, args.limit)
    # a checkpoint's own beam size is not known yet; it is usually 3
    n_row = min(len(found), args.batch_size) * max(args.beam or 3, args.num_samples)
    captioner = load(args.out_dir, args.device, args.dtype, n_row)
    if args.attention:
        check_attention(captioner.model)
    files = [source for _, source, _ in found if isinstance(source, str)]
    for name in ("sheet", "attention"):
        if getattr(args, name):
            check_output(f"--{name}", getattr(args, name), files)
    names = ("beam", "temperature", "top_k", "top_p", "no_repeat_ngram", "min_tokens", "max_tokens",
             "length_penalty", "num_samples", "seed", "batch_size")
    options = {name: getattr(args, name) for name in names}
    options["attention"] = bool(args.attention)
    n_captioned = 0
    sheet = []
    strips = []
    # one batch at a time, to keep memory flat
    for batch in make_batches(found, args.batch_size):
        loaded = load_batch(batch, captioner.image_size)
        if not loaded:
            continue
        images = np.stack([image for _, image, _ in loaded])
        results = caption_images(captioner, images, **options)
        options["seed"] += len(loaded)  # different random numbers for each batch
        n_captioned += len(loaded)
        for (name, image, references), captions in zip(loaded, results):
            if args.attention:
                strips.append((image, captions[0]["text"], captions[0].pop("attention")))
            print_captions(name, captions, references, args.json)
            if args.sheet:
                lines = [c["text"] for c in captions]
                lines += [f"reference: {text}" for text in references]
                sheet.append((image, "\n".join(lines)))
        sys.stdout.flush()
    if sheet:
        paths = draw_sheet(args.sheet, *zip(*sheet))
        print(f"sheet: {', '.join(paths)}", file=sys.stderr)
    if strips:
        paths = draw_strips(args.attention, *zip(*strips))
        print(f"attention: {', '.join(paths)}", file=sys.stderr)
    if n_captioned < len(found):
        failed = len(found) - n_captioned
        print(f"sample.py: {failed} of {len(found)} images could not be captioned", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
