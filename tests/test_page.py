"""Tests of serve.py's page in Chromium, with the bundled checkpoint."""
import base64
import json
import os
import re
import shutil
import threading
import time

import pytest

import serve
from checkpoint import load
from helpers import HERE
from nanocaption.cli import BUNDLED
from nanocaption.generate import caption

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("chromium and chromedriver (Debian: chromium, chromium-driver) are not installed",
                allow_module_level=True)

PHOTOS = [HERE / "assets" / "photos" / name for name in ("grass.jpg", "photographer.jpg")]


@pytest.fixture(scope="module")
def captioner():
    return load(BUNDLED, "cpu", "float32")


@pytest.fixture(scope="module")
def address(captioner):
    server = serve.Server(captioner, serve.BUNDLED_GOOD_AT, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05)).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # root has no sandbox
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    """The browser, at the page, with an ordinary window in light mode."""
    show_as(browser, 1280, "light")
    browser.get(address)
    return browser


def show_as(browser, width, scheme):
    """Sets the width of the window, in pixels, and light or dark mode."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = dict(name="prefers-color-scheme", value=scheme)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[scheme]))


def give(page, files, how="drop"):
    """Drops or pastes files, {name: bytes}, and waits for their captions."""
    before = len(find(page, ".card"))
    contents = [[name, base64.b64encode(data).decode()] for name, data in files.items()]
    page.execute_script("""
        const transfer = new DataTransfer();
        for (const [name, data] of arguments[0]) {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            transfer.items.add(new File([bytes], name));
        }
        const event = arguments[1] === "drop"
            ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true});
        document.body.dispatchEvent(event);
    """, contents, how)
    wait_for_captions(page, before + len(files))


def wait_for_captions(page, n_cards):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        texts = [item.text for item in find(page, ".caption")]
        if len(texts) == n_cards and "…" not in texts:
            return
        time.sleep(0.05)
    raise AssertionError(f"after a minute the captions are {texts}")


def find(parent, selector):
    return parent.find_elements(By.CSS_SELECTOR, selector)


def photo_files():
    return {path.name: path.read_bytes() for path in PHOTOS}


def pixels(page, card):
    """The overlay of a card: None while hidden, else a list of rows of (red, green, blue)."""
    values = page.execute_script("""
        const canvas = arguments[0].querySelector("canvas");
        if (canvas.offsetParent === null) return null;
        const context = canvas.getContext("2d");
        return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
    """, card)
    if values is None:
        return None
    size = round((len(values) / 4) ** 0.5)
    colors = [tuple(values[i:i + 3]) for i in range(0, len(values), 4)]
    return [colors[y * size:(y + 1) * size] for y in range(size)]


def luminance(color):
    """WCAG's relative luminance of red, green and blue in 0..255."""
    linear = []
    for value in color:
        value = value / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def color_of(page, element, name):
    """A computed color, as red, green and blue."""
    script = "return getComputedStyle(arguments[0])[arguments[1]]"
    value = page.execute_script(script, element, name)
    return [int(number) for number in re.findall(r"\d+", value)[:3]]


def test_two_photos_and_a_broken_file(page, captioner):
    give(page, {**photo_files(), "broken.jpg": b"no image"})
    cards = find(page, ".card")
    expected = caption(captioner, PHOTOS, attention=True)
    for card, path, (text, words) in zip(cards, PHOTOS, expected):
        assert find(card, ".name")[0].text == path.name
        assert [button.text for button in find(card, ".caption button")] == text.split()
        assert find(card, "img")[0].get_attribute("alt") == text
        chances = find(card, ".chance")
        assert len(chances) == 5
        assert all(0 < float(chance.text.strip("<%")) < 100 for chance in chances)
        assert len({row.text for row in find(card, ".others li")} | {text}) == 5
        assert not find(card, ".error")[0].is_displayed()
        # the canvas covers the photo, whose shape is unchanged
        image, canvas = page.execute_script("""
            const image = arguments[0].querySelector("img");
            const shape = image.naturalWidth / image.naturalHeight;
            return [shape, arguments[0].querySelector(".frame").getBoundingClientRect()];
        """, card)
        assert canvas["width"] / canvas["height"] == pytest.approx(image, rel=0.01)
    [broken] = cards[2:]
    assert find(broken, ".error")[0].text == "not a readable image: cannot identify image file"
    assert find(broken, ".name")[0].text == "broken.jpg"
    assert not find(broken, "img")[0].is_displayed()
    assert find(page, "h1 + p")[0].text.startswith("Good at photos of people and dogs outdoors")
    # the server's refusal of the broken file, and nothing against the Content-Security-Policy
    [entry] = page.get_log("browser")
    assert "400 (Bad Request)" in entry["message"]


