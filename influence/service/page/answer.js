// An answer: the question, both ends of the ranking beside what BM25 finds, where in the model, and what it rests on. And two answers side by side.

import * as address from "./address.js";
import * as api from "./api.js";
import { html, number, percent, plural, signed, svg } from "./dom.js";
import { csv, save } from "./download.js";
import { map, table } from "./layers.js";
import { ends, shown } from "./result.js";
import { lexical, open, ranked, scaleOf } from "./sequences.js";
import { asked } from "./tokens.js";

const short = (text, most = 60) => (text.length > most ? `${text.slice(0, most - 1).trimEnd()}…` : text);
const named = (query) => `“${short((query.result.query.completion || query.result.query.prompt || "").trim())}”`;
export const question = (query) => ({ ...query.request, run: query.run, completion: query.request.completion ?? query.request.text });

const byOutput = (query) => (query.result.provenance.tokens_by === "output" ? "learning to predict" : "reading");

// What the numbers are of, in one or two sentences.
function caption(query) {
  const { query: asked, unit } = query.result;
  const { request } = query;
  const counted = asked.token_log_probabilities.filter((value) => value !== null);
  const parts = asked.queries
    ? ["Log-probability ", html("b", {}, `${number(asked.log_probability)} nats`), `, the ${asked.completion}.`]
    : asked.contrast === undefined
    ? ["Log-probability ", html("b", {}, `${number(asked.log_probability)} nats`), ` over ${plural(counted.length, "token")}`, counted.length > 1 ? `, a geometric mean of ${number(Math.exp(asked.log_probability / counted.length))} a token.` : "."]
    : ["Rather than ", html("b", {}, `“${short(asked.contrast)}”`), ": the log-probabilities differ by ", html("b", {}, `${signed(asked.log_probability)} nats`), "."];
  const narrowed = [
    asked.span ? `Only ${(Array.isArray(asked.span[0]) ? asked.span : [asked.span]).map(([from, to]) => (to - from === 1 ? `token ${to}` : `tokens ${from + 1} to ${to}`)).join(", ")} of the completion.` : "",
    asked.queries ? `Asked as one: ${asked.queries.slice(0, 5).map((one) => `“${short((one.completion ?? "").trim(), 30)}”`).join(", ")}${asked.queries.length > 5 ? ", …" : ""}.` : "",
    request.where ? `Only sequences where ${request.where}.` : "",
    request.layers?.length ? `Only layers ${request.layers.join(", ")}.` : "",
    unit === "√nats" ? "Scores are normalized: divided by the square root of each sequence’s influence on itself." : "",
  ].filter(Boolean);
  return html("p", { class: "caption" }, ...parts, " ", narrowed.join(" "));
}

function toolbar(query, words, actions) {
  const file = `influence-${query.run}-${query.id.slice(0, 8)}`;
  const button = (text, onclick) => html("button", { type: "button", onclick }, text);
  return html("div", { class: "toolbar", role: "group", "aria-label": "Keep, share, compare" },
    button("JSON", () => save(`${file}.json`, JSON.stringify(query.result, null, 2), "application/json")),
    button("CSV", () => save(`${file}.csv`, csv(query), "text/csv;charset=utf-8")),
    button("HTML report", () => actions.guard(async () => save(`${file}.html`, await api.report(query.id), "text/html"))),
    html("a", { class: "button", href: address.write({ run: query.run, query: query.id }) }, "Link to this answer"),
    html("a", { class: "button", href: address.write(question(query)) }, "Link to the question"),
    button("Compare with another question", () => actions.compare(query)),
    ...(query.request.input_ids ? [] : actions.runs.filter((name) => name !== query.run).map((name) => button(`Compare with run ${name}`, () => actions.compareRun(query, name)))));
}

// Where the two kinds of search agree, said at each sequence.
const place = (helped, hurt) => (id) => {
  for (const [side, sequences] of [["helped", helped], ["hurt", hurt]]) {
    const found = sequences?.find((one) => one.id === id || one.duplicates.some((other) => other.id === id));
    if (found) return html("span", { class: "shared" }, `${side}, rank ${found.rank}`);
  }
  return null;
};

