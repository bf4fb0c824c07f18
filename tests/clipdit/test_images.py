import os

import numpy as np
import pytest
import torch
from PIL import Image

from clipdit.images import Placement, encode_image, fit, read_image, resize, to_float, to_u8, write_image


def waves(height: int, width: int) -> torch.Tensor:
    """Colours without hard edges, (3, H, W) uint8."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    return to_u8(torch.stack([torch.sin(x + y), torch.cos(2 * x), torch.sin(2 * y)]))


def test_float_and_u8_are_inverse_for_every_value():
    every = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    assert torch.equal(to_u8(to_float(every)), every)
    assert to_float(every).min() == -1 and to_float(every).max() == 1
    assert torch.equal(to_u8(torch.tensor([-9.0, 9.0]).expand(3, 1, 2))[0, 0], torch.tensor([0, 255], dtype=torch.uint8))
    assert to_float(every, torch.bfloat16).dtype == torch.bfloat16


def test_resize_is_pillows_antialiased_bicubic():
    image = torch.randint(0, 256, (3, 60, 44), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for height, width in ((17, 23), (100, 91), (60, 44)):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
        ours = resize(image, (height, width)).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - np.asarray(pil).astype(int)).max() <= 2  # both use rounded integer weights


def test_a_batch_is_resized_as_its_images_are():
    batch = torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize(batch, (11, 13)), torch.stack([resize(image, (11, 13)) for image in batch]))


@pytest.mark.parametrize("size", [(64, 64), (37, 80), (200, 33)])
@pytest.mark.parametrize("original", [(50, 100), (100, 50), (64, 64), (7, 200)])
def test_padding_and_back_keeps_size_and_picture(original, size):
    image = waves(*original)
    fitted, placement = fit(image, size)
    assert fitted.shape == (3, *size)
    back = placement.restore(fitted)
    assert back.shape == image.shape
    if min(placement.content.height, placement.content.width) > 20:  # else too few pixels are left to compare
        assert (back.int() - image.int()).abs().float().mean() < 3


def test_padding_repeats_the_border_and_keeps_the_aspect():
    image = torch.zeros(3, 10, 20, dtype=torch.uint8)
    image[0, 0], image[1, -1] = 200, 100  # a red row on top, a green one below
    fitted, placement = fit(image, (40, 20), "pad")
    assert (placement.content.top, placement.content.height, placement.content.width) == (15, 10, 20)
    assert torch.equal(fitted[:, 15:25], image)
    assert (fitted[0, :15] == 200).all() and (fitted[1, 25:] == 100).all() and (fitted[1, :15] == 0).all()


def test_crop_takes_the_middle():
    image = waves(40, 100)
    fitted, placement = fit(image, (20, 20), "crop")
    assert torch.equal(fitted, resize(image[:, :, 30:70], (20, 20)))
    assert placement.restore(fitted).shape == (3, 40, 40)


def test_stretch_uses_all_of_both():
    image = waves(40, 100)
    fitted, placement = fit(image, (32, 32), "stretch")
    assert torch.equal(fitted, resize(image, (32, 32)))
    assert placement.restore(fitted).shape == image.shape


@pytest.mark.parametrize("how", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("original", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_extreme_shapes_are_fitted_and_restored(original, how):
    image = torch.full((3, *original), 77, dtype=torch.uint8)
    fitted, placement = fit(image, (16, 24), how)
    assert fitted.shape == (3, 16, 24) and (fitted == 77).all()
    back = placement.restore(fitted)
    assert (back == 77).all() and (how == "crop" or back.shape == image.shape)


def test_an_image_that_fits_is_left_alone():
    image = waves(32, 48)
    for how in ("pad", "crop", "stretch"):
        fitted, placement = fit(image, (32, 48), how)
        assert torch.equal(fitted, image) and torch.equal(placement.restore(fitted), image)


def test_wrong_use_is_told():
    image = waves(8, 8)
    placement: Placement = fit(image, (16, 16))[1]
    with pytest.raises(ValueError, match="8 x 8; this placement was made for 16 x 16"):
        placement.restore(image)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        fit(image, (0, 4))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "deep/er/A.PNG"])
def test_lossless_files_come_back_as_they_went(tmp_path, name):
    image = waves(20, 31)
    write_image(tmp_path / name, image)
    assert torch.equal(read_image(tmp_path / name), image)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_lossy_files_come_back_nearly(tmp_path, name):
    image = waves(64, 64)
    write_image(tmp_path / name, image)
    assert (read_image(tmp_path / name).int() - image.int()).abs().float().mean() < 3


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / ("n" * 250 + ".png")
    write_image(path, waves(8, 8))
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_image(path, waves(9, 9))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_less_effort_gives_the_same_pixels_in_more_bytes():
    image = waves(64, 64)
    quick, small = encode_image(image, effort=1), encode_image(image, effort=9)
    assert torch.equal(read_image(quick), image) and torch.equal(read_image(small), image)
    assert len(quick) > len(small)


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.xyz; wanted one of \.png"):
        write_image(tmp_path / "a.xyz", waves(4, 4))
    with pytest.raises(ValueError, match='image format is "XYZ"'):
        encode_image(waves(4, 4), "XYZ")
