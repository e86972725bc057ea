"""Self-critical sequence training (SCST, arXiv 1612.00563): reinforce captions that score well."""
import torch

from nanocaption.metrics import cider, cider_references, document_frequencies, tokenize

END = "<end>"  # counts as a word; without it, the model learns to stop early, such as after "on a"


def words_and_end(text):
    """A caption -> its words and END."""
    return tokenize(text) + [END]


def train_frequencies(captions):
    """Document frequencies of n-grams; captions: for each training image a list of texts."""
    return document_frequencies([[words_and_end(text) for text in texts] for texts in captions])


@torch.no_grad()
def sharpen(model):
    """
    Doubles the logits, which halves the temperature; does nothing if the last norm is frozen. After
    label smoothing, every token has some probability, and a sample that contains an absurd token
    teaches nothing but to avoid it.
    """
    if model.norm.weight.requires_grad:
        model.norm.weight *= 2
        model.norm.bias *= 2


@torch.no_grad()
def sample_captions(model, images, references, frequencies, tokenizer, k, seed):
    """
    Samples k captions of each image and scores them with CIDEr-D.

    references: for each image a list of texts; frequencies: from train_frequencies. Returns the
    captions, for each image k lists of token ids, and their rewards, float (B, k). Leaves the model
    in eval mode.
    """
    model.eval()
    captions = []
    texts = []
    for samples in model.sample(model.encode(images), k, min_tokens=0, seed=seed):
        captions.append([ids for ids, _ in samples])
        texts += [words_and_end(tokenizer.decode(ids)) for ids, _ in samples]
    words = [[words_and_end(text) for text in image_texts] for image_texts in references]
    _, prepared = cider_references(words, frequencies)
    repeated = [image_references for image_references in prepared for _ in range(k)]
    _, rewards = cider(texts, (frequencies, repeated))
    return captions, torch.tensor(rewards).view(-1, k)


def token_advantages(rewards, packed, max_tokens):
    """
    Each token's weight in the loss, float (B, T): how much better its caption's reward is than the
    mean of the image's other samples (arXiv 2003.09971). rewards (B, k); packed: from model.pack.
    """
    k = rewards.size(1)
    advantage = (rewards - rewards.mean(1, keepdim=True)) * k / (k - 1)
    caption = (packed["segment"] - 1).clamp(min=0)  # padding: any value, the loss skips it
    advantage = advantage.gather(1, caption)
    # at the maximum length, EOT was forced, not sampled
    advantage[packed["position"] == max_tokens - 1] = 0
    return advantage
