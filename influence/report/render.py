"""The page itself: the template, the style and the script of this package, and one report's content, in one string of HTML.

What comes out asks nothing of any network: style and script are inside, and the page's own security policy allows nothing else,
not even a script that was smuggled in with a training text.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from influence.report import spelling
from influence.report.content import content
from influence.report.health import health_content
from influence.report.overview import overview_content, set_facts
from influence.report.run import run_content

LIMIT_BYTES = 2_000_000

DETAILED = 20
"""So many queries of a set have a section of their own on its page; all are in what it says of the set."""


def render_report(report: Mapping[str, Any]) -> str:
    """The report as one complete HTML document, at most 2,000,000 bytes of UTF-8; equal reports give equal pages.

    `report` is plain JSON: `title`, `run`, `created` and `queries`, each the object that `influence query --json` prints with its `id`, and
    optionally `opponents`, `distribution`, and `unit` (of the scores; nats where it is left out).

    Of more than 20 queries the first 20 have a section of their own.

    Raises ValueError where a query lacks something the page cannot do without, a number is not finite, or the page is too large.
    """
    queries, data = content(report)
    detailed = queries[:DETAILED]
    data["queries"] = data["queries"][:DETAILED]
    anchors = {query["name"]: query["anchor"] for query in detailed}
    style, script = _style(), _script()
    page = _filled(
        "page.html",
        title=str(report.get("title") or "Influence report"),
        run=report.get("run"),
        created=report.get("created"),
        queries=queries,
        detailed=detailed,
        overview=overview_content(set_facts(named(report["queries"])), anchors) if len(queries) > 1 else None,
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        data=Markup(embeddable(data)),
    )
    size = len(page.encode())
    if size > LIMIT_BYTES:
        raise ValueError(
            f"the report would be {size:,} bytes, more than the {LIMIT_BYTES:,} that a page may have: "
            "report fewer queries at once, or fewer or shorter sequences for each (-k)"
        )
    return page


def named(queries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The queries with the names that the page gives them: their number where they have no id."""
    return [{**query, "id": str(query.get("id") or number)} for number, query in enumerate(queries, 1)]


def render_health(health: Mapping[str, Any]) -> str:
    """The health of a training set (`influence health --json`, with `run` and `created`) as one complete HTML document without a script."""
    return _without_script("health.html", health_content(health))


def render_run(facts: Mapping[str, Any]) -> str:
    """The facts of a run (`influence.run_facts`, with `created`), as one complete HTML document without a script."""
    return _without_script("run.html", run_content(facts))


def _without_script(template: str, content: Mapping[str, Any]) -> str:
    style = _style()
    return _filled(template, **content, style=Markup(style), policy=_policy(style))


def _filled(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FunctionLoader(lambda name: re.sub(r"(?m)^ +", "", _resource(name))),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = _text
    return environment.get_template(template).render(**values)


def embeddable(data: Any) -> str:
    """JSON that can stand inside a `<script>` element of any HTML document: nothing in it can end or open an element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _visible(value: Any) -> Any:
    """What the template prints, with no control character or half of a surrogate pair left in any string of the caller's."""
    return spelling.shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _text(text: str) -> Markup:
    """The text for the inside of an element; quotes, which only an attribute has to fear, stay one byte."""
    return Markup(html.escape(text, quote=False))


def _policy(style: str, script: str | None = None) -> str:
    """A Content-Security-Policy under which only this style and this script run and nothing is fetched."""
    scripts = "" if script is None else f" script-src '{_digest(script)}';"
    return f"default-src 'none'; style-src '{_digest(style)}';{scripts} img-src data:; base-uri 'none'; form-action 'none'"


def _digest(inline: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()


def _style() -> str:
    return _resource("shared/base.css") + _resource("page.css")


def _script() -> str:
    """The page's script with the modules that it shares with the page of the service, as one script: a page that is a file cannot import any."""
    modules = [re.sub(r"(?m)^(?:import .*\n|export )", "", _resource(name)) for name in ("shared/dom.js", "shared/tips.js", "page.js")]
    return '"use strict";\n(() => {\n' + "\n".join(modules) + "})();\n"


def _resource(name: str) -> str:
    return resources.files("influence.report").joinpath(name).read_text(encoding="utf-8")
