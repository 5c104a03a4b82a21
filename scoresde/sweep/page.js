"use strict";
// A row, a curve or a picture under the mouse shows the others of the same run.
const all = (selector) => [...document.querySelectorAll(selector)];
function show(number) {
  document.body.classList.toggle("busy", number !== null);
  for (const element of all("[data-run]")) {
    element.classList.toggle("hot", element.dataset.run === number);
  }
}
for (const element of all("[data-run]")) {
  element.addEventListener("mouseenter", () => show(element.dataset.run));
  element.addEventListener("mouseleave", () => show(null));
}
// A click on a heading sorts; numbers as numbers, and what has no value last.
for (const button of all("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending", column = head.cellIndex;
    for (const other of all("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value ?? "";
    const compare = (a, b) => a.localeCompare(b, undefined, { numeric: true });
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = isNaN(x) || isNaN(y) ? compare(x, y) : x - y;
      return up ? difference : -difference;
    };
    body.append(...[...body.rows].sort(order));
  });
}
