// What pages are made of: elements, sentences, answers.

/** Make an element with attributes (or properties, such as onclick) and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Show a sentence in the page's alert, or hide that. */
export function complain(sentence) {
  const box = document.getElementById("error");
  box.textContent = sentence ?? "";
  box.hidden = !sentence;
}

/** Return the rows of a list of facts: { term: text or element }. */
export function rowsOf(facts) {
  return Object.entries(facts).map(([term, fact]) => make("div", {}, make("dt", {}, term), make("dd", {}, fact)));
}

/** Return the likeliest classes, [{ label, probability }], as bars. */
export function bars(top) {
  const rows = top.map(({ label, probability }) => {
    const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("span"));
    bar.firstChild.style.width = `${100 * probability}%`;
    return make("li", {}, make("span", { class: "label" }, label), bar, make("span", { class: "percent" }, percent(probability)));
  });
  return make("ol", { class: "bars" }, ...rows);
}

/** Return a small picture of an image file. */
export function thumbnail(image, alt) {
  const url = URL.createObjectURL(image);
  const free = () => URL.revokeObjectURL(url);
  return make("img", { src: url, alt, class: "thumbnail", onload: free, onerror: free });
}

export const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
export const milliseconds = (time) => `${time.toFixed(time < 10 ? 2 : 1)} ms`;
