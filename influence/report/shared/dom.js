// Elements and numbers, of the service's page and of reports. Text enters a page only as text nodes, whatever it holds.

const SVG = "http://www.w3.org/2000/svg";

// An element; `on…` attributes are listeners, true and false are attributes that are there or not, null children are left out.
export function html(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export const byId = (id) => document.getElementById(id);
export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
export const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
export const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥");

// Said by a screen reader, and not shown.
export function say(text) {
  byId("spoken").textContent = text;
}

export const superscript = (power) => String(power).replace(/-/g, "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);

// About three significant digits, with a real minus sign.
export function number(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  const sign = value < 0 ? "−" : "";
  const exponent = Math.floor(Math.log10(size));
  if (exponent >= -4 && exponent < 5) return sign + size.toFixed(Math.max(0, 2 - exponent));
  const [mantissa, power] = size.toExponential(1).split("e");
  return `${sign}${mantissa}×10${superscript(Number(power))}`;
}
export const signed = (value) => (value > 0 ? "+" : "") + number(value);
export const whole = (value) => value.toLocaleString("en");
export const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;

export function percent(share) {
  const points = 100 * share;
  if ((points > 0 && points < 1) || (points > 99 && points < 100)) return `${points < 1 ? points.toPrecision(2) : Math.floor(points * 10) / 10}%`;
  return `${Math.round(points)}%`;
}

// How strongly a score is coloured: the square root lets small scores be seen beside one that is far larger.
export const tone = (value, most) => (most ? Math.sqrt(Math.min(1, Math.abs(value) / most)) : 0);
