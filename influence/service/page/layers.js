// Scores by layer: bars for one sequence, and the map of layers by sequences with its table.

import { clamp, html, largest, percent, signed, svg, tone } from "./dom.js";
import { hide, show, tipOf } from "./tips.js";

const box = (x, y, width, height) => `M${x.toFixed(1)} ${y.toFixed(1)}h${width.toFixed(1)}v${height.toFixed(1)}h${(-width).toFixed(1)}z`;
const label = (x, y, text, attributes = {}) => svg("text", { x, y, ...attributes }, text);

// One bar a layer from the first to the last: up what helped, down what hurt, as high as the square root of the score, as colours are deep. `most` is
// the scale of all sequences, so that they can be compared.
export function bars(sequence, most, unit) {
  const layers = Object.entries(sequence.layers);
  const [width, half] = [300, 13];
  const step = width / layers.length;
  const paths = { helped: "", hurt: "" };
  layers.forEach(([, score], i) => {
    const height = half * tone(score, most);
    if (height < 0.4) return;
    if (score > 0) paths.helped += box(i * step, half - height, step * 0.8, height);
    else paths.hurt += box(i * step, half, step * 0.8, height);
  });
  const first = [...layers].sort(([, a], [, b]) => Math.abs(b) - Math.abs(a)).slice(0, 3);
  const picture = svg("svg", { class: "bars", viewBox: `0 0 ${width} ${2 * half}`, preserveAspectRatio: "none", role: "img", "aria-label": `By layer; the largest shares: ${first.map(([name, score]) => `${name} ${signed(score)}`).join(", ")}` },
    svg("path", { class: "grid", d: `M0 ${half}H${width}`, "vector-effect": "non-scaling-stroke" }), svg("path", { class: "helped", d: paths.helped }), svg("path", { class: "hurt", d: paths.hurt }));
  tipOf(picture, (event) => {
    const frame = picture.getBoundingClientRect();
    const [name, score] = layers[clamp(Math.floor(((event.clientX - frame.left) / frame.width) * layers.length), 0, layers.length - 1)];
    return [`${signed(score)} ${unit}`, name];
  });
  return picture;
}

const BLOCK = /(?:^|[./])(?:(?:layers?|blocks?|h)_)?(\d+)(?=[./]|$)/;
const clip = (text) => (text.length > 22 ? `…${text.slice(-21)}` : text);

// What to write beside each row: its block's number where one begins, and the module's name; every row, or the blocks alone where rows are low.
function rowLabels(names, rowHeight) {
  let before = null;
  return names.map((name) => {
    const found = name.match(BLOCK);
    const block = found ? name.slice(0, found.index) + found[1] : name;
    const begins = block !== before;
    before = block;
    const module = found ? name.slice(found.index + found[0].length).replace(/^[./]/, "") : name.split(/[./]/).pop();
    if (rowHeight >= 12) return [begins && found ? `${found[1]} ${clip(module)}` : clip(module), begins];
    return [begins ? (found ? `block ${found[1]}` : clip(module)) : "", begins];
  });
}

