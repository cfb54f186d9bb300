"""The page at `/` in a real browser, without a head."""

import json
import shutil
import time
import urllib.request

import numpy as np
import pytest
from serving_live import Scripted, live, saying

from gemma_jax import Image
from gemma_jax.inference.requests import Piece
from gemma_jax.serving.auth import Keys

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium here: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    home = tmp_path_factory.mktemp("browser")
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={home}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


class Page:
    """What a person does with the page, and sees."""

    def __init__(self, driver, server):
        self.driver = driver
        driver.get_log("browser")
        driver.get(server.url + "/")
        driver.execute_script("sessionStorage.clear()")
        driver.get(server.url + "/")

    def find(self, query: str):
        return self.driver.find_elements("css selector", query)

    def see(self, query: str) -> str:
        """The text of what can be seen; empty if there is nothing."""
        return "\n".join(one.text for one in self.find(query) if one.is_displayed())

    def wait(self, condition, seconds: float = 60):
        until = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < until, (self.see("body"), self.driver.get_log("browser"))
            time.sleep(0.02)
        return found

    def write(self, text: str, query: str = "#text"):
        self.wait(lambda: self.find(query)[0].is_displayed())
        self.find(query)[0].send_keys(text)

    def answer(self) -> str:
        """The last answer, once it is there in full."""
        self.wait(lambda: self.find(".turn.assistant") and not self.find(".busy"))
        return self.find(".turn.assistant .text")[-1].get_attribute("textContent")


@pytest.fixture
def page(browser, scripted):
    scripted.engine.script = lambda request: iter([])
    shown = Page(browser, scripted)
    shown.wait(lambda: shown.see("#title") == "tiny")
    yield shown
    wrong = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not [line for line in wrong if "status of 4" not in line]


def test_a_streamed_answer(page, scripted, tokenizer):
    scripted.engine.script = saying(tokenizer, "Paris is the capital of the country.", wait=0.15)
    page.write("the capital?\n")
    first = page.wait(lambda: page.see(".turn.assistant .text"))
    assert first != "Paris is the capital of the country."
    page.wait(lambda: "tokens/s" in page.see("#speed"))
    assert page.find("#stop")[0].is_displayed() and not page.find("#send")[0].is_displayed()
    assert page.answer() == "Paris is the capital of the country."
    count = len(tokenizer.encode("Paris is the capital of the country.")) + 1  # with its end
    words = page.see(".turn.assistant .note")
    assert words.startswith(f"{count} tokens · ") and " tokens/s · first after " in words
    assert 0 < float(words.split(" · ")[1].split()[0]) < 7  # 1 / 0.15 s at most
    assert page.see(".turn.user") == "the capital?" and not page.see("#error")

    scripted.engine.script = saying(tokenizer, "Yes")
    page.write("two\n")  # a second question has the first before it
    page.wait(lambda: len(page.find(".turn.assistant")) == 2)
    assert page.answer() == "Yes"
    text = tokenizer.decode(scripted.engine.requests[-1].prompt.token_ids)
    assert "the capital?" in text and "Paris is the capital of the country." in text


def test_sampling(page, scripted, tokenizer):
    scripted.engine.script = saying(tokenizer, "Yes", reason="length")
    page.find("#settings-button")[0].click()
    page.write("0.5", "#temperature")
    page.write("7", "#max-tokens")
    page.write("the rules", "#system")
    page.write("the\n")
    assert page.answer() == "Yes" and "cut off" in page.see(".note")
    request = scripted.engine.requests[-1]
    assert (request.sampling.temperature, request.max_new_tokens) == (0.5, 7)
    assert "the rules" in tokenizer.decode(request.prompt.token_ids)


def test_what_a_model_writes_is_text(page, scripted, tokenizer):
    attack = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    scripted.engine.script = saying(tokenizer, attack)
    page.write(attack + "\n")
    assert page.answer() == attack
    assert page.see(".turn.user") == attack
    assert not page.find("main img") and not page.find("main script")
    assert page.driver.title == "tiny"


