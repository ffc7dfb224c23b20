import pytest

from recipe_runner.data import formats
from recipe_runner.data.turns import RowError
from recipe_runner.recipe.sections import DatasetSection

INSTRUCTION = {"format": "instruction", "train_on": "completion"}
CHAT = {"format": "chat", "train_on": "assistant"}


def normalise_row(row, dataset, where):
    section = DatasetSection(**{"train": (), "on_overlong": "truncate", "max_dropped": 0.1}, **dataset)
    return formats.normalise_row(row, section, where)


def row(**values):
    return {"instruction": "Add.", "input": "1 2", "output": "3"} | values


def test_instruction_becomes_one_turn_each():
    result = normalise_row(row(), INSTRUCTION | {"system": "Be brief."}, "row 1")
    assert result == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n\n1 2"}],
        "completion": [{"role": "assistant", "content": "3"}],
        "dropped": "",
    }


@pytest.mark.parametrize("empty", ["", None, "  "])
def test_empty_input_leaves_no_trace(empty):
    assert normalise_row(row(input=empty), INSTRUCTION, "row 1")["prompt"][-1]["content"] == "Add."
    classic = normalise_row(row(input=empty), INSTRUCTION | {"template": "classic"}, "row 1")
    assert classic["prompt"] == "Instruction:\nAdd.\n\nOutput:\n"


def test_classic_template():
    result = normalise_row(row(), INSTRUCTION | {"template": "classic"}, "row 1")
    assert (result["prompt"], result["completion"]) == ("Instruction:\nAdd.\n\nInput:\n1 2\n\nOutput:\n", "3")


def test_own_template_keeps_braces_and_what_follows_the_answer():
    template = 'Q {"x"}: {instruction} {input}\nA: {output} [end]'
    result = normalise_row(row(instruction="use {output} {input}"), INSTRUCTION | {"template": template}, "row 1")
    assert result["prompt"] == 'Q {"x"}: use {output} {input} 1 2\nA: '
    assert result["completion"] == "3 [end]"


def test_template_that_would_lose_the_input_is_refused():
    with pytest.raises(RowError, match="row 1 has an input"):
        normalise_row(row(), INSTRUCTION | {"template": "{instruction} {output}"}, "row 1")


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"output": ""}, "with an empty output"), ({"instruction": None}, "with an empty instruction")],
)
def test_rows_without_question_or_answer_are_dropped_by_name(values, reason):
    assert normalise_row(row(**values), INSTRUCTION, "row 1")["dropped"] == reason


def test_sharegpt_roles_are_mapped():
    turns = [
        {"from": role, "value": f"{role} <tool_call>"} for role in ("system", "human", "gpt", "observation", "chatgpt")
    ]
    result = normalise_row({"messages": turns}, CHAT, "row 1")
    assert [turn["role"] for turn in result["messages"]] == ["system", "user", "assistant", "tool", "assistant"]


def test_system_prompt_is_put_before_conversations_that_have_none():
    chat = CHAT | {"system": "Be brief."}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert normalise_row({"messages": turns}, chat, "row 1")["messages"][0]["content"] == "Be brief."
    own = [{"role": "system", "content": "Own."}, *turns]
    assert normalise_row({"messages": own}, chat, "row 1")["messages"] == own


def test_train_on_completion_splits_before_the_last_turn():
    turns = [{"role": role, "content": str(number)} for number, role in enumerate(["user", "assistant"] * 2)]
    result = normalise_row({"messages": turns}, CHAT | {"train_on": "completion"}, "row 1")
    assert (result["prompt"], result["completion"]) == (turns[:3], turns[3:])


