"""Predictions over HTTP: answers of all kinds of models, and why one is refused."""

import asyncio
import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_app import (
    JSON_TYPE,
    Asker,
    echo_bundle,
    infer_body,
    rows,
    serving,
    slow_bundle,
    sum_bundle,
    table_bundle,
)
from tiny_bundle import LABELS

from deploykit.server.protocol import parse_request

PNG = "golden/000.png"


def test_predict_names_the_likeliest_classes(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        image = (served_tiny / PNG).read_bytes()
        answer = (await ask.post("/predict", image)).json()
        (found,) = answer["predictions"]
        assert (answer["model"], answer["version"]) == ("tiny", "1.0")
        assert sorted(one["label"] for one in found["top"]) == sorted(LABELS)
        assert found["label"] == found["top"][0]["label"]
        odds = [one["probability"] for one in found["top"]]
        assert odds == sorted(odds, reverse=True)
        assert sum(odds) == pytest.approx(1)
        pixels = {"inputs": np.full((2, 4, 4, 1), 7).tolist()}
        both = (await ask.post("/predict?top=1&x=y", pixels)).json()["predictions"]
        assert [len(one["top"]) for one in both] == [1, 1]

    serving(check, served_tiny)


TOPS = ("top=0", "top=-1", "top=", "top=1.0", "top=1001", "top=+1", "top=%EF%BC%95", "top=1&top=2")


@pytest.mark.parametrize("query", TOPS)
def test_a_top_that_is_no_count_is_refused(served_tiny: Path, query: str) -> None:
    async def check(ask: Asker) -> None:
        answer = await ask.post(f"/predict?{query}", bytes(16))
        assert answer.status == 400
        assert "top: expected an integer from 1 to 1000" in answer.error

    serving(check, served_tiny)


def test_a_query_is_read_whole_or_refused(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        answer = await ask.post("/predict?" + "x=1&" * 300 + "top=0", bytes(16))
        assert (answer.status, "query: expected at most" in answer.error) == (400, True)
        assert (await ask.post("/predict?%ff&=&;&top", bytes(16))).status == 400
        assert (await ask.post("/predict?%ff=%00&\xff", bytes(16))).status == 200

    serving(check, served_tiny)


def test_a_model_of_many_or_no_labels_answers_as_many_as_were_asked_for(tmp_path: Path) -> None:
    labels = [f"a thing, number {n}" for n in range(1200)]

    async def check(ask: Asker) -> None:
        pixels = {"inputs": list(range(1200))}
        (named,) = (await ask.post("/predict/many?top=1000", pixels)).json()["predictions"]
        assert (len(named["top"]), named["label"]) == (1000, labels[-1])
        (unnamed,) = (await ask.post("/predict/none", {"inputs": [1, 3, 2]})).json()["predictions"]
        assert [one["label"] for one in unnamed["top"]] == ["1", "2", "0"]

    many = echo_bundle(tmp_path / "many", shape=(1200,), labels=labels, name="many")
    serving(check, many, echo_bundle(tmp_path / "none", name="none"))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "int8", "uint8"])
def test_models_of_any_datatype_predict_and_infer(tmp_path: Path, dtype: str) -> None:
    async def check(ask: Asker) -> None:
        values = np.array([[0, 1, 0]], dtype).tolist()
        answer = await ask.post("/predict", {"inputs": values})
        assert answer.json()["predictions"][0]["label"] == "1"
        datatype = (await ask.get("/v2/models/echo")).json()["inputs"][0]["datatype"]
        answer = await ask.post("/v2/models/echo/infer", rows("x", datatype, values))
        assert answer.json()["outputs"][0]["data"] == values[0]
        assert answer.json()["outputs"][0]["datatype"] == datatype

    serving(check, echo_bundle(tmp_path, dtype))


