// The chat page: asks the endpoint that served it, and nobody else. The conversation lives in this tab and survives a reload.

const find = (id) => document.getElementById(id);
const [talk, text, model, key, keyDialog] = ["talk", "text", "model", "key", "key-dialog"].map(find);
const kept = (name, otherwise) => JSON.parse(sessionStorage.getItem(name) ?? JSON.stringify(otherwise));
const keep = (name, value) => sessionStorage.setItem(name, JSON.stringify(value));

// {role, content} as the endpoint takes them; of an answer also `by`, the version that spoke, its `id`, and what was said of it: `opinion`.
let turns = kept("turns", []);
let answering = null; // the AbortController of the answer that is coming

function headers() {
  const secret = kept("key", "");
  return { "Content-Type": "application/json", ...(secret && { Authorization: `Bearer ${secret}` }) };
}

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers() });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Refused(answer.status, told?.error?.message ?? `the endpoint answered ${answer.status}`);
}

function show(role, content, by = "") {
  find("welcome").hidden = true;
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  const words = document.createElement("span");
  words.textContent = content;
  const note = document.createElement("small");
  note.textContent = by;
  turn.append(words, note);
  talk.append(turn);
  turn.scrollIntoView({ block: "end" });
  return { turn, words, note };
}

function complain(error) {
  // What `fetch` throws where the endpoint has gone has no words for people.
  show("bad", error instanceof TypeError ? "The connection broke. Ask again in a moment." : error.message);
  if (error.status === 401) openKey();
}

function openKey() {
  key.value = kept("key", "");
  keyDialog.showModal();
}

async function showConsent() {
  try {
    const { consent, max_letters } = await (await request("page.json")).json();
    find("consent").textContent = consent ?? "";
    find("consent").hidden = !consent;
    const fields = [find("opinion").content, talk].flatMap((place) => [...place.querySelectorAll(".words textarea")]);
    fields.forEach((field) => (field.maxLength = max_letters));
  } catch (error) {
    complain(error);
  }
}

async function listModels() {
  try {
    const { data } = await (await request("v1/models")).json();
    const chosen = kept("model", "");
    model.replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    // A chatbot's live version is what people come for: the first name that has versions.
    const live = data.findIndex(({ id }) => data.some((other) => other.id.startsWith(`${id}:`)));
    if (!data.some(({ id }) => id === chosen)) model.selectedIndex = Math.max(0, live);
  } catch (error) {
    complain(error);
  }
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function ask(question) {
  const mine = turns; // another conversation may begin before this answer has ended
  mine.push({ role: "user", content: question });
  show("user", question);
  const { words, note } = show("assistant", "");
  const said = { role: "assistant", content: "", by: "", id: "" };
  const stopper = (answering = new AbortController());
  busy(true);
  try {
    const messages = mine.map(({ role, content }) => ({ role, content }));
    const body = JSON.stringify({ model: model.value, messages, stream: true });
    const answer = await request("v1/chat/completions", { method: "POST", body, signal: stopper.signal });
    said.by = note.textContent = answer.headers.get("x-tandem-model") ?? "";
    for await (const event of events(answer)) {
      stopper.signal.throwIfAborted(); // what has come already is not shown after a stop
      if (event.error) throw new Refused(500, event.error.message);
      said.id ||= event.id;
      said.content += event.choices?.[0]?.delta?.content ?? "";
      words.textContent = said.content;
      words.parentElement.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name === "AbortError") note.textContent += " · stopped";
    else complain(error);
  } finally {
    if (said.content) {
      mine.push(said);
      if (mine === turns) offerOpinion(said, words.parentElement);
    } else {
      mine.pop(); // a question without an answer is asked again, not remembered
      words.parentElement.remove();
      text.value ||= question;
    }
    keep("turns", turns);
    answering = null;
    busy(false);
  }
}

// Puts the thumbs under an answer. A thumb is sent at once; a comment after it is sent with it again, and the last one holds.
function offerOpinion(said, turn) {
  if (!said.id) return;
  const form = find("opinion").content.cloneNode(true).firstElementChild;
  const [words, told] = [form.querySelector(".words"), form.querySelector(".told")];
  const { comment, better_answer } = form.elements;
  const thumbs = [...form.querySelectorAll(".thumbs button")];

  function draw() {
    thumbs.forEach((thumb) => thumb.setAttribute("aria-pressed", thumb.value === said.opinion?.rating));
    better_answer.hidden = said.opinion?.rating !== "down"; // asked for where the answer was bad
  }

  async function send(opinion, thanks) {
    const before = said.opinion;
    said.opinion = opinion;
    draw();
    try {
      told.classList.remove("bad");
      await request("v1/feedback", { method: "POST", body: JSON.stringify({ completion_id: said.id, ...opinion }) });
      told.textContent = thanks;
      keep("turns", turns);
      return true;
    } catch (error) {
      said.opinion = before;
      draw();
      told.classList.add("bad");
      told.textContent = `This could not be sent: ${error.message}`;
      if (error.status === 401) openKey();
      return false;
    }
  }

  thumbs.forEach((thumb) =>
    thumb.addEventListener("click", () => {
      const { rating, ...written } = said.opinion ?? {};
      words.hidden = rating === thumb.value && !words.hidden;
      if (rating !== thumb.value) send({ ...written, rating: thumb.value }, "Thank you.");
      form.scrollIntoView({ block: "nearest" });
    }),
  );
  form.querySelector("[value=close]").addEventListener("click", () => (words.hidden = true));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const written = { rating: said.opinion?.rating, comment: comment.value };
    if (!better_answer.hidden) written.better_answer = better_answer.value;
    if (await send(written, "Thank you, that helps.")) words.hidden = true;
  });
  comment.value = said.opinion?.comment ?? "";
  better_answer.value = said.opinion?.better_answer ?? "";
  draw();
  turn.after(form);
  form.scrollIntoView({ block: "end" });
}

function busy(is) {
  find("send").hidden = is;
  find("stop").hidden = !is;
  if (!is && !keyDialog.open) text.focus();
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = text.value.trim();
  if (!question || answering) return;
  text.value = "";
  ask(question);
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && answering?.abort());
find("stop").addEventListener("click", () => answering?.abort());
find("fresh").addEventListener("click", () => {
  answering?.abort();
  turns = [];
  keep("turns", turns);
  talk.querySelectorAll(".turn, .opinion").forEach((part) => part.remove());
  find("welcome").hidden = false;
  text.focus();
});
model.addEventListener("change", () => keep("model", model.value));
find("open-key").addEventListener("click", openKey);
keyDialog.addEventListener("close", () => {
  keep("key", key.value.trim());
  talk.querySelectorAll(".bad").forEach((turn) => turn.remove());
  listModels();
});

for (const said of turns) {
  const { turn } = show(said.role, said.content, said.by);
  if (said.role === "assistant") offerOpinion(said, turn);
}
listModels();
showConsent();
