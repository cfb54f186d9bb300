// Shows the rows that have every word of the box and what the menus say; a heading sorts by itself.
// Words may come with the address: ...#q=gemma3n slices
(() => {
  const page = document.querySelector(".parity");
  const box = page.querySelector("input"), menus = [...page.querySelectorAll(".controls select")];
  const body = page.querySelector(".figures tbody"), rows = [...body.rows];
  const told = page.querySelector(".controls output");
  const texts = new Map(rows.map((row) => [row, `${row.textContent} ${row.dataset.words}`.toLowerCase()]));

  function show() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const fits = words.every((word) => texts.get(row).includes(word)) &&
        menus.every((menu) => !menu.value || row.dataset[menu.dataset.of] === menu.value);
      row.hidden = !fits;
      count += fits;
    }
    told.textContent = `${count} of ${rows.length} figures`;
  }

  function sortBy(column, up) {
    const key = (row) => {
      const cell = row.cells[column];
      if (cell.dataset.value !== undefined) return Number(cell.dataset.value.replace("inf", "Infinity"));
      return cell.textContent;
    };
    const order = (a, b) => {
      if (typeof a === "number" && typeof b === "number") return a - b;
      if (typeof a !== typeof b) return typeof a === "number" ? 1 : -1; // empty cells before numbers
      return a < b ? -1 : a > b ? 1 : 0;
    };
    const keys = new Map(rows.map((row) => [row, key(row)]));
    rows.sort((a, b) => (up ? 1 : -1) * order(keys.get(a), keys.get(b)));
    body.append(...rows);
  }

  page.querySelectorAll(".figures th").forEach((head, column) => {
    head.addEventListener("click", () => {
      const up = head.dataset.up !== "yes";
      head.dataset.up = up ? "yes" : "";
      sortBy(column, up);
    });
  });
  [box, ...menus].forEach((one) => one.addEventListener("input", show));
  const asked = decodeURIComponent(location.hash).match(/^#q=(.*)/);
  if (asked) box.value = asked[1].replace(/\+/g, " ");
  show();
})();
