"""Make report.png, the README's picture: the report's list of questions, with one that has a pair open.

    make quickstart
    .venv/bin/python docs/images/report.py runs/quickstart

Needs the extra `test` (playwright) and the Chromium or Chrome of the system.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from roserag_jax.report.page import write_page

_QUESTION = "Is Paula Foxhart the author"  # its candidates are short, and one side reads the wrong passage


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="the quickstart's workdir")
    workdir = parser.parse_args().workdir
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    arguments = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page_file = write_page([workdir], f"{folder}/report.html")
        browser = driver.chromium.launch(executable_path=executable, args=arguments)
        page = browser.new_page(viewport={"width": 1180, "height": 880}, color_scheme="light", reduced_motion="reduce")
        page.goto(f"file://{page_file}")
        page.wait_for_selector("body[data-ready]")
        page.fill("#find-text", _QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_selector("#pairs-detail:focus")
        page.fill("#find-text", "")
        page.fill("#pairs-search", "")
        page.evaluate("document.activeElement.blur(), document.querySelector('#pairs').scrollIntoView()")
        page.screenshot(path=Path(__file__).with_suffix(".png"))
        browser.close()


if __name__ == "__main__":
    main()
