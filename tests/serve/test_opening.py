import shutil
import threading
import time
from pathlib import Path

import pytest

from clipdit import translator
from clipdit.testing import tiny_checkpoint
from clipdit_serve import opening
from clipdit_serve.opening import opener


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path]:
    """Checkpoints of other weights."""
    folder = tmp_path_factory.mktemp("two")
    return tiny_checkpoint(folder / "a", seed=0), tiny_checkpoint(folder / "b", seed=1)


def test_a_link_is_followed_anew_at_each_opening(two: tuple[Path, Path], tmp_path: Path):
    link = tmp_path / "model"
    link.symlink_to(two[0])
    open_model = opener(str(link), backend="eager", device="cpu")
    first = open_model().backend.fingerprint
    link.unlink()
    link.symlink_to(two[1])
    second = open_model().backend.fingerprint
    assert first != second
    assert [first, second] == [opener(str(folder), backend="eager", device="cpu")().backend.fingerprint for folder in two]


def test_a_folder_that_is_replaced_while_it_is_read_is_refused(two: tuple[Path, Path], tmp_path: Path, monkeypatch):
    """Else the weights could be of one model and the fingerprint of the other."""
    folder = tmp_path / "model"
    shutil.copytree(two[0], folder)
    open_folder = translator.open_backend

    def replace_meanwhile(*args, **options):
        opened = open_folder(*args, **options)
        folder.rename(tmp_path / "old")
        shutil.copytree(two[1], folder)
        return opened

    monkeypatch.setattr(translator, "open_backend", replace_meanwhile)
    with pytest.raises(ValueError, match="was replaced while it was read; try again"):
        opener(str(folder), backend="eager", device="cpu")()
    monkeypatch.undo()
    opener(str(folder), backend="eager", device="cpu")()


def test_models_are_opened_one_at_a_time(monkeypatch):
    """Libraries that load networks patch torch's classes for that time."""
    inside, most = 0, 0

    def slowly(*args, **options):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        raise ValueError("enough")

    monkeypatch.setattr(opening.Translator, "open", slowly)

    def attempt() -> None:
        with pytest.raises(ValueError, match="enough"):
            opener(None)()

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)
