"""
Images with captions, and the frozen image encoder that turns every image into features, once.
A data set is a folder laid out as COCO 2017 is:

    annotations/captions_{train2017,val2017}.json   captions by people; test2017 where there is one
    train2017/*.jpg  val2017/*.jpg
    features/{encoder}_{split}.npy                  float16 (images, tokens, width): row i belongs
                                                    to the i-th entry of the json's "images"
    features/{encoder}_{split}.json                 metadata: which encoder, weights and images

    python coco.py                                  # COCO: 19 GB to download, 9.5 GB of features
    python coco.py data=photos                      # encodes any folder laid out like this
    python coco.py data=data/risc risc_csv=risc/captions.csv             # converts RISC, encodes it
    python coco.py data=data/ucm karpathy_json=ucm/dataset_ucm.json      # or Karpathy's format
    python coco.py data=photos encoder=timm/tf_efficientnet_lite2       # a CNN of timm
    # COCO in the splits that papers report on
    python coco.py data=data/coco_karpathy karpathy_json=dataset_coco.json pictures=data/coco2017
    python coco.py data=data/shapes shapes=8000 encoder=none             # draws 8,000 small scenes
    python coco.py data=data/shapes encoder=tagger  # trains a small encoder (30 s), encodes them

The same command run again continues what was interrupted. One GPU is enough: the CPU cores, which
decode the images, set the pace. COCO_ENDPOINT names a mirror of images.cocodataset.org.

Encoders: a ViT of open_clip (ViT-B-32: 50 tokens x 768); any model of timm, as timm/MODEL
(timm/tf_efficientnet_lite2: 81 tokens x 1280); `tagger` (64 x 128), trained here on the
training captions alone; `patches` (64 x 194), the raw pixels. Features that another program wrote
are used as they are.
"""
import csv
import difflib
import filecmp
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import tempfile
import textwrap
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from fineweb import (configure, die, download, lock_folder, print_settings, read_json, reading,
                     save_json, save_text)
from train_gpt2 import load_checkpoint, load_weights, save_checkpoint, setup
from cider import read_captions

# --------------------------------------------------------------------------------------------------
# settings: `python coco.py name=value` overrides any; rules such as >= 1 are checked

data = "data/coco2017"      # folder of the data set
shapes = 0                  # >= 0: draw this many training scenes, and a twentieth for validation
risc_csv: str = None        # convert RISC: its captions.csv, with the folder resized/ beside it
karpathy_json: str = None   # convert a data set in Karpathy's format: its dataset_*.json
pictures: str = None        # the folder of the converted set's pictures; None = beside its file
turned = False              # pictures from above: each counts in 8 orientations, see README
encoder = "ViT-B-32"        # a model of open_clip, timm/MODEL, tagger, patches; none = no features
pretrained: str = None      # tag or file of weights; None = openai or timm's default; none = random
keep: str = None            # one of short | long: converting: two captions of each picture only
batch_size = 128            # >= 1: images
teach_steps = 450           # >= 1: training steps of the tagger
seed = 1337                 # >= 0
device: str = None          # cuda, cpu, mps; None = the best there is
dtype: str = None           # one of bfloat16 | float32: of matmuls; None = bfloat16 on CUDA

SPLITS = ("train2017", "val2017")  # every data set has these; some have test2017 too

# --------------------------------------------------------------------------------------------------
# reading a data set


def captions_file(data, split):
    return os.path.join(data, "annotations", f"captions_{split}.json")


def splits_of(data):
    """The splits whose captions the folder holds."""
    return [split for split in (*SPLITS, "test2017") if os.path.exists(captions_file(data, split))]


def load_captions(data, split):
    """(images, captions): the entries of the json's "images", and a list of captions for each."""
    path = captions_file(data, split)
    if not os.path.isdir(data):
        die(f"data={data}: no such folder")
    if not os.path.exists(path):
        die(f"{path} is missing: data={data} is not laid out as COCO 2017 is, or has no {split}")
    try:
        images, captions = read_captions(path)
    except ValueError as problem:
        die(problem)
    if not all("file_name" in image for image in images):
        die(f"{path}: its images have no file_name")
    return images, captions


def image_files(data, split, images):
    return [os.path.join(data, split, image["file_name"]) for image in images]


def warn_overlap(data, split):
    """Prints one line if pictures of `split` are in train2017 too: same name, same bytes."""
    if split == "train2017":
        return
    names = {image["file_name"] for image in load_captions(data, split)[0]}
    names &= {image["file_name"] for image in load_captions(data, "train2017")[0]}
    folders = [os.path.join(data, folder) for folder in ("train2017", split)]
    shared, _, _ = filecmp.cmpfiles(*folders, sorted(names), shallow=False)
    if shared:
        print(f"CAUTION: {len(shared):,} pictures of {split} are in train2017 too, such as "
              f"{shared[0]}: their scores say nothing about new pictures", flush=True)


