// The page's own script: paints the charts for light or dark as they come into view, and lets the samples be searched.
// Every text of a prompt or an answer goes in by textContent, never as HTML.
"use strict";
(() => {
  const data = (id) => JSON.parse(document.getElementById(id).textContent);
  const byId = (id) => document.getElementById(id);

  // ---- Light and dark -----------------------------------------------------------------------------------------------

  const PALETTE = {
    light: { runs: ["#1f6fb4", "#d1602b", "#2b8a5b", "#8b51b0", "#b08a1e", "#4a5b70", "#c23b6b", "#a9b2bd"], first: [166, 189, 219], last: [12, 62, 120],
      ink: "#1b2430", dim: "#5b6675", rule: "#e3e7ed", card: "#ffffff" },
    dark: { runs: ["#6cb4f5", "#ff9f66", "#6fd39b", "#c99bec", "#e2c15a", "#a9b8cb", "#ff8fb4", "#566270"], first: [70, 92, 122], last: [150, 208, 255],
      ink: "#e6eaf0", dim: "#9aa6b5", rule: "#2d3643", card: "#1a2029" },
  };
  const prefers = window.matchMedia("(prefers-color-scheme: dark)");
  const theme = () => document.documentElement.dataset.theme || (prefers.matches ? "dark" : "light");

  function colour(meta, palette) {
    if (meta.step === undefined) return palette.runs[meta.color % palette.runs.length];
    return "rgb(" + palette.first.map((from, k) => Math.round(from + (palette.last[k] - from) * meta.step)).join(",") + ")";
  }

  function painted(figure) {
    const palette = PALETTE[theme()];
    const traces = figure.data.map((trace) => {
      const own = colour(trace.meta, palette), copy = Object.assign({}, trace);
      copy.line = Object.assign({ width: 2 }, trace.line, { color: own });
      copy.marker = Object.assign({}, trace.marker, { color: own, size: trace.mode === "markers" ? 9 : 6 });
      if (trace.error_y) copy.error_y = Object.assign({}, trace.error_y, { color: own });
      if (trace.meta.fill) copy.fillcolor = own.startsWith("#") ? own + "22" : own.replace("rgb(", "rgba(").replace(")", ",0.13)");
      if (trace.type === "bar") delete copy.line;
      return copy;
    });
    const layout = Object.assign({}, figure.layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: palette.ink, size: 12, family: "system-ui, sans-serif" },
      margin: { l: 58, r: figure.layout.yaxis2 ? 58 : 16, t: 12, b: 46 }, hovermode: "x unified", autosize: true,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
      hoverlabel: { bgcolor: palette.card, bordercolor: palette.rule, font: { color: palette.ink } },
    });
    if (figure.layout.showlegend) layout.margin.t = 34;
    for (const name of Object.keys(layout)) {
      if (!/^[xy]axis\d*$/.test(name)) continue;
      layout[name] = Object.assign({}, layout[name], { gridcolor: palette.rule, zerolinecolor: palette.rule, linecolor: palette.rule,
        tickfont: { color: palette.dim }, automargin: true, exponentformat: "power", showline: name[0] === "x" });
    }
    return [traces, layout];
  }

  const charts = data("charts-data"), drawn = new Set();
  function draw(place) {
    const [traces, layout] = painted(charts[place.dataset.chart]);
    drawn.add(place);
    Plotly.react(place, traces, layout, { displaylogo: false, responsive: true, displayModeBar: false, doubleClick: "reset" });
  }
  const places = [...document.querySelectorAll(".plot")];
  document.addEventListener("DOMContentLoaded", () => { // plotly.js stands behind this script: tables and samples are there before it
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries.filter((one) => one.isIntersecting)) {
        observer.unobserve(entry.target);
        setTimeout(() => draw(entry.target)); // one at a time, so that the page answers between them
      }
    }, { rootMargin: "200px" });
    places.forEach((place) => observer.observe(place));
  });
  window.addEventListener("beforeprint", () => places.filter((place) => !drawn.has(place)).forEach(draw));

  function named() {
    byId("theme").querySelector("span").textContent = theme() === "dark" ? "Light" : "Dark";
  }
  function repaint() {
    named();
    drawn.forEach(draw);
  }
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("report-theme", theme()); } catch { /* a file opened without storage */ }
    repaint();
  });
  try {
    const stored = localStorage.getItem("report-theme");
    if (stored === "dark" || stored === "light") document.documentElement.dataset.theme = stored;
  } catch { /* as above */ }
  prefers.addEventListener("change", repaint);
  named();

  // ---- Samples ------------------------------------------------------------------------------------------------------

  const samples = data("samples-data"), PAGE = 10;
  let found = [], page = 0;

  function element(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function words(parent, text, needle) { // [text, characters left out], what was searched for marked
    const lower = text[0].toLowerCase();
    let from = 0, at = needle ? lower.indexOf(needle) : -1;
    while (at >= 0 && lower.length === text[0].length) {
      parent.append(text[0].slice(from, at), element("mark", "", text[0].slice(at, at + needle.length)));
      from = at + needle.length;
      at = lower.indexOf(needle, from);
    }
    parent.append(text[0].slice(from));
    if (text[1]) parent.append(element("span", "cut", ` … ${text[1]} more characters`));
  }

  function answer(one, needle, mark) {
    const box = element("div", "answer" + (mark ? " " + mark : "")), facts = element("div", "facts"), text = element("div", "text");
    const parts = [];
    if (mark) parts.push(mark);
    parts.push(one.r === null ? "no reward" : `reward ${one.r}`);
    if (one.g !== undefined) parts.push(`gold ${one.g}`);
    if (one.j !== undefined) parts.push(`judge ${one.j}`);
    if (one.n !== undefined) parts.push(`${one.n} tokens`);
    if (one.c) parts.push("cut off");
    if (one.s) parts.push(one.s);
    parts.forEach((part, k) => facts.append(k ? ", " : "", k || !mark ? part : element("b", "", part)));
    words(text, one.t, needle);
    box.append(facts, text);
    return box;
  }

  function prompt(turns, needle) {
    return turns.map((turn) => {
      const line = element("p", "turn");
      line.append(element("b", "", turn[0]));
      words(line, turn.slice(1), needle);
      return line;
    });
  }

  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const rewards = (answers) => answers.map((one) => one.r).filter((r) => r !== null);

  function heldoutMargin(entry) { // last column less first, greedy where both have it
    for (const kind of ["greedy", "sampled"]) {
      const own = entry.a.filter((a) => a.kind === kind && rewards(a.r).length).sort((a, b) => a.col - b.col);
      if (own.length > 1) return mean(rewards(own[own.length - 1].r)) - mean(rewards(own[0].r));
    }
    return null;
  }

  const entries = { heldout: samples.heldout, training: samples.training };
  for (const view of ["heldout", "training"]) {
    for (const entry of entries[view]) {
      entry.all = view === "heldout" ? entry.a.flatMap((a) => a.r) : entry.r;
      entry.margin = view === "heldout" ? heldoutMargin(entry) : entry.pairs.length ? Math.max(...entry.pairs.map((p) => p[2] ?? -Infinity)) : null;
    }
  }

  function textOf(entry) { // made at the first search
    entry.text ??= [...entry.p.map((turn) => turn[1]), ...entry.all.map((one) => one.t[0])].join("\n").toLowerCase();
    return entry.text;
  }

  function card(view, entry, needle) {
    const box = element("article", "sample");
    const head = element("div", "facts", view === "heldout" ? "" : `${samples.runs.length > 1 ? samples.runs[entry.run] + ", " : ""}iteration ${entry.i}`);
    if (entry.margin !== null && Number.isFinite(entry.margin)) head.append(`${head.textContent ? ", " : ""}margin ${entry.margin.toFixed(3)}`);
    box.append(head, ...prompt(entry.p, needle));
    if (view === "heldout") {
      const columns = element("div", "columns");
      columns.tabIndex = 0;
      samples.columns.forEach((label, col) => {
        const own = entry.a.filter((a) => a.col === col);
        if (!own.length) return;
        const column = element("div", "column");
        column.append(element("h4", "", label));
        for (const a of own) {
          if (a.kind === "greedy") { a.r.forEach((one) => column.append(answer(one, needle, ""))); continue; }
          const more = element("details"), hit = needle && a.r.some((one) => one.t[0].toLowerCase().includes(needle));
          more.open = Boolean(hit) || !own.some((other) => other.kind === "greedy");
          more.append(element("summary", "facts", `${a.r.length} of ${a.of} sampled, mean reward ${rewards(a.r).length ? mean(rewards(a.r)).toFixed(3) : "–"}`));
          [...a.r].sort((x, y) => (y.r ?? -Infinity) - (x.r ?? -Infinity)).forEach((one) => more.append(answer(one, needle, "")));
          column.append(more);
        }
        columns.append(column);
      });
      box.append(columns);
    } else {
      const answers = element("div", "answers");
      const chosen = new Set(entry.pairs.map((p) => p[0])), rejected = new Set(entry.pairs.map((p) => p[1]));
      entry.r.map((one, k) => [one, chosen.has(k) ? "chosen" : rejected.has(k) ? "rejected" : ""])
        .sort((x, y) => (y[0].r ?? -Infinity) - (x[0].r ?? -Infinity)).forEach(([one, mark]) => answers.append(answer(one, needle, mark)));
      box.append(answers);
      if (!entry.pairs.length) box.append(element("div", "facts", "no pair of this prompt was trained on, or none is known"));
    }
    return box;
  }

  const view = () => document.querySelector("input[name=view]:checked").value;
  const bound = (id, otherwise) => (byId(id).value === "" || Number.isNaN(byId(id).valueAsNumber) ? otherwise : byId(id).valueAsNumber);
  const span = (name) => [bound(name + "-min", -Infinity), bound(name + "-max", Infinity)];
  const open = ([low, high]) => low === -Infinity && high === Infinity;
  const within = (value, [low, high]) => value !== null && value !== undefined && value >= low && value <= high;

  function filter() {
    const needle = byId("search").value.trim().toLowerCase(), reward = span("reward"), margin = span("margin"), length = span("length");
    const chosen = byId("iteration").value, order = byId("order").value;
    found = entries[view()].filter((entry) =>
      (!needle || textOf(entry).includes(needle)) &&
      (view() === "heldout" || chosen === "" || `${entry.run}.${entry.i}` === chosen) &&
      (open(margin) || within(entry.margin, margin)) &&
      ((open(reward) && open(length)) || entry.all.some((one) => (open(reward) || within(one.r, reward)) && (open(length) || within(one.n, length)))));
    const last = (values) => (values.length ? Math.max(...values) : -Infinity);
    const keys = { margin: (e) => e.margin ?? -Infinity, reward: (e) => last(rewards(e.all)), length: (e) => last(e.all.map((o) => o.n ?? -Infinity)) };
    if (order) {
      const key = keys[order.replace("-", "")], sign = order.startsWith("-") ? 1 : -1;
      found = found.map((e) => [key(e), e]).sort((a, b) => sign * (a[0] === b[0] ? 0 : a[0] - b[0])).map(([, e]) => e);
    }
    page = 0;
    show();
  }

  function show() {
    const needle = byId("search").value.trim().toLowerCase(), pages = Math.max(1, Math.ceil(found.length / PAGE)), list = byId("list");
    list.replaceChildren(...found.slice(page * PAGE, page * PAGE + PAGE).map((entry) => card(view(), entry, needle)));
    byId("count").textContent = `${found.length} of ${entries[view()].length} prompts`;
    byId("place").textContent = `page ${page + 1} of ${pages}`;
    byId("before").disabled = page === 0;
    byId("after").disabled = page >= pages - 1;
    byId("iteration-label").hidden = view() !== "training";
  }

  byId("iteration").append(new Option("all", ""));
  for (const key of new Set(samples.training.map((entry) => `${entry.run}.${entry.i}`))) {
    const [run, i] = key.split(".");
    byId("iteration").append(new Option(samples.runs.length > 1 ? `${samples.runs[run]}, ${i}` : i, key));
  }
  let waiting = 0;
  byId("filters").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
  byId("filters").addEventListener("reset", () => setTimeout(filter, 0));
  byId("filters").addEventListener("submit", (event) => { event.preventDefault(); filter(); });
  byId("before").addEventListener("click", () => { page -= 1; show(); byId("samples").scrollIntoView(); });
  byId("after").addEventListener("click", () => { page += 1; show(); byId("samples").scrollIntoView(); });
  if (!samples.heldout.length && samples.training.length) document.querySelector("input[value=training]").checked = true;
  filter();
})();
