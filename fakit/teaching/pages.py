"""Executed notebooks as pages: one HTML file each and an index, that work from disk without a network.

Figures show their SVG at once; `assets/plotly.min.js`, copied once from the plotly package, makes them interactive when
it loads. Nothing is requested from another host: no MathJax, no require.js, no fonts. Formulas are MathML; what the
converter does not know stays readable as its TeX source.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import pass_context
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from fakit.teaching.results import NotebookResult

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"\d+%\||\?it/s")
HERE = Path(__file__).parent
MARKS = {"ok": "✓ ran through", "failed": "✗ failed", "not run": "not run"}


# ---- formulas ------------------------------------------------------------------------------------------------------


def formula(tex: str, display: bool = False) -> str:
    """TeX as MathML, which browsers draw without a script; as `<code>` where latex2mathml does not know it."""
    from latex2mathml.converter import convert

    source = " ".join(tex.split())
    known = source.replace("{aligned}", "{align*}")  # the same to a reader, and latex2mathml knows one of them
    try:
        drawn = convert(known, display="block" if display else "inline")
    except Exception:  # whatever a parser of half a formula raises
        drawn = ""
    # a backslash: a command that was passed through; a bare &: an alignment that was not seen
    if not drawn or re.search(r"\\|&(?!#?\w+;)", drawn):
        return f'<code class="tex">{escape(source)}</code>'
    label = escape(source, quote=True)
    return drawn.replace("<math ", f'<math aria-label="{label}" ', 1)


class _Renderer(IPythonRenderer):
    """nbconvert's markdown with formulas as MathML instead of left to MathJax."""

    def block_math(self, body: str) -> str:
        return f'<div class="display-math">{formula(body, display=True)}</div>'

    def multiline_math(self, text: str) -> str:
        return self.block_math(text.strip().strip("$"))

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(body)

    def inline_math(self, body: str) -> str:
        return formula(body)


# A cell whose source JupyterLab keeps folded (an exercise's check, say) is folded here too.
TEMPLATE = """{%- extends 'basic/index.html.j2' -%}
{% block input %}{% if (cell.metadata.get('jupyter') or {}).get('source_hidden') -%}
<details class="folded"><summary>code</summary>{{ super() }}</details>
{%- else %}{{ super() }}{% endif %}{% endblock input %}"""


