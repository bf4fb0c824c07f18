"""Who may import whom: the contracts of [tool.importlinter] hold, and none is forgotten when a satellite moves in."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
SATELLITES = {"export": "clipdit_export", "kernels": "clipdit_kernels", "serve": "clipdit_serve"}


def present_satellites() -> list[str]:
    return [package for folder, package in SATELLITES.items() if (ROOT / folder / package / "__init__.py").exists()]


def test_the_import_contracts_hold():
    # a process of its own: import-linter puts the folder it runs in on sys.path
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_core_is_forbidden_every_satellite_even_those_that_do_not_exist_yet():
    (contract,) = [c for c in SETTINGS["tool"]["importlinter"]["contracts"] if c["name"] == "the core imports no satellite"]
    assert contract["source_modules"] == ["clipdit"]
    assert set(contract["forbidden_modules"]) == set(SATELLITES.values())


def test_satellites_that_exist_are_linted_and_independent():
    linter, satellites = SETTINGS["tool"]["importlinter"], present_satellites()
    assert linter["root_packages"] == ["clipdit", *satellites]
    if len(satellites) > 1:
        independent = [set(c["modules"]) for c in linter["contracts"] if c["type"] == "independence"]
        assert set(satellites) in independent


def test_every_folder_of_packages_is_searched_by_setuptools_and_the_type_checker():
    assert set(SETTINGS["tool"]["setuptools"]["packages"]["find"]["where"]) == {".", *SATELLITES}
    assert set(SETTINGS["tool"]["basedpyright"]["extraPaths"]) == set(SATELLITES)