@pytest.mark.parametrize(
    ("train_on", "roles", "reason"),
    [
        ("assistant", [], "without turns"),
        ("assistant", ["user"], "without an assistant turn"),
        ("completion", ["user", "assistant", "user"], "that do not end with an assistant turn"),
        ("all", ["user"], ""),
    ],
)
def test_conversations_that_teach_nothing_are_dropped_by_name(train_on, roles, reason):
    turns = [{"role": role, "content": "x"} for role in roles]
    assert normalise_row({"messages": turns}, CHAT | {"train_on": train_on}, "row 1")["dropped"] == reason


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "row 7: expected a list of turns"),
        (None, "row 7: expected a list of turns"),
        ([{"role": "asistant", "content": "x"}], "row 7, turn 1: unknown role 'asistant'.*did you mean 'assistant'"),
        ([{"role": "user", "content": "x"}, {"content": "y"}], "row 7, turn 2: no role"),
        ([{"role": "user", "content": None}], "row 7, turn 1: expected a text as content, found nothing"),
        ([{"role": "user", "content": [1]}], "row 7, turn 1: expected a text as content, found list"),
    ],
)
def test_a_row_of_the_wrong_shape_says_where_and_what(messages, message):
    with pytest.raises(RowError, match=message):
        normalise_row({"messages": messages}, CHAT, "row 7")


def test_numbers_are_texts_but_lists_are_not():
    assert normalise_row(row(output=3), INSTRUCTION, "row 1")["completion"][0]["content"] == "3"
    with pytest.raises(RowError, match="row 1: column 'output': expected a text, found list"):
        normalise_row(row(output=["3"]), INSTRUCTION, "row 1")


def chat(*turns):
    return {"messages": [dict(zip(("role", "content"), turn[:2], strict=True)) | dict(turn[2:]) for turn in turns]}


ASK, SAY = ("user", "hi"), ("assistant", "ho")


def test_a_row_has_a_system_prompt_and_a_history_of_its_own():
    given = row(input="", system="You count.", history=[["Start?", "Yes."], ["Ready?", "Sure."]])
    prompt = normalise_row(given, INSTRUCTION | {"system": "Be brief."}, "row 1")["prompt"]
    assert [(turn["role"], turn["content"]) for turn in prompt] == [
        ("system", "You count."),
        ("user", "Start?"),
        ("assistant", "Yes."),
        ("user", "Ready?"),
        ("assistant", "Sure."),
        ("user", "Add."),
    ]
    assert normalise_row(row(system=" ", history=None), INSTRUCTION, "row 1")["prompt"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("values", "dataset", "message"),
    [
        ({"history": "Start? Yes."}, {}, "column 'history': expected a list of"),
        ({"history": [["Start?"]]}, {}, "column 'history': expected a list of"),
        ({"system": "You count."}, {"template": "classic"}, "has a system prompt or a history, but dataset.template"),
        ({"history": [["a", "b"]]}, {"template": "classic"}, "has a system prompt or a history, but dataset.template"),
    ],
)
def test_context_that_has_no_place_is_refused(values, dataset, message):
    with pytest.raises(RowError, match=message):
        normalise_row(row(**values), INSTRUCTION | dataset, "row 1")


def test_a_conversation_takes_the_system_prompt_of_its_column():
    given = chat(ASK, SAY) | {"system": "Be terse."}
    assert normalise_row(given, CHAT, "row 1")["messages"][0] == {"role": "system", "content": "Be terse."}
    twice = chat(("system", "Be terse."), ASK, SAY) | {"system": "Be terse."}
    assert normalise_row(twice, CHAT, "row 1") == normalise_row(given, CHAT, "row 1")
    with pytest.raises(RowError, match="a system turn, and another text in the column"):
        normalise_row(chat(("system", "Be long."), ASK, SAY) | {"system": "Be terse."}, CHAT, "row 1")


def test_the_input_of_a_pair_follows_its_prompt():
    given = {"prompt": "Say hi", "input": "kindly", "chosen": "Hello", "rejected": "Go", "system": "Help."}
    prompt = normalise_row(given, {"format": "preference"}, "row 1")["prompt"]
    assert [turn["content"] for turn in prompt] == ["Help.", "Say hi\n\nkindly"]
    with pytest.raises(RowError, match="has an input, and no prompt; name the column of the prompt"):
        normalise_row({key: given[key] for key in ("input", "chosen", "rejected")}, {"format": "preference"}, "row 1")
    with pytest.raises(RowError, match="has an input, but its prompt is no text"):
        normalise_row(given | {"prompt": [{"role": "user", "content": "Say hi"}]}, {"format": "preference"}, "row 1")


