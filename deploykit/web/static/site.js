// The files of a site: fetched, and held to the manifest before anything is made of them.

import { Refusal } from "./refusal.js";

const SCHEMA = 1;
const DIGEST = /^\{"digest":"([0-9a-f]{64})",/; // the first key of canonical JSON, which is sorted
const PREPROCESS = {
  filter: ["nearest", "bilinear", "bicubic", "lanczos"], antialias: [true, false], fit: ["stretch", "cover"],
  exif: [true], alpha: ["white"], channels: [1, 3],
};

// Browsers hash for pages of https and of this very machine alone.
export const canHash = globalThis.crypto?.subtle !== undefined;

/** Return the manifest of the site at the URL `base`. */
export async function fetchManifest(base) {
  const text = new TextDecoder().decode(await fetchBytes(base, "manifest.json", "no-cache"));
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw new Refusal("manifest.json: expected JSON; put the whole site up again");
  }
  if (manifest?.schema !== SCHEMA) {
    throw new Refusal(`manifest.json: schema: expected ${SCHEMA}, got ${manifest?.schema}; a newer deploykit.js reads it`);
  }
  const [start, digest] = DIGEST.exec(text) ?? [];
  if (!digest || (canHash && (await sha256(new TextEncoder().encode(`{${text.slice(start.length)}`))) !== digest)) {
    throw new Refusal("manifest.json: digest: differs from the content; put the whole site up again");
  }
  checkPreprocess(manifest.preprocess);
  return manifest;
}

function checkPreprocess(preprocess) {
  if (preprocess === null) return;
  for (const [key, values] of Object.entries(PREPROCESS)) {
    if (values.includes(preprocess[key])) continue;
    throw new Refusal(`manifest.json: preprocess.${key}: expected one of ${values.join(", ")}, got ${preprocess[key]}`);
  }
}

/** Return the bytes of a file as the manifest declares it. */
export async function fetchFile(base, manifest, name) {
  const entry = manifest.files[name];
  if (!entry) throw new Refusal(`manifest.json: expected ${name} among its files; export the model with --target web`);
  for (const cache of ["default", "reload"]) { // a cache may have kept a file of an earlier export
    const bytes = await fetchBytes(base, name, cache);
    if (bytes.length === entry.bytes && (!canHash || (await sha256(bytes)) === entry.sha256)) return bytes;
  }
  throw new Refusal(`${name}: differs from manifest.json; put the whole site up again`);
}

async function fetchBytes(base, name, cache) {
  const response = await fetch(new URL(name, base), { cache }).catch(() => null);
  if (!response) throw new Refusal(`${name}: cannot be fetched; see whether the server still runs`);
  if (!response.ok) throw new Refusal(`${name}: cannot be fetched, the server answers ${response.status}`);
  return new Uint8Array(await response.arrayBuffer().catch(() => {
    throw new Refusal(`${name}: cannot be fetched to its end; see whether the server still runs`);
  }));
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (one) => one.toString(16).padStart(2, "0")).join("");
}
