"""What one gets without us, to be measured against: the network exported as it is and opened with a runtime's own settings.

The whole DiT runs at every step, projections of the condition and modulation included; nothing is kept between steps. Opened by
name only (`clipdit bench --backends plain-onnx`), from a checkpoint: each opening exports it anew.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from clipdit.backend import Condition, Limits
from clipdit.model.network import Network
from clipdit.pipeline import ClipDiTPipeline, load_checkpoint
from clipdit.sampling import SamplingTable
from clipdit.shapes import ImageU8, Latent, Time
from clipdit.torch_backend import EagerBackend, checkpoint_fingerprint
from clipdit_export.backends.base import Graph, Tensors
from clipdit_export.processor import computes_bf16
from clipdit_export.sessions import open_session

PARTS = ("image_encoder", "vae_encoder", "vae_decoder")


class Forward(nn.Module):
    """x, t, those parts of a `Condition` that the model reads -> prediction: `DiT.forward`."""

    def __init__(self, dit: Network):
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, t: Tensor, *given: Tensor) -> Tensor:
        from clipdit_export.parts import condition_from

        return self.dit(x, t, condition_from(self.dit, given))


class PlainBackend:
    """A checkpoint, exported part by part; of each runtime a subclass."""

    name: str
    module: ClassVar[str]
    preference = 0
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    """What it computes in, the runtime's own choice first."""

    def __init__(self, pipeline: ClipDiTPipeline, folder: Path, dtype: torch.dtype):
        from clipdit_export.graphs import trace
        from clipdit_export.parts import Part, condition_names, cut

        dit, autoencoder, clip = pipeline.transformer, pipeline.autoencoder, pipeline.clip
        self.limits = Limits(
            device=torch.device("cpu"),
            dtype=dtype,
            max_batch=None,
            sizes=(pipeline.native_size,),
            multiple=autoencoder.downscale * dit.config["patch"],
            native_size=pipeline.native_size,
            latent_channels=autoencoder.latent_channels,
            downscale=autoencoder.downscale,
            guidable=pipeline.config["guidable"],
        )
        self.defaults, self._objective = pipeline.sampling_defaults, pipeline.objective
        self.fingerprint = checkpoint_fingerprint(folder)
        self._tokens = (clip.tokens if clip is not None else 0, dit.config["clip_token_width"])
        self._pooled = dit.config["clip_embedding_width"]
        for module in (dit, pipeline.vae, pipeline.image_encoder):
            if module is not None:
                module.requires_grad_(False)
        parts = {part.name: part for part in cut(pipeline, pipeline.native_size)}
        examples = {"tokens": torch.zeros(2, *self._tokens), "pooled": torch.zeros(2, self._pooled)}
        x = parts["vae_decoder"].inputs["latent"]
        inputs = {"x": x, "t": torch.zeros(2)} | {name: (examples | {"latent": x})[name] for name in condition_names(dit)}
        parts["forward"] = Part(name="forward", module=Forward(dit), inputs=inputs, outputs=("velocity",))
        self._graphs: dict[str, Graph] | None = {}
        with TemporaryDirectory() as place:
            import onnx_ir as ir

            for name in (*PARTS, "forward"):
                if name in parts:
                    path = Path(place) / f"{name}.onnx"
                    ir.save(trace(parts[name]), path, external_data=f"{name}.bin")
                    self._graphs[name] = self._load(path)

    def _load(self, path: Path) -> Graph:
        raise NotImplementedError

    @classmethod
    def why_not(cls, folder: Path) -> str | None:
        for module in (cls.module, "onnxscript"):
            if find_spec(module) is None:
                return f"the Python package {module} is not installed. Run `pip install {module}`"
        return EagerBackend.why_not(folder)

    @classmethod
    def open(cls, folder: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Export and open a checkpoint. ValueError for a damaged one, or another device than the CPU."""
        if device is not None and device.type != "cpu":
            raise ValueError(f"device is {device}; the {cls.name} backend runs on the CPU")
        if dtype not in (None, *cls.dtypes):
            raise ValueError(f"dtype is {dtype}; the {cls.name} backend computes in {', '.join(map(str, cls.dtypes))}")
        return cls(load_checkpoint(folder), folder, dtype or cls.dtypes[0])

    def encode(self, source_u8: ImageU8) -> Condition:
        graphs = self._open()
        self.limits.check_images(tuple(source_u8.shape))
        given = {"source_u8": source_u8.cpu()}
        latent = graphs["vae_encoder"](given)["latent"]
        if "image_encoder" in graphs:
            seen = graphs["image_encoder"](given)
            return Condition(tokens=seen["tokens"], pooled=seen["pooled"], latent=latent)
        count = len(latent)
        return Condition(
            tokens=latent.new_zeros(count, *self._tokens), pooled=latent.new_zeros(count, self._pooled), latent=latent
        )

    def velocity(self, x: Latent, t: Time, condition: Condition) -> Latent:
        graphs = self._open()
        if x.shape != condition.latent.shape or t.shape != x.shape[:1]:
            raise ValueError(f"x is {tuple(x.shape)}, t is {tuple(t.shape)}; the condition is of {tuple(condition.latent.shape)}")
        given = {name: getattr(condition, name).float() for name in ("tokens", "pooled", "latent")}
        return graphs["forward"]({"x": x.float(), "t": t.float(), **given})["velocity"].to(x.dtype)

    def decode(self, latent: Latent) -> ImageU8:
        out = self._open()["vae_decoder"]({"latent": latent.float()})
        if not out["finite"].all():
            raise ValueError("the decoded image is not finite")
        return out["image_u8"]

    def table(self, steps: int, solver: str | None = None) -> SamplingTable:
        return self._objective.table(steps, solver)

    def close(self) -> None:
        self._graphs = None

    def _open(self) -> dict[str, Graph]:
        if self._graphs is None:
            raise RuntimeError(f"the {self.name} backend is closed; open it again")
        return self._graphs


def _on_numpy(run: Callable[[dict[str, Any]], dict[str, Any]]) -> Graph:
    def graph(given: Tensors) -> Tensors:
        arrays = run({name: tensor.contiguous().numpy() for name, tensor in given.items()})
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    return graph


class PlainOnnxBackend(PlainBackend):
    """ONNX Runtime, as many threads as PyTorch uses. They do not spin: each of four sessions would take the cores of the next."""

    name = "plain-onnx"
    module = "onnxruntime"

    def _load(self, path: Path) -> Graph:
        session = open_session(path)
        read, made = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
        return _on_numpy(lambda given: dict(zip(made, session.run(made, {n: given[n] for n in read}), strict=True)))


class PlainOpenVinoBackend(PlainBackend):
    """OpenVINO with its own settings: bfloat16 where the CPU has it, any batch; as many threads as PyTorch uses."""

    name = "plain-openvino"
    module = "openvino"

    dtypes = (torch.bfloat16, torch.float32) if computes_bf16() else (torch.float32,)

    def _load(self, path: Path) -> Graph:
        from clipdit_export.backends.openvino import core

        model = core().read_model(str(path))
        # by place, for a compiled model adds names: a tensor that nothing but an addition reads is called "Add", too
        read, made = [i.any_name for i in model.inputs], [o.any_name for o in model.outputs]
        settings = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
        if self.limits.dtype != self.dtypes[0]:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = core().compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()

        def run(given):
            request.infer([given[name] for name in read])
            return {name: request.get_output_tensor(i).data for i, name in enumerate(made)}

        return _on_numpy(run)
