"""
The captioner: a frozen GPT, a frozen eye, and the one thing that is trained, the bridge between them.

    python train_caption.py                                   # nothing prepared: the built-in scenes, end to end, in two minutes on a laptop
    python train_caption.py fusion=all                        # five variants side by side
    python train_caption.py image=a.jpg,b.png                 # caption pictures of your own with the newest run
    python train_caption.py data=data/coco2017 gpt=gpt2       # COCO on one GPU, once `python coco.py` has encoded it
    torchrun --standalone --nproc_per_node=8 train_caption.py data=data/coco2017 gpt=out/gpt2/ckpt.pt

Three bridges:
  xattn    before every `every`-th block of the GPT, a gated cross-attention block lets each word look at the picture (Flamingo, Alayrac
           et al. 2022). Its gates start at zero, so training starts from the GPT exactly as it was, and opens its eyes little by little.
  linear   the picture's tokens, through one matrix, are put before the words as if they were words (ClipCap, LLaVA).
  qformer  32 learned queries read the picture first, and what they found is put before the words (BLIP-2, Li et al. 2023).

The defaults are the published recipe on COCO 2017 with GPT-2 124M and CLIP ViT-B/32, which reports (its protocol: one reference, part of
the split) CIDEr 57.1 / 55.9 / 47.8 for a gated block before every layer, every 2nd, every 4th; about 12 for linear; 35.0 for qformer.
Writes out_dir/{ckpt.pt, log.csv, results.json, captions_val2017.json, curves.png, captions.png, attention.png}.
"""
import glob
import json
import math
import os
import shlex
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps
from torch.nn.parallel import DistributedDataParallel

from fineweb import configure, die, get_tokenizer, save_atomically, show
from train_gpt2 import (GPT, GPTConfig, KVCache, Log, MLP, curve, decode, get_lr, load_checkpoint, load_weights, make_optimizers, plot, pyplot, read_log,
                        rank_zero_first, reseed, resume_optimizers, save_checkpoint, setup, sum_over, take_step)
