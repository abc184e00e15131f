"""
    python -m pytest -q -n 2 test_all.py     # a few minutes on two cores; no GPU, no network

Equality with what others trust (transformers, pycocoevalcap), with ourselves done the plain way (no
cache, one process, an uninterrupted run), and the rules of the house. What needs real data runs
where ../shared/data exists, and is skipped elsewhere.
"""

import argparse
import ast
import concurrent.futures
import copy
import ctypes
import dataclasses
import functools
import gc
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zipfile
from collections import Counter
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from types import SimpleNamespace

# two tests at a time (-n 2) share the cores; torch reads this when it is imported
n_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if n_workers > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // n_workers))

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from PIL import Image

import cider
import coco
import fineweb
import hellaswag
import paligemma_prompt
import train_caption
import train_gpt2
from paligemma_prompt import PaliGemma, PromptedPaliGemma
from train_caption import Captioner, TokenizedCaptions, training_batch
from train_gpt2 import GPT, GPTConfig, Process

REPO = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(REPO, "..", "shared", "data")
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="needs ../shared/data")
ALONE = Process(0, 1, "cpu", torch.float32)
# a model that has hardly learned writes letters that the plots' font lacks
pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from")


def run(command, cwd, ok=True, launcher=(), env={}):
    """
    Runs one of the scripts in `cwd`; returns what it printed. ok=False: it must end with one line
    on stderr and exit code 2.
    """
    script, *words = command.split()
    if not ok:
        return fails(script, words, cwd, env)
    done = subprocess.run(
        [sys.executable, *launcher, os.path.join(REPO, script), *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fails(script, words, cwd, env):
    """
    The one line with which a script refuses; in this process, as importing torch anew would take
    longer than the refusal.
    """
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *words])
        for name, value in env.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(os.path.join(REPO, script), run_name="__main__")
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1, out.getvalue() + err.getvalue()
    del stop
    gc.collect()  # closes the script's files, and with them its locks
    return errors[0]


def run_here(command, cwd, ok=True, env={}):
    """`run` in this process, which saves the imports."""
    gc.collect()  # a script that ran here before lets go of its locks
    script, *words = command.split()
    if not ok:
        return fails(script, words, cwd, env)
    out, numbers = io.StringIO(), (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *words])
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            runpy.run_path(os.path.join(REPO, script), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, out.getvalue()
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)
    # and so does this one
    for file in fineweb.LOCKS.values():
        file.close()
    fineweb.LOCKS.clear()
    gc.collect()
    return out.getvalue()


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """
    The whole small road once: 200 drawn scenes, raw patches, their captions' tokens, a GPT of two
    layers after a few steps.
    """
    cwd = tmp_path_factory.mktemp("road")
    run("coco.py data=shapes shapes=200 encoder=patches", cwd)
    run(
        "fineweb.py text=shapes/train_captions.txt data=tokens tokenizer=learn val_tokens=1000", cwd
    )
    run(f"{GPT_RUN} out_dir=gpt", cwd)
    return cwd


GPT_RUN = (
    "train_gpt2.py data=tokens n_layer=2 n_head=2 n_embd=32 block_size=32 batch_size=4"
    " total_batch_size=512 learning_rate=3e-3 max_steps=8 warmup_steps=2 eval_interval=4"
    " eval_tokens=1000 device=cpu"
)
CAPTION_RUN = (
    "train_caption.py data=shapes encoder=patches gpt=gpt/ckpt.pt batch_size=16 learning_rate=3e-3"
    " max_steps=8 eval_interval=4 device=cpu"
)


def small_gpt(seed=0, n_layer=4, vocab_size=101, scale=10):
    """
    A random GPT whose logits differ: the initial weights alone would leave all tokens nearly alike.
    """
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(block_size=48, vocab_size=vocab_size, n_layer=n_layer, n_head=4, n_embd=32))
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(scale if p.dim() == 2 else 1)
    return gpt.eval()


def open_eyed(fusion, every=1, seed=0, gpt=None):
    """A captioner of 9 picture tokens, 24 wide, whose gates are open."""
    model = Captioner(gpt or small_gpt(seed), fusion, every, width=24, n_query=5).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate"):
                p.fill_(0.5)
    return model


def log_column(path, column):
    return [row[column] for row in train_gpt2.read_log(path) if row[column] is not None]


# ---- settings, downloads, tokens (fineweb.py)


SETTINGS = """
steps = 10                  # >= 1: of training
rate = 0.1                  # > 0, <= 2: how fast
name = "éèêëéèêë"  # these letters are of two bytes
kind = "x"                  # one of x | y-z: which
flag = False
limit: int = None           # >= 3: None = no limit
text: str = None
out_dir = "out"
Upper, _private = 1, 2
pair = (1, 2)
twice = 2 * steps
RENAMED = dict(old="steps")

if __name__ == "__main__":
    helper = 5
"""


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """configured(words) -> the settings of a script that is called with these words."""
    (tmp_path / "script.py").write_text(SETTINGS, encoding="utf-8")
    module = runpy.run_path(str(tmp_path / "script.py"))
    monkeypatch.chdir(tmp_path)

    def configure(*words, **kw):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        return fineweb.configure(module | dict(__file__=str(tmp_path / "script.py")), **kw)

    return configure


def commands_of(text):
    """(script, words) of each command in a text; $NAME stands for what NAME="..." said above it."""
    variables = {}
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], ""), line)
        assigned = re.fullmatch(r"\s*([A-Z])=(.*)", line)
        if assigned:
            variables[assigned[1]] = assigned[2].strip('"')
        for match in re.finditer(r"(?:python|\d) (?:-m )?(\w+\.py)([^#`\n]*)", line):
            yield match[1], [word for word in shlex.split(match[2]) if re.match(r"\w+=", word)]


def test_every_command_in_the_texts_names_settings_that_exist():
    scripts = [name for name in os.listdir(REPO) if name.endswith(".py")]
    sources = {name: open(os.path.join(REPO, name), encoding="utf-8").read() for name in scripts}
    settings = {name: fineweb.read_settings(source) for name, source in sources.items()}
    n = 0
    for name in ("README.md", *scripts):
        text = sources.get(name) or open(os.path.join(REPO, name), encoding="utf-8").read()
        if name in scripts:
            text = ast.get_docstring(ast.parse(text))
        for script, words in commands_of(text):
            for word in words:
                setting, _, value = word.partition("=")
                assert setting in settings[script], f"{name}: {script} {word}"
                n += 1
                if value:
                    fineweb.parse_setting(setting, value, settings[script][setting])
    assert n > 150


def test_configure_takes_types_as_python_writes_them(configured):
    assert list(configured()) == "steps rate name kind flag limit text out_dir".split()
    words = "steps=1e3 --rate=1 name=b=c kind=y-z flag=true limit=1_000 text=1e3".split()
    final = configured(*words)
    assert final == dict(steps=1000, rate=1.0, name="b=c", kind="y-z", flag=True, limit=1000,
                         text="1e3", out_dir="out")
    assert type(final["rate"]) is float and type(final["steps"]) is int
    assert configured("limit=None")["limit"] is None
    assert configured(f"steps={2**60 + 1}")["steps"] == 2**60 + 1
    comment = fineweb.read_settings(SETTINGS)["name"].comment
    assert comment == "these letters are of two bytes"


def test_configure_argv_beats_preset_and_bare_words_fill_positions(configured):
    def preset(typed):
        return dict(steps=2, name=f"{len(typed)} typed")

    assert configured("steps=3", preset=preset) == configured() | dict(steps=3, name="1 typed")
    assert configured("x.json", positional=("name",))["name"] == "x.json"


@pytest.mark.parametrize("word, hint", [
    ("stepz=3", "'steps'"), ("steps=many", "whole number"), ("steps=1.5", "whole number"),
    ("steps=0", "steps must be >= 1"), ("flag=1", "True or False"), ("flag=no", "True or False"),
    ("steps=inf", "whole number"), ("steps=1e999", "whole number"),
    ("rate=fast", "a number"), ("rate=nan", "a number"), ("rate=1e999", "a number"),
    ("rate=0", "must be > 0, <= 2"), ("rate=2.1", "must be > 0, <= 2"), ("limit=2", "must be >= 3"),
    ("limit=300M", "whole number"), ("kind=z", "one of x, y-z"), ("hello", "name=value"),
    ("text=", "gives no value"), ("name=", "gives no value"), ("text=None", "gives no value"),
    ("old=3", "now called steps="), ("twice=3", "unknown setting"), ("helper=3", "unknown setting"),
    ("Upper=3", "unknown setting"), ("out_dir=script.py", "not a folder"),
    ("steps=", "gives no value")])
def test_configure_names_what_is_wrong(word, hint, capsys, configured):
    with pytest.raises(SystemExit) as stop:
        configured(word)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and hint in said and said.strip().count("\n") == 0


def test_configure_expands_the_home_folder(configured, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert configured("text=~/a,b~c,~/d")["text"] == "/home/me/a,b~c,/home/me/d"


def test_help_needs_no_docstrings_in_memory(tmp_path):
    done = subprocess.run([sys.executable, "-OO", os.path.join(REPO, "fineweb.py"), "--help"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "shard_size=100000000" in done.stdout
    assert "first stage" in done.stdout


def test_help_lists_settings_with_their_comments(tmp_path):
    said = run_here("hellaswag.py --help", tmp_path)
    assert "number=0" in said and "the question to show" in said


def test_one_process_writes_a_folder(tmp_path):
    fineweb.lock_folder(str(tmp_path / "new"))
    fineweb.lock_folder(str(tmp_path / "new"))  # the process that holds it may ask again
    (tmp_path / "text.txt").write_text("a\n" * 300)
    done = subprocess.run(
        [sys.executable, os.path.join(REPO, "fineweb.py"), "text=text.txt", "data=new"],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and f"another run (process {os.getpid()}" in done.stderr
    assert os.listdir(tmp_path / "new") == [".lock"]


@pytest.fixture
def serve():
    """serve(handler) -> the address of a web server on this machine, until the test ends."""
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves BODY, after a 503, a cut connection, and a lie about the length; honours Range."""
    BODY, asked = random.Random(0).randbytes(300_000), []

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.asked.append(start)
        turn = len(self.asked)
        if self.path == "/missing":
            return self.send_error(404)
        if turn == 1:
            return self.send_error(503)
        if self.path == "/changed" and start > 100_000:
            return self.send_error(416)
        rest = self.BODY[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(rest) + (1000 if turn == 3 else 0))
        self.end_headers()
        self.wfile.write(rest[:100_000] if turn in (2, 3) else rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def flaky(serve, monkeypatch):
    monkeypatch.setattr(fineweb.time, "sleep", lambda seconds: None)
    Flaky.asked.clear()
    return serve(Flaky)


def test_download_goes_on_where_it_was_cut(flaky, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    path = fineweb.download(f"{flaky}/file", str(tmp_path / "new" / "file"))
    assert open(path, "rb").read() == Flaky.BODY
    # 503; cut; cut, and a lie about the length; the rest
    assert Flaky.asked == [0, 0, 65_536, 131_072] and len(flushed) == 1
    assert os.listdir(tmp_path / "new") == ["file"]


def test_download_starts_again_where_the_part_is_not_of_this_file(flaky, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 400_000)
    path = fineweb.download(f"{flaky}/changed", str(tmp_path / "file"))
    assert open(path, "rb").read() == Flaky.BODY and Flaky.asked[:3] == [400_000, 400_000, 0]


def test_download_leaves_nothing_of_a_missing_file(flaky, tmp_path):
    with pytest.raises(SystemExit):
        fineweb.download(f"{flaky}/missing", str(tmp_path / "file"))
    assert not os.listdir(tmp_path)


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers with the STATUS, TYPE and BODY of the test; keeps the headers that it was sent."""
    STATUS, TYPE, BODY, headers_sent = 200, "", b"", []

    def do_GET(self):
        self.headers_sent.append(dict(self.headers))
        self.send_response(self.STATUS)
        self.send_header("Content-Type", self.TYPE)
        self.send_header("Content-Length", len(self.BODY))
        self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(self.BODY)

    def log_message(self, *args):
        pass


@pytest.fixture
def refused(serve, tmp_path, monkeypatch, capsys):
    """refused(name, status, type, body) -> the line that ends the download of this answer."""
    address = serve(Answer)
    Answer.headers_sent.clear()

    def download(name, status, content_type="", body=b"", tries=8, hub="https://huggingface.co"):
        monkeypatch.setattr(Answer, "STATUS", status)
        monkeypatch.setattr(Answer, "TYPE", content_type)
        monkeypatch.setattr(Answer, "BODY", body)
        monkeypatch.setenv("HF_ENDPOINT", hub or address)
        monkeypatch.setenv("HF_TOKEN", "secret")
        with pytest.raises(SystemExit):
            fineweb.download(f"{address}/{name}", str(tmp_path / name), tries)
        assert not os.listdir(tmp_path)
        return capsys.readouterr().err

    download.address = address
    return download


def test_download_keeps_no_login_page(refused):
    assert "a web page" in refused("model.safetensors", 200, "text/html; charset=utf-8", b"<html>")
    assert "a web page" in refused("files.json", 200, "text/html", b"<html>Welcome")
    assert "not json" in refused("files.json", 200, "", b"Please log in")


def test_the_token_is_for_the_hub_only(refused):
    # the second address only begins as the hub's does
    for other in "https://huggingface.co", refused.address[:-1]:
        said = refused("photo.jpg", 403, hub=other)
        assert "403" in said and "HF_TOKEN" not in said
        headers = Answer.headers_sent.pop()
        assert headers["User-Agent"].startswith("nanocaption") and "Authorization" not in headers
    assert "HF_TOKEN" in refused("photo.jpg", 403, hub=None)
    assert Answer.headers_sent.pop()["Authorization"] == "Bearer secret"


def test_download_waits_as_long_as_the_server_asks(refused, monkeypatch):
    pauses = []
    monkeypatch.setattr(fineweb.time, "sleep", pauses.append)
    assert "429" in refused("file", 429, tries=5)
    assert pauses == [7, 7, 7, 8]


TEXT = ["the cat sat on the mat", "a dog , a cat and 2 birds", "naïve café ☕", "the dog's mat"] * 40


@pytest.fixture(scope="session")
def learned():
    """A tokenizer of TEXT, and its .tiktoken file's text."""
    text = fineweb.learn_bpe(TEXT, 320)
    return fineweb.get_tokenizer(text), text


def test_learned_tokenizer_round_trip(learned):
    tokenizer, _ = learned
    assert tokenizer.n_vocab <= 320 and tokenizer.eot_token == tokenizer.n_vocab - 1
    for text in TEXT + ["unseen ☃ text"]:
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert len(tokenizer.encode_ordinary("the cat")) == 2  # frequent words became single tokens


BYTES = fineweb.learn_bpe([], 300)


@pytest.mark.parametrize("content", [
    "", "\n", BYTES[:-5], BYTES.replace("QQ== 65\n", ""), BYTES + "!!!! 256\n",
    BYTES + "no rank\n", BYTES + "YWI= 300\n", BYTES.encode("utf-16")])
def test_a_file_that_is_no_tokenizer_is_refused(content, tmp_path, capsys):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "bad.tiktoken").write_bytes(content)
    with pytest.raises(SystemExit):
        fineweb.get_tokenizer(str(tmp_path / "bad.tiktoken"))
    assert "bad.tiktoken" in capsys.readouterr().err
    (tmp_path / "good.tiktoken").write_text(BYTES + "\n\n")
    assert fineweb.get_tokenizer(str(tmp_path / "good.tiktoken")).n_vocab == 257


def make_shards(cwd, words, ok=True):
    """Runs fineweb.py on TEXT with a vocabulary learned from it."""
    if not os.path.exists(cwd / "text.txt"):
        (cwd / "text.txt").write_text("\n".join(TEXT), encoding="utf-8")
    return run_here(f"fineweb.py text=text.txt tokenizer=learn vocab_size=320 {words}", cwd, ok)


def read_shards(folder):
    paths = sorted(folder.glob("*.npy"), key=lambda path: path.name[-10:])
    return [np.load(path) for path in paths]


def kill_at_save(n, monkeypatch):
    """The n-th file that fineweb.py writes from here on is not written: the process ends there."""
    save, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == n:
            raise Killed
        save(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_shards_hold_every_document_opened_by_eot(tmp_path):
    make_shards(tmp_path, "data=whole val_tokens=100 shard_size=150")
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.npy"))
    assert names[0] == "edufineweb_train_000001.npy" and names[-1] == "edufineweb_val_000000.npy"
    shards = read_shards(tmp_path / "whole")
    tokenizer = fineweb.get_tokenizer(str(tmp_path / "whole" / "tokenizer.tiktoken"))
    expected = []
    for text in TEXT:
        expected += [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]
    assert [len(shard) for shard in shards[:-1]] == [100] + [150] * (len(shards) - 2)
    assert all(shard.dtype == np.uint16 for shard in shards)
    assert np.concatenate(shards).tolist() == expected


# the saves are: progress, tokenizer, shard 0, progress, shard 1, progress, shard 2, progress
@pytest.mark.parametrize("sizes, saves", [
    ("shard_size=110 max_tokens=320", range(1, 9)), ("shard_size=1000", [4, 7])])
def test_shards_survive_a_kill_at_any_file(sizes, saves, tmp_path, monkeypatch):
    words = f"vocab_size=257 val_tokens=100 {sizes}"
    make_shards(tmp_path, f"data=whole {words}")
    whole = read_shards(tmp_path / "whole")
    assert len(whole) >= 3
    for n in saves:
        with monkeypatch.context() as patch:
            kill_at_save(n, patch)
            with pytest.raises(Killed):
                make_shards(tmp_path, f"data=cut{n} {words}")
        make_shards(tmp_path, f"data=cut{n} {words}")
        again = read_shards(tmp_path / f"cut{n}")
        assert len(again) == len(whole) and all(map(np.array_equal, again, whole))
        assert (tmp_path / f"cut{n}/progress.json").read_text() == (
            tmp_path / "whole/progress.json").read_text()


def test_shards_of_one_folder_come_from_one_text(tmp_path):
    words = "data=shards val_tokens=100 shard_size=150"
    make_shards(tmp_path, words)
    assert "finished" in make_shards(tmp_path, words)
    assert "was begun with shard_size=150" in make_shards(tmp_path, words + "0", ok=False)
    with open(tmp_path / "text.txt", "a") as f:
        f.write("one more\n")
    assert "other text files" in make_shards(tmp_path, words, ok=False)
    # the folder of an earlier version, which kept no list of files
    progress = json.loads((tmp_path / "shards/progress.json").read_text())
    del progress["files"]
    (tmp_path / "shards/progress.json").write_text(json.dumps(progress))
    assert "finished" in make_shards(tmp_path, words)
    (tmp_path / "shards/progress.json").write_text("")
    assert "delete shards, or take another data=" in make_shards(tmp_path, words, ok=False)


@pytest.mark.parametrize("name", ["edufineweb_train_000007.npy", "a_val.bin", "tokenizer.tiktoken"])
def test_somebodys_shards_are_not_written_over(name, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / name).write_text("precious")
    assert name in make_shards(tmp_path, "data=shards val_tokens=100", ok=False)
    assert set(os.listdir(tmp_path / "shards")) == {".lock", name}


def test_a_text_without_training_tokens_leaves_nothing(tmp_path):
    n = sum(map(len, read_shards_of(tmp_path, "whole val_tokens=100")))
    for val_tokens in n, n + 1:
        said = make_shards(tmp_path, f"data=none val_tokens={val_tokens}", ok=False)
        assert f"{n:,} tokens" in said and os.listdir(tmp_path / "none") == [".lock"]
    assert len(read_shards_of(tmp_path, f"none val_tokens={n - 1}")) == 2


def read_shards_of(cwd, words):
    make_shards(cwd, f"data={words}")
    return read_shards(cwd / words.split()[0])


def test_documents_are_cut_as_gpt2_cuts_them(learned):
    """The pattern for texts without white space in a row must give what GPT-2's own gives."""
    tokenizer, _ = learned
    rng = random.Random(0)
    pieces = ["the", "cat", "'s", "'", "'ll", "'S", "12", "3", "é", "☕", "日本", ".", "--", "$",
              " ", " ", " ", "\n", "\t", "  ", "\u00a0", "\u2003", "\x1c", "\x85", fineweb.EOT]
    documents = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(3000)] + TEXT
    for document, tokens in zip(documents, fineweb.tokenize(documents, tokenizer), strict=True):
        expected = [tokenizer.eot_token] + tokenizer.encode_ordinary(document)
        assert tokens.dtype == np.uint16 and tokens.tolist() == expected, repr(document)


def test_a_million_blanks_in_a_row_are_tokenized(learned):
    tokenizer, _ = learned
    for document in "the" + " " * 1_234_567 + "cat", "\n" * 1_000_000, "a  cat":
        tokens, = fineweb.tokenize([document], tokenizer)
        assert tokenizer.decode(tokens[1:].tolist()) == document
    # runs that tiktoken can take are not cut
    document = "the" + " " * 99_999 + "cat"
    tokens, = fineweb.tokenize([document], tokenizer)
    assert tokens[1:].tolist() == tokenizer.encode_ordinary(document)


def test_documents_of_every_kind_of_file(tmp_path, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def read(name, content):
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.table(content), path)
        else:
            path.write_bytes(content)
        return list(fineweb.read_documents([str(path)]))

    mark = b"\xef\xbb\xbf"
    assert read("a.txt", mark + "é\r\n\r\n b \n".encode()) == ["é", "b"]
    assert read("a.jsonl", mark + b'{"text": "a"}\n\n{"text": " \\ud800b"}') == ["a", " \ufffdb"]
    assert read("a.parquet", dict(text=["a", ""])) == ["a", ""]
    # whatever is no text is refused, with file and place
    refused = {
        "16.txt": "é\nb\n".encode("utf-16"), "16le.txt": "a\nb\n".encode("utf-16-le"),
        "latin.txt": "a\né".encode("latin-1"), "latin.jsonl": '{"text": "é"}'.encode("latin-1"),
        "null.jsonl": b'{"text": "a"}\n{"text": null}', "int.jsonl": b'{"text": "a"}\n{"text": 1}',
        "list.jsonl": b'{"text": "a"}\n["text"]', "none.jsonl": b'{"text": "a"}\n{"body": "a"}',
        "cut.jsonl": b'{"text": "a"}\n{"text": "', "null.parquet": dict(text=["a", None]),
        "binary.parquet": dict(text=[b"a"]), "int.parquet": dict(text=[1]),
        "list.parquet": dict(text=[["a"]]), "none.parquet": dict(body=["a"])}
    for name, content in refused.items():
        with pytest.raises(SystemExit):
            read(name, content)
        said = capsys.readouterr().err
        assert name in said and said.count("\n") == 2, said
        if name.endswith(("jsonl", "null.parquet")) and "latin" not in name:
            assert "line or row 2:" in said
    with pytest.raises(SystemExit):
        read("late.parquet", dict(text=["a"] * 3000 + [None]))
    assert "line or row 3001:" in capsys.readouterr().err
    # a file that is damaged in the middle
    pq.write_table(pa.table(dict(text=[str(n) * 50 for n in range(5000)])), tmp_path / "b.parquet")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[100:3000] = bytes(2900)
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(SystemExit):
        list(fineweb.read_documents([str(tmp_path / "b.parquet")]))
    assert "b.parquet" in capsys.readouterr().err


def test_text_files_are_found_by_name_folder_and_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "x[1].txt", "x1.txt", "a,b.txt", "folder[2]/sub/b.jsonl", "folder[2]/a.md":
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        open(name, "w").close()
    os.makedirs("folder[2]/sub.txt")
    assert fineweb.text_files("x[1].txt") == ["x[1].txt"]
    assert fineweb.text_files("x[0-9].txt") == ["x1.txt"]
    assert fineweb.text_files("folder[2]") == ["folder[2]/sub/b.jsonl"]
    assert fineweb.text_files("x1.txt,folder[2]") == ["x1.txt", "folder[2]/sub/b.jsonl"]
    assert fineweb.text_files("a,b.txt") == ["a,b.txt"]


@pytest.mark.parametrize("words, hint", [
    ("text=2024", "text=2024"), ("text=", "gives no value"), ("text=text.txt shard_size=0", ">= 1"),
    ("text=text.txt max_tokens=300M", "whole number"), ("tokenizer=learn", "needs text="),
    ("text=text.txt data=text.txt", "not a folder"), ("text=text.txt val_tokens=-1", ">= 1"),
    ("text=text.txt tokenizer=nowhere.tiktoken", "no such file"),
    ("text=text.txt val_tokens=100 max_tokens=100", "nothing to train on")])
def test_fineweb_refuses_before_anything_is_written(words, hint, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXT), encoding="utf-8")
    assert hint in run_here(f"fineweb.py {words}", tmp_path, ok=False)
    written = {name for _, _, names in os.walk(tmp_path) for name in names}
    assert written <= {"text.txt", ".lock"}


def test_a_terminal_without_all_letters_shows_the_others(tmp_path):
    (tmp_path / "☕.txt").write_text("\n".join(TEXT), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, os.path.join(REPO, "fineweb.py"), "text=☕.txt", "val_tokens=999999",
         "tokenizer=learn", "vocab_size=257"],
        cwd=tmp_path, capture_output=True, env=os.environ | dict(PYTHONIOENCODING="cp1252"))
    assert done.returncode == 2 and b"text=?.txt" in done.stdout
    assert b"lower val_tokens" in done.stderr


def test_transformers_reads_our_tokenizer_files(learned, tmp_path):
    coco.mend_torchvision()
    import transformers
    tokenizer, _ = learned
    for name, content in zip(("vocab.json", "merges.txt"), fineweb.vocab_and_merges(tokenizer)):
        (tmp_path / name).write_bytes(content)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in TEXT[:4] + ["unseen ☃ text,  spaced", fineweb.EOT]:
        assert theirs.encode(text) == tokenizer.encode(text, allowed_special="all")


def test_learned_pairs_are_merged_from_the_left(tmp_path):
    """A tokenizer merges the first two of "---". If learning merged the last two, some tokens of
    longer words could never be produced, and merges.txt would name parts that are no tokens."""
    text = fineweb.learn_bpe(["loool looo |---|--- ----- |-- a---b aaaa aaaab"] * 9, 330)
    vocab, merges = fineweb.vocab_and_merges(fineweb.get_tokenizer(text))
    vocab = json.loads(vocab)
    for pair in merges.decode().splitlines()[1:]:
        assert all(part in vocab for part in pair.split(" ")), pair


@pytest.mark.parametrize("pairs_are_lists", [True, False])
def test_newer_folders_with_one_tokenizer_file_are_read(learned, tmp_path, pairs_are_lists):
    tokenizer, tiktoken_text = learned
    vocab, merges = fineweb.vocab_and_merges(tokenizer)
    pairs = merges.decode().splitlines()[1:]
    if pairs_are_lists:
        pairs = [pair.split(" ") for pair in pairs]
    content = dict(model=dict(type="BPE", vocab=json.loads(vocab), merges=pairs))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert fineweb.read_vocab(str(tmp_path)) == tiktoken_text


def test_a_folders_own_vocabulary_is_read(learned, tmp_path, capsys):
    tokenizer, tiktoken_text = learned
    vocab, merges = fineweb.vocab_and_merges(tokenizer)
    (tmp_path / "vocab.json").write_bytes(vocab)
    (tmp_path / "merges.txt").write_bytes(merges)
    assert fineweb.read_vocab(str(tmp_path)) == tiktoken_text
    # another order of ids, as other libraries give them: <|endoftext|> first; merges changed places
    vocab, merges = json.loads(vocab), merges.decode().splitlines()
    moved = {token: (rank + 1) % len(vocab) for token, rank in vocab.items()}
    swapped = [merges[0], merges[2], merges[1], *merges[3:], ""]
    for bad_vocab, bad_merges in (moved, merges), (vocab, swapped), (vocab, []), ([], merges):
        (tmp_path / "vocab.json").write_text(json.dumps(bad_vocab))
        (tmp_path / "merges.txt").write_text("\n".join(bad_merges))
        with pytest.raises(SystemExit):
            fineweb.read_vocab(str(tmp_path))
        assert "vocabulary of GPT-2's kind" in capsys.readouterr().err


@needs_shared
def test_gpt2s_own_files_come_out_of_tiktoken_and_go_in_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(SHARED, "tiktoken"))
    gpt2 = fineweb.get_tokenizer("gpt2")
    vocab, merges = fineweb.vocab_and_merges(gpt2)
    (tmp_path / "vocab.json").write_bytes(vocab)
    (tmp_path / "merges.txt").write_bytes(merges)
    vocab, merges = json.loads(vocab), merges.decode().splitlines()
    assert len(vocab) == 50257 and vocab["Ġthe"] == 262
    assert len(merges) == 50_001 and merges[1:4] == ["Ġ t", "Ġ a", "h e"]
    assert fineweb.read_vocab(str(tmp_path)) == "gpt2"
    # GPT-2's ranks given as a file are GPT-2's tokenizer: the shards need none of their own
    monkeypatch.setattr(fineweb, "GPT2_SHA256", "")
    ranks = fineweb.tokenizer_text(gpt2._mergeable_ranks)
    (tmp_path / "r50k_base.tiktoken").write_text(ranks)
    (tmp_path / "text.txt").write_text("\n".join(TEXT), encoding="utf-8")
    run_here("fineweb.py text=text.txt data=shards tokenizer=r50k_base.tiktoken val_tokens=100",
             tmp_path)
    assert not (tmp_path / "shards/tokenizer.tiktoken").exists()
    tokens = np.concatenate(read_shards(tmp_path / "shards"))
    assert gpt2.decode(tokens.tolist()).split(fineweb.EOT)[1:] == TEXT


