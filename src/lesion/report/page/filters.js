// Which images are meant: one setting (images of different settings are never averaged), then what the filters say.
const ANY = "";
const filters = byId("filters");

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
  fill("setting", numbered(D.settings, (setting) => setting.label));
  fill("mode", numbered(D.modes, modeName), "every mode");
  fill("layer", numbered(D.layers), "every layer");
  fill("prompt", numbered(D.prompts, (one) => `${one.id}: ${one.text}`.slice(0, 70)), "every prompt");
  fill("aspect", [...new Set(D.prompts.flatMap((one) => one.aspects))].map((tag) => [tag, tag]), "every aspect");
  fill("seed", [...new Set(R.seed)].sort((a, b) => a - b).map((seed) => [seed, String(seed)]), "every seed");
  fill("status", numbered(D.statuses), "every status");
  let timer = 0;
  filters.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(changed, 120); });
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(changed, 0));
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
