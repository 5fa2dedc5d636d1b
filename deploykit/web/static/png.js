// PNG (W3C), decoded here: a browser would convert colours and blend transparent pixels its own way.

import { Refusal } from "./refusal.js";

const SAMPLES = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }; // a pixel, by colour type
const DEPTHS = { 0: [1, 2, 4, 8, 16], 2: [8, 16], 3: [1, 2, 4, 8], 4: [8, 16], 6: [8, 16] };
const WHOLE = [[0, 0, 1, 1]]; // first column and row, steps to the next ones
const ADAM7 = [
  [0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2],
];

const RAW_PROFILE = "Raw profile type exif"; // text of ImageMagick's, older than the chunk for it
const MAX_TEXT = 2 ** 20; // bytes

const damaged = (why) => new Refusal(`expected a PNG or JPEG image, got a damaged one (${why})`);

/** Return the width and height that a PNG's head tells. */
export function pngSize(bytes) {
  const { width, height } = headOf(bytes);
  return [width, height];
}

/** Return { width, height, data, exif }: straight RGBA of 8 bits, and the EXIF block or undefined. */
export async function decodePng(bytes) {
  const head = headOf(bytes);
  const found = chunksOf(bytes);
  if (head.type === 3 && !found.PLTE) throw damaged("it has no palette");
  const passes = (head.interlaced ? ADAM7 : WHOLE)
    .map((pass) => sizeOfPass(head, pass))
    .filter(({ columns, rows }) => columns && rows);
  const size = passes.reduce((sum, { rows, rowBytes }) => sum + rows * (rowBytes + 1), 0);
  const raw = await inflate(found.IDAT, size);
  if (raw.length < size) throw damaged("it ends too early");
  const data = new Uint8ClampedArray(4 * head.width * head.height);
  const paint = painter(head, found, data);
  let at = 0;
  for (const pass of passes) at = paintPass(raw, at, pass, head, paint);
  return { width: head.width, height: head.height, data, exif: found.eXIf ?? (await rawProfile(found.text)) };
}

function headOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 33 || view.getUint32(12) !== 0x49484452) throw damaged("it has no head");
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  const [depth, type, packing, filters, interlaced] = bytes.subarray(24, 29);
  const known = DEPTHS[type]?.includes(depth) && !packing && !filters && interlaced < 2;
  if (!width || !height || !known) throw damaged("its head is none");
  return { width, height, depth, type, interlaced: interlaced === 1 };
}

/** The chunks that matter, by name; those of the pixels as a list. */
function chunksOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const found = { IDAT: [] };
  for (let at = 8; at + 12 <= bytes.length; ) {
    const size = view.getUint32(at);
    const name = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const content = bytes.subarray(at + 8, at + 8 + size);
    if (content.length < size || name === "IEND") break;
    if (name === "IDAT") found.IDAT.push(content);
    else if (!found.IDAT.length) check(bytes.subarray(at + 4, at + 8 + size), view.getUint32(at + 8 + size), name);
    if (["PLTE", "tRNS", "eXIf"].includes(name)) found[name] ??= content;
    if (["tEXt", "zTXt"].includes(name) && textOf(content.subarray(0, RAW_PROFILE.length)) === RAW_PROFILE) {
      found.text ??= { packed: name === "zTXt", content: content.subarray(RAW_PROFILE.length + 1) };
    }
    at += 12 + size;
  }
  return found;
}

const textOf = (bytes) => new TextDecoder("latin1").decode(bytes);

/** Refuse a chunk that is not what was written; those behind the pixels begin matter little. */
function check(bytes, expected, name) {
  if (!/^\w{4}$/.test(name)) throw damaged("it has a chunk without a name");
  let crc = ~0; // CRC-32 of ISO 3309
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  if (~crc >>> 0 !== expected) throw damaged(`its ${name} is not what its checksum says`);
}

/** Return the EXIF block that a text holds: three lines of head, then hexadecimal. */
async function rawProfile(text) {
  if (!text) return undefined;
  const { packed, content } = text; // where packed, behind the number of the method
  const plain = packed ? await inflate([content.subarray(1)], MAX_TEXT).catch(() => new Uint8Array()) : content;
  const digits = textOf(plain).split("\n").slice(3).join("").match(/[0-9a-f]{2}/gi);
  return Uint8Array.from(digits ?? [], (two) => parseInt(two, 16));
}

