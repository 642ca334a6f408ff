"use strict";

const PER_PAGE = 60;
const ROWS_OF_A_CARD = 3;
const MEANING = {
  Snippets: "Hovering over an image, or focusing it, shows its snippets, each with the name that CLIP scores highest in it and that score, at the temperature of the labels. Enter opens the image with the scores of all classes.",
  Context: "The share of CLIP's score for the whole image that went to context names, and the names with the largest shares. Context names describe what else images may show and get no labels. If a label is missing, find the name that took its place here.",
  "Nothing found": "No class has a score of at least 0.5 or, for the classifier, of at least its threshold.",
  CLIP: "CLIP's label: the pseudo-label at the start of the training. For test images, the label that the same settings give.",
  refined: "The pseudo-label after refinement during training.",
  classifier: "The probability from the trained classifier.",
  Uncertainty: "1 - |2 s - 1| for a score s: 1 if s is 0.5, 0 if s is 0 or 1. If no class is selected, the mean over the classes.",
  "Disagreement, change": "The difference between CLIP's and the classifier's scores, or between a label before and after refinement. If no class is selected, the largest difference over the classes.",
  "Score if no class is selected": "The largest of the image's scores.",
  Corrections: "Open an image to correct its labels. The browser stores your answers. Download them as corrections.csv and name this file as labels.NAME.corrections in the config; it includes earlier corrections, so it can replace the earlier file.",
};
const ANSWERS = { "": "–", 1: "yes", 0: "no", unknown: "unknown" };

// A page opened from disk may not use fetch, but it may load scripts: each data file calls part().
const arrived = new Map();
const loading = new Map();

function part(name, value) {
  arrived.set(name, value);
}

function load(name) {
  if (!loading.has(name)) {
    loading.set(
      name,
      new Promise((resolve, reject) => {
        const script = element("script", { src: `data/${name}.js` });
        script.onload = () => resolve(arrived.get(name));
        script.onerror = () => {
          loading.delete(name);
          script.remove();
          reject(new Error(`data/${name}.js cannot be read; build the gallery again`));
        };
        document.head.append(script);
      }),
    );
  }
  return loading.get(name);
}

/** An element; its children may be text, which is never read as HTML. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const form = find("choice");
const controls = form.elements;
const list = find("images");
const viewer = find("viewer");
const hide = (selector) => document.querySelectorAll(selector).forEach((e) => e.remove());
const shown = (score) => (score < 0 ? "–" : (score / 1000).toFixed(2));

let index; // data/index.js
let order = []; // the selected images, in order
let page = 0;
let latest = 0; // number of the newest request for the list; responses to older requests are ignored
let latestView = 0; // the same for the viewer
let open = 0; // index in `order` of the image in the viewer
let corrections = new Map(); // '["image_id","class"]' to "1", "0", "unknown", or "" if withdrawn
let kept = true; // whether the browser stores the corrections

function failed(error) {
  list.ariaBusy = "false";
  find("status").textContent = error.message;
}

/** The images that match the form, sorted as the form says. */
function choose(columns) {
  const kind = Number(controls.kind.value);
  const limit = (control, empty) =>
    control && control.value !== "" ? Math.round(1000 * control.valueAsNumber) : empty;
  const from = limit(controls.from, 0);
  const to = limit(controls.to, 1000);
  const differ = limit(controls.differ, 0);
  const everything = from <= 0 && to >= 1000;
  const scores = columns.scores[kind];
  const fits = (i) =>
    (everything || (scores[i] >= Math.max(from, 0) && scores[i] <= to)) &&
    (differ <= 0 || columns.disagreement[i] >= differ);
  const chosen = Array.from(scores.keys()).filter(fits);
  const key = {
    uncertainty: columns.uncertainty[kind],
    highest: scores,
    lowest: scores.map((score) => (score < 0 ? -2000 : -score)),
    disagreement: columns.disagreement,
    change: columns.change,
    manifest: null,
  }[controls.sort.value];
  return key ? chosen.sort((a, b) => key[b] - key[a]) : chosen;
}

