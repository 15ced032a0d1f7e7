"""The feature browser in a headless Chromium, on data that try to break it."""

import itertools
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import opened_pages
from dashboard_data import BARE, DEAD, PLAIN, RARE, index_row, largest, prompts, write

from data_visualization import dashboard

NAME, N, N_LARGE = "topk_x04_s0", 70, 16_384


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with data of two dictionaries, and their sites."""
    folder = tmp_path_factory.mktemp("run")
    for name, n in ((NAME, N), ("twin", 8)):
        source = write(folder, name, n)
        dashboard.build(source, folder / "dashboard" / name)
    return folder


@pytest.fixture(scope="module")
def pages():
    with opened_pages() as new_page:
        yield new_page


@contextmanager
def opened(pages, page_file: Path, **settings):
    """A page from disk; in the end nothing was complained of, and nothing asked of a network."""
    page = pages(**settings)
    page.set_default_timeout(5_000)
    page.on("dialog", lambda dialog: page.said.append(f"dialog: {dialog.message}"))
    page.goto(page_file.as_uri())
    page.wait_for_selector("tr[aria-rowindex]")
    yield page
    page.close()
    assert page.said == []
    assert page.asked
    assert all(url.startswith(("file://", "data:")) for url in page.asked)


@pytest.fixture
def page(pages, run):
    with opened(pages, run / "dashboard" / NAME / "index.html", color_scheme="light") as found:
        yield found


def shown(page) -> list[int]:
    """Features of the list's rows that are in the document, from above."""
    return [int(text) for text in page.locator("tbody td:first-child a").all_inner_texts()]


def go(page, place: str) -> None:
    page.evaluate("place => { location.hash = place; }", place)


def open_feature(page, feature: int) -> None:
    go(page, f"#/feature/{feature}")
    wait_for_feature(page, feature)


def wait_for_feature(page, feature: int) -> None:
    page.wait_for_selector(f"#feature[data-feature='{feature}'][data-ready]")


