"""What is shown is text: neither a question, nor an answer, nor a config makes a visitor's browser fetch anything."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from minigpt4.chat.session import Chat
from minigpt4.checkpoints.assemble import LoadedModel, load_model
from minigpt4.demo.text import as_html, as_markdown
from minigpt4.errors import ImageError
from tests.demo.test_page import BOT, TOAST, USER, answers, ask, upload, wait_for_answer

pytestmark = pytest.mark.slow

TAG = '<img src="http://127.0.0.1:9/q.png">'
MARKDOWN = "![](http://127.0.0.1:9/m.png)"
ANSWER = "<img src=/x>"
ABOUT = f"""
**Bold** {TAG} {MARKDOWN} [link](http://127.0.0.1:9/l) http://127.0.0.1:9/bare \\{TAG} \\{MARKDOWN}

![][reference]

[reference]: http://127.0.0.1:9/r.png

```mermaid
flowchart TD
  A@{{ img: "http://127.0.0.1:9/d.png", label: "x" }}
```

    {TAG}

$$\\includegraphics{{http://127.0.0.1:9/k.png}}$$ &lt;img src=http://127.0.0.1:9/e.png&gt;

<style>@import url(http://127.0.0.1:9/s.css);</style><svg><image href="http://127.0.0.1:9/v.png"/></svg>
"""


def says_only(loaded: LoadedModel, text: str) -> None:
    """Change a model so that it answers `text` to everything: each token of it is followed by the next one."""
    tokenizer = loaded.conversation.tokenizer.tokenizer
    llama = loaded.model.language_model.model
    ids = tokenizer(f":{text}", add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids)
    for layer in llama.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    embeddings = llama.model.embed_tokens.weight.data
    weights = torch.zeros_like(embeddings)
    weights[tokenizer.eos_token_id] = embeddings[ids[-1]]
    for before, after in itertools.pairwise(ids):
        weights[after] = embeddings[before]
    llama.lm_head.weight.data = weights / embeddings.norm(dim=1).mean() * 20


@pytest.fixture(scope="module")
def loaded(tiny_chat_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny model whose config and answers are hostile, with small limits."""
    folder = tmp_path_factory.mktemp("hostile")
    Image.new("RGB", (40, 40), "red").save(folder / "example.png")
    values = {
        **tiny_chat_values,
        "chat": {"max_new_tokens": 20},
        "server": {"max_images": 2, "max_pixels": 1_000_000, "max_body_megabytes": 0.1},
        "demo": {
            "about": ABOUT,
            "examples": [{"image": str(folder / "example.png"), "question": f"Example {TAG}"}],
            "max_kept_megabytes": 1,
        },
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    model = load_model(file, device="cpu")
    says_only(model, ANSWER)
    return model


@pytest.fixture(scope="module")
def address(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory):
    """The page of that model, whose name is hostile too."""
    pytest.importorskip("gradio")
    from minigpt4.demo.page import build_page, launch

    chat = Chat(loaded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = build_page(chat, f"{TAG}{MARKDOWN}")
        yield launch(page, chat, host="127.0.0.1", port=None, share=False, wait=False)
        page.close()


def test_nothing_is_fetched_from_elsewhere(visit):
    """The fixture `visit` checks it."""
    page = visit()
    about = page.inner_text("#about")
    for shown in (TAG, MARKDOWN, "[reference]: http", "flowchart TD", "&lt;img", "<style>", r"$$\includegraphics"):
        assert shown in about
    assert page.locator("#about strong").inner_text() == "Bold"
    assert page.locator("#about img, #about a, #about svg, #head img").count() == 0
    assert TAG in page.inner_text("#head")
    assert f"Example {TAG}" in page.inner_text("#chat button.example")
    ask(page, f"{TAG} {MARKDOWN} a < b &amp; $$x$$")
    assert wait_for_answer(page, 1).endswith(ANSWER)
    assert page.locator(USER).last.inner_text().strip() == f"{TAG} {MARKDOWN} a < b &amp; $$x$$"
    assert page.locator(f"{USER} img, {BOT} img").count() == 0
    page.wait_for_timeout(500)


def test_a_hostile_file_name_is_text(visit, tmp_path):
    page = visit()
    wrong = tmp_path / "<img src=x onerror=fetch(1)>.png"
    wrong.write_text("these are words")
    upload(page, wrong)
    ask(page, "What is this?")
    page.wait_for_selector(TOAST)
    assert page.locator(f"{TOAST} img").count() == 0
    assert "this is not an image" in page.inner_text(TOAST)


def test_the_limits_of_the_service_hold_on_the_page(visit, tmp_path):
    files = {}
    for name, image in {
        "wide": Image.new("L", (1001, 1000)),
        "small": Image.new("RGB", (30, 30), "green"),
        "noise": Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)),
    }.items():
        files[name] = tmp_path / f"{name}.png"
        image.save(files[name])
    for names, message in (
        (("wide",), "wide.png: 1001 x 1000 pixels are more than the allowed 1,000,000"),
        (("small",) * 3, "there are 3 images; at most 2 are allowed"),
        (("noise",) * 2, "the files have 0.1 MB; at most 0.1 are allowed"),
    ):
        page = visit()
        for name in names:
            upload(page, files[name])
        ask(page, "What is this?")
        page.wait_for_selector(f"{TOAST}:has-text('allowed')")
        assert message in page.inner_text(TOAST)
        assert not answers(page)


def test_an_upload_of_several_files_has_a_total(address):
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + b"a" * 60_000 + b"\r\n"
    header = {"Content-Type": "multipart/form-data; boundary=x"}
    place = f"{address}gradio_api/upload"
    with urlopen(Request(place, part + b"--x--\r\n", header)) as answer:
        assert answer.status == 200
    with pytest.raises(HTTPError, match="413"):
        urlopen(Request(place, part * 2 + b"--x--\r\n", header))
    pieces = io.BytesIO(part * 2 + b"--x--\r\n")
    with pytest.raises(HTTPError, match=r"[45]\d\d"):  # sent in chunks: its length is not known
        urlopen(Request(place, pieces, {**header, "Transfer-Encoding": "chunked"}))


def test_all_uploads_together_have_a_total(address, tmp_path):
    """Files of an earlier hour count too; when they are deleted, uploads are accepted again."""
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="b.png"\r\n\r\n' + b"b" * 9_000
    request = Request(
        f"{address}gradio_api/upload", part + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with urlopen(request) as answer:
        (kept,) = json.load(answer)
    earlier = Path(kept).parents[1] / "earlier"
    earlier.write_bytes(bytes(1_500_000))
    try:
        with pytest.raises(HTTPError, match="507"):
            urlopen(request)
    finally:
        earlier.unlink()
    with urlopen(request) as answer:
        assert answer.status == 200


def test_the_page_keeps_features_and_a_small_picture(loaded, tmp_path):
    from minigpt4.demo.replies import Replies

    chat = Chat(loaded)
    file = tmp_path / "large.png"
    Image.new("RGB", (1000, 900), "red").save(file)
    settings = {"temperature": 0, "top_p": 1, "num_beams": 1, "max_new_tokens": 5}
    replies = Replies(chat, list(settings), [])
    *_, (_, shown, visit) = replies.send({"text": "What?", "files": [str(file)]}, [], None, *settings.values())
    (kept,) = visit.session.pictures
    assert isinstance(kept.source, Image.Image)
    assert max(kept.source.size) <= 256
    direct = chat.session([file])
    assert torch.equal(kept.features, direct.pictures[0].features)
    assert shown[-1]["content"] == as_html(direct.ask("What?", max_new_tokens=5))


def test_an_example_that_is_not_an_image_is_refused(loaded):
    """Visitors can fetch the files of examples."""
    from minigpt4.demo.page import build_page

    config = loaded.config
    secret = dataclasses.replace(config.demo.examples[0], image=__file__)
    hostile = dataclasses.replace(config, demo=dataclasses.replace(config.demo, examples=(secret,)))
    with pytest.raises(ImageError, match=r"test_hostile\.py: this is not an image"):
        build_page(Chat(dataclasses.replace(loaded, config=hostile)), "tiny")


def test_escaping_changes_only_what_has_a_meaning():
    assert as_html("1 < 2 && 3 > 2 <- x & y") == "1 < 2 && 3 > 2 <- x & y"
    assert as_html("<b>&lt;</b><!-- --><?x") == "&lt;b>&amp;lt;&lt;/b>&lt;!-- -->&lt;?x"
    assert as_markdown("  **a**\n\n- b: c.\n") == "**a**\n\n- b&#58; c&#46;"
