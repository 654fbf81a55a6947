"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plots = [];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const HUES = ["one", "two", "three"];
  const DASHES = [[], [8, 4], [2, 3]];
  const LETTER = { info: "i", warning: "!", critical: "!!", adjusted: "a" };
  const number = (value) => (value == null ? "-" : Number(value).toPrecision(4));

  // Alerts and adjustments, in each chart at their step.
  function drawMarks(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.font = `bold ${12 * devicePixelRatio}px sans-serif`;
    ctx.textAlign = "center";
    for (const mark of data.marks) {
      if (mark.step < plot.scales.x.min || mark.step > plot.scales.x.max) continue;
      const x = Math.round(plot.valToPos(mark.step, "x", true));
      ctx.strokeStyle = ctx.fillStyle = color(mark.kind === "adjusted" ? "three" : mark.kind) || color("faint");
      ctx.setLineDash(mark.kind === "critical" ? [] : [3, 4]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(LETTER[mark.kind] || "?", x, bbox.top - 3 * devicePixelRatio);
    }
    ctx.restore();
  }

  function columnsOf(chart) {
    const columns = [chart.steps];
    const series = [{ label: "step" }];
    const bands = [];
    chart.series.forEach((one, i) => {
      const stroke = color(HUES[i % HUES.length]);
      const few = one.values.filter((v) => v != null).length < 80;
      series.push({
        label: one.label, stroke, width: 2, dash: DASHES[i % DASHES.length], spanGaps: true,
        points: { show: few, size: 6, fill: i % 2 ? color("ground") : stroke, stroke },
        value: (plot, value, index, at) => {
          const error = at == null || one.errors == null ? null : one.errors[at];
          return number(value) + (error == null || value == null ? "" : ` ± ${error.toPrecision(2)}`);
        },
      });
      columns.push(positive(one.values, chart.log));
      if (one.errors) {
        const shift = (sign) => one.values.map((v, k) => (v == null ? null : v + sign * (one.errors[k] || 0)));
        for (const sign of [1, -1]) {
          series.push({ label: "", width: 0, points: { show: false }, spanGaps: true, class: "hidden" });
          columns.push(positive(shift(sign), chart.log));
        }
        bands.push({ series: [series.length - 2, series.length - 1], fill: stroke + "33" });
      }
    });
    if (chart.limit != null) {
      series.push({ label: "limit", stroke: color("limit"), width: 2, dash: [12, 5], points: { show: false } });
      columns.push(chart.steps.map(() => chart.limit));
    }
    return { columns, series, bands };
  }

  // A logarithmic axis has no place for zero and below.
  const positive = (values, log) => (log ? values.map((v) => (v > 0 ? v : null)) : values);

  function draw(chart) {
    const place = document.getElementById(`chart-${chart.name}`);
    const { columns, series, bands } = columnsOf(chart);
    const axis = { stroke: color("faint"), grid: { stroke: color("line"), width: 1 }, ticks: { stroke: color("line") } };
    const plot = new uPlot({
      width: place.clientWidth, height: 260, series, bands, padding: [18, 8, 0, 0],
      scales: { x: { time: false }, y: { distr: chart.log ? 3 : 1 } },
      axes: [{ ...axis, label: "optimizer step", labelSize: 20 }, { ...axis, size: 64, values: (p, v) => v.map((x) => (x == null ? "" : String(+x.toPrecision(3)))) }],
      cursor: { sync: { key: "run", scales: ["x", null] }, focus: { prox: 30 } },
      hooks: { draw: [drawMarks] },
    }, columns, place);
    // bands have no place in the legend
    plot.root.querySelectorAll(".u-series.hidden").forEach((row) => row.remove());
    place.addEventListener("keydown", (event) => onKey(event, plot));
    plots.push({ plot, place });
    return plot;
  }

  function onKey(event, plot) {
    const { min, max } = plot.scales.x;
    const middle = (min + max) / 2;
    const wide = max - min;
    const next = {
      "+": [middle - wide / 4, middle + wide / 4], "=": [middle - wide / 4, middle + wide / 4],
      "-": [middle - wide, middle + wide], "0": [whole.min, whole.max],
      ArrowLeft: [min - wide / 4, max - wide / 4], ArrowRight: [min + wide / 4, max + wide / 4],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    for (const one of plots) one.plot.setScale("x", { min: next[0], max: next[1] });
  }

  // The table behind a chart, filled when it is opened.
  function fill(chart) {
    const place = document.getElementById(`table-${chart.name}`);
    place.parentElement.addEventListener("toggle", () => {
      if (place.firstChild) return;
      const table = document.createElement("table");
      const add = (cells, kind) => {
        const row = table.insertRow();
        for (const text of cells) row.appendChild(document.createElement(kind)).textContent = text;
      };
      add(["step", ...chart.series.map((s) => s.label)], "th");
      const every = Math.ceil(chart.steps.length / 300);
      chart.steps.forEach((step, k) => {
        if (k % every) return;
        add([step, ...chart.series.map((s) => number(s.values[k]) + (s.errors && s.errors[k] != null && s.values[k] != null ? ` ± ${s.errors[k].toPrecision(2)}` : ""))], "td");
      });
      place.appendChild(table);
    });
  }

  const ends = data.charts.flatMap((c) => [c.steps[0], c.steps[c.steps.length - 1]]);
  const whole = { min: Math.min(...ends), max: Math.max(...ends) };

  function drawAll() {
    for (const { plot } of plots.splice(0)) plot.destroy();
    data.charts.forEach(draw);
    for (const { plot } of plots) plot.setScale("x", whole);
  }

  data.charts.forEach(fill);
  drawAll();
  addEventListener("resize", () => plots.forEach(({ plot, place }) => plot.setSize({ width: place.clientWidth, height: 260 })));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
