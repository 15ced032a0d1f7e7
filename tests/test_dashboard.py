"""The feature browser in a headless Chromium, on data that try to break it; and its server."""

import http.client
import json
import random
import re
import threading

import pytest
from chromium import opened_pages

from data_visualization import dashboard, serve

HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    '"quoted"',
    "a\nb",
    "\u2028",
    "&amp;",
    "한",
    "",
]
CONCEPTS = ["citations", "korean", "<b>bold</b>"]
N = 3000


def context(generator, strength):
    tokens = [*generator.sample(HOSTILE, 4), "plain", " words"]
    acts = [0.0] * len(tokens)
    acts[4] = strength
    return {"tokens": tokens, "acts": acts, "focus": 4, "document": 0, "source": "<i>book</i>",
            "concept": None}  # fmt: skip


def index_row(i):
    """Feature 7 is dead, 8 is rare."""
    is_judged = i not in (7, 8)
    row = dict.fromkeys(dashboard.COLUMNS)
    row |= {"feature": i, "density": 0.0, "n_firings": 0, "max": 0.0}
    if i != 7:
        row |= {"density": (i + 1) / 1e5, "n_firings": i + 1, "max": 1 + i / 10}
        row["top_token"] = HOSTILE[i % len(HOSTILE)]
    if is_judged:
        row |= {"n_eff": 1 + (i * 37 % 100) / 10, "n_eff_low": 1.0, "n_eff_high": 12.0}
        row |= {"concept": CONCEPTS[i % 3], "auroc": 0.9, "auroc_low": 0.8, "auroc_high": 0.95}
        row |= {"interpretability": 0.75}
        row |= {"description": f"rule number {i} <img src=x onerror=alert(1)>"}
    return row


