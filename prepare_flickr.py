"""
Turns images and captions (Flickr30k, Flickr8k, COCO or your own) into binary files for train.py.

    python prepare_flickr.py                 # downloads Flickr30k (4.4 GB) into data/flickr30k
    python prepare_flickr.py --images photos/ --captions captions.jsonl --out_dir data/mine

data/README.md describes the caption formats and the files that are written.
"""
import hashlib
import os
import re
import time
import unicodedata
from collections import Counter, defaultdict

from nanocaption import download
from nanocaption.captions import match_names, read_captions, read_text
from nanocaption.cli import Parser, UserError, atomic_write, check_ranges, lock_folder, run
from nanocaption.dataset import SPLITS, Dataset, clear_dataset, dataset_files, write_texts
from nanocaption.images import has_image_extension, list_folder, list_images, stem, write_images
from nanocaption.tokenizer import read_tokenizer

FLICKR30K_URL = f"{download.HUB}/datasets/nlphuji/flickr30k/resolve/main"
FLICKR30K = {"train": 29000, "val": 1014, "test": 1000}  # images in Karpathy's split
# options that decide what is written
SOURCE_OPTIONS = (
    "images", "captions", "split_files", "image_size", "vocab_size", "tokenizer", "keep_used"
)
SPLIT_PREFIX = re.compile("(train|val|test)=")


# ------------------------------------------------------------------------------------------------
# is the folder up to date?


def describe_source(args):
    """What the data is made from: the options, and the signatures of the input files."""
    source = {name: getattr(args, name) for name in SOURCE_OPTIONS}
    source["inputs"] = {}
    # downloaded files don't change, and the archive may be deleted
    if not args.url:
        for path in input_files(args):
            source["inputs"][path] = signature(path)
    return source


def input_files(args):
    """The paths of everything that is read."""
    files = [args.images]
    for file in args.captions:
        files.append(SPLIT_PREFIX.sub("", file, count=1))
    files += args.split_files or []
    if os.path.exists(args.tokenizer):
        files.append(args.tokenizer)
    return files


def signature(path):
    """Numbers that change with a file (size, time) or a folder (number of files, size, time)."""
    if os.path.isdir(path):
        stats = []
        for file in list_folder(path).values():
            # for a broken link, the stat of the link itself
            stats.append(os.stat(file, follow_symlinks=os.path.exists(file)))
        size = sum(stat.st_size for stat in stats)
        return [len(stats), size, max((stat.st_mtime_ns for stat in stats), default=0)]
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    return [stat.st_size, stat.st_mtime_ns]


def is_up_to_date(out_dir, source):
    """Whether out_dir was made from this source. Raises UserError if it was made from another."""
    if not os.path.exists(f"{out_dir}/meta.json"):
        return False
    old = Dataset(out_dir).meta["source"]
    for name in SOURCE_OPTIONS:
        if old.get(name) != source[name]:
            raise UserError(
                f"{out_dir} was prepared {describe_option(name, old.get(name))}, but now it is "
                f"{describe_option(name, source[name])}; choose another --out_dir or use --force "
                "to replace it"
            )
    for path, found in source["inputs"].items():
        if old["inputs"].get(path) != found:
            raise UserError(
                f"{path} has changed since {out_dir} was prepared; use --force to rebuild"
            )
    return True


def describe_option(name, value):
    """"with --image_size 160", or "without --split_files"."""
    if value is None or value is False:
        return f"without --{name}"
    if value is True:
        return f"with --{name}"
    return f"with --{name} " + (" ".join(value) if isinstance(value, list) else str(value))


def check_overwrite(args):
    """Raises UserError if an input file would be overwritten."""
    written = {os.path.realpath(path) for path in dataset_files(args.out_dir)}
    for path in input_files(args):
        if os.path.realpath(path) in written:
            raise UserError(f"{path} would be overwritten; choose another --out_dir")


# ------------------------------------------------------------------------------------------------
# captions and splits


