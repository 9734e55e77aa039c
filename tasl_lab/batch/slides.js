// One section at a time: arrows, the keys of a presenter, Home and End turn the page; c hides the code.
const all = [...document.querySelectorAll("section")];
const [back, on] = document.querySelectorAll("nav button");
const told = document.querySelector("nav span");
const keys = { ArrowRight: 1, PageDown: 1, ArrowLeft: -1, PageUp: -1, Home: -1e9, End: 1e9 };
let now = 0;

function show(k) {
  now = Math.min(all.length - 1, Math.max(0, k));
  all.forEach((s, i) => s.classList.toggle("on", i === now));
  told.textContent = `${now + 1} of ${all.length}`;
  history.replaceState(null, "", `#${now + 1}`);
  scrollTo(0, 0);
}

addEventListener("keydown", e => {
  if (e.ctrlKey || e.altKey || e.metaKey) return;
  if (e.key in keys) { e.preventDefault(); show(now + keys[e.key]); }
  if (e.key === "c") document.body.classList.toggle("plain");
});
back.onclick = () => show(now - 1);
on.onclick = () => show(now + 1);
show((parseInt(location.hash.slice(1)) || 1) - 1);
