// Which images are meant: one setting (images of different settings are never averaged), then what the filters say.
// The choice stands in the address behind #, so that a link can be shared; names, not places, so that it outlives a
// report that is made again.
const ANY = "";
const filters = byId("filters");
const order = byId("order");
const FIELDS = { metric: MEASURES.map((one) => one.name) };
const link = { open: "" }; // the picture that is open

function option(value, words) {
  return el("option", { value: String(value) }, words);
}

function fill(name, entries, any) {
  const select = filters.elements[name];
  if (any) select.append(option(ANY, any));
  select.append(...entries.map(([value, words]) => option(value, words)));
  select.closest("label").hidden = entries.length < 2;
}

function makeFilters(changed) {
  const numbered = (names, words = (name) => name) => names.map((name, index) => [index, words(name)]);
  const seeds = [...new Set(R.seed)].sort((a, b) => a - b);
  const aspects = [...new Set(D.prompts.flatMap((one) => one.aspects))];
  Object.assign(FIELDS, {
    setting: D.settings.map((one) => one.label), mode: D.modes, layer: D.layers, status: D.statuses,
    prompt: D.prompts.map((one) => one.id),
  });
  fill("metric", numbered(MEASURES, ({ name }) => (name.startsWith("read_") ? `${name.slice(5)} lost (read)` : name)));
  fill("setting", numbered(FIELDS.setting));
  fill("mode", numbered(D.modes, modeName), "every mode");
  fill("layer", numbered(D.layers), "every layer");
  fill("prompt", numbered(D.prompts, (one) => `${one.short}: ${one.text}`.slice(0, 70)), "every prompt");
  fill("aspect", aspects.map((tag) => [tag, tag]), "every aspect");
  fill("seed", seeds.map((seed) => [seed, String(seed)]), "every seed");
  fill("status", numbered(D.statuses), "every status");
  for (const name of ["leave_one_out", "only_one"]) {
    const place = D.modes.indexOf(name);
    const first = [...filters.elements.mode.options].find((one) => one.value === String(place));
    if (place >= 0 && first && ![...filters.elements.mode.options].some((one) => one.defaultSelected)) {
      first.defaultSelected = true; // what Reset goes back to
      first.selected = true;
    }
  }
  let timer = 0;
  const soon = () => { clearTimeout(timer); timer = setTimeout(() => { changed(); remember(); }, 120); };
  filters.addEventListener("input", soon);
  order.addEventListener("input", soon);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(() => { order.value = "most"; changed(); remember(); }, 0));
  byId("share").addEventListener("click", async () => {
    remember();
    try { await navigator.clipboard.writeText(location.href); } catch { byId("share").textContent = "Copy it from the address"; return; }
    byId("share").textContent = "Copied";
    setTimeout(() => { byId("share").textContent = "Copy link"; }, 1500);
  });
}

const plainValue = (field) => [...field.options || []].find((one) => one.defaultSelected)?.value ?? field.options?.[0]?.value ?? "";

// What differs from the page as it opens, as the part of its address behind #.
function remember() {
  const said = new URLSearchParams();
  for (const field of filters.elements) {
    if (!field.name || field.value === plainValue(field)) continue;
    said.set(field.name, field.value === ANY ? "any" : FIELDS[field.name]?.[Number(field.value)] ?? field.value);
  }
  if (order.value !== "most") said.set("order", order.value);
  if (link.open) said.set("open", link.open);
  if ([...said].length || location.hash.includes("=")) {
    try {
      history.replaceState(null, "", `#${said}` === "#" ? location.pathname + location.search : `#${said}`);
    } catch { /* in a frame without an address of its own, as W&B shows the page */ }
  }
}

// Sets the fields as the address says; what it names and is not here is left as it is. Returns the row to open, or -1.
function recall() {
  const said = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  for (const field of filters.elements) {
    if (!field.name || !said.has(field.name)) continue;
    const wanted = said.get(field.name);
    const place = FIELDS[field.name]?.indexOf(wanted);
    const value = wanted === "any" && field.options?.[0]?.value === ANY ? ANY : place >= 0 ? String(place) : wanted;
    if (!field.options || [...field.options].some((one) => one.value === value)) field.value = value;
  }
  if (["most", "least", "given"].includes(said.get("order"))) order.value = said.get("order");
  if (["layer", "prompt", "aspect", "seed", "status", "words"].some((name) => said.has(name))) byId("more").open = true;
  return said.has("open") ? R.image.indexOf(said.get("open")) : -1;
}

// The rows that pass, in the order of the results. `fixed` overrides a filter (null: ignores it).
function passing(fixed = {}) {
  const value = (name) => (name in fixed ? fixed[name] : filters.elements[name].value);
  const chosen = (name) => { const text = value(name); return text === ANY || text === null ? null : Number(text); };
  const setting = Number(value("setting"));
  const group = D.settings[setting].group;
  const columns = ["mode", "layer", "prompt", "seed", "status"]
    .map((name) => [R[name], chosen(name)]).filter(([, wanted]) => wanted !== null);
  const words = value("words").trim().toLowerCase();
  const aspect = value("aspect");
  const fits = D.prompts.map((one) => (!words || `${one.id} ${one.text}`.toLowerCase().includes(words))
    && (!aspect || one.aspects.includes(aspect)));
  const found = [];
  for (let row = 0; row < size; row += 1) {
    const here = R.setting[row] === setting || (R.setting[row] < 0 && R.group[row] === group);
    if (here && fits[R.prompt[row]] && columns.every(([column, wanted]) => column[row] === wanted)) found.push(row);
  }
  return found;
}

// Most changed first: what has no value comes last, baselines before that.
function ordered(rows) {
  if (order.value === "given") return rows;
  const sign = order.value === "least" ? -1 : 1;
  const key = (row) => { const value = mode(row) === "none" ? null : change(row); return value === null ? -Infinity : sign * value; };
  const keys = new Map(rows.map((row) => [row, key(row)]));
  return [...rows].sort((a, b) => (keys.get(b) > keys.get(a)) - (keys.get(b) < keys.get(a)) || a - b);
}
