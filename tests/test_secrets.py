"""Logins, planted wherever they may come from, are in nothing that is written or printed."""

import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_runs import SECRETS, command, run_in

from analysis.program import write_results
from pretrained.fetch import Store, by_hand
from sparse_coding.config import RunConfig
from sparse_coding.errors import UserError, without_secrets
from sparse_coding.judge import Endpoint, Judge
from sparse_coding.runs import Run, run_settings

PASSWORD = "planted-password"
ADDRESS = f"https://somebody:{PASSWORD}@example.org/v1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"at {ADDRESS}: no", "at https://***@example.org/v1: no"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        (SECRETS["HF_TOKEN"], "***"),
        (SECRETS["OPENAI_API_KEY"], "***"),
        (
            "hf_hook_point_in @ https://example.org/a@b",
            "hf_hook_point_in @ https://example.org/a@b",
        ),
    ],
)
def test_logins_are_left_out_and_nothing_else(text, expected):
    assert without_secrets(text) == expected
    assert str(UserError(text)) == expected


def test_no_login_is_in_what_a_run_prints_and_writes(finished):
    done, folder = finished
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.json", "summary.json", "metrics.jsonl"} <= {path.name for path in files}
    said = [done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in files)]
    for secret in (*SECRETS.values(), "planted"):
        assert not any(secret.encode() in content for content in said)


def test_no_login_is_in_what_is_said_of_a_model_that_cannot_be_reached(place):
    done = run_in(place, command("--name", "unreached", "--lm", ADDRESS))
    assert done.returncode == 2
    assert "error: --lm https://***@example.org/v1" in done.stderr
    assert "planted" not in done.stdout + done.stderr


def test_no_login_is_in_the_config_of_a_run_or_of_results(tmp_path):
    cfg = RunConfig(lm=ADDRESS, hook_name=(ADDRESS,), name="one", output=tmp_path)
    run = Run(cfg, run_settings(cfg), "cpu")
    run.start()
    run.write_result("summary.json", [])
    write_results(tmp_path / "results.json", cfg, [], "cpu")
    for path in (
        run.folder / "config.json",
        run.folder / "summary.json",
        tmp_path / "results.json",
    ):
        content = json.loads(path.read_text())
        assert content["config"]["hook_name"] == ["https://***@example.org/v1"]
        assert PASSWORD not in path.read_text()


def test_no_login_is_in_the_record_of_what_was_fetched_or_in_what_failed(tmp_path):
    (tmp_path / "a").write_text("")
    Store(tmp_path).enter("a", {"a": f"{ADDRESS}/a"})
    assert "https://***@example.org/v1/a" in (tmp_path / "fetched.json").read_text()
    assert PASSWORD not in str(UserError(by_hand(OSError("no"), [(ADDRESS, Path("a"))])))


@dataclass
class Elsewhere:
    """A server that sends everybody on to its own path /stolen and notes what it was given."""

    asked: list[tuple[str, str | None]]
    port: int = 0


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    state = Elsewhere([])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            state.asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{state.port}/stolen")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def test_the_judges_key_follows_no_redirection(elsewhere, tmp_path):
    key = SECRETS["OPENAI_API_KEY"]
    endpoint = Endpoint(f"http://127.0.0.1:{elsewhere.port}/v1", "m", key)
    assert key not in repr(endpoint)
    with pytest.raises(UserError, match="status 302") as error:
        Judge(endpoint, tmp_path / "log").ask("?")
    assert elsewhere.asked == [("/v1/chat/completions", f"Bearer {key}")]
    assert key not in str(error.value)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("url", [ADDRESS, "http://example.org/v1?key=planted", "planted"])
def test_a_judges_address_with_a_login_is_refused_without_being_quoted(url, tmp_path):
    with pytest.raises(UserError, match="--judge-url") as error:
        Judge(Endpoint(url, "m"), tmp_path / "log")
    assert "planted" not in str(error.value)
