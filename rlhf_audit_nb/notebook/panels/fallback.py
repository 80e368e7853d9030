"""What stays of the panel in the notebook: a small page, a picture, text. Floor 6.

A saved notebook is shown in three ways, and each must say the same. JupyterLab prefers ``text/html``: in the session
that made it as it is, in a notebook that somebody else opens after a sanitiser that drops scripts, style sheets, SVG,
ids and ARIA and keeps inline style and ``data:`` images. So the page is laid out by inline style alone, its charts are
PNG with alternative text, and its style sheet only adds the dark theme. Where HTML is not shown (LaTeX, mail, a file
browser) the whole panel is one PNG; in a terminal it is text. The same view gives the same bytes.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from rlhf_audit_nb.notebook.panels.picture import (
    CHART,
    DARK,
    LIGHT,
    SCALE,
    Frame,
    chart_svg,
    frame_epsilon,
    frame_series,
    panel_svg,
    say_means,
    to_png,
)

__all__ = ["freeze", "say_html", "say_text"]

View = Mapping[str, Any]


def freeze(full: View) -> tuple[dict[str, str], dict[str, Any]]:
    """The static output of a view (`PanelModel.full`): data and metadata by MIME type.

    Should the picture fail to be drawn, the text stands alone and says so.
    """
    view = full["view"]
    text = say_text(view)
    try:
        png = to_png(panel_svg(full))
        page = say_html(full)
    except Exception as error:  # the numbers matter more than their picture, and the reason is told
        return {"text/plain": f"{text}\n(The picture could not be drawn: {error})"}, {}
    width, height = struct.unpack(">II", png[16:24])
    metadata = {"image/png": {"width": int(width / SCALE), "height": int(height / SCALE), "alt": view["label"]}}
    data = {"text/html": page, "image/png": base64.b64encode(png).decode(), "text/plain": text}
    return data, metadata


# text --------------------------------------------------------------------------------------------------------------


def say_text(view: View) -> str:
    """The panel in plain lines, for a terminal and for any reader that shows text only."""
    privacy, training, integrity = view["privacy"], view["training"], view["integrity"]
    lines = [f"{view['title']} · {view['status']['text']} · {view['level']['word']}"]
    alert = view.get("alert")
    if alert:
        lines.append(f"  {alert['title'].upper()}")
        lines += [f"    {item['where']}: {item['text']}" for item in alert["reasons"]]
        lines.append(f"    {alert['more'] + '. ' if alert['more'] else ''}To look closer: {alert['command']}")
    keys = ", ".join(item["text"] for item in privacy.get("keys") or [])
    lines.append(_row("privacy", " ".join(part for part in (privacy["big"], privacy["of"]) if part)))
    lines += [_row("", part) for part in (keys, privacy["note"]) if part]
    lines.append(_row("training", f"{training['big']} {training['of']}"))
    metrics = ", ".join(f"{item['label']} {item['value']}" for item in training.get("metrics") or [])
    facts = ", ".join(f"{item['term']} {item['text']}" for item in training.get("facts") or [])
    lines += [_row("", part) for part in (metrics, facts, training["note"]) if part]
    lines.append(_row("integrity", f"{integrity['big']} {integrity['of']}"))
    for item in integrity["rows"]:
        detail = f" ({item['detail']})" if item.get("detail") else ""
        lines.append(_row("", f"{item['term']} {item.get('copy') or item['text']}{detail}"))
    lines.append(_row("level", f"{view['level']['word']}. {integrity['note']}"))
    lines += [_row("warning", text) for text in view.get("warnings") or []]
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"  {name:<10} {text}"


# html --------------------------------------------------------------------------------------------------------------


@cache
def _sheet() -> str:
    """The style sheet of the page: the live panel's tokens, and which parts take which."""
    css = (Path(__file__).parent / "run_panel.css").read_text(encoding="utf-8")
    tokens = css.split("/* tokens */")[1].split("/* end tokens */")[0].replace(".rap", ".raps")
    dark = '[data-jp-theme-light="false"] .raps'
    rules = [
        ".raps{background:var(--rap-paper)!important;border-color:var(--rap-line)!important}",
        ".raps{color:var(--rap-ink)!important;font-family:var(--rap-font)!important}",
        ".raps .raps-b{color:var(--rap-ink)!important}",
        ".raps .raps-2{color:var(--rap-ink-2)!important}",
        ".raps .raps-3{color:var(--rap-ink-3)!important}",
        ".raps .raps-l{border-color:var(--rap-line)!important}",
        ".raps .raps-w{background:var(--rap-wash)!important}",
        ".raps .raps-now{background:var(--rap-accent)!important}",
        ".raps .raps-before{background:var(--rap-ink-3)!important}",
        ".raps .raps-planned{background:var(--rap-plan)!important}",
        ".raps .raps-mono{font-family:var(--rap-mono)!important}",
        f"{dark} .raps-light,.vscode-dark .raps .raps-light{{display:none!important}}",
        f"{dark} .raps-dark,.vscode-dark .raps .raps-dark{{display:block!important}}",
    ]
    rules += [
        f".raps .raps-{tone}{{color:var(--rap-{name})!important;background:var(--rap-{name}-wash)!important}}"
        for tone, name in {"live": "accent", **{tone: tone for tone in ("ok", "attest", "warn", "bad", "na")}}.items()
    ]
    return "\n".join([*(line.strip() for line in tokens.strip().splitlines()), *rules])


