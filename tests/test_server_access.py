"""Who may call which route with which key, and that no key is ever shown."""

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.server.app import create_app
from sidelight.server.config import ServerConfig, read_config
from sidelight.server.keys import Access, Caller, Key, read_keys
from sidelight.server.middleware import Gatekeeper
from worlds.models import three_probes, tiny_backbone

USER, ADMIN, SCRAPER, WRONG = "sk-user-secret", "sk-admin-secret", "sk-scraper-secret", "wrong"
ALL_KEYS = {"api_key": USER, "admin_key": ADMIN, "metrics_key": SCRAPER}
ROUTES = ("/health", "/v1/models", "/nowhere", "/admin/probes", "/metrics")
# By the keys of a server and the one that is sent: the status of each of the routes.
STATUSES = {
    ("all", None): (200, 401, 401, 401, 401),
    ("all", WRONG): (200, 401, 401, 401, 401),
    ("all", USER): (200, 200, 404, 403, 403),
    ("all", ADMIN): (200, 200, 404, 200, 200),
    ("all", SCRAPER): (200, 403, 403, 403, 200),
    ("api_key", USER): (200, 200, 404, 403, 403),
    ("admin_key", None): (200, 200, 404, 403, 200),
    ("admin_key", ADMIN): (200, 200, 404, 200, 200),
    ("metrics_key", None): (200, 200, 404, 403, 403),
    ("metrics_key", SCRAPER): (200, 403, 403, 403, 200),
    ("none", None): (200, 200, 404, 403, 200),
    ("none", WRONG): (200, 200, 404, 403, 200),
}


@pytest.fixture(scope="module")
def client():
    """Makes a client of a server with these keys."""
    backbone = tiny_backbone()
    engine = TransformersEngine(backbone, three_probes(backbone))
    return cache(
        lambda **keys: TestClient(create_app(engine, ServerConfig(**keys)), "http://localhost")
    )


@pytest.mark.parametrize(
    ("sent", "is_answered"),
    [
        ({"Host": "localhost:8000"}, True),
        ({"Host": "127.0.0.1"}, True),
        ({"Host": "[::1]:8000"}, True),
        ({"Host": "10.0.0.7:8000", "Origin": "http://LOCALHOST:3000"}, True),
        ({"Host": "gateway.example"}, True),
        ({"Host": "localhost.:8000"}, True),
        ({"Host": "sidelight.localhost:8000"}, True),
        ({"Host": "notlocalhost"}, False),
        ({"Host": "sidelight.localhost.evil.example"}, False),
        ({"Host": "evil.example"}, False),
        ({"Host": "localhost.evil.example"}, False),
        ({"Host": "127.0.0.1.evil.example"}, False),
        ({"Host": "localhost@evil.example"}, False),
        ({"Host": "["}, False),
        ({"Host": ""}, False),
        ({"Host": "localhost", "Origin": "http://evil.example"}, False),
        ({"Host": "localhost", "Origin": "null"}, False),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, True),
        ({"Host": "127.0.0.1:8000", "Origin": "http://203.0.113.5"}, False),
    ],
)
def test_without_keys_only_allowed_hosts_and_origins_are_served(client, sent, is_answered):
    """A page that points its own name at this machine (DNS rebinding) would read the answers."""
    for keys in ({}, {"admin_key": ADMIN}):
        http = client(allowed_host=("https://Gateway.Example:8443",), **keys)
        for route in ("/v1/models", "/nowhere"):
            answer = http.get(route, headers=sent)
            refused = answer.status_code == 403
            assert refused != is_answered
            assert not refused or answer.json()["error"]["code"] == "host_not_allowed"
        assert (http.get("/metrics", headers=sent).status_code == 200) == is_answered
        assert http.get("/health", headers=sent).status_code == 200


def test_valid_key_works_under_any_host_unless_hosts_are_configured(client):
    sent = {"Host": "evil.example", **bearer(USER)}
    assert client(api_key=USER).get("/v1/models", headers=sent).status_code == 200
    named = client(api_key=USER, allowed_host=("gateway.example",))
    assert named.get("/v1/models", headers=sent).status_code == 403


def bearer(key):
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("keys", "sent"), STATUSES)
def test_each_key_opens_only_its_routes(client, keys, sent):
    http = client(**{name: key for name, key in ALL_KEYS.items() if keys in ("all", name)})
    answers = [http.get(route, headers=bearer(sent)) for route in ROUTES]
    assert tuple(answer.status_code for answer in answers) == STATUSES[keys, sent]
    # Every refusal says what is missing.
    assert all(answer.json()["error"]["code"] for answer in answers if answer.status_code > 200)
    told = [answer.headers["www-authenticate"] for answer in answers if answer.status_code == 401]
    assert set(told) <= {"Bearer"}


