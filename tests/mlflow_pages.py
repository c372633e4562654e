"""MLflow's pages in Debian's Chromium, used as a person uses them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

PATIENCE = 120_000  # milliseconds; a busy machine draws slowly


@contextmanager
def opened(address: str, screenshots: Path) -> Iterator[Pages]:
    """The pages of a server; a screenshot of each that was looked at goes into a folder."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    screenshots.mkdir()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1500, "height": 1100})
        page.set_default_timeout(PATIENCE)
        # Shown once to everybody, some time after the page.
        news = page.get_by_role("dialog").filter(has_text="new Model Registry UI")
        page.add_locator_handler(news, lambda dialog: dialog.get_by_role("button").last.click())
        yield Pages(page, address, screenshots)
        chromium.close()


class Pages:
    """What a person does there."""

    def __init__(self, page: Page, address: str, screenshots: Path) -> None:
        self._page, self._address, self._screenshots = page, address, screenshots

    def find(self, model: str) -> str:
        """Click a registered model in the list of all; returns the text of its page."""
        self._page.goto(f"{self._address}/#/models")
        self._page.get_by_role("link", name=model, exact=True).first.click()
        return self._read("Registered at", model)

    def version(self, model: str, number: int) -> str:
        """The text of a version's page."""
        self._page.goto(f"{self._address}/#/models/{model}/versions/{number}")
        return self._read("Source Model", f"version-{number}")

    def compare(self, model: str, *numbers: int) -> dict[str, list[str]]:
        """Tick versions, press Compare; returns the figures by metric that the page shows, older version first."""
        page = self._page
        page.goto(f"{self._address}/#/models/{model}")
        for number in numbers:
            row = page.get_by_role("row").filter(has_text=f"Version {number}")
            row.get_by_role("checkbox").check(force=True)
        page.get_by_test_id("compareButton").click()
        self._read("Parallel Coordinates Plot", "compare")
        for switch in page.get_by_role("switch").all():  # show what is equal as well
            if switch.is_checked():
                switch.click()
        self._shot("compare-all")
        rows = [row.inner_text().split("\t") for row in page.get_by_role("row").all()]
        return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}

    def artifact(self, model: str, number: int, *path: str) -> str:
        """From a version's page to its sequence's run, to a file there; returns the text that is shown of it."""
        self.version(model, number)
        with self._page.expect_popup() as new:
            self._page.get_by_role("link", name="Run", exact=True).click()
        run = new.value
        run.set_default_timeout(PATIENCE)
        run.get_by_role("tab", name="Artifacts").click()
        for name in path:
            run.get_by_text(name, exact=True).first.click()
        run.get_by_text("Path: ").wait_for()
        run.wait_for_timeout(3000)
        run.screenshot(path=self._screenshots / f"{path[-1]}.png")
        text = "\n".join(frame.locator("body").inner_text() for frame in run.frames)
        run.close()
        return text

    def name(self, model: str, number: int, alias: str) -> None:
        """Give a version an alias, which another may have."""
        self.version(model, number)
        self._page.locator("button[data-component-id*=alias]").first.click()
        dialog = self._page.get_by_role("dialog")
        box = dialog.get_by_role("combobox")
        box.fill(alias)
        box.press("Enter")
        self._shot(f"alias-{number}")
        dialog.get_by_role("button", name="Save aliases").click()
        dialog.wait_for(state="hidden")
        self._read(alias, f"named-{number}")

    def _read(self, awaited: str, name: str) -> str:
        self._page.get_by_text(awaited).first.wait_for()
        self._page.wait_for_timeout(2000)  # the rest of the page
        self._shot(name)
        return self._page.inner_text("body")

    def _shot(self, name: str) -> None:
        self._page.screenshot(path=self._screenshots / f"{name}.png", full_page=True)
