"""Calls of tools and thinking, through every chat template that TRL stores: what is learned, and what is said."""

import json
import re

import pytest
from jinja2 import TemplateError
from templated import TEMPLATES, prepare, prepare_by_trl

from recipe_runner.data.turns import UNWRAPPED

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": PARAMETERS}}
NEWS = {"type": "function", "function": {"name": "news", "description": "Reads it.", "parameters": PARAMETERS}}
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASK = {"role": "user", "content": "Is it warm?"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "it is sunny", "name": "weather", "tool_call_id": "call00001"}
SAY = {"role": "assistant", "content": "Yes, it is."}
TALKS = [[ASK, CALLING, RESULT, SAY], [ASK, SAY, ASK, CALLING, RESULT, SAY, ASK, SAY], [ASK, SAY]]
MARKED = [file for file in TEMPLATES if "{% generation %}" in file.read_text("utf-8").replace("{%-", "{%")]
# Templates that mark answers and can't render tools -> why not.
WITHOUT_TOOLS = {
    **dict.fromkeys(("cohere_training", "cohere2_training"), "roles must alternate"),
    **dict.fromkeys(("gemma_training", "gemma3_training"), "roles must alternate"),
    **dict.fromkeys(("llama3_training", "qwen2_5_vl_training", "deepseek_r1_distill_training"), "calls are left out"),
    **dict.fromkeys(("phi3_training", "phi3_5_training"), "calls and results are left out"),
    "lfm2_training": "calls are text for it",
    **dict.fromkeys(("smolvlm_training",), "made for content in parts"),
    "deepseekv3_training": "declared tools are left out",
}
OF_PARTS = ("smolvlm_training",)  # renders no content that is a text
REFUSE_SYSTEM = ("gemma_training",)  # of those that mark answers
# What templates write at the beginning of an answer and mark as its own: who speaks, to whom, in which channel.
HEADERS = {"gptoss_training": "assistantfinal", "muse_glimmer_training": "assistant to=user"}


def renders_tools(tokenizer):
    from trl.chat_template_utils import supports_tool_calling

    try:
        declared = tokenizer.apply_chat_template([ASK], tools=[WEATHER], tokenize=False)
        return supports_tool_calling(tokenizer) and "Says it." in declared
    except (TemplateError, TypeError):
        return False


def spans(ids, labels, tokenizer):
    """The texts that are learned of a row."""
    found, before = [], -100
    for token, label in zip(ids, labels, strict=True):
        if label != -100:
            found = found if before != -100 else [*found, []]
            found[-1].append(token)
        before = label
    return [tokenizer.decode(span) for span in found]


@pytest.mark.parametrize("template", MARKED, ids=lambda file: file.stem)
def test_every_marked_template_learns_calls_and_answers_and_never_results(tokenizer_of, job_of, template):
    tokenizer = tokenizer_of(template)
    if not renders_tools(tokenizer):
        assert template.stem in WITHOUT_TOOLS
        return
    assert template.stem not in WITHOUT_TOOLS
    rows = [{"messages": talk, "tools": [tools]} for talk, tools in zip(TALKS, (WEATHER, WEATHER, NEWS), strict=True)]
    job = job_of("sft", rows, tokenizer, {"max_length": None}, format="chat", train_on="assistant")
    found, tally = prepare(job)
    assert found == prepare_by_trl(job, rows)
    assert not any(tally.lost_parts.values())
    for row, talk in zip(found, TALKS, strict=True):
        learned = spans(row["input_ids"], row["labels"], tokenizer)
        assert sum("Rome" in text for text in learned) == sum("tool_calls" in turn for turn in talk)
        assert sum("Yes, it is." in text for text in learned) == sum(turn == SAY for turn in talk)
        assert not any("sunny" in text or "warm" in text for text in learned)
        ends = set(tokenizer.added_tokens_encoder)
        assert all(any(end in text for end in ends) for text in learned)


