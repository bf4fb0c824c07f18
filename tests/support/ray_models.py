"""Models for jobs on Ray, in a module that its workers can import."""

import time

import torch

from clipdit.fake_backend import FakeBackend
from clipdit.translator import Translator


def open_small() -> Translator:
    """A model with memory for three images."""

    def on_call(call, batch):
        if batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return Translator(FakeBackend(native_size=(32, 32), on_call=on_call))


def open_hanging() -> Translator:
    def on_call(call, batch):
        if batch > 1:
            time.sleep(3600)

    return Translator(FakeBackend(native_size=(32, 32), on_call=on_call))


def open_broken() -> Translator:
    def on_call(call, batch):
        raise RuntimeError("device-side assert")

    return Translator(FakeBackend(native_size=(32, 32), on_call=on_call))
