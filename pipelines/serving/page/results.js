/** Images on the page: a result, and the list of earlier ones. */

import { byId } from "./form.js";

const addresses = new Map(); // blob -> its object URL

export function addressOf(blob) {
  if (!addresses.has(blob)) addresses.set(blob, URL.createObjectURL(blob));
  return addresses.get(blob);
}

/** Let go of an entry's images. */
export function release(entry) {
  for (const blob of [...entry.given, ...entry.sets.flatMap((set) => set.images.map((image) => image.blob))]) {
    URL.revokeObjectURL(addresses.get(blob));
    addresses.delete(blob);
  }
}

export function titleOf({ kind, settings }) {
  const titles = { vary: "Variations", interpolate: "Interpolation", file: "Image file" };
  return titles[kind] ?? settings.caption;
}

export function detailsOf({ kind, settings, sets, seconds }) {
  if (kind === "file") return "";
  return [
    ...(kind === "edit" ? ["edited"] : []),
    sets.map((set) => set.model).join(" and "),
    `seed ${settings.seed}`,
    ...(settings.guidance === null ? [] : [`guidance ${settings.guidance}`]),
    ...(settings.steps === null ? [] : [`${settings.steps} steps`]),
    ...(kind === "generate" && settings.negative ? [`not “${settings.negative}”`] : []),
    `${seconds.toFixed(1)} s`,
  ].join(" · ");
}

/** Show an entry; `act(name, image, entry)` is called with the action that was chosen for an image. */
export function showResult(entry, act) {
  const heading = element("div", "heading");
  heading.append(...entry.given.map((blob) => picture(blob, "given image", 64)));
  const words = element("div");
  words.append(element("h2", "", titleOf(entry)), element("p", "details", detailsOf(entry)));
  heading.append(words);
  const body = { interpolate: player, compare: comparison }[entry.kind] ?? grid;
  byId("result").replaceChildren(heading, body(entry, act));
}

/** Tiles that stand for images until these are sampled. */
export function showPlaceholders(title, count) {
  const heading = element("div", "heading");
  heading.append(element("h2", "", title));
  const tiles = Array.from({ length: count }, () => element("div", "placeholder"));
  byId("result").replaceChildren(heading, columns("grid", tiles));
}

export function showNothing() {
  byId("result").replaceChildren(element("p", "empty", "Images appear here."));
}

function grid(entry, act) {
  return columns("grid", entry.sets[0].images.map((image, index) => tile(entry, image, `${index + 1}`, act)));
}

function comparison(entry, act) {
  const box = element("div", "comparison");
  for (const set of entry.sets) {
    const column = element("section");
    column.setAttribute("aria-label", set.model);
    column.append(element("h3", "", set.model));
    column.append(...set.images.map((image, index) => tile(entry, image, `${index + 1}`, act)));
    box.append(column);
  }
  return box;
}

/** A slider through the images of an interpolation. */
function player(entry, act) {
  const images = entry.sets[0].images;
  const box = element("div", "player");
  const stage = element("div");
  const slider = element("input");
  const strip = element("div", "strip");
  Object.assign(slider, { type: "range", min: 0, max: images.length - 1, value: 0, id: "position" });
  slider.setAttribute("aria-label", "Position between start and end");
  strip.setAttribute("aria-hidden", "true"); // the slider reaches the same images
  const show = () => {
    const position = Number(slider.value);
    const label = `${position + 1} of ${images.length}`;
    slider.setAttribute("aria-valuetext", `image ${label}`);
    stage.replaceChildren(tile(entry, images[position], label, act));
    [...strip.children].forEach((thumb, index) => thumb.classList.toggle("current", index === position));
  };
  images.forEach(({ blob }, index) => {
    const thumb = picture(blob, "", 64);
    thumb.addEventListener("click", () => {
      slider.value = index;
      show();
    });
    strip.append(thumb);
  });
  slider.addEventListener("input", show);
  box.append(stage, slider, strip);
  show();
  return box;
}

function tile(entry, image, label, act) {
  const figure = byId("tile").content.firstElementChild.cloneNode(true);
  const img = figure.querySelector("img");
  img.src = addressOf(image.blob);
  img.alt = `${titleOf(entry)}, image ${label}`;
  img.addEventListener("load", () => {
    if (img.naturalWidth > 128) return;
    img.classList.add("pixelated");
    img.style.setProperty("--pixels", `${img.naturalWidth}px`);
  });
  figure.querySelector(".label").textContent = image.seed === null ? label : `${label} · seed ${image.seed}`;
  for (const button of figure.querySelectorAll("button")) {
    button.setAttribute("aria-label", `${button.textContent}: image ${label}`);
    button.addEventListener("click", () => act(button.dataset.action, image, entry));
  }
  const link = figure.querySelector("a");
  link.href = img.src;
  link.download = `unclip-${image.seed ?? "image"}-${label.replaceAll(" ", "-")}.png`;
  link.setAttribute("aria-label", `Save: image ${label}`);
  return figure;
}

/** List the entries, newest first; `act(name, entry)` is called with the action that was chosen. */
export function showHistory(entries, act) {
  byId("history-section").hidden = !entries.length;
  byId("history").replaceChildren(
    ...entries.toReversed().map((entry) => {
      const item = byId("past").content.firstElementChild.cloneNode(true);
      const images = entry.sets.flatMap((set) => set.images).slice(0, 4);
      item.querySelector(".thumbs").append(...images.map(({ blob }) => picture(blob, "", 64)));
      item.querySelector(".title").textContent = titleOf(entry);
      item.querySelector(".details").textContent = detailsOf(entry);
      item.querySelector("[data-action=reuse]").hidden = entry.kind === "file";
      for (const button of item.querySelectorAll("button")) {
        const words = button.textContent || "Show";
        button.setAttribute("aria-label", `${words}: ${titleOf(entry)}, ${new Date(entry.id).toLocaleTimeString()}`);
        button.addEventListener("click", () => act(button.dataset.action, entry));
      }
      return item;
    }),
  );
}

function picture(blob, alt, size) {
  const img = element("img", "pixelated thumb");
  Object.assign(img, { src: addressOf(blob), alt, width: size, height: size });
  return img;
}

function columns(name, children) {
  const box = element("div", name);
  const count = children.length;
  box.style.setProperty("--columns", count === 4 ? 2 : Math.min(count, 3));
  box.append(...children);
  return box;
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}