def read_all_captions(files, skipped):
    """
    Caption files, FILE or train=FILE -> {name: [captions]}, {name: split or None}. Malformed lines
    are appended to skipped.
    """
    captions = defaultdict(list)
    splits = {}
    for path in files:
        given = None
        prefix = SPLIT_PREFIX.match(path)
        if prefix:
            given = prefix[1]
            path = path[prefix.end():]
        malformed = []
        for name, text, split in read_captions(path, malformed):
            # names in Hugging Face's metadata.jsonl are relative to its folder
            beside = os.path.join(os.path.dirname(path), name)
            if os.path.isfile(beside):
                name = os.path.abspath(beside).replace(os.sep, "/")
            split = given or split
            if splits.setdefault(name, split) != split:
                both = f"{splits[name] or 'none'} and {split or 'none'}"
                raise UserError(f"{path}: {name} is in two splits, {both}; give it one")
            captions[name].append(text)
        skipped += [("caption", line) for line in malformed]
    return captions, splits


def read_split_files(files, names):
    """
    Lists of image names, in the order train, val, test -> {name: split} and the entries that match
    none of the names, list[str].
    """
    splits = {}
    unknown = []
    lists = dict(zip(SPLITS, files))
    for split, path in lists.items():
        ids = [line.strip() for line in read_text(path).split("\n") if line.strip()]
        ids = list(dict.fromkeys(ids))  # without duplicates
        found = match_names(ids, names)
        unknown += [f"{path}: {id}" for id in ids if id not in found]
        for name in found.values():
            if splits.setdefault(name, split) != split:
                other = lists[splits[name]]
                raise UserError(f"{name} is in two lists, {other} and {path}")
    return splits, unknown


def hashed_split(name):
    """90% train, 5% val, 5% test by a hash of the file name: new images don't move old ones."""
    name = unicodedata.normalize("NFC", stem(name))
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    u = int(digest[:8], 16) / 2**32
    if u < 0.90:
        return "train"
    if u < 0.95:
        return "val"
    return "test"


def captions_by_path(captions, splits, entries, source, skipped):
    """
    Finds the images of captions, {name: [captions]}, among entries, list_images(source).

    splits: {name: split or None}; names that are not in it are left out. Returns {path:
    [captions]}, in the order of splits, and {path: split}. Captions that are empty or have no image
    are appended to skipped.
    """
    found = match_names(captions, entries, source)
    texts = defaultdict(list)
    split_of = {}
    for name, split in splits.items():
        path = found.get(name)
        for text in captions[name]:
            if not text.strip():
                skipped.append(("caption", f"{name}: empty"))
                continue
            if path is None:
                skipped.append(("caption", f"{name}: no such image in {source}: {text}"))
                continue
            texts[path].append(text)
            if split is None:
                split = hashed_split(path)
            if split_of.setdefault(path, split) != split:
                raise UserError(
                    f"{path} is in two splits, {split_of[path]} and {split}, under two names"
                )
    return texts, split_of


def fill_val(split_of):
    """
    Training needs at least two val images, and with few images the hash may put fewer there. If so,
    moves some to val, in place, first from test, but not the last one of train. split_of: {path:
    split}.
    """
    paths = {split: [path for path in split_of if split_of[path] == split] for split in SPLITS}
    n_missing = max(2 - len(paths["val"]), 0)
    for path in (paths["test"] + paths["train"][1:])[:n_missing]:
        split_of[path] = "val"


# ------------------------------------------------------------------------------------------------
# from files to a prepared folder


def prepare(args):
    """Turns images and captions into a prepared folder; prints a summary."""
    source = describe_source(args)
    if not args.force and is_up_to_date(args.out_dir, source):
        print(f"{args.out_dir} is up to date (use --force to rebuild)")
        return
    check_overwrite(args)
    os.makedirs(args.out_dir, exist_ok=True)
    with lock_folder(args.out_dir):
        if args.url:
            download_flickr30k(args)
        convert(args, source)
    if args.delete_archive:
        os.remove(args.images)


def download_flickr30k(args):
    """Downloads the files of Flickr30k that are missing."""
    os.makedirs(os.path.dirname(args.images), exist_ok=True)
    token = None
    if args.url.startswith(f"{download.HUB}/"):
        token = os.environ.get("HF_TOKEN")
    for path in (*args.captions, args.images):
        url = f"{args.url.rstrip('/')}/{os.path.basename(path)}"
        download.download(url, path, token)