function columns(query, prefix, scale, words, note) {
  const { unit, bm25 } = query.result;
  const { helped, hurt } = ends(query);
  const column = (id, title, text, list) => html("section", { class: "end", "aria-labelledby": `${prefix}-${id}` }, html("h3", { id: `${prefix}-${id}`, tabindex: -1 }, title), html("p", { class: "caption" }, text), list);
  const none = html("p", { class: "none" }, "No sequence: nothing in the run fulfils the condition.");
  return [
    helped && column("for", "Made it more likely", `${plural(helped.length, "training sequence")} with the highest scores. Red: ${byOutput(query)} this token helped. The bars split a score by layer, the first at the left.`, helped.length ? ranked(query.run, helped, unit, scale, `${prefix}-helped`, note) : none),
    hurt && column("against", "Made it less likely", `${plural(hurt.length, "training sequence")} with the lowest scores. Teal, underlined: ${byOutput(query)} this token hurt.`, hurt.length ? ranked(query.run, hurt, unit, scale, `${prefix}-hurt`, note) : none.cloneNode(true)),
    bm25 ? column("words", "Shares its words", bm25.results.length ? `What a search for the words finds (BM25). ${words.bm25}` : "No sequence shares a word with it.", lexical(query.run, bm25.results, place(helped, hurt))) : null,
  ];
}

function whereInTheModel(query, prefix) {
  const { unit } = query.result;
  const [helped, hurt] = Object.values(ends(query)).map((sequences) => sequences ?? []);
  if (!helped.length && !hurt.length) return null;
  const go = (one) => {
    const item = document.getElementById(`${prefix}-${helped.includes(one) ? "helped" : "hurt"}-${one.rank}`);
    item.scrollIntoView({ block: "start" });
    item.focus({ preventScroll: true });
  };
  const numbers = html("details", {}, html("summary", {}, "These numbers as a table"));
  numbers.addEventListener("toggle", () => numbers.children.length < 2 && numbers.append(html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Scores by layer and sequence" }, table(helped, hurt, unit))));
  return html("section", { class: "model", "aria-labelledby": `${prefix}-model` }, html("h3", { id: `${prefix}-model` }, "Where in the model"),
    html("p", { class: "caption" }, "Each column is a sequence above, each row a layer, the first at the top. Click a column to go to its sequence."), map(helped, hurt, unit, go), numbers);
}

function restsOn(query, prefix, words) {
  const { coverage, provenance } = query.result;
  const share = coverage.parameters_attributed;
  const excluded = Object.entries(coverage.excluded ?? {});
  const facts = Object.entries(provenance).map(([key, value]) => [key.replaceAll("_", " "), value === null ? "not measured" : typeof value === "object" ? JSON.stringify(value) : String(value)]);
  return html("section", { class: "rests", "aria-labelledby": `${prefix}-rests` }, html("h3", { id: `${prefix}-rests` }, "What this rests on"),
    html("div", { class: "prose" }, html("p", {}, words.trust.join(" ")), words.distribution ? html("p", {}, words.distribution) : null),
    html("div", { class: "coverage" }, shareBar(share),
      html("p", { class: "caption" }, html("b", {}, percent(share)), ` of the model’s parameters are attributed.${share < 1 ? " What training did to the rest is not in these scores." : ""}`),
      excluded.length ? html("details", {}, html("summary", {}, `${plural(excluded.length, "module")} left out`), html("dl", { class: "facts" }, ...excluded.map(([name, why]) => html("div", {}, html("dt", {}, name), html("dd", {}, why))))) : null),
    html("details", {}, html("summary", {}, "Provenance"), html("dl", { class: "facts" }, ...facts.map(([key, value]) => html("div", {}, html("dt", {}, key), html("dd", {}, value))))));
}

const shareBar = (share) => svg("svg", { class: "share", viewBox: "0 0 100 4", preserveAspectRatio: "none", role: "img", "aria-label": `${percent(share)} of the parameters are attributed` },
  svg("rect", { class: "ground", width: 100, height: 4 }), svg("rect", { class: "part", width: 100 * share, height: 4 }));

const head = (query, id) => [html("p", { class: "eyebrow" }, `Run ${query.run}`), html("h2", { id, tabindex: -1 }, "What led to ", html("bdi", {}, named(query)))];

export function answer(query, words, actions) {
  const beside = columns(query, "a", scaleOf(shown(query)), words).filter(Boolean);
  return html("article", { class: "answer", "aria-labelledby": "answer-heading" },
    html("header", { class: "lead" }, head(query, "answer-heading"), asked(query.result.query), caption(query), toolbar(query, words, actions)),
    html("div", { class: `ends of-${beside.length}` }, ...beside), html("div", { class: "below" }, whereInTheModel(query, "a"), restsOn(query, "a", words)));
}

// ---- two answers -----------------------------------------------------------------------------------------------------

const scores = (sequences) => new Map(sequences.flatMap((one) => [[one.id, one], ...one.duplicates.map(({ id }) => [id, one])]));

// [id, side, sequence on the left, sequence on the right] of every sequence that both answers show, the strongest on the left first.
function shared(left, right) {
  const sides = (query) => Object.entries(ends(query)).flatMap(([side, all]) => [...scores(all ?? [])].map(([id, one]) => [id, { side, one }]));
  const there = new Map(sides(right));
  const both = sides(left).filter(([id]) => there.has(id)).map(([id, here]) => [id, here, there.get(id)]);
  return both.sort(([, a], [, b]) => Math.abs(b.one.score) - Math.abs(a.one.score));
}

function sharedTable(left, right) {
  const both = shared(left, right);
  const sentence = both.length ? `${plural(both.length, "training sequence")} ${both.length === 1 ? "is" : "are"} in both answers.` : "No training sequence is in both answers: the model seems to draw on different examples.";
  const other = left.result.provenance.data !== right.result.provenance.data ? " The runs have different training data, so that equal names may be different texts." : "";
  const cell = ({ side, one }, unit) => html("td", { class: side === "hurt" ? "minus" : "plus" }, `${signed(one.score)} ${unit} `, html("small", {}, `rank ${one.rank}`));
  return html("section", { class: "shared-by-both", "aria-labelledby": "shared-heading" }, html("h3", { id: "shared-heading" }, "In both"), html("p", { class: "caption" }, sentence + other),
    both.length ? html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Sequences in both answers" }, html("table", {}, html("thead", {}, html("tr", {}, ...["Training sequence", "Left", "Right", "Text"].map((text) => html("th", { scope: "col" }, text)))),
      html("tbody", {}, ...both.map(([id, a, b]) => html("tr", {}, html("th", { scope: "row" }, html("button", { type: "button", class: "name", onclick: () => open(left.run, id) }, id)), cell(a, left.result.unit), cell(b, right.result.unit), html("td", { dir: "auto" }, a.one.text)))))) : null);
}

