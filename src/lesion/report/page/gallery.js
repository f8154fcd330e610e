// The images that pass the filters, a page at a time, so that the number of images does not matter.
function card(row, at) {
  const words = status(row) === "ok"
    ? (mode(row) === "none" ? "baseline" : number(similarity(row))) : status(row);
  const button = el("button", { type: "button", "aria-label": describe(row) },
    picture(row, { thumb: true, lazy: true, alt: "" }),
    el("span", { class: "score" }, words),
    el("span", {}, [modeName(mode(row)), layer(row) || lesioned(row).slice(0, 80)].filter(Boolean).join(" ")),
    el("span", { class: "faint" }, el("bdi", {}, prompt(row).id), `, seed ${R.seed[row]}`));
  button.dataset.at = String(at);
  return el("li", {}, button);
}

function makeGallery() {
  let rows = [];
  const list = byId("gallery");
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) openCompare(rows, Number(button.dataset.at));
  });
  const turn = pager(byId("gallery-pager"), "images", 60, (start, end) => {
    list.replaceChildren(...rows.slice(start, end).map((row, index) => card(row, start + index)));
  });
  return () => {
    rows = passing();
    byId("gallery-words").textContent = `${plural(rows.length, "image")} of ${size.toLocaleString("en")}.`;
    turn(rows.length);
  };
}
