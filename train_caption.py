r"""
Image captioning with a frozen GPT and frozen image features. Only the fusion module between the two
is trained.

    python train_caption.py                            # nothing prepared: a demo, some minutes
    python train_caption.py fusion=all                 # five variants side by side
    python train_caption.py image=a.jpg,photos         # caption pictures with the newest run
    python train_caption.py init_from=resume eval_only=True consensus=40    # score it once more
    python train_caption.py data=data/coco2017 gpt=gpt2             # COCO on one GPU, after coco.py
    torchrun --standalone --nproc_per_node=8 train_caption.py gpt=out/gpt2/ckpt.pt      # eight
    python train_caption.py init_from=out/caption_coco2017_xattn1 scst=True learning_rate=1e-5 \
        min_lr=1e-5 max_steps=924                      # goes on from a run, for CIDEr itself

Three fusion modules:
  xattn    Before every `every`-th block of the GPT, a gated cross-attention block lets each token
           attend to the picture (Flamingo, Alayrac et al. 2022). Its gates start at zero, so
           training starts from the GPT exactly as it was.
  linear   The image features, through one matrix, stand before the text as if they were tokens
           (ClipCap, LLaVA).
  qformer  32 learned queries attend to the image features. Their outputs stand before the text
           (BLIP-2, Li et al. 2023).

A caption is BOS, its tokens, EOS; both ends are <|endoftext|>, with which every document began in
pretraining. The first word is predicted at the position of BOS.

The defaults are the published recipes on COCO 2017 with GPT-2 124M and CLIP ViT-B/32. They report
CIDEr 57.1 / 55.9 / 47.8 for a gated block before every layer, every 2nd, every 4th; about 12 for
linear; 35.0 for qformer (by their protocol, which `single_reference=True` adds to ours).
Writes out_dir/{ckpt.pt, best.pt, log.csv, results.json, captions_val2017.json, curves.png,
captions.png, best_worst.png, attention.png}. best.pt has the highest CIDEr (of drawn scenes: the
most captions that are right in every word).
"""
import functools
import glob
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

from fineweb import (configure, die, download, get_tokenizer, lock_folder, print_settings,
                     read_json, save_json)
from train_gpt2 import (GPT, GPTConfig, KVCache, Log, MLP, all_reduce_sum, beam_search,
                        check_finite, curve, decode, distribute, finish, get_lr, load_checkpoint,
                        load_model, load_weights, local_main_process_first, make_optimizers,
                        optimizer_step, plot, print_step, pyplot, read_log, resume_optimizers,
                        run_file, save_run, setup, signals_end_the_process, start_wandb,
                        stop_signals, wait_for_all, warn_changed)
from cider import cider_of_tokens, document_frequencies, evaluate as score, tokenize
from coco import (encode, fingerprint, fraction_right, load_captions, load_encoder, load_features,
                  open_image, splits_of, warn_overlap)

# --------------------------------------------------------------------------------------------------
# settings: `python train_caption.py name=value` overrides any; rules such as >= 1 are checked

data: str = None            # folder in COCO's layout; None = data/coco2017, or a demo
out_dir: str = None         # where the run goes; None = out/caption_{data}_{fusion}
init_from = "scratch"       # scratch | resume (out_dir/ckpt.pt) | another run (its folder or file)
eval_only = False           # with init_from=resume: score and draw the best checkpoint of the run
gpt = "gpt2"                # the frozen GPT: gpt2, gpt2-medium, ... | a folder, .safetensors, .pt
encoder = "ViT-B-32"        # the frozen image encoder whose features coco.py wrote
split = "val2017"           # held-out pictures: val2017, or test2017 where the data set has it
fusion = "xattn"            # one of xattn | linear | qformer | all: all trains and compares them
every = 1                   # >= 1: xattn: a gated block before every k-th block of the GPT
n_query = 32                # >= 1: qformer: number of learned queries
dropout = 0.1               # >= 0, < 1: xattn, qformer: of the projected image features
token_dropout = 0.0         # >= 0, < 1: share of the image tokens that a training step leaves out
shuffle = False             # shuffle the features among the pictures, as a control
batch_size = 128            # >= 1: pictures a step over all processes, each with one random caption
max_length = 40             # >= 1: tokens of the longest caption; longer ones are cut and counted
optimizer = "adamw"         # one of adamw | muon: muon is for the matrices of the fusion module
learning_rate = 2e-4        # > 0: the peak
min_lr = 1e-4               # >= 0: where the cosine ends
warmup_steps = 0            # >= 0
max_steps = 7_392           # >= 1: 8 epochs of 118,287 pictures
weight_decay = 0.1          # >= 0
ema = 0.0                   # >= 0, < 1: keep a moving average of the weights, with this decay
beta2 = 0.95                # >= 0, < 1: of AdamW; beta1 is 0.9
grad_clip = 1.0             # >= 0: largest norm of the gradient; 0 = no clipping
scst = False                # train on CIDEr itself, from a run that init_from= names
samples = 5                 # >= 2: scst: captions sampled for each picture
eval_interval = 924         # >= 1: steps between evaluations, each with a checkpoint: one epoch
log_interval = 20           # >= 1: steps between printed lines
single_reference = False    # also score by the published table's protocol
beam = 1                    # >= 1: beams of the search for final captions and image=; 1 = greedy
consensus = 0               # >= 0: final captions and image=: of so many samples, the most typical
image: str = None           # caption pictures, folders, globs, URLs (a,b,...) and train nothing
num = 1                     # >= 1: image=: captions a picture
temperature = 1.0           # >= 0: image=: captions are sampled; 0 = greedy ones, as are scored
top_k = 10                  # >= 1: image=: sample from the k likeliest tokens
seed = 1337                 # >= 0
device: str = None          # cuda, cpu, mps; None takes the best there is
dtype: str = None           # one of bfloat16 | float32: of the matmuls; None = bfloat16 on CUDA
compile = False             # torch.compile the model: minutes, for a step that is quick anyway
wandb_log = False           # mirror the log to Weights & Biases

# What fusion=linear and fusion=qformer take for what is not typed: the published recipe, one epoch.
PREFIX_RECIPE = dict(batch_size=256, learning_rate=1e-4, min_lr=5e-5, weight_decay=0.05,
                     beta2=0.98, max_steps=463, eval_interval=463)
# The demo on drawn scenes, where there is no COCO and data= is not typed.
DEMO = dict(data="data/shapes", gpt="out/gpt2_shapes/ckpt.pt", encoder="tagger", batch_size=64,
            optimizer="muon", learning_rate=8e-3, min_lr=4e-4, warmup_steps=20, weight_decay=0.0,
            beta2=0.95, dropout=0.0, max_steps=250, eval_interval=125, log_interval=25)
# What a run takes over from the one that it starts from, and what a resumed run takes over.
INHERITED = ("data gpt encoder fusion every n_query dropout token_dropout shuffle batch_size "
             "max_length optimizer weight_decay beta2 ema").split()
RESUMED = INHERITED + ("learning_rate min_lr warmup_steps max_steps grad_clip scst samples split "
                       "eval_interval log_interval single_reference beam consensus seed").split()
VARIANTS = [("xattn", 1), ("xattn", 2), ("xattn", 4), ("linear", 1), ("qformer", 1)]

# --------------------------------------------------------------------------------------------------
# B pictures of S tokens, W wide, as the encoder made them. R rows of T tokens (captions); row r is
# about picture image_idx[r]. C = n_embd, H = n_head, D = C / H; P prefix tokens; V = vocab_size

