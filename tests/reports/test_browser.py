from __future__ import annotations

import pytest
import report_story as story
from support.lab import browser  # noqa: F401  a fixture

from rlhf_audit_nb.reports import build_compliance_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    build_compliance_report(story.evidence(with_notebook=True, experiment="x" * 90)).save(path)
    return path


@pytest.mark.parametrize("width", [360, 1000])
def test_the_page_asks_nobody_for_anything_has_no_error_and_fits_its_width(page_file, browser, width):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(page_file.as_uri())
    page.evaluate(OPEN)
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


def test_text_and_ground_differ_enough_in_the_light_and_in_the_dark(page_file, browser):  # noqa: F811
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        page.evaluate(OPEN)
        pairs = page.evaluate(CONTRAST)
        assert len(pairs) > 500
        assert [pair for pair in pairs if pair["ratio"] < 4.5] == []
        page.close()


OPEN = "document.querySelectorAll('details').forEach(part => part.open = true)"

# WCAG 2.1 relative luminance of each element's own text against the nearest ground that is painted.
CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const part = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const ground = node => { for (let n = node; n; n = n.parentElement) {
    const c = rgb(getComputedStyle(n).backgroundColor); if (c.length < 4 || c[3] === 1) return c; }
    return [255, 255, 255]; };
  return [...document.querySelectorAll('main *')].filter(n => !n.closest('svg') && n.offsetParent &&
      [...n.childNodes].some(t => t.nodeType === 3 && t.textContent.trim())).map(n => {
    const [a, b] = [light(rgb(getComputedStyle(n).color)), light(ground(n))].sort((x, y) => y - x);
    return {ratio: (a + 0.05) / (b + 0.05), text: n.textContent.slice(0, 40), kind: n.className}; });
}"""
