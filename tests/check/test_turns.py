"""Turns with calls of tools, results and thinking, in the layouts that people have them in."""

import json

import pytest

from recipe_runner.data import formats
from recipe_runner.data.turns import FOLDED_SYSTEM, JOINED, SYSTEM_AS_USER, UNDECLARED, RowError
from recipe_runner.recipe.sections import DatasetSection

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": PARAMETERS}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASK = {"role": "user", "content": "Rome?"}
SUN = {"role": "tool", "content": "sunny", "name": "weather"}
SAY = {"role": "assistant", "content": "Sunny."}
ROW = [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, SUN, SAY]


def normalise(row, form="chat", **dataset):
    section = {"train": (), "on_overlong": "truncate", "max_dropped": 0.1, "format": form, "train_on": "assistant"}
    return formats.normalise_row(row, DatasetSection(**section | dataset), "row 1")


def calls_of(given):
    return normalise({"messages": given})["messages"]


def sharegpt(*turns):
    return [{"from": role, "value": value} for role, value in turns]


def as_text(call):
    return {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}


@pytest.mark.parametrize(
    "turns",
    [
        ROW,
        [ASK, {"role": "assistant", "content": None, "tool_calls": [as_text(CALL)]}, SUN, SAY],
        [ASK, {"role": "assistant", "tool_calls": json.dumps([CALL])}, {"role": "tool", "content": "sunny"}, SAY],
        [
            ASK,
            {"role": "assistant", "content": None, "function_call": as_text(CALL)["function"]},
            SUN | {"role": "function"},
            SAY,
        ],
        sharegpt(
            ("human", "Rome?"),
            ("function_call", json.dumps({"name": "weather", "arguments": {"city": "Rome"}})),
            ("observation", "sunny"),
            ("gpt", "Sunny."),
        ),
        sharegpt(("human", "Rome?"), ("tool_call", json.dumps([CALL])), ("tool_response", "sunny"), ("gpt", "Sunny.")),
    ],
    ids=["openai", "arguments as text", "calls as text", "functions of 2023", "sharegpt", "swift"],
)
def test_calls_are_the_same_in_every_layout(turns):
    assert calls_of(turns) == ROW


def test_content_and_several_calls_stay_together():
    ids = [{**CALL, "id": number} for number in ("a", "b")]
    results = [{"role": "tool", "content": number, "tool_call_id": number} for number in ("b", "a")]
    found = calls_of([ASK, {"role": "assistant", "content": "I look.", "tool_calls": ids}, *results, SAY])
    assert found[1] == {"role": "assistant", "content": "I look.", "tool_calls": ids}
    assert [turn.get("name") for turn in found[2:4]] == ["weather", "weather"]
    assert [turn["tool_call_id"] for turn in found[2:4]] == ["a", "b"]  # in the calls' order: templates write no ids
    one_by_one = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in ids]
    apart = calls_of([ASK, *one_by_one, *results, SAY, ASK, SAY])
    assert [turn.get("tool_call_id") for turn in apart] == [None, None, None, "a", "b", None, None, None]
    text = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    joined = calls_of(
        sharegpt(("human", "Rome?"), ("gpt", "I look."), ("function_call", text), ("function_call", text))
    )
    assert joined[1:] == [{"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}]


def test_a_content_in_parts_of_text_is_one_text():
    parts = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "warm?"}]
    assert calls_of([{"role": "user", "content": parts}, SAY])[0] == {"role": "user", "content": "Is it warm?"}
    with pytest.raises(RowError, match="take part 2 out, or remove the row"):
        calls_of([{"role": "user", "content": [*parts[:1], {"type": "image_url"}]}, SAY])


