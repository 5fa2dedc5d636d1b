import copy
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from deploykit.artifacts import Report
from deploykit.report import wording, write_report
from deploykit.report.charts import Point, nice_ticks, pareto_stairs
from tests.sample_report import make_details, sample_report

CONTRACT = {
    "schema", "name", "seed", "target", "threads", "environment", "stages", "baseline", "final",
    "drop", "budget", "decisions", "details",
}  # fmt: skip
SECTIONS = {
    "headline", "tradeoff", "stages", "decisions", "curves", "trained", "widths", "fusion",
    "classes", "confusion", "provenance", "trials", "layers",
}  # fmt: skip
VOID = {"meta", "br", "img", "input", "link", "hr"}


@pytest.fixture
def report():
    return sample_report()


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.attributes, self.texts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def render(tmp_path):
    def render(report):
        write_report(report, tmp_path)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return render


def with_details(report, **changes):
    return replace(report, details={**report.details, **changes})


def find_references(page):
    """Name everything by which a page would load or run something."""
    found = [tag for tag in page.tags if tag in {"script", "link", "iframe", "img", "object"}]
    for tag, name, value in page.attributes:
        if name in {"src", "href", "srcset", "data", "action", "xlink:href"} or name[:2] == "on":
            found.append(f"{tag} {name}")
        if name == "style" and ("url(" in value or "//" in value):
            found.append(f"{tag} {value}")
    style = "".join(page.texts[: page.texts.index("deploykit report")])
    found += [word for word in ("url(", "@import", "http", "//") if word in style]
    return found


def test_json_keeps_the_contract(report, tmp_path):
    write_report(report, tmp_path)
    value = json.loads((tmp_path / "report.json").read_text())
    assert set(value) == CONTRACT
    assert value == report.to_json()
    assert value["stages"][0]["latency_ms"] == {"1": 0.98, "32": 29.0}


def test_page_is_well_formed_and_has_every_section(report, render):
    page = render(report)
    assert set(page.ids) == SECTIONS
    assert len(page.ids) == len(SECTIONS)


def test_page_loads_nothing_and_runs_nothing(report, render):
    assert find_references(render(report)) == []


@pytest.mark.parametrize(
    "planted",
    [
        "<script>1</script>",
        "<img src=x>",
        '<p onclick="x()">',
        '<link href="y">',
        '<i style="background:url(x)">',
    ],
)
def test_the_search_for_references_finds_what_is_planted(report, render, tmp_path, planted):
    render(report)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page.__new__(Page)
    HTMLParser.__init__(page)
    page.open, page.ids, page.tags, page.attributes, page.texts = [], [], [], [], []
    page.handle_endtag = lambda tag: None
    page.feed(text.replace("<main>", f"<main>{planted}"))
    assert find_references(page)


HOSTILE = "<script>alert('&\"')</script>"


