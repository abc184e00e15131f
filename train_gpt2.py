r"""
GPT-2 (Radford et al. 2019), and the loop that trains it on the token shards of fineweb.py.

    # a CPU, minutes
    python train_gpt2.py data=notes n_layer=4 n_head=4 n_embd=128 total_batch_size=8192 \
        max_steps=300 warmup_steps=20
    # one GPU with 80 GB
    python train_gpt2.py batch_size=64
    # eight GPUs
    torchrun --standalone --nproc_per_node=8 train_gpt2.py batch_size=64

    # then, for the model in out_dir or the one that init_from= names: what it says; its validation
    # loss and HellaSwag score; a folder that transformers reads
    python train_gpt2.py prompt="Hello, I'm a language model,"
    python train_gpt2.py init_from=gpt2 eval_only=True
    python train_gpt2.py export=mine

The defaults are the published recipe: 124M parameters, 524,288 tokens a step, 19,073 steps = 10B
tokens of FineWeb-Edu. The loss starts at ln 50257 = 10.82, falls below 4 within the first thousand
steps, and ends near 3.1, beside OpenAI's GPT-2.
Data order is a pure function of (seed, step), and nothing else in a step is random: the loss curve
is the same for any number of processes. A run that was stopped in any way (Ctrl-C and SIGTERM save
first) goes on with init_from=resume, with its settings, and repeats the same curve.
Writes out_dir/{ckpt.pt, best.pt, log.csv, curves.png, samples.txt}.
"""
import csv
import ctypes
import glob
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import hellaswag
from fineweb import (configure, die, download, get_tokenizer, hub, lock_folder, print_settings,
                     read_json, read_vocab, reading, save_atomically, save_text, vocab_and_merges)

# --------------------------------------------------------------------------------------------------
# settings: `python train_gpt2.py name=value` overrides any; rules such as >= 1 are checked

data = "edu_fineweb10B"     # folder of token shards, written by fineweb.py
out_dir = "out/gpt2"        # folder for checkpoints, log and plot
init_from = "scratch"       # scratch, resume, or a model: gpt2, gpt2-xl, folder, .safetensors, .pt
eval_only = False           # only evaluate the model
prompt: str = None          # only continue this text, four times
export: str = None          # only write the model into this folder, as transformers reads it
n_layer = 12                # >= 1: 12 layers, 12 heads, 768 wide: GPT-2 124M
n_head = 12                 # >= 1
n_embd = 768                # >= 1
block_size = 1024           # >= 1: longest sequence, T
batch_size = 8              # >= 1: sequences that a process works on at once, B: as many as fit
total_batch_size = 524_288  # >= 1: tokens a step, 2**19: about 0.5M as in the GPT-3 paper
optimizer = "adamw"         # one of adamw | muon: muon is for the matrices inside the blocks
learning_rate = 6e-4        # > 0: the peak
min_lr = 6e-5               # >= 0: where the schedule ends
warmup_steps = 715          # >= 0: GPT-3 warms up over 375M tokens
max_steps = 19_073          # >= 1: 10B tokens / 524,288
schedule = "cosine"         # one of cosine | wsd: wsd is constant until the last fifth
weight_decay = 0.1          # >= 0
grad_clip = 1.0             # >= 0: largest norm of the gradient; 0 = no clipping
eval_interval = 250         # >= 1: steps between evaluations, each followed by a checkpoint
eval_tokens = 10_485_760    # >= 1: validation tokens of one evaluation, at most
hellaswag_questions: int = None  # >= 0: at each evaluation; None = all on CUDA or with eval_only
hellaswag_file = "data/hellaswag_val.jsonl"  # the questions; fetched if the file is not there
max_new_tokens = 64         # >= 1: length of a sample
temperature = 1.0           # >= 0: of samples; 0 = always the likeliest token
top_k = 50                  # >= 1: samples choose among this many likeliest tokens
log_interval = 1            # >= 1: steps between printed lines
seed = 1337                 # >= 0
device: str = None          # cuda, cpu, mps; None = the best there is
dtype: str = None           # one of bfloat16 | float32: of matmuls; None = bfloat16 on CUDA
compile: bool = None        # torch.compile the blocks for training; None = on CUDA with Triton
wandb_log = False           # mirror the log to Weights & Biases

RENAMED = {"exam": "hellaswag_questions", "exam_file": "hellaswag_file"}
# A resumed run keeps these settings, but for what is typed. The sizes cannot be changed. Another
# value of CURVE_SETTINGS changes the training, and is printed.
CURVE_SETTINGS = ("data block_size total_batch_size optimizer learning_rate min_lr warmup_steps "
                  "max_steps schedule weight_decay grad_clip seed dtype")
VALIDATION_SETTINGS = ("data", "block_size", "eval_tokens")
SIZES = ("n_layer", "n_head", "n_embd")
OTHER_SETTINGS = "batch_size eval_interval eval_tokens hellaswag_questions hellaswag_file"

# ==================================================================================================
# GPT-2 WITH A KV CACHE. From here to `decode`, it can be copied into a notebook and run alone.
#
#     x = wte[idx] + wpe[position]                                             (B, T, C)
#     in each block:  x = x + attention(ln_1(x));  x = x + mlp(ln_2(x))        (B, T, C)
#     attention:  softmax(q k^T / sqrt(D), only past positions) v              (B, H, T, D)
#     logits = ln_f(x) wte^T                                                   (B, T, V)
#
# k and v of a token never change once they are computed, because a token sees only its past. The
# cache keeps them, so that a new token costs one token's work.
# B batch, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size; S = cached + new tokens
# ==================================================================================================


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