def test_calls_that_are_spelt_in_a_text_stay_text():
    spelt = {"role": "assistant", "content": '<tool_call>\n{"name": "weather"}\n</tool_call>'}
    assert calls_of([ASK, spelt, {"role": "tool", "content": "sunny"}, SAY])[1] == spelt


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([ASK, {"role": "tool", "content": "sunny"}], "turn 2: the result of a tool, and no call before it"),
        ([ASK, SAY, {"role": "tool", "content": "sunny"}], "turn 3: the result of a tool, and no call before it"),
        ([*ROW[:3], SUN], "turn 4: the result of a tool, and no call before it"),
        (
            [ASK, ROW[1] | {"tool_calls": [CALL | {"id": "a"}]}, SUN | {"tool_call_id": "b"}],
            "turn 3: a result of the call 'b', which was not made",
        ),
        (
            [ASK, ROW[1] | {"tool_calls": [{"function": {"name": "w", "arguments": "{city"}}]}],
            "the arguments of 'w': no JSON",
        ),
        *(
            ([ASK, ROW[1] | {"tool_calls": [{"function": {"name": "w", "arguments": of}}]}], f"'w': {said}")
            for of, said in (
                ('{"a": NaN}', "no JSON (NaN is no number of JSON's)"),
                ('{"a": [-Infinity]}', "no JSON (-Infinity is no number of JSON's)"),
                ({"a": float("nan")}, "NaN and Infinity are no numbers of JSON's"),
                ('{"a": {"b": 1, "b": 2}}', "no JSON (the key 'b' is there twice)"),
            )
        ),
        ([ASK, ROW[1] | {"tool_calls": [{"function": {"name": "w", "arguments": [1]}}]}], "'w' are no JSON object"),
        ([ASK, ROW[1] | {"tool_calls": [{"function": {"arguments": {}}}]}], "expected a call {name, arguments}"),
        (sharegpt(("human", "Rome?"), ("function_call", "weather()")), "turn 2: the call: no JSON"),
        ([ASK | {"tool_calls": [CALL]}, SAY], "turn 1: the key 'tool_calls' has no place in a turn of user"),
        ([ASK, SAY | {"reasoning_content": ["a"]}], "turn 2: expected a text as thinking, found list"),
        ([ASK, SAY | {"tool_call_id": "a"}], "turn 2: the key 'tool_call_id' has no place in a turn of assistant"),
    ],
)
def test_what_is_wrong_with_calls_is_said(turns, said):
    with pytest.raises(RowError) as found:
        calls_of(turns)
    assert said in str(found.value)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("as_json", [True, False])
def test_tools_are_declared_as_objects_or_as_json(wrapped, as_json):
    tools = [WEATHER if wrapped else WEATHER["function"]]
    found = normalise({"messages": ROW, "tools": json.dumps(tools) if as_json else tools})
    assert found["tools"] == [WEATHER]
    assert "noted" not in found
    for nothing in (None, "", "[]", []):
        assert "tools" not in normalise({"messages": [ASK, SAY], "tools": nothing})


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("weather", "no JSON"),
        ([{}, {"x": 1}], "tool 1: expected {name, description, parameters}, found dict"),
        (["weather"], "tool 1: expected {name, description, parameters}, found str 'weather'"),
        (
            [{"name": "w", "parameters": {"city": {"type": "str"}}}],
            "its parameters are no JSON schema of `type: object`",
        ),
        (
            [{"name": "w", "parameters": {"type": "object", "properties": {"city": {"type": "str"}}}}],
            "tool 1 ('w'): parameters.properties.city.type are no JSON schema: 'str' is not valid",
        ),
    ],
)
def test_tools_that_are_no_json_schema_are_refused(tools, said):
    with pytest.raises(RowError) as found:
        normalise({"messages": [ASK, SAY], "tools": tools})
    assert str(found.value).startswith("row 1: column 'tools': ")
    assert said in str(found.value)


def test_calls_of_tools_that_are_not_declared_are_noted():
    other = {"type": "function", "function": {"name": "news", "parameters": {}}}
    assert normalise({"messages": ROW, "tools": [other]})["noted"] == [UNDECLARED]
    assert normalise({"messages": ROW})["noted"] == [UNDECLARED]
    assert "noted" not in normalise({"messages": [ASK, SAY], "tools": [other]})


