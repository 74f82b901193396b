// node examples/web/check.mjs FOLDER SOUND.wav PICTURES: the page of build.py in headless Chromium.
// Draws digits, opens the sound file, and prints what the page answers as JSON; pictures of the page
// at two widths go into a folder. Anything that the page logs as an error is one.
import { mkdir } from "node:fs/promises";
import path from "node:path";
import { argv, env } from "node:process";
import { chromium } from "playwright-core";

import { serve } from "./serve.mjs";

const [folder, sound, pictures] = argv.slice(2);
const server = await serve(folder);
const browser = await chromium.launch({
  executablePath: env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
});

// Strokes in a square of 1 x 1.
const DIGITS = {
  1: [[[0.35, 0.3], [0.52, 0.15], [0.52, 0.85]]],
  7: [[[0.25, 0.18], [0.75, 0.18], [0.45, 0.85]]],
  0: [Array.from({ length: 25 }, (_, i) => [0.5 + 0.22 * Math.sin(i / 3.82), 0.5 - 0.34 * Math.cos(i / 3.82)])],
};

const scores = (page, id) => page.locator(`#${id} li`).evaluateAll((lines) =>
  lines.map((line) => [line.children[0].textContent, line.children[2].textContent]));

async function draw(page, strokes) {
  await page.click("#clear");
  const box = await page.locator("#drawing").boundingBox();
  const at = ([x, y]) => [box.x + x * box.width, box.y + y * box.height];
  for (const stroke of strokes) {
    await page.mouse.move(...at(stroke[0]));
    await page.mouse.down();
    for (const point of stroke.slice(1)) await page.mouse.move(...at(point), { steps: 5 });
    await page.mouse.up();
  }
  return scores(page, "digit-scores");
}

const answer = { errors: [], digits: {} };
try {
  const page = await browser.newPage({ viewport: { width: 1100, height: 900 } });
  page.on("pageerror", (error) => answer.errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && answer.errors.push(message.text()));
  await page.goto(`${server.url}/`);
  await page.waitForSelector("body[data-ready]");
  for (const [digit, strokes] of Object.entries(DIGITS)) answer.digits[digit] = await draw(page, strokes);
  await page.setInputFiles("#file", sound);
  await page.waitForFunction(() => document.getElementById("word-status").textContent.includes("ms"));
  answer.words = await scores(page, "word-scores");
  answer.status = await page.textContent("#word-status");
  await mkdir(pictures, { recursive: true });
  await page.screenshot({ path: path.join(pictures, "wide.png"), fullPage: true });
  await page.setViewportSize({ width: 390, height: 844 });
  await draw(page, DIGITS[7]);
  await page.screenshot({ path: path.join(pictures, "narrow.png"), fullPage: true });
  answer.overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  // The microphone of the browser is a beep once a second.
  await page.evaluate(() => { document.getElementById("word-status").textContent = ""; });
  await page.click("#microphone");
  await page.waitForFunction(() => document.getElementById("word-status").textContent.includes("ms"));
  answer.microphone = await page.textContent("#microphone");
  await page.click("#microphone");
} finally {
  await browser.close();
  server.close();
}
console.log(JSON.stringify(answer));
