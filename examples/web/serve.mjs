// A static server: node examples/web/serve.mjs [FOLDER] [PORT]
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import path from "node:path";
import { argv } from "node:process";
import { pathToFileURL } from "node:url";

const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".json": "application/json",
  ".wasm": "application/wasm",
  ".wav": "audio/wav",
};

/** Serves the files of a folder to this machine; { url, close() }. */
export async function serve(folder, port = 0) {
  const root = path.resolve(folder);
  const server = createServer(async (request, response) => {
    const name = decodeURIComponent(new URL(request.url, "http://here").pathname);
    const file = path.join(root, name.endsWith("/") ? `${name}index.html` : name);
    try {
      if (!file.startsWith(root + path.sep)) throw new Error("outside");
      const bytes = await readFile(file);
      response.setHeader("Content-Type", TYPES[path.extname(file)] ?? "application/octet-stream");
      response.end(bytes);
    } catch {
      response.statusCode = 404;
      response.end("not found");
    }
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${server.address().port}`, close: () => server.close() };
}

if (argv[1] && import.meta.url === pathToFileURL(argv[1]).href) {
  const { url } = await serve(argv[2] ?? ".", Number(argv[3] ?? 8000));
  console.log(`${url}/`);
}