def test_pairs_and_judged_answers_have_calls_and_tools():
    pair = {"prompt": "Rome?", "chosen": [ROW[1]], "rejected": "I don't know.", "tools": [WEATHER]}
    found = normalise(pair, "preference", train_on="completion")
    assert (found["chosen"], found["tools"], found["dropped"]) == ([ROW[1]], [WEATHER], "")
    judged = {"prompt": ROW[:3], "completion": [SAY], "label": True, "tools": [WEATHER]}
    assert normalise(judged, "unpaired_preference")["prompt"] == ROW[:3]
    with pytest.raises(RowError, match="column 'chosen': the result of a tool in an answer would be learned"):
        normalise(pair | {"chosen": ROW[1:]}, "preference")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_has_one_name(key):
    assert calls_of([ASK, SAY | {key: "Look."}])[1] == SAY | {"reasoning_content": "Look."}


def test_what_is_learned_has_the_same_names_in_every_format():
    talk = {"messages": [ASK, SAY, ASK, SAY]}
    for train_on in ("last", "completion"):
        assert normalise(talk, train_on=train_on)["prompt"] == [ASK, SAY, ASK]
    assert normalise(talk)["messages"] == talk["messages"]
    row = {"instruction": "Rome?", "output": "Sunny.", "history": [["Hi", "Ho"]]}
    for train_on in ("last", "completion"):
        assert normalise(row, "instruction", train_on=train_on)["completion"] == [SAY]
    assert len(normalise(row, "instruction", train_on="assistant")["messages"]) == 4
    assert normalise({"messages": ROW}, train_on="last")["completion"] == [SAY]
    with pytest.raises(RowError, match=r"3 turns follow the last question.* set train_on: last"):
        normalise({"messages": ROW}, train_on="completion")


def test_a_system_turn_is_put_into_the_user_turn_after_it():
    system = {"role": "system", "content": "Be brief."}
    found = normalise({"messages": [system, ASK, SAY]}, merge_system=True)
    assert found["messages"] == [{"role": "user", "content": "Be brief.\n\nRome?"}, SAY]
    assert found["noted"] == [FOLDED_SYSTEM]
    alone = normalise({"messages": [system, SAY]}, merge_system=True)
    assert alone["messages"][0] == system | {"role": "user"}
    assert alone["noted"] == [SYSTEM_AS_USER]
    assert normalise({"messages": [system, ASK, SAY, system]}, merge_system=True)["noted"] == [
        FOLDED_SYSTEM,
        SYSTEM_AS_USER,
    ]
    row = {"instruction": "Rome?", "output": "Sunny."}
    asked = normalise(row, "instruction", train_on="completion", system="Be brief.", merge_system=True)["prompt"]
    assert asked == [{"role": "user", "content": "Be brief.\n\nRome?"}]
    pair = {"prompt": "Rome?", "chosen": "Sunny.", "rejected": "No.", "system": "Be brief."}
    assert normalise(pair, "preference", merge_system=True)["prompt"] == asked


def test_turns_of_one_role_are_joined():
    found = normalise({"messages": [ASK, ASK, SAY, SAY]}, merge_turns=True)
    assert [turn["content"] for turn in found["messages"]] == ["Rome?\n\nRome?", "Sunny.\n\nSunny."]
    assert found["noted"] == [JOINED]
    assert "noted" not in normalise({"messages": [ASK, SAY]}, merge_turns=True)
    with pytest.raises(RowError, match="two assistant turns would be joined, of which one is not learned"):
        normalise({"messages": [ASK, SAY, SAY | {"weight": 0}]}, merge_turns=True)


def test_a_turn_of_weight_0_may_call_tools():
    silent = ROW[1] | {"weight": 0}
    assert normalise({"messages": [ASK, silent, SUN, SAY]})["muted"] == [0]
