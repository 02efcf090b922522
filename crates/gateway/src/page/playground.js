// The playground: a chat with a model, and the same with a second one beside it. What was said is kept in this page alone.

import { ask, events } from "./api.js";
import { el, keyed, say } from "./dom.js";

const NOBODY = "";

export class Playground {
  constructor(content) {
    const of = (id) => content.querySelector(`#${id}`);
    this.fields = Object.fromEntries(
      ["ask", "model", "beside", "tokens", "temperature", "system", "prompt", "send", "stop", "again", "answers"].map((id) => [id, of(id)]));
    this.sides = new Map();
    this.running = null;
    const { ask: form, prompt, stop, again, model, beside } = this.fields;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    stop.addEventListener("click", () => this.running?.abort());
    again.addEventListener("click", () => this.clear());
    model.addEventListener("change", () => this.clear());
    beside.addEventListener("change", () => this.clear());
  }

  /** Offers what answers now. Only when that changes the gateway is asked for the list, which knows an adapter's base. */
  async offer(models) {
    const ids = models.map((model) => model.id).sort().join(" ");
    if (ids === this.offered) return;
    this.offered = ids;
    try {
      const { data } = await (await ask("v1/models")).json();
      this.choices(data);
    } catch {
      // The next overview tells what is wrong; then it is asked for again.
      this.offered = undefined;
    }
  }

  choices(models) {
    const { model, beside, send } = this.fields;
    const label = ({ id, parent }) => (parent ? `${id} (on ${parent})` : id);
    const fill = (select, options) => {
      const chosen = select.value;
      keyed(select, options, (option) => option.id, () => el("option"), (element, option) => {
        element.value = option.id;
        say(element, label(option));
      });
      if (options.some((option) => option.id === chosen)) select.value = chosen;
      // Another model never takes up what was said to the one that is gone.
      else if (chosen !== NOBODY) this.clear();
    };
    fill(model, models);
    fill(beside, [{ id: NOBODY, label: "" }, ...models]);
    say(beside.options[0], "nobody");
    send.disabled = models.length === 0 || this.running !== null;
  }

  clear() {
    this.running?.abort();
    this.sides.clear();
    this.fields.answers.replaceChildren();
  }

  async send() {
    const { model, beside, tokens, temperature, system, prompt, send, stop, answers } = this.fields;
    if (this.running || !model.value) return;
    const running = new AbortController();
    this.running = running;
    send.disabled = true;
    stop.disabled = false;
    const settings = { max_tokens: tokens.valueAsNumber, temperature: temperature.valueAsNumber };
    const ids = [model.value, beside.value].filter((id) => id !== NOBODY);
    const sides = ids.map((id, number) => this.side(number, id));
    const text = prompt.value;
    prompt.value = "";
    answers.classList.toggle("two", sides.length > 1);
    await Promise.all(sides.map((side) => side.say(text, system.value, settings, running.signal)));
    this.running = null;
    send.disabled = false;
    stop.disabled = true;
    // Whoever pressed a button that is off now goes on with the next message.
    if (document.activeElement === document.body || document.activeElement === stop) prompt.focus();
  }

  side(number, id) {
    if (!this.sides.has(number)) {
      const side = new Side(id);
      this.sides.set(number, side);
      this.fields.answers.append(side.element);
    }
    return this.sides.get(number);
  }
}

/** One model's chat. */
class Side {
  constructor(id) {
    this.id = id;
    this.said = [];
    this.log = el("ol", { class: "log", role: "log", "aria-label": `Chat with ${id}` });
    this.element = el("article", { class: "card side" }, el("h3", {}, id), this.log);
  }

  async say(text, system, settings, signal) {
    const answer = el("p", { class: "text" });
    const told = el("p", { class: "hint" });
    const turn = el("li", { class: "answer" }, answer, told);
    this.log.append(el("li", { class: "user" }, el("p", { class: "text" }, text)), turn);
    // Read out when it is whole.
    this.log.setAttribute("aria-busy", "true");
    say(told, "…");
    const question = { role: "user", content: text };
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.said, question];
    const timing = new Timing();
    try {
      const body = { model: this.id, messages, ...settings, stream: true, stream_options: { include_usage: true } };
      for await (const event of events(await ask("v1/chat/completions", { body, signal }))) {
        const piece = event.choices?.[0]?.delta?.content;
        if (piece) {
          timing.piece();
          answer.append(piece);
        }
        if (event.usage) timing.usage = event.usage;
      }
      say(told, timing.words());
    } catch (error) {
      const stopped = error.name === "AbortError";
      say(told, stopped ? "Stopped." : error.message);
      if (!stopped) told.className = "error";
    } finally {
      this.log.removeAttribute("aria-busy");
    }
    // What was answered belongs to the chat, also where it was stopped; a question without any answer does not.
    if (answer.textContent) this.said.push(question, { role: "assistant", content: answer.textContent });
  }
}

/** When pieces came, and what the worker counted. */
class Timing {
  start = performance.now();

  piece() {
    this.last = performance.now();
    this.first ??= this.last;
  }

  words() {
    const told = [];
    if (this.usage) told.push(`${this.usage.prompt_tokens} tokens read`, `${this.usage.completion_tokens} written`);
    if (this.first) told.push(`first after ${((this.first - this.start) / 1000).toFixed(2)} s`);
    const seconds = (this.last - this.first) / 1000;
    const later = (this.usage?.completion_tokens ?? 0) - 1;
    // Of a moment no speed is told.
    if (later > 0 && seconds > 0.1) told.push(`then ${(later / seconds).toFixed(0)} tokens/s`);
    return told.join(" · ");
  }
}
