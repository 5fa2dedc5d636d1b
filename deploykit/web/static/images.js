// Images of every kind that a page has, as straight RGBA pixels.

import { decodePng, pngSize } from "./png.js";
import { Refusal } from "./refusal.js";

const MAX_PIXELS = 25_000_000;
const MAX_BYTES = 64 * 2 ** 20; // of a file; run.py's limit
const STRIP = 4_000_000; // pixels; some browsers' canvases hold 16 million
const EXIF = [0x45, 0x78, 0x69, 0x66, 0, 0]; // some put JPEG's mark in front of it in a PNG too
const [ORIENTATION, LONG] = [0x0112, 4];
// How orientations 2 to 8 of EXIF read an image: whether its axes change places, then which mirror.
const TURNS = {
  2: { x: true }, 3: { x: true, y: true }, 4: { y: true }, 5: { axes: true },
  6: { axes: true, x: true }, 7: { axes: true, x: true, y: true }, 8: { axes: true, y: true },
};
const begins = (bytes, magic) => magic.every((one, i) => bytes[i] === one);

/**
 * Return { width, height, data } of an image.
 *
 * `source` is a file (Blob) of PNG or JPEG, decoded as run.py does, or what a page shows: an <img>,
 * <canvas> or <video>, an ImageBitmap, a VideoFrame, an ImageData.
 */
export async function pixelsOf(source) {
  if (source instanceof Blob) return decodeFile(await bytesOf(source));
  if (source instanceof ImageData) return source;
  // An element would be drawn as nothing, which reads as white. 2 is HAVE_CURRENT_DATA.
  if (source?.complete === false || source?.readyState < 2) {
    throw new Refusal("expected an image, got an element that is still loading; wait until it is loaded");
  }
  const width = source?.videoWidth ?? source?.naturalWidth ?? source?.displayWidth ?? source?.width;
  const height = source?.videoHeight ?? source?.naturalHeight ?? source?.displayHeight ?? source?.height;
  if (!Number.isInteger(width) || !Number.isInteger(height)) {
    throw new Refusal("expected an image file, an element that shows an image, or its pixels; got something else");
  }
  return drawn(source, width, height);
}

/** Return the bytes of a file. */
export async function bytesOf(file) {
  if (file.size > MAX_BYTES) {
    throw new Refusal(`expected a file of at most ${MAX_BYTES} bytes, got ${file.size}; take a smaller one`);
  }
  const content = await file.arrayBuffer().catch((error) => {
    throw new Refusal(`expected a file, got something that cannot be read (${error.message}); choose a file`);
  });
  return new Uint8Array(content);
}

function drawn(source, width, height) {
  if (!width || !height) throw new Refusal("expected an image, got an empty one; wait until it is loaded");
  checkSize(width, height);
  const rows = Math.min(height, Math.ceil(STRIP / width));
  const context = new OffscreenCanvas(width, rows).getContext("2d", { willReadFrequently: true });
  const data = new Uint8ClampedArray(4 * width * height);
  for (let y = 0; y < height; y += rows) {
    context.clearRect(0, 0, width, rows);
    const strip = readStrip(context, source, [0, -y, width, height], Math.min(rows, height - y));
    data.set(strip, 4 * width * y);
  }
  return { width, height, data };
}

function readStrip(context, source, [x, y, width, height], rows) {
  try {
    context.drawImage(source, x, y, width, height);
    return context.getImageData(0, 0, width, rows).data;
  } catch (error) {
    throw new Refusal(`expected an image of this page's own origin, got one that cannot be read (${error.message})`);
  }
}

function checkSize(width, height) {
  if (width * height <= MAX_PIXELS) return;
  throw new Refusal(`expected an image of at most ${MAX_PIXELS} pixels, got ${width} x ${height}; shrink it`);
}

async function decodeFile(bytes) {
  if (begins(bytes, [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a])) {
    checkSize(...pngSize(bytes));
    const image = await decodePng(bytes);
    return upright(image, orientationOf(image.exif));
  }
  if (!begins(bytes, [0xff, 0xd8, 0xff])) {
    throw new Refusal(`expected a PNG or JPEG image, got ${bytes.length} bytes of something else`);
  }
  checkSize(...jpegSize(bytes));
  return decodeJpeg(bytes);
}

/**
 * The browser's own decoder, told to leave colours alone; JPEG has no transparency to blend.
 * EXIF's orientation is obeyed unasked: its name for that is newer than some browsers.
 */
async function decodeJpeg(bytes) {
  const file = new Blob([bytes], { type: "image/jpeg" });
  const how = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(file, how).catch((error) => {
    throw new Refusal(`expected a PNG or JPEG image, got a damaged one (${error.message})`);
  });
  try {
    return drawn(bitmap, bitmap.width, bitmap.height);
  } finally {
    bitmap.close();
  }
}

/** Return the width and height that the frame header of a JPEG tells. */
function jpegSize(bytes) {
  for (let at = 2; at + 9 < bytes.length; ) {
    const kind = bytes[at + 1];
    if (bytes[at] !== 0xff || kind === 0xff) at += 1; // padding between segments
    else if (kind === 0x01 || (kind >= 0xd0 && kind <= 0xd8)) at += 2; // markers without content
    else if (kind >= 0xc0 && kind <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(kind)) {
      return [256 * bytes[at + 7] + bytes[at + 8], 256 * bytes[at + 5] + bytes[at + 6]];
    } else at += 2 + 256 * bytes[at + 2] + bytes[at + 3];
  }
  throw new Refusal("expected a PNG or JPEG image, got a damaged one (it has no frame)");
}

/** Return the orientation that a block of EXIF names, 1 where it names none. */
function orientationOf(exif) {
  while (exif && begins(exif, EXIF)) exif = exif.subarray(EXIF.length);
  if (!exif || exif.length < 14) return 1;
  const view = new DataView(exif.buffer, exif.byteOffset, exif.byteLength);
  const little = view.getUint16(0) === 0x4949;
  const start = view.getUint32(4, little);
  if (start + 2 > exif.length) return 1;
  for (let i = 0, at = start + 2; i < view.getUint16(start, little) && at + 12 <= exif.length; i++, at += 12) {
    if (view.getUint16(at, little) !== ORIENTATION) continue;
    return view.getUint16(at + 2, little) === LONG ? view.getUint32(at + 8, little) : view.getUint16(at + 8, little);
  }
  return 1;
}

/** Turn and mirror an image as its orientation asks. */
function upright(image, orientation) {
  const turn = TURNS[orientation];
  if (!turn) return image;
  const [width, height] = turn.axes ? [image.height, image.width] : [image.width, image.height];
  const [from, to] = [new Uint32Array(image.data.buffer), new Uint32Array(width * height)];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [u, v] = [turn.x ? width - 1 - x : x, turn.y ? height - 1 - y : y];
      to[y * width + x] = turn.axes ? from[u * image.width + v] : from[v * image.width + u];
    }
  }
  return { width, height, data: new Uint8ClampedArray(to.buffer) };
}
