"""Translator: pixels to pixels over any backend. Exact here, because the fake backend is."""

from dataclasses import replace

import pytest
import torch

from clipdit.backend import Backend, Condition, available_backends, open_backend
from clipdit.fake_backend import LATENT_SCALE, SEED_SHARE, FakeBackend
from clipdit.images import to_u8
from clipdit.sampling import SamplingTable, ddpm_table, guide, sample, seeded_noise
from clipdit.translator import Translator


@pytest.fixture
def sources():
    return torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def translator():
    return Translator(FakeBackend(native_size=(32, 48)))


def test_fake_backend_is_a_backend_and_opens_by_name_without_a_model():
    backend = open_backend(None, "fake")
    assert isinstance(backend, Backend) and isinstance(backend, FakeBackend)
    assert available_backends("/nowhere")["fake"] is None


def test_unknown_backend_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"no backend fake2; there are .*eager.*fake"):
        open_backend(None, "fake2")


def test_folder_that_does_not_exist_is_refused_in_one_line():
    with pytest.raises(ValueError, match="/nowhere/at/all") as raised:
        open_backend("/nowhere/at/all")
    assert "\n" not in str(raised.value)


def test_result_is_the_posterised_negative_plus_a_share_of_the_seeds_noise(translator, sources):
    output = translator(sources, seeds=range(5), steps=3)
    latent = LATENT_SCALE * torch.nn.functional.avg_pool2d(sources / 127.5 - 1, 4)
    expected = -latent.round() + SEED_SHARE * seeded_noise(range(5), (3, 8, 12))
    expected = to_u8(torch.nn.functional.interpolate(expected / LATENT_SCALE, scale_factor=4))
    assert (output.int() - expected.int()).abs().max() <= 1  # rounding of x along the loop


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 7])
def test_every_solver_ends_at_the_same_place_on_a_straight_flow(translator, sources, solver, steps):
    output = translator(sources, seeds=range(5), steps=steps, solver=solver)
    # dpmpp_2m starts at t = 0.001, so a thousandth of the noise more remains
    assert (output.int() - translator(sources, seeds=range(5)).int()).abs().max() <= 1


def test_same_seed_gives_same_image_in_any_batch(translator, sources):
    together = translator(sources, seeds=[10, 11, 12, 13, 14])
    turned = translator(sources.flip(0), seeds=[14, 13, 12, 11, 10])
    assert torch.equal(together, turned.flip(0))
    for i in range(5):
        assert torch.equal(together[i], translator(sources[i : i + 1], seeds=[10 + i])[0])


def test_seeds_make_a_difference(translator, sources):
    assert not torch.equal(translator(sources[:1], seeds=[1]), translator(sources[:1], seeds=[2]))


def test_encodes_once_and_asks_the_network_once_a_step(sources):
    calls = []
    translator = Translator(FakeBackend(on_call=lambda call, batch: calls.append((call, batch))))
    translator(sources, seeds=range(5), steps=3)
    assert calls == [("encode", 5), ("velocity", 5), ("velocity", 5), ("velocity", 5), ("decode", 5)]


def test_guidance_asks_for_both_in_one_call_unless_the_backend_takes_too_few(sources):
    calls = []
    translator = Translator(FakeBackend(on_call=lambda call, batch: calls.append((call, batch))))
    guided = translator(sources[:4], seeds=range(4), steps=1, guidance=2.0)
    assert calls[1:-1] == [("velocity", 8)]
    calls.clear()
    narrow = Translator(FakeBackend(max_batch=4, on_call=lambda call, batch: calls.append((call, batch))))
    assert torch.equal(narrow(sources[:4], seeds=range(4), steps=1, guidance=2.0), guided)
    assert calls[1:-1] == [("velocity", 4), ("velocity", 4)]


def test_a_model_that_never_went_without_a_source_takes_no_guidance(sources):
    backend = FakeBackend(native_size=(32, 48))
    backend.limits = replace(backend.limits, guidable=False)
    translator = Translator(backend)
    with pytest.raises(ValueError, match=r"guidance is 1\.5; this model was trained without, and takes 1"):
        translator(sources, seeds=range(5), guidance=1.5)
    plain = Translator(FakeBackend(native_size=(32, 48)))(sources, seeds=range(5))
    assert torch.equal(translator(sources, seeds=range(5), guidance=1.0), plain)


def test_guidance_moves_away_from_the_unconditioned_picture(translator, sources):
    plain = translator(sources, seeds=range(5)).float() - 127.5
    guided = translator(sources, seeds=range(5), guidance=1.5).float() - 127.5
    assert guided.abs().mean() > 1.2 * plain.abs().mean()  # the null condition's picture is plain grey


def test_on_step_sees_every_row(translator, sources):
    seen = []
    translator(sources, seeds=range(5), steps=3, on_step=lambda i, x: seen.append((i, tuple(x.shape))))
    assert seen == [(i, (5, 3, 8, 12)) for i in range(3)]


