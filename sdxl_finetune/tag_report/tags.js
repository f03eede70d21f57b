"use strict";
// Search, filters, sorting and details of the table of tags. Without this script the table shows all rows.
const START = 50;
const SVG = "http://www.w3.org/2000/svg";
const table = document.getElementById("table");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const search = document.getElementById("search");
const chips = [...document.querySelectorAll(".chip")];
const curves = JSON.parse(document.getElementById("curves").textContent);
const percent = (share) => (Math.round(share * 1000) / 10 || 0).toFixed(1).replace("-", "−");
const normal = (text) => text.toLowerCase().replaceAll("_", " ");
const isOn = (chip) => chip.getAttribute("aria-pressed") === "true";
const order = new Intl.Collator(undefined, { numeric: true });
const rows = [...body.rows].map((row) => ({
  row, text: normal(row.cells[0].textContent), state: row.dataset.state, place: Number(row.dataset.place),
  values: [...row.cells].map((cell) => (cell.dataset.value ? Number(cell.dataset.value) : null)),
}));
let sorted = 1, direction = 1, limit = START;

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function compare(a, b) {
  if (sorted === 0) return direction * order.compare(a.text, b.text);
  const first = a.values[sorted], second = b.values[sorted];
  if (first === null || second === null) return (first === null) - (second === null) || a.place - b.place;
  return direction * (first - second) || a.place - b.place;
}

function show() {
  const words = normal(search.value).split(/\s+/).filter(Boolean);
  const states = new Set(chips.filter((chip) => isOn(chip)).map((chip) => chip.dataset.state));
  const found = rows.filter((one) => states.has(one.state) && words.every((word) => one.text.includes(word)));
  const visible = found.sort(compare).slice(0, limit);
  body.replaceChildren(...visible.flatMap((one) => (one.detail ? [one.row, one.detail] : [one.row])));
  const count = (number) => number.toLocaleString("en");
  const total = found.length === rows.length ? "" : ` (${count(rows.length)} in all)`;
  const tags = found.length === 1 ? "tag" : "tags";
  document.getElementById("matches").textContent = visible.length < found.length
    ? `${count(visible.length)} of ${count(found.length)} ${tags}${total}` : `${count(found.length)} ${tags}${total}`;
  document.getElementById("more").hidden = visible.length === found.length;
}

function sortBy(column) {
  // Figures begin with the highest value, names and states with the first.
  direction = column === sorted ? -direction : column > 1 ? -1 : 1;
  sorted = column;
  heads.forEach((head, place) => {
    if (place === column) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
  show();
}

function curve(title, values, baseline) {
  const known = values.filter((value) => value !== null);
  const low = Math.min(0, ...known), high = Math.max(0.01, baseline ?? 0, ...known);
  const x = (place) => (place / (values.length - 1)) * 256 + 2;
  const y = (value) => 60 - ((value - low) / (high - low)) * 56;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 260 64");
  svg.setAttribute("role", "img");
  const add = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    svg.append(made);
  };
  const level = y(baseline ?? 0);
  add("line", { class: "baseline", x1: 0, x2: 260, y1: level, y2: level });
  const points = values.flatMap((value, place) => (value === null ? [] : [`${x(place)},${y(value)}`]));
  add("polyline", { class: "curve", points: points.join(" ") });
  const text = `${title}: ${percent(known[0])} % to ${percent(known.at(-1))} %`;
  svg.setAttribute("aria-label", text);
  return element("figure", {}, svg, element("figcaption", {}, text));
}

function detailOf({ row, place, values }) {
  const { images, held, exposures, base, last, repeats } = row.dataset;
  const changes = (pair, since) => {
    const [gain, accuracy] = pair.split(" ");
    return gain === "–" && accuracy === "–" ? [] : [`since the ${since}: gain ${gain}, accuracy ${accuracy} points`];
  };
  const facts = [
    `measured on ${images} ${images === "1" ? "image" : "images"}${held === "0" ? "" : `, ${held} of them held out`}`,
    ...(exposures === undefined ? [] : [`seen ${Number(exposures).toLocaleString("en")} times in training`]),
    ...changes(last, "last report"), ...changes(base, "base model"),
    ...(repeats === undefined ? [] : [`suggested repeats: ${repeats}`]),
  ];
  const cell = element("td", { class: "detail", colspan: heads.length }, element("p", {}, facts.join("; ") + "."));
  if (curves.steps.length > 1) {
    const chance = Number(row.querySelector(".bar").style.getPropertyValue("--chance"));
    cell.append(element("div", { class: "curves" }, curve("gain", curves.gain[place]),
      curve("accuracy", curves.accuracy[place], chance)));
  }
  if (document.getElementById("tag-" + place)) {
    cell.append(element("p", {}, element("a", { href: "#tag-" + place }, "Pictures")));
  }
  return element("tr", {}, cell);
}

function toggle(one, button) {
  one.detail = one.detail ? null : detailOf(one);
  button.setAttribute("aria-expanded", String(Boolean(one.detail)));
  if (one.detail) one.row.after(one.detail);
  else one.row.nextElementSibling.remove();
}

heads.forEach((head, place) => {
  const button = element("button", { type: "button" }, ...head.childNodes);
  button.addEventListener("click", () => sortBy(place));
  head.replaceChildren(button);
});
for (const one of rows) {
  const button = element("button", { type: "button", "aria-expanded": "false" }, ...one.row.cells[0].childNodes);
  button.addEventListener("click", () => toggle(one, button));
  one.row.cells[0].replaceChildren(button);
}
body.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || !event.target.matches("th button")) return;
  const buttons = [...body.querySelectorAll("th button")];
  buttons[buttons.indexOf(event.target) + step]?.focus();
  event.preventDefault();
});
for (const chip of chips) {
  chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", String(!isOn(chip)));
    limit = START;
    show();
  });
}
search.addEventListener("input", () => {
  limit = START;
  show();
});
document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
for (const button of document.querySelectorAll("#more button")) {
  button.addEventListener("click", () => {
    limit = button.dataset.rows === "all" ? Infinity : limit + Number(button.dataset.rows);
    show();
  });
}
document.getElementById("filters").hidden = false;
show();