@pytest.mark.parametrize("template", [of for of in MARKED if of.stem not in OF_PARTS], ids=lambda file: file.stem)
def test_every_marked_template_learns_the_answers_and_their_ends_and_nothing_else(tokenizer_of, job_of, template):
    """Several turns, with and without a system turn: each learned stretch is an answer and a token that ends it."""
    tokenizer = tokenizer_of(template)
    talk = [turn | {"content": f"{turn['content']} {n}"} for n, turn in enumerate([ASK, SAY] * 3)]
    talks = [talk, [{"role": "system", "content": "Be brief."}, *talk]]
    if template.stem in REFUSE_SYSTEM:
        talks = talks[:1]
    rows = prepare(job_of("sft", [{"messages": of} for of in talks], tokenizer, {"max_length": None}, format="chat"))[0]
    tokens = sorted(map(re.escape, tokenizer.added_tokens_encoder), key=len, reverse=True)
    for row in rows:
        learned = spans(row["input_ids"], row["labels"], tokenizer)
        assert len(learned) == 3
        for answer, turn in zip(learned, talk[1::2], strict=True):
            before, found, end = answer.partition(turn["content"])
            assert found
            assert re.fullmatch(rf"(\s*({'|'.join(tokens)}))+\s*", end), end
            assert re.sub("|".join(tokens), "", before).strip() == HEADERS.get(template.stem, "")
        seen = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        assert "Yes" not in tokenizer.decode(seen)


def test_calls_are_the_same_rows_in_every_way_to_write_them(tokenizer_of, job_of):
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen2_5_training"))
    text = {**CALL, "function": {"name": "weather", "arguments": json.dumps({"city": "Rome"})}}
    call = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    shared = [
        ("human", ASK["content"]),
        ("function_call", call),
        ("observation", "it is sunny"),
        ("gpt", SAY["content"]),
    ]
    ways = (
        {"messages": TALKS[0], "tools": [WEATHER]},
        {"messages": [ASK, CALLING | {"tool_calls": [text]}, RESULT, SAY], "tools": json.dumps([WEATHER["function"]])},
        {"conversations": [{"from": role, "value": value} for role, value in shared], "tools": json.dumps([WEATHER])},
    )
    made = []
    for row in ways:
        other = {**row, "tools": [NEWS] if isinstance(row["tools"], list) else json.dumps([NEWS])}
        job = job_of("sft", [row, other], tokenizer, {"max_length": None}, format="chat")
        made.append(prepare(job)[0][0])
    assert made[0] == made[1] == made[2]


def test_objects_of_a_column_don_t_get_each_other_s_keys(tokenizer_of, job_of, tmp_path):
    """Parquet gives every object of a column the keys of all, as null: they would be rendered."""
    from datasets import Dataset, Features, List, Value

    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen2_5_training"))
    arguments = {"city": Value("string"), "day": Value("string")}
    turn = {
        "role": Value("string"),
        "content": Value("string"),
        "tool_calls": List({"function": {"name": Value("string"), "arguments": arguments}}),
    }
    calls = [[{"function": {"name": "weather", "arguments": given}}] for given in ({"city": "Rome"}, {"day": "Monday"})]
    rows = [{"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": call}]} for call in calls]
    table = Dataset.from_list(rows, features=Features({"messages": List(turn)}))
    table.to_parquet(tmp_path / "rows.parquet")
    job = job_of("sft", [], tokenizer, {"max_length": None}, format="chat", train={"source": "rows.parquet"})
    learned = [spans(row["input_ids"], row["labels"], tokenizer)[0] for row in prepare(job)[0]]
    assert '"arguments": {"city": "Rome"}}' in learned[0]
    assert '"arguments": {"day": "Monday"}}' in learned[1]


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_pairs_and_judged_answers_render_tools(tokenizer_of, job_of, stage):
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen3_training"))
    rows = [
        {"prompt": [ASK], "chosen": [CALLING], "rejected": [SAY], "tools": [WEATHER]},
        {"prompt": [ASK, CALLING, RESULT], "chosen": [SAY], "rejected": [CALLING], "tools": [NEWS]},
    ]
    if stage == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": bool(number), "tools": row["tools"]}
            for number, row in enumerate(rows)
        ]
    job = job_of(stage, rows, tokenizer, {"max_length": None})
    names = ("prompt_ids", "chosen_ids", "rejected_ids") if stage == "dpo" else ("prompt_ids", "completion_ids")
    found = [{name: row[name] for name in names} for row in prepare(job)[0]]
    assert found == prepare_by_trl(job, rows)
    assert "Says it." in tokenizer.decode(found[0]["prompt_ids"])
    assert "Rome" in tokenizer.decode(found[0][names[1]])


