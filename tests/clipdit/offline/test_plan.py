"""What an offline job does before the first image and after the last: the plan, and the verdict."""

import json

import pytest
from job_pictures import contents, draw, ledger
from PIL import Image

from clipdit.fake_backend import FakeBackend
from clipdit.offline import JobSettings, item_seed, plan_folder, run_job, verify_job
from clipdit.translator import Translator


class TestPlan:
    def test_two_inputs_with_one_output_are_found_before_any_work(self, inputs, tmp_path):
        calls = []
        draw(inputs / "sub" / "01.png")
        translator = Translator(FakeBackend(on_call=lambda *call: calls.append(call)))
        with pytest.raises(ValueError, match=r"sub/01.jpg and sub/01.png would both become sub/01.png.*--keep-suffix"):
            run_job(translator, inputs, tmp_path / "out")
        assert calls == [] and not (tmp_path / "out").exists()
        assert run_job(translator, inputs, tmp_path / "out", JobSettings(keep_suffix=True)).written == 21
        assert (tmp_path / "out" / "sub" / "01.jpg.png").exists() and (tmp_path / "out" / "sub" / "01.png.png").exists()

    def test_seed_depends_on_the_jobs_seed_and_the_id_only(self):
        assert item_seed(0, "a/b.png") == item_seed(0, "a/b.png") == 859142392
        assert len({item_seed(seed, id) for seed in range(3) for id in ("a", "b", "0", "")}) == 12

    @pytest.mark.parametrize(
        ("arrange", "message"),
        [
            (lambda d: (d / "in").mkdir(), "there are no images in"),
            (lambda d: ((d / "in").mkdir(), (d / "in/a.txt").touch()), "passed over, such as a.txt"),
            (lambda d: (draw(d / "in/a.png"), (d / "out").mkdir(), (d / "out/x").touch()), "not empty and holds no job"),
            (lambda d: (draw(d / "in/a.png"), (d / "out").touch()), "is a file"),
            (lambda d: (draw(d / "in/a.jpg"), draw(d / "in/a.png/b.png")), "folder of other outputs"),
            (lambda d: (draw(d / "in/a.png"), (d / "out").symlink_to("in")), "not empty and holds no job"),
        ],
    )  # fmt: skip
    def test_what_cannot_work_is_refused_before_any_work(self, translator, tmp_path, arrange, message):
        arrange(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=message):
            run_job(translator, tmp_path / "in", tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before

    def test_an_input_is_never_replaced(self, tmp_path):
        draw(tmp_path / "in" / "in" / "a.png")
        assert plan_folder(tmp_path / "in", tmp_path).items
        draw(tmp_path / "in" / "a.png")
        with pytest.raises(ValueError, match=r"output of in/a.png would replace the input .*/in/a.png"):
            plan_folder(tmp_path / "in", tmp_path)
        with pytest.raises(ValueError, match="is the input folder"):
            plan_folder(tmp_path / "in", tmp_path / "in")

    def test_batch_sizes_and_sizes_the_backend_does_not_take_are_refused(self, inputs, tmp_path):
        translator = Translator(FakeBackend(native_size=(32, 32), max_batch=4, sizes=((32, 32),)))
        with pytest.raises(ValueError, match="batch size is 5; this backend takes 1 to 4"):
            run_job(translator, inputs, tmp_path / "out", batch_size=5)
        with pytest.raises(ValueError, match="64 x 64; this backend takes 32 x 32"):
            run_job(translator, inputs, tmp_path / "out", JobSettings(size=(64, 64)))
        assert run_job(translator, inputs, tmp_path / "out").batch_size == 4


class TestManifest:
    def test_sources_outputs_and_seeds_of_a_csv(self, translator, inputs, tmp_path):
        manifest = tmp_path / "list.csv"
        manifest.write_text(
            "source,output,seed,split\r\nin/00.png,,,test\r\nin/sub/01.jpg,x/y.webp,17,\r\n" + f"{inputs}/03.png,plain,,\r\n",
            encoding="utf-8-sig",
        )
        assert run_job(translator, manifest, tmp_path / "out").written == 3
        rows = {row["id"]: row for row in ledger(tmp_path / "out")}
        assert [row["output"] for row in rows.values()] == ["in/00.png", "x/y.webp", "plain.png"]
        assert rows["in/sub/01.jpg"]["seed"] == 17 and rows["in/00.png"]["seed"] == item_seed(0, "in/00.png")
        assert Image.open(tmp_path / "out" / "x" / "y.webp").format == "WEBP"

    def test_one_source_with_many_seeds(self, translator, inputs, tmp_path):
        rows = [{"source": "in/00.png", "id": f"try {i}", "output": f"{i}.png", "seed": i} for i in range(3)]
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert run_job(translator, tmp_path / "list.jsonl", tmp_path / "out").written == 3
        assert len(set(contents(tmp_path / "out").values())) == 3

    def test_plain_list_takes_one_source_a_line_from_anywhere(self, translator, inputs, tmp_path):
        (tmp_path / "lists").mkdir()
        manifest = tmp_path / "lists" / "a.txt"
        manifest.write_text("../in/00.png\n\n../in/sub/01.jpg\nmissing.png\n")
        summary = run_job(translator, manifest, tmp_path / "out")
        assert (summary.written, summary.quarantined) == (2, 1)
        assert contents(tmp_path / "out").keys() == {"00.png", "01.png"}
        assert dict(verify_job(tmp_path / "out").quarantined) == {"missing.png": "does not exist"}

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "source,output\na.png,../b.png", "line 2: output ../b.png leaves the output folder"),
            ("a.csv", "source,output\na.png,/b.png", "line 2: output /b.png leaves the output folder"),
            ("a.csv", "source,output\na.png,b.gif", r"line 2: output b.gif ends in .gif; wanted one of .png"),
            ("a.csv", "source,sed\na.png,1", "line 2: there is no column sed"),
            ("a.csv", "a.png\nb.png", "line 2: there is no column a.png"),
            ("a.csv", "source,seed\na.png,-1", "line 2: seed is '-1'"),
            ("a.csv", "source\na.png,b", "more values than columns"),
            ("a.csv", "source\n", "lists no images"),
            ("a.csv", "source\na.png\na.png", "a.png is listed twice"),
            ("a.csv", "source\na.png\na.jpg", "a.png and a.jpg would both become a.png"),
            ("a.jsonl", '{"source": "a.png"}\n{"source"', "line 2: not JSON"),
            ("a.jsonl", '["a.png"]', "line 1: not a JSON object"),
            ("a.jsonl", '{"source": 3}', "line 1: no source"),
            ("a.jsonl", '{"source": "a.png", "seed": true}', "line 1: seed is True"),
            ("a.txt", b"a\xff.png", "not UTF-8"),
        ],
    )
    def test_mistakes_are_told_with_their_line_before_any_work(self, translator, tmp_path, name, text, message):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=message) as raised:
            run_job(translator, tmp_path / name, tmp_path / "out")
        assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


