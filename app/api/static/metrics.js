/** Prometheus' text format, and what a sliding window of scrapes says: increases, rates and quantiles. No page in here. */

/**
 * @typedef {{name: string, labels: Record<string, string>, value: number}} Sample
 * @typedef {{at: number, counters: Map<string, Sample>, gauges: Map<string, Sample>}} Scrape `at` is in seconds.
 */

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const UNESCAPED = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/** @returns {Scrape} every sample under its name and labels as they were written; parts of a histogram are counters. */
export function parse(text, at) {
  const kinds = new Map();
  const scrape = { at, counters: new Map(), gauges: new Map() };
  for (const line of text.split("\n")) {
    if (line.startsWith("# TYPE ")) {
      const [, , name, kind] = line.split(" ");
      kinds.set(name, kind);
      continue;
    }
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (match === null) continue;
    const [, name, labels = "", value] = match;
    const kind = kinds.get(name) ?? kinds.get(name.replace(/_(bucket|sum|count)$/, ""));
    const samples = kind === "counter" || kind === "histogram" ? scrape.counters : scrape.gauges;
    samples.set(`${name}{${labels}}`, { name, labels: parseLabels(labels), value: Number(value) });
  }
  return scrape;
}

function parseLabels(text) {
  const pairs = [...text.matchAll(LABEL)].map(([, name, value]) => [name, value.replace(/\\[n"\\]/g, (pair) => UNESCAPED[pair])]);
  return Object.fromEntries(pairs);
}

/** The gauges called `name`. */
export function gauges(scrape, name) {
  return [...scrape.gauges.values()].filter((sample) => sample.name === name);
}

/** The last scrapes of one life of the server. */
export class Window {
  /** @param {number} intervals how many intervals between scrapes it spans */
  constructor(intervals) {
    this.intervals = intervals;
    this.scrapes = [];
  }

  /** A counter that fell means that the server has started again: what came before says nothing any more. */
  add(scrape) {
    const last = this.scrapes.at(-1);
    if (last !== undefined && hasFallen(last, scrape)) this.clear();
    this.scrapes = [...this.scrapes, scrape].slice(-this.intervals - 1);
  }

  clear() {
    this.scrapes = [];
  }

  /** Seconds from the first scrape to the last; 0 when there are not two. */
  get seconds() {
    return this.scrapes.length < 2 ? 0 : this.scrapes.at(-1).at - this.scrapes[0].at;
  }

  /** How much each counter called `name` grew. @returns {Sample[]} */
  increases(name) {
    const first = this.scrapes[0].counters;
    const grown = ([key, sample]) => ({ ...sample, value: sample.value - (first.get(key)?.value ?? 0) });
    return [...this.scrapes.at(-1).counters].filter(([, sample]) => sample.name === name).map(grown);
  }
}

function hasFallen(before, after) {
  return [...before.counters].some(([key, { value }]) => (after.counters.get(key)?.value ?? 0) < value);
}

/** @param {Sample[]} samples */
export function total(samples) {
  return samples.reduce((sum, { value }) => sum + value, 0);
}

/** Sums by the values of one label. @param {Sample[]} samples @returns {Map<string, number>} */
export function totalBy(samples, label) {
  const sums = new Map();
  for (const { labels, value } of samples) sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
  return sums;
}

/**
 * Prometheus' histogram_quantile: linear within the bucket, and the highest finite edge for what lies beyond it.
 *
 * @param {number} q in 0..1
 * @param {Sample[]} buckets samples with the label `le`, cumulative; those of several series add up
 * @returns {number | null} null without observations
 */
export function quantile(q, buckets) {
  const edges = [...totalBy(buckets, "le")].map(([le, count]) => [le === "+Inf" ? Infinity : Number(le), count]);
  edges.sort(([left], [right]) => left - right);
  const observations = edges.at(-1)?.[1] ?? 0;
  if (observations === 0) return null;
  const rank = q * observations;
  const index = edges.findIndex(([, count]) => count >= rank && count > 0);
  const [lower, below] = index === 0 ? [0, 0] : edges[index - 1];
  const [upper, count] = edges[index];
  return upper === Infinity ? lower : lower + ((upper - lower) * (rank - below)) / (count - below);
}
