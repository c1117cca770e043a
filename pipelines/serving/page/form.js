/** The form: its settings, the models that it offers, and errors at its fields. */

export const byId = (id) => document.getElementById(id);

const number = (input) => (input.value === "" ? null : Number(input.value));

/** Settings as the form has them; with "random", a new seed. */
export function readSettings() {
  if (byId("random").checked) byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  return {
    mode: byId("request").elements.mode.value,
    caption: byId("caption").value.trim(),
    negative: byId("negative").value.trim(),
    model: byId("model").value,
    other: byId("other").value,
    count: number(byId("count")),
    seed: number(byId("seed")),
    guidance: number(byId("guidance")),
    steps: number(byId("steps")),
  };
}

/** Put settings of an earlier request into the form; models that are no longer served stay out. */
export function writeSettings(settings) {
  byId("request").elements.mode.value = settings.mode;
  for (const name of ["caption", "negative", "count", "seed", "guidance", "steps"]) byId(name).value = settings[name] ?? "";
  for (const name of ["model", "other"]) choose(byId(name), settings[name]);
  byId("random").checked = false;
}

/** Offer models, and keep the chosen ones while they are served. */
export function offerModels(models) {
  byId("modes").hidden = models.length < 2;
  for (const [place, select] of [byId("model"), byId("other")].entries()) {
    const before = select.value;
    select.replaceChildren(...models.map((model) => new Option(nameOf(model), model.id)));
    select.selectedIndex = Math.min(place, models.length - 1);
    choose(select, before);
  }
}

/** Name and version of a model, and the aliases of that version. */
function nameOf({ id, aliases }) {
  return [id, ...aliases.filter((alias) => alias.includes("@")).map((alias) => alias.split("@")[1])].join(" · ");
}

function choose(select, value) {
  if ([...select.options].some((option) => option.value === value)) select.value = value;
}

/** Show what the chosen model supports, and its defaults. */
export function showChoice(models, busy) {
  const comparing = byId("request").elements.mode.value === "compare";
  const chosen = [byId("model"), ...(comparing ? [byId("other")] : [])].map((select) => select.value);
  const served = chosen.map((id) => models.find((model) => model.id === id)).filter(Boolean);
  byId("other-field").hidden = !comparing;
  byId("model-label").textContent = comparing ? "Model A" : "Model";
  for (const [id, name] of [["guidance", "guidance_scale"], ["steps", "steps"]]) {
    const values = served.map((model) => model.defaults?.[name]).filter((value) => value != null);
    byId(id).placeholder = [...new Set(values)].map((value) => Number(value.toPrecision(3))).join(" / ");
  }
  byId("seed").disabled = byId("random").checked;
  byId("submit").textContent = busy ? "Stop" : comparing ? "Compare" : "Generate";
  for (const element of document.querySelectorAll("[data-needs]")) {
    const used = element.closest("#request") ? served : served.slice(0, 1); // images are sampled from by model A
    element.hidden = !used.some((model) => model.supports.includes(element.dataset.needs));
  }
}

/** Show a message at the field of a parameter; false if the form has no such field that can be seen. */
export function showError(param, message) {
  const input = param && document.querySelector(`[data-param="${CSS.escape(param)}"]`);
  if (!input || input.closest("[hidden]")) return false;
  const error = document.createElement("p");
  error.className = "error";
  error.id = `${input.id}-error`;
  error.textContent = message;
  input.closest(".field").append(error);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", error.id);
  input.focus();
  error.scrollIntoView({ block: "nearest" });
  return true;
}

export function clearErrors() {
  for (const error of byId("request").querySelectorAll(".error")) error.remove();
  for (const input of byId("request").querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}
