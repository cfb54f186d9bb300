// A conversation: what was said, what is being said, and how fast.
// Whatever the model writes becomes text and never markup.

import * as api from "./api.js";
import * as attachments from "./attachments.js";

const $ = (id) => document.getElementById(id);
const show = (id, yes) => $(id).classList.toggle("hidden", !yes);
const SAMPLE = 2000; // milliseconds that the speed is taken over

let turns = []; // { role, content } of the API
let running = null; // aborts the answer that comes

function complain(error) {
  const words = typeof error === "string" ? error : error && error.message;
  $("error").textContent = words || "";
  show("error", Boolean(words));
  if (error && error.status === 401) {
    show("key-form", true);
    $("key").focus();
  }
}

async function begin() {
  let served;
  try {
    served = await api.models();
  } catch (error) {
    if (error.status === 401 && !api.hasKey()) error.message = "";
    complain(error);
    return false;
  }
  complain(null);
  show("key-form", false);
  const [first] = served;
  $("title").textContent = document.title = first.id;
  $("model").replaceChildren(...served.map((one) => new Option(one.id)));
  show("model-field", served.length > 1);
  show("title", served.length === 1);
  const types = attachments.accept(first.input_modalities || []);
  $("files").accept = types;
  show("attach", Boolean(types));
  return true;
}

function addTurn(role, text, files = []) {
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  turn.setAttribute("aria-label", role === "user" ? "You" : "Model");
  if (files.length) {
    const pictures = document.createElement("div");
    pictures.className = "pictures";
    pictures.append(...files.map(attachments.view));
    turn.append(pictures);
  }
  const body = document.createElement("div");
  body.className = "text";
  body.textContent = text;
  turn.append(body);
  $("empty").hidden = true;
  $("chat").append(turn);
  scroll(true);
  return turn;
}

function note(turn, words) {
  const line = document.createElement("div");
  line.className = "note";
  line.textContent = words;
  turn.append(line);
  scroll();
}

// Follows the text, unless somebody reads further up.
function scroll(always = false) {
  const chat = $("chat");
  const left = chat.scrollHeight - chat.scrollTop - chat.clientHeight;
  if (always || left < 120) chat.scrollTop = chat.scrollHeight;
}

function body() {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
  const out = { model: $("model").value || undefined, messages };
  const number = (id) => ($(id).value === "" ? undefined : $(id).valueAsNumber);
  return { ...out, temperature: number("temperature"), max_tokens: number("max-tokens") };
}

// Tokens a second: of late while they come, of all at the end.
class Speed {
  constructor() {
    this.begun = performance.now();
    this.samples = [];
    this.tokens = 0;
  }

  take(usage) {
    if (!usage || usage.completion_tokens <= this.tokens) return;
    this.tokens = usage.completion_tokens;
    const now = performance.now();
    this.first ??= now;
    this.atFirst ??= this.tokens;
    this.last = now;
    this.samples.push([now, this.tokens]);
    while (now - this.samples[0][0] > SAMPLE && this.samples.length > 2) this.samples.shift();
    const [[then, had]] = this.samples;
    if (now > then) $("speed").textContent = `${rate(this.tokens - had, now - then)} tokens/s`;
  }

  words() {
    $("speed").textContent = "";
    if (!this.tokens) return "";
    const parts = [`${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`];
    if (this.last > this.first)
      parts.push(`${rate(this.tokens - this.atFirst, this.last - this.first)} tokens/s`);
    parts.push(`first after ${((this.first - this.begun) / 1000).toFixed(2)} s`);
    return parts.join(" · ");
  }
}

const rate = (tokens, milliseconds) => ((1000 * tokens) / milliseconds).toFixed(1);

const ENDS = { length: "cut off: no more tokens", content_filter: "withheld by a safety check" };

async function answer(turn) {
  const text = turn.querySelector(".text");
  const speed = new Speed();
  const ends = [];
  let written = "";
  try {
    for await (const chunk of api.chat(body(), running.signal)) {
      speed.take(chunk.usage);
      for (const { delta, finish_reason: reason } of chunk.choices) {
        if (delta.content) {
          written += delta.content;
          text.append(delta.content); // a text node
          scroll();
        }
        if (ENDS[reason]) ends.push(ENDS[reason]);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
    ends.push(error.name === "AbortError" ? "stopped" : "broken off");
  }
  const words = [speed.words(), ...ends].filter(Boolean).join(" · ");
  if (words) note(turn, words);
  return written;
}

function busy(turn, yes) {
  turn.classList.toggle("busy", yes);
  $("chat").setAttribute("aria-busy", String(yes));
  show("stop", yes);
  show("send", !yes);
}

async function send() {
  const written = $("text").value;
  if (running || !(written.trim() || attachments.any())) return;
  complain(null);
  const files = attachments.take();
  const parts = files.map(attachments.part);
  if (written.trim()) parts.push({ type: "text", text: written });
  turns.push({ role: "user", content: files.length ? parts : written });
  const asked = addTurn("user", written, files);
  const turn = addTurn("assistant", "");
  $("text").value = "";
  grow();
  const mine = turns;
  running = new AbortController();
  busy(turn, true);
  const text = await answer(turn);
  running = null;
  busy(turn, false);
  if (mine !== turns) return; // another chat has begun
  if (text) {
    turns.push({ role: "assistant", content: text });
  } else if (!$("error").classList.contains("hidden")) {
    turns.pop(); // nothing was answered: all as it was, to be sent again
    asked.remove();
    turn.remove();
    $("text").value ||= written;
    attachments.putBack(files);
    grow();
  } else {
    turns.push({ role: "assistant", content: "" });
  }
  if ($("key-form").classList.contains("hidden")) $("text").focus();
}

function grow() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("text").addEventListener("input", grow);
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  turns = [];
  attachments.take();
  complain(null);
  $("chat").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("text").focus();
});
$("settings-button").addEventListener("click", () => {
  const open = $("settings").classList.contains("hidden");
  show("settings", open);
  $("settings-button").setAttribute("aria-expanded", String(open));
});
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  api.useKey($("key").value.trim());
  if (await begin()) $("text").focus();
});
$("attach").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", async () => {
  complain(await attachments.add($("files").files));
  $("files").value = "";
});
document.addEventListener("paste", async (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  complain(await attachments.add(event.clipboardData.files));
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, async (event) => {
    event.preventDefault();
    $("composer").classList.toggle("over", name === "dragover");
    if (name === "drop") complain(await attachments.add(event.dataTransfer.files));
  });
}

begin();
