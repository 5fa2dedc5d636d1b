import os
from pathlib import Path

import pytest
import yaml

from deploykit.errors import RecipeError
from deploykit.recipe import dump_recipe, load_recipe, parse_recipe, tree
from deploykit.targets import TARGETS

MINIMAL = """\
schema: 1
name: tiny
task: classification
data: {source: digits}
model: {name: mlp}
"""


def problems(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, where="recipe.yaml")
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_minimal_recipe_takes_every_default() -> None:
    recipe = parse_recipe(MINIMAL)
    assert recipe.version == 1
    assert recipe.seed == 0
    assert recipe.train is None
    assert recipe.data.validation == 0.15


# What is appended to the minimal recipe, and the fault it must give.
FAULTS = {
    "out of range": (
        "prune: {channel_ratio: 1.5}",
        "recipe.yaml:6: prune.channel_ratio: expected 0 <= x < 1, got 1.5",
    ),
    "two bounds": (
        "prune: {speedup: 2.0, macs: 2.0}",
        "prune.macs: expected one of speedup, latency_ms, macs, got speedup and macs",
    ),
    "gradients and a bound": (
        "prune: {speedup: 2.0, importance: taylor}",
        "prune.importance: expected l1 or l2 with speedup, got taylor",
    ),
    "negative": ("train: {epochs: -1}", "train.epochs: expected integer >= 0, got -1"),
    "text for a number": (
        "train: {batch_size: many}",
        "train.batch_size: expected integer >= 1, got 'many'",
    ),
    "float for an integer": ("seed: 1.0", "seed: expected integer, 0 <= x < 4294967296, got 1.0"),
    "boolean for an integer": ("threads: true", "threads: expected integer >= 1, got true"),
    "boolean for a number": (
        "budget: {min_speedup: true}",
        "budget.min_speedup: expected x > 0 or null, got true",
    ),
    "boolean for a choice of numbers": (
        "train: {precision: true}",
        "train.precision: expected 32, bf16 or 16, got true",
    ),
    "number for text": ("target: 3", "target: expected text, got 3"),
    "yes is text": ("train: {optimizer: {nesterov: yes}}", "expected true or false, got 'yes'"),
    "unknown choice": (
        "quantize: {mode: int8}",
        "quantize.mode: expected auto, ptq or qat, got 'int8'",
    ),
    "unknown key": (
        "train: {epoch: 3}",
        "recipe.yaml:6: train.epoch: unknown key; did you mean train.epochs?",
    ),
    "unknown section": ("quantise: {}", "quantise: unknown key; did you mean quantize?"),
    "key of a deeper section": (
        "train: {lr: 0.1}",
        "train.lr: unknown key; did you mean train.optimizer.lr?",
    ),
    "hopeless key": ("zzzzz: 1", "recipe.yaml:6: zzzzz: unknown key; remove it"),
    "missing key": ("train: {average: {}}", "train.average.name: expected ema or swa, got nothing"),
    "item of a list": (
        "train: {schedule: {milestones: [0.5, 2]}}",
        "train.schedule.milestones.1: expected 0 <= x < 1, got 2",
    ),
    "text for a list": ("prune: {protect: a}", "prune.protect: expected list of text, got 'a'"),
    "wrong section": ("prune: 3", "prune: expected section or null, got 3"),
    "NaN": ("budget: {max_drop: .nan}", "budget.max_drop: expected a finite number, got '.nan'"),
    "infinity": ("budget: {max_drop: .inf}", "expected a finite number, got '.inf'"),
    "overflow": ("budget: {max_drop: 1e999}", "expected a finite number, got '1e999'"),
    "huge integer": ("seed: " + "9" * 400, "got a huge integer"),
    "more digits than Python reads": ("seed: " + "9" * 5000, "expected a finite number"),
    "nothing": ("prune:", "recipe.yaml:6: prune: expected a value, got nothing; write null"),
    "twice": ("seed: 1\nseed: 2", "recipe.yaml:7: seed: expected once, got it again"),
    "python tag": ("train: !!python/object:os.system {}", "got '!!python/object:os.system'"),
    "binary tag": ("target: !!binary aGk=", "target: expected no tag, got '!!binary'"),
    "anchor": ("train: &t {}", "recipe.yaml:6: expected no anchors and aliases"),
    "alias": ("protect: *t", "expected no anchors and aliases"),
    "merge key": ("train: {<<: {epochs: 3}}", "unknown key"),
    "list as key": ("? [1]\n: 2", "expected a word as key"),
    "tab": ("train:\n\tepochs: 3", "recipe.yaml:7: expected spaces, got a tab"),
    "not YAML": ("train: {epochs: 3", "expected valid YAML"),
    "control character": ('target: "\\0"', "expected text of one line without control characters"),
    "two documents": ("---\nseed: 1", "recipe.yaml:6: expected one YAML document"),
    "deep": ("train: " + "[" * 1000, "expected at most 20 levels"),
    "many": ("train: [" + "1," * 20_000 + "]", "expected at most 10000 values"),
    "NUL": ("target: \0", "recipe.yaml:6: expected text, got the character '\\x00'"),
    "rule over keys": (
        "verify: {samples: 0}",
        "verify.samples: expected integer >= 1, got 0",
    ),
}


