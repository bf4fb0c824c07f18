"""What importing does and does not do."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import clipdit

ROOT = Path(__file__).parents[2]

IMPORT_EVERYTHING = """
import json, logging, os, pkgutil, random, sys, threading
import accelerate, cv2, diffusers, numpy, torch, transformers   # what they do on import is theirs
import clipdit

def state():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "sys.path": list(sys.path),
        "root log handlers": len(logging.getLogger().handlers),
        "threads": threading.active_count(),
        "default dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "torch threads": torch.get_num_threads(),
        "torch seed": torch.initial_seed(),
        "torch random": torch.get_rng_state().sum().item(),
        "python random": hash(random.getstate()),
        "numpy random": int(numpy.random.get_state()[1].sum()),
    }

before = state()
names = [module.name for module in pkgutil.walk_packages(clipdit.__path__, "clipdit.")]
for name in names:
    __import__(name)
modules = {name: sys.modules[name] for name in names}
missing = [f"{name}.{word}" for name, m in modules.items() for word in getattr(m, "__all__", []) if not hasattr(m, word)]
undocumented = [name for name, m in modules.items() if not m.__doc__ and os.path.getsize(m.__file__)]
after = state()
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "missing": missing,
    "undocumented": undocumented,
    "count": len(names),
}))
"""


def test_no_folder_of_ours_is_taken_for_the_package_kernels():
    """Hugging Face publishes a package `kernels` that transformers and diffusers look for."""
    found = importlib.util.find_spec("kernels")
    if found is not None:
        places = [found.origin, *(found.submodule_search_locations or [])]
        assert not [place for place in places if place and Path(place).resolve().is_relative_to(ROOT) and ".venv" not in place]


def test_the_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_importing_the_package_itself_imports_nothing_heavy():
    code = "import sys, clipdit; sys.exit(bool({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_every_module_changes_nothing_and_says_nothing(tmp_path: Path):
    environment = os.environ | {"PYTHONSAFEPATH": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["count"] > 20
    assert report["changed"] == []
    assert report["missing"] == [], "names in __all__ that do not exist"
    assert report["undocumented"] == [], "a module opens with the sentence that says what it is for"
    assert list(tmp_path.iterdir()) == []


def test_the_package_under_test_is_the_one_of_this_checkout():
    assert Path(clipdit.__file__).resolve().is_relative_to(ROOT)
