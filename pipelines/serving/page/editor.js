/** The editor: a mask painted over an image, with mouse, touch or keyboard. */

import { byId } from "./form.js";

const STEP = 1 / 32; // of the image's width, for an arrow key
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const dialog = byId("editor");
const board = byId("board");
const paint = byId("paint");
const context = paint.getContext("2d", { willReadFrequently: true });
let spot = { x: 0.5, y: 0.5 }; // centre of the brush, as shares of width and height
let painting = false;

/** Let the user paint; resolves to the mask as a PNG (transparent where the image is made anew) and the caption, or null. */
export async function askForMask(blob, caption) {
  const image = await createImageBitmap(blob);
  for (const canvas of [byId("picture"), paint]) {
    canvas.width = image.width;
    canvas.height = image.height;
  }
  board.classList.toggle("pixelated", image.width <= 128);
  byId("picture").getContext("2d").drawImage(image, 0, 0);
  byId("edit-caption").value = caption;
  byId("editor-problem").textContent = "";
  moveTo({ x: 0.5, y: 0.5 });
  tell();
  dialog.returnValue = "";
  dialog.showModal();
  board.focus();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "apply") return null;
  return { mask: await maskOf(pixels()), caption: byId("edit-caption").value.trim() };
}

function moveTo({ x, y }) {
  spot = { x: Math.min(1, Math.max(0, x)), y: Math.min(1, Math.max(0, y)) };
  const { style } = byId("brush");
  style.left = `${spot.x * 100}%`;
  style.top = `${spot.y * 100}%`;
  style.width = `${byId("size").value}%`;
}

/** Paint a line from one point to another, or erase it. */
function stroke(from, to, erases = byId("erase").checked) {
  context.globalCompositeOperation = erases ? "destination-out" : "source-over";
  context.strokeStyle = checks(Math.ceil(paint.width / 32));
  context.lineCap = "round";
  context.lineWidth = (byId("size").value / 100) * paint.width;
  context.beginPath();
  context.moveTo(from.x * paint.width, from.y * paint.height);
  context.lineTo(to.x * paint.width + 0.01, to.y * paint.height); // a line without length would not be drawn
  context.stroke();
}

/** Pattern of grey and white squares, which means "transparent". */
function checks(size) {
  const canvas = new OffscreenCanvas(2 * size, 2 * size);
  const tile = canvas.getContext("2d");
  tile.fillStyle = "#eee";
  tile.fillRect(0, 0, 2 * size, 2 * size);
  tile.fillStyle = "#888";
  tile.fillRect(0, 0, size, size);
  tile.fillRect(size, size, size, size);
  return context.createPattern(canvas, "repeat");
}

const pixels = () => context.getImageData(0, 0, paint.width, paint.height);

function share() {
  const { data } = pixels();
  let painted = 0;
  for (let i = 3; i < data.length; i += 4) painted += data[i] > 127;
  return painted / (data.length / 4);
}

function tell() {
  const painted = share();
  byId("painted").textContent = painted ? `${Math.max(1, Math.round(painted * 100))} % is painted.` : "Nothing is painted.";
}

function maskOf(mask) {
  for (let i = 3; i < mask.data.length; i += 4) mask.data[i] = mask.data[i] > 127 ? 0 : 255;
  const canvas = new OffscreenCanvas(mask.width, mask.height);
  canvas.getContext("2d").putImageData(mask, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

const pointed = (event) => {
  const box = board.getBoundingClientRect();
  return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
};

board.addEventListener("pointerdown", (event) => {
  board.setPointerCapture(event.pointerId);
  painting = true;
  moveTo(pointed(event));
  stroke(spot, spot);
});
board.addEventListener("pointermove", (event) => {
  const before = spot;
  moveTo(pointed(event));
  if (painting) stroke(before, spot);
});
for (const name of ["pointerup", "pointercancel"]) {
  board.addEventListener(name, () => {
    painting = false;
    tell();
  });
}

board.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  const erases = event.key === "Delete" || event.key === "Backspace";
  if (!move && !erases && event.key !== " ") return;
  event.preventDefault();
  const before = spot;
  if (move) {
    const step = STEP * (event.shiftKey ? 4 : 1);
    moveTo({ x: spot.x + move[0] * step, y: spot.y + move[1] * step });
  } else if (!erases) {
    painting = true; // until the key is released, so that arrow keys draw a line
  }
  if (erases) stroke(spot, spot, true);
  else if (painting) stroke(before, spot);
  tell();
});
board.addEventListener("keyup", (event) => {
  if (event.key === " ") painting = false;
});

byId("size").addEventListener("input", () => moveTo(spot));
byId("clear").addEventListener("click", () => {
  context.clearRect(0, 0, paint.width, paint.height);
  tell();
});
byId("cancel-edit").addEventListener("click", () => dialog.close());
byId("apply-edit").addEventListener("click", (event) => {
  if (share() > 0) return;
  event.preventDefault();
  byId("editor-problem").textContent = "Paint over a part of the image first.";
  board.focus();
});