class TestVerify:
    @pytest.fixture
    def out(self, translator, inputs, tmp_path):
        (inputs / "bad.png").write_text("bad")
        run_job(translator, inputs, tmp_path / "out")
        return tmp_path / "out"

    def test_a_whole_job_is_in_order_and_its_quarantine_is_listed(self, out):
        verdict = verify_job(out)
        assert verdict.ok and (verdict.total, verdict.written) == (21, 20)
        assert verdict.quarantined == (("bad.png", "is text, not an image"),)

    @pytest.mark.parametrize(
        ("damage", "problem"),
        [
            (lambda rows: rows[:-1], "20.*: not done yet|: not done yet"),
            (lambda rows: [*rows, rows[3]], ": 2 times in the ledger"),
            (lambda rows: [*rows, rows[3] | {"id": "stranger"}], "stranger: in the ledger, but not in the plan"),
            (lambda rows: [r | {"reason": None} for r in rows], "bad.png: quarantined without a reason"),
            (
                lambda rows: [r | {"sha256": "0"} if r["id"] == "00.png" else r for r in rows],
                "00.png: 00.png has another content",
            ),
            (lambda rows: [r | {"output": "03.png"} if r["id"] == "00.png" else r for r in rows], "written to 03.png, planned"),
        ],
    )
    def test_every_kind_of_damage_is_a_problem(self, out, damage, problem):
        (out / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in damage(ledger(out))))
        verdict = verify_job(out)
        assert not verdict.ok
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError("; ".join(verdict.problems))

    def test_a_file_that_is_gone_or_altered_is_a_problem(self, out):
        (out / "00.png").unlink()
        (out / "03.png").write_bytes(b"x")
        assert verify_job(out).problems == (
            "00.png: 00.png is gone",
            "03.png: 03.png has another content than was written",
        )

    def test_a_folder_without_a_job_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="holds no job"):
            verify_job(tmp_path)
