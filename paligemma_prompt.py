r"""
What a prompt can do: PaliGemma in plain PyTorch, and the cheapest ways to make it write captions of
another kind, inside 16 GB.

    python paligemma_prompt.py                  # nothing prepared: a demo with a small PaliGemma
    M=google/paligemma-3b-pt-224@bfloat16       # the real one, on one GPU
    python paligemma_prompt.py paligemma=$M data=data/risc prompt=soft soft_position=after_image
    python paligemma_prompt.py paligemma=$M data=data/risc compare=True     # seven ways, one table
    python paligemma_prompt.py stack=True siglip=google/siglip-so400m-patch14-224 \
        gemma=google/gemma-2b data=data/risc trainable=lora                 # built from its parts
    python paligemma_prompt.py init_from=out/prompt_risc_soft_after_image image=a.jpg,b.png

PaliGemma (Beyer et al. 2024, https://arxiv.org/abs/2407.07726) encodes a picture as 256 tokens with
a SigLIP tower and one matrix, and writes with Gemma. Its attention mask is neither causal nor full:

                     picture     bos  caption en \n   a   red  roof
        picture      x  x  x  x   x       x        x  .    .    .
        bos          x  x  x  x   x       x        x  .    .    .
        caption en   x  x  x  x   x       x        x  .    .    .
        \n           x  x  x  x   x       x        x  .    .    .   -> a
        a            x  x  x  x   x       x        x  x    .    .   -> red
        red          x  x  x  x   x       x        x  x    x    .   -> roof
        roof         x  x  x  x   x       x        x  x    x    x   -> eos

The prefix, picture and prompt, is known before anything is written, so all its tokens attend to
each other. Each token of the suffix attends to the prefix and to what was written before it. The
last token of the prefix predicts the first word. The loss covers the suffix and eos only. A full
mask would leak the answer; a causal one would hide the prompt from the picture.

A hard prompt is text. A soft prompt (Lester et al. 2021, https://arxiv.org/abs/2104.08691) is
vectors that stand for no text: ten of them are trained, 20,480 numbers, everything else is frozen.
Gemma's embedding table is also its output matrix, whose rows have a length of about 1. Layer 0
needs entries of size about 1, so Gemma multiplies embedded text by sqrt(2048) = 45. Image tokens
have the right size already and are not multiplied. A soft prompt enters after the multiplication
and starts as copies of the text's embeddings at that size: at steps of 0.01, unscaled rows would
take long to grow. Where the ten enter is soft_position=:

        before_image  [soft] picture bos caption en \n
        after_image   picture [soft] bos caption en \n
        after_bos     picture bos [soft] caption en \n
        before_suffix picture bos caption en \n [soft]

Writes out_dir/{adapter.safetensors, ckpt.pt, log.csv, results.json, captions_{split}.json,
curves.png, captions.png}. The adapter holds only what was trained, 80 kB for a soft prompt, and
the name of its model.
"""
import glob
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageOps
from torch.utils.checkpoint import checkpoint

from fineweb import (configure, die, download, hub, lock_folder, print_settings, read_json, reading,
                     save_atomically, save_json)
from train_gpt2 import (KVCache, Log, beam_search, check_finite, check_shapes, curve, decode,
                        get_lr, load_checkpoint, make_optimizers, optimizer_step, peak_memory, plot,
                        print_step, pyplot, read_log, resume_optimizers, safetensors_files,
                        save_checkpoint, setup, signals_end_the_process, start_wandb, stop_signals,
                        warn_changed)
from cider import evaluate as score
from coco import draw_shapes, load_captions, open_image, splits_of
from train_caption import (TokenizedCaptions, caption_split, draw_captions, perplexity,
                           read_features, run_script, save_captions, to_text, training_batch)

# --------------------------------------------------------------------------------------------------
# settings: `python paligemma_prompt.py name=value` overrides any

paligemma: str = None       # hub name[@revision], folder, .safetensors, .npz, small; None = a demo
tokenizer: str = None       # a SentencePiece file; None = tokenizer.model beside the weights
data: str = None            # folders in COCO's layout, a,b: one a step, in turn
out_dir: str = None         # where the run goes; None = out/prompt_{data}_{what is trained}
init_from = "scratch"       # scratch | resume (out_dir/ckpt.pt) | an adapter or its folder
eval_only = False           # evaluate, train nothing
prompt = "hard"             # one of hard | soft: soft adds learned vectors to the text
prompt_text = "caption en"  # several, a,b: one a step, in turn; evaluated with the first
n_soft = 10                 # >= 1: number of learned vectors
soft_position = "after_image"  # one of before_image | after_image | after_bos | before_suffix
prefix_order = "image,bos,prompt"  # the other pieces of the prefix, in any order
trainable = "none"          # one of none | attention | lora | all: of Gemma; all: and of SigLIP
lora_rank = 8               # >= 1: width of the thin matrices of LoRA
stack = False               # SigLIP, a new projector (trained) and Gemma
siglip: str = None          # stack: where SigLIP comes from
gemma: str = None           # stack: where Gemma and its tokenizer come from
compare = False             # runs METHODS below: a table and a plot
beam = 1                    # >= 1: of the search for captions; 1 = greedy
image: str = None           # caption pictures (a,b,...) with init_from's adapter, or the newest
batch_size = 8              # >= 1: pictures a step, each with one random caption
max_length = 64             # >= 1: tokens; longer captions are cut and counted
optimizer: str = None       # one of adamw | muon | sgd: None = sgd for attention, otherwise adamw
learning_rate: float = None  # > 0: the peak; None = RATES below
min_lr = 0.0                # >= 0: where the cosine ends
warmup_steps = 10           # >= 0
max_steps = 500             # >= 1
grad_clip = 1.0             # >= 0: largest norm of the gradient; 0 = no clipping
eval_interval = 100         # >= 1: steps between evaluations, each followed by a checkpoint
log_interval = 20           # >= 1: steps between printed lines
gradient_checkpointing: bool = None  # None = above 1e9 parameters
seed = 1337                 # >= 0
device: str = None          # cuda, cpu, mps; None takes the best there is
dtype: str = None           # one of bfloat16 | float32: of frozen weights; None = bfloat16 on CUDA
wandb_log = False           # mirror the log to Weights & Biases

RENAMED = dict(words="prompt_text", place="soft_position", order="prefix_order", train="trainable",
               recompute="gradient_checkpointing")
SOFT_POSITIONS = ("before_image", "after_image", "after_bos", "before_suffix")
# what compare=True runs
METHODS = {"hard, zero-shot": dict(prompt="hard", trainable="none"),
           "hard + attention": dict(prompt="hard", trainable="attention")}
for position in SOFT_POSITIONS:
    METHODS[f"soft, {position}"] = dict(prompt="soft", trainable="none", soft_position=position)
METHODS["hard + LoRA"] = dict(prompt="hard", trainable="lora")
# learning rates: for PaliGemma, and for the small model of the demo
RATES = dict(hard=(0, 0), soft=(1e-2, 0.3), attention=(0.03, 3e-3), lora=(2e-4, 2e-3),
             stack=(5e-4, 2e-3), all=(1e-5, 8e-3))
# what is saved in an adapter, and what else a resumed run takes over from its checkpoint
ADAPTER = ("paligemma tokenizer siglip gemma prompt prompt_text n_soft soft_position prefix_order "
           "trainable lora_rank stack max_length").split()
RESUMED = ADAPTER + ("data batch_size optimizer learning_rate min_lr warmup_steps max_steps "
                     "grad_clip eval_interval seed dtype beam gradient_checkpointing").split()

# --------------------------------------------------------------------------------------------------
# The model, under Hugging Face's parameter names. B pictures; N image tokens, P tokens of the
# prefix, T of all, S = cached + T; D = n_embd; H query heads, G key heads, E = head_dim; W, M =
# v_embd, n_mlp. `c` is a config as below, as a namespace; v_ is for the vision tower.

