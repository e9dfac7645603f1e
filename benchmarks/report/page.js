"use strict";
// Tables sort by a click on a column's name (again: the other way) and show the rows that hold every word of the
// filter. Without scripts the page still shows everything, in the order of the report.

function sortBy(table, header) {
  const column = header.cellIndex;
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of header.parentNode.children) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const numeric = header.classList.contains("numeric");
  const key = (row) => row.cells[column].dataset.sort;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // nothing comes last
    return sign * (numeric ? x - y : x.localeCompare(y));
  });
  table.tBodies[0].append(...rows);
}

function filterRows(block, words) {
  const rows = [...block.querySelectorAll("tbody tr")];
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  const all = `${rows.length} row${rows.length === 1 ? "" : "s"}`;
  block.querySelector(".count").textContent = shown === rows.length ? all : `${shown} of ${all}`;
}

for (const block of document.querySelectorAll(".table")) {
  for (const button of block.querySelectorAll("th button")) {
    button.addEventListener("click", () => sortBy(block.querySelector("table"), button.parentNode));
  }
  block.querySelector("input").addEventListener("input", (event) => {
    filterRows(block, event.target.value.toLowerCase().split(/\s+/).filter(Boolean));
  });
}
