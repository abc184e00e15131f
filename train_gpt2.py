"""
The writer: GPT-2, and the loop that teaches it to continue text.

    python train_gpt2.py data=notes n_layer=4 n_head=4 n_embd=128 batch_size=8 total_batch_size=8192 max_steps=300   # a CPU, minutes
    python train_gpt2.py batch_size=64                           # one GPU with 80 GB
    torchrun --standalone --nproc_per_node=8 train_gpt2.py batch_size=64   # eight GPUs
    python train_gpt2.py prompt="Hello, I'm a language model,"   # what the trained model in out_dir says
    python train_gpt2.py init_from=gpt2 eval_only=True           # OpenAI's weights: our validation shard, and HellaSwag
    python train_gpt2.py init_from=out/gpt2/best.pt export=mine  # a folder that `transformers` loads

The defaults are the published recipe: 124M parameters, 524,288 tokens a step, 19,073 steps = 10B tokens of FineWeb-Edu.
The loss starts at ln 50257 = 10.82, falls under 4 within the first thousand steps, and ends near 3.1, beside OpenAI's GPT-2.
Data order is a pure function of (seed, step): the same global batches for any number of processes and after any resume.
Stopped in any way (Ctrl-C and SIGTERM save first), it goes on with init_from=resume as if nothing had happened.
Writes out_dir/{ckpt.pt, ckpt_previous.pt, best.pt, log.csv, curves.png, samples.txt}.
"""
import csv
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import hellaswag
from fineweb import configure, die, download, get_tokenizer, hub, save_atomically, print_settings, vocab_and_merges

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python train_gpt2.py name=value` overrides any of them

data = "edu_fineweb10B"     # folder of token shards, written by fineweb.py
out_dir = "out/gpt2"        # where checkpoint, log and plot go
init_from = "scratch"       # scratch | resume (out_dir/ckpt.pt) | gpt2, gpt2-medium, -large, -xl | a folder, .safetensors or ckpt.pt
eval_only = False           # evaluate what init_from names, then stop
prompt: str = None          # continue this text instead of training: four times, max_new_tokens each
export: str = None          # write the model for `transformers` into this folder, then stop
n_layer = 12                # >= 1: 12 layers, 12 heads, 768 wide: GPT-2 124M
n_head = 12                 # >= 1
n_embd = 768                # >= 1
block_size = 1024           # >= 1: longest sequence, T
batch_size = 8              # >= 1: sequences a process works on at once, B: as many as fit
total_batch_size = 524_288  # >= 1: tokens a step, 2**19: about 0.5M as in the GPT-3 paper; gradients accumulate up to it
optimizer = "adamw"         # one of adamw | muon: adamw, or muon for the matrices inside the blocks
learning_rate = 6e-4        # > 0: the peak
min_lr = 6e-5               # >= 0: where the schedule ends
warmup_steps = 715          # >= 0: GPT-3 warms up over 375M tokens
max_steps = 19_073          # >= 1: 10B tokens / 524,288
schedule = "cosine"         # one of cosine | wsd: cosine, or wsd: constant until the last fifth, then straight down
weight_decay = 0.1          # >= 0
grad_clip = 1.0             # >= 0
eval_interval = 250         # >= 1: steps between evaluations, each followed by a checkpoint
eval_tokens = 10_485_760    # >= 1: validation tokens of one evaluation, at most
exam: int = None            # >= 0: HellaSwag questions asked at each evaluation; None = all 10,042 on CUDA or with eval_only, else none
exam_file = "data/hellaswag_val.jsonl" # where they are; fetched if they are not there
max_new_tokens = 64         # >= 1: of a sample
temperature = 1.0           # >= 0: of samples; 0 = always the likeliest token
top_k = 50                  # >= 1: samples choose among so many likeliest tokens
log_interval = 1            # >= 1: steps between printed lines
seed = 1337                 # >= 0
device: str = None          # cuda, cpu, mps; None takes the best there is
dtype: str = None           # one of bfloat16 | float32: of the matmuls; None = bfloat16 on CUDA
compile: bool = None        # torch.compile the training step; None = on CUDA
wandb_log = False           # mirror the log to Weights & Biases

# ----------------------------------------------------------------------------------------------------------------------
# the model. B batch, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size; S = cached + new tokens


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


def matmul_dtype(x):
    """What matmuls with x come out in: autocast's type where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class KVCache:
    """Keys and values of the tokens seen so far, for every block, so that a new token costs one token's work."""

    def __init__(self, config, B, length, like):
        D = config.n_embd // config.n_head
        self.kv = like.new_empty(config.n_layer, 2, B, config.n_head, length, D, dtype=matmul_dtype(like))
        # the position of the next token; GPT.hidden moves it once all blocks have added theirs
        self.pos = 0

    def update(self, layer, k, v):
        """k, v: (B, H, T, D) of the new tokens. Returns those of all tokens, (B, H, S, D)."""
        S = self.pos + k.shape[2]
        self.kv[layer, 0, :, :, self.pos:S] = k
        self.kv[layer, 1, :, :, self.pos:S] = v
        return self.kv[layer, 0, :, :, :S], self.kv[layer, 1, :, :, :S]

    def reorder(self, rows):
        """
        Row i of the batch becomes what rows[i] was (rows: a long tensor of any length). A row that
        is named several times can be continued in several ways.
        """
        self.kv = self.kv[:, :, rows]


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, kv_cache=None, layer=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        past = kv_cache.pos if kv_cache else 0
        if kv_cache:
            k, v = kv_cache.update(layer, k, v)  # (B, H, S, D), S = past + T
        # the t-th new token sits at position past + t and may look at itself and everything before; is_causal would align t with 0
        seen = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if past and T > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=past == 0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, n_embd):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # the approximation is GPT-2's: exact GELU would not be it


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


class FusedLinearCrossEntropy(torch.autograd.Function):
    """
    The cross-entropy of the logits x W^T, without ever holding them all: 64 sequences of 1,024 tokens have 13 GB of fp32
    logits, and as much again of gradients. So it takes a few thousand positions at a time and, while their logits are there,
    also turns them into what the backward pass will want, the gradients of x and W. No matmul is done twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, share, vocab_size, with_gradients):
        """
        x (N, C), weight (V padded, C), targets (N,), share (N,), how much each counts -> their weighted sum, a scalar with gradients, and
        each one's nats (N,), without; both in fp32.
        """
        n, dtype = len(x), matmul_dtype(x)
        chunk = min(n, 4096 if x.is_cuda else 512 if with_gradients else 128)
        x, w, nats = x.to(dtype), weight.to(dtype), torch.empty_like(targets, dtype=torch.float32)
        dx = torch.empty_like(x) if with_gradients else None
        dw = torch.zeros_like(weight) if with_gradients and weight.requires_grad else None
        # All chunks are written into the same memory: fresh memory takes a CPU longer to come by than what goes there takes to compute.
        logits = x.new_empty(chunk, len(w))
        logp = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
        for i in range(0, n, chunk):
            xi, target = x[i:i + chunk], targets[i:i + chunk, None]
            z = torch.mm(xi, w.t(), out=logits[:len(xi)])
            z[:, vocab_size:] = -math.inf  # the padding of the vocabulary must not enter the softmax
            p = z if logp is logits else logp[:len(xi)].copy_(z)
            torch.log_softmax(p, 1, out=p)
            nats[i:i + chunk] = -p.gather(1, target)[:, 0]
            if with_gradients:  # d nats / d logits = softmax - one-hot
                p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
                z.copy_(p)
                counts = share[i:i + chunk, None]
                dx[i:i + chunk] = (z @ w) * counts
                if dw is not None:
                    dw += z.t() @ (xi * counts).to(dtype)
        if with_gradients:
            ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(nats)
        return (nats * share).sum(), nats

    @staticmethod
    def backward(ctx, dloss, _):
        dx, dw = ctx.saved_tensors
        return dx * dloss, dw if dw is None else dw * dloss, None, None, None, None


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with Hugging Face's parameter names; matrices are (out, in), theirs (in, out)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        padded = config.vocab_size + -config.vocab_size % 128  # 50257 is an ugly number; 50304 = 393 * 128 suits the matmul kernels
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, padded, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one matrix reads tokens and writes them
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # each block adds twice to the residual stream: 1/sqrt(2 n_layer) keeps its variance at the end near 1
                nn.init.normal_(p, std=0.02 * (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 0.02)

    def embed(self, idx, start=0):
        """Token ids (B, T), the first of them at position `start` -> (B, T, C)."""
        T = idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size={self.config.block_size}")
        return self.transformer.wte(idx) + self.transformer.wpe(torch.arange(start, start + T, device=idx.device))

    def head(self, x):
        """(B, T, C) -> logits (B, T, V). The padding of the vocabulary is cut off: it must not enter a softmax."""
        return self.lm_head(self.transformer.ln_f(x))[..., :self.config.vocab_size]

    def cross_entropy(self, x, targets, share=None):
        """(N, C), targets (N,) -> their cross-entropy in nats: its sum weighted by `share` (N,), None = the mean; and each one's."""
        share = torch.full_like(targets, 1 / len(targets), dtype=torch.float32) if share is None else share
        return FusedLinearCrossEntropy.apply(self.transformer.ln_f(x), self.lm_head.weight, targets, share, self.config.vocab_size, torch.is_grad_enabled())

    def hidden(self, idx, kv_cache=None):
        """idx (B, T) -> (B, T, C), what the head turns into logits."""
        x = self.embed(idx, kv_cache.pos if kv_cache else 0)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, kv_cache, layer)
        if kv_cache:
            kv_cache.pos += idx.shape[1]
        return x

    def forward(self, idx, targets=None, kv_cache=None):
        """idx (B, T) -> logits (B, T, V), or, given targets (B, T), their mean cross-entropy in nats a token."""
        x = self.hidden(idx, kv_cache)
        if targets is None:
            return self.head(x)
        return self.cross_entropy(x.flatten(0, 1), targets.flatten())[0]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, seed=None):
        """Continues each row of idx (B, T) by up to max_new_tokens tokens; the same `seed`, the same tokens; see `decode`."""
        kv_cache = KVCache(self.config, len(idx), idx.shape[1] + max_new_tokens - 1, self.lm_head.weight)  # the last token is never read
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        # where the prompt is long, only its last position needs logits
        return decode(lambda new: self.head(self.hidden(new, kv_cache)[:, -1:]), idx, max_new_tokens, temperature, top_k, stop, generator)

    def prefill(self, contexts, room):
        """
        Computes contexts (B, T) once, for `hellaswag.predict`. Returns a function that continues
        each of them with four rows: (rows, targets (4B, up to room)) -> the loss of every target
        that is not -1, (n,).
        """
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
        """`name`: gpt2, gpt2-medium, gpt2-large, gpt2-xl; a folder as `save_pretrained` writes it; a .safetensors file; or our ckpt.pt."""
        if name.endswith(".pt"):
            checkpoint = load_checkpoint(name)
            if "model_config" not in checkpoint:
                die(f"{name} is not a checkpoint of train_gpt2.py")
            config, state = checkpoint["model_config"], checkpoint["model"]
        else:
            config, state = read_hugging_face(name)
        model = cls(GPTConfig(**config))
        load_weights(model, state, name)
        return model

    def save_pretrained(self, folder, encoding=None):
        """
        Writes model.safetensors and config.json as `transformers.GPT2LMHeadModel.from_pretrained(folder)` reads them, and, given the
        tokenizer, vocab.json and merges.txt as `transformers.GPT2Tokenizer.from_pretrained(folder)` does.
        """
        from safetensors.torch import save

        c, state = self.config, self.state_dict()
        del state["lm_head.weight"]  # tied
        state["transformer.wte.weight"] = state["transformer.wte.weight"][:c.vocab_size]
        state = {key: (w.t() if is_conv1d(key, w) else w).contiguous().cpu() for key, w in state.items()}
        config = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size, n_positions=c.block_size,
                      n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1)
        files = {"config.json": json.dumps(config, indent=1).encode(), "model.safetensors": save(state, metadata={"format": "pt"})}
        if encoding:
            files["vocab.json"], files["merges.txt"] = vocab_and_merges(encoding)
        os.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            save_atomically(os.path.join(folder, name), lambda f: f.write(content))


def is_conv1d(key, w):
    """Whether Hugging Face stores this weight transposed, (in, out): the matrices of the blocks."""
    return ".h." in key and w.dim() == 2


def read_hugging_face(name):
    """The sizes, as GPTConfig's arguments, and the weights, under our names, of a GPT-2 on the hub, in a folder or in a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.exists(name):
        if name not in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
            die(f"{name}: no such file or folder, and not one of OpenAI's gpt2, gpt2-medium, gpt2-large, gpt2-xl")
        folder = os.path.join("pretrained", name)
        for file in ("config.json", "model.safetensors"):
            download(f"{hub()}/openai-community/{name}/resolve/main/{file}", os.path.join(folder, file))
        name = folder
    file = os.path.join(name, "model.safetensors") if os.path.isdir(name) else name
    try:
        with open(os.path.join(os.path.dirname(file), "config.json")) as f:
            theirs = json.load(f)
        config = dict(block_size=theirs["n_positions"], **{k: theirs[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd")})
        weights = {"transformer." + key.removeprefix("transformer."): w for key, w in load_file(file).items()}
        wte = weights["transformer.wte.weight"]
    except (OSError, KeyError, ValueError, SafetensorError) as problem:
        die(f"{file} with the config.json beside it is not a GPT-2 in Hugging Face's layout ({type(problem).__name__}: {problem})")
    weights["transformer.wte.weight"] = wte = F.pad(wte, (0, 0, 0, -len(wte) % 128))
    skip = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # old files hold the causal mask, and the tied matrix twice
    state = {key: w.t() if is_conv1d(key, w) else w for key, w in weights.items() if not key.endswith(skip)}
    return config, state | {"lm_head.weight": wte}


def decode(step, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, generator=None):
    """
    Grows idx (B, T) token by token. `step(new ids) -> logits` keeps its own cache, so each token is computed once.
    temperature 0 is greedy; top_k keeps the k likeliest tokens. A row that has produced `stop` goes on with `stop`,
    and when every row has, decoding ends.
    """
    new, done = idx, torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        logits = step(new)[:, -1].float()  # (B, V)
        if temperature == 0:
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


@torch.no_grad()
def beam_search(step, kv_cache, start, beam, max_new_tokens, stop):
    """
    Grows start (B * beam, 1), `beam` rows for each of B captions, like `decode`, but keeps the `beam` best beginnings of each. Returns
    them, best first: (B, beam, up to max_new_tokens). Best has the highest mean log-probability a token, EOS counted: of sums, the
    shortest would win. What has ended keeps its place for as long as it is among the best.
    """
    first = torch.arange(0, len(start), beam, device=start.device)[:, None]  # (B, 1) the first row of each caption
    idx, length = start, start.new_zeros(len(start))
    done = torch.zeros_like(length, dtype=torch.bool)
    total = torch.full(done.shape, -math.inf, device=start.device)  # log-probability of each row
    total[first] = 0.0  # all rows of a caption begin alike: one of them is enough
    for _ in range(max_new_tokens):
        logp = step(idx[:, -1:])[:, -1].float().log_softmax(-1)  # (B * beam, V)
        logp[done] = -math.inf
        logp[done, stop] = 0.0  # the one way to go on from an end, which costs nothing
        total, length = total[:, None] + logp, length + ~done
        best = (total / length[:, None]).view(len(first), -1).topk(beam).indices  # (B, beam), each a row of the caption * V + a token
        parent = (first + best // logp.shape[1]).flatten()
        token = (best % logp.shape[1]).flatten()
        idx = torch.cat([idx[parent], token[:, None]], 1)
        total, length, done = total[parent, token], length[parent], done[parent] | (token == stop)
        kv_cache.kv[..., :kv_cache.pos, :] = kv_cache.kv[:, :, parent, :, :kv_cache.pos]  # each row takes over its parent's keys and values
        if done.all():
            break
    return idx[:, 1:].view(len(first), beam, -1)


# ----------------------------------------------------------------------------------------------------------------------
# data: shards are one long text; sequence j of a shard is tokens j*T .. j*T+T, whose last is the first of sequence j+1


def open_shard(path):
    """The token ids of a shard, memory-mapped: only what a batch touches is read. A .npy, or a .bin as llm.c and modded-nanogpt write it."""
    if path.endswith(".bin"):  # 256 int32: magic number, version, how many tokens follow
        header = np.fromfile(path, np.int32, 256)
        if len(header) < 256 or (header[0], header[1]) != (20240520, 1):
            die(f"{path} does not begin as a .bin shard of GPT-2 tokens does (20240520, 1): write it again, or use fineweb.py's shards")
        n = (os.path.getsize(path) - 1024) // 2
        if n != header[2]:
            die(f"{path} holds {n:,} tokens and should hold {header[2]:,}: it was cut short, copy it again")
        return np.memmap(path, np.uint16, "r", 1024, n)
    try:
        shard = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as problem:
        die(f"{path} is not a whole .npy file ({problem}): write it again")
    if shard.ndim != 1 or shard.dtype != np.uint16:
        die(f"{path} holds {shard.dtype} of shape {shard.shape}, and a shard is one row of uint16 token ids: write it with fineweb.py")
    return shard


class Loader:
    """Global batches of `n_seq` sequences of T tokens from the shards of one split, shuffled anew each epoch."""

    def __init__(self, folder, split, T, vocab_size, seed=None):
        paths = sorted(path for path in glob.glob(os.path.join(folder, f"*{split}*")) if path.endswith((".npy", ".bin")))
        if not paths:
            die(f"no {split} shards (*{split}*.npy or .bin) in {folder}: write them with `python fineweb.py data={folder}`")
        self.shards = [open_shard(path) for path in paths]
        self.T, self.vocab_size, self.seed, self.epoch = T, vocab_size, seed, None
        counts = [max(0, (len(shard) - 1) // T) for shard in self.shards]  # the target of a shard's last token is in no shard
        self.ends = np.cumsum(counts)
        self.n_seq = int(self.ends[-1])
        if self.n_seq == 0:
            die(f"the {split} shards in {folder} hold less than one sequence of block_size={T} tokens")

    def sequences(self, numbers):
        """numbers: positions in the endless stream of epochs. Returns (n, T+1) token ids."""
        rows = np.empty((len(numbers), self.T + 1), dtype=np.int64)
        for row, number in zip(rows, numbers):
            epoch, i = divmod(int(number), self.n_seq)
            if self.seed is not None:  # None: in the order of the text, for validation
                if epoch != self.epoch:
                    self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n_seq)
                i = int(self.order[i])
            shard = int(np.searchsorted(self.ends, i, side="right"))
            start = (i - (int(self.ends[shard - 1]) if shard else 0)) * self.T
            row[:] = self.shards[shard][start:start + self.T + 1]
        if rows.max() >= self.vocab_size:
            die(f"the shards hold token id {rows.max()}, the model's last is {self.vocab_size - 1}: they come from another tokenizer")
        return torch.from_numpy(rows)

    def batches(self, wanted, device):
        """Yields `sequences(numbers)`, on the device, for each of `wanted`. While one is computed with, the next is read and pinned."""
        def read(numbers):
            rows = self.sequences(numbers)
            return rows.pin_memory() if "cuda" in device else rows  # what is pinned travels while the CPU goes on

        with ThreadPoolExecutor(1) as reader:
            wanted = iter(wanted)
            coming = [reader.submit(read, numbers) for numbers in islice(wanted, 1)]
            while coming:
                rows = coming.pop().result()
                coming += [reader.submit(read, numbers) for numbers in islice(wanted, 1)]
                yield rows.to(device, non_blocking="cuda" in device)


# ----------------------------------------------------------------------------------------------------------------------
# what every training loop needs


class Process(NamedTuple):
    """Where this process stands among those that train together, and how it computes."""
    rank: int
    world_size: int
    device: str
    dtype: torch.dtype  # of matmuls: bfloat16 or float32. Trained weights are float32 in both

    def autocast(self):
        """`with process.autocast():` runs matmuls in `dtype`."""
        device_type = self.device.split(":")[0]
        return torch.autocast(device_type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def has_bfloat16(device):
    """Whether the hardware multiplies bfloat16; what lacks it emulates it, up to 80 times slower."""
    if "cuda" in device:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def setup(device, dtype):
    """
    Under torchrun, one process a GPU (nccl) or a CPU worker (gloo); else one process on the best
    device there is. device, dtype: settings of the same names. Returns a Process.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # gloo, which joins processes without CUDA, knows no mps
    present = {"cuda": torch.cuda.is_available(),
               "mps": torch.backends.mps.is_available() and world_size == 1,
               "cpu": True}
    device = device or next(name for name in present if present[name])
    device_type = device.split(":")[0]
    if not present.get(device_type):
        here = [name for name in present if present[name]]
        die(f"device={device}: this machine has {', '.join(here)}")
    if device == "cuda" and world_size > 1:
        device = f"cuda:{local_rank}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if dtype is None:
        dtype = "bfloat16" if device_type == "cuda" and has_bfloat16(device) else "float32"
    if dtype == "bfloat16" and device_type != "mps" and not has_bfloat16(device) and rank == 0:
        print(f"dtype=bfloat16: this {device_type} only emulates it; dtype=float32 is far faster here")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    return Process(rank, world_size, device, getattr(torch, dtype))


@contextmanager
def local_main_process_first(process):
    """What is done inside, one process of each machine does before the others: they find its downloads finished."""
    others = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if others:
        dist.barrier()
    yield
    if process.world_size > 1 and not others:
        dist.barrier()


def finish(process):
    """The end of a run of several processes: rank 0 may still be writing, and who leaves early takes the others down."""
    if process.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(0)


def all_reduce_sum(process, *numbers):
    """The sums of some numbers over all processes, as floats."""
    if process.world_size == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=process.device)
    dist.all_reduce(total)  # gloo has no AVG
    return total.tolist()


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
            lr, momentum, same_shape = group["lr"], group["momentum"], {}
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
                device = updates[0].device
                dtype = torch.bfloat16 if has_bfloat16(str(device)) else torch.float32
                directions = orthogonalize(torch.stack(updates), dtype).to(params[0].dtype)
                rms = 0.2 * max(n_out, n_in) ** 0.5  # an orthogonal matrix's entries are this small
                for p, direction in zip(params, directions):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.sub_(direction, alpha=lr * rms)


def make_optimizers(model, name, learning_rate, weight_decay, betas=(0.9, 0.95)):
    """
    The optimizers that together hold every trainable parameter once. "adamw": AdamW for all.
    "muon": Muon for the matrices inside blocks, AdamW for the rest. Matrices decay; biases, norms
    and gates, which have no direction to shrink in, do not.
    """
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    muon_names = []
    if name == "muon":
        muon_names = [k for k, p in params.items()
                      if p.dim() == 2 and not k.endswith(("wte.weight", "wpe.weight"))]
    adamw_params = [p for k, p in params.items() if k not in muon_names]
    groups = [dict(params=[p for p in adamw_params if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in adamw_params if p.dim() < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if muon_names:
        optimizers.append(Muon([params[k] for k in muon_names], learning_rate, weight_decay))
    held = [p for optimizer in optimizers for group in optimizer.param_groups
            for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, params.values())), \
        "every trainable parameter belongs to exactly one group"
    return optimizers


def resume_optimizers(optimizers, checkpoint, path):
    try:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            asked = [group["weight_decay"] for group in optimizer.param_groups]  # load_state_dict would bring back the old one
            optimizer.load_state_dict(state)
            for group, weight_decay in zip(optimizer.param_groups, asked):
                group["weight_decay"] = weight_decay
    except (ValueError, KeyError):
        die(f"{path} was written with other optimizer settings (optimizer={checkpoint['settings']['optimizer']}): resume with the same")


def optimizer_step(model, optimizers, lr, grad_clip, step):
    """
    Clips the gradients of the trainable parameters to a joint norm (grad_clip=0: not at all),
    steps, and forgets them. Returns the norm before clipping. A norm that is not finite ends the
    run before any weight has changed.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    norm = float(nn.utils.clip_grad_norm_(params, grad_clip or math.inf))
    check_finite(step, norm, "the norm of the gradient")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(step, value, what):
    if not math.isfinite(value):
        die(f"step {step}: {what} is {value}. Nothing was changed or saved: the checkpoint on disk is "
            "the last good one. Lower learning_rate=, or look for broken data")


def get_lr(step, learning_rate, min_lr, warmup_steps, max_steps, schedule="cosine"):
    """
    Linear warm-up to learning_rate, then down to min_lr: half a cosine, or "wsd" (warm-up, stable, decay; Hu et al. 2024,
    https://arxiv.org/abs/2404.06395), which needs to know the end only when it begins to fall: until then a run can be made longer.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else min(1.0, (1 - progress) / 0.2)
    return min_lr + falling * (learning_rate - min_lr)


def stop_signals():
    """A list that gets an entry when Ctrl-C or SIGTERM asks to stop: the loop then saves and leaves. Asked again, the process dies."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this step", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return asked


def keep_as(path, other):
    """Gives a file a second name: a hard link, which costs nothing, or a copy where the file system has none."""
    if os.path.exists(other) and os.path.samefile(path, other):
        return
    with suppress(FileNotFoundError):
        os.remove(other + ".tmp")
    try:
        os.link(path, other + ".tmp")
    except OSError:
        shutil.copyfile(path, other + ".tmp")
    os.replace(other + ".tmp", other)


def previous(path):
    return path.removesuffix(".pt") + "_previous.pt"


def save_checkpoint(path, checkpoint):
    """Writes the dict to `path`, whole or not at all; what was there before stays as {path}_previous.pt."""
    if os.path.exists(path):
        keep_as(path, previous(path))
    save_atomically(path, lambda f: torch.save(checkpoint, f))


def load_checkpoint(path, device="cpu"):
    """A checkpoint is a dict of tensors, numbers and strings: loading one runs no code of its author."""
    instead = "take another one or start from scratch"
    if os.path.exists(previous(path)):
        instead = f"rename the one before it, {previous(path)}, and go on with that"
    if not os.path.exists(path):
        die(f"no checkpoint at {path}: {instead}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as problem:  # zip, pickle and torch each have their own way to say it
        die(f"{path} is not a checkpoint, or was cut short ({type(problem).__name__}): {instead}")


def warn_changed(settings, checkpoint, names):
    """Prints which of these settings are not what they were when the checkpoint was written."""
    was = checkpoint["settings"]
    changed = [f"{name}={settings[name]} (was {was[name]})" for name in names.split() if name in was and was[name] != settings[name]]
    if changed:
        print("changed since the checkpoint, so that the run will not be what it would have been:", ", ".join(changed), flush=True)


def load_weights(model, state, path):
    """load_state_dict with one line for what does not fit."""
    own, given = ({key: tuple(w.shape) for key, w in weights.items()} for weights in (model.state_dict(), state))
    wrong = [f"{key}: {given.get(key, 'absent')}, not {own.get(key, 'wanted')}" for key in own | given if own.get(key) != given.get(key)]
    if wrong:
        die(f"{path} is of another shape than this model, {len(wrong)} of {len(own)} tensors, such as {wrong[0]}")
    model.load_state_dict(state)


class Log:
    """out_dir/log.csv: a row a step; a resumed run first drops the rows from its first step on."""

    def __init__(self, path, columns, start):
        self.path, self.columns = path, columns
        self.rows = [row for row in read_log(path) if row["step"] < start] if start else []
        text = io.StringIO(newline="")
        csv.DictWriter(text, columns).writeheader()
        csv.DictWriter(text, columns).writerows(self.rows)
        save_atomically(path, lambda f: f.write(text.getvalue().encode()))

    def add(self, **row):
        self.rows.append(row)
        try:
            with open(self.path, "a", newline="") as f:
                csv.DictWriter(f, self.columns).writerow(row)
        except OSError as problem:
            die(f"{self.path} could not be written ({problem}): make room on the disk and go on with init_from=resume")


def read_log(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        whole = [row for row in csv.DictReader(f) if None not in row.values()]  # a killed process may leave half a line
    return [{k: None if v == "" else int(v) if k == "step" else float(v) for k, v in row.items()} for row in whole]


def start_wandb(config):
    """Weights & Biases, with a run of this name begun."""
    try:
        import wandb
    except ImportError:
        die("wandb_log=True needs the library: pip install wandb")
    wandb.init(project="nanocaption", name=os.path.basename(config["out_dir"]), config=config)
    return wandb


def curve(rows, column, scale=1):
    """(steps, values) of the rows that have this column, for `plot`."""
    rows = [row for row in rows if row.get(column) is not None]
    return [row["step"] for row in rows], [scale * row[column] for row in rows]


def pyplot():
    """matplotlib, imported when something is to be drawn, and drawing into files."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot(path, panels, xlabel="step"):
    """Draws panels, three in a row: panels = {title: {label: (xs, ys)}}."""
    plt = pyplot()
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, layout="constrained")
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


@torch.no_grad()
def evaluate(model, loader, batch_size, n_tokens, process):
    """Mean loss over the first n_tokens of the split, shared out over the processes."""
    loss, n, end = 0.0, 0, min(loader.n_seq, max(1, n_tokens // loader.T))
    starts = range(process.rank * batch_size, end, process.world_size * batch_size)
    for rows in loader.batches((range(start, min(start + batch_size, end)) for start in starts), process.device):  # (B, T+1)
        with process.autocast():
            loss += model(rows[:, :-1], rows[:, 1:]).item() * len(rows)
        n += len(rows)
    loss, n = all_reduce_sum(process, loss, n)
    return loss / n


def continue_text(model, encoding, text, n, max_new_tokens, temperature, top_k, seed, device):
    """n continuations of a text, as strings; the text opens a document, as in training."""
    idx = [encoding.eot_token] + encoding.encode_ordinary(text)
    room = model.config.block_size
    idx = idx[-max(room // 2, room - max_new_tokens):]  # a text too long loses its beginning
    max_new_tokens = min(max_new_tokens, room - len(idx))
    rows = model.generate(torch.tensor([idx] * n, device=device), max_new_tokens, temperature, top_k, encoding.eot_token, seed)
    return [encoding.decode([token for token in row if token != encoding.eot_token]) for row in rows.tolist()]


def train_step(step_model, model, optimizers, batches, accumulate, lr, grad_clip, process, step=0):
    """One step on `accumulate` micro-batches (B, T+1). Returns this process's mean loss, and the norm of the gradient."""
    loss_sum = torch.zeros((), device=process.device)
    for micro in range(accumulate):
        rows = next(batches)
        if process.world_size > 1:  # gradients are averaged over the processes once a step; the flag must be set before the forward pass
            step_model.require_backward_grad_sync = micro == accumulate - 1
        with process.autocast():
            loss = step_model(rows[:, :-1], rows[:, 1:]) / accumulate  # gradients add up, so each part counts as its share
        loss.backward()
        loss_sum += loss.detach()
    return loss_sum, optimizer_step(model, optimizers, lr, grad_clip, step)


def peak_rss():
    """The most memory that this process has had, in bytes; nan on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# bfloat16 FLOPs a second, dense, of the vendors' data sheets
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12,
              "L4": 121e12,
"4090": 165e12, "3090": 71e12}


def flops_share(model, T, tokens_per_second, world_size=1):
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B), as text for the log; empty where the peak is not known."""
    c = model.config
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and next(model.parameters()).is_cuda else ""
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    n_matmul = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()  # wte counts: it is the head
    per_token = 6 * n_matmul + 12 * c.n_layer * c.n_embd * T  # forward 2, backward 4; attention's two matmuls beside
    return f" | MFU {tokens_per_second * per_token / (peak * world_size):.1%}" if peak else ""


# ----------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals())
    if prompt is not None and init_from == "scratch":
        init_from = "resume"  # who asks for samples means the trained model
    if schedule not in ("cosine", "wsd"):
        die(f"schedule={schedule}: cosine or wsd")
    process = setup(device, dtype)
    rank, world_size, device, _ = process
    torch.manual_seed(seed)
    if rank == 0:
        print_settings(config)

    # The model: fresh, continued, or somebody's. The tokenizer travels in the checkpoint, as "gpt2" or as its merges.
    tokenizer_file = os.path.join(data, "tokenizer.tiktoken")
    of_shards = open(tokenizer_file).read() if os.path.exists(tokenizer_file) else "gpt2"
    source = os.path.join(out_dir, "ckpt.pt") if init_from == "resume" else init_from
    will_train = not (prompt is not None or export or eval_only)
    if init_from == "resume" and will_train and not os.path.exists(source) and not os.path.exists(previous(source)):
        source = "scratch"  # a run that was killed before its first checkpoint
        if rank == 0:
            print(f"{out_dir} holds no checkpoint yet: starting at step 0")
    checkpoint, step, best, tokenizer = None, 0, math.inf, "gpt2"
    if source == "scratch":
        tokenizer = of_shards
        model = GPT(GPTConfig(block_size, get_tokenizer(tokenizer).n_vocab if tokenizer != "gpt2" else 50257, n_layer, n_head, n_embd))
    else:
        with local_main_process_first(process):
            model = GPT.from_pretrained(source)
        if source.endswith(".pt"):
            checkpoint = load_checkpoint(source)
            tokenizer = checkpoint["tokenizer"]
        if init_from != "resume":
            checkpoint = None  # a new run, from these weights
    model.to(device)
    B, T = batch_size, min(block_size, model.config.block_size)
    if T < block_size and rank == 0:
        print(f"{source} has positions for {T} tokens only: sequences are {T} long, not {block_size}")

    if prompt is not None:
        for text in continue_text(model, get_tokenizer(tokenizer), str(prompt), 4, max_new_tokens, temperature, top_k, seed, device):
            print(">", text)
        sys.exit(0)
    if export:
        model.save_pretrained(export, get_tokenizer(tokenizer))
        print(f"written: {export}/{{config.json,model.safetensors,vocab.json,merges.txt}}")
        sys.exit(0)

    # Evaluation: the loss on the validation shard, and HellaSwag
    val = Loader(data, "val", T, model.config.vocab_size)
    if tokenizer != of_shards:
        die(f"the shards in {data} were written with another tokenizer than {source} was trained with")
    questions = []
    if exam or (exam is None and tokenizer == "gpt2" and ("cuda" in device or eval_only)):
        with local_main_process_first(process):
            questions = hellaswag.load_questions(exam_file, get_tokenizer(tokenizer), model.config.block_size)[:exam]
    if eval_only:
        loss = evaluate(model, val, B, eval_tokens, process)
        with process.autocast():
            acc, acc_norm = hellaswag.evaluate(model, questions, model.prefill, device) if questions else (math.nan, math.nan)
        if rank == 0:
            print(f"{init_from}: validation loss {loss:.4f} over {min(eval_tokens, val.n_seq * T):,} tokens")
            if questions:
                print(f"HellaSwag, {len(questions):,} questions: acc {acc:.4f}, acc_norm {acc_norm:.4f}   "
                      "(published: gpt2 0.2859, 0.2955; gpt2-xl 0.3842, 0.4893)")
        finish(process)

    # Training. `step_model` is what trains; `model`, the same weights uncompiled, is what evaluates, samples and is saved
    if total_batch_size % (B * T * world_size):
        die(f"total_batch_size={total_batch_size} is not a multiple of batch_size x block_size x processes = {B} x {T} x {world_size}")
    accumulate = total_batch_size // (B * T * world_size)  # micro-batches a process works through in one step
    optimizers = make_optimizers(model, optimizer, learning_rate, weight_decay)
    step_model = torch.compile(model) if (compile if compile is not None else "cuda" in device) else model
    if world_size > 1:
        step_model = DistributedDataParallel(step_model, device_ids=[device] if "cuda" in device else None)
    if checkpoint:
        resume_optimizers(optimizers, checkpoint, source)
        step, best = checkpoint["step"], checkpoint["best"]
        if rank == 0:
            warn_changed(config, checkpoint, "data block_size total_batch_size optimizer learning_rate min_lr warmup_steps max_steps "
                                             "schedule weight_decay grad_clip seed dtype")
        checkpoint = None  # all of it is in use by now: a second copy would only take memory
    if all_reduce_sum(process, step)[0] != step * world_size:
        die(f"not every process found the same {source}: out_dir= must be a folder that all machines share")
    train = Loader(data, "train", T, model.config.vocab_size, seed)
    if rank == 0:
        os.makedirs(out_dir, exist_ok=True)
        n_params, n_tokens = sum(p.numel() for p in model.parameters()), train.n_seq * T
        print(f"{n_params:,} parameters | {n_tokens:,} training tokens, {total_batch_size:,} a step = {max_steps * total_batch_size / n_tokens:.1f} "
              f"epochs | {world_size} process(es) x {accumulate} x {B} x {T} on {device}")
        log = Log(os.path.join(out_dir, "log.csv"), ["step", "loss", "val_loss", "acc", "acc_norm", "lr", "norm", "ms"], step)
        wandb = start_wandb(config) if wandb_log else None

    n_seq = total_batch_size // T  # sequences in a global batch; this process's share of every step to come, micro-batch by micro-batch:
    firsts = (s * n_seq + (micro * world_size + rank) * B for s in range(step, max_steps) for micro in range(accumulate))
    batches = train.batches((range(first, first + B) for first in firsts), device)
    asked_to_stop, stop = stop_signals(), 0
    t_start, first_step = time.time(), step
    while True:
        row = dict(step=step)
        if (step % eval_interval == 0 or step >= max_steps) and not stop:
            row["val_loss"] = evaluate(model, val, B, eval_tokens, process)
            if questions:
                with process.autocast():
                    row["acc"], row["acc_norm"] = hellaswag.evaluate(model, questions, model.prefill, device)
            if rank == 0:
                print(f"step {step:5d}/{max_steps} | validation loss {row['val_loss']:.4f}"
                      + (f" | HellaSwag {row['acc']:.4f}, per token {row['acc_norm']:.4f}" if questions else ""), flush=True)
                opening = "Hello, I'm a language model," if tokenizer == "gpt2" else ""
                with open(os.path.join(out_dir, "samples.txt"), "a" if step else "w", encoding="utf-8") as f:
                    for text in continue_text(model, get_tokenizer(tokenizer), opening, 4, 32, temperature, top_k, seed, device):
                        print(f"step {step} > {text}", file=f)
        if rank == 0 and step > first_step and ("val_loss" in row or stop):
            is_best, best = row.get("val_loss", math.inf) < best, min(best, row.get("val_loss", math.inf))
            save_checkpoint(os.path.join(out_dir, "ckpt.pt"), dict(
                model=model.state_dict(), optimizers=[opt.state_dict() for opt in optimizers], step=step, best=best,
                model_config=asdict(model.config), settings=config, tokenizer=tokenizer))
            if is_best:
                keep_as(os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "best.pt"))
        if step >= max_steps or stop:
            break

        t0 = time.time()
        lr = get_lr(step, learning_rate, min_lr, warmup_steps, max_steps, schedule)
        loss, norm = train_step(step_model, model, optimizers, batches, accumulate, lr, grad_clip, process, step)
        loss, stop = all_reduce_sum(process, float(loss) / world_size, len(asked_to_stop))  # all processes stop after the same step
        ms = (time.time() - t0) * 1000
        if rank == 0:
            row |= dict(loss=loss, lr=lr, norm=norm, ms=ms)
            log.add(**row)
            if wandb:
                wandb.log(row, step=step)
            if step % log_interval == 0 or step == max_steps - 1:
                left = (time.time() - t_start) / (step + 1 - first_step) * (max_steps - step - 1)
                speed = total_batch_size / ms * 1000
                print(f"step {step:5d}/{max_steps} | loss {loss:.4f} | norm {norm:.2f} | lr {lr:.2e} | {ms:.0f} ms | "
                      f"{speed:,.0f} tok/s{flops_share(model, T, speed, world_size)} | {left / 60:.1f} min left", flush=True)
        step += 1

    if rank == 0:
        if not stop:
            log.add(**row)
            if wandb:
                wandb.log(row, step=step)
        losses = {"train": curve(log.rows, "loss"), "validation": curve(log.rows, "val_loss")}
        if tokenizer == "gpt2" and os.path.basename(data).startswith("edu_fineweb"):
            losses["OpenAI GPT-2 124M"] = ([0, step], [3.2924] * 2)  # build-nanogpt's figure, for its validation shard
        panels = {"loss (nats a token)": losses, "learning rate": {"lr": curve(log.rows, "lr")}}
        if questions:
            panels["HellaSwag"] = {"acc": curve(log.rows, "acc"), "acc_norm": curve(log.rows, "acc_norm"),
                                   "OpenAI GPT-2 124M, acc_norm": ([0, step], [0.2955] * 2)}
        plot(os.path.join(out_dir, "curves.png"), panels)
        print(f"stopped at step {step}; go on with init_from=resume" if stop else
              f"done: {out_dir}/{{ckpt.pt,best.pt,log.csv,curves.png,samples.txt}}")
    finish(process)
