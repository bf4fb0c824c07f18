"""A real paired set that anyone can rebuild: Fluent emoji (Microsoft, MIT), as source or target of two tasks.

    edges2emoji   edges of the 3-D render -> the render; pixel-aligned, in the spirit of edges2shoes
    emoji2flat    the 3-D render -> the flat drawing of the same emoji; alike but not aligned, in the spirit of face2comics

The same command gives the same bytes: pinned archives, a split by hash, and no randomness anywhere.
"""

import hashlib
import importlib.metadata
import json
import logging
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import cv2
import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image

from clipdit.data.emoji_names import SPLITS, Emoji, catalogue
from clipdit.data.emoji_papers import licence, readme
from clipdit.data.npm import NpmPackage, fetch, members

log = logging.getLogger(__name__)

Task = Literal["edges2emoji", "emoji2flat"]
Rgb = UInt8[np.ndarray, "S S 3"]
Rgba = UInt8[np.ndarray, "H W 4"]


@dataclass(frozen=True, kw_only=True)
class Packages:
    """Where the drawings and their names come from."""

    renders: NpmPackage
    """`assets/CODES.webp`: 3-D renders, RGBA, 256 pixels a side."""
    flat: NpmPackage
    """`assets/CODES.svg`: flat drawings."""
    names: NpmPackage
    """emojibase-data: `en/data.json`, `en/messages.json`, `LICENSE`."""

    def needed(self, task: Task) -> tuple[NpmPackage, ...]:
        return (self.renders, self.flat, self.names) if task == "emoji2flat" else (self.renders, self.names)


FLUENT = Packages(
    renders=NpmPackage(
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        sha512="Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        licence="MIT",
    ),
    flat=NpmPackage(
        name="@lobehub/fluent-emoji-flat",
        version="1.1.0",
        sha512="lPYCg8+N56MIj+iOgeBeH6AF0tneXxJCvgi41rOTjAWpA5rU2WUcmU1fiIXouEe8GrSTarWCYLY2ML+rdLRHsg==",
        licence="MIT",
    ),
    names=NpmPackage(
        name="emojibase-data",
        version="17.0.0",
        sha512="Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        licence="MIT",
    ),
)

RENDER_SIZE = 256  # pixels a side of the renders in the package
RECIPE = 1  # goes up when the same packages no longer give the same images

# Chosen by eye on contact sheets at 128 px. Canny at the output size breaks small features (faces, laces) into blots; Canny at
# the render's size, merely shrunk, leaves pale grey dots. So: detect at 256, thicken by the shrink factor, shrink by area, and
# the line comes out one output pixel wide and black. Thresholds 40/100 lose the folds of the brain and the collar of the farmer,
# 16/50 draw every highlight; 25/70 carry the shape. Soft shading still leaves specks: pieces under 12 pixels are dropped.
BLUR_SIGMA, CANNY_LOW, CANNY_HIGH, SMALLEST_EDGE = 1.4, 25, 70, 12


@dataclass(frozen=True, kw_only=True)
class EmojiSet:
    """What was built, or was found already built."""

    folder: Path
    counts: dict[str, int]
    """Pairs in each split."""
    already_there: bool


