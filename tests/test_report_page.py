"""Laws of the HTML report: text is never markup, nothing is asked of a network, what is packed comes back, every link has a target;
and, in a real Chromium where there is one, that the page answers a pointer, a finger and a keyboard."""

import base64
import copy
import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from influence.report import layers as layer_names
from influence.report import render_report, spelling, words
from influence.report.content import content, packed
from influence.report.render import LIMIT_BYTES, embeddable

HOSTILE = "</script></style><script>window.intruded = 1</script><img src=x onerror='window.intruded = 1'>\"><b>"
CHROMIUM = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name, path="/usr/bin"))), None)
LAYERS = [f"transformer.h.{block}.{module}" for block in range(12) for module in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")]


def sequence(seed: int, score: float, num_tokens: int = 40, layers: list[str] = LAYERS, **more: Any) -> dict[str, Any]:
    """A result whose layers and tokens each sum to its score."""
    draw = random.Random(seed)
    tokens = [draw.choice([" the", " light", " harbour", ",", " of", "\n", " keeper", " unforgettable"]) for _ in range(num_tokens)]

    def parts(count: int) -> list[float]:
        weights = [draw.gauss(0.3, 1) for _ in range(count)]
        return [score * weight / sum(weights) for weight in weights]

    return {
        "rank": 1,
        "id": f"train-{seed:06d}:0",
        "score": score,
        "text": "".join(tokens),
        "metadata": {"source": "web", "year": 2021},
        "layers": dict(zip(layers, parts(len(layers)), strict=True)),
        "tokens": [list(pair) for pair in zip(tokens, parts(num_tokens), strict=True)],
        "bm25_rank": None,
        **more,
    }


def query(name: str = "q1", num_sequences: int = 4, num_tokens: int = 40, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "query": {
            "prompt": "The light in the",
            "completion": " harbour was lit",
            "log_probability": -3.2,
            "tokens": ["The", " light", " in", " the", " harbour", " was", " lit"],
            "token_log_probabilities": [None, None, None, None, -2.0, -0.2, -1.0],
        },
        "results": [sequence(i, 0.04 / (i + 1), num_tokens) | {"rank": i + 1} for i in range(num_sequences)],
        "opponents": [sequence(100 + i, -0.02 / (i + 1), num_tokens) | {"rank": i + 1} for i in range(num_sequences)],
        "distribution": {
            "num_sequences": 2000,
            "estimated_from": "index rows",
            "histogram": {"edges": [-0.02, -0.01, 0.0, 0.01, 0.04], "counts": [1, 900, 1098, 1]},
            "tail": [[0.0005, 0.1], [0.01, 0.34], [0.1, 0.71], [1.0, 1.0]],
        },
        "coverage": {"parameters_attributed": 0.63, "excluded": {"lm_head": "tied to the embedding"}},
        "provenance": {
            "run": "runs/demo",
            "model": "sha256:00ff",
            "method": "ekfac",
            "damping": 0.1,
            "searched": 2000,
            "candidates": 200,
            "reranked": "exact",
            "recall_at_10": 0.98,
            "seconds": 0.4,
        },
        **more,
    }


def report(*queries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"title": "Influence report", "run": "runs/demo", "created": "2026-11-21", "queries": list(queries), **more}


def hostile_report() -> dict[str, Any]:
    """Every string a stranger can choose is an attack or a character that has broken a page before."""
    odd = [
        "\x00",
        "\x7f",
        "\t",
        "\r",
        "a\r\nb",
        "\n\n",
        "",
        "\u202e",
        "\u2028",
        "שלום",
        "👩‍👩‍👧",
        "\ufffd",
        "\ud800",
        "&lt;",
        "<!--",
        "]]>",
    ]
    tokens = [[token, 0.001] for token in [HOSTILE, *odd]]
    result = {
        "rank": 1,
        "id": HOSTILE,
        "score": 0.017,
        "text": "".join(token for token, _ in tokens),
        "metadata": {HOSTILE: HOSTILE, "nested": {"x": [HOSTILE]}, "none": None},
        "layers": {HOSTILE: 0.017},
        "tokens": tokens,
        "bm25_rank": None,
    }
    asked = {"prompt": HOSTILE, "completion": HOSTILE, "log_probability": -1.0, "tokens": [HOSTILE, HOSTILE]}
    asked["token_log_probabilities"] = [None, -1.0]
    hostile = {
        "id": HOSTILE,
        "query": asked,
        "results": [result, result],
        "opponents": [result],
        "coverage": {"parameters_attributed": 1.0, "excluded": {HOSTILE: HOSTILE}},
        "provenance": {"run": HOSTILE, HOSTILE: HOSTILE, "method": HOSTILE, "damping": HOSTILE, "reranked": HOSTILE},
    }
    bare = {"query": {"prompt": "", "completion": ""}, "results": [], "distribution": {}}
    zero = query("zero", 2) | {"results": [sequence(1, 0.0), sequence(2, 0.0, 0, [])], "opponents": []}
    return report(hostile, hostile, bare, zero, title=HOSTILE, run=HOSTILE + "".join(odd), created=HOSTILE)


class Page(HTMLParser):
    """What a browser's parser makes of the page: elements with their attributes, and the text inside each kind of raw element."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self.text.setdefault(tag, []).append("")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text[tag][-1] += data

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def data(self) -> Any:
        return json.loads(self.text["script"][0])


# ---- what the page is ---------------------------------------------------------------------------------------------------------------


def test_text_is_never_markup() -> None:
    plain, hostile = Page(render_report(report(query("a"), query("b")))), Page(render_report(hostile_report()))
    allowed = {tag for tag, _ in plain.elements} | {"dl", "dt", "dd"}
    assert {tag for tag, _ in hostile.elements} <= allowed
    assert [attributes.get("type") for tag, attributes in hostile.elements if tag == "script"] == ["application/json", None]
    assert not any(key.startswith("on") or key == "src" for _, attributes in hostile.elements for key in attributes)
    assert hostile.text["title"][0] == HOSTILE
    assert all(text.startswith(HOSTILE) for text in hostile.text["title"])  # of shapes in diagrams too
    assert sum(HOSTILE in text for text in hostile.text["p"]) >= 5
    assert HOSTILE in "".join(hostile.text["header"])


def test_page_asks_nothing_of_a_network() -> None:
    source = render_report(report(query("a"), query("b"))).replace("http://www.w3.org/2000/svg", "")  # a name, of which nothing is asked
    page = Page(source)
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "action", "data", "poster", "background", "style", "xlink:href"} & attributes.keys(), (tag, attributes)
        assert re.match(r"#|data:,$", attributes.get("href", "#")), (tag, attributes)
    assert {tag for tag, _ in page.elements}.isdisjoint({"iframe", "object", "embed", "img", "base", "form", "audio", "video"})
    for request in ("http:", "https:", "//www", "url(", "@import", "fetch(", "XMLHttpRequest", "import(", "WebSocket", "sendBeacon"):
        assert request not in source


def test_policy_allows_only_this_style_and_script() -> None:
    page = Page(render_report(hostile_report()))
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == digest(page.text["script"][1])
    assert rules["style-src"] == digest(page.text["style"][0])
    assert "connect-src" not in rules
    assert "unsafe" not in policy


def test_embedded_json_round_trips() -> None:
    data = {HOSTILE: [HOSTILE, "\u2028\u2029", "&amp;", 1.5e-7, None, True, "שלום 🌊"]}
    text = embeddable(data)
    assert json.loads(text) == data
    assert not set("<>&\u2028\u2029") & set(text)
    inside = Page(f'<script type="application/json">{text}</script>')
    assert json.loads(inside.text["script"][0]) == data


def test_equal_reports_give_equal_pages_and_are_not_changed() -> None:
    given = report(query("a"), query("b"))
    before = copy.deepcopy(given)
    assert render_report(given) == render_report(copy.deepcopy(given))
    assert given == before


def test_texts_and_scores_are_there_without_a_script() -> None:
    given = query()
    page = Page(render_report(report(given)))
    paragraphs = page.text["p"]
    for result in given["results"] + given["opponents"]:
        assert result["text"] in paragraphs
        assert words.signed(result["score"]) in "".join(page.text["b"])
    assert "".join([given["query"]["prompt"], given["query"]["completion"]]) in paragraphs


def test_near_duplicates_are_named_beside_the_rank() -> None:
    one = query()
    one["results"][0]["duplicates"] = [{"id": "copy-1", "score": 0.1}, {"id": "copy<2>", "score": 0.1}]
    one["bm25"] = {"overlap": 2, "results": [{"id": "a"}, {"id": "b"}, {"id": "c"}]}
    pages, _ = content(report(one))
    first = pages[0]["helped"][0]
    assert (first["rank"], first["metadata"][-1]) == ("1", ("2 near-duplicates, not shown", "copy-1, copy<2>"))
    html = render_report(report(one))
    assert "2 near-duplicates, not shown" in html
    assert "copy&lt;2&gt;" in html
    assert "2 of the first 3 that BM25 finds are among those that helped." in html


def test_scores_by_run_are_drawn_and_put_in_words() -> None:
    several = query()
    several["results"][0]["runs"] = {"step-100": -0.01, "step-<200>": 0.02, "step-300": 0.0}
    several["provenance"]["averaged_over"] = [{"run": name} for name in several["results"][0]["runs"]]
    page = render_report(report(several))
    (drawn,) = re.findall(r"<svg[^>]*aria-label=\"Score by run:.*?</svg>", page, re.S)
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="5" height="([\d.]+)">', drawn)
    assert [(side, float(y), float(height)) for side, _, y, height in bars] == [("minus", 12, 6), ("plus", 0, 12), ("plus", 12, 0.5)]
    assert "step-&lt;200&gt;: +0.0200 nats" in drawn
    assert "Scores are averages over 3 runs" in page
    assert "Score by run" not in render_report(report(query()))


def test_every_id_is_its_own_and_every_link_has_its_target() -> None:
    for given in (report(query("a"), query("a"), query("b c")), hostile_report()):
        page = Page(render_report(given))
        ids = page.ids()
        assert len(ids) == len(set(ids))
        assert all(re.fullmatch(r"[A-Za-z0-9_.:-]+", name) for name in ids)
        assert {a["href"][1:] for tag, a in page.elements if tag == "a"} <= set(ids)
        assert {column["anchor"] for numbers in page.data()["queries"] for column in numbers["columns"]} <= set(ids)


def test_link_to_a_sequence_does_not_depend_on_what_else_is_on_the_page() -> None:
    alone = Page(render_report(report(query("b", 2)))).ids()
    among = Page(render_report(report(query("a"), query("b", 4)))).ids()
    assert "query-b--train-000001:0" in alone
    assert {name for name in alone if name.startswith("query-b")} <= set(among)


def test_report_without_queries_is_a_page() -> None:
    assert "no queries" in render_report(report())


# ---- what goes in --------------------------------------------------------------------------------------------------------------------


def test_twenty_queries_of_twenty_sequences_of_512_tokens_fit() -> None:
    # 96 layers, and English as byte-level vocabularies cut it: about 4.4 bytes a token.
    layers = [
        f"transformer.h.{block}.{module}" for block in range(24) for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    draw = random.Random(0)
    vocabulary = [" the", ",", ".", " of", " and", " influence", " training", "ing", " harbour", " 1847", "\n", " was", " it's", " a"]
    vocabulary += [" water", " said"]

    def long(seed: int, score: float) -> dict[str, Any]:
        tokens = [[draw.choice(vocabulary), draw.gauss(0, 1e-4)] for _ in range(512)]
        given = {layer: draw.gauss(0, 1e-3) for layer in layers}
        return sequence(seed, score, 1) | {"tokens": tokens, "text": "".join(token for token, _ in tokens), "layers": given}

    def full(name: str) -> dict[str, Any]:
        return query(name, 0) | {"results": [long(j, 0.1) for j in range(10)], "opponents": [long(50 + j, -0.1) for j in range(10)]}

    queries = [full(f"q{i}") for i in range(20)]
    texts = "".join(result["text"] for given in queries for result in given["results"] + given["opponents"])
    assert len(texts.encode()) / (400 * 512) > 4.2
    assert len(render_report(report(*queries)).encode()) <= LIMIT_BYTES


def test_too_large_a_report_is_refused_with_its_size() -> None:
    given = query() | {"results": [{"id": "long", "score": 1.0, "text": "x" * LIMIT_BYTES}]}
    with pytest.raises(ValueError, match=r"2,0\d\d,\d{3} bytes, more than the 2,000,000"):
        render_report(report(given))


@pytest.mark.parametrize("missing", ["query", "results"])
def test_query_without_what_it_needs_is_refused(missing: str) -> None:
    given = query("the-one")
    del given[missing]
    with pytest.raises(ValueError, match=rf"query 'the-one' has no '{missing}'"):
        render_report(report(given))


@pytest.mark.parametrize("where", ["score", "tokens", "layers"])
def test_number_that_is_not_finite_is_refused(where: str) -> None:
    bad = {"score": float("nan"), "tokens": [["x", float("inf")]], "layers": {"h.0": float("-inf")}}
    with pytest.raises(ValueError, match="finite number is needed"):
        render_report(report(query() | {"results": [sequence(0, 1.0) | {where: bad[where]}]}))


def test_histogram_with_a_wrong_number_of_edges_is_refused() -> None:
    with pytest.raises(ValueError, match="3 edges for 3 counts"):
        render_report(report(query(distribution={"histogram": {"edges": [0, 1, 2], "counts": [1, 2, 3]}})))


# ---- what is packed comes back ---------------------------------------------------------------------------------------------------


def unpacked(box: dict[str, Any]) -> list[float]:
    """The values of `packed`, by its docstring."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    values = []
    for first, second in zip(box["codes"][::2], box["codes"][1::2], strict=True):
        bits = 64 * alphabet.index(first) + alphabet.index(second)
        level = bits % 2048
        values.append((-1 if bits >= 2048 else 1) * box["scale"] * 10 ** (-5 * (2047 - level) / 2047) if level else 0.0)
    return values


def test_packed_scores_come_back_to_three_parts_in_a_thousand() -> None:
    draw = random.Random(3)
    given = [draw.choice([-1, 1]) * 10 ** draw.uniform(-4.9, 0) * 7.3e-4 for _ in range(2000)] + [7.3e-4, -7.3e-4]
    # Half a step of the logarithm: 10^(2.5/2047) is 1.0028.
    assert unpacked(packed(given)) == pytest.approx(given, rel=2.9e-3, abs=0)


def test_packed_zeros_and_tiny_scores_are_zero() -> None:
    assert unpacked(packed([])) == []
    assert unpacked(packed([0.0, -0.0])) == [0, 0]
    assert unpacked(packed([1.0, 0.0, 1e-9, -1e-9, 1e-300])) == [1, 0, 0, 0, 0]


def test_widths_are_the_lengths_a_script_counts() -> None:
    pieces = ["a", "", "x" * 9, "x" * 10, "🌊", "x" * 61, "x" * 62, "x" * 500, "שלום", " b", "c"]
    digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    pairs = "".join(chr(code) for code in range(33, 126) if chr(code) not in '"&<>\\')
    lengths, rest = [], iter(spelling.widths(pieces))
    for character in rest:
        if character != "~":
            lengths += [1 + pairs.index(character) // 9, 1 + pairs.index(character) % 9]
            continue
        for _ in range(2):
            length = digit = digits.index(next(rest))
            while digit == 61:
                digit = digits.index(next(rest))
                length += digit
            lengths.append(length)
    assert lengths[: len(pieces)] == [len(piece.encode("utf-16-le")) // 2 for piece in pieces]
    assert not any(lengths[len(pieces) :])


def test_pieces_spell_the_text_where_tokens_cut_characters() -> None:
    tokens = ["She", " \ufffd", "\ufffd", "\ufffd", " waved", "\ufffd", "\ufffd"]
    assert spelling.pieces(tokens, "She 🌊 waved\u00e9") == [("She", 1), (" 🌊", 3), (" waved", 1), ("\u00e9", 2)]


@pytest.mark.parametrize("tokens", [["<bos>", "a", "b"], ["a", "\ufffd", "z"], ["a", "\ufffd"], []])
def test_tokens_that_do_not_spell_the_text_are_taken_at_their_word(tokens: list[str]) -> None:
    found = spelling.pieces(tokens, "ab" if "\ufffd" not in tokens else "x")
    assert found == [(token, 1) for token in tokens]


def test_shown_text_survives_a_parser_and_hides_nothing() -> None:
    everything = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2070), 0xD800, 0xDFFF, 0xFFFD, 0x1F30A]))
    text = spelling.shown(everything)
    assert Page(f"<p>{text.replace('&', '&amp;').replace('<', '&lt;')}</p>").text["p"] == [text]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


