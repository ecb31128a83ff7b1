// Draws what the page's data block holds: token highlights, the heat map, the charts, the tables; and shows numbers on demand
// to a pointer, a finger and a keyboard. Text enters the page only as text nodes.

import { byId, clamp, html, largest, number, percent, signed, superscript, svg, tone, visible } from "./shared/dom.js";
import { hide, listen, pin, show, tipOf, tipped, walk } from "./shared/tips.js";

const data = JSON.parse(byId("data").textContent);

// ---- small things -------------------------------------------------------------------------------------------------

const label = (x, y, text, attributes = {}) => svg("text", { x, y, ...attributes }, text);
const box = (x, y, w, h) => `M${x} ${y}h${w}v${h}h${-w}z`;
const total = (values) => values.reduce((sum, value) => sum + value, 0);

// {scale, codes}: two base64 digits a value, 12 bits: a sign, and 11 bits of the logarithm of the size over five decades below scale; 0 is none.
function unpacked({ scale, codes }) {
  const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const values = new Float64Array(codes.length / 2);
  for (let i = 0; i < values.length; i++) {
    const bits = 64 * digits.indexOf(codes[2 * i]) + digits.indexOf(codes[2 * i + 1]);
    const level = bits & 2047;
    values[i] = level ? (bits > 2047 ? -scale : scale) * 10 ** ((-5 * (2047 - level)) / 2047) : 0;
  }
  return values;
}

// Lengths of pieces: a character for two of 1 to 9; "~" and base-62 digits, Z carried into the next, for any other two.
const PAIRS = Array.from({ length: 93 }, (_, i) => String.fromCharCode(33 + i)).filter((c) => !'"&<>\\'.includes(c)).join("");
const DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
function split(text, widths) {
  const lengths = [];
  for (let i = 0; i < widths.length; i++) {
    if (widths[i] !== "~") {
      const pair = PAIRS.indexOf(widths[i]);
      lengths.push(1 + Math.floor(pair / 9), 1 + (pair % 9));
      continue;
    }
    for (let two = 0; two < 2; two++) {
      let length = 0;
      do length += DIGITS.indexOf(widths[++i]);
      while (widths[i] === "Z");
      lengths.push(length);
    }
  }
  let start = 0;
  return lengths.map((length) => text.slice(start, (start += length)));
}

// ---- tokens --------------------------------------------------------------------------------------------------------

// A newline breaks the line and leaves a mark, a tab leaves a mark; neither mark is part of the text that is copied.
// Returns what stands for the piece: the space before a word stays outside, so that no highlight hangs over the end of a line.
function fillPiece(span, text) {
  const before = /^ [^\s]/.test(text) ? " " : "";
  if (text === "") span.classList.add("empty");
  for (const part of text.slice(before.length).split(/(\n|\t)/)) {
    if (part === "\n" || part === "\t") span.append(html("span", { class: part === "\n" ? "line" : "tab" }, part));
    else if (part) span.append(part);
  }
  return before ? [before, span] : [span];
}

function tokenNumbers(pieces, joined) {
  const counts = new Map(joined);
  let next = 1;
  return pieces.map((_, i) => {
    const count = counts.get(i) || 1;
    const first = next;
    next += count;
    return count > 1 ? `tokens ${first}–${next - 1} (one run of characters)` : `token ${first}`;
  });
}

const EXCERPT = 80; // tokens of a long text that are shown before it is opened

// The stretch of EXCERPT pieces with the most score in it, begun at a word where that is near; the start of the text where that is close.
function excerpt(pieces, scores) {
  if (pieces.length <= EXCERPT * 1.3) return [0, pieces.length];
  let sum = 0;
  let best = -1;
  let start = 0;
  for (let i = 0; i < pieces.length; i++) {
    sum += Math.abs(scores[i]) - (i >= EXCERPT ? Math.abs(scores[i - EXCERPT]) : 0);
    if (i >= EXCERPT - 1 && sum > best * (1 + 1e-9)) {
      best = sum;
      start = i - EXCERPT + 1;
    }
  }
  for (let back = 0; back < 6 && start > 0 && !/^\s/.test(pieces[start]); back++) start--;
  if (start < 16) start = 0;
  return [start, Math.min(pieces.length, start + EXCERPT)];
}

// What every sequence has, made here so that it is not repeated in the file: the line as long as its score, and its link.
function finishSequence(article, column, mostScore) {
  const width = mostScore ? (100 * Math.abs(column.score)) / mostScore : 0;
  article.prepend(svg("svg", { class: "size", viewBox: "0 0 100 2", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: column.score < 0 ? "hurt" : "helped", width: width.toFixed(2), height: 2 })));
  const name = article.querySelector(".name");
  const group = html("span", { class: "named" });
  name.replaceWith(group);
  group.append(name, html("a", { class: "anchor", href: `#${column.anchor}`, "aria-label": "Link to this sequence" }, "#"));
  column.id = name.textContent;
  column.rank = article.querySelector(".rank").textContent;
}

