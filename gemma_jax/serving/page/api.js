// Asks the server that this page came from.

const KEY = "gemma-jax-key"; // of the tab's storage

export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

// `credentials: "omit"`: else browsers ask for a password of their own wherever a key is wrong.
async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /header|ByteString|ISO-8859/i.test(error.message))
      throw new Refusal("A key is made of ASCII characters.", 401);
    throw new Refusal("The server cannot be reached.", 0);
  }
  if (answer.ok) return answer;
  throw await refusal(answer);
}

async function refusal(answer) {
  let words = `The server answered ${answer.status}.`;
  try {
    words = (await answer.json()).error.message;
  } catch {
    // no JSON: the status says it
  }
  if (answer.status === 401) words = "The server does not know this key.";
  const wait = answer.headers.get("Retry-After");
  if (wait) words += ` Try again in ${wait} s.`;
  return new Refusal(words, answer.status);
}

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

// Yields the chunks of an answer as they come.
export async function* chat(body, signal) {
  const answer = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.message, 500);
    yield chunk;
  }
  throw new Refusal("The answer broke off.", 0);
}

// The data of server-sent events, each one line here.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The answer broke off.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
