"""A visitor at the page: uploads, asks, watches the answer grow, stops it, asks again, clears."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from PIL import Image

from minigpt4.demo.start import serve_page
from minigpt4.errors import ServerError
from tests.demo.conftest import ABOUT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
USER, BOT = "#chat [data-testid=user]", "#chat [data-testid=bot]"
SEND, STOP = "#message button.submit-button", "#message button.stop-button"
TOAST = "[data-testid=toast-body]"
PASTE = """
async ([target, bytes]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
    document.querySelector(target).dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
}
"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "green.png"
    Image.new("RGB", (30, 30), "green").save(file)
    return file


def upload(page, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#message [data-testid=upload-button]")
    chooser.value.set_files([str(file)])
    page.wait_for_selector(f"#message img, #message [aria-label*='{file.name}']")


def ask(page, text: str) -> None:
    page.fill("#message textarea", text)
    page.click(SEND)


def slide(page, label: str, value: str) -> None:
    number = page.locator(f"#decoding input[type=number][aria-label*='{label}']")
    number.fill(value)
    number.press("Tab")


def answers(page) -> list[str]:
    return [text.strip() for text in page.locator(BOT).all_inner_texts()]


def wait_for_answer(page, number: int) -> str:
    """Wait until answer `number` is complete: the send button is back."""
    page.wait_for_function(f"document.querySelectorAll({BOT!r}).length >= {number}")
    page.wait_for_selector(SEND)
    return answers(page)[number - 1]


WATCH = """() => {
    window.lengths = new Set();
    new MutationObserver(() => {
        for (const answer of document.querySelectorAll("#chat [data-testid=bot]"))
            window.lengths.add(answer.innerText.length);
    }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""
"""Records within the page every length of an answer while it grows; from outside some could be missed."""


def test_upload_ask_watch_and_ask_again(visit, picture):
    page = visit()
    assert re.search(r"Model tiny · not trained · template vicuna_v0 · on cpu", page.inner_text("#head"))
    assert ABOUT in page.inner_text("#about")
    upload(page, picture)
    page.evaluate(WATCH)
    ask(page, "What is this?")
    first = wait_for_answer(page, 1)
    lengths = page.evaluate("() => [...window.lengths]")
    assert len(lengths) > 3, lengths
    assert page.locator("#chat [data-testid=user] img").count() == 1
    assert page.input_value("#message textarea") == ""
    ask(page, "And why?")
    second = wait_for_answer(page, 2)
    assert len(answers(page)) == 2
    assert answers(page)[0] == first != second
    page.click("#again")  # temperature is 0: the same answer, in the same place
    page.wait_for_selector(STOP)
    assert wait_for_answer(page, 2) == second
    assert len(answers(page)) == 2
    page.click("#clear")
    page.wait_for_function(f"document.querySelectorAll({USER!r}).length == 0")
    upload(page, picture)
    ask(page, "What is this?")
    assert wait_for_answer(page, 1) == first  # nothing from before is in its prompt


def test_stop_keeps_what_was_shown_and_the_page_continues(visit):
    page = visit()
    ask(page, "Tell me a story.")
    page.wait_for_function(f"[...document.querySelectorAll({BOT!r})].some(each => each.innerText.trim().length > 5)")
    page.click(STOP)
    page.wait_for_selector(SEND)
    stopped = answers(page)
    page.wait_for_timeout(500)
    assert answers(page) == stopped
    ask(page, "Go on.")
    again = wait_for_answer(page, 2)
    assert again
    assert answers(page) == [stopped[0], again]


def test_a_file_that_is_not_an_image_is_named_and_the_page_continues(visit, tmp_path):
    page = visit()
    wrong = tmp_path / "words.png"
    wrong.write_text("these are words")
    upload(page, wrong)
    ask(page, "What is this?")
    page.wait_for_selector(TOAST)
    assert "words.png: this is not an image" in page.inner_text(TOAST)
    assert str(tmp_path.parent) not in page.inner_text(TOAST)
    assert page.locator(USER).count() == 0
    assert page.input_value("#message textarea") == "What is this?"
    page.click(SEND)
    assert wait_for_answer(page, 1)


def test_an_example_and_a_pasted_image(visit, picture):
    page = visit()
    page.click("#chat button.example")
    wait_for_answer(page, 1)
    assert page.locator(USER).last.inner_text() == "What is in the example?"
    page.evaluate(PASTE, ["#message textarea", list(picture.read_bytes())])
    page.wait_for_selector("#message img")
    page.click(SEND)
    wait_for_answer(page, 2)
    assert page.locator(USER).last.inner_text() == "Describe this image in detail."
    assert page.locator("#chat [data-testid=user] img").count() == 2
    assert page.locator("[aria-label=Share]:visible").count() == 0


def test_two_visitors_at_once_do_not_mix(visit, picture):
    one, other = visit(), visit()
    upload(one, picture)
    ask(one, "What is this?")
    ask(other, "Who are you?")
    mine, theirs = wait_for_answer(one, 1), wait_for_answer(other, 1)
    assert mine != theirs
    assert one.locator(USER).last.inner_text() == "What is this?"
    assert other.locator(USER).last.inner_text() == "Who are you?"
    alone = visit()
    ask(alone, "Who are you?")
    assert wait_for_answer(alone, 1) == theirs


def test_the_sliders(visit):
    page = visit()
    page.click("#again")
    page.wait_for_selector(f"{TOAST}:has-text('no complete answer')")
    slide(page, "Longest answer", "3")
    ask(page, "Who are you?")
    short = wait_for_answer(page, 1)
    other = visit()
    ask(other, "Who are you?")
    assert wait_for_answer(other, 1).startswith(short)
    assert len(wait_for_answer(other, 1)) > len(short)
    slide(page, "Temperature", "1")  # the page sends a whole number
    ask(page, "Who are you?")
    assert wait_for_answer(page, 2)
    slide(page, "Beams", "2")
    ask(page, "Who are you?")
    assert wait_for_answer(page, 3)


def test_only_this_machine_is_served_and_no_endpoint_is_listed(address):
    place = urlsplit(address)
    assert place.hostname == "127.0.0.1"
    others = {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for host in others - {"127.0.0.1"}:
        with pytest.raises(OSError, match="refused"), socket.create_connection((host, place.port), timeout=5):
            pass
    with urlopen(f"{address}gradio_api/info") as answer:
        assert b'"named_endpoints":{}' in answer.read().replace(b" ", b"")


def test_a_taken_port_is_one_error(address, loaded):
    place = urlsplit(address)
    with pytest.raises(ServerError, match=f"cannot serve the page on 127.0.0.1 port {place.port}"):
        serve_page(lambda: loaded, "tiny", host="127.0.0.1", port=place.port, share=False)


def test_without_the_extra_the_message_names_it():
    code = "import sys; sys.modules['gradio'] = None\nfrom minigpt4.cli import main\nsys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the demo page needs the package 'gradio': pip install 'minigpt4[demo]'\n"