# ---- layers and words -----------------------------------------------------------------------------------------------------------


def test_layers_come_in_model_order_even_when_sorted_as_text() -> None:
    names = ["embed", *(f"h.{block}.{module}" for block in range(12) for module in ("attn", "mlp")), "head"]
    sorted_as_text = ["embed", *sorted(names[1:-1]), "head"]
    assert sorted_as_text != names
    assert layer_names.in_model_order(sorted_as_text) == names
    two = [f"{stack}.block.{block}.fc" for stack in ("encoder", "decoder") for block in range(3)]
    assert layer_names.in_model_order(two) == two


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("transformer.h.10.mlp.c_fc", 10, "MLP"),
        ("transformer.h.0.attn.c_proj", 0, "attention"),
        ("model.layers.3.self_attn.o_proj", 3, "attention"),
        ("model.layers.3.mlp.experts.7.gate_proj", 3, "MLP"),
        ("encoder.layer.2.attention.output.dense", 2, "attention"),
        ("encoder.layer.2.intermediate.dense", 2, "MLP"),
        ("params/layers_4/attn/query", 4, "attention"),
        ("transformer.wte", None, "embedding"),
        ("lm_head", None, "head"),
        ("ln_f", None, "normalisation"),
        ("0", 0, "other"),
    ],
)
def test_layer_name_tells_block_and_kind(name: str, block: int | None, kind: str) -> None:
    assert (layer_names.take_apart(name).block, layer_names.kind(name)) == (block, kind)


