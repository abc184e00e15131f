"""
Text in, token shards out: the first stage. Takes FineWeb-Edu (sample-10BT, 28 GB, downloaded from
the Hugging Face hub) or your own text, and writes the token ids that the GPT reads.

    python fineweb.py                             # all 10 billion tokens: 100 shards, 20 GB
    python fineweb.py max_tokens=300000000        # stops early, downloads no more than it needs
    python fineweb.py text=notes.txt data=notes val_tokens=10000        # your own text
    python fineweb.py text=notes.txt data=notes val_tokens=10000 tokenizer=learn

It needs no GPU: two cores tokenize 3 to 7 million tokens a second. After an interruption the same
command continues. The shards are those of build-nanogpt, which work here too: uint16, 100M tokens
each, edufineweb_val_000000.npy, edufineweb_train_000001.npy and so on. <|endoftext|> opens each
document: a line of a .txt file, the field "text" of a line of .jsonl or a row of .parquet.

All scripts import settings, saving, downloads and tokenizers from here. Downloads honour
HF_ENDPOINT (a mirror of the hub) and HF_TOKEN (for gated files).
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
import textwrap
import time
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice

import numpy as np

# --------------------------------------------------------------------------------------------------
# settings: `python fineweb.py name=value` overrides any; rules such as >= 1 are checked

data = "edu_fineweb10B"     # folder for the shards
text: str = None            # .txt, .jsonl, .parquet: a file, folder or pattern, or several: a,b
tokenizer = "gpt2"          # gpt2; a .tiktoken file; learn: byte pairs learned from the text
vocab_size = 512            # >= 257, <= 65536: tokenizer=learn: most tokens of the vocabulary
shard_size = 100_000_000    # >= 1, <= 1e9: tokens in a training shard
val_tokens = 100_000_000    # >= 1, <= 1e9: tokens in shard 0, the validation set
max_tokens: int = None      # >= 1: stop after this many tokens, None = all

# separates documents; also the captioner's first (BOS) and last (EOS) token
EOT = "<|endoftext|>"
# GPT-2's pattern cuts text into words before byte pairs are merged: no token spans two words
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The look-ahead (?!\S) keeps tiktoken from its fast regex engine. It matters only where two
# white-space characters stand in a row. This pattern cuts all other documents into the same words,
# twice as fast.
SPLIT_SINGLE_SPACED = r" ?\p{L}+| ?\p{N}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+|\s"
# of GPT-2's .tiktoken file, which OpenAI publishes as r50k_base.tiktoken
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# --------------------------------------------------------------------------------------------------
# settings from the command line


def die(message):
    """Ends the run with one line and exit code 2."""
    # the newline ends a progress bar
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


Setting = namedtuple("Setting", "default kind comment")  # kind: int, float, str or bool


def read_settings(source):
    """
    The settings in the text of a script, {name: Setting}. A setting is a lowercase variable at
    module level whose value is a number, a string, True, False or None:

        name = default      # rule: comment
        name: int = None    # the type of a setting without a default value

    The rule is such as `>= 1`, `> 0, <= 1` or `one of a | b`. Without one all values are accepted.
    """
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    lines = source.splitlines()
    settings = {}
    for node in ast.parse(source).body:
        line = lines[node.lineno - 1]
        match = re.fullmatch(r"([a-z][a-z0-9_]*)(?:: (\w+))? = ([^#]+)#?(.*)", line)
        if not match:
            continue
        name, annotation, value, comment = match.groups()
        with suppress(ValueError, SyntaxError):  # the value is an expression
            default = ast.literal_eval(value)
            kind = annotation or type(default).__name__
            if kind in kinds:
                settings[name] = Setting(default, kinds[kind], comment.strip())
    return settings


def parse_value(text, kind):
    """The text as a value of this type; None if it is none."""
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    with suppress(ValueError):
        return kind(text)
    with suppress(ValueError):
        if float(text).is_integer():  # max_tokens=1e9
            return int(float(text))
    return None


def parse_setting(name, text, setting):
    """The value that `name=text` gives. Ends the run if the setting does not accept it."""
    default, kind, comment = setting
    if text == "None" and default is None and kind is not str:
        return None
    if text in ("", "None"):
        die(f"{name}={text} gives no value: write one, or leave {name}= out")
    value = parse_value(text, kind)
    if value is None or (kind is float and not math.isfinite(value)):
        what = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        die(f"{name}={text}: {name} takes {what}")
    rule = re.split("[:;]", comment)[0]
    if rule.startswith("one of ") and value not in rule.removeprefix("one of ").split(" | "):
        die(f"{name}={text}: {name} is {rule.replace(' |', ',')}")
    compare = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
    for sign, bound in re.findall(r"([<>]=?) ([\d.e-]+)", rule):
        if not compare[sign](value, float(bound)):
            die(f"{name}={text}: {name} must be {rule}")
    if kind is str and name not in ("prompt", "prompt_text"):
        value = ",".join(os.path.expanduser(part) for part in value.split(","))
    if name in ("data", "out_dir", "export"):
        for path in value.split(","):
            if os.path.lexists(path) and not os.path.isdir(path):
                die(f"{name}={text}: {path} is not a folder")
    return value


def configure(module, preset=None, positional=()):
    """
    Sets the settings of the calling script, whose `globals()` are `module`, and returns them as a
    dict: the defaults in its text (see read_settings), then what `preset` returns, then the command
    line, `name=value` or `--name=value`. --help prints all settings.

    preset(typed) -> {name: value}, where typed = {name: value} of the command line
    positional: the names of words without "=", in order
    RENAMED, in the script: {old name: new name}
    """
    # a terminal that lacks a letter shows "?" for it
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")
    with open(module["__file__"], encoding="utf-8") as f:
        source = f.read()
    settings = read_settings(source)
    renamed = module.get("RENAMED", {})
    if {"--help", "-h", "help"}.intersection(sys.argv[1:]):
        # `python -OO` drops __doc__, not the text
        print(ast.get_docstring(ast.parse(source)), "\n\nsettings:")
        for name, setting in settings.items():
            print(f"  {f'{name}={setting.default}':36} {setting.comment}")
        sys.exit(0)
    typed = {}
    positional = list(positional)
    for word in sys.argv[1:]:
        name, equals, text = word.partition("=")
        name = name.removeprefix("--")
        if not equals:
            if not positional:
                die(f"'{word}' is not a setting: write name=value (--help lists them)")
            name, text = positional.pop(0), word
        if name in renamed:
            die(f"{name}= is now called {renamed[name]}=")
        if name not in settings:
            near = difflib.get_close_matches(name, settings, 1, 0.0)
            die(f"unknown setting '{name}': did you mean '{near[0]}'? (--help lists them)")
        typed[name] = parse_setting(name, text, settings[name])
    final = {name: setting.default for name, setting in settings.items()}
    if preset:
        final |= preset(typed)
    final |= typed
    module.update(final)
    return final


def print_settings(config):
    """Prints settings as the words that would give them again."""
    words = [f"{name}={value}" for name, value in config.items() if value is not None]
    print("settings:", shlex.join(words), flush=True)


# --------------------------------------------------------------------------------------------------
# files


def save_atomically(path, write):
    """
    `write(file)` fills a temporary file, which is flushed to the disk and then renamed: nobody
    reads half a file, not even after a power cut. `path` is unchanged if writing fails.
    """
    try:
        with suppress(FileNotFoundError):
            os.remove(path + ".tmp")  # of a killed run; it may be a hard link to another file
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as problem:  # torch.save turns an OSError into a RuntimeError
        why = str(problem).splitlines()[0]
        die(f"{path} could not be written ({why}); what was there is unharmed. Is the disk full?")
    finally:
        with suppress(FileNotFoundError):
            os.remove(path + ".tmp")


def save_text(path, text):
    save_atomically(path, lambda f: f.write(text.encode()))


def save_json(path, content, indent=None):
    """NaN and infinity, which are not json, raise ValueError."""
    save_text(path, json.dumps(content, indent=indent, allow_nan=False))


@contextmanager
def reading(path, what, mend=""):
    """If the block fails, ends the run: `path` is not `what`; `mend` says how to mend it."""
    try:
        yield
    except Exception as problem:  # each library raises its own errors, some with many lines
        why = textwrap.shorten(f"{type(problem).__name__}: {problem}", 200)
        die(f"{path} is not {what}, or was cut short ({why})" + (mend and f": {mend}"))


def read_json(path, what="json", mend=""):
    with reading(path, what, mend), open(path, encoding="utf-8-sig") as f:
        return json.load(f)


def read_lines(path):
    """Yields (number, line) of a text file, numbers from 1; lines are stripped, not blank."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as f:  # -sig: without a byte order mark
            for number, line in enumerate(f, 1):
                if "\0" in line:
                    raise ValueError("a NUL byte")
                if line := line.strip():
                    yield number, line
    except (OSError, ValueError) as problem:
        die(f"{path} can't be read as UTF-8 text after line {number}: {problem}")


