// Ties the page together: the address says what is shown, and whatever is asked ends in a new address.

import * as address from "./address.js";
import * as api from "./api.js";
import { answer, comparison, question } from "./answer.js";
import { AskForm } from "./ask.js";
import { byId, html, plural, say, whole } from "./dom.js";
import { home } from "./home.js";
import { explained } from "./problems.js";
import { listen } from "./tips.js";

const known = new Map(); // finished queries of this visit, by id
let served = []; // facts of all runs
let left = null; // the answer that the next one is to be compared with
let work = null; // AbortController of what is under way
let seed = Math.floor(Math.random() * 2 ** 31);

const chosen = () => served.find((facts) => facts.name === byId("run").value);
const form = new AskForm(() => byId("run").value, (body) => guard(() => ask(byId("run").value, body, left?.id)));

// ---- work under way, and what goes wrong -------------------------------------------------------------------------------

// Does it; what goes wrong is told, and where trying again may help, offered again. What was under way before is given up.
async function guard(job) {
  work?.abort();
  const mine = (work = new AbortController());
  byId("problem").hidden = true;
  try {
    await job(mine.signal);
  } catch (error) {
    if (error.name === "AbortError" || mine !== work) return;
    if (error.status === 401) return signIn(() => guard(job));
    if (!(error instanceof api.ApiError)) console.error(error);
    tell(error, () => guard(job));
  } finally {
    if (mine === work) rest();
  }
}

function rest() {
  byId("work").hidden = true;
  byId("main").removeAttribute("aria-busy");
}

function tell(error, again) {
  const problem = explained(error);
  const retry = html("button", { type: "button", onclick: again }, "Try again");
  byId("problem").replaceChildren(html("h2", {}, problem.title), html("p", {}, problem.text), problem.again ? retry : "");
  byId("problem").hidden = false;
  byId("problem").scrollIntoView({ block: "nearest" });
}

// Shows how far the work is; says it aloud at each quarter.
function progress(said, { done = 0, total = 0 } = {}) {
  const bar = byId("work-bar");
  if (total) Object.assign(bar, { max: total, value: done });
  else bar.removeAttribute("value");
  const text = total ? `${said} ${whole(done)} of ${whole(total)}` : said;
  const quarter = total ? `${said} ${25 * Math.floor((4 * done) / total)}%` : said;
  if (byId("work").hidden || byId("work").dataset.told !== quarter) say(quarter);
  byId("work").dataset.told = quarter;
  byId("work-said").textContent = text;
  byId("work").hidden = false;
  byId("main").setAttribute("aria-busy", "true");
}

// ---- asking and showing ------------------------------------------------------------------------------------------------

async function ask(run, body, beside, replace = false) {
  progress("Asking…");
  const stop = work;
  byId("cancel").onclick = () => (stop.abort(), rest(), say("Cancelled"));
  const query = await api.ask(run, body, stop.signal);
  if (query.result) known.set(query.id, query);
  go({ run, query: query.id, with: beside }, replace);
}

function go(place, replace = false) {
  const to = address.write(place);
  if (to === location.hash) return void route();
  if (replace) {
    history.replaceState(null, "", to);
    route();
  } else location.hash = to;
}

// The query of this id, once it is finished.
async function fetched(id, signal) {
  if (known.has(id)) return known.get(id);
  let query = await api.state(id, signal);
  if (query.state !== "done") {
    byId("cancel").onclick = () => api.cancel(id).catch((error) => tell(error, () => {}));
    query = await api.finished(query, { signal, progress: (at) => progress(at.state === "queued" ? "Waiting in the queue…" : "Working…", at.state === "queued" ? {} : at.progress) });
  }
  known.set(id, query);
  return query;
}

