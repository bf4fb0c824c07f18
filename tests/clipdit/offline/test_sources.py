"""Inputs at URLs: files give the same outputs wherever they lie, and nothing is fetched that nobody asked for."""

import http.server
import importlib
import json
import threading
import zipfile
from functools import partial

import fsspec
import pytest
from job_pictures import contents, ledger

from clipdit.fake_backend import FakeBackend
from clipdit.images import ImageError, decode_image
from clipdit.offline import run_job, sources, verify_job
from clipdit.translator import Translator


@pytest.fixture
def memory(inputs):
    """fsspec's memory:// with the twenty images and some things that are none."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    for path in inputs.rglob("*.*"):
        system.pipe_file(f"/bucket/in/{path.relative_to(inputs).as_posix()}", path.read_bytes())
    system.pipe_file("/bucket/in/notes.txt", b"hello")
    system.pipe_file("/bucket/in/.hidden.png", b"")
    system.pipe_file("/bucket/inside.png", b"not below in/")
    yield system
    system.store.clear()


@pytest.fixture
def archive(inputs, tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in sorted(inputs.rglob("*.*")):
            archive.write(path, f"drawings/{path.relative_to(inputs).as_posix()}")
        archive.writestr("drawings/../../evil.png", b"x")
        archive.writestr("other.png", b"x")
    return f"zip://drawings::{tmp_path / 'in.zip'}"


@pytest.fixture
def server(inputs):
    """http://127.0.0.1:PORT/ of the input folder, `requests` asked of it; /moved leads to another address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", "/00.png")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            super().do_GET()

        def log_message(self, *_):
            pass

    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(inputs)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()
    server.server_close()


def test_a_folder_gives_the_same_images_at_any_address(translator, inputs, memory, archive, server, tmp_path):
    run_job(translator, inputs, tmp_path / "folder")
    address, _ = server
    for name, url in (
        ("memory", "memory://bucket/in"),
        ("zip", archive),
        ("file", inputs.as_uri()),
        ("http", address),
    ):
        summary = run_job(translator, url, tmp_path / name)
        assert (summary.total, summary.written) == (20, 20), name
        assert contents(tmp_path / name) == contents(tmp_path / "folder")
        assert {row["seed"] for row in ledger(tmp_path / name)} == {row["seed"] for row in ledger(tmp_path / "folder")}
        assert verify_job(tmp_path / name).ok
        assert run_job(translator, url, tmp_path / name, resume=True).kept == 20
    job = json.loads((tmp_path / "memory" / "job.json").read_text())
    assert job["ignored"] == ["notes.txt: not an image by its name"] and job["settings"]["input"] == "memory://bucket/in"


def test_a_name_in_an_archive_does_not_leave_the_output_folder(translator, archive, tmp_path):
    run_job(translator, archive, tmp_path / "x" / "out")
    assert not list(tmp_path.rglob("evil*"))
    assert {row["output"] for row in ledger(tmp_path / "x" / "out")} == {
        row["id"].rsplit(".")[0] + ".png" for row in ledger(tmp_path / "x" / "out")
    }


def test_what_vanishes_or_is_damaged_after_the_plan_is_quarantined(inputs, memory, tmp_path):
    def on_call(call, batch):
        memory.rm("/bucket/in/sub/deep/17.webp") if memory.exists("/bucket/in/sub/deep/17.webp") else None
        memory.pipe_file("/bucket/in/18.png", b"not any more")

    translator = Translator(FakeBackend(native_size=(32, 32), on_call=on_call))
    summary = run_job(translator, "memory://bucket/in", tmp_path / "out", batch_size=1, workers=1)
    assert (summary.written, summary.quarantined) == (18, 2)
    reasons = dict(verify_job(tmp_path / "out").quarantined)
    assert reasons == {"sub/deep/17.webp": "does not exist", "18.png": "is text, not an image"}


