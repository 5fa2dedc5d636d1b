// A model of deploykit in a page.
//
//   import { load } from "./site/web/deploykit.js";
//   const model = await load();
//   const { label, probability } = await model.predict(file);

import { DTYPES, cast, dtypeOf, readNpy, sizeOf } from "./arrays.js";
import { checkGolden } from "./golden.js";
import { bytesOf, pixelsOf } from "./images.js";
import { toModelPixels } from "./preprocess.js";
import { Refusal } from "./refusal.js";
import { canHash, fetchFile, fetchManifest } from "./site.js";

export { Refusal };

const MODEL = "model.onnx";
const RUNTIME = "web/onnxruntime/ort.wasm.bundle.min.js";
const WASM = "web/onnxruntime/ort-wasm-simd-threaded.wasm";
// A module with one function that fills a vector (i8x16.splat): valid where there is SIMD.
const SIMD = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11,
];

/**
 * Open the model of a site that `deploykit export --target web` wrote.
 *
 * `site` is the site's address, by default that of this file's own site. `threads` is how many compute,
 * where the page is cross-origin isolated; elsewhere one does. Unless `prove` is false, the golden
 * samples are run first, for no browser was there when the model was made.
 *
 * Throws a Refusal that says which file cannot be had or differs from the manifest, or which golden
 * sample is answered otherwise.
 */
export async function load(site = new URL("../", import.meta.url), { threads, prove = true } = {}) {
  const base = new URL(site, globalThis.document?.baseURI ?? location.href);
  if (!base.pathname.endsWith("/")) base.pathname += "/";
  const manifest = await fetchManifest(base);
  const get = (name) => fetchFile(base, manifest, name);
  const [bytes, runtime] = await Promise.all([get(MODEL), openRuntime(base, get, threads)]);
  const session = await openSession(runtime, bytes, manifest);
  const model = new Model(manifest, runtime, session, get);
  try {
    if (prove) await model.prove();
  } catch (error) {
    await model.close();
    throw error;
  }
  return model;
}

/** Start the onnxruntime-web of a site: the bytes of its WebAssembly are those that were verified. */
async function openRuntime(base, get, threads) {
  if (!globalThis.WebAssembly?.validate(new Uint8Array(SIMD))) {
    throw new Refusal("expected a browser with WebAssembly SIMD; take a newer one");
  }
  const [wasm] = await Promise.all([get(WASM), get(RUNTIME)]);
  const runtime = await import(new URL(RUNTIME, base).href).catch((error) => {
    throw new Refusal(`${RUNTIME}: this browser cannot run it: ${error.message}`);
  });
  const { env } = runtime;
  env.logLevel = "error";
  env.wasm.wasmBinary ??= wasm;
  env.wasm.numThreads ??= globalThis.crossOriginIsolated ? (threads ?? usualThreads()) : 1;
  return runtime;
}

/** Half of the processors, but no more than 4: more make small models slower. */
const usualThreads = () => Math.min(4, Math.ceil((navigator.hardwareConcurrency || 1) / 2));