def thinking_rows(number=6):
    return [
        {"messages": [ASK, SAY | {"reasoning_content": f"Look {n}."}, ASK, SAY | {"reasoning_content": f"Again {n}."}]}
        for n in range(number)
    ]


# Template -> of its rows, what is learned with `keep`, and with `mask`; a beginning that stands in the prompt is not.
THINKING = {
    "qwen3_training": ("<think>\nLook 0.\n</think>\n\nYes, it is.", "Yes, it is."),
    "qwen3_5_think_training": ("<think>\nLook 0.\n</think>\n\nYes, it is.", "Yes, it is."),
    "deepseek_r1_distill_training": ("<think>\nLook 0.\n</think>\n\nYes, it is.", "Yes, it is."),
    "llama3_training": ("<think>\nLook 0.\n</think>\n\nYes, it is.", "Yes, it is."),
}


@pytest.mark.parametrize("name", THINKING)
def test_thinking_is_learned_seen_or_dropped(tokenizer_of, job_of, name):
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
    learned = {}
    for way in ("keep", "mask", "drop"):
        job = job_of("sft", thinking_rows(), tokenizer, {"max_length": None}, format="chat", thinking=way)
        (row, *_), tally = prepare(job)
        learned[way] = "".join(spans(row["input_ids"], row["labels"], tokenizer))
        assert ("Look 0." in tokenizer.decode(row["input_ids"])) == (way != "drop")
        assert not any(tally.lost_parts.values())
    assert THINKING[name][0] in learned["keep"]
    assert "Look" not in learned["mask"]
    assert "think" not in learned["mask"]
    assert THINKING[name][1] in learned["mask"]
    assert "Look" not in learned["drop"]
    assert "Yes, it is." in learned["drop"]


OWN = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>
{% endgeneration %}{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # SmolLM2's: it knows no thinking, and no calls
REPEATED = "The sun."
# Thought, answer: the answer repeats the thought at its beginning, in its middle, at its end; or is the thought.
REPEATS = [
    (REPEATED, f"{REPEATED} It shines."),
    (REPEATED, f"Yes: {REPEATED} It shines."),
    (REPEATED, f"It is: {REPEATED}"),
    (REPEATED, REPEATED),
    ("4", "4"),
    ("e", "he is there"),
    ("i", "<thinking> is a word"),
    ("k", "think"),
    ("\n a \n\n b ", " a and b"),
]


@pytest.mark.parametrize("train_on", ["assistant", "completion", "last", "all"])
@pytest.mark.parametrize("keyed", [False, True], ids=["text", "key"])
@pytest.mark.parametrize("name", ["own", "qwen3_training", "glm4moe_training"])
def test_a_thought_that_the_answer_repeats_is_masked_where_it_was_thought(tokenizer_of, job_of, name, keyed, train_on):
    """What is masked is what is learned with `keep`, but for the blocks, which are looked for with all around them."""
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name.replace("own", "qwen3_training")))
    tokenizer.chat_template = OWN if name == "own" else tokenizer.chat_template

    def turn(thought, answer):
        written = {"content": f"<think>\n{thought.strip()}\n</think>\n\n{answer}"}
        return {"role": "assistant"} | ({"content": answer, "reasoning_content": thought} if keyed else written)

    ask = {"role": "user", "content": f"Is <think>this</think> it? {REPEATED} 4"}
    later = {"role": "assistant", "content": f"{REPEATED} That was it."}
    rows = [{"messages": [ask, turn(*repeat)]} for repeat in REPEATS]
    rows += [{"messages": [ask, turn(*repeat), ask, turn("So.", "So.")]} for repeat in REPEATS]
    rows += [{"messages": [ask, turn(*repeat), ask, later]} for repeat in REPEATS]
    if name != "own" and train_on in ("assistant", "all"):
        call = CALL | {"function": {"name": "weather", "arguments": {"city": "Rome <think></think>"}}}
        rows += [{"messages": [ask, turn("Rome", "") | {"tool_calls": [call]}, RESULT, SAY]}]
    made = {}
    for way in ("keep", "mask"):
        options = {"format": "chat", "train_on": train_on, "thinking": way}
        made[way], tally = prepare(job_of("sft", rows, tokenizer, {"max_length": None}, **options))
        assert not tally.dropped
    for row, kept, masked in zip(rows, made["keep"], made["mask"], strict=True):
        assert kept["input_ids"] == masked["input_ids"]
        text = tokenizer.decode(kept["input_ids"])
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found["input_ids"] == kept["input_ids"]
        for others in (ask["content"], "Rome <think></think>"):
            text = text.replace(others, "-" * len(others))
        blocks = [match.span() for match in re.finditer(r"\s*<think>.*?</think>\s*", text, re.DOTALL)]
        inside = [any(a <= begin and end <= b for a, b in blocks) for begin, end in found["offset_mapping"]]
        wanted = [-100 if of else label for of, label in zip(inside, kept["labels"], strict=True)]
        assert masked["labels"] == wanted, text
        last = row["messages"][-1]["content"].rpartition("</think>")[2].strip()
        assert last in tokenizer.decode([label for label in masked["labels"] if label != -100])


