"""
Scores captions with METEOR and SPICE, using pycocoevalcap's Java programs.

    python evaluate.py --data_dir data/flickr30k --save captions.jsonl
    python dev/meteor_spice.py captions.jsonl

Needs Java and pycocoevalcap; SPICE needs Java 8 and downloads its models on first use.
"""
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanocaption.cli import Parser, UserError, run
from nanocaption.metrics import tokenize


def read_saved(path):
    """Captions and references that evaluate.py --save wrote: dicts {image number: [texts]}."""
    captions = {}
    references = {}
    try:
        with open(path, encoding="utf-8") as file:
            for i, line in enumerate(file):
                record = json.loads(line)
                captions[i] = [" ".join(tokenize(record["caption"]))]
                references[i] = [" ".join(tokenize(text)) for text in record["references"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error}); expected what evaluate.py --save writes"
                        ) from None
    if not captions:
        raise UserError(f"{path} is empty; expected what evaluate.py --save writes")
    return captions, references


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("captions", help="file written by evaluate.py --save")
    args = parser.parse_args()
    try:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.spice.spice import Spice
    except ImportError as error:
        raise UserError(f"pycocoevalcap is missing ({error}); pip install pycocoevalcap") from None
    if not shutil.which("java"):
        raise UserError("Java is missing: there is no java on the PATH; install it")
    captions, references = read_saved(args.captions)
    for name, metric in (("METEOR", Meteor), ("SPICE", Spice)):
        try:
            scorer = metric()
            # after an error, Meteor still holds its lock and would wait for it in __del__ forever;
            # a reentrant lock prevents that
            scorer.lock = threading.RLock()
            score, _ = scorer.compute_score(references, captions)
            print(f"{name} {score:.3f}")
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"{name} failed ({str(error)[:200]})")


if __name__ == "__main__":
    run(main)
