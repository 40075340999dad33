// Draws faces for tools/shards/faces.py. A request is a line of JSON on stdin, its answer one on stdout:
//   {"style": "openPeeps"}                                -> {"license": ..., "creator": ..., "source": ...}
//   {"style", "prefix", "from", "to"}                     -> [{"attributes": {...}, "drawing": HASH}, ...]
//   {"style", "seed", "size"}                             -> {"size": N}, then N * N * 4 bytes: red, green, blue, alpha
import { createHash } from "node:crypto";
import { createInterface } from "node:readline";
import { createAvatar } from "@dicebear/core";
import * as styles from "@dicebear/collection";
import { Resvg } from "@resvg/resvg-js";

const BACKGROUND = /^(primary|secondary)?background/i; // always white here
// Room for tall hair, which the styles cut off in up to a third of the faces; shoulders still meet the lower edge.
const FRAME = { scale: 90, translateY: 5 }; // percent

function face(style, seed) {
  return createAvatar(styles[style], { seed, backgroundColor: ["ffffff"], ...FRAME });
}

function attributes(avatar) {
  const { extra } = avatar.toJson();
  return Object.fromEntries(Object.entries(extra).filter(([name]) => !BACKGROUND.test(name)));
}

function answer({ style, prefix, from, to, seed, size }) {
  if (!styles[style]) throw new Error(`no style ${style}`);
  if (from !== undefined) {
    const found = [];
    for (let number = from; number < to; number++) {
      const avatar = face(style, `${prefix}${number}`);
      const drawing = createHash("sha256").update(avatar.toString()).digest("hex");
      found.push({ attributes: attributes(avatar), drawing });
    }
    return [found];
  }
  if (seed === undefined) {
    const { license, creator, source } = styles[style].meta;
    return [{ license: license.name, creator, source }];
  }
  const image = new Resvg(face(style, seed).toString(), {
    fitTo: { mode: "width", value: size },
    background: "#ffffff",
    font: { loadSystemFonts: false },
  }).render();
  return [{ size: image.width }, image.pixels];
}

for await (const line of createInterface({ input: process.stdin })) {
  const [head, bytes] = answer(JSON.parse(line));
  process.stdout.write(JSON.stringify(head) + "\n");
  if (bytes) process.stdout.write(bytes);
}
