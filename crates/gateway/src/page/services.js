// Services: what answers, how fast, and how many replicas were asked for lately.

import { badge, el, keyed, put, say, short, words } from "./dom.js";

/** Shows the services of an overview. */
export function showServices(content, { namespace, services, moreServices }) {
  const list = content.querySelector("#services");
  keyed(list, services, (service) => `${service.namespace}/${service.name}`, make, (card, service) => {
    say(card.querySelector("h3"), namespace ? service.name : `${service.namespace}/${service.name}`);
    put(card.querySelector(".state"), badge(service.ready, false));
    const { throughput } = service;
    const rate = (value) => (throughput ? `${short(throughput[value])} tokens/s` : "–");
    const numbers = { generation: rate("generation"), prompt: rate("prompt"), waiting: throughput ? `${throughput.waiting}` : "–" };
    numbers.replicas = `${service.readyReplicas} of ${service.replicas} ready`;
    for (const [name, value] of Object.entries(numbers)) say(card.querySelector(`.${name}`), value);
    put(card.querySelector(".models"), ...service.models.map(modelName));
    // While it holds there is nothing to add.
    const message = service.ready?.status === "True" ? "" : (service.ready?.message ?? "");
    say(card.querySelector(".why"), message);
    showDecisions(card.querySelector("details"), service.decisions);
  });
  const note = content.querySelector("#services-note");
  if (services.length === 0) say(note, "No service that this key may use. One is made by applying an InferenceService.");
  else say(note, moreServices ? `${moreServices} more are not shown.` : "");
}

function make() {
  const number = (name, label) => el("div", {}, el("dt", {}, label), el("dd", { class: name }));
  return el("li", { class: "card" },
    el("div", { class: "head" }, el("h3"), el("span", { class: "state" })),
    el("p", { class: "models" }),
    el("dl", { class: "numbers" },
      number("generation", "Answers"), number("prompt", "Prompts"), number("replicas", "Replicas"), number("waiting", "Waiting")),
    el("p", { class: "why" }),
    el("details", {}, el("summary"), el("ol", { class: "decisions" })));
}

function modelName(model) {
  const attributes = model.answers ? {} : { class: "off", title: "It does not answer yet" };
  return el("code", attributes, model.id);
}

function showDecisions(details, decisions) {
  details.hidden = decisions.length === 0;
  say(details.querySelector("summary"), `Last decisions (${decisions.length})`);
  put(details.querySelector("ol"), ...decisions.map(({ time, from, to, reason, message }) => {
    const at = new Date(time);
    const clock = Number.isNaN(at.getTime()) ? time : at.toLocaleTimeString();
    return el("li", {},
      el("time", { datetime: time }, clock), " ",
      el("strong", {}, `${from} → ${to}`), ` ${words(reason)}`,
      message ? el("span", { class: "hint" }, ` ${message}`) : null);
  }));
}