# --- the list ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, key", [("eff. concepts", "n_eff"), ("AUROC", "auroc")])
def test_a_column_sorts_both_ways_and_what_is_not_measured_is_last(page, name, key):
    rows = [index_row(i) for i in range(N)]
    measured = [row for row in rows if row[key] is not None]
    assert shown(page)[:5] == [0, 1, 2, 3, 4]
    head = page.get_by_role("columnheader", name=name)
    for direction, sign in (("descending", -1), ("ascending", 1)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        assert page.locator("th[aria-sort]").count() == 1
        order = sorted(measured, key=lambda row: (sign * row[key], row["feature"]))
        assert shown(page)[:20] == [row["feature"] for row in order][:20]
        page.locator("#scroll").evaluate("node => { node.scrollTop = 1e6; }")
        page.wait_for_selector(f"tr[aria-rowindex='{N + 1}']")
        assert shown(page)[-2:] == [DEAD, RARE]


def test_search_and_filters_leave_the_rows_that_match(page):
    for words, found in (
        ("<i>42</i>", [42]),
        ("word20", [20]),
        ("WORD20 tokens", [20]),
        ("zzz", []),
    ):
        page.fill("#search", words)
        assert shown(page) == found
    page.fill("#search", "")
    page.select_option("#concept", "dna")
    assert shown(page) == [i for i in range(N) if index_row(i)["concept"] == "dna"]
    page.select_option("#concept", "")
    page.check("#judged")
    assert page.inner_text("#count") == f"{N - 2} of {N} features"
    assert shown(page)[:5] == [0, 1, 2, 4, 6]


def test_density_is_a_percentage_and_values_have_their_intervals(page):
    facts = index_row(PLAIN)
    row = page.locator("tr[aria-rowindex]", has=page.locator(f"a[href='#/feature/{PLAIN}']"))
    text = row.inner_text()
    assert f"{100 * facts['density']:.3g} %" in text
    for key in ("n_eff", "auroc"):
        value, low, high = (facts[f"{key}{end}"] for end in ("", "_low", "_high"))
        assert f"{value:.2f} [{low:.2f}, {high:.2f}]" in text
    dead = page.locator("tr[aria-rowindex]", has=page.locator(f"a[href='#/feature/{DEAD}']"))
    assert "dead" in dead.inner_text()


def test_keys_walk_open_search_and_go_back(page):
    for key in ("j", "ArrowDown", "j", "k"):
        page.keyboard.press(key)
    assert page.locator("tr[aria-current] a").inner_text() == "2"
    page.keyboard.press("Enter")
    wait_for_feature(page, 2)
    page.keyboard.press("j")
    wait_for_feature(page, 3)
    page.keyboard.press("Escape")
    page.wait_for_selector("tr[aria-current]")
    assert page.locator("tr[aria-current] a").inner_text() == "3"
    page.keyboard.press("/")
    page.keyboard.type("word20")
    assert shown(page) == [20]
    page.keyboard.press("Enter")
    wait_for_feature(page, 20)
    page.go_back()
    page.wait_for_selector("#search")
    assert shown(page) == [20]
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_only_rows_in_sight_and_chunks_asked_for_are_in_the_document(pages, tmp_path):
    source = write(tmp_path, "large", N_LARGE, is_sparse=True)
    with opened(pages, dashboard.build(source, tmp_path / "dashboard" / "large")) as page:
        assert page.locator("table").get_attribute("aria-rowcount") == str(N_LARGE + 1)
        assert 20 < page.locator("tr[aria-rowindex]").count() < 100
        page.locator("#scroll").evaluate("node => { node.scrollTop = node.scrollHeight / 2; }")
        page.wait_for_selector(f"tr[aria-rowindex='{N_LARGE // 2}']")
        page.locator("#scroll").evaluate("node => { node.scrollTop = node.scrollHeight; }")
        page.click(f"a[href='#/feature/{N_LARGE - 1}']")
        wait_for_feature(page, N_LARGE - 1)
        chunks = [url for url in page.asked if "/features/" in url]
        assert len(chunks) == 1 and chunks[0].endswith("/features/00511.js")


# --- a feature ---------------------------------------------------------------------------------


def test_a_token_tells_its_activation_to_the_mouse_and_to_the_keyboard(page):
    open_feature(page, PLAIN)
    token, tip = page.locator(".context .token.focus").first, page.locator("#tip")
    assert not tip.is_visible()
    token.hover()
    assert tip.inner_text().split() == ["·w7_4", f"{largest(PLAIN):g}"]
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    token.focus()
    assert tip.is_visible()
    assert tip.inner_text().split() == ["·w7_4", f"{largest(PLAIN):g}"]


def test_a_tokens_colour_is_its_share_of_the_features_largest(page):
    open_feature(page, PLAIN)
    tokens = page.locator(".context").first.locator(".token")
    colours = tokens.evaluate_all("nodes => nodes.map((n) => getComputedStyle(n).backgroundColor)")
    assert colours[0] == "rgba(0, 0, 0, 0)"
    alpha = [float(re.search(r"/ ([\d.]+)\)", colours[i])[1]) for i in (4, 5)]
    assert alpha == pytest.approx([0.75, 0.12 + 0.63 / 2], abs=0.005)
    again = page.locator(".panel", has_text="0 to 0.75").locator(".token.focus")
    colour = again.evaluate("node => getComputedStyle(node).backgroundColor")
    assert float(re.search(r"/ ([\d.]+)\)", colour)[1]) == pytest.approx(0.12 + 0.063, abs=0.005)


def test_tokens_are_shown_not_run_and_blanks_are_visible(page):
    open_feature(page, 0)
    text = page.inner_text("#feature")
    for token in ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"'`&amp;", "]]>"):
        assert token in text
    assert "<i>0</i>" in text  # of the description
    assert page.locator("#feature").locator("script, img, b b, small b").count() == 0
    assert "↵" in page.locator(".context").first.inner_text()
    assert "↵" in page.inner_text(".logits") and "␣" in page.inner_text(".logits")
    assert page.locator(".token > .blank").count() > 0  # elsewhere than at a token's beginning
    dot = "node => getComputedStyle(node).backgroundImage"
    blank = page.locator(".context .blank").first
    assert blank.inner_text().startswith(" ") and "gradient" in blank.evaluate(dot)
    assert not re.search("[\u2028\u2029\u202e]", text)  # would break or turn the line
    go(page, "#/")
    assert "<b>bold</b>" in page.inner_text("#concept")


