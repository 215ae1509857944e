"""The look of a report: its style sheet, and the script that shows values under the pointer. Neither knows of a run.

The colours of the lines were sought by computer: any two differ to normal and to colour-blind eyes, and each from its
background. Measured by a test.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #fdfdfc; --line: #e1e0d9; --axis: #b9b8ae; --ink: #0b0b0b; --soft: #52514e;
  --faint: #6f6d68; --mark: #fff1cc; --warn: #b3261e; --ramp-low: #86b6ef; --ramp-high: #0d366b;
  --series-0: #2368ce; --series-1: #df611f; --series-2: #902d83; --series-3: #58582f;
  --series-4: #009ecb; --series-5: #610922; --series-6: #986b7a; --series-7: #41056a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d0d0d; --card: #1a1a19; --line: #2c2c2a; --axis: #4a4a46; --ink: #f5f5f2; --soft: #c3c2b7;
    --faint: #94928b; --mark: #4a3a10; --warn: #f2938c; --ramp-low: #256abf; --ramp-high: #cde2fb;
    --series-0: #4f98f0; --series-1: #ef7a35; --series-2: #cdf036; --series-3: #ab31a1;
    --series-4: #4ce5ff; --series-5: #ac7f9b; --series-6: #73693f; --series-7: #f8b8a5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 40px 0 12px; }
h3 { font-size: 14px; margin: 0 0 8px; overflow-wrap: anywhere; }
p { margin: 4px 0; }
.about + .card { margin-top: 20px; }
.stack { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
bdi { unicode-bidi: isolate; }
.about, .note, small { color: var(--faint); font-size: 13px; font-weight: 400; }
.problem { color: var(--warn); font-size: 14px; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  margin: 0; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); }
.columns { columns: 2 360px; column-gap: 16px; }
.columns .card { break-inside: avoid; margin-bottom: 16px; }
a { color: var(--series-0); }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); margin-top: 20px; }
.tiles .card { padding: 10px 14px; }
.tiles b { display: block; font-size: 22px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 13px; }
.tiles small { display: block; }
figure { position: relative; display: flex; flex-direction: column; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 14px; }
figcaption small { margin-left: 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: -10px 0 14px; padding: 0;
  font-size: 13px; }
.legend li { color: var(--soft); overflow-wrap: anywhere; }
.legend li::before, .swatch { content: ""; display: inline-block; width: 18px; border-top: 3px solid var(--color);
  vertical-align: 4px; margin-right: 6px; }
.legend .dashed::before, .swatch.dashed { border-top-style: dashed; }
.legend .dotted::before, .swatch.dotted { border-top-style: dotted; }
.legend .between::before { display: none; }
svg { overflow: visible; }
figure > svg { display: block; width: calc(100% - 116px); margin: auto 70px 38px 46px; }
svg text { font-size: 12px; fill: var(--faint); font-variant-numeric: tabular-nums; }
svg .y { text-anchor: end; }
svg .x { text-anchor: middle; }
svg .last { fill: var(--ink); font-weight: 600; }
.grid-line { stroke: var(--line); }
.axis { stroke: var(--axis); }
.line { fill: none; stroke: var(--color); stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
.line.dashed { stroke-dasharray: 7 4; }
.line.dotted { stroke-dasharray: 1 4; }
.marker { fill: var(--color); stroke: var(--card); }
.key { fill: var(--color); }
.cursor { stroke: var(--faint); stroke-dasharray: 3 3; visibility: hidden; }
.tip { position: absolute; pointer-events: none; background: var(--card); border: 1px solid var(--axis);
  border-radius: 6px; padding: 6px 10px; font-size: 12px; line-height: 1.45; box-shadow: 0 2px 8px #0003;
  width: max-content; max-width: 45%; overflow-wrap: anywhere; z-index: 1; }
.tip b { font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: left; padding: 3px 16px 3px 0; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); }
tr:last-child > * { border-bottom: 0; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 72px; }
.wide th:first-child { position: sticky; left: 0; min-width: 136px; background: var(--card); overflow-wrap: anywhere; }
.figures :is(th, td):not(:first-child) { text-align: right; padding-right: 0; padding-left: 16px; }
.wide .differs :is(th, td) { background: var(--mark); color: var(--ink); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; margin: 0;
  unicode-bidi: isolate; }
pre i { color: var(--faint); font-style: normal; }
details > summary { cursor: pointer; color: var(--soft); font-size: 13px; margin-top: 10px; }
details pre { margin: 2px 0 10px; }
@media (max-width: 600px) {
  main { padding: 20px 12px 40px; }
  .card, figure { padding: 12px; }
  .tiles { grid-template-columns: 1fr 1fr; }
}
"""

SCRIPT = """
"use strict";
const SHOWN = 10, NEAR = 6;
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return x - points[low][0] < points[high][0] - x ? low : high;
}
let hide = () => {};
for (const svg of document.querySelectorAll("figure > svg")) {
  const span = svg.querySelector(".lines").viewBox.baseVal.width;
  const lines = [...svg.querySelectorAll(".line")].map(path => ({
    label: path.dataset.label,
    look: path.className.baseVal.replace("line", "swatch"),
    color: path.style.getPropertyValue("--color"),
    points: path.getAttribute("d").match(/[-\\d.]+,[-\\d.]+/g).map(p => p.split(",").map(Number)),
    values: path.dataset.values.split(" ").map(v => v.split(":")),
  }));
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y2", "100%");
  svg.append(cursor);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  svg.parentNode.append(tip);
  const hideHere = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
  svg.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") hideHere(); });
  const show = event => {
    const frame = svg.parentNode.getBoundingClientRect(), box = svg.getBoundingClientRect();
    const scale = box.width / span, x = (event.clientX - box.left) / scale, y = event.clientY - box.top;
    const found = lines.map(line => ({ line, index: nearest(line.points, x) }));
    const at = ({ line, index }) => line.points[index];
    const closest = found.reduce((a, b) => Math.abs(at(a)[0] - x) <= Math.abs(at(b)[0] - x) ? a : b);
    const here = at(closest)[0], step = closest.line.values[closest.index][0];
    let rows = found.filter(one => Math.abs(at(one)[0] - here) * scale <= NEAR);
    rows.sort((a, b) => Math.abs(at(a)[1] - y) - Math.abs(at(b)[1] - y));
    rows = rows.slice(0, SHOWN).sort((a, b) => at(a)[1] - at(b)[1]);
    tip.replaceChildren(document.createTextNode("step " + step));
    for (const { line, index } of rows) {
      const [row, swatch, value] = ["div", "span", "b"].map(name => document.createElement(name));
      swatch.className = line.look;
      swatch.style.setProperty("--color", line.color);
      value.textContent = line.values[index][1];
      row.append(swatch, value, " " + line.label);
      tip.append(row);
    }
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, `${100 * here / span}%`);
    if (hide !== hideHere) hide();
    hide = hideHere;
    cursor.style.visibility = "visible";
    tip.hidden = false;
    const left = box.left - frame.left + here * scale, isRight = left > frame.width / 2;
    tip.style.left = isRight ? "auto" : `${left + 12}px`;
    tip.style.right = isRight ? `${frame.width - left + 12}px` : "auto";
    tip.style.top = `${box.top - frame.top + 8}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
}
"""
