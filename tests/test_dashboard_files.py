"""The feature browser's files, and the server of them: what it gives and what it refuses."""

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import opened_pages
from dashboard_data import prompts, write

from data_visualization import dashboard, serve

ROOT = Path(__file__).parents[1]


# --- building ----------------------------------------------------------------------------------


def test_scripts_are_ascii_and_give_back_what_they_were_given():
    content = {"<": "</script> \u2028 \u2029 \ud83d 한 \0", "n": [None, 1.5]}
    text = dashboard.as_script("a/b", content)
    assert text.isascii() and "\n" not in text[:-1]
    assert (
        json.loads(text.removeprefix('dashboard.receive("a/b",').removesuffix(");\n")) == content
    )


def broken(source: Path, name: str, text: str | None) -> None:
    if text is None:
        (source / name).unlink()
    else:
        (source / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name, text, message", [
    ("index.json", None, "does not exist"),
    ("index.json", '{"rows": [', "is not valid JSON"),
    ("index.json", '{"about": {}, "rows": []}', "lists no features"),
    ("index.json", '{"about": {}, "rows": [3]}', "lists no features"),
    ("index.json", '{"about": {}, "rows": [{"feature": 1}]}', "lacks density"),
    ("prompts.json", None, "does not exist"),
    ("features/00001.json", None, "does not exist"),
    ("features/00001.json", "[3]", "is not what index.json lists"),
    ("features/00001.json", '[{"feature": 32}]', "is not what index.json lists"),
])  # fmt: skip
def test_broken_data_are_one_line_and_leave_the_old_site(tmp_path, name, text, message):
    source = write(tmp_path, "one", 40)
    page = dashboard.build(source, tmp_path / "dashboard" / "one")
    page.write_text("old")
    broken(source, name, text)
    with pytest.raises(ValueError, match=message) as raised:
        dashboard.build(source, page.parent)
    assert "\n" not in str(raised.value)
    assert page.read_text() == "old"
    assert [path.name for path in page.parents[1].iterdir()] == ["one"]