def test_whole_loop_of_a_backend_is_used_when_it_can_be(sources):
    class Unrolled(FakeBackend):
        loops = 0

        def sample(
            self, noise: torch.Tensor, condition: Condition, table: SamplingTable, *, guidance: float = 1.0
        ) -> torch.Tensor:
            self.loops += 1
            return sample(guide(self.velocity, condition, guidance), noise, table)

    backend = Unrolled(native_size=(32, 48))
    translator, plain = Translator(backend), Translator(FakeBackend())
    for guidance in (1.0, 2.0):
        given = {"seeds": range(5), "guidance": guidance}
        assert torch.equal(translator(sources, **given), plain(sources, **given))
    assert backend.loops == 2
    translator(sources, seeds=range(5), on_step=lambda i, x: None)  # one graph cannot be watched
    assert backend.loops == 2


def test_noise_inside_the_loop_belongs_to_the_image_not_to_the_batch(sources):
    class Ancestral(FakeBackend):
        def table(self, steps: int, solver: str | None = None) -> SamplingTable:
            return ddpm_table(torch.linspace(0.999, 0.01, 50), steps, "ddpm")

    translator = Translator(Ancestral())
    together = translator(sources, seeds=range(5), steps=4)
    assert torch.equal(together[3], translator(sources[3:4], seeds=[3], steps=4)[0])
    assert not torch.equal(together[3], translator(sources[3:4], seeds=[4], steps=4)[0])


def test_source_and_caller_are_left_alone(translator, sources):
    before = sources.clone()
    output = translator(sources, seeds=range(5))
    assert torch.equal(sources, before)
    assert output.dtype == torch.uint8 and output.device.type == "cpu" and output.shape == sources.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, "1 seeds for 5 images"),
        ({"seeds": [-1] * 5}, "seed is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"solver": "magic"}, "magic.*euler, heun"),
        ({"guidance": float("nan")}, "guidance is nan"),
    ],
)
def test_impossible_requests_say_what_was_wanted(translator, sources, change, message):
    with pytest.raises(ValueError, match=message):
        translator(sources, **{"seeds": range(5), **change})


def test_images_of_many_sizes_come_back_at_theirs_and_do_not_depend_on_their_company(translator):
    generator = torch.Generator().manual_seed(1)
    sizes = [(10, 200), (64, 64), (33, 47), (1, 1), (300, 20), (32, 48)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    for how in ("pad", "stretch"):
        outputs = translator.translate_images(images, seeds=range(6), how=how, batch_size=4)
        assert [tuple(output.shape[1:]) for output in outputs] == sizes
        for i, image in enumerate(images):
            assert torch.equal(translator.translate_image(image, seed=i, how=how), outputs[i])
    (cropped,) = translator.translate_images(images[:1], seeds=[0], how="crop")
    assert tuple(cropped.shape[1:]) == (10, 15)


def test_own_size_groups_images_by_size(sources):
    calls = []
    translator = Translator(FakeBackend(on_call=lambda call, batch: calls.append((call, batch))))
    images = [sources[0], sources[1, :, :29, :45], sources[2, :, :16, :16], sources[3]]
    outputs = translator.translate_images(images, seeds=range(4), size="own", steps=1)
    assert [output.shape for output in outputs] == [image.shape for image in images]
    assert [batch for call, batch in calls if call == "encode"] == [3, 1]
    assert torch.equal(outputs[0], Translator(FakeBackend())(sources[:1], seeds=[0])[0])  # 32 x 48: nothing to fit


@pytest.mark.parametrize(
    "image, wanted",
    [
        ((64, 64), (64, 64)),
        ((200, 200), (96, 96)),  # both squares fit; the larger one scales it less
        ((63, 65), (64, 64)),
        ((70, 100), (64, 96)),
        ((100, 70), (96, 64)),
        ((10, 300), (64, 96)),  # nothing is as wide: the widest shape leaves least empty
    ],
)
def test_the_nearest_size_is_of_the_images_shape_then_of_its_scale(image, wanted):
    sizes = ((64, 64), (96, 96), (64, 96), (96, 64))
    translator = Translator(FakeBackend(native_size=(64, 64), sizes=sizes))
    picture = torch.randint(0, 256, (3, *image), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fitted, placement = translator.fit(picture, "nearest")
    assert tuple(fitted.shape[1:]) == wanted and placement.restore(fitted).shape == picture.shape


def test_where_any_size_is_taken_the_nearest_is_the_images_own(sources):
    translator = Translator(FakeBackend())
    for size in ((33, 47), (64, 32)):
        picture = sources[0, :, : size[0], : size[1]].contiguous()
        assert torch.equal(translator.fit(picture, "nearest")[0], translator.fit(picture, "own")[0])


def test_backend_limits_are_the_translators_limits(sources):
    translator = Translator(FakeBackend(native_size=(32, 48), sizes=((32, 48),), max_batch=2))
    assert len(translator.translate_images(list(sources), seeds=range(5), batch_size=99)) == 5
    with pytest.raises(ValueError, match="at most 2"):
        translator(sources, seeds=range(5))
    with pytest.raises(ValueError, match="64 x 64; this backend takes 48 x 32"):
        translator.translate_image(sources[0], size=(64, 64))


def test_leaving_the_context_closes_the_backend(sources):
    with Translator(FakeBackend()) as translator:
        translator(sources, seeds=range(5))
    with pytest.raises(RuntimeError, match="closed"):
        translator(sources, seeds=range(5))
