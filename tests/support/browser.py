"""A headless Chromium before the page of `segformer app`, as the tests and `make screenshot` use it.

Chromium and its driver are the system's (`apt-get install chromium chromium-driver`); Selenium speaks with them, and
fetches nothing.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

WIDTH, HEIGHT = 1280, 800
_PATIENCE = 60  # seconds
_FETCH = """
const done = arguments[1];
fetch(arguments[0]).then(answer => answer.blob()).then(blob => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.readAsDataURL(blob);
});
"""


class Page:
    """The page in a browser, and what one can do with it.

    Args:
        driver: of Selenium.
        downloads: folder that the browser saves to.
    """

    def __init__(self, driver: webdriver.Chrome, downloads: Path):
        self.driver, self.downloads = driver, downloads

    def open(self, address: str) -> None:
        """Load it, and wait until it takes images."""
        self.driver.get(address)
        self.wait(lambda: self.find("#upload input[type=file]"), "the page's upload")

    def find(self, selector: str) -> list:
        """The elements that a CSS selector finds."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition, what: str):
        """Wait until the condition returns a true value, and return it."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except Exception as error:  # an element that was replaced meanwhile
                if "stale element" not in str(error):
                    raise
            time.sleep(0.1)
        raise AssertionError(f"waited {_PATIENCE} s for {what}")

    def upload(self, path: Path) -> None:
        """Give a file."""
        self.find("#upload input[type=file]")[0].send_keys(str(path))

    def source(self) -> str:
        """The address of the overlay that is shown; empty before the first."""
        shown = self.find("#image img")
        return shown[0].get_attribute("src") if shown else ""

    def changed(self, before: str) -> Image.Image:
        """The next overlay."""
        return self.overlay(self.wait(lambda: self.source() not in ("", before) and self.source(), "a new overlay"))

    def overlay(self, source: str | None = None) -> Image.Image:
        """The overlay as the browser gets it."""
        content = self.driver.execute_async_script(_FETCH, source or self.source())
        return Image.open(BytesIO(base64.b64decode(content.split(",", 1)[1]))).convert("RGB")

    def classes(self) -> dict[str, bool]:
        """Names in the list, and whether they are switched on."""
        rows = self.find("#classes .wrap label")
        return {row.text.strip(): row.find_element(By.TAG_NAME, "input").is_selected() for row in rows}

    def switch(self, name: str) -> None:
        """Switch a class on or off."""
        [row] = [row for row in self.find("#classes .wrap label") if row.text.strip() == name]
        row.find_element(By.TAG_NAME, "input").click()

    def fade_out(self) -> None:
        """Opacity 0, by the keyboard."""
        self.find("#opacity input[type=range]")[0].send_keys(Keys.HOME)

    def download(self, button: str) -> Path:
        """Press a button and wait for the file."""
        before = set(self.downloads.iterdir())
        self.wait(lambda: self.find(f"#{button}:not([disabled])"), f"the button {button}")[0].click()

        def arrived():
            new = [path for path in set(self.downloads.iterdir()) - before if not path.name.startswith(".")]
            return [path for path in new if path.suffix not in (".crdownload", ".tmp")]

        return self.wait(arrived, "the download")[0]

    def requests(self) -> set[str]:
        """The addresses of all that the page asked for since the last call."""
        addresses = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.add(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                addresses.add(message["params"]["url"])
        return addresses


@contextmanager
def browser(downloads: Path) -> Iterator[Page]:
    """A Chromium without a window that saves to a folder and writes down what it asks for."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for switch in ("headless=new", f"window-size={WIDTH},{HEIGHT}", "hide-scrollbars", "disable-dev-shm-usage"):
        options.add_argument(f"--{switch}")
    if os.getuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or ""))
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield Page(driver, downloads)
    finally:
        driver.quit()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """`segformer app FOLDER` in a process of its own; gives the page's address."""
    page = subprocess.Popen(
        [sys.executable, "-m", "hf_segformer", "app", str(folder), "--device", "cpu"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        line = page.stdout.readline()
        assert " is at http" in line, f"no page: {line}"
        yield line.split(" is at ")[1].split()[0]
    finally:
        page.terminate()
        page.wait(timeout=60)
        page.stdout.close()
