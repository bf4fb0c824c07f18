"""OpenVINO computes in what the variant says, by its own account, for any batch size. Skipped where it is not installed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipdit.translator import Translator
from clipdit_export.backends.openvino import BATCHES_KEPT, OpenVinoBackend
from clipdit_export.build import build
from clipdit_export.order import Order
from clipdit_export.precision.recipe import default_recipe
from clipdit_export.processor import computes_bf16

pytestmark = pytest.mark.skipif(OpenVinoBackend.missing() is not None, reason=OpenVinoBackend.missing() or "")

SOURCES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("openvino") / "bundle"
    recipes = tuple(map(default_recipe, ("fp32", "fp16", "bf16", "int8")))
    build(checkpoint, out, Order(targets=("onnx", "openvino"), recipes=recipes))
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_products_compute_in_what_the_variant_says(precision: str, bundle: Path):
    if precision == "bf16" and not computes_bf16():
        pytest.skip("this CPU has no bfloat16")
    backend = OpenVinoBackend.open(bundle, variant=f"openvino-{precision}")
    audit = backend.audit("32x32", "step")
    assert audit.wanted == precision and audit.counts[precision] >= sum(audit.counts.values()) / 2


def test_what_this_cpu_does_not_compute_in_is_left_out_with_the_reason(bundle: Path):
    from clipdit_export.bundle import open_bundle

    assert open_bundle(bundle).manifest.skipped["openvino-fp16"] == "this CPU does not compute in fp16"


def test_batches_of_any_size_give_the_same_images_and_old_compilations_are_let_go(bundle: Path):
    backend = OpenVinoBackend.open(bundle, variant="openvino-fp32")
    with Translator(backend) as translator:
        together = translator(SOURCES, seeds=range(6))
        for size in range(1, 6):
            assert (translator(SOURCES[:size], seeds=range(size)).int() - together[:size].int()).abs().max() <= 1
        step = backend.graph("32x32", "step")
        assert len(step._by_batch) == BATCHES_KEPT


SIGNALLED = """
import faulthandler, gc, signal, sys
from pathlib import Path
import torch
from clipdit.translator import Translator
from clipdit_export.backends.openvino import OpenVinoBackend
faulthandler.enable()  # Python's handlers run on a stack of their own from here on, as under pytest
opened = [Translator(OpenVinoBackend.open(Path(sys.argv[1]), variant="openvino-fp32")) for _ in range(3)]
for translator in opened:
    translator(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), seeds=[0], steps=1)
while opened:
    opened.pop(0).backend.close()
    gc.collect()
signal.signal(signal.SIGUSR1, lambda number, frame: print("heard"))
signal.raise_signal(signal.SIGUSR1)
"""


def test_a_signal_is_heard_after_models_were_closed_in_the_order_they_were_opened(bundle: Path):
    done = subprocess.run([sys.executable, "-P", "-c", SIGNALLED, bundle], capture_output=True, text=True, check=False)
    assert done.returncode != -signal.SIGSEGV, "the stack that signals are handled on is unmapped"
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
