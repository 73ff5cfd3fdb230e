"""Who may ask, who may administer, and that no key is ever shown."""

import hashlib

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from commands import run
from sidelight.errors import SidelightError
from sidelight.server.app import serve
from sidelight.server.config import ServerConfig, read_config
from sidelight.server.errors import add_error_handlers
from sidelight.server.keys import Access, Caller, Key, read_keys
from sidelight.server.middleware import Gatekeeper
from sidelight.server.requests import AdminOnly

SECRET = "sk-user-secret"
ADMIN = "sk-admin-secret"


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def guarded(access):
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/admin/thing", dependencies=[AdminOnly])
    def administer() -> str:
        return "done"

    @app.get("/thing")
    def use() -> str:
        return "done"

    app.add_middleware(Gatekeeper, access=access, limit=1)
    return TestClient(app)


BOTH = ServerConfig(api_key=SECRET, admin_key=ADMIN).access


@pytest.mark.parametrize(
    ("access", "headers", "use", "administer"),
    [
        (BOTH, {}, 401, 401),
        (BOTH, bearer("other"), 401, 401),
        (BOTH, bearer(SECRET), 200, 403),
        (BOTH, bearer(ADMIN), 200, 200),
        (Access(), {}, 200, 403),
        (Access(), bearer("any"), 200, 403),
        (Access(keys=BOTH.keys), bearer(SECRET), 200, 403),
        (Access(admin_keys=BOTH.admin_keys), {}, 200, 403),
        (Access(admin_keys=BOTH.admin_keys), bearer(ADMIN), 200, 200),
    ],
)
def test_only_an_admin_key_administers(access, headers, use, administer):
    client = guarded(access)
    assert client.get("/thing", headers=headers).status_code == use
    response = client.get("/admin/thing", headers=headers)
    assert response.status_code == administer
    assert administer == 200 or response.json()["error"]["code"]


def test_a_key_is_identified_by_its_id():
    assert BOTH.caller(f"Bearer {SECRET}") == Caller("api-key-1")
    assert BOTH.caller(f"bearer {ADMIN}") == Caller("admin-key-1", is_admin=True)
    assert BOTH.caller(f"Basic {SECRET}") is None
    assert Access().caller("") == Caller()


@pytest.mark.parametrize("secret", ["passe-l\u00e0", "correct horse battery", "\u00c5"])
def test_a_key_in_utf8_or_of_several_words_opens(secret):
    client = guarded(ServerConfig(api_key=secret).access)
    header = {"Authorization": f"Bearer {secret} ".encode()}
    assert client.get("/thing", headers=header).status_code == 200


def test_only_keys_for_metrics_and_admins_read_metrics_and_the_former_open_nothing_else():
    """Also at all that begins with the path, which vLLM answers with its own."""
    app = FastAPI()
    for path in ("/metrics", "/metrics{rest:path}", "/ready", "/thing"):
        app.add_api_route(path, lambda: "done")
    access = ServerConfig(api_key=SECRET, admin_key=ADMIN, metrics_key="scraper").access
    app.add_middleware(Gatekeeper, access=access, limit=1)
    client = TestClient(app, root_path="/api")

    def answer(path, secret):
        response = client.get(path, headers=bearer(secret))
        return response.json()["error"]["code"] if response.status_code == 403 else "open"

    for path in ("/metrics", "/metrics/", "/metrics/x", "/metricsx", "/metrics%0A", "/api/metrics"):
        assert answer(path, SECRET) == "metrics_key_required"
        assert answer(path, ADMIN) == "open"
    for path in ("/metrics", "/api/metrics", "/ready"):
        assert answer(path, "scraper") == "open"
    assert answer("/thing", "scraper") == answer("/metrics/x", "scraper") == "metrics_key_only"
    assert client.get("/metrics").status_code == 401
    # Without keys of users everybody reads them, unless there is a key for them.
    for keys, expected in (({"admin_key": ADMIN}, 200), ({"metrics_key": "scraper"}, 403)):
        opened = ServerConfig(**keys).access
        assert (200 if opened.opens_metrics(Caller()) else 403) == expected


VARIABLES = ["SIDELIGHT_API_KEY", "SIDELIGHT_ADMIN_KEY"]


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_variable_does_not_open_the_server(monkeypatch, capsys, variable, blank):
    monkeypatch.setenv(variable, blank)
    assert run("serve", "--host", "0.0.0.0", "--port", "0") == 2
    assert f"{variable} is blank" in capsys.readouterr().err


def test_a_variable_holds_one_key_and_options_come_before_it(monkeypatch):
    assert ServerConfig().access == Access()
    for variable, key in zip(VARIABLES, ["correct horse battery\n", ADMIN], strict=True):
        monkeypatch.setenv(variable, key)
    access = ServerConfig().access
    assert access.keys == (Key.of("api-key-1", "correct horse battery"),)
    assert access.admin_keys == (Key.of("admin-key-1", ADMIN),)
    assert read_config(api_key=[SECRET]).access.keys == (Key.of("api-key-1", SECRET),)


def test_a_key_file_has_one_key_per_line(tmp_path):
    digest = hashlib.sha256(b"other").hexdigest()
    path = tmp_path / "keys"
    path.write_text(f"# team keys\n\nalpha {SECRET}\nbeta sha256:{digest}\n")
    keys = read_keys(path)
    assert keys == (Key.of("alpha", SECRET), Key.of("beta", "other"))
    assert Access(keys).caller("Bearer other") == Caller("beta")


@pytest.mark.parametrize("text", ["", "# none", "alpha", "a b c", f"a {SECRET}\na x", "\x00\xff"])
def test_the_error_of_a_wrong_key_file_does_not_quote_it(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SidelightError, match="keys") as raised:
        read_keys(path)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("secret", ["", "  ", "sha256:", "sha256:" + "a" * 63, "sha256:zz"])
def test_a_key_that_anybody_could_send_or_read_is_refused(secret):
    with pytest.raises(SidelightError, match=r"(--api-key|Key 'api-key-1') is"):
        _ = read_config(api_key=[secret]).access


def test_a_secret_that_is_not_utf8_is_refused_without_quoting_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SIDELIGHT_API_KEY", "TOP\udcff")
    monkeypatch.setenv("SIDELIGHT_AUDIT_SALT", "TOP\udcff")
    config = read_config(audit_log=tmp_path / "audit.jsonl")
    for read in (lambda: config.access, lambda: config.salt):
        with pytest.raises(SidelightError, match="is not UTF-8") as raised:
            read()
        assert "TOP" not in str(raised.value)
        assert raised.value.__context__ is None


def test_a_digest_may_be_in_capitals():
    digest = hashlib.sha256(SECRET.encode()).hexdigest().upper()
    assert Key.of("a", f"sha256:{digest}") == Key.of("a", SECRET)


def test_a_missing_key_file_is_an_error(tmp_path):
    with pytest.raises(SidelightError, match="Cannot read the keys"):
        read_keys(tmp_path / "none")


def test_nothing_prints_a_key():
    config = ServerConfig(api_key=SECRET, audit_salt=SECRET)
    assert SECRET not in f"{BOTH!r} {config!r} {config.model_dump()} {config.model_dump_json()}"
    assert BOTH.keys[0].digest.hex() not in repr(BOTH)


def test_the_server_listens_beyond_this_machine_only_with_keys_or_on_request():
    with pytest.raises(SidelightError, match="--allow-anonymous"):
        serve(lambda: pytest.fail("must not load"), ServerConfig(host="0.0.0.0", port=0))
