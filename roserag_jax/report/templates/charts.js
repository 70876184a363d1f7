"use strict";
// Charts as SVG: lines with intervals, histograms, and scores with intervals. Their data is also a table.

const HEIGHT = 236, LEFT = 52, RIGHT = 14, TOP = 10, BOTTOM = 40;

function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++) found.push(i * size);
  return found;
}

function number(value) {
  if (value === null || value === undefined) return "none";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

const score = (value) => (value === null || value === undefined ? "none" : value.toFixed(1)); // percent

const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);
const extent = (values) => [Math.min(...values), Math.max(...values)];

// Draws again whenever the width changes.
function figure(title, note, draw, table, kind) {
  const picture = element("div", { class: kind });
  const data = element("details", {}, element("summary", {}, "As a table"));
  data.addEventListener("toggle", () => data.childElementCount > 1 || data.append(dataTable(title, ...table())));
  const made = element("figure", {}, element("figcaption", {}, title, note && element("small", {}, note)), picture, data);
  let width = 0;
  new ResizeObserver(() => {
    if (picture.clientWidth && picture.clientWidth !== width) {
      width = picture.clientWidth;
      draw(picture, width);
    }
  }).observe(picture);
  return made;
}

function axes(width, height, x, y, names) {
  const parts = [];
  for (const [at, value] of y.ticks.map((value) => [y.place(value), value])) {
    parts.push(svg("line", { class: value === 0 ? "zero" : "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
    parts.push(svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, number(value)));
  }
  for (const value of x.ticks) {
    const label = names ? names[value] : number(value);
    parts.push(svg("text", { x: x.place(value), y: height - BOTTOM + 16, "text-anchor": "middle" }, label));
  }
  return parts;
}

// Lines over steps, passages or noise. `cursor.move(x)` shows the values at x in all charts of a group.
function lineChart(chart, cursor) {
  const held = (series) => series.name.endsWith(", held out");
  const shown = chart.y === "percent" ? score : number;
  const outputs = chart.series.map(() => element("output", {}));
  const keys = element("ul", { class: "keys" }, chart.series.map((series, i) => element("li", {},
    svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, svg("line", { class: `s s${i % 8} ${held(series) ? "held" : ""}`, x1: 0, x2: 26, y1: 5, y2: 5 })),
    series.name, " ", outputs[i])));
  const points = chart.series.flatMap((series) => series.points);
  const xs = [...new Set(points.map((point) => point[0]))].sort((a, b) => a - b);
  const nameOf = (x) => (chart.names ? chart.names[x] : number(x));
  let cross = null, place = null, picture = null;

  const show = (x) => {
    if (!place) return;
    for (const [i, series] of chart.series.entries()) {
      const point = nearest(series.points, x, chart.x !== "step" || held(series) ? 0 : Infinity);
      const range = point && point.length > 2 ? ` [${shown(point[2])}, ${shown(point[3])}]` : "";
      outputs[i].textContent = point ? shown(point[1]) + range : "";
    }
    cross[0].setAttribute("visibility", "visible");
    cross[0].setAttribute("x1", place(x));
    cross[0].setAttribute("x2", place(x));
    cross[1].textContent = `${chart.x} ${nameOf(x)}`;
    cross[1].setAttribute("x", Math.min(Math.max(place(x), LEFT + 30), picture.clientWidth - 40));
    const values = chart.series.map((series, i) => outputs[i].textContent && `${series.name} ${outputs[i].textContent}`);
    const slider = picture.firstChild;
    slider.setAttribute("aria-valuenow", x);
    slider.setAttribute("aria-valuetext", `${chart.x} ${nameOf(x)}: ${values.filter(Boolean).join(", ")}`);
  };

  const draw = (target, width) => {
    picture = target;
    const values = points.flatMap((point) => point.slice(1)).filter((value) => value !== null);
    let [low, high] = values.length ? extent(values) : [0, 1];
    if (low > 0 && low < high * 0.6) low = 0;
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    [low, high] = [low === 0 ? 0 : low - room, high + room];
    const [first, last] = extent(xs);
    const narrow = width < 420 ? 4 : 7;
    place = scale(first - (last === first), last + (last === first), LEFT + 8, width - RIGHT - 8);
    const height = scale(low, high, HEIGHT - BOTTOM, TOP);
    const x = { place, ticks: chart.names || xs.length <= narrow ? xs : ticks(first, last, narrow) };
    if (chart.x === "step") x.ticks = x.ticks.filter(Number.isInteger);
    const y = { place: height, ticks: ticks(low, high, 5) };
    const lines = chart.series.map((series, i) => {
      const shift = series.points[0] && series.points[0].length > 2 ? (i - (chart.series.length - 1) / 2) * 4 : 0;
      let path = "", open = false;
      const parts = [];
      for (const [at, value, lowest, highest] of series.points) {
        if (value === null) { open = false; continue; }
        path += `${open ? "L" : "M"}${(place(at) + shift).toFixed(1)} ${height(value).toFixed(1)}`;
        open = true;
        if (lowest !== undefined) parts.push(svg("line", { class: `s s${i % 8}`, x1: place(at) + shift, x2: place(at) + shift, y1: height(lowest), y2: height(highest) }));
        if (series.points.length <= 40) parts.push(svg("circle", { class: `d f${i % 8}`, cx: place(at) + shift, cy: height(value), r: 3 }));
      }
      return [svg("path", { class: `s s${i % 8} ${held(series) ? "held" : ""}`, d: path }), parts];
    });
    cross = [svg("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }),
      svg("text", { class: "name", x: width / 2, y: HEIGHT - 6, "text-anchor": "middle" }, chart.x)];
    const drawn = svg("svg", {
      viewBox: `0 0 ${width} ${HEIGHT}`, role: "slider", tabindex: 0, "aria-label": `${chart.title}, over ${chart.x}`,
      "aria-valuemin": first, "aria-valuemax": last, "aria-valuenow": last, "aria-orientation": "horizontal",
    }, axes(width, HEIGHT, x, y, chart.names && chart.names.map((name, i) => (width / chart.names.length < 7.5 * Math.max(...chart.names.map((each) => each.length)) ? String(i + 1) : name))), lines, cross);
    drawn.addEventListener("pointermove", (event) => {
      const box = drawn.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * width;
      cursor.move(xs.reduce((best, each) => (Math.abs(place(each) - at) < Math.abs(place(best) - at) ? each : best)));
    });
    drawn.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      const now = xs.indexOf(xs.reduce((best, each) => (Math.abs(each - cursor.at) < Math.abs(best - cursor.at) ? each : best)));
      cursor.move(xs[Math.min(Math.max(cursor.at === null ? (by > 0 ? 0 : xs.length - 1) : now + by, 0), xs.length - 1)]);
    });
    drawn.addEventListener("focus", () => cursor.move(cursor.at === null ? last : cursor.at));
    target.replaceChildren(drawn);
    if (cursor.at !== null) show(cursor.at);
  };

  cursor.charts.push(show);
  const table = () => {
    const rows = xs.map((x) => [nameOf(x), ...chart.series.map((series) => {
      const point = series.points.find((each) => each[0] === x);
      return point ? shown(point[1]) + (point.length > 2 ? ` [${shown(point[2])}, ${shown(point[3])}]` : "") : "";
    })]);
    return [[chart.x, ...chart.series.map((series) => series.name)], rows];
  };
  const made = figure(chart.title + (chart.y ? ` (${chart.y})` : ""), chart.note, draw, table, "tall");
  made.insertBefore(keys, made.children[1]);
  const names = chart.names && chart.names.map((name, i) => `${i + 1} ${name}`).join(", ");
  if (names) made.insertBefore(element("small", {}, `${chart.x}: ${names}`), made.lastChild);
  return made;
}

