/** The page of `unclip serve`: what happens when something is clicked. */

import { askForMask } from "./editor.js";
import { byId, clearErrors, offerModels, readSettings, showChoice, showError, writeSettings } from "./form.js";
import * as history from "./history.js";
import * as results from "./results.js";
import { connect, health } from "./server.js";

const LARGEST = 1024; // pixels of an image file's side, once cropped

let entries = []; // oldest first
let shown = null; // the entry of the result
let models = [];
let running = null; // AbortController of the running request
const ends = { start: null, end: null };

const server = connect(async (problem) => {
  const dialog = byId("lock");
  if (dialog.open) return null; // it is asked already
  byId("lock-problem").textContent = problem;
  byId("token").value = "";
  dialog.showModal();
  const isGiven = await new Promise((resolve) => {
    dialog.onsubmit = () => resolve(true);
    dialog.oncancel = () => resolve(false);
  });
  return isGiven ? byId("token").value.trim() : null;
});

/** Sample, with progress; the requests run one after the other and make one entry. */
async function sample(kind, settings, given, requests) {
  if (running) return tellProblem("Wait for the running request, or stop it first.");
  if (kind !== "interpolate" && !byId("count").reportValidity()) return; // its placeholders could fill the memory
  running = new AbortController();
  const start = performance.now();
  const title = results.titleOf({ kind, settings });
  clearErrors();
  tellProblem("");
  results.showPlaceholders(title, requests.reduce((sum, { fields }) => sum + fields.n, 0));
  progress(0, "Waiting for the server…");
  byId("progress").scrollIntoView({ block: "nearest" });
  refresh();
  try {
    const sets = [];
    for (const [index, request] of requests.entries()) {
      const of = requests.length > 1 ? `${request.fields.model}: ` : "";
      const onProgress = (step, steps) => progress((index + step / steps) / requests.length, `${of}step ${step} of ${steps}`);
      sets.push(await server.sample(request, onProgress, running.signal));
    }
    const seconds = (performance.now() - start) / 1000;
    await add({ id: Date.now(), kind, settings, given, sets, seconds });
    byId("announcement").textContent = `Done: ${sets.flatMap((set) => set.images).length} images, ${title}.`;
  } catch (error) {
    show(shown);
    const isElsewhere = error.param === { edit: "prompt", interpolate: "n" }[kind]; // not in the form
    if (error.name === "AbortError") byId("announcement").textContent = "Stopped.";
    else if (isElsewhere || !showError(error.param, error.message)) tellProblem(error.message);
  } finally {
    running = null;
    byId("progress").hidden = true;
    refresh();
  }
}

function progress(share, words) {
  byId("progress").hidden = false;
  byId("bar").value = share;
  byId("step").textContent = words;
  const quarter = Math.floor(share * 4);
  if (quarter > 0 && quarter < 4) byId("announcement").textContent = `${quarter * 25} % done.`; // read aloud once each
}

function tellProblem(message) {
  byId("problem").textContent = message;
}

const refresh = () => showChoice(models, running !== null);

const supports = (model, name) => models.find(({ id }) => id === model)?.supports.includes(name);

/** Parameters that all kinds of requests have, as far as the model supports them. */
function shared(settings, model = settings.model) {
  const given = (name, value) => (supports(model, name) ? { [name]: value } : {});
  const { count, seed, guidance, steps } = settings;
  return { model, n: count, seed, ...given("guidance_scale", guidance), ...given("steps", steps) };
}

function captioned(settings, model = settings.model) {
  const negative = supports(model, "negative_prompt") ? settings.negative : "";
  return { ...shared(settings, model), prompt: settings.caption, negative_prompt: negative };
}

function generate() {
  const settings = readSettings();
  const used = settings.mode === "compare" ? [settings.model, settings.other] : [settings.model];
  const requests = used.map((model) => ({ path: "v1/images/generations", fields: captioned(settings, model) }));
  return sample(settings.mode, settings, [], requests);
}

function vary(image) {
  const settings = readSettings();
  const request = { path: "v1/images/variations", fields: shared(settings), images: { image: image.blob } };
  return sample("vary", settings, [image.blob], [request]);
}

async function edit(image, entry) {
  const answer = await askForMask(image.blob, entry.settings?.caption || byId("caption").value);
  if (answer === null) return;
  const settings = { ...readSettings(), caption: answer.caption };
  const images = { image: image.blob, mask: answer.mask };
  await sample("edit", settings, [image.blob], [{ path: "v1/images/edits", fields: captioned(settings), images }]);
}

