"use strict";
// The list of training questions, and the one that is looked at. `#pairs/OUTCOME` filters, `#question/ID` opens, and
// `#find/TEXT` opens the first that holds all words of a text.

function questionList(data) {
  const { rows, total } = data;
  const title = (row) => row.question || row.id;
  const texts = rows.map((row) => searchable(row.id, row.question, ...row.answers,
    ...row.passages.map((passage) => `${passage.title || ""} ${passage.text}`), ...row.candidates.map((c) => `${c.rationale} ${c.answer}`)));
  const numberOf = new Map(rows.map((row, i) => [row.id, i]).reverse());
  const [search, outcome, type] = ["search", "outcome", "type"].map((name) => byId(`pairs-${name}`));
  const names = (values) => [...new Set(values)].filter(Boolean).sort();
  const count = (name) => rows.filter((row) => row.outcome === name).length;
  outcome.append(...Object.keys(data.outcomes).map((name) => element("option", { value: name }, `${name === "pair" ? "has a pair" : name} (${count(name)})`)));
  type.append(...names(rows.map((row) => row.type)).map((name) => element("option", { value: name }, name)));
  type.parentElement.hidden = type.options.length < 3;
  let current = null, visible = [];

  const badge = (row) => element("span", { class: `badge ${{ pair: "good", none: "bad", waiting: "quiet" }[stateOf(row)]}` },
    { pair: "pair", none: `no pair: ${row.outcome}`, waiting: `${row.outcome} yet` }[stateOf(row)]);
  const item = (i) => element("li", {}, element("a", { href: `#question/${encodeURIComponent(rows[i].id)}`, "aria-current": i === current ? "true" : null },
    title(rows[i]), element("small", {}, badge(rows[i]), rows[i].candidates.length ? ` ${rows[i].candidates.filter((c) => c.correct).length} of ${rows[i].candidates.length} correct` : "")));
  const pages = new Pages("pairs", 25, (page) => byId("pairs-list").replaceChildren(...page.map(item)));

  function filter() {
    const has = searcher(search.value);
    visible = rows.map((_, i) => i).filter((i) => (!outcome.value || rows[i].outcome === outcome.value) && (!type.value || rows[i].type === type.value) && has(texts[i]));
    byId("pairs-count").textContent = visible.length
      ? `${visible.length} of ${rows.length} questions`
      : `None of the ${rows.length} questions here holds all these words${rows.length < total ? `; ${total - rows.length} of the run are not on this page` : ""}.`;
    pages.set(visible, current === null ? 0 : Math.floor(Math.max(0, visible.indexOf(current)) / pages.size));
    if (!visible.length) byId("pairs-detail").replaceChildren();
    else if (!visible.includes(current)) open(visible[0], false);
  }

  function open(i, focus) {
    current = i;
    const at = visible.indexOf(i);
    pages.go(at < 0 ? pages.at : Math.floor(at / pages.size));
    byId("pairs-detail").replaceChildren(...questionDetail(rows[i], data, [visible[at - 1], visible[at + 1]].map((other) => (at < 0 || other === undefined ? null : rows[other].id))));
    if (focus) byId("pairs-detail").focus({ preventScroll: true });
  }

  function openAndShow(i) {
    open(i, true);
    const [detail, list] = [byId("pairs-detail"), byId("pairs-filters")];
    (matchMedia("(max-width: 48rem)").matches ? detail : list).scrollIntoView();
  }

  function only(words, reason) {
    [search.value, outcome.value, type.value] = [words, reason, ""];
    current = null;
    filter();
  }

  function follow() {
    const [what, ...rest] = location.hash.slice(1).split("/");
    const name = decoded(rest.join("/"));
    if (what === "question" && numberOf.has(name)) {
      if (!visible.includes(numberOf.get(name))) only("", "");
      openAndShow(numberOf.get(name));
    } else if (what === "find" && name) {
      only(name, "");
      if (visible.length) openAndShow(numberOf.get(name.trim()) ?? visible[0]);
      else byId("pairs").scrollIntoView();
    } else if (what === "pairs" && name) {
      only("", name);
      byId("pairs").scrollIntoView();
    }
  }

  for (const control of [search, outcome, type]) control.addEventListener("input", filter);
  byId("pairs-filters").addEventListener("submit", (event) => event.preventDefault());
  byId("find").addEventListener("submit", (event) => {
    event.preventDefault();
    const hash = `#find/${encodeURIComponent(byId("find-text").value)}`;
    if (location.hash === hash) follow();
    else location.hash = hash;
  });
  addEventListener("hashchange", follow);
  filter();
  if (rows.length) open(Math.max(0, rows.findIndex((row) => row.outcome === "pair")), false);
  follow();
}

const WHY = "Why there is no pair: ";
const stateOf = (row) => (row.outcome === "pair" ? "pair" : row.outcome.startsWith("not ") ? "waiting" : "none");

// A part of an address as text; as it stands where it is no encoded text.
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

// What the candidates answer, each answer once with how often, the most frequent first.
function answersOf(candidates) {
  const counts = new Map();
  for (const answer of candidates.map((c) => c.answer.trim())) counts.set(answer, (counts.get(answer) || 0) + 1);
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  const more = sorted.length > 5 ? `, and ${sorted.length - 4} others` : "";
  return sorted.slice(0, more ? 4 : 5).map(([answer, n]) => `\u201c${answer}\u201d${n > 1 ? ` (${n} times)` : ""}`).join(", ") + more;
}

