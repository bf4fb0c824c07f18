"""What must not be in the repository: machines' paths, registries' addresses, pickles, giants."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ADDRESSES = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|npmmirror|deb\.debian|/(opt|work|root)/|/(home|Users)/\w")
"""Hosts of package registries (packages are named, never located) and absolute paths of somebody's machine."""

PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"}
"""Formats that can hold a pickle. Weights are .safetensors."""

MAX_LINES = 500
MAX_ASSETS_BYTES = 24 * 2**20
MAX_FILE_BYTES = 20 * 2**20


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that is, or could be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_registry_addresses_and_no_machine_paths(files: list[Path]):
    found = []
    for path in files:
        if path == Path(__file__):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # an image or weights
            text = path.read_bytes().decode("latin-1")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in ADDRESSES.finditer(text)]
    assert found == []


def test_constraints_are_names_and_numbers_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9]+(\.[0-9a-z]+)*", line)] == []


def test_nothing_that_can_hold_a_pickle(files: list[Path]):
    assert [path.name for path in files if path.suffix in PICKLES] == []


def test_modules_can_be_held_in_the_head(files: list[Path]):
    modules = [path for path in files if path.suffix == ".py" and not path.is_relative_to(ROOT / "tests")]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in modules}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_the_built_in_checkpoint_and_samples_stay_small(files: list[Path]):
    assert sum(path.stat().st_size for path in files if path.is_relative_to(ROOT / "clipdit" / "assets")) <= MAX_ASSETS_BYTES
    assert {path.name: path.stat().st_size for path in files if path.stat().st_size > MAX_FILE_BYTES} == {}
