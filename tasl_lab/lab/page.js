// The page of a panel. Tells whether it is dark: JupyterLab says so in an attribute of its body, other pages by their ground.
function dark() {
  const said = document.body.dataset.jpThemeLight;
  if (said) return said === "false";
  const shade = getComputedStyle(document.body).backgroundColor.match(/\d+(\.\d+)?/g)?.map(Number) || [255, 255, 255];
  return shade.length < 4 || shade[3] > 0 ? (shade[0] + shade[1] + shade[2]) / 3 < 110 : false;
}

// A list or a number is moved by the arrow keys; JupyterLab, which would move on to the next cell, is not to hear of it.
function quiet(event) {
  const asked = event.ctrlKey || event.metaKey || event.altKey || event.key === "Escape" || (event.shiftKey && event.key === "Enter");
  if (!asked) event.stopPropagation();
}

function render({ model, el }) {
  let panel = null, timer = 0;
  const find = () => { panel = el.closest(".tasl"); if (panel) panel.addEventListener("keydown", quiet); else timer = setTimeout(find, 100); };
  find();
  el.style.display = "none";
  const tell = () => { model.set("dark", dark()); model.set("seen", true); model.save_changes(); };
  const watch = new MutationObserver(tell);
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class", "style"] });
  tell();
  return () => { watch.disconnect(); clearTimeout(timer); if (panel) panel.removeEventListener("keydown", quiet); };
}

export default { render };
