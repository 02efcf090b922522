// The story: without a key the form that asks for one, with a key what that key may see, asked for again every two seconds.

import { Refused, ask, hasKey, useKey } from "./api.js";
import { say } from "./dom.js";
import { showJobs } from "./jobs.js";
import { Playground } from "./playground.js";
import { showServices } from "./services.js";

const PAUSE = 2000;
const asksForKeys = document.documentElement.dataset.auth === "keys";
const content = document.getElementById("content");
const whose = document.getElementById("whose");
const leave = document.getElementById("leave");

/** Counts what was shown: an answer that comes for what is no longer there shows nothing. */
let shown = 0;
let timer;
/** Of what is shown: its chats end with it. */
let playground = null;

function show(template) {
  shown += 1;
  clearTimeout(timer);
  playground?.clear();
  playground = null;
  content.replaceChildren(document.getElementById(template).content.cloneNode(true));
}

function door(trouble) {
  useKey("");
  show("door");
  say(whose, "");
  leave.hidden = true;
  const form = content.querySelector("form");
  const field = form.querySelector("input");
  say(form.querySelector("#key-error"), trouble);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    useKey(field.value.trim());
    try {
      inside(await overview());
      content.focus();
    } catch (error) {
      useKey("");
      say(form.querySelector("#key-error"), error.message);
      button.disabled = false;
      field.focus();
    }
  });
  field.focus();
}

async function overview() {
  return (await ask("lathe/v1/overview")).json();
}

function inside(first) {
  show("inside");
  leave.hidden = !asksForKeys;
  playground = new Playground(content);
  update(first, playground);
  const round = shown;
  const again = async () => {
    // A tab that nobody sees asks for nothing.
    if (!document.hidden) {
      try {
        const fresh = await overview();
        if (round !== shown) return;
        update(fresh, playground);
        say(content.querySelector("#trouble"), "");
      } catch (error) {
        if (round !== shown) return;
        if (error.status === 401) return door(error.message);
        say(content.querySelector("#trouble"), `${error.message} What you see may be old.`);
      }
    }
    timer = setTimeout(again, PAUSE);
  };
  timer = setTimeout(again, PAUSE);
}

function update(fresh, playground) {
  say(whose, fresh.namespace ? `Namespace ${fresh.namespace}, key ${fresh.key}` : "Every namespace: this gateway asks for no key");
  showServices(content, fresh);
  showJobs(content, fresh);
  playground.offer(fresh.services.flatMap((service) => service.models.filter((model) => model.answers)));
}

async function start() {
  if (asksForKeys && !hasKey()) return door("");
  try {
    inside(await overview());
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    // A gateway that restarts or is busy for a moment is asked again with the key that is there.
    if (asksForKeys && error.status === 401) return door(error.message);
    say(content, error.message);
    timer = setTimeout(start, PAUSE);
  }
}

leave.addEventListener("click", () => door(""));
start();
