// What both scenarios share: the plan that runner.py wrote, the next request of it, and what is noted of an answer.
import http from 'k6/http';
import { Counter, Rate, Trend } from 'k6/metrics';

export const plan = JSON.parse(open(__ENV.PLAN));

const EXPLAINED = 2; // unexpected answers that each client describes in the log

const shots = plan.shots.map((shot) => ({
  ...shot,
  body: open(shot.body, 'b'),
  params: {
    headers: { 'Content-Type': shot.content_type },
    responseType: shot.code ? 'text' : 'none',
    tags: { shot: shot.name },
    timeout: plan.timeout,
  },
}));

const latency = new Trend('latency', true);
const expected = new Rate('expected');
const within = new Rate('within');
const serverErrors = new Counter('server_errors');
const refused = new Counter('refused');
const stages = Object.fromEntries(plan.stages.map((name) => [name, new Trend(`stage_${name}`, true)]));

http.setResponseCallback(null); // `expected` judges, and a refusal may be what is expected

export const options = {
  discardResponseBodies: true,
  systemTags: [],
  thresholds: plan.thresholds,
  summaryTrendStats: ['count', 'med', 'p(90)', 'p(99)', 'max'],
};

export function nextShot(number) {
  return shots[number % shots.length];
}

export function note(shot, response) {
  const took = response.timings.blocked + response.timings.duration;
  const right = response.status === shot.status && (!shot.code || codeOf(response) === shot.code);
  latency.add(took, shot.params.tags);
  expected.add(right, shot.params.tags);
  within.add(right && took <= plan.limit);
  if (response.status >= 500) serverErrors.add(1);
  if ((response.status === 429 || response.status === 503) && response.headers['Retry-After']) refused.add(1);
  if (!right) explain(shot, response);
  if (plan.stages.length > 0) noteStages(response.headers['Server-Timing'] || '');
}

export function handleSummary(data) {
  return { [__ENV.SUMMARY]: JSON.stringify(data) };
}

function noteStages(header) {
  for (const [, name, milliseconds] of header.matchAll(/(\w+);dur=([\d.]+)/g)) {
    if (stages[name]) stages[name].add(Number(milliseconds));
  }
}

function codeOf(response) {
  try {
    return response.json('code');
  } catch {
    return null;
  }
}

let explained = 0;

function explain(shot, response) {
  if (explained++ >= EXPLAINED) return;
  const wanted = shot.code ? `${shot.status} ${shot.code}` : `${shot.status}`;
  const came = response.error || `${response.status} ${codeOf(response) || ''}`.trim();
  console.warn(`${shot.name}: ${came} instead of ${wanted}`);
}