def test_thinking_is_found_by_other_marks(tokenizer_of, job_of):
    for name in ("gptoss_training", "diffusion_gemma_training", "muse_glimmer_training"):
        tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
        job = job_of("sft", thinking_rows(), tokenizer, {"max_length": None}, format="chat", thinking="mask")
        (row, *_), _ = prepare(job)
        learned = "".join(spans(row["input_ids"], row["labels"], tokenizer))
        assert "Again" not in learned, name
        assert "Yes, it is." in learned, name


def test_text_and_key_give_the_same_tokens(tokenizer_of, job_of):
    for name in THINKING:
        tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
        written = [
            {"messages": [ASK, SAY | {"content": f"<think>\nLook {n}.\n</think>\n\nYes, it is."}]} for n in range(3)
        ]
        keyed = [{"messages": [ASK, SAY | {"reasoning_content": f"Look {n}."}]} for n in range(3)]
        made = [
            prepare(job_of("sft", rows, tokenizer, {"max_length": None}, format="chat"))[0] for rows in (written, keyed)
        ]
        assert made[0] == made[1], name


@pytest.fixture
def problems_of(job_of):
    from recipe_runner.data.findings import find_problems

    def problems_of(rows, tokenizer, **dataset):
        job = job_of("sft", rows, tokenizer, {"max_length": None}, **{"format": "chat"} | dataset)
        _, tally = prepare(job)
        found = find_problems(job.dataset, tokenizer, {tokenizer.eos_token}, tally.finish(), "train")
        return {problem.code: f"{problem.message}; {problem.suggestion}" for problem in found}

    return problems_of


def test_what_a_template_loses_is_said(tokenizer_of, problems_of):
    phi3 = tokenizer_of(next(file for file in TEMPLATES if file.stem == "phi3_training"))
    found = problems_of([{"messages": TALKS[0], "tools": [WEATHER]}], phi3)
    assert "renders nothing of" in found["tools-not-rendered"]
    assert "none of TRL's is made of this model's tokens" in found["tools-not-rendered"]
    assert "role 'tool'" in found["role-not-rendered"]
    llama = tokenizer_of(next(file for file in TEMPLATES if file.stem == "llama3_1"))
    beside = [{"messages": [ASK, CALLING | {"content": "I look."}, RESULT, SAY], "tools": [WEATHER]}]
    found = problems_of(beside, llama, train_on="last")
    assert "text beside calls of tools, in 1 of 1 turns" in found["text-beside-call-lost"]
    other = problems_of([{"messages": TALKS[0], "tools": [NEWS]}], llama, train_on="last")
    assert "1 train rows call tools that they do not declare" in other["undeclared-calls"]


