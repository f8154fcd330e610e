for (const table of document.querySelectorAll("table.sortable")) sortable(table);
if (D && size) {
  const drawGallery = makeGallery();
  const drawHeat = makeHeat();
  const changed = () => { drawHeat(); drawGallery(); };
  makeCompare();
  makeFilters(changed);
  byId("explore").hidden = false;
  changed();
} else if (!D) {
  byId("lost").hidden = false;
}