def test_scripts_of_others_do_not_run(page):
    """Were something let in after all, the policy would stop it."""
    outcome = page.driver.execute_script(
        "const p = document.createElement('p'); document.body.append(p);"
        "try { p.innerHTML = '<img src=x onerror=\"document.title=1\">'; return 'taken' }"
        "catch (error) { return error.name }"
    )
    assert outcome == "TypeError"
    policy = urllib.request.urlopen(page.driver.current_url).headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    page.driver.get_log("browser")


def test_stop(page, scripted, tokenizer):
    def endless(request):
        while True:
            yield Piece(token_ids=tokenizer.encode("Paris "))
            yield 0.05

    scripted.engine.script = endless
    page.write("on and on\n")
    page.wait(lambda: "Paris Paris" in page.see(".turn.assistant .text"))
    page.find("#stop")[0].click()
    assert scripted.engine.tickets[-1].cancelled.wait(5)
    assert page.answer().startswith("Paris Paris")
    assert "stopped" in page.see(".note") and not page.see("#error")


def test_errors_are_one_line(page, scripted, tokenizer):
    scripted.engine.script = lambda request: ValueError("the prompt holds nothing")
    page.write("the capital\n")
    page.wait(lambda: page.see("#error") == "the prompt holds nothing")
    assert page.find("#text")[0].get_property("value") == "the capital"  # to be sent again
    assert not page.find(".turn")
    scripted.engine.script = saying(tokenizer, "Yes")
    page.find("#send")[0].click()
    assert page.answer() == "Yes" and not page.see("#error")


def test_a_key(browser, served_by, tokenizer):
    engine = Scripted()
    engine.script = saying(tokenizer, "Yes")
    with live(served_by(engine), keys=Keys({"ann": "sk-of-ann-1"})) as closed:
        page = Page(browser, closed)
        page.wait(lambda: page.see("#key-form"))
        assert not page.see("#error")
        page.write("sk-of-nobody\n", "#key")
        page.wait(lambda: page.see("#error") == "The server does not know this key.")
        page.find("#key")[0].clear()
        page.write("sk-of-ann-1\n", "#key")
        page.wait(lambda: not page.see("#key-form") and not page.see("#error"))
        page.write("the\n")
        assert page.answer() == "Yes" and engine.requests[-1].owner == "ann"
        kept = browser.execute_script("return [{...sessionStorage}, localStorage.length]")
        assert kept == [{"gemma-jax-key": "sk-of-ann-1"}, 0]


def test_a_picture(browser, talker, tmp_path):
    """Of a model that sees: it is shown, and the model gets it."""
    page = Page(browser, talker)
    page.wait(lambda: page.see("#attach"))
    file = tmp_path / "red.png"
    Image(np.full((40, 60, 3), (200, 30, 30), np.uint8)).to_pil().save(file)
    page.find("#files")[0].send_keys(str(file))
    assert page.wait(lambda: page.find("#attached img"))[0].get_property("naturalWidth") == 60
    page.find("#settings-button")[0].click()
    page.write("5", "#max-tokens")
    page.write("the\n")
    page.answer()
    assert page.find(".turn.user img")[0].get_property("naturalWidth") == 60
    assert not page.see("#error") and not page.find("#attached li")
    assert " token" in page.see(".turn.assistant .note")
    line = next(json.loads(one) for one in reversed(talker.lines) if "chat/completions" in one)
    assert line["status"] == 200 and line["prompt_tokens"] > 10


def test_narrow(page):
    page.driver.set_window_size(360, 640)
    try:
        wide = page.driver.execute_script(
            "return document.documentElement.scrollWidth - window.innerWidth"
        )
        assert wide <= 0
        assert page.find("#send")[0].is_displayed() and page.find("#text")[0].size["width"] > 100
    finally:
        page.driver.set_window_size(1200, 900)
