"""`recipe-run check-server`: whether a server makes the tokens of a conversation that the model was trained on.

Any server with OpenAI's interface is asked the golden rows of a run. What it counts and how its answers end is
compared; where a server shows its tokens (llama-server, vLLM), they are compared one by one. The likely cause of a
difference is the one change of the prompt that explains all rows.
"""

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipe_runner.data.prompts import render_prompt
from recipe_runner.data.rendering import find_special_tokens
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import Problem
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.results.gguf import take_apart
from recipe_runner.runs.golden import GoldenRow

TOKENS = 32  # of an answer, where the golden row has none
MOST = 1000  # parts of 64 KiB of an answer
SPARE = 8  # tokens more, in which an answer that ended may go on


@dataclass(frozen=True)
class Server:
    """A server with OpenAI's interface.

    Attributes:
        url: Without `/v1`.
        model: The name of the model there.
        key: For its `Authorization`; empty for none.
        seconds: How long an answer may take.
    """

    url: str
    model: str
    key: str
    seconds: float


@dataclass(frozen=True)
class Reply:
    """What a server made of a golden row.

    Attributes:
        count: Tokens of the prompt, as it counts them; None where it does not say.
        ids: Those tokens, where it shows them.
        text: Its answer.
        finish: Why the answer ended: stop, or length.
    """

    count: int | None
    ids: list[int] | None
    text: str
    finish: str


