"""
The captioner: a frozen GPT, a frozen eye, and the one thing that is trained, the bridge between them.

    python train_caption.py                                   # nothing prepared: built-in scenes, end to end, two minutes on a laptop, 94% right
    python train_caption.py fusion=all                        # five variants side by side
    python train_caption.py image=a.jpg,photos beam=5         # caption pictures of your own with the newest run
    python train_caption.py data=data/coco2017 gpt=gpt2       # COCO on one GPU, once `python coco.py` has encoded it
    torchrun --standalone --nproc_per_node=8 train_caption.py data=data/coco2017 gpt=out/gpt2/ckpt.pt
    python train_caption.py init_from=out/caption_coco2017_xattn1 scst=True learning_rate=1e-5 min_lr=1e-5 max_steps=924   # on, for CIDEr

Three bridges:
  xattn    before every `every`-th block of the GPT, a gated cross-attention block lets each word look at the picture (Flamingo,
           Alayrac et al. 2022). Its gates start at zero: training starts from the GPT exactly as it was, and opens its eyes little by little.
  linear   the picture's tokens, through one matrix, are put before the words as if they were words (ClipCap, LLaVA).
  qformer  32 learned queries read the picture first, and what they found is put before the words (BLIP-2, Li et al. 2023).

The defaults are the published recipes on COCO 2017 with GPT-2 124M and CLIP ViT-B/32, which report CIDEr 57.1 / 55.9 / 47.8 for a gated block
before every layer, every 2nd, every 4th; about 12 for linear; 35.0 for qformer (their protocol, `single_reference=True`: see below).
Writes out_dir/{ckpt.pt, log.csv, results.json, captions_val2017.json, curves.png, captions.png, attention.png}.
"""
import functools
import glob
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel

from fineweb import configure, die, download, get_tokenizer, print_settings
from train_gpt2 import (GPT, GPTConfig, KVCache, Log, MLP, beam_search, curve, decode, get_lr, finish, load_checkpoint, load_weights, make_optimizers,
                        warn_changed, local_main_process_first, plot, pyplot, read_log, resume_optimizers, save_checkpoint, setup, start_wandb,
                        stop_signals, all_reduce_sum, optimizer_step)
