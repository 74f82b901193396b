// node benchmarks/web/browser.mjs FOLDER [--json FILE]: the models of make_models.py, in Chromium.
import { readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { argv, env } from "node:process";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

import { serve } from "../../examples/web/serve.mjs";

const root = fileURLToPath(new URL("../..", import.meta.url));
const folder = path.relative(root, path.resolve(argv[2]));
const server = await serve(root);
const browser = await chromium.launch({
  executablePath: env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
});
try {
  const page = await browser.newPage();
  page.on("console", (message) => console.log(message.text()));
  await page.goto(`${server.url}/benchmarks/web/page.html?folder=/${folder}`);
  const answer = await page.waitForFunction(() => globalThis.answer, null, { timeout: 900_000 });
  const report = { ...(await answer.jsonValue()), browser: browser.version() };
  if (report.error) throw new Error(report.error);
  console.log(report.table);
  const at = argv.indexOf("--json");
  if (at > 0) await writeFile(argv[at + 1], JSON.stringify(report, null, 2) + "\n");
} finally {
  await browser.close();
  server.close();
}
