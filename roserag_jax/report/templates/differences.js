"use strict";
// The table of held-out questions that one system gets right and the other wrong, with both completions.

function differencesTable(data) {
  const { rows, systems } = data;
  const [a, b, which, search] = ["a", "b", "which", "search"].map((name) => byId(`differences-${name}`));
  for (const control of [a, b]) control.append(...systems.map((name) => element("option", { value: name }, name)));
  const others = systems.filter((name) => !/^(base|closed_book)(-|$)/.test(name));
  a.value = ["base", ...systems].find((name) => systems.includes(name));
  b.value = ["adapter", ...others, ...systems].find((name) => systems.includes(name) && name !== a.value) || a.value;
  const texts = rows.map((row) => searchable(row.id, row.question, ...row.answers, ...Object.values(row.said).map((said) => said[2])));
  const wanted = {
    a: (one, two) => one && !two, b: (one, two) => two && !one, both: (one, two) => one !== two,
    wrong: (one, two) => !one && !two, all: () => true,
  };
  const said = (row, letter, name) => completion(row, `${letter}, ${name}`, ...row.said[name]);
  const completion = (row, label, em, f1, response, others) => element("td", { class: "said", role: "cell", "data-label": label },
    element("span", { class: `badge ${em ? "good" : "bad"}` }, em ? "right" : "wrong"), " ", element("small", {}, [["F1", f1], ...others].map(([title, value]) => `${title} ${score(100 * value)}`).join(", ")), "\n", marked(response, row.answers, []));
  const pages = new Pages("differences", 10, (page) => byId("differences-table").replaceChildren(
    page.length ? element("div", { class: "scroll", role: "group", tabindex: 0, "aria-label": "Questions with both completions" },
      element("table", { class: "text", role: "table" },
        element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ["question", `A: ${a.value}`, `B: ${b.value}`].map((text) => element("th", { role: "columnheader", scope: "col" }, text)))),
        element("tbody", { role: "rowgroup" }, page.map((row) => element("tr", { role: "row" },
          element("th", { role: "rowheader", scope: "row" }, row.question, element("small", { class: "id" }, "golden: ", element("mark", {}, row.answers.join(" | "))), element("small", { class: "id" }, `${row.type ? `${row.type}, ` : ""}${row.id}`)),
          said(row, "A", a.value), said(row, "B", b.value))))))
      : element("p", { class: "count" }, "No such question.")));

  function filter() {
    const has = searcher(search.value);
    const found = rows.filter((row, i) => row.said[a.value] && row.said[b.value] && wanted[which.value](row.said[a.value][0] > 0, row.said[b.value][0] > 0) && has(texts[i]));
    const counted = (kind) => rows.filter((row) => row.said[a.value] && row.said[b.value] && wanted[kind](row.said[a.value][0] > 0, row.said[b.value][0] > 0)).length;
    byId("differences-count").textContent = `${found.length} questions. ${b.value} right where ${a.value} is wrong: ${counted("b")}; the reverse: ${counted("a")}; both wrong: ${counted("wrong")}.`;
    pages.set(found);
  }

  for (const control of [a, b, which, search]) control.addEventListener("input", filter);
  byId("differences-filters").addEventListener("submit", (event) => event.preventDefault());
  filter();
}
