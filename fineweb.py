"""
Text to token shards. Downloads FineWeb-Edu (sample-10BT, 28 GB of parquet files) from the Hugging
Face hub, or takes text of yours, and writes it as long arrays of token ids for train_gpt2.py.

    python fineweb.py                                   # 10 billion tokens: 100 shards, 20 GB
    python fineweb.py max_tokens=300000000              # downloads no more files than it needs
    python fineweb.py text=notes.txt data=notes val_tokens=10000                # text of your own
    python fineweb.py text=notes.txt data=notes val_tokens=10000 tokenizer=learn   # and its own BPE

It needs no GPU and uses all cores: some 5 million tokens a second on each.
A .txt file holds one document a line, a .jsonl one a line under "text", a .parquet one a row in the
column "text"; all in UTF-8. Each document begins with <|endoftext|>.
Shards are as build-nanogpt writes them, and its shards can be used too: edu_fineweb10B/
edufineweb_train_000001.npy, uint16, 100M tokens each; shard 0 is the validation set.
An interrupted run continues after the last whole shard if the same command is run again.

HF_ENDPOINT (a mirror of the hub) and HF_TOKEN (for gated files) are honoured.
This file also has what later files share: settings, error lines, files that are written whole,
downloads, and the tokenizer.
"""
import ast
import base64
import difflib
import functools
import glob
import hashlib
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

# --------------------------------------------------------------------------------------------------
# settings: `python fineweb.py name=value` overrides any of them

data = "edu_fineweb10B"     # folder for the shards
text: str = None            # .txt/.jsonl/.parquet: files, folders, globs: a,b; None = FineWeb-Edu
tokenizer = "gpt2"          # gpt2 | a .tiktoken file | learn: byte pairs of the text itself
vocab_size = 512            # >= 257: size of a learned vocabulary
shard_size = 100_000_000    # >= 1: tokens in a training shard
val_tokens = 100_000_000    # >= 1: tokens in shard 0, the validation set
max_tokens: int = None      # >= 1: stop after this many tokens; None = all

EOT = "<|endoftext|>"       # begins a document; also BOS and EOS of captions
# GPT-2 cuts text into words before it merges byte pairs: no token spans two words.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The look-ahead (?!\S) keeps tiktoken from its fast regular expressions. It matters only where two
# white space characters follow each other. Most documents have none, and for those this pattern
# gives the same words, twice as fast.
SPLIT_SINGLE_SPACED = r" ?\p{L}+| ?\p{N}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+|\s"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# --------------------------------------------------------------------------------------------------
# settings from the command line, for every script of the project


def die(message):
    """Ends the run with one line for a person, and exit code 2."""
    # the newline ends a progress bar that may be on the screen
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


class Setting(NamedTuple):
    default: object
    kind: type          # int, float, str or bool; the annotation says it of a None default
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
    A comment begins with what the setting accepts: `>= 1: ...`, `one of a | b: ...`.
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


# --------------------------------------------------------------------------------------------------
# downloads


