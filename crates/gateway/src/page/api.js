// What the page asks of its gateway, with the key in the one header that is for it.

const PLACE = "lathe-key";
let key = kept();

/** Why an answer was refused, in the gateway's or the worker's words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const hasKey = () => key !== "";

/** Uses this key from now on, in this tab; the empty one is none. */
export function useKey(given) {
  key = given;
  try {
    if (given) sessionStorage.setItem(PLACE, given);
    else sessionStorage.removeItem(PLACE);
  } catch {
    // A browser that keeps nothing asks for the key again when it reloads.
  }
}

function kept() {
  try {
    return sessionStorage.getItem(PLACE) ?? "";
  } catch {
    return "";
  }
}

/** An answer that succeeded; `Refused` otherwise. A `body` is posted. */
export async function ask(path, { body, signal } = {}) {
  // A header can hold no other; `fetch` would say that nobody answers.
  if (!/^[\x21-\x7e]*$/.test(key)) throw new Refused(401, "This is no key: a key has letters, digits, - and _ alone.");
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The gateway does not answer. Is your connection up?");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Refused(answer.status, told?.error?.message ?? `The gateway answered with status ${answer.status}.`);
}

/** The events of a streamed answer up to `[DONE]`; one that is an error, or an end without it, throws. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let whole = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused(0, "The answer broke off; ask again.");
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        // A comment, which keeps proxies awake.
        if (lines.length === 0) continue;
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        whole = data === "[DONE]";
        if (whole) return;
        const event = JSON.parse(data);
        if (event.error) throw new Refused(0, event.error.message);
        yield event;
      }
    }
  } finally {
    // After an error nobody reads on, and the replica shall not write on. A whole answer ends by itself, with what it cost.
    if (!whole) reader.cancel().catch(() => {});
  }
}
