"""From an upload to an encoded answer: the way that every route takes."""

import asyncio
import secrets
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from clipdit.images import Placement, encode_image
from clipdit_serve.decoding import Decoder
from clipdit_serve.engine import Answer, Engine, Task
from clipdit_serve.errors import ApiError
from clipdit_serve.fields import Format
from clipdit_serve.settings import ServeSettings
from clipdit_serve.tracing import Traces
from clipdit_serve.uploads import Reader
from clipdit_serve.variants import Variants

T = TypeVar("T")

SEEDS = 2**32
"""Seeds are drawn below this: JavaScript keeps every digit of them."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a caller wants; None is the model's default, or for the seed a new one."""

    variant: str
    """One that is served."""
    seed: int | None
    steps: int | None
    guidance: float | None
    format: Format
    quality: int
    """0 to 100, of webp and jpeg."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """An upload that was decoded, and what is wanted of it."""

    task: Task
    variant: str
    placement: Placement
    """The way back to the upload's size."""
    notes: tuple[str, ...]
    """What had to be converted in the upload."""
    decode_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Translated:
    """An answer that is not encoded yet. It is as small as the model's images, however large its upload was."""

    answer: Answer
    variant: str
    placement: Placement
    seed: int
    notes: tuple[str, ...]
    decode_s: float

    @classmethod
    def of(cls, prepared: Prepared, answer: Answer) -> "Translated":
        return cls(
            answer=answer,
            variant=prepared.variant,
            placement=prepared.placement,
            seed=prepared.task.seed,
            notes=prepared.notes,
            decode_s=prepared.decode_s,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An answer, encoded."""

    data: bytes
    format: Format
    width: int
    """Pixels, as the upload's."""
    height: int
    model: str
    """What made it; see `Service.model_id`."""
    seed: int
    notes: tuple[str, ...]
    """What had to be converted in the upload."""
    answer: Answer
    decode_s: float
    encode_s: float

    @property
    def server_timing(self) -> str:
        """For the header Server-Timing: milliseconds."""
        answer = self.answer
        spans = {"decode": self.decode_s, "queue": answer.queue_s, "model": answer.model_s, "encode": self.encode_s}
        timed = [f"{name};dur={1000 * seconds:.2f}" for name, seconds in spans.items()]
        return ", ".join([*timed[:2], f'batch;desc="{answer.batch}"', *timed[2:]])


class Service:
    """What the routes share."""

    def __init__(self, engines: Engine | Variants, decoder: Decoder, settings: ServeSettings, traces: Traces | None = None):
        self.engines, self.decoder, self.settings = Variants.of(engines), decoder, settings
        self.traces = traces or Traces()
        self.reader = Reader(
            max_bytes=settings.max_body_bytes, max_together=settings.max_bodies_bytes, timeout_s=settings.body_timeout_s
        )

    @property
    def models(self) -> dict[str, str]:
        """Variants by the names of models that callers may use: that of the model for the default, and, where there are several,
        that of the model and the variant for each."""
        name = self.settings.model_name
        return {name: self.engines.default} | ({f"{name}:{v}": v for v in self.engines} if self.engines.several else {})

    def variant(self, model: str | None, variant: str | None = None) -> str:
        """What a caller names. ApiError (model_not_found, invalid_value) for what is not served, or for two at the same time."""
        if model is not None and model not in self.models:
            raise ApiError("model_not_found", f"model is {model[:128]}; there is {', '.join(self.models)}", param="model")
        by_model = None if model in (None, self.settings.model_name) else self.models[model]
        if variant is not None and by_model not in (None, self.engines.find(variant)):
            raise ApiError("invalid_value", f"variant is {variant}, and model is {model}; send one of the two", param="variant")
        return self.engines.find(variant if by_model is None else by_model)

    def check_steps(self, steps: int | None, name: str) -> None:
        """ApiError for more steps than are allowed, under the name that the route has for them."""
        if steps is not None and steps > self.settings.max_steps:
            raise ApiError("invalid_value", f"{name} is {steps}; wanted 1 to {self.settings.max_steps}", param=name)

    def refuse_early(self, variant: str | None = None) -> None:
        """ApiError when a request would not be admitted: asked before its body is read. variant: None where the body may name
        one; then it is refused when none of them would admit it."""
        refusals = []
        for engine in [self.engines[variant]] if variant is not None else self.engines.values():
            try:
                with engine.admit():
                    return
            except ApiError as error:
                refusals.append(error)
        raise refusals[0]

    def model_id(self, variant: str, fingerprint: str) -> str:
        """Of the header x-clipdit-model: the name, the variant where there are several, and the weights behind it."""
        name = f"{self.settings.model_name}:{variant}" if self.engines.several else self.settings.model_name
        return f"{name}@{fingerprint[:12]}"

    async def translate(self, request: Request, image: bytes, ask: Ask) -> Picture:
        """ApiError for whatever goes wrong, the caller leaving included."""
        return await self.attended(request, self._translate(image, ask))

    async def _translate(self, image: bytes, ask: Ask) -> Picture:
        engine = self.engines[ask.variant]
        with engine.admit():
            prepared = await self.prepare(image, ask)
            answer = await self._answer(engine, prepared)
            return await self.encode(Translated.of(prepared, answer), ask.format, ask.quality)

    async def _answer(self, engine: Engine, prepared: Prepared) -> Answer:
        with self.traces.watch() as watch:
            answer = await engine.submit(prepared.task, watch.on_start()).answer()
            watch.answered(answer, engine.model, prepared.variant)
        return answer

    async def attended(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. ApiError, and the end of `work`, when that takes too long or the caller leaves."""
        try:
            async with self.deadline():
                return await _unless_the_caller_leaves(request, work)
        except TimeoutError:
            raise self.too_late() from None

    def deadline(self) -> asyncio.Timeout:
        """Around what must end in time; TimeoutError where it does not."""
        return asyncio.timeout(self.settings.timeout_s)

    def too_late(self) -> ApiError:
        return ApiError("deadline_exceeded", f"no answer within {self.settings.timeout_s:g} s; come again later")

    async def prepare(self, image: bytes, ask: Ask) -> Prepared:
        """Decode an upload, within `admit` of the variant's engine. ApiError for one that cannot be used."""
        began = time.perf_counter()
        model = self.engines[ask.variant].model
        assert model is not None, "whoever is admitted meets a model"
        with self.traces.span("decode", upload_bytes=len(image)) as told:
            upload = await self.decoder.decode(image, model.limits, self.settings.size, self.settings.fit)
            told["notes"] = len(upload.notes)
        seed = secrets.randbelow(SEEDS) if ask.seed is None else ask.seed
        return Prepared(
            task=Task(image=upload.image, seed=seed, steps=ask.steps, guidance=ask.guidance),
            variant=ask.variant,
            placement=upload.placement,
            notes=upload.notes,
            decode_s=time.perf_counter() - began,
        )

    async def encode(self, translated: Translated, format: Format, quality: int) -> Picture:
        """In the upload's size. ApiError (not_acceptable) where that is more than the format can hold."""
        began = time.perf_counter()

        def encode() -> tuple[bytes, int, int]:
            restored = translated.placement.restore(translated.answer.image)
            data = encode_image(restored, format.upper(), quality=quality)
            return data, restored.shape[2], restored.shape[1]

        try:
            with self.traces.span("encode", format=format) as told:
                data, width, height = await asyncio.to_thread(encode)
                told |= {"width": width, "height": height, "answer_bytes": len(data)}
        except OSError as error:  # the longest side that a format can have, mostly
            raise ApiError("not_acceptable", f"the result cannot be encoded as {format}: {error}; ask for png") from error
        return Picture(
            data=data,
            format=format,
            width=width,
            height=height,
            model=self.model_id(translated.variant, translated.answer.fingerprint),
            seed=translated.seed,
            notes=translated.notes,
            answer=translated.answer,
            decode_s=translated.decode_s,
            encode_s=time.perf_counter() - began,
        )


async def _unless_the_caller_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled, and ApiError raised, when the connection closes before."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_the_caller_leaves(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError("client_closed_request", "the caller left")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _the_caller_leaves(request: Request) -> None:
    """Returns when he does. The body has been read, so that nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
