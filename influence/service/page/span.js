// The completion's tokens, of which some can be chosen with the mouse, a finger or the keyboard: the span of a query.

import { html, plural, visible } from "./dom.js";

// `change` is called with [first, last + 1], or null for all.
export class SpanChooser {
  constructor(box, said, change) {
    Object.assign(this, { box, said, change, tokens: [], span: null, active: 0, anchor: 0, dragged: false, disabled: false });
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("pointerdown", (event) => this.#down(event));
    box.addEventListener("pointermove", (event) => this.#over(event));
    addEventListener("pointerup", () => (this.dragging = false));
  }

  set(tokens, span = null) {
    const fits = span && span[0] < span[1] && span[1] <= tokens.length;
    Object.assign(this, { tokens, span: fits ? span : null, active: fits ? span[0] : 0, anchor: fits ? span[0] : 0, dragging: false });
    this.box.replaceChildren(...tokens.map((token, i) => html("span", { role: "option", id: `token-${i}`, class: "chip", "data-place": i },
      visible(token.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length))) || "·")));
    this.#draw();
  }

  disable(why) {
    this.disabled = why;
    this.#draw();
  }

  #choose(span) {
    this.span = span && span[1] - span[0] === this.tokens.length ? null : span;
    this.#draw();
    this.change(this.span);
  }

  #reach(place) {
    this.active = place;
    this.#choose([Math.min(this.anchor, place), Math.max(this.anchor, place) + 1]);
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
    const alone = this.span && this.span[0] === place && this.span[1] === place + 1;
    if (event.shiftKey && this.span) return this.#reach(place);
    if (alone) return this.#choose(null);
    Object.assign(this, { anchor: place, dragging: true });
    this.#reach(place);
  }

  #over(event) {
    const place = this.dragging ? this.#place(event) : null;
    if (place !== null && place !== this.active) this.#reach(place);
  }

  #key(event) {
    if (this.disabled || event.altKey || event.ctrlKey || event.metaKey || !this.tokens.length) return;
    const last = this.tokens.length - 1;
    const moved = { ArrowRight: this.active + 1, ArrowDown: this.active + 1, ArrowLeft: this.active - 1, ArrowUp: this.active - 1, Home: 0, End: last }[event.key];
    if (moved !== undefined) {
      this.active = Math.min(last, Math.max(0, moved));
      if (event.shiftKey) this.#reach(this.active);
      else this.anchor = this.active;
    } else if (event.key === " " || event.key === "Enter") {
      const alone = this.span && this.span[0] === this.active && this.span[1] === this.active + 1;
      this.anchor = this.active;
      this.#choose(alone ? null : [this.active, this.active + 1]);
    } else if (event.key === "Escape" && this.span) this.#choose(null);
    else return;
    event.preventDefault();
    this.#draw();
  }

  #draw() {
    const [first, end] = this.span ?? [0, this.tokens.length];
    [...this.box.children].forEach((chip, i) => {
      const inside = !this.disabled && i >= first && i < end;
      chip.setAttribute("aria-selected", String(inside));
      chip.classList.toggle("chosen", inside);
      chip.classList.toggle("here", i === this.active);
    });
    this.box.setAttribute("aria-activedescendant", this.tokens.length ? `token-${this.active}` : "");
    this.box.setAttribute("aria-disabled", String(Boolean(this.disabled)));
    this.box.parentElement.hidden = !this.tokens.length;
    const some = this.span && `Only ${plural(end - first, "token")} of ${this.tokens.length} ${end - first === 1 ? "counts" : "count"}: “${visible(this.tokens.slice(first, end).join(""))}”. Escape counts all.`;
    this.said.textContent = this.disabled || some || `${this.tokens.length === 1 ? "Its one token counts." : `All ${this.tokens.length} tokens count. Drag over some, or use the arrow keys with Shift, to ask about these only.`}`;
  }
}
