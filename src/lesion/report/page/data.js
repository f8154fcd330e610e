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
const number = (value, digits = 3) => (value === null || value === undefined ? "n/a" : value.toFixed(digits));
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

// Few characters: 0, .004, .31
function brief(value) {
  if (value === null || value === undefined) return "n/a";
  if (Math.abs(value) < 0.0005) return "0";
  return value.toFixed(Math.abs(value) < 0.0995 ? 3 : 2).replace(/^(-?)0\./, "$1.");
}

// How far an image is from its baseline by a measure: the page's one scale, 0 for no change. null: not known.
const MEASURES = D ? D.metrics.filter((one) => one.change) : [];
const COLUMNS = D ? new Map(D.metrics.map(({ name, change }) => {
  const values = D.scores[name];
  return [name, R.baseline.map((base, row) => {
    const value = values[row];
    if (value === null || status(row) !== "ok") return null;
    if (change === "distance") return value;
    if (change === "similarity") return 1 - value;
    const before = change === "prompt" && base >= 0 ? values[base] : null;
    return before === null ? null : before - value;
  })];
})) : null;
const chosenMetric = () => MEASURES[Number(byId("filters").elements.metric.value) || 0] || { name: D.metric, change: "" };
const changeBy = (name, row) => COLUMNS.get(name)[row];
const change = (row) => changeBy(chosenMetric().name, row);

function measureWords({ name, change: kind }, importance) {
  if (name.startsWith("read_")) return `${name.slice(5)} lost, read from pixels (1: the baseline shows it, the image does not)`;
  if (kind === "prompt") return `${name} of the baseline less that of the image`;
  if (kind === "distance") return `${name}, a distance`;
  return `1 − ${name}${importance ? ", that is importance" : ""}`;
}

// What the image lost of what the baseline shows, read from pixels.
function lost(row) {
  return MEASURES.filter(({ name }) => name.startsWith("read_") && changeBy(name, row) === 1)
    .map(({ name }) => name.slice(5));
}

function describe(row) {
  const parts = [modeName(mode(row)), layer(row) || lesioned(row), `prompt ${prompt(row).id}`, `seed ${R.seed[row]}`];
  if (status(row) !== "ok") parts.push(status(row));
  else if (mode(row) !== "none") parts.push(`change ${number(change(row))}`);
  return parts.filter(Boolean).join(", ");
}

function hole(words) {
  return el("span", { class: "hole", role: "img", "aria-label": words }, words);
}

// An image of the results, or a box that says why there is none.
function picture(row, { thumb = false, lazy = false, alt = describe(row) } = {}) {
  if (!R.image[row]) return hole(`${status(row)}: ${reason(row) || "no image"}`);
  const source = (thumb && R.thumb[row]) || R.image[row];
  const image = el("img", { alt, decoding: "async", loading: lazy ? "lazy" : "eager", draggable: "false" });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 160));
  image.addEventListener("error", () => image.replaceWith(hole("missing: no readable image file")), { once: true });
  image.src = (D.pictures || {})[R.image[row]] || source; // inside the page where the folder is not beside it
  return image;
}

// The boxes of a row's prompt: solid where an object was asked for, dashed where the reader sees it.
function marks(row) {
  return (D.marks[row] || []).flatMap(({ words, asked, seen, colour }) => [[asked, "asked"], [seen, "seen"]]
    .filter(([box]) => box).map(([[left, top, right, bottom], kind]) => {
      const node = el("span", { class: `mark ${kind}`, title: `${words}: ${kind}` });
      const place = { left, top, width: right - left, height: bottom - top };
      for (const [side, share] of Object.entries(place)) node.style[side] = `${100 * share}%`;
      node.style.borderColor = colour;
      return node;
    }));
}

// The colour of a share of the scale, and an ink that can be read on it. Square root: most changes are small.
function shade(value, low, high) {
  const share = Math.sqrt(Math.max(0, Math.min(1, (value - low) / (high - low))));
  return { background: D.palette[Math.round(share * (D.palette.length - 1))], ink: share > 0.5 ? "#000" : "#fff" };
}

function paint(node, value, low, high) {
  const { background, ink } = shade(value, low, high);
  node.style.backgroundColor = background;
  node.style.color = ink;
}

// A layer's path, and a short form for narrow screens.
function layerName(place) {
  return el("code", { title: D.layers[place] }, el("span", { class: "long" }, D.layers[place]),
    el("span", { class: "brief", "aria-hidden": "true" }, D.short[place]));
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
