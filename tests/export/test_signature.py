"""A signed bundle is opened by those who trust its maker; one that is not signed, or by another, or changed since, is not."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from clipdit.backend import open_backend
from clipdit.cli import main
from clipdit_export.signature import SIGNATURE_FILE, TRUSTED, check_signature, sign


def write_keys(folder: Path, name: str, key) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "ours", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_a_bundle_that_was_signed_is_opened_and_its_signature_can_be_checked(keys, copy: Path, monkeypatch, capsys):
    private, public = keys
    sign(copy, private)
    check_signature(copy, public)
    monkeypatch.setenv(TRUSTED, str(public))
    open_backend(copy, "onnx").close()
    assert main(["inspect", str(copy), "--public-key", str(public), "--verify"]) == 0
    said = capsys.readouterr().out
    assert f"signed by the holder of {public}" in said and "files are as they were exported" in said


def test_one_that_is_not_signed_or_by_another_or_changed_since_is_refused(keys, copy: Path, tmp_path: Path, monkeypatch, capsys):
    _, public = keys
    monkeypatch.setenv(TRUSTED, str(public))
    with pytest.raises(ValueError, match=r"is not signed; wanted the signature of .*ours\.pub\.pem"):
        open_backend(copy, "onnx")
    other, _ = write_keys(tmp_path, "theirs", ed25519.Ed25519PrivateKey.generate())
    sign(copy, other)
    with pytest.raises(ValueError, match="was not signed by the holder of"):
        open_backend(copy, "onnx")
    assert main(["inspect", str(copy), "--public-key", str(public)]) == 4
    assert "was not signed by the holder of" in capsys.readouterr().out
    sign(copy, keys[0])
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text().replace('"max_batch": 4', '"max_batch": 9'))
    with pytest.raises(ValueError, match="was not signed by the holder of"):
        open_backend(copy, "onnx")


def test_a_key_that_is_none_is_named(copy: Path, tmp_path: Path):
    (tmp_path / "letter.pem").write_text("dear")
    curve, _ = write_keys(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    cases = {tmp_path / "none.pem": "there is none", tmp_path / "letter.pem": "it cannot be read", curve: "another kind"}
    for path, reason in cases.items():
        with pytest.raises(ValueError, match=reason):
            sign(copy, path)
    assert not (copy / SIGNATURE_FILE).exists()


def test_export_signs(keys, checkpoint: Path, tmp_path: Path):
    private, public = keys
    words = ["--model", str(checkpoint), "--out", str(tmp_path / "b"), "--images", "1", "--sign", str(private)]
    assert main(["export", *words]) == 0
    check_signature(tmp_path / "b", public)
