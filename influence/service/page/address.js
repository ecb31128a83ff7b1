// What the page shows, as its address: everything stands after the #, which no browser sends to a server or writes into a log.
//
// {run, query, with}: a result, beside another; or {run, prompt, completion, …}: a question that is asked when the address is opened.

const TEXTS = ["run", "query", "with", "prompt", "completion", "contrast", "where"];
const SWITCHES = ["exact", "normalize", "bm25", "refine", "by_output_token"];
const NUMBERS = ["k", "candidates"];
const LISTS = ["layers", "also", "input_ids"];

export function read(hash = location.hash) {
  const given = new URLSearchParams(hash.slice(1));
  const place = {};
  for (const name of TEXTS) if (given.has(name)) place[name] = given.get(name);
  for (const name of SWITCHES) if (given.get(name) === "yes") place[name] = true;
  for (const name of NUMBERS) if (/^\d+$/.test(given.get(name) ?? "")) place[name] = Number(given.get(name));
  for (const name of LISTS) if (given.get(name)) place[name] = given.get(name).split(",");
  const spans = (given.get("span") ?? "").split(",").map((one) => one.match(/^(\d+):(\d+)$/)?.slice(1).map(Number));
  if (spans.every(Boolean)) place.span = spans.length > 1 ? spans : spans[0];
  if (place.input_ids) place.input_ids = place.input_ids.map(Number);
  return place;
}

export function write(place) {
  const given = new URLSearchParams();
  for (const name of TEXTS) if (place[name] !== undefined && place[name] !== "") given.set(name, place[name]);
  for (const name of SWITCHES) if (place[name]) given.set(name, "yes");
  for (const name of NUMBERS) if (place[name]) given.set(name, place[name]);
  for (const name of LISTS) if (place[name]?.length) given.set(name, place[name].join(","));
  if (place.span) given.set("span", (Array.isArray(place.span[0]) ? place.span : [place.span]).map((one) => one.join(":")).join(","));
  return `#${given}`;
}

export const asks = (place) => place.query === undefined && (place.completion ?? place.input_ids) !== undefined;