def open_image(path, otherwise=die):
    """
    A file as an upright picture in 8-bit RGB: transparent parts over white, 16-bit and float values
    scaled. If it can't be read, returns otherwise(one line that says so).
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F" or image.mode.startswith("I"):
                image = to_8_bits(image)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as problem:  # broken files make Pillow raise errors of every kind
        return otherwise(f"{path} is not a readable picture ({problem})")


def to_8_bits(image):
    """A picture of 16-bit, 32-bit or float values as 8-bit grey. Pillow would cut them at 255."""
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(low + high):
        raise ValueError("it holds values that are not finite")
    ranges = [(0, 1)] if image.mode == "F" else [(0, 255), (0, 65535)]
    for bottom, top in (*ranges, (low, high)):
        if bottom <= low and high <= top:
            break
    scaled = (values - bottom) / max(top - bottom, 1e-300) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# reading features


def features_file(data, encoder, split):
    return os.path.join(data, "features", f"{encoder.replace('/', '_')}_{split}.npy")


def metadata_file(path):
    return path.removesuffix(".npy") + ".json"


def read_metadata(path):
    """What is known of a features file; {} if nothing is."""
    return read_json(metadata_file(path)) if os.path.exists(metadata_file(path)) else {}


def manifest(images):
    """Ties features to a json: the number of images, and a hash of their names in order."""
    names = "\n".join(image["file_name"] for image in images)
    return dict(images=len(images), names=hashlib.sha256(names.encode()).hexdigest())


def open_features(path):
    """A .npy file of features as a memory-mapped array (images, S tokens, W width)."""
    with reading(path, "a whole .npy file", "delete it and encode again"):
        # "c": writable in memory only; torch warns about read-only arrays
        features = np.lib.format.open_memmap(path, mode="c")
    if features.ndim != 3 or features.dtype.kind != "f":
        die(f"{path} holds {features.dtype} of shape {features.shape}, not floats of three "
            "dimensions: (images, tokens, width)")
    return features


def load_features(data, encoder, split, images):
    """
    Returns (features, metadata). features: a memory-mapped float array (images, S tokens, W width);
    row i belongs to images[i], the i-th entry of the json's "images". metadata: what made them
    (encoder, weights, ...) and the grid (rows, columns) of the last tokens, where this is known.
    Ends the run with one line if the features are incomplete, of other images, or not finite.
    """
    path = features_file(data, encoder, split)
    captions_json = captions_file(data, split)
    command = f"`python coco.py data={data} encoder={encoder}`"
    metadata = read_metadata(path)
    if not os.path.exists(path):
        if os.path.exists(path + ".part") and metadata:
            done = metadata["done"] - len(metadata["bad"])
            die(f"{path}: {done:,} of {len(images):,} pictures are encoded; {command} continues")
        die(f"{path} is missing: make it with {command}")
    features = open_features(path)
    if len(features) != len(images):
        die(f"{path} is of {len(features)} images, but {captions_json} of {len(images)} images: "
            f"delete it and run {command}")
    names = manifest(images)["names"]
    if metadata.get("names", names) != names:
        die(f"{path} is of other pictures than {captions_json}, or in another order: delete it "
            f"and run {command}")
    train_path = features_file(data, encoder, "train2017")
    if os.path.exists(train_path):
        train_shape = open_features(train_path).shape[1:]
        if train_shape != features.shape[1:]:
            die(f"{path} has {features.shape[1:]} (tokens, width) an image, {train_path} has "
                f"{train_shape}: both must come from one encoder")
    if not features.dtype.isnative:
        features = features.astype(features.dtype.newbyteorder("="))
    # all of COCO is 9 GB: this is done once for each version of the file
    version = os.stat(path).st_mtime_ns
    if metadata.get("finite") != version:
        check_finite_features(path, features, images)
        remember_finite(path, metadata, version)
    return features, metadata


def check_finite_features(path, features, images):
    for row, image in enumerate(images):
        if not np.isfinite(features[row]).all():
            die(f"{path}: row {row}, the features of {image['file_name']}, is not finite: delete "
                "it and encode again")


def remember_finite(path, metadata, version):
    # another run may do the same at this moment; in a read-only folder it is checked each time
    temporary = f"{metadata_file(path)}.{os.getpid()}"
    with suppress(OSError):
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(metadata | dict(finite=version), file)
        os.replace(temporary, metadata_file(path))


# --------------------------------------------------------------------------------------------------
# COCO's download

COCO_ZIPS = dict(annotations="annotations/annotations_trainval2017.zip",
                 train2017="zips/train2017.zip", val2017="zips/val2017.zip")


def need_space(folder, n_bytes, what):
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        die(f"{what} needs {n_bytes / 1e9:,.1f} GB: in {folder} {free / 1e9:,.1f} GB are free")


def missing_pictures(data, split):
    """The names of the pictures that the json names and the folder lacks."""
    folder = os.path.join(data, split)
    present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    names = [image["file_name"] for image in load_captions(data, split)[0]]
    return [name for name in names if name not in present]


def download_coco(data):
    """
    Downloads and unpacks what is missing of COCO 2017: 118,287 training and 5,000 validation
    pictures. The zip of the annotations is deleted last: while it is there, there is work to do.
    """
    import requests

    incomplete = [split for split in SPLITS
                  if split not in splits_of(data) or missing_pictures(data, split)]
    if not incomplete:
        return
    endpoint = os.environ.get("COCO_ENDPOINT", "http://images.cocodataset.org").rstrip("/")
    print(f"COCO 2017 is downloaded from {endpoint} to {data}", flush=True)
    os.makedirs(data, exist_ok=True)
    urls = {part: f"{endpoint}/{COCO_ZIPS[part]}" for part in ("annotations", *incomplete)}
    sizes = []
    try:
        for url in urls.values():
            answer = requests.head(url, timeout=30, allow_redirects=True)
            sizes.append(int(answer.headers.get("Content-Length", 0)))
    except requests.RequestException as problem:
        die(f"{endpoint} does not answer ({type(problem).__name__}): try again later, or name a "
            "mirror in COCO_ENDPOINT")
    # the most is needed when all is unpacked but for the largest zip, which is still there
    present = glob.glob(os.path.join(data, "*2017.zip*"))
    for split in incomplete:
        present += glob.glob(os.path.join(data, split, "*"))
    need_space(data, sum(sizes) + max(sizes) - sum(map(os.path.getsize, present)), "COCO")
    for part, url in urls.items():
        path = download(url, os.path.join(data, os.path.basename(url)))
        if part == "annotations":
            annotations_zip = path
            unpack(path, data, "annotations/captions_")
            continue
        unpack(path, data, f"{part}/")
        missing = missing_pictures(data, part)
        if missing:
            die(f"{path} lacks {len(missing):,} of the pictures in {captions_file(data, part)}: "
                "delete it and start again")
        os.remove(path)
    os.remove(annotations_zip)


def unpack(path, data, prefix):
    """Extracts the files of a zip whose names begin with `prefix`, if they are not there yet."""
    os.makedirs(data, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(dir=data) as temporary:
            for member in tqdm(archive.infolist(), desc=f"unpacking {prefix}", mininterval=1):
                target = os.path.join(data, member.filename)
                if member.is_dir() or not member.filename.startswith(prefix):
                    continue
                if os.path.exists(target) and os.path.getsize(target) == member.file_size:
                    continue
                # extract checks the CRC, and keeps names such as ../../evil inside `temporary`
                extracted = archive.extract(member, temporary)
                target = os.path.join(data, os.path.relpath(extracted, temporary))
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(extracted, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as problem:
        die(f"{path} is damaged ({problem}): delete it and start again")


# --------------------------------------------------------------------------------------------------
# writing a data set in COCO's layout


def add_image(content, image, captions, first_id=1):
    """Adds an image and its captions, numbered from first_id on, to the content of a json."""
    content["images"].append(image)
    for caption in captions:
        number = first_id + len(content["annotations"])
        content["annotations"].append(dict(id=number, image_id=image["id"], caption=caption))


def save_captions(data, contents, train_captions):
    """
    Writes the json of each split, and the training captions alone as train_captions.txt. The json
    of train2017 comes last: once it is there, the data set is complete.
    """
    lines = [" ".join(caption.split()) + "\n" for caption in train_captions]
    save_text(os.path.join(data, "train_captions.txt"), "".join(lines))
    os.makedirs(os.path.join(data, "annotations"), exist_ok=True)
    for split in sorted(contents, key="train2017".__eq__):
        save_json(captions_file(data, split), contents[split])


# --------------------------------------------------------------------------------------------------
# conversion of other data sets into COCO's layout

# restval: the rest of COCO's validation pictures
SPLIT_NAMES = dict(train="train2017", restval="train2017", val="val2017", test="test2017")


def folder_beside(path, *names):
    """The first of the folders `names` that stands beside the file `path`; else the file's own."""
    folders = [os.path.join(os.path.dirname(path), name) for name in names]
    return next(filter(os.path.isdir, folders), os.path.dirname(path))


