for (const table of document.querySelectorAll("table.sortable")) sortable(table);
for (const image of document.querySelectorAll(".pairs img")) {
  const fit = () => image.classList.toggle("pixels", image.naturalWidth <= 160);
  image.addEventListener("load", fit);
  if (image.complete) fit();
}
if (D && size) {
  const drawGallery = makeGallery();
  const drawHeat = makeHeat();
  const drawProfile = makeProfile();
  const changed = () => { drawHeat(); drawProfile(); drawGallery(); };
  const fromAddress = () => {
    const row = recall();
    changed();
    if (row >= 0) openCompare([row], 0);
  };
  makeCompare();
  makeFilters(changed);
  for (const table of document.querySelectorAll("table.sortable")) opening(table);
  const figures = [...document.querySelectorAll(".pairs figure")];
  for (const figure of figures) {
    const box = figure.querySelector(".two");
    const button = el("button", { type: "button", "aria-label": "compare this pair" });
    box.replaceWith(button);
    button.append(box);
    const all = [...figure.parentNode.children].map((one) => Number(one.dataset.row));
    button.addEventListener("click", () => openCompare(all, all.indexOf(Number(figure.dataset.row))));
  }
  byId("explore").hidden = false;
  fromAddress();
  addEventListener("hashchange", () => { if (location.hash.includes("=")) fromAddress(); });
} else if (!D) {
  byId("lost").hidden = false;
}