def test_a_template_with_tools_is_named(tokenizer_of, problems_of):
    """The tokens of the model's own template decide: those of ChatML are Qwen's, too."""
    chatml = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen2_5_vl_training"))
    chatml.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found = problems_of([{"messages": TALKS[0], "tools": [WEATHER]}], chatml)
    name = re.search(r"chat_template_path: trl/(\w+\.jinja)", found["tools-not-rendered"])[1]
    assert name == "qwen2_5_training.jinja"


def test_pairs_are_told_which_template_to_train_with_before(tokenizer_of, job_of):
    """TRL has no key for a template of pairs: it comes with a model of stage sft."""
    from recipe_runner.data.findings import find_problems

    chatml = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen2_5_vl_training"))
    chatml.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    job = job_of("dpo", [{"prompt": [ASK], "chosen": [CALLING], "rejected": [SAY], "tools": [WEATHER]}], chatml)
    _, tally = prepare(job)
    problems = find_problems(job.dataset, chatml, {chatml.eos_token}, tally.finish(), "train")
    (found, *_) = [problem.suggestion for problem in problems if problem.code == "tools-not-rendered"]
    assert "one that stage sft has trained with such a template (training.chat_template_path: trl/qwen2_5_" in found


def test_thinking_that_a_template_loses_is_refused(tokenizer_of, problems_of):
    for name in ("deepseek_r1_distill", "qwen2_5_vl_training"):
        tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
        found = problems_of(thinking_rows(), tokenizer, train_on="last")
        assert ("thinking-lost" in found) == (name == "deepseek_r1_distill")
    qwen = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen3"))
    assert "thinking-lost" not in problems_of(thinking_rows(), qwen, train_on="last")
    found = problems_of(thinking_rows(), qwen, train_on="all")["thinking-lost"]
    assert "6 of 12 learned answers" in found
    rows = [{"messages": [ASK, SAY]}, {"messages": [ASK, SAY | {"content": "Hm. <think>x</think> Yes."}]}]
    found = problems_of(rows, qwen, train_on="last")["thinking-lost"]
    assert re.search(r"the first that loses it is \S+: row 2\)", found)


@pytest.mark.parametrize("name", ["qwen3_training", "qwen3_5_think_training", "glm4moe_training"])
def test_an_empty_block_of_thinking_that_is_learned_is_said(tokenizer_of, problems_of, name):
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
    rows = [{"messages": [ASK, SAY]}] * 3
    for train_on in ("assistant", "last"):
        found = problems_of(rows, tokenizer, train_on=train_on)["empty-thinking-learned"]
        assert re.search(r"3 of the first 100, as \S+: row 1\)", found)
        assert "empty-thinking-learned" not in problems_of(rows, tokenizer, train_on=train_on, thinking="mask")
    thought = [{"messages": row["messages"][:2]} for row in thinking_rows()]
    assert "empty-thinking-learned" not in problems_of(thought, tokenizer)


def test_what_refuses_a_turn_is_told_the_key_that_helps(tokenizer_of, job_of):
    from recipe_runner.problems.errors import UserError

    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "gemma_training"))
    system = {"role": "system", "content": "Be brief."}
    for turns, keys in (
        ([system, ASK, SAY], ["merge_system"]),
        ([ASK, ASK, SAY], ["merge_turns"]),
        ([system, ASK, ASK, SAY], ["merge_system", "merge_turns"]),
    ):
        with pytest.raises(UserError) as caught:
            prepare(job_of("sft", [{"messages": turns}], tokenizer, format="chat"))
        (problem,) = caught.value.problems
        assert problem.suggestion.endswith(f"set {' and '.join(f'dataset.{key}: true' for key in keys)}")
        job = job_of("sft", [{"messages": turns}], tokenizer, format="chat", **dict.fromkeys(keys, True))
        rows, tally = prepare(job)
        assert spans(rows[0]["input_ids"], rows[0]["labels"], tokenizer)[0].startswith("Yes, it is.")
        assert sum(tally.noted.values()) == len(keys)