def _tag(name: str, style: str, *inner: str, cls: str = "", title: str = "") -> str:
    extra = f' class="{cls}"' if cls else ""
    extra += f' title="{escape(title)}"' if title else ""
    return f'<{name}{extra} style="{style}">{"".join(inner)}</{name}>'


def _div(style: str, *inner: str, cls: str = "", title: str = "") -> str:
    return _tag("div", style, *inner, cls=cls, title=title)


def _span(style: str, *inner: str, cls: str = "", title: str = "") -> str:
    return _tag("span", style, *inner, cls=cls, title=title)


def _chip(text: str, tone: str, title: str = "") -> str:
    color, wash = LIGHT.tones.get(tone, LIGHT.tones["na"])
    style = (
        f"display:inline-block;padding:2px 10px;border-radius:99px;font-size:12px;font-weight:600;"
        f"white-space:nowrap;color:{color};background-color:{wash}"
    )
    return _span(style, escape(text), cls=f"raps-{tone}", title=title)


def _note(text: str) -> str:
    return _div(f"margin-top:9px;font-size:12px;color:{LIGHT.ink3}", escape(text), cls="raps-3")


def _opening(card: View, *, small: bool = False) -> str:
    heading = _div(
        f"font-size:11px;font-weight:600;letter-spacing:0.6px;margin-bottom:6px;color:{LIGHT.ink3}",
        escape(card["heading"].upper()),
        cls="raps-3",
    )
    size = "font-size:19px;line-height:1.3" if small else "font-size:30px;line-height:1.15;letter-spacing:-0.6px"
    big = _span(f"font-weight:600;{size}", escape(card["big"]))
    of = (
        _span(f"font-size:14px;margin-left:8px;color:{LIGHT.ink2}", escape(card["of"]), cls="raps-2")
        if card["of"]
        else ""
    )
    return heading + _div("margin:0", big, of)


def _bar(parts: list[tuple[float, str, str]]) -> str:
    """Marks beside each other; each ends at its share of the track."""
    inner: list[str] = []
    start = 0.0
    for share, kind, color in parts:
        width = max(share - start, 0.0)
        if width > 0:
            inner.append(_div(f"width:{100 * width:.2f}%;height:10px;background-color:{color}", cls=f"raps-{kind}"))
        start = max(share, start)
    style = (
        f"display:flex;height:10px;margin:10px 0 6px 0;border:1px solid {LIGHT.line};border-radius:5px;"
        f"overflow:hidden;background-color:{LIGHT.wash}"
    )
    return _div(style, *inner, cls="raps-l raps-w")


def _key(kind: str, color: str, text: str) -> str:
    box = f"display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px;background-color:{color}"
    return _span("margin-right:12px;white-space:nowrap", _span(box, cls=f"raps-{kind}"), escape(text))


def _image(frame: Frame) -> str:
    """The chart on light and on dark paper; without the style sheet only the light one shows."""
    inner = []
    for theme, name, display in ((LIGHT, "light", "block"), (DARK, "dark", "none")):
        data = base64.b64encode(to_png(chart_svg(frame, theme))).decode()
        inner.append(
            f'<img class="raps-{name}" style="display:{display};width:100%;max-width:{CHART[0]}px;height:auto;'
            f'margin:8px 0 0 0" width="{CHART[0]}" alt="{escape(frame.label)}" src="data:image/png;base64,{data}">'
        )
    return "".join(inner)


def _privacy(full: View) -> str:
    view = full["view"]
    card = view["privacy"]
    frame = frame_epsilon(view, full["curve"])
    if frame is None:
        return _opening(card, small=True) + _note(card["note"])
    bar = card["bar"]
    colors = {"before": LIGHT.ink3, "now": LIGHT.accent, "planned": LIGHT.plan}
    marks = _bar([(bar[kind], kind, color) for kind, color in colors.items()])
    keys = "".join(_key(item["kind"], colors[item["kind"]], item["text"]) for item in card["keys"])
    legend = _div(f"font-size:12px;color:{LIGHT.ink2}", keys, cls="raps-2")
    return _opening(card) + marks + legend + _image(frame) + _note(card["note"])


