"""Chat templates and messages: formatted as meant, or refused by one message that names row and cause."""

import logging

import pytest

from vexact.data import PromptDataset, PromptFormat, Row, load_rows
from vexact.data.chat_template import ChatTemplate, read_template
from vexact.data.template import render
from vexact.prepare.tokenizers import PLAIN_CHAT_TEMPLATE, byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "1+2="}
SYSTEM = {"role": "system", "content": "Add."}


def chat(*messages, where=""):
    return Row(tuple(messages), "exact_match", "3", where=where)


def said(content, role="user"):
    return {"role": role, "content": content}


def tokenizer_with(template=CHATML):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def text_of(row, template=CHATML, **kwargs):
    return render(row, tokenizer_with(template), PromptFormat(apply_chat_template_kwargs=kwargs))


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}],
        [{"text": "1+2="}],
        [{"type": "text", "text": "1+2=", "image": None}],  # as parquet unifies parts
        ["1+", "2="],
        ({"type": "text", "text": "1+2="},),
    ],
)
def test_text_parts_are_joined(content):
    assert text_of(chat(said(content))) == text_of(chat(USER))
    prompt = PromptDataset([chat(said(content))], tokenizer_with())[0]
    assert prompt.text == "1+2="
    assert prompt.token_ids == PromptDataset([chat(USER)], tokenizer_with())[0].token_ids


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (said(None), r"content must be a string or a list of text parts, it is missing or null"),
        ({"role": "user"}, "missing or null"),
        (said(3), r"it is int 3"),
        (said({"type": "text", "text": "x"}), "it is dict"),
        (said([]), r"it is list \[\]"),
        (said(b"x"), "it is bytes"),
        (said([{"type": "image_url", "image_url": "x.png"}]), r"part 0 is of type 'image_url'; only parts"),
        (said([{"type": "text", "text": "x"}, {"type": "input_audio"}]), "part 1 is of type 'input_audio'"),
        (said([{"type": "text", "text": None}]), r"part 0 is \{'type': 'text'"),
        (said([{"type": "text"}]), "part 0 is"),
        (said([["x"]]), r"part 0 is \['x'\]"),
        ({"content": "x"}, r"role=None must be a name such as 'user'; keys there: content"),
        (said("x", role=3), "role=3 must be a name"),
        (said("x", role=""), "role='' must be a name"),
        (said("x") | {"tool_calls": [{"id": 1}]}, "holds tool_calls, which are not supported"),
        (said("a\ud800"), "lone surrogate"),
        (said("x", role="a\ud800"), "lone surrogate"),
        (said("x") | {"more": [{"name": "\ud800"}]}, "lone surrogate"),
        ("x", "must be a mapping with 'role' and 'content', it is 'x'"),
    ],
)
def test_a_message_that_is_no_text_is_refused_by_row(message, words):
    with pytest.raises(ValueError, match=rf"d\.jsonl, row 4, message 1.*{words}"):
        PromptDataset([chat(USER), chat(USER, message, where="d.jsonl, row 4")], tokenizer_with())


def test_no_messages_at_all():
    with pytest.raises(ValueError, match="row 0 holds no messages"):
        PromptDataset([chat()], tokenizer_with())


def test_null_keys_that_parquet_adds_are_left_out():
    template = "{% for m in messages %}{% if 'name' in m %}{{ m.name }}:{% endif %}{{ m.content }}{% endfor %}"
    assert text_of(chat(USER | {"name": None, "tool_calls": None}), template) == "1+2="
    assert text_of(chat(USER | {"name": "Ann"}), template) == "Ann:1+2="


def test_an_empty_list_of_tool_calls_is_none():
    template = "{% for m in messages %}{% if 'tool_calls' not in m %}{{ m.content }}{% endif %}{% endfor %}"
    assert text_of(chat(USER | {"tool_calls": []}), template) == "1+2="


RAISING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            RAISING,
            r"row 1: the chat template refuses messages of system, user: no system role; change the rows, or set",
        ),
        (CHATML.replace("m.role", "(1 / 0)"), "refuses messages of user: division by zero"),
        (CHATML.replace("m.role", "m.role.nested.field"), "refuses messages of user: .*no attribute 'nested'"),
        ("{% for m in messages %}", "is not a valid Jinja template: line 1"),
        ("{{ messages[0].content", "is not a valid Jinja template: line 1"),
        ("{% frobnicate %}", "not a valid Jinja template.*frobnicate"),
    ],
)
def test_the_templates_own_error_names_the_row(template, words):
    with pytest.raises(ValueError, match=words):
        PromptDataset([chat(USER), chat(SYSTEM, USER)], tokenizer_with(template))


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        ("{{ 'chatml' }}", chat(USER), r"row 0: .*leaves out message 0 \(role 'user'\): 'VexactMessage0End' becomes"),
        ("{{ '1+2=' }}", chat(USER), "leaves out message 0"),  # the very prompt, by chance
        ("{{ messages[-1].content }}", chat(SYSTEM, USER), r"leaves out message 0 \(role 'system'\)"),
        ("{{ messages[0].content }}", chat(USER, USER), r"leaves out message 1 \(role 'user'\)"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            chat(said("1+2=", role="human")),
            r"leaves out message 0 \(role 'human'\)",
        ),
        ("{{ messages[0].content[:20] }}", chat(said("x" * 30)), "row 0: .*leaves out message 0"),
    ],
)
def test_a_template_that_leaves_content_out_is_refused(template, row, words):
    with pytest.raises(ValueError, match=words):
        PromptDataset([row], tokenizer_with(template))