def matmul_dtype(x):
    """The dtype of a matmul's result for x: autocast's where autocast is on."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class KVCache:
    """The keys and values of all earlier tokens, for every block."""

    def __init__(self, config, B, length, like):
        """Room for `length` tokens in each of B rows, on the device of the tensor `like`."""
        H, D = config.n_head, config.n_embd // config.n_head
        self.kv = like.new_empty(config.n_layer, 2, B, H, length, D, dtype=matmul_dtype(like))
        self.pos = 0  # of the next token; GPT.hidden moves it after the last block

    def update(self, layer, k, v):
        """k, v: (B, H, T, D) of the new tokens. Returns those of all tokens, (B, H, S, D)."""
        S = self.pos + k.shape[2]
        self.kv[layer, 0, :, :, self.pos:S] = k
        self.kv[layer, 1, :, :, self.pos:S] = v
        return self.kv[layer, 0, :, :, :S], self.kv[layer, 1, :, :, :S]

    def reorder(self, rows):
        """
        Row i becomes what row rows[i] was (rows: a long tensor of any length). A row that is named
        several times can be continued in several ways.
        """
        used = self.kv[:, :, rows, :, :self.pos]
        n_layer, _, B, *rest = self.kv.shape
        if len(rows) != B:
            self.kv = self.kv.new_empty(n_layer, 2, len(rows), *rest)
        self.kv[..., :self.pos, :] = used


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, kv_cache=None, layer=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        past = kv_cache.pos if kv_cache else 0
        if kv_cache:
            k, v = kv_cache.update(layer, k, v)  # (B, H, S, D), S = past + T
        # New token t is at position past + t and sees the positions up to its own. With a past,
        # is_causal would be wrong: it takes the first new token for position 0.
        mask = None
        if past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=past == 0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, n_embd):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        # GPT-2 was trained with this approximation of GELU
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config.n_embd)

    def forward(self, x, kv_cache=None, layer=None):
        x = x + self.attn(self.ln_1(x), kv_cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with Hugging Face's parameter names. Matrices are (out, in), theirs are (in, out)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # matmul kernels are slow for odd sizes: 50257 rows become 50304 = 393 * 128
        padded_vocab_size = math.ceil(config.vocab_size / 128) * 128
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        # one matrix both embeds the input tokens and scores the output tokens
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                # 2 n_layer of these are summed up in the residual stream: this keeps its size
                nn.init.normal_(p, std=0.02 * (2 * config.n_layer) ** -0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.compiled_loss = None  # see compile_for_training

    def embed(self, idx, start=0):
        """Token ids (B, T), the first of them at position `start` -> (B, T, C)."""
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit into block_size={self.config.block_size}")
        positions = torch.arange(start, end, device=idx.device)
        return self.transformer.wte(idx) + self.transformer.wpe(positions)

    def hidden(self, idx, kv_cache=None):
        """idx (B, T) -> the output of the last block, before ln_f, (B, T, C)."""
        x = self.embed(idx, kv_cache.pos if kv_cache else 0)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, kv_cache, layer)
        if kv_cache:
            kv_cache.pos += idx.shape[1]
        return x

    def head(self, x):
        """ln_f and the language model head: (B, T, C) -> logits (B, T, V), without the padding."""
        return self.lm_head(self.transformer.ln_f(x))[..., :self.config.vocab_size]

    def cross_entropy(self, x, targets, loss_weight=None):
        """
        x (N, C) as `hidden` gives it, targets (N,) -> the loss, in nats: the sum of the targets'
        cross-entropies, each times its loss_weight (N,); None = the mean. And, without gradients,
        each target's own cross-entropy (N,).
        """
        if loss_weight is None:
            loss_weight = torch.full_like(targets, 1 / len(targets), dtype=torch.float32)
        return FusedLinearCrossEntropy.apply(
            self.transformer.ln_f(x), self.lm_head.weight, targets, loss_weight,
            self.config.vocab_size, torch.is_grad_enabled(), self.compiled_loss)

    def forward(self, idx, targets=None, kv_cache=None):
        """idx (B, T) -> logits (B, T, V), or, given targets (B, T), the mean loss in nats."""
        x = self.hidden(idx, kv_cache)
        if targets is None:
            return self.head(x)
        return self.cross_entropy(x.flatten(0, 1), targets.flatten())[0]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, seed=None,
                 n_vocab=None):
        """
        Continues each row of idx (B, T) by up to max_new_tokens tokens, see `decode`. Only the
        first n_vocab ids are sampled. The same `seed` gives the same tokens.
        """
        # the last token is never read
        kv_cache = KVCache(self.config, len(idx), idx.shape[1] + max_new_tokens - 1,
                           self.lm_head.weight)
        generator = torch.Generator(idx.device).manual_seed(seed) if seed is not None else None

        def next_logits(new_ids):
            # of a prompt, only the last position is of use
            x = self.hidden(new_ids, kv_cache)[:, -1:]
            return self.head(x)[..., :n_vocab]

        return decode(next_logits, idx, max_new_tokens, temperature, top_k, stop, generator)

    def prefill(self, contexts, room):
        """Contexts (B, T) -> the function that `hellaswag.predict` asks for, and describes."""
        B, T = contexts.shape
        kv_cache = KVCache(self.config, B, T + room, self.lm_head.weight)
        if T:
            self.hidden(contexts, kv_cache)
        kv_cache.reorder(torch.arange(B, device=contexts.device).repeat_interleave(4))

        def token_losses(rows, targets):
            is_target = targets >= 0
            x = self.hidden(rows, kv_cache)
            return self.cross_entropy(x[is_target], targets[is_target])[1]

        return token_losses

    @classmethod
    def from_pretrained(cls, name):
        """The GPT that `name` stands for, see `load_model`."""
        return load_model(name)[0]

    def save_pretrained(self, folder, encoding=None):
        """Writes the model as transformers reads it, see `write_hugging_face`."""
        write_hugging_face(self, folder, encoding)


def decode(step, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, generator=None):
    """
    Continues idx (B, T) token by token. step(new ids) -> logits keeps a KV cache, so each token is
    computed once. Temperature 0 takes the likeliest token; top_k keeps the k likeliest. A row that
    has produced `stop` goes on with `stop`. When all rows have, decoding ends.
    """
    new = idx
    done = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        logits = step(new)[:, -1].float()  # (B, V)
        # dividing by less than this would overflow
        if temperature < 1e-4:
            new = logits.argmax(-1, keepdim=True)  # (B, 1)
        else:
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth, -math.inf)
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if stop is not None:
            new = new.masked_fill(done[:, None], stop)
            done |= new[:, 0] == stop
        idx = torch.cat([idx, new], 1)
        if stop is not None and done.all():
            break
    return idx


# ==================================================================================================
# THE LOSS WITHOUT THE LOGITS, for rows x_i, a head W, targets t_i and weights w_i:
#
#     z_i = W x_i                                           logits                  (N, V)
#     loss = sum_i w_i (logsumexp(z_i) - z_i[t_i])          a number
#     dz_i = w_i (softmax(z_i) - onehot(t_i))               d loss / d z_i          (N, V)
#     dx = dz W                                             d loss / d x            (N, C)
#     dW = dz^T x                                           d loss / d W            (V, C)
#
# 64 sequences of 1,024 tokens have 13 GB of float32 logits, and as much again of dz. But each row
# needs only its own logits. So forward() takes a few thousand rows at a time and, while it has
# their logits, also computes dx and dW. backward() only scales these. No matmul is done twice.
# torch.nn.functional.linear_cross_entropy (torch 2.13) does the same, but for equal weights only,
# and without the losses of the single rows, which HellaSwag needs.
# ==================================================================================================


def softmax_minus_onehot_(z, targets):
    """Turns logits z (n, V) into softmax(z) - onehot(targets), in place. -> cross-entropies (n,)"""
    logp = torch.log_softmax(z, 1, dtype=torch.float32)
    losses = -logp.gather(1, targets[:, None])[:, 0]
    minus_one = torch.full_like(losses, -1.0)[:, None]
    z.copy_(logp.exp_().scatter_add_(1, targets[:, None], minus_one))
    return losses


class FusedLinearCrossEntropy(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, targets, loss_weight, vocab_size, with_gradients,
                compiled_loss=None):
        """
        x (N, C), weight (padded V, C), targets (N,), loss_weight (N,) -> the loss, and the
        cross-entropy of each row (N,); both in float32. with_gradients must be told: inside this
        function, torch.is_grad_enabled() is always False.
        """
        dtype = matmul_dtype(x)
        rows_at_once = 4096
        if not x.is_cuda:
            rows_at_once = 512 if with_gradients else 128
        x, weight_cast = x.to(dtype), weight.to(dtype)
        token_losses = torch.empty_like(targets, dtype=torch.float32)
        dx = dweight = None
        if with_gradients:
            dx = torch.empty_like(x)
            dweight = torch.zeros_like(weight) if weight.requires_grad else None
        logits = x.new_empty(min(rows_at_once, len(x)), len(weight))  # of all chunks, in turn
        for i in range(0, len(x), rows_at_once):
            rows = slice(i, i + rows_at_once)
            z = torch.mm(x[rows], weight_cast.t(), out=logits[:len(x[rows])])
            z[:, vocab_size:] = -math.inf  # rows of the head that are only padding
            if not with_gradients:
                token_losses[rows] = F.cross_entropy(z.float(), targets[rows], reduction="none")
                continue
            token_losses[rows] = (compiled_loss or softmax_minus_onehot_)(z, targets[rows])
            w_i = loss_weight[rows, None]
            dx[rows] = (z @ weight_cast) * w_i
            if dweight is not None:
                dweight += z.t() @ (x[rows] * w_i).to(dtype)
        if with_gradients:
            ctx.save_for_backward(dx, dweight)
        ctx.mark_non_differentiable(token_losses)
        return (token_losses * loss_weight).sum(), token_losses

    @staticmethod
    def backward(ctx, dloss, _):
        dx, dweight = ctx.saved_tensors
        if dweight is not None:
            dweight = dweight * dloss
        return dx * dloss, dweight, None, None, None, None, None


# --------------------------------------------------------------------------------------------------
# beam search


@torch.no_grad()
def beam_search(step, kv_cache, start, beam, max_new_tokens, stop):
    """
    Continues start (B * beam, 1), `beam` equal rows for each of B captions, like `decode`, but
    keeps the `beam` best continuations of each caption, (B, beam, up to max_new_tokens), best
    first. The best has the highest mean log-probability a token, `stop` counted: the highest sum
    would favour short ones. A finished caption stays in the beam as long as it is among the best.
    """
    first = torch.arange(0, len(start), beam, device=start.device)[:, None]  # (B, 1) rows
    idx, length = start, start.new_zeros(len(start))
    done = torch.zeros_like(length, dtype=torch.bool)
    # The log-probability of each row. All rows of a caption begin alike: only one may be continued.
    total = torch.full(done.shape, -math.inf, device=start.device)
    total[first] = 0.0
    for _ in range(max_new_tokens):
        logp = step(idx[:, -1:])[:, -1].float().log_softmax(-1)  # (B * beam, V)
        # a finished row has one continuation, `stop`, which costs nothing
        logp[done] = -math.inf
        logp[done, stop] = 0.0
        total = total[:, None] + logp
        length = length + ~done
        # each of the best is (row of the caption) * V + token
        mean = (total / length[:, None]).view(len(first), -1)  # (B, beam * V)
        best = mean.topk(beam).indices  # (B, beam)
        parent = (first + best // logp.shape[1]).flatten()
        token = (best % logp.shape[1]).flatten()
        idx = torch.cat([idx[parent], token[:, None]], 1)
        total, length = total[parent, token], length[parent]
        done = done[parent] | (token == stop)
        kv_cache.reorder(parent)
        if done.all():
            break
    return idx[:, 1:].view(len(first), beam, -1)


# --------------------------------------------------------------------------------------------------
# weights from elsewhere


def load_model(name):
    """
    name: gpt2, gpt2-medium, gpt2-large or gpt2-xl, from the hub; a folder as save_pretrained writes
    it; its .safetensors file; or a .pt file of this script. Returns the GPT, its tokenizer ("gpt2",
    or the text of a .tiktoken file), and of a .pt file the whole checkpoint.
    """
    checkpoint = None
    if name.endswith(".pt"):
        checkpoint = load_checkpoint(name)
        if "model_config" not in checkpoint:
            die(f"{name} is not a checkpoint of train_gpt2.py")
        config, state = checkpoint["model_config"], checkpoint["model"]
        tokenizer = checkpoint["tokenizer"]
    else:
        config, state, tokenizer = read_hugging_face(name)
    model = GPT(GPTConfig(**config))
    load_weights(model, state, name)
    return model, tokenizer, checkpoint


def is_conv1d(key, w):
    """Whether Hugging Face stores this weight as (in, out)."""
    return ".h." in key and w.dim() == 2


# What the config.json of a GPT-2 may say beside the sizes, its default first.
GPT2_VALUES = dict(
    model_type=["gpt2"], activation_function=["gelu_new", "gelu_pytorch_tanh"],
    layer_norm_epsilon=[1e-5], scale_attn_weights=[True],
    scale_attn_by_inverse_layer_idx=[False])


def safetensors_files(path):
    """`path` itself, or the files in the folder, where an index may list several."""
    if not os.path.isdir(path):
        return [path]
    names = ["model.safetensors"]
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index) and not os.path.exists(os.path.join(path, *names)):
        names = sorted(set(read_json(index)["weight_map"].values()))
    return [os.path.join(path, name) for name in names]


def read_hugging_face(name):
    """A GPT-2 on the hub, in a folder or in a file -> GPTConfig's arguments, weights, tokenizer."""
    from safetensors.torch import load_file

    if not os.path.exists(name):
        if name not in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
            die(f"{name}: no such file or folder, and not gpt2, gpt2-medium, gpt2-large or gpt2-xl")
        url = f"{hub()}/openai-community/{name}/resolve/main"
        name = os.path.join("pretrained", name)
        for file in ("config.json", "model.safetensors"):
            download(f"{url}/{file}", os.path.join(name, file))
    folder = name if os.path.isdir(name) else os.path.dirname(name)
    with reading(name, "with its config.json a GPT-2 in Hugging Face's layout"):
        theirs = read_json(os.path.join(folder, "config.json"))
        config = {key: theirs[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        config["block_size"] = theirs["n_positions"]
        weights = {}
        for file in safetensors_files(name):
            for key, w in load_file(file).items():
                weights[key.removeprefix("transformer.")] = w
        wte = weights.pop("wte.weight")
    for key, accepted in GPT2_VALUES.items():
        if theirs.get(key, accepted[0]) not in accepted:
            die(f"{name} is not a GPT-2: its config.json says {key}={theirs[key]}")
    if not torch.equal(weights.pop("lm_head.weight", wte), wte):
        die(f"{name} is not a GPT-2: its output matrix is not its embedding (tie_word_embeddings)")
    padded = F.pad(wte, (0, 0, 0, -len(wte) % 128))
    state = {"transformer.wte.weight": padded, "lm_head.weight": padded}
    for key, w in weights.items():
        # old files also hold the causal mask
        if not key.endswith((".attn.bias", ".attn.masked_bias")):
            key = "transformer." + key
            state[key] = w.t() if is_conv1d(key, w) else w
    tokenizer = "gpt2"
    if {"vocab.json", "tokenizer.json"}.intersection(os.listdir(folder or ".")):
        tokenizer = read_vocab(folder)
    return config, state, tokenizer


def write_hugging_face(model, folder, encoding=None):
    """A folder for transformers' GPT2LMHeadModel and, given the tokenizer, its GPT2Tokenizer."""
    from safetensors.torch import save

    c, state = model.config, model.state_dict()
    del state["lm_head.weight"]  # the same matrix as wte
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:c.vocab_size]
    for key, w in state.items():
        state[key] = (w.t() if is_conv1d(key, w) else w).contiguous().cpu()
    eot = encoding.eot_token if encoding else c.vocab_size - 1
    config = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size,
                  n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                  bos_token_id=eot, eos_token_id=eot)
    files = {"config.json": json.dumps(config, indent=1).encode(),
             "model.safetensors": save(state, metadata={"format": "pt"})}
    if encoding:
        files["vocab.json"], files["merges.txt"] = vocab_and_merges(encoding)
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        save_atomically(os.path.join(folder, name), lambda f: f.write(content))


