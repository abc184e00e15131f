"""
The exam: HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830), 10,042 questions. Each is the beginning of a
text and four endings, one of them true; the others were written by a machine to fool machines. People are right 95% of the time.

    python hellaswag.py              # fetches the questions (12 MB) and shows one as a model sees it
    python hellaswag.py number=7     # another one

A model as small as GPT-2 can't be asked "a, b, c or d?", so it is asked in completion style: which ending does it find
likeliest? `acc` compares the endings' summed losses, `acc_norm` the losses per token, which does not punish the longer ending.
Guessing gives 0.25. OpenAI's models: gpt2 (124M) acc 0.2859, acc_norm 0.2955; gpt2-xl (1558M) 0.3842, 0.4893:

    python train_gpt2.py init_from=gpt2 eval_only=True

A question looks like this (the label counts from 0):
    {"ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using wrap to wrap a pair of skis.",
     "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a roof."]}
"""
import json
from itertools import groupby, islice

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fineweb import configure, die, download, get_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python hellaswag.py name=value` overrides any of them

file = "data/hellaswag_val.jsonl" # the questions, a jsonl file: fetched if it is not there
tokenizer = "gpt2"          # "gpt2", or a .tiktoken file
number = 0                  # >= 0: the question to show

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"

# ----------------------------------------------------------------------------------------------------------------------
# B questions at once, 4 endings each; T tokens of a row, V = vocab_size


def load_questions(path, encoding, block_size=1024):
    """
    The questions of a jsonl file, which is fetched if it is not there, as [(context, endings, label), ...]: token ids of the
    context, of its four endings, and which one is true. A context that would not fit before its longest ending loses its beginning.
    """
    questions = []
    with open(download(URL, path), encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            try:
                question = json.loads(line)
                context = encoding.encode_ordinary(question["ctx"])
                endings = [encoding.encode_ordinary(" " + ending) for ending in question["endings"]]  # GPT-2's words carry their space
                label = int(question["label"])
                if not (context and len(endings) == 4 and all(endings) and 0 <= label < 4):
                    raise ValueError
            except (ValueError, LookupError, TypeError):
                die(f"{path}, line {n}: not a question with \"ctx\", four \"endings\" and a \"label\" of 0 to 3: {line[:60].strip()!r}")
            room = block_size - max(map(len, endings)) + 1  # an ending's last token is predicted, and never read
            if room < 1:
                die(f"{path}, line {n}: an ending alone is longer than block_size={block_size}")
            questions.append((context[-room:], endings, label))
    return questions


def show_question(question, encoding):
    """Prints a question as the model sees it: four rows of tokens, in each the ones that count, and the true ending."""
    context, endings, label = question
    for i, ending in enumerate(endings):
        print(f"\nending {i}" + (" (the true one: the label)" if i == label else ""))
        print("  text  ", repr(encoding.decode(context + ending)))
        print("  tokens", *context + ending)
        print("  mask  ", *[0] * len(context) + [1] * len(ending), "(1: the model's loss for this token counts)")


@torch.no_grad()
def predict(model, questions, prefill=None, device="cpu", tokens_at_once=4096):
    """
    Which ending the model finds likeliest, for each question: a tensor (questions, 2), by summed loss and by loss per token.
    model(idx (B, T)) -> logits (B, T, V). A model with a kv cache can save the work of reading each context four times:
    prefill(contexts (B, T), room) computes them once and returns a function (rows, targets (4B, T')) -> losses (scored,) that continues every
    context with four rows, one after the other, of at most `room` tokens, and gives the loss of every target that is not -1.
    """
    # Questions whose contexts are equally long go together, so contexts need no padding; endings of like lengths need little.
    # Padding comes after what is scored, where a causal model can't see it.
    def lengths(i):
        return len(questions[i][0]), max(map(len, questions[i][1]))

    best = torch.empty(len(questions), 2, dtype=torch.long)
    for T, group in groupby(sorted(range(len(questions)), key=lengths), key=lambda i: lengths(i)[0]):
        group = list(group)
        while group:
            room = lengths(group[-1])[1]  # the longest ending left: batches are cut off the end
            B = max(1, tokens_at_once // (4 * (room if prefill else T + room)))
            batch, group = group[-B:], group[:-B]
            contexts = torch.tensor([questions[i][0] for i in batch])  # (B, T)
            targets = torch.full((4 * len(batch), room), -1)  # (4B, room), -1 where an ending is shorter
            for row, ending in zip(targets, (ending for i in batch for ending in questions[i][1])):
                row[:len(ending)] = torch.tensor(ending)
            # what predicts an ending is the context's last token and the ending but for its last
            rows = torch.cat([contexts[:, -1:].repeat_interleave(4, 0), targets[:, :-1].clamp(min=0)], 1)  # (4B, room)
            contexts, rows, targets = contexts[:, :-1].to(device), rows.to(device), targets.to(device)
            scored = targets >= 0
            if prefill:
                losses = prefill(contexts, room)(rows, targets)
            else:
                logits = model(torch.cat([contexts.repeat_interleave(4, 0), rows], 1))[:, T - 1:][scored]
                losses = F.cross_entropy(logits.float(), targets[scored], reduction="none")
            loss = torch.zeros_like(targets, dtype=torch.float32)
            loss[scored] = losses
            total = loss.sum(1).view(-1, 4)  # (B, 4)
            best[batch] = torch.stack([total.argmin(1), (total / scored.sum(1).view(-1, 4)).argmin(1)], 1).cpu()
    return best


def evaluate(model, questions, prefill=None, device="cpu"):
    """
    (acc, acc_norm) of a model on the questions of `load_questions`; see `predict`. Where torch.distributed runs, each process
    answers its share and the counts are summed: all of them must call it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = list(islice(questions, rank, None, world))
    labels = torch.tensor([label for *_, label in mine]).view(-1, 1)
    right = (predict(model, mine, prefill, device) == labels).sum(0).to(device)  # (2,)
    if world > 1:
        dist.all_reduce(right)
    acc, acc_norm = (right.cpu() / len(questions)).tolist()
    return acc, acc_norm


if __name__ == "__main__":
    configure(globals())
    encoding = get_tokenizer(tokenizer)
    questions = load_questions(file, encoding)
    if not 0 <= number < len(questions):
        die(f"number={number}: {file} holds questions 0 to {len(questions) - 1}")
    print(f"{file}: {len(questions):,} questions; number {number}:")
    show_question(questions[number], encoding)
