"""The cache: its rows are what the networks say, it is made anew when what it depends on changes, and it is whole or absent."""

import copy
import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdit.data import cache as cache_module
from clipdit.data.augment import Augment, view
from clipdit.data.cache import LatentCache, build_cache, fingerprint
from clipdit.data.layouts import Pair
from clipdit.data.pairs import find_pairs
from clipdit.images import to_float, write_image
from clipdit.model.autoencoder import Autoencoder, is_of_decoder
from clipdit.model.clip import ClipImageEncoder
from clipdit.testing import tiny_pipeline

SIZE = (32, 32)
VIEWS = Augment(views=3, max_rotation_degrees=10)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder(tiny_pipeline().vae.eval())


@pytest.fixture(scope="module")
def clip() -> ClipImageEncoder:
    encoder = tiny_pipeline().image_encoder
    assert encoder is not None
    return ClipImageEncoder(encoder.eval())


@pytest.fixture(scope="module")
def pairs(pairs_folder: Path) -> list[Pair]:
    return find_pairs(pairs_folder).split("train")


@pytest.fixture
def build(pairs, autoencoder, clip, tmp_path: Path) -> Callable[..., LatentCache]:
    """`build_cache` of all of these but what is changed."""

    def make(**changes) -> LatentCache:
        given = {"folder": tmp_path / "cache", "pairs": pairs, "autoencoder": autoencoder, "clip": clip, "settings": VIEWS}
        return build_cache(**{**given, "size": SIZE, **changes})

    return make