def check_shapes(path, own, given):
    """Ends the run unless the shapes in a file, {name: shape}, are those of `own`."""
    wrong = [f"{key} is missing" for key in own if key not in given]
    wrong += [f"{key} is unknown" for key in given if key not in own]
    for key in own:
        if key in given and tuple(own[key]) != tuple(given[key]):
            wrong.append(f"{key} is {tuple(given[key])} instead of {tuple(own[key])}")
    if wrong:
        die(f"{path} is of another shape: {len(wrong)} tensors, as {'; '.join(wrong[:5])}")


def load_weights(model, state, path):
    check_shapes(path, {key: w.shape for key, w in model.state_dict().items()},
                 {key: w.shape for key, w in state.items()})
    model.load_state_dict(state)


def read_shard_tokenizer(folder):
    """The tokenizer of a folder of shards: the text of its .tiktoken file, or "gpt2"."""
    path = os.path.join(folder, "tokenizer.tiktoken")
    if not os.path.exists(path):
        return "gpt2"
    with open(path, encoding="utf-8") as f:
        return f.read()


def vocab_size_of(tokenizer):
    # GPT-2's is known: its vocabulary may have to be downloaded
    return 50257 if tokenizer == "gpt2" else get_tokenizer(tokenizer).n_vocab


def same_tokenizer(one, other):
    if one == other or vocab_size_of(one) != vocab_size_of(other):
        return one == other
    return get_tokenizer(one)._mergeable_ranks == get_tokenizer(other)._mergeable_ranks


