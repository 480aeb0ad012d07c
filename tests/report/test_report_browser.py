"""The page in a real browser: nothing in the console, charts drawn, samples searched, nothing fetched,
nothing injected, phone, dark.

Needs a Chromium on the machine and the package playwright; skipped by name where either is missing.
Playwright's own browsers are not downloaded.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no Chromium here (chromium, chromium-browser or google-chrome)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
pytest.importorskip("plotly")

import report_runs as runs

from report import make_report

EVIL = (
    '</script><img src=x onerror="window.owned=1"><script>window.owned=1</script><svg '
    "onload=window.owned=1><a href='javascript:window.owned=1'>x</a>"
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The page of a run whose names, prompts and answers all try to get out, with every kind of figure."""
    # A folder's name cannot hold a slash; the entities are what a chart's legend would decode
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=window.owned=1>&lt;b&gt;"
    settings = {"note": EVIL, EVIL: 1}
    runs.make_run(folder, judge=lambda i: 0.3 * i, kl=lambda i: 2.0 * i, settings=settings)
    heldout = {path: 0 for path in folder.glob("iter*/heldout_*.rewarded.jsonl")}
    for path, number in (heldout | {folder / "iter1/rewarded.jsonl": 3}).items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows[number]["responses"][0] = f"needle {EVIL} \u2028 gold=0.5 end"
        rows[number]["prompt"] = [{"role": "user", "content": "Hello."}, {"role": EVIL, "content": EVIL}]
        rows[number]["prompt"].append({"role": "user", "content": "Go on."})
        runs.write(path, rows)
    return page_of(folder, folder.parent / "index.html")


def page_of(folder, target):
    make_report.make(make_report.Arguments(runs=[str(folder)], output_dir=str(target)))
    return target


