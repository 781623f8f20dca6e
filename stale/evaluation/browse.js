"use strict";
// The browsing page's behaviour. DATA: labels, known (how many of them are under test), threshold, videos.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = {truth: "#404040", found: "#D55E00", mask: "#009E73", score: [0, 114, 178]};
const rows = document.getElementById("rows"), detail = document.getElementById("detail");
const chosenClass = document.getElementById("class"), search = document.getElementById("search");
const state = {key: "ap", falling: false, shown: []};

const make = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const draw = (name, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // text is appended as text: no name can become markup
  return element;
}

const seconds = value => `${Math.floor(value / 60)}:${(value % 60).toFixed(1).padStart(4, "0")}`;
const percent = value => value === null || value === undefined ? "–" : (100 * value).toFixed(1);
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

// AP of the chosen class where one is chosen, else of the video.
const apOf = video => chosenClass.value === "" ? video.ap : video.aps[chosenClass.value];
const KEYS = {
  id: video => video.id,
  duration: video => video.duration,
  instances: video => video.truth.length,
  found: video => video.count,
  ap: apOf,
};

function visible() {
  const text = search.value.trim().toLowerCase(), label = chosenClass.value;
  const names = video => [video.id, ...video.truth.map(item => DATA.labels[item[2]])].join("\n").toLowerCase();
  const wanted = DATA.videos.filter(video =>
    (label === "" || video.truth.some(item => item[2] === Number(label))) && (!text || names(video).includes(text)));
  const value = KEYS[state.key], sign = state.falling ? -1 : 1;
  return wanted.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || x === null || y === undefined || y === null) return (x == null) - (y == null);
    return sign * (x < y ? -1 : x > y ? 1 : 0) || (a.id < b.id ? -1 : 1);
  });
}

function list() {
  state.shown = visible();
  const open = current();
  rows.replaceChildren(...state.shown.map(video => {
    const link = make("a", {href: "#" + encodeURIComponent(video.id)}, video.id);
    const cells = [seconds(video.duration), video.truth.length, video.count, percent(apOf(video))];
    const row = make("tr", {}, make("td", {}, link), ...cells.map(cell => make("td", {}, String(cell))));
    if (open && video.id === open.id) row.setAttribute("aria-current", "true");
    return row;
  }));
  document.getElementById("count").textContent = `${state.shown.length} of ${DATA.videos.length} videos`;
  for (const button of document.querySelectorAll("th button")) {
    const sorted = button.dataset.key === state.key;
    button.parentElement.setAttribute("aria-sort", sorted ? (state.falling ? "descending" : "ascending") : "none");
  }
}

function current() {
  try {
    const id = decodeURIComponent(location.hash.slice(1));
    return DATA.videos.find(video => video.id === id);
  } catch (error) { return undefined; }
}

function show() {
  const video = current();
  list();
  detail.hidden = !video;
  if (!video) return;
  const place = state.shown.findIndex(other => other.id === video.id);
  const step = (name, offset) => {
    const other = place < 0 ? undefined : state.shown[place + offset];
    const button = make("button", {type: "button", id: name.toLowerCase()}, name);
    button.disabled = !other;
    button.addEventListener("click", () => go(other));
    return button;
  };
  const close = make("button", {type: "button"}, "Close");
  close.addEventListener("click", leave);
  detail.replaceChildren(
    make("h2", {}, video.id),
    make("p", {}, `${seconds(video.duration)} long, AP ${percent(video.ap)} %`),
    make("p", {}, step("Previous", -1), " ", step("Next", 1), " ", close),
    timeline(video), table(video));
  detail.focus({preventScroll: true});
  detail.scrollIntoView({block: "nearest"});
}

function go(video) { location.hash = encodeURIComponent(video.id); }

function leave() {
  const video = current();
  history.replaceState(null, "", location.pathname + location.search);
  show();
  const place = video ? state.shown.findIndex(other => other.id === video.id) : -1;
  const link = rows.querySelectorAll("a")[place];
  if (link) link.focus(); else search.focus();
}

