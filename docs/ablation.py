"""
What each part of config/nano.py is worth: the table in ablation.md. Every run has the same minutes on the same machine; a run
that is there already (out/ablation) is not done again, unless the config has changed: delete the folder when the code has.

    python docs/ablation.py --minutes 12 --seeds 0 1

Wants data/flickr8k and transformers (for docs/pretrain_gpt2.py).
"""
import argparse
import json
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
VARIANTS = {  # what changes: train.py's options
    "config/nano.py": [],
    "a decoder pretrained on the captions": ["--decoder=out/gpt2_captions"],
    "AdamW for all, no Muon": ["--optimizer=adamw"],
    "no depthwise convolutions": ["--local=False"],
    "no unigram loss": ["--unigram=0"],
    "patches by one linear layer": ["--stem=patch"],
    "no crops, no mirror images, no changes of light": ["--crop=1", "--flip=False", "--jitter=0"],
    "no hidden words": ["--word_dropout=0"],
    "the teacher in the loss (alpha 0.4)": ["--alpha=0.4"],
}
PRETRAINING = 2  # minutes of its time that the pretrained decoder's variant spends on language alone


def main():
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    call = lambda *command: subprocess.run([sys.executable, *map(str, command)], check=True, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    rows = {name: [] for name in VARIANTS}
    config = (HERE.parent / "config/nano.py").read_text()
    for seed in args.seeds:
        for name, options in VARIANTS.items():
            out, minutes = f"out/ablation/{zlib.crc32(repr((config, options, args.minutes)).encode()):08x}-{seed}", args.minutes
            if "--decoder=out/gpt2_captions" in options:
                minutes -= PRETRAINING
                if not (HERE.parent / "out/gpt2_captions/model.safetensors").exists():
                    call("docs/pretrain_gpt2.py", "data/flickr8k", "out/gpt2_captions", "--minutes", PRETRAINING)
            result = HERE.parent / out / "result.json"
            if not result.exists():
                call("train.py", "config/nano.py", f"--max_minutes={minutes}", f"--seed={seed}", f"--out_dir={out}", "--force",
                     "--eval_interval=100000", "--eval_images=1000", *options)
                found = call("evaluate.py", "--out_dir", out, "--data_dir", "data/flickr8k", "--json").stdout
                (HERE.parent / out / "last.pt").unlink()  # large
                steps = json.loads((HERE.parent / out / "log.jsonl").read_text().splitlines()[-1])["iter"]
                result.write_text(json.dumps(dict(json.loads(found), steps=steps)))
            rows[name].append(json.loads(result.read_text()))
            write(args, {name: results for name, results in rows.items() if results})


def write(args, rows):
    """The table as it stands, into ablation.md."""
    mean = lambda results, key: statistics.mean(r[key] for r in results)
    lines = [f"# {args.minutes:g} minutes each", "",
             "Flickr8k's dev photos (1,000), beam search; the mean of the seeds and, of CIDEr, each. `python docs/ablation.py`", "",
             "| | steps | loss, bits a character | more with exchanged pictures | CIDEr | seeds | distinct |",
             "|---|---|---|---|---|---|---|"]
    for name, results in rows.items():
        gap = statistics.mean((r["loss_shuffled"] / r["loss"] - 1) * r["bits_per_char"] for r in results)
        lines.append(f"| {name} | {mean(results, 'steps'):.0f} | {mean(results, 'bits_per_char'):.4f} | {gap:.3f} | {mean(results, 'cider'):.3f} | "
                     + " ".join(f"{r['cider']:.3f}" for r in results) + f" | {mean(results, 'distinct'):.2f} |")
    (HERE / "ablation.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
