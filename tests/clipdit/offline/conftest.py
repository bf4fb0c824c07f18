"""A translator and a folder of images for it."""

import pytest
from job_pictures import draw

from clipdit.fake_backend import FakeBackend
from clipdit.translator import Translator


@pytest.fixture
def translator():
    return Translator(FakeBackend(native_size=(32, 32)))


@pytest.fixture
def inputs(tmp_path):
    """Twenty images in three folders, of many sizes."""
    folder = tmp_path / "in"
    for i in range(20):
        draw(folder / ["", "sub", "sub/deep"][i % 3] / f"{i:02}.{['png', 'jpg', 'webp'][i % 3]}", 20 + 7 * i, 100 - 3 * i, seed=i)
    return folder