// The timeline: for each class its ground truth and detections, the foreground mask, the scores as a heat map.
function timeline(video) {
  const left = 170, width = 800, bar = 16, gap = 8;
  const x = time => left + width * time / video.duration;
  const parts = [];
  let y = 4;
  const name = (text, middle) => parts.push(draw("text", {x: left - 8, y: middle + 4, "text-anchor": "end"}, short(text)));
  const block = (item, top, attributes, label) => parts.push(draw("rect", {
    x: x(item[0]), y: top, width: Math.max(1, x(item[1]) - x(item[0])), height: bar, ...attributes,
  }, draw("title", {}, label)));
  const classes = [...new Set([...video.truth, ...video.found].map(item => item[2]))];
  for (const index of classes) {
    const truth = video.truth.filter(item => item[2] === index), found = packed(video.found, index);
    const label = DATA.labels[index];
    name(label, y + bar / 2);
    for (const item of truth) {
      const look = index < DATA.known ? {fill: COLOURS.truth} : {fill: "url(#other)", stroke: COLOURS.truth};
      block(item, y, look, `ground truth, ${label}, ${seconds(item[0])} to ${seconds(item[1])}`);
    }
    if (truth.length) y += bar + 2;
    for (const row of found) {
      for (const item of row) {
        const look = {fill: COLOURS.found, "fill-opacity": 0.15 + 0.85 * item[3] / (video.found[0][3] || 1), stroke: COLOURS.found};
        block(item, y, look, `detection, ${label}, ${seconds(item[0])} to ${seconds(item[1])}, score ${item[3].toFixed(2)}`);
      }
      y += bar + 2;
    }
    y += gap;
  }
  if (video.mask) y = mask(parts, video, name, left, width, y) + gap;
  for (const [index, text] of video.scores) {
    name(DATA.labels[index], y + bar / 2);
    parts.push(draw("image", {x: left, y, width, height: bar, preserveAspectRatio: "none", class: "heat", href: heat(bytes(text))}));
    parts.push(draw("rect", {x: left, y, width, height: bar, fill: "none", stroke: "#ccc"}));
    y += bar + 2;
  }
  const ticks = Array.from({length: 6}, (_, tick) => tick * video.duration / 5);
  for (const time of ticks) parts.push(draw("text", {x: x(time), y: y + 16, "text-anchor": "middle"}, seconds(time)));
  const hatch = draw("pattern", {id: "other", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)"},
    draw("rect", {width: 6, height: 6, fill: "white"}), draw("rect", {width: 2, height: 6, fill: COLOURS.truth}));
  const about = `Timeline of ${video.id}: the table below holds the same ground truth and detections`;
  return draw("svg", {viewBox: `0 0 ${left + width + 30} ${y + 24}`, role: "img", "aria-label": about}, draw("defs", {}, hatch), ...parts);
}

function mask(parts, video, name, left, width, y) {
  const values = bytes(video.mask), height = 40, step = width / values.length;
  name("foreground mask", y + height / 2);
  const points = [...values].flatMap((value, at) => {
    const level = y + height - height * value / 255;
    return [`${left + at * step},${level}`, `${left + (at + 1) * step},${level}`];
  });
  const area = [`${left},${y + height}`, ...points, `${left + width},${y + height}`].join(" ");
  parts.push(draw("polygon", {points: area, fill: COLOURS.mask, "fill-opacity": 0.5, stroke: COLOURS.mask}));
  const cut = y + height * (1 - DATA.threshold);
  parts.push(draw("line", {x1: left, x2: left + width, y1: cut, y2: cut, stroke: COLOURS.mask, "stroke-dasharray": "5 4"}));
  return y + height;
}

// Detections of a class, best first, in at most four rows without overlap.
function packed(found, index) {
  const result = [];
  for (const item of found.filter(one => one[2] === index)) {
    const free = result.find(row => row.every(other => item[1] <= other[0] || item[0] >= other[1]));
    if (free) free.push(item); else if (result.length < 4) result.push([item]);
  }
  return result;
}

function heat(values) {
  const canvas = make("canvas", {width: values.length, height: 1}), context = canvas.getContext("2d");
  const image = context.createImageData(values.length, 1);
  values.forEach((value, at) => image.data.set([...COLOURS.score, value], 4 * at));
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

const short = text => text.length > 24 ? text.slice(0, 23) + "…" : text;

function table(video) {
  const line = (kind, item) => make("tr", {}, ...[kind, DATA.labels[item[2]], seconds(item[0]), seconds(item[1]),
    item.length > 3 ? item[3].toFixed(3) : ""].map(cell => make("td", {}, cell)));
  const head = make("tr", {}, ...["", "class", "start", "end", "score"].map(cell => make("th", {scope: "col"}, cell)));
  return make("table", {}, make("caption", {}, "Ground truth, and the best detections"), make("thead", {}, head),
    make("tbody", {}, ...video.truth.map(item => line("ground truth", item)), ...video.found.map(item => line("detection", item))));
}

// Keyboard: links and buttons by Tab; arrows walk the list; Escape closes the timeline and returns to its row.
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && current()) return leave();
  const links = [...rows.querySelectorAll("a")], at = links.indexOf(document.activeElement);
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (at < 0 || !step) return;
  event.preventDefault();
  (links[at + step] || links[at]).focus();
});

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    state.falling = state.key === button.dataset.key ? !state.falling : false;
    state.key = button.dataset.key;
    list();
  });
}
const occurring = new Set(DATA.videos.flatMap(video => video.truth.map(item => item[2])));
for (const index of [...occurring].filter(index => index < DATA.known).sort((a, b) => a - b)) {
  chosenClass.append(make("option", {value: index}, DATA.labels[index]));
}
chosenClass.addEventListener("change", list);
search.addEventListener("input", list);
addEventListener("hashchange", show);
show();
