// What stands below the form before anything is asked: the run, questions to try, and what was asked before.

import * as address from "./address.js";
import * as api from "./api.js";
import { html, percent, plural, whole } from "./dom.js";
import { save } from "./download.js";

// The run in plain words: how much is searched, how much is covered, how good its index was measured to be.
function inWords(facts) {
  const { coverage, fidelity } = facts;
  const said = [`${plural(facts.sequences, "training sequence")} ${facts.sequences === 1 ? "is" : "are"} searched, each of at most ${whole(facts.sequence_length)} tokens.`];
  if (coverage) said.push(`Scores cover ${percent(coverage.parameters_attributed)} of the model’s parameters, in ${plural(coverage.layers, "layer")}.`);
  const depths = fidelity?.rankings?.proponents?.recall?.["10"];
  const deepest = depths && ["200", "100", "50"].find((depth) => depths[depth] !== undefined);
  if (deepest) said.push(`When the index was built, ${percent(depths[deepest])} of the true ten best were among its first ${deepest}, over ${plural(fidelity.queries, "trial question")}.`);
  else said.push("How often the index finds the true best was not measured.");
  return said.join(" ");
}

function card(run, example) {
  return html("a", { class: "card", href: address.write({ run, prompt: example.prompt, completion: example.completion, bm25: true }) },
    html("span", { class: "text", dir: "auto" }, example.prompt.length > 160 ? `…${example.prompt.slice(-160)}` : example.prompt, html("b", {}, example.completion)));
}

function asked(query) {
  const { prompt = "", completion, text } = query.request;
  const words = completion ?? text;
  const label = words === undefined ? [html("i", {}, "tokens")] : [prompt.slice(-60), html("b", {}, words.slice(0, 60))];
  return html("li", {}, html("a", { href: address.write({ run: query.run, query: query.id }), dir: "auto" }, ...label), " ",
    html("small", {}, `${query.run}, ${new Date(1000 * query.created).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })}${query.state === "done" ? "" : `, ${query.state}`}`));
}

// `guard(job)` does something that may fail, and tells when it does.
export async function home(facts, seed, guard) {
  if (!facts) return html("section", { class: "home" }, html("h2", {}, "No run is served"), html("p", {}, "Start the service with a finished run: ", html("code", {}, "influence serve RUN"), "."));
  if (facts.state === "unusable") return html("section", { class: "home" }, html("h2", {}, `Run ${facts.name} cannot be asked`), html("p", { class: "problem" }, facts.error));
  const [examples, before] = await Promise.all([api.examples(facts.name, 6, seed).catch(() => []), api.latest(8).catch(() => [])]);
  return html("div", { class: "home" },
    html("section", { "aria-labelledby": "try-heading" }, html("h2", { id: "try-heading" }, "Try one of these"),
      html("p", { class: "caption" }, "Training sequences cut in two: what made the model go on like this? The sequence itself ought to be found."),
      examples.length ? html("div", { class: "cards" }, ...examples.map((example) => card(facts.name, example))) : html("p", { class: "none" }, "This run has no text to make questions of.")),
    html("div", { class: "two" },
      html("section", { "aria-labelledby": "run-heading" }, html("h2", { id: "run-heading" }, "Run ", html("bdi", {}, facts.name)), html("p", { class: "prose" }, inWords(facts)),
        html("div", { class: "toolbar" },
          html("button", { type: "button", onclick: () => guard(async () => save(`influence-${facts.name}.html`, await api.runReport(facts.name), "text/html")) }, "Report on this run"),
          facts.health ? html("button", { type: "button", onclick: () => guard(async () => save(`influence-${facts.name}-training-set.html`, await api.runReport(facts.name, "training-set"), "text/html")) }, "Report on its training set") : "")),
      html("section", { "aria-labelledby": "before-heading" }, html("h2", { id: "before-heading" }, "Asked before"),
        before.length ? html("ul", { class: "before" }, ...before.map(asked)) : html("p", { class: "none" }, "Nothing yet."))));
}
