"""TAEF2: the layers that the published files name, read off the names alone."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from clipdit.model.taef2 import Taef2


def block(number, pool):
    """The names and shapes of one residual block."""
    shapes = {
        f"{number}.conv.{i}.{kind}": (64, 64, 3, 3) if kind == "weight" else (64,)
        for i in (0, 2, 4)
        for kind in ("weight", "bias")
    }
    if pool:
        shapes |= {f"{number}.pool.0.weight": (256, 64, 1, 1), f"{number}.pool.1.weight": (256,), f"{number}.pool.1.bias": (256,)}
        shapes |= {f"{number}.pool.3.weight": (64, 256, 1, 1)}
    return shapes


def convolution(number, out, channels, bias=True):
    shapes = {f"{number}.weight": (out, channels, 3, 3)}
    return shapes | ({f"{number}.bias": (out,)} if bias else {})


def encoder_shapes():
    shapes = convolution(0, 64, 3) | block(1, False)
    for number in (2, 6, 10):
        shapes |= convolution(number, 64, 64, bias=False)
    for number in (3, 4, 5, 7, 8, 9):
        shapes |= block(number, False)
    for number in (11, 12, 13):
        shapes |= block(number, True)
    return shapes | convolution(14, 32, 64)


def decoder_shapes():
    shapes = convolution(1, 64, 32)
    for number in (3, 4, 5):
        shapes |= block(number, True)
    for number in (7, 12, 17):
        shapes |= convolution(number, 64, 64, bias=False)
    for number in (8, 9, 10, 13, 14, 15, 18):
        shapes |= block(number, False)
    return shapes | convolution(19, 3, 64)


def random_state(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = {1: 0.1, 4: 0.04}  # such that the signal neither dies nor explodes
    state = {name: torch.randn(shape, generator=generator) * scale[len(shape)] for name, shape in shapes.items()}
    return {name: (1 + x if ".pool.1.weight" in name else x).half() for name, x in state.items()}  # published in float16


@pytest.fixture(scope="module")
def states():
    return random_state(encoder_shapes(), 1), random_state(decoder_shapes(), 2)


@pytest.fixture(scope="module")
def files(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taef2")
    for name, state in zip(("taef2_encoder.pth", "taef2_decoder.pth"), states, strict=True):
        torch.save(state, folder / name)
    return folder / "taef2_encoder.pth", folder / "taef2_decoder.pth"


def conv(state, name, x, **options):
    return F.conv2d(
        x, state[f"{name}.weight"].float(), state[f"{name}.bias"].float() if f"{name}.bias" in state else None, **options
    )


def residual(state, number, x):
    if f"{number}.pool.0.weight" in state:
        pooled = F.group_norm(
            conv(state, f"{number}.pool.0", x), 4, *(state[f"{number}.pool.1.{k}"].float() for k in ("weight", "bias"))
        )
        x = x + conv(state, f"{number}.pool.3", pooled.relu())
    y = conv(state, f"{number}.conv.0", x, padding=1).relu()
    y = conv(state, f"{number}.conv.2", y, padding=1).relu()
    return (x + conv(state, f"{number}.conv.4", y, padding=1)).relu()


def test_it_computes_what_the_names_say(states, files):
    vae = Taef2.from_state_dicts(*files)
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder, decoder = states
    x = residual(encoder, 1, conv(encoder, "0", image / 2 + 0.5, padding=1))
    for down, blocks in ((2, (3, 4, 5)), (6, (7, 8, 9)), (10, (11, 12, 13))):
        x = conv(encoder, str(down), x, stride=2, padding=1)
        for number in blocks:
            x = residual(encoder, number, x)
    latent = conv(encoder, "14", x, padding=1)
    with torch.no_grad():
        assert vae.encode(image).latents.shape == (2, 32, 2, 3)
        torch.testing.assert_close(vae.encode(image).latents, latent, rtol=1e-4, atol=1e-4)
        x = conv(decoder, "1", 3 * torch.tanh(2 * latent / 3), padding=1).relu()
        for blocks, up in (((3, 4, 5), 7), ((8, 9, 10), 12), ((13, 14, 15), 17)):
            for number in blocks:
                x = residual(decoder, number, x)
            x = conv(decoder, str(up), x.repeat_interleave(2, -1).repeat_interleave(2, -2), padding=1)
        wanted = 2 * conv(decoder, "19", residual(decoder, 18, x), padding=1) - 1
        torch.testing.assert_close(vae.decode(2 * latent).sample, wanted, rtol=1e-4, atol=1e-3)


def test_published_names_are_all_of_its_names_and_float16_becomes_float32(states, files):
    vae = Taef2.from_state_dicts(*files)
    for part, state in zip((vae.encoder, vae.decoder), states, strict=True):
        assert part.state_dict().keys() == state.keys()
        assert all(torch.equal(part.state_dict()[name], tensor.float()) for name, tensor in state.items())
    assert vae.dtype == torch.float32 and not vae.training
    assert sum(p.numel() for p in vae.encoder.parameters()) == pytest.approx(1.34e6, rel=0.01)


def test_saved_by_diffusers_it_is_the_same(files, tmp_path):
    vae = Taef2.from_state_dicts(*files)
    vae.save_pretrained(tmp_path)
    again = Taef2.from_pretrained(tmp_path)
    latent = torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.decode(latent).sample, vae.decode(latent).sample)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_of_another_kind_are_refused_in_one_line(states, files, tmp_path):
    encoder, decoder = files
    other = tmp_path / "other.pth"

    def refusal():
        with pytest.raises(ValueError) as error:
            Taef2.from_state_dicts(encoder, other)
        assert "\n" not in str(error.value) and str(other) in str(error.value)
        return str(error.value)

    refusal()  # it is missing
    for content in (b"", b"garbage", decoder.read_bytes()[:5000], pickle.dumps(Evil()), pickle.dumps({"1.weight": Evil()})):
        other.write_bytes(content)
        refusal()
    for wrong, message in [
        ({"weight": torch.zeros(1)}, "lack 1.bias and 78 more"),
        ([1, 2], "cannot be read"),
        ({"1.weight": "text"}, "cannot be read"),
        (states[1] | {"1.weight": torch.zeros(64, 16, 3, 3)}, "1.weight is 64x16x3x3 in its weights, 64x32x3x3"),
    ]:
        torch.save(wrong, other)
        assert message in refusal()
