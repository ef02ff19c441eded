// The page and, started a second time as its worker, the network. Nothing but this folder is read.
"use strict";

const LIBRARY = "onnxruntime-web/";
const MAX_SIDE = 2048; // pixels of an image that the page does not have to resize for the network
const MAX_VALUES = 64e6; // logits at the size of the image, in float32: 256 MB

// --- Worker: loads the network, maps images to classes ----------------------------------------------------------------

async function runWorker() {
  let ort, model, session, provider;
  const notes = [];

  async function open(name) {
    session = await ort.InferenceSession.create(model, { executionProviders: [name] });
    provider = name;
  }

  async function load() {
    ort = await import("./" + LIBRARY + "ort.webgpu.bundle.min.mjs");
    ort.env.logLevel = "error";
    model = await download("model.onnx");
    if (navigator.gpu && (await navigator.gpu.requestAdapter().catch(() => null))) {
      try {
        return await open("webgpu");
      } catch (error) {
        notes.push(`WebGPU cannot run this network (${reason(error)})`);
      }
    }
    return open("wasm");
  }

  async function predict({ pixels, height, width }) {
    const run = () => session.run({ images: new ort.Tensor("uint8", pixels, [1, height, width, 3]) });
    const began = performance.now();
    let outputs;
    try {
      outputs = await run();
    } catch (error) {
      if (provider !== "webgpu") throw error;
      notes.push(`WebGPU failed (${reason(error)})`);
      await open("wasm");
      outputs = await run();
    }
    const segmentation = Uint16Array.from(outputs.segmentation.data);
    const seconds = (performance.now() - began) / 1000;
    self.postMessage({ kind: "result", segmentation, height, width, seconds, provider, notes }, [segmentation.buffer]);
  }

  const ready = load().then(
    () => self.postMessage({ kind: "ready", provider, notes }),
    (error) => self.postMessage({ kind: "broken", message: `The network cannot be loaded: ${reason(error)}` }),
  );
  self.onmessage = async ({ data }) => {
    await ready;
    try {
      await predict(data);
    } catch (error) {
      self.postMessage({ kind: "failed", message: `The network failed on this image: ${reason(error)}` });
    }
  };
}

