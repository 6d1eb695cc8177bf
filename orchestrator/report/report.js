for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.addEventListener("click", () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    const key = row => { const t = row.cells[i].textContent, n = Number(t); return t === "" ? Infinity : isNaN(n) ? t : n; };
    const order = (a, b) => typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1;
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    body.append(...[...body.rows].sort((a, b) => sign * order(key(a), key(b))));
  }));
}