def test_sums_over_blocks_and_kinds_are_the_scores() -> None:
    results = [sequence(i, score) for i, score in enumerate([0.3, -0.1, 0.02])]
    for group in (layer_names.block_label(LAYERS), layer_names.kind):
        sums = layer_names.signed_sums([result["layers"] for result in results], LAYERS, group)
        assert sum(p + m for _, p, m in sums) == pytest.approx(0.22, abs=1e-12)
        assert all(p >= 0 >= m for _, p, m in sums)
    assert [label for label, _, _ in layer_names.signed_sums([], LAYERS, layer_names.block_label(LAYERS))] == [str(b) for b in range(12)]


def test_names_that_differ_in_their_block_are_one() -> None:
    assert layer_names.with_ranges(["h.0.ln", "h.1.ln", "h.3.ln", "wte", "h.2.norm"]) == ["h.[0–1, 3].ln", "wte", "h.2.norm"]


def test_numbers_keep_three_digits_and_their_sign() -> None:
    given = [0.0312, -3.2, 1e-6, -4.06e-5, 0, 12345.6, 0.00010049]
    assert [words.signed(value) for value in given] == ["+0.0312", "−3.20", "+1.0×10⁻⁶", "−4.1×10⁻⁵", "0", "+12,346", "+0.000100"]
    assert [words.percent(share) for share in (0, 0.0004, 0.34, 0.9996, 1)] == ["0%", "0.04%", "34%", "99.9%", "100%"]


