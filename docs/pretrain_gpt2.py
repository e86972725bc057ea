"""
A small decoder in GPT-2's shape, trained on the captions of a prepared folder alone and saved as the hub has such models:

    python docs/pretrain_gpt2.py data/flickr8k out/gpt2_captions --minutes 2
    python train.py config/nano.py --decoder=out/gpt2_captions --max_minutes=10

Needs transformers, so that what pretrained.py reads was written by others' code.
"""
import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run  # before what is slow to import: from here on Ctrl-C is answered in one line

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from prepare_flickr import load_meta, read_split


def main():
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("out_dir")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--longest", type=int, default=48, help="tokens of the longest caption: block_size of what is trained from it")
    args = parser.parse_args()
    from transformers import GPT2Config, GPT2LMHeadModel
    data, n_vocab = read_split(args.data_dir, "train"), load_meta(args.data_dir)["vocab_size"]
    ends = data["captions"].tolist()
    captions = [torch.tensor([n_vocab - 1, *data["tokens"][a:b][:args.longest - 1].tolist()]) for a, b in zip(ends[:-1], ends[1:])]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=n_vocab, n_positions=args.longest, n_embd=args.width, n_layer=args.layers,
                                       n_head=args.heads, bos_token_id=n_vocab - 1, eos_token_id=n_vocab - 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
    rng, began, step, done = np.random.default_rng(0), time.monotonic(), 0, 0.0
    while done < 1:
        order = np.argsort([len(c) + rng.random() for c in captions])  # alike ones stand together: little padding
        for batch in rng.permutation(-(-len(captions) // 160)):
            chosen = [captions[i] for i in order[batch * 160:(batch + 1) * 160]]
            loss = model(pad_sequence(chosen, True, n_vocab - 1), labels=pad_sequence(chosen, True, -100)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            done, step = (time.monotonic() - began) / 60 / args.minutes, step + 1
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(step / 50, 1) * (1 + math.cos(math.pi * min(done, 1))) / 2
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                print(f"step {step} | loss {loss.item():.4f} | {max(1 - done, 0) * args.minutes:.1f} minutes left", flush=True)
            if done >= 1:
                break
    model.save_pretrained(args.out_dir)


if __name__ == "__main__":
    run(main)