# --------------------------------------------------------------------------------------------------
# data. A shard is one long text of n tokens. Its sequence j is tokens j*T .. (j+1)*T: T inputs and,
# one position later, T targets. The last token of a sequence is the first of the next one.


def open_shard(path):
    """The memory-mapped token ids of a .npy, or of a .bin of llm.c and modded-nanogpt."""
    if path.endswith(".bin"):
        # 256 int32 come first: a magic number, a version, the number of tokens
        header = np.fromfile(path, np.int32, 256)
        n = (os.path.getsize(path) - 1024) // 2
        if list(header[:3]) != [20240520, 1, n]:
            die(f"{path} is no .bin shard (magic number 20240520) or was cut short: copy it again")
        return np.memmap(path, np.uint16, "r", 1024, n)
    with reading(path, "a whole .npy file", "write it again"):
        shard = np.load(path, mmap_mode="r")
    if shard.ndim != 1 or shard.dtype != np.uint16:
        die(f"{path}: a shard is one row of uint16, not {shard.dtype} {shard.shape}")
    return shard


class Loader:
    """
    The sequences of one split's shards, as an endless stream of epochs. Sequence i of the stream is
    a pure function of (seed, i): epoch e is the permutation that the generator of (seed, e) makes.
    So a resume needs no saved state, and any number of processes can share out the same global
    batches. seed=None: the order of the text.
    """

    def __init__(self, folder, split, T, vocab_size, seed=None):
        pattern = os.path.join(glob.escape(folder), f"*{split}*")
        paths = [path for path in sorted(glob.glob(pattern)) if path.endswith((".npy", ".bin"))]
        if not paths:
            die(f"no {split} shards in {folder}: write them with `python fineweb.py data={folder}`")
        self.shards = [open_shard(path) for path in paths]
        self.T, self.vocab_size, self.seed = T, vocab_size, seed
        self.epoch = None  # whose permutation self.order is
        # the target of a shard's last token is in no shard
        n_seqs = [max(0, (len(shard) - 1) // T) for shard in self.shards]
        self.ends = np.cumsum(n_seqs)
        self.n_seq = int(self.ends[-1])
        if self.n_seq == 0:
            die(f"the {split} shards in {folder} are shorter than block_size={T}")

    def sequences(self, numbers):
        """Numbers in the stream (n,) -> token ids (n, T+1)."""
        rows = np.empty((len(numbers), self.T + 1), dtype=np.int64)
        for row, number in zip(rows, numbers):
            epoch, i = divmod(number, self.n_seq)
            if self.seed is not None:
                if epoch != self.epoch:
                    rng = np.random.default_rng((self.seed, epoch))
                    self.epoch, self.order = epoch, rng.permutation(self.n_seq)
                i = self.order[i]
            shard = np.searchsorted(self.ends, i, side="right")
            first = self.ends[shard - 1] if shard else 0  # number of the shard's sequence 0
            start = (i - first) * self.T
            row[:] = self.shards[shard][start:start + self.T + 1]
        if rows.max() >= self.vocab_size:
            die(f"the shards hold token id {rows.max()}, the model has {self.vocab_size} tokens: "
                "they come from another tokenizer")
        return torch.from_numpy(rows)

    def batches(self, all_numbers, device):
        """Yields `sequences(numbers)` for each of all_numbers. A thread reads one ahead."""
        cuda = "cuda" in device

        def read(numbers):
            rows = self.sequences(numbers)
            # from pinned memory, rows travel to the GPU while the CPU goes on
            return rows.pin_memory() if cuda else rows

        with ThreadPoolExecutor(1) as reader:
            following = None
            for numbers in all_numbers:
                current, following = following, reader.submit(read, numbers)
                if current:
                    yield current.result().to(device, non_blocking=cuda)
            if following:
                yield following.result().to(device, non_blocking=cuda)


# --------------------------------------------------------------------------------------------------
# processes


class Process(NamedTuple):
    """Which of the processes this is, and where and how it computes."""
    rank: int
    world_size: int
    device: str
    dtype: torch.dtype  # of matmuls; trained weights are float32

    def autocast(self):
        device_type = torch.device(self.device).type
        return torch.autocast(device_type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def has_bfloat16(device):
    """Whether the hardware multiplies bfloat16. Emulation is up to 80 times slower."""
    if "cuda" in device:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory():
    """
    Linux's malloc gives blocks above 32 MB, such as activations, back to the system at once, and
    each new one costs a page fault every 4 kB. Keeping them makes a CNN 2 to 3 times faster.
    """
    with suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        m_mmap_threshold, m_trim_threshold = -3, -1  # as in malloc.h
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def setup(device, dtype):
    """
    The Process, from the settings device and dtype. Under torchrun there is one for each GPU (nccl)
    or CPU worker (gloo).
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    present = ["cpu"]
    # gloo, which joins processes without CUDA, knows no mps
    if torch.backends.mps.is_available() and world_size == 1:
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    device = device or present[0]
    device_type = device.split(":")[0]
    if device_type not in present:
        die(f"device={device}: this machine has {', '.join(present)}")
    cuda = device_type == "cuda"
    if device == "cuda" and world_size > 1:
        device = f"cuda:{local_rank}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if dtype is None:
        dtype = "bfloat16" if cuda and has_bfloat16(device) else "float32"
        if cuda and dtype == "float32" and rank == 0:
            print("this GPU has no bfloat16: matmuls run in float32")
    elif dtype == "bfloat16" and device_type != "mps" and not has_bfloat16(device) and rank == 0:
        print(f"dtype=bfloat16: this {device_type} only emulates it; float32 is far faster here")
    if world_size > 1 and not dist.is_initialized():
        # an hour: the others wait while one process downloads a model
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1),
                                device_id=torch.device(device) if cuda else None)
        sys.excepthook = report_lost_process
    if device_type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    # cuDNN's attention prepares itself for each new shape: HellaSwag has hundreds and would take
    # many times as long. Where all shapes are equal, attention_backends brings it back.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return Process(rank, world_size, device, getattr(torch, dtype))


def distribute(model, process):
    """The model; if there are several processes, in DDP, which averages the gradients."""
    if process.world_size == 1:
        return model
    # as views of DDP's buckets, gradients need no second copy
    device_ids = [process.device] if "cuda" in process.device else None
    return DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)


def report_lost_process(kind, problem, trace):
    """The excepthook under torchrun: if another process died, that is all that needs saying."""
    text = str(problem)
    if issubclass(kind, RuntimeError) and ("gloo" in text or "NCCL" in text):
        print(f"\nerror: process {os.environ['RANK']} lost another process: look for its message "
              f"above, then go on with init_from=resume ({text.splitlines()[0]})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, problem, trace)


@contextmanager
def local_main_process_first(process):
    """The first process of a machine runs the block, then the others: they find its downloads."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        dist.barrier()
    yield
    if process.world_size > 1 and is_first:
        dist.barrier()


def wait_for_all(process):
    if process.world_size > 1:
        dist.barrier()


def finish(process):
    """Ends all processes together: rank 0 may still be writing."""
    wait_for_all(process)
    if process.world_size > 1:
        dist.destroy_process_group()
    sys.exit(0)


def all_reduce_sum(process, *numbers):
    """The sum of each number over all processes."""
    if process.world_size == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=process.device)
    dist.all_reduce(total)  # gloo has no AVG
    return total.tolist()


def my_sequences(micro_steps, B, process):
    """
    This process's B numbers for `Loader.sequences`, for each micro-step. In a whole step, all
    processes together take the same numbers, however many they are.
    """
    for micro_step in micro_steps:
        first = (micro_step * process.world_size + process.rank) * B
        yield range(first, first + B)


# --------------------------------------------------------------------------------------------------
# torch.compile, for each block by itself: all blocks share one program, which is ready in seconds;
# the whole model takes a minute. Of the loss, only the work on one chunk's logits is compiled: the
# loop over the chunks would be unrolled, and the logits of all chunks kept.


def should_compile(compile, process):
    """The setting `compile`; None means: on CUDA, if Triton, its compiler, is there."""
    if compile is not None or "cuda" not in process.device:
        return bool(compile)
    from torch.utils._triton import has_triton
    if not has_triton() and process.rank == 0:
        print("training is not compiled: there is no Triton for this GPU")
    return has_triton()


def compile_for_training(model):
    for block in model.transformer.h:
        block.compile()
    model.compiled_loss = torch.compile(softmax_minus_onehot_, dynamic=False)


def uncompiled(compiled):
    """
    A context in which compiled blocks run as plain PyTorch: evaluation and samples have many
    shapes, and each would be compiled anew.
    """
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


# --------------------------------------------------------------------------------------------------
# optimizers


def orthogonalize(matrices, dtype):
    """
    Matrices (N, n_out, n_in) -> about the nearest orthogonal ones: in the singular value
    decomposition U S V^T, S is replaced by numbers near 1. No decomposition is needed. An odd
    polynomial p(X) = aX + bXX^TX + cXX^TXX^TX acts on the singular values alone:
    p(U S V^T) = U p(S) V^T. Five times this one, whose slope at 0 is steep, takes every singular
    value between 0.01 and 1 into the range 0.7 to 1.2. That is near enough, and 15 matmuls.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value > 1
    X = X.to(dtype)
    tall = X.shape[1] > X.shape[2]
    if tall:  # XX^T is then the smaller product
        X = X.mT
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """
    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/), for the matrices inside blocks.
    A gradient's momentum is mostly a few strong directions; Muon replaces it by the nearest
    orthogonal matrix, so that every direction of the weights moves equally far. It keeps 4 bytes a
    parameter (AdamW 8) and costs 15 matmuls of the matrix's own size a step: little beside a
    batch of half a million tokens, much beside a small one. The step is scaled to the size of
    AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982): one learning rate serves both.
    All matrices of one shape are orthogonalized in one batched call.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            same_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                # Nesterov's momentum: the average as it will be if the next gradient is like this
                update = p.grad.lerp(average, momentum)
                same_shape.setdefault(p.shape, []).append((p, update))
            for (n_out, n_in), pairs in same_shape.items():
                params, updates = zip(*pairs)
                fast = has_bfloat16(str(params[0].device))
                dtype = torch.bfloat16 if fast else torch.float32
                directions = orthogonalize(torch.stack(updates), dtype).to(params[0].dtype)
                # An orthogonal matrix has entries of size 1 / sqrt(longer side), AdamW's steps
                # have entries of about 0.2.
                scale = 0.2 * max(n_out, n_in) ** 0.5
                for p, direction in zip(params, directions):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.sub_(direction, alpha=lr * scale)


