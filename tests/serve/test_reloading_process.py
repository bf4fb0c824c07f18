"""`clipdit serve` with real weights, which are replaced behind its back: SIGHUP, and what it says and does."""

import asyncio
import os
import pty
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from serving import CLIPDIT, PNG, Running, numbered, png

from clipdit.images import read_image
from clipdit.testing import tiny_checkpoint
from clipdit.translator import Translator

IMAGE = png(numbered(7))
MANY = httpx2.Limits(max_connections=None)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """Of other weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return tiny_checkpoint(folder / "a", seed=0), tiny_checkpoint(folder / "b", seed=1)


@pytest.fixture
def link(checkpoints: tuple[Path, Path], tmp_path: Path) -> Path:
    """What the service is given: it points to the first of them."""
    link = tmp_path / "model"
    link.symlink_to(checkpoints[0])
    return link


def turn(link: Path, folder: Path) -> None:
    """In one step."""
    fresh = link.with_name("fresh")
    fresh.symlink_to(folder)
    fresh.replace(link)


def reload(service: Running) -> dict:
    """What became of a reload, as /readyz?verbose tells it."""

    def told() -> tuple[dict | None, float]:
        lines = httpx2.get(f"{service.url}/metrics").text.splitlines()
        ended = sum(float(line.split()[1]) for line in lines if line.startswith("clipdit_reloads_total"))
        return httpx2.get(f"{service.url}/readyz?verbose").json()["reload"], ended

    _, before = told()
    service.process.send_signal(signal.SIGHUP)
    for _ in range(3000):
        last, ended = told()
        if ended > before and last is not None:
            return last
        time.sleep(0.02)
    raise AssertionError("the reload does not end")


def translated(service: Running, query: str = "seed=3") -> tuple[bytes, str]:
    """(the image, what made it)."""
    answer = httpx2.post(f"{service.url}/v1/translate?{query}", content=IMAGE, headers=PNG, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.content, answer.headers["x-clipdit-model"]


def made_by(folder: Path, backend: str = "eager") -> torch.Tensor:
    with Translator.open(folder, backend=backend, device="cpu") as translator:
        return translator.translate_image(read_image(IMAGE), seed=3)


def close(image: bytes, wanted: torch.Tensor) -> bool:
    """Up to the last bits of the arithmetic, and unlike another model's."""
    return (read_image(image).float() - wanted.float()).abs().max() <= 2


@pytest.mark.slow
def test_sighup_serves_what_lies_there_now_and_refuses_what_is_damaged(
    checkpoints: tuple[Path, Path], link: Path, tmp_path: Path
):
    first, second = (made_by(folder) for folder in checkpoints)
    assert (first.float() - second.float()).abs().max() > 20
    damaged = Path(shutil.copytree(checkpoints[0], tmp_path / "damaged"))
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    service = Running("--model", str(link), "--device", "cpu", backend="eager")
    image, made = translated(service)
    assert close(image, first)
    turn(link, checkpoints[1])
    assert close(translated(service)[0], first)  # nothing happens before it is asked for
    assert reload(service)["result"] == "done"
    image, made_then = translated(service)
    assert close(image, second) and made_then != made and made_then.startswith("model@")
    for folder in (damaged, tmp_path / "nowhere"):
        turn(link, folder)
        assert reload(service)["result"] == "refused"
        assert translated(service) == (image, made_then)
        assert httpx2.get(f"{service.url}/readyz").status_code == 200
    turn(link, checkpoints[0])
    assert reload(service)["result"] == "done"
    assert translated(service)[1] == made
    service.process.send_signal(signal.SIGHUP)
    service.process.send_signal(signal.SIGTERM)  # while it is under way
    assert service.process.wait(30) == 0
    lines = [line for line in service.stop() if line["logger"] == "clipdit_serve.reloading"]
    revisions = [name.removeprefix("model@") for name in (made, made_then)]
    done, truncated, missing, back, *_ = [line["message"] for line in lines]
    assert done.startswith(f"reload done: {revisions[0]} -> {revisions[1]} (")
    assert truncated.startswith(f"reload refused: {revisions[1]} goes on: {damaged}/transformer/") and "\n" not in truncated
    assert missing.startswith(f"reload refused: {revisions[1]} goes on: ") and "model" in missing
    assert back.startswith(f"reload done: {revisions[1]} -> {revisions[0]} (")