def test_a_full_disk_leaves_what_was_there(tmp_path, capsys):
    def fills_the_disk(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("before")
    with pytest.raises(SystemExit):
        fineweb.save_atomically(str(tmp_path / "file"), fills_the_disk)
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "before" and os.listdir(tmp_path) == ["file"]


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with three parquet files of FineWeb-Edu."""
    FILES, asked = {}, []

    def do_GET(self):
        self.asked.append(os.path.basename(self.path))
        if "/api/" in self.path:
            listing = [dict(path=f"sample/10BT/{name}") for name in self.FILES]
            answer = json.dumps(listing).encode()
        else:
            answer = self.FILES[os.path.basename(self.path)]
        self.send_response(200)
        self.send_header("Content-Length", len(answer))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


def test_fineweb_downloads_no_more_than_it_needs(learned, serve, tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for n in range(3):
        table = pa.BufferOutputStream()
        pq.write_table(pa.table(dict(text=[f"file {n}"] + TEXT)), table)
        Hub.FILES[f"{n:03d}_00000.parquet"] = table.getvalue().to_pybytes()
    tokenizer, tiktoken_text = learned
    (tmp_path / "bpe.tiktoken").write_text(tiktoken_text)
    n_tokens = sum(map(len, fineweb.tokenize(["file 0"] + TEXT, tokenizer))) + 500
    monkeypatch.setenv("HF_ENDPOINT", serve(Hub))
    run_here("fineweb.py data=shards tokenizer=bpe.tiktoken val_tokens=100 shard_size=1000 "
             f"max_tokens={n_tokens}", tmp_path)
    assert Hub.asked == ["10BT", "000_00000.parquet", "001_00000.parquet"]
    assert sum(map(len, read_shards(tmp_path / "shards"))) == n_tokens


# ---- HellaSwag (hellaswag.py)


def made_questions(n):
    rng = np.random.default_rng(0)

    def made(longest):
        return rng.integers(101, size=rng.integers(1, longest)).tolist()

    return [(made(20), [made(12) for _ in range(4)], int(rng.integers(4))) for _ in range(n)]


@torch.no_grad()
def ending_losses(gpt, context, ending):
    """The loss of each token of an ending, one row at a time."""
    log_probs = gpt(torch.tensor([context + ending])).log_softmax(-1)[0, len(context) - 1:-1]
    return -log_probs.gather(1, torch.tensor(ending)[:, None])


def test_hellaswag_in_batches_equals_one_row_at_a_time():
    gpt, questions = small_gpt(), made_questions(60)
    expected = []
    for context, endings, _ in questions:
        losses = [ending_losses(gpt, context, ending) for ending in endings]
        expected.append([int(np.argmin([loss.sum() for loss in losses])),
                         int(np.argmin([loss.mean() for loss in losses]))])
    for prefill in (None, gpt.prefill):
        assert hellaswag.predict(gpt, questions, prefill, tokens_at_once=200).tolist() == expected
    labels = np.array([[label] for _, _, label in questions])
    accuracy = (np.array(expected) == labels).mean(0)
    assert hellaswag.evaluate(gpt, questions, gpt.prefill) == pytest.approx(accuracy, abs=1e-6)


QUESTION = dict(ctx="the cat sat on", label=1,
                endings=["a dog", "the mat", "2 birds , a cat and a dog", "the dog's mat"])


@pytest.fixture
def questions_file(tmp_path):
    """questions_file(*changes) -> the path of a file with a question for each, changed so."""
    def write(*changes):
        lines = [json.dumps(QUESTION | change) for change in changes]
        (tmp_path / "questions.jsonl").write_text("\n".join(lines))
        return str(tmp_path / "questions.jsonl")

    return write


def test_hellaswag_shows_a_question(learned, questions_file, tmp_path):
    (tmp_path / "bpe.tiktoken").write_text(learned[1])
    questions_file({}, dict(label=0))
    command = "hellaswag.py file=questions.jsonl tokenizer=bpe.tiktoken"
    said = run_here(f"{command} number=1", tmp_path)
    assert "2 questions" in said and "ending 0 (the true one" in said
    assert "'the cat sat on the mat'" in said
    assert "questions 0 to 1" in run(f"{command} number=2", tmp_path, ok=False)


@pytest.mark.parametrize("content, hint", [
    (json.dumps(QUESTION) + "\n" + json.dumps(QUESTION | dict(label=4)), "line 2"),
    (json.dumps(QUESTION | dict(endings=["a"])), "line 1"), (json.dumps(["ctx"]), "line 1"),
    (json.dumps(QUESTION | dict(ctx=None)), "line 1"), ("", "no question"),
    (b'{"ctx": "caf\xe9"}', "can't be read as UTF-8"), (None, "Is a directory")])
def test_hellaswag_names_what_is_no_question(content, hint, learned, tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit):
        hellaswag.load_questions(str(path), learned[0])
    said = capsys.readouterr().err
    assert hint in said and "questions.jsonl" in said


def test_long_contexts_lose_their_beginning(learned, questions_file):
    tokenizer, _ = learned
    path = questions_file(dict(ctx="the cat sat on the mat " * 20))
    (context, endings, _), = hellaswag.load_questions(path, tokenizer, block_size=32)
    assert len(context) + max(map(len, endings)) - 1 == 32
    assert tokenizer.decode(context).endswith("the mat ")


def test_questions_whose_endings_do_not_fit_are_left_out(learned, questions_file, capsys):
    tokenizer, _ = learned
    path = questions_file({}, dict(endings=["the cat sat on the mat " * 9] * 4), {})
    questions = hellaswag.load_questions(path, tokenizer, block_size=16)
    assert len(questions) == 2 and "1 of 3 questions are left out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        hellaswag.load_questions(path, tokenizer, block_size=2)
    assert "fits into block_size=2" in capsys.readouterr().err


@needs_shared
def test_every_real_question_is_read(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(SHARED, "tiktoken"))
    path = os.path.join(SHARED, "text", "hellaswag_val.jsonl")
    questions = hellaswag.load_questions(path, fineweb.get_tokenizer("gpt2"))
    assert len(questions) == 10_042
    assert set(label for _, _, label in questions) == {0, 1, 2, 3}


# ---- the GPT (train_gpt2.py)


def transformers_gpt2(**kw):
    coco.mend_torchvision()
    import transformers
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=101, n_positions=48, n_embd=32, n_layer=3,
                                     n_head=4, initializer_range=0.2, **kw)
    return transformers.GPT2LMHeadModel(config).eval()


def test_logits_and_loss_equal_transformers(tmp_path):
    theirs = transformers_gpt2()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(0, 101, (3, 48))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)
        loss = ours(idx[:, :-1], idx[:, 1:])
        torch.testing.assert_close(loss, theirs(idx, labels=idx).loss, atol=1e-5, rtol=0)


def test_transformers_loads_what_we_save(tmp_path):
    coco.mend_torchvision()
    import transformers
    ours = small_gpt()
    ours.save_pretrained(str(tmp_path))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = torch.randint(0, 101, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx), atol=1e-4, rtol=1e-4)


def test_cached_generation_equals_recomputing():
    gpt = small_gpt()
    start = torch.randint(0, 101, (3, 5))
    plain = start
    with torch.no_grad():
        for _ in range(20):
            plain = torch.cat([plain, gpt(plain)[:, -1:].argmax(-1)], 1)
    assert torch.equal(gpt.generate(start, 20, temperature=0), plain)


def test_cached_logits_in_chunks_equal_whole():
    gpt, idx = small_gpt(), torch.randint(0, 101, (2, 30))
    cache = train_gpt2.KVCache(gpt.config, 2, 30, idx.new_empty(0, dtype=torch.float32))
    with torch.no_grad():
        chunks = torch.cat([gpt(part, kv_cache=cache) for part in idx.split([7, 1, 12, 10], 1)], 1)
        torch.testing.assert_close(chunks, gpt(idx), atol=1e-4, rtol=1e-4)


def test_seeded_generation_repeats_itself():
    gpt, start = small_gpt(), torch.zeros(3, 2, dtype=torch.long)
    first, again, other = (gpt.generate(start, 20, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("train_head", [True, False])
def test_loss_in_chunks_equals_cross_entropy(train_head):
    torch.manual_seed(0)
    N = 1300  # more than two chunks
    x, weight = torch.randn(N, 16), torch.randn(128, 16)
    targets, loss_weight = torch.randint(0, 101, (N,)), torch.rand(N) / N
    ours, theirs = ((x.clone().requires_grad_(), weight.clone().requires_grad_(train_head))
                    for _ in range(2))
    fused = train_gpt2.FusedLinearCrossEntropy.apply
    loss, token_losses = fused(*ours, targets, loss_weight, 101, True, None)
    expected = F.cross_entropy(theirs[0] @ theirs[1][:101].t(), targets, reduction="none")
    (3 * loss).backward()
    (3 * expected * loss_weight).sum().backward()
    torch.testing.assert_close(loss, (expected * loss_weight).sum(), atol=1e-5, rtol=0)
    for losses in (token_losses, fused(x, weight, targets, loss_weight, 101, False, None)[1]):
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def peak_growth(work):
    """By how many bytes work() raises the memory of this process, at most; nan where not known."""
    def kilobytes(name):
        with open("/proc/self/status") as f:
            return int(re.search(rf"{name}:\s+(\d+)", f.read())[1])

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # forget the peak so far
    except OSError:
        return math.nan
    before = kilobytes("VmRSS")
    work()
    return 1024 * (kilobytes("VmHWM") - before)


def test_compiled_training_equals_eager_training_with_one_program_for_all_blocks(
        tmp_path, monkeypatch):
    from torch._dynamo.utils import counters
    # programs kept from another run may have been compiled for another kind of CPU
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = small_gpt(scale=1), small_gpt(scale=1)
    train_gpt2.compile_for_training(compiled)
    batches = torch.randint(0, 101, (20, 13, 49)).unbind()  # two chunks, 512 and 112 rows
    losses, grads, logits = [], [], []
    for model in (plain, compiled):
        optimizers = train_gpt2.make_optimizers(model, "adamw", 1e-4, 0.1)
        model(batches[0][:, :-1], batches[0][:, 1:]).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
        losses.append([train_gpt2.train_step(model, model, optimizers, iter(batches[i:i + 2]), 2,
                                             1e-4, 1.0, ALONE)[0].item() for i in range(0, 20, 2)])
        with train_gpt2.uncompiled(model is compiled), torch.no_grad():  # other shapes in between
            start = torch.zeros(3, 2, dtype=torch.long)
            model.generate(start, 9)
            logits.append(model(start.repeat(2, 4)))
        losses[-1].append(model(batches[0][:, :-1], batches[0][:, 1:]).item())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-3)
    # one for all blocks, one of the loss for each size of a chunk
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    # 5,120 rows of 50,304 float32 logits are 1 GB, which are never held all at once
    large = small_gpt(n_layer=1, vocab_size=50257)
    train_gpt2.compile_for_training(large)
    x, targets = torch.randn(5120, 32, requires_grad=True), torch.zeros(5120, dtype=torch.long)
    large.cross_entropy(x, targets)[0].backward()  # compiles
    assert not peak_growth(lambda: large.cross_entropy(x, targets)[0].backward()) > 0.5e9


def test_compile_none_means_cuda_with_triton(monkeypatch, capsys):
    import torch.utils._triton
    gpu = Process(0, 1, "cuda", torch.bfloat16)
    for found in (True, False):
        monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: found)
        assert train_gpt2.should_compile(None, gpu) == found
        assert ("Triton" in capsys.readouterr().out) != found
        assert train_gpt2.should_compile(True, gpu) and not train_gpt2.should_compile(False, gpu)
        assert train_gpt2.should_compile(True, ALONE) and not train_gpt2.should_compile(None, ALONE)


def test_the_first_lines_say_what_runs_where(road):
    said = run_here(f"{GPT_RUN} out_dir=first_lines max_steps=2 warmup_steps=2", road)
    assert "1 process(es) x 4 x 4 x 32 on cpu, float32, not compiled" in said
    assert "warmup_steps=2: in a run of max_steps=2 the learning rate only rises" in said
    assert said.count("GB at most") == 1


def test_the_captioner_compiles_once_for_captions_of_any_length():
    graphs, model = [], open_eyed("xattn")

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    compiled = model.compiled(backend=backend)
    for T in (8, 9, 12, 7, 11):
        idx, features = torch.randint(0, 101, (3, T)), torch.randn(3, 9, 24)
        targets = idx.masked_fill(torch.arange(T) >= torch.tensor([[T], [T - 2], [T - 3]]), -100)
        grads = []
        for step in (model, compiled):
            model.zero_grad()
            step(idx, features, targets).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    assert len(graphs) == 2  # the second one for every length


@pytest.mark.parametrize("name, n_layer, n_head, n_embd, millions", [
    ("gpt2", 12, 12, 768, 124), ("gpt2-medium", 24, 16, 1024, 355),
    ("gpt2-large", 36, 20, 1280, 774), ("gpt2-xl", 48, 25, 1600, 1558)])
def test_all_four_sizes_have_the_published_shapes(name, n_layer, n_head, n_embd, millions):
    coco.mend_torchvision()
    import transformers
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with torch.device("meta"):
        ours = GPT(GPTConfig(**sizes))
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    shapes = {}
    for key, w in ours.state_dict().items():
        shapes[key] = tuple(w.shape)
        if len(w) == 50304:  # the padded vocabulary
            shapes[key] = 50257, n_embd
        elif train_gpt2.is_conv1d(key, w):
            shapes[key] = tuple(w.t().shape)
    assert shapes == {key: tuple(w.shape) for key, w in theirs.state_dict().items()}
    assert round(sum(p.numel() for p in theirs.parameters()) / 1e6) == millions


def test_top_k_and_stop():
    gpt = small_gpt()
    start = torch.zeros(64, 1, dtype=torch.long)
    best = gpt(start[:1])[0, -1].topk(3).indices
    assert set(gpt.generate(start, 1, top_k=3)[:, 1].tolist()) <= set(best.tolist())
    stop = int(best[0])
    rows = gpt.generate(start, 30, stop=stop).tolist()
    assert all(set(row[row.index(stop, 1):]) == {stop} for row in rows if stop in row[1:])


def test_the_gpt_can_be_copied_into_a_notebook():
    with open(train_gpt2.__file__) as f:
        piece = f.read().split("# GPT-2 WITH A KV CACHE")[1].split("# THE LOSS WITHOUT")[0]
    cells = dict(torch=torch, nn=torch.nn, F=F, math=math, dataclass=dataclasses.dataclass,
                 __name__="notebook")
    exec("# " + piece, cells)
    copied = cells["GPT"](cells["GPTConfig"](48, 101, 4, 4, 32)).eval()
    ours, idx = small_gpt(), torch.randint(0, 101, (2, 9))
    copied.load_state_dict(ours.state_dict())
    assert torch.equal(copied(idx), ours(idx))
    assert torch.equal(copied.generate(idx, 5, seed=1), ours.generate(idx, 5, seed=1))


def test_too_long_a_text_is_refused():
    with pytest.raises(ValueError, match="block_size=48"):
        small_gpt()(torch.zeros(1, 49, dtype=torch.long))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_optimizer_group(name):
    model = Captioner(small_gpt(), "xattn", 1, 24)
    optimizers = train_gpt2.make_optimizers(model, name, 1e-3, 0.1)
    groups = [g for optimizer in optimizers for g in optimizer.param_groups]
    held = [p for g in groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(p.dim() >= 2 for g in groups if g["weight_decay"] for p in g["params"])


def test_a_changed_weight_decay_takes_effect_on_resume():
    before, after = (train_gpt2.make_optimizers(small_gpt(), "adamw", 1e-3, weight_decay)
                     for weight_decay in (0.1, 0.5))
    checkpoint = dict(optimizers=[optimizer.state_dict() for optimizer in before])
    train_gpt2.resume_optimizers(after, checkpoint, "ckpt.pt")
    assert [group["weight_decay"] for group in after[0].param_groups] == [0.5, 0.0]


def test_schedule():
    lr = [train_gpt2.get_lr(step, 1.0, 0.1, 10, 110) for step in range(120)]
    wsd = [train_gpt2.get_lr(step, 1.0, 0.1, 10, 110, "wsd") for step in range(120)]
    assert wsd[9] == 1.0 == pytest.approx(wsd[90]) and wsd[100] == pytest.approx(0.55)
    assert lr[0] == 0.1 and lr[9] == lr[10] == 1.0 and lr[60] == pytest.approx(0.55)
    for rates in (lr, wsd):
        assert rates[110] == rates[119] == pytest.approx(0.1)


def test_loader_uses_every_sequence_once_an_epoch(tmp_path):
    for name, n in (("edufineweb_train_000001", 105), ("edufineweb_train_000002", 43)):
        np.save(tmp_path / f"{name}.npy", np.arange(n, dtype=np.uint16))
    loader = train_gpt2.Loader(str(tmp_path), "train", 10, vocab_size=200, seed=3)
    assert loader.n_seq == 10 + 4
    first, second = (loader.sequences(range(e * 14, e * 14 + 14)).numpy() for e in (0, 1))
    expected = sorted([[*range(j, j + 11)] for n in (10, 4) for j in range(0, 10 * n, 10)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == expected
    assert first.tolist() != second.tolist()
    # a pure function of the number
    assert np.array_equal(loader.sequences([3, 17]), [first[3], second[3]])
    fetched = list(loader.batches([range(3), [3, 17]], "cpu"))
    assert np.array_equal(fetched[0], first[:3]) and len(fetched) == 2
    assert np.array_equal(fetched[1], [first[3], second[3]])
    with pytest.raises(SystemExit):
        train_gpt2.Loader(str(tmp_path), "train", 10, vocab_size=50).sequences(range(14))


def test_llm_c_shards_are_read(tmp_path, capsys):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 105
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(header.tobytes() + np.arange(105, dtype=np.uint16).tobytes())
    loader = train_gpt2.Loader(str(tmp_path), "train", 10, 200)
    assert loader.sequences([1]).tolist() == [[*range(10, 21)]]
    whole = path.read_bytes()
    for content, hint in ((whole[:-2], "cut short"), (bytes(4) + whole[4:], "20240520")):
        path.write_bytes(content)
        with pytest.raises(SystemExit):
            train_gpt2.Loader(str(tmp_path), "train", 10, 200)
        assert hint in capsys.readouterr().err


def test_checkpoints_are_written_while_training_goes_on(tmp_path):
    folder, weight = str(tmp_path), torch.ones(3)
    writer = train_gpt2.BackgroundWriter()
    writer.submit(folder, dict(model=dict(w=weight), step=1), True)
    weight += 1  # the next step
    writer.wait()
    for name in ("ckpt.pt", "best.pt"):
        saved = train_gpt2.load_checkpoint(str(tmp_path / name))
        assert saved["model"]["w"].tolist() == [1, 1, 1] and saved["step"] == 1
    writer.submit(str(tmp_path / "ckpt.pt/inside"), dict(step=2), False)  # no folder can be there
    with pytest.raises(OSError):
        writer.submit(folder, dict(step=3), False)
    # a run that was killed between the two names leaves a hard link to best.pt
    os.link(tmp_path / "best.pt", tmp_path / "ckpt.pt.tmp")
    train_gpt2.save_run(folder, dict(step=4), False)
    steps = [train_gpt2.load_checkpoint(str(tmp_path / name))["step"]
             for name in ("ckpt.pt", "best.pt")]
    assert steps == [4, 1]


def test_cudnn_attention_comes_first_on_hopper(monkeypatch):
    for capability, first in (((9, 0), "CUDNN"), ((10, 3), "CUDNN"), ((8, 9), "FLASH")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        backends = train_gpt2.attention_backends("cuda:1")
        assert backends[0].name == f"{first}_ATTENTION" and backends[-1].name == "MATH"
    assert "CUDNN_ATTENTION" not in [b.name for b in train_gpt2.attention_backends("cpu")]


def test_cudnn_attention_is_for_training_steps_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    train_gpt2.setup("cpu", None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa_kernel(train_gpt2.attention_backends("cuda"), set_priority=True):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_time_left_is_judged_without_the_first_step(tmp_path, capsys):
    log = train_gpt2.Log(str(tmp_path / "log.csv"), ["step"], 0)
    row = dict(loss=1.0, norm=1.0, lr=1.0, ms=2000)
    for step in range(5):
        log.add(step=step)
        log.times[-1] = 99 + 2.0 * step  # the first step took 99 s, the others 2
        train_gpt2.print_step(row | dict(step=step), 15, log.seconds_per_step())
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0] and lines[4].endswith("2000 ms | 0.3 min left")  # 10 x 2 s


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_exactly(road, how):
    settings = f"{GPT_RUN} max_steps=40 out_dir=stopped_{int(how)}"
    with open(road / "killed.log", "w") as said:
        script, *words = settings.split()
        process = subprocess.Popen([sys.executable, os.path.join(REPO, script), *words], cwd=road,
                                   stdout=said)
    log = road / f"stopped_{int(how)}/log.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 10):
        time.sleep(0.01)
    process.send_signal(how)
    code = process.wait()
    assert code == (-how if how == signal.SIGKILL else 0), (road / "killed.log").read_text()
    before = len(train_gpt2.read_log(log))
    assert before < 40  # it was not done yet
    assert not log.with_name("curves.png").exists()  # by which the captioner's demo knows its end
    run(f"{settings} init_from=resume", road)
    if not (road / "never_stopped").exists():
        run(f"{GPT_RUN} max_steps=40 out_dir=never_stopped", road)
    for column in ("loss", "val_loss"):
        assert log_column(log, column) == log_column(road / "never_stopped/log.csv", column)
    assert len(log_column(log, "loss")) == 40
    samples = (road / f"{folder}/samples.txt" for folder in ("never_stopped", log.parent.name))
    assert len({path.read_text() for path in samples}) == 1


def test_resuming_names_what_changed_and_starts_at_0_where_nothing_is_saved(road):
    said = run_here(f"{GPT_RUN} out_dir=twice max_steps=4 init_from=resume", road)
    assert "starting at step 0" in said
    # what is not typed is as it was
    said = run_here("train_gpt2.py out_dir=twice max_steps=6 init_from=resume weight_decay=0.2 "
                    "eval_tokens=500 device=cpu", road)
    assert "weight_decay=0.2 (was 0.1)" in said and "max_steps=6 (was 4)" in said
    assert "eval_tokens=500 (was" not in said
    files = [".lock", "best.pt", "ckpt.pt", "curves.png", "log.csv", "samples.txt"]
    assert sorted(os.listdir(road / "twice")) == files
    assert (road / "twice/samples.txt").read_text().count("step 6 >") == 4


def test_gpt_hellaswag_samples_and_export(road, tmp_path):
    questions = [json.dumps(QUESTION | dict(label=n % 4)) for n in range(6)]
    (road / "questions.jsonl").write_text("\n".join(questions))
    command = ("train_gpt2.py data=tokens init_from=gpt/best.pt eval_only=True batch_size=4 "
               "hellaswag_file=questions.jsonl hellaswag_questions=5 block_size=32 device=cpu")
    alone, two = (run(command, road, launcher=launcher, env=dict(OMP_NUM_THREADS="1"))
                  for launcher in ((), (*TORCHRUN, "--nproc_per_node=2")))
    assert alone.splitlines()[-2:] == two.splitlines()[-2:]
    assert "HellaSwag, 5 questions: acc 0." in alone
    command = "train_gpt2.py out_dir=gpt prompt=there max_new_tokens=5 device=cpu"
    said = run_here(command, road)
    assert said.count("\n> there") == 4 and said == run_here(command, road)
    run_here(f"train_gpt2.py init_from=gpt/ckpt.pt export={tmp_path} device=cpu", road)
    coco.mend_torchvision()
    import transformers
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(road / "gpt/ckpt.pt"))
    idx = torch.tensor([tokenizer.encode("a small red circle above a cross")])
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("words, hint", [
    ("total_batch_size=500", "nearest is total_batch_size=512"),
    ("total_batch_size=1", "nearest is total_batch_size=128"), ("total_batch_size=0", ">= 1"),
    ("data=nowhere", "no val shards"), ("schedule=linear", "one of cosine, wsd"),
    ("device=gpu", "device=gpu"), ("wandb_log=True", "pip install wandb"),
    ("init_from=gpt/ckpt.pt data=other", "another tokenizer"), ("n_head=3", "3 heads"),
    ("init_from=resume out_dir=gpt n_layer=3", "n_layer=2 and keeps it"), ("max_steps=0", ">= 1"),
    ("exam=5", "hellaswag_questions="),
    ("hellaswag_questions=3 hellaswag_file=empty", "no question"),
    ("init_from=nowhere", "no such file"), ("init_from=resume out_dir=absent prompt=x", "absent")])
def test_gpt_bad_input(road, words, hint):
    if not (road / "other").exists():  # the same shards, as if of GPT-2's own tokens
        shutil.copytree(road / "tokens", road / "other",
                        ignore=shutil.ignore_patterns("tokenizer.tiktoken"))
    (road / "empty").write_text("")
    if "wandb" in words and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    assert hint in run(f"{GPT_RUN} out_dir=bad {words}", road, ok=False)


def test_gpt_learns(road):
    losses = log_column(road / "gpt/log.csv", "val_loss")
    n_vocab = fineweb.get_tokenizer(str(road / "tokens/tokenizer.tiktoken")).n_vocab
    assert abs(losses[0] - np.log(n_vocab)) < 0.1 and losses[-1] < losses[0] - 0.3


TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


@pytest.mark.parametrize("script, many", [(GPT_RUN + " max_steps=20", (2,)),
                                          (CAPTION_RUN + " dropout=0.0", (2,))])
def test_many_processes_equal_one(road, script, many):
    name = script.split(".")[0]
    run(f"{script} out_dir=one_{name}", road)
    for n in many:
        run(f"{script} out_dir={n}_{name}", road, env=dict(OMP_NUM_THREADS="1"),
            launcher=(*TORCHRUN, f"--nproc_per_node={n}"))
        one, several = (log_column(road / f"{folder}_{name}/log.csv", "loss")
                        for folder in ("one", n))
        np.testing.assert_allclose(one, several, atol=1e-4)


def test_cut_checkpoint_is_refused(road, capsys):
    path = road / "cut.pt"
    path.write_bytes((road / "gpt/ckpt.pt").read_bytes()[:5000])
    with pytest.raises(SystemExit):
        train_gpt2.load_checkpoint(str(path))
    assert "cut short" in capsys.readouterr().err
    # the message of torch about what may be loaded has many lines, ours has one
    torch.save(argparse.Namespace(lr=1), road / "other.pt")
    with pytest.raises(SystemExit):
        train_gpt2.load_checkpoint(str(road / "other.pt"))
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


class Killed(BaseException):
    """What stands for a kill: no `except Exception` of the code may survive it."""


@pytest.mark.parametrize("is_best", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_moment_of_saving_leaves_a_run_to_go_on_with(
        is_best, links, tmp_path, monkeypatch):
    countdown = [math.inf]

    def killable(function):
        def call(*args, **kw):
            countdown[0] -= 1
            if countdown[0] < 0:
                raise Killed
            return function(*args, **kw)
        return call

    def no_links(*args):
        raise OSError("no links here")

    for name in ("fsync", "replace", "remove", "link"):
        function = no_links if name == "link" and not links else getattr(os, name)
        monkeypatch.setattr(os, name, killable(function))
    monkeypatch.setattr(shutil, "copyfile", killable(shutil.copyfile))
    for moment in itertools.count():
        folder = str(tmp_path / str(moment))
        os.makedirs(folder)
        countdown[0] = math.inf
        train_gpt2.save_run(folder, dict(step=1), True)
        countdown[0] = moment
        with suppress(Killed):
            train_gpt2.save_run(folder, dict(step=2), is_best)
        finished, countdown[0] = countdown[0] >= 0, math.inf
        last, best = (train_gpt2.load_checkpoint(f"{folder}/{name}.pt")["step"]
                      for name in ("ckpt", "best"))
        # the best is never older than what a resumed run takes for the best so far
        assert (last, best) in ([(1, 1), (1, 2), (2, 2)] if is_best else [(1, 1), (2, 1)])
        if finished:
            break
    assert (last, best) == (2, 2 if is_best else 1) and moment > 2
    assert sorted(os.listdir(folder)) == ["best.pt", "ckpt.pt"]


def test_a_run_is_never_trained_over(road):
    before = (road / "gpt/log.csv").read_bytes()
    for words in ("", "init_from=gpt/best.pt"):
        assert "init_from=resume" in run(f"{GPT_RUN} out_dir=gpt {words}", road, ok=False)
    (road / "val_only").mkdir()
    for name in ("tokenizer.tiktoken", "edufineweb_val_000000.npy"):
        shutil.copy(road / "tokens" / name, road / "val_only")
    assert "no train shards" in run(f"{GPT_RUN} out_dir=gpt init_from=resume data=val_only", road,
                                    ok=False)
    assert (road / "gpt/log.csv").read_bytes() == before


def test_the_trained_run_is_what_one_samples_exports_and_evaluates(road):
    run_here("train_gpt2.py out_dir=gpt device=cpu export=exported", road)
    (road / "exported/vocab.json").unlink()
    idx = torch.arange(20)[None]
    with torch.no_grad():
        trained, exported = (GPT.from_pretrained(str(road / name))(idx)
                             for name in ("gpt/ckpt.pt", "exported"))
    assert torch.equal(trained, exported)
    # data, sizes and eval_tokens are the run's; what is said is what was read: whole sequences
    said = run_here("train_gpt2.py out_dir=gpt device=cpu eval_only=True", road)
    loss = log_column(road / "gpt/log.csv", "val_loss")[-1]
    assert f"resume: validation loss {loss:.4f} over 992 tokens" in said
    said = run_here("train_gpt2.py out_dir=gpt device=cpu eval_only=True eval_tokens=10", road)
    assert "over 32 tokens" in said


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    small_gpt(n_layer=2).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("key, value", [
    ("activation_function", "relu"), ("activation_function", "gelu"),
    ("activation_function", "quick_gelu"), ("layer_norm_epsilon", 1e-6),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
    ("tie_word_embeddings", False), ("model_type", "gpt_neo")])
def test_another_model_is_not_taken_for_a_gpt2(key, value, tiny_gpt2_folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    shutil.copytree(tiny_gpt2_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    if key == "tie_word_embeddings":
        GPT.from_pretrained(str(tmp_path))  # without an output matrix of its own, it is tied
        weights = load_file(tmp_path / "model.safetensors")
        weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
        save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        GPT.from_pretrained(str(tmp_path))
    assert key in capsys.readouterr().err


def test_weights_in_several_files_are_read(tiny_gpt2_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    weights = load_file(tiny_gpt2_folder / "model.safetensors")
    files = {key: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(weights)}
    for file in set(files.values()):
        save_file({key: w for key, w in weights.items() if files[key] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=files)))
    shutil.copy(tiny_gpt2_folder / "config.json", tmp_path)
    whole, parts = (GPT.from_pretrained(str(f)).state_dict() for f in (tiny_gpt2_folder, tmp_path))
    assert all(torch.equal(w, parts[key]) for key, w in whole.items())


def test_a_folders_own_vocabulary_is_used(road, tmp_path):
    folder = tmp_path / "model"
    run_here(f"train_gpt2.py out_dir=gpt device=cpu export={folder}", road)
    encoding = fineweb.get_tokenizer(str(road / "tokens/tokenizer.tiktoken"))
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == encoding.eot_token
    model, tokenizer, _ = train_gpt2.load_model(str(folder))
    assert train_gpt2.same_tokenizer(tokenizer, (road / "tokens/tokenizer.tiktoken").read_text())
    words = f"init_from={folder} device=cpu"
    assert "\n> there" in run_here(f"train_gpt2.py prompt=there max_new_tokens=5 {words}", road)
    assert "validation loss" in run_here(
        f"train_gpt2.py data=tokens eval_only=True batch_size=4 {words}", road)
    (folder / "vocab.json").unlink()  # then the tokenizer is GPT-2's, with more tokens than these
    assert "a vocab.json" in run(f"train_gpt2.py prompt=there {words}", road, ok=False)


def test_tokenizers_are_compared_by_their_tokens(road):
    text = (road / "tokens/tokenizer.tiktoken").read_text()
    lines = text.splitlines(keepends=True)
    assert train_gpt2.same_tokenizer(text, "".join(reversed(lines)))
    assert not train_gpt2.same_tokenizer(text, "".join(lines[:-1]))
    swapped = [lines[0].split()[0] + " 1\n", lines[1].split()[0] + " 0\n"] + lines[2:]
    assert not train_gpt2.same_tokenizer(text, "".join(swapped))
    assert train_gpt2.same_tokenizer("gpt2", "gpt2")
    assert not train_gpt2.same_tokenizer("gpt2", text)


@pytest.mark.parametrize("text", ["1e3", "0x10", "None.", "a=b"])
def test_a_prompt_is_continued_as_it_stands(road, text):
    said = run_here(f"train_gpt2.py out_dir=gpt max_new_tokens=1 device=cpu prompt={text}", road)
    assert said.count(f"\n> {text}") == 4


def test_a_temperature_near_zero_is_greedy():
    gpt, start = small_gpt(), torch.zeros(3, 2, dtype=torch.long)
    likeliest = gpt.generate(start, 5, temperature=0)
    assert torch.equal(gpt.generate(start, 5, temperature=1e-45, top_k=50), likeliest)


def test_a_run_of_which_only_the_best_checkpoint_is_left(road):
    """It is not trained over, and resuming goes on from it."""
    shutil.copytree(road / "gpt", road / "best_only")
    os.remove(road / "best_only/ckpt.pt")
    assert "holds a run" in run(f"{GPT_RUN} out_dir=best_only", road, ok=False)
    step = train_gpt2.load_checkpoint(str(road / "best_only/best.pt"))["step"]
    run_here(f"{GPT_RUN} out_dir=best_only init_from=resume max_steps={step + 1}", road)
    assert train_gpt2.load_checkpoint(str(road / "best_only/ckpt.pt"))["step"] == step + 1


def test_the_best_loss_counts_anew_on_other_validation_text(road):
    shutil.copytree(road / "gpt", road / "other_text")
    shutil.copytree(road / "tokens", road / "tokens_b")
    path = road / "tokens_b/edufineweb_val_000000.npy"
    # random tokens: harder to predict
    np.save(path, np.random.default_rng(0).integers(0, 250, len(np.load(path)), np.uint16))
    run_here(f"{GPT_RUN} data=tokens_b out_dir=other_text init_from=resume max_steps=9", road)
    best = train_gpt2.load_checkpoint(str(road / "other_text/best.pt"))
    assert best["step"] in (8, 9) and best["best"] > 1.1 * min(
        log_column(road / "gpt/log.csv", "val_loss"))


def test_a_tilde_in_a_prompt_is_text():
    setting = fineweb.Setting("", str, "")
    assert fineweb.parse_setting("prompt", "~,x", setting) == "~,x"
    assert fineweb.parse_setting("data", "~,x", setting) == f"{os.path.expanduser('~')},x"


def test_ids_beyond_the_tokenizer_are_never_sampled():
    gpt = small_gpt()
    with torch.no_grad():
        gpt.lm_head.weight[90:] *= 100  # what would always win
    start = torch.zeros(16, 1, dtype=torch.long)
    assert gpt.generate(start, 5, temperature=0).max() >= 90 > gpt.generate(
        start, 5, temperature=0, n_vocab=90).max()
    assert gpt.generate(start, 5, n_vocab=90, seed=1).max() < 90


def test_a_run_survives_samples_and_plots_that_fail(road):
    (road / "unwritable/samples.txt").mkdir(parents=True)
    (road / "unwritable/curves.png").mkdir()
    said = run_here(f"{GPT_RUN} out_dir=unwritable max_steps=1 eval_interval=1", road)
    assert said.count("samples.txt could not be written (IsADirectoryError") == 2
    assert "curves.png could not be written" in said
    assert train_gpt2.load_checkpoint(str(road / "unwritable/ckpt.pt"))["step"] == 1


def test_a_log_that_was_changed_by_hand_is_named(tmp_path, capsys):
    path = tmp_path / "log.csv"
    path.write_text("\ufeffstep,loss,val_loss\n0,2.5,\n1,2.25,3.0\n2,2.", encoding="utf-8")
    rows = [dict(step=0, loss=2.5, val_loss=None), dict(step=1, loss=2.25, val_loss=3.0)]
    assert train_gpt2.read_log(str(path)) == rows
    path.write_text("step;loss\n0;2,5\n")
    with pytest.raises(SystemExit):
        train_gpt2.read_log(str(path))
    said = capsys.readouterr().err
    assert "is not a log" in said and "take the file away" in said


def test_nothing_that_is_not_finite_is_trained_on(road, capsys):
    for words in ("learning_rate=1e30", "learning_rate=1e30 grad_clip=0"):
        line = run(f"{GPT_RUN} out_dir=not_finite {words}", road, ok=False)
        assert "step " in line and "nan" in line or "inf" in line
        assert not (road / "not_finite/ckpt.pt").exists()
    model = small_gpt()
    before = [p.clone() for p in model.parameters()]
    optimizers = train_gpt2.make_optimizers(model, "muon", 1e-3, 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.lm_head.weight.grad[3, 2] = math.inf
    with pytest.raises(SystemExit):
        train_gpt2.optimizer_step(model, optimizers, 1e-3, 1.0, 7)
    assert "step 7" in capsys.readouterr().err
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("grad_clip, scale", [(0.0, 1.0), (5.0, 0.5)])
def test_a_grad_clip_of_zero_clips_nothing(grad_clip, scale):
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[6.0, 8.0]]), torch.zeros(1)
    grads = []
    optimizer = SimpleNamespace(
        param_groups=[{}], step=lambda: grads.append(model.weight.grad.clone()),
        zero_grad=lambda set_to_none: None)
    assert train_gpt2.optimizer_step(model, [optimizer], 1e-3, grad_clip, 0) == 10.0
    torch.testing.assert_close(grads[0], scale * torch.tensor([[6.0, 8.0]]), rtol=1e-5, atol=0)


def test_emulated_bfloat16_is_named(monkeypatch, capsys):
    monkeypatch.setattr(train_gpt2, "has_bfloat16", lambda device: False)
    assert train_gpt2.setup("cpu", "bfloat16").dtype == torch.bfloat16
    assert "only emulates it" in capsys.readouterr().out
    assert train_gpt2.setup("cpu", None).dtype == torch.float32
    assert capsys.readouterr().out == ""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_wandb_mirrors_the_log_and_its_refusal_is_one_line(tmp_path, monkeypatch, capsys):
    logged = []
    wandb = SimpleNamespace(init=lambda **kw: None,
                            log=lambda row, step: logged.append((step, row)),
                            errors=SimpleNamespace(Error=KeyError))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    started = train_gpt2.start_wandb(dict(out_dir="out/x"))
    log = train_gpt2.Log(str(tmp_path / "log.csv"), ["step", "loss", "acc"], 0, started)
    log.add(step=3, loss=2.5, acc=None)
    assert logged == [(3, dict(step=3, loss=2.5))]

    def refuse(**kw):
        raise KeyError("api_key not configured (no-tty)")

    wandb.init = refuse
    with pytest.raises(SystemExit):
        train_gpt2.start_wandb(dict(out_dir="out/x"))
    assert "no-tty" in capsys.readouterr().err


@pytest.mark.parametrize("gpu, peak", [
    ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA A100-SXM4-40GB", 312e12)])
def test_peak_flops_are_those_of_the_gpu(gpu, peak):
    assert train_gpt2.peak_flops(gpu) == peak


def test_mfu_of_an_unknown_device_is_nan():
    for gpu in ("NVIDIA RTX A4000", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert math.isnan(train_gpt2.peak_flops(gpu))
    assert math.isnan(train_gpt2.mfu(small_gpt(), 64, 1000))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_loses_another_ends_with_a_line(road, lost):
    script, *words = f"{GPT_RUN} max_steps=100000 eval_interval=50000 out_dir=lost_{lost}".split()
    port, processes = str(free_port()), []
    for rank in (0, 1):
        env = os.environ | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
        with open(road / f"lost_{lost}_{rank}.txt", "w") as output:
            processes.append(subprocess.Popen(
                [sys.executable, os.path.join(REPO, script), *words], cwd=road, env=env,
                stdout=output, stderr=output))
    log = road / f"lost_{lost}/log.csv"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    # and while it runs, its folder is not for another run
    line = run(f"{GPT_RUN} out_dir=lost_{lost}", road, ok=False)
    assert f"written by another run (process {processes[0].pid} " in line
    processes[lost].kill()
    assert processes[1 - lost].wait(timeout=60) == 1
    said = (road / f"lost_{lost}_{1 - lost}.txt").read_text()
    assert f"error: process {1 - lost} lost another process" in said and "Traceback" not in said


# Newton-Schulz with float64 arithmetic, the baseline of the tests below
def orthogonalized(gradient):
    X = gradient / gradient.norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


MUON_SHAPES = [(24, 96), (96, 24), (32, 32), (24, 96)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_muon_orthogonalizes_wide_tall_and_square_matrices(dtype, tolerance):
    torch.manual_seed(0)
    for shape in MUON_SHAPES:
        gradients = torch.randn(3, *shape)
        ours = train_gpt2.orthogonalize(gradients, dtype)
        for G, X in zip(gradients, ours):
            expected = orthogonalized(G.double())
            torch.testing.assert_close(X.double(), expected, atol=tolerance, rtol=0)
            # the same singular vectors, and values near 1
            U, S, V = torch.linalg.svd(G, full_matrices=False)
            inner = U.T @ X.float() @ V.T
            assert 0.6 < inner.diagonal().min() and inner.diagonal().max() < 1.3
            assert (inner - inner.diagonal().diag()).abs().max() < max(tolerance, 1e-3)


def matrices_with_gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in MUON_SHAPES]


def test_muon_takes_torchs_steps_and_goes_on_from_its_state(monkeypatch):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    monkeypatch.setattr(train_gpt2, "has_bfloat16", lambda device: False)
    lr = 0.02
    theirs, ours = ([torch.nn.Parameter(p) for p in matrices_with_gradients(0)] for _ in range(2))
    torchs = torch.optim.Muon(theirs, lr=lr, weight_decay=0.1, momentum=0.95,
                              adjust_lr_fn="match_rms_adamw")
    muon = train_gpt2.Muon(ours, lr, 0.1)
    for step in range(1, 5):
        if step == 3:  # another run goes on from what torch's optimizer saved
            muon = train_gpt2.Muon(ours, lr, 0.1)
            muon.load_state_dict(copy.deepcopy(torchs.state_dict()))
        for params in (theirs, ours):
            for p, gradient in zip(params, matrices_with_gradients(step)):
                p.grad = gradient
        for optimizer in (torchs, muon):
            optimizer.step()
        # Torch iterates in bfloat16, 8 bits, and five iterations carry each rounding on: its
        # directions are within 2**-8 * 5 * 3.4445 of ours, in units of the largest entry.
        for a, b in zip(theirs, ours):
            scale = lr * 0.2 * max(a.shape) ** 0.5
            largest = orthogonalized(a.grad.double()).abs().max().item()
            assert (a - b).abs().max().item() < step * scale * largest * 5 * 3.4445 * 2**-8
    assert muon.state_dict()["state"].keys() == torchs.state_dict()["state"].keys()


# ---- scores (cider.py)

# captions, and what the Java program in coco-caption (CoreNLP 3.4.1) makes of each before a
# next line
CIDER_TOKENS = """
A man riding a wave, on top of a surfboard. | a man riding a wave on top of a surfboard
Two dogs; one "big" cat! the dog's bowl and the dogs' bowls | two dogs one big cat the dog 's bowl and the dogs bowls
they're, we've, I'd, she'll, I'm A dog.The cat, dog,cat | they 're we 've i 'd she 'll i 'm a dog.the cat dog cat
They can't, won't and DON'T. vitamin C. The dog, J. Crew | they ca n't wo n't and do n't vitamin c the dog j. crew
She cannot, gonna, gotta, lemme, gimme, wanna | she can not gon na got ta lem me gim me wan na
cannot-do gonnas snow-covered, black-and-white T-shirt | cannot-do gonnas snow-covered black-and-white t-shirt
and/or w/o a/b/c dog/ black-white/red | and/or w/o a/b/c dog / black-white/red
a (big) dog [on] {sale} | a -lrb- big -rrb- dog -lsb- on -rsb- -lcb- sale -rcb-
U.S. Ave. st. etc. Mr. Smith p.m. Blvd. | u.s. ave. st. etc. mr. smith p.m. blvd.
wash. ill. ore. Wash. Ill. no. oz. I. A. B. T.V. T.V T.V.'s | wash ill ore wash. ill. no oz i. a. b. t.v. t.v t.v. 's
no. 5 No.2 fig. 3 pp. 4 no. five | no. 5 no. 2 fig. 3 pp. 4 no five
1950s 8th 3-D 2x4s 5pm 5:30pm 1,000 $5.00 | 1950s 8th 3-d 2x4s 5pm 5:30 pm 1,000 $ 5.00
5+5 -5 .50 12-25-2012 5.5lb 1½ cups ⅔ full 5¢ £5 €5 | 5 +5 -5 .50 12-25-2012 5.5 lb 1 1/2 cups 2/3 full 5 cents # 5 $ 5
#1 fan #hashtag @dog 50% AT&T R&B C++ C# US$5 | # 1 fan #hashtag @dog 50 % at&t r&b c++ c# us$ 5
www.dog.com dog.org/cat me@dog.net http://dog.com/a?b. | www.dog.com dog.org/cat me@dog.net http://dog.com/a?b
d'oeuvres O'Neill ma'am o'clock rock 'n' roll y'all | d'oeuvres o'neill ma'am o'clock rock 'n' roll y' all
'tis the '80s, '57 Chevy 'til dawn, 'em | 't is the '80s '57 chevy 'til dawn 'em
a dog’s “bowl” don’t ‘stop’ a - b -- c --- d ---- e ----- f – g — h | a dog 's bowl do n't stop a b c d e ----- f g h
dog... dog.. .... dog … dog !! ?? ?! ! ? | dog dog dog dog !! ?? ?!
:) ;-D ^_^ (-_-) :-( dog., ab-cd.; Yahoo!'s a!b a?b | :-rrb- ;-d ^_^ -lrb--_--rrb- :--lrb- dog. ab-cd. yahoo 's a!b a?b
<br/> <b>bold</b> a < b > c << >> | <br/> <b> bold </b> a < b > c << >>
T`here rock`n`roll ma`am it`s o`clocks | t`here rock n`roll ma`am it s o`clocks
plan C. <b> D. <b>x J. <dog | plan c <b> d. <b> x j. < dog
dog&nbsp;cat &amp; &gt; &mdash; caf&eacute; &quot;x&quot; | dog cat & > caf&eacute; x
café naïve crème-brûlée straße Русский 日本語. عربي | café naïve crème-brûlée straße русский 日本語 عربي
dog😀cat ★★ Coke® soft­hyphen → × ° | dog cat ★ ★ coke ® softhyphen → × °
U.S.-made non-U.S. 1,000-foot a.m.-p.m. a,b-c | u.s.-made non-u.s. 1,000-foot a.m.-p.m. a,b-c
22 3/4 St call 555 123 4567 (555) 123-4567 <dog cat> | 22~3/4 st call 555~123~4567 -lrb-555-rrb-~123-4567 <dog~cat>
""".strip().split("\n")


def test_cider_tokens_are_the_references():
    captions, wanted = zip(*(line.split(" | ") for line in CIDER_TOKENS))
    tokens = cider.tokenize([line for caption in captions for line in (caption, "zz")])[::2]
    assert [" ".join(words).replace("\xa0", "~") for words in tokens] == list(wanted)


def test_cider_tokens_depend_on_the_next_caption():
    for captions, wanted in (
        (["letter X.", "The dog"], "letter x"),
        (["letter X.", " ", "An owl "], "letter x"),
        (["3", "1/2 x"], "3"),
        (["letter X.", "the dog"], "letter x."),
        (["a\r\nb\u2028c\n", "x"], "a b c"),
        (["<dog", "cat> x"], "< dog"),
        (["no.", "5 x"], "no."),
        (["no.", "", "5 x"], "no"),
        (["it 'll"], "it ll"),
        (["it 'll", "x"], "it 'll"),
    ):
        assert cider.tokenize(captions)[0] == wanted.split(), captions


def test_cider_tokens_of_several_texts_do_not_touch():
    texts = ["letter X.", "a dog"], ["The dog", "no."], ["5 x", "<dog"], ["cat> x"]
    words, ids, lengths = cider.read(*texts)
    alone = [tokens for text in texts for tokens in cider.tokenize(text)]
    assert [words[i] for i in ids] == [
        token for tokens in alone for token in tokens
    ] and lengths.tolist() == list(map(len, alone))


def test_cider_tokenizes_any_string():
    rng = random.Random(0)
    strange = [
        "".join(chr(rng.randrange(0x3000)) for _ in range(rng.randrange(60))) for _ in range(500)
    ] + ["\ud800"]
    assert len(cider.tokenize(strange)) == len(strange) and cider.tokenize([]) == []
    # long runs: quadratic time would take hours. What is said 50 times gives its tokens 50 times.
    for piece in (
        "a",
        ".",
        "a.",
        "'",
        "1/",
        "-",
        "(",
        "a,",
        "a+",
        "1-",
        "<a ",
        "a@.",
        "x. ",
        "12 345 ",
        "é",
        "&lt;",
        "u.s.",
    ):
        run = f"{piece * (2000 // len(piece))} dog "
        assert cider.tokenize([run * 50, "zz"])[0] == cider.tokenize([run, "zz"])[0] * 50, piece


def test_cider_takes_a_caption_of_a_megabyte():
    references = [["a dog runs", "the dog"], ["a cat"]]
    scores, per_image = cider.evaluate(["a dog " * 170_000, "a cat"], references)
    assert per_image["CIDEr"][0] < 1e-9 and per_image["ROUGE_L"][1] == 1
    assert np.isclose(
        per_image["ROUGE_L"][0], 2.44 * 2 / 340_000 / (1 + 1.44 * 2 / 340_000)
    )  # by hand: "a dog" of 340,000 words, recall 1
    assert cider.tokenize(["a" * 10**6, "zz"])[0] == ["a" * 10**6] and cider.tokenize(
        ["." * 10**6 + " x"]
    )[0] == ["x"]


def random_images(rng, images):
    words = "a the dog cat on beach red sits , 's n't 22\xa03/4 big".split(" ")
    sentence = lambda: [
        rng.choice(words) for _ in range(rng.choice((0, 1, 2, 3, 5, 8, 12, 12, 30, 64, 65, 150)))
    ]
    references = [[sentence() for _ in range(rng.randrange(1, 8))] for _ in range(images)]
    references[0].append(["a", "dog"])  # as all references empty is an error
    return [sentence() for _ in references], references


@pytest.mark.parametrize("seed", range(20))
def test_cider_scores_are_pycocoevalcaps(seed):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.eval import Bleu, Cider, Rouge

    candidates, references = random_images(random.Random(seed), (1, 2, 3, 10, 60)[seed % 5])
    scores, per_image = cider.evaluate(candidates, references, tokenized=True)
    both = [
        {i: list(map(" ".join, row)) for i, row in enumerate(side)}
        for side in (references, zip(candidates))
    ]
    overall, each = Bleu(4).compute_score(*both, verbose=0)
    wanted = {f"Bleu_{n + 1}": (overall[n], each[n]) for n in range(4)}
    wanted |= dict(CIDEr=Cider().compute_score(*both), ROUGE_L=Rouge().compute_score(*both))
    assert set(wanted) == set(scores) == set(per_image)
    for metric, (overall, each) in wanted.items():
        np.testing.assert_allclose(
            [scores[metric], *per_image[metric]], [overall, *each], rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("seed", range(3))
def test_fast_cider_is_the_formula(seed):
    rng = random.Random(seed)
    made = lambda: [rng.choice("abcdef") for _ in range(rng.randrange(9))]
    candidates = [made() for _ in range(12)]
    references = [[made() for _ in range(rng.randint(1, 5))] for _ in candidates]
    fast = cider.evaluate(candidates, references, tokenized=True)[1]["CIDEr"]
    assert np.allclose(fast, cider.naive_cider(candidates, references), rtol=0, atol=1e-12)


def captions_json(images=({"id": 1}, {"id": 2}), annotations=None, **more):
    if annotations is None:
        annotations = [dict(image_id=image["id"], caption="a dog") for image in images]
    return dict(images=list(images), annotations=annotations) | more


ROWS = [dict(image_id=1, caption="a"), dict(image_id=2, caption="b")]


@pytest.mark.parametrize(
    "content, hint",
    [
        (captions_json([{"id": 1}, {"id": "1"}]), "two images have the id 1"),
        (
            captions_json(annotations=[*ROWS, dict(image_id=1, caption=None)]),
            "image 1 is None, not text",
        ),
        (
            captions_json(annotations=[*ROWS, dict(image_id=2, caption=["b"])]),
            "image 2 is ['b'], not text",
        ),
        (
            captions_json(annotations=[*ROWS, dict(image_id=2, caption=" ")]),
            "image 2 is ' ', not text",
        ),
        (captions_json(annotations=ROWS[:1]), "1 of 2 images have no caption, such as image_id 2"),
        (captions_json(annotations=[dict(id=7, caption="a")]), "'image_id' is missing"),
        (captions_json([{"id": 1, "file_name": None}]), "file_name of image 1 is None"),
        (dict(images=[{"id": 1}]), "'annotations' is missing"),
        (captions_json([]), "0 of 0 images"),
        ([1], "not a COCO captions file"),
    ],
)
def test_a_captions_file_is_checked_once_for_all(content, hint, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(hint)):
        cider.read_captions(str(tmp_path / "c.json"))


def test_captions_of_images_that_are_not_listed_are_left_out(tmp_path):
    content = captions_json([{"id": "x", "file_name": "x.jpg"}],
                            [dict(image_id="x", caption="a"), dict(image_id=9, caption="b")])
    (tmp_path / "c.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert cider.read_captions(str(tmp_path / "c.json")) == (content["images"], [["a"]])


def test_results_for_a_part_are_scored_when_asked(tmp_path):
    references = {1: ["a dog runs", "the dog"], 2: ["two birds sit"], "3": ["a cat on a mat"]}
    rows = [dict(image_id=i, caption=c) for i, captions in references.items() for c in captions]
    (tmp_path / "c.json").write_text(
        json.dumps(captions_json([{"id": i} for i in references], rows))
    )
    (tmp_path / "r.json").write_text(
        json.dumps([dict(image_id="1", caption="a dog"), dict(image_id=3, caption="a cat")])
    )
    assert "subset=True" in run("cider.py r.json c.json", tmp_path, ok=False)
    run("cider.py r.json c.json subset=True out=s.json", tmp_path)
    scores, _ = cider.evaluate(["a dog", "a cat"], [references[1], references["3"]])
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["scores"] == scores and [row["image_id"] for row in written["images"]] == [
        1,
        "3",
    ]
    (tmp_path / "r.json").write_text(json.dumps([dict(image_id=1, caption="a dog")]))
    assert "is always 0" in run("cider.py r.json c.json subset=True", tmp_path)


def test_cider_with_given_frequencies():
    candidates, references = random_images(random.Random(1), 50)
    df = cider.document_frequencies(references)
    assert (
        df[()] == 50
        and df["a",] == sum(any("a" in ref for ref in refs) for refs in references)
        and min(df.values()) > 1
    )
    pairs = [
        {pair for ref in refs for said in [" ".join(ref).split()] for pair in zip(said, said[1:])}
        for refs in references
    ]
    assert df["22", "3/4"] == sum(
        ("22", "3/4") in said for said in pairs
    )  # "22~3/4", one token, is two words to CIDEr
    whole = cider.evaluate(candidates, references, tokenized=True)[1]["CIDEr"]
    for batch in (
        slice(7, 9),
        slice(0, 1),
        slice(0, 50),
    ):  # scores as it does in the corpus, even an image alone
        part = cider.evaluate(candidates[batch], references[batch], df, tokenized=True)[1]["CIDEr"]
        np.testing.assert_allclose(part, whole[batch], rtol=0, atol=1e-12)


def test_cider_of_one_image_is_zero():
    scores, per_image = cider.evaluate(["a dog runs"], [["a dog runs", "the dog"]])
    assert (
        scores["CIDEr"] == per_image["CIDEr"][0] == 0
        and scores["Bleu_4"] > 0
        and scores["ROUGE_L"] == 1
    )


def test_cider_misuse_names_the_image():
    for candidates, references, words in (
        (["a"], [["a"], ["b"]], "1 candidates"),
        ([], [], "0 candidates"),
        (["a", "b"], [["a"], []], "image 1"),
        (["a", 3], [["a"], ["b"]], "image 1"),
        (["a", "b"], [["a"], "b"], "image 1"),
        (["a", "b"], [["a"], None], "image 1"),
        (["a", "b"], [["a"], ["b", None]], "image 1"),
        (["a", ["b"]], [["a"], ["b"]], "image 1"),
        (["a"], [["."]], "image 0"),
    ):
        with pytest.raises(ValueError, match=words):
            cider.evaluate(candidates, references)
    with pytest.raises(ValueError, match="image 0"):
        cider.evaluate(["a dog"], [["a dog"]], tokenized=True)
    with pytest.raises(ValueError, match="document_frequencies"):
        cider.evaluate(["a dog"], [["a dog"]], df={})


def test_cider_command_line(tmp_path):
    def judge(*argv):
        return subprocess.run(
            [sys.executable, cider.__file__, *argv], cwd=tmp_path, capture_output=True, text=True
        )

    references = {
        2: ["Two birds.", "birds in a tree"],
        0: ["A dog runs.", "the dog is running"],
        1: ["A cat sits"],
    }
    results = [
        dict(image_id=i, caption=caption)
        for i, caption in enumerate(("a dog runs", "a dog", "two birds"))
    ]
    rows = [dict(image_id=i, caption=caption) for i in range(3) for caption in references[i]]
    (tmp_path / "captions.json").write_text(
        json.dumps(dict(images=[dict(id=i) for i in references], annotations=rows))
    )
    (tmp_path / "results.json").write_text(json.dumps(results))
    done = judge("results.json", "captions.json", "show=1", "out=scores.json")
    scores, _ = cider.evaluate(["two birds", "a dog runs", "a dog"], list(references.values()))
    assert done.returncode == 0 and all(
        f"{100 * score:.2f}  {score:.4f}" in done.stdout for score in scores.values()
    )
    best, worst = (line for line in done.stdout.splitlines() if "image " in line)
    assert best.startswith("best CIDEr") and "image 0: 'a dog runs'" in best
    assert worst.startswith("worst CIDEr 0.000, image 1: 'a dog'") and "'A cat sits'" in worst
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["scores"] == scores and [row["image_id"] for row in written["images"]] == [
        2,
        0,
        1,
    ]
    both = ["bad.json", "captions.json"]
    for bad, argv, words in (
        (results[:1], both, "2 images of captions.json have no caption"),
        (results + [dict(image_id=9, caption="a")], both, "image_id 9"),
        (results + results[2:], both, "more than one caption"),
        ([dict(image_id=0, caption=3)], both, "is 3, not text"),
        ([], ["results.json"], "give a results file"),
        ([], ["none.json", both[1]], "none.json"),
        ([], ["results.json", "captions.json", "out=no/s.json"], "no/s.json"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        done = judge(*argv)
        assert (
            done.returncode == 2
            and done.stdout == ""
            and done.stderr.strip().count("\n") == 0
            and words in done.stderr
        )


@needs_shared
def test_cider_oracle():
    battery = json.load(
        open(os.path.join(SHARED, "metrics", "ptb_battery_open.json"), encoding="utf-8")
    )
    assert [" ".join(words) for words in cider.tokenize(battery["captions"])] == battery["tokens"]
    assert [" ".join(cider.tokenize([caption])[0]) for caption in battery["captions"]] == battery[
        "alone"
    ]
    for name, case in json.load(
        open(os.path.join(SHARED, "metrics", "oracle_open.json"), encoding="utf-8")
    ).items():
        candidates, references = zip(*((image["cand"], image["refs"]) for image in case["images"]))
        for captions, wanted in (candidates, case["cand_tokens"]), (
            sum(references, []),
            sum(case["ref_tokens"], []),
        ):
            assert [" ".join(words) for words in cider.tokenize(captions)] == wanted, name
        scores, per_image = cider.evaluate(candidates, references)
        for metric in scores:
            ours, theirs = (scores[metric], *per_image[metric]), (
                case["overall"][metric],
                *case["per_image"][metric],
            )
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9, err_msg=f"{name} {metric}")


# ---- images and their encoders (coco.py)


def test_the_same_command_again_uses_what_is_there(road):
    def times():
        files = (road / "shapes").rglob("*.*")
        return {file: file.stat().st_mtime_ns for file in files if file.name != ".lock"}

    before = times()
    printed = run("coco.py data=shapes shapes=200 encoder=patches", road)
    assert "shapes is there already" in printed
    assert "patches_val2017.npy is there already" in printed
    assert times() == before


def test_shapes_are_reproducible_and_splits_share_no_scene(road, tmp_path):
    coco.draw_shapes(str(tmp_path), 200, seed=1337)
    for split in coco.SPLITS:
        name = f"annotations/captions_{split}.json"
        assert (tmp_path / name).read_bytes() == (road / "shapes" / name).read_bytes()
        assert (tmp_path / split / "000003.jpg").read_bytes() == (
            road / "shapes" / split / "000003.jpg"
        ).read_bytes()
    train, val = (
        {
            frozenset(coco.true_captions(image["scene"])[0])
            for image in coco.load_captions(str(tmp_path), split)[0]
        }
        for split in coco.SPLITS
    )
    assert train and val and not train & val


def test_scene_captions_are_five_true_and_different_ones(road):
    images, captions = coco.load_captions(str(road / "shapes"), "val2017")
    for image, said in zip(images, captions):
        patterns = coco.true_captions(image["scene"])
        assert (
            len(said) == 5
            and len({next(k for k, p in enumerate(patterns) if s in p) for s in said}) == 5
        )
    assert coco.fraction_right(images, [said[0] for said in captions]) == 1
    assert coco.fraction_right(images, [said[0] for said in captions[1:] + captions[:1]]) < 0.2


def test_scene_is_drawn_where_and_as_its_caption_says():
    rng = random.Random(0)
    for _ in range(200):
        scene = coco.random_scene(rng)
        pixels = np.asarray(coco.draw_scene(rng, scene)).astype(int)
        centres = {}
        for size, colour, _ in scene["objects"]:
            near = np.abs(pixels - coco.COLOURS[colour]).max(2) < 40
            if sum(c == colour for _, c, _ in scene["objects"]) == 1:
                y, x = np.nonzero(near)
                centres[colour] = x.mean(), y.mean()
                radius = ((x.max() - x.min() + 1) + (y.max() - y.min() + 1)) / 4
                assert abs(radius - coco.SIZES[size]) < 4.5, (
                    scene,
                    radius,
                )  # a star is less tall than wide, and chance adds a tenth
        if len(scene["objects"]) == len(centres) == 2:
            (x1, y1), (x2, y2) = (centres[colour] for _, colour, _ in scene["objects"])
            dx, dy = coco.PLACES[scene["place"]][2:]
            assert (x1 - x2) * dx + (y1 - y2) * dy > 10 and max(
                abs(x1 - x2) * abs(dy), abs(y1 - y2) * abs(dx)
            ) < 15


def test_patches_are_the_pixels_row_by_row():
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    tokens = coco.Patches()(pixels)
    assert tokens.shape == (2, 64, 194)
    torch.testing.assert_close(
        tokens[1, 8 * 2 + 5, :192], pixels[1, 16:24, 40:48].reshape(-1) / 127.5 - 1
    )
    assert tokens[0, 7, 192:].tolist() == [-1, 1] and tokens[0, 56, 192:].tolist() == [
        1,
        -1,
    ]  # (row, column)


def test_features_row_i_is_image_i(road):
    images, _ = coco.load_captions(str(road / "shapes"), "val2017")
    features, about = coco.load_features(str(road / "shapes"), "patches", "val2017", images)
    encoder = coco.Patches()
    for i in (0, len(images) - 1):
        one = coco.encode(
            encoder,
            [
                encoder.preprocess(
                    coco.open_image(str(road / "shapes/val2017" / images[i]["file_name"]))
                )
            ],
            ALONE,
        )
        assert np.array_equal(features[i], one[0])
    assert about["encoder"] == "patches" and features.dtype == np.float16


@pytest.mark.parametrize(
    "spoil, hint",
    [
        (lambda x: x[:, 0], "three dimensions"),
        (lambda x: x.astype("i4"), "int32"),
        (
            lambda x: np.where(np.arange(64)[:, None] == 3, np.inf, x),
            "row 0, the features of 000001.jpg",
        ),
        (
            lambda x: x.astype("f4")
            * [[[1]]]
            * np.where(np.arange(10) == 7, np.nan, 1)[:, None, None],
            "row 7, the features of 000008.jpg",
        ),
        (lambda x: x[:, :, :100], "both must come from one encoder"),
        (lambda x: x[:9], "10 images"),
        (lambda x: np.array([{}] * 10), "not a whole .npy file"),
    ],
)
def test_features_that_can_not_be_trained_on_are_refused(road, tmp_path, capsys, spoil, hint):
    data = str(tmp_path / "shapes")
    shutil.copytree(road / "shapes", data)
    images, _ = coco.load_captions(data, "val2017")
    path = coco.features_file(data, "patches", "val2017")
    right = np.load(path)
    np.save(path, spoil(right))
    with pytest.raises(SystemExit):
        coco.load_features(data, "patches", "val2017", images)
    assert hint in capsys.readouterr().err


def test_archives_are_no_features(road, tmp_path, capsys):
    path = tmp_path / "x.npy"
    with open(path, "wb") as file:
        np.savez(file, np.zeros((1, 2, 3)))
    for _ in range(2):
        with pytest.raises(SystemExit):
            coco.open_features(str(path))
        assert "not a whole .npy file" in capsys.readouterr().err
        torch.save(torch.zeros(1, 2, 3), path)


def test_features_of_other_programs_are_converted_and_checked_once(road, tmp_path, monkeypatch):
    data = str(tmp_path / "shapes")
    shutil.copytree(road / "shapes", data)
    images, _ = coco.load_captions(data, "val2017")
    path = coco.features_file(data, "other", "val2017")
    right = np.load(coco.features_file(data, "patches", "val2017"))
    np.save(path, right.astype(">f4"))
    features, metadata = coco.load_features(data, "other", "val2017", images)
    assert features.dtype == np.float32 and features.dtype.isnative
    assert np.array_equal(features, right) and "encoder" not in metadata
    checked = []
    monkeypatch.setattr(coco, "check_finite_features", lambda path, *rest: checked.append(path))
    coco.load_features(data, "other", "val2017", images)
    coco.load_features(data, "patches", "val2017", images)
    assert checked == []
    np.save(path, right)
    coco.load_features(data, "other", "val2017", images)
    assert checked == [path]


def test_encoders_that_overflow_float16_are_refused(drawn, capsys):
    class Loud(coco.Patches):
        def forward(self, pixels):
            return super().forward(pixels) * 1e6

    with pytest.raises(SystemExit):
        encode_val(drawn, Loud())
    assert "000001.jpg: the encoder gives NaN" in capsys.readouterr().err
    assert not (drawn / "features/patches_val2017.npy").exists()


def test_pictures_of_every_mode_are_what_a_viewer_shows(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    grey[0, :2] = 0, 255
    rgb = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)

    def opened(image, name, **kw):
        image.save(tmp_path / name, **kw)
        return np.asarray(coco.open_image(str(tmp_path / name))).astype(int)

    deep = grey.astype(np.uint16) * 257
    for name, values in (
        ("16.png", deep),
        ("16.tiff", deep),
        ("big.tiff", deep.astype(">u2")),
        ("32.tiff", deep.astype(np.int32)),
        ("8in32.tiff", grey.astype(np.int32)),
        ("unit.tiff", grey.astype(np.float32) / 255),
        ("wide.tiff", grey.astype(np.float32) * 1000 - 70),
    ):
        pixels = opened(Image.fromarray(values), name)
        assert pixels.shape == (20, 30, 3), name
        assert np.abs(pixels - grey[:, :, None]).max() == 0, name
    with pytest.raises(SystemExit):
        opened(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "nan.tiff")

    # transparent black is white; half transparent black is grey
    alpha = np.zeros((20, 30, 4), np.uint8)
    alpha[:, :10, 3], alpha[:, 10:20, 3] = 255, 128
    pixels = opened(Image.fromarray(alpha), "alpha.png")
    assert pixels[0, [0, 10, 20]].tolist() == [[0] * 3, [127] * 3, [255] * 3]
    palette = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(opened(palette, "p.png"), np.asarray(palette.convert("RGB")))
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert (
        opened(palette, "pt.png", transparency=palette.getpixel((0, 0)))[0, 0].tolist() == [255] * 3
    )
    assert opened(Image.fromarray(alpha[:, :, 2:]), "la.png")[0, 25].tolist() == [255] * 3
    cmyk = Image.fromarray(rgb).convert("CMYK")
    assert np.abs(opened(cmyk, "cmyk.tiff") - rgb).max() <= 1

    # the first row is stored as the right column
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(opened(Image.fromarray(rgb), "turned.png", exif=exif), np.rot90(rgb, -1))


def test_pictures_in_two_splits_are_said(drawn, capsys):
    coco.warn_overlap(str(drawn), "val2017")  # the same names, other scenes
    assert capsys.readouterr().out == ""
    shutil.copy(drawn / "train2017/000004.jpg", drawn / "val2017/000004.jpg")
    coco.warn_overlap(str(drawn), "val2017")
    assert (
        "1 pictures of val2017 are in train2017 too, such as 000004.jpg" in capsys.readouterr().out
    )


def test_tagger_learns_what_captions_speak_of(road, tmp_path):
    for part in ("train2017", "annotations"):
        shutil.copytree(road / "shapes" / part, tmp_path / part)
    os.mkdir(tmp_path / "features")
    losses = coco.train_tagger(str(tmp_path), steps=30, seed=0, B=16)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    encoder = coco.load_encoder(
        "tagger", tagger=train_gpt2.load_checkpoint(str(tmp_path / "features/tagger.pt"))
    )
    assert coco.encode(
        encoder, [encoder.preprocess(Image.new("RGB", (300, 200)))], ALONE
    ).shape == (1, 64, 128)


def test_open_clip_tokens_equal_transformers(tmp_path):
    coco.mend_torchvision()
    import open_clip
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = dict(
        embed_dim=16,
        quick_gelu=True,
        vision_cfg=dict(image_size=64, layers=3, width=64, head_width=16, patch_size=16),
        text_cfg=dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1),
    )
    (tmp_path / "ViT-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-tiny.json")
    encoder = coco.load_encoder("ViT-tiny", "none")
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            hidden_act="quick_gelu",
        )
    ).eval()
    ours, state = encoder.visual.state_dict(), {}
    for key in theirs.state_dict():  # their names -> open_clip's
        part, layer = key.removeprefix("vision_model."), ""
        if part.startswith("encoder.layers."):
            _, _, number, part = part.split(".", 3)
            layer = f"transformer.resblocks.{number}."
        for old, new in (
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.patch_embedding", "conv1"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("pre_layrnorm", "ln_pre"),
            ("post_layernorm", "ln_post"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            part = part.replace(old, new)
        if "self_attn" in part:  # theirs keeps q, k and v apart
            kind, name = part.split(".")[1:]
            state[key] = ours[f"{layer}attn.in_proj_{name}"].chunk(3)["qkv".index(kind[0])]
        elif not part.endswith("position_ids"):
            state[key] = ours[layer + part]
    theirs.load_state_dict(state, strict=False)
    assert len(state) == len(dict(theirs.named_parameters()))
    pixels = torch.stack(
        [encoder.preprocess(Image.effect_noise((90, 70), 90).convert("RGB")) for _ in range(2)]
    )
    with torch.no_grad():
        post_layernorm = getattr(
            theirs, "vision_model", theirs
        ).post_layernorm  # older versions of transformers wrap the tower once more
        torch.testing.assert_close(
            encoder(pixels), post_layernorm(theirs(pixels).last_hidden_state), atol=1e-5, rtol=0
        )
    assert (
        encoder(pixels).shape == (2, 17, 64)
        and (encoder(pixels)[0] - encoder(pixels)[1]).abs().max() > 0.1
    )  # random weights, yet the pictures differ


def test_open_clip_towers_get_their_own_activation(monkeypatch, capsys):
    coco.mend_torchvision()
    import open_clip

    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kw: "weights")
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *args, **kw: None)
    openai, laion = coco.OpenCLIP("ViT-B-32", "openai").eval(), coco.OpenCLIP(
        "ViT-B-32", "laion2b_s34b_b79k"
    )
    kinds = [{type(module).__name__ for module in encoder.modules()} for encoder in (openai, laion)]
    assert (
        "QuickGELU" in kinds[0]
        and "QuickGELU" not in kinds[1]
        and coco.fingerprint(openai) != coco.fingerprint(laion)
    )
    tokens = openai(torch.stack([openai.preprocess(Image.new("RGB", (320, 240), "red"))]))
    assert tokens.shape == (1, 50, 768)
    torch.testing.assert_close(
        tokens.mean(-1), torch.zeros(1, 50), atol=1e-4, rtol=0
    )  # post-layernorm applied
    for name, tag, hint in (
        ("ViT-B32", "openai", "ViT-B-32"),
        ("ViT-B-32", "opena", "openai"),
        ("RN50", "none", "plain ViTs"),
    ):
        with pytest.raises(SystemExit):
            coco.OpenCLIP(name, tag)
        assert hint in capsys.readouterr().err


def test_timm_features_are_timms_own(capsys):
    coco.mend_torchvision()
    import timm
    picture = Image.effect_noise((90, 40), 90).convert("RGB")
    cases = (("mobilenetv3_small_050", (7, 7), 0), ("vit_tiny_patch16_224", (14, 14), 1),
             ("swin_tiny_patch4_window7_224", (7, 7), 0))
    for name, grid, n_prefix in cases:
        encoder = coco.load_encoder(f"timm/{name}", "none")
        pixels = torch.stack([encoder.preprocess(picture)])
        features = encoder(pixels)
        theirs = encoder.model.forward_features(pixels)
        assert encoder.grid == grid and features.shape[1] == n_prefix + grid[0] * grid[1]
        assert pixels.shape[2] == pixels.shape[3], name  # squeezed: the picture was not square
        if name.startswith("vit"):
            assert torch.equal(features, theirs)
        elif name.startswith("swin"):  # (B, rows, columns, W)
            assert torch.equal(features[0, 7 * 2 + 5], theirs[0, 2, 5])
        else:  # (B, W, rows, columns)
            assert torch.equal(features[0, 7 * 2 + 5], theirs[0, :, 2, 5])
        same = coco.load_encoder(f"timm/{name}", "none")
        assert coco.fingerprint(same) == coco.fingerprint(encoder)
    assert coco.features_file("d", "timm/x", "val2017") == "d/features/timm_x_val2017.npy"


def test_timm_weights_from_a_file(tmp_path, capsys):
    coco.mend_torchvision()
    import timm
    name, path = "mobilenetv3_small_050", str(tmp_path / "weights.pth")
    torch.manual_seed(1)
    theirs = timm.create_model(name, num_classes=7).eval()  # a head of another size
    torch.save(theirs.state_dict(), path)
    encoder = coco.load_encoder(f"timm/{name}", path)
    assert "classifier.weight, classifier.bias (its classification head)" in capsys.readouterr().out
    pixels = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(encoder(pixels)[0, 5], theirs.forward_features(pixels)[0, :, 0, 5])
    state = theirs.state_dict()
    state["conv_stem.weight"] = torch.zeros(1)
    torch.save(state, path)
    for model, weights, hint in ((name, path, "conv_stem.weight is (1,)"),
                                 ("mobilenetv3_smal_050", "none", name),
                                 (name, "nope", "neither a file nor weights"),
                                 ("coat_tiny", "none", "no map and no tokens")):
        with pytest.raises(SystemExit):
            coco.load_encoder(f"timm/{model}", weights)
        assert hint in capsys.readouterr().err


class Counting(coco.Patches):
    """Patches that counts the pictures it has looked at, and is interrupted after so many."""

    def __init__(self, most=10**9):
        super().__init__()
        self.most, self.n_images = most, 0

    def forward(self, pixels):
        self.n_images += len(pixels)
        if self.n_images > self.most:
            raise KeyboardInterrupt
        return super().forward(pixels)


def encode_val(data, encoder=None, weights="w", **kw):
    return coco.encode_split(
        str(data),
        "val2017",
        dict(encoder="patches", weights=weights),
        encoder or Counting(),
        2,
        ALONE,
        **kw,
    )


@pytest.fixture
def drawn(tmp_path):
    """120 training scenes and 6 others, not encoded yet."""
    coco.draw_shapes(str(tmp_path / "drawn"), 120, seed=1)
    os.mkdir(tmp_path / "drawn/features")
    return tmp_path / "drawn"


def test_interrupted_encoding_goes_on_to_the_same_bytes(drawn, monkeypatch, capsys):
    path = drawn / "features/patches_val2017.npy"
    encode_val(drawn)
    whole = path.read_bytes()
    path.unlink()
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(coco.time, "time", lambda: next(clock))  # so that each batch is noted
    with pytest.raises(KeyboardInterrupt):
        encode_val(drawn, Counting(5))  # the blank one, and two batches of two
    assert not path.exists() and json.load(open(path.with_suffix(".json")))["done"] == 4
    with pytest.raises(SystemExit):
        coco.load_features(
            str(drawn), "patches", "val2017", coco.load_captions(str(drawn), "val2017")[0]
        )
    assert "4 of 6 pictures are encoded; `python coco.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        encode_val(drawn, weights="others")
    assert "other weights" in capsys.readouterr().err
    encoder = Counting()
    encode_val(drawn, encoder)
    assert (
        encoder.n_images == 2
        and path.read_bytes() == whole
        and os.listdir(drawn / "features") != []
        and not path.with_suffix(".npy.part").exists()
    )
    with pytest.raises(SystemExit):
        encode_val(drawn, weights="others")


def test_killed_encoding_goes_on_to_the_same_bytes(drawn):
    slow = (
        "import sys, time, coco, torch\nfrom train_gpt2 import Process\nALONE = Process(0, 1,"
        " 'cpu', torch.float32)\nclass Slow(coco.Patches):\n    def forward(self, x):\n       "
        " time.sleep(0.3)\n        return super().forward(x)\ncoco.encode_split(sys.argv[1],"
        " 'train2017', dict(encoder='patches', weights='w'), Slow(), 4, ALONE)"
    )
    about = drawn / "features/patches_train2017.json"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(drawn)], cwd=REPO, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        if about.exists() and json.load(open(about))["done"]:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert 0 < json.load(open(about))["done"] < 120
    parts = []
    for fresh in (False, True):
        if fresh:
            shutil.rmtree(drawn / "features")
            os.mkdir(drawn / "features")
        coco.encode_split(
            str(drawn), "train2017", dict(encoder="patches", weights="w"), coco.Patches(), 4, ALONE
        )
        parts.append((drawn / "features/patches_train2017.npy").read_bytes())
    assert parts[0] == parts[1]


def test_unreadable_pictures_are_named_and_never_replaced(drawn, capsys):
    path, images = (
        drawn / "features/patches_val2017.npy",
        coco.load_captions(str(drawn), "val2017")[0],
    )
    encode_val(drawn)
    whole = np.load(path)
    path.unlink()
    os.rename(drawn / "val2017", drawn / "elsewhere")
    error = run(f"coco.py data={drawn} encoder=patches", drawn, ok=False)
    assert "val2017 holds none of the 6 pictures" in error
    os.rename(drawn / "elsewhere", drawn / "val2017")
    good = (drawn / "val2017/000002.jpg").read_bytes()
    (drawn / "val2017/000002.jpg").write_bytes(good[:300])
    (drawn / "val2017/000005.jpg").unlink()
    said = run(f"coco.py data={drawn} encoder=patches", drawn, ok=False)
    assert (
        "can't be read, 2 in all" in said
        and "000002.jpg" in said
        and "000005.jpg" in said
    )
    assert (
        drawn / "features/patches_train2017.npy"
    ).exists() and not path.exists()  # all were looked at; what is not whole has not its name
    path.with_suffix(".npy.part").unlink()
    assert [os.path.basename(file) for file in encode_val(drawn)] == ["000002.jpg", "000005.jpg"]
    with pytest.raises(SystemExit):
        coco.load_features(
            str(drawn), "patches", "val2017", coco.load_captions(str(drawn), "val2017")[0]
        )
    (drawn / "val2017/000002.jpg").write_bytes(good)  # mended
    encoder = Counting()
    assert [os.path.basename(file) for file in encode_val(drawn, encoder)] == [
        "000005.jpg"
    ] and encoder.n_images == 1
    # taken out of the json: then what was encoded is of other pictures
    content = json.loads((drawn / "annotations/captions_val2017.json").read_text())
    left = [image for image in images if image["file_name"] != "000005.jpg"]
    ids = {image["id"] for image in left}
    content["images"] = left
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
    (drawn / "annotations/captions_val2017.json").write_text(json.dumps(content))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        encode_val(drawn)
    assert "npy.part was made with other pictures" in capsys.readouterr().err
    path.with_suffix(".npy.part").unlink()
    assert encode_val(drawn) == []
    features, _ = coco.load_features(str(drawn), "patches", "val2017", left)
    assert np.array_equal(features, whole[[0, 1, 2, 3, 5]])
    assert encode_val(drawn) == []  # there already, and of this json
    with pytest.raises(SystemExit):
        coco.load_features(str(drawn), "patches", "val2017", left[::-1])
    assert "in another order" in capsys.readouterr().err


def test_converted_data_sets(tmp_path):
    os.makedirs(tmp_path / "resized")
    os.makedirs(tmp_path / "imgs/val2014")
    for k in range(4):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"resized/{k}.png")
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"imgs/val2014/{k}.png")
    (tmp_path / "captions.csv").write_text(
        'source,split,image,caption_1,caption_2,caption_3,caption_4,caption_5\nA,train,0.png,"a,'
        ' b",c,,d,e\nA,val,1.png,a,b,c,d,e\nA,test,2.png,a,b,c,d,e\nA,train,9.png,a,b,c,d,e\n'
    )
    coco.convert(coco.read_risc(str(tmp_path / "captions.csv")), str(tmp_path / "risc"))
    karpathy = [
        dict(
            filename=f"{k}.png",
            filepath="val2014",
            cocoid=70 + k,
            split=split,
            sentences=[dict(raw=f"say {k}"), dict(raw="so")],
        )
        for k, split in enumerate(["train", "restval", "test", "val", "val"])
    ]
    (tmp_path / "dataset_x.json").write_text(json.dumps(dict(images=karpathy)))
    coco.convert(coco.read_karpathy(str(tmp_path / "dataset_x.json")), str(tmp_path / "x"))
    assert (
        coco.splits_of(str(tmp_path / "risc"))
        == coco.splits_of(str(tmp_path / "x"))
        == ["train2017", "val2017", "test2017"]
    )
    assert coco.load_captions(str(tmp_path / "risc"), "train2017") == (
        [dict(id=1, file_name="0.png")],
        [["a, b", "c", "d", "e"]],
    )
    assert coco.load_captions(str(tmp_path / "x"), "train2017") == (
        [dict(id=70, file_name="0.png"), dict(id=71, file_name="1.png")],
        [["say 0", "so"], ["say 1", "so"]],
    )
    assert (
        len(coco.load_captions(str(tmp_path / "x"), "val2017")[0]) == 1
    )  # the picture of the other is not there
    assert os.path.samefile(tmp_path / "x/test2017/2.png", tmp_path / "imgs/val2014/2.png")
    with pytest.raises(SystemExit):
        coco.convert(
            coco.read_karpathy(str(tmp_path / "dataset_x.json"), str(tmp_path / "resized")),
            str(tmp_path / "nothing"),
        )
    assert not (tmp_path / "nothing").exists()


def test_training_pictures_in_eight_orientations(tmp_path):
    rows = np.arange(6)[:, None] * 40
    columns = np.arange(9)[None] * 25
    pixels = np.stack(np.broadcast_arrays(rows, columns, 0 * rows), -1).astype(np.uint8)
    path = str(tmp_path / "a.png")
    Image.fromarray(pixels).save(path)
    entries = [("train", 7, path, ["one", "two"]), ("val", 8, path, ["three"])]
    data = str(tmp_path / "set")
    coco.convert(entries, data, turned=True)
    images, captions = coco.load_captions(data, "train2017")
    assert len(images) == 8 and captions == [["one", "two"]] * 8
    assert len(coco.load_captions(data, "val2017")[0]) == 1
    words = ["a b c", "a", "a b c d", "a b"]
    for keep, kept in (("short", ["a", "a b"]), ("long", ["a b c", "a b c d"])):
        coco.convert([("train", 7, path, words)], str(tmp_path / keep), keep=keep)
        assert coco.load_captions(str(tmp_path / keep), "train2017")[1] == [kept]
    # the 8 orientations are all different, and each is one of numpy's
    expected = [np.rot90(start, k) for start in (pixels, pixels[:, ::-1]) for k in range(4)]
    for image, right in zip(images, expected):
        picture = Image.open(os.path.join(data, "train2017", image["file_name"]))
        difference = np.asarray(picture, dtype=int) - right
        assert (
            difference.shape == right.shape and abs(difference).mean() < 8
        )  # jpeg; others differ by 40
    text = (tmp_path / "set/train_captions.txt").read_text()
    assert sorted(text.splitlines()) == ["one", "two"]
    # names that differ in their ending only
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    entries = [("train", 1, path, ["one"]), ("train", 2, str(tmp_path / "a.jpg"), ["two"])]
    coco.convert(entries, str(tmp_path / "two"), turned=True)
    images, _ = coco.load_captions(str(tmp_path / "two"), "train2017")
    assert len(images) == len({image["file_name"] for image in images}) == 16


def test_a_converted_set_without_val_is_not_converted_again(tmp_path):
    for folder, colour in (("a", "red"), ("b", "blue")):
        os.makedirs(tmp_path / folder)
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "1.png")
        images = [dict(filename="1.png", split="train", sentences=[dict(raw=colour)])]
        (tmp_path / folder / "dataset_x.json").write_text(json.dumps(dict(images=images)))
        said = run_here(f"coco.py data=set karpathy_json={folder}/dataset_x.json encoder=none",
                        tmp_path)
    assert "set is there already" in said
    assert coco.load_captions(str(tmp_path / "set"), "train2017")[1] == [["red"]]


def test_of_equal_shares_without_a_mistake_the_higher_cider_is_kept():
    def quality(cider, right):
        return train_caption.Evaluation([], dict(CIDEr=cider), np.zeros(0), right).quality()

    assert quality(2.0, None) > quality(1.0, None)
    assert quality(1.0, 0.0) < quality(2.0, 0.0) < quality(0.0, 1 / 5000)


def test_the_newest_captioner_is_found_among_runs_of_all_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, (folder, content) in enumerate((
            ("a/old", dict(gpt_config=1)), ("ucm", dict(gpt_config=1)), ("gpt", dict(model={})),
            ("ucm_shuffled", dict(gpt_config=1)))):
        os.makedirs(f"out/{folder}")
        torch.save(content, f"out/{folder}/ckpt.pt")
        os.utime(f"out/{folder}/ckpt.pt", (n, n))
    assert train_caption.find_run() == "out/ucm"


@pytest.mark.parametrize(
    "row, hint",
    [
        (
            "A,train,0.png,first one,second, with a comma,third,fourth,fifth",
            "line 3: it needs 8 fields",
        ),
        ("A,train,0.png,one,two", "line 3: it needs 8 fields"),
    ],
)
def test_rows_of_risc_with_other_fields_are_refused(tmp_path, capsys, row, hint):
    header = "source,split,image,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    (tmp_path / "captions.csv").write_text(f'{header}A,train,0.png,"a, b",c,,d,e\n{row}\n')
    with pytest.raises(SystemExit):
        coco.read_risc(str(tmp_path / "captions.csv"))
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, hint",
    [
        (lambda image: image.update(cocoid=1), "have the id 1"),
        (lambda image: image.update(filename="a/../1.png"), "have the file_name 1.png"),
        (lambda image: image.update(sentences=[dict(raw=7)]), "is 7, not text"),
        (lambda image: image.update(sentences=[dict(raw=None)]), "is None, not text"),
        (lambda image: image.update(filename=None), "TypeError"),
        (lambda image: image.update(split="dev"), "of the split 'dev'"),
        (lambda image: image.pop("cocoid"), ""),
    ],
)
def test_karpathy_files_that_would_mix_captions_are_refused(tmp_path, capsys, change, hint):
    os.makedirs(tmp_path / "imgs/a")
    images = []
    for k in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"imgs/{k}.png")
        images.append(
            dict(filename=f"{k}.png", cocoid=k, split="train", sentences=[dict(raw=f"{k}")])
        )
    change(images[2])
    (tmp_path / "dataset_x.json").write_text(json.dumps(dict(images=images)))
    if not hint:  # numbered anew, since not all have an id
        coco.convert(coco.read_karpathy(str(tmp_path / "dataset_x.json")), str(tmp_path / "set"))
        entries, captions = coco.load_captions(str(tmp_path / "set"), "train2017")
        assert [entry["id"] for entry in entries] == [1, 2, 3] and captions == [["0"], ["1"], ["2"]]
        return
    with pytest.raises(SystemExit):
        coco.convert(coco.read_karpathy(str(tmp_path / "dataset_x.json")), str(tmp_path / "set"))
    assert hint in capsys.readouterr().err and not (tmp_path / "set").exists()


def test_coco_in_karpathys_splits_is_made_of_the_2017_pictures(tmp_path):
    for folder, cocoid in (("train2017", 9), ("train2017", 391895), ("val2017", 139)):
        os.makedirs(tmp_path / "coco2017" / folder, exist_ok=True)
        picture = Image.new("RGB", (8, 8), (cocoid % 256, 0, 0))
        picture.save(tmp_path / f"coco2017/{folder}/{cocoid:012d}.jpg")
    images = []
    for cocoid, split in ((9, "test"), (391895, "restval"), (139, "train")):
        name = f"COCO_val2014_{cocoid:012d}.jpg"
        images.append(dict(filename=name, filepath="val2014", cocoid=cocoid, split=split,
                           sentences=[dict(raw=f"picture {cocoid}")]))
    (tmp_path / "dataset_coco.json").write_text(json.dumps(dict(images=images)))
    entries = coco.read_karpathy(str(tmp_path / "dataset_coco.json"), str(tmp_path / "coco2017"))
    coco.convert(entries, str(tmp_path / "set"))
    for split, ids in (("train2017", [391895, 139]), ("test2017", [9])):
        found, captions = coco.load_captions(str(tmp_path / "set"), split)
        assert [image["id"] for image in found] == ids
        assert captions == [[f"picture {cocoid}"] for cocoid in ids]
        for image, file in zip(found, coco.image_files(str(tmp_path / "set"), split, found)):
            assert abs(coco.open_image(file).getpixel((4, 4))[0] - image["id"] % 256) < 3


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in members:
            z.writestr(name, content)


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/x/evil.txt", "a/../../evil.txt",
                                  "..\\evil.txt", "C:/evil.txt", "evil.txt"])
def test_a_zip_is_unpacked_inside_its_folder_and_without_links(tmp_path, name):
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o120777 << 16  # a symbolic link
    zip_of(tmp_path / "a.zip", [("annotations/good.json", b"{}"), (member, b"/etc")])
    coco.unpack(str(tmp_path / "a.zip"), str(tmp_path / "data"), "")
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "data"]
    assert (tmp_path / "data/annotations/good.json").read_bytes() == b"{}"
    written = [path for path in tmp_path.rglob("*evil.txt")]
    assert len(written) == 1 and not written[0].is_symlink() and written[0].read_bytes() == b"/etc"
    assert not os.path.exists("/tmp/x/evil.txt")


@pytest.fixture
def mirror(drawn, tmp_path):
    """A server on 127.0.0.1 that holds the drawn scenes as COCO's three zips."""
    for folder in ("annotations", "zips"):
        os.makedirs(tmp_path / "site" / folder)
    zip_of(
        tmp_path / "site/annotations/annotations_trainval2017.zip",
        [("annotations/instances_val2017.json", b"{}")]
        + [
            (
                f"annotations/captions_{split}.json",
                (drawn / f"annotations/captions_{split}.json").read_bytes(),
            )
            for split in coco.SPLITS
        ],
    )
    for split in coco.SPLITS:
        zip_of(
            tmp_path / f"site/zips/{split}.zip",
            [(f"{split}/", b"")]
            + [
                (f"{split}/{name}", (drawn / split / name).read_bytes())
                for name in os.listdir(drawn / split)
            ],
        )

    class Site(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "site"))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_coco_is_downloaded_verified_and_goes_on(mirror, drawn, tmp_path, monkeypatch, capsys):
    run("coco.py data=big/coco encoder=patches", tmp_path, env=dict(COCO_ENDPOINT=mirror))
    data = tmp_path / "big/coco"
    assert sorted(os.listdir(data)) == [
        "annotations",
        "features",
        "train2017",
        "val2017",
    ] and sorted(os.listdir(data / "annotations")) == [
        "captions_train2017.json",
        "captions_val2017.json",
    ]
    for split in coco.SPLITS:
        assert all(
            (data / split / name).read_bytes() == (drawn / split / name).read_bytes()
            for name in os.listdir(drawn / split)
        )
    # interrupted while the training pictures were unpacked: one is missing, one cut short
    monkeypatch.setenv("COCO_ENDPOINT", mirror)
    for split, zipped in (
        ("annotations", "annotations/annotations_trainval2017.zip"),
        ("train2017", "zips/train2017.zip"),
    ):
        shutil.copy(tmp_path / "site" / zipped, data)
    (data / "train2017/000001.jpg").unlink()
    (data / "train2017/000002.jpg").write_bytes(b"cut")
    untouched = os.stat(data / "train2017/000003.jpg").st_mtime_ns
    coco.download_coco(str(data))
    assert all(
        (data / "train2017" / name).read_bytes() == (drawn / "train2017" / name).read_bytes()
        for name in os.listdir(drawn / "train2017")
    )
    assert os.stat(data / "train2017/000003.jpg").st_mtime_ns == untouched and not list(
        data.glob("*.zip*")
    )
    # a damaged zip, one that lacks a picture, and a full disk
    for name in (b"damaged", b"short"):
        picture = drawn / "val2017/000001.jpg"
        content = (tmp_path / "site/zips/val2017.zip").read_bytes()
        if name == b"damaged":
            (tmp_path / "site/zips/val2017.zip").write_bytes(
                content.replace(picture.read_bytes()[-200:], bytes(200))
            )
        else:
            zip_of(
                tmp_path / "site/zips/val2017.zip",
                [("val2017/000002.jpg", (drawn / "val2017/000002.jpg").read_bytes())],
            )
        other = tmp_path / name.decode()
        with pytest.raises(SystemExit):
            coco.download_coco(str(other))
        assert (
            "is damaged" if name == b"damaged" else "lacks 5 of the pictures"
        ) in capsys.readouterr().err
        assert len(os.listdir(other / "train2017")) == 120
        (tmp_path / "site/zips/val2017.zip").write_bytes(content)
    monkeypatch.setattr(
        coco.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(SystemExit):
        coco.download_coco(str(tmp_path / "full"))
    assert "are free" in capsys.readouterr().err and os.listdir(tmp_path / "full") == []


# ---- the captioner (train_caption.py)


def test_trainable_parameters_at_real_size():
    with torch.device("meta"):
        gpt = GPT(GPTConfig())
        count = {
            name: sum(
                p.numel()
                for p in Captioner(gpt, fusion, every, 768).parameters()
                if p.requires_grad
            )
            for name, fusion, every in (
                ("1", "xattn", 1),
                ("2", "xattn", 2),
                ("4", "xattn", 4),
                ("linear", "linear", 1),
            )
        }
    C = 768
    block = 12 * C**2 + 13 * C + 2  # q, kv, out, MLP; their biases and two norms; two gates: 7.09M
    projection = C * (C + 1) + 2 * C
    assert [count[k] for k in ("1", "2", "4")] == [n * block + projection for n in (12, 6, 3)]
    assert [round(count[k] / 1e6) for k in ("1", "2", "4")] == [86, 43, 22]
    assert count["linear"] == C * (C + 1) == 590_592


@pytest.mark.parametrize("every", [1, 2, 4])
def test_gates_at_zero_leave_the_gpt_as_it_was(every):
    model = Captioner(small_gpt(), "xattn", every, 24).eval()
    idx, features = torch.randint(0, 101, (2, 12)), torch.randn(2, 9, 24)
    assert torch.equal(model.logits(idx, model.encode_image(features)), model.gpt(idx))


@pytest.mark.parametrize("fusion", ["xattn", "linear", "qformer"])
def test_captioner_without_a_picture_is_the_gpt(fusion):
    model, idx = open_eyed(fusion), torch.randint(0, 101, (2, 12))
    assert torch.equal(model.logits(idx), model.gpt(idx))
    assert not torch.allclose(
        model.logits(idx, model.encode_image(torch.randn(2, 9, 24))), model.gpt(idx), atol=1e-2
    )


@pytest.mark.parametrize(
    "fusion, every", [("xattn", 1), ("xattn", 2), ("linear", 1), ("qformer", 1)]
)
def test_cached_captions_equal_recomputed_ones(fusion, every):
    model, features, bos = open_eyed(fusion, every), torch.randn(3, 9, 24), 100
    plain = torch.full((3, 1), bos)
    with torch.no_grad():
        for _ in range(15):
            plain = torch.cat(
                [plain, model.logits(plain, model.encode_image(features))[:, -1:].argmax(-1)], 1
            )
    cached = model.generate(features, bos, 15)
    for ours, full in zip(cached.tolist(), plain[:, 1:].tolist()):
        end = full.index(bos) + 1 if bos in full else 15
        assert ours[:end] == full[:end] and set(ours[end:]) <= {bos}


def beams(model, features, beam, length, stop):
    B = len(features)
    image = model.encode_image(features, torch.arange(B).repeat_interleave(beam))
    P = image.shape[1] if torch.is_tensor(image) else 0
    cache = train_gpt2.KVCache(model.gpt.config, B * beam, P + 1 + length, model.gpt.lm_head.weight)
    start = torch.full((B * beam, 1), stop)
    return train_caption.beam_search(
        lambda new: model.logits(new, image, cache), cache, start, beam, length, stop
    )


@pytest.mark.parametrize("fusion", ["xattn", "linear"])
def test_a_beam_of_one_is_greedy(fusion):
    model, features = open_eyed(fusion), torch.randn(5, 9, 24)
    assert torch.equal(
        beams(model, features, 1, 15, stop=100)[:, 0], model.generate(features, 100, 15)
    )


@pytest.mark.parametrize("fusion", ["xattn", "linear"])
def test_a_beam_wide_enough_ranks_all_captions_as_trying_each_does(fusion):
    stop, length, features = 4, 3, torch.randn(2, 9, 24)
    model = open_eyed(fusion, gpt=small_gpt(vocab_size=5, scale=3))
    endless = [list(said) for said in itertools.product(range(5), repeat=length)]
    every_caption = sorted(
        {tuple(said[: said.index(stop) + 1] if stop in said else said) for said in endless}
    )  # 85
    found = beams(model, features, 100, length, stop).tolist()
    for b in range(2):
        image, mean = model.encode_image(features[b : b + 1]), {}
        for said in every_caption:  # without cache, one at a time
            logp = model.logits(torch.tensor([[stop, *said[:-1]]]), image).log_softmax(-1)[0]
            mean[said] = logp[range(len(said)), said].mean().item()
        ranked = sorted(every_caption, key=mean.get, reverse=True)
        assert [tuple(row[: row.index(stop) + 1] if stop in row else row) for row in found[b]][
            : len(ranked)
        ] == ranked
    best = model.generate(features, stop, length, num=2, beam=100).tolist()
    assert best == [row for rows in found for row in rows[:2]]


def test_frozen_matrices_in_bfloat16_change_nothing_for_autocast():
    idx, features, autocast = (
        torch.randint(0, 101, (2, 12)),
        torch.randn(2, 9, 24),
        torch.autocast("cpu", torch.bfloat16),
    )
    model = open_eyed("xattn")
    embedding = model.gpt.transformer.wte.weight
    embedding.data = (
        embedding.bfloat16().float()
    )  # read as it is, not only multiplied: this one is rounded
    with torch.no_grad(), autocast:
        before = model.logits(idx, model.encode_image(features))
        model.to_process(Process(0, 1, "cpu", torch.bfloat16))
        assert torch.equal(model.logits(idx, model.encode_image(features)), before)
    assert (
        model.gpt.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
        and model.project[0].weight.dtype == torch.float32
    )


def test_consensus_takes_the_caption_that_is_most_like_the_others():
    """By the cosine of counts of n-grams, of which each weighs the same."""

    def likeness(one, other):
        total = 0.0
        for n in 1, 2, 3, 4:
            a, b = (Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))
                    for words in (one, other))
            norms = math.hypot(*a.values()) * math.hypot(*b.values())
            total += sum(min(a[g], b[g]) * b[g] for g in a) / norms if norms else 0
        return total * math.exp(-(len(one) - len(other)) ** 2 / 72)

    words = "a b c d e".split()
    tokenizer = SimpleNamespace(eot_token=5, decode=lambda row: " ".join(words[k] for k in row))
    tokens = torch.randint(0, 6, (3 * 8, 6), generator=torch.Generator().manual_seed(3))
    model = SimpleNamespace(generate=lambda *args, **kw: tokens)
    chosen = train_caption.consensus_captions(model, torch.zeros(3, 1, 1), tokenizer, 6, 8)
    captions = train_caption.to_text(tokens, tokenizer)
    for k, caption in enumerate(chosen):
        samples = [said.split() for said in captions[8 * k:8 * k + 8]]
        sums = [sum(likeness(one, other) for other in samples) for one in samples]
        best = [" ".join(one) for one, total in zip(samples, sums) if total > max(sums) - 1e-9]
        assert caption in best and max(sums) > min(sums) + 0.1
    references = [[["a", "b"], ["c"]], [["d"], ["a"]], [["b", "c"], ["e"]]]
    candidates = [["a"], ["d"], ["b", "c", "e"]]
    for df in None, cider.document_frequencies(references):
        each = cider.evaluate(candidates, references, df, tokenized=True)[1]["CIDEr"]
        assert each.any() and (cider.cider_of_tokens(candidates, references, df) == each).all()


