"use strict";
// Elements made from data. Texts become text nodes, so nothing in them is ever markup.

function make(namespace, tag, attributes, children) {
  const made = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}
const element = (tag, attributes, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);
const byId = (id) => document.getElementById(id);

// The data of a script element; large ones are gzip in base64.
async function read(id) {
  const node = byId(id);
  if (node.dataset.encoded !== "gzip") return JSON.parse(node.textContent);
  const bytes = Uint8Array.from(atob(node.textContent.trim()), (character) => character.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(unpacked).text());
}

function dataTable(title, header, rows) {
  const cell = (tag, scope) => (text) => element(tag, { scope }, text === null || text === undefined ? "" : String(text));
  return element("div", { class: "scroll", role: "group", tabindex: 0, "aria-label": `${title}, as a table` },
    element("table", {},
      element("thead", {}, element("tr", {}, header.map(cell("th", "col")))),
      element("tbody", {}, rows.map(([first, ...rest]) => element("tr", {}, cell("th", "row")(first), rest.map(cell("td")))))));
}

// A list shown a page at a time: `show(rows)` gets those of the page.
class Pages {
  constructor(prefix, size, show) {
    Object.assign(this, { size, show, rows: [], at: 0, label: byId(`${prefix}-page`) });
    this.buttons = [byId(`${prefix}-before`), byId(`${prefix}-after`)];
    this.buttons.forEach((button, i) => button.addEventListener("click", () => this.go(this.at + (i ? 1 : -1))));
  }
  set(rows, at = 0) {
    this.rows = rows;
    this.go(at);
  }
  go(at) {
    const last = Math.max(0, Math.ceil(this.rows.length / this.size) - 1);
    this.at = Math.min(Math.max(at, 0), last);
    this.show(this.rows.slice(this.at * this.size, (this.at + 1) * this.size));
    this.label.textContent = last ? `Page ${this.at + 1} of ${last + 1}` : "";
    this.buttons[0].disabled = this.at === 0;
    this.buttons[1].disabled = this.at === last;
    for (const button of this.buttons) button.hidden = last === 0;
  }
}

// Words are found in any letter case; between the words of an answer anything but letters and digits may stand.
const WORD = /[\p{L}\p{M}\p{N}]+/gu;
const UNSPACED = /^[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}]/u;

function pattern(texts) {
  const parts = texts.map((text) => (text.normalize("NFKC").match(WORD) || []).join("[^\\p{L}\\p{N}]+")).filter(Boolean);
  parts.sort((a, b) => b.length - a.length);
  const whole = (part) => (UNSPACED.test(part) ? part : `(?<![\\p{L}\\p{N}])${part}(?![\\p{L}\\p{N}])`);
  return parts.length ? parts.map(whole).join("|") : null;
}

// A text as nodes, with the words of the answers marked and the cited ones underlined.
function marked(text, answers, cited) {
  const [first, second] = [pattern(answers), pattern(cited)];
  if (!first && !second) return [text];
  const finder = new RegExp([first && `(?<answer>${first})`, second && `(?<cited>${second})`].filter(Boolean).join("|"), "giu");
  const nodes = [];
  let behind = 0;
  for (const found of text.matchAll(finder)) {
    nodes.push(text.slice(behind, found.index));
    nodes.push(found.groups.answer ? element("mark", {}, found[0]) : element("span", { class: "cited" }, found[0]));
    behind = found.index + found[0].length;
  }
  return [...nodes, text.slice(behind)];
}

// Whether all words that are searched for are in a text.
function searcher(query) {
  const wanted = query.normalize("NFKC").toLowerCase().split(/\s+/).filter(Boolean);
  return (text) => wanted.every((word) => text.includes(word));
}
const searchable = (...texts) => texts.join("\n").normalize("NFKC").toLowerCase();
