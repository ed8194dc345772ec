// Open loop: requests arrive as a Poisson process of `plan.rate` a second, whether or not earlier ones have been answered.
//
// k6 starts iterations evenly spaced. Each therefore stands for a slot of time, one mean gap long, and sends what a Poisson
// process has in that slot: none, one or several requests, exponential gaps apart. Since such a process has no memory, the slots
// together are one. The wait is before the request, and k6 times a request from its sending, so no latency contains it.
import http from 'k6/http';
import exec from 'k6/execution';
import { handleSummary, nextShot, note, options as shared, plan } from './lib.js';

export { handleSummary };

const slot = 1000 / plan.rate; // ms

export const options = {
  ...shared,
  scenarios: {
    open: {
      executor: 'constant-arrival-rate',
      rate: Math.round(100 * plan.rate),
      timeUnit: '100s',
      duration: `${plan.seconds}s`,
      preAllocatedVUs: plan.clients,
      gracefulStop: plan.timeout,
    },
  },
};

export default async function () {
  const answers = [];
  for (let at = gap(); at < slot; at += gap()) answers.push(sendAfter(at));
  await Promise.all(answers);
}

function gap() {
  return -slot * Math.log(1 - Math.random());
}

async function sendAfter(milliseconds) {
  await new Promise((resolve) => setTimeout(resolve, milliseconds));
  const shot = nextShot(exec.scenario.iterationInTest);
  note(shot, await http.asyncRequest('POST', shot.url, shot.body, shot.params));
}
