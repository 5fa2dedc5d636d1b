"""What is noted of requests: ids, metrics, statistics and the log."""

import json
import time
from pathlib import Path

import pytest
from tiny_app import Asker, echo_bundle, infer_body, serving, table_bundle


def test_every_answer_bears_an_id_the_clients_own_where_it_is_a_plain_word(
    served_tiny: Path,
) -> None:
    async def check(ask: Asker) -> None:
        for given_id in ("a", "A-1_2.x", "x" * 128):
            answer = await ask.get("/nix", x_request_id=given_id)
            assert answer.headers["x-request-id"] == given_id
        seen = set()
        for bad in ("", "x" * 129, "a b", "a\tb", "é", "a,b", '"', "a\n", "{}"):
            answer = await ask.get("/v2", x_request_id=bad)
            assert answer.headers["x-request-id"] != bad
            seen.add(answer.headers["x-request-id"])
        assert len(seen) == 9

    serving(check, served_tiny)


def test_metrics_and_statistics_add_up(served_tiny: Path, tmp_path: Path) -> None:
    async def check(ask: Asker) -> None:
        before = time.time()
        statuses = [(await ask.post("/predict/tiny", bytes(16 * n))).status for n in (1, 2, 3, 0)]
        statuses += [
            (await ask.post("/v2/models/tiny/infer", infer_body(n))).status for n in (1, 999)
        ]
        assert statuses == [200, 200, 200, 400, 200, 400]
        await ask.get("/v2/models/tiny")  # questions about a model are none to it
        (told,) = (await ask.get("/v2/models/tiny/stats")).json()["model_stats"]
        stats = told["inference_stats"]
        assert (told["inference_count"], told["execution_count"]) == (7, 4)
        assert (stats["success"]["count"], stats["fail"]["count"]) == (4, 2)
        assert (stats["queue"]["count"], stats["compute_infer"]["count"]) == (4, 4)
        assert 0 < stats["compute_infer"]["ns"] < stats["success"]["ns"]
        assert before <= told["last_inference"] / 1000 + 0.01 <= time.time() + 0.01
        everything = (await ask.get("/v2/models/stats")).json()["model_stats"]
        assert [one["name"] for one in everything] == ["tiny", "table"]
        assert everything[0]["inference_count"] == 7
        assert everything[1]["inference_stats"]["success"]["count"] == 0
        text = (await ask.get("/metrics")).body.decode()
        for line in (
            'requests_total{model="tiny",route="predict",status="200",version="1.0"} 3.0',
            'requests_total{model="tiny",route="infer",status="400",version="1.0"} 1.0',
            'batch_samples_sum{model="tiny",version="1.0"} 7.0',
            'waiting_samples{model="tiny",version="1.0"} 0.0',
        ):
            assert f"deploykit_{line}" in text

    serving(check, served_tiny, table_bundle(tmp_path, name="table"))


def test_statistics_of_a_model_are_those_of_all_its_versions(tmp_path: Path) -> None:
    async def check(ask: Asker) -> None:
        for path, versions in (("", ["2", "1"]), ("/versions/1", ["1"])):
            told = (await ask.get(f"/v2/models/echo{path}/stats")).json()["model_stats"]
            assert [one["version"] for one in told] == versions

    serving(check, *(echo_bundle(tmp_path / version, version=version) for version in "12"))


def test_clients_cannot_make_metrics_grow(served_tiny: Path) -> None:
    async def check(ask: Asker) -> None:
        async def lines() -> int:
            return (await ask.get("/metrics")).body.count(b"\n")

        async def roam(turn: int) -> None:
            for path in (f"/nix{turn}", f"/v2/models/m{turn}", f"/static/{turn}"):
                await ask("GET", path)
                await ask(f"M{turn}", path)

        await lines()
        await roam(0)
        before = await lines()
        for turn in range(20):
            await roam(turn)
        assert await lines() == before

    serving(check, served_tiny)


def test_each_request_is_one_line_of_the_log(
    served_tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def check(ask: Asker) -> None:
        await ask.post("/predict/tiny?top=1", bytes(16), x_request_id="one")
        await ask.get('/a"b%0a\xff\x85\u0007', authorization="Bearer s3cret")
        await ask("HEAD", "/" + "long" * 999)

    serving(check, served_tiny, access_log=True)
    first, second, third = map(json.loads, capfd.readouterr().out.splitlines())
    assert {key: first[key] for key in ("id", "client", "method", "path", "status", "model")} == {
        "id": "one",
        "client": "192.0.2.1",
        "method": "POST",
        "path": "/predict/tiny",
        "status": 200,
        "model": "tiny",
    }
    assert first["version"] == "1.0"
    assert 0 < first["ms"] < 10_000
    assert first["bytes"] > 50
    assert abs(first["time"] - time.time()) < 60
    assert (second["status"], second["model"]) == (404, "")
    assert "s3cret" not in json.dumps(second)
    assert second["path"] == '/a"b%0a\\xff\\x85\x07'  # no byte of it can steer a terminal
    assert len(third["path"]) == 200


def test_a_log_that_nobody_reads_holds_no_request_up(
    served_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploykit.server.access_log.MAX_LINES", 3)
    monkeypatch.setattr("deploykit.server.access_log._write_all", lambda *_: time.sleep(1))

    async def check(ask: Asker) -> None:
        started = time.perf_counter()
        for _ in range(10):
            await ask.get("/healthz")
        assert time.perf_counter() - started < 0.9
        (line,) = [
            line
            for line in (await ask.get("/metrics")).body.decode().splitlines()
            if line.startswith("deploykit_access_log_lost_lines_total")
        ]
        assert float(line.split()[1]) >= 4

    serving(check, served_tiny, access_log=True)