class TestManifest:
    def test_urls_are_read_only_below_what_is_allowed(self, translator, memory, server, tmp_path):
        address, asked = server
        manifest = tmp_path / "list.csv"
        manifest.write_text(f"source,output\nmemory://bucket/in/00.png,a\n{address}03.png,b\n")
        with pytest.raises(
            ValueError, match=r"list.csv, line 2: the URL memory://bucket/in/00.png .* --allow-url memory://bucket/in/"
        ):
            run_job(translator, manifest, tmp_path / "out")
        with pytest.raises(ValueError, match=r"line 3: the URL http://127\.0\.0\.1"):
            run_job(translator, manifest, tmp_path / "out", allow_urls=["memory://bucket/"])
        assert asked == [] and not (tmp_path / "out").exists()
        summary = run_job(translator, manifest, tmp_path / "out", allow_urls=["memory://bucket", address])
        assert summary.written == 2 and asked == ["/03.png"]

    def test_redirects_are_not_followed(self, translator, server, tmp_path):
        address, asked = server
        (tmp_path / "list.txt").write_text(f"{address}moved.png\n")
        assert run_job(translator, tmp_path / "list.txt", tmp_path / "out", allow_urls=[address]).quarantined == 1
        assert (
            "redirects to /00.png; redirects are not followed"
            in dict(verify_job(tmp_path / "out").quarantined)[f"{address}moved.png"]
        )
        assert asked == ["/moved.png"]

    def test_a_manifest_at_a_url_names_what_lies_below_it(self, translator, memory, tmp_path):
        memory.pipe_file("/bucket/list.csv", b"source,seed\nin/00.png,5\nin/sub/01.jpg,\n")
        run_job(translator, "memory://bucket/list.csv", tmp_path / "out")
        assert {row["input"] for row in ledger(tmp_path / "out")} == {
            "memory://bucket/in/00.png",
            "memory://bucket/in/sub/01.jpg",
        }
        assert contents(tmp_path / "out").keys() == {"in/00.png", "in/sub/01.png"}
        for source in ("../other/a.png", "/etc/a.png", "file:///etc/a.png", "memory://other/a.png", "zip://a.png::/etc/a.zip"):
            memory.pipe_file("/bucket/list.csv", f"source\n{source}\n".encode())
            with pytest.raises(ValueError, match=r"list.csv, line 2: .*(outside the folder|is read only if)"):
                run_job(translator, "memory://bucket/list.csv", tmp_path / "other")

    @pytest.mark.parametrize(
        ("url", "allowed"),
        [
            ("s3://bucket/in/a.png", True),
            ("s3://bucket/inner/a.png", False),
            ("s3://bucket/in/../out/a.png", False),
            ("s3://bucket/in/%2e%2e/a.png", False),
            ("s3://bucket/in/%2E%2E%2fa.png", False),
            ("S3://bucket/in/a.png", False),
            ("http://169.254.169.254/latest", False),
            ("https://good.example/a.png", True),
            ("https://good.example.evil.example/a.png", False),
            ("https://good.example@evil.example/a.png", False),
            ("https://good.example\\@evil.example/a.png", False),
            ("zip://a.png::s3://bucket/in/x.zip", True),
            ("zip://a.png::simplecache::s3://bucket/in/x.zip", True),
            ("zip://a.png::https://evil.example/x.zip", False),
            ("s3://bucket/in/a.png::https://evil.example/x", False),
            ("reference://::s3://bucket/in/x.json", False),
            ("zip://a.png::/data/x.zip", True),
        ],
    )
    def test_prefixes_end_where_names_end(self, url, allowed):
        assert sources.is_allowed(url, ["s3://bucket/in/", "https://good.example"]) is allowed
        assert sources.is_allowed(url, ["s3://bucket/in", "https://good.example/"]) is allowed


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://bucket/in", "nonsense://bucket/in cannot be read: Protocol not known: nonsense"),
        ("memory://nowhere/at/all", "there are no images below|cannot be read"),
        ("zip://::/nowhere/in.zip", "cannot be read"),
        ("https://me:secret@host/in/", "holds a password"),
    ],
)
def test_what_cannot_be_read_is_one_line(translator, tmp_path, url, message):
    with pytest.raises(ValueError, match=message) as raised:
        run_job(translator, url, tmp_path / "out")
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named(translator, tmp_path, monkeypatch):
    known = {"class": "no_such_package.Lake", "err": "Install lakefs to read it"}
    monkeypatch.setitem(importlib.import_module("fsspec.registry").known_implementations, "lake", known)
    with pytest.raises(ValueError, match=r"^lake://bucket/in cannot be read: Install lakefs to read it$"):
        run_job(translator, "lake://bucket/in", tmp_path / "out")


def test_a_fetched_file_has_a_limit(memory, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    with pytest.raises(ImageError, match="is larger than"):
        sources.fetch("memory://bucket/in/00.png")


def test_the_decoders_that_the_service_uses_know_no_urls(memory, server):
    address, asked = server
    for url in ("memory://bucket/in/00.png", f"{address}00.png"):
        with pytest.raises(ImageError, match="does not exist"):
            decode_image(url)
    assert asked == []
