// Layers x prompts of the images that pass the filters, mean over seeds; a click on a cell opens its images.
const heat = { cells: new Map(), prompts: [], layers: [], low: 0, high: 1 };

function heatMode() {
  const wanted = filters.elements.mode.value;
  const present = (name) => D.modes.indexOf(name);
  if (wanted !== ANY && R.mode.some((value, row) => value === Number(wanted) && R.layer[row] >= 0)) return Number(wanted);
  return present("leave_one_out") >= 0 ? present("leave_one_out") : present("only_one");
}

function collect() {
  const chosen = heatMode();
  const name = D.modes[chosen];
  const metric = chosenMetric();
  const importance = name === "leave_one_out" && metric.name === D.metric;
  heat.cells = new Map();
  const prompts = new Set();
  const layers = new Set();
  for (const row of chosen < 0 ? [] : passing({ mode: chosen })) {
    if (R.layer[row] < 0) continue;
    const key = `${R.layer[row]} ${R.prompt[row]}`;
    if (!heat.cells.has(key)) heat.cells.set(key, { layer: R.layer[row], rows: [], sum: 0, count: 0, value: null });
    const cell = heat.cells.get(key);
    const value = change(row);
    cell.rows.push(row);
    if (value !== null) { cell.sum += value; cell.count += 1; }
    prompts.add(R.prompt[row]);
    layers.add(R.layer[row]);
  }
  let [low, high] = [0, 1e-3]; // rounding errors alone stay dark
  for (const cell of heat.cells.values()) {
    if (!cell.count) continue;
    cell.value = cell.sum / cell.count;
    low = Math.min(low, cell.value);
    high = Math.max(high, cell.value);
  }
  Object.assign(heat, { low: Math.max(low, -high / 4), high }); // what an image gains stays at the dark end
  heat.prompts = [...prompts].sort((a, b) => a - b);
  heat.layers = [...layers].sort((a, b) => a - b);
  const shown = `${plural(heat.layers.length, "layer")}, ${plural(heat.prompts.length, "prompt")}`;
  byId("measure-words").textContent = heat.cells.size
    ? `Change by ${modeName(name)}: ${measureWords(metric, importance)}. 0: as the baseline.` : "";
  byId("heat-words").textContent = heat.cells.size
    ? `${shown}, mean over seeds; colours on a square-root scale. Cells without a valid image say n/a.`
    : "No lesioned image of a single layer passes these filters.";
  byId("heat-low").textContent = number(heat.low);
  byId("heat-high").textContent = number(heat.high);
}

function heatCell(layerNumber, promptNumber) {
  const cell = heat.cells.get(`${layerNumber} ${promptNumber}`);
  const where = `${D.layers[layerNumber]}, prompt ${D.prompts[promptNumber].id}`;
  if (!cell) return el("td", { class: "none", role: "gridcell" }, "–");
  const words = `${where}: change ${number(cell.value)}, ${plural(cell.rows.length, "image")}`;
  const button = el("button", { type: "button", tabindex: "-1", "aria-label": words, title: words }, brief(cell.value));
  button.dataset.cell = `${layerNumber} ${promptNumber}`;
  if (cell.value === null) return el("td", { class: "none", role: "gridcell" }, button);
  paint(button, cell.value, heat.low, heat.high);
  return el("td", { role: "gridcell" }, button);
}

function drawHeat(start, end) {
  const shown = heat.prompts.slice(start, end);
  const head = el("tr", { role: "row" }, el("td", { role: "gridcell" }), ...shown.map((one) => el(
    "th", { scope: "col", role: "columnheader", title: `${D.prompts[one].id}: ${D.prompts[one].text.slice(0, 300)}` }, D.prompts[one].short)));
  const body = heat.layers.map((one) => el("tr", { role: "row" },
    el("th", { scope: "row", role: "rowheader" }, layerName(one)),
    ...shown.map((column) => heatCell(one, column))));
  const table = byId("heat");
  table.replaceChildren(el("thead", { role: "rowgroup" }, head), el("tbody", { role: "rowgroup" }, ...body));
  table.closest(".wide").hidden = !heat.cells.size;
  byId("heat-scale").hidden = !heat.cells.size;
  const first = table.querySelector("button");
  if (first) first.tabIndex = 0; // one stop for Tab; the arrow keys move between cells
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function moveInHeat(event) {
  const button = event.target.closest("button");
  if (!button || !(event.key in STEPS || event.key === "Home" || event.key === "End")) return;
  event.preventDefault();
  const rows = [...byId("heat").tBodies[0].rows];
  let row = rows.indexOf(button.closest("tr"));
  let column = button.closest("td").cellIndex;
  const last = rows[0].cells.length - 1;
  let [down, right] = STEPS[event.key] || [0, event.key === "Home" ? 1 : -1];
  if (event.key === "Home") column = 0;
  if (event.key === "End") column = last + 1;
  for (;;) { // over cells that hold no image
    row += down;
    column += right;
    if (row < 0 || row >= rows.length || column < 1 || column > last) return;
    const next = rows[row].cells[column].querySelector("button");
    if (next) {
      button.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      return;
    }
  }
}

function drawScale() {
  const canvas = byId("heat-scale").querySelector("canvas");
  canvas.width = D.palette.length;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  D.palette.forEach((colour, x) => { context.fillStyle = colour; context.fillRect(x, 0, 1, 1); });
}

function makeHeat() {
  const table = byId("heat");
  drawScale();
  table.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) openCompare(heat.cells.get(button.dataset.cell).rows, 0);
  });
  table.addEventListener("keydown", moveInHeat);
  const turn = pager(byId("heat-pager"), "prompts", 40, drawHeat);
  return () => { collect(); turn(heat.prompts.length); };
}
