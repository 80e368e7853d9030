// The run panel's view: draws what the Python model says and decides nothing itself.
//
// Two sources: the `state` trait holds the whole view and is set rarely; messages hold numbered updates (a JSON merge
// patch and the newest points). An update that is missed is healed by the next whole state. Text goes into the page as
// text only, never as markup. Nothing is loaded from anywhere.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 118;
const EDGE = { left: 40, right: 10, top: 14, bottom: 18 };
const MOST_POINTS = 1500;

function make(tag, name, parent, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function draw(tag, name, parent) {
  const node = document.createElementNS(SVG, tag);
  if (name) node.setAttribute("class", name);
  if (parent) parent.append(node);
  return node;
}

function say(node, text) {
  const value = text ?? "";
  if (node.textContent !== value) node.textContent = value;
}

function set(node, name, value) {
  if (value === undefined || value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

function merge(target, change) {
  const result = { ...target };
  for (const [key, value] of Object.entries(change)) {
    if (value === null) delete result[key];
    else if (typeof value === "object" && !Array.isArray(value)) result[key] = merge(isMap(result[key]) ? result[key] : {}, value);
    else result[key] = value;
  }
  return result;
}

function isMap(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function digits(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e9)) {
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return `${String(Number(mantissa))}e${Number(exponent)}`.replace(/^-/, "−");
  }
  const text = size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(3)));
  return text.replace(/^-/, "−");
}