async function update() {
  const request = ++latest;
  list.ariaBusy = "true";
  const of = controls.class.value;
  const columns = of === "" ? index.any : await load(`class-${of}`);
  if (request !== latest) return;
  order = choose(columns);
  page = 0;
  await show();
}

async function imageAt(place) {
  const number = order[place];
  const images = await load(`page-${Math.floor(number / index.page_size)}`);
  return { ...images[number % index.page_size], number };
}

async function show() {
  const request = ++latest;
  list.ariaBusy = "true";
  const pages = Math.max(1, Math.ceil(order.length / PER_PAGE));
  const first = page * PER_PAGE;
  const places = order.slice(first, first + PER_PAGE).map((_, i) => first + i);
  const images = await Promise.all(places.map(imageAt));
  if (request !== latest) return;
  list.replaceChildren(...images.map((image, i) => card(image, first + i)));
  list.ariaBusy = "false";
  const count = `${order.length.toLocaleString("en")} of ${index.images.toLocaleString("en")} images`;
  find("status").textContent = order.length
    ? `${count}, page ${page + 1} of ${pages}`
    : `${count}: widen the score range, or reset`;
  find("previous").disabled = page === 0;
  find("next").disabled = page + 1 >= pages;
}

function turn(step) {
  page += step;
  show().then(() => find("images").scrollIntoView({ block: "nearest" }), failed);
}

/** The image with its snippets on top, each with its top class and that class's score. */
function picture(image) {
  const grid = element("span", { className: "grid" });
  image.boxes.forEach(([left, top, width, height], i) => {
    const name = element("b", {}, index.names[image.top[i + 1]]);
    const score = element("span", {}, ` ${shown(image.top_scores[i + 1])}`);
    const cell = element("span", { className: "snippet" }, name, score);
    Object.assign(cell.style, {
      left: `${left / 10}%`,
      top: `${top / 10}%`,
      width: `${width / 10}%`,
      height: `${height / 10}%`,
    });
    grid.append(cell);
  });
  const whole = element("span", { className: "picture" }, grid);
  const [width, height] = image.size;
  whole.style.setProperty("--ratio", width / height);
  if (image.thumbnail) {
    const source = `thumbnails/${image.number}.webp`;
    whole.prepend(element("img", { loading: "lazy", decoding: "async", alt: "", src: source }));
  } else {
    whole.prepend(element("span", { className: "absent" }, "image file cannot be read"));
  }
  return whole;
}

const storage = () => `cdul gallery ${index.title} ${index.split}`;
const entry = (image, c) => JSON.stringify([image.id, index.classes[c]]);

/** The corrections that the labels were made with, then those that the browser has stored. */
function remember() {
  corrections = new Map((index.corrections ?? []).map(([id, name, value]) => [JSON.stringify([id, name]), value]));
  try {
    for (const [key, value] of JSON.parse(localStorage.getItem(storage()) ?? "[]")) corrections.set(key, value);
  } catch {
    kept = false;
  }
}

function correct(image, c, value) {
  corrections.set(entry(image, c), value);
  try {
    localStorage.setItem(storage(), JSON.stringify([...corrections]));
  } catch {
    kept = false;
  }
  countCorrections();
}

const corrected = () => [...corrections].filter(([, value]) => value !== "");

function countCorrections() {
  const count = corrected().length;
  find("download").hidden = count === 0;
  find("download").textContent =
    `Download corrections (${count})` + (kept ? "" : "; this browser cannot store them");
}

const download = () =>
  saveCsv("corrections.csv", corrected().map(([key, value]) => [...JSON.parse(key), value]));

/** A choice of the right answer for a class of an image. */
function correction(image, c) {
  const choice = element("select", { ariaLabel: `correct ${index.classes[c]}` });
  for (const [value, text] of Object.entries(ANSWERS)) choice.append(element("option", { value }, text));
  choice.value = corrections.get(entry(image, c)) ?? "";
  choice.onchange = () => {
    correct(image, c, choice.value);
    // The button stays, since the focus returns to it.
    const button = list.children[open - page * PER_PAGE]?.firstChild;
    const fresh = card(image, open).firstChild;
    button?.replaceChildren(...fresh.childNodes);
    button?.setAttribute("aria-label", fresh.ariaLabel);
  };
  return element("td", {}, choice);
}

