"""The judge's client and protocols against a stub endpoint that is perfect, lazy or broken."""

import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from sparse_coding.descriptions import detect
from sparse_coding.errors import UserError
from sparse_coding.judge import (
    MAX_FAILED_IN_A_ROW,
    Endpoint,
    Judge,
    Shown,
    classify,
    correlation,
    explain,
    find_intruder,
    last_list,
    n_questions,
    simulate,
    with_marks_of,
)

KEY = "sk-not-a-real-key"


@dataclass
class Stub:
    """An endpoint that knows the truth: the unit is active on " cat", everything else is silence.

    `mode`: perfect, never (says 0 of everything), chatty (no list in its last line), or what is
    wrong with it: status 500 or 401, invalid (no JSON), empty (JSON of another form), slow.
    """

    mode: str = "perfect"
    flaky: int = 0
    """So many first requests are answered with 503."""
    questions: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, question: str) -> str:
        texts = [json.loads(t) for t in re.findall(r"^Text \d+: (.*)$", question, re.M)]
        if self.mode == "chatty":
            return "[1, 1, 1, 1, 1]\nThese are my numbers, I hope that they please you."
        if "EXPLANATION:" in question:
            return "They are cats.\nEXPLANATION: the word ' cat'"
        tokens = re.search(r"^\[.*\]$", question, re.M)
        if "from \n0 (silent)" in question or "how active the unit is, from" in question:
            return json.dumps([10 * (t == " cat") for t in json.loads(tokens[0])])
        marked = [re.findall("<<(.*?)>>", text) for text in texts]
        if "does not belong" in question:
            wrong = [i for i, words in enumerate(marked, 1) if set(words) != {" cat"}]
            return json.dumps(wrong[:1] if self.mode == "perfect" else [1])
        if self.mode == "never":
            return json.dumps([0] * len(texts))
        if any(marked):
            return json.dumps([int(set(words) == {" cat"}) for words in marked])
        return "Let me see.\n" + json.dumps([int(" cat" in text) for text in texts])


