// A table of 400,000 entries of 256 bytes on V8's heap (100 MB), filled at start-up, answered over HTTP.
//
// In: GET /entry?row=N. Out: JSON with a hash of entry N. The entries follow from the row and from the token drawn at
// start-up, so that loadgen/checks.py can compute what the hash must be.
"use strict";
const crypto = require("node:crypto");
const http = require("node:http");

const NUMBERS_PER_ENTRY = 32;
const ENTRIES_PER_PAGE = 2000;
const PAGES = 200;
const ROWS = PAGES * ENTRIES_PER_PAGE;

const token = crypto.randomBytes(8);
const [high, low] = [token.readUInt32BE(0), token.readUInt32BE(4)];
let count = 0;

// MurmurHash3's 32-bit finalizer.
function mix(h) {
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

function fill() {
  const pages = [];
  let position = 0;
  for (let number = 0; number < PAGES; number++) {
    const page = [];
    for (let i = 0; i < ENTRIES_PER_PAGE * NUMBERS_PER_ENTRY; i++) page.push(mix(mix(high ^ position++) ^ low));
    pages.push(page);
  }
  return pages;
}

const pages = fill();

function hash(row) {
  const page = pages[Math.floor(row / ENTRIES_PER_PAGE)];
  const start = (row % ENTRIES_PER_PAGE) * NUMBERS_PER_ENTRY;
  let value = 0;
  for (let i = start; i < start + NUMBERS_PER_ENTRY; i++) value = mix(value ^ page[i]);
  return value.toString(16).padStart(8, "0");
}

function answer(response, status, body) {
  const payload = Buffer.from(JSON.stringify(body));
  response.writeHead(status, { "Content-Type": "application/json", "Content-Length": payload.length });
  response.end(payload);
}

const server = http.createServer((request, response) => {
  const [path, query] = request.url.split("?");
  if (path === "/ready") return answer(response, 200, { ready: true });
  const found = path === "/entry" && /^row=(\d{1,15})$/.exec(query ?? "row=0");
  if (!found) return answer(response, 404, { error: "GET /entry?row=N, N = 0, 1, 2, …" });
  const row = Number(found[1]);
  const value = hash(row % ROWS);
  return answer(response, 200, { function: "node", token: token.toString("hex"), row, value, count: ++count });
});
server.listen(Number(process.argv[2]), "0.0.0.0", 128, () => console.log(`table of ${ROWS} entries is ready`));