def connect(url: str, model: str | None, key: str, seconds: float) -> Server:
    """Finds a server, and the name of its model.

    Raises:
        UserError: Nothing answers there, or something else than such a server, or it has no such model.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise user_error("server-unreachable", f"{url} is no address", "write http://127.0.0.1:8000")
    server = Server(url, model or "", key, seconds)
    if model:
        return server
    try:
        found = _ask(server, "/v1/models", None)
    except UserError as error:
        fix = error.problems[0].suggestion + " if it is, name its model: --model NAME"
        raise user_error(error.problems[0].code, error.problems[0].message, fix) from error
    listed = found.get("data") if isinstance(found, dict) else None
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    names = [entry["id"] for entry in entries if isinstance(entry.get("id"), str)]
    if not isinstance(listed, list):
        message = f"{url}/v1/models answers something else than a list of models"
        raise user_error("server-unreachable", message, "is it the address of a server with OpenAI's interface?")
    if len(names) != 1:
        fix = "name one: --model NAME" + (f" ({', '.join(names[:5])})" if names else "")
        raise user_error("server-model", f"{url} offers {len(names)} models", fix)
    return Server(url, names[0], key, seconds)


def _ask(server: Server, path: str, body: dict[str, Any] | None) -> Any:
    """The JSON that a server answers, within the server's time.

    Raises:
        UserError: It does not, or answers something else. The key is in no message.
    """
    address, fix = server.url + path, "is the server running, and is this its address?"

    def hide(text: Any) -> str:
        told = " ".join(str(text).split())
        return told.replace(server.key.strip(), "***") if server.key.strip() else told

    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {server.key}"} if server.key else {})
    data = json.dumps(body).encode() if body is not None else None
    end = time.monotonic() + server.seconds
    try:
        request = urllib.request.Request(address, data, headers)
        with urllib.request.urlopen(request, timeout=min(server.seconds, 1e6)) as response:
            parts: list[bytes] = []
            while part := response.read1(1 << 16):
                parts.append(part)
                if time.monotonic() > end or len(parts) > MOST:
                    raise TimeoutError("the answer does not come to an end")
        return json.loads(b"".join(parts))
    except urllib.error.HTTPError as error:
        told = hide(error.read(500).decode(errors="replace"))
        raise user_error("server-refused", f"{address}: status {error.code}: {told[:200]}", fix) from error
    except RecursionError as error:
        raise user_error("server-unreachable", f"{address} does not answer in JSON", fix) from error
    except ValueError as error:  # of the address, the key, or the answer
        what = (
            "does not answer in JSON" if isinstance(error, json.JSONDecodeError) else f"can't be asked: {hide(error)}"
        )
        raise user_error("server-unreachable", f"{address} {what}", fix) from error
    except (OSError, http.client.HTTPException) as error:
        told = hide(getattr(error, "reason", error)) or type(error).__name__
        raise user_error("server-unreachable", f"{address}: {told}", fix) from error


def ask_row(server: Server, row: GoldenRow) -> Reply:
    """What a server makes of a golden row.

    Raises:
        UserError: It refuses the row, or answers something else.
    """
    most = (len(row.answer_ids or []) or TOKENS) + SPARE * row.ended
    body: dict[str, Any] = {"model": server.model, "max_tokens": most, "temperature": 0}
    if row.messages is None:
        found = _ask(server, "/v1/completions", body | {"prompt": row.text})
    else:
        tools = {"tools": row.tools} if row.tools else {}
        found = _ask(server, "/v1/chat/completions", body | {"messages": row.messages, **tools})
    try:
        choice = found["choices"][0]
        text = choice["message"]["content"] if row.messages is not None else choice["text"]
        if not isinstance(text, str | None):
            raise TypeError("the text of an answer")
        count = (found.get("usage") or {}).get("prompt_tokens")
        count = count if isinstance(count, int) and count > 0 else None
        return Reply(count, _show_tokens(server, row), str(text or ""), str(choice.get("finish_reason")))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        message = f"{server.url} answers something else than a completion"
        raise user_error("server-unreachable", message, "is it a server with OpenAI's interface?") from error


def _show_tokens(server: Server, row: GoldenRow) -> list[int] | None:
    """The tokens of a prompt as the server makes them: llama-server's way, then vLLM's; None where it shows none."""
    if row.messages is None:
        ways: list[Callable[[], Any]] = [lambda: _ask(server, "/tokenize", {"model": server.model, "prompt": row.text})]
    else:
        tools = {"tools": row.tools} if row.tools else {}
        asked = {"model": server.model, "messages": row.messages, "add_generation_prompt": True, **tools}
        ways = [lambda: _tokenize_rendered(server, row), lambda: _ask(server, "/tokenize", asked)]
    for way in ways:
        with contextlib.suppress(Exception):  # another server's address: it has no such door
            tokens = way()["tokens"]
            if isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens):
                return tokens
    return None


def _tokenize_rendered(server: Server, row: GoldenRow) -> Any:
    tools = {"tools": row.tools} if row.tools else {}
    text = _ask(server, "/apply-template", {"messages": row.messages, **tools})["prompt"]
    return _ask(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})


def find_causes(
    rows: list[GoldenRow], replies: list[Reply], tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None
) -> list[Problem]:
    """What is wrong with a server, and the likely cause. Of other prompts, what is answered says nothing more."""
    if all(reply.ids is not None for reply in replies):
        theirs: list[Any] = [reply.ids for reply in replies]
        if theirs != [row.prompt_ids for row in rows]:
            return [_explain_prompts(rows, theirs, tokenizer, recipe)]
    counts = [reply.count for reply in replies]
    if all(count is not None for count in counts) and counts != [len(row.prompt_ids) for row in rows]:
        return [_explain_prompts(rows, counts, tokenizer, recipe)]
    return list(_explain_ends(rows, replies, tokenizer))


def can_tell(replies: list[Reply]) -> bool:
    """Whether it is known what the server makes of the prompts."""
    return all(reply.ids is not None or reply.count is not None for reply in replies)


def _explain_prompts(
    rows: list[GoldenRow], theirs: list[Any], tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None
) -> Problem:
    """What the server makes of the prompts, as tokens or their numbers, and the one change that explains all rows."""
    shown = isinstance(theirs[0], list)
    ours: list[Any] = [row.prompt_ids if shown else len(row.prompt_ids) for row in rows]
    wrong = [place for place in range(len(rows)) if theirs[place] != ours[place]]
    cause, fix = "another chat template", "serve the result with the chat_template.jinja that it was saved with"
    for name, remedy, change in _changes(tokenizer, recipe):
        made = [change(row) for row in rows]
        if [ids if shown or ids is None else len(ids) for ids in made] == theirs:
            cause, fix = name, remedy
            break
    first = wrong[0]
    told = f"in {len(wrong)} of {len(rows)} rows the server makes other tokens of the prompt"
    if not shown:
        told = f"in {len(wrong)} of {len(rows)} rows the server counts another number of prompt tokens"
        told += f" (row {first + 1}: {theirs[first]}, in training {len(rows[first].prompt_ids)})"
    return Problem("server-differs", f"{told}; likely cause: {cause}", suggestion=fix)


Change = tuple[str, str, Callable[[GoldenRow], list[int] | None]]


def _changes(tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None) -> Iterator[Change]:
    """Changes of a prompt that servers make: what it is, what to do, and the tokens that a row then has."""
    bos = tokenizer.bos_token_id

    def render(turns: Any, row: GoldenRow, **options: Any) -> list[int] | None:
        options = {"add_generation_prompt": True, "tools": row.tools} | options
        try:
            made: Any = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options)
            return list(made) if turns else None
        except Exception:  # a template is a program: this change can't be what the server does
            return None

    def talk(row: GoldenRow) -> Any:
        return [turn for turn in row.messages or [] if turn["role"] != "system"]

    if bos is not None:
        fix = (
            "the server adds a BOS token to a template that has one: take it out of the template, or turn it off there"
        )
        yield "BOS twice", fix, lambda row: [bos, *row.prompt_ids]
        fix = "the server leaves the BOS token out: add_bos_token in tokenizer_config.json, or in the template"
        yield "BOS missing", fix, lambda row: row.prompt_ids[1:] if row.prompt_ids[:1] == [bos] else None
    fix = "serve the result's own chat_template.jinja, which has a place for it"
    yield "the system prompt is dropped", fix, lambda row: render(talk(row), row)
    yield "the system prompt is dropped", fix, lambda row: _without_system(tokenizer, row, talk(row))
    fix = "serve the result's own chat_template.jinja, which has a place of its own for it"
    for between in ("\n\n", "\n", " "):
        yield "the system prompt is put into the user's turn", fix, partial(_render_joined, render, between)
    if "tools" in str(tokenizer.chat_template):
        fix = "pass the tools on to the chat template"
        yield "the tools are dropped", fix, lambda row: render(row.messages, row, tools=None)
    fix = "serve the result's own chat_template.jinja, which begins without a system prompt that nobody wrote"
    yield "no default system prompt", fix, lambda row: _without_system(tokenizer, row, row.messages or [])
    fix = "the template must get add_generation_prompt=True"
    yield "the generation prompt is missing", fix, lambda row: render(row.messages, row, add_generation_prompt=False)
    fix = "the server drops what was said before: check how it passes the messages on"
    yield "earlier turns are dropped", fix, lambda row: render((row.messages or [])[-1:], row)
    if recipe:
        with contextlib.suppress(Exception):  # the base may be gone, or have no template: it explains nothing then
            base = AutoTokenizer.from_pretrained(recipe.model.name_or_path, **recipe.model.location)
            if base.chat_template and base.chat_template != tokenizer.chat_template:
                fix = "serve the result with the chat_template.jinja that it was saved with"
                yield "the base's chat template", fix, lambda row: render_prompt(row.content, base)


def _render_joined(render: Callable[..., list[int] | None], between: str, row: GoldenRow) -> list[int] | None:
    """The tokens of turns whose system prompt stands in the user's first turn."""
    first, *rest = row.messages or [{"role": "user", "content": ""}]
    if first["role"] != "system" or not rest:
        return render(row.messages, row)
    return render([rest[0] | {"content": f"{first['content']}{between}{rest[0]['content']}"}, *rest[1:]], row)


