"""
Text in, token shards out: the first stage. Downloads FineWeb-Edu (sample-10BT, 28 GB of parquet files) from the Hugging Face
hub, or takes any text of yours, and writes it as the GPT will read it: long arrays of token ids.

    python fineweb.py                                     # all 10 billion tokens: 100 shards, 20 GB
    python fineweb.py max_tokens=300000000                # stop early; downloads no more than it needs
    python fineweb.py text=notes.txt data=notes val_tokens=10000                          # your own text
    python fineweb.py text=notes.txt data=notes val_tokens=10000 tokenizer=learn          # ... in a vocabulary of its own

Shards are what build-nanogpt writes, so shards that exist already work: `edu_fineweb10B/edufineweb_train_000001.npy`,
uint16, 100M tokens each, shard 0 is the validation set. Each document is opened (not closed) by <|endoftext|>.
A .txt file holds one document a line, a .jsonl one a line under "text", a .parquet one a row in column "text".
Interrupted, it goes on after the last whole shard.

HF_ENDPOINT (a mirror of the hub) and HF_TOKEN (for gated files) are honoured.
This file also owns three things that every later file uses: `configure`, `download` and `get_tokenizer`.
"""
import ast
import base64
import difflib
import functools
import glob
import json
import math
import operator
import os
import platform
import re
import shlex
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python fineweb.py name=value` overrides any of them

data = "edu_fineweb10B"     # folder for the shards
text: str = None            # local .txt/.jsonl/.parquet: a file, folder or glob (several: a,b); None = download FineWeb-Edu
tokenizer = "gpt2"          # "gpt2", a .tiktoken file, or "learn": byte pairs learned from the text itself
vocab_size = 512            # >= 257: how large a learned vocabulary may become
shard_size = 100_000_000    # >= 1: tokens in a training shard
val_tokens = 100_000_000    # >= 1: tokens in shard 0, the validation set
max_tokens: int = None      # >= 1: stop after so many tokens, None = all

EOT = "<|endoftext|>"       # separates documents; also the captioner's first (BOS) and last (EOS) token
# GPT-2's way to cut text into words before byte pairs are merged: no token ever spans two words
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The look-ahead (?!\S) keeps tiktoken from its fast regular expressions, and matters only where white space stands in a row.
# Nearly all documents have none, and for those this says the same:
SPLIT_SINGLE_SPACED = r" ?\p{L}+| ?\p{N}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+|\s"

# --------------------------------------------------------------------------------------------------
# settings from the command line, for every script of the project


def die(message):
    """Ends the run with one line for a person, and exit code 2."""
    # the newline ends a progress bar that may be on the screen
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


class Setting(NamedTuple):
    default: object
    kind: type          # int, float, str or bool; of a setting whose default is None, its annotation
    accepts: str        # ">= 1", "> 0, <= 1", "one of a | b", or "": the beginning of the comment
    comment: str


def read_settings(source):
    """
    The settings that the text of a script declares, as {name: Setting}: its lowercase variables at
    module level whose value is a number, a string, True, False or None. No other variable can be
    set from the command line.
    """
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            continue
        if not isinstance(target, ast.Name) or not target.id.islower():
            continue
        if not isinstance(default, (int, float, str, type(None))):
            continue
        kind = type(default)
        if isinstance(node, ast.AnnAssign):
            kind = {"int": int, "float": float, "str": str, "bool": bool}[node.annotation.id]
        comment = lines[node.end_lineno - 1][node.end_col_offset:].strip(" #")
        accepts = re.match(r"one of [\w |.-]+(?=[:;]|$)|([<>]=? [\d.e-]+(, )?)+(?=[:;]|$)", comment)
        found[target.id] = Setting(default, kind, accepts[0] if accepts else "", comment)
    return found


def parse_setting(name, text, setting):
    """The value that `name=text` stands for; ends the run if it is not what the setting accepts."""
    default, kind, accepts, _ = setting
    if not text or (text == "None" and kind is str):
        die(f"{name}={text} gives no value: leave {name}= out, or say what it is to be")
    if kind is str:
        value = re.sub(r"(^|,)~(?=/|$)", lambda home: home[1] + os.path.expanduser("~"), text)
        allowed = accepts.removeprefix("one of ").split(" | ")
        if accepts and value not in allowed:
            die(f"{name}={text}: {name} is one of {', '.join(allowed)}")
        if name in ("data", "out_dir", "export"):
            for path in value.split(","):
                if os.path.lexists(path) and not os.path.isdir(path):
                    die(f"{name}={text}: {path} is not a folder")
        return value
    try:  # 1e-3, 1_000, True and None are read as Python reads them
        value = ast.literal_eval(text.title() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        value = text
    if value is None and default is None:
        return None
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # max_tokens=1e9
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        what = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        die(f"{name}={text}: {name} takes {what}" + f", such as {default}" * (default is not None))
    compare = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
    for sign, bound in re.findall(r"([<>]=?) ([\d.e-]+)", accepts):
        if not compare[sign](value, float(bound)):
            die(f"{name}={text}: {name} must be {accepts}")
    return value


def configure(module, preset=None, positional=()):
    """
    Sets the settings of the calling script, whose `globals()` are `module`: the defaults in its
    text, then what `preset` returns, then the command line, `name=value` or `--name=value`. Bare
    words fill the names in `positional`, in order.
    preset(typed) -> {name: value}; typed is {name: value} of the command line.
    What a setting accepts is said at the beginning of its comment: `>= 1: ...`, `one of a | b: ...`.
    Names that no longer exist are in the script's RENAMED, {old: new}.
    Returns all settings as a dict. A wrong name or value ends the run with one line.
    """
    # a terminal that lacks a letter shows "?" for it: that must not end a run
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")
    with open(module["__file__"], encoding="utf-8") as f:
        source = f.read()
    settings, renamed = read_settings(source), module.get("RENAMED", {})
    if {"--help", "-h", "help"} & {*sys.argv[1:]}:
        print(ast.get_docstring(ast.parse(source)), "\n\nsettings:")
        for name, setting in settings.items():
            print(f"  {f'{name}={setting.default}':36} {setting.comment}")
        sys.exit(0)
    typed, bare = {}, iter(positional)
    for word in sys.argv[1:]:
        name, equals, text = word.partition("=")
        name = name.removeprefix("--")
        if not equals:
            name, text = next(bare, None), word
            if name is None:
                die(f"'{word}' is not a setting: write name=value (--help lists all settings)")
        if name in renamed:
            die(f"{name}= is now called {renamed[name]}=")
        if name not in settings:
            near = difflib.get_close_matches(name, settings, 1, 0.0)
            die(f"unknown setting '{name}': did you mean '{near[0]}'? (--help lists them all)")
        typed[name] = parse_setting(name, text, settings[name])
    defaults = {name: setting.default for name, setting in settings.items()}
    final = defaults | (preset(typed) if preset else {}) | typed
    module.update(final)
    return final


def print_settings(config):
    """Prints the final settings as the words that would give them again."""
    words = [f"{name}={value}" for name, value in config.items() if value is not None]
    print("settings:", shlex.join(words), flush=True)


# --------------------------------------------------------------------------------------------------
# files


def save_atomically(path, write):
    """
    `write(file)` fills a temporary file, which is flushed to the disk and then takes its name in
    one step: a reader never meets half a file, not even after a power cut. If the disk is full,
    the run ends with one line, and what was at `path` before is still there.
    """
    try:
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as problem:  # torch.save turns an OSError into a RuntimeError
        die(f"{path} could not be written ({str(problem).splitlines()[0]}): "
            "make room on the disk; what was there before is unharmed")
    finally:
        with suppress(FileNotFoundError):
            os.remove(path + ".tmp")


LOCKS = {}  # {folder: open file}: a lock lasts until its process ends, however it ends


def lock_folder(folder):
    """Makes the folder and this process its one writer. Ends the run if another process writes."""
    os.makedirs(folder, exist_ok=True)
    folder = os.path.realpath(folder)
    try:
        import fcntl
    except ImportError:  # Windows
        return
    if folder in LOCKS:
        return
    file = open(os.path.join(folder, ".lock"), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        die(f"{folder} is being written by another run ({file.read().strip()}): wait for its end, "
            "stop it, or take another folder")
    except OSError:  # a file system without locks
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}: {shlex.join(sys.argv)}\n")
    file.flush()
    LOCKS[folder] = file


# ----------------------------------------------------------------------------------------------------------------------
# files from the net


def download(url, path, tries=8):
    """
    Fetches `url` into the file `path` and returns `path`; a file that is there already is not fetched again.
    A cut connection, a 429 or a 5xx is tried again after a pause that doubles, going on at the byte where it stopped.
    The file appears under its name only when it is whole. HF_TOKEN is sent to the hub (or its mirror, HF_ENDPOINT) and to nobody else.
    """
    if os.path.exists(path):
        return path
    import requests
    from tqdm import tqdm

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part, token = path + ".part", os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token and url.startswith(hub()) else {}
    pause, trouble = 1.0, ""
    for attempt in range(tries):
        if attempt:
            print(f"{trouble}; trying again in {pause:.0f} s ({url})", flush=True)
            time.sleep(pause)
            pause *= 2
        have = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            with requests.get(url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}), stream=True, timeout=30) as answer:
                if answer.status_code in (401, 403):
                    die(f"{url}: the server says {answer.status_code}; if it needs a licence, accept it on the site and set HF_TOKEN")
                if answer.status_code == 429 or answer.status_code >= 500:
                    trouble = f"the server says {answer.status_code}"
                    pause = max(pause, min(float(re.sub(r"\D", "", answer.headers.get("Retry-After", "")) or 0), 300))
                    continue
                if answer.status_code == 416:  # we hold more bytes than the file has: another file's leftovers
                    os.remove(part)
                    trouble = "the part on disk is not of this file"
                    continue
                if answer.status_code not in (200, 206):
                    die(f"{url}: the server says {answer.status_code} {answer.reason}")
                if answer.status_code == 200:  # all of it, whatever part we asked for
                    have = 0
                length = answer.headers.get("Content-Length")
                total = have + int(length) if length and "Content-Encoding" not in answer.headers else None
                with open(part, "ab" if have else "wb") as f, tqdm(
                        total=total, initial=have, unit="B", unit_scale=True, desc=os.path.basename(path), mininterval=1) as bar:
                    for chunk in answer.iter_content(1 << 16):  # what is cut off is lost, but for whole chunks
                        f.write(chunk)
                        bar.update(len(chunk))
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as problem:
            trouble = f"no answer ({type(problem).__name__})"
            continue
        except requests.RequestException as problem:  # a malformed address, say
            die(f"{url}: {problem}")
        except OSError as problem:
            die(f"{part} could not be written ({problem}): make room on the disk and run the same command again, it goes on from there")
        size = os.path.getsize(part)
        if total is None or size == total:
            os.replace(part, path)
            return path
        trouble = f"got {size:,} of {total:,} bytes"
        if size > total:
            os.remove(part)
    die(f"could not download {url}: {trouble}, {tries} times. Run the same command again to go on, or put the file at {path} yourself")


def hub():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers: GPT-2's, or one learned from a small text


def get_tokenizer(source="gpt2"):
    """
    A tiktoken.Encoding with <|endoftext|> as its last id. `source` is "gpt2", the path of a .tiktoken file (a line for each
    token: its bytes in base64, its id), or such a file's text, which is how checkpoints carry it.
    """
    import tiktoken

    if source == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as problem:  # tiktoken passes on whatever its download raises
            die(f"GPT-2's vocabulary could not be fetched ({type(problem).__name__}): "
                "connect once, or set TIKTOKEN_CACHE_DIR to a folder that holds it")
    if "\n" not in source and not os.path.isfile(source):
        die(f"tokenizer {source}: gpt2, or a .tiktoken file, and there is no such file")
    lines = source if "\n" in source else open(source).read()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines.splitlines())}
    return tiktoken.Encoding("learned", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def learn_bpe(documents, vocab_size):
    """
    Byte pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): start from the 256 bytes; again and again, the most
    frequent pair of neighbours becomes a token of its own. Returns the text of a .tiktoken file.
    """
    import regex  # comes with tiktoken; like re, but knows \p{L}

    counts = Counter(word for document in documents for word in regex.findall(SPLIT, document))
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:  # one id is left for <|endoftext|>
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break  # every word is one token
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        tokens.append(a + b)
        for parts in words.values():
            for i in range(len(parts) - 2, -1, -1):
                if parts[i:i + 2] == [a, b]:
                    parts[i:i + 2] = [a + b]
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def vocab_and_merges(encoding):
    """
    A tokenizer as OpenAI published GPT-2's, and as `transformers` reads it: the bytes of vocab.json, {token: id}, and of merges.txt, the
    pairs in the order in which they are merged. Both spell every byte as a printable character.
    """
    ranks = encoding._mergeable_ranks
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(sorted({*range(256)} - {*printable}))}

    def spell(token):
        return "".join(letters[b] for b in token)

    merges = ["#version: 0.2"]
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # merge as the tokens before this one do: the two parts that are left are the pair that made it
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(spell, parts)))
    vocab = {spell(token): rank for token, rank in ranks.items()} | {EOT: encoding.eot_token}
    return json.dumps(vocab).encode(), "\n".join(merges + [""]).encode()


# ----------------------------------------------------------------------------------------------------------------------
# documents -> tokens -> shards


def text_files(pattern):
    """The local files that `text=` names, in a fixed order."""
    paths = []
    for part in pattern.split(","):
        found = glob.glob(os.path.join(part, "**"), recursive=True) if os.path.isdir(part) else glob.glob(part)
        found = sorted(p for p in found if p.endswith((".txt", ".jsonl", ".parquet")))
        if not found:
            die(f"text={part}: no .txt, .jsonl or .parquet file there")
        paths += found
    return paths


def fineweb_files():
    """The parquet files of FineWeb-Edu's 10BT sample, one after the other, each downloaded when it is asked for."""
    repo = "datasets/HuggingFaceFW/fineweb-edu"
    listing = download(f"{hub()}/api/{repo}/tree/main/sample/10BT", os.path.join(data, "parquet", "files.json"))
    for entry in sorted(json.load(open(listing)), key=lambda entry: entry["path"]):
        if entry["path"].endswith(".parquet"):
            yield download(f"{hub()}/{repo}/resolve/main/{entry['path']}", os.path.join(data, "parquet", os.path.basename(entry["path"])))


def read_documents(paths):
    """Yields every document of the files, as a string."""
    for path in paths:
        if path.endswith(".parquet"):
            import pyarrow.parquet

            try:
                batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024, columns=["text"])
            except (pyarrow.ArrowException, OSError) as problem:
                die(f"{path} is not a whole .parquet file ({problem})")
            for batch in batches:
                if "text" not in batch.schema.names:
                    die(f"{path} has no column \"text\"")
                yield from (text or "" for text in batch.column("text").to_pylist())
        else:
            with open(path, encoding="utf-8", errors="replace") as f:
                for line in f:
                    if line.strip():
                        try:
                            yield json.loads(line)["text"] + "" if path.endswith(".jsonl") else line.strip()
                        except (ValueError, KeyError, TypeError):
                            die(f"{path}: not a json object with a \"text\": {line[:60]!r}")


@functools.lru_cache
def single_spaced(encoding):
    """
    The same tokenizer for texts without white space in a row, which it cuts twice as fast. Built once: that takes a third of a second.
    It gets the special tokens too, which are never looked for: where there are none, tiktoken looks for nothing, and finds it everywhere.
    """
    import tiktoken

    return tiktoken.Encoding("single-spaced", pat_str=SPLIT_SINGLE_SPACED, mergeable_ranks=encoding._mergeable_ranks,
                             special_tokens=encoding._special_tokens)


def tokenize(documents, encoding):
    """Yields one uint16 array for each document, in order, on all cores: tiktoken works outside Python's global lock."""
    eot, in_a_row, fast = np.array([encoding.eot_token], np.uint16), re.compile(r"\s\s"), single_spaced(encoding)

    def encode(document):
        try:
            tokens = (encoding if in_a_row.search(document) else fast).encode_to_numpy(document, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, which json can hold and UTF-8 can't: encode_ordinary replaces it
            tokens = encoding.encode_ordinary(document)
        return np.concatenate([eot, tokens], dtype=np.uint16, casting="unsafe")

    documents, workers = iter(documents), os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        while batch := list(islice(documents, 256)):
            pending.append(pool.submit(lambda batch: [encode(document) for document in batch], batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


if __name__ == "__main__":
    print_settings(configure(globals()))
    if max_tokens and max_tokens <= val_tokens:
        die(f"max_tokens={max_tokens:,} leaves nothing to train on: the first val_tokens={val_tokens:,} are the validation set")
    paths = text_files(text) if text else fineweb_files()
    os.makedirs(data, exist_ok=True)

    progress_file = os.path.join(data, "progress.json")
    same = dict(text=text, tokenizer=tokenizer, shard_size=shard_size, val_tokens=val_tokens, max_tokens=max_tokens)
    if tokenizer != "gpt2":  # a vocabulary of its own goes with the shards: train_gpt2.py looks for it there
        if tokenizer == "learn":
            same |= dict(vocab_size=vocab_size)
        if not os.path.exists(progress_file):
            if tokenizer == "learn" and not text:
                die("tokenizer=learn needs text=: it reads the text twice")
            if tokenizer != "learn" and not os.path.isfile(tokenizer):
                die(f"tokenizer={tokenizer}: no such file")
            merges = learn_bpe(read_documents(paths), vocab_size) if tokenizer == "learn" else open(tokenizer).read()
            save_atomically(os.path.join(data, "tokenizer.tiktoken"), lambda f: f.write(merges.encode()))
        tokenizer = os.path.join(data, "tokenizer.tiktoken")
    encoding = get_tokenizer(tokenizer)
    if encoding.n_vocab > 2**16:
        die(f"tokenizer={tokenizer} has {encoding.n_vocab:,} tokens: shards hold 16-bit ids, 65,536 at most")
    print(f"tokenizer: {tokenizer}, {encoding.n_vocab:,} tokens")

    # A shard's number says where it belongs; progress.json says how many documents went into the shards written so far,
    # and how many tokens of the next document are in them already, so that a second run goes on at that very token.
    progress = json.load(open(progress_file)) if os.path.exists(progress_file) else same | dict(shards=0, documents=0, offset=0, tokens=0)
    for name, value in same.items():
        if progress.get(name) != value:
            die(f"{data} was begun with {name}={progress.get(name)}, not {value}: use the same setting, another data=, or delete the folder")
    shard, document, skip, total = progress["shards"], progress["documents"], progress["offset"], progress["tokens"]
    if progress.get("done"):
        print(f"{data}: {total:,} tokens in {shard} shards are there already")
        sys.exit(0)

    def write_shard(tokens, **state):
        split = "val" if shard == 0 else "train"
        save_atomically(os.path.join(data, f"edufineweb_{split}_{shard:06d}.npy"), lambda f: np.save(f, tokens))
        state = same | dict(shards=shard + 1, tokens=total) | state
        save_atomically(progress_file, lambda f: f.write(json.dumps(state, indent=1).encode()))
        speed = (total - before) / (time.time() - t0) / 1e6
        print(f"shard {shard} ({split}): {len(tokens):,} tokens | {total:,} tokens so far | {speed:.2f}M tokens/s", flush=True)

    t0, before = time.time(), total
    buffer = np.empty(val_tokens if shard == 0 else shard_size, dtype=np.uint16)
    used = 0

    def tokens_to_come(skip):
        for path in paths:  # file by file: tokenize reads ahead, and the next file may still have to be downloaded
            documents = read_documents([path])
            skip -= sum(1 for _ in islice(documents, skip))
            yield from tokenize(documents, encoding)

    for tokens in tokens_to_come(document):
        if max_tokens:
            if total + used == max_tokens:
                break
            tokens = tokens[:skip + max_tokens - total - used]
        while len(tokens) - skip >= len(buffer) - used:  # the document fills the shard: the rest of it opens the next one
            take = len(buffer) - used
            buffer[used:] = tokens[skip:skip + take]
            skip += take
            total += len(buffer)
            write_shard(buffer, documents=document, offset=skip)
            shard, used, buffer = shard + 1, 0, np.empty(shard_size, dtype=np.uint16)
        buffer[used:used + len(tokens) - skip] = tokens[skip:]
        used += len(tokens) - skip
        document, skip = document + 1, 0
    if shard == 0:
        die(f"the text has only {used:,} tokens, and val_tokens={val_tokens:,} of them were to be the validation set: lower val_tokens=")
    total += used
    if used:
        write_shard(buffer[:used], documents=document, offset=0, done=True)
    else:  # the last shard came out exactly full
        save_atomically(progress_file, lambda f: f.write(json.dumps(json.load(open(progress_file)) | dict(done=True), indent=1).encode()))
