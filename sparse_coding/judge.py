"""A language model as judge of units, behind an OpenAI-compatible endpoint, and what it is asked.

Protocols: `explain`, `simulate` (Bills et al. 2023, "Language models can explain neurons in
language models", all tokens in one answer), `classify` for detection and fuzzing (Paulo et al.
2024, arXiv 2410.13928) and `find_intruder` (Paulo, Belrose 2025, arXiv 2507.08473). Prompts are
this project's own. An answer counts only if its last line is exactly what was asked for; what
cannot be read is None, never a guess. Nothing is sent anywhere but to the URL that was given.
"""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.storage import fingerprint

N_SHOWN = 5  # texts of one question
MAX_FAILED_IN_A_ROW = 3  # an endpoint that fails so often is not asked again
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # states of a server that may pass
SIMULATED = range(11)
OPEN, CLOSE = "<<", ">>"


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is and how patiently it is asked."""

    url: str
    """Up to the version, e.g. http://localhost:8000/v1."""
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    """Seconds."""
    n_attempts: int = 4
    pause: float = 2.0
    """Seconds before the second attempt, doubled before each further one."""


class _NotElsewhere(urllib.request.HTTPRedirectHandler):
    """The key and the questions go to the address that was given, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Judge:
    """Asks; keeps every question and answer in `log` and asks nothing twice."""

    def __init__(self, endpoint: Endpoint, log: Path) -> None:
        parts = urllib.parse.urlsplit(endpoint.url)
        if parts.scheme not in ("http", "https"):
            raise UserError("--judge-url: the judge's address does not begin with http")
        if "@" in parts.netloc or parts.query:
            raise UserError(
                "--judge-url: the judge's address holds a login, which results would show; give "
                "the key in OPENAI_API_KEY"
            )
        self.endpoint, self.log = endpoint, log
        self._opener = urllib.request.build_opener(_NotElsewhere)
        self.answers = _read_log(log)
        self.n_asked = self.n_known = self.n_failed = self._n_failed_in_a_row = 0

    @property
    def is_down(self) -> bool:
        return self._n_failed_in_a_row >= MAX_FAILED_IN_A_ROW

    def ask(self, question: str) -> str | None:
        """The answer's text; None after `n_attempts` failures, or if the endpoint is down."""
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
        }
        key = fingerprint(body)
        if key in self.answers:
            self.n_known += 1
            return self.answers[key]
        answer = None if self.is_down else self._attempts(body)
        if answer is None:
            self.n_failed += 1
            self._n_failed_in_a_row += 1
            return None
        self.n_asked += 1
        self._n_failed_in_a_row = 0
        self.answers[key] = answer
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as file:
            line = {"key": key, **body, "answer": answer}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return answer

    def _attempts(self, body: dict[str, Any]) -> str | None:
        pause = self.endpoint.pause
        for attempt in range(self.endpoint.n_attempts):
            if attempt:
                time.sleep(pause)
                pause *= 2
            answer = self._attempt(body)
            if answer is not None:
                return answer
        return None

    def _attempt(self, body: dict[str, Any]) -> str | None:
        url = self.endpoint.url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout) as response:
                return _content(response.read())
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in PASSING:
                return None
            raise UserError(
                f"{url} refuses the judge's question with status {error.code}: check --judge-url, "
                "--judge-model and the key in OPENAI_API_KEY"
            ) from None
        except (OSError, http.client.HTTPException):  # no connection, no answer in time, cut off
            return None


def _content(answer: bytes) -> str | None:
    """The message's text, None if the endpoint did not send what it should."""
    try:
        found = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _read_log(log: Path) -> dict[str, str]:
    """Answers by key; a last line that an interruption cut off is taken away."""
    if not log.is_file():
        return {}
    content = log.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        log.write_bytes(whole)
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        answers = {line["key"]: line["answer"] for line in lines}
        if not all(isinstance(text, str) for pair in answers.items() for text in pair):
            raise TypeError("an answer is no text")
        return answers
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{log} holds no judge's answers ({error}); move it away") from None


# --- what is shown -----------------------------------------------------------------------------


class Shown(NamedTuple):
    """One context: its tokens, and how active the unit is on each (0: silent)."""

    pieces: Sequence[str]
    activations: Float[np.ndarray, " pieces"]
    centre: int
    """Index of the token that the context is of."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def marked(self) -> str:
        """The text with `<<` and `>>` around every run of tokens on which the unit fires."""
        found, inside = [], False
        for piece, value in zip(self.pieces, self.activations, strict=True):
            if (value > 0) != inside:
                found.append(CLOSE if inside else OPEN)
                inside = not inside
            found.append(piece)
        return "".join(found) + CLOSE * inside


def with_marks_of(silent: Shown, firing: Shown) -> Shown:
    """A silent context with marks where the firing one has them, counted from both centres.

    Wrong marks are as many and stand as right ones do, or they would be told from them without a
    look at the text.
    """
    values = np.zeros(len(silent.pieces))
    places = np.flatnonzero(firing.activations > 0) - firing.centre + silent.centre
    values[places[(places >= 0) & (places < len(values))]] = 1.0
    return silent._replace(activations=values)


# --- protocols ---------------------------------------------------------------------------------

ABOUT = (
    "A unit of a neural network that reads text is active on some tokens and silent on all others."
)
EXPLAIN = """{about} Below are texts; the tokens on which it is active stand between << and >>, \
followed by its strongest activations (0 to 10). Say in at most one sentence what those tokens or \
their contexts have in common. Be specific; say nothing of the marks.

{texts}

