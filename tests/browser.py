"""A real JupyterLab in a headless Chromium: start a server, open a notebook, run its cells, look at what is shown."""
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--enable-unsafe-swiftshader"]
QUIET = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}


def chromium() -> str:
    "Where Chromium is; a loud failure where there is none."
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None: raise AssertionError("NO BROWSER: the Lab was not tested. Install one (apt-get install chromium) and run again.")
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(root: Path, folder: Path, patience: float = 1.):
    "JupyterLab on `root`, with settings of its own in `folder`: yields its address, with token, up to /lab."
    for name, value in QUIET.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    own = {k: str(folder / v) for k, v in {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
                                            "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython"}.items()}
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    env = {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    log = open(folder / "server.log", "w")
    process = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        _await(f"http://127.0.0.1:{port}/api?token={token}", process, folder, 60 * patience)
        yield f"http://127.0.0.1:{port}/lab{{}}?token={token}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(20)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
        log.close()


def _await(url, process, folder, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None: break
        try: return urllib.request.urlopen(url, timeout=5).read()
        except OSError: time.sleep(.3)
    raise AssertionError(f"JupyterLab did not start:\n{(folder / 'server.log').read_text()[-3000:]}")


class Notebook:
    "A notebook in JupyterLab."
    def __init__(self, page, address: str, name: str, patience: float = 1.):
        self.page, self.errors, self.patience = page, [], patience
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.goto(address.format(f"/tree/{name}"), timeout=60_000 * patience)
        page.wait_for_selector(".jp-Notebook", timeout=60_000 * patience)
        self.idle()
        self.command("application:toggle-left-area")

    def command(self, name: str, **arguments):
        "Execute a command of JupyterLab."
        return self.page.evaluate("([n, a]) => window.jupyterapp.commands.execute(n, a).then(() => true)", [name, arguments])

    def wait(self, status: str, seconds: float):
        "Wait for a status of the kernel, once there is one."
        self.page.wait_for_function("s => { const c = window.jupyterapp.shell.currentWidget?.sessionContext; "
                                    "return c && c.isReady && c.session?.kernel?.status === s && c.session.kernel.connectionStatus === 'connected'; }",
                                    arg=status, timeout=seconds * 1000 * self.patience)

    def idle(self, seconds: float = 60.):
        "Wait until the kernel does nothing: a cell that is run before there is a kernel is silently not run."
        self.wait("idle", seconds)

    def running(self, index: int) -> bool:
        "Has this cell begun, or does it wait its turn, and not ended? (The kernel's status tells of subshells too, which serve widgets meanwhile.)"
        return self.page.evaluate("i => window.jupyterapp.shell.currentWidget.content.widgets[i].inputArea.promptNode.textContent", index).startswith("[*]")

    def run(self, index: int):
        "Run one cell and do not wait."
        self.page.evaluate("i => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = i; }", index)
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell'); }")

    def output(self, index: int) -> str:
        "Text that a cell has put out."
        return self.page.evaluate("i => { const o = window.jupyterapp.shell.currentWidget.content.widgets[i].model.outputs.toJSON(); const said = "
                                  "x => x.text ?? x.evalue ?? x.data?.['text/plain'] ?? ''; return o.map(x => [].concat(said(x)).join('')).join(''); }", index)

    def theme(self, name: str):
        "JupyterLab Light or JupyterLab Dark."
        self.command("apputils:change-theme", theme=name)
        self.page.wait_for_timeout(1500)


@contextmanager
def notebook(server_address: str, name: str, size=(1280, 720), patience: float = 1.):
    "The notebook `name` in a browser of its own."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS, timeout=60_000 * patience)
        try:
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            yield Notebook(page, server_address, name, patience)
        finally: browser.close()


def snap(page, path: Path, of=None, most: int = 120_000) -> Path:
    "A screenshot with a palette, of the page or of what is seen of an element, so small that it can lie in the repository."
    clip, seen = None, page.viewport_size
    if of is not None:
        box = of.bounding_box()
        left, top = max(box["x"] - 8, 0), max(box["y"] - 4, 0)
        foot = page.locator("#jp-bottom-panel").bounding_box()
        low = min(box["y"] + box["height"] + 8, foot["y"] - 8 if foot else seen["height"])
        clip = dict(x=left, y=top, width=min(box["x"] + box["width"] + 2, seen["width"]) - left, height=low - top)
    picture = Image.open(BytesIO(page.screenshot(clip=clip) if clip else page.screenshot())).convert("RGB")
    for colours in (240, 128, 64, 32):
        data = BytesIO()
        picture.quantize(colours, Image.Quantize.FASTOCTREE, kmeans=1, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)  # rare colours stay
        if data.tell() < most: break
    path.write_bytes(data.getvalue())
    return path
