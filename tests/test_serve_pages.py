"""The pages for people and the description of the server, without a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deploykit.server
from deploykit.runtime import decode_image, parse_npy
from deploykit.server.guard import PAGE_HEADERS
from deploykit.server.openapi import OPEN, openapi
from deploykit.server.openapi_schemas import EXACT, PIXEL, datatype_of, number_of
from deploykit.server.pages import PAGES, PARTS, page
from deploykit.server.settings import Settings
from tests.sample_models import DIGITS, PHOTOS, ROWS, array_model
from tests.tiny_bundle import PREPROCESS

FOLDER = Path(deploykit.server.__file__).parent / "static"
SETTINGS = Settings(bundles=(), max_batch=16, max_body=4096)
MODELS = [DIGITS, PHOTOS, ROWS]
STATUSES = {200, 400, 401, 404, 408, 413, 415, 422, 429, 431, 503, 504}
Document = dict[str, Any]


def document(token: str | None = None) -> Document:
    return openapi(MODELS, replace(SETTINGS, token=token))


def operations(described: Document) -> Iterator[tuple[str, Any]]:
    for path, methods in described["paths"].items():
        for operation in methods.values():
            yield path, operation


def inside(value: Any) -> Iterator[Any]:
    """Yield everything that is anywhere in a JSON value."""
    yield value
    for child in value.values() if isinstance(value, dict) else value:
        yield from inside(child) if isinstance(child, (dict, list)) else (child,)


# pages


def test_every_static_file_is_served_as_what_it_is() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*PAGES.values(), *PARTS}
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg"}
    for path in [*PAGES, *(f"/static/{name}" for name in PARTS)]:
        found = page(path)
        assert found is not None
        suffix = path.rpartition(".")[2] if "." in path else "html"
        assert found[1].startswith(kinds[suffix])
        assert found[0]


@pytest.mark.parametrize(
    "path",
    [
        *("", "/static", "/static/", "/static/index.html", "/static/none.css", "//", "/docs/"),
        *("/static/../pages.py", "/static/%2e%2e/pages.py", "/static/../../runtime.py"),
        *("/../pages.py", "static/page.css", "/static//page.css", "/static/page.css\0"),
        "/static/" + str(Path(deploykit.server.__file__)),
    ],
)
def test_no_other_path_reaches_a_file(path: str) -> None:
    assert page(path) is None


def test_pages_are_small_and_load_nothing_from_elsewhere() -> None:
    texts = [file.read_text() for file in FOLDER.iterdir()]
    assert sum(len(text.encode()) for text in texts) < 60_000
    addresses = {found for text in texts for found in re.findall(r"https?://[^\s\"']+", text)}
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address


def inline(text: str) -> list[str]:
    """Return what a strict content security policy would block."""
    return re.findall(r"<style|<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=|javascript:", text)


def test_pages_hold_no_inline_script_or_style() -> None:
    for name in PAGES.values():
        assert inline((FOLDER / name).read_text()) == []
    assert "'unsafe" not in PAGE_HEADERS["content-security-policy"]
    planted = '<p style="x" onclick="f()"><script>f()</script><style></style>'
    assert len(inline(planted)) == 4


def test_pages_refer_to_files_that_are_served() -> None:
    for name in [*PAGES.values(), *PARTS]:
        text = (FOLDER / name).read_text()
        named = re.findall(r'"(static/[^"]+)"', text)
        named += [f"static/{part}" for part in re.findall(r'from "\./([^"]+)"', text)]
        assert all(page(f"/{one}") for one in named), name


# the description


def test_every_reference_leads_somewhere() -> None:
    described = document(token="secret")
    references = [value["$ref"] for value in inside(described) if "$ref" in _keys(value)]
    assert references
    for reference in references:
        found: Any = described
        for key in reference.removeprefix("#/").split("/"):
            found = found[key]


def _keys(value: Any) -> Any:
    return value if isinstance(value, dict) else {}


def test_refusals_are_sentences_in_json() -> None:
    described = document(token="secret")
    for path, operation in operations(described):
        assert {int(status) for status in operation["responses"]} <= STATUSES, path
        assert {"200", "400", "408", "431"} <= set(operation["responses"]), path
    for response in described["components"]["responses"].values():
        schema = response["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Error"}
    assert "Retry-After" in described["components"]["responses"]["429"]["headers"]


def test_token_is_told_where_it_is_demanded_and_nowhere_else() -> None:
    guarded, free = document(token="secret"), document()
    assert guarded["security"] == [{"bearer": []}]
    for path, operation in operations(guarded):
        assert ("401" in operation["responses"]) == (path not in OPEN)
        assert (operation.get("security") == []) == (path in OPEN)
    assert "security" not in free
    assert not [path for path, operation in operations(free) if "401" in operation["responses"]]
    assert "secret" not in json.dumps(guarded)


def test_a_version_can_go_and_a_name_stays() -> None:
    for path, operation in operations(document()):
        assert ("404" in operation["responses"]) == ("/versions/" in path), path


def test_name_alone_means_the_first_that_bears_it_and_predict_the_very_first() -> None:
    old, new = replace(DIGITS, version="1.9"), replace(DIGITS, version="1.10")
    paths = openapi([new, old, ROWS], SETTINGS)["paths"]

    def schema(path: str) -> str:
        content = paths[path]["post"]["requestBody"]["content"]
        return str(content["application/json"]["schema"]["$ref"])

    assert (
        schema("/predict") == schema("/predict/digits") == schema("/predict/digits/versions/1.10")
    )
    assert schema("/predict/digits/versions/1.9") != schema("/predict")


def test_names_are_quoted_in_paths() -> None:
    paths = openapi([replace(DIGITS, name="a/b {c}", version="1 ü")], SETTINGS)["paths"]
    assert "/predict/a%2Fb%20%7Bc%7D/versions/1%20%C3%BC" in paths
    assert not [path for path in paths if "{" in path]


def test_bounds_are_those_of_the_model_and_the_settings() -> None:
    described = document()
    predict = described["paths"]["/predict/digits"]["post"]
    assert predict["parameters"][0]["schema"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 1000,
        "default": 5,
    }
    content = predict["requestBody"]["content"]
    assert content["image/png"]["schema"]["maxLength"] == 4096
    raw = content["application/octet-stream"]["schema"]
    assert (raw["minLength"], raw["maxLength"]) == (64, 64 * 16)
    schemas = described["components"]["schemas"]
    assert schemas["model0.Label"] == {"enum": list("0123456789")}
    assert schemas["model2.Label"] == {"enum": ["0", "1", "2"]}
    inputs = schemas["model2.PredictRequest"]["oneOf"][0]["properties"]["inputs"]
    sample, batch = inputs["anyOf"]
    assert (sample["minItems"], sample["maxItems"]) == (4, 4)
    assert (batch["minItems"], batch["maxItems"], batch["items"]) == (1, 16, sample)
    rows = described["paths"]["/predict/rows"]["post"]["requestBody"]["content"]
    assert not [kind for kind in rows if kind.startswith("image/")]


@pytest.mark.parametrize(
    ("dtype", "name", "lowest", "highest"),
    [
        ("uint8", "UINT8", 0, 255),
        ("int8", "INT8", -128, 127),
        ("int64", "INT64", -(2**63), 2**63 - 1),
        ("uint64", "UINT64", 0, 2**64 - 1),
        ("float16", "FP16", -65504.0, 65504.0),
        ("float32", "FP32", float(np.finfo("f4").min), float(np.finfo("f4").max)),
        ("float64", "FP64", float(np.finfo("f8").min), float(np.finfo("f8").max)),
    ],
)
def test_numbers_have_the_range_of_their_dtype(
    dtype: str, name: str, lowest: float, highest: float
) -> None:
    schema = number_of(np.dtype(dtype))
    assert (schema["minimum"], schema["maximum"]) == (lowest, highest)
    assert datatype_of(np.dtype(dtype)) == name


def test_booleans_are_no_numbers() -> None:
    assert number_of(np.dtype("bool")) == {"type": "boolean"}
    assert datatype_of(np.dtype("bool")) == "BOOL"


def test_large_models_are_described_in_few_bytes() -> None:
    described = openapi([PHOTOS], SETTINGS)
    data = described["components"]["schemas"]["model0.InferRequest"]["properties"]["inputs"]
    assert data["items"]["properties"]["data"]["maxItems"] == 16 * 224 * 224 * 3
    assert len(json.dumps(described)) < 100_000


def test_sizes_that_vary_have_no_bounds_and_no_raw_form() -> None:
    series = array_model("series", "float32", [-1, 2])
    described = openapi([series], SETTINGS)
    content = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "application/x-npy"}
    assert content["application/json"]["example"] == {"inputs": [[0, 0]]}
    array = parse_npy(written_by(content["application/x-npy"]["x-example-command"]))
    assert array.shape == (1, 1, 2)
    request = described["components"]["schemas"]["model0.InferRequest"]
    tensor = request["properties"]["inputs"]["items"]
    assert "anyOf" not in tensor
    assert tensor["properties"]["shape"]["prefixItems"][1:] == [
        {"type": "integer", "minimum": 1},
        {"const": 2},
    ]
    assert "maxItems" not in tensor["properties"]["data"]


# the examples


def written_by(command: str) -> bytes:
    shell = shutil.which("sh")
    assert shell
    return subprocess.run([shell, "-c", command], capture_output=True, check=True).stdout


def body(path: str, kind: str, models: Any = MODELS) -> Any:
    operation = openapi(models, SETTINGS)["paths"][path]["post"]
    return operation["requestBody"]["content"][kind]


def test_example_image_is_one_that_is_decoded() -> None:
    pixels = decode_image(base64.b64decode(PIXEL), PREPROCESS)
    assert pixels.shape == (4, 4, 1)
    assert written_by(body("/predict/digits", "image/png")["x-example-command"]) == (
        base64.b64decode(PIXEL)
    )
    assert Image.open(io.BytesIO(base64.b64decode(PIXEL))).size == (1, 1)


@pytest.mark.parametrize("model", [*MODELS, array_model("halves", "float16", [3, 2])])
def test_example_arrays_are_one_sample_of_zeros(model: Any) -> None:
    spec = model.manifest["inputs"][0]
    zeros = np.zeros([1, *spec["shape"][1:]], spec["dtype"])
    path = f"/predict/{model.name}"
    raw = written_by(body(path, "application/octet-stream", [model])["x-example-command"])
    assert raw == zeros.tobytes()
    array = parse_npy(written_by(body(path, "application/x-npy", [model])["x-example-command"]))
    assert (array.dtype, array.shape, array.any()) == (zeros.dtype, zeros.shape, False)


@pytest.mark.parametrize("model", [*MODELS, array_model("it's", "float64", [EXACT + 1])])
def test_example_inference_holds_what_it_says(model: Any) -> None:
    path = next(one for one in openapi([model], SETTINGS)["paths"] if one.endswith("/infer"))
    binary = body(path, "application/octet-stream", [model])
    sent = written_by(binary["x-example-command"])
    length = int(binary["x-example-headers"]["Inference-Header-Content-Length"])
    tensor = json.loads(sent[:length])["inputs"][0]
    assert len(sent) - length == tensor["parameters"]["binary_data_size"]
    in_json = body(path, "application/json", [model])
    value = in_json.get("example") or json.loads(written_by(in_json["x-example-command"]))
    assert len(value["inputs"][0]["data"]) == np.prod(value["inputs"][0]["shape"])
    assert value["inputs"][0]["shape"] == tensor["shape"]


@pytest.mark.parametrize(("max_batch", "bounds"), [(1, None), (3, None), (16, (4, 16))])
def test_small_batches_have_as_many_numbers_as_their_shape_says(
    max_batch: int, bounds: tuple[int, int] | None
) -> None:
    described = openapi([ROWS], replace(SETTINGS, max_batch=max_batch))
    request = described["components"]["schemas"]["model0.InferRequest"]
    choices = [one["properties"] for one in request["properties"]["inputs"]["items"]["anyOf"]]
    exact = [one for one in choices if "const" in one["shape"]]
    assert [one["shape"]["const"] for one in exact] == [[n, 4] for n in (1, 2, 3)[:max_batch]]
    for one in exact:
        size = one["shape"]["const"][0]
        flat, nested = one["data"]["anyOf"]
        assert flat["minItems"] == flat["maxItems"] == 4 * size
        assert nested["minItems"] == nested["maxItems"] == size
    rest = [one["shape"]["prefixItems"][0] for one in choices if "const" not in one["shape"]]
    assert [(one["minimum"], one["maximum"]) for one in rest] == ([bounds] if bounds else [])
