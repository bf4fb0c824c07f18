"""The engine on Ray Data, for one big machine or a cluster.

    read and decode   tasks, any free CPU            a bad input becomes a record with its reason
    translate         actors, one model each         one GPU each where there are GPUs; out of memory halves the batch
    encode, write     tasks, any free CPU            a temporary file and a rename
    records           streamed to this process       which alone writes the ledger

Why Ray Data, and without its checkpoints: it balances the three stages, keeps what waits between them within bounds, and starts
again what a lost worker, model or node did. What is finished is not its business. Its `CheckpointConfig` (beta) keeps a second
account beside ours, reads all of it into actors before a resume starts, which on few CPUs can wait for one another for ever, and
does nothing, with a warning, for a plan of another shape. Here each record comes to this process when its image is in place, and
goes into the one ledger that the local engine writes too. A stage that runs twice renames the same bytes onto the same name; a
record that comes twice is taken once; one that never comes is an error at the end; and a resume plans only what the ledger lacks.
So a kill anywhere loses the images in flight and nothing else.

`max_errored_blocks` stays 0: with more, Ray Data drops whole blocks. `execution_no_progress_timeout_s` and a look at the nodes
turn a silent hang into one line.
"""

import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from clipdit.offline.engine import Finished, Model
from clipdit.offline.folder import Record, printable
from clipdit.offline.plan import Item
from clipdit.offline.steps import Work
from clipdit.translator import Sampling, Translator
from clipdit_serve.offline.cluster import Cluster

logger = logging.getLogger(__name__)

NO_PROGRESS_S = 600.0
"""Without a single block of rows that moves on, seconds: longer than any model takes to load or a batch to run."""
LOOK_S = 0.2
"""Without records, how often our own Ray is looked at, seconds."""
ASK_S = 5.0
"""Without records, how often a cluster is asked for its nodes, seconds."""
CPUS_OF_A_MODEL = 2
"""Of those that Ray counts, for a replica without a GPU. Other than a reader's, for Ray Data puts stages that ask for the same
into one process, and then nothing is read while the model works."""
MIN_BLOCK_ROWS = 32
"""Inputs that travel together at least: each block costs Ray some ten milliseconds."""


@contextmanager
def open_ray_engine(model: str | None, *, backend: str | None, device: str | None, replicas: int | None) -> Iterator["RayEngine"]:
    """See `clipdit.offline.engine.EngineClass`. Ray is started when the model is first asked for."""
    if device is not None and device not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device}; with --engine ray it is cpu or cuda: Ray gives each replica a GPU of its own")
    if model is not None and Path(model).exists():
        model = str(Path(model).absolute())  # workers have another current folder
    engine = RayEngine(
        functools.partial(Translator.open, model, backend=backend, device=device), device=device, replicas=replicas
    )
    try:
        yield engine
    finally:
        engine.close()


