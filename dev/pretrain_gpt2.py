"""
Trains a small GPT-2 on the captions of a prepared folder, without images, and saves it as
transformers does:

    python dev/pretrain_gpt2.py data/flickr8k out/gpt2_captions --minutes 2
    python train.py config/nano.py --data_dir=data/flickr8k --decoder=out/gpt2_captions

Needs transformers, so that pretrained.py also reads files that our own code did not write.
"""
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanocaption.cli import Parser, UserError, check_ranges, run
from nanocaption.dataset import Dataset

BATCH_SIZE = 160
LEARNING_RATE = 1e-3
WARMUP = 50  # steps


def caption_tensors(data, block_size):
    """The training captions, each an int64 tensor that starts with EOT, cut to block_size."""
    split = data.split("train")
    eot_token = data.vocab_size - 1
    captions = []
    for image_captions in split.read_tokens(range(len(split))):
        for words in image_captions:
            captions.append(torch.tensor([eot_token, *words, eot_token][:block_size]))
    return captions


def epoch_batches(captions, rng):
    """One epoch of batches: captions of similar lengths together, to save padding."""
    lengths = [len(caption) + rng.random() for caption in captions]
    order = np.argsort(lengths)
    starts = range(0, len(order), BATCH_SIZE)
    for start in rng.permutation(starts):
        yield [captions[i] for i in order[start:start + BATCH_SIZE]]


def train_model(model, captions, minutes):
    """Trains for the given minutes, with cosine decay of the learning rate."""
    eot_token = model.config.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    rng = np.random.default_rng(0)
    start = time.monotonic()
    progress = 0.0
    step = 0
    while progress < 1:
        for batch in epoch_batches(captions, rng):
            tokens = pad_sequence(batch, batch_first=True, padding_value=eot_token)
            labels = pad_sequence(batch, batch_first=True, padding_value=-100)
            loss = model(tokens, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step += 1
            progress = min((time.monotonic() - start) / 60 / minutes, 1.0)
            lr = LEARNING_RATE * min(step / WARMUP, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                left = (1 - progress) * minutes
                print(f"step {step} | loss {loss.item():.4f} | {left:.1f} minutes left", flush=True)
            if progress == 1:
                break


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("data_dir", help="written by prepare_flickr.py")
    parser.add_argument("out_dir", help="folder to save the model in")
    parser.add_argument("--minutes", type=float, default=2, help="training time (default: 2)")
    parser.add_argument("--n_layer", type=int, default=3)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--block_size", type=int, default=48,
                        help="maximum caption length in tokens, as in train.py (default: 48)")
    args = parser.parse_args()
    check_ranges(args, minutes=(0.001, 1e6), n_layer=(1, 1000), n_head=(1, 1000), n_embd=(1, 1e5),
                 block_size=(2, 1e5))
    if args.n_embd % args.n_head:
        raise UserError(f"n_embd {args.n_embd} must be a multiple of n_head {args.n_head}")
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("needs transformers; install it with pip install transformers") from None
    data = Dataset(args.data_dir)
    captions = caption_tensors(data, args.block_size)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=data.vocab_size, n_positions=args.block_size, n_embd=args.n_embd,
        n_layer=args.n_layer, n_head=args.n_head, bos_token_id=data.vocab_size - 1,
        eos_token_id=data.vocab_size - 1)
    model = GPT2LMHeadModel(config)
    train_model(model, captions, args.minutes)
    model.save_pretrained(args.out_dir)


if __name__ == "__main__":
    run(main)
