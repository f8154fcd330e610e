// The images that pass the filters, each beside its baseline, a page at a time, so that their number does not matter.
function card(row, at) {
  const baseline = R.baseline[row];
  const paired = baseline >= 0 && baseline !== row;
  const words = status(row) !== "ok" ? status(row) : mode(row) === "none" ? "baseline" : `change ${brief(change(row))}`;
  const gone = lost(row);
  const button = el("button", { type: "button", "aria-label": describe(row), title: prompt(row).text.slice(0, 300) },
    el("span", { class: paired ? "two" : "one" }, ...(paired ? [picture(baseline, { thumb: true, lazy: true, alt: "" })] : []),
      picture(row, { thumb: true, lazy: true, alt: "" })),
    el("span", { class: "line" }, el("span", { class: "score" }, words),
      ...gone.map((one) => el("span", { class: "lost" }, `${one} lost`))),
    el("span", {}, layer(row) || lesioned(row).slice(0, 80) || modeName(mode(row))),
    el("span", { class: "faint" }, mode(row) === "none" || !(layer(row) || lesioned(row)) ? "" : `${modeName(mode(row))} · `,
      el("bdi", {}, prompt(row).short), ` · seed ${R.seed[row]}`));
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
  const turn = pager(byId("gallery-pager"), "images", 48, (start, end) => {
    list.replaceChildren(...rows.slice(start, end).map((row, index) => card(row, start + index)));
  });
  return () => {
    rows = ordered(passing());
    byId("gallery-words").textContent = `${plural(rows.length, "image")} of ${size.toLocaleString("en")}, baseline to the left.`;
    turn(rows.length);
  };
}
