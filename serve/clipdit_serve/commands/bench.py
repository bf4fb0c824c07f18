"""`clipdit bench serve`: latency of the service against load."""

import json as json_module
import os
from pathlib import Path
from typing import Literal


def serve(
    *,
    out: Path,
    url: str | None = None,
    model: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    max_batch: int | None = None,
    queue: int | None = None,
    image: Path | None = None,
    steps: int | None = None,
    rates: tuple[float, ...] = (),
    seconds: float = 15.0,
    at_least: int = 50,
    arrivals: Literal["poisson", "even"] = "poisson",
    callers: int = 16,
    capacity_s: float = 8.0,
    timeout_s: float = 90.0,
    json: bool = False,
) -> int:
    """Latency of the service against load: requests at fixed rates, whether it keeps up or not.

    Asks the service at --url, or starts one for the time. Writes OUT.json after each rate, and a plot beside it. With the
    environment variable CLIPDIT_API_KEY set, requests carry that key.

    Args:
        out: where the numbers go, a .json file.
        url: of a service that runs, such as http://127.0.0.1:8000.
        model: checkpoint or bundle of the service that is started; the built-in one if not given.
        backend: likewise, how to run it; the best one that can run here if not given.
        device: likewise: cpu, cuda, cuda:1 ...
        max_batch: likewise, images in one call of the model.
        queue: likewise, requests that may wait.
        image: what is sent; a drawing of the package if not given.
        steps: of the solver; the model's own number if not given.
        rates: requests a second; 0.25 to 2 times what a closed loop gets if none are given.
        seconds: each rate is kept so long.
        at_least: or longer, until so many requests are sent; of fewer than 100 answers p99 is the slowest.
        arrivals: as of callers who know nothing of one another, or evenly spaced.
        callers: of the closed loop, each of whom asks again when he has his answer.
        capacity_s: how long that goes on.
        timeout_s: without an answer for so long a request counts as hung.
        json: print the record as JSON.
    """
    from clipdit.cli import DONE
    from clipdit.files import write_atomically
    from clipdit_serve.load.measuring import Plan
    from clipdit_serve.load.process import running
    from clipdit_serve.load.report import heading, plot, table

    if out.suffix != ".json":
        raise ValueError(f"{out} is no .json file; give a file for the numbers")
    options = {"--model": model, "--backend": backend, "--device": device, "--max-batch": max_batch, "--queue": queue}
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    if url is not None and words:
        raise ValueError(f"--url asks a service that runs, {words[0]} is for one that is started here; leave out one of them")
    plan = Plan(
        rates=rates,
        seconds=seconds,
        at_least=at_least,
        arrivals=arrivals,
        callers=callers,
        capacity_s=capacity_s,
        timeout_s=timeout_s,
    )
    ask = _ask(image, steps)

    def write(record: dict) -> None:
        write_atomically(out, json_module.dumps(record, indent=2) + "\n")

    if url is not None:
        record = _measure(url, ask, plan, None, write)
    else:
        with running(words) as started:
            record = _measure(started, ask, plan, words, write)
    write_atomically(out.with_suffix(".png"), plot(record))
    if json:
        print(json_module.dumps(record))
    else:
        print("\n".join([heading(record), "", table(record)]))
        print(f"wrote {out} and {out.with_suffix('.png').name}")
    return DONE


def _ask(image: Path | None, steps: int | None):
    """ValueError for what is no image."""
    from PIL import Image

    from clipdit.backend import builtin_checkpoint
    from clipdit.images import read_image
    from clipdit_serve.load.measuring import Ask

    file = image or min((builtin_checkpoint().parent / "samples" / "source").glob("*.png"))
    read_image(file)
    with Image.open(file) as opened:
        media_type = str(opened.get_format_mimetype())
    return Ask(image=file.read_bytes(), media_type=media_type, steps=steps)


def _measure(url: str, ask, plan, started: list[str] | None, write) -> dict:
    """The record, with where it comes from. started: the options of a service of ours."""
    import asyncio
    from urllib.parse import urlsplit

    from clipdit.provenance import provenance
    from clipdit_serve.load.measuring import check, measure, open_session

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"--url is {url}; wanted an address such as http://127.0.0.1:8000")
    address = url.rstrip("/")

    async def ask_it() -> dict:
        async with open_session(os.environ.get("CLIPDIT_API_KEY")) as session:
            service = await check(session, address, ask, timeout_s=plan.timeout_s) | {"started": started}
            head = {"provenance": provenance(), "service": service}
            return head | await measure(session, address, ask, plan, each=lambda record: write(head | record))

    return asyncio.run(ask_it())