function interpolate() {
  const settings = { ...readSettings(), count: Number(byId("way").value) };
  const given = [ends.start, ends.end];
  const request = { path: "v1/images/interpolations", fields: shared(settings), images: { image: given } };
  return sample("interpolate", settings, given, [request]);
}

function setEnd(name, blob) {
  ends[name] = blob;
  byId(`${name}-image`).src = results.addressOf(blob);
  byId(`${name}-image`).hidden = false;
  byId("ends").hidden = false;
  byId("interpolate").disabled = !(ends.start && ends.end);
  byId("announcement").textContent = `This image is the ${name} of the interpolation.`;
}

function forgetEnds() {
  for (const name of ["start", "end"]) {
    ends[name] = null;
    byId(`${name}-image`).hidden = true;
  }
  byId("interpolate").disabled = true;
  byId("ends").hidden = true;
  byId("result").focus();
}

const IMAGE_ACTIONS = {
  vary,
  edit,
  start: (image) => setEnd("start", image.blob),
  end: (image) => setEnd("end", image.blob),
};

const ENTRY_ACTIONS = {
  show(entry) {
    show(entry);
    byId("result").focus();
    byId("result").scrollIntoView();
  },
  reuse(entry) {
    writeSettings({ ...entry.settings, mode: entry.kind === "compare" ? "compare" : "generate" });
    refresh();
    byId("caption").focus();
  },
  async forget(entry) {
    await history.forget(entry.id);
    drop([entry.id]);
    (byId("history").querySelector("button") ?? byId("result")).focus();
  },
};

async function add(entry) {
  entries.push(entry);
  shown = entry;
  drop(await history.keep(entry, entries.map(({ id }) => id)));
}

/** Take entries off the page. */
function drop(ids) {
  entries.filter(({ id }) => ids.includes(id)).forEach(results.release);
  entries = entries.filter(({ id }) => !ids.includes(id));
  show(shown && ids.includes(shown.id) ? (entries.at(-1) ?? null) : shown);
}

function show(entry) {
  shown = entry;
  if (entry === null) results.showNothing();
  else results.showResult(entry, (name, image) => IMAGE_ACTIONS[name](image, entry));
  results.showHistory(entries, (name, chosen) => ENTRY_ACTIONS[name](chosen));
  refresh();
}

/** Show an image file: its central square, as a PNG. */
async function takeFile(file) {
  tellProblem("");
  try {
    const image = await createImageBitmap(file);
    const side = Math.min(image.width, image.height);
    const size = Math.min(side, LARGEST);
    const canvas = new OffscreenCanvas(size, size);
    const corner = [(image.width - side) / 2, (image.height - side) / 2];
    canvas.getContext("2d").drawImage(image, ...corner, side, side, 0, 0, size, size);
    const blob = await canvas.convertToBlob({ type: "image/png" });
    await add({ id: Date.now(), kind: "file", settings: null, given: [], sets: [{ images: [{ blob, seed: null }] }] });
  } catch {
    tellProblem(`${file.name}: the browser cannot read this image. Choose a PNG, JPEG or WebP file.`);
  }
}

const STATES = {
  ok: () => `Ready · ${models.length} ${models.length === 1 ? "model" : "models"}`,
  starting: () => "The server is starting. This page waits for it.",
  offline: () => "The server cannot be reached. Trying again…",
};

/** Follow the state of the server, and the models that it serves. */
async function watch() {
  let known = "";
  for (;;) {
    const { state, models: served } = await health();
    if (state === "ok" && known !== JSON.stringify(served)) {
      try {
        models = await server.models();
        known = JSON.stringify(served);
        offerModels(models);
        refresh();
      } catch (error) {
        tellProblem(error.message);
      }
    }
    const status = byId("status");
    if (status.textContent !== STATES[state]()) status.textContent = STATES[state](); // read aloud only when it changes
    status.dataset.state = state;
    await new Promise((resolve) => setTimeout(resolve, state === "ok" ? 15_000 : 2_000));
  }
}

byId("request").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else generate();
});
byId("request").addEventListener("change", refresh);
byId("caption").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) byId("request").requestSubmit();
});
byId("file").addEventListener("change", (event) => {
  if (event.target.files.length) takeFile(event.target.files[0]);
  event.target.value = "";
});
byId("ends").addEventListener("submit", (event) => {
  event.preventDefault();
  interpolate();
});
byId("forget-ends").addEventListener("click", forgetEnds);
byId("forget-all").addEventListener("click", async () => {
  await history.forgetAll();
  drop(entries.map(({ id }) => id));
  byId("caption").focus();
});

entries = await history.open();
show(entries.at(-1) ?? null);
watch();