def test_outputs_of_any_rank_infer_and_only_rows_of_classes_are_named(tmp_path: Path) -> None:
    async def check(ask: Asker) -> None:
        cube = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
        for name, values, shape in (
            ("cube", cube, [2, 2, 2]),
            ("sum", [[1.5, 2, 3], [4, 5, 6]], [2]),
        ):
            answer = await ask.post(f"/v2/models/{name}/infer", rows("x", "FP32", values))
            assert answer.json()["outputs"][0]["shape"] == shape
        answer = await ask.post("/predict/cube", {"inputs": cube})
        assert (answer.status, "expected a model that gives one row" in answer.error) == (400, True)
        (found,) = (await ask.post("/predict/sum", {"inputs": [3, 4, 5]})).json()["predictions"]
        assert found["top"] == [{"label": "0", "probability": 1.0}]

    bundles = [
        echo_bundle(tmp_path / "cube", shape=(2, 2), labels=["a", "b"], name="cube"),
        sum_bundle(tmp_path / "sum", name="sum"),
    ]
    serving(check, *bundles)


def test_infer_answers_in_json_in_bytes_and_raw_alike(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        path, raw = "/v2/models/tiny/infer", bytes([9] * 16)
        plain = await ask.post(path, infer_body(9, id="7"))
        assert (plain.json()["id"], plain.headers["content-type"]) == ("7", JSON_TYPE)
        expected = np.array(plain.json()["outputs"][0]["data"], np.float32).tobytes()
        body = infer_body(9, parameters={"binary_data_output": True})
        body["inputs"][0]["parameters"] = {"binary_data_size": 16}
        del body["inputs"][0]["data"]
        head = json.dumps(body).encode()
        length = {"Inference-Header-Content-Length": str(len(head))}
        packed = {"Content-Encoding": "gzip"} | length
        for answer in (
            await ask.post(path, head + raw, **length),
            await ask.post(path, gzip.compress(head + raw), **packed),
            await ask.post(path, raw, **{"Inference-Header-Content-Length": "0"}),
        ):
            size = int(answer.headers["inference-header-content-length"])
            assert answer.body[size:] == expected
            assert json.loads(answer.body[:size])["outputs"][0]["shape"] == [1, 3]
            assert answer.headers["content-type"] == "application/octet-stream"

    serving(check, served_tiny)


def test_a_body_may_come_in_pieces_and_its_type_with_parameters(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        body = json.dumps({"inputs": [[[7]] * 4] * 4}).encode()
        whole = await ask.post("/predict", body)
        for content_type in ("application/json; charset=utf-8", "Application/JSON;q=1", "", ";;"):
            pieces = [bytes([byte]) for byte in body] + [b"", b""]
            answer = await ask("POST", "/predict", pieces, [("content-type", content_type)])
            assert answer.body == whole.body
        twice = [("content-type", "text/html"), ("content-type", "application/json")]
        assert (await ask("POST", "/predict", body, twice)).status in (200, 415)

    serving(check, served_tiny)


def test_timing_tells_queue_compute_and_batch(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        for answer in (
            await ask.post("/predict", bytes(32)),
            await ask.post("/v2/models/tiny/infer", infer_body(1, 2)),
        ):
            queue, compute, batch = answer.headers["server-timing"].split(", ")
            assert 0 <= float(queue.removeprefix("queue;dur=")) < 1000
            assert 0 < float(compute.removeprefix("compute;dur=")) < 1000
            assert batch == 'batch;desc="2"'

    serving(check, served_tiny)


# Refusals.


def test_a_body_over_the_limit_names_the_option_that_sets_it(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        big = bytes(2001)
        for path in ("/predict", "/v2/models/tiny/infer", "/v2/repository/index"):
            for answer in (
                await ask.post(path, big),
                await ask.post(path, gzip.compress(big), content_encoding="gzip"),
                await ask.post(path, b"", content_length="2001"),
                await ask("POST", path, [bytes(1000)] * 5, [("content-length", "7")]),
            ):
                assert answer.status == 413
                assert "--max-body" in answer.error
        assert (await ask.post("/predict", b"", content_encoding="br")).status == 415
        assert (await ask.post("/predict", b"", content_type="text/html")).status == 415

    serving(check, served_tiny, max_body=2000)


def test_an_image_over_the_limit_names_the_option_that_sets_it(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        answer = await ask.post("/predict", (served_tiny / PNG).read_bytes())
        assert answer.status == 400
        assert "got 4 x 4" in answer.error
        assert "--max-pixels" in answer.error

    serving(check, served_tiny, max_pixels=15)


def test_values_that_the_model_refuses_are_422_and_hurt_nobody_else(tmp_path: Path) -> None:
    async def check(ask: Asker) -> None:
        path = "/v2/models/table/infer"
        asked = [ask.post(path, rows("x", "INT64", [[n]])) for n in (1, 77, 3, -99)]
        found = await asyncio.gather(*asked)
        assert [one.status for one in found] == [200, 422, 200, 422]
        assert "the model refused the input" in found[1].error
        assert found[2].json()["outputs"][0]["data"] == [9, 10, 11]

    serving(check, table_bundle(tmp_path, name="table"), window_us=50_000)


def test_a_full_queue_is_429_with_the_time_to_come_again(tmp_path: Path) -> None:
    async def check(ask: Asker) -> None:
        asked = [ask.post("/predict", {"inputs": [100_000]}) for _ in range(8)]
        found = await asyncio.gather(*asked)
        assert {one.status for one in found} == {200, 429}
        refused = next(one for one in found if one.status == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert "--queue 1" in refused.error

    serving(check, slow_bundle(tmp_path), queue=1, max_batch=1, timeout_s=20)


def test_the_deadline_is_504_and_the_next_request_begins_at_once(tmp_path: Path) -> None:
    async def check(ask: Asker) -> None:
        forever = rows("x", "INT64", [[10**9]])
        own = forever | {"parameters": {"timeout": 100_000}}
        for body, most in ((forever, 5.0), (own, 0.9)):
            started = time.perf_counter()
            answer = await ask.post("/v2/models/echo/infer", body)
            assert (answer.status, "--timeout" in answer.error) == (504, True)
            assert time.perf_counter() - started < most
        answer = await ask.post("/predict", {"inputs": [1]})
        assert float(answer.headers["server-timing"].split(",")[0][10:]) < 500

    serving(check, slow_bundle(tmp_path), timeout_s=1)


def test_long_json_is_read_beside_the_loop_whatever_length_its_header_tells(
    served_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []

    def noted(*given: Any) -> Any:
        readers.append(threading.current_thread().name.partition("_")[0])
        return parse_request(*given)

    async def check(ask: Asker) -> None:
        monkeypatch.setattr("deploykit.server.app.parse_request", noted)
        short = json.dumps(infer_body(1)).encode()
        for body in (short, short + b" " * 70_000):
            length = {"Inference-Header-Content-Length": str(len(body))}
            for headers in ({}, length):
                answer = await ask.post("/v2/models/tiny/infer", body, **headers)
                assert answer.status == 200
        assert readers == ["MainThread", "MainThread", "decoder", "decoder"]

    serving(check, served_tiny)


def test_the_deadline_holds_for_what_is_still_being_read(
    served_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(ask: Asker) -> None:
        monkeypatch.setattr("deploykit.server.app.is_quick", lambda *_: False)
        assert (await ask.post("/predict", bytes(16))).status == 200
        monkeypatch.setattr("deploykit.server.app.read_samples", lambda *_, **__: time.sleep(1.5))
        started = time.perf_counter()
        assert (await ask.post("/predict", bytes(16))).status == 504
        assert time.perf_counter() - started < 1.2

    serving(check, served_tiny, timeout_s=0.2)


def test_work_ends_when_its_client_has_gone(tmp_path: Path) -> None:
    async def check(ask: Asker) -> None:
        asked = asyncio.create_task(ask.post("/predict", {"inputs": [10**9]}))
        await asyncio.sleep(0.1)
        assert ask.models.find(None).users == 1
        ask.gone.set()
        assert (await asked).status == 0  # nobody is told anything
        ask.gone.clear()
        answer = await ask.post("/predict", {"inputs": [1]})
        assert float(answer.headers["server-timing"].split(",")[0][10:]) < 500
        assert 'status="499",version="1.0"} 1.0' in (await ask.get("/metrics")).body.decode()
        assert ask.models.find(None).users == 0

    serving(check, slow_bundle(tmp_path), timeout_s=20)
