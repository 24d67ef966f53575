"""The report's writers: nothing in a prompt or an answer is markup, and the page works."""

import html.parser
import json
import pathlib
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

import _sample_report
import pytest

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.reporting import html as page_writer
from gemma_keras_tune.evaluation.reporting import texts
from gemma_keras_tune.evaluation.results import Report


@pytest.fixture(scope="module")
def report() -> Report:
    return _sample_report.sample_report()


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return page_writer.render(report)


class _Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_page_stands_alone(page: str) -> None:
    tags = _Tags(page)
    assert not tags.named("link") + tags.named("img") + tags.named("iframe")
    assert len(tags.named("script")) == 1 and "src" not in tags.named("script")[0]
    loads = re.findall(r'(?:src|href)="(?!#)([^"]*)"', page)
    assert loads == []
    policy = next(a for a in tags.named("meta") if "http-equiv" in a)["content"] or ""
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_nothing_untrusted_is_markup(page: str) -> None:
    tags = _Tags(page)
    assert all(not name.startswith("on") for _, attributes in tags.tags for name in attributes)
    assert page.count("{{ 7 * 7 }} {% raw %}") > 4
    assert "\x00" not in page and "\u202e" not in page and "⟨U+202E⟩" in page
    page.encode("utf-8")


def test_page_says_the_verdict_first_and_shows_both_answers(report: Report, page: str) -> None:
    body = page[page.index("<main>") :]
    assert body.index("badge fail") < body.index("<h2>success") < body.index('id="cases"')
    assert body.count('<details class="case"') == len(report.cases)
    assert "<del>" in body and "<ins>" in body
    assert body.count("<svg") == 3 + 1 + 3
    for words in ("Is tuning needed?", "What was forgotten?", "scored apart", "LoRA rank 8",
                  "3.15.1", "seed=7", "validation", "Lengths of the pairs"):  # fmt: skip
        assert words in body, words


def test_page_of_the_least_report() -> None:
    whole = _sample_report.sample_report(2, hostile=False)
    least = Report("least", whole.cases[:1], whole.verdicts[:1])
    text = page_writer.render(least)
    assert "How it was tuned" not in text and "What was forgotten?" not in text


def test_same_report_same_page(report: Report, page: str) -> None:
    assert page_writer.render(report) == page
    assert page_writer.render(Report.from_dict(json.loads(report.to_json()))) == page


@pytest.mark.slow
def test_thousand_cases_are_under_five_megabytes() -> None:
    long = _sample_report.sample_report(1000, words=300)
    text = page_writer.render(long)
    assert len(text.encode()) < 5_000_000
    assert "more characters" in text


def test_markdown_keeps_texts_as_texts(report: Report, tmp_path: pathlib.Path) -> None:
    text = report.save(tmp_path / "report.md").read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside.replace("\\<script", "")
    assert "| success | **" in text and "## Failing cases" in text and "gemma3" in text
    assert "````text" in text  # around an answer that has a fence of its own


def test_junit_is_xml_that_counts(report: Report, tmp_path: pathlib.Path) -> None:
    root = ElementTree.parse(report.save(tmp_path / "report.xml")).getroot()
    assert len(root.findall(".//testcase")) == len(report.cases)
    failing = [c for c in report.cases if not c.leak and not c.passed()]
    assert len(root.findall(".//failure")) == len(failing)
    assert sum(int(s.attrib["failures"]) for s in root.findall("testsuite")) == len(failing)
    assert len(root.findall(".//skipped")) == 1


def test_notebook_shows_it_in_a_frame(report: Report, page: str) -> None:
    shown = report._repr_html_()
    frame = _Tags(shown).named("iframe")[0]
    assert frame["sandbox"] == "allow-scripts" and frame["srcdoc"] == page
    assert shown.count("<iframe") == 1