def convert(args, source):
    """Writes the prepared folder. source: describe_source(args), for meta.json."""
    start = time.monotonic()
    out_dir = args.out_dir
    known = read_tokenizer(args.tokenizer)
    skipped = []  # (kind, what)

    # captions and splits, by the names in the caption files
    captions, splits = read_all_captions(args.captions, skipped)
    n_captions = sum(map(len, captions.values())) + len(skipped)
    if args.url:
        check_flickr30k(args.captions[0], splits)
    unknown = []
    if args.split_files:
        splits, unknown = read_split_files(args.split_files, captions)
        skipped += [("image", f"{entry}: in the list, but has no captions") for entry in unknown]
    else:
        check_all_or_none(splits)

    # images, by their paths inside the folder or archive
    entries = list_images(args.images)
    texts, split_of = captions_by_path(captions, splits, entries, args.images, skipped)
    if not any(splits.values()):
        fill_val(split_of)
    images = group_by_split(texts, split_of)
    if not captions and skipped:
        write_skipped(out_dir, skipped)
        raise UserError(
            f"nothing to train on: no usable captions; first problem: {skipped[0][1]}; "
            f"see {out_dir}/skipped.txt"
        )
    if args.split_files and "train" not in splits.values():
        raise UserError(f"nothing to train on: no name in {args.split_files[0]} has captions")
    if "train" not in images:
        write_skipped(out_dir, skipped)
        raise UserError(
            f"nothing to train on: {len(captions):,} names in the captions (such as "
            f"{next(iter(captions), '')}) and {len(entries):,} files in {args.images} (such as "
            f"{next(iter(entries), '')}) have {len(texts):,} in common, none of them in train"
        )
    check_skipped(out_dir, skipped, "caption", n_captions, args.allow_missing)
    clear_dataset(out_dir)
    errors = write_images(args.images, entries, images, out_dir, args.image_size, args.workers)
    skipped += [("image", f"{path}: {error}") for path, error in errors.items()]
    check_skipped(out_dir, skipped, "image", len(texts) + len(unknown), args.allow_missing)

    # texts
    names = short_names(texts)
    written = {}
    for split, paths in images.items():
        paths = [path for path in paths if path not in errors]
        if paths:
            written[split] = ([names[path] for path in paths], [texts[path] for path in paths])
    meta = write_texts(
        out_dir, written, args.image_size, args.tokenizer, known, args.vocab_size, source,
        args.keep_used,
    )

    # summary
    for split, n in meta["splits"].items():
        print(
            f"{split}: {n['images']:,} images, {n['captions']:,} captions, {n['tokens']:,} tokens, "
            f"at most {n['longest']} per caption"
        )
    n_val = meta["splits"].get("val", {}).get("images", 0)
    if n_val < 2:
        print(
            f"val images: {n_val}, but training needs at least 2; run this again with --force and "
            "--split_files TRAIN_LIST VAL_LIST"
        )
    print(
        f"{out_dir}: vocabulary of {meta['vocab_size']:,}, {time.monotonic() - start:.0f} seconds"
    )
    if args.split_files:
        print(f"captioned images not in any list: {len(captions) - len(splits):,}")
    unused = [path for path in entries if has_image_extension(path) and path not in texts]
    if unused:
        print(f"images without captions or not in any list: {len(unused):,}, such as {unused[0]}")
    count = Counter(kind for kind, _ in skipped)
    line = f"skipped images: {count['image']:,}, captions: {count['caption']:,}"
    if skipped:
        line += f" (see {out_dir}/skipped.txt)"
    print(line)


def check_flickr30k(path, splits):
    """Raises UserError unless splits are Karpathy's."""
    found = Counter(splits.values())
    if found != FLICKR30K:
        raise UserError(
            f"{path}: expected Karpathy's split, {FLICKR30K}, found {dict(found)}; "
            "delete the file to download it again"
        )


def check_all_or_none(splits):
    """Raises UserError if some images have a split and others have none."""
    without = [name for name, split in splits.items() if split is None]
    if without and len(without) < len(splits):
        raise UserError(
            f"{without[0]} has no split, but others do; use --split_files or --captions train=FILE"
        )


def group_by_split(texts, split_of):
    """{split: [paths]} in the order of SPLITS, without empty splits."""
    groups = {}
    for split in SPLITS:
        paths = [path for path in texts if split_of[path] == split]
        if paths:
            groups[split] = paths
    return groups


def short_names(paths):
    """
    {path: file name}, so that the data does not depend on how the images are packed. A file name
    that occurs twice keeps its folder.
    """
    names = {path: unicodedata.normalize("NFC", os.path.basename(path)) for path in paths}
    count = Counter(names.values())
    return {path: name if count[name] == 1 else path for path, name in names.items()}