def test_scst_follows_the_gradient_of_expected_cider():
    """
    All captions of two words at most, all pairs of samples: what is descended on average is minus
    the gradient of sum p(caption) CIDEr(caption).
    """
    eot, features = 2, torch.randn(1, 9, 24)
    model = open_eyed("linear", gpt=small_gpt(vocab_size=3, scale=3))
    tokenizer = SimpleNamespace(
        eot_token=eot, decode=lambda row: " ".join("ab"[token] for token in row)
    )
    references = [[["a", "b", train_caption.END], ["b", train_caption.END]]]
    df = cider.document_frequencies(references + [[["c", train_caption.END]], [["a", "c"]]])
    captions = [[eot, eot]] + [[first, second] for first in (0, 1) for second in (0, 1, eot)]
    targets = torch.tensor(captions)
    targets[0, 1] = -100
    starts = torch.tensor([[eot, first] for first, _ in captions])
    logp = model.logits(
        starts, model.encode_image(features, torch.zeros(7, dtype=torch.long))
    ).log_softmax(
        -1
    )  # (7, 2, 3)
    p = (
        (logp.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)).sum(1).exp()
    )  # (7,)
    said = [
        ["ab"[token] for token in row if token != eot] + [train_caption.END] * (eot in row)
        for row in captions
    ]
    rewards = torch.from_numpy(
        cider.evaluate(said, references * 7, df, tokenized=True)[1]["CIDEr"]
    ).float()
    assert p.sum().item() == pytest.approx(1) and len(set(rewards.tolist())) > 4
    parameters = list(model.project.parameters())
    exact = torch.autograd.grad(p @ rewards, parameters)
    ours = [torch.zeros_like(g) for g in exact]
    for one, two in itertools.product(range(7), repeat=2):
        model.generate = lambda *args, **kw: torch.tensor([captions[one], captions[two]])
        *batch, mean = train_caption.self_critical(
            model, features, references, df, tokenizer, max_length=2, samples=2
        )
        assert (
            mean == pytest.approx((rewards[one] + rewards[two]).item() / 2)
            and batch[-1].sum().abs() < 1e-6
        )
        idx, said, image_idx, weight = batch
        for total, g in zip(
            ours, torch.autograd.grad(model(idx, features, said, image_idx, weight) / 2, parameters)
        ):
            total -= (p[one] * p[two]).item() * g
    for mine, g in zip(ours, exact):
        assert g.abs().max() > 1e-3
        torch.testing.assert_close(mine, g, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("fusion", ["xattn", "linear", "qformer"])
def test_first_word_is_trained_and_depends_on_the_picture(fusion):
    tokenizer = fineweb.get_tokenizer(fineweb.learn_bpe(TEXT, 300))
    captions = TokenizedCaptions([["the cat"], ["a dog , a cat"]], tokenizer, 40)
    idx, targets = captions.batch([0, 1], "cpu")
    assert (idx[:, 0] == tokenizer.eot_token).all() and targets[0, 0] == tokenizer.encode_ordinary(
        "the"
    )[0]
    assert (
        targets[0, 2] == tokenizer.eot_token and (targets[0, 3:] == -100).all()
    )  # EOS is learned, padding is not
    model = Captioner(small_gpt(vocab_size=tokenizer.n_vocab), fusion, 1, 24).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate"):
                p.fill_(0.5)
    features = torch.randn(2, 9, 24, requires_grad=True)
    only_first = targets.clone()
    only_first[:, 1:] = -100
    model(idx, features, only_first).backward()
    assert features.grad.abs().sum() > 0 and all(p.grad is None for p in model.gpt.parameters())


def test_summed_loss_is_cross_entropy_of_caption_and_eos():
    model, idx = open_eyed("linear"), torch.randint(0, 101, (2, 6))
    targets = torch.randint(0, 101, (2, 6))
    targets[1, 3:] = -100
    features = torch.randn(2, 9, 24)
    logp = model.logits(idx, model.encode_image(features)).log_softmax(-1)
    plain = -sum(
        logp[b, t, targets[b, t]] for b in range(2) for t in range(6) if targets[b, t] >= 0
    )
    torch.testing.assert_close(model(idx, features, targets), plain)


def test_long_captions_are_cut_and_counted():
    tokenizer = fineweb.get_tokenizer(fineweb.learn_bpe(TEXT, 300))
    captions = TokenizedCaptions([["the cat " * 30, "a dog"]], tokenizer, 10)
    assert captions.cut == 1 and captions.batch([0], "cpu")[0].shape == (1, 11)


def test_training_batches_show_each_image_once_an_epoch():
    tokenizer = fineweb.get_tokenizer(fineweb.learn_bpe(TEXT, 300))
    captions = TokenizedCaptions([["a", "b", "c"][: 1 + i % 3] for i in range(10)], tokenizer, 10)
    images = np.concatenate(
        [training_batch(step, 4, captions, seed=5)[0] for step in range(10)]
    )  # 4 epochs
    chosen = np.concatenate([training_batch(step, 4, captions, seed=5)[1] for step in range(10)])
    assert all(sorted(images[e : e + 10]) == list(range(10)) for e in range(0, 40, 10))
    assert all(captions.of_image[i] <= c < captions.of_image[i + 1] for i, c in zip(images, chosen))
    assert len(set(chosen)) > 10  # other captions in other epochs


def test_perplexity_is_of_all_tokens_whatever_the_batch():
    tokenizer = fineweb.get_tokenizer(fineweb.learn_bpe(TEXT, 300))
    captions = TokenizedCaptions(
        [["the cat", "a dog , a cat and 2 birds"], ["the dog's mat"]], tokenizer, 40
    )
    model = Captioner(small_gpt(vocab_size=tokenizer.n_vocab, scale=3), "linear", 1, 24).eval()
    features = np.random.default_rng(0).normal(size=(2, 9, 24)).astype(np.float16)
    whole = train_caption.perplexity(model, features, captions, ALONE)
    assert whole == pytest.approx(
        train_caption.perplexity(model, features, captions, ALONE, rows_at_once=1), rel=1e-4
    )
    assert whole != pytest.approx(
        train_caption.perplexity(model, features, captions, ALONE, which_image="wrong"), rel=1e-3
    )


@pytest.fixture(scope="session")
def trained(road):
    run(f"{CAPTION_RUN} out_dir=out/caption_whole min_lr=3e-3 ema=0.9", road)
    return road


def test_caption_run_leaves_what_it_promises(trained):
    results = json.load(open(trained / "out/caption_whole/results.json"))
    assert {
        "fusion",
        "every",
        "trainable",
        "total",
        "perplexity",
        "CIDEr",
        "Bleu_1",
        "Bleu_2",
        "Bleu_3",
        "Bleu_4",
        "ROUGE_L",
        "settings",
    } <= set(results)
    assert results["perplexity"] < results["perplexity_no_picture"]
    assert all(
        hasattr(train_caption, name) for name in results["settings"]
    )  # settings, and nothing else that has a name by then
    images, references = coco.load_captions(str(trained / "shapes"), "val2017")
    said = json.load(open(trained / "out/caption_whole/captions_val2017.json"))
    assert [entry["image_id"] for entry in said] == [image["id"] for image in images]
    scores, _ = cider.evaluate([entry["caption"] for entry in said], references)
    assert {k: results[k] for k in scores} == scores == results["scores"]["greedy"]
    run(
        "cider.py out/caption_whole/captions_val2017.json shapes/annotations/captions_val2017.json"
        " out=judged.json",
        trained,
    )
    assert json.load(open(trained / "judged.json"))["scores"] == scores
    for name in ("captions.png", "curves.png", "attention.png"):
        assert Image.open(trained / "out/caption_whole" / name).size[0] > 300
    assert not [name for name in os.listdir(trained / "out/caption_whole") if name.endswith(".tmp")]


def test_moving_average_of_the_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = train_caption.MovingAverage(model, 0.5)
    expected = 0.0
    for step, value in enumerate((4.0, 8.0, 2.0)):
        model.weight.data.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    average.swap()
    assert model.weight.item() == pytest.approx(expected)
    assert average.swapped_out[0].item() == 2.0
    average.swap()
    assert model.weight.item() == 2.0


def test_captioner_resumes_exactly(trained):
    # ema too: a checkpoint holds the average, and beside it the weights of the last step
    run_here(f"{CAPTION_RUN} out_dir=half max_steps=4 min_lr=3e-3 ema=0.9", trained)
    run_here(f"{CAPTION_RUN} out_dir=half min_lr=3e-3 init_from=resume", trained)
    for column in ("loss", "perplexity"):
        assert log_column(trained / "half/log.csv", column) == log_column(
            trained / "out/caption_whole/log.csv", column
        )


def test_a_resumed_run_takes_what_is_typed_and_keeps_the_rest(trained):
    (trained / "three").mkdir()
    shutil.copytree(trained / "shapes", trained / "three/shapes")
    folder = trained / "three/shapes/annotations"
    shutil.copy(folder / "captions_val2017.json", folder / "captions_test2017.json")
    features = trained / "three/shapes/features"
    for end in ("npy", "json"):
        shutil.copy(features / f"patches_val2017.{end}", features / f"patches_test2017.{end}")
    words = CAPTION_RUN.replace("gpt=", "gpt=../")
    cwd = trained / "three"
    run_here(f"{words} out_dir=a split=test2017 max_steps=2 eval_interval=2 dropout=0.5 ema=0.9",
             cwd)
    losses = []
    for n, changed in enumerate(("", "dropout=0.0", "beta2=0.5", "ema=0.0")):
        shutil.copytree(cwd / "a", cwd / f"a{n}")
        run_here(f"train_caption.py out_dir=a{n} init_from=resume max_steps=4 {changed}", cwd)
        losses.append(log_column(cwd / f"a{n}/log.csv", "loss")[2:])
        assert json.load(open(cwd / f"a{n}/results.json"))["settings"]["split"] == "test2017"
        assert (cwd / f"a{n}/captions_test2017.json").exists()
    # the step after the checkpoint: dropout changes it; betas count from its update on; without
    # ema, too, training goes on from the last weights, not from their average
    assert losses[1][0] != losses[0][0]
    assert losses[2][0] == losses[0][0] and losses[2][1] != losses[0][1]
    assert losses[3] == losses[0]
    error = run("train_caption.py out_dir=a init_from=resume gpt=nowhere.pt", cwd, ok=False)
    assert "was trained with gpt=../gpt/ckpt.pt" in error


def test_a_resumed_run_chooses_the_checkpoint_that_a_stop_left_unevaluated(trained):
    """A stop saves before the evaluation that was due. The resumed run evaluates that checkpoint."""
    runs = (("gpt", f"{GPT_RUN} out_dir=gpt_stopped", math.inf),
            ("out/caption_whole", f"{CAPTION_RUN} out_dir=caption_stopped", -1.0))
    for whole, command, none_yet in runs:
        folder = trained / command.split("out_dir=")[1]
        folder.mkdir()
        checkpoint = train_gpt2.load_checkpoint(str(trained / whole / "ckpt.pt"))
        checkpoint["best"] = none_yet
        torch.save(checkpoint, folder / "ckpt.pt")
        run_here(f"{command} init_from=resume max_steps={checkpoint['step']}", trained)
        best = train_gpt2.load_checkpoint(str(folder / "best.pt"))
        assert best["step"] == checkpoint["step"] and best["best"] != none_yet


def test_other_decodings_and_published_protocol_are_reported_beside_greedy(trained):
    shutil.copytree(trained / "out/caption_whole", trained / "judged")
    said = run_here(
        f"{CAPTION_RUN} out_dir=judged init_from=resume eval_only=True beam=3 consensus=4"
        " single_reference=True",
        trained,
    )
    results, before = (
        json.load(open(trained / name / "results.json")) for name in ("judged", "out/caption_whole")
    )
    tables = ["greedy", "greedy, one reference", "beam=3", "consensus=4"]
    assert list(results["scores"]) == tables and all(name in said for name in tables)
    assert results["scores"]["greedy"] == before["scores"]["greedy"]
    captions = [
        [entry["caption"] for entry in json.load(open(trained / name / "captions_val2017.json"))]
        for name in ("out/caption_whole", "judged")
    ]
    _, references = coco.load_captions(str(trained / "shapes"), "val2017")
    assert (
        cider.evaluate(captions[1], references)[0] == results["scores"]["consensus=4"] == {
            k: results[k] for k in results["scores"]["consensus=4"]
        }
    )
    rng = np.random.default_rng(1337)
    one = [[refs[rng.integers(5)].split()] for refs in references]
    assert (
        cider.evaluate([caption.split() for caption in captions[0]], one, tokenized=True)[0]
        == results["scores"]["greedy, one reference"]
    )


def test_scst_starts_from_a_run_and_resumes_exactly(trained):
    scst = (
        "train_caption.py scst=True learning_rate=3e-3 min_lr=3e-3 samples=3 eval_interval=3"
        " batch_size=8 device=cpu dtype=bfloat16"
    )
    run_here(f"{scst} init_from=out/caption_whole out_dir=scst max_steps=4", trained)
    run_here(f"{scst} init_from=out/caption_whole out_dir=scst_half max_steps=2", trained)
    run_here(
        f"{scst} data=shapes encoder=patches init_from=resume out_dir=scst_half max_steps=4",
        trained,
    )
    for column in ("loss", "reward", "perplexity"):
        assert log_column(trained / "scst_half/log.csv", column) == log_column(
            trained / "scst/log.csv", column
        )
    assert len(log_column(trained / "scst/log.csv", "reward")) == 4
    before, after = (
        train_gpt2.load_checkpoint(str(trained / name / "ckpt.pt"))
        for name in ("out/caption_whole", "scst")
    )
    assert (
        after["settings"]["gpt"] == "gpt/ckpt.pt" and after["settings"]["encoder"] == "patches"
    )  # the settings of the run it started from
    moved = {k: not torch.equal(w, before["model"][k].to(w)) for k, w in after["model"].items()}
    assert all(
        moved[k] != k.startswith("gpt.") for k in moved
    ), moved  # every trained tensor, also in bfloat16, and no frozen one


@pytest.fixture
def server(trained):
    """A web server for the folder of the small road."""
    handler = type(
        "Quiet", (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *args: None)
    )
    served = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(trained))
    )
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_image_mode_needs_the_checkpoint_alone(trained, tmp_path, server):
    """Files, a folder, a glob and a URL, far from the data and the GPT."""
    os.makedirs(tmp_path / "out/caption_x")
    os.mkdir(tmp_path / "mine")
    shutil.copy(trained / "out/caption_whole/ckpt.pt", tmp_path / "out/caption_x")
    for i in range(1, 5):
        shutil.copy(
            trained / f"shapes/val2017/00000{i}.jpg",
            tmp_path / ("mine" if i < 3 else "") / f"{i}.jpg",
        )
    (tmp_path / "mine/notes.txt").write_text("not a picture")
    said = run_here(
        f"train_caption.py image=mine,*3.jpg,4.jpg,{server}/shapes/val2017/000001.jpg num=2 beam=3",
        tmp_path,
    ).splitlines()
    one_each = run_here("train_caption.py image=mine,4.jpg consensus=3", tmp_path)
    for name in ("mine/1.jpg: ", "mine/2.jpg: ", "4.jpg: "):
        assert one_each.count(name) == 1
    names = [
        name
        for name in (
            "mine/1.jpg",
            "mine/2.jpg",
            "3.jpg",
            "4.jpg",
            f"{server}/shapes/val2017/000001.jpg",
        )
        for _ in range(2)
    ]
    assert [line.rsplit(": ", 1)[0] for line in said[:10]] == names and said[0].split(": ")[
        -1
    ] == said[8].split(": ")[-1]
    assert Image.open(tmp_path / "out/caption_x/image.png").size[0] > 300
    command = f"train_caption.py image={server}/judged.json"
    assert "judged.json" in run_here(command, tmp_path, ok=False)