def hub():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def download(url, path, tries=8):
    """
    Fetches `url` into the file `path` and returns `path`. A file that exists is not fetched again.
    After a cut connection, a 429 or a 5xx it tries again, each time after twice the pause, from the
    byte where it stopped. The file gets its name when it is whole. HF_TOKEN is sent to the hub (or
    its mirror) only. Ends the run with one line if the file cannot be had.
    """
    if os.path.exists(path):
        return path
    import requests
    from tqdm import tqdm

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part, token, from_hub = path + ".part", os.environ.get("HF_TOKEN"), url.startswith(hub())
    headers = {"User-Agent": "nanocaption (a tutorial; python-requests)"}
    if token and from_hub:
        headers["Authorization"] = f"Bearer {token}"
    pause, problem = 1.0, ""
    for attempt in range(tries):
        if attempt:
            print(f"{problem}; trying again in {pause:.0f} s ({url})", flush=True)
            time.sleep(pause)
            pause *= 2
        n_done = os.path.getsize(part) if os.path.exists(part) else 0
        if n_done:
            headers["Range"] = f"bytes={n_done}-"
        else:
            headers.pop("Range", None)
        try:
            with requests.get(url, headers=headers, stream=True, timeout=30) as response:
                status = response.status_code
                if status == 429 or status >= 500:
                    problem = f"the server answers {status}"
                    seconds = re.sub(r"\D", "", response.headers.get("Retry-After", ""))
                    pause = max(pause, min(float(seconds or 0), 300))
                    continue
                if status == 416:  # the part is longer than the file: it is of another file
                    os.remove(part)
                    problem = "the part on disk is not of this file"
                    continue
                if status not in (200, 206):
                    licence = "; if it needs a licence, accept it on the site and set HF_TOKEN"
                    die(f"{url}: the server answers {status} {response.reason}"
                        + (licence if from_hub and status in (401, 403) else ""))
                kind = response.headers.get("Content-Type", "")
                if kind.startswith("text/html") and not path.endswith((".html", ".htm")):
                    die(f"{url}: the answer is a web page, not the file: does this network ask for "
                        "a login?")
                if status == 200:  # the whole file, whatever was asked for
                    n_done = 0
                length = response.headers.get("Content-Length")
                total = None
                if length and "Content-Encoding" not in response.headers:
                    total = n_done + int(length)
                with open(part, "ab" if n_done else "wb") as f, tqdm(
                        total=total, initial=n_done, unit="B", unit_scale=True, mininterval=1,
                        desc=os.path.basename(path)) as bar:
                    for chunk in response.iter_content(1 << 16):
                        f.write(chunk)
                        bar.update(len(chunk))
                    f.flush()
                    os.fsync(f.fileno())
        except (requests.ConnectionError, requests.Timeout,
                requests.exceptions.ChunkedEncodingError) as error:
            problem = f"no answer ({type(error).__name__})"
            continue
        except requests.RequestException as error:  # such as a malformed address
            die(f"{url}: {error}")
        except OSError as error:
            die(f"{part} could not be written ({error}): make room on the disk and run the same "
                "command again, it continues from there")
        size = os.path.getsize(part)
        if total is None or size == total:
            os.replace(part, path)
            return path
        problem = f"got {size:,} of {total:,} bytes"
        if size > total:
            os.remove(part)
    die(f"could not download {url}: {problem}, {tries} times. Run the same command again to "
        f"continue, or put the file at {path} yourself")


# --------------------------------------------------------------------------------------------------
# tokenizers: GPT-2's, or one learned from a small text