function drawSequence(article, column, most, unit) {
  const paragraph = article.querySelector(".text");
  if (!("widths" in column)) return null;
  const scores = unpacked(column);
  const pieces = split(paragraph.textContent, column.widths).slice(0, scores.length);
  const names = tokenNumbers(pieces, column.joined);
  const [first, last] = excerpt(pieces, scores);
  const short = last - first < pieces.length;
  const fill = (open) => {
    const [from, to] = open ? [0, pieces.length] : [first, last];
    const spans = [];
    for (let i = from; i < to; i++) {
      const strength = tone(scores[i], most);
      const span = html("span", { class: strength < 0.05 ? "t" : scores[i] > 0 ? "t p" : "t m" });
      if (strength >= 0.05) span.style.setProperty("--a", strength.toFixed(3));
      spans.push(...fillPiece(span, pieces[i]));
      tipOf(span, () => [`“${visible(pieces[i])}”  ${signed(scores[i])} ${unit}`, names[i]]);
    }
    paragraph.replaceChildren(...(from > 0 ? [html("span", { class: "cut" }, "… ")] : []), ...spans, ...(to < pieces.length ? [html("span", { class: "cut" }, " …")] : []));
  };
  fill(false);
  const own = largest([...scores]);
  paragraph.setAttribute("role", "group");
  paragraph.setAttribute("aria-label", `Text of ${column.id}; arrow keys step through the scores of its tokens`);
  walk(paragraph, () => [...paragraph.querySelectorAll(".t")]);
  if (!short) return null;
  article.append(strip(scores, own, first, last));
  const button = html("button", { type: "button", class: "more", "aria-expanded": "false" });
  const total = pieces.length + column.joined.reduce((more, [, count]) => more + count - 1, 0);
  const set = (open) => {
    fill(open);
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "Show less" : `Show all ${total.toLocaleString("en")} tokens`;
    article.classList.toggle("open", open);
  };
  set(false);
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") !== "true";
    set(open);
    if (!open && article.getBoundingClientRect().top < 0) article.scrollIntoView();
  });
  article.append(button);
  return set;
}

// The scores along a whole text, up for help and down for harm, with a bracket around the excerpt.
function strip(scores, most, first, last) {
  const width = 1000;
  const step = width / scores.length;
  const paths = { helped: "", hurt: "" };
  scores.forEach((score, i) => {
    const height = most ? (11 * Math.abs(score)) / most : 0;
    if (height < 0.4) return;
    if (score > 0) paths.helped += box((i * step).toFixed(1), (12 - height).toFixed(1), Math.max(step * 0.8, 1).toFixed(1), height.toFixed(1));
    else paths.hurt += box((i * step).toFixed(1), 12, Math.max(step * 0.8, 1).toFixed(1), height.toFixed(1));
  });
  return svg("svg", { class: "strip", viewBox: `0 0 ${width} 26`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { class: "ground", d: box((first * step).toFixed(1), 0, ((last - first) * step).toFixed(1), 24) }),
    svg("path", { class: "grid", d: `M0 12H${width}`, "vector-effect": "non-scaling-stroke" }),
    svg("path", { class: "axis", d: `M${first * step} 20V24H${last * step}V20`, "vector-effect": "non-scaling-stroke" }),
    svg("path", { class: "helped", d: paths.helped }), svg("path", { class: "hurt", d: paths.hurt }));
}

function drawQuery(paragraph, query) {
  if (!query.widths) return;
  const pieces = split(paragraph.textContent, query.widths).slice(0, query.log_probabilities.length);
  const names = tokenNumbers(pieces, query.joined);
  const counted = query.log_probabilities.findIndex((value) => value !== null);
  const from = pieces.length > 260 && counted > 130 ? counted - 100 : 0;
  const fill = (start) => {
    const spans = pieces.slice(start).flatMap((piece, j) => {
      const value = query.log_probabilities[start + j];
      const span = html("span", { class: value === null ? "t" : "t counted" });
      const parts = fillPiece(span, piece);
      if (value !== null) span.style.setProperty("--a", clamp(1 - Math.exp(value), 0.12, 0.9).toFixed(2));
      tipOf(span, () => value === null
        ? [`“${visible(piece)}”`, `${names[start + j]}, not counted`]
        : [`“${visible(piece)}”  ${number(value)} nats`, `probability ${number(Math.exp(value))}`, names[start + j]]);
      return parts;
    });
    paragraph.replaceChildren(...(start ? [html("span", { class: "cut" }, "… ")] : []), ...spans);
  };
  fill(from);
  paragraph.setAttribute("role", "group");
  paragraph.setAttribute("aria-label", "The query; arrow keys step through its tokens");
  walk(paragraph, () => [...paragraph.querySelectorAll(".t")]);
  if (!from) return;
  const button = html("button", { type: "button", class: "more all" }, `Show all ${pieces.length.toLocaleString("en")} tokens of the query`);
  button.addEventListener("click", () => { fill(0); button.remove(); });
  paragraph.after(button);
}

