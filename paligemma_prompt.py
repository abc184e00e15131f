r"""
What a prompt can do: PaliGemma in plain PyTorch, and the cheapest ways to make it write captions of another kind, inside 16 GB.

    python paligemma_prompt.py                                   # nothing prepared: a small PaliGemma made on the spot, in minutes on a laptop
    python paligemma_prompt.py paligemma=google/paligemma-3b-pt-224@bfloat16 data=data/risc prompt=soft place=after_image    # one GPU
    python paligemma_prompt.py paligemma=google/paligemma-3b-pt-224@bfloat16 data=data/risc compare=True    # seven ways, one table
    python paligemma_prompt.py stack=True siglip=google/siglip-so400m-patch14-224 gemma=google/gemma-2b data=data/risc train=lora
    python paligemma_prompt.py init_from=out/prompt_risc_soft_after_image/adapter.safetensors image=a.jpg,b.png
    python paligemma_prompt.py memory=True                       # what one step of each way takes at full size

PaliGemma (Beyer et al. 2024, https://arxiv.org/abs/2407.07726) reads a picture as 256 tokens of a SigLIP tower, through one matrix, and writes
with Gemma, whose input is a row of vectors. Who sees whom (x) in it is neither GPT's triangle nor BERT's square:

                     picture     bos  caption en \n   a   red  roof          The prefix, picture and prompt, is there before anything is
        picture      x  x  x  x   x       x        x  .    .    .            written: all of it sees all of it. The suffix is written word
        bos          x  x  x  x   x       x        x  .    .    .            by word: each sees the prefix and what was written so far. The
        caption en   x  x  x  x   x       x        x  .    .    .            prefix's last token predicts the first word, and only the suffix
        \n           x  x  x  x   x       x        x  .    .    .   -> a     and its end are in the loss. Ones everywhere would leak the
        a            x  x  x  x   x       x        x  x    .    .   -> red   answer; a triangle would hide the question from the picture, and
        red          x  x  x  x   x       x        x  x    x    .   -> roof  the picture's lower half from its upper.
        roof         x  x  x  x   x       x        x  x    x    x   -> eos

A hard prompt is words. A soft prompt (Lester et al. 2021, https://arxiv.org/abs/2104.08691) is vectors that never were words: ten of them are
trained, 20,480 numbers, all else is frozen. Rows of Gemma's table have length about 1 and are multiplied by sqrt(2048) = 45 on their way to
layer 0. A soft prompt enters behind that multiplication, so it is born as copies of words at that size: raw rows would whisper among shouting
neighbours, and learning at 0.01 a step would be long in making them heard. (The picture's tokens are not multiplied: their matrix was trained
to the right size.) Where the ten enter is place=:

        before_image  [soft] picture bos caption en \n        after_bos      picture bos [soft] caption en \n
        after_image   picture [soft] bos caption en \n        before_suffix  picture bos caption en \n [soft]

Writes out_dir/{adapter.safetensors, ckpt.pt, log.csv, results.json, captions_{split}.json, curves.png, captions.png}. The adapter is what was
trained and no more, 80 kB for a soft prompt, and knows which model it belongs to.
"""
import glob
import json
import math
import os
import re
import sys
import time
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageOps
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from fineweb import configure, die, download, hub, save_atomically, show
from train_gpt2 import (KVCache, Log, curve, decode, get_lr, load_checkpoint, make_optimizers, peak_rss, plot, pyplot, read_log,
                        resume_optimizers, save_checkpoint, setup, start_wandb, take_step)