def _without_system(tokenizer: PreTrainedTokenizerBase, row: GoldenRow, turns: Any) -> list[int] | None:
    """The tokens without the system prompt that a template writes by itself."""
    parts = take_apart(tokenizer) if turns else None
    if not parts or parts.system is None:
        return None
    plain = type(parts)(parts.around, parts.answer, None)
    return list(tokenizer(plain.render(turns), add_special_tokens=False)["input_ids"])


def _explain_ends(rows: list[GoldenRow], replies: list[Reply], tokenizer: PreTrainedTokenizerBase) -> Iterator[Problem]:
    """Answers that do not end where the trained model ended them, or print the token that ends them."""
    ends = [place for place, row in enumerate(rows) if row.ended and row.answer_ids]
    silent = [place for place in ends if rows[place].answer and not replies[place].text.strip()]
    if ends and len(silent) == len(ends):
        message = "the answers hold no text"
        yield Problem("server-differs", message, suggestion="does the server hide what it takes for thoughts?")
        return
    printed = [find_special_tokens(reply.text, tokenizer) for reply in replies]
    if found := next((tokens for tokens in printed if tokens), []):
        own: Any = tokenizer.convert_ids_to_tokens((rows[ends[0]].answer_ids or [0])[-1]) if ends else None
        token = own if own in found else found[0]
        message = f"answers print {token}: the server does not take it for a special token, or does not stop there"
        yield Problem("server-differs", message, suggestion=f"make it a stop token of the server: stop: ['{token}']")
        return
    longer = [place for place in ends if _goes_on(rows[place], replies[place])]
    cut = [place for place in ends if replies[place].finish == "length"]
    late = longer if longer else cut if len(cut) > len(ends) / 2 else []  # greedy text alone is no proof
    if late:
        token = tokenizer.convert_ids_to_tokens((rows[late[0]].answer_ids or [0])[-1])
        message = f"{len(late)} of {len(ends)} answers go on after their end; likely cause: the stop token {token}"
        fix = "serve the result's own generation_config.json, or pass it as a stop token"
        yield Problem("server-differs", f"{message} is missing", suggestion=fix)


