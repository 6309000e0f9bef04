// Colours verdicts, and lets the tables of the conformance page be filtered by name, verdict and column.
"use strict";

const SIGNS = { "✓": "exact", "·": "refused", "✗": "wrong", "‼": "wrong" };

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function conformance() {
  const tables = [...document.querySelectorAll(".md-typeset table")].filter(
    (table) => table.tHead && table.tHead.rows[0].cells[0].textContent.trim() === "case"
  );
  if (!tables.length) return;
  const columns = [...tables[0].tHead.rows[0].cells].slice(1).map((cell) => cell.textContent.trim());
  for (const table of tables) {
    table.classList.add("conformance");
    for (const row of table.tBodies[0].rows) {
      for (const cell of [...row.cells].slice(1)) cell.className = SIGNS[cell.textContent.trim()] || "";
    }
  }
  const search = element("input", { type: "search", placeholder: "part of a name", size: 16 });
  const verdict = element("select", {}, ...["any verdict", "exact", "refused", "wrong"].map((text) => new Option(text)));
  const who = element("select", {}, ...["in any column", ...columns].map((text) => new Option(text)));
  const told = element("output", {});
  const boxes = columns.map((name) => element("input", { type: "checkbox", checked: true, value: name }));
  const chosen = element("fieldset", {}, ...boxes.map((box) => element("label", {}, box, " " + box.value)));
  search.setAttribute("aria-label", "cases whose name contains");
  verdict.setAttribute("aria-label", "cases with the verdict");
  who.setAttribute("aria-label", "of the column");

  function apply() {
    let count = 0;
    const column = who.selectedIndex;
    const wanted = verdict.selectedIndex ? verdict.value : null;
    for (const table of tables) {
      let there = 0;
      for (const row of table.tBodies[0].rows) {
        const cells = [...row.cells].slice(1);
        const looked = column ? [cells[column - 1]] : cells.filter((_, place) => boxes[place].checked);
        const name = row.cells[0].textContent.toLowerCase();
        const shown = name.includes(search.value.toLowerCase())
          && (!wanted || looked.some((cell) => cell.classList.contains(wanted)));
        row.hidden = !shown;
        there += shown;
      }
      for (const row of [table.tHead.rows[0], ...table.tBodies[0].rows]) {
        [...row.cells].slice(1).forEach((cell, place) => { cell.hidden = !boxes[place].checked; });
      }
      table.hidden = !there;
      count += there;
    }
    told.textContent = `${count} cases`;
  }
  if (window.innerWidth < 600) boxes.forEach((box) => { box.checked = ["outputs", "Opacus hooks", "BackPACK", "TorchJD"].includes(box.value); });
  for (const part of [search, verdict, who, ...boxes]) part.addEventListener("input", apply);
  const heading = document.querySelector(".md-typeset h2");
  heading.before(element("div", { className: "filters" }, search, verdict, who, told, chosen));
  apply();
}

function verdicts() {
  const kinds = { "holds": "holds", "holds in part": "in-part", "does not hold": "fails", "undecided": "undecided" };
  for (const strong of document.querySelectorAll(".md-typeset td strong")) {
    const kind = kinds[strong.textContent.trim()];
    if (kind) strong.classList.add("verdict", kind);
  }
}

document.addEventListener("DOMContentLoaded", () => { conformance(); verdicts(); });