def test_tail_is_put_in_words() -> None:
    tail = query()["distribution"]
    assert words.tail_sentence(tail) == "The top 1% of sequences (20 of 2,000) carry 34% of the positive influence; the top 10% carry 71%."
    assert words.tail_share([[0.0, 0.0], [0.02, 0.5]], 0.01) == pytest.approx(0.25)
    assert words.tail_sentence({"tail": [[0.5, 0.9], [1.0, 1.0]], "num_sequences": 2}) == ""
    assert words.tail_sentence({}) == ""


def test_trust_says_how_an_answer_was_refined() -> None:
    refinement = {"steps": 8, "relative_residual": 0.21, "sequences": 256, "damping": "optimizer"}
    (curvature, *_) = words.trust({"method": "refined", "damping": 0.1, "refinement": refinement})
    for part in ("exact Gauss–Newton Hessian of 256 training sequences", "8 steps", "residual of 0.21", "metric of the optimizer"):
        assert part in curvature
    (curvature, *_) = words.trust({"method": "refined", "refinement": refinement | {"damping": 0.1}})
    assert "damped by 0.1 × each layer’s mean corrected eigenvalue" in curvature


def test_trust_says_what_was_and_was_not_done() -> None:
    base = query()["provenance"]
    said = " ".join(words.trust(base))
    assert all(part in said for part in ("EK-FAC", "block-diagonal", "0.1 ×", "200 candidates", "98%"))
    assert "not recomputed" in " ".join(words.trust(base | {"reranked": None}))
    assert "was not measured" in " ".join(words.trust(base | {"recall_at_10": None}))
    assert "None can have been missed" in " ".join(words.trust(base | {"candidates": 2000, "recall_at_10": None}))
    assert "EK-FAC" not in words.trust({"method": "gradient-dot"})[0]
    assert len(words.trust({})) == 3


