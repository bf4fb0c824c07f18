"""Shared by all tests: shapes and types of the package are checked at every call, and odd image files are at hand."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from jaxtyping import install_import_hook

# Before anything imports clipdit. The tower: an int is a float to every person and type checker but beartype's default.
install_import_hook("clipdit", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """About 80 odd or broken files: `folder`, and `expected`, a dict from file name to "ok" or a part of the reason for refusing
    it. Built once: read only."""
    spec = importlib.util.spec_from_file_location("odd_images", Path(__file__).with_name("odd_images.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("odd")
    return SimpleNamespace(folder=folder, expected=module.build_odd_images(folder))
