"use strict";

/* The filter of the sites' table. */
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const [text, kind, state] = ["text", "kind", "state"].map((name) => document.getElementById(`filter-${name}`));
  const rows = [...document.querySelectorAll(".sites tbody tr")].map((row) => ({ row, words: row.textContent.toLowerCase().replace(/\s+/g, " ") }));
  const apply = () => {
    const wanted = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, words } of rows) {
      const fits =
        wanted.every((word) => words.includes(word)) &&
        (!kind.value || row.dataset.kind === kind.value) &&
        (!state.value || (state.value === "refused" ? "refused" in row.dataset : row.dataset.state === state.value));
      row.hidden = !fits;
      shown += fits;
    }
    document.getElementById("filter-count").value = `${shown} of ${rows.length} sites`;
    document.getElementById("filter-none").hidden = shown > 0;
  };
  form.hidden = false; // without this script it would do nothing
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const kind of ["input", "change"]) form.addEventListener(kind, apply);
  apply();
})();

/* Maps of blocks, and the table of densities that chooses among them. */
(() => {
  const { sites } = JSON.parse(document.getElementById("maps").textContent);
  if (!sites.length) return;
  const [siteList, headList, canvas, caption] = ["map-site", "map-head", "map-canvas", "map-caption"].map((id) => document.getElementById(id));
  const cells = [...document.querySelectorAll(".cell")];
  const grid = cells.reduce((rows, cell) => {
    (rows[cell.dataset.map] ||= []).push(cell);
    return rows;
  }, []).filter(Boolean);

  const colour = (name) => {
    const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  };

  /* Shares 0 to 1 of one head's cells, or of all heads' mean; NaN where no block is possible. */
  const shares = (site, head) => {
    const heads = head === "mean" ? site.heads : [site.heads[head]];
    return Float32Array.from({ length: site.rows * site.columns }, (_, i) => heads.reduce((sum, digits) => sum + parseInt(digits[i], 16) / 15, 0) / heads.length);
  };

  const draw = () => {
    const site = sites[siteList.value], head = headList.value === "mean" ? "mean" : Number(headList.value);
    const [low, high, none] = [colour("--heat0"), colour("--heat1"), colour("--none")];
    const small = document.createElement("canvas");
    small.width = site.columns;
    small.height = site.rows;
    const image = new ImageData(site.columns, site.rows);
    shares(site, head).forEach((share, i) => {
      const at = Math.sqrt(share);
      const rgb = Number.isNaN(share) ? none : low.map((value, channel) => value + (high[channel] - value) * at);
      image.data.set([...rgb, 255], 4 * i);
    });
    small.getContext("2d").putImageData(image, 0, 0);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    const mean = site.density.reduce((sum, one) => sum + one, 0) / site.density.length;
    const [who, density] = head === "mean" ? [`mean of ${site.heads.length} heads`, mean] : [`head ${head}`, site.density[head]];
    const blocks = Math.ceil(site.key_len / site.block_size);
    const cell = site.columns < blocks ? `one cell is about ${Math.round(blocks / site.columns)} blocks` : "one cell is one block";
    caption.textContent =
      `${site.label}, ${who}: ${density.toFixed(1)} % of the causal blocks. Queries run down, keys to the right; ` +
      `${site.query_len} × ${site.key_len} tokens in blocks of ${site.block_size}, ${cell}. The stronger its shade, the more of it is visited; even ground is what causality hides.`;
    for (const one of cells) one.setAttribute("aria-pressed", String(one.dataset.map === siteList.value && Number(one.dataset.head) === head));
  };

  const fillHeads = (chosen) => {
    const count = sites[siteList.value].heads.length;
    headList.replaceChildren(new Option("mean of all", "mean"), ...Array.from({ length: count }, (_, head) => new Option(String(head), String(head))));
    headList.value = chosen !== "mean" && Number(chosen) < count ? chosen : "mean";
  };

  siteList.addEventListener("change", () => {
    fillHeads(headList.value);
    draw();
  });
  headList.addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  /* One cell is in the order of the Tab key; arrows, Home and End move within the table. */
  let current = cells[0];
  const move = (cell) => {
    current.tabIndex = -1;
    current = cell;
    cell.tabIndex = 0;
    cell.focus();
  };
  for (const [y, row] of grid.entries()) {
    for (const [x, cell] of row.entries()) {
      cell.addEventListener("click", () => {
        siteList.value = cell.dataset.map;
        fillHeads(cell.dataset.head);
        draw();
        move(cell);
      });
      cell.addEventListener("keydown", (event) => {
        const to = {
          ArrowLeft: () => row[x - 1],
          ArrowRight: () => row[x + 1],
          ArrowUp: () => (grid[y - 1] || [])[x],
          ArrowDown: () => (grid[y + 1] || [])[x],
          Home: () => row[0],
          End: () => row[row.length - 1],
        }[event.key];
        if (!to) return;
        event.preventDefault();
        if (to()) move(to());
      });
    }
  }
  current.tabIndex = 0;
  fillHeads("mean");
  draw();
})();