// ---- diagrams --------------------------------------------------------------------------------------------------------

const widths = new Map(); // of the containers, all read before any is filled, so that the page is laid out once
const narrow = (container) => Math.max(260, Math.floor(widths.get(container)));

function canvas(width, height, description) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": description });
}

function drawKey(container, most, unit) {
  container.hidden = most === 0;
  const width = 240;
  const picture = svg("svg", { viewBox: `0 0 ${width} 32`, width: "100%", "aria-hidden": "true" });
  const steps = 48;
  for (let i = 0; i < steps; i++) {
    const value = (2 * (i + 0.5)) / steps - 1;
    picture.append(svg("rect", { class: value > 0 ? "helped" : "hurt", x: (i * width) / steps, y: 0, width: width / steps + 0.2, height: 10, "fill-opacity": (0.95 * tone(value, 1)).toFixed(3) }));
  }
  picture.append(label(0, 25, signed(-most)), label(width / 2, 25, "0", { "text-anchor": "middle" }),
    label(width, 25, `${signed(most)} ${unit}`, { "text-anchor": "end" }));
  container.replaceChildren(picture);
}

function drawHeat(container, query, names, cells, columnName) {
  const columns = query.columns;
  const rows = names.length;
  const most = largest(cells);
  const short = shortNames(names);
  const rowHeight = rows <= 40 ? 15 : rows <= 80 ? 12 : rows <= 160 ? 7 : 4;
  const labelled = labelledRows(names, short, rowHeight);
  const gutter = Math.min(190, 14 + 6.4 * Math.max(...labelled.map(([, text]) => text.length), 4));
  const barWidth = 110;
  const gap = columns.some((c) => c.side === "hurt") && columns.some((c) => c.side === "helped") ? 10 : 0;
  const space = widths.get(container) - gutter - barWidth - gap - 20;
  const cell = clamp(Math.floor(space / columns.length), columns.length > 60 ? 9 : 18, 44);
  const helped = columns.filter((c) => c.side === "helped").length;
  const x = (column) => column * cell + (column >= helped ? gap : 0);
  const top = 74;
  const right = x(columns.length - 1) + cell;
  // A little air between blocks, where they are several rows each, lets a row be found without its label.
  const firsts = short.map((part, i) => i > 0 && (part.block === null || part.block !== short[i - 1].block));
  const air = rowHeight >= 7 && firsts.filter(Boolean).length < rows / 2 ? 3 : 0;
  let offset = 0;
  const y = short.map((_, i) => top + i * rowHeight + (offset += firsts[i] ? air : 0));
  const bottom = y[rows - 1] + rowHeight;
  const width = right + 16 + barWidth;
  const height = bottom + 6;
  const inset = rowHeight >= 7 ? 1 : 0;

  const blockRows = Math.max(1, short.findIndex((part, i) => i && part.block !== short[i - 1].block && short[i - 1].block !== null) - short.findIndex((part) => part.block !== null));
  const left = svg("svg", { class: "names", width: gutter, height, "aria-hidden": "true" });
  for (const [row, text, strong] of labelled) {
    left.append(label(gutter - 8, y[row] + (rowHeight * (rowHeight < 11 ? Math.min(blockRows, 6) : 1)) / 2 + 3.6, text, { "text-anchor": "end", ...(strong ? { class: "strong" } : {}) }));
  }
  left.append(label(gutter - 8, 50, "score", { "text-anchor": "end", class: "faint" }), label(gutter - 8, top - 6, "rank", { "text-anchor": "end", class: "faint" }));

  const picture = svg("svg", { class: "cells", width, height, viewBox: `0 0 ${width} ${height}` });
  // Equal colours are one path, so that the page holds as many shapes for a hundred thousand cells as for a hundred.
  const paths = new Map();
  cells.forEach((value, i) => {
    const level = Math.round(40 * tone(value, most));
    if (!level) return;
    const key = value > 0 ? level : -level;
    paths.set(key, (paths.get(key) || "") + box(x(Math.floor(i / rows)), y[i % rows], cell - 1, rowHeight - inset));
  });
  if (helped) picture.append(svg("path", { class: "ground", d: y.map((at) => box(0, at, helped * cell - 1, rowHeight - inset)).join("") }));
  if (helped < columns.length) picture.append(svg("path", { class: "ground", d: y.map((at) => box(x(helped), at, (columns.length - helped) * cell - 1, rowHeight - inset)).join("") }));
  for (const [key, d] of paths) picture.append(svg("path", { class: key > 0 ? "helped" : "hurt", "fill-opacity": (0.95 * Math.abs(key)) / 40, d }));

  const mostColumn = largest(columns.map((c) => c.score));
  columns.forEach((column, i) => {
    const size = mostColumn ? (38 * Math.abs(column.score)) / mostColumn : 0;
    const everyLabel = cell >= 16 || i % 5 === 0;
    picture.append(svg("a", { href: `#${column.anchor}`, "aria-label": `Go to ${column.side === "helped" ? "" : "lowest, "}rank ${column.rank}, ${column.id}` },
      svg("rect", { class: "hit", x: x(i), y: 8, width: cell - 1, height: top - 8 }),
      svg("rect", { class: column.score > 0 ? "helped" : "hurt", x: x(i) + cell * 0.15, y: 54 - size, width: cell * 0.7 - 1, height: size }),
      ...(everyLabel ? [label(x(i) + (cell - 1) / 2, top - 6, column.rank, { "text-anchor": "middle" })] : [])));
  });
  picture.append(svg("path", { class: "axis", d: `M0 54.5H${right - 1}` }));
  if (gap) {
    picture.append(label(0, 9, "helped", { class: "faint" }), label(x(helped), 9, "hurt", { class: "faint" }));
  }

  // Each layer's sums: what helped to the right of the line, what hurt to the left of it.
  const sums = names.map((_, row) => {
    const values = columns.map((_, column) => cells[column * rows + row]);
    return [total(values.filter((v) => v > 0)), total(values.filter((v) => v < 0))];
  });
  const plus = Math.max(...sums.map(([p]) => p), 0);
  const minus = Math.max(...sums.map(([, m]) => -m), 0);
  const unitWidth = plus + minus ? (barWidth - 4) / (plus + minus) : 0;
  const zero = right + 16 + minus * unitWidth;
  let helpedBars = "";
  let hurtBars = "";
  sums.forEach(([p, m], row) => {
    const h = Math.max(1, rowHeight - 3);
    helpedBars += box(zero, y[row] + 1, p * unitWidth, h);
    hurtBars += box(zero + m * unitWidth, y[row] + 1, -m * unitWidth, h);
  });
  picture.append(svg("path", { class: "helped", d: helpedBars }), svg("path", { class: "hurt", d: hurtBars }), svg("path", { class: "axis", d: `M${zero} ${top}V${bottom}` }),
    label(zero, top - 6, "sum", { class: "faint", "text-anchor": minus * unitWidth < 12 ? "start" : plus * unitWidth < 12 ? "end" : "middle" }));

  const cursor = svg("rect", { class: "cursor", visibility: "hidden" });
  picture.append(cursor);
  container.replaceChildren(left, picture);

  const lines = (column, row, touch) => {
    const value = cells[column * rows + row];
    const share = columns[column].score ? value / columns[column].score : 0;
    const said = [`${signed(value)} ${query.unit}`, names[row], `${columnName(columns[column])}, ${share < 0 ? "−" : ""}${percent(Math.abs(share))} of its score`];
    if (touch) said.push(html("a", { href: `#${columns[column].anchor}` }, "Go to the sequence"));
    return said;
  };
  const put = (column, row) => {
    for (const [key, value] of Object.entries({ x: x(column) - 0.5, y: y[row] - 0.5, width: cell, height: rowHeight + (inset ? 0 : 1), visibility: "visible" })) cursor.setAttribute(key, value);
    return () => cursor.getBoundingClientRect();
  };
  const find = (event) => {
    const frame = picture.getBoundingClientRect();
    const px = ((event.clientX - frame.left) * width) / frame.width;
    const py = ((event.clientY - frame.top) * height) / frame.height;
    const row = y.findIndex((at) => py >= at && py < at + rowHeight);
    if (row < 0) return null;
    if (px > right + 12) return { row };
    const column = columns.findIndex((_, i) => px >= x(i) && px < x(i) + cell);
    return column < 0 ? null : { column, row };
  };
  const reveal = (hit, touch) => {
    if (hit.column === undefined) {
      show([names[hit.row], `${signed(sums[hit.row][0])} and ${signed(sums[hit.row][1])} ${query.unit} over the sequences`], () => {
        const frame = picture.getBoundingClientRect();
        return new DOMRect(frame.left + zero - 2, frame.top + y[hit.row], 4, rowHeight);
      });
    } else show(lines(hit.column, hit.row, touch), put(hit.column, hit.row));
  };
  picture.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch") return;
    const hit = find(event);
    if (hit) event.stopPropagation(); // else the document would find no tooltip here, and hide this one
    if (hit) reveal(hit, false);
    else if (!tipped(event.target)) { hide(); cursor.setAttribute("visibility", "hidden"); }
  });
  picture.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "touch") return;
    hide();
    cursor.setAttribute("visibility", "hidden");
  });
  picture.addEventListener("click", (event) => {
    const hit = find(event);
    if (!hit) return;
    event.stopPropagation();
    if (hit.column !== undefined && event.pointerType === "mouse") location.hash = columns[hit.column].anchor;
    else { reveal(hit, true); pin(); }
  });
  picture.querySelectorAll("a").forEach((link, i) => tipOf(link, () => [`${signed(columns[i].score)} ${query.unit}`, columnName(columns[i])]));
  const at = { column: 0, row: 0 };
  container.onkeydown = (event) => {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (event.target !== container) return;
    if (event.key === "Enter") location.hash = columns[at.column].anchor;
    if (!step) return;
    event.preventDefault();
    if (cursor.getAttribute("visibility") === "visible") {
      at.column = clamp(at.column + step[0], 0, columns.length - 1);
      at.row = clamp(at.row + step[1], 0, rows - 1);
    }
    container.scrollLeft = clamp(container.scrollLeft, x(at.column) + cell + gutter - container.clientWidth, x(at.column));
    const where = put(at.column, at.row);
    cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
    show(lines(at.column, at.row, false), where, true);
  };
  container.onblur = (event) => {
    if (byId("tip").contains(event.relatedTarget)) return; // on its way to the link in the tooltip
    hide();
    cursor.setAttribute("visibility", "hidden");
  };
  container.tabIndex = 0;
  container.setAttribute("role", "group");
  container.setAttribute("aria-label", `Heat map of ${rows} layers by ${columns.length} sequences; arrow keys move over the cells, Enter goes to the sequence. The same numbers are in the table below`);
}