def read_risc(path, pictures=None):
    """RISC's captions.csv as a list of (split, image id, path of the picture, captions)."""
    folder = pictures or folder_beside(path, "resized")
    entries = []
    with reading(path, "RISC's captions.csv"), open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        for number, row in enumerate(rows, 1):
            # DictReader puts surplus fields under the key None, and None into missing fields
            if None in row or None in row.values():
                die(f"{path}, line {rows.line_num}: it needs {len(rows.fieldnames)} fields; a "
                    'caption with a comma must stand in quotes: "a, b"')
            captions = [row[f"caption_{k}"] for k in range(1, 6)]
            entries.append((row["split"], number, os.path.join(folder, row["image"]), captions))
    return entries


def find_picture(folder, image):
    """A picture of Karpathy's json: where it says, or where COCO 2017 has it."""
    paths = [os.path.join(folder, image.get("filepath", ""), image["filename"])]
    if "cocoid" in image:
        paths += [os.path.join(folder, split, f"{image['cocoid']:012}.jpg") for split in SPLITS]
    return next(filter(os.path.exists, paths), paths[0])


def read_karpathy(path, pictures=None):
    """One of Karpathy's dataset_*.json, likewise as (split, image id, path, captions)."""
    name = os.path.basename(path).removeprefix("dataset_").removesuffix(".json")
    usual_names = (f"{name.upper()}_images", f"{name}_images", name, "images", "imgs")
    folder = pictures or folder_beside(path, *usual_names)
    entries = []
    with reading(path, "one of Karpathy's dataset_*.json"):
        images = read_json(path)["images"]
        # COCO's own ids if all have one, else numbers: in a mixture, two could be the same
        has_ids = all("cocoid" in image for image in images)
        for number, image in enumerate(images, 1):
            picture = find_picture(folder, image)
            captions = [sentence["raw"] for sentence in image["sentences"]]
            image_id = image["cocoid"] if has_ids else number
            entries.append((image["split"], image_id, picture, captions))
    return entries


def add_turned(content, pictures, folder):
    """Writes 7 further orientations of each picture, and adds each with all captions."""
    for image_id, path, captions in tqdm(pictures, desc="turning", mininterval=1):
        upright = open_image(path)
        mirrored = ImageOps.mirror(upright)
        for k in range(1, 8):
            name = f"{os.path.basename(path)}_turned{k}.jpg"
            picture = (mirrored if k > 3 else upright).rotate(90 * (k % 4), expand=True)
            picture.save(os.path.join(folder, name), quality=95)
            add_image(content, dict(id=f"{image_id}_turned{k}", file_name=name), captions)