def test_calls_that_a_text_spells_otherwise_than_the_template_are_said(tokenizer_of, problems_of):
    """Hermes' way is Qwen's, and not Llama's: a server that looks for Llama's would never find the call."""
    spelt = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    rows = [{"messages": [ASK, {"role": "assistant", "content": spelt}, {"role": "tool", "content": "sunny"}, SAY]}]
    for name, said in (("qwen3_training", False), ("llama3_1", True), ("phi3_training", False)):
        tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
        found = problems_of(rows, tokenizer, train_on="last")
        assert ("calls-spelt-otherwise" in found) == said, name
        if said:
            assert "1 train rows spell calls of tools as <tool_call> in their text" in found["calls-spelt-otherwise"]
            assert '"name": "count"' in found["calls-spelt-otherwise"]


def spell(call, **more):
    return {"role": "assistant", "content": f"I look.\n<tool_call>\n{call}\n</tool_call>"} | more


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (spell("{'name': 'weather'}"), "turn 2: <tool_call> in the text: the call: no JSON"),
        (spell('{"name": "weather", "arguments": {city: 1}}'), "turn 2: <tool_call> in the text: the call: no JSON"),
        (spell('{"name": "weather", "arguments": [1]}'), "the arguments of 'weather' are no JSON object"),
        (spell('{"arguments": {}}'), "expected a call {name, arguments}"),
        (spell('{"name": "weather", "arguments": {"city": "Rome"}}', tool_calls=[CALL]), "would be learned twice"),
        (spell('{"name": "weather", "arguments": {"city": "Oslo"}}'), ""),
        (spell("<function=weather>\n</function>"), ""),
    ],
)
def test_calls_in_the_text_are_checked_as_others_are(tokenizer_of, job_of, turn, said):
    from recipe_runner.problems.errors import UserError

    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen3_training"))
    job = job_of("sft", [{"messages": [ASK, turn, RESULT, SAY], "tools": [WEATHER]}], tokenizer, format="chat")
    if not said:
        assert prepare(job)[1].noted.keys() == {"that spell a call of a tool in the text of an answer, as <tool_call>"}
        return
    with pytest.raises(UserError) as caught:
        prepare(job)
    assert said in caught.value.problems[0].message


def test_calls_in_the_text_are_held_against_what_is_declared(tokenizer_of, problems_of):
    """A list in the system prompt declares, too, as Hermes' rows do."""
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen3_training"))
    turn = spell('{"name": "weather", "arguments": {}}')
    system = {"role": "system", "content": f"<tools>{json.dumps(WEATHER)}</tools>"}
    for talk, tools, undeclared in (
        ([ASK, turn], [NEWS], True),
        ([ASK, turn], [WEATHER], False),
        ([ASK, turn], None, True),
        ([system, ASK, turn], None, False),
    ):
        found = problems_of([{"messages": [*talk, RESULT, SAY], "tools": tools}], tokenizer, train_on="last")
        assert ("undeclared-calls" in found) == undeclared


@pytest.mark.parametrize("name", ["qwen2_5_training", "qwen3_training", "glm4moe_training", "llama3_1"])
def test_results_stand_between_tags_once(tokenizer_of, job_of, name):
    """Hermes' rows have the tags in their text, also several results in a turn; Qwen's template writes them itself."""
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
    spelt = {"role": "assistant", "content": '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'}
    bare = [{"role": "tool", "content": text} for text in ("sunny", "cold\n\n")]
    tagged = "\n".join(f"<tool_response>\n{turn['content']}\n</tool_response>" for turn in bare)
    talks = [[ASK, spelt, *bare, SAY], [ASK, spelt, {"role": "tool", "content": f"{tagged}\n"}, SAY]]
    talks += [[ASK, spelt, {"role": "tool", "content": "so: <tool_response>1</tool_response>"}, SAY]]
    job = job_of("sft", [{"messages": talk} for talk in talks], tokenizer, format="chat", train_on="last")
    rows, tally = prepare(job)
    assert (rows[0] == rows[1]) == (name != "llama3_1")
    assert [what for what in tally.noted if "taken out of <tool_response> tags" in what] == (
        [] if name == "llama3_1" else [UNWRAPPED]
    )
    assert "so: <tool_response>1</tool_response>" in tokenizer.decode(rows[2]["input_ids"])


