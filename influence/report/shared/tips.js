// One tooltip, for a pointer, a finger and a keyboard; what the keyboard reaches is also said. A line is text, or an element such as a link.

import { byId, clamp, html, say } from "./dom.js";

const known = new WeakMap(); // element -> function of an event that gives the lines of its tooltip, or null
let pinned = false;
let place = () => {};

export const tipOf = (element, lines) => known.set(element, lines);

// `where()` gives the rectangle that the tooltip belongs to; it is asked again when the page scrolls.
export function show(lines, where, aloud = false) {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line, i) => html("div", {}, i || line instanceof Node ? line : html("b", {}, line))));
  tip.hidden = false;
  (place = () => put(tip, where()))();
  if (aloud) say(lines.map((line) => (line instanceof Node ? line.textContent : line)).join(", "));
}

function put(tip, rectangle) {
  if (rectangle.bottom < 0 || rectangle.top > innerHeight) return hide();
  const { width, height } = tip.getBoundingClientRect();
  const above = rectangle.top - height - 8;
  const top = above >= 4 ? above : Math.min(rectangle.bottom + 8, innerHeight - height - 4);
  const left = clamp(rectangle.left + rectangle.width / 2 - width / 2, 8, Math.max(8, document.documentElement.clientWidth - width - 8));
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
}

export function hide() {
  byId("tip").hidden = true;
  pinned = false;
}

// The tooltip stays until something else is clicked.
export function pin() {
  pinned = true;
}

export function tipped(target) {
  for (let element = target; element instanceof Element; element = element.parentElement) if (known.has(element)) return element;
  return null;
}

function reveal(event) {
  const element = tipped(event.target);
  const lines = element && known.get(element)(event);
  if (!lines) return false;
  // The line of a wrapped token that the pointer is on, not the box around all its lines; of a diagram, the place in it.
  const line = Math.max(0, [...element.getClientRects()].findIndex((r) => event.clientY >= r.top && event.clientY <= r.bottom));
  const { clientX: x, clientY: y } = event;
  show(lines, element.matches("svg") ? () => new DOMRect(x, y - 6, 1, 12) : () => element.getClientRects()[line] ?? element.getBoundingClientRect());
  return true;
}

export function listen() {
  const inside = (event) => byId("tip").contains(event.target);
  const over = (event) => event.pointerType !== "touch" && !pinned && !inside(event) && !reveal(event) && hide();
  document.addEventListener("pointerover", over);
  document.addEventListener("pointermove", (event) => event.target instanceof SVGElement && over(event));
  document.addEventListener("click", (event) => {
    if (inside(event)) return void setTimeout(hide); // after its link was followed
    hide();
    pinned = reveal(event);
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  addEventListener("scroll", () => byId("tip").hidden || place(), { passive: true, capture: true });
}

// Arrow keys step through the elements of a container that can hold the focus, showing and saying the tooltip of each.
export function walk(container, elements) {
  let at = -1;
  const mark = (on) => elements()[at]?.classList.toggle("at", on);
  container.tabIndex = 0;
  container.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.target !== container || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const all = elements();
    if (!all.length) return;
    mark(false);
    at = at < 0 ? 0 : clamp(at + step, 0, all.length - 1);
    mark(true);
    all[at].scrollIntoView({ block: "nearest", inline: "nearest" });
    const here = all[at];
    show(known.get(here)({}), () => here.getBoundingClientRect(), true);
  });
  container.addEventListener("blur", () => (mark(false), (at = -1), hide()));
}
