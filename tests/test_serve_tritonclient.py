"""The server as tritonclient finds it, unchanged, over a socket."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from tiny_app import Asker, echo_bundle, served, slow_bundle, table_bundle
from tiny_bundle import LABELS, make_bundle
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from deploykit.bundle import load_bundle
from deploykit.server.http import State, configure

PIXELS = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)


class Served:
    """A server in a thread; ``loop`` is the one that it runs in."""

    def __init__(self, *bundles: Path, **settings: Any) -> None:
        self._bundles, self._settings = bundles, settings
        self.loop = asyncio.new_event_loop()
        self.started, self.ask, self.url = threading.Event(), None, ""
        self.server: uvicorn.Server | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self) -> None:
        async with served(*self._bundles, reload=self._reload, **self._settings) as ask:
            self.ask: Asker = ask
            config = configure(ask.app)
            config.port = 0
            self.server = uvicorn.Server(config)
            self.server.server_state = State()
            running = asyncio.create_task(self.server._serve())
            while not self.server.started:
                await asyncio.sleep(0.005)
            port = self.server.servers[0].sockets[0].getsockname()[1]
            self.url = f"127.0.0.1:{port}"
            self.started.set()
            await running

    async def _reload(self, _model: str | None) -> None:
        """Swap in what lies there now, as the supervisor lets every worker do."""
        await self.ask.models.prepare(1, dict(enumerate(map(str, self._bundles))))
        await self.ask.models.commit(1)


@contextmanager
def serving(*bundles: Path, **settings: Any) -> Iterator[Served]:
    server = Served(*bundles, **settings)
    server.thread.start()
    assert server.started.wait(30)
    try:
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join(20)
        assert not server.thread.is_alive()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("triton")
    return [
        make_bundle(folder),
        echo_bundle(folder / "2", name="echo", version="2"),
        echo_bundle(folder / "10", name="echo", version="10"),
        table_bundle(folder / "table", name="table"),
        slow_bundle(folder / "slow", name="slow"),
    ]


@pytest.fixture(scope="module")
def server(bundles: list[Path]) -> Iterator[Served]:
    with serving(*bundles, timeout_s=0.5, queue=1) as found:
        yield found


@pytest.fixture
def client(server: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url) as found:
        yield found


def given(values: np.ndarray, name: str = "image", *, binary: bool = True) -> list[Any]:
    found = triton.InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype))
    found.set_data_from_numpy(values, binary_data=binary)
    return [found]


def wanted(name: str = "logits", **how: Any) -> list[Any]:
    return [triton.InferRequestedOutput(name, **how)]


@pytest.fixture(scope="module")
def logits(bundles: list[Path]) -> np.ndarray:
    return load_bundle(bundles[0]).predict(PIXELS).logits


def test_the_server_lives_is_ready_and_tells_its_extensions(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1.0")
    assert not client.is_model_ready("tiny", "2.0")
    assert not client.is_model_ready("nix")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]


def test_models_tell_their_tensors_versions_and_limits(client: Any) -> None:
    about = client.get_model_metadata("tiny")
    assert about["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 4, 4, 1]}]
    assert about["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]
    assert client.get_model_metadata("echo")["versions"] == ["10", "2"]
    assert client.get_model_metadata("echo", "2")["versions"] == ["2"]
    assert client.get_model_config("tiny")["max_batch_size"] == 8
    index = [(one["name"], one["state"]) for one in client.get_model_repository_index()]
    assert sorted(set(index)) == [(name, "READY") for name in ("echo", "slow", "table", "tiny")]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
def test_every_way_to_send_and_to_be_answered_gives_the_same(
    client: Any, logits: np.ndarray, binary_in: bool, binary_out: bool | None, packed: str | None
) -> None:
    outputs = None if binary_out is None else wanted(binary_data=binary_out)
    answer = client.infer(
        "tiny",
        given(PIXELS, binary=binary_in),
        outputs=outputs,
        request_id="a-1",
        request_compression_algorithm=packed,
        response_compression_algorithm=packed,
    )
    np.testing.assert_array_equal(answer.as_numpy("logits"), logits)
    about = answer.get_response()
    assert (about["id"], about["model_name"], about["model_version"]) == ("a-1", "tiny", "1.0")
    assert ("data" in about["outputs"][0]) == (binary_out is False)


def test_raw_mode_takes_one_sample_as_it_is(client: Any, logits: np.ndarray) -> None:
    response = client._post(
        "v2/models/tiny/infer",
        PIXELS[:1].tobytes(),
        {"Inference-Header-Content-Length": "0"},
        None,
    )
    assert response.status_code == 200
    answer = triton.InferResult(response, False)
    np.testing.assert_array_equal(answer.as_numpy("logits"), logits[:1])


def test_a_body_made_in_advance_is_read(client: Any, logits: np.ndarray) -> None:
    body, size = triton.InferenceServerClient.generate_request_body(given(PIXELS), wanted())
    headers = {"Inference-Header-Content-Length": str(size)}
    response = client._post("v2/models/tiny/infer", body, headers, None)
    size = int(response.get("Inference-Header-Content-Length"))
    answer = triton.InferenceServerClient.parse_response_body(
        bytes(response.read()), header_length=size
    )
    np.testing.assert_array_equal(answer.as_numpy("logits"), logits)


@pytest.mark.parametrize("binary", [True, False])
def test_classes_come_as_texts(client: Any, logits: np.ndarray, binary: bool) -> None:
    outputs = wanted(binary_data=binary, class_count=2)
    found = client.infer("tiny", given(PIXELS), outputs=outputs).as_numpy("logits")
    assert found.shape == (2, 2)
    for row, texts in zip(logits, found, strict=True):
        best = int(row.argmax())
        text = texts[0].decode() if isinstance(texts[0], bytes) else texts[0]
        value, index, label = text.split(":")
        assert (int(index), label) == (best, LABELS[best])
        assert float(value) == pytest.approx(row[best], abs=1e-5)


def test_versions_and_asynchronous_requests_are_answered(client: Any) -> None:
    values = np.array([[1.5, -2, 3e38]], np.float32)
    for version, expected in (("", "10"), ("2", "2"), ("10", "10")):
        found = client.infer("echo", given(values, "x"), model_version=version)
        assert found.get_response()["model_version"] == expected
        np.testing.assert_array_equal(found.as_numpy("y"), values)
    found = client.async_infer("echo", given(values, "x")).get_result()
    np.testing.assert_array_equal(found.as_numpy("y"), values)


def test_statistics_count_what_was_answered(client: Any) -> None:
    def told() -> tuple[int, int, int]:
        (found,) = client.get_inference_statistics("table")["model_stats"]
        stats = found["inference_stats"]
        return found["inference_count"], stats["success"]["count"], stats["fail"]["count"]

    samples, good, bad = told()
    client.infer("table", given(np.array([[1], [2]]), "x"))
    with pytest.raises(InferenceServerException):
        client.infer("table", given(np.array([[99]]), "x"))
    assert told() == (samples + 2, good + 1, bad + 1)
    assert len(client.get_inference_statistics()["model_stats"]) == 5


def _unknown_model(client: Any) -> None:
    client.infer("nix", given(PIXELS))


def _unknown_version(client: Any) -> None:
    client.get_model_metadata("tiny", "7")


def _unknown_input(client: Any) -> None:
    client.infer("tiny", given(PIXELS, "pixels"))


def _unknown_output(client: Any) -> None:
    client.infer("tiny", given(PIXELS), outputs=wanted("odds"))


def _other_datatype(client: Any) -> None:
    client.infer("tiny", given(PIXELS.astype(np.float32)))


def _other_shape(client: Any) -> None:
    client.infer("tiny", given(PIXELS[:, :2]))


def _two_inputs(client: Any) -> None:
    client.infer("tiny", given(PIXELS) + given(PIXELS))


def _texts(client: Any) -> None:
    client.infer("tiny", given(np.array([b"a"], object)))


def _too_many(client: Any) -> None:
    client.infer("tiny", given(np.repeat(PIXELS, 5, 0)))


def _refused_values(client: Any) -> None:
    client.infer("table", given(np.array([[4]]), "x"))


def _deadline(client: Any) -> None:
    client.infer("slow", given(np.array([[10**9]]), "x"))


def _own_deadline(client: Any) -> None:
    client.infer("slow", given(np.array([[10**9]]), "x"), timeout=1000)


def _shared_memory(client: Any) -> None:
    found = triton.InferInput("image", [2, 4, 4, 1], "UINT8")
    found.set_shared_memory("region", 32)
    client.infer("tiny", [found])


def _registered_memory(client: Any) -> None:
    client.register_system_shared_memory("region", "/key", 32)


def _own_model(client: Any) -> None:
    client.load_model("tiny", config="{}")


def _unload(client: Any) -> None:
    client.unload_model("tiny")


ERRORS = {
    _unknown_model: ("404", "model: expected one of tiny, echo, table, slow, got 'nix'"),
    _unknown_version: ("404", "version of tiny: expected 1.0, got '7'"),
    _unknown_input: ("400", "inputs[0].name: expected 'image', got 'pixels'"),
    _unknown_output: ("400", "outputs[0].name: expected 'logits', got 'odds'"),
    _other_datatype: ("400", "image.datatype: expected UINT8, got 'FP32'"),
    _other_shape: ("400", "image.shape: expected [-1, 4, 4, 1], got [2, 2, 4, 1]"),
    _two_inputs: ("400", "inputs: expected a list of one, 'image', got 2 of them"),
    _texts: ("400", "image.datatype: expected UINT8, got 'BYTES'"),
    _too_many: ("400", "expected a batch of 1 to 8 samples, got 10"),
    _refused_values: ("422", "the model refused the input"),
    _deadline: ("504", "the deadline passed"),
    _own_deadline: ("504", "the deadline passed"),
    _shared_memory: ("400", "shared memory is not offered"),
    _registered_memory: ("404", "path: expected one that /docs lists"),
    _own_model: ("400", "expected no parameters"),
    _unload: ("400", "not offered"),
}


@pytest.mark.parametrize("ask", ERRORS, ids=lambda ask: ask.__name__[1:])
def test_every_refusal_reaches_the_caller_as_our_sentence(client: Any, ask: Any) -> None:
    status, said = ERRORS[ask]
    with pytest.raises(InferenceServerException) as refused:
        ask(client)
    assert (refused.value.status(), said in refused.value.message()) == (status, True)
    assert client.is_server_ready()  # over the same connection


def test_load_swaps_in_what_lies_there_now(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    make_bundle(tmp_path)
    with serving(folder) as found, triton.InferenceServerClient(found.url) as client:
        folder.rename(tmp_path / "old")
        make_bundle(tmp_path, version="1.1")
        assert client.get_model_metadata("tiny")["versions"] == ["1.0"]
        client.load_model("tiny")
        assert client.get_model_metadata("tiny")["versions"] == ["1.1"]
        assert client.infer("tiny", given(PIXELS)).get_response()["model_version"] == "1.1"


def test_a_token_travels_in_the_clients_headers(bundles: list[Path]) -> None:
    with (
        serving(bundles[0], token="s3cret") as found,
        triton.InferenceServerClient(found.url) as client,
    ):
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="authorization: expected"):
            client.infer("tiny", given(PIXELS))
        headers = {"Authorization": "Bearer s3cret"}
        assert client.infer("tiny", given(PIXELS), headers=headers).as_numpy("logits").size == 6
