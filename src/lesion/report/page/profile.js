// Every layer as a box in the order of the forward pass, as low as its level in a UNet, coloured by its mean change.
function layerMeans() {
  const means = new Map();
  for (const cell of heat.cells.values()) {
    if (cell.value === null) continue;
    const one = means.get(cell.layer) || { sum: 0, count: 0 };
    means.set(cell.layer, { sum: one.sum + cell.value, count: one.count + 1 });
  }
  return new Map([...means].map(([place, { sum, count }]) => [place, sum / count]));
}

function makeProfile() {
  const node = byId("profile");
  node.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) openLayer(Number(button.dataset.layer));
  });
  return () => {
    const means = layerMeans();
    const values = [...means.values()];
    const low = Math.min(0, ...values);
    const high = Math.max(low + 1e-3, ...values);
    const shallow = D.levels ? Math.min(...D.levels) : 0;
    node.style.setProperty("--layers", String(D.layers.length));
    node.replaceChildren(...D.layers.map((name, place) => {
      const value = means.has(place) ? means.get(place) : null;
      const words = `${name}: change ${number(value)}`;
      const button = el("button", { type: "button", "aria-label": words, title: words },
        el("span", {}, brief(value)), el("span", { class: "name" }, D.short[place]));
      button.dataset.layer = String(place);
      button.style.gridColumn = String(place + 1);
      button.style.gridRow = String(1 + (D.levels ? D.levels[place] - shallow : 0));
      if (value === null) button.className = "none";
      else paint(button, value, low, high);
      return button;
    }));
    for (const id of ["profile", "profile--title", "profile-words"]) byId(id).hidden = !heat.cells.size;
  };
}

// The images of one layer that the filters let through, most changed first.
function openLayer(place, fixed = {}) {
  const rows = passing({ mode: heatMode(), layer: place, ...fixed });
  if (rows.length) openCompare([...rows].sort((a, b) => (change(b) ?? -Infinity) - (change(a) ?? -Infinity)), 0);
}
