"""Triton's Python backend over a clipdit bundle. Written by `clipdit export`; needs clipdit in Triton's Python environment.

source_u8 (B, 3, H, W) uint8, seed (B, 1) int64 -> image_u8 (B, 3, H, W) uint8. Requests that Triton hands over together are
translated together; image i depends on (source i, seed i) alone, so the batch does not matter. A request that cannot be served
gets an error of its own, and the others their images.
"""

import json
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]  # Triton's own, inside its process

from clipdit.translator import Translator


class TritonPythonModel:
    def initialize(self, args):
        settings = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self.translator = Translator.open(bundle, backend=settings.get("backend") or None)

    def execute(self, requests):
        answers = [None] * len(requests)
        taken = []
        for i, request in enumerate(requests):
            source, seed = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("source_u8", "seed"))
            try:
                self.translator.backend.limits.check_images(source.shape)
                taken.append((i, torch.from_numpy(np.ascontiguousarray(source)), [int(s) for s in seed.reshape(-1)]))
            except ValueError as error:
                answers[i] = _failure(error)
        for chunk in _chunks(taken, self.translator.backend.limits.max_batch):
            sources, seeds = torch.cat([source for _, source, _ in chunk]), [seed for _, _, own in chunk for seed in own]
            try:
                images = self.translator(sources, seeds=seeds).split([len(source) for _, source, _ in chunk])
                for (i, _, _), image in zip(chunk, images, strict=True):
                    tensor = pb_utils.Tensor("image_u8", image.numpy())
                    answers[i] = pb_utils.InferenceResponse(output_tensors=[tensor])
            except ValueError as error:
                for i, _, _ in chunk:
                    answers[i] = _failure(error)
        return answers

    def finalize(self):
        self.translator.backend.close()


def _failure(error):
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))


def _chunks(taken, most):
    """Requests of one size, together at most `most` images; a request is never taken apart."""
    chunks = []
    for item in taken:
        _, source, _ = item
        for chunk in chunks:
            room = most is None or sum(len(other) for _, other, _ in chunk) + len(source) <= most
            if room and chunk[0][1].shape[1:] == source.shape[1:]:
                chunk.append(item)
                break
        else:
            chunks.append([item])
    return chunks
