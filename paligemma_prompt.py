"""
What a prompt can do: PaliGemma in plain PyTorch, and the cheapest ways to adapt it to captions of another kind, inside 16 GB.

    python paligemma_prompt.py                                   # nothing prepared: a small PaliGemma made on the spot, in four minutes
    python coco.py data=data/risc risc_csv=captions.csv          # aerial pictures with captions, in COCO's layout
    python paligemma_prompt.py paligemma=google/paligemma-3b-pt-224@bfloat16 data=data/risc prompt=soft place=after_image    # one GPU
    torchrun --standalone --nproc_per_node=8 paligemma_prompt.py paligemma=... data=data/risc prompt=soft batch_size=64      # eight
    python paligemma_prompt.py paligemma=... data=data/risc compare=True         # hard, soft at each place, LoRA: one table
    python paligemma_prompt.py stack=True siglip=google/siglip-so400m-patch14-224 gemma=google/gemma-2b data=data/risc train=lora
    python paligemma_prompt.py init_from=out/prompt_risc_soft/adapter.safetensors image=a.jpg      # caption with what was learned
    python paligemma_prompt.py memory=True                       # what each of these needs on a GPU, at full size

PaliGemma (Beyer et al. 2024, https://arxiv.org/abs/2407.07726) reads a picture as 256 tokens of a SigLIP tower, through one matrix, and
writes with Gemma. Its input is one row of vectors, and who sees whom (x) in it is neither GPT's triangle nor BERT's square:

                      picture        bos  caption en \n     a   red  roof        The prefix, picture and prompt, is known before
      picture      x  x  x  x  x     x    x       x  x      .   .    .           anything is written: all of it sees all of it. The
      bos          x  x  x  x  x     x    x       x  x      .   .    .           suffix is written word by word: each word sees the
      caption en   x  x  x  x  x     x    x       x  x      .   .    .           prefix and what was written. The last token of the
      \n           x  x  x  x  x     x    x       x  x      .   .    .   -> a    prefix predicts the first word; only the suffix and
      a            x  x  x  x  x     x    x       x  x      x   .    .   -> red  its end are in the loss. A mask of ones would leak
      red          x  x  x  x  x     x    x       x  x      x   x    .   -> roof the answer, a triangle would blind the picture's first
      roof         x  x  x  x  x     x    x       x  x      x   x    x   -> eos  patches to the rest of it and to the question.

A hard prompt is words; a soft one (Lester et al. 2021, https://arxiv.org/abs/2104.08691) is ten vectors that were never words, found by
gradient descent while all else stays frozen. Gemma multiplies the rows of its table by sqrt(2048) = 45 before layer 0, and a soft prompt
enters behind that multiplication: it must be born at that size, as copies of scaled words. Ten raw rows would whisper beside shouting
neighbours, and Adam at 1e-2 a step would need thousands of steps to be heard. Where do they go? place= has four answers:

      before_image [soft] picture bos caption en \n       after_bos      picture bos [soft] caption en \n
      after_image  picture [soft] bos caption en \n       before_suffix  picture bos caption en \n [soft]

Writes out_dir/{adapter.safetensors, log.csv, results.json, captions_{split}.json, curves.png, captions.png}. The adapter holds what was
trained and nothing else: 80 kB for ten vectors of 2048.
"""
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
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch.utils.checkpoint import checkpoint

from fineweb import configure, die, download, hub, save_atomically, show
from train_gpt2 import (KVCache, Log, curve, decode, get_lr, load_checkpoint, make_optimizers, plot, rank_zero_first, read_log, reseed, resume_optimizers,
                        save_checkpoint, setup, sum_over, take_step)
