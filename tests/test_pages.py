"""The server's pages: who may have them, and what they may load."""

from live import http_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.server.playground import STRICT
from tiny import three_probes


def test_pages_need_no_key_and_load_nothing_from_elsewhere(tiny):
    engine = TransformersEngine(tiny, three_probes(tiny))
    with (
        served(engine, playground=True, api_key="a-key") as address,
        http_client(address) as http,
    ):
        for path in ("/v1/probes", "/openapi.json", "/playground/", "/playground/x", "/x"):
            assert http.get(path).status_code == 401
        for path in ("/playground", "/playground/page.js", "/playground/style.css"):
            answer = http.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-security-policy"] == STRICT
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'self'" in STRICT
        assert "unsafe" not in STRICT
        assert "default-src 'self';" in http.get("/docs").headers["content-security-policy"]