// The point of a line at x, or the last one before it that is at most `most` away.
function nearest(points, x, most) {
  let found = null;
  for (const point of points) if (point[0] <= x) found = point;
  return found && x - found[0] <= most ? found : null;
}

function histogram(chart) {
  const draw = (target, width) => {
    const [low, high] = [chart.edges[0], chart.edges[chart.edges.length - 1]];
    const highest = Math.max(1, ...chart.series.flatMap((series) => series.counts));
    const place = scale(low, high, LEFT, width - RIGHT), height = scale(0, highest * 1.05, HEIGHT - BOTTOM, TOP);
    const y = { place: height, ticks: ticks(0, highest, Math.min(5, highest)).filter(Number.isInteger) };
    const x = { place, ticks: ticks(low, high, width < 420 ? 4 : 7) };
    const bars = chart.series.map((series, i) => series.counts.map((count, bin) => {
      const [from, to] = [place(chart.edges[bin]), place(chart.edges[bin + 1])];
      const wide = (to - from - 1) / chart.series.length;
      return count ? svg("rect", { class: `f${i}`, x: from + i * wide + 0.5, width: Math.max(wide, 0.5), y: height(count), height: HEIGHT - BOTTOM - height(count) }) : null;
    }));
    target.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `Histogram: ${chart.title}; ${chart.series.map((series) => series.name).join(", ")}` }, axes(width, HEIGHT, x, y), bars));
  };
  const rows = () => chart.series[0].counts.map((_, bin) => [`${number(chart.edges[bin])} to ${number(chart.edges[bin + 1])}`, ...chart.series.map((series) => series.counts[bin])]);
  const made = figure(chart.title, "pairs in each range", draw, () => [["range", ...chart.series.map((series) => series.name)], rows()], "tall");
  const keys = chart.series.map((series, i) => element("li", {}, svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, svg("rect", { class: `f${i}`, width: 16, height: 10 })), series.name));
  made.insertBefore(element("ul", { class: "keys" }, keys), made.children[1]);
  return made;
}