def build(
    out: Path,
    *,
    task: Task = "edges2emoji",
    size: int = 128,
    skin_tones: bool = False,
    archives: Path | None = None,
    packages: Packages = FLUENT,
    on_pair: Callable[[int, int], None] = lambda done, of: None,
) -> EmojiSet:
    """Write the paired set `task` at `size` x `size` pixels to the folder `out`, which appears whole or not at all.

    `out/{train,val,test}/{source,target}/ID.png`, and beside them `names.jsonl`, `dataset.json`, `README.md` and `LICENSE`.
    `archives` is a folder with the .tgz files; None fetches them with npm. `on_pair(done, of)` is told of the progress.

    ValueError when `size` is out of range, a package cannot be had, or `out` holds anything but this very set.
    """
    if task not in get_args(Task):
        raise ValueError(f"task is {task!r}; wanted one of {', '.join(get_args(Task))}")
    if not 16 <= size <= RENDER_SIZE:
        raise ValueError(f"size is {size}; the renders are {RENDER_SIZE} pixels, so it must be from 16 to {RENDER_SIZE}")
    needed = packages.needed(task)
    recipe = {
        "task": task,
        "size": size,
        "skin_tones": skin_tones,
        "recipe": RECIPE,
        "packages": {package.pin: package.sha512 for package in needed},
    }
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return EmojiSet(folder=out, counts=_finished_counts(out, recipe), already_there=True)

    files: dict[NpmPackage, bytes] = {}
    for package in needed:
        log.info("%s %s", "fetching" if archives is None else "reading", package.pin)
        files[package] = fetch(package, archives)
    renders = _by_stem(members(files[packages.renders], ".webp"))
    flat = _by_stem(members(files[packages.flat], ".svg")) if task == "emoji2flat" else None
    names = members(files[packages.names], "/en/data.json", "/en/messages.json", "/LICENSE")
    emoji = catalogue([*renders], names, skin_tones=skin_tones)
    if flat is not None:
        emoji = [e for e in emoji if e.stem in flat]  # families and couples have no flat drawing
    if not emoji:
        raise ValueError(f"{' and '.join(package.filename for package in needed)} have no emoji in common; fetch them again")

    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(f".{out.name}-{secrets.token_hex(4)}")  # beside it: a rename is atomic only within one file system
    try:
        for split in SPLITS:
            for side in ("source", "target"):
                (building / split / side).mkdir(parents=True)
        for done, item in enumerate(emoji, start=1):
            render = decode_render(renders[item.stem])
            if flat is None:
                source, target = edges(render, size), shrink(render, size)
            else:
                source, target = shrink(render, size), draw_svg(flat[item.stem], size)
            for side, image in (("source", source), ("target", target)):
                Image.fromarray(image).save(building / item.split / side / f"{item.id}.png")
            on_pair(done, len(emoji))
        counts = _write_records(building, emoji, recipe)
        pins = [f"{package.pin} ({package.licence}), sha512 {package.sha512}" for package in needed]
        (building / "README.md").write_text(readme(recipe, emoji, pins), encoding="utf-8")
        (building / "LICENSE").write_text(licence(names["LICENSE"].decode()), encoding="utf-8")
        building.rename(out)  # also replaces an empty folder; whatever is interrupted leaves `out` as it was
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return EmojiSet(folder=out, counts=counts, already_there=False)


def decode_render(webp: bytes) -> Rgba:
    """A render as square RGBA, RENDER_SIZE pixels a side, its colours laid over white; alpha is kept for its outline."""
    with Image.open(BytesIO(webp)) as file:
        image = file.convert("RGBA")
    side = max(image.size)  # two of them are 256 x 264
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    white = Image.new("RGBA", square.size, "white")
    white.alpha_composite(square)
    white.putalpha(square.getchannel("A"))
    resized = [channel.resize((RENDER_SIZE, RENDER_SIZE), Image.Resampling.LANCZOS) for channel in white.split()]
    return np.dstack([np.asarray(channel) for channel in resized])


def shrink(render: Rgba, size: int) -> Rgb:
    """The render over white, `size` pixels a side."""
    return np.asarray(Image.fromarray(render[..., :3]).resize((size, size), Image.Resampling.LANCZOS))