const BLOCK = /(?:^|[./])(?:(?:layers?|blocks?|h)_)?(\d+)(?=[./]|$)/;

// Names without what all of them begin with; their blocks, where they have them, and what follows.
function shortNames(names) {
  return names.map((name) => {
    const found = name.match(BLOCK);
    if (!found) return { block: null, module: name };
    return { block: name.slice(0, found.index) + found[1], digits: found[1], module: name.slice(found.index + found[0].length).replace(/^[./]/, "") };
  });
}

// [row, text, strong]: every row where rows are tall enough, else the first row of as many blocks as there is room for.
function labelledRows(names, short, rowHeight) {
  const firsts = short.map((part, i) => i === 0 || part.block === null || part.block !== short[i - 1].block);
  if (rowHeight >= 11) {
    return short.map((part, i) => [i, part.block === null ? clip(part.module) : `${firsts[i] ? part.digits + " " : ""}${clip(part.module) || "·"}`, false]);
  }
  let free = -Infinity;
  const rows = [];
  short.forEach((part, i) => {
    if (!firsts[i] || i * rowHeight < free) return;
    rows.push([i, part.block === null ? clip(part.module) : `block ${part.digits}`, false]);
    free = i * rowHeight + 12;
  });
  return rows;
}
const clip = (text) => (text.length > 24 ? `…${text.slice(-23)}` : text);

