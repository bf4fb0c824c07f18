from collections import Counter

import pytest
import torch

from clipdit.data.groups import MAX_DISTANCE, Groups, assign_splits, describe


def drawing(seed: int, colour: tuple[int, int, int] = (40, 40, 40), shift: int = 0) -> torch.Tensor:
    """A few rectangles in one colour on white, (3, 96, 96) uint8."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((3, 96, 96), 255, dtype=torch.uint8)
    for _ in range(3):
        top, left, height, width = torch.randint(8, 40, (4,), generator=generator).tolist()
        image[:, top + shift : top + shift + height, left : left + width] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return image


def distance(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float(1 - describe(*a) @ describe(*b))


def test_another_colour_is_near_and_another_drawing_far():
    one = (drawing(0), drawing(0, (200, 30, 30)))
    assert distance(one, one) == pytest.approx(0, abs=1e-5)
    assert distance(one, (drawing(0), drawing(0, (120, 200, 255)))) < MAX_DISTANCE
    assert all(distance(one, (drawing(seed), drawing(seed, (200, 30, 30)))) > 2 * MAX_DISTANCE for seed in range(1, 20))


def test_size_does_not_matter_and_one_pixel_of_shift_hardly():
    one = (drawing(0), drawing(0))
    large = (drawing(0).repeat_interleave(3, 1).repeat_interleave(3, 2), drawing(0))
    assert distance(one, large) < 0.02
    assert distance(one, (drawing(0, shift=1), drawing(0, shift=1))) < distance(one, (drawing(0, shift=9), drawing(0, shift=9)))


def test_blank_images_equal_each_other_and_nothing_else():
    blank = torch.full((3, 96, 96), 255, dtype=torch.uint8)
    assert distance((blank, blank), (blank // 2, blank // 3)) == pytest.approx(0, abs=1e-5)
    assert distance((blank, blank), (drawing(0), drawing(0))) == pytest.approx(1, abs=1e-5)


def test_near_items_hang_together_whatever_the_block_size():
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=1)
    which = torch.randint(0, 40, (300,), generator=generator)
    items = torch.nn.functional.normalize(centres[which] + 0.01 * torch.randn(300, 64, generator=generator), dim=1)
    for rows_at_once in (7, 100, 2048):
        groups = Groups(300)
        groups.join_near(items.half(), 0.1, rows_at_once)
        first = [which.tolist().index(centre) for centre in which.tolist()]
        assert [groups.of(item) for item in range(300)] == first


def test_chains_and_thousands_of_equal_items_become_one_group():
    groups = Groups(1500)
    groups.join_near(torch.ones(1500, 4) / 2, rows_at_once=256)
    assert {groups.of(item) for item in range(1500)} == {0}
    chain = Groups(5)
    chain.join_equal([["a"], ["a", "b"], ["c"], ["b", "d"], ["d"]])
    assert [chain.of(item) for item in range(5)] == [0, 0, 2, 0, 0]


def test_splits_have_about_the_wanted_sizes_and_keep_groups_together():
    groups = [f"g{i // 2}" for i in range(4000)]
    splits = assign_splits(groups, val_fraction=0.05, test_fraction=0.1)
    counts = Counter(splits)
    assert abs(counts["val"] - 200) < 60 and abs(counts["test"] - 400) < 80  # about 4 standard deviations of a fair draw
    assert all(splits[i] == splits[i + 1] for i in range(0, 4000, 2))


def test_a_group_keeps_its_split_when_others_are_added():
    groups = [f"g{i}" for i in range(500)]
    few = assign_splits(groups, val_fraction=0.05, test_fraction=0.1)
    many = assign_splits([f"h{i}" for i in range(500)] + groups, val_fraction=0.05, test_fraction=0.1)
    assert many[500:] == few


@pytest.mark.parametrize("count", [3, 4, 5, 8, 30])
def test_small_sets_have_something_in_every_split(count):
    for salt in range(20):
        splits = assign_splits([f"{salt}-{i}" for i in range(count)], val_fraction=0.05, test_fraction=0.1)
        assert set(splits) == {"train", "val", "test"}


def test_too_small_sets_and_large_groups_stay_in_train():
    assert set(assign_splits(["a", "b"], val_fraction=0.05, test_fraction=0.1)) == {"train"}
    for salt in range(50):
        splits = assign_splits([f"large{salt}"] * 50 + [f"{salt}-{i}" for i in range(50)], val_fraction=0.05, test_fraction=0.1)
        assert splits[0] == "train"


def test_fractions_may_be_nothing_but_not_all():
    assert set(assign_splits(list("abcdefgh"), val_fraction=0, test_fraction=0)) == {"train"}
    with pytest.raises(ValueError, match=r"val and test are 0\.5 and 0\.5"):
        assign_splits(["a"], val_fraction=0.5, test_fraction=0.5)