def test_a_feature_shows_every_panel_with_its_numbers(page):
    open_feature(page, PLAIN)
    panels = {
        "Activations": ("273 firings on 9,000 tokens", "1,332 firings on 100,000 held-out tokens"),
        "Concepts": ("40 %", "[32, 50]", "6 %", "[5, 8]"),
        "As a detector of python": ("0.75", "0.63", "0.68", "0.71"),
        "Logits": ("2.00", "−3.00", "·less0"),
        "Effect of taking it away": ("0.0125", "640 tokens", "0.002", "0.07"),
        "Nearest features": ("twin", "1:4", "0.88", "0 (same)"),
        "Strongest": ("python · books",),
        "1.5 to 2.25": ("7 firings",),
        "Silent, though alike": ("w8_4", "w9_4"),
        "This feature": ("4.71 [4.24, 5.65]", "korean · books"),
        "Nearest neuron": ("blocks.3.mlp.hook_post 41", "−0.25", "4.25", "french · books"),
        "Random direction": ("6.50",),
    }
    for title, numbers in panels.items():
        heading = page.get_by_role("heading", name=re.compile(f"^{re.escape(title)}"), level=3)
        text = page.locator("section", has=heading).inner_text()
        for part in numbers:
            assert part in text, (title, part, text)


def test_a_histogram_stacks_the_concepts_to_their_sum(page):
    open_feature(page, PLAIN)
    picture = page.get_by_role("img", name="Firings by activation and concept").first
    boxes = picture.locator("rect").evaluate_all(
        "nodes => nodes.map((n) => ['x', 'y', 'height'].map((key) => Number(n.getAttribute(key))))"
    )
    columns: dict[float, list[tuple[float, float]]] = {}
    for x, y, height in boxes:
        columns.setdefault(x, []).append((y, height))
    ground = max(y + height for _, y, height in boxes)
    sums = []
    for parts in columns.values():
        assert len(parts) == 6  # five concepts, and the others together
        for (y, _), (y_above, height_above) in itertools.pairwise(parts):
            assert y_above + height_above == pytest.approx(y)
        sums.append(ground - parts[-1][0])
    counts = [7 * n + 21 for n in range(6, 0, -1)]  # n, n + 1, ... n + 6 firings of 7 concepts
    assert [one / sums[0] for one in sums] == pytest.approx([n / counts[0] for n in counts])


def test_neighbours_are_links_where_their_site_exists(page, run):
    open_feature(page, PLAIN)
    assert page.get_by_role("link", name="unseen").count() == 0
    assert "unseen" in page.inner_text("#feature")
    page.get_by_role("link", name="twin").click()
    wait_for_feature(page, 2)
    assert page.url.startswith((run / "dashboard/twin/index.html").as_uri())


@pytest.mark.parametrize(
    "feature, reason", [(DEAD, "none of the held-out tokens"), (RARE, "too rarely to be judged")]
)
def test_dead_and_rare_features_say_why_nothing_is_shown(page, feature, reason):
    open_feature(page, feature)
    assert page.inner_text("#feature").count(reason) >= 4
    assert "<script>alert(1)</script>" in page.inner_text(".logits")


def test_what_is_null_is_not_measured(page):
    open_feature(page, BARE)
    assert page.inner_text("#feature").count("not measured") >= 8
    go(page, "#/feature/9999")
    assert "Feature 9999 was not collected" in page.inner_text("#feature[data-feature='9999']")


def test_provenance_is_told(page):
    go(page, "#/about")
    page.wait_for_selector(".terms")
    text = page.inner_text("main")
    for part in ("5e1f" * 16, "held out", "first positions", "x86_64", "python (kinds)", "9000"):
        assert part in text


# --- prompts -----------------------------------------------------------------------------------


def test_a_token_of_a_prompt_tells_its_features_and_a_feature_its_tokens(page):
    first = prompts()[0]
    page.keyboard.press("p")
    tokens, side = page.locator("#prompt-text button"), page.locator("#prompt-side")
    page.wait_for_selector("#prompt-text button")
    assert tokens.count() == len(first["tokens"])
    tokens.nth(5).click()
    names = side.locator(".strength > a").all_inner_texts()
    assert [int(name) for name in names] == [feature for feature, _ in first["features"][5]]
    assert "4.5" in side.inner_text()
    page.keyboard.press("j")
    assert "None of the collected features fires here" in side.inner_text()
    page.keyboard.press("k")
    side.get_by_role("button", name="where else").first.click()
    lit = tokens.evaluate_all(
        "nodes => nodes.map((n) => getComputedStyle(n).backgroundColor != 'rgba(0, 0, 0, 0)')"
    )
    assert [i for i, is_lit in enumerate(lit) if is_lit] == [2, 5]


