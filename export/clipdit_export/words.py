"""A bundle in words: what `clipdit export` and `inspect` print, and the README.md inside."""

from clipdit_export.manifest import REFERENCE, Manifest, Variant

README = """\
# {name}

An image-to-image translation model, exported by clipdit. manifest.json lists every file with its SHA-256; recipes/ says what runs
in which precision, for `clipdit export --recipe`.

    clipdit translate IN OUT --model {name}          # the best variant that this machine can run
    clipdit translate IN OUT --model {name} --backend {example}
    clipdit inspect {name} --verify                  # whether every file is as it was exported

```
{table}
```
"""


def readme(manifest: Manifest) -> str:
    """For whoever finds the folder."""
    target = manifest.variants[manifest.default].target
    return README.format(name=manifest.name, example=f"{target}:{manifest.default}", table=describe(manifest.name, manifest))


def describe(name: str, manifest: Manifest) -> str:
    """A bundle in words, with a table of its variants."""
    model, total = manifest.model, sum(file.bytes for file in manifest.files.values())
    height, width = model.native_size
    lines = [
        f"{name}: bundle of checkpoint {model.checkpoint[:12]}, {len(manifest.files)} files, {total / 1e6:.1f} MB",
        f"{model.conditioning} conditioning, {width} x {height} px, latents of {model.latent_channels} channels, up to "
        f"{manifest.max_batch} images a call, {model.steps} steps at guidance {model.guidance:g}",
        "",
        f"{'variant':24} {'MB':>7} {'ms/image':>9} {'drift':>7} {'ST-LPIPS':>9} {'PSNR':>6}  computes",
    ]
    shared = sum(file.bytes for name, file in manifest.files.items() if name.endswith("weights.bin"))
    for name, variant in manifest.variants.items():
        lines.append(_row(name, variant, manifest))
        if variant.not_default:
            lines.append(f"{'':24} not the default: {variant.not_default}")
    lines += [f"opened by default: {manifest.default}; graphs share {shared / 1e6:.1f} MB of weights"]
    if manifest.opset_ms:
        told = ", ".join(f"{ms:.1f} ms at opset {opset}" for opset, ms in manifest.opset_ms.items())
        lines += [f"attention: a step took {told} (ONNX Runtime, fp32); exported is opset {manifest.opset}"]
    if len(manifest.variants) > 1:
        lines += [f"calibration: {manifest.calibration}; drift and distances are to {REFERENCE}, of images not calibrated on"]
    lines += [f"left out: {name}: {reason}" for name, reason in manifest.skipped.items()]
    return "\n".join(lines)


def _row(name: str, variant: Variant, manifest: Manifest) -> str:
    size = sum(manifest.files[file].bytes for parts in variant.parts.values() for file in parts.values())
    quality, speed = variant.quality, variant.speed
    step = variant.audit.get("step")
    return (
        f"{name:24} {size / 1e6:7.1f} {f'{speed.per_image_ms:.0f}' if speed else '-':>9} "
        f"{f'{quality.worst_drift:.4f}' if quality else '-':>7} "
        f"{f'{quality.st_lpips:.4f}' if quality and quality.st_lpips is not None else '-':>9} "
        f"{f'{quality.psnr_db:.1f}' if quality else '-':>6}  "
        f"{', '.join(f'{n} x {kind}' for kind, n in step.counts.items()) if step else variant.runs_on}"
    )
