import pytest

from vexact.data import PromptDataset, PromptFormat, Row
from vexact.data.template import tokenize, truncate
from vexact.prepare.tokenizers import byte_tokenizer, character_tokenizer


def row(prompt, truth="3"):
    return Row(prompt=prompt, data_source="exact_match", ground_truth=truth, extra_info={"index": 1})


def test_string_and_message_prompts_meet_in_the_chat_template():
    tokenizer = byte_tokenizer()
    text, chat = PromptDataset([row("1+2="), row(({"role": "user", "content": "1+2="},))], tokenizer)
    assert text.token_ids == chat.token_ids
    assert tokenizer.decode(text.token_ids) == "<user>1+2=\n<assistant>"
    assert (text.row, chat.row, text.text, text.ground_truth, text.data_source) == (0, 1, "1+2=", "3", "exact_match")


def test_template_off_leaves_the_string_alone():
    tokenizer = byte_tokenizer()
    prompts = PromptDataset([row("1+2=")], tokenizer, PromptFormat(apply_chat_template=False))
    assert tokenizer.decode(prompts[0].token_ids) == "1+2="


def test_text_that_the_tokenizer_does_not_know_is_named(caplog):
    PromptDataset([row("1+2="), row("3+4=")], character_tokenizer())
    PromptDataset([row("é漢🎉")], byte_tokenizer())
    assert not caplog.records
    PromptDataset([row("1+2="), row("what is 1+2?"), row("é")], character_tokenizer())
    (said,) = caplog.messages
    assert "2 of 3 prompts hold characters that the tokenizer does not know and reads as '<pad>'" in said
    assert "row 1: 'what is 1+2?'" in said


@pytest.mark.parametrize("end", ["{{ eos_token }}", "{{ eos_token }}{{ '\\n' }}"])
def test_prompts_that_end_as_a_text_does_are_named(caplog, end):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + end + "{% if add_generation_prompt %}: {% endif %}"
    rows = [row("1+2="), row("3+4=")]
    PromptDataset(rows, tokenizer)
    PromptDataset(rows, tokenizer, PromptFormat(apply_chat_template=False))
    assert not caplog.records
    PromptDataset(rows, tokenizer, PromptFormat(apply_chat_template_kwargs={"add_generation_prompt": False}))
    (said,) = caplog.messages
    assert said.startswith(f"2 of 2 prompts end with {tokenizer.eos_token!r}, the tokenizer's end of a text, the first")


def test_a_tokenizers_length_is_not_the_models(caplog, capfd):
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 2
    for with_template in (True, False):
        PromptDataset([row("1+2=")], tokenizer, PromptFormat(apply_chat_template=with_template))
    assert not caplog.records
    assert "indexing errors" not in "".join(capfd.readouterr())


def test_what_clients_ask_stays_out_of_the_log(caplog):
    tokenize([row("what is 1+2?")], character_tokenizer(), PromptFormat())
    assert not caplog.records, "the server tokenises requests with it"


def test_template_arguments_are_passed_on():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ suffix }}"
    form = PromptFormat(apply_chat_template_kwargs={"suffix": "!"})
    assert tokenizer.decode(PromptDataset([row("hi")], tokenizer, form)[0].token_ids) == "hi!"


def test_messages_need_a_template():
    tokenizer = character_tokenizer()
    chat = row(({"role": "user", "content": "1"},))
    with pytest.raises(ValueError, match=r"row 1: .*data\.apply_chat_template=false cannot format"):
        PromptDataset([row("1"), chat], tokenizer, PromptFormat(apply_chat_template=False))
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match=r"row 0: .*no chat template; set actor_rollout_ref\.model\.custom_chat_template"
    ):
        PromptDataset([chat], tokenizer)


def test_too_long_names_row_length_limit_and_keys():
    with pytest.raises(
        ValueError,
        match=r"row 1: the prompt has 6 tokens, more than data\.max_prompt_length=4; raise data\.max_prompt_length, "
        r"or set data\.filter_overlong_prompts=true.*data\.truncation=left\|right\|middle",
    ):
        PromptDataset([row("1+2="), row("11+22=")], character_tokenizer(), PromptFormat(max_prompt_length=4))


@pytest.mark.parametrize(("side", "kept"), [("left", "+22="), ("right", "11+2"), ("middle", "112=")])
def test_truncation_sides(side, kept):
    tokenizer = character_tokenizer()
    prompts = PromptDataset([row("11+22=")], tokenizer, PromptFormat(max_prompt_length=4, truncation=side))
    assert tokenizer.decode(prompts[0].token_ids) == kept


def test_middle_of_odd_length():
    assert truncate([1, 2, 3, 4, 5], 3, "middle") == [1, 4, 5]
    assert truncate([1, 2, 3], 1, "middle") == [3]


def test_overlong_rows_are_left_out_and_counted(caplog):
    rows = [row("11+22="), row("1+2="), row("2+2=", "4")]
    form = PromptFormat(max_prompt_length=4, filter_overlong_prompts=True)
    prompts = PromptDataset(rows, character_tokenizer(), form)
    assert [(prompt.row, prompt.text) for prompt in prompts] == [(0, "1+2="), (1, "2+2=")]
    assert prompts.num_filtered == 1
    assert "left out 1 of 3 prompts" in caplog.text


def test_rows_that_are_cut_are_counted_and_the_first_is_named(caplog):
    form = PromptFormat(max_prompt_length=4, truncation="left", apply_chat_template=False)
    PromptDataset([row("1+2="), row("3+4=")], byte_tokenizer(), form)
    assert not caplog.records
    PromptDataset([row("1+2="), row("10+2="), row("10+20=")], byte_tokenizer(), form)
    (said,) = caplog.messages
    assert (
        said == "cut 2 of 3 prompts to data.max_prompt_length=4 tokens (data.truncation=left), the first of them row 1"
    )


def test_all_rows_filtered():
    form = PromptFormat(max_prompt_length=2, filter_overlong_prompts=True)
    with pytest.raises(
        ValueError, match=r"all 2 prompts are longer.*shortest has 4 tokens\); raise data\.max_prompt_length"
    ):
        PromptDataset([row("11+22="), row("1+2=")], character_tokenizer(), form)


def test_no_rows():
    with pytest.raises(ValueError, match="dataset has no rows"):
        PromptDataset([], character_tokenizer())


def test_bad_format_settings():
    with pytest.raises(ValueError, match=r"data\.truncation='up' is unknown; use one of error, left, right, middle"):
        PromptFormat(truncation="up")
    with pytest.raises(ValueError, match=r"data\.max_prompt_length=0"):
        PromptFormat(max_prompt_length=0)


def test_from_files(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+2=", "reward_model": {"ground_truth": "3"}}\n' * 3)
    prompts = PromptDataset.from_files(tmp_path / "rows.jsonl", character_tokenizer(), max_samples=2)
    assert [prompt.row for prompt in prompts] == [0, 1]
    assert len(prompts) == 2