def test_a_folder_of_pictures_is_captioned_but_for_the_broken_ones(trained, tmp_path, serve):
    for name in ("a,b.png", "fine.jpg"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "._fine.jpg").write_bytes(b"macOS writes such files")
    (tmp_path / "film.mpg").write_bytes(b"film")
    (tmp_path / "folder.png").mkdir()
    words = f"image={tmp_path} init_from=out/caption_whole device=cpu"
    done = subprocess.run(
        [sys.executable, os.path.join(REPO, "train_caption.py"), *words.split()],
        cwd=trained,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "1 could not be captioned" in done.stderr
        and "broken.jpg" in done.stderr
    )
    assert "a,b.png: " in done.stdout and "fine.jpg: " in done.stdout and "film" not in done.stdout
    # an address that gives nothing does not keep the others from being captioned; brackets in a
    # name that exists are part of it
    (tmp_path / "e[1]").mkdir()
    for name in ("e[1].jpg", "e1.jpg", "e[1]/x.jpg", "e[1]/y.jpg"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    names = [f"{tmp_path}/{name}" for name in ("e[1].jpg", "e[1]/x.jpg", "e[1]/y.jpg")]
    url = serve(functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, os.path.join(REPO, "train_caption.py"), "device=cpu",
         "init_from=out/caption_whole",
         "image=" + ",".join([f"{url}/nothing.jpg", f"{url}/fine.jpg", *names])],
        cwd=trained, capture_output=True, text=True)
    assert done.returncode == 2 and f"{url}/nothing.jpg: the server says 404" in done.stderr
    captioned = [line.rsplit(": ", 1)[0] for line in done.stdout.splitlines()[:-1]]
    assert captioned == [f"{url}/fine.jpg", *names]
    names = f"{tmp_path}/a,b.png,{tmp_path}/fine.jpg,http://h/a.png?w=1,h=2,{tmp_path}/fine.jpg"
    assert train_caption.split_names(names) == [
        f"{tmp_path}/a,b.png",
        f"{tmp_path}/fine.jpg",
        "http://h/a.png?w=1,h=2",
        f"{tmp_path}/fine.jpg",
    ]


