"""What the benchmarks of serving rest on: their clients see every fault, and count it as one."""

import asyncio
import json
import random
from contextlib import asynccontextmanager
from dataclasses import replace

import h11
import numpy as np
import pytest
import soak
from calls import Call, binary_call, every_form, logits_of
from faults.bodies import BadBodies
from faults.by_schema import OTHER, read_report
from faults.planted import seen_faults
from faults.sockets import CORPUS, listed, scrambled, slow_cases, wire_cases
from faults.verdicts import FAULTS, Case, Documented, Tally, faults_of
from ledger import MIXED, WRONG, Question, load, version_of
from lifecycle import Stop
from overload import strange
from served_models import Served, raised_bundle, read_served
from server_run import Usage
from tiny_bundle import make_bundle
from wire import Answer, Answers, Outcome, exchange

import serving
from deploykit.artifacts import TensorSpec

ERROR = b'{"error": "no"}'
DOCUMENT = {
    "paths": {
        "/predict/tiny": {"post": {"responses": {"200": {}, "400": {}}}},
        "/v2/models/tiny/infer": {"post": {"responses": {"200": {}, "422": {}}}},
        "/v2/models/{name}": {"get": {"responses": {"200": {}, "404": {}}}},
        "/v2/models/stats": {"get": {"responses": {"200": {}}}},
    }
}


def answer(status, body=ERROR, **headers):
    return Answer(status, headers, body)


def outcome(*answers, end="open"):
    return Outcome(answers, end, 0.1)


def tiny_served(version="1.0", by=0.0):
    random_ = np.random.default_rng(0)
    return Served(
        "tiny",
        version,
        TensorSpec("image", "uint8", (-1, 4, 4, 3)),
        TensorSpec("logits", "float32", (-1, 2)),
        random_.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8),
        random_.normal(size=(3, 2)).astype(np.float32) + np.float32(by),
    )


# Answers, as they come over the wire.


def test_answers_are_told_apart_wherever_the_stream_is_cut():
    stream = (
        b"HTTP/1.1 200 -\r\ncontent-length: 2\r\n\r\nhiHTTP/1.1 404 -\r\nContent-Length: 0\r\n\r\n"
    )
    for step in (1, 7, len(stream)):
        answers = Answers()
        for at in range(0, len(stream), step):
            answers.feed(stream[at : at + step])
        answers.feed(b"")
        assert [(one.status, one.body) for one in answers.found] == [(200, b"hi"), (404, b"")]


def test_half_an_answer_is_none():
    answers = Answers()
    answers.feed(b"HTTP/1.1 200 -\r\ncontent-length: 5\r\n\r\nabc")
    with pytest.raises(h11.RemoteProtocolError):
        answers.feed(b"")


@asynccontextmanager
async def answering(*replies):
    """Answer the first requests of each connection so; None closes it."""

    async def meet(reader, writer):
        for reply in replies:
            await reader.read(65536)
            if reply is None:
                break
            writer.write(reply)
        writer.close()

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()


OK = b"HTTP/1.1 200 -\r\ncontent-length: 2\r\n\r\nhi"


@pytest.mark.parametrize(
    ("replies", "end", "statuses"),
    [
        ([OK], "open", [200]),
        ([None], "closed", []),
        ([b"SSH-2.0\r\n\r\n"], "garbled", []),
        ([OK[:-1]], "garbled", []),
    ],
)
def test_exchange_tells_how_a_connection_ended(replies, end, statuses):
    async def ask():
        async with answering(*replies) as address:
            return await exchange(address, [b"GET / HTTP/1.1\r\n\r\n"])

    found = asyncio.run(ask())
    assert (found.end, [one.status for one in found.answers]) == (end, statuses)


# What may come of a bad request.


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [
        ("POST", "/predict/tiny", {200, 400}),
        ("GET", "/predict/tiny", {400, 405}),
        ("OPTIONS", "/predict/tiny", {204, 400, 405}),
        ("HEAD", "/v2/models/any", {200, 404}),
        ("GET", "/v2/models/stats", {200}),
        ("GET", "/nowhere", {400, 404}),
        ("POST", "/v2/models/a/b", {400, 404}),
    ],
)
def test_documented_statuses_are_those_of_the_nearest_path(method, path, statuses):
    assert Documented(DOCUMENT).of(method, path) == statuses


WHOLE = Case("x", (b"",), frozenset({200, 400, 504}))
BROKEN = Case("x", (b"",), frozenset({400}), whole=False)
GOOD = Case("good", (b"",), frozenset({200}), good=b"right")