def poison(value):
    """Put hostile text wherever the report holds text, keys of the contract aside."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, (list, tuple)):
        return [poison(inner) for inner in value]
    if isinstance(value, dict):
        return {key: poison(inner) for key, inner in value.items()}
    return value


def test_text_from_outside_is_escaped_wherever_it_stands(report, render):
    fields = {name: poison(value) for name, value in vars(report).items()}
    fields["details"]["curves"] = {HOSTILE: fields["details"]["curves"]["train"]}
    fields["details"]["trained"] = {HOSTILE: fields["details"]["trained"]["train"]}
    fields["details"]["fusion"]["operators"] = {HOSTILE: 3}
    fields["environment"]["versions"] = {HOSTILE: HOSTILE}
    page = render(Report(**fields))
    assert find_references(page) == []
    assert page.text.count("alert(") > 40
    assert set(page.ids) == SECTIONS


def test_headline_tells_the_result(report, render):
    text = render(report).text
    for told in (
        "cifar10-resnet20 budget held",
        "cpu-x86-vnni, 1 thread",
        "87.52%",
        "88.10% before",
        f"change {wording.MINUS}0.58 points",
        f"95% interval {wording.MINUS}0.95 to {wording.MINUS}0.21",
        "1.61\N{MULTIPLICATION SIGN}",
        "95% interval 1.58 to 1.63",
        "1.70\N{MULTIPLICATION SIGN}",
        "3.92\N{MULTIPLICATION SIGN}",
        "1.08 MB \N{RIGHTWARDS ARROW} 276 kB",
        "0.50 points lost in validation",
        f"validation: change {wording.MINUS}0.50 points",
    ):
        assert told in text, told


def test_a_missed_budget_and_none_are_told_apart(report, render):
    missed = replace(report, budget={**report.budget, "passed": False})
    assert "budget missed" in render(missed).text
    assert "no budget set" in render(replace(report, budget={"passed": True})).text


def test_an_undecided_speedup_says_so(report, render):
    details = copy.deepcopy(report.details)
    details["latency"]["quantize"]["1"]["verdict"] = "undecided"
    assert "inside the margin: undecided" in render(replace(report, details=details)).text


def test_float_islands_and_layers_left_alone_are_named_with_reasons(report, render):
    text = render(report).text
    assert "head.gate stayed in float: HardSwish behind it" in text
    assert "18 of 19 convolutions" in text
    assert "layer2.0 its shortcut is padded" in text


def test_a_refused_stage_is_drawn_as_refused(report, render):
    refusal = {"stage": "prune", "kept": False, "why": "slower"}
    page = render(replace(report, decisions=(refusal,)))
    assert ("circle", "class", "dot refused") in page.attributes
    assert "prune refused" in page.text


@pytest.mark.parametrize("key", sorted(make_details()))
def test_a_missing_detail_is_left_out(report, render, key):
    details = {name: value for name, value in report.details.items() if name != key}
    assert render(replace(report, details=details)).ids[0] == "headline"


def test_a_report_without_details_still_has_its_core(report, render):
    page = render(replace(report, details={}))
    assert set(page.ids) == {"headline", "tradeoff", "stages", "decisions", "provenance"}


def test_latency_that_was_never_measured_is_a_dash(report, render):
    def blind(value):
        return {**value, "latency_ms": None}

    unmeasured = replace(
        with_details(report, latency={}),
        stages=tuple(blind(value) for value in report.stages),
        baseline=blind(report.baseline),
        final=blind(report.final),
    )
    page = render(unmeasured)
    assert "tradeoff" not in page.ids
    assert f"speed-up, batch 1 {wording.DASH}" in page.text


def test_a_run_without_stages_shows_baseline_and_final(report, render):
    page = render(replace(report, stages=()))
    assert "train baseline" in page.text
    assert "quantize final" in page.text


def test_epochs_may_name_what_they_trained_themselves(report, render):
    records = [
        {**record, "trained": ["fc.weight"] if record["epoch"] < 4 else ["fc.weight", "conv.bias"]}
        for record in report.details["curves"]["train"]
    ]
    text = render(with_details(report, curves={"train": records}, trained={})).text
    assert "0 to 3: fc.weight" in text
    assert "4 to 9: fc.weight, conv.bias" in text


def test_pruning_to_a_bound_tells_bound_blocks_and_harm(report, render):
    pruning = {
        "removed": ["layer3.1", "layer3.2"],
        "bounds": [
            {"unit": "ms at batch 1", "before": 0.9, "bound": 0.6, "predicted": 0.59,
             "measured": 0.58}
        ],
        "sensitivity": {
            "blocks": [{"block": "layer3.1", "divergence": 0.25}],
            "groups": [{"layers": "a, b, c", "width": 32, "divergence": {"16": 0.5}}],
        },
    }  # fmt: skip
    text = render(with_details(report, pruning=pruning)).text
    assert "at most 0.6 ms at batch 1, from 0.9; predicted 0.59, measured 0.58" in text
    assert "Blocks left out: layer3.1, layer3.2." in text
    assert "without layer3.1 0.250 a and 2 more: 32 to 16 0.500" in text


def test_normalization_is_told_where_it_was_measured(report, render):
    told = "share of the latency, batch 1 share 7.12% 95% interval 6.80% to 7.44%"
    assert told in render(report).text
    assert "normalization" not in render(with_details(report, normalization=None)).text


def test_many_classes_are_folded(report, render):
    many = 100
    page = render(
        with_details(
            report,
            labels=[f"class {i}" for i in range(many)],
            per_class=[
                {"label": f"class {i}", "baseline": 0.5, "final": 0.5 + i / 1000}
                for i in range(many)
            ],
            confusion={
                "final": [[int(j == (i + 1) % many) for j in range(many)] for i in range(many)]
            },
        )
    )
    assert "The 20 of 100 classes that changed most" in page.text
    assert page.tags.count("td") < 400


def test_a_class_without_samples_is_a_dash(report, render):
    rows = [{"label": "none", "baseline": None, "final": 0.5}]
    assert (
        f"none {wording.DASH} 50.0% {wording.DASH}"
        in render(with_details(report, per_class=rows)).text
    )


def test_no_number_stays_undefined(report, render):
    text = render(report).text
    assert "None" not in text
    assert "nan" not in text.replace("provenance", "")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.879, 0.884), (0, 0.00021), (3, 1800), (-2.5, 2.5)]
)
def test_ticks_are_few_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert low - 1e-9 <= ticks[0] < ticks[-1] <= high + 1e-9


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (wording.percent, 0.97314, "97.31%"),
        (wording.points, -0.004, f"{wording.MINUS}0.40"),
        (wording.points, 0.00001, "0.00"),
        (wording.milliseconds, 0.1519, "0.152 ms"),
        (wording.milliseconds, 14.83, "14.8 ms"),
        (wording.size, 276_123, "276 kB"),
        (wording.size, 999_700, "1.00 MB"),
        (wording.size, 12, "12 B"),
        (wording.count, 41_234_567, "41.2 M"),
        (wording.seconds, 200, "3 min 20 s"),
        (wording.seconds, 3700, "1 h 1 min"),
        (wording.seconds, 0.5, "0.500 s"),
    ],
)
def test_numbers_are_written_for_people(write, value, text):
    assert write(value).replace(wording.SPACE, " ") == text
    assert write(None) == wording.DASH


def test_front_is_the_line_under_which_every_model_lies():
    dots = [Point("", x, y, "kept") for x, y in [(3, 0.9), (1, 0.7), (2, 0.6), (2, 0.8), (4, 0.9)]]
    assert pareto_stairs(dots) == [(1, 0.7), (2, 0.7), (2, 0.8), (3, 0.8), (3, 0.9)]


def test_one_trial_is_no_search(report, render):
    one = with_details(report, trials=report.details["trials"][:1])
    assert "trials" not in render(one).ids
    assert "other trials" not in render(one).text