def test_the_best_checkpoint_is_scored_and_a_run_is_never_trained_over(trained):
    folder = trained / "out/caption_whole"
    last, best = (train_gpt2.load_checkpoint(str(folder / name)) for name in ("ckpt.pt", "best.pt"))
    cider_by_step = {
        row["step"]: row["CIDEr"]
        for row in train_gpt2.read_log(folder / "log.csv")
        if row["CIDEr"] is not None
    }
    results = json.loads((folder / "results.json").read_text())
    assert last["step"] == 8 and results["step"] == best["step"] == max(
        (4, 8), key=cider_by_step.get
    )
    assert results["CIDEr"] == pytest.approx(cider_by_step[best["step"]], rel=1e-6) == best["best"]
    before = {
        name: (folder / name).stat().st_mtime_ns for name in os.listdir(folder) if name != ".lock"
    }
    assert "init_from=resume" in run(f"{CAPTION_RUN} out_dir=out/caption_whole", trained, ok=False)
    for words in ("image=", "image=None", "split=train2017"):
        run(f"{CAPTION_RUN} out_dir=out/caption_whole {words}", trained, ok=False)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}


def test_features_that_overflow_end_the_run_before_a_save(trained):
    data = trained / "hot"
    shutil.copytree(trained / "shapes", data)
    for split in coco.SPLITS:
        path = data / f"features/patches_{split}.npy"
        np.save(path, np.load(path) * 60000.0)  # finite in float16, and far too large
    command = (
        f"{CAPTION_RUN.replace('data=shapes', 'data=hot')} out_dir=hot_run learning_rate=1e30"
        " fusion=linear"
    )
    assert (
        "step " in run(command, trained, ok=False)
        and not (trained / "hot_run/results.json").exists()
    )


