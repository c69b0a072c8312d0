"use strict";
const written = {
  bytes: (v) => { for (const [name, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) if (Math.abs(v) >= size) return (v / size).toFixed(2) + " " + name; return v + " B"; },
  share: (v) => (100 * v).toFixed(1) + "%",
  exp: (v) => v.toExponential(2),
  number: (v) => Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(5))),
};

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (points[middle][0] < x) low = middle + 1; else high = middle; }
  return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
}

function row(mark, text) {
  const line = document.createElement("div");
  if (mark) { const dot = document.createElement("i"); dot.className = "s" + mark; line.append(dot); }
  line.append(text);
  return line;
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector(".canvas"), cross = figure.querySelector(".cross"), tip = figure.querySelector(".tip");
  const [low, high] = chart.x;
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const wanted = low + (high - low) * (event.clientX - box.left) / box.width;
    const longest = chart.series.reduce((a, b) => (b.points.length > a.points.length ? b : a));
    const step = nearest(longest.points, wanted)[0];
    tip.replaceChildren(row(0, "step " + step.toLocaleString("en")));
    for (const series of chart.series) tip.append(row(series.color, series.name + "  " + written[chart.unit](nearest(series.points, step)[1])));
    const at = 100 * (step - low) / (high - low);
    cross.style.left = at + "%";
    tip.style.left = at > 50 ? "auto" : "calc(" + at + "% + 10px)";
    tip.style.right = at > 50 ? "calc(" + (100 - at) + "% + 10px)" : "auto";
    canvas.classList.add("on");
  });
  canvas.addEventListener("pointerleave", () => canvas.classList.remove("on"));
}

if (navigator.clipboard) for (const button of document.querySelectorAll(".commands button")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}
