// Draws every figure from the JSON that stands beside it, follows the reader in the navigation, and refits the figures for paper.
"use strict";
(() => {
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const plots = [...document.querySelectorAll(".plot")];
  const draw = (el) => {
    const figure = JSON.parse(document.getElementById(el.dataset.figure).textContent);
    return Plotly.newPlot(el, figure.data, figure.layout, config);
  };
  Promise.all(plots.map(draw)).then(() => document.documentElement.setAttribute("data-drawn", plots.length));

  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
  const sections = [...document.querySelectorAll("main section[id]")];
  const mark = () => {
    const above = sections.filter((s) => s.getBoundingClientRect().top < 140);
    const atEnd = window.innerHeight + window.scrollY >= document.body.scrollHeight - 4;
    const now = atEnd && window.scrollY > 0 ? sections[sections.length - 1] : above[above.length - 1] || sections[0];
    links.forEach((a, id) => (now && id === now.id ? a.setAttribute("aria-current", "true") : a.removeAttribute("aria-current")));
  };
  addEventListener("scroll", mark, { passive: true });
  mark();

  const refit = (width) => plots.forEach((el) => Plotly.relayout(el, width ? { width, autosize: false } : { width: null, autosize: true }));
  addEventListener("beforeprint", () => refit(1000));
  addEventListener("afterprint", () => refit(0));
})();
