// Training sequences: the two ends of a ranking, what BM25 finds, and one of them opened to its whole document.

import * as api from "./api.js";
import { byId, html, largest, plural, signed, svg, whole } from "./dom.js";
import { bars } from "./layers.js";
import { highlighted } from "./tokens.js";

const MOST_PARTS = 40; // sequences of a document that are fetched at once

const metadata = (given) => Object.entries(given ?? {}).map(([key, value]) => html("span", {}, html("i", {}, key), " ", typeof value === "string" ? value : JSON.stringify(value)));
const name = (run, id) => html("button", { type: "button", class: "name", title: "Read the whole document", "aria-label": `${id}: read the whole document`, onclick: () => open(run, id) }, id);

// A ranked list. `scale`: {score, token, layer}, the largest of each over all that is shown; `note(id)`: what else to say of a sequence, or null.
export function ranked(run, sequences, unit, scale, anchor, note = () => null) {
  return html("ol", { class: "sequences" }, ...sequences.map((one) => html("li", { id: `${anchor}-${one.rank}`, tabindex: -1, "data-id": one.id },
    meter(one.score, scale.score),
    html("header", {}, html("span", { class: "rank" }, one.rank), html("b", { class: one.score < 0 ? "minus" : "plus" }, signed(one.score), " ", html("small", {}, unit)),
      name(run, one.id), metadata(one.metadata), one.bm25_rank ? html("span", {}, `BM25 rank ${whole(one.bm25_rank)}`) : null, one.documents?.length === 1 ? origin(one.documents, unit) : null, byRun(one), note(one.id)),
    ...(one.text ? highlighted(one, scale.token, unit) : [html("p", { class: "none" }, "(no text)")]),
    bars(one, scale.layer, unit),
    one.documents?.length > 1 ? origin(one.documents, unit) : null,
    duplicates(run, one, unit))));
}

// Which part of its document a sequence is, or which documents are in it and what each adds; nothing of a whole document.
function origin(parts, unit) {
  if (!parts?.length || (parts.length === 1 && parts[0].windows === 1)) return null;
  const place = (part) => [part.id, part.span ? `characters ${whole(part.span[0])}–${whole(part.span[1])}` : null, part.windows > 1 ? `part ${part.window} of ${part.windows}` : null].filter(Boolean).join(", ");
  if (parts.length === 1) return html("span", {}, html("i", {}, "part of"), ` ${place(parts[0])}`);
  return html("details", { class: "folded" }, html("summary", {}, `${parts.length} documents in it`),
    html("ul", {}, ...parts.map((part) => html("li", {}, `${place(part)}: ${signed(part.score)} ${unit}`))));
}

// The score by each run, when several were averaged.
function byRun(one) {
  if (!one.runs) return null;
  return html("span", {}, html("i", {}, "by run"), " ", Object.entries(one.runs).map(([name, score]) => `${name} ${signed(score)}`).join(", "));
}

function meter(score, most) {
  const width = most ? (100 * Math.abs(score)) / most : 0;
  return svg("svg", { class: "size", viewBox: "0 0 100 2", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("rect", { class: score < 0 ? "hurt" : "helped", width: width.toFixed(2), height: 2 }));
}

function duplicates(run, one, unit) {
  if (!one.duplicates?.length) return null;
  return html("details", { class: "folded" }, html("summary", {}, `${plural(one.duplicates.length, "near-duplicate")} with it`),
    html("ul", {}, ...one.duplicates.map(({ id, score }) => html("li", {}, name(run, id), ` ${signed(score)} ${unit}`))));
}

export const scaleOf = (sequences) => ({
  score: largest(sequences.map((one) => one.score)),
  token: largest(sequences.flatMap((one) => one.tokens.map(([, score]) => score))),
  layer: largest(sequences.flatMap((one) => Object.values(one.layers))),
});

// What lexical search would have answered; `place(id)` says where influence has it, or null.
export function lexical(run, found, place) {
  return html("ol", { class: "sequences plain" }, ...found.map((one, i) => html("li", {},
    html("header", {}, html("span", { class: "rank" }, i + 1), html("b", {}, one.score.toFixed(1), " ", html("small", {}, "BM25")), name(run, one.id), place(one.id)),
    html("p", { class: "text clamped", dir: "auto" }, one.text))));
}

// Opens the dialog with the sequence's document.
export async function open(run, id) {
  const dialog = byId("document");
  const body = byId("document-body");
  byId("document-name").textContent = id;
  body.replaceChildren(html("p", { class: "none" }, "Opening…"));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  try {
    const found = await api.sequence(run, id);
    body.replaceChildren(...shown(run, found));
    await surroundings(run, found, body.querySelector(".document"));
  } catch (error) {
    body.replaceChildren(html("p", { class: "problem" }, error.status === 404 ? "This sequence is no longer in the run: it was removed." : error.message));
  }
}

function shown(run, found) {
  const others = found.sequences_of_document.length;
  const facts = [["run", run], ["document", found.document], ["tokens", whole(found.num_tokens)], ...Object.entries(found.metadata)];
  return [
    html("dl", { class: "facts" }, ...facts.map(([key, value]) => html("div", {}, html("dt", {}, key), html("dd", {}, typeof value === "string" ? value : JSON.stringify(value))))),
    html("p", { class: "caption" }, others > 1 ? `The document was cut into ${others} sequences; the one that was scored is marked.` : "The sequence is the whole document."),
    html("div", { class: "document text", dir: "auto" }, html("mark", {}, found.text)),
  ];
}

// The other sequences of the document around the one that is there, as many as may be fetched at once.
async function surroundings(run, found, box) {
  const ids = found.sequences_of_document;
  const at = ids.indexOf(found.id);
  const from = Math.max(0, Math.min(at - MOST_PARTS / 2, ids.length - MOST_PARTS));
  const near = ids.slice(from, from + MOST_PARTS);
  if (near.length < 2) return;
  const texts = await Promise.all(near.map((id) => (id === found.id ? found : api.sequence(run, id))));
  box.replaceChildren(from > 0 ? "… " : "", ...texts.map((one) => html(one.id === found.id ? "mark" : "span", {}, one.text)), from + near.length < ids.length ? " …" : "");
  box.querySelector("mark").scrollIntoView({ block: "center" });
}
