/** Calls of the server: its health, its models, and images with their progress. */

const TOKEN = "unclip-token";

/** An answer of the server that is no result, or none at all (status 0). `param` names the field it concerns, if any. */
export class ServerError extends Error {
  constructor(status, { message, param }, retryAfter = null) {
    super(retryAfter ? `${message} Try again in ${retryAfter} s.` : message);
    this.status = status;
    this.param = param ?? null;
  }
}

/** Make calls that carry the token; `askToken(problem)` resolves to one when the server asks for it, or to null. */
export function connect(askToken) {
  async function call(path, options = {}) {
    for (;;) {
      const headers = { ...options.headers, ...authorization() };
      const response = await fetch(path, { ...options, headers, cache: "no-store" }).catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ServerError(0, { message: "The server cannot be reached. Is it still running?" });
      });
      if (response.ok) return response;
      const error = await failure(response);
      if (response.status !== 401) throw error;
      const answer = await askToken(headers.Authorization ? "The server refused this token." : "");
      if (answer === null) throw error;
      sessionStorage.setItem(TOKEN, answer);
    }
  }

  return {
    async models() {
      return (await (await call("v1/models")).json()).data;
    },

    /** Sample images: resolves to the model that did, and to images with their seeds. */
    async sample({ path, fields, images = {} }, onProgress, signal) {
      const response = await call(path, { method: "POST", signal, ...encode({ ...fields, stream: true }, images) });
      for await (const event of events(response)) {
        if (event.type === "image.progress") onProgress(event.step, event.steps);
        else if (event.type === "error") throw new ServerError(response.status, event.error);
        else if (event.type === "image.completed") {
          return { model: event.model, images: event.data.map(({ b64_json, seed }) => ({ blob: png(b64_json), seed })) };
        }
      }
      throw new ServerError(0, { message: "The connection to the server was lost before the images were done." });
    },
  };
}

/** State of the server, "ok", "starting" or "offline", and names of the models that it serves, if it tells. */
export async function health() {
  try {
    const response = await fetch("healthz", { headers: authorization(), cache: "no-store" });
    const { models = [] } = response.ok ? await response.json() : {};
    return { state: response.ok ? "ok" : "starting", models };
  } catch {
    return { state: "offline", models: [] };
  }
}

function authorization() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function failure(response) {
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `The server answered ${response.status} ${response.statusText}.`;
  return new ServerError(response.status, { message, param: error?.param }, response.headers.get("Retry-After"));
}

/** JSON without images, a form with them. */
function encode(fields, images) {
  const given = Object.entries(fields).filter(([, value]) => value !== null && value !== "");
  if (!Object.keys(images).length) {
    return { body: JSON.stringify(Object.fromEntries(given)), headers: { "Content-Type": "application/json" } };
  }
  const body = new FormData();
  for (const [name, value] of given) body.append(name, value);
  for (const [name, blobs] of Object.entries(images)) {
    for (const blob of [blobs].flat()) body.append(name, blob, "image.png");
  }
  return { body };
}

/** Server-sent events of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) return;
    pieces.push(value);
    if (!value.includes("\n")) continue; // in the middle of a long line
    const blocks = pieces.join("").split("\n\n");
    pieces = [blocks.pop()];
    for (const block of blocks) {
      const data = block.replace(/^data: ?/, "");
      if (data.startsWith("{")) yield JSON.parse(data);
    }
  }
}

function png(base64) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });
}