@pytest.mark.slow
def test_a_service_ends_with_its_terminal():
    """Whoever closes a terminal wants the service in it to end; SIGHUP by anybody else is a reload there, too."""
    pid, terminal = pty.fork()
    if pid == 0:  # the child, which has the terminal
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(CLIPDIT, [str(CLIPDIT), "serve", "--backend", "fake", "--port", "0", "--linger-s", "0"])
    said = b""

    def read_until(words: bytes) -> None:
        nonlocal said
        while words not in said:
            said += os.read(terminal, 1024)

    read_until(b"edges2emoji at http://")
    os.kill(pid, signal.SIGHUP)
    read_until(b"reload done: ")
    os.close(terminal)
    for _ in range(600):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(pid, signal.SIGKILL)
        raise AssertionError("it goes on without its terminal")
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.fixture(scope="module")
def bundles(checkpoints: tuple[Path, Path]) -> Iterator[tuple[Path, Path]]:
    """Of those checkpoints, fp32 and fp16."""
    build = pytest.importorskip("clipdit_export.build").build
    from clipdit_export import assembly
    from clipdit_export.order import Order
    from clipdit_export.precision.recipe import default_recipe

    order = Order(recipes=tuple(map(default_recipe, ("fp32", "fp16"))), max_batch=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "SECONDS", 0.2)
        made = [folder.with_name(f"bundle-{folder.name}") for folder in checkpoints]
        for folder, out in zip(checkpoints, made, strict=True):
            build(folder, out, order)
    yield made[0], made[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # most of it for the export of the two
@pytest.mark.anyio
async def test_bundles_are_exchanged_at_50_requests_a_second_in_two_variants_and_a_wrong_hash_is_refused(
    bundles: tuple[Path, Path], tmp_path: Path
):
    """Test 12 of the service's promises, with the real thing: link, hash, two variants, a process of its own."""
    flipped = Path(shutil.copytree(bundles[0], tmp_path / "flipped"))
    weights = flipped / "graphs" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    link = tmp_path / "model"
    link.symlink_to(bundles[0])
    service = Running("--model", str(link), "--queue", "500", backend="onnx:onnx-fp32,onnx:onnx-fp16")
    names = ["onnx-fp32", "onnx-fp16"]
    wanted = {
        f"{translated(service, f'variant={name}')[1].split('@')[0]}@{fingerprint_of(bundle)}": made_by(bundle, f"onnx:{name}")
        for bundle in bundles
        for name in names
    }
    assert len(wanted) == 4
    answers: list[tuple[int, str, bytes]] = []

    async def one(client: httpx2.AsyncClient, number: int) -> None:
        query = f"seed=3&variant={names[number % 2]}"
        answer = await client.post(f"/v1/translate?{query}", content=IMAGE, headers=PNG)
        answers.append((answer.status_code, answer.headers.get("x-clipdit-model", ""), answer.content))

    rate, seconds = 50, 12
    async with httpx2.AsyncClient(base_url=service.url, timeout=60, limits=MANY) as client:
        asking, began = [], time.perf_counter()
        for number in range(rate * seconds):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            asking.append(asyncio.create_task(one(client, number)))
            if number == 2 * rate:
                turn(link, bundles[1])
                service.process.send_signal(signal.SIGHUP)
            elif number == 7 * rate:
                turn(link, flipped)
                service.process.send_signal(signal.SIGHUP)
        await asyncio.gather(*asking)
    while (told := httpx2.get(f"{service.url}/readyz?verbose").json()["reload"])["result"] == "under way":
        time.sleep(0.05)
    assert told["result"] == "refused"
    lines = [line["message"] for line in service.stop() if line["logger"] == "clipdit_serve.reloading"]
    assert lines[0].startswith("reload done: ") and "its hash differs" in lines[1] and len(lines) == 2
    assert [status for status, _, _ in answers] == [200] * rate * seconds
    for _, made, image in answers:
        assert close(image, wanted[made])  # it says what really made it
    for name in names:
        revisions = [made for _, made, _ in answers if f":{name}@" in made]
        assert set(revisions) == {made for made in wanted if f":{name}@" in made}
    print("\n" + "\n".join(lines))


def fingerprint_of(bundle: Path) -> str:
    from clipdit_export.manifest import read_manifest

    return read_manifest(bundle).model.checkpoint[:12]