@needs_shared
def test_gpt_from_the_hub_a_folder_or_a_file(trained):
    gpt = GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16))
    gpt.save_pretrained(str(trained / "pretrained/gpt2"))  # as if downloaded
    losses, words = [], dict(TIKTOKEN_CACHE_DIR=os.path.join(SHARED, "tiktoken"))
    for name in ("gpt2", "pretrained/gpt2/model.safetensors"):
        shutil.rmtree(trained / "hub", ignore_errors=True)
        run_here(f"{CAPTION_RUN} out_dir=hub max_steps=1 gpt={name}", trained, env=words)
        losses += log_column(trained / "hub/log.csv", "loss")
    assert losses[0] == losses[1] == pytest.approx(np.log(50257), abs=0.2)
    shutil.rmtree(trained / "pretrained")
    assert "000001.jpg: " in run_here(
        "train_caption.py image=shapes/val2017/000001.jpg out_dir=hub", trained, env=words
    )
    small_gpt().save_pretrained(str(trained / "other_words"))
    assert "with its own tokenizer" in run_here(
        f"{CAPTION_RUN} gpt=other_words", trained, ok=False, env=words
    )


@pytest.mark.parametrize("fusion", ["linear", "qformer"])
def test_prefix_bridges_train(road, fusion):
    run_here(f"{CAPTION_RUN} out_dir=run_{fusion} fusion={fusion}", road)
    results = json.load(open(road / f"run_{fusion}/results.json"))
    assert results["fusion"] == fusion and results["perplexity"] < results["perplexity_no_picture"]
    assert (results["settings"]["weight_decay"], results["settings"]["beta2"]) == (
        0.05,
        0.98,
    )  # the recipe of the published prefix runs,
    assert results["settings"]["batch_size"] == 16  # but for what the command line says


def test_all_variants_share_one_table(road, monkeypatch, capfd):
    """Two of the five, to save time: each is a run of its own."""
    two = [("xattn", 2), ("linear", 1)]
    monkeypatch.chdir(road)
    monkeypatch.setattr(train_caption, "VARIANTS", two)
    words = f"{CAPTION_RUN} fusion=all out_dir=all max_steps=2 eval_interval=2"
    monkeypatch.setattr(sys, "argv", words.split())
    train_caption.compare_variants("all", {})
    said = capfd.readouterr().out
    rows = json.load(open(road / "all/results.json"))
    assert [(row["fusion"], row["every"]) for row in rows] == two
    for row in rows:
        assert f"{row['trainable']:,}" in said and row["settings"]["max_steps"] == 2
    assert os.path.exists(road / "all/comparison.png")
    # what is finished is not trained again
    train_caption.compare_variants("all", {})
    assert capfd.readouterr().out.count("is finished already") == 2
    # scores of another split have no place in one table with these
    monkeypatch.setattr(train_caption, "split", "test2017")
    with pytest.raises(SystemExit):
        train_caption.compare_variants("all", {})
    assert "all/xattn2 was scored with split=val2017" in capfd.readouterr().err


@pytest.mark.parametrize(
    "command, hint",
    [
        ("train_caption.py every=0", "must be >= 1"),
        ("train_caption.py data=shapes eval_only=True", "init_from=resume"),
        (
            "train_caption.py data=shapes gpt=out/caption_whole/ckpt.pt encoder=patches",
            "not a checkpoint of train_gpt2.py",
        ),
        (
            "train_caption.py image=shapes/val2017/000001.jpg out_dir=gpt",
            "not a checkpoint of train_caption.py",
        ),
        ("train_caption.py evry=2", "did you mean 'every'"),
        ("train_caption.py every=two", "whole number"),
        ("train_caption.py data=nowhere", "no such folder"),
        ("train_caption.py data=badjson gpt=gpt/ckpt.pt", "not a COCO captions file"),
        (
            "train_caption.py data=shapes gpt=gpt/ckpt.pt encoder=absent",
            "coco.py data=shapes encoder=absent",
        ),
        ("train_caption.py data=rows gpt=gpt/ckpt.pt encoder=patches", "200 images"),
        (
            (
                "train_caption.py data=shapes gpt=gpt/ckpt.pt encoder=patches init_from=resume"
                " out_dir=other_shape"
            ),
            "of another shape",
        ),
        ("train_caption.py data=shapes gpt=nothing.pt encoder=patches", "nothing.pt"),
        ("train_caption.py image=broken.jpg", "broken.jpg is not a readable picture"),
        ("train_caption.py image=nowhere/*.jpg", "nowhere/*.jpg"),
        ("train_caption.py image=broken.jpg num=3 temperature=0", "num=3"),
        ("train_caption.py scst=True", "init_from="),
        ("train_caption.py init_from=out/caption_whole every=2", "every=1"),
        ("train_caption.py init_from=out/caption_whole out_dir=out/caption_whole", "overwrite"),
        ("train_caption.py image=shapes/val2017/000001.jpg out_dir=other_eye", "not those"),
        ("train_caption.py image=shapes/val2017/000001.jpg out_dir=no_eye", "another program"),
        (
            (
                "train_gpt2.py data=tokens n_layer=2 n_head=2 n_embd=32 block_size=32 batch_size=3"
                " total_batch_size=512"
            ),
            "not a multiple",
        ),
        ("train_gpt2.py data=nowhere", "fineweb.py"),
        ("fineweb.py text=nowhere.txt", "nowhere.txt"),
    ],
)
def test_bad_input_ends_with_one_line(trained, command, hint):
    os.makedirs(trained / "badjson/annotations", exist_ok=True)
    for split in coco.SPLITS:
        (trained / f"badjson/annotations/captions_{split}.json").write_text('{"pictures": []}')
    shutil.copytree(
        trained / "shapes",
        trained / "rows",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("features"),
    )
    os.makedirs(trained / "rows/features", exist_ok=True)
    np.save(trained / "rows/features/patches_train2017.npy", np.zeros((150, 64, 194), np.float16))
    (trained / "broken.jpg").write_bytes(b"not a jpeg")
    whole = train_gpt2.load_checkpoint(str(trained / "out/caption_whole/ckpt.pt"))
    for name, change in dict(
        other_shape=dict(model=whole["model"] | {"project.0.weight": torch.zeros(7, 7)}),
        other_eye=dict(weights="others"),
        no_eye=dict(settings=whole["settings"] | dict(encoder="squeezenet1_1"), pretrained=None),
    ).items():
        os.makedirs(trained / name, exist_ok=True)
        torch.save(whole | change, trained / name / "ckpt.pt")
    before = {p for p in trained.rglob("*") if "features" in p.parts and p.suffix == ".npy"}
    assert hint in run(command, trained, ok=False)
    assert before == {
        p for p in trained.rglob("*") if "features" in p.parts and p.suffix == ".npy"
    }  # nothing half-written


# ---- PaliGemma (paligemma_prompt.py)

TINY = os.path.join(SHARED, "paligemma_tiny")
HARD = [11, 12, 4]
WAY = dict(prompt="soft", n_soft=5)


def theirs(gemma2=False):
    """
    transformers' PaliGemma, random, with attention sharp enough to tell masks apart; a PaliGemma 2
    with tight caps.
    """
    coco.mend_torchvision()
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = dict(
        model_type="gemma2" if gemma2 else "gemma",
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2 if gemma2 else 1,
        vocab_size=90,
        hidden_activation="gelu_pytorch_tanh",
    )
    if gemma2:
        text |= dict(
            query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
        )
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=14,
        image_size=42,
        projection_dim=48,
        vision_use_head=False,
    )
    torch.manual_seed(int(gemma2))
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=89,
        projection_dim=48,
        hidden_size=48,
        vocab_size=90,
    )
    model = PaliGemmaForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3)
    return model


@pytest.fixture(scope="session", params=[False, True], ids=["PaliGemma", "PaliGemma 2"])
def reference(request, tmp_path_factory):
    """
    (transformers' model, the folder it was saved in, pictures, the same batch as they and as we
    want it).
    """
    model, folder = theirs(request.param), str(tmp_path_factory.mktemp("reference"))
    model.save_pretrained(folder)
    pixels, suffix = torch.rand(2, 3, 42, 42) * 2 - 1, torch.tensor(
        [[20, 21, 22, 23, 1], [30, 31, 1, 0, 0]]
    )
    ids = torch.cat([torch.tensor([[89] * 9 + [2] + HARD] * 2), suffix], 1)
    ids_mask, targets = (torch.arange(18) < torch.tensor([[18], [16]])).long(), suffix.clone()
    targets[1, 3:] = -100
    kind = (torch.arange(18) >= 13).long().expand(2, -1)
    return model, folder, pixels, ids, ids_mask, kind, targets


def as_we_want_it(targets):
    return torch.cat([torch.zeros(2, 1, dtype=torch.long), targets[:, :-1].clamp(min=0)], 1)


