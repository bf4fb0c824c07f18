"""Shared by all tests: shapes and types of the package are checked at every call, and odd image files are at hand."""

import os
import subprocess
from datetime import datetime
from types import SimpleNamespace

# Kernels run in Triton's interpreter, on the CPU; with CLIPDIT_TEST_DEVICE=cuda the same tests run them on a GPU. Before anything
# imports Triton, which decides it then.
if os.environ.get("CLIPDIT_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from jaxtyping import install_import_hook
from odd_images import build_odd_images

# Before anything imports clipdit. The tower: an int is a float to every person and type checker but beartype's default.
install_import_hook("clipdit", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """About 80 odd or broken files: `folder`, and `expected`, a dict from file name to "ok" or a part of the reason for refusing
    it. Built once: read only."""
    folder = tmp_path_factory.mktemp("odd")
    return SimpleNamespace(folder=folder, expected=build_odd_images(folder))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node, error) -> None:
    """How a worker died: pytest-xdist says only that it did, and Python prints nothing where a signal ended it."""
    if not error:
        return
    process = getattr(getattr(node.gateway, "_io", None), "popen", None)
    try:
        code = process.wait(5) if process is not None else None
    except subprocess.TimeoutExpired:
        code = "none: it still runs, and its pipe is closed"
    print(f"\n{node.gateway.id} died at {datetime.now():%H:%M:%S}; exit code {code}", flush=True)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched) -> None:
    """The test it died in, at once: a run that is then ended from outside prints no summary."""
    print(f"it ran {crashitem}", flush=True)