from cider import evaluate as score
from coco import encode, load_captions, load_encoder, load_features, open_image, share_right

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python train_caption.py name=value` overrides any of them

data = None                 # a folder in COCO's layout; None = data/coco2017 if it is there, else the built-in scenes
out_dir = None              # where the run goes; None = out/caption_{data}_{fusion}
init_from = "scratch"       # scratch | resume (out_dir/ckpt.pt)
eval_only = False           # with init_from=resume: evaluate and draw, train nothing
gpt = "gpt2"                # the frozen writer: gpt2, gpt2-medium, ... | a folder, .safetensors or ckpt.pt
encoder = "ViT-B-32"        # the frozen eye, whose features coco.py wrote
fusion = "xattn"            # xattn, linear, qformer; all = train every variant and compare
every = 1                   # xattn: a gated block before every so-manieth block of the GPT
n_query = 32                # qformer: how many learned queries
dropout = 0.1               # xattn, qformer: on what the bridge makes of the picture
shuffle = False             # give every picture another one's features: what a captioner scores that can't see
batch_size = 128            # pictures a step, over all processes; each with one of its captions, drawn anew each epoch
max_length = 40             # longest caption, in tokens; the rest is cut, counted and said
optimizer = "adamw"         # adamw, or muon for the bridge's matrices
learning_rate = 2e-4        # the peak
min_lr = 1e-4               # where the cosine ends
warmup_steps = 0
max_steps = 7_392           # 8 epochs of 118,287 pictures
weight_decay = 0.1
grad_clip = 1.0
eval_interval = 924         # steps between evaluations, each followed by a checkpoint: an epoch
log_interval = 20           # steps between printed lines
image = None                # caption these pictures (a,b,...) with out_dir's checkpoint, the newest by default, instead of training
temperature = 1.0           # for image=: 0 takes the likeliest word each time
top_k = 10                  # for image=: choose among so many
seed = 1337
device = None               # cuda, cpu, mps; None takes the best there is
dtype = None                # bfloat16 or float32 for the matmuls; None = bfloat16 on CUDA
compile = None              # torch.compile the training step; None = on CUDA
wandb_log = False           # mirror the log to Weights & Biases

# The built-in road for a machine that has nothing prepared: four stages, then this script itself. A stage is what it does, the last file that
# it writes, and its command.
SHAPES_ROAD = (
    ("draw scenes, with five captions each", "data/shapes/annotations/captions_val2017.json",
     "coco.py data=data/shapes shapes=8000 encoder=none"),
    ("tokenize the captions", "data/shapes/tokens/edufineweb_train_000001.npy",
     "fineweb.py text=data/shapes/train_captions.txt data=data/shapes/tokens tokenizer=learn val_tokens=20000"),
    ("pretrain a small GPT-2 on the captions alone: it learns the language of scenes, and sees none", "out/gpt2_shapes/curves.png",
     "train_gpt2.py data=data/shapes/tokens out_dir=out/gpt2_shapes n_layer=4 n_head=4 n_embd=128 block_size=128 batch_size=16 total_batch_size=2048 "
     "optimizer=muon learning_rate=8e-3 min_lr=4e-4 warmup_steps=20 weight_decay=0.01 max_steps=160 eval_interval=80 eval_tokens=20000 log_interval=20"),
    ("teach a small eye what captions speak of, and encode the scenes with it", "data/shapes/features/{encoder}_val2017.npy",
     "coco.py data=data/shapes encoder={encoder}"),
)
SHAPES_PRESET = dict(data="data/shapes", gpt="out/gpt2_shapes/ckpt.pt", encoder="tagger", batch_size=64, optimizer="muon", learning_rate=8e-3, min_lr=4e-4,
                     warmup_steps=20, weight_decay=0.0, dropout=0.0, max_steps=360, eval_interval=90, log_interval=20)
VARIANTS = (("xattn", 1), ("xattn", 2), ("xattn", 4), ("linear", 1), ("qformer", 1))  # what fusion=all compares: (fusion, every)

# ----------------------------------------------------------------------------------------------------------------------
# the bridges. B pictures, S tokens each, W wide as the encoder made them; T words; C = n_embd, H = n_head, D = C / H; P prefix tokens


class GatedCrossAttention(nn.Module):
    """Flamingo's block: words x (B, T, C) ask, the picture answers; each half is added through tanh(gate), with gate = 0 at the start."""

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

    def look(self, picture):
        """Keys and values of the picture (B, S, C): (2, B, H, S, D). They are the same for every word, so they are computed once."""
        B, S, C = picture.shape
        return self.c_kv(picture).view(B, S, 2, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)

    def forward(self, x, kv, weights=None):
        B, T, C = x.shape
        q = self.c_q(self.ln_1(x)).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        if weights is not None:  # for drawing: where each word looks, (B, T, S), mean over heads
            weights.append((q @ kv[0].mT * q.shape[-1] ** -0.5).softmax(-1).mean(1))
        y = F.scaled_dot_product_attention(q, kv[0], kv[1])  # every word sees the whole picture: nothing is causal here
        x = x + self.attn_gate.tanh() * self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_gate.tanh() * self.mlp(self.ln_2(x))


class QFormer(nn.Module):
    """Learned queries that attend to each other and to the picture through two layers, and leave as n_query prefix tokens."""

    def __init__(self, width, n_embd, n_query, dropout, n_layer=2, n_head=8):
        super().__init__()
        self.read = nn.Linear(width, n_embd)
        self.queries = nn.Parameter(0.02 * torch.randn(1, n_query, n_embd))
        self.layers = nn.ModuleList([nn.TransformerDecoderLayer(n_embd, n_head, 4 * n_embd, dropout, "gelu", batch_first=True, norm_first=True)
                                     for _ in range(n_layer)])
        self.write = nn.Sequential(nn.LayerNorm(n_embd), nn.Linear(n_embd, n_embd))

    def forward(self, features):
        picture, x = self.read(features), self.queries.expand(len(features), -1, -1)  # (B, S, C), (B, P, C)
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

    def look(self, features):
        """Features (B, S, W) -> what the GPT will get of them: keys and values for each gated block, or a prefix (B, P, C)."""
        picture = self.project(features)
        return {layer: block.look(picture) for layer, block in self.gated.items()} if self.gated else picture

    def write(self, idx, sight=None, cache=None, weights=None):
        """Tokens idx (B, T), the next after those in the cache, and `look(features)` -> logits (B, T, V)."""
        prefix = sight if torch.is_tensor(sight) else None
        P, seen = prefix.shape[1] if prefix is not None else 0, cache.seen if cache else 0
        x = self.gpt.embed(idx, max(0, seen - P))  # the prefix has no positions of its own: the first word is at 0, as the GPT is used to
        if P and not seen:
            x = torch.cat([prefix.to(x.dtype), x], 1)  # (B, P+T, C)
        for layer, block in enumerate(self.gpt.transformer.h):
            if sight is not None and str(layer) in self.gated:
                x = self.gated[str(layer)](x, sight[str(layer)], weights)
            x = block(x, cache, layer)
        if cache:
            cache.seen += x.shape[1]
        return self.gpt.head(x[:, -idx.shape[1]:])  # words only: nothing is predicted from the prefix but the first word, from BOS

    def forward(self, idx, features, targets):
        """The summed cross-entropy of targets (B, T), in nats; -100 marks padding. features=None leaves the GPT without a picture."""
        logits = self.write(idx, None if features is None else self.look(features))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    @torch.no_grad()
    def generate(self, features, bos, max_new_tokens, temperature=0.0, top_k=None, generator=None):
        """Captions of pictures (B, S, W), as tokens (B, up to max_new_tokens), each ended by `bos`, which is also EOS."""
        sight = self.look(features)
        P = sight.shape[1] if torch.is_tensor(sight) else 0
        cache = KVCache(self.gpt.config, len(features), P + 1 + max_new_tokens, self.gpt.lm_head.weight)
        start = torch.full((len(features), 1), bos, device=features.device)
        return decode(lambda new: self.write(new, sight, cache), start, max_new_tokens, temperature, top_k, bos, generator)[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# captions as tokens


class TokenizedCaptions:
    """Every caption of a split in one flat array: BOS, words, EOS (both are <|endoftext|>). The first word is predicted from the picture too."""

    def __init__(self, captions, tokenizer, max_length):
        eot = tokenizer.eot_token
        rows = tokenizer.encode_ordinary_batch([" ".join(said.split()) for all_said in captions for said in all_said])
        self.cut = sum(len(row) > max_length for row in rows)
        rows = [[eot] + row[:max_length] + [eot] for row in rows]
        self.flat = torch.tensor([token for row in rows for token in row])
        self.start = np.cumsum([0] + [len(row) for row in rows])  # caption c is flat[start[c]:start[c+1]]
        self.of_image = np.cumsum([0] + [len(all_said) for all_said in captions])  # image i has captions of_image[i] .. of_image[i+1]-1

    def batch(self, numbers, device):
        """Captions by number -> idx, targets (B, T), padded to the longest of them; the loss skips targets of -100."""
        rows = [self.flat[self.start[c]:self.start[c + 1]] for c in numbers]
        idx = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
        targets = nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
        return idx.to(device), targets.to(device)


def training_batch(step, batch_size, captions, seed):
    """The global batch of a step, a pure function of (seed, step): image numbers and caption numbers. Every epoch shows each image once."""
    n = len(captions.of_image) - 1
    images, chosen = [], []
    for number in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(number, n)
        if not images or i == 0:
            rng = np.random.default_rng((seed, epoch))
            order, lot = rng.permutation(n), rng.random(n)
        image = order[i]
        first, end = captions.of_image[image:image + 2]
        images.append(image)
        chosen.append(first + int(lot[i] * (end - first)))
    return np.array(images), chosen


# ----------------------------------------------------------------------------------------------------------------------
# evaluation: over the whole split, shared out over the processes


def gather(features, numbers, device):
    """The features of some pictures, by number: (B, S, W) in fp32, on the device."""
    rows = features[numbers] if torch.is_tensor(features) else torch.from_numpy(features[numbers])
    return rows.to(device, torch.float32)


@torch.no_grad()
def perplexity(model, features, captions, me, sight="right", batch_size=256):
    """exp of the total loss over the total tokens of all captions, given the right picture, a "wrong" one, or "none"."""
    owner = np.repeat(np.arange(len(features)), np.diff(captions.of_image))  # the image that each caption is about
    if sight == "wrong":
        owner = (owner + len(features) // 2) % len(features)
    total_loss, total_tokens = 0.0, 0
    for start in range(me.rank * batch_size, len(owner), me.world * batch_size):
        numbers = range(start, min(start + batch_size, len(owner)))
        idx, targets = captions.batch(numbers, me.device)
        with me.autocast:
            total_loss += model(idx, None if sight == "none" else gather(features, owner[numbers], me.device), targets).item()
        total_tokens += (targets >= 0).sum().item()
    total_loss, total_tokens = sum_over(me, total_loss, total_tokens)
    return math.exp(total_loss / total_tokens)


def caption_split(model, features, tokenizer, max_length, me, batch_size=256):
    """The greedy caption of every picture of a split, as strings in their order."""
    mine = {}
    for start in range(me.rank * batch_size, len(features), me.world * batch_size):
        numbers = np.arange(start, min(start + batch_size, len(features)))
        with me.autocast:
            tokens = model.generate(gather(features, numbers, me.device), tokenizer.eot_token, max_length)
        mine |= zip(numbers.tolist(), to_text(tokens, tokenizer))
    parts = [mine]
    if me.world > 1:
        parts = [None] * me.world
        dist.all_gather_object(parts, mine)
    return [said for _, said in sorted(item for part in parts for item in part.items())]


def to_text(tokens, tokenizer):
    """Generated tokens (B, T) -> captions, each up to its EOS."""
    return [tokenizer.decode(row[:row.index(tokenizer.eot_token)] if tokenizer.eot_token in row else row).strip() for row in tokens.tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# pictures to look at


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
    plt = pyplot()
    sight, rows = model.look(features), []
    tokens = model.generate(features, tokenizer.eot_token, max_length)
    weights = []
    idx = F.pad(tokens, (1, 0), value=tokenizer.eot_token)[:, :-1]  # what had been written when each word was chosen
    model.write(idx, sight, weights=weights)
    weights = torch.stack(weights)  # (blocks, B, T, S)
    best = weights.std(2).mean((1, 2)).argmax()
    for b, row in enumerate(tokens.tolist()):
        words = row[:row.index(tokenizer.eot_token)] if tokenizer.eot_token in row else row
        rows.append([(tokenizer.decode([word]).strip(), weights[best, b, t].float().cpu()) for t, word in enumerate(words)])
    longest = max(1, *map(len, rows))
    fig, axes = plt.subplots(len(rows), longest, figsize=(1.15 * longest, 1.45 * len(rows)), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for line, picture, words in zip(axes, pictures, rows):
        for ax, (word, weight) in zip(line, words):
            grid = math.isqrt(len(weight))
            heat = weight[len(weight) - grid * grid:].view(grid, grid)  # CLIP's first token is the class token, which is nowhere
            ax.imshow(picture, extent=(0, 1, 0, 1))
            ax.imshow(heat, extent=(0, 1, 0, 1), cmap="inferno", alpha=0.6, interpolation="bilinear")
            ax.set_title(word, fontsize=9, parse_math=False)
    fig.suptitle(f"where each word looks (gated block before layer {list(model.gated)[best]})", fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=90)
    plt.close(fig)


def results_table(rows):
    lines = [f"{'variant':<22} | {'trainable':>11} | {'CIDEr':>6} | {'BLEU-4':>6} | {'perplexity':>10}"]
    for r in rows:
        name = f"xattn, every {r['every']}" if r["fusion"] == "xattn" else r["fusion"]
        lines.append(f"{name:<22} | {r['trainable']:>11,} | {100 * r['CIDEr']:>6.1f} | {100 * r['Bleu_4']:>6.1f} | {r['perplexity']:>10.2f}")
    return "\n".join(lines)


def run(script, *words):
    """Runs one of our own scripts as a user would, and shows how."""
    print(f"\n$ python {script} {shlex.join(words)}", flush=True)
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}  # also when this is one of torchrun's processes
    code = subprocess.call([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), script), *words], env=alone)
    if code:
        sys.exit(code)


# ----------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals())
    preset = {}
    if data is None:
        preset = dict(data="data/coco2017") if image or os.path.isdir("data/coco2017") else SHAPES_PRESET
        config = configure(globals(), preset)
    builtin = preset is SHAPES_PRESET
    if fusion not in ("xattn", "linear", "qformer", "all"):
        die(f"fusion={fusion}: xattn, linear, qformer or all")
    if every < 1 or top_k is not None and top_k < 1:
        die(f"every={every}, top_k={top_k}: 1 or more")
    if eval_only and init_from != "resume":
        die("eval_only=True evaluates a trained bridge: add init_from=resume")
    rank, world, device, autocast = me = setup(device, dtype)
    t_start = time.time()

    if image:  # caption pictures with a trained run; the checkpoint carries all that there is to know about it
        runs = sorted((run for run in glob.glob("out/caption_*/**/ckpt.pt", recursive=True) if "_shuffled" not in run), key=os.path.getmtime)
        path = os.path.join(out_dir, "ckpt.pt") if out_dir else runs[-1] if runs else die("image= needs a trained run: `python train_caption.py` trains one")
        pictures = [open_image(file) for file in image.split(",")]
        checkpoint = load_checkpoint(path)
        if "gpt_config" not in checkpoint:
            die(f"{path} is not a checkpoint of train_caption.py")
        was, tokenizer = checkpoint["settings"], get_tokenizer(checkpoint["tokenizer"])
        eye = load_encoder(was["encoder"], checkpoint["pretrained"], checkpoint["tagger"])
        model = Captioner(GPT(GPTConfig(**checkpoint["gpt_config"])), was["fusion"], was["every"], checkpoint["width"], was["n_query"])
        load_weights(model, checkpoint["model"], path)
        model.to(device).eval()
        torch.manual_seed(seed)
        features = torch.from_numpy(encode(eye.to(device), [eye.prepare(picture) for picture in pictures], device)).to(device, torch.float32)
        captions = to_text(model.generate(features, tokenizer.eot_token, was["max_length"], temperature, top_k), tokenizer)
        for file, said in zip(image.split(","), captions):
            print(f"{file}: {said}")
        target = os.path.join(os.path.dirname(path), "image.png")
        draw_captions(target, pictures, captions, columns=min(4, len(pictures)))
        print(f"drawn in {target}, by {path}")
        sys.exit(0)

    if builtin and rank == 0:
        print("COCO was not found (data/coco2017; `python coco.py` downloads it): taking the built-in road of drawn scenes instead.\n"
              "Each stage below is a command that you could type yourself; what is on disk already is not made again.", flush=True)
        for number, (what, result, command) in enumerate(SHAPES_ROAD, 1):
            result, command = result.format(encoder=encoder), command.format(encoder=encoder)
            print(f"\n[{number}/5] {what}" + (f": {result} is there already" if os.path.exists(result) else ""), flush=True)
            if not os.path.exists(result):
                run(*command.split())
        typed = " ".join(f"{k}={config[k]}" for k in SHAPES_PRESET)
        print(f"\n[5/5] train the bridge\n\n$ python train_caption.py {typed} fusion={fusion} every={every}", flush=True)
    if builtin and world > 1:
        dist.barrier()
    name = os.path.basename(os.path.normpath(data))

    if fusion == "all":
        if world > 1:
            die("fusion=all trains the variants one after the other, each in a run of its own: start it without torchrun")
        folder, rows = out_dir or f"out/caption_{name}_all", []
        for kind, n in VARIANTS:
            mine = f"{folder}/{kind}{n if kind == 'xattn' else ''}"
            settings = config | dict(fusion=kind, every=n, out_dir=mine)
            run("train_caption.py", *(f"{k}={v}" for k, v in settings.items() if v is not None))
            rows.append(json.load(open(f"{mine}/results.json")) | dict(log=f"{mine}/log.csv"))
        save_atomically(f"{folder}/results.json", lambda f: f.write(json.dumps(rows, indent=1).encode()))
        label = {r["log"]: f"xattn every {r['every']}" if r["fusion"] == "xattn" else r["fusion"] for r in rows}
        logs = {r["log"]: read_log(r["log"]) for r in rows}
        plot(f"{folder}/comparison.png", {
            "perplexity, val2017": {label[k]: curve(log, "perplexity") for k, log in logs.items()},
            "CIDEr x 100, val2017": {label[k]: curve(log, "CIDEr", 100) for k, log in logs.items()}})
        print(f"\n{results_table(rows)}\n\nthe table: {folder}/results.json, the curves: {folder}/comparison.png, {time.time() - t_start:.0f} s in all")
        sys.exit(0)

    # ---- pictures, captions, and the frozen two
    out_dir = out_dir or f"out/caption_{name}_{fusion}{every if fusion == 'xattn' else ''}{'_shuffled' if shuffle else ''}"
    if rank == 0:
        show(config | dict(out_dir=out_dir))
        os.makedirs(out_dir, exist_ok=True)
    (_, train_said), (images, references) = load_captions(data, "train2017"), load_captions(data, "val2017")
    train_features, about = load_features(data, encoder, "train2017", len(train_said))
    val_features, _ = load_features(data, encoder, "val2017", len(images))
    if shuffle:
        train_features, val_features = (np.random.default_rng(seed).permutation(f) for f in (train_features, val_features))
    if "cuda" in device and train_features.nbytes < 0.5 * torch.cuda.mem_get_info()[0]:  # COCO's 9 GB fit on most GPUs: no loader needed
        train_features = torch.from_numpy(train_features[:]).to(device)

    path = os.path.join(out_dir, "ckpt.pt")
    checkpoint = load_checkpoint(path) if init_from == "resume" else None
    if gpt.endswith(".pt"):  # our own checkpoints carry their tokenizer; everything else is GPT-2's
        tokenizer_source = load_checkpoint(gpt).get("tokenizer", "gpt2")
    else:
        tokenizer_source = "gpt2"
    tokenizer = get_tokenizer(tokenizer_source)
    with rank_zero_first(me):
        writer = GPT.from_pretrained(gpt)
    if writer.config.vocab_size != tokenizer.n_vocab:
        die(f"gpt={gpt} has {writer.config.vocab_size:,} tokens, its tokenizer {tokenizer.n_vocab:,}: only GPT-2's vocabulary, or our own checkpoints")
    max_length = min(max_length, writer.config.block_size - 1)
    train_captions = TokenizedCaptions(train_said, tokenizer, max_length)
    val_captions = TokenizedCaptions(references, tokenizer, max_length)
    if (cut := train_captions.cut + val_captions.cut) and rank == 0:
        print(f"{cut:,} captions are longer than max_length={max_length} tokens and were cut")

    # ---- the bridge
    torch.manual_seed(seed)
    model = Captioner(writer, fusion, every, train_features.shape[-1], n_query, dropout).to(device)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters()) + about.get("parameters", 0)
    optimizers, step = make_optimizers(model, optimizer, learning_rate, weight_decay), 0
    if checkpoint:
        load_weights(model, checkpoint["model"], path)
        resume_optimizers(optimizers, checkpoint, path)
        step = checkpoint["step"]
    elif init_from != "scratch":
        die(f"init_from={init_from}: scratch or resume (gpt= says which GPT to build on)")
    # `step_model` is what trains; `model`, the same weights uncompiled, evaluates, writes captions and is saved
    step_model = torch.compile(model) if (compile if compile is not None else "cuda" in device) else model
    if world > 1:
        step_model = DistributedDataParallel(step_model, device_ids=[device] if "cuda" in device else None)
    if batch_size % world:
        die(f"batch_size={batch_size} pictures can't be shared out evenly over {world} processes")
    gates = {f"{kind}_{layer}": getattr(block, kind) for kind in ("attn_gate", "mlp_gate") for layer, block in model.gated.items()}
    if rank == 0:
        print(f"{len(train_said):,} pictures to train on, {len(images):,} held out, {train_features.shape[1]} tokens x {train_features.shape[2]} each | "
              f"{trainable:,} trainable parameters, {trainable / total:.1%} of {total:,} | {world} process(es) on {device}", flush=True)
        log = Log(os.path.join(out_dir, "log.csv"), ["step", "loss", "perplexity", "CIDEr", "lr", "norm", "ms", *gates], math.inf if eval_only else step)
        if wandb_log:
            import wandb
            wandb.init(project="nanocaption", name=os.path.basename(out_dir), config=config)

    t0, first_step = time.time(), step
    while True:
        # ---- look at the whole held-out split, and save
        row = dict(step=step)
        if step % eval_interval == 0 or step >= max_steps or eval_only:
            model.eval()
            said = caption_split(model, val_features, tokenizer, max_length, me)
            scores, _ = score(said, references)
            row |= dict(perplexity=perplexity(model, val_features, val_captions, me), CIDEr=scores["CIDEr"])
            model.train()
            if rank == 0:
                print(f"step {step:5d}/{max_steps} | held out: perplexity {row['perplexity']:.3f} | CIDEr {100 * row['CIDEr']:.1f} | "
                      f"\"{said[0]}\"", flush=True)
                if step > first_step:
                    save_checkpoint(path, dict(model=model.state_dict(), optimizers=[opt.state_dict() for opt in optimizers], step=step, settings=config | dict(max_length=max_length),
                                               gpt_config=asdict(writer.config), width=train_features.shape[-1], tokenizer=tokenizer_source, pretrained=about.get("pretrained"),
                                               tagger=load_checkpoint(os.path.join(data, "features", "tagger.pt")) if encoder == "tagger" else None))
        if step >= max_steps or eval_only:
            break

        # ---- one step
        t1 = time.time()
        reseed(seed, step, rank)
        which, chosen = training_batch(step, batch_size, train_captions, seed)
        idx, targets = train_captions.batch(chosen[rank::world], device)
        n_tokens, = sum_over(me, (targets >= 0).sum().item())
        with autocast:  # the mean over the tokens of the global batch; DDP will average gradients, so each process counts `world` times
            loss = step_model(idx, gather(train_features, which[rank::world], device), targets) * (world / n_tokens)
        loss.backward()
        lr = get_lr(step, learning_rate, min_lr, warmup_steps, max_steps)
        norm = take_step(model, optimizers, lr, grad_clip)
        loss, = sum_over(me, loss.item() / world)
        if rank == 0:
            row |= dict(loss=loss, lr=lr, norm=float(norm), ms=(time.time() - t1) * 1000) | {k: gate.tanh().item() for k, gate in gates.items()}
            log.add(**row)
            if wandb_log:
                wandb.log(row, step=step)
            if step % log_interval == 0 or step == max_steps - 1:
                left = (time.time() - t0) / (step + 1 - first_step) * (max_steps - step - 1)
                print(f"step {step:5d}/{max_steps} | loss {loss:.4f} | norm {float(norm):.2f} | lr {lr:.2e} | {row['ms']:.0f} ms | "
                      f"{batch_size / row['ms'] * 1000:,.0f} images/s | {left / 60:.1f} min left", flush=True)
        step += 1

    # ---- what came of it
    model.eval()
    without, wrong = (perplexity(model, val_features, val_captions, me, sight) for sight in ("none", "wrong"))
    if rank == 0:
        right = share_right(images, said)
        results = dict(fusion=fusion, every=every, trainable=trainable, total=total, perplexity=row["perplexity"], **scores, perplexity_wrong_picture=wrong,
                       perplexity_no_picture=without, right=right, step=step, settings=config)
        coco_results = [dict(image_id=image["id"], caption=caption) for image, caption in zip(images, said)]
        for file, content in (("results.json", results), ("captions_val2017.json", coco_results)):
            save_atomically(os.path.join(out_dir, file), lambda f: f.write(json.dumps(content, indent=1).encode()))

        if not eval_only:
            log.add(**row)
        panels = {"loss (nats a token)": {"train": curve(log.rows, "loss")}, "perplexity, val2017": {"": curve(log.rows, "perplexity")},
                  "CIDEr x 100, val2017": {"": curve(log.rows, "CIDEr", 100)}}
        for kind, title in (("attn_gate", "tanh(gate) of the attention, by layer"), ("mlp_gate", "tanh(gate) of the MLP, by layer")):
            if model.gated:
                panels[title] = {f"layer {layer}": curve(log.rows, f"{kind}_{layer}") for layer in model.gated}
        plot(os.path.join(out_dir, "curves.png"), panels)
        files = [os.path.join(data, "val2017", image["file_name"]) for image in images[:12]]
        drawn = [open_image(file) for file in files if os.path.exists(file)]
        if len(drawn) == len(files):  # features may be here without their pictures
            draw_captions(os.path.join(out_dir, "captions.png"), drawn, [f"{s}\n({r[0].strip()})" for s, r in zip(said, references)])
            if model.gated:
                with autocast:
                    draw_attention(os.path.join(out_dir, "attention.png"), model, gather(val_features, np.arange(min(3, len(images))), device),
                                   [picture if encoder in ("tagger", "patches") else ImageOps.fit(picture, (224, 224)) for picture in drawn],  # CLIP sees the middle
                                   tokenizer, max_length)

        print("\ncaptions of pictures it was not trained on, and what a person said:")
        for caption, refs in list(zip(said, references))[:10]:
            print(f"  {caption:<62} | {refs[0].strip()}")
        print(f"\nfusion                     {fusion}" + (f", every {every}" if fusion == "xattn" else "") + (", features shuffled between pictures" if shuffle else ""))
        print(f"trainable parameters       {trainable:,} ({trainable / total:.1%} of {total:,})")
        print(f"perplexity                 {row['perplexity']:.3f}   (the language model alone {without:.3f}, with a wrong picture {wrong:.3f})")
        print(f"CIDEr x 100                {100 * scores['CIDEr']:.1f}\nBLEU-4 x 100               {100 * scores['Bleu_4']:.1f}")
        if right is not None:
            print(f"captions entirely right    {right:.1%} of {len(images)} held-out scenes (every size, colour, shape and place)")
        print(f"look at                    {out_dir}/captions.png, curves.png" + (", attention.png" if model.gated else ""))
        print(f"time                       {time.time() - t_start:.0f} s")
    if world > 1:
        dist.barrier()  # rank 0 draws a little longer; who leaves early may take the others down
        dist.destroy_process_group()
