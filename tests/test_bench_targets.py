"""The table across targets: what was not taken on its target is null, and said so."""

import targets
from targets import Refused, Row, figures_of, remarks, table_of
from tiny_bundle import image_model

from deploykit.runtime import detect_cpu
from deploykit.targets import TARGETS, about_integers


def rows_of(tmp_path):
    model = image_model(tmp_path / "model.onnx")
    here = detect_cpu()
    return [
        Row("fp32", here, model, 0.9, None),
        Row("int8", here, model, 0.895, 1000),
        Row("web", "web", model, None, 2000),
    ]


TIMED = {"fp32": {"1": 1.0, "32": 20.0}, "int8": {"1": 0.5, "32": 8.0}}


def test_a_latency_that_was_not_taken_is_null_with_the_reason(tmp_path):
    rows = rows_of(tmp_path)
    lines = list(table_of(rows, TIMED, []))
    assert any(line.startswith("| int8 |") and "| 0.500 | 8.000 |" in line for line in lines)
    assert any(line.startswith("| web |") and "| null | null |" in line for line in lines)
    *narrow, why = remarks(rows, TIMED, [])
    assert why.startswith("Latency of web: null: a browser runs it")
    assert bool(narrow) == bool(about_integers(TARGETS["web"]))


def test_what_could_not_be_made_is_null(tmp_path):
    elsewhere = "cpu-arm64" if detect_cpu() != "cpu-arm64" else "cpu-x86-vnni"
    refused = [Refused("int8 elsewhere", elsewhere, "its sums overflow")]
    *_, last = table_of(rows_of(tmp_path), TIMED, refused)
    assert last == f"| int8 elsewhere | {elsewhere} | null | null | null | null | null |"
    why, *_ = remarks(rows_of(tmp_path), TIMED, refused)
    assert why == "int8 elsewhere: null: it could not be made here: its sums overflow."


def test_figures_hold_only_if_all_were_made_and_nothing_is_importable(tmp_path):
    rows = rows_of(tmp_path)
    figures = figures_of(rows, TIMED, [], 10_000, (1.2, []))
    assert all(figure.holds for figure in figures)
    by_name = {figure.name: figure.value for figure in figures}
    assert by_name["int8: fp32 / this, batch 1"] == 2
    assert by_name["int8: torch checkpoint / bundle"] == 10
    refused = [Refused("fp16", "cuda", "no")]
    broken = figures_of(rows, TIMED, refused, 10_000, (2.5, ["torch"]))
    assert [figure.name for figure in broken if not figure.holds] == [
        "targets that it could not be made for",
        "unzip, selftest and predict, three packages",
        "of deploykit and torch importable there",
    ]


def test_versions_of_the_three_packages_are_the_tested_ones():
    assert all(targets.pinned(package).startswith(f"{package}==") for package in targets.PACKAGES)