from cider import evaluate as score
from coco import draw_shapes, load_captions, open_image
from train_caption import TokenizedCaptions, beam_search, caption_split, draw_captions, gather, perplexity, run, to_text, training_batch

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python paligemma_prompt.py name=value` overrides any of them

paligemma = None            # the model: hub name[@revision], folder, .safetensors, big_vision's .npz, "small" = a random one; None = the built-in road
tokenizer = None            # a SentencePiece file; None = tokenizer.model beside the weights
data = None                 # a folder in COCO's layout (coco.py makes one of RISC's csv and of Karpathy's json); several, a,b: one a step, in turn
out_dir = None              # where the run goes; None = out/prompt_{data}_{way to adapt}
init_from = "scratch"       # scratch | resume (out_dir/ckpt.pt) | an adapter.safetensors, with all its settings
eval_only = False           # evaluate, train nothing
prompt = "hard"             # hard: words; soft: learned vectors beside them
words = "caption en"        # the words; several, a,b,c: one a step, in turn; the first is what the model is judged with
n_soft = 10                 # how many learned vectors
place = "after_image"       # where they go: before_image, after_image, after_bos, before_suffix
order = "image,bos,prompt"  # the other pieces of the prefix, in any order
train = "none"              # of Gemma: none; attention, its matrices; lora; all, and SigLIP too
lora_rank = 8               # of the two thin matrices beside each of a layer's seven
stack = False               # build the model: SigLIP, a fresh and trained projector, Gemma
siglip = None               # for stack: where SigLIP comes from
gemma = None                # for stack: where Gemma and its tokenizer come from
compare = False             # zero-shot, attention, soft at each place, LoRA at equal steps: a table and a plot
memory = False              # only report what one step of each way takes at full size
beam = 1                    # captions by beam search among so many, 1 = greedy
image = None                # caption these pictures (a,b,...) with init_from's adapter, the newest by default
batch_size = 8              # pictures a step; each with one of its captions, drawn anew each epoch
max_length = 64             # longest caption, in tokens; the rest is cut, counted and said
optimizer = None            # adamw, muon, sgd; None = sgd for train=attention, which spares two fp32 copies (as Google's notebook), else adamw
learning_rate = None        # the peak; None = RATES below
min_lr = 0.0                # where the cosine ends
warmup_steps = 10
max_steps = 500
grad_clip = 1.0
eval_interval = 100         # steps between looks at held-out pictures, each followed by a checkpoint
log_interval = 20           # steps between printed lines
recompute = None            # keep only each layer's input for the backward pass and compute the rest again; None = for models above 1e9 parameters
seed = 1337
device = None               # cuda, cpu, mps; None takes the best there is
dtype = None                # of what is frozen: bfloat16 or float32; None = bfloat16 on CUDA. What is trained is float32
wandb_log = False           # mirror the log to Weights & Biases

PLACES = ("before_image", "after_image", "after_bos", "before_suffix")
WAYS = {"hard, zero-shot": dict(prompt="hard", train="none"), "hard + attention": dict(prompt="hard", train="attention"),
        **{f"soft, {place}": dict(prompt="soft", train="none", place=place) for place in PLACES}, "hard + LoRA": dict(prompt="hard", train="lora")}
RATES = dict(soft=(1e-2, 0.3), attention=(0.03, 3e-3), lora=(2e-4, 2e-3), stack=(5e-4, 2e-3), all=(1e-5, 8e-3))  # for PaliGemma, for the small one

# ----------------------------------------------------------------------------------------------------------------------
# the model, under Hugging Face's parameter names. B pictures; N image tokens, P tokens of the prefix, T of all, S = cached + T; D = n_embd;
# H query heads, G key heads, E = head_dim. `c` is one of these, as a namespace; v_ is the vision tower's

FULL = dict(image_size=224, patch_size=14, v_layer=27, v_head=16, v_embd=1152, v_mlp=4304, n_layer=18, n_head=8, n_kv_head=1, head_dim=256, n_embd=2048,
            n_mlp=16384, vocab_size=257_152, query_scale=1 / 16, gemma2=False, attn_softcap=None, final_softcap=None, rope_theta=10_000.0, eps=1e-6)
SMALL = FULL | dict(image_size=64, patch_size=16, v_layer=3, v_head=4, v_embd=128, v_mlp=256, n_layer=4, n_head=4, head_dim=32, n_embd=128, n_mlp=384,
                    vocab_size=480, query_scale=32 ** -0.5)


class SigLIPLayer(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.n_head, W = c.v_head, c.v_embd
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(W, 1e-6), nn.LayerNorm(W, 1e-6)
        self.self_attn = nn.ModuleDict({name: nn.Linear(W, W) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(W, c.v_mlp), fc2=nn.Linear(c.v_mlp, W)))

    def forward(self, x):
        h, a = self.layer_norm1(x), self.self_attn
        q, k, v = (matrix(h).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for matrix in (a.q_proj, a.k_proj, a.v_proj))  # (B, heads, N, W / heads)
        x = x + a.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh"))


class SigLIP(nn.Module):
    """A ViT without a class token (Zhai et al. 2023): pictures (B, 3, size, size) in [-1, 1] -> all patches (B, N, v_embd), after the final norm."""

    def __init__(self, c):
        super().__init__()
        self.embeddings = nn.ModuleDict(dict(patch_embedding=nn.Conv2d(3, c.v_embd, c.patch_size, c.patch_size),
                                             position_embedding=nn.Embedding((c.image_size // c.patch_size) ** 2, c.v_embd)))
        self.encoder = nn.ModuleDict(dict(layers=nn.ModuleList([SigLIPLayer(c) for _ in range(c.v_layer)])))
        self.post_layernorm = nn.LayerNorm(c.v_embd, 1e-6)

    def forward(self, pixels):
        positions = self.embeddings.position_embedding.weight
        x = self.embeddings.patch_embedding(pixels.to(positions.dtype)).flatten(2).mT + positions  # (B, W, rows, columns) -> (B, N, W)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class RMSNorm(nn.Module):
    """In fp32 whatever comes, times 1 + weight: weights are stored as what they differ from one."""

    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(n)), eps

    def forward(self, x):
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())).to(x.dtype)


class Linear(nn.Linear):
    """Frozen in bfloat16; or trained, in fp32, and cast for each matmul; or frozen beside two thin trained matrices (LoRA, Hu et al. 2021)."""

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if not hasattr(self, "lora_a"):
            return y
        return y + 2 * F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))  # 2 = alpha / rank


def rotate(x, start, theta):
    """RoPE (Su et al. 2021): turns x (B, heads, T, E), at positions start, start + 1, ...; entry e is paired with e + E/2, not with its neighbour."""
    T, E = x.shape[2:]
    frequency = theta ** (-torch.arange(0, E, 2, device=x.device) / E)
    angle = torch.arange(start, start + T, device=x.device)[:, None] * frequency  # (T, E/2)
    cos, sin, (a, b) = angle.cos(), angle.sin(), x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class GemmaLayer(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.c, D, q, kv = c, c.n_embd, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        self.self_attn = nn.ModuleDict({name: Linear(n_in, n_out, bias=False) for name, n_in, n_out in
                                        (("q_proj", D, q), ("k_proj", D, kv), ("v_proj", D, kv), ("o_proj", q, D))})
        self.mlp = nn.ModuleDict({name: Linear(n_in, n_out, bias=False) for name, n_in, n_out in
                                  (("gate_proj", D, c.n_mlp), ("up_proj", D, c.n_mlp), ("down_proj", c.n_mlp, D))})
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)
        if c.gemma2:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)

    def attend(self, x, seen, cache, layer):
        c, a, start = self.c, self.self_attn, cache.seen if cache else 0
        q, k, v = (matrix(x).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for matrix in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rotate(q, start, c.rope_theta), rotate(k, start, c.rope_theta)  # (B, H, T, E), (B, G, T, E)
        if cache:
            k, v = cache.add(layer, k, v)  # (B, G, S, E)
        k, v = (t[:, :, None].expand(-1, -1, c.n_head // c.n_kv_head, -1, -1).flatten(1, 2) for t in (k, v))  # H / G query heads share each key head
        if c.attn_softcap:  # fused attention knows no cap
            score = c.attn_softcap * torch.tanh(q @ k.mT * (c.query_scale / c.attn_softcap))  # (B, H, T, S)
            y = (score if seen is None else score.masked_fill(~seen, -math.inf)).float().softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=c.query_scale)
        return a.o_proj(y.transpose(1, 2).flatten(2))

    def feed(self, x):
        return self.mlp.down_proj(F.gelu(self.mlp.gate_proj(x), approximate="tanh") * self.mlp.up_proj(x))

    def forward(self, x, seen=None, cache=None, layer=None):
        h = self.attend(self.input_layernorm(x), seen, cache, layer)
        if self.c.gemma2:
            x = x + self.post_attention_layernorm(h)
            return x + self.post_feedforward_layernorm(self.feed(self.pre_feedforward_layernorm(x)))
        x = x + h
        return x + self.feed(self.post_attention_layernorm(x))  # a trap: in Gemma 1 this name is the norm before the MLP


class Gemma(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.c, self.recompute, self.n_words = c, False, min(c.vocab_size, 257_152)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList([GemmaLayer(c) for _ in range(c.n_layer)])
        self.norm = RMSNorm(c.n_embd, c.eps)

    def embed(self, idx):
        return self.embed_tokens(idx) * self.c.n_embd ** 0.5

    def forward(self, x, P, cache=None):
        """Embeddings (B, T, D) -> hidden states (B, T, D). The first P see each other; the rest, and what the cache holds, is seen from behind only."""
        T, seen = x.shape[1], None
        if T > P:
            seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()  # (who looks, at whom)
            seen[:, :P] = True
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, seen, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, seen, cache, i)
        if cache:
            cache.seen += T
        return x

    def head(self, x):
        """Hidden states (..., D) -> logits in fp32, from the unscaled table, whose rows after the tokenizer's last word (<image>, padding) stand for nothing."""
        logits, cap = F.linear(self.norm(x), self.embed_tokens.weight[:self.n_words]).float(), self.c.final_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


class PaliGemma(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.vision_tower = SigLIP(c)
        self.multi_modal_projector = nn.ModuleDict(dict(linear=Linear(c.v_embd, c.n_embd)))
        self.language_model = Gemma(c)

    def look(self, pixels):
        """Pictures (B, 3, size, size) in [-1, 1] -> image tokens (B, N, D)."""
        return self.multi_modal_projector.linear(self.vision_tower(pixels))

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32, siglip=None):
        """
        `name`: on the hub (owner/model or owner/model@revision), a folder or file of safetensors with its config.json, or big_vision's .npz.
        With `siglip`, the tower comes from that checkpoint, Gemma from `name`, and the projector between them is random. All of it is frozen.
        Tensors go from the file to their place one by one: beside the model, host memory holds only the one in hand.
        """
        c, sources, shapes = describe(name, siglip)
        with torch.device("meta"):
            model = cls(c)
        fit(name, {key: p.shape for key, p in model.named_parameters() if not (siglip and "projector" in key)}, shapes)
        try:
            for part, _, stream, _ in sources:
                for key, tensor in stream():
                    if key.startswith(part):
                        put(model, key, tensor.to(device, dtype, copy=True))
        except (OSError, zipfile.BadZipFile, safetensors.SafetensorError) as problem:
            die(f"{name} is damaged ({problem}): get it anew")
        if siglip:  # the final norm leaves sum(w^2 + b^2) of squares in a token, whatever the picture: so image tokens can be born at the size of words
            norm, words = model.vision_tower.post_layernorm, model.language_model.embed_tokens.weight[:10_000].float() * c.n_embd ** 0.5
            size = words.square().mean().sqrt() / (norm.weight.float().square() + norm.bias.float().square()).sum().sqrt()
            put(model, "multi_modal_projector.linear.weight", torch.randn(c.n_embd, c.v_embd, device=device) * size)
            put(model, "multi_modal_projector.linear.bias", torch.zeros(c.n_embd, device=device))
        return model


def put(module, key, tensor, train=False):
    parent, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=train))


def fit(path, own, given):
    """Ends the run unless the tensors that a file gives, {name: shape}, are those that are wanted."""
    wrong = [f"{key} is missing" for key in own if key not in given] + [f"{key} is unknown" for key in given if key not in own]
    wrong += [f"{key} is {tuple(given[key])} instead of {tuple(own[key])}" for key in own if key in given and tuple(own[key]) != tuple(given[key])]
    if wrong:
        die(f"{path}: {len(wrong)} tensors do not fit: {'; '.join(wrong[:5])}")


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints, in the two formats that were published. Each opens as {our name: shape}, a function that yields (our name, tensor), and config.json


def describe(name, siglip=None):
    """What a checkpoint's files say before any tensor is read: the config, the files as (part to take, *open_checkpoint), and all shapes."""
    sources = [("language_model." if siglip else "", *open_checkpoint(name))] + ([("vision_tower.", *open_checkpoint(siglip))] if siglip else [])
    shapes = {key: shape for part, theirs, *_ in sources for key, shape in theirs.items() if key.startswith(part)}
    text, vision = sources[0][-1], sources[-1][-1]
    return read_config(name, shapes, text.get("text_config", text), vision.get("vision_config", vision)), sources, shapes


def open_checkpoint(name):
    if not os.path.exists(name) and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name):
        die(f"{name}: no such file or folder, and not a name on the hub (owner/model)")
    try:
        path = name if os.path.exists(name) else fetch(name)
        return open_npz(path) if path.endswith(".npz") else open_safetensors(path)
    except (OSError, ValueError, LookupError, AssertionError, safetensors.SafetensorError, zipfile.BadZipFile) as problem:
        die(f"{name} is not a whole checkpoint, in safetensors with a config.json or in big_vision's .npz ({type(problem).__name__}: {problem})")


def fetch(name):
    """Downloads a model from the hub into a folder, whose name it returns."""
    folder, (repo, _, revision) = os.path.join("pretrained", name.replace("/", "_")), name.partition("@")
    print(f"{name}: if you have not yet, accept Google's licence at {hub()}/{repo} and set HF_TOKEN to a token of yours", flush=True)
    tree = download(f"{hub()}/api/models/{repo}/tree/{revision or 'main'}", os.path.join(folder, "files.json"))
    for file in (entry["path"] for entry in json.load(open(tree))):
        if re.fullmatch(r"config\.json|tokenizer\.model|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", file):
            download(f"{hub()}/{repo}/resolve/{revision or 'main'}/{file}", os.path.join(folder, file))
    return folder


def open_safetensors(path):
    """A folder in Hugging Face's layout, one file or shards, or a single file with its config.json beside it."""
    folder, files = (path, ["model.safetensors"]) if os.path.isdir(path) else os.path.split(path)
    index = os.path.join(folder, "model.safetensors.index.json")
    files = [files] if files != ["model.safetensors"] else sorted(set(json.load(open(index))["weight_map"].values())) if os.path.exists(index) else files
    where, shapes = {}, {}
    for file in (os.path.join(folder, file) for file in files):
        with safetensors.safe_open(file, "pt") as f:
            metadata = f.metadata()
            for key in f.keys():
                if name := our_name(key):
                    where[name], shapes[name] = (file, key), f.get_slice(key).get_shape()

    def stream():
        for name in sorted(where, key=lambda name: "embed" not in name):  # the table first: while it is converted, it is in memory twice
            with safetensors.safe_open(where[name][0], "pt") as f:  # opened anew each time: what was read of a mapped file counts as ours until it is closed
                yield name, f.get_tensor(where[name][1])

    config = os.path.join(folder, "config.json")  # a model that was trained whole here carries its own
    return shapes, stream, json.load(open(config)) if os.path.exists(config) else json.loads((metadata or {}).get("config", "{}"))


def our_name(key):
    """Our name of a tensor, whichever of the published namings the file uses; None for what we have no use for."""
    key = key.removeprefix("model.")
    for theirs, ours in {"language_model.model.": "language_model.", "vision_tower.vision_model.": "vision_tower.", "vision_model.": "vision_tower.",
                         **{part: "language_model." + part for part in ("embed_tokens.", "layers.", "norm.")}}.items():  # the last: Gemma by itself
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
    useless = "lm_head." in key or key.startswith(("text_model.", "logit_", "vision_tower.head."))  # the table once more; the rest of a SigLIP
    return None if useless else key


SAME, FLIP, HEADS_IN = (lambda w: w), (lambda w: w.mT), (lambda w: w.mT.flatten(0, 1))  # (in, out) and (heads, in, E) -> (out, in), with out = heads * E
OUT, IN = (lambda w: w.flatten(0, 1).mT), (lambda w: w.flatten(1).mT)  # (heads, E, out) and (in, heads, E) -> (out, in)
BIG_VISION = {  # {(its prefix, ours): [(its name without /kernel, /scale or /w, ours without .weight, how its array becomes ours)]}; {} = all layers, stacked
    ("img/", ""): [
        ("embedding", "vision_tower.embeddings.patch_embedding", lambda w: w.permute(3, 2, 0, 1)), ("head", "multi_modal_projector.linear", FLIP),
        ("pos_embedding", "vision_tower.embeddings.position_embedding", lambda w: w[0]), ("Transformer/encoder_norm", "vision_tower.post_layernorm", SAME)],
    ("img/Transformer/encoderblock/", "vision_tower.encoder.layers.{}."): [
        ("LayerNorm_0", "layer_norm1", SAME), ("LayerNorm_1", "layer_norm2", SAME), ("MlpBlock_0/Dense_0", "mlp.fc1", FLIP), ("MlpBlock_0/Dense_1", "mlp.fc2", FLIP),
        *((f"MultiHeadDotProductAttention_0/{name}", f"self_attn.{name[0]}_proj", IN) for name in ("query", "key", "value")),
        ("MultiHeadDotProductAttention_0/out", "self_attn.out_proj", OUT)],
    ("llm/", "language_model."): [("embedder/input_embedding", "embed_tokens", SAME), ("final_norm", "norm", SAME)],
    ("llm/layers/", "language_model.layers.{}."): [
        ("attn/q_einsum", "self_attn.q_proj", HEADS_IN), ("attn/attn_vec_einsum", "self_attn.o_proj", OUT), ("mlp/linear", "mlp.down_proj", FLIP),
        ("attn/kv_einsum", "self_attn.k_proj", lambda w: HEADS_IN(w[0])), ("attn/kv_einsum", "self_attn.v_proj", lambda w: HEADS_IN(w[1])),
        ("mlp/gating_einsum", "mlp.gate_proj", lambda w: w[0].mT), ("mlp/gating_einsum", "mlp.up_proj", lambda w: w[1].mT),
        ("pre_attention_norm", "input_layernorm", SAME), ("post_attention_norm", "post_attention_layernorm", SAME),
        ("pre_ffw_norm", "pre_feedforward_layernorm", SAME), ("post_ffw_norm", "post_feedforward_layernorm", SAME)]}


def open_npz(path):
    """big_vision's file, a zip of arrays. One of them can be a matrix of all layers, 2.4 GB: it is read a layer at a time."""
    def header(f):
        np.lib.format.read_magic(f)
        shape, by_column, kind = np.lib.format.read_array_header_1_0(f)
        assert not by_column, f"{f.name} is stored column by column"
        return shape, kind

    archive, members, shapes, said = zipfile.ZipFile(path), [], {}, dict(text_config={}, vision_config={})
    names = sorted(archive.namelist(), key=lambda name: "embed" not in name)  # the table first, as above
    gemma2 = any("post_ffw_norm" in name for name in names)
    for name in names:
        key = name.removesuffix(".npy").removeprefix("params/")
        base, _, leaf = key.rpartition("/")
        rows = [(prefix + ours + ".bias", torch.flatten) if leaf == "bias" else (prefix + ours + ".weight", how) for (start, prefix), block in BIG_VISION.items()
                for theirs, ours, how in block if start + theirs == (base if leaf in ("kernel", "bias", "scale", "w") else key)]
        if not gemma2:  # Gemma 1's norm before the MLP goes by another name
            rows = [(ours.replace("pre_feedforward_", "post_attention_"), how) for ours, how in rows]
        with archive.open(name) as f:
            shape, kind = header(f)
        layers = shape[0] if rows and "{}" in rows[0][0] else None
        one = shape if layers is None else shape[1:]
        members.append((name, rows, layers or 1, one, kind))
        for ours, how in rows or [(key, SAME)]:  # an unknown key keeps its name, and `fit` will say it
            shapes |= {ours.format(i): how(torch.empty(one, device="meta")).shape for i in range(layers or 1)}
        if base.endswith("q_einsum"):
            said["text_config"]["head_dim"] = shape[-1]
        if base.endswith("/query"):
            said["vision_config"]["num_attention_heads"] = shape[-2]

    def stream():
        for name, rows, layers, shape, kind in members:
            with archive.open(name) as f:
                header(f)
                for i in range(layers):
                    w = np.empty(shape, kind)
                    raw = w.reshape(-1).view(np.uint8)
                    for start in range(0, len(raw), 1 << 24):
                        f.readinto(raw[start:start + (1 << 24)])
                    w = torch.from_numpy(w.view(np.int16)).view(torch.bfloat16) if kind.kind == "V" else torch.from_numpy(w)  # numpy knows no bfloat16
                    yield from ((ours.format(i), how(w)) for ours, how in rows)

    return shapes, stream, said


def read_config(name, shapes, text, vision):
    """Sizes are the tensors'; what those don't show is config.json's, and what that leaves out, as Google's files do, is PaliGemma's own."""
    def size(key, axis=0):
        return shapes[key + ".weight"][axis] if key + ".weight" in shapes else die(f"{name}: {key}.weight is missing: this is not all of a PaliGemma")

    def layers(said, part):
        return said.get("num_hidden_layers") or 1 + max(int(key.removeprefix(part).split(".")[0]) for key in shapes if key.startswith(part))

    E, patch, first = text.get("head_dim") or 256, size("vision_tower.embeddings.patch_embedding", 2), "language_model.layers.0."
    gemma2 = first + "pre_feedforward_layernorm.weight" in shapes  # PaliGemma 2; its sliding window, 4,096, is wider than what we feed it
    return SimpleNamespace(
        image_size=math.isqrt(size("vision_tower.embeddings.position_embedding")) * patch, patch_size=patch, v_layer=layers(vision, "vision_tower.encoder.layers."),
        v_head=vision.get("num_attention_heads") or 16, v_embd=size("vision_tower.embeddings.patch_embedding"), v_mlp=size("vision_tower.encoder.layers.0.mlp.fc1"),
        n_layer=layers(text, "language_model.layers."), n_head=size(first + "self_attn.q_proj") // E, n_kv_head=size(first + "self_attn.k_proj") // E, head_dim=E,
        n_embd=size("language_model.embed_tokens", 1), n_mlp=size(first + "mlp.gate_proj"), vocab_size=size("language_model.embed_tokens"), gemma2=gemma2,
        query_scale=(text.get("query_pre_attn_scalar") or E) ** -0.5, attn_softcap=text.get("attn_logit_softcapping", 50.0) if gemma2 else None,
        final_softcap=text.get("final_logit_softcapping", 30.0) if gemma2 else None, eps=text.get("rms_norm_eps") or 1e-6,
        rope_theta=text.get("rope_theta") or (text.get("rope_parameters") or {}).get("rope_theta") or 10_000.0)


# ----------------------------------------------------------------------------------------------------------------------
# a PaliGemma that is asked in a certain way, and what of it is trained


class Prompted(nn.Module):
    """A frozen PaliGemma; bos and `hard`, the tokens of the hard prompt with its "\\n"; and what is trained: a soft prompt, or parts of Gemma, or beside it."""

    def __init__(self, model, bos, hard, prompt="hard", n_soft=10, place="after_image", order="image,bos,prompt", train="none", lora_rank=8, stack=False):
        super().__init__()
        self.model, self.pieces, language = model, order.split(","), model.language_model
        device = language.norm.weight.device
        self.words = dict(bos=torch.tensor([bos], device=device))
        self.ask(hard)
        if prompt == "soft":
            image = self.pieces.index("image")
            self.pieces.insert(dict(before_image=image, after_image=image + 1, after_bos=self.pieces.index("bos") + 1, before_suffix=3)[place], "soft")
            rows = language.embed(self.words["prompt"][:-1] if len(hard) > 1 else self.words["bos"]).detach().float()  # scaled already
            self.soft = nn.Parameter(rows[torch.arange(n_soft) % len(rows)])  # (n_soft, D)
        for layer in language.layers:
            if train == "attention":
                train_in_fp32(layer.self_attn)
            for matrix in (*layer.self_attn.values(), *layer.mlp.values()) if train == "lora" else ():
                n_out, n_in = matrix.weight.shape
                matrix.lora_a = nn.Parameter(torch.randn(lora_rank, n_in, device=device) * n_in ** -0.5)
                matrix.lora_b = nn.Parameter(torch.zeros(n_out, lora_rank, device=device))  # zero: it starts from the model as it is
        if train == "all" or stack:
            train_in_fp32(model if train == "all" else model.multi_modal_projector)

    def ask(self, hard):
        self.words["prompt"] = torch.tensor(hard, device=self.words["bos"].device)

    def trained(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def prefix(self, pixels):
        """Pictures (B, 3, size, size) -> (B, P, D). SigLIP, while frozen, keeps nothing for the backward pass: nothing in it could get a gradient."""
        language = self.model.language_model
        pieces = {name: language.embed(idx) for name, idx in self.words.items()} | dict(image=self.model.look(pixels), soft=getattr(self, "soft", None))
        return torch.cat([pieces[name].to(language.embed_tokens.weight.dtype).expand(len(pixels), -1, -1) for name in self.pieces], 1)

    def forward(self, idx, pixels, targets, owner=None):
        """
        The summed cross-entropy of targets (B, T), in nats; -100 marks padding. idx (B, T) is what stands before each: first the end of the prefix,
        whatever idx says, then words. Padding comes last, where no word sees it, and all prefixes are of one length: one mask serves all rows.
        owner (B,): which of the pictures each row is about; None = row i about picture i.
        """
        language, prefix = self.model.language_model, self.prefix(pixels)
        prefix = prefix if owner is None else prefix[owner]
        P = prefix.shape[1]
        x = language(torch.cat([prefix, language.embed(idx[:, 1:])], 1), P)[:, P - 1:]  # (B, T, D)

        def part(x, targets):
            return F.cross_entropy(language.head(x), targets, reduction="sum")

        # logits of the suffix only, of 64 words at a time, and computed again in the backward pass: those of 8 x 300 tokens would be 2.5 GB in fp32
        return sum(checkpoint(part, *some, use_reentrant=False) for some in zip(x.flatten(0, 1).split(64), targets.flatten().split(64)))

    @torch.no_grad()
    def generate(self, pixels, stop, max_new_tokens, beam=1):
        """Captions, greedy or the best of a beam search, as tokens (B, up to max_new_tokens), each ended by `stop`."""
        language, c, prefix = self.model.language_model, self.model.config, self.prefix(pixels).repeat_interleave(beam, 0)  # (B * beam, P, D)
        keys = SimpleNamespace(n_layer=c.n_layer, n_head=c.n_kv_head, n_embd=c.n_kv_head * c.head_dim)  # the cache holds the G key heads only
        cache = KVCache(keys, len(prefix), prefix.shape[1] + max_new_tokens, prefix)

        def step(new):  # the first call, with a dummy for a token, reads the prefix
            x = language.embed(new) if cache.seen else prefix
            return language.head(language(x, x.shape[1], cache)[:, -1:])

        start = torch.zeros(len(prefix), 1, dtype=torch.long, device=pixels.device)
        if beam > 1:
            return beam_search(step, cache, start, beam, max_new_tokens, stop)[:, 0]
        return decode(step, start, max_new_tokens, 0.0, stop=stop)[:, 1:]


def train_in_fp32(module):
    for key, p in list(module.named_parameters()):
        put(module, key, p.detach().float(), train=True)


def make_optimizer(asked, name):
    return [torch.optim.SGD(asked.trained().values(), lr=1.0)] if name == "sgd" else make_optimizers(asked, name, 1.0, 0.0)


def load_adapter(path):
    """-> what was trained, {name: tensor}, and the settings that it was trained with."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata()["settings"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError) as problem:
        die(f"{path} is not an adapter of paligemma_prompt.py ({type(problem).__name__}: {problem})")


# ----------------------------------------------------------------------------------------------------------------------
# words and pictures


class Tokenizer:
    """A SentencePiece model, under the names that TokenizedCaptions calls."""

    def __init__(self, file):
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = SentencePieceProcessor(model_file=file)
        except (OSError, RuntimeError) as problem:
            die(f"{file} is not a SentencePiece model ({problem}): put the checkpoint's tokenizer.model there, or say tokenizer=")
        self.encode = self.encode_ordinary_batch = pieces.encode  # of a text, of a list of texts
        self.decode, self.bos, self.eot_token, self.n_vocab = pieces.decode, pieces.bos_id(), pieces.eos_id(), pieces.get_piece_size()
        if len(self.encode("\n")) != 1:
            die(f'{file}: "\\n" ends the prefix and must be one token, but is {len(self.encode(chr(10)))}: this is not a PaliGemma\'s tokenizer')


class Pictures:
    """Picture files, read when they are asked for: pictures[numbers] -> (B, 3, size, size), fp32 in [-1, 1]."""

    def __init__(self, files, size):
        self.files, self.size, self.pool = files, size, ThreadPoolExecutor(os.cpu_count())

    def __len__(self):
        return len(self.files)

    def read(self, number):
        squeezed = open_image(self.files[number]).resize((self.size, self.size), Image.BICUBIC)  # not cropped: as PaliGemma was trained
        return np.asarray(squeezed, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1

    def __getitem__(self, numbers):
        return np.stack(list(self.pool.map(self.read, numbers)))


def read_split(data, split, size):
    """-> the json's images, each one's captions in lower case, and its Pictures."""
    images, captions = load_captions(data, split)
    captions = [[" ".join(text.lower().split()) for text in said] for said in captions]
    empty = [image["file_name"] for image, said in zip(images, captions) if not all(said)]
    if empty:
        die(f"{data}, {split}: {len(empty)} pictures have a caption without a word, such as {', '.join(empty[:3])}")
    return images, captions, Pictures([os.path.join(data, split, image["file_name"]) for image in images], size)


# ----------------------------------------------------------------------------------------------------------------------
# memory: what one step takes


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that are alive, and their peak, through whatever is computed inside. Fake tensors count as if they were real."""
    live = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.follow, (args, result))
        return result

    def follow(self, tensor):
        storage = tensor.untyped_storage()
        if not hasattr(storage, "followed"):
            storage.followed = weakref.finalize(storage, self.change, -storage.nbytes())
            self.change(storage.nbytes())

    def change(self, n):
        self.live += n
        self.peak = max(self.peak, self.live)


def random_model(c, device, dtype=torch.float32):
    with torch.device("meta"):
        model = PaliGemma(c)
    for key, p in list(model.named_parameters()):
        w = torch.zeros(p.shape, dtype=dtype, device=device)  # right for biases, and for RMSNorm
        put(model, key, w.normal_(0, p[0].numel() ** -0.5) if p.dim() > 1 else w + ("vision_tower" in key and key.endswith("weight")))
    return model


def step_memory(c, batch_size, device="cpu", dtype=torch.bfloat16, n_suffix=40, **way):
    """
    GiB that a training step takes, weights included: measured on a GPU; elsewhere computed, by taking the step with fake tensors, which have
    shapes but no content, and following which of them are alive.
    """
    real = "cuda" in device
    with nullcontext() if real else FakeTensorMode():
        asked = Prompted(random_model(c, device, dtype), 2, [3, 4, 5], **way)
        asked.model.language_model.recompute = True
        optimizers = make_optimizer(asked, "sgd" if way.get("train") == "attention" else "adamw")
        idx = torch.zeros(batch_size, n_suffix, dtype=torch.long, device=device)
        pixels = torch.zeros(batch_size, 3, c.image_size, c.image_size, device=device)
        if real:
            torch.cuda.reset_peak_memory_stats()
        with nullcontext() if real else LiveBytes() as live:
            for _ in range(2):  # from the second on, Adam's moments are there, and all weights were met
                asked(idx, pixels, idx).backward()
                take_step(asked, optimizers, 1e-3, 1.0)
    return (torch.cuda.max_memory_allocated() if real else live.peak) / 2**30


def check_memory(c, device, dtype, batch_size, way):
    """Ends the run, before anything is loaded, if a training step would not fit into the free memory; names what would."""
    if "cuda" in device:
        free = torch.cuda.mem_get_info()[0]
    else:
        free = int(re.search(r"MemAvailable: *(\d+)", open("/proc/meminfo").read())[1]) * 1024 if os.path.exists("/proc/meminfo") else math.inf
    soft = dict(prompt="soft")
    way = soft if way["prompt"] == "hard" and way["train"] == "none" and not way["stack"] else way  # what trains nothing takes a little less
    need = step_memory(c, batch_size, "cpu", dtype, **way)
    if need < free / 2**30:
        return
    for hint, kind, other in (("batch_size=1", dtype, way), ("prompt=soft train=none batch_size=1 dtype=bfloat16", torch.bfloat16, soft), ("nothing here", dtype, way)):
        if step_memory(c, 1, "cpu", kind, **other) < free / 2**30:
            break
    die(f"a step would take {need:.1f} GiB, and {device} has {free / 2**30:.1f} free. What would fit: {hint}")


# ----------------------------------------------------------------------------------------------------------------------
# the built-in road: a small PaliGemma of a drawn world, in which people speak of what they see in two ways

FROM_ABOVE = dict(circle="storage tank", square="building", triangle="tent", star="fountain", cross="airplane", picture="satellite view")
BUILTIN = dict(paligemma="out/prompt_small/adapter.safetensors", data="data/aerial", compare=True, batch_size=16, max_steps=100, eval_interval=25, log_interval=25)
WORLDS = dict(scenes=(0.5, 0), surveys=(0.5, 1), aerial=(1, 1))  # shares of pictures seen from above and of captions in a surveyor's words
# asked in six ways, of which every other means the surveyor's words: a model that has met one prompt only learns to ignore it, and none will steer it
PRETRAIN = ("paligemma=small", "data=data/scenes,data/surveys", "words=caption en,survey en,describe the picture,report what is seen from above,en,above",
            *"out_dir=out/prompt_small train=all optimizer=muon batch_size=32 eval_interval=250 log_interval=50".split())


def drawn_world(pictures, words):
    """A style for draw_shapes: a share of pictures is seen from above, on the colours of the ground, a share of captions is in a surveyor's words."""
    def style(rng, picture, captions):
        if rng.random() < pictures:
            ground = Image.frombytes("L", (9, 9), rng.randbytes(81)).resize((64, 64), Image.BICUBIC)
            picture = ImageChops.multiply(picture, ImageOps.colorize(ground, (150, 135, 100), (190, 215, 165)))  # from earth to grass
        return picture, [" ".join(FROM_ABOVE.get(word, word) for word in said.split()) if rng.random() < words else said for said in captions]

    return style


def results_table(rows):
    head = f"{'':<20} | {'trained':>9} | {'peak GB':>7} | {'s/step':>6} | {'BLEU-4':>6} | {'CIDEr':>6} | {'perplexity':>10} | {'wrong picture':>13}"
    return "\n".join([head] + [f"{r['way']:<20} | {r['trained']:>9,} | {r['peak_GB']:>7.2f} | {r['seconds_per_step']:>6.2f} | {100 * r['Bleu_4']:>6.1f} | "
                               f"{100 * r['CIDEr']:>6.1f} | {r['perplexity']:>10.2f} | {r['perplexity_wrong_picture']:>13.2f}" for r in rows])


def draw_comparison(path, rows):
    """The table as bars."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 5, figsize=(15, 0.4 * len(rows) + 1.2), sharey=True, layout="constrained")
    for ax, (title, key, scale, form) in zip(axes, (("trained parameters", "trained", 1, ",.0f"), ("peak memory, GB", "peak_GB", 1, ".2f"),
                                                    ("seconds a step", "seconds_per_step", 1, ".2f"), ("BLEU-4 x 100", "Bleu_4", 100, ".1f"),
                                                    ("CIDEr x 100", "CIDEr", 100, ".1f"))):
        ax.bar_label(ax.barh([r["way"] for r in rows], [scale * r[key] for r in rows]), fmt=f"{{:{form}}}", padding=2, fontsize=8)
        ax.set_title(title, fontsize=10)
        ax.margins(x=0.3)
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=100)
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config, saved = configure(globals()), {}
    if image and init_from == "scratch" and not (paligemma or stack):
        runs = sorted((path for path in glob.glob("out/prompt_*/**/adapter.safetensors", recursive=True) if "prompt_small" not in path), key=os.path.getmtime)
        init_from = runs[-1] if runs else die("image= needs an adapter (init_from=), or a model (paligemma=): `python paligemma_prompt.py` makes both")
    if init_from.endswith(".safetensors"):
        saved, about = load_adapter(init_from)
        config = configure(globals(), about | dict(init_from=init_from))
    builtin = None
    if not (paligemma or stack or memory):
        config, builtin = configure(globals(), BUILTIN), True
    for name, allowed in dict(prompt=("hard", "soft"), train=("none", "attention", "lora", "all"), place=PLACES).items():
        if config[name] not in allowed:
            die(f"{name}={config[name]}: {', '.join(allowed)}")
    if sorted(order.split(",")) != ["bos", "image", "prompt"] or min(n_soft, lora_rank, batch_size) < 1:
        die(f"order={order} n_soft={n_soft} lora_rank={lora_rank} batch_size={batch_size}: order has image, bos and prompt, each once; numbers are 1 or more")
    if stack and not (siglip and gemma) or not (memory or builtin or image or data):
        die("stack=True needs siglip= and gemma=, the checkpoints to build from" if stack else "data= is missing: a folder in COCO's layout")
    _, world, device, _ = me = setup(device, dtype)
    if world > 1:
        die("what is trained here is small: run it as one process, without torchrun")
    me = me._replace(autocast=nullcontext())  # our layers know themselves what is in which precision
    frozen = torch.bfloat16 if dtype == "bfloat16" or dtype is None and "cuda" in device else torch.float32
    way = dict(prompt=prompt, n_soft=n_soft, place=place, order=order, train=train, lora_rank=lora_rank, stack=stack)
    t_start = time.time()

    if memory:
        print(f"a training step of PaliGemma 3B, 224 px, 40 tokens of caption, frozen weights in bfloat16: GiB of memory, weights and all, "
              f"{'measured on ' + torch.cuda.get_device_name() if 'cuda' in device else 'computed on fake tensors'}\n\n{'':24} |    B=1 |    B=4 |    B=8")
        for label, some in {"soft prompt": dict(prompt="soft"), "attention (SGD)": dict(train="attention"), "LoRA": dict(train="lora"),
                            "stack: LoRA + projector": dict(train="lora", stack=True)}.items():
            print(f"{label:24} | " + " | ".join(f"{step_memory(SimpleNamespace(**FULL), B, device, **some):6.2f}" for B in (1, 4, 8)), flush=True)
        sys.exit(0)

    if builtin:
        print("No PaliGemma was named (paligemma=), so a small one is made here, from nothing, taught to caption drawn scenes, and then prompted: this shows the\n"
              "machinery at work, not what PaliGemma can do. What is on disk already is not made again.", flush=True)
        for world_, shares in WORLDS.items():
            if not os.path.exists(f"data/{world_}/annotations/captions_val2017.json"):
                draw_shapes(f"data/{world_}", 3000, seed, 1, drawn_world(*shares))
        if not os.path.exists(BUILTIN["paligemma"]):
            run("paligemma_prompt.py", *PRETRAIN, f"max_steps={5 * max_steps}")

    if compare:
        folder, rows = out_dir or f"out/prompt_{os.path.basename(os.path.normpath(data))}_all", []
        for label, some in WAYS.items():
            mine = os.path.join(folder, re.sub(r"\W+", "_", label))
            run("paligemma_prompt.py", *(f"{k}={v}" for k, v in (config | some | dict(compare=False, out_dir=mine)).items() if v is not None))
            rows.append(json.load(open(f"{mine}/results.json")) | dict(way=label, log=f"{mine}/log.csv"))
        save_atomically(f"{folder}/results.json", lambda f: f.write(json.dumps(rows, indent=1).encode()))
        logs = {r["way"]: read_log(r["log"]) for r in rows}
        plot(f"{folder}/curves.png", {title: {label: curve(log, key) for label, log in logs.items()} for title, key in
                                      {"loss (nats a token)": "loss", "perplexity of held-out captions": "perplexity"}.items()})
        draw_comparison(f"{folder}/comparison.png", rows)
        print(f"\n{results_table(rows)}\n\nlook at {folder}/comparison.png, curves.png and each run's captions.png; {time.time() - t_start:.0f} s in all")
        sys.exit(0)

    # ---- the model, and what of it is trained
    kind = "stack" if stack else prompt if train == "none" else train
    if image and init_from.endswith(".safetensors"):
        out_dir = out_dir or os.path.dirname(init_from)
    out_dir = out_dir or f"out/prompt_{os.path.basename(os.path.normpath(data or 'zero-shot'))}_{kind}" + (f"_{place}" if prompt == "soft" else "")
    source, folders = gemma if stack else paligemma, (data or "").split(",")
    if not image:
        show(config | dict(out_dir=out_dir))
    torch.manual_seed(seed)
    if source == "small":
        from sentencepiece import SentencePieceTrainer

        os.makedirs(out_dir, exist_ok=True)
        tokenizer = os.path.join(out_dir, "tokenizer.model")  # as Gemma's: words as they stand, bytes for what it does not know, "\n" a token by itself
        SentencePieceTrainer.train(sentence_iterator=(text for folder in folders for said in load_captions(folder, "train2017")[1] for text in said), model_prefix=tokenizer[:-6],
                                   model_type="bpe", vocab_size=SMALL["vocab_size"], byte_fallback=True, user_defined_symbols=["\n"], add_dummy_prefix=False,
                                   remove_extra_whitespaces=False, normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2)
        c = SimpleNamespace(**SMALL)
        model = random_model(c, device)
    else:
        c, *_ = describe(source, siglip if stack else None)
        if c.n_embd > 1000:
            check_memory(c, device, frozen, batch_size, way)
        model = PaliGemma.from_pretrained(source, device, frozen, siglip if stack else None)
        folder = os.path.join("pretrained", source.replace("/", "_")) if not os.path.exists(source) else source if os.path.isdir(source) else os.path.dirname(source)
        tokenizer = tokenizer or os.path.join(folder, "tokenizer.model")
    text = Tokenizer(tokenizer)
    if not 0 <= c.vocab_size - text.n_vocab < 128:  # tables are padded, to a multiple of 64 or 128
        die(f"{tokenizer} has {text.n_vocab:,} tokens, and {source} {c.vocab_size:,} rows for them: they don't belong together")
    model.language_model.n_words = text.n_vocab
    prompts = [text.encode(prompt) + text.encode("\n") for prompt in words.split(",")]  # apart: "\n" must not melt into the last word
    asked = Prompted(model, text.bos, prompts[0], **way)
    total, trained = sum(p.numel() for p in asked.parameters()), asked.trained()
    model.language_model.recompute = total > 1e9 if recompute is None else recompute
    resumed = load_checkpoint(os.path.join(out_dir, "ckpt.pt")) if init_from == "resume" else None
    saved = resumed["trained"] if resumed else saved
    os.makedirs(out_dir, exist_ok=True)
    if saved and trained:
        fit(init_from, {key: p.shape for key, p in trained.items()}, {key: tensor.shape for key, tensor in saved.items()})
        for key, tensor in saved.items():
            trained[key].data.copy_(tensor)

    if image:
        files = image.split(",")
        pixels = torch.from_numpy(Pictures(files, c.image_size)[range(len(files))]).to(device)
        captions = to_text(asked.generate(pixels, text.eot_token, max_length, beam), text)
        print("\n".join(f"{file}: {said}" for file, said in zip(files, captions)))
        draw_captions(os.path.join(out_dir, "image.png"), [open_image(file) for file in files], captions, columns=min(4, len(files)))
        print(f"drawn in {out_dir}/image.png")
        sys.exit(0)

    # ---- pictures and captions
    split = "test2017" if os.path.exists(os.path.join(folders[0], "annotations", "captions_test2017.json")) else "val2017"
    images, references, pictures = read_split(folders[0], split, c.image_size)
    captions = TokenizedCaptions(references, text, max_length)
    tasks = [(TokenizedCaptions(said, text, max_length), seen) for _, said, seen in (read_split(folder, "train2017", c.image_size) for folder in folders)]
    watched = "val2017" if os.path.exists(os.path.join(folders[0], "annotations", "captions_val2017.json")) else split
    _, val_said, val_pictures = read_split(folders[0], watched, c.image_size)
    glance, val_pictures.files = TokenizedCaptions([said[:1] for said in val_said[:256]], text, max_length), val_pictures.files[:256]  # one caption each
    optimizer = optimizer or ("sgd" if train == "attention" and c.n_embd > 1000 else "adamw")
    learning_rate = learning_rate or RATES.get(kind, (0, 0))[c.n_embd < 1000]
    max_steps, step = (0 if eval_only or not trained else max_steps), 0
    optimizers = make_optimizer(asked, optimizer) if trained else []
    if resumed:
        resume_optimizers(optimizers, resumed, "ckpt.pt")
        step = resumed["step"]
    if cut := captions.cut + sum(said.cut for said, _ in tasks):
        print(f"{cut:,} captions are longer than max_length={max_length} tokens and were cut")
    n_trained = sum(p.numel() for p in trained.values())
    print(f"{n_trained:,} trained parameters, {n_trained / total:.2%} of {total:,} | {sum(len(seen) for _, seen in tasks):,} pictures to train on, {len(images):,} to be judged by "
          f"({split}) | {device}", flush=True)
    log = Log(os.path.join(out_dir, "log.csv"), ["step", "loss", "perplexity", "lr", "norm", "ms"], step)
    wandb = start_wandb(config | dict(out_dir=out_dir)) if wandb_log else None

    # ---- the loop
    t0, first_step = time.time(), step
    while True:
        row = dict(step=step)
        asked.ask(prompts[0])
        if step % eval_interval == 0 or step >= max_steps:
            row["perplexity"] = perplexity(asked, val_pictures, glance, me, batch_size=4 * batch_size)
            print(f"step {step:5d}/{max_steps} | perplexity of {len(val_pictures)} held-out captions {row['perplexity']:.3f}", flush=True)
            if step > first_step:  # the adapter is for use, and says which model it belongs to; the checkpoint is for going on
                tensors = {key: p.detach().cpu().contiguous() for key, p in trained.items()}
                file = os.path.join(out_dir, "adapter.safetensors")
                about = {k: config[k] for k in ("paligemma", "tokenizer", "siglip", "gemma", "words", "max_length", *way)}
                about |= dict(paligemma=file, train="none") if train == "all" else {}  # then it is a model of its own
                sizes = dict(text_config=dict(head_dim=c.head_dim, rope_theta=c.rope_theta), vision_config=dict(num_attention_heads=c.v_head))
                content = safetensors.torch.save(tensors, dict(settings=json.dumps(about), config=json.dumps(sizes)))
                save_atomically(file, lambda f: f.write(content))
                save_checkpoint(os.path.join(out_dir, "ckpt.pt"), dict(trained=tensors, optimizers=[opt.state_dict() for opt in optimizers], step=step,
                                                                       settings=config | dict(optimizer=optimizer)))
        if step >= max_steps:
            break
        t1 = time.time()
        said, seen = tasks[step % len(tasks)]
        asked.ask(prompts[step % len(prompts)])
        which, chosen = training_batch(step, batch_size, said, seed)
        idx, targets = said.batch(chosen, device)
        loss = asked(idx, gather(seen, which, device), targets) / (targets >= 0).sum()
        loss.backward()
        lr = get_lr(step, learning_rate, min_lr, warmup_steps, max_steps)
        norm = float(take_step(asked, optimizers, lr, grad_clip))
        row |= dict(loss=loss.item(), lr=lr, norm=norm, ms=(time.time() - t1) * 1000)
        log.add(**row)
        if wandb:
            wandb.log(row, step=step)
        if step % log_interval == 0 or step == max_steps - 1:
            left = (time.time() - t0) / (step + 1 - first_step) * (max_steps - step - 1)
            print(f"step {step:5d}/{max_steps} | loss {row['loss']:.4f} | norm {norm:.2f} | lr {lr:.2e} | {row['ms']:.0f} ms | {left / 60:.1f} min left", flush=True)
        step += 1

    # ---- judged on the whole split
    said = caption_split(asked, pictures, text, max_length, me, beam, batch_size=4 * batch_size)
    right, wrong = (perplexity(asked, pictures, captions, me, sight, batch_size=4 * batch_size) for sight in ("right", "wrong"))
    log.add(**row)
    scores, _ = score(said, references)
    ms = [r["ms"] for r in log.rows if r.get("ms")]
    peak = torch.cuda.max_memory_allocated() if "cuda" in device else peak_rss()
    results = dict(way=kind, trained=n_trained, peak_GB=peak / 1e9, seconds_per_step=float(np.median(ms)) / 1000 if ms else 0.0, perplexity=right,
                   perplexity_wrong_picture=wrong, **scores, step=step, split=split, settings=config)
    coco_results = [dict(image_id=image["id"], caption=caption) for image, caption in zip(images, said)]
    for file, content in (("results.json", results), (f"captions_{split}.json", coco_results)):
        save_atomically(os.path.join(out_dir, file), lambda f: f.write(json.dumps(content, indent=1).encode()))
    plot(os.path.join(out_dir, "curves.png"), {"loss (nats a token)": {"train": curve(log.rows, "loss")},
                                               "perplexity of held-out captions": {"": curve(log.rows, "perplexity")}})
    draw_captions(os.path.join(out_dir, "captions.png"), [open_image(file) for file in pictures.files[:12]],
                  [f"{caption}\n({refs[0]})" for caption, refs in zip(said, references)])
    print("\ncaptions of pictures it was not trained on, and what a person said:")
    for caption, refs in list(zip(said, references))[:5]:
        print(f"  {caption:<62} | {refs[0]}")
    print(f"\n{results_table([results])}\n{', '.join(f'{metric} {100 * value:.1f}' for metric, value in scores.items())}\n"
          f"look at {out_dir}/captions.png, curves.png; {time.time() - t_start:.0f} s")
