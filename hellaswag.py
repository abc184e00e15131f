"""
HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830), a test of language models: 10,042
questions. Each is the beginning of a text and four endings. One is true; the others were written by
a language model and chosen to fool such models. People are right 95% of the time.

    python hellaswag.py              # fetches the questions (12 MB) and shows one of them
    python hellaswag.py number=7     # another one

A model as small as GPT-2 can't be asked "a, b, c or d?". It is asked in completion style: which
ending does it find likeliest? `acc` compares the endings' summed losses; `acc_norm` their losses
per token, so that a longer ending has no disadvantage. Guessing gives 0.25. OpenAI's models: gpt2
(124M) acc 0.2859, acc_norm 0.2955; gpt2-xl (1558M) 0.3842, 0.4893. To measure one:

    python train_gpt2.py init_from=gpt2 eval_only=True

A line of the questions file (the label counts from 0):

    {"ctx": "A man is sitting on a roof. he", "label": 3,
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."]}
"""
import json
from itertools import groupby

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from fineweb import configure, die, download, get_tokenizer, read_lines

# --------------------------------------------------------------------------------------------------
# settings: `python hellaswag.py name=value` overrides any; rules such as >= 1 are checked

file = "data/hellaswag_val.jsonl"   # the questions; fetched if they are not there
tokenizer = "gpt2"                  # gpt2, or a .tiktoken file
number = 0                          # >= 0: the question to show

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"

# --------------------------------------------------------------------------------------------------
# B questions at once, with 4 endings each; T tokens of a context, E of an ending; V = vocab_size


def load_questions(path, encoding, block_size=1024):
    """
    The questions of a file: [(context, endings, label), ...], with the token ids of the context and
    of its four endings, and which of them is true. A context loses its beginning where it does not
    fit before its longest ending. A question with an ending that does not fit is left out.
    """
    questions = []
    n_too_long = 0
    for line_number, line in read_lines(download(URL, path, tries=3)):
        try:
            question = json.loads(line)
            label = int(question["label"])
            context = encoding.encode_ordinary(question["ctx"])
            # in GPT-2's vocabulary a word begins with its space
            endings = [encoding.encode_ordinary(" " + ending) for ending in question["endings"]]
            if not context or len(endings) != 4 or not 0 <= label < 4:
                raise ValueError
        except (ValueError, LookupError, TypeError):
            die(f'{path}, line {line_number}: no question with "ctx", 4 "endings", "label" 0 to 3')
        # the last token of an ending is no input
        room = block_size - max(map(len, endings)) + 1
        if room > 0:
            questions.append((context[-room:], endings, label))
        else:
            n_too_long += 1
    if not questions:
        die(f"{path} holds no question that fits into block_size={block_size}")
    if n_too_long and not (dist.is_initialized() and dist.get_rank() > 0):
        print(f"HellaSwag: {n_too_long:,} of {n_too_long + len(questions):,} questions are left "
              f"out: endings longer than block_size={block_size}", flush=True)
    return questions


def show_question(question, encoding):
    """Prints the four rows that a model sees, and the mask of the tokens that count."""
    context, endings, label = question
    for i, ending in enumerate(endings):
        print(f"\nending {i}" + (" (the true one: the label)" if i == label else ""))
        print("  text  ", repr(encoding.decode(context + ending)))
        print("  tokens", *context, *ending)
        print("  mask  ", *[0] * len(context), *[1] * len(ending), "(1: its loss counts)")


def make_batches(questions, tokens_at_once, is_cached):
    """
    Yields lists of the questions' numbers. The contexts of a batch are equally long and need no
    padding, its endings are of similar lengths and need little.
    """
    lengths = [(len(context), max(map(len, endings))) for context, endings, _ in questions]
    order = sorted(range(len(questions)), key=lambda i: lengths[i])
    for T, group in groupby(order, key=lambda i: lengths[i][0]):
        group = list(group)
        while group:
            longest = lengths[group[-1]][1]
            row_length = longest if is_cached else T + longest
            B = max(1, tokens_at_once // (4 * row_length))
            yield group[-B:]
            group = group[:-B]


@torch.no_grad()
def predict(model, questions, prefill=None, device="cpu", tokens_at_once=4096):
    """
    The likeliest ending of each question, by summed loss and by loss per token: (questions, 2).
    model(idx (B, T)) -> logits (B, T, V).

    A model with a KV cache need not compute each context four times: prefill(contexts (B, T), room)
    computes them once. It returns a function (idx (4B, E), targets (4B, E)) -> losses (n,), which
    continues each context with four rows of up to `room` tokens; n targets are not -1.
    """
    best = torch.empty(len(questions), 2, dtype=torch.long)
    for batch in make_batches(questions, tokens_at_once, is_cached=prefill is not None):
        contexts = torch.tensor([questions[i][0] for i in batch])  # (B, T)
        endings = [torch.tensor(ending) for i in batch for ending in questions[i][1]]
        targets = pad_sequence(endings, batch_first=True, padding_value=-1)  # (4B, E)
        # Shifted by one: the context's last token predicts the first of an ending. The padding
        # comes last, where a causal model can't see it.
        first = contexts[:, -1:].repeat_interleave(4, 0)  # (4B, 1)
        idx = torch.cat([first, targets[:, :-1].clamp(min=0)], 1)  # (4B, E)
        contexts = contexts[:, :-1].to(device)  # (B, T-1)
        idx, targets = idx.to(device), targets.to(device)
        mask = targets >= 0
        if prefill:
            losses = prefill(contexts, idx.shape[1])(idx, targets)
        else:
            rows = torch.cat([contexts.repeat_interleave(4, 0), idx], 1)  # (4B, T-1+E)
            logits = model(rows)[:, contexts.shape[1]:]  # (4B, E, V)
            losses = F.cross_entropy(logits[mask].float(), targets[mask], reduction="none")
        loss = torch.zeros_like(targets, dtype=torch.float32)
        loss[mask] = losses
        total = loss.sum(1).view(-1, 4)  # (B, 4)
        mean = total / mask.sum(1).view(-1, 4)
        best[batch] = torch.stack([total.argmin(1), mean.argmin(1)], 1).cpu()
    return best


def evaluate(model, questions, prefill=None, device="cpu"):
    """
    (acc, acc_norm) of a model; see `predict`. Where torch.distributed runs, each process answers a
    part of the questions: all must call it.
    """
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    part = questions[rank::world_size]
    labels = torch.tensor([label for _, _, label in part]).view(-1, 1)
    right = (predict(model, part, prefill, device) == labels).sum(0).to(device)  # (2,)
    if world_size > 1:
        dist.all_reduce(right)
    acc, acc_norm = (right.cpu() / len(questions)).tolist()
    return acc, acc_norm


if __name__ == "__main__":
    configure(globals())
    encoding = get_tokenizer(tokenizer)
    questions = load_questions(file, encoding)
    if number >= len(questions):
        die(f"number={number}: {file} holds questions 0 to {len(questions) - 1}")
    print(f"{file}: {len(questions):,} questions; number {number}:")
    show_question(questions[number], encoding)