def test_focused_and_hovered_words_show_where_they_looked(page, captioner):
    give(page, photo_files())
    card = find(page, ".card")[1]
    _, words = caption(captioner, PHOTOS[1], attention=True)
    buttons = find(card, ".caption button")
    assert pixels(page, card) is None
    seen = []
    # from the settings by keyboard, through the first card
    find(page, "#clear")[0].send_keys(Keys.TAB)
    for _ in range(40):
        active = page.switch_to.active_element
        if active == buttons[0]:
            break
        active.send_keys(Keys.TAB)
    for button, (word, weights) in zip(buttons, words, strict=True):
        assert page.switch_to.active_element == button
        assert "on" in button.get_attribute("class").split()
        shown = pixels(page, card)
        seen.append(shown)
        assert len(shown) == len(weights) == 10
        # the more attention, the brighter; the most is viridis's yellow
        y, x = divmod(int(weights.argmax()), 10)
        assert shown[y][x] == pytest.approx((253, 231, 37), abs=2)
        places = [(y, x) for y in range(10) for x in range(10)]
        places.sort(key=lambda place: weights[place])
        brightness = [luminance(shown[y][x]) for y, x in places]
        assert all(b >= a - 0.01 for a, b in zip(brightness, brightness[1:]))
        assert "looked at the " in button.get_attribute("title")
        button.send_keys(Keys.TAB)
    assert pixels(page, card) is None
    assert all(a != b for a, b in zip(seen, seen[1:]))
    actions = webdriver.ActionChains(page)
    actions.move_to_element(buttons[3]).perform()
    assert pixels(page, card) == seen[3]
    actions.move_to_element(find(page, "h1")[0]).perform()
    assert pixels(page, card) is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(page, scheme):
    show_as(page, 360, scheme)
    give(page, {**photo_files(), ("long name " * 20) + ".jpg": b"no image"})
    assert page.execute_script("return document.documentElement.scrollWidth") == 360
    for card in find(page, ".card"):
        assert card.rect["x"] >= 0 and card.rect["x"] + card.rect["width"] <= 360
    back = luminance(color_of(page, find(page, "body")[0], "backgroundColor"))
    assert back > 0.8 if scheme == "light" else back < 0.05
    card_color = luminance(color_of(page, find(page, ".card")[0], "backgroundColor"))
    # WCAG AA's contrast of text
    for selector, behind in ((".soft", back), ("h1", back), (".caption button", card_color),
                             (".chance", card_color), (".name", card_color),
                             (".error", card_color)):
        text = luminance(color_of(page, find(page, selector)[-1], "color"))
        low, high = sorted([text, behind])
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector


def test_a_finger(page):
    """Without hovering: a word stays chosen after the tap, and there is a button for the camera."""
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", dict(enabled=True))
    try:
        show_as(page, 360, "light")
        assert find(page, ".camera")[0].is_displayed()
        give(page, photo_files())
        card = find(page, ".card")[0]
        buttons = find(card, ".caption button")
        seen = []
        for button in buttons[1:3]:
            page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
            box = page.execute_script("return arguments[0].getBoundingClientRect()", button)
            point = dict(x=box["x"] + box["width"] / 2, y=box["y"] + box["height"] / 2)
            for event in (dict(type="touchStart", touchPoints=[point]),
                          dict(type="touchEnd", touchPoints=[])):
                page.execute_cdp_cmd("Input.dispatchTouchEvent", event)
            time.sleep(0.4)
            assert "on" in button.get_attribute("class").split()
            seen.append(pixels(page, card))
        assert None not in seen and seen[0] != seen[1]
    finally:
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", dict(enabled=False))


