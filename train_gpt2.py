"""
The writer: GPT-2, and the loop that teaches it to continue text.

    python train_gpt2.py data=notes n_layer=4 n_head=4 n_embd=128 batch_size=8 total_batch_size=8192 max_steps=300   # a CPU, minutes
    python train_gpt2.py batch_size=64                           # one GPU with 80 GB
    torchrun --standalone --nproc_per_node=8 train_gpt2.py batch_size=64   # eight GPUs
    python train_gpt2.py init_from=gpt2 eval_only=True           # OpenAI's weights, on our validation shard
    python train_gpt2.py init_from=resume prompt="Hello, I'm a language model,"   # what a trained model says

The defaults are the published recipe: 124M parameters, 524,288 tokens a step, 19,073 steps = 10B tokens of FineWeb-Edu.
The loss starts at ln 50257 = 10.82, falls under 4 within the first thousand steps, and ends near 3.1, beside OpenAI's GPT-2.
Data order is a pure function of (seed, step): the same global batches for any number of processes and after any resume.
Writes out_dir/{ckpt.pt, log.csv, loss.png}.
"""
import csv
import glob
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from fineweb import configure, die, download, get_tokenizer, hub, save_atomically, show

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python train_gpt2.py name=value` overrides any of them

data = "edu_fineweb10B"     # folder of token shards, written by fineweb.py
out_dir = "out/gpt2"        # where checkpoint, log and plot go
init_from = "scratch"       # scratch | resume (out_dir/ckpt.pt) | gpt2, gpt2-medium, -large, -xl | a folder, .safetensors or ckpt.pt
eval_only = False           # evaluate what init_from names, then stop
prompt = None               # continue this text instead of training
n_layer = 12                # 12 layers, 12 heads, 768 wide: GPT-2 124M
n_head = 12
n_embd = 768
block_size = 1024           # longest sequence, T
batch_size = 8              # sequences a process works on at once, B: as many as fit
total_batch_size = 524_288  # tokens a step, 2**19: about 0.5M as in the GPT-3 paper; gradients accumulate up to it
optimizer = "adamw"         # adamw, or muon for the matrices inside the blocks
learning_rate = 6e-4        # the peak
min_lr = 6e-5               # where the cosine ends
warmup_steps = 715          # GPT-3 warms up over 375M tokens
max_steps = 19_073          # 10B tokens / 524,288
weight_decay = 0.1
grad_clip = 1.0
eval_interval = 250         # steps between evaluations, each followed by a checkpoint
eval_tokens = 10_485_760    # validation tokens of one evaluation, at most
log_interval = 1            # steps between printed lines
seed = 1337
device = None               # cuda, cpu, mps; None takes the best there is
dtype = None                # bfloat16 or float32 for the matmuls; None = bfloat16 on CUDA
compile = None              # torch.compile the training step; None = on CUDA
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


class KVCache:
    """Keys and values of the tokens seen so far, for every block, so that a new token costs one token's work."""

    def __init__(self, config, B, length, like):
        D = config.n_embd // config.n_head
        self.kv = like.new_empty(config.n_layer, 2, B, config.n_head, length, D)
        self.seen = 0  # tokens whose keys and values are in; GPT.blocks moves it once all blocks have added theirs

    def add(self, layer, k, v):
        """k, v: (B, H, T, D) of the new tokens. Returns those of all tokens, (B, H, S, D)."""
        S = self.seen + k.shape[2]
        self.kv[layer, 0, :, :, self.seen:S] = k
        self.kv[layer, 1, :, :, self.seen:S] = v
        return self.kv[layer, 0, :, :, :S], self.kv[layer, 1, :, :, :S]


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, layer=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = cache.add(layer, k, v)  # (B, H, S, D)
            S = k.shape[2]
            # new token t sits at position S-T+t and may look at itself and everything before; is_causal would align t with 0
            seen = None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
            y = F.scaled_dot_product_attention(q, k.to(q), v.to(q), attn_mask=seen)
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

    def forward(self, x, cache=None, layer=None):
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with Hugging Face's parameter names; matrices are (out, in), theirs (in, out)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        padded = math.ceil(config.vocab_size / 128) * 128  # 50257 is an ugly number; 50304 = 393 * 128 suits the matmul kernels
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

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) -> logits (B, T, V), or, given targets (B, T), their mean cross-entropy in nats a token."""
        x = self.embed(idx, cache.seen if cache else 0)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache, layer)
        if cache:
            cache.seen += idx.shape[1]
        logits = self.head(x)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, generator=None):
        """Continues each row of idx (B, T) by up to max_new_tokens tokens; see `decode`."""
        cache = KVCache(self.config, len(idx), idx.shape[1] + max_new_tokens, self.lm_head.weight)
        return decode(lambda new: self(new, cache=cache), idx, max_new_tokens, temperature, top_k, stop, generator)

    @classmethod
    def from_pretrained(cls, name):
        """A hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl), a folder as `save_pretrained` writes it, a .safetensors file, or our ckpt.pt."""
        if name.endswith(".pt"):
            checkpoint = load_checkpoint(name)
            if "model_config" not in checkpoint:
                die(f"{name} is not a checkpoint of train_gpt2.py")
            model = cls(GPTConfig(**checkpoint["model_config"]))
            load_weights(model, checkpoint["model"], name)
            return model
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not os.path.exists(name):
            if name not in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
                die(f"{name}: no such file or folder, and not one of OpenAI's gpt2, gpt2-medium, gpt2-large, gpt2-xl")
            folder = os.path.join("pretrained", name)
            for file in ("config.json", "model.safetensors"):
                download(f"{hub()}/openai-community/{name}/resolve/main/{file}", os.path.join(folder, file))
            name = folder
        folder = name if os.path.isdir(name) else os.path.dirname(name)
        file = os.path.join(name, "model.safetensors") if os.path.isdir(name) else name
        try:
            theirs = json.load(open(os.path.join(folder, "config.json")))
            config = GPTConfig(block_size=theirs["n_positions"], **{k: theirs[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd")})
            weights = load_file(file)
        except (OSError, KeyError, ValueError, SafetensorError) as problem:
            die(f"{file} with the config.json beside it is not a GPT-2 in Hugging Face's layout ({type(problem).__name__}: {problem})")
        model, state = cls(config), {}
        for key, w in weights.items():
            key = key.removeprefix("transformer.")
            if key.endswith((".attn.bias", ".attn.masked_bias")) or key == "lm_head.weight":
                continue  # old files hold the causal mask, and the tied matrix twice
            if key.endswith("weight") and ".h." in f".{key}" and w.dim() == 2:
                w = w.t()  # they use Conv1D: (in, out)
            if key == "wte.weight":
                w = F.pad(w, (0, 0, 0, model.lm_head.weight.shape[0] - len(w)))
            state["transformer." + key] = w
        state["lm_head.weight"] = state.get("transformer.wte.weight")
        load_weights(model, state, file)
        return model

    def save_pretrained(self, folder):
        """Writes model.safetensors and config.json as `transformers.GPT2LMHeadModel.from_pretrained(folder)` reads them."""
        from safetensors.torch import save

        os.makedirs(folder, exist_ok=True)
        c, state = self.config, {}
        for key, w in self.state_dict().items():
            if key == "lm_head.weight":
                continue  # tied
            if key == "transformer.wte.weight":
                w = w[:c.vocab_size]
            elif ".h." in key and w.dim() == 2:
                w = w.t()
            state[key] = w.contiguous().cpu()
        theirs = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd,
                      n_layer=c.n_layer, n_head=c.n_head, bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1)
        save_atomically(os.path.join(folder, "config.json"), lambda f: f.write(json.dumps(theirs, indent=1).encode()))
        save_atomically(os.path.join(folder, "model.safetensors"), lambda f: f.write(save(state, metadata={"format": "pt"})))


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


# ----------------------------------------------------------------------------------------------------------------------
# data: shards are one long text; sequence j of a shard is tokens j*T .. j*T+T, whose last is the first of sequence j+1


class Loader:
    """Global batches of `n_seq` sequences of T tokens from the shards of one split, shuffled anew each epoch."""

    def __init__(self, folder, split, T, vocab_size, seed=None):
        paths = sorted(glob.glob(os.path.join(folder, f"*{split}*.npy")))
        if not paths:
            die(f"no {split} shards (*{split}*.npy) in {folder}: write them with `python fineweb.py data={folder}`")
        self.shards = [np.load(path, mmap_mode="r") for path in paths]  # memory-mapped: only what a batch touches is read
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
            die(f"the shards hold token id {rows.max()}, the model's vocabulary ends at {self.vocab_size - 1}: they come from another tokenizer")
        return torch.from_numpy(rows)


# ----------------------------------------------------------------------------------------------------------------------
# what every training loop needs


class Process(NamedTuple):
    """Where this process stands among those that train together, and how it computes."""
    rank: int
    world: int
    device: str
    autocast: object  # `with autocast:` runs matmuls in bfloat16 where asked for; weights stay fp32


def setup(device, dtype):
    """Under torchrun, one process a GPU (nccl) or a CPU worker (gloo); else one process on the best device there is."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if device == "cuda" and world > 1:
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    device_type = device.split(":")[0]
    dtype = dtype or ("bfloat16" if device_type == "cuda" else "float32")
    if dtype not in ("bfloat16", "float32"):
        die(f"dtype={dtype}: bfloat16 or float32")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    autocast = torch.autocast(device_type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    return Process(rank, world, device, autocast)


@contextmanager
def rank_zero_first(me):
    """What is done inside, rank 0 does before the others: they find its downloads finished."""
    if me.rank:
        dist.barrier()
    yield
    if me.world > 1 and not me.rank:
        dist.barrier()


def sum_over(me, *numbers):
    """The sums of some numbers over all processes, as floats."""
    if me.world == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=me.device)
    dist.all_reduce(total)  # gloo has no AVG
    return total.tolist()


def make_optimizers(model, name, learning_rate, weight_decay, betas=(0.9, 0.95)):
    """
    The optimizers that together cover every trainable parameter once. "adamw": AdamW for all of them. "muon": Muon (Jordan 2024)
    for the matrices inside blocks, AdamW for the rest. Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that
    every direction in it moves equally far: a few matmuls more a step, and half the steps or fewer to the same loss.
    Matrices decay; biases, norms and gates, which have no direction to shrink in, do not.
    """
    if name not in ("adamw", "muon"):
        die(f"optimizer={name}: adamw or muon")
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    inner = [k for k, p in params.items() if name == "muon" and p.dim() == 2 and not k.endswith(("wte.weight", "wpe.weight"))]
    outer = [k for k in params if k not in inner]
    groups = [dict(params=[params[k] for k in outer if params[k].dim() >= 2], weight_decay=weight_decay),
              dict(params=[params[k] for k in outer if params[k].dim() < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if inner:  # match_rms_adamw scales Muon's step to the size of AdamW's: one learning rate serves both
        optimizers.append(torch.optim.Muon([params[k] for k in inner], lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def resume_optimizers(optimizers, checkpoint, path):
    try:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    except (ValueError, KeyError):
        die(f"{path} was written with other optimizer settings (optimizer={checkpoint['settings']['optimizer']}): resume with the same")


def take_step(model, optimizers, lr, grad_clip):
    """Clips the gradients of the trainable parameters to a joint norm, steps, and forgets them. Returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def get_lr(step, learning_rate, min_lr, warmup_steps, max_steps):
    """Linear warm-up to learning_rate, then half a cosine down to min_lr."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def reseed(seed, step, rank=0):
    """Makes dropout, like the data, a pure function of (seed, step): a resumed run needs no saved generator."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


def save_checkpoint(path, checkpoint):
    save_atomically(path, lambda f: torch.save(checkpoint, f))


def load_checkpoint(path, device="cpu"):
    """A checkpoint is a dict of tensors, numbers and strings: loading one runs no code of its author."""
    if not os.path.exists(path):
        die(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as problem:  # zip, pickle and torch each have their own way to say it
        die(f"{path} is not a checkpoint, or was cut short ({type(problem).__name__}): take another one or start from scratch")


def load_weights(model, state, path):
    """load_state_dict with one line for what does not fit."""
    own = model.state_dict()
    wrong = [k for k in own if k not in state] + [k for k in state if k not in own or state[k].shape != own[k].shape]
    if wrong:
        shapes = [f"{k}: {tuple(state[k].shape) if k in state else 'absent'}, not {tuple(own[k].shape) if k in own else 'wanted'}" for k in wrong]
        die(f"{path} is of another shape than this model, {len(wrong)} of {len(own)} tensors, such as {shapes[0]}")
    model.load_state_dict(state)


class Log:
    """out_dir/log.csv: a row a step; a resumed run first drops the rows from its first step on."""

    def __init__(self, path, columns, start):
        self.path, self.columns = path, columns
        self.rows = [row for row in read_log(path) if row["step"] < start] if start else []
        with open(path, "w", newline="") as f:
            csv.DictWriter(f, columns).writeheader()
            csv.DictWriter(f, columns).writerows(self.rows)

    def add(self, **row):
        self.rows.append(row)
        with open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow(row)


def read_log(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        return [{k: None if v == "" else int(v) if k == "step" else float(v) for k, v in row.items()} for row in csv.DictReader(f)]


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
def evaluate(model, loader, batch_size, n_tokens, me):
    """Mean loss over the first n_tokens of the split, shared out over the processes."""
    loss, n, end = 0.0, 0, min(loader.n_seq, max(1, n_tokens // loader.T))
    for start in range(me.rank * batch_size, end, me.world * batch_size):
        rows = loader.sequences(range(start, min(start + batch_size, end))).to(me.device)  # (B, T+1)
        with me.autocast:
            loss += model(rows[:, :-1], rows[:, 1:]).item() * len(rows)
        n += len(rows)
    loss, n = sum_over(me, loss, n)
    return loss / n


# ----------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    config = configure(globals())
    rank, world, device, autocast = me = setup(device, dtype)
    torch.manual_seed(seed)
    if rank == 0:
        show(config)
        os.makedirs(out_dir, exist_ok=True)

    # The model: fresh, continued, or somebody's. The tokenizer travels in the checkpoint, as "gpt2" or as its merges.
    tokenizer_file = os.path.join(data, "tokenizer.tiktoken")
    tokenizer = open(tokenizer_file).read() if os.path.exists(tokenizer_file) else "gpt2"
    checkpoint, step = None, 0
    if init_from == "scratch":
        model = GPT(GPTConfig(block_size, get_tokenizer(tokenizer).n_vocab if tokenizer != "gpt2" else 50257, n_layer, n_head, n_embd))
    else:
        source = os.path.join(out_dir, "ckpt.pt") if init_from == "resume" else init_from
        with rank_zero_first(me):
            model = GPT.from_pretrained(source)
        if source.endswith(".pt"):
            checkpoint = load_checkpoint(source)
            tokenizer = checkpoint["tokenizer"]
        if init_from != "resume":
            checkpoint = None  # a new run, from these weights
    model.to(device)
    B, T = batch_size, min(block_size, model.config.block_size)

    if prompt is not None:
        encoding = get_tokenizer(tokenizer)
        idx = torch.tensor([[encoding.eot_token] + encoding.encode_ordinary(prompt)], device=device)
        for row in model.generate(idx.repeat(4, 1), min(60, model.config.block_size - idx.shape[1]), top_k=50):
            print(">", encoding.decode(row[1:].tolist()))
        sys.exit(0)

    val = Loader(data, "val", T, model.config.vocab_size)
    if eval_only:
        loss = evaluate(model, val, B, eval_tokens, me)
        if rank == 0:
            print(f"{init_from}: validation loss {loss:.4f} over {min(eval_tokens, val.n_seq * T):,} tokens")
        sys.exit(0)
    if total_batch_size % (B * T * world):
        die(f"total_batch_size={total_batch_size} is not a multiple of batch_size x block_size x processes = {B} x {T} x {world}")
    accumulate = total_batch_size // (B * T * world)  # micro-batches a process works through in one step
    train = Loader(data, "train", T, model.config.vocab_size, seed)
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters | {train.n_seq * T:,} training tokens, {total_batch_size:,} a step = "
              f"{max_steps * total_batch_size / (train.n_seq * T):.1f} epochs | {world} process(es) x {accumulate} x {B} x {T} on {device}")

    optimizers = make_optimizers(model, optimizer, learning_rate, weight_decay)
    if checkpoint:
        resume_optimizers(optimizers, checkpoint, source)
        step = checkpoint["step"]
    # `step_model` is what trains; `model`, the same weights uncompiled, is what evaluates, samples and is saved
    step_model = torch.compile(model) if (compile if compile is not None else "cuda" in device) else model
    if world > 1:
        step_model = DistributedDataParallel(step_model, device_ids=[device] if "cuda" in device else None)
    log = Log(os.path.join(out_dir, "log.csv"), ["step", "loss", "val_loss", "lr", "norm", "ms"], step) if rank == 0 else None
    if wandb_log and rank == 0:
        import wandb
        wandb.init(project="nanocaption", name=os.path.basename(out_dir), config=config)

    n_seq = total_batch_size // T  # sequences in a global batch
    t_start, first_step = time.time(), step
    while True:
        val_loss = None
        if step % eval_interval == 0 or step >= max_steps:
            val_loss = evaluate(model, val, B, eval_tokens, me)
            if rank == 0:
                print(f"step {step:5d}/{max_steps} | validation loss {val_loss:.4f}", flush=True)
                if step > first_step:
                    save_checkpoint(os.path.join(out_dir, "ckpt.pt"), dict(
                        model=model.state_dict(), optimizers=[opt.state_dict() for opt in optimizers], step=step, model_config=asdict(model.config),
                        settings=config, tokenizer=tokenizer))
        if step >= max_steps:
            break

        t0 = time.time()
        reseed(seed, step, rank)
        lr = get_lr(step, learning_rate, min_lr, warmup_steps, max_steps)
        loss_sum = 0.0
        for micro in range(accumulate):
            start = step * n_seq + (micro * world + rank) * B
            rows = train.sequences(range(start, start + B)).to(device, non_blocking=True)  # (B, T+1)
            if world > 1:  # gradients are averaged over the processes once a step; the flag must be set before the forward pass
                step_model.require_backward_grad_sync = micro == accumulate - 1
            with autocast:
                loss = step_model(rows[:, :-1], rows[:, 1:]) / accumulate  # gradients add up, so each part counts as its share
            loss.backward()
            loss_sum += loss.detach()
        norm = take_step(model, optimizers, lr, grad_clip)
        loss_sum, = sum_over(me, float(loss_sum) / world)
        norm, ms = float(norm), (time.time() - t0) * 1000  # float() waits for the device: only now is the clock right
        if rank == 0:
            log.add(step=step, loss=loss_sum, val_loss=val_loss, lr=lr, norm=norm, ms=ms)
            if wandb_log:
                wandb.log({k: v for k, v in log.rows[-1].items() if v is not None}, step=step)
            if step % log_interval == 0 or step == max_steps - 1:
                left = (time.time() - t_start) / (step + 1 - first_step) * (max_steps - step - 1)
                print(f"step {step:5d}/{max_steps} | loss {loss_sum:.4f} | norm {norm:.2f} | lr {lr:.2e} | {ms:.0f} ms | "
                      f"{total_batch_size / ms * 1000:,.0f} tok/s | {left / 60:.1f} min left", flush=True)
        step += 1

    if rank == 0:
        log.add(step=step, val_loss=val_loss)
        plot(os.path.join(out_dir, "loss.png"), {"loss (nats a token)": {"train": curve(log.rows, "loss"), "validation": curve(log.rows, "val_loss")},
                                                 "learning rate": {"lr": curve(log.rows, "lr")}})
        print(f"done: {out_dir}/ckpt.pt, log.csv, loss.png")
    if world > 1:
        dist.barrier()  # rank 0 draws a little longer; who leaves early may take the others down
        dist.destroy_process_group()