/** The corrections of an image in words. */
function correctionText(image) {
  const lines = index.classes
    .map((name, c) => [name, corrections.get(entry(image, c))])
    .filter(([, value]) => value)
    .map(([name, value]) => `${name} ${ANSWERS[value]}`);
  return lines.length ? `corrected: ${lines.join(", ")}` : "";
}

const isTrue = (image, c) => controls.truth?.checked && image.positive?.includes(c);

function truthText(image) {
  if (!controls.truth?.checked) return "";
  if (!image.positive) return "truth unknown";
  const names = image.positive.map((c) => index.classes[c]);
  const hard = image.difficult.map((c) => `${index.classes[c]} (difficult)`);
  return `truth: ${[...names, ...hard].join(", ") || "none of the classes"}`;
}

/** Whether no class of an image reaches its threshold with any kind of score. */
const isEmpty = (image) =>
  image.scores.every((kind, k) => kind.every((score, c) => score < index.thresholds[k][c]));

/** The share of an image that went to context, and the names it went to. */
function contextText(image, count) {
  if (index.names.length === index.classes.length || image.context < 0) return "";
  const names = image.context_top
    .slice(0, count)
    .map((name, i) => `${index.names[name]} ${shown(image.context_scores[i])}`);
  return `context ${shown(image.context)}: ${names.join(", ")}`;
}

/** Remarks on an image in addition to its scores, by the names of their styles. */
function remarks(image, count) {
  const lines = {
    empty: isEmpty(image) ? "nothing found" : "",
    context: contextText(image, count),
    truth: truthText(image),
    corrected: correctionText(image),
  };
  return Object.entries(lines).filter(([, line]) => line);
}

/** Classes of an image by their largest score. */
function ranked(image) {
  const best = index.classes.map((_, c) => Math.max(...image.scores.map((kind) => kind[c])));
  return Array.from(best.keys()).sort((a, b) => best[b] - best[a]);
}

function card(image, place) {
  const of = controls.class.value;
  const classes = of === "" ? ranked(image).slice(0, ROWS_OF_A_CARD) : [Number(of)];
  const table = element("span", { className: "scores" });
  table.style.setProperty("--kinds", index.kinds.length);
  table.append(element("span", { className: "class" }), ...index.kinds.map((kind) => element("i", {}, kind)));
  const words = [];
  for (const c of classes) {
    const values = image.scores.map((kind) => shown(kind[c]));
    const name = `${isTrue(image, c) ? "✓ " : ""}${index.classes[c]}`;
    const label = element("span", { className: "class" }, name);
    table.append(label, ...values.map((value) => element("span", {}, value)));
    words.push(`${name} ${values.map((value, k) => `${index.kinds[k]} ${value}`).join(", ")}`);
  }
  const lines = remarks(image, 1);
  const whole = picture(image);
  whole.querySelector(".grid").setAttribute("aria-hidden", "true");
  const button = element(
    "button",
    { type: "button", className: "card" },
    element("span", { className: "box" }, whole),
    element("span", { className: "name", title: image.id }, image.id),
    table,
    ...lines.map(([name, line]) => element("span", { className: `remark ${name}` }, line)),
  );
  const spoken = lines.map(([, line]) => line);
  button.setAttribute("aria-label", [image.id, ...words, ...spoken].join("; "));
  button.onclick = () => view(place).catch(failed);
  return element("li", {}, button);
}