// Scores with their intervals, a row for each name.
function intervalChart(chart) {
  const draw = (target, width) => {
    const under = width < 520; // the name stands above its interval
    const row = under ? 44 : 30, left = under ? 8 : Math.min(260, 20 + 7.2 * Math.max(...chart.rows.map(([name]) => name.length)));
    const bottom = 24, height = TOP + row * chart.rows.length + bottom;
    const high = Math.min(100, 1.1 * Math.max(1, ...chart.rows.map((each) => each[3])));
    const place = scale(0, high, left, width - 60);
    const grid = ticks(0, high, width < 420 ? 4 : 8).map((value) => [
      svg("line", { class: value ? "grid" : "zero", x1: place(value), x2: place(value), y1: TOP, y2: height - bottom }),
      svg("text", { x: place(value), y: height - bottom + 16, "text-anchor": "middle" }, number(value))]);
    const rows = chart.rows.map(([name, value, low, highest], i) => {
      const at = TOP + row * i + (under ? 30 : row / 2);
      return [svg("text", { class: "name", x: under ? left : left - 10, y: under ? at - 14 : at + 4, "text-anchor": under ? "start" : "end" }, name),
        svg("line", { class: "s s0", x1: place(low), x2: place(highest), y1: at, y2: at }),
        [low, highest].map((edge) => svg("line", { class: "s s0", x1: place(edge), x2: place(edge), y1: at - 5, y2: at + 5 })),
        svg("circle", { class: "d f0", cx: place(value), cy: at, r: 4.5 }),
        svg("text", { class: "name", x: place(highest) + 8, y: at + 4 }, score(value))];
    });
    const label = chart.rows.map(([name, ...of]) => `${name} ${score(of[0])} from ${score(of[1])} to ${score(of[2])}`).join("; ");
    target.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${chart.title}: ${label}` }, grid, rows));
  };
  return figure(chart.title, chart.x, draw, () => [["system", "score", "from", "to"], chart.rows.map(([name, ...of]) => [name, ...of.map(score)])]);
}

function drawCharts(data) {
  for (const target of document.querySelectorAll("[data-charts]")) {
    const found = data[target.dataset.charts];
    if (Array.isArray(found)) {
      target.append(...found.map(histogram));
      continue;
    }
    target.append(...found.intervals.map(intervalChart));
    const cursors = {};
    const cursorOf = (over) => (cursors[over] ??= { at: null, charts: [], move(x) { this.at = x; this.charts.forEach((show) => show(x)); } });
    target.append(...found.charts.map((chart) => lineChart(chart, cursorOf(chart.x))));
  }
}
