"use strict";
(() => {
  // Tables: a heading sorts by its column, first upwards, then downwards; what has no number comes last either way.
  const compare = (a, b) => {
    const [x, y] = [a, b].map(Number);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a.localeCompare(b, "en", { numeric: true });
    return x - y;
  };
  const missing = (key) => key === "";
  const sort = (heading) => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    const body = heading.closest("table").tBodies[0];
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keyed = [...body.rows].map((row) => [row.cells[heading.cellIndex].dataset.key, row]);
    keyed.sort(([a], [b]) => missing(a) - missing(b) || (missing(a) ? 0 : (up ? 1 : -1) * compare(a, b)));
    body.append(...keyed.map(([, row]) => row));
  };
  for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button.parentElement));

  // Plots: one after the other, so that the page can be read meanwhile; those in a closed fold when it is opened.
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const look = () => {
    const [ink, soft, grid] = [color("--ink"), color("--soft"), color("--grid")];
    const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, tickcolor: soft, tickfont: { color: soft }, automargin: true };
    return { ink, soft, axis };
  };
  const dressed = (layout) => {
    const { ink, soft, axis } = look();
    const title = (of) => (of?.title ? { ...of.title, font: { size: 12, color: soft }, standoff: 8 } : undefined);
    return {
      ...layout,
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
      margin: { l: 48, r: 12, t: 12, b: layout.xaxis?.title?.text ? 40 : 24 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink }, ...layout.legend },
      xaxis: { ...layout.xaxis, ...axis, zeroline: false, title: title(layout.xaxis) },
      yaxis: { ...layout.yaxis, ...axis, title: title(layout.yaxis) },
      hoverlabel: { namelength: -1 },
      dragmode: false,
    };
  };
  // Names too long for the legend lose their middle there, and are whole where the mouse points; a longer legend needs room.
  const letters = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  const markup = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const LETTER = 6.8, MARK = 64, LINE = 19;
  const fitted = (data, layout, width) => {
    const most = Math.max(12, Math.floor((width - MARK) / LETTER));
    let longest = 0;
    for (const trace of data.filter((one) => one.name)) {
      const name = letters(trace.name), half = Math.floor(most / 2);
      trace.meta = trace.name;
      trace.hovertemplate = trace.hovertemplate.replace("fullData.name", "meta");
      if (name.length > most) trace.name = markup(`${name.slice(0, half - 1)}…${name.slice(1 - half)}`);
      longest = Math.max(longest, Math.min(name.length, most));
    }
    const shown = layout.showlegend === false || data.length < 2 ? 1 : data.length;
    const lines = Math.ceil(shown / Math.max(1, Math.floor(width / (MARK + LETTER * longest))));
    layout.height += LINE * (lines - 1);
  };
  const options = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: [["toImage"]], scrollZoom: false };
  const plots = [...document.querySelectorAll(".plot")];
  const hidden = (plot) => plot.closest("details:not([open])");
  const draw = (plot) => {
    const place = plot.querySelector(".drawing");
    if (place.dataset.drawn) return;
    place.dataset.drawn = "yes";
    const { data, layout } = JSON.parse(plot.querySelector("script").textContent);
    const { soft } = look();
    fitted(data, layout, place.clientWidth);
    for (const trace of data) {
      if (trace.error_y) trace.error_y.color = soft;
      if (trace.colorbar) Object.assign(trace.colorbar, { tickfont: { color: soft }, title: { ...trace.colorbar.title, font: { color: soft } }, outlinewidth: 0 });
    }
    Plotly.newPlot(place, data, dressed(layout), options);
  };
  const waiting = plots.filter((plot) => !hidden(plot));
  const next = () => {
    const plot = waiting.shift();
    if (!plot) return document.documentElement.setAttribute("data-drawn", "yes");
    draw(plot);
    setTimeout(next);
  };
  next();
  for (const fold of document.querySelectorAll("details")) {
    fold.addEventListener("toggle", () => fold.open && plots.filter((plot) => fold.contains(plot) && !hidden(plot)).forEach(draw));
  }
  const redress = () => {
    for (const place of document.querySelectorAll(".drawing[data-drawn]")) Plotly.relayout(place, dressed(place.layout));
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redress);

  // Paper is narrower than most screens, and always light.
  addEventListener("beforeprint", () => {
    waiting.splice(0).forEach(draw);
    for (const place of document.querySelectorAll(".drawing[data-drawn]")) Plotly.relayout(place, { ...dressed(place.layout), width: 640 });
  });
  addEventListener("afterprint", () => {
    for (const place of document.querySelectorAll(".drawing[data-drawn]")) Plotly.relayout(place, { ...dressed(place.layout), width: null });
  });

  // The navigation says where the reader is.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const here = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75%" });
  document.querySelectorAll("main > section").forEach((section) => here.observe(section));
})();