FULL = dict(image_size=224, patch_size=14, v_layer=27, v_head=16, v_embd=1152, v_mlp=4304,
            n_layer=18, n_head=8, n_kv_head=1, head_dim=256, n_embd=2048, n_mlp=16384,
            vocab_size=257_152, query_scale=1 / 16, gemma2=False, attn_softcap=None,
            final_softcap=None, rope_theta=10_000.0, eps=1e-6)
SMALL = FULL | dict(image_size=64, patch_size=16, v_layer=3, v_head=4, v_embd=128, v_mlp=256,
                    n_layer=4, n_head=4, head_dim=32, n_embd=128, n_mlp=384, vocab_size=480,
                    query_scale=32 ** -0.5)


def split_heads(x, E):
    return x.unflatten(-1, (-1, E)).transpose(1, 2)  # (B, T, heads * E) -> (B, heads, T, E)


class SigLIPLayer(nn.Module):

    def __init__(self, c):
        super().__init__()
        W = c.v_embd
        self.head_dim = W // c.v_head
        self.layer_norm1 = nn.LayerNorm(W, 1e-6)
        self.layer_norm2 = nn.LayerNorm(W, 1e-6)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(W, W) for name in names})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(W, c.v_mlp), fc2=nn.Linear(c.v_mlp, W)))

    def forward(self, x):
        a, h = self.self_attn, self.layer_norm1(x)
        q, k, v = [split_heads(project(h), self.head_dim)
                   for project in (a.q_proj, a.k_proj, a.v_proj)]
        y = F.scaled_dot_product_attention(q, k, v)  # every patch sees every patch
        x = x + a.out_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh"))


class SigLIP(nn.Module):
    """A ViT without a class token (Zhai et al. 2023, https://arxiv.org/abs/2303.15343)."""

    def __init__(self, c):
        super().__init__()
        n_patches = (c.image_size // c.patch_size) ** 2
        self.embeddings = nn.ModuleDict(dict(
            patch_embedding=nn.Conv2d(3, c.v_embd, c.patch_size, c.patch_size),
            position_embedding=nn.Embedding(n_patches, c.v_embd)))
        layers = nn.ModuleList([SigLIPLayer(c) for _ in range(c.v_layer)])
        self.encoder = nn.ModuleDict(dict(layers=layers))
        self.post_layernorm = nn.LayerNorm(c.v_embd, 1e-6)

    def forward(self, pixels):
        """Pictures (B, 3, size, size) in [-1, 1] -> normed patches (B, N, W)."""
        positions = self.embeddings.position_embedding.weight
        x = self.embeddings.patch_embedding(pixels.to(positions.dtype))  # (B, W, rows, columns)
        x = x.flatten(2).mT + positions  # (B, N, W)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class RMSNorm(nn.Module):
    """Computed in float32. The stored weight is the factor minus one."""

    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(n)), eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * (1 + self.weight.float())).to(x.dtype)


class Linear(nn.Linear):
    """
    Frozen in bfloat16; or trained in float32 and cast for each matmul; or frozen, beside two thin
    trained matrices (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).
    """

    def add_lora(self, rank):
        n_out, n_in = self.weight.shape
        device = self.weight.device
        self.lora_a = nn.Parameter(torch.randn(rank, n_in, device=device) * n_in ** -0.5)
        # zero: training starts from the model as it is
        self.lora_b = nn.Parameter(torch.zeros(n_out, rank, device=device))

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        if not hasattr(self, "lora_a"):
            return y
        # 2 = alpha / rank
        return y + 2 * F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


def rotate(x, start, theta):
    """
    RoPE (Su et al. 2021, https://arxiv.org/abs/2104.09864) on x (B, heads, T, E), whose first
    position is `start`. Entry e is paired with entry e + E/2, not with its neighbour.
    """
    T, E = x.shape[2:]
    frequency = theta ** (-torch.arange(0, E, 2, device=x.device) / E)
    angle = torch.arange(start, start + T, device=x.device)[:, None] * frequency  # (T, E/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class GemmaLayer(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.c, D, M = c, c.n_embd, c.n_mlp
        n_query, n_key = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        self.self_attn = nn.ModuleDict(dict(
            q_proj=Linear(D, n_query, bias=False), k_proj=Linear(D, n_key, bias=False),
            v_proj=Linear(D, n_key, bias=False), o_proj=Linear(n_query, D, bias=False)))
        self.mlp = nn.ModuleDict(dict(
            gate_proj=Linear(D, M, bias=False), up_proj=Linear(D, M, bias=False),
            down_proj=Linear(M, D, bias=False)))
        self.input_layernorm = RMSNorm(D, c.eps)
        self.post_attention_layernorm = RMSNorm(D, c.eps)
        if c.gemma2:
            self.pre_feedforward_layernorm = RMSNorm(D, c.eps)
            self.post_feedforward_layernorm = RMSNorm(D, c.eps)

    def attend(self, x, mask, kv_cache, layer):
        c, a = self.c, self.self_attn
        start = kv_cache.pos if kv_cache else 0
        q = rotate(split_heads(a.q_proj(x), c.head_dim), start, c.rope_theta)  # (B, H, T, E)
        k = rotate(split_heads(a.k_proj(x), c.head_dim), start, c.rope_theta)  # (B, G, T, E)
        v = split_heads(a.v_proj(x), c.head_dim)
        if kv_cache:
            k, v = kv_cache.update(layer, k, v)  # (B, G, S, E)
        k = k.repeat_interleave(c.n_head // c.n_kv_head, 1)  # (B, H, S, E)
        v = v.repeat_interleave(c.n_head // c.n_kv_head, 1)
        if c.attn_softcap is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=c.query_scale)
        else:  # the fused attention has no cap
            scores = c.attn_softcap * torch.tanh(q @ k.mT * (c.query_scale / c.attn_softcap))
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            y = scores.float().softmax(-1).to(v.dtype) @ v
        return a.o_proj(y.transpose(1, 2).flatten(2))

    def feed(self, x):
        gate = F.gelu(self.mlp.gate_proj(x), approximate="tanh")
        return self.mlp.down_proj(gate * self.mlp.up_proj(x))

    def forward(self, x, mask=None, kv_cache=None, layer=None):
        h = self.attend(self.input_layernorm(x), mask, kv_cache, layer)
        if self.c.gemma2:
            x = x + self.post_attention_layernorm(h)
            return x + self.post_feedforward_layernorm(self.feed(self.pre_feedforward_layernorm(x)))
        x = x + h
        # a trap: in Gemma 1, the norm before the MLP goes by this name
        return x + self.feed(self.post_attention_layernorm(x))


class Gemma(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.c, self.gradient_checkpointing = c, False
        # later rows stand for no text (<image>, padding)
        self.n_words = min(c.vocab_size, 257_152)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList([GemmaLayer(c) for _ in range(c.n_layer)])
        self.norm = RMSNorm(c.n_embd, c.eps)

    def embed(self, idx):
        return self.embed_tokens(idx) * self.c.n_embd ** 0.5

    def forward(self, x, P, kv_cache=None):
        """Embeddings -> hidden states, both (B, T, D). Causal but for the first P tokens."""
        T, mask = x.shape[1], None
        if T > P:
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()  # (query, key)
            mask[:, :P] = True
        for i, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, mask, kv_cache, i)
        if kv_cache:
            kv_cache.pos += T
        return x

    def head(self, x):
        """Hidden states (..., D) -> float32 logits (..., n_words), from the unscaled table."""
        logits = F.linear(self.norm(x), self.embed_tokens.weight[:self.n_words]).float()
        cap = self.c.final_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


class PaliGemma(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.vision_tower = SigLIP(c)
        self.multi_modal_projector = nn.ModuleDict(dict(linear=Linear(c.v_embd, c.n_embd)))
        self.language_model = Gemma(c)

    def encode_image(self, pixels):
        """Pictures (B, 3, size, size) in [-1, 1] -> image tokens (B, N, D)."""
        return self.multi_modal_projector.linear(self.vision_tower(pixels))

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32, siglip=None):
        """
        `name`: on the hub (owner/model or owner/model@revision), a folder or file of safetensors
        with a config.json, or big_vision's .npz. With `siglip`, the tower is that checkpoint's,
        Gemma is `name`'s, and the projector is random. All is frozen. Tensors are read one by one.
        """
        c, shapes, stream = open_model(name, siglip)
        with torch.device("meta"):
            model = cls(c)
        wanted = {key: p.shape for key, p in model.named_parameters()
                  if not (siglip and "projector" in key)}
        check_shapes(f"{siglip} and {name}" if siglip else name, wanted, shapes)
        try:
            for key, tensor in stream():
                put(model, key, tensor.to(device, dtype, copy=True))
        except (OSError, zipfile.BadZipFile, safetensors.SafetensorError) as problem:
            die(f"{name} is damaged ({problem}): get it anew")
        if siglip:
            add_projector(model, device)
        return model


def add_projector(model, device):
    """A random projector whose image tokens have the size of embedded text."""
    c, norm = model.config, model.vision_tower.post_layernorm
    # after the final norm, an image token has a squared length of sum(w^2 + b^2)
    length = (norm.weight.float().square() + norm.bias.float().square()).sum().sqrt()
    words = model.language_model.embed(torch.arange(min(10_000, c.vocab_size), device=device))
    size = words.float().square().mean().sqrt() / length
    weight = torch.randn(c.n_embd, c.v_embd, device=device) * size
    put(model, "multi_modal_projector.linear.weight", weight)
    put(model, "multi_modal_projector.linear.bias", torch.zeros(c.n_embd, device=device))


def put(module, key, tensor, train=False):
    parent, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=train))