def write_skipped(out_dir, skipped):
    """Writes skipped.txt, a line "kind<TAB>what" for each, if there are any."""
    if skipped:
        lines = "".join(f"{kind}\t{what}\n" for kind, what in skipped)
        with atomic_write(f"{out_dir}/skipped.txt") as file:
            file.write(lines.encode("utf-8", "replace"))


def check_skipped(out_dir, skipped, kind, total, allow_missing):
    """Writes skipped.txt. Raises UserError if over 1% of a kind are in it, unless allow_missing."""
    write_skipped(out_dir, skipped)
    bad = [what for skipped_kind, what in skipped if skipped_kind == kind]
    if len(bad) > 0.01 * total and not allow_missing:
        raise UserError(
            f"{len(bad):,} of {total:,} {kind}s can't be used (more than 1%), such as {bad[0]}; "
            f"see {out_dir}/skipped.txt, or use --allow_missing to continue without them"
        )


# ------------------------------------------------------------------------------------------------
# command line


def read_arguments():
    """The options of the command line, checked, with defaults filled in."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--images", help="folder, .zip or .tar(.gz) of images "
        "(default: download Flickr30k, 4.4 GB, into data/flickr30k)")
    add("--captions", nargs="+", metavar="FILE",
        help="caption files in any supported format; train=FILE sets the split of a file")
    add("--split_files", nargs="+", metavar="LIST",
        help="files that list the image names of TRAIN [VAL [TEST]] (default: the splits in the "
        "caption files, or else 90/5/5 by a hash of the name)")
    add("--out_dir", help="where to write (default: data/NAME, named after --images)")
    add("--image_size", type=int, default=160,
        help="side of the stored images in pixels (default: %(default)s)")
    add("--vocab_size", type=int, default=8192,
        help="with bpe: maximum number of tokens, including EOT (default: %(default)s)")
    add("--tokenizer", default="bpe",
        help="bpe (learned from the training captions), gpt2, a prepared folder, a checkpoint, a "
        "Hugging Face name (OWNER/NAME) or a folder with a tokenizer.json (default: bpe)")
    add("--keep_used", action="store_true",
        help="keep only those tokens of an existing --tokenizer that the training captions use")
    add("--workers", type=int, default=os.cpu_count(),
        help="processes that decode images (default: one per core)")
    add("--force", action="store_true", help="rebuild out_dir even if it is up to date")
    add("--allow_missing", action="store_true",
        help="continue even if more than 1%% of the images or captions can't be used")
    add("--url", metavar="BASE",
        help="base URL of Flickr30k's files (default: nlphuji/flickr30k on huggingface.co)")
    add("--delete_archive", action="store_true",
        help="delete the downloaded archive after preparing")
    args = parser.parse_args()

    check_ranges(args, image_size=(8, 4096), vocab_size=(257, 65536), workers=(1, 1024))
    if args.split_files and len(args.split_files) > 3:
        raise UserError(
            f"--split_files: expected TRAIN [VAL [TEST]], found {len(args.split_files)} files"
        )
    if bool(args.images) != bool(args.captions):
        raise UserError("expected both --images and --captions, or neither to download Flickr30k")
    if args.images:
        if args.url or args.delete_archive:
            raise UserError("--url and --delete_archive are only for downloading Flickr30k")
        if not args.out_dir:
            name = os.path.basename(os.path.abspath(args.images))
            args.out_dir = f"data/{name.split('.')[0]}"
        folder = os.path.realpath(args.images)
        if os.path.commonpath([folder, os.path.realpath(args.out_dir)]) == folder:
            raise UserError(
                f"--out_dir {args.out_dir} is inside --images {args.images}; choose another"
            )
    else:
        args.url = args.url or FLICKR30K_URL
        if not download.is_url(args.url):
            raise UserError(f"--url {args.url}: expected http:// or https://")
        args.out_dir = args.out_dir or "data/flickr30k"
        args.images = "data/flickr30k/flickr30k-images.zip"
        args.captions = ["data/flickr30k/flickr_annotations_30k.csv"]
    return args


def main():
    """The command line; see the top of this file."""
    prepare(read_arguments())


if __name__ == "__main__":
    run(main)
