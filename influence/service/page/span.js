// The completion's tokens, of which some can be chosen with the mouse, a finger or the keyboard: the span of a query, or several.

import { html, plural, visible } from "./dom.js";

const places = (first, end) => Array.from({ length: end - first }, (_, i) => first + i);

// `change` is called whenever other tokens are chosen.
export class SpanChooser {
  constructor(box, said, change) {
    Object.assign(this, { box, said, change, tokens: [], chosen: null, kept: new Set(), active: 0, anchor: 0, disabled: false });
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("pointerdown", (event) => this.#down(event));
    box.addEventListener("pointermove", (event) => this.#over(event));
    addEventListener("pointerup", () => (this.dragging = false));
  }

  // [first, last + 1]; a list of these where tokens between them are left out; null for all.
  get span() {
    const spans = [];
    for (const place of [...(this.chosen ?? [])].sort((a, b) => a - b)) {
      if (spans.at(-1)?.[1] === place) spans.at(-1)[1] += 1;
      else spans.push([place, place + 1]);
    }
    return spans.length > 1 ? spans : spans[0] ?? null;
  }

  set(tokens, span = null) {
    const spans = span ? (Array.isArray(span[0]) ? span : [span]) : [];
    const fit = spans.length && spans.every(([first, end]) => first < end && end <= tokens.length);
    const first = fit ? spans[0][0] : 0;
    Object.assign(this, { tokens, chosen: fit ? new Set(spans.flatMap(([a, b]) => places(a, b))) : null, kept: new Set(), active: first, anchor: first, dragging: false });
    this.box.replaceChildren(...tokens.map((token, i) => html("span", { role: "option", id: `token-${i}`, class: "chip", "data-place": i },
      visible(token.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length))) || "·")));
    this.#draw();
  }

  disable(why) {
    this.disabled = why;
    this.#draw();
  }

  #choose(chosen) {
    this.chosen = chosen && chosen.size && chosen.size < this.tokens.length ? chosen : null;
    this.#draw();
    this.change();
  }

  #reach(place) {
    this.active = place;
    this.#choose(new Set([...this.kept, ...places(Math.min(this.anchor, place), Math.max(this.anchor, place) + 1)]));
  }

  // This token alone, or all when it was; `adding` takes it to the others, or away from them.
  #pick(place, adding) {
    const alone = this.chosen?.size === 1 && this.chosen.has(place);
    this.kept = new Set(adding ? this.chosen : []);
    Object.assign(this, { anchor: place, active: place });
    if (adding ? this.kept.delete(place) : alone) return this.#choose(adding ? new Set(this.kept) : null);
    this.#reach(place);
  }

  #place(event) {
    const under = document.elementFromPoint(event.clientX, event.clientY)?.closest(".chip");
    return under && this.box.contains(under) ? Number(under.dataset.place) : null;
  }

  #down(event) {
    const place = this.#place(event);
    if (this.disabled || place === null || event.button !== 0) return;
    event.preventDefault();
    this.box.focus();
    if (event.shiftKey && this.chosen) return this.#reach(place);
    this.#pick(place, event.ctrlKey || event.metaKey);
    this.dragging = this.chosen?.has(place) ?? false;
  }

  #over(event) {
    const place = this.dragging ? this.#place(event) : null;
    if (place !== null && place !== this.active) this.#reach(place);
  }

  #key(event) {
    const adding = event.ctrlKey || event.metaKey;
    if (this.disabled || event.altKey || (adding && event.key !== " ") || !this.tokens.length) return;
    const last = this.tokens.length - 1;
    const moved = { ArrowRight: this.active + 1, ArrowDown: this.active + 1, ArrowLeft: this.active - 1, ArrowUp: this.active - 1, Home: 0, End: last }[event.key];
    if (moved !== undefined) {
      this.active = Math.min(last, Math.max(0, moved));
      if (event.shiftKey) this.#reach(this.active);
      else Object.assign(this, { anchor: this.active, kept: new Set() });
    } else if (event.key === " " || event.key === "Enter") this.#pick(this.active, adding);
    else if (event.key === "Escape" && this.chosen) this.#choose(null);
    else return;
    event.preventDefault();
    this.#draw();
  }

  #draw() {
    [...this.box.children].forEach((chip, i) => {
      const inside = !this.disabled && (this.chosen?.has(i) ?? true);
      chip.setAttribute("aria-selected", String(inside));
      chip.classList.toggle("chosen", inside);
      chip.classList.toggle("here", i === this.active);
    });
    this.box.setAttribute("aria-activedescendant", this.tokens.length ? `token-${this.active}` : "");
    this.box.setAttribute("aria-disabled", String(Boolean(this.disabled)));
    this.box.parentElement.hidden = !this.tokens.length;
    const spans = this.span ? [this.span].flat(Array.isArray(this.span[0]) ? 1 : 0) : [];
    const texts = spans.map(([first, end]) => `“${visible(this.tokens.slice(first, end).join(""))}”`).join(" and ");
    const some = this.chosen && `Only ${plural(this.chosen.size, "token")} of ${this.tokens.length} ${this.chosen.size === 1 ? "counts" : "count"}: ${texts}. Escape counts all.`;
    this.said.textContent = this.disabled || some || `${this.tokens.length === 1 ? "Its one token counts." : `All ${this.tokens.length} tokens count. Drag over some, or use the arrow keys with Shift, to ask about these only; with Ctrl, about several places.`}`;
  }
}
