// The data, and small helpers. Text from the results only ever becomes text nodes and attributes, never markup.
const inline = document.getElementById("data");
const D = inline ? JSON.parse(inline.textContent) : globalThis.LESION_REPORT;
const R = D && D.rows;
const size = D ? R.prompt.length : 0;
const MODES = {
  none: "baseline", leave_one_out: "leave-one-out", only_one: "only-one", all: "all layers lesioned",
};
const byId = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const mode = (row) => D.modes[R.mode[row]];
const modeName = (name) => MODES[name] || name.replaceAll("_", "-");
const layer = (row) => (R.layer[row] < 0 ? "" : D.layers[R.layer[row]]);
const lesioned = (row) => D.groups[R.lesioned[row]]; // the members, where more than one layer is lesioned together
const prompt = (row) => D.prompts[R.prompt[row]];
const status = (row) => D.statuses[R.status[row]];
const reason = (row) => D.reasons[R.reason[row]];
const similarity = (row) => (status(row) === "ok" ? D.scores[D.metric][row] : null);
const number = (value, digits = 3) => (value === null || value === undefined ? "n/a" : value.toFixed(digits));
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

function describe(row) {
  const parts = [modeName(mode(row)), layer(row) || lesioned(row), `prompt ${prompt(row).id}`, `seed ${R.seed[row]}`];
  if (status(row) !== "ok") parts.push(status(row));
  else if (mode(row) !== "none") parts.push(`${D.metric} ${number(similarity(row))}`);
  return parts.filter(Boolean).join(", ");
}

function hole(words) {
  return el("span", { class: "hole", role: "img", "aria-label": words }, words);
}

// An image of the results, or a box that says why there is none.
function picture(row, { thumb = false, lazy = false, alt = describe(row) } = {}) {
  if (!R.image[row]) return hole(`${status(row)}: ${reason(row) || "no image"}`);
  const source = (thumb && R.thumb[row]) || R.image[row];
  const image = el("img", { alt, decoding: "async", loading: lazy ? "lazy" : "eager" });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 160));
  image.addEventListener("error", () => image.replaceWith(hole("missing: no readable image file")), { once: true });
  image.src = source;
  return image;
}

// A pager over `total` things; calls back with the first and last index to show.
function pager(node, noun, step, show) {
  const back = el("button", { type: "button" }, `Previous ${noun}`);
  const onward = el("button", { type: "button" }, `Next ${noun}`);
  const where = el("span", { role: "status" });
  let start = 0;
  let total = 0;
  const turn = (to) => {
    start = Math.max(0, Math.min(to, total - 1));
    const end = Math.min(start + step, total);
    back.disabled = start === 0;
    onward.disabled = end >= total;
    node.hidden = total <= step;
    where.textContent = `${noun} ${start + 1} to ${end} of ${total.toLocaleString("en")}`;
    show(start, end);
  };
  back.addEventListener("click", () => turn(start - step));
  onward.addEventListener("click", () => turn(start + step));
  node.append(back, where, onward);
  return (count) => { total = count; turn(0); };
}
