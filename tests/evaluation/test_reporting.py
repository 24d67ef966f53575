"""The report's writers: nothing in a prompt or an answer is markup, and the page works."""

import ast
import base64
import collections
import dataclasses
import html.parser
import inspect
import json
import math
import pathlib
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

import _sample_report
import pytest
from _paths import ROOT

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.report import Report
from gemma_keras_tune.evaluation.reporting import charts, markdown, repeating, texts
from gemma_keras_tune.evaluation.reporting import page as page_writer
from gemma_keras_tune.evaluation.running import evaluate


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


def test_page_says_what_was_not_looked_at(report: Report, page: str) -> None:
    assert "pairs were not passed" not in page
    settings = {**report.settings, "pairs": None}
    alone = dataclasses.replace(report, settings=settings, few_shot=None, tuning=None)
    for text in (page_writer.render(alone), markdown.render(alone), str(alone)):
        assert "pairs were not passed" in re.sub(r"\\|\s+", " ", text).replace("  ", " ")
    assert "when <code>evaluate</code> is given <code>result=</code>" in page_writer.render(alone)


def test_base_and_tuned_stand_side_by_side(page: str) -> None:
    names = re.findall(r"<h3>([\w ]+) <span", page)
    assert names[:3] == ["base", "tuned", "base with examples"] and len(names) == 3 * 32


def test_page_marks_every_one_of_several_answers(report: Report, page: str) -> None:
    case = page[page.index("boundary-3") :].partition("</details>")[0]
    assert case.count('<p class="number">') == 9 and "answer 3" in case
    assert case.count("<del>") >= 2 and case.count("<ins>") >= 2
    marks = re.findall(r'class="number"><span class="mark (\w+)">', case)
    samples = [s for name in page_writer.NAMES for s in report.cases[3].variants[name]]
    assert marks == ["pass" if sample.passed else "fail" for sample in samples]


def test_tags_weights_and_notes_are_shown(
    report: Report, page: str, tmp_path: pathlib.Path
) -> None:
    assert '<i class="tag">held-out</i>' in page and "<h2>By tag</h2>" in page
    assert "Counted by weight, " in page and "Weight 2." in page and "An order." in page
    text = markdown.render(report)
    assert "| held\\-out | " in text and "Counted by weight" in text and "An order." in text
    root = ElementTree.parse(report.save(tmp_path / "report.xml")).getroot()
    case = next(c for c in root.iter("testcase") if c.attrib["name"] == "failure-6")
    about = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
    assert about == {"tags": "bread held-out", "weight": "2"}


def test_tags_are_counted_without_what_was_trained_on(report: Report) -> None:
    for row in report.by_tag():
        own = [c for c in report.cases if row.tag in c.case.tags and not c.leak]
        assert (row.cases, row.passed) == (len(own), sum(c.passed() for c in own))
        assert row.base_passed == sum(c.passed("base") for c in own)
    alike = dataclasses.replace(report, cases=report.cases[:1])
    assert not alike.is_weighted and report.is_weighted


def test_leaks_are_listed_by_id(page: str) -> None:
    card = page[page.index("Trained on, and scored apart") :].partition("</div>")[0]
    assert "success-4" in card and "0 of 1 passed" in card
    assert page.count('data-outcome="leak"') == 1 and 'value="leak" checked' in page


@pytest.mark.parametrize(
    ("changes", "call"),
    [
        ({}, "gkt.evaluate(model, test_plan, max_new_tokens=64, seed=7)"),
        ({"pairs": 24, "few_shot": 3}, "(model, test_plan, pairs=pairs, few_shot=3, max_new"),
        ({"baseline": None, "retention": False}, "    baseline=None,\n    retention=False,\n"),
        ({"baseline": "gemma"}, "baseline='gemma'"),
        ({"retention": 5}, "retention=items"),
        ({"target": {"success": 0.8, "failure": 0.8}}, "target=0.8"),
        ({"target": {"success": 0.8, "failure": 1.0}}, "target={'success': 0.8, 'failure': 1.0}"),
        ({"template": "custom", "policy": "ShieldGemma"}, "    template=template,\n"
         "    max_new_tokens=64,\n    policy=policy,\n"),
        ({"template": "gemma2", "machine": "x", "fingerprint": "y"},
         "test_plan, template='gemma2'"),
        ({"sampler": {"class_name": "TopKSampler", "config": {"name": "a", "k": 5}}},
         "sampler=keras_hub.samplers.TopKSampler(k=5)"),
        ({"batch_size": 4, "sampler": "top_k", "confidence": 0.99, "few_shot": 0},
         "    sampler='top_k',\n"),
    ],
)  # fmt: skip
def test_call_to_repeat_it_is_that_of_the_settings(
    report: Report, changes: dict[str, Any], call: str
) -> None:
    usual = {"template": "auto", "few_shot": "auto", "pairs": None}
    settings = {**report.settings, **usual, **changes}
    found = repeating.call(dataclasses.replace(report, settings=settings, tuning=None))
    assert call in found
    arguments = ast.parse(found.replace("keras_hub.samplers.", "")).body[0].value.keywords  # type: ignore[attr-defined]
    assert {a.arg for a in arguments} <= set(inspect.signature(evaluate).parameters)


