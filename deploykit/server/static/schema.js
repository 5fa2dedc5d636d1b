// JSON Schema as a person reads it.

const MOST_VALUES = 12;

/** Follow a reference inside the document. */
export function resolve(api, value) {
  if (!value.$ref) return value;
  return value.$ref.slice(2).split("/").reduce((found, key) => found[key], api);
}

/** Return a schema as text: {"inputs": [1 to 32 x [8 x integer, 0 to 255]]}. */
export function describe(api, given, indent = "") {
  const schema = resolve(api, given);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return values(schema.enum);
  if (schema.properties) return object(api, schema, indent);
  const choices = schema.oneOf ?? schema.anyOf;
  if (choices) return choices.map((one) => describe(api, one, indent)).join(`\n${indent}or `);
  if (schema.type === "array") return array(api, schema, indent);
  return simple(schema);
}

function values(list) {
  const shown = list.slice(0, MOST_VALUES).map((value) => JSON.stringify(value)).join(" | ");
  return list.length > MOST_VALUES ? `${shown} | … (${list.length} values)` : shown;
}

function object(api, schema, indent) {
  const inner = `${indent}  `;
  const lines = Object.entries(schema.properties).map(([name, value]) => {
    const key = JSON.stringify(name) + (schema.required?.includes(name) ? "" : "?");
    const text = describe(api, value, inner);
    const why = resolve(api, value).description;
    return `${inner}${key}: ${text}${why ? `  # ${why}` : ""}`;
  });
  return lines.length ? `{\n${lines.join("\n")}\n${indent}}` : "{…}";
}

function array(api, schema, indent) {
  if (schema.prefixItems) return `[${schema.prefixItems.map((one) => describe(api, one, indent)).join("; ")}]`;
  const count = range(schema.minItems, schema.maxItems);
  const items = schema.items ? describe(api, schema.items, indent) : "…";
  return `[${count ? `${count} × ` : ""}${items}]`;
}

const number = (value) => (Math.abs(value) < 1e15 ? value.toLocaleString("en") : value.toExponential(2));

function range(least, most) {
  if (least === undefined && most === undefined) return "";
  if (least === most) return number(least);
  if (most === undefined) return `${number(least)} or more`;
  return `${least === undefined ? "up to" : `${number(least)} to`} ${number(most)}`;
}

function simple({ type, format, contentEncoding, minimum, maximum, minLength, maxLength, default: standard }) {
  if (format === "binary") return `${range(minLength, maxLength) || "any number of"} bytes`;
  const bounds = minimum === undefined ? "" : `, ${range(minimum, maximum)}`;
  const text = `${[type].flat().join(" or ")}${contentEncoding ? ` in ${contentEncoding}` : ""}${bounds}`;
  return standard === undefined ? text : `${text}; ${standard} by default`;
}
