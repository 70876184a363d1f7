"""A real browser, and what it finds wrong with a page."""

import os
import shutil

import pytest

# Chromium looks for updates and for its maker's services; tests must need no network, nor try to reach one.
_CHROMIUM = (
    "--disable-background-networking --disable-component-update --disable-gpu --disable-quic --disable-sync "
    "--no-first-run"
).split()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that playwright drives: `browser.new_page(...)`. Skips where the system has none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium or Chrome on this machine; on Debian and Ubuntu: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra 'test')")
    arguments = [*_CHROMIUM, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def violations():
    """A function: what axe-core finds in a page that is hard to use by screen reader or keys, a line for each."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra 'test' is not installed").Axe()

    def find(page):
        found = axe.run(page).response["violations"]
        return [f"{rule['id']}: {node['html'][:150]}" for rule in found for node in rule["nodes"]]

    return find
