"""The tests of the kernels are tested: each bug of a list, put into the source, must make them fail. Run by `make mutants`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

import clipdit_kernels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SOURCE = Path(clipdit_kernels.__file__).parent
TESTS = Path(__file__).parent


def outcome(package: Path, file: str) -> subprocess.CompletedProcess:
    """Run the tests of a file on the package in a folder, up to the first that fails."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(TESTS / f"test_{file}.py"),
    ]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=TESTS.parents[1], capture_output=True, text=True)


def mutated(mutant: Mutant, folder: Path) -> Path:
    package = folder / "clipdit_kernels"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / f"{mutant.file}.py"
    source = path.read_text()
    assert mutant.old in source, f"{mutant.file}.py no longer says {mutant.old!r}; bring the list up to date"
    path.write_text(source.replace(mutant.old, mutant.new, 1))
    return package


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.bug}")
def test_a_seeded_bug_is_found(mutant: Mutant, tmp_path: Path):
    done = outcome(mutated(mutant, tmp_path), mutant.tests or mutant.file)
    assert done.returncode != 0, f"not found: {mutant.bug}"
    # a failed assertion, or a process that a wild write has killed; not one that could not be read
    said = done.stdout + done.stderr
    assert done.returncode < 0 or ("1 failed" in said and "SyntaxError" not in said), said[-2000:]


def test_the_same_tests_pass_on_the_sources_as_they_are(tmp_path: Path):
    """So it is the bug that they find, and the copy that they test."""
    shutil.copytree(SOURCE, tmp_path / "clipdit_kernels")
    (tmp_path / "clipdit_kernels" / "norm.py").write_text("raise RuntimeError('the copy is what is imported')")
    assert "the copy is what is imported" in outcome(tmp_path / "clipdit_kernels", "norm").stdout
    shutil.copy(SOURCE / "norm.py", tmp_path / "clipdit_kernels" / "norm.py")
    assert outcome(tmp_path / "clipdit_kernels", "norm").returncode == 0