def test_unknown_ending_is_refused(report: Report, tmp_path: pathlib.Path) -> None:
    with pytest.raises(EvaluationError, match=r"\.html, \.json, \.md, \.xml"):
        report.save(tmp_path / "report.pdf")
    (tmp_path / "there.md").write_text("old")
    with pytest.raises(EvaluationError, match="already exists"):
        report.save(tmp_path / "there.md", overwrite=False)


@pytest.mark.parametrize(
    ("lengths", "total", "limit"), [([], 10, 0), ([3, 4], 10, 4), ([1, 9, 9], 11, 5), ([8], 0, 0)]
)
def test_fitting_limit_cuts_the_longest_alone(lengths: list[int], total: int, limit: int) -> None:
    assert texts.fitting_limit(lengths, total) == limit
    assert sum(min(length, limit) for length in lengths) <= total


def test_word_diff_gives_both_texts_back() -> None:
    first, second = "two rolls, please", "two loaves, please!"
    runs = texts.word_diff(first, second)
    assert "".join(run.text for run in runs if run.kind != "new") == first
    assert "".join(run.text for run in runs if run.kind != "gone") == second
    assert texts.word_diff("same", "same") == () == texts.word_diff("abc", "xyz")


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


@pytest.fixture
def opened(browser: Any, page: str, tmp_path: pathlib.Path) -> Any:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    browser.set_window_size(1200, 900)
    browser.get(file.as_uri())
    return browser


def _shown(browser: Any) -> int:
    found = browser.find_elements("css selector", "details.case")
    return sum(one.is_displayed() for one in found)


@pytest.mark.slow
def test_filters_by_clicking(opened: Any, report: Report) -> None:
    assert _shown(opened) == len(report.cases)
    opened.find_element("css selector", "input[value=success]").click()
    others = [case for case in report.cases if case.case.kind != "success"]
    assert _shown(opened) == len(others)
    opened.find_element("css selector", "input[value=pass]").click()
    failing = [case for case in others if not case.passed()]
    assert _shown(opened) == len(failing)
    assert opened.find_element("css selector", "output").text.startswith(f"{len(failing)} of")
    opened.find_element("css selector", "input[type=search]").send_keys("gnp.exe")
    assert _shown(opened) == 1
    opened.find_element("css selector", "input[type=search]").send_keys(" no such text")
    assert _shown(opened) == 0
    assert opened.find_element("css selector", "p.none").is_displayed()


@pytest.mark.slow
def test_nothing_untrusted_runs_and_nothing_is_loaded(opened: Any) -> None:
    assert opened.execute_script("return window.broken") is None
    assert opened.title != "run"
    entries = opened.execute_script("return performance.getEntriesByType('resource').length")
    assert entries == 0
    messages = [entry["message"] for entry in opened.get_log("browser")]
    assert not messages, messages


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_and_can_be_read(
    opened: Any, scheme: str, width: int, tmp_path: pathlib.Path
) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        overflow = opened.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert overflow <= 0
        page, ink = opened.execute_script(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (page, ink)]
        assert (light[0] > light[1]) == (scheme == "light") and abs(light[0] - light[1]) > 380
        picture = tmp_path / "picture.png"
        assert opened.save_screenshot(str(picture))
        assert len(set(_pixels(picture))) > 20
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def _pixels(path: pathlib.Path) -> list[tuple[float, ...]]:
    from matplotlib.image import imread

    image = imread(path)
    return [tuple(pixel) for pixel in image[::7, ::7, :3].reshape(-1, 3)]


@pytest.mark.slow
def test_thousand_cases_can_be_filtered(browser: Any, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "report.html"
    long = _sample_report.sample_report(1000, words=120)
    file.write_text(page_writer.render(long), encoding="utf-8")
    browser.get(file.as_uri())
    browser.find_element("css selector", "input[value=pass]").click()
    said = browser.find_element("css selector", "output").text
    failing = sum(not case.passed() for case in long.cases)
    assert said == f"{failing} of 1000 shown"