function hitBox(x, y, width, height, lines) {
  const element = svg("rect", { class: "hit", x, y, width, height });
  tipOf(element, lines);
  return element;
}

function walkable(container, picture, description) {
  container.replaceChildren(picture);
  if (container.dataset.walk) return;
  container.dataset.walk = "yes";
  container.setAttribute("role", "group");
  container.setAttribute("aria-label", `${description}; arrow keys step through the values`);
  walk(container, () => [...container.querySelectorAll(".hit")]);
}

function niceStep(span, count) {
  const raw = span / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].find((m) => m * power >= raw * 0.999) * power;
}

// A linear axis: its ticks, how to write them, and the power of ten that was taken out of them.
function axis(low, high, count) {
  if (!(high > low)) return { ticks: [low], write: (value) => signed(value), power: 0 };
  const power = Math.floor(Math.log10(Math.max(Math.abs(low), Math.abs(high))));
  const shift = power < -2 || power > 3 ? power : 0;
  const step = niceStep(high - low, count);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step / 10 ** shift) + 1e-9));
  return { ticks, power: shift, write: (value) => (value === 0 ? "0" : (value > 0 ? "" : "−") + (Math.abs(value) / 10 ** shift).toFixed(digits)) };
}
const inUnit = (unit, power) => (power ? `10${superscript(power)} ${unit}` : unit);