# --------------------------------------------------------------------------------------------------
# Checkpoints, in the two published formats


def open_model(name, siglip=None):
    """-> the config, {our name: shape}, and a function that yields (our name, tensor)."""
    # of each file, the tensors whose names start so
    sources = {"": name}
    if siglip:
        sources = {"language_model.": name, "vision_tower.": siglip}
    shapes, streams, configs = {}, {}, []
    for start, source in sources.items():
        path = locate(source)
        open_file = open_npz if path.endswith(".npz") else open_safetensors
        with reading(source, "a whole checkpoint, .safetensors with config.json or .npz"):
            of_part, streams[start], config = open_file(path)
        shapes |= {key: shape for key, shape in of_part.items() if key.startswith(start)}
        configs.append(config)

    def stream():
        for start, tensors in streams.items():
            for key, tensor in tensors():
                if key.startswith(start):
                    yield key, tensor

    text, vision = configs[0], configs[-1]
    with reading(f"{name}: its config.json", "one of a PaliGemma"):
        c = read_config(name, shapes, text.get("text_config", text),
                        vision.get("vision_config", vision))
    return c, shapes, stream


def adapter_in(name):
    """`name`, or, if it is the folder of a run of this script, the adapter there."""
    path = os.path.join(name, "adapter.safetensors")
    return path if os.path.exists(path) else name