async function download(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: the server answers ${answer.status} ${answer.statusText}`);
  const total = Number(answer.headers.get("Content-Length"));
  const parts = [];
  let received = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    received += value.length;
    if (total) self.postMessage({ kind: "progress", share: Math.min(received / total, 1), bytes: total });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

function reason(error) {
  return String((error && error.message) || error).split("\n")[0].slice(0, 300);
}

// --- Sizes ------------------------------------------------------------------------------------------------------------

// Height and width at which an image enters the graph, as the image processor has it.
function inputSize(height, width, processor, numClasses) {
  if (processor.in_graph || !processor.do_resize) {
    const area = MAX_VALUES / numClasses / (height * width);
    const scale = Math.min(1, MAX_SIDE / Math.max(height, width), Math.sqrt(area));
    return [Math.max(1, Math.round(height * scale)), Math.max(1, Math.round(width * scale))];
  }
  const size = processor.size;
  const [shorter, longer] = [Math.min(height, width), Math.max(height, width)];
  let target = [size.height, size.width];
  if (processor.keep_ratio) {
    const frame = [size.height / height, size.width / width];
    const edges = [size.shortest_edge / shorter, (size.longest_edge || Infinity) / longer];
    const scale = Math.min(...(size.height ? frame : edges));
    target = [Math.floor(height * scale + 0.5), Math.floor(width * scale + 0.5)];
  } else if (!size.height) {
    let side = size.shortest_edge;
    if (size.longest_edge && (longer / shorter) * side > size.longest_edge) side = (size.longest_edge * shorter) / longer;
    const short = roundHalfToEven(side);
    if (shorter === short) target = [height, width];
    else target = width < height ? [Math.floor((side * height) / width), short] : [short, Math.floor((side * width) / height)];
  }
  const divisor = processor.size_divisor || 1;
  return target.map((each) => Math.ceil(Math.max(each, 1) / divisor) * divisor);
}

function roundHalfToEven(value) {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below % 2) : Math.round(value);
}

// --- Page -------------------------------------------------------------------------------------------------------------

function runPage() {
  const [file, status, result, overlay, opacity, save, classes, absent, drop] = [
    "file", "status", "result", "overlay", "opacity", "save", "classes", "absent", "drop",
  ].map((id) => document.getElementById(id));
  let model, worker, chosen, image, shown; // description, network, image that is predicted, image shown, its prediction

  function say(text, isError = false) {
    status.textContent = text;
    status.classList.toggle("error", isError);
  }

  async function start() {
    if (location.protocol === "file:") {
      throw new Error("Browsers do not run networks from opened files. Serve this folder: python -m http.server");
    }
    if (typeof WebAssembly === "undefined" || typeof Worker === "undefined") {
      throw new Error("This browser lacks WebAssembly or workers, which the network needs.");
    }
    const answer = await fetch("model.json");
    if (!answer.ok) throw new Error(`model.json: the server answers ${answer.status} ${answer.statusText}`);
    model = await answer.json();
    worker = new Worker("page.js");
    worker.onmessage = ({ data }) => handlers[data.kind](data);
    worker.onerror = (event) => handlers.broken({ message: `The network cannot be started: ${event.message || "page.js"}` });
  }

  const engine = ({ provider, notes }) => [provider === "webgpu" ? "WebGPU" : "WebAssembly", ...notes].join("; ");

  const handlers = {
    progress: ({ share, bytes }) => say(`Loading the network: ${Math.round(100 * share)} % of ${megabytes(bytes)}`),
    ready(data) {
      file.disabled = false;
      say(`Ready (${engine(data)}).`);
    },
    broken: ({ message }) => say(message, true),
    failed({ message }) {
      file.disabled = false;
      result.hidden = true;
      say(message, true);
    },
    result(data) {
      file.disabled = false;
      image = chosen;
      shown = { ...data, colors: painted(data, model.palette) };
      describe();
      draw();
      result.hidden = false;
      const isWhole = data.height === image.height && data.width === image.width;
      const size = `${data.width} × ${data.height} pixels${isWhole ? "" : `, resized from ${image.width} × ${image.height}`}`;
      say(`${image.name}: ${size}, ${data.seconds.toFixed(1)} s (${engine(data)}).`);
    },
  };

  async function choose(picked) {
    if (!picked || file.disabled) return;
    let bitmap;
    try {
      bitmap = await createImageBitmap(picked, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    } catch {
      return say(`${picked.name} is not an image that this browser reads; expected PNG, JPEG or WebP.`, true);
    }
    const [height, width] = inputSize(bitmap.height, bitmap.width, model.processor, model.names.length);
    if (Math.min(height, width) < model.min_side) {
      const sides = `${width} × ${height} pixels`;
      return say(`${picked.name} enters the network at ${sides}; expected sides of ${model.min_side} or more.`, true);
    }
    chosen = { name: picked.name, bitmap, height: bitmap.height, width: bitmap.width };
    file.disabled = true;
    say(`Predicting ${picked.name}…`);
    worker.postMessage({ pixels: pixelsOf(bitmap, height, width), height, width });
  }

  // Rows of the table: the classes that occur, most frequent first.
  function describe() {
    const counts = new Array(model.names.length).fill(0);
    for (const id of shown.segmentation) counts[id] += 1;
    const order = counts.map((_, id) => id).filter((id) => counts[id]);
    order.sort((first, second) => counts[second] - counts[first]);
    const share = (id) => percent(counts[id] / shown.segmentation.length);
    classes.replaceChildren(...order.map((id) => row(model.names[id], model.palette[id], share(id))));
    const missing = model.names.filter((_, id) => !counts[id]);
    absent.textContent = missing.length ? `Not in this image: ${missing.join(", ")}` : "";
    const spoken = order.slice(0, 5).map((id) => `${model.names[id]} ${share(id)}`);
    overlay.setAttribute("aria-label", `Segmentation of ${image.name}: ${spoken.join(", ")}`);
  }

  function draw() {
    const [height, width] = inputSize(image.height, image.width, { do_resize: false }, 1);
    overlay.height = height;
    overlay.width = width;
    const context = overlay.getContext("2d");
    context.drawImage(image.bitmap, 0, 0, width, height);
    context.globalAlpha = opacity.value / 100;
    context.imageSmoothingEnabled = false;
    context.drawImage(shown.colors, 0, 0, width, height);
  }

  async function saveMap() {
    const greys = model.names.map((_, id) => [id, id, id]);
    const blob = await painted(shown, greys).convertToBlob({ type: "image/png" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = image.name.replace(/\.[^.]*$/, "") + "_segmentation.png";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  file.addEventListener("change", () => choose(file.files[0]));
  opacity.addEventListener("input", draw);
  save.addEventListener("click", saveMap);
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") choose(event.dataTransfer.files[0]);
    });
  }
  start().catch((error) => say(reason(error), true));
}

// A canvas of the prediction's size with a colour for each class.
function painted({ segmentation, height, width }, colors) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const words = new Uint32Array(image.data.buffer); // as bytes red, green, blue, alpha
  const table = colors.map(([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0);
  segmentation.forEach((id, index) => (words[index] = table[id]));
  context.putImageData(image, 0, 0);
  return canvas;
}

// Bytes (height, width, 3) of an image at a size; transparent pixels are drawn on black.
function pixelsOf(bitmap, height, width) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { alpha: false });
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const colors = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8Array(height * width * 3);
  for (let from = 0, to = 0; from < colors.length; from += 4) {
    pixels[to++] = colors[from];
    pixels[to++] = colors[from + 1];
    pixels[to++] = colors[from + 2];
  }
  return pixels;
}

function row(name, color, share) {
  const [line, head, swatch, cell] = ["tr", "th", "span", "td"].map((tag) => document.createElement(tag));
  swatch.className = "swatch";
  swatch.style.backgroundColor = `rgb(${color.join(" ")})`;
  head.scope = "row";
  head.append(swatch, name);
  cell.textContent = share;
  line.append(head, cell);
  return line;
}

const percent = (share) => (share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

if (typeof document === "undefined") runWorker();
else runPage();
