// Layer tables that sort by a click on a heading; missing values stay last. A layer's row opens its images.
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const sort = (column) => {
    const head = heads[column];
    const text = head.classList.contains("text");
    const before = head.getAttribute("aria-sort");
    const down = before === "none" ? !text && !head.dataset.up : before === "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = (one, other) => {
      const [a, b] = [key(one), key(other)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (text ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b));
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  };
  heads.forEach((head, column) => {
    const button = el("button", { type: "button" }, ...head.childNodes);
    if (!head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", "none");
    head.append(button);
    button.addEventListener("click", () => sort(column));
  });
}

function opening(table) {
  const setting = Number(table.dataset.setting);
  if (!(setting >= 0)) return;
  for (const row of table.tBodies[0].rows) {
    const name = row.querySelector("th[scope=row] code");
    const place = name ? D.layers.indexOf(name.textContent) : -1;
    if (place < 0) continue;
    const button = el("button", { type: "button", class: "open", title: "show the images of this layer" });
    name.replaceWith(button);
    button.append(name);
    row.classList.add("opens");
    row.addEventListener("click", (event) => {
      if (String(getSelection())) return; // text is being marked
      if (event.target.closest("button:not(.open), a")) return;
      openLayer(place, { setting: String(setting) });
    });
  }
}