/** Open a session from verified bytes, and hold its border to the manifest. */
async function openSession({ InferenceSession, env }, bytes, manifest) {
  let session;
  try {
    session = await InferenceSession.create(bytes, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  } catch (error) {
    throw new Refusal(`${MODEL}: onnxruntime-web cannot open it: ${error.message}`);
  } finally {
    delete env.wasm.wasmBinary; // it was compiled
  }
  try {
    checkBorder(session, manifest);
  } catch (error) {
    await session.release();
    throw error;
  }
  return session;
}

function checkBorder(session, manifest) {
  for (const [key, found] of [["inputs", session.inputMetadata], ["outputs", session.outputMetadata]]) {
    const [told] = manifest[key];
    const [one] = found;
    const shape = one.shape.map((size) => (typeof size === "number" ? size : -1));
    if (found.length !== 1 || one.name !== told.name || one.type !== told.dtype || String(shape) !== String(told.shape)) {
      throw new Refusal(`${MODEL}: ${key}: expected what manifest.json says, got ${one.name}, ${one.type} ${shape}`);
    }
  }
  if (!DTYPES[manifest.inputs[0].dtype]) {
    throw new Refusal(`${MODEL}: inputs: expected one of ${Object.keys(DTYPES)}, got ${manifest.inputs[0].dtype}`);
  }
}

/** An opened model; `load` makes it. */
export class Model {
  #runtime;
  #session;
  #get;

  constructor(manifest, runtime, session, get) {
    this.manifest = manifest;
    this.#runtime = runtime;
    this.#session = session;
    this.#get = get;
    const { env } = runtime;
    /** What computes, and what this page lets it. */
    this.environment = {
      runtime: `onnxruntime-web ${env.versions.web ?? env.versions.common}`,
      provider: "wasm",
      simd: true,
      threads: env.wasm.numThreads,
      crossOriginIsolated: globalThis.crossOriginIsolated === true,
      hashesChecked: canHash,
    };
  }

  /**
   * Classify one sample.
   *
   * `source` is a PNG or JPEG file (Blob, File), an <img>, <canvas>, <video>, ImageBitmap, VideoFrame or
   * ImageData where the model takes images; a .npy file where it takes arrays; or a typed array of one
   * sample as the model takes it.
   *
   * Returns { label, probability, top, logits, milliseconds: { read, run } }; `top` names every class,
   * { label, probability } each, the likeliest first.
   */
  async predict(source) {
    const started = performance.now();
    const sample = await this.#read(source);
    const read = performance.now();
    const logits = await this.#run(sample, 1);
    const milliseconds = { read: read - started, run: performance.now() - read };
    const top = rank(softmax(logits), this.manifest.labels);
    return { ...top[0], top, logits, milliseconds };
  }

  /** Give the model's memory back; it answers no more. */
  async close() {
    await this.#session.release();
  }

  /** Run the golden samples. Returns { passed: true, samples, maxAbs, greyLevels } or { passed: false, why }. */
  async selftest() {
    try {
      return { passed: true, ...(await this.prove()) };
    } catch (error) {
      return { passed: false, why: error.message };
    }
  }

  /** Run the golden samples, or throw a Refusal that says what differs. */
  async prove() {
    return checkGolden(this.manifest, {
      fetchFile: this.#get,
      read: (file) => this.#read(file),
      run: (data, count) => this.#run(data, count),
    });
  }

  /** Return one sample as the model takes it, a typed array. */
  async #read(source) {
    const { preprocess, inputs } = this.manifest;
    const { dtype, shape } = inputs[0];
    const array = ArrayBuffer.isView(source);
    if (preprocess && !array) return toModelPixels(await pixelsOf(source), preprocess);
    if (!array && !(source instanceof Blob)) {
      throw new Refusal("expected a .npy file or a typed array, got something else");
    }
    const given = array
      ? { dtype: dtypeOf(source), data: source, shape: shape.slice(1) }
      : readNpy(await bytesOf(source));
    if (given.data.length !== sizeOf(shape.slice(1)) || String(given.shape) !== String(shape.slice(1))) {
      throw new Refusal(
        `expected ${dtype} of shape (${shape.slice(1)}), got ${given.data.length} numbers of shape (${given.shape})`,
      );
    }
    // Floats from 0 to 1 would turn into black.
    if (preprocess && given.dtype !== dtype) throw new Refusal(`expected ${dtype} pixels, got ${given.dtype}`);
    return cast(given, dtype);
  }

  /** Return the logits of `count` samples, one after the other. */
  async #run(data, count) {
    const [{ name, dtype, shape }] = this.manifest.inputs;
    const tensor = new this.#runtime.Tensor(dtype, data, [count, ...shape.slice(1)]);
    const found = await this.#session.run({ [name]: tensor }).catch((error) => {
      throw new Refusal(`${MODEL}: onnxruntime-web cannot run it: ${error.message}`);
    });
    const logits = Array.from(found[this.manifest.outputs[0].name].data, Number);
    if (!logits.every(Number.isFinite)) throw new Refusal(`${MODEL}: expected finite outputs, got NaN or infinity`);
    return logits;
  }
}

function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  const exponents = logits.map((one) => Math.exp(one - most));
  const sum = exponents.reduce((a, b) => a + b);
  return exponents.map((one) => one / sum);
}

function rank(probabilities, labels) {
  return probabilities
    .map((probability, i) => ({ label: labels[i] ?? String(i), probability }))
    .sort((a, b) => b.probability - a.probability);
}
