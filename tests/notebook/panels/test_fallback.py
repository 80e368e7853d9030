"""What stays in the notebook when the run has ended."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from html.parser import HTMLParser

import pytest
from support.runs import SECRET, advance, made_up_run, made_up_status, made_up_verdict

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.notebook.panels import fallback
from rlhf_audit_nb.notebook.panels.fallback import freeze, say_text
from rlhf_audit_nb.notebook.panels.model import PanelModel
from rlhf_audit_nb.notebook.panels.picture import DARK, LIGHT, Theme, panel_svg, to_png
from rlhf_audit_nb.notebook.panels.png import shrink
from rlhf_audit_nb.notebook.panels.view import NO_PRIVACY, SEALED_LOSS, Check
from rlhf_audit_nb.trail import Level, Reason


def frozen(*, private=True, to=300, status="completed", check=None, warnings=()):
    state = advance(made_up_run(private=private, status=status), to)
    state.warnings.extend(warnings)
    model = PanelModel(state)
    check = check or Check(at=1_795_359_740.0, verdict=made_up_verdict())
    model.observe(0.0, made_up_status(), check, frozen=True)
    return model.full()


class Page(HTMLParser):
    """Tags, their attributes, and the text outside style sheets."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.text = ""
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag == "style"

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += "" if self._hidden else data + " "


def test_the_same_state_gives_the_same_bytes():
    assert freeze(frozen()) == freeze(frozen())


def test_another_state_gives_another_picture():
    assert freeze(frozen(to=299))[0]["image/png"] != freeze(frozen())[0]["image/png"]


def test_page_picture_and_text_say_the_same_numbers():
    data, metadata = freeze(frozen())
    page = Page(data["text/html"])
    for words in ("ε 5.40", "of 8.00, δ 10⁻⁵", "1,284", "UNANCHORED", SEALED_LOSS, "annotator", "before 1.10"):
        assert words in page.text, words
        assert words in data["text/plain"], words
    assert "Level UNANCHORED" in metadata["image/png"]["alt"]


def test_without_privacy_all_three_say_that_there_is_no_bound():
    full = frozen(private=False)
    data, _ = freeze(full)
    assert NO_PRIVACY in Page(data["text/html"]).text
    assert NO_PRIVACY in data["text/plain"]
    assert "No differential" in panel_svg(full)
    assert "ε" not in data["text/plain"] + Page(data["text/html"]).text + panel_svg(full)


def test_the_whole_root_can_be_read_off_page_and_text():
    data, _ = freeze(frozen())
    root = base64.b64encode(made_up_status().root).decode()
    assert root in Page(data["text/html"]).text
    assert root in data["text/plain"]


