for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const key = row => { const t = row.cells[column].textContent; return t === "" || isNaN(t) ? t : Number(t); };
    const order = (a, b) => typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1;
    const sort = () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      heads.forEach(h => { h.ariaSort = h === head ? (sign > 0 ? "ascending" : "descending") : null; });
      body.append(...[...body.rows].sort((a, b) => sign * order(key(a), key(b))));
    };
    head.tabIndex = 0;
    head.onclick = sort;
    head.onkeydown = event => { if (event.key === "Enter") sort(); };
  });
}
