"""What Ray Data calls: read, translate, write. Rows are a state, as JSON, and pixels; JSON because names that are no valid UTF-8
travel in it, and not in Arrow's strings.

    read        {item}                              -> {item, shape, placement, notes, ms} and pixels, or {record}
    translate   {item, shape ...} and pixels        -> {..., batch_size} and the output's pixels, or none for want of memory
    write       {item, shape, placement ...}, ...   -> {record, batch_size}, or {error} of a write that would always fail

A finished record passes through, and so does {fault}, what the model raised: from Ray Data it would come in other words than from
the local engine. No stage raises over one input.
"""

import json
import platform
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clipdit.images import Box, Placement
from clipdit.offline.engine import Model, model_of
from clipdit.offline.plan import Item
from clipdit.offline.steps import Halving, Work, write
from clipdit.translator import Sampling, Translator
from clipdit_serve.offline.reading import read_all

OpenTranslator = Callable[[], Translator]

SCHEMA = pa.schema([("state", pa.string()), ("pixels", pa.large_binary())])


def table(rows: list[tuple[dict, bytes | None]]) -> pa.Table:
    return pa.Table.from_arrays([[json.dumps(state) for state, _ in rows], [pixels for _, pixels in rows]], schema=SCHEMA)


def states(block: pa.Table) -> list[dict[str, Any]]:
    return [json.loads(text) for text in block["state"].to_pylist()]


def read_stage(block: pa.Table, work: Work) -> pa.Table:
    return table(read_all([Item(**state["item"]) for state in states(block)], work))


class TranslateStage:
    """Holds the model, in an actor of its own.

    Args:
        expected: what the job was planned with.
        threads: of PyTorch on a CPU; None leaves them.
    """

    def __init__(self, open_translator: OpenTranslator, work: Work, expected: Model, threads: int | None):
        self.fault: dict[str, str] | None = None
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            self.translate = self._open(open_translator, work, expected)
        except Exception as error:  # an actor that raises here is started again and again: the driver is to hear of it
            self.fault = _fault(error)

    def _open(self, open_translator: OpenTranslator, work: Work, expected: Model) -> Halving:
        translator = open_translator()
        found = model_of(translator, work.sampling)
        for name in ("backend", "fingerprint"):
            if getattr(found, name) != getattr(expected, name):
                raise ValueError(
                    f"on {platform.node()} the model's {name} is {getattr(found, name)}; the job was planned with "
                    f"{getattr(expected, name)}. Every node needs the same model and packages"
                )
        return Halving(translator, work.sampling, work.batch_size, lambda before, after: None)

    def __call__(self, block: pa.Table) -> pa.Table:
        if self.fault is None:
            try:
                return self._translated(block)
            except Exception as error:  # likewise: Ray would try the block again, for ever
                self.fault = _fault(error)
        return table([({"fault": self.fault}, None)])

    def _translated(self, block: pa.Table) -> pa.Table:
        rows: list[tuple[dict, bytes | None]] = [(state, None) for state in states(block)]
        images = block["pixels"].combine_chunks() if block.num_rows else block["pixels"]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (state, _) in enumerate(rows):
            if "record" not in state:
                groups.setdefault(tuple(state["shape"]), []).append(i)
        for shape, members in groups.items():
            sources = [_tensor(images[i].as_buffer(), shape) for i in members]
            results = self.translate(sources, [rows[i][0]["item"]["seed"] for i in members])
            for i, (output, ms) in zip(members, results, strict=True):
                state = rows[i][0]
                state["ms"] += ms
                rows[i] = state, None if output is None else output.numpy().tobytes()
        for state, _ in rows:
            state["batch_size"] = self.translate.batch_size
        return table(rows)


def write_stage(block: pa.Table, work: Work) -> pa.Table:
    images = block["pixels"].combine_chunks() if block.num_rows else block["pixels"]
    done: list[tuple[dict, bytes | None]] = []
    for i, state in enumerate(states(block)):
        if "fault" in state:
            done.append((state, None))
            continue
        batch = {"batch_size": state["batch_size"]}
        if "record" in state:
            done.append(({"record": state["record"]} | batch, None))
            continue
        placement = Placement(
            taken=Box(**state["placement"]["taken"]),
            content=Box(**state["placement"]["content"]),
            size=tuple(state["placement"]["size"]),
        )
        output = _tensor(images[i].as_buffer(), tuple(state["shape"])) if images[i].is_valid else None
        try:
            record = write(Item(**state["item"]), placement, tuple(state["notes"]), output, state["ms"], work.folder)
        except OSError as error:
            done.append(({"error": [error.errno, error.strerror, _where(error, work)]} | batch, None))
        else:
            done.append(({"record": asdict(record)} | batch, None))
    return table(done)


def describe(open_translator: OpenTranslator, sampling: Sampling) -> Model:
    """In a worker that has what the model needs: the machine that the job is started on need not have a GPU."""
    with open_translator() as translator:
        return model_of(translator, sampling)


def _fault(error: Exception) -> dict[str, str]:
    return {"kind": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}


def _where(error: OSError, work: Work) -> str:
    if not work.folder.work.is_dir():
        return (
            f"{work.folder.work}, which is not there on {platform.node()} (a cluster needs an output folder that all nodes share)"
        )
    return str(error.filename2 or error.filename or work.folder.path)


def _tensor(buffer: pa.Buffer, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(buffer, np.uint8).reshape(shape).copy())  # Ray's memory is read-only