def test_paligemma_equals_transformers(reference):
    model, folder, pixels, ids, mask, kind, targets = reference
    ours = PromptedPaliGemma(PaliGemma.from_pretrained(folder), 2, HARD)
    labels = torch.cat([torch.full((2, 13), -100), targets], 1)
    out = model(
        input_ids=ids, pixel_values=pixels, token_type_ids=kind, attention_mask=mask, labels=labels
    )
    language = ours.model.language_model
    with torch.no_grad():
        logits = language.head(
            language(torch.cat([ours.prefix(pixels), language.embed(ids[:, 13:])], 1), 13)
        )
    torch.testing.assert_close(logits[mask > 0], out.logits[mask > 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours(as_we_want_it(targets), pixels, targets) / 8, out.loss, atol=1e-5, rtol=1e-5
    )
    tokens = model.generate(
        input_ids=ids[:, :13],
        pixel_values=pixels,
        token_type_ids=kind[:, :13],
        attention_mask=mask[:, :13],
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
    )
    assert ours.generate(pixels, -1, 8).tolist() == tokens[:, 13:].tolist()


@pytest.mark.parametrize(
    "place, at", [("before_image", 0), ("after_image", 9), ("after_bos", 10), ("before_suffix", 13)]
)
def test_soft_prompts_get_transformers_gradients(reference, place, at):
    model, folder, pixels, ids, mask, kind, targets = reference
    ours = PromptedPaliGemma(PaliGemma.from_pretrained(folder), 2, HARD, soft_position=place, **WAY)
    rows = model.get_input_embeddings()(torch.tensor(HARD[:2]))  # scaled; without the "\n"
    torch.testing.assert_close(ours.soft.detach(), rows[torch.arange(5) % 2].detach())
    loss = ours(as_we_want_it(targets), pixels, targets) / 8
    loss.backward()
    soft = ours.soft.detach().clone().requires_grad_()
    with torch.no_grad():
        x = model.get_input_embeddings()(ids)
        x[:, :9] = model.get_image_features(pixels).pooler_output
    x = torch.cat([x[:, :at], soft.expand(2, -1, -1), x[:, at:]], 1)
    out = model(
        inputs_embeds=x,
        token_type_ids=torch.cat([kind[:, :1]] * 5 + [kind], 1),
        attention_mask=torch.cat([mask[:, :1]] * 5 + [mask], 1),
        labels=torch.cat([torch.full((2, 18), -100), targets], 1),
    )
    out.loss.backward()
    torch.testing.assert_close(loss, out.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.soft.grad, soft.grad, atol=1e-5, rtol=1e-4)
    assert soft.grad.abs().max() > 1e-3


@needs_shared
@pytest.mark.parametrize("name", ["", "legacy_names.safetensors", "big_vision.npz"])
def test_paligemma_equals_the_oracle_in_every_format(name):
    oracle = {k: torch.from_numpy(v) for k, v in np.load(os.path.join(TINY, "oracle.npz")).items()}
    hard, pixels, targets = (
        oracle["prefix_ids"][1:].tolist(),
        oracle["pixel_values"],
        oracle["labels"][:, 20:],
    )
    idx, n = (
        torch.cat([torch.zeros(2, 1, dtype=torch.long), oracle["input_ids"][:, 20:-1]], 1),
        (targets >= 0).sum(),
    )
    model = PaliGemma.from_pretrained(os.path.join(TINY, name))
    ours, language = PromptedPaliGemma(model, 2, hard), model.language_model
    with torch.no_grad():
        logits = language.head(
            language(
                torch.cat([ours.prefix(pixels), language.embed(oracle["input_ids"][:, 20:])], 1), 20
            )
        )
    real = oracle["attention_mask"] > 0
    torch.testing.assert_close(logits[real], oracle["train_logits"][real], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        ours(idx, pixels, targets) / n, oracle["train_loss"], atol=1e-5, rtol=0
    )
    assert ours.generate(pixels, -1, 12).equal(oracle["generated_ids"])
    for place in paligemma_prompt.SOFT_POSITIONS:
        ours = PromptedPaliGemma(model, 2, hard, soft_position=place, **WAY)
        ours.soft.data = oracle["soft_prompt"].clone()
        loss = ours(idx, pixels, targets) / n
        loss.backward()
        torch.testing.assert_close(loss, oracle[f"soft_{place}_loss"], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.soft.grad, oracle[f"soft_{place}_grad"], atol=1e-5, rtol=0)


def to_big_vision(model):
    """The inverse of what open_npz does, from the shapes in big_vision's own code."""
    c, arrays = model.config, {}
    state = {k: p.detach().numpy() for k, p in model.named_parameters()}
    heads = lambda w, n: w.reshape(n, -1, w.shape[1]).transpose(
        0, 2, 1
    )  # (n * E, in) -> (n, in, E)
    stack = lambda part, i: np.stack(
        [state[f"{part[0]}.layers.{layer}.{part[1]}"] for layer in range(i)]
    )
    tower, text = ("vision_tower.encoder", c.v_layer), ("language_model", c.n_layer)
    put = lambda name, where, leaf, change=lambda w: w: arrays.__setitem__(
        name, np.stack([change(w) for w in stack((where[0], leaf), where[1])])
    )
    block, E = "params/img/Transformer/encoderblock/", c.v_embd // c.v_head
    for i in (0, 1):
        put(f"{block}LayerNorm_{i}/scale", tower, f"layer_norm{i + 1}.weight")
        put(f"{block}LayerNorm_{i}/bias", tower, f"layer_norm{i + 1}.bias")
        put(f"{block}MlpBlock_0/Dense_{i}/kernel", tower, f"mlp.fc{i + 1}.weight", np.transpose)
        put(f"{block}MlpBlock_0/Dense_{i}/bias", tower, f"mlp.fc{i + 1}.bias")
    for name in ("query", "key", "value"):
        put(
            f"{block}MultiHeadDotProductAttention_0/{name}/kernel",
            tower,
            f"self_attn.{name[0]}_proj.weight",
            lambda w: w.T.reshape(-1, c.v_head, E),
        )
        put(
            f"{block}MultiHeadDotProductAttention_0/{name}/bias",
            tower,
            f"self_attn.{name[0]}_proj.bias",
            lambda w: w.reshape(c.v_head, E),
        )
    put(
        f"{block}MultiHeadDotProductAttention_0/out/kernel",
        tower,
        "self_attn.out_proj.weight",
        lambda w: w.T.reshape(c.v_head, E, -1),
    )
    put(f"{block}MultiHeadDotProductAttention_0/out/bias", tower, "self_attn.out_proj.bias")
    block = "params/llm/layers/"
    put(block + "attn/q_einsum/w", text, "self_attn.q_proj.weight", lambda w: heads(w, c.n_head))
    k, v = (
        np.stack(
            [
                heads(w, c.n_kv_head)
                for w in stack(("language_model", f"self_attn.{name}_proj.weight"), c.n_layer)
            ]
        )
        for name in "kv"
    )
    arrays[block + "attn/kv_einsum/w"] = np.stack([k, v], 1)
    put(
        block + "attn/attn_vec_einsum/w",
        text,
        "self_attn.o_proj.weight",
        lambda w: w.T.reshape(c.n_head, c.head_dim, -1),
    )
    gate, up = (
        stack(("language_model", f"mlp.{name}_proj.weight"), c.n_layer).transpose(0, 2, 1)
        for name in ("gate", "up")
    )
    arrays[block + "mlp/gating_einsum"] = np.stack([gate, up], 1)
    put(block + "mlp/linear", text, "mlp.down_proj.weight", np.transpose)
    put(block + "pre_attention_norm/scale", text, "input_layernorm.weight")
    put(
        block + "pre_ffw_norm/scale",
        text,
        "pre_feedforward_layernorm.weight" if c.gemma2 else "post_attention_layernorm.weight",
    )
    if c.gemma2:
        put(block + "post_attention_norm/scale", text, "post_attention_layernorm.weight")
        put(block + "post_ffw_norm/scale", text, "post_feedforward_layernorm.weight")
    arrays["params/llm/final_norm/scale"] = state["language_model.norm.weight"]
    arrays["params/llm/embedder/input_embedding"] = state["language_model.embed_tokens.weight"]
    arrays["params/img/embedding/kernel"] = state[
        "vision_tower.embeddings.patch_embedding.weight"
    ].transpose(2, 3, 1, 0)
    arrays["params/img/embedding/bias"] = state["vision_tower.embeddings.patch_embedding.bias"]
    arrays["params/img/pos_embedding"] = state["vision_tower.embeddings.position_embedding.weight"][
        None
    ]
    for leaf in ("weight", "bias"):
        arrays["params/img/head/" + ("kernel" if leaf == "weight" else "bias")] = state[
            f"multi_modal_projector.linear.{leaf}"
        ].T
        arrays[
            "params/img/Transformer/encoder_norm/" + ("scale" if leaf == "weight" else "bias")
        ] = state[f"vision_tower.post_layernorm.{leaf}"]
    return {name: np.ascontiguousarray(w) for name, w in arrays.items()}


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_big_vision_files_load_in_every_precision(reference, kind, tmp_path):
    model = PaliGemma.from_pretrained(reference[1])
    if kind == "bfloat16":  # as numpy writes what it has no name for: two bytes, |V2
        arrays = {
            k: torch.from_numpy(w).bfloat16().view(torch.int16).numpy().view("V2")
            for k, w in to_big_vision(model).items()
        }
    else:
        arrays = {
            k.removeprefix("params/") if kind == "float16" else k: w.astype(kind)
            for k, w in to_big_vision(model).items()
        }
    (np.savez_compressed if kind == "float16" else np.savez)(tmp_path / "model.npz", **arrays)
    again = PaliGemma.from_pretrained(str(tmp_path / "model.npz"))
    assert {**vars(again.config), "query_scale": 0, "attn_softcap": 0, "final_softcap": 0} == {
        **vars(model.config),
        "query_scale": 0,
        "attn_softcap": 0,
        "final_softcap": 0,
    }
    for (key, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.to(getattr(torch, kind)).float()), key


def test_safetensors_may_be_sharded_and_config_incomplete(reference, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(os.path.join(reference[1], "model.safetensors"))
    said = json.load(open(os.path.join(reference[1], "config.json")))
    for part, names in dict(
        text_config=(
            "hidden_size",
            "rms_norm_eps",
            "vocab_size",
            "rope_parameters",
            "num_hidden_layers",
        ),
        vision_config=("hidden_size", "image_size", "intermediate_size", "patch_size"),
    ).items():
        for name in names:
            said[part].pop(name, None)
    names = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(state)}
    for file in set(names.values()):
        save_file(
            {
                ("model." + k if i % 3 else k): w
                for i, (k, w) in enumerate(state.items())
                if names[k] == file
            }
            | {f"lm_head.{file[8]}": torch.zeros(2)},
            tmp_path / file,
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=names)))
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours, again = PaliGemma.from_pretrained(reference[1]), PaliGemma.from_pretrained(str(tmp_path))
    assert ours.config == again.config and all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True)
    )


def respell(reference, tmp_path, change):
    """The reference's checkpoint after change(tensors, config)."""
    from safetensors.torch import load_file, save_file

    state = load_file(os.path.join(reference[1], "model.safetensors"))
    config = json.load(open(os.path.join(reference[1], "config.json")))
    change(state, config)
    save_file({k: w.contiguous() for k, w in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def table_name(state):
    return next(key for key in state if key.endswith("embed_tokens.weight"))


def test_a_head_alone_is_the_table(reference, tmp_path):
    def only_head(state, config):
        state["lm_head.weight"] = state.pop(table_name(state))

    again = PaliGemma.from_pretrained(respell(reference, tmp_path, only_head))
    ours = PaliGemma.from_pretrained(reference[1])
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True)
    )


def untied(state, config):
    state["lm_head.weight"] = state[table_name(state)] + 1
    config["tie_word_embeddings"] = False


def quantized(state, config):
    state[table_name(state)] = state[table_name(state)].to(torch.int8)


@pytest.mark.parametrize(
    "change, hint",
    [
        (untied, "tie_word_embeddings=false"),
        (quantized, "stored as I8"),
        (
            lambda state, config: config["text_config"].update(model_type="llama"),
            "model_type=llama",
        ),
        (
            lambda state, config: config["text_config"].update(rope_scaling=dict(type="linear")),
            "scales RoPE",
        ),
        (
            lambda state, config: config["text_config"].update(hidden_activation="silu"),
            "activation=silu",
        ),
        (
            lambda state, config: config["vision_config"].update(num_attention_heads=7),
            "7 heads do not divide",
        ),
        (
            lambda state, config: config["text_config"].update(head_dim="16"),
            "not one of a PaliGemma",
        ),
    ],
)
def test_what_would_compute_something_else_is_refused(change, hint, reference, tmp_path, capsys):
    with pytest.raises(SystemExit):
        PaliGemma.from_pretrained(respell(reference, tmp_path, change))
    assert hint in capsys.readouterr().err


def test_a_soft_prompt_beside_lora_has_its_own_rate(reference):
    ours = PromptedPaliGemma(
        PaliGemma.from_pretrained(reference[1]), 2, HARD, trainable="lora", **WAY
    )
    optimizers = paligemma_prompt.make_optimizer(ours, "adamw", 50.0)
    before = {k: p.detach().clone() for k, p in ours.trained().items()}
    for p in ours.trained().values():
        p.grad = torch.ones_like(p)
    train_gpt2.optimizer_step(ours, optimizers, 1e-3, 0.0, 0)
    moved = {k: (p - before[k]).abs().max().item() for k, p in ours.trained().items()}
    assert moved["soft"] == pytest.approx(50e-3, rel=1e-3)
    assert all(m == pytest.approx(1e-3, rel=1e-3) for k, m in moved.items() if k != "soft")


def test_a_copied_whole_model_is_read_from_where_it_is(prompted, monkeypatch, tmp_path):
    """An adapter names its model by its path; a whole model is its own, wherever it was copied."""
    shutil.copytree(prompted / "base", tmp_path / "copy")
    shutil.copytree(prompted / "aerial", tmp_path / "aerial")
    path = str(tmp_path / "copy/adapter.safetensors")
    tensors, _ = paligemma_prompt.load_adapter(path)
    for key in tensors:
        if "q_proj.weight" in key:
            tensors[key] = -tensors[key]
    with paligemma_prompt.safetensors.safe_open(path, "pt") as f:
        metadata = f.metadata()
    paligemma_prompt.safetensors.torch.save_file(tensors, path, metadata)
    results = []
    for words in ("init_from=copy", "paligemma=copy"):  # the folder, as either
        out_dir = f"eval{len(results)}"
        inside(f"{words} data=aerial eval_only=True device=cpu batch_size=8 out_dir={out_dir}",
               tmp_path, monkeypatch)
        results.append(json.load(open(tmp_path / out_dir / "results.json"))["perplexity"])
    before = json.load(open(prompted / "base/results.json"))["perplexity"]
    assert results[0] == results[1] and abs(results[0] - before) > 1e-3


def test_a_resumed_prompt_keeps_its_beams_and_its_precision(prompted, monkeypatch):
    words = "paligemma=base/adapter.safetensors data=aerial prompt=soft batch_size=8 device=cpu"
    inside(f"{words} out_dir=narrow max_steps=1 beam=2 dtype=bfloat16", prompted, monkeypatch)
    inside("out_dir=narrow init_from=resume max_steps=2 device=cpu", prompted, monkeypatch)
    settings = json.load(open(prompted / "narrow/results.json"))["settings"]
    assert settings["beam"] == 2 and settings["dtype"] == "bfloat16"


def test_a_soft_prompt_beside_a_projector_learns_at_its_own_rate():
    config = dict(optimizer=None, learning_rate=None, prompt="soft", trainable="none", stack=True)
    _, rate, scale = paligemma_prompt.choose_rates(config, "stack", is_small=False)
    assert rate * scale == pytest.approx(paligemma_prompt.RATES["soft"][0])
    config["stack"] = False
    assert paligemma_prompt.choose_rates(config, "soft", is_small=False)[1:] == (1e-2, 1.0)


def test_the_demo_does_not_build_on_the_model_of_a_shorter_trial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paligemma_prompt, "draw_shapes", lambda *args: None)
    os.makedirs("out/prompt_small")
    fineweb.save_json("out/prompt_small/results.json", dict(step=20))
    paligemma_prompt.prepare_demo(1337, 4)
    paligemma_prompt.prepare_demo(1337, 2)  # a longer one is welcome
    with pytest.raises(SystemExit):
        paligemma_prompt.prepare_demo(1337, 100)
    assert "delete it" in capsys.readouterr().err


def test_a_model_that_was_trained_whole_with_a_soft_prompt_loads_again(prompted, monkeypatch):
    command = "batch_size=8 max_steps=2 eval_interval=2 device=cpu"
    inside(
        "paligemma=base/adapter.safetensors data=aerial trainable=all prompt=soft"
        f" out_dir=all_of_it {command}",
        prompted,
        monkeypatch,
    )
    rows = (prompted / "all_of_it/log.csv").read_text()
    inside(
        "init_from=all_of_it eval_only=True data=aerial device=cpu batch_size=8",
        prompted,
        monkeypatch,
    )
    assert (
        prompted / "all_of_it/log.csv"
    ).read_text() == rows  # an evaluation leaves the run as it was
    ours, again = (
        json.loads((prompted / folder / "results.json").read_text())
        for folder in ("all_of_it", "all_of_it/eval")
    )
    assert ours["perplexity"] == pytest.approx(again["perplexity"], rel=1e-6)