def command(*arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "data_visualization.dashboard", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_the_command_builds_all_or_one_and_overwrites_on_request_alone(tmp_path):
    for name in ("one", "two"):
        write(tmp_path, name, 3)
    done = command(tmp_path, "--name", "two")
    assert done.stdout.split() == [str(tmp_path / "dashboard/two/index.html")]
    assert not (tmp_path / "dashboard/one").exists()
    again = command(tmp_path)
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert "--overwrite" in again.stderr and not (tmp_path / "dashboard/one").exists()
    assert command(tmp_path, "--overwrite").returncode == 0
    sites = (tmp_path / "dashboard/two/data/sites.js").read_text()
    assert sites == 'dashboard.receive("sites",["one","two"]);\n'
    wrong = command(tmp_path, "--name", "three")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: no data of three were collected; there are one, two\n"


def test_one_broken_dictionary_does_not_keep_the_others_back(tmp_path):
    for name in ("one", "two"):
        source = write(tmp_path, name, 3)
        if name == "one":
            broken(source, "prompts.json", "[")
    done = command(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stdout.split() == [str(tmp_path / "dashboard/two/index.html")]
    assert not (tmp_path / "dashboard/one").exists()


# --- the server --------------------------------------------------------------------------------


def encode(text: str) -> dict[str, Any]:
    """Stands in for a language model."""
    if text == "bad":
        raise ValueError("the text is bad")
    return {"tokens": [text], "features": [[[5, 1.5]]]}


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    """Of a server of a site beside which, and in which, lie things that are nobody's business."""
    folder = tmp_path_factory.mktemp("served")
    site = dashboard.build(write(folder, "one", 40), folder / "dashboard" / "one").parent
    (site.parent / "outside.js").write_text("outside")
    (site / "notes.txt").write_text("outside")
    (site / "link.js").symlink_to(site.parent / "outside.js")
    (site / "around").symlink_to(site.parent)
    server = serve.make_server(site, encode)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str):
    """(status, body, headers) of the answer; in names of headers _ stands for -."""
    length = {} if body is None else {"Content_Length": str(len(body))}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for key, value in (length | headers).items():
        connection.putheader(key.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def post(port: int, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    kind = {"Content_Type": "application/json"}
    status, answer, _ = ask(port, "POST", "/encode", body, **(kind | headers))
    return status, json.loads(answer)


def test_the_server_gives_the_site_with_headers_that_bind_the_browser(port):
    kinds = {"/": "html", "/app.js": "javascript", "/style.css?1": "css",
             "/data/features/00001.js": "javascript"}  # fmt: skip
    for path, kind in kinds.items():
        status, body, headers = ask(port, "GET", path)
        assert status == 200 and len(body) > 100
        assert headers["Content-Type"] == f"text/{kind}; charset=utf-8"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'; script-src 'self';" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path",
    ("/../outside.js", "/%2e%2e/outside.js", "/..%2foutside.js", "/data/../../outside.js",
     "/..%5coutside.js", "//etc/passwd", "/%2fetc/passwd", "/link.js", "/around/outside.js",
     "/notes.txt", "/data", "/nothing.js", "/%00.js", "/" + 5000 * "a"),
)  # fmt: skip
def test_the_server_gives_nothing_else(port, path):
    status, body, _ = ask(port, "GET", path)
    assert status == 404
    assert b"outside" not in body and b"root" not in body


@pytest.mark.parametrize(
    "name", ("evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{port}")
)
def test_a_name_that_is_not_this_server_is_refused(port, name):
    host = name.format(port=port)
    assert ask(port, "GET", "/", Host=host)[0] == 403
    assert post(port, b'{"text": "a"}', Host=host)[0] == 403
    assert ask(port, "GET", "/", Host=f"localhost:{port}")[0] == 200


def test_the_server_listens_to_this_machine_alone(port):
    assert serve.HOST == "127.0.0.1"
    server = serve.make_server(ROOT, encode)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()


def test_a_text_is_encoded_or_refused_in_one_line(port):
    answer = {"tokens": ["héllo"], "features": [[[5, 1.5]]]}
    assert post(port, '{"text": "héllo"}'.encode()) == (200, answer)
    assert post(port, b'{"text": "bad"}') == (400, {"error": "the text is bad"})
    for body in (b"", b"{", b"[]", b"{}", b'{"text": 5}', b"\xff", b"[" * 5000):
        status, answer = post(port, body)
        assert status == 400
        assert list(answer) == ["error"] and "\n" not in answer["error"]


def test_texts_from_other_pages_of_other_kinds_and_too_long_ones_are_refused(port):
    text, here = b'{"text": "a"}', f"http://127.0.0.1:{port}"
    assert post(port, text, Origin=here)[0] == 200
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}"):
        assert post(port, text, Origin=origin)[0] == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert post(port, text, Content_Type=kind)[0] == 415
    assert post(port, text, Content_Length=f"{serve.MAX_BODY + 1}")[0] == 413
    for length in ("-1", "", "\xb2"):
        assert post(port, text, Content_Length=length)[0] == 413
    assert ask(port, "POST", "/other", text, Content_Type="application/json")[0] == 404


def test_a_text_of_ones_own_in_the_page(port):
    with opened_pages() as pages:
        page = pages()
        page.goto(f"http://127.0.0.1:{port}/#/prompts")
        page.wait_for_selector("#prompt-text button")
        assert page.locator("#prompt-text button").count() == len(prompts()[0]["tokens"])
        page.fill("#live-text", "my <b>own</b>")
        page.click("#live-button")
        page.wait_for_selector("#prompt-text button >> text=own")
        assert page.inner_text("#prompt-text") == "my <b>own</b>"
        page.locator("#prompt-text button").click()
        assert page.inner_text("#prompt-side .strength > a") == "5"
        assert page.said == []
        page.fill("#live-text", "bad")
        page.click("#live-button")
        page.wait_for_selector("[role=alert] >> text=the text is bad")
        page.goto(f"http://127.0.0.1:{port}/#/feature/7")
        page.wait_for_selector("#feature[data-ready]")
        assert page.get_by_role("link", name="twin").count() == 0  # one site alone is served
        assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in page.asked)


def test_serving_needs_collected_data_and_says_so_in_one_line(tmp_path):
    line = [sys.executable, "-m", "data_visualization.serve", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