@pytest.mark.parametrize(
    "key",
    [
        *("name", "images", "thought", "think", "reasoning_details", "refusal", "tools", "functions"),
        *("attachments", "documents", "tool_responses", "tool_call_id", "mask", "loss_weight", "train_detail"),
    ],
)
def test_keys_of_a_turn_that_would_be_lost_are_refused_unless_they_are_named(key):
    given = chat(ASK, ("assistant", "ho", (key, "something")))
    with pytest.raises(RowError, match=f"row 1, turn 2: the key '{key}' has no place .* dataset.ignore: \\[{key}\\]"):
        normalise_row(given, CHAT, "row 1")
    assert normalise_row(given, CHAT | {"ignore": [key]}, "row 1")["messages"][1] == {
        "role": "assistant",
        "content": "ho",
    }
    for nothing in (None, "", [], "[]", {}):
        assert not normalise_row(chat(ASK, ("assistant", "ho", (key, nothing))), CHAT, "row 1")["dropped"]


@pytest.mark.parametrize("key", ["weigth", "weights", "trian", "Train", "tool_call", "reasonings", " name"])
def test_a_key_of_a_turn_that_is_misspelt_is_refused(key):
    with pytest.raises(RowError, match=rf"turn 2: unknown key '{key}', did you mean "):
        normalise_row(chat(ASK, ("assistant", "ho", (key, "x"))), CHAT, "row 1")
    assert normalise_row(chat(ASK, ("assistant", "ho", (key, "x"))), CHAT | {"ignore": [key]}, "row 1")
    assert normalise_row(chat(ASK, ("assistant", "ho", ("id", "x"))), CHAT, "row 1")


@pytest.mark.parametrize(
    "nothing_learned",
    [
        *({"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}),
        *({"loss": False}, {"training": False}, {"trainable": False}, {"loss": 0}),
    ],
)
def test_turns_of_weight_0_are_not_learned(nothing_learned):
    silent = ("assistant", "oops", *nothing_learned.items())
    assert normalise_row(chat(ASK, silent, ASK, SAY), CHAT, "row 1")["muted"] == [0]
    assert normalise_row(chat(ASK, silent), CHAT, "row 1")["dropped"] == "whose assistant turns all have weight 0"
    completion = CHAT | {"train_on": "completion"}
    assert normalise_row(chat(ASK, SAY, ASK, silent), completion, "row 1")["dropped"] == "whose last turn has weight 0"
    assert normalise_row(chat(ASK, silent, ASK, SAY), completion, "row 1")["dropped"] == ""
    with pytest.raises(RowError, match="train_on: all learns every turn"):
        normalise_row(chat(ASK, silent), CHAT | {"train_on": "all"}, "row 1")
    assert "muted" not in normalise_row(chat(ASK, ("assistant", "ho", ("weight", 1), ("train", None))), CHAT, "row 1")


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}])
def test_a_muted_turn_of_an_answer_that_is_judged_is_refused(switch):
    """Only answers are learned there, and all of them: a muted turn may be in what comes before."""
    silent = {"role": "assistant", "content": "oops", **switch}
    ask, say = ({"role": role, "content": role} for role in ("user", "assistant"))
    for answer in ([ask, silent], [silent], [ask, say, silent]):
        pair = {"chosen": answer, "rejected": [ask, say], "prompt": None}
        with pytest.raises(RowError, match=f"column 'chosen', turn {len(answer)}: weight 0"):
            normalise_row(pair, {"format": "preference"}, "row 1")
    before = {"chosen": [ask, silent, ask, say], "rejected": [ask, silent, ask, {**say, "content": "no"}]}
    assert normalise_row(before, {"format": "preference"}, "row 1")["dropped"] == ""
    judged = {"prompt": "q", "completion": [silent], "label": True}
    with pytest.raises(RowError, match="column 'completion', turn 1: weight 0"):
        normalise_row(judged, {"format": "unpaired_preference"}, "row 1")


@pytest.mark.parametrize("blank", ["", " \n", "\u200b", "\u200b\u2060 \ufeff", "\x00"])
def test_texts_that_show_nothing_are_empty(blank):
    assert normalise_row(row(output=blank), INSTRUCTION, "row 1")["dropped"] == "with an empty output"
    assert normalise_row({"text": blank}, {"format": "text"}, "row 1")["dropped"] == "with an empty text"
    assert normalise_row(row(output=f"{blank}\U0001fae8"), INSTRUCTION, "row 1")["dropped"] == ""


