"""The DiT: sizes, what it reads, how it starts, and that every way to run it gives the same numbers."""

import copy
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from clipdit.backend import Condition
from clipdit.model.dit import SIZES, DiT
from clipdit.model.ops import PLAIN, Ops
from clipdit.testing import TOLERANCES

TOKENS, WIDTHS = 5, {"clip_token_width": 12, "clip_embedding_width": 10}
CONDITIONINGS = ["clip", "concat", "both"]


def fresh(**changes):
    """As at the start of training."""
    torch.manual_seed(0)
    return DiT(**{"latent_channels": 4, "width": 32, "depth": 2, "heads": 2, **WIDTHS, **changes})


def awake(**changes):
    """As after training: nothing is zero, so every input matters."""
    dit = fresh(**changes)
    for parameter in dit.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return dit.eval()


def inputs(batch=2, channels=4, height=6, width=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, latent = torch.randn(2, batch, channels, height, width, generator=generator)
    t = torch.rand(batch, generator=generator)
    tokens = torch.randn(batch, TOKENS, WIDTHS["clip_token_width"], generator=generator)
    pooled = torch.randn(batch, WIDTHS["clip_embedding_width"], generator=generator)
    return x, t, Condition(tokens=tokens, pooled=pooled, latent=latent)


def assert_near(got, wanted, dtype=torch.float32):
    assert got.isfinite().all()
    assert (got.float() - wanted.float()).abs().max() <= TOLERANCES[dtype].relative * wanted.float().abs().max()


# Millions of parameters with patch 2 on 4 channels: DiT's own (Peebles & Xie 2023, table 4; ViT's for Ti), then ours with
# conditioning concat, and both with ViT-L/14's tokens in every block. Ours are smaller where DiT's blocks have a modulation layer
# each: 6 L D^2 of its 18 L D^2 parameters. All of ours share one (adaLN-single).
PUBLISHED_CONCAT_BOTH = {
    "Ti": (5.7, 5.74, 11.53),
    "S": (33, 22.75, 36.19),
    "B": (130, 90.62, 124.87),
    "L": (458, 312.12, 414.72),
    "XL": (675, 458.70, 601.42),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_about_the_published_number_of_parameters(size):
    width, depth, heads = SIZES[size]
    published, *wanted = PUBLISHED_CONCAT_BOTH[size]
    with torch.device("meta"):
        models = [
            DiT(width=width, depth=depth, heads=heads, conditioning=conditioning, clip_token_width=1024, clip_embedding_width=768)
            for conditioning in ("concat", "both")
        ]
    counts = [sum(p.numel() for p in dit.parameters()) / 1e6 for dit in models]
    assert counts == pytest.approx(wanted, abs=0.01)
    separate = (6 * depth * width**2 if size != "Ti" else 0) / 1e6  # ViT-Ti has no modulation
    assert counts[0] + separate == pytest.approx(published, rel=0.04)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize(("patch", "channels", "height", "width"), [(1, 3, 3, 5), (2, 16, 4, 10), (4, 32, 12, 8), (2, 4, 2, 2)])
@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_any_patch_channels_and_size(patch, channels, height, width, conditioning, positions):
    dit = awake(latent_channels=channels, patch=patch, conditioning=conditioning, positions=positions)
    x, t, condition = inputs(channels=channels, height=height, width=width)
    with torch.no_grad():
        out = dit(x, t, condition)
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 0.01


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_it_reads_what_its_conditioning_says_and_nothing_else(conditioning):
    dit = awake(conditioning=conditioning)
    x, t, condition = inputs()
    other = inputs(seed=2)[2]
    with torch.no_grad():
        out = dit(x, t, condition)
        for name in ("tokens", "pooled", "latent"):
            parts = {n: getattr(other if n == name else condition, n) for n in ("tokens", "pooled", "latent")}
            changed = not torch.equal(dit(x, t, Condition(**parts)), out)
            assert changed == (conditioning == "both" or (name == "latent") == (conditioning == "concat")), name
        assert not torch.equal(dit(x, t / 2, condition), out)


def test_cross_attention_sits_in_every_nth_block():
    x, t, condition = inputs()
    for every, wanted in [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (0, [])]:
        dit = awake(depth=4, cross_attention_every=every, conditioning="clip")
        assert [i for i, block in enumerate(dit.blocks) if block.cross is not None] == wanted
        with torch.no_grad():
            unread = torch.equal(dit(x, t, condition), dit(x, t, Condition(**vars(condition) | {"tokens": -condition.tokens})))
        assert unread == (every == 0)  # 0 is the paper: the embedding alone


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("options", [{}, {"norm": "rms", "qk_norm": False, "positions": "sincos", "mlp": "swiglu"}])
def test_training_starts_from_zero_and_soon_moves_every_parameter(conditioning, options):
    dit = fresh(conditioning=conditioning, **options).train()
    x, t, condition = inputs(batch=4)
    assert torch.equal(dit(x, t, condition), torch.zeros_like(x))
    captured = []
    hook = dit.blocks[-1].register_forward_hook(lambda module, args, out: captured.append((args[0], out[0])))
    dit(x, t, condition)
    hook.remove()
    if conditioning != "clip":  # the source is not yet heard, either
        assert torch.equal(dit.context(condition).source_tokens, torch.zeros(4, 12, 32))
    assert torch.equal(*captured[0])  # a block leaves the tokens as they are
    optimizer = torch.optim.Adam(dit.parameters(), lr=1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        (dit(x, t, condition) - condition.latent).square().mean().backward()
        optimizer.step()
    dead = [name for name, parameter in dit.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []


@pytest.mark.parametrize("mlp, other", [("gelu", "swiglu"), ("swiglu", "gelu")])
def test_operations_can_be_exchanged_and_every_one_is_used(mlp, other):
    dit, (x, t, condition), counts = awake(mlp=mlp), inputs(), Counter()

    def counted(name, operation):
        def count(*args, **options):
            counts[name] += 1
            return operation(*args, **options)

        return count

    with torch.no_grad():
        wanted = dit(x, t, condition)
        names = {field.name for field in fields(Ops) if getattr(PLAIN, field.name) is not None}
        dit.use(Ops(**{name: counted(name, getattr(PLAIN, name)) for name in names}))
        assert torch.equal(dit(x, t, condition), wanted)
        assert counts.keys() == names - {f"{other}_mlp"}
        copy.deepcopy(dit).use(PLAIN)  # another model's operations are its own
        before = counts.copy()
        dit(x, t, condition)
    assert counts == {name: 2 * count for name, count in before.items()}


def test_a_gated_mlp_is_as_large_as_a_plain_one_and_computes_a_gate():
    plain, gated = awake(width=48, heads=3), awake(width=48, heads=3, mlp="swiglu", mlp_ratio=2.667)
    mlps = [sum(p.numel() for layer in (b.fc1, b.fc2) for p in layer.parameters()) for b in (plain.blocks[0], gated.blocks[0])]
    assert mlps[1] == pytest.approx(mlps[0], rel=0.01)
    block, x = gated.blocks[0], torch.randn(2, 3, 48)
    gate, up = (x @ block.fc1.weight.T + block.fc1.bias).split(128, dim=-1)
    wanted = (gate * gate.sigmoid() * up) @ block.fc2.weight.T + block.fc2.bias
    given = (block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias)
    torch.testing.assert_close(block.ops.swiglu_mlp(x, *given), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_prepared_forward_is_the_forward(conditioning):
    dit = awake(conditioning=conditioning)
    x, _, condition = inputs()
    times = torch.tensor([0.0, 0.3, 0.9])
    with torch.no_grad():
        context = dit.context(condition)
        ahead = [dit.modulation(t.expand(2), context) for t in times]  # for every step, before the first
        for t, modulation in zip(times, ahead, strict=True):
            assert torch.equal(dit.forward_prepared(x, modulation, context), dit(x, t.expand(2), condition))


def test_source_projection_is_the_concatenation_on_channels():
    dit = awake(conditioning="concat")
    x, t, condition = inputs()
    tokens = []
    dit.blocks[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    with torch.no_grad():
        dit(x, t, condition)
        one = nn.Conv2d(8, 32, kernel_size=2, stride=2)  # a patch embedding that sees both latents at once
        weights = [linear.weight.reshape(32, 4, 2, 2) for linear in (dit.latent_in, dit.source_in)]
        one.weight.copy_(torch.cat(weights, dim=1))
        one.bias.copy_(dit.latent_in.bias)
        wanted = one(torch.cat((x, condition.latent), dim=1)).flatten(2).mT
    torch.testing.assert_close(tokens[0], wanted)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_null_condition_gives_finite_numbers_and_gradients(conditioning, dtype):
    dit = awake(conditioning=conditioning).to(dtype)
    x, t, condition = inputs()
    null = condition.null().map(lambda z: z.to(dtype))
    out = dit(x.to(dtype), t, null)
    out.float().square().mean().backward()
    assert out.dtype == dtype and out.isfinite().all() and out.any()
    assert all(p.grad.isfinite().all() for p in dit.parameters() if p.grad is not None)
    with torch.no_grad():
        assert not torch.equal(dit(x.to(dtype), t, condition.map(lambda z: z.to(dtype))), out)


@pytest.mark.parametrize("conditioning", ["concat", "both"])
def test_gradient_checkpointing_changes_no_gradient(conditioning):
    plain = awake(conditioning=conditioning).train()
    frugal = copy.deepcopy(plain)
    frugal.enable_gradient_checkpointing()
    assert frugal.gradient_checkpointing and not plain.gradient_checkpointing
    x, t, condition = inputs()
    for dit in (plain, frugal):
        dit(x, t, condition).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    frugal.disable_gradient_checkpointing()
    assert not frugal.gradient_checkpointing


@pytest.mark.parametrize("training", [False, True])
def test_autocast_to_bfloat16_is_close_to_float32(training):
    dit = awake().train(training)
    x, t, condition = inputs()
    with torch.set_grad_enabled(training):
        wanted = dit(x, t, condition)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = dit(x, t, condition)
    assert_near(got, wanted, torch.bfloat16)
    assert not torch.equal(got.float(), wanted)


def test_pure_bfloat16_is_close_to_float32():
    dit = awake()
    x, t, condition = inputs()
    with torch.no_grad():
        wanted = dit(x, t, condition)
        half = dit.to(torch.bfloat16)
        got = half(x.bfloat16(), t, condition.map(torch.Tensor.bfloat16))
    assert got.dtype == torch.bfloat16
    assert_near(got, wanted, torch.bfloat16)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_an_image_does_not_depend_on_its_batch(conditioning):
    dit = awake(conditioning=conditioning)
    x, t, condition = inputs(batch=3)
    with torch.no_grad():
        together = dit(x, t, condition)
        for i in range(3):
            alone = dit(x[i : i + 1], t[i : i + 1], condition.map(lambda z, i=i: z[i : i + 1]))
            torch.testing.assert_close(alone, together[i : i + 1])


def test_saved_and_loaded_it_is_the_same(tmp_path, capfd):
    dit = awake(norm="rms", positions="sincos", qk_norm=False, cross_attention_every=2, depth=3, patch=1, mlp_ratio=3.0)
    dit.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {k: v for k, v in dit.config.items() if k[0] != "_"}
    x, t, condition = inputs()
    with torch.no_grad():
        assert torch.equal(again(x, t, condition), dit(x, t, condition))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert capfd.readouterr() == ("", "")


# In a process of its own: the runtime type checks of the tests cannot be traced.
GRAPHS = """
import torch
from torch import nn
from clipdit.backend import Condition
from clipdit.model.dit import DiT

torch.manual_seed(0)
dit = DiT(width=32, depth=2, heads=2, clip_token_width=12, clip_embedding_width=10).eval()
for parameter in dit.parameters():
    if not parameter.any():
        nn.init.normal_(parameter, std=0.1)
x, latent, t = *torch.randn(2, 2, 4, 6, 8), torch.rand(2)
tokens, pooled = torch.randn(2, 5, 12), torch.randn(2, 10)
condition = Condition(tokens=tokens, pooled=pooled, latent=latent)

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.dit = dit

    def forward(self, x, t, tokens, pooled, latent):
        return self.dit(x, t, Condition(tokens=tokens, pooled=pooled, latent=latent))

with torch.no_grad():
    wanted = dit(x, t, condition)
    {body}
torch.testing.assert_close(got, wanted)
print("same")
"""


def same_numbers(body):
    done = subprocess.run([sys.executable, "-c", GRAPHS.replace("{body}", body)], capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr[-3000:]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_to_one_graph(backend):
    same_numbers(f'got = torch.compile(dit, fullgraph=True, backend="{backend}")(x, t, condition)')


def test_it_exports_with_any_batch():
    same_numbers(
        "batch = {0: torch.export.Dim('batch')}; "
        "program = torch.export.export(Flat(), (x, t, tokens, pooled, latent), dynamic_shapes=(batch,) * 5); "
        "got = torch.cat([program.module()(*(z[i:i + 1] for z in (x, t, tokens, pooled, latent))) for i in (0, 1)])"
    )


def test_a_latent_or_condition_that_does_not_fit_is_refused_in_one_line():
    dit = awake()
    x, t, condition = inputs()
    with pytest.raises(ValueError, match=r"^latent is 3 x 6 x 8; this model takes 4 channels and sides that are multiples of 2$"):
        dit(x[:, :3], t, condition)
    with pytest.raises(ValueError, match=r"^latent is 4 x 5 x 8; this model takes 4 channels and .* multiples of 2$"):
        dit(x[:, :, :5], t, condition)
    with pytest.raises(ValueError, match=r"^source latent is 4 x 6 x 4; wanted that of the latent to predict, 4 x 6 x 8$"):
        dit(x, t, Condition(tokens=condition.tokens, pooled=condition.pooled, latent=condition.latent[..., :4]))
    with pytest.raises(ValueError, match=r"^CLIP tokens and embedding have widths \(11, 10\); this model takes \(12, 10\)$"):
        dit(x, t, Condition(tokens=condition.tokens[..., :11], pooled=condition.pooled, latent=condition.latent))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 30}, "width 30 with 2 heads; the width of a head must be a whole multiple of 4"),
        ({"width": 36}, "width 36 with 2 heads"),
        ({"heads": 0}, "must be at least 1"),
        ({"depth": 0}, "must be at least 1"),
        ({"patch": 0}, "must be at least 1"),
        ({"cross_attention_every": -1}, "cross_attention_every, 0"),
    ],
)
def test_an_impossible_network_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fresh(**wrong)


@pytest.mark.parametrize("wrong", [{"conditioning": "text"}, {"norm": "batch"}, {"positions": "none"}, {"mlp": "relu"}])
def test_a_word_the_network_does_not_know_is_refused(wrong):
    name, word = next(iter(wrong.items()))
    with pytest.raises((ValueError, TypeCheckError), match=f"{name}|{word}"):  # with runtime types on, these speak first
        fresh(**wrong)