from cider import document_frequencies, evaluate as score, tokenize
from coco import encode, fingerprint, load_captions, load_encoder, load_features, open_image, save_json, fraction_right, splits_of

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python train_caption.py name=value` overrides any of them

data: str = None            # a folder in COCO's layout; None = data/coco2017 if it is there, else the built-in scenes
out_dir: str = None         # where the run goes; None = out/caption_{data}_{fusion}
init_from = "scratch"       # scratch | resume (out_dir/ckpt.pt) | another run (its folder or ckpt.pt): starts from its bridge, with its settings
eval_only = False           # with init_from=resume: evaluate and draw, train nothing
gpt = "gpt2"                # the frozen writer: gpt2, gpt2-medium, ... | a folder, .safetensors or ckpt.pt
encoder = "ViT-B-32"        # the frozen eye, whose features coco.py wrote
split = "val2017"           # held-out pictures; test2017 for data sets that have one, such as COCO in Karpathy's splits
fusion = "xattn"            # one of xattn | linear | qformer | all: xattn, linear, qformer; all = train every variant and compare
every = 1                   # >= 1: xattn: a gated block before every so-manieth block of the GPT
n_query = 32                # >= 1: qformer: how many learned queries
dropout = 0.1               # >= 0, < 1: xattn, qformer: on what the bridge makes of the picture
shuffle = False             # give every picture another one's features: what a captioner scores that can't see
batch_size = 128            # >= 1: pictures a step, over all processes; each with one of its captions, drawn anew each epoch
max_length = 40             # >= 1: longest caption, in tokens; the rest is cut, counted and said
optimizer = "adamw"         # one of adamw | muon: adamw, or muon for the bridge's matrices
learning_rate = 2e-4        # > 0: the peak
min_lr = 1e-4               # >= 0: where the cosine ends
warmup_steps = 0            # >= 0
max_steps = 7_392           # >= 1: 8 epochs of 118,287 pictures
weight_decay = 0.1          # >= 0
beta2 = 0.95                # >= 0, < 1: AdamW's second; the first is 0.9
grad_clip = 1.0             # >= 0
scst = False                # train on CIDEr itself, from a bridge that init_from= names
samples = 5                 # >= 2: scst: captions drawn for each picture, which compete
eval_interval = 924         # >= 1: steps between evaluations, each followed by a checkpoint: an epoch
log_interval = 20           # >= 1: steps between printed lines
single_reference = False    # score by the published table's protocol as well
beam = 1                    # >= 1: final captions and image=: beam search among so many, 1 = greedy
image: str = None           # caption pictures, folders, globs, URLs (a,b,...) with out_dir's checkpoint (None: the newest) and train nothing
num = 1                     # >= 1: image=: captions a picture
temperature = 1.0           # >= 0: image=: 0 takes the likeliest word each time
top_k = 10                  # >= 1: image=: choose among so many words
seed = 1337                 # >= 0
device: str = None          # cuda, cpu, mps; None takes the best there is
dtype: str = None           # one of bfloat16 | float32: bfloat16 or float32 for the matmuls; None = bfloat16 on CUDA
compile: bool = None        # torch.compile the training step; None = on CUDA
wandb_log = False           # mirror the log to Weights & Biases

# The published prefix runs had a recipe of their own, one epoch long: fusion=linear and fusion=qformer take it where the command line is silent.
PREFIX_RECIPE = dict(batch_size=256, learning_rate=1e-4, min_lr=5e-5, weight_decay=0.05, beta2=0.98, max_steps=463, eval_interval=463)
# What a run that starts from another one takes over from it, likewise:
INHERITED = ("data", "gpt", "encoder", "fusion", "every", "n_query", "dropout", "shuffle", "batch_size", "max_length", "optimizer", "weight_decay",
             "beta2")

# Where there is no COCO, and no data= names another data set: drawn scenes, which `take_the_built_in_road` makes.
SHAPES_PRESET = dict(data="data/shapes", gpt="out/gpt2_shapes/ckpt.pt", encoder="tagger", batch_size=64, optimizer="muon", learning_rate=8e-3,
                     min_lr=4e-4, warmup_steps=20, weight_decay=0.0, beta2=0.95, dropout=0.0, max_steps=360, eval_interval=90, log_interval=20)
VARIANTS = (("xattn", 1), ("xattn", 2), ("xattn", 4), ("linear", 1), ("qformer", 1))  # what fusion=all compares: (fusion, every)

# ----------------------------------------------------------------------------------------------------------------------
# the bridges. B pictures, S tokens each, W wide as the encoder made them; R rows of words about them, T long, each row with an `image_idx`, its
# picture; C = n_embd, H = n_head, D = C / H; P prefix tokens; V = vocab_size


class GatedCrossAttention(nn.Module):
    """Flamingo's block: words x (R, T, C) ask, the picture answers; each half is added through tanh(gate), with gate = 0 at the start."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(n_embd)
        self.c_q = nn.Linear(n_embd, n_embd)
        self.c_kv = nn.Linear(n_embd, 2 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.attn_gate = nn.Parameter(torch.zeros(()))
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd)
        self.mlp_gate = nn.Parameter(torch.zeros(()))

    def image_kv(self, picture):
        """Keys and values of the pictures (B, S, C): (2, B, H, S, D). They are the same for every word, so they are computed once."""
        B, S, C = picture.shape
        kv = self.c_kv(picture).view(B, S, 2, self.n_head, C // self.n_head)
        return kv.permute(2, 0, 3, 1, 4).contiguous()  # else every word would copy them into this order

    def forward(self, x, kv, weights=None):
        R, T, C = x.shape
        q = self.c_q(self.ln_1(x)).view(R, T, self.n_head, C // self.n_head).transpose(1, 2)  # (R, H, T, D)
        # Every word sees the whole picture: nothing is causal here. Written out, as for so few keys F.scaled_dot_product_attention is no
        # help: in bfloat16 on a CPU it takes four times as long.
        attention = (q @ kv[0].mT * q.shape[-1] ** -0.5).softmax(-1)  # (R, H, T, S)
        if weights is not None:  # for drawing: where each word looks, (R, T, S), mean over heads
            weights.append(attention.mean(1))
        y = attention @ kv[1]  # (R, H, T, D)
        x = x + self.attn_gate.tanh() * self.c_proj(y.transpose(1, 2).reshape(R, T, C))
        return x + self.mlp_gate.tanh() * self.mlp(self.ln_2(x))


class QFormer(nn.Module):
    """Learned queries that attend to each other and to the picture through two layers, and leave as n_query prefix tokens."""

    def __init__(self, width, n_embd, n_query, dropout, n_layer=2, n_head=8):
        super().__init__()
        self.read = nn.Linear(width, n_embd)
        self.queries = nn.Parameter(0.02 * torch.randn(1, n_query, n_embd))
        self.layers = nn.ModuleList([
            nn.TransformerDecoderLayer(n_embd, n_head, 4 * n_embd, dropout, "gelu", batch_first=True, norm_first=True) for _ in range(n_layer)])
        self.write = nn.Sequential(nn.LayerNorm(n_embd), nn.Linear(n_embd, n_embd))

    def forward(self, features):
        picture = self.read(features)  # (B, S, C)
        x = self.queries.expand(len(features), -1, -1)  # (B, P, C)
        for layer in self.layers:
            x = layer(x, picture)
        return self.write(x)


class Captioner(nn.Module):
    """A frozen GPT and a trainable bridge. Without a picture it is that GPT, whatever the bridge has learned."""

    def __init__(self, gpt, fusion, every, width, n_query=32, dropout=0.1):
        super().__init__()
        C, config = gpt.config.n_embd, gpt.config
        self.gpt, self.fusion = gpt.requires_grad_(False), fusion
        if fusion == "xattn":
            self.project = nn.Sequential(nn.Linear(width, C), nn.LayerNorm(C), nn.Dropout(dropout))
            self.gated = nn.ModuleDict({str(layer): GatedCrossAttention(C, config.n_head) for layer in range(0, config.n_layer, every)})
        else:
            self.project = nn.Linear(width, C) if fusion == "linear" else QFormer(width, C, n_query, dropout)
            self.gated = nn.ModuleDict()

    def to_process(self, process):
        """
        Moves to the device. Where matmuls run in bfloat16, the frozen matrices are kept in it: autocast remembers its copies of trained
        weights only, and would make those of the frozen ones anew for every batch and every word.
        """
        if process.dtype == torch.bfloat16:
            for name, p in self.gpt.named_parameters():
                if p.dim() == 2 and not name.endswith("wpe.weight"):
                    p.data = p.data.bfloat16()
        return self.to(process.device)

    def encode_image(self, features, image_idx=None):
        """
        Features (B, S, W) -> what the GPT gets of them: keys and values for each gated block, or a prefix (R, P, C). image_idx (R,): which
        of the pictures each row of words is about; None = row i about picture i.
        """
        picture = self.project(features)
        rows = slice(None) if image_idx is None else image_idx
        if not self.gated:
            return picture[rows]
        return {layer: block.image_kv(picture)[:, rows] for layer, block in self.gated.items()}

    def hidden(self, idx, image=None, kv_cache=None, weights=None):
        """Tokens idx (R, T), the next after those in the cache, and `look(features)` -> (R, T, C), of which `gpt.head` makes logits."""
        P = image.shape[1] if torch.is_tensor(image) else 0
        seen = kv_cache.pos if kv_cache else 0
        x = self.gpt.embed(idx, max(0, seen - P))  # the prefix has no positions of its own: the first word is at 0, as the GPT is used to
        if P and not seen:
            x = torch.cat([image.to(x.dtype), x], 1)  # (R, P+T, C)
        for layer, block in enumerate(self.gpt.transformer.h):
            if image is not None and str(layer) in self.gated:
                x = self.gated[str(layer)](x, image[str(layer)], weights)
            x = block(x, kv_cache, layer)
        if kv_cache:
            kv_cache.pos += x.shape[1]
        return x[:, -idx.shape[1]:]  # words only: nothing is predicted from the prefix but the first word, from BOS

    def logits(self, idx, image=None, kv_cache=None):
        """The logits (R, T, V) of `hidden`."""
        return self.gpt.head(self.hidden(idx, image, kv_cache))

    def forward(self, idx, features, targets, image_idx=None, weight=None):
        """
        The summed cross-entropy of targets (R, T), in nats; -100 marks padding. features=None leaves the GPT without a picture.
        weight (R,): how much each row counts, which scst sets.
        """
        image = None if features is None else self.encode_image(features, image_idx)
        return self.loss(self.hidden(idx, image), targets, weight)

    @torch.compiler.disable  # no two batches have equally many words: compiled, it would be compiled again and again
    def loss(self, x, targets, weight):
        real = targets >= 0
        share = torch.ones_like(targets, dtype=torch.float32) if weight is None else weight[:, None].expand_as(targets)  # (R, T)
        return self.gpt.cross_entropy(x[real], targets[real], share[real])[0]

    @torch.no_grad()
    def generate(self, features, bos, max_new_tokens, temperature=0.0, top_k=None, num=1, beam=1):
        """
        num captions for each of B pictures (B, S, W): tokens (B * num, up to max_new_tokens), ended by `bos`, which is also EOS. beam=1
        takes the likeliest word each time (temperature 0) or draws it, see `decode`; beam>1 takes the num best that `beam_search` finds.
        """
        B, copies = len(features), max(num, beam)
        image = self.encode_image(features, torch.arange(B, device=features.device).repeat_interleave(copies))
        P = image.shape[1] if torch.is_tensor(image) else 0
        kv_cache = KVCache(self.gpt.config, B * copies, P + 1 + max_new_tokens, self.gpt.lm_head.weight)
        start = torch.full((B * copies, 1), bos, device=features.device)
        step = functools.partial(self.logits, image=image, kv_cache=kv_cache)
        if beam > 1:
            return beam_search(step, kv_cache, start, beam, max_new_tokens, bos)[:, :num].flatten(0, 1)
        return decode(step, start, max_new_tokens, temperature, top_k, bos)[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# captions as tokens, and the batches to train on


class TokenizedCaptions:
    """Every caption of a split in one flat array: BOS, words, EOS (both <|endoftext|>). The first word is predicted from the picture too."""

    def __init__(self, captions, tokenizer, max_length):
        eot = tokenizer.eot_token
        rows = tokenizer.encode_ordinary_batch([" ".join(said.split()) for all_said in captions for said in all_said])
        self.cut = sum(len(row) > max_length for row in rows)
        rows = [[eot] + row[:max_length] + [eot] for row in rows]
        self.flat = torch.tensor([token for row in rows for token in row])
        self.start = np.cumsum([0] + [len(row) for row in rows])  # caption c is flat[start[c]:start[c+1]]
        self.of_image = np.cumsum([0] + [len(all_said) for all_said in captions])  # image i has captions of_image[i] .. of_image[i+1]-1

    def batch(self, numbers, device):
        """Captions by number -> idx, targets (R, T), padded to the longest of them; the loss skips targets of -100."""
        rows = [self.flat[self.start[c]:self.start[c + 1]] for c in numbers]
        idx = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
        targets = nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
        return idx.to(device), targets.to(device)


@functools.lru_cache(2)
def epoch_order(seed, epoch, n):
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n), rng.random(n)  # the order of the images, and the lot that picks each one's caption


def training_batch(step, batch_size, captions, seed):
    """The global batch of a step, a pure function of (seed, step): image numbers and caption numbers. Every epoch shows each image once."""
    n = len(captions.of_image) - 1
    images, chosen = [], []
    for number in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(number, n)
        order, lot = epoch_order(seed, epoch, n)
        first, end = captions.of_image[order[i]:order[i] + 2]
        images.append(order[i])
        chosen.append(first + int(lot[i] * (end - first)))
    return np.array(images), chosen


def reseed(seed, step, rank=0):
    """Makes dropout, like the data, a pure function of (seed, step): a resumed run needs no saved generator."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


def read_features(features, numbers, device):
    """The features of some pictures, by number: (B, S, W) in fp32, on the device."""
    rows = features[numbers] if torch.is_tensor(features) else torch.from_numpy(features[numbers])
    return rows.to(device, torch.float32)


def words_of(tokens, tokenizer):
    """Generated tokens (R, T) -> lists of tokens, each up to its EOS."""
    eot = tokenizer.eot_token
    return [row[:row.index(eot)] if eot in row else row for row in tokens.tolist()]


def to_text(tokens, tokenizer):
    return [tokenizer.decode(row).strip() for row in words_of(tokens, tokenizer)]


# CIDEr leaves out full stops: without a word for the end, a caption that breaks off ("a man with a") would score like one that ends, and
# training on CIDEr soon finds that out (Hu et al. 2023, https://arxiv.org/abs/2305.12254)
END = "<end>"


@torch.no_grad()
def self_critical(model, features, references, df, tokenizer, max_length, samples):
    """
    Self-critical sequence training (Rennie et al. 2017, https://arxiv.org/abs/1612.00563): the gradient of the expected CIDEr of captions
    drawn from the model is E[(reward - baseline) * grad log p(caption)], for any baseline that doesn't depend on that caption; so a batch to
    train on is captions of its own, their cross-entropy weighted by reward - baseline. Rennie's baseline is the greedy caption's reward. Here
    it is the mean of the picture's other samples (Luo 2020, https://arxiv.org/abs/2003.09971): no further decoding, and less variance.
    features (B, S, W), references: each picture's lists of words -> idx, targets (R, T), image_idx, weight (R,), mean reward; R = B * samples.
    """
    B, eot = len(features), tokenizer.eot_token
    tokens = model.generate(features, eot, max_length, temperature=1.0, num=samples)  # (R, T); no top-k: what it cuts off has no gradient
    is_end = tokens == eot
    words = [said + [END] * ended for said, ended in zip(tokenize(to_text(tokens, tokenizer)), is_end.any(1).tolist())]
    cider = score(words, [refs for refs in references for _ in range(samples)], df, tokenized=True)[1]["CIDEr"]  # (R,)
    rewards = torch.from_numpy(cider).float().view(B, samples)
    others = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
    targets = tokens.masked_fill(is_end.cumsum(1) > is_end.long(), -100)  # up to and with the first EOS
    image_idx = torch.arange(B, device=tokens.device).repeat_interleave(samples)
    weight = (rewards - others).flatten().to(tokens.device)
    return F.pad(tokens[:, :-1], (1, 0), value=eot), targets, image_idx, weight, rewards.mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# evaluation: over the whole split, shared out over the processes


@torch.no_grad()
def perplexity(model, features, captions, process, which_image="right", rows_at_once=160):
    """
    exp of the total loss over the total tokens of all captions, given each caption's own picture
    ("right"), another one ("wrong") or no picture ("none"). A forward pass holds at most
    rows_at_once captions; a picture is encoded once for all its captions in it.
    """
    total_loss, total_tokens, n_captions = 0.0, 0, len(captions.start) - 1
    stride = process.world_size * rows_at_once
    for first in range(process.rank * rows_at_once, n_captions, stride):
        rows = np.arange(first, min(first + rows_at_once, n_captions))
        idx, targets = captions.batch(rows, process.device)
        image_of_row = np.searchsorted(captions.of_image, rows, side="right") - 1
        images = np.arange(image_of_row[0], image_of_row[-1] + 1)
        image_idx = torch.from_numpy(image_of_row - images[0]).to(process.device)
        if which_image == "wrong":
            images = (images + len(features) // 2) % len(features)
        batch = None
        if which_image != "none":
            batch = read_features(features, images, process.device)
        with process.autocast():
            total_loss += model(idx, batch, targets, image_idx).item()
        total_tokens += (targets >= 0).sum().item()
    total_loss, total_tokens = all_reduce_sum(process, total_loss, total_tokens)
    return math.exp(total_loss / total_tokens)


def caption_split(model, features, tokenizer, max_length, process, beam=1, batch_size=256):
    """The caption of every picture of a split, by beam search or greedy, as strings in their order."""
    mine, batch_size = {}, max(1, batch_size // beam)
    for start in range(process.rank * batch_size, len(features), process.world_size * batch_size):
        numbers = np.arange(start, min(start + batch_size, len(features)))
        with process.autocast():
            tokens = model.generate(read_features(features, numbers, process.device), tokenizer.eot_token, max_length, beam=beam)
        mine |= zip(numbers.tolist(), to_text(tokens, tokenizer))
    parts = [mine]
    if process.world_size > 1:
        parts = [None] * process.world_size
        dist.all_gather_object(parts, mine)
    return [said for _, said in sorted(item for part in parts for item in part.items())]


def published_protocol(said, references, seed, n=50 * 128):
    """
    Scores as the published table has them: 50 batches of 128 pictures at most, one reference drawn for each, words split on spaces. They can't be
    compared with the literature's, where a caption may agree with any of five references, in whose text the rarity of words is counted too.
    """
    rng = np.random.default_rng(seed)
    drawn = [[refs[rng.integers(len(refs))].split()] for refs in references[:n]]
    return score([caption.split() for caption in said[:n]], drawn, tokenized=True)[0]


def variant(run):
    return f"xattn, every {run['every']}" if run["fusion"] == "xattn" else run["fusion"]


def scores_table(rows):
    """{name: scores} -> a line for each, x 100 as in papers."""
    metrics = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L")
    lines = [f"{'scores x 100':<24}" + "".join(f"{metric:>9}" for metric in metrics)]
    lines += [f"{name:<24}" + "".join(f"{100 * scores[metric]:>9.1f}" for metric in metrics) for name, scores in rows.items()]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# pictures to look at


def draw_curves(path, rows, batch_size, split, scst, layers):
    """The log as curves, by captions seen instead of steps, so that runs of different batch sizes compare."""
    seen = [row | dict(step=row["step"] * batch_size) for row in rows]
    panels = {"CIDEr x 100 of samples": {"": curve(seen, "reward", 100)}} if scst else {"loss (nats a token)": {"": curve(seen, "loss")}}
    panels |= {f"perplexity, {split}": {"": curve(seen, "perplexity")}, f"CIDEr x 100, {split}": {"": curve(seen, "CIDEr", 100)}}
    for kind, half in (("attn_gate", "attention"), ("mlp_gate", "MLP")) if layers else ():
        panels[f"tanh(gate) of the {half}, by layer"] = {f"layer {layer}": curve(seen, f"{kind}_{layer}") for layer in layers}
    plot(path, panels, xlabel="training captions seen")


def draw_captions(path, pictures, titles, columns=4):
    """A grid of pictures, each with its caption (and what else the title says) above it."""
    plt = pyplot()
    rows = math.ceil(len(pictures) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.8 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, picture, title in zip(axes.flat, pictures, titles):
        ax.imshow(picture)
        ax.set_title("\n".join(textwrap.fill(line, 44) for line in title.split("\n")), fontsize=8.5, parse_math=False)
    fig.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(fig)


@torch.no_grad()
def draw_attention(path, model, features, pictures, tokenizer, max_length):
    """Where each word of a caption looked, by the gated block whose attention differs most from word to word: one row a picture."""
    tokens = model.generate(features, tokenizer.eot_token, max_length)
    idx = F.pad(tokens, (1, 0), value=tokenizer.eot_token)[:, :-1]  # what had been written when each word was chosen
    weights, plt = [], pyplot()
    model.hidden(idx, model.encode_image(features), weights=weights)
    weights = torch.stack(weights).float().cpu()  # (blocks, B, T, S)
    best, grid = weights.std(2).mean((1, 2)).argmax(), math.isqrt(weights.shape[-1])
    rows = words_of(tokens, tokenizer)
    longest = max(1, *map(len, rows))
    fig, axes = plt.subplots(len(rows), longest, figsize=(1.15 * longest, 1.45 * len(rows)), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for b, (picture, row) in enumerate(zip(pictures, rows)):
        for t, (ax, word) in enumerate(zip(axes[b], row)):
            heat = weights[best, b, t, -grid * grid:].view(grid, grid)  # without CLIP's first token, the class token, which is nowhere
            ax.imshow(picture, extent=(0, 1, 0, 1))
            ax.imshow(heat, extent=(0, 1, 0, 1), cmap="inferno", alpha=0.6, interpolation="bilinear")
            ax.set_title(tokenizer.decode([word]).strip(), fontsize=9, parse_math=False)
    fig.suptitle(f"where each word looks (gated block before layer {list(model.gated)[best]})", fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=90)
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------------------
# a finished run: to go on from, and to caption pictures of your own


def load_run(path):
    """A checkpoint of this script, or of the folder it is in, and the Captioner that it holds, frozen GPT and all."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    checkpoint = load_checkpoint(path)
    if "gpt_config" not in checkpoint:
        die(f"{path} is not a checkpoint of train_caption.py")
    writer, was = GPT(GPTConfig(**checkpoint["gpt_config"])), checkpoint["settings"]
    model = Captioner(writer, was["fusion"], was["every"], checkpoint["width"], was["n_query"], was["dropout"])
    load_weights(model, checkpoint["model"], path)
    return checkpoint, model


def read_pictures(named):
    """Yields (name, picture) for what image= names: files, folders, globs, URLs. One that can't be read ends the run, by its name."""
    for name in named.split(","):
        if name.startswith(("http://", "https://")):
            with tempfile.TemporaryDirectory() as folder:
                yield name, open_image(download(name, os.path.join(folder, re.sub(r"[^\w.]+", "_", name)[-100:]), tries=3))
            continue
        files = glob.glob(name)
        if os.path.isdir(name):
            extensions = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)
            files = [os.path.join(name, file) for file in os.listdir(name) if file.lower().endswith(extensions)]
        for file in sorted(files) or [name]:  # a name that stands for nothing is left as it is: the picture that can't be read
            yield file, open_image(file)


def caption_pictures(named, path, process, temperature, top_k, num, beam):
    """Prints num captions of each picture that `named` names, and draws the first 40 beside the checkpoint, which is all that is needed."""
    checkpoint, model = load_run(path)
    was, tokenizer = checkpoint["settings"], get_tokenizer(checkpoint["tokenizer"])
    if was["encoder"] not in ("tagger", "patches") and not checkpoint["pretrained"]:
        die(f"{path} was trained on features that another program wrote: it has no encoder to look at new pictures with")
    eye = load_encoder(was["encoder"], checkpoint["pretrained"], checkpoint["tagger"])
    if fingerprint(eye) != checkpoint["weights"]:
        die(f"the weights of {was['encoder']} ({checkpoint['pretrained']}) are not those that {path} was trained with")
    eye.to(process.device)
    model.to_process(process).eval()
    pictures, drawn, titles = read_pictures(named), [], []
    while batch := list(itertools.islice(pictures, 32)):
        features = encode(eye, [eye.preprocess(picture) for _, picture in batch], process)
        features = torch.from_numpy(features).to(process.device, torch.float32)
        drawn += [picture for _, picture in batch[:40 - len(drawn)]]
        with process.autocast():
            tokens = model.generate(features, tokenizer.eot_token, was["max_length"], temperature, top_k, num, beam)
        said = to_text(tokens, tokenizer)
        for i, (name, _) in enumerate(batch):
            mine = said[i * num:(i + 1) * num]
            print(*(f"{name}: {caption}" for caption in mine), sep="\n", flush=True)
            titles.append("\n".join(mine))
    target = os.path.join(os.path.dirname(path), "image.png")
    draw_captions(target, drawn, titles, columns=min(4, len(drawn)))
    print(f"drawn in {target}, by {path}")


# ----------------------------------------------------------------------------------------------------------------------
# runs of several scripts: the built-in road, and all variants side by side


def run_script(script, *words):
    """Runs one of our own scripts as a user would, and shows how."""
    print(f"\n$ python {script} {shlex.join(words)}", flush=True)
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}  # even where torchrun started us
    code = subprocess.call([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), script), *words], env=alone)
    if code:
        sys.exit(code)


def take_the_built_in_road(config):
    """Four stages that make what SHAPES_PRESET needs; the fifth is the run that called. What is on disk already is not made again."""
    encoder = config["encoder"]
    stages = (  # what it does, the last file that it writes, its command
        ("draw scenes, with five captions each", "data/shapes/annotations/captions_val2017.json",
         "coco.py data=data/shapes shapes=8000 encoder=none"),
        ("tokenize the captions", "data/shapes/tokens/edufineweb_train_000001.npy",
         "fineweb.py text=data/shapes/train_captions.txt data=data/shapes/tokens tokenizer=learn val_tokens=20000"),
        ("pretrain a small GPT-2 on the captions alone: it learns the language of scenes, and sees none", "out/gpt2_shapes/curves.png",
         "train_gpt2.py data=data/shapes/tokens out_dir=out/gpt2_shapes n_layer=4 n_head=4 n_embd=128 block_size=128 batch_size=16 "
         "total_batch_size=2048 optimizer=muon learning_rate=8e-3 min_lr=4e-4 warmup_steps=20 weight_decay=0.01 max_steps=160 eval_interval=80 "
         "eval_tokens=20000 log_interval=20"),
        ("teach a small eye what captions speak of, and encode the scenes with it", f"data/shapes/features/{encoder}_val2017.npy",
         f"coco.py data=data/shapes encoder={encoder}"),
    )
    print("COCO was not found (data/coco2017; `python coco.py` downloads it): taking the built-in road of drawn scenes instead.\n"
          "Each stage below is a command that you could type yourself; what is on disk already is not made again.", flush=True)
    for number, (what, result, command) in enumerate(stages, 1):
        print(f"\n[{number}/5] {what}", flush=True)
        if os.path.exists(result):
            print(f"{result} is there already", flush=True)
        else:
            run_script(*command.split())
    typed = " ".join(f"{k}={config[k]}" for k in (*SHAPES_PRESET, "fusion", "every"))
    print(f"\n[5/5] train the bridge\n\n$ python train_caption.py {typed}", flush=True)


def compare_variants(folder, words, split):
    """Trains every variant by a command of its own, into folders inside `folder`, and puts their scores and their curves side by side."""
    rows, curves = [], {"perplexity": {}, "CIDEr": {}}
    for kind, n in VARIANTS:
        mine = f"{folder}/{kind}{n if kind == 'xattn' else ''}"
        run_script("train_caption.py", *words, f"fusion={kind}", f"every={n}", f"out_dir={mine}")
        with open(f"{mine}/results.json") as f:
            rows.append(json.load(f))
        for column in curves:
            steps, values = curve(read_log(f"{mine}/log.csv"), column)
            curves[column][variant(rows[-1])] = [step * rows[-1]["settings"]["batch_size"] for step in steps], values
    save_json(f"{folder}/results.json", rows, indent=1)
    plot(f"{folder}/comparison.png", {f"{column}, {split}": lines for column, lines in curves.items()}, xlabel="training captions seen")
    print(f"\n{'variant':<23}| {'trainable':>11} |  CIDEr | BLEU-4 | perplexity | with a wrong picture | captions seen")
    for r in rows:
        print(f"{variant(r):<23}| {r['trainable']:>11,} | {100 * r['CIDEr']:>6.1f} | {100 * r['Bleu_4']:>6.1f} | {r['perplexity']:>10.2f} | "
              f"{r['perplexity_wrong_picture']:>20.2f} | {r['step'] * r['settings']['batch_size']:>13,}")
    print(f"\nall scores: {folder}/results.json, the curves: {folder}/comparison.png")


# ----------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    # ---- what is asked for. `configure` is called twice, and takes every number, string, bool or None under a lowercase name for a setting: a
    # new name before the second call must stand for something else
    config = configure(globals())
    if fusion not in ("xattn", "linear", "qformer", "all"):
        die(f"fusion={fusion}: xattn, linear, qformer or all")
    if min(every, beam, num, top_k) < 1 or samples < 2:
        die(f"every={every}, beam={beam}, num={num}, top_k={top_k}: 1 or more; samples={samples}: 2 or more")
    if num > beam and (beam > 1 or temperature == 0):
        die(f"num={num} different captions of a picture need a temperature above 0, or a beam at least as wide")
    if eval_only and init_from != "resume":
        die("eval_only=True evaluates a trained bridge: add init_from=resume")
    if scst and init_from == "scratch":
        die("scst=True goes on from a bridge that can speak: init_from=out/... names the run that trained it")
    process = setup(device, dtype)
    if fusion == "all" and process.world_size > 1:
        die("fusion=all trains the variants one after the other, each in a run of its own: start it without torchrun")
    if image:
        found = [path for path in glob.glob("out/caption_*/**/ckpt.pt", recursive=True) if "_shuffled" not in path]
        runs = [os.path.join(out_dir, "ckpt.pt")] if out_dir else sorted(found, key=os.path.getmtime)
        if not runs:
            die("image= needs a trained run: `python train_caption.py` trains one")
        torch.manual_seed(seed)
        caption_pictures(str(image), runs[-1], process, temperature, top_k, num, beam)
        sys.exit(0)

    # between the defaults and the command line stands what the run had that this one starts from, or what suits the bridge and the data
    preset = dict(PREFIX_RECIPE) if fusion in ("linear", "qformer") else {}
    if init_from not in ("scratch", "resume"):
        checkpoint, model = load_run(init_from)
        preset = {k: v for k, v in checkpoint["settings"].items() if k in INHERITED}
    elif data is None:
        preset |= dict(data="data/coco2017") if splits_of("data/coco2017") else SHAPES_PRESET
    config = configure(globals(), lambda typed: preset)
    rank, world_size, device, _ = process
    t_start = time.time()

    if SHAPES_PRESET.items() <= preset.items():
        if rank == 0:
            take_the_built_in_road(config)
        if world_size > 1:
            dist.barrier()
    name = os.path.basename(os.path.normpath(data))
    if fusion == "all":
        compare_variants(out_dir or f"out/caption_{name}_all", [*(f"{k}={v}" for k, v in preset.items()), *sys.argv[1:]], split)
        print(f"{time.time() - t_start:.0f} s in all")
        sys.exit(0)

    # ---- pictures and captions
    kind = f"{fusion}{every}" if fusion == "xattn" else fusion
    out_dir = out_dir or f"out/caption_{name}_{kind}{'_shuffled' if shuffle else ''}{'_scst' if scst else ''}"
    config["out_dir"], path = out_dir, os.path.join(out_dir, "ckpt.pt")
    if rank == 0:
        print_settings(config)
        os.makedirs(out_dir, exist_ok=True)
    if init_from not in ("scratch", "resume") and os.path.realpath(out_dir) in map(os.path.realpath, (init_from, os.path.dirname(init_from))):
        die(f"this would overwrite {out_dir}, the run that it starts from: give it an out_dir= of its own")
    train_images, train_said = load_captions(data, "train2017")
    images, references = load_captions(data, split)
    train_features, about = load_features(data, encoder, "train2017", train_images)
    val_features, val_about = load_features(data, encoder, split, images)
    if about.get("weights") != val_about.get("weights"):
        die(f"the {encoder} features of train2017 and {split} were made with different weights: delete the wrong ones and encode again")
    S, W = train_features.shape[1:]
    if shuffle:
        train_features, val_features = (np.random.default_rng(seed).permutation(f) for f in (train_features, val_features))
    if "cuda" in device and train_features.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:  # COCO's 9 GB fit on most GPUs: no loader needed
        train_features = torch.from_numpy(train_features[:]).to(device)

    # ---- the GPT, and the bridge to it
    torch.manual_seed(seed)
    if init_from == "scratch":
        with local_main_process_first(process):
            writer = GPT.from_pretrained(gpt)
        tokenizer_source = load_checkpoint(gpt).get("tokenizer", "gpt2") if gpt.endswith(".pt") else "gpt2"  # others' weights are in GPT-2's
        model = Captioner(writer, fusion, every, W, n_query, dropout)
    else:
        if init_from == "resume":
            checkpoint, model = load_run(path)
        tokenizer_source = checkpoint["tokenizer"]
        was = checkpoint["settings"] | dict(width=checkpoint["width"], weights=checkpoint["weights"])
        now = dict(fusion=fusion, every=every, n_query=n_query, encoder=encoder, width=W, weights=about.get("weights"))
        if other := [k for k, v in now.items() if was[k] != v]:
            die(f"{init_from} was trained with {', '.join(f'{k}={was[k]}' for k in other)}: go on with the same")
    gpt_config, tokenizer = model.gpt.config, get_tokenizer(tokenizer_source)
    if gpt_config.vocab_size != tokenizer.n_vocab:
        die(f"gpt={gpt} has {gpt_config.vocab_size:,} tokens, its tokenizer {tokenizer.n_vocab:,}: only GPT-2's vocabulary, or our checkpoints")
    model.to_process(process)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters()) + about.get("parameters", 0)
    optimizers = make_optimizers(model, optimizer, learning_rate, weight_decay, (0.9, beta2))
    step = 0
    if init_from == "resume":
        resume_optimizers(optimizers, checkpoint, path)
        step = checkpoint["step"]
        if rank == 0:
            warn_changed(config, checkpoint, "data batch_size optimizer learning_rate min_lr warmup_steps max_steps weight_decay beta2 grad_clip "
                                             "dropout shuffle scst samples seed dtype")
    # `step_model` is what trains; `model`, the same weights uncompiled, evaluates, writes captions and is saved
    step_model = torch.compile(model) if (compile if compile is not None else "cuda" in device) else model
    if world_size > 1:
        step_model = DistributedDataParallel(step_model, device_ids=[device] if "cuda" in device else None)
    if batch_size % world_size:
        die(f"batch_size={batch_size} pictures can't be shared out evenly over {world_size} processes")

    # ---- captions as tokens, and for scst as words
    config["max_length"] = max_length = min(max_length, gpt_config.block_size - 1)
    train_captions, val_captions = (TokenizedCaptions(said, tokenizer, max_length) for said in (train_said, references))
    if (cut := train_captions.cut + val_captions.cut) and rank == 0:
        print(f"{cut:,} captions are longer than max_length={max_length} tokens and were cut")
    if scst:
        words = [said + [END] for said in tokenize([caption for all_said in train_said for caption in all_said])]
        train_words = [words[first:end] for first, end in zip(train_captions.of_image, train_captions.of_image[1:])]
        df = document_frequencies(train_words)

    # ---- the loop
    gates = {f"{half}_gate_{layer}": getattr(block, f"{half}_gate") for half in ("attn", "mlp") for layer, block in model.gated.items()}
    if rank == 0:
        print(f"{len(train_images):,} pictures to train on, {len(images):,} held out, {S} tokens x {W} each | "
              f"{trainable:,} trainable parameters, {trainable / total:.1%} of {total:,} | {world_size} process(es) on {device}", flush=True)
        log = Log(os.path.join(out_dir, "log.csv"), ["step", "loss", "reward", "perplexity", "CIDEr", "lr", "norm", "ms", *gates],
                  math.inf if eval_only else step)
        wandb = start_wandb(config) if wandb_log else None
    asked_to_stop, stop = stop_signals(), 0
    t0, first_step = time.time(), step
    while True:
        # look at the whole held-out split, and save
        row = dict(step=step)
        if (step % eval_interval == 0 or step >= max_steps or eval_only) and not stop:
            model.eval()
            said = caption_split(model, val_features, tokenizer, max_length, process)
            scores, _ = score(said, references)
            row |= dict(perplexity=perplexity(model, val_features, val_captions, process), CIDEr=scores["CIDEr"])
            if rank == 0:
                print(f"step {step:5d}/{max_steps} | held out: perplexity {row['perplexity']:.3f} | CIDEr {100 * row['CIDEr']:.1f} | "
                      f"\"{said[0]}\"", flush=True)
        if rank == 0 and step > first_step and ("CIDEr" in row or stop):
            taught = load_checkpoint(os.path.join(data, "features", "tagger.pt")) if encoder == "tagger" else None
            save_checkpoint(path, dict(
                model=model.state_dict(), optimizers=[opt.state_dict() for opt in optimizers], step=step, settings=config,
                gpt_config=asdict(gpt_config), width=W, tokenizer=tokenizer_source, pretrained=about.get("pretrained"),
                weights=about.get("weights"), tagger=taught))
        if step >= max_steps or eval_only or stop:
            break

        # one step
        t1 = time.time()
        reseed(seed, step, rank)
        model.train(not scst)  # with dropout, scst's log-probabilities would be of another model than the one that spoke
        chosen_images, chosen_captions = training_batch(step, batch_size, train_captions, seed)
        mine = chosen_images[rank::world_size]
        features = read_features(train_features, mine, device)
        if scst:
            with process.autocast():  # one of its own: the bfloat16 weights that autocast remembers from here have no gradient
                own_words = [train_words[i] for i in mine]
                idx, targets, image_idx, weight, reward = self_critical(model, features, own_words, df, tokenizer, max_length, samples)
        else:
            idx, targets = train_captions.batch(chosen_captions[rank::world_size], device)
            image_idx, weight, reward = None, None, 0.0  # one caption for each picture, and all count alike
        n_tokens, = all_reduce_sum(process, (targets >= 0).sum().item())
        with process.autocast():  # the mean over the tokens of the global batch; DDP will average gradients, so each process counts `world_size` times
            loss = step_model(idx, features, targets, image_idx, weight) * (world_size / n_tokens)
        loss.backward()
        lr = get_lr(step, learning_rate, min_lr, warmup_steps, max_steps)
        norm = optimizer_step(model, optimizers, lr, grad_clip, step)
        loss, reward, stop = all_reduce_sum(process, loss.item() / world_size, reward / world_size, len(asked_to_stop))  # all processes stop after the same step
        ms = (time.time() - t1) * 1000
        if rank == 0:
            row |= dict(loss=loss, reward=reward if scst else None, lr=lr, norm=norm, ms=ms)
            row |= {name: gate.tanh().item() for name, gate in gates.items()}
            log.add(**row)
            if wandb:
                wandb.log({k: v for k, v in row.items() if v is not None}, step=step)
            if step % log_interval == 0 or step == max_steps - 1:
                left = (time.time() - t0) / (step + 1 - first_step) * (max_steps - step - 1)
                aim = f"CIDEr of samples {100 * reward:.1f}" if scst else f"loss {loss:.4f}"
                print(f"step {step:5d}/{max_steps} | {aim} | norm {norm:.2f} | lr {lr:.2e} | {ms:.0f} ms | "
                      f"{batch_size / ms * 1000:,.0f} images/s | {left / 60:.1f} min left", flush=True)
        step += 1

    # ---- what came of it
    if stop:
        if rank == 0:
            print(f"stopped at step {step}; the same command with init_from=resume goes on")
        finish(process)
    without, wrong = (perplexity(model, val_features, val_captions, process, which_image) for which_image in ("none", "wrong"))
    table = {"greedy": scores}
    if single_reference:
        table["greedy, one reference"] = published_protocol(said, references, seed)
    if beam > 1:
        said = caption_split(model, val_features, tokenizer, max_length, process, beam)
        scores, _ = score(said, references)
        table[f"beam={beam}"] = scores
    if rank == 0:
        if not eval_only:
            log.add(**row)
            if wandb:
                wandb.log(row, step=step)
        right = fraction_right(images, said)
        results = dict(fusion=fusion, every=every, trainable=trainable, total=total, perplexity=row["perplexity"], **scores,
                       perplexity_wrong_picture=wrong, perplexity_no_picture=without, right=right, step=step, scores=table, settings=config)
        save_json(os.path.join(out_dir, "results.json"), results, indent=1)
        coco_results = [dict(image_id=image["id"], caption=caption) for image, caption in zip(images, said)]
        save_json(os.path.join(out_dir, f"captions_{split}.json"), coco_results, indent=1)
        draw_curves(os.path.join(out_dir, "curves.png"), log.rows, batch_size, split, scst, list(model.gated))
        files = [os.path.join(data, split, image["file_name"]) for image in images[:12]]
        if all(map(os.path.exists, files)):  # features may be here without their pictures
            pictures = [open_image(file) for file in files]
            draw_captions(os.path.join(out_dir, "captions.png"), pictures, [f"{s}\n({r[0].strip()})" for s, r in zip(said, references)])
            if about.get("pretrained"):  # open_clip's towers see the middle of a picture, our own encoders the whole
                pictures = [ImageOps.fit(picture, (224, 224)) for picture in pictures]
            if gates:
                features = read_features(val_features, np.arange(len(pictures))[:3], device)
                with process.autocast():
                    draw_attention(os.path.join(out_dir, "attention.png"), model, features, pictures, tokenizer, max_length)

        print("\ncaptions of pictures it was not trained on, and what a person said:")
        for caption, refs in list(zip(said, references))[:10]:
            print(f"  {caption:<62} | {refs[0].strip()}")
        print(f"\n{scores_table(table)}\n\nfusion                     {variant(results)}" + (", features shuffled between pictures" if shuffle else ""))
        print(f"trainable parameters       {trainable:,} ({trainable / total:.1%} of {total:,})")
        print(f"perplexity                 {row['perplexity']:.3f}   (the language model alone {without:.3f}, with a wrong picture {wrong:.3f})")
        if right is not None:
            print(f"captions entirely right    {right:.1%} of {len(images)} held-out scenes (every size, colour, shape and place)")
        print(f"look at                    {out_dir}/captions.png, curves.png" + (", attention.png" if gates else ""))
        print(f"time                       {time.time() - t_start:.0f} s")
    finish(process)