@pytest.mark.parametrize(("text", "expected"), FAULTS.values(), ids=FAULTS)
def test_fault_tells_line_key_expectation_and_value(text: str, expected: str) -> None:
    found = problems(MINIMAL + text + "\n")
    assert any(expected in problem for problem in found), found
    assert all("\n" not in problem and len(problem) < 300 for problem in found)


@pytest.mark.parametrize("key", ["schema", "channels"])
@pytest.mark.parametrize("value", ["true", "1.0", "7"])
def test_choice_of_integers_takes_nothing_that_merely_equals_one(key: str, value: str) -> None:
    text = MINIMAL.replace("schema: 1", f"schema: {value}") if key == "schema" else MINIMAL
    if key == "channels":
        text = text.replace("source: digits", f"source: digits, channels: {value}")
    assert any(f"{key}: expected 1" in problem for problem in problems(text))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("validation: 0.6, test: 0.5", "recipe.yaml:4: data.test: expected validation + test < 1"),
        (
            "channels: 3, normalize: {mean: [0.1, 0.2]}",
            "recipe.yaml:4: data.normalize.mean: expected 1 or 3 numbers, got 2",
        ),
    ],
)
def test_rule_over_several_keys_names_its_key_and_line(data: str, expected: str) -> None:
    found = problems(MINIMAL.replace("source: digits", f"source: digits, {data}"))
    assert found[0].startswith(expected)


def test_every_fault_is_reported_at_once_in_order_of_lines() -> None:
    text = """\
schema: 2
name: Not A Name
data: {source: 3}
model: {nam: x}
prune:
  channel_ratio: 1.5
  steps: x
"""
    lines = [problem.split(":")[1] for problem in problems(text, "seed=x")]
    assert lines == [" task", "1", "2", "3", "4", "4", "6", "7", " seed"]


def test_a_flood_of_faults_is_cut() -> None:
    found = problems(MINIMAL + "".join(f"key{i}: 1\n" for i in range(200)))
    assert len(found) == 51
    assert found[-1] == "... and 150 more faults"


@pytest.mark.parametrize("written", ["3e-3", "3.0e-3", "0.003", ".003", "3.E-3"])
def test_every_spelling_of_a_float_is_a_number(written: str) -> None:
    recipe = parse_recipe(MINIMAL + f"train: {{optimizer: {{lr: {written}}}}}\n")
    assert recipe.train is not None
    assert recipe.train.optimizer.lr == 0.003


def test_integer_stands_for_a_float_and_a_list_for_a_tuple() -> None:
    recipe = parse_recipe(MINIMAL, ["train.gradient_clip=1", "data.size=[8, 9]"])
    assert recipe.train is not None
    assert isinstance(recipe.train.gradient_clip, float)
    assert recipe.data.size == (8, 9)


