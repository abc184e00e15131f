"""
Pictures with captions, and the frozen eye that looks at them. A data set is a folder laid out as COCO 2017 is:

    annotations/captions_{train2017,val2017}.json    five captions a picture, written by people
    train2017/*.jpg  val2017/*.jpg
    features/{encoder}_{split}.npy                   what the encoder sees: float16 (pictures, tokens, width),
                                                     row i = i-th entry of the json's "images"

    python coco.py                                             # downloads COCO (19 GB), encodes it with CLIP ViT-B/32 (9.5 GB)
    python coco.py data=myphotos                               # encodes any folder laid out like this
    python coco.py data=data/shapes shapes=8000 encoder=none   # draws a data set instead: 8,000 small scenes, in seconds
    python coco.py data=data/shapes encoder=tagger             # ... and encodes it with an eye of our own, taught in half a minute

An encoder runs once: it is frozen, so what it sees of a picture never changes. Encoders: any ViT tower of open_clip
(ViT-B-32: 50 tokens x 768), `tagger` (64 x 128, taught here, by the training captions alone, to notice what they speak of)
and `patches` (64 x 194: the raw pixels). Features that another program wrote, such as squeezenet1_1's, are taken as they are.
"""
import contextlib
import io
import json
import math
import os
import random
import re
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from fineweb import configure, die, download, save_atomically, show
from train_gpt2 import load_checkpoint, load_weights, save_checkpoint, setup

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python coco.py name=value` overrides any of them

data = "data/coco2017"      # the data set's folder
shapes = None               # draw so many training scenes (and a twentieth of that for validation) instead of downloading
encoder = "ViT-B-32"        # an open_clip model name, tagger, patches; none = make the data set, encode nothing
pretrained = "openai"       # open_clip's tag of the weights, or a local weights file
batch_size = 128            # pictures encoded at once
teach_steps = 450           # steps that the tagger is taught for
seed = 1337
device = None               # cuda, cpu, mps; None takes the best there is
dtype = None                # bfloat16 or float32 for the matmuls; None = bfloat16 on CUDA

SPLITS = ("train2017", "val2017")

# ----------------------------------------------------------------------------------------------------------------------
# reading a data set


def load_captions(data, split):
    """
    Returns (images, captions): the json's "images" entries, and for each the list of its captions, in the json's order.
    Ends the run with one line if the folder or the file is not what it should be.
    """
    from pycocotools.coco import COCO

    path = os.path.join(data, "annotations", f"captions_{split}.json")
    if not os.path.isdir(data):
        die(f"data={data}: no such folder")
    if not os.path.exists(path):
        die(f"{path} is missing: {data} is not laid out as COCO 2017 is (see coco.py's docstring)")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks while it reads
            coco = COCO(path)
        images = coco.dataset["images"]
        captions = [[str(a["caption"]) for a in coco.imgToAnns[image["id"]]] for image in images]
        names = [image["file_name"] for image in images]
    except (KeyError, TypeError, ValueError, AssertionError) as problem:
        die(f"{path} is not a COCO captions file, which has \"images\" (id, file_name) and \"annotations\" (image_id, caption): "
            f"{type(problem).__name__} {problem}")
    silent = [name for name, said in zip(names, captions) if not said]
    if silent or not images:
        die(f"{path}: {len(silent)} of {len(images)} images have no caption, such as {silent[:3]}")
    return images, captions


def features_file(data, encoder, split):
    return os.path.join(data, "features", f"{encoder}_{split}.npy")


def load_features(data, encoder, split, n_images):
    """The encoded pictures of a split, a memory-mapped (n_images, S tokens, W width) array, and what is known of their encoder."""
    path = features_file(data, encoder, split)
    if not os.path.exists(path):
        die(f"{path} is missing: make it with `python coco.py data={data} encoder={encoder}`")
    try:
        features = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as problem:
        die(f"{path} is not a whole .npy file ({problem}): delete it and run `python coco.py data={data} encoder={encoder}`")
    if features.ndim != 3 or len(features) != n_images:
        die(f"{path} has shape {features.shape}, but the captions of {split} belong to {n_images} images: encode again, or use the json it was made from")
    about = path.removesuffix(".npy") + ".json"
    return features, json.load(open(about)) if os.path.exists(about) else {}


def open_image(path):
    """An RGB picture, turned upright; one line and the file's name if it can't be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        die(f"{path} is not a readable picture ({problem})")


# ----------------------------------------------------------------------------------------------------------------------
# COCO itself


def download_coco(data):
    """Fetches and unpacks COCO 2017: 118,287 training and 5,000 validation pictures, 19 GB of zip files. Goes on where it was interrupted."""
    for name, url in (("annotations", "annotations/annotations_trainval2017.zip"), *((s, f"zips/{s}.zip") for s in SPLITS)):
        path = os.path.join(data, os.path.basename(url))
        if os.path.isdir(os.path.join(data, name)) and not os.path.exists(path):
            continue  # a zip is removed once it is unpacked
        download(f"http://images.cocodataset.org/{url}", path)
        try:
            with zipfile.ZipFile(path) as z:
                for member in tqdm(z.namelist(), desc=f"unpacking {name}", mininterval=1):
                    z.extract(member, data)  # extract() drops '..' and absolute paths from members' names
        except zipfile.BadZipFile as problem:
            die(f"{path} is damaged ({problem}): delete it and run the same command again")
        os.remove(path)


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


def share_right(images, captions):
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
    os.makedirs(os.path.join(data, "annotations"), exist_ok=True)
    text = "".join(a["caption"] + "\n" for a in sets["train2017"]["annotations"])
    save_atomically(os.path.join(data, "train_captions.txt"), lambda f: f.write(text.encode()))
    for split in SPLITS:  # the annotations come last: where they are, the pictures are whole
        save_atomically(os.path.join(data, "annotations", f"captions_{split}.json"), lambda f: f.write(json.dumps(sets[split]).encode()))


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
        pictures = torch.stack(list(pool.map(lambda file: tagger.prepare(open_image(file)), tqdm(files, desc="reading", mininterval=1))))  # (N, 64, 64, 3)
    bar = tqdm(range(steps), desc="teaching the tagger", mininterval=1)
    for step in bar:
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 20, 1 - step / steps)
        chosen = rng.choice(len(images), B, replace=len(images) < B)
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
    """A ViT tower of open_clip, with its own preprocessing; all tokens of the last layer, post-layernorm applied: ViT-B-32 gives (B, 50, 768)."""

    def __init__(self, name, pretrained):
        super().__init__()
        mend_torchvision()
        import open_clip

        if name not in open_clip.list_models():
            die(f"encoder={name}: not tagger, patches or a model of open_clip (python -c 'import open_clip; print(open_clip.list_models())')")
        # OpenAI trained with a quick approximation of GELU; with the exact one its weights see noticeably worse
        model, _, self.prepare = open_clip.create_model_and_transforms(name, pretrained=pretrained, force_quick_gelu=pretrained == "openai")
        self.visual = model.visual
        if not hasattr(self.visual, "ln_post"):
            die(f"encoder={name}: only open_clip's own ViT towers are supported")
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


@torch.no_grad()
def encode(eye, pictures, device="cpu", autocast=contextlib.nullcontext()):
    """Prepared pictures (B, ...) -> float16 tokens (B, S, W) as a numpy array."""
    with autocast:
        return eye(torch.stack(pictures).to(device)).to("cpu", torch.float16).numpy()


def encode_split(data, split, name, eye, batch_size, device, autocast):
    """Writes features/{name}_{split}.npy, decoding pictures on all cores while the encoder works; beside it, what made it."""
    path, (images, _) = features_file(data, name, split), load_captions(data, split)
    files = [os.path.join(data, split, image["file_name"]) for image in images]
    rows = None
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(files), desc=f"encoding {split}", unit=" images", mininterval=1) as bar:
        def prepare(start):
            return pool.map(lambda file: eye.prepare(open_image(file)), files[start:start + batch_size])

        ahead = prepare(0)
        for start in range(0, len(files), batch_size):
            now, ahead = list(ahead), prepare(start + batch_size)  # the next batch is decoded while this one is looked at
            tokens = encode(eye, now, device, autocast)
            if rows is None:
                rows = np.lib.format.open_memmap(path + ".tmp", "w+", np.float16, (len(files), *tokens.shape[1:]))
            rows[start:start + len(tokens)] = tokens
            bar.update(len(tokens))
    rows.flush()
    about = dict(encoder=name, pretrained=pretrained, parameters=sum(p.numel() for p in eye.parameters()), shape=rows.shape)
    save_atomically(path.removesuffix(".npy") + ".json", lambda f: f.write(json.dumps(about).encode()))
    os.replace(path + ".tmp", path)
    print(f"{path}: {rows.shape[0]:,} pictures x {rows.shape[1]} tokens x {rows.shape[2]}")


if __name__ == "__main__":
    show(configure(globals()))
    t0 = time.time()
    have = all(os.path.exists(os.path.join(data, "annotations", f"captions_{split}.json")) for split in SPLITS)
    if shapes:
        if have:
            die(f"{data} holds a data set already: take another data=, or leave out shapes= to encode that one")
        draw_shapes(data, shapes, seed)
    elif data == "data/coco2017":
        download_coco(data)
    for split in SPLITS:
        images, captions = load_captions(data, split)
        print(f"{data} {split}: {len(images):,} pictures, {sum(map(len, captions)):,} captions, such as \"{captions[0][0]}\"")
    if encoder != "none":
        _, _, device, autocast = setup(device, dtype)
        os.makedirs(os.path.join(data, "features"), exist_ok=True)
        taught = os.path.join(data, "features", "tagger.pt")
        if encoder == "tagger" and not os.path.exists(taught):
            teach_tagger(data, teach_steps, seed)
        eye = load_encoder(encoder, pretrained, load_checkpoint(taught) if encoder == "tagger" else None).to(device)
        for split in SPLITS:
            if os.path.exists(features_file(data, encoder, split)):
                _, about = load_features(data, encoder, split, len(load_captions(data, split)[0]))
                if about.get("pretrained", pretrained) != pretrained:
                    die(f"{features_file(data, encoder, split)} was made with pretrained={about['pretrained']}: delete it to encode anew")
                print(f"{features_file(data, encoder, split)} is there already")
            else:
                encode_split(data, split, encoder, eye, batch_size, device, autocast)
    print(f"done in {time.time() - t0:.0f} s")
