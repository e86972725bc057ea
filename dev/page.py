"""
A screenshot of serve.py's page with three of the photos in assets/photos, in Chromium.

    pip install selenium        # and Debian's chromium and chromium-driver
    python dev/page.py assets/page.png
"""
import shutil
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import serve
from checkpoint import load
from nanocaption.cli import BUNDLED, Parser, UserError, run

PHOTOS = [ROOT / "assets" / "photos" / name
          for name in ("photographer.jpg", "temple.jpg", "mountains.jpg")]
WORD = 5  # index of the word in the first caption whose attention map is shown


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("output", help="the PNG file to write")
    args = parser.parse_args()
    try:
        from selenium import webdriver
        from selenium.webdriver.common.by import By
    except ImportError:
        raise UserError("this needs selenium: pip install selenium") from None
    driver = shutil.which("chromedriver")
    if not driver:
        raise UserError("this needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    server = serve.Server(load(BUNDLED, "cpu", "float32"), serve.BUNDLED_GOOD_AT, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    for option in ("headless=new", "no-sandbox", "window-size=1000,990", "hide-scrollbars"):
        options.add_argument(f"--{option}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.get(f"http://127.0.0.1:{server.server_address[1]}/")
    chooser = browser.find_element(By.CSS_SELECTOR, "input[type=file]")
    chooser.send_keys("\n".join(str(path) for path in PHOTOS))
    captions = []
    while len(captions) < len(PHOTOS):
        time.sleep(0.5)
        captions = browser.find_elements(By.CSS_SELECTOR, ".caption:has(button)")
    words = captions[0].find_elements(By.TAG_NAME, "button")
    browser.execute_script("arguments[0].focus()", words[WORD])
    time.sleep(1)
    browser.save_screenshot(args.output)
    browser.quit()


if __name__ == "__main__":
    run(main)
