// Prints as JSON what the types of the Kubernetes Gateway API say of routes: node gateway_api.mjs ROUTES
// The package is found from the folder in SIDELIGHT_NODE, which holds node_modules; exit code 3: not installed.

import { createRequire } from "node:module";
import { resolve } from "node:path";

const require = createRequire(resolve(process.env.SIDELIGHT_NODE ?? ".", "index.js"));
let place;
try {
  place = require.resolve("@kubernetes-models/gateway-api/package.json");
} catch {
  process.exit(3);
}
const { v1 } = await import(resolve(place, "../gateway.networking.k8s.io/index.js"));

const errors = JSON.parse(process.argv[2]).map((route) => {
  try {
    new v1.HTTPRoute(route).validate();
    return null;
  } catch (error) {
    return error.message;
  }
});
console.log(JSON.stringify(errors));
