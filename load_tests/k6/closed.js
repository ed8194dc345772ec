// Closed loop: `plan.clients` clients, each of which sends its next request when it has its answer.
import http from 'k6/http';
import exec from 'k6/execution';
import { handleSummary, nextShot, note, options as shared, plan } from './lib.js';

export { handleSummary };

export const options = {
  ...shared,
  scenarios: {
    closed: { executor: 'constant-vus', vus: plan.clients, duration: `${plan.seconds}s`, gracefulStop: plan.timeout },
  },
};

export default function () {
  const shot = nextShot(exec.scenario.iterationInTest);
  note(shot, http.post(shot.url, shot.body, shot.params));
}
