"""Who may come in, and what is written down of him."""

import logging
import re

import pytest
from serving import PNG, Identity, numbered, png, served

from clipdit_serve.guards import HEALTH, OPEN
from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio

KEY = "a-key-of-a-test"
WRONG = [
    {},
    {"authorization": "Bearer another"},
    {"authorization": f"Bearer {KEY}x"},
    {"authorization": f"Bearer {KEY[:-1]}"},
    {"authorization": f"Basic {KEY}"},
    {"authorization": KEY},
    {"authorization": "Bearer"},
    {"authorization": "Bearer schl\u00fcssel".encode()},
    {"x-api-key": KEY},
    {"cookie": f"key={KEY}"},
]


async def test_every_route_but_health_and_the_page_needs_the_key(decoder):
    """Routes that are added later are in this matrix by themselves."""
    async with served(Identity(), ServeSettings(api_key=KEY), decoder) as (client, _):
        document = (await client.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"})).json()
        routes = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
        assert len(routes) >= 14
        routes += [("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nothing"), ("POST", "/v1/jobs")]
        routes += [("OPTIONS", "/v1/translate"), ("HEAD", "/metrics"), ("GET", "/livez/"), ("GET", "/v1/../livez/x")]
        for method, path in routes:
            for headers in WRONG:
                answer = await client.request(method, path, headers=headers)
                if path in OPEN:
                    assert answer.status_code == 200, (method, path)
                else:
                    assert answer.status_code == 401, (method, path, headers)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"
            answer = await client.request(method, path, headers={"authorization": f"bearer {KEY}"})
            assert answer.status_code != 401, (method, path)


METRICS_PORT = 9100


async def test_metrics_on_a_port_of_their_own_need_no_key_and_nothing_else_is_there(decoder):
    """The port is that of the connection: naming it in the header Host opens nothing."""
    settings, mine = ServeSettings(api_key=KEY), {"authorization": f"Bearer {KEY}"}
    async with served(Identity(), settings, decoder, metrics_port=METRICS_PORT) as (client, _):
        document = (await client.get("/openapi.json", headers=mine)).json()
        assert "/metrics" not in document["paths"]
        apart = f"http://test:{METRICS_PORT}"
        answer = await client.get(f"{apart}/metrics")
        assert answer.status_code == 200 and "clipdit_model_info{" in answer.text
        for method, path in [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]:
            for headers in ({}, mine):
                answer = await client.request(method, f"{apart}{path}", headers=headers)
                assert answer.status_code == (200 if path in HEALTH else 404), (method, path)
        for headers, wanted in (({}, 401), (mine, 404)):
            for host in ({}, {"host": f"test:{METRICS_PORT}"}, {"x-forwarded-port": str(METRICS_PORT)}):
                assert (await client.get("/metrics", headers=headers | host)).status_code == wanted


async def test_without_a_key_set_nobody_is_asked_for_one(decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        assert (await client.get("/v1/models")).status_code == 200


async def test_other_sites_may_not_read_answers_and_no_page_loads_scripts(decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        answer = await client.post(
            "/v1/translate", content=png(numbered(1)), headers=PNG | {"origin": "https://elsewhere.example"}
        )
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
        preflight = await client.options(
            "/v1/translate", headers={"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
        )
        assert preflight.status_code == 405
        for path in ("/docs", "/redoc"):
            assert (await client.get(path)).status_code == 404


@pytest.mark.parametrize("given", ["abc-1.2_Z", None, "a b", "x" * 200, "a\tb"])
async def test_an_answer_carries_the_callers_request_id_or_a_new_one(given: str | None, decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        for path in ("/livez", "/nothing"):
            answer = await client.get(path, headers={} if given is None else {"x-request-id": given})
            id = answer.headers["x-request-id"]
            assert id == given if given == "abc-1.2_Z" else re.fullmatch("[0-9a-f]{32}", id)


async def test_one_log_line_a_request_says_what_became_of_it_and_nothing_of_the_key(decoder, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "clipdit_serve")
    async with served(Identity(), ServeSettings(api_key=KEY), decoder) as (client, _):
        await client.post("/v1/translate?seed=x", content=b"", headers=PNG | {"authorization": f"Bearer {KEY}"})
        await client.get("/secret-path-of-a-caller")
        await client.get("/livez")
    lines = [record for record in caplog.records if record.name == "clipdit_serve.guards"]
    assert [(line.route, line.status, line.error) for line in lines] == [  # type: ignore[attr-defined]  (records carry more than logging declares)
        ("/v1/translate", 400, "invalid_value"),
        ("other", 401, "invalid_api_key"),
    ]
    assert KEY not in caplog.text


async def test_a_mistake_of_ours_is_a_500_in_the_same_shape_and_in_the_log(decoder, caplog: pytest.LogCaptureFixture):
    class Broken:
        ready = True

        async def start(self) -> None: ...
        def close(self) -> None: ...

        async def decode(self, data, limits, size, fit):
            raise LookupError("ours")

    async with served(Identity(), ServeSettings(), Broken()) as (client, engine):
        answer = await client.post("/v1/translate", content=png(numbered(1)), headers=PNG)
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("internal_error", "server_error")
        assert answer.headers["x-request-id"] in error["message"]
        assert "ours" not in error["message"] or "LookupError" not in error["message"]
        assert engine.idle
    assert "LookupError: ours" in caplog.text
