// Jobs: how far each is, how its loss went, and what it was measured to be worth.

import { ask } from "./api.js";
import { curve } from "./curve.js";
import { badge, el, keyed, put, say, short } from "./dom.js";

/** Of the scores, those of which less is better. */
const LESS = new Set(["Perplexity"]);

/** Shows the jobs of an overview, the newest first. */
export function showJobs(content, { namespace, jobs, moreJobs }) {
  const list = content.querySelector("#jobs");
  keyed(list, jobs, (job) => `${job.namespace}/${job.name}`, make, (card, job) => {
    say(card.querySelector("h3"), namespace ? job.name : `${job.namespace}/${job.name}`);
    put(card.querySelector(".state"), badge(job.succeeded, job.succeeded?.status === "False"));
    put(card.querySelector(".models"), job.base ? el("code", {}, job.base) : null, job.base ? " → " : null,
      el("code", {}, job.output));
    say(card.querySelector(".why"), job.succeeded?.status === "True" ? "" : (job.succeeded?.message ?? ""));
    showProgress(card, job.progress, job.succeeded?.status === "Unknown");
    showScores(card.querySelector(".scores"), job.scores);
    showLosses(card, job);
  });
  const note = content.querySelector("#jobs-note");
  if (jobs.length === 0) say(note, "No job that this key may see. One is made by applying a FineTuneJob.");
  else say(note, moreJobs ? `${moreJobs} more are not shown.` : "");
}

function make() {
  return el("li", { class: "card" },
    el("div", { class: "head" }, el("h3"), el("span", { class: "state" })),
    el("p", { class: "models" }),
    el("div", { class: "progress" }, el("progress", { max: 1, value: 0, "aria-label": "Progress" }), el("span")),
    el("p", { class: "why" }),
    el("div", { class: "results" }, el("figure", {}), el("table", { class: "scores" })));
}

function showProgress(card, progress, runs) {
  const place = card.querySelector(".progress");
  place.hidden = !progress;
  if (!progress) return;
  const { step, steps, loss, tokensPerSecond, remaining } = progress;
  const bar = place.querySelector("progress");
  bar.value = steps > 0 ? step / steps : 0;
  const told = [`step ${step} of ${steps}`];
  if (loss) told.push(`loss ${loss}`);
  if (runs && tokensPerSecond) told.push(`${tokensPerSecond} tokens/s`);
  if (runs && remaining) told.push(`${remaining} left`);
  say(place.querySelector("span"), told.join(" · "));
}

function showScores(table, scores) {
  table.hidden = scores.length === 0;
  const row = ({ metric, before, after }) => {
    const [from, to] = [before, after].map((value) => (value ? Number(value) : null));
    const better = from !== null && to !== null && from !== to && (to < from) === LESS.has(metric);
    const cell = (value, attributes = {}) => el("td", attributes, value === null ? "–" : short3(value));
    return el("tr", {}, el("th", { scope: "row" }, metric), cell(from), cell(to),
      el("td", {}, better ? el("span", { class: "better" }, "better") : ""));
  };
  put(table, el("caption", {}, "Scores"),
    el("thead", {}, el("tr", {}, ...["Metric", "Before", "After"].map((name) => el("th", { scope: "col" }, name)), el("td"))),
    el("tbody", {}, ...scores.map(row)));
}

const short3 = (value) => (Math.abs(value) < 100 ? value.toFixed(3) : short(value));

/** Losses are asked for when there is a new one. */
async function showLosses(card, { namespace, name, progress }) {
  const figure = card.querySelector("figure");
  const step = `${progress?.step ?? 0}`;
  if (figure.dataset.step === step) return;
  figure.dataset.step = step;
  try {
    const place = [namespace, name].map(encodeURIComponent).join("/");
    const { points } = await (await ask(`lathe/v1/jobs/${place}/losses`)).json();
    figure.replaceChildren(...curve(points));
    figure.hidden = points.length < 2;
  } catch {
    // The next overview tells what is wrong; then they are asked for again.
    delete figure.dataset.step;
  }
}
