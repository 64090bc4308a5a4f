// The live loss curve on training nodes, and on a folded node while a training inside of it runs; the pack's warnings as
// messages of the page. Works in canvas and in Vue rendering: DOM widgets, no canvas drawing. On a folded node most pages
// show the image of what was learned so far by themselves; where they do not, as newer ones in canvas rendering, it stands
// below the curve.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const EVENT = "likeness.progress";
const WARNING = "likeness.warning";
const PREVIEW = "b_preview_with_metadata";
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const NODES = new Set([
  "LikenessTrainEmbedding",
  "LikenessRefineEmbedding",
  "LikenessFineTune",
  "LikenessNullText",
  "LikenessReferenceGuide",
  "LikenessOptimizeLora",
  "LikenessTrainAdapter",
]);
const WIDTH = 300;
const HEIGHT = 90;
const LEAST = 120; // pixels that the curve takes on its node,
const WITH_IMAGE = 300; // and with an image below it
const SVG = "http://www.w3.org/2000/svg";
const curves = new Set();
const folded = new Map(); // folded node -> its curve, the training's id, and its size before

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function polyline(opacity, width) {
  const style = { fill: "none", stroke: "currentColor", "vector-effect": "non-scaling-stroke" };
  return svg("polyline", { ...style, opacity, "stroke-width": width });
}

function clock(seconds) {
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

class LossCurve {
  constructor(node) {
    this.node = node;
    this.element = document.createElement("div");
    this.element.className = "likeness-loss";
    this.element.style.cssText =
      "display:flex;flex-direction:column;width:100%;height:100%;min-height:110px;box-sizing:border-box;" +
      "padding:4px;border-radius:4px;background:var(--comfy-input-bg,#222);color:var(--input-text,#ddd)";
    this.text = document.createElement("div");
    this.text.style.cssText = "font:11px monospace;flex:none;min-height:14px";
    this.text.setAttribute("role", "status");
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" });
    this.picture.style.cssText = "flex:1;width:100%;min-height:0";
    this.line = polyline(0.35, 1);
    this.mean = polyline(1, 2);
    this.picture.append(this.line, this.mean);
    this.image = document.createElement("img");
    this.image.style.cssText = "flex:2;min-height:0;object-fit:contain;display:none";
    this.element.append(this.text, this.picture, this.image);
    this.clear();
  }

  addWidget() {
    const getMinHeight = () => (this.image.src ? WITH_IMAGE : LEAST);
    const options = { serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight };
    this.widget = this.node.addDOMWidget("loss_curve", "likeness_loss", this.element, options);
    this.widget.serialize = false; // the older page reads it here, the newer one in the options
  }

  showImage(blob) {
    URL.revokeObjectURL(this.image.src);
    if (blob) this.image.src = URL.createObjectURL(blob);
    else this.image.removeAttribute("src");
    this.image.style.display = blob ? "" : "none";
  }

  clear() {
    this.text.textContent = "Loss curve: shown while training.";
    for (const line of [this.line, this.mean]) line.setAttribute("points", "");
    this.element.dataset.points = "0";
  }

  // Node ids are numbers on older pages and strings on newer ones; inside a subgraph the server says "4:1" for 1.
  isFor(id) {
    return String(this.node.id) === String(id).split(":").pop();
  }

  show({ step, steps, losses, mean, left, resumed, so_far }) {
    // Single timesteps differ a hundredfold: the tallest twentieth at either end may leave the frame, the mean never.
    const sorted = [...losses].sort((a, b) => a - b);
    const cut = Math.floor(sorted.length / 20);
    const low = Math.min(sorted[cut], ...mean);
    const span = Math.max(sorted[sorted.length - 1 - cut], ...mean) - low || 1;
    const right = Math.max(1, losses.length - 1);
    const point = (value, index) => {
      const x = (index / right) * WIDTH;
      const y = 2 + (1 - (value - low) / span) * (HEIGHT - 4);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    };
    this.line.setAttribute("points", losses.map(point).join(" "));
    this.mean.setAttribute("points", mean.map(point).join(" "));
    const before = resumed > 0 ? ` (from ${resumed})` : "";
    const rest = step < steps ? `   ${clock(left)} left` : "";
    const image = so_far && step < steps ? "   image: your subject so far" : "";
    this.text.textContent = `step ${step} / ${steps}${before}   mean loss ${mean.at(-1).toFixed(4)}${rest}${image}`;
    this.element.dataset.points = String(losses.length);
    this.element.dataset.step = String(step);
  }
}

// The curve on the folded node that holds the training, which is added when the training begins: "4:1" is 1 inside of 4.
function onFoldedNode(training) {
  const [outer, inner] = String(training).split(":");
  const host = inner && (app.rootGraph ?? app.graph)._nodes.find((node) => String(node.id) === outer);
  if (!host) return null;
  if (!folded.has(host)) {
    const curve = new LossCurve(host);
    folded.set(host, { curve, size: [...host.size] });
    curve.addWidget();
    resize(host, curve);
  }
  folded.get(host).training = String(training);
  return folded.get(host).curve;
}

// Vue rendering sizes its nodes by itself.
function resize(host, curve) {
  const [width, height] = folded.get(host).size;
  if (!window.LiteGraph.vueNodesMode) host.setSize([width, height + (curve ? curve.widget.options.getMinHeight() : 0)]);
}

// After the run the folded node is as it was, so that nothing of this is saved with the graph. Newer pages in Vue rendering
// show the last curve until they draw the node anew.
function unfold() {
  for (const [host, { curve }] of folded) {
    curve.showImage(null);
    host.removeWidget(curve.widget);
    resize(host, null);
  }
  folded.clear();
}

app.registerExtension({
  name: "comfyuilikeness.loss",

  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      for (const curve of curves) if (curve.isFor(detail.node)) curve.show(detail);
      onFoldedNode(detail.node)?.show(detail);
    });
    api.addEventListener(PREVIEW, ({ detail }) => {
      for (const [host, { curve, training }] of folded) {
        if (training !== String(detail.nodeId)) continue;
        const shown = window.LiteGraph.vueNodesMode || host.widgets.some((widget) => widget.name.startsWith("$$"));
        curve.showImage(shown ? null : detail.blob);
        resize(host, curve);
      }
    });
    for (const end of ENDS) api.addEventListener(end, unfold);
    const said = new Set(); // of this run: a node that runs for a list says the same each time
    api.addEventListener("execution_start", () => said.clear());
    api.addEventListener(WARNING, ({ detail: { text } }) => {
      if (said.has(text)) return;
      said.add(text);
      app.extensionManager.toast.add({ severity: "warn", summary: "Likeness", detail: text, life: 60000 });
    });
  },

  nodeCreated(node) {
    if (!NODES.has(node.comfyClass)) return;
    const curve = new LossCurve(node);
    curve.addWidget();
    curves.add(curve);
    const removed = node.onRemoved;
    node.onRemoved = function (...rest) {
      curves.delete(curve);
      return removed?.apply(this, rest);
    };
  },
});