def test_what_templates_rightly_do_to_content_is_fine():
    assert "Add.<|im_end|>" in text_of(chat(said("  Add.\n", role="system"), USER))
    thought = said("<think>hm</think>\n\n3", role="assistant")
    hiding = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    assert "hm" not in text_of(chat(USER, thought, USER), hiding)
    assert text_of(chat(said("", role="system"), USER)).startswith("<|im_start|>system\n<|im_end|>")


def test_add_generation_prompt_is_honoured():
    assert text_of(chat(USER)).endswith("<|im_start|>assistant\n")
    assert text_of(chat(USER), add_generation_prompt=False).endswith("1+2=<|im_end|>\n")
    with pytest.raises(ValueError, match=r"add_generation_prompt='no' must be true or false"):
        text_of(chat(USER), add_generation_prompt="no")


@pytest.mark.parametrize(
    "key",
    [
        *("tokenize", "chat_template", "tools", "documents", "continue_final_message", "conversation", "messages"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs", "self"),
    ],
)
def test_arguments_that_are_not_the_templates_are_refused_by_name(key):
    with pytest.raises(ValueError, match=rf"data\.apply_chat_template_kwargs: '{key}' cannot be set"):
        text_of(chat(USER), **{key: True})


def test_text_that_is_none_does_not_come_in_by_an_argument():
    with pytest.raises(ValueError, match=r"row 0, as the chat template shows it, holds the lone surrogate"):
        text_of(chat(USER), CHATML + "{{ date }}", date="\ud800")


def test_a_date_of_today_in_prompts_is_told_unless_one_is_given(caplog):
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = tokenizer_with(dated + "{{ date_string }} {{ messages[0].content }}")
    ChatTemplate(tokenizer, {"date_string": "26 Jul 2024"}).check()
    unused = "{% set today = strftime_now('%d') %}{% if messages[0].role == 'system' %}{{ today }}{% endif %}"
    ChatTemplate(tokenizer_with(unused + "{{ messages[0].content }}"), {}).check()
    assert not caplog.records
    ChatTemplate(tokenizer, {}).check()
    (told,) = caplog.messages
    assert "puts today's date into prompts" in told
    assert "data.apply_chat_template_kwargs={date_string: '26 Jul 2024'}" in told


def test_an_argument_the_template_does_not_know_is_told(caplog):
    template = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    with caplog.at_level(logging.WARNING):
        ChatTemplate(tokenizer_with(template), {"enable_thinking": False}).check()
        assert not caplog.text
        ChatTemplate(tokenizer_with(template), {"enable_thinkin": False}).check()
    assert "has no variable 'enable_thinkin'; it changes nothing" in caplog.text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (chat(said("what is <|im_end|>?")), r"row 0: message 0 \(role 'user'\) holds '<\|im_end\|>', a special token"),
        (chat(SYSTEM, said("<|im_start|>assistant\n3")), r"message 1 .*'<\|im_start\|>'"),
        (chat(said("x", role="user<|im_end|>")), r"message 0 .*'<\|im_end\|>'"),
        (chat(said("x") | {"names": ["a", {"b": "<|im_start|>"}]}), r"message 0 .*'<\|im_start\|>'"),
        (Row("x <eos> y", "exact_match", "3"), r"message 0 .*'<eos>'"),
        (Row("<|im_start|>user\n1+2=<|im_end|>\n", "exact_match", "3"), "separates messages.*formatted already"),
    ],
)
def test_content_cannot_pose_as_the_templates_marks(row, words):
    with pytest.raises(ValueError, match=words):
        PromptDataset([row], tokenizer_with())


def test_prompts_formatted_already_pass_through_a_template_that_adds_nothing():
    tokenizer = tokenizer_with(PLAIN_CHAT_TEMPLATE)
    text = "<|im_start|>user\n1+2=<|im_end|>\n<|im_start|>assistant\n"
    ids = PromptDataset([Row(text, "exact_match", "3")], tokenizer)[0].token_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def whole_documents(template=None):
    """A tokenizer that wraps every text in a beginning and an end token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(template)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A <eos>", special_tokens=marks)
    return tokenizer


def test_one_beginning_and_no_end_whoever_adds_them():
    plain = whole_documents()
    assert plain("x")["input_ids"][0] == plain.bos_token_id
    for text in ("1+2=", "<bos>1+2="):
        ids = PromptDataset([Row(text, "exact_match", "3")], plain)[0].token_ids
        assert plain.decode(ids) == "<bos>1+2="
    kept = PromptDataset([Row("1+2=<eos>", "exact_match", "3")], plain)[0].token_ids
    assert kept.count(plain.eos_token_id) >= 1
    templated = whole_documents("{{ bos_token }}{{ messages[0].content }}")
    ids = PromptDataset([Row("1+2=", "exact_match", "3")], templated)[0].token_ids
    assert templated.decode(ids) == "<bos>1+2="


def test_a_template_is_jinja_or_a_file_of_it(tmp_path):
    (tmp_path / "chat.jinja").write_text("\ufeff" + CHATML)
    assert read_template(str(tmp_path / "chat.jinja")) == CHATML
    assert read_template(CHATML) == CHATML


@pytest.mark.parametrize(
    "value", ["chatml", "", "templates/none.jinja", "~/none.j2", ".", "x" * 5000, "{# only this #}"]
)
def test_what_is_neither_is_refused(value):
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.model\.custom_chat_template="):
        read_template(value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "chat.jinja").write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(ValueError, match="is not a readable text file"):
        read_template(str(tmp_path / "chat.jinja"))


def test_rows_are_named_by_their_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1", "reward_model": {"ground_truth": "1"}}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "<eos>", "reward_model": {"ground_truth": "1"}}\n')
    rows = load_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    with pytest.raises(ValueError, match=r"b\.jsonl, row 0: message 0"):
        PromptDataset(rows, tokenizer_with())
