/** The page /status: asks /metrics again and again, shows what it says now and how that went over the last minutes. */

import { Chart } from "./charts.js";
import { Window, gauges, parse, quantile, total, totalBy } from "./metrics.js";

const STAGES = ["read", "parse", "decode", "resize", "queue", "infer", "finish", "encode"];
const QUANTILES = { p50: 0.5, p90: 0.9, p99: 0.99 };
const INTERVALS = 10; // the window of rates and quantiles
const PATIENCE = 5000; // ms
const NONE = "–";
const KEY = "vitrine-api-key"; // kept until the tab is closed

const every = Math.min(60, Math.max(0.2, Number(new URLSearchParams(location.search).get("every")) || 1)); // seconds
const span = `${INTERVALS * every} s`;

const sliding = new Window(INTERVALS);
let silentSince = null;

const charts = {
  throughput: new Chart("throughput-chart", { ok: "2xx", "client-errors": "4xx", "server-errors": "5xx" }, { every }),
  latency: new Chart("latency-chart", { p50: "p50", p90: "p90", p99: "p99" }, { every }),
  stages: new Chart("stages-chart", Object.fromEntries(STAGES.map((stage) => [stage, stage])), { every, stacked: true }),
  load: new Chart("load-chart", { "in-flight": "in flight", "queue-depth": "waiting", "batch-size": "batch size" }, { every }),
};

function poll() {
  look().finally(() => setTimeout(poll, 1000 * every));
}

async function look() {
  try {
    sliding.add(await scrape());
  } catch (error) {
    silentSince ??= new Date();
    sliding.clear();
    show(NOTHING);
    if (error instanceof NoAccess) {
      askForKey();
      return;
    }
    say("down", `No answer since ${silentSince.toLocaleTimeString()} (${error.message}). Asking again every ${every} s.`);
    return;
  }
  silentSince = null;
  document.getElementById("ask-key").hidden = true;
  const now = measure(sliding);
  show(now);
  if (now.requests) say("live", `Live: figures of the last ${span}, every ${every} s.`);
  else say("idle", idleText(now));
}

class NoAccess extends Error {}

async function scrape() {
  const key = sessionStorage.getItem(KEY);
  const headers = { Accept: "text/plain", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch("metrics", { cache: "no-store", headers, signal: AbortSignal.timeout(PATIENCE) });
  if ([401, 403].includes(response.status)) throw new NoAccess();
  if (!response.ok) throw new Error(`/metrics answers ${response.status}`);
  const at = performance.now() / 1000;
  return parse(await response.text(), at);
}

function askForKey() {
  silentSince = null;
  document.getElementById("ask-key").hidden = false;
  say("down", sessionStorage.getItem(KEY) ? "That key may not read the figures." : "This server wants an API key before it shows its figures.");
}

document.getElementById("ask-key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, document.getElementById("key").value.trim());
  event.target.reset();
  look();
});

function idleText({ requests, served }) {
  if (requests === null) return "Connected; the first figures come with the next answer.";
  return served > 0
    ? `No requests in the last ${span}.`
    : `No requests yet. Send one: curl --data-binary @photo.jpg ${new URL("v1/classify", document.baseURI)}`;
}

const NOTHING = {
  requests: null, // per second, as are images, rejected and the three classes of status
  images: null,
  rejected: null,
  classes: { ok: null, client: null, server: null },
  latency: { p50: null, p90: null, p99: null }, // ms
  stages: STAGES.map(() => null), // ms per request
  batchSize: null,
  inFlight: null,
  queueDepth: null,
  backends: [],
  models: [],
  served: null, // requests since the server started
};