function drawBlocks(container, query) {
  const blocks = query.blocks;
  const width = narrow(container);
  const height = 210;
  const plot = { left: 42, right: width - 4, top: 22, bottom: height - 34 };
  const high = Math.max(...blocks.map(([, p]) => p), 0);
  const low = Math.min(...blocks.map(([, , m]) => m), 0);
  const y = (value) => (high > low ? plot.bottom - ((value - low) / (high - low)) * (plot.bottom - plot.top) : (plot.top + plot.bottom) / 2);
  const band = (plot.right - plot.left) / blocks.length;
  const description = `Bar chart of influence by block, ${blocks.length} blocks`;
  const picture = canvas(width, height, description);
  const scale = axis(low, high, 4);
  for (const tick of scale.ticks) picture.append(svg("path", { class: "grid", d: `M${plot.left} ${y(tick)}H${plot.right}` }), label(plot.left - 6, y(tick) + 3.5, scale.write(tick), { "text-anchor": "end" }));
  let every = 1;
  while (every * band < 24) every *= every === 1 || every % 5 ? 5 : 2;
  blocks.forEach(([name, p, m], i) => {
    const x = plot.left + i * band;
    const bar = Math.max(1, band - Math.max(1, band * 0.2));
    picture.append(svg("rect", { class: "helped", x: x + (band - bar) / 2, y: y(p), width: bar, height: y(0) - y(p) }), svg("rect", { class: "hurt", x: x + (band - bar) / 2, y: y(0), width: bar, height: y(m) - y(0) }),
      hitBox(x, plot.top, band, plot.bottom - plot.top, () => [`block ${name}`, `${signed(p)} and ${signed(m)} ${query.unit}`]));
    if (i % every === 0) picture.append(label(x + band / 2, plot.bottom + 15, name.match(/\d+$/)[0], { "text-anchor": "middle" }));
  });
  picture.append(svg("path", { class: "axis", d: `M${plot.left} ${y(0)}H${plot.right}` }), label(plot.left - 36, 10, inUnit(query.unit, scale.power)),
    label((plot.left + plot.right) / 2, height - 4, "block", { "text-anchor": "middle" }));
  walkable(container, picture, description);
}

function drawKinds(container, query) {
  const kinds = query.kinds;
  const width = narrow(container);
  const detailed = kinds.some(([, , , level]) => level);
  const rowHeight = detailed ? 24 : 30;
  const tops = [];
  let height = 18;
  for (const [, , , level] of kinds) {
    if (!level && tops.length && detailed) height += 8;
    tops.push(height);
    height += rowHeight;
  }
  height += 4;
  const plot = { left: Math.max(92, 14 + 6.3 * Math.max(...kinds.map(([name]) => clip(name).length))), right: width - 62 };
  const high = Math.max(...kinds.map(([, p]) => p), 0);
  const low = Math.min(...kinds.map(([, , m]) => m), 0);
  const start = plot.left + (low < 0 ? 58 : 0);
  const x = (value) => (high > low ? start + ((value - low) / (high - low)) * (plot.right - start) : start);
  const description = `Bar chart of influence by kind of module: ${kinds.map(([name]) => name).join(", ")}`;
  const picture = canvas(width, height, description);
  picture.append(label(width - 4, 10, query.unit, { "text-anchor": "end" }));
  kinds.forEach(([name, p, m, level], i) => {
    const y = tops[i];
    const thin = level ? 4 : 0;
    picture.append(label(plot.left - 8, y + 15, clip(name), { "text-anchor": "end", ...(level ? {} : { class: "strong" }) }),
      svg("rect", { class: "helped", x: x(0), y: y + 3 + thin / 2, width: x(p) - x(0), height: 17 - thin }), svg("rect", { class: "hurt", x: x(m), y: y + 3 + thin / 2, width: x(0) - x(m), height: 17 - thin }));
    if (p > 0) picture.append(label(x(p) + 5, y + 15, signed(p)));
    if (m < 0) picture.append(label(x(m) - 5, y + 15, signed(m), { "text-anchor": "end" }));
    picture.append(hitBox(0, y, width, rowHeight - 2, () => [name, `${signed(p)} and ${signed(m)} ${query.unit}`]));
  });
  picture.append(svg("path", { class: "axis", d: `M${x(0)} 16V${height - 4}` }));
  walkable(container, picture, description);
}

