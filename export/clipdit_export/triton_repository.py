"""A model repository of Triton Inference Server from a bundle: what an NVIDIA shop mounts and starts.

    REPOSITORY/NAME/config.pbtxt
    REPOSITORY/NAME/metadata.json   what /v2/models/NAME will answer (KServe's Open Inference Protocol), for those who plan ahead
    REPOSITORY/NAME/1/model.py      Triton's Python backend, over clipdit's Translator
    REPOSITORY/NAME/1/bundle/       the bundle, whole

Triton batches: requests wait a little for company, and a queue that is full answers at once that it is. Health, metrics and the
KServe metadata (/v2/models/NAME) are Triton's own.
"""

import json
import shutil
from importlib.resources import files
from pathlib import Path

from clipdit.files import naming
from clipdit_export.manifest import Manifest, read_manifest
from clipdit_export.names import size_of

CONFIG = """\
# {about}
name: "{name}"
backend: "python"
max_batch_size: {max_batch}
input [
  {{ name: "source_u8" data_type: TYPE_UINT8 dims: [ 3, {height}, {width} ] }},
  {{ name: "seed" data_type: TYPE_INT64 dims: [ 1 ] }}
]
output [
  {{ name: "image_u8" data_type: TYPE_UINT8 dims: [ 3, {height}, {width} ] }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {delay_us}
  default_queue_policy {{ max_queue_size: {queue} }}
}}
instance_group [ {{ count: 1 kind: {kind} }} ]
parameters [ {{ key: "backend" value: {{ string_value: "{backend}" }} }} ]
model_warmup [ {{
  name: "one image"
  batch_size: 1
  inputs {{ key: "source_u8" value: {{ data_type: TYPE_UINT8 dims: [ 3, {warm_height}, {warm_width} ] zero_data: true }} }}
  inputs {{ key: "seed" value: {{ data_type: TYPE_INT64 dims: [ 1 ] zero_data: true }} }}
}} ]
"""


def write_repository(
    bundle: Path,
    repository: Path,
    *,
    name: str | None = None,
    backend: str = "",
    gpu: bool = False,
    delay_ms: float = 5.0,
    queue: int = 64,
) -> Path:
    """Write the model NAME (the bundle's own, if None) into a repository; returns its folder.

    Args:
        backend: what opens the bundle, as `clipdit translate --backend`; "" lets clipdit choose.
        gpu: one instance on a GPU instead of the CPU.
        delay_ms: how long a request waits for others. queue: requests that wait, at most; more are refused at once.

    ValueError when there is no bundle, or that model is there already."""
    manifest = read_manifest(bundle)
    name = name or manifest.name
    folder = repository / name
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another name or repository")
    part = repository / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with naming(folder):
            (part / "1").mkdir(parents=True)
            (part / "metadata.json").write_text(json.dumps(metadata(manifest, name), indent=2) + "\n", encoding="utf-8")
            (part / "config.pbtxt").write_text(_config(manifest, name, backend, gpu, delay_ms, queue), encoding="utf-8")
            source = files("clipdit_export") / "assets" / "triton_model.py"
            (part / "1" / "model.py").write_text(source.read_text("utf-8"), encoding="utf-8")
            shutil.copytree(bundle, part / "1" / "bundle")
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def metadata(manifest: Manifest, name: str) -> dict[str, object]:
    """A model's metadata as the Open Inference Protocol has it (KServe V2, "Model Metadata"); -1 is any number."""
    height, width = _sides(manifest)
    image = {"datatype": "UINT8", "shape": [-1, 3, height, width]}
    return {
        "name": name,
        "versions": ["1"],
        "platform": "python",
        "inputs": [{"name": "source_u8", **image}, {"name": "seed", "datatype": "INT64", "shape": [-1, 1]}],
        "outputs": [{"name": "image_u8", **image}],
    }


def _sides(manifest: Manifest) -> tuple[int, int]:
    """(height, width) of what the bundle takes; -1 where there are several."""
    sizes = [size_of(size) for size in manifest.variants[manifest.default].parts]
    return sizes[0] if len(sizes) == 1 else (-1, -1)


def _config(manifest: Manifest, name: str, backend: str, gpu: bool, delay_ms: float, queue: int) -> str:
    (height, width), warm = _sides(manifest), size_of(next(iter(manifest.variants[manifest.default].parts)))
    return CONFIG.format(
        about=f"written by clipdit from a bundle of checkpoint {manifest.model.checkpoint[:12]}",
        name=name,
        max_batch=manifest.max_batch,
        height=height,
        width=width,
        warm_height=warm[0],
        warm_width=warm[1],
        delay_us=round(1000 * delay_ms),
        queue=queue,
        kind="KIND_GPU" if gpu else "KIND_CPU",
        backend=backend,
    )