def locate(name):
    """-> the path of a checkpoint. One that is named as on the hub is downloaded."""
    if os.path.exists(name):
        return adapter_in(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name):
        die(f"{name}: no such file or folder, and not a name on the hub (owner/model)")
    folder = os.path.join("pretrained", name.replace("/", "_"))
    repo, _, revision = name.partition("@")
    revision = revision or "main"
    print(f"{name}: first accept Google's licence at {hub()}/{repo} and set HF_TOKEN", flush=True)
    tree = download(f"{hub()}/api/models/{repo}/tree/{revision}",
                    os.path.join(folder, "files.json"))
    files = [entry["path"] for entry in read_json(tree)]
    wanted = re.compile(r"config\.json|tokenizer\.model|"
                        r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    for file in filter(wanted.fullmatch, files):
        download(f"{hub()}/{repo}/resolve/{revision}/{file}", os.path.join(folder, file))
    return folder


def open_safetensors(path):
    """
    A folder in Hugging Face's layout, or a single file with its config.json beside it -> {our name:
    shape}, a function that yields (our name, tensor), and the content of config.json.
    """
    where, shapes = {}, {}
    for file in safetensors_files(path):
        with safetensors.safe_open(file, "pt") as f:
            metadata = f.metadata()
            for key in f.keys():
                name = our_name(key)
                if name is None:
                    continue
                part = f.get_slice(key)
                if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    die(f"{file}: {key} is stored as {part.get_dtype()}: quantized weights cannot "
                        "be read")
                where[name], shapes[name] = (file, key), part.get_shape()

    def stream():
        # the table first: while it is converted, it is in memory twice
        for name in sorted(where, key=lambda name: "embed" not in name):
            file, key = where[name]
            # opened anew: what was read of a mapped file counts as ours until it is closed
            with safetensors.safe_open(file, "pt") as f:
                yield name, f.get_tensor(key)

    # a model that was trained whole here carries its config itself
    config = json.loads((metadata or {}).get("config", "{}"))
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    config_file = os.path.join(folder, "config.json")
    if os.path.exists(config_file):
        config = read_json(config_file)
    # the head is the embedding table once more; some libraries save only one of the two
    head, table = "lm_head.weight", "language_model.embed_tokens.weight"
    if head in shapes:
        parts = (config, config.get("text_config", {}))
        tied = all(part.get("tie_word_embeddings", True) for part in parts)
        if table in shapes and not tied:
            die(f"{path}: its lm_head is not its embedding table (tie_word_embeddings=false)")
        where.setdefault(table, where.pop(head))
        shapes.setdefault(table, shapes.pop(head))
    return shapes, stream, config


PREFIXES = {
    "language_model.model.": "language_model.",
    "vision_tower.vision_model.": "vision_tower.",
    "vision_model.": "vision_tower.",
    "embeddings.": "vision_tower.embeddings.",
    "encoder.": "vision_tower.encoder.",
    "post_layernorm.": "vision_tower.post_layernorm.",
    "embed_tokens.": "language_model.embed_tokens.",
    "layers.": "language_model.layers.",
    "norm.": "language_model.norm.",
}


def our_name(key):
    """Our name of a published tensor; None for those that are not used."""
    key = key.removeprefix("model.")
    for theirs, ours in PREFIXES.items():
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
    if "lm_head." in key:
        return "lm_head.weight" if key.endswith("lm_head.weight") else None
    # the rest of a SigLIP, and the soft prompt beside a model that was trained whole
    if key == "soft" or key.startswith(("text_model.", "logit_", "head.", "vision_tower.head.")):
        return None
    return key


# How an array of big_vision becomes our (out, in) matrix. E is the size of a head.
def same(w):
    return w            # (out, in)


def flip(w):
    return w.mT         # (in, out)


def heads_in(w):
    return w.mT.flatten(0, 1)  # (heads, in, E)


def in_heads(w):
    return w.flatten(1).mT     # (in, heads, E)


def heads_out(w):
    return w.flatten(0, 1).mT  # (heads, E, out)


BLOCK = "img/Transformer/encoderblock/"
HEADS = BLOCK + "MultiHeadDotProductAttention_0/"
# {}: the arrays of all layers are one, stacked
TOWER, GEMMA = "vision_tower.encoder.layers.{}.", "language_model.layers.{}."
# (its name without /kernel, /scale or /w; ours without .weight; how its array becomes ours)
BIG_VISION = [
    ("img/embedding", "vision_tower.embeddings.patch_embedding", lambda w: w.permute(3, 2, 0, 1)),
    ("img/pos_embedding", "vision_tower.embeddings.position_embedding", lambda w: w[0]),
    ("img/Transformer/encoder_norm", "vision_tower.post_layernorm", same),
    ("img/head", "multi_modal_projector.linear", flip),
    (BLOCK + "LayerNorm_0", TOWER + "layer_norm1", same),
    (BLOCK + "LayerNorm_1", TOWER + "layer_norm2", same),
    (BLOCK + "MlpBlock_0/Dense_0", TOWER + "mlp.fc1", flip),
    (BLOCK + "MlpBlock_0/Dense_1", TOWER + "mlp.fc2", flip),
    (HEADS + "query", TOWER + "self_attn.q_proj", in_heads),
    (HEADS + "key", TOWER + "self_attn.k_proj", in_heads),
    (HEADS + "value", TOWER + "self_attn.v_proj", in_heads),
    (HEADS + "out", TOWER + "self_attn.out_proj", heads_out),
    ("llm/embedder/input_embedding", "language_model.embed_tokens", same),
    ("llm/final_norm", "language_model.norm", same),
    ("llm/layers/attn/q_einsum", GEMMA + "self_attn.q_proj", heads_in),
    ("llm/layers/attn/attn_vec_einsum", GEMMA + "self_attn.o_proj", heads_out),
    ("llm/layers/attn/kv_einsum", GEMMA + "self_attn.k_proj", lambda w: heads_in(w[0])),
    ("llm/layers/attn/kv_einsum", GEMMA + "self_attn.v_proj", lambda w: heads_in(w[1])),
    ("llm/layers/mlp/gating_einsum", GEMMA + "mlp.gate_proj", lambda w: flip(w[0])),
    ("llm/layers/mlp/gating_einsum", GEMMA + "mlp.up_proj", lambda w: flip(w[1])),
    ("llm/layers/mlp/linear", GEMMA + "mlp.down_proj", flip),
    ("llm/layers/pre_attention_norm", GEMMA + "input_layernorm", same),
    ("llm/layers/post_attention_norm", GEMMA + "post_attention_layernorm", same),
    ("llm/layers/pre_ffw_norm", GEMMA + "pre_feedforward_layernorm", same),
    ("llm/layers/post_ffw_norm", GEMMA + "post_feedforward_layernorm", same),
]


def open_npz(path):
    """
    big_vision's file, a zip of arrays -> the same three. An array may hold a matrix of all layers,
    2.4 GB: it is read a layer at a time.
    """
    archive = zipfile.ZipFile(path)
    members, shapes, text, vision = [], {}, {}, {}
    # the table first, as above
    files = sorted(archive.namelist(), key=lambda file: "embed" not in file)
    gemma2 = any("post_ffw_norm" in file for file in files)
    for file in files:
        with archive.open(file) as f:
            np.lib.format.read_magic(f)
            shape, by_column, kind = np.lib.format.read_array_header_1_0(f)
            begin = f.tell()
        assert not by_column, f"{file} is stored column by column"
        assert kind.kind in "fV" and kind.isnative, f"{file} is stored as {kind}"
        key = file.removesuffix(".npy").removeprefix("params/")
        base, leaf = re.fullmatch("(.*?)(/kernel|/bias|/scale|/w)?", key).groups()
        if base.endswith("q_einsum"):
            text["head_dim"] = shape[-1]
        if base.endswith("/query"):
            vision["num_attention_heads"] = shape[-2]
        rows = []
        for theirs, ours, how in BIG_VISION:
            if not gemma2:  # Gemma 1's norm before the MLP goes by another name
                ours = ours.replace("pre_feedforward_", "post_attention_")
            if theirs == base and leaf == "/bias":
                rows.append((ours + ".bias", torch.flatten))
            elif theirs == base:
                rows.append((ours + ".weight", how))
        # an unknown key keeps its name, and `check_shapes` will say it
        rows = rows or [(key, same)]
        n_layer = 1
        if "{}" in rows[0][0]:
            n_layer, *shape = shape
        members.append((file, begin, rows, n_layer, shape, kind))
        for ours, how in rows:
            our_shape = how(torch.empty(shape, device="meta")).shape
            shapes |= {ours.format(i): our_shape for i in range(n_layer)}

    def stream():
        for file, begin, rows, n_layer, shape, kind in members:
            with archive.open(file) as f:
                f.seek(begin)
                for i in range(n_layer):
                    # V: bfloat16, for which numpy has no name
                    w = np.empty(shape, np.int16 if kind.kind == "V" else kind)
                    raw = w.reshape(-1).view(np.uint8)
                    # what readinto reads is in memory twice: 16 MB at a time
                    for start in range(0, len(raw), 1 << 24):
                        f.readinto(raw[start:start + (1 << 24)])
                    w = torch.from_numpy(w)
                    if kind.kind == "V":
                        w = w.view(torch.bfloat16)
                    for ours, how in rows:
                        yield ours.format(i), how(w)

    return shapes, stream, dict(text_config=text, vision_config=vision)


def read_config(name, shapes, text, vision):
    """Sizes come from the tensors, the rest from config.json, whose defaults are PaliGemma's."""

    def size(key, axis=0):
        if key + ".weight" not in shapes:
            die(f"{name}: {key}.weight is missing: this is not all of a PaliGemma")
        return shapes[key + ".weight"][axis]

    def n_layers(part, norm):
        return part.get("num_hidden_layers") or sum(key.endswith(norm) for key in shapes)

    # what would change the arithmetic must be what is computed here
    expected = [
        (text, "model_type", ("gemma", "gemma2", "gemma_text", "paligemma")),
        (text, "hidden_activation", ("gelu_pytorch_tanh",)),
        (vision, "hidden_act", ("gelu_pytorch_tanh",)),
        (vision, "layer_norm_eps", (1e-6,)),
    ]
    for part, key, known in expected:
        if part.get(key) is not None and part[key] not in known:
            die(f"{name}: its config.json says {key}={part[key]}; only {known[0]} is known here")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        die(f"{name}: its config.json scales RoPE ({rope}); that is not known here")
    vision_part, first = "vision_tower.embeddings.", "language_model.layers.0."
    patch = size(vision_part + "patch_embedding", 2)
    head_dim = text.get("head_dim") or 256
    c = SimpleNamespace(
        image_size=math.isqrt(size(vision_part + "position_embedding")) * patch,
        patch_size=patch,
        v_head=vision.get("num_attention_heads") or 16,
        v_layer=n_layers(vision, ".layer_norm1.weight"),
        v_embd=size(vision_part + "patch_embedding"),
        v_mlp=size("vision_tower.encoder.layers.0.mlp.fc1"),
        n_layer=n_layers(text, ".input_layernorm.weight"),
        head_dim=head_dim,
        n_head=size(first + "self_attn.q_proj") // head_dim,
        n_kv_head=size(first + "self_attn.k_proj") // head_dim,
        n_embd=size("language_model.embed_tokens", 1),
        n_mlp=size(first + "mlp.gate_proj"),
        vocab_size=size("language_model.embed_tokens"),
        query_scale=(text.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        gemma2=first + "pre_feedforward_layernorm.weight" in shapes,
        attn_softcap=None,
        final_softcap=None,
        rope_theta=text.get("rope_theta") or rope.get("rope_theta") or 10_000.0,
        eps=text.get("rms_norm_eps") or 1e-6)
    assert c.v_embd % c.v_head == 0, f"{c.v_head} heads do not divide a width of {c.v_embd}"
    # PaliGemma 2. Its sliding window, 4,096, is longer than any caption
    if c.gemma2:
        c.attn_softcap = text.get("attn_logit_softcapping", 50.0)
        c.final_softcap = text.get("final_logit_softcapping", 30.0)
    return c


# --------------------------------------------------------------------------------------------------
# a PaliGemma with a prompt, and what of it is trained


class PromptedPaliGemma(nn.Module):
    """
    A frozen PaliGemma with a prompt, and what is trained in it or beside it. hard: the tokens of
    the text and of "\\n". The other arguments are settings of the same names.
    """

    def __init__(self, model, bos, hard, prompt="hard", n_soft=10, soft_position="after_image",
                 prefix_order="image,bos,prompt", trainable="none", lora_rank=8, stack=False):
        super().__init__()
        self.model = model
        self.pieces = prefix_order.split(",")
        language = model.language_model
        self.words = dict(bos=torch.tensor([bos], device=language.norm.weight.device))
        self.ask(hard)
        self.soft = None
        if prompt == "soft":
            image_at, bos_at = self.pieces.index("image"), self.pieces.index("bos")
            place = dict(before_image=image_at, after_image=image_at + 1, after_bos=bos_at + 1,
                         before_suffix=3)
            self.pieces.insert(place[soft_position], "soft")
            text = self.words["prompt"][:-1] if len(hard) > 1 else self.words["bos"]
            rows = language.embed(text).detach().float()  # at the size of embedded text
            self.soft = nn.Parameter(rows[torch.arange(n_soft) % len(rows)])  # (n_soft, D)
        for layer in language.layers:
            if trainable == "attention":
                train_in_fp32(layer.self_attn)
            if trainable == "lora":
                for matrix in (*layer.self_attn.values(), *layer.mlp.values()):
                    matrix.add_lora(lora_rank)
        if trainable == "all":
            train_in_fp32(model)
        elif stack:
            train_in_fp32(model.multi_modal_projector)

    def ask(self, hard):
        self.words["prompt"] = torch.tensor(hard, device=self.words["bos"].device)

    def trained(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def prefix(self, pixels):
        """Pictures (B, 3, size, size) -> (B, P, D)."""
        language = self.model.language_model
        pieces = {name: language.embed(idx) for name, idx in self.words.items()}
        pieces |= dict(image=self.model.encode_image(pixels), soft=self.soft)
        dtype = language.embed_tokens.weight.dtype
        parts = [pieces[name].to(dtype).expand(len(pixels), -1, -1) for name in self.pieces]
        return torch.cat(parts, 1)

    def forward(self, idx, pixels, targets, image_idx=None):
        """
        The summed cross-entropy of targets (B, T), in nats; -100 is padding. idx (B, T) is what
        stands before each target; the end of the prefix replaces the first. Padding comes last,
        where no token attends to it, so one mask serves all rows. image_idx (B,): the picture of
        each row; None = row i is about picture i.
        """
        language, prefix = self.model.language_model, self.prefix(pixels)
        if image_idx is not None:
            prefix = prefix[image_idx]
        P = prefix.shape[1]
        x = torch.cat([prefix, language.embed(idx[:, 1:])], 1)
        x = language(x, P)[:, P - 1:]  # (B, T, D)

        def part_loss(x, targets):
            return F.cross_entropy(language.head(x), targets, reduction="sum")

        # in pieces, computed again in the backward pass: all logits of 8 x 300 tokens take 2.5 GB
        parts = zip(x.flatten(0, 1).split(64), targets.flatten().split(64))
        return sum(checkpoint(part_loss, *part, use_reentrant=False) for part in parts)

    @torch.no_grad()
    def generate(self, pixels, stop, max_new_tokens, beam=1):
        """Captions as tokens (B, up to max_new_tokens), each ended by `stop`."""
        language, c = self.model.language_model, self.model.config
        prefix = self.prefix(pixels).repeat_interleave(beam, 0)  # (B * beam, P, D)
        # the cache holds G key heads, not H
        heads = SimpleNamespace(n_layer=c.n_layer, n_head=c.n_kv_head,
                                n_embd=c.n_kv_head * c.head_dim)
        kv_cache = KVCache(heads, len(prefix), prefix.shape[1] + max_new_tokens, prefix)

        def step(new):  # the first call, with a dummy for a token, reads the prefix
            x = language.embed(new) if kv_cache.pos else prefix
            return language.head(language(x, x.shape[1], kv_cache)[:, -1:])

        start = torch.zeros(len(prefix), 1, dtype=torch.long, device=pixels.device)
        if beam > 1:
            return beam_search(step, kv_cache, start, beam, max_new_tokens, stop)[:, 0]
        return decode(step, start, max_new_tokens, 0.0, stop=stop)[:, 1:]


def train_in_fp32(module):
    for key, p in list(module.named_parameters()):
        put(module, key, p.detach().float(), train=True)


def make_optimizer(model, name, soft_scale=1.0):
    """A soft prompt that is trained beside matrices learns soft_scale times as fast as they do."""
    if name == "sgd":
        optimizers = [torch.optim.SGD(model.trained().values(), lr=1.0)]
    else:
        optimizers = make_optimizers(model, name, 1.0, 0.0)
    for optimizer in optimizers:
        for group in list(optimizer.param_groups):
            others = [p for p in group["params"] if p is not model.soft]
            if soft_scale != 1.0 and len(others) < len(group["params"]):
                group["params"] = others
                optimizer.add_param_group(group | dict(params=[model.soft], scale=soft_scale))
    return optimizers


def load_adapter(path):
    """-> {name: tensor} of what was trained, and its settings."""
    with reading(path, "an adapter of paligemma_prompt.py"):
        with safetensors.safe_open(path, "pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}
            return tensors, json.loads(f.metadata()["settings"])


# --------------------------------------------------------------------------------------------------
# text and pictures


def learn_tokenizer(path, data):
    """
    A small tokenizer like Gemma's, from the training captions: spaces as they are, bytes for what
    it does not know, "\\n" one token.
    """
    from sentencepiece import SentencePieceTrainer

    captions = []
    for folder in data.split(","):
        for of_image in load_captions(folder, "train2017")[1]:
            captions += of_image
    n = SMALL["vocab_size"]
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_prefix=path.removesuffix(".model"),
            model_type="bpe", vocab_size=n, byte_fallback=True, user_defined_symbols=["\n"],
            add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
            normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    except RuntimeError as problem:  # too little text, or too many different characters
        die(f"the captions of data={data} give no vocabulary of {n} tokens ({problem})")


class Tokenizer:
    """A SentencePiece model, under the names that TokenizedCaptions calls."""

    def __init__(self, file):
        from sentencepiece import SentencePieceProcessor

        self.file = file
        with reading(file, "a SentencePiece model (a PaliGemma's tokenizer.model)"):
            pieces = SentencePieceProcessor(model_file=file)
        self.encode = pieces.encode                 # of a text
        self.encode_ordinary_batch = pieces.encode  # of a list of texts
        self.decode = pieces.decode
        self.bos, self.eot_token = pieces.bos_id(), pieces.eos_id()
        self.n_vocab = pieces.get_piece_size()
        if len(self.encode("\n")) != 1:
            die(f'{file}: "\\n" must be one token: this is not a PaliGemma\'s tokenizer')


class Pictures:
    """pictures[numbers] reads some of the files -> (B, 3, size, size), float32 in [-1, 1]."""

    def __init__(self, files, size):
        self.files, self.size = files, size
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def __len__(self):
        return len(self.files)

    def read(self, number):
        # not cropped: as PaliGemma was trained
        squeezed = open_image(self.files[number]).resize((self.size, self.size), Image.BICUBIC)
        return np.asarray(squeezed, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1

    def __getitem__(self, numbers):
        return np.stack(list(self.pool.map(self.read, numbers)))


def read_split(data, split, size):
    """-> the json's images, the captions of each in lower case, and Pictures."""
    images, captions = load_captions(data, split)
    lower = [[" ".join(text.lower().split()) for text in of_image] for of_image in captions]
    files = [os.path.join(data, split, image["file_name"]) for image in images]
    return images, lower, Pictures(files, size)


def load_tasks(data, size, tokenizer, max_length):
    """
    Captions and pictures: of each folder, to train on; of the first one, the split that is scored,
    and 256 pictures with one caption each to evaluate on the way.
    """
    folders, tasks = data.split(","), []
    for folder in folders:
        _, captions, pictures = read_split(folder, "train2017", size)
        tasks.append((TokenizedCaptions(captions, tokenizer, max_length), pictures))
    splits = splits_of(folders[0])
    split = "test2017" if "test2017" in splits else "val2017"
    scored = split, *read_split(folders[0], split, size)
    _, captions, subset = read_split(folders[0], "val2017" if "val2017" in splits else split, size)
    subset.files = subset.files[:256]
    first_captions = [of_image[:1] for of_image in captions[:256]]
    return tasks, scored, (TokenizedCaptions(first_captions, tokenizer, max_length), subset)


# --------------------------------------------------------------------------------------------------
# the demo: a small PaliGemma and drawn scenes, which captions describe in two ways

FROM_ABOVE = dict(circle="storage tank", square="building", triangle="tent", star="fountain",
                  cross="airplane", picture="satellite view")
# shares of pictures seen from above, on the colours of the ground, and of captions in a surveyor's
# words
WORLDS = dict(scenes=(0.5, 0), surveys=(0.5, 1), aerial=(1, 1))
# every second prompt asks for a surveyor's words: a model with one prompt learns to ignore it
DEMO_PRETRAINING = (
    "paligemma=small", "trainable=all", "data=data/scenes,data/surveys", "out_dir=out/prompt_small",
    "optimizer=muon", "batch_size=32",
    "prompt_text=caption en,survey en,describe the picture,report what is seen from above,en,above",
    "eval_interval=250", "log_interval=50")
DEMO = dict(paligemma="out/prompt_small/adapter.safetensors", data="data/aerial", compare=True,
            batch_size=16, max_steps=100, eval_interval=25, log_interval=25)


def drawn_world(pictures, words):
    """A style for draw_shapes, from two shares as in WORLDS."""

    def style(rng, picture, captions):
        if rng.random() < pictures:
            ground = Image.frombytes("L", (9, 9), rng.randbytes(81)).resize((64, 64), Image.BICUBIC)
            # from earth to grass
            ground = ImageOps.colorize(ground, (150, 135, 100), (190, 215, 165))
            picture = ImageChops.multiply(picture, ground)
        styled = []
        for caption in captions:
            if rng.random() < words:
                caption = " ".join(FROM_ABOVE.get(word, word) for word in caption.split())
            styled.append(caption)
        return picture, styled

    return style


def prepare_demo(seed, max_steps):
    print("No paligemma= was named: a small one is made here and trained to caption drawn scenes. "
          "This shows how\nprompts work, not what PaliGemma can do. What exists is not made again.",
          flush=True)
    for world, shares in WORLDS.items():
        if "train2017" not in splits_of(f"data/{world}"):
            draw_shapes(f"data/{world}", 3000, seed, 1, drawn_world(*shares))
    results = "out/prompt_small/results.json"
    if os.path.exists(results):
        if read_json(results)["step"] < 5 * max_steps:
            die(f"out/prompt_small is of a trial shorter than {5 * max_steps} steps: delete it")
        return
    words = [*DEMO_PRETRAINING, f"max_steps={5 * max_steps}"]
    if os.path.exists("out/prompt_small/ckpt.pt"):
        words.append("init_from=resume")  # it was interrupted
    run_script("paligemma_prompt.py", *words)


# --------------------------------------------------------------------------------------------------
# the methods side by side


# title as wide as its column, key in results.json, factor, format
COLUMNS = [
    ("  trained", "trained", 1, ",.0f"),
    ("peak GB", "peak_GB", 1, ".2f"),
    ("s/step", "seconds_per_step", 1, ".2f"),
    ("BLEU-4", "Bleu_4", 100, ".1f"),
    (" CIDEr", "CIDEr", 100, ".1f"),
    ("perplexity", "perplexity", 1, ".2f"),
    ("wrong picture", "perplexity_wrong_picture", 1, ".2f"),
]


def results_table(rows):
    lines = [" | ".join([" " * 20, *[title for title, _, _, _ in COLUMNS]])]
    for row in rows:
        cells = [f"{row['way']:<20}"]
        for title, key, factor, form in COLUMNS:
            cells.append(f"{factor * row[key]:{len(title)}{form}}")
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def draw_comparison(path, rows):
    plt = pyplot()
    fig, axes = plt.subplots(1, 5, figsize=(15, 0.4 * len(rows) + 1.2), sharey=True,
                             layout="constrained")
    names = [row["way"] for row in rows]
    for ax, (title, key, factor, form) in zip(axes, COLUMNS):
        bars = ax.barh(names, [factor * row[key] for row in rows])
        ax.bar_label(bars, fmt=f"{{:{form}}}", padding=2, fontsize=8)
        ax.set_title(title.strip(), fontsize=10)
        ax.margins(x=0.3)
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def compare_methods(config, folder):
    """
    Runs this script once for each of METHODS, otherwise with the same settings. Finished methods
    are kept, interrupted ones resumed. Returns a row of results for each.
    """
    rows, losses, perplexities = [], {}, {}
    for method, own in METHODS.items():
        run_dir = os.path.join(folder, re.sub(r"\W+", "_", method))
        settings = config | own | dict(compare=False, out_dir=run_dir)
        results = f"{run_dir}/results.json"
        if os.path.exists(results):
            may_differ = ["init_from", "out_dir", "device"]
            # then each run chose its own, and wrote it down
            if settings["optimizer"] is None:
                may_differ.append("optimizer")
            changed = [k for k, v in read_json(results)["settings"].items()
                       if k not in may_differ and settings.get(k, v) != v]
            if changed:
                die(f"{run_dir} was made with other settings ({', '.join(changed)}): delete it, or "
                    "take another out_dir=")
            print(f"{run_dir} is finished already", flush=True)
        else:
            if os.path.exists(f"{run_dir}/ckpt.pt"):
                settings["init_from"] = "resume"
            elif settings["init_from"] == "resume":
                settings["init_from"] = "scratch"
            words = [f"{k}={v}" for k, v in settings.items() if v is not None]
            run_script("paligemma_prompt.py", *words)
        rows.append(read_json(results) | dict(way=method, log=f"{run_dir}/log.csv"))
        log = read_log(f"{run_dir}/log.csv")
        losses[method], perplexities[method] = curve(log, "loss"), curve(log, "perplexity")
    save_json(f"{folder}/results.json", rows, indent=1)
    plot(f"{folder}/curves.png", {"loss (nats a token)": losses,
                                  "perplexity of held-out captions": perplexities})
    draw_comparison(f"{folder}/comparison.png", rows)
    return rows


# --------------------------------------------------------------------------------------------------
# the parts of a run, in the order of use


def adapter_file(init_from):
    path = adapter_in(init_from)
    if not os.path.isfile(path):
        die(f"init_from={init_from}: scratch, resume, or an adapter.safetensors or its folder")
    return path


def newest_adapter():
    runs = glob.glob("out/prompt_*/**/adapter.safetensors", recursive=True)
    runs = [path for path in runs if "prompt_small" not in path]
    if not runs:
        die("image= needs an adapter (init_from=) or a model (paligemma=)")
    return max(runs, key=os.path.getmtime)


def preset(typed):
    """The settings of the adapter or of the run that this one starts from, or the demo's."""
    init_from = typed.get("init_from", "scratch")
    named = typed.get("paligemma") or typed.get("stack")
    checkpoint_path = os.path.join(typed.get("out_dir", ""), "ckpt.pt")
    resumes = init_from == "resume" and typed.get("out_dir") and os.path.exists(checkpoint_path)
    if init_from == "resume" and typed.get("image") and not resumes:
        die("image= with init_from=resume needs the out_dir= of a run")
    if init_from == "scratch" and typed.get("image") and not named:
        init_from = newest_adapter()
    if resumes:
        saved = load_checkpoint(checkpoint_path)["settings"]
    elif init_from not in ("scratch", "resume"):
        init_from = adapter_file(init_from)
        tensors, saved = load_adapter(init_from)
        # a model that was trained whole: this one, even if it was copied from elsewhere
        if "model.language_model.embed_tokens.weight" in tensors:
            saved["paligemma"] = init_from
    else:
        return {} if named else DEMO
    # runs of former versions
    saved = {RENAMED.get(k, k): v for k, v in saved.items()}
    saved = {k: v for k, v in saved.items() if k in RESUMED and v is not None}
    return saved | dict(init_from=init_from)


def check_settings(config):
    order, text = config["prefix_order"], config["prompt_text"]
    if sorted(order.split(",")) != ["bos", "image", "prompt"]:
        die(f"prefix_order={order}: image, bos and prompt, each once, in any order")
    if "<image>" in text or text.endswith(("\n", "\\n")):
        die(f"prompt_text={text!r}: the words only; <image> and the newline are added here")
    if config["stack"] and not (config["siglip"] and config["gemma"]):
        die("stack=True needs siglip= and gemma=, the checkpoints to build from")
    if config["image"]:
        return
    if not config["data"]:
        die("data= is missing: a folder in COCO's layout")
    # the demo draws its own
    if config["data"] != DEMO["data"]:
        for folder in config["data"].split(","):
            load_captions(folder, "train2017")


def default_out_dir(config, kind):
    init_from = config["init_from"]
    if init_from.endswith(".safetensors") and config["image"]:
        return os.path.dirname(init_from)
    if init_from.endswith(".safetensors") and config["eval_only"]:
        return os.path.join(os.path.dirname(init_from), "eval")
    data_name = os.path.basename(os.path.normpath(config["data"] or "zero-shot"))
    position = f"_{config['soft_position']}" * (config["prompt"] == "soft" and kind != "all")
    return f"out/prompt_{data_name}_{kind}{position}"


def random_model(c, device, dtype=torch.float32):
    with torch.device("meta"):
        model = PaliGemma(c)
    for key, p in list(model.named_parameters()):
        w = torch.zeros(p.shape, dtype=dtype, device=device)  # right for biases, and for RMSNorm
        if p.dim() > 1:
            w.normal_(0, p[0].numel() ** -0.5)
        elif "vision_tower" in key and key.endswith("weight"):
            w.fill_(1)
        put(model, key, w)
    return model


def check_memory(shapes, device, dtype):
    """Ends the run before minutes of loading if not even the weights fit."""
    if "cuda" in device:
        free = torch.cuda.mem_get_info()[0]
    elif os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            free = 1024 * int(re.search(r"MemAvailable: *(\d+)", f.read())[1])
    else:
        return
    need = dtype.itemsize * sum(map(math.prod, shapes.values()))
    if need > free:
        die(f"the weights take {need / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free: "
            "dtype=bfloat16 halves them")


def load_paligemma(config, device, dtype):
    """-> the frozen PaliGemma that the settings name, and its Tokenizer."""
    source = config["gemma"] if config["stack"] else config["paligemma"]
    siglip = config["siglip"] if config["stack"] else None
    if source == "small":
        file = os.path.join(config["out_dir"], "tokenizer.model")
        if config["init_from"] == "scratch":
            learn_tokenizer(file, config["data"])
        tokenizer = Tokenizer(file)
        model = random_model(SimpleNamespace(**SMALL), device)
    else:
        path = locate(source)
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        # Kaggle's file, beside its .npz, has a name of its own
        beside = os.path.join(folder, "paligemma_tokenizer.model")
        if not os.path.exists(beside):
            beside = os.path.join(folder, "tokenizer.model")
        tokenizer = Tokenizer(config["tokenizer"] or beside)
        check_memory(open_model(path, siglip)[1], device, dtype)
        model = PaliGemma.from_pretrained(path, device, dtype, siglip)
    n_words, n_rows = tokenizer.n_vocab, model.config.vocab_size
    # tables are padded, to multiples of 64 or 128
    if not 0 <= n_rows - n_words < 128:
        die(f"{tokenizer.file} has {n_words:,} tokens, and {source} {n_rows:,} rows for them: they "
            "don't belong together")
    model.language_model.n_words = n_words
    return model, tokenizer


def choose_rates(config, kind, is_small):
    """-> the optimizer, its learning rate, and how much faster a soft prompt learns than it."""
    rate = RATES[kind][is_small]
    attention_only = kind == "attention" and not is_small
    optimizer = config["optimizer"] or ("sgd" if attention_only else "adamw")
    trains_matrices = config["trainable"] != "none" or config["stack"]
    beside_matrices = config["prompt"] == "soft" and trains_matrices
    soft_scale = RATES["soft"][is_small] / rate if beside_matrices else 1.0
    return optimizer, config["learning_rate"] or rate, soft_scale


def restore(trained, saved, path, source=None):
    """Copies the saved tensors of the file `path`. source: the file of the frozen model."""
    # a model that was trained whole is its own adapter: all but a soft prompt is loaded already
    if source and os.path.abspath(path) == os.path.abspath(adapter_in(source)):
        saved = {key: tensor for key, tensor in saved.items() if key in trained}
    if not saved or not trained:
        return
    check_shapes(path, {k: p.shape for k, p in trained.items()},
                 {k: tensor.shape for k, tensor in saved.items()})
    for key, tensor in saved.items():
        trained[key].data.copy_(tensor)


def caption_pictures(model, files, size, tokenizer, max_length, beam, folder, device):
    """Prints a caption of each picture, and draws them with it."""
    pixels = torch.from_numpy(Pictures(files, size)[range(len(files))]).to(device)
    captions = to_text(model.generate(pixels, tokenizer.eot_token, max_length, beam), tokenizer)
    for file, caption in zip(files, captions):
        print(f"{file}: {caption}")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "image.png")
    draw_captions(path, [open_image(file) for file in files], captions, min(4, len(files)))
    print(f"drawn in {path}")


def save(config, trained, optimizers, step, tokenizer, c):
    """adapter.safetensors, with all that it takes to use it, and ckpt.pt, to go on from."""
    out_dir = config["out_dir"]
    path = os.path.join(out_dir, "adapter.safetensors")
    tensors = {key: p.detach().cpu().contiguous() for key, p in trained.items()}
    settings = {key: config[key] for key in ADAPTER}
    for key in ("paligemma", "tokenizer", "siglip", "gemma"):
        if settings[key] and os.path.exists(settings[key]):
            settings[key] = os.path.abspath(settings[key])
    # a model that was trained whole is its own paligemma=, whatever it was built from
    if config["trainable"] == "all":
        settings |= dict(paligemma=os.path.abspath(path), trainable="none", stack=False,
                         siglip=None, gemma=None, tokenizer=None)
        own_tokenizer = os.path.join(out_dir, "tokenizer.model")
        if not os.path.exists(own_tokenizer):
            shutil.copyfile(tokenizer.file, own_tokenizer)
    text = dict(head_dim=c.head_dim, rope_theta=c.rope_theta, rms_norm_eps=c.eps,
                query_pre_attn_scalar=c.query_scale ** -2)
    if c.gemma2:
        text |= dict(attn_logit_softcapping=c.attn_softcap,
                     final_logit_softcapping=c.final_softcap)
    sizes = dict(text_config=text, vision_config=dict(num_attention_heads=c.v_head))
    metadata = dict(settings=json.dumps(settings), config=json.dumps(sizes))
    save_checkpoint(os.path.join(out_dir, "ckpt.pt"), dict(
        trained=tensors, optimizers=[opt.state_dict() for opt in optimizers], step=step,
        settings=config))
    save_atomically(path, lambda f: f.write(safetensors.torch.save(tensors, metadata)))


def show_results(out_dir, results, captions, references, files, rows):
    plot(os.path.join(out_dir, "curves.png"),
         {"loss (nats a token)": {"train": curve(rows, "loss")},
          "perplexity of held-out captions": {"": curve(rows, "perplexity")}})
    spread = np.unique(np.linspace(0, len(files) - 1, 12).astype(int))
    draw_captions(os.path.join(out_dir, "captions.png"), [open_image(files[i]) for i in spread],
                  [f"{captions[i]}\n({references[i][0]})" for i in spread])
    print("\ncaptions of pictures it was not trained on, and what a person wrote:")
    for caption, of_image in list(zip(captions, references))[:5]:
        print(f"  {caption:<62} | {of_image[0]}")
    print(f"\n{results_table([results])}")


# --------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    t_start = time.time()
    config = configure(globals(), preset)
    check_settings(config)
    if init_from not in ("scratch", "resume"):
        init_from = config["init_from"] = adapter_file(init_from)
    process = setup(device, dtype)
    if process.world_size > 1:
        die("this script runs as one process: start it without torchrun")
    device, frozen_dtype = process.device, process.dtype
    process = process._replace(dtype=torch.float32)  # no autocast: each layer knows its own dtype

    # ---- only a table of all methods
    if compare:
        is_demo = data == DEMO["data"] and paligemma == DEMO["paligemma"]
        if is_demo:
            prepare_demo(seed, max_steps)
        folder = out_dir or default_out_dir(config, "all")
        table = results_table(compare_methods(config, folder))
        print(f"\n{table}\n\nlook at {folder}/comparison.png, curves.png and each run's "
              f"captions.png; {time.time() - t_start:.0f} s in all")
        sys.exit(0)

    # ---- where the run goes. A run is never trained over
    kind = "stack" if stack else prompt if trainable == "none" else trainable
    out_dir = config["out_dir"] = out_dir or default_out_dir(config, kind)
    checkpoint_path = os.path.join(out_dir, "ckpt.pt")
    if not image:
        files = checkpoint_path, os.path.join(out_dir, "adapter.safetensors")
        if any(map(os.path.exists, files)) and init_from != "resume":
            die(f"{out_dir} holds a run: go on with init_from=resume, or name another out_dir=")
        print_settings(config)
        lock_folder(out_dir)

    # ---- the model
    torch.manual_seed(seed)
    method = dict(prompt=prompt, n_soft=n_soft, soft_position=soft_position, trainable=trainable,
                  prefix_order=prefix_order, lora_rank=lora_rank, stack=stack)
    model, encoding = load_paligemma(config, device, frozen_dtype)
    c = model.config

    # ---- the prompts, and what is trained
    # encoded apart: "\n" must not become part of the last word's token
    newline = encoding.encode("\n")
    prompts = [encoding.encode(text) + newline for text in prompt_text.split(",")]
    prompted = PromptedPaliGemma(model, encoding.bos, prompts[0], **method)
    trained = prompted.trained()
    n_trained = sum(p.numel() for p in trained.values())
    total = sum(p.numel() for p in prompted.parameters())
    if gradient_checkpointing is None:
        gradient_checkpointing = total > 1e9
    model.language_model.gradient_checkpointing = gradient_checkpointing
    resumed = None
    if init_from == "resume":
        resumed = load_checkpoint(checkpoint_path)
        restore(trained, resumed["trained"], checkpoint_path)
    elif init_from != "scratch":
        restore(trained, load_adapter(init_from)[0], init_from, gemma if stack else paligemma)
    if image:
        caption_pictures(prompted, image.split(","), c.image_size, encoding, max_length, beam,
                         out_dir, device)
        sys.exit(0)

    # ---- pictures and captions
    tasks, scored, (subset_captions, subset) = load_tasks(data, c.image_size, encoding, max_length)
    split, images, references, pictures = scored
    captions = TokenizedCaptions(references, encoding, max_length)
    n_cut = captions.cut + sum(task_captions.cut for task_captions, _ in tasks)
    if n_cut:
        print(f"{n_cut:,} captions have more than max_length={max_length} tokens and are cut")

    # ---- the optimizer
    optimizer, learning_rate, soft_scale = choose_rates(config, kind, is_small=c.n_embd < 1000)
    config["optimizer"] = optimizer
    optimizers = make_optimizer(prompted, optimizer, soft_scale) if trained else []
    step, n_steps = 0, max_steps if trained and not eval_only else 0
    if resumed:
        if not eval_only:
            resume_optimizers(optimizers, resumed, checkpoint_path)
        step = resumed["step"]
        warn_changed(config, resumed, " ".join(RESUMED))

    # ---- the loop
    n_pictures = sum(len(task_pictures) for _, task_pictures in tasks)
    print(f"{n_trained:,} trained parameters, {n_trained / total:.2%} of {total:,} | "
          f"{n_pictures:,} pictures to train on, {len(images):,} to be scored ({split}) | {device}",
          flush=True)
    log = Log(os.path.join(out_dir, "log.csv"),
              ["step", "loss", "perplexity", "lr", "norm", "ms"], math.inf if eval_only else step,
              start_wandb(config) if wandb_log else None)
    asked_to_stop = stop_signals()
    first_step = step
    while not eval_only:
        # evaluate on some held-out captions, and save
        row = dict(step=step)
        if step % eval_interval == 0 or step >= n_steps:
            prompted.ask(prompts[0])
            row["perplexity"] = perplexity(prompted, subset, subset_captions, process,
                                           rows_at_once=batch_size)
            check_finite(step, row["perplexity"], "the perplexity of held-out captions")
            print(f"step {step:5d}/{n_steps} | perplexity of {len(subset)} held-out captions "
                  f"{row['perplexity']:.3f}", flush=True)
        if step > first_step and ("perplexity" in row or asked_to_stop):
            save(config, trained, optimizers, step, encoding, c)
        if step >= n_steps or asked_to_stop:
            break

        # one step
        t0 = time.time()
        task_captions, task_pictures = tasks[step % len(tasks)]
        prompted.ask(prompts[step % len(prompts)])
        # with several folders, each is shown whole once an epoch of its own
        numbers, chosen = training_batch(step // len(tasks), batch_size, task_captions, seed)
        idx, targets = task_captions.batch(chosen, device)
        pixels = read_features(task_pictures, numbers, device)
        loss = prompted(idx, pixels, targets) / task_captions.count(chosen)
        loss.backward()
        lr = get_lr(step, learning_rate, min_lr, warmup_steps, n_steps)
        norm = optimizer_step(prompted, optimizers, lr, grad_clip, step)
        row |= dict(loss=loss.item(), lr=lr, norm=norm, ms=1000 * (time.time() - t0))
        log.add(**row)
        if step % log_interval == 0 or step == n_steps - 1:
            print_step(row, n_steps, log.seconds_per_step())
        step += 1
    if asked_to_stop:
        print(f"stopped at step {step}; go on with out_dir={out_dir} init_from=resume")
        sys.exit(0)
    if not eval_only:
        log.add(**row)

    # ---- scored on the whole split, a batch at a time: less memory than a training step takes
    signals_end_the_process()
    prompted.ask(prompts[0])
    candidates = caption_split(prompted, pictures, encoding, max_length, process, beam, batch_size)
    scores = score(candidates, references)[0]
    ms = [r["ms"] for r in log.rows if r.get("ms")]
    results = dict(way=kind, trained=n_trained, peak_GB=peak_memory(device) / 1e9,
                   seconds_per_step=float(np.median(ms or 0)) / 1000, **scores, step=step,
                   split=split, settings=config)
    for which, key in (("right", "perplexity"), ("wrong", "perplexity_wrong_picture")):
        results[key] = perplexity(prompted, pictures, captions, process, which, batch_size)
    save_json(os.path.join(out_dir, "results.json"), results, indent=1)
    save_captions(os.path.join(out_dir, f"captions_{split}.json"), images, candidates)
    show_results(out_dir, results, candidates, references, pictures.files, log.rows)
    print(", ".join(f"{metric} {100 * value:.1f}" for metric, value in scores.items()))
    print(f"look at {out_dir}/captions.png, curves.png; {time.time() - t_start:.0f} s")