@pytest.mark.parametrize(
    ("case", "found", "faults"),
    [
        (WHOLE, outcome(answer(400)), []),
        (WHOLE, outcome(answer(504)), []),
        (WHOLE, outcome(answer(503)), ["5xx"]),
        (WHOLE, outcome(answer(500)), ["5xx"]),
        (WHOLE, outcome(answer(418)), ["undocumented"]),
        (WHOLE, outcome(answer(400, b"no")), ["formless"]),
        (WHOLE, outcome(answer(400, b'{"error": ""}')), ["formless"]),
        (WHOLE, outcome(end="hung"), ["hung"]),
        (WHOLE, outcome(end="closed"), ["unanswered"]),
        (WHOLE, outcome(end="reset"), ["unanswered"]),
        (WHOLE, outcome(answer(400), answer(400)), ["split"]),
        (BROKEN, outcome(answer(400), answer(400)), []),
        (replace(BROKEN, linger_s=0.3), outcome(answer(400), answer(400)), ["split"]),
        (BROKEN, outcome(end="closed"), []),
        (BROKEN, outcome(end="garbled"), ["unanswered"]),
        (BROKEN, outcome(end="hung"), ["hung"]),
        (GOOD, outcome(answer(200, b"right")), []),
        (GOOD, outcome(answer(200, b"wrong")), ["other answer"]),
    ],
)
def test_faults_of_an_outcome(case, found, faults):
    assert faults_of(case, found) == faults


def test_every_planted_fault_is_counted_as_what_it_is():
    assert asyncio.run(seen_faults()) == list(FAULTS)


def test_tally_counts_refusals_of_bad_requests_alone():
    tally = Tally()
    for case, found in (
        (WHOLE, outcome(answer(400))),
        (WHOLE, outcome(answer(200))),
        (BROKEN, outcome(end="closed")),
        (GOOD, outcome(answer(404))),
    ):
        tally.add(case, found)
    assert (tally.sent, tally.refused) == (3, 2)
    assert tally.faults == {"undocumented": 1, "other answer": 1}


# The bad requests themselves.


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.txt")), ids=lambda path: path.stem)
def test_corpus_holds_no_entry_twice(path):
    entries = listed(path.stem)
    assert len(entries) == len(set(entries)) > 5


def test_corpus_writes_bytes_as_python_does_and_repeats():
    assert b"[" * 100_000 in listed("json")
    assert b"" in listed("json")
    assert b"\xff\xfe" in listed("json")


def test_bad_bodies_are_whole_requests_of_paths_that_are_described():
    bodies = BadBodies(Documented(DOCUMENT), 4)
    drawn = random.Random(0)
    cases = [*bodies.listed(tiny_served()), *bodies.scrambled(tiny_served(), 50, drawn)]
    assert len(cases) > 1500
    for case in cases:
        head, _, body = case.pieces[0].partition(b"\r\n\r\n")
        assert b"content-length: %d\r\n" % len(body) in head + b"\r\n"
        assert case.whole
    assert {200, 400} in {case.documented for case in cases}


def test_broken_requests_are_owed_no_answer_unless_they_are_pipelines():
    calls = list(every_form(tiny_served()).values())
    for case in (*wire_cases(calls, 20, 0), *slow_cases(calls)):
        assert not case.whole or case.kind == "pipeline"


def test_scrambled_bytes_are_the_same_for_a_seed():
    assert scrambled(b"a" * 99, random.Random(1)) == scrambled(b"a" * 99, random.Random(1))


def test_report_of_schemathesis_is_counted():
    rates = {"POST /a": {"coverage": {"rejected": 3}, "fuzzing": {"rejected": 4}}}
    failures = [
        {"code": "ST103", "count": 2, "title": "Undocumented", "operations": ["POST /a"]},
        {"code": "ST110", "count": 1, "title": "Other", "operations": ["POST /a"]},
    ]
    report = {
        "complete": True,
        "test_cases": {"generated": 20, "errored": 1},
        "valid_rates": rates,
        "failures": failures,
        "errors": [{"title": "Read timed out"}],
    }
    found = read_report(report)
    assert (found.sent, found.refused) == (20, 7)
    assert found.faults == {"hung": 1, "undocumented": 2, OTHER: 1}
    with pytest.raises(RuntimeError, match="stopped"):
        read_report({**report, "complete": False, "stop_reason": "interrupted"})


# Versions, and requests that are lost.


def told_by(version, served, at=0):
    head = json.dumps({"model_version": version}).encode()
    length = {"inference-header-content-length": str(len(head))}
    return Answer(200, length, head + served.logits[at].tobytes())