The last line of your answer must be: EXPLANATION: your sentence"""
DETECT = """{about} It is said to be active on: {description}

In which of these {n} texts is it active on some token?

{texts}

The last line of your answer must be a JSON list of {n} numbers, 1 where it is active and 0 where \
it is not, e.g. {example}"""
FUZZ = """{about} It is said to be active on: {description}

In each of these {n} texts some tokens stand between << and >>. In which texts are the marked \
tokens those on which it is active?

{texts}

The last line of your answer must be a JSON list of {n} numbers, 1 where the marks are right and \
0 where they are not, e.g. {example}"""
INTRUDE = """{about} The tokens between << and >> are what is looked at. It is active in all of \
these {n} texts but one. Which one does not belong to the others?

{texts}

The last line of your answer must be a JSON list of one number, that of the text that does not \
belong."""
SIMULATE = """{about} It is said to be active on: {description}

Below is a text as a JSON list of its {n} tokens. Say for each token how active the unit is, from \
0 (silent) to 10 (as active as it can be).

{tokens}

The last line of your answer must be a JSON list of {n} whole numbers from 0 to 10."""
QUESTIONS = {"detection": DETECT, "fuzzing": FUZZ}


def numbered(texts: Sequence[str]) -> str:
    """One JSON string a line: no text can pretend to be another one's end."""
    return "\n".join(
        f"Text {i}: {json.dumps(text, ensure_ascii=False)}" for i, text in enumerate(texts, 1)
    )


def last_list(answer: str | None, n: int, allowed: range) -> list[int] | None:
    """The list in the answer's last line if it has n whole numbers that are `allowed`."""
    lines = (answer or "").strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(found, list) and len(found) == n
    if not is_list or any(type(value) is not int or value not in allowed for value in found):
        return None
    return found


def explain(judge: Judge, shown: Sequence[Shown]) -> str | None:
    """One sentence about firing contexts, or None."""
    largest = max(float(one.activations.max()) for one in shown)
    texts = []
    for one in shown:
        best = np.argsort(-one.activations)[:3]
        levels = [
            f"{one.pieces[i]!r} {round(10 * one.activations[i] / largest)}"
            for i in best
            if one.activations[i] > 0
        ]
        texts.append(f"{one.marked} ({', '.join(levels)})")
    answer = judge.ask(EXPLAIN.format(about=ABOUT, texts=numbered(texts)))
    lines = (answer or "").strip().splitlines()
    _, found, sentence = lines[-1].partition("EXPLANATION:") if lines else ("", "", "")
    return sentence.strip() or None if found else None


def classify(
    judge: Judge, protocol: str, description: str, texts: Sequence[str],
    generator: np.random.Generator,
) -> list[int | None]:  # fmt: skip
    """1 or 0 for each text, None where the answer cannot be read; shown shuffled, 5 at a time."""
    order = generator.permutation(len(texts))
    found: list[int | None] = [None] * len(texts)
    for start in range(0, len(texts), N_SHOWN):
        batch = order[start : start + N_SHOWN].tolist()
        question = QUESTIONS[protocol].format(
            about=ABOUT, description=description, n=len(batch),
            texts=numbered([texts[i] for i in batch]),
            example=json.dumps([i % 2 for i in range(len(batch))]),
        )  # fmt: skip
        answers = last_list(judge.ask(question), len(batch), range(2))
        for i, answer in zip(batch, answers or [None] * len(batch), strict=True):
            found[i] = answer
    return found


def find_intruder(judge: Judge, texts: Sequence[str]) -> int | None:
    """Index of the text that the judge takes for the intruder."""
    question = INTRUDE.format(about=ABOUT, n=len(texts), texts=numbered(texts))
    answer = last_list(judge.ask(question), 1, range(1, len(texts) + 1))
    return None if answer is None else answer[0] - 1


def simulate(judge: Judge, description: str, pieces: Sequence[str]) -> list[int] | None:
    """The activation 0 ... 10 that the judge expects on each token."""
    tokens = json.dumps(list(pieces), ensure_ascii=False)
    question = SIMULATE.format(about=ABOUT, description=description, n=len(pieces), tokens=tokens)
    return last_list(judge.ask(question), len(pieces), SIMULATED)


def correlation(
    simulated: Sequence[Sequence[int]],
    true: Sequence[Float[np.ndarray, " _"]],
    weights: Float64[Tensor, "draws contexts"],
) -> Float64[Tensor, " draws"]:
    """Pearson's r of simulated and true activations over all tokens of all contexts.

    nan where either does not vary.
    """
    sums = []
    for s, t in zip(simulated, true, strict=True):
        s = np.array(s, dtype=np.float64)
        sums.append([len(s), s.sum(), t.sum(), (s * s).sum(), (t * t).sum(), (s * t).sum()])
    n, s, t, ss, tt, st = (weights @ torch.tensor(sums, dtype=torch.float64).view(-1, 6)).T
    covariance, spread = st - s * t / n, (ss - s * s / n) * (tt - t * t / n)
    return torch.where(spread > 1e-12, covariance / spread.clamp_min(1e-12).sqrt(), torch.nan)


def n_questions(
    n_units: int, n_texts: int, n_trials: int, protocols: Sequence[str], n_descriptions: int
) -> int:
    """The most that can be asked: an explanation each, then every protocol."""
    batches = -(-n_texts // N_SHOWN)
    of_description = {"detection": batches, "fuzzing": batches, "simulation": n_texts}
    asked = n_descriptions * sum(of_description.get(protocol, 0) for protocol in protocols)
    return n_units * (1 + asked + n_trials * ("intruder" in protocols))
