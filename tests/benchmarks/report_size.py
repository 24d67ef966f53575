"""The HTML report of many cases: its size, and how long Chromium takes to open it.

    python tests/benchmarks/report_size.py [--json FILE] [--cases 1000]

Needs chromium and chromedriver. The time is from the start of the navigation until the loaded page,
its filters run, has been painted; the best of three.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from _sample_report import sample_report
from selenium import webdriver

from gemma_keras_tune.evaluation.reporting import page


def opening_seconds(file: pathlib.Path) -> float:
    """Seconds until the page is painted, the best of three."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    seconds = []
    with webdriver.Chrome(options=options, service=service) as browser:
        for _ in range(3):
            browser.get(file.as_uri())
            painted = browser.execute_async_script(
                "const done = arguments[0];"
                "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))"
            )
            assert browser.find_element("css selector", "output").text.endswith("shown")
            seconds.append(painted / 1000)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    parser.add_argument("--cases", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "report.html"
        # Answers of about 120 words: those of 256 new tokens.
        file.write_text(page.render(sample_report(options.cases, words=120)), encoding="utf-8")
        figures = {"bytes": file.stat().st_size, "seconds": opening_seconds(file)}
    print(f"{options.cases} cases: {figures['bytes'] / 1e6:.2f} MB, {figures['seconds']:.2f} s")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