from cider import evaluate as score
from coco import draw_shapes, load_captions, open_image
from train_caption import TokenizedCaptions, caption_split, draw_captions, gather, perplexity, run, to_text, training_batch

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python paligemma_prompt.py name=value` overrides any of them

paligemma = None            # the frozen model: hub name[@revision], folder, .safetensors, big_vision's .npz, or "small", a random one; None = the built-in road
tokenizer = None            # SentencePiece file; None = tokenizer.model beside the weights
data = None                 # a folder in COCO's layout
out_dir = None              # where the run goes; None = out/prompt_{data}_{what is trained}
init_from = "scratch"       # scratch | resume (out_dir/ckpt.pt) | an adapter.safetensors
eval_only = False           # evaluate, train nothing
prompt = "hard"             # hard, words alone; soft, learned vectors beside them
words = "caption en"        # the hard prompt
n_soft = 10                 # vectors of the soft prompt
place = "after_image"       # where they go: before_image, after_image, after_bos, before_suffix
order = "image,bos,prompt"  # the prefix: its pieces, in any order
train = "none"              # of Gemma: none, attention (its matrices, fp32), lora, or all (SigLIP too)
lora_rank = 8               # of the helpers beside each of Gemma's seven matrices a layer
stack = False               # SigLIP and Gemma from checkpoints of their own, with a fresh projector between them, trained
siglip = None               # stack: where SigLIP comes from
gemma = None                # stack: where Gemma and its tokenizer come from
compare = False             # hard, hard + attention, soft at each place, hard + LoRA at equal steps: a table and a plot
memory = False              # report the memory that one step takes at full size, for each way to train
image = None                # caption these pictures (a,b,...) instead of training
batch_size = 8              # pictures a step, over all processes; each with one of its captions, drawn anew each epoch
max_length = 64             # longest caption, in tokens; the rest is cut, counted and said
optimizer = None            # adamw, muon, sgd; None = sgd for train=attention, as in Google's notebook (two fp32 copies less), else adamw
learning_rate = None        # None = what RATES says for what is trained
min_lr = 0.0                # where the cosine ends
warmup_steps = 10
max_steps = 500
grad_clip = 1.0
eval_interval = 100         # steps between evaluations, each followed by a checkpoint
log_interval = 10           # steps between printed lines
recompute = None            # keep only each layer's input for the backward pass and compute the rest again; None = above 1e9 parameters
seed = 1337
device = None               # cuda, cpu, mps; None takes the best there is
dtype = None                # of what is frozen: bfloat16 or float32; None = bfloat16 on CUDA. What is trained is fp32 always
wandb_log = False           # mirror the log to Weights & Biases

PLACES = ("before_image", "after_image", "after_bos", "before_suffix")
RATES = dict(soft=1e-2, attention=0.03, lora=2e-4, stack=5e-4, all=1e-5)
VARIANTS = (("hard, zero-shot", "prompt=hard train=none"), ("hard + attention", "prompt=hard train=attention"),
            *((f"soft, {place}", f"prompt=soft train=none place={place}") for place in PLACES), ("hard + LoRA", "prompt=hard train=lora"))

# ----------------------------------------------------------------------------------------------------------------------
# the model, with Hugging Face's parameter names. B pictures; N image tokens; P tokens of the prefix, image and all; T of everything;
# S = cached + new; D = n_embd; H query heads, G key/value heads, E = head_dim; V words


@dataclass
class Config:
    """The defaults are PaliGemma 3B at 224 px. v_ is the vision tower's."""
    image_size: int = 224
    patch_size: int = 14
    v_layer: int = 27
    v_head: int = 16
    v_embd: int = 1152
    v_mlp: int = 4304
    n_layer: int = 18
    n_head: int = 8
    n_kv_head: int = 1
    head_dim: int = 256
    n_embd: int = 2048
    n_mlp: int = 16384
    vocab_size: int = 257_152
    query_scale: float = 256 ** -0.5
    gemma2: bool = False          # PaliGemma 2: norms after attention and MLP too, and soft caps
    attn_softcap: float | None = None
    final_softcap: float | None = None
    rope_theta: float = 10_000.0
    eps: float = 1e-6


class SigLIPLayer(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.n_head = c.v_head
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(c.v_embd, c.eps), nn.LayerNorm(c.v_embd, c.eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(c.v_embd, c.v_embd) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(c.v_embd, c.v_mlp), fc2=nn.Linear(c.v_mlp, c.v_embd)))

    def forward(self, x):
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](h).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))  # (B, heads, N, ...)
        x = x + self.self_attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh"))


class SigLIP(nn.Module):
    """A ViT without a class token: all patches leave, after the final norm (Zhai et al. 2023)."""

    def __init__(self, c):
        super().__init__()
        self.embeddings = nn.ModuleDict(dict(patch_embedding=nn.Conv2d(3, c.v_embd, c.patch_size, c.patch_size),
                                             position_embedding=nn.Embedding((c.image_size // c.patch_size) ** 2, c.v_embd)))
        self.encoder = nn.ModuleDict(dict(layers=nn.ModuleList([SigLIPLayer(c) for _ in range(c.v_layer)])))
        self.post_layernorm = nn.LayerNorm(c.v_embd, c.eps)

    def forward(self, pixels):
        """(B, 3, size, size) in [-1, 1] -> (B, N, v_embd)."""
        patch, position = self.embeddings.patch_embedding, self.embeddings.position_embedding.weight
        x = patch(pixels.to(position.dtype)).flatten(2).mT + position  # (B, v_embd, rows, columns) -> (B, N, v_embd)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class RMSNorm(nn.Module):
    """In fp32 whatever comes, times (1 + weight): a weight of zero is the identity, not silence."""

    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(n)), eps

    def forward(self, x):
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())).to(x.dtype)


class Linear(nn.Linear):
    """Frozen in bfloat16, or trained in fp32 and cast for the matmul, or frozen with a trained low-rank helper (LoRA, Hu et al. 2021)."""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__(n_in, n_out, bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.lora_a is None:
            return y
        return y + 2 * F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))  # 2 = alpha / rank


def rotate(x, start, theta):
    """RoPE (Su et al. 2021): turns x (B, heads, T, E), at positions start, start + 1, ..., pairing entry e with e + E/2."""
    T, E = x.shape[2:]
    frequency = theta ** (-torch.arange(0, E, 2, device=x.device) / E)  # (E/2,)
    angle = torch.arange(start, start + T, device=x.device)[:, None] * frequency  # (T, E/2)
    cos, sin, (a, b) = angle.cos(), angle.sin(), x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class GemmaLayer(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.c = c
        D, q, kv = c.n_embd, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        self.self_attn = nn.ModuleDict(dict(q_proj=Linear(D, q), k_proj=Linear(D, kv), v_proj=Linear(D, kv), o_proj=Linear(q, D)))
        self.mlp = nn.ModuleDict(dict(gate_proj=Linear(D, c.n_mlp), up_proj=Linear(D, c.n_mlp), down_proj=Linear(c.n_mlp, D)))
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)
        if c.gemma2:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(D, c.eps), RMSNorm(D, c.eps)

    def attend(self, x, seen, cache, layer):
        c, start = self.c, cache.seen if cache else 0
        q, k, v = (self.self_attn[name](x).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        q, k = rotate(q, start, c.rope_theta), rotate(k, start, c.rope_theta)  # (B, H, T, E), (B, G, T, E)
        if cache:
            k, v = cache.add(layer, k, v)  # (B, G, S, E)
        k, v = (t[:, :, None].expand(-1, -1, c.n_head // c.n_kv_head, -1, -1).flatten(1, 2) for t in (k, v))  # every H/G query heads share a key head
        if c.attn_softcap:  # fused kernels know no cap
            score = c.attn_softcap * torch.tanh(q @ k.mT * (c.query_scale / c.attn_softcap))  # (B, H, T, S)
            y = (score if seen is None else score.masked_fill(~seen, -math.inf)).float().softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=c.query_scale)
        return self.self_attn.o_proj(y.transpose(1, 2).flatten(2))

    def feed(self, x):
        return self.mlp.down_proj(F.gelu(self.mlp.gate_proj(x), approximate="tanh") * self.mlp.up_proj(x))

    def forward(self, x, seen=None, cache=None, layer=None):
        h = self.attend(self.input_layernorm(x), seen, cache, layer)
        if not self.c.gemma2:
            x = x + h
            return x + self.feed(self.post_attention_layernorm(x))  # in Gemma 1 this name means the norm before the MLP,
        x = x + self.post_attention_layernorm(h)                    # in Gemma 2 what it says
        return x + self.post_feedforward_layernorm(self.feed(self.pre_feedforward_layernorm(x)))


class Gemma(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.c, self.recompute = c, False
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList([GemmaLayer(c) for _ in range(c.n_layer)])
        self.norm = RMSNorm(c.n_embd, c.eps)

    def embed(self, idx):
        """Token ids (..., T) -> (..., T, D), times sqrt(D): rows of the table have length about 1, what layer 0 expects about sqrt(D)."""
        return self.embed_tokens(idx) * self.c.n_embd ** 0.5

    def forward(self, x, n_prefix, cache=None):
        """Embeddings (B, T, D), of which the first n_prefix see each other and the rest what came before -> hidden states (B, T, D)."""
        T, seen = x.shape[1], None
        if T > n_prefix and not cache:
            seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()  # (query, key)
            seen[:, :n_prefix] = True
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, seen, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, seen, cache, i)
        if cache:
            cache.seen += T
        return x

    def head(self, x):
        """Hidden states (..., D) -> logits (..., V), by the same table, unscaled. Hugging Face pads it: <image> and what follows are no words."""
        logits = F.linear(self.norm(x), self.embed_tokens.weight[:257_152]).float()
        cap = self.c.final_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


class PaliGemma(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.vision_tower = SigLIP(c)
        self.multi_modal_projector = nn.ModuleDict(dict(linear=Linear(c.v_embd, c.n_embd, bias=True)))
        self.language_model = Gemma(c)

    def look(self, pixels):
        """(B, 3, size, size) -> image tokens (B, N, D), which are not scaled as words are: the projector was trained to the right size."""
        return self.multi_modal_projector.linear(self.vision_tower(pixels))

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32, siglip=None):
        """
        A hub name (google/paligemma-3b-pt-224, or name@revision), a folder or file of safetensors with its config.json, or big_vision's .npz.
        With `siglip`, another checkpoint, the tower comes from there, Gemma from `name`, and the projector between them is fresh.
        All of it is frozen. Tensors go from the file into their place one by one: beside the model, memory holds only the one in hand.
        """
        sources = [(name, "language_model." if siglip else "", *open_checkpoint(name))]
        if siglip:
            sources.append((siglip, "vision_tower.", *open_checkpoint(siglip)))
        shapes = {key: shape for _, part, theirs, *_ in sources for key, shape in theirs.items() if key.startswith(part)}
        said, said_of_tower = sources[0][-1], sources[-1][-1]
        c = read_config(name, shapes, said.get("text_config", said), said_of_tower.get("vision_config", said_of_tower))
        with torch.device("meta"):
            model = cls(c)
        fit(name, {key: tuple(p.shape) for key, p in model.named_parameters() if not (siglip and "projector" in key)}, shapes)
        for _, part, _, stream, _ in sources:
            for key, tensor in stream():
                if key.startswith(part):
                    put(model, key, tensor.to(device, dtype, copy=True))
        if siglip:
            put(model, "multi_modal_projector.linear.weight", torch.randn(c.n_embd, c.v_embd, device=device) * c.v_embd ** -0.5)
            put(model, "multi_modal_projector.linear.bias", torch.zeros(c.n_embd, device=device))
        return model

    def save_pretrained(self, folder):
        """Writes model.safetensors and config.json as `transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder)` reads them."""
        from safetensors.torch import save

        c = self.config
        text = dict(model_type="gemma2" if c.gemma2 else "gemma", hidden_size=c.n_embd, intermediate_size=c.n_mlp, num_hidden_layers=c.n_layer,
                    num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, vocab_size=c.vocab_size, rope_theta=c.rope_theta,
                    hidden_activation="gelu_pytorch_tanh", rms_norm_eps=c.eps)
        if c.gemma2:
            text |= dict(query_pre_attn_scalar=round(c.query_scale ** -2), attn_logit_softcapping=c.attn_softcap, final_logit_softcapping=c.final_softcap)
        vision = dict(model_type="siglip_vision_model", hidden_size=c.v_embd, intermediate_size=c.v_mlp, num_hidden_layers=c.v_layer, num_attention_heads=c.v_head,
                      patch_size=c.patch_size, image_size=c.image_size, projection_dim=c.n_embd, vision_use_head=False)
        theirs = dict(model_type="paligemma", architectures=["PaliGemmaForConditionalGeneration"], image_token_index=c.vocab_size - 1, projection_dim=c.n_embd,
                      hidden_size=c.n_embd, vocab_size=c.vocab_size, bos_token_id=2, eos_token_id=1, pad_token_id=0, text_config=text, vision_config=vision)
        state = {key.replace("language_model.", "language_model.model.").replace("vision_tower.", "vision_tower.vision_model."): p.detach().cpu().contiguous()
                 for key, p in self.named_parameters()}
        os.makedirs(folder, exist_ok=True)
        save_atomically(os.path.join(folder, "config.json"), lambda f: f.write(json.dumps(theirs, indent=1).encode()))
        save_atomically(os.path.join(folder, "model.safetensors"), lambda f: f.write(save(state, metadata={"format": "pt"})))


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints, in the two formats that were published. Both give the names and shapes first, then one tensor at a time


def our_name(key):
    """A tensor's name, in any of the namings that were published, as ours; None for what this model has no use for."""
    key = key.removeprefix("model.")
    for theirs, ours in (("language_model.model.", "language_model."), ("vision_tower.vision_model.", "vision_tower."), ("vision_model.", "vision_tower."),
                         ("embed_tokens.", "language_model.embed_tokens."), ("layers.", "language_model.layers."), ("norm.", "language_model.norm.")):
        if key.startswith(theirs):  # the last three: a Gemma by itself
            key = ours + key.removeprefix(theirs)
    useless = "lm_head." in key or key.startswith(("text_model.", "logit_", "vision_tower.head."))  # the tied table again; the rest of a SigLIP
    return None if useless else key


def transpose(w):
    return w.mT


def heads_in(w):  # (heads, in, E) -> (heads * E, in): each head's rows below the last head's
    return w.mT.flatten(0, 1)


def heads_out(w):  # (heads, E, out) -> (out, heads * E)
    return w.flatten(0, 1).mT


def in_heads(w):  # (in, heads, E) -> (heads * E, in)
    return w.flatten(1).mT


# big_vision's names (without /kernel, /scale or /w), ours (without .weight), and how its array becomes (out, in); in a block's arrays all layers are stacked
BIG_VISION = (
    ("img/embedding", "vision_tower.embeddings.patch_embedding", lambda w: w.permute(3, 2, 0, 1)),  # (rows, columns, 3, out)
    ("img/pos_embedding", "vision_tower.embeddings.position_embedding", lambda w: w[0]),
    ("img/Transformer/encoderblock/LayerNorm_0", "vision_tower.encoder.layers.{}.layer_norm1", None),
    ("img/Transformer/encoderblock/LayerNorm_1", "vision_tower.encoder.layers.{}.layer_norm2", None),
    ("img/Transformer/encoderblock/MlpBlock_0/Dense_0", "vision_tower.encoder.layers.{}.mlp.fc1", transpose),
    ("img/Transformer/encoderblock/MlpBlock_0/Dense_1", "vision_tower.encoder.layers.{}.mlp.fc2", transpose),
    *((f"img/Transformer/encoderblock/MultiHeadDotProductAttention_0/{name}", f"vision_tower.encoder.layers.{{}}.self_attn.{name[0]}_proj", in_heads)
      for name in ("query", "key", "value")),
    ("img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out", "vision_tower.encoder.layers.{}.self_attn.out_proj", heads_out),
    ("img/Transformer/encoder_norm", "vision_tower.post_layernorm", None),
    ("img/head", "multi_modal_projector.linear", transpose),
    ("llm/embedder/input_embedding", "language_model.embed_tokens", None),
    ("llm/layers/attn/q_einsum", "language_model.layers.{}.self_attn.q_proj", heads_in),
    ("llm/layers/attn/kv_einsum", "language_model.layers.{}.self_attn.k_proj", lambda w: heads_in(w[0])),
    ("llm/layers/attn/kv_einsum", "language_model.layers.{}.self_attn.v_proj", lambda w: heads_in(w[1])),
    ("llm/layers/attn/attn_vec_einsum", "language_model.layers.{}.self_attn.o_proj", heads_out),
    ("llm/layers/mlp/gating_einsum", "language_model.layers.{}.mlp.gate_proj", lambda w: w[0].mT),
    ("llm/layers/mlp/gating_einsum", "language_model.layers.{}.mlp.up_proj", lambda w: w[1].mT),
    ("llm/layers/mlp/linear", "language_model.layers.{}.mlp.down_proj", transpose),
    ("llm/layers/pre_attention_norm", "language_model.layers.{}.input_layernorm", None),
    ("llm/layers/post_attention_norm", "language_model.layers.{}.post_attention_layernorm", None),
    ("llm/layers/pre_ffw_norm", "language_model.layers.{}.pre_feedforward_layernorm", None),
    ("llm/layers/post_ffw_norm", "language_model.layers.{}.post_feedforward_layernorm", None),
    ("llm/final_norm", "language_model.norm", None),
)


def open_npz(path):
    """big_vision's file: a zip of arrays, some of them all layers' matrices stacked, up to 2.4 GB: those are read a layer at a time."""
    from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

    def header(f):
        shape, by_column, kind = (read_array_header_1_0 if read_magic(f) == (1, 0) else read_array_header_2_0)(f)
        if by_column:
            die(f"{path}: {f.name} is stored column by column: save it again after np.ascontiguousarray")
        return shape, kind

    archive, members, shapes = zipfile.ZipFile(path), [], {}
    names = sorted(archive.namelist(), key=lambda name: "embed" not in name)  # the table first: while it is converted it is in memory twice
    gemma2 = any("post_ffw_norm" in name for name in names)
    for name in names:
        base, _, leaf = (key := name.removesuffix(".npy").removeprefix("params/")).rpartition("/")
        base = base if leaf in ("kernel", "bias", "scale", "w") else key
        rows = [(ours + ".bias", torch.flatten) if leaf == "bias" else (ours + ".weight", how or (lambda w: w)) for theirs, ours, how in BIG_VISION if theirs == base]
        if not gemma2:  # Gemma 1's norm before the MLP goes by another name
            rows = [(ours.replace("pre_feedforward_", "post_attention_"), how) for ours, how in rows]
        with archive.open(name) as f:
            shape, kind = header(f)
        layers = shape[0] if rows and "{}" in rows[0][0] else 0
        members.append((name, rows, layers, shape[1:] if layers else shape, kind))
        for ours, how in rows or [(key, torch.flatten)]:
            result = tuple(how(torch.empty(members[-1][3], device="meta")).shape)
            shapes |= {ours.format(i): result for i in range(layers or 1)}
        if base.endswith("q_einsum"):
            text = dict(head_dim=shape[-1])
        if base.endswith("/query"):
            vision = dict(num_attention_heads=shape[-2])  # kernel (layers, in, heads, E) or bias (layers, heads, E)

    def stream():
        for name, rows, layers, shape, kind in members:
            with archive.open(name) as f:
                header(f)
                for i in range(layers or 1):
                    array = np.empty(shape, kind)
                    raw = array.reshape(-1).view(np.uint8)
                    for start in range(0, len(raw), 1 << 24):
                        f.readinto(raw[start:start + (1 << 24)])
                    w = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if kind.kind == "V" else torch.from_numpy(array)  # numpy knows no bfloat16
                    for ours, how in rows:
                        yield ours.format(i), how(w)

    return shapes, stream, dict(text_config=text, vision_config=vision)


def open_safetensors(path):
    """A folder in Hugging Face's layout, in one file or in shards, or one file of such a folder."""
    from safetensors import safe_open

    folder, index = (path, os.path.join(path, "model.safetensors.index.json")) if os.path.isdir(path) else (os.path.dirname(path), "")
    files = sorted(set(json.load(open(index))["weight_map"].values())) if os.path.exists(index) else ["model.safetensors" if index else os.path.basename(path)]
    where, shapes = {}, {}
    for file in files:
        with safe_open(os.path.join(folder, file), "pt") as f:
            for key in f.keys():
                if name := our_name(key):
                    where[name], shapes[name] = (os.path.join(folder, file), key), tuple(f.get_slice(key).get_shape())

    def stream():
        for name in sorted(where, key=lambda name: "embed" not in name):
            file, key = where[name]
            with safe_open(file, "pt") as f:  # opened anew for each: what was read of a mapped file counts as ours until it is closed
                yield name, f.get_tensor(key)

    return shapes, stream, json.load(open(os.path.join(folder, "config.json")))


def fetch(name):
    """Downloads `owner/model` or `owner/model@revision` from the hub into a folder, whose name it returns."""
    repo, _, revision = name.partition("@")
    folder, revision = os.path.join("pretrained", name.replace("/", "_")), revision or "main"
    print(f"{name} comes from {hub()}/{repo}: Google's models want their licence accepted there, once, and your token in HF_TOKEN", flush=True)
    for entry in json.load(open(download(f"{hub()}/api/models/{repo}/tree/{revision}", os.path.join(folder, "files.json")))):
        if re.fullmatch(r"config\.json|tokenizer\.model|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", entry["path"]):
            download(f"{hub()}/{repo}/resolve/{revision}/{entry['path']}", os.path.join(folder, entry["path"]))
    return folder


def open_checkpoint(name):
    """-> {our name: shape}, a function that yields (our name, tensor) for each, and config.json's content."""
    from safetensors import SafetensorError

    if not os.path.exists(name) and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name):
        die(f"{name}: no such file or folder, and not a name on the hub (owner/model)")
    try:
        path = name if os.path.exists(name) else fetch(name)
        return open_npz(path) if path.endswith(".npz") else open_safetensors(path)
    except (OSError, ValueError, KeyError, UnboundLocalError, SafetensorError, zipfile.BadZipFile) as problem:
        die(f"{name} is not a whole checkpoint, in safetensors with a config.json or in big_vision's .npz ({type(problem).__name__}: {problem})")


def read_config(name, shapes, text, vision):
    """Sizes are those of the tensors; for what those don't show, what config.json says, or PaliGemma's own values."""
    def size(key, axis):
        return shapes[key][axis] if len(shapes.get(key, ())) > axis else die(f"{name}: {key} is missing, or has no axis {axis}: not a PaliGemma")

    def layers(part):
        return len({key.split(".")[part.count(".")] for key in shapes if key.startswith(part)})

    gemma2 = "language_model.layers.0.pre_feedforward_layernorm.weight" in shapes
    E, patch = text.get("head_dim") or 256, size("vision_tower.embeddings.patch_embedding.weight", 2)
    return Config(
        image_size=math.isqrt(size("vision_tower.embeddings.position_embedding.weight", 0)) * patch, patch_size=patch,
        v_layer=vision.get("num_hidden_layers") or layers("vision_tower.encoder.layers."), v_head=vision.get("num_attention_heads") or 16,
        v_embd=size("vision_tower.embeddings.patch_embedding.weight", 0), v_mlp=size("vision_tower.encoder.layers.0.mlp.fc1.weight", 0),
        n_layer=text.get("num_hidden_layers") or layers("language_model.layers."), n_head=size("language_model.layers.0.self_attn.q_proj.weight", 0) // E,
        n_kv_head=size("language_model.layers.0.self_attn.k_proj.weight", 0) // E, head_dim=E, n_embd=size("language_model.embed_tokens.weight", 1),
        n_mlp=size("language_model.layers.0.mlp.gate_proj.weight", 0), vocab_size=size("language_model.embed_tokens.weight", 0),
        query_scale=(text.get("query_pre_attn_scalar") or E) ** -0.5, gemma2=gemma2, attn_softcap=text.get("attn_logit_softcapping", 50.0) if gemma2 else None,
        final_softcap=text.get("final_logit_softcapping", 30.0) if gemma2 else None, eps=text.get("rms_norm_eps") or 1e-6,
        rope_theta=text.get("rope_theta") or (text.get("rope_parameters") or {}).get("rope_theta") or 10_000.0)


def fit(path, own, given):
    """Ends the run unless the tensors that a file gives, {name: shape}, are those that are wanted."""
    wrong = [f"{key} is missing" for key in own if key not in given] + [f"{key} is unknown" for key in given if key not in own]
    wrong += [f"{key} is {given[key]} instead of {own[key]}" for key in own if key in given and own[key] != given[key]]
    if wrong:
        die(f"{path}: {len(wrong)} of {len(own)} tensors do not fit: {'; '.join(wrong[:5])}")


def put(module, key, tensor):
    parent, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


# ----------------------------------------------------------------------------------------------------------------------
# a PaliGemma that is asked in a certain way, and what of it is trained


class Prompted(nn.Module):
    """A frozen PaliGemma, the pieces of its prefix in their order, and what is trained: a soft prompt, or parts or helpers of Gemma."""

    def __init__(self, model, bos, hard, prompt="hard", n_soft=10, place="after_image", order="image,bos,prompt", train="none", lora_rank=8, stack=False):
        super().__init__()
        self.model, self.pieces, self.soft, language = model, order.split(","), None, model.language_model
        device = language.norm.weight.device
        self.words = {"bos": torch.tensor([bos], device=device), "prompt": torch.tensor(hard, device=device)}
        if prompt == "soft":
            at = dict(before_image=self.pieces.index("image"), after_image=self.pieces.index("image") + 1, after_bos=self.pieces.index("bos") + 1, before_suffix=3)
            self.pieces.insert(at[place], "soft")
            rows = language.embed(self.words["prompt"][:-1] if len(hard) > 1 else self.words["prompt"])  # without the "\n"; scaled, as layer 0 expects it
            self.soft = nn.Parameter(rows.detach().float().repeat(math.ceil(n_soft / len(rows)), 1)[:n_soft])  # (n_soft, D)
        if train == "all":
            model.float().requires_grad_(True)
        for layer in language.layers:
            if train == "attention":
                layer.self_attn.float().requires_grad_(True)
            for matrix in (*layer.self_attn.values(), *layer.mlp.values()) if train == "lora" else ():
                n_out, n_in = matrix.weight.shape
                matrix.lora_a = nn.Parameter(torch.randn(lora_rank, n_in, device=device) * n_in ** -0.5)
                matrix.lora_b = nn.Parameter(torch.zeros(n_out, lora_rank, device=device))  # zero: training starts from the model as it is
        if stack:
            model.multi_modal_projector.float().requires_grad_(True)

    def prefix(self, pixels):
        """Pictures (B, 3, size, size) -> (B, P, D). What is frozen keeps nothing for a backward pass: SigLIP costs its weights only."""
        embed = self.model.language_model.embed
        pieces = {name: embed(idx) for name, idx in self.words.items()} | {"image": self.model.look(pixels), "soft": self.soft}
        return torch.cat([pieces[name].to(embed.__self__.embed_tokens.weight.dtype).expand(len(pixels), -1, -1) for name in self.pieces], 1)

    def forward(self, idx, pixels, targets):
        """
        The summed cross-entropy of targets (B, T), in nats; -100 marks padding. idx (B, T) is the same one step earlier: its first column, before the
        first word, is the last token of the prefix, and ignored. Padding is at the end, where no word sees it: the mask is the same for all rows.
        """
        language, prefix = self.model.language_model, self.prefix(pixels)
        P = prefix.shape[1]
        x = language(torch.cat([prefix, language.embed(idx[:, 1:])], 1), P)[:, P - 1:]  # (B, T, D)

        def part(x, targets):
            return F.cross_entropy(language.head(x), targets, reduction="sum")

        # 257,152 logits for each of 8 x 40 words are 330 MB in fp32, three times over: 64 words at a time, and again in the backward pass
        parts = zip(x.flatten(0, 1).split(64), targets.flatten().split(64))
        return sum(checkpoint(part, *some, use_reentrant=False) for some in parts)

    @torch.no_grad()
    def generate(self, pixels, stop, max_new_tokens):
        """Greedy captions, as tokens (B, up to max_new_tokens), ended by `stop`."""
        language, c, prefix = self.model.language_model, self.model.config, self.prefix(pixels)
        shape = SimpleNamespace(n_layer=c.n_layer, n_head=c.n_kv_head, n_embd=c.n_kv_head * c.head_dim)
        cache = KVCache(shape, len(pixels), prefix.shape[1] + max_new_tokens, prefix)

        def step(new):  # the first call gets a dummy and reads the prefix
            x = language.embed(new) if cache.seen else prefix
            return language.head(language(x, x.shape[1], cache)[:, -1:])

        return decode(step, torch.zeros(len(pixels), 1, dtype=torch.long, device=pixels.device), max_new_tokens, 0.0, stop=stop)[:, 1:]

    def trained(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