def _goes_on(row: GoldenRow, reply: Reply) -> bool:
    """Whether an answer is the trained model's, with more after it."""
    return bool(row.answer) and reply.text.strip() != row.answer and reply.text.strip().startswith(row.answer)


HEAD = f"  {'row':<28}{'prompt tokens':<24}{'ends':<10}answer"


def describe_row(number: int, row: GoldenRow, reply: Reply) -> str:
    """What a server made of a row, in a line."""
    own = len(row.prompt_ids)
    count = "not told" if reply.count is None else str(reply.count)
    told = f"{count} of {own}"
    if reply.ids is not None:
        told += ", same ids" if reply.ids == row.prompt_ids else ", other ids"
    answer = "same text" if reply.text.strip() == row.answer else "other text"
    return f"  {number:>2} {row.kind:<25}{told:<24}{reply.finish:<10}{answer if row.answer_ids else ''}".rstrip()


def describe_limits(replies: list[Reply]) -> Iterator[str]:
    """What can't be told of a server."""
    if not any(reply.ids for reply in replies):
        yield "This server does not show its tokens: their number is compared, not which they are."
    if not can_tell(replies):
        yield "It does not count the prompt's tokens, either: what it makes of a prompt can't be told."
    if all(reply.finish not in ("stop", "length") for reply in replies):
        yield "It does not say why its answers end: whether it stops where the model does can't be told."


def find_hints(rows: list[GoldenRow], replies: list[Reply]) -> Iterator[str]:
    """What may be meant, and is no error: greedy text depends on dtype, kernels and quantization."""
    compared = [place for place, row in enumerate(rows) if row.answer_ids]
    same = [place for place in compared if replies[place].text.strip() == rows[place].answer]
    if compared and not same and not any(_goes_on(rows[place], replies[place]) for place in compared):
        told = [place for place in compared if rows[place].before and replies[place].text.strip() == rows[place].before]
        if told:
            yield "hint: the answers are those of the base: is the adapter loaded?"
        else:
            yield "hint: no answer is that of the trained model: are these its weights? quantized ones answer otherwise"