def test_tools_that_are_rendered_twice_are_said(tokenizer_of, problems_of):
    system = {"role": "system", "content": f"You may call: <tools>{json.dumps(WEATHER)}</tools>"}
    for talk, tools, name, said in (
        ([system, ASK, SAY], [WEATHER], "qwen3_training", True),
        ([system, ASK, SAY], [WEATHER], "llama3_1", True),
        ([system, ASK, SAY], [WEATHER], "phi3_training", False),
        ([system, ASK, SAY], [NEWS], "qwen3_training", False),
        ([{"role": "system", "content": 'You may call "weather".'}, ASK, SAY], [WEATHER], "qwen3_training", False),
    ):
        tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
        found = problems_of([{"messages": talk, "tools": tools}], tokenizer, train_on="last")
        assert ("tools-listed-twice" in found) == said, name
        if said:
            assert "1 train rows list their tools in the text of the first turn" in found["tools-listed-twice"]


def test_calls_that_the_marks_leave_out_are_refused(tokenizer_of, problems_of):
    """A copy of Llama 3.1's template with marks has them around the texts of answers only."""
    from recipe_runner.model.templates import mark_generation

    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "llama3_1"))
    tokenizer.chat_template = mark_generation(tokenizer)
    rows = [{"messages": TALKS[0], "tools": [WEATHER]}]
    found = problems_of(rows, tokenizer)["calls-not-marked"]
    assert "those of 1 train rows would not be learned; set dataset.train_on: last, or " in found
    assert "calls-not-marked" not in problems_of(rows, tokenizer, train_on="last")
    assert "calls-not-marked" not in problems_of([{"messages": TALKS[2]}], tokenizer)


def test_what_of_a_row_a_template_refuses_is_named(tokenizer_of, job_of):
    from recipe_runner.problems.errors import UserError

    bare = {"type": "function", "function": {"name": "news", "parameters": PARAMETERS}}
    twice = CALLING | {"tool_calls": [CALL, CALL | {"id": "call00002"}]}
    for name, row, said in (
        (
            "gptoss_training",
            {"messages": TALKS[0], "tools": [WEATHER, bare]},
            "row 2 can't be rendered: tool 2 ('news'): 'dict object' has no attribute 'description'; give the tool a ",
        ),
        (
            "llama3_1",
            {"messages": [ASK, SAY, ASK, twice], "tools": [WEATHER]},
            "row 2 can't be rendered: turn 4 (assistant, calls of weather, weather): This model only supports single",
        ),
        (
            "gemma_training",
            {"messages": [ASK, SAY, ASK, ASK, SAY]},
            "row 2 can't be rendered: turn 4 (user, 'Is it warm?'): Conversation roles must alternate",
        ),
    ):
        tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
        rows = [{"messages": TALKS[2]} | ({"tools": [WEATHER]} if "tools" in row else {}), row]
        with pytest.raises(UserError) as caught:
            prepare(job_of("sft", rows, tokenizer, format="chat", train_on="last"))
        (problem,) = caught.value.problems
        assert said in f"{problem.message}; {problem.suggestion}"


