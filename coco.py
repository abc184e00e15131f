"""
Pictures with captions, and the frozen eye that looks at them. A data set is a folder laid out as COCO 2017 is:

    annotations/captions_{train2017,val2017}.json    five captions a picture, written by people; test2017 where there is one
    train2017/*.jpg  val2017/*.jpg
    features/{encoder}_{split}.npy                   what the encoder sees: float16 (pictures, tokens, width),
                                                     row i = i-th entry of the json's "images"; beside it, a .json of what made it

    python coco.py                                             # downloads COCO (19 GB), encodes it with CLIP ViT-B/32 (9.5 GB)
    python coco.py data=myphotos                               # encodes any folder laid out like this
    python coco.py data=data/risc risc_csv=risc/captions.csv   # brings RISC's aerial pictures into this layout, and encodes them
    python coco.py data=data/ucm karpathy_json=ucm/dataset_ucm.json              # ... or a data set in Karpathy's format
    python coco.py karpathy_split=dataset_coco.json            # COCO in the splits that papers report on: data/coco2017_karpathy
    python coco.py data=data/shapes shapes=8000 encoder=none   # draws a data set instead: 8,000 small scenes, in seconds
    python coco.py data=data/shapes encoder=tagger             # ... and encodes it with an eye of our own, taught in half a minute
    python coco.py data=myphotos eda=True                      # what is in it: a table and a figure

What was interrupted goes on where it stopped when the same command is run again. One GPU is enough: the cores that decode the pictures
set the pace. COCO_ENDPOINT names a mirror of images.cocodataset.org.

An encoder runs once: it is frozen, so what it sees of a picture never changes. Encoders: any ViT tower of open_clip
(ViT-B-32: 50 tokens x 768), `tagger` (64 x 128, taught here, by the training captions alone, to notice what they speak of)
and `patches` (64 x 194: the raw pixels). Features that another program wrote, such as squeezenet1_1's, are taken as they are.
"""
import csv
import difflib
import filecmp
import glob
import hashlib
import json
import math
import os
import random
import re
import shutil
import stat
import sys
import textwrap
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from fineweb import configure, die, download, save_atomically, print_settings
from train_gpt2 import load_checkpoint, load_weights, pyplot, save_checkpoint, setup
from cider import read_captions, tokenize

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python coco.py name=value` overrides any of them

data = "data/coco2017"      # the data set's folder
shapes = 0                  # >= 0: draw so many training scenes (and a twentieth of that for validation) instead of downloading
risc_csv: str = None               # make the data set from this captions.csv and the folder resized/ beside it
karpathy_json: str = None          # make the data set from this dataset_*.json
pictures: str = None               # karpathy_json=: the folder of its pictures; looked for beside it if not given
karpathy_split: str = None         # Karpathy's dataset_coco.json: regroup COCO 2017 as it says, in a folder of its own beside data
encoder = "ViT-B-32"        # an open_clip model name, tagger, patches; none = make the data set, encode nothing
pretrained = "openai"       # open_clip's tag of the weights, or a local weights file; none = random weights, to try the plumbing
skip_bad = False            # pictures that can't be read: take them out of the json, instead of ending with their names
batch_size = 128            # >= 1: pictures encoded at once
teach_steps = 450           # >= 1: steps that the tagger is taught for
eda = False                 # draw and tabulate the data set instead of encoding it, into out/
seed = 1337                 # >= 0
device: str = None          # cuda, cpu, mps; None takes the best there is
dtype: str = None           # one of bfloat16 | float32: bfloat16 or float32 for the matmuls; None = bfloat16 on CUDA

SPLITS = ("train2017", "val2017")  # every data set has these; some have test2017 too

# ----------------------------------------------------------------------------------------------------------------------
# reading a data set


def captions_file(data, split):
    return os.path.join(data, "annotations", f"captions_{split}.json")


def splits_of(data):
    return [split for split in (*SPLITS, "test2017") if os.path.exists(captions_file(data, split))]


def load_captions(data, split):
    """
    Returns (images, captions): the json's "images" entries, and for each the list of its captions, in the json's order.
    Ends the run with one line if the folder or the file is not what it should be.
    """
    path = captions_file(data, split)
    if not os.path.isdir(data):
        die(f"data={data}: no such folder")
    if not os.path.exists(path):
        die(f"{path} is missing: {data} is not laid out as COCO 2017 is (see coco.py's docstring)")
    try:
        images, captions = read_captions(path)
    except ValueError as problem:
        die(problem)
    if not all("file_name" in image for image in images):
        die(f"{path}: its images have no file_name")
    return images, captions


def warn_overlap(data, split):
    """Says on one line which pictures of `split` are pictures of train2017 too."""
    seen = {}
    for part in ("train2017", split):
        folder = os.path.join(data, part)
        files = {image["file_name"]: image["id"] for image in load_captions(data, part)[0]}
        seen[part] = folder, files
    (train_folder, train), (folder, held_out) = seen.values()
    same = []
    for name in train.keys() & held_out.keys():
        pair = os.path.join(train_folder, name), os.path.join(folder, name)
        if all(map(os.path.isfile, pair)) and filecmp.cmp(*pair, shallow=False):
            same.append(name)
    if same and split != "train2017":
        print(f"CAUTION: {len(same):,} pictures of {split} are in train2017 too, such as {min(same)}: "
              "their scores say nothing about new pictures", flush=True)


def save_json(path, content, indent=None):
    """Writes `content` as json. NaN and infinity, which are not json, end the run with ValueError."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    text = json.dumps(content, indent=indent, allow_nan=False)
    save_atomically(path, lambda f: f.write(text.encode()))


def features_file(data, encoder, split):
    return os.path.join(data, "features", f"{encoder}_{split}.npy")


def read_about(path):
    """The sidecar of a features file: what made it, from what, and how far it is. Nothing if another program wrote the file."""
    about = path.removesuffix(".npy") + ".json"
    return json.load(open(about)) if os.path.exists(about) else {}


def save_about(path, about):
    save_json(path.removesuffix(".npy") + ".json", about)


def identity(images):
    """What ties features to a json: how many pictures, and which, in which order."""
    return dict(images=len(images), names=hashlib.sha256("\n".join(image["file_name"] for image in images).encode()).hexdigest())


def load_features(data, encoder, split, images):
    """
    The features of a split, a memory-mapped (images, S tokens, W width) array, and what is known of
    their encoder. images: the json's; they must be those that were encoded, in the same order.
    """
    path, command = features_file(data, encoder, split), f"`python coco.py data={data} encoder={encoder}`"
    about = read_about(path)
    if not os.path.exists(path):
        if not (about and os.path.exists(path + ".part")):
            die(f"{path} is missing: make it with {command}")
        done = about["done"] - len(about["bad"])
        die(f"{path} is not finished: {done:,} of {about['images']:,} pictures are encoded; {command} goes on")
    try:
        features = np.load(path, mmap_mode="c")  # in memory it may be written to, else torch would warn
    except (ValueError, OSError, EOFError) as problem:
        die(f"{path} is not a whole .npy file ({problem}): delete it and run {command}")
    if features.ndim != 3 or len(features) != len(images):
        die(f"{path} has shape {features.shape}, but the captions of {split} belong to {len(images)} images: encode again, or use its own json")
    if about and about["names"] != identity(images)["names"]:
        die(f"{path} was made from other pictures than {captions_file(data, split)} names, or in another order: delete it and run {command}")
    if not about and os.environ.get("RANK", "0") == "0":
        print(f"{path} is taken as it is: no .json beside it says what made it")
    return features, about


def open_image(path, otherwise=die):
    """An RGB picture, turned upright. If it can't be read, what `otherwise` makes of one line that says so."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as problem:  # there is no end to the errors that broken bytes lead Pillow to
        return otherwise(f"{path} is not a readable picture ({problem})")


def prepare(eye, path):
    """What an encoder takes of a picture, a tensor, or, if it can't be read, one line that says so, a string."""
    picture = open_image(path, otherwise=str)
    return picture if isinstance(picture, str) else eye.prepare(picture)


# ----------------------------------------------------------------------------------------------------------------------
# COCO itself

COCO_ZIPS = dict(annotations="annotations/annotations_trainval2017.zip", train2017="zips/train2017.zip", val2017="zips/val2017.zip")


def need_space(folder, n_bytes, what):
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        die(f"{what} needs {n_bytes / 1e9:,.1f} GB in {folder}, where {free / 1e9:,.1f} GB are free: make room, or take another data=")


def missing_pictures(data, split):
    """The pictures of a split that its json names and its folder has not."""
    folder = os.path.join(data, split)
    have = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return [image["file_name"] for image in load_captions(data, split)[0] if image["file_name"] not in have]


def download_coco(data):
    """
    Fetches and unpacks what is not there yet of COCO 2017: 118,287 training and 5,000 validation pictures. The zip of the annotations comes
    first and is removed last, and with it the sign that there is work left.
    """
    import requests

    lacking = [split for split in SPLITS if split not in splits_of(data) or missing_pictures(data, split)]
    if not lacking:
        return  # whole: the zip files that lie about are somebody's
    endpoint = os.environ.get("COCO_ENDPOINT", "http://images.cocodataset.org").rstrip("/")
    print(f"{data} holds no whole data set: COCO 2017 is downloaded there, from {endpoint}", flush=True)
    os.makedirs(data, exist_ok=True)
    urls = {part: f"{endpoint}/{COCO_ZIPS[part]}" for part in ("annotations", *lacking)}
    try:
        sizes = [int(requests.head(url, timeout=30, allow_redirects=True).headers.get("Content-Length", 0)) for url in urls.values()]
    except requests.RequestException as problem:
        die(f"{endpoint} does not answer ({type(problem).__name__}): try again later, or name a mirror in COCO_ENDPOINT")
    here = [file for pattern in ("*2017.zip*", *(f"{split}/*" for split in lacking)) for file in glob.glob(os.path.join(data, pattern))]
    need_space(data, sum(sizes) + max(sizes) - sum(map(os.path.getsize, here)), "COCO, the largest zip beside what comes out of it,")
    for part, url in urls.items():
        path = download(url, os.path.join(data, os.path.basename(url)))
        unpack(path, data, "annotations/captions_" if part == "annotations" else f"{part}/")
        if part in SPLITS:
            if lost := missing_pictures(data, part):
                die(f"{path} lacks {len(lost):,} of the pictures in {captions_file(data, part)}, such as {lost[0]}: delete it and run this again")
            os.remove(path)
    os.remove(os.path.join(data, os.path.basename(urls["annotations"])))


def unpack(path, data, start):
    """Extracts those members of a zip whose names begin with `start`. What is there already in its full size is left alone."""
    try:
        with zipfile.ZipFile(path) as z:
            for member in z.infolist():  # ../../.bashrc, or a link to such a place, would be written outside the folder
                parts = member.filename.replace("\\", "/").split("/")
                if ".." in parts or not parts[0] or ":" in parts[0] or stat.S_ISLNK(member.external_attr >> 16):
                    die(f"{path} is not COCO's: its member {member.filename!r} would be written outside {data}. Nothing was unpacked; delete it")
            wanted = [member for member in z.infolist() if member.filename.startswith(start) and not member.is_dir()]
            for member in tqdm(wanted, desc=f"unpacking {start}", mininterval=1):
                target = os.path.join(data, member.filename)
                if os.path.exists(target) and os.path.getsize(target) == member.file_size:
                    continue
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with z.open(member) as content:  # reading to the end checks the member's CRC
                    save_atomically(target, lambda f: shutil.copyfileobj(content, f))
    except (zipfile.BadZipFile, zlib.error, EOFError) as problem:
        die(f"{path} is damaged ({problem}): delete it and run the same command again")


# ----------------------------------------------------------------------------------------------------------------------
# other people's data sets, brought into COCO's layout

SPLIT_NAMES = dict(train="train2017", restval="train2017", val="val2017", test="test2017")  # restval: what COCO's val had left over


def read_entries(path, pictures=""):
    """
    (split, id, path of the picture, captions) of all pictures that RISC's captions.csv (split, image, caption_1 ... caption_5) or one of
    Karpathy's dataset_*.json names. They lie in the folder `pictures`, or else beside the file, in a folder of one of the usual names.
    """
    beside, name = os.path.dirname(path), os.path.basename(path).removeprefix("dataset_").removesuffix(".json")
    usual = ("resized",) if path.endswith(".csv") else (f"{name.upper()}_images", f"{name}_images", name, "images", "imgs")
    folder = pictures or next(filter(os.path.isdir, (os.path.join(beside, folder) for folder in usual)), beside)
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            if path.endswith(".csv"):
                return [(row["split"], number, os.path.join(folder, row["image"]), [row[f"caption_{k}"] for k in range(1, 6)])
                        for number, row in enumerate(csv.DictReader(f), 1)]
            return [(image["split"], image.get("cocoid", number), os.path.join(folder, image.get("filepath", ""), image["filename"]),
                     [sentence["raw"] for sentence in image["sentences"]]) for number, image in enumerate(json.load(f)["images"], 1)]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        die(f"{path} is neither RISC's captions.csv nor one of Karpathy's dataset_*.json ({type(problem).__name__}: {problem})")


def convert(entries, data):
    """
    Writes what read_entries returns as a data set in the folder `data`. Pictures are hard links to the originals where the file system can,
    and take no space. Those that are not there or have no caption are left out, counted and said.
    """
    sets, left_out = {}, []
    for split, number, path, captions in tqdm(entries, desc="converting", mininterval=1):
        if split not in SPLIT_NAMES:
            die(f"{path} is of the split {split!r}; known are {', '.join(SPLIT_NAMES)}")
        captions = [caption.strip() for caption in captions if caption and caption.strip()]
        if not captions or not os.path.isfile(path):
            left_out.append(path)
            continue
        images, annotations = sets.setdefault(SPLIT_NAMES[split], ([], []))
        images.append(dict(id=number, file_name=os.path.basename(path)))
        annotations += [dict(id=len(annotations) + k, image_id=number, caption=caption) for k, caption in enumerate(captions, 1)]
        target = os.path.join(data, SPLIT_NAMES[split], os.path.basename(path))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.exists(target):
            try:
                os.link(path, target)
            except OSError:  # another disk, or one that knows no links
                shutil.copyfile(path, target + ".tmp")
                os.replace(target + ".tmp", target)
    if left_out:
        print(f"{len(left_out):,} of {len(entries):,} pictures are not there or have no caption, and are left out, such as {left_out[0]}")
    if "train2017" not in sets:
        die("there is no picture to train on: say where they are with pictures=FOLDER")
    for split, (images, annotations) in sets.items():
        if twice := [name for name, times in Counter(image["file_name"] for image in images).items() if times > 1]:
            die(f"{len(twice):,} names stand for several pictures of {split}, such as {twice[0]}: they can't lie in one folder")
        save_json(captions_file(data, split), dict(images=images, annotations=annotations))


# ----------------------------------------------------------------------------------------------------------------------
# the built-in scenes: one or two objects, each with a size, a colour and a shape, and how they stand to each other

SIZES = dict(small=6.5, large=13.0)  # radius in pixels, of a picture of 64 x 64
COLOURS = dict(red=(214, 40, 40), green=(44, 160, 64), blue=(40, 90, 220), yellow=(245, 200, 30), purple=(140, 60, 180), black=(30, 30, 34))
SHAPES = dict(  # outlines in units of the radius
    circle=[(math.cos(a * math.pi / 20), math.sin(a * math.pi / 20)) for a in range(40)],
    square=[(-.88, -.88), (.88, -.88), (.88, .88), (-.88, .88)],
    triangle=[(0, -1), (.95, .8), (-.95, .8)],
    star=[((1, .42)[k % 2] * math.sin(math.pi * k / 5), -(1, .42)[k % 2] * math.cos(math.pi * k / 5)) for k in range(10)],
    cross=[(.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33), (.33, 1), (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33), (-.33, -1)],
)
PLACES = dict(left=("on the left", "left of", -1, 0), right=("on the right", "right of", 1, 0),
              top=("at the top", "above", 0, -1), bottom=("at the bottom", "below", 0, 1), middle=("in the middle", "", 0, 0))
OPPOSITE = dict(left="right", right="left", top="bottom", bottom="top")
WORDS = dict(small=("small", "little"), large=("large", "big"))  # what people call the sizes
ONE_OBJECT = ("{a} {here}", "there is {a} {here}", "a picture of {a} {here}", "{here} is {a}", "you can see {a} {here}", "just {a} , {here}")
TWO_OBJECTS = ("{a} {left_of} {b}", "there is {a} {left_of} {b}", "a picture of {a} {left_of} {b}", "{here} is {a} and {there} is {b}",
               "{a} {here} and {b} {there}", "you can see {a} and {right_of} it {b}")


def true_captions(scene):
    """
    All that can truly be said of a scene in our language: a list, one for each sentence pattern, of captions.
    scene: {"objects": [[size, colour, shape], ...], "place": where the first object is, in the picture or as seen from the second}.
    """
    names = [[f"a {word} {colour} {shape}" for word in WORDS[size]] for size, colour, shape in scene["objects"]]
    place = scene["place"]
    if len(names) == 1:
        return [[pattern.format(a=a, here=PLACES[place][0]) for a in names[0]] for pattern in ONE_OBJECT]
    views = [(names[0], names[1], place), (names[1], names[0], OPPOSITE[place])]  # either object may come first
    return [[pattern.format(a=a, b=b, here=PLACES[p][0], there=PLACES[OPPOSITE[p]][0], left_of=PLACES[p][1], right_of=PLACES[OPPOSITE[p]][1])
             for first, second, p in views for a in first for b in second] for pattern in TWO_OBJECTS]


def fraction_right(images, captions):
    """The share of captions that are right in every word: size, colour, shape and place of every object. None without scenes."""
    if not images or "scene" not in images[0]:
        return None
    right = [any(said in pattern for pattern in true_captions(image["scene"])) for image, said in zip(images, captions)]
    return sum(right) / len(right)


def random_scene(rng):
    objects = [[rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(list(SHAPES))] for _ in range(rng.choice((1, 2, 2, 2)))]
    if len(objects) == 1:
        return dict(objects=objects, place=rng.choice(list(PLACES)))
    return random_scene(rng) if objects[0] == objects[1] else dict(objects=objects, place=rng.choice(("left", "top")))


def draw_scene(rng, scene):
    """A 64 x 64 picture of the scene; where exactly, how large and which tint is left to chance."""
    radii = [SIZES[size] * rng.uniform(0.9, 1.1) for size, _, _ in scene["objects"]]
    _, _, dx, dy = PLACES[scene["place"]]
    if len(radii) == 1:
        centres = [(32 + dx * 16 + rng.uniform(-3, 3), 32 + dy * 16 + rng.uniform(-3, 3))]
    else:  # along the axis of the relation each keeps to its half of the picture; across it the two nearly line up
        depth = [rng.uniform(r + 1, 31 - r) for r in radii]  # of each centre, from the edge on its side
        along = [d if side < 0 else 64 - d for d, side in zip(depth, (dx + dy, -dx - dy))]
        line, slant = rng.uniform(16, 48), rng.uniform(-5, 5)
        across = [min(max(line + side * slant, r + 1), 63 - r) for side, r in zip((1, -1), radii)]
        centres = [(along[k], across[k]) if dx else (across[k], along[k]) for k in (0, 1)]
    fine = 4  # drawn four times too large and shrunk, for smooth edges
    picture = Image.new("RGB", (64 * fine, 64 * fine), tuple(rng.randint(225, 255) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for (x, y), r, (_, colour, shape) in zip(centres, radii, scene["objects"]):
        fill = tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in COLOURS[colour])
        pen.polygon([((x + r * u) * fine, (y + r * v) * fine) for u, v in SHAPES[shape]], fill=fill)
    return picture.resize((64, 64), Image.BOX)


def draw_shapes(data, n_train, seed, n_objects=None, style=None):
    """
    Writes a data set of scenes in COCO's layout, and train_captions.txt with the training captions alone. `n_objects` keeps only scenes of so many;
    `style(rng, picture, captions)` may return another picture and other captions.
    A tenth of all possible scenes (what is in them and where, in either order) is kept for validation: none of those is ever trained on.
    """
    rng, counts = random.Random(seed), dict(train2017=n_train, val2017=max(1, n_train // 20))
    sets = {split: dict(info=dict(description="shapes: scenes drawn by coco.py"), images=[], annotations=[]) for split in SPLITS}
    for split in SPLITS:
        os.makedirs(os.path.join(data, split), exist_ok=True)
    bar = tqdm(total=sum(counts.values()), desc="drawing scenes", mininterval=1)
    while any(len(sets[split]["images"]) < counts[split] for split in SPLITS):
        scene = random_scene(rng)
        held_out = random.Random(min(true_captions(scene)[0])).random() < 0.1  # one sentence names the scene, whichever object comes first
        split = SPLITS[held_out]
        images, annotations = sets[split]["images"], sets[split]["annotations"]
        if len(images) == counts[split] or n_objects not in (None, len(scene["objects"])):
            continue
        image = dict(id=len(images) + 1 + held_out * 1_000_000, file_name=f"{len(images) + 1:06d}.jpg", width=64, height=64, scene=scene)
        picture = draw_scene(rng, scene)  # of each caption, the first form is the likeliest: people begin with what is left or on top
        captions = [pattern[int(len(pattern) * rng.random() ** 3)] for pattern in rng.sample(true_captions(scene), 5)]
        if style:
            picture, captions = style(rng, picture, captions)
        picture.save(os.path.join(data, split, image["file_name"]), quality=95, subsampling=0)
        for said in captions:
            annotations.append(dict(id=len(annotations) + 1 + held_out * 10_000_000, image_id=image["id"], caption=said))
        images.append(image)
        bar.update()
    bar.close()
    text = "".join(a["caption"] + "\n" for a in sets["train2017"]["annotations"])
    save_atomically(os.path.join(data, "train_captions.txt"), lambda f: f.write(text.encode()))
    for split in SPLITS:  # the annotations come last: where they are, the pictures are whole
        save_json(captions_file(data, split), sets[split])


# ----------------------------------------------------------------------------------------------------------------------
# encoders. B pictures, S tokens of width W each. An encoder has `prepare(picture) -> tensor`, and maps a batch of those to (B, S, W)


class Patches(nn.Module):
    """No encoder at all: a 64 x 64 picture cut into 8 x 8 patches, each its 192 raw values and where it lies."""

    def prepare(self, picture):
        return torch.from_numpy(np.array(picture.resize((64, 64), Image.BICUBIC)))  # (64, 64, 3) bytes

    def forward(self, pixels):
        x = pixels.view(-1, 8, 8, 8, 8, 3).transpose(2, 3).reshape(-1, 64, 192) / 127.5 - 1  # (B, 8 rows, 8, 8 columns, 8, 3) -> (B, S=64, 192)
        grid = torch.linspace(-1, 1, 8, device=x.device)
        where = torch.cartesian_prod(grid, grid).expand(len(x), 64, 2)
        return torch.cat([x, where], 2)  # (B, 64, W=194)


class Tagger(Patches):
    """
    A small convolutional eye that was taught by captions alone: which words do people use about this picture? Each of its 64 tokens votes
    for every word and the strongest vote counts (Fang et al. 2015, https://arxiv.org/abs/1411.4952). Like CLIP, it learns to notice what
    captions speak of, with no other labels. CLIP's own objective, matching pictures to captions, was tried here and took far longer to tell
    shapes apart: among 128 scenes, colours and places already say which caption belongs to which.
    """

    def __init__(self, n_words=0):
        super().__init__()

        def convolution(n_in, n_out, size):  # halves the picture
            return nn.Conv2d(n_in, n_out, size, stride=2, padding=size // 2, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()

        self.eye = nn.Sequential(*convolution(5, 24, 5), *convolution(24, 64, 3), *convolution(64, 128, 3), nn.Conv2d(128, 128, 3, padding=1))
        self.norm = nn.LayerNorm(128)
        if n_words:  # only while it is taught
            self.vote = nn.Linear(128, n_words)
            nn.init.constant_(self.vote.bias, -3.0)  # most words are not about most pictures

    def forward(self, pixels):
        x = pixels.permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, 64, 64)
        grid = torch.linspace(-1, 1, 64, device=x.device)
        where = torch.stack(torch.meshgrid(grid, grid, indexing="xy")).expand(len(x), 2, 64, 64)  # a convolution doesn't know where it is
        return self.norm(self.eye(torch.cat([x, where], 1)).flatten(2).transpose(1, 2))  # (B, 128, 8, 8) -> (B, S=64, W=128)


def teach_tagger(data, steps, seed, B=48, peak=4e-3):
    """Teaches a Tagger on a data set's training pictures and captions, saves its eye in the features folder, returns the losses."""
    images, captions = load_captions(data, "train2017")
    counts = Counter(word for said in captions for caption in said for word in caption.lower().split())
    words = {word: k for k, (word, _) in enumerate(counts.most_common(1000))}
    used = torch.zeros(len(images), len(words))  # the share of a picture's captions that use a word
    for row, said in zip(used, captions):
        for caption in said:
            row[[words[word] for word in set(caption.lower().split()) if word in words]] += 1 / len(said)
    torch.manual_seed(seed)
    tagger, rng, losses = Tagger(len(words)), np.random.default_rng(seed), []
    optimizer = torch.optim.AdamW(tagger.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    with ThreadPoolExecutor() as pool:
        files = [os.path.join(data, "train2017", image["file_name"]) for image in images]
        pixels = list(pool.map(lambda file: prepare(tagger, file), tqdm(files, desc="reading", mininterval=1)))
    readable = [i for i, x in enumerate(pixels) if torch.is_tensor(x)]
    pictures, used = torch.stack([pixels[i] for i in readable]), used[readable]  # (N, 64, 64, 3), (N, words)
    bar = tqdm(range(steps), desc="teaching the tagger", mininterval=1)
    for step in bar:
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 20, 1 - step / steps)
        chosen = rng.choice(len(pictures), B, replace=len(pictures) < B)
        votes = tagger.vote(tagger(pictures[chosen])).amax(1)  # (B, S, words) -> (B, words)
        loss = F.binary_cross_entropy_with_logits(votes, used[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    save_checkpoint(os.path.join(data, "features", "tagger.pt"), {k: v for k, v in tagger.state_dict().items() if not k.startswith("vote")})
    return losses


def mend_torchvision():
    """
    Makes `import torchvision` work where a CPU build of torch stands beside PyPI's CUDA build of torchvision: its compiled half can't load
    there, and the import ends with "operator torchvision::nms does not exist". Nobody here calls those operators; that they have a name is enough.
    """
    while True:
        try:
            import torchvision  # noqa: F401
            return
        except RuntimeError as problem:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(problem))
            if not missing:
                raise
            torch.library.define(missing[1], "() -> ()")


class OpenCLIP(nn.Module):
    """
    A ViT tower of open_clip, with its own preprocessing; all tokens of the last layer, the class token first: ViT-B-32 gives (B, 50, 768).
    Post-layernorm is applied to every token, as CLIP applies it to the class token. pretrained: a tag, a file, or none for random weights.
    """

    def __init__(self, name, pretrained):
        super().__init__()
        mend_torchvision()
        import open_clip

        models, tags = open_clip.list_models(), open_clip.list_pretrained_tags_by_model(name)
        weights = None if pretrained == "none" else pretrained
        if name not in models:
            near = ", ".join(difflib.get_close_matches(name, models, 4, 0.3))
            die(f"encoder={name} is not tagger, patches or a model of open_clip, such as {near}")
        if weights is None:
            print(f"CAUTION: {name} has random weights (pretrained=none). It sees next to nothing: good for trying the plumbing only", flush=True)
        elif weights not in tags and not os.path.isfile(weights):
            die(f"pretrained={weights} is neither a file nor weights that open_clip has for {name}: {', '.join(tags)}; none = random weights")
        # OpenAI and a few others trained with a quick approximation of GELU; with the exact one their weights see noticeably worse.
        # open_clip knows which tags did. What a file needs, the model's name must say: encoder=ViT-B-32-quickgelu
        quick = weights is not None and open_clip.get_pretrained_cfg(name, weights).get("quick_gelu", False)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # random weights are the same ones each time
                model, _, self.prepare = open_clip.create_model_and_transforms(name, pretrained=weights, force_quick_gelu=quick)
        except Exception as problem:  # open_clip, the hub's client, torch and pickle each have their own way to say it
            die(f"encoder={name} pretrained={pretrained} could not be loaded ({type(problem).__name__}: {textwrap.shorten(str(problem), 250)})")
        self.visual, self.pretrained = model.visual, pretrained
        if not hasattr(self.visual, "ln_post") or self.visual.attn_pool:
            die(f"encoder={name}: of open_clip's towers, only plain ViTs are supported, such as ViT-B-32")
        self.visual.transformer.register_forward_hook(lambda module, inputs, output: setattr(self, "tokens", output))

    def forward(self, pixels):
        self.visual(pixels)
        return self.visual.ln_post(self.tokens)


def load_encoder(name, pretrained="openai", tagger=None):
    """The frozen encoder `name`, ready to look. `pretrained` is for open_clip; `tagger`, the weights that were taught."""
    if name == "patches":
        eye = Patches()
    elif name == "tagger":
        eye = Tagger()
        load_weights(eye, tagger, "the tagger")
    else:
        eye = OpenCLIP(name, pretrained)
    return eye.eval().requires_grad_(False)


def fingerprint(eye):
    """sha256 over an encoder's weights, and over the kinds of layers they are in: with another GELU, the same weights see something else."""
    digest = hashlib.sha256(" ".join(sorted({type(module).__name__ for module in eye.modules()})).encode())
    for name, w in sorted(eye.state_dict().items()):
        digest.update(f"{name} {tuple(w.shape)}".encode() + w.cpu().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# encoding


@torch.no_grad()
def encode(eye, pictures, process):
    """Prepared pictures (B, ...) -> float16 tokens (B, S, W) as a numpy array."""
    with process.autocast():
        return eye(torch.stack(pictures).to(process.device)).to("cpu", torch.float16).numpy()


def look(eye, files, todo, batch_size, process):
    """
    Encodes files[i] for i in todo, batch by batch, while all cores decode the next batch. Yields the numbers that could be read,
    their tokens (B, S, W), and {number: what is wrong with it} for the others.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        def decode(start):
            return pool.map(lambda i: prepare(eye, files[i]), todo[start:start + batch_size])

        ahead = decode(0)
        for start in range(0, len(todo), batch_size):
            batch = dict(zip(todo[start:start + batch_size], ahead))
            ahead = decode(start + batch_size)
            good = {i: pixels for i, pixels in batch.items() if torch.is_tensor(pixels)}
            tokens = encode(eye, list(good.values()), process) if good else ()
            yield list(good), tokens, {i: line for i, line in batch.items() if i not in good}


def copy_rows(path, rows, about):
    """Writes a features file made of rows of others, (array, number) each, and what is known of it."""
    need_space(os.path.dirname(path), len(rows) * rows[0][0][0].nbytes, path)
    new = np.lib.format.open_memmap(path + ".tmp", "w+", np.float16, (len(rows), *rows[0][0].shape[1:]))
    for row, (array, i) in zip(new, rows):
        row[:] = array[i]
    new.flush()
    save_about(path, about | dict(done=len(rows), bad=[]))
    os.replace(path + ".tmp", path)


def leave_out(data, split, ids):
    """Takes pictures out of a split's json. As it was, it stays beside it as captions_{split}.all.json."""
    path, copy = captions_file(data, split), os.path.join(data, "annotations", f"captions_{split}.all.json")
    if not os.path.exists(copy):
        shutil.copyfile(path, copy)
    with open(path, encoding="utf-8") as f:
        content = json.load(f)
    content["images"] = [image for image in content["images"] if image["id"] not in ids]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in ids]
    save_json(path, content)
    print(f"{path}: {len(ids):,} unreadable pictures left out; {copy} still names them")


def encode_split(data, split, made_by, eye, batch_size, process, skip_bad=False):
    """
    Writes features/{encoder}_{split}.npy, which is called .npy.part until it is whole, and beside it what made it (`made_by`: encoder,
    weights) and how far it is. Returns the pictures that can't be read; as long as there are any, the file is not whole.
    """
    path = features_file(data, made_by["encoder"], split)
    images, _ = load_captions(data, split)
    n, files = len(images), [os.path.join(data, split, image["file_name"]) for image in images]
    about = made_by | identity(images) | dict(done=0, bad=[])  # how many were looked at, in order; which of them can't be read
    there = [p for p in (path, path + ".part") if os.path.exists(p)]
    before = read_about(path) if there else {}
    for key, what in (("weights", "weights of the encoder, or another activation,"), ("names", "pictures, or in another order,")):
        if before.get(key, about[key]) != about[key]:
            die(f"{there[0]} was made with other {what} than these: delete it to encode anew, or take another data=")
    if os.path.exists(path):
        load_features(data, made_by["encoder"], split, images)
        print(f"{path} is there already")
        return []
    if before.get("done"):
        about, rows = before, np.lib.format.open_memmap(path + ".part", "r+")
    else:
        blank = encode(eye, [eye.prepare(Image.new("RGB", (256, 256)))], process)
        need_space(data, n * blank.nbytes, path)  # a memory map that finds the disk full kills the process
        save_about(path, about)
        rows = np.lib.format.open_memmap(path + ".part", "w+", np.float16, (n, *blank.shape[1:]))
    todo = list(range(about["done"], n)) or about["bad"]  # once all were looked at: again those that couldn't be read
    saved = time.time()
    with tqdm(total=n, initial=n - len(todo), desc=f"encoding {split}", unit=" images", mininterval=1) as bar:
        for good, tokens, problems in look(eye, files, todo, batch_size, process):
            for problem in problems.values():
                bar.write(problem)
            if good:
                rows[good] = tokens
            about["done"] = max(about["done"], max([*good, *problems]) + 1)
            about["bad"] = sorted(set(about["bad"]) - set(good) | set(problems))
            bar.update(len(good) + len(problems))
            if time.time() - saved > 2 or about["done"] == n:
                rows.flush()  # first the rows, then the word that they are there
                save_about(path, about)
                saved = time.time()
    bad = about["bad"]
    if bad and (not skip_bad or len(bad) == n):
        return [files[i] for i in bad]
    if bad:
        kept = sorted(set(range(n)) - set(bad))
        copy_rows(path, [(rows, i) for i in kept], about | identity([images[i] for i in kept]))
        leave_out(data, split, {images[i]["id"] for i in bad})
        os.remove(path + ".part")
    else:
        os.replace(path + ".part", path)
    print(f"{path}: {n - len(bad):,} pictures x {rows.shape[1]} tokens x {rows.shape[2]}")
    return []


def regroup(data, json_path, target, encoder):
    """
    COCO 2017, in `data`, split as Karpathy's dataset_coco.json says: 113,287 pictures to train on, 5,000 for val2017 and 5,000 for test2017,
    on which papers report. What `encoder` sees of them moves along.
    """
    split_of = {number: split for split, number, _, _ in read_entries(json_path)}
    entries, row_of = [], {}  # what `convert` takes; for each picture, where its features are
    for split in SPLITS:
        images, captions = load_captions(data, split)
        if lost := [image["id"] for image in images if image["id"] not in split_of]:
            die(f"{json_path} does not know {len(lost):,} pictures of {data}, such as {lost[0]}: it is not Karpathy's dataset_coco.json")
        files = [os.path.join(data, split, image["file_name"]) for image in images]
        entries += [(split_of[image["id"]], image["id"], file, said) for image, file, said in zip(images, files, captions)]
        if encoder != "none":
            features, about = load_features(data, encoder, split, images)
            row_of |= {image["id"]: (features, row) for row, image in enumerate(images)}
    convert(entries, target)
    os.makedirs(os.path.join(target, "features"), exist_ok=True)
    for split in splits_of(target):
        images, _ = load_captions(target, split)
        print(f"{target} {split}: {len(images):,} pictures")
        if encoder != "none":
            copy_rows(features_file(target, encoder, split), [row_of[image["id"]] for image in images], about | identity(images))


# ----------------------------------------------------------------------------------------------------------------------
# what a data set looks like


def explore(data, path):
    """Prints a table of what is in a data set, and draws it into the file `path`. Words are cut as cider.py cuts them."""
    table, lengths, frequent, coverage = {}, {}, {}, {}  # each by split
    for split in splits_of(data):
        images, captions = load_captions(data, split)
        words = tokenize([caption for said in captions for caption in said])
        n = lengths[split] = np.array([len(caption) for caption in words])
        frequent[split] = Counter(word for caption in words for word in caption).most_common()
        coverage[split] = np.cumsum([count for _, count in frequent[split]]) / n.sum()
        repeated = Counter(map(" ".join, words)).most_common()
        if split == "train2017":
            shown, often, known = list(zip(images, captions)), repeated[:5], {word for word, _ in frequent[split]}
        table[split] = {
            "pictures": f"{len(images):,}",
            "captions": f"{len(words):,}",
            "captions a picture": f"{len(words) / len(images):.2f} ({min(map(len, captions))} to {max(map(len, captions))})",
            "captions that were said before": f"{len(words) - len(repeated):,} ({1 - len(repeated) / len(words):.1%})",
            "words": f"{n.sum():,}",
            "words a caption": f"{n.mean():.1f} ({n.min()} to {n.max()})",
            "95% of captions have at most": f"{np.percentile(n, 95):.0f} words",
            "vocabulary": f"{len(frequent[split]):,} words",
            "... said only once": f"{sum(count == 1 for _, count in frequent[split]):,}",
            "... not in train2017": f"{sum(word not in known for word, _ in frequent[split]):,}" if split != "train2017" else "",
            **{f"... that make {share:.0%} of the text": f"{np.searchsorted(coverage[split], share) + 1:,}" for share in (0.5, 0.9, 0.99)},
        }
    top = frequent["train2017"][:25]
    print(f"\n{'':<32}" + "".join(f"{split:>20}" for split in table))
    for row in table["train2017"]:
        print(f"{row:<32}" + "".join(f"{column[row]:>20}" for column in table.values()))
    print("captions said most often: " + "; ".join(f"{times} x \"{caption}\"" for caption, times in often))
    print("commonest words: " + ", ".join(f"{word} {count:,}" for word, count in top))

    plt = pyplot()
    fig = plt.figure(figsize=(14, 10.5), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.8))
    lengths_ax, coverage_ax, words_ax = above.subplots(1, 3)
    for split in table:
        bins = np.arange(min(lengths[split].max(), 40) + 2) - 0.5
        lengths_ax.hist(lengths[split], bins=bins, density=True, histtype="step", linewidth=1.5, label=split)
        coverage_ax.plot(range(1, len(coverage[split]) + 1), coverage[split], label=split)
    lengths_ax.set(title="words in a caption", xlabel="words", ylabel="share of the captions")
    coverage_ax.set(title="vocabulary: its k commonest words make ...", xlabel="k", ylabel="... this share of the text", xscale="log", ylim=(0, 1.02))
    lengths_ax.locator_params(axis="x", integer=True)
    words_ax.locator_params(axis="x", nbins=5)
    for ax in (lengths_ax, coverage_ax):
        ax.grid(alpha=0.3)
        ax.legend()
    words_ax.barh(*zip(*reversed(top)), color="tab:gray")
    words_ax.set(title="commonest words of train2017", xlabel="times said")
    words_ax.tick_params(axis="y", labelsize=8)
    grid = below.subplots(2, 5)
    for ax in grid.flat:
        ax.axis("off")
    for ax, (image, said) in zip(grid.flat, shown[::math.ceil(len(shown) / 10)]):
        ax.imshow(open_image(os.path.join(data, "train2017", image["file_name"])))
        ax.set_title("\n".join(textwrap.fill(caption.strip(), 40) for caption in said[:2]), fontsize=8.5, parse_math=False)
    fig.savefig(path, dpi=90)
    plt.close(fig)
    print(f"the figure: {path}")


if __name__ == "__main__":
    print_settings(configure(globals()))
    t0 = time.time()

    # ---- a data set: drawn, converted, downloaded, or there already
    if shapes or risc_csv or karpathy_json:
        if data == "data/coco2017":
            die("give the new data set a folder of its own: data=")
        if set(SPLITS) <= set(splits_of(data)):  # the same command again, after an interruption
            print(f"{data} is there already: used as it is")
        elif shapes:
            draw_shapes(data, shapes, seed)
        else:
            convert(read_entries(risc_csv or karpathy_json, pictures), data)
    elif not os.path.isdir(data) or not os.listdir(data) or glob.glob(os.path.join(data, "*2017.zip*")):  # nothing is there, or half of it
        if eda:
            die(f"data={data} holds no data set to look at: `python coco.py data={data}` downloads COCO there")
        download_coco(data)
    splits = splits_of(data) or SPLITS
    for split in splits:
        images, captions = load_captions(data, split)
        print(f"{data} {split}: {len(images):,} pictures, {sum(map(len, captions)):,} captions, such as \"{captions[0][0].strip()}\"")
    if eda:
        os.makedirs("out", exist_ok=True)
        explore(data, os.path.join("out", f"eda_{os.path.basename(os.path.abspath(data))}.png"))
        sys.exit(0)

    # ---- what the encoder sees of its pictures
    files = [features_file(data, encoder, split) for split in splits]
    if all(map(os.path.exists, files)) and not any(map(read_about, files)):  # another program's features: there is no encoder to ask
        for split in splits:
            load_features(data, encoder, split, load_captions(data, split)[0])
    elif encoder != "none":
        process = setup(device, dtype)
        os.makedirs(os.path.join(data, "features"), exist_ok=True)
        taught = os.path.join(data, "features", "tagger.pt")
        if encoder == "tagger" and not os.path.exists(taught):
            teach_tagger(data, teach_steps, seed)
        eye = load_encoder(encoder, pretrained, load_checkpoint(taught) if encoder == "tagger" else None)
        made_by = dict(encoder=encoder, pretrained=getattr(eye, "pretrained", None), weights=fingerprint(eye),
                       parameters=sum(p.numel() for p in eye.parameters()))
        eye.to(process.device)
        bad = [file for split in splits for file in encode_split(data, split, made_by, eye, batch_size, process, skip_bad)]
        if bad:
            die(f"can't be read, {len(bad):,} in all: {', '.join(bad[:5])}{', ...' * (len(bad) > 5)}. The others are encoded. "
                "Mend these and run the same command again, or take them out of the data set with skip_bad=True")
    if karpathy_split:
        regroup(data, karpathy_split, os.path.normpath(data) + "_karpathy", encoder)
    print(f"done in {time.time() - t0:.0f} s")
