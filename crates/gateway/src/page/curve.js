// A loss curve: a line with both axes named, and the same in words.

import { el, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [360, 180];
const EDGE = { left: 46, right: 10, top: 10, bottom: 36 };

/** The picture of points of [step, loss], and its words; nothing of fewer than two. */
export function curve(points) {
  if (points.length < 2) return [];
  const steps = points.map(([step]) => step);
  const losses = points.map(([, loss]) => loss);
  const [first, last] = [steps[0], steps.at(-1)];
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const x = (step) => EDGE.left + ((step - first) / (last - first || 1)) * (WIDTH - EDGE.left - EDGE.right);
  const y = (loss) => HEIGHT - EDGE.bottom - ((loss - low) / (high - low || 1)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const line = points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
  const [bottom, middle] = [HEIGHT - EDGE.bottom, (EDGE.top + HEIGHT - EDGE.bottom) / 2];
  const text = (at, to, anchor, words) => svg("text", { x: at, y: to, "text-anchor": anchor }, words);
  const words = `Loss by step: ${losses[0].toFixed(3)} after step ${first}, ${losses.at(-1).toFixed(3)} after step ${last}, ` +
    `lowest ${low.toFixed(3)}.`;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img", "aria-label": words },
    svg("path", { class: "axis", d: `M${EDGE.left} ${EDGE.top}V${bottom}H${WIDTH - EDGE.right}` }),
    svg("polyline", { points: line }),
    text(EDGE.left - 6, EDGE.top + 8, "end", high.toFixed(2)),
    text(EDGE.left - 6, bottom, "end", low.toFixed(2)),
    text(EDGE.left, bottom + 14, "start", `${first}`),
    text(WIDTH - EDGE.right, bottom + 14, "end", `${last}`),
    text((EDGE.left + WIDTH - EDGE.right) / 2, HEIGHT - 6, "middle", "step"),
    svg("text", { transform: `translate(12 ${middle}) rotate(-90)`, "text-anchor": "middle" }, "loss, nats/token"));
  return [picture, el("figcaption", {}, words)];
}