class RayEngine:
    """Runs jobs on Ray. `close` it.

    Args:
        open_translator: pickled, and called in each process that holds a model.
        device: "cpu", "cuda", or None for a GPU each if there is one.
        replicas: models; None is one for each GPU, or one.
        no_progress_s: see `NO_PROGRESS_S`.
    """

    name = "ray"

    def __init__(
        self,
        open_translator: Any,
        *,
        device: str | None = None,
        replicas: int | None = None,
        no_progress_s: float = NO_PROGRESS_S,
    ):
        if replicas is not None and replicas < 1:
            raise ValueError(f"replicas is {replicas}; wanted at least 1")
        self.open_translator, self.device, self.replicas, self.no_progress_s = open_translator, device, replicas, no_progress_s
        self._cluster: Cluster | None = None
        self._model: Model | None = None

    def close(self) -> None:
        """End Ray, if it was started."""
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def describe(self, sampling: Sampling) -> Model:
        cluster = self._start()
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        from clipdit_serve.offline.stages import describe

        task = ray.remote(num_gpus=self._gpus(cluster), num_cpus=1)(describe)
        try:
            self._model = ray.get(task.remote(self.open_translator, sampling), timeout=self.no_progress_s)
        except GetTimeoutError as error:
            raise ValueError(
                f"the model was not opened within {self.no_progress_s:g} s; are the cluster's workers busy?"
            ) from error
        except RayError as error:
            raise _unwrapped(error) from error
        return self._model

    def run(self, items: Iterable[Item], work: Work, finished: Finished) -> int:
        assert self._model is not None, "describe() comes first"
        cluster = self._start()
        blocks = _blocks(items, max(work.batch_size, MIN_BLOCK_ROWS))
        if not blocks:
            return work.batch_size
        dataset, count = self._dataset(blocks, work, self._model, cluster), sum(map(len, blocks))
        return _Drain(dataset, count, cluster, work, finished, self.no_progress_s).run()

    def _start(self) -> Cluster:
        if self._cluster is None:
            cluster = self._cluster = Cluster(2 + CPUS_OF_A_MODEL * (self.replicas or 1))
            if self.device == "cuda" and not cluster.gpus:
                raise ValueError("--device is cuda, but Ray finds no GPU")
            gpus = self._gpus(cluster)
            most = cluster.gpus if gpus else (cluster.cpus - 2) // CPUS_OF_A_MODEL  # a reader and a writer need one each
            if (self.replicas or 1) > most:
                raise ValueError(
                    f"replicas is {self.replicas or 1}; with {cluster.cpus} CPUs and {cluster.gpus} GPUs Ray has room for "
                    f"{max(0, most)}"
                )
            self.replicas = self.replicas or (cluster.gpus if gpus else 1)
        return self._cluster

    def _gpus(self, cluster: Cluster) -> int:
        return int(self.device != "cpu" and cluster.gpus > 0)

    def _dataset(self, blocks: list, work: Work, model: Model, cluster: Cluster) -> Any:
        import ray.data

        from clipdit_serve.offline.stages import TranslateStage, read_stage, write_stage

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors become ours, without advice to drop blocks
        context = ray.data.DataContext.get_current().copy()
        context.execution_no_progress_timeout_s = self.no_progress_s
        context.max_errored_blocks = 0
        context.enable_progress_bars = context.print_on_execution_start = False
        on_gpu = self._gpus(cluster) > 0
        assert self.replicas is not None
        threads = None if on_gpu else max(1, (os.cpu_count() or 1) // self.replicas)
        many_sizes = work.size in ("own", "nearest")
        with ray.data.DataContext.current(context):
            return (
                ray.data.from_arrow(blocks)
                .map_batches(functools.partial(read_stage, work=work), batch_size=None, batch_format="pyarrow")
                .map_batches(
                    TranslateStage,
                    batch_size=work.batch_size * (4 if many_sizes else 1),  # to find images of equal size in
                    batch_format="pyarrow",
                    fn_constructor_args=(self.open_translator, work, model, threads),
                    compute=ray.data.ActorPoolStrategy(size=self.replicas),
                    num_cpus=1 if on_gpu else CPUS_OF_A_MODEL,
                    num_gpus=int(on_gpu),
                )
                .map_batches(functools.partial(write_stage, work=work), batch_size=None, batch_format="pyarrow")
            )


class _Drain:
    """Brings records from a dataset to the ledger, and looks after Ray while none come."""

    def __init__(self, dataset: Any, count: int, cluster: Cluster, work: Work, finished: Finished, no_progress_s: float):
        self.dataset, self.count, self.cluster, self.finished, self.no_progress_s = (
            dataset,
            count,
            cluster,
            finished,
            no_progress_s,
        )
        self.blocks: queue.Queue[Any] = queue.Queue(maxsize=16)
        self.batch_size = work.batch_size
        self.seen: set[str] = set()

    def run(self) -> int:
        # In a thread, because what waits for Ray here would wait for ever when Ray is gone.
        threading.Thread(target=self._pull, name="clipdit-ray", daemon=True).start()
        last_s = asked_s = time.monotonic()
        while True:
            if (lost := self.cluster.lost()) is not None:
                raise _go_on(lost)
            try:
                block = self.blocks.get(timeout=LOOK_S)
            except queue.Empty:
                trouble, now_s = None, time.monotonic()
                if now_s - max(asked_s, last_s) > ASK_S:
                    trouble, asked_s = self.cluster.trouble(), now_s
                # Ray Data has its own guard; this one is for when its thread hangs too.
                if trouble is None and now_s - last_s > self.no_progress_s + 60:
                    trouble = f"Ray made no progress for {self.no_progress_s:g} s"
                if trouble is not None:
                    raise _go_on(trouble) from None
                continue
            last_s = time.monotonic()
            if block is None:
                if len(self.seen) != self.count:
                    raise _go_on(f"Ray handed back {len(self.seen)} of {self.count} inputs")
                return self.batch_size
            if isinstance(block, BaseException):
                raise self._explained(block) from block
            self._take(block)

    def _pull(self) -> None:
        try:
            for block in self.dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                self.blocks.put(block)
            self.blocks.put(None)
        except BaseException as error:  # likewise: who takes the blocks raises it
            self.blocks.put(error)

    def _take(self, block: Any) -> None:
        """A block's records to the ledger; then what the model raised, or OSError of a write that would fail for every output."""
        from clipdit_serve.offline.stages import states

        records: list[Record] = []
        failure: Exception | None = None
        for state in states(block):
            if fault := state.get("fault"):
                kind = ValueError if fault["kind"] == "ValueError" else RuntimeError
                failure = kind(fault["message"] if kind.__name__ == fault["kind"] else f"{fault['kind']}: {fault['message']}")
                failure.add_note(f"In a worker of Ray:\n{fault['trace']}")
                continue
            if (batch_size := state["batch_size"]) < self.batch_size:
                logger.warning("out of memory with %d images at once; going on with %d", self.batch_size, batch_size)
                self.batch_size = batch_size
            if "error" in state:
                failure = OSError(*state["error"])
                continue
            record = Record(**state["record"])
            if record.id in self.seen:
                continue
            self.seen.add(record.id)
            if record.status == "quarantined":
                logger.warning("%s: %s", printable(record.id), record.reason)
            records.append(record)
        self.finished(records)
        if failure is not None:
            raise failure

    def _explained(self, error: BaseException) -> BaseException:
        from ray.data.exceptions import ExecutionTimeoutError
        from ray.exceptions import RayError

        if isinstance(error, ExecutionTimeoutError):
            return _go_on(f"Ray made no progress for {self.no_progress_s:g} s")
        if (trouble := self.cluster.trouble()) is not None:
            return _go_on(trouble)
        return _unwrapped(error) if isinstance(error, RayError) else error


def _blocks(items: Iterable[Item], rows: int) -> list:
    from clipdit_serve.offline.stages import table

    iterator, blocks = iter(items), []
    while chunk := list(islice(iterator, rows)):
        blocks.append(table([({"item": asdict(item)}, None) for item in chunk]))
    return blocks


def _unwrapped(error: BaseException) -> BaseException:
    """What a worker raised, as it raised it."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


def _go_on(trouble: str) -> ValueError:
    return ValueError(f"{trouble}. What is finished is in the ledger: go on with the same command and --resume")