def convert(entries, data, turned=False, keep=None):
    """
    Writes what read_risc and read_karpathy return as a data set, or nothing if it is not one.
    Pictures that are missing or have no caption are left out and counted. turned: each training
    picture is there in 8 orientations, with the same captions: from above, none is upright. keep:
    only the two captions with the fewest words ("short") or the most ("long").
    """
    contents, pictures = {}, {}  # of each split
    left_out, n_empty = [], 0
    for split, image_id, path, captions in entries:
        if split not in SPLIT_NAMES:
            die(f"{path} is of the split {split!r}; known are {', '.join(SPLIT_NAMES)}")
        for caption in captions:
            if not isinstance(caption, str):
                die(f"{path}: a caption is {caption!r}, not text")
        texts = [caption.strip() for caption in captions if caption.strip()]
        n_empty += len(captions) - len(texts)
        if keep:
            texts.sort(key=lambda text: len(text.split()))
            texts = texts[:2] if keep == "short" else texts[-2:]
        if not texts or not os.path.isfile(path):
            left_out.append(path)
            continue
        split = SPLIT_NAMES[split]
        pictures.setdefault(split, []).append((image_id, path, texts))
        content = contents.setdefault(split, dict(images=[], annotations=[]))
        add_image(content, dict(id=image_id, file_name=os.path.basename(path)), texts)
    if left_out or n_empty:
        print(f"left out: {n_empty:,} empty captions, and {len(left_out):,} of {len(entries):,} "
              f"pictures without a file or a caption {left_out[:1]}")
    if "train2017" not in pictures:
        die("there is no picture to train on: name their folder with pictures=")
    for split, content in contents.items():
        for key in ("id", "file_name"):
            values = Counter(str(image[key]) for image in content["images"])
            value, times = values.most_common(1)[0]
            if times > 1:
                die(f"{times} pictures of {split} have the {key} {value}: each needs its own")
    for split in contents:
        folder = os.path.join(data, split)
        os.makedirs(folder, exist_ok=True)
        for _, path, _ in tqdm(pictures[split], desc=f"converting {split}", mininterval=1):
            target = os.path.join(folder, os.path.basename(path))
            if not os.path.exists(target):
                try:
                    os.link(path, target)
                except OSError:  # another disk, or a file system without links
                    shutil.copyfile(path, target + ".tmp")
                    os.replace(target + ".tmp", target)
    train_captions = [row["caption"] for row in contents["train2017"]["annotations"]]
    random.Random(0).shuffle(train_captions)
    if turned:
        add_turned(contents["train2017"], pictures["train2017"], os.path.join(data, "train2017"))
    save_captions(data, contents, train_captions)


# --------------------------------------------------------------------------------------------------
# the built-in scenes: one or two objects, each of a size, a colour and a shape, and where they are

SIZES = dict(small=6.5, large=13.0)  # radius in pixels, of a picture of 64 x 64
SIZE_WORDS = dict(small=("small", "little"), large=("large", "big"))
COLOURS = dict(red=(214, 40, 40), green=(44, 160, 64), blue=(40, 90, 220),
               yellow=(245, 200, 30), purple=(140, 60, 180), black=(30, 30, 34))


def star_corner(k):
    radius = 0.42 if k % 2 else 1.0
    return radius * math.sin(math.pi * k / 5), -radius * math.cos(math.pi * k / 5)


# corners (x, y) in units of the radius; y points down
SHAPES = dict(
    circle=[(math.cos(k * math.pi / 20), math.sin(k * math.pi / 20)) for k in range(40)],
    square=[(-.88, -.88), (.88, -.88), (.88, .88), (-.88, .88)],
    triangle=[(0, -1), (.95, .8), (-.95, .8)],
    star=[star_corner(k) for k in range(10)],
    cross=[(.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33), (.33, 1),
           (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33), (-.33, -1)],
)
# place: (where in the picture, where seen from another object, dx, dy)
PLACES = dict(
    left=("on the left", "left of", -1, 0),
    right=("on the right", "right of", 1, 0),
    top=("at the top", "above", 0, -1),
    bottom=("at the bottom", "below", 0, 1),
    middle=("in the middle", "", 0, 0),
)
OPPOSITE = dict(left="right", right="left", top="bottom", bottom="top")
ONE_OBJECT = (
    "{a} {here}",
    "there is {a} {here}",
    "a picture of {a} {here}",
    "{here} is {a}",
    "you can see {a} {here}",
    "just {a} , {here}",
)
TWO_OBJECTS = (
    "{a} {left_of} {b}",
    "there is {a} {left_of} {b}",
    "a picture of {a} {left_of} {b}",
    "{here} is {a} and {there} is {b}",
    "{a} {here} and {b} {there}",
    "you can see {a} and {right_of} it {b}",
)


def true_captions(scene):
    """
    A list of all true captions for each sentence pattern. scene: {"objects": [[size, colour,
    shape], ...], "place": where the first is, in the picture or as seen from the second}.
    """
    names = []
    for size, colour, shape in scene["objects"]:
        names.append([f"a {word} {colour} {shape}" for word in SIZE_WORDS[size]])
    place = scene["place"]
    if len(names) == 1:
        here = PLACES[place][0]
        return [[pattern.format(a=a, here=here) for a in names[0]] for pattern in ONE_OBJECT]
    fillings = []  # of the gaps in a pattern
    for first, second, here in ((names[0], names[1], place), (names[1], names[0], OPPOSITE[place])):
        there = OPPOSITE[here]
        for a, b in itertools.product(first, second):
            fillings.append(dict(a=a, b=b, here=PLACES[here][0], there=PLACES[there][0],
                                 left_of=PLACES[here][1], right_of=PLACES[there][1]))
    return [[pattern.format(**filling) for filling in fillings] for pattern in TWO_OBJECTS]


def fraction_right(images, captions):
    """
    The share of captions, one for each of the images, that are right in every word: size, colour,
    shape and place. None if the images are not drawn scenes.
    """
    if not images or "scene" not in images[0]:
        return None
    right = 0
    for image, caption in zip(images, captions):
        right += any(caption in pattern for pattern in true_captions(image["scene"]))
    return right / len(captions)


def random_scene(rng):
    while True:
        objects = []
        for _ in range(rng.choice((1, 2, 2, 2))):
            size, colour = rng.choice(list(SIZES)), rng.choice(list(COLOURS))
            objects.append([size, colour, rng.choice(list(SHAPES))])
        if len(objects) == 1:
            return dict(objects=objects, place=rng.choice(list(PLACES)))
        if objects[0] != objects[1]:
            return dict(objects=objects, place=rng.choice(("left", "top")))


def is_held_out(scene):
    """True for a tenth of all scenes, those of validation, in either order of their objects."""
    return random.Random(min(true_captions(scene)[0])).random() < 0.1


