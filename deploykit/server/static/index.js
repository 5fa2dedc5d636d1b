// The page on which a person asks a model.

import { Refused, ask, useToken } from "./server.js";
import { bars, complain, make, milliseconds, percent, rowsOf, thumbnail } from "./parts.js";
import { drawing } from "./draw.js";

const $ = (id) => document.getElementById(id);
const SMALL = 64; // pixels; grey images up to this size are drawn rather than photographed
let models = []; // as readiness tells them
let paths = {}; // of openapi.json
let model = null; // the chosen one: { name, version, provider, path, images, shape, classes }
let again = start; // what to do once there is a token
let sent = null; // the request under way

const pad = drawing($("canvas"), (image) => send(image, "image/png", image));

async function start() {
  again = start;
  try {
    const ready = await ask("v2/health/ready");
    paths = (await ask("openapi.json")).value.paths;
    models = ready.value.models;
  } catch (error) {
    failed(error);
    if (error.status === 503) setTimeout(start, 2000); // it is starting
    return;
  }
  const options = models.map((one, place) => make("option", { value: String(place) }, title(one)));
  $("model").replaceChildren(...options);
  $("model-row").hidden = models.length < 2;
  await choose();
}

const title = (one) => `${one.name} ${one.version}`;

/** The end of a path: a name, and the version where the name has several. */
function place(one) {
  const name = encodeURIComponent(one.name);
  const alone = models.filter((other) => other.name === one.name).length === 1;
  return alone ? name : `${name}/versions/${encodeURIComponent(one.version)}`;
}

async function choose() {
  again = choose;
  const one = models[Number($("model").value)];
  try {
    const { inputs, outputs } = (await ask(`v2/models/${place(one)}`)).value;
    const body = paths[`/predict/${place(one)}`].post.requestBody.content;
    model = {
      ...one,
      path: `predict/${place(one)}`,
      images: "image/png" in body,
      shape: inputs[0].shape.slice(1),
      classes: outputs[0].shape.at(-1),
    };
  } catch (error) {
    return failed(error);
  }
  complain();
  $("main").hidden = false;
  $("served").textContent = `${title(model)} on ${model.provider}, ${model.classes} classes.`;
  $("top").max = model.classes;
  $("top").value = Math.min(5, model.classes);
  forget();
  offerWays();
}

function offerWays() {
  const [height, , channels] = model.shape;
  $("ways").hidden = !model.images;
  const way = model.images && channels === 1 && height <= SMALL ? "draw" : "image";
  document.querySelector(`[name=way][value=${way}]`).checked = true;
  // scikit-learn's digits fill their 8 x 8 pixels, MNIST's 20 of 28.
  pad.fill = height <= 16 ? 1 : 20 / 28;
  pad.clear();
  const sizes = model.shape.map((size) => (size < 0 ? "any" : size)).join(" x "); // -1 varies
  const least = model.shape.map((size) => Math.max(size, 1));
  $("array-note").textContent = `One sample of ${sizes} numbers, nested as its shape is, or a list of samples.`;
  const zeros = least.reduceRight((inner, size) => Array(size).fill(inner), 0);
  $("array").value = least.reduce((a, b) => a * b, 1) <= 1024 ? JSON.stringify(zeros) : "";
  show();
}

function show() {
  const way = model.images ? document.querySelector("[name=way]:checked").value : "numbers";
  for (const id of ["draw", "image", "numbers"]) $(id).hidden = id !== way;
}

/** Ask the model, and show what it answers unless something newer was asked. */
async function send(body, type, image) {
  sent?.abort();
  const request = (sent = new AbortController());
  again = () => send(body, type, image);
  $("answer").setAttribute("aria-busy", "true");
  const top = Math.min(Math.max(Number($("top").value) || 5, 1), model.classes);
  const started = performance.now();
  try {
    const options = { method: "POST", body, headers: type ? { "Content-Type": type } : {}, signal: request.signal };
    const { value, headers } = await ask(`${model.path}?top=${top}`, options);
    const elapsed = performance.now() - started;
    complain();
    answered(value, headers, elapsed, image);
  } catch (error) {
    if (error.name !== "AbortError") failed(error);
  }
  if (sent === request) $("answer").removeAttribute("aria-busy");
}

function answered({ model: name, version, predictions }, headers, elapsed, image) {
  $("headline").classList.remove("none");
  $("headline").textContent = predictions.map((one) => `${one.label}, ${percent(one.probability)}`).join("; ");
  $("predictions").replaceChildren(...predictions.map((one) => bars(one.top)));
  const found = models.find((one) => one.name === name && one.version === version) ?? model;
  const facts = {
    "Round trip": milliseconds(elapsed),
    ...timings(headers.get("server-timing") ?? ""),
    Model: `${name} ${version}`,
    Provider: found.provider,
  };
  if (image) facts.Sent = thumbnail(image, "the image that was sent");
  $("facts").replaceChildren(...rowsOf(facts));
  $("headline").scrollIntoView({ block: "nearest" });
}

/** The parts of a server-timing header: { "Server, compute": "0.61 ms" }. */
function timings(header) {
  const parts = [...header.matchAll(/([\w-]+)[^,]*?;\s*dur=([\d.]+)/g)];
  return Object.fromEntries(parts.map(([, name, time]) => [`Server, ${name}`, milliseconds(Number(time))]));
}

/** Show no answer rather than that of another model or of something that was cleared. */
function forget() {
  sent?.abort();
  sent = null;
  $("headline").classList.add("none");
  $("headline").textContent = "Nothing was asked yet.";
  $("predictions").replaceChildren();
  $("facts").replaceChildren();
}

function failed(error) {
  if (!(error instanceof Refused)) throw error;
  forget();
  complain(error.message);
  if (error.status !== 401) return;
  $("token-form").hidden = false;
  $("token").focus();
}

function sendFile(file) {
  if (!file || !model?.images) return;
  document.querySelector("[name=way][value=image]").checked = true;
  show();
  send(file, file.type, file);
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken($("token").value);
  $("token-form").hidden = true;
  complain();
  again();
});
$("model").addEventListener("change", choose);
$("ways").addEventListener("change", show);
$("file").addEventListener("change", () => {
  sendFile($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
$("top").addEventListener("change", () => sent && !$("error").textContent && again());
$("clear").addEventListener("click", () => {
  pad.clear();
  forget();
});
$("centre").addEventListener("change", () => (pad.centred = $("centre").checked));
$("numbers").addEventListener("submit", (event) => {
  event.preventDefault();
  let inputs;
  try {
    inputs = JSON.parse($("array").value);
  } catch (error) {
    return complain(`The numbers are no JSON: ${error.message}.`);
  }
  send(JSON.stringify({ inputs }), "application/json");
});
document.addEventListener("paste", (event) => sendFile(event.clipboardData?.files[0]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // a browser would leave the page and open the file
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") sendFile(event.dataTransfer.files[0]);
  });
}

start();
