// openapi.json as a page, with requests to try.

import { Refused, ask, send, useToken } from "./server.js";
import { complain, make } from "./parts.js";
import { describe, resolve } from "./schema.js";

const MOST = 20000; // characters of an answer that are shown
const $ = (id) => document.getElementById(id);
let api = null;

async function start() {
  try {
    api = (await ask("openapi.json")).value;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return complain(error.message);
  }
  $("token-form").hidden = !api.components.securitySchemes;
  $("operations").append(make("p", { class: "intro" }, ...marked(api.info.description)));
  for (const { name, description } of api.tags) {
    const found = Object.entries(api.paths).flatMap(([path, methods]) =>
      Object.entries(methods).flatMap(([method, one]) => (one.tags[0] === name ? [operation(method, path, one)] : [])),
    );
    const heading = make("h2", {}, name[0].toUpperCase() + name.slice(1));
    if (found.length) $("operations").append(make("section", { class: "card" }, heading, make("p", {}, description), ...found));
  }
}

/** One operation, whose content is made when it is opened. */
function operation(method, path, one) {
  const summary = make("summary", {}, make("code", {}, make("b", {}, method.toUpperCase()), ` ${path}`), make("span", {}, one.summary));
  const details = make("details", {}, summary);
  details.addEventListener("toggle", () => details.childElementCount > 1 || details.append(...content(method, path, one)), { once: true });
  return details;
}

function content(method, path, one) {
  const url = new URL(path.slice(1), document.baseURI);
  const open = !(one.security ?? api.security)?.length;
  const parts = one.description ? [make("p", {}, ...marked(one.description))] : [];
  if (one.parameters) parts.push(make("h3", {}, "Parameters"), parameters(one.parameters));
  const bodies = Object.entries(one.requestBody?.content ?? {});
  if (bodies.length) parts.push(make("h3", {}, one.requestBody.required ? "Body" : "Body (optional)"));
  for (const [type, body] of bodies) {
    parts.push(make("h4", {}, make("code", {}, type)), code(describe(api, body.schema)), ...curlLines(url, type, body, open));
  }
  if (!bodies.length) parts.push(code(curl(url, open)));
  return [...parts, make("h3", {}, "Try it"), trial(method, url, one, bodies), make("h3", {}, "Answers"), answers(one)];
}

function parameters(list) {
  const rows = list.map(({ name, in: where, description, schema }) =>
    make("li", {}, make("code", {}, name), ` (${where}): ${description} `, make("code", {}, describe(api, schema))),
  );
  return make("ul", {}, ...rows);
}

function answers(one) {
  const rows = Object.entries(one.responses).map(([status, given]) => {
    const response = resolve(api, given);
    const headers = Object.keys(response.headers ?? {}).filter((name) => name !== "X-Request-Id");
    const told = headers.length ? ` Headers: ${headers.join(", ")}.` : "";
    const item = make("li", {}, make("b", {}, status), " ", ...marked(response.description + told));
    if (status !== "200") return item;
    for (const [type, body] of Object.entries(response.content ?? {})) item.append(code(`${type}\n${describe(api, body.schema)}`));
    return item;
  });
  return make("ul", { class: "plain" }, ...rows);
}

// curl

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(url, open, ...more) {
  return ["curl -sS", quoted(url.href), ...(open ? [] : ['-H "Authorization: Bearer $DEPLOYKIT_TOKEN"']), ...more].join(" ");
}

function curlLines(url, type, body, open) {
  const headers = Object.entries({ "Content-Type": type, ...body["x-example-headers"] });
  const head = headers.map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`);
  const lines = [];
  const command = body["x-example-command"];
  if (command) lines.push(`${command} |\n  ${curl(url, open, ...head, "--data-binary @-")}`);
  if ("example" in body) lines.push(curl(url, open, ...head, "-d", quoted(JSON.stringify(body.example))));
  const file = curl(url, open, ...head, "--data-binary @FILE");
  const own = type === "application/json" || body["x-example-headers"] ? [] : [make("p", { class: "note" }, "With a file of yours:"), code(file)];
  return [...lines.map(code), ...own];
}

// Requests

function trial(method, url, one, bodies) {
  const form = make("form", { class: "trial" });
  const output = make("div", { role: "status" });
  const queries = (one.parameters ?? []).map(({ name, schema }) => field(name, { type: "number", min: schema.minimum, max: schema.maximum }));
  const types = make("select", {}, ...bodies.map(([type]) => make("option", {}, type)));
  const input = make("div");
  const fill = () => input.replaceChildren(...bodyFields(bodies.find(([type]) => type === types.value)));
  types.addEventListener("change", fill);
  if (bodies.length) fill();
  form.append(...queries, ...(bodies.length ? [make("label", {}, "Content type ", types)] : []), input, make("button", {}, "Send"), output);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const target = new URL(url);
    for (const query of form.querySelectorAll("[type=number]")) if (query.value) target.searchParams.set(query.name, query.value);
    const options = { method: method.toUpperCase(), headers: {} };
    if (bodies.length) {
      options.headers["Content-Type"] = types.value;
      for (const header of input.querySelectorAll("[type=text]")) if (header.value) options.headers[header.name] = header.value;
      options.body = input.querySelector("textarea")?.value ?? input.querySelector("[type=file]").files[0] ?? "";
    }
    output.replaceChildren("Waiting…");
    output.replaceChildren(...(await answer(target, options)));
  });
  return form;
}

function field(name, attributes) {
  return make("label", {}, `${name} `, make("input", { name, ...attributes }));
}

function bodyFields([type, body]) {
  const headers = Object.entries(body["x-example-headers"] ?? {}).map(([name, value]) => field(name, { type: "text", value }));
  if (type !== "application/json") return [...headers, field("File", { type: "file" })];
  const example = "example" in body ? JSON.stringify(body.example) : "";
  return [make("label", {}, "JSON", make("textarea", { rows: "5", spellcheck: "false" }, example))];
}

/** Send a request and return elements that tell what came back. */
async function answer(url, options) {
  const started = performance.now();
  try {
    const response = await send(url, options);
    const bytes = await response.arrayBuffer();
    const elapsed = (performance.now() - started).toFixed(1);
    const headers = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
    const status = make("p", {}, make("b", {}, String(response.status)), ` in ${elapsed} ms, ${bytes.byteLength} bytes`);
    return [status, code(headers), code(readable(bytes, response.headers.get("content-type") ?? ""))];
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return [make("p", { class: "error" }, error.message)];
  }
}

function readable(bytes, type) {
  if (type.startsWith("application/octet-stream")) return `${bytes.byteLength} bytes`;
  let text = new TextDecoder().decode(bytes);
  if (type.startsWith("application/json") && text.length < MOST) text = JSON.stringify(JSON.parse(text), null, 1);
  return text.length > MOST ? `${text.slice(0, MOST)}…` : text;
}

// Text

function code(text) {
  // What scrolls must be reached by the keyboard.
  return make("pre", { tabindex: "0" }, make("code", {}, text));
}

/** The text with what stands between backticks as code. */
function marked(text) {
  return text.split("`").map((part, place) => (place % 2 ? make("code", {}, part) : part));
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken($("token").value);
  $("token-state").textContent = $("token").value ? "In use." : "None in use.";
});

start();