class _Exporter(HTMLExporter):
    """The body of a notebook page: nbconvert's `basic` template, which brings no style and no script."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _Renderer(escape=False, attachments=attachments, anchor_link_text="")
        return MarkdownWithMath(renderer=renderer).render(source)


# ---- outputs -------------------------------------------------------------------------------------------------------


def centerpiece(notebook: NotebookNode) -> str | None:
    """The SVG that stands for the notebook: of the cell tagged `centerpiece`, else the first;
    None where no cell drew one.
    """
    for cell in sorted(notebook.cells, key=lambda cell: "centerpiece" not in cell.metadata.get("tags", [])):
        for output in cell.get("outputs", []):
            if svg := output.get("data", {}).get("image/svg+xml"):
                return svg
    return None


def _figure(data: dict[str, Any]) -> str:
    """A figure as HTML: the SVG now, the plotly JSON (if any) beside it for the script, the sentence as label."""
    label = escape(str(data.get("text/plain", "figure")), quote=True)
    svg = data.get("image/svg+xml")
    body = f'<div class="static">{svg[svg.index("<svg") :] if svg else f"<p>{label}</p>"}</div>'
    if PLOTLY in data:
        spec = json.dumps(data[PLOTLY]).replace("</", "<\\/")
        body += f'<script type="application/json">{spec}</script>'
    return f'<figure class="fakit-figure" aria-label="{label}">{body}</figure>'


def prepare(notebook: NotebookNode) -> list[str]:
    """Outputs as the page needs them, in place; returns the HTML of the figures.

    A figure becomes a comment, `<!--figure 0-->`, which `notebook_page` replaces at the end: nbconvert passes the page
    through an HTML parser that would lower the case of SVG's attributes and take long over plotly's JSON. Widgets have
    no state here and become a note; progress bars go.
    """
    figures: list[str] = []
    for cell in notebook.cells:
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data")
            if data is None:
                if not (output.output_type == "stream" and output.name == "stderr" and PROGRESS.search(output.text)):
                    kept.append(output)
                continue
            text = str(data.get("text/plain", ""))
            if PLOTLY in data or "image/svg+xml" in data:
                output.data = {"text/html": f"<!--figure {len(figures)}-->"}
                figures.append(_figure(data))
            elif WIDGET in data:
                if PROGRESS.search(text):
                    continue  # a progress bar is of no use once the work is done
                shown = {kind: data[kind] for kind in ("text/html", "image/png", "text/markdown") if kind in data}
                note = "<p class='widget'>An interactive widget stands here in JupyterLab: <code>make lab</code>.</p>"
                output.data = shown or {"text/html": note}
            elif "application/javascript" in data:
                continue
            kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept
    return figures


# ---- pages ---------------------------------------------------------------------------------------------------------


def _document(title: str, head: str, body: str, script: str = "") -> str:
    from pygments.formatters import HtmlFormatter

    style = (HERE / "pages.css").read_text(encoding="utf-8")
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{light}\n@media (prefers-color-scheme: dark) "
        f"{{\n{dark}\n}}\n{style}</style>\n"
        f"</head>\n<body>\n{head}\n<main>\n{body}\n</main>\n{script}</body>\n</html>\n"
    )


def _navigation(result: NotebookResult, others: Sequence[NotebookResult]) -> str:
    place = next(i for i, other in enumerate(others) if other.name == result.name)
    before = others[place - 1] if place else None
    after = others[place + 1] if place + 1 < len(others) else None
    links = ['<a href="index.html">All notebooks</a>']
    if before:
        links.insert(0, f'<a rel="prev" href="{before.page}">← {escape(before.label)}</a>')
    if after:
        links.append(f'<a rel="next" href="{after.page}">{escape(after.label)} →</a>')
    return f"<header><nav aria-label='Notebooks'>{''.join(links)}</nav></header>"


_LINK = re.compile(r'<a href="(?![a-z][a-z0-9+.-]*:|[/#])([^"#]+)(#[^"]*)?"([^>]*)>(.*?)</a>', re.DOTALL)


def relink(body: str, pages: Collection[str], folder: str) -> str:
    """Relative links of a notebook as its page needs them.

    A link to a notebook leads to that notebook's page, and is plain text where no page was made; any other file is
    looked for beside the notebook, in `folder` as seen from the page.
    Addresses with a scheme and places in the page stay.

    Args:
        body: HTML, before figures are put in.
        pages: file names of the pages beside this one.
        folder: the notebooks' folder, relative to the page's.

    >>> relink('<a href="04_lab.ipynb#s2">04</a>, <a href="05_gpu.ipynb">05</a>', {"04_lab.html"}, "../notebooks")
    '<a href="04_lab.html#s2">04</a>, 05'
    """

    def target(link: re.Match) -> str:
        path, place, rest, text = link[1], link[2] or "", link[3], link[4]
        if not path.endswith(".ipynb"):
            return f'<a href="{posixpath.normpath(posixpath.join(folder, path))}{place}"{rest}>{text}</a>'
        page = f"{path.removesuffix('.ipynb')}.html"
        return f'<a href="{page}{place}"{rest}>{text}</a>' if page in pages else text

    return _LINK.sub(target, body)


def notebook_page(
    notebook: NotebookNode, result: NotebookResult, others: Sequence[NotebookResult], folder: str = "../notebooks"
) -> str:
    """One executed notebook as a page.

    The notebook's outputs are rewritten in place (`prepare`): take `centerpiece` before.

    Args:
        notebook: executed.
        result: its own result, one of `others`.
        others: all pages in order, for the links back and forth.
        folder: the notebooks' folder as seen from the page, for links to files that are no notebook.
    """
    exporter = _Exporter(template_name="basic", raw_template=TEMPLATE, mathjax_url="", require_js_url="", jquery_url="")
    figures = prepare(notebook)
    body, _ = exporter.from_notebook_node(notebook)
    body = relink(body, {other.page for other in others}, folder)
    body = re.sub(r"<!--figure (\d+)-->", lambda mark: figures[int(mark[1])], body)
    seconds = f"{result.seconds:.0f} s"
    kind = result.status.replace(" ", "-")
    status = f"<p class='status {kind}'>{MARKS[result.status]} in {seconds}, profile {escape(result.profile)}"
    if result.error:
        status += (
            f" — cell {result.cell}: <code>{escape(result.error)}</code>"
            if result.cell
            else f" — {escape(result.error)}"
        )
    script = (HERE / "pages.js").read_text(encoding="utf-8")
    scripts = f'<script src="assets/plotly.min.js" defer></script>\n<script>\n{script}</script>\n'
    return _document(result.title, _navigation(result, others), f"{status}</p>\n{body}", scripts)


def _card(result: NotebookResult, thumbnail: str | None) -> str:
    picture = f'<div class="thumb" aria-hidden="true">{thumbnail}</div>' if thumbnail else '<div class="thumb"></div>'
    title = f"<span class='number'>{result.number}</span> {escape(result.title)}"
    heading = title if result.status == "not run" else f'<a href="{result.page}">{title}</a>'
    time = "" if result.status == "not run" else f" in {result.seconds:.0f} s"
    error = (
        f"<p class='error'>{f'cell {result.cell}: ' if result.cell else ''}{escape(result.error)}</p>"
        if result.error
        else ""
    )
    return (
        f"<article class='card'>{picture}<h2>{heading}</h2><p>{escape(result.question)}</p>"
        f"<p class='status {result.status.replace(' ', '-')}'>{MARKS[result.status]}{time}</p>{error}</article>"
    )


def index_page(
    results: Sequence[NotebookResult], thumbnails: dict[str, str], profile: str, machine: dict[str, str]
) -> str:
    """The index: a card a notebook, the profile, the versions and the machine."""
    failed = sum(result.status == "failed" for result in results)
    done = sum(result.status == "ok" for result in results)
    verdict = (
        f"{done} of {len(results)} notebooks ran through"
        + (f", {failed} failed" if failed else "")
        + f"; profile {profile}."
    )
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in machine.items())
    cards = "\n".join(_card(result, thumbnails.get(result.name)) for result in results)
    head = "<header><h1>fakit: distillation by feature alignment</h1></header>"
    return _document(
        "fakit: notebooks",
        head,
        f"<p>{escape(verdict)}</p>\n<div class='cards'>\n{cards}\n</div>\n<dl class='facts'>{facts}</dl>",
    )