function questionDetail(row, { outcomes, advice, kind }, [before, after]) {
  const right = row.candidates.filter((c) => c.correct).length;
  const bare = row.candidates.filter((c) => c.bare).length;
  const counts = row.candidates.length ? ` (${right} of ${row.candidates.length} candidates are correct${bare ? `, ${bare} of these may not be chosen` : ""})` : "";
  const dropped = Object.entries(row.dropped);
  const passages = row.passages.map((passage) => element("div", {}));
  const link = (id, text) => (id === null ? null : element("a", { href: `#question/${encodeURIComponent(id)}` }, text));

  // The passages, with the words underlined that a candidate cites.
  const cite = (cited) => row.passages.forEach((passage, i) => passages[i].replaceChildren(element("p", { class: `passage ${passage.gold ? "gold" : ""}` },
    element("strong", {}, `Passage ${i + 1}${passage.title ? `: ${passage.title}` : ""}`), " ",
    passage.gold ? element("span", { class: "badge" }, "gold") : passage.gold === false ? element("span", { class: "badge quiet" }, "not gold") : null,
    passage.cut ? element("span", { class: "badge quiet" }, `${passage.cut} characters cut to fit`) : null,
    "\n", marked(passage.text, row.answers, cited))));

  const order = (c) => (c.chosen ? 0 : c.rejected ? 1 : c.correct ? 2 : 3);
  const shown = row.candidates.map((c, i) => [order(c), i]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, i]) => row.candidates[i]);
  const buttons = [];
  const candidates = shown.map((c) => {
    const button = element("button", { type: "button", "aria-pressed": "false" }, c.cites.length ? `Show its ${c.cites.length} cited ${c.cites.length === 1 ? "word" : "words"} in the passages` : "Cites no word of the passages");
    button.disabled = !c.cites.length;
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      buttons.forEach((other) => other.setAttribute("aria-pressed", "false"));
      button.setAttribute("aria-pressed", String(on));
      cite(on ? c.cites : []);
    });
    buttons.push(button);
    const verdict = c.correct === null ? null : element("span", { class: `badge ${c.correct ? "good" : "bad"}` }, c.correct ? "correct" : "incorrect");
    return element("div", { class: `candidate ${c.chosen ? "chosen" : ""} ${c.rejected ? "rejected" : ""}` },
      element("div", { class: "tags" }, c.chosen ? element("span", { class: "badge good" }, "CHOSEN") : null, c.rejected ? element("span", { class: "badge bad" }, "REJECTED") : null,
        verdict, c.bare ? element("span", { class: "badge bad" }, "may not be chosen: names nothing that the passages say") : null,
        element("span", {}, c.source), c.confidence === null || c.confidence === undefined ? null : element("span", {}, `confidence ${number(c.confidence)}`), c.tokens === null ? null : element("span", {}, `${c.tokens} tokens`)),
      element("p", { class: "text" }, marked(c.rationale, row.answers, c.cites)),
      c.answer ? element("p", {}, element("strong", {}, "Answer: "), marked(c.answer, row.answers, [])) : null,
      row.passages.length ? button : null);
  });
  const first = shown.findIndex((c) => c.chosen && c.cites.length);
  if (first >= 0) buttons[first].setAttribute("aria-pressed", "true");
  cite(first >= 0 ? shown[first].cites : []);

  const confidence = `log-probability${kind === "mean" ? " per token" : ""} on the plain prompt, nearer to 0 is surer`;
  const reasons = row.outcome === "pair" ? [] : [
    row.held === undefined ? null : row.held ? "A passage shown holds a golden answer." : "No passage shown holds a golden answer.",
    row.candidates.length && right < row.candidates.length ? `The candidates answer ${answersOf(row.candidates)}.` : null,
    advice[row.outcome] ? `What to do: ${advice[row.outcome]}` : null,
  ].filter(Boolean);
  return [
    element("p", { class: "pages" }, link(before, "Previous question"), link(after, "Next question")),
    element("h3", {}, row.question || row.id, " ", element("small", {}, row.type ? `${row.type}, ` : "", element("a", { href: `#question/${encodeURIComponent(row.id)}` }, row.id))),
    element("p", {}, element("strong", {}, row.answers.length > 1 ? "Golden answers: " : "Golden answer: "), row.answers.length ? row.answers.join(" | ") : "none known"),
    element("p", { class: `why ${stateOf(row)}` }, element("strong", {}, row.outcome === "pair" ? "Has a pair: " : WHY), `${outcomes[row.outcome]}${counts}.`, reasons.length ? element("small", { class: "more" }, reasons.join(" ")) : null),
    dropped.length ? element("p", { class: "legend" }, `Also sampled, and no candidates: ${dropped.map(([reason, n]) => `${n} ${reason}`).join(", ")}.`) : null,
    row.candidates.length ? element("h4", {}, "Candidates ", element("small", {}, `confidence is the ${confidence}`)) : null,
    candidates,
    row.passages.length ? element("h4", {}, "Passages as the prompt shows them ", element("small", {}, element("mark", {}, "words of the answer"), " ", row.candidates.length ? element("span", { class: "cited" }, "words that the candidate cites") : null)) : null,
    passages,
  ].flat(Infinity).filter(Boolean);
}