def test_the_page_needs_no_script_no_link_and_no_drawing_that_a_sanitiser_drops():
    data, _ = freeze(frozen(warnings=["Something to know."]))
    page = Page(data["text/html"])
    assert {tag for tag, _ in page.tags} == {"style", "div", "span", "img", "details", "summary"}
    for tag, attributes in page.tags:
        assert set(attributes) <= {"style", "class", "title", "alt", "src", "width"}, (tag, attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert "var(" not in attributes.get("style", "")
        assert "url(" not in attributes.get("style", "")
    assert "http" not in data["text/html"]


def test_each_chart_has_a_sentence():
    page = Page(freeze(frozen())[0]["text/html"])
    sentences = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(sentences) == 4
    assert all(sentence.endswith(".") and len(sentence) > 30 for sentence in sentences)


def test_a_chart_of_means_says_so_and_a_chart_of_steps_does_not():
    for steps, said in ((300, True), (150, False)):
        full = frozen(to=steps)
        page = Page(freeze(full)[0]["text/html"]).text
        assert ("drawn as means of 2 steps" in page) is said
        assert ("drawn as means of 2 steps" in panel_svg(full)) is said


def test_markup_in_a_name_stays_text():
    state = advance(made_up_run(), 3)
    state.experiment = '<img src=x onerror="alert(1)"> & <b>bold</b>'
    state.warnings.append("<script>alert(2)</script>")
    model = PanelModel(state)
    model.observe(0.0, made_up_status(), frozen=True)
    data, _ = freeze(model.full())
    page = Page(data["text/html"])
    assert "script" not in {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert "<b>bold</b>" in page.text
    assert data["image/png"]


def test_an_invalid_trail_stands_first_in_text_and_page():
    reason = Reason("leaf", "entry 412", "The leaf does not hash to the signed root.")
    full = frozen(check=Check(at=1.0, verdict=made_up_verdict(Level.INVALID, reason)))
    data, _ = freeze(full)
    text = Page(data["text/html"]).text
    assert text.index("entry 412") < text.index("PRIVACY SPENT")
    assert data["text/plain"].index("entry 412") < data["text/plain"].index("privacy")
    assert "entry 412" in panel_svg(full)


def test_nothing_private_is_in_the_frozen_output():
    state = advance(made_up_run(status="completed"), 300)
    for name in ("loss", "rewards/margins", "clip_fraction"):
        state.add(name, 300, SECRET)
    model = PanelModel(state)
    model.observe(0.0, made_up_status(), frozen=True)
    full = model.full()
    data, metadata = freeze(full)
    said = panel_svg(full) + Page(data["text/html"]).text + data["text/plain"] + json.dumps([full, metadata])
    assert "0.693" not in said
    assert "margins" not in said


def test_a_run_in_which_nothing_was_trained_can_be_frozen():
    for private in (True, False):
        full = frozen(private=private, to=0, status="failed")
        data, _ = freeze(full)
        assert "nothing was recorded" in data["text/html"]
        assert data["image/png"]


def test_a_picture_that_cannot_be_drawn_leaves_the_text_and_the_reason(monkeypatch):
    def fail(_svg):
        raise RuntimeError("no font")

    monkeypatch.setattr(fallback, "to_png", fail)
    data, metadata = freeze(frozen())
    assert set(data) == {"text/plain"}
    assert "ε 5.40" in data["text/plain"]
    assert "no font" in data["text/plain"]
    assert metadata == {}


def test_text_has_no_line_without_words_and_fits_a_terminal_mostly():
    lines = say_text(frozen()["view"]).splitlines()
    assert all(line.strip() for line in lines)
    assert lines[0] == "safety_alignment · completed · step 300 of 300 · UNANCHORED"


def test_the_output_is_small_enough_for_many_runs_in_a_notebook():
    data, _ = freeze(frozen())
    assert len(data["text/html"]) < 120_000
    assert len(data["image/png"]) < 150_000


def _luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one, other):
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(theme: Theme):
    papers = (theme.paper, theme.wash, "#ffffff" if theme is LIGHT else "#111111")
    for paper in papers:
        for ink in (theme.ink, theme.ink2, theme.ink3, theme.accent):
            assert _contrast(ink, paper) >= 4.5, (ink, paper)
    for tone, (ink, wash) in theme.tones.items():
        assert _contrast(ink, wash) >= 4.5, tone


def test_the_colours_of_picture_and_panel_are_the_same():
    css = fallback._sheet()
    for theme in (LIGHT, DARK):
        for color in (
            theme.ink2,
            theme.ink3,
            theme.accent,
            theme.plan,
            *(c for pair in theme.tones.values() for c in pair),
        ):
            assert color in css, color


def test_shrinking_keeps_size_and_colours():
    svg = panel_svg(frozen())
    png = to_png(svg)
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) == (8, 3)
    assert width == 2 * 980
    assert f'height="{height // 2}"' in svg
    palette = png[png.index(b"PLTE") + 4 :][: 3 * 256]
    accent = bytes.fromhex(LIGHT.accent[1:])
    assert accent in {palette[i : i + 3] for i in range(0, len(palette), 3)}


def _rgba(pixels, filters):
    """A picture of four-byte pixels, row by row, each row with its filter."""
    height, width = len(pixels), len(pixels[0]) // 4
    raw, before = b"", bytes(4 * width)
    for row, kind in zip(pixels, filters, strict=True):
        left = {0: bytes(4 * width), 1: bytes(4) + row[:-4], 2: before}.get(kind, bytes(4 * width))
        raw += bytes([kind]) + bytes((a - b) % 256 for a, b in zip(row, left, strict=True))
        before = row

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_shrinking_a_picture_of_few_colours_changes_no_pixel():
    image = pytest.importorskip("PIL.Image", reason="needs Pillow to read the picture back")
    import io

    row = bytes(range(4 * 9))
    pixels = [row, row[4:] + row[:4], row, row[8:] + row[:8]]
    small = shrink(_rgba(pixels, [0, 1, 2, 2]))
    assert image.open(io.BytesIO(small)).convert("RGBA").tobytes() == b"".join(pixels)


@pytest.mark.parametrize("kind", [3, 4])
def test_a_filter_that_is_not_read_is_refused_and_not_guessed(kind):
    with pytest.raises(FormatError, match="filter"):
        shrink(_rgba([bytes(8), bytes(8)], [0, kind]))


def test_what_is_no_png_is_refused():
    with pytest.raises(FormatError, match="not a PNG"):
        shrink(b"GIF89a")


def test_the_picture_names_one_font_only():
    assert set(re.findall(r'font-family="([^"]*)"', panel_svg(frozen()))) == {"Liberation Sans"}
