"""`clipdit inspect`: what a checkpoint or a bundle is."""

import json as json_module
from pathlib import Path


def inspect(folder: Path, /, *, verify: bool = False, public_key: Path | None = None, json: bool = False) -> int:
    """Say what a checkpoint or bundle is: parts, precisions, sizes, hashes, limits, where it can run.

    Args:
        folder: of a checkpoint or a bundle.
        verify: hash every part of a bundle again; exits 4 if one differs.
        public_key: of the one who has to have signed it, PEM; exits 4 if it was another, or nobody.
        json: print it as JSON.
    """
    from clipdit.backend import available_backends, locate
    from clipdit.cli import CHECK_FAILED, DONE
    from clipdit_export.manifest import MANIFEST_FILE, check_file, read_manifest
    from clipdit_export.signature import check_signature
    from clipdit_export.words import describe

    folder = Path(locate(str(folder)))
    if not (folder / MANIFEST_FILE).exists():
        print(_checkpoint(folder, as_json=json))
        return DONE
    manifest = read_manifest(folder)
    damaged = []
    for name in manifest.files if verify else ():
        try:
            check_file(folder, name, manifest)
        except ValueError as error:
            damaged.append(str(error))
    if public_key is not None:
        try:
            check_signature(folder, public_key)
        except ValueError as error:
            damaged.append(str(error))
    checked = verify or public_key is not None
    if json:
        print(json_module.dumps(manifest.model_dump(mode="json") | ({"damaged": damaged} if checked else {})))
    else:
        print(describe(str(folder), manifest))
        runtimes = {variant.target for variant in manifest.variants.values()}
        for name, reason in available_backends(folder).items():
            if name in runtimes:  # backends of bundles go by the name of what they open
                print(f"{name}: {'can run it here' if reason is None else reason}")
        if damaged:
            print("\n".join(damaged))
        elif public_key is not None:
            print(f"signed by the holder of {public_key}")
        if verify and not damaged:
            print(f"all {len(manifest.files)} files are as they were exported")
    return CHECK_FAILED if damaged else DONE


def _checkpoint(folder: Path, *, as_json: bool) -> str:
    from clipdit.pipeline import load_checkpoint
    from clipdit.torch_backend import checkpoint_fingerprint

    pipeline = load_checkpoint(folder)
    parts = {"transformer": pipeline.transformer, "vae": pipeline.vae, "image_encoder": pipeline.image_encoder}
    found = {
        "checkpoint": str(folder),
        "fingerprint": checkpoint_fingerprint(folder),
        "native_size": list(pipeline.native_size),
        "steps": pipeline.sampling_defaults.steps,
        "guidance": pipeline.sampling_defaults.guidance,
        "conditioning": pipeline.transformer.config["conditioning"],
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items() if module is not None},
    }
    if as_json:
        return json_module.dumps(found)
    height, width = pipeline.native_size
    lines = [
        f"{folder}: checkpoint {str(found['fingerprint'])[:12]}, {width} x {height} px, {found['conditioning']} conditioning",
        f"{found['steps']} steps at guidance {pipeline.sampling_defaults.guidance:g}",
    ]
    lines += [
        f"  {name:14} {type(parts[name]).__name__:32} {count / 1e6:7.2f} M parameters"
        for name, count in found["parameters"].items()
    ]
    return "\n".join(lines)
