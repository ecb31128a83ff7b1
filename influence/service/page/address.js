// What the page shows, as its address: everything stands after the #, which no browser sends to a server or writes into a log.
//
// {run, query, with}: a result, beside another; or {run, prompt, completion, …}: a question that is asked when the address is opened.

const TEXTS = ["run", "query", "with", "prompt", "completion", "contrast", "where"];
const SWITCHES = ["exact", "normalize", "bm25", "refine", "by_output_token"];
const NUMBERS = ["k", "candidates"];
const LISTS = ["layers", "also"];

export function read(hash = location.hash) {
  const given = new URLSearchParams(hash.slice(1));
  const place = {};
  for (const name of TEXTS) if (given.has(name)) place[name] = given.get(name);
  for (const name of SWITCHES) if (given.get(name) === "yes") place[name] = true;
  for (const name of NUMBERS) if (/^\d+$/.test(given.get(name) ?? "")) place[name] = Number(given.get(name));
  for (const name of LISTS) if (given.get(name)) place[name] = given.get(name).split(",");
  const span = (given.get("span") ?? "").match(/^(\d+):(\d+)$/);
  if (span) place.span = [Number(span[1]), Number(span[2])];
  return place;
}

export function write(place) {
  const given = new URLSearchParams();
  for (const name of TEXTS) if (place[name] !== undefined && place[name] !== "") given.set(name, place[name]);
  for (const name of SWITCHES) if (place[name]) given.set(name, "yes");
  for (const name of NUMBERS) if (place[name]) given.set(name, place[name]);
  for (const name of LISTS) if (place[name]?.length) given.set(name, place[name].join(","));
  if (place.span) given.set("span", place.span.join(":"));
  return `#${given}`;
}

export const asks = (place) => place.query === undefined && place.completion !== undefined;