function drawHistogram(container, query) {
  const { edges, counts } = query.distribution;
  const shown = query.columns.map((column) => column.score);
  const width = narrow(container);
  const height = 240;
  const plot = { left: 46, right: width - 8, top: 14, bottom: height - 50 };
  const low = Math.min(edges[0], ...shown);
  const high = Math.max(edges[edges.length - 1], ...shown);
  const x = (value) => (high > low ? plot.left + ((value - low) / (high - low)) * (plot.right - plot.left) : (plot.left + plot.right) / 2);
  const most = Math.max(1, ...counts);
  const top = Math.log10(most) + 0.1;
  const floor = -0.3; // a bin with one sequence still stands above the line
  const y = (count) => plot.bottom - ((Math.log10(count) - floor) / (top - floor)) * (plot.bottom - plot.top);
  const description = `Histogram of the influence of ${total(counts)} training sequences in ${counts.length} bins, from ${signed(edges[0])} to ${signed(edges[edges.length - 1])} ${query.unit}`;
  const picture = canvas(width, height, description);
  for (let power = 0; power <= top; power++) picture.append(svg("path", { class: "grid", d: `M${plot.left} ${y(10 ** power)}H${plot.right}` }), label(plot.left - 6, y(10 ** power) + 3.5, most < 1e5 ? (10 ** power).toLocaleString("en") : `10${superscript(power)}`, { "text-anchor": "end" }));
  counts.forEach((count, i) => {
    const [from, to] = [x(edges[i]), x(edges[i + 1])];
    const side = edges[i] >= 0 && edges[i + 1] > 0 ? "helped" : edges[i + 1] <= 0 && edges[i] < 0 ? "hurt" : "both";
    if (count) picture.append(svg("rect", { class: side, x: from, y: y(count), width: Math.max(1, to - from - (to - from > 4 ? 1 : 0)), height: plot.bottom - y(count) }));
    picture.append(hitBox(from, plot.top, Math.max(1, to - from), plot.bottom - plot.top, () => [`${count.toLocaleString("en")} ${count === 1 ? "sequence" : "sequences"}`, `${signed(edges[i])} to ${signed(edges[i + 1])} ${query.unit}`]));
  });
  picture.append(svg("path", { class: "axis", d: `M${plot.left} ${plot.bottom}H${plot.right}` }));
  for (const value of shown) picture.append(svg("path", { class: "tick", d: `M${x(value)} ${plot.bottom + 2}v7` }));
  const scale = axis(low, high, width < 400 ? 4 : 6);
  for (const tick of scale.ticks) picture.append(label(x(tick), plot.bottom + 24, scale.write(tick), { "text-anchor": "middle" }));
  picture.append(label((plot.left + plot.right) / 2, height - 4, `influence, ${inUnit(query.unit, scale.power)}`, { "text-anchor": "middle" }));
  walkable(container, picture, description);
}

function drawTail(container, query) {
  const { tail, one_percent: onePercent } = query.distribution;
  const points = tail.filter(([fraction]) => fraction > 0);
  const width = narrow(container);
  const height = 240;
  const plot = { left: 46, right: width - 12, top: 14, bottom: height - 50 };
  const low = points.length ? Math.min(points[0][0], 0.1) : 0.001;
  const x = (fraction) => plot.left + (1 - Math.log(fraction) / Math.log(low)) * (plot.right - plot.left);
  const y = (share) => plot.bottom - share * (plot.bottom - plot.top);
  const description = `Curve of the share of positive influence against the share of sequences${onePercent === null ? "" : `; the top 1% carry ${percent(onePercent)}`}`;
  const picture = canvas(width, height, description);
  for (const share of [0, 0.25, 0.5, 0.75, 1]) picture.append(svg("path", { class: "grid", d: `M${plot.left} ${y(share)}H${plot.right}` }), label(plot.left - 6, y(share) + 3.5, `${100 * share}%`, { "text-anchor": "end" }));
  for (let power = 0; 10 ** power >= low * 0.999; power--) picture.append(label(x(10 ** power), plot.bottom + 17, `${Number((100 * 10 ** power).toPrecision(1))}%`, { "text-anchor": power ? "middle" : "end" }));
  const even = Array.from({ length: 40 }, (_, i) => low ** (1 - i / 39));
  picture.append(svg("path", { class: "guide", d: even.map((f, i) => `${i ? "L" : "M"}${x(f).toFixed(1)} ${y(f).toFixed(1)}`).join("") }));
  if (points.length) picture.append(svg("path", { class: "curve", d: points.map(([f, s], i) => `${i ? "L" : "M"}${x(f).toFixed(1)} ${y(s).toFixed(1)}`).join("") }));
  if (onePercent !== null && low < 0.01) {
    const left = onePercent > 0.5;
    picture.append(svg("path", { class: "guide", d: `M${x(0.01)} ${plot.bottom}V${y(onePercent)}` }), svg("circle", { class: "dot", cx: x(0.01), cy: y(onePercent), r: 5 }),
      label(x(0.01) + (left ? 10 : -10), y(onePercent) + (left ? 16 : -6), `top 1%: ${percent(onePercent)}`, { class: "strong", "text-anchor": left ? "start" : "end" }));
  }
  points.forEach(([fraction, share], i) => {
    const from = i ? (x(points[i - 1][0]) + x(fraction)) / 2 : plot.left;
    const to = i < points.length - 1 ? (x(points[i + 1][0]) + x(fraction)) / 2 : plot.right;
    picture.append(hitBox(from, plot.top, Math.max(0.5, to - from), plot.bottom - plot.top, () => [`${percent(share)} of the positive influence`, `from the top ${number(100 * fraction)}% of sequences`]));
  });
  picture.append(svg("path", { class: "axis", d: `M${plot.left} ${plot.bottom}H${plot.right}` }), label((plot.left + plot.right) / 2, height - 4, "share of the training sequences, most influential first", { "text-anchor": "middle" }));
  walkable(container, picture, description);
}

