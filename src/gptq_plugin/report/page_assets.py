"""Style and script of report.html. Without the script the page shows the same, and its table is not sorted anew.

Tested by tests/report/test_html_page.py: as parts of the page.
"""

from __future__ import annotations

# Blue and orange of Okabe and Ito's palette, distinct in any colour vision; round-to-nearest's mark is also hollow.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #5d6670; --rule: #d8dde3; --box: #f4f6f8;
  --gptq: #0072b2; --rtn: #c25a00; --warn: #fff4e0; --warn-rule: #c25a00;
  --bits2: #d55e00; --bits3: #e69f00; --bits4: #56b4e9; --bits8: #005a8c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --soft: #9aa4af; --rule: #343b44;
  --box: #1d2229; --gptq: #56b4e9; --rtn: #e69f00; --warn: #2c2413; --warn-rule: #e69f00; --bits8: #cfe8f7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
p { margin: .25rem 0; }
.soft { color: var(--soft); fill: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tiles div { background: var(--box); border-radius: 6px; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.15rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
.split { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; margin: .25rem 0 .5rem; }
.split i { background: var(--rule); }
.split .packed, .legend .packed { background: var(--gptq); }
.split .floats, .legend .floats { background: var(--rtn); }
.deviations { background: var(--warn); border-left: 4px solid var(--warn-rule); border-radius: 4px; margin: 1.25rem 0;
  padding: .75rem 1rem; }
.deviations h2 { margin: 0 0 .25rem; }
.deviations ol { margin: 0; padding-left: 1.6rem; }
figure { margin: 0; }
figcaption { margin-bottom: .75rem; }
.legend { margin-top: .25rem; }
.legend span { margin-right: 1.25rem; display: inline-block; }
.legend svg { vertical-align: -1px; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem;
  vertical-align: -1px; background: var(--rule); }
.chart { display: block; overflow: visible; }
.gptq { fill: var(--gptq); stroke: var(--gptq); }
.rtn { fill: var(--paper); stroke: var(--rtn); stroke-width: 1.5; }
.bits2 { fill: var(--bits2); } .bits3 { fill: var(--bits3); }
.bits4 { fill: var(--bits4); } .bits8 { fill: var(--bits8); }
.link { stroke: var(--soft); opacity: .45; }
.grid { stroke: var(--rule); }
.hit { fill: transparent; }
g:hover .hit { fill: var(--box); }
.kind { fill: var(--ink); font-size: 12px; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.axis { fill: var(--soft); font-size: 11px; text-anchor: middle; }
.wide { overflow: auto; max-height: 60rem; border: 1px solid var(--rule); border-radius: 6px; }
.wide.free { max-height: none; border: 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
.layers { width: 100%; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; background: var(--paper); vertical-align: bottom; white-space: normal;
  overflow-wrap: normal; }
thead th { position: sticky; top: 0; }
.left { text-align: left; }
td.left { white-space: normal; }
.layers td.left { min-width: 12rem; overflow-wrap: break-word; }
th[aria-sort] { cursor: pointer; }
th[aria-sort]:hover, th[aria-sort]:focus { color: var(--ink); text-decoration: underline; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
tr:hover td { background: var(--box); }
.worse { color: var(--rtn); font-weight: 700; }
.bar { display: block; height: .7rem; min-width: 1px; border-radius: 2px; background: var(--gptq); }
.bars td:last-child { width: 100%; min-width: 6rem; }
.bars table { width: 100%; }
.bars td.left { white-space: nowrap; }
@media (max-width: 50rem) {
  .wide { max-height: none; border: 0; }
  th, td { padding: .3rem .25rem; }
  .layers, .layers tbody { display: block; }
  .layers thead { display: none; }
  .layers thead:has(th[aria-sort]) { display: block; margin-bottom: .5rem; }
  .layers thead:has(th[aria-sort]) tr { display: flex; flex-wrap: wrap; gap: .1rem .9rem; }
  .layers th { position: static; border: 0; padding: .2rem 0; }
  .layers tr { display: flex; flex-wrap: wrap; gap: 0 .9rem; border-bottom: 1px solid var(--rule); padding: .4rem 0; }
  .layers td { border: 0; padding: 0; white-space: normal; }
  .layers td:first-child { flex-basis: 100%; font-weight: 600; }
  .layers td[data-title]:not(:empty)::before { content: attr(data-title) " "; color: var(--soft); font-weight: 400; }
}
@media print { .wide { max-height: none; } }
"""

# A click, or Enter, on a head of the table of layers sorts it by that column; unknown figures come last.
SCRIPT = """
for (const table of document.querySelectorAll("table.layers")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => { const cell = row.cells[column]; return cell.dataset.key ?? cell.textContent; };
  const sort = (head, column) => {
    const up = head.getAttribute("aria-sort") === "descending" || (head.getAttribute("aria-sort") === "none" &&
      head.dataset.first === "up");
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [key(row, column), row]);
    rows.sort(([a], [b]) => (a === "") - (b === "") || (up ? 1 : -1) * (isNaN(a) || isNaN(b) ?
      a.localeCompare(b, undefined, { numeric: true }) : a - b));
    body.append(...rows.map(([, row]) => row));
  };
  heads.forEach((head, column) => {
    head.setAttribute("aria-sort", head.dataset.sorted ?? "none");
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head, column));
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(head, column); });
  });
}
"""
