"""What a bundle says of itself: manifest.json. Whoever opens a bundle reads this first and trusts nothing else in it.

Every file of the bundle is listed with its size and SHA-256; a file that is not listed, or differs, is not opened.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from clipdit_export.precision.recipe import Recipe

MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Raised when an older clipdit could misread a newer bundle."""

REFERENCE = "onnx-fp32"
"""The variant that all others are compared with; every bundle has it."""

Target = Literal["onnx", "openvino", "tensorrt", "tensorrt-rtx"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Strict):
    """A file of the bundle."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Model(_Strict):
    """What a caller has to know of the model, without opening a graph."""

    checkpoint: str
    """Fingerprint of the checkpoint that was exported: same weights and configuration, same fingerprint."""
    native_size: tuple[int, int]
    """(height, width), pixels."""
    multiple: int
    latent_channels: int
    downscale: int
    steps: int
    guidance: float
    guidable: bool = True
    """Whether guidance means anything; a bundle that does not say is of a model that was trained for it."""
    conditioning: Literal["clip", "concat", "both"]
    tokens: tuple[int, int]
    """(M, E): CLIP patch tokens of an image and their width; (0, 1) without CLIP."""
    pooled: int
    """Width of the CLIP embedding; 1 without CLIP."""


class Quality(_Strict):
    """Measured when the bundle was built, on images that were not calibrated on."""

    images: int
    """Sources it was measured on, one seed each."""
    finite: bool
    drift: tuple[float, ...]
    """Of each step in the order of the table: relative error of the output on the calls of the fp32 trajectory."""
    psnr_db: float
    """Final images against those of fp32: from the mean square error of all of them; so are the next two, as means."""
    ssim: float
    st_lpips: float | None
    """None where the package of that metric is not installed."""
    st_lpips_to_target: float | None = None
    """Final images against the ground truth, where there is one."""

    @property
    def worst_drift(self) -> float:
        """Of the step that is farthest from fp32's."""
        return max(self.drift, default=0.0)


class Speed(_Strict):
    """Measured when the bundle was built, on the machine that built it, all variants in turn."""

    per_image_ms: float
    """Median time of a whole translation of one image, milliseconds."""
    spread_ms: tuple[float, float]
    """25th and 75th percentile."""
    hardware: str


class Audit(_Strict):
    """What products and convolutions really compute in, counted in the graph or in the engine."""

    wanted: str
    counts: dict[str, int]
    """Nodes or layers by type: fp32, fp16, bf16, int8, fp8."""
    expected: float = Field(default=1.0, ge=0, le=1)
    """The share of them that the recipe asks for: ends, islands and attention stay high on purpose."""
    weights: dict[str, int] = {}
    """Bytes of the constants of an engine by type."""
    read_from: Literal["graph", "engine", "network"] = "graph"
    """Network: what a builder was given, where it does not let its engine be read."""


class Variant(_Strict):
    """One way to run the model."""

    target: Target
    precision: str
    recipe: Recipe
    parts: dict[str, dict[str, str]]
    """By size ("128x128", height first) and part, the graph or engine in the bundle."""
    runs_on: str
    """What it needs, in words: "any CPU", "GPUs of compute capability 8.9"."""
    gpus: tuple[str, ...] = ()
    """Compute capabilities that its engines serve, as "sm89"; empty for what needs no GPU."""
    engine: tuple[str, ...] = ()
    """How its engines were built, beside what their graphs say: "refittable", "stripped" ..."""
    audit: dict[str, Audit] = {}
    """By part."""
    quality: Quality | None = None
    """None for what cannot run on the machine that built it."""
    speed: Speed | None = None
    not_default: str | None = None
    """Why this is not the variant that is opened when nobody says otherwise."""


class Manifest(_Strict):
    """All of manifest.json."""

    format: int
    name: str
    model: Model
    max_batch: int = Field(ge=1)
    variants: dict[str, Variant]
    default: str
    """The fastest variant that is good enough on the machine that built the bundle."""
    ladder: tuple[str, ...] = ()
    """Variants that are good enough, in the order in which they are tried; a machine opens the first that it can run."""
    files: dict[str, File]
    calibration: str | None = None
    """What quantised variants were calibrated on, in words."""
    skipped: dict[str, str] = {}
    """Variants that were asked for and not built, with the reason."""
    opset: int
    """Of the graphs of the step in fp32."""
    opset_ms: dict[str, float] = {}
    """Why the step has the opset that it has, where that was measured: milliseconds of a call in ONNX Runtime, by opset."""
    versions: dict[str, str]
    """Of the packages it was built with."""
    key: dict[str, str] = {}
    """All that it depends on; see `clipdit_export.cache_key`."""

    @field_validator("format")
    @classmethod
    def _known(cls, value: int) -> int:
        if value != FORMAT:
            raise ValueError(f"format {value}; this clipdit reads format {FORMAT}")
        return value


def read_manifest(folder: Path) -> Manifest:
    """ValueError, one line, when there is none or it is damaged."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} holds no {MANIFEST_FILE}, so it is no bundle; wanted a folder made by `clipdit export`"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path} is damaged: {where}: {first['msg']}; export again") from error


def to_json(manifest: Manifest) -> str:
    """As written to manifest.json."""
    return json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"


def file_entry(path: Path) -> File:
    """Size and hash of a file as it is now."""
    with path.open("rb") as stream:
        return File(bytes=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def check_file(folder: Path, name: str, manifest: Manifest) -> Path:
    """The path of a listed file whose bytes are those that were exported. ValueError, one line, when they are not."""
    entry, path = manifest.files.get(name), folder / name
    if entry is None:
        raise ValueError(f"{folder}: {name} is not listed in {MANIFEST_FILE}; it is not opened")
    if not path.is_file():
        raise ValueError(f"{folder} is not whole: {name} is missing; export again")
    found = file_entry(path)
    if found != entry:
        what = f"{found.bytes} bytes, wanted {entry.bytes}" if found.bytes != entry.bytes else "its hash differs"
        raise ValueError(f"{folder}: {name} is not the file that was exported ({what}); export again")
    return path