def test_rows_are_what_the_networks_say_of_each_pair_and_view(build, pairs, autoencoder, clip):
    cache = build(batch_size=5)  # which does not divide 36
    assert (cache.pairs, cache.views) == (12, 3)
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (cache.statistics.mean, cache.statistics.std))
    for number, pair in enumerate(pairs):
        for v in range(3):
            row = cache.rows(np.array([number * 3 + v]))
            source, target = (to_float(image[None]) for image in view(*pair.read(SIZE), VIEWS, pair.id, v))
            with torch.no_grad():
                tokens, pooled = clip(source)
                latents = {"target": autoencoder.encode(target), "source": autoencoder.encode(source)}
            for name, latent in latents.items():
                torch.testing.assert_close(row[name], (latent - mean) / std, rtol=0, atol=2e-2)  # float16, divided by std
            torch.testing.assert_close(row["tokens"], tokens, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(row["pooled"], pooled, rtol=2e-3, atol=2e-3)
    assert all(tensor.dtype == torch.float32 for tensor in row.values())


def test_standardised_targets_have_mean_zero_and_deviation_one_in_each_channel(build):
    cache = build()
    target = cache.rows(np.arange(36))["target"].double()
    torch.testing.assert_close(target.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(target.std((0, 2, 3)), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-3)


def test_rows_come_in_the_order_that_was_asked_for(build):
    cache = build()
    several, single = cache.rows(np.array([7, 2, 7])), cache.rows(np.array([2]))
    assert torch.equal(several["target"][0], several["target"][2])
    assert torch.equal(several["tokens"][1], single["tokens"][0])


def test_without_clip_there_are_latents_only(build):
    assert build(clip=None).rows(np.array([0])).keys() == {"target", "source"}


def test_an_unchanged_cache_is_used_again(build, monkeypatch: pytest.MonkeyPatch):
    first = build()
    monkeypatch.setattr(cache_module, "_fill", lambda *_: pytest.fail("it is there already"))
    again = build(batch_size=1)
    assert again.folder == first.folder
    assert again.statistics == first.statistics


def test_whatever_the_rows_depend_on_makes_another_cache(build, pairs, autoencoder, clip, tmp_path: Path):
    other = tiny_pipeline(seed=1)
    assert other.image_encoder is not None
    rescaled = tiny_pipeline()
    rescaled.vae.register_to_config(scaling_factor=0.5)
    copies = [replace(pair, source=(file := Path(shutil.copy2(pair.source, tmp_path))), target=file) for pair in pairs]

    def touched() -> LatentCache:
        write_image(copies[3].source, torch.zeros(3, 32, 64, dtype=torch.uint8))
        return build(pairs=copies)

    made = {
        "as it is": build(),
        "other weights of the VAE": build(autoencoder=Autoencoder(other.vae.eval())),
        "another scale of the VAE": build(autoencoder=Autoencoder(rescaled.vae.eval())),
        "another CLIP": build(clip=ClipImageEncoder(other.image_encoder.eval())),
        "no CLIP": build(clip=None),
        "another augmentation": build(settings=replace(VIEWS, max_rotation_degrees=5)),
        "fewer views": build(settings=replace(VIEWS, views=1)),
        "another size": build(size=(40, 40)),
        "fewer pairs": build(pairs=pairs[1:]),
        "another order": build(pairs=pairs[::-1]),
        "other sides": build(pairs=[replace(pair, source_half="right") for pair in pairs]),
        "files elsewhere": build(pairs=copies),
        "a file drawn anew": touched(),
    }
    folders = {name: cache.folder for name, cache in made.items()}
    assert len(set(folders.values())) == len(folders), folders
    scale = np.array(made["another scale of the VAE"].statistics.std) / np.array(made["as it is"].statistics.std)
    assert scale == pytest.approx([0.5] * 4, rel=1e-3)


def test_a_fingerprint_is_of_weights_and_configuration():
    one, same, other = tiny_pipeline().vae, tiny_pipeline().vae, tiny_pipeline(seed=1).vae
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(one.bfloat16()) != fingerprint(same)
    assert fingerprint(None) != fingerprint(same)


def test_another_decoder_makes_no_other_latents_and_so_no_other_cache(build, autoencoder):
    vae = copy.deepcopy(autoencoder.vae)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.mul_(1.5 if is_of_decoder(name) else 1.0)
    assert build(autoencoder=Autoencoder(vae)).folder == build().folder


def test_no_pairs_are_refused(build):
    with pytest.raises(ValueError, match=r"there are no pairs in this split; see `clipdit data check`"):
        build(pairs=[])


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_failure_half_way_leaves_nothing(build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException):
    def broken(*_):
        raise error

    monkeypatch.setattr(cache_module, "view", broken)
    with pytest.raises(type(error)):
        build()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_a_disk_that_is_too_small_is_named_before_anything_is_computed(build, monkeypatch, tmp_path: Path):
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(cache_module, "view", lambda *_: pytest.fail("too late"))
    with pytest.raises(OSError, match="No space left on device") as caught:
        build()
    assert Path(caught.value.filename).parent == tmp_path / "cache"
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_the_space_of_a_cache_is_taken_before_it_is_written(build, tmp_path: Path):
    """A sparse file would be found too large for the disk only while it is written, and then kills the process."""
    array = cache_module._new_array(tmp_path / "x.npy", (1000, 1000))
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= array.nbytes


@pytest.mark.parametrize("damage", ["{", '{"views": 2}', None])
def test_a_damaged_cache_is_refused_by_name(build, damage: str | None):
    cache = build()
    if damage is None:
        (cache.folder / "target.npy").write_bytes((cache.folder / "target.npy").read_bytes()[:-10])
    else:
        (cache.folder / "about.json").write_text(damage)
    with pytest.raises(ValueError, match=r"the cache .* is damaged .*; delete that folder, and it is made again") as caught:
        build()
    assert str(cache.folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kill_while_filling_leaves_no_cache_and_the_next_start_cleans_up(tiny_words, start_training, tmp_path: Path):
    kill = """
import os, signal
from clipdit.data import cache
real, count = cache.view, 0
def view(*arguments):
    global count
    count += 1
    if count == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
cache.view = view
"""
    shared = tmp_path / "shared"
    words = tiny_words(tmp_path / "run", "--pairs.cache", shared, "--train.steps", 1)
    assert start_training(words, before=kill).wait() == -signal.SIGKILL
    assert not list(shared.glob("*/about.json"))
    assert len(list(shared.glob(".*.part"))) == 1
    (shared / ".of-another-cache.part").mkdir()
    training = start_training(words)
    assert training.wait() == 0, training.output
    assert len(list(shared.glob("*/about.json"))) == 1
    assert not list(shared.glob(".*.part"))


def test_two_processes_that_want_the_same_cache_make_it_once(build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    filled, both_want_it = [], threading.Barrier(2, timeout=60)
    real = cache_module._fill

    def fill(*arguments):
        filled.append(1)
        return real(*arguments)

    monkeypatch.setattr(cache_module, "_fill", fill)
    caches = []

    def want() -> None:
        both_want_it.wait()
        caches.append(build())

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled) == 1
    assert len(caches) == 2 and caches[0].folder == caches[1].folder


def test_its_size_is_told(build):
    cache = build()
    assert cache.bytes == 36 * 2 * (2 * 4 * 8 * 8 + 16 * 24 + 16)