async function view(place) {
  const request = ++latestView;
  const image = await imageAt(place);
  if (request !== latestView) return;
  open = place;
  find("viewer-title").textContent = image.id;
  const head = element("tr", {}, element("th", { scope: "col", className: "class" }, "class"));
  head.append(...index.kinds.map((kind) => element("th", { scope: "col" }, kind)));
  if (index.corrections) head.append(element("th", { scope: "col", className: "correct" }, "correct"));
  const rows = ranked(image).map((c) => {
    const name = element("th", { scope: "row" }, `${isTrue(image, c) ? "✓ " : ""}${index.classes[c]}`);
    const cells = image.scores.map((kind) => {
      const cell = element("td", {}, shown(kind[c]));
      cell.style.setProperty("--score", `${Math.max(kind[c], 0) / 10}%`);
      return cell;
    });
    return element("tr", {}, name, ...cells, ...(index.corrections ? [correction(image, c)] : []));
  });
  const caption = element("caption", {}, "Scores");
  const table = element("table", {}, caption, element("thead", {}, head), element("tbody", {}, ...rows));
  const [width, height] = image.size;
  find("viewer-body").replaceChildren(
    element(
      "div",
      {},
      element("span", { className: "box" }, picture(image)),
      element("p", {}, image.top.length ? `CLIP, whole image: ${index.names[image.top[0]]} ${shown(image.top_scores[0])}` : ""),
      ...remarks(image).map(([name, line]) => element("p", { className: `remark ${name}` }, line)),
      // An image in an archive has no file to open.
      element("p", {}, image.link ? element("a", { href: image.link }, "Original") : "", ` ${width} × ${height} pixels`),
    ),
    table,
  );
  find("before").disabled = place === 0;
  find("after").disabled = place + 1 >= order.length;
  if (!viewer.open) viewer.showModal();
}

function step(by) {
  if (open + by >= 0 && open + by < order.length) view(open + by).catch(failed);
}

function moveInList(event) {
  const cards = [...list.querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement);
  const columns = cards.filter((c) => c.offsetTop === cards[0].offsetTop).length;
  const to = {
    ArrowRight: at + 1,
    ArrowLeft: at - 1,
    ArrowDown: at + columns,
    ArrowUp: at - columns,
    Home: 0,
    End: cards.length - 1,
  }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  cards[to]?.focus();
}

async function start() {
  index = await load("index");
  document.title = `${index.title}: gallery`;
  find("title").textContent = index.title;
  find("subtitle").textContent = `Split ${index.split}, ${index.classes.length} classes`;
  const has = (kind) => index.kinds.includes(kind);
  if (!has("classifier") || !has("CLIP")) hide(".needs-classifier");
  if (!has("refined") || !has("CLIP")) hide(".needs-refined");
  if (!index.truth) hide(".needs-truth");
  controls.class.append(element("option", { value: "" }, "any"));
  controls.class.append(...index.classes.map((name, c) => element("option", { value: c }, name)));
  controls.kind.append(...index.kinds.map((name, k) => element("option", { value: k }, name)));
  const made = Object.entries(index.labels).map(([name, value]) => `${name} ${value}`);
  for (const [term, text] of Object.entries(MEANING)) {
    if (["CLIP", "refined", "classifier"].includes(term) && !has(term)) continue;
    if (term === "Corrections" && !index.corrections) continue;
    if (term === "Context" && index.names.length === index.classes.length) continue;
    const more = term === "CLIP" ? ` Made with: ${made.join("; ")}.` : "";
    find("meaning").append(element("dt", {}, term), element("dd", {}, text + more));
  }
  const changed = (event) => (event.target === controls.truth ? show() : update()).catch(failed);
  form.onchange = changed;
  form.oninput = (event) => event.target.type === "number" && changed(event);
  form.onreset = () => setTimeout(() => update().catch(failed)); // once the fields are reset
  form.onsubmit = (event) => event.preventDefault();
  find("previous").onclick = () => turn(-1);
  find("next").onclick = () => turn(1);
  find("before").onclick = () => step(-1);
  find("after").onclick = () => step(1);
  find("close").onclick = () => viewer.close();
  list.onkeydown = moveInList;
  viewer.onkeydown = (event) => {
    // The arrow keys choose in a list of answers.
    if (event.target.tagName !== "SELECT") step({ ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? NaN);
  };
  find("download").onclick = download;
  remember();
  countCorrections();
  await update();
}

start().catch(failed);
