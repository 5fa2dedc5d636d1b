// Arrays as numpy writes them: .npy, and .npz whose members are stored.

import { Refusal } from "./refusal.js";

// By the name that a manifest has for them; the order is that in which one kind may become another.
export const DTYPES = {
  bool: { code: "b1", array: Uint8Array, kind: 0 },
  uint8: { code: "u1", array: Uint8Array, kind: 1 },
  uint16: { code: "u2", array: Uint16Array, kind: 1 },
  uint32: { code: "u4", array: Uint32Array, kind: 1 },
  uint64: { code: "u8", array: BigUint64Array, kind: 1 },
  int8: { code: "i1", array: Int8Array, kind: 2 },
  int16: { code: "i2", array: Int16Array, kind: 2 },
  int32: { code: "i4", array: Int32Array, kind: 2 },
  int64: { code: "i8", array: BigInt64Array, kind: 2 },
  float32: { code: "f4", array: Float32Array, kind: 3 },
  float64: { code: "f8", array: Float64Array, kind: 3 },
};

export const sizeOf = (shape) => shape.reduce((size, count) => size * count, 1);

/** Return { dtype, shape, data } of a .npy file: little-endian numbers in C order. */
export function readNpy(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 12 || String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY" || ![1, 2].includes(bytes[6])) {
    throw new Refusal("expected a .npy file, got something else; numpy.save writes one");
  }
  const [start, size] = bytes[6] === 1 ? [10, view.getUint16(8, true)] : [12, view.getUint32(8, true)];
  const head = new TextDecoder("latin1").decode(bytes.subarray(start, start + size));
  const code = /'descr': '[<|=]?([a-z]\d)'/.exec(head)?.[1];
  const shape = /'shape': \(([\d, ]*)\)/.exec(head)?.[1].match(/\d+/g)?.map(Number) ?? [];
  const dtype = Object.keys(DTYPES).find((name) => DTYPES[name].code === code);
  if (!dtype) {
    throw new Refusal("expected a .npy file of little-endian numbers, no float16; array.astype('<f4') makes one");
  }
  if (!/'fortran_order': False/.test(head)) {
    throw new Refusal("expected a .npy file in C order; numpy.ascontiguousarray makes one");
  }
  const content = bytes.slice(start + size); // a copy: arrays begin where their numbers are aligned
  const { array } = DTYPES[dtype];
  if (content.length !== sizeOf(shape) * array.BYTES_PER_ELEMENT) {
    throw new Refusal("expected a .npy file, got one whose size is not what its head says");
  }
  return { dtype, shape, data: new array(content.buffer) };
}

/** Return { name: { dtype, shape, data } } of a .npz file. */
export function readNpz(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let end = bytes.length - 22; // the directory's end, which a comment may follow
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Refusal("expected a .npz file, got something else");
  const found = {};
  for (let i = 0, at = view.getUint32(end + 16, true); i < view.getUint16(end + 10, true); i++) {
    const [method, size, local] = [view.getUint16(at + 10, true), view.getUint32(at + 24, true), view.getUint32(at + 42, true)];
    const nameSize = view.getUint16(at + 28, true);
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameSize));
    if (method !== 0) throw new Refusal("expected a .npz file of stored, not compressed, arrays");
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    found[name.replace(/\.npy$/, "")] = readNpy(bytes.subarray(start, start + size));
    at += 46 + nameSize + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return found;
}

/** Return the data of an array as `dtype`; refuse what would lose its meaning, as numpy's same_kind does. */
export function cast({ dtype, data }, wanted) {
  const { array, kind } = DTYPES[wanted];
  if (!(DTYPES[dtype]?.kind <= kind)) {
    throw new Refusal(`expected ${wanted}, got ${dtype}; make it ${wanted} first`);
  }
  const numbers = array.name.startsWith("Big") ? (one) => BigInt(one) : (one) => Number(one);
  const found = data.constructor === array ? data : array.from(data, numbers);
  if (kind === 3 && !found.every(Number.isFinite)) {
    throw new Refusal(`expected finite numbers, got NaN or infinity in ${wanted}; mend the sample`);
  }
  return found;
}

/** Return the dtype of a typed array. */
export function dtypeOf(data) {
  if (data instanceof Uint8ClampedArray) return "uint8";
  return Object.keys(DTYPES).find((name) => name !== "bool" && data instanceof DTYPES[name].array);
}