class Handler(BaseHTTPRequestHandler):
    stub: Stub

    def log_message(self, *_):
        pass

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        stub = self.stub
        stub.questions.append(body["messages"][0]["content"])
        stub.headers.append({key.lower(): value for key, value in self.headers.items()})
        assert self.path == "/v1/chat/completions"
        if len(stub.questions) <= stub.flaky:
            self.send(503, b"")
        elif stub.mode.isdigit():
            self.send(int(stub.mode), b"{}")
        elif stub.mode == "slow":
            time.sleep(0.5)
            self.send(200, b"{}")
        else:
            content = stub.answer(stub.questions[-1])
            good = json.dumps({"choices": [{"message": {"content": content}}]})
            self.send(200, {"invalid": "<html>", "empty": "{}"}.get(stub.mode, good).encode())

    def send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(stub):
    handler = type("Handler", (Handler,), {"stub": stub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # of a client that has gone
    stub.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def stub():
    with serving(Stub()) as stub:
        yield stub


def judge_of(stub, tmp_path, **settings):
    patience = {"pause": 0.001, "timeout": 5.0, "key": KEY} | settings
    return Judge(Endpoint(stub.url, "stub", **patience), tmp_path / "out" / "judge.jsonl")


def shown(n, fires, seed=0):
    """Contexts of 9 words, with " cat" in the middle where the unit fires."""
    generator = np.random.default_rng(seed)
    words = [" dog", " sees", " the", " a", " red", " old", " near"]
    found = []
    for _ in range(n):
        pieces = [words[i] for i in generator.integers(len(words), size=9)]
        activations = np.zeros(9)
        if fires:
            pieces[4], activations[4] = " cat", generator.choice([2.0, 2.0])
        found.append(Shown(pieces, activations, 4))
    return found


def rng(seed=0):
    return np.random.default_rng(seed)


def score(judge, protocol, description="the word ' cat'"):
    right, wrong = shown(12, True), shown(13, False, 1)
    texts = [one.text for one in right + wrong]
    if protocol == "fuzzing":
        texts = [one.marked for one in right]
        texts += [with_marks_of(one, right[0]).marked for one in wrong]
    answers = classify(judge, protocol, description, texts, rng())
    known = np.array([answer is not None for answer in answers])
    values = np.array([answer or 0 for answer in answers], dtype=float)[known]
    firing = (np.arange(25) < 12)[known]
    if not known.any():
        return None, answers
    ones = torch.ones(1, int(known.sum()), dtype=torch.float64)
    return detect(values, firing, ones).balanced_accuracy.item(), answers


# --- protocols ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["detection", "fuzzing"])
def test_a_perfect_judge_scores_one_and_a_lazy_one_a_half(stub, tmp_path, protocol):
    assert score(judge_of(stub, tmp_path / "a"), protocol) == (1.0, [1] * 12 + [0] * 13)
    stub.mode = "never"
    assert score(judge_of(stub, tmp_path / "b"), protocol) == (0.5, [0] * 25)
    assert all("the word ' cat'" in question for question in stub.questions)


def test_texts_are_shown_shuffled_by_the_seed_and_no_more_than_five_at_a_time(stub, tmp_path):
    score(judge_of(stub, tmp_path), "detection")
    shown_texts = [re.findall(r"^Text \d: (.*)$", q, re.M) for q in stub.questions]
    assert [len(texts) for texts in shown_texts] == [5] * 5
    is_firing = [[" cat" in text for text in texts] for texts in shown_texts]
    assert is_firing != sorted(is_firing, reverse=True)
    again = Stub()
    with serving(again):
        score(judge_of(again, tmp_path / "again"), "detection")
    assert again.questions == stub.questions


def test_an_explanation_is_the_marked_last_line_and_sees_marks_and_levels(stub, tmp_path):
    judge = judge_of(stub, tmp_path)
    assert explain(judge, shown(3, True)) == "the word ' cat'"
    assert "<< cat>>" in stub.questions[0]
    assert "' cat' 10" in stub.questions[0]
    stub.mode = "chatty"
    assert explain(judge, shown(4, True, 5)) is None


def test_intruders_are_found_by_the_perfect_judge_wherever_they_stand(stub, tmp_path):
    judge = judge_of(stub, tmp_path)
    for answer in range(5):
        four = shown(4, True, answer)
        odd = with_marks_of(shown(1, False, answer)[0], four[0])
        texts = [one.marked for one in four]
        texts.insert(answer, odd.marked)
        assert find_intruder(judge, texts) == answer
    stub.mode = "never"  # says the first
    assert find_intruder(judge, texts + []) == 4  # known already
    assert find_intruder(judge, texts[::-1]) == 0
    stub.mode = "chatty"
    assert find_intruder(judge, texts[1:] + texts[:1]) is None


def test_simulations_of_the_perfect_judge_correlate_fully(stub, tmp_path):
    judge = judge_of(stub, tmp_path)
    contexts = shown(4, True) + shown(4, False, 3)
    answers = [simulate(judge, "cats", one.pieces) for one in contexts]
    true = [one.activations for one in contexts]
    weights = torch.ones(1, 8, dtype=torch.float64)
    assert correlation(answers, true, weights).item() == pytest.approx(1)
    stub.mode = "chatty"
    assert simulate(judge, "dogs", contexts[0].pieces) is None


def test_correlation_equals_numpy_on_every_draw():
    generator = rng(1)
    lengths = (3, 7, 5, 6)
    simulated = [generator.integers(0, 11, size=n).tolist() for n in lengths]
    true = [generator.random(n) for n in lengths]
    weights = np.array([[1.0, 1, 1, 1], [2, 0, 1, 1], [0, 0, 3, 1]])
    found = correlation(simulated, true, torch.from_numpy(weights))
    for draw, weight in zip(found, weights.astype(int), strict=True):
        s = np.concatenate([simulated[i] for i in np.repeat(np.arange(4), weight)])
        t = np.concatenate([true[i] for i in np.repeat(np.arange(4), weight)])
        assert draw.item() == pytest.approx(np.corrcoef(s, t)[0, 1])
    still = correlation([[0, 0]], [np.array([0.0, 1.0])], torch.ones(1, 1).double())
    assert still.isnan().all()


def test_wrong_marks_are_as_many_and_stand_as_the_right_ones():
    firing = Shown([" a", " b", " c", " d"], np.array([1.0, 0, 2.0, 3.0]), 2)
    silent = Shown([" x", " y", " z"], np.zeros(3), 1)
    assert firing.marked == "<< a>> b<< c d>>"
    assert with_marks_of(silent, firing).marked == " x<< y z>>"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 0, 1]", [1, 0, 1]),
        ("I think so.\n\n[1,0,1]\n", [1, 0, 1]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[1, 0, true]", None),
        ("[1, 0, 1.0]", None),
        ("The answer is [1, 0, 1]", None),
        ("[1, 0, 1]\nThat is all.", None),
        ("{\"a\": 1}", None),
        ("", None),
        (None, None),
        ("[" * 100_000, None),
    ],
)  # fmt: skip
def test_only_a_list_of_the_right_form_in_the_last_line_is_an_answer(answer, expected):
    assert last_list(answer, 3, range(2)) == expected


