"""Triton's Python backend over a clipdit bundle. Written by `clipdit export`; needs clipdit in Triton's Python environment.

source_u8 (B, 3, H, W) uint8, seed (B, 1) int64 -> image_u8 (B, 3, H, W) uint8. Requests that Triton hands over together are
translated together; image i depends on (source i, seed i) alone, so the batch does not matter. A request that cannot be served
gets an error of its own, and the others their images.

Tensors go in and out by DLPack. Triton's own way from NumPy may be built for NumPy 1 (2.51's is); under NumPy 2, which clipdit
wants, it then answers with images of 0 bytes and no error.
"""

import json
from pathlib import Path

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
            source, seed = (torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in ("source_u8", "seed"))
            try:
                self.translator.backend.limits.check_images(tuple(source.shape))
                taken.append((i, source, seed.flatten().tolist()))
            except ValueError as error:
                answers[i] = _failure(error)
        chunks = _chunks(taken, self.translator.backend.limits.max_batch)
        for chunk in chunks:
            sources, seeds = torch.cat([source for _, source, _ in chunk]), [seed for _, _, own in chunk for seed in own]
            try:
                images = self.translator(sources, seeds=seeds).split([len(source) for _, source, _ in chunk])
                for (i, _, _), image in zip(chunk, images, strict=True):
                    tensor = pb_utils.Tensor.from_dlpack("image_u8", image.contiguous())
                    answers[i] = pb_utils.InferenceResponse(output_tensors=[tensor])
            except ValueError as error:
                if len(chunk) > 1:
                    chunks += [[item] for item in chunk]  # one by one, after the others: whose fault it is shows then
                else:
                    answers[chunk[0][0]] = _failure(error)
        return answers

    def finalize(self):
        self.translator.backend.close()


def _failure(error):
    told = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)  # HTTP 400
    return pb_utils.InferenceResponse(output_tensors=[], error=told)


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
