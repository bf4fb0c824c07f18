"""`clipdit translate`: a file, a folder or a manifest of images, through a checkpoint or bundle."""

import contextlib
import json as json_module
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from tqdm import tqdm

    from clipdit.offline import Engine, JobSettings, Progress
    from clipdit.translator import Size, Translator

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 5.0
"""Between two lines of progress where there is no terminal, seconds."""


def translate(
    input: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")],
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")],
    /,
    *,
    model: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW|own|nearest")] = None,
    fit: Literal["pad", "crop", "stretch"] = "pad",
    format: Literal["png", "webp", "jpeg"] | None = None,
    keep_suffix: bool = False,
    resume: bool = False,
    engine: str = "local",
    replicas: int | None = None,
    allow_url: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    json: bool = False,
) -> int:
    """Translate an image, a folder of images or a manifest.

    A folder becomes a folder with the same sub-folders, and a ledger in which every input is accounted for. Inputs that cannot
    be read are quarantined with a reason, the others go on; the exit code is then 3. A job that was stopped, by whatever, goes
    on with --resume. `clipdit verify OUTPUT` checks the result.

    Args:
        input: an image file, a folder, a manifest (.csv or .jsonl with a column source and optionally output, seed, id; .txt
            with one source a line), a URL of one of these that fsspec reads, such as s3://bucket/in or zip://::in.zip, or - for
            an image on standard input.
        output: an image file for an image, - for standard output; otherwise the folder for the outputs.
        model: checkpoint or bundle; the built-in one if not given.
        backend: how to run it; the best one that can run here if not given.
        device: cpu, cuda, cuda:1 ...; the best one here if not given.
        steps: sampling steps; more are slower. The checkpoint's default if not given, as for guidance and solver.
        guidance: scale of classifier-free guidance; 1 is none, at half the cost.
        solver: euler, heun, dpmpp_2m, ddim ...: what the model's objective knows.
        seed: of the image; of a folder or manifest, where each image's own seed follows from it and the image's name.
        batch_size: images in one call; 32 on CUDA and 8 elsewhere, if the backend takes so many. Halved when memory runs out.
        size: what images are fitted to, pixels, such as 256x256; "own" is each image's own, "nearest" the one of a bundle's sizes
            that is most like it. The model's if not given.
        fit: how: pad keeps the aspect and adds a border, which is cut off again; crop keeps the centre; stretch distorts.
        format: of the outputs whose name does not say it; png if not given.
        keep_suffix: name outputs a.jpg.png and not a.png, for folders in which a.jpg and a.png are different images.
        resume: go on with the job in OUTPUT. Finished images are kept if they are intact.
        engine: of a folder or manifest: local, this process; ray, Ray Data on this machine or on the cluster that RAY_ADDRESS
            names, whose nodes must share the file systems of OUTPUT and of local inputs. The outputs are the same.
        replicas: models that run at once, with --engine ray; one for each GPU if not given, else one.
        allow_url: start of URLs that a manifest may name, such as s3://bucket/; may be given several times.
        json: print the summary as JSON.
    """
    from clipdit.offline import JobSettings, sources
    from clipdit.offline.engine import engine_class
    from clipdit.offline.job import is_manifest
    from clipdit.translator import Translator

    input = sources.local_path(input)
    if sources.is_url(output):
        raise ValueError(
            f"the output is {output}; wanted a path: object stores cannot add a line to a ledger. Upload the folder after"
        )
    if sources.is_url(input):
        sources.check_url(input)
        many = is_manifest(input) or sources.is_folder(input)
    else:
        many = input != "-" and (Path(input).is_dir() or is_manifest(input))
    if engine != "local" and not many:
        raise ValueError(f"--engine {engine} is for folders and manifests; {input} is a single image")
    if engine == "local" and replicas is not None:
        raise ValueError("--replicas is for --engine ray; the local engine runs one model")
    if not many and resume:
        raise ValueError(f"--resume is for folders and manifests; {input} is a single image")
    if many and output == "-":
        raise ValueError(f"{input} is many images; standard output takes one. Give a folder for the outputs")
    if output == "-" and json:
        raise ValueError("standard output cannot take both the image and the JSON; leave one out")
    if input != "-" and not sources.is_url(input) and not Path(input).exists():
        raise ValueError(f"{input} does not exist; wanted an image, a folder or a manifest (or - for standard input)")
    settings = JobSettings(
        seed=seed,
        size=parse_size(size),
        fit=fit,
        format=_single_format(output, format) if not many else format or "png",
        keep_suffix=keep_suffix,
        steps=steps,
        guidance=guidance,
        solver=solver,
    )
    if engine != "local":
        with engine_class(engine)(model, backend=backend, device=device, replicas=replicas) as opened:
            return _translate_many(opened, input, Path(output), settings, batch_size, resume, allow_url, json)
    with Translator.open(model, backend=backend, device=device) as translator:
        if many:
            return _translate_many(translator, input, Path(output), settings, batch_size, resume, allow_url, json)
        return _translate_one(translator, input, output, settings, json)


