"""Looks for uploads that the decoder neither takes nor refuses: `make fuzz`, or

    python tests/serve/fuzz_decoding.py FOLDER --seconds 60

Atheris (libFuzzer) changes the bytes of a corpus and keeps what reaches new lines of Pillow's Python and of ours; Pillow's C is
run, but not watched. The first corpus is tests/support/bad_images.py. FOLDER keeps it, and the inputs that broke something
(`crash-*`, `timeout-*`, `oom-*`): each becomes a case of bad_images.py. The last line says how many were tried, as JSON.
"""

import argparse
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"

MOST_BYTES = 2**16
"""Of an input: longer ones take longer and say the same."""

GROWTH_MB = 512
"""More memory than at the start is a failure."""

INPUT_S = 5
"""An input that takes longer is one, too."""


def write_corpus(folder: Path) -> int:
    """How many inputs there are."""
    from bad_images import bad_images

    folder.mkdir(parents=True, exist_ok=True)
    uploads = [data for data, _ in bad_images().values() if len(data) <= MOST_BYTES]
    for data in uploads:
        (folder / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    return len(uploads)


def check(data: bytes) -> None:
    """AssertionError, or whatever the decoder raises, where it breaks its word."""
    from clipdit.images import ImageError, decode_image, image_size
    from clipdit_serve.settings import FORMATS, ServeSettings

    settings = ServeSettings()
    try:
        decoded = decode_image(data, max_pixels=settings.max_pixels, max_side=settings.max_side, formats=FORMATS, animated=False)
    except ImageError as error:
        assert error.reason and "\n" not in error.reason
        return
    channels, height, width = decoded.pixels.shape
    assert channels == 3 and str(decoded.pixels.dtype) == "torch.uint8" and decoded.pixels.is_contiguous()
    assert 0 < height * width <= settings.max_pixels and max(height, width) <= settings.max_side
    assert image_size(data) == (height, width)


def fuzz(arguments: list[str]) -> None:
    """In a process of its own, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["PIL", "clipdit.decoding"]):
        for name in ("clipdit.images", *(f"PIL.{format}ImagePlugin" for format in ("Jpeg", "Mpo", "Png", "WebP"))):
            importlib.import_module(name)
    atheris.Setup(arguments, check)
    atheris.Fuzz()


def start_mb() -> int:
    """What a process has in memory before the first input; measured in one."""
    code = "import atheris, resource, clipdit.images; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    corpus = given.folder / "corpus"
    seeds = write_corpus(corpus)
    at_start_mb = start_mb()
    words = [
        f"-max_total_time={given.seconds}", f"-max_len={MOST_BYTES}", f"-timeout={INPUT_S}", f"-seed={given.seed}",
        f"-rss_limit_mb={at_start_mb + GROWTH_MB}", f"-artifact_prefix={given.folder}/", "-print_final_stats=1", str(corpus),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", *words], env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    signal.signal(signal.SIGTERM, lambda *_: process.kill())
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        lines.append(line)
    status = process.wait()
    stats = {
        line.split()[0].removeprefix("stat::").rstrip(":"): int(line.split()[-1]) for line in lines if line.startswith("stat::")
    }
    covered = [line.partition("cov: ")[2].split()[0] for line in lines if "cov: " in line]
    found = sorted(path.name for path in given.folder.iterdir() if path.name.startswith(("crash-", "timeout-", "oom-", "leak-")))
    print(
        json.dumps(
            {
                "status": status,
                "seeds": seeds,
                "corpus": len(list(corpus.iterdir())),
                "executions": stats.get("number_of_executed_units"),
                "covered": int(covered[-1]) if covered else None,
                "covered_by_seeds": int(covered[0]) if covered else None,
                "slowest_s": stats.get("slowest_unit_time_sec"),
                "peak_mb": stats.get("peak_rss_mb"),
                "start_mb": at_start_mb,
                "found": found,
            }
        )
    )
    return 1 if found or status else 0


if __name__ == "__main__":
    sys.path.append(str(SUPPORT))
    if sys.argv[1:2] == ["--child"]:
        fuzz([sys.argv[0], *sys.argv[2:]])
    sys.exit(main())
