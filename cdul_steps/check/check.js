"use strict";

const LATER = 10; // number of questions before a surprising answer is checked again
const LOOKS = 9; // largest number of looks at a question
const NORMAL = 1.645; // normal quantile for a 90 % interval
const VALUES = { y: "1", n: "0", u: "unknown" };

let index; // data/index.js
let looks = []; // one entry per look, in order: [question, "y", "n" or "u"]
let kept = true; // whether the browser stores the answers

// A page opened from disk may not use fetch, but it may load scripts: the data file calls part().
function part(value) {
  index = value;
}

const storage = () => `cdul check ${index.id}`;
const keyOf = (question) => [index.questions[question][0], index.classes[index.questions[question][1]]];

/** The answers to each question, one per look. */
function said() {
  const found = new Map();
  for (const [question, answer] of looks) found.set(question, [...(found.get(question) ?? []), answer]);
  return found;
}

/** How far yes is ahead of no. The score of an entry that is not named counts as one no. */
function lead(question, answers) {
  const named = index.questions[question][3];
  return answers.reduce((sum, answer) => sum + (answer === "y" ? 1 : -1), named ? 0 : -1);
}

/** Whether to ask again: if the answer contradicts the score, until one answer leads by two. */
function again(question, answers) {
  if (answers.includes("u") || answers.length >= LOOKS) return false;
  const surprising = (answers[0] === "y") !== index.questions[question][3];
  return surprising && Math.abs(lead(question, answers)) < 2;
}

/** The answer that counts. */
function settled(question, answers) {
  if (answers.includes("u")) return "u";
  const ahead = lead(question, answers);
  if (answers.length >= LOOKS && Math.abs(ahead) < 2) return "u";
  return answers.length === 1 ? answers[0] : ahead > 0 ? "y" : "n";
}

/** The next question; undefined if all are answered. */
function current(found) {
  const last = new Map(looks.map(([question], place) => [question, place]));
  const open = [...found].filter(([question, answers]) => again(question, answers)).map(([q]) => q);
  const due = open.find((question) => looks.length - last.get(question) > LATER);
  if (due !== undefined) return due;
  const fresh = index.questions.findIndex((_, question) => !found.has(question));
  return fresh >= 0 ? fresh : open[0];
}

function keep() {
  const rows = looks.map(([question, answer]) => [...keyOf(question), answer]);
  try {
    localStorage.setItem(storage(), JSON.stringify(rows));
  } catch {
    kept = false;
  }
}

/** The looks stored by the browser, for questions that are still part of the check. */
function remember() {
  const place = new Map(index.questions.map((_, question) => [JSON.stringify(keyOf(question)), question]));
  try {
    const rows = JSON.parse(localStorage.getItem(storage()) ?? "[]");
    looks = rows.map(([id, name, answer]) => [place.get(JSON.stringify([id, name])), answer]);
    looks = looks.filter(([question]) => question !== undefined);
  } catch {
    kept = false;
  }
}

/** The precision so far: Wilson's interval over the entries that the scores name. */
function precision(found) {
  const answers = [...found].filter(([question]) => index.questions[question][3]);
  const told = answers.map((entry) => settled(...entry)).filter((answer) => answer !== "u");
  if (told.length < 12) return "";
  const n = told.length;
  const share = told.filter((answer) => answer === "y").length / n;
  const z = NORMAL ** 2 / n;
  const half = NORMAL * Math.sqrt((share * (1 - share)) / n + z / (4 * n));
  const bounds = [share + z / 2 - half, share + z / 2 + half].map((b) => Math.round((100 * b) / (1 + z)));
  return `; precision so far ${bounds[0]} to ${bounds[1]} %`;
}

function show() {
  const found = said();
  const question = current(found);
  const total = index.questions.length;
  find("progress").max = total;
  find("progress").value = found.size;
  find("status").textContent =
    `${found.size} of ${total}${precision(found)}` +
    (kept ? "" : ". This browser cannot store the answers: download them before you close the page");
  find("back").disabled = looks.length === 0;
  find("download").disabled = looks.length === 0;
  for (const id of ["yes", "no", "unknown"]) find(id).disabled = question === undefined;
  const photograph = find("photograph");
  if (question === undefined) {
    find("question").textContent = "All answered: download the answers";
    photograph.removeAttribute("src");
    photograph.alt = "";
    return;
  }
  const [, name, image] = index.questions[question];
  find("question").textContent = `${found.has(question) ? "Look again: " : ""}${index.classes[name]}?`;
  photograph.src = `images/${image}.webp`;
  photograph.alt = `photograph ${question + 1} of ${total}`;
  const next = index.questions[question + 1];
  if (next) new Image().src = `images/${next[2]}.webp`;
}

function answer(letter) {
  const question = current(said());
  if (question === undefined) return;
  looks.push([question, letter]);
  keep();
  show();
}

function back() {
  if (!looks.pop()) return;
  keep();
  show();
}

function download() {
  const rows = [...said()].map((entry) => [...keyOf(entry[0]), VALUES[settled(...entry)]]);
  saveCsv("answers.csv", rows);
}

function start() {
  document.title = `${index.title}: check`;
  remember();
  find("yes").onclick = () => answer("y");
  find("no").onclick = () => answer("n");
  find("unknown").onclick = () => answer("u");
  find("back").onclick = back;
  find("download").onclick = download;
  document.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const key = event.key.toLowerCase();
    if (key in VALUES) answer(key);
    else if (key === "b" || key === "backspace") back();
    else return;
    event.preventDefault();
  };
  show();
}

const data = Object.assign(document.createElement("script"), { src: "data/index.js" });
data.onload = start;
data.onerror = () => {
  find("question").textContent = "data/index.js cannot be read; draw the check again";
};
document.head.append(data);