def _training(full: View) -> str:
    view = full["view"]
    card = view["training"]
    metrics = card.get("metrics") or []
    parts = [_opening(card)]
    if card.get("progress") is not None:
        parts.append(_bar([(card["progress"], "now", LIGHT.accent)]))
    if metrics:
        parts.append(_words([metrics[0]], say_means(full)))
    parts.append(_image(frame_series(view, full["series"], full["strides"])))
    parts.append(_words(metrics[1:]))
    facts = [{"label": item["term"], "value": item["text"]} for item in card.get("facts") or []]
    parts += [_words(facts), _note(card["note"])]
    return "".join(parts)


def _words(items: list[dict[str, str]], after: str = "") -> str:
    if not items:
        return ""
    inner = [
        _span(
            "margin-right:12px;white-space:nowrap",
            escape(item["label"]),
            " ",
            _span(f"font-weight:600;color:{LIGHT.ink}", escape(item["value"]), cls="raps-b"),
        )
        + " "
        for item in items
    ]
    if after:
        inner[-1] = inner[-1].replace("margin-right:12px;", "", 1).rstrip()
    return _div(f"font-size:12px;margin-top:4px;color:{LIGHT.ink2}", *inner, escape(after), cls="raps-2")


def _integrity(full: View) -> str:
    card = full["view"]["integrity"]
    rows = []
    for item in card["rows"]:
        mono = "font-family:monospace;font-size:12.5px;" if item.get("mono") else ""
        text = _span(mono, escape(item["text"]), cls="raps-mono" if mono else "")
        if item.get("copy"):
            whole = _div(f"{mono}word-break:break-all;text-align:left", escape(item["copy"]), cls="raps-mono")
            text = f'<details style="margin:0"><summary style="cursor:pointer">{text}</summary>{whole}</details>'
        detail = item.get("detail")
        below = _div(f"font-size:12px;color:{LIGHT.ink3}", escape(detail), cls="raps-3") if detail else ""
        term = _span(f"color:{LIGHT.ink3};white-space:nowrap", escape(item["term"]), cls="raps-3")
        value = _div("text-align:right;min-width:0;overflow-wrap:break-word;word-break:break-word", text, below)
        style = "display:flex;justify-content:space-between;gap:12px;margin-top:4px;font-size:13px"
        rows.append(_div(style, term, value))
    return _opening(card) + _div("margin-top:8px", *rows) + _note(card["note"])


def _alert(view: View) -> str:
    alert = view.get("alert")
    if not alert:
        return ""
    color, wash = LIGHT.tones["bad"]
    lines = [_div(f"font-weight:600;color:{color}", escape(alert["title"]), cls="raps-bad")]
    for item in alert["reasons"]:
        where = _span("font-weight:600", escape(item["where"]), ": ") if item["where"] else ""
        lines.append(_div("word-break:break-word", where, escape(item["text"])))
    more = f"{escape(alert['more'])}. " if alert["more"] else ""
    lines.append(_div("", more, "To look closer: ", _span("font-family:monospace", escape(alert["command"]))))
    style = f"padding:12px 16px;border-left:4px solid {color};background-color:{wash};color:{LIGHT.ink}"
    return _div(style, *lines, cls="raps-alert")


def say_html(full: View) -> str:
    """The panel as a small page: inline style and images, no script, no link; readable after any sanitiser."""
    view = full["view"]
    head = _div(
        "display:flex;flex-wrap:wrap;align-items:center;gap:6px 10px;padding:10px 16px",
        _span(
            "font-size:15px;font-weight:600;word-break:break-word", escape(view["title"]), title=f"run {view['run']}"
        ),
        _chip(view["status"]["text"], view["status"]["tone"]),
        _span("flex:1 1 0"),
        _chip(view["level"]["word"], view["level"]["tone"], view["level"]["meaning"]),
    )
    # Each card draws the line to its left and above; the frame cuts off those at its own edge.
    card = (
        f"flex:1 1 250px;min-width:0;box-sizing:border-box;padding:14px 16px;margin:0 0 0 -1px;"
        f"border-left:1px solid {LIGHT.line};border-top:1px solid {LIGHT.line}"
    )
    cards = [_div(card, inner, cls="raps-l") for inner in (_privacy(full), _training(full), _integrity(full))]
    color, wash = LIGHT.tones["warn"]
    warnings = [
        _div(
            f"padding:6px 16px;font-size:12.5px;background-color:{wash};color:{color}",
            f"Warning: {escape(text)}",
            cls="raps-warn",
        )
        for text in view.get("warnings") or []
    ]
    frame = (
        f"max-width:1080px;margin:4px 0 6px 0;border:1px solid {LIGHT.line};border-radius:10px;overflow:hidden;"
        f"background-color:{LIGHT.paper};color:{LIGHT.ink};font-family:sans-serif;font-size:13.5px;line-height:1.5;"
        "text-align:left"
    )
    body = [head, _alert(view), _div("display:flex;flex-wrap:wrap;overflow:hidden", *cards), *warnings]
    return f"<style>{_sheet()}</style>" + _div(frame, *body, cls="raps")
