"""Several ways to run one model in one service, such as fp32 and int8: each an engine of its own, with a queue and a model.

They share the machine: who asks one of them slows the others, and each holds its weights in memory.
"""

from collections.abc import Callable, Iterator, Mapping

from clipdit_serve.engine import BatchReport, Engine, Health
from clipdit_serve.errors import ApiError


class Variants(Mapping[str, Engine]):
    """The engines of a service by the name of their variant, the default first.

    Args:
        engines: at least one. The name of the only one may be empty: it is never told.
    """

    def __init__(self, engines: Mapping[str, Engine]):
        assert engines, "a service has an engine"
        self._engines = dict(engines)
        self.default = next(iter(self._engines))

    @classmethod
    def of(cls, engines: "Engine | Variants") -> "Variants":
        """Those, or the only one that there is."""
        return engines if isinstance(engines, cls) else cls({"": engines})  # pyright: ignore[reportArgumentType]  (an Engine, then)

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    @property
    def several(self) -> bool:
        return len(self) > 1

    def find(self, name: str | None) -> str:
        """The variant of that name, None for the default. ApiError (invalid_value)."""
        if name is None or name in self:
            return self.default if name is None else name
        there = ", ".join(filter(None, self)) or "one only, without a name; leave it out"
        raise ApiError("invalid_value", f"variant is {name[:64]}; there is {there}", param="variant")

    def start(self, on_batch: Callable[[str, BatchReport], None]) -> None:
        """As `Engine.start`, of all; `on_batch` is also told the variant."""

        def told(name: str) -> Callable[[BatchReport], None]:
            return lambda report: on_batch(name, report)

        for name, engine in self.items():
            engine.start(told(name))

    def health(self) -> Health:
        """Of the default one; but loading as long as one of them is, so that who is told `ready` can have any."""
        for engine in self.values():
            if (health := engine.health()).state == "loading":
                return health
        return self[self.default].health()

    @property
    def dead(self) -> bool:
        """Whether one of them only comes back with a restart."""
        return any(engine.health().state == "dead" for engine in self.values())

    @property
    def idle(self) -> bool:
        """Whether nobody who was admitted waits for an answer."""
        return all(engine.idle for engine in self.values())

    def drain(self) -> None:
        for engine in self.values():
            engine.drain()

    def close(self) -> None:
        for engine in self.values():
            engine.close()


def variant_name(backend: str) -> str:
    """What callers call a backend: "eager", "eager:bf16" and "onnx:onnx-int8" are eager, eager-bf16 and onnx-int8."""
    name, _, variant = backend.partition(":")
    return name if not variant else variant if variant.startswith(name) else f"{name}-{variant}"
