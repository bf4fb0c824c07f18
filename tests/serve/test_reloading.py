"""A model that is replaced while it serves: nobody notices but by the revision that his answer carries."""

import asyncio
import itertools
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable

import httpx2
import pytest
import torch
from serving import PNG, Gate, Identity, number_of, numbered, png, served, until

from clipdit.backend import Limits
from clipdit.fake_backend import FakeBackend
from clipdit.images import read_image
from clipdit.translator import Size
from clipdit_serve.app import create_app
from clipdit_serve.batching import InProcessEngine
from clipdit_serve.engine import Answer, Task
from clipdit_serve.reloading import Reloads, check_limits
from clipdit_serve.server import Server, bind
from clipdit_serve.settings import ServeSettings
from clipdit_serve.variants import Variants

pytestmark = pytest.mark.anyio


class Shelf:
    """Opens what lies on it: the models that `put` was given, the last one again and again."""

    def __init__(self, *models: Callable[[], Identity]):
        self.models, self.opened = list(models), 0

    def __call__(self) -> Identity:
        self.opened += 1
        return self.models[min(self.opened, len(self.models)) - 1]()


def raises(error: BaseException) -> Callable[[], Identity]:
    def fail() -> Identity:
        raise error

    return fail


class BadWarmUp(Identity):
    """Opens well, and cannot be called."""

    def __call__(self, source_u8: torch.Tensor, *, seeds, **sampling) -> torch.Tensor:
        raise RuntimeError("no kernel image is\navailable")


async def ready(open_model: Callable[[], Identity], settings: ServeSettings | None = None) -> InProcessEngine:
    engine = InProcessEngine(open_model, settings or ServeSettings(max_wait_ms=0))
    engine.start(lambda report: None)
    await until(lambda: engine.health().state == "ready")
    return engine


async def ask(engine: InProcessEngine, number: int, **sampling) -> Answer:
    with engine.admit():
        return await engine.translate(Task(image=numbered(number), seed=number, **sampling))


async def warm_beside(engine: InProcessEngine) -> None:
    """The new model waits for the batch that runs. Nobody but a test asks for that moment, so no route tells it."""
    await until(lambda: engine._successor is not None)


async def reloaded(engine: InProcessEngine) -> str:
    """The fingerprint of the new one."""
    return (await asyncio.wrap_future(engine.reload())).fingerprint


async def test_the_batch_that_runs_is_the_old_models_and_all_that_wait_are_the_new_ones():
    gate, order = Gate(), []
    old = Identity(before=lambda images: (order.append("old"), gate(images)), fingerprint="old")
    new = Identity(before=lambda images: order.append("new"), fingerprint="new")
    engine = await ready(Shelf(lambda: old, lambda: new), ServeSettings(max_wait_ms=0, max_batch=2))
    asking = [asyncio.create_task(ask(engine, 0))]
    await until(gate.reached.is_set)
    asking += [asyncio.create_task(ask(engine, number)) for number in range(1, 8)]
    await until(lambda: engine.health().waiting == 7)
    coming = engine.reload()
    await warm_beside(engine)
    assert not coming.done() and engine.model is not None and engine.model.fingerprint == "old"
    gate.opened.set()
    answers = await asyncio.gather(*asking)
    assert [number_of(answer.image) for answer in answers] == list(range(8))
    assert [answer.fingerprint for answer in answers] == ["old"] + ["new"] * 7
    assert order == ["old", "new", "new", "new", "new"]
    assert coming.result(5).fingerprint == "new" == engine.model.fingerprint
    engine.close()


async def test_the_old_model_is_closed_and_its_memory_given_back():
    shelf = Shelf(Identity)
    engine = await ready(shelf)
    made: list[weakref.ref] = []

    def note() -> Identity:
        model = Identity()
        made.append(weakref.ref(model))
        return model

    shelf.models = [note]
    await reloaded(engine)
    (first,) = made
    model = first()
    assert model is not None
    backend = model.backend
    del model
    await reloaded(engine)
    await until(lambda: first() is None)
    assert len(made) == 2 and made[1]() is not None
    with pytest.raises(RuntimeError, match="closed"):
        backend.encode(numbered(1)[None])
    engine.close()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (raises(ValueError("weights.bin is not\nthe exported one")), "weights.bin is not the exported one"),
        (raises(FileNotFoundError(2, "No such file", "bundle")), "[Errno 2] No such file: 'bundle'"),
        (raises(SystemExit(3)), "SystemExit: 3"),
        (raises(torch.OutOfMemoryError("out of memory")), "OutOfMemoryError: out of memory"),
        (BadWarmUp, "RuntimeError: no kernel image is available"),
    ],
    ids=["hash", "folder", "exit", "memory", "warm-up"],
)
async def test_what_cannot_be_opened_or_warmed_is_refused_in_one_line_and_the_old_one_goes_on(bad, said: str):
    engine = await ready(Shelf(lambda: Identity(fingerprint="old"), bad, lambda: Identity(fingerprint="new")))
    with pytest.raises(ValueError) as caught:
        await reloaded(engine)
    assert str(caught.value) == said
    assert caught.value.__cause__ is None  # its traceback would hold the model
    answer = await ask(engine, 5)
    assert (number_of(answer.image), answer.fingerprint, engine.failure) == (5, "old", None)
    assert await reloaded(engine) == "new"  # and the next one finds the way free
    engine.close()