# +------------------------------------------------------------------------------------------------+
# | Gated cross-attention (Flamingo, Alayrac et al. 2022, section 2.4)                             |
# |                                                                                                |
# |     x = x + tanh(attn_gate) * Attention(query: LN(x), key and value: image)                    |
# |     x = x + tanh(mlp_gate)  * MLP(LN(x))                                                       |
# |                                                                                                |
# | x (R, T, C) are the hidden states of the text, image (B, S, C) the projected image features.   |
# | Both gates start at 0, and tanh(0) = 0: the block changes nothing. Everything in it is then    |
# | multiplied by zero, so at the first step only the two gates have a gradient. Once they leave   |
# | 0, the rest of the block starts to learn.                                                      |
# +------------------------------------------------------------------------------------------------+


class GatedCrossAttention(nn.Module):

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

    def image_kv(self, image):
        """image (B, S, C) -> keys and values (2, B, H, S, D), the same for every token of text."""
        B, S, C = image.shape
        kv = self.c_kv(image).view(B, S, 2, self.n_head, C // self.n_head)
        # contiguous: otherwise every generated token would copy them
        return kv.permute(2, 0, 3, 1, 4).contiguous()

    def forward(self, x, kv, attention_maps=None):
        """x (R, T, C), kv (2, R, H, S, D) -> (R, T, C). Attention (R, T, S) goes to a list."""
        R, T, C = x.shape
        k, v = kv
        q = self.c_q(self.ln_1(x)).view(R, T, self.n_head, C // self.n_head).transpose(1, 2)
        # Every token attends to the whole picture: no mask. With so few keys,
        # F.scaled_dot_product_attention is slower on a CPU in bfloat16.
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # (R, H, T, S)
        if attention_maps is not None:
            attention_maps.append(attention.mean(1))
        y = (attention @ v).transpose(1, 2).reshape(R, T, C)
        x = x + self.attn_gate.tanh() * self.c_proj(y)
        return x + self.mlp_gate.tanh() * self.mlp(self.ln_2(x))


class QFormer(nn.Module):
    """
    Learned queries attend to each other and to the image features (Li et al. 2023,
    https://arxiv.org/abs/2301.12597). Features (B, S, W) -> prefix (B, n_query, C).
    """

    def __init__(self, width, n_embd, n_query, dropout, n_layer=2, n_head=8):
        super().__init__()
        self.read = nn.Linear(width, n_embd)
        self.queries = nn.Parameter(0.02 * torch.randn(1, n_query, n_embd))
        self.layers = nn.ModuleList([
            nn.TransformerDecoderLayer(n_embd, n_head, 4 * n_embd, dropout, "gelu",
                                       batch_first=True, norm_first=True)
            for _ in range(n_layer)])
        self.write = nn.Sequential(nn.LayerNorm(n_embd), nn.Linear(n_embd, n_embd))

    def forward(self, features):
        image = self.read(features)  # (B, S, C)
        x = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            x = layer(x, image)
        return self.write(x)


class Captioner(nn.Module):
    """
    A frozen GPT and a trainable fusion module: `project`, and for xattn the blocks in `gated`.
    Without a picture, the model is the GPT. A further kind of prefix needs a class, a branch in
    __init__, and its name in the setting `fusion`. A kind that works inside the GPT also needs its
    blocks in `gated` and a branch in encode_image. VARIANTS is what fusion=all compares.
    """

    def __init__(self, gpt, fusion, every, width, n_query=32, dropout=0.1):
        super().__init__()
        self.gpt, self.fusion = gpt.requires_grad_(False), fusion
        C, n_head, n_layer = gpt.config.n_embd, gpt.config.n_head, gpt.config.n_layer
        self.gated = nn.ModuleDict()
        if fusion == "xattn":
            self.project = nn.Sequential(nn.Linear(width, C), nn.LayerNorm(C), nn.Dropout(dropout))
            for layer in range(0, n_layer, every):
                self.gated[str(layer)] = GatedCrossAttention(C, n_head)
        elif fusion == "linear":
            self.project = nn.Linear(width, C)
        elif fusion == "qformer":
            self.project = QFormer(width, C, n_query, dropout)

    def to_process(self, process):
        """
        Moves the model to the device. If matmuls run in bfloat16, the frozen matrices are stored in
        it: autocast would convert them again for every batch and every generated token.
        """
        if process.dtype == torch.bfloat16:
            for name, p in self.gpt.named_parameters():
                if p.dim() == 2 and not name.endswith("wpe.weight"):
                    p.data = p.data.bfloat16()
        return self.to(process.device)

    def encode_image(self, features, image_idx=None):
        """
        Features (B, S, W) -> for xattn {layer: keys and values (2, R, H, S, D)}, otherwise a prefix
        (R, P, C). image_idx (R,): the picture of each row; None = row i is about picture i.
        """
        image = self.project(features)
        rows = slice(None) if image_idx is None else image_idx
        if self.fusion == "xattn":
            return {layer: block.image_kv(image)[:, rows] for layer, block in self.gated.items()}
        return image[rows]

    def hidden(self, idx, image=None, kv_cache=None, attention_maps=None):
        """
        Tokens idx (R, T), which follow those in the cache, and encode_image's result -> hidden
        states (R, T, C), from which gpt.head makes logits.
        """
        image_kv = image if isinstance(image, dict) else {}
        n_prefix = image.shape[1] if torch.is_tensor(image) else 0
        n_cached = kv_cache.pos if kv_cache else 0
        # Text starts at position 0, as in pretraining: the prefix has no position embeddings. It is
        # in the cache too, so n_cached - n_prefix tokens of text came before idx.
        x = self.gpt.embed(idx, max(0, n_cached - n_prefix))
        if n_prefix and not n_cached:
            # The GPT's causal mask holds in the prefix too. PaliGemma's prefix has no such mask.
            x = torch.cat([image.to(x.dtype), x], 1)  # (R, P + T, C)
        for layer, block in enumerate(self.gpt.transformer.h):
            if str(layer) in image_kv:
                x = self.gated[str(layer)](x, image_kv[str(layer)], attention_maps)
            x = block(x, kv_cache, layer)
        if kv_cache:
            kv_cache.pos += x.shape[1]
        return x[:, -idx.shape[1]:]  # nothing is predicted at positions of the prefix

    def logits(self, idx, image=None, kv_cache=None):
        return self.gpt.head(self.hidden(idx, image, kv_cache))  # (R, T, V)

    def forward(self, idx, features, targets, image_idx=None, loss_weight=None):
        """
        The summed cross-entropy of targets (R, T) in nats; -100 is padding. features (B, S, W);
        None = no picture. loss_weight (R,): the weight of each row.
        """
        image = None if features is None else self.encode_image(features, image_idx)
        return self.loss(self.hidden(idx, image), targets, loss_weight)

    def loss(self, x, targets, loss_weight):
        is_token = targets >= 0
        weights = torch.ones_like(targets, dtype=torch.float32)
        if loss_weight is not None:
            weights *= loss_weight[:, None]
        return self.gpt.cross_entropy(x[is_token], targets[is_token], weights[is_token])[0]

    def compiled(self, **options):
        """
        torch.compile(self, **options) for training, but for the loss: the number of tokens differs
        in every batch, so no graph would fit twice.
        """
        # as a decorator, `disable` would load the compiler, two seconds, in every run
        self.loss = torch.compiler.disable(self.loss)
        return torch.compile(self, **options)

    @torch.no_grad()
    def generate(self, features, bos, max_new_tokens, temperature=0.0, top_k=None, num=1, beam=1):
        """
        num captions of each picture (B, S, W): tokens (B * num, up to max_new_tokens). `bos` is
        also EOS. beam=1: greedy (temperature 0) or sampled; beam>1: the num best of a beam search.
        """
        B, copies = len(features), max(num, beam)
        image_idx = torch.arange(B, device=features.device).repeat_interleave(copies)
        image = self.encode_image(features, image_idx)
        n_prefix = image.shape[1] if torch.is_tensor(image) else 0
        kv_cache = KVCache(self.gpt.config, B * copies, n_prefix + 1 + max_new_tokens,
                           self.gpt.lm_head.weight)
        start = torch.full((B * copies, 1), bos, device=features.device)
        step = functools.partial(self.logits, image=image, kv_cache=kv_cache)
        if beam > 1:
            found = beam_search(step, kv_cache, start, beam, max_new_tokens, bos)  # (B, beam, T)
            return found[:, :num].flatten(0, 1)
        return decode(step, start, max_new_tokens, temperature, top_k, bos)[:, 1:]


# --------------------------------------------------------------------------------------------------
# captions as tokens, and the batches to train on


class TokenizedCaptions:
    """
    All captions of a split in one flat array, each as BOS, tokens, EOS. Caption c is
    flat[start[c]:start[c + 1]]; image i has the captions of_image[i] to of_image[i + 1] - 1. `cut`
    is the number of captions that were too long.
    """

    def __init__(self, captions, tokenizer, max_length):
        eot = tokenizer.eot_token
        texts = [" ".join(caption.split()) for of_image in captions for caption in of_image]
        rows = tokenizer.encode_ordinary_batch(texts)
        self.cut = sum(len(row) > max_length for row in rows)
        rows = [[eot] + row[:max_length] + [eot] for row in rows]
        self.flat = torch.tensor([token for row in rows for token in row])
        self.start = np.cumsum([0] + [len(row) for row in rows])
        self.of_image = np.cumsum([0] + [len(of_image) for of_image in captions])

    def count(self, numbers):
        """The number of targets of some captions: all tokens but BOS."""
        numbers = np.array(numbers)
        return int((self.start[numbers + 1] - self.start[numbers] - 1).sum())

    def batch(self, numbers, device):
        """Captions by number -> idx, targets (R, T); -100 is padding."""
        rows = [self.flat[self.start[c]:self.start[c + 1]] for c in numbers]
        idx = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
        targets = nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True,
                                            padding_value=-100)
        return idx.to(device), targets.to(device)


@functools.lru_cache(2)
def epoch_order(seed, epoch, n):
    """The order of n images, and for each a number in [0, 1) that picks its caption."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n), rng.random(n)


def training_batch(step, batch_size, captions, seed):
    """
    The global batch of a step, image numbers and caption numbers: a pure function of (seed, step).
    Every epoch has each image once, with a caption that is drawn anew.
    """
    n = len(captions.of_image) - 1
    images, chosen = [], []
    for number in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(number, n)
        order, draw = epoch_order(seed, epoch, n)
        first, end = captions.of_image[order[i]:order[i] + 2]
        images.append(order[i])
        chosen.append(first + int(draw[i] * (end - first)))
    return np.array(images), chosen


def reseed(seed, step, rank=0):
    """What is drawn in a step depends on (seed, step): a resumed run needs no saved generator."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def read_features(features, numbers, device):
    """Features by number: (B, S, W) in float32, on the device."""
    return torch.as_tensor(features[numbers]).to(device, torch.float32)


def truncate_at_eos(tokens, tokenizer):
    """Generated tokens (R, T) -> lists of tokens, each up to its EOS."""
    eot = tokenizer.eot_token
    return [row[:row.index(eot)] if eot in row else row for row in tokens.tolist()]


def to_text(tokens, tokenizer):
    return [tokenizer.decode(row).strip() for row in truncate_at_eos(tokens, tokenizer)]


# CIDEr ignores full stops. Without a word for the end, training on CIDEr soon learns captions that
# break off ("a man with a"): they score like whole ones (Hu et al. 2023,
# https://arxiv.org/abs/2305.12254).
END = "<end>"


@torch.no_grad()
def self_critical(model, features, references, df, tokenizer, max_length, samples):
    """
    A batch of self-critical sequence training (Rennie et al. 2017,
    https://arxiv.org/abs/1612.00563). The gradient of the expected CIDEr of sampled captions is
        E[(reward - baseline) * grad log p(caption)],
    for any baseline that does not depend on that caption. So the model trains on captions that it
    sampled itself, their cross-entropy weighted by reward - baseline. The baseline is the mean
    reward of the picture's other samples (Luo 2020, https://arxiv.org/abs/2003.09971).
    features (B, S, W), references: the token lists of each picture
    -> idx, targets (R, T), image_idx, loss_weight (R,), mean reward; R = B * samples.
    """
    B, eot = len(features), tokenizer.eot_token
    # no top_k: a token that it cuts off would have no gradient
    tokens = model.generate(features, eot, max_length, temperature=1.0, num=samples)  # (R, T)
    is_eos = tokens == eot
    candidates = []
    for words, ended in zip(tokenize(to_text(tokens, tokenizer)), is_eos.any(1).tolist()):
        candidates.append(words + [END] * ended)
    row_references = [refs for refs in references for _ in range(samples)]
    rewards = torch.from_numpy(cider_of_tokens(candidates, row_references, df)).float()
    rewards = rewards.view(B, samples)
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
    # what comes after the first EOS is padding
    targets = tokens.masked_fill(is_eos.cumsum(1) > is_eos.long(), -100)
    idx = F.pad(tokens[:, :-1], (1, 0), value=eot)
    image_idx = torch.arange(B, device=tokens.device).repeat_interleave(samples)
    loss_weight = (rewards - baseline).flatten().to(tokens.device)
    return idx, targets, image_idx, loss_weight, rewards.mean().item()


def consensus_captions(model, features, tokenizer, max_length, n):
    """
    Of n sampled captions of each picture (B, S, W), the one that is most like the others: it has
    the highest CIDEr if the n samples are its references (minimum Bayes risk, Kumar and Byrne
    2004, https://aclanthology.org/N04-1022). The likeliest caption often says little.
    """
    tokens = model.generate(features, tokenizer.eot_token, max_length, temperature=1.0, num=n)
    captions = to_text(tokens, tokenizer)
    words = tokenize(captions)
    references = [words[i - i % n:i - i % n + n] for i in range(len(words))]
    # all n-grams weigh the same: a corpus of ten images, none of which has any of them
    agreement = cider_of_tokens(words, references, {(): 10}).reshape(-1, n)
    return [captions[i * n + best] for i, best in enumerate(agreement.argmax(1))]


def make_captions(model, features, tokenizer, max_length, process, consensus=0, **decoding):
    """Captions of the pictures (B, S, W): by consensus, or by Captioner.generate(**decoding)."""
    with process.autocast():
        if consensus:
            return consensus_captions(model, features, tokenizer, max_length, consensus)
        tokens = model.generate(features, tokenizer.eot_token, max_length, **decoding)
    return to_text(tokens, tokenizer)


# --------------------------------------------------------------------------------------------------
# evaluation of a whole split, divided among the processes


@torch.no_grad()
def perplexity(model, features, captions, process, which_image="right", rows_at_once=160):
    """
    exp of the total loss over the total tokens of all captions, given each caption's own picture
    ("right"), another one ("wrong") or no picture ("none").
    """
    total_loss, total_tokens, n_captions = 0.0, 0, len(captions.start) - 1
    stride = process.world_size * rows_at_once
    for first in range(process.rank * rows_at_once, n_captions, stride):
        rows = np.arange(first, min(first + rows_at_once, n_captions))
        idx, targets = captions.batch(rows, process.device)
        # a picture is encoded once for all its captions in the batch
        image_of_row = np.searchsorted(captions.of_image, rows, side="right") - 1
        images = np.arange(image_of_row[0], image_of_row[-1] + 1)
        image_idx = torch.from_numpy(image_of_row - images[0]).to(process.device)
        if which_image == "wrong":
            images = (images + len(features) // 2) % len(features)
        batch = None if which_image == "none" else read_features(features, images, process.device)
        with process.autocast():
            total_loss += model(idx, batch, targets, image_idx).item()
        total_tokens += captions.count(rows)
    total_loss, total_tokens = all_reduce_sum(process, total_loss, total_tokens)
    mean_loss = total_loss / total_tokens
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def caption_split(model, features, tokenizer, max_length, process, beam=1, batch_size=256,
                  consensus=0):
    """The captions of all pictures of a split, in order: by consensus, beam search, or greedy."""
    mine = {}
    batch_size = max(1, batch_size // max(beam, consensus))
    stride = process.world_size * batch_size
    for start in range(process.rank * batch_size, len(features), stride):
        numbers = np.arange(start, min(start + batch_size, len(features)))
        batch = read_features(features, numbers, process.device)
        captions = make_captions(model, batch, tokenizer, max_length, process, consensus, beam=beam)
        mine |= zip(numbers.tolist(), captions)
    if process.world_size > 1:
        parts = [None] * process.world_size
        dist.all_gather_object(parts, mine)
        for part in parts:
            mine |= part
    return [mine[number] for number in range(len(features))]


def published_protocol(candidates, references, seed, n=50 * 128):
    """
    Scores by the protocol of the published table: at most 50 batches of 128 pictures, one reference
    drawn for each, words split on spaces. Other papers use all five references.
    """
    rng = np.random.default_rng(seed)
    drawn = [[refs[rng.integers(len(refs))].split()] for refs in references[:n]]
    return score([candidate.split() for candidate in candidates[:n]], drawn, tokenized=True)[0]


def variant_name(run):
    return f"xattn, every {run['every']}" if run["fusion"] == "xattn" else run["fusion"]


# --------------------------------------------------------------------------------------------------
# figures. From here on, functions read the settings, as the main part does


def count_captions(rows, batch_size):
    """The log over captions, not steps: runs of different batch sizes compare."""
    return [row | dict(step=row["step"] * batch_size) for row in rows]


def draw_curves(rows, layers):
    rows = count_captions(rows, batch_size)
    panels = {"loss (nats a token)": {"": curve(rows, "loss")}}
    if scst:
        panels = {"CIDEr x 100 of samples": {"": curve(rows, "reward", 100)}}
    panels[f"perplexity, {split}"] = {"": curve(rows, "perplexity")}
    panels[f"CIDEr x 100, {split}"] = {"": curve(rows, "CIDEr", 100)}
    if layers:
        for kind, half in (("attn_gate", "attention"), ("mlp_gate", "MLP")):
            curves = {f"layer {layer}": curve(rows, f"{kind}_{layer}") for layer in layers}
            panels[f"tanh(gate) of the {half}, by layer"] = curves
    plot(os.path.join(out_dir, "curves.png"), panels, xlabel="training captions")


def draw_captions(path, pictures, titles, columns=4):
    """A grid of pictures, each with its title above it."""
    plt = pyplot()
    rows = math.ceil(len(pictures) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.8 * rows), squeeze=False,
                             layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, picture, title in zip(axes.flat, pictures, titles):
        ax.imshow(picture)
        lines = [textwrap.fill(line, 44) for line in title.split("\n")]
        ax.set_title("\n".join(lines), fontsize=8.5, parse_math=False)
    fig.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(fig)


@torch.no_grad()
def draw_attention(path, model, features, pictures, tokenizer, max_length, grid=None):
    """
    Where each token of a caption attends, in the gated block whose attention differs most from
    token to token. grid: (rows, columns) of the image tokens; None = a square.
    """
    tokens = model.generate(features, tokenizer.eot_token, max_length)
    idx = F.pad(tokens, (1, 0), value=tokenizer.eot_token)[:, :-1]
    maps = []
    model.hidden(idx, model.encode_image(features), attention_maps=maps)
    maps = torch.stack(maps).float().cpu()  # (blocks, B, T, S)
    best = maps.std(2, correction=0).mean((1, 2)).argmax()
    side = math.isqrt(maps.shape[-1])
    height, width = grid or (side, side)
    captions = truncate_at_eos(tokens, tokenizer)
    longest = max(1, *map(len, captions))
    plt = pyplot()
    fig, axes = plt.subplots(len(captions), longest, squeeze=False,
                             figsize=(1.15 * longest, 1.45 * len(captions)))
    for ax in axes.flat:
        ax.axis("off")
    for b, (picture, caption) in enumerate(zip(pictures, captions)):
        for t, (ax, token) in enumerate(zip(axes[b], caption)):
            # tokens before the grid, such as CLIP's class token, have no place in the picture
            heat = maps[best, b, t, -height * width:].view(height, width).numpy()
            ax.imshow(picture, extent=(0, 1, 0, 1))
            ax.imshow(heat, extent=(0, 1, 0, 1), cmap="inferno", alpha=0.6,
                      interpolation="bilinear")
            ax.set_title(tokenizer.decode([token]).strip(), fontsize=9, parse_math=False)
    layer = list(model.gated)[best]
    fig.suptitle(f"where each word attends (gated block before layer {layer})", fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=90)
    plt.close(fig)


def draw_results(model, metadata, evaluation, images, references, features, tokenizer, max_length,
                 process):
    """
    captions.png: pictures spread over the split; best_worst.png: the highest and lowest CIDEr;
    attention.png, for xattn: greedy captions of three pictures, of the better half and long.
    """
    candidates, cider = evaluation.captions, evaluation.cider
    files = [os.path.join(data, split, entry["file_name"]) for entry in images]
    if not all(map(os.path.exists, files)):
        return  # there may be features without pictures

    def draw(name, numbers, with_score):
        titles = []
        for i in numbers:
            start = f"CIDEr {100 * cider[i]:.0f}: " if with_score else ""
            titles.append(f"{start}{candidates[i]}\n({references[i][0].strip()})")
        draw_captions(os.path.join(out_dir, name), [open_image(files[i]) for i in numbers], titles)

    def different(numbers, n):
        """The first n of these pictures whose captions differ."""
        first_with = {}
        for i in numbers:
            first_with.setdefault(candidates[i], i)
        return np.array(list(first_with.values())[:n])

    draw("captions.png", np.unique(np.linspace(0, len(files) - 1, 12).astype(int)), False)
    ranking = np.argsort(-cider, kind="stable")
    half = max(1, len(ranking) // 2)
    best, worst = different(ranking[:half], 6), different(ranking[half:][::-1], 6)[::-1]
    draw("best_worst.png", [*best, *worst], True)
    if model.fusion == "xattn":
        better = sorted(ranking[:half], key=lambda i: -len(candidates[i].split()))
        numbers = different(better, 3)
        pictures = [open_image(files[i]) for i in numbers]
        if metadata.get("pretrained") and not metadata["encoder"].startswith("timm/"):
            # open_clip's towers see the middle of a picture, the other encoders all of it
            pictures = [ImageOps.fit(picture, (224, 224)) for picture in pictures]
        features = read_features(features, numbers, process.device)
        with process.autocast():
            draw_attention(os.path.join(out_dir, "attention.png"), model, features, pictures,
                           tokenizer, max_length, metadata.get("grid"))


# --------------------------------------------------------------------------------------------------
# a trained run: to go on from, and to caption pictures of your own


def read_run(path, mmap=None):
    """A checkpoint of this script."""
    checkpoint = load_checkpoint(path, mmap)
    if "gpt_config" not in checkpoint:
        die(f"{path} is not a checkpoint of train_caption.py")
    return checkpoint


def load_run(path):
    """A checkpoint of this script, and the Captioner in it, frozen GPT included."""
    checkpoint = read_run(path)
    saved = checkpoint["settings"]
    gpt_model = GPT(GPTConfig(**checkpoint["gpt_config"]))
    model = Captioner(gpt_model, saved["fusion"], saved["every"], checkpoint["width"],
                      saved["n_query"], dropout)
    load_weights(model, checkpoint["model"], path)
    return checkpoint, model


ADDRESS = ("http://", "https://")


def on_disk(name):
    return os.path.exists(name) or glob.glob(name)


def split_names(names):
    """The names in "a,b,c". A comma can also be part of a file's name or of an address."""
    found = []
    for part in names.split(","):
        is_name = part.startswith(ADDRESS) or on_disk(part)
        if found and not is_name and not on_disk(found[-1]):
            found[-1] += "," + part
        else:
            found.append(part)
    return found


def read_pictures(names, problems):
    """
    Yields (name, picture) of files, folders, globs and URLs. If a picture cannot be read, a line
    that says why goes to the list `problems`.
    """
    films_and_pages = (".mpg", ".mpeg", ".pdf", ".eps", ".ps")  # Pillow lists them as pictures
    endings = tuple(end for end, kind in Image.registered_extensions().items()
                    if kind in Image.OPEN and end not in films_and_pages)
    for name in split_names(names):
        # brackets in a name that exists are part of the name
        files = [name] if os.path.exists(name) else sorted(glob.glob(name)) or [name]
        if os.path.isdir(name):
            inside = sorted(glob.glob(os.path.join(glob.escape(name), "*")))  # no hidden files
            files = [file for file in inside
                     if file.lower().endswith(endings) and os.path.isfile(file)]
        for file in files:
            if file.startswith(ADDRESS):
                picture = fetch_picture(file)
            else:
                picture = open_image(file, otherwise=str)
            if isinstance(picture, str):
                problems.append(picture)
            else:
                yield file, picture


def fetch_picture(url):
    """The picture, or a string that says why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, re.sub(r"[^\w.]+", "_", url)[-100:])
        problem = download(url, path, tries=3, otherwise=str)
        if os.path.exists(path):
            return open_image(path, otherwise=str)
        return problem.split(". Run again")[0]


def caption_pictures(path, process):
    """
    Prints captions of the pictures that image= names, and draws the first 40 beside the checkpoint
    `path`. Pictures that cannot be read are listed at the end; exit code 2.
    """
    checkpoint, model = load_run(path)
    saved, pretrained = checkpoint["settings"], checkpoint["pretrained"]
    name = saved["encoder"]
    if name not in ("tagger", "patches") and not pretrained:
        die(f"{path} was trained on features of another program: it has no encoder for pictures")
    image_encoder = load_encoder(name, pretrained, checkpoint["tagger"],
                                 checkpoint.get("turned", False))
    if fingerprint(image_encoder) != checkpoint["weights"]:
        die(f"the weights of {name} ({pretrained}) are not those that {path} was trained with")
    image_encoder.to(process.device)
    model.to_process(process).eval()
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    drawn, titles, problems = [], [], []
    pictures = read_pictures(image, problems)
    # at most 32 pictures and 256 captions at once
    at_once = max(1, 256 // max(8, num, beam, consensus))
    while batch := list(itertools.islice(pictures, at_once)):
        pixels = [image_encoder.preprocess(picture) for _, picture in batch]
        features = torch.from_numpy(encode(image_encoder, pixels, process))
        features = features.to(process.device, torch.float32)
        captions = make_captions(model, features, tokenizer, saved["max_length"], process,
                                 consensus, temperature=temperature, top_k=top_k, num=num,
                                 beam=beam)
        for i, (file, picture) in enumerate(batch):
            of_picture = captions[i * num:(i + 1) * num]
            for caption in of_picture:
                print(f"{file}: {caption}", flush=True)
            if len(drawn) < 40:
                drawn.append(picture)
                titles.append("\n".join(of_picture))
    if drawn:
        target = os.path.join(os.path.dirname(path), "image.png")
        draw_captions(target, drawn, titles, columns=min(4, len(drawn)))
        print(f"drawn in {target}, by {path} (step {checkpoint['step']})")
    if problems:
        die(f"{len(problems)} could not be captioned: " + "; ".join(problems[:5]))
    if not drawn:
        die(f"image={image}: no picture there")


# --------------------------------------------------------------------------------------------------
# several scripts in a row: the demo, and all variants side by side


def run_script(script, *words):
    """Prints and runs a command. If it fails or is stopped (Ctrl-C, SIGTERM), this one ends too."""
    print(f"\n$ python {script} {shlex.join(words)}", flush=True)
    # without torchrun's variables, the script runs alone
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    here = os.path.dirname(os.path.abspath(__file__))
    child = subprocess.Popen([sys.executable, os.path.join(here, script), *words], env=env)
    stopped = []

    def stop(number, frame):
        stopped.append(number)
        if number == signal.SIGTERM:  # a terminal sends Ctrl-C to both
            child.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if stopped or code:
        sys.exit(128 + stopped[0] if stopped else code)


def prepare_demo(config):
    """Runs the four stages that make what DEMO names, but for those that are done."""
    stages = [  # what it does, the last file that it writes, its command
        ("draw scenes, with five captions each", "data/shapes/annotations/captions_train2017.json",
         "coco.py data=data/shapes shapes=8000 encoder=none"),
        ("tokenize the captions", "data/shapes/tokens/edufineweb_train_000001.npy",
         "fineweb.py text=data/shapes/train_captions.txt data=data/shapes/tokens tokenizer=learn "
         "val_tokens=20000"),
        ("pretrain a small GPT-2 on the captions alone, without pictures",
         "out/gpt2_shapes/curves.png",
         "train_gpt2.py data=data/shapes/tokens out_dir=out/gpt2_shapes n_layer=4 n_head=4 "
         "n_embd=128 block_size=128 batch_size=16 total_batch_size=2048 optimizer=muon "
         "learning_rate=8e-3 min_lr=4e-4 warmup_steps=20 weight_decay=0.01 max_steps=140 "
         "eval_interval=70 eval_tokens=20000 log_interval=20 compile=False"),
        ("train a small image encoder on the captions' words, and encode the scenes with it",
         f"data/shapes/features/{encoder}_val2017.npy",
         f"coco.py data=data/shapes encoder={encoder}"),
    ]
    if all(os.path.exists(result) for _, result, _ in stages):
        return
    print("There is no COCO here (`python coco.py` downloads it to data/coco2017): this is a demo "
          "on drawn scenes.\nEach stage is a command that you could type yourself; what exists "
          "already is not made again.", flush=True)
    for number, (what, result, command) in enumerate(stages, 1):
        if os.path.exists(result):
            continue
        print(f"\n[{number}/5] {what}", flush=True)
        words = command.split()
        if words[0] == "train_gpt2.py" and os.path.exists(run_file("out/gpt2_shapes")):
            words.append("init_from=resume")  # it was interrupted
        run_script(*words)
    typed = " ".join(f"{k}={config[k]}" for k in (*DEMO, "fusion", "every"))
    print(f"\n[5/5] train the fusion module\n\n$ python train_caption.py {typed}", flush=True)


def compare_variants(folder, chosen):
    """
    Trains each variant by a command, and compares scores and curves. Finished variants are kept,
    interrupted ones resumed. chosen: settings that stand before what was typed.
    """
    words = [f"{k}={v}" for k, v in chosen.items()]
    words += [word for word in sys.argv[1:] if not word.startswith(("fusion=", "out_dir="))]
    rows, curves = [], {"perplexity": {}, "CIDEr": {}}
    for fusion, every in VARIANTS:
        run_dir = f"{folder}/{fusion}{every if fusion == 'xattn' else ''}"
        if os.path.exists(f"{run_dir}/results.json"):
            print(f"{run_dir} is finished already", flush=True)
        else:
            resume = ["init_from=resume"] if os.path.exists(run_file(run_dir)) else []
            run_script("train_caption.py", *words, f"fusion={fusion}", f"every={every}",
                       f"out_dir={run_dir}", *resume)
        result = read_json(f"{run_dir}/results.json")
        for name, value in dict(split=split, beam=beam, consensus=consensus).items():
            if result["settings"][name] != value:
                die(f"{run_dir} was scored with {name}={result['settings'][name]}: score it again, "
                    f"`python train_caption.py out_dir={run_dir} init_from=resume eval_only=True "
                    f"{name}={value}`")
        rows.append(result)
        log = count_captions(read_log(f"{run_dir}/log.csv"), result["settings"]["batch_size"])
        for column in curves:
            curves[column][variant_name(result)] = curve(log, column)
    save_json(f"{folder}/results.json", rows, indent=1)
    panels = {f"{column}, {split}": lines for column, lines in curves.items()}
    plot(f"{folder}/comparison.png", panels, xlabel="training captions")
    print("\nvariant         |   trainable |  CIDEr | BLEU-4 | perplexity | wrong picture | "
          "captions")
    for r in rows:
        captions = r["step"] * r["settings"]["batch_size"]
        print(f"{variant_name(r):<16}| {r['trainable']:>11,} | {100 * r['CIDEr']:>6.1f} | "
              f"{100 * r['Bleu_4']:>6.1f} | {r['perplexity']:>10.2f} | "
              f"{r['perplexity_wrong_picture']:>13.2f} | {captions:>8,}")
    print(f"\nall scores: {folder}/results.json, the curves: {folder}/comparison.png")


def default_out_dir(settings):
    fusion, every = settings["fusion"], settings["every"]
    name = f"out/caption_{os.path.basename(os.path.normpath(settings['data']))}"
    if fusion == "all":
        return f"{name}_all"
    name += f"_{fusion}{every if fusion == 'xattn' else ''}"
    return name + "_shuffled" * settings["shuffle"] + "_scst" * settings["scst"]


def preset(typed):
    """The settings of a recipe, of the demo, or of the run that this one starts from or resumes."""
    if typed.get("image"):
        return {}
    init_from = typed.get("init_from", "scratch")
    if init_from not in ("scratch", "resume"):
        saved = read_run(run_file(init_from, "best.pt"), mmap=True)["settings"]
        return {k: v for k, v in saved.items() if k in INHERITED}
    chosen = dict(PREFIX_RECIPE) if typed.get("fusion") in ("linear", "qformer") else {}
    if "data" not in typed:
        chosen |= dict(data="data/coco2017") if splits_of("data/coco2017") else DEMO
    if init_from == "resume":
        settings = dict(fusion=fusion, every=every, shuffle=shuffle, scst=scst) | chosen | typed
        path = run_file(typed.get("out_dir") or default_out_dir(settings))
        saved = read_run(path, mmap=True)["settings"]
        chosen |= {k: v for k, v in saved.items() if k in RESUMED}
    return chosen


# --------------------------------------------------------------------------------------------------
# the parts of a run, in the order of use


class MovingAverage:
    """
    Exponential moving average of the trained weights (Polyak and Juditsky 1992): steps move them to
    and fro around a better place.
    """

    @torch.no_grad()
    def __init__(self, model, decay, last_weights=None):
        """last_weights: of a resumed run. Its model holds the average."""
        self.decay = decay
        self.weights = [p for p in model.parameters() if p.requires_grad]
        # the average; after swap(), the weights of the last step
        self.swapped_out = [p.detach().clone() for p in self.weights]
        for p, last in zip(self.weights, last_weights or []):
            p.copy_(last)

    @torch.no_grad()
    def update(self, step):
        # the first steps, far from the end, are soon forgotten
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, p in zip(self.swapped_out, self.weights):
            average.lerp_(p, 1 - decay)

    def swap(self):
        """Puts the average into the model, or the weights of the last step back."""
        for i, p in enumerate(self.weights):
            p.data, self.swapped_out[i] = self.swapped_out[i], p.data


def start_average(model, checkpoint):
    """A MovingAverage, or None. A resumed run that had one holds the average in its model."""
    last_weights = checkpoint.get("last_weights") if init_from == "resume" else None
    if (ema or last_weights) and not eval_only:
        return MovingAverage(model, ema, last_weights)


def check_settings(process):
    if num > 1 and consensus:
        die("consensus= gives one caption of each picture: leave num= or consensus= out")
    if num > beam and (beam > 1 or temperature == 0):
        die(f"num={num} different captions need temperature > 0, or beam={num}")
    if eval_only and init_from != "resume":
        die("eval_only=True evaluates a trained run: add init_from=resume")
    if scst and init_from == "scratch":
        die("scst=True goes on from a trained run: name it with init_from=out/...")
    if split == "train2017":
        die("split=train2017 is trained on, not held out: val2017 or test2017")
    if (fusion == "all" or image) and process.world_size > 1:
        die("fusion=all and image= run as one process: start them without torchrun")
    if batch_size % process.world_size:
        die(f"batch_size={batch_size} must be a multiple of {process.world_size} processes")


def find_run():
    """The run that image= uses: out_dir, else init_from, else the newest one."""
    if out_dir:
        return out_dir
    if init_from not in ("scratch", "resume"):
        return init_from
    paths = [path for path in glob.glob("out/**/*.pt", recursive=True) if "_shuffled" not in path]
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        with suppress(Exception):  # other programs have .pt files too
            if "gpt_config" in torch.load(path, "cpu", weights_only=True, mmap=True):
                return os.path.dirname(path)
    die("image= needs a trained run: `python train_caption.py` trains one")


def keep_other_runs():
    if os.path.exists(run_file(out_dir)) and init_from != "resume":
        die(f"{out_dir} holds a run, which this would overwrite: go on with init_from=resume, or "
            "name another out_dir=")


def load_split(name):
    """-> images, captions, features, the features' metadata."""
    images, captions = load_captions(data, name)
    features, metadata = load_features(data, encoder, name, images)
    if shuffle:
        features = np.random.default_rng(seed).permutation(features)
    return images, captions, features, metadata


def move_if_it_fits(features):
    """COCO's features are 9 GB: on a card with room for them, no loader is needed."""
    if "cuda" not in device:
        return features
    # scst needs memory itself, for its samples
    room = torch.cuda.mem_get_info(device)[0] * (0.25 if scst else 0.5)
    return torch.from_numpy(features[:]).to(device) if features.nbytes < room else features


def load_model_to_train(width, metadata, process):
    """-> a Captioner for these image features, its tokenizer, and the checkpoint or None."""
    if init_from == "scratch":
        with local_main_process_first(process):
            gpt_model, tokenizer, _ = load_model(gpt)
        n_rows, n_tokens = gpt_model.config.vocab_size, get_tokenizer(tokenizer).n_vocab
        if n_rows != n_tokens:
            die(f"gpt={gpt} has {n_rows:,} tokens, its tokenizer {n_tokens:,}: take a GPT with its "
                "own tokenizer")
        return Captioner(gpt_model, fusion, every, width, n_query, dropout), tokenizer, None
    # Resuming goes on from the last checkpoint. Evaluation and a new run start from the best one.
    if init_from == "resume":
        path = run_file(out_dir, "best.pt" if eval_only else "ckpt.pt")
    else:
        path = run_file(init_from, "best.pt")
    checkpoint, model = load_run(path)
    now = dict(gpt=gpt, fusion=fusion, every=every, n_query=n_query, encoder=encoder, width=width,
               weights=metadata.get("weights"))
    saved = checkpoint["settings"] | {k: checkpoint[k] for k in ("width", "weights")}
    other = [f"{k}={saved[k]}" for k in now if saved[k] != now[k]]
    if other:
        die(f"{path} was trained with {', '.join(other)}: go on with the same")
    return model, checkpoint["tokenizer"], checkpoint


def about_encoder(metadata):
    """What image= needs to load the image encoder again."""
    tagger = None
    if metadata.get("encoder") == "tagger":
        tagger = load_checkpoint(os.path.join(data, "features", "tagger.pt"))
    return dict(pretrained=metadata.get("pretrained"), weights=metadata.get("weights"),
                turned=metadata.get("turned", False), tagger=tagger)


class Evaluation(NamedTuple):
    captions: list      # of all held-out pictures
    scores: dict        # {metric: score}
    cider: np.ndarray   # of each picture
    right: float        # share of the captions without a mistake; None if not of drawn scenes

    def quality(self):
        """What chooses best.pt: CIDEr, or the share without a mistake, which is less noisy."""
        if self.right is None:
            return self.scores["CIDEr"]
        return self.right + 1e-6 * self.scores["CIDEr"]  # among equal shares, the higher CIDEr


def evaluate(model, images, references, features, tokenizer, max_length, process, beam=1,
             consensus=0):
    model.eval()
    captions = caption_split(model, features, tokenizer, max_length, process, beam,
                             consensus=consensus)
    scores, per_image = score(captions, references)
    return Evaluation(captions, scores, per_image["CIDEr"], fraction_right(images, captions))


def score_best(model, held_out, captions, evaluation, config):
    """
    The results of the best checkpoint, and the Evaluation that is drawn: greedy, or by the search
    that is set. evaluation: the greedy one, if it is known.
    """
    _, references, features, _, _, process = held_out
    model.eval()
    evaluation = evaluation or evaluate(model, *held_out)
    table = {"greedy": evaluation.scores}
    if single_reference:
        table["greedy, one reference"] = published_protocol(evaluation.captions, references, seed)
    if beam > 1:
        evaluation = evaluate(model, *held_out, beam)
        table[f"beam={beam}"] = evaluation.scores
    if consensus:
        reseed(seed, 0)
        evaluation = evaluate(model, *held_out, consensus=consensus)
        table[f"consensus={consensus}"] = evaluation.scores
    results = dict(fusion=fusion, every=every, **evaluation.scores, right=evaluation.right,
                   scores=table, settings=config)
    for name, which_image in (("", "right"), ("_wrong_picture", "wrong"), ("_no_picture", "none")):
        results["perplexity" + name] = perplexity(model, features, captions, process, which_image)
    return results, evaluation


def make_sampler(model, references, tokenizer):
    """-> sample(features, image numbers), which returns what self_critical does."""
    words = tokenize([caption for of_image in references for caption in of_image])
    words = iter([caption + [END] for caption in words])
    of_images = [list(itertools.islice(words, len(of_image))) for of_image in references]
    df = document_frequencies(of_images)

    def sample(features, numbers):
        references = [of_images[i] for i in numbers]
        return self_critical(model, features, references, df, tokenizer, max_length, samples)

    return sample


def next_batch(step, features, captions, process, sample):
    """
    This process's part of a step's global batch -> the arguments of Captioner.forward, the number
    of their targets, and for scst the mean reward.
    """
    images, chosen = training_batch(step, batch_size, captions, seed)
    images = images[process.rank::process.world_size]
    chosen = chosen[process.rank::process.world_size]
    x = read_features(features, images, process.device)  # (B, S, W)
    if token_dropout:
        S = x.shape[1]
        kept = torch.randperm(S)[:S - int(token_dropout * S)]
        x = x[:, kept.to(x.device)]
    if sample is None:
        idx, targets = captions.batch(chosen, process.device)
        return (idx, x, targets), captions.count(chosen), 0.0
    # An autocast of its own: the copies of weights that it caches here have no gradients, and the
    # training step must not use them.
    with process.autocast():
        idx, targets, image_idx, loss_weight, reward = sample(x, images)
    return (idx, x, targets, image_idx, loss_weight), (targets >= 0).sum().item(), reward


def read_gates(model):
    """-> {name: tanh(gate)}, in one transfer from the device."""
    gates = {f"{half}_gate_{layer}": getattr(block, f"{half}_gate").detach()
             for half in ("attn", "mlp") for layer, block in model.gated.items()}
    values = torch.stack(list(gates.values())).tanh().tolist() if gates else []
    return dict(zip(gates, values))


def save_captions(path, images, captions):
    """As a COCO results file, which cider.py scores."""
    rows = [dict(image_id=entry["id"], caption=caption)
            for entry, caption in zip(images, captions)]
    save_json(path, rows, indent=1)


def print_start(train_features, val_features, trainable, total, process, n_cut):
    n, S, W = train_features.shape
    print(f"{n:,} pictures to train on, {len(val_features):,} held out, {S} tokens x {W} each | "
          f"{trainable:,} trainable parameters, {trainable / total:.1%} of {total:,} | "
          f"{process.world_size} process(es) on {process.device}", flush=True)
    if n_cut:
        print(f"{n_cut:,} captions have more tokens than max_length= and are cut")


def print_evaluation(row, caption):
    print(f"step {row['step']:5d}/{max_steps} | held out: perplexity {row['perplexity']:.3f} | "
          f"CIDEr {100 * row['CIDEr']:.1f} | \"{caption}\"", flush=True)


def print_results(results, candidates, references):
    print("\ncaptions of pictures it was not trained on, and what a person wrote:")
    for candidate, refs in list(zip(candidates, references))[:10]:
        print(f"  {candidate:<62} | {refs[0].strip()}")
    metrics = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L")
    print(f"\n{'scores x 100':<24}" + "".join(f"{metric:>9}" for metric in metrics))
    for name, scores in results["scores"].items():
        print(f"{name:<24}" + "".join(f"{100 * scores[metric]:>9.1f}" for metric in metrics))
    r = results
    shuffled = ", features shuffled between pictures" * shuffle
    print(f"\nfusion                     {variant_name(r)}{shuffled}")
    print(f"trainable parameters       {r['trainable']:,} ({r['trainable'] / r['total']:.1%} of "
          f"{r['total']:,})")
    print(f"perplexity                 {r['perplexity']:.3f}   (the language model alone "
          f"{r['perplexity_no_picture']:.3f}, with a wrong picture "
          f"{r['perplexity_wrong_picture']:.3f})")
    if r["right"] is not None:
        print(f"captions entirely right    {r['right']:.1%} of {len(candidates)} held-out scenes "
              "(every size, colour, shape and place)")
    print(f"scored and drawn           {out_dir}/best.pt, of step {r['step']}")
    print(f"look at                    {out_dir}/captions.png, best_worst.png, curves.png"
          + ", attention.png" * (fusion == "xattn"))


def write_results(results, evaluation, model, held_out, metadata, rows):
    """Saves, draws and prints what came of a run."""
    images, references, *_ = held_out
    save_json(os.path.join(out_dir, "results.json"), results, indent=1)
    save_captions(os.path.join(out_dir, f"captions_{split}.json"), images, evaluation.captions)
    print_results(results, evaluation.captions, references)
    if not eval_only:
        draw_curves(rows, list(model.gated))
    draw_results(model, metadata, evaluation, *held_out)


# --------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    t_start = time.time()
    config = configure(globals(), preset)
    process = setup(device, dtype)
    rank, world_size, device, _ = process
    check_settings(process)
    torch.manual_seed(seed)

    # ---- only captions of some pictures
    if image:
        path = run_file(find_run(), "best.pt")
        caption_pictures(path, process)
        sys.exit(0)

    # ---- where the run goes. A run is never trained over
    out_dir = config["out_dir"] = out_dir or default_out_dir(config)
    is_demo = gpt == DEMO["gpt"] and data == DEMO["data"]
    if is_demo and rank == 0 and init_from == "scratch":
        prepare_demo(config)
    wait_for_all(process)
    if fusion == "all":
        compare_variants(out_dir, DEMO if is_demo else {})
        print(f"{time.time() - t_start:.0f} s in all")
        sys.exit(0)
    keep_other_runs()
    if rank == 0:
        print_settings(config)
        lock_folder(out_dir)
        warn_overlap(data, split)

    # ---- pictures and captions
    _, train_references, train_features, of_train = load_split("train2017")
    images, references, val_features, metadata = load_split(split)
    if of_train.get("weights") != metadata.get("weights"):
        die(f"{encoder} had other weights for train2017 than for {split}: encode one of them again")
    train_features = move_if_it_fits(train_features)

    # ---- the frozen GPT and the fusion module
    W = val_features.shape[2]
    raw_model, tokenizer_source, checkpoint = load_model_to_train(W, metadata, process)
    tokenizer = get_tokenizer(tokenizer_source)
    raw_model.to_process(process)
    trainable = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in raw_model.parameters())
    total += metadata.get("parameters", 0)  # the encoder's
    optimizers = make_optimizers(raw_model, optimizer, learning_rate, weight_decay, (0.9, beta2))
    step, best = 0, -1.0
    if init_from == "resume":
        step, best = checkpoint["step"], checkpoint.get("best", -1.0)
        if checkpoint["settings"]["split"] != split and step < max_steps:
            best = -1.0  # of other pictures
        if not eval_only:
            resume_optimizers(optimizers, checkpoint, out_dir)
        if rank == 0:
            warn_changed(config, checkpoint, " ".join(RESUMED) + " dtype")
    average = start_average(raw_model, checkpoint)
    # `model` trains; raw_model, with the same weights, evaluates and is saved
    model = distribute(raw_model.compiled() if compile else raw_model, process)

    # ---- captions as tokens, and for scst as words
    config["max_length"] = max_length = min(max_length, raw_model.gpt.config.block_size - 1)
    train_captions = TokenizedCaptions(train_references, tokenizer, max_length)
    val_captions = TokenizedCaptions(references, tokenizer, max_length)
    held_out = images, references, val_features, tokenizer, max_length, process
    sample = make_sampler(raw_model, train_references, tokenizer) if scst else None

    # ---- the loop
    if rank == 0:
        print_start(train_features, val_features, trainable, total, process,
                    train_captions.cut + val_captions.cut)
        columns = ["step", "loss", "reward", "perplexity", "CIDEr", "lr", "norm", "ms",
                   *read_gates(raw_model)]
        log = Log(os.path.join(out_dir, "log.csv"), columns, math.inf if eval_only else step,
                  start_wandb(config) if wandb_log and not eval_only else None)
    asked_to_stop, stop = stop_signals(), 0
    first_step = step
    best_evaluation = None  # of best.pt, if this process evaluated it
    while not eval_only:
        # evaluate, also where a resumed run begins, and save; with ema, the averaged weights
        row, is_best = dict(step=step), False
        is_due = step % eval_interval == 0 or step >= max_steps
        swapped = average and (is_due or stop)
        if swapped:
            average.swap()
        if is_due and not stop:
            evaluation = evaluate(raw_model, *held_out)
            row |= dict(perplexity=perplexity(raw_model, val_features, val_captions, process),
                        CIDEr=evaluation.scores["CIDEr"])
            check_finite(step, row["perplexity"], "the perplexity of held-out captions")
            if rank == 0:
                print_evaluation(row, evaluation.captions[0])
            if step > 0 and evaluation.quality() > best:
                is_best, best, best_evaluation = True, evaluation.quality(), evaluation
        if rank == 0 and (is_best or step > first_step and ("CIDEr" in row or stop)):
            save_run(out_dir, dict(
                model=raw_model.state_dict(), last_weights=average.swapped_out if swapped else None,
                step=step, best=best, settings=config, gpt_config=asdict(raw_model.gpt.config),
                optimizers=[opt.state_dict() for opt in optimizers], width=W,
                tokenizer=tokenizer_source, **about_encoder(metadata)), is_best)
        if swapped:
            average.swap()
        if step >= max_steps or stop:
            break

        # one step
        t0 = time.time()
        reseed(seed, step, rank)
        # scst without dropout: the model that learns is the one that sampled
        raw_model.train(not scst)
        batch, n_tokens, reward = next_batch(step, train_features, train_captions, process, sample)
        total_tokens, = all_reduce_sum(process, n_tokens)
        with process.autocast():
            # The mean over the tokens of the global batch. DDP averages the gradients of the
            # processes, so each process's loss counts world_size times.
            loss = model(*batch) * (world_size / total_tokens)
        loss.backward()
        lr = get_lr(step, learning_rate, min_lr, warmup_steps, max_steps)
        norm = optimizer_step(raw_model, optimizers, lr, grad_clip, step)
        if average:
            average.update(step)
        # all processes stop after the same step
        loss, reward, stop = all_reduce_sum(process, loss.item() / world_size,
                                            reward / world_size, len(asked_to_stop))
        if rank == 0:
            row |= dict(loss=loss, reward=reward if scst else None, lr=lr, norm=norm,
                        ms=(time.time() - t0) * 1000, **read_gates(raw_model))
            log.add(**row)
            if step % log_interval == 0 or step == max_steps - 1:
                print_step(row, max_steps, log.seconds_per_step(),
                           f" | {1000 * batch_size / row['ms']:,.0f} images/s")
        step += 1

    if stop:
        if rank == 0:
            print(f"stopped at step {step}; go on with init_from=resume out_dir={out_dir}")
        finish(process)

    # ---- results, of the best checkpoint
    signals_end_the_process()
    if rank == 0 and not eval_only:
        log.add(**row)
    wait_for_all(process)  # rank 0 has written the checkpoint
    checkpoint = load_checkpoint(run_file(out_dir, "best.pt"))
    load_weights(raw_model, checkpoint["model"], out_dir)
    results, evaluation = score_best(raw_model, held_out, val_captions, best_evaluation, config)
    results |= dict(trainable=trainable, total=total, step=checkpoint["step"])
    if rank == 0:
        write_results(results, evaluation, raw_model, held_out, metadata, log.rows)
        print(f"time                       {time.time() - t_start:.0f} s")
    finish(process)