# ---- in a browser ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: neither /usr/bin/chromium nor /usr/bin/google-chrome is there")
    from playwright.sync_api import sync_playwright

    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield browser
        browser.close()


class Opened:
    """A report in a browser tab, with what the tab complained of and asked for."""

    def __init__(
        self, browser: Any, folder: Path, given: dict[str, Any], *, width: int = 1200, fragment: str = "", touch: bool = False
    ) -> None:
        path = folder / "report.html"
        path.write_bytes(render_report(given).encode())
        self.tab = browser.new_context(viewport={"width": width, "height": 800}, has_touch=touch, is_mobile=touch).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri() + fragment)

    def tip(self) -> str:
        self.tab.locator("#tip").wait_for(state="visible")
        return str(self.tab.locator("#tip").inner_text())

    def wait_until_spoken(self, text: str) -> None:
        self.tab.locator("#spoken", has_text=text).wait_for(state="attached")


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("hostile", [False, True])
def test_page_fits_its_window_without_a_complaint(chromium: Any, tmp_path: Path, width: int, hostile: bool) -> None:
    opened = Opened(chromium, tmp_path, hostile_report() if hostile else report(query("a"), query("b")), width=width)
    opened.tab.locator("details[data-draw=table] > summary").first.click()
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.tab.evaluate("window.intruded") is None
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.browser
def test_tokens_spell_the_text_and_tell_their_scores(chromium: Any, tmp_path: Path) -> None:
    given = query()
    opened = Opened(chromium, tmp_path, report(given))
    first = given["results"][0]
    text = opened.tab.locator("[id='query-q1--helped'] .text").first
    assert text.evaluate("p => p.textContent") == first["text"]
    strongest, (token, score) = max(enumerate(first["tokens"]), key=lambda pair: abs(pair[1][1]))
    text.locator(".t").nth(strongest).hover()
    tip = opened.tip()
    assert words.signed(score)[:4] in tip
    assert token.replace("\n", "↵") in tip
    assert f"token {strongest + 1}" in tip