LOCKS = {}  # {folder: open file}: a lock lasts until its process ends, however it ends


def lock_folder(folder):
    """Makes the folder, and this process its only writer. Ends the run if there is another."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as problem:
        die(f"the folder {folder} could not be made ({problem})")
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
        die(f"{folder} is being written by another run ({file.read().strip()}): wait for its end")
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


def fetch(url, part):
    """Appends what the file `part` lacks of `url`, in one request."""
    import requests
    from tqdm import tqdm

    # identity: uncompressed, so that sizes are those of the file
    headers = {"User-Agent": "nanocaption/1.0", "Accept-Encoding": "identity"}
    done = os.path.getsize(part) if os.path.exists(part) else 0
    if done:
        headers["Range"] = f"bytes={done}-"
    token = os.environ.get("HF_TOKEN")
    if token and url.startswith(hub() + "/"):
        headers["Authorization"] = f"Bearer {token}"
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == 416:
            os.remove(part)
            raise requests.ConnectionError("the part on disk is longer than the file")
        response.raise_for_status()
        if "text/html" in response.headers.get("Content-Type", ""):
            raise OSError("a web page came, not the file: does this network ask for a login?")
        if response.status_code == 200:  # the whole file, whatever part was asked for
            done = 0
        total = done + int(response.headers.get("Content-Length", 0))
        bar = tqdm(desc=os.path.basename(part), total=total, initial=done, unit="B",
                   unit_scale=True, mininterval=1)
        with bar, open(part, "ab" if done else "wb") as f:
            for chunk in response.iter_content(2**16):
                f.write(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
    if os.path.getsize(part) < total:
        raise requests.ConnectionError("the connection was cut")


def download(url, path, tries=8, otherwise=die):
    """
    Fetches `url` into the file `path`, unless it exists, and returns `path`. A cut connection, a
    429 or a 5xx is tried again after a pause that doubles, from the byte where it stopped. If it
    can't be fetched, returns otherwise(one line that says so).
    """
    if os.path.exists(path):
        return path
    import requests

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = path + ".part"
    for attempt in range(tries):
        pause = 2**attempt
        try:
            fetch(url, part)
            break
        except requests.HTTPError as problem:
            response = problem.response
            status = response.status_code
            what = f"the server says {status} {response.reason}"
            if status in (401, 403) and url.startswith(hub() + "/"):
                what += "; accept its licence there, if it has one, and set HF_TOKEN"
            if status < 500 and status != 429:
                return otherwise(f"{url}: {what}")
            retry_after = response.headers.get("Retry-After", "")
            if retry_after.isdigit():
                pause = max(pause, min(int(retry_after), 300))
        except (requests.ConnectionError, requests.Timeout,
                requests.exceptions.ChunkedEncodingError) as problem:
            what = f"no answer ({type(problem).__name__})"
        except OSError as problem:  # a malformed address, or a full disk
            return otherwise(f"{url} can't be fetched into {part}: {problem}")
        if attempt == tries - 1:
            return otherwise(f"could not download {url}: {what}, {tries} times. Run again, or put "
                             f"it at {path}")
        print(f"{what}; trying again in {pause} s ({url})", flush=True)
        time.sleep(pause)
    if path.endswith(".json"):
        try:
            with open(part, encoding="utf-8") as f:
                json.load(f)
        except ValueError:
            os.remove(part)  # the next try must not go on from it
            return otherwise(f"{url}: what came is not json")
    os.replace(part, path)
    return path


# --------------------------------------------------------------------------------------------------
# tokenizers: GPT-2's, or one learned from a small text


def get_tokenizer(source="gpt2"):
    """
    A tiktoken.Encoding with <|endoftext|> as its last id. `source` is "gpt2", a .tiktoken file (on
    each line a token's bytes in base64 and its id), or such a file's text, as checkpoints have it.
    """
    import tiktoken

    if source == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as problem:  # whatever its download raises
            die(f"GPT-2's vocabulary could not be fetched ({type(problem).__name__}): "
                "connect once, or set TIKTOKEN_CACHE_DIR to a folder that holds it")
    if "\n" in source:
        lines = source.splitlines()
    elif os.path.isfile(source):
        lines = [line for _, line in read_lines(source)]
    else:
        die(f"tokenizer {source}: it is not gpt2, and there is no such file")
    try:
        pairs = [line.split() for line in lines]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        ranks = {}
    # with all single bytes every text has tokens; <|endoftext|> gets the id after the last
    single_bytes = {bytes([b]) for b in range(256)}
    if set(ranks.values()) != set(range(len(ranks))) or not single_bytes <= ranks.keys():
        die(f"{source[:200]!r} is not a .tiktoken file with all bytes and with ids without a gap")
    return tiktoken.Encoding(
        "learned", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def tokenizer_text(ranks):
    """{token: id} as a .tiktoken file's text, or "gpt2" if it is GPT-2's."""
    tokens = sorted(ranks, key=ranks.get)
    text = "".join(f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in tokens)
    is_gpt2 = hashlib.sha256(text.encode()).hexdigest() == GPT2_SHA256
    return "gpt2" if is_gpt2 else text


def learn_bpe(documents, vocab_size):
    """
    Byte pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): start from the 256 bytes; again
    and again, the most frequent pair of neighbours becomes a token. Returns .tiktoken text.
    """
    import regex  # comes with tiktoken; like re, but knows \p{L}

    counts = Counter()
    for document in documents:
        counts.update(regex.findall(SPLIT, document))
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
            i = 0
            # from the left, as tokenizers do: of "---", the first two are merged
            while i < len(parts) - 1:
                if parts[i] == a and parts[i + 1] == b:
                    parts[i:i + 2] = [a + b]
                i += 1
    return tokenizer_text({token: rank for rank, token in enumerate(tokens)})


def bytes_to_unicode():
    """{byte: letter}: how GPT-2's files spell every byte as a printable character."""
    letters = {b: chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    others = [b for b in range(256) if b not in letters]
    return letters | {b: chr(256 + n) for n, b in enumerate(others)}


def vocab_and_merges(encoding):
    """
    A tokenizer in the two files of OpenAI's GPT-2, which `transformers` reads: the bytes of
    vocab.json, {token: id}, and of merges.txt, the pairs in the order of merging.
    """
    ranks = encoding._mergeable_ranks
    letters = bytes_to_unicode()

    def spell(token):
        return "".join(letters[b] for b in token)

    merges = ["#version: 0.2"]
    for token in sorted(ranks, key=ranks.get):
        # merge as the earlier tokens say, until two parts are left: this pair made the token
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(f"{spell(parts[0])} {spell(parts[1])}")
    vocab = {spell(token): rank for token, rank in ranks.items()} | {EOT: encoding.eot_token}
    return json.dumps(vocab).encode(), "\n".join(merges + [""]).encode()


def read_vocab(folder):
    """
    The tokenizer of a folder with these two files, or with the tokenizer.json of newer versions of
    transformers, as `tokenizer_text` gives it.
    """
    bytes_of = {letter: b for b, letter in bytes_to_unicode().items()}
    with reading(folder, "a folder with a vocabulary of GPT-2's kind"):
        if os.path.exists(os.path.join(folder, "vocab.json")):
            vocab = read_json(os.path.join(folder, "vocab.json"))
            lines = read_lines(os.path.join(folder, "merges.txt"))
            merged = [pair.replace(" ", "") for _, pair in lines][1:]  # without "#version: 0.2"
        else:
            bpe = read_json(os.path.join(folder, "tokenizer.json"))["model"]
            vocab = bpe["vocab"]
            # a pair is a list, or, in older files, a text with a space
            merged = ["".join(pair).replace(" ", "") for pair in bpe["merges"]]
        tokens = sorted(vocab, key=vocab.get)
        if tokens[256:] != merged + [EOT] or sorted(vocab.values()) != list(range(len(tokens))):
            raise ValueError(f"ids are not of 256 bytes, then merges.txt, then {EOT}")
        ranks = {bytes(map(bytes_of.get, token)): vocab[token] for token in tokens[:-1]}
    return tokenizer_text(ranks)


# --------------------------------------------------------------------------------------------------
# documents -> tokens -> shards


def text_files(pattern):
    """The files that `text=` names, in a fixed order."""
    paths = []
    for part in [pattern] if os.path.exists(pattern) else pattern.split(","):
        # brackets in a name that exists are part of the name
        wanted = glob.escape(part) if os.path.exists(part) else part
        if os.path.isdir(part):
            wanted = os.path.join(wanted, "**")
        found = [path for path in sorted(glob.glob(wanted, recursive=True))
                 if path.endswith((".txt", ".jsonl", ".parquet")) and os.path.isfile(path)]
        if not found:
            die(f"text={part}: no .txt, .jsonl or .parquet file there")
        paths += found
    return paths


def fineweb_files():
    """Yields FineWeb-Edu's parquet files; each is downloaded when it is due."""
    repo = "datasets/HuggingFaceFW/fineweb-edu"
    folder = os.path.join(data, "parquet")
    listing = download(f"{hub()}/api/{repo}/tree/main/sample/10BT", f"{folder}/files.json")
    for name in sorted(entry["path"] for entry in read_json(listing)):
        if name.endswith(".parquet"):
            path = f"{folder}/{os.path.basename(name)}"
            yield download(f"{hub()}/{repo}/resolve/main/{name}", path)


def read_jsonl(path):
    """Yields (line number, text or None)."""
    for number, line in read_lines(path):
        try:
            text = json.loads(line)["text"]
            # half of a surrogate pair, which json can hold and UTF-8 can't, becomes U+FFFD
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        except (ValueError, LookupError, TypeError, AttributeError):
            text = None
        yield number, text


def read_parquet(path):
    """Yields (row number, text or any other value)."""
    import pyarrow.parquet

    number = 0
    with reading(path, 'a .parquet file with a column "text"'):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024, columns=["text"]):
            for text in batch.column("text").to_pylist():
                number += 1
                yield number, text