/** What the window says; a figure is null where nothing was seen that it could be computed from. */
function measure(window) {
  const latest = window.scrapes.at(-1);
  const state = {
    ...NOTHING,
    inFlight: total(gauges(latest, "vitrine_requests_in_flight")),
    queueDepth: total(gauges(latest, "vitrine_queue_depth")),
    backends: gauges(latest, "vitrine_backend_up"),
    models: gauges(latest, "vitrine_model_info").filter(({ value }) => value > 0),
    served: total([...latest.counters.values()].filter(({ name }) => name === "vitrine_request_seconds_count")),
  };
  if (window.seconds === 0) return state;

  const answered = window.increases("vitrine_request_seconds_count");
  const perSecond = (samples) => total(samples) / window.seconds;
  const ofClass = (digit) => perSecond(answered.filter(({ labels }) => labels.code.startsWith(digit)));
  const buckets = window.increases("vitrine_request_seconds_bucket");
  const milliseconds = (q) => scaled(quantile(q, buckets), 1000);
  const spent = totalBy(window.increases("vitrine_stage_seconds_sum"), "stage");
  const batches = total(window.increases("vitrine_batch_size_count"));
  const requests = total(answered);
  return {
    ...state,
    requests: perSecond(answered),
    images: perSecond(window.increases("vitrine_images_total")),
    rejected: perSecond(window.increases("vitrine_rejected_total")),
    classes: { ok: ofClass("2"), client: ofClass("4"), server: ofClass("5") },
    latency: Object.fromEntries(Object.entries(QUANTILES).map(([name, q]) => [name, milliseconds(q)])),
    stages: STAGES.map((stage) => (requests > 0 ? (1000 * (spent.get(stage) ?? 0)) / requests : null)),
    batchSize: batches > 0 ? total(window.increases("vitrine_batch_size_sum")) / batches : null,
  };
}

function scaled(value, factor) {
  return value === null ? null : factor * value;
}

function show(now) {
  const share = (part) => (now.requests ? part / now.requests : null);
  write("requests", number(now.requests));
  write("images", number(now.images));
  for (const name of Object.keys(QUANTILES)) write(name, number(now.latency[name], " ms"));
  write("server-errors", percent(share(now.classes.server)));
  write("client-errors", percent(share(now.classes.client)));
  write("rejected", number(now.rejected));
  write("in-flight", number(now.inFlight));
  write("queue-depth", number(now.queueDepth));
  write("batch-size", number(now.batchSize));
  write("backend", now.backends.map(({ labels, value }) => `${labels.backend} ${value > 0 ? "up" : "down"}`).join(", ") || NONE);

  const sum = now.stages.reduce((left, right) => left + right, 0);
  fill("stages", STAGES.map((stage, index) => stageRow(stage, now.stages[index], sum)));
  fill("models", uniqueRows(now.models.map(({ labels }) => [labels.model, labels.version, labels.engine, labels.precision])));

  const time = Date.now() / 1000;
  charts.throughput.add(time, [now.classes.ok, now.classes.client, now.classes.server]);
  charts.latency.add(time, Object.keys(QUANTILES).map((name) => now.latency[name]));
  charts.stages.add(time, now.stages);
  charts.load.add(time, [now.inFlight, now.queueDepth, now.batchSize]);
}

function stageRow(stage, mean, sum) {
  return [stage, number(mean, " ms"), percent(mean === null ? null : mean / (sum || 1))];
}

/** Several worker processes may each name the same model. */
function uniqueRows(rows) {
  return [...new Map(rows.map((row) => [JSON.stringify(row), row])).values()].sort();
}

function say(state, text) {
  const element = document.getElementById("state");
  element.dataset.state = state;
  if (element.textContent !== text) element.textContent = text; // a screen reader reads every change aloud
}

function write(id, text) {
  document.getElementById(id).textContent = text;
}

function fill(id, rows) {
  const cells = (row) => row.map((text, column) => Object.assign(document.createElement(column === 0 ? "th" : "td"), { textContent: text }));
  const elements = rows.map((row) => {
    const element = document.createElement("tr");
    element.append(...cells(row));
    element.firstElementChild.scope = "row";
    return element;
  });
  document.getElementById(id).replaceChildren(...elements);
}

function number(value, unit = "") {
  if (value === null) return NONE;
  return value.toLocaleString(undefined, value >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 }) + unit;
}

function percent(value) {
  return value === null ? NONE : value.toLocaleString(undefined, { style: "percent", maximumSignificantDigits: 2 });
}

poll();