def test_words_of_old_yaml_stay_text() -> None:
    recipe = parse_recipe(MINIMAL, ["data.classes=[no, on, yes, 2026-01-01, 1_0, 1:30]"])
    assert recipe.data.classes == ("no", "on", "yes", "2026-01-01", "1_0", "1:30")


def test_precision_is_taken_with_and_without_quotes() -> None:
    for value in ("16", "'16'"):
        recipe = parse_recipe(MINIMAL, [f"train.precision={value}"])
        assert recipe.train is not None
        assert recipe.train.precision == "16"


# --set


def test_override_makes_an_absent_section_and_the_later_one_wins() -> None:
    recipe = parse_recipe(MINIMAL, ["prune.steps=2", "prune.steps=3"])
    assert recipe.prune is not None
    assert recipe.prune.steps == 3


def test_override_null_drops_a_section() -> None:
    assert parse_recipe(MINIMAL + "prune: {steps: 2}\n", ["prune=null"]).prune is None


def test_override_names_items_of_a_list_by_index() -> None:
    text = MINIMAL.replace("digits}", "digits, augment: [{name: crop}, {name: flip}]}")
    recipe = parse_recipe(text, ["data.augment.0.padding=2", "data.augment.1={name: rotate}"])
    assert [section.name for section in recipe.data.augment] == ["crop", "rotate"]
    assert recipe.data.augment[0].padding == 2


def test_override_keeps_equal_signs_of_its_value() -> None:
    assert parse_recipe(MINIMAL, ["data.train=a=b"]).data.train == "a=b"


def test_override_mends_a_fault_of_the_file() -> None:
    assert parse_recipe(MINIMAL + "prune: {steps: x}\n", ["prune.steps=2"]).prune is not None


OVERRIDE_FAULTS = [
    ("train.epochs=x", "--set train.epochs=x: train.epochs: expected integer >= 0, got 'x'"),
    ("train.epoch=1", "--set train.epoch=1: train.epoch: unknown key; did you mean train.epochs?"),
    ("train.epochs", "--set train.epochs: expected section.key=value, for example train.epochs=5"),
    ("=3", "--set =3: expected section.key=value"),
    ("train..epochs=3", "expected section.key=value"),
    ("train.epochs=", "--set train.epochs=: train.epochs: expected a value, got nothing"),
    ("train.epochs=[", "--set train.epochs=[: train.epochs: expected valid YAML"),
    ("train.epochs=&a 3", "train.epochs: expected no anchors and aliases"),
    ("train.epochs=.nan", "--set train.epochs=.nan: train.epochs: expected a finite number"),
    ("name.x=3", "--set name.x=3: name: expected a section, got 'tiny'"),
    ("data.augment.0.padding=2", "data.augment: expected the index of an item, got 0"),
    ("train.average.decay=0.9", "--set train.average.decay=0.9: train.average.name: expected ema"),
    ("data=null", "--set data=null: data: expected section, got null"),
    ("a\nb=\x1b", "--set 'a\\nb=\\x1b': 'a\\nb': expected text, got the character '\\x1b'"),
    ("data.train=\udcff", "expected text, got the character '\\udcff'"),
]


@pytest.mark.parametrize(("override", "expected"), OVERRIDE_FAULTS)
def test_fault_of_an_override_names_the_override(override: str, expected: str) -> None:
    (found,) = problems(MINIMAL, override)
    assert expected in found
    assert found.isprintable()


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ("MAX_DEPTH", "train: " + "[" * 30 + "]" * 30 + "\n"),
        ("MAX_VALUES", "train: [" + "1," * 20_000 + "]\n"),
    ],
)
def test_limits_are_what_refuses(monkeypatch: pytest.MonkeyPatch, limit: str, text: str) -> None:
    assert "expected at most" in problems(MINIMAL + text)[0]
    monkeypatch.setattr(tree, limit, 1 << 20)
    assert "expected at most" not in problems(MINIMAL + text)[0]


def test_alias_would_be_read_if_it_were_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = MINIMAL + "train: &t {epochs: 3}\n"
    assert "anchors" in problems(text)[0]
    monkeypatch.setattr(tree, "_unsafe", lambda text: ())
    assert parse_recipe(text).train is not None


