// The page of a web bundle: a person asks the model, which runs here.

import { startCamera, stopCamera } from "./camera.js";
import { Refusal, load } from "./deploykit.js";
import { drawing } from "./draw.js";
import { bars, complain, milliseconds, percent, rowsOf, thumbnail } from "./parts.js";

const $ = (id) => document.getElementById(id);
const SMALL = 64; // pixels; grey images up to this size are drawn rather than photographed
const SHOWN = 5; // classes
let model = null;
let times = []; // ms of the predictions so far
let turn = 0; // of the newest question; what answers an older one is not shown

const pad = drawing($("canvas"), (image) => ask(image, image));

async function start() {
  const threads = Number(new URLSearchParams(location.search).get("threads")) || undefined;
  try {
    model = await load(undefined, { threads, prove: false });
  } catch (error) {
    $("served").textContent = "";
    return failed(error);
  }
  const { name, version, target, outputs } = model.manifest;
  document.title = `${name} ${version}: a model in this browser`;
  $("name").textContent = name;
  $("served").textContent = `Version ${version} for ${target}, ${outputs[0].shape.at(-1)} classes.`;
  $("here").replaceChildren(...rowsOf(wordsOf(model.environment)));
  $("main").hidden = false;
  offerWays();
  await prove();
}

function wordsOf({ runtime, threads, crossOriginIsolated, hashesChecked }) {
  return {
    Runtime: `${runtime}, WebAssembly with SIMD`,
    Threads: crossOriginIsolated ? String(threads) : "1: the page is not cross-origin isolated",
    "Cross-origin isolated": crossOriginIsolated ? "yes" : "no",
    Hashes: hashesChecked ? "of manifest, model and runtime checked" : "not checked: a browser hashes only for https and for this machine",
  };
}

async function prove() {
  const { passed, why, samples, maxAbs, greyLevels } = await model.selftest();
  const pixels = model.manifest.preprocess ? `; pixels differ by ${greyLevels} grey levels at most` : "";
  const allowed = model.manifest.tolerance.max_abs;
  $("proof").className = passed ? "passed" : "failed";
  $("proof").textContent = passed
    ? `Self-test passed: ${samples} golden samples are answered as they were when the model was made ` +
      `(largest difference ${maxAbs.toPrecision(3)}, allowed ${allowed.toPrecision(3)}${pixels}).`
    : `Self-test failed: ${why}. Do not trust the answers of this browser.`;
}

function offerWays() {
  const { preprocess } = model.manifest;
  if (!preprocess) {
    $("drop-text").textContent = "Drop a .npy file, or choose one";
    $("kinds").textContent = `This model takes arrays: one sample of shape (${model.manifest.inputs[0].shape.slice(1)})`;
    $("file").accept = ".npy";
  }
  $("ways").hidden = !preprocess;
  const drawn = preprocess?.channels === 1 && preprocess.height <= SMALL;
  document.querySelector(`[name=way][value=${drawn ? "draw" : "file"}]`).checked = true;
  // scikit-learn's digits fill their 8 x 8 pixels, MNIST's 20 of 28.
  pad.fill = preprocess?.height <= 16 ? 1 : 20 / 28;
  show();
}

function show() {
  const way = document.querySelector("[name=way]:checked").value;
  for (const one of ["draw", "file", "camera"]) $(`way-${one}`).hidden = one !== way;
  if (way !== "camera") switchCamera(false);
}

/** Ask the model, and show what it answers unless something newer was asked. */
async function ask(source, image) {
  const mine = ++turn;
  $("answer").setAttribute("aria-busy", "true");
  try {
    const answer = await model.predict(source);
    if (mine === turn) answered(answer, image);
  } catch (error) {
    if (mine === turn) failed(error);
  }
  if (mine === turn) $("answer").removeAttribute("aria-busy");
}

function answered({ label, probability, top, milliseconds: { read, run } }, image) {
  complain();
  times = [...times.slice(-999), run];
  $("headline").classList.remove("none");
  $("headline").textContent = `${label}, ${percent(probability)}`;
  $("predictions").replaceChildren(bars(top.slice(0, SHOWN)));
  const facts = { Model: milliseconds(run), [`Median of ${times.length}`]: milliseconds(median(times)), Decoding: milliseconds(read) };
  if (image) facts.Asked = thumbnail(image, "the image that was asked about");
  $("facts").replaceChildren(...rowsOf(facts));
  $("headline").scrollIntoView({ block: "nearest" });
}

function median(numbers) {
  const sorted = numbers.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Show no answer rather than one of something that was cleared or refused. */
function forget() {
  turn++;
  $("answer").removeAttribute("aria-busy");
  $("headline").classList.add("none");
  $("headline").textContent = "Nothing was asked yet.";
  $("predictions").replaceChildren();
  $("facts").replaceChildren();
}

function failed(error) {
  forget();
  const sentence = error instanceof Refusal ? error.message : `This browser cannot run the model: ${error.message}`;
  complain(/[.!?]$/.test(sentence) ? sentence : `${sentence}.`);
  if (!(error instanceof Refusal)) throw error;
}

function askFile(file) {
  if (!file || !model) return;
  document.querySelector("[name=way][value=file]").checked = true;
  show();
  ask(file, model.manifest.preprocess ? file : undefined);
}

function switchCamera(on) {
  if (!on) stopCamera($("video"));
  $("start").textContent = on ? "Stop the camera" : "Start the camera";
  $("look").hidden = !on;
}

$("ways").addEventListener("change", show);
$("file").addEventListener("change", () => {
  askFile($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
$("clear").addEventListener("click", () => {
  pad.clear();
  forget();
});
$("centre").addEventListener("change", () => (pad.centred = $("centre").checked));
$("start").addEventListener("click", async () => {
  if ($("video").srcObject) return switchCamera(false);
  try {
    if (await startCamera($("video"))) switchCamera(true);
  } catch (error) {
    failed(error);
  }
});
$("look").addEventListener("click", () => ask($("video")));
document.addEventListener("paste", (event) => askFile(event.clipboardData?.files[0]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // a browser would leave the page and open the file
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") askFile(event.dataTransfer.files[0]);
  });
}

start();
