"use strict";
// Charts can be read off with the pointer, or with the slider below them. The values are in their data-values.
for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.dataset.values);
  const slider = chart.querySelector("input[type=range]");
  if (!slider) continue;
  const plot = chart.querySelector(".plot");
  const place = chart.querySelector(".place");
  const values = chart.querySelectorAll(".value");
  const samples = chart.querySelectorAll(".sample path");
  const add = (name, attributes) => {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    shape.style.display = "none";
    plot.append(shape);
    return shape;
  };
  const guide = add("line", { class: "guide", y1: 0, y2: data.bottom });
  const marks = data.lines.map((_, i) => {
    const mark = add("circle", { class: "mark", r: 4 });
    mark.style.fill = samples[i].style.stroke;
    return mark;
  });
  const show = (index, drawn) => {
    const at = `${data.name} ${data.along[index]}`;
    place.textContent = at;
    data.lines.forEach((line, i) => {
      values[i].textContent = line.values[index];
      const there = drawn && line.y[index] !== null;
      marks[i].style.display = there ? "" : "none";
      if (there) {
        marks[i].setAttribute("cx", data.x[index]);
        marks[i].setAttribute("cy", line.y[index]);
      }
    });
    guide.style.display = drawn ? "" : "none";
    guide.setAttribute("x1", data.x[index]);
    guide.setAttribute("x2", data.x[index]);
    slider.value = index;
    slider.setAttribute("aria-valuetext", `${at}: ` + data.lines.map((l) => `${l.label} ${l.values[index]}`).join("; "));
  };
  const nearest = (event) => {
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width;
    let best = 0;
    data.x.forEach((each, i) => { if (Math.abs(each - x) < Math.abs(data.x[best] - x)) best = i; });
    return best;
  };
  plot.addEventListener("pointermove", (event) => show(nearest(event), true));
  plot.addEventListener("pointerdown", (event) => show(nearest(event), true));
  slider.addEventListener("input", () => show(Number(slider.value), true));
  slider.hidden = false;
  show(data.x.length - 1, false);
}
