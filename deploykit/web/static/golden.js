// The proof: the golden samples, judged as check_golden of run.py judges them.

import { readNpz, sizeOf } from "./arrays.js";
import { Refusal } from "./refusal.js";

const EXPECTED = "golden/expected.npz";

/**
 * Run the golden samples and compare with what was stored when the bundle was made.
 *
 * `fetchFile(name)` gives verified bytes, `read(blob)` one sample as the model takes it, and
 * `run(data, count)` the logits of a batch. Returns { samples, maxAbs, greyLevels }; a Refusal says what
 * differs by more than the manifest's tolerance.
 */
export async function checkGolden(manifest, { fetchFile, read, run }) {
  const { inputs, outputs } = readNpz(await fetchFile(EXPECTED));
  const names = Object.keys(manifest.files).filter((name) => name.startsWith("golden/") && name !== EXPECTED).sort();
  const count = names.length;
  if (!count || count !== inputs?.shape[0] || count !== outputs?.shape[0]) {
    throw new Refusal(`golden: expected ${inputs?.shape[0]} samples, found ${count}`);
  }
  const [size, classes] = [inputs, outputs].map((one) => sizeOf(one.shape.slice(1)));
  let [greyLevels, maxAbs] = [0, 0];
  for (const [i, name] of names.entries()) {
    const stored = inputs.data.subarray(i * size, (i + 1) * size);
    const level = await difference(name, new Blob([await fetchFile(name)]), stored, read, manifest);
    greyLevels = Math.max(greyLevels, level);
  }
  const singles = [];
  for (let i = 0; i < count; i++) singles.push(...(await run(inputs.data.slice(i * size, (i + 1) * size), 1)));
  for (const found of [singles, await run(inputs.data, count)]) {
    maxAbs = Math.max(maxAbs, checkOutputs(manifest.tolerance, names, outputs.data, found, classes));
  }
  return { samples: count, maxAbs, greyLevels };
}

/** Return by how much a decoded sample differs from the stored one; JPEG decoders may by a grey level. */
async function difference(name, file, stored, read, manifest) {
  let found;
  try {
    found = await read(file);
  } catch (error) {
    throw new Refusal(`${name}: ${error.message}`);
  }
  const most = largest(stored, found);
  if (!(most <= (manifest.preprocess ? 1 : 0))) throw new Refusal(`${name}: decodes differently here, by ${most}`);
  return most;
}

function largest(left, right) {
  if (left.length !== right.length) return Infinity;
  let most = 0;
  for (let i = 0; i < left.length; i++) {
    const apart = Math.abs(Number(left[i]) - Number(right[i]));
    if (!(apart <= most)) most = apart; // so that NaN stays
  }
  return most;
}

function checkOutputs({ max_abs: allowed, scale, top1 }, names, expected, found, classes) {
  const most = largest(expected, found);
  if (!(most <= allowed)) {
    throw new Refusal(`golden: outputs differ by ${most.toPrecision(4)}, allowed is ${allowed.toPrecision(4)}`);
  }
  for (const [i, name] of names.entries()) {
    const [before, now] = [expected, found].map((one) => one.slice(i * classes, (i + 1) * classes));
    const [best, answer] = [argmax(before), argmax(now)];
    if (top1 && before[best] - before[answer] > (scale || allowed)) {
      throw new Refusal(`${name}: expected class ${best}, got ${answer}, and it is no near-tie`);
    }
  }
  return most;
}

const argmax = (numbers) => numbers.reduce((best, one, i) => (one > numbers[best] ? i : best), 0);
