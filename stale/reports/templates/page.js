"use strict";
// Behaviour of the report page: list and timeline of the videos. Names are only ever set as text.
const DATA = JSON.parse(document.getElementById("data").textContent), VIDEOS = DATA.videos, TWO = DATA.steps.length > 1;
const get = id => document.getElementById(id), number = id => Number(get(id).value);
const state = {column: 2, sign: TWO ? -1 : 1, only: "", shown: [], chosen: null}; // sorted by AP or its change
const DRAWN = ["svg", "rect", "path", "line", "text", "title", "polyline"], SVG = "http://www.w3.org/2000/svg";
const hidden = new Set(); // class numbers
const clock = (time, digits = 1, rounded = Number(time.toFixed(digits))) =>
  `${Math.floor(rounded / 60)}:${(rounded % 60).toFixed(digits).padStart(digits ? 3 + digits : 2, "0")}`;

function make(name, attributes = {}, ...children) {
  const element = DRAWN.includes(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function list() {
  const text = get("find").value.trim().toLowerCase(), {column, sign} = state;
  const names = video => [video.cells[0], ...video.truth.map(item => DATA.classes[item[2]])].join("\n").toLowerCase();
  const videos = state.only ? DATA.links[state.only].map(index => VIDEOS[index]) : VIDEOS;
  state.shown = videos.filter(video => names(video).includes(text));
  const compare = ({cells: a}, {cells: b}) => sign * ((a[column] > b[column]) - (a[column] < b[column]));
  if (column >= 0) state.shown.sort(compare);
  get("rows").replaceChildren(...state.shown.map(video => make("tr", {}, ...video.cells.map((cell, i) => make("td", {},
    i ? String(cell) : make("button", {class: "plain", title: cell, "data-video": VIDEOS.indexOf(video)}, cell))))));
  const order = i => (i !== column ? "none" : sign > 0 ? "ascending" : "descending");
  [...get("heads").children].forEach((head, i) => head.setAttribute("aria-sort", order(i)));
  get("count").textContent = `${state.shown.length} of ${VIDEOS.length} videos`;
  choose(state.shown.includes(state.chosen) ? state.chosen : state.shown[0]);
}

function choose(video = null) {
  const row = get("rows").children[state.shown.indexOf(video)], box = get("list");
  get("rows").querySelector("[aria-current]")?.removeAttribute("aria-current");
  row?.setAttribute("aria-current", "true");
  if (row) box.scrollTop = row.offsetTop - box.clientHeight / 2;
  if (video !== state.chosen) {
    get("zoom").value = get("pan").value = 0;
    get("player").hidden = !video?.file;
    if (video?.file) get("player").src = video.file;
    const items = video ? [video.truth, ...video.runs.map(run => run.found)].flat() : [];
    const box = label => ({type: "checkbox", "data-class": label, ...(hidden.has(label) ? {} : {checked: ""})});
    get("toggles").replaceChildren(...[...new Set(items.map(item => item[2]))].map(label =>
      make("label", {}, make("input", box(label)), DATA.classes[label])));
  }
  state.chosen = video;
  draw();
}

function draw() {
  const video = state.chosen, at = number("tiou"), least = DATA.steps.map(steps => steps[number("score")]);
  get("least").textContent = least.join(" / ");
  get("name").textContent = video ? video.cells[0] : "No video.";
  if (!video) return get("timeline").replaceChildren();
  const left = 84, width = Math.max(get("timeline").clientWidth, 260) - left, run = r => (TWO ? ` ${r + 1}` : "");
  const span = video.duration / 2 ** (number("zoom") / 10), from = (video.duration - span) * number("pan") / 1000;
  const x = time => (time - from) / span * width, drawn = [], names = [];
  const middle = item => x((Math.max(item[0], from) + Math.min(item[1], from + span)) / 2);
  let y = 22; // of the row that is drawn
  const name = (text, kind = "") => names.push(make("text", {x: 0, y: y + 12, class: kind}, text));
  const bar = (item, kind, words, opacity) => {
    const low = kind === "wrong", about = `${DATA.classes[item[2]]}, ${clock(item[0])} to ${clock(item[1])}, ${words}`;
    const place = {x: x(item[0]), width: Math.max((item[1] - item[0]) / span * width, 3), y: y + (low ? 5 : 1)};
    const shape = {height: low ? 6 : 14, rx: kind === "right" ? 6 : 0, class: `bar ${kind}`, "fill-opacity": opacity};
    const use = {tabindex: 0, role: "button", "aria-label": about, "data-start": item[0]};
    drawn.push(make("rect", {...place, ...shape, ...use}, make("title", {}, about)));
  };
  const curve = (values, kind, text) => {
    const place = i => x((i + 0.5) / values.length * video.duration), bottom = y + 18;
    const points = [...values].map((level, i) => `${place(i)} ${bottom - parseInt(level, 36) * 0.46}`);
    name(text);
    drawn.push(make("path", {class: kind, d: `M${place(0)} ${bottom}L${points.join("L")}V${bottom}Z`}));
    y += 22;
  };
  const shown = video.runs.map(({found}, r) => found.filter(item => item[3] >= least[r]));
  const instance = item => (Array.isArray(item[5]) ? item[5][at] : item[4][at] === "0" ? item[5] : -1);
  const taken = shown.map(items => new Set(items.map(instance)));
  video.runs.forEach(({curves}, r) => curves[""] && curve(curves[""], "mask", "foreground" + run(r)));
  for (const label of [...get("toggles").querySelectorAll(":checked")].map(box => Number(box.dataset.class))) {
    const own = items => items.filter(item => item[2] === label), ends = new Map(), truth = own(video.truth);
    if (!own(shown.flat()).length && !truth.length) continue;
    name(DATA.classes[label], "name");
    y += 17;
    if (truth.length) name("ground truth");
    for (const item of truth) {
      const index = video.truth.indexOf(item), by = taken.flatMap((set, r) => (set.has(index) ? [r + 1] : []));
      const kind = !by.length ? "missed" : by.length < taken.length ? "half" : "taken";
      bar(item, kind, {missed: "missed", half: `found by run ${by}`, taken: "found"}[kind], kind === "half" ? 0.4 : 1);
      ends.set(index, `M${middle(item)} ${y + 15}`);
    }
    y += truth.length ? 22 : 0;
    shown.forEach((items, r) => {
      const rows = [], top = y; // rows of detections, best first, in which no two overlap
      for (const item of own(items)) {
        const free = rows.find(row => row.every(other => item[1] <= other[0] || item[0] >= other[1])) || [];
        if (!rows.length) name("detections" + run(r));
        if (free.push(item) === 1) rows.push(free);
        y = top + 17 * rows.indexOf(free);
        const end = ends.get(instance(item)), opacity = 0.12 + 0.88 * Math.min(Math.max(item[3], 0), 1);
        bar(item, end ? "right" : "wrong", `score ${item[3]}, ${DATA.kinds[item[4][at]]}`, opacity);
        if (end) drawn.unshift(make("path", {class: "link", d: `${end}L${middle(item)} ${y + 1}`}));
      }
      y = top + 17 * rows.length;
    });
    video.runs.forEach(({curves}, r) => curves[label] && curve(curves[label], "curve", "score" + run(r)));
    y += 6;
  }
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200];
  const step = steps.find(value => span / value <= width / 70) || 14400;
  for (let time = Math.ceil(from / step) * step; time < from + span * 0.97; time += step) {
    drawn.unshift(make("line", {class: "grid", x1: x(time), x2: x(time), y1: 0, y2: y}));
    drawn.push(make("text", {x: x(time) + 3, y: 12}, clock(time, step < 1 ? 1 : 0)));
  }
  const head = make("line", {class: "head", y1: 0, y2: y, transform: "translate(-9)"});
  const inner = make("svg", {x: left, width, height: y}, ...drawn, head);
  get("player").ontimeupdate = () => head.setAttribute("transform", `translate(${x(get("player").currentTime)})`);
  get("timeline").replaceChildren(make("svg", {width: width + left, height: y}, ...names, inner));
}

const move = step => choose(state.shown[state.shown.indexOf(state.chosen) + step] || state.chosen);
get("toggles").onchange = ({target}) => hidden[target.checked ? "delete" : "add"](Number(target.dataset.class));
document.addEventListener("input", ({target}) => (target.id === "find" ? list : draw)());
addEventListener("resize", draw);
document.addEventListener("click", ({target}) => {
  const {column, sign, link, video, start, step} = (target.closest("button, [data-start]") || target).dataset;
  const same = state.column === Number(column), linked = link !== undefined; // an empty link is to all
  if (column) Object.assign(state, {sign: same ? -state.sign : Number(sign), column: Number(column)});
  if (linked) Object.assign(state, {only: link, column: link ? -1 : 2, chosen: null, find: get("find").value = ""});
  if (column || linked) list();
  if (step) move(Number(step));
  if (video) choose(VIDEOS[video]);
  if (link) get("browse").scrollIntoView();
  if (start) get("about").textContent = target.getAttribute("aria-label");
  if (start && state.chosen.file) { get("player").currentTime = Number(start); get("player").play(); }
});
document.addEventListener("keydown", ({key, target, ctrlKey, metaKey, altKey}) => {
  const step = {ArrowLeft: -1, k: -1, ArrowRight: 1, j: 1}[key];
  if (key === "Enter" && target.dataset.start) target.dispatchEvent(new Event("click", {bubbles: true}));
  if (step && !ctrlKey && !metaKey && !altKey && !["INPUT", "SELECT", "VIDEO"].includes(target.tagName)) move(step);
});
list();