function drawTable(details, query, names, cells) {
  // One power of ten for the whole table, so that its columns can be compared by eye.
  const most = largest([...cells, ...query.columns.map((column) => column.score)]);
  const exponent = most ? Math.floor(Math.log10(most)) : 0;
  const power = exponent < -1 || exponent > 3 ? exponent : 0;
  const value = (v) => {
    const digits = (Math.abs(v) / 10 ** power).toFixed(4);
    if (Number(digits) === 0) return html("td", { class: "n" }, digits);
    return html("td", { class: v < 0 ? "n minus" : "n plus" }, (v < 0 ? "−" : "+") + digits);
  };
  const head = html("tr", {}, html("th", { scope: "col" }, `Layer (${inUnit(query.unit, power)})`), ...query.columns.map((c) => {
    const cell = html("th", { scope: "col" }, html("a", { href: `#${c.anchor}` }, `${c.side === "helped" ? "helped" : "hurt"} ${c.rank}`));
    cell.title = c.id;
    return cell;
  }), html("th", { scope: "col" }, "sum"));
  const body = names.map((name, row) => {
    const values = query.columns.map((_, column) => cells[column * names.length + row]);
    return html("tr", {}, html("th", { scope: "row" }, name), ...values.map(value), value(total(values)));
  });
  const scores = query.columns.map((c) => c.score);
  const foot = html("tr", {}, html("th", { scope: "row" }, "all layers"), ...scores.map(value), value(total(scores)));
  details.querySelector(".scroll").replaceChildren(html("table", {}, html("thead", {}, head), html("tbody", {}, ...body, foot)));
}

// ---- the page ----------------------------------------------------------------------------------------------------------

const drawings = new Map(); // what depends on the width of the page, drawn again when that changes

function drawSection(section, query) {
  const names = data.layers[query.layers];
  const cells = unpacked(query.cells);
  const columnName = (column) => `${column.side === "helped" ? "" : "lowest, "}rank ${column.rank}, ${column.id}`;
  const mostScore = largest(query.columns.map((column) => column.score));
  query.columns.forEach((column, i) => (column.side = i < query.helped ? "helped" : "hurt"));
  for (const column of query.columns) finishSequence(document.getElementById(column.anchor), column, mostScore);
  const most = query.columns.reduce((high, column) => Math.max(high, column.scale || 0), 0);
  drawQuery(section.querySelector(".asked"), query.query);
  for (const side of ["helped", "hurt"]) {
    const list = query.columns.filter((column) => column.side === side);
    const toggles = list.map((column) => drawSequence(document.getElementById(column.anchor), column, most, query.unit)).filter(Boolean);
    if (toggles.length < 2) continue;
    const button = html("button", { type: "button", class: "more all", "aria-pressed": "false" }, "Show all texts in full");
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-pressed") !== "true";
      toggles.forEach((set) => set(open));
      button.setAttribute("aria-pressed", String(open));
      button.textContent = open ? "Show excerpts" : "Show all texts in full";
    });
    document.getElementById(list[0].anchor).closest("ol").before(button);
  }
  const later = {
    heat: (element) => drawHeat(element, query, names, cells, columnName),
    blocks: (element) => drawBlocks(element, query),
    kinds: (element) => drawKinds(element, query),
    histogram: (element) => drawHistogram(element, query),
    tail: (element) => drawTail(element, query),
  };
  for (const element of section.querySelectorAll("[data-draw]")) {
    const what = element.dataset.draw;
    if (what === "key") drawKey(element, element.closest("figure") ? largest(cells) : most, query.unit);
    else if (what === "table") element.addEventListener("toggle", () => element.open && drawTable(element, query, names, cells), { once: true });
    else drawings.set(element, later[what]);
  }
}

document.documentElement.classList.add("drawn");
listen();
for (const section of document.querySelectorAll("[data-query]")) drawSection(section, data.queries[Number(section.dataset.query)]);
const drawAll = () => {
  for (const element of drawings.keys()) widths.set(element, element.clientWidth);
  for (const [element, draw] of drawings) draw(element);
};
drawAll();

let width = document.documentElement.clientWidth;
let waiting = 0;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    drawAll();
  }, 150);
});

// The page has grown shorter since the browser looked for the target of its address.
const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
if (target) target.scrollIntoView();