def test_two_authorization_headers_are_rejected(client):
    for keys in ((USER, USER), (WRONG, USER), (USER, WRONG)):
        headers = [("Authorization", f"Bearer {key}") for key in keys]
        answer = client(**ALL_KEYS).get("/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "duplicate_header")


def test_paths_starting_with_metrics_are_closed_to_users():
    """Since vLLM answers it with its own."""
    app = FastAPI()
    app.add_api_route("/metrics{rest:path}", lambda: "done")
    app.add_middleware(
        Gatekeeper, access=ServerConfig(**ALL_KEYS).access, hides_scores=lambda: False
    )
    http = TestClient(app, root_path="/api")
    for path in ("/metrics/", "/metrics/x", "/metricsx", "/metrics%0A", "/api/metrics"):
        codes = [http.get(path, headers=bearer(key)).status_code for key in (USER, ADMIN)]
        assert codes == [403, 200]
    assert http.get("/api/metrics", headers=bearer(SCRAPER)).status_code == 200
    assert http.get("/metrics/x", headers=bearer(SCRAPER)).status_code == 403


def test_caller_is_identified_by_key_id_including_non_ascii_keys():
    access = ServerConfig(**ALL_KEYS).access
    assert access.caller(f"Bearer {USER}") == Caller("api-key-1")
    assert access.caller(f"bearer  {ADMIN} ") == Caller("admin-key-1", is_admin=True)
    assert access.caller(f"Bearer {SCRAPER}") == Caller("metrics-key-1", is_scraper=True)
    for header in ("", "Bearer", f"Bearer {USER[:-1]}", f"Basic {USER}", USER):
        assert access.caller(header) is None
    assert Access().caller("") == Caller()
    for secret in ("passe-l\u00e0", "correct horse battery", "\u00c5"):
        # Headers are latin-1 on the wire.
        header = f"Bearer {secret} ".encode().decode("latin-1")
        assert ServerConfig(api_key=secret).access.caller(header) == Caller("api-key-1")


def test_foreign_keys_identify_callers_but_grant_no_access():
    access = ServerConfig(**ALL_KEYS).access
    theirs = replace(access, keys=(), foreign_keys=access.keys)
    assert theirs.caller(f"Bearer {USER}") == Caller("api-key-1")
    assert theirs.caller("") == theirs.caller(f"Bearer {USER[:-1]}") == Caller()
    assert not theirs.opens_metrics(Caller("api-key-1"), hides_scores=True)


def test_key_file_has_one_key_per_line(tmp_path: Path):
    digest, path = hashlib.sha256(b"other").hexdigest(), tmp_path / "keys"
    path.write_text(f"# team keys\n\nalpha {USER}\nbeta sha256:{digest}\n")
    assert read_keys(path) == (Key.of("alpha", USER), Key.of("beta", "other"))
    assert ServerConfig(api_keys_file=path).access.caller("Bearer other") == Caller("beta")
    assert Key.of("beta", f"sha256:{digest.upper()}") == Key.of("beta", "other")
    # A log of a key does not help to find its secret.
    assert "digest" not in repr(Key.of("beta", "other"))


@pytest.mark.parametrize(
    "text", ["# none", "alpha", f"a {USER} quota=3", f"a {USER}\na x", "\x00\xff", None]
)
def test_invalid_key_file_error_leaks_no_key(tmp_path: Path, text):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(SidelightError, match="keys") as raised:
        read_keys(path)
    assert USER not in str(raised.value)


@pytest.mark.parametrize("secret", ["", "  ", "sha256:", "sha256:" + "a" * 63, "TOP\udcff"])
def test_invalid_key_is_rejected_without_quoting_it(secret):
    with pytest.raises(SidelightError, match=r"(--api-key|key 'api-key-1') is") as raised:
        _ = read_config(api_key=[secret]).access
    assert "TOP" not in str(raised.value)


def test_config_and_access_never_print_keys():
    config = ServerConfig(api_key=USER, audit_salt=USER)
    access = config.access
    assert USER not in f"{access!r} {config!r} {config.model_dump()} {config.model_dump_json()}"
    assert access.keys[0].digest.hex() not in repr(access)