/** Unpack at most `size` bytes: what a small file claims to hold takes no more memory than its image. */
async function inflate(parts, size) {
  const reader = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const out = new Uint8Array(size);
  let filled = 0;
  try {
    while (filled < size) {
      const { done, value } = await reader.read();
      if (done) break;
      out.set(value.subarray(0, size - filled), filled);
      filled += value.length;
    }
    reader.cancel().catch(() => {}); // what lies behind the pixels does not matter
  } catch (error) {
    throw damaged(error.message);
  }
  return out.subarray(0, filled);
}

function sizeOfPass({ width, height, type, depth }, [left, top, stepX, stepY]) {
  const columns = Math.ceil((width - left) / stepX);
  const rows = Math.ceil((height - top) / stepY);
  return { left, top, stepX, stepY, columns, rows, rowBytes: Math.ceil((columns * SAMPLES[type] * depth) / 8) };
}

/** Undo the filters of a pass in place, paint its pixels, and return where the next one begins. */
function paintPass(raw, start, pass, { width, type, depth }, paint) {
  const { left, top, stepX, stepY, columns, rows, rowBytes } = pass;
  const distance = Math.max((SAMPLES[type] * depth) >> 3, 1); // of bytes that a filter compares
  let above = new Uint8Array(rowBytes);
  for (let y = 0; y < rows; y++) {
    const at = start + y * (rowBytes + 1);
    const row = raw.subarray(at + 1, at + 1 + rowBytes);
    unfilter(raw[at], row, above, distance);
    for (let x = 0; x < columns; x++) paint(row, x, (top + y * stepY) * width + left + x * stepX);
    above = row;
  }
  return start + rows * (rowBytes + 1);
}

function unfilter(kind, row, above, distance) {
  if (kind > 4) throw damaged("it has an unknown filter");
  for (let i = 0; kind && i < row.length; i++) {
    const left = i < distance ? 0 : row[i - distance];
    if (kind === 1) row[i] += left;
    else if (kind === 2) row[i] += above[i];
    else if (kind === 3) row[i] += (left + above[i]) >> 1;
    else row[i] += paeth(left, above[i], i < distance ? 0 : above[i - distance]);
  }
}

function paeth(left, up, corner) {
  const guess = left + up - corner;
  const a = Math.abs(guess - left);
  const b = Math.abs(guess - up);
  const c = Math.abs(guess - corner);
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

/** Return a function that writes pixel `x` of a row into pixel `to` of `data`. */
function painter({ type, depth }, { PLTE, tRNS }, data) {
  const count = SAMPLES[type];
  const colours = new Uint32Array(4); // samples of a pixel
  const level = depth === 16 ? (sample) => sample >> 8 : (sample) => (sample * 255) / (2 ** depth - 1);
  const clear = type === 0 || type === 2 ? transparentOf(tRNS, depth, count, level) : null;
  return (row, x, to) => {
    for (let c = 0; c < count; c++) colours[c] = sampleAt(row, x * count + c, depth);
    const out = 4 * to;
    if (type === 3) {
      const index = colours[0];
      for (let c = 0; c < 3; c++) data[out + c] = PLTE[3 * index + c] ?? 0;
      data[out + 3] = tRNS?.[index] ?? 255;
      return;
    }
    const coloured = count > 2;
    for (let c = 0; c < 3; c++) data[out + c] = level(colours[coloured ? c : 0]);
    if (count === 2 || count === 4) data[out + 3] = level(colours[count - 1]);
    else data[out + 3] = clear?.every((one, c) => one(colours[c])) ? 0 : 255;
  };
}

function sampleAt(row, place, depth) {
  if (depth === 8) return row[place];
  if (depth === 16) return 256 * row[2 * place] + row[2 * place + 1];
  const bit = place * depth;
  return (row[bit >> 3] >> (8 - depth - (bit & 7))) & (2 ** depth - 1);
}

/** For each sample of a pixel: whether it is that of the one transparent colour. */
function transparentOf(tRNS, depth, count, level) {
  if (!tRNS || tRNS.length < 2 * count) return null;
  return Array.from({ length: count }, (_, c) => {
    const wanted = 256 * tRNS[2 * c] + tRNS[2 * c + 1];
    if (depth === 1 || (depth === 16 && count === 1)) return (sample) => sample === wanted;
    // run.py compares levels of 8 bits with the low byte, whatever the depth.
    return (sample) => level(sample) === (wanted & 255);
  });
}