async function show(place, signal) {
  const [query, beside] = [await fetched(place.query, signal), place.with ? await fetched(place.with, signal) : null];
  const words = await Promise.all([beside, query].filter(Boolean).map((one) => api.words(one.id)));
  byId("run").value = query.run;
  void form.fill(question(query));
  byId("main").replaceChildren(beside ? comparison(beside, query, words, actions) : answer(query, words[0], actions));
  document.title = `“${(query.result.query.completion ?? "").trim().slice(0, 40)}” in ${query.run} · influence`;
  byId("answer-heading").focus({ preventScroll: true });
  byId("main").scrollIntoView({ block: "start" });
  say(`The answer is here: ${plural(query.result.results.length, "sequence")}.`);
}

const actions = {
  guard,
  runs: [],
  compare(query) {
    left = query;
    compared();
    form.fill(question(query));
    byId("completion").focus();
    byId("completion").select();
  },
  compareRun: (query, run) => guard(() => ask(run, query.request, query.id)),
};

// Says in the form what the next answer is compared with.
function compared() {
  const box = byId("comparing");
  box.hidden = !left;
  if (!left) return;
  const never = html("button", { type: "button", class: "link", onclick: () => ((left = null), compared()) }, "Do not compare");
  box.replaceChildren("The next answer stands beside ", html("b", {}, `“${(left.result.query.completion ?? "").trim().slice(0, 40)}”`), ". ", never);
}

function route() {
  return guard(async (signal) => {
    const place = address.read();
    if (served.some((facts) => facts.name === place.run)) byId("run").value = place.run;
    void form.describe(chosen(), actions.runs.filter((name) => name !== byId("run").value));
    left = null;
    compared();
    if (place.query) return show(place, signal);
    if (address.asks(place)) {
      const { run = byId("run").value, ...body } = place;
      void form.fill(body);
      return ask(run, { ...(body.input_ids ? {} : { prompt: "" }), both_ends: true, ...body }, undefined, true);
    }
    document.title = "influence: which training examples made this model say that?";
    byId("main").replaceChildren(await home(chosen(), seed, guard));
  });
}

async function surprise() {
  seed = Math.floor(Math.random() * 2 ** 31);
  const run = byId("run").value;
  const [{ prompt, completion } = {}] = await api.examples(run, 1, seed);
  if (completion === undefined) throw new api.ApiError(404, "not_found", "this run has no text to make a question of");
  form.fill({ prompt, completion, bm25: true });
  await ask(run, { prompt, completion, both_ends: true, bm25: true }, left?.id);
}

// ---- who asks ----------------------------------------------------------------------------------------------------------

function signIn(then) {
  const dialog = byId("sign-in");
  const problem = byId("sign-in-problem");
  problem.hidden = true;
  byId("sign-in-form").onsubmit = async (event) => {
    event.preventDefault();
    api.setToken(byId("token").value.trim());
    try {
      await start();
      dialog.close();
      then();
    } catch (error) {
      api.setToken(null);
      problem.textContent = error.status === 401 ? "The service does not know this token." : explained(error).text;
      problem.hidden = false;
    } finally {
      byId("token").value = "";
    }
  };
  if (!dialog.open) dialog.showModal();
}

// Reads what is served.
async function start() {
  served = await api.runs();
  actions.runs = served.filter((facts) => facts.state !== "unusable").map((facts) => facts.name);
  const before = byId("run").value;
  byId("run").replaceChildren(...served.map((facts) => html("option", { value: facts.name }, facts.state === "unusable" ? `${facts.name} (cannot be asked)` : facts.name)));
  if (served.some((facts) => facts.name === before)) byId("run").value = before;
  for (const id of ["submit", "surprise"]) byId(id).disabled = !served.length;
  byId("sign-out").hidden = !api.token();
}

byId("run").addEventListener("change", () => go({ run: byId("run").value }));
byId("home").addEventListener("click", (event) => {
  event.preventDefault();
  form.fill({ bm25: true });
  go({ run: byId("run").value });
});
byId("surprise").addEventListener("click", () => guard(surprise));
byId("sign-out").addEventListener("click", () => {
  api.setToken(null);
  location.assign("/");
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  (byId("answer-heading") ?? byId("main")).focus();
});
addEventListener("hashchange", route);
listen();
guard(async () => {
  await start();
  await route();
});
