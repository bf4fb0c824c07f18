"""Decoding processes: what kills them costs one upload."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import wild_decoders
from bad_images import png as made_png
from serving import numbered, png

from clipdit.fake_backend import FakeBackend
from clipdit_serve.decoding import DecodePool
from clipdit_serve.errors import ApiError
from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio

LIMITS = FakeBackend(native_size=(64, 64)).limits


async def decode(pool: DecodePool, data: bytes) -> torch.Tensor:
    return (await pool.decode(data, LIMITS, None, "pad")).image


@pytest.fixture
async def pool():
    pool = DecodePool(ServeSettings(decode_processes=1, decode_timeout_s=0.5, decode_memory_bytes=2**28))
    await pool.start()
    yield pool
    pool.close()


@pytest.fixture
async def patient_pool():
    """For what takes a while on a busy machine."""
    pool = DecodePool(ServeSettings(decode_processes=1, decode_timeout_s=60, decode_memory_bytes=2**28))
    await pool.start()
    yield pool
    pool.close()


async def test_an_upload_comes_back_fitted_with_its_notes_and_the_way_back(decoder):
    upload = await decoder.decode(png(torch.full((3, 50, 120), 9, dtype=torch.uint8)), LIMITS, None, "pad")
    assert upload.image.shape == (3, 64, 64) and upload.image.unique().tolist() == [9]
    assert upload.placement.restore(upload.image).shape == (3, 50, 120)
    assert upload.notes == ()
    again = await decoder.decode(png(numbered(5)), LIMITS, (32, 64), "stretch")
    assert again.image.shape == (3, 32, 64)


async def test_what_takes_too_long_is_killed_and_the_next_upload_is_decoded(pool: DecodePool):
    began = time.perf_counter()
    with pytest.raises(TimeoutError):
        await pool._call(partial(time.sleep, 60), 0.5)
    assert torch.equal(await decode(pool, png(numbered(1))), numbered(1))
    assert time.perf_counter() - began < 5


async def test_a_decoder_that_hangs_is_the_uploads_fault(pool: DecodePool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clipdit_serve.decoding._decode", wild_decoders.hang)
    with pytest.raises(ApiError, match=r"was not decoded within 0.5 s") as caught:
        await decode(pool, b"")
    assert caught.value.code == "image_timeout"


async def test_a_decoder_that_crashes_is_the_uploads_fault(pool: DecodePool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clipdit_serve.decoding._decode", wild_decoders.crash)
    with pytest.raises(ApiError, match="the decoder crashed") as caught:
        await decode(pool, b"")
    assert caught.value.code == "image_damaged"
    monkeypatch.undo()
    assert torch.equal(await decode(pool, png(numbered(2))), numbered(2))


async def test_callers_who_leave_cost_no_process(patient_pool: DecodePool, tmp_path: Path):
    pid = await patient_pool._call(os.getpid)
    begun, waiting = (
        asyncio.create_task(patient_pool._call(partial(wild_decoders.leave_a_mark, tmp_path / n, 0.5))) for n in "ab"
    )
    while not (tmp_path / "a").exists():
        await asyncio.sleep(0.01)
    for task in (begun, waiting):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await patient_pool._call(os.getpid) == pid


async def test_more_memory_than_allowed_is_refused_and_the_process_lives(patient_pool: DecodePool):
    """256 MiB more than at the start; 15.9 million pixels of 16 bits need 381 as float64 alone, by its 31 KiB."""
    side = 3990
    bomb = made_png(side, side, 16, 0, bytes((2 * side + 1) * side))
    assert len(bomb) < 64 * 2**10
    pid = await patient_pool._call(os.getpid)
    with pytest.raises(ApiError, match="needs more memory than there is") as caught:
        await decode(patient_pool, bomb)
    assert caught.value.code == "image_too_large"
    assert await patient_pool._call(os.getpid) == pid


async def test_processes_that_were_killed_while_idle_are_replaced(pool: DecodePool):
    """As the kernel does when memory is short."""
    for _ in range(2):
        os.kill(await pool._call(os.getpid), signal.SIGKILL)
        await asyncio.sleep(0.5)
        assert torch.equal(await decode(pool, png(numbered(3))), numbered(3))


async def test_no_process_knows_the_key_and_none_is_left_behind():
    pool = DecodePool(ServeSettings(api_key="a-secret", decode_processes=2))
    await pool.start()
    assert pool._settings.api_key is None
    pids = {await pool._call(os.getpid) for _ in range(20)}
    pool.close()
    assert not pool.ready
    await asyncio.sleep(0.2)
    assert [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()] == []


@pytest.mark.slow
def test_a_minute_of_fuzzing_finds_no_upload_that_is_neither_taken_nor_refused(tmp_path: Path):
    """An exception other than ImageError, more than 5 s, or 512 MB more than at the start would be such a find."""
    pytest.importorskip("atheris")
    program = Path(__file__).with_name("fuzz_decoding.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path, "--seconds", "60"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{told}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert told["found"] == [] and told["seeds"] > 120
    assert told["executions"] > 5000 and told["covered"] >= told["covered_by_seeds"] > 500  # it did look
    assert told["slowest_s"] <= 5 and told["peak_mb"] - told["start_mb"] <= 512