// A moment that is told to the minute only (`within`) lies somewhere in the minute that began so long ago.
function ago(seconds, within) {
  if (within) return seconds < within ? "less than a minute ago" : `about ${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 1) return "just now";
  if (seconds < 90) return `${Math.floor(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

// A small line chart in SVG: one line behind the point, one dotted line ahead of it, one limit.
function chart(parent) {
  const host = make("div", "rap-chart", parent);
  const svg = draw("svg", "", host);
  set(svg, "role", "img");
  const under = draw("path", "rap-under", svg);
  const axis = draw("line", "rap-axis", svg);
  const limit = draw("line", "rap-limit", svg);
  const limitText = draw("text", "rap-limit-text", svg);
  const ahead = draw("path", "rap-ahead", svg);
  const line = draw("path", "rap-line", svg);
  const point = draw("circle", "rap-point", svg);
  set(point, "r", 4.5);
  const wait = draw("text", "rap-wait", svg);
  const ticks = draw("g", "", svg);
  const pool = [];
  let width = 0;
  let last = null;

  function tick(index, x, y, anchor, text) {
    const node = (pool[index] ??= draw("text", "", ticks));
    set(node, "x", x.toFixed(1));
    set(node, "y", y.toFixed(1));
    set(node, "text-anchor", anchor);
    say(node, text);
  }

  function update(spec) {
    last = spec;
    if (!width) return;
    set(svg, "viewBox", `0 0 ${width} ${HEIGHT}`);
    set(svg, "aria-label", spec.label);
    const inner = { w: width - EDGE.left - EDGE.right, h: HEIGHT - EDGE.top - EDGE.bottom };
    const spanX = spec.x[1] - spec.x[0] || 1;
    const spanY = spec.y[1] - spec.y[0] || 1;
    const toX = (x) => EDGE.left + ((x - spec.x[0]) / spanX) * inner.w;
    const toY = (y) => EDGE.top + (1 - (y - spec.y[0]) / spanY) * inner.h;
    const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`).join("");
    const floor = EDGE.top + inner.h;
    set(axis, "x1", EDGE.left);
    set(axis, "x2", width - EDGE.right);
    set(axis, "y1", floor + 0.5);
    set(axis, "y2", floor + 0.5);
    const behind = path(spec.behind);
    set(line, "d", behind);
    const ends = spec.behind.length > 1 ? [spec.behind[0], spec.behind[spec.behind.length - 1]] : null;
    set(under, "d", ends ? `${behind}L${toX(ends[1][0]).toFixed(1)} ${floor}L${toX(ends[0][0]).toFixed(1)} ${floor}Z` : "");
    set(ahead, "d", path(spec.ahead ?? []));
    point.toggleAttribute("hidden", !spec.point);
    point.style.display = spec.point ? "" : "none";
    if (spec.point) {
      set(point, "cx", toX(spec.point[0]).toFixed(1));
      set(point, "cy", toY(spec.point[1]).toFixed(1));
    }
    limit.style.display = limitText.style.display = spec.limit ? "" : "none";
    if (spec.limit) {
      const y = spec.limit.at === undefined ? EDGE.top - 4 : toY(spec.limit.at);
      limit.style.display = spec.limit.at === undefined ? "none" : "";
      set(limit, "x1", EDGE.left);
      set(limit, "x2", width - EDGE.right);
      set(limit, "y1", y.toFixed(1));
      set(limit, "y2", y.toFixed(1));
      set(limitText, "x", width - EDGE.right);
      set(limitText, "y", (spec.limit.at === undefined ? 10 : y - 4).toFixed(1));
      set(limitText, "text-anchor", "end");
      say(limitText, spec.limit.text);
    }
    wait.style.display = spec.wait ? "" : "none";
    set(wait, "x", EDGE.left + inner.w / 2);
    set(wait, "y", EDGE.top + inner.h / 2);
    set(wait, "text-anchor", "middle");
    say(wait, spec.wait);
    let used = 0;
    for (const { at, text } of spec.ticksY ?? []) tick(used++, EDGE.left - 6, toY(at) + 3.5, "end", text);
    const room = inner.w * 0.16;
    const [from, to] = [EDGE.left, width - EDGE.right];
    (spec.ticksX ?? []).forEach(({ at, text }, i, all) => {
      const x = toX(at);
      const outer = i === 0 || i === all.length - 1;
      if (!outer && (x - from < room || to - x < room)) return;
      tick(used++, x, HEIGHT - 4, i === 0 ? "start" : outer ? "end" : "middle", text);
    });
    pool.splice(used).forEach((node) => node.remove());
  }

  function resize() {
    const now = host.clientWidth;
    if (now === width || !now) return;
    width = now;
    if (last) update(last);
  }
  const watcher = new ResizeObserver(resize);
  watcher.observe(host);
  return { host, update, resize, close: () => watcher.disconnect() };
}

function render({ model, el }) {
  let view = {};
  let curve = [];
  let series = {};
  let strides = {};
  let seq = 0;
  let clock = null; // the kernel's time at the last update, and ours
  let live = {};
  let chosen = null;

  const root = make("section", "rap", el);
  const spoken = make("div", "rap-speak", root);
  set(spoken, "role", "status");
  set(spoken, "aria-live", "polite");

  const head = make("div", "rap-head", root);
  const title = make("span", "rap-title", head);
  const status = make("span", "rap-chip", head);
  make("span", "rap-space", head);
  const level = make("span", "rap-chip rap-level", head);

  const alert = make("div", "rap-alert", root);
  set(alert, "role", "alert");
  const alertTitle = make("b", "", alert);
  const alertReasons = make("ul", "", alert);
  const alertMore = make("p", "", alert);

  const grid = make("div", "rap-grid", root);
  const foot = make("div", "rap-foot", root);
  set(foot, "role", "note");

  function card(kind) {
    const node = make("section", "rap-card", grid);
    node.dataset.card = kind;
    const heading = make("div", "rap-heading", node);
    set(heading, "role", "heading");
    set(heading, "aria-level", 3);
    const big = make("div", "rap-big", node);
    const value = make("b", "", big);
    const of = make("span", "", big);
    return { node, heading, value, of };
  }

  const privacy = card("privacy");
  const bar = make("div", "rap-bar", privacy.node);
  set(bar, "role", "img");
  const barParts = { planned: make("i", "rap-planned", bar), now: make("i", "rap-now", bar), before: make("i", "rap-before", bar) };
  const barBudget = make("i", "rap-budget", bar);
  const keys = make("div", "rap-keys", privacy.node);
  set(keys, "aria-hidden", "true");
  const keyTexts = {};
  for (const kind of ["before", "now", "planned"]) {
    const node = make("span", "", keys);
    node.dataset.kind = kind;
    make("i", "", node);
    keyTexts[kind] = make("span", "", node);
  }
  const privacyChart = chart(privacy.node);
  const privacyNote = make("p", "rap-note", privacy.node);

  const training = card("training");
  const progress = make("div", "rap-bar", training.node);
  set(progress, "role", "progressbar");
  const progressNow = make("i", "rap-now", progress);
  const pace = make("div", "rap-pace", training.node);
  const trainingChart = chart(training.node);
  const metrics = make("div", "rap-metrics", training.node);
  set(metrics, "role", "group");
  set(metrics, "aria-label", "Series to draw");
  const metricNodes = new Map();
  const facts = make("div", "rap-facts", training.node);
  const trainingNote = make("p", "rap-note", training.node);

  const integrity = card("integrity");
  const rows = make("div", "rap-rows", integrity.node);
  set(rows, "role", "list");
  const rowNodes = new Map();
  const integrityNote = make("p", "rap-note", integrity.node);

  function kernelNow() {
    return clock ? clock.kernel + (performance.now() - clock.own) / 1000 : null;
  }

  function paintHead() {
    set(root, "aria-label", view.label);
    say(title, view.title);
    set(title, "title", view.run ? `run ${view.run}` : undefined);
    status.dataset.tone = view.status.tone;
    say(status, `${view.status.tone === "live" ? "● " : ""}${view.status.text}`);
    level.dataset.tone = view.level.tone;
    say(level, view.level.word);
    set(level, "title", view.level.meaning);
    alert.hidden = !view.alert;
    if (view.alert) {
      say(alertTitle, view.alert.title);
      alertReasons.replaceChildren(
        ...(view.alert.reasons ?? []).map(({ where, text }) => {
          const item = make("li");
          if (where) make("b", "", item, `${where}: `);
          item.append(text);
          return item;
        }),
      );
      alertMore.replaceChildren(view.alert.more ? `${view.alert.more}. ` : "", "To look closer: ");
      make("code", "", alertMore, view.alert.command);
    }
    const warnings = view.warnings ?? [];
    foot.hidden = !warnings.length;
    foot.replaceChildren(...warnings.map((text) => make("p", "", null, `Warning: ${text}`)));
    say(spoken, `${view.title}: ${view.status.word}. ${view.level.word}.`);
  }

  function paintPrivacy() {
    const item = view.privacy;
    set(privacy.node, "aria-label", item.label);
    privacy.node.dataset.bounded = String(Boolean(item.chart));
    say(privacy.heading, item.heading);
    say(privacy.value, item.big);
    say(privacy.of, item.of);
    say(privacyNote, item.note);
    bar.hidden = keys.hidden = privacyChart.host.hidden = !item.chart;
    if (!item.chart) return;
    set(bar, "aria-label", item.label);
    for (const kind of ["planned", "now", "before"]) barParts[kind].style.width = `${100 * item.bar[kind]}%`;
    barBudget.style.left = `${100 * item.bar.budget}%`;
    barBudget.hidden = item.bar.budget >= 1;
    for (const { kind, text } of item.keys) say(keyTexts[kind], text);
    const { step, steps, spent, top, limit, ticks } = item.chart;
    const here = spent === undefined ? null : [step, spent];
    const behind = curve.filter(([x]) => x < step);
    const ahead = curve.filter(([x]) => x > step);
    privacyChart.update({
      label: item.chart.label,
      x: [0, steps],
      y: [0, top],
      behind: here ? [...behind, here] : behind,
      ahead: here ? [here, ...ahead] : ahead,
      point: here,
      limit,
      ticksY: ticks,
      ticksX: [{ at: 0, text: "step 0" }, { at: step, text: step.toLocaleString("en-US") }, { at: steps, text: steps.toLocaleString("en-US") }],
    });
  }

  function paintTraining() {
    const item = view.training;
    set(training.node, "aria-label", item.label);
    say(training.heading, item.heading);
    say(training.value, item.big);
    say(training.of, item.of);
    progress.hidden = item.progress === undefined;
    if (!progress.hidden) {
      set(progress, "aria-label", "Training progress");
      set(progress, "aria-valuemin", 0);
      set(progress, "aria-valuemax", 100);
      set(progress, "aria-valuenow", Math.round(100 * item.progress));
      set(progress, "aria-valuetext", item.label);
      progressNow.style.width = `${100 * item.progress}%`;
    }
    say(pace, view.frozen ? "" : [live.rate, live.left].filter(Boolean).join(" · "));
    pace.hidden = Boolean(view.frozen);
    paintMetrics(item.metrics ?? []);
    const stride = strides[chosen] ?? 1;
    const words = (item.facts ?? []).map(({ term, text }) => `${term} ${text}`);
    if (stride > 1) words.push(`drawn as means of ${stride} steps`);
    facts.replaceChildren(...words.map((text) => make("span", "", null, text)));
    facts.hidden = !words.length;
    say(trainingNote, item.note);
    paintSeries(item);
  }

  function paintMetrics(list) {
    if (!list.some(({ name }) => name === chosen)) chosen = list[0]?.name ?? null;
    metrics.hidden = !list.length;
    for (const [name, nodes] of metricNodes) {
      if (list.some((entry) => entry.name === name)) continue;
      nodes.button.remove();
      metricNodes.delete(name);
    }
    for (const { name, label, value } of list) {
      let nodes = metricNodes.get(name);
      if (!nodes) {
        const button = make("button", "rap-metric", metrics);
        button.type = "button";
        nodes = { button, label: make("span", "", button), value: make("b", "", button) };
        button.addEventListener("click", () => {
          chosen = name;
          paintTraining();
        });
        metricNodes.set(name, nodes);
      }
      set(nodes.button, "aria-pressed", String(name === chosen));
      set(nodes.button, "aria-label", `Draw ${label}, now ${value}`);
      say(nodes.label, label);
      say(nodes.value, value);
    }
  }

  function paintSeries(item) {
    const points = series[chosen] ?? [];
    const entry = (item.metrics ?? []).find(({ name }) => name === chosen);
    if (!entry || !points.length) {
      const wait = view.frozen ? "nothing was recorded" : "waiting for the first step";
      trainingChart.update({ label: `No series to draw: ${wait}.`, x: [0, 1], y: [0, 1], behind: [], wait });
      return;
    }
    let low = Infinity;
    let high = -Infinity;
    for (const [, y] of points) {
      if (y < low) low = y;
      if (y > high) high = y;
    }
    const pad = (high - low || Math.abs(high) || 1) * 0.08;
    const last = points[points.length - 1];
    const first = points[0];
    const stride = strides[chosen] ?? 1;
    const means = stride > 1 ? ` Each point is the mean of ${stride} steps.` : "";
    trainingChart.update({
      label: `${entry.label} over ${points.length} points: ${digits(first[1])} at first, ${digits(last[1])} at last, between ${digits(low)} and ${digits(high)}.${means}`,
      x: [Math.min(first[0], last[0]), Math.max(last[0], first[0] + 1)],
      y: [low - pad, high + pad],
      behind: points,
      point: last,
      ticksY: high > low ? [{ at: high, text: digits(high) }, { at: low, text: digits(low) }] : [{ at: high, text: digits(high) }],
      ticksX: [{ at: first[0], text: `step ${Math.round(first[0]).toLocaleString("en-US")}` }, ...(last === first ? [] : [{ at: last[0], text: Math.round(last[0]).toLocaleString("en-US") }])],
    });
  }

  function copyButton(node, row) {
    const button = make("button", row.mono ? "rap-mono" : "", node);
    button.type = "button";
    button.addEventListener("click", async () => {
      const done = await copy(button.dataset.copy);
      say(button, done ? "copied" : button.dataset.copy);
      button.classList.toggle("rap-whole", !done);
      say(spoken, done ? `The whole ${row.term} was copied.` : `Copying is not allowed here; the whole ${row.term} is shown.`);
      if (done) setTimeout(() => say(button, button.dataset.text), 1200);
    });
    return button;
  }

  function paintIntegrity() {
    const item = view.integrity;
    set(integrity.node, "aria-label", item.label);
    say(integrity.heading, item.heading);
    say(integrity.value, item.big);
    say(integrity.of, item.of);
    say(integrityNote, item.note);
    const now = view.frozen ? null : kernelNow();
    for (const row of item.rows) {
      let nodes = rowNodes.get(row.key);
      if (!nodes) {
        // No dl: JupyterLab's own style sheet floats its terms.
        const line = make("div", "rap-row", rows);
        set(line, "role", "listitem");
        make("span", "rap-term", line, row.term);
        const cell = make("span", "rap-value", line);
        nodes = { main: row.copy ? copyButton(cell, row) : make("span", row.mono ? "rap-mono" : "", cell), detail: make("small", "", cell) };
        rowNodes.set(row.key, nodes);
      }
      const text = now && row.time ? ago(now - row.time, row.within) : row.text;
      if (row.copy && nodes.main.dataset.copy !== row.copy) {
        nodes.main.dataset.copy = row.copy;
        nodes.main.dataset.text = text;
        set(nodes.main, "title", `${row.copy}\nClick to copy the whole ${row.term}`);
        set(nodes.main, "aria-label", `Copy the whole ${row.term}, ${text}`);
        say(nodes.main, text);
      }
      if (!row.copy) say(nodes.main, text);
      if (!row.copy) set(nodes.main, "title", row.time ? row.text : undefined);
      say(nodes.detail, row.detail);
      nodes.detail.hidden = !row.detail;
    }
  }

  function paint() {
    if (!view.status) return;
    paintHead();
    paintPrivacy();
    paintTraining();
    paintIntegrity();
    root.dataset.seq = seq;
    root.dataset.frozen = String(Boolean(view.frozen));
  }

  let asked = false;
  function soon() {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      paint();
    });
  }

  function whole() {
    const state = model.get("state");
    if (!state || !state.view || state.seq < seq) return;
    ({ view, curve } = state);
    series = Object.fromEntries(Object.entries(state.series).map(([name, points]) => [name, [...points]]));
    strides = state.strides ?? {};
    seq = state.seq;
    soon();
  }

  function update(message) {
    if (message?.kind !== "update" || message.seq <= seq) return;
    view = merge(view, message.view);
    if (message.curve) curve = message.curve;
    for (const [name, points] of Object.entries(message.points)) {
      const all = (series[name] ??= []);
      all.push(...points);
      if (all.length > MOST_POINTS) series[name] = all.filter((_, i) => i % 2 === 0 || i === all.length - 1);
    }
    if (message.live) {
      live = message.live;
      clock = { kernel: message.live.now, own: performance.now() };
    }
    seq = message.seq;
    soon();
  }

  const ticking = setInterval(() => {
    if (view.integrity && !view.frozen && clock) paintIntegrity();
  }, 1000);
  model.on("change:state", whole);
  model.on("msg:custom", update);
  whole();
  paint();

  return () => {
    clearInterval(ticking);
    model.off("change:state", whole);
    model.off("msg:custom", update);
    privacyChart.close();
    trainingChart.close();
  };
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

export default { render };