def test_two_folders_are_each_shown_whole():
    captions = TokenizedCaptions(
        [["a"]] * 30, fineweb.get_tokenizer(fineweb.learn_bpe(TEXT, 300)), 5
    )
    shown = [set(), set()]
    for step in range(2 * 6):  # an epoch of two folders of 30 pictures, 5 a step
        shown[step % 2] |= set(training_batch(step // 2, 5, captions, 1)[0].tolist())
    assert shown == [set(range(30))] * 2


@pytest.mark.parametrize(
    "change, hints",
    [
        (
            lambda s: s.pop("language_model.model.layers.1.mlp.up_proj.weight"),
            ["language_model.layers.1.mlp.up_proj.weight is missing"],
        ),
        (
            lambda s: s.update({"vision_tower.nose.weight": torch.zeros(3)}),
            ["vision_tower.nose.weight is unknown"],
        ),
        (
            lambda s: s.update({"multi_modal_projector.linear.weight": torch.zeros(48, 41)}),
            ["multi_modal_projector.linear.weight is (48, 41) instead of (48, 40)"],
        ),
        (lambda s: s.clear(), ["is missing", "not all of a PaliGemma"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(reference, change, hints, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    state = {
        k.replace("vision_tower.vision_model.", "vision_tower."): w
        for k, w in load_file(os.path.join(reference[1], "model.safetensors")).items()
    }
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(os.path.join(reference[1], "config.json"), tmp_path)
    with pytest.raises(SystemExit):
        PaliGemma.from_pretrained(str(tmp_path))
    said = capsys.readouterr().err
    assert all(hint in said for hint in hints), said


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint at all"])
@pytest.mark.parametrize("name", ["model.npz", "model.safetensors"])
def test_broken_checkpoints_end_with_one_line(name, content, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        PaliGemma.from_pretrained(str(tmp_path / name))
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_an_array_of_too_few_dimensions_ends_with_one_line(tmp_path, capsys):
    np.savez(tmp_path / "model.npz", **{"params/img/head/kernel": np.zeros(3, np.float32)})
    with pytest.raises(SystemExit):
        PaliGemma.from_pretrained(str(tmp_path / "model.npz"))
    assert "not a whole checkpoint" in capsys.readouterr().err


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs Linux's account of a process"
)
def test_loading_holds_one_tensor_at_a_time(tmp_path):
    """
    Both formats, in bfloat16: the process grows by less than the file and its largest tensor, which
    is in memory twice while it is converted.
    """
    from safetensors.torch import save_file

    c = SimpleNamespace(
        **paligemma_prompt.FULL
        | dict(
            v_layer=1,
            v_embd=96,
            v_mlp=96,
            v_head=4,
            n_layer=8,
            n_embd=512,
            n_head=4,
            head_dim=128,
            n_mlp=4096,
            vocab_size=8000,
        )
    )
    with torch.device("meta"):
        model = PaliGemma(c)
    for key, p in list(model.named_parameters()):
        paligemma_prompt.put(model, key, torch.zeros(p.shape))
    np.savez(
        tmp_path / "model.npz",
        **{
            k: torch.from_numpy(w).bfloat16().view(torch.int16).numpy().view("V2")
            for k, w in to_big_vision(model).items()
        },
    )
    save_file(
        {k: p.detach().bfloat16() for k, p in model.named_parameters()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(
        json.dumps(dict(text_config=dict(head_dim=128), vision_config=dict(num_attention_heads=4)))
    )
    program = (
        "import re, sys, torch; from paligemma_prompt import PaliGemma, SMALL, SimpleNamespace;"
        " peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) /"
        " 1024; "
        "torch.set_default_device('meta'); PaliGemma(SimpleNamespace(**SMALL));"
        # the first use of the meta device imports 70 MB of torch
        " torch.set_default_device('cpu'); before = peak(); "
        "PaliGemma.from_pretrained(sys.argv[1], dtype=torch.bfloat16); print(peak() - before)"
    )
    for name in ("model.npz", "model.safetensors"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)],
            cwd=REPO,
            capture_output=True,
            text=True,
            check=True,
        )
        size = os.path.getsize(tmp_path / name) / 2**20
        assert 0.8 * size < float(done.stdout) < 1.5 * size, (name, size, done.stdout)


def test_models_come_from_the_hub(reference, tmp_path, monkeypatch, capsys):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            repo, _, file = self.path.lstrip("/").partition("/resolve/bf16/")
            if repo == "google/closed":
                return self.send_error(403)
            files = ["config.json", "model.safetensors", "README.md"]
            body = (
                open(os.path.join(reference[1], file), "rb").read()
                if file
                else json.dumps([dict(path=name) for name in files]).encode()
            )
            self.send_response(200)
            self.send_header("Content-Length", len(body))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.chdir(tmp_path)
    try:
        assert PaliGemma.from_pretrained("google/tiny@bf16").config.n_embd == 48
        assert sorted(os.listdir("pretrained/google_tiny@bf16")) == [
            "config.json",
            "files.json",
            "model.safetensors",
        ]
        (tmp_path / "pretrained/google_closed@bf16").mkdir()
        (tmp_path / "pretrained/google_closed@bf16/files.json").write_text(
            '[{"path": "config.json"}]'
        )
        with pytest.raises(SystemExit):
            PaliGemma.from_pretrained("google/closed@bf16")
    finally:
        server.shutdown()
    said = capsys.readouterr()
    assert "403" in said.err and "HF_TOKEN" in said.err and "licence" in said.out


def test_lora_starts_as_the_model_is_and_only_what_is_asked_for_is_trained(reference):
    model, folder, pixels, ids, mask, kind, targets = reference
    idx, plain = as_we_want_it(targets), PromptedPaliGemma(
        PaliGemma.from_pretrained(folder), 2, HARD
    )
    before = plain(idx, pixels, targets)
    for way, ending in (
        (dict(trainable="lora", lora_rank=2), ("lora_a", "lora_b")),
        (
            dict(trainable="attention"),
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
        ),
        (dict(prompt="soft"), ("soft",)),
        (
            dict(stack=True),
            ("multi_modal_projector.linear.weight", "multi_modal_projector.linear.bias"),
        ),
    ):
        asked = PromptedPaliGemma(
            PaliGemma.from_pretrained(folder, dtype=torch.bfloat16), 2, HARD, **way
        )
        loss = asked(idx, pixels, targets)
        loss.backward()
        assert all(
            name.endswith(ending) and p.grad is not None and p.dtype == torch.float32
            for name, p in asked.trained().items()
        )
        assert not [
            name
            for name, p in asked.named_parameters()
            if name not in asked.trained() and (p.grad is not None or p.dtype != torch.bfloat16)
        ]
    asked = PromptedPaliGemma(
        PaliGemma.from_pretrained(folder), 2, HARD, trainable="lora", lora_rank=2
    )
    assert torch.equal(asked(idx, pixels, targets), before) and len(asked.trained()) == 3 * 7 * 2


def test_recomputed_layers_give_the_same_gradients(reference):
    _, folder, pixels, _, _, _, targets = reference
    grads = []
    for recompute in (False, True):
        asked = PromptedPaliGemma(PaliGemma.from_pretrained(folder), 2, HARD, **WAY)
        asked.model.language_model.recompute = recompute
        asked(as_we_want_it(targets), pixels, targets).backward()
        grads.append(asked.soft.grad)
    assert torch.equal(*grads)


def test_cached_generation_equals_the_plain_path(reference):
    asked, pixels = (
        PromptedPaliGemma(
            PaliGemma.from_pretrained(reference[1]),
            2,
            HARD,
            prefix_order="bos,prompt,image",
            soft_position="before_suffix",
            **WAY,
        ),
        reference[2],
    )
    language, idx = asked.model.language_model, torch.zeros(2, 0, dtype=torch.long)
    with torch.no_grad():
        prefix = asked.prefix(pixels)
        for _ in range(8):
            x = language(torch.cat([prefix, language.embed(idx)], 1), prefix.shape[1])
            idx = torch.cat([idx, language.head(x[:, -1:]).argmax(-1)], 1)
    assert torch.equal(asked.generate(pixels, -1, 8), idx)


def test_pieces_of_the_prefix_come_in_the_order_asked_for(reference):
    model, pixels = PaliGemma.from_pretrained(reference[1]), reference[2]
    image, bos, hard = (
        model.encode_image(pixels)[0],
        model.language_model.embed(torch.tensor([2])),
        model.language_model.embed(torch.tensor(HARD)),
    )
    asked = PromptedPaliGemma(
        model, 2, HARD, prefix_order="bos,prompt,image", soft_position="after_bos", **WAY
    )
    torch.testing.assert_close(asked.prefix(pixels)[0], torch.cat([bos, asked.soft, hard, image]))


def test_a_stack_is_built_from_its_parts_with_image_tokens_of_the_size_of_words(
    reference, tmp_path
):
    from safetensors.torch import load_file, save_file

    state = load_file(os.path.join(reference[1], "model.safetensors"))
    said = json.load(open(os.path.join(reference[1], "config.json")))
    parts = dict(
        gemma=(
            {
                k.replace("language_model.", ""): w
                for k, w in state.items()
                if k.startswith("language_model.")
            },
            said["text_config"],
        ),
        siglip=(
            {
                k.replace("vision_tower.", ""): w
                for k, w in state.items()
                if k.startswith("vision_tower.")
            }
            | {
                "text_model.embeddings.weight": torch.zeros(2),
                "logit_scale": torch.zeros(1),
                "vision_model.head.probe": torch.zeros(2),
            },
            dict(vision_config=said["vision_config"]),
        ),
    )
    for name, (tensors, config) in parts.items():
        (tmp_path / name).mkdir()
        save_file(
            {
                (
                    "vision_model." + k
                    if name == "siglip" and k.startswith(("emb", "enc", "post"))
                    else k
                ): w
                for k, w in tensors.items()
            },
            tmp_path / name / "model.safetensors",
        )
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    whole, built = PaliGemma.from_pretrained(reference[1]), PaliGemma.from_pretrained(
        str(tmp_path / "gemma"), siglip=str(tmp_path / "siglip")
    )
    assert built.config == whole.config
    for (key, a), b in zip(whole.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(a, b) != ("projector" in key), key
    image, words = (
        built.encode_image(reference[2]).square().mean().sqrt(),
        built.language_model.embed(torch.arange(90)).square().mean().sqrt(),
    )
    assert 0.7 < image / words < 1.4


def test_live_bytes_are_counted_and_forgotten():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a * 2 + 1  # a, a * 2 and the sum at once
        a.add_(1)
        assert live.live == 8000 and live.peak == 12000
        del a
        assert live.live == 4000
    assert b.sum() == 1000


@pytest.mark.parametrize("way, limit", [("soft prompt", 7.3), ("attention, SGD", 9.1)])
def test_a_step_of_the_full_size_fits(way, limit):
    c = SimpleNamespace(**paligemma_prompt.FULL)
    with torch.device("meta"):
        assert sum(p.numel() for p in PaliGemma(c).parameters()) == 2_923_335_408
    assert 5.8 < prompt_costs(8, **PROMPT_METHODS[way])[0] < limit


def test_weights_that_do_not_fit_are_said_before_they_are_loaded(capsys):
    shapes = dict(table=(257_152, 2048))
    paligemma_prompt.check_memory(shapes, "cpu", torch.float32)  # 2.1 GB
    shapes["more"] = (10**6, 10**6)
    with pytest.raises(SystemExit):
        paligemma_prompt.check_memory(shapes, "cpu", torch.float32)
    assert "the weights take 4002.1 GB" in capsys.readouterr().err


def inside(command, cwd, monkeypatch):
    """Runs the script in this process: imports cost more than what it does."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["paligemma_prompt.py", *shlex.split(command)])
    with suppress(SystemExit) if "image=" in command else nullcontext():
        runpy.run_path(os.path.join(REPO, "paligemma_prompt.py"), run_name="__main__")


@pytest.fixture(scope="session")
def prompted(tmp_path_factory):
    """A drawn world, and a small PaliGemma that looked at it for three steps."""
    cwd, patch = tmp_path_factory.mktemp("prompted"), pytest.MonkeyPatch()
    coco.draw_shapes(str(cwd / "aerial"), 60, 0, 1, paligemma_prompt.drawn_world(1, 1))
    inside(
        "paligemma=small data=aerial out_dir=base trainable=all optimizer=muon batch_size=8"
        " max_steps=3 prompt_text='caption en,en' device=cpu",
        cwd,
        patch,
    )
    inside(
        "paligemma=base/adapter.safetensors data=aerial prompt=soft out_dir=soft batch_size=8"
        " max_steps=4 eval_interval=2 device=cpu",
        cwd,
        patch,
    )
    patch.undo()
    return cwd


def test_a_drawn_world_speaks_of_what_it_shows(prompted):
    images, captions = coco.load_captions(str(prompted / "aerial"), "train2017")
    assert all(len(image["scene"]["objects"]) == 1 for image in images)
    words = set(" ".join(caption for said in captions for caption in said).split())
    assert words & {"tank", "building", "tent", "fountain", "airplane"} and not words & set(
        coco.SHAPES
    )


def test_a_soft_prompt_is_small_and_knows_where_it_belongs(prompted, monkeypatch):
    tensors, about = paligemma_prompt.load_adapter(str(prompted / "soft/adapter.safetensors"))
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "soft": (10, 128)
    } and os.path.getsize(prompted / "soft/adapter.safetensors") < 10 * 128 * 4 + 1500
    results = json.load(open(prompted / "soft/results.json"))
    assert results["perplexity"] > 1 and {
        "CIDEr",
        "Bleu_1",
        "Bleu_4",
        "ROUGE_L",
        "peak_GB",
        "seconds_per_step",
        "perplexity_wrong_picture",
    } <= set(results)
    assert results["trained"] == 1280 and len(log_column(prompted / "soft/log.csv", "loss")) == 4
    inside(
        "init_from=soft/adapter.safetensors data=aerial eval_only=True out_dir=again device=cpu",
        prompted,
        monkeypatch,
    )
    again = json.load(open(prompted / "again/results.json"))
    assert (
        again["perplexity"] == pytest.approx(results["perplexity"], rel=1e-6)
        and again["CIDEr"] == results["CIDEr"]
    )
    inside(
        "init_from=soft/adapter.safetensors"
        " image=aerial/val2017/000001.jpg,aerial/val2017/000002.jpg out_dir=again device=cpu",
        prompted,
        monkeypatch,
    )
    inside(
        "init_from=base/adapter.safetensors image=aerial/val2017/000001.jpg out_dir=whole_model"
        " device=cpu",
        prompted,
        monkeypatch,
    )  # trained whole: a model
    for name in (
        "soft/captions.png",
        "soft/curves.png",
        "again/image.png",
        "whole_model/image.png",
    ):
        assert Image.open(prompted / name).size[0] > 200


def test_a_stack_trains_its_projector_and_is_loaded_again(prompted, monkeypatch):
    parts = "stack=True siglip=base/adapter.safetensors gemma=base/adapter.safetensors"
    inside(
        f"{parts} data=aerial trainable=lora prefix_order=bos,prompt,image out_dir=stack"
        " batch_size=8 max_steps=2 device=cpu",
        prompted,
        monkeypatch,
    )
    tensors, about = paligemma_prompt.load_adapter(str(prompted / "stack/adapter.safetensors"))
    assert (
        len(tensors) == 4 * 7 * 2 + 2
        and about["prefix_order"] == "bos,prompt,image"
        and about["siglip"] == str(prompted / "base/adapter.safetensors")
    )
    inside(
        "init_from=stack/adapter.safetensors data=aerial eval_only=True out_dir=stack_again"
        " device=cpu",
        prompted,
        monkeypatch,
    )
    was, again = (
        json.load(open(prompted / f"{name}/results.json"))["perplexity"]
        for name in ("stack", "stack_again")
    )
    assert again == pytest.approx(was, rel=1e-6)


def test_adapting_resumes_exactly(prompted, monkeypatch):
    run_ = (
        "paligemma=base/adapter.safetensors data=aerial prompt=soft batch_size=8 eval_interval=2"
        " device=cpu min_lr=0.01 "
    )
    inside(run_ + "out_dir=whole max_steps=4", prompted, monkeypatch)
    inside(run_ + "out_dir=half max_steps=2", prompted, monkeypatch)
    inside(run_ + "out_dir=half max_steps=4 init_from=resume", prompted, monkeypatch)
    assert log_column(prompted / "half/log.csv", "loss") == log_column(
        prompted / "whole/log.csv", "loss"
    )


def test_ways_are_compared_in_one_table(prompted, monkeypatch, capsys):
    monkeypatch.setattr(
        train_caption,
        "run_script",
        lambda script, *words: inside(shlex.join(words), prompted, monkeypatch),
    )
    command = ("paligemma=base/adapter.safetensors data=aerial compare=True out_dir=all "
               "batch_size=8 device=cpu max_steps=")
    with suppress(SystemExit):
        inside(command + "1", prompted, monkeypatch)
    rows, said = json.load(open(prompted / "all/results.json")), capsys.readouterr().out
    assert [row["way"] for row in rows] == list(paligemma_prompt.METHODS) and [
        row["step"] for row in rows
    ] == [0, 1, 1, 1, 1, 1, 1]
    assert all(f"{row['way']:<20} | {row['trained']:>9,}" in said for row in rows)
    assert Image.open(prompted / "all/comparison.png").size[0] > 800 and os.path.exists(
        prompted / "all/curves.png"
    )
    # the same command again keeps what is finished; with another setting it refuses
    with suppress(SystemExit):
        inside(command + "1", prompted, monkeypatch)
    again = capsys.readouterr().out
    assert again.count("is finished already") == len(rows)
    assert paligemma_prompt.results_table(rows) in again
    with pytest.raises(SystemExit):
        inside(command + "2", prompted, monkeypatch)
    assert "other settings (max_steps)" in capsys.readouterr().err
    # resumed before its first method, which has no checkpoint, was finished
    os.remove(prompted / "all/hard_zero_shot/results.json")
    with suppress(SystemExit):
        inside(command + "1 init_from=resume", prompted, monkeypatch)
    assert capsys.readouterr().out.count("is finished already") == len(rows) - 1


@pytest.mark.parametrize(
    "command, hint",
    [
        ("soft_position=on_top", "before_image, after_image, after_bos, before_suffix"),
        ("paligemma=base/adapter.safetensors data=aerial prompt=soft n_soft=0", "must be >= 1"),
        ("paligemma=base/adapter.safetensors data=aerial prefix_order=image,bos", "each once"),
        (
            "paligemma=base/adapter.safetensors data=aerial tokenizer=toy.model",
            "don't belong together",
        ),
        (
            "paligemma=base/adapter.safetensors data=aerial tokenizer=newline.model",
            "must be one token",
        ),
        (
            "paligemma=base/adapter.safetensors data=aerial tokenizer=nothing.model",
            "nothing.model is not a SentencePiece model",
        ),
        ("paligemma=base/adapter.safetensors data=silent prompt=soft", "a caption of image 1 is"),
        (
            "paligemma=base/adapter.safetensors data=aerial init_from=wide.safetensors",
            "soft is (10, 64) instead of (10, 128)",
        ),
        (
            "paligemma=base/adapter.safetensors data=aerial init_from=base/ckpt.pt.safetensors",
            "or its folder",
        ),
        (
            "paligemma=base/adapter.safetensors data=aerial init_from=resum",
            "scratch, resume, or an adapter",
        ),
        ("paligemma=base/adapter.safetensors data=aerial words=en", "now called prompt_text="),
        ("paligemma=base/adapter.safetensors data=aerial prompt_text=<image>en", "the words only"),
        ("paligemma=base/adapter.safetensors data=aerial out_dir=soft", "holds a run"),
        ("paligemma=base/adapter.safetensors data=aerial out_dir=adapter_only", "holds a run"),
        ("paligemma=small trainable=all data=tiny", "give no vocabulary of 480 tokens"),
        ("paligemma=base/adapter.safetensors data=aerial grad_clip=-1", "must be >= 0"),
        (
            "paligemma=base/adapter.safetensors data=flat prompt=soft",
            "000001.jpg is not a readable picture",
        ),
        ("paligemma=nowhere data=aerial", "no such file or folder"),
        ("stack=True data=aerial", "siglip= and gemma="),
        (
            "stack=True siglip=base/adapter.safetensors gemma=base/adapter.safetensors",
            "data= is missing",
        ),
        ("paligemma=base/adapter.safetensors", "data= is missing"),
    ],
)
def test_bad_input_to_paligemma_ends_with_one_line(prompted, command, hint, monkeypatch, capsys):
    from safetensors.torch import save_file

    if not (prompted / "flat").exists():
        for file, extra in (
            (
                "toy",
                dict(
                    user_defined_symbols=["\n"],
                    add_dummy_prefix=False,
                    remove_extra_whitespaces=False,
                    normalization_rule_name="identity",
                ),
            ),
            ("newline", {}),
        ):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXT * 5),
                model_prefix=str(prompted / file),
                vocab_size=300 if file == "toy" else 480,
                model_type="bpe",
                hard_vocab_limit=False,
                byte_fallback=True,
                minloglevel=2,
                **extra,
            )
        for folder in ("silent", "flat"):
            shutil.copytree(prompted / "aerial", prompted / folder)
        coco.draw_shapes(str(prompted / "tiny"), 2, 0)
        (prompted / "adapter_only").mkdir()
        shutil.copy(prompted / "soft/adapter.safetensors", prompted / "adapter_only")
        path = prompted / "silent/annotations/captions_train2017.json"
        path.write_text(path.read_text().replace('"caption": "', '"caption": " ", "was": "', 1))
        (prompted / "flat/val2017/000001.jpg").write_bytes(
            b"P6 0 0 255\n"
        )  # a picture of no pixels
        _, about = paligemma_prompt.load_adapter(str(prompted / "soft/adapter.safetensors"))
        save_file(
            {"soft": torch.zeros(10, 64)},
            prompted / "wide.safetensors",
            dict(settings=json.dumps(about)),
        )
    with pytest.raises(SystemExit) as stop:
        inside(command + " device=cpu max_steps=1", prompted, monkeypatch)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and hint in errors[0], said


# --------------------------------------------------------------------------------------------------
# Benchmarks: `python test_all.py bench=gpt2`. Each runs beside a baseline in the same process, in
# turns, and prints medians: what else the machine does slows both.


def median_seconds(*functions, rounds=5):
    """The median seconds of each function. A first round, which fills caches, does not count."""
    def seconds(function):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    rows = [[seconds(function) for function in functions] for _ in range(rounds + 1)]
    return np.median(rows[1:], axis=0).tolist()


def on_fake_cuda(make):
    """make() -> its model, with fake parameters on a CUDA device that need not be there."""
    with torch.device("meta"):
        model = make()
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        paligemma_prompt.put(model, name, torch.empty(p.shape, device="cuda"))
    return model


def test_no_operator_mixes_devices():
    """
    Fake tensors check the device of every operand. Only forward passes: without CUDA, torch ends
    the process in the backward pass of fake CUDA tensors.
    """
    def small():
        return GPT(GPTConfig(block_size=32, vocab_size=101, n_layer=2, n_head=2, n_embd=32))

    with FakeTensorMode(), torch.no_grad():
        idx = torch.zeros(2, 8, dtype=torch.long, device="cuda")
        try:
            torch.empty(9, 4, device="cuda")[idx, :3]
        except RuntimeError as problem:
            pytest.skip(f"this torch has no fake CUDA tensors ({str(problem)[:60]})")
        gpt = on_fake_cuda(small)
        assert gpt(idx).device.type == gpt(idx, idx).device.type == "cuda"
        assert gpt.generate(idx, 4, temperature=1.0, top_k=5).shape == (2, 12)
        for fusion in ("xattn", "linear", "qformer"):
            model = on_fake_cuda(lambda: Captioner(small(), fusion, 1, width=16))
            image = model.encode_image(torch.zeros(2, 5, 16, device="cuda"))
            kv_cache = train_gpt2.KVCache(model.gpt.config, 2, 60, idx.float())
            for length in (3, 1):
                x = model.hidden(idx[:, :length], image, kv_cache)
                assert model.gpt.head(x).device.type == "cuda"
        for method in (dict(prompt="soft"), dict(trainable="lora"), dict(trainable="attention")):
            model = on_fake_cuda(lambda: PaliGemma(SimpleNamespace(**paligemma_prompt.SMALL)))
            model = PromptedPaliGemma(model, 2, [3, 4, 5], **method)
            pixels = torch.zeros(2, 3, 64, 64, device="cuda")
            assert model(idx, pixels, idx).device.type == "cuda"


def test_median_seconds_takes_turns():
    ran = []
    medians = median_seconds(lambda: ran.append("a"), lambda: ran.append("b"), rounds=2)
    assert "".join(ran) == "ababab" and len(medians) == 2


def peak_memory(function):
    """Bytes at the peak of a second call (in the first, the optimizer's averages are made)."""
    function()
    if not torch.cuda.is_available():
        function()
        return train_gpt2.peak_rss()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated()


def bench_gpt2(process):
    """
    A training step of GPT-2 beside the same step of transformers' GPT2LMHeadModel. Where training
    is compiled, also with the loss left uncompiled.
    """
    coco.mend_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    B, T, cuda = batch_size, block_size, "cuda" in process.device
    rows = torch.randint(50257, (B, T + 1), device=process.device)
    attention = train_gpt2.attention_backends(process.device)

    def train_step_of(model, loss_of):
        optimizers = train_gpt2.make_optimizers(model, "adamw", 1e-5, 0.1)

        def step():
            with process.autocast():
                loss = loss_of(rows[:, :-1], rows[:, 1:])
            loss.backward()
            return train_gpt2.optimizer_step(model, optimizers, 1e-5, 1.0, 0)

        return step

    def loss_here(compiled_loss):
        def loss_of(x, y):
            ours.compiled_loss = compiled_loss
            with sdpa_kernel(attention, set_priority=True):
                return ours(x, y)

        return loss_of

    compiled = train_gpt2.should_compile(None, process)
    ours = GPT(GPTConfig(block_size=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    ours = ours.to(process.device)
    steps = {"here": train_step_of(ours, ours)}
    if compiled:
        train_gpt2.compile_for_training(ours)
        steps = {"here": train_step_of(ours, loss_here(ours.compiled_loss)),
                 "here, loss not compiled": train_step_of(ours, loss_here(None))}
    memory = {name: peak_memory(step) for name, step in steps.items() if cuda}
    before = torch.cuda.memory_allocated() if cuda else 0
    theirs = GPT2LMHeadModel(GPT2Config(
        n_positions=T, n_embd=n_embd, n_layer=n_layer, n_head=n_head, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)).to(process.device)
    run_theirs = torch.compile(theirs) if compiled else theirs
    steps["transformers"] = train_step_of(theirs, lambda x, y: run_theirs(x, labels=x).loss)
    if cuda:
        memory["transformers"] = peak_memory(steps["transformers"]) - before
    seconds = median_seconds(*steps.values())
    for name, each in zip(steps, seconds):
        speed = B * T / each
        gigabytes = f"{memory[name] / 1e9:.2f} GB | " if cuda else ""
        print(f"{name:23} {speed:12,.0f} tokens/s | MFU {train_gpt2.mfu(ours, T, speed):.1%} | "
              f"{gigabytes}here is {each / seconds[0]:.2f} times as fast")


def bench_generate(process):
    """Generation with a KV cache beside computing every token anew, in two ways."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    model = model.to(process.device).eval()
    start = torch.randint(50257, (1, 8), device=process.device)
    n_new = block_size - 8

    @torch.no_grad()
    def recompute(logits_of):
        idx = start
        for _ in range(n_new):
            idx = torch.cat([idx, logits_of(idx)[:, -1:].argmax(-1)], 1)
        return idx.tolist()

    def last_logits(idx):
        return model.head(model.hidden(idx)[:, -1:])

    with process.autocast():
        cached, all_positions, last_position = median_seconds(
            lambda: model.generate(start, n_new, temperature=0).tolist(),
            lambda: recompute(model), lambda: recompute(last_logits), rounds=3)
    print(f"{n_new} tokens: {cached:.3f} s | {all_positions / cached:.1f} times as fast as "
          f"recomputing all logits, {last_position / cached:.1f} as the last position's only")


def bench_hellaswag(process):
    """64 HellaSwag questions in batches beside one question at a time."""
    model = GPT(GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    model = model.to(process.device).eval()
    rng = np.random.default_rng(0)

    def made(length):
        return rng.integers(50257, size=min(length, block_size // 2)).tolist()

    # of HellaSwag's 10,042 questions, about 80 share each length of context; here 32 do
    questions = [(made(40 + 30 * (n % 2)), [made(rng.integers(8, 36)) for _ in range(4)], 0)
                 for n in range(64)]
    with process.autocast():
        fast, slow = median_seconds(
            lambda: hellaswag.predict(model, questions, model.prefill, process.device),
            lambda: hellaswag.predict(model, questions, None, process.device, tokens_at_once=1),
            rounds=3)
    print(f"64 questions: {fast:.3f} s | {slow / fast:.1f} times as fast as one at a time")


def tokenize_as_build_nanogpt(document):
    """What each process of build-nanogpt's pool does with a document."""
    tokens = [fineweb.get_tokenizer().eot_token]
    tokens.extend(fineweb.get_tokenizer().encode_ordinary(document))
    tokens = np.array(tokens)
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def bench_tokenize(process):
    """fineweb.py's tokens a second beside a pool of processes, on 20 MB of the text in text=."""
    documents = list(itertools.islice(fineweb.read_documents(fineweb.text_files(text)), 10_000))
    documents *= math.ceil(20_000_000 / sum(map(len, documents)))
    encoding = fineweb.get_tokenizer()
    with multiprocessing.Pool() as pool:
        ours, theirs = median_seconds(
            lambda: list(fineweb.tokenize(documents, encoding)),
            lambda: list(pool.imap(tokenize_as_build_nanogpt, documents, 16)),
        )
    millions = sum(map(len, fineweb.tokenize(documents, encoding))) / 1e6
    print(
        f"{millions / ours:.2f}M tokens/s with {os.cpu_count()} threads, {millions / theirs:.2f}M "
        f"with as many processes: {theirs / ours:.2f} times as fast"
    )


def measure_metrics(ours):
    """
    Seconds from captions to scores and from tokens to scores (medians), and peak MB, of cider.py or
    of pycocoevalcap, on made captions. It runs alone in a process, for the memory.
    """
    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = np.random.default_rng(0)
    syllables = str.maketrans(dict(zip("0123456789", "ba de fi go hu ka le mi po ru".split())))

    def make():  # a caption for each image, whose words are as frequent as in English (Zipf)
        ranks = np.exp(rng.uniform(0, 8.5, (images, 14))).astype(int).tolist()
        rows = [row[:rng.integers(8, 15)] for row in ranks]
        return [" ".join(map(str, row)).translate(syllables).capitalize() + "." for row in rows]

    candidates, *references = [make() for _ in range(6)]
    candidate_tokens, *reference_tokens = [cider.tokenize(c) for c in (candidates, *references)]
    references, reference_tokens = list(zip(*references)), list(zip(*reference_tokens))

    def score_captions():
        cider.evaluate(candidates, references)

    def score_tokens():
        cider.evaluate(candidate_tokens, reference_tokens, tokenized=True)

    def score_tokens_with_pycocoevalcap():
        for metric in (Bleu(4), Cider(), Rouge()):
            metric.compute_score(gts_tokens, res_tokens)

    def score_captions_with_pycocoevalcap():
        PTBTokenizer().tokenize(gts)
        PTBTokenizer().tokenize(res)
        score_tokens_with_pycocoevalcap()

    ways = score_captions, score_tokens
    if not ours:
        from pycocoevalcap.eval import Bleu, Cider, PTBTokenizer, Rouge
        for stream in 1, 2:  # it prints much
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        gts = {i: [dict(caption=c) for c in row] for i, row in enumerate(references)}
        res = {i: [dict(caption=c)] for i, c in enumerate(candidates)}
        gts_tokens = {i: [" ".join(c) for c in row] for i, row in enumerate(reference_tokens)}
        res_tokens = {i: [" ".join(c)] for i, c in enumerate(candidate_tokens)}
        ways = score_captions_with_pycocoevalcap, score_tokens_with_pycocoevalcap
    seconds = median_seconds(*ways, rounds=5 if ours else 3)
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at_start
    java = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return *seconds, max(here, java) / 1024


def bench_cider(process):
    """cider.py beside pycocoevalcap with its Java, on made captions, five references an image."""
    rows = []
    for ours in True, False:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context, configure_bench) as pool:
            rows.append(pool.submit(measure_metrics, ours).result())
        captions, tokens, memory = rows[-1]
        print(f"{'cider.py' if ours else 'pycocoevalcap'}: {captions:.2f} s from captions, "
              f"{tokens:.2f} s from tokens, {memory:,.0f} MB", flush=True)
    captions, tokens, memory = np.divide(rows[1], rows[0])
    print(f"{images:,} images: {captions:.1f} times as fast, {tokens:.1f} from tokens, "
          f"1/{memory:.1f} of the memory")


def bench_encode(process):
    """Pictures a second from their files beside the encoder alone, on the pictures of data=."""
    encoder = coco.load_encoder("ViT-B-32", "none").to(process.device)
    entries, _ = coco.load_captions(data, "train2017")
    names = [entries[i % len(entries)]["file_name"] for i in range(4 * batch_size)]
    files = [os.path.join(data, "train2017", name) for name in names]
    pixels = [encoder.preprocess(coco.open_image(file)) for file in files[:batch_size]]
    alone, whole = median_seconds(
        lambda: [coco.encode(encoder, pixels, process) for _ in range(4)],
        lambda: list(coco.encode_batches(encoder, files, range(len(files)), batch_size, process)),
    )
    print(
        f"{len(files) / whole:.1f} pictures/s from files, {len(files) / alone:.1f} by the encoder "
        f"alone: {alone / whole:.0%} of its speed"
    )


def bench_caption(process):
    """
    Training and greedy captioning at true size (GPT-2 124M, 50 image tokens x 768, all random)
    beside the obvious way to write them: a .pt file for each picture, fp32, logits of every
    position, and no cache, so that every word computes the words before it anew.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # fp32 is to mean fp32
    B, bos, n_words, device = batch_size, 50256, 16, process.device
    features, folder = torch.randn(B, 50, 768), tempfile.TemporaryDirectory()
    np.save(f"{folder.name}/features.npy", features.half().numpy())
    mapped = np.load(f"{folder.name}/features.npy", mmap_mode="r")
    for i in range(B):
        torch.save(features[i].clone(), f"{folder.name}/{i}.pt")
    lengths = (11.5 + 2.5 * torch.randn(B, 1)).round().clip(8, 30).to(device)  # as COCO's captions
    idx = torch.randint(0, bos, (B, int(lengths.max())), device=device)
    targets = idx.masked_fill(torch.arange(idx.shape[1], device=device) >= lengths, -100)
    plain = Captioner(GPT(GPTConfig()), "xattn", 1, width=768).to(device)
    adamw = [torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-4)]
    ours = Captioner(GPT(GPTConfig()), "xattn", 1, width=768).to_process(process)
    optimizers = train_gpt2.make_optimizers(ours, "adamw", 1e-4, 0.1)

    def load():
        rows = [torch.load(f"{folder.name}/{i}.pt") for i in range(B)]
        return torch.stack(rows).to(device)

    def train_plainly():
        logits = plain.logits(idx, plain.encode_image(load()))
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        train_gpt2.optimizer_step(plain, adamw, 1e-4, 1.0, 0)

    def train():
        with process.autocast():
            batch = train_caption.read_features(mapped, np.arange(B), device)
            loss = ours(idx, batch, targets) / (targets >= 0).sum()
        loss.backward()
        train_gpt2.optimizer_step(ours, optimizers, 1e-4, 1.0, 0)

    @torch.no_grad()
    def caption_plainly():
        loaded, tokens = load(), torch.full((B, 1), bos, device=device)
        for _ in range(n_words):
            logits = plain.logits(tokens, plain.encode_image(loaded))
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        return tokens.tolist()

    def caption():
        with process.autocast():
            batch = train_caption.read_features(mapped, np.arange(B), device)
            return ours.generate(batch, bos, n_words).tolist()

    for name, baseline, here in (("training", train_plainly, train),
                                 ("greedy captioning", caption_plainly, caption)):
        slow, fast = median_seconds(baseline, here, rounds=3)
        print(f"{name:18} {B / slow:8.2f} images/s plainly, {B / fast:8.2f} here: "
              f"{slow / fast:.1f} times as fast", flush=True)


class LiveBytes(TorchDispatchMode):
    """
    Follows the bytes of all tensors that are alive, and their peak. Fake tensors count as if they
    were real.
    """

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


def step_costs(make_step, device):
    """
    make_step() -> a function that does a training step -> the step's peak GB (1e9 bytes) and its
    median seconds. On a GPU they are measured. Elsewhere, memory is computed on fake tensors, which
    have shapes but no content, and seconds are nan. What a CUDA context takes is not in it.
    """
    if "cuda" in device:
        gc.collect()  # what an earlier call left
        with torch.device(device):
            step = make_step()
        gigabytes = peak_memory(step) / 1e9
        return gigabytes, median_seconds(step)[0]
    with FakeTensorMode():
        step = make_step()
        with LiveBytes() as live:
            step()
            step()  # in the second, Adam's averages are there
    return live.peak / 1e9, math.nan


def step_of(model, loss_of, optimizers, device):
    def step():
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def more_logits(rows):
    """GB. On CUDA the loss takes 4,096 rows at a time, not 512: once in bfloat16, twice float32."""
    return (min(rows, 4096) - min(rows, 512)) * 50304 * (2 + 4 + 4) / 1e9


def gpt2_costs(B, device="cpu", T=1024):
    def make_step():
        model, idx = GPT(GPTConfig()), torch.zeros(B, T, dtype=torch.long)
        optimizers = train_gpt2.make_optimizers(model, "adamw", 1e-5, 0.1)
        return step_of(model, lambda model: model(idx, idx), optimizers, device)

    gigabytes, seconds = step_costs(make_step, device)
    if "cuda" not in device:
        gigabytes += more_logits(B * T)
    return gigabytes, seconds


def captioner_costs(B, fusion="xattn", device="cpu", T=16):
    def make_step():
        model = Captioner(GPT(GPTConfig()), fusion, 1, width=768)
        model.to = lambda device: model  # it is there; fake tensors cannot be moved
        model = model.to_process(ALONE._replace(dtype=torch.bfloat16))
        image, idx = torch.randn(B, 50, 768), torch.zeros(B, T, dtype=torch.long)
        optimizers = train_gpt2.make_optimizers(model, "adamw", 1e-5, 0.1)

        def loss_of(model):
            x = model.hidden(idx, model.encode_image(image))
            return model.gpt.cross_entropy(x.flatten(0, 1), idx.flatten())[0]

        return step_of(model, loss_of, optimizers, device)

    gigabytes, seconds = step_costs(make_step, device)
    if "cuda" not in device:
        gigabytes += more_logits(B * T)
    return gigabytes, seconds


def prompt_costs(B, device="cpu", n_suffix=40, **method):
    """The full PaliGemma, whose frozen weights are bfloat16; arguments of PromptedPaliGemma."""
    c = SimpleNamespace(**paligemma_prompt.FULL)

    def make_step():
        model = paligemma_prompt.random_model(c, device, torch.bfloat16)
        prompted = PromptedPaliGemma(model, 2, [3, 4, 5], **method)
        model.language_model.gradient_checkpointing = True
        name = "sgd" if method.get("trainable") == "attention" else "adamw"
        optimizers = paligemma_prompt.make_optimizer(prompted, name)
        idx = torch.zeros(B, n_suffix, dtype=torch.long)
        pixels = torch.zeros(B, 3, c.image_size, c.image_size)

        def step():
            prompted(idx, pixels, idx).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step

    return step_costs(make_step, device)


PROMPT_METHODS = {"soft prompt": dict(prompt="soft"),
                  "attention, SGD": dict(trainable="attention"),
                  "LoRA": dict(trainable="lora"),
                  "stack: LoRA, projector": dict(trainable="lora", stack=True)}


def bench_memory(process):
    """
    What an uncompiled training step takes at full size, for a choice of batch_size=. Needs no GPU;
    on one, memory is measured, not computed, and so is the speed.
    """
    device = process.device
    print(f"Peak GB of a training step, {'measured' if 'cuda' in device else 'computed'}:")

    def show(name, sizes, costs_of):
        for B in sizes:
            try:
                gigabytes, seconds = costs_of(B)
            except torch.OutOfMemoryError:
                print(f"  {name:32} batch_size={B:<4} does not fit", flush=True)
                continue
            speed = f" {B / seconds:9.1f} sequences/s" if seconds > 0 else ""
            print(f"  {name:32} batch_size={B:<4} {gigabytes:6.1f}{speed}", flush=True)

    show("GPT-2 124M, 1,024 tokens", (8, 16, 32, 64, 128), lambda B: gpt2_costs(B, device))
    for fusion in ("xattn", "linear", "qformer"):
        show(f"captioner, {fusion}, every=1", (128, 256, 512),
             lambda B: captioner_costs(B, fusion, device))
    for name, method in PROMPT_METHODS.items():
        show(f"PaliGemma 3B, {name}", (1, 4, 8), lambda B: prompt_costs(B, device, **method))


def test_memory_of_a_step_grows_with_the_batch():
    small, large = captioner_costs(8)[0], captioner_costs(64)[0]
    # weights: 0.1 GB of GPT-2 in bfloat16, 85M trained numbers with gradients and two averages
    assert 0.16 + 16 * 85e6 / 1e9 < small < large < 8 * small


# settings of the benchmarks
bench = "gpt2"  # one of gpt2 | generate | hellaswag | tokenize | cider | encode | caption | memory
n_layer = 12                # >= 1: of GPT-2; 124M parameters
n_head = 12                 # >= 1
n_embd = 768                # >= 1
block_size = 1024           # >= 16: tokens of a sequence
batch_size = 16             # >= 1: sequences or pictures at once
images = 5000               # >= 1: bench=cider: so many made images
text = "text.txt"           # bench=tokenize: a text file
data = "data/coco2017"      # bench=encode: a folder in COCO's layout
device: str = None          # cuda, cpu, mps; None takes the best there is
dtype: str = None           # one of bfloat16 | float32


def configure_bench():
    fineweb.configure(globals())


if __name__ == "__main__":
    configure_bench()
    process = train_gpt2.setup(device, dtype)
    print(f"bench={bench} on {process.device}, {torch.get_num_threads()} CPU threads, "
          f"{process.dtype}", flush=True)
    globals()[f"bench_{bench}"](process)
