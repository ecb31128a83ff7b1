// Texts with a colour behind each token: as strong as its share of the score. A long text is an excerpt until it is opened.

import { clamp, html, number, signed, tone, visible } from "./dom.js";
import { tipOf, walk } from "./tips.js";

const EXCERPT = 80; // tokens of a long text that are shown before it is opened

// A newline breaks the line and leaves a mark, a tab leaves a mark. The space before a word stays outside, so that no colour hangs over the end of a line.
function piece(text, attributes) {
  const before = /^ \S/.test(text) ? " " : "";
  const span = html("span", attributes);
  if (text === "") span.classList.add("empty");
  for (const part of text.slice(before.length).split(/(\n|\t)/)) {
    if (part === "\n" || part === "\t") span.append(html("span", { class: part === "\n" ? "line" : "tab" }, part));
    else if (part) span.append(part);
  }
  return { span, parts: before ? [before, span] : [span] };
}

// Which tokens are no part of the text: such as the one that begins every sequence.
function special(tokens, text) {
  let at = 0;
  return tokens.map(([token]) => {
    const inside = text.startsWith(token, at);
    if (inside) at += token.length;
    return !inside && /^<.+>$|^\[[A-Z]+\]$/.test(token);
  });
}

// The stretch with the most score in it, begun at a word where that is near; the start of the text where that is close.
function excerpt(tokens) {
  if (tokens.length <= EXCERPT * 1.3) return [0, tokens.length];
  let [sum, best, start] = [0, -1, 0];
  tokens.forEach(([, score], i) => {
    sum += Math.abs(score) - (i >= EXCERPT ? Math.abs(tokens[i - EXCERPT][1]) : 0);
    if (i >= EXCERPT - 1 && sum > best * (1 + 1e-9)) [best, start] = [sum, i - EXCERPT + 1];
  });
  for (let back = 0; back < 6 && start > 0 && !/^\s/.test(tokens[start][0]); back++) start--;
  if (start < 16) start = 0;
  return [start, Math.min(tokens.length, start + EXCERPT)];
}

// The text of a training sequence, and a button that opens the rest of it where there is more.
export function highlighted(sequence, most, unit) {
  const paragraph = html("p", { class: "text", dir: "auto", role: "group", "aria-label": `Text of ${sequence.id}; arrow keys step through the scores of its tokens` });
  const apart = special(sequence.tokens, sequence.text);
  const [first, last] = excerpt(sequence.tokens);
  const fill = (from, to) => {
    const parts = sequence.tokens.slice(from, to).flatMap(([token, score], i) => {
      const strength = tone(score, most);
      const kind = strength < 0.05 ? "" : score > 0 ? " p" : " m";
      const { span, parts } = piece(token, { class: `t${kind}${apart[from + i] ? " special" : ""}` });
      if (kind) span.style.setProperty("--a", strength.toFixed(3));
      tipOf(span, () => [`“${visible(token)}”  ${signed(score)} ${unit}`, `token ${from + i + 1} of ${sequence.tokens.length}`]);
      return parts;
    });
    const cut = (mark) => html("span", { class: "cut" }, mark);
    paragraph.replaceChildren(...(from > 0 ? [cut("… ")] : []), ...parts, ...(to < sequence.tokens.length ? [cut(" …")] : []));
  };
  fill(first, last);
  walk(paragraph, () => [...paragraph.querySelectorAll(".t")]);
  if (last - first === sequence.tokens.length) return [paragraph];
  const button = html("button", { type: "button", class: "quiet", "aria-expanded": "false" }, `Show all ${sequence.tokens.length} tokens`);
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") !== "true";
    fill(...(open ? [0, sequence.tokens.length] : [first, last]));
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "Show less" : `Show all ${sequence.tokens.length} tokens`;
  });
  return [paragraph, button];
}

// The question, its counted tokens in bold with a line below each that is darker the less probable the model found it.
export function asked(query) {
  const paragraph = html("p", { class: "text asked", dir: "auto", role: "group", "aria-label": "The question; arrow keys step through its tokens" });
  const whole = `${query.prompt ?? ""}${query.completion ?? ""}`;
  const apart = special(query.tokens.map((token) => [token]), whole);
  query.tokens.forEach((token, i) => {
    const value = query.token_log_probabilities[i];
    const { span, parts } = piece(token, { class: value === null ? "t" : "t counted" });
    if (value !== null) span.style.setProperty("--a", clamp(1 - Math.exp(value), 0.12, 0.9).toFixed(2));
    tipOf(span, () => value === null ? [`“${visible(token)}”`, "not counted"] : [`“${visible(token)}”  ${number(value)} nats`, `probability ${number(Math.exp(value))}`]);
    if (!apart[i]) paragraph.append(...parts);
  });
  if (!query.tokens.length) paragraph.append(whole); // a set of queries has a name, and no tokens
  walk(paragraph, () => [...paragraph.querySelectorAll(".t")]);
  return paragraph;
}