# --- the client --------------------------------------------------------------------------------


def test_nothing_is_asked_twice_not_even_by_the_next_judge(stub, tmp_path):
    first = judge_of(stub, tmp_path)
    scores = score(first, "detection")
    assert (first.n_asked, first.n_known, len(stub.questions)) == (5, 0, 5)
    second = judge_of(stub, tmp_path)
    assert score(second, "detection") == scores
    assert (second.n_asked, second.n_known, len(stub.questions)) == (0, 5, 5)
    lines = [json.loads(line) for line in first.log.read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == stub.questions
    assert all(line["model"] == "stub" and line["answer"] for line in lines)
    assert KEY not in first.log.read_text()
    assert {headers["authorization"] for headers in stub.headers} == {f"Bearer {KEY}"}


def test_another_model_is_asked_anew(stub, tmp_path):
    judge_of(stub, tmp_path).ask("?")
    other = Judge(Endpoint(stub.url, "other"), tmp_path / "out" / "judge.jsonl")
    other.ask("?")
    assert len(stub.questions) == 2


def test_an_interrupted_line_of_the_log_is_asked_again(stub, tmp_path):
    judge = judge_of(stub, tmp_path)
    judge.ask("one"), judge.ask("two")
    judge.log.write_bytes(judge.log.read_bytes()[:-20])
    after = judge_of(stub, tmp_path)
    after.ask("one"), after.ask("two")
    judge_of(stub, tmp_path).ask("two")
    assert len(stub.questions) == 3
    assert len(judge.log.read_text().splitlines()) == 2
    judge.log.write_text("no JSON\n")
    with pytest.raises(UserError, match="move it away"):
        judge_of(stub, tmp_path)


def test_a_passing_fault_is_waited_for(stub, tmp_path):
    stub.flaky = 2
    judge = judge_of(stub, tmp_path)
    assert score(judge, "detection")[0] == 1.0
    assert len(stub.questions) == 7
    assert judge.n_failed == 0


@pytest.mark.parametrize("mode", ["500", "invalid", "empty", "slow"])
def test_a_broken_endpoint_gives_no_scores_and_is_soon_left_alone(stub, tmp_path, mode):
    stub.mode = mode
    judge = judge_of(stub, tmp_path, timeout=0.1, n_attempts=2)
    assert score(judge, "detection") == (None, [None] * 25)
    assert judge.is_down
    assert (judge.n_asked, judge.n_failed) == (0, 5)
    assert len(stub.questions) == 2 * MAX_FAILED_IN_A_ROW
    assert not judge.log.exists()


def test_unreadable_answers_are_counted_and_not_guessed(stub, tmp_path):
    stub.mode = "chatty"
    judge = judge_of(stub, tmp_path)
    assert score(judge, "detection") == (None, [None] * 25)
    assert (judge.n_asked, judge.n_failed, judge.is_down) == (5, 0, False)


def test_a_refused_key_is_one_clear_line(stub, tmp_path):
    stub.mode = "401"
    with pytest.raises(UserError, match="status 401.*OPENAI_API_KEY") as error:
        judge_of(stub, tmp_path).ask("?")
    assert KEY not in str(error.value)
    with pytest.raises(UserError, match="does not begin with http"):
        Judge(Endpoint("file:///etc/passwd", "stub"), tmp_path / "log")


def test_no_endpoint_at_all_is_a_failure_too(tmp_path):
    judge = Judge(Endpoint("http://127.0.0.1:9/v1", "stub", pause=0.001), tmp_path / "log")
    assert judge.ask("?") is None
    assert judge.n_failed == 1


def test_the_plan_counts_every_question():
    # 3 units: an explanation, 4 + 4 batches and 20 simulations of 2 descriptions, 10 trials
    every = ("detection", "fuzzing", "simulation", "intruder")
    assert n_questions(3, 20, 10, every, 2) == 3 * (1 + 2 * (4 + 4 + 20) + 10)
    assert n_questions(3, 21, 10, ("detection",), 1) == 3 * (1 + 5)