@pytest.mark.browser
def test_odd_tokens_keep_their_places(chromium: Any, tmp_path: Path) -> None:
    given = hostile_report()
    opened = Opened(chromium, tmp_path, given)
    tokens = [spelling.shown(token) for token, _ in given["queries"][0]["results"][0]["tokens"]]
    assert (
        opened.tab.locator("[data-query='0'] .sequences > li").first.locator(".t").evaluate_all("all => all.map(t => t.textContent)")
        == tokens
    )


@pytest.mark.browser
def test_heat_map_answers_the_pointer_with_layer_sequence_and_score(chromium: Any, tmp_path: Path) -> None:
    given = query()
    opened = Opened(chromium, tmp_path, report(given))
    cells = opened.tab.locator(".heat .cells")
    cells.scroll_into_view_if_needed()
    frame = cells.bounding_box()
    opened.tab.mouse.move(frame["x"] + 10, frame["y"] + 74 + 5)
    tip = opened.tip()
    expected = given["results"][0]["layers"][LAYERS[0]]
    assert LAYERS[0] in tip
    assert given["results"][0]["id"] in tip
    shown = float(re.match(r"[+−]([\d.]+)", tip.replace("×10", "e"))[1])  # type: ignore[index]
    assert shown == pytest.approx(abs(expected), rel=1e-2)
    assert tip[0] == ("+" if expected > 0 else "−")
    opened.tab.mouse.click(frame["x"] + 10, frame["y"] + 74 + 5)
    assert opened.tab.evaluate("location.hash") == "#query-q1--train-000000:0"
    assert opened.complaints == []