// {helped, hurt} as columns, layers as rows. `go` is called with the sequence that was chosen.
export function map(helped, hurt, unit, go) {
  const columns = [...helped, ...hurt];
  const names = Object.keys(columns[0].layers);
  const cells = columns.map((column) => names.map((name) => column.layers[name]));
  const most = largest(cells.flat());
  const rowHeight = names.length <= 40 ? 16 : names.length <= 80 ? 12 : names.length <= 160 ? 7 : 4;
  const labels = rowLabels(names, rowHeight);
  const cell = columns.length > 40 ? 14 : 26;
  const gutter = 16 + 6.4 * Math.max(...labels.map(([text]) => text.length), 5);
  const gap = helped.length && hurt.length ? 12 : 0;
  const [top, sums] = [66, 110];
  const x = (i) => i * cell + (i >= helped.length ? gap : 0);
  let air = 0;
  const y = names.map((_, row) => top + row * rowHeight + (air += row && labels[row][1] && rowHeight >= 7 ? 3 : 0));
  const right = x(columns.length - 1) + cell;
  const height = y.at(-1) + rowHeight + 6;

  const side = svg("svg", { class: "names", width: gutter, height, "aria-hidden": "true" }, label(gutter - 8, 44, "score", { "text-anchor": "end" }), label(gutter - 8, top - 6, "rank", { "text-anchor": "end" }));
  let free = 0;
  labels.forEach(([text], row) => {
    if (!text || y[row] < free) return;
    side.append(label(gutter - 8, y[row] + Math.max(rowHeight, 11) / 2 + 4, text, { "text-anchor": "end" }));
    free = y[row] + 11;
  });
  const picture = svg("svg", { class: "cells", width: right + 16 + sums, height, "aria-hidden": "true" });
  // Equal colours are one path, so that the page holds as few shapes for ten thousand cells as for a hundred.
  const paths = new Map([[0, ""]]);
  columns.forEach((column, i) => {
    const size = (34 * Math.abs(column.score)) / (largest(columns.map((one) => one.score)) || 1);
    picture.append(svg("rect", { class: column.score > 0 ? "helped" : "hurt", x: x(i) + 4, y: 48 - size, width: cell - 9, height: size }), label(x(i) + cell / 2, top - 6, column.rank, { "text-anchor": "middle" }));
    names.forEach((_, row) => {
      const level = Math.round(40 * tone(cells[i][row], most)) * Math.sign(cells[i][row]);
      const shape = box(x(i), y[row], cell - 1, Math.max(1, rowHeight - 1));
      for (const key of new Set([0, level])) paths.set(key, (paths.get(key) ?? "") + shape);
    });
  });
  for (const [level, d] of paths) picture.append(svg("path", level ? { class: level > 0 ? "helped" : "hurt", "fill-opacity": (0.95 * Math.abs(level)) / 40, d } : { class: "ground", d }));
  if (gap) picture.append(label(0, 9, "helped"), label(x(helped.length), 9, "hurt"));
  picture.append(svg("path", { class: "axis", d: `M0 48.5H${right}` }), ...layerSums(cells, names, y, rowHeight, right + 16, sums, top));
  const cursor = svg("rect", { class: "cursor", width: cell, height: rowHeight, visibility: "hidden" });
  picture.append(cursor);

  const lines = (i, row) => [`${signed(cells[i][row])} ${unit}`, names[row], `${i < helped.length ? "helped" : "hurt"}, rank ${columns[i].rank}: ${columns[i].id}, ${percent(Math.abs(cells[i][row] / (columns[i].score || 1)))} of its score`];
  const put = (i, row) => {
    for (const [key, value] of Object.entries({ x: x(i) - 0.5, y: y[row] - 0.5, visibility: "visible" })) cursor.setAttribute(key, value);
    return () => cursor.getBoundingClientRect();
  };
  const columnAt = (event) => {
    const at = event.clientX - picture.getBoundingClientRect().left;
    return columns.findIndex((_, i) => at >= x(i) && at < x(i) + cell);
  };
  const find = (event) => {
    const frame = picture.getBoundingClientRect();
    const row = y.findIndex((at) => event.clientY - frame.top >= at && event.clientY - frame.top < at + rowHeight);
    const column = columnAt(event);
    return row >= 0 && column >= 0 ? [column, row] : null;
  };
  const unmark = () => cursor.setAttribute("visibility", "hidden");
  tipOf(picture, (event) => {
    const found = find(event);
    if (!found) return void unmark();
    put(...found);
    return lines(...found);
  });
  picture.addEventListener("pointerleave", unmark);
  picture.addEventListener("click", (event) => {
    const column = columnAt(event);
    // A finger has no other way to read a cell: it goes to a sequence by the column's head.
    if (column < 0 || (event.pointerType === "touch" && event.clientY - picture.getBoundingClientRect().top > top)) return;
    event.stopPropagation();
    hide();
    go(columns[column]);
  });

  const container = html("div", { class: "heat", tabindex: 0, role: "group", "aria-label": `Map of ${names.length} layers by ${columns.length} sequences; arrow keys move over the cells, Enter goes to the sequence. The same numbers are in the table below` }, side, picture);
  let at = null;
  container.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (event.key === "Enter" && at) go(columns[at[0]]);
    if (!step) return;
    event.preventDefault();
    at = at ? [clamp(at[0] + step[0], 0, columns.length - 1), clamp(at[1] + step[1], 0, names.length - 1)] : [0, 0];
    container.scrollLeft = clamp(container.scrollLeft, x(at[0]) + cell + gutter - container.clientWidth, x(at[0]));
    const where = put(...at);
    cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
    show(lines(...at), where, true);
  });
  container.addEventListener("blur", () => (hide(), unmark()));
  return container;
}

// Each layer's sums over the sequences: to the right of a line what helped, to the left what hurt.
function layerSums(cells, names, y, rowHeight, left, width, top) {
  const sums = names.map((_, row) => cells.reduce(([plus, minus], column) => (column[row] > 0 ? [plus + column[row], minus] : [plus, minus - column[row]]), [0, 0]));
  const [plus, minus] = [0, 1].map((which) => Math.max(...sums.map((sum) => sum[which])));
  const scale = plus + minus ? (width - 4) / (plus + minus) : 0;
  const zero = left + minus * scale;
  const height = Math.max(1, rowHeight - 4);
  return [
    svg("path", { class: "helped", d: sums.map(([p], row) => box(zero, y[row] + 1.5, p * scale, height)).join("") }),
    svg("path", { class: "hurt", d: sums.map(([, m], row) => box(zero - m * scale, y[row] + 1.5, m * scale, height)).join("") }),
    svg("path", { class: "axis", d: `M${zero.toFixed(1)} ${top}V${y.at(-1) + rowHeight}` }),
    label(left + width / 2, top - 6, "sum by layer", { "text-anchor": "middle" }),
  ];
}

// The numbers of the map, for who would rather read them.
export function table(helped, hurt, unit) {
  const columns = [...helped.map((one) => [`${one.rank}`, one]), ...hurt.map((one) => [`−${one.rank}`, one])];
  const head = html("tr", {}, html("th", { scope: "col" }, `Layer (${unit})`), ...columns.map(([rank, one]) => html("th", { scope: "col", title: one.id }, rank)));
  const row = (name, values) => html("tr", {}, html("th", { scope: "row" }, name), ...values.map((value) => html("td", { class: value < 0 ? "minus" : "" }, signed(value))));
  const rows = Object.keys(columns[0][1].layers).map((name) => row(name, columns.map(([, one]) => one.layers[name])));
  return html("table", {}, html("thead", {}, head), html("tbody", {}, ...rows, row("score", columns.map(([, one]) => one.score))));
}
