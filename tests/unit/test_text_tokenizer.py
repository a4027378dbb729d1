"""Tokenizer and chat template, read from a model folder."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from tiny_tokenizers import CHAT_TEMPLATE, byte_fallback, byte_level, metaspace, save_model_folder

from text.chat_template import ChatTemplate, ChatTemplateError
from text.tokenizer import Tokenizer, TokenizerError

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a fox?"}]


def test_folder_round_trip(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_model_folder(tmp_path))
    ids = tokenizer.encode("grüße 😀")
    assert tokenizer.decode(ids) == "grüße 😀"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>grüße 😀"
    assert tokenizer.encode("grüße 😀", add_special_tokens=False) == ids[1:]
    assert max(ids) < tokenizer.vocab_size


def test_end_tokens_come_from_all_configurations(tmp_path: Path) -> None:
    save_model_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert set(tokenizer.eos_token_ids) == {7, 9, *tokenizer.encode("<|im_end|>", add_special_tokens=False)}
    assert tokenizer.special_ids >= set(tokenizer.encode("<|im_end|>"))


def test_missing_and_malformed_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)
    save_model_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TokenizerError, match="holds a list"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_of_tokens_join_to_the_text(make) -> None:
    tokenizer = make()
    text = "the 😀 中 end"
    joined = b"".join(tokenizer.bytes_of(id_) for id_ in tokenizer.encode(text, add_special_tokens=False))
    assert joined.decode().strip() == text


def test_special_and_unknown_tokens_have_bytes_too() -> None:
    tokenizer = byte_level()
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert tokenizer.bytes_of(end) == b"<|im_end|>"
    assert tokenizer.bytes_of(tokenizer.vocab_size + 5) == b""
    (word,) = metaspace().encode("a", add_special_tokens=False)
    assert metaspace().bytes_of(word) == b"a"


def test_template_from_either_place(tmp_path: Path) -> None:
    save_model_folder(tmp_path)
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    expected = "<s><|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na fox?<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(MESSAGES) == expected
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}|{{ eos_token }}")
    other = ChatTemplate.load(tmp_path)
    assert other is not None
    assert other.render(MESSAGES) == "be brief|<|im_end|>"


def test_named_templates_use_the_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == "yes"
    assert template.for_tools is not None
    assert template.for_tools.render(MESSAGES) == "no"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("never")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.for_tools is not None
    assert template.for_tools.render(MESSAGES) == "never"
    own = tmp_path / "own.jinja"
    own.write_text("mine")
    template = ChatTemplate.load(tmp_path, file=own)
    assert template is not None
    assert (template.render(MESSAGES), template.for_tools) == ("mine", None)
    assert ChatTemplate.load(tmp_path / "elsewhere") is None


def test_what_templates_expect_beyond_jinja() -> None:
    source = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %} {{ strftime_now('%Y') }} {{ mood }}"
    )
    template = ChatTemplate(source, now=lambda: datetime.datetime(2031, 1, 2))
    rendered = template.render([{"content": "grüße <b>"}, {"content": "x"}], variables={"mood": "calm"})
    assert rendered == '{"content": "grüße <b>"} 2031 calm'


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
    ],
)
def test_refusals_name_the_template(source: str, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        ChatTemplate(source).render(MESSAGES)


def test_malformed_template() -> None:
    with pytest.raises(ChatTemplateError, match="not valid jinja"):
        ChatTemplate("{% for %}")


def test_rendering_uses_no_stale_state() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, special_tokens={"bos_token": "<s>"})
    assert template.render(MESSAGES, add_generation_prompt=False) == template.render(
        MESSAGES, add_generation_prompt=False
    )