def test_defaults_are_those_of_evaluate() -> None:
    parameters = inspect.signature(evaluate).parameters
    usual = {name: parameters[name].default for name in repeating.DEFAULTS}
    assert {**usual, "baseline": "base"} == repeating.DEFAULTS


def test_rates_have_the_same_axes_and_readable_labels() -> None:
    few = charts.rates([charts.Rate("tuned", "tuned", 1, 2, 0.1, 0.9)], target=0.9)
    many = charts.rates([charts.Rate("examples", "few_shot", 1000, 1000, 0.99, 1)])
    grids = [re.findall(r'class="grid" d="M([\d.]+) ', svg) for svg in (few, many)]
    assert grids[0] == grids[1] and len(set(grids[0])) == 5
    start, end = float(grids[0][0]), float(grids[0][-1])
    (dot,) = re.findall(r'cx="([\d.]+)"', few)
    assert float(dot) == pytest.approx((start + end) / 2)
    (goal,) = re.findall(r'class="line ink dashed" d="M([\d.]+) ', few)
    assert float(goal) == pytest.approx(start + 0.9 * (end - start), abs=0.06)
    # On a card of 300 pixels, the texts are at least 11 pixels high.
    assert 12 * 300 / charts.WIDTH > 11 and "font: 12px" in texts.resource("page.css")


@pytest.mark.parametrize(
    ("span", "whole", "ticks"),
    [((0, 1), False, [0, 0.2, 0.4, 0.6, 0.8, 1]), ((1, 4), True, [1, 2, 3, 4]),
     ((1, 1), True, [1]), ((0, 0.0011), False, [0, 0.0005, 0.001]), ((3, 47), True,
     [10, 20, 30, 40])],
)  # fmt: skip
def test_ticks_are_round_numbers(span: tuple[float, float], whole: bool, ticks: Any) -> None:
    assert charts._ticks(*span, whole=whole) == pytest.approx(ticks)


def test_lines_are_broken_at_what_is_no_number() -> None:
    svg = charts.history({"loss": (3.0, math.nan, 1.0, 2.0), "val_loss": (1.0, 2.0)}, "loss")
    assert [len(points.split()) for points in re.findall(r'points="([^"]*)"', svg)] == [1, 2, 2]
    assert "training" in svg and "validation" in svg and "nan" not in svg.partition(">")[2]
    charts.history({"accuracy": (math.nan,)}, "accuracy")


def test_every_pair_is_in_a_bar() -> None:
    svg = charts.token_lengths([(10, 3), (500, 6)])
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]
    assert sorted(heights)[-2:] == pytest.approx([max(heights) / 2, max(heights)], abs=0.1)
    assert sum(h > 0 for h in heights) == 2


