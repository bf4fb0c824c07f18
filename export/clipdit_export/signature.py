"""Who made a bundle: an Ed25519 signature (RFC 8032) of manifest.json, which lists the hash of every other file.

Hashes find damage; they do not find a bundle that somebody else has made. Keys are PEM files:

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem
"""

import os
from pathlib import Path
from typing import Any

from clipdit.files import write_atomically
from clipdit_export.manifest import MANIFEST_FILE

SIGNATURE_FILE = f"{MANIFEST_FILE}.sig"
TRUSTED = "CLIPDIT_TRUSTED_KEY"
"""Environment variable: the public key of those whose bundles are opened. Where it is set, no others are."""


def sign(bundle: Path, private_key: Path) -> None:
    """Write the signature beside the manifest. ValueError for a file that is no Ed25519 private key."""
    key = _key(private_key, private=True)
    write_atomically(bundle / SIGNATURE_FILE, key.sign((bundle / MANIFEST_FILE).read_bytes()))


def check_signature(bundle: Path, public_key: Path) -> None:
    """ValueError, one line, when the manifest of a bundle is not signed by the holder of that key."""
    from cryptography.exceptions import InvalidSignature

    key = _key(public_key, private=False)
    try:
        key.verify((bundle / SIGNATURE_FILE).read_bytes(), (bundle / MANIFEST_FILE).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{bundle} is not signed; wanted the signature of {public_key}. Export with --sign") from error
    except InvalidSignature as error:
        raise ValueError(f"{bundle} was not signed by the holder of {public_key}; do not run it") from error


def check_trusted(bundle: Path) -> None:
    """`check_signature` by the key that the environment names; nothing where it names none."""
    trusted = os.environ.get(TRUSTED)
    if trusted:
        check_signature(bundle, Path(trusted))


def _key(path: Path, *, private: bool) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise ValueError('signatures need the Python package cryptography. Run `pip install "clipdit[sign]"`') from error
    what = f"{'a private' if private else 'a public'} Ed25519 key in PEM"
    try:
        data = path.read_bytes()
        key = serialization.load_pem_private_key(data, None) if private else serialization.load_pem_public_key(data)
    except (OSError, ValueError, TypeError) as error:
        said = "there is none" if isinstance(error, FileNotFoundError) else "it cannot be read"
        raise ValueError(f"{path} is wanted as {what}, without a password; {said}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey):
        raise ValueError(f"{path} is another kind of key; wanted {what}")
    return key