def _translate_many(
    translator: "Translator | Engine",
    source: str,
    output: Path,
    settings: "JobSettings",
    batch_size: int | None,
    resume: bool,
    allow_urls: Sequence[str],
    json: bool,
) -> int:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from clipdit.cli import DONE, QUARANTINED
    from clipdit.offline import run_job

    display = _Display()
    with contextlib.closing(display), logging_redirect_tqdm() if sys.stderr.isatty() else contextlib.nullcontext():
        try:
            summary = run_job(
                translator,
                source,
                output,
                settings,
                batch_size=batch_size,
                resume=resume,
                allow_urls=allow_urls,
                on_progress=display.show,
            )
        except KeyboardInterrupt:
            logger.warning("interrupted; go on with the same command and --resume")
            raise
    if json:
        print(json_module.dumps({"output": str(output), **asdict(summary)}))
    else:
        made = summary.written / summary.seconds if summary.seconds else 0.0
        kept = f", {summary.kept} kept from before" if summary.kept else ""
        ignored = f", {summary.ignored} other files passed over (named in job.json)" if summary.ignored else ""
        print(f"{summary.written} written{kept}, {summary.quarantined} quarantined{ignored}; {made:.1f} images/s; see {output}")
    if summary.unreadable:
        logger.warning("%d sub-folders could not be listed; they are named in %s", summary.unreadable, output / "job.json")
    return QUARANTINED if summary.quarantined or summary.unreadable else DONE


def _translate_one(translator: "Translator", source: str, output: str, settings: "JobSettings", json: bool) -> int:
    from clipdit.cli import DONE
    from clipdit.images import encode_image, read_image, write_image
    from clipdit.offline import sources

    start_s = time.perf_counter()
    path = None if output == "-" else Path(output)
    if path is not None and (path.is_dir() or not path.suffix):
        path = path / f"{Path(source).stem if source != '-' else 'output'}.{settings.format}"
    data: bytes | Path
    if source == "-":
        data = sys.stdin.buffer.read()
    elif sources.is_url(source):
        data = sources.fetch(source)
    else:
        data = Path(source)
        if path is not None and path.exists() and path.samefile(source):
            raise ValueError(f"the output {path} is the input; choose another name")
    result = translator.translate_image(
        read_image(data),
        seed=settings.seed,
        size=settings.size,
        how=settings.fit,
        **settings.sampling,
    )
    if path is None:
        sys.stdout.buffer.write(encode_image(result, settings.format.upper()))
        return DONE
    write_image(path, result)
    if json:
        height, width = result.shape[-2:]
        seconds = time.perf_counter() - start_s
        print(
            json_module.dumps({"output": str(path), "seed": settings.seed, "width": width, "height": height, "seconds": seconds})
        )
    else:
        print(path)
    return DONE


def _single_format(output: str, format: str | None) -> str:
    """The format of a single output: what its name says, or what is asked for. ValueError when the two disagree."""
    from clipdit.images import WRITE_FORMATS

    suffix = Path(output).suffix.lower() if output != "-" and not Path(output).is_dir() else ""
    if not suffix:
        return format or "png"
    if suffix not in WRITE_FORMATS:
        raise ValueError(f"{output} ends in {suffix}; wanted one of {', '.join(WRITE_FORMATS)}, or a folder")
    if format is not None and WRITE_FORMATS[suffix] != format.upper():
        raise ValueError(f"--format is {format}, but {output} ends in {suffix}; leave one out")
    return suffix[1:]


def parse_size(text: str | None) -> "Size":
    """ "256x384" -> (256, 384), height first; "own", "nearest" and None stay."""
    if text is None:
        return None
    if text == "own" or text == "nearest":
        return text
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f'--size is "{text}"; wanted HEIGHTxWIDTH in pixels, such as 256x256, own or nearest')
    return int(sides[0]), int(sides[-1])


class _Display:
    """Progress on standard error: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self):
        self.bar: tqdm | None = None
        self.at_start: Progress | None = None
        self.start_s = self.last_s = time.monotonic()

    def show(self, progress: "Progress") -> None:
        """The first call, before the first image, starts the clock."""
        if self.at_start is None:
            self.at_start, self.start_s = progress, time.monotonic()
            if sys.stderr.isatty():
                from tqdm import tqdm

                self.bar = tqdm(total=progress.total, initial=progress.finished, unit="image", dynamic_ncols=True)
        if self.bar is not None:
            self.bar.set_postfix(quarantined=progress.quarantined, refresh=False)
            self.bar.update(progress.finished - self.bar.n)
            return
        now_s = time.monotonic()
        if now_s - self.last_s >= PROGRESS_INTERVAL_S:
            self.last_s = now_s
            rate = (progress.finished - self.at_start.finished) / (now_s - self.start_s)
            logger.info("%d of %d, %d quarantined, %.1f images/s", progress.finished, progress.total, progress.quarantined, rate)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
