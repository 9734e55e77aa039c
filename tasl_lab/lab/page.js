// Tells whether the page is dark: JupyterLab says so in an attribute of its body, other pages by their ground.
function dark() {
  const said = document.body.dataset.jpThemeLight;
  if (said) return said === "false";
  const shade = getComputedStyle(document.body).backgroundColor.match(/\d+(\.\d+)?/g)?.map(Number) || [255, 255, 255];
  return shade.length < 4 || shade[3] > 0 ? (shade[0] + shade[1] + shade[2]) / 3 < 110 : false;
}

function render({ model, el }) {
  el.style.display = "none";
  const tell = () => { model.set("dark", dark()); model.set("seen", true); model.save_changes(); };
  const watch = new MutationObserver(tell);
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class", "style"] });
  tell();
  return () => watch.disconnect();
}

export default { render };