def test_answers_are_of_the_version_whose_bits_they_have():
    old, new = tiny_served(), tiny_served("2.0", by=1.0)
    judge = [old, new]
    assert version_of(told_by("1.0", old), judge, 0) == "1.0"
    assert version_of(told_by("2.0", new), judge, 0) == "2.0"
    assert version_of(told_by("2.0", old), judge, 0) == MIXED
    assert version_of(told_by("1.0", old, at=1), judge, 0) == WRONG
    assert version_of(answer(503), judge, 0) == "status 503"


def test_raised_bundle_is_another_version_with_other_answers(tmp_path):
    bundle = make_bundle(tmp_path / "source")
    raised = read_served(raised_bundle(bundle, tmp_path / "raised", "2.0", 4.0))
    source = read_served(bundle)
    assert (raised.name, raised.version) == (source.name, "2.0")
    np.testing.assert_allclose(raised.logits, source.logits + 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("replies", "lost", "unread"), [([OK, None], True, False), ([None], False, True)]
)
def test_ledger_tells_a_lost_request_from_one_that_was_never_read(replies, lost, unread):
    async def ask():
        async with answering(*replies) as address:
            question = Question(b"GET / HTTP/1.1\r\n\r\n", lambda one: str(one.status))
            async with load(address, [question], 1) as ledger:
                await asyncio.sleep(0.05)
        return ledger

    ledger = asyncio.run(ask())
    assert bool(ledger.lost) is lost
    assert bool(ledger.unread) is unread
    assert ledger.sent == ledger.answered + ledger.lost + ledger.unread


def test_readiness_must_say_503_before_nobody_is_there():
    def stop(*readiness):
        return Stop(None, None, readiness, 1.0, 0).unready_first

    assert stop(200, 503, 503, None)
    assert not stop(200, None)
    assert not stop(200, None, 503)


def test_calls_are_what_the_protocol_says():
    served = tiny_served()
    call = binary_call(served, served.samples[:2], id="7")
    head, raw = logits_of(call.body, call.headers["inference-header-content-length"])
    assert raw == served.samples[:2].tobytes()
    assert head["id"] == "7"
    assert head["inputs"][0]["shape"] == [2, 4, 4, 3]
    assert Call("/a?b=c").path == "/a"
    assert Call("/a", b"xy").wire(content_length=None).endswith(b"localhost\r\n\r\nxy")


# Growth and figures.


def usages(memory, descriptors=10, threads=3):
    return [Usage(int(one), descriptors, threads) for one in memory]


def test_a_leak_is_growth_and_a_spike_or_a_warm_up_is_none():
    mib, rounds = 2**20, np.arange(40)
    flat = 100 * mib + np.random.default_rng(0).integers(-mib, mib, 40)
    warm = np.minimum(rounds, 8) * 20 * mib + 100 * mib
    spike = np.where(rounds == 30, 500 * mib, 100 * mib)
    for memory in (flat, warm, spike):
        assert soak.growth_of(usages(memory)).too_large == []
    assert soak.growth_of(usages(100 * mib + rounds * mib)).too_large == ["memory"]


@pytest.mark.parametrize("what", ["descriptors", "threads"])
def test_one_descriptor_or_thread_a_round_is_a_leak(what):
    counts = {"memory_bytes": 1, "descriptors": 5, "threads": 5}
    found = [Usage(**{**counts, what: 5 + number}) for number in range(20)]
    assert soak.growth_of(found).too_large == [what]


def test_ours_is_held_against_the_best_of_the_others():
    one = {
        **{serving.BARE: 1000.0, serving.BARE_MS: 1.0, serving.ALONE: 2.0, serving.TRACED: 400.0},
        **{serving.BINARY: 600.0, serving.RAW: 540.0, serving.JSON: 300.0, serving.LOGGED: 570.0},
        **{serving.BATCHED: 300.0, serving.UNBATCHED: 200.0, "slow": 100.0, "fast": 220.0},
    }
    figures = serving.figures_of([one] * 3, {"slow": None, "fast": None})
    held = {figure.name: figure.holds for figure in figures if figure.promise}
    assert held == {
        "/v2 binary / bare": True,
        "/predict raw / bare": False,
        "/v2 binary / best other (fast)": True,
        "/predict raw / best other (fast)": False,
        "/v2 JSON / best other (fast)": True,
        "p50 over the session's": True,
        "batching gains": True,
    }


def test_overload_explains_four_statuses():
    assert strange({200: 5, 429: 5, 503: 1, 504: 1}) == 0
    assert strange({200: 5, 400: 2, 500: 1}) == 3
