"""The application: its routes, what it tells of itself, and that no fault is ever ours."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_app import (
    CLOSED,
    JSON_TYPE,
    OPEN,
    POSTS,
    PROVIDER,
    Asker,
    echo_bundle,
    rows,
    serving,
    table_bundle,
)

from deploykit.server import answers
from deploykit.server.refusal import Refusal

# Routes.


def test_every_page_and_every_question_has_an_answer_and_a_head(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        for path in OPEN + CLOSED:
            answer, head = await ask.get(path), await ask("HEAD", path)
            assert (answer.status, head.status, head.body) == (200, 200, b""), path
            if "metrics" not in path:
                assert head.headers["content-length"] == str(len(answer.body)), path
            if path.startswith("/v2"):
                assert answer.headers["content-type"] == JSON_TYPE
                answer.json()

    serving(check, served_tiny)


def test_another_method_is_told_which_are_allowed(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        for path in OPEN + CLOSED + POSTS:
            wrong = ("PUT", "DELETE", "TRACE", "x" * 99, "GET" if path in POSTS else "PATCH")
            for method in wrong:
                answer = await ask(method, path)
                assert (answer.status, "method: expected" in answer.error) == (405, True)
                allowed = answer.headers["allow"].split(", ")
                assert ("POST" in allowed) == (path in POSTS or path.endswith("/index"))
                assert ("GET" in allowed) == ("HEAD" in allowed) == (path not in POSTS)
            options = await ask("OPTIONS", path)
            assert (options.status, options.headers["allow"]) == (204, ", ".join(allowed))
            assert "content-length" not in options.headers

    serving(check, served_tiny)


NOWHERE = (
    *(
        "//",
        "/predict/",
        "/v2/",
        "/docs/",
        "/v2/models/tiny/",
        "/predict/tiny/",
        "/predict/tiny/versions",
        "/predict/a/b/c/d",
        "/v1/models",
        "/v3",
    ),
    *("/v2/models", "/v2/models/", "/v2/models/tiny/nix", "/v2/models/tiny/infer/", "/V2"),
    *("/v2/models/tiny/versions/1.0/nix", "/v2/repository", "/v2/repository/models/tiny"),
    *("/v2/models/other", "/v2/models/other/infer", "/v2/models//infer", "/v2/models/tiny%00"),
    *("/v2/models/tiny/versions/9", "/v2/models/tiny/versions/1", "/v2/models/Tiny/ready"),
    *(
        "/static/",
        "/static/no",
        "/static/../app.py",
        "/static/%2e%2e%2fapp.py",
        "/static//page.css",
    ),
    *(
        "/docs/x",
        "/favicon.ico",
        "/%",
        "/%ff%fe",
        "/%c3%28",
        "/\xff\xfe",
        "/" + "a" * 5000,
        "",
        "*",
    ),
    *("/v2/models/" + "é" * 300, "/v2/models/tiny/versions/" + "9" * 3000),
)


@pytest.mark.parametrize("path", NOWHERE, ids=lambda path: ascii(path[:30]))
def test_what_is_not_there_is_404_as_json(served_tiny: Path, path: str) -> None:
    async def check(ask: Asker) -> None:
        method = "POST" if path.endswith("/infer") else "GET"
        answer = await ask(method, path)
        assert answer.status == 404
        assert "expected" in answer.error
        assert len(answer.error) < 400

    serving(check, served_tiny)


@pytest.mark.parametrize("name", ["a b", "a/b", "naïve ☃", "100%", "stats", "versions", "?x=1#y"])
def test_a_model_of_any_name_is_found_by_its_encoded_name(tmp_path: Path, name: str) -> None:
    async def check(ask: Asker) -> None:
        encoded = quote(name, safe="")
        path = f"/v2/models/{encoded}/versions/{quote('1+β', safe='')}"
        answer = await ask.post(f"{path}/infer", rows("x", "FP32", [[1.0, 2, 3]]))
        assert answer.json()["model_name"] == name
        assert answer.json()["outputs"][0]["data"] == [1, 2, 3]
        assert (await ask.get(path)).json()["name"] == name
        assert (await ask.post(f"/predict/{encoded}", {"inputs": [1, 2, 3]})).status == 200
        assert (await ask.get(f"/v2/models/{encoded}/ready")).status == 200
        assert name.encode("unicode_escape").split(b"\\")[0] in (await ask.get("/metrics")).body

    serving(check, echo_bundle(tmp_path, name=name, version="1+β"))


def test_other_kinds_of_connections_are_turned_away(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await ask.app({"type": "lifespan"}, None, send)
        await ask.app({"type": "websocket", "path": "/"}, None, send)
        assert [one["type"] for one in sent] == ["websocket.close"]

    serving(check, served_tiny)


# What is told of a server and its models.


def test_the_server_and_its_models_describe_themselves(served_tiny: Path, tmp_path: Path) -> None:
    async def check(ask: Asker) -> None:
        about = (await ask.get("/v2")).json()
        assert "binary_tensor_data" in about["extensions"]
        assert (about["name"], about["provider"]) == ("deploykit", [PROVIDER])
        model = (await ask.get("/v2/models/tiny")).json()
        assert (model["versions"], model["platform"]) == (["1.0"], "onnx_onnxv1")
        image = {"name": "image", "datatype": "UINT8", "shape": [-1, 4, 4, 1]}
        logits = {"name": "logits", "datatype": "FP32", "shape": [-1, 3]}
        assert (model["inputs"], model["outputs"]) == ([image], [logits])
        config = (await ask.get("/v2/models/tiny/config")).json()
        assert (config["name"], config["max_batch_size"]) == ("tiny", 8)
        assert config["input"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": [4, 4, 1]}]
        assert config["output"][0]["data_type"] == "TYPE_FP32"
        ready = (await ask.get("/v2/health/ready")).json()
        assert ready["ready"] is True
        assert [one["name"] for one in ready["models"]] == ["tiny", "table"]
        for index in (
            await ask.post("/v2/repository/index"),
            await ask.post("/v2/repository/index", {"ready": True}),
            await ask.get("/v2/repository/index"),
        ):
            states = [(one["name"], one["state"]) for one in index.json()]
            assert states == [("tiny", "READY"), ("table", "READY")]

    serving(check, served_tiny, table_bundle(tmp_path, name="table"))


def test_a_server_that_loads_or_drains_lives_but_is_not_ready(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        ready = ("/readyz", "/v2/health/ready", "/v2/models/tiny/ready")
        for path in (*ready, "/v2/models/tiny", "/openapi.json"):
            answer = await ask.get(path)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert "being loaded" in answer.error
        assert (await ask.post("/predict", bytes(16))).status == 503
        assert (await ask.get("/v2")).json()["models"] == []
        await ask.models.load()
        assert [(await ask.get(path)).status for path in ready] == [200] * 3
        ask.models.draining = True
        assert [(await ask.get(path)).status for path in ready] == [503] * 3
        assert "stopping" in (await ask.get("/readyz")).error
        assert (await ask.post("/predict", bytes(16))).status == 200  # as long as somebody asks
        assert (await ask.post("/v2/repository/index")).json()[0]["state"] == "UNAVAILABLE"
        for path in ("/healthz", "/livez", "/v2/health/live"):
            assert (await ask.get(path)).status == 200

    serving(check, served_tiny, loaded=False)


# Swaps.


def test_load_asks_for_a_swap_and_takes_no_model_from_a_client(served_tiny: Path) -> None:
    asked: list[str | None] = []

    async def reload(model: str | None) -> None:
        if len(asked) > 1:
            raise Refusal(503, "a swap is under way")
        asked.append(model)

    async def check(ask: Asker) -> None:
        path = "/v2/repository/models/tiny/load"
        assert [(await ask.post(path, body)).status for body in (b"", {})] == [200, 200]
        assert (await ask.post(path, {})).status == 503
        assert asked == ["tiny", "tiny"]
        for parameters in ({"config": "{}"}, {"file:1/model.onnx": "AAAA"}, "x", [1]):
            answer = await ask.post(path, {"parameters": parameters})
            assert (answer.status, "expected no parameters" in answer.error) == (400, True)
        for body in (b"[]", b"{", b"7", b"\xff"):
            assert (await ask.post(path, body)).status == 400
        assert (await ask.post("/v2/repository/models/nix/load")).status == 404
        unloaded = await ask.post("/v2/repository/models/tiny/unload", {})
        assert (unloaded.status, "not offered" in unloaded.error) == (400, True)
        assert len(asked) == 2

    async def alone(ask: Asker) -> None:
        answer = await ask.post("/v2/repository/models/tiny/load", {})
        assert (answer.status, "expected a supervisor" in answer.error) == (400, True)

    serving(check, served_tiny, reload=reload)
    serving(alone, served_tiny)


# Faults.


def test_a_fault_of_ours_is_500_counted_and_logged_and_says_nothing_of_it(
    served_tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stumble(*_: Any) -> None:
        raise ZeroDivisionError("a secret")

    async def check(ask: Asker) -> None:
        monkeypatch.setattr(answers, "config", stumble)
        answer = await ask.get("/v2/models/tiny/config", x_request_id="abc")
        assert (answer.status, "fault of the server" in answer.error) == (500, True)
        assert "secret" not in answer.error
        assert "request abc" in caplog.text
        assert "a secret" in caplog.text
        assert 'route="config",status="500"' in (await ask.get("/metrics")).body.decode()
        assert (await ask.get("/v2/models/tiny")).status == 200

    serving(check, served_tiny)


NAMES = st.sampled_from(
    (
        *("content-type", "content-encoding", "inference-header-content-length", "x-request-id"),
        *("content-length", "origin", "authorization", "access-control-request-method", "accept"),
    )
)
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30)
VALUES = TEXTS | st.sampled_from(["gzip", "0", "16", "application/json", "image/png", "9" * 99])
PATHS = st.sampled_from(OPEN + CLOSED + POSTS) | TEXTS.map(lambda text: "/" + text)


def test_no_request_whatever_is_a_fault_of_ours(served_tiny: Path) -> None:
    asked = st.tuples(
        st.sampled_from(["GET", "POST", "OPTIONS", "HEAD"]),
        PATHS,
        st.binary(max_size=40)
        | st.just(bytes(16))
        | st.just((served_tiny / "golden/000.png").read_bytes()),
        st.lists(st.tuples(NAMES, VALUES), max_size=4),
    )

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(asked, min_size=10, max_size=30))
    def storm(requests: list[Any]) -> None:
        async def check(ask: Asker) -> None:
            for request in requests:
                answer = await ask(*request)
                assert answer.status < 500, (request, answer)
                if answer.status >= 400 and request[0] != "HEAD":
                    assert answer.error

        serving(check, served_tiny, cors=("https://a.example",), reload=_reload_nothing)

    storm()


async def _reload_nothing(_model: str | None) -> None:
    return None