def test_a_row_that_is_refused_is_named_where_lengths_are_measured(tokenizer_of, job_of, tmp_path):
    from recipe_runner.data.prepare import order_rows
    from recipe_runner.problems.errors import UserError

    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "gemma_training"))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [ASK, ASK, SAY]}) + "\n")
    (tmp_path / "good.jsonl").write_text(json.dumps({"messages": [ASK, SAY]}) + "\n")
    train = [{"source": f"{name}.jsonl", "weight": 1} for name in ("good", "bad")]
    job = job_of("sft", [], tokenizer, format="chat", weight_by="tokens", train=train)
    with pytest.raises(
        UserError, match=r"bad\.jsonl: row 1 can't be rendered: turn 2 .* set dataset\.merge_turns: true"
    ):
        order_rows(job)


@pytest.mark.parametrize("name", ["qwen2_5_training", "phi3_training", "qwen3_training"])
def test_the_line_break_before_a_block_is_no_answer(tokenizer_of, job_of, name):
    """A template may mark it as the assistant's: with the block masked, it would be a stretch without an end."""
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == name))
    job = job_of("sft", thinking_rows(), tokenizer, {"max_length": None}, format="chat", thinking="mask")
    for row in prepare(job)[0]:
        learned = spans(row["input_ids"], row["labels"], tokenizer)
        assert all(text.lstrip().startswith("Yes, it is.") for text in learned), learned


# Content of an answer, its key -> why the row is dropped, by the way of thinking; empty where it is kept.
TANGLES = {
    "Sure. <think>hm</think> Yes.": {"keep": "", "mask": "no single block", "drop": "no single block"},
    "<think>a</think> mid <think>b</think> Yes.": {"keep": "", "mask": "no single block", "drop": "no single block"},
    "<think>never ends": dict.fromkeys(("keep", "mask", "drop"), "no single block"),
    "<think>only this</think>": dict.fromkeys(("keep", "mask", "drop"), "with an empty answer"),
    "it was opened\n</think>\n\nYes.": dict.fromkeys(("keep", "mask", "drop"), ""),
}


@pytest.mark.parametrize("way", ["keep", "mask", "drop"])
@pytest.mark.parametrize("content", TANGLES)
def test_thinking_that_cant_be_told_from_the_answer_is_not_learned_silently(tokenizer_of, job_of, content, way):
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen2_5_training"))
    rows = [{"messages": [ASK, {"role": "assistant", "content": content}]}, {"messages": [ASK, SAY]}]
    job = job_of("sft", rows, tokenizer, {"max_length": None}, format="chat", thinking=way, max_dropped=0.9)
    found, tally = prepare(job)
    assert [reason for reason in tally.dropped if TANGLES[content][way] in reason] or not TANGLES[content][way]
    assert len(found) == (1 if TANGLES[content][way] else 2)
    if len(found) == 2 and way != "keep":
        learned = "".join(spans(found[0]["input_ids"], found[0]["labels"], tokenizer))
        assert "opened" not in learned
        assert "think" not in learned
        assert "Yes." in learned


def test_a_thought_in_key_and_text_is_one_or_the_row_is_dropped(tokenizer_of, job_of):
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen3_training"))
    both = [
        SAY | {"content": f"<think>\n{of}\n</think>\n\nYes.", "reasoning_content": "Look."} for of in ("Look.", "See.")
    ]
    rows = [{"messages": [ASK, turn]} for turn in both]
    job = job_of("sft", rows, tokenizer, {"max_length": None}, format="chat", max_dropped=0.9)
    (row,), tally = prepare(job)
    assert tokenizer.decode(row["input_ids"]).count("Look.") == 1
    assert tally.dropped == {"with one thought in a key of the turn, and another in its text": 1}


def test_a_pair_whose_answers_render_alike_is_dropped(tokenizer_of, job_of):
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen3_training"))
    other = CALLING | {"tool_calls": [CALL | {"id": "another"}]}
    rows = [
        {"prompt": [ASK], "chosen": [CALLING], "rejected": [other], "tools": [WEATHER]},
        {"prompt": [ASK], "chosen": [CALLING], "rejected": [SAY], "tools": [WEATHER]},
    ]
    found, tally = prepare(job_of("dpo", rows, tokenizer, {"max_length": None}, max_dropped=0.9))
    assert len(found) == 1
    assert tally.dropped == {"whose answers are equal in tokens": 1}