# files


def test_recipe_is_loaded_from_a_file_and_keeps_paths_as_written(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(path, ["data.train=../x"]).data.train == "../x"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "recipe.yaml: expected a recipe's keys, such as schema: 1, got an empty file"),
        (b"# nothing\n", "got an empty file"),
        (b"- 1\n", "expected a recipe's keys, such as schema: 1, got [1]"),
        (b"\x89PNG\r\n\x1a\n\0", "recipe.yaml:1: expected UTF-8 text, got the byte 0x89"),
        (b"a: 1\nb: \xff", "recipe.yaml:2: expected UTF-8 text, got the byte 0xff"),
        (b"a" * (1 << 20) + b"a", "expected a recipe of at most 1 MiB, got more"),
        (b"a: &a [x,x]\nb: &b [*a,*a]\n", "recipe.yaml:1: expected no anchors and aliases"),
    ],
    ids=["empty", "comment", "list", "binary", "latin-1", "large", "alias bomb"],
)
def test_unreadable_file_is_one_clear_fault(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert expected in problem


def test_missing_file_folder_and_pipe_are_refused_without_reading(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, expected in (
        (tmp_path / "no.yaml", "there is no such recipe file"),
        (tmp_path, "got a folder"),
        (pipe, "got something else"),
        (Path("a\0b"), "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(RecipeError, match=expected):
            load_recipe(path)


# dump


def test_dump_writes_every_default_one_key_a_line_and_loads_back_equal() -> None:
    recipe = parse_recipe(MINIMAL, ["train.optimizer.lr=3e-5", "prune.epochs=1"])
    text = dump_recipe(recipe)
    assert [line.split(":")[0] for line in text.splitlines()] == [
        *("schema", "name", "seed", "task", "target", "precision", "threads"),
        *("data", "model"),
        *("train", "distill", "surgery", "prune", "sparsify", "cluster", "quantize"),
        *("verify", "budget"),
    ]
    assert "channel_multiple: null" in text
    assert parse_recipe(text) == recipe


def test_dump_is_read_alike_by_plain_yaml() -> None:
    recipe = parse_recipe(MINIMAL, ["train.optimizer.lr=3e-5", "data.classes=[no, '1', '~', '']"])
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump(mode="json", by_alias=True)


# what ships


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["precision=fp16", "quantize.mode=ptq"], r"precision: expected none beside quantize"),
        (["target=cuda", "quantize.mode=ptq"], r"quantize: expected none for target cuda.*null"),
        (["precision=fp8"], r"precision: expected fp32, fp16, fp16-weights or bf16"),
    ],
)
def test_two_precisions_at_once_are_refused_with_the_remedy(changes, told) -> None:
    with pytest.raises(RecipeError, match=told):
        parse_recipe(MINIMAL, changes)


@pytest.mark.parametrize(
    ("changes", "target", "precision"),
    [
        ([], "cpu-x86-vnni", "fp32"),
        ([], "cuda", "fp16"),
        ([], "tensorrt", "fp32"),
        (["quantize.mode=ptq"], "web", "int8"),
        (["quantize.mode=ptq"], "cuda", "fp16"),  # what export makes for it
        (["precision=bf16"], "cuda", "bf16"),
        (["precision=fp32"], "cuda", "fp32"),
        (["precision=fp16"], "cpu-x86-vnni", "fp16"),
    ],
)
def test_what_ships_follows_from_recipe_and_target(changes, target, precision) -> None:
    assert parse_recipe(MINIMAL, changes).precision_on(TARGETS[target]) == precision


def test_training_integers_takes_an_epoch():
    message = "quantize.epochs: expected at least 1 with mode: qat, got 0"
    with pytest.raises(RecipeError, match=message):
        parse_recipe(MINIMAL, ["quantize={mode: qat, epochs: 0}"])
    assert parse_recipe(MINIMAL, ["quantize={epochs: 0}"]).quantize.epochs == 0