def read_documents(paths):
    readers = {".txt": read_lines, ".jsonl": read_jsonl, ".parquet": read_parquet}
    for path in paths:
        read = readers[os.path.splitext(path)[1]]
        for number, document in read(path):
            if not isinstance(document, str):
                die(f'{path}, line or row {number}: no "text" that is a string')
            yield document


@functools.lru_cache
def single_spaced(encoding):
    """The tokenizer with the faster pattern; building it takes a third of a second."""
    import tiktoken

    return tiktoken.Encoding(
        "single-spaced", pat_str=SPLIT_SINGLE_SPACED, mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=encoding._special_tokens)


def cut_long_spaces(document, longest=100_000):
    """Cuts a document inside longer runs of white space: tiktoken fails at a million in a row."""
    cuts = [0]
    for run in re.finditer(r"\s{1000,}", document):
        cuts += range(run.start() + longest, run.end(), longest)
    return [document[start:end] for start, end in zip(cuts, cuts[1:] + [None])]


def tokenize(documents, encoding):
    """
    Yields the ids of each document, uint16, <|endoftext|> first. Threads use all cores: tiktoken
    works outside Python's global lock.
    """
    spaces_in_a_row = re.compile(r"\s\s")
    fast = single_spaced(encoding)

    def encode(document):
        tokenizer, pieces = fast, [document]
        if spaces_in_a_row.search(document):
            tokenizer, pieces = encoding, cut_long_spaces(document)
        # text that spells <|endoftext|> is text
        ids = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        return np.concatenate([[encoding.eot_token], *ids], dtype=np.uint16, casting="unsafe")

    def encode_batch(batch):
        return [encode(document) for document in batch]

    documents = iter(documents)
    workers = os.cpu_count() or 1
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(documents, 256)):
            pending.append(pool.submit(encode_batch, batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


def tokenize_files(paths, encoding, skip=0):
    """Yields the ids of all documents but the first `skip`."""
    # file by file: tokenize reads ahead, and the next file may have to be downloaded first
    for path in paths:
        documents = read_documents([path])
        skip -= sum(1 for _ in islice(documents, skip))
        yield from tokenize(documents, encoding)


def fill_shards(documents, progress):
    """
    Joins the ids of documents and cuts them into shards. Yields (shard, position, is_last). The
    position {documents, offset}: the shards so far hold that many whole documents, and `offset`
    tokens of the next. A full shard waits for the next token, which says that it is not the last.
    """
    n_documents, offset = progress["documents"], progress["offset"]
    left = max_tokens - progress["tokens"] if max_tokens else math.inf
    shard = np.empty(shard_size if progress["shards"] else val_tokens, np.uint16)
    used = 0
    for tokens in documents:
        while left and offset < len(tokens):
            if used == len(shard):
                yield shard, dict(documents=n_documents, offset=offset), False
                shard = np.empty(shard_size, np.uint16)
                used = 0
            n = min(len(tokens) - offset, len(shard) - used, left)
            shard[used:used + n] = tokens[offset:offset + n]
            used += n
            offset += n
            left -= n
        if not left:
            break
        n_documents += 1
        offset = 0
    yield shard[:used], dict(documents=n_documents, offset=offset), True


if __name__ == "__main__":
    print_settings(configure(globals()))
    if max_tokens and max_tokens <= val_tokens:
        die(f"max_tokens={max_tokens:,} leaves nothing to train on after val_tokens={val_tokens:,}")
    if tokenizer == "learn" and not text:
        die("tokenizer=learn needs text=: it reads the text twice")
    paths = text_files(text) if text else fineweb_files()
    lock_folder(data)

    # what must be the same when an interrupted run continues
    run = dict(text=text, tokenizer=tokenizer, shard_size=shard_size, val_tokens=val_tokens,
               max_tokens=max_tokens)
    if tokenizer == "learn":
        run["vocab_size"] = vocab_size
    if text:
        run["files"] = [[path, os.path.getsize(path)] for path in paths]
    progress_file = os.path.join(data, "progress.json")
    if os.path.exists(progress_file):
        mend = f"delete {data}, or take another data="
        progress = read_json(progress_file, "a progress.json", mend)
    else:
        for name in os.listdir(data):
            if name.endswith((".npy", ".bin", ".tiktoken")):
                die(f"{data} holds {name}, but no progress.json: take another data=, or move it")
        progress = run | dict(shards=0, documents=0, offset=0, tokens=0)
    for name, value in run.items():
        # progress.json of earlier versions has no list of files
        if progress.get(name, value) != value:
            was = "other text files" if name == "files" else f"{name}={progress[name]}"
            die(f"{data} was begun with {was}: use the same, or another data=")
    if progress.get("done"):
        print(f"{data} is finished: {progress['tokens']:,} tokens in {progress['shards']} shards")
        sys.exit(0)

    # train_gpt2.py looks for a vocabulary other than GPT-2's beside the shards
    tokenizer_file = os.path.join(data, "tokenizer.tiktoken")
    if progress["shards"]:
        source = tokenizer_file if os.path.exists(tokenizer_file) else "gpt2"
    elif tokenizer == "learn":
        source = learn_bpe(read_documents(paths), vocab_size)
    else:
        source = tokenizer_text(get_tokenizer(tokenizer)._mergeable_ranks)
    encoding = get_tokenizer(source)
    if encoding.n_vocab > 2**16:
        die(f"tokenizer={tokenizer} has {encoding.n_vocab:,} tokens: shards hold 16-bit ids")
    print(f"tokenizer: {tokenizer}, {encoding.n_vocab:,} tokens")

    # after a kill, what progress.json does not count is written again
    start = time.time()
    tokens_at_start = progress["tokens"]
    documents = tokenize_files(paths, encoding, progress["documents"])
    for shard, position, is_last in fill_shards(documents, progress):
        number = progress["shards"]
        if number == 0:
            if is_last:
                die(f"the text has {len(shard):,} tokens, all for validation: lower val_tokens=")
            save_json(progress_file, progress, indent=1)
            if source != "gpt2":
                save_text(tokenizer_file, source)
        split = "train" if number else "val"
        path = os.path.join(data, f"edufineweb_{split}_{number:06d}.npy")
        save_atomically(path, lambda f: np.save(f, shard))
        total = progress["tokens"] + len(shard)
        progress |= position | dict(shards=number + 1, tokens=total, done=is_last)
        save_json(progress_file, progress, indent=1)
        speed = (total - tokens_at_start) / (time.time() - start) / 1e6
        print(f"shard {number} ({split}): {len(shard):,} tokens | {total:,} tokens so far | "
              f"{speed:.2f}M tokens/s", flush=True)
