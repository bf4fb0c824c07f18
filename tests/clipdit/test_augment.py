import pytest
import torch

from clipdit.data.augment import Augment, augment, view
from clipdit.images import to_float, to_u8

GEOMETRY = Augment(max_rotation_degrees=20, max_zoom=0.2, max_shift=0.1)


def smooth(height=48, width=64, phase=0.0):
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    return to_u8(torch.stack([torch.sin(x + y + phase), torch.cos(2 * x), torch.sin(2 * y - phase)]))


@pytest.mark.parametrize("settings", [Augment(), GEOMETRY, Augment(max_rotation_degrees=20, border="white")])
def test_source_and_target_move_alike(settings):
    image = smooth()
    for seed in range(20):
        source, target = augment(image, image.clone(), settings, seed)
        assert torch.equal(source, target)
        assert source.shape == image.shape and source.dtype == torch.uint8


def test_the_seed_alone_decides():
    source, target = smooth(), smooth(phase=1)
    one, same, other = (augment(source, target, GEOMETRY, seed) for seed in (5, 5, 6))
    assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1]) and not torch.equal(one[0], other[0])
    from_generator = augment(source, target, GEOMETRY, torch.Generator().manual_seed(5))
    assert torch.equal(one[0], from_generator[0])
    assert torch.equal(source, smooth()) and torch.equal(target, smooth(phase=1))  # unchanged


def test_default_only_mirrors_half_of_the_time_and_exactly():
    source, target = smooth(), smooth(phase=1)
    mirrored = 0
    for seed in range(200):
        a, b = augment(source, target, Augment(), seed)
        flipped = torch.equal(a, source.flip(-1))
        assert torch.equal(b, target.flip(-1) if flipped else target) and (flipped or torch.equal(a, source))
        mirrored += flipped
    assert 70 <= mirrored <= 130
    assert torch.equal(augment(source, target, Augment(flip=False), 3)[0], source)


def test_views_are_fixed_and_the_first_is_the_pair_itself():
    source, target = smooth(), smooth(phase=1)
    assert torch.equal(view(source, target, GEOMETRY, "a", 0)[0], source)
    plain = Augment()
    assert torch.equal(view(source, target, plain, "a", 1)[1], target.flip(-1))
    many = Augment(views=6, max_shift=0.1)
    views = [view(source, target, many, "a", index)[0] for index in range(6)]
    assert all(not torch.equal(views[i], views[j]) for i in range(6) for j in range(i))
    assert torch.equal(views[4], view(source, target, many, "a", 4)[0])
    assert not torch.equal(views[4], view(source, target, many, "b", 4)[0])
    with pytest.raises(ValueError, match="view is 6; wanted 0 to 5"):
        view(source, target, many, "a", 6)


def test_float_and_u8_images_move_alike():
    source, target = smooth(), smooth(phase=1)
    settings = Augment(max_rotation_degrees=20, max_zoom=0.2, max_shift=0.1, max_brightness=0.3, max_contrast=0.3)
    for seed in range(5):
        as_u8 = augment(source, target, settings, seed)
        as_float = augment(to_float(source), to_float(target), settings, seed)
        for a, b in zip(as_u8, as_float, strict=True):
            assert (a.int() - to_u8(b).int()).abs().max() <= 3  # rounded after every step, or once


def test_a_shift_is_a_shift():
    image = smooth(40, 40)
    for seed in range(8):
        moved = augment(image, image, Augment(flip=False, max_shift=0.25), seed)[0].float()
        # Find it again: the whole-pixel shift that explains the middle best must explain it well.
        errors = {
            (dy, dx): (moved[:, 12:28, 12:28] - image[:, 12 - dy : 28 - dy, 12 - dx : 28 - dx]).abs().mean()
            for dy in range(-10, 11)
            for dx in range(-10, 11)
        }
        assert min(errors.values()) < 8


def test_turning_keeps_distances_on_wide_images():
    image = torch.zeros(3, 40, 120, dtype=torch.uint8)
    image[:, 19:21, 50:70] = 255  # a horizontal bar, 20 pixels long, in the middle
    for seed in range(10):
        turned = augment(image, image, Augment(flip=False, max_rotation_degrees=90), seed)[0][0].float()
        y, x = (turned > 100).nonzero().double().T
        length = torch.hypot(y.max() - y.min(), x.max() - x.min())
        assert 17 < length < 23


def test_borders_are_repeated_or_white():
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    settings = {border: Augment(flip=False, max_shift=0.5, border=border) for border in ("replicate", "white")}
    assert augment(black, black, settings["replicate"], 1)[0].max() == 0
    white = augment(black, black, settings["white"], 1)[0]
    assert white.max() == 255 and white.min() == 0
    as_float = augment(to_float(black), to_float(black), settings["white"], 1)[0]
    assert as_float.max() == 1 and torch.equal(to_u8(as_float), white)


def test_colours_change_only_where_asked():
    source, target = smooth(), smooth(phase=1)
    changes = {"flip": False, "max_brightness": 0.3, "max_contrast": 0.3, "max_saturation": 0.3, "max_hue": 0.2}
    for which, source_changes, target_changes in (("source", True, False), ("target", False, True), ("both", True, True)):
        a, b = augment(source, target, Augment(**changes, colour_of=which), 1)
        assert torch.equal(a, source) != source_changes and torch.equal(b, target) != target_changes
    a, b = augment(source, source.clone(), Augment(**changes, colour_of="both"), 1)
    assert torch.equal(a, b)


def test_brightness_is_a_factor():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = [augment(grey, grey, Augment(flip=False, max_brightness=0.5), seed)[0][0, 0, 0].item() for seed in range(100)]
    assert 50 <= min(values) < 60 and 140 < max(values) <= 150


def test_switching_one_change_on_leaves_the_others_as_they_were():
    source, target = smooth(), smooth(phase=1)
    for seed in range(5):
        plain = augment(source, target, GEOMETRY, seed)[1]
        coloured = augment(source, target, Augment(max_rotation_degrees=20, max_zoom=0.2, max_shift=0.1, max_hue=0.1), seed)[1]
        assert torch.equal(plain, coloured)


@pytest.mark.parametrize("wrong", [{"views": 0}, {"max_zoom": -0.1}, {"max_hue": 0.6}, {"max_rotation_degrees": 200}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}; wanted"):
        Augment(**wrong)