@pytest.mark.browser
def test_every_link_in_the_drawn_page_has_its_target(chromium: Any, tmp_path: Path) -> None:
    opened = Opened(chromium, tmp_path, report(query("a"), query("b")))
    lost = "[...document.querySelectorAll('a[href]')].filter(a => !document.getElementById(a.getAttribute('href').slice(1))).length"
    assert opened.tab.evaluate(lost) == 0
    assert opened.tab.evaluate("document.querySelectorAll('a[href]').length") > 40


@pytest.mark.browser
def test_address_of_a_sequence_opens_the_page_there(chromium: Any, tmp_path: Path) -> None:
    opened = Opened(chromium, tmp_path, report(query("a", num_tokens=300), query("b", num_tokens=300)), fragment="#query-b--train-000001:0")
    assert 0 <= opened.tab.evaluate("document.getElementById('query-b--train-000001:0').getBoundingClientRect().top") < 60


@pytest.mark.browser
def test_long_text_is_an_excerpt_until_it_is_opened(chromium: Any, tmp_path: Path) -> None:
    given = query(num_tokens=300)
    opened = Opened(chromium, tmp_path, report(given))
    item = opened.tab.locator("[id='query-q1--train-000000:0']")
    strongest = max(abs(score) for _, score in given["results"][0]["tokens"])
    assert strongest > 0
    assert item.locator(".t").count() < 110
    item.get_by_role("button", name="Show all 300 tokens").click()
    assert item.locator(".t").count() == 300
    assert item.locator(".text").evaluate("p => p.textContent") == given["results"][0]["text"]
    item.get_by_role("button", name="Show less").click()
    assert item.locator(".t").count() < 110


@pytest.mark.browser
def test_keyboard_reads_tokens_and_cells(chromium: Any, tmp_path: Path) -> None:
    given = query()
    opened = Opened(chromium, tmp_path, report(given))
    opened.tab.locator(".sequences .text").first.focus()
    opened.tab.keyboard.press("ArrowRight")
    opened.wait_until_spoken("token 1")
    opened.tab.locator(".heat").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        opened.tab.keyboard.press(key)
    opened.wait_until_spoken(f"{LAYERS[1]}, rank 2")
    opened.tab.keyboard.press("Enter")
    assert opened.tab.evaluate("location.hash") == "#query-q1--train-000001:0"


@pytest.mark.browser
def test_finger_reads_a_cell_and_follows_it(chromium: Any, tmp_path: Path) -> None:
    opened = Opened(chromium, tmp_path, report(query()), width=375, touch=True, fragment="#query-q1--layers")
    frame = opened.tab.locator(".heat .cells").bounding_box()
    opened.tab.touchscreen.tap(frame["x"] + 5, frame["y"] + 74 + 30)
    assert "transformer.h.0" in opened.tip()
    opened.tab.locator("#tip a").tap()
    opened.tab.wait_for_url(re.compile("#query-q1--train"))


@pytest.mark.browser
def test_table_of_layers_holds_the_scores(chromium: Any, tmp_path: Path) -> None:
    given = query()
    opened = Opened(chromium, tmp_path, report(given))
    opened.tab.locator("details[data-draw=table] > summary").click()
    rows = opened.tab.locator("details[data-draw=table] tbody tr")
    rows.nth(len(LAYERS)).wait_for()  # the table is drawn after the click has returned
    assert rows.count() == len(LAYERS) + 1
    assert rows.nth(3).locator("th").inner_text() == LAYERS[3]
    # One power of ten for the whole table, and four decimals.
    unit = 1e-2 if "10⁻² nats" in opened.tab.locator("details[data-draw=table] thead th").first.inner_text() else 1.0
    last = [float(cell.replace("−", "-")) * unit for cell in rows.last.locator("td").all_inner_texts()]
    assert last[:4] == pytest.approx([result["score"] for result in given["results"]], abs=0.5e-4 * unit + 1e-12)