def entry(i, generator):
    bars = [
        {"concept": name, "share": share, "share_low": share - 0.05, "share_high": share + 0.05,
         "lift": 3.0, "lift_low": 2.5}
        for name, share in zip(CONCEPTS, (0.6, 0.3, 0.1), strict=True)
    ]  # fmt: skip
    scores = {"precision": 0.8, "recall": 0.4, "f1": 0.5, "average_precision": 0.6}
    kin = {"ratio": 16, "seed": 1, "feature": 3, "cosine": 0.5, "same_seed": False}
    neuron = {"hook_name": "blocks.0.mlp.hook_post", "neuron": 5, "correlation": -0.3}
    korean = {"concept": "korean", "kl": 0.1, "n_firings": 3}
    effect = {"kl": 0.1, "kl_random": 0.01, "n_firings": 3, "by_concept": [korean]}
    shapes = {"edges": [0.0, 1.0, 2.0], "by_concept": {name: [2, 1] for name in CONCEPTS}}
    strengths = [] if i == 7 else [2.0, 1.0]
    shown = [context(generator, strength) for strength in strengths]
    parts = [{"low": 0.0, "high": 2.0, "n_firings": 2, "contexts": shown}] if shown else []
    beside = {"contexts": shown, "n_eff": None, "concepts": None}
    return {
        "feature": i,
        "histogram": shapes | {"counts": [i, 1]},
        "concepts": None if i in (7, 8) else bars,
        "precision": None if i in (7, 8) else {"concept": "korean"} | scores,
        "logits": {"top": [["<b>", 1.5]], "bottom": [["\u2028", -1.5]]},
        "examples": {"top": shown, "intervals": parts, "near_miss": [context(generator, 0.0)]},
        "neighbours": [{"sae": "other/one"} | kin],
        "nearest_neuron": beside | neuron | {"histogram_by_concept": shapes},
        "random_direction": beside,
        "effect": None if i else effect,
    }  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as the command builds it, from synthetic data."""
    folder = tmp_path_factory.mktemp("dashboard")
    source = folder / "results/dashboard/one"
    (source / "features").mkdir(parents=True)
    generator = random.Random(0)
    about = {"name": "one", "lm": "tiny", "hook_name": "blocks.0.hook_resid_post", "ratio": 4}
    about |= {"architecture": "l1", "d_sae": N, "seed": 0, "n_tokens": 100_000, "n_collected": N}
    about |= {"concepts": [{"name": name, "superclass": "text"} for name in CONCEPTS]}
    about |= {"n_concept_tokens": 5000}
    index = {"config": {"seed": 0}, "environment": {"torch": "2"}, "about": about}
    index["rows"] = [index_row(i) for i in range(N)]
    (source / "index.json").write_text(json.dumps(index))
    for first in range(0, N, 32):
        chunk = [entry(i, generator) for i in range(first, min(first + 32, N))]
        (source / "features" / f"{first // 32:05d}.json").write_text(json.dumps(chunk))
    prompt = {
        "title": "<u>first</u>",
        "tokens": HOSTILE,
        "features": [[], *([[[5, 2.0], [7, 1.0]]] * (len(HOSTILE) - 1))],
    }
    (source / "prompts.json").write_text(json.dumps([prompt]))
    return dashboard.build(source, folder / "dashboard/one")


@pytest.fixture(scope="module")
def pages():
    with opened_pages() as new_page:
        yield new_page


@pytest.fixture
def page(pages, site):
    page = pages(color_scheme="light")
    page.goto(site.as_uri())
    page.wait_for_selector("tr[aria-rowindex]")
    yield page
    assert page.said == []
    assert all(url.startswith(("file://", "data:")) for url in page.asked)
    page.close()


def first_features(page, n=5):
    cells = page.locator("tr[aria-rowindex] td:first-child")
    return [int(text) for text in cells.all_inner_texts()[:n]]


def open_feature(page, feature):
    page.goto(page.url.split("#")[0] + f"#/feature/{feature}")
    page.wait_for_selector(f"#feature[data-feature='{feature}'][data-ready]")


# --- the list ------------------------------------------------------------------------------------


def test_rows_out_of_sight_do_not_exist(page):
    assert page.locator("tr[aria-rowindex]").count() < 100
    assert page.locator("table").get_attribute("aria-rowcount") == str(N + 1)
    page.evaluate("document.getElementById('scroll').scrollTop = 1e9")
    page.wait_for_selector(f"tr[aria-rowindex='{N + 1}']")
    assert page.locator("tr[aria-rowindex]").count() < 100


def test_sorting_by_a_column_and_back(page):
    assert first_features(page) == [0, 1, 2, 3, 4]
    page.click("th[data-key=n_eff] button")
    expected = sorted((i for i in range(N) if i not in (7, 8)), key=lambda i: (-(i * 37 % 100), i))
    assert first_features(page) == expected[:5]
    assert page.locator("th[data-key=n_eff]").get_attribute("aria-sort") == "descending"
    page.click("th[data-key=n_eff] button")
    assert first_features(page)[:2] == [0, 100]
    page.evaluate("document.getElementById('scroll').scrollTop = 1e9")
    page.wait_for_selector(f"tr[aria-rowindex='{N + 1}']")
    last = page.locator("tr[aria-rowindex] td:first-child").all_inner_texts()[-2:]
    assert last == ["7", "8"]  # what has no value is last, whichever way


def test_search_and_filters(page):
    page.fill("#search", "rule 2999")
    assert first_features(page) == [2999]
    page.fill("#search", "")
    page.select_option("#concept", "korean")
    assert first_features(page) == [1, 4, 10, 13, 16]  # not 7, which has no concept
    page.select_option("#concept", "")
    page.check("#judged")
    assert first_features(page, 9) == [0, 1, 2, 3, 4, 5, 6, 9, 10]
    assert "2,998 of 3,000" in page.inner_text("#count")


def test_keys_move_open_and_go_back(page):
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.locator("tr[aria-selected=true] td:first-child").inner_text() == "1"
    page.keyboard.press("Enter")
    page.wait_for_selector("#feature[data-feature='1'][data-ready]")
    page.keyboard.press("j")
    page.wait_for_selector("#feature[data-feature='2'][data-ready]")
    page.keyboard.press("Escape")
    page.wait_for_selector("tr[aria-selected=true]")
    assert page.locator("tr[aria-selected=true] td:first-child").inner_text() == "2"
    page.keyboard.press("/")
    page.keyboard.type("2999")
    assert first_features(page) == [2999]
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


# --- a feature -----------------------------------------------------------------------------------


def test_a_feature_shows_what_was_collected(page):
    open_feature(page, 40)
    text = page.inner_text("#feature")
    for part in ("0.041 % of 100,000", "korean", "0.80", "other/one", "blocks.0.mlp.hook_post 5",
                 "60 [55, 65] %", "−0.30", "Random direction"):  # fmt: skip
        assert part in text
    assert "without it" not in text
    open_feature(page, 0)
    assert "What the model loses without it" in page.inner_text("#feature")


def test_tokens_are_shown_not_run(page):
    open_feature(page, 40)
    shown = "".join(page.locator(".context").all_inner_texts())
    assert "<script>alert(1)</script>" in shown
    assert page.locator("#feature script, #feature img, #feature b i").count() == 0
    assert page.locator(".where").first.inner_text() == "<i>book</i>"


def test_hovering_a_token_tells_its_activation(page):
    open_feature(page, 40)
    token = page.locator(".token.focus").first
    assert token.get_attribute("data-act") == "2"
    token.hover()
    assert page.inner_text("#tip") == "plain 2"
    alpha = re.search(r"([\d.]+)\)$", token.evaluate("node => node.style.backgroundColor"))
    assert 0.2 < float(alpha[1]) <= 0.75
    silent = page.locator(".context .token:not(.focus)", has_text=" words").first
    assert silent.evaluate("node => node.style.backgroundColor") == ""
    token.focus()
    assert page.locator("#tip").is_visible()


def test_dead_and_rare_features_say_why_there_is_nothing(page):
    open_feature(page, 7)
    assert "It fires on none of the held-out tokens." in page.inner_text("#feature")
    open_feature(page, 8)
    assert "too rarely to be judged" in page.inner_text("#feature")
    page.goto(page.url.split("#")[0] + "#/feature/99999")
    page.wait_for_selector("#feature[data-feature='99999'] .error")


# --- prompts and looks ---------------------------------------------------------------------------


def test_prompts_show_what_fires_on_a_token(page):
    page.keyboard.press("p")
    buttons = page.locator("#prompt-text button")
    assert buttons.count() == len(HOSTILE)
    assert page.locator("#prompt option").inner_text() == "<u>first</u>"
    buttons.nth(2).click()
    side = page.inner_text("#prompt-side")
    assert "rule number 5" in side
    assert page.locator("#prompt-side .strength").count() == 2
    buttons.nth(0).click()
    assert "Nothing fires here" in page.inner_text("#prompt-side")
    buttons.nth(2).click()
    page.click("#prompt-side .strength a >> nth=0")
    page.wait_for_selector("#feature[data-feature='5'][data-ready]")


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(page, theme):
    """WCAG 2.1, 1.4.3: at least 4.5 to 1 on every background, on the hottest token too."""
    if theme == "dark":
        page.click("#theme-button")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    names = ("page", "panel", "chosen", "text", "soft", "accent", "error", "fire")
    script = "n => getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim()"
    colours = {name: page.evaluate(script, name) for name in names}
    fire = [int(part) for part in colours.pop("fire").split(",")]
    panel = [int(colours["panel"][i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [round(0.75 * a + 0.25 * b) for a, b in zip(fire, panel, strict=True)]
    pairs = [("text", "#" + "".join(f"{c:02x}" for c in mixed))]
    for text in ("text", "soft", "accent", "error"):
        grounds = ("page", "panel") if text == "error" else ("page", "panel", "chosen")
        pairs += [(text, colours[ground]) for ground in grounds]
    for text, background in pairs:
        a, b = sorted((luminance(colours[text]), luminance(background)), reverse=True)
        assert (a + 0.05) / (b + 0.05) >= 4.5, (text, background)


def test_the_system_is_asked_for_dark(pages, site):
    page = pages(color_scheme="dark")
    page.goto(site.as_uri())
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.close()


# --- building ------------------------------------------------------------------------------------


def test_scripts_are_ascii_and_give_back_what_they_were_given(site):
    text = (site.parent / "data/features/00001.js").read_text(encoding="ascii")
    body = text.removeprefix('dashboard.receive("features/00001",').removesuffix(");\n")
    assert [one["feature"] for one in json.loads(body)] == list(range(32, 64))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.json", None, "does not exist"),
        ("index.json", '{"rows": [', "is not valid JSON"),
        ("index.json", '{"rows": []}', "lists no features"),
        ("index.json", '{"about": {}, "rows": [{"feature": 1}]}', "lacks density"),
        ("prompts.json", None, "does not exist"),
    ],
)
def test_broken_data_are_one_line_and_leave_the_old_site(tmp_path, site, name, content, message):
    source = tmp_path / "data"
    source.mkdir()
    good = {"index.json": json.dumps({"about": {}, "rows": [index_row(0)]}), "prompts.json": "[]"}
    for file, text in (good | {name: content}).items():
        if text is not None:
            (source / file).write_text(text)
    target = tmp_path / "site"
    target.mkdir()
    (target / "index.html").write_text("old")
    with pytest.raises(ValueError, match=message) as raised:
        dashboard.build(source, target)
    assert "\n" not in str(raised.value)
    assert (target / "index.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- the server ----------------------------------------------------------------------------------


@pytest.fixture
def server(site):
    def encode(text):
        if text == "bad":
            raise ValueError("the text is bad")
        return {"tokens": [text], "features": [[[5, 1.5]]]}

    (site.parent / "secret.txt").write_text("secret")
    (site.parent.parent / "outside.js").write_text("outside")
    link = site.parent / "link.js"
    if not link.is_symlink():
        link.symlink_to(site.parent.parent / "outside.js")
    made = serve.make_server(site.parent, encode)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made.server_address[1]
    made.shutdown()
    made.server_close()


def ask(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for key, value in headers.items():
        connection.putheader(key.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_the_server_serves_its_folder_alone(server):
    status, body, headers = ask(server, "GET", "/")
    assert status == 200
    assert b"<title>Features</title>" in body
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert ask(server, "GET", "/data/index.js")[0] == 200
    for path in ("/../outside.js", "/%2e%2e/outside.js", "/link.js", "/secret.txt", "//etc/passwd",
                 "/data", "/..%2foutside.js", "/%00", "/nothing.js"):  # fmt: skip
        status, body, _ = ask(server, "GET", path)
        assert status == 404, path
        assert b"outside" not in body


def test_foreign_names_and_origins_are_refused(server):
    assert ask(server, "GET", "/", Host="evil.example")[0] == 403
    assert ask(server, "GET", "/", Host=f"localhost:{server}")[0] == 200
    assert ask(server, "GET", "/", Origin="http://evil.example")[0] == 403


def test_texts_are_encoded_or_refused_in_one_line(server):
    def post(body, kind="application/json", path="/encode", **headers):
        status, answer, _ = ask(server, "POST", path, body, Content_Type=kind, **headers)
        return status, json.loads(answer)

    assert post(b'{"text": "hello"}') == (200, {"tokens": ["hello"], "features": [[[5, 1.5]]]})
    assert post(b'{"text": "bad"}') == (400, {"error": "the text is bad"})
    for body in (b"{", b"[]", b'{"text": 5}', b"[" * 5000):
        status, answer = post(body)
        assert status == 400
        assert "\n" not in answer["error"]
    assert post(b"{}", kind="text/plain")[0] == 415
    assert post(b"{}", path="/other")[0] == 404
    assert post(b"{}", Origin="http://evil.example")[0] == 403
    assert post(b" " * (serve.MAX_BODY + 1))[0] == 413


def test_a_text_of_ones_own_in_the_page(pages, server):
    page = pages()
    page.goto(f"http://127.0.0.1:{server}/#/prompts")
    page.fill("#live-text", "my own <b>text</b>")
    page.click("#live-button")
    page.wait_for_selector("#prompt-text button >> text=my own")
    assert page.inner_text("#prompt-text") == "my own <b>text</b>"
    page.fill("#live-text", "bad")
    page.click("#live-button")
    page.wait_for_selector("[role=alert] >> text=the text is bad")
    assert all(url.startswith((f"http://127.0.0.1:{server}/", "data:")) for url in page.asked)
    page.close()
