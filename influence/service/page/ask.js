// The form: from what stands in its fields to the body of a query, and back.

import * as api from "./api.js";
import { byId } from "./dom.js";
import { SpanChooser } from "./span.js";

const TYPING_MILLISECONDS = 250;
const NARROWING = ["contrast", "where", "layers", "candidates", "also", "input_ids"];
const SWITCHES = ["normalize", "exact", "refine", "by_output_token"]; // beside bm25, which is on at first
const list = (text) => text.split(",").map((one) => one.trim()).filter(Boolean);

export class AskForm {
  #typing = null;
  #asking = null;
  #wanted = null; // a span for tokens that are not there yet

  // `run()` is the name of the run; `asked(body)` is called when the form is sent.
  constructor(run, asked) {
    this.run = run;
    this.chooser = new SpanChooser(byId("span"), byId("span-said"), () => this.#summary());
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      asked(this.body());
    });
    for (const id of ["prompt", "completion"]) {
      byId(id).addEventListener("input", () => this.#typed());
      byId(id).addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && byId("ask").requestSubmit());
    }
    for (const id of ["contrast", "input_ids"]) byId(id).addEventListener("input", () => this.#contrasted());
    byId("options").addEventListener("input", () => this.#summary());
    byId("add-space").addEventListener("click", () => {
      byId("completion").value = ` ${byId("completion").value}`;
      byId("completion").focus();
      this.#typed();
    });
  }

  body() {
    const value = (id) => byId(id).value;
    const ids = list(value("input_ids")).map((id) => (Number.isInteger(Number(id)) ? Number(id) : id));
    const body = { ...(ids.length ? { input_ids: ids } : { prompt: value("prompt"), completion: value("completion") }), both_ends: true };
    if (ids.length) {
      // every token counts, and there is no text to put another beside
    } else if (value("contrast")) body.contrast = value("contrast");
    else if (this.chooser.span) body.span = this.chooser.span;
    if (value("where").trim()) body.where = value("where").trim();
    for (const id of ["layers", "also"]) if (list(value(id)).length) body[id] = list(value(id));
    if (value("candidates")) body.candidates = Number(value("candidates"));
    const k = Number(value("k"));
    if (k !== 10) body.k = Number.isInteger(k) ? k : value("k");
    for (const id of [...SWITCHES, "bm25"]) if (byId(id).checked) body[id] = true;
    return body;
  }

  // Fills the fields from a body or an address; what is not in it is as at first.
  fill(given) {
    byId("prompt").value = given.prompt ?? "";
    byId("completion").value = given.completion ?? given.text ?? "";
    byId("contrast").value = given.contrast ?? "";
    byId("where").value = given.where ?? "";
    for (const id of ["layers", "also", "input_ids"]) byId(id).value = (given[id] ?? []).join(", ");
    byId("candidates").value = given.candidates ?? "";
    byId("k").value = given.k ?? 10;
    for (const id of [...SWITCHES, "bm25"]) byId(id).checked = Boolean(given[id]);
    this.#wanted = given.span ?? null;
    this.chooser.set([]);
    if (NARROWING.some((name) => given[name]?.length || given[name] > 0) || SWITCHES.some((name) => given[name])) byId("options").open = true;
    this.#contrasted();
    return this.#tokenize();
  }

  // What is known of the run: how its metadata can be named, and its limits; and which other runs are served.
  describe(facts, others = []) {
    const columns = facts?.metadata ?? [];
    byId("where").disabled = !columns.length;
    byId("where").placeholder = columns.length ? `${columns[0]} = '…'` : "";
    byId("where-hint").textContent = columns.length ? `Columns: ${columns.join(", ")}. Also and, or, not, in, like, <, is null.` : "This run keeps no metadata to filter by.";
    byId("also").disabled = !others.length;
    byId("also-hint").textContent = others.length ? `Of the same sequences: ${others.slice(0, 8).join(", ")}${others.length > 8 ? ", …" : ""}.` : "No other run is served.";
    byId("candidates").max = facts?.limits?.candidates ?? 2000;
    byId("k").max = facts?.limits?.k ?? 100;
    return this.#tokenize();
  }

  #typed() {
    this.#wanted = null;
    clearTimeout(this.#typing);
    this.#typing = setTimeout(() => this.#tokenize(), TYPING_MILLISECONDS);
  }

  async #tokenize() {
    clearTimeout(this.#typing);
    this.#asking?.abort();
    const [prompt, completion] = [byId("prompt").value, byId("completion").value];
    byId("completion-hint").hidden = !prompt || !completion || /\s$/.test(prompt) || /^[\s\p{P}]/u.test(completion);
    if (!completion || !this.run()) return this.chooser.set([]);
    this.#asking = new AbortController();
    try {
      const found = await api.tokens(this.run(), prompt, completion, this.#asking.signal);
      const same = JSON.stringify(found.completion) === JSON.stringify(this.chooser.tokens);
      this.chooser.set(found.completion, this.#wanted ?? (same ? this.chooser.span : null));
      this.#summary();
    } catch {
      if (byId("completion").value === completion) this.chooser.set([]); // sending the question will say what is wrong
    }
  }

  #contrasted() {
    this.chooser.disable(byId("contrast").value ? "All tokens count: a contrast compares whole completions." : false);
    const ids = Boolean(byId("input_ids").value.trim());
    for (const id of ["prompt", "completion", "contrast"]) byId(id).disabled = ids;
    byId("span").parentElement.hidden = ids || !this.chooser.tokens.length;
    this.#summary();
  }

  #summary() {
    const set = [...NARROWING.filter((id) => byId(id).value), ...SWITCHES.filter((id) => byId(id).checked)].map((id) => id.replaceAll("_", " "));
    byId("options-said").textContent = set.length ? `· ${set.join(", ")}` : "";
  }
}