class Seen:
    """A page that is open, with what its console and the network saw."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page, self.console, self.requests = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.console.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.console.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("window.Plotly && document.querySelector('#list .sample')")

    def scroll(self):
        """Down to the end, so that every chart is drawn."""
        for place in self.page.locator(".plot").all():
            place.scroll_into_view_if_needed()
            place.locator(".main-svg").first.wait_for()

    def visible(self, selector="#list .sample"):
        return self.page.locator(selector).count()

    def wait_count(self, text):
        self.page.wait_for_function(
            "text => document.getElementById('count').textContent.startsWith(text)", arg=text
        )


@pytest.fixture
def seen(browser, html, request):
    opened = Seen(browser, html, **getattr(request, "param", {}))
    yield opened
    opened.context.close()


def test_no_errors_all_charts_and_no_request(seen, html):
    seen.scroll()
    marks = "p.querySelectorAll('.trace, .bars .point').length"
    plots = f"[...document.querySelectorAll('.plot')].map(p => [p.dataset.chart, {marks}])"
    drawn = dict(seen.page.evaluate(plots))
    assert len(drawn) > 18 and all(drawn.values()), drawn
    some = "reward gold judge wins_start by_length kl best_of gold_of_best histogram dpo_loss seconds"
    assert set(some.split()) <= drawn.keys()
    assert seen.console == []
    assert [url for url in seen.requests if not url.startswith(("data:", "blob:"))] == [html.as_uri()]


def test_a_ppo_page_offers_no_training_samples(browser, tmp_path):
    """It has none: rollouts are not kept.

    Of its one iteration the win rate is shown once; a share that stays 0 begins at 0.
    """
    folder = runs.make_run(tmp_path / "ppo", iterations=1, kind="ppo")
    opened = Seen(browser, page_of(folder, tmp_path / "index.html"))
    opened.scroll()
    assert opened.page.locator("input[name=view]").count() == 2
    assert not opened.page.locator("input[value=training]").is_visible()
    ranges = "[...document.querySelectorAll('.plot')].map(p => [p.dataset.chart, p.layout.yaxis.range])"
    shown = dict(opened.page.evaluate(ranges))
    assert "wins_start" in shown and "wins_previous" not in shown
    assert shown["ppo_truncated_fraction"] == [0, 1] and shown["ppo_clip_fraction"][0] == 0
    assert opened.console == []
    opened.context.close()


def test_even_a_script_in_the_page_may_not_fetch(seen):
    blocked = seen.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'fetched', error => 'blocked')")
    assert blocked == "blocked" and any("Content Security Policy" in line for line in seen.console)


def test_injection_does_nothing(seen):
    seen.scroll()
    data = json.loads(seen.page.locator("#samples-data").text_content())
    for name in ("heldout", "training"):
        seen.page.fill("#search", "")
        seen.page.check(f"input[value={name}]")
        seen.wait_count(f"{len(data[name])} of {len(data[name])}")
        seen.page.fill("#search", "onerror")
        seen.wait_count(f"1 of {len(data[name])}")
        seen.page.evaluate("document.querySelectorAll('#list details').forEach(d => { d.open = true })")
        assert EVIL in seen.page.locator("#list").inner_text().replace("\u2028", "")
    seen.page.wait_for_timeout(300)
    assert seen.page.evaluate("window.owned") is None and seen.console == []
    assert seen.page.locator("main img, main svg[onload], main a[href^=javascript], #list a").count() == 0
    assert seen.page.locator("h1").inner_text() == "<img src=x onerror=window.owned=1>&lt;b&gt;"


def test_search_and_filters(seen, html):
    page = seen.page
    data = json.loads(page.locator("#samples-data").text_content())
    heldout, training = data["heldout"], data["training"]
    seen.wait_count(f"{len(heldout)} of {len(heldout)}")
    assert seen.visible() == 10
    labels = page.locator("#list .sample").first.locator("h4").all_inner_texts()
    assert labels == ["iterate 0", "iterate 1", "iterate 2"]  # side by side
    page.click("#after")
    assert "page 2 of" in page.locator("#place").inner_text()

    def answers(entry):
        return [one for column in entry["a"] for one in column["r"]]

    def has(entry, word):
        return any(
            word in text.lower()
            for text in [*(t[1] for t in entry["p"]), *(a["t"][0] for a in answers(entry))]
        )

    word = heldout[7]["a"][0]["r"][0]["t"][0].split()[0].lower()
    page.fill("#search", word.upper())
    seen.wait_count(f"{sum(has(entry, word) for entry in heldout)} of")
    assert page.locator("#list mark").first.inner_text().lower() == word
    page.click("button[type=reset]")
    seen.wait_count(f"{len(heldout)} of")
    for field, value, fits in (
        ("#reward-min", "1.5", lambda one: one["r"] is not None and one["r"] >= 1.5),
        ("#length-max", "25", lambda one: "n" in one and one["n"] <= 25),
    ):
        page.fill(field, value)
        count = sum(any(map(fits, answers(entry))) for entry in heldout)
        assert 0 < count < len(heldout)
        seen.wait_count(f"{count} of")
        page.click("button[type=reset]")
        seen.wait_count(f"{len(heldout)} of")
    page.check("input[value=training]")
    seen.wait_count(f"{len(training)} of")
    page.fill("#margin-min", "3")
    count = sum(any(pair[2] >= 3 for pair in entry["pairs"]) for entry in training)
    assert 0 < count < len(training)
    seen.wait_count(f"{count} of")
    page.fill("#margin-min", "")
    page.select_option("#iteration", "0.2")
    seen.wait_count(f"{sum(entry['i'] == 2 for entry in training)} of")
    page.select_option("#order", "margin")
    page.wait_for_timeout(300)
    facts = page.locator("#list .sample > .facts:first-child").all_inner_texts()
    margins = [float(text.split("margin ")[1]) for text in facts]
    assert margins == sorted(margins, reverse=True) and len(margins) == 10
    first = page.locator("#list .sample").first
    assert first.locator(".chosen").count() == 1 and first.locator(".rejected").count() == 1
    page.fill("#search", "nothing has this text")
    seen.wait_count("0 of")
    assert seen.visible() == 0 and seen.console == []


@pytest.mark.parametrize(
    "seen", [{"viewport": {"width": 360, "height": 780}, "is_mobile": True, "has_touch": True}], indirect=True
)
def test_a_phone_needs_no_sideways_scrolling(seen):
    seen.scroll()
    for name in ("heldout", "training"):
        seen.page.locator(f"input[value={name}]").check()
        seen.page.wait_for_timeout(300)
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert seen.console == []


@pytest.mark.parametrize("seen", [{"color_scheme": "dark"}], indirect=True)
def test_dark_follows_the_system_and_the_switch(seen):
    def ground():
        colour = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        return sum(seen.page.evaluate(colour)[:3]) / 3

    def line():
        seen.page.locator(".plot").first.scroll_into_view_if_needed()
        seen.page.wait_for_selector(".plot .js-line", state="attached")
        return seen.page.evaluate("getComputedStyle(document.querySelector('.plot .js-line')).stroke")

    assert ground() < 60
    dark = line()
    seen.page.click("#theme")
    seen.page.wait_for_function("getComputedStyle(document.body).backgroundColor === 'rgb(246, 247, 249)'")
    assert ground() > 200 and line() != dark
    assert "Dark" in seen.page.locator("#theme").inner_text()


def test_keyboard_and_names(seen):
    """What a screen reader needs: a language, one h1, names of all controls, headings of tables."""
    page = seen.page
    assert page.evaluate("document.documentElement.lang") == "en" and page.locator("h1").count() == 1
    for selector, holds in (
        ("input, select, button", "e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()"),
        ("table", "e.caption && e.querySelector('th[scope=col]')"),
        (".plot", "e.getAttribute('aria-label')"),
        ("a.hint", "document.getElementById(e.hash.slice(1))"),
    ):
        assert page.evaluate(f"[...document.querySelectorAll('{selector}')].every(e => {holds})"), selector
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"


@pytest.mark.long
def test_60000_prompts(browser, tmp_path):
    """Three iterations of 20,000 prompts with 8 answers of about 1,400 characters (0.9 GB): size, memory, and
    time to open, of the page's own thread, so that a busy machine does not decide.
    """
    rng, folder = random.Random(0), tmp_path / "big"
    pool = " ".join(rng.choice(runs.WORDS) + rng.choice(runs.WORDS) for _ in range(100000))

    def text():
        start = rng.randrange(len(pool) - 3000)
        return pool[start : start + rng.randint(700, 2100)]

    def record(key, K, shift):
        texts = [text() for _ in range(K)]
        made = {"id": key, "prompt": [{"role": "user", "content": text()[:300]}], "responses": texts}
        rewards = [rng.gauss(shift, 1) for _ in texts]
        return made | {"rewards": rewards, "num_tokens": [len(t) // 4 for t in texts]}

    def fill(path, tag, prompts, K, shift):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            for n in range(prompts):
                file.write(json.dumps(record(f"{tag}{n}", K, shift)) + "\n")

    for i in range(4):
        fill(folder / f"iter{i}" / "heldout_sampled.rewarded.jsonl", "h", 1000, 8, 0.3 * i)
        fill(folder / f"iter{i}" / "heldout_greedy.rewarded.jsonl", "h", 1000, 1, 0.3 * i)
        if i:
            fill(folder / f"iter{i}" / "rewarded.jsonl", f"t{i}-", 20000, 8, 0.3 * i)
    (folder / "loop.yaml").write_text("iterations: 3\n")
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, ROOT / "report" / "make_report.py", folder]
    made = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert made.returncode == 0, made.stderr
    megabytes = int(made.stdout.split()[-1]) / 1024
    target = folder / "report" / "index.html"
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(target.as_uri())
    page.wait_for_selector(".plot .main-svg")
    seconds = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}["ThreadTime"]
    context.close()
    size = f"{target.stat().st_size / 1e6:.1f} MB, {megabytes:.0f} MB of memory"
    print(f"{size}, {seconds:.2f} s of the page's thread")
    assert target.stat().st_size < 15e6 and megabytes < 500 and seconds < 3