def place_objects(rng, radii, place):
    """The centres (x, y) of one or two objects, random within `place`."""
    _, _, dx, dy = PLACES[place]
    if len(radii) == 1:
        return [(32 + dx * 16 + rng.uniform(-3, 3), 32 + dy * 16 + rng.uniform(-3, 3))]
    # each object stays in its half of the picture; its depth is its distance from the outer edge
    depths = [rng.uniform(radius + 1, 31 - radius) for radius in radii]
    # the line through both centres is nearly parallel to an axis
    middle, slant = rng.uniform(16, 48), rng.uniform(-5, 5)
    centres = []
    for depth, radius, direction in zip(depths, radii, (1, -1)):
        along = depth if direction * (dx + dy) < 0 else 64 - depth
        across = min(max(middle + direction * slant, radius + 1), 63 - radius)
        centres.append((along, across) if dx else (across, along))
    return centres


def draw_scene(rng, scene):
    """The scene as a 64 x 64 picture; exact places, sizes and tints are random."""
    radii = [SIZES[size] * rng.uniform(0.9, 1.1) for size, _, _ in scene["objects"]]
    centres = place_objects(rng, radii, scene["place"])
    # drawn four times as large and shrunk: smooth edges
    scale = 4
    background = tuple(rng.randint(225, 255) for _ in range(3))
    picture = Image.new("RGB", (64 * scale, 64 * scale), background)
    pen = ImageDraw.Draw(picture)
    for (x, y), radius, (_, colour, shape) in zip(centres, radii, scene["objects"]):
        tint = tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in COLOURS[colour])
        corners = [((x + radius * u) * scale, (y + radius * v) * scale) for u, v in SHAPES[shape]]
        pen.polygon(corners, fill=tint)
    return picture.resize((64, 64), Image.BOX)


