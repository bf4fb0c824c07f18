"""One export of a tiny checkpoint, shared: it takes seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from clipdit.testing import tiny_checkpoint
from clipdit_export import assembly, processor
from clipdit_export.build import build
from clipdit_export.order import Order
from clipdit_export.precision.recipe import default_recipe


@pytest.fixture(scope="session", autouse=True)
def short_timings() -> Iterator[None]:
    """Nothing here asks which variant is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "SECONDS", 0.2)
        yield


@pytest.fixture(scope="session", autouse=True)
def dot_products(tmp_path_factory) -> Iterator[None]:
    """What is opened first does not depend on the CPU that tests run on; test_processor.py says what does."""
    with pytest.MonkeyPatch.context() as patch:
        if processor.CPUINFO.exists():
            text = processor.CPUINFO.read_text(encoding="utf-8")
            pretended = tmp_path_factory.mktemp("processor") / "cpuinfo"
            pretended.write_text(f"{text}\nflags : avx512_vnni\n", encoding="utf-8")
            patch.setattr(processor, "CPUINFO", pretended)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("export") / "checkpoint")


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Path:
    """fp32, fp16 and int8. Not to be changed; copy it for that."""
    out = checkpoint.with_name("bundle")
    build(checkpoint, out, Order(recipes=tuple(map(default_recipe, ("fp32", "fp16", "int8"))), max_batch=4))
    return out