async def test_images_that_were_fitted_to_the_old_model_are_never_given_to_one_that_takes_others():
    class Large(Identity):
        def __init__(self):
            super().__init__()
            self.backend = FakeBackend(native_size=(128, 128))

    engine = await ready(Shelf(Identity, Large))
    with pytest.raises(ValueError, match="made for 128 x 128 and images are fitted to 64 x 64; start the service anew"):
        await reloaded(engine)
    assert number_of((await ask(engine, 1)).image) == 1
    engine.close()


def limits(**changes) -> Limits:
    given = {"device": torch.device("cpu"), "dtype": torch.float32, "max_batch": 8, "sizes": None, "multiple": 8}
    return Limits(**(given | {"native_size": (64, 64), "latent_channels": 4, "downscale": 8} | changes))


SIZES = ((64, 64), (64, 96))


@pytest.mark.parametrize(
    ("size", "old", "new", "fits"),
    [
        (None, {}, {"max_batch": 1, "dtype": torch.bfloat16}, True),
        (None, {}, {"native_size": (128, 128)}, False),
        (None, {"sizes": SIZES}, {"sizes": SIZES[:1]}, True),
        ((96, 96), {}, {"native_size": (128, 128)}, True),
        ((96, 96), {}, {"sizes": SIZES}, False),
        ((72, 72), {}, {"multiple": 16}, False),
        ("own", {}, {"multiple": 4}, True),
        ("own", {}, {"multiple": 16}, False),
        ("own", {}, {"sizes": SIZES}, False),
        ("own", {"sizes": SIZES}, {"sizes": SIZES[:1]}, False),
        ("nearest", {"sizes": SIZES[:1]}, {"sizes": SIZES}, True),
        ("nearest", {"sizes": SIZES}, {"sizes": SIZES[:1]}, False),
        ("nearest", {"sizes": SIZES}, {"sizes": None}, False),
    ],
)
def test_a_new_model_must_take_every_image_that_was_fitted_to_the_old_one(size: Size, old: dict, new: dict, fits: bool):
    if fits:
        check_limits(limits(**old), limits(**new), size)
        return
    with pytest.raises(ValueError) as caught:
        check_limits(limits(**old), limits(**new), size)
    assert "\n" not in str(caught.value)


async def test_who_left_steps_to_the_model_gets_those_of_the_model_that_answers():
    class Quick(Identity):
        def __init__(self):
            super().__init__(fingerprint="new")
            self.defaults = self.settings(steps=2)

    gate = Gate()
    engine = await ready(Shelf(lambda: Identity(before=gate, fingerprint="old"), Quick))
    asking = [asyncio.create_task(ask(engine, 1))]
    await until(gate.reached.is_set)
    asking += [asyncio.create_task(ask(engine, 2, **kind)) for kind in ({}, {"steps": 2}, {"steps": 7})]
    await until(lambda: engine.health().waiting == 3)
    engine.reload()
    await warm_beside(engine)
    gate.opened.set()
    answers = await asyncio.gather(*asking)
    made = [(answer.fingerprint, answer.sampling.steps, answer.batch) for answer in answers]
    assert made == [("old", 4, 1), ("new", 2, 2), ("new", 2, 2), ("new", 7, 1)]  # the second and the third share a batch
    engine.close()


async def test_memory_that_was_short_during_a_refused_reload_is_used_again_after_it():
    beside = threading.Event()

    def short(images: torch.Tensor) -> None:
        if beside.is_set() and len(images) > 2:
            raise torch.OutOfMemoryError("out of memory")

    gate = Gate()

    def never() -> Identity:
        gate(torch.ones(1))
        raise ValueError("no")

    engine = await ready(Shelf(lambda: Identity(before=short), never), ServeSettings(max_wait_ms=50))
    coming = engine.reload()
    beside.set()
    await asyncio.gather(*(ask(engine, number) for number in range(8)))
    assert engine.health().details["max_batch"] == 2
    beside.clear()
    gate.opened.set()
    with pytest.raises(ValueError):
        await asyncio.wrap_future(coming)
    assert engine.health().details["max_batch"] == 8
    engine.close()