def test_what_is_no_number_is_null_in_the_json(report: Report, tmp_path: pathlib.Path) -> None:
    assert report.tuning is not None
    history = {"loss": (1.0, math.nan), "val_loss": (math.inf, 2.0)}
    broken = dataclasses.replace(report, tuning=dataclasses.replace(report.tuning, history=history))
    path = broken.save(tmp_path / "report.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert data["tuning"]["history"] == {"loss": [1.0, None], "val_loss": [None, 2.0]}
    again = Report.load(path)
    assert again.tuning is not None and math.isnan(again.tuning.history["loss"][1])
    page_writer.render(again)


def test_every_report_can_be_saved_and_nothing_else_is_left(
    report: Report, tmp_path: pathlib.Path
) -> None:
    for suffix in ("json", "html", "md", "xml"):
        report.save(tmp_path / "new" / f"report.{suffix}")
    assert len(list((tmp_path / "new").iterdir())) == 4
    assert len(Report.load(tmp_path / "new" / "report.json").cases) == len(report.cases)


@pytest.mark.parametrize(
    "text",
    ["[]", "5", "null", '"x"', "{}", "{", '{"schema": "x"}', "\ud800",
     '{"schema": "gemma_keras_tune.report/1", "cases": "abc"}'],
)  # fmt: skip
def test_what_is_no_report_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(EvaluationError, match=r"no report|Expected a report of the schema"):
        Report.load(path)


def _documented() -> dict[str, set[str]]:
    """The keys that docs/reports.md names: of each row of its table, the words in backticks."""
    text = (ROOT / "docs" / "reports.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 12
    return {key: set(re.findall(r"`([a-z_]+)`", words)) for key, words in rows}


def test_json_has_the_keys_that_the_docs_name(report: Report) -> None:
    data, found = report.to_dict(), _documented()
    named = {word for key in found for word in re.findall(r"`([a-z_]+)`", key)}
    assert named == set(data)
    assert set(data["verdicts"][0]) | {"w"} == found["`verdicts`"] | {"w"}
    assert {key for case in data["cases"] for key in case} == found["`cases`"]
    leak = next(case["leak"] for case in data["cases"] if case["leak"])
    assert set(leak) | {"null"} == found["`cases[].leak`"] | {"null"}
    sample = data["cases"][0]["variants"]["tuned"]["samples"][0]
    assert set(sample) | set(sample["outcomes"][0]) == found["`…samples[]`"]
    variants = data["cases"][0]["variants"]
    assert set(variants) | set(variants["base"]) == found["`cases[].variants`"]
    for key in ("few_shot", "retention", "tuning"):
        assert set(data[key]) == found[f"`{key}`"] - {"null"}, key


def test_page_of_the_least_report() -> None:
    whole = _sample_report.sample_report(2, hostile=False)
    least = Report("least", whole.cases[:1], whole.verdicts[:1])
    text = page_writer.render(least)
    assert "How it was tuned" not in text and "What was forgotten?" not in text


@pytest.mark.slow
def test_same_report_same_page(report: Report, page: str) -> None:
    assert page_writer.render(report) == page
    assert page_writer.render(Report.from_dict(json.loads(report.to_json()))) == page


@pytest.mark.slow
def test_thousand_cases_are_under_five_megabytes() -> None:
    long = _sample_report.sample_report(1000, words=300)
    text = page_writer.render(long)
    assert len(text.encode()) < 5_000_000
    assert "more characters" in text
    assert "marked in the first 400 cases" in text


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
    opened.find_element("css selector", "input[value=success]").click()
    opened.find_element("css selector", "input[value=fail]").click()
    assert _shown(opened) == 1, "what was trained on is neither passed nor failed"
    opened.find_element("css selector", "input[value=success]").click()
    opened.find_element("css selector", "input[value=fail]").click()
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
        too_small = opened.execute_script(
            "return [...document.querySelectorAll('main svg text, main *')].filter(e => "
            "e.textContent.trim() && e.getClientRects().length && "
            "(e.tagName == 'text' ? e.getBoundingClientRect().height : "
            "parseFloat(getComputedStyle(e).fontSize)) < 11).map(e => e.textContent)"
        )
        assert not too_small
        cut = opened.execute_script(
            "return [...document.querySelectorAll('svg.picture')].flatMap(svg => {"
            "const box = svg.getBoundingClientRect();"
            "return [...svg.querySelectorAll('text')].filter(t => {"
            "const b = t.getBoundingClientRect();"
            "return b.left < box.left - 1 || b.right > box.right + 1;})"
            ".map(t => t.textContent); })"
        )
        assert not cut
        picture = tmp_path / "picture.png"
        assert opened.save_screenshot(str(picture))
        colours = collections.Counter(_pixels(picture))
        for colour in ("--page", "--card", "--picture-tuned", "--bad-soft"):
            wanted = _rgb(opened, colour)
            near = [
                c for c in colours if max(abs(a - b) for a, b in zip(c, wanted, strict=True)) < 9
            ]
            assert near, f"{colour} {wanted} is not to be seen"
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def _pixels(path: pathlib.Path) -> list[tuple[float, ...]]:
    from matplotlib.image import imread

    image = imread(path)
    return [tuple(map(int, pixel)) for pixel in (255 * image[..., :3]).reshape(-1, 3)]


def _rgb(browser: Any, variable: str) -> list[int]:
    script = (
        "const d = document.createElement('i'); d.style.color = `var(${arguments[0]})`;"
        "document.body.append(d); const c = getComputedStyle(d).color; d.remove(); return c"
    )
    return [int(n) for n in re.findall(r"\d+", browser.execute_script(script, variable))[:3]]


@pytest.mark.slow
def test_page_prints_light_and_unfolded(opened: Any, report: Report) -> None:
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [feature]})
    try:
        assert sum(_rgb(opened, "--ink")) < 200 and sum(_rgb(opened, "--card")) > 700
        assert not opened.find_element("css selector", "form.filters").is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [feature]})
    opened.execute_script(
        "addEventListener('beforeprint', () => {"
        "window.unfolded = document.querySelectorAll('details.case[open]').length})"
    )
    printed = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", pdf)) > 4
    assert opened.execute_script("return window.unfolded") == len(report.cases)


@pytest.mark.slow
def test_thousand_cases_can_be_filtered(browser: Any, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "report.html"
    long = _sample_report.sample_report(1000, words=120)
    file.write_text(page_writer.render(long), encoding="utf-8")
    browser.get(file.as_uri())
    browser.find_element("css selector", "input[value=pass]").click()
    said = browser.find_element("css selector", "output").text
    failing = sum(not case.passed() or case.leak is not None for case in long.cases)
    assert said == f"{failing} of 1000 shown"
