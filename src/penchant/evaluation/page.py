"""A report as one page that stands by itself: HTML with its plots inside, or Markdown with tables only.

Everything that comes from outside (titles, ids, names, settings) is text on the page, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from penchant.errors import ConfigError
from penchant.evaluation.page_markdown import markdown
from penchant.evaluation.page_plots import cost_plot, slice_panels
from penchant.evaluation.page_view import view
from penchant.files import staged_file
from penchant.tokens import clean

_TEMPLATE = "page.html.jinja"


def to_html(report: Mapping[str, Any]) -> str:
    """One self-contained HTML page of a report's dict (`Report.to_dict`): no network, no scripts."""
    seen = view(report)
    # Our own SVG, in which matplotlib has escaped the text.
    panels = [[Markup(plot) for plot in slice_panels(part)] for part in seen.slices]
    cost = Markup(cost_plot(seen.costs)) if seen.costs else Markup("")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_one_line,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(view=seen, panels=panels, cost=cost)


def to_markdown(report: Mapping[str, Any]) -> str:
    """The same page in GitHub's Markdown: tables where the HTML has plots."""
    return markdown(view(report))


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page, HTML or Markdown by the path's ending, whole or not at all.

    Raises ConfigError for another ending, StorageError where it cannot be written.
    """
    path = Path(path)
    writers = {".html": to_html, ".htm": to_html, ".md": to_markdown}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise ConfigError("a page is .html or .md", where=str(path), remedy="give a path with one of these endings")
    text = writer(report)
    with staged_file(path) as stage:
        stage.write_text(text, encoding="utf-8", newline="\n")


def _one_line(value: Any) -> Any:
    """Text without line breaks, control characters and lone surrogates, which no file could hold."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value, None)