async def test_a_second_reload_waits_for_the_first_and_several_of_them_are_one(caplog: pytest.LogCaptureFixture):
    gate = Gate()

    def slowly() -> Identity:
        gate(torch.ones(1))
        return Identity(fingerprint="second")

    shelf = Shelf(lambda: Identity(fingerprint="first"), slowly, lambda: Identity(fingerprint="third"))
    engine = await ready(shelf)
    results: list[str] = []
    reloads = Reloads(Variants.of(engine), on_end=results.append)
    with caplog.at_level(logging.INFO, "clipdit_serve"):
        reloads.ask()
        await until(gate.reached.is_set)
        with pytest.raises(ValueError, match="another reload is under way"):
            await asyncio.wrap_future(engine.reload())
        for _ in range(3):
            reloads.ask()
        assert reloads.under_way and reloads.last is None
        gate.opened.set()
        await until(lambda: not reloads.under_way)
    assert (shelf.opened, results) == (3, ["done", "done"])
    assert engine.model is not None and engine.model.fingerprint == "third"
    said = [record.getMessage().partition(" (")[0] for record in caplog.records if record.name == "clipdit_serve.reloading"]
    follows = "a reload is under way; one more follows it"
    assert said == [follows, follows, follows, "reload done: first -> second", "reload done: second -> third"]
    await reloads.close()
    engine.close()


async def test_of_several_variants_the_first_that_refuses_ends_the_reload():
    def new(name: str) -> Identity:
        return Identity(fingerprint=name)

    shelves = [Shelf(lambda: new("a1"), lambda: new("a2")), Shelf(lambda: new("b1"), raises(ValueError("no")))]
    shelves.append(Shelf(lambda: new("c1"), lambda: new("c2")))
    engines = Variants({name: await ready(shelf) for name, shelf in zip("abc", shelves, strict=True)})
    reloads = Reloads(engines)
    reloads.ask()
    await until(lambda: not reloads.under_way)
    assert reloads.last is not None and reloads.last.result == "refused"
    assert reloads.last.said.startswith("a a1 -> a2; b b1 goes on: no (")
    assert [engine.model.fingerprint for engine in engines.values() if engine.model] == ["a2", "b1", "c1"]
    engines.close()


