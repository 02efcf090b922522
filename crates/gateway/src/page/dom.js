// Elements, made and changed without a word of HTML: what comes from a cluster or a model is always text.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; `null` children are left out. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Sets an element's text where it differs, so that a selection or a reader is not disturbed by what stays. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Puts other children in, where they say anything else. */
export function put(element, ...children) {
  const fresh = el("div", {}, ...children);
  if (element.innerHTML !== fresh.innerHTML) element.replaceChildren(...fresh.childNodes);
}

/** Brings a list in line with `items`: each keeps its element, which `make` makes once and `change` changes. */
export function keyed(list, items, key, make, change) {
  const known = new Map([...list.children].map((element) => [element.dataset.key, element]));
  items.forEach((item, index) => {
    const name = key(item);
    let element = known.get(name);
    known.delete(name);
    if (!element) {
      element = make(item);
      element.dataset.key = name;
    }
    // Moving an element takes the focus from what is in it.
    if (list.children[index] !== element) list.insertBefore(element, list.children[index] ?? null);
    change(element, item);
  });
  for (const element of known.values()) element.remove();
}

/** `MinimumReplicasUnavailable` for people. */
export function words(reason) {
  const apart = reason.replace(/([a-z0-9])([A-Z])/g, "$1 $2");
  return apart.charAt(0) + apart.slice(1).toLowerCase();
}

/** A number of few digits. */
export function short(value) {
  const digits = Math.abs(value) < 10 ? 1 : 0;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** A summary condition as a coloured word: green where it holds, red where it does not and `failed` says that this is final. */
export function badge(summary, failed) {
  if (!summary) return el("span", { class: "badge wait" }, "Not seen yet");
  const kind = summary.status === "True" ? "good" : failed ? "bad" : "wait";
  return el("span", { class: `badge ${kind}` }, words(summary.reason));
}