def edges(render: Rgba, size: int) -> Rgb:
    """Canny edges of the render, black on white, `size` pixels a side; the lines are one output pixel wide.

    Canny (1986) on the strongest of the four channels at each pixel. With alpha among them a white emoji keeps its outline; one
    search for maxima over all channels draws a common edge once, where a union of four searches could draw it four times.
    """
    smooth = cv2.GaussianBlur(render, (0, 0), BLUR_SIGMA)
    dx, dy = cv2.Sobel(smooth, cv2.CV_16S, 1, 0), cv2.Sobel(smooth, cv2.CV_16S, 0, 1)  # (H, W, 4)
    strongest = (dx.astype(np.int32) ** 2 + dy.astype(np.int32) ** 2).argmax(axis=-1)[..., None]
    dx, dy = (np.take_along_axis(gradient, strongest, axis=-1)[..., 0].copy() for gradient in (dx, dy))  # (H, W)
    lines = cv2.Canny(dx, dy, CANNY_LOW, CANNY_HIGH, L2gradient=True)

    _, labels, stats, _ = cv2.connectedComponentsWithStats(lines, connectivity=8)
    lines[stats[labels, cv2.CC_STAT_AREA] < SMALLEST_EDGE] = 0

    thickness = round(RENDER_SIZE / size)
    lines = cv2.dilate(lines, np.ones((thickness, thickness), np.uint8))
    grey = 255 - cv2.resize(lines, (size, size), interpolation=cv2.INTER_AREA)
    return np.repeat(grey[..., None], 3, axis=-1)


def draw_svg(svg: bytes, size: int) -> Rgb:
    """A square SVG drawing over white, `size` pixels a side. ValueError when resvg is not installed or cannot draw it."""
    try:
        import resvg_py  # an extra: only emoji2flat needs it
    except ModuleNotFoundError as error:
        raise ValueError(
            "emoji2flat draws SVG with resvg-py, which is not installed. Run `pip install 'clipdit[data]'`"
        ) from error
    # Fonts of the machine would make the bytes depend on it; the drawings hold none.
    png = resvg_py.svg_to_bytes(svg_string=svg.decode(), width=size, height=size, background="white", skip_system_fonts=True)
    with Image.open(BytesIO(png)) as file:
        return np.asarray(file.convert("RGB"))


def _by_stem(files: dict[str, bytes]) -> dict[str, bytes]:
    return {PurePosixPath(path).stem: data for path, data in files.items()}


def _image_paths(folder: Path) -> Iterator[Path]:
    for split in SPLITS:
        for side in ("source", "target"):
            yield from sorted((folder / split / side).glob("*.png"))


def _content_sha256(folder: Path) -> str:
    digest = hashlib.sha256((folder / "names.jsonl").read_bytes())
    for path in _image_paths(folder):
        digest.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _finished_counts(out: Path, recipe: dict) -> dict[str, int]:
    """The counts of the finished set in `out` when it is the one `recipe` makes, undamaged; else ValueError."""
    try:
        found = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
        differing = [key for key in recipe if found.get(key) != recipe[key]]
        whole = not differing and found["content_sha256"] == _content_sha256(out)
        counts = found["counts"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{out} is not empty and holds no finished emoji set. Choose another --out, or remove it") from error
    if differing:
        raise ValueError(f"{out} holds an emoji set with another {', '.join(differing)}. Choose another --out, or remove it")
    if not whole:
        raise ValueError(f"{out} holds this emoji set, but files were changed or lost. Remove it and build again")
    return counts


def _write_records(folder: Path, emoji: list[Emoji], recipe: dict) -> dict[str, int]:
    """names.jsonl and dataset.json; returns the pairs in each split."""
    rows = [{key: value for key, value in asdict(item).items() if key != "stem"} for item in emoji]
    (folder / "names.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = Counter(item.split for item in emoji)
    counts = {split: found[split] for split in SPLITS}
    made_with = {"opencv": cv2.__version__, "pillow": PIL.__version__}
    if recipe["task"] == "emoji2flat":
        made_with["resvg_py"] = importlib.metadata.version("resvg_py")
    record = {**recipe, "made_with": made_with, "counts": counts, "content_sha256": _content_sha256(folder)}
    (folder / "dataset.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    return counts