@pytest.mark.parametrize("when", ["opening", "warming"])
async def test_a_service_that_shuts_down_gives_up_its_reload_and_answers_who_was_admitted(when: str):
    gate, closed = Gate(), threading.Event()

    class Slow(Identity):
        def __init__(self):
            super().__init__()
            self.backend.close = closed.set
            if when == "opening":
                gate(torch.ones(1))

        def __call__(self, source_u8: torch.Tensor, *, seeds, **sampling) -> torch.Tensor:
            gate(torch.ones(1))
            return super().__call__(source_u8, seeds=seeds, **sampling)

    busy = Gate()
    engine = await ready(Shelf(lambda: Identity(before=busy), Slow))
    asking = [asyncio.create_task(ask(engine, number)) for number in range(3)]
    await until(busy.reached.is_set)
    coming = engine.reload()
    await until(gate.reached.is_set)
    engine.drain()
    gate.opened.set()
    with pytest.raises(ValueError, match="the service shuts down"):
        await asyncio.wrap_future(coming)
    assert closed.wait(5)
    busy.opened.set()
    assert [number_of(answer.image) for answer in await asyncio.gather(*asking)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the service shuts down"):
        await reloaded(engine)
    engine.close()
    assert engine.failure is None


async def test_before_the_first_model_is_there_and_after_it_died_there_is_nothing_to_reload():
    gate = Gate()

    def slowly() -> Identity:
        gate(torch.ones(1))
        return Identity(before=lambda images: sys.exit())

    engine = InProcessEngine(slowly, ServeSettings())
    engine.start(lambda report: None)
    with pytest.raises(ValueError, match="being loaded"):
        await reloaded(engine)
    gate.opened.set()
    await until(lambda: engine.health().state == "ready")
    await asyncio.gather(ask(engine, 1), return_exceptions=True)
    await until(lambda: engine.health().state == "dead")
    with pytest.raises(ValueError, match="must be restarted"):
        await reloaded(engine)


async def test_health_and_metrics_tell_of_reloads_and_a_refusal_names_no_folder_to_strangers(decoder):
    shelf = Shelf(
        lambda: Identity(fingerprint="a" * 64), lambda: Identity(fingerprint="b" * 64), raises(ValueError("/srv/x is bad"))
    )
    async with served(shelf, ServeSettings(), decoder) as (client, _):
        reloads = client._transport.app.state.reloads
        assert (await client.get("/readyz?verbose")).json()["reload"] is None
        assert 'clipdit_reloads_total{result="refused"} 0.0' in (await client.get("/metrics")).text
        for result in ("done", "refused"):
            reloads.ask()
            await until(lambda: not reloads.under_way)
            told = await client.get("/readyz?verbose")
            assert told.status_code == 200
            assert told.json()["reload"]["result"] == result and abs(told.json()["reload"]["at"] - time.time()) < 60
            assert told.json()["model"] == "clipdit@bbbbbbbbbbbb" and "/srv/x" not in told.text
        metrics = (await client.get("/metrics")).text
        answer = await client.post("/v1/translate", content=png(numbered(1)), headers=PNG)
    assert 'clipdit_reloads_total{result="done"} 1.0' in metrics and 'clipdit_reloads_total{result="refused"} 1.0' in metrics
    assert 'revision="bbbbbbbbbbbb"' in metrics and "aaaaaaaaaaaa" not in metrics
    assert answer.headers["x-clipdit-model"] == "clipdit@bbbbbbbbbbbb"


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
async def test_a_reload_at_50_requests_a_second_costs_no_answer_and_the_revision_switches_once(seconds: int, decoder):
    """Over TCP, asked for by SIGHUP. Then a bundle with a wrong hash, which changes nothing."""
    rate, order = 50, []  # of (revision, number), as the batches were

    def model(revision: str) -> Identity:
        time.sleep(0.3)  # it takes its time to load

        def before(images: torch.Tensor) -> None:
            order.extend((revision, number_of(image)) for image in images)
            time.sleep(0.02)

        return Identity(before=before, fingerprint=revision)

    shelf = Shelf(lambda: model("old-revision"), lambda: model("new-revision"), raises(ValueError("its hash differs")))
    settings = ServeSettings(max_wait_ms=2)
    engine = InProcessEngine(shelf, settings)
    app = create_app(engine, decoder, settings)
    up = asyncio.Event()
    server = Server(
        app, engine, decoder, sockets=[bind("127.0.0.1", 0)], linger_s=0, drain_s=10, on_ready=lambda address: up.set()
    )
    serving = asyncio.create_task(server.serve())
    await asyncio.wait_for(up.wait(), 20)
    headers: dict[int, str] = {}
    late_s: list[float] = []

    async def one(client: httpx2.AsyncClient, number: int) -> None:
        began = time.perf_counter()
        answer = await client.post("/v1/translate", content=images[number], headers=PNG)
        late_s.append(time.perf_counter() - began)
        assert answer.status_code == 200, answer.text
        assert number_of(read_image(answer.content)) == number
        headers[number] = answer.headers["x-clipdit-model"]

    count = rate * seconds
    images = [png(numbered(number)) for number in range(count)]
    reloads: Reloads = app.state.reloads
    async with httpx2.AsyncClient(base_url=server.address, timeout=30, limits=httpx2.Limits(max_connections=None)) as client:
        asking, began = [], time.perf_counter()
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            asking.append(asyncio.create_task(one(client, number)))
            if number in (count // 4, 3 * count // 4):
                os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.gather(*asking)
        await until(lambda: not reloads.under_way)
        os.kill(os.getpid(), signal.SIGHUP)  # at least one more is refused
        await until(lambda: shelf.opened >= 4 and not reloads.under_way)
        metrics = (await client.get("/metrics")).text
    server.handle_exit(signal.SIGINT, None)
    await serving
    revisions = [revision for revision, _ in order]
    switches = sum(before != after for before, after in itertools.pairwise(revisions))
    assert switches == 1 and revisions[0] == "old-revision" and revisions[-1] == "new-revision"
    assert sorted(number for _, number in order) == list(range(count))
    assert headers == {number: f"clipdit@{revision}" for revision, number in order}
    assert 'clipdit_reloads_total{result="done"} 1.0' in metrics and 'clipdit_reloads_total{result="refused"} 2.0' in metrics
    print(f"\n{count} answers, slowest {1000 * max(late_s):.0f} ms, {revisions.count('new-revision')} by the new model")
