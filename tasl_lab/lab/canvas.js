// Pictures beside each other on one canvas: click, point, draw, or move a cursor with the arrow keys and press Enter.
const GAP = 6, LINE = 15;

function inked(el, name, otherwise) {
  return getComputedStyle(el).getPropertyValue(name).trim() || otherwise;
}

function render({ model, el }) {
  const canvas = document.createElement("canvas"), said = document.createElement("div"), gauge = document.createElement("div");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.style.cssText = "display:block;max-width:100%;outline-offset:1px;touch-action:none";
  said.setAttribute("aria-live", "polite");
  said.style.cssText = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)";
  gauge.style.cssText = "position:absolute;visibility:hidden;height:0;width:calc(100px * var(--tasl-scale, 1))";  // as wide as the page's text is large
  el.style.position = "relative";
  el.append(canvas, said, gauge);
  let sheet = null, cursor = null, focused = false, pen = false, stroke = null, asked = 0, told = 0;

  const g = name => model.get(name);
  function font() { return g("font") * (gauge.offsetWidth / 100 || 1); }
  function size() {
    const captions = g("captions").length > 0, n = g("count"), columns = Math.max(1, Math.min(g("columns"), n || 1));
    const w = g("width") * g("scale"), h = g("height") * g("scale"), foot = captions ? LINE * font() : 0;
    return { n, columns, w, h, foot, stepX: w + GAP, stepY: h + foot + GAP, rows: Math.ceil(n / columns) };
  }
  function corner(s, i) { return [(i % s.columns) * s.stepX, Math.floor(i / s.columns) * s.stepY]; }
  function pixel() { return g("unit") * g("scale"); }  // screen pixels of one pixel of the picture
  function bounds() { return [Math.round(g("height") / g("unit")), Math.round(g("width") / g("unit"))]; }

  function draw() {
    const s = size(), ratio = window.devicePixelRatio || 1, ctx = canvas.getContext("2d");
    const width = Math.max(1, s.columns * s.stepX), height = Math.max(1, s.rows * s.stepY);
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.style.cursor = g("paint") ? "crosshair" : "pointer";
    canvas.setAttribute("aria-label", g("alt"));
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.imageSmoothingEnabled = false;
    ctx.font = `${11 * font()}px ${inked(el, "--jp-ui-font-family", "sans-serif")}`;
    ctx.textBaseline = "top";
    for (let i = 0; i < s.n; i++) {
      const [x, y] = corner(s, i);
      if (sheet) ctx.drawImage(sheet, (i % s.columns) * g("width"), Math.floor(i / s.columns) * g("height"), g("width"), g("height"), x, y, s.w, s.h);
      if (g("marked").includes(i)) frame(ctx, x + 2, y + 2, s.w - 4, s.h - 4, "#E69F00", 3);
      if (s.foot && g("captions")[i]) {
        ctx.fillStyle = inked(el, "--jp-ui-font-color1", "#1F2937");
        ctx.fillText(g("captions")[i], x + 1, y + s.h + 2, s.w - 2);
      }
    }
    if (stroke) line(ctx, s);
    if (focused && cursor && cursor[0] < s.n) {
      const [x, y] = corner(s, cursor[0]), p = pixel(), step = g("step");
      frame(ctx, x + Math.floor(cursor[2] / step) * step * p, y + Math.floor(cursor[1] / step) * step * p, step * p, step * p, pen ? "#D55E00" : "#56B4E9", 2);
    }
  }
  function frame(ctx, x, y, w, h, colour, width) {
    ctx.strokeStyle = "#000000";
    ctx.lineWidth = width + 2;
    ctx.strokeRect(x, y, w, h);
    ctx.strokeStyle = colour;
    ctx.lineWidth = width;
    ctx.strokeRect(x, y, w, h);
  }
  function line(ctx, s) {
    const [x, y] = corner(s, stroke.index), p = pixel();
    ctx.strokeStyle = "#D55E00";
    ctx.lineCap = ctx.lineJoin = "round";
    ctx.lineWidth = Math.max(2, g("brush") * 2 * p);
    ctx.globalAlpha = 0.6;
    ctx.beginPath();
    stroke.points.forEach(([a, b], k) => ctx[k ? "lineTo" : "moveTo"](x + (b + 0.5) * p, y + (a + 0.5) * p));
    if (stroke.points.length === 1) ctx.lineTo(x + (stroke.points[0][1] + 0.6) * p, y + (stroke.points[0][0] + 0.5) * p);
    ctx.stroke();
    ctx.globalAlpha = 1;
  }

  function at(event) {
    const s = size(), box = canvas.getBoundingClientRect();
    const zoom = box.width / Math.max(1, s.columns * s.stepX), px = (event.clientX - box.left) / zoom, py = (event.clientY - box.top) / zoom;
    const column = Math.floor(px / s.stepX), row = Math.floor(py / s.stepY), index = row * s.columns + column;
    const x = Math.floor((px - column * s.stepX) / pixel()), y = Math.floor((py - row * s.stepY) / pixel()), [high, wide] = bounds();
    if (column < 0 || column >= s.columns || index < 0 || index >= s.n || y < 0 || x < 0 || y >= high || x >= wide) return null;
    return [index, y, x];
  }
  function send(name, value) { model.set(name, value); model.save_changes(); }
  function click([index, y, x]) { send("clicked", { index, y, x, n: ++asked }); }
  function begin([index, y, x]) { stroke = { index, points: [[y, x]] }; draw(); }
  function further([index, y, x]) {
    const last = stroke.points[stroke.points.length - 1];
    if (index === stroke.index && (last[0] !== y || last[1] !== x)) { stroke.points.push([y, x]); draw(); }
  }
  function finish() {
    if (!stroke) return;
    model.set("stroked", stroke.index);
    send("stroke", stroke.points);
    stroke = null;
    pen = false;
    draw();
  }

  canvas.addEventListener("pointerdown", e => {
    const place = at(e);
    if (!place) return;
    cursor = place;
    if (!g("paint")) return;
    canvas.setPointerCapture(e.pointerId);
    begin(place);
  });
  canvas.addEventListener("pointermove", e => {
    const place = at(e);
    if (stroke && !pen) { if (place) further(place); return; }
    const now = performance.now();
    if (place && place[0] !== g("hovered") && now - told > 220) { told = now; send("hovered", place[0]); }
  });
  canvas.addEventListener("pointerup", e => { if (g("paint")) finish(); else if (at(e)) { cursor = at(e); click(cursor); draw(); } });
  canvas.addEventListener("focus", () => { focused = true; cursor = cursor || [0, 0, 0]; draw(); });
  canvas.addEventListener("blur", () => { focused = false; draw(); });
  canvas.addEventListener("keydown", e => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }, s = size();
    if (!s.n || !(e.key in moves || e.key === "Enter" || e.key === " ")) return;
    e.preventDefault();
    e.stopPropagation();
    cursor = cursor && cursor[0] < s.n ? cursor : [0, 0, 0];
    if (e.key in moves) move(s, moves[e.key]);
    else if (!g("paint")) click(cursor);
    else if (e.key === " " && !stroke) { pen = true; begin(cursor); }
    else finish();
    draw();
    said.textContent = `picture ${cursor[0] + 1} of ${s.n}, ${g("captions")[cursor[0]] || ""} row ${cursor[1]}, column ${cursor[2]}${pen ? ", drawing" : ""}`;
  });
  function move(s, [dy, dx]) {
    const [high, wide] = bounds(), step = g("step");
    let [i, y, x] = [cursor[0], cursor[1] + dy * step, cursor[2] + dx * step];
    if (pen) [y, x] = [Math.min(Math.max(y, 0), high - 1), Math.min(Math.max(x, 0), wide - 1)];
    if (x < 0 && i % s.columns > 0) { i -= 1; x = wide - 1; }
    if (x >= wide && (i + 1) % s.columns > 0 && i + 1 < s.n) { i += 1; x = 0; }
    if (y < 0 && i >= s.columns) { i -= s.columns; y = high - 1; }
    if (y >= high && i + s.columns < s.n) { i += s.columns; y = 0; }
    cursor = [i, Math.min(Math.max(y, 0), high - 1), Math.min(Math.max(x, 0), wide - 1)];
    if (pen) further(cursor);
  }

  async function load() {
    const bytes = g("sheet");
    if (!bytes || !bytes.byteLength) { sheet = null; draw(); return; }
    const mine = load.last = {}, found = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    if (load.last === mine) { sheet = found; draw(); }
  }
  const names = ["captions", "marked", "alt", "paint", "font", "step", "scale"];
  model.on("change:sheet", load);
  for (const name of names) model.on(`change:${name}`, draw);
  const watch = new MutationObserver(draw);
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  const larger = new ResizeObserver(draw);
  larger.observe(gauge);
  load();
  return () => {
    watch.disconnect();
    larger.disconnect();
    model.off("change:sheet", load);
    for (const name of names) model.off(`change:${name}`, draw);
  };
}

export default { render };
