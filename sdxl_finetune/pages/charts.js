"use strict";
// Draws all charts in the colours of the page, and again when the browser changes between light and dark.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function template() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue("--" + name).trim();
  const scale = color("scale").split(/\s+/).map((one, place, all) => [place / (all.length - 1), one]);
  const axis = { gridcolor: color("grid"), linecolor: color("line"), tickcolor: color("line"), automargin: true,
    title: { standoff: 8, font: { size: 12, color: color("quiet") } } };
  const layout = {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("text") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: [color("first"), color("second")],
    xaxis: axis, yaxis: axis, hovermode: "closest",
    coloraxis: { colorscale: scale, colorbar: { thickness: 10, outlinewidth: 0, len: 0.9 } },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") }, align: "left" },
    shapedefaults: { line: { color: color("quiet") } },
  };
  return { layout, data: { bar: [{ marker: { line: { width: 0 } }, textfont: { size: 11 } }] } };
}

// A trace that names a colour in `meta.color` gets the colour of this name in the page's styles.
function colored(traces) {
  const style = getComputedStyle(document.documentElement);
  return structuredClone(traces).map((trace) => {
    const color = trace.meta?.color && style.getPropertyValue("--" + trace.meta.color).trim();
    return color ? { ...trace, marker: { ...trace.marker, color }, line: { ...trace.line, color } } : trace;
  });
}

function draw() {
  const own = template();
  for (const [name, figure] of Object.entries(figures)) {
    const layout = { ...figure.layout, template: own, autosize: true };
    const options = { responsive: true, displayModeBar: false };
    Plotly.react("chart-" + name, colored(figure.data), layout, options);
  }
  document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
}

draw();
dark.addEventListener("change", draw);
