"use strict";
// Text of models and files becomes text nodes only; nothing here parses markup.
const data = JSON.parse(document.getElementById("data").textContent);

function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

// Figures: drawn when they come near the window, so that a long page opens at once; report.html#all draws all of them
// first, for programs that print or photograph the page.
function draw(place) {
  const figure = data.figures[Number(place.dataset.figure)];
  const layout = { ...figure.layout, template: data.template, autosize: true };
  return Plotly.newPlot(place, figure.data, layout, { responsive: true, displayModeBar: false }).then(() => {
    place.dataset.drawn = "yes";
  });
}

const places = document.querySelectorAll(".figure");
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((one) => one.isIntersecting)) {
    watcher.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "600px" });
places.forEach((place) => location.hash === "#all" ? draw(place) : watcher.observe(place));
window.addEventListener("beforeprint", () => places.forEach((place) => place.dataset.drawn || draw(place)));

// Samples
const controls = document.getElementById("sample-controls");
const list = document.getElementById("sample-list");
const note = document.getElementById("sample-note");
const withSamples = data.samples.filter((run) => run.shown.length > 0);

function choice(label, options, onChange) {
  const select = element("select", "", ...options.map((text, index) => {
    const option = element("option", "", text);
    option.value = String(index);
    return option;
  }));
  select.addEventListener("change", onChange);
  controls.append(element("label", "", `${label} `, select));
  return select;
}

function tint(logprob) {
  if (logprob === null) return "rgba(120, 60, 200, 0.45)";
  return `rgba(214, 69, 44, ${Math.min(0.75, -logprob / 6).toFixed(3)})`;
}

function tokenSpan(text, logprob, differs) {
  const span = element("span", differs ? "differs-here" : "", text);
  span.style.backgroundColor = tint(logprob);
  const odds = logprob === null ? "not finite" : `${logprob.toFixed(3)}, probability ${(100 * Math.exp(logprob)).toFixed(1)} %`;
  span.title = `log-probability ${odds}${differs ? "; its bits differ between rollout and training" : ""}`;
  return span;
}

// Lengths count Unicode code points, which a JavaScript string has one or two units of.
function response(sample) {
  const place = element("pre", "response");
  const characters = Array.from(sample.response);
  let start = 0;
  for (const [length, logprob, differs] of sample.tokens || []) {
    const text = characters.slice(start, start + length).join("");
    place.append(tokenSpan(length ? text : "·", logprob, differs));
    start += length;
  }
  place.append(characters.slice(start).join(""));
  place.append(rest(sample, "response"));
  return place;
}

// What the page leaves out of a text.
function rest(sample, key) {
  const count = (sample.cut || {})[key];
  return count ? element("span", "quiet", ` … and ${count} characters more`) : "";
}

function card(sample) {
  const different = sample.different || 0;
  const facts = [`score ${sample.score === null ? "none" : Number(sample.score.toPrecision(6))}`];
  for (const [key, value] of Object.entries(sample.extra || {})) facts.push(`${key} ${Number(value.toPrecision(6))}`);
  for (const key of ["status", "finish_reason", "num_tokens", "data_source", "row", "weights_version"]) {
    if (sample[key] !== undefined && sample[key] !== null) facts.push(`${key.replaceAll("_", " ")} ${sample[key]}`);
  }
  if (different) facts.push(different === 1 ? "1 token differs" : `${different} tokens differ`);
  const head = element("div", "sample-head", element("b", "", facts[0]), ...facts.slice(1).map((fact) => element("span", "", fact)));
  const made = element("article", "sample", head);
  if (sample.prompt !== undefined) made.append(element("pre", "prompt", sample.prompt, rest(sample, "prompt")));
  made.append(response(sample));
  if (sample.ground_truth !== undefined) made.append(element("div", "quiet", `ground truth: ${sample.ground_truth}`, rest(sample, "ground_truth")));
  if (sample.message !== undefined) made.append(element("div", "bad", sample.message, rest(sample, "message")));
  return made;
}

if (withSamples.length === 0) {
  note.textContent = "These runs have no samples (trainer.samples_per_step=0 writes none).";
} else {
  const runs = choice("run", withSamples.map((run) => run.run), showSteps);
  const steps = choice("step", [], showSamples);
  const orders = choice("order", ["as sampled", "worst first", "best first", "longest first"], showSamples);
  const scale = [0, -0.5, -1, -2, -4].map((logprob) => {
    const swatch = element("span", "swatch", `${(100 * Math.exp(logprob)).toFixed(0)} %`);
    swatch.style.backgroundColor = tint(logprob);
    return swatch;
  });
  controls.append(element("span", "", "probability of a token: ", ...scale));

  function showSteps() {
    const run = withSamples[Number(runs.value)];
    const names = run.shown.map((file) => `${file.step}${file.stem === "val" ? " (validation)" : ""}`);
    steps.replaceChildren(...names.map((name, index) => {
      const option = element("option", "", name);
      option.value = String(index);
      return option;
    }));
    steps.value = String(names.length - 1);
    showSamples();
  }

  function showSamples() {
    const run = withSamples[Number(runs.value)];
    const file = run.shown[Number(steps.value)];
    const samples = [...file.samples];
    note.textContent = [
      run.shown.length < run.files ? `${run.shown.length} of ${run.files} files of samples are in this page.` : "",
      file.more ? `These are the first ${samples.length}; samples/${file.stem}_${file.step}.jsonl has more.` : "",
    ].filter(Boolean).join(" ");
    const keys = [null, (one) => one.score ?? 0, (one) => -(one.score ?? 0), (one) => -(one.num_tokens ?? 0)];
    const key = keys[Number(orders.value)];
    if (key) samples.sort((one, other) => key(one) - key(other));
    list.replaceChildren(...samples.map(card));
  }

  showSteps();
}