export function comparison(left, right, words, actions) {
  const all = [left, right].map(shown);
  const same = left.result.unit === right.result.unit && left.run === right.run;
  const scales = same ? [scaleOf(all.flat()), scaleOf(all.flat())] : all.map(scaleOf);
  const both = new Set(shared(left, right).map(([id]) => id));
  const note = (id) => (both.has(id) ? html("span", { class: "shared" }, "in both") : null);
  const side = (query, i) => html("article", { class: "answer", "aria-labelledby": `answer-heading-${i}` },
    html("header", { class: "lead" }, head(query, `answer-heading-${i}`), asked(query.result.query), caption(query),
      html("a", { class: "button", href: address.write({ run: query.run, query: query.id }) }, "This one alone")),
    ...columns(query, `c${i}`, scales[i], words[i], note), whereInTheModel(query, `c${i}`), restsOn(query, `c${i}`, words[i]));
  return html("div", { class: "comparison" },
    html("header", { class: "lead" }, html("p", { class: "eyebrow" }, left.run === right.run ? "Two questions" : "Two runs"), html("h2", { id: "answer-heading", tabindex: -1 }, "Side by side"),
      html("p", { class: "caption" }, same ? "Bars and colours are on one scale." : "Each side has a scale of its own."),
      html("div", { class: "toolbar" }, html("button", { type: "button", onclick: () => actions.compare(left) }, "Compare the left one with another question"))),
    sharedTable(left, right), html("div", { class: "two" }, side(left, 0), side(right, 1)));
}