def test_prompts_are_places_that_one_can_go_back_from(page):
    page.goto(page.url.split("#")[0] + "#/prompts")
    page.reload()  # opened there, not come to
    page.wait_for_selector("#prompt-text button")
    page.select_option("#prompt", label="<u>second</u>")
    page.wait_for_function("document.querySelectorAll('#prompt-text button').length == 2")
    page.locator("#prompt-text button").first.click()
    page.locator("#prompt-side .strength a").click()
    wait_for_feature(page, 4)
    page.go_back()
    page.wait_for_function("document.querySelectorAll('#prompt-text button').length == 2")


# --- looks -------------------------------------------------------------------------------------


def contrast(a: list[float], b: list[float]) -> float:
    """(L1 + 0.05) / (L2 + 0.05) of relative luminances (WCAG 2.2, 1.4.3) of sRGB in 0 ... 255."""

    def luminance(colour: list[float]) -> float:
        shares = [v / 255 for v in colour]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([119] * 3, [255] * 3) == pytest.approx(4.478, abs=1e-3)  # #777 just fails


# Colour and background of every text, as they are painted one over another.
PAINTED = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const paint = (colours) => {
    for (const colour of ['white', ...colours]) {
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const parent = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    if (!text || !parent.checkVisibility()) continue;
    const behind = [], style = getComputedStyle(parent);
    for (let node = parent; node; node = node.parentElement) {
      behind.unshift(getComputedStyle(node).backgroundColor);
    }
    const ink = parent.closest('svg') ? style.fill : style.color;
    found.push([text.slice(0, 30), paint([...behind, ink]), paint(behind)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_every_text_has_a_contrast_of_at_least_4_5(pages, run, scheme):
    places = {
        "#/": "tr[aria-current]", f"#/feature/{PLAIN}": ".trio", f"#/feature/{DEAD}": ".trio",
        "#/prompts": "#prompt-text button", "#/about": ".terms", "#/feature/9999": ".error",
    }  # fmt: skip
    site = run / "dashboard" / NAME / "index.html"
    with opened(pages, site, color_scheme=scheme) as page:
        for place, sign in places.items():
            go(page, place)
            page.wait_for_selector(sign)
            if place == "#/prompts":
                page.locator(sign).nth(5).click()
            texts = page.evaluate(PAINTED)
            assert len(texts) >= 8
            assert [t for t in texts if contrast(t[1], t[2]) < 4.5] == []


def test_dark_or_light_is_the_systems_until_one_is_chosen(pages, run):
    def is_dark(page) -> bool:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return max(int(v) for v in re.findall(r"\d+", colour)[:3]) < 60

    site = run / "dashboard" / NAME / "index.html"
    with opened(pages, site, color_scheme="dark") as page:
        assert is_dark(page)
        page.emulate_media(color_scheme="light")
        assert not is_dark(page)
        page.click("#theme-button")
        assert is_dark(page)
        page.reload()
        assert is_dark(page)
        page.click("#theme-button")
        assert not is_dark(page)


def test_the_page_runs_no_code_but_its_own_files(page):
    meta = page.locator("meta[http-equiv=Content-Security-Policy]")
    policy = meta.get_attribute("content")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    inserted = """() => {
      const script = document.createElement('script');
      script.textContent = 'window.broken = true';
      document.head.append(script);
      return Boolean(window.broken);
    }"""
    assert not page.evaluate(inserted)
    assert len(page.said) == 1 and "Content Security Policy" in page.said.pop()


def test_the_sites_code_makes_no_markup_of_text_and_names_no_host():
    code = "".join(path.read_text(encoding="utf-8") for path in dashboard.SITE.iterdir())
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert not re.search(markup, code)
    assert set(re.findall(r"https?://[^\s\"'`]+", code)) <= {"http://www.w3.org/2000/svg"}
