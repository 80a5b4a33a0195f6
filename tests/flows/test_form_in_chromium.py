"""Prefect's UI in a browser: submit an order in the form, wait for the run, read its report."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest
from drafts import environment, recpress, write_draft
from local_services import LocalServices
from playwright.sync_api import Locator, Page, expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser: none of {BROWSERS} on PATH"),
]

PAGE_MS = 60_000  # longest wait for an element of a page
RUN_MS = 300_000  # longest wait for the end of the flow run


@pytest.fixture
def page() -> Iterator[Page]:
    """A page in the installed browser; playwright does not provide one."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        browser_page = browser.new_page(viewport={"width": 1300, "height": 1800})
        browser_page.set_default_timeout(PAGE_MS)
        yield browser_page
        browser.close()


def log_in(page: Page, services: LocalServices, path: str) -> None:
    """Open a page of Prefect's UI, and log in with the authentication string."""
    page.goto(services.client["PREFECT_API_URL"].removesuffix("/api") + path)
    page.wait_for_url(re.compile("/login"))
    password = page.locator("input[type=password]")
    login = page.get_by_role("button", name="Login", exact=True)
    password.fill("recpress:wrong")
    login.click()
    expect(page.get_by_text("Authentication failed").first).to_be_visible()
    expect(password).to_be_visible()
    password.fill(services.client["PREFECT_API_AUTH_STRING"])
    login.click()
    page.wait_for_url(re.compile(f"{path}$"))


def form_field(within: Page | Locator, title: str) -> Locator:
    """Return the innermost field with a title."""
    page = within if isinstance(within, Page) else within.page
    heading = re.compile(rf"^{re.escape(title)}( \(Optional\))?$")
    label = page.locator(".schema-form-property__label", has_text=heading)
    return within.locator(".schema-form-property", has=label).last


def choose(field: Locator, option: str) -> None:
    """Select an option of a dropdown, whose list is outside of the form in the page."""
    button = field.locator(".p-select-button__control")
    button.press("ArrowDown")
    field.page.get_by_role("option", name=option, exact=True).click()
    expect(button).to_have_text(option)


def test_order_from_the_form_completes_and_its_report_is_shown_in_the_browser(
    local_services: LocalServices, page: Page, tmp_path: Path
) -> None:
    env = environment(tmp_path, **local_services.client)
    # A draft is the folder that a user writes and ``bundle pack`` stores as a bundle.
    # Other weights and rows than those of the tests that share these services.
    draft = write_draft(tmp_path / "draft", name="forms", seed=1)
    packing = recpress("bundle", "pack", str(draft), env=env)
    assert packing.returncode == 0, packing.stderr

    log_in(page, local_services, "/deployments")
    page.get_by_role("link", name="compress", exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    form_field(page, "Model").locator("textarea").fill("forms@1")
    choose(form_field(page, "Preset"), "fast")
    limits = form_field(page, "Limits")
    limits.get_by_role("button", name="Add item").click()
    choose(form_field(limits, "Metric"), "auc")
    bound = form_field(limits, "At Least")
    bound.get_by_role("button", name="float").click()  # the value is a number, not null
    bound.locator("input").fill("-0.02")
    page.screenshot(path=tmp_path / "form.png")

    page.get_by_role("button", name="Submit").click()
    link = page.locator("a[href*='/runs/flow-run/']").first
    # goto instead of a click, so that no state badge of the previous page remains.
    page.goto(urljoin(page.url, link.get_attribute("href") or ""))
    badge = page.locator(".state-badge", has_text=re.compile("Completed|Failed|Crashed")).first
    expect(badge).to_be_visible(timeout=RUN_MS)
    page.screenshot(path=tmp_path / "run.png")
    expect(badge).to_have_text("Completed")

    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("recpress-forms", exact=True).first.click()
    headline = page.get_by_role("heading", name="forms 1: accepted")
    expect(headline).to_be_visible()
    page.screenshot(path=tmp_path / "artifact.png")
    page.get_by_text("bytes served").first.wait_for()
