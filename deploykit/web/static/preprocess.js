// From the pixels of an image to those that the model takes, as decode_image of run.py makes them.
//
// The steps and the order of every sum are the same, so that the pixels are equal, not alike.

const BITS = 22; // of the fraction of a weight, when an image is shrunk
const HALF = 2 ** (BITS - 1);

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

// How much a pixel counts at a distance, and up to which; distances grow as the image shrinks.
const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(1 - Math.abs(x), 0) },
  bicubic: { support: 2, weight: (x) => keys(Math.abs(x)) },
  lanczos: { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

/** The cubic of Keys (1981) with the slope -1/2 at 1. */
function keys(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

// A value between neighbours, `part` of the way from the one before it; the cubic has the slope -1.
const MIXES = {
  bilinear: { before: 0, count: 2, mix: ([a, b], part) => a + (b - a) * part },
  bicubic: {
    before: 1,
    count: 4,
    mix: ([a, b, c, d], part) =>
      b + part * (-a + c + part * (2 * (a - b) + c - d + part * (-a + b - c + d))),
  },
};

/**
 * Return the model's pixels of an image.
 *
 * `image` is { width, height, data }, straight RGBA of 8 bits; `preprocess` that of a manifest. The
 * result is a Uint8Array of shape (height, width, channels).
 */
export function toModelPixels(image, preprocess) {
  const { width, height, channels } = preprocess;
  const box = boxOf(image, preprocess);
  const pixels = new Uint8Array(height * width * channels);
  planesOf(image, channels).forEach((plane, channel) => {
    const resized = resize(plane, image, box, preprocess);
    for (let i = 0; i < resized.length; i++) pixels[i * channels + channel] = resized[i];
  });
  return pixels;
}

/** Lay an image on white and take it apart: one plane of grey (ITU-R 601-2), or red, green, blue. */
function planesOf({ width, height, data }, channels) {
  const planes = Array.from({ length: channels }, () => new Uint8Array(width * height));
  for (let i = 0; i < width * height; i++) {
    const alpha = data[4 * i + 3];
    const red = onWhite(data[4 * i], alpha);
    const green = onWhite(data[4 * i + 1], alpha);
    const blue = onWhite(data[4 * i + 2], alpha);
    if (channels === 1) planes[0][i] = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16;
    else [planes[0][i], planes[1][i], planes[2][i]] = [red, green, blue];
  }
  return planes;
}

const onWhite = (level, alpha) => (alpha === 255 ? level : Math.round((level * alpha + 255 * (255 - alpha)) / 255));

/** The part of the image that is taken: all of it, or the largest centred box of the model's shape. */
function boxOf(image, { width, height, fit }) {
  const cover = fit === "cover";
  const across = cover ? Math.min(image.width, (image.height * width) / height) : image.width;
  const down = cover ? Math.min(image.height, (image.width * height) / width) : image.height;
  return { left: (image.width - across) / 2, top: (image.height - down) / 2, across, down };
}

function resize(plane, image, { left, top, across, down }, { width, height, filter, antialias }) {
  if (!antialias) {
    const [stepX, stepY] = [across / width, down / height];
    if (filter === "nearest") return pick(plane, image, places(left, stepX, width), places(top, stepY, height));
    return interpolate(plane, image, between(left, stepX, width), between(top, stepY, height), MIXES[filter]);
  }
  // Pillow keeps the box of a shrinking filter in floats of four bytes.
  const [x0, x1, y0, y1] = [left, left + across, top, top + down].map(Math.fround);
  if (filter === "nearest") {
    const steps = [Math.fround(x1 - x0) / width, Math.fround(y1 - y0) / height];
    return pick(plane, image, places(x0, steps[0], width), places(y0, steps[1], height));
  }
  const rows = weigh(plane, image.height, weightsOf(image.width, x0, x1, width, FILTERS[filter]), {
    from: { along: 1, line: image.width },
    to: { along: 1, line: width },
  });
  return weigh(rows, width, weightsOf(image.height, y0, y1, height, FILTERS[filter]), {
    from: { along: width, line: 1 },
    to: { along: width, line: 1 },
  });
}

// With antialias: each pixel is a sum of all that its filter reaches, across and then down.

/** For each of `count` pixels: the first of `size` that it is a sum of, and their weights. */
function weightsOf(size, from, to, count, filter) {
  const scale = Math.fround(to - from) / count;
  const widened = Math.max(scale, 1);
  const reach = filter.support * widened;
  return Array.from({ length: count }, (_, place) => {
    const centre = from + (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach + 0.5), size);
    const parts = Array.from({ length: end - first }, (_, i) =>
      filter.weight((i + first - centre + 0.5) * (1 / widened)),
    );
    const whole = parts.reduce((sum, part) => sum + part, 0);
    return { first, weights: Int32Array.from(parts, (part) => fixed(whole === 0 ? part : part / whole)) };
  });
}

const fixed = (weight) => Math.trunc(weight * 2 ** BITS + (weight < 0 ? -0.5 : 0.5));

/** Sum up along the lines of a plane; `along` and `line` are the distances of neighbours in memory. */
function weigh(plane, lines, weightsOfAll, { from, to }) {
  const out = new Uint8ClampedArray(lines * weightsOfAll.length);
  for (let line = 0; line < lines; line++) {
    for (let place = 0; place < weightsOfAll.length; place++) {
      const { first, weights } = weightsOfAll[place];
      let at = line * from.line + first * from.along;
      let sum = HALF;
      for (let i = 0; i < weights.length; i++, at += from.along) sum += plane[at] * weights[i];
      out[line * to.line + place * to.along] = sum >> BITS;
    }
  }
  return out;
}

// Without: each pixel is looked up where its centre lies.

/** The pixels in which centres lie. They are added up: a product may round across a pixel's edge. */
function places(start, step, count) {
  const found = [];
  for (let at = start + step * 0.5; found.length < count; at += step) found.push(Math.trunc(at));
  return found;
}

function pick(plane, { width, height }, columns, rows) {
  const nearest = (x, y) => plane[Math.min(y, height - 1) * width + Math.min(x, width - 1)];
  return Uint8Array.from(rows.flatMap((y) => columns.map((x) => nearest(x, y))));
}

/** The pixels before which centres lie, and how far behind them. */
function between(start, step, count) {
  return Array.from({ length: count }, (_, place) => {
    const at = step * (place + 0.5) + start - 0.5;
    return { pixel: Math.floor(at), part: at - Math.floor(at) };
  });
}

function interpolate(plane, { width, height }, columns, rows, { before, count, mix }) {
  const out = new Uint8ClampedArray(columns.length * rows.length);
  const inside = (place, size) => Math.min(Math.max(place, 0), size - 1);
  const [line, column] = [new Array(count), new Array(count)];
  rows.forEach((row, y) => {
    columns.forEach(({ pixel, part }, x) => {
      for (let j = 0; j < count; j++) {
        const start = inside(row.pixel - before + j, height) * width;
        for (let i = 0; i < count; i++) line[i] = plane[start + inside(pixel - before + i, width)];
        column[j] = mix(line, part);
      }
      out[y * columns.length + x] = Math.trunc(mix(column, row.part));
    });
  });
  return out;
}
