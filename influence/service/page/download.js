// An answer as a file: JSON as the service gave it, CSV for spreadsheets, the HTML report.

import { html } from "./dom.js";
import { ends } from "./result.js";

export function save(name, content, type) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = html("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

// Training text may begin like a formula, which spreadsheets would run: an apostrophe before it makes it text.
function cell(value) {
  if (typeof value === "number") return String(value);
  const text = value === null || value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value);
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

// One row a ranked sequence: what helped, then what hurt.
export function csv(query) {
  const { result } = query;
  const all = Object.entries(ends(query)).flatMap(([side, sequences]) => (sequences ?? []).map((one) => [side, one]));
  const columns = [...new Set(all.flatMap(([, one]) => Object.keys(one.metadata ?? {})))];
  const head = ["side", "rank", "id", "score", "unit", "bm25_rank", "near_duplicates", "text", ...columns.map((name) => `metadata.${name}`)];
  const rows = all.map(([side, one]) => [side, one.rank, one.id, one.score, result.unit, one.bm25_rank ?? null, (one.duplicates ?? []).map(({ id }) => id).join(" "), one.text, ...columns.map((name) => one.metadata?.[name])]);
  return [head, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}