def draw_shapes(data, n_train, seed, n_objects=None, style=None):
    """
    Writes a data set of n_train scenes, and a twentieth of that for validation, none of which is
    trained on. n_objects: only scenes of that many objects. style(rng, picture, captions) may
    return another picture and other captions.
    """
    rng = random.Random(seed)
    counts = dict(train2017=n_train, val2017=max(1, n_train // 20))
    first_ids = dict(train2017=(1, 1), val2017=(1_000_001, 10_000_001))  # of images, of captions
    info = dict(description="shapes: scenes drawn by coco.py")
    contents = {split: dict(info=info, images=[], annotations=[]) for split in SPLITS}
    for split in SPLITS:
        os.makedirs(os.path.join(data, split), exist_ok=True)
    bar = tqdm(total=sum(counts.values()), desc="drawing scenes", mininterval=1)
    while bar.n < bar.total:
        scene = random_scene(rng)
        split = "val2017" if is_held_out(scene) else "train2017"
        number = len(contents[split]["images"])
        if number == counts[split] or n_objects not in (None, len(scene["objects"])):
            continue
        picture = draw_scene(rng, scene)
        # of each pattern, the first variants are the likeliest: they begin at the left or the top
        captions = []
        for pattern in rng.sample(true_captions(scene), 5):
            captions.append(pattern[int(len(pattern) * rng.random() ** 3)])
        if style:
            picture, captions = style(rng, picture, captions)
        name = f"{number + 1:06d}.jpg"
        picture.save(os.path.join(data, split, name), quality=95, subsampling=0)
        first_image, first_caption = first_ids[split]
        image = dict(id=first_image + number, file_name=name, width=64, height=64, scene=scene)
        add_image(contents[split], image, captions, first_caption)
        bar.update()
    bar.close()
    train_captions = [row["caption"] for row in contents["train2017"]["annotations"]]
    save_captions(data, contents, train_captions)


# --------------------------------------------------------------------------------------------------
# image encoders: preprocess(picture) -> tensor; a batch of those -> features (B, S tokens, W width)
# grid: the rows and columns in which the last tokens lie; class tokens come before them


def to_64x64(picture):
    return torch.from_numpy(np.array(picture.resize((64, 64), Image.BICUBIC)))  # (64, 64, 3) uint8


class Patches(nn.Module):
    """No encoder: 8 x 8 patches of a 64 x 64 picture, each with its 192 values and its position."""
    grid = (8, 8)
    preprocess = staticmethod(to_64x64)

    def forward(self, pixels):
        # (B, 64, 64, 3) -> (B, rows, y, columns, x, 3) -> (B, rows x columns, y x x x 3)
        x = pixels.view(-1, 8, 8, 8, 8, 3).transpose(2, 3).reshape(-1, 64, 192) / 127.5 - 1
        line = torch.linspace(-1, 1, 8, device=x.device)
        positions = torch.cartesian_prod(line, line).expand(len(x), 64, 2)
        return torch.cat([x, positions], 2)  # (B, S=64, W=194)


class Tagger(nn.Module):
    """
    A small convolutional encoder, trained on captions alone: which words do people use about this
    image? Each of its 64 tokens scores every word, and the highest score counts (Fang et al. 2015,
    https://arxiv.org/abs/1411.4952). Here, CLIP's loss learns shapes far later: colours and places
    alone tell the captions of a batch apart.
    """
    grid = (8, 8)
    preprocess = staticmethod(to_64x64)

    def __init__(self, n_words=0):
        super().__init__()

        def convolution(n_in, n_out, size):  # halves height and width
            conv = nn.Conv2d(n_in, n_out, size, stride=2, padding=size // 2, bias=False)
            return conv, nn.BatchNorm2d(n_out), nn.ReLU()

        self.convolutions = nn.Sequential(
            *convolution(5, 24, 5), *convolution(24, 64, 3), *convolution(64, 128, 3),
            # each channel looks around by itself, then all are mixed: an eighth of the work of one
            # convolution that does both (Howard et al. 2017, https://arxiv.org/abs/1704.04861)
            nn.Conv2d(128, 128, 3, padding=1, groups=128), nn.Conv2d(128, 128, 1))
        self.norm = nn.LayerNorm(128)
        if n_words:  # in training only
            self.vote = nn.Linear(128, n_words)
            nn.init.constant_(self.vote.bias, -3.0)  # most words are not about most images
        # a pixel's channels side by side in memory: what convolutions are fastest with
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels):
        x = pixels.permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, 64, 64)
        # a convolution does not know where it is: two channels tell it x and y
        line = torch.linspace(-1, 1, 64, device=x.device)
        positions = torch.stack(torch.meshgrid(line, line, indexing="xy"))
        x = torch.cat([x, positions.expand(len(x), 2, 64, 64)], 1)
        x = self.convolutions(x).flatten(2).transpose(1, 2)  # (B, 128, 8, 8) -> (B, S=64, W=128)
        return self.norm(x)


def train_tagger(data, steps, seed, B=48, peak=4e-3, device="cpu"):
    """Trains a Tagger on a data set and saves it as features/tagger.pt. Returns the losses."""
    images, captions = load_captions(data, "train2017")
    counts = Counter(" ".join(itertools.chain(*captions)).lower().split())
    vocabulary = {word: k for k, (word, _) in enumerate(counts.most_common(1000))}
    # the share of an image's captions that use a word
    targets = torch.zeros(len(images), len(vocabulary))
    for target, texts in zip(targets, captions):
        for caption in texts:
            words = vocabulary.keys() & caption.lower().split()
            target[[vocabulary[word] for word in words]] += 1 / len(texts)
    torch.manual_seed(seed)
    tagger = Tagger(len(vocabulary)).to(device)
    files = tqdm(image_files(data, "train2017", images), desc="reading", mininterval=1)
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(lambda file: preprocess_file(tagger, file), files))
    readable = [i for i, x in enumerate(pixels) if torch.is_tensor(x)]
    if not readable:
        die(f"{data} holds no readable picture of train2017")
    pixels = torch.stack([pixels[i] for i in readable])  # (N, 64, 64, 3)
    targets = targets[readable]                          # (N, words)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(tagger.parameters(), betas=(0.9, 0.98), weight_decay=0.05,
                                  fused=True)
    losses = []
    bar = tqdm(range(steps), desc="training the tagger", mininterval=1)
    for step in bar:
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 20, 1 - step / steps)
        batch = rng.choice(len(pixels), B, replace=len(pixels) < B)
        # each word's highest score of all tokens: (B, S, words) -> (B, words)
        scores = tagger.vote(tagger(pixels[batch].to(device))).amax(1)
        loss = F.binary_cross_entropy_with_logits(scores, targets[batch].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    weights = {name: w for name, w in tagger.state_dict().items() if not name.startswith("vote")}
    save_checkpoint(os.path.join(data, "features", "tagger.pt"), weights)
    return losses


def mend_torchvision():
    """
    Makes `import torchvision` work where its compiled part is for another build of torch. Nothing
    here calls its operators: it is enough to declare the names of those that are missing.
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


def check_model(name, is_known, models):
    if not is_known:
        near = ", ".join(difflib.get_close_matches(name, models, 4, 0.3))
        die(f"encoder={name} is not tagger, patches, timm/MODEL or a model of open_clip; did you "
            f"mean {near}?")


def check_weights(name, pretrained, tags):
    if pretrained not in ("none", *tags) and not os.path.isfile(pretrained):
        die(f"pretrained={pretrained} is neither a file nor weights of {name}: none (at random), "
            + ", ".join(tags))


@contextmanager
def making_encoder(name, pretrained):
    """`with` this, random weights are the same each time, and a failure is told in one line."""
    if pretrained == "none":
        print(f"CAUTION: {name} has random weights (pretrained=none), only good for trials")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    except Exception as problem:  # the libraries and the hub raise errors of many kinds
        die(f"encoder={name} pretrained={pretrained} could not be loaded "
            f"({type(problem).__name__}: {textwrap.shorten(str(problem), 250)})")


class OpenCLIP(nn.Module):
    """
    A ViT of open_clip. Features: all tokens of the last layer after the final LayerNorm, the class
    token first. ViT-B-32: (B, 50, 768).
    """

    def __init__(self, name, pretrained):
        super().__init__()
        mend_torchvision()
        import open_clip

        check_model(name, name in open_clip.list_models(), open_clip.list_models())
        check_weights(name, pretrained, open_clip.list_pretrained_tags_by_model(name))
        # OpenAI and a few others trained with a fast approximation of GELU. open_clip knows which
        # tags did; for a local file, the model's name must say it: encoder=ViT-B-32-quickgelu
        quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
        with making_encoder(name, pretrained):
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                name, None if pretrained == "none" else pretrained, force_quick_gelu=quick)
        self.visual = model.visual
        self.pretrained = pretrained
        if not hasattr(self.visual, "ln_post") or self.visual.attn_pool:
            die(f"encoder={name}: of open_clip, only plain ViTs are supported, such as ViT-B-32")
        self.grid = self.visual.grid_size

    def forward(self, pixels):
        last = self.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, intermediates_only=True,
            output_fmt="NLC", output_extra_tokens=True)
        return torch.cat([*last["image_intermediates_prefix"], *last["image_intermediates"]], 1)


class Timm(nn.Module):
    """
    A model of timm without its pooling and head. The map of a CNN (B, W, rows, columns) becomes
    rows x columns tokens, row by row; the tokens of a ViT stay as they are, class tokens and
    registers first. tf_efficientnet_lite2: (B, 81, 1280). The whole picture is resized to a square:
    timm would crop its middle, but what captions speak of may lie at the border.
    """

    def __init__(self, name, pretrained):
        super().__init__()
        mend_torchvision()
        import timm
        from timm.models import load_state_dict

        # as timm writes it: resnet18.a1_in1k is the architecture and the tag of its weights
        architecture, _, tag = name.partition(".")
        check_model(architecture, timm.is_model(architecture), timm.list_models())
        weights_file = pretrained if os.path.isfile(pretrained or "") else None
        if pretrained not in (None, "none", weights_file):
            tag = pretrained
        if tag:
            known = timm.list_pretrained(architecture + ".*")
            check_weights(architecture, tag, [name.split(".", 1)[1] for name in known])
        with making_encoder(f"timm/{name}", pretrained):
            self.model = timm.create_model(
                f"{architecture}.{tag}".rstrip("."), num_classes=0,
                pretrained=pretrained != "none" and weights_file is None)
            state = load_state_dict(weights_file) if weights_file else None
        if state is not None:
            self.load_without_head(state, weights_file)
        self.pretrained = pretrained or self.model.pretrained_cfg["tag"]
        config = timm.data.resolve_model_data_config(self.model)
        config |= dict(crop_pct=1.0, crop_mode="squash")
        self.preprocess = timm.data.create_transform(**config, is_training=False)
        # as in Tagger
        self.model.to(memory_format=torch.channels_last)
        self.eval()
        _, height, width = config["input_size"]
        with torch.no_grad():
            features = self.map_or_tokens(torch.zeros(1, *config["input_size"]))
        if not torch.is_tensor(features) or features.ndim not in (3, 4):
            die(f"encoder=timm/{name} gives no map and no tokens")
        if features.ndim == 4:
            self.grid = tuple(features.shape[1:3])
        else:
            n_patches = features.shape[1] - getattr(self.model, "num_prefix_tokens", 0)
            rows = round(math.sqrt(n_patches * height / width))
            self.grid = (rows, n_patches // rows)

    def load_without_head(self, state, path):
        heads = self.model.pretrained_cfg["classifier"] or ()
        heads = (heads,) if isinstance(heads, str) else heads
        unused = [key for key in state if key.rpartition(".")[0] in heads]
        if unused:
            print(f"{path}: {', '.join(unused)} (its classification head) are not used")
        state = {key: w for key, w in state.items() if key not in unused}
        for key, w in self.model.state_dict().items():
            if key.endswith("num_batches_tracked"):  # not every exporter writes this count
                state.setdefault(key, w)
        load_weights(self.model, state, path)

    def map_or_tokens(self, pixels):
        features = self.model.forward_features(pixels)
        channels_first = getattr(self.model, "output_fmt", "NCHW") == "NCHW"
        if torch.is_tensor(features) and features.ndim == 4 and channels_first:
            features = features.permute(0, 2, 3, 1)
        return features  # (B, rows, columns, W) or (B, S, W)

    def forward(self, pixels):
        features = self.map_or_tokens(pixels)
        return features.flatten(1, 2) if features.ndim == 4 else features  # (B, S, W)


def load_encoder(name, pretrained=None, tagger=None, turned=False):
    """
    The frozen image encoder; pretrained as in the settings; tagger: the weights in tagger.pt.
    turned: `encode` takes the mean over 8 orientations.
    """
    if name == "patches":
        encoder = Patches()
    elif name == "tagger":
        encoder = Tagger()
        load_weights(encoder, tagger, "features/tagger.pt")
    elif name.startswith("timm/"):
        encoder = Timm(name.removeprefix("timm/"), pretrained)
    else:
        encoder = OpenCLIP(name, pretrained or "openai")
    encoder.turned = turned
    if turned and (name in ("tagger", "patches") or encoder.grid[0] != encoder.grid[1]):
        die(f"turned=True needs an encoder of open_clip or timm with square pictures, not {name}")
    return encoder.eval().requires_grad_(False)


def fingerprint(encoder):
    """sha256 of the weights and of the layers' classes: another GELU gives other features."""
    classes = {type(module).__name__ for module in encoder.modules()}
    digest = hashlib.sha256(" ".join(sorted(classes)).encode())
    for name, w in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(w.shape)}".encode() + w.cpu().numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# encoding


