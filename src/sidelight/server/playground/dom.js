// Elements, made without HTML text: what a user or a model writes is never parsed.

const SVG = "http://www.w3.org/2000/svg";

// `on` holds listeners, `style` custom properties; a false or missing attribute is left out.
export function el(tag, attributes = {}, ...children) {
  const made = ["svg", "path", "line", "circle"].includes(tag)
    ? document.createElementNS(SVG, tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === undefined || value === null) continue;
    if (name === "on") for (const [event, listen] of Object.entries(value)) made.addEventListener(event, listen);
    else if (name === "style") for (const [key, own] of Object.entries(value)) made.style.setProperty(key, own);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const find = (selector) => document.querySelector(selector);

export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

export function signed(number) {
  const size = Math.abs(number).toFixed(2);
  return size === "0.00" ? size : `${number < 0 ? "−" : "+"}${size}`;
}

// Fills a select, keeping the choice if it is still there.
export function offer(select, names) {
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
}

export function copier(text) {
  const button = el("button", { type: "button", on: { click: copy } }, "Copy");
  async function copy() {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select the text and copy it";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }
  return button;
}