def make_optimizers(model, name, learning_rate, weight_decay, betas=(0.9, 0.95)):
    """
    "adamw": AdamW for all trainable parameters. "muon": Muon for matrices, but not for a GPT's
    embeddings, AdamW for the rest. Matrices decay; biases, norms and gates do not.
    """
    for_muon, decayed, not_decayed = [], [], []
    for key, p in model.named_parameters():
        is_embedding = key.endswith(("wte.weight", "wpe.weight"))
        if not p.requires_grad:
            continue
        elif name == "muon" and p.dim() == 2 and not is_embedding:
            for_muon.append(p)
        elif p.dim() >= 2:
            decayed.append(p)
        else:
            not_decayed.append(p)
    groups = [dict(params=decayed, weight_decay=weight_decay),
              dict(params=not_decayed, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if for_muon:
        optimizers.append(Muon(for_muon, learning_rate, weight_decay))
    held = [p for optimizer in optimizers for group in optimizer.param_groups
            for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trained)), "each belongs to exactly one group"
    return optimizers


def resume_optimizers(optimizers, checkpoint, path):
    """Loads the optimizers' averages. The weight decay and the betas asked for stay."""
    try:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            for group, saved in zip(optimizer.param_groups, state["param_groups"]):
                saved |= {k: group[k] for k in ("weight_decay", "betas") if k in group}
            optimizer.load_state_dict(state)
    except (ValueError, KeyError):
        die(f"{path} is of other optimizers: resume with "
            f"optimizer={checkpoint['settings']['optimizer']}")


def optimizer_step(model, optimizers, lr, grad_clip, step):
    """
    Clips the gradients to a joint norm (grad_clip=0: not at all), steps, and forgets them. Returns
    the norm before clipping; if it is not finite, the run ends before any weight has changed.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    norm = float(nn.utils.clip_grad_norm_(params, grad_clip or math.inf))
    check_finite(step, norm, "the norm of the gradient")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # some groups of paligemma_prompt.py learn faster than others
            group["lr"] = lr * group.get("scale", 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(step, value, what):
    if not math.isfinite(value):
        die(f"step {step}: {what} is {value}. Checkpoints on disk are still good: lower "
            "learning_rate=, or look for broken data")


def get_lr(step, learning_rate, min_lr, warmup_steps, max_steps, schedule="cosine"):
    """
    The learning rate of a step. It rises to learning_rate in a straight line, then falls to min_lr:
    as half a cosine; or, "wsd" (warmup, stable, decay; Hu et al. 2024,
    https://arxiv.org/abs/2404.06395), in a straight line over the last fifth. Before that fifth,
    max_steps can still be raised.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    if schedule == "cosine":
        coeff = 0.5 * (1 + math.cos(math.pi * progress))  # 1 to 0
    else:
        coeff = min(1.0, (1 - progress) / 0.2)
    return min_lr + coeff * (learning_rate - min_lr)


# --------------------------------------------------------------------------------------------------
# checkpoints


def stop_signals():
    """A list that Ctrl-C and SIGTERM add to. The second signal ends the process at once."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signals_end_the_process()
        print("\nstopping after this step", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return asked


def signals_end_the_process():
    """As they do by default: all steps are done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def save_checkpoint(path, checkpoint):
    save_atomically(path, lambda f: torch.save(checkpoint, f))


def save_run(folder, checkpoint, is_best):
    """
    Writes folder/ckpt.pt and, if is_best, folder/best.pt: two names of one file where there are
    hard links. best.pt comes first: a run that is killed between the two resumes from the older
    ckpt.pt, and finds the same best again.
    """
    last, best = os.path.join(folder, "ckpt.pt"), os.path.join(folder, "best.pt")
    if not is_best:
        save_checkpoint(last, checkpoint)
        return
    save_checkpoint(best, checkpoint)
    try:
        os.link(best, last + ".tmp")
    except OSError:  # no hard links here, or a killed run left the name
        shutil.copyfile(best, last + ".tmp")
    os.replace(last + ".tmp", last)


class BackgroundWriter:
    """Writes checkpoints while training goes on: 1.5 GB take a disk some seconds."""

    def __init__(self):
        self.pool, self.saving = ThreadPoolExecutor(1), None

    def submit(self, folder, checkpoint, is_best):
        """save_run of a copy in CPU memory. Raises what the one before raised."""
        self.wait()
        copy = tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), checkpoint)
        self.saving = self.pool.submit(save_run, folder, copy, is_best)

    def wait(self):
        if self.saving:
            self.saving.result()