def mean_of_orientations(encoder, pixels):
    """
    The mean of the features (B, S, W) of the 8 orientations of pictures (B, 3, size, size). Each
    map of features is turned back, so that its tokens stay in their places.
    """
    rows, columns = encoder.grid
    total = 0
    for k in range(8):
        turned = pixels.flip(3) if k > 3 else pixels
        features = encoder(turned.rot90(k % 4, (2, 3)))  # (B, S, W)
        n_prefix = features.shape[1] - rows * columns
        grid = features[:, n_prefix:].unflatten(1, (rows, columns)).rot90(-(k % 4), (1, 2))
        if k > 3:
            grid = grid.flip(2)
        total = total + torch.cat([features[:, :n_prefix], grid.flatten(1, 2)], 1)
    return total / 8


@torch.no_grad()
def encode(encoder, pictures, process):
    """Preprocessed pictures, a list of tensors, -> float16 features (B, S, W), a numpy array."""
    forward = encoder
    if getattr(encoder, "turned", False):
        forward = functools.partial(mean_of_orientations, encoder)
    pixels = torch.stack(pictures)
    parts = [pixels]
    if process.device == "cpu":
        # a few at a time: more activations than its caches hold make a CNN slower
        parts = pixels.split(max(8, 400_000 // pixels[0].numel()))
    with process.autocast():
        features = [forward(part.to(process.device)) for part in parts]
    return torch.cat(features).to("cpu", torch.float16).numpy()


def preprocess_file(encoder, path):
    """A picture file as the encoder takes it, a tensor; or a string that says why it can't be."""
    picture = open_image(path, otherwise=str)
    return picture if isinstance(picture, str) else encoder.preprocess(picture)


def encode_batches(encoder, files, rows, batch_size, process):
    """
    Encodes files[i] for each i in rows, while all CPU cores read the next batch. Yields for each
    batch: the rows that could be read, their features (B, S, W), {other row: why not}.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        def read(start):
            batch = rows[start:start + batch_size]
            return pool.map(lambda i: preprocess_file(encoder, files[i]), batch)

        coming = read(0)
        for start in range(0, len(rows), batch_size):
            batch = dict(zip(rows[start:start + batch_size], coming))
            coming = read(start + batch_size)
            good = {i: pixels for i, pixels in batch.items() if torch.is_tensor(pixels)}
            problems = {i: line for i, line in batch.items() if i not in good}
            features = encode(encoder, list(good.values()), process) if good else []
            yield list(good), features, problems


def encode_split(data, split, made_by, encoder, batch_size, process):
    """
    Writes the features of a split, called .npy.part until they are complete, and their metadata:
    made_by (encoder, weights, ...), the manifest, done (how many images were tried, in order) and
    bad (which of those are unreadable). Continues an interrupted run. Returns the unreadable files;
    if there are any, the features stay incomplete.
    """
    path = features_file(data, made_by["encoder"], split)
    part = path + ".part"
    images, _ = load_captions(data, split)
    files, n = image_files(data, split, images), len(images)
    metadata = made_by | manifest(images) | dict(done=0, bad=[])
    existing = path if os.path.exists(path) else part
    before = read_metadata(path) if os.path.exists(existing) else {}
    for key, what in (("weights", "weights or layers of the encoder"),
                      ("names", "pictures, or in another order"), ("turned", "turned=")):
        if before.get(key, metadata.get(key)) != metadata.get(key):
            die(f"{existing} was made with other {what}: delete it, or take another data=")
    if existing == path:
        load_features(data, made_by["encoder"], split, images)
        print(f"{path} is there already")
        return []
    if not any(map(os.path.exists, files)):
        die(f"{os.path.join(data, split)} holds none of the {n:,} pictures that "
            f"{captions_file(data, split)} names")
    if before.get("done"):
        metadata = made_by | before
        features = np.lib.format.open_memmap(part, "r+")
    else:
        blank = encode(encoder, [encoder.preprocess(Image.new("RGB", (256, 256)))], process)
        # a memory map that meets a full disk would end the process without a word
        need_space(data, n * blank.nbytes, path)
        save_json(metadata_file(path), metadata)
        features = np.lib.format.open_memmap(part, "w+", np.float16, (n, *blank.shape[1:]))
    # when all were tried, once more those that could not be read
    rows = list(range(metadata["done"], n)) or metadata["bad"]
    saved = time.time()
    bar = tqdm(total=n, initial=n - len(rows), desc=f"encoding {split}", unit=" images")
    for good, batch, problems in encode_batches(encoder, files, rows, batch_size, process):
        for problem in problems.values():
            bar.write(problem)
        for i, tokens in zip(good, batch):
            if not np.isfinite(tokens).all():
                die(f"{files[i]}: the encoder gives NaN, or values that float16 can not hold")
            features[i] = tokens
        metadata["done"] = max(metadata["done"], max([*good, *problems]) + 1)
        metadata["bad"] = sorted(set(metadata["bad"]) - set(good) | set(problems))
        bar.update(len(good) + len(problems))
        if time.time() - saved > 2 or metadata["done"] == n:
            features.flush()  # before the metadata says that they are there
            save_json(metadata_file(path), metadata)
            saved = time.time()
    bar.close()
    if metadata["bad"]:
        return [files[i] for i in metadata["bad"]]
    # the metadata of a complete file comes before its name
    save_json(metadata_file(path), metadata | dict(finite=os.stat(part).st_mtime_ns))
    os.replace(part, path)
    print(f"{path}: {n:,} images x {features.shape[1]} tokens x {features.shape[2]}")
    return []


if __name__ == "__main__":
    print_settings(configure(globals()))
    started = time.time()

    # ---- the data set: drawn, converted, downloaded, or there already
    if shapes or risc_csv or karpathy_json:
        if data == "data/coco2017":
            die("give the new data set a folder of its own: data=")
        if "train2017" in splits_of(data):
            print(f"{data} is there already: used as it is")
        elif shapes:
            draw_shapes(data, shapes, seed)
        elif risc_csv:
            convert(read_risc(risc_csv, pictures), data, turned, keep)
        else:
            convert(read_karpathy(karpathy_json, pictures), data, turned, keep)
    else:
        empty = not os.path.isdir(data) or not os.listdir(data)
        # COCO's zips are there until all of it is unpacked
        if empty or glob.glob(os.path.join(data, "*2017.zip*")):
            download_coco(data)
    splits = splits_of(data) or SPLITS
    for split in splits:
        images, captions = load_captions(data, split)
        print(f"{data} {split}: {len(images):,} pictures, {sum(map(len, captions)):,} captions, "
              f'such as "{captions[0][0].strip()}"')
        warn_overlap(data, split)

    # ---- the features
    files = [features_file(data, encoder, split) for split in splits]
    made_here = any("encoder" in read_metadata(file) for file in files)
    if all(map(os.path.exists, files)) and not made_here:
        # another program's: they can be checked, but not made
        for split, file in zip(splits, files):
            print(f"{file} is used as it is: no metadata beside it says what made it")
            load_features(data, encoder, split, load_captions(data, split)[0])
    elif encoder != "none":
        process = setup(device, dtype)
        lock_folder(os.path.join(data, "features"))
        tagger, tagger_file = None, os.path.join(data, "features", "tagger.pt")
        if encoder == "tagger":
            if not os.path.exists(tagger_file):
                train_tagger(data, teach_steps, seed, device=process.device)
            tagger = load_checkpoint(tagger_file)
        image_encoder = load_encoder(encoder, pretrained, tagger, turned)
        made_by = dict(encoder=encoder, pretrained=getattr(image_encoder, "pretrained", None),
                       weights=fingerprint(image_encoder), grid=image_encoder.grid,
                       parameters=sum(p.numel() for p in image_encoder.parameters()))
        image_encoder.to(process.device)
        bad = []
        for split in splits:
            # the orientations of training pictures are pictures of their own
            image_encoder.turned = made_by["turned"] = turned and split != "train2017"
            bad += encode_split(data, split, made_by, image_encoder, batch_size, process)
        if bad:
            die(f"can't be read, {len(bad):,} in all: {', '.join(bad[:5])}. Mend them, or take "
                "them out of the json and delete the .part files; then run the same command again")
    print(f"done in {time.time() - started:.0f} s")
