// Asks the models of this server the same question, side by side. All text is set as text, never as HTML.

const $ = (id) => document.getElementById(id);
let asking = null; // what stops the question that is being answered

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function failure(reply) {
  if (reply.status === 401) $("key-field").hidden = false;
  const body = await reply.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answers ${reply.status}`);
}

function report(error) {
  $("problem").textContent = error ? `${error.message}.` : "";
  $("problem").hidden = !error;
}

// The models to ask: those that retrieve, or all where there is no corpus.
async function modelsToAsk() {
  const reply = await fetch("v1/models", { headers: headers() });
  if (!reply.ok) throw await failure(reply);
  const { data } = await reply.json();
  const retrieving = data.filter((model) => model.roserag.retrieves);
  $("about").textContent = retrieving.length
    ? "Ask a question of the corpus; each model answers from the same passages."
    : "No corpus is served: the models answer by themselves.";
  return retrieving.length ? retrieving : data;
}

// The objects of a stream of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

// Text in which "Passage 2" leads to that passage.
function withLinks(text) {
  return text.split(/(Passage \d+)/).map((piece, i) => {
    const number = i % 2 && piece.slice(8);
    if (!number || !$(`passage-${number}`)) return piece;
    const link = document.createElement("a");
    link.href = `#passage-${number}`;
    link.textContent = piece;
    return link;
  });
}

function showPassages({ passages, cut_tokens: cut }) {
  $("found").hidden = false;
  $("found-note").textContent =
    (passages.length ? "Numbered as in the prompt." : "Nothing was found for this question.") +
    (cut ? ` They were cut by ${cut} tokens to fit the prompt.` : "");
  $("passages").replaceChildren(
    ...passages.map((passage) => {
      const item = document.createElement("li");
      item.id = `passage-${passage.number}`;
      const add = (tag, text, name) => {
        const part = document.createElement(tag);
        part.textContent = text;
        part.className = name ?? "";
        item.append(part);
      };
      add("h3", `${passage.number}. ${passage.title}`);
      const score = passage.score === undefined ? [] : [`score ${passage.score.toFixed(2)}`];
      const place = [...(passage.place ? [passage.place] : []), ...score].join(" · ");
      if (place) add("div", place, "place");
      add("p", passage.text);
      return item;
    }),
  );
}

function addColumn(model) {
  const column = $("column").content.cloneNode(true).firstElementChild;
  column.dataset.model = model.id;
  column.querySelector(".name").textContent = model.id;
  column.querySelector(".description").textContent = model.roserag.description;
  $("columns").append(column);
  const part = (name) => column.querySelector(name);
  let text = "";
  return {
    state: (words, failed = false) => {
      part(".state").textContent = words;
      part(".state").classList.toggle("failed", failed);
    },
    add: (more) => {
      text += more;
      part(".text").replaceChildren(...withLinks(text));
    },
    end: ({ answer, tokens_per_second: rate, waited_seconds: waited, seconds }, reason, tokens) => {
      part(".answer").hidden = answer === undefined;
      part(".answer span").textContent = answer || "(none)";
      const cut = reason === "length" ? ", cut at the limit" : "";
      part(".state").textContent =
        `${tokens} tokens in ${seconds.toFixed(1)} s${cut}: ${rate ?? 0} tokens/s` +
        (waited >= 0.1 ? `, after a wait of ${waited.toFixed(1)} s` : "");
    },
  };
}

async function ask(model, request, signal) {
  const column = addColumn(model);
  column.state("Waiting for the first words.");
  try {
    const body = JSON.stringify({ ...request, model: model.id });
    const reply = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body, signal });
    if (!reply.ok) throw await failure(reply);
    let last = null;
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.roserag?.passages) showPassages(event.roserag);
      const [choice] = event.choices;
      if (choice?.delta.content) {
        column.state("Answering.");
        column.add(choice.delta.content);
      }
      if (choice?.finish_reason) last = choice;
      if (event.usage) column.end(last.roserag, last.finish_reason, event.usage.completion_tokens);
    }
    if (!last) throw new Error("the connection was lost");
  } catch (error) {
    column.state(error.name === "AbortError" ? "Stopped." : `${error.message}.`, error.name !== "AbortError");
  }
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  asking?.abort();
  const mine = (asking = new AbortController());
  $("stop").disabled = false;
  $("columns").replaceChildren();
  $("found").hidden = true;
  report(null);
  const request = {
    messages: [{ role: "user", content: $("question").value }],
    temperature: $("temperature").valueAsNumber,
    max_tokens: $("tokens").valueAsNumber,
    seed: $("seed").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  try {
    const models = await modelsToAsk();
    if (mine === asking) await Promise.all(models.map((model) => ask(model, request, mine.signal)));
  } catch (error) {
    report(error);
  }
  if (mine === asking) $("stop").disabled = true;
});

$("stop").addEventListener("click", () => asking?.abort());

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});

modelsToAsk().catch((error) => {
  $("about").textContent = "";
  report(error);
});