def test_every_field_has_a_name(page):
    give(page, photo_files())
    elements = page.execute_script("""
        const found = document.querySelectorAll("button, select, input, img, article, section");
        return [...found].filter(element => element.getClientRects().length);
    """)
    assert {element.tag_name for element in elements} >= {"button", "select", "input", "img"}
    for element in elements:
        assert element.accessible_name.strip(), element.get_attribute("outerHTML")
    assert find(page, "[role=status]")[0].get_attribute("textContent").count(".jpg: ") == 1


def test_settings_copy_download_and_clear(page, captioner, tmp_path):
    give(page, photo_files(), how="paste")
    texts = caption(captioner, PHOTOS)
    for number, kind in (("2", "wider beam"), ("8", "samples"), ("0", "samples")):
        for box, choice in (("#others", number), ("#sampling", kind)):
            find(page, box)[0].send_keys(choice)
            wait_for_captions(page, 2)
        rows = [len(find(card, ".others li")) for card in find(page, ".card")]
        assert rows == [int(number)] * 2
        assert [find(card, "img")[0].get_attribute("alt") for card in find(page, ".card")] == texts

    page.execute_cdp_cmd("Browser.grantPermissions", dict(
        permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]))
    button = find(page, ".copy")[1]
    # copying takes a while, and the label goes back after 1.5 seconds: keep what it changes to
    page.execute_script("""
        const [button] = arguments;
        window.label = new Promise(resolve => {
            new MutationObserver(() => resolve(button.textContent))
                .observe(button, {childList: true});
        });
    """, button)
    button.click()
    assert page.execute_async_script("window.label.then(arguments[0])") == "Copied"
    assert find(page, "#status")[0].get_attribute("textContent") == "Copied"
    copied = page.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == texts[1]

    page.execute_cdp_cmd("Browser.setDownloadBehavior", dict(
        behavior="allow", downloadPath=str(tmp_path)))
    find(page, "#download")[0].click()
    path = tmp_path / "captions.jsonl"
    end = time.monotonic() + 30
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["image"] for line in lines] == [path.name for path in PHOTOS]
    assert [line["captions"][0]["text"] for line in lines] == texts
    assert {tuple(line) for line in lines} == {("image", "captions", "references")}
    assert {tuple(line["captions"][0]) for line in lines} == {("text", "logprob")}

    find(page, ".remove")[0].click()
    assert [name.text for name in find(page, ".name")] == [PHOTOS[1].name]
    find(page, "#clear")[0].click()
    assert find(page, ".card") == []
    assert not find(page, "#download")[0].is_enabled()


def test_chosen_files(page, captioner):
    find(page, "input[multiple]")[0].send_keys("\n".join(map(str, PHOTOS)))
    wait_for_captions(page, 2)
    found = [find(card, "img")[0].get_attribute("alt") for card in find(page, ".card")]
    assert found == caption(captioner, PHOTOS)


def test_a_server_that_is_gone_or_busy(page, captioner, monkeypatch):
    """The page asks a busy server again, and says when there is none."""
    answers = iter([True, False])
    original = serve.threading.BoundedSemaphore.acquire

    def acquire(self, blocking=True, timeout=None):
        if not blocking and next(answers, False):
            return False
        return original(self, blocking, timeout)

    monkeypatch.setattr(serve.threading.BoundedSemaphore, "acquire", acquire)
    path = PHOTOS[0]
    give(page, {path.name: path.read_bytes()})
    assert find(page, "img")[0].get_attribute("alt") == caption(captioner, path)
    page.execute_script("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    give(page, {path.name: path.read_bytes()})
    error = find(find(page, ".card")[1], ".error")[0].text
    assert error == "no answer from the server; is serve.py still running?"
