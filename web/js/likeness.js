// The live loss curve on training nodes. Works in canvas and in Vue rendering: a DOM widget, no canvas drawing.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const EVENT = "likeness.progress";
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
const SVG = "http://www.w3.org/2000/svg";
const curves = new Set();

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
    this.element.append(this.text, this.picture);
    this.clear();
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

app.registerExtension({
  name: "comfyuilikeness.loss",

  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      for (const curve of curves) if (curve.isFor(detail.node)) curve.show(detail);
    });
  },

  nodeCreated(node) {
    if (!NODES.has(node.comfyClass)) return;
    const curve = new LossCurve(node);
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => 120 };
    const widget = node.addDOMWidget("loss_curve", "likeness_loss", curve.element, options);
    widget.serialize = false; // the older page reads it here, the newer one in the options
    curves.add(curve);
    const removed = node.onRemoved;
    node.onRemoved = function (...rest) {
      curves.delete(curve);
      return removed?.apply(this, rest);
    };
  },
});
