"""`clipdit export`: a checkpoint as a bundle that runs in production."""

from pathlib import Path
from typing import Literal, get_args


def export(
    *,
    out: Path,
    model: str | None = None,
    targets: str = "onnx",
    precision: str = "fp32",
    gpus: str = "",
    engine: str = "",
    sizes: str | None = None,
    unroll: tuple[int, ...] = (),
    opset: Literal["measured", "20", "23"] = "measured",
    max_batch: int = 16,
    calibration: Path | None = None,
    images: int = 16,
    recipe: tuple[Path, ...] = (),
    max_st_lpips: float = 0.02,
    search: bool = False,
    quantizer: Literal["clipdit", "modelopt"] = "clipdit",
    modelopt_python: Path | None = None,
    force: bool = False,
    sign: Path | None = None,
    zip: bool = False,
    triton: Path | None = None,
    json: bool = False,
) -> int:
    """Export a checkpoint to a bundle: graphs and engines in every precision asked for, measured against fp32.

    Args:
        out: the bundle folder; one that is there is replaced when the new one is whole.
        model: checkpoint folder; the built-in one if not given.
        targets: what to build, separated by commas: onnx, openvino, tensorrt, tensorrt-rtx.
        precision: which variants, separated by commas: fp32, fp16, bf16, int8, fp8, int8-weights, int4-weights.
        gpus: compute capabilities of TensorRT-RTX engines, separated by commas: sm75, sm80, sm86, sm89, sm120, sm121.
        engine: how engines are built, separated by commas: refittable; stripped (without weights, which then come from the
            bundle's graphs); for TensorRT also hardware-compatible (Ampere and later), version-compatible (later versions of it).
        sizes: of the images that it shall take, HEIGHTxWIDTH or one side, separated by commas; the checkpoint's own if not given.
        unroll: numbers of steps for which a whole translation becomes one graph, too, with the checkpoint's solver and guidance.
        opset: of the step: 20 spells attention out, 23 has it as one node; measured takes what ONNX Runtime runs faster here.
        max_batch: images in one call, at most.
        calibration: a folder of pairs to calibrate on (train) and to judge by (test); the package's samples if not given.
        images: at most so many to calibrate on, and as many others to judge by; large models take their time.
        recipe: JSON files of further variants, as an export writes them.
        max_st_lpips: a variant whose images are farther from fp32's is never the default.
        search: for a quantised variant that is not good enough, find the nodes that have to stay as they are.
        quantizer: modelopt adds to every int8 and fp8 variant one of the same recipe that NVIDIA ModelOpt has quantised.
        modelopt_python: the Python that has nvidia-modelopt[onnx], which cannot be this one.
        force: build again what is up to date.
        sign: a private Ed25519 key, PEM; the bundle is signed with it. CLIPDIT_TRUSTED_KEY=PUBLIC.pem then refuses others.
        zip: write OUT.zip, too: the same as one file, which opens like the folder.
        triton: a model repository of Triton Inference Server, into which the bundle is written as a model of its name.
        json: print the manifest as JSON.
    """
    from clipdit.archives import ENDING, pack
    from clipdit.backend import BUILT_IN, locate
    from clipdit.cli import DONE
    from clipdit_export.build import build
    from clipdit_export.engines.builder import Flag
    from clipdit_export.manifest import Target, to_json
    from clipdit_export.order import Order
    from clipdit_export.precision.recipe import default_recipe, read_recipe
    from clipdit_export.quality.gate import Budget
    from clipdit_export.signature import sign as sign_bundle
    from clipdit_export.triton_repository import write_repository
    from clipdit_export.words import describe

    known: dict[str, Target] = {target: target for target in get_args(Target)}
    wanted = _words(targets)
    if unknown := [target for target in wanted if target not in known]:
        raise ValueError(f"--targets has {unknown[0]}; wanted some of {', '.join(known)}")
    flags: dict[str, Flag] = {flag.replace("_", "-"): flag for flag in get_args(Flag)}
    chosen = _words(engine)
    if unknown := [word for word in chosen if word not in flags]:
        raise ValueError(f"--engine has {unknown[0]}; wanted some of {', '.join(flags)}")
    order = Order(
        targets=tuple(known[target] for target in wanted),
        recipes=(*map(default_recipe, _words(precision)), *map(read_recipe, recipe)),
        gpus=tuple(_words(gpus)),
        engine=tuple(flags[word] for word in chosen),
        sizes=None if sizes is None else tuple(map(_size, _words(sizes))),
        unroll=unroll,
        opset=None if opset == "measured" else int(opset),
        max_batch=max_batch,
        calibration=calibration,
        images=images,
        search=search,
        quantizer=quantizer,
        modelopt_python=modelopt_python,
        budget=Budget(st_lpips=max_st_lpips),
    )
    manifest = build(Path(locate(model or BUILT_IN)), out, order, force=force)
    if sign is not None:
        sign_bundle(out, sign)
    if zip:
        pack(out, out.with_name(f"{out.name}{ENDING}"))
    if triton is not None:
        write_repository(out, triton)
    print(to_json(manifest) if json else describe(str(out), manifest))
    return DONE


def _words(text: str) -> list[str]:
    """ "a, b" -> ["a", "b"], each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _size(word: str) -> tuple[int, int]:
    """ "256" or "256x192" (height first) -> (height, width)."""
    sides = word.split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise ValueError(f'--sizes has "{word}"; wanted a side in pixels such as 256, or HEIGHTxWIDTH')
    return int(sides[0]), int(sides[-1])