def test_an_answer_to_nothing_is_dropped_where_only_the_answer_is_learned():
    alone = normalise_row(chat(SAY), CHAT | {"train_on": "completion"}, "row 1")
    assert alone["dropped"] == "without a turn before the answer"


def test_a_weight_that_is_neither_0_nor_1_is_refused():
    with pytest.raises(RowError, match=r"turn 2: weight is 0\.5, and can only be 0 or 1 here"):
        normalise_row(chat(ASK, ("assistant", "ho", ("weight", 0.5))), CHAT, "row 1")


@pytest.mark.parametrize("train_on", ["assistant", "completion", "all"])
def test_conversations_with_an_empty_answer_are_dropped(train_on):
    dataset = CHAT | {"train_on": train_on}
    assert normalise_row(chat(ASK, ("assistant", " ")), dataset, "row 1")["dropped"] == "with an empty answer"
    first = normalise_row(chat(ASK, ("assistant", ""), ASK, SAY), dataset, "row 1")["dropped"]
    assert first == ("" if train_on == "completion" else "with an empty answer")


@pytest.mark.parametrize(("value", "text"), [(True, "true"), (1.5, "1.5"), (7, "7"), ("01", "01")])
def test_scalars_are_written_as_json_writes_them(value, text):
    assert normalise_row(row(output=value), INSTRUCTION, "row 1")["completion"][0]["content"] == text


def test_a_judged_conversation_without_a_prompt_ends_with_what_is_judged():
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}, {"from": "human", "value": "three"}]
    row = {"completion": [*turns, {"from": "gpt", "value": "four"}], "label": False}
    found = normalise_row(row, {"format": "unpaired_preference"}, "row 1")
    assert [turn["content"] for turn in found["prompt"]] == ["one", "two", "three"]
    assert (found["completion"], found["label"]) == ([{"role": "assistant", "content": "four"}], False)
    with_prompt = normalise_row({"prompt": "zero"} | row, {"format": "unpaired_preference"}, "row 1")
    assert with_prompt["dropped"] == "whose answer does not continue its prompt"
    alone = normalise_row({"completion": "two", "label": True}, {"format": "unpaired_preference"}, "row 1")
    assert alone["dropped"] == "with an empty prompt"
    asked = normalise_row({"completion": turns, "label": True}, {"format": "unpaired_preference"}, "row 1")
    assert asked["dropped"] == "whose answer does not continue its prompt"


SEGMENTS = {"format": "segments", "train_on": "labelled"}


def test_segments_are_as_they_are_written():
    parts = [{"text": "Ask: ", "label": False, "id": 7}, {"text": "answer\n", "label": True}]
    found = normalise_row({"segments": parts}, SEGMENTS, "row 1")
    bare = [{"text": "Ask: ", "label": False}, {"text": "answer\n", "label": True}]
    assert found == {"segments": bare, "dropped": ""}


@pytest.mark.parametrize(
    ("parts", "train_on", "dropped"),
    [
        ([], "labelled", True),
        ([{"text": "seen", "label": False}], "labelled", True),
        ([{"text": "seen", "label": False}], "all", False),
        ([{"text": "", "label": True}, {"text": "seen", "label": False}], "labelled", True),
        ([{"text": "\n", "label": True}], "labelled", False),
    ],
)
def test_segments_of_which_nothing_is_learned_are_dropped(parts, train_on, dropped):
    found = normalise_row({"segments": parts}, SEGMENTS | {"train_on": train_on}, "row 1")
    assert bool(found["dropped"]) == dropped


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ("a text", "row 1: column 'segments': expected a list of segments {text, label}, found str 'a text'"),
        (["a text"], "row 1: column 'segments', segment 1: expected {text: a text, label: true or false}, found"),
        ([{"text": "a", "label": True}, {"label": True}], "segment 2: expected {text: a text"),
        ([{"text": "a"}], "segment 1: label: expected true or false, found nothing"),
        ([{"text": "a", "label": 1}], "segment 1: label: expected true or false, found int '1'"),
        ([{"text": "a", "label": True, "weight": 0}], "segment 1 has a key 'weight', which segments do not have"),
    ],
)
def test_segments_in_another_shape_are_refused(parts, said):
    with pytest.raises(RowError) as refused:
        normalise_row({"segments": parts}, SEGMENTS, "row 1")
    assert said in str(refused.value)
