// The dialog: the baseline and the lesioned image under a slider, as their difference, or side by side.
const dialog = byId("compare");
const stage = byId("stage");
const compare = { rows: [], at: 0 };

function setView() {
  const view = dialog.querySelector("input[name=view]:checked").value;
  const single = byId("views").hidden;
  stage.className = `stage ${single ? "single" : view}`;
  byId("slider-knob").hidden = single || view !== "slider";
  byId("gain-knob").hidden = single || view !== "difference";
  stage.style.setProperty("--cut", `${byId("cut").value}%`);
  stage.style.setProperty("--gain", byId("gain").value);
  byId("gain-words").textContent = `× ${byId("gain").value}`;
  byId("cut").setAttribute("aria-valuetext", `${byId("cut").value} per cent baseline`);
}

function facts(row) {
  const setting = R.setting[row] < 0 ? null : D.settings[R.setting[row]].label;
  const scores = D.metrics.map((name) => [name, D.scores[name][row]]).filter(([, value]) => value !== null);
  const link = (at, words) => (at >= 0 && R.image[at] ? [el("a", { href: R.image[at] }, words)] : []);
  const files = [...link(row, "this image"), ...(R.baseline[row] === row ? [] : link(R.baseline[row], "its baseline"))];
  const pairs = [["mode", modeName(mode(row))], ["layer", layer(row)], ["lesioned", lesioned(row)],
    ["seed", String(R.seed[row])], ["setting", setting],
    ["aspects", prompt(row).aspects.join(", ")],
    ["status", reason(row) ? `${status(row)}: ${reason(row)}` : status(row)],
    ...scores.map(([name, value]) => [name, number(value, 4)])];
  const list = pairs.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  if (files.length) list.push(el("dt", {}, "files"), el("dd", {}, ...files.flatMap((one) => [one, " "])));
  return list;
}

function showCompare() {
  const row = compare.rows[compare.at];
  const baseline = R.baseline[row];
  byId("compare-title").textContent = describe(row);
  byId("compare-text").textContent = prompt(row).text;
  byId("compare-at").textContent = `image ${compare.at + 1} of ${compare.rows.length.toLocaleString("en")}`;
  byId("previous").disabled = compare.at === 0;
  byId("next").disabled = compare.at === compare.rows.length - 1;
  const both = baseline >= 0 && baseline !== row && R.image[baseline] && R.image[row];
  const framed = (one, kind, words) => el("figure", { class: kind }, picture(one), el("figcaption", {}, words));
  stage.replaceChildren(...(both
    ? [framed(baseline, "baseline", "baseline"), framed(row, "lesioned", modeName(mode(row)))]
    : [framed(row, "lone", "")]));
  byId("views").hidden = !both;
  byId("facts").replaceChildren(...facts(row));
  setView();
}

function step(by) {
  const to = compare.at + by;
  if (to < 0 || to >= compare.rows.length) return;
  compare.at = to;
  showCompare();
}

function openCompare(rows, at) {
  Object.assign(compare, { rows, at });
  showCompare();
  if (!dialog.open) dialog.showModal();
}

function makeCompare() {
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("input", setView);
  dialog.addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT") return; // there the arrow keys move the knob
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  const drag = (event) => {
    if (!event.buttons || !stage.classList.contains("slider")) return;
    const box = stage.getBoundingClientRect();
    byId("cut").value = Math.round((100 * (event.clientX - box.left)) / box.width);
    setView();
  };
  stage.addEventListener("pointerdown", (event) => { event.preventDefault(); drag(event); });
  stage.addEventListener("pointermove", drag);
}