def get_tokenizer(source="gpt2"):
    """
    A tiktoken.Encoding with <|endoftext|> as its last id. source: "gpt2", the path of a .tiktoken
    file (a line for each token: its bytes in base64, its id), or the text of such a file, which is
    how checkpoints carry it.
    """
    import tiktoken

    if source == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as problem:  # tiktoken passes on whatever its download raises
            die(f"GPT-2's vocabulary could not be fetched ({type(problem).__name__}): connect "
                "once, or set TIKTOKEN_CACHE_DIR to a folder that holds it")
    name, lines = "the tokenizer", source
    if "\n" not in source:
        if not os.path.isfile(source):
            die(f"tokenizer={source}: gpt2, or a .tiktoken file, and there is no such file")
        name = source
        with open(source, encoding="utf-8") as f:
            lines = f.read()
    ranks = {}
    try:
        for line in filter(str.strip, lines.splitlines()):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("the ids are not 0, 1, 2, ...")
        if any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError("not every byte is a token")
    except ValueError as problem:
        die(f"{name} is not a .tiktoken file ({problem}): a line is a token in base64 and its id")
    return tiktoken.Encoding("learned", pat_str=SPLIT, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def tiktoken_text(tokens):
    """Tokens (bytes) in the order of their ids -> the text of a .tiktoken file."""
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    return "".join(lines)


def learn_bpe(documents, vocab_size):
    """
    Byte pair encoding (Sennrich et al. 2016, on bytes as in GPT-2). It starts from the 256 bytes.
    Again and again, the most frequent pair of neighbours becomes a token. Returns the text of a
    .tiktoken file.
    """
    import regex  # comes with tiktoken; like re, but knows \p{L}

    counts = Counter(word for document in documents for word in regex.findall(SPLIT, document))
    # half a surrogate pair, which json can hold and UTF-8 cannot, is replaced
    words = {word: [bytes([b]) for b in word.encode("utf-8", "replace")] for word in counts}
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
    return tiktoken_text(tokens)


def bytes_to_unicode():
    """OpenAI's spelling of bytes in vocab.json: {byte: a printable character}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable}
    return letters | {b: chr(256 + n) for n, b in enumerate(others)}


def vocab_and_merges(encoding):
    """
    A tokenizer as OpenAI published GPT-2's, and as `transformers` reads it: the bytes of
    vocab.json, {token: id}, and of merges.txt, the pairs in the order in which they are merged.
    """
    ranks, letters = encoding._mergeable_ranks, bytes_to_unicode()

    def spell(token):
        return "".join(letters[b] for b in token)

    merges = ["#version: 0.2"]
    for token in sorted(ranks, key=ranks.get):
        # apply the earlier merges; two parts remain, the pair that became this token
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = pair_ranks.index(min(pair_ranks))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(spell, parts)))
    vocab = {spell(token): rank for token, rank in ranks.items()} | {EOT: encoding.eot_token}
    return json.dumps(vocab).encode(), "\n".join(merges + [""]).encode()


def read_vocab(folder):
    """
    The tokenizer of a folder in Hugging Face's layout, from its vocab.json: the text of a
    .tiktoken file, or "gpt2" if it is GPT-2's own.
    """
    path = os.path.join(folder, "vocab.json")
    byte_of = {letter: b for b, letter in bytes_to_unicode().items()}
    try:
        with open(path, encoding="utf-8") as f:
            vocab = json.load(f)
        names = sorted(vocab, key=vocab.get)
        if names[-1] != EOT:
            raise ValueError(f"its last token is not {EOT}")
        tokens = [bytes(byte_of[letter] for letter in name) for name in names[:-1]]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as problem:
        die(f"{path} is not a vocabulary as GPT-2 has it ({type(problem).__name__}: {problem})")
    text = tiktoken_text(tokens)
    return "gpt2" if hashlib.sha256(text.encode()).hexdigest() == GPT2_SHA256 else text


# --------------------------------------------------------------------------------------------------
# documents


def text_files(pattern):
    """The local files that `text=` names, in a fixed order."""
    paths = []
    for part in pattern.split(","):
        found = [part] if os.path.isfile(part) else glob.glob(part)
        if os.path.isdir(part):
            found = glob.glob(os.path.join(glob.escape(part), "**"), recursive=True)
        endings = (".txt", ".jsonl", ".parquet")
        found = sorted(path for path in found if path.endswith(endings) and os.path.isfile(path))
        if not found:
            die(f"text={part}: no .txt, .jsonl or .parquet file there")
        paths += found
    return paths


def fineweb_files():
    """The parquet files of FineWeb-Edu's 10BT sample; each is downloaded when it is asked for."""
    repo, folder = "datasets/HuggingFaceFW/fineweb-edu", os.path.join(data, "parquet")
    listing = download(f"{hub()}/api/{repo}/tree/main/sample/10BT",
                       os.path.join(folder, "files.json"))
    try:
        with open(listing, encoding="utf-8") as f:
            names = sorted(entry["path"] for entry in json.load(f))
    except (ValueError, KeyError, TypeError):
        die(f"{listing} is not a list of files of the hub: delete it and run this again")
    for name in names:
        if name.endswith(".parquet"):
            yield download(f"{hub()}/{repo}/resolve/main/{name}",
                           os.path.join(folder, os.path.basename(name)))


def read_documents(paths):
    """
    Yields every document of the files, as a string. Empty and null ones are left out. Text that is
    not UTF-8, or is no text, ends the run with one line that says where.
    """
    for path in paths:
        rows = read_parquet(path) if path.endswith(".parquet") else read_lines(path)
        for number, document in enumerate(rows, 1):
            if document is None:
                continue
            if not isinstance(document, str):
                die(f"{path}, row {number}: \"text\" is {document!r:.60}, not text")
            if document.strip():
                yield document


def read_lines(path):
    """Yields the documents of a .txt or .jsonl file."""
    try:
        # "-sig": a byte order mark at the beginning is no text
        with open(path, encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if "\0" in line:
                    die(f"{path}, line {number} holds zero bytes: save the file in UTF-8")
                if not line.strip():
                    yield None
                elif path.endswith(".jsonl"):
                    try:
                        yield json.loads(line)["text"]
                    except (ValueError, KeyError, TypeError):
                        die(f"{path}, line {number}: not a json object with a \"text\": "
                            f"{line[:60]!r}")
                else:
                    yield line.strip()
    except UnicodeDecodeError as problem:
        die(f"{path} is not UTF-8 ({problem.reason}): convert it, such as with `iconv -t utf-8`")


def read_parquet(path):
    """Yields the rows of the column "text"."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            die(f"{path} has no column \"text\"")
        for batch in file.iter_batches(1024, columns=["text"]):
            yield from batch.column("text").to_pylist()
    except (pyarrow.ArrowException, OSError) as problem:
        die(f"{path} is not a whole .parquet file ({problem})")


# --------------------------------------------------------------------------------------------------
# documents -> tokens -> shards


@functools.lru_cache
def single_spaced(encoding):
    """
    The same tokenizer with the fast pattern, SPLIT_SINGLE_SPACED. It takes a third of a second to
    build. The special tokens are passed on, though no text is searched for them: without any,
    tiktoken searches with an empty pattern, which matches everywhere.
    """
    import tiktoken

    return tiktoken.Encoding("single-spaced", pat_str=SPLIT_SINGLE_SPACED,
                             mergeable_ranks=encoding._mergeable_ranks,
                             special_tokens=encoding._special_tokens)


def pieces(document):
    """
    Cuts a document after every 1,000 white space characters in a row. tiktoken's pattern fails on
    rows of hundreds of thousands.
    """
    ends = [match.end() for match in re.finditer(r"\s{1000}", document)]
    return [document[a:b] for a, b in zip([0, *ends], [*ends, len(document)])]


def tokenize(documents, encoding):
    """
    Yields a uint16 array for each document, in order: <|endoftext|>, then its tokens. It uses all
    cores: tiktoken releases Python's global lock.
    """
    two_spaces, fast = re.compile(r"\s\s"), single_spaced(encoding)

    def encode(document):
        tokens = [np.array([encoding.eot_token], np.uint16)]
        for piece in pieces(document):
            tokenizer = encoding if two_spaces.search(piece) else fast
            try:
                ids = tokenizer.encode_to_numpy(piece, disallowed_special=())
            except UnicodeEncodeError:  # half a surrogate pair; encode_ordinary replaces it
                ids = encoding.encode_ordinary(piece)
            tokens.append(np.array(ids, np.uint16))
        return np.concatenate(tokens)

    def encode_batch(batch):
        return [encode(document) for document in batch]

    documents, n_threads = iter(documents), os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        pending = deque()
        while batch := list(islice(documents, 256)):
            pending.append(pool.submit(encode_batch, batch))
            if len(pending) > 2 * n_threads:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


def all_tokens(paths, encoding, n_skip):
    """
    Yields the token arrays of all documents but the first n_skip. File by file: tokenize reads
    ahead, and the next file may still have to be downloaded.
    """
    for path in paths:
        documents = read_documents([path])
        n_skip -= sum(1 for _ in islice(documents, n_skip))
        yield from tokenize(documents, encoding)


def limit(arrays, n):
    """Yields the first n tokens of some arrays, and asks for no array after that. n=None: all."""
    for tokens in arrays:
        yield tokens[:n]
        if n is not None:
            n -= len(tokens)
            if n <= 0:
                return


def cut_into_shards(arrays, sizes, n_documents, offset):
    """
    Yields (shard, n_documents, offset): the arrays, end to end, in pieces of the given sizes, the
    last one shorter; and how far they go: n_documents whole ones and `offset` tokens of the next.
    n_documents, offset: the same for what was written before; the arrays begin with the next
    document, whole.
    """
    size, parts, n_tokens = next(sizes), [], 0
    for tokens in arrays:
        tokens = tokens[offset:]
        while n_tokens + len(tokens) >= size:
            take = size - n_tokens
            offset += take
            yield np.concatenate([*parts, tokens[:take]]), n_documents, offset
            tokens = tokens[take:]
            size, parts, n_tokens = next(sizes), [], 0
        parts.append(tokens)
        n_tokens += len(tokens)
        n_documents, offset = n_documents + 1, 0
    if n_tokens:
        yield np.concatenate(parts), n_documents, 0


def read_progress(path, run_settings):
    """
    progress.json: the settings of the run; how many shards, documents and tokens are done; and how
    many tokens of the next document (offset). Ends the run if the settings have changed.
    """
    if not os.path.exists(path):
        return run_settings | dict(shards=0, documents=0, offset=0, tokens=0)
    try:
        with open(path, encoding="utf-8") as f:
            progress = json.load(f)
        progress["shards"] + progress["documents"] + progress["offset"] + progress["tokens"]
    except (ValueError, KeyError, TypeError):
        die(f"{path} is damaged: delete {os.path.dirname(path)} and begin again")
    for name, value in run_settings.items():
        if name in progress and progress[name] != value:
            if name == "files":
                die(f"the files of text= have changed since {os.path.dirname(path)} was begun: "
                    "put them back as they were, or take another data=")
            die(f"{os.path.dirname(path)} was begun with {name}={progress[name]}, not {value}: "
                "use the same setting, another data=, or delete the folder")
    return progress


# --------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    print_settings(configure(globals()))
    if max_tokens and max_tokens <= val_tokens:
        die(f"max_tokens={max_tokens:,} leaves nothing to train on: the first "
            f"val_tokens={val_tokens:,} are the validation set")
    if tokenizer == "learn" and not text:
        die("tokenizer=learn needs text=: it reads the text twice")
    paths = text_files(text) if text else fineweb_files()
    run_settings = dict(text=text, tokenizer=tokenizer, shard_size=shard_size,
                        val_tokens=val_tokens, max_tokens=max_tokens)
    if text:
        run_settings["files"] = [[os.path.basename(path), os.path.getsize(path)] for path in paths]
    if tokenizer == "learn":
        run_settings["vocab_size"] = vocab_size
    lock_folder(data)
    progress_file = os.path.join(data, "progress.json")
    begun = os.path.exists(progress_file)
    if not begun and glob.glob(os.path.join(glob.escape(data), "*.npy")):
        die(f"{data} holds shards that another program wrote, or parts of them: take another data=")
    progress = read_progress(progress_file, run_settings)
    if progress.get("done"):
        print(f"{data} is complete: {progress['tokens']:,} tokens in {progress['shards']} shards")
        sys.exit(0)

    # A vocabulary of its own lies beside the shards, where train_gpt2.py finds it.
    tokenizer_file = os.path.join(data, "tokenizer.tiktoken")
    if not begun:
        with suppress(FileNotFoundError):  # from a run that failed
            os.remove(tokenizer_file)
        if tokenizer == "learn":
            merges = learn_bpe(read_documents(paths), vocab_size)
            save_atomically(tokenizer_file, lambda f: f.write(merges.encode()))
        elif tokenizer != "gpt2":
            ranks = get_tokenizer(tokenizer)._mergeable_ranks
            own_text = tiktoken_text(sorted(ranks, key=ranks.get))
            save_atomically(tokenizer_file, lambda f: f.write(own_text.encode()))
    if tokenizer != "gpt2":
        tokenizer = tokenizer_file
    encoding = get_tokenizer(tokenizer)
    if encoding.n_vocab > 2**16:
        die(f"tokenizer={tokenizer} has {encoding.n_vocab:,} tokens: shards hold 16-bit ids, at "
            "most 65,536")
    print(f"tokenizer: {tokenizer}, {encoding.n_vocab:,} tokens")

    n_left = None
    if max_tokens:
        # the next document is read whole: its first tokens are in a shard already
        n_left = max_tokens - progress["tokens"] + progress["offset"]
    arrays = limit(all_tokens(paths, encoding, progress["documents"]), n_left)
    shard = progress["shards"]
    sizes = iter(lambda: val_tokens if shard == 0 else shard_size, None)
    t0, tokens_before = time.time(), progress["tokens"]
    for tokens, n_documents, offset in cut_into_shards(arrays, sizes, progress["documents"],
                                                       progress["offset"]):
        split = "val" if shard == 0 else "train"
        shard += 1
        path = os.path.join(data, f"edufineweb_{split}_{shard - 1:06d}.npy")
        save_atomically(path, lambda f: np.save(f, tokens))
        progress |= dict(shards=shard, documents=n_documents, offset=offset,
                         tokens=progress["tokens"] + len(tokens))
        save_atomically(progress_file, lambda f: f.write(json.dumps(progress, indent=1).encode()))
        speed = (progress["tokens"] - tokens_before) / (time.time() - t0) / 1e6
        print(f"shard {shard - 1} ({split}): {len(tokens):,} tokens | {progress['tokens']:,} so far "
              f"| {speed:.2f}M tokens/s", flush=True)
    if progress["shards"] < 2:
        for path in glob.glob(os.path.join(glob.escape(data), "edufineweb_val_*.npy")):
            os.remove(path)
        for path in (progress_file, tokenizer_file):
            with suppress(FileNotFoundError):
                os.remove(path)
        die(f"the text has {progress['tokens']:,} tokens, and the first val_tokens={val_tokens:,} "
            "are the validation set: nothing is left to train on; lower val_tokens=")
    progress["done"] = True
    save_atomically(progress_file, lambda f: f.write(json.dumps(progress, indent=1).encode()))