def run_file(path, prefer="ckpt.pt"):
    """The checkpoint that `path` names: a .pt file, or one in a run's folder."""
    if os.path.isfile(path) or path.endswith(".pt") and not os.path.isdir(path):
        return path
    files = [os.path.join(path, name) for name in (prefer, "ckpt.pt", "best.pt")]
    return next(filter(os.path.exists, files), files[0])


def load_checkpoint(path, mmap=None):
    """Loading runs no code of the file. mmap=True reads tensors only when they are used."""
    if not os.path.exists(path):
        die(f"no checkpoint at {path}")
    with reading(path, "a checkpoint"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def warn_changed(settings, checkpoint, names):
    was = checkpoint["settings"]
    changed = [f"{name}={settings[name]} (was {was[name]})" for name in names.split()
               if name in was and was[name] != settings[name]]
    if changed:
        print("changed since the checkpoint:", ", ".join(changed), flush=True)


# --------------------------------------------------------------------------------------------------
# log and plots


class Log:
    """
    out_dir/log.csv: a row a step. A run that resumes at step `start` drops the rows from there on.
    wandb: what start_wandb returned.
    """

    def __init__(self, path, columns, start, wandb=None):
        self.path, self.columns, self.wandb = path, columns, wandb
        self.rows = [row for row in read_log(path) if row["step"] < start] if start else []
        self.times = []  # when each row of this run was added
        text = io.StringIO(newline="")
        self.writer(text).writeheader()
        self.writer(text).writerows(self.rows)
        save_text(path, text.getvalue())

    def writer(self, file):
        return csv.DictWriter(file, self.columns, extrasaction="ignore")

    def add(self, **row):
        self.rows.append(row)
        self.times.append(time.time())
        try:
            with open(self.path, "a", newline="") as f:
                self.writer(f).writerow(row)
        except OSError as problem:
            die(f"{self.path} could not be written ({problem}): make room, then go on with "
                "init_from=resume")
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def seconds_per_step(self):
        """
        On average, evaluations included. The first step does not count: it may compile. nan after
        it.
        """
        n = len(self.times) - 1
        return (self.times[-1] - self.times[0]) / n if n > 0 else math.nan


def read_log(path):
    """The rows, {column: number or None}."""
    if not os.path.exists(path):
        return []
    rows = []
    with reading(path, "a log", "take the file away"), open(path, encoding="utf-8-sig") as f:
        for texts in csv.DictReader(f):
            # a killed process may leave half a line
            if None not in texts.values():
                row = {k: float(text) if text else None for k, text in texts.items()}
                rows.append(row | {"step": int(texts["step"])})
    return rows


def start_wandb(config):
    """Weights & Biases, with a run begun."""
    try:
        import wandb
    except ImportError:
        die("wandb_log=True needs the library: pip install wandb")
    try:
        wandb.init(project="nanocaption", name=os.path.basename(config["out_dir"]), config=config)
    except wandb.errors.Error as problem:
        die(f"wandb_log=True: {problem}")
    return wandb


def curve(rows, column, scale=1):
    """(steps, values) of the rows that have this column."""
    rows = [row for row in rows if row.get(column) is not None]
    return [row["step"] for row in rows], [scale * row[column] for row in rows]


def pyplot():
    """matplotlib, imported only when something is drawn. Agg draws into files."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot(path, panels, xlabel="step"):
    """panels: {title: {label: (xs, ys)}}, drawn three in a row."""
    plt = pyplot()
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False,
                             layout="constrained")
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, (title, curves) in zip(axes.flat, panels.items()):
        for label, (xs, ys) in curves.items():
            ax.plot(xs, ys, label=label, marker="o" if len(xs) < 12 else None, markersize=3)
        ax.set_title(title)
        ax.set_xlabel(xlabel)
        ax.grid(alpha=0.3)
        if len(curves) > 1:
            ax.legend(fontsize=8)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_curves(path, rows, openai):
    last = rows[-1]["step"]
    losses = {"train": curve(rows, "loss"), "validation": curve(rows, "val_loss")}
    panels = {"loss (nats a token)": losses, "learning rate": {"lr": curve(rows, "lr")}}
    if openai:
        # build-nanogpt's figure, for its validation shard
        losses["OpenAI GPT-2 124M"] = [0, last], [3.2924] * 2
    if curve(rows, "acc")[0]:
        panels["HellaSwag"] = {
            "acc": curve(rows, "acc"), "acc_norm": curve(rows, "acc_norm"),
            "OpenAI GPT-2 124M, acc_norm": ([0, last], [0.2955] * 2)}
    plot(path, panels)


@contextmanager
def going_on(what):
    """Samples and plots are no reason to end a run."""
    try:
        yield
    except Exception as problem:
        print(f"{what} could not be written ({type(problem).__name__}: {problem}): the run goes on",
              flush=True)


# --------------------------------------------------------------------------------------------------
# what is done with the model


def continue_text(model, encoding, text, n, max_new_tokens, temperature, top_k, seed, device):
    """n continuations of a text, as strings."""
    idx = [encoding.eot_token] + encoding.encode_ordinary(text)
    # a text that is too long loses its beginning
    block_size = model.config.block_size
    idx = idx[-max(block_size // 2, block_size - max_new_tokens):]
    max_new_tokens = min(max_new_tokens, block_size - len(idx))
    rows = model.generate(torch.tensor([idx] * n, device=device), max_new_tokens, temperature,
                          top_k, encoding.eot_token, seed, encoding.n_vocab)
    return [encoding.decode([token for token in row if token != encoding.eot_token])
            for row in rows.tolist()]


@torch.no_grad()
def evaluate(model, loader, batch_size, n_tokens, process):
    """
    The mean loss over the first n_tokens, in whole sequences, at least one; and the number of
    tokens. The processes share the work.
    """
    loss = 0.0
    end = min(loader.n_seq, max(1, n_tokens // loader.T))
    starts = range(process.rank * batch_size, end, process.world_size * batch_size)
    numbers = (range(start, min(start + batch_size, end)) for start in starts)
    for rows in loader.batches(numbers, process.device):  # (B, T+1)
        with process.autocast():
            loss += model(rows[:, :-1], rows[:, 1:]).item() * len(rows)
    return all_reduce_sum(process, loss)[0] / end, end * loader.T


def write_samples(folder, step, model, encoding, **sampling):
    # a learned vocabulary may have no words for GPT-2's opening
    opening = "Hello, I'm a language model," if encoding.name == "gpt2" else ""
    texts = continue_text(model, encoding, opening, 4, 32, **sampling)
    path, before = os.path.join(folder, "samples.txt"), ""
    if step and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            # a resumed run may have written the samples of this step before
            before = f.read().split(f"step {step} > ")[0]
    with open(path, "w", encoding="utf-8", errors="replace") as f:
        f.write(before)
        f.writelines(f"step {step} > {text}\n" for text in texts)


def load_hellaswag(n, path, encoding, model, process, eval_only):
    """The first n questions. None: all, if the model has GPT-2's tokens and there is time."""
    if n is None and (encoding.name != "gpt2" or not (eval_only or "cuda" in process.device)):
        n = 0
    if n == 0:
        return []
    with local_main_process_first(process):
        return hellaswag.load_questions(path, encoding, model.config.block_size)[:n]


def ask_hellaswag(model, questions, process):
    with process.autocast():
        return hellaswag.evaluate(model, questions, model.prefill, process.device)


def count_micro_batches(tokens_per_step, B, T, world_size):
    unit = B * T * world_size
    if tokens_per_step % unit:
        nearest = max(1, round(tokens_per_step / unit)) * unit
        die(f"total_batch_size={tokens_per_step} is not a multiple of batch_size x block_size x "
            f"processes = {B} x {T} x {world_size}: the nearest is total_batch_size={nearest}")
    return tokens_per_step // unit


def attention_backends(device):
    """
    The kernels that attention may use in training, best first. On Hopper GPUs and later ones,
    cuDNN's is a little faster than flash attention. `setup` turns cuDNN's off for all else.
    """
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if "cuda" in device and torch.cuda.get_device_capability(device) >= (9, 0):
        backends.insert(0, SDPBackend.CUDNN_ATTENTION)
    return backends


def train_step(model, raw_model, optimizers, batches, grad_accum_steps, lr, grad_clip, process,
               step=0):
    """
    One step on grad_accum_steps micro-batches (B, T+1). model: raw_model, or DDP around it.
    Returns this process's mean loss, and the norm of the gradient.
    """
    loss_sum = torch.zeros((), device=process.device)
    for micro in range(grad_accum_steps):
        rows = next(batches)
        if process.world_size > 1:
            # DDP averages gradients in each backward pass, which only the last one of a step needs.
            # It reads this flag in the forward pass. The official way, the context manager
            # model.no_sync(), would need the body of this loop twice.
            model.require_backward_grad_sync = micro == grad_accum_steps - 1
        with process.autocast(), sdpa_kernel(attention_backends(process.device), set_priority=True):
            # gradients add up over the micro-batches: divided, they become those of the mean
            loss = model(rows[:, :-1], rows[:, 1:]) / grad_accum_steps
        loss.backward()
        loss_sum += loss.detach()
    return loss_sum, optimizer_step(raw_model, optimizers, lr, grad_clip, step)


def peak_rss():
    """The most memory of this process so far, in bytes; nan on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(device):
    """The most memory so far, in bytes: of the GPU, or of this process."""
    return torch.cuda.max_memory_allocated() if "cuda" in device else peak_rss()


# Dense bfloat16 FLOPs a second, from the data sheets. The first name in the GPU's own name counts.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12,
    "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(gpu):
    for name, flops in PEAK_FLOPS.items():
        if name in gpu and "Laptop" not in gpu:
            return flops
    return math.nan


def mfu(model, T, tokens_per_second, world_size=1):
    """
    Model FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B):
    the part of the GPUs' peak that the matmuls use, or nan.
    """
    on_gpu = next(model.parameters()).is_cuda
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else math.nan
    c = model.config
    # each weight of a matmul takes 2 FLOPs forward and 4 backward; wte counts, as the head
    n_matmul = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    per_token = 6 * n_matmul + 12 * c.n_layer * c.n_embd * T  # the second term is attention's
    return tokens_per_second * per_token / (peak * world_size)


def print_start(model, n_tokens, config, shape, compiled, process):
    n_params = sum(p.numel() for p in model.parameters())
    tokens_per_step, max_steps = config["total_batch_size"], config["max_steps"]
    gpu = f" ({torch.cuda.get_device_name()})" if "cuda" in process.device else ""
    print(f"{n_params:,} parameters | {n_tokens:,} training tokens, {tokens_per_step:,} a step = "
          f"{max_steps * tokens_per_step / n_tokens:.1f} epochs | {process.world_size} process(es) "
          f"x {shape} on {process.device}{gpu}, {str(process.dtype).removeprefix('torch.')}, "
          f"{'compiled' if compiled else 'not compiled'}, attention by "
          f"{attention_backends(process.device)[0].name}", flush=True)
    if config["warmup_steps"] >= max_steps:
        print(f"warmup_steps={config['warmup_steps']}: in a run of max_steps={max_steps} the "
              "learning rate only rises")


def print_validation(row, max_steps):
    scores = ""
    if "acc" in row:
        scores = f" | HellaSwag {row['acc']:.4f}, per token {row['acc_norm']:.4f}"
    print(f"step {row['step']:5d}/{max_steps} | validation loss {row['val_loss']:.4f}{scores}",
          flush=True)


def print_step(row, max_steps, seconds_per_step, speed=""):
    """The line of a step, with the time that is left, if it is known. speed: in whatever unit."""
    step = row["step"]
    left = f" | {seconds_per_step * (max_steps - step - 1) / 60:.1f} min left"
    if math.isnan(seconds_per_step):
        left = ""
    aim = f"loss {row['loss']:.4f}"
    if row.get("reward") is not None:  # train_caption.py can train on CIDEr itself
        aim = f"CIDEr of samples {100 * row['reward']:.1f}"
    print(f"step {step:5d}/{max_steps} | {aim} | norm {row['norm']:.2f} | lr {row['lr']:.2e} | "
          f"{row['ms']:.0f} ms{speed}{left}", flush=True)


def starting_point(init_from, out_dir, training, rank):
    """What to load: "scratch", or a name for load_model. A run is never trained over."""
    path = run_file(out_dir)
    has_run = os.path.exists(path)
    if init_from != "resume":
        if training and has_run:
            die(f"{out_dir} holds a run: go on with init_from=resume, or take another out_dir=")
        return init_from
    if has_run or not training:
        return path
    if rank == 0:
        print(f"{out_dir} holds no checkpoint yet: starting at step 0")
    return "scratch"


def preset(typed):
    """
    Samples, an evaluation and an export are of the run in out_dir. A resumed run has the settings
    of its checkpoint. What is typed goes before both.
    """
    settings = {}
    if typed.get("prompt") or typed.get("export") or typed.get("eval_only"):
        settings["init_from"] = "resume"
    path = run_file(typed.get("out_dir", out_dir))
    if (settings | typed).get("init_from") == "resume" and os.path.exists(path):
        checkpoint = load_checkpoint(path, mmap=True)
        was, sizes = checkpoint.get("settings", {}), checkpoint.get("model_config", {})
        names = f"{CURVE_SETTINGS} {OTHER_SETTINGS}".split()
        settings |= {name: was[name] for name in names if name in was}
        for name in SIZES:
            settings[name] = sizes.get(name)
            if typed.get(name, settings[name]) != settings[name]:
                die(f"{path} has {name}={settings[name]} and keeps it: leave {name}= out")
    return settings


# --------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals(), preset)
    process = setup(device, dtype)
    rank, world_size, device, _ = process
    torch.manual_seed(seed)
    if rank == 0:
        print_settings(config)

    # ---- the model: new, this run's own, or another one
    source = starting_point(init_from, out_dir, not (prompt or export or eval_only), rank)
    shard_tokenizer = read_shard_tokenizer(data)
    if source == "scratch":
        if n_embd % n_head:
            die(f"n_embd={n_embd} cannot be divided among n_head={n_head} heads")
        tokenizer, checkpoint = shard_tokenizer, None
        raw_model = GPT(GPTConfig(block_size, vocab_size_of(tokenizer), n_layer, n_head, n_embd))
    else:
        with local_main_process_first(process):
            raw_model, tokenizer, checkpoint = load_model(source)
        config |= {name: getattr(raw_model.config, name) for name in SIZES}
        if vocab_size_of(tokenizer) > raw_model.config.vocab_size:
            die(f"{source} has fewer tokens than its tokenizer: add a vocab.json and merges.txt")
    raw_model.to(device)
    B, T = batch_size, min(block_size, raw_model.config.block_size)
    if T < block_size and rank == 0:
        print(f"{source} has positions for {T} tokens: sequences are {T} long, not {block_size}")

    # ---- only samples, or an export
    sampling = dict(temperature=temperature, top_k=top_k, seed=seed, device=device)
    if prompt and rank == 0:
        encoding = get_tokenizer(tokenizer)
        for text in continue_text(raw_model, encoding, prompt, 4, max_new_tokens, **sampling):
            print(">", text)
    if export and rank == 0:
        raw_model.save_pretrained(export, get_tokenizer(tokenizer))
        print(f"written: {export}/{{config.json,model.safetensors,vocab.json,merges.txt}}")
    if prompt or export:
        finish(process)

    # ---- the validation split and HellaSwag; an evaluation alone
    val = Loader(data, "val", T, raw_model.config.vocab_size)
    if not same_tokenizer(tokenizer, shard_tokenizer):
        die(f"the shards in {data} were written with another tokenizer than {source} has")
    encoding = get_tokenizer(tokenizer)
    if eval_only:
        # before the questions, which may have to be downloaded
        loss, n_tokens = evaluate(raw_model, val, B, eval_tokens, process)
        if rank == 0:
            print(f"{init_from}: validation loss {loss:.4f} over {n_tokens:,} tokens", flush=True)
    questions = load_hellaswag(hellaswag_questions, hellaswag_file, encoding, raw_model, process,
                               eval_only)
    if eval_only:
        if questions:
            acc, acc_norm = ask_hellaswag(raw_model, questions, process)
        if questions and rank == 0:
            print(f"HellaSwag, {len(questions):,} questions: acc {acc:.4f}, acc_norm {acc_norm:.4f}"
                  "   (published: gpt2 0.2859, 0.2955; gpt2-xl 0.3842, 0.4893)")
        finish(process)

    # ---- the training run
    grad_accum_steps = count_micro_batches(total_batch_size, B, T, world_size)
    train = Loader(data, "train", T, raw_model.config.vocab_size, seed)
    optimizers = make_optimizers(raw_model, optimizer, learning_rate, weight_decay)
    step, best = 0, math.inf
    if init_from == "resume" and checkpoint:
        resume_optimizers(optimizers, checkpoint, source)
        step, best = checkpoint["step"], checkpoint["best"]
        changed = [k for k in VALIDATION_SETTINGS if config[k] != checkpoint["settings"][k]]
        if changed and step < max_steps:
            best = math.inf  # of other text
        if rank == 0:
            warn_changed(config, checkpoint, CURVE_SETTINGS)
    first_step = step
    checkpoint = None  # a second copy would only take memory
    if all_reduce_sum(process, step)[0] != step * world_size:
        die(f"not every process found the same {source}: all machines must share out_dir=")
    compiled = should_compile(compile, process)
    if compiled:
        compile_for_training(raw_model)
    # `model` trains. raw_model has the same weights, and is what evaluates, samples and is saved.
    model = distribute(raw_model, process)
    if rank == 0:
        lock_folder(out_dir)
        log = Log(os.path.join(out_dir, "log.csv"),
                  ["step", "loss", "val_loss", "acc", "acc_norm", "lr", "norm", "ms"], step,
                  start_wandb(config) if wandb_log else None)
        print_start(raw_model, train.n_seq * T, config, f"{grad_accum_steps} x {B} x {T}",
                    compiled, process)

    micro_steps = range(step * grad_accum_steps, max_steps * grad_accum_steps)
    batches = train.batches(my_sequences(micro_steps, B, process), device)
    asked_to_stop, stop, writer = stop_signals(), 0, BackgroundWriter()
    while True:
        # evaluate; then save, before anything that may fail; then sample
        row = dict(step=step)
        if (step % eval_interval == 0 or step >= max_steps) and not stop:
            with uncompiled(compiled):
                row["val_loss"], _ = evaluate(raw_model, val, B, eval_tokens, process)
                if questions:
                    row["acc"], row["acc_norm"] = ask_hellaswag(raw_model, questions, process)
            check_finite(step, row["val_loss"], "the validation loss")
        # also where a resumed run begins: a stop came before its evaluation
        is_best = step > 0 and row.get("val_loss", math.inf) < best
        if rank == 0 and (is_best or step > first_step and ("val_loss" in row or stop)):
            best = min(best, row.get("val_loss", math.inf))
            writer.submit(out_dir, dict(
                model=raw_model.state_dict(), step=step, best=best, settings=config,
                optimizers=[opt.state_dict() for opt in optimizers],
                model_config=asdict(raw_model.config), tokenizer=tokenizer), is_best)
        if rank == 0 and "val_loss" in row:
            print_validation(row, max_steps)
            with going_on("samples.txt"), uncompiled(compiled):
                write_samples(out_dir, step, raw_model, encoding, **sampling)
        if step >= max_steps or stop:
            break

        # one step
        t0 = time.time()
        lr = get_lr(step, learning_rate, min_lr, warmup_steps, max_steps, schedule)
        loss, norm = train_step(model, raw_model, optimizers, batches, grad_accum_steps, lr,
                                grad_clip, process, step)
        # all processes stop after the same step
        loss, stop = all_reduce_sum(process, float(loss) / world_size, len(asked_to_stop))
        ms = (time.time() - t0) * 1000
        if rank == 0:
            row |= dict(loss=loss, lr=lr, norm=norm, ms=ms)
            log.add(**row)
            if step % log_interval == 0 or step == max_steps - 1:
                speed = total_batch_size / ms * 1000
                used = mfu(raw_model, T, speed, world_size)
                print_step(row, max_steps, log.seconds_per_step(), f" | {speed:,.0f} tok/s"
                           + f" | MFU {used:.1%}" * (used > 0))
            if step == first_step:
                print(f"memory after the first step: {peak_memory(device) / 1e9:.2f} GB at most")
        step += 1

    # ---- what came of it
    writer.wait()
    if rank == 0:
        if not stop:
            log.add(**row)
            on_fineweb = tokenizer == "gpt2" and os.path.basename(data).startswith("edu_fineweb")
            with going_on("curves.png"):
                draw_curves(os.path.join(out_dir, "curves.png"), log.rows, on_fineweb)
        done = f"done: {out_dir}/{{ckpt.pt,best.pt,log.csv,curves.png,samples.txt}}"
        print(f"stopped at step {step}; go on with init_from=resume" if stop else done)
    finish(process)
