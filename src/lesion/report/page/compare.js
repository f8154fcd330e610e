// The dialog: baseline and lesioned image under a slider, side by side, blinking, or as their difference; zoomed.
const dialog = byId("compare");
const stage = byId("stage");
const VIEWS = ["slider", "side", "blink", "difference"];
const ZOOMS = [1, 2, 4, 8];
const compare = { rows: [], at: 0, view: "slider", zoom: 0 };

function setView() {
  const single = byId("views").hidden;
  stage.className = `stage ${single ? "single" : compare.view}`;
  byId("slider-knob").hidden = single || compare.view !== "slider";
  byId("gain-knob").hidden = single || compare.view !== "difference";
  stage.style.setProperty("--cut", `${byId("cut").value}%`);
  stage.style.setProperty("--gain", byId("gain").value);
  stage.style.setProperty("--zoom", String(ZOOMS[compare.zoom]));
  byId("zoom").textContent = compare.zoom ? `${ZOOMS[compare.zoom]} ×` : "fit";
  byId("smaller").disabled = compare.zoom === 0;
  byId("larger").disabled = compare.zoom === ZOOMS.length - 1;
  byId("gain-words").textContent = `× ${byId("gain").value}`;
  byId("cut").setAttribute("aria-valuetext", `${byId("cut").value} per cent baseline`);
  for (const button of byId("views").children) button.setAttribute("aria-pressed", String(button.value === compare.view));
}

function scoreLine(row) {
  if (status(row) !== "ok") return [reason(row) ? `${status(row)}: ${reason(row)}` : status(row)];
  const known = D.metrics.map(({ name }) => [name, D.scores[name][row]]).filter(([, value]) => value !== null);
  const plain = known.filter(([name]) => !name.startsWith("read_"));
  const read = known.filter(([name]) => name.startsWith("read_"));
  const marks = read.map(([name, value]) => el("span", { class: value ? "kept" : "lost" }, `${name.slice(5)} ${value ? "✓" : "✗"}`));
  return [...(mode(row) === "none" ? [] : [el("strong", {}, `change ${number(change(row))}`)]),
    ...plain.map(([name, value]) => el("span", {}, `${name} ${number(value)}`)), ...marks];
}

function facts(row) {
  const setting = R.setting[row] < 0 ? null : D.settings[R.setting[row]].label;
  const scores = D.metrics.map(({ name }) => [name, D.scores[name][row]]).filter(([, value]) => value !== null);
  const file = (at, words) => (at >= 0 && R.image[at] ? [el("a", { href: R.image[at] }, words)] : []);
  const files = [...file(row, "this image"), ...(R.baseline[row] === row ? [] : file(R.baseline[row], "its baseline"))];
  const pairs = [["mode", modeName(mode(row))], ["layer", layer(row)], ["lesioned", lesioned(row)],
    ["prompt", prompt(row).id], ["seed", String(R.seed[row])], ["setting", setting],
    ["aspects", prompt(row).aspects.join(", ")],
    ["status", reason(row) ? `${status(row)}: ${reason(row)}` : status(row)],
    ...scores.map(([name, value]) => [name, number(value, 4)])];
  const list = pairs.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  const boxes = (D.marks[row] || []).map(({ words }) => words).join(", ");
  if (boxes) list.push(el("dt", {}, "boxes"), el("dd", {}, `${boxes}: asked for solid, as the reader sees it dashed`));
  if (files.length) list.push(el("dt", {}, "files"), el("dd", {}, ...files.flatMap((one) => [one, " "])));
  return list;
}

function showCompare() {
  const row = compare.rows[compare.at];
  const baseline = R.baseline[row];
  byId("compare-title").textContent = [modeName(mode(row)), layer(row) || lesioned(row), `seed ${R.seed[row]}`].filter(Boolean).join(", ");
  byId("compare-text").textContent = prompt(row).text;
  byId("compare-scores").replaceChildren(...scoreLine(row));
  byId("compare-at").textContent = `Image ${(compare.at + 1).toLocaleString("en")} of ${compare.rows.length.toLocaleString("en")}.`;
  byId("previous").disabled = compare.at === 0;
  byId("next").disabled = compare.at === compare.rows.length - 1;
  const both = baseline >= 0 && baseline !== row && R.image[baseline] && R.image[row];
  const framed = (one, kind, words) => el("figure", { class: kind },
    el("span", { class: "marked" }, picture(one), ...marks(one)), el("figcaption", {}, words));
  stage.replaceChildren(...(both
    ? [framed(baseline, "baseline", "baseline"), framed(row, "lesioned", modeName(mode(row)))]
    : [framed(row, "lone", "")]));
  byId("views").hidden = !both;
  byId("facts").replaceChildren(...facts(row));
  setView();
  link.open = R.image[row] || "";
  remember();
}

function step(by) {
  const to = compare.at + by;
  if (to < 0 || to >= compare.rows.length) return;
  compare.at = to;
  showCompare();
}

function zoom(by) {
  compare.zoom = Math.max(0, Math.min(ZOOMS.length - 1, compare.zoom + by));
  setView();
}

function openCompare(rows, at) {
  Object.assign(compare, { rows, at });
  showCompare();
  if (!dialog.open) dialog.showModal();
}

const KEYS = {
  ArrowLeft: () => step(-1), ArrowRight: () => step(1), "+": () => zoom(1), "=": () => zoom(1), "-": () => zoom(-1),
  v: () => { compare.view = VIEWS[(VIEWS.indexOf(compare.view) + 1) % VIEWS.length]; setView(); },
};

function makeCompare() {
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("smaller").addEventListener("click", () => zoom(-1));
  byId("larger").addEventListener("click", () => zoom(1));
  byId("close").addEventListener("click", () => dialog.close());
  byId("views").addEventListener("click", (event) => {
    if (VIEWS.includes(event.target.value)) { compare.view = event.target.value; setView(); }
  });
  dialog.addEventListener("input", setView);
  dialog.addEventListener("close", () => { link.open = ""; remember(); });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); }); // beside it
  document.addEventListener("keydown", (event) => { // a knob that is hidden while it has the focus gives it to the page
    if (!dialog.open || !(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault(); // arrows page in every view, also from a knob, which up and down move
    KEYS[event.key]();
  });
  const sliding = () => stage.classList.contains("slider");
  const drag = (event) => {
    if (!event.buttons || !sliding()) return;
    const box = stage.getBoundingClientRect();
    byId("cut").value = Math.round((100 * (event.clientX - box.left)) / box.width);
    setView();
  };
  stage.addEventListener("pointerdown", (event) => { if (sliding()) { event.preventDefault(); drag(event); } });
  stage.addEventListener("pointermove", drag);
  // A swipe pages, but for one that moves the slider or a zoomed picture.
  let start = null;
  dialog.addEventListener("touchstart", (event) => {
    const moves = event.target.closest("input") || (byId("frame").contains(event.target) && (sliding() || compare.zoom));
    start = event.touches.length === 1 && !moves ? event.touches[0] : null;
  }, { passive: true });
  dialog.addEventListener("touchend", (event) => {
    if (!start) return;
    const [x, y] = [event.changedTouches[0].clientX - start.clientX, event.changedTouches[0].clientY - start.clientY];
    if (Math.abs(x) > 48 && Math.abs(x) > 2 * Math.abs(y)) step(x < 0 ? 1 : -1);
  }, { passive: true });
}
